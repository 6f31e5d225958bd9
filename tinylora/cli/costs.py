"""memory, paging: the commands that predict and measure what training costs."""

from ..costs.tables import in_units
from .options import (
    block_size,
    can_draw,
    check_figure,
    check_memory,
    command,
    disagreement,
    draw,
    rank,
    size,
    whole,
)

# ----------------------------------------------------------------------------------------------------------------------- memory
_MEMORY = """Count the bytes of a training step from a model's sizes alone; nothing is loaded.

  weights      embeddings, norms and head; for full fine-tuning and LoRA the linear layers too. QLoRA holds those in 4 bits,
               with a constant for each block (32 bits; or 8 and a little, with double quantization)
  adapters     r (d_in + d_out) numbers for each adapted matrix. Only they have gradients and optimizer state (m and v)
  activations  what the forward pass keeps for the backward pass. With --checkpointing only the blocks' inputs, and one block

A figure shows the same; for the published Llamas it is figure 6 of the QLoRA paper, recomputed over the paper's own labels.

--precision says what a number costs: `engine` is what tinylora holds (float32, and bfloat16 for LoRA's frozen layers),
`paper` what QLoRA counts (16-bit weights, gradients and activations, float32 Adam: 12 bytes a parameter in full
fine-tuning), `master` adds a float32 copy of what is trained (16 bytes)."""

_MEMORY_EXAMPLES = """examples:
  tinylora memory --model llama-65b --method qlora --checkpointing    does it fit into 48 GB?
  tinylora memory --model llama-65b --method full --precision paper   the paper's > 780 GB
  tinylora memory --model base --method all --batch-size 8 --seq-len 256    four methods on the embedded model
  tinylora memory --model base --measure                run one step, and print what it held beside what was predicted
  tinylora memory --model llama-65b --machines 8 --checkpointing      what eight machines hold and send in a step
  tinylora memory --audit                               the paper's numbers with verdicts, and what the paper map says
"""


def memory_parser(commands):
    from ..costs.memory import METHODS, MODELS

    p = command(
        commands,
        "memory",
        _memory,
        "what full fine-tuning, LoRA and QLoRA hold in memory, for any Llama; and the QLoRA paper's numbers, recomputed",
        _MEMORY,
        _MEMORY_EXAMPLES,
        device=False,
        seed=False,
    )
    p.add_argument(
        "--model",
        default=None,
        help=f"{', '.join(MODELS)}, 'base' (embedded), or a folder with config.json (llama-65b; with --measure base)",
    )
    p.add_argument(
        "--method",
        choices=(*METHODS, "all"),
        default="qlora",
        help="what is trained, and in how many bits the rest is (qlora)",
    )
    _base_and_adapter_options(p.add_argument_group("LoRA and quantization"))
    _step_options(p.add_argument_group("the step"))
    g = p.add_argument_group("what else to print")
    g.add_argument(
        "--machines",
        type=whole(1, 10**6),
        default=None,
        metavar="N",
        help="also what N machines that train it together hold and send, by every method, and how long that takes",
    )
    g.add_argument("--measure", action="store_true", help="also run one step of --model base, and compare row by row")
    g.add_argument(
        "--audit",
        action="store_true",
        help="the QLoRA paper's numbers, recomputed, and the paper map's verdicts (instead); exit status 1 if one of these, "
        "or a number in digits beside them, is not computed; words and reasons are not compared",
    )
    g.add_argument(
        "--out", default=None, metavar="FILE", help="where to draw (memory.svg if matplotlib is installed), or none"
    )


def _base_and_adapter_options(g):
    g.add_argument("-r", type=rank, default=64, help="rank of the bypasses (64, the paper's)")
    g.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="'all-linear', or names such as q_proj v_proj",
    )
    g.add_argument("--blocksize", type=block_size, default=64, help="weights that share one constant (64)")
    g.add_argument("--no-double-quant", action="store_true", help="constants in 32 bits instead of 8 around their mean")


def _step_options(g):
    from ..costs.memory import PRECISIONS

    g.add_argument(
        "--seq-len",
        type=whole(1, 10**15),
        default=None,
        help="tokens a sequence (512, or as many as the model has positions)",
    )
    g.add_argument("--batch-size", type=whole(1, 10**15), default=1, help="sequences at a time (1)")
    g.add_argument(
        "--checkpointing", action="store_true", help="keep the blocks' inputs, and rebuild one block at a time"
    )
    g.add_argument(
        "--optimizer",
        choices=("adamw", "adamw8bit"),
        default="adamw",
        help="m and v in 32 bits, or in 8 with blocks of 256",
    )
    g.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default=None,
        help="what a number costs (paper for the published Llamas, engine for the others)",
    )


