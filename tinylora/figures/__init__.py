"""Pictures, drawn with matplotlib (extra `notebooks` or `dev`). One function a figure; each is seeded and carries a number.

`save(figure, path)` writes a figure as SVG, whole or not at all.
"""

from .style import canvas, require_matplotlib, save
from .training import comparison
from .weights import survey

__all__ = ["canvas", "comparison", "require_matplotlib", "save", "survey"]
