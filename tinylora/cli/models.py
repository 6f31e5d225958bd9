"""generate, quantize, merge, convert: the commands that open a model and make something of it."""

import contextlib
import sys
import warnings
from pathlib import Path

from ..costs.tables import printable
from . import terminal
from .options import block_size, can_draw, command, draw, finite, new_tokens, positive, rate, share, whole


# ------------------------------------------------------------------------------------------------------------- generate
def generate_parser(commands):
    p = command(
        commands,
        "generate",
        _generate,
        "continue a prompt, with or without an adapter",
        "Write on from a prompt, token by token, with a cache of keys and values.\n\n"
        "  temperature 0 always takes the likeliest token; 1 draws from the model's own distribution\n"
        "  top-k keeps the k likeliest tokens, top-p the likeliest that together reach probability p",
        "examples:\n"
        "  tinylora generate --prompt 'KING HENRY.'\n"
        "  tinylora generate --model smol.gguf --quantize nf4 --chat --prompt 'What is a compiler?'\n"
        "  tinylora generate --model smol.gguf --chat    a conversation\n"
        "  tinylora generate --adapter tinylora-run/adapter --prompt 'hacker'    on the base it was trained on, held as it was then\n"
        "  tinylora generate --adapter tinylora-switch/jargon/adapter tinylora-switch/code/adapter --weights 0.7 0.3\n",
    )
    _base_options(
        p,
        ("none", "nf4", "fp4", "int4", "int8"),
        "hold the linear layers in 4 bits, in 8, or in neither (as the adapter was trained; else none)",
        "the adapter's base; without an adapter base",
    )
    p.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="an adapter folder of finetune or PEFT, or a LoRA FILE.gguf; of several on one base, what they add is added up",
    )
    p.add_argument(
        "--weights", type=finite, nargs="+", default=None, metavar="W", help="a factor for each of several adapters (1)"
    )
    p.add_argument("--prompt", default=None, help="the text to continue (a new line)")
    p.add_argument(
        "--chat",
        action="store_true",
        help="answer the prompt as a user's question, by the model's chat template; without --prompt a conversation, "
        "a line a turn (/reset begins anew, /exit ends)",
    )
    p.add_argument("--max-new-tokens", type=new_tokens, default=400, help="(400)")
    p.add_argument("--temperature", type=rate, default=0.7, help="(0.7)")
    p.add_argument("--top-k", type=positive, default=None, help="(off)")
    p.add_argument("--top-p", type=share, default=None, help="(off)")
    p.add_argument(
        "--dense",
        action="store_true",
        help="keep the frozen weights dense while the text is generated: the same text sooner, for 4 bytes of memory a weight",
    )
    p.add_argument("--out", default=None, help="write the text to this file instead of the terminal")


def _generate(args):
    from ..models import chat, files, tokenizers

    if args.chat and args.prompt is None and args.out:
        raise ValueError("--out takes one answer, and without --prompt --chat is a conversation; give --prompt")
    if args.out:
        files.check_target(args.out, folder=False)
    model = _open(args, args.adapter, args.weights)
    model.to(args.device).eval()
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    options |= {"top_k": args.top_k, "top_p": args.top_p, "dense": args.dense}
    if args.chat and not model.tokenizer.chats:
        raise ValueError("--chat: the model knows no turns (it has no chat template); leave --chat out")
    if args.chat and args.prompt is None:
        return _converse(model, options)
    shown = prompt = "\n" if args.prompt is None else tokenizers.checked(args.prompt)
    if args.chat:
        shown, prompt, options["stop"] = "", model.tokenizer.chat_prompt(prompt), chat.ends(model)
    pieces = model.tokenizer.pieces(model.stream(prompt, **options))
    if args.out:
        files.write_text(args.out, shown + "".join(pieces) + "\n")
        return
    terminal.stream(shown)
    for piece in pieces:
        terminal.stream(piece)
    terminal.stream("\n")


