"""AdamW with m and v in 8 bits, rounded as bitsandbytes' AdamW8bit rounds them.

    m ← map₁[codes_m] · absmax_m          v ← map₂[codes_v] · absmax_v               (an absmax for each block of 256)
    m ← β₁ m + (1 − β₁) g                 v ← β₂ v + (1 − β₂) g²
    p ← p − η λ p                         p ← p − η m̂ / (√v̂ + ε),     m̂ = m/(1 − β₁ᵗ),  v̂ = v/(1 − β₂ᵗ)
    codes_m, absmax_m ← Q₁(m)             codes_v, absmax_v ← Q₂(v)

map₁ and map₂ are the signed and the unsigned dynamic map (`codebooks.dynamic8`), Q₁ and Q₂ blockwise rounding to them. The state takes
2 + 8/256 bytes a parameter instead of 8. Source: Dettmers et al. 2022 (8-bit Optimizers via Block-wise Quantization), §2; QLoRA §3
pages such states. The two rules are those of bitsandbytes 0.50.2:

| | "bitsandbytes-cpu" (on a CPU) | "bitsandbytes-cuda" (on an NVIDIA H200) |
|---|---|---|
| weight decay | before the update | after the update |
| update | m·(−η/(1 − β₁ᵗ)) / (√v/√(1 − β₂ᵗ) + ε) | η√(1 − β₂ᵗ)/(1 − β₁ᵗ) · (m/(√v + √(1 − β₂ᵗ) ε)) |
| 1 − β | in float64, then rounded | of float32: 1 − f32(0.999) is 0.001 less 1.3e-5 of it |
| β m + (1 − β) g | fma((1 − β₁), g, β₁ m), fma((1 − β₂) g, g, β₂ v): the last sum and its product are rounded together | the same |
| Q | a table of 65,536 entries: 0 comes back as 2.1e-5 (m) or 1.6e-5 (v) of absmax | the nearest; 0 stays 0 |
| sign of m | not kept | kept, by one code: so a negative m never becomes 0, and a small positive one does |
| g = NaN, ±∞ | spreads into m, v and p | p stays as it is, its m and v become 0 |
| a block of NaN | absmax 0 | absmax −FLT_MAX |
| 1/absmax | rounded correctly | an approximate instruction (`kernels.reciprocal`) |
| denormals | kept | flushed to 0 |

Both rules give the codes and absmax of bitsandbytes in every bit, at every step (tests/goldens: 21 runs each).

What 8 bits do besides rounding, each with a test:
  * A parameter whose gradient is 0, in a block where others are not, falls under the CPU rule: m = 0 is read back as a positive number.
    Beside constant positive gradients far above ε each step soon takes η · β₁ map₁[131] / √(β₂ map₂[7]) = 4.8e-3 η: after 100 steps
    at η = 1e-3 that is −4.8e-4. A block of zeros stays where it is; under the CUDA rule every such parameter does.
  * map₁ has no −1: where m = −absmax, it is read back as −0.993 absmax. For a constant negative gradient m settles at 0.94 g, and the
    steps are as much shorter than for a positive one, under either rule.
  * A gradient whose square overflows (|g| > 5.8e20) makes v infinite; its code is 0, and 0 · ∞ makes p NaN one step later, under either.

Parameters differ in the last bits. On a CPU torch's square root is off by an ulp at times: in one step they part by at most 2⁻²¹ |Δp| and
an ulp of p. The GPU takes βᵗ, roots and quotients by approximate instructions: in one step they part by at most 2⁻¹⁵ of the update and an
ulp of p, or two with weight decay.

Differs from bitsandbytes' AdamW8bit: parameters and gradients are float32
(there 16 bits are converted and rounded back); a parameter too small for 8 bits takes AdamW's order of operations, while there it is
p ← fma(−η√(1 − β₂ᵗ)/(1 − β₁ᵗ), m/(√v + √(1 − β₂ᵗ) ε), p), with fused multiply-adds in m and v too. As there: weight decay is
0.01 unless given, 8 bits are no option (it takes optim_bits=32 and nothing else), amsgrad does not exist. Left out: max_unorm and
skip_zeros (its 8-bit kernels ignore both), overrides for single parameters, AdEMAMix and the other optimizers.
"""

