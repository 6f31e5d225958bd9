# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 02 · A small autograd
#
# [← 01 QLoRA happens](01_qlora_happens.ipynb) · [All notebooks](README.md) · [03 The bypass →](03_the_bypass.ipynb)
#
# **Question.** How does a program compute the gradients of all weights in one backward
# pass, and what must it keep in memory for that?
#
# **You will be able to**
#
# - write an operation together with its pullbacks;
# - walk a graph backward so that every gradient is complete before it is passed on;
# - name the arrays that the tape holds, and count their bytes.
#
# **Needs:** NumPy, matrix products and their derivatives, the chain rule, Python
# closures. No other notebook.
#
# **Hours:** 2 (1 to read and run, 1 for the exercises).
#
# **Papers:** none; the gradients of LoRA and QLoRA are computed in this way. Settled in
# section 3: why gradients are accumulated, and why in a certain order (micrograd issues
# 2, 53 and 68).
#
# Folded cells measure, check or draw. Click ••• to open one.

# %% tags=["setup"]
import itertools

import numpy as np
from drawings.nb02 import four_walks
from grading import grade

import tinylora as tl
from tinylora import ops

clock = itertools.count()  # 0, 1, 2, …
rng = np.random.default_rng(0)

# %% [markdown]
# ## 1 · An operation and its pullbacks
#
# Let $L$ be the loss, one number. The gradient of $L$ with respect to a value $y$ is
# written $\bar y = ∂L/∂y$. It has the shape of $y$.
#
# Let $y = f(x)$, and let $J$ be the Jacobian of $f$. The chain rule says
# $\bar x = J^{\top}\bar y$. The function that takes $\bar y$ to $\bar x$ is called the
# *pullback* of $f$. A pullback never needs to form $J$.
#
# The linear layer $y = xW^{\top}$ is an example. Each row of $x$ is one token, and $W$
# is (out × in). Small changes $dx$ and $dW$ change the output by
# $dy = dx\,W^{\top} + x\,dW^{\top}$. Let $\langle a, b\rangle$ be the sum of entrywise
# products. The loss changes by
#
# $$dL = \langle\bar y, dy\rangle
# = \langle\bar y\,W, dx\rangle + \langle\bar y^{\top}x, dW\rangle .$$
#
# What stands beside $dx$ is $\bar x$, and what stands beside $dW$ is $\bar W$:
#
# $$\bar x = \bar y\,W, \qquad \bar W = \bar y^{\top} x .$$
#
# A value remembers its parents, the inputs that it was computed from. With each parent
# it keeps the pullback that leads there. A parent that needs no gradient is
# dropped, together with its pullback and all that the pullback captured. `wanted` says
# whether a value needs a gradient. `born` numbers the values in the order in which they
# are made.


# %%
class Value:
    def __init__(self, data, *pairs, wanted=False):
        self.data, self.grad, self.born = data, 0.0, next(clock)
        self.parents = [(x, pull) for x, pull in pairs if x.wanted]
        self.wanted = wanted or len(self.parents) > 0


# %% [markdown]
# The linear layer is now one equation with two pullbacks beside it. In the code, `g` is
# the gradient of the operation's output.


# %%
def linear(x, w):
    X, W = x.data, w.data
    return Value(X @ W.T, (x, lambda g: g @ W), (w, lambda g: g.T @ X))


# %% [markdown]
# Two more operations: the sum $z = x + y$ has $\bar x = \bar y = \bar z$. The rectifier
# $z = \max(x, 0)$ has $\bar x = \bar z$ where $x > 0$, and 0 elsewhere.


# %%
def add(x, y):
    return Value(x.data + y.data, (x, lambda g: g), (y, lambda g: g))


def relu(x):
    on = x.data > 0
    return Value(x.data * on, (x, lambda g: g * on))


# %% [markdown]
# ## 2 · The walk
#
# The backward pass starts at the last value and walks to the first. At each step it
# takes the youngest value that waits, the one with the largest `born`. It hands the
# gradient of this value to the parents through the pullbacks. Each parent *adds* what
# it receives to what it has.


# %%
def backward(y, g):
    y.grad, waiting = g, {y}
    while waiting:
        y = max(waiting, key=lambda v: v.born)
        waiting.remove(y)
        for x, pull in y.parents:
            x.grad = x.grad + pull(y.grad)
            waiting.add(x)


