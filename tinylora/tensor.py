"""A tensor that remembers how it was made, and the walk that turns a loss into gradients.

An operation is written once, as a forward equation with its pullbacks beside it:

    @primitive
    def mul(x, y):
        "z = x y;   x̄ = ḡ y,   ȳ = ḡ x"
        return x * y, (lambda g: g * y,
                       lambda g: g * x)

`primitive` runs the forward on plain arrays and keeps a pullback only for an input that needs a gradient. The other
closures are dropped together with all they captured. So the tape *is* the set of surviving closures: a frozen weight
has no weight-gradient pullback at all, `tape_bytes` measures what is held by walking the closures, and LoRA's saving
can be asserted instead of believed.

Three things are done here once so that no operation has to:
  * broadcasting is undone: the adjoint of broadcasting is summation (`unbroadcast`);
  * a tensor that is used twice receives the sum of what comes back (b = a + a gives ā = 2 b̄);
  * the order is the order of creation, backwards: an operation is always younger than its inputs, so no recursion and no
    sort is needed, and a model deeper than Python's stack is no problem.

Compared with torch: no double backward (nothing in LoRA or QLoRA needs one), no views that share a gradient, no
in-place operations on tensors. `checkpoint` is torch's reentrant checkpoint without its trap: it works when only
parameters inside the function need gradients.
"""

import contextlib
import functools
import heapq
import itertools
import threading

import numpy as np

from . import backend
from .backend import array_module, is_array


class _State(threading.local):
    mode = "record"  # "record": build the tape; "probe": only work out requires_grad; "off": neither
    sink = None  # where backward puts the gradients of leaves, if not into .grad
    watch = None  # called with each tensor that a checkpoint rebuilds, before its tape is walked


state = _State()
_clock = itertools.count()


class Node:
    """One step of the tape: where its inputs came from, and how a gradient goes back to them.

    parents     a Node for an intermediate input, the Tensor itself for a leaf; only inputs that need a gradient
    pullbacks   one function a parent, or a single function of (g, need) for all of them; None once used
    Intermediate data is not held here: what is kept is what the pullbacks captured.
    """

    __slots__ = ("order", "name", "shape", "dtype", "parents", "places", "arity", "pullbacks")

    def __init__(self, name, out, parents, places, arity, pullbacks):
        self.order = next(_clock)
        self.name, self.shape, self.dtype = name, out.shape, out.dtype
        self.parents, self.places, self.arity, self.pullbacks = parents, places, arity, pullbacks

    def gradients(self, g):
        """[(parent, gradient)] for this step's output gradient g; the pullbacks are released on the way."""
        pullbacks, self.pullbacks = self.pullbacks, None
        if callable(pullbacks):
            need = tuple(i in self.places for i in range(self.arity))
            every = pullbacks(g, need)
            return [(p, every[i]) for p, i in zip(self.parents, self.places, strict=True)]
        return [(p, pull(g)) for p, pull in zip(self.parents, pullbacks, strict=True)]


class Tensor:
    """An array and, if it came out of an operation on something that needs a gradient, its place on the tape.

    data            the NumPy or CuPy array
    grad            for a leaf with requires_grad: the accumulated gradient, an array of the same shape; else None
    requires_grad   True for a leaf that asks for a gradient and for everything computed from it

    Tensor([1, 2]) makes float32; float64 arrays stay float64; integers must be cast by the caller (token ids are plain
    arrays).
    """

    __slots__ = ("data", "grad", "requires_grad", "_node", "__weakref__")
    __array_ufunc__ = None  # so that ndarray + Tensor comes to Tensor.__radd__ instead of an array of objects

    def __init__(self, data, requires_grad=False):
        if isinstance(data, Tensor):
            raise TypeError("Tensor(x): x is a Tensor already; use x, or Tensor(x.data) for a tensor off the tape")
        if not is_array(data):
            data = np.asarray(data, dtype=data.dtype if isinstance(data, np.generic) else np.float32)
        if requires_grad and data.dtype.kind != "f":
            raise TypeError(f"Tensor: only floats have gradients, and this array is {data.dtype}")
        self.data, self.grad, self.requires_grad, self._node = data, None, requires_grad, None

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    nbytes = property(lambda self: self.data.nbytes)
    device = property(lambda self: backend.device_of(self.data))

    @property
    def is_leaf(self):
        return self._node is None

    def item(self):
        """The only element, as a Python float."""
        return self.data.item()

    def numpy(self):
        """The array on the host (a counted transfer if it lives on a device)."""
        return backend.move(self.data, "cpu")

    def to(self, device):
        """A leaf with the same values on another device ("cpu", "cuda"). Off the tape: moving is not differentiated."""
        return Tensor(backend.move(self.data, device), self.requires_grad)

    def detach(self):
        """The same data, off the tape."""
        return Tensor(self.data)

    def __len__(self):
        return len(self.data)

    def __repr__(self):
        tail = ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({np.array2string(self.numpy(), precision=4, threshold=20, prefix='Tensor(')}{tail})"

    def backward(self, gradient=None, into=None):
        """x̄ = (∂y/∂x)ᵀ ȳ for every leaf x that this tensor y was computed from, added to x.grad.

        gradient   ȳ, of this tensor's shape; may be left out for a single number (ȳ = 1)
        into       a dict {leaf: array} that receives the gradients instead of `.grad` (data-parallel shards use it)

        The tape is released as it is walked; a second backward through it raises RuntimeError. If anything fails on the
        way, no leaf has been touched. No double backward: the gradients are plain arrays.
        """
        if not self.requires_grad:
            raise RuntimeError("backward: this tensor was not computed from anything with requires_grad=True")
        xp = array_module(self.data)
        if gradient is None:
            if self.size != 1:
                raise ValueError(
                    f"backward: the tensor has shape {self.shape}; give a gradient of that shape, "
                    "or reduce it to one number first"
                )
            gradient = xp.ones(self.shape, dtype=self.dtype)
        gradient = gradient.data if isinstance(gradient, Tensor) else gradient
        if gradient.shape != self.shape:
            raise ValueError(f"backward: the gradient has shape {gradient.shape}, the tensor {self.shape}")
        sink = into if into is not None else state.sink
        with setting("sink", sink if sink is not None else {}) as found:
            leaves = _walk(self, gradient)
            for leaf, (g, owned) in leaves.items():
                accumulate(found, leaf, g, owned)
        if sink is None:
            for leaf, g in found.items():
                leaf.grad = g if leaf.grad is None else _as_array(leaf.grad + g)


