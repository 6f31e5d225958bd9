"""Which directions an update takes: what two runs share, what ΔW amplifies, and how many random directions are enough.

The planted tasks and the training are those of `planted`; φ and Table 7's pieces come from `subspaces`, the random subspace from
`intrinsic`. Each measured φ stands beside two expectations: max(i, j)/d for unrelated subspaces, and `shared_only` for subspaces
that share the planted directions and nothing else.

What is computed: each experiment is a function of a seed, and its docstring says what was expected. What is said: a verdict from the
numbers of all seeds. What is drawn: one figure a claim, after the figures and tables of LoRA's §7 where the paper has one.
"""

import math

import numpy as np

from ... import nn, ops
from ...figures.style import COLOURS, SMALL, canvas
from ...tensor import Tensor, no_grad
from .. import intrinsic, subspaces
from .drawing import PALE, dots, given_or_run, mean_and_range
from .registry import Drawing, Experiment, above, below, judge, spread, values
from .toys import Planted, fit, linear, orthonormal

PAIRS = ((1, 1), (2, 2), (8, 8), (8, 64))
DIMENSIONS = (10, 20, 35, 50, 70, 100, 140, 200)


def shared_only(i, j, d, k):
    """E φ of two subspaces of i and j ≥ k dimensions in R^d that both hold the same k directions and are random otherwise.

    (k + (i − k)(j − k)/(d − k)) / min(i, j): what is left after the shared k is a pair of random subspaces of R^{d−k}. -> float
    """
    k = min(k, i, j)
    return (k + (i - k) * (j - k) / (d - k)) / min(i, j)


def trained(task, r, seed):
    """A LoRALinear of rank r trained on the task, its A and its batches drawn from `seed`."""
    layer = task.adapted(r, seed=seed)
    fit(layer, task.x, task.y, seed=seed)
    return layer


def update(layer):
    """s B A in float64, so that its rank is r and not what float32 makes of it."""
    return layer.lora_B.weight.data.astype(np.float64) @ layer.lora_A.weight.data * layer.scaling


# -------------------------------------------------------------------------------------------------------------- what runs share
def subspace_overlap(seed=0, pairs=PAIRS, grid=None):
    """r = 8 and r = 64 learn the same top directions, and little else in common (LoRA §7.2, Figure 3: φ > 0.5 at dimension 1).

    Both are trained on one task with a planted rank 2 (singular values 3 and 2; equal ones would leave the order to
    chance). Measured: φ(A_r8, A_r64, i, j), and φ(1, 1) of ΔW itself. Expected: φ(2, 2) near 1; beyond the planted
    directions no more than chance, which is `shared_only`: 0.30 at (8, 8), where unrelated subspaces have 0.083. φ(1, 1)
    of A is less certain than that of ΔW, because A's first direction may be any mixture of the two planted ones.

        grid    (i_max, j_max): also return φ for every i and j, as lists of rows
    """
    task = Planted(seed=seed)
    small, large = trained(task, 8, seed), trained(task, 64, seed + 1000)
    a, b = small.lora_A.weight.data, large.lora_A.weight.data
    out = {
        "phi": [subspaces.similarity(a, b, i, j) for i, j in pairs],
        "chance": [subspaces.expected_similarity(i, j, task.d) for i, j in pairs],
        "shared_only": [shared_only(i, j, task.d, 2) for i, j in pairs],
        "phi_delta_1": subspaces.similarity(update(small), update(large), 1, 1),
    }
    if grid is not None:
        out["grid"] = subspaces.similarity_grid(a, b, *grid).tolist()
    return out


def _overlap_verdict(results):
    phi, only = values(results, "phi"), values(results, "shared_only")
    off = np.abs(phi - only)[:, 1:].max(axis=1)
    return judge(
        f"φ(1,1) is at least {phi[:, 0].min():.2f}, φ(2,2) at least {phi[:, 1].min():.3f}; every other φ is within "
        f"{off.max():.2f} of the planted 2 "
        "plus chance",
        {"φ(1,1)": above(phi[:, 0], 0.5), "φ(2,2)": above(phi[:, 1], 0.9), "chance beyond": below(off, 0.1)},
    )


