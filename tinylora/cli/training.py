"""finetune, pretrain: the commands that train."""

import sys
from dataclasses import fields
from pathlib import Path

from .options import (
    any_seed,
    block_size,
    budget,
    can_draw,
    check_memory,
    command,
    draw,
    finite,
    natural,
    positive,
    rank,
    rate,
    recipe,
    recipe_options,
    size,
    whole,
)
from .together import OPTION

# ------------------------------------------------------------------------------------------------------------- finetune
_FINETUNE = """Fine-tune a pretrained Llama with QLoRA.

  1  load the model and quantize its linear layers to NF4, blocks of 64, constants in 8 bits (double quantization)
  2  freeze it and put a LoRA bypass of rank r on every linear layer: h = W x + (alpha/r) B A x
  3  train A and B with AdamW, whose state is paged through a budget of resident bytes
  4  print held-out bits per byte before and after, and where the bytes went

Without arguments it takes the embedded byte-level model and the embedded Jargon File."""

_FINETUNE_EXAMPLES = r"""examples:
  tinylora finetune                                     the main job, about two minutes on two cores
  tinylora finetune --text my.txt --out mine            your own text; the last tenth is held out
  tinylora finetune --text pairs.jsonl --out pairs      {"prompt": ..., "answer": ...} lines; the loss is on the answer
  tinylora finetune --text chats.jsonl --model my-qwen --epochs 2 --out chats   {"messages": [...]} lines, each twice; the loss
                                                        is on what the assistant says
  tinylora finetune --adapter tinylora-run/adapter --steps 100 --out further   an adapter, trained further on its own base
  tinylora finetune --target-modules q_proj v_proj --out qv  the paper's choice of layers
  tinylora finetune --method int8 --out int8            LoRA on a base in 8 bits (LLM.int8)
  tinylora finetune --trace --page-budget 256k --out traced  a figure of what was paged, step by step
  tinylora finetune --compare --out compare             full, LoRA, and QLoRA in three 4-bit codes, in one table and figure
  mpirun -n 4 --bind-to none tinylora finetune --distributed --shards 4    the same bytes from four processes

a real LLM (extra llm), within 1.2 GB of memory:
  tinylora finetune --model SmolLM2-135M-Instruct.Q4_1.gguf --compute-dtype bfloat16 --checkpointing --pool file \
    --steps 100 --batch-size 2 --seq-len 256 --lr 5e-4 --heldout 32 --out smol

A run that was stopped goes on from its last checkpoint when the same command is given again, and one that has ended when it
is given more --steps or --epochs. On the same machine, with the same
BLAS library, it ends with the same bytes as one that was left alone."""


def finetune_parser(commands):
    from ..training.finetune import LORA_RECIPE

    summary = "QLoRA: quantize a model to 4 bits and train an adapter on a text"
    p = command(commands, "finetune", _finetune, summary, _FINETUNE, _FINETUNE_EXAMPLES)
    _model_options(p)
    _comparing_options(p)
    _lora_options(p.add_argument_group("LoRA"))
    p.add_argument(
        "--adapter",
        default=None,
        metavar="FOLDER",
        help="train this adapter further, of finetune's or PEFT's: on its own base, held as it was then, with its own settings (none)",
    )
    _quantization_options(p.add_argument_group("quantization"))
    _memory_options(p.add_argument_group("memory"))
    p.add_argument(
        "--eval-every", type=natural, default=0, help="steps between held-out evaluations (0: only before and after)"
    )
    recipe_options(p, LORA_RECIPE)
    _distributed_option(p)
    p.set_defaults(kept="the last checkpoint, if there was one, is kept")
    p.set_defaults(lr=None)  # full fine-tuning has a rate of its own


def _distributed_option(p):
    p.add_argument(
        OPTION,
        action="store_true",
        help="train in all processes that mpirun has started, on one machine or on several (extra mpi). They share out the "
        "--shards of each step; how many they are changes no bit of the result. docs/many_machines.md says how to start them",
    )


def _ranks(name, args, plan):
    """The processes that train together; a sentence where some of them have nothing to do."""
    import warnings

    from ..training.distributed import ALONE, world

    ranks = world() if args.distributed else ALONE
    shards = plan.accumulate * min(plan.shards, plan.batch_size)
    if shards < ranks.size:
        warnings.warn(
            f"{name}: a step has {shards} shards, which leaves {ranks.size - shards} of {ranks.size} processes without work; give more "
            "--shards, or a larger --batch-size or --accumulate (with another number of shards a run ends with other bytes)",
            stacklevel=2,
        )
    return ranks