# %% [markdown]
# The order is right for this reason: a value is always younger than its parents. So
# everything that used $x$ has had its turn when the turn of $x$ comes. At that moment
# $\bar x$ is complete.
#
# The small network below uses $h$ twice: $y = h + W_2\max(h, 0)$ with $h = W_1x$.


# %%
def network(x, w1, w2):
    h = linear(x, w1)
    return add(h, linear(relu(h), w2))


shapes = {"x": (6, 5), "W1": (7, 5), "W2": (7, 7)}
x, W1, W2 = (Value(rng.standard_normal(shape), wanted=True) for shape in shapes.values())
g = rng.standard_normal((6, 7))  # the gradient of the output
y = network(x, W1, W2)
backward(y, g)
print(f"gradients: x {x.grad.shape}, W1 {W1.grad.shape}, W2 {W2.grad.shape}")

# %% [markdown]
# The output and the three gradients equal tinylora's in every entry, because both make
# the same products in the same order. Central differences,
# $(L(+ε) - L(-ε))/2ε$ along a random direction, agree to a relative error of 1e-7.

# %% tags=["hide-input"]
# Checks: output and gradients against tinylora's, and against central differences.
mine = (x, W1, W2)
theirs = [tl.Tensor(v.data, requires_grad=True) for v in mine]
h = ops.linear(theirs[0], theirs[1])
(out := h + ops.linear(ops.relu(h), theirs[2])).backward(g)
assert (y.data == out.data).all()
for name, a, b in zip(shapes, mine, theirs, strict=True):
    direction, ε = rng.standard_normal(a.data.shape), 1e-6

    def loss(step, a=a, direction=direction):
        moved = [Value(v.data + (step * direction if v is a else 0)) for v in mine]
        return (network(*moved).data * g).sum()

    numeric, exact = (loss(ε) - loss(-ε)) / (2 * ε), (a.grad * direction).sum()
    differ, error = (a.grad != b.grad).sum(), abs(numeric / exact - 1)
    print(f"{name:2}: entries that differ from tinylora's: {differ}; central differences: {error:.0e}")
    assert differ == 0 and error < 1e-7

# %% [markdown]
# ## 3 · Why accumulate, and why in that order
#
# The smallest graph that shows both is `b = a + a; c = b + b`. Here $c = 4a$, so the
# right answer is $\bar a = 4$. A chain of $n$ doublings has $\bar a = 2^n$. The chain
# below counts the pullbacks that a walk calls.


# %%
def doublings(n, walk):
    """The gradients of all values, the first one's first, and the number of pullbacks called."""
    values, calls = [Value(1.0, wanted=True)], []
    for _ in range(n):
        pair = (values[-1], lambda g: calls.append(1) or g)  # counts the call (append gives None), then returns g
        values.append(Value(2 * values[-1].data, pair, pair))  # a + a: the same parent twice
    walk(values[-1], 1.0)
    return [v.grad for v in values], len(calls)


# %% [markdown]
# Three recursive walks look right at first sight, and each has a fault.
#
# **Overwrite.** The first walk sets the gradient of a value instead of adding to it. Of
# two contributions it keeps only the last.


# %%
def overwrite(y, g):
    y.grad = g
    for x, pull in y.parents:
        overwrite(x, pull(g))


# %% [markdown]
# **Accumulate, and go on at once.** The second walk adds, and at once passes the sum
# on, although more may still come. The first contribution is then passed on twice:
# alone, and as a part of the sum.


# %%
def at_once(y, g):
    y.grad = y.grad + g
    for x, pull in y.parents:
        at_once(x, pull(y.grad))


# %% [markdown]
# **One path at a time.** The third walk adds, and passes on only what has just come.
# Its gradients are right. But it walks every path from the end to the start, and $n$
# doublings have $2^n$ paths.


# %%
def one_path(y, g):
    y.grad = y.grad + g
    for x, pull in y.parents:
        one_path(x, pull(g))


# %% [markdown]
# The four walks, on chains of 2, 3 and 10 doublings:

# %%
walks = {"section 2": backward, "overwrite": overwrite, "at once": at_once, "one path": one_path}
for n, (name, walk) in itertools.product((2, 3, 10), walks.items()):
    gradients, calls = doublings(n, walk)
    print(f"{n:2} doublings  {name:9}  gradient {gradients[0]:15,.0f}  pullbacks {calls:5,}")

