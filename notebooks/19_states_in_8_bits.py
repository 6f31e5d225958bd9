# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 19 · States in 8 bits (appendix)
#
# [← 18 Int4 and NF4 at equal bits](18_int4_and_nf4_at_equal_bits.ipynb) · [All notebooks](README.md) · [20 Limits and descendants →](20_limits_and_descendants.ipynb)
#
# **Question.** What does AdamW do if its two states are stored in 8 bits?
#
# **You will be able to**
#
# - write a step of AdamW whose state takes 2.03 bytes a parameter
# - cut that state into pages without changing a bit
# - derive two effects of the rounding that do not average out
#
# **Needs:** AdamW and pages ([08](08_paged_optimizers.ipynb), sections 1 to 4); blocks
# and their absmax ([04](04_blockwise_absmax.ipynb)); the dynamic map
# ([06](06_double_quantization.ipynb)).
#
# **Hours:** 2 (½ to read and run, 1½ for the exercises).
#
# **Papers:** Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv
# 2110.02861), §2; QLoRA (arXiv 2305.14314) §3, "Paged Optimizers".
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import itertools
import math

import numpy as np
from drawings.nb19 import two_effects
from grading import grade

from tinylora import AdamW, AdamW8bit, Pager, Tensor, codebooks
from tinylora.kernels.rounding import cpu_quantize_8bit
from tinylora.training.adamw8bit import adamw8bit_step

f32 = np.float32
d1, d2 = codebooks.dynamic8(signed=True), codebooks.dynamic8(signed=False)

# %% [markdown]
# ## 1 · A step with 8-bit states
#
# AdamW keeps a running mean $m$ of the gradients and a running mean $v$ of their
# squares. 8-bit optimizers store both as codes of 8 bits, in blocks of 256 with one
# float32 absmax $a$ each. A code $k$ is an index into a *dynamic map*, a sorted table of
# 256 values that lie densest near 0. The signed map $d_1$ is for $m$. The unsigned map
# $d_2$ is for $v$, since $v$ is never negative.

# %%
for name, d in (("d1", d1), ("d2", d2)):
    print(f"{name}: {len(d)} values from {d[0]:.3f} to {d[-1]:.3f}; 0 has code {np.flatnonzero(d == 0)[0]}")

# %% [markdown]
# A step reads the codes back, does AdamW's update, and rounds the new $m$ and $v$ to
# codes again:
#
# $$m = d_1[k_m]\, a_m, \quad v = d_2[k_v]\, a_v \;\longrightarrow\; \text{AdamW}
# \;\longrightarrow\; a = \max |x|, \quad
# k = \text{index of the } d \text{ nearest to } x / a .$$
#
# For one block, two functions do this, beside the `adamw` of notebook 08:


# %%
def adamw(p, g, m, v, t, lr=1e-2, b1=0.9, b2=0.999, eps=1e-8):
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * (g * g)
    update = m / (np.sqrt(v) * (1 / math.sqrt(1 - b2**t)) + eps)
    return p - update * (lr / (1 - b1**t)), m, v


def to_8_bits(x, d):
    absmax = np.abs(x).max()
    return np.abs(x[:, None] / absmax - d).argmin(axis=1), absmax


def adamw_8_bits(p, g, codes_m, absmax_m, codes_v, absmax_v, t):
    p, m, v = adamw(p, g, d1[codes_m] * absmax_m, d2[codes_v] * absmax_v, t)
    return p, *to_8_bits(m, d1), *to_8_bits(v, d2)


# %% [markdown]
# The library's `adamw8bit_step` also follows bitsandbytes' roundings, operation by
# operation. The folded cell compares `adamw_8_bits` with it for 40 steps of one block,
# under the rule of the GPU kernels. Each step begins with the library's state. There are
# two differences:
#
# - The kernel computes $1-\beta_2$ from 0.999 rounded to float32. This makes $v$ smaller
#   by 1.3e-5 of itself.
# - All else differs in the last bits. Where a number lies half-way between two values,
#   its code may differ by one. At most 10 of the 20,480 codes do.

