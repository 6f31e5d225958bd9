# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 06 · Double quantization
#
# [← 05 Building NF4](05_building_nf4.ipynb) · [All notebooks](README.md) · [07 The QLoRA layer →](07_the_qlora_layer.ipynb)
#
# **Question.** How do the constants shrink from 0.5 bits a weight to 0.127, and what
# does that cost in error?
#
# **You will be able to**
#
# - count what a double-quantized tensor holds, to the byte
# - double-quantize constants by hand, with the library's bits
# - explain why the mean goes first, and predict what that saves
#
# **Needs:** blocks and their absmax ([04](04_blockwise_absmax.ipynb), sections 1 and
# 2); NF4's values ([05](05_building_nf4.ipynb), section 4); means and variances.
#
# **Hours:** 2 (1 to read and run, 1 for the exercises).
#
# **Papers:** QLoRA (arXiv 2305.14314) §3, "Double Quantization", eq. 5 and 6; its claim
# of "no performance degradation".
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import numpy as np
from drawings.nb06 import constants_and_errors
from grading import grade

import tinylora as tl
from tinylora import codebooks, quantize
from tinylora.kernels.rounding import CPU, CUDA, torch_mean
from tinylora.numerics import optimality
from tinylora.quant import quantize_constants

NF4 = codebooks.nf4()

# %% [markdown]
# ## 1 · What the constants cost
#
# A 4-bit tensor keeps one float32 constant $m_b$, the absmax, for each block of 64
# weights. Double quantization stores the $m_b$ in 8 bits. It cuts them into blocks of
# 256, and each of these blocks has one float32 constant of its own. In bits a weight
# (QLoRA §3):
#
# $$\frac{32}{64} = 0.5 \quad\longrightarrow\quad
# \frac{8}{64} + \frac{32}{64\cdot 256} = 0.126953125 .$$
#
# LLaMA-65B has $65.286\cdot 10^9$ weights, so it saves the paper's "approximately 3 GB".

# %%
before, after = 32 / 64, 8 / 64 + 32 / (64 * 256)
saved = (before - after) * 65.286e9 / 8
print(f"{before} -> {after} bits a weight, {before - after} saved; 65B: {saved / 1e9:.2f} GB")
assert (after, before - after) == (0.126953125, 0.373046875) and round(saved / 1e9, 2) == 3.04

# %% [markdown]
# A real tensor holds one more number, which the formula leaves out: the mean of its
# constants.

# %%
W = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)  # σ = 1
q = quantize(W, double_quant=True)

# %% tags=["hide-input"]
# Measures: the bytes of each part of a double-quantized tensor.
held = {"weights": q.packed, "constants": q.absmax_codes, "their constants": q.nested_absmax, "mean": q.offset}
for name, part in held.items():
    print(f"{name:16}{part.nbytes:10,} bytes {8 * part.nbytes / W.size:12.9f} bits a weight")
print(f"{'together':16}{q.nbytes:10,} bytes {q.bits_per_param:12.9f}")
assert q.bits_per_param == 4 + after + 32 / W.size == 4.126955032348633

# %% [markdown]
# ## 2 · Double quantization by hand
#
# Let $\mu$ be the mean of all $m_b$, and let $d$ be the 256 values of an 8-bit code.
# For block $j$ of 256 constants:
#
# $$n_j = \max_{b} |m_b - \mu|, \qquad
# k_b = \text{index of the value of } d \text{ nearest to } \frac{m_b - \mu}{n_j}, \qquad
# \tilde m_b = d[k_b]\, n_j + \mu .$$
#
# The paper calls $m_b$ $c_2^{FP32}$, $k_b$ $c_2^{FP8}$ and $n_j$ $c_1^{FP32}$. All
# arithmetic is float32.
#
# **Step 1: the constants and their mean.** A float32 sum depends on the order of its
# terms. `torch_mean` adds in torch's order. A float64 mean, rounded to float32, differs
# from it by at most one unit in the last place.

