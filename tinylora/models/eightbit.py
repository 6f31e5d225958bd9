"""LLM.int8 as a base (Dettmers et al. 2022): a weight in int8, the layer that multiplies by it, and both as bitsandbytes stores them.

    ŵ_ij = c_ij s_i / 127,   c = round(127 w / s),   s_i = max_j |w_ij|               8 bits a weight, and 32 for each row

`quantize_linears(model, code="int8_vectorwise")` puts Linear8bit layers into a model, and so does `Llama.from_pretrained(path,
quantize="int8_vectorwise")`. The arithmetic is in `kernels.vectorwise`. In a safetensors file, a layer at <path> is

    <path>.weight           (out, in) int8, the codes
    <path>.SCB              (out,) float32, the scales
    <path>.weight_format    () uint8, 0: the codes lie row by row, the only order that is still written

and config.json has a `quantization_config` with load_in_8bit and llm_int8_threshold. Such a folder is read by `Llama.from_pretrained` and
written by `interop.bitsandbytes.save`.

Differs from bitsandbytes: only frozen weights are held in 8 bits (its has_fp16_weights=False). A weight that float16 cannot hold is
refused; there it becomes infinite.
"""

from dataclasses import dataclass, replace

import numpy as np

from .. import nn
from ..backend import array_module, move
from ..dtypes import Stored, as_float32, dtype_name, round_to
from ..kernels import products, vectorwise
from ..tensor import primitive

CODE = "int8_vectorwise"
INTEGER_PRODUCTS = ("eval", "always", "never")
_SCALES, _FORMAT = ".SCB", ".weight_format"


@dataclass(frozen=True)
class VectorwiseInt8(Stored):
    """A weight in int8, one scale a row: plain data, made by `VectorwiseInt8.of`.   LLM.int8 §3.1.

    codes     (out, in) int8, from −127 to 127
    scales    (out,) float32: the largest |w| of each row, as float16 holds it
    dtype     logical dtype of the original weight
    """

    codes: np.ndarray
    scales: np.ndarray
    dtype: str = "float32"

    code_name = CODE
    shape = property(lambda self: self.codes.shape)
    nbytes = property(lambda self: self.codes.nbytes + self.scales.nbytes)
    held = property(lambda self: self.codes)

    @classmethod
    def of(cls, w, name="weight"):
        """Quantize w (out, in): float32, float16, ml_dtypes.bfloat16 or BFloat16Array. ValueError for what float16 does not hold."""
        w, dtype = as_float32(w)
        if w.ndim != 2 or not w.shape[1]:
            raise ValueError(f"quantize: {name} has shape {tuple(w.shape)}, expected (out, in) with in > 0")
        codes, scales, _ = vectorwise.quantize(w)
        if not array_module(w).isfinite(scales).all():
            raise ValueError(
                f"quantize: {name} holds NaN, Inf or numbers above 65,504, which no float16 holds; int8 starts from float16"
            )
        return cls(codes, scales, dtype)

    def dequantize(self, dtype=None):
        """ŵ = c s / 127, rounded once to `dtype` (default: the weight's own); bfloat16 comes in float32 storage."""
        return round_to(vectorwise.dequantized(self.codes, self.scales), dtype_name(dtype or self.dtype))

    def to(self, move):
        """The same weight with its arrays passed through `move` (see backend.move)."""
        return VectorwiseInt8(move(self.codes), move(self.scales), self.dtype)

    def like(self, w, name="weight"):
        return replace(VectorwiseInt8.of(w, name), dtype=self.dtype)


@primitive
def linear_8bit(x, w, b=None, compute_dtype="float32", threshold=0.0, integers=True):
    """y = x Ŵᵀ + b;   x̄ = ḡ Ŵ,   b̄ = Σ ḡ over rows.   x (..., in), w a VectorwiseInt8 (out, in), b (out,).

    integers        True: the product of LLM.int8 §3.2, of int8 codes and of outlier columns (`kernels.vectorwise.product`); False: Ŵ is
                    dequantized. The gradient is ḡ Ŵ in both cases, as if rounding x did nothing
    compute_dtype   "float32", or "bfloat16" or "float16": x, Ŵ, b, then y, and the gradients are rounded to it around float32 sums

    The pullbacks capture the codes and the scales, and neither Ŵ nor x.
    """
    if x.shape[-1:] != w.shape[1:]:
        raise ValueError(f"linear_8bit: x is {x.shape}, w is (out, in) = {w.shape}; x's last axis must be w's")
    lead = x.shape[:-1]

    def rounded(a):
        return products.rounded(a, compute_dtype)

    def rows(a):
        return rounded(a).reshape(-1, a.shape[-1])

    def weight():
        return rounded(vectorwise.multiplied(w.codes, w.scales))

    b = None if b is None else rounded(b)
    if integers:
        y = vectorwise.product(rows(x), w.codes, w.scales, threshold, b, rounded)
    else:
        y = rows(x) @ weight().T
        y = rounded(y if b is None else y + b)
    return y.reshape(*lead, w.shape[0]), (lambda g: rounded(rows(g) @ weight()).reshape(*lead, w.shape[1]),
                                          None,
                                          lambda g: rounded(rows(g).sum(0)))  # fmt: skip