def two_seeds(seed=0, sizes=(1, 2, 16, 64)):
    """Two seeds at r = 64 share the useful directions; two Gaussian matrices share none (LoRA §7.2, Figure 4).

    Measured: φ(A, A′, n, n) of two runs with other A, other batches, the same task; and of two Gaussian 64 × 96
    matrices. Expected: 1 at n = 2 and `shared_only` beyond, 0.26 at 16; the Gaussians n/d, which is 0.17 at 16 and not 0,
    and 0.67 at 64: at d = 96, unlike d = 12,288, chance alone nearly fills the picture.
    """
    task = Planted(seed=seed)
    a, b = (trained(task, 64, 2 * seed + k).lora_A.weight.data for k in (1, 2))
    g, h = np.random.default_rng([seed, 64]).standard_normal((2, 64, task.d))
    return {
        "phi": [subspaces.similarity(a, b, n, n) for n in sizes],
        "gaussian": [subspaces.similarity(g, h, n, n) for n in sizes],
        "chance": [subspaces.expected_similarity(n, n, task.d) for n in sizes],
        "shared_only": [shared_only(n, n, task.d, 2) for n in sizes],
    }


def _two_seeds_verdict(results):
    phi, gaussian, chance = (values(results, key) for key in ("phi", "gaussian", "chance"))
    off = np.abs(gaussian - chance).max(axis=1)
    return judge(
        f"φ(2,2) of two seeds is at least {phi[:, 1].min():.3f}; at 16 it is {phi[:, 2].mean():.2f} against "
        f"{gaussian[:, 2].mean():.2f} of Gaussians, which "
        f"lie within {off.max():.2f} of n/d",
        {
            "φ(2,2)": above(phi[:, 1], 0.9),
            "more than Gaussians at 16": above(phi[:, 2] - gaussian[:, 2]),
            "Gaussians share chance": below(off, 0.1),
        },
    )


# --------------------------------------------------------------------------------------------------------- what ΔW does beside W
def _base(seed, d):
    """W₀ with singular values 10/i, and its singular vectors as columns."""
    rng = np.random.default_rng([seed, d, 5])
    u, v = orthonormal(rng, d, d), orthonormal(rng, d, d)
    return u * (10 / np.arange(1, d + 1)) @ v.T, u, v


def _planted_in(place, seed, d=96):
    """The task whose rank-2 ΔW lies along W₀'s singular directions 25 and 26 ("weak"), 1 and 2 ("top"), or "
    "anywhere ("random")."""
    w0, u, v = _base(seed, d)
    k = {"weak": 24, "top": 0, "random": None}[place]
    return Planted(seed=seed, w0=w0, directions=None if k is None else (u[:, k : k + 2], v[:, k : k + 2]))


def top_of_delta_in_w(seed=0):
    """The top directions of ΔW are not those of W (LoRA Figure 8, H.3: φ of ΔW's top 4 with W's top 10 % barely exceeds 0.2).

    Measured: φ(ΔW_r8, W₀, 4, 10) at d = 96, right singular vectors, for ΔW planted in weak directions of W₀, in random
    ones, and in its top two. Expected: below chance, near chance, and a little above 0.5 (two of four). The baseline to
    know is 0.10: one tenth of all directions hold one tenth of any random ΔW, so the paper's 0.2 is twice what no
    relation at all would give.
    """
    out = {"chance": subspaces.expected_similarity(4, 10, 96)}
    for place in ("weak", "random", "top"):
        task = _planted_in(place, seed)
        out[place] = subspaces.similarity(update(trained(task, 8, seed)), task.w0, 4, 10)
    return out


def _top_verdict(results):
    weak, random, top = (values(results, key) for key in ("weak", "random", "top"))
    return judge(
        f"φ = {weak.mean():.2f} where weak directions were planted and {random.mean():.2f} where random ones were "
        f"(chance {results[0]['chance']:.2f}): "
        f"a small φ is what an unrelated ΔW gives; the measure does see W's top two ({top.mean():.2f})",
        {"small for weak": below(weak, 0.2), "for random": below(random, 0.2), "but not for W's top": above(top, 0.2)},
    )


