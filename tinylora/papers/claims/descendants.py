"""What the descendants of LoRA claim, each on a toy that takes a few seconds: see `variants` for the methods.

The toys are of three kinds: matrices with a spectrum of our choice (PiSSA, LoftQ, IR-QLoRA), one step from a planted gradient
(LoRA-GA), and small networks trained through the engine (LoRA+, AdaLoRA, DoRA, learning and forgetting). Each docstring
says what the paper claims, what is measured, and what came out at seeds 0, 1, 2, also where it is not the claim.

What is computed: each experiment is a function of a seed. What is said: a verdict from the numbers of all seeds. What is drawn: one
figure a claim, but for a count (VeRA's parameters) and an equality (the ratio of the rates without Adam), which need none.
"""

import math
from itertools import pairwise

import numpy as np

from ... import backend, nn, ops, variants
from ...figures.style import COLOURS, SMALL, canvas
from ...lora import LoRALinear
from ...nn import Linear4bit
from ...optim import AdamW
from ...quant import quantize
from ...training.schedule import schedule
from .drawing import PALE, bars, dots, given_or_run
from .registry import Drawing, Experiment, above, below, judge, spread, values
from .toys import linear, orthonormal, squared_error, weight


# ---------------------------------------------------------------------------------------------- what quantization leaves behind
def _matrix(kind, rng, d=512):
    """Gaussian; with singular values i^−0.7; or Gaussian with 4 columns ten times as large."""
    if kind == "power":
        return (orthonormal(rng, d, d) * np.arange(1, d + 1) ** -0.7) @ orthonormal(rng, d, d).T
    w = rng.standard_normal((d, d))
    if kind == "outliers":
        w[:, rng.choice(d, 4, replace=False)] *= 10
    return w


def quantized_starts(seed=0, kinds=("gauss", "power", "outliers"), d=512, r=16):
    """A bypass that starts well repairs the error of quantization: PiSSA eq. 8 (about 20 % less than QLoRA), LoftQ eq. 6.

    W (512, 512) of three kinds, NF4 in blocks of 64, r = 16. Measured: ‖Q + s B A − W‖_F / ‖W‖_F for NF4 alone, QPiSSA, and LoftQ
    with 1 and 5 steps. Out came: Gaussian .092, .087, .087, .079; falling spectrum .092, .042, .085, .078; outlier columns .14, .066,
    .12, .11. PiSSA wins where the spectrum falls, LoftQ where it is flat; one step of LoftQ and PiSSA are equal on a Gaussian.
    """
    rng, found = np.random.default_rng(seed), {}
    for kind in kinds:
        w = _matrix(kind, rng, d)
        base = linear(w)
        starts = {
            "nf4": Linear4bit.of(base, double_quant=False).dense(),
            "pissa": weight(variants.pissa(LoRALinear(linear(w), r=r, alpha=r), code="nf4")),
            "loftq_1": weight(variants.loftq(base, r, steps=1)),
            "loftq_5": weight(variants.loftq(base, r, steps=5)),
        }
        for name, start in starts.items():
            found[f"{kind}_{name}"] = float(np.linalg.norm(start - w) / np.linalg.norm(w))
    return found


def _starts_verdict(results):
    ratio = {k: values(results, f"{k}_loftq_5") / values(results, f"{k}_pissa") for k in ("gauss", "power", "outliers")}
    gain = 1 - values(results, "gauss_pissa") / values(results, "gauss_nf4")
    return judge(
        f"both beat NF4 alone, PiSSA by {100 * gain.mean():.0f} % on a Gaussian; LoftQ in 5 steps leaves {ratio['gauss'].mean():.2f} "
        f"times PiSSA's error there, {ratio['power'].mean():.2f} on a falling spectrum, {ratio['outliers'].mean():.2f} with outliers",
        {
            "PiSSA's gain": above(gain),
            "LoftQ ahead on a Gaussian": below(np.log(ratio["gauss"])),
            "PiSSA ahead on a falling spectrum": above(np.log(ratio["power"])),
        },
    )


def calibrated_entropy(seed=0, shape=(256, 512)):
    """ICQ raises the entropy of the quantized weights (IR-QLoRA §4.2: +0.07 bits on average; it speaks of information, not of error).

    Gaussian weights, NF4 in blocks of 64. Measured: the mean entropy of a block for τ = 0, τ = the median, τ*, and the mean
    squared errors of the last two relative to the first. Out came 3.69, 3.69 and 3.76 bits, and errors of 0.99 and 1.00: the entropy
    rises by the paper's 0.07 already for Gaussian weights, and the error stays. Within a block of 64 the entropy lies 0.20 bits
    below the law's 3.885 (see `variants.block_entropy`), which is why numbers near 3.7 are reported for NF4.
    """
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    plain = quantize(w, "nf4", 64)
    median, best = (variants.information_calibration(w, n=n) for n in (0, 25))
    found = {"entropy_nf4": variants.block_entropy(plain.indices(), 64)}
    found |= {
        f"entropy_{name}": variants.block_entropy(c.quantized.indices(), 64)
        for name, c in (("median", median), ("best", best))
    }
    error = float(((plain.dequantize() - w) ** 2).mean())
    ratios = {
        f"error_{name}": float(((c.dequantize() - w) ** 2).mean()) / error
        for name, c in (("median", median), ("best", best))
    }
    return {name: float(h.mean()) for name, h in found.items()} | ratios


