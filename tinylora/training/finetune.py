"""The main job: QLoRA from a pretrained folder to an adapter on disk, with every byte accounted for.

    quantize the linear layers to NF4 (double quantization) → freeze → add LoRA to all of them → paged AdamW → held-out
    bits per byte

`finetune` does it once and returns a Report. `compare` does it for each method and seed: full fine-tuning, LoRA on the
bfloat16 base, QLoRA with NF4, FP4 and Int4; and, where it is named, LoRA on a base in LLM.int8.
"""

import contextlib
import csv
import hashlib
import io
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from .. import adapters, backend, data
from ..dtypes import Stored
from ..interop import peft
from ..models import eightbit, fields, files, folders, fourbit, identity
from ..models.chat import ends
from ..models.llama import Llama
from ..optim import AdamW
from ..paging import Pager
from ..tensor import Tensor
from .adamw8bit import AdamW8bit
from .checkpoints import ROW, check_run
from .corpus import Pairs, question_and_answer, read_corpus, read_text, running_text
from .distributed import ALONE, describe_traffic
from .train import Recipe, bits_per_byte, fit


@dataclass(frozen=True)
class Method:
    """What is frozen, and how: `code` of the frozen linear layers (None: they are trained), and whether LoRA is put on."""

    label: str
    code: str | None
    adapts: bool


#: What a job's `method` may be.
METHODS = {
    "full": Method("full fine-tuning, float32", None, adapts=False),
    "lora": Method("LoRA, bfloat16 base", "bfloat16", adapts=True),
    "qlora": Method("QLoRA, NF4 + double quantization", "nf4", adapts=True),
    "qlora-fp4": Method("QLoRA, FP4 + double quantization", "fp4", adapts=True),
    "qlora-int4": Method("QLoRA, Int4 + double quantization", "int4", adapts=True),
    "int8": Method("LoRA, LLM.int8 base", eightbit.CODE, adapts=True),
}
#: Those that `compare` runs by default.
COMPARED = ("full", "lora", "qlora", "qlora-fp4", "qlora-int4")

#: The default recipes. The learning rates were chosen on the last twentieth of the training text, never on the held-out one, with the
#: model that was embedded before; figures/README.md lists what was tried. LoRA wants the larger one: 3 times as large here. "LoRA Without
#: Regret" fits about 10 times on large models.
LORA_RECIPE = Recipe(steps=300, batch_size=8, seq_len=256, lr=3e-3, schedule="cosine", warmup=12)
FULL_RECIPE = replace(LORA_RECIPE, lr=1e-3)

PROMPT, QUESTION = "hacker\n  n. ", 'What does "hacker" mean to a hacker?'
OPTIMIZERS = {"adamw": AdamW, "adamw8bit": AdamW8bit}
#: Options of a Job that change no bit of the training: a run may go on from a checkpoint that was made with others.
CHANGEABLE_ON_RESUME = ("page_budget", "page_bytes", "pool", "whole_tensors", "heldout")


@dataclass(frozen=True)
class Job:
    """What to fine-tune and how.

    model    "base", a model folder, or FILE.gguf
    text     a file of text or of records (see `datafiles`), or None for the embedded Jargon File: as running text, or as questions and
             answers for a model that knows turns
    heldout  evaluate on so many held-out sequences (None: all)
    adapter  the folder of an adapter, of finetune's or PEFT's, that is trained further; its own settings then count, and not r, alpha,
             dropout, target_modules, exclude_modules, layers_to_transform, use_rslora and use_dora (see `going_on`)
    """

    model: str = "base"
    text: str | None = None
    method: str = "qlora"
    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | tuple = "all-linear"
    blocksize: int = 64
    compute_dtype: str = "float32"
    page_budget: int | None = 1 << 20
    page_bytes: int = 1 << 16
    checkpointing: bool = False
    device: str = "cpu"
    use_rslora: bool = False
    use_dora: bool = False
    optimizer: str = "adamw"
    pool: str = "host"
    whole_tensors: bool = False
    heldout: int | None = None
    adapter: str | None = None
    exclude_modules: str | tuple | None = None
    layers_to_transform: tuple | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown: expected one of {', '.join(METHODS)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r} is unknown: expected one of {', '.join(OPTIMIZERS)}")
        if self.adapter is not None and not METHODS[self.method].adapts:
            others = ", ".join(name for name, method in METHODS.items() if method.adapts)
            raise ValueError(
                f"an adapter needs a method that trains one, and {self.method!r} does not: expected one of {others}"
            )


