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

How: inside the block `tensor.state.around` runs this thread's forwards and pullbacks, and shows them their arrays as views of a
subclass of ndarray. `@` is the ufunc matmul, so the subclass sees it, and its results are of the subclass again. The engine
computes the same bits, and other threads never notice; `train.workers` hands the counter on to its own.

Counted are matmuls (also those of attention, a frozen layer, `delta` and `merge`); row-wise dot products (`vecdot`, in
norms and softmax) are listed, and are no part of `flops`. Not seen: additions, exponentials, dequantization, `np.dot` and
`np.einsum`, which the engine does not use; products outside its operations, as in PiSSA's start or VeRA's `delta`. NumPy arrays
only; one counter at a time in a thread.
"""

import contextlib
from dataclasses import dataclass, field

import numpy as np

from ..backend import is_array
from ..tensor import setting, state


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


@contextlib.contextmanager
def counting():
    """Σ 2 m n k over the products made inside the block. -> Count, complete when the block ends; RuntimeError if one is open already."""
    if state.around is not None:
        raise RuntimeError("flops: a counter is open already; one block at a time")
    count = Count()

    class Watched(np.ndarray):
        counted = count.products  # None once the block has ended: a tape that outlives it holds views of this class

        def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
            if out:
                options["out"] = _plain(out)
            result = getattr(ufunc, method)(*_plain(inputs), **options)
            if Watched.counted is None:
                return result
            if method == "__call__" and ufunc in (np.matmul, np.vecdot):
                left, right = map(np.shape, inputs)
                Watched.counted.append(Product(ufunc.__name__, left, right, np.size(result) * left[-1]))
            if out:
                return out[0]
            return result.view(Watched) if isinstance(result, np.ndarray) else result

    def watched(x):
        if not is_array(x):
            return x
        if not isinstance(x, np.ndarray):
            raise TypeError("flops: only NumPy arrays can be watched; move the model and its inputs to the cpu")
        return x.view(Watched)

    def around(f, *arguments, **options):
        return _plain(f(*map(watched, arguments), **options))

    try:
        with setting("around", around):
            yield count
    finally:
        Watched.counted = None


def _plain(x):
    """x, an array of a subclass as one of ndarray itself; in a tuple or a list each of them."""
    if isinstance(x, (tuple, list)):
        return type(x)(map(_plain, x))
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
