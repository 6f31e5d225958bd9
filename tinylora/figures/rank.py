"""Figures on rank: how much is enough, with a planted update, with few examples, and on the embedded model."""

import numpy as np

from ..experiments import planted, registry
from .style import COLOURS, canvas

SMALL = {"textcoords": "offset points", "fontsize": 8.5}
SEEDS = (0, 1, 2)


def _results(given, function):
    return [function(seed=seed) for seed in SEEDS] if given is None else given


def _log_ticks(ax, ticks, axis="x"):
    """Ticks at these whole numbers on a logarithmic axis, and nowhere else."""
    labels = [f"{t:g}" for t in ticks]
    ax.set_xticks(ticks, labels) if axis == "x" else ax.set_yticks(ticks, labels)
    (ax.xaxis if axis == "x" else ax.yaxis).minorticks_off()


def rank_sweep(low=None, full=None):
    """The error on unseen data against r: a planted rank 2 (left) and a full-rank update (right), with Eckart and Young's bound as lines.

    low, full    results of the experiments `rank_sweep` and `full_rank_target`, a dict a seed; run with seeds 0, 1, 2 if not given
    """
    low, full = _results(low, planted.rank_sweep), _results(full, planted.full_rank_target)
    figure, axes = canvas(8, 3.5, ncols=2, sharey=True)
    for ax, results, colour in zip(axes, (low, full), (COLOURS[0], COLOURS[2]), strict=True):
        ranks, mse = results[0]["ranks"], registry.values(results, "mse")
        tail = registry.values(results, "tail")
        ax.plot(ranks, tail.mean(axis=0), "-", color="0.45", lw=1.3, zorder=1)
        for seed, row in enumerate(mse):
            ax.plot(np.array(ranks) * 1.05 ** (seed - 1), row, "o", color=colour, ms=4, mec="white", mew=0.4)
        ax.axhline(0.05**2, color="0.6", lw=0.9, ls=":", zorder=0)
        ax.set(xscale="log", yscale="log", xlabel="rank r of the adapter", ylim=(0.0018, 0.3))
        _log_ticks(ax, ranks)
    axes[0].set_ylabel("mean squared error on unseen data")
    _log_ticks(axes[0], (0.0025, 0.01, 0.03, 0.1, 0.3), "y")
    one, two = registry.values(low, "mse")[:, 0].mean(), registry.values(low, "mse")[:, 1:].mean()
    axes[0].annotate("noise floor σ² = 0.0025", (11, 0.0025), (0, -12), color="0.35", **SMALL)
    axes[0].annotate(
        "line: least possible\nof any update of rank r\ndots: LoRA, 3 seeds",
        (1.75, 0.03),
        (12, 8),
        color="0.3",
        **SMALL,
    )
    axes[0].set_title(f"ΔW of rank 2: {one:.4f} at r = 1, then {two:.4f}", fontsize=10)
    eight = full[0]["ranks"].index(8)
    at8 = registry.values(full, "mse")[:, eight].mean()
    axes[1].annotate(f"r = 8: {at8:.3f}, {at8 / 0.0025:.0f} σ²", (8, at8), (6, 6), color=COLOURS[2], **SMALL)
    axes[1].set_title("ΔW of full rank, same size: no plateau", fontsize=10)
    return figure


def rank_one_to_d(results=None):
    """The error above the noise against r = 1 … d with fixed hyper-parameters, scarce and ample data (experiment `table18_shape`)."""
    results = _results(results, planted.table18_shape)
    figure, ax = canvas(5.6, 3.4)
    ranks = np.array(results[0]["ranks"])
    for key, colour, mark, label in (
        ("scarce", COLOURS[2], "o-", "1,024 examples"),
        ("ample", COLOURS[0], "s--", "16,384 examples"),
    ):
        rows = 1000 * registry.values(results, key)
        ax.plot(ranks, rows.mean(axis=0), mark, color=colour, lw=1.5, ms=4.5)
        ax.fill_between(ranks, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.25, lw=0)
        ax.annotate(
            label,
            (ranks[4], rows.mean(axis=0)[4]),
            (14, 26) if key == "scarce" else (-6, -9),
            color=colour,
            ha="left" if key == "scarce" else "right",
            **SMALL,
        )
    mean = registry.values(results, "scarce").mean(axis=0)
    least = int(mean.argmin())
    ax.annotate(
        f"least at r = {ranks[least]}",
        (ranks[least], 1000 * mean[least]),
        (4, -13),
        color=COLOURS[2],
        **SMALL,
    )
    ax.set(xscale="log", yscale="log", xlabel="rank r of the adapter (d = 96)", ylabel="error above the noise (10⁻³)")
    ax.set_ylim(2.5, 90)
    _log_ticks(ax, ranks)
    _log_ticks(ax, (3, 10, 30), "y")
    rise = registry.values(results, "rise_scarce").mean()
    ax.set_title(f"With few examples r = d has {rise:.2f} times the least error", fontsize=10)
    return figure


