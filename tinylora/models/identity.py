"""Which base a model is, told by a sample of its weights, and how its linear layers are held.

An adapter means something on the base that it was trained on, and to the last digit only where that base is held as it was then (its
code, its block size). `identity` describes a base in a few thousand bytes, which `interop.peft` writes beside the adapter:

    dense    of all that no form of a base holds in few bits (embedding, norms, biases, a head of its own): SHA-256 of up to 4096 numbers
             of each parameter, rounded to bfloat16; and once more, rounded to float16 before. A base and its copies in 32 or 16 bits
             share at least one of the two (a copy in float16 and one in bfloat16 need not, and one in 8 bits shares none)
    linear   the same for linear layers that are held in 16 or 32 bits
    codes    of linear layers in 4 or 8 bits: a sample of about 4096 of the numbers that are stored, in hexadecimal
    held     how these are held: the options that nn.quantized_linear takes, such as code and blocksize; None in 32 bits

`difference` compares such a description with a model. Codes need not all be equal: read from a bfloat16 copy of its file, a base in 4
or 8 bits has a few other codes (0.1 to 0.2 % of their mean size), and a merged or fine-tuned one has more.

Leaves out: a proof. A base that differs in a few numbers only can pass for the same.
"""

import hashlib
import math
import os

import numpy as np

from .. import codebooks
from ..backend import array_module, move
from ..dtypes import BFloat16Array, Stored
from ..nn import STORES, Linear, quantized_linear
from ..quant import RULES, QuantizedTensor
from ..tensor import Tensor
from . import fields
from .eightbit import CODE, INTEGER_PRODUCTS
from .fields import either, flag, number, one_of, optional, several, text, whole

ROUNDING = (
    0.005  # mean |difference| of codes / mean |code|, up to which two bases differ by the rounding of their files alone
)
_SAMPLE = 4096


def _may_be_path(name):
    try:
        return type(name) is str and len(name) <= 10_000 and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


NAME = fields.Kind("a name or a path", _may_be_path)  # what a base was called: a folder, a file, a name on a hub
#: What a description holds, and the options of nn.quantized_linear in its `held`.
FIELDS = {
    "base": optional(NAME),
    "dense": several(text(64), 16),
    "linear": optional(several(text(64), 16)),
    "codes": optional(text(1 << 20)),
    "held": optional(fields.fields({})),
}
HELD = {
    "code": either(one_of(*codebooks.NAMED, *STORES, "mixed"), several(number(), 16)),
    "blocksize": whole(1),
    "double_quant": flag(),
    "signed": flag(),
    "rule": one_of(*RULES),
    "nested_code": one_of(*codebooks.NESTED),
    "dtype": one_of("float32", "bfloat16"),
    "compute_dtype": one_of("float32", "bfloat16", "float16"),
    "threshold": number(0),
    "integer_products": one_of(*INTEGER_PRODUCTS),
    "skip": several(text()),
}
_IN_4_BITS = ("blocksize", "double_quant", "signed", "rule", "nested_code", "dtype")
_IN_8_BITS = ("threshold", "integer_products")
_DEFAULTS = {"rule": "bitsandbytes-cpu", "signed": False, "nested_code": "dynamic8"}


def identity(weights, linears):
    """The description of a base, as JSON holds it.

    weights   {path: Tensor or Stored weight}, all that the base holds itself
    linears   {path: layer} of those of its linear layers that quantize_linears would store in few bits
    """
    held = holding(weights, linears)
    few, dense = _parts(weights, linears, held)
    codes = _all_codes(few, held)
    return {
        "dense": _digests(_own(weights, linears)),
        "linear": _linear_digests(dense),
        "codes": None if codes is None else codes.tobytes().hex(),
        "held": held,
    }


def check(about):
    """ValueError if JSON is no description of a base, or one of a way to hold it that does not exist."""
    fields.check(about, FIELDS, "the description", required=("dense", "linear", "codes", "held"))
    held = about["held"] or {}
    code = fields.check(held, HELD, "held", required=("code",) if about["held"] is not None else ()).get("code")
    few = code not in (None, "bfloat16", "mixed")  # the values of a 4-bit code, or those of 8 bits as they are
    values = codebooks.get(code)[1] if few and code != CODE else ()
    fits = {"code", "compute_dtype", "skip", *(_IN_4_BITS if len(values) else _IN_8_BITS if few else ())}
    if unknown := sorted(held.keys() - fits):
        raise ValueError(f"held.{unknown[0]} is no option of the code {fields.shown(code)}")
    if len(values) and "blocksize" not in held:
        raise ValueError(f"held.blocksize is missing beside the code {fields.shown(code)}")
    if about["codes"] is not None:
        codes = np.frombuffer(bytes.fromhex(about["codes"]), np.uint8)
        if not few or (len(values) and codes.max(initial=0) >= len(values)):
            raise ValueError(f"codes holds numbers that the code {fields.shown(code)} does not have")


