"""LoRA: a frozen linear layer, and a trained low-rank path beside it, the bypass.

    h = W₀ x + s B A x,     s = α/r                                                     (LoRA eq. 3 and §4.1)

W₀ (out × in) is frozen. A (r × in) starts with random numbers, and B (out × r) starts at 0. With G = ∂L/∂W, the gradient that
the whole weight would have,

    ∂L/∂A = s Bᵀ G,     ∂L/∂B = s G Aᵀ

Because B starts at 0, an adapted layer computes what its base computes until the first step, bit for bit. At the first step B
has a gradient, and A's gradient is 0.

QLoRA is the same bypass beside a layer in 4 bits (QLoRA eq. 5). The scale s stands in QLoRA's eq. 3 and is missing in
its eq. 5; it is applied here, as in the authors' code. rsLoRA is the same bypass with another scale, s = α/√r
(Kalajdzievski 2023).

A layer holds any number of named bypasses beside one base, and those that are active add up. `merge` gives a new layer
with W = W₀ + s B A, so that nothing is computed beside it (LoRA §4.1).

As in PEFT, the factors are `lora_A` and `lora_B`, the base is `base_layer`, the shapes are the same, and the scale (`scaling`) is
applied last. Differs from PEFT: merging leaves W₀ alone, because subtracting s B A in float32 would not restore it; merging into
4 bits reports the error that it makes. Differs from loralib: `eval()` changes no weight.

Leaves out: embeddings and convolutions (`adapters.kinds`), DoRA (`adapters.dora`), what is done to a whole model (`adapters`), and
a different adapter for each row of a batch (`adapters.switch`).
"""

import copy
import math

import numpy as np

from . import ops
from .backend import array_module, whole
from .dtypes import Stored
from .nn import FrozenLinear, Linear, Module, normal, stored_array, uniform
from .tensor import Tensor

INITS = ("kaiming", "gaussian")


class LinearBypass(Module):
    """s B(A(x)) beside a linear layer.   A (r, in) ~ U(−1/√in, 1/√in), B (out, r) = 0, s = α/r.   LoRA eq. 3, §4.1.

    The paper's A is Gaussian; loralib and PEFT draw it uniformly.

    lora_A, lora_B    the factors, layers with a `weight` each
    init              "kaiming": as above, which loralib and PEFT use; "gaussian": A ~ N(0, 1/r²)
    use_rslora        s = α/√r instead
    lora_bias         True: B has a bias (out,), which the scale multiplies too, as PEFT's forward does
    use_dora          makes the class of `adapters.dora`, whose magnitude (out,) is trained as well
    started_by        "", or the method of `variants` that moved a part of the base's weight into the factors
    """

    started_by, magnitude = "", None
    dora = None  # the class that use_dora makes; adapters.dora puts it here

    def __new__(cls, *args, use_dora=False, **options):  # for DoRA only; skip it at first
        return super().__new__(cls.dora if use_dora else cls)

    def __init__(
        self, base, r=8, alpha=16, dropout=0.0, init="kaiming", *, use_rslora=False, use_dora=False, lora_bias=False
    ):
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"lora: dropout = {dropout}, expected 0 <= dropout < 1")
        if init not in INITS:
            raise ValueError(f"lora: init {init!r} is unknown: expected 'kaiming' or 'gaussian'")
        self.r, self.alpha, self.dropout = whole("lora: r", r), alpha, dropout
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.build(base, init, lora_bias)
        self.to(array_module(stored_array(base.weight)))

    def build(self, base, init, lora_bias):
        """Set lora_A and lora_B = 0. Both layers first draw a weight that is overwritten, in PEFT's order: seeded runs depend on it."""
        if not isinstance(base, (Linear, FrozenLinear)):
            raise TypeError(f"lora: a {type(base).__name__} is not one of nn's linear layers; see adapters.add_lora")
        r, n, out = self.r, base.in_features, base.out_features
        self.lora_A, self.lora_B = Linear(n, r), Linear(r, out, bias=lora_bias)
        self.lora_A.weight.data = uniform((r, n), 1 / math.sqrt(n)) if init == "kaiming" else normal((r, n), 1 / r)
        self.lora_B.weight.data = np.zeros((out, r), np.float32)

    def through(self, x, base):
        """B(A(x)), not yet scaled."""
        return self.lora_B(self.lora_A(x))

    def forward(self, x, base, base_output):
        """s B A x: what is added to the base's output."""
        return self.through(self.dropped(x), base) * self.scaling

    def delta(self, base):
        """ΔW = s B A as an array of the base weight's shape. LoRA §4.1."""
        b, a = self.factors()
        return self.like_weight(ops.matmul(b, a).data, base) * self.scaling

    def weight(self, base):
        """W₀ + ΔW: the weight that this bypass makes of its base's."""
        return base.dense() + self.delta(base)

    def change(self, base, w0):
        """weight(base) − W₀: what this bypass contributes to a sum of several. (Without a magnitude W₀ is not needed.)"""
        return self.delta(base)

    def dropped(self, x):
        """dropout(x) while training, else x."""
        return ops.dropout(x, self.dropout) if self.training else x

    # Shapes: these three are for a linear base; `adapters.kinds` has them for embeddings and convolutions.
    def factors(self):
        """(B, A) as matrices (outputs × r) and (r × inputs), views of the arrays."""
        return self.lora_B.weight.data, self.lora_A.weight.data

    def like_weight(self, matrix, base):
        """A matrix (outputs × inputs) in the shape of the base's weight."""
        return matrix

    def row(self, vector, y):
        """A vector over the outputs, shaped to multiply y (DoRA's magnitude does)."""
        return vector


