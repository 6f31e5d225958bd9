# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 01 · QLoRA happens
#
# [All notebooks](README.md) · [02 A small autograd →](02_a_small_autograd.ipynb)
#
# **Question.** How can a model learn while its weight matrices are frozen in 4 bits?
#
# **You will be able to**
#
# - read a QLoRA run from the model to the trained adapter, line by line
# - predict how many numbers it trains and how many bytes it holds
# - write a training step, and say what each of its four lines does
#
# **Needs:** Python and NumPy; what a gradient is. No other notebook.
#
# **Hours:** 1½ (½ to read and run, 1 for the exercises).
#
# **Papers:** LoRA §4.1, equation 3; QLoRA §3, equations 5 and 6.
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import numpy as np
from drawings.nb01 import learning_and_memory
from grading import grade

import tinylora as tl
from tinylora import ops

# %% [markdown]
# ## 1 · A model and a text
#
# tinylora contains a small Llama, a language model of five layers.
# `from_pretrained("base")` loads it. It was trained on Shakespeare, the Bible and the
# CIA World Factbook. It reads a text byte by byte and gives each of the 256 possible
# next bytes a probability.
#
# `named_weights` lists its arrays with their names. `size` counts an array's numbers,
# and `nbytes` its bytes in memory.

# %%
model = tl.Llama.from_pretrained("base")
numbers = sum(w.size for _, w in model.named_weights())
dense_bytes = sum(w.nbytes for _, w in model.named_weights())
print(f"{numbers:,} numbers of 4 bytes each: {dense_bytes:,} bytes")

# %% [markdown]
# The model has never seen the Jargon File, a dictionary of hackers' slang.
# `tl.data.jargon` gives it as bytes, in two parts: one to train on, and a held-out one
# to measure on. Here is an entry of the held-out part, and below it what the
# model writes after the same beginning. `generate` draws one byte after the other from
# the model's probabilities.

# %%
text = tl.data.jargon("heldout")
prompt = "house wizard\n  n. "
start = text.find(prompt.encode())
print(text[start : start + 190].decode(), "…\n\n--- the model writes:")
print(prompt + model.generate(prompt, 160, temperature=0.6, seed=1))

# %% [markdown]
# ## 2 · One number for how well it reads
#
# If the model gave the byte that comes next the probability $p$, that byte costs
# $-\log_2 p$ *bits*. A model that knows nothing gives each byte $p = 1/256$, which
# costs 8 bits. The mean over many bytes is called bits per byte. Lower is better.
#
# `windows` cuts pieces of 129 bytes at random places out of the text. In each piece the
# first 128 bytes are the model's input. The last 128 are the answers: the byte after
# each input. `model(…)` returns 256 scores for every place, and
# `softmax_cross_entropy` turns scores and answers into the mean of $-\ln p$. That is
# the *loss*. `item` takes the number out of it, and division by $\ln 2$ makes it bits.
# `no_grad` says that no gradients are wanted.


# %%
def windows(split, count, seed):
    text = np.frombuffer(tl.data.jargon(split), np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(text) - 128, count)
    return np.stack([text[i : i + 129] for i in starts])


def loss(model, pieces):
    return ops.softmax_cross_entropy(model(pieces[:, :-1]), pieces[:, 1:])


def bits_per_byte(model):
    with tl.no_grad():
        return loss(model, heldout).item() / np.log(2)


heldout = windows("heldout", 64, seed=1)
measured = {"as loaded": bits_per_byte(model)}
print(f"held-out text, as loaded: {measured['as loaded']:.3f} bits per byte")

# %% [markdown]
# ## 3 · Four bits
#
# `quantize_linears` replaces 35 weight matrices, seven in each layer, by a form in 4
# bits. The embedding and the norms stay in 32 bits. All are frozen: none asks for a
# gradient.
#
# Each run of 64 weights forms a *block*, which stores its largest magnitude. There are
# 16 fixed values from −1 to 1: NF4. Divide a weight by the magnitude of its
# block; the nearest of the 16 values is its *choice*, and only that is stored.
#
# `get` finds a part of the model by its path, and `dequantize` gives the rounded
# weights back. Here are five weights of one matrix, before and after:

# %%
path = "model.layers.0.mlp.up_proj"
before = model.get(path).weight.data
tl.quantize_linears(model, code="nf4", blocksize=64, double_quant=True)
q = model.get(path).weight
print("before:", before[0, :5].round(4), f" {before.nbytes:,} bytes")
print("after: ", q.dequantize()[0, :5].round(4), f" {q.nbytes:,} bytes")
measured["in 4 bits"] = bits_per_byte(model)

# %% [markdown]
# The 4-bit matrix consists of four parts, which exercise 1 adds up:
#
# - `packed`, the choices among 16 values: two weights share a byte
# - one byte for each block, `absmax_codes`: the block's largest magnitude, itself
#   quantized (this is *double quantization*)
# - one float32 for each 256 blocks, `nested_absmax`: the scale of those bytes
# - one float32 for the matrix, `offset`: the mean of the largest magnitudes

# %% tags=["hide-input"]
# Checks: the parts of a 4-bit matrix, the bits a weight, and what rounding changes.
parts = [getattr(q, name).nbytes for name in ("packed", "absmax_codes", "nested_absmax", "offset")]
stored = [w for _, w in model.named_weights() if isinstance(w, tl.QuantizedTensor)]
bits = 8 * sum(w.nbytes for w in stored) / sum(w.size for w in stored)
small_bytes = sum(w.nbytes for _, w in model.named_weights())
lost = measured["in 4 bits"] - measured["as loaded"]
print(f"{path}: {' + '.join(f'{n:,}' for n in parts)} = {q.nbytes:,} bytes")
print(f"all {len(stored)} matrices: {bits:.3f} bits a weight (with float32 magnitudes: {4 + 32 / 64})")
print(f"the whole model: {small_bytes:,} bytes; {dense_bytes:,} in 32 bits, {dense_bytes // 2:,} in 16")
print(f"rounding changes bits per byte by {lost:.3f}: {measured['as loaded']:.3f} became {measured['in 4 bits']:.3f}")
assert sum(parts) == q.nbytes and len(stored) == 35 and round(bits, 2) == 4.13
assert -0.03 < lost < 0 and dense_bytes > 2 * 3.3 * small_bytes
assert (tl.dtypes.round_to(before, "bfloat16") == before).all()  # as it was loaded, it fits into 16 bits

# %% [markdown]
# So rounding changes little. (Here it even lowers the bits; `figures/README.md` says why
# that is no better model.) But the rounded weights cannot be trained as they are. When all
# weights are trained, a step moves each by about the learning rate, 0.001 say. Except in a
# few nearly empty blocks, the next of the 16 values is farther away, so rounding after the
# step undoes it. `indices` gives each weight's choice:

# %%
stepped = tl.quantize(q.dequantize() + 0.001, double_quant=True)  # a step, then rounding
back = (stepped.indices() == q.indices()).sum()
print(f"{back:,} of {q.size:,} weights are rounded back to where they were")
assert 0.97 < back / q.size < 1

# %% [markdown]
# ## 4 · The bypass
#
# LoRA leaves each matrix $W$ (out × in) frozen and adds a path beside it: two small
# matrices $A$ (r × in) and $B$ (out × r) in float32. For an input $x$ the output
# is now
#
# $$h = W x + s\,B A x, \qquad s = \alpha / r .$$
#
# The *rank* $r$ is small, here 8. $α$ is a constant, here 16, so $s = 2$. $A$ starts
# with random numbers, which `seed` makes the same in every run. $B$ starts with zeros,
# so at first the bypass adds nothing. Only $A$ and $B$ are trained.

# %%
tl.seed(0)
tl.add_lora(model, r=8, alpha=16)
trained = [p for _, p in model.trainable()]  # an A and a B for each of the 35 matrices
assert bits_per_byte(model) == measured["in 4 bits"]  # B = 0: the same, to the last digit
tl.print_trainable_parameters(model)