def _entropy_verdict(results):
    rise = values(results, "entropy_best") - values(results, "entropy_nf4")
    error = values(results, "error_best")
    return judge(
        f"the entropy of a block rises by {rise.mean():.2f} bits, and the mean squared error is {error.mean():.3f} times NF4's",
        {"the rise": above(rise, 0.05)},
    )


# --------------------------------------------------------------------------------------------------------------- the first step
def aligned_first_step(seed=0, d=256, r=8, decay=0.7):
    """LoRA-GA aligns the first step with full fine-tuning's (theorem on the best rank 2r, as `variants.lora_ga` has it).

    A gradient G with singular values i^−decay. Measured: the cosine of the first step of gradient descent, s (B̄ A + B Ā), with G, for
    LoRA, LoRA-GA, PEFT's LoRA-GA (B times its singular values, only B scaled) and the best rank 2r. Out came .16 for LoRA (its A has
    8 of 256 directions at random), .90 for LoRA-GA, which is the bound, and .85 for PEFT's.
    """
    rng = np.random.default_rng(seed)
    s = np.arange(1.0, d + 1) ** -decay
    u, v = orthonormal(rng, d, d), orthonormal(rng, d, d)
    g = (u * s) @ v.T
    w0 = rng.standard_normal((d, d)) / math.sqrt(d)
    with backend.using_generator(np.random.default_rng([seed, 1])):
        plain, ga = (LoRALinear(linear(w0), r=r, alpha=r) for _ in range(2))
    variants.lora_ga(ga, g)

    def cosine(a, b):
        step = g @ a.T @ a + b @ b.T @ g
        return float((step * g).sum() / np.linalg.norm(step) / np.linalg.norm(g))

    pair = [(h.lora_A.weight.data.astype(float), h.lora_B.weight.data.astype(float)) for h in (plain, ga)]
    c = d**0.25 / 4
    pefts = v.T[:r], u[:, r : 2 * r] * s[r : 2 * r] * c
    bound = float(np.sqrt((s[: 2 * r] ** 2).sum() / (s**2).sum()))
    return {"lora": cosine(*pair[0]), "lora_ga": cosine(*pair[1]), "peft": cosine(*pefts), "bound": bound}


def _first_step_verdict(results):
    lora, ga, bound = (values(results, k) for k in ("lora", "lora_ga", "bound"))
    return judge(
        f"the first step's cosine with −G is {ga.mean():.3f} after LoRA-GA, the best that rank 2r allows, and {lora.mean():.3f} after LoRA",
        {"LoRA-GA at the bound": np.abs(ga - bound).max() < 1e-5, "LoRA far from it": below(lora - 0.5 * ga)},
    )


# ------------------------------------------------------------------------------------------------------------- small networks
class _Net(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(self, weights, activation=ops.tanh, trainable=False):
        self.layers, self.activation = [linear(w, trainable) for w in weights], activation

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)

    def adapt(self, which, seed, **options):
        """A LoRALinear around the layers with these indices, everything else frozen."""
        self.requires_grad_(False)
        with backend.using_generator(np.random.default_rng([seed, 3])):
            for i in which:
                self.layers[i] = LoRALinear(self.layers[i], **options)
        return self

    def weights(self):
        return [np.asarray(h.merged() if isinstance(h, LoRALinear) else h.dense(), np.float64) for h in self.layers]


def _random_weights(rng, width, hidden, inputs, outputs):
    sizes = [inputs, *[width] * hidden, outputs]
    return [rng.standard_normal((m, n)) / math.sqrt(n) for n, m in pairwise(sizes)]


def _train(model, x, y, steps, lr, seed, loss=squared_error, groups=None, batch=128, watch=()):
    """AdamW with a cosine to 0 on random batches (batch None: all of x). -> the weights after each step in `watch`"""
    optimizer = AdamW(groups or [w for _, w in model.trainable()], lr=lr)
    rng, seen = np.random.default_rng([seed, 5]), []
    for step in range(steps):
        rows = slice(None) if batch is None else rng.integers(0, len(x), batch)
        loss(model(x[rows]), y[rows]).backward()
        optimizer.step(schedule("cosine", step, steps, floor=0.0))
        optimizer.zero_grad()
        if step + 1 in watch:
            seen.append(model.weights())
    return seen


