"""Figures on directions: what two adapters share, what an update amplifies, and how many random directions are enough."""

import numpy as np

from .. import subspaces
from ..experiments import directions, registry
from .style import COLOURS, canvas

SMALL = {"textcoords": "offset points", "fontsize": 8.5}
SEEDS = (0, 1, 2)


def similarity_maps(seed=0, grid=(8, 64)):
    """φ(A_r8, A_r64, i, j) for every i and j as in LoRA's Figure 3, beside chance c = max(i, j)/d, and (φ − c)/(1 − c).

    The last is 0 on average for unrelated spaces, and 1 if the smaller space lies in the larger, where φ − c would shrink as c grows.
    """
    found = directions.subspace_overlap(seed, grid=grid)
    phi, (rows, columns) = np.array(found["grid"]), grid
    chance = np.array([[subspaces.expected_similarity(i + 1, j + 1, 96) for j in range(columns)] for i in range(rows)])
    beyond = (phi - chance) / (1 - chance)
    figure, axes = canvas(9, 2.9, ncols=3, sharey=True)
    titles = (
        f"φ(2,2) = {phi[1, 1]:.2f}, φ(8,8) = {phi[7, 7]:.2f}",
        f"chance c = max(i, j)/d: {chance[1, 1]:.2f}, {chance[7, 7]:.2f}",
        f"(φ − c)/(1 − c): {beyond[1, 1]:.2f}, {beyond[7, 7]:.2f}",
    )
    for ax, values, title in zip(axes, (phi, chance, beyond), titles, strict=True):
        image = ax.pcolormesh(
            np.arange(columns + 1) + 0.5,
            np.arange(rows + 1) + 0.5,
            values,
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


def two_seeds(results=None):
    """φ(A, A′, n, n) of two seeds and of two Gaussian matrices against n, with both expectations as lines (LoRA's Figure 4)."""
    sizes = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    results = [directions.two_seeds(seed, sizes) for seed in SEEDS] if results is None else results
    figure, ax = canvas(5.6, 3.4)
    n = np.arange(1, 65)
    ax.plot(n, [directions.shared_only(k, k, 96, 2) for k in n], "-", color=COLOURS[0], lw=1.2)
    ax.plot(n, n / 96, "--", color="0.45", lw=1.2)
    for result in results:
        ax.plot(sizes, result["phi"], "o", color=COLOURS[0], ms=4.5, mec="white", mew=0.4)
        ax.plot(sizes, result["gaussian"], "s", color="0.45", ms=4, mec="white", mew=0.4)
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


def top_of_delta_in_w(results=None):
    """φ(ΔW's top 4, W₀'s top 10 %) by where ΔW was planted, beside chance and the paper's 0.2 (LoRA's Figure 8, H.3)."""
    results = results or [directions.top_of_delta_in_w(seed=seed) for seed in SEEDS]
    figure, ax = canvas(6.4, 2.8)
    places = {"weak": "weak directions of W₀", "random": "random directions", "top": "W₀'s top two directions"}
    y, chance = np.arange(len(places))[::-1], results[0]["chance"]
    for at, place in zip(y, places, strict=True):
        found = registry.values(results, place)
        ax.barh(at, found.mean(), height=0.55, color="#b8c4d6")
        ax.plot(found, [at] * len(found), "o", color="0.25", ms=3.5)
        ax.annotate(f"{found.mean():.3f}", (found.max(), at), (7, -3), color="0.3", **SMALL)
    ax.axvline(chance, color=COLOURS[2], lw=1.2)
    ax.annotate("chance", (chance, 2.7), (4, 0), color=COLOURS[2], **SMALL)
    ax.axvline(0.2, color="0.45", lw=1.2, ls="--")
    ax.annotate("the paper's 0.2", (0.2, 2.42), (4, 0), color="0.35", **SMALL)
    ax.set_yticks(y, [f"ΔW planted in\n{label}" for label in places.values()])
    ax.set(xlabel="φ(ΔW, W₀, 4, 10 of 96)", xlim=(0, 0.75), ylim=(-0.5, 2.95))
    ax.set_title(f"Chance is {chance:.3f}; the paper's 0.2 is {0.2 / chance:.1f} times that", fontsize=10)
    return figure


def amplification(results=None):
    """‖UᵀW₀V‖ by r with U, V of W₀, of two learned ΔW and of random matrices: Table 7 with its random column predicted (lines)."""
    results = [directions.amplification(seed) for seed in SEEDS] if results is None else results
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
        rows = registry.values(results, key)
        at = x + 0.2 * (k - 1.5)
        left.bar(at, rows.mean(axis=0), 0.19, color=colour, hatch=hatch, edgecolor="white", lw=0.5, label=label)
        for row in rows:
            left.plot(at, row, ".", color="black", ms=3.5)
    predicted = registry.values(results, "predicted").mean(axis=0)
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
        rows = registry.values(results, key)
        right.plot(x, rows.mean(axis=0), mark, color=colour, lw=1.6, ms=5)
        for row in rows:
            right.plot(x, row, mark[0], color=colour, ms=3, alpha=0.5)
        right.annotate(label, (x[1] - (key == "weak"), rows.mean(axis=0)[1]), shift, color=colour, **SMALL)
    right.axhline(1, color="0.6", lw=0.9, ls=":")
    right.set(yscale="log", ylim=(0.2, 60), ylabel="amplification ‖ΔW‖ / ‖UᵀW₀V‖", xlim=(-0.3, 2.4))
    right.set_yticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
    right.minorticks_off()
    right.set_xticks(x, [f"r = {r}" for r in ranks])
    weak, random = (registry.values(results, key)[:, 1].mean() for key in ("weak", "random"))
    right.set_title(f"ΔW at r = 4: {weak:.1f} in weak, {random:.1f} in random", fontsize=10)
    return figure


def intrinsic_dimension(results=None):
    """Accuracy on unseen data against the number d of random directions trained, from three starts, with d90 (experiment of that name)."""
    results = [directions.intrinsic_dimension(seed) for seed in SEEDS] if results is None else results
    figure, ax = canvas(5.8, 3.6)
    d = np.array(results[0]["dimensions"])
    lines = []
    for name, label, colour, mark in (
        ("random", "random start", "0.35", "o-"),
        ("head", "pre-trained body, new head", COLOURS[0], "s--"),
        ("near", "pre-trained on a nearby task", COLOURS[2], "^:"),
    ):
        rows = registry.values(results, name)
        d90 = registry.values(results, f"d90_{name}").mean()
        (line,) = ax.plot(d, rows.mean(axis=0), mark, color=colour, lw=1.6, ms=5)
        lines.append((line, f"{label}: d90 = {d90:.0f}"))
        ax.fill_between(d, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.13, lw=0)
    full = np.mean([registry.values(results, f"full_{n}").mean() for n in ("random", "head", "near")])
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
        f"From a random start d90 is {registry.values(results, 'd90_random').mean():.0f} of {weights:,.0f}", fontsize=10
    )
    return figure
