"""The layers of loralib 0.1.2, the library that came with the LoRA paper, under its names and with its numbers.

    Linear, MergedLinear      y = x W₀ᵀ + b + s (drop(x) Aᵀ) Bᵀ,   s = α/r        A (r, in) uniform,  B (out, r) zero
    Embedding                 y = W₀[i] + s Aᵀ[i] Bᵀ                              A (r, n) zero,      B (d, r) normal
    Conv1d, Conv2d, Conv3d    y = x ⋆ (W₀ + s view(B A)) + b                      A (r k, in k) uniform,  B zero
    mark_only_lora_as_trainable, lora_state_dict

A loralib layer replaces a layer and holds its weight, where LoRALinear (and PEFT) wrap one: the names in a state dict are weight, bias,
lora_A, lora_B (convolutions: conv.weight, conv.bias, lora_A, lora_B), and files carry over. With r = 0 each is the plain layer, weight
trainable. The whole idea of the file is what it does on eval():

    merge_weights=True (the default)     eval(): W ← W + s B A,   train(): W ← W − s B A
    merge_weights=False                  W never changes

In eval mode the bypass then costs nothing. But float32 does not give W back: in (W + Δ) − Δ both operations round. At 256 × 256, r = 8,
s = 1, with W, A and B from N(0, 1), 43 to 49 % of the entries come back exactly and the rest is off by at most 1e-6; with W and A as they
start and B ~ U(−1/√r, 1/√r), 72 to 75 % and 1e-8. A second trip with the same factors changes nothing more: with rounding to even,
(((W + Δ) − Δ) + Δ) − Δ = (W + Δ) − Δ (Reiser & Knuth 1975). But training changes the factors, and an evaluation after each epoch then
adds an error per epoch: after 100 trips with fresh factors its rms is 8.4 to 9.1 times that of one trip, close to a random walk's 10.
It is reproduced here because it is loralib; keep a copy of W₀, or use merge_weights=False, or merge into a new layer.

Three more consequences, true of both libraries: a state dict taken in eval mode holds the merged weight; factors that are loaded or
changed in eval mode are not the ones that were added, and train() then subtracts what was never there; and eval mode computes the
merged product, so its outputs differ from those of train mode in the last bits.

Differs from loralib: convolutions over one and three axes work for any kernel (see ConvLoRA); a MergedLinear whose groups are all
disabled is a plain layer; merging makes a new array (loralib writes into the old one, so that a backward pass after eval() silently
uses the merged weight); train() and eval() return the layer (there: None); bad input gets a sentence before anything changes. Left out:
device and dtype, and padding_idx, max_norm, norm_type, scale_grad_by_freq and sparse of the embedding. Source: loralib/layers.py and
utils.py; LoRA §4.1 and §4.2.
"""

import math

import numpy as np

from .. import backend, ops
from ..adapters import conv
from ..backend import whole
from ..nn import Module, normal, uniform
from ..tensor import Tensor, no_grad


class LoRALayer(Module):
    """Δ = s · update(), s = α/r, merged into `frozen` on eval() and taken out on train(): what all layers of this file share.

    r, lora_alpha, lora_dropout, merge_weights as given; `merged` says whether Δ is inside the weight at the moment. A layer that
    adapts defines `frozen` (the Tensor of W₀) and `update()` (B A in the layout of W₀, a Tensor). Without factors, nothing is merged,
    and `merged` follows the mode all the same, as in loralib.
    """

    lora_A = lora_B = bias = None
    merged = False
    _training = True

    def __init__(self, r, lora_alpha, lora_dropout, merge_weights):
        name = type(self).__name__
        whole(f"loralib.{name}: r", r, least=0)
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"loralib.{name}: lora_dropout = {lora_dropout}, expected 0 <= lora_dropout < 1")
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.merge_weights = merge_weights

    @property
    def scaling(self):
        """s = α/r, and 0 where r = 0."""
        return self.lora_alpha / self.r if self.r else 0.0

    def _adapt(self, a, b):
        """Take the factors on, A and B as arrays, and freeze the weight; the bias stays trainable, as in loralib."""
        self.lora_A, self.lora_B = Tensor(a, requires_grad=True), Tensor(b, requires_grad=True)
        self.frozen.requires_grad = False

    def delta(self):
        """Δ = s B A as an array in the layout of the weight. LoRA §4.1."""
        with no_grad():
            return self.update().data * self.scaling

    @property
    def training(self):
        return self._training

    @training.setter
    def training(self, mode):  # Module.train sets this on every layer of a model, however deep
        self._training = mode
        if self.merge_weights and self.merged == bool(mode):
            if self.lora_A is not None:
                w = self.frozen
                w.data = w.data - self.delta() if mode else w.data + self.delta()
            self.merged = not mode

    @property
    def _beside(self):
        """True where the bypass has to be computed beside the weight."""
        return self.lora_A is not None and not self.merged

    def _dropped(self, x):
        return ops.dropout(x, self.lora_dropout) if self.training else x


