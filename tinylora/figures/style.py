"""The house's style: canvases without pyplot, and files that come out equal when the figure is equal.

A notebook's cell is wide, and panels stand beside each other in it. A file has one column, whose letters a phone of 390 pixels still shows
(`one_column`): panels stand below each other, and long titles have several lines. No figure needs its colours: lines and patches also
differ in their marks, dashes or patterns, or carry their names.
"""

import contextlib
import contextvars
import io
import re
import textwrap
from pathlib import Path

import numpy as np

from ..costs.tables import printable
from ..models import files

COLOURS = ("#4c72b0", "#55a868", "#c44e52", "#dd8452", "#8172b3", "#937860")

SMALL = {"textcoords": "offset points", "fontsize": 8.5}

COLUMN = 5.0  # inches, the width of a file's figure
SMALLEST, TITLE = 8.5, 10  # points, of any letter in a file, and of a title's
LETTERS = 52  # of a title's line
CONTRAST = 4.5  # of a letter and white paper, at least: WCAG 2's for small text
_NARROW = contextvars.ContextVar("narrow", default=False)


@contextlib.contextmanager
def one_column():
    """Figures whose canvas is made in this block have the width of a column, and their panels stand below each other."""
    before = _NARROW.set(True)
    try:
        yield
    finally:
        _NARROW.reset(before)


def narrow():
    """Whether the next canvas has the width of a column: what is written beside a panel in a notebook is then written in it."""
    return _NARROW.get()


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

    if narrow():
        width, height, layout = _stacked(width, height, layout)

    class Picture(Figure):
        def _repr_png_(self):
            png = io.BytesIO()
            self.savefig(png, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
            return png.getvalue()

    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.subplots(**layout)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return figure, axes


def _stacked(width, height, layout):
    """What `canvas` is told, for one column: panels that stood beside each other stand below each other, each with the height it had."""
    panels = layout.get("ncols", 1)
    kept = {k: v for k, v in layout.items() if k not in ("ncols", "width_ratios")}
    return COLUMN, height * panels, kept if panels == 1 else {**kept, "nrows": panels}


def _fit(figure):
    """Break the titles of a figure of one column into lines that fit, and set no letter smaller than SMALLEST or too light."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_fontsize(max(text.get_fontsize(), SMALLEST))
        text.set_color(_dark(text.get_color()))
    for ax in figure.axes:
        for loc in ("left", "center"):
            ax.set_title(_broken(ax.get_title(loc)), loc=loc, fontsize=TITLE)
        if not ax.get_ylabel():  # it stood on the panel to the left, which shares the axis
            ax.set_ylabel(
                next(iter(filter(None, (a.get_ylabel() for a in ax.get_shared_y_axes().get_siblings(ax)))), "")
            )
    if title := figure.get_suptitle():
        figure.suptitle(_broken(title), fontsize=TITLE)


def _dark(colour):
    """The colour, darker if it does not stand out from white paper by CONTRAST; white itself, which is written on bars, stays."""
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(colour))
    while CONTRAST * (luminance(rgb) + 0.05) > 1.05 and rgb.min() < 1:
        rgb = 0.97 * rgb
    return tuple(rgb)


def luminance(rgb):
    """The relative luminance of a colour, 0 to 1 (WCAG 2)."""
    linear = np.where(np.asarray(rgb) <= 0.04045, np.asarray(rgb) / 12.92, ((np.asarray(rgb) + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _broken(title):
    """A title in lines of about one length, broken after a semicolon or a colon if each part fits, and not beside ±, = and the like."""
    if max(map(len, title.split("\n"))) <= LETTERS:
        return title
    title = title.replace("\n", " ")
    parts = re.split(r"(?<=[;:]) ", title)
    if len(parts) < 4 and max(map(len, parts)) <= LETTERS:
        return "\n".join(parts)
    bound = re.sub(r" ?([±≥=]) ", "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", title)
    wraps = (textwrap.wrap(bound, width, break_on_hyphens=False) for width in range(LETTERS // 2, LETTERS + 1))
    return "\n".join(min(wraps, key=len)).replace("\N{NO-BREAK SPACE}", " ")


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
    if figure.get_figwidth() == COLUMN:
        _fit(figure)
    with require_matplotlib().rc_context({"svg.hashsalt": "tinylora"}), files.atomic(path, mode) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "svg", bbox_inches="tight", metadata={"Date": None})


def log_ticks(ax, ticks, axis="x"):
    """Ticks at these whole numbers on a logarithmic axis, and nowhere else."""
    labels = [f"{t:g}" for t in ticks]
    ax.set_xticks(ticks, labels) if axis == "x" else ax.set_yticks(ticks, labels)
    (ax.xaxis if axis == "x" else ax.yaxis).minorticks_off()