# %% [markdown]
# ## 5 · The training loop
#
# Each of the 60 steps takes eight new pieces of the training text. Four lines do the
# work:
#
# 1. `zero_grad` forgets the gradients of the step before. Without it they would add up.
# 2. `loss` runs the model forward and measures how badly it predicts these pieces.
# 3. `backward` walks back through everything that was computed, and leaves in `p.grad`
#    how the loss changes with each number of $A$ and $B$. It passes *through* the 4-bit
#    matrices and leaves nothing there.
# 4. `step` moves each trained number against its gradient, by about the learning rate
#    `lr`. `AdamW` keeps two running averages for each number: of its gradient, and of
#    the gradient's square.
#
# Every 15 steps the held-out text is measured.


# %% tags=["hide-input"]
# Measures: all bytes of the 4-bit matrices, for the comparison after training.
def base_bytes(model):
    stored = [w for _, w in model.named_weights() if isinstance(w, tl.QuantizedTensor)]
    parts = [(w.packed, w.absmax_codes, w.nested_absmax, w.offset) for w in stored]
    return b"".join(a.tobytes() for four in parts for a in four)


base_before = base_bytes(model)

# %%
batches = windows("train", 60 * 8, seed=2).reshape(60, 8, 129)
optimizer = tl.AdamW(trained, lr=0.005)
losses, checks = [], {0: measured["in 4 bits"]}
for step, batch in enumerate(batches, 1):
    optimizer.zero_grad()
    batch_loss = loss(model, batch)
    batch_loss.backward()
    optimizer.step()
    losses.append(batch_loss.item() / np.log(2))
    if step % 15 == 0:
        checks[step] = bits_per_byte(model)

# %% [markdown]
# ## 6 · What happened
#
# The 4-bit base has the same bytes as before. All that was learned is in $A$ and $B$.

# %%
assert base_bytes(model) == base_before
measured["trained"] = bits_per_byte(model)
for name, value in measured.items():
    print(f"{name:10} {value:.3f} bits per byte")
print(f"the {len(base_before):,} bytes of the 4-bit matrices: unchanged")
print("\n" + prompt + model.generate(prompt, 160, temperature=0.6, seed=2))

# %% [markdown]
# The sentences make no sense: the model is tiny, and 60 steps are few. But it no longer
# writes a play. It writes of programs and computers.
#
# Memory is the reason for this. A trained number takes 16 bytes: 4 for itself, 4
# for its gradient, 8 for the two averages of `AdamW`. A frozen 4-bit weight takes 4.13
# bits and nothing else.

# %% tags=["hide-input"]
# Draws: the loss at each step, and the memory of training all numbers beside that of QLoRA.
count = sum(p.size for p in trained)
memory = {
    "weights": (dense_bytes, small_bytes + sum(p.nbytes for p in trained)),
    "gradients": (4 * numbers, sum(p.grad.nbytes for p in trained)),
    "AdamW": (8 * numbers, optimizer.state_bytes),
}
full, here = (sum(pair[i] for pair in memory.values()) for i in (0, 1))
print(f"all numbers trained: 16 × {numbers:,} = {full:,} bytes")
print(f"QLoRA: {small_bytes:,} + 16 × {count:,} = {here:,} bytes, {full / here:.1f} times fewer")
assert full == 16 * numbers and here == small_bytes + 16 * count and round(full / here, 1) == 9.6
assert count == 138_240 and measured["in 4 bits"] - measured["trained"] > 0.4
learning_and_memory(losses, checks, memory)