# %% tags=["hide-input"]
# Measures: codes that differ from the library's
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
print(f"codes that differ: {different} of {40 * 512:,}; absmax of v above the library's by up to {v_off:.1e}")
assert different <= 10 and round(v_off, 6) == 1.3e-5
assert f"{1 - float(1 - f32(0.999)) / 0.001:.1e}" == "1.3e-05"

# %% [markdown]
# Two codes take 2 bytes, and two absmax take 8 bytes for each 256 parameters:

# %%
bytes_a_parameter = 2 * (1 + 4 / 256)
print(f"bytes a parameter: {bytes_a_parameter} instead of 8, {8 / bytes_a_parameter:.2f} times less")

# %% tags=["hide-input"]
# Checks: the library's two optimizers hold 2.03125 and 8 bytes a parameter
big = Tensor(np.zeros((256, 4096), f32), requires_grad=True)
eight, full = AdamW8bit([big]).state_bytes / big.size, AdamW([big]).state_bytes / big.size
assert (eight, full) == (2.03125, 8) == (bytes_a_parameter, 8) and round(full / eight, 2) == 3.94
small = [Tensor(np.zeros(n, f32), requires_grad=True) for n in (4095, 4096)]
assert [AdamW8bit([p]).state_bytes for p in small] == [4095 * 8, 4096 * 2.03125]

# %% [markdown]
# ## 2 · Codes in pages
#
# Codes can be paged as well, if no block is cut in two: the 256 codes of a block need
# the same absmax. `AdamW8bit` cuts its pages between blocks. The absmax lie outside the
# pages, as in bitsandbytes. Every budget of pages gives the same bits.