def _converse(model, options):
    """A conversation on the terminal, or with lines that come from a pipe."""
    from ..models import chat

    typed = sys.stdin.isatty()
    if typed:
        print("/reset begins anew, /exit or the end of input ends", file=sys.stderr)
    chat.converse(model, lambda: input("> " if typed else ""), terminal.stream, **options)
    if typed:
        print()


# ------------------------------------------------------------------------------------------------------------- quantize
_QUANTIZE = """Measure every 4-bit code on the weights of a model folder (config.json and safetensors, any architecture),
tensor by tensor and at equal bits: the relative squared error, how evenly the code's values are used, how normal the
weights are (Shapiro-Wilk, row by row) and how many blocks hold an outlier. Beside them: normal weights, drawn and in theory.

With --normality, measure only how normal they are, but on every row, by kind and length, and beside it what the test would
see in rows whose law is known (QLoRA, appendix F: 7.5 % of LLaMA-7B's rows are rejected). --out then takes report.json and
normality.svg, and PATH may be a GGUF file.

With --out, also write the folder in 4 bits (or in 8: --code int8) in bitsandbytes' format, which transformers opens (tried with
llama, mistral, qwen2, qwen3, bert, gpt_neox and whisper; others are refused without --force). A Llama opens here as well:
generate and finetune take the folder as --model. report.json and errors.svg lie beside it. Needs about twice the folder's
size in memory."""

_QUANTIZE_EXAMPLES = """examples:
  tinylora quantize base                                        the embedded model
  tinylora quantize my-model --out my-model-nf4                 measure, and write NF4 with double quantization
  tinylora quantize my-model --out my-model-8 --code int8       measure, and write LLM.int8
  tinylora quantize my-model --codes nf4 bof4 --blocksize 128   only two codes, in larger blocks
  tinylora quantize my-model.gguf --normality --out normal      are its rows normal?
"""


def quantize_parser(commands):
    from ..papers.codes_on_weights import CODES

    p = command(
        commands,
        "quantize",
        _quantize,
        "what 4 bits do to a model's weights, and a 4-bit copy that transformers opens",
        _QUANTIZE,
        _QUANTIZE_EXAMPLES,
        device=False,
        seed=False,
    )
    p.add_argument(
        "path",
        help="'base' (embedded) or a folder with config.json and model.safetensors (one file or several); "
        "with --normality also a .gguf file",
    )
    p.add_argument(
        "--codes",
        nargs="+",
        choices=tuple(CODES),
        default=tuple(CODES),
        metavar="CODE",
        help=f"codes to measure ({' '.join(CODES)})",
    )
    p.add_argument("--blocksize", type=block_size, default=64, help="weights a block (64)")
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
    p.add_argument("--normality", action="store_true", help="test every row for normality, and nothing else")
    p.add_argument(
        "--draws", type=whole(1, 10**6), default=2000, help="rows drawn from each known law, for --normality (2000)"
    )
    p.add_argument("--out", default=None, help="write the folder in few bits, or what --normality found, here")
    p.add_argument("--force", action="store_true", help="also write architectures that were not tried in transformers")
    p.add_argument(
        "--code", choices=("nf4", "fp4", "int8"), default="nf4", help="what to write: a 4-bit code, or LLM.int8 (nf4)"
    )


def _quantize(args):
    from ..models import files
    from ..training import checkpoints

    if not args.normality:
        _say_what_has_no_effect(args)
    with files.locked(args.out) if args.out else contextlib.nullcontext():
        if args.out and (run := Path(args.out) / checkpoints.NAME).exists():
            raise ValueError(f"{run} is of a run, whose report.json would be lost; choose another folder")
        return _normality(args) if args.normality else _codes(args)


