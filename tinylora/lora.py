"""LoRA: a frozen layer and a low-rank bypass around it.

    h = W₀ x + s B A x,     s = α/r,     A (r × in) random,  B (out × r) = 0                      (LoRA eq. 3 and §4.1)

B starts at zero, so an adapted layer computes what its base computes, bit for bit, until the first step; at that step B
has a gradient and A has none (∂L/∂A = s Bᵀ G). QLoRA is the same bypass around a 4-bit layer (QLoRA eq. 5; the s that
eq. 3 has and eq. 5 lacks is applied, as in the authors' code).

Two later changes live here because they change the bypass itself:

    rsLoRA    s = α/√r                                                                          (Kalajdzievski 2023)
    DoRA      h = m ⊙ (W₀ + s B A) x / ‖W₀ + s B A‖,  the norm of each output's row held constant (Liu et al. 2024, eq. 5, §4.3)

A layer holds any number of named bypasses around one base; those that are active add up. LoRALinear wraps dense, 16-bit
and 4-bit linear layers, LoRAEmbedding embeddings (where A is zero and B random: an embedding's gradient reaches A only
through B), LoRAConv convolutions. What is done to a whole model (adding, switching, combining, merging) is in `adapters`.

Compared with PEFT: the factors have the same names and shapes, and the scale is applied last; merging makes a new layer
and leaves W₀ alone, since float32 subtraction would not restore it; the norm of DoRA always belongs to the base, also
where another adapter is active beside it. Compared with loralib: eval() changes no weight (see interop.loralib).
"""

import math

import numpy as np

from . import backend, ops
from .backend import array_module
from .conv import Conv1d, Conv2d, Conv3d
from .dtypes import BFloat16Array
from .nn import Embedding, Linear, Linear4bit, Linear16bit, Module, normal, stored_array, uniform
from .quant import QuantizedTensor, quantize_like
from .tensor import Tensor

INITS = ("kaiming", "gaussian")


class Bypass(Module):
    """s B(A(x)) beside one base layer: two factors, a scale, and a magnitude if it is DoRA's.

    lora_A, lora_B    hold `weight`; their shapes depend on the base (see the subclasses)
    scaling           s = α/r, with use_rslora α/√r
    magnitude         None, or m (out,): DoRA's, which starts as ‖W₀ + s B A‖
    lora_bias         True: B has a bias (out,), which the scale multiplies too, as PEFT's forward does
    started_by        "", or the method of `variants` that moved a part of the base's weight into the factors
    """

    started_by = ""

    def __init__(
        self, base, r=8, alpha=16, dropout=0.0, init="kaiming", use_rslora=False, use_dora=False, lora_bias=False
    ):
        if isinstance(r, bool) or not isinstance(r, (int, np.integer)) or r < 1:
            raise ValueError(f"lora: r = {r!r}, expected a whole number, 1 or more")
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"lora: dropout = {dropout}, expected 0 <= dropout < 1")
        if init not in INITS:
            raise ValueError(f"lora: init {init!r} is unknown: expected 'kaiming' or 'gaussian'")
        if use_dora and lora_bias:
            raise ValueError("lora: use_dora and lora_bias do not go together (nor do they in PEFT)")
        self.r, self.alpha, self.dropout = int(r), alpha, dropout
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.build(base, init, lora_bias)
        for factor in (self.lora_A, self.lora_B):
            xp = array_module(stored_array(base.weight))
            factor.weight = Tensor(backend.move(factor.weight.data, xp), requires_grad=True)
            if factor.bias is not None:
                factor.bias = Tensor(backend.move(factor.bias.data, xp), requires_grad=True)
        self.magnitude = Tensor(self.norm(base), requires_grad=True) if use_dora else None

    # These say what a bypass is for one kind of base.
    def build(self, base, init, lora_bias):
        """Set lora_A and lora_B (a module with `weight` and `bias` each), drawn from the current generator."""
        raise NotImplementedError

    def through(self, x, base):
        """B(A(x)), not yet scaled."""
        raise NotImplementedError

    def factors(self):
        """(B, A) as matrices (outputs × r) and (r × inputs), views of the arrays."""
        return self.lora_B.weight.data, self.lora_A.weight.data

    def like_weight(self, matrix, base):
        """A matrix (outputs × inputs) in the shape of the base's weight."""
        return matrix

    def row(self, vector, y):
        """A vector over the outputs, shaped to multiply y."""
        return vector

    # The rest holds for every kind.
    def delta(self, base):
        """ΔW = s B A as an array of the base weight's shape. LoRA §4.1."""
        b, a = self.factors()
        return self.like_weight(b @ a, base) * self.scaling

    def norm(self, base):
        """‖W₀ + s B A‖ (out,): for each output over all its weights."""
        w = base.dense() + self.delta(base)
        w = w.T if isinstance(base, Embedding) else w.reshape(len(w), -1)
        return array_module(w).sqrt((w * w).sum(axis=1))

    def weight(self, base):
        """W₀ + ΔW, for DoRA m (W₀ + ΔW)/‖W₀ + ΔW‖: the weight that this bypass makes of its base's."""
        w = base.dense() + self.delta(base)
        if self.magnitude is None:
            return w
        factor = self.magnitude.data / self.norm(base)
        return w * (factor if isinstance(base, Embedding) else factor.reshape(-1, *[1] * (w.ndim - 1)))

    def forward(self, x, base, base_output):
        """What is added to the base's output: s B A x, or for DoRA (m/‖·‖ − 1) W₀x + (m/‖·‖) s B A x."""
        dropped = ops.dropout(x, self.dropout) if self.training and not isinstance(base, Embedding) else x
        low = self.through(dropped, base) * self.scaling
        if self.magnitude is None:
            return low
        plain = base_output if dropped is x else base(dropped)
        if getattr(base, "bias", None) is not None:
            plain = plain - self.row(base.bias, plain)
        factor = self.row(self.magnitude / self.norm(base), plain)  # the norm is an array: no gradient, DoRA §4.3
        return (factor - 1.0) * plain + factor * low


