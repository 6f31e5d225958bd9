"""FLOPs counted, not estimated: watch every matrix product that the engine really makes, forward and backward.

    (m × k)(k × n) costs m n k multiply-adds, 2 m n k FLOPs

    one N × N layer, a token                forward        backward                              together
    full fine-tuning                        N²             x̄: N²,  W̄: N²                         3 N²
    LoRA of rank R                          N² + 2 N R     x̄: N² + 2 N R,  Ā, B̄: 2 N R           2 N² + 6 N R
    the same without x̄ (a first layer)      N² + 2 N R     through B: N R,  Ā, B̄: 2 N R          N² + 5 N R      (full: 2 N²)

in multiply-adds ("LoRA Without Regret", Thinking Machines Lab 2025, has the first two; they are 6 N² and 4 N² + 12 N R FLOPs).
So a LoRA step costs about 2/3 of a full one as R/N → 0, and as much where R = N/6. Nothing below a model's first adapter
needs x̄: the lowest adapted layers of a model whose inputs are tokens are of the last kind.

    with counting() as count:
        loss(model(x)).backward()
    count.flops, count.products

How: inside the block `Tensor.data`, and each gradient that enters a pullback, is handed out as a view of a subclass of
ndarray. `@` is the ufunc matmul, so the subclass sees it, and its results are of the subclass again. The engine is not
changed and computes the same bits.

Counted are matmuls (also those of attention, a frozen layer, `delta` and `merge`); row-wise dot products (`vecdot`, in
norms and softmax) are listed, and are no part of `flops`. Not seen: additions, exponentials, dequantization, `np.dot` and
`np.einsum`, which the engine does not use. NumPy arrays only; one counter at a time, and it sees every thread.
"""

import contextlib
import threading
from dataclasses import dataclass, field

import numpy as np

from ..tensor import Node, Tensor


@dataclass(frozen=True)
class Product:
    """One product: "matmul" or "vecdot", the operands' shapes, and the multiply-adds it took."""

    kind: str
    left: tuple
    right: tuple
    multiply_adds: int


@dataclass
class Count:
    """What was watched."""

    products: list = field(default_factory=list)

    @property
    def multiply_adds(self):
        """Σ m n k over the matmuls."""
        return sum(p.multiply_adds for p in self.products if p.kind == "matmul")

    @property
    def flops(self):
        """2 Σ m n k: a multiply-add is two operations."""
        return 2 * self.multiply_adds


_in_use = threading.Lock()


@contextlib.contextmanager
def counting():
    """Σ 2 m n k over the products made inside the block. -> Count, complete when the block ends; RuntimeError if one is open already."""
    if not _in_use.acquire(blocking=False):
        raise RuntimeError("flops: a counter is open already; one block at a time")
    count, data, gradients = Count(), Tensor.data, Node.gradients

    class Watched(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
            result = getattr(ufunc, method)(
                *map(_plain, inputs), **options, **({"out": tuple(map(_plain, out))} if out else {})
            )
            if method == "__call__" and ufunc in (np.matmul, np.vecdot):
                left, right = (np.shape(x) for x in inputs)
                count.products.append(Product(ufunc.__name__, left, right, int(np.size(result)) * left[-1]))
            if out:
                return out[0]
            return result.view(Watched) if isinstance(result, np.ndarray) else result

    def watched(x):
        if not isinstance(x, np.ndarray):
            raise TypeError("flops: only NumPy arrays can be watched; move the model and its inputs to the cpu")
        return x.view(Watched)

    try:
        Tensor.data = property(lambda self: watched(data.__get__(self)), lambda self, x: data.__set__(self, _plain(x)))
        Node.gradients = lambda self, g: [(p, _plain(h)) for p, h in gradients(self, watched(g))]
        yield count
    finally:
        Tensor.data, Node.gradients = data, gradients
        _in_use.release()


def _plain(x):
    return x.view(np.ndarray) if isinstance(x, np.ndarray) and type(x) is not np.ndarray else x


def full(n_in, n_out=None, input_gradient=True):
    """3 N_in N_out multiply-adds a token for a trained layer, forward and backward; 2 N_in N_out where x needs no gradient.

    Square if n_out is left out.
    """
    return n_in * (n_out or n_in) * (3 if input_gradient else 2)


def lora(n_in, r, n_out=None, input_gradient=True):
    """2 N_in N_out + 3 R (N_in + N_out) multiply-adds a token, forward and backward; 2 N² + 6 N R for a square layer.

    Where x needs no gradient: N_in N_out + R (2 N_in + 3 N_out), since x̄ is left out of the base layer and of A.
    """
    n_out = n_out or n_in
    if input_gradient:
        return 2 * n_in * n_out + 3 * r * (n_in + n_out)
    return n_in * n_out + r * (2 * n_in + 3 * n_out)