def low_data(results=None):
    """LoRA r = 2 and full fine-tuning against the number of examples, with a rank-2 and with a full-rank ΔW (experiment `low_data`)."""
    results = _results(results, planted.low_data)
    figure, axes = canvas(8, 3.5, ncols=2, sharey=True)
    sizes = np.array(results[0]["sizes"])
    panels = (("lora", "full", "ΔW of rank 2"), ("lora_full_rank", "full_full_rank", "ΔW of full rank"))
    for ax, (lora, full, what) in zip(axes, panels, strict=True):
        for key, colour, mark in ((lora, COLOURS[0], "o-"), (full, COLOURS[2], "s--")):
            rows = registry.values(results, key)
            ax.plot(sizes, rows.mean(axis=0), mark, color=colour, lw=1.6, ms=4.5)
            ax.fill_between(sizes, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.2, lw=0)
        untrained = registry.values(results, "untrained").mean()
        ax.axhline(untrained, color="0.5", lw=0.9, ls=":", zorder=0)
        ax.axvline(96, color="0.75", lw=0.9, zorder=0)
        ax.set(xscale="log", yscale="log", xlabel="examples n", ylim=(0.0018, 0.45))
        _log_ticks(ax, sizes)
        ratio = registry.values(results, full).mean(axis=0) / registry.values(results, lora).mean(axis=0)
        best = int(ratio.argmax())
        ax.set_title(f"{what}: full / LoRA up to {ratio[best]:.2g} (n = {sizes[best]})", fontsize=10)
    _log_ticks(axes[0], (0.0025, 0.01, 0.03, 0.1, 0.3), "y")
    axes[0].set_ylabel("mean squared error on unseen data")
    axes[0].annotate("untrained", (sizes[-1], untrained), (0, 3), ha="right", color="0.4", **SMALL)
    axes[0].text(96, 0.96, " n = d", transform=axes[0].get_xaxis_transform(), fontsize=8.5, color="0.45", va="top")
    at = list(sizes).index(192)
    middle = {key: registry.values(results, key).mean(axis=0)[at] for panel in panels for key in panel[:2]}
    axes[0].annotate("full fine-tuning", (192, middle["full"]), (6, 4), color=COLOURS[2], **SMALL)
    axes[0].annotate("LoRA, r = 2", (192, middle["lora"]), (-4, -3), ha="right", va="top", color=COLOURS[0], **SMALL)
    axes[1].annotate("full fine-tuning", (192, middle["full_full_rank"]), (7, 3), color=COLOURS[2], **SMALL)
    axes[1].annotate("LoRA, r = 2", (192, middle["lora_full_rank"]), (0, -12), color=COLOURS[0], **SMALL)
    return figure


def weight_types(results=None):
    """The error left for each placement of 8 ranks (Table 5's columns), by where the change was (experiment `weight_types`)."""
    results = _results(results, planted.weight_types)
    titles = {
        "spread": "changed: q, v, o (rank 2 each)",
        "one": "changed: v (rank 8)",
        "everywhere": "changed: all four, fully",
    }
    figure, axes = canvas(9, 3.3, ncols=3, sharey=True)
    choices = results[0]["choices"]
    y = np.arange(len(choices))[::-1]
    for ax, (plant, title) in zip(axes, titles.items(), strict=True):
        found = registry.values(results, plant)
        mean, best = found.mean(axis=0), int(found.mean(axis=0).argmin())
        ax.barh(y, mean, height=0.6, color=[COLOURS[2] if i == best else "#b8c4d6" for i in range(len(y))])
        for row in found:
            ax.plot(row, y, "o", color="0.25", ms=3)
        for at, value in zip(y, mean, strict=True):
            ax.annotate(f"{value:.3f}", (max(found.max(), 0.9), at), (6, -3), color="0.3", **SMALL)
        ax.set(xlim=(0, 1.2), xlabel="error left, part of the untrained")
        ax.set_title(f"{title}\nbest: {choices[best]}", fontsize=9.5)
    axes[0].set_yticks(y, choices)
    return figure


def rank_table(results):
    """Held-out bits per byte against r for each set of target layers, seeds as dots and their means as lines.

    results    {(targets, r): [bits per byte of each seed]}, for example ("q_proj, v_proj", 8); ValueError if it is empty
    """
    if not results:
        raise ValueError("rank_table: no results; expected {(targets, r): [bits per byte of each seed]}")
    figure, ax = canvas(5.6, 3.5)
    every = sorted({r for _, r in results})
    lines = {}
    for place, targets in enumerate(dict.fromkeys(targets for targets, _ in results)):
        colour, mark = COLOURS[(0, 2, 1, 3, 4)[place % 5]], ("o-", "s--", "^:", "d-.")[place % 4]
        ranks = sorted(r for t, r in results if t == targets)
        means = [float(np.mean(results[targets, r])) for r in ranks]
        shift = 1.03 ** (1 if place else -1)
        for r in ranks:
            dots = results[targets, r]
            ax.plot([r * shift] * len(dots), dots, mark[0], color=colour, ms=4, mec="white", mew=0.4, zorder=3)
        ax.plot(np.array(ranks) * shift, means, mark[1:], color=colour, lw=1.5)
        ax.annotate(targets, (ranks[-1], means[-1]), (0, 9), ha="right", color=colour, **SMALL)
        lines[targets] = (ranks, means)
    ax.set(xscale="log", xlabel="rank r of the adapters", ylabel="held-out bits per byte")
    _log_ticks(ax, every)
    ax.margins(y=0.16)
    seeds = max(map(len, results.values()))
    gains = "; ".join(f"{means[0] - means[-1]:+.3f} ({targets})" for targets, (_, means) in lines.items())
    ax.set_title(f"Bits gained from r = {every[0]} to {every[-1]}: {gains}", fontsize=10)
    ax.text(0.01, 0.02, f"dots: {seeds} seeds; line: mean", transform=ax.transAxes, fontsize=8.5, color="0.35")
    return figure
