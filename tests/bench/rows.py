"""The rows of the benchmark: which contestants stand against each other at which sizes, and what ratios are wanted.

    ROWS    {name: function(short) -> [Case]}; a function's docstring says what its row measures. short: tiny sizes, one case

A Case is run for each number of threads. Its Lines are the numbers that are read off it, one for each checkout of tinylora. `must` and
`aim` say what was asked for, by number of threads; a line without them is there to be looked at.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOTH, TWO = (1, 2), 2


@dataclass(frozen=True)
class Contestant:
    """One process.

    name      in its case; what it `does` is a function of `contestants`, with the arguments `given`
    needs     the libraries that it needs besides NumPy
    ours      it is tinylora's: each checkout has one
    threads   its own number of threads; a case with fewer does without it
    """

    name: str
    does: str
    given: dict = field(default_factory=dict)
    needs: tuple = ()
    ours: bool = False
    threads: int | None = None


#: {what a line is: how it is computed from the seconds of `of` and `against`}
KINDS = {
    "ratio": lambda line, of, against: of / against,
    "ns a weight": lambda line, of, against: 1e9 * of / line.per,
    "µs": lambda line, of, against: 1e6 * of,
}


@dataclass(frozen=True)
class Line:
    """A number of a case: `of` over `against` (names of contestants), or what KINDS says. must, aim: {threads: bound}."""

    of: str
    against: str | None = None
    must: dict = field(default_factory=dict)
    aim: dict = field(default_factory=dict)
    kind: str = "ratio"
    per: float = 1.0
    more: bool = False  # more is better

    @property
    def name(self):
        """What it says in the table: of whom, and over whom."""
        return f"{self.of} over {self.against}" if self.against else self.of

    def value(self, of, against=None):
        return KINDS[self.kind](self, of, against)


@dataclass(frozen=True)
class Case:
    """Contestants who take turns. name: the size, or the model; threads: the numbers of threads for which it makes sense (None: any)."""

    name: str
    contestants: tuple
    lines: tuple
    threads: tuple | None = None


def ours(does, name="tinylora", threads=None, **given):
    return Contestant(name, does, given, ours=True, threads=threads)


def theirs(name, does, *needs, **given):
    return Contestant(name, does, given, needs)


def sizes(vocabulary, hidden, ffn, layers, heads, keys, positions):
    """A Llama's config, in the names that tinylora and transformers share; the head is the embedding."""
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    numbers = vocabulary, hidden, ffn, layers, heads, keys
    return {**dict(zip(names.split(), numbers, strict=True)),
            "max_position_embeddings": positions, "tie_word_embeddings": True}  # fmt: skip


def embedded():
    """The sizes of the model that ships with the package."""
    held = json.loads((ROOT / "tinylora" / "data" / "base" / "config.json").read_text(encoding="utf-8"))
    return {name: held[name] for name in (*sizes(*[0] * 7), "head_dim")}


#: {name: (config, sequences, tokens each)}. A width divides by 64, the block of NF4: bitsandbytes' AVX-512 kernel misreads others.
SHAPES = {
    "base": (None, 8, 256),
    "A, 0.8M": (sizes(256, 128, 384, 4, 4, 4, 128), 16, 128),
    "B, 5M": (sizes(4096, 256, 512, 6, 4, 4, 256), 8, 256),
    "27M": (sizes(4096, 512, 1344, 8, 8, 8, 256), 4, 256),
    "SmolLM2-135M": (sizes(49152, 576, 1536, 30, 9, 3, 8192), 2, 256),
}
TINY = {"tiny": (sizes(64, 64, 64, 1, 2, 1, 32), 2, 16)}


