"""Figures on dynamics: the first step against r, two exchanges that change nothing, learning rates, and what merging loses."""

import numpy as np

from ..experiments import dynamics, registry
from .style import COLOURS, canvas

SMALL = {"textcoords": "offset points", "fontsize": 8.5}
SEEDS = (0, 1, 2)


def first_step(results=None):
    """⟨−ΔW₁, G⟩ and ‖ΔW₁‖ over their values at r = 1, for SGD and Adam and both scales; lines: the powers of r for r ≪ d."""
    results = [dynamics.first_step(seed) for seed in SEEDS] if results is None else results
    figure, axes = canvas(9.6, 3.8, ncols=2)
    ranks = np.array(results[0]["ranks"], float)
    runs = (  # key, label, powers of r of gain and size, colour, mark, where the labels go
        ("adam_rs", "Adam, α/√r", (0.5, 0), COLOURS[2], "s", ((-8, 8), (0, 9))),
        ("sgd_rs", "SGD, α/√r", (0, -0.5), COLOURS[0], "o", ((0, 7), (2, 18))),
        ("adam_r", "Adam, α/r", (0, -0.5), COLOURS[2], "D", ((0, -15), (-16, -14))),
        ("sgd_r", "SGD, α/r", (-1, -1.5), COLOURS[0], "v", ((-14, -4), (-14, -4))),
    )
    for ax, part, suffix in zip(axes, (0, 1), ("", "_size"), strict=True):
        for key, label, powers, colour, mark, shifts in runs:
            hollow = (
                {"mfc": "white", "mec": colour} if key[-2:] == "_r" else {"color": colour, "mec": "white", "mew": 0.4}
            )
            front = key in ("sgd_r", "adam_rs") or key == ("sgd_rs", "adam_r")[part]
            size = 6 if front else 8 + part
            ax.plot(ranks, ranks ** powers[part], "-" if key[-2:] == "rs" else "--", color=colour, lw=1.2, zorder=1)
            for result in results:
                ax.plot(ranks, result[key + suffix], mark, ms=size, ls="", zorder=3 if front else 2, **hollow)
            last = registry.values(results, key + suffix)[:, -1].mean()
            text = f"{label}: {last:.1g}" if last < 0.01 else f"{label}: {last:.3g}"
            ax.annotate(text, (ranks[-1], last), shifts[part], ha="right", color=colour, **SMALL)
        ax.set(xscale="log", yscale="log", xlabel="rank r", xlim=(0.85, 300))
        ax.set_xticks(ranks, [f"{r:g}" for r in ranks])
        ax.minorticks_off()
    left, right = axes
    left.set(ylabel="first step's gain ⟨−ΔW₁, G⟩, over that at r = 1", ylim=(0.002, 50))
    left.set_yticks([0.004, 0.02, 0.1, 1, 4, 16], ["0.004", "0.02", "0.1", "1", "4", "16"])
    left.set_title("Gain: under Adam flat with α/r", fontsize=10)
    right.set(ylabel="first step's size ‖ΔW₁‖, over that at r = 1", ylim=(1e-4, 5))
    right.set_yticks([0.001, 0.01, 0.1, 1], ["0.001", "0.01", "0.1", "1"])
    right.set_title("Size: under Adam flat with α/√r while r ≪ d", fontsize=10)
    right.text(1, 2e-4, "lines: powers of r, for r ≪ d", color="0.35", fontsize=8.5)
    return figure


def invariance(result=None):
    """Losses before and after the exchange with p = 4, q = 8 on each other, α/32 alone beside them; the relative difference for p = 3."""
    result = dynamics.invariance(0) if result is None else result
    figure, (left, right) = canvas(8.4, 3.4, ncols=2, width_ratios=(1.3, 1))
    steps = np.arange(len(result["curve"]))
    left.semilogy(steps, result["curve"], "-", color="0.75", lw=6, solid_capstyle="round")
    left.semilogy(steps, result["curve_powers"], "-", color=COLOURS[0], lw=1.5)
    left.semilogy(steps, result["curve_alone"], "--", color=COLOURS[2], lw=1.5)
    left.annotate("α/32 alone", (50, result["curve_alone"][-1]), (0, 17), ha="right", color=COLOURS[2], **SMALL)
    left.annotate("gray: α, A₀, η, η", (22, result["curve"][22]), (-12, -40), ha="right", color="0.35", **SMALL)
    left.annotate(
        "blue: α/32, 4 A₀, 4 η, 8 η", (22, result["curve"][22]), (-12, -54), ha="right", color=COLOURS[0], **SMALL
    )
    left.set(xlabel="step", ylabel="training loss (mean squared error)")
    left.set_title(
        f"p = 4, q = 8: {result['different_powers']:.0f} of {2 * len(steps)} losses differ in any bit", fontsize=10
    )
    difference = np.array(result["difference_three"])
    right.bar(steps, difference / 2**-52, color=COLOURS[1], width=0.8)
    right.set(
        xlabel="step", ylabel="relative difference (2⁻⁵² = 2.2e-16)", ylim=(0, 1.25 * max(difference.max() / 2**-52, 1))
    )
    right.set_title(f"p = 3, float64: at most {difference.max():.1e}", fontsize=10)
    return figure


