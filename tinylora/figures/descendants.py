"""Figures on LoRA's descendants: starts beside a quantized weight, the first step, rates, ranks, magnitudes, entropy, forgetting.

Each takes an experiment's results, a dict a seed (see `experiments.descendants`), and runs it with seeds 0, 1, 2 if not given.
"""

import numpy as np

from ..experiments import descendants, registry
from .style import COLOURS, canvas

SMALL = {"textcoords": "offset points", "fontsize": 8.5}
SEEDS = (0, 1, 2)
PALE = "#b8c4d6"


def _results(given, function):
    return [function(seed=seed) for seed in SEEDS] if given is None else given


def _bars(ax, at, results, keys, colours, form="{:.2f}", width=0.62):
    """One bar a key with its mean written above, and a dot a seed."""
    for x, key, colour in zip(at, keys, colours, strict=True):
        found = registry.values(results, key)
        ax.bar(x, found.mean(), width, color=colour)
        ax.plot([x] * len(found), found, "o", color="0.2", ms=3, mec="white", mew=0.4)
        label = form.format(found.mean())
        ax.annotate(label, (x, max(found.max(), found.mean())), (0, 4), ha="center", color="0.25", **SMALL)


def quantization_starts(results=None):
    """‖Q + s B A − W‖ / ‖W‖ of NF4 alone, PiSSA, LoftQ in 1 and 5 steps, on three kinds of W (experiment `quantized_starts`)."""
    results = _results(results, descendants.quantized_starts)
    figure, axes = canvas(9, 3.5, ncols=3, sharey=True)
    kinds = {
        "gauss": "Gaussian, a flat spectrum",
        "power": "singular values $i^{-0.7}$",
        "outliers": "Gaussian, 4 columns × 10",
    }
    starts = {"nf4": "NF4\nalone", "pissa": "PiSSA", "loftq_1": "LoftQ\n1 step", "loftq_5": "LoftQ\n5 steps"}
    for ax, (kind, title) in zip(axes, kinds.items(), strict=True):
        keys = [f"{kind}_{name}" for name in starts]
        means = [registry.values(results, key).mean() for key in keys]
        best = int(np.argmin(means))
        colours = ["0.75" if i == 0 else COLOURS[2] if i == best else PALE for i in range(len(keys))]
        _bars(ax, range(len(keys)), results, keys, colours, "{:.3f}")
        name = list(starts.values())[best].replace("\n", " in ")
        ax.set_title(f"{title}:\n{name}, {means[best] / means[0]:.2f} of NF4's error", fontsize=10)
        ax.set_xticks(range(len(keys)), starts.values(), fontsize=9)
    axes[0].set(ylabel="relative error at the start, r = 16", ylim=(0, 0.163))
    return figure


def which_start(laws, matrices):
    """Error at the start over NF4's, against p, the share of ‖W‖² in W's top r directions, with PiSSA's √(1 − p) as a line.

    laws, matrices    lists of dicts with the keys share, pissa, loftq_1, loftq_5: of power-law spectra, and of a model's weights
    """
    figure, ax = canvas(7.2, 3.7)
    p = np.linspace(0, 0.97, 200)
    ax.plot(p, np.sqrt(1 - p), "-", color="0.5", lw=1.2, zorder=1)
    styles = (("pissa", COLOURS[2], "o"), ("loftq_1", COLOURS[0], "s"), ("loftq_5", COLOURS[1], "^"))
    for key, colour, mark in styles:
        for rows, face, size in ((laws, colour, 5), (matrices, "none", 4.5)):
            x, y = registry.values(rows, "share"), registry.values(rows, key)
            ax.plot(x, y, mark, color=colour, mfc=face, ms=size, mew=0.9, alpha=1 if rows is laws else 0.75)
    share, one, five = (registry.values(laws, key) for key in ("share", "loftq_1", "loftq_5"))
    ax.plot(share, one, "-", color=COLOURS[0], lw=1)
    ax.plot(share, five, "-", color=COLOURS[1], lw=1)
    ax.annotate("PiSSA; line: √(1 − p)", (0.66, np.sqrt(0.34)), (9, 3), color=COLOURS[2], **SMALL)
    ax.annotate("LoftQ, 1 step", (share[-4], one[-4]), (-8, 8), color=COLOURS[0], **SMALL)
    ax.annotate("LoftQ, 5 steps", (share[-4], five[-4]), (-14, -16), color=COLOURS[1], **SMALL)
    ax.text(
        0.03, 0.06, "filled: power laws\nhollow: the base model", transform=ax.transAxes, fontsize=8.5, color="0.35"
    )
    ax.set(
        xlabel="p, the share of ‖W‖² in its top r directions", ylabel="error at the start / NF4's error", xlim=(0, 0.96)
    )
    ax.set_ylim(0.2, 1.02)
    crossings = [1 - np.mean(y[:4]) ** 2 for y in (one, five)]
    ax.set_title(
        "On the power laws PiSSA is ahead of one step from p = {:.2f} on, of five from {:.2f} on".format(*crossings),
        fontsize=10,
    )
    return figure


