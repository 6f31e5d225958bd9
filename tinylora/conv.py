"""Convolutions over one, two and three spatial axes, as layers.

    y[b, o, p] = Σ_ck x[b, c, stride p + dilation k − padding] W[o, c, k] + bias[o]                    (see ops.conv)

Shapes, names, argument order and the start of the weights are those of torch.nn.Conv1d, Conv2d and Conv3d, so that a state dict carries
over. Differs from torch in that only zeros pad (no padding_mode, no "same"), and inputs always have a batch axis. Transposed
convolutions are left out.
"""

import math

import numpy as np

from . import ops
from .nn import Module, uniform
from .tensor import Tensor


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
        y = ops.conv(x, weight, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)
        return y if self.bias is None else y + ops.reshape(self.bias, (-1,) + (1,) * self.axes)

    def dense(self):
        """W as an array (out, in/groups, *kernel)."""
        return self.weight.data


_DOC = """y = x ⋆ W + b over {axes}.   x (b, in, {space}), weight (out, in/groups, {kernel}), bias (out,) or None.

    Both weight and bias ~ U(−1/√n, 1/√n) with n = in/groups · {product}, the fan-in: torch's kaiming_uniform(a=√5), and its bias.
    kernel_size, stride, padding and dilation: a whole number, or one for each axis. Errors: ValueError for a kernel_size or groups
    that does not fit, and from ops.conv for inputs that do not.
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


__all__ = ["Conv", "Conv1d", "Conv2d", "Conv3d"]
