"""nf4, count, experiments, ranks, switch, figures: the commands that recompute what the papers say."""

import re
import sys
from dataclasses import replace
from pathlib import Path

from .options import (
    any_seed,
    block_size,
    can_draw,
    check_figure,
    command,
    disagreement,
    draw,
    finite,
    new_tokens,
    rank,
    recipe,
    recipe_options,
    whole,
)


# ------------------------------------------------------------------------------------------------------------------ nf4
def nf4_parser(commands):
    p = command(
        commands,
        "nf4",
        _nf4,
        "build NF4 step by step, and say what it is optimal for",
        "Build the NF4 code from normal quantiles, step by step, with the bit patterns of all 16 values beside the published\n"
        "ones; then what breaks the table; then what NF4 costs for normal weights in blocks of 16 to 4096, and how much that lies\n"
        "above the best code with the same -1, 0 and 1 (exact to the digits printed, by quadrature). The figure\n"
        "shows that by block size, beside what theory predicts.",
        "examples:\n  tinylora nf4\n  tinylora nf4 --blocksizes 12 64 69 453 --figure none\n",
        device=False,
        seed=False,
    )
    p.add_argument(
        "--blocksizes",
        nargs="+",
        type=block_size,
        default=None,
        metavar="I",
        help="blocks for the table (16 32 ... 4096)",
    )
    p.add_argument(
        "--figure", default=None, metavar="FILE", help="where to draw (nf4.svg if matplotlib is installed), or none"
    )


def _nf4(args):
    from ..papers import nf4_construction

    if args.figure not in (None, "none"):
        check_figure(args.figure)
    table = nf4_construction.optimality_table(*([args.blocksizes] if args.blocksizes else []))
    print(nf4_construction.construction(), nf4_construction.deviations(), table, sep="\n\n")
    if args.figure == "none":
        return
    print()
    if args.figure or can_draw():
        figure = lambda: nf4_construction.nf4_optimal_for(args.blocksizes)  # noqa: E731
        draw(figure, args.figure or "nf4.svg", asked=bool(args.figure))


# ----------------------------------------------------------------------------------------------------------------------- count
def count_parser(commands):
    command(
        commands,
        "count",
        _count,
        "recompute every parameter count of the LoRA paper, and say which rows do not follow their formula",
        "The audit of the LoRA paper's own numbers: printed, recomputed from its formulas, verdict. Then what the paper map says\n"
        "of them, and the line that PEFT prints for LoRA on a T5 of 11 billion weights, from its shapes. The exit status is 1 if\n"
        "a verdict there is not that of the numbers, or if a number in digits is not among them, in what the map says was found\n"
        "or in what it says the paper says. Its words, its reasons and numbers in words are not compared.",
        device=False,
        seed=False,
    )


def _count(args):
    from ..papers import lora_numbers

    rows = lora_numbers.audit()
    print(lora_numbers.describe(rows))
    print(f"\n{lora_numbers.post()[0]}")
    return disagreement(lora_numbers.contradictions(rows))


# ----------------------------------------------------------------------------------------------------------------- experiments
def experiments_parser(commands):
    p = command(
        commands,
        "experiments",
        _experiments,
        "put the papers' qualitative claims to the test on toys",
        "Each claim of LoRA and its descendants that is not arithmetic, on a toy of a second or two: what the paper says,\n"
        "what came out over the seeds, and whether that holds. A toy can refute a claim's generality; it cannot confirm what a\n"
        "claim says of language models.",
        "examples:\n"
        "  tinylora experiments                         all of them, about a minute\n"
        "  tinylora experiments rank_sweep first_step   two of them\n"
        "  tinylora experiments --list                  their names and titles\n",
        device=False,
        seed=False,
    )
    p.add_argument("names", nargs="*", metavar="NAME", help="which (all)")
    p.add_argument("--list", action="store_true", help="only list the names")
    p.add_argument("--seeds", type=any_seed, nargs="+", default=(0, 1, 2), help="one run each (0 1 2)")
    p.add_argument(
        "--out",
        default=None,
        metavar="FOLDER",
        help="also write the table as README.md, with a figure for each claim and the numbers of each seed (results.json)",
    )