def lora_plus_ratio(seed=0, widths=(32, 128), ratios=(1, 4, 16)):
    """B should learn faster than A, the more so the wider the network (LoRA+, theorem 1, for Adam).

    The teacher is a ReLU network of three hidden matrices whose last two were moved by an update of rank 4; LoRA of rank 4 on
    these two with α = 4, 60 steps, the best of 8 rates η_A = 10^−4.5 … 10^−1 for each ratio λ; then λ = 1 with α = 64. Measured:
    the error left, as a share of the error at the start. With α = 4, λ = 16 leaves about half as much as λ = 1 at both widths (.033
    against .078 at 32, .034 against .061 at 128), a gain that differs much from seed to seed (seeds 0 to 7: .82 to 2.9
    times at 32, 1.2 to 3.1 at 128): whether it grows between these widths is not decided. And λ = 1 with α = 64 leaves the same .033
    and .034. Under Adam with ε = 0 the two are one run: α, A₀, η_A, η_B → λ α, A₀, η_A, η_B/λ changes nothing (notebook
    14). So λ helps here because α = 4 is too small, and a search over α and a single rate finds the same.
    """
    found = {}
    for width in widths:
        rng = np.random.default_rng([seed, width])
        w = [
            rng.standard_normal((m, n)) * math.sqrt(2 / n)
            for m, n in ((width, 16), (width, width), (width, width), (1, width))
        ]
        w[-1] /= math.sqrt(2)
        moved = [x.copy() for x in w]
        for i in (1, 2):
            moved[i] += 3 * orthonormal(rng, width, 4) @ orthonormal(rng, width, 4).T
        x = rng.standard_normal((256, 16)).astype(np.float32)
        y = _Net(moved, ops.relu)(x).data
        before = float(((_Net(w, ops.relu)(x).data - y) ** 2).mean())
        for alpha, ratio in [(4, ratio) for ratio in ratios] + [(64, 1)]:
            errors = []
            for lr in 10.0 ** np.arange(-4.5, -0.9, 0.5):
                model = _Net(w, ops.relu).adapt((1, 2), seed, r=4, alpha=alpha)
                _train(model, x, y, 60, lr, seed, groups=variants.lora_plus_groups(model, lr, ratio), batch=None)
                errors.append(float(((model(x).data - y) ** 2).mean()) / before)
            key = f"width_{width}_ratio_{ratio}" if alpha == 4 else f"width_{width}_alpha_{alpha}"
            found[key] = min(e for e in errors if math.isfinite(e))
    return found


def _ratio_verdict(results):
    gain = {n: values(results, f"width_{n}_ratio_1") / values(results, f"width_{n}_ratio_16") for n in (32, 128)}
    same = np.array(
        [values(results, f"width_{n}_alpha_64") / values(results, f"width_{n}_ratio_16") for n in (32, 128)]
    )
    return judge(
        f"at one α, λ = 1 leaves {spread(gain[32])} times the error of λ = 16 at width 32, {spread(gain[128])} at width 128; but "
        f"λ = 1 with 16 times the α leaves what λ = 16 does, to {100 * np.abs(same - 1).max():.0f} %",
        {
            "a gain of 5 %": above(np.log(gain[128]), np.log(1.05)),
            "whether it grows with the width": above(np.log(gain[128] / gain[32])),
            "one at 16 times the α": above(np.log(same).max(axis=0), np.log(1.05)),
        },
    )


def lora_plus_start(seed=0, d=24, r=3, ratio=16.0, lr=2e-3, steps=200):
    """Under plain gradient descent λ is a larger start and nothing else: (η, λη) from A₀ moves W as (√λ η, √λ η) from λ^¼ A₀, B₀ = 0.

    Put A' = λ^¼ A, B' = λ^−¼ B: the product is the same, and both gradients are scaled so that both rates become √λ η. Measured on a
    regression: the largest difference of the two B A, relative, under gradient descent (0, to the last bit, because the factors of
    λ = 16 are powers of two) and under sign descent, which is Adam without memory (.15 and more). Under Adam λ is a larger α
    instead: see `lora_plus_ratio`.
    """
    rng = np.random.default_rng(seed)
    target = orthonormal(rng, d, r) * 2.0 @ orthonormal(rng, d, r).T
    a0 = rng.standard_normal((r, d)) / math.sqrt(d)

    def run(a, eta_a, eta_b, rule, lr):
        b = np.zeros((d, r))
        for _ in range(steps):
            g = b @ a - target
            a, b = a - lr * eta_a * rule(b.T @ g), b - lr * eta_b * rule(g @ a.T)
        return b @ a

    def difference(rule, lr):
        one, other = run(a0, 1, ratio, rule, lr), run(ratio**0.25 * a0, ratio**0.5, ratio**0.5, rule, lr)
        return float(np.abs(one - other).max() / np.abs(one).max())

    return {"descent": difference(lambda g: g, lr), "sign": difference(np.sign, lr)}


def _start_verdict(results):
    descent, sign = values(results, "descent"), values(results, "sign")
    return judge(
        f"the two runs differ by {descent.max():.0e} under gradient descent and by {sign.min():.2f} or more under sign descent",
        {
            "the same under gradient descent": descent.max() < 1e-10,
            "not under sign descent": above(np.log(sign), np.log(0.01)),
        },
    )


def adalora_allocation(seed=0, d=32, ranks=(1, 6), steps=1000):
    """The budget goes where it is needed (AdaLoRA §4.4).

    Two layers side by side, planted with updates of ranks 1 and 6 and equal norm; AdaLoRA starts both at 7 and has a final budget of
    7. Measured: the ranks that are left, and the error ‖ΔW − ΔW*‖ / ‖ΔW*‖ of both together, against LoRA of ranks 3 and 4. Out
    came 1 and 6 at every seed, and an error of .01 against .41: no near-uniform rank can hold a planted 6.
    """
    rng, model, uniform = np.random.default_rng(seed), nn.Module(), nn.Module()
    task = {}
    with backend.using_generator(np.random.default_rng([seed, 9])):
        for i, (name, rank) in enumerate(zip(("one", "two"), ranks, strict=True)):
            w0 = rng.standard_normal((d, d)) / math.sqrt(d)
            delta = orthonormal(rng, d, rank) * math.sqrt(6 / rank) @ orthonormal(rng, d, rank).T
            x = rng.standard_normal((1024, d)).astype(np.float32)
            y = (x @ (w0 + delta).T + 0.05 * rng.standard_normal((1024, d))).astype(np.float32)
            task[name] = delta, x, y
            setattr(model, name, variants.AdaLoRALinear(linear(w0), r=7, alpha=7))
            setattr(uniform, name, LoRALinear(linear(w0), r=3 + i, alpha=7))
    allocator = variants.RankAllocator(model, target=7, steps=steps, warmup=50, final=100, interval=10)
    for m in (model, uniform):
        optimizer = AdamW([w for _, w in m.trainable()], lr=0.02)
        for t in range(1, steps + 1):
            rows = rng.integers(0, 1024, 128)
            loss = sum(squared_error(m.get(name)(x[rows]), y[rows]) for name, (_, x, y) in task.items())
            if m is model:
                loss = loss + variants.orthogonality(m) * 0.1
            loss.backward()
            optimizer.step(schedule("cosine", t - 1, steps, floor=0.0))
            if m is model:
                allocator.step(t)
            optimizer.zero_grad()

    def error(m):
        off = sum(((m.get(name).delta() - delta) ** 2).sum() for name, (delta, _, _) in task.items())
        return math.sqrt(off / sum((delta**2).sum() for delta, _, _ in task.values()))

    left = allocator.ranks
    return {
        "rank_one": float(left["one"]),
        "rank_two": float(left["two"]),
        "error": error(model),
        "error_lora": error(uniform),
    }


