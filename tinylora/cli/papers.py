"""nf4, count, experiments: the commands that recompute what the papers say."""

import sys
from pathlib import Path

from .options import FORMAT, can_draw, positive


# ------------------------------------------------------------------------------------------------------------------ nf4
def nf4_parser(commands):
    p = commands.add_parser(
        "nf4",
        help="build NF4 step by step, and say what it is optimal for",
        description="Build the NF4 code from normal quantiles, step by step, with the bit patterns of all 16 values beside the published\n"
        "ones; then what breaks the table; then what NF4 costs for normal weights in blocks of 16 to 4096, and how much that lies\n"
        "above the best code with the same -1, 0 and 1 (exact to the digits printed, by quadrature). The figure\n"
        "shows that by block size, beside what theory predicts.",
        epilog="examples:\n  tinylora nf4\n  tinylora nf4 --blocksizes 12 64 69 453 --figure none\n",
        formatter_class=FORMAT,
    )
    p.set_defaults(run=_nf4)
    p.add_argument(
        "--blocksizes",
        nargs="+",
        type=positive,
        default=None,
        metavar="I",
        help="blocks for the table (16 32 ... 4096)",
    )
    p.add_argument(
        "--figure", default=None, metavar="FILE", help="where to draw (nf4.svg if matplotlib is installed), or none"
    )
    p.add_argument("--traceback", action="store_true", help="show where an error came from instead of one sentence")


def _nf4(args):
    from ..figures import style
    from ..papers import nf4_construction

    table = nf4_construction.optimality_table(*([args.blocksizes] if args.blocksizes else []))
    print(nf4_construction.construction(), nf4_construction.deviations(), table, sep="\n\n")
    if args.figure == "none":
        return
    if args.figure:
        style.require_matplotlib()
    if args.figure or can_draw():
        path = args.figure or "nf4.svg"
        style.save(nf4_construction.nf4_optimal_for(args.blocksizes), path)
        print(f"\nfigure: {path}")


# ----------------------------------------------------------------------------------------------------------------------- count
def count_parser(commands):
    p = commands.add_parser(
        "count",
        help="recompute every parameter count of the LoRA paper, and say which rows do not follow their formula",
        description="The audit of the LoRA paper's own numbers: printed, recomputed from its formulas, verdict. Then what does not hold.",
        formatter_class=FORMAT,
    )
    p.set_defaults(run=_count)
    p.add_argument("--traceback", action="store_true", help="show where an error came from instead of one sentence")


def _count(args):
    from ..papers import lora_numbers

    print(lora_numbers.describe())


# ----------------------------------------------------------------------------------------------------------------- experiments
def experiments_parser(commands):
    p = commands.add_parser(
        "experiments",
        help="put the papers' qualitative claims to the test on toys",
        description="Each claim of LoRA and its descendants that is not arithmetic, on a toy of a second or two: what the paper says,\n"
        "what came out over the seeds, and whether that holds. A toy can refute a claim's generality; it cannot confirm what a\n"
        "claim says of language models.",
        epilog="examples:\n"
        "  tinylora experiments                         all of them, about a minute\n"
        "  tinylora experiments rank_sweep first_step   two of them\n"
        "  tinylora experiments --list                  their names and titles\n",
        formatter_class=FORMAT,
    )
    p.set_defaults(run=_experiments)
    p.add_argument("names", nargs="*", metavar="NAME", help="which (all)")
    p.add_argument("--list", action="store_true", help="only list the names")
    p.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="one run each (0 1 2)")
    p.add_argument(
        "--out", default=None, metavar="FOLDER", help="also write the table as README.md, with a figure for each claim"
    )
    p.add_argument("--traceback", action="store_true", help="show where an error came from instead of one sentence")


def _experiments(args):
    from tqdm import tqdm

    from ..papers import claims

    if args.list:
        width = max(map(len, claims.EXPERIMENTS))
        for name, e in claims.EXPERIMENTS.items():
            print(f"{name:<{width}}  {e.title} ({e.source})")
        return
    names = args.names or list(claims.EXPERIMENTS)
    with tqdm(total=len(names) * len(args.seeds), disable=None, unit="run", file=sys.stderr) as bar:

        def tell(name, seed, seconds):
            bar.set_postfix_str(f"{name}, seed {seed}")
            bar.update()

        results = claims.run(names, args.seeds, tell)
    print(claims.describe(results))
    if args.out:
        from ..papers.claims import page

        page.write_page(results, args.out, pictures=can_draw())
        print(f"the page: {Path(args.out) / 'README.md'}")
