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
# [← 07 The QLoRA layer](07_the_qlora_layer.ipynb) · [All notebooks](README.md) · [09 Where did the memory go? →](09_where_did_the_memory_go.ipynb)
#
# **Question.** What does a paged optimizer page, and how many bytes does it move?
#
# **You will be able to**
#
# - cut AdamW into pieces that give the bits of the whole
# - predict how many bytes a budget of resident pages moves
# - say which optimizer states bitsandbytes pages
#
# **Needs:** AdamW; which matrices LoRA trains ([03](03_the_bypass.ipynb)).
#
# **Hours:** 2 (1 to read and run, 1 for the exercises).
#
# **Papers:** QLoRA (arXiv 2305.14314) §3, "Paged Optimizers", and §4. Settled in section
# 6: "What do paged optimizers cost, and what is paged?" (bitsandbytes issues 962 and
# 801).
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import math

import numpy as np
from drawings.nb08 import walks
from grading import grade

import tinylora as tl
from tinylora import AdamW, Pager, Tensor
from tinylora.figures.paging import timeline
from tinylora.kernels.pools import WHOLE_TENSORS_FROM
from tinylora.optim import adamw_step
from tinylora.tape import tape_bytes

f32 = np.float32

# %% [markdown]
# ## 1 · AdamW treats every element by itself
#
# For each parameter $p$ with gradient $g$, AdamW keeps a running mean $m$ of $g$ and a
# running mean $v$ of $g^2$. In float32 this state takes 8 bytes an element. At step
# $t$, with the learning rate $\eta$ and constants $\beta_1$, $\beta_2$ and $\epsilon$
# (weight decay is left out):
#
# $$m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad
# v \leftarrow \beta_2 v + (1-\beta_2) g^2,$$
#
# $$p \leftarrow p - \frac{\eta}{1-\beta_1^t} \cdot
# \frac{m}{\sqrt{v}\,/\sqrt{1-\beta_2^t} + \epsilon} .$$


# %%
def adamw(p, g, m, v, t, lr=1e-2, b1=0.9, b2=0.999, eps=1e-8):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * (g * g)
    update = m / (np.sqrt(v) * (1 / math.sqrt(1 - b2**t)) + eps)
    return p - update * (lr / (1 - b1**t)), m, v


# %% [markdown]
# No element of a vector sees another. So the vector may be cut: the next cell updates
# 10,000 elements at once, then in pieces of 700. The bits are the same.

# %%
x = np.random.default_rng(0).standard_normal((4, 10_000), f32)
x[3] **= 2  # v is a mean of squares
p, g, m, v = x

whole = adamw(p, g, m, v, t=3)
pieces = [slice(start, start + 700) for start in range(0, 10_000, 700)]
cut = [adamw(p[i], g[i], m[i], v[i], t=3) for i in pieces]
assert np.concatenate(cut, axis=1).tobytes() == np.stack(whole).tobytes()

# %% tags=["hide-input"]
# Checks: another order of the pieces, and the library's step, give the same bits
backwards = [adamw(*x[:, i], t=3) for i in reversed(pieces)]
assert np.concatenate(backwards[::-1], axis=1).tobytes() == np.concatenate(cut, axis=1).tobytes()
assert cut[0][0].dtype == f32
p, g, m, v = x.copy()
adamw_step(p, g, m, v, 3, 1e-2)
assert np.stack([p, m, v]).tobytes() == np.concatenate(cut, axis=1).tobytes()

# %% [markdown]
# Not every optimizer can be cut: LAMB scales a tensor's update by its norm, and Muon
# orthogonalizes a matrix. The QLoRA code also clips the norm of all gradients to 0.3,
# but gradients are not paged.
#
# ## 2 · A page table
#
# Paging works "like regular memory paging between CPU RAM and the disk" (§3). The state
# is cut into *pages*. Fast memory has a fixed number of *frames*, and a page that lies
# in a frame is *resident*.
#
# - A *hit* is the use of a resident page.
# - A *fault* is the use of another page, which is copied in.
# - If all frames are taken, a fault first *evicts* a page: copies it out.
#
# LRU ("least recently used") evicts the page whose last use lies farthest back.


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
# The library's `Pager` makes real copies, to host memory or a file. For 1,000 uses of 12
# pages in random order, with 1 to 12 frames, its trace equals that of `lru`, and no
# write is lost.

# %% tags=["hide-input"]
# Checks: the Pager's trace is that of lru, and every page holds the number of its uses
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
# ## 3 · In a circle, and back and forth
#
# A step uses each of the $n$ pages once. Section 1 leaves the order free. *In a circle*,
# every step goes from the first page to the last. *Back and forth*, every second step
# goes from the last to the first. The figure walks over 6 pages with 4 frames.