# ------------------------------------------------------------------------------------------------------------------------- NF4
def quantize(short):
    """64M float32 weights to NF4 in blocks of 64, and by itself the double quantization of their constants, in ns a weight"""
    shape = (64, 64) if short else (8192, 8192)
    double, n = "double quantization", shape[0] * shape[1]
    return [
        Case(
            "tiny" if short else "64M",
            (
                ours("tinylora_quantize", shape=shape),
                ours("tinylora_constants", double, n=n // 64),
                theirs("bitsandbytes", "bitsandbytes_quantize", "torch", "bitsandbytes", shape=shape),
            ),
            (
                Line("tinylora", "bitsandbytes", {1: 0.08, 2: 0.15}, {1: 0.065, 2: 0.10}),
                Line(double, None, {2: 0.10}, {2: 0.07}, "ns a weight", n),
            ),
        )
    ]


def dequantize(short):
    """16M weights from NF4 to float32, into a ready buffer where the checkout has out="""
    shape, needs = ((64, 64) if short else (4096, 4096)), ("torch", "bitsandbytes")
    return [
        Case(
            "tiny" if short else "16M",
            (
                ours("tinylora_dequantize", shape=shape),
                theirs("copy", "copy", n=shape[0] * shape[1]),
                theirs("bitsandbytes' API", "bitsandbytes_dequantize", *needs, shape=shape),
                theirs("bitsandbytes' kernel", "bitsandbytes_kernel", *needs, shape=shape),
            ),
            (
                Line("tinylora", "copy", {2: 2.5}, {2: 1.5}),
                Line("tinylora", "bitsandbytes' API", {2: 0.4}, {2: 0.3}),
                Line("tinylora", "bitsandbytes' kernel", {2: 2.5}, {2: 2.0}),
            ),
        )
    ]


def qlora_linear(short):
    """A QLoRA linear layer, 512 rows, r = 16, forward and backward; the floor is its two bare float32 products"""
    wanted = {
        1024: ((1.40, 1.25), (0.95, 0.85)),
        2048: ((1.25, 1.15), (0.90, 0.85)),
        4096: ((1.18, 1.10), (0.75, 0.70)),
    }
    cases, peer, two = [], "bitsandbytes + PEFT", "tinylora, 2 shards"
    for size in (64,) if short else (1024, 2048, 4096):
        rows, ((must, aim), (peer_must, peer_aim)) = 16 if short else 512, wanted.get(size, ((0, 0), (0, 0)))
        cases.append(
            Case(
                f"{size}²",
                (
                    ours("tinylora_linear", rows=rows, size=size),
                    ours("tinylora_linear", two, threads=TWO, rows=rows, size=size, shards=2),
                    theirs("sgemm", "sgemm", rows=rows, size=size),
                    theirs(peer, "peft_linear", "torch", "bitsandbytes", "peft", rows=rows, size=size),
                ),
                (
                    Line("tinylora", "sgemm", {2: must}, {2: aim}),
                    Line(two, "sgemm"),
                    Line("tinylora", peer, {2: peer_must}, {2: peer_aim}),
                ),
            )
        )
    return cases


# -------------------------------------------------------------------------------------------------------------- training steps
def _steps(short, method, peer, needs, must, aim):
    """A case for each model; must: a bound, or one for each."""
    cases = []
    shapes = TINY if short else {name: SHAPES[name] for name in ("base", "A, 0.8M", "B, 5M", "27M")}
    for name, (config, batch, tokens) in shapes.items():
        given = {"batch": batch, "tokens": tokens, "method": method}
        cases.append(
            Case(
                name,
                (
                    ours("tinylora_step", sizes=config, shards=THREADS, **given),
                    theirs(peer, "torch_step", *needs, sizes=config or embedded(), **given),
                ),
                (Line("tinylora", peer, {2: must}, {2: aim}),),
            )
        )
    return cases


#: In `given`: as many as the case has threads.
THREADS = "threads"


def llama_full(short):
    """A training step of a Llama, every weight trained in float32, against torch"""
    return _steps(short, "full", "torch", ("torch", "transformers"), 0.90, 0.85)


def llama_lora(short):
    """The step with LoRA on all linear layers, r = 16, on a bfloat16 base (PEFT's is in float32)"""
    return _steps(short, "lora", "PEFT", ("torch", "transformers", "peft"), 0.78, 0.70)


def llama_qlora(short):
    """The step with LoRA on all linear layers in NF4 with double quantization, against bitsandbytes + PEFT"""
    needs = ("torch", "transformers", "peft", "bitsandbytes")
    return _steps(short, "qlora", "bitsandbytes + PEFT", needs, 0.80, 0.70)


def qlora_over_lora(short):
    """The QLoRA step against the LoRA step on a bfloat16 base, both tinylora's"""
    shapes = TINY if short else {name: SHAPES[name] for name in ("base", "27M", "SmolLM2-135M")}
    return [
        Case(
            name,
            tuple(
                ours(
                    "tinylora_step",
                    method,
                    sizes=config,
                    batch=batch,
                    tokens=tokens,
                    method=method.lower(),
                    shards=THREADS,
                )
                for method in ("QLoRA", "LoRA")
            ),
            (Line("QLoRA", "LoRA", {2: 1.10}, {2: 1.05}),),
        )
        for name, (config, batch, tokens) in shapes.items()
    ]


def workers(short):
    """A training step of 8 × 256 tokens with one worker against two: how many times faster two are"""
    config, batch, tokens = TINY["tiny"] if short else SHAPES["base"]
    cases = []
    for method, must in {"full": 1.8, "LoRA": 1.8, "QLoRA": 1.75}.items():
        given = {"sizes": config, "batch": batch, "tokens": tokens, "method": method.lower()}
        pair = tuple(ours("tinylora_step", f"{n} worker{'s' * (n > 1)}", n, shards=n, **given) for n in BOTH)
        line = Line("1 worker", "2 workers", {2: must}, {2: 1.9}, more=True)
        cases.append(Case(method, pair, (line,), threads=(TWO,)))
    return cases[:1] if short else cases


# ------------------------------------------------------------------------------------------------------------------ optimizers
def _numbers(short):
    return ("tiny", {"n": 1 << 18, "tensors": 2}) if short else ("10M", {"n": 10_000_000, "tensors": 10})


def adamw(short):
    """A step of AdamW on 10M parameters in ten tensors, by itself, against torch's foreach and fused"""
    name, given = _numbers(short)
    return [
        Case(
            name,
            (
                ours("tinylora_adamw", **given),
                theirs("foreach", "torch_adamw", "torch", **given, foreach=True),
                theirs("fused", "torch_adamw", "torch", **given, fused=True),
            ),
            (
                Line("tinylora", "foreach", {2: 0.55}, {2: 0.45}),
                Line("tinylora", "fused", {2: 3.2}, {2: 2.7}),
            ),
        )
    ]


def adamw8bit(short):
    """A step of AdamW in 8 bits on 10M parameters, by itself, against bitsandbytes; and half resident against unpaged"""
    name, given = _numbers(short)
    return [
        Case(
            name,
            (
                ours("tinylora_adamw", **given, kind="AdamW8bit"),
                ours("tinylora_adamw", "paged", **given, kind="AdamW8bit", resident=0.5),
                theirs("bitsandbytes", "bitsandbytes_adamw8bit", "torch", "bitsandbytes", **given),
            ),
            (
                Line("tinylora", "bitsandbytes", {2: 0.8}, {2: 0.6}),
                Line("paged", "tinylora", {2: 1.3}, {2: 1.1}),
            ),
        )
    ]


def paged_adamw(short):
    """A step of AdamW on 10M parameters, half of its state resident, default page, against the step that is not paged"""
    name, given = _numbers(short)
    return [
        Case(
            name,
            (ours("tinylora_adamw", "paged", **given, resident=0.5), ours("tinylora_adamw", "unpaged", **given)),
            (Line("paged", "unpaged", {2: 1.2}, {2: 1.05}),),
        )
    ]


# ---------------------------------------------------------------------------------------------------- generation, one op, import
def generate(short):
    """200 tokens from the embedded model on NF4, against transformers on dense float32 weights; one thread"""
    tokens, peer, dense = 2 if short else 200, "transformers", "tinylora, dense cache"
    return [
        Case(
            "base",
            (
                ours("tinylora_generate", tokens=tokens),
                ours("tinylora_generate", dense, tokens=tokens, more={"dense": True}),
                ours("tinylora_generate", "tinylora, float32", tokens=tokens, held="float32"),
                theirs(peer, "transformers_generate", "torch", "transformers", sizes=embedded(), tokens=tokens),
            ),
            (
                Line("tinylora", peer),
                Line(dense, peer, {1: 1.0}, {1: 0.7}),
                Line("tinylora, float32", peer),
            ),
            threads=(1,),
        )
    ]


def op(short):
    """One product of two 4 × 4 matrices: forward without a tape, and with the gradient of one or of both, in µs; one thread"""
    number, wanted = 10 if short else 1000, {"forward": (), "one gradient": (10, 7), "both gradients": (13, 9)}
    contestants, lines = [], []
    for gradients, (name, bounds) in enumerate(wanted.items()):
        given = {"gradients": gradients, "number": number}
        contestants += [ours("tinylora_op", name, **given), theirs(f"torch, {name}", "torch_op", "torch", **given)]
        must, aim = ({1: bound} for bound in bounds) if bounds else ({}, {})
        lines += [Line(name, None, must, aim, "µs"), Line(name, f"torch, {name}")]
    return [Case("4 × 4", tuple(contestants), tuple(lines), threads=(1,))]


def imports(short):
    """A whole process that imports tinylora, against one that imports numpy; one thread"""
    return [
        Case(
            "process",
            (
                ours("whole_process", code="import tinylora"),
                theirs("numpy", "whole_process", code="import numpy"),
                theirs("bare Python", "whole_process", code="pass"),
            ),
            (Line("tinylora", "numpy", {1: 1.2}, {1: 1.1}),),
            threads=(1,),
        )
    ]


# ---------------------------------------------------------------------------------------------------------------------- growth
def growth(short):
    """Time and peak memory of a QLoRA step of two layers: width 128 to 4096 at 2 × 256 tokens, context 64 to 1024 at 2,048 tokens"""
    widths, contexts = ((64,), ()) if short else ((128, 256, 512, 1024, 2048, 4096), (64, 128, 256, 512, 1024))
    shapes = [(f"d = {d}", d, 2, 16 if short else 256) for d in widths]
    shapes += [(f"context {t}", 256, 2048 // t, t) for t in contexts]
    return [
        Case(
            name,
            (
                ours("growth_step", sizes=_growing(d, tokens), batch=batch, tokens=tokens, shards=THREADS),
                theirs("sgemm", "sgemm", rows=16 if short else 512, size=64 if short else 2048),
            ),
            (),
        )
        for name, d, batch, tokens in shapes
    ]


def _growing(d, tokens):
    """Two layers of width d: heads of 64, an MLP of 8/3 d rounded up to a multiple of 64, 256 tokens."""
    return sizes(256, d, -(-8 * d // 3 // 64) * 64, 2, d // 64, d // 64, tokens)


ROWS = {
    "quantize": quantize,
    "dequantize": dequantize,
    "qlora-linear": qlora_linear,
    "llama-full": llama_full,
    "llama-lora": llama_lora,
    "llama-qlora": llama_qlora,
    "qlora-over-lora": qlora_over_lora,
    "adamw": adamw,
    "adamw8bit": adamw8bit,
    "paged-adamw": paged_adamw,
    "generate": generate,
    "op": op,
    "import": imports,
    "workers": workers,
    "growth": growth,
}
#: What a run without names measures: growth has a file and a figure of its own.
USUAL = tuple(name for name in ROWS if name != "growth")


def chosen(names):
    """The names that were given, each once, in the order of ROWS; all but growth without any. ValueError for one that does not exist."""
    if unknown := [name for name in names if name not in ROWS]:
        raise ValueError(f"there is no row {unknown[0]!r}; the rows are {', '.join(ROWS)}")
    return [name for name in ROWS if name in (names or USUAL)]


def about(name):
    """What a row measures, in one line."""
    return " ".join(ROWS[name].__doc__.split())