def _allocation_verdict(results):
    one, two = values(results, "rank_one"), values(results, "rank_two")
    e, u = values(results, "error"), values(results, "error_lora")
    return judge(
        f"planted ranks 1 and 6 are given {one.mean():.1f} and {two.mean():.1f} of a budget of 7; the update's error is {e.mean():.2f} "
        f"against {u.mean():.2f} for LoRA of ranks 3 and 4",
        {"the planted ranks": (one == 1).all() and (two == 6).all(), "a smaller error": below(np.log(e / u))},
    )


def _labels(net, x):
    return net(x).data.argmax(axis=1)


def _accuracy(model, x, y):
    return float((_labels(model, x) == y).mean())


def magnitude_and_direction(seed=0, width=64, depth=6):
    """ΔM against ΔD over layers and steps: correlation −.62 for full fine-tuning, +.83 for LoRA, −.31 for DoRA (DoRA §3.2, §4.1).

    A tanh network pre-trained on labels of one random network, then tuned on labels of a mixture with another; the five hidden
    matrices are adapted (r = 4) or trained; four checkpoints each. ΔM = mean |m − m₀|, ΔD = mean (1 − cos), over rows (one per output:
    PEFT's norm, whose m is trained here) and over columns (the paper's ‖·‖_c as printed). Out came over rows LoRA +.95, DoRA −.33,
    full fine-tuning +.15 (from −.31 to +.66), over columns +.86, −.20, +.29: LoRA and DoRA as in the paper; three seeds do not decide
    the sign of full fine-tuning's.
    """
    rng = np.random.default_rng(seed)
    first, second = (_Net(_random_weights(rng, width, 2, 16, 4)) for _ in range(2))
    x = rng.standard_normal((4096, 16)).astype(np.float32)
    y_old, y_new = _labels(first, x), (0.6 * first(x).data + 0.8 * second(x).data).argmax(axis=1)
    base = _Net(_random_weights(rng, width, depth, 16, 4), trainable=True)
    _train(base, x, y_old, 600, 3e-3, seed, ops.softmax_cross_entropy)
    w0, hidden, found = base.weights(), range(1, depth), {}
    for kind in ("full", "lora", "dora"):
        model = _Net(w0)
        if kind == "full":
            for i in hidden:
                model.layers[i].requires_grad_(True)
        else:
            model.adapt(hidden, seed, r=4, alpha=8, use_dora=kind == "dora")
        lr = 1e-3 if kind == "full" else 1e-2
        seen = _train(model, x, y_new, 300, lr, seed, ops.softmax_cross_entropy, watch=(75, 150, 225, 300))
        for axis, name in ((1, "rows"), (0, "columns")):
            points = []
            for w in seen:
                for i in hidden:
                    m0, m = np.linalg.norm(w0[i], axis=axis), np.linalg.norm(w[i], axis=axis)
                    cosine = (w0[i] * w[i]).sum(axis=axis) / (m0 * m)
                    points.append((np.mean(1 - cosine), np.mean(np.abs(m - m0))))
            found[f"{kind}_{name}"] = float(np.corrcoef(np.array(points).T)[0, 1])
        found[f"{kind}_accuracy"] = _accuracy(model, x, y_new)
    return found


def _direction_verdict(results):
    full, lora, dora = (values(results, f"{k}_rows") for k in ("full", "lora", "dora"))
    return judge(
        f"the correlation of ΔM and ΔD is {spread(lora)} for LoRA, {spread(dora)} for DoRA, {spread(full)} for full fine-tuning",
        {
            "LoRA's is positive": above(lora),
            "DoRA's is negative": below(dora),
            "the sign of full fine-tuning's": below(full),
        },
    )