#: What an adapter settles, so that a job that goes on with it takes it from there.
ADAPTERS_OWN = (
    "r", "alpha", "dropout", "target_modules", "exclude_modules", "layers_to_transform", "use_rslora", "use_dora",
)  # fmt: skip


def going_on(folder, **options):
    """The Job that trains the adapter in a folder further: on its base, held as it was then, with the adapter's own settings.

    options   other fields of the Job, `model`, `method` and `blocksize` among them, which then count
    """
    base, config = peft.read_base(folder), peft.read_config(folder)
    if rows := config.trainable_token_indices:
        raise ValueError(
            f"{folder} trains single rows of {next(iter(rows))} (trainable_token_indices), which finetune cannot train further; "
            "merge it, and train on the merged model"
        )
    own, held = {name: getattr(config, name) for name in ADAPTERS_OWN}, base.held or {}
    if base.about is not None:
        code = held.get("code", "bfloat16")  # a base in 32 bits is held in 16 by the method "lora"
        own["method"] = next((name for name, m in METHODS.items() if m.adapts and m.code == code), None)
        own |= {name: held[name] for name in ("blocksize", "compute_dtype") if name in held}
    own["model"] = options.get("model") or base.find()
    job = own | {name: value for name, value in options.items() if name not in ADAPTERS_OWN}
    if job.get("method", Job.method) is None:
        raise ValueError(
            f"{folder} was trained on a base held in {held['code']}, which no method is; choose one with --method"
        )
    return Job(**job, adapter=str(folder))


#: The columns of paging.csv.
_TRACE = {
    "step": fields.whole(),
    "page": fields.whole(),
    "event": fields.one_of("fault", "prefetch", "hit", "evict"),
    "bytes": fields.whole(),
}
_LONGEST_TRACE = 1 << 30  # bytes of a paging.csv that is read
_COUNTED = ("pages", "budget", "faults", "prefetches", "rescues", "hits", "evictions", "bytes moved")
#: What report.json holds, when it is read again.
_COUNTS = fields.mapping(fields.optional(fields.number()))
_REPORT = {
    "job": fields.fields({}),
    "recipe": fields.fields({"steps": fields.whole(1)}),
    "inputs": fields.mapping(fields.optional(fields.text())),
    "output": fields.optional(fields.text()),
    "before": fields.optional(fields.number()),
    "after": fields.number(),
    "trainable": fields.whole(),
    "parameters": fields.whole(1),
    "bits_per_param": fields.optional(fields.number()),
    "weight_error": fields.optional(fields.number()),
    "bytes": fields.mapping(fields.whole()),
    "paging": _COUNTS,
    "samples": fields.mapping(fields.text(1 << 20)),
    "history": fields.several(ROW),
    "first_step": fields.whole(),
    "seconds": fields.number(0),
    "tokens_per_second": fields.number(0),
    "traffic": fields.mapping(fields.number(0)),
    "adapter": fields.optional(fields.text()),
}


@dataclass
class Report:
    """What a job measured. Bytes are of arrays that exist, not predictions."""

    job: dict
    recipe: dict
    inputs: dict = field(default_factory=dict)  # hashes of the base model and of the text
    # A hash of what was trained, by which a report and the folder beside it are known to belong together.
    output: str | None = None
    before: float | None = None  # held-out bits per byte of the base as trained on (quantized, if it is)
    after: float | None = None
    trainable: int = 0
    parameters: int = 0
    bits_per_param: float | None = None
    weight_error: float | None = None  # Σ (ŵ − w)² / Σ w² of the weights that are held in few bits
    bytes: dict = field(default_factory=dict)
    paging: dict = field(default_factory=dict)
    samples: dict = field(default_factory=dict)
    history: list = field(default_factory=list)
    first_step: int = 0  # more than 0 if the run was resumed: time and paging are then counted from there
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    traffic: dict = field(default_factory=dict)  # what several processes sent to each other (see `distributed`)
    adapter: str | None = None


