"""The tape: the memory that the forward pass leaves for the backward pass. Here it is measured, and traded for time.

The tape behind a tensor is the set of arrays that its pullbacks still hold (see `tensor`). `tape_bytes` walks their closures and adds
up the arrays that they keep alive, each buffer once:

    tape_bytes(loss, exclude=model.parameters())

`checkpoint` makes the tape smaller (QLoRA §2; Chen et al. 2016). It runs a function, keeps only the function's inputs, and
runs it again in the backward pass:

    y = fn(x)                    # the tape holds all that fn's operations captured
    y = checkpoint(fn, x)        # the tape holds x

For n equal blocks, the tape is then the inputs of the n blocks and, at any time in the backward pass, the tape of one
block. The price is a second forward pass. The state of the random generator is restored for it, so dropout draws the
same mask.

`watch_rebuilds` calls a function with each output that a checkpoint rebuilds. With `tape_bytes` as that function, it shows how
large the tape of a rebuilt block is.

Differs from torch: torch's reentrant checkpoint passes no gradient on if none of the inputs needs one. Here it is
enough that a parameter inside fn needs one, as under LoRA.

Leaves out: checkpoints that keep a part of what fn captured, and moving the tape to the host. fn takes Tensors and
returns one Tensor.
"""

import copy

from . import backend
from .backend import array_module, is_array
from .tensor import Node, Tensor, accumulate, on_tape, setting, state


def checkpoint(fn, *xs):
    """y = fn(*xs), remembering only xs; the backward pass runs fn again to rebuild what it needs.

    Memory for time: the tape of fn is replaced by its inputs, at the price of a second forward (QLoRA §2, Chen et al.
    2016). The random state at the first run is restored for the second, so dropout draws the same mask. Gradients reach
    xs and every parameter that fn uses. fn takes Tensors and returns one Tensor.
    """
    if state.mode != "record":
        return fn(*xs)
    rng = copy.deepcopy(backend.generator())
    with setting("mode", "probe"):  # find out whether anything inside needs a gradient, without keeping any of it
        out = fn(*xs)
    if not out.requires_grad:
        return out
    xp, arrays = array_module(out.data), [x.data for x in xs]

    def pull(g, need):
        fresh = [Tensor(x, n) for x, n in zip(arrays, need, strict=True)]
        with backend.using_generator(copy.deepcopy(rng)), setting("mode", "record"):
            again = fn(*fresh)
        state.watch(again)
        inside = {}
        again.backward(g, into=inside)
        gradients = [inside.pop(x, None) for x in fresh]
        for leaf, h in inside.items():  # parameters that fn reached by itself
            accumulate(state.sink, leaf, h)
        return [xp.zeros_like(x) if n and h is None else h for x, h, n in zip(arrays, gradients, need, strict=True)]

    return on_tape("checkpoint", Tensor(out.data), xs, pull, needed=True)


def watch_rebuilds(callback):
    """Within the block, callback(y) sees each y that a checkpoint rebuilds in this thread; its tape exists beside the one that is held."""
    return setting("watch", callback)


def tape_bytes(*tensors, exclude=()):
    """Bytes that the tape behind these tensors keeps alive for the backward pass.

    Walks what the surviving closures captured: arrays (each buffer once, a view counts as the whole buffer it keeps
    alive) and plain data made of arrays, such as a QuantizedTensor. Leaves that a pullback captured (weights) are
    counted too, unless their arrays (or Tensors, or stored weights) are listed in `exclude`.
    """
    held, left_out = _buffers([t._node for t in tensors]), _buffers(exclude)
    return sum(buffer.nbytes for key, buffer in held.items() if key not in left_out)


def _buffers(things):
    """{id: array} of the buffers that these things keep alive."""
    found, seen, stack = {}, set(), list(things)
    while stack:
        thing = stack.pop()
        if is_array(thing):
            while getattr(thing, "base", None) is not None and is_array(thing.base):
                thing = thing.base
            found[id(thing)] = thing
        elif id(thing) not in seen:
            seen.add(id(thing))
            stack.extend(_contents(thing))
    return found


def _contents(thing):
    """What a step of the tape, a closure, a container or a dataclass holds."""
    if isinstance(thing, Node):
        return [thing.pullbacks, *(parent for parent in thing.parents if isinstance(parent, Node))]
    if isinstance(thing, Tensor):
        return [thing.data]
    if isinstance(thing, (tuple, list, dict)):
        return list(thing.values() if isinstance(thing, dict) else thing)
    if hasattr(type(thing), "__dataclass_fields__"):
        return [getattr(thing, name) for name in thing.__dataclass_fields__]
    return [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