def _model_options(p):
    from ..training.finetune import METHODS, Job

    p.add_argument(
        "--model",
        default=Job.model,
        help="'base' (embedded), a folder of a Llama, Mistral, Qwen2 or Qwen3 (dense, or in bitsandbytes' 4 or 8 bits), or "
        "FILE.gguf (base; with --adapter its own)",
    )
    p.add_argument(
        "--text",
        default=None,
        help="UTF-8 text, or records as JSON lines or an array: text, prompt and answer or completion, instruction and output, "
        "messages, conversations (the embedded Jargon File; for a chat model as questions and answers)",
    )
    p.add_argument(
        "--heldout", type=positive, default=None, metavar="N", help="evaluate on the first N held-out sequences (all)"
    )
    p.add_argument(
        "--out", default="tinylora-run", help="folder for the checkpoint, the adapter and report.json (tinylora-run)"
    )
    p.add_argument(
        "--method", choices=tuple(METHODS), default=Job.method, help="what is frozen, and in how many bits (qlora)"
    )


def _comparing_options(p):
    from ..training.finetune import COMPARED, METHODS

    p.add_argument(
        "--compare",
        action="store_true",
        help="run every method for each of --seeds (instead of --method and --seed), print one table, draw one figure",
    )
    p.add_argument("--seeds", type=any_seed, nargs="+", default=None, help="seeds of --compare (0 1 2)")
    p.add_argument(
        "--methods",
        nargs="+",
        choices=tuple(METHODS),
        default=COMPARED,
        help=f"methods of --compare ({' '.join(COMPARED)})",
    )
    p.add_argument("--full-lr", type=rate, default=None, help="learning rate of full fine-tuning in --compare (0.001)")


def _lora_options(g):
    from ..training.finetune import Job

    g.add_argument("-r", type=rank, default=Job.r, help=f"rank of the bypass ({Job.r})")
    g.add_argument("--alpha", type=finite, default=Job.alpha, help=f"the bypass is scaled by alpha/r ({Job.alpha})")
    g.add_argument("--dropout", type=rate, default=Job.dropout, help="on the input of the bypass, while training (0)")
    g.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="'all-linear', or names such as q_proj v_proj, or one regular expression for whole paths after 're:'",
    )
    g.add_argument(
        "--exclude-modules",
        nargs="+",
        default=None,
        metavar="NAME",
        help="of the target modules leave these out: names, or one regular expression after 're:' (none)",
    )
    g.add_argument(
        "--layers-to-transform",
        type=natural,
        nargs="+",
        default=None,
        metavar="N",
        help="only the target modules in the blocks of these numbers, from 0 (all)",
    )
    g.add_argument("--rslora", dest="use_rslora", action="store_true", help="scale by alpha/sqrt(r) instead (rsLoRA)")
    g.add_argument("--dora", dest="use_dora", action="store_true", help="train direction and magnitude apart (DoRA)")


def _quantization_options(g):
    from ..training.finetune import Job

    g.add_argument(
        "--blocksize", type=block_size, default=Job.blocksize, help=f"weights that share one absmax ({Job.blocksize})"
    )
    g.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16", "float16"),
        default=Job.compute_dtype,
        help="rounding of the products with the frozen weights, and on a GPU of all products (float32)",
    )


def _memory_options(g):
    from ..training.finetune import OPTIMIZERS, Job

    g.add_argument(
        "--page-budget",
        type=budget,
        default=Job.page_budget,
        metavar="BYTES",
        help="optimizer state that may be resident at a time, or none for all of it (1M)",
    )
    g.add_argument("--page-bytes", type=size, default=Job.page_bytes, metavar="BYTES", help="bytes of a page (64k)")
    g.add_argument(
        "--pool",
        choices=("host", "file", "managed"),
        default=Job.pool,
        help="where pages live that are not resident: host memory, a file, or CUDA managed memory (host)",
    )
    g.add_argument(
        "--whole-tensors",
        action="store_true",
        help="page whole states, and only those of 100,000 elements or more, as bitsandbytes does",
    )
    g.add_argument(
        "--optimizer",
        choices=tuple(OPTIMIZERS),
        default=Job.optimizer,
        help="AdamW with m and v in 32 bits, or in 8 as bitsandbytes' AdamW8bit (adamw)",
    )
    g.add_argument(
        "--trace", action="store_true", help="write every fault, eviction and hit to paging.csv, and draw paging.svg"
    )
    g.add_argument(
        "--checkpointing",
        action="store_true",
        help="recompute each block in the backward pass instead of keeping its tape",
    )
    g.add_argument("--checkpoint-every", type=natural, default=50, help="steps between checkpoints on disk (50)")