def prepare(job, seed=0):
    """The model of a job, on its device: loaded, quantized, with LoRA on it, frozen except for what is to be trained."""
    backend.module_for(job.device)  # a missing GPU is said before anything is read
    method = METHODS[job.method]
    code = method.code
    stored = fourbit.is_quantized(job.model)
    model = Llama.from_pretrained(job.model, **({"compute_dtype": job.compute_dtype} if stored else _holding(job)))
    found = {w.code_name for _, w in model.named_weights() if hasattr(w, "code_name")}
    if stored and found != {code}:
        raise ValueError(
            f"{job.model} is stored in {', '.join(found)}; the method {job.method!r} starts from {code or 'dense weights'}"
        )
    if job.adapter is not None:
        peft.load_adapter(model, job.adapter, untie=True)
        peft.take_tokenizer(model, job.adapter)
    elif method.adapts:
        backend.seed([seed, 1])  # the adapters' start
        options = {name: getattr(job, name) for name in ADAPTERS_OWN}
        if adapters.needs_own_head(model, adapters.LoRAConfig(**options)):
            adapters.untie(model)
        adapters.add_lora(model, **options)
    model.gradient_checkpointing = job.checkpointing
    if job.device != "cpu" and job.compute_dtype != "float32":
        model.compute_in(job.compute_dtype)  # tensor cores multiply in 16 bits; NumPy would only round
    return model.to(job.device)


def _holding(job):
    """How Llama.from_pretrained is to hold a dense base: in the method's code, and beyond that as an adapter was trained."""
    code = METHODS[job.method].code
    if code is None:
        return {"compute_dtype": job.compute_dtype}
    held = peft.read_base(job.adapter).held if job.adapter is not None else None
    options = identity.opening(held) if held and held["code"] == code else {"quantize": {"double_quant": True}}
    options["quantize"] |= {"code": code, "blocksize": job.blocksize, "compute_dtype": job.compute_dtype}
    return options


def model_folder(job):
    """The folder that job.model means."""
    return folders.place(job.model)


def inputs(job):
    """Hashes of the base model's weights and of the text: what a finished or a half-finished run is recognized by."""
    folder = model_folder(job)
    weights = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    text = b"".join(map(data.jargon, ("train", "heldout"))) if job.text is None else read_text(job.text)
    found = {
        "model": _digest(weights) if weights else None,
        "text": hashlib.sha256(text).hexdigest()[:16],
    }
    if job.adapter is not None:
        found["adapter"] = _digest([Path(job.adapter) / "adapter_model.safetensors"])
    return found


def _digest(paths):
    """A short hash of one file, or of several in this order."""
    digest = hashlib.sha256()
    for path in paths:
        with files.opened(path) as f:
            while piece := f.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()[:16]


def corpus(job, tokenizer):
    """(train, held-out) of a job."""
    if job.text is not None:
        return read_corpus(job.text, tokenizer)
    if tokenizer.chats:
        return tuple(question_and_answer(data.jargon_pairs(split), tokenizer) for split in ("train", "heldout"))
    return tuple(running_text(data.jargon(split), tokenizer) for split in ("train", "heldout"))