def difference(then, weights, linears):
    """How the base that `then` describes differs from this one: "", "base" (another one), "held" (the same, held otherwise) or
    "rounding" (the same, from a file of another precision)."""
    if not set(then["dense"]) & set(_digests(_own(weights, linears))):
        return "base"
    held = holding(weights, linears)
    few, dense = _parts(weights, linears, then["held"])
    linear = _linear_digests(dense)
    if linear and then["linear"] and not set(then["linear"]) & set(linear):
        return "base"
    codes = _all_codes(few, then["held"])
    if then["codes"] is not None and codes is not None:
        a, b = (_values(c, then["held"]) for c in (np.frombuffer(bytes.fromhex(then["codes"]), np.uint8), codes))
        if a.shape != b.shape or np.abs(a - b).mean() > ROUNDING * np.abs(a).mean():
            return "base"
        if (a != b).any() and same_holding(then["held"], held):
            return "rounding"
    return "" if same_holding(then["held"], held) else "held"


def same_holding(a, b):
    """Whether two ways to hold a base are one: 16 and 32 bits are, and the precision of the products does not count."""
    a, b = (
        {k: v for k, v in (held or {"code": None}).items() if k not in ("compute_dtype", "dtype")} for held in (a, b)
    )
    return a == b or all(held["code"] in (None, "bfloat16") for held in (a, b))


def holding(weights, linears):
    """How linear layers are held: the options of nn.quantized_linear that would make them so; None if they are dense.

    `skip` lists those that are dense beside others, `dtype` is there if the weights were bfloat16 before, and the code is "mixed"
    where no such options exist.
    """
    stored = {path: weights[f"{path}.weight"] for path in linears}
    found = {path: _settings(linears[path], w) for path, w in stored.items() if isinstance(w, Stored)}
    if not found:
        return None
    held = next(iter(found.values()))
    if any(settings != held for settings in found.values()):
        return {"code": "mixed"}
    left = sorted(linears.keys() - found.keys())
    return {**held, "skip": [*left, "lm_head"]} if left else held


def opening(held):
    """The options with which Llama.from_pretrained holds a base so."""
    if held is None:
        return {}
    if held["code"] == "mixed":
        raise ValueError("the base was held in several codes; choose one")
    return {"dtype": held.get("dtype", "float32"), "quantize": {k: v for k, v in held.items() if k != "dtype"}}


def described(held):
    """A way to hold a base, in words."""
    if held is None:
        return "float32"
    if "blocksize" not in held:
        return held["code"]
    code = held["code"] if isinstance(held["code"], str) else "a code of its own"
    return f"{code} (blocks of {held['blocksize']}{', double quantization' if held.get('double_quant') else ''})"


def equal_but_for_rounding(a, b):
    """Whether two arrays are equal, or would be in bfloat16 or float16."""
    if a.shape != b.shape:
        return False
    return any(np.array_equal(x, y) for x, y in zip(_rounded(a), _rounded(b), strict=True))


# ------------------------------------------------------------------------------------------------------------------ in parts
def _settings(layer, w):
    """The options of nn.quantized_linear for a weight w and the layer that multiplies by it."""
    held = {"code": "bfloat16" if isinstance(w, BFloat16Array) else w.code_name}
    if held["code"] == "custom":
        held["code"] = [float(c) for c in move(w.code, "cpu")]
    for owner, names in (
        (w, ("blocksize", "double_quant", "rule", "signed")),
        (layer, ("compute_dtype", "threshold", "integer_products")),
    ):
        held |= {name: getattr(owner, name) for name in names if hasattr(owner, name)}
    if held.get("double_quant"):
        second = move(w.constants.code, "cpu")
        known = [name for name in codebooks.NESTED if np.array_equal(codebooks.get_nested(name), second)]
        held["nested_code"] = known[0] if known else "dynamic8"
    if isinstance(w, QuantizedTensor) and w.dtype == "bfloat16":
        held["dtype"] = "bfloat16"
    return {name: value for name, value in held.items() if _DEFAULTS.get(name) != value}


def _few(weight):
    return isinstance(weight, Stored) and not isinstance(weight, BFloat16Array)


def _parts(weights, linears, held):
    """{path: weight} of the linear layers that are in few bits where a base is held so, and of those in 16 or 32."""
    linear, skip = {path: weights[f"{path}.weight"] for path in linears}, (held or {}).get("skip", ())
    if held is None or held["code"] in ("bfloat16", "mixed"):
        return {}, linear
    return {p: w for p, w in linear.items() if p not in skip}, {p: w for p, w in linear.items() if p in skip}