class Linear(LoRALayer):
    """y = x W₀ᵀ + b + s (drop(x) Aᵀ) Bᵀ, s = α/r.   x (..., in), weight (out, in), lora_A (r, in), lora_B (out, r).

    weight, bias and A ~ U(−1/√in, 1/√in), B = 0. fan_in_fan_out=True stores the weight as (in, out), as GPT-2's Conv1D does; y is the
    same. The weight is frozen where r > 0; the bias stays trainable until `mark_only_lora_as_trainable`. Unlike in loralib it is no
    subclass of nn.Linear: quantize_linears passes it by.
    """

    def __init__(
        self,
        in_features,
        out_features,
        r=0,
        lora_alpha=1,
        lora_dropout=0.0,
        fan_in_fan_out=False,
        merge_weights=True,
        bias=True,
    ):
        super().__init__(r, lora_alpha, lora_dropout, merge_weights)
        self.in_features, self.out_features, self.fan_in_fan_out = in_features, out_features, fan_in_fan_out
        bound = 1 / math.sqrt(max(in_features, 1))
        w = uniform((out_features, in_features), bound)
        self.weight = Tensor(w.T if fan_in_fan_out else w, requires_grad=True)
        self.bias = Tensor(uniform((out_features,), bound), requires_grad=True) if bias else None
        self._add_factors(bound)

    frozen = property(lambda self: self.weight)

    def _add_factors(self, bound):
        if self.r:
            a, b = (self.r, self.in_features), (self.out_features, self.r)
            self._adapt(uniform(a, bound), np.zeros(b, np.float32))

    def _turned(self, w):
        """w (out, in) from or to the layout of the weight."""
        return ops.swapaxes(w, 0, 1) if self.fan_in_fan_out else w

    def update(self):
        """B A, transposed where the weight is."""
        return self._turned(ops.matmul(self.lora_B, self.lora_A))

    def forward(self, x):
        y = ops.linear(x, self._turned(self.weight), self.bias)
        return y + self._bypass(self._dropped(x)) * self.scaling if self._beside else y

    def _bypass(self, x):
        return ops.linear(ops.linear(x, self.lora_A), self.lora_B)