# %% tags=["hide-input"]
# Checks: the gradients and the numbers of pullbacks, and that section 2's walk has no depth limit.
found = {name: [doublings(n, walk) for n in range(1, 13)] for name, walk in walks.items()}
for n in range(1, 13):
    first, calls = zip(*((of[n - 1][0][0], of[n - 1][1]) for of in found.values()), strict=True)
    assert (first[0], first[1], first[3]) == (2**n, 1, 2**n)
    assert calls == (2 * n, *[2 ** (n + 1) - 2] * 3)
    assert n != 10 or calls == (20, 2046, 2046, 2046)
assert [found["at once"][n - 1][0][0] for n in (2, 3)] == [6, 26]
deep = [a := Value(1.0, wanted=True)]
deep += [a := add(a, Value(0.0)) for _ in range(5000)]
backward(deep[-1], 3.0)
assert deep[0].grad == 3.0
try:
    one_path(deep[-1], 3.0)
    raise AssertionError("a recursion went 5,000 deep")
except RecursionError:
    print("a chain of 5,000 operations: the loop of section 2 ends, the recursion raises RecursionError")

# %% [markdown]
# Overwriting gives 1. Going on at once gives 6: the first visit of $b$ passes 1 on
# twice, and the second visit passes the sum 2 on twice. One path at a time gives 4, but
# ten doublings take 2,046 pullbacks, where 20 are enough.
#
# So there are two rules: accumulate, and visit a value only after everything that used
# it. The age is one way to follow the second rule; exercise 1 finds another. A loop
# also cannot hit Python's recursion limit.

# %% tags=["hide-input"]
# Draws: the gradients that the four walks give, and the pullbacks that they call.
four_walks(found)

# %% [markdown]
# ## 4 · What the tape holds
#
# The *tape* is the set of pullbacks that were kept. The arrays that they captured stay
# in memory until the backward pass. `held` follows the parents, looks into the
# closures, and adds up the bytes of the arrays, each array once.


# %%
def held(y):
    arrays, waiting, seen = {}, [y], set()
    while waiting:
        y = waiting.pop()
        if y in seen:
            continue
        seen.add(y)
        for x, pull in y.parents:
            captured = [cell.cell_contents for cell in pull.__closure__ or ()]  # None if it captured nothing
            arrays |= {id(a): a.nbytes for a in captured if isinstance(a, np.ndarray)}
            waiting.append(x)
    return sum(arrays.values())


# %% [markdown]
# What is held depends on which gradients are wanted. For the network of section 2, with
# 8 bytes for a number and 1 for an entry of the mask:
#
# | gradients wanted | captured | bytes |
# |---|---|---|
# | $x$, $W_1$, $W_2$ | $x$, $\max(h, 0)$, the mask $h > 0$, $W_1$, $W_2$ | 1,290 |
# | $W_1$, $W_2$ | the same without $W_1$ | 1,010 |
# | $W_2$ | $\max(h, 0)$ | 336 |
# | $x$ | the mask, $W_1$, $W_2$ | 714 |
#
# The gradient of a weight needs the layer's input. The gradient of the input needs the
# weight. If only $W_2$ is trained, nothing is kept of what came before. tinylora's
# `tl.tape_bytes` finds the same four numbers.

# %% tags=["hide-input"]
# Measures: the bytes of the tape for four choices of the wanted gradients.
table = {(1, 1, 1): 1290, (0, 1, 1): 1010, (0, 0, 1): 336, (1, 0, 0): 714}
for needs, stated in table.items():
    values = zip(mine, map(bool, needs), strict=True)
    own, other = zip(*((Value(v.data, wanted=n), tl.Tensor(v.data, requires_grad=n)) for v, n in values), strict=True)
    tape, h = held(network(*own)), ops.linear(other[0], other[1])
    named = ", ".join(name for name, need in zip(shapes, needs, strict=True) if need)
    print(f"gradients for {named:9}  tape {tape:5,} bytes")
    assert tape == tl.tape_bytes(h + ops.linear(ops.relu(h), other[2])) == stated
sizes = [v.data.nbytes for v in mine]
assert table[1, 1, 1] == sum(sizes) + 8 * 42 + 42 and table[0, 1, 1] == table[1, 1, 1] - sizes[1]
assert table[0, 0, 1] == 8 * 42 and table[1, 0, 0] == sizes[1] + sizes[2] + 42