def amplification(seed=0, ranks=(2, 4, 64)):
    """ΔW amplifies directions that W does not emphasize, by a large factor (LoRA §7.3, Table 7: 21.5 at r = 4, about 2 at r = 64).

    W₀ has singular values 10/i. Rank-2 updates are planted along its directions 25 and 26 ("weak") and along random
    ones, and learned at each r. Measured: ‖ΔW‖ / ‖UᵀW₀V‖, and ‖UᵀW₀V‖ beside its expectation for random U, V, ‖W₀‖ r/d.
    Expected: above 5 at r = 2 and 4, below 1 at 64. The control is the point: a ΔW in random directions has a factor of 8
    to 11 at r = 4, more than one in weak directions, since ‖W₀‖ r/d is small whatever the directions. What is evidence in
    the paper's table is 0.32 against 0.02, 16 times chance, and not the factor 21.5; and 0.32 is still less than the 1.12 =
    ‖W‖ √(r/d) that r singular pairs of W would give, drawn at random (notebook 13), so ΔW's directions are not W's main ones.
    """
    out = {"ranks": list(ranks)}
    for place in ("weak", "random"):
        task = _planted_in(place, seed)
        found = []
        for r in ranks:
            found.append(subspaces.amplification(update(trained(task, r, seed)), task.w0, r))
        out[place] = [a.factor for a in found]
        out[f"projected_{place}"] = [a.projected for a in found]
        out["predicted"], out["top"] = [a.random for a in found], [a.top for a in found]
    rng = np.random.default_rng([seed, 9])
    drawn = [
        np.linalg.norm(orthonormal(rng, task.d, r).T @ task.w0 @ orthonormal(rng, task.d, r))
        for r in ranks
        for _ in range(20)
    ]
    out["drawn"] = np.sqrt(np.square(np.reshape(drawn, (len(ranks), 20))).mean(axis=1)).tolist()
    return out


def _amplification_verdict(results):
    weak, random = values(results, "weak"), values(results, "random")
    return judge(
        f"factor {weak[:, 1].mean():.1f} at r = 4 and {weak[:, -1].mean():.2f} at r = 64; but a ΔW in random "
        f"directions has {random[:, 1].mean():.1f} at r = 4, so the "
        "factor alone shows nothing",
        {
            "large at r = 4": above(weak[:, 1], 5),
            "small at r = 64": below(weak[:, -1], 2),
            "twice that of random directions": above(np.log(weak[:, 1] / random[:, 1]), np.log(2)),
        },
    )


# -------------------------------------------------------------------------------------------------------- how many directions
class MLP(nn.Module):
    """ReLU layers without biases.   weights: arrays (out, in)"""

    def __init__(self, weights):
        self.layers = [linear(w, trainable=True) for w in weights]

    def forward(self, x):
        x = x if isinstance(x, Tensor) else Tensor(x)
        for layer in self.layers[:-1]:
            x = ops.relu(layer(x))
        return self.layers[-1](x)