class MergedLinear(Linear):
    """y = x W₀ᵀ + b + s drop(x) Δᵀ,   Δ in G blocks of out/G rows: B_g A_g where enable_lora[g], 0 elsewhere.   E blocks are enabled.

    For projections in one matrix, such as GPT-2's query, key and value: enable_lora=[True, False, True] adapts the first and the
    third. lora_A (r E, in) and lora_B (E out/G, r) hold the enabled blocks on top of each other; each has its own rank r and there is
    no sharing between them. The full Δ (out, in) is formed in every forward pass, so the bypass costs as much as the layer.

    Where loralib misleads: its default, enable_lora=[False], makes a layer whose forward raises AttributeError while training, as do
    all patterns without a True (here: a plain layer, weight trainable); lora_ind, its mask of enabled rows, is no buffer, so it neither
    moves with the model nor is saved (here: derived from enable_lora). Errors: ValueError if len(enable_lora) does not divide out.
    """

    def __init__(
        self,
        in_features,
        out_features,
        r=0,
        lora_alpha=1,
        lora_dropout=0.0,
        enable_lora=(False,),
        fan_in_fan_out=False,
        merge_weights=True,
        bias=True,
    ):
        self.enable_lora = [bool(on) for on in enable_lora]
        if not self.enable_lora or out_features % len(self.enable_lora):
            raise ValueError(
                f"loralib.MergedLinear: enable_lora has {len(self.enable_lora)} entries, "
                f"expected a number that divides out_features = {out_features}"
            )
        super().__init__(in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, bias)

    def _add_factors(self, bound):
        enabled, rows = sum(self.enable_lora), self.out_features // len(self.enable_lora)
        if self.r and enabled:
            a, b = (self.r * enabled, self.in_features), (rows * enabled, self.r)
            self._adapt(uniform(a, bound), np.zeros(b, np.float32))

    def update(self):
        """Δ/s: the blocks B_g A_g and the zeros between them, transposed where the weight is."""
        rows, r, a, b = self.out_features // len(self.enable_lora), self.r, self.lora_A, self.lora_B
        nothing = Tensor(backend.array_module(a.data).zeros((rows, self.in_features), a.dtype))
        blocks, g = [], 0
        for on in self.enable_lora:
            blocks.append(ops.matmul(b[g * rows : (g + 1) * rows], a[g * r : (g + 1) * r]) if on else nothing)
            g += on
        return self._turned(ops.concatenate(blocks))

    def _bypass(self, x):
        return ops.linear(x, self._turned(self.update()))


class Embedding(LoRALayer):
    """y = W₀[i] + s Aᵀ[i] Bᵀ, s = α/r.   i (...) integers, weight (n, d), lora_A (r, n), lora_B (d, r) -> y (..., d).

    The start is the reverse of the other layers': A = 0 and B ~ N(0, 1) (weight ~ N(0, 1)). The comment over this line in loralib says
    the opposite ("A the same way as the default for nn.Linear and B to zero"); the code is what counts, and Δ = 0 either way. At the
    first step A has the gradient and B has none. No dropout.
    """

    def __init__(self, num_embeddings, embedding_dim, r=0, lora_alpha=1, merge_weights=True):
        super().__init__(r, lora_alpha, 0.0, merge_weights)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = Tensor(normal((num_embeddings, embedding_dim), 1), requires_grad=True)
        if r:
            self._adapt(np.zeros((r, num_embeddings), np.float32), normal((embedding_dim, r), 1))

    frozen = property(lambda self: self.weight)

    def update(self):
        """(B A)ᵀ (n, d)."""
        return ops.swapaxes(ops.matmul(self.lora_B, self.lora_A), 0, 1)

    def forward(self, ids):
        y = ops.embedding(ids, self.weight)
        if not self._beside:
            return y
        return y + ops.linear(ops.embedding(ids, ops.swapaxes(self.lora_A, 0, 1)), self.lora_B) * self.scaling