def alpha_and_rate(result=None):
    """Loss curves of (α, 2 η), (4 α, A₀/2), (4 α) alone and (α, η): what "α is like the rate" takes to be exact."""
    result = dynamics.alpha_is_like_lr(0) if result is None else result
    figure, ax = canvas(5.6, 3.4)
    steps = np.arange(len(result["curve"]))
    ax.semilogy(steps, result["curve"], ":", color="0.4", lw=1.6, label="α, A₀, η")
    ax.semilogy(steps, result["curve_unscaled"], "--", color=COLOURS[2], lw=1.6, label="4 α, A₀, η")
    ax.semilogy(steps, result["curve_double_rate"], "-", color=COLOURS[0], lw=1.8, label="α, A₀, 2 η, and 4 α, A₀/2, η")
    ax.legend(frameon=False, fontsize=8.5)
    ax.set(xlabel="step", ylabel="training loss (mean squared error)")
    ax.set_title(
        f"With A₀/2: {result['different_scaled']:.0f} losses differ; without: up to {100 * result['largest_unscaled']:.0f} %",
        fontsize=10,
    )
    return figure


def learning_rates(results=None):
    """The error on unseen inputs against the learning rate, full fine-tuning and LoRA, with each one's best rate marked."""
    results = [dynamics.learning_rate_ratio(seed) for seed in SEEDS] if results is None else results
    figure, ax = canvas(6.2, 3.7)
    rates = np.array(results[0]["rates"])
    for key, label, colour, line, place in (
        ("full", "full fine-tuning", "0.35", "-", -9),
        ("r16", "LoRA r = 16, α = 32", COLOURS[0], "--", -7),
        ("r4", "r = 4, α = 32", COLOURS[2], "-.", 1),
        ("r4_alpha1", "r = 4, α = 1", COLOURS[3], ":", -3),
    ):
        mean = registry.values(results, key).mean(axis=0)
        best = int(mean.argmin())
        ax.plot(rates, mean, line, color=colour, lw=1.8)
        ax.plot(rates[best], mean[best], "o", color=colour, ms=6)
        ax.annotate(label, (rates[0], mean[0]), (-6, place), ha="right", color=colour, **SMALL)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="learning rate of AdamW",
        ylabel="error on unseen inputs,\nover the outputs' variance",
    )
    ax.set(xlim=(rates[0] / 8, rates[-1] * 1.1), ylim=(0.015, 1.3))
    ax.set_xticks(rates, [f"2$^{{{int(np.log2(r))}}}$" for r in rates])
    ax.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
    ax.minorticks_off()
    ratios = [registry.values(results, f"ratio_{k}").mean() for k in ("r4", "r16", "r4_alpha1")]
    ax.set_title(
        "Best rate over full fine-tuning's: {:.2g} (r = 4), {:.2g} (r = 16), {:.2g} (α = 1)".format(*ratios),
        fontsize=10,
    )
    return figure


def merge_ulps(results=None):
    """What (W₀ + ΔW) − ΔW misses of W₀ in units of its last place, by the size of ΔW; and the part restored exactly."""
    results = [dynamics.merge_restores(seed) for seed in SEEDS] if results is None else results
    figure, (left, right) = canvas(8.6, 3.5, ncols=2, width_ratios=(1.5, 1))
    labels = ("< −7", "−7 … −4", "−3, −2", "−1", "0", "1", "2, 3", "4 … 7", "> 7")
    sizes, ulps = results[0]["sizes"], 100 * registry.values(results, "ulps")
    shown = [i for i, s in enumerate(sizes) if s >= 0.1]
    x = np.arange(len(labels))
    for k, i in enumerate(shown):
        at = x + 0.27 * (k - (len(shown) - 1) / 2)
        colour, hatch = (COLOURS[0], COLOURS[3], "0.6")[k % 3], (None, "//", "xx")[k % 3]
        mean = ulps[:, i].mean(axis=0)
        left.bar(
            at, mean, 0.26, color=colour, hatch=hatch, edgecolor="white", lw=0.4, label=f"‖ΔW‖ = {sizes[i]:g} ‖W₀‖"
        )
        left.annotate(f"{mean[4]:.0f}", (at[4], mean[4]), (0, 2), ha="center", fontsize=8, textcoords="offset points")
    left.legend(frameon=False, fontsize=8.5, loc="upper left")
    left.set_xticks(x, labels, fontsize=8, rotation=30)
    left.set(
        xlabel="error after merging and unmerging, in units of W₀'s last place",
        ylabel="entries (per cent)",
        ylim=(0, 100),
    )
    largest = registry.values(results, "largest").max()
    left.set_title(f"float32, 256 × 256, r = 8: largest error {largest:.1e}", fontsize=10)
    for key, label, colour, mark, at, shift in (
        ("restored", "restored, float32", COLOURS[0], "o-", (0.011, 80), (0, 0)),
        ("restored_bfloat16", "restored, bfloat16", COLOURS[3], "s--", (0.1, 92), (0, 9)),
        ("lost_bfloat16", "bfloat16: not changed\nby merging at all", "0.45", "^:", (0.013, 22), (0, 0)),
    ):
        rows = 100 * registry.values(results, key)
        right.plot(sizes, rows.mean(axis=0), mark, color=colour, lw=1.5, ms=5)
        right.annotate(label, at, shift, color=colour, **SMALL)
    right.set(xscale="log", xlabel="‖ΔW‖ / ‖W₀‖", ylabel="entries (per cent)", ylim=(0, 108))
    right.set_xticks(sizes, [f"{s:g}" for s in sizes])
    right.minorticks_off()
    at = list(sizes).index(1.0)
    right.set_title(
        f"{100 * registry.values(results, 'restored')[:, at].mean():.0f} % restored at equal size", fontsize=10
    )
    return figure