def _codes(args):
    from tqdm import tqdm

    from ..interop import bitsandbytes
    from ..models import eightbit, files
    from ..papers import codes_on_weights

    folder = _folder(args.path)
    double, blocksize = not args.no_double_quant, args.blocksize
    if args.out:  # first what can be refused, then what takes long
        modes = {name: files.permissions(Path(args.out) / name) for name in bitsandbytes.MEASURED}
        code = eightbit.CODE if args.code == "int8" else args.code
        done = bitsandbytes.quantize_folder(folder, args.out, code, blocksize, double, args.skip, force=args.force)
    weights = _linear_weights(folder, args)
    bar = tqdm(weights.items(), desc="measuring", disable=None)
    lines = [codes_on_weights.measure(name, w, args.codes, blocksize, double) for name, w in bar]
    columns = max(weights.values(), key=lambda w: w.size).shape[1]
    normal = codes_on_weights.control(columns, args.codes, blocksize, double)
    print(codes_on_weights.describe(lines, blocksize, normal))
    if args.out:
        _report_quantized(args, done, lines, normal, modes)


def _say_what_has_no_effect(args):
    """A sentence for each option of quantize that was given and that nothing looks at, or not what is written."""
    eight = args.out and args.code == "int8"
    for name, idle, why in (
        ("code", not args.out, "has no effect without --out: nothing is written, and --codes says what is measured"),
        ("force", not args.out, "has no effect without --out: nothing is written"),
        ("draws", True, "has no effect without --normality"),
        ("no_double_quant", eight, "is for the 4-bit codes that are measured: --code int8 writes one scale a row"),
        ("blocksize", eight, "is for the 4-bit codes that are measured: --code int8 writes one scale a row"),
    ):
        if idle and name in args.given:
            warnings.warn(f"quantize: {args.given[name]} {why}", stacklevel=2)


def _report_quantized(args, done, lines, normal, modes):
    """Write report.json and, where matplotlib is there, errors.svg beside the quantized weights, and say what was written.

    modes   {file: the permissions that it had before, or None}
    """
    from ..models import files
    from ..papers import codes_on_weights

    out = Path(args.out)
    about = {"path": args.path, "blocksize": args.blocksize, "double_quant": not args.no_double_quant}
    files.write_json(out / "report.json", codes_on_weights.as_json(lines, normal, **about), modes["report.json"])
    bits = sum(8 * q.nbytes for q in done.values()) / sum(q.size for q in done.values())
    print(
        f"\n{len(done)} weights written to {out} in {args.code}, {bits:.3f} bits each; all other tensors as they were"
    )
    if can_draw():
        draw(lambda: codes_on_weights.draw_errors(lines, normal), out / "errors.svg", mode=modes["errors.svg"])


def _folder(path):
    from .. import data

    folder = data.base_folder() if path == "base" else Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path}: expected 'base' or a folder with config.json and safetensors files (a .gguf file with --normality only)"
        )
    return folder


def _linear_weights(folder, args):
    """{name: array} of a folder's dense linear weights."""
    from ..interop import bitsandbytes
    from ..models import fourbit, safetensors

    if fourbit.is_quantized(folder):
        raise ValueError(f"{args.path} is quantized already; measure the dense model")
    opened = safetensors.open_folder(folder)
    weights = {n: w for n, w in opened.items() if bitsandbytes.is_linear_weight(n, w, args.skip)}
    for name, w in weights.items():
        if not safetensors.is_finite(w):
            raise ValueError(f"{opened.where(name)}: {name} holds NaN or Inf; leave it out (--skip {name})")
    if not weights:
        raise ValueError(
            f"{args.path} holds no linear weights (matrices named *.weight that are neither embeddings nor lm_head)"
        )
    return weights


def _normality(args):
    from tqdm import tqdm

    from ..models import files
    from ..papers import normality

    _refuse_what_only_codes_need(args)
    if args.out:
        files.check_target(args.out)
    names, source, stored = _weights_to_test(args)
    pairs = ((n, source[n]) for n in tqdm(names, desc="testing", disable=None))  # of a GGUF one tensor at a time
    groups, short = normality.measure(pairs, args.blocksize)
    power = _power(args, {g.length for g in groups})
    print(normality.describe(groups, power, stored, short, args.blocksize))
    if args.out:
        _report_normality(args, groups, power, short)