def learns_less_forgets_less(seed=0, width=64, r=4):
    """LoRA learns less and forgets less, and full fine-tuning's ΔW has 10 to 100 times the rank (Biderman et al. 2024, arXiv 2405.09673).

    A tanh network is pre-trained on one random labelling of one cloud of points, then tuned on another labelling of another cloud, at
    three rates each. Measured on unseen points: the best accuracy on the new task; how much of the old task LoRA keeps, minus what
    full fine-tuning keeps where it has learned as much (by interpolation between its rates); the rank that holds 90 % of ‖ΔW‖²_F,
    mean over layers, at the highest rate. Out came: LoRA of r = 4 learns .64 where full fine-tuning learns .66, at equal learning
    it keeps .05 less of the old task (.02 to .10), and the ranks are 10.5 and 2.7. Three seeds leave the second half of the claim
    undecided; eight (0 to 7: .01 to .10 less) decide against it, and confirm the first (.007 to .028 less).
    """
    rng = np.random.default_rng(seed)
    old, new = (_Net(_random_weights(rng, 48, 1, 16, 8)) for _ in range(2))
    centre = 0.7 * rng.standard_normal(16)

    def sample(net, sign, n):
        x = (rng.standard_normal((n, 16)) + sign * centre).astype(np.float32)
        return x, _labels(net, 3 * x)

    (x_old, y_old), (x_new, y_new) = sample(old, -1, 4096), sample(new, 1, 2048)
    test_old, test_new = sample(old, -1, 2048), sample(new, 1, 2048)
    base = _Net(_random_weights(rng, width, 3, 16, 8), trainable=True)
    _train(base, x_old, y_old, 800, 3e-3, seed, ops.softmax_cross_entropy)
    w0, learned, kept, rank = base.weights(), {}, {}, {}
    for kind, rates in (("full", (3e-4, 1e-3, 3e-3)), ("lora", (1e-3, 3e-3, 1e-2))):
        learned[kind], kept[kind] = [], []
        for lr in rates:
            model = _Net(w0, trainable=kind == "full")
            if kind == "lora":
                model.adapt(range(len(w0)), seed, r=r, alpha=2 * r)
            _train(model, x_new, y_new, 400, lr, seed, ops.softmax_cross_entropy)
            learned[kind].append(_accuracy(model, *test_new))
            kept[kind].append(_accuracy(model, *test_old))
        rank[kind] = float(np.mean([_rank90(w - v) for w, v in zip(model.weights(), w0, strict=True)]))
    order = np.argsort(learned["full"])
    full = np.interp(learned["lora"], np.array(learned["full"])[order], np.array(kept["full"])[order])
    return {
        "old_before": _accuracy(base, *test_old),
        "learned_full": max(learned["full"]),
        "learned_lora": max(learned["lora"]),
        "kept_more": float(np.mean(np.array(kept["lora"]) - full)),
        "rank_full": rank["full"],
        "rank_lora": rank["lora"],
    }


def _rank90(delta):
    """The least number of singular values that hold 90 % of ‖ΔW‖²_F."""
    share = np.cumsum(np.linalg.svd(delta, compute_uv=False) ** 2)
    return int(np.searchsorted(share, 0.9 * share[-1]) + 1)


def _forgets_verdict(results):
    less = values(results, "learned_full") - values(results, "learned_lora")
    kept, ratio = values(results, "kept_more"), values(results, "rank_full") / values(results, "rank_lora")
    return judge(
        f"LoRA learns {spread(less)} less, keeps {spread(kept)} more of the old task at equal learning, and full fine-tuning's update "
        f"has {spread(ratio)} times the rank",
        {
            "whether LoRA learns less": above(less),
            "whether it keeps more": above(kept),
            "ten times the rank": above(np.log(ratio), np.log(10)),
        },
    )


def vera_counts(seed=0, layers=96, d=12288, r=256):
    """|Θ| = L (d + r), far below LoRA of rank 1 (VeRA; GPT-3's 96 layers, q and v, r = 256 against LoRA's L̂ = 2 · 96, r = 1).

    Measured: the two counts in millions, 2.41 and 4.72, and whether a small model's VeRA layers hold just Σ (out + r) trained
    numbers (its excess over the formula, 0). Exact; the seed changes nothing.
    """
    model = nn.Module()
    with backend.using_generator(np.random.default_rng(seed)):
        model.q, model.v = nn.Linear(48, 48), nn.Linear(48, 48)
    variants.add_vera(model, r=8, seed=seed)
    held = sum(w.size for _, w in model.trainable())
    return {
        "vera": 2 * layers * (d + r) / 1e6,
        "lora": 2 * layers * 2 * d / 1e6,
        "excess": float(held - 2 * (48 + 8)),
    }


def _counts_verdict(results):
    vera, lora, excess = (values(results, k) for k in ("vera", "lora", "excess"))
    return judge(
        f"{vera[0]:.2f} million parameters with r = 256, where LoRA has {lora[0]:.2f} with r = 1",
        {"fewer": (vera < lora).all(), "the formula's count": (excess == 0).all()},
    )


# -------------------------------------------------------------------------------------------------------------------- as figures
def draw_quantization_starts(results=None):
    """‖Q + s B A − W‖ / ‖W‖ of NF4 alone, PiSSA, LoftQ in 1 and 5 steps, on three kinds of W (experiment `quantized_starts`)."""
    results = given_or_run(results, quantized_starts)
    figure, axes = canvas(9, 3.5, ncols=3, sharey=True)
    kinds = {
        "gauss": "Gaussian, a flat spectrum",
        "power": "singular values $i^{-0.7}$",
        "outliers": "Gaussian, 4 columns × 10",
    }
    starts = {"nf4": "NF4\nalone", "pissa": "PiSSA", "loftq_1": "LoftQ\n1 step", "loftq_5": "LoftQ\n5 steps"}
    for ax, (kind, title) in zip(axes, kinds.items(), strict=True):
        keys = [f"{kind}_{name}" for name in starts]
        means = [values(results, key).mean() for key in keys]
        best = int(np.argmin(means))
        colours = ["0.75", *(COLOURS[2] if i == best else PALE for i in range(1, len(keys)))]
        bars(ax, range(len(keys)), results, keys, colours, "{:.3f}")
        name = list(starts.values())[best].replace("\n", " in ")
        ax.set_title(f"{title}:\n{name}, {means[best] / means[0]:.2f} of NF4's error", fontsize=10)
        ax.set_xticks(range(len(keys)), starts.values(), fontsize=9)
    axes[0].set(ylabel="relative error at the start, r = 16", ylim=(0, 0.163))
    return figure