class LoRALayer(Module):
    """h = base(x) + Σ over active bypasses of s B(A(dropout(x))).   LoRA eq. 3; scale last, as PEFT computes it.

    base_layer   the wrapped layer, frozen here
    bypasses     {name: bypass}; the constructor makes one, called "default"
    active       the names that take part, in order

    `lora_A`, `lora_B`, `r`, `alpha`, `scaling`, `dropout` are those of the active bypass, if it is one.
    """

    kind = LinearBypass  # the class of bypass that the constructor makes

    def __init__(self, base, *args, name="default", bypass=None, **options):
        """The arguments after `base` are the bypass's (r, alpha, dropout, init, …); or give one that is made already."""
        made = self.kind(base, *args, **options) if bypass is None else bypass
        self.base_layer, self.bypasses, self.active = base.requires_grad_(False), {name: made}, (name,)

    def forward(self, x):
        if (h := self.fused_forward(x)) is not None:
            return h
        y = base_output = self.base_layer(x)  # W₀ x
        for name in self.active:
            y = y + self.bypasses[name](x, self.base_layer, base_output)  # + s B A x
        return y

    def fused_forward(self, x):
        """What forward returns, in one operation, or None; adapters.fused puts its own function here."""

    def _only(self, what):
        """An attribute of the one active bypass."""
        if len(self.active) != 1:
            raise AttributeError(f"{what}: {len(self.active)} adapters are active here; take it from .bypasses[name]")
        return getattr(self.bypasses[self.active[0]], what)

    lora_A, lora_B, r, alpha, scaling, dropout, magnitude = (
        property(lambda self, what=what: self._only(what))
        for what in ("lora_A", "lora_B", "r", "alpha", "scaling", "dropout", "magnitude")
    )
    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: getattr(self.base_layer, "bias", None))

    def delta(self):
        """Σ s B A over the active bypasses, as an array of the base weight's shape. (DoRA's rescaling is not in it: see `merged`.)"""
        return sum(self.bypasses[name].delta(self.base_layer) for name in self.active)

    def merged(self, names=None):
        """W = W₀ + Σ s B A over the named (else the active) bypasses. LoRA §4.1; for DoRA its eq. 5."""
        bypasses, base = self._named(names), self.base_layer
        if len(bypasses) == 1:
            return bypasses[0].weight(base)
        w0 = base.dense()
        return w0 + sum(bypass.change(base, w0) for bypass in bypasses)

    def merge(self, names=None):
        """A new layer of the base's kind with W = W₀ + s B A; the base and the factors stay as they are.

        names   which bypasses (the active ones)
        A 4-bit base is dequantized, added to and quantized again with the same settings. What that costs is on the new
        layer: `merge_error` = ‖Ŵ − (W₀ + ΔW)‖ / ‖W₀ + ΔW‖ (Frobenius). A weight changes only where ΔW carries it over half a gap
        of the code: a small ΔW is lost nearly whole (notebook 10). The bias of B goes into the layer's bias times s,
        which is what the forward computes (PEFT's merge into 4 and 8 bits forgets the s).
        """
        bias = self.bias
        for bypass in self._named(names):
            if bypass.lora_B.bias is not None:
                extra = bypass.lora_B.bias.data * bypass.scaling
                bias = Tensor(extra if bias is None else bias.data + extra)
        return with_weight(self.base_layer, self.merged(names), bias) if self._named(names) else self.base_layer

    def _named(self, names):
        """The bypasses of these names (of the active ones) that this layer has."""
        return [self.bypasses[n] for n in (self.active if names is None else names) if n in self.bypasses]


class LoRALinear(LoRALayer):
    """h = W₀ x + s B(A(dropout(x))), s = α/r, around a Linear or a FrozenLinear (in few bits).   LoRA eq. 3; QLoRA eq. 5."""

    in_features = property(lambda self: self.base_layer.in_features)
    out_features = property(lambda self: self.base_layer.out_features)


def with_weight(base, wanted, bias):
    """A frozen layer of the base's kind, rounded as the base was, with another weight and bias; it knows its `merge_error`."""
    layer = copy.copy(base)
    layer.weight = base.weight.like(wanted) if isinstance(base.weight, Stored) else Tensor(wanted)
    if hasattr(base, "bias"):
        layer.bias = bias
    difference = layer.dense() - wanted
    size = max(float((wanted * wanted).sum()), 1e-30)
    layer.merge_error = math.sqrt(float((difference * difference).sum()) / size)
    return layer


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