# %%
def walk(n, steps, back_and_forth):
    uses = []
    for step in range(steps):
        order = list(range(n))
        uses += order[::-1] if back_and_forth and step % 2 else order
    return uses


def pages_moved(n, frames, steps, back_and_forth):
    trace = lru(walk(n, steps, back_and_forth), frames)
    return sum(event != "hit" for _, event in trace)  # a fault comes in, an evicted page goes out


# %% tags=["hide-input"]
# Draws: both walks for 6 pages, 4 frames and 4 steps
walks({name: lru(walk(6, 4, forth), 4) for name, forth in (("In a circle", 0), ("Back and forth", 1))}, 6)

# %% [markdown]
# Let $k<n$ be the number of frames, so that the *budget* is $k$ pages. AdamW writes on
# every page, so every eviction copies.
#
# **A circle defeats LRU.** The page used longest ago is evicted, and it is the next one
# needed. Every use is a fault:
#
# $$\text{bytes moved a step} = 2\cdot\text{state} \qquad (k<n).$$
#
# **Back and forth does not.** A step begins with the $k$ pages that the last step used
# last. These are hits, and only the other $n-k$ are faults:
#
# $$\text{bytes moved a step} = 2\cdot\frac{n-k}{n}\cdot\text{state} =
# 2\,(\text{state}-\text{budget}).$$
#
# No order moves less: $k$ pages are resident when a step begins, and all $n$ must be
# used.

# %%
print("budget   circle   back and forth   (bytes moved in step 6 / state)")
for frames in (40, 39, 30, 20, 10, 4, 2, 1):
    step_6 = [pages_moved(40, frames, 6, forth) - pages_moved(40, frames, 5, forth) for forth in (False, True)]
    assert step_6 == ([0, 0] if frames == 40 else [2 * 40, 2 * (40 - frames)])
    print("{:6.1%}{:9.2f}{:17.2f}".format(frames / 40, *(moved / 40 for moved in step_6)))

# %% [markdown]
# With one page too few, a circle moves 2.00 times the state a step. Back and forth moves
# 0.05 times the state. The library's `AdamW` goes back and forth.
#
# ## 4 · The same bits at every budget
#
# The folded cell runs real optimizers for 6 steps on 40 pages: eight budgets, both
# orders, pages in host memory and in a file, with and without *prefetching* (copying the
# next page in during the work on this one). All 64 runs end with the bits of the run
# without a budget, because every element goes through the same operations. From the
# second step on, all move the bytes of section 3.


# %% tags=["hide-input"]
# Measures: bytes moved, waits and final bits of 64 paged runs
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


unpaged, runs = run(AdamW, Pager())[2], 0
for frames in (40, 39, 30, 20, 10, 4, 2, 1):
    for kind in (Around, AdamW):
        trace = lru(walk(PAGES, STEPS, kind is AdamW), frames)
        faults = sum(event == "fault" for _, event in trace)
        expected = 0 if frames == PAGES else 2 if kind is Around else 2 * (PAGES - frames) / PAGES
        for pool in ("host", "file"):
            for ahead in (False, True):
                moved, waits, end = run(kind, Pager(frames * PAGE, PAGE, pool, prefetch=ahead))
                assert (moved[1:] == expected).all() and moved[0] == 1 + (PAGES - frames) / PAGES
                assert end == unpaged
                assert waits == (faults if not ahead or frames == 1 else STEPS if kind is Around and expected else 1)
                runs += 1
print(f"{runs} paged runs: the bytes of section 3, and the bits of the run without a budget")
assert runs == 64

# %% [markdown]
# So paging costs time and nothing else. `tinylora paging` measures the time on your
# machine. With prefetching (from 2 frames on) the optimizer waits for a page once a run
# (back and forth) or once a step (circle), not at every fault.
#
# ## 5 · The long sequence
#
# In the paper's case the state fits most of the time. Paging "only occurs when
# processing mini-batches with long sequence lengths, which is rare" (§4). When an
# allocation fails, all pages are evicted, and the function runs again:


# %%
def yielding(evict_all, f, *args):
    try:
        return f(*args)
    except MemoryError:
        pass
    evict_all()  # not inside `except`: there the exception keeps alive what f had allocated
    return f(*args)


# %% [markdown]
# `f` may run twice, so it must depend on its arguments alone.
#
# The folded cell trains the embedded model: 2 million weights in NF4, with adapters of
# rank 64 on all linear layers. A step takes a sequence of 64 bytes, but the sixth takes
# 256 bytes. The *tape* is what the forward pass keeps for the backward pass. The
# imitated device has room for 30 MB of tape and resident pages. Beyond that, the forward
# pass raises `MemoryError`.