def _refuse_what_only_codes_need(args):
    from ..papers.codes_on_weights import CODES

    for name, given in (
        ("--codes", tuple(args.codes) != tuple(CODES)),
        ("--code", args.code != "nf4"),
        ("--no-double-quant", args.no_double_quant),
        ("--force", args.force),
    ):
        if given:
            raise ValueError(f"{name} has nothing to do where --normality measures no code; leave one of them out")


def _weights_to_test(args):
    """(names of linear weights, what gives the array of a name, whether a GGUF holds them in 4 bits)."""
    import re

    from ..interop import bitsandbytes
    from ..models.gguf import GGUF, is_gguf

    if not is_gguf(args.path):
        weights = _linear_weights(_folder(args.path), args)
        return list(weights), weights, False
    source = GGUF(args.path)
    names = [n for n in source if len(source.kind(n)[1]) == 2 and not re.search(bitsandbytes.NOT_LINEAR, n)]
    names = [n for n in names if not any(word in n for word in args.skip)]
    if not names:
        raise ValueError(f"{args.path} holds no linear weights, or --skip leaves none")
    return names, source, any(source.kind(n)[0].startswith("Q4") for n in names)


def _power(args, lengths):
    """{length: what the test sees in rows drawn from known laws}, for these lengths and the paper's."""
    from tqdm import tqdm

    from ..papers import normality

    bar = tqdm(sorted({*lengths, normality.PAPER["length"]}), desc="drawing", disable=None)
    return {n: normality.drawn(n, args.draws, args.blocksize) for n in bar}


def _report_normality(args, groups, power, short):
    """Write report.json and, where matplotlib is there, normality.svg, and say so."""
    from ..figures.style import one_column, save
    from ..models import files
    from ..papers import normality

    out, figure = Path(args.out), None
    if can_draw():  # before anything is written
        power |= _power(args, {64, 128, 256, 512, 1024, 2048} - set(power))
        with one_column():
            figure = normality.rejected_against_length({Path(args.path).stem: groups}, power)
    about = {"path": args.path, "blocksize": args.blocksize, "draws": args.draws}
    files.write_json(out / "report.json", normality.as_json(groups, power, short, **about))
    if figure:
        save(figure, out / "normality.svg")
    print(f"\n{'report.json and normality.svg lie' if figure else 'report.json lies'} in {out}")


# ----------------------------------------------------------------------------------------------------------------------- merge
def merge_parser(commands):
    p = command(
        commands,
        "merge",
        _merge,
        "put an adapter into its model for good",
        "Write a model folder with W = W0 + (alpha/r) B A in place of W0, so that nothing is added at inference (LoRA 4.1).\n\n"
        "W0 is the base as the adapter was trained on it: of one in few bits, the weights that these stand for. The folder is\n"
        "dense and computes what was trained, beside the rounding of the file's dtype. With --quantize none W0 is the base's\n"
        "dense weight instead, whatever the adapter was trained on.\n\n"
        "With --quantize nf4, fp4 or int8 the base is dequantized, added to and quantized again with the same settings; what that\n"
        "costs is printed for each layer, as |W' - W|/|W| (Frobenius). A small update hardly arrives in 4 bits (notebook 10).",
        "examples:\n"
        "  tinylora merge --adapter tinylora-run/adapter --out merged                    what was trained, dense\n"
        "  tinylora merge --model my-qwen --adapter chats/adapter --out merged           the same for a model of your own\n"
        "  tinylora merge --adapter tinylora-run/adapter --quantize nf4 --out merged-4   into 4 bits, with its price\n",
        device=False,
        seed=False,
    )
    _base_options(
        p,
        ("none", "nf4", "fp4", "int8"),
        "merge into the dense base, or into few bits (into what the adapter was trained on)",
        "the adapter's base, which must be named unless it is the embedded model",
    )
    p.add_argument("--adapter", required=True, help="an adapter folder of finetune or PEFT, or a LoRA FILE.gguf")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of a dense model's file (float32)"
    )
    p.add_argument("--out", required=True, help="the model folder to write")