class ConvLoRA(LoRALayer):
    """y = x ⋆ (W₀ + s view(B A)) + b, s = α/r, over n spatial axes with kernel k; `conv` holds W₀ (out, in/groups, k, ..., k) and b.

        lora_A (r k, in k),    lora_B (out/groups kⁿ⁻¹, r k),    B A (out/groups kⁿ⁻¹, in k): out in kⁿ / groups numbers, as many as W₀

    A ~ U(−1/√(in k), 1/√(in k)), B = 0. B A is laid flat and read as W₀ (`view`): each of its rows is a stretch of in k consecutive
    numbers of W₀, so that with groups = 1 the filter of an output channel is kⁿ⁻¹ rows. Rows and columns are no axes of the kernel: this
    is not two convolutions after each other (as PEFT's), and the rank of Δ as a matrix (out, in kⁿ) may exceed r.

    loralib has lora_B (out/groups k, r k) for every n. B A then has out in k² / groups numbers: right for n = 2, k times too many for
    n = 1 and k times too few for n = 3, so that `view` fails in forward and in eval() unless k = 1. The exponent n − 1 is the only change:
    lora_A is loralib's for every n, and for n = 2, or k = 1, everything is.

    Where loralib misleads: lora_dropout is accepted and never applied (here too); the layer has no attribute `bias`, so "lora_only" neither
    trains nor saves conv.bias. Further arguments (stride, padding, dilation, groups, bias) are those of tinylora.conv. kernel_size must be
    one whole number. W₀ + s view(B A) is formed in every forward pass.
    """

    module = None  # the convolution of this number of axes

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        r=0,
        lora_alpha=1,
        lora_dropout=0.0,
        merge_weights=True,
        **kwargs,
    ):
        super().__init__(r, lora_alpha, lora_dropout, merge_weights)
        if not isinstance(kernel_size, (int, np.integer)):
            raise ValueError(
                f"loralib.{type(self).__name__}: kernel_size = {kernel_size!r}, expected one whole number for all axes"
            )
        self.conv = self.module(in_channels, out_channels, kernel_size, **kwargs)
        if r:
            k, stretches = kernel_size, kernel_size ** (self.module.axes - 1)
            a = uniform((r * k, in_channels * k), 1 / math.sqrt(max(in_channels * k, 1)))
            self._adapt(a, np.zeros((out_channels // self.conv.groups * stretches, r * k), np.float32))

    frozen = property(lambda self: self.conv.weight)

    def update(self):
        """B A, laid flat and read as (out, in/groups, k, ..., k)."""
        return ops.reshape(ops.matmul(self.lora_B, self.lora_A), self.conv.weight.shape)

    def forward(self, x):
        if not self._beside:
            return self.conv(x)
        return self.conv.convolve(x, self.conv.weight + self.update() * self.scaling)


class Conv1d(ConvLoRA):
    """y = x ⋆ (W₀ + s view(B A)) + b.   x (b, in, l), lora_A (r k, in k), lora_B (out/groups, r k). See ConvLoRA."""

    module = conv.Conv1d


class Conv2d(ConvLoRA):
    """y = x ⋆ (W₀ + s view(B A)) + b.   x (b, in, h, w), lora_A (r k, in k), lora_B (out/groups k, r k). See ConvLoRA."""

    module = conv.Conv2d


class Conv3d(ConvLoRA):
    """y = x ⋆ (W₀ + s view(B A)) + b.   x (b, in, d, h, w), lora_A (r k, in k), lora_B (out/groups k², r k). See ConvLoRA."""

    module = conv.Conv3d


# ------------------------------------------------------------------------------------------------------- what trains, what is saved
def _check_bias(bias):
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"loralib: bias = {bias!r}, expected 'none', 'all' or 'lora_only'")


def mark_only_lora_as_trainable(model, bias="none"):
    """Freeze all but what has "lora_" in its name, and the biases that `bias` names.

    "none"         no bias
    "all"          everything with "bias" in its name
    "lora_only"    the `bias` of each layer of this file (a convolution's is conv.bias, and is not among them)
    Both tests look anywhere in the path: a layer that is called lora_head counts, as in loralib. What has "lora_" in its name is left
    as it is: a factor that was frozen by hand stays so. Another `bias` is a ValueError, and changes nothing (loralib raises
    NotImplementedError after it froze everything).
    """
    _check_bias(bias)
    for name, w in model.named_parameters():
        if "lora_" not in name:
            w.requires_grad, w.grad = False, None
    if bias == "all":
        chosen = [w for name, w in model.named_parameters() if "bias" in name]
    elif bias == "lora_only":
        chosen = [m.bias for _, m in model.named_modules() if isinstance(m, LoRALayer) and m.bias is not None]
    else:
        chosen = []
    for w in chosen:
        w.requires_grad = True


def lora_state_dict(model, bias="none"):
    """{path: array} of what has "lora_" in its name, and the biases that `bias` names: what has to be saved. The arrays themselves.

    bias as in `mark_only_lora_as_trainable`; "lora_only" takes the `bias` beside each factor, if there is one. Loads with
    `model.load_state_dict(state, strict=False)`, in train mode: see the module's docstring. Order and names are loralib's; of a tied
    weight torch lists every name, tinylora the first.
    """
    _check_bias(bias)
    state = model.state_dict()
    if bias != "lora_only":
        return {name: w for name, w in state.items() if "lora_" in name or (bias == "all" and "bias" in name)}
    chosen = {}
    for name, w in state.items():
        if "lora_" in name:
            chosen[name] = w
            beside = name.split("lora_")[0] + "bias"
            if beside in state:
                chosen[beside] = state[beside]
    return chosen