def _finetune(args):
    from ..training.finetune import FULL_RECIPE, LORA_RECIPE, METHODS

    job = _job(args)
    if args.adapter is not None and "methods" not in args.given:
        args.methods = tuple(name for name in args.methods if METHODS[name].adapts)  # of --compare
    if args.lr is None:  # --compare takes that of full fine-tuning from --full-lr
        args.lr = (FULL_RECIPE if job.method == "full" and not args.compare else LORA_RECIPE).lr
    plan = recipe(args, LORA_RECIPE)
    _say_what_has_no_effect(args, job)
    _check_finetune(args, job, plan)
    if args.distributed and args.compare:
        raise ValueError(
            "finetune: --distributed shares out one run, and --compare makes several; leave one of them out"
        )
    if args.trace and args.compare:
        raise ValueError("finetune: --trace follows one run, and --compare makes several; leave one of them out")
    if args.trace and job.page_budget is None:
        raise ValueError(
            "finetune: with --page-budget none nothing is paged, and there is nothing to trace; give a size"
        )
    run = _compare if args.compare else _finetune_once
    run(args, job, plan)


def _say_what_has_no_effect(args, job):
    """A sentence for each option that was given and that nothing in this run looks at."""
    import warnings

    from ..codebooks import NAMED
    from ..models import fourbit
    from ..training.finetune import ADAPTERS_OWN, METHODS

    held = fourbit.held(job.model)
    methods = [METHODS[name] for name in (args.methods if args.compare else [job.method])]
    for names, used, why in (
        (ADAPTERS_OWN, any(m.adapts for m in methods), "full fine-tuning has no bypass"),
        (ADAPTERS_OWN, args.adapter is None, f"the adapter {args.adapter} has its own settings"),
        (["compute_dtype"], any(m.code for m in methods), "full fine-tuning has no frozen layer"),
        (["blocksize"], any(m.code in NAMED for m in methods), "no layer is quantized in blocks"),
        (["blocksize"], held == "dense", f"{job.model} is in {held[0]} bits already"),
        (
            ["page_bytes", "pool", "whole_tensors"],
            job.page_budget is not None,
            "with --page-budget none nothing is paged",
        ),
        (["method", "seed"], not args.compare, "--compare takes --methods and --seeds"),
        (["methods", "seeds", "full_lr"], args.compare, "it is for --compare"),
        (["steps"], args.epochs is None, "--epochs says how many there are"),
    ):
        for option in (args.given[name] for name in names if name in args.given and not used):
            warnings.warn(f"finetune: {option} has no effect here: {why}", stacklevel=2)


def _job(args):
    """The Job that the options describe: they have the names of its fields."""
    from ..training.finetune import Job, going_on

    options = {f.name: getattr(args, f.name) for f in fields(Job)}
    for name in ("target_modules", "exclude_modules"):
        names = options[name]
        if names and len(names) == 1 and (names[0] == "all-linear" or names[0].startswith("re:")):
            options[name] = names[0].removeprefix("re:")
        elif names:
            options[name] = tuple(names)
    if options["layers_to_transform"]:
        options["layers_to_transform"] = tuple(options["layers_to_transform"])
    if args.adapter is None:
        return Job(**options)
    folder, settled = options.pop("adapter"), ("model", "method", "blocksize", "compute_dtype")
    chosen = {n: v for n, v in options.items() if n not in settled or n in args.given}
    return going_on(folder, **chosen)


def _check_finetune(args, job, plan):
    """`_check_step` for a base whose sizes can be read; what is wrong with another one is said when it is loaded."""
    from ..costs.memory import config_of

    try:
        config = config_of(job.model)
    except (ValueError, OSError, RuntimeError):
        return
    method = "full" if args.compare and "full" in args.methods else job.method.partition("-")[0]
    _check_step(args, "finetune", config, method, plan, r=job.r, checkpointing=job.checkpointing)


def _check_step(args, name, config, method, plan, **options):
    """Compare the bytes of a training step, by `costs.memory.predict`, and of the batches it draws, with the machine's memory."""
    from ..costs.memory import predict

    if args.device == "cpu" and plan.seq_len <= config.positions:  # longer ones are refused later, for what they are
        sizes = {"batch_size": plan.batch_size, "seq_len": plan.seq_len}
        batches = 24 * plan.accumulate * plan.batch_size * plan.seq_len
        need = predict(config, method, **sizes, **options).total + batches
        check_memory(need, f"{name}: a step of {plan.accumulate} x {plan.batch_size} x {plan.seq_len} tokens")


