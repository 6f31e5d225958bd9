"""Bypasses of embeddings and convolutions, and which layer is adapted by which.

embedding      h = W[ids] + s A[:, ids]ᵀ Bᵀ, where A starts at zero and B at random: an embedding's gradient reaches A only through B
convolution    h = conv(x, W₀) + s conv₁(conv(x, A), B), where B mixes the r channels that A makes
"""

import math

import numpy as np

from .. import ops
from ..lora import LinearBypass, LoRALayer, LoRALinear
from ..nn import Embedding, FrozenLinear, Linear, Module, normal, uniform
from ..tensor import Tensor
from . import conv
from .conv import Conv1d, Conv2d, Conv3d


def factor_shapes(base, r):
    """The shapes of A and B, as files hold them, in a bypass of rank r beside this base."""
    if isinstance(base, Embedding):
        n, d = base.weight.shape
        return (r, n), (d, r)
    if isinstance(base, conv.Conv):
        kernel = base.weight.shape[2:]
        return (r, base.in_channels, *kernel), (base.out_channels, r // base.groups, *(1,) * len(kernel))
    return (r, base.in_features), (base.out_features, r)


class _Factor(Module):
    """One factor of an embedding's or a convolution's bypass: a weight that the bypass itself applies."""

    def __init__(self, weight, bias=None):
        self.weight = Tensor(weight, requires_grad=True)
        self.bias = None if bias is None else Tensor(bias, requires_grad=True)


class EmbeddingBypass(LinearBypass):
    """W[ids] + s A[:, ids]ᵀ Bᵀ: A (r, vocabulary) of zeros, B (d, r) ~ N(0, 1). The other way round than for a linear layer."""

    def build(self, base, init, lora_bias):
        if lora_bias:
            raise ValueError("lora: lora_bias is for linear layers and convolutions, not for an embedding")
        a, b = factor_shapes(base, self.r)
        self.lora_A, self.lora_B = _Factor(np.zeros(a, np.float32)), _Factor(normal(b, 1.0))

    def dropped(self, ids):
        return ids

    def through(self, ids, base):
        return ops.linear(ops.embedding(ids, self.lora_A.weight.T), self.lora_B.weight)

    def like_weight(self, matrix, base):
        return matrix.T


class ConvBypass(LinearBypass):
    """A (r, in, *kernel): the base's own kernel, stride and padding with r outputs; B (out, r/groups, 1, …) mixes them.

    As PEFT has it, except that A has the base's dilation too (PEFT leaves it out, and then fails on the shapes). A reads
    all input channels even where the base is grouped, so a grouped base cannot be merged into.
    """

    def build(self, base, init, lora_bias):
        if self.r % base.groups:
            raise ValueError(f"lora: r = {self.r} must be a multiple of the convolution's groups = {base.groups}")
        a, b = factor_shapes(base, self.r)
        n = math.prod(a[1:])
        self.lora_A = _Factor(uniform(a, 1 / math.sqrt(n)) if init == "kaiming" else normal(a, 1 / self.r))
        self.lora_B = _Factor(np.zeros(b, np.float32), np.zeros(b[0], np.float32) if lora_bias else None)

    def through(self, x, base):
        h = conv.conv(x, self.lora_A.weight, stride=base.stride, padding=base.padding, dilation=base.dilation)
        h = conv.conv(h, self.lora_B.weight, groups=base.groups)
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


class LoRAEmbedding(LoRALayer):
    """h = W[ids] + s (A[:, ids])ᵀ Bᵀ around an Embedding. See LoRALayer and EmbeddingBypass."""

    kind = EmbeddingBypass


class LoRAConv(LoRALayer):
    """h = conv(x, W₀) + s conv₁(conv(x, A), B) around a Conv1d, Conv2d or Conv3d. See LoRALayer and ConvBypass."""

    kind = ConvBypass


#: Which layers can be adapted, by what, and how: (base classes, layer, bypass).
KINDS = (
    ((Linear, FrozenLinear), LoRALinear, LinearBypass),
    ((Embedding,), LoRAEmbedding, EmbeddingBypass),
    ((Conv1d, Conv2d, Conv3d), LoRAConv, ConvBypass),
)
LINEAR, ADAPTABLE = KINDS[0][0], tuple(base for kind in KINDS for base in kind[0])


def _kind(base):
    for bases, layer, bypass in KINDS:
        if isinstance(base, bases):
            return layer, bypass
    raise TypeError(
        f"lora: a {type(base).__name__} cannot be adapted; expected a linear layer, an embedding or a convolution"
    )


def bypass_for(base):
    """The class of bypass that fits a base layer."""
    return _kind(base)[1]


def lora_layer(base, *args, **options):
    """The LoRALinear, LoRAEmbedding or LoRAConv around a base layer, with LoRALayer's arguments."""
    return _kind(base)[0](base, *args, **options)
