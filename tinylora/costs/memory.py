"""Where the memory goes: the bytes of a training step, predicted from a Llama's sizes, and measured on one that runs.

    weights        embeddings, norms, head; for full fine-tuning and 16-bit LoRA the linear layers as well
    codes          ⌈n/2⌉ bytes for n weights in 4 bits; n for n weights in 8 bits (LLM.int8)
    constants      4 bytes for each block of B weights; double-quantized 1 byte a block, 4 for 256 of these, 4 for the mean. In 8
                   bits 4 bytes for each row
    adapters       r (d_in + d_out) numbers for each adapted matrix
    gradients      one number for each trained one
    optimizer      AdamW: two. In 8 bits: two bytes, and two float32 for 256 numbers; tensors under 4,096 stay in 32 bits
    activations    what the tape holds after the forward pass (`block_tape`: one line an operation); with checkpointing the
                   inputs of the blocks, and the tape of the one block that is being rebuilt

`predict` multiplies shapes, for any Llama. `measure` adds up arrays that exist. On a model of this package the two agree in
every row to the byte on a CPU, for full fine-tuning, LoRA (on 16 or 8 bits) and QLoRA, with and without checkpointing. (In full fine-tuning
`train.fit` reports a few bytes a token more where a batch is cut into shards: each keeps the whole batch's token ids.)

What the dtypes are is a `Precision`: ENGINE is what tinylora holds, PAPER what QLoRA counts (16-bit weights and gradients, float32
Adam: 12 bytes a parameter in full fine-tuning), MASTER the same with a float32 copy of what is trained (16 bytes).

What torch holds differs in the activations: there a fused attention keeps no probabilities, and autocast keeps copies. Not
counted: the working memory of an operation, dequantized weights (one at a time in each thread), the process itself.
The paper's own numbers, recomputed with this, are in `qlora_numbers`.
"""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from .. import data, ops
from ..backend import array_module, move, whole
from ..dtypes import BITS
from ..kernels.attention import QUERY_BLOCK
from ..models import files
from ..models.eightbit import VectorwiseInt8
from ..models.fourbit import read_config
from ..models.gguf import GGUF, is_gguf
from ..models.llama import LlamaConfig
from ..models.rope import table_length
from ..nn import is_adapter_weight
from ..optim import AdamW
from ..quant import NESTED_BLOCKSIZE, QuantizedTensor
from ..tape import tape_bytes, watch_rebuilds
from ..training.adamw8bit import BLOCKSIZE, MIN_8BIT_SIZE
from .parameters import llama_shapes
from .tables import aligned, in_units

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _llama(layers, heads, hidden, ffn):
    return LlamaConfig(32000, hidden, ffn, layers, heads, heads, 2048, 1e-6, tie_word_embeddings=False)


#: Sizes as published: Llama (Touvron et al. 2023, table 2, and the released weights' feed-forward widths), SmolLM2's config.json.
MODELS = {
    "llama-7b": _llama(32, 32, 4096, 11008),
    "llama-13b": _llama(40, 40, 5120, 13824),
    "llama-33b": _llama(60, 52, 6656, 17920),
    "llama-65b": _llama(80, 64, 8192, 22016),
    "smollm2-135m": LlamaConfig(49152, 576, 1536, 30, 9, 3, 8192, rope_theta=100000.0),
}
METHODS = ("full", "lora", "qlora", "int8")


@dataclass(frozen=True)
class Precision:
    """The dtype of each part. `linears`: frozen linear weights under LoRA; `master`: a copy of what is trained, or None."""

    weights: str = "float32"
    linears: str = "bfloat16"
    adapters: str = "float32"
    gradients: str = "float32"
    optimizer: str = "float32"
    activations: str = "float32"
    master: str | None = None

    def __post_init__(self):
        for field in fields(self):
            name = getattr(self, field.name)
            if name not in BITS and not (field.name == "master" and name is None):
                raise ValueError(f"precision: {field.name} = {name!r}, expected one of {', '.join(BITS)}")


#: What tinylora holds.
ENGINE = Precision()
#: What the QLoRA paper counts.
PAPER = Precision("bfloat16", "bfloat16", "bfloat16", "bfloat16", "float32", "bfloat16")
#: Mixed precision with a float32 copy of the trained weights.
MASTER = replace(PAPER, master="float32")
PRECISIONS = {"engine": ENGINE, "paper": PAPER, "master": MASTER}