def finetune(
    job,
    recipe,
    out=None,
    eval_every=0,
    checkpoint_every=50,
    measure_before=True,
    progress=True,
    trace=False,
    ranks=ALONE,
):
    """Run a job; returns its Report. With `out`, the folder gets report.json, checkpoint.safetensors and adapter/ (or model/).

    Killed and started again with the same arguments, it goes on from the last checkpoint; on the same machine, with the same BLAS
    kernel, it ends with the same bytes as a run that was left alone. A folder that another process is training in is refused.

    trace    also write paging.csv (step, page, event, bytes), from the step at which this process began
    ranks    the processes that train together, all of which call this; the first has the folder, and each gets the Report
    """
    with contextlib.ExitStack() as held:
        done = ranks.first(lambda: _held(held, job, recipe, out))
        if done is not None:
            return done
        progress = progress and ranks.rank == 0
        return _run(job, recipe, out, eval_every, checkpoint_every, measure_before, progress, trace, ranks)


def _held(held, job, recipe, out):
    """Hold the folder for as long as the ExitStack `held` is open; the Report of the run if it has ended there before."""
    if out and job.adapter is not None and files.same(Path(out) / "adapter", job.adapter):
        raise ValueError(
            f"--out {out} would overwrite the adapter that is trained further ({job.adapter}); choose another folder"
        )
    if out:
        held.enter_context(files.locked(out))
    done = finished(job, recipe, out)
    if out and done is None:
        files.check_target(out)
    return done


def _run(job, recipe, out, eval_every, checkpoint_every, measure_before, progress, trace, ranks):
    """What `finetune` does, in a folder that is held for it."""

    def begun():
        model = prepare(job, recipe.seed)
        digests = inputs(job)  # which reads the text, and forgets it before the corpus does
        return model, digests, *corpus(job, model.tokenizer)

    model, digests, train, heldout = ranks.each(begun)
    recipe = recipe.planned(train)
    report = Report(asdict(job), asdict(recipe), digests)
    report.trainable, report.parameters = adapters.count_parameters(model)
    report.bits_per_param = _bits_per_param(model)
    about, defaults = _identity(job, report.inputs), {"job": asdict(Job())}
    ranks.of_one_run(about)
    ranks.first(lambda: check_run(out, train, recipe, about, defaults))  # before anything long
    pager = Pager(job.page_budget, job.page_bytes, job.pool, job.device, trace=trace, whole_tensors=job.whole_tensors)

    def score():
        limits = {"seq_len": recipe.seq_len, "shards": recipe.shards, "limit": job.heldout}
        bits = bits_per_byte(model, heldout, progress=progress, ranks=ranks, **limits)
        return bits, ranks.first(lambda: sample(model, None if job.text is None else heldout))

    if measure_before:
        report.weight_error = ranks.first(lambda: _weight_error(model, job))
        report.before, report.samples["before"] = score()
    result = fit(
        model,
        train,
        recipe,
        heldout=heldout if eval_every else None,
        eval_every=eval_every,
        heldout_limit=job.heldout,
        out=out,
        checkpoint_every=checkpoint_every,
        about=about,
        defaults=defaults,
        optimizer=OPTIMIZERS[job.optimizer],
        pager=pager,
        progress=progress,
        ranks=ranks,
    )
    report.after, report.samples["after"] = score()
    report.first_step, report.history = result.first_step, result.history
    report.seconds, report.tokens_per_second = result.seconds, result.tokens_per_second
    report.bytes, report.paging = _bytes(model, result, pager), _paging(pager)
    if ranks.comm is not None:
        base = report.parameters - (report.trainable if METHODS[job.method].adapts else 0)
        report.traffic = ranks.traffic(report.trainable, base, recipe.steps - result.first_step)

    def ended():
        if out:
            _save(report, model, job, Path(out), pager.trace if trace else None)
        return report

    return ranks.first(ended)


def _identity(job, digests):
    """What a checkpoint must share with the run that goes on from it, beside the recipe and the text."""
    options = {name: value for name, value in asdict(job).items() if name not in CHANGEABLE_ON_RESUME}
    return {"job": options, "inputs": digests}


def _bits_per_param(model):
    """Bits that a weight of the quantized (or 16-bit) layers takes with its constants; None if there are none."""
    stored = [w for _, w in model.named_weights() if isinstance(w, Stored)]
    return 8 * sum(w.nbytes for w in stored) / sum(w.size for w in stored) if stored else None