# %%
w = W[:256]  # 2^20 weights, 16,384 constants, 64 blocks of 256 of them
m = np.abs(w.reshape(-1, 64)).max(axis=1)
mu = torch_mean(m)
assert abs(mu - np.float32(m.mean(dtype=np.float64))) <= np.spacing(mu)

# %% [markdown]
# **Step 2: the quotients.** Subtract the mean, take each block's largest magnitude
# $n_j$, and multiply with $1/n_j$, as bitsandbytes does.

# %%
rows = (m - mu).reshape(-1, 256)
n = np.abs(rows).max(axis=1)
x = rows * (np.float32(1) / n)[:, None]

# %% [markdown]
# **Step 3: 8 bits and back.** Find the nearest of the 256 values, and restore. All
# parts equal the library's, if it rounds as bitsandbytes does on a GPU (`rule`).

# %%
d = codebooks.dynamic8()  # section 3
k = np.abs(x[..., None] - d).argmin(axis=-1).reshape(-1)
restored = d[k] * np.repeat(n, 256) + mu
print(f"mean {mu:.6f}; largest error of a constant {np.abs(restored - m).max():.6f}")

gpu = quantize(w, double_quant=True, rule="bitsandbytes-cuda")
assert (gpu.offset, gpu.nested_absmax.tobytes()) == (mu, n.tobytes())
assert (gpu.absmax_codes == k).all() and gpu.absmax.tobytes() == restored.tobytes()

# %% [markdown]
# Eq. 6 first restores the constants, and then the weights. Eq. 5 multiplies with the
# result, and adds the bypass $X L_1 L_2$:
#
# $$\mathrm{doubleDequant}(c_1, c_2, W) =
# \mathrm{dequant}(\mathrm{dequant}(c_1, c_2),\, W^{4bit}) = \hat W,
# \qquad Y = X \hat W + X L_1 L_2 .$$

# %%
W_hat = NF4[gpu.indices()] * np.repeat(restored, 64).reshape(w.shape)
assert W_hat.tobytes() == gpu.dequantize().tobytes()

# %% [markdown]
# Two details decide the last bits. Restoring rounds after the product and again after
# the sum. Rounding only once changes 6 % of the constants. On a CPU, bitsandbytes looks
# each quotient up in a table of 65,536 numbers. This table has no 0, so the quotient 0
# becomes index 131, the value 2.1e-5. About 0.2 % of the indices differ from a GPU's.

# %% tags=["hide-input"]
# Checks: rounding once instead of twice, and the CPU's table.
once = (d[k].astype(np.float64) * np.repeat(n, 256) + mu).astype(np.float32)
print(f"rounded once instead of twice: {(once != restored).mean():.1%} of the constants differ")
assert 0.05 < (once != restored).mean() < 0.08 and np.abs(once - restored).max() < 5e-7
zero = np.array([0, 1], np.float32)
print("the quotient 0 becomes", [f"index {rule.quantize_8bit(zero, d)[0][0]}" for rule in (CPU, CUDA)])
on_cpu, on_gpu = (quantize(W, double_quant=True, rule=f"bitsandbytes-{rule}") for rule in ("cpu", "cuda"))
share = (on_cpu.absmax_codes != on_gpu.absmax_codes).mean()
print(f"{share:.3%} of {on_cpu.absmax_codes.size:,} indices differ")
assert CPU.quantize_8bit(zero, d)[0][0] == 131 and d[127] == 0 and round(float(d[131]), 6) == 2.1e-5
assert 0.0015 < share < 0.0025

# %% [markdown]
# ## 3 · Which 8 bits?
#
# The paper says FP8. bitsandbytes uses its *dynamic map*.
#
# - **E4M3**, an FP8 format, has 8 values in each power of two. Its step grows with the
#   number.
# - **The dynamic map** has seven decades for each sign. Each has twice as many evenly
#   spaced values as the decade below it. From 0.1 to 1 its step is the same.
#
# The cell builds both. Two more codes serve as comparison: E5M2, with 4 values in each
# power of two, and Int8, which is evenly spaced.

