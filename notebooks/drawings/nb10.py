"""The figure of notebook 10: how much of an update arrives in a stored weight."""

from tinylora.figures.style import COLOURS, SMALL, canvas


def what_arrives(curves):
    """The share of ΔW that arrives against ‖ΔW‖/‖W₀‖, one curve for each format.

    curves    {name: (sizes, shares, the size at which half arrives)}, in the order float32, bfloat16, NF4
    """
    figure, ax = canvas(7.4, 3.6)
    styles = (("o", "-", COLOURS[0]), ("s", "--", COLOURS[1]), ("^", "-", COLOURS[2]))
    ax.axhline(50, color="0.75", lw=0.8, zorder=0)
    for (name, (sizes, shares, half)), (mark, line, colour) in zip(curves.items(), styles, strict=True):
        ax.plot(sizes, 100 * shares, mark + line, color=colour, lw=1.3, ms=4.5)
        ax.plot([half], [50], mark, color=colour, mfc="white", ms=8, mew=1.4)
        ax.annotate(f"{name}\nhalf at {half:.2g}", (half, 50), (-8, 8), ha="right", color=colour, **SMALL)
    ax.set(xscale="log", xlabel="‖ΔW‖ / ‖W₀‖", ylabel="share of ΔW that arrives (per cent)", ylim=(-4, 108))
    nf4, bf16 = (100 * curves[name][2] for name in ("NF4", "bfloat16"))
    ax.set_title(
        f"Half of ΔW arrives from {nf4:.1f} % of ‖W₀‖ on in NF4, and from {bf16:.2f} % on in bfloat16", fontsize=10
    )
    return figure