def aligned_first_step(results=None):
    """The cosine of the first step with −G after LoRA, PEFT's LoRA-GA, LoRA-GA; the best of rank 2r (`aligned_first_step`)."""
    results = _results(results, descendants.aligned_first_step)
    figure, ax = canvas(5.4, 3)
    for x, (key, colour) in enumerate((("lora", PALE), ("peft", PALE), ("lora_ga", COLOURS[2]))):
        found = registry.values(results, key)
        ax.bar(x, found.mean(), 0.55, color=colour)
        ax.annotate(
            f"{found.mean():.3f}", (x, found.mean()), (0, -13), ha="center", color="k" if x < 2 else "w", **SMALL
        )
    bound = registry.values(results, "bound").mean()
    ax.axhline(bound, color="0.3", lw=1, ls="--", zorder=0)
    ax.annotate(f"best of rank 2r: {bound:.3f}", (-0.28, bound), (0, 4), color="0.3", **SMALL)
    ax.set_xticks(range(3), ("LoRA", "LoRA-GA as\nin PEFT", "LoRA-GA"))
    ax.set(ylabel="cosine of the first step with −G", ylim=(0, 1.08))
    ga, lora = (registry.values(results, key).mean() for key in ("lora_ga", "lora"))
    ax.set_title(f"The first step: cosine {ga:.2f} after LoRA-GA, {lora:.2f} after LoRA", fontsize=10)
    return figure


def rate_ratio(results=None):
    """The error left after tuning η_A for λ = 1, 4, 16 at α = 4, and for λ = 1 at α = 64, at two widths (experiment `lora_plus_ratio`)."""
    results = _results(results, descendants.lora_plus_ratio)
    figure, ax = canvas(6.2, 3.4)
    gain = []
    for width, colour, mark, shift in ((32, COLOURS[0], "o", -0.05), (128, COLOURS[2], "s", 0.05)):
        keys = [f"width_{width}_{key}" for key in ("ratio_1", "ratio_4", "ratio_16", "alpha_64")]
        rows = np.array([registry.values(results, key) for key in keys])
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


def rank_allocation(results=None):
    """What AdaLoRA gives two layers planted with ranks 1 and 6, and the error beside uniform LoRA's (experiment `adalora_allocation`)."""
    results = _results(results, descendants.adalora_allocation)
    figure, (left, right) = canvas(6.6, 3, ncols=2, width_ratios=(1.5, 1))
    _bars(left, (0, 2), results, ("rank_one", "rank_two"), (COLOURS[2],) * 2, "{:.0f}", 0.7)
    left.bar((0.8, 2.8), (3, 4), 0.7, color=PALE)
    for x, r in ((0.8, 3), (2.8, 4)):
        left.annotate(str(r), (x, r), (0, 4), ha="center", color="0.25", **SMALL)
    left.annotate("AdaLoRA", (0, 1), (0, 16), ha="center", color=COLOURS[2], **SMALL)
    left.annotate("LoRA", (0.8, 3), (0, 16), ha="center", color="0.4", **SMALL)
    left.set_xticks((0.4, 2.4), ("planted rank 1", "planted rank 6"))
    left.set(ylabel="rank given, of 7", ylim=(0, 7.2))
    _bars(right, (0, 1), results, ("error", "error_lora"), (COLOURS[2], PALE), "{:.3f}", 0.55)
    right.set_xticks((0, 1), ("AdaLoRA", "LoRA, 3 and 4"))
    right.set(ylabel="‖ΔW − ΔW*‖ / ‖ΔW*‖", ylim=(0, 0.47), xlim=(-0.5, 1.5))
    one, two, error, uniform = (
        registry.values(results, key).mean() for key in ("rank_one", "rank_two", "error", "error_lora")
    )
    figure.suptitle(
        f"Planted 1 and 6, given {one:.0f} and {two:.0f}: error {error:.2f}, not {uniform:.2f}", fontsize=10
    )
    return figure


