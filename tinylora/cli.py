"""The command line: finetune, generate, quantize, nf4, pretrain. `tinylora COMMAND --help` says what each does to a model.

Expected errors (a missing file, a value out of range, no GPU) are one sentence on stderr and exit status 2.
"""

import argparse
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

_FORMAT = argparse.RawDescriptionHelpFormatter


def main(argv=None):
    """Entry point; returns the exit status."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a model may write any byte; a terminal may not know the character
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("\ninterrupted; the last checkpoint is kept, and the same command goes on from it", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `tinylora … | head`: whoever read has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the flush at exit)
        return 0
    except (ValueError, OSError, RuntimeError, ArithmeticError, LookupError, TypeError, MemoryError) as error:
        if args.traceback:
            raise
        print(f"tinylora: {error.args[0] if isinstance(error, KeyError) and error.args else error}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(
        prog="tinylora",
        formatter_class=_FORMAT,
        description="LoRA and QLoRA, small enough to read. Every default is embedded: `tinylora finetune` needs no file and no network.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_finetune_parser, _generate_parser, _quantize_parser, _nf4_parser, _pretrain_parser):
        add(commands)
    return parser


def _command(commands, name, run, summary, description, epilog):
    p = commands.add_parser(name, help=summary, description=description, epilog=epilog, formatter_class=_FORMAT)
    p.set_defaults(run=run)
    p.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where arrays live: cpu (NumPy) or cuda (CuPy)"
    )
    p.add_argument("--seed", type=int, default=0, help="decides batches, dropout, initial adapters and drawn text (0)")
    p.add_argument("--traceback", action="store_true", help="show where an error came from instead of one sentence")
    return p


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _size(text):
    """A number of bytes, or a number with k, M or G (powers of 1024)."""
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    try:
        return int(float(text[:-1]) * units[text[-1].lower()]) if text[-1:].lower() in units else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: expected a number such as 1048576, 64k, 1M"
        ) from None


def _budget(text):
    """A size, or "none"."""
    return None if text.lower() == "none" else _size(text)


def _recipe_options(p, defaults):
    g = p.add_argument_group("recipe")
    for name, kind, text in (
        ("steps", _positive, "optimizer steps"),
        ("batch_size", _positive, "sequences a micro-batch"),
        ("accumulate", _positive, "micro-batches added up before a step"),
        ("seq_len", _positive, "tokens a sequence"),
        ("lr", float, "learning rate"),
        ("warmup", int, "steps of linear warm-up"),
        ("weight_decay", float, "weight decay, on matrices only"),
        ("clip", float, "largest norm of the gradient, 0 for no limit"),
        ("shards", _positive, "parts of a micro-batch that run in threads; sums are ordered by it"),
    ):
        default = getattr(defaults, name)
        g.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=f"{text} ({default:g})")
    g.add_argument(
        "--schedule",
        choices=("constant", "cosine"),
        default=defaults.schedule,
        help=f"of the learning rate ({defaults.schedule})",
    )


def _recipe(args, defaults):
    names = {f.name for f in fields(defaults)}
    return replace(defaults, **{k: v for k, v in vars(args).items() if k in names})


# -------------------------------------------------------------------------------------------------------------------- finetune
def _finetune_parser(commands):
    from .finetune import LORA_RECIPE, METHODS, Job

    p = _command(
        commands,
        "finetune",
        _finetune,
        "QLoRA: quantize a model to 4 bits and train an adapter on a text",
        "Fine-tune a pretrained Llama with QLoRA.\n\n"
        "  1  load the model and quantize its linear layers to NF4, blocks of 64, constants in 8 bits (double quantization)\n"
        "  2  freeze it and put a LoRA bypass of rank r on every linear layer: h = W x + (alpha/r) B A x\n"
        "  3  train A and B with AdamW, whose state is paged through a budget of resident bytes\n"
        "  4  print held-out bits per byte before and after, and where the bytes went\n\n"
        "Without arguments it takes the embedded byte-level model and the embedded Jargon File.",
        "examples:\n"
        "  tinylora finetune                                     the main job, about two minutes on two cores\n"
        "  tinylora finetune --text my.txt --out mine            your own text; the last tenth is held out\n"
        '  tinylora finetune --text pairs.jsonl --out pairs      {"prompt": ..., "answer": ...} lines; the loss is on the answer\n'
        "  tinylora finetune --target-modules q_proj v_proj --out qv  the paper's choice of layers\n"
        "  tinylora finetune --compare --out compare             full, LoRA, and QLoRA in three 4-bit codes, in one table and figure\n\n"
        "A run that was stopped goes on from its last checkpoint when the same command is given again.",
    )
    p.add_argument(
        "--model", default=Job.model, help="'base' (embedded) or a folder with config.json and model.safetensors"
    )
    p.add_argument(
        "--text",
        default=None,
        help="a UTF-8 .txt file, or a .jsonl file of prompt and answer (the embedded Jargon File)",
    )
    p.add_argument(
        "--out", default="tinylora-run", help="folder for the checkpoint, the adapter and report.json (tinylora-run)"
    )
    p.add_argument(
        "--method", choices=tuple(METHODS), default=Job.method, help="what is frozen, and in how many bits (qlora)"
    )
    p.add_argument(
        "--compare",
        action="store_true",
        help="run every method for each of --seeds (instead of --method and --seed), print one table, draw one figure",
    )
    p.add_argument("--seeds", type=int, nargs="+", default=None, help="seeds of --compare (0 1 2)")
    p.add_argument("--full-lr", type=float, default=None, help="learning rate of full fine-tuning in --compare (0.001)")
    g = p.add_argument_group("LoRA")
    g.add_argument("-r", type=int, default=Job.r, help=f"rank of the bypass ({Job.r})")
    g.add_argument("--alpha", type=float, default=Job.alpha, help=f"the bypass is scaled by alpha/r ({Job.alpha})")
    g.add_argument("--dropout", type=float, default=Job.dropout, help="on the input of the bypass, while training (0)")
    g.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="'all-linear', or names such as q_proj v_proj, or one regular expression for whole paths after 're:'",
    )
    g = p.add_argument_group("quantization")
    g.add_argument(
        "--blocksize", type=_positive, default=Job.blocksize, help=f"weights that share one absmax ({Job.blocksize})"
    )
    g.add_argument(
        "--compute-dtype",
        choices=("float32", "bfloat16"),
        default=Job.compute_dtype,
        help="rounding of the products with the frozen weights (float32)",
    )
    g = p.add_argument_group("memory")
    g.add_argument(
        "--page-budget",
        type=_budget,
        default=Job.page_budget,
        metavar="BYTES",
        help="optimizer state that may be resident at a time, or none for all of it (1M)",
    )
    g.add_argument("--page-bytes", type=_size, default=Job.page_bytes, metavar="BYTES", help="bytes of a page (64k)")
    g.add_argument(
        "--checkpointing",
        action="store_true",
        help="recompute each block in the backward pass instead of keeping its tape",
    )
    g.add_argument("--checkpoint-every", type=int, default=50, help="steps between checkpoints on disk (50)")
    p.add_argument(
        "--eval-every", type=int, default=0, help="steps between held-out evaluations (0: only before and after)"
    )
    _recipe_options(p, LORA_RECIPE)
    p.set_defaults(lr=None)


def _finetune(args):
    from .finetune import FULL_RECIPE, LORA_RECIPE, Job, compare, describe, describe_comparison, finetune, finished

    targets = args.target_modules
    if len(targets) == 1 and (targets[0] == "all-linear" or targets[0].startswith("re:")):
        targets = targets[0].removeprefix("re:")
    job = Job(
        model=args.model,
        text=args.text,
        method=args.method,
        r=args.r,
        alpha=args.alpha,
        dropout=args.dropout,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        blocksize=args.blocksize,
        compute_dtype=args.compute_dtype,
        page_budget=args.page_budget,
        page_bytes=args.page_bytes,
        checkpointing=args.checkpointing,
        device=args.device,
    )
    if args.lr is None:  # full fine-tuning has a rate of its own; --compare takes it from --full-lr
        args.lr = (FULL_RECIPE if args.method == "full" and not args.compare else LORA_RECIPE).lr
    recipe = _recipe(args, LORA_RECIPE)
    if not args.compare:
        if finished(job, recipe, args.out) is not None:
            print(f"this run has ended before; its report from {args.out}:", file=sys.stderr)
        report = finetune(job, recipe, args.out, args.eval_every, args.checkpoint_every)
        print(describe(report))
        return
    from . import figures

    figures.require_matplotlib()  # said before an hour of work, not after it
    reports = compare(job, recipe, args.seeds or (0, 1, 2), args.out, full_lr=args.full_lr or FULL_RECIPE.lr)
    print(describe_comparison(reports))
    path = Path(args.out) / "compare.svg"
    figures.comparison(reports, path)
    print(f"figure: {path}")


# -------------------------------------------------------------------------------------------------------------------- generate
def _generate_parser(commands):
    p = _command(
        commands,
        "generate",
        _generate,
        "continue a prompt, with or without an adapter",
        "Write on from a prompt, token by token, with a cache of keys and values.\n\n"
        "  temperature 0 always takes the likeliest token; 1 draws from the model's own distribution\n"
        "  top-k keeps the k likeliest tokens, top-p the likeliest that together reach probability p",
        "examples:\n"
        "  tinylora generate --prompt 'KING HENRY.'\n"
        "  tinylora generate --quantize nf4 --adapter tinylora-run/adapter --prompt 'hacker'    on the base it was trained on\n",
    )
    p.add_argument("--model", default="base", help="'base' (embedded) or a model folder")
    p.add_argument("--adapter", default=None, help="an adapter folder, written by finetune or by PEFT")
    p.add_argument(
        "--quantize",
        choices=("none", "nf4", "fp4", "int4"),
        default="none",
        help="hold the linear layers in 4 bits (none)",
    )
    p.add_argument("--prompt", default="\n", help="the text to continue")
    p.add_argument("--max-new-tokens", type=_positive, default=400, help="(400)")
    p.add_argument("--temperature", type=float, default=0.7, help="(0.7)")
    p.add_argument("--top-k", type=int, default=None, help="(off)")
    p.add_argument("--top-p", type=float, default=None, help="(off)")
    p.add_argument("--out", default=None, help="write the text to this file instead of the terminal")


def _generate(args):
    import codecs

    from . import files
    from .interop.bitsandbytes import open_model
    from .interop.peft import load_adapter
    from .nn import Linear4bit, quantize_linears

    model = open_model(args.model)
    if args.quantize != "none":
        if any(isinstance(layer, Linear4bit) for _, layer in model.named_modules()):
            raise ValueError(f"{args.model} is in 4 bits already; leave --quantize out")
        quantize_linears(model, args.quantize)
    if args.adapter:
        load_adapter(model, args.adapter)
    model.to(args.device).eval()
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    stream = model.stream(args.prompt, args.max_new_tokens, **options)
    if args.out:
        files.write_text(args.out, args.prompt + model.tokenizer.decode(list(stream)) + "\n")
        return
    print(args.prompt, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in stream:
        print(decoder.decode(model.tokenizer.token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))


# -------------------------------------------------------------------------------------------------------------------- quantize
def _quantize_parser(commands):
    from .survey import CODES

    p = commands.add_parser(
        "quantize",
        help="what 4 bits do to a checkpoint's weights, and a 4-bit copy that transformers opens",
        description="Measure every 4-bit code on the weights of a model folder (config.json and safetensors, any architecture),\n"
        "tensor by tensor and at equal bits: the relative squared error, how evenly the code's values are used, how normal the\n"
        "weights are (Shapiro-Wilk, row by row) and how many blocks hold an outlier. Beside them: normal weights, drawn and in theory.\n\n"
        "With --out, also write the folder in 4 bits in bitsandbytes' format, which transformers opens (tried with llama, mistral,\n"
        "qwen2, qwen3, bert, gpt_neox and whisper; others are refused without --force). A Llama opens here as well: generate and\n"
        "finetune take the folder as --model. report.json and errors.svg lie beside it. Needs about twice the folder's size in memory.",
        epilog="examples:\n"
        "  tinylora quantize base                                        the embedded model\n"
        "  tinylora quantize my-model --out my-model-nf4                 measure, and write NF4 with double quantization\n"
        "  tinylora quantize my-model --codes nf4 bof4 --blocksize 128   only two codes, in larger blocks\n",
        formatter_class=_FORMAT,
    )
    p.set_defaults(run=_quantize)
    p.add_argument(
        "path", help="'base' (embedded) or a folder with config.json and model.safetensors (one file or several)"
    )
    p.add_argument(
        "--codes",
        nargs="+",
        choices=tuple(CODES),
        default=tuple(CODES),
        metavar="CODE",
        help=f"codes to measure ({' '.join(CODES)})",
    )
    p.add_argument("--blocksize", type=_positive, default=64, help="weights a block (64)")
    p.add_argument(
        "--no-double-quant", action="store_true", help="constants in float32 instead of 8 bits around their mean"
    )
    p.add_argument(
        "--skip",
        nargs="+",
        default=(),
        metavar="WORD",
        help="leave weights whose name contains one of these as they are",
    )
    p.add_argument("--out", default=None, help="write the 4-bit folder here")
    p.add_argument("--force", action="store_true", help="also write architectures that were not tried in transformers")
    p.add_argument("--code", choices=("nf4", "fp4"), default="nf4", help="the code to write with (nf4)")
    p.add_argument("--traceback", action="store_true", help="show where an error came from instead of one sentence")


def _quantize(args):
    from tqdm import tqdm

    from . import data, figures, files, survey
    from .interop import bitsandbytes

    folder = data.base_folder() if args.path == "base" else Path(args.path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{args.path}: expected 'base' or a folder with config.json and safetensors files")
    double, blocksize = not args.no_double_quant, args.blocksize
    if args.out:  # first what can be refused, then what takes long
        done = bitsandbytes.quantize_folder(folder, args.out, args.code, blocksize, double, args.skip, force=args.force)
    if (folder / "config.json").is_file() and files.read_json(folder / "config.json").get("quantization_config"):
        raise ValueError(f"{args.path} is quantized already; measure the dense model")
    weights = {n: w for n, w in files.load_folder(folder).items() if bitsandbytes.is_linear_weight(n, w, args.skip)}
    if not weights:
        raise ValueError(
            f"{args.path} holds no linear weights (matrices named *.weight that are neither embeddings nor lm_head)"
        )
    lines = [
        survey.measure(n, w, args.codes, blocksize, double)
        for n, w in tqdm(weights.items(), desc="measuring", disable=None)
    ]
    normal = survey.control(max(weights.values(), key=lambda w: w.size).shape[1], args.codes, blocksize, double)
    print(survey.describe(lines, blocksize, normal))
    if args.out:
        out = Path(args.out)
        about = {"path": args.path, "blocksize": blocksize, "double_quant": double}
        files.write_json(out / "report.json", survey.as_json(lines, normal, **about))
        bits = sum(8 * q.nbytes for q in done.values()) / sum(q.size for q in done.values())
        print(
            f"\n{len(done)} weights written to {out} in {args.code}, {bits:.3f} bits each; all other tensors as they were"
        )
        if _can_draw():
            figures.survey(lines, normal, out / "errors.svg")
            print(f"figure: {out / 'errors.svg'}")


def _can_draw():
    """Whether matplotlib is there; says how to get it if not."""
    from . import figures

    try:
        figures.require_matplotlib()
    except RuntimeError as error:
        print(f"no figure: {error}")
        return False
    return True


# ------------------------------------------------------------------------------------------------------------------------- nf4
def _nf4_parser(commands):
    p = commands.add_parser(
        "nf4",
        help="build NF4 step by step, and say what it is optimal for",
        description="Build the NF4 code from normal quantiles, step by step, with the bit patterns of all 16 values beside the published\n"
        "ones; then what breaks the table; then what NF4 costs for normal weights in blocks of 16 to 4096, and how much that lies\n"
        "above the best code with the same -1, 0 and 1 (exact to the digits printed, by quadrature). The figure\n"
        "shows that by block size, beside what theory predicts.",
        epilog="examples:\n  tinylora nf4\n  tinylora nf4 --blocksizes 12 64 69 453 --figure none\n",
        formatter_class=_FORMAT,
    )
    p.set_defaults(run=_nf4)
    p.add_argument(
        "--blocksizes",
        nargs="+",
        type=_positive,
        default=None,
        metavar="I",
        help="blocks for the table (16 32 ... 4096)",
    )
    p.add_argument(
        "--figure", default=None, metavar="FILE", help="where to draw (nf4.svg if matplotlib is installed), or none"
    )
    p.add_argument("--traceback", action="store_true", help="show where an error came from instead of one sentence")


def _nf4(args):
    from . import derivation, figures

    table = derivation.optimality_table(*([args.blocksizes] if args.blocksizes else []))
    print(derivation.construction(), derivation.deviations(), table, sep="\n\n")
    if args.figure == "none":
        return
    if args.figure:
        figures.require_matplotlib()
    if args.figure or _can_draw():
        path = args.figure or "nf4.svg"
        figures.save(figures.nf4_optimal_for(args.blocksizes), path)
        print(f"\nfigure: {path}")


# -------------------------------------------------------------------------------------------------------------------- pretrain
def _pretrain_parser(commands):
    from .llama import LlamaConfig
    from .pretrain import RECIPE

    p = _command(
        commands,
        "pretrain",
        _pretrain,
        "train a byte-level Llama from scratch on text files",
        "Pretrain a Llama on UTF-8 text files; every file is a source from which batches draw evenly, and its last 5 % is held out.\n"
        "The finished folder (config.json, model.safetensors in bfloat16, README.md with the measured bits per byte)\n"
        "opens in tinylora and in transformers. The embedded base model was made by this command with its defaults.",
        "example: the embedded base model, a good hour on two cores\n"
        "  python -m tinylora.data.texts texts\n"
        "  tinylora pretrain texts/shakespeare.txt texts/bible.txt texts/factbook.txt --out base\n",
    )
    p.add_argument("texts", nargs="+", help="UTF-8 text files")
    p.add_argument("--out", required=True, help="the model folder to write; also holds the checkpoint while training")
    g = p.add_argument_group("architecture")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        default = getattr(LlamaConfig, name)
        g.add_argument("--" + name.replace("_", "-"), type=_positive, default=default, help=f"({default})")
    p.add_argument("--checkpoint-every", type=int, default=200, help="steps between checkpoints on disk (200)")
    _recipe_options(p, RECIPE)


def _pretrain(args):
    from .llama import LlamaConfig
    from .pretrain import RECIPE, pretrain

    config = LlamaConfig(**{f.name: getattr(args, f.name) for f in fields(LlamaConfig) if hasattr(args, f.name)})
    scores = pretrain(args.texts, args.out, _recipe(args, RECIPE), config, args.checkpoint_every, device=args.device)
    for name, bits in scores.items():
        print(f"{name:<24}{bits:.4f} bits per byte, held out")
    print(f"{'mean':<24}{sum(scores.values()) / len(scores):.4f}\nthe model lies in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