class LinearBypass(Bypass):
    """A (r, in), B (out, r). init "kaiming": A ~ U(−1/√in, 1/√in), which loralib and PEFT use; "gaussian": N(0, 1/r²)."""

    def build(self, base, init, lora_bias):
        r, n = self.r, base.in_features
        self.lora_A, self.lora_B = Linear(n, r), Linear(r, base.out_features, bias=lora_bias)
        self.lora_A.weight.data = uniform((r, n), 1 / math.sqrt(n)) if init == "kaiming" else normal((r, n), 1 / r)
        self.lora_B.weight.data = np.zeros((base.out_features, r), np.float32)

    def through(self, x, base):
        return self.lora_B(self.lora_A(x))


class _Factor(Module):
    """One factor of an embedding's or a convolution's bypass: a weight that the bypass itself applies."""

    def __init__(self, weight, bias=None):
        self.weight = Tensor(weight, requires_grad=True)
        self.bias = None if bias is None else Tensor(bias, requires_grad=True)


class EmbeddingBypass(Bypass):
    """W[ids] + s A[:, ids]ᵀ Bᵀ: A (r, vocabulary) of zeros, B (d, r) ~ N(0, 1). The other way round than for a linear layer."""

    def build(self, base, init, lora_bias):
        if lora_bias:
            raise ValueError("lora: lora_bias is for linear layers and convolutions, not for an embedding")
        n, d = base.weight.shape
        self.lora_A, self.lora_B = _Factor(np.zeros((self.r, n), np.float32)), _Factor(normal((d, self.r), 1.0))

    def through(self, ids, base):
        return ops.linear(ops.embedding(ids, self.lora_A.weight.T), self.lora_B.weight)

    def like_weight(self, matrix, base):
        return matrix.T


