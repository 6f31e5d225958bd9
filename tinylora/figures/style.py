"""The house's style: canvases without pyplot, and files that come out equal when the figure is equal."""

import io
from pathlib import Path

import numpy as np

from ..costs.tables import printable
from ..models import files

COLOURS = ("#4c72b0", "#55a868", "#c44e52", "#dd8452", "#8172b3", "#937860")

SMALL = {"textcoords": "offset points", "fontsize": 8.5}


def require_matplotlib():
    """The matplotlib module; a sentence if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("figures need matplotlib: pip install -e '.[notebooks]' in a clone of tinylora") from None
    return matplotlib


def canvas(width, height, **layout):
    """(figure, axes) of the house's style, apart from pyplot: no window, and no effect on a notebook's other figures.

    The figure shows itself where it is a notebook cell's last value, whichever backend is active.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self):
            png = io.BytesIO()
            self.savefig(png, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
            return png.getvalue()

    figure = Picture(figsize=(width, height), layout="constrained" if "gridspec_kw" not in layout else None)
    axes = figure.subplots(**layout)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return figure, axes


def label(name):
    """A name out of a file as matplotlib's text: printable, short, and no formula where it holds a $."""
    return printable(name, word=60, most=80).replace("$", r"\$")


def check_format(path):
    """ValueError if figures cannot be written in the format that the path's ending names; without an ending it is SVG."""
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if (ending := Path(path).suffix[1:].lower() or "svg") not in formats:
        raise ValueError(f"{path}: no figure is written as .{ending}; expected one of {', '.join(sorted(formats))}")


def save(figure, path, mode=None):
    """Write the figure as SVG, atomically and without a date, so that equal figures are equal files. See `files.atomic` for mode."""
    with require_matplotlib().rc_context({"svg.hashsalt": "tinylora"}), files.atomic(path, mode) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "svg", bbox_inches="tight", metadata={"Date": None})


def log_ticks(ax, ticks, axis="x"):
    """Ticks at these whole numbers on a logarithmic axis, and nowhere else."""
    labels = [f"{t:g}" for t in ticks]
    ax.set_xticks(ticks, labels) if axis == "x" else ax.set_yticks(ticks, labels)
    (ax.xaxis if axis == "x" else ax.yaxis).minorticks_off()