def _weight_error(model, job):
    """Σ (ŵ − w)² / Σ w² over the weights in few bits, w as job.model has them; None if there are none, or if that is in few bits itself."""
    stored = {adapters.targets.plain(n): w for n, w in model.named_weights() if isinstance(w, Stored)}
    if not stored or fourbit.is_quantized(job.model):
        return None
    source, lost, power = folders.open_model(job.model).weights, 0.0, 0.0
    for name, w in stored.items():
        dense = source.float32(name)
        difference = w.to(lambda a: backend.move(a, "cpu")).dequantize("float32") - dense
        lost += float(np.square(difference, dtype=np.float64).sum())
        power += float(np.square(dense, dtype=np.float64).sum())
    return lost / power if power else 0.0


def _bytes(model, result, pager):
    """{what: bytes} of a run, by arrays that exist; its names are the rows of the printed table."""
    trained = sum(p.nbytes for _, p in model.trainable())
    frozen = [w for _, w in model.named_weights() if not (isinstance(w, Tensor) and w.requires_grad)]
    resident = result.optimizer_bytes
    if pager.budget is not None:
        resident += pager.peak_resident_bytes + pager.unpaged_bytes - pager.total_bytes
    return {
        "frozen weights": sum(w.nbytes for w in frozen),
        "trained weights": trained,
        "gradients": result.gradient_bytes,
        "optimizer state": result.optimizer_bytes,
        "optimizer state, resident at most": resident,
        "tape, peak": result.tape_bytes,
        "process, peak resident": peak_resident_bytes(),
    }


def _paging(pager):
    """What the pager counted."""
    c = pager.counters
    counts = c.faults, c.prefetches, c.rescues, c.hits, c.evictions, c.bytes_moved
    return dict(zip(_COUNTED, (len(pager), pager.budget, *counts), strict=True))


def _save(report, model, job, folder, trace=None):
    """Write adapter/ (or model/, without one), paging.csv if there is a trace, and last report.json, which says that the run has ended."""
    if adapters.lora_layers(model):
        report.adapter = str(folder / "adapter")
        more = (
            job.adapter is not None and (Path(job.adapter) / "tokenizer.json").is_file()
        )  # tokens that the base lacks
        tokenizer = model.tokenizer if more else None
        peft.save_adapter(model, report.adapter, base_model=str(model_folder(job)), tokenizer=tokenizer)
    else:
        report.adapter = str(folder / "model")
        model.save_pretrained(report.adapter, dtype="float32")
    report.output = _trained(report.adapter)
    if trace is not None:
        files.write_text(folder / "paging.csv", _as_csv(trace))
    files.write_json(folder / "report.json", json.loads(json.dumps(asdict(report))))


def _trained(folder):
    """A short hash of the weights in the folder of an adapter or a model."""
    return _digest(sorted(Path(folder).glob("*.safetensors")))


def _as_csv(trace):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_TRACE, *trace])
    return text.getvalue()


def read_trace(out):
    """[(step, page, event, bytes)] of the paging.csv in a run's folder."""
    path = Path(out) / "paging.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run finetune with --trace")
    files.check_regular(path, limit=_LONGEST_TRACE)
    trace = []
    with files.opened(path) as f:
        rows = csv.reader(io.TextIOWrapper(f, encoding="utf-8", errors="replace", newline=""))
        if (head := next(rows, None)) != list(_TRACE):
            raise ValueError(f"{path}: its first line is {fields.shown(head)}, expected {','.join(_TRACE)}")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(_TRACE):
                raise ValueError(f"{where}: {len(row)} values, expected {','.join(_TRACE)}")
            numbers = [int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text for text in row]
            trace.append(tuple(fields.check(dict(zip(_TRACE, numbers, strict=True)), _TRACE, where).values()))
    return trace