def intrinsic_dimension(seed=0, dimensions=DIMENSIONS):
    """Few random directions train a network, fewer from a pre-trained start (Li et al. 2018; Aghajanyan et al. 2020:
        200 for RoBERTa on MRPC).

    An MLP 16-32-32-4 (D = 1,664 weights) sorts 16 clusters of noise 0.7 into 4 classes of four clusters each. d numbers
    are trained through a random P (`RandomSubspace`, rate 0.1, 150 steps), and d90 is the first d with 90 % of full
    training's accuracy on unseen data. Three starts: random; "head", whose body learned to tell the 16 clusters apart and
    whose head is new; "near", trained on the same classes with centres displaced by as much as they are wide. Expected:
    d90 well below D, lower for "head", lowest for "near". What comes out: about 100 of 1,664, and a gain of at most one
    or two steps of the grid, in two seeds of three, no more for "near" (which starts at 0.5 to 0.7) than for "head": undecided. (Eight
    seeds decide that "near" needs fewer, 80 on average instead of 124; for "head" they have 101.) An
    earlier design, a start trained with the classes' names permuted, gained nothing.
    """
    rng = np.random.default_rng([seed, 16])
    centres = rng.standard_normal((16, 16))

    def draw(n, centres=centres):
        cluster = rng.integers(0, 16, n)
        return (centres[cluster] + 0.7 * rng.standard_normal((n, 16))).astype(np.float32), cluster

    (x, cluster), (unseen, other) = draw(2048), draw(1024)
    near_x, near_cluster = draw(2048, centres + rng.standard_normal((16, 16)))
    he = [rng.standard_normal(s) * math.sqrt(2 / s[1]) for s in ((32, 16), (32, 32), (4, 32), (16, 32))]

    def train(model, x, y, lr=0.01, steps=150):
        fit(model, x, y, steps=steps, lr=lr, batch=128, seed=seed, loss=ops.softmax_cross_entropy)
        return model

    def accuracy(model):
        with no_grad():
            return float((model(unseen).data.argmax(-1) == other % 4).mean())

    def arrays(model):
        return [layer.weight.data for layer in model.layers]

    starts = {
        "random": he[:3],
        "head": [*arrays(train(MLP([*he[:2], he[3]]), x, cluster, steps=300))[:2], he[2]],
        "near": arrays(train(MLP(he[:3]), near_x, near_cluster % 4, steps=300)),
    }
    out = {"dimensions": list(dimensions), "weights": float(sum(w.size for w in he[:3]))}
    for name, start in starts.items():
        full = accuracy(train(MLP(start), x, cluster % 4))
        scores = {}
        for d in dimensions:
            subspace = intrinsic.RandomSubspace(MLP(start), d, seed=seed)
            scores[d] = accuracy(train(subspace, x, cluster % 4, lr=0.1))
        out[name], out[f"start_{name}"], out[f"full_{name}"] = list(scores.values()), accuracy(MLP(start)), full
        found = intrinsic.d90(scores, full)
        out[f"d90_{name}"] = math.inf if found is None else float(found)
    return out


def _intrinsic_verdict(results):
    random, head, near = (values(results, f"d90_{name}") for name in ("random", "head", "near"))
    grid, seen = np.array(results[0]["dimensions"], float), np.concatenate([random, head, near])
    step = np.diff(np.log(grid[(grid >= seen.min()) & (grid <= seen.max())]), append=0).max()
    return judge(
        f"d90 is at most {random.max():g} of {results[0]['weights']:g} weights; d90 {spread(random)} from "
        f"a random start, {spread(head)} with a "
        f"pre-trained body, {spread(near)} from a nearby task, on a grid of steps up to {np.exp(step):.2g} times",
        {
            "few are enough": below(np.log(random / results[0]["weights"]), np.log(0.2), least=step),
            "fewer with a pre-trained body": below(np.log(head / random), least=step),
            "fewer from a nearby task": below(np.log(near / random), least=step),
        },
    )


# -------------------------------------------------------------------------------------------------------------------- as figures
def draw_similarity_maps(seed=0, grid=(8, 64)):
    """φ(A_r8, A_r64, i, j) for every i and j as in LoRA's Figure 3, beside chance c = max(i, j)/d, and (φ − c)/(1 − c).

    The last is 0 on average for unrelated spaces, and 1 if the smaller space lies in the larger, where φ − c would shrink as c grows.
    """
    found = subspace_overlap(seed, grid=grid)
    phi, (rows, columns) = np.array(found["grid"]), grid
    chance = np.array([[subspaces.expected_similarity(i + 1, j + 1, 96) for j in range(columns)] for i in range(rows)])
    beyond = (phi - chance) / (1 - chance)
    figure, axes = canvas(9, 2.9, ncols=3, sharey=True)
    titles = (
        f"φ(2,2) = {phi[1, 1]:.2f}, φ(8,8) = {phi[7, 7]:.2f}",
        f"chance c = max(i, j)/d: {chance[1, 1]:.2f}, {chance[7, 7]:.2f}",
        f"(φ − c)/(1 − c): {beyond[1, 1]:.2f}, {beyond[7, 7]:.2f}",
    )
    for ax, shown, title in zip(axes, (phi, chance, beyond), titles, strict=True):
        image = ax.pcolormesh(
            np.arange(columns + 1) + 0.5,
            np.arange(rows + 1) + 0.5,
            shown,
            cmap="viridis",
            vmin=0,
            vmax=1,
            rasterized=True,
        )
        ax.set_xlabel("j, directions of A at r = 64")
        ax.set_title(title, fontsize=10)
        ax.set_xticks([1, 8, 16, 32, 48, 64])
        for i, j in ((2, 2), (8, 8)):
            for edge, width in (("black", 2.6), ("white", 1.2)):
                ax.plot(j, i, "s", mfc="none", mec=edge, ms=7, mew=width, clip_on=False)
    axes[0].set_ylabel("i, directions of A at r = 8")
    axes[0].set_yticks(range(1, rows + 1))
    axes[0].invert_yaxis()
    figure.colorbar(image, ax=axes, pad=0.01)
    return figure