def draw_aligned_first_step(results=None):
    """The cosine of the first step with −G after LoRA, PEFT's LoRA-GA, LoRA-GA; the best of rank 2r (`aligned_first_step`)."""
    results = given_or_run(results, aligned_first_step)
    figure, ax = canvas(5.4, 3)
    for x, (key, colour) in enumerate((("lora", PALE), ("peft", PALE), ("lora_ga", COLOURS[2]))):
        found = values(results, key)
        ax.bar(x, found.mean(), 0.55, color=colour)
        ax.annotate(
            f"{found.mean():.3f}", (x, found.mean()), (0, -13), ha="center", color="k" if x < 2 else "w", **SMALL
        )
    bound = values(results, "bound").mean()
    ax.axhline(bound, color="0.3", lw=1, ls="--", zorder=0)
    ax.annotate(f"best of rank 2r: {bound:.3f}", (-0.28, bound), (0, 4), color="0.3", **SMALL)
    ax.set_xticks(range(3), ("LoRA", "LoRA-GA as\nin PEFT", "LoRA-GA"))
    ax.set(ylabel="cosine of the first step with −G", ylim=(0, 1.08))
    ga, lora = (values(results, key).mean() for key in ("lora_ga", "lora"))
    ax.set_title(f"The first step: cosine {ga:.2f} after LoRA-GA, {lora:.2f} after LoRA", fontsize=10)
    return figure


def draw_rate_ratio(results=None):
    """The error left after tuning η_A for λ = 1, 4, 16 at α = 4, and for λ = 1 at α = 64, at two widths (experiment `lora_plus_ratio`)."""
    results = given_or_run(results, lora_plus_ratio)
    figure, ax = canvas(6.2, 3.4)
    gain = []
    for width, colour, mark, shift in ((32, COLOURS[0], "o", -0.05), (128, COLOURS[2], "s", 0.05)):
        keys = [f"width_{width}_{key}" for key in ("ratio_1", "ratio_4", "ratio_16", "alpha_64")]
        rows = np.array([values(results, key) for key in keys])
        mean = rows.mean(axis=1)
        gain += [mean[0] / mean[2], mean[0] / mean[3]]
        at = np.arange(4) + shift
        ax.plot(at, rows, mark, color=colour, ms=3, alpha=0.55)
        ax.plot(at[:3], mean[:3], mark + ("-" if width == 32 else "--"), color=colour, lw=1.5, ms=5)
        ax.plot(at[3], mean[3], mark, color=colour, ms=7, mfc="none", mew=1.5)
        ax.annotate(f"width {width}", (at[0], mean[0]), (12, 2 if width == 32 else -14), color=colour, **SMALL)
        for x, y in zip(at[2:], mean[2:], strict=True):
            side = {"ha": "right"} if width == 32 else {"ha": "left"}
            ax.annotate(f"{y:.3f}", (x, y), (-6 if width == 32 else 6, -16), color=colour, **side, **SMALL)
    ax.axvline(2.5, color="0.8", lw=0.9, zorder=0)
    ax.set_xticks(range(4), ("λ = 1\nα = 4", "λ = 4\nα = 4", "λ = 16\nα = 4", "λ = 1\nα = 64"))
    ax.set(xlabel="λ, B's learning rate over A's, and α", ylabel="error left / error at the start")
    ax.set(ylim=(0, 0.105), xlim=(-0.4, 3.5))
    ax.set_title(
        f"λ = 16 leaves 1/{gain[0]:.1f} and 1/{gain[2]:.1f} of the error; 16 α at λ = 1 leaves 1/{gain[1]:.1f} and 1/{gain[3]:.1f}",
        fontsize=10,
    )
    return figure


def draw_rank_allocation(results=None):
    """What AdaLoRA gives two layers planted with ranks 1 and 6, and the error beside uniform LoRA's (experiment `adalora_allocation`)."""
    results = given_or_run(results, adalora_allocation)
    figure, (left, right) = canvas(6.6, 3, ncols=2, width_ratios=(1.5, 1))
    bars(left, (0, 2), results, ("rank_one", "rank_two"), (COLOURS[2],) * 2, "{:.0f}", 0.7)
    left.bar((0.8, 2.8), (3, 4), 0.7, color=PALE)
    for x, r in ((0.8, 3), (2.8, 4)):
        left.annotate(str(r), (x, r), (0, 4), ha="center", color="0.25", **SMALL)
    left.annotate("AdaLoRA", (0, 1), (0, 16), ha="center", color=COLOURS[2], **SMALL)
    left.annotate("LoRA", (0.8, 3), (0, 16), ha="center", color="0.4", **SMALL)
    left.set_xticks((0.4, 2.4), ("planted rank 1", "planted rank 6"))
    left.set(ylabel="rank given, of 7", ylim=(0, 7.2))
    bars(right, (0, 1), results, ("error", "error_lora"), (COLOURS[2], PALE), "{:.3f}", 0.55)
    right.set_xticks((0, 1), ("AdaLoRA", "LoRA, 3 and 4"))
    right.set(ylabel="‖ΔW − ΔW*‖ / ‖ΔW*‖", ylim=(0, 0.47), xlim=(-0.5, 1.5))
    one, two, error, uniform = (values(results, key).mean() for key in ("rank_one", "rank_two", "error", "error_lora"))
    figure.suptitle(
        f"Planted 1 and 6, given {one:.0f} and {two:.0f}: error {error:.2f}, not {uniform:.2f}", fontsize=10
    )
    return figure