def sample(model, own=None, tokens=240):
    """A continuation of PROMPT, or an answer to QUESTION, at temperature 0.6 and always with the same seed.

    own: a corpus, whose first prompt, or first 32 tokens of running text, are continued instead
    """
    tokenizer = model.tokenizer
    if own is not None:
        asked = own.pairs[0][0] if isinstance(own, Pairs) else own.sources[0][:32].tolist()
        asked = asked[-(model.config.max_position_embeddings // 2) :]
        if asked:
            options = {"stop": ends(model)} if tokenizer.chats else {}
            return tokenizer.decode(asked) + model.generate(asked, tokens // 3, temperature=0.6, seed=1, **options)
    if tokenizer.chats:
        ids = tokenizer.chat_prompt(QUESTION)
        answer = model.generate(ids, max_new_tokens=tokens // 3, temperature=0.6, seed=1, stop=ends(model))
        return f"{QUESTION}\n{answer}"
    return PROMPT + model.generate(PROMPT, max_new_tokens=tokens, temperature=0.6, seed=1)


def peak_resident_bytes():
    """The process's largest resident set so far; 0 where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def finished(job, recipe, out):
    """The Report of a run that ended in `out` with the same job, recipe, model and text; None if there is none."""
    path = Path(out) / "report.json" if out else None
    if path is None or not path.exists():
        return None
    saved = files.read_json(path)
    fields.check(saved, _REPORT, str(path), required=("job", "recipe", "after", "parameters", "paging"))
    fields.check(saved["paging"], {}, f"{path}: paging", required=_COUNTED)
    for name, default in (("job", Job()), ("recipe", Recipe())):  # a report from before an option existed
        saved[name] = {**asdict(default), **saved.get(name, {})}
    wanted = json.loads(json.dumps({"job": asdict(job), "recipe": asdict(recipe), "inputs": inputs(job)}))
    if recipe.epochs is not None:  # how many steps they take is known when the data are read
        wanted["recipe"]["steps"] = saved["recipe"]["steps"]
    same = all(saved.get(name) == value for name, value in wanted.items())
    if not same or not saved.get("adapter") or not Path(saved["adapter"]).is_dir():
        return None
    if saved.get("output") not in (None, _trained(saved["adapter"])):
        return None  # what was trained further since then
    return Report(**{name: value for name, value in saved.items() if name in _REPORT})


# -------------------------------------------------------------------------------------------------------------------- printing
def describe(report):
    """The closing table of a job, as text."""
    label = METHODS[report.job["method"]].label
    rows = [] if report.before is None else [("held-out bits per byte, before", f"{report.before:.4f}")]
    rows.append(("held-out bits per byte, after", f"{report.after:.4f}"))
    share = f"{100 * report.trainable / report.parameters:.4f} %"
    rows.append(("trainable parameters", f"{report.trainable:,} of {report.parameters:,} ({share})"))
    if report.bits_per_param is not None:
        rows.append(("bits per quantized parameter", f"{report.bits_per_param:.3f}"))
    if report.weight_error is not None:
        rows.append(("relative squared error of these", f"{report.weight_error:.2e}"))
    rows += [(f"bytes: {name}", f"{n:,}") for name, n in report.bytes.items()]
    p, since = report.paging, f", since step {report.first_step}" if report.first_step else ""
    if p["budget"] is not None:
        faults = f"{p['faults']:,} ({p['evictions']:,}) on {p['pages']:,} pages, budget {p['budget']:,} bytes{since}"
        rows += [("page faults (evictions)", faults), ("bytes moved by paging", f"{p['bytes moved']:,}{since}")]
    rows += describe_traffic(report.traffic)
    rows.append(("training", f"{report.seconds:.0f} s, {report.tokens_per_second:,.0f} tokens/s{since}"))
    if report.adapter:
        what = "adapter" if Path(report.adapter).name == "adapter" else "model"
        rows.append((f"the {what} lies in", report.adapter))
    width = max(len(name) for name, _ in rows)
    lines = [label, "-" * len(label), *(f"{name:<{width}}  {value}" for name, value in rows)]
    for when, text in report.samples.items():
        lines += ["", f"sample, {when}:", *("    " + line for line in text.splitlines())]
    return "\n".join(lines)