def draw_two_seeds(results=None):
    """φ(A, A′, n, n) of two seeds and of two Gaussian matrices against n, with both expectations as lines (LoRA's Figure 4)."""
    sizes = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    results = given_or_run(results, two_seeds, sizes=sizes)
    figure, ax = canvas(5.6, 3.4)
    n = np.arange(1, 65)
    ax.plot(n, [shared_only(k, k, 96, 2) for k in n], "-", color=COLOURS[0], lw=1.2)
    ax.plot(n, n / 96, "--", color="0.45", lw=1.2)
    for result in results:
        dots(ax, sizes, result["phi"], COLOURS[0], 4.5)
        dots(ax, sizes, result["gaussian"], "0.45", 4, "s")
    ax.annotate(
        "two seeds; line: the planted 2\nshared, the rest chance", (3, 0.68), (10, 4), color=COLOURS[0], **SMALL
    )
    ax.annotate("Gaussian matrices; line: n/d", (10, 0.08), (8, -3), color="0.35", **SMALL)
    at = sizes.index(16)
    ax.annotate(
        f"{np.mean([r['phi'][at] for r in results]):.2f}",
        (16, results[0]["phi"][at]),
        (0, 7),
        ha="center",
        color=COLOURS[0],
        **SMALL,
    )
    ax.set(xscale="log", xlabel="directions n", ylabel="φ(n, n)", ylim=(0, 1.05))
    ax.set_xticks(ticks := [1, 2, 4, 8, 16, 32, 64], map(str, ticks))
    ax.minorticks_off()
    two = min(r["phi"][1] for r in results)
    ax.set_title(f"Two seeds at r = 64 share the planted two (φ ≥ {two:.3f}) and little else", fontsize=10)
    return figure


def draw_top_of_delta_in_w(results=None):
    """φ(ΔW's top 4, W₀'s top 10 %) by where ΔW was planted, beside chance and the paper's 0.2 (LoRA's Figure 8, H.3)."""
    results = given_or_run(results, top_of_delta_in_w)
    figure, ax = canvas(6.4, 2.8)
    places = {"weak": "weak directions of W₀", "random": "random directions", "top": "W₀'s top two directions"}
    y, chance = np.arange(len(places))[::-1], results[0]["chance"]
    for at, place in zip(y, places, strict=True):
        found = values(results, place)
        ax.barh(at, found.mean(), height=0.55, color=PALE)
        ax.plot(found, [at] * len(found), "o", color="0.25", ms=3.5)
        paper = {"fc": "white", "ec": "none", "pad": 0.6}  # so that no line crosses the number
        ax.annotate(f"{found.mean():.3f}", (found.max(), at), (7, -3), color="0.3", bbox=paper, **SMALL)
    ax.axvline(chance, color=COLOURS[2], lw=1.2)
    ax.annotate("chance", (chance, 2.7), (-4, 0), ha="right", color=COLOURS[2], **SMALL)
    ax.axvline(0.2, color="0.45", lw=1.2, ls="--")
    ax.annotate("the paper's 0.2", (0.2, 2.42), (4, 0), color="0.35", **SMALL)
    ax.set_yticks(y, [f"ΔW planted in\n{label}" for label in places.values()])
    ax.set(xlabel="φ(ΔW, W₀, 4, 10 of 96)", xlim=(0, 0.75), ylim=(-0.5, 2.95))
    ax.set_title(f"Chance is {chance:.3f}; the paper's 0.2 is {0.2 / chance:.1f} times that", fontsize=10)
    return figure


