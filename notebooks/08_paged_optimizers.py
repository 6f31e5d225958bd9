# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 08 · Paged optimizers
#
# **AdamW treats every element by itself, so its state can be cut into pages that lie elsewhere until they are used.** This notebook
# cuts the update, writes the page table in a dozen lines, counts the bytes that move at every budget, and lets a long sequence push
# all pages out of memory in the middle of a run. The weights keep their bits throughout.
#
# Hours: 4 (1½ to read and run, 2½ for the exercises). Prerequisites: AdamW; which matrices LoRA trains (notebook 02); for section 6
# blocks and their absmax (notebook 04) and the dynamic map (notebook 06, section 3).
#
# Accompanies QLoRA (arXiv 2305.14314) §3, "Paged Optimizers", and the paragraph on them in §4.
#
# Code that only measures, checks or draws is folded where the editor can fold it; its output is not.

# %% tags=["setup"]
import itertools
import math
import subprocess
import sys

import numpy as np
from grading import grade

import tinylora as tl
from tinylora import AdamW, AdamW8bit, Pager, Tensor, codebooks
from tinylora.figures.paging import timeline
from tinylora.kernels.pools import WHOLE_TENSORS_FROM
from tinylora.optim import adamw_step
from tinylora.tape import tape_bytes
from tinylora.training.adamw8bit import adamw8bit_step

f32 = np.float32
d1, d2 = codebooks.dynamic8(signed=True), codebooks.dynamic8(signed=False)

# %% [markdown]
# ## 1 · Why the state can be cut
#
# AdamW keeps two numbers for each parameter $p$ with gradient $g$, in float32 8 bytes (weight decay is left out here):
#
# $$m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2, \qquad
# p \leftarrow p - \frac{\eta}{1-\beta_1^t} \cdot \frac{m}{\sqrt{v}\,/\sqrt{1-\beta_2^t} + \epsilon} .$$
#
# No element sees another. So the update of a vector is the update of its pieces, in any order, to the bit. And it equals the
# library's `adamw_step`, which does the same in place.


# %%
def adamw(p, g, m, v, t, lr=1e-2, b1=0.9, b2=0.999, eps=1e-8):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * (g * g)
    update = m / (np.sqrt(v) * (1 / math.sqrt(1 - b2**t)) + eps)
    return p - update * (lr / (1 - b1**t)), m, v


x = np.random.default_rng(0).standard_normal((4, 10_000), f32)  # p, g, m, v
x[3] **= 2
cut = [adamw(*x[:, i : i + 700], t=3) for i in range(0, 10_000, 700)]
assert np.concatenate(cut, axis=1).tobytes() == np.stack(adamw(*x, t=3)).tobytes()

# %% tags=["hide-input"]
backwards = [adamw(*x[:, i : i + 700], t=3) for i in reversed(range(0, 10_000, 700))]
assert np.concatenate(backwards[::-1], axis=1).tobytes() == np.concatenate(cut, axis=1).tobytes()
assert cut[0][0].dtype == f32
p, g, m, v = x.copy()
adamw_step(p, g, m, v, 3, 1e-2)
assert np.stack([p, m, v]).tobytes() == np.concatenate(cut, axis=1).tobytes()

# %% [markdown]
# Not every optimizer can be cut. LAMB scales a tensor's update by its norm, Muon orthogonalizes a matrix, Adafactor keeps the means of
# rows and columns. Clipping by the norm of all gradients, which the QLoRA code does at 0.3, couples all elements too, but through
# gradients and before the update; these are not paged.
#
# ## 2 · A page table
#
# §3: paging works "like regular memory paging between CPU RAM and the disk". Part of the pages are *resident*, in *frames*. To use a
# page that is not is a *fault*: the page is copied in, and if all frames are taken, the page whose last use lies farthest back is
# copied out before, *evicted* (LRU, least recently used). A use of a resident page is a *hit*.


# %%
def lru(uses, frames):
    resident, trace = [], []  # least recently used first
    for page in uses:
        known = page in resident
        if known:
            resident.remove(page)
        elif len(resident) == frames:
            trace.append((resident.pop(0), "evict"))
        trace.append((page, "hit" if known else "fault"))
        resident.append(page)
    return trace