class ConvBypass(Bypass):
    """A (r, in, *kernel): the base's own kernel, stride and padding with r outputs; B (out, r/groups, 1, …) mixes them.

    As PEFT has it, except that A has the base's dilation too (PEFT leaves it out, and then fails on the shapes). A reads
    all input channels even where the base is grouped, so a grouped base cannot be merged into.
    """

    def build(self, base, init, lora_bias):
        out, kernel, g = base.weight.shape[0], base.weight.shape[2:], base.groups
        if self.r % g:
            raise ValueError(f"lora: r = {self.r} must be a multiple of the convolution's groups = {g}")
        shape, ones = (self.r, base.in_channels, *kernel), (1,) * len(kernel)
        n = math.prod(shape[1:])
        self.lora_A = _Factor(uniform(shape, 1 / math.sqrt(n)) if init == "kaiming" else normal(shape, 1 / self.r))
        self.lora_B = _Factor(
            np.zeros((out, self.r // g, *ones), np.float32), np.zeros(out, np.float32) if lora_bias else None
        )

    def through(self, x, base):
        h = ops.conv(x, self.lora_A.weight, stride=base.stride, padding=base.padding, dilation=base.dilation)
        h = ops.conv(h, self.lora_B.weight, groups=base.groups)
        return h if self.lora_B.bias is None else h + self.row(self.lora_B.bias, h)

    def factors(self):
        a, b = self.lora_A.weight.data, self.lora_B.weight.data
        return b.reshape(len(b), -1), a.reshape(len(a), -1)

    def like_weight(self, matrix, base):
        return matrix.reshape(base.weight.shape)

    def delta(self, base):
        if base.groups > 1:
            raise ValueError(
                f"lora: this bypass reads all channels and its convolution has {base.groups} groups, "
                "so B A has no place in its weight: it can be run but not merged (nor can PEFT's)"
            )
        return super().delta(base)

    def row(self, vector, y):
        return vector.reshape(-1, *[1] * (y.ndim - 2))


class LoRALayer(Module):
    """h = base(x) + Σ over active bypasses of s B(A(dropout(x))).   LoRA eq. 3; scale last, as PEFT computes it.

    base_layer   the wrapped layer, frozen here
    bypasses     {name: Bypass}; the constructor makes one, called "default"
    active       the names that take part, in order
    rows         None, or one adapter's name (or "__base__") for each row of a batch: see `adapters.adapter_rows`

    `lora_A`, `lora_B`, `r`, `alpha`, `scaling`, `dropout` are those of the active bypass, if it is one.
    """

    rows = None
    kind = None  # the class of bypass that a subclass makes

    def __init__(self, base, *args, name="default", bypass=None, **kwargs):
        """The arguments after `base` are Bypass's (r, alpha, dropout, init, …); or give one that is made already."""
        made = self.kind(base, *args, **kwargs) if bypass is None else bypass
        self.base_layer, self.bypasses, self.active = base.requires_grad_(False), {name: made}, (name,)

    def _only(self, what):
        if len(self.active) != 1:
            raise AttributeError(f"{what}: {len(self.active)} adapters are active here; take it from .bypasses[name]")
        return getattr(self.bypasses[self.active[0]], what)

    lora_A = property(lambda self: self._only("lora_A"))
    lora_B = property(lambda self: self._only("lora_B"))
    r = property(lambda self: self._only("r"))
    alpha = property(lambda self: self._only("alpha"))
    scaling = property(lambda self: self._only("scaling"))
    dropout = property(lambda self: self._only("dropout"))
    magnitude = property(lambda self: self._only("magnitude"))
    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: getattr(self.base_layer, "bias", None))

    def forward(self, x):
        base = self.base_layer
        y = plain = base(x)
        if self.rows is not None:
            return self._by_rows(x, plain)
        for name in self.active:
            y = y + self.bypasses[name](x, base, plain)
        return y

    def _by_rows(self, x, y):
        """Row i of the batch through the adapter rows[i]: one product with the base, one small one an adapter."""
        if len(self.rows) != len(x):
            raise ValueError(f"lora: {len(self.rows)} adapter names for a batch of {len(x)} rows")
        parts, order = [], []
        for name in dict.fromkeys(self.rows):
            mine = [i for i, n in enumerate(self.rows) if n == name]
            order += mine
            mine = array_module(y.data).asarray(mine)
            part = y[mine]
            if name in self.bypasses:
                part = part + self.bypasses[name](x[mine], self.base_layer, part)
            parts.append(part)
        return ops.concatenate(parts)[array_module(y.data).asarray(np.argsort(order))]

    def delta(self):
        """Σ s B A over the active bypasses, as an array of the base weight's shape. (DoRA's rescaling is not in it: see `merged`.)"""
        return sum(self.bypasses[name].delta(self.base_layer) for name in self.active)

    def merged(self, names=None):
        """W: the base's weight with the named (else the active) bypasses in it. LoRA §4.1; for DoRA eq. 5."""
        names = self.active if names is None else names
        bypasses, base = [self.bypasses[n] for n in names if n in self.bypasses], self.base_layer
        if len(bypasses) == 1:
            return bypasses[0].weight(base)
        w0 = base.dense()
        return w0 + sum(b.weight(base) - w0 if b.magnitude is not None else b.delta(base) for b in bypasses)

    def merge(self, names=None):
        """A new layer of the base's kind with W = W₀ + s B A; the base and the factors stay as they are.

        names   which bypasses (the active ones)
        A 4-bit base is dequantized, added to and quantized again with the same settings. What that costs is on the new
        layer: `merge_error` = ‖Ŵ − (W₀ + ΔW)‖ / ‖W₀ + ΔW‖ (Frobenius). A weight changes only where ΔW carries it over half a gap
        of the code: a small ΔW is lost nearly whole (notebook 03). The bias of B goes into the layer's bias times s,
        which is what the forward computes (PEFT's merge into 4 and 8 bits forgets the s).
        """
        names = self.active if names is None else names
        if not any(n in self.bypasses for n in names):
            return self.base_layer
        return with_weight(self.base_layer, self.merged(names), self._merged_bias(names))

    def _merged_bias(self, names):
        bias = self.bias
        for bypass in (self.bypasses[n] for n in names if n in self.bypasses):
            if bypass.lora_B.bias is not None:
                extra = bypass.lora_B.bias.data * bypass.scaling
                bias = Tensor(extra if bias is None else bias.data + extra)
        return bias


def with_weight(base, wanted, bias):
    """A frozen layer of the base's kind, rounded as the base was, with another weight and bias; it knows its `merge_error`."""
    old = base.weight
    if isinstance(old, QuantizedTensor):
        layer = Linear4bit(quantize_like(wanted, old), bias, base.compute_dtype)
    elif isinstance(old, BFloat16Array):
        layer = Linear16bit(BFloat16Array.of(wanted), bias, base.compute_dtype)
    else:
        layer = object.__new__(type(base))
        vars(layer).update(vars(base))
        layer.weight = Tensor(wanted)
        if hasattr(base, "bias"):
            layer.bias = bias
    difference = layer.dense() - wanted
    size = max(float((wanted * wanted).sum()), 1e-30)
    layer.merge_error = math.sqrt(float((difference * difference).sum()) / size)
    return layer


class LoRALinear(LoRALayer):
    """h = base(x) + s B(A(dropout(x))), s = α/r, around a Linear, Linear4bit or Linear16bit. See LoRALayer and LinearBypass."""

    kind = LinearBypass
    in_features = property(lambda self: self.base_layer.in_features)
    out_features = property(lambda self: self.base_layer.out_features)


class LoRAEmbedding(LoRALayer):
    """h = W[ids] + s (A[:, ids])ᵀ Bᵀ around an Embedding. See LoRALayer and EmbeddingBypass."""

    kind = EmbeddingBypass


class LoRAConv(LoRALayer):
    """h = conv(x, W₀) + s conv₁(conv(x, A), B) around a Conv1d, Conv2d or Conv3d. See LoRALayer and ConvBypass."""

    kind = ConvBypass


#: Which layers can be adapted, by what, and how: (base classes, LoRALayer, Bypass).
KINDS = (
    ((Linear, Linear4bit, Linear16bit), LoRALinear, LinearBypass),
    ((Embedding,), LoRAEmbedding, EmbeddingBypass),
    ((Conv1d, Conv2d, Conv3d), LoRAConv, ConvBypass),
)
LINEAR, ADAPTABLE = KINDS[0][0], tuple(base for kind in KINDS for base in kind[0])


def bypass_for(base):
    """The class of bypass that fits a base layer."""
    for bases, _, bypass in KINDS:
        if isinstance(base, bases):
            return bypass
    raise TypeError(
        f"lora: a {type(base).__name__} cannot be adapted; expected a linear layer, an embedding or a convolution"
    )


def lora_layer(base, *args, **kwargs):
    """The LoRALinear, LoRAEmbedding or LoRAConv around a base layer, with LoRALayer's arguments."""
    wrapper = next((wrapper for bases, wrapper, _ in KINDS if isinstance(base, bases)), None)
    if wrapper is None:
        raise TypeError(
            f"lora: a {type(base).__name__} cannot be adapted; expected a linear layer, an embedding or a convolution"
        )
    return wrapper(base, *args, **kwargs)


# fmt: off
__all__ = ["Bypass", "LoRALayer", "LoRALinear", "LoRAEmbedding", "LoRAConv", "ADAPTABLE", "LINEAR", "INITS", "bypass_for", "lora_layer",
           "with_weight"]
# fmt: on