def _experiments(args):
    from tqdm import tqdm

    from ..models.files import check_target
    from ..papers import claims

    if args.list:
        width = max(map(len, claims.EXPERIMENTS))
        for name, e in claims.EXPERIMENTS.items():
            print(f"{name:<{width}}  {e.title} ({e.source})")
        return
    if args.out:
        check_target(args.out)  # before a minute of work
    names = args.names or list(claims.EXPERIMENTS)
    with tqdm(total=len(names) * len(args.seeds), disable=None, unit="run", file=sys.stderr) as bar:

        def tell(name, seed, seconds):
            bar.set_postfix_str(f"{name}, seed {seed}")
            bar.update()

        results = claims.run(names, args.seeds, tell)
    print(claims.describe(results))
    if args.out:
        from ..papers.claims import page

        page.write_page(results, args.seeds, args.out, pictures=can_draw())
        print(f"the page: {Path(args.out) / 'README.md'}")


# ----------------------------------------------------------------------------------------------------------------------- ranks
def ranks_parser(commands):
    from ..papers.ranks import JOB, RANKS, RECIPE

    p = command(
        commands,
        "ranks",
        _ranks,
        "which rank is enough: table 6 of the LoRA paper on this model",
        "Fine-tune with several ranks, on W_q and W_v alone and on every linear layer, for several seeds, and print held-out\n"
        "bits per byte. alpha, steps and learning rate stay the same for every rank. The base is held in bfloat16 (LoRA).",
        "examples:\n"
        "  tinylora ranks                            5 ranks x 2 sets of layers x 3 seeds, about half an hour on two cores\n"
        "  tinylora ranks -r 1 8 --seeds 0 --steps 50 --out quick\n\n"
        "A sweep that was stopped goes on where it was when the same command is given again.",
        seed=False,
    )
    p.add_argument(
        "--model", default=JOB.model, help="'base' (embedded) or a folder with config.json and model.safetensors"
    )
    p.add_argument(
        "--text", default=None, help="a UTF-8 .txt file, or a .jsonl file of prompt and answer (the Jargon File)"
    )
    p.add_argument("-r", type=rank, nargs="+", default=RANKS, help=f"the ranks ({' '.join(map(str, RANKS))})")
    p.add_argument("--alpha", type=finite, default=JOB.alpha, help=f"the same for every rank ({JOB.alpha})")
    p.add_argument("--seeds", type=any_seed, nargs="+", default=(0, 1, 2), help="(0 1 2)")
    p.add_argument("--out", default="ranks", help="folder for the runs and ranks.svg (ranks)")
    recipe_options(p, RECIPE)
    p.set_defaults(kept="the runs that had ended are kept")


def _ranks(args):
    from ..figures import runs
    from ..papers.ranks import JOB, RECIPE, describe, sweep

    job = replace(JOB, model=args.model, text=args.text, alpha=args.alpha, device=args.device)
    reports = sweep(job, recipe(args, RECIPE), args.r, seeds=args.seeds, out=args.out)
    print(describe(reports))
    if can_draw():
        after = {key: [r.after for r in rs] for key, rs in reports.items()}
        draw(lambda: runs.rank_table(after), Path(args.out) / "ranks.svg")


# ---------------------------------------------------------------------------------------------------------------------- switch
def switch_parser(commands):
    from ..papers.switching import JOB, RECIPE

    p = command(
        commands,
        "switch",
        _switch,
        "two adapters on one base, swapped while generating",
        "Train one adapter on each of two texts, put both on one quantized base, and write a text whose pieces come from one and the\n"
        "other in turn. Printed beside it: which adapter predicts which text, the bytes and the time that each way of switching\n"
        "takes, and a batch whose rows go through different adapters. The base's bits are checked in the end.",
        "examples:\n"
        "  tinylora switch                              the Jargon File and tinylora's own source, about three minutes on two cores\n"
        "  tinylora switch --texts mine.txt yours.txt   your own\n\n"
        "The adapters stay in the folder: the same command again only switches.",
    )
    p.add_argument(
        "--model", default=JOB.model, help="'base' (embedded) or a folder with config.json and model.safetensors"
    )
    p.add_argument(
        "--texts",
        nargs=2,
        default=None,
        metavar="FILE",
        help="two UTF-8 text files (the Jargon File and this package's source)",
    )
    p.add_argument(
        "--method", choices=("qlora", "lora"), default=JOB.method, help="the base in NF4, or in bfloat16 (qlora)"
    )
    p.add_argument("-r", type=rank, default=JOB.r, help=f"rank of both adapters ({JOB.r})")
    p.add_argument("--alpha", type=finite, default=JOB.alpha, help=f"({JOB.alpha})")
    p.add_argument(
        "--prompts", nargs=2, default=None, metavar="TEXT", help="what the pieces of each adapter begin with"
    )
    p.add_argument("--pieces", type=whole(1, 10**6), default=4, help="pieces of text, each under the next adapter (4)")
    p.add_argument("--max-new-tokens", type=new_tokens, default=160, help="tokens a piece (160)")
    p.add_argument("--out", default="tinylora-switch", help="folder for the adapters (tinylora-switch)")
    recipe_options(p, RECIPE)
    p.set_defaults(kept="the last checkpoint, if there was one, is kept")