def _finetune_once(args, job, plan):
    from ..training.finetune import describe, finetune, finished

    ranks = _ranks("finetune", args, plan)
    if ranks.first(lambda: finished(job, plan, args.out)) is not None:
        print(f"this run has ended before; its report from {args.out}:", file=sys.stderr)
    report = finetune(job, plan, args.out, args.eval_every, args.checkpoint_every, trace=args.trace, ranks=ranks)
    print(describe(report))
    if args.trace and ranks.rank == 0:
        _timeline(args.out, job.page_budget)


def _compare(args, job, plan):
    from ..costs.methods import describe_comparison
    from ..figures import runs, style
    from ..training.compare import compare
    from ..training.finetune import FULL_RECIPE

    style.require_matplotlib()  # said before an hour of work, not after it
    out, seeds, full_lr = Path(args.out), args.seeds or (0, 1, 2), args.full_lr or FULL_RECIPE.lr
    reports = compare(job, plan, seeds, out, args.methods, full_lr=full_lr, eval_every=args.eval_every)
    print(describe_comparison(reports))
    draw(lambda: runs.comparison(reports), out / "compare.svg", asked=True)
    if args.eval_every:
        draw(lambda: runs.loss_curves(reports), out / "curves.svg", asked=True)


def _timeline(out, budget):
    from ..figures.paging import timeline
    from ..training.finetune import read_trace

    path = Path(out) / "paging.svg"
    trace = read_trace(out) if (Path(out) / "paging.csv").is_file() else []
    if not trace:
        print(
            "no timeline: this process paged nothing (the run had ended before, or every state is too small to be paged)"
        )
    elif can_draw():
        draw(lambda: timeline(trace, budget), path)


# ------------------------------------------------------------------------------------------------------------- pretrain
def pretrain_parser(commands):
    from ..models.llama import LlamaConfig
    from ..training.pretrain import RECIPE

    p = command(
        commands,
        "pretrain",
        _pretrain,
        "train a byte-level Llama from scratch on text files",
        "Pretrain a Llama on UTF-8 text files; every file is a source from which batches draw evenly, and its last 5 % is held out.\n"
        "The finished folder (config.json, model.safetensors in bfloat16, README.md with the measured bits per byte)\n"
        "opens in tinylora and in transformers. The embedded base model was made by this command with its defaults.",
        "example: the embedded base model, about two hours on two cores\n"
        "  python -m tinylora.data.make_texts texts\n"
        "  tinylora pretrain texts/shakespeare.txt texts/bible.txt texts/factbook.txt --out base\n",
    )
    p.add_argument("texts", nargs="+", help="UTF-8 text files")
    p.add_argument("--out", required=True, help="the model folder to write; also holds the checkpoint while training")
    g = p.add_argument_group("architecture")
    for name, most in (
        ("hidden_size", 1 << 20),
        ("intermediate_size", 1 << 20),
        ("num_hidden_layers", 10_000),
        ("num_attention_heads", 1 << 16),
        ("num_key_value_heads", 1 << 16),
    ):
        default = getattr(LlamaConfig, name)
        g.add_argument("--" + name.replace("_", "-"), type=whole(1, most), default=default, help=f"({default})")
    p.add_argument("--checkpoint-every", type=natural, default=200, help="steps between checkpoints on disk (200)")
    recipe_options(p, RECIPE)
    _distributed_option(p)
    p.set_defaults(kept="the last checkpoint, if there was one, is kept")


def _pretrain(args):
    from ..models.llama import LlamaConfig
    from ..training.pretrain import RECIPE, pretrain

    config = LlamaConfig(**{f.name: getattr(args, f.name) for f in fields(LlamaConfig) if hasattr(args, f.name)})
    plan = recipe(args, RECIPE)
    _check_step(args, "pretrain", config, "full", plan)
    ranks = _ranks("pretrain", args, plan)
    scores = pretrain(args.texts, args.out, plan, config, args.checkpoint_every, device=args.device, ranks=ranks)
    for name, bits in scores.items():
        print(f"{name:<24}{bits:.4f} bits per byte, held out")
    print(f"{'mean':<24}{sum(scores.values()) / len(scores):.4f}\nthe model lies in {args.out}")
