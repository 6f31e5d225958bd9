"""Convolutions over one, two and three spatial axes, as layers.

    y[b, o, p] = Σ_ck x[b, c, stride p + dilation k − padding] W[o, c, k] + bias[o]                    (see `conv`)

Shapes, names, argument order and the start of the weights are those of torch.nn.Conv1d, Conv2d and Conv3d, so that a state dict carries
over. Differs from torch in that only zeros pad (no padding_mode, no "same"), and inputs always have a batch axis. Transposed
convolutions are left out.
"""

import math

import numpy as np

from .. import ops
from ..backend import array_module
from ..nn import Module, uniform
from ..tensor import Tensor, primitive


class Conv(Module):
    """What Conv1d, Conv2d and Conv3d share: y = x ⋆ W + b over `axes` spatial axes."""

    axes = None

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True):
        name, n = type(self).__name__, self.axes
        kernel = tuple(kernel_size) if isinstance(kernel_size, (tuple, list)) else (kernel_size,) * n
        if len(kernel) != n or any(not isinstance(k, (int, np.integer)) or k < 1 for k in kernel):
            raise ValueError(
                f"{name}: kernel_size = {kernel_size!r}, expected a whole number, 1 or more, or a tuple of {n}"
            )
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{name}: groups = {groups} must divide in_channels = {in_channels} and out_channels = {out_channels}"
            )
        shape = (out_channels, in_channels // groups, *map(int, kernel))
        bound = 1 / math.sqrt(max(math.prod(shape[1:]), 1))
        self.weight = Tensor(uniform(shape, bound), requires_grad=True)
        self.bias = Tensor(uniform((out_channels,), bound), requires_grad=True) if bias else None
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    in_channels = property(lambda self: self.weight.shape[1] * self.groups)
    out_channels = property(lambda self: self.weight.shape[0])
    kernel_size = property(lambda self: self.weight.shape[2:])

    def forward(self, x):
        return self.convolve(x, self.weight)

    def convolve(self, x, weight):
        """y = x ⋆ weight + bias: this layer's stride, padding, dilation, groups and bias with another weight of the same shape."""
        y = conv(x, weight, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)
        return y if self.bias is None else y + ops.reshape(self.bias, (-1,) + (1,) * self.axes)

    def dense(self):
        """W as an array (out, in/groups, *kernel)."""
        return self.weight.data


_DOC = """y = x ⋆ W + b over {axes}.   x (b, in, {space}), weight (out, in/groups, {kernel}), bias (out,) or None.

    Both weight and bias ~ U(−1/√n, 1/√n) with n = in/groups · {product}, the fan-in: torch's kaiming_uniform(a=√5), and its bias.
    kernel_size, stride, padding and dilation: a whole number, or one for each axis. Errors: ValueError for a kernel_size or groups
    that does not fit, and from `conv` for inputs that do not.
    """


class Conv1d(Conv):
    __doc__ = _DOC.format(axes="one spatial axis", space="l", kernel="k", product="k")
    axes = 1


class Conv2d(Conv):
    __doc__ = _DOC.format(axes="two spatial axes", space="h, w", kernel="k₁, k₂", product="k₁ k₂")
    axes = 2


class Conv3d(Conv):
    __doc__ = _DOC.format(axes="three spatial axes", space="d, h, w", kernel="k₁, k₂, k₃", product="k₁ k₂ k₃")
    axes = 3


# ---------------------------------------------------------------------------------------------------------------- convolution
def _each_axis(name, value, n, least):
    """One whole number for each of n spatial axes, given as one for all or as a tuple."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * n
    if len(values) != n or any(not isinstance(v, (int, np.integer)) or v < least for v in values):
        raise ValueError(
            f"conv: {name} = {value!r}, expected a whole number, {least} or more, or a tuple of {n} of them"
        )
    return tuple(map(int, values))


def _padded(x, padding):
    """x (b, c, *space) with zeros on both sides of every spatial axis."""
    if not any(padding):
        return x
    xp = array_module(x)
    out = xp.zeros((*x.shape[:2], *(n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True))), dtype=x.dtype)
    out[(..., *(slice(p, p + n) for n, p in zip(x.shape[2:], padding, strict=True)))] = x
    return out


def _grouped(x, groups):
    """x (b, c, *space) as matrices (groups, c/groups, b · space): channels by positions."""
    b, c, *space = x.shape
    return x.swapaxes(0, 1).reshape(groups, c // groups, b * math.prod(space))


@primitive
def conv(x, w, stride=1, padding=0, dilation=1, groups=1):
    """y[b,o,p] = Σ_ck x[b,c,q] w[o,c,k];   x̄[b,c,q] = Σ_okp ḡ[b,o,p] w[o,c,k],   w̄[o,c,k] = Σ_bp ḡ[b,o,p] x[b,c,q].

    The sums run over q = stride p + dilation k − padding; x is zero outside. x (b, in, *space), w (out, in/groups, *kernel) with 1, 2
    or 3 spatial axes -> y (b, out, *places), places = ⌊(space + 2 padding − dilation (kernel − 1) − 1) / stride⌋ + 1. stride, padding
    and dilation: a number, or one for each axis. With groups, an output channel sees only the input channels of its own group. A
    cross-correlation, as torch's conv1d, conv2d and conv3d: the kernel is not flipped. One matrix product for each offset k; x is
    never unfolded, and a frozen w keeps no x.
    """
    n = w.ndim - 2
    if n not in (1, 2, 3) or x.ndim != w.ndim:
        raise ValueError(
            f"conv: x is {x.shape} and w is {w.shape}; expected (b, in, *space) and (out, in/groups, *kernel) "
            "with the same 1, 2 or 3 spatial axes"
        )
    stride, padding, dilation = (
        _each_axis(name, value, n, least)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    (groups,) = _each_axis("groups", groups, 1, 1)
    (b, channels, *space), (out, per_group, *kernel) = x.shape, w.shape
    if channels != per_group * groups or out % groups:
        raise ValueError(
            f"conv: x has {channels} channels, w is (out, in/groups, *kernel) = {w.shape} with groups = {groups}; "
            f"expected {per_group * groups} channels, and out a multiple of groups"
        )
    full = [m + 2 * p for m, p in zip(space, padding, strict=True)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if not all(k >= 1 and r <= m for k, r, m in zip(kernel, reach, full, strict=True)):
        raise ValueError(
            f"conv: the kernel {tuple(kernel)} spans {tuple(reach)} with dilation {dilation}, and x has only "
            f"{tuple(full)} with its padding"
        )
    places = [(m - r) // s + 1 for m, r, s in zip(full, reach, stride, strict=True)]
    dtype, w_shape = np.result_type(x.dtype, w.dtype), w.shape

    def offsets():  # (k in w, the entries of the padded x that k meets: one for each output position)
        for k in np.ndindex(*kernel):
            at = (
                slice(d * i, d * i + s * (m - 1) + 1, s) for d, i, s, m in zip(dilation, k, stride, places, strict=True)
            )
            yield (..., *k), (..., *at)

    def by_group(w):
        return w.reshape(groups, out // groups, per_group, *kernel)

    def pull_x(g):
        g, wg = _grouped(g, groups), by_group(w)
        gx = array_module(g).zeros((b, channels, *full), dtype=dtype)
        for k, at in offsets():
            gx[at] += (wg[k].swapaxes(1, 2) @ g).reshape(channels, b, *places).swapaxes(0, 1)
        return gx[(..., *(slice(p, p + m) for p, m in zip(padding, space, strict=True)))]

    def pull_w(g):
        g, padded = _grouped(g, groups), _padded(x, padding)
        gw = array_module(g).zeros((groups, out // groups, per_group, *kernel), dtype=dtype)
        for k, at in offsets():
            gw[k] = g @ _grouped(padded[at], groups).swapaxes(1, 2)
        return gw.reshape(w_shape)

    padded, wg = _padded(x, padding), by_group(w)
    y = array_module(x).zeros((groups, out // groups, b * math.prod(places)), dtype=dtype)
    for k, at in offsets():
        y += wg[k] @ _grouped(padded[at], groups)
    return y.reshape(out, b, *places).swapaxes(0, 1), (pull_x, pull_w)