def _memory(args):
    from ..costs import memory
    from ..papers import qlora_numbers

    if args.out not in (None, "none"):
        check_figure(args.out)
    if args.audit:
        rows = qlora_numbers.audit()
        print(qlora_numbers.describe(rows))
        _draw(args, ())
        return disagreement(qlora_numbers.contradictions(rows))
    model = args.model or ("base" if args.measure else "llama-65b")
    published = model in memory.MODELS and model.startswith("llama-")
    precision = args.precision or ("paper" if published and not args.measure else "engine")
    if args.measure:
        _check_measurable(model, precision)
    config = memory.config_of(model)
    args.seq_len = args.seq_len or min(512, config.max_position_embeddings)
    options = _options(args, memory.PRECISIONS[precision])
    plans = [(args.method, args.checkpointing)]
    if args.method == "all":
        plans = [("full", False), ("lora", False), ("qlora", False), ("qlora", True)]
    accounts = [memory.predict(config, method, checkpointing=c, **options) for method, c in plans]
    if args.measure:
        need = max(account.total for account in accounts) + 24 * args.batch_size * args.seq_len
        check_memory(need, f"memory: a step of {args.batch_size} x {args.seq_len} tokens")
    size = f"{memory.parameters(config):,} parameters"
    print(f"{model}, {size}; {args.batch_size} × {args.seq_len} tokens, precision: {precision}")
    if len(plans) == 1:
        other = memory.predict(config, args.method, checkpointing=not args.checkpointing, **options)
        print(_checkpointing(args.checkpointing, accounts[0].total, other.total))
    print("\n" + memory.describe(accounts))
    if args.machines:
        from ..costs import communication

        print("\n" + communication.describe(config, args.machines, checkpointing=args.checkpointing, **options))
    if args.measure:
        for account, plan in zip(accounts, plans, strict=True):
            print(f"\n{account.label}, predicted and measured, in bytes")
            print(memory.describe_agreement(account, _measured(args, options, *plan)))
    if published:
        print(f"\n{qlora_numbers.describe_size(model)}")
    _draw(args, accounts, published)


def _checkpointing(on, total, other):
    """Which of two accounts is printed, and the total of the other: the activations often decide whether a step fits."""
    here, there = ("with", "without") if on else ("without", "with")
    return f"{here} checkpointing: {in_units(total)} in all; {there} it: {in_units(other)}"


def _check_measurable(model, precision):
    if model != "base":
        raise ValueError(
            f"memory: --measure runs a step of the embedded model, and --model is {model!r}; expected 'base'"
        )
    if precision != "engine":
        raise ValueError(
            f"memory: --measure compares with what tinylora holds, so --precision must be engine, not {precision}"
        )


def _options(args, precision):
    """What `memory.predict` is told beside the model, the method and checkpointing."""
    targets = args.target_modules
    return {
        "r": args.r,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        "blocksize": args.blocksize,
        "double_quant": not args.no_double_quant,
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "optimizer": args.optimizer,
        "precision": precision,
    }


def _measured(args, options, method, checkpointing):
    """The Account of a step on the embedded model and the embedded text."""
    import numpy as np

    from .. import adapters, backend
    from ..costs import memory
    from ..models.llama import Llama
    from ..nn import quantize_linears
    from ..training import finetune

    job = finetune.Job()
    model = Llama.from_pretrained("base")
    if method != "full":
        code = finetune.METHODS[method].code
        quantize_linears(model, code, options["blocksize"], options["double_quant"])
        backend.seed(0)
        adapters.add_lora(model, options["r"], target_modules=options["target_modules"])
    model.gradient_checkpointing = checkpointing
    text, _ = finetune.corpus(job, model.tokenizer)
    batch = text.batch(np.random.default_rng(0), options["batch_size"], options["seq_len"])
    return memory.measure(model, batch, finetune.OPTIMIZERS[options["optimizer"]](model.trainable()))


def _draw(args, accounts, published=False):
    """Figure 6 for the published Llamas and the audit, else the accounts as bars."""
    from ..figures.memory import account_bars
    from ..papers.qlora_numbers import figure_6

    if args.out == "none":
        return
    print()
    if args.out or can_draw():
        alone = published and args.method == "qlora" and len(accounts) == 1
        figure_of_the_paper = args.audit or alone
        draw(
            lambda: figure_6(args.seq_len or 512) if figure_of_the_paper else account_bars(accounts),
            args.out or "memory.svg",
            asked=bool(args.out),
        )


# ----------------------------------------------------------------------------------------------------------------------- paging
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
    p.add_argument(
        "--elements", type=whole(1, 10**12), default=1 << 22, help="parameters; the state is 8 bytes each (4194304)"
    )
    p.add_argument("--page-bytes", type=size, default=1 << 18, metavar="BYTES", help="bytes of a page (256k)")
    p.add_argument(
        "--pool",
        choices=("host", "file", "managed"),
        default="file",
        help="where pages live that are not resident (file)",
    )
    p.add_argument(
        "--rounds", type=whole(1, 10**6), default=5, help="rounds of two steps; times are medians over them (5)"
    )
    p.add_argument("--out", default=None, metavar="FILE", help="a figure, such as paging.svg")


def _paging(args):
    from ..costs import paging
    from ..figures.paging import paging_costs

    if args.out:
        check_figure(args.out)
    check_memory(paging.most_bytes(args.elements, args.pool), f"paging: the state of {args.elements:,} parameters")
    costs, state, same = paging.measure(
        args.elements, args.page_bytes, args.pool, rounds=args.rounds, device=args.device
    )
    print(paging.describe(costs, state, same))
    if args.out:
        draw(lambda: paging_costs(costs, state), args.out, asked=True)