# %% tags=["hide-input"]
# Measures: tape, bytes moved and final bits of a QLoRA run with one long sequence
LENGTHS, ROOM = [64] * 5 + [256] + [64] * 4, 30_000_000
TEXT = np.frombuffer(tl.data.jargon("train")[:2000], np.uint8).astype(int)


def train(room, budget=None, own=False):
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
        x = TEXT[at : at + length + 1].copy()  # a view would keep all of TEXT alive
        yielding(pager.evict_all, gradients, x) if own else pager.yielding(gradients, x)
        optimizer.step()
        optimizer.zero_grad()
        at += length
    return pager, tape, b"".join(q.data.tobytes() for q in model.parameters() if q.requires_grad)


pager, tape, end = train(ROOM, own=True)
library, _, rescued = train(ROOM)
roomy, _, undisturbed = train(math.inf)
state, counters = pager.total_bytes, pager.counters
moved = {s: sum(row[3] for row in pager.trace if row[0] == s) for s in range(1, 11)}
print(f"state {state:,} bytes in {len(pager)} pages; tape {tape[1]:,} bytes, in step 6 {tape[6]:,}")
print(f"moved in steps 1 to 10: {[round(n / state, 2) for n in moved.values()]} times the state")
print(f"the same adapters as with room for all: {end == undisturbed}")
assert (state, len(pager), tape[1], tape[6]) == (8_847_360, 160, 5_361_416, 23_264_264)
assert [round(n / 1e6, 1) for n in (tape[6], state, tape[6] + state)] == [23.3, 8.8, 32.1]
assert tape[6] < ROOM < tape[6] + state and tape[1] + state < ROOM
assert list(moved.values()) == [state, 0, 0, 0, 0, 2 * state, 0, 0, 0, 0] and counters.evictions == 160
assert end == rescued == undisturbed and library.counters.rescues == 1 and library.trace == pager.trace
assert roomy.counters.rescues == 0

# %% tags=["hide-input"]
# Draws: what is held, and what moves, step by step
timeline(pager.trace, pager.budget, tape=tape, room=ROOM, title="Pages move at the start and for the long sequence")

# %% [markdown]
# The long sequence's tape is 23.3 MB. With the state's 8.8 MB that is 32.1 MB, more than
# the 30 MB. All 160 pages go, and they return in the same step's update. This moves
# $2\cdot\text{state}$, 17.7 MB. After the first step no other step moves anything. The
# adapters end with the bits of a run with room for all.
#
# The alternative is a budget that always leaves room: $30-23.3=6.7$ MB. It moves
# $2\,(8.8-6.7)=4.2$ MB in every step. Waiting for the failure moves 17.7 MB for each
# long sequence, so it moves less if fewer than one step in 4.2 has one.

# %% tags=["hide-input"]
# Measures: the run whose budget always leaves room for the long sequence
small, _, end = train(ROOM, budget=ROOM - tape[6])
always = [sum(row[3] for row in small.trace if row[0] == s) / 1e6 for s in range(2, 11)]
print(f"budget {small.budget / 1e6:.1f} MB: {min(always):.2f} to {max(always):.2f} MB a step")
print(f"waiting for the failure: {2 * state / 1e6:.1f} MB for each long sequence")
assert end == undisturbed and small.counters.rescues == 0 and round(small.budget / 1e6, 1) == 6.7
assert {round(n, 1) for n in always} == {4.2} and round(2 * state / 1e6, 1) == 17.7
assert round(2 * state / 1e6 / np.mean(always), 1) == 4.2 and round((tape[6] + state - ROOM) / 1e6, 1) == 2.1

# %% [markdown]
# ## 6 · What bitsandbytes pages, and what it costs
#
# bitsandbytes issues 962 and 801 ask for both.
#
# **What is paged.** bitsandbytes pages the states of a parameter with **100,000 elements
# or more**, and no others. (The source of version 0.50 was read; its paging needs a GPU
# and was not run.) The states lie in CUDA's managed memory. Before a parameter's update,
# its whole states are prefetched to the GPU. Eviction is left to the CUDA driver. On a
# CPU, bitsandbytes warns and pages nothing.
#
# A LoRA matrix has $r \cdot \text{width}$ elements, where $r$ is the rank. The cell
# lists the matrices of a layer of LLaMA-7B, whose widths are 4096 and 11008:


# %%
def adapters(r, hidden=4096, ffn=11008):  # elements of A and B of the seven linear layers
    layers = [(hidden, hidden)] * 4 + [(hidden, ffn)] * 2 + [(ffn, hidden)]
    return [r * width for layer in layers for width in layer]


share = {}
for r in (8, 9, 10, 16, 24, 25, 64):
    sizes = adapters(r)
    share[r] = sum(n for n in sizes if n >= 100_000) / sum(sizes)
    print(f"r = {r:2}: paged {share[r]:6.1%} of the state")