def _merge(args):
    from ..models import files, folders

    few = args.quantize not in (None, "none")
    if few and "dtype" in args.given:
        raise ValueError(
            f"--dtype {args.dtype} is for a dense file, and --quantize {args.quantize} writes another; leave one out"
        )
    if args.model is None and (base := _format(args.adapter).read_base(args.adapter).find()) != "base":
        raise ValueError(f"{args.adapter} was trained on {base}; a merge is for good, so name its base: --model {base}")
    files.check_target(args.out, args.adapter, folders.place(args.model or "base"))
    with files.locked(args.out):
        _write_merged(args, few)
    print(f"the merged model lies in {args.out}")


def _write_merged(args, few):
    """Merge, and write the folder: in few bits, or dense."""
    from dataclasses import replace

    from .. import adapters
    from ..dtypes import BFloat16Array, Stored
    from ..interop import bitsandbytes

    model = _open(args, [args.adapter], stays=few)
    stored = [w for _, w in model.named_weights() if isinstance(w, Stored) and not isinstance(w, BFloat16Array)]
    if few and (found := {_word(w.code_name) for w in stored}) != {args.quantize}:
        raise ValueError(
            f"the base is stored in {', '.join(found)} already, and merging keeps that: --quantize {args.quantize} cannot; "
            "leave it out for a dense model"
        )
    if not few:
        adapters.dequantize_linears(model)
    if any(f"{path}.weight" in model.tied_parameters for path, _ in adapters.lora_layers(model)):
        adapters.untie(model)  # the head keeps the embedding's own weights, as it had them beside the adapter
    adapters.merge(model)
    rows = len(model.model.embed_tokens.weight)
    model.config = replace(model.config, vocab_size=rows)  # an adapter may have brought rows for added tokens
    if few:
        _print_errors(model, bits=8 if args.quantize == "int8" else 4)
        bitsandbytes.save(model, args.out)
    else:
        model.save_pretrained(args.out, dtype=args.dtype)


def _print_errors(model, bits):
    """What merging into few bits cost, layer by layer."""
    from .. import adapters
    from ..nn import FrozenLinear

    errors = {p: e for p, e in adapters.merge_errors(model).items() if isinstance(model.get(p), FrozenLinear)}
    if errors:
        width = max(map(len, errors))
        print(f"error of merging into {bits} bits, |W' - W|/|W|")
        for path, error in errors.items():
            print(f"  {path:<{width}}  {error:.4f}")
        print(f"  {'mean':<{width}}  {sum(errors.values()) / len(errors):.4f}")


# ------------------------------------------------------------------------------------------------------ a base and its adapters
def _base_options(p, codes, about, default):
    p.add_argument("--model", default=None, help=f"'base' (embedded), a model folder, or FILE.gguf ({default})")
    p.add_argument("--quantize", choices=codes, default=None, help=about)
    p.add_argument(
        "--blocksize",
        type=block_size,
        default=None,
        help="weights that share one absmax (as the adapter was trained; else 64)",
    )
    p.add_argument("--force", action="store_true", help="put the adapter on a base that it was not trained on, too")


def _open(args, folders=(), weights=None, stays=False):
    """The model with the adapters of these folders on it, held as they were trained if no option says otherwise.

    stays   whether --quantize may name the code of a folder that is in few bits already
    """
    from .. import adapters
    from ..interop import peft
    from ..models.llama import Llama

    if weights is not None and len(folders) < 2:
        raise ValueError("--weights is for several adapters; give them all to --adapter, or leave --weights out")
    if weights is not None and len(weights) != len(folders):
        raise ValueError(f"--weights: {len(weights)} numbers for {len(folders)} adapters; expected one for each")
    if args.force and not folders:
        raise ValueError("--force is for an adapter; leave it out, or give --adapter")
    formats = [_format(folder) for folder in folders]
    bases = [form.read_base(folder) for form, folder in zip(formats, folders, strict=True)]
    path = args.model = args.model or _one_base(bases)
    model = Llama.from_pretrained(path, **_holding(args, path, bases, stays))
    names = [f"adapter{i}" for i in range(1, len(bases) + 1)]
    for form, name, base in zip(formats, names, bases, strict=True):
        form.load_adapter(model, base.folder, name, check_base=not args.force, untie=True)
        peft.take_tokenizer(model, base.folder)
    if weights is not None:
        adapters.add_weighted_adapter(model, names, weights, "weighted", "cat")
        names = ["weighted"]
    if names:
        adapters.set_adapter(model, names)
    return model