def draw_amplification(results=None):
    """‖UᵀW₀V‖ by r with U, V of W₀, of two learned ΔW and of random matrices: Table 7 with its random column predicted (lines)."""
    results = given_or_run(results, amplification)
    ranks = results[0]["ranks"]
    figure, (left, right) = canvas(9, 3.5, ncols=2, width_ratios=(1.5, 1))
    columns = (
        ("top", "W₀'s own", "0.8", None),
        ("projected_weak", "a ΔW in weak directions", COLOURS[0], None),
        ("projected_random", "a ΔW in random directions", COLOURS[3], "//"),
        ("drawn", "random matrices", "0.55", "xx"),
    )
    x = np.arange(len(ranks))
    for k, (key, label, colour, hatch) in enumerate(columns):
        rows = values(results, key)
        at = x + 0.2 * (k - 1.5)
        left.bar(at, rows.mean(axis=0), 0.19, color=colour, hatch=hatch, edgecolor="white", lw=0.5, label=label)
        for row in rows:
            left.plot(at, row, ".", color="black", ms=3.5)
    predicted = values(results, "predicted").mean(axis=0)
    for xi, value in zip(x, predicted, strict=True):
        left.plot([xi - 0.3, xi + 0.42], [value, value], color="black", lw=1.4)
        left.annotate(f"{value:.2f}", (xi + 0.42, value), (3, -3), **SMALL)
    left.set(yscale="log", ylim=(0.05, 250), ylabel="‖UᵀW₀V‖")
    left.legend(
        frameon=False,
        fontsize=8.5,
        ncols=2,
        loc="upper left",
        title="U and V are the top r directions of",
        title_fontsize=8.5,
    )
    left.set_xticks(x, [f"r = {r}" for r in ranks])
    left.set_title("black lines: predicted for random U, V: ‖W₀‖ r/d", fontsize=10)
    for key, label, colour, mark, shift in (
        ("weak", "weak directions", COLOURS[0], "o-", (-4, -16)),
        ("random", "random directions", COLOURS[3], "s--", (6, 6)),
    ):
        rows = values(results, key)
        right.plot(x, rows.mean(axis=0), mark, color=colour, lw=1.6, ms=5)
        for row in rows:
            right.plot(x, row, mark[0], color=colour, ms=3, alpha=0.5)
        right.annotate(label, (x[1] - (key == "weak"), rows.mean(axis=0)[1]), shift, color=colour, **SMALL)
    right.axhline(1, color="0.6", lw=0.9, ls=":")
    right.set(yscale="log", ylim=(0.2, 60), ylabel="amplification ‖ΔW‖ / ‖UᵀW₀V‖", xlim=(-0.3, 2.4))
    right.set_yticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
    right.minorticks_off()
    right.set_xticks(x, [f"r = {r}" for r in ranks])
    weak, random = (values(results, key)[:, 1].mean() for key in ("weak", "random"))
    right.set_title(f"ΔW at r = 4: {weak:.1f} in weak, {random:.1f} in random", fontsize=10)
    return figure


