"""Figure of notebook 11: every number of the LoRA paper that arithmetic can reach, printed against recomputed."""

from collections import Counter

from tinylora.figures.style import COLOURS, canvas
from tinylora.papers.lora_numbers import audit
from tinylora.papers.verdict import FAILS, parse

_MARKS = {FAILS: (COLOURS[2], "s", 5.5), "truncated": (COLOURS[3], "v", 5.5), "roughly": ("0.35", "o", 4.5)}
#: (place, model, method) of some rows that do not follow: text, offset in points, alignment. Of several such rows the first.
_LABELS = {
    ("Table 2", "RoBERTa large", "Adapter^P"): ("Adapter^P, Adapter^H: 2²⁰", (8, 6), "center"),
    ("Table 2", "DeBERTa XXL", "LoRA"): ("DeBERTa: r = 16, not 8", (-7, -3), "right"),
    ("Table 3", "GPT-2 M", "LoRA"): ("LoRA, 0.35M", (7, -4), "left"),
    ("Table 3", "GPT-2 L", "LoRA"): ("LoRA, 0.77M", (-6, 3), "right"),
    ("Table 4", "GPT-3", "BitFit"): ("BitFit: 12 d, not 11 d", (-4, 8), "left"),
    ("Table 4", "GPT-3", "PreLayer"): ("PreLayer", (6, -3), "left"),
    ("D.4", "GPT-3", "LoRA"): ("D.4: r = 4, not 2", (7, -3), "left"),
    ("Table 13", "GPT-2 M", "FT^Top2"): ("FT^Top2: 2²⁰", (4, -13), "right"),
    ("Table 15", "GPT-3", "PrefixLayer"): ("PrefixLayer, 5 rows", (-3, 8), "left"),
    ("Table 15", "GPT-3", "LoRA"): ("603.8M is 2 × 301.9M", (14, -62), "right"),
    ("Table 15", "GPT-3", "LoRA+PL"): ("LoRA+PL", (-6, 3), "right"),
}


def printed_against_recomputed():
    """Printed over recomputed, in per cent above or below 1, of `lora_numbers.audit`'s rows in the paper's order.

    Bars are what rounding to the printed digits allows; what lies outside its bar is truncated (triangle) or does not
    follow (square). The axis is symmetric-logarithmic: linear within ± 0.1 %, logarithmic outside.
    """
    rows = audit()
    counts = Counter(r.verdict for r in rows)
    rows = [r for r in rows if r.computed is not None]
    off = [100 * (r.value / r.computed - 1) for r in rows]
    figure, ax = canvas(9, 4.7)
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    labels = dict(_LABELS)
    for x, (r, y) in enumerate(zip(rows, off, strict=True)):
        allowed = 50 * parse(r.printed)[1] / r.computed
        ax.plot([x, x], [-allowed, allowed], color="0.9", lw=3, solid_capstyle="butt", zorder=1)
        colour, mark, size = _MARKS.get(r.verdict, ("0.35", "o", 3.5))
        face = "white" if r.verdict == "roughly" else colour
        ax.plot(x, y, mark, color=face, ms=size, mec=colour if face == "white" else "white", mew=0.7, zorder=3)
        if r.verdict == FAILS and (r.where, r.model, r.method) in labels:
            text, offset, side = labels.pop((r.where, r.model, r.method))
            line = {"arrowstyle": "-", "color": COLOURS[2], "lw": 0.6} if offset[1] < -30 else None
            style = {"fontsize": 8, "color": COLOURS[2], "zorder": 2, "bbox": {"fc": "white", "ec": "none", "pad": 0.4}}
            ax.annotate(text, (x, y), offset, textcoords="offset points", ha=side, arrowprops=line, **style)
    places = ["§2, §4.2" if r.where in ("Abstract", "§2", "§4.2") or "Foot" in r.where else r.where for r in rows]
    places = ["§7.3" if p == "H.4" else p for p in places]
    for place in dict.fromkeys(places):
        at = [x for x, p in enumerate(places) if p == place]
        if at[0]:
            ax.axvline(at[0] - 0.5, color="0.85", lw=0.8, zorder=0)
        name = place.replace("Table ", "T") if len(at) < 9 else place
        ax.text(
            (at[0] + at[-1]) / 2, 0.01, name, transform=ax.get_xaxis_transform(), fontsize=8, ha="center", va="bottom"
        )
    ax.set_yscale("symlog", linthresh=0.1, linscale=0.6)
    ticks = (-10, -1, -0.1, 0, 0.1, 1, 10, 100)
    ax.set_yticks(ticks, [f"{t:+g} %".replace("-", "−") if t else "0" for t in ticks])
    ax.set(
        xticks=[],
        xlim=(-1.5, len(rows) + 0.5),
        ylim=(-60, 400),
        ylabel="printed / recomputed − 1\n(symmetric-log: linear within ± 0.1 %)",
    )
    ax.yaxis.minorticks_off()
    key = "bar: what rounding allows    ● matches or rounds to    ○ roughly    ▼ truncated    ■ does not follow"
    ax.text(0.5, 0.985, key, transform=ax.transAxes, fontsize=8, color="0.3", ha="center", va="top")
    agree = counts["match"] + counts["rounds to"]
    ax.set_title(
        f"{sum(counts.values())} numbers: {agree} match or round, {counts['truncated']} are truncated, "
        f"{counts['roughly']} roughly agree, {counts[FAILS]} do not follow, {counts['not derivable']} cannot be derived",
        fontsize=10,
    )
    return figure