def _format(adapter):
    """The module that reads an adapter: a LoRA FILE.gguf, or a folder of PEFT's."""
    from ..interop import gguf, peft
    from ..models.gguf import is_gguf

    return gguf if is_gguf(adapter) else peft


def _code(name):
    """What nn.quantized_linear calls a code of the command line."""
    from ..models import eightbit

    return {"int8": eightbit.CODE}.get(name, name)


def _word(code):
    """What the command line calls a code of nn.quantized_linear."""
    from ..models import eightbit

    return {eightbit.CODE: "int8"}.get(code, code)


def _one_base(bases):
    """The path of the base on which all these adapters were trained; "base" if there are none."""
    paths = {base.find(): base.folder for base in bases}
    if len(paths) > 1:
        (one, a), (other, b) = list(paths.items())[:2]
        raise ValueError(
            f"{a} and {b} have different bases, {one} and {other}; if they are the same, give one with --model"
        )
    return next(iter(paths), "base")


def _holding(args, path, bases, stays):
    """How Llama.from_pretrained is to hold the base at `path`: as the options say, else as the adapters were trained."""
    from ..models import fourbit, identity
    from ..nn import STORES

    for base in bases:
        if base.about is None and (base.name is None or Path(base.name).resolve() != Path(path).resolve()):
            name = "which it does not name" if base.name is None else repr(base.name)
            warnings.warn(
                f"{base.folder} does not say what its base ({name}) holds, so whether it is {path} cannot be checked",
                stacklevel=2,
            )
    bases = [base for base in bases if base.about is not None]
    trained = [base.held for base in bases]
    if fourbit.is_quantized(path):
        if args.quantize == "none":
            raise ValueError(f"{path} is in few bits and has no dense weights; leave --quantize out")
        if args.quantize and not stays:
            return {"quantize": _code(args.quantize)}  # which is refused there
        if args.blocksize:
            raise ValueError(f"{path} is in few bits already, in blocks of its own; leave --blocksize out")
        return {"compute_dtype": (trained[0] or {}).get("compute_dtype", "float32")} if trained else {}
    held = None
    if args.quantize is None and trained:
        held = trained[0]
        for base, other in zip(bases, trained, strict=True):
            if not identity.same_holding(held, other):
                raise ValueError(
                    f"{bases[0].folder} was trained on a base in {identity.described(held)}, and {base.folder} on one in "
                    f"{identity.described(other)}; choose with --quantize"
                )
    elif args.quantize not in (None, "none"):
        code = _code(args.quantize)
        held = next((h for h in trained if h and h["code"] == code), {"code": code})
    if args.blocksize:
        if held is None or held["code"] in STORES:
            raise ValueError(
                f"--blocksize {args.blocksize}: the base is held in {identity.described(held)}, without blocks"
            )
        held = {**held, "blocksize": args.blocksize}
    return identity.opening(held)