# %% [markdown]
# Nothing is paged up to $r = 9$, 42 % of the state from $r = 10$ to 24, and everything
# from $r = 25$ on. The paper's $r = 64$ pages everything.

# %% tags=["hide-input"]
# Checks: Pager(whole_tensors=True) follows the rule; sizes at r = 64
for r in share:
    pager = Pager(budget=10**8, whole_tensors=True)
    for size in adapters(r):
        pager.allocate(2, size)
    assert pager.total_bytes - pager.unpaged_bytes == 8 * sum(n for n in adapters(r) if n >= 1e5)
    assert share[r] == (pager.total_bytes - pager.unpaged_bytes) / pager.total_bytes
assert WHOLE_TENSORS_FROM == 1e5 and sorted(set(adapters(1))) == [4096, 11008] and adapters(1).count(4096) == 11
assert [round(x, 3) for x in share.values()] == [0, 0, 0.423, 0.423, 0.423, 1, 1]
state_65 = 80 * 8 * sum(adapters(64, 8192, 22016))
print(
    f"r = 64: the state of LLaMA-65B has {state_65 / 1e9:.2f} GB; the largest of LLaMA-7B {8 * max(adapters(64)):,} bytes"
)
assert 8 * max(adapters(64)) == 5_636_096 and state_65 == 6_396_313_600

# %% [markdown]
# **What it costs.** The bits stay the same, and while everything fits, nothing moves. A
# long sequence moves at most $2\cdot\text{state}$. For LLaMA-65B with $r = 64$ the state
# is 6.40 GB.
#
# ## Where paper and code differ
#
# - §3 pages "the optimizer states". bitsandbytes pages only states of 100,000 elements
#   or more.
# - §4 reports "the same training speed" at batch size 16, without numbers. The count
#   agrees: where no sequence is long, nothing moves. The speed was not measured.
# - After a failure tinylora evicts all pages, 8.8 MB in section 5. CUDA's driver evicts
#   before an allocation fails, at best only the missing 2.1 MB. How it chooses pages
#   was not measured.
# - The paper's code takes `paged_adamw_32bit`. Notebook [19](19_states_in_8_bits.ipynb)
#   has 8 bits.
#
# ## Exercises
#
# Put helpers inside the exercise's cell.
#
# ### 08-1 The best that can be done
#
# LRU looks back. How many faults has a rule that knows all later uses? Given:
#
# - `uses`: a list of page numbers, in the order of their use
# - `frames`: an int, 1 or more
#
# Return an int, the smallest number of faults that any choice of evictions has. A page
# comes in only when it is used. Checked against an exhaustive search.
#
# Hint: which resident page is not needed for the longest time?


# %% tags=["exercise"]
def exercise_1(uses, frames):
    """Return the smallest number of faults with which the pages can be used in this order."""
    # BEGIN SOLUTION
    # evict what is used next the farthest ahead (Belady 1966). 40 pages in a circle, 40 times, with 20 frames: 840 faults,
    # so 800/39 = 20.5 a round after the first, which is n(n − k)/(n − 1); back and forth LRU has n − k = 20
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
# How many bytes does a whole run of the library's `AdamW` (back and forth) move, in and
# out together? Given:
#
# - `state`: bytes, a multiple of `page_bytes`
# - `page_bytes`: bytes
# - `budget`: bytes, at least one page; perhaps no multiple of `page_bytes`, or more than
#   the state
# - `steps`: an int; before the first step nothing is resident
# - `spikes`: the number of steps, never the first, before whose update all resident
#   pages are evicted
#
# Return an int. Checked against real runs.
#
# Hint: count pages; treat the first step alone, whose faults are copies too.


# %% tags=["exercise"]
def exercise_2(state, page_bytes, budget, steps, spikes):
    """Return the bytes that a Pager moves in a whole run."""
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
# ## Summary
#
# - AdamW is elementwise, so paging its state gives the same bits at every budget
#   (`tinylora/optim.py`, `tests/test_optim.py`).
# - With too few frames, a circle moves $2\cdot\text{state}$ a step
#   (`tinylora/paging.py`, `tests/test_paging.py`). Back and forth moves
#   $2\,(\text{state}-\text{budget})$ (`tinylora/costs/paging.py`,
#   `tests/papers/test_claims_qlora.py`).
# - A long sequence moves $2\cdot\text{state}$ once (`Pager.yielding`,
#   `tests/test_paging.py`).
# - bitsandbytes pages only states of 100,000 elements or more
#   (`tinylora/kernels/pools.py`, `test_whole_tensors_pages_what_bitsandbytes_pages` in
#   `tests/test_paging.py`).
#
# ## Build it
#
# Write AdamW with its state in pages: step 4 of [build_it.md](build_it.md).
# `pytest notebooks -k my-4` grades it.