def accumulate(found, leaf, g, owned):
    if leaf in found:
        found[leaf] += g
    else:
        found[leaf] = g if owned else g.copy()


def _as_array(x):
    """NumPy's arithmetic on 0-d arrays makes scalars, which cannot be added to in place."""
    return np.asarray(x) if isinstance(x, np.generic) else x


@contextlib.contextmanager
def setting(name, value):
    """Within the block, this thread's `_state.name` is `value`."""
    before = getattr(state, name)
    setattr(state, name, value)
    try:
        yield value
    finally:
        setattr(state, name, before)


def _walk(root, gradient):
    """{leaf: (gradient, owned)}: visit nodes youngest first; each passes what it received on to its parents."""
    leaves, waiting, heap = {}, {}, []

    def receive(key, table, h, owned):
        if key not in table:
            table[key] = (h, owned)
            if table is waiting:
                heapq.heappush(heap, (-key.order, key))
            return
        so_far, ours = table[key]
        if ours:
            so_far += h
        else:
            table[key] = (_as_array(so_far + h), True)

    receive(root if root.is_leaf else root._node, leaves if root.is_leaf else waiting, gradient, False)
    while heap:
        _, node = heapq.heappop(heap)
        g, _ = waiting.pop(node)
        if node.pullbacks is None:
            raise RuntimeError(
                f"backward: the tape behind this {node.name} was already walked and released; "
                "run the forward again before a second backward"
            )
        for parent, h in node.gradients(g):
            h = _as_array(h)
            fresh = h is not g and h.base is None  # else h may share memory with something that is still in use
            summed = unbroadcast(h, parent.shape)
            if summed.shape != parent.shape:
                raise RuntimeError(
                    f"{node.name}: a pullback returned shape {h.shape} for an input of shape {parent.shape}"
                )
            if summed.dtype != parent.dtype:
                summed = summed.astype(parent.dtype)
            receive(parent, waiting if isinstance(parent, Node) else leaves, summed, fresh or summed is not h)
    return leaves


def unbroadcast(g, shape):
    """The adjoint of broadcasting is summation: sum g over every axis along which `shape` was stretched."""
    if g.shape == shape:
        return g
    extra = g.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(extra + i for i, n in enumerate(shape) if n == 1 and g.shape[extra + i] != 1)
    return g.sum(axis=axes, keepdims=True).reshape(shape) if axes else g


def primitive(forward):
    """Turn `forward(*arrays, **options) -> (array, pullbacks)` into an operation on Tensors.

    Each positional argument may be a Tensor, an array or plain data; keyword arguments are options and have no
    gradient. `pullbacks` is a tuple with one function g -> x̄ for each leading positional argument, or, where the
    arguments share the work, one function (g, need) -> (x̄, ȳ, ...) that may return None where need is False.

    A pullback returns g itself, a view, or a new array; never an array that it captured. It must capture only what it
    uses: what it captures is the memory that training costs.
    """

    @functools.wraps(forward)
    def operation(*args, **options):
        raw = [a.data if isinstance(a, Tensor) else a.item() if isinstance(a, np.generic) else a for a in args]
        _same_device(forward.__name__, raw)
        for name, value in options.items():
            if isinstance(value, Tensor):
                raise TypeError(f"{forward.__name__}: {name} is a Tensor and must be given by position, not by name")
        out, pullbacks = forward(*raw, **options)
        places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
        result = Tensor(out)
        if not places or state.mode == "off":
            return result
        result.requires_grad = True
        if state.mode == "record":
            kept = pullbacks if callable(pullbacks) else tuple(pullbacks[i] for i in places)
            parents = [args[i]._node or args[i] for i in places]
            result._node = Node(forward.__name__, result.data, parents, places, len(args), kept)
        return result

    return operation


def _same_device(name, raw):
    kinds = {array_module(a) for a in raw if is_array(a)}
    if len(kinds) > 1:
        where = ", ".join(f"argument {i} on {backend.device_of(a)}" for i, a in enumerate(raw) if is_array(a))
        raise TypeError(f"{name}: arrays on different devices ({where}); move one with .to(device)")


def no_grad():
    """Within the block no tape is built: nothing is captured, and results do not require a gradient."""
    return setting("mode", "off")
