"""All that writes: what there is before, what is done, and how what was written is read.

Each Operation works in a folder `root`; `before(root)` prepares it and `run(root)` writes under root/out or root/out.*. `sets` are the
files that belong together, {folder: (the file by which it is known, names)}; every other file is written for itself.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path

import tiny

from tinylora import Llama, adapters, cli, quantize_linears
from tinylora.interop import bitsandbytes, peft
from tinylora.models import eightbit, files, folders, safetensors

MODEL, ADAPTER = ("config.json", folders.MODEL_FILES), ("adapter_config.json", peft._FILES)
QUICK = ["--batch-size", "2", "--seq-len", "16", "--warmup", "0", "--steps", "3", "--checkpoint-every", "1"]
TEXT = "the quick brown fox jumps over the lazy dog. " * 12


@dataclass(frozen=True)
class Operation:
    """See the module.

    share    how many of the faults it gets: runs that take long get fewer
    resumed  files that are other ones if the run goes on from a checkpoint
    asides   files without which the result is whole: nobody asked for them, and where they fail the command still ends well
    cli      whether it is a command, whose errors are sentences and the status 2
    """

    before: object
    run: object
    sets: dict
    share: float = 1.0
    resumed: tuple = ()
    asides: tuple = ()
    cli: bool = False
    needs: tuple = ()

    def missing(self):
        """The packages that it needs and that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def command(*argv):
    """run(root) of a command in which {root} stands for the folder. -> its exit status"""
    return lambda root: cli.main([word.replace("{root}", str(root)) for word in argv])


# --------------------------------------------------------------------------------------------------------------- what is there before
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 256}


def model(seed=1, **changes):
    """A small model; those of different seeds differ in their config, too."""
    return tiny.model(seed, **{**SMALL, "rope_theta": 10000.0 * seed, **changes})


def sources(root):
    """What commands begin with: a model, another one in float32, an adapter on it, and texts."""
    model(3).save_pretrained(root / "model")
    m = adapters.add_lora(Llama.from_pretrained(root / "model"), r=2, target_modules=["q_proj", "v_proj"])
    peft.save_adapter(m, root / "adapter", base_model=str(root / "model"))
    (root / "one.txt").write_text(TEXT)
    (root / "two.txt").write_text(TEXT.replace("fox", "dog"))


def old_model(root):
    """Another model in the way: other weights, other config, and a file that the new one does not have."""
    sources(root)
    model(2).save_pretrained(root / "out", dtype="float32")
    files.write_json(root / "out" / "generation_config.json", {"eos_token_id": 3})


def old_adapter(root):
    sources(root)
    m = adapters.add_lora(model(3), r=3, target_modules=["k_proj"])
    peft.save_adapter(m, root / "out", base_model="another")
    (root / "out" / "tokenizer_config.json").write_text("{}")


def old_bits(root):
    sources(root)
    bitsandbytes.save(quantize_linears(model(2)), root / "out")


def old_file(name):
    def before(root):
        sources(root)
        (root / name).write_bytes(b"old" * 5000)

    return before


def begun(root):
    """A run that was stopped after its first step."""
    sources(root)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(KeyboardInterrupt):
        _stopped(finetune("qlora"), root)


def _stopped(run, root):
    """Run up to the second checkpoint, and no further."""
    real, count = safetensors.save_safetensors, iter(range(9))

    def save(path, *args):
        if Path(path).name == "checkpoint.safetensors" and next(count) == 1:
            raise KeyboardInterrupt
        return real(path, *args)

    safetensors.save_safetensors = save
    try:
        return run(root)
    finally:
        safetensors.save_safetensors = real


# ------------------------------------------------------------------------------------------------------------------------ what is done
def finetune(method, *more):
    words = ["finetune", "--model", "{root}/model", "--text", "{root}/one.txt", "--method", method, "-r", "2"]
    return command(*words, *QUICK, "--page-budget", "2k", "--page-bytes", "1k", *more, "--out", "{root}/out")


def save_adapter(root, r=2):
    m = adapters.add_lora(model(3), r=r, target_modules=["q_proj", "v_proj"])
    peft.save_adapter(m, root / "out", base_model="a model")


def quantize_folder(root):
    bitsandbytes.quantize_folder(root / "model", root / "out", progress=False)


def draw(root):
    from tinylora.figures import style

    figure, axes = style.canvas(3, 2)
    axes.plot(range(400), [x % 7 for x in range(400)])
    style.save(figure, root / "out.svg")