def _own(weights, linears):
    """What every form of a base holds in 16 or 32 bits. A head that equals the embedding is left out: it may be tied, or not."""
    inner = {f"{path}.weight" for path in linears}
    own = {path: w for path, w in weights.items() if path not in inner and not _few(w)}
    head, embedding = own.get("lm_head.weight"), own.get("model.embed_tokens.weight")
    both = head is not None and embedding is not None and head.shape == embedding.shape
    if both and np.array_equal(_sample(head), _sample(embedding)):
        del own["lm_head.weight"]
    return own


def _sample(weight):
    """Up to about 4096 numbers of a weight in 16 or 32 bits, evenly spaced, as float32 on the host."""
    array = weight.bits if isinstance(weight, BFloat16Array) else weight.data
    step = max(array.size // _SAMPLE, 1) | 1  # odd: not always the same columns
    part = move(array.reshape(-1)[::step], "cpu")
    return (
        BFloat16Array(part).dequantize("float32") if isinstance(weight, BFloat16Array) else np.asarray(part, np.float32)
    )


def _rounded(array):
    """The bits of an array in bfloat16, and in bfloat16 after float16."""
    with np.errstate(all="ignore"):
        return tuple(BFloat16Array.of(a).bits for a in (array, array.astype(np.float16).astype(np.float32)))


def _digests(weights):
    """The two hashes of {path: weight in 16 or 32 bits}."""
    hashes = hashlib.sha256(), hashlib.sha256()
    for path in sorted(weights):
        for digest, bits in zip(hashes, _rounded(_sample(weights[path])), strict=True):
            digest.update(f"{path} {tuple(weights[path].shape)} ".encode())
            digest.update(bits.astype("<u2").tobytes())
    return [digest.hexdigest()[:16] for digest in hashes]


def _linear_digests(weights):
    """The two hashes of linear layers in 16 or 32 bits; None if one is in fewer."""
    return None if any(map(_few, weights.values())) else _digests(weights)


def _all_codes(weights, held):
    """The sample of all weights' codes (uint8), were they held so; None if there are none, or if they are in other few bits."""
    parts = [_codes(weights[path], held, len(weights)) for path in sorted(weights)]
    return np.concatenate(parts) if parts and all(part is not None for part in parts) else None


def _codes(w, held, n):
    """A sample of a weight's codes: of k blocks, k codes each, n weights sharing the whole sample. A block of 8 bits is a row."""
    size = math.prod(w.shape)
    length = min(held.get("blocksize", w.shape[-1]), size)
    k = max(math.isqrt(_SAMPLE // n), 4)
    starts, inner = (np.arange(min(k, m)) * m // min(k, m) for m in (size // length, length))
    if not _few(w):
        w, starts = _quantized(w, held, starts[:, None] * length + np.arange(length)), np.arange(len(starts))
    elif not _same_codes(w, held):
        return None
    return _at(w, (starts[:, None] * length + inner).reshape(-1))


def _same_codes(w, held):
    """Whether the codes of a weight in few bits can be compared with those of weights that are held so."""
    mine = _settings(None, w)
    return all(mine.get(name) == held.get(name) for name in ("code", "blocksize", "signed", "rule"))


def _quantized(w, held, places):
    """What the numbers at these places of a weight in 16 or 32 bits, a row for each block, become where they are held so."""
    bf16 = isinstance(w, BFloat16Array)
    blocks = _picked(w.bits if bf16 else w.data, places)
    blocks = BFloat16Array(blocks).dequantize("float32") if bf16 else blocks.astype(np.float32)
    options = {k: v for k, v in held.items() if k in ("code", "signed", "rule")}
    size = {"blocksize": places.shape[1]} if "blocksize" in held else {}
    return quantized_linear("sample", Linear.of(Tensor(blocks)), double_quant=False, **options, **size).weight


def _at(w, places):
    """The codes at these places of a flattened weight in few bits, one uint8 each."""
    if isinstance(w, QuantizedTensor):
        both = _picked(w.packed, places >> 1)
        return np.where(places % 2, both & 15, both >> 4).astype(np.uint8)
    return _picked(w.codes, places).view(np.uint8)


def _picked(array, places):
    """The numbers at these places of a flattened array, on the host."""
    return move(array.reshape(-1)[array_module(array).asarray(places)], "cpu")


def _values(codes, held):
    """What codes stand for, up to their blocks' scale."""
    return codebooks.get(held["code"])[1][codes] if "blocksize" in held else codes.view(np.int8).astype(np.float32)
