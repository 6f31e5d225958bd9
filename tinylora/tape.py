"""What the tape holds, measured; and a tape that is rebuilt instead of held."""

import copy

from . import backend
from .backend import array_module, is_array
from .tensor import Node, Tensor, accumulate, setting, state


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

    def pull(g, need):
        fresh = [Tensor(x, n) for x, n in zip(arrays, need, strict=True)]
        with backend.using_generator(copy.deepcopy(rng)), setting("mode", "record"):
            again = fn(*fresh)
        if state.watch is not None:
            state.watch(again)
        inside = {}
        again.backward(g, into=inside)
        gradients = [inside.pop(x, None) for x in fresh]
        for leaf, h in inside.items():  # parameters that fn reached by itself
            accumulate(state.sink, leaf, h, True)
        return [xp.zeros_like(x) if n and h is None else h for x, h, n in zip(arrays, gradients, need, strict=True)]

    xp = array_module(out.data)
    arrays = [x.data for x in xs]
    places = [i for i, x in enumerate(xs) if x.requires_grad]
    result = Tensor(out.data)
    result.requires_grad = True
    result._node = Node("checkpoint", out.data, [xs[i]._node or xs[i] for i in places], places, len(xs), pull)
    return result


def watch_rebuilds(callback):
    """Within the block, callback(y) sees each y that a checkpoint rebuilds in this thread: its tape is on top of the one held."""
    return setting("watch", callback)


def tape_bytes(*tensors, exclude=()):
    """Bytes that the tape behind these tensors keeps alive for the backward pass.

    Walks what the surviving closures captured: arrays (each buffer once, a view counts as the whole buffer it keeps
    alive) and plain data made of arrays, such as a QuantizedTensor. Leaves that a pullback captured (weights) are
    counted too, unless their arrays (or Tensors, or stored weights) are listed in `exclude`.
    """
    skip, listed = set(), list(exclude)
    while listed:
        thing = listed.pop()
        if is_array(thing):
            skip.add(id(_owner(thing)))
        elif thing is not None and not isinstance(thing, (str, bytes, int, float)):
            listed.extend(_contents(thing))
    buffers, seen = {}, set()
    nodes = [t._node for t in tensors if t._node is not None]
    stack = []
    while nodes or stack:
        if not stack:
            node = nodes.pop()
            if id(node) not in seen:
                seen.add(id(node))
                nodes.extend(p for p in node.parents if isinstance(p, Node))
                stack.append(node.pullbacks)
            continue
        thing = stack.pop()
        if is_array(thing):
            owner = _owner(thing)
            if id(owner) not in skip:
                buffers[id(owner)] = owner.nbytes
        elif thing is None or isinstance(thing, (str, bytes, int, float, type)) or id(thing) in seen:
            continue
        else:
            seen.add(id(thing))
            stack.extend(_contents(thing))
    return sum(buffers.values())


def _owner(array):
    while getattr(array, "base", None) is not None and is_array(array.base):
        array = array.base
    return array


def _contents(thing):
    if isinstance(thing, Tensor):
        return [thing.data]
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, (tuple, list)):
        return list(thing)
    if hasattr(thing, "__dataclass_fields__"):
        return [getattr(thing, name) for name in thing.__dataclass_fields__]
    if getattr(thing, "__closure__", None):
        return [cell.cell_contents for cell in thing.__closure__]
    return []
