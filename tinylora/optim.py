"""AdamW as one elementwise equation that runs page by page, and the clipping of gradients.

For a parameter p with gradient g, at step t = 1, 2, … with the learning rate η and the weight decay λ,

    m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
    p ← p − η λ p
    p ← p − η m̂ / (√v̂ + ε),        m̂ = m/(1 − β₁ᵗ),  v̂ = v/(1 − β₂ᵗ)

This is algorithm 2 of Loshchilov & Hutter 2019 in the form that torch has: the decay is scaled by η and comes first.

No element depends on another. So the update of a tensor is the update of its pieces, in any order, and m and v can
be kept in pages (QLoRA §3, "Paged Optimizers"; see `paging`). A page holds m in its first row and v in its second.
Whatever the budget of pages is, the parameters end with the same bits.

Differs from torch and bitsandbytes: every second step goes through the pages from the last to the first, so that the
pages that are still resident are used first. On a GPU the equation is one kernel (`kernels.device`).

Leaves out: AMSGrad, sparse gradients, and learning-rate schedules (`training.schedule`). AdamW with its state in 8 bits is
`training.adamw8bit`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .backend import array_module
from .kernels import device
from .kernels.buffers import buffer
from .kernels.pagewise import over_pages
from .paging import Pager
from .tensor import Tensor


def adamw_step(p, g, m, v, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """One AdamW update of p, m and v in place (the module's equation), for step t = 1, 2, …

    p, g, m, v: vectors of one length. What is computed has the dtype of m and v: float32.
    """
    xp, (b1, b2) = array_module(p), betas
    a, b = buffer("a, b", (2, len(p)), m.dtype) if xp is np else xp.empty((2, len(p)), m.dtype)
    g = g.astype(m.dtype, copy=False)
    m *= b1  # m ← β₁ m + (1 − β₁) g
    xp.multiply(g, 1 - b1, out=a)
    m += a
    v *= b2  # v ← β₂ v + (1 − β₂) g²
    xp.multiply(g, g, out=a)
    a *= 1 - b2
    v += a
    xp.sqrt(v, out=a)  # a = √v̂ + ε
    a *= 1 / math.sqrt(1 - b2**t)
    a += eps
    xp.divide(m, a, out=b)  # b = η m̂ / a
    b *= lr / (1 - b1**t)
    if weight_decay:
        p *= 1 - lr * weight_decay
    p -= b


@dataclass
class Slot:
    """A parameter, its group's settings, the pages of its state, and t: how often it has had a gradient."""

    name: str
    p: Tensor
    group: dict
    pages: Sequence
    t: int = 0


class AdamW:
    """AdamW over parameters, or over groups [{"params": [...], "lr": ..., "weight_decay": ...}, ...].

    params may be Tensors or (name, Tensor) pairs, and no two may share memory; names appear in `state_dict`. With `pager`, the state lives
    in its pages and is updated as they come (`kernels.pagewise`): for every budget the parameters equal those of the unpaged optimizer bit
    for bit.

    Every second step goes through the pages from the last to the first (`back_and_forth`). No element depends on another, so no bit
    changes; but the pages used last are the ones that are still resident. If every step began at the first page, the least recently
    used page would always be the one that is needed next: with any budget below the total, every page would move in every step.
    """

    back_and_forth = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, pager=None):
        # Without a pager nothing is paged: a parameter's state is one page.
        self.pager = Pager(page_bytes=1 << 60) if pager is None else pager
        self.step_count, self.eps, self.betas = 0, eps, tuple(betas)
        params, kind = list(params), type(self).__name__
        groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        self.groups = [{"lr": lr, "weight_decay": weight_decay, **g} for g in groups]
        self._slots, seen = [], set()
        for group in self.groups:
            for entry in group["params"]:
                name, p = entry if isinstance(entry, tuple) else (f"param{len(self._slots)}", entry)
                if not p.requires_grad:
                    raise ValueError(f"{kind}: parameter {name} does not require a gradient; leave it out")
                if not p.size:
                    raise ValueError(f"{kind}: parameter {name} of shape {p.shape} has no element; leave it out")
                part = self.pager.xp is np and any(np.shares_memory(p.data, other.p.data) for other in self._slots)
                if part or seen & {id(p), name}:
                    raise ValueError(f"{kind}: parameter {name} of shape {p.shape} is given twice; leave one out")
                seen |= {id(p), name}
                self._slots.append(Slot(name, p, group, self._allocate(p)))
        if not self._slots:
            raise ValueError(f"{kind}: there is nothing to optimize; no parameter requires a gradient")

    @property
    def state_bytes(self):
        """Bytes of m and v together, wherever they are."""
        return self.pager.total_bytes

    def step(self, lr_scale=1.0):
        """Apply the gradients (p.grad); a parameter without one is left alone, and its t stands still. lr_scale multiplies every lr.

        Where a page cannot be brought, the error is raised, and some pages before it have had the step: load a state of before.
        """
        self.step_count += 1
        self.pager.step = self.step_count
        slots = [slot for slot in self._slots if slot.p.grad is not None]
        for slot in slots:
            slot.t, p, xp = slot.t + 1, slot.p, array_module(slot.p.data)  # the flat views below must be no copies
            p.data, p.grad = (x if x.flags.c_contiguous else xp.ascontiguousarray(x) for x in (p.data, p.grad))
        todo = [(slot, i) for slot in slots for i in range(len(slot.pages))]
        if self.back_and_forth and self.step_count % 2 == 0:
            todo.reverse()

        def update(k, page, first):  # page: what page i of the slot holds from its element `first` on
            slot, i = todo[k]
            start = i * self.pager.shape(slot.pages[0])[1] + first
            p, g = (x.reshape(-1)[start : start + page.shape[1]] for x in (slot.p.data, slot.p.grad))
            self._update(slot, page, p, g, start, slot.group["lr"] * lr_scale)

        over_pages(update, self.pager, [slot.pages[i] for slot, i in todo])

    def _allocate(self, p):
        """The pages of a parameter's state."""
        return self.pager.allocate(2, p.size)

    def _update(self, slot, page, p, g, start, lr):
        """Update p, which begins at element `start` of the slot's parameter, and its page of state."""
        numbers = slot.t, lr, self.betas, self.eps, slot.group["weight_decay"]
        if device.compiles(p, g, *page):
            device.adamw_step(p, g, *page, *numbers)
        else:
            adamw_step(p, g, *page, *numbers)

    def zero_grad(self):
        for slot in self._slots:
            slot.p.grad = None

    def state_dict(self):
        """{"name.m": array, "name.v": array} in the parameters' shapes, each one's "name.t", and "step"."""
        state = {"step": np.array(self.step_count)}
        for slot in self._slots:
            state |= {f"{slot.name}.t": np.array(slot.t)} | {
                f"{slot.name}.{part}": values for part, values in self._read(slot).items()
            }
        return state

    def load_state_dict(self, state):
        """Restore what `state_dict` gave."""
        for slot in self._slots:
            for part, now in self._read(slot).items():
                saved = state.get(f"{slot.name}.{part}")
                if saved is None or (saved.shape, saved.dtype) != (now.shape, now.dtype):
                    what = f"{slot.name}.{part} of shape {now.shape}, {now.dtype}"
                    raise ValueError(f"{type(self).__name__}: the saved state has no {what}")
        each = [f"{slot.name}.t" for slot in self._slots]
        state = {**dict.fromkeys(each, state.get("step")), **state}  # older files have the optimizer's steps alone
        for name in ("step", *each):
            n = state.get(name)
            if n is None or n.shape != () or n.dtype.kind not in "iu" or n < 0:
                raise ValueError(f"{type(self).__name__}: the saved state has {name} = {n}, expected a number of steps")
        for slot in self._slots:  # only now that everything was found fit
            self._write(slot, {part: state[f"{slot.name}.{part}"] for part in self._read(slot)})
            slot.t = int(state[f"{slot.name}.t"])
        self.step_count = int(state["step"])

    def _read(self, slot):
        """{part: array}: a slot's state, on the host."""
        m, v = self.pager.read(slot.pages)
        return {"m": m.reshape(slot.p.shape), "v": v.reshape(slot.p.shape)}

    def _write(self, slot, parts):
        """Overwrite a slot's state with what `_read` gave."""
        self.pager.write(slot.pages, np.stack([parts["m"].reshape(-1), parts["v"].reshape(-1)]))


def clip_grad_norm(params, max_norm, norm=None):
    """g ← g · min(1, max_norm / ‖g‖₂) over all gradients together; returns ‖g‖₂ before clipping (Pascanu et al. 2013)."""
    grads = [p.grad for p in params if p.grad is not None]
    total = math.sqrt(sum(device.squares(grads))) if norm is None else norm
    if total > max_norm:
        for g in grads:
            g *= max_norm / total
    return total