# --------------------------------------------------------------------------------------------------------------------- convert
_CONVERT = """Where --out ends in .gguf, write a model or an adapter for llama.cpp; else write a Hugging Face folder, which
AutoModelForCausalLM and AutoTokenizer open. One weight is in memory at a time, and what was there stays until all is written.

  a GGUF      --type f16 (rounded to 16 bits), q8_0 (8 bits and a scale a block of 32), bf16, f32 (exact, twice the size)
  a folder    --dtype bfloat16 (rounded to 16 bits), float32 (exact, and twice the size)

Norms and biases are float32 in every GGUF. A source of few bits is dequantized first: a GGUF's 4- and 8-bit weights, and for a GGUF
also a folder in 4 or 8 bits, such as merge --quantize writes. The vocabulary and the chat template come along; what GGUF cannot hold is
refused, or said in a note.

An adapter folder becomes the file that llama.cpp takes as --lora, with its A and B and one alpha (float32 by default). It needs the
config of its base, for the architecture and the order of rows: --model, or the one that the adapter names. DoRA, biases and modules
trained whole have no place in it: merge such an adapter, and convert the merged model.

Needs the packages of the extra llm (in a clone of tinylora: pip install -e '.[llm]')."""

_CONVERT_EXAMPLES = """examples:
  tinylora convert SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2        a folder for transformers and PEFT
  tinylora convert model.gguf --out model --dtype float32               exact, and twice the size
  tinylora convert merged --out merged.gguf --type q8_0                 what merge wrote, for llama.cpp
  tinylora convert tinylora-run/adapter --out adapter.gguf              an adapter, for llama.cpp's --lora
"""


def convert_parser(commands):
    p = command(
        commands,
        "convert",
        _convert,
        "write a model as a GGUF or a Hugging Face folder, and an adapter as llama.cpp's LoRA file",
        _CONVERT,
        _CONVERT_EXAMPLES,
        device=False,
        seed=False,
    )
    p.add_argument("path", help="FILE.gguf, a model folder, 'base' (embedded), or an adapter folder")
    p.add_argument("--out", required=True, help="FILE.gguf, or the model folder to write")
    p.add_argument(
        "--type", choices=("f32", "f16", "bf16", "q8_0"), default=None, help="of a GGUF (f16; f32 for an adapter)"
    )
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default=None, help="of a folder (bfloat16)")
    p.add_argument("--model", default=None, help="an adapter's base: 'base', a model folder, or FILE.gguf")
    p.add_argument("--force", action="store_true", help="write an adapter for a base that it was not trained on, too")


def _convert(args):
    import functools

    from tqdm import tqdm

    from ..interop.gguf import convert_adapter
    from ..models import files, gguf_writer
    from ..models.llama import convert

    source = Path(args.path)
    adapter = (source / "adapter_config.json").is_file() and not any(source.glob("model*.safetensors"))
    to_gguf = Path(args.out).suffix.lower() == ".gguf"
    _refuse_what_would_be_ignored(args, adapter, to_gguf)
    bar = functools.partial(tqdm, desc="writing", unit="tensor", disable=None)
    if not to_gguf:
        dtype = args.dtype or "bfloat16"
        with files.locked(args.out):
            weights, notes, form = convert(args.path, args.out, dtype, bar), (), dtype
    else:
        form = args.type or ("f32" if adapter else "f16")
        if adapter:
            written = convert_adapter(args.path, args.out, args.model, form, bar, not args.force)
        else:
            written = gguf_writer.convert(args.path, args.out, form, bar)
        weights, notes = written.weights, written.notes
    print(f"{weights:,} weights written to {args.out} in {form}")
    for note in notes:
        print(f"note: {printable(note)}")


def _refuse_what_would_be_ignored(args, adapter, to_gguf):
    """ValueError for an option that means nothing for this source and target."""
    if adapter and not to_gguf:
        raise ValueError(
            f"{args.path} is an adapter: let --out end in .gguf for llama.cpp's LoRA file, or put it into its model with merge"
        )
    if to_gguf and args.dtype:
        raise ValueError("--dtype is for a folder; a GGUF takes --type")
    if args.type and not to_gguf:
        raise ValueError("--type is for a GGUF: let --out end in .gguf; a folder takes --dtype")
    if args.force and not adapter:
        raise ValueError(f"--force is for an adapter, and {args.path} is none; leave it out")
    if args.model and not adapter:
        raise ValueError(f"--model names the base of an adapter, and {args.path} is none")