# %% [markdown]
# (What the forward pass keeps for the backward pass comes on top; notebook
# [09](09_where_did_the_memory_go.ipynb) counts it.) For 65 billion weights QLoRA's
# introduction gives more than 780 GB if all are trained, and less than 48 GB for QLoRA.
#
# ## 7 · Three ideas, and a fourth
#
# - **LoRA** trains 138,240 numbers instead of 2,078,784. Gradients and averages are
#   held for those only. Notebook [02](02_a_small_autograd.ipynb) writes the `backward`
#   that you saw, and [03](03_the_bypass.ipynb) derives from it why $B$ starts with
#   zeros.
# - **4 bits.** Blocks keep one large weight from spoiling the rounding of all others,
#   and NF4's values lie closest where most weights are. [04](04_blockwise_absmax.ipynb)
#   derives the blocks, [05](05_building_nf4.ipynb) the 16 values.
# - **Double quantization** stores the blocks' magnitudes in 8 bits instead of 32. That
#   takes a weight from 4.5 bits to 4.13, and [06](06_double_quantization.ipynb) says
#   what it costs.
# - **Paged optimizers** are the fourth idea: the averages of `AdamW` leave a GPU's
#   memory while they are not needed. This run does without;
#   [08](08_paged_optimizers.ipynb) builds one.
#
# Notebook [07](07_the_qlora_layer.ipynb) puts the first three into one layer, and
# [10](10_merging.ipynb) asks whether $s\,B A$ can be added to $W$ in the end.
#
# ## Where paper and code differ
#
# - QLoRA computes in bfloat16 (16 bits). This notebook computes in float32.
# - QLoRA's equation 5 leaves out the scale $s$. The authors' code has it, and so has
#   tinylora.
# - LoRA's paper adapts two matrices of each layer in most experiments. QLoRA and this
#   notebook adapt all.
#
# ## Exercises
#
# Grading runs only the setup and the exercises' cells: put helpers there.
#
# ### 01-1 Predict the counts
#
# Given:
#
# - `shapes`: a list of pairs (out, in), the shapes of a model's weight matrices
# - `r`: the rank, an int
# - `blocksize`: the weights in a block, an int
#
# Return two ints: how many numbers LoRA trains in all, and how many bytes the 4-bit
# matrices take in all, with double quantization (section 3 lists the four parts).
#
# Checked: against the library, on fresh shapes. Hint: each matrix is cut by itself.
# Whatever does not come out even is rounded up; `-(-a // b)` is a / b, rounded up.


# %% tags=["exercise"]
def exercise_1(shapes, r, blocksize):
    """Return (trained numbers, bytes of the 4-bit matrices)."""
    # BEGIN SOLUTION
    trained = stored = 0
    for n_out, n_in in shapes:
        blocks = -(-n_out * n_in // blocksize)
        trained += r * (n_in + n_out)
        stored += -(-n_out * n_in // 2) + blocks + 4 * -(-blocks // 256) + 4
    return trained, stored
    # END SOLUTION


# %%
_ = grade("01-1", exercise_1)

# %% [markdown]
# ### 01-2 Write the training loop
#
# Given:
#
# - `params`: a list of Tensors; each has its numbers in `.data` (an array) and its
#   gradient in `.grad` (an array of the same shape, or None)
# - `loss`: a function without arguments; each call draws new data and returns a Tensor
#   with `.item()` and `.backward()`
# - `steps`, an int, and `lr`, a float
#
# Make `steps` steps of plain gradient descent, in place of AdamW: subtract `lr` times
# the gradient from each `.data`. Return the list of the losses as floats, each taken
# before its step.
#
# Checked: the losses and the final numbers, against gradient descent done by hand; one
# call of `loss` a step. Hint: `backward` *adds* to what `.grad` holds, and a gradient
# may be left over from before your first step.


# %% tags=["exercise"]
def exercise_2(params, loss, steps, lr):
    """Train params by gradient descent; return the losses."""
    # BEGIN SOLUTION
    history = []
    for _ in range(steps):
        for p in params:
            p.grad = None
        now = loss()
        now.backward()
        for p in params:
            p.data = p.data - lr * p.grad
        history.append(now.item())
    return history
    # END SOLUTION


# %%
_ = grade("01-2", exercise_2)

# %% [markdown]
# ## Summary
#
# - QLoRA freezes the matrices in 4 bits and trains a bypass beside each:
#   `tinylora/lora.py`, `tests/test_lora.py`.
# - Double-quantized NF4 takes 4.13 bits a weight: `tinylora/quant.py`,
#   `tests/test_quant.py`.
# - 60 steps moved no byte of the 4-bit base. The held-out text costs over 0.4 bits
#   per byte less: `tinylora/training/train.py`, `tests/test_train.py`.
# - The command `tinylora finetune` adds paging, checkpoints and a report:
#   `tinylora/training/finetune.py`.