# %% [markdown]
# ## Where paper and code differ
#
# - **Rows and columns.** The LoRA paper writes tokens as columns, $h = W_0x$. tinylora,
#   PEFT and torch write tokens as rows, $y = xW^{\top}$. $W$ is (out × in) in both.
# - **The order.** micrograd, a well-known small autograd, sorts the graph first. The
#   sort is a recursion, which fails on a deep graph. tinylora visits the youngest first.
# - **Left out here.** tinylora also undoes broadcasting, and releases used pullbacks.
#
# ## Exercises
#
# Grading runs only the setup and the exercises' cells: put helpers there.
#
# ### 02-1 Repair a backward that counts twice
#
# The values of some other engine carry no age. Its backward is the second walk of
# section 3:
#
#     def visit(y, total):
#         for x, pull in y.parents:
#             total[x] = total.get(x, 0.0) + pull(total[y])
#             visit(x, total)
#
#     total = {root: g}; visit(root, total)
#
# Given:
#
# - `root`, a value. A value has one attribute, `parents`: a list of pairs (parent,
#   pullback), empty for a leaf. A parent may stand in it more than once. Values can be
#   keys of a dict.
# - `g`, the gradient of the root, a number.
#
# Return a dict `{value: gradient}` with the root and every value below it.
#
# Checked: `b = a + a; c = b + b`; random graphs; a chain of 5,000 operations, deeper
# than Python's stack; that no pullback is called more than once; that the graph is not
# changed.
#
# Hint: a gradient is complete when everything that used the value has passed its own
# on. How often is each value used?


# %% tags=["exercise"]
def exercise_1(root, g):
    """{value: gradient} for the root and every value below it."""
    # BEGIN SOLUTION
    uses, reached = {root: 0}, [root]
    for y in reached:  # the list grows while it is walked
        for x, _ in y.parents:
            if x not in uses:
                reached.append(x)
            uses[x] = uses.get(x, 0) + 1
    grad, ready = {root: g}, [root]
    while ready:
        y = ready.pop()
        for x, pull in y.parents:
            grad[x] = grad.get(x, 0.0) + pull(grad[y])
            uses[x] -= 1
            if uses[x] == 0:  # everything that used x has had its turn
                ready.append(x)
    return grad
    # END SOLUTION


# %%
_ = grade("02-1", exercise_1)

# %% [markdown]
# ### 02-2 A pullback of your own
#
# The softmax of a row is $y_i = e^{x_i}/\sum_j e^{x_j}$. Attention applies it to every
# row of a matrix. Write its pullback.
#
# Given:
#
# - `x`, an array (rows, n), float64;
# - `g`, the gradient of $y$, of the same shape and dtype.
#
# Return $\bar x$, an array of the same shape.
#
# Checked: central differences on fresh inputs; $n = 1$; entries of ±1,000, where $e^x$
# alone overflows; that no argument is changed; that no Jacobian ($n$ × $n$) is formed,
# by the memory that the call takes.
#
# Hint: write $dy_i$ in terms of $dx$ first, as section 1 does. $y$ does not change if a
# constant is subtracted from a row of $x$.


# %% tags=["exercise"]
def exercise_2(x, g):
    """The gradient of x, where g is the gradient of the softmax of each row of x."""
    # BEGIN SOLUTION
    y = np.exp(x - x.max(axis=1, keepdims=True))
    y /= y.sum(axis=1, keepdims=True)
    return y * (g - (g * y).sum(axis=1, keepdims=True))  # dy = y ∘ (dx - ⟨y, dx⟩), and J is symmetric
    # END SOLUTION


# %%
_ = grade("02-2", exercise_2)

# %% [markdown]
# ## Summary
#
# - An operation is a forward equation with a pullback for each input. A pullback is
#   kept only where a gradient is wanted: `tinylora/tensor.py`. `tests/test_ops.py`
#   compares every pullback with central differences.
# - The walk adds what comes back, and visits a value after everything that used it.
#   Without the first rule `b = a + a; c = b + b` gives 1, and without the second it
#   gives 6.
# - The tape is what the kept pullbacks captured: `tinylora/tape.py`. Its bytes depend
#   on which gradients are wanted.