print(lru([0, 1, 0, 2, 1], frames=2))

# %% [markdown]
# The library's `Pager` does this with real copies, to and from host memory or a file. Its trace is the same, event by event, for
# 1,000 uses of 12 pages in random order and every number of frames. Each page was incremented at each use, and afterwards holds
# the number of its uses: no write was lost on the way out and in.

# %% tags=["hide-input"]
uses = np.random.default_rng(0).integers(0, 12, 1000).tolist()
for pool in ("host", "file"):
    for frames in range(1, 13):
        pager = Pager(budget=frames * 64, page_bytes=64, pool=pool, prefetch=False, trace=True)
        pages = pager.allocate(2, 12 * 8)  # two rows, m and v; 8 elements of each to a page of 64 bytes
        for number in uses:
            pager.page(number)[...] += 1
        assert [(page, event) for _, page, event, _ in pager.trace] == lru(uses, frames)
        assert (pager.read(pages)[0, ::8] == np.bincount(uses)).all() and pager.peak_resident_bytes == 64 * frames

# %% [markdown]
# ## 3 · What moves
#
# Let the state have $n$ pages and let $k < n$ of them be resident. A step uses every page once. AdamW writes on each, so every eviction
# is a copy, and in the long run as much goes out as comes in.
#
# *Round and round* (pages first to last in every step) is the worst case of LRU: the page used longest ago is always the
# one that is needed next. Every use is a fault, and the whole state moves in and out in every step, however many frames there are:
#
# $$\text{bytes moved a step} = 2 \cdot \text{state} \qquad (k < n).$$
#
# *Back and forth* (every second step from last to first) begins with what the last step used last. These $k$ pages are hits, the others
# faults:
#
# $$\text{bytes moved a step} = 2 \cdot \frac{n-k}{n} \cdot \text{state} = 2\,(\text{state} - \text{budget}).$$
#
# Nothing can do better: at the beginning of a step $k$ pages are resident, and all $n$ must be used. The order is free because no
# element depends on another (section 1). `AdamW` goes back and forth. The cell counts with `lru`, and then with real optimizers that
# run 6 steps on 40 pages: in host memory and in a file, each with and without bringing the next page beside the work on this one.


# %% tags=["hide-input"]
class Around(AdamW):
    back_and_forth = False