def magnitude_and_direction(results=None):
    """The correlation of ΔM and ΔD for full fine-tuning, LoRA and DoRA, over rows and over columns, beside DoRA's published ones."""
    results = _results(results, descendants.magnitude_and_direction)
    figure, ax = canvas(5.8, 3.2)
    published = {"lora": 0.83, "dora": -0.31, "full": -0.62}
    for x, kind in enumerate(published):
        for axis, shift, colour, mark in (("rows", -0.12, COLOURS[0], "o"), ("columns", 0.12, COLOURS[1], "s")):
            found = registry.values(results, f"{kind}_{axis}")
            ax.plot([x + shift] * len(found), found, mark, color=colour, ms=5, mec="white", mew=0.4)
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
    lora, dora, full = (registry.values(results, f"{kind}_rows").mean() for kind in ("lora", "dora", "full"))
    title = f"Mean over rows: LoRA {lora:+.2f}, DoRA {dora:+.2f}, full {full:+.2f}; dots: seeds"
    ax.set_title(title.replace("-", "−"), fontsize=10)
    return figure


def entropy_and_error(results=None):
    """The mean entropy of a block and the squared error for τ = 0, the median, and τ* (experiment `calibrated_entropy`)."""
    results = _results(results, descendants.calibrated_entropy)
    figure, (left, right) = canvas(7, 3, ncols=2)
    keys, labels = ("nf4", "median", "best"), ("τ = 0\n(NF4)", "τ = median", "τ* (ICQ)")
    unit = [result | {"error_nf4": 1.0} for result in results]
    for ax, what, low, high in ((left, "entropy", 3.66, 3.78), (right, "error", 0.94, 1.06)):
        for x, key in enumerate(keys):
            found, colour = registry.values(unit, f"{what}_{key}"), COLOURS[2] if key == "best" else "0.45"
            ax.plot([x - 0.22, x + 0.22], [found.mean()] * 2, "-", color=colour, lw=2.2)
            ax.plot([x] * len(found), found, "o", color=colour, ms=4, mec="white", mew=0.4)
            ax.annotate(f"{found.mean():.3f}", (x + 0.22, found.mean()), (3, -3), color=colour, **SMALL)
        ax.set(ylim=(low, high), xlim=(-0.5, 2.75))
        ax.set_xticks(range(3), labels)
    left.set_ylabel("entropy of a block of 64 (bits)")
    right.set_ylabel("squared error / NF4's")
    rise = (registry.values(results, "entropy_best") - registry.values(results, "entropy_nf4")).mean()
    error = registry.values(results, "error_best").mean()
    figure.suptitle(f"ICQ: {rise:+.2f} bits of entropy, {error:.3f} times the error; dots: seeds", fontsize=10)
    return figure


def learning_and_forgetting(results=None):
    """Accuracy learned, old task kept by LoRA minus full fine-tuning at equal learning, rank of the update (`learns_less_forgets_less`)."""
    results = _results(results, descendants.learns_less_forgets_less)
    figure, axes = canvas(8.4, 3.2, ncols=3, width_ratios=(1.3, 1, 1.3))
    _bars(axes[0], range(2), results, ("learned_full", "learned_lora"), (PALE, COLOURS[2]), "{:.3f}", 0.55)
    axes[0].set(ylabel="accuracy on the new task", ylim=(0, 0.85))
    kept = registry.values(results, "kept_more")
    axes[1].bar(0, kept.mean(), 0.55, color=COLOURS[2])
    axes[1].plot([0] * len(kept), kept, "o", color="0.2", ms=3.5, mec="white", mew=0.4)
    axes[1].axhline(0, color="0.4", lw=0.9)
    axes[1].set(ylabel="old task kept, LoRA − full", ylim=(-0.12, 0.03), xlim=(-0.7, 0.7))
    axes[1].set_xticks([0], ["at equal\nlearning"])
    axes[1].annotate("forgets less", (0, 0.014), (0, -3), ha="center", color="0.4", **SMALL)
    _bars(axes[2], range(2), results, ("rank_full", "rank_lora"), (PALE, COLOURS[2]), "{:.1f}", 0.55)
    axes[2].set(ylabel="rank for 90 % of ‖ΔW‖²", ylim=(0, 13))
    for ax in (axes[0], axes[2]):
        ax.set_xticks(range(2), ("full", "LoRA, r = 4"))
    ratio = (registry.values(results, "rank_full") / registry.values(results, "rank_lora")).mean()
    less = (registry.values(results, "learned_full") - registry.values(results, "learned_lora")).mean()
    title = f"LoRA learns {less:.3f} less, keeps {kept.mean():+.3f} at equal learning; ranks differ {ratio:.1f} times"
    figure.suptitle(title.replace("-", "−"), fontsize=10)
    return figure