@dataclass(frozen=True)
class Account:
    """The bytes of a training step by what they are for. `rows()` gives them with the names that are printed, `total` their sum."""

    label: str
    weights: int = 0
    codes: int = 0
    constants: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    codes8: int = 0

    def rows(self):
        """{printed name: bytes}, in order. A row for 8 bits is there only where something is held in them."""
        named = {}
        for field, name in ROWS.items():
            named[name] = getattr(self, field)
            if field == "codes" and self.codes8:
                named[EIGHT_BITS] = self.codes8
        return named

    @property
    def total(self):
        return sum(self.rows().values())


#: Account's fields and the names under which they are printed; codes8 has a row of its own where something is held in 8 bits.
ROWS = {
    "weights": "weights in 16 or 32 bits",
    "codes": "weights in 4 bits",
    "constants": "quantization constants",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations (tape)",
}
EIGHT_BITS = "weights in 8 bits"


def config_of(model):
    """The sizes of "base", of a name in MODELS, of a folder with config.json, of FILE.gguf; a config or a model's own is passed through."""
    if not isinstance(model, (str, Path)):
        return getattr(model, "config", model)
    if str(model) in MODELS:
        return MODELS[str(model)]
    folder = data.base_folder() if str(model) == "base" else Path(model)
    if is_gguf(folder):
        return LlamaConfig.from_dict(GGUF(folder).config, folder)
    files.settle(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{model}: expected 'base', one of {', '.join(MODELS)}, a folder with config.json, or FILE.gguf, whose sizes to take"
        )
    return LlamaConfig.from_dict(read_config(folder), folder / "config.json")


# ------------------------------------------------------------------------------------------------------------- numbers of weights
def parameters(config):
    """V d (1 + untied) + Σ out · in + (2 L + 1) d: embedding, head, linear layers, norms; and a Qwen's biases and norms of heads. -> int"""
    return sum(math.prod(shape) for shape in _dense_shapes(config)) + sum(o * i for o, i in llama_shapes(config))


def _dense_shapes(config):
    """Shapes of everything that is no matrix of a block: embedding, head (if untied), norms, and a Qwen's biases and norms of heads."""
    d, layers, heads = config.hidden_size, config.num_hidden_layers, 1 if config.tie_word_embeddings else 2
    own = [(out,) for out, _ in llama_shapes(config, config.biased)] + [(config.head_dim,)] * (
        2 * layers * _normed(config)
    )
    return [(config.vocab_size, d)] * heads + [(d,)] * (2 * layers + 1) + own


def _normed(config):
    """Whether each head's query and key pass a norm of their own."""
    return config.model_type == "qwen3"