RUN = {"out/adapter": ADAPTER}
PRETRAIN = command(
    "pretrain", "{root}/one.txt", "{root}/two.txt", *QUICK, *("--hidden-size", "32", "--intermediate-size", "32"),
    *("--num-hidden-layers", "1", "--num-attention-heads", "4", "--num-key-value-heads", "2", "--out", "{root}/out"),
)  # fmt: skip
SWITCH = command(
    "switch", "--model", "{root}/model", "--texts", "{root}/one.txt", "{root}/two.txt", "--out", "{root}/out", *QUICK[:-2],
    *("-r", "2", "--max-new-tokens", "3", "--pieces", "2"),
)  # fmt: skip
OPERATIONS = {
    "save_pretrained, a new folder": Operation(sources, lambda r: model(1).save_pretrained(r / "out"), {"out": MODEL}),
    "save_pretrained, over a model": Operation(
        old_model, lambda r: model(1).save_pretrained(r / "out"), {"out": MODEL}
    ),
    "save_adapter, a new folder": Operation(sources, save_adapter, {"out": ADAPTER}),
    "save_adapter, over an adapter": Operation(old_adapter, save_adapter, {"out": ADAPTER}),
    "bitsandbytes.save, 4 bits": Operation(
        old_bits, lambda r: bitsandbytes.save(quantize_linears(model(1)), r / "out"), {"out": MODEL}
    ),
    "bitsandbytes.save, 8 bits": Operation(
        old_bits,
        lambda r: bitsandbytes.save(quantize_linears(model(1), code=eightbit.CODE), r / "out"),
        {"out": MODEL},
    ),
    "quantize_folder, a new folder": Operation(sources, quantize_folder, {"out": MODEL}),
    "quantize_folder, over a copy": Operation(old_bits, quantize_folder, {"out": MODEL}),
    "write_json": Operation(
        old_file("out.json"), lambda r: files.write_json(r / "out.json", {"a": ["b"] * 3000}), {}, 0.5
    ),
    "convert to a folder": Operation(
        old_model, command("convert", "{root}/model", "--out", "{root}/out"), {"out": MODEL}, cli=True
    ),
    "convert to a GGUF": Operation(
        old_file("out.gguf"),
        command("convert", "{root}/model", "--out", "{root}/out.gguf"),
        {},
        0.5,
        cli=True,
        needs=("gguf",),
    ),
    "convert an adapter": Operation(
        old_file("out.gguf"),
        command("convert", "{root}/adapter", "--out", "{root}/out.gguf"),
        {},
        0.5,
        cli=True,
        needs=("gguf",),
    ),
    "merge": Operation(
        old_model,
        command("merge", "--model", "{root}/model", "--adapter", "{root}/adapter", "--out", "{root}/out"),
        {"out": MODEL},
        cli=True,
    ),
    "merge into 4 bits": Operation(
        old_bits,
        command(
            *("merge", "--model", "{root}/model", "--adapter", "{root}/adapter", "--quantize", "nf4"),
            *("--out", "{root}/out"),
        ),
        {"out": MODEL},
        cli=True,
    ),
    "generate --out": Operation(
        old_file("out.txt"),
        command("generate", "--model", "{root}/model", "--max-new-tokens", "4", "--out", "{root}/out.txt"),
        {},
        0.3,
        cli=True,
    ),
    "quantize --out": Operation(
        sources,
        command("quantize", "{root}/model", "--codes", "nf4", "--out", "{root}/out"),
        {"out": MODEL},
        0.2,
        asides=("out/errors.svg",),
        cli=True,
    ),
    "memory --out": Operation(
        old_file("out.svg"),
        command("memory", "--model", "{root}/model", "--seq-len", "16", "--out", "{root}/out.svg"),
        {},
        0.1,
        cli=True,
        needs=("matplotlib",),
    ),
    "a figure": Operation(old_file("out.svg"), draw, {}, 0.3, needs=("matplotlib",)),
    "finetune": Operation(
        sources, finetune("qlora", "--trace"), RUN, 0.3, ("out/paging.csv", "out/paging.svg"), cli=True
    ),
    "finetune, pages in a file": Operation(
        sources, finetune("lora", "--pool", "file", "--optimizer", "adamw8bit"), RUN, 0.2, cli=True
    ),
    "finetune, all weights": Operation(sources, finetune("full"), {"out/model": MODEL}, 0.2, cli=True),
    "finetune, resumed": Operation(begun, finetune("qlora"), RUN, 0.2, cli=True),
    "pretrain": Operation(sources, PRETRAIN, {"out": MODEL}, 0.2, cli=True),
    "switch": Operation(sources, SWITCH, {"out/one/adapter": ADAPTER, "out/two/adapter": ADAPTER}, 0.1, cli=True),
}


# --------------------------------------------------------------------------------------------------------------------- what is compared
def normal(path, content):
    """The bytes of a file without what differs from run to run: the times of a report, and what depends on where it went on."""
    if Path(path).name == "report.json":
        with contextlib.suppress(ValueError):
            report = json.loads(content)
            for name in ("seconds", "tokens_per_second", "bytes", "paging", "first_step"):
                report.pop(name, None)
            return json.dumps(report).encode()
    return content


def contents(root):
    """{path: digest} of all files under a folder, and of empty folders."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_file():
            found[name] = hashlib.sha256(normal(name, path.read_bytes())).hexdigest()[:16]
        elif path.is_dir() and not any(path.iterdir()):
            found[name] = "an empty folder"
    return found


def read(root, operation):
    """What readers find: {folder of a set: its config and all its tensors}, or the sentence with which it is refused."""
    found = {}
    for name, (head, _) in operation.sets.items():
        folder = root / name
        if not folder.exists():
            found[name] = None
            continue
        try:
            if head == "config.json":
                found[name] = _model(folder)
            else:
                m = peft.load_adapter(model(3), folder, check_base=False)
                found[name] = _digest(m.named_weights()), _text(folder / head)
        except (ValueError, OSError) as error:
            found[name] = f"refused: {error}"
    return found


def _model(folder):
    m = Llama.from_pretrained(folder)
    return _digest(m.named_weights()), str(m.config)


def _digest(weights):
    digest = hashlib.sha256()
    for name, w in weights:
        dense = w.data if hasattr(w, "data") else w.dequantize("float32")
        digest.update(name.encode() + dense.tobytes())
    return digest.hexdigest()[:16]


def _text(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