PAGES, PAGE, STEPS = 40, 8192, 6
STATE = PAGES * PAGE
grads = np.random.default_rng(1).standard_normal((STEPS, STATE // 8), f32)


def run(kind, pager):
    """(bytes moved in each step over the state's, waits for a page in all, the parameters' bytes) of STEPS steps."""
    p = Tensor(np.random.default_rng(2).standard_normal(STATE // 8, f32), requires_grad=True)
    optimizer, moved = kind([p], lr=1e-2, weight_decay=0.1, pager=pager), [0]
    for g in grads:
        p.grad = g
        optimizer.step()
        moved.append(pager.counters.bytes_moved)
    return np.diff(moved) / STATE, pager.counters.faults, p.data.tobytes()


unpaged = run(AdamW, Pager())[2]
print(" budget   round and round   back and forth     (bytes moved a step / state, from the second step on)")
for frames in (40, 39, 30, 20, 10, 4, 2, 1):
    counted = []
    for kind, turns in ((Around, 1), (AdamW, -1)):
        uses = [page for step in range(STEPS) for page in range(PAGES)[:: turns ** (step % 2)]]
        faults = sum(event == "fault" for _, event in lru(uses, frames))
        expected = 0 if frames == PAGES else 2 if kind is Around else 2 * (PAGES - frames) / PAGES
        for pool in ("host", "file"):
            for ahead in (False, True):
                moved, waits, end = run(kind, Pager(frames * PAGE, PAGE, pool, prefetch=ahead))
                assert (moved[1:] == expected).all() and moved[0] == 1 + (PAGES - frames) / PAGES
                assert end == unpaged
                assert waits == (faults if not ahead or frames == 1 else STEPS if kind is Around and expected else 1)
        counted.append(moved[1])
    print("{:6.1%}{:18.2f}{:17.2f}".format(frames / PAGES, *counted))

# %% [markdown]
# The numbers are exact because all pages are equally large. With one page too few, round and round moves 2.00 times the state a step,
# and back and forth 0.05 times. In the first step everything comes in once, as zeros.
#
# Bringing the next page ahead (`prefetch`, from 2 frames on) moves the same bytes. But the optimizer then has to wait for a page
# only once in the run (back and forth), or once a step (round and round), instead of at every fault.
#
# **Same bits.** The 64 paged runs of this cell end with the bytes of the run without a budget (`assert end == unpaged`): every
# element goes through the same operations. So paging costs time and nothing else. How much time depends on the machine:
# `tinylora paging` measures it on yours.
#
# ## 4 · The long sequence
#
# A budget that is always short is not the paper's case. There the state fits most of the time, and "the GPU occasionally runs
# out-of-memory". §4: paging "only occurs when processing mini-batches with long sequence lengths, which is rare". `Pager.yielding(f)` does
# this in four lines; outside the `except` block, because the exception keeps alive what `f` had allocated:
#
# ```python
# try:
#     return f(*args)
# except MemoryError:
#     pass
# self.evict_all()
# return f(*args)
# ```
#
# `f` runs twice. So it must be a function of its arguments alone: no random numbers of its own, nothing added to a gradient before
# it fails.
#
# A real run: the embedded model, 2 million weights in NF4, with adapters of rank 64 on all linear layers, as in the paper. Each step takes
# one sequence of 64 bytes, but the sixth takes 256. The device is imitated by counting: it has room for 30 MB of optimizer state and
# tape together, and the forward pass raises `MemoryError` when the bytes that its tape really holds and those of the resident pages
# exceed that. The budget is the whole state, so nothing is evicted on its account.

# %% tags=["hide-input"]
LENGTHS, ROOM = [64] * 5 + [256] + [64] * 4, 30_000_000
TEXT = np.frombuffer(tl.data.jargon("train")[:2000], np.uint8).astype(int)


def train(room, budget=None):
    """(pager, {step: tape bytes}, the trained parameters' bytes) of a QLoRA run of 10 steps."""
    model = tl.Llama.from_pretrained("base")
    tl.quantize_linears(model, "nf4", double_quant=True)
    tl.seed(0)
    tl.add_lora(model, r=64, alpha=16, target_modules="all-linear")
    weights, trained = [w for _, w in model.named_weights()], model.trainable()
    state = 8 * sum(q.size for q in model.parameters() if q.requires_grad)
    pager = Pager(budget or state, page_bytes=1 << 16, trace=True)
    optimizer, tape, at = AdamW(trained, lr=1e-3, pager=pager), {}, 0

    def gradients(x):
        loss = tl.ops.softmax_cross_entropy(model(x[None, :-1]), x[None, 1:])
        tape[pager.step] = tape_bytes(loss, exclude=weights)
        if tape[pager.step] + pager.resident_bytes > room:
            raise MemoryError
        loss.backward()

    for pager.step, length in enumerate(LENGTHS, 1):
        pager.yielding(gradients, TEXT[at : at + length + 1].copy())  # a view would keep all of TEXT alive
        optimizer.step()
        optimizer.zero_grad()
        at += length
    return pager, tape, b"".join(q.data.tobytes() for q in model.parameters() if q.requires_grad)


pager, tape, end = train(ROOM)
roomy, _, undisturbed = train(math.inf)
state, counters = pager.total_bytes, pager.counters
moved = {s: sum(row[3] for row in pager.trace if row[0] == s) for s in range(1, 11)}
print(f"state {state:,} bytes in {len(pager)} pages; tape {tape[1]:,} bytes, in step 6 {tape[6]:,}")
print(f"moved in steps 1 to 10: {[round(n / state, 2) for n in moved.values()]} times the state")
print(f"rescues: {counters.rescues}; the same adapters as with room for all: {end == undisturbed}")
assert (state, len(pager), tape[1], tape[6]) == (8_847_360, 160, 5_361_416, 23_264_264)
assert [round(n / 1e6, 1) for n in (tape[6], state, tape[6] + state)] == [23.3, 8.8, 32.1]
assert tape[6] < ROOM < tape[6] + state and tape[1] + state < ROOM
assert list(moved.values()) == [state, 0, 0, 0, 0, 2 * state, 0, 0, 0, 0] and roomy.counters.rescues == 0
assert (counters.rescues, counters.evictions) == (1, 160) and end == undisturbed

# %% [markdown]
# The tape of the long sequence is 23.3 MB. Beside the state's 8.8 MB that is 32.1 MB, more than the 30 MB. All 160 pages go, the
# forward pass is run again, and in the update of the same step the pages come back. The adapters end with the same bits as in a run
# with room for everything.

# %% tags=["hide-input"]
timeline(pager.trace, pager.budget, tape=tape, room=ROOM)

# %% [markdown]
# One long sequence costs $2 \cdot \text{state}$, 17.7 MB; the other steps after the first cost nothing. The alternative is to keep
# the room free always, with a budget of $30 - 23.3 = 6.7$ MB: 4.2 MB a step, in every step. As long as fewer than one step in 4.2
# has a long sequence, it pays to wait for the failure. (CUDA's driver does not wait for one: it evicts pages as an allocation
# needs them, so at best the 2.1 MB that are missing.)

# %% tags=["hide-input"]
small, _, end = train(ROOM, budget=ROOM - tape[6])
always = [sum(row[3] for row in small.trace if row[0] == s) / 1e6 for s in range(2, 11)]
print(
    f"budget {small.budget / 1e6:.1f} MB: {min(always):.2f} to {max(always):.2f} MB a step; rescues {small.counters.rescues}"
)
assert end == undisturbed and small.counters.rescues == 0 and round(small.budget / 1e6, 1) == 6.7
assert {round(n, 1) for n in always} == {4.2} and round(2 * state / 1e6, 1) == 17.7
assert round(2 * state / 1e6 / np.mean(always), 1) == 4.2 and round((tape[6] + state - ROOM) / 1e6, 1) == 2.1

# %% [markdown]
# **For real**, where the system allows it (Linux): a process of its own, whose memory the system limits. 34 MB of state are resident,
# with their pages in a file, and the third step wants 50 MB where 42 MB are left. NumPy's allocation fails, the pages go to the
# file, and the step goes on. This is §3's analogy taken literally: RAM and disk.

# %% tags=["hide-input"]
LIMITED = """
import resource, sys
import numpy as np
import tinylora as tl

p = tl.Tensor(np.zeros(4 << 20, np.float32), requires_grad=True)
optimizer = tl.AdamW([p], lr=0.01, pager=tl.Pager(1 << 30, 1 << 20, pool="file", prefetch=False))

def gradient(n):
    x = np.ones((n, 1 << 20), np.float32)  # an activation that grows with the sequence
    return np.full(4 << 20, x[:, 0].sum(), np.float32)

for step, n in enumerate([1, 1, 12, 1]):
    if step == 2 and sys.argv[1] == "limited":
        used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + (40 << 20), -1))
    p.grad = optimizer.pager.yielding(gradient, n)
    optimizer.step()
print(optimizer.pager.counters.rescues, p.data[:100].tobytes().hex())
"""
if sys.platform.startswith("linux"):
    command = [sys.executable, "-c", LIMITED]
    free, limited = (
        subprocess.run([*command, how], capture_output=True, text=True, check=True).stdout.split()
        for how in ("free", "limited")
    )
    print(f"rescues without and with the limit: {free[0]} and {limited[0]}; same parameters: {free[1] == limited[1]}")
    assert (free[0], limited[0]) == ("0", "1") and free[1] == limited[1]

# %% [markdown]
# ## 5 · What bitsandbytes pages
#
# In bitsandbytes 0.50 (its source was read; its paging needs a GPU and was not run here) a paged optimizer allocates the states of a
# parameter in CUDA's managed memory **if it has 100,000 elements or more**, and ordinarily otherwise. Before a parameter's update its whole
# states are prefetched to the GPU. Nothing is prefetched back: eviction is the driver's. On a CPU it warns and pages nothing.
#
# A LoRA matrix has $r \cdot \text{width}$ elements. In a layer of LLaMA-7B (widths 4096 and 11008, all linear layers adapted) eleven
# of the fourteen matrices have $4096\,r$ and three $11008\,r$. So a "paged" optimizer pages nothing up to $r = 9$, 42 % of the state from
# $r = 10$ to 24, and everything from $r = 25$ on; the paper's $r = 64$ is on the safe side. `Pager(whole_tensors=True)` follows that rule.


# %% tags=["hide-input"]
def adapters(r, hidden=4096, ffn=11008):
    """Elements of A and B of the seven linear layers of a LLaMA layer."""
    layers = [(hidden, hidden)] * 4 + [(hidden, ffn)] * 2 + [(ffn, hidden)]
    return [r * width for layer in layers for width in layer]


share = {}
for r in (8, 9, 10, 16, 24, 25, 64):
    pager = Pager(budget=10**8, whole_tensors=True)
    for size in adapters(r):
        pager.allocate(2, size)
    paged = pager.total_bytes - pager.unpaged_bytes
    share[r] = paged / pager.total_bytes
    print(f"r = {r:2}: a layer's state has {pager.total_bytes:10,} bytes, paged {share[r]:6.1%}")
    assert paged == 8 * sum(n for n in adapters(r) if n >= 1e5)
assert WHOLE_TENSORS_FROM == 1e5 and sorted(set(adapters(1))) == [4096, 11008] and adapters(1).count(4096) == 11
assert [round(x, 3) for x in share.values()] == [0, 0, 0.423, 0.423, 0.423, 1, 1]
largest = 8 * max(adapters(64))
state_65 = 80 * 8 * sum(adapters(64, 8192, 22016))
print(f"r = 64: the largest state has {largest:,} bytes; the whole state of LLaMA-65B {state_65 / 1e9:.2f} GB")
assert largest == 5_636_096 and state_65 == 6_396_313_600

# %% [markdown]
# Whole tensors need room for the largest of them, here 5.6 MB; pages are as small as one likes. The bits are the same again
# (`tests/test_paging.py`).
#
# What is at stake in the paper: for LLaMA-65B with $r = 64$ the states take 6.40 GB of a 48 GB GPU. One long sequence moves at most
# twice that. The paper reports that at batch size 16 paged optimizers had the same speed as regular ones, without numbers. This
# cannot be checked here. It agrees with the count: where no sequence is long, nothing moves.
#
# ## 6 · States in 8 bits
#
# The other way to make room is a smaller state. 8-bit optimizers (Dettmers et al. 2022) keep $m$ and $v$ as 8-bit codes in blocks of 256
# with an absmax each. $m$ uses the signed dynamic map $d_1$ of notebook 06, $v$ an unsigned one, $d_2$:
#
# $$m = d_1[k_m]\, a_m, \quad v = d_2[k_v]\, a_v \;\longrightarrow\; \text{AdamW} \;\longrightarrow\;
# a = \max |x|, \quad k = \text{index of the } d \text{ nearest to } x / a .$$
#
# A parameter then takes $2\,(1 + 4/256) = 2.03125$ bytes instead of 8. For one block:


# %%
def to_8_bits(x, d):
    absmax = np.abs(x).max()
    return np.abs(x[:, None] / absmax - d).argmin(axis=1), absmax


def adamw_8_bits(p, g, codes_m, absmax_m, codes_v, absmax_v, t):
    p, m, v = adamw(p, g, d1[codes_m] * absmax_m, d2[codes_v] * absmax_v, t)
    return p, *to_8_bits(m, d1), *to_8_bits(v, d2)


# %% [markdown]
# The library follows bitsandbytes' roundings, operation by operation, here those of the GPU kernels.
# The function above does not. The kernel takes $1 - \beta_2$ from the float32 of 0.999, which makes it, and $v$, smaller by
# 1.3e-5 of itself; the rest is last bits. A code may then differ by one, where a number lies at the middle between two: in few
# of the 20,480 codes of 40 steps, or in none. Each step begins with the library's state of the step before.

# %% tags=["hide-input"]
rng = np.random.default_rng(0)
p, km, kv, am, av = (np.zeros(n, t) for n, t in ((256, f32), (256, "u1"), (256, "u1"), (1, f32), (1, f32)))
different, v_off = 0, 0.0
for t in range(1, 41):
    g = rng.standard_normal(256).astype(f32)
    ours = adamw_8_bits(p, g, km, am[0], kv, av[0], t)
    adamw8bit_step(p, g, km, kv, am, av, t, lr=1e-2, weight_decay=0, rule="bitsandbytes-cuda")
    for codes, theirs in ((ours[1], km), (ours[3], kv)):
        different += int((codes != theirs).sum())
        assert np.abs(codes - theirs.astype(int)).max() <= 1
    v_off = max(v_off, ours[4] / av[0] - 1)
    assert abs(ours[2] / am[0] - 1) < 1e-6 and np.abs(ours[0] - p).max() < 1e-6
print(f"codes that differ: {different} of {40 * 512:,}; absmax of v larger by up to {v_off:.1e}")
assert different <= 10 and round(v_off, 6) == 1.3e-5
assert f"{1 - float(1 - f32(0.999)) / 0.001:.1e}" == "1.3e-05"

big = Tensor(np.zeros((256, 4096), f32), requires_grad=True)
eight, full = AdamW8bit([big]).state_bytes / big.size, AdamW([big]).state_bytes / big.size
print(f"bytes a parameter: {eight} instead of {full}, {full / eight:.2f} times less")
assert (eight, full) == (2.03125, 8) and round(full / eight, 2) == 3.94

# %% [markdown]
# Codes can be paged as well: `AdamW8bit` with a pager, the codes in pages that are cut between blocks, absmax outside (as in bitsandbytes).
# Again every budget gives the same bits.

# %% tags=["hide-input"]
plain = run(AdamW8bit, Pager())[2]
for frames in (1, 2, 5, 9, 10):
    assert run(AdamW8bit, Pager(frames * PAGE, PAGE))[2] == plain
print("the same bytes for 1, 2, 5, 9 and 10 frames of 10 pages; other bytes than in 32 bits:", plain != unpaged)
assert plain != unpaged

# %% [markdown]
# ### What the rounding does
#
# Most of what 8 bits lose is a rounding error among others. Two effects are not:
#
# - **A parameter without gradient moves.** bitsandbytes on a CPU rounds through a table that has no 0 (notebook 06, section 2): $m = 0$
#   comes back as $d_1[131]\,a_m$ and $v = 0$ as $d_2[7]\,a_v$, that is 2.1e-5 and 1.6e-5 of the block's absmax. Beside constant positive
#   gradients such a parameter falls: by 4.8e-4 in 100 steps at $\eta$ = 1e-3. A float32 state, a block of nothing but zeros, and the
#   GPU's rule leave it where it is. Exercise 4 derives the number.
# - **Down is not up.** $d_1$ has no −1. Where $m = -a_m$, it is read back as $-0.993\,a_m$. For a constant negative gradient $m$
#   settles at $0.1/(1 - 0.9 \cdot 0.993) = 0.94$ of it, and the steps are as much shorter, on the CPU and on the GPU.


# %% tags=["hide-input"]
def drift(g, steps, rule):
    """Where parameters that start at 0 are after some steps with the same gradient, at a learning rate of 1e-3."""
    p, blocks = np.zeros(len(g), f32), len(g) // 256
    state8 = [np.zeros(n, t) for n, t in ((len(g), "u1"), (len(g), "u1"), (blocks, f32), (blocks, f32))]
    for t in range(1, steps + 1):
        adamw8bit_step(p, g, *state8, t, lr=1e-3, weight_decay=0, rule=rule)
    return p


g = np.zeros(512, f32)
g[:256:2] = 1  # every second parameter of the first block; nothing in the second
cpu, gpu = (drift(g, 100, f"bitsandbytes-{rule}") for rule in ("cpu", "cuda"))
print(f"gradient 0 beside 1: {cpu[1]:.1e} on a CPU, {gpu[1]:.1e} on a GPU; in a block of zeros {cpu[300]:.1e}")
assert f"{cpu[1]:.1e}" == "-4.8e-04" and (cpu[256:] == 0).all() and (gpu[1::2] == 0).all()
assert f"{d1[131]:.1e}" == "2.1e-05" and f"{d2[7]:.1e}" == "1.6e-05" and f"{d1[0]:.3f}" == "-0.993"
sides = np.repeat(np.array([1, -1], f32), 256)
for rule in ("cpu", "cuda"):
    up, down = (drift(sides, 301, f"bitsandbytes-{rule}") - drift(sides, 300, f"bitsandbytes-{rule}"))[[300, 10]]
    print(f"step for a gradient of -1 over that for +1, {rule}: {up / -down:.3f}")
    assert round(0.1 / (1 + 0.9 * float(d1[0])), 2) == 0.94 and abs(up / -down - 0.94) < 0.005

# %% [markdown]
# ## Where paper and code differ
#
# - §3: states are "automatically evicted to CPU RAM" and "paged back into GPU memory" when needed. bitsandbytes prefetches the *whole*
#   states of a parameter, evicts nothing itself, and does not page states of fewer than 100,000 elements: for LLaMA-7B nothing up to
#   $r = 9$ (section 5).
# - §4 calls paged optimizers critical for 33B and 65B and gives no measurement. The state of LLaMA-65B at $r = 64$ is 6.40 GB, and
#   a long sequence moves at most twice that (section 5).
# - Here the copies are made by hand, on any machine, and *all* pages go when an allocation has failed: $2 \cdot \text{state}$, 17.7 MB in
#   section 4, where 2.1 MB were missing. The driver evicts before an allocation fails.
# - AdamW in the natural order, with LRU, moves $2 \cdot \text{state}$ a step below 100 %; `AdamW` here goes back and forth and
#   moves $2\,(\text{state} - \text{budget})$ (section 3). How the driver chooses its pages was not measured.
# - The paper's code takes `paged_adamw_32bit`: 8 bytes a parameter, not 2.03 (section 6).
#
# ## Exercises
#
# For grading only the setup cell and the exercise cells are run: put helpers inside the exercise's cell.
#
# ### 08-1 The best that can be done
#
# LRU looks back. What could one do who sees the future?


# %% tags=["exercise"]
def exercise_1(uses, frames):
    """The smallest number of faults with which pages can be used in the given order, whatever is evicted.

    uses: a list of page numbers, in the order of their use. frames: 1 or more. A page must be resident when it is used, and no page
    is brought in unless it is used now. Return an int. Checked against an exhaustive search on short lists, and on longer ones.

    Compare afterwards: 40 pages round and round, 40 times, with 20 frames. After the first round LRU has 40 faults a round. How many are
    necessary? And how many does LRU have back and forth?
    """
    # BEGIN SOLUTION
    # evict what is used next the farthest ahead (Belady 1966): 840 faults, so 800/39 = 20.5 a round after the first, which is
    # n(n − k)/(n − 1); back and forth LRU has n − k = 20
    resident, faults = set(), 0
    for i, page in enumerate(uses):
        if page not in resident:
            faults += 1
            if len(resident) == frames:
                ahead = uses[i:]
                resident.remove(max(resident, key=lambda q: ahead.index(q) if q in ahead else math.inf))
            resident.add(page)
    return faults
    # END SOLUTION


# %%
_ = grade("08-1", exercise_1)

# %% [markdown]
# ### 08-2 The bill
#
# Without running anything: how many bytes does a whole run move?


# %% tags=["exercise"]
def exercise_2(state, page_bytes, budget, steps, spikes):
    """Bytes that a Pager moves, in and out together, in `steps` steps of the library's AdamW (back and forth), from the beginning.

    state       bytes, a multiple of page_bytes
    budget      bytes, page_bytes or more; it need not be a multiple of page_bytes, and may exceed the state
    spikes      in so many of the steps, the first not among them, a long sequence evicts all resident pages before the update

    In the beginning nothing is resident. Return an int; real runs are the check.
    """
    # BEGIN SOLUTION
    # a step moves the n − k pages that are not there, in and out; the first takes all in but need not put them back;
    # after a spike the k that would have been hits have gone out, and come in
    n = state // page_bytes
    k = min(budget // page_bytes, n)
    pages_moved = n + (n - k) + (steps - 1) * 2 * (n - k) + spikes * 2 * k
    return pages_moved * page_bytes
    # END SOLUTION


# %%
_ = grade("08-2", exercise_2)

# %% [markdown]
# ### 08-3 Where 8 bits may be cut
#
# A page of an 8-bit state holds codes only. Cut it in the wrong place, and some parameters are scaled with another block's absmax.


# %% tags=["exercise"]
def exercise_3(n, page_bytes):
    """Cut the 8-bit state of n parameters into pages. Return a list of (start, end, first, last), in order.

    Page by page, parameters start … end − 1 are updated by

        adamw8bit_step(p[start:end], g[start:end], codes_m[start:end], codes_v[start:end], absmax_m[first:last], absmax_v[first:last], …)

    and this must give the bits of one step over all n. A page holds both codes, of m and of v, of its parameters: page_bytes at most
    (512 or more). absmax lies outside, an entry for each 256 parameters; a last partial block has one too. No more pages than necessary.
    """
    # BEGIN SOLUTION
    size = page_bytes // 2 // 256 * 256
    cuts = [*range(0, n, size), n]
    return [(a, b, a // 256, -(-b // 256)) for a, b in itertools.pairwise(cuts)]
    # END SOLUTION


# %%
_ = grade("08-3", exercise_3)

# %% [markdown]
# ### 08-4 The fall
#
# Derive the −4.8e-4 of section 6.


# %% tags=["exercise"]
def exercise_4(steps, lr, beta1, beta2):
    """Where a parameter that starts at 0 and never has a gradient is after `steps` steps of AdamW8bit under the CPU's rule.

    All other gradients of its block are the same positive number in every step (its size cancels). epsilon and weight decay count for
    nothing. After each step the parameter's m and v are so small that they are stored as the codes 131 and 7, so they are read back as
    d1[131] and d2[7] (of the setup cell) times the block's absmax; before the first step all codes and absmax are 0. Return a float; it
    must agree with the library within 1 %, also after very few steps.

    Hint: write down m and v of the *other* parameters after t − 1 steps. They are the absmax.
    """
    # BEGIN SOLUTION
    # m of the others after t − 1 steps is (1 − β₁^(t−1)) g. Without the bias corrections' early steps: 4.8e-3 η a step
    total = 0.0
    for t in range(2, steps + 1):
        m = beta1 * d1[131] * (1 - beta1 ** (t - 1)) / (1 - beta1**t)
        v = beta2 * d2[7] * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        total -= lr * m / math.sqrt(v)
    return float(total)
    # END SOLUTION


# %%
_ = grade("08-4", exercise_4)

# %% [markdown]
# ## Summary
#
# - AdamW is elementwise, so its state can be cut and paged: the same bits at every budget, page size, pool and order (`paging.py`,
#   `kernels/pools.py`, `optim.py`; tests `tests/test_paging.py`, `tests/test_optim.py`).
# - Round and round, LRU moves 2 · state a step at any budget below 100 %. Back and forth it is 2 · (state − budget), and nothing can
#   do better.
# - A long sequence that does not fit evicts all pages and goes on (`Pager.yielding`): 2 · state once, here 17.7 MB, and nothing in
#   the other steps.
# - bitsandbytes pages states of 100,000 elements or more: nothing for LLaMA-7B up to r = 9, everything from r = 25 on.
# - 8-bit states take 2.03 bytes a parameter instead of 8 (`AdamW8bit`, `tests/test_optim8bit.py`). Notebook 09 adds up what else is in
#   memory.
