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


# -------------------------------------------------------------------------------------------------------------------- counting
def count_parameters(model):
    """(trainable, all): packed 4-bit weights count as the weights they stand for."""
    weights = [w for _, w in model.named_weights()]
    return sum(w.size for w in weights if isinstance(w, Tensor) and w.requires_grad), sum(w.size for w in weights)


def trainable_parameters(model):
    """The line that PEFT prints: trainable params: … || all params: … || trainable%: …

    With modules_to_save PEFT counts the original and the copy; here what stands in the model is counted, once.
    """
    trainable, total = count_parameters(model)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"


def print_trainable_parameters(model):
    """Print `trainable_parameters(model)`."""
    print(trainable_parameters(model))