class Linear8bit(nn.FrozenLinear):
    """y = x Ŵᵀ + b with Ŵ in int8 (LLM.int8, §3). weight is a VectorwiseInt8 of shape (out, in).

    threshold           columns of x with an entry of this size or more are multiplied in x's own precision (§3.2); 0: none
    integer_products    when x is rounded to int8 as well: "eval" (what bitsandbytes does on a CPU: not in training mode), "always" (what
                        it does on a GPU), "never" (x stays as it is, and the threshold has no effect)
    compute_dtype       "float32", "bfloat16" or "float16", of x, of the outlier columns and of y
    """

    def __init__(self, weight, bias=None, compute_dtype="float32", threshold=6.0, integer_products="eval"):
        super().__init__(weight, bias, compute_dtype)
        if not isinstance(threshold, (int, float)) or not 0 <= threshold < np.inf:
            raise ValueError(f"Linear8bit: threshold = {threshold!r}, expected a number, 0 or more")
        if integer_products not in INTEGER_PRODUCTS:
            raise ValueError(
                f"Linear8bit: integer_products {integer_products!r}, expected one of {', '.join(INTEGER_PRODUCTS)}"
            )
        self.threshold, self.integer_products = threshold, integer_products

    @classmethod
    def of(cls, linear, compute_dtype="float32", name="weight", **options):
        """Quantize the weight of a Linear (or of any layer with `dense()`); `name` appears in error messages."""
        unknown = sorted(set(options) - {"threshold", "integer_products"})
        if unknown:
            raise ValueError(f"{CODE} has no option {unknown[0]!r}: expected threshold or integer_products")
        return cls(VectorwiseInt8.of(linear.dense(), name), linear.bias, compute_dtype, **options)

    def forward(self, x):
        integers = self.integer_products == "always" or (self.integer_products == "eval" and not self.training)
        return linear_8bit(
            x, self.weight, self.bias, compute_dtype=self.compute_dtype, threshold=self.threshold, integers=integers
        )


nn.STORES[CODE] = Linear8bit.of


# ------------------------------------------------------------------------------------------------------------------------ folders
def options(config, tensors, where):
    """The threshold of such a folder's layers, as an option of Linear8bit. ValueError if its weights are not in 8 bits after all."""
    given = config["quantization_config"]
    if given.get("llm_int8_has_fp16_weight") or not names(tensors):
        raise ValueError(
            f"{where} says load_in_8bit and holds no 8-bit weight (matrices of int8, each with its {_SCALES}); expected what "
            "transformers writes without llm_int8_has_fp16_weight"
        )
    threshold = given.get("llm_int8_threshold")
    return {"threshold": 6.0 if threshold is None else threshold}


def to_tensors(name, w):
    """The tensors under which bitsandbytes stores a VectorwiseInt8 whose name is <path>.weight. {name: array}"""
    path, w = name.removesuffix(".weight"), w.to(lambda a: move(a, "cpu"))
    return {name: w.codes, path + _SCALES: w.scales, path + _FORMAT: np.zeros((), np.uint8)}


def names(tensors):
    """The names of the 8-bit weights among a file's tensors: whatever has scales, or is int8."""
    scaled = {f"{key.removesuffix(_SCALES)}.weight" for key in tensors if key.endswith(_SCALES)}
    return sorted(scaled | {key for key, a in tensors.items() if getattr(a, "dtype", None) == np.int8})


def from_tensors(name, tensors, where="the file"):
    """The VectorwiseInt8 that bitsandbytes stored under `name`; takes its tensors out of the dict. ValueError if they do not fit together.

    Its dtype is "float16", from which the codes were made; what it was before does not stand in the file.
    """
    path = name.removesuffix(".weight")
    codes, scales, order = (tensors.pop(key, None) for key in (name, path + _SCALES, path + _FORMAT))
    fault = None
    if codes is None or codes.dtype != np.int8 or codes.ndim != 2:
        fault = f"expected {name} as a matrix of int8"
    elif (codes == -128).any():
        fault = f"{name} holds −128, to which no weight is rounded"
    elif scales is None or scales.dtype != np.float32 or scales.shape != codes.shape[:1]:
        fault = f"expected {path}{_SCALES} as {len(codes)} float32, one for each row"
    elif not np.isfinite(scales).all() or (scales < 0).any():
        fault = f"{path}{_SCALES} holds a scale that is negative, Inf or NaN"
    elif order is not None and (order.shape not in ((), (1,)) or order.dtype != np.uint8):
        fault = f"expected {path}{_FORMAT} as one uint8"
    elif order is not None and order.any():
        fault = f"{path}{_FORMAT} is {int(order.max())}; only 0, row by row, is read"
    if fault:
        raise ValueError(f"{where}: the 8-bit weight {name} is incomplete or damaged ({fault})")
    return VectorwiseInt8(codes, scales, "float16")


def quantization_config(threshold=6.0, skip=("lm_head",)):
    """config.json's entry for a model of Linear8bit layers; `skip`: linear layers that stay dense."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_threshold": float(threshold),
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_skip_modules": list(skip),
    }