def draw_intrinsic_dimension(results=None):
    """Accuracy on unseen data against the number d of random directions trained, from three starts, with d90 (experiment of that name)."""
    results = given_or_run(results, intrinsic_dimension)
    figure, ax = canvas(5.8, 3.6)
    d = np.array(results[0]["dimensions"])
    lines = []
    for name, label, colour, mark in (
        ("random", "random start", "0.35", "o-"),
        ("head", "pre-trained body, new head", COLOURS[0], "s--"),
        ("near", "pre-trained on a nearby task", COLOURS[2], "^:"),
    ):
        rows = values(results, name)
        d90 = values(results, f"d90_{name}").mean()
        line = mean_and_range(ax, d, rows, mark, colour, 0.13, lw=1.6, ms=5)
        lines.append((line, f"{label}: d90 = {d90:.0f}"))
    full = np.mean([values(results, f"full_{n}").mean() for n in ("random", "head", "near")])
    weights = results[0]["weights"]
    ax.axhline(full, color="0.5", lw=0.9)
    ax.axhline(0.9 * full, color="0.5", lw=0.9, ls="--")
    ax.annotate(f"all {weights:,.0f} weights trained", (d[0], full), (0, 3), color="0.35", **SMALL)
    ax.annotate("90 % of that", (d[0], 0.9 * full), (0, 3), color="0.35", **SMALL)
    ax.set(xscale="log", xlabel="numbers trained, d", ylabel="accuracy on unseen data", ylim=(0.25, 1.04))
    ax.set_xticks(d, [f"{k:g}" for k in d])
    ax.minorticks_off()
    ax.legend(*zip(*lines, strict=True), loc="lower right", frameon=False, fontsize=8.5)
    ax.set_title(
        f"From a random start d90 is {values(results, 'd90_random').mean():.0f} of {weights:,.0f}", fontsize=10
    )
    return figure


EXPERIMENTS = {
    "subspace_overlap": Experiment(
        "What r = 8 and r = 64 share",
        "Adapters of rank 8 and 64 share their top direction",
        "LoRA §7.2, Figure 3",
        "φ(1,1) > 0.5",
        subspace_overlap,
        (
            ("φ(1,1) φ(2,2) φ(8,8) φ(8,64):", "phi"),
            ("of unrelated subspaces:", "chance"),
            ("of ones that share the planted 2:", "shared_only"),
            ("φ(1,1) of ΔW:", "phi_delta_1"),
        ),
        _overlap_verdict,
        # the maps need φ for every i and j, which the table does not
        Drawing("similarity_maps", lambda _: draw_similarity_maps()),
    ),
    "two_seeds": Experiment(
        "Two seeds",
        "Two seeds share the useful directions, Gaussian matrices share none",
        "LoRA §7.2, Figure 4",
        "",
        two_seeds,
        (("φ(n,n) at n = 1 2 16 64:", "phi"), ("Gaussians:", "gaussian"), ("n/d:", "chance")),
        _two_seeds_verdict,
        # the curve needs more sizes than the table
        Drawing("two_seeds", lambda _: draw_two_seeds()),
    ),
    "top_of_delta_in_w": Experiment(
        "ΔW's top in W's top",
        "ΔW does not contain the top directions of W",
        "LoRA H.3, Figure 8",
        "φ(top 4, top 10 %) barely above 0.2",
        top_of_delta_in_w,
        (
            ("φ(4, 10), planted in weak directions:", "weak"),
            ("in random ones:", "random"),
            ("in W's top two:", "top"),
            ("chance:", "chance"),
        ),
        _top_verdict,
        Drawing("top_of_delta_in_w", draw_top_of_delta_in_w),
    ),
    "amplification": Experiment(
        "Amplification",
        "ΔW amplifies directions that W does not emphasize",
        "LoRA §7.3, Table 7",
        "21.5 at r = 4, about 2 at r = 64; random column .02, .33",
        amplification,
        (
            ("factor at r = 2 4 64:", "weak"),
            ("with ΔW in random directions:", "random"),
            ("‖UᵀWV‖:", "projected_weak"),
            ("predicted of random U, V:", "predicted"),
            ("drawn:", "drawn"),
        ),
        _amplification_verdict,
        Drawing("amplification", draw_amplification),
    ),
    "intrinsic_dimension": Experiment(
        "Intrinsic dimension",
        "A few random directions are enough, and fewer after pre-training",
        "Li et al. 2018; Aghajanyan et al. 2020",
        "200 for 90 % of RoBERTa's score on MRPC",
        intrinsic_dimension,
        (
            ("d90, random start:", "d90_random"),
            ("pre-trained body, new head:", "d90_head"),
            ("nearby task:", "d90_near"),
            ("accuracy of the last before training:", "start_near"),
        ),
        _intrinsic_verdict,
        Drawing("intrinsic_dimension", draw_intrinsic_dimension),
    ),
}
