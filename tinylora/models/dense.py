"""Frozen weights kept dense while a text is generated: memory for time, where it is asked for.

    Ŵ = dequantize(q)           once, and not once for each token

A token is one row, so that its product with a matrix takes less time than dequantizing the matrix. The logits are the same in every bit.
The dense weights take 4 bytes each (a model of 7 billion weights: 28 GB, and 3.6 GB in NF4), from the first token until the last.
"""

import contextlib

from ..nn import FrozenLinear


class _Kept:
    """A stored weight whose dense form is kept once it was asked for; all else is the weight's."""

    def __init__(self, weight):
        self.weight, self._dense = weight, {}

    def __getattr__(self, name):
        return getattr(self.weight, name)

    def dequantize(self, dtype=None):
        """The weight's own `dequantize(dtype)`, made once. To be read, not to be written to."""
        if dtype not in self._dense:
            self._dense[dtype] = self.weight.dequantize(dtype)
        return self._dense[dtype]


class DenseWeights:
    """The dense forms of a model's frozen weights: within `with dense():` its layers multiply with them. Outside the model is as it was."""

    def __init__(self, model):
        self._layers = [
            (layer, _Kept(layer.weight)) for _, layer in model.named_modules() if isinstance(layer, FrozenLinear)
        ]

    @contextlib.contextmanager
    def __call__(self):
        stored = [layer.weight for layer, _ in self._layers]
        try:
            for layer, kept in self._layers:
                layer.weight = kept
            yield
        finally:
            for (layer, _), weight in zip(self._layers, stored, strict=True):
                layer.weight = weight
