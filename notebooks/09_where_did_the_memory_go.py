# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 09 · Where did the memory go?
#
# [← 08 Paged optimizers](08_paged_optimizers.ipynb) · [All notebooks](README.md) · [10 Merging →](10_merging.ipynb)
#
# **Question.** Can every byte of a training step be predicted before the step runs?
#
# **You will be able to**
#
# - count the bytes of weights, adapters, gradients, states and tape from shapes alone
# - tell which of these bytes LoRA, 4 bits and checkpointing each save
# - explain why a 7B model takes 5 GB and not 3.5
#
# **Needs:** the tape ([02](02_a_small_autograd.ipynb), section 4); what a bypass saves
# in memory ([03](03_the_bypass.ipynb), section 5); double quantization
# ([06](06_double_quantization.ipynb), section 1); AdamW's state
# ([08](08_paged_optimizers.ipynb), section 1).
#
# **Hours:** 2 (1 to read and run, 1 for the exercises).
#
# **Papers:** QLoRA (arXiv 2305.14314) §1, §2 and §3, "Double Quantization". Settled in
# section 6: "Why does a 7B model take 5 GB and not 3.5?" (bitsandbytes issue 790, qlora
# issue 269).
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import gc
import tracemalloc

import numpy as np
from grading import grade

import tinylora as tl
from tinylora import ops
from tinylora.costs import memory, parameters
from tinylora.figures.memory import account_bars
from tinylora.papers import qlora_numbers
from tinylora.tape import watch_rebuilds
from tinylora.training import finetune

# %% [markdown]
# ## 1 · What goes with the weights
#
# The model that ships with tinylora is a Llama with $L = 5$ blocks of width $d = 192$.
# Its MLP has width $m = 512$, its keys and values $d_{kv} = 96$. It knows $V = 256$
# tokens, and its embedding is also its head. QLoRA holds three kinds of *frozen* bytes:
#
# - codes: half a byte for each weight of a linear layer;
# - constants: for each layer one byte for each block of 64 weights, 4 bytes for each 256
#   blocks, and 4 bytes for the mean;
# - embedding and norms in float32: $4\,(Vd + (2L+1)\,d)$ bytes.

