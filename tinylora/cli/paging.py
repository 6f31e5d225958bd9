"""The command that measures what paging costs."""

from pathlib import Path

from .options import can_draw, command, positive, size


def paging_parser(commands):
    p = command(
        commands,
        "paging",
        _paging,
        "what a paged optimizer costs: bytes moved and time against the budget",
        "Run one AdamW with 100 % down to 5 % of its state resident, and print bytes moved a step, waits and time beside the optimizer\n"
        "that is not paged. All end with the same bits, which is checked.\n\n"
        "around: the pages first to last in every step, where the least recently used page is always the one needed next.\n"
        "back and forth: every second step from last to first, as tinylora's AdamW goes.",
        "examples:\n"
        "  tinylora paging                                   32 MB of state, pages of 256k in a file, a few seconds\n"
        "  tinylora paging --pool host --page-bytes 1M --out paging.svg\n"
        "  tinylora finetune --trace                         the timeline of a real run: faults, evictions, resident bytes",
        seed=False,
    )
    p.add_argument("--elements", type=positive, default=1 << 22, help="parameters; the state is 8 bytes each (4194304)")
    p.add_argument("--page-bytes", type=size, default=1 << 18, metavar="BYTES", help="bytes of a page (256k)")
    p.add_argument(
        "--pool",
        choices=("host", "file", "managed"),
        default="file",
        help="where pages live that are not resident (file)",
    )
    p.add_argument("--rounds", type=positive, default=5, help="rounds of two steps; times are medians over them (5)")
    p.add_argument("--out", default=None, metavar="FILE", help="a figure, such as paging.svg")


def _paging(args):
    from .. import paging_costs
    from ..figures import style
    from ..figures.paging import paging_costs as draw

    if args.out and not can_draw():
        args.out = None
    costs, state, same = paging_costs.measure(
        args.elements, args.page_bytes, args.pool, rounds=args.rounds, device=args.device
    )
    print(paging_costs.describe(costs, state, same))
    if args.out:
        style.save(draw(costs, state), Path(args.out))
        print(f"figure: {args.out}")
