"""A tensor that remembers how it was made, and the walk that turns a loss into gradients.

Write x̄ = ∂L/∂x for the gradient of the loss L with respect to x. An operation z = f(x) has a pullback, the function that
maps z̄ to x̄. An operation is written once, as a forward equation with one pullback for each argument beside it. The gradient of
the output is called g in the code and ḡ in the equations:

    @primitive
    def mul(x, y):
        "z = x y;   x̄ = ḡ y,   ȳ = ḡ x"
        return x * y, (lambda g: g * y,
                       lambda g: g * x)

`primitive` runs the forward equation on plain arrays. It keeps a pullback only for an input that needs a gradient, and
drops the other pullbacks together with all that they captured. The tape is the set of pullbacks that are left. A frozen
weight has no weight-gradient pullback, so what LoRA saves can be measured (`tape.tape_bytes`).

Three things are done here once, so that no operation has to do them:
  * Broadcasting is undone. If an input was stretched, its gradient is summed over the stretched axes (`unbroadcast`).
  * A tensor that is used twice receives the sum of what comes back: b = a + a gives ā = 2 b̄.
  * The walk (`chain_rule`) visits operations from the youngest to the oldest. Every operation that uses a result is younger
    than the one that made it, so a gradient is complete when its operation is visited. There is no recursion, so a deep model
    cannot hit Python's recursion limit.

Differs from torch: gradients are plain arrays. Views do not share a gradient, and no operation works in place.

Leaves out: double backward (the gradient of a gradient), which nothing in LoRA or QLoRA needs.
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
    watch = staticmethod(lambda y: None)  # called with each tensor that a checkpoint rebuilds
    around = None  # called as around(f, *arguments) in place of every forward and pullback f; costs/flops.py counts products with it


state = _State()
_clock = itertools.count()


def _call(f, *arguments, **options):
    return f(*arguments, **options)


class Node:
    """One step of the tape: where its inputs came from, and how a gradient goes back to them.

    order       when it was made: a later step has a larger number
    parents     a Node for an intermediate input, the Tensor itself for a leaf; only inputs that need a gradient
    places      which of the operation's arguments the parents are; arity: how many arguments it has
    pullbacks   one function per parent, or a single function of (g, need) for all of them; None once used

    Intermediate data is not held here: what is kept is what the pullbacks captured.
    """

    __slots__ = ("order", "name", "shape", "dtype", "parents", "places", "arity", "pullbacks")

    def __init__(self, name, out, parents, places, arity, pullbacks):
        self.order = next(_clock)
        self.name, self.shape, self.dtype = name, out.shape, out.dtype
        self.parents, self.places, self.arity, self.pullbacks = parents, places, arity, pullbacks

    def __lt__(self, other):
        return self.order > other.order  # the youngest comes first

    def contributions(self, g):
        """Yield (parent, its gradient, fresh) for the gradient g of this step's output; fresh: nothing else uses that memory.

        The pullbacks are released.
        """
        pullbacks, self.pullbacks = self.pullbacks, None
        if pullbacks is None:
            raise RuntimeError(
                f"backward: the tape behind this {self.name} was already walked and released; "
                "run the forward again before a second backward"
            )
        around = state.around or _call
        if callable(pullbacks):
            every = around(pullbacks, g, tuple(i in self.places for i in range(self.arity)))
            pullbacks = [every[i] for i in self.places]
        for parent, h in zip(self.parents, pullbacks, strict=True):
            h, shape, dtype = _as_array(around(h, g) if callable(h) else h), parent.shape, parent.dtype
            fitted = h if h.shape == shape and h.dtype == dtype else unbroadcast(h, shape).astype(dtype, copy=False)
            if fitted.shape != shape:
                raise RuntimeError(f"{self.name}: a pullback returned shape {h.shape} for an input of shape {shape}")
            # fresh: made here, or neither g nor a view
            yield parent, fitted, fitted is not h or (h is not g and h.base is None)


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

    is_leaf = property(lambda self: self._node is None)

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
        if gradient is None:
            if self.size != 1:
                raise ValueError(
                    f"backward: the tensor has shape {self.shape}; give a gradient of that shape, "
                    "or reduce it to one number first"
                )
            gradient = array_module(self.data).ones(self.shape, dtype=self.dtype)
        gradient = gradient.data if isinstance(gradient, Tensor) else gradient
        if gradient.shape != self.shape:
            raise ValueError(f"backward: the gradient has shape {gradient.shape}, the tensor {self.shape}")
        sink = into if into is not None else state.sink
        # a checkpoint's pullback adds the gradients of its parameters to state.sink during the walk
        with setting("sink", sink if sink is not None else {}) as found:
            for leaf, g in chain_rule(self, gradient).items():
                accumulate(found, leaf, g)
        if sink is None:
            for leaf, g in found.items():
                leaf.grad = g if leaf.grad is None else _as_array(leaf.grad + g)


def chain_rule(y, gradient):
    """x̄ = Σ (∂z/∂x)ᵀ z̄ over every operation z that x went into, from y down to the leaves. -> {leaf: gradient}

    The operations are visited from the youngest to the oldest. Whatever was computed from an operation's result is younger
    than the operation, so its gradient is complete when it is visited. A visit has three steps:

        look up      the gradient z̄ of the operation's output
        contribute   its pullbacks turn z̄ into one gradient for each input
        sum          an input that went into several operations receives the sum of what comes back
    """
    # ours: those whose array nothing else uses, so that it may be written to
    sums, ours = {y._node or y: gradient}, set()
    waiting = [y._node] if y._node else []  # a heap, the youngest operation first
    while waiting:
        node = heapq.heappop(waiting)
        g = sums.pop(node)  # look up
        for parent, h, fresh in node.contributions(g):  # contribute
            if parent in ours:  # sum
                sums[parent] += h
                continue
            if parent not in sums and isinstance(parent, Node):
                heapq.heappush(waiting, parent)
            if fresh or parent in sums:
                ours.add(parent)
            sums[parent] = _as_array(sums[parent] + h) if parent in sums else h
    return {leaf: g if leaf in ours else g.copy() for leaf, g in sums.items()}


def accumulate(found, leaf, g):
    """found[leaf] += g, where g belongs to nobody else."""
    if leaf in found:
        found[leaf] += g
    else:
        found[leaf] = g


def _as_array(x):
    """NumPy's arithmetic on 0-d arrays makes scalars, which cannot be added to in place."""
    return np.asarray(x) if isinstance(x, np.generic) else x