# %%
# decade i: the middles of 2^i equal pieces of (0.1, 1) times 10^(i - 6)
decades = [10.0 ** (i - 6) * (0.1 + 0.9 * (np.arange(2**i) + 0.5) / 2**i) for i in range(7)]
positive = np.concatenate([*decades, [1.0]])
assert np.allclose(np.sort([*-positive[:-1], 0, *positive]), d, rtol=3e-7, atol=0)

small = np.arange(8) * 2.0**-9  # E4M3 below its smallest power of two
large = np.concatenate([2.0**e * (1 + np.arange(8) / 8) for e in range(-6, 9)])[:-1]  # the last is NaN
positive = np.concatenate([small, large]) / 448  # the largest becomes 1
e4m3 = codebooks.get_nested("fp8_e4m3")
assert (np.float32([*-positive[:0:-1], *positive]) == e4m3).all()

# %% tags=["hide-input"]
# Measures: positive values in the three highest decades; the step at 0.63 and at 0.22.
eights = {name: codebooks.get_nested(name) for name in ("dynamic8", "fp8_e4m3", "fp8_e5m2", "int8")}
counts, steps = {}, {}
for name, code in eights.items():
    counts[name] = [int(((low < code) & (code <= 10 * low)).sum()) for low in (0.1, 0.01, 0.001)]
    steps[name] = [round(float(np.diff(code)[np.searchsorted(code, at) - 1]), 4) for at in (0.63, 0.22)]
    print(f"{name:9} {len(code)} values, by decade …{counts[name][::-1]}; step at 0.63 and 0.22: {steps[name]}")
assert counts == {"dynamic8": [65, 32, 16], "fp8_e4m3": [27, 27, 26], "fp8_e5m2": [14, 13, 13], "int8": [115, 11, 1]}
assert steps["dynamic8"] == [0.0141, 0.0141] and steps["int8"] == [0.0079, 0.0079]
assert steps["fp8_e4m3"] == [0.0714, 0.0179] and steps["fp8_e5m2"] == [0.1429, 0.0357]

# %% [markdown]
# ## 4 · What it costs
#
# The cost is the squared error of the weights, divided by that with exact constants,
# minus 1. With `offset=0.0` nothing is subtracted: "without the mean".

# %%
w = W[:1024]  # 2^22 weights
exact = quantize(w)


def error(q):
    return np.square(q.dequantize() - w).mean(dtype=np.float64)


def cost(code, offset=None):
    return error(quantize(w, double_quant=True, nested_code=code, offset=offset)) / error(exact) - 1


# %% tags=["hide-input"]
# Measures: the cost of four 8-bit codes, beside its mean and deviation over 30 other draws.
COST = {  # mean, deviation with the mean subtracted; mean, deviation without
    "dynamic8": (0.00051, 0.00004, 0.00516, 0.00014),
    "fp8_e4m3": (0.00200, 0.00006, 0.09198, 0.00083),
    "fp8_e5m2": (0.00794, 0.00018, 0.36608, 0.00270),
    "int8": (0.00022, 0.00002, 0.00162, 0.00005),
}
for name, (a, da, b, db) in COST.items():
    more = cost(name), cost(name, offset=0.0)
    print(f"{name:9} with the mean {more[0]:.5f} ({a:.5f} ± {da:.5f})  without {more[1]:.5f} ({b:.5f} ± {db:.5f})")
    assert abs(more[0] - a) < 6 * da and abs(more[1] - b) < 6 * db

# %% tags=["hide-input"]
# Draws: the quotients with and without the mean, and the cost of each code (means of 30 draws).
constants_and_errors(exact.absmax, {name: (a, b) for name, (a, _, b, _) in COST.items()})