def codes_bytes(size):
    """⌈n/2⌉: two 4-bit codes a byte."""
    return -(-size // 2)


def constants_bytes(size, blocksize=64, double_quant=True):
    """4 ⌈n/B⌉ bytes; double-quantized ⌈n/B⌉ + 4 ⌈n/(256 B)⌉ + 4 (QLoRA §3: .5 bits a weight become .127)."""
    blocks = -(-size // blocksize)
    return blocks + 4 * -(-blocks // NESTED_BLOCKSIZE) + 4 if double_quant else 4 * blocks


def optimizer_bytes(sizes, optimizer="adamw", precision=ENGINE):
    """Bytes of m and v (and of the master copy, if there is one) for trained tensors of these sizes.

    "adamw": 2 n numbers. "adamw8bit": 2 n bytes and 2 · 4 ⌈n/256⌉ for the blocks' absmax; n < 4096: in 32 bits (bitsandbytes' rule).
    """
    if optimizer not in ("adamw", "adamw8bit"):
        raise ValueError(f"memory: optimizer {optimizer!r} is unknown: expected 'adamw' or 'adamw8bit'")
    master = 0 if precision.master is None else _bytes_of(precision.master) * sum(sizes)
    if optimizer == "adamw":
        return 2 * _bytes_of(precision.optimizer) * sum(sizes) + master
    return sum(8 * n if n < MIN_8BIT_SIZE else 2 * n + 8 * -(-n // BLOCKSIZE) for n in sizes) + master


# ------------------------------------------------------------------------------------------------------------------- the tape
def block_tape(config, batch_size, seq_len, trained, r=None, dropout=0.0, first=False, number=4, window=None):
    """{operation: bytes} that one block's pullbacks hold, where `trained` names the matrices with a trained weight or bypass.

    r           the rank of the bypasses, or None: the weights themselves are trained, and with them the norms
    first       the first block, into which no gradient need go if the embedding is frozen
    number      bytes of a number (4 in this package)
    window      how many keys a query sees (None: all)

    n = batch_size · seq_len rows, d the width, m the MLP's, h and h_kv those of the queries and of the keys. A buffer that two pullbacks
    hold is counted at the first. The weights, which some of them hold, are counted as weights; the rotary table once a model.
    """
    b, t, d, m = batch_size, seq_len, config.hidden_size, config.intermediate_size
    heads, n = config.num_attention_heads, b * t
    h, h_kv, full = heads * config.head_dim, config.num_key_value_heads * config.head_dim, r is None

    # Which results need a gradient: what comes from a trained weight, or from something that needs one.
    x = full or not first
    q, k, v = (x or name in trained for name in ("q_proj", "k_proj", "v_proj"))
    attention = q or k or v
    after = x or attention or "o_proj" in trained  # the stream between attention and MLP
    gate, up = (after or name in trained for name in ("gate_proj", "up_proj"))

    def read(names, width, alive):
        """The input that trained matrices share; with dropout each has its own copy, and a mask."""
        count = sum(name in trained for name in names)
        if dropout and not full:
            return count * n * width * (number + alive)
        return min(count, 1) * n * width * number

    norm = n * d * number + n * number  # x and one 1/√(mean(x²) + ε) a row
    rows = n * (heads * q + config.num_key_value_heads * k) * _normed(config)  # of heads that pass a norm
    return {
        "rms_norm: x, ρ": norm * x,
        "q, k, v: x": read(("q_proj", "k_proj", "v_proj"), d, x),
        **({"rms_norm of q, k: x, ρ": rows * (config.head_dim + 1) * number} if _normed(config) else {}),
        "attention: q, k, v": (_queries(config, b, t) * h + 2 * n * h_kv) * number * attention,
        "attention: P": b * heads * _pairs(t, window) * number * attention,
        "o: x": read(("o_proj",), h, attention),
        "rms_norm 2: x, ρ": norm * after,
        "gate, up: x": read(("gate_proj", "up_proj"), d, after),
        "silu: σ, y": 2 * n * m * number * gate,
        "⊙: u": n * m * number * gate,
        "⊙: y": n * m * number * (up and not gate),  # else silu's
        "down: x": read(("down_proj",), m, gate or up),
        "bypasses: A x": 0 if full else len(trained) * n * r * number,
    }


def _pairs(t, window=None):
    """Σ n_i e_i: the scores a head computes, in blocks of n_i queries that see the keys before e_i; t²/2 + 32 t where 64 divides t.

    With a window of w a block does not compute the keys more than w − 1 before its first query.
    """
    step = QUERY_BLOCK
    blocks, rest = divmod(t, step)
    seen = step * step * blocks * (blocks + 1) // 2 + rest * t
    if window is None:
        return seen
    first = min(
        -(-max(window - 1, 0) // step), blocks
    )  # the first block that does not see the first keys, or sees them just so
    starts = step * (blocks * (blocks - 1) - first * (first - 1)) // 2  # the sum of these blocks' first queries
    return seen - step * (starts + (blocks - first) * (1 - window)) - rest * max(blocks * step + 1 - window, 0)


def _queries(config, b, t):
    """Rows of queries that are kept: each once, block by block. A last block of one grouped query is a view, which keeps all."""
    alone = config.num_attention_heads > config.num_key_value_heads and t % QUERY_BLOCK == 1
    return b * t + (b * (t - 1) if alone else 0)


def tape(config, batch_size, seq_len, trained=MATRICES, r=None, dropout=0.0, checkpointing=False, number=4):
    """{part: bytes} of the tape of one forward pass, with `block_tape`'s arguments; its sum is what `train.fit` reports.

    With checkpointing: the inputs of all blocks, and the largest block as it is rebuilt in the backward pass. That is an upper bound, as
    in `train.fit`: the rebuilt block's input and the rotary table are in both, and the loss's part is gone by then.
    """
    trained = tuple(trained)
    n, d, layers = batch_size * seq_len, config.hidden_size, config.num_hidden_layers
    options = {"r": r, "dropout": dropout, "number": number}
    held = [
        sum(block_tape(config, batch_size, seq_len, trained, first=i == 0, window=config.window(i), **options).values())
        for i in range(layers)
    ]
    full = r is None
    # Whether a rotation is on a block's tape: not in a first block whose queries and keys need no gradient.
    turned = [full or i > 0 or bool({"q_proj", "k_proj"} & set(trained)) for i in range(layers)]
    rope = 4 * config.head_dim * max(seq_len, table_length(config.max_position_embeddings, seq_len))
    if checkpointing:
        largest = max(block + rope * turns for block, turns in zip(held, turned, strict=True))
        blocks = {"inputs of blocks": layers * n * d * number, "a block, rebuilt": largest}
    else:
        blocks = {"blocks": sum(held)}
    return {
        **blocks,
        "rotary table": rope * (any(turned) or checkpointing),
        "embedding: ids": 8 * n * full,
        "last norm: x, ρ": n * (d + 1) * number,
        "head: x": n * d * number * full,
        "loss: p, weights, targets, rows": n * (config.vocab_size + 1) * number + 2 * 8 * n,
    }


# ------------------------------------------------------------------------------------------------------------------- predict
def predict(
    config,
    method="qlora",
    *,
    r=16,
    target_modules="all-linear",
    blocksize=64,
    double_quant=True,
    batch_size=1,
    seq_len=512,
    shards=1,
    checkpointing=False,
    dropout=0.0,
    optimizer="adamw",
    precision=ENGINE,
    label=None,
):
    """The Account of a training step (see the module's equations), from sizes alone. Nothing is allocated.

    config                   a LlamaConfig, or what `config_of` takes: "llama-65b", "base", a folder
    method                   "full"; "lora": linear layers frozen in 16 bits; "qlora": in 4 bits, "int8": in 8, and constants
    r, target_modules        rank of the bypasses; "all-linear", or names in MATRICES
    blocksize, double_quant  of the 4-bit weights
    batch_size, seq_len      of a micro-batch; cut into `shards` that run side by side, as train.fit does
    dropout                  0 or not: on the bypasses' inputs
    optimizer                "adamw" or "adamw8bit"
    precision                ENGINE, PAPER, MASTER or a Precision
    """
    config, trained = config_of(config), _matrices(target_modules)
    if method not in METHODS:
        raise ValueError(f"memory: method {method!r} is unknown: expected one of {', '.join(METHODS)}")
    counts = {"r": r, "blocksize": blocksize, "batch_size": batch_size, "seq_len": seq_len, "shards": shards}
    for name, value in counts.items():
        whole(f"memory: {name}", value)
    factors = [n for o, i in llama_shapes(config, trained) for n in (r * i, o * r)]  # of A, of B
    sizes = factors
    if method == "full":
        trained, r, dropout, factors = MATRICES, None, 0.0, []
        sizes = [math.prod(shape) for shape in [*_dense_shapes(config), *llama_shapes(config)]]
    rows = [batch_size // shards + (i < batch_size % shards) for i in range(min(shards, batch_size))]
    number = _bytes_of(precision.activations)
    tapes = [tape(config, n, seq_len, trained, r, dropout, checkpointing, number) for n in rows]
    return Account(
        label or method + (" + checkpointing" if checkpointing else ""),
        **_base(config, method, blocksize, double_quant, precision),
        adapters=_bytes_of(precision.adapters) * sum(factors),
        gradients=_bytes_of(precision.gradients) * sum(sizes),
        optimizer=optimizer_bytes(sizes, optimizer, precision),
        activations=sum(sum(parts.values()) for parts in tapes),
    )


def _matrices(target_modules):
    """The names of the matrices that are trained or have a bypass."""
    if target_modules == "all-linear":
        return MATRICES
    if isinstance(target_modules, str):
        raise ValueError(f"memory: target_modules = {target_modules!r}, expected 'all-linear' or a list of names")
    names = tuple(dict.fromkeys(target_modules))
    if not names:
        raise ValueError(f"memory: target_modules is empty; a Llama's matrices are {', '.join(MATRICES)}")
    return names


def _bytes_of(dtype):
    return BITS[dtype] // 8


def _base(config, method, blocksize, double_quant, precision):
    """{"weights", "codes", …}: the bytes of the base model, whose linear layers "qlora" holds in 4 bits and "int8" in 8."""
    shapes = llama_shapes(config)
    linears = [o * i for o, i in shapes]
    dense = _bytes_of(precision.weights) * sum(math.prod(shape) for shape in _dense_shapes(config))
    if method == "qlora":
        constants = sum(constants_bytes(n, blocksize, double_quant) for n in linears)
        return {"weights": dense, "codes": sum(map(codes_bytes, linears)), "constants": constants}
    if method == "int8":
        return {"weights": dense, "codes8": sum(linears), "constants": sum(4 * o for o, _ in shapes)}
    kept_as = precision.weights if method == "full" else precision.linears
    return {"weights": dense + _bytes_of(kept_as) * sum(linears)}


# ------------------------------------------------------------------------------------------------------------------- measure
def measure(model, batch, optimizer=None, label="measured"):
    """The Account of a step that is really run: the bytes of the arrays that hold it. No weight and no .grad changes (dropout draws).

    batch        (inputs, targets, mask) as `corpus.Text.batch` gives them: integer arrays (b, t), and 0 or 1; the mask may be None
    optimizer    whatever has `state_bytes` and was made for this model's trained parameters; a new AdamW by default

    An adapter that trains some parameters whole (modules_to_save) has these counted among the weights. A parameter counts as an
    adapter's if its name says so (`nn.is_adapter_weight`); in the layers of `variants`, these are the names that begin with lora_.
    """
    trained, weights = model.trainable(), dict(model.named_weights())
    if not trained:
        raise ValueError("memory: no parameter requires a gradient, so there is no training step to measure")
    activations, gradients = _step(model, batch, weights.values())
    optimizer = AdamW(trained) if optimizer is None else optimizer
    four, eight = ([w for w in weights.values() if isinstance(w, kind)] for kind in (QuantizedTensor, VectorwiseInt8))
    adapters = [w for name, w in weights.items() if is_adapter_weight(name)]
    return Account(
        label,
        weights=_sum_bytes(weights.values()) - _sum_bytes([*four, *eight]) - _sum_bytes(adapters),
        codes=_sum_bytes(w.packed for w in four),
        codes8=_sum_bytes(w.codes for w in eight),
        constants=_sum_bytes([*(w.constants for w in four), *(w.scales for w in eight)]),
        adapters=_sum_bytes(adapters),
        gradients=_sum_bytes(gradients.values()),
        optimizer=optimizer.state_bytes,
        activations=activations,
    )


def _step(model, batch, weights):
    """(bytes of the tape at its largest, {parameter: gradient}) of one forward and backward pass."""
    inputs, targets, mask = (None if a is None else a.copy() for a in batch)  # a view would keep what it was cut from
    rebuilt, gradients = [0], {}
    logits = model(inputs)
    targets, mask = (None if a is None else move(a, array_module(logits.data)) for a in (targets, mask))
    loss = ops.softmax_cross_entropy(logits, targets, mask)
    held = tape_bytes(loss, exclude=weights)
    with watch_rebuilds(lambda y: rebuilt.append(tape_bytes(y, exclude=weights))):
        loss.backward(into=gradients)
    return held + max(rebuilt), gradients


def _sum_bytes(arrays):
    return sum(a.nbytes for a in arrays)


def describe(accounts):
    """The accounts side by side, as text: a row for each part, bytes, and a last row in GB, MB or kB."""
    accounts = list(accounts)
    table = [("", *(a.label for a in accounts))]
    names = max((list(a.rows()) for a in accounts), key=len)
    table += [(name, *(f"{a.rows().get(name, 0):,}" for a in accounts)) for name in names]
    table += [("total, bytes", *(f"{a.total:,}" for a in accounts)), ("total", *(in_units(a.total) for a in accounts))]
    return aligned(table)


def describe_agreement(predicted, measured):
    """Predicted beside measured, row by row, with the difference in per cent."""
    table = [("", "predicted", "measured", "difference")]
    pairs = {name: (n, measured.rows()[name]) for name, n in predicted.rows().items()}
    for name, (p, m) in {**pairs, "total": (predicted.total, measured.total)}.items():
        table.append((name, f"{p:,}", f"{m:,}", _difference(p, m)))
    return aligned(table)


def _difference(predicted, measured):
    if predicted == measured:
        return "0"
    return f"{100 * (predicted / measured - 1) if measured else math.inf:+.4f} %"