# %%
d, m, kv, L, V, r = 192, 512, 96, 5, 256, 16
q_o, k_v, gate_up, down = 2 * [(d, d)], 2 * [(kv, d)], 2 * [(m, d)], [(d, m)]  # (out, in)
shapes = L * (q_o + k_v + gate_up + down)  # all 35 linear layers
sizes = [out * inner for out, inner in shapes]
by_hand = {
    "embedding, norms": 4 * (V * d + (2 * L + 1) * d),
    "codes": sum(sizes) // 2,
    "constants": sum(-(-n // 64) + 4 * -(-n // (64 * 256)) + 4 for n in sizes),
}

# %% [markdown]
# Each bypass has $r\,(d_{in} + d_{out})$ *trained* numbers. Each of them needs 4 bytes
# for its value, 4 for its gradient, and 8 for AdamW's two moments, together 16 bytes.

# %%
trained = sum(r * (out + inner) for out, inner in shapes)
by_hand |= {"adapters": 4 * trained, "gradients": 4 * trained, "states": 8 * trained}
for name, size in by_hand.items():
    print(f"{name:17}{size:10,} bytes")
assert sum(by_hand.values()) == 5_674_876 and 16 * trained == 4_423_680

# %% [markdown]
# 78 % of these bytes belong to the trained numbers. The linear layers cost 4.128 bits a
# weight. In Llama-7B they cost 4.127, as the paper says:
#
# $$4 + \frac{8}{64} + \frac{32}{64 \cdot 256} = 4.126953\ldots$$

# %% tags=["hide-input"]
# Checks: the share of the trained numbers, and the bits a weight.
bits = {"base": 8 * (by_hand["constants"] + by_hand["codes"]) / sum(sizes)}
seven = memory.predict("llama-7b", "qlora", r=64, precision=memory.PAPER)
linear = [out * inner for out, inner in parameters.llama_shapes(memory.MODELS["llama-7b"])]
bits["llama-7b"] = 8 * (seven.codes + seven.constants) / sum(linear)
print(", ".join(f"{name}: {b:.6f} bits a weight" for name, b in bits.items()))
assert (round(bits["base"], 3), round(bits["llama-7b"], 3)) == (4.128, 4.127)
assert abs(bits["llama-7b"] - 4.126953125) < 2e-6
assert round(16 * trained / sum(by_hand.values()), 2) == 0.78

# %% [markdown]
# ## 2 · What goes with the tokens
#
# The *tape* is what the pullbacks captured. For $b$ sequences of $t$ tokens, $n = b\,t$.
# One block with a bypass on every layer keeps:
#
# | operation | keeps | numbers |
# |---|---|---|
# | two RMSNorms | $x$, and $\rho$ for each row | $2\,n\,(d + 1)$ |
# | bypasses | $x$ of qkv (one), of o, of gate and up (one), of down | $n\,(3d + m)$ |
# | bypasses | $A x$, seven times | $7\,n\,r$ |
# | attention | $q, k, v$ | $n\,(d + 2\,d_{kv})$ |
# | attention | $P$, for 64 queries at a time | $b \cdot heads \sum 64\,e$ |
# | $\mathrm{silu}(g) \odot u$ | $\sigma(g)$, $\mathrm{silu}(g)$ and $u$ | $3\,n\,m$ |
#
# Here $\rho$ is $1/\sqrt{\text{mean}(x^2)}$, and $g$ and $u$ come from gate and up. $P$
# holds the attention's probabilities: the first 64 queries see at most $e = 64$ keys,
# the next 64 see at most 128, and so on up to $t$. Frozen layers keep only their own
# weights, which are counted already.

# %%
b, t, heads = 1, 256, 4
n = b * t
block = {
    "norms: x, ρ": 2 * n * (d + 1),
    "bypasses: x": n * (3 * d + m),
    "bypasses: A x": 7 * n * r,
    "attention: q, k, v": n * (d + 2 * kv),
    "attention: P": b * heads * sum(64 * end for end in range(64, t + 1, 64)),
    "MLP: σ, silu, u": 3 * n * m,
}
one_block = 4 * sum(block.values())

# %% [markdown]
# Outside the blocks lie the rotary table (the positions' sines and cosines), the last
# norm, and the loss's arrays. The first block's first norm keeps nothing, because no
# gradient goes to the frozen embedding.

# %%
rotary = 4 * 48 * t  # a head is 48 wide
loss_keeps = 4 * n * (V + 1)  # float32: for each row V probabilities and a weight
loss_keeps += 2 * 8 * n  # int64: the rows' numbers and the targets
outside = rotary + 4 * n * (d + 1) + loss_keeps
by_hand["tape"] = L * one_block - 4 * n * (d + 1) + outside
print(f"tape {by_hand['tape']:,} bytes, of which a block has {one_block:,}")
assert by_hand["tape"] == 21_543_936

# %% tags=["hide-input"]
# Measures: the share of each operation in a block's tape.
for name, numbers in block.items():
    print(f"{name:20}{4 * numbers:10,} bytes, {4 * numbers / one_block:6.1%} of a block")
assert round(4 * block["MLP: σ, silu, u"] / one_block, 2) == 0.37

# %% [markdown]
# ## 3 · The same bytes, measured
#
# Now one step runs on 256 bytes of text. The next two cells add up the arrays that
# exist.


# %%
def prepared(method, checkpointing):
    job = finetune.Job(method=method, r=16, checkpointing=checkpointing)
    return finetune.prepare(job).train()


ids = np.frombuffer(tl.data.jargon("train")[:257], np.uint8).astype(int)[None]
x, y = ids[:, :-1].copy(), ids[:, 1:].copy()
model = prepared("qlora", False)
weights = [w for _, w in model.named_weights()]
quantized = [w for w in weights if isinstance(w, tl.QuantizedTensor)]
adapters = [p for _, p in model.trainable()]
loss = ops.softmax_cross_entropy(model(x), y)
tape = tl.tape_bytes(loss, exclude=weights)
loss.backward()


# %%
def total(arrays):
    return sum(a.nbytes for a in arrays)


measured = {
    "embedding, norms": total(weights) - total(quantized) - total(adapters),
    "codes": total(w.packed for w in quantized),
    "constants": total(w.constants for w in quantized),
    "adapters": total(adapters),
    "gradients": total(p.grad for p in adapters),
    "states": tl.AdamW(adapters, lr=0.1).state_bytes,
    "tape": tape,
}
print(f"{'':17}{'by hand':>12}{'measured':>12}")
for name, size in measured.items():
    print(f"{name:17}{by_hand[name]:12,}{size:12,}")
assert measured == by_hand

# %% [markdown]
# All seven rows agree to the byte. The tape is 79 % of the step.
#
# ## 4 · What checkpointing keeps
#
# With *checkpointing* (QLoRA §2) a block keeps only its input, $n\,d$ numbers. When the
# backward pass comes to the block, the block runs again and its tape is rebuilt. So one
# block's tape exists at a time, with a rotary table of its own. The price is a second
# forward pass.

# %%
kept = 4 * L * n * d + outside  # after the forward pass
rebuilt = one_block + rotary  # one block, during the backward pass
model = prepared("qlora", True)
weights = [w for _, w in model.named_weights()]
loss, seen = ops.softmax_cross_entropy(model(x), y), []
assert kept == tl.tape_bytes(loss, exclude=weights)
with watch_rebuilds(lambda out: seen.append(tl.tape_bytes(out, exclude=weights))):
    loss.backward()
assert max(seen) == rebuilt and len(seen) == L
print(f"{kept:,} + {rebuilt:,} = {kept + rebuilt:,} bytes instead of {tape:,}")

# %% [markdown]
# Checkpointing divides the tape by 3.7. The sum is an upper bound: when a block is
# rebuilt, the loss's arrays are gone.
#
# ## 5 · Four methods
#
# `memory.predict` is the count by hand for any Llama, and `memory.measure` the sum over
# arrays. For four methods they agree in every row.

# %% tags=["hide-input"]
# Checks: predicted and measured bytes of four methods.
METHODS = {
    "full fine-tuning": ("full", False),
    "LoRA, 16-bit base": ("lora", False),
    "QLoRA": ("qlora", False),
    "QLoRA, checkpointing": ("qlora", True),
}
accounts = []
for label, plan in METHODS.items():
    predicted = memory.predict("base", plan[0], r=16, seq_len=256, checkpointing=plan[1], label=label)
    accounts.append(memory.measure(prepared(*plan), (x, y, None), label=label))
    assert accounts[-1].rows() == predicted.rows()
print(memory.describe(accounts))
full, lora, qlora, checkpointed = accounts
states = [round((a.total - a.activations) / 1e6, 1) for a in accounts]
assert states == [33.3, 8.7, 5.7, 5.7] and round(lora.activations / full.activations - 1, 3) == 0.008
assert round(qlora.activations / qlora.total, 2) == 0.79 and round(tape / (kept + rebuilt), 1) == 3.7
assert memory.predict("base", batch_size=8, seq_len=256, shards=2).activations == 172_056_576
assert list(qlora.rows().values()) == list(by_hand.values()) and checkpointed.activations == kept + rebuilt

# %% tags=["hide-input"]
# Draws: the bytes of a step by method and part.
account_bars(accounts, "The tape is 79 % of QLoRA's step, and only checkpointing shrinks it")

# %% [markdown]
# All bytes but the tape are 33.3 MB in full fine-tuning, 8.7 MB with LoRA and 5.7 MB
# with QLoRA. The tape grows by 0.8 %, by the bypasses' $A x$. More tokens make only the
# tape longer: with 8 sequences it is 172,056,576 bytes.
#
# **A second witness.** Python's `tracemalloc` knows nothing of tapes. It counts what
# NumPy allocates.

# %% tags=["hide-input"] margin=0.005
# Measures: allocated bytes after the forward pass, and the peaks of two steps whose gradients are added up.


def allocated(model):
    model._rope.clear()
    gc.collect()
    tracemalloc.start()
    began, found, peaks = tracemalloc.get_traced_memory()[0], {}, []
    for _ in range(2):
        loss = ops.softmax_cross_entropy(model(x), y)
        peaks.append(tracemalloc.get_traced_memory()[0] - began)
        tracemalloc.reset_peak()
        loss.backward(into=found)
        del loss
        peaks.append(tracemalloc.get_traced_memory()[1] - began)
    tracemalloc.stop()
    return peaks[0], peaks[1], peaks[3]


print(f"{'':22}{'tape held':>12}{'allocated':>12}{'tape + gradients':>18}{'peak':>12}{'second peak':>13}")
ratios = {}
for (label, plan), a in zip(METHODS.items(), accounts, strict=True):
    model = prepared(*plan)
    model(x)  # what is made once and kept, such as tables for unpacking, is made now
    held, grown = a.activations - plan[1] * rebuilt, a.activations + a.gradients
    after, first, second = allocated(model)
    ratios[label] = after / held, first / grown, second / grown
    print(f"{label:22}{held:12,}{after:12,}{grown:18,}{first:12,}{second:13,}")
assert all(1 <= after < 1.025 for after, _, _ in ratios.values())
assert 0.7 < ratios["full fine-tuning"][1] < 0.8 and all(1.03 < second < 1.25 for _, _, second in ratios.values())

# %% [markdown]
# The allocator finds the tape, and up to 2 % more for Python's objects. The peaks show
# two limits of the account:
#
# - The rows need not be full at the same moment. In full fine-tuning the first step's
#   peak lies a quarter below tape plus gradients, because the last gradients arrive
#   when most of the tape is gone. In the second step the rows do add up.
# - Working memory, such as dequantized weights, is not counted. It adds 4 to 12 % to
#   the second step.
#
# ## 6 · Why 5 GB and not 3.5?
#
# Half a byte for each of 7 billion weights is 3.5 GB; Llama-7B has 6.74 billion. It has
# 32 blocks of width $h = 4096$, MLPs of width $f = 11008$, and embedding and head of
# 32,000 tokens each. The paper keeps in 16 bits what is not in 4, and AdamW's moments in
# 32 bits.

# %%
h, f, deep, r64 = 4096, 11008, 32, 64
linear = deep * (4 * h * h + 3 * h * f)
dense = 2 * 32000 * h + (2 * deep + 1) * h  # embedding, head, norms
bypasses = deep * r64 * (4 * 2 * h + 3 * (h + f))
steps = {
    "half a byte a weight": (linear + dense) // 2,
    "embedding, head and norms in 16 bits": 2 * dense - dense // 2,  # in place of half a byte
    "constants": linear // 64 + 4 * linear // (64 * 256) + 4 * 7 * deep,
    "adapters of r = 64": 2 * bypasses,
    "their gradients": 2 * bypasses,
    "their moments": 8 * bypasses,
}
so_far = np.cumsum(list(steps.values()))
for (what, size), reached in zip(steps.items(), so_far, strict=True):
    print(f"{what:38}+{size / 1e9:5.2f} ={reached / 1e9:5.2f} GB")
assert list(so_far) == [size for _, size in qlora_numbers.five_gigabytes("7b")[:6]]

# %% [markdown]
# - Loading takes 3.87 GB and not 3.37. Embedding and head are not quantized, which adds
#   0.39 GB. The constants add 0.10 GB.
# - Training adds the adapters, their gradients and their moments, which makes 5.78 GB.
#   The 5 GB that readers see lie between loading and training.
# - 512 tokens under checkpointing make it 6.05 GB.
#
# The same sum for 65B gives the paper's two bounds, "more than 780 GB" for full
# fine-tuning and less than 48 GB for QLoRA. Full fine-tuning takes 12 bytes a weight: 2
# for the weight, 2 for the gradient, 8 for the moments.
#
# $$12 \cdot 65{,}285{,}660{,}672 = 783.4 \text{ GB}.$$
#
# LoRA takes 141.1 GB, 5.6 times less, and QLoRA 44.9 GB, another 3.1 times less (with
# $r = 64$ and 512 tokens under checkpointing).

# %% tags=["hide-input"]
# Checks: the ladder's numbers, and the accounts of Llama-65B.
ladder = [f"{size / 1e9:.2f}" for _, size in qlora_numbers.five_gigabytes("7b")]
assert ladder == ["3.37", "3.76", "3.87", "4.19", "4.51", "5.78", "6.05"]
assert [f"{steps[s] / 1e9:.2f}" for s in ("embedding, head and norms in 16 bits", "constants")] == ["0.39", "0.10"]
assert memory.parameters(memory.MODELS["llama-7b"]) == linear + dense == 6_738_415_616
count = memory.parameters(memory.MODELS["llama-65b"])
paper = {"precision": memory.PAPER, "r": 64, "checkpointing": True}
big = [memory.predict("llama-65b", method, **paper) for method in ("full", "lora", "qlora")]
print(memory.describe(big))
assert count == 65_285_660_672 and big[0].total - big[0].activations == 12 * count
assert (round(12 * count / 1e9, 1), round(16 * count / 1e9, 1)) == (783.4, 1044.6)
assert [round(a.total / 1e9, 1) for a in big] == [784.3, 141.1, 44.9]
assert [round(big[i].total / big[i + 1].total, 1) for i in (0, 1)] == [5.6, 3.1]
assert round((big[2].total - big[2].activations) / 1e9, 1) == 44.1

# %% [markdown]
# ## Where paper and code differ
#
# - The paper's 780 GB leave out the activations, and a float32 copy of the weights, with
#   which it would be 1,044.6 GB.
# - The paper prints 5,048 MB for the 7B model, which no sum gives
#   ([11](11_counting_lora.ipynb), sections 8 and 9, audits this and figure 6).
# - tinylora computes in float32, the paper in 16 bits.
#
# ## Exercises
#
# For grading only the setup cell and the exercise cells are run. Put helpers inside the
# exercise's cell.
#
# ### 09-1 The deepest Llama that fits
#
# Given:
#
# - `budget`: bytes; the tape is not counted
# - `method`: `"full"`, `"lora"` (linear layers frozen in 16 bits) or `"qlora"` (in NF4)
# - `h` (even), `f`: a block has four linear layers h × h, three h × f, two norms of h
# - `vocabulary`: embedding and head are apart, vocabulary × h each; there is a last norm
# - `r`: the rank of the bypasses on all linear layers
#
# Return the largest number of blocks whose step fits, an int, or 0. Count bytes as in
# section 6, and each layer's constants as in section 1, rounded up. Checked: budgets
# that fit to the byte, and one byte less, against `memory.predict`. Hint: a step's
# bytes are `fixed + blocks * each`.


# %% tags=["exercise"]
def exercise_1(budget, method, h, f, vocabulary, r):
    """The largest number of blocks whose training step takes at most budget bytes."""
    # BEGIN SOLUTION
    # at the width of Llama-7B and 24 GiB: full fine-tuning 9, LoRA 54, QLoRA 153; Llama-7B has 32
    linear = 4 * [h * h] + 3 * [h * f]
    packed = sum(-(-n // 2) + -(-n // 64) + 4 * -(-n // (64 * 256)) + 4 for n in linear)
    bypasses = r * (4 * 2 * h + 3 * (h + f))
    outside = (2 * vocabulary + 1) * h
    if method == "full":
        fixed, each = 12 * outside, 12 * (sum(linear) + 2 * h)
    else:
        frozen = packed if method == "qlora" else 2 * sum(linear)
        fixed, each = 2 * outside, frozen + 2 * 2 * h + 12 * bypasses
    return max((budget - fixed) // each, 0)
    # END SOLUTION


# %%
_ = grade("09-1", exercise_1)

# %% [markdown]
# ### 09-2 Whose tape is it?
#
# The MLP is `y = down(silu(gate(x)) ⊙ up(x))` in float32. Its layers are frozen, in 4
# bits. Given:
#
# - `rows`, `d`, `m`, `r`: `x` is (rows, d); gate and up map d to m, down maps m to d
# - `adapted`: a tuple out of `"gate"`, `"up"`, `"down"`, the layers with a bypass of
#   rank r; it may be empty
# - `x_needs_gradient`: whether something before this MLP is trained
#
# Return the bytes of the tape after the forward pass, an int. Weights are not counted.
# A bypass captures its layer's `x` and `A x`. `silu(g)` captures `σ(g)` and `silu(g)`.
# A product `a ⊙ b` captures `b` for the gradient of `a`, and `a` for that of `b`. An
# array that several capture is held once. Checked: all sixteen cases, against
# `tl.tape_bytes`. Hint: does a gradient go into gate's branch, and into up's?


# %% tags=["exercise"]
def exercise_2(rows, d, m, r, adapted, x_needs_gradient):
    """The bytes of the tape of one MLP after its forward pass."""
    # BEGIN SOLUTION
    gate, up = (x_needs_gradient or name in adapted for name in ("gate", "up"))  # does a gradient go into this branch?
    numbers = len(adapted) * rows * r
    numbers += rows * d * ("gate" in adapted or "up" in adapted) + rows * m * ("down" in adapted)
    if gate:
        numbers += 3 * rows * m  # σ and silu(g) for silu, u for the product's gate side
    elif up:
        numbers += rows * m  # silu(g), which now only the product holds
    return 4 * numbers
    # END SOLUTION


# %%
_ = grade("09-2", exercise_2)

# %% [markdown]
# ## Summary
#
# - A step holds bytes that go with the weights and bytes that go with the tokens.
#   Counted by hand they equal the measured ones to the byte
#   (`tinylora/costs/memory.py`, `tests/test_memory.py`).
# - LoRA and 4 bits shrink the first kind, from 33.3 MB to 5.7 MB. Checkpointing shrinks
#   the second, from 21.5 MB to 5.8 MB.
# - Llama-7B in 4 bits takes 3.87 GB to load and 5.78 GB to train, without activations.
# - `tinylora memory` prints such an account for any Llama.
#
# ## Build it
#
# Step 5 of [build_it.md](build_it.md) writes the training loop of your `my_qlora.py`.
# `pytest notebooks -k my-5` grades it.