class setting(contextlib.ContextDecorator):
    """Within the block, or within the function that it decorates, this thread's `state.name` is `value`."""

    def __init__(self, name, value):
        self.name, self.value, self.before = name, value, []

    def _recreate_cm(self):  # for each call of a decorated function, which several threads may make
        return setting(self.name, self.value)

    def __enter__(self):
        self.before.append(getattr(state, self.name))
        setattr(state, self.name, self.value)
        return self.value

    def __exit__(self, *error):
        setattr(state, self.name, self.before.pop())


def unbroadcast(g, shape):
    """Broadcasting copies, so its pullback sums: Σ g over every axis along which `shape` was stretched."""
    if g.shape == shape:
        return g
    extra = g.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(extra + i for i, n in enumerate(shape) if n == 1 and g.shape[extra + i] != 1)
    return g.sum(axis=axes, keepdims=True).reshape(shape) if axes else g


def primitive(forward):
    """Turn `forward(*arrays, **options) -> (array, pullbacks)` into an operation on Tensors.

    Each positional argument may be a Tensor, an array or plain data; keyword arguments are options and have no
    gradient. `pullbacks` is a tuple with one function g -> x̄ for each leading positional argument, or, where the
    arguments share the work, one function (g, need) -> (x̄, ȳ, ...) that may return None where need is False, and a pullback where it
    should run when its turn comes.

    A pullback returns g itself, a view, or a new array; never an array that it captured. It must capture only what it
    uses: what it captures is the memory that training costs.

    operation.fused is what runs in forward's place for arrays on a device: the same in fewer kernels (see kernels.device).
    """

    @functools.wraps(forward)
    def operation(*args, **options):
        raw = [a.data if isinstance(a, Tensor) else a.item() if isinstance(a, np.generic) else a for a in args]
        on_device = _same_device(forward.__name__, raw)
        for name, value in options.items():
            if isinstance(value, Tensor):
                raise TypeError(f"{forward.__name__}: {name} is a Tensor and must be given by position, not by name")
        around, run = state.around or _call, operation.fused if on_device else forward
        out, pullbacks = around(run, *raw, **options)
        return on_tape(forward.__name__, Tensor(out), args, pullbacks)

    operation.fused = forward
    return operation


def on_tape(name, result, args, pullbacks, needed=False):
    """result, with the pullbacks of those arguments that need a gradient; all other pullbacks are dropped here, with what they captured.

    needed: the result needs a gradient whatever the arguments do (`tape.checkpoint` reaches parameters by itself)
    """
    places, mode = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad], state.mode
    result.requires_grad = (bool(places) or needed) and mode != "off"
    if result.requires_grad and mode == "record":
        kept = pullbacks if callable(pullbacks) else [pullbacks[i] for i in places]
        result._node = Node(name, result.data, [args[i]._node or args[i] for i in places], places, len(args), kept)
    return result


def _same_device(name, raw):
    """Whether the arrays among the arguments lie on a device other than the host; TypeError if not all do."""
    kinds = {backend.module_of_arrays(type(a)) for a in raw}
    kinds.discard(None)
    if len(kinds) > 1:
        where = ", ".join(f"argument {i} on {backend.device_of(a)}" for i, a in enumerate(raw) if is_array(a))
        raise TypeError(f"{name}: arrays on different devices ({where}); move one with .to(device)")
    return bool(kinds) and np not in kinds


def no_grad():
    """Within the block no tape is built: nothing is captured, and results do not require a gradient."""
    return setting("mode", "off")