# %% [markdown]
# With the mean subtracted all four codes are nearly free: the dynamic map costs 0.05 %
# and E4M3 0.20 %. Without the mean the dynamic map costs 0.5 % and E4M3 9.2 %.
#
# ## 5 · Why the mean goes first
#
# The constants are positive. Once the mean is subtracted they are centred at 0, and a
# symmetric code fits: this is the paper's reason. The code's step says what it saves.
#
# **E4M3.** Its step is 1/8 of the power of two below the number. Half a step is at most
# 1/17 of the number. Without the mean, that is a share of the whole constant $m_b$.
# With the mean, it is a share of the deviation $m_b - \mu$. The cost is quadratic in
# the error. Let $M$ be a random block's absmax. The deviation's share of its square is
#
# $$\frac{\mathrm E M^2 - (\mathrm E M)^2}{\mathrm E M^2} = 2.5\ \% .$$

# %%
EM, EM2 = optimality.expected_max(64), optimality.expected_max(64, 2)  # of 64 normal weights
left = 1 - EM**2 / EM2
print(f"predicted: 1/{1 / left:.0f}; measured: 1/{COST['fp8_e4m3'][2] / COST['fp8_e4m3'][0]:.0f}")
assert round(left, 3) == 0.025

# %% [markdown]
# The cost should fall to 1/40. It falls to 1/46, because E4M3 is coarsest, relative to
# the number, just above a power of two. Its values are divided by 448, so one power of
# two lies at $256/448 = 4/7$. Without the mean 61 % of the quotients lie between 4/7
# and 0.8.
#
# **Int8.** Its step is $n/127$ everywhere. Subtracting the mean lowers $n$ from 4.14 σ
# to 1.54 σ. The cost should fall to $(1.54/4.14)^2 = 1/7.2$, and it does.

# %% tags=["hide-input"]
# Checks: E4M3's largest relative error, the quotients above 4/7, and n.
with_mean, without = (quantize_constants(exact.absmax, o, eights["fp8_e4m3"]) for o in (None, 0.0))
off = np.abs(without.restore() / exact.absmax - 1).max()
quotient = exact.absmax / np.repeat(without.absmax, 256)
deviation = np.abs(exact.absmax - with_mean.offset) / np.repeat(with_mean.absmax, 256)
share = ((quotient > 4 / 7) & (quotient < 0.8)).mean()
n_with, n_without = with_mean.absmax.mean(), without.absmax.mean()
print(f"E4M3 errs by up to {off:.4f} of the constant; quotients between 4/7 and 0.8: {share:.0%}")
print(f"mean quotient {quotient.mean():.2f} without the mean, mean magnitude {deviation.mean():.2f} with it")
print(f"n: {n_with:.2f} and {n_without:.2f}, squared ratio {(n_without / n_with) ** 2:.1f}")
assert round(COST["fp8_e4m3"][2] / COST["fp8_e4m3"][0]) == 46 and round(1 / left) == 40
assert abs(off - 1 / 17) < 1e-4 and abs(share - 0.61) < 0.02 and abs(quotient.mean() - 0.63) < 0.01
assert round(float(deviation.mean()), 2) == 0.22 and abs(n_with - 1.54) < 0.03 and abs(n_without - 4.14) < 0.03
assert abs(COST["int8"][2] / COST["int8"][0] / (4.14 / 1.54) ** 2 - 1) < 0.05

# %% [markdown]
# ## 6 · "No performance degradation"?
#
# The paper observes none (§3, §4), but only its figure 3 shows NF4 with and without
# double quantization. Here we check the embedded base model on 32 windows of 256 bytes of
# held-out text. We measure, in bits a byte, the divergence
# $D(p \,\|\, \hat p) = \sum p \log_2 (p/\hat p)$ of the quantized model's
# predictions $\hat p$ from the unquantized model's, $p$, and the change of the loss.