def draw_magnitude_and_direction(results=None):
    """The correlation of ΔM and ΔD for full fine-tuning, LoRA and DoRA, over rows and over columns, beside DoRA's published ones."""
    results = given_or_run(results, magnitude_and_direction)
    figure, ax = canvas(5.8, 3.2)
    published = {"lora": 0.83, "dora": -0.31, "full": -0.62}
    for x, kind in enumerate(published):
        for axis, shift, colour, mark in (("rows", -0.12, COLOURS[0], "o"), ("columns", 0.12, COLOURS[1], "s")):
            found = values(results, f"{kind}_{axis}")
            dots(ax, x + shift, found, colour, 5, mark)
            if x == 0:
                at = (x + shift, found.min())
                ax.annotate(axis, at, (0, -14), ha="center", color=colour, **SMALL)
        ax.plot([x - 0.25, x + 0.25], [published[kind]] * 2, "-", color="0.25", lw=1.5, zorder=0)
        ax.annotate(
            f"{published[kind]:+.2f}".replace("-", "−"), (x + 0.25, published[kind]), (4, -3), color="0.25", **SMALL
        )
    ax.annotate("line: the paper's", (2.25, published["full"]), (-2, -15), ha="center", color="0.25", **SMALL)
    ax.axhline(0, color="0.7", lw=0.9, zorder=0)
    ax.set_xticks(range(3), ("LoRA", "DoRA", "full fine-tuning"))
    ax.set(ylabel="correlation of ΔM and ΔD", ylim=(-1, 1.08), xlim=(-0.5, 2.65))
    seeds = (values(results, f"{kind}_rows") for kind in ("lora", "dora", "full"))
    lora, dora, full = (f"{x.mean():+.2f} ± {np.ptp(x) / 2:.2f}" for x in seeds)
    title = f"Mean over rows: LoRA {lora}, DoRA {dora}, full {full}; dots: seeds"
    ax.set_title(title.replace("-", "−"), fontsize=10)
    return figure


def draw_entropy_and_error(results=None):
    """The mean entropy of a block and the squared error for τ = 0, the median, and τ* (experiment `calibrated_entropy`)."""
    results = given_or_run(results, calibrated_entropy)
    figure, (left, right) = canvas(7, 3, ncols=2)
    keys, labels = ("nf4", "median", "best"), ("τ = 0\n(NF4)", "τ = median", "τ* (ICQ)")
    unit = [result | {"error_nf4": 1.0} for result in results]
    for ax, what, low, high in ((left, "entropy", 3.66, 3.78), (right, "error", 0.94, 1.06)):
        for x, key in enumerate(keys):
            found, colour = values(unit, f"{what}_{key}"), COLOURS[2] if key == "best" else "0.45"
            ax.plot([x - 0.22, x + 0.22], [found.mean()] * 2, "-", color=colour, lw=2.2)
            dots(ax, x, found, colour, 4)
            ax.annotate(f"{found.mean():.3f}", (x + 0.22, found.mean()), (3, -3), color=colour, **SMALL)
        ax.set(ylim=(low, high), xlim=(-0.5, 2.75))
        ax.set_xticks(range(3), labels)
    left.set_ylabel("entropy of a block of 64 (bits)")
    right.set_ylabel("squared error / NF4's")
    rise = (values(results, "entropy_best") - values(results, "entropy_nf4")).mean()
    error = values(results, "error_best").mean()
    figure.suptitle(f"ICQ: {rise:+.2f} bits of entropy, {error:.3f} times the error; dots: seeds", fontsize=10)
    return figure


def draw_learning_and_forgetting(results=None):
    """Accuracy learned, old task kept by LoRA minus full fine-tuning at equal learning, rank of the update (`learns_less_forgets_less`)."""
    results = given_or_run(results, learns_less_forgets_less)
    figure, axes = canvas(8.4, 3.2, ncols=3, width_ratios=(1.3, 1, 1.3))
    bars(axes[0], range(2), results, ("learned_full", "learned_lora"), (PALE, COLOURS[2]), "{:.3f}", 0.55)
    axes[0].set(ylabel="accuracy on the new task", ylim=(0, 0.85))
    kept = values(results, "kept_more")
    axes[1].bar(0, kept.mean(), 0.55, color=COLOURS[2])
    dots(axes[1], 0, kept, "0.2", 3.5)
    axes[1].axhline(0, color="0.4", lw=0.9)
    axes[1].set(ylabel="old task kept, LoRA − full", ylim=(-0.12, 0.03), xlim=(-0.7, 0.7))
    axes[1].set_xticks([0], ["at equal\nlearning"])
    axes[1].annotate("forgets less", (0, 0.014), (0, -3), ha="center", color="0.4", **SMALL)
    bars(axes[2], range(2), results, ("rank_full", "rank_lora"), (PALE, COLOURS[2]), "{:.1f}", 0.55)
    axes[2].set(ylabel="rank for 90 % of ‖ΔW‖²", ylim=(0, 13))
    for ax in (axes[0], axes[2]):
        ax.set_xticks(range(2), ("full", "LoRA, r = 4"))
    ratio = (values(results, "rank_full") / values(results, "rank_lora")).mean()
    less = values(results, "learned_full") - values(results, "learned_lora")
    less, kept = (f"{x.mean():+.3f} ± {np.ptp(x) / 2:.3f}" for x in (less, kept))
    title = f"LoRA learns {less} less, keeps {kept} at equal learning; ranks differ {ratio:.1f} times; dots: seeds"
    figure.suptitle(title.replace("-", "−"), fontsize=10)
    return figure