def _switch(args):
    from ..models import files

    with files.locked(args.out):
        _switch_in_folder(args)


def _switch_in_folder(args):
    from ..papers.switching import JOB, PROMPTS, RECIPE, demonstrate, describe, own_source, train

    if args.texts:
        texts = {re.sub(r"[^\w-]", "-", Path(t).stem): Path(t) for t in args.texts}
        if len(texts) < 2 or "base" in texts:
            raise ValueError(
                "switch: the adapters are called after the texts, which need two names, neither of them 'base'"
            )
    else:
        texts = {"jargon": None, "source": own_source(args.out)}
    job = replace(JOB, model=args.model, method=args.method, r=args.r, alpha=args.alpha, device=args.device)
    plan = recipe(args, RECIPE)
    prompts = {} if args.texts else PROMPTS
    if args.prompts:
        prompts = dict(zip(texts, args.prompts, strict=True))
    folders = train(texts, args.out, job, plan)
    shown = demonstrate(texts, folders, job, plan, prompts, args.max_new_tokens, args.pieces, seed=args.seed)
    print(describe(shown, list(texts)))


# --------------------------------------------------------------------------------------------------------------------- figures
def figures_parser(commands):
    p = command(
        commands,
        "figures",
        _figures,
        "draw every figure of figures/ again",
        "Draw the figures of the findings and of the claims again, as the same bytes, in a clone of tinylora. What takes seconds is\n"
        "computed anew. Figures of long runs are drawn from the runs' numbers, which lie in figures/data with the command that\n"
        "measured them. All are drawn before the first is written.\n\n"
        "The bytes are the same for one version of matplotlib, which the files name. What the claims' toys train may end otherwise in\n"
        "its last digits with another BLAS kernel.",
        "examples:\n"
        "  tinylora figures                      all of them, about two minutes, most of them for the claims\n"
        "  tinylora figures nf4 ranks            two of them\n"
        "  tinylora figures claims --out drawn   the claims', into a folder of their own\n"
        "  tinylora figures --check              write nothing, and say which files are not what would be drawn\n",
        device=False,
        seed=False,
    )
    p.add_argument(
        "names", nargs="*", metavar="NAME", help="a file's name without .svg, or claims for all of those (all)"
    )
    p.add_argument("--out", default="figures", metavar="FOLDER", help="where the files are, or are written (figures)")
    p.add_argument(
        "--check", action="store_true", help="compare the bytes with the files there; exit status 1 if any differ"
    )


def _figures(args):
    from ..figures.style import require_matplotlib
    from ..models.files import check_target
    from ..papers import gallery

    names = gallery.chosen(args.names)
    require_matplotlib()
    if not args.check:
        check_target(args.out)
    drawn, differ = {}, []
    for name, svg, seconds in gallery.draw(names):
        path, drawn[name] = Path(args.out, f"{name}.svg"), svg
        now = "new" if not path.is_file() else "the same bytes" if path.read_bytes() == svg else "differs"
        differ += [name] if now != "the same bytes" else []
        print(f"{name + '.svg':<36} {seconds:5.1f} s  {now}", flush=True)
    if args.check:
        said = f"not what would be drawn: {', '.join(differ)}" if differ else "every file is what would be drawn"
        print(f"{len(drawn) - len(differ)} of {len(drawn)} figures in {args.out} are the same bytes; {said}")
        return 1 if differ else 0
    gallery.write(drawn, args.out)
    print(f"{len(drawn)} figures written to {args.out}, {len(differ)} of them new or changed")
    return 0