# %% tags=["hide-input"]
# Checks: AdamW8bit ends with the same bits at 1 to 10 frames of 10 pages
PAGES, PAGE, STEPS = 40, 8192, 6
grads = np.random.default_rng(1).standard_normal((STEPS, PAGES * PAGE // 8), f32)


def run(kind, pager):
    """The parameters' bytes after STEPS steps."""
    p = Tensor(np.random.default_rng(2).standard_normal(grads.shape[1], f32), requires_grad=True)
    optimizer = kind([p], lr=1e-2, weight_decay=0.1, pager=pager)
    for g in grads:
        p.grad = g
        optimizer.step()
    return p.data.tobytes()


plain = run(AdamW8bit, Pager())
for frames in (1, 2, 5, 9, 10):
    pager = Pager(frames * PAGE, PAGE)
    assert run(AdamW8bit, pager) == plain and len(pager) == 10
assert plain != run(AdamW, Pager())
print("the same bits with 1, 2, 5, 9 and 10 frames for 10 pages, and other bits than with 32-bit states")

# %% [markdown]
# ## 3 · A parameter without gradient moves
#
# Most rounding errors are small and go either way. Two effects are different. The first
# is that bitsandbytes on a CPU cannot store a 0. It rounds through a table: $x / a$,
# which lies between −1 and 1, is moved to the nearest of 65,536 evenly spaced points.
# The table holds the code nearest to each point. No point lies at 0, because the number
# of points is even.


# %%
def cpu_code(y, d):
    i = int((y + 1) / 2 * 65535 + 0.5)
    point = 2 * i / 65535 - 1
    return int(np.abs(d - point).argmin())


print(f"m = 0 has code {cpu_code(0, d1)} and comes back as {d1[cpu_code(0, d1)]:.1e} times absmax")
print(f"v = 0 has code {cpu_code(0, d2)} and comes back as {d2[cpu_code(0, d2)]:.1e} times absmax")
assert (cpu_code(0, d1), cpu_code(0, d2)) == (131, 7)

# %% tags=["hide-input"]
# Checks: the library's rounding gives these codes
y = np.random.default_rng(3).uniform(-1, 1, 256).astype(f32)
y[:2] = 0, 1  # 1 is absmax
for x, d in ((y, d1), (np.abs(y) ** 4, d2)):
    codes, absmax = cpu_quantize_8bit(x, d, 256)
    assert absmax == 1 and codes.reshape(-1).tolist() == [cpu_code(float(value), d) for value in x]

# %% [markdown]
# So a parameter without gradient gets a nonzero $m$ and $v$ as soon as others of its
# block have gradients. Let half of a block have the gradient 1 in every step, and the
# other half the gradient 0. At the learning rate 1e-3, the parameters without gradient
# fall by 4.8e-4 in 100 steps. (The left panel of the figure in section 4 shows the fall,
# and exercise 19-2 derives it.) They stay where they are with a float32 state, in a block
# without any gradients, and under the GPU's rule.
#
# ## 4 · Steps up are smaller than steps down
#
# The second effect is that $d_1$ has no −1. Its first value is −0.993. So $m = -a_m$ is
# read back as $-0.993\,a_m$, while $m = a_m$ is read back exactly. If the gradient is −1
# in every step, $m$ settles at the value that a step does not change:

# %%
settles = -0.1 / (1 + 0.9 * float(d1[0]))  # the solution of m = 0.9 · 0.993 m − 0.1
print(f"m settles at {settles:.2f}, and not at -1")

# %% [markdown]
# Under both rules the steps shrink to 0.94 of those for the gradient +1 (right panel).


# %% tags=["hide-input"]
# Measures: both effects, step by step, with the library's step
def drift(g, steps, rule):
    """The parameters, from 0 on, after each step with the gradient g at the learning rate 1e-3: (steps + 1, parameters)."""
    p, blocks = np.zeros(len(g), f32), len(g) // 256
    state8 = [np.zeros(n, t) for n, t in ((len(g), "u1"), (len(g), "u1"), (blocks, f32), (blocks, f32))]
    path = [p.copy()]
    for t in range(1, steps + 1):
        adamw8bit_step(p, g, *state8, t, lr=1e-3, weight_decay=0, rule=rule)
        path.append(p.copy())
    return np.array(path)


g = np.zeros(512, f32)
g[:256:2] = 1  # every second parameter of the first block; nothing in the second
cpu, gpu = (drift(g, 100, f"bitsandbytes-{rule}") for rule in ("cpu", "cuda"))
print(
    f"without gradient: {cpu[-1, 1]:.1e} on a CPU, {gpu[-1, 1]:.1e} on a GPU; in a block without any {cpu[-1, 300]:.1e}"
)
assert f"{cpu[-1, 1]:.1e}" == "-4.8e-04" and (cpu[-1, 256:] == 0).all() and (gpu[-1, 1::2] == 0).all()
plain32, m, v = np.zeros(512, f32), np.zeros(512, f32), np.zeros(512, f32)
for t in range(1, 101):
    plain32, m, v = adamw(plain32, g, m, v, t, lr=1e-3)
assert (plain32[g == 0] == 0).all() and (plain32[g == 1] < -0.09).all()
assert f"{d1[131]:.1e}" == "2.1e-05" and f"{d2[7]:.1e}" == "1.6e-05" and f"{d1[0]:.3f}" == "-0.993"
sides, shorter = np.repeat(np.array([1, -1], f32), 256), {}
for rule in ("cpu", "cuda"):
    steps = np.diff(drift(sides, 301, f"bitsandbytes-{rule}"), axis=0)
    shorter[rule] = steps[:, 300] / -steps[:, 10]
    print(f"step for a gradient of -1 over that for +1, {rule}: {shorter[rule][-1]:.3f}")
    assert round(-settles, 2) == 0.94 and abs(shorter[rule][-1] - 0.94) < 0.005

# %% tags=["hide-input"]
# Draws: both effects against the step
two_effects({"CPU": cpu[:, 1], "GPU": gpu[:, 1]}, {"CPU": shorter["cpu"][:60], "GPU": shorter["cuda"][:60]})

# %% [markdown]
# ## Where paper and code differ
#
# - The QLoRA paper's code takes `paged_adamw_32bit`: 8 bytes a parameter, not 2.03.
# - The 8-bit paper rounds to the nearest value of the map. On a GPU bitsandbytes does so
#   too, except that it keeps the sign of $m$. On a CPU its table has no 0 (section 3).
# - bitsandbytes keeps float32 states for a parameter of fewer than 4096 elements, and so
#   does `AdamW8bit`.
#
# ## Exercises
#
# For grading, only the setup cell and the exercise cells are run. Put helpers inside the
# exercise's cell.
#
# ### 19-1 Where 8 bits may be cut
#
# Cut the 8-bit state of $n$ parameters into pages that hold codes only. After a cut in
# the wrong place, some parameters are scaled with another block's absmax. Page by page,
# parameters `start` … `end − 1` are updated by
#
# ```python
# adamw8bit_step(
#     p[start:end], g[start:end], codes_m[start:end], codes_v[start:end],
#     absmax_m[first:last], absmax_v[first:last], ...
# )
# ```
#
# - `n`: an int, 1 or more
# - `page_bytes`: an int, 512 or more; a page holds the codes of $m$ and of $v$ of its
#   parameters, together `page_bytes` at most
# - absmax has an entry for each 256 parameters, and a last partial block has one too
#
# Return a list of (start, end, first, last), one for each page, in order, with no more
# pages than necessary. Checked: the pages cover all parameters once, are not too large,
# are as few as possible, and give the bits of a step over all $n$.
#
# Hint: first find how many whole blocks fit into a page.


# %% tags=["exercise"]
def exercise_1(n, page_bytes):
    """Return [(start, end, first, last)]: the pages of the 8-bit state of n parameters."""
    # BEGIN SOLUTION
    size = page_bytes // 2 // 256 * 256
    cuts = [*range(0, n, size), n]
    return [(a, b, a // 256, -(-b // 256)) for a, b in itertools.pairwise(cuts)]
    # END SOLUTION


# %%
_ = grade("19-1", exercise_1)

# %% [markdown]
# ### 19-2 The fall
#
# Derive the −4.8e-4 of section 3. A parameter starts at 0 and never has a gradient. Other
# parameters of its block all have the same positive gradient in every step. The size of
# that gradient cancels. The optimizer is `AdamW8bit` under the CPU's rule. Neglect
# epsilon and weight decay.
#
# - `steps`: an int, 1 or more
# - `lr`, `beta1`, `beta2`: floats
#
# After each step the parameter's $m$ and $v$ are so small that they are stored as the
# codes 131 and 7. They are read back as `d1[131]` and `d2[7]` (of the setup cell) times
# the block's absmax. Before the first step all codes and absmax are 0.
#
# Return where the parameter is after `steps` steps, as a float. Checked: it agrees with
# the library within 1 %, also after very few steps.
#
# Hint: write down $m$ and $v$ of the *other* parameters after $t-1$ steps. They are the
# block's absmax.


# %% tags=["exercise"]
def exercise_2(steps, lr, beta1, beta2):
    """Return where a parameter without gradient is after so many steps under the CPU's rule."""
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
_ = grade("19-2", exercise_2)

# %% [markdown]
# ## Summary
#
# - 8-bit states take 2.03 bytes a parameter instead of 8
#   (`tinylora/training/adamw8bit.py`, `tests/test_optim8bit.py`).
# - Codes are paged between blocks, and every budget gives the same bits
#   (`test_any_budget_gives_the_same_bits` in `tests/test_optim8bit.py`).
# - On a CPU, a parameter without gradient falls by 4.8e-4 in 100 steps at a learning
#   rate of 1e-3 (`test_on_a_cpu_a_parameter_without_gradient_falls`, same file).
# - The steps for a constant negative gradient shrink to 0.94 of those for a positive one
#   (`test_a_constant_negative_gradient_takes_smaller_steps_than_a_positive_one`, same
#   file).
# - Notebook [09](09_where_did_the_memory_go.ipynb) adds up what else is in memory.