import math
from functools import cache, partial

import numpy as np

from .. import backend, codebooks
from ..backend import array_module
from ..kernels import device, eightbit
from ..kernels.eightbit import fma
from ..kernels.reciprocal import flush, rcp
from ..optim import AdamW

BLOCKSIZE = 256
MIN_8BIT_SIZE = 4096  # below, bitsandbytes keeps 32-bit states


def adamw8bit_step(
    p,
    g,
    codes_m,
    codes_v,
    absmax_m,
    absmax_v,
    t,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    rule="bitsandbytes-cpu",
):
    """p ← (1 − ηλ) p − η m̂/(√v̂ + ε) with m, v = map[codes] · absmax; m and v are then rounded to 8 bits again. In place.

    For step t = 1, 2, … of n elements: p, g float32 (n,); codes_m, codes_v uint8 (n,); absmax_m, absmax_v float32 (⌈n/256⌉,).
    A block knows nothing of the others, so a tensor may come in pieces that begin at multiples of 256. rule: see the module.
    """
    n = len(p)
    _check(rule, p, g, codes_m, codes_v, absmax_m, absmax_v)
    if rule == "bitsandbytes-cpu" and device.compiles(p, g):
        xp, state = array_module(p), (codes_m, codes_v, absmax_m, absmax_v)
        maps, tables = ([f(xp, signed) for signed in (True, False)] for f in (_map, _lookup))
        return device.adamw8bit_step(p, g, *state, maps, tables, t, lr, betas, eps, weight_decay)
    update = _UPDATES[rule]
    if rule == "bitsandbytes-cpu" and array_module(p) is np:
        maps, tables = ([f(np, signed) for signed in (True, False)] for f in (_map, _lookup))
        update = partial(eightbit.adamw, maps=maps, tables=tables)
    whole, each = n // BLOCKSIZE * BLOCKSIZE, eightbit.CHUNK if array_module(p) is np else max(n, 1)
    starts = [*range(0, whole, each)] + [whole] * (whole < n)  # a last partial block comes alone
    for start, end in zip(starts, [*starts[1:], n], strict=True):
        blocks = slice(start // BLOCKSIZE, -(-end // BLOCKSIZE))
        rows = (blocks.stop - blocks.start, -1)
        parts = (x[start:end].reshape(rows) for x in (p, g, codes_m, codes_v))
        with np.errstate(all="ignore"):
            update(*parts, absmax_m[blocks], absmax_v[blocks], t, lr, betas, eps, weight_decay)


def _check(rule, p, g, codes_m, codes_v, absmax_m, absmax_v):
    if rule not in _UPDATES:
        raise ValueError(f"AdamW in 8 bits: rule {rule!r} is unknown: expected one of {', '.join(map(repr, _UPDATES))}")
    n, blocks = len(p), -(-len(p) // BLOCKSIZE)
    for name, x, length, dtype in (
        ("p", p, n, "float32"),
        ("g", g, n, "float32"),
        ("codes_m", codes_m, n, "uint8"),
        ("codes_v", codes_v, n, "uint8"),
        ("absmax_m", absmax_m, blocks, "float32"),
        ("absmax_v", absmax_v, blocks, "float32"),
    ):
        if x.shape != (length,) or x.dtype != dtype:
            raise ValueError(f"AdamW in 8 bits: {name} is {x.dtype} {x.shape}, expected {dtype} {(length,)}")


# ------------------------------------------------------------------------------------------------------------------------- CPU
def _cpu_update(p, g, codes_m, codes_v, absmax_m, absmax_v, t, lr, betas, eps, weight_decay):
    """The order of bitsandbytes' CPU step, on rows of a block each."""
    xp, f, (b1, b2) = array_module(p), np.float32, betas
    m = xp.take(_map(xp, True), codes_m) * absmax_m[:, None]
    m *= f(b1)
    m = fma(g, f(1 - b1), m)
    v = xp.take(_map(xp, False), codes_v) * absmax_v[:, None]
    v *= f(b2)
    v = fma(g * f(1 - b2), g, v)
    codes_m[...], absmax_m[...] = _cpu_round(m, True)
    codes_v[...], absmax_v[...] = _cpu_round(v, False)
    xp.sqrt(v, out=v)
    v /= f(math.sqrt(1 - b2**t))
    v += f(eps)
    m *= f(-lr / (1 - b1**t))
    m /= v
    if weight_decay > 0:
        p *= f(1 - lr * weight_decay)
    p += m


def _cpu_round(x, signed):
    """kernels.rounding.cpu_quantize_8bit of rows of a block each, on any device."""
    xp = array_module(x)
    size = xp.abs(x)
    absmax = size.max(axis=1)
    if bool(xp.isnan(absmax).any()):
        absmax = xp.where(xp.isnan(size), np.float32(0), size).max(axis=1)
    u = xp.clip(x * (np.float32(1) / absmax)[:, None], -1, 1)
    u += np.float32(1)
    u *= np.float32(0.5)
    u = xp.where(xp.isnan(u), np.float32(0), u)
    position = u.astype(np.float64)
    position *= 65535
    position += 0.5
    return xp.take(_lookup(xp, signed), position.astype(np.float32).astype(np.int32)), absmax


@cache
def _map(xp, signed):
    return backend.move(codebooks.dynamic8(signed), xp)


@cache
def _lookup(xp, signed):
    """The table of 65,536 codes in which the CPU rule looks up."""
    return backend.move(eightbit.table(codebooks.dynamic8(signed).tobytes()), xp)


# ------------------------------------------------------------------------------------------------------------------------ CUDA
def _cuda_update(p, g, codes_m, codes_v, absmax_m, absmax_v, t, lr, betas, eps, weight_decay):
    """The order of bitsandbytes' CUDA kernel, every operation rounded by itself, on rows of a block each."""
    xp, f, (b1, b2) = array_module(p), np.float32, map(np.float32, betas)
    one = f(1)
    c1, c2 = one - f(float(b1) ** t), np.sqrt(one - f(float(b2) ** t))
    usable = xp.isfinite(g)
    g = flush(xp.where(usable, g, f(0)))
    v = flush(flush(xp.take(_map(xp, False), codes_v) * absmax_v[:, None]) * b2)
    v = flush(fma(flush((one - b2) * g), g, v))
    m = flush(flush(xp.take(_map(xp, True), codes_m) * absmax_m[:, None]) * b1)
    m = flush(fma(g, one - b1, m))
    m, v = (flush(xp.where(usable, x, f(0))) for x in (m, v))
    change = flush(f(lr) * c2 / c1 * flush(m / (xp.sqrt(v) + c2 * f(eps))))
    updated = flush(p - change)
    if weight_decay > 0:
        updated = flush(updated * (one - f(lr) * f(weight_decay)))
    p[...] = xp.where(usable, updated, p)
    codes_m[...], absmax_m[...] = _cuda_round(m, True)
    codes_v[...], absmax_v[...] = _cuda_round(v, False)
    below = codes_m < 127  # the codes of negative numbers; m must not change its sign
    wrong = below != (m.view(np.int32) < 0)
    codes_m[...] = xp.where(wrong, codes_m + xp.where(m > 0, np.uint8(1), np.uint8(255)), codes_m)


def _cuda_round(x, signed):
    """kernels.rounding.cuda_quantize_8bit of rows of a block each, on any device: halving, and a tie goes to the even code."""
    xp = array_module(x)
    bounds, numbers = _bounds(xp, signed), xp.where(xp.isnan(x), np.float32(0), xp.abs(x))
    absmax = xp.where(xp.isnan(x).all(axis=1), -np.finfo(np.float32).max, numbers.max(axis=1)).astype(np.float32)
    s = flush(x * rcp(absmax)[:, None])
    codes = xp.zeros(s.shape, np.uint8)
    for i in (128, 64, 32, 16, 8, 4, 2, 1):
        codes += (s > xp.take(bounds, codes + np.uint8(i - 1))).view(np.uint8) * np.uint8(i)
    codes += (s == xp.take(bounds, codes)).view(np.uint8) & codes
    return codes, absmax


@cache
def _bounds(xp, signed):
    return backend.move(np.append(codebooks.midpoints(codebooks.dynamic8(signed)), np.float32(np.inf)), xp)


_UPDATES = {"bitsandbytes-cpu": _cpu_update, "bitsandbytes-cuda": _cuda_update}


class AdamW8bit(AdamW):
    """AdamW with m and v in 8 bits (the module's equation), with AdamW's face and bitsandbytes' defaults.

    min_8bit_size: a parameter with fewer elements keeps float32 m and v, and AdamW's update. rule: whose rounding. The codes lie in
    the pager's pages, cut between blocks; absmax and the maps never do. For every budget the parameters, the codes and
    absmax equal those of the unpaged optimizer bit for bit.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        pager=None,
        min_8bit_size=MIN_8BIT_SIZE,
        rule="bitsandbytes-cpu",
    ):
        if rule not in _UPDATES:
            raise ValueError(f"AdamW8bit: rule {rule!r} is unknown: expected one of {', '.join(map(repr, _UPDATES))}")
        self.min_8bit_size, self.rule, self._absmax_bytes = min_8bit_size, rule, 0
        super().__init__(params, lr, betas, eps, weight_decay, pager)

    @property
    def state_bytes(self):
        """Bytes of the codes and of absmax together, and of m and v where they are float32. Not counted: the two maps, 2 KB for all."""
        return super().state_bytes + self._absmax_bytes

    def _allocate(self, p):
        if p.dtype != np.float32:
            raise ValueError(f"AdamW8bit: a parameter of shape {p.shape} is {p.dtype}; expected float32")
        if p.size < self.min_8bit_size:
            return super()._allocate(p)
        pages = _Blocks(self.pager.allocate(2, p.size, np.uint8, multiple=BLOCKSIZE))
        pages.absmax = self.pager.xp.zeros((2, -(-p.size // BLOCKSIZE)), np.float32)
        self._absmax_bytes += pages.absmax.nbytes
        return pages

    def _update(self, slot, page, p, g, start, lr):
        if not isinstance(slot.pages, _Blocks):
            return super()._update(slot, page, p, g, start, lr)
        absmax = slot.pages.absmax[:, start // BLOCKSIZE : -(-(start + len(p)) // BLOCKSIZE)]
        decay = slot.group["weight_decay"]
        adamw8bit_step(p, g, *page, *absmax, slot.t, lr, self.betas, self.eps, decay, self.rule)

    def _read(self, slot):
        parts = super()._read(slot)
        if isinstance(slot.pages, _Blocks):
            m, v = np.array(backend.move(slot.pages.absmax, "cpu"))
            parts |= {"absmax_m": m, "absmax_v": v}
        return parts

    def _write(self, slot, parts):
        super()._write(slot, parts)
        if isinstance(slot.pages, _Blocks):
            absmax = np.stack([parts["absmax_m"], parts["absmax_v"]])
            slot.pages.absmax[...] = backend.move(absmax, self.pager.xp)


class _Blocks(list):
    """The pages of 8-bit codes of m and v, and `absmax` (2, blocks), which is no page."""