# %% tags=["hide-input"]
# Measures: divergence and loss of the quantized base model.
windows = 32  # with 256, which take a minute, this cell prints what the last sentence below says
text = np.frombuffer(tl.data.jargon("heldout")[: windows * 256 + 1], np.uint8).astype(int)
inputs, targets = text[:-1].reshape(windows, 256), text[1:].reshape(windows, 256, 1)


def log2_p(**how):
    model = tl.Llama.from_pretrained("base")
    if how:
        tl.quantize_linears(model, "nf4", **how)
    with tl.no_grad():
        z = model(inputs).data.astype(np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z / np.log(2) - np.log2(np.exp(z).sum(axis=-1, keepdims=True))


p = log2_p()
settings = {
    "exact constants": {"double_quant": False},
    "dynamic8 with mean": {"double_quant": True},
    "E4M3 without mean": {"double_quant": True, "nested_code": "fp8_e4m3", "offset": 0.0},
}
kl, loss, difference = {}, {}, {}
for name, how in settings.items():
    lost = p - log2_p(**how)
    by_window = (np.exp2(p) * lost).sum(axis=-1).mean(axis=1)
    kl[name] = by_window.mean()
    assert name != "exact constants" or abs(by_window[:16].mean() - 0.069) < 0.001  # notebook 22's KL
    loss[name] = np.take_along_axis(lost, targets, axis=-1).mean(axis=(1, 2))  # of each window
    change = loss[name] - loss["exact constants"]
    difference[name] = change.mean(), change.std() / np.sqrt(windows)
    print("{:19} divergence {:.5f}   loss {:+.4f} ± {:.4f}".format(name, kl[name], *difference[name]))
base, fine, coarse = kl.values()
print(f"divergence: {fine / base - 1:+.2%} and {coarse / base - 1:+.2%}")
(less, _), (more, se) = difference["dynamic8 with mean"], difference["E4M3 without mean"]
if windows == 32:
    assert abs(fine / base - 1) < 0.005 and 0.08 < coarse / base - 1 < 0.12
    assert -0.0012 < less < -0.0006 and abs(more) < se / 2
else:
    assert windows != 256 or (0.005 < more < 0.008 and more > 5 * se)

# %% [markdown]
# The divergence follows the error. Double quantization changes it by less than 0.5 %.
# E4M3 without the mean raises it by 10 %. The loss does not follow on so small a text:
# double quantization lowers it by 0.0009 bits, and E4M3 without the mean raises it by
# under half a standard error. On eight times the text E4M3 raises it by 0.0065 bits, 7
# standard errors.
#
# ## Where paper and code differ
#
# - The paper's constants are FP8. bitsandbytes' dynamic map errs less: 0.05 % against
#   0.20 % for E4M3 and 0.79 % for E5M2.
# - The 0.127 bits leave out the mean and partial blocks. The base model's smallest
#   layers, 96 × 192, have 288 constants, hence two blocks, and 0.1302 bits.
# - Eq. 6 does not mention the mean. Without it the restored weights have a relative
#   squared error of 1.04. Eq. 5 lacks the scale $s = \alpha/r$.
# - "Approximately 3 GB" counts all weights: 3.04 GB. The code quantizes only the linear
#   layers, $64.76\cdot 10^9$ weights, which save 3.02 GB.

# %% tags=["hide-input"]
# Checks: a small layer's bits, the error without the mean, and the linear layers of LLaMA-65B.
model = tl.Llama.from_pretrained("base")
k_proj = quantize(model.model.layers[0].self_attn.k_proj.weight.data, double_quant=True)
without_mean = NF4[gpu.indices()] * np.repeat(gpu.absmax - gpu.offset, 64).reshape(gpu.shape)
garbage = np.square(without_mean - W[:256]).mean(dtype=np.float64)
linear = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
print(f"{k_proj.bits_per_param:.4f} bits; error without the mean {garbage:.2f}; {linear / 1e9:.2f}e9 linear weights")
assert k_proj.shape == (96, 192) and len(k_proj.nested_absmax) == 2 and round(k_proj.bits_per_param, 4) == 4.1302
assert round(garbage, 2) == 1.04 and round(linear / 1e9, 2) == 64.76
assert round((before - after) * linear / 8e9, 2) == 3.02

# %% [markdown]
# ## Exercises
#
# Grading runs only the setup cell and the exercise cells: put helpers into the
# exercise's cell.
#
# ### 06-1 Smaller blocks
#
# At equal memory, double quantization allows smaller blocks. How small? Given:
#
# - `size`: an int, the number of weights, up to $10^{12}$
# - `budget`: an int, the bytes that may be held
#
# A double-quantized tensor holds the packed weights (two a byte; an odd one takes a
# whole byte), one byte for each block (a partial one too), a float32 for each 256
# blocks or part of 256, and the float32 mean.
#
# Return the smallest block size that fits, an int; or None if not even one block for
# the whole tensor fits. It is checked on small tensors, and on sizes that no array can
# hold, so that block sizes cannot be tried one by one.
#
# Hint: `-(-a // b)` is $\lceil a/b \rceil$. Larger blocks never take more bytes.


# %% tags=["exercise"]
def exercise_1(size, budget):
    """The smallest block size at which a double-quantized tensor of `size` weights holds at most `budget` bytes."""
    # BEGIN SOLUTION
    # 2^20 weights at 4.5 bits, 589,824 bytes: blocks of 17, against 64 with a float32 absmax
    for blocksize in range(1, size + 1):
        blocks = -(-size // blocksize)
        if -(-size // 2) + blocks + 4 * -(-blocks // 256) + 4 <= budget:
            return blocksize
    return None
    # END SOLUTION


# %%
_ = grade("06-1", exercise_1)

# %% [markdown]
# ### 06-2 What wrong scales cost
#
# Section 4 measured how far inexact constants raise the squared error. Predict it
# without the weights $W$. Let $\hat W$ have the exact constants and $\hat W'$ the
# inexact ones. Given:
#
# - `q`: a `QuantizedTensor` with exact constants `q.absmax`, in whole blocks of
#   `q.blocksize`; `q.dequantize()` gives $\hat W$
# - `other`: (blocks,) float32, the inexact constants
#
# Return $\mathrm E (W - \hat W')^2 - \mathrm E (W - \hat W)^2$, a float. It is checked
# on fresh weights that you do not see, within 8 %.
#
# Hint: write $\hat W' = \hat W (1 + \delta)$, where $\delta$ is one number for each
# block. Expand the square, and drop the term that averages out because $\delta$ has
# nothing to do with $W - \hat W$.


# %% tags=["exercise"]
def exercise_2(q, other):
    """The rise of the mean squared error when the constants q.absmax are replaced by `other`."""
    # BEGIN SOLUTION
    delta = other / q.absmax - 1.0
    blocks = q.dequantize("float32").reshape(-1, q.blocksize)
    return float(np.square(blocks * delta[:, None]).mean(dtype=np.float64))
    # END SOLUTION


# %%
_ = grade("06-2", exercise_2)

# %% [markdown]
# ## Summary
#
# - Double quantization stores the constants in 8 bits around their mean, in blocks of
#   256: 0.127 instead of 0.5 bits a weight.
# - By hand it equals `quantize(…, double_quant=True)` to the bit (`tinylora/quant.py`;
#   tests `tests/test_quant.py` and `tests/test_rounding.py`).
# - It costs 0.05 % of squared error with the dynamic map. Without the mean E4M3 costs
#   9.2 %.
# - Appendix [18](18_int4_and_nf4_at_equal_bits.ipynb) counts these bits to compare Int4
#   with NF4, and shows that signed scales break the trick.
#
# ## Build it
#
# Step 2 of [build_it.md](build_it.md) adds double quantization to your `my_qlora.py`,
# with Int8 in place of the dynamic map. `pytest notebooks -k my-2` grades it.