EXPERIMENTS = {
    "quantized_starts": Experiment(
        "Quantization-aware starts",
        "A bypass that starts from W's or the error's best rank r reduces the error of quantization",
        "PiSSA eq. 8, LoftQ eq. 6",
        "PiSSA: about 20 % less error than QLoRA (nuclear norm)",
        quantized_starts,
        tuple(
            (f"{kind}, {name}:", f"{kind}_{name}")
            for kind in ("gauss", "power", "outliers")
            for name in ("nf4", "pissa", "loftq_1", "loftq_5")
        ),
        _starts_verdict,
        Drawing("quantization_starts", draw_quantization_starts),
    ),
    "aligned_first_step": Experiment(
        "An aligned first step",
        "LoRA-GA's first step is aligned with full fine-tuning's",
        "LoRA-GA",
        "",
        aligned_first_step,
        (("cosine, LoRA:", "lora"), ("LoRA-GA:", "lora_ga"), ("PEFT's:", "peft"), ("best of rank 2r:", "bound")),
        _first_step_verdict,
        Drawing("aligned_first_step", draw_aligned_first_step),
    ),
    "lora_plus_ratio": Experiment(
        "The ratio of the rates",
        "Equal rates for A and B are not efficient, the less so the wider the network",
        "LoRA+, theorem 1",
        "1 to 2 % better, up to twice as fast",
        lora_plus_ratio,
        tuple(
            (label.format(n), f"width_{n}_{key}")
            for n in (32, 128)
            for label, key in (
                ("width {}, ratio 1:", "ratio_1"),
                ("ratio 4:", "ratio_4"),
                ("ratio 16:", "ratio_16"),
                ("ratio 1, 16 α:", "alpha_64"),
            )
        ),
        _ratio_verdict,
        Drawing("rate_ratio", draw_rate_ratio),
    ),
    "lora_plus_start": Experiment(
        "The ratio without Adam",
        "Under gradient descent a ratio of the rates is a larger start of A and nothing else",
        "derived here",
        "",
        lora_plus_start,
        (("gradient descent:", "descent"), ("sign descent:", "sign")),
        _start_verdict,
    ),
    "adalora_allocation": Experiment(
        "Where the rank goes",
        "The budget is allocated to the matrices that need it",
        "AdaLoRA §4.4",
        "",
        adalora_allocation,
        (
            ("planted 1, given:", "rank_one"),
            ("planted 6, given:", "rank_two"),
            ("error:", "error"),
            ("LoRA:", "error_lora"),
        ),
        _allocation_verdict,
        Drawing("rank_allocation", draw_rank_allocation),
    ),
    "magnitude_and_direction": Experiment(
        "Magnitude and direction",
        "ΔM and ΔD correlate positively for LoRA, negatively for DoRA and full fine-tuning",
        "DoRA §3.2, §4.1",
        "LoRA +.83, DoRA −.31, full −.62",
        magnitude_and_direction,
        tuple(
            (f"{kind}, {axis}:", f"{kind}_{axis}") for axis in ("rows", "columns") for kind in ("lora", "dora", "full")
        ),
        _direction_verdict,
        Drawing("magnitude_and_direction", draw_magnitude_and_direction),
    ),
    "vera_counts": Experiment(
        "VeRA's parameters",
        "Far fewer than LoRA of rank 1",
        "VeRA",
        "L (d + r)",
        vera_counts,
        (("millions, VeRA r = 256:", "vera"), ("LoRA r = 1:", "lora")),
        _counts_verdict,
    ),
    "calibrated_entropy": Experiment(
        "Entropy and error",
        "Shifting each block raises the entropy of its codes",
        "IR-QLoRA §3.2, §4.2",
        "+0.07 bits",
        calibrated_entropy,
        (
            ("bits, NF4:", "entropy_nf4"),
            ("median:", "entropy_median"),
            ("τ*:", "entropy_best"),
            ("error / NF4's, median:", "error_median"),
            ("τ*:", "error_best"),
        ),
        _entropy_verdict,
        Drawing("entropy_and_error", draw_entropy_and_error),
    ),
    "learns_less_forgets_less": Experiment(
        "Learning and forgetting",
        "LoRA learns less and forgets less; full fine-tuning's update has 10 to 100 times the rank",
        "Biderman et al. 2024",
        "",
        learns_less_forgets_less,
        (
            ("learned, full:", "learned_full"),
            ("LoRA:", "learned_lora"),
            ("kept more at equal learning:", "kept_more"),
            ("rank, full:", "rank_full"),
            ("LoRA:", "rank_lora"),
        ),
        _forgets_verdict,
        Drawing("learning_and_forgetting", draw_learning_and_forgetting),
    ),
}
