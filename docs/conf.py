"""What Sphinx is told. `python docs/build.py` stages the pages and calls it; alone it finds no pages."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

from api import linkcode_resolve  # noqa: E402, F401

import tinylora  # noqa: E402

project, author, release = "tinylora", "the tinylora authors", tinylora.__version__
html_title = f"tinylora {release}"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "api",
    "links",
    "look",
    "mathml",
    "search",
    "sources",
]
templates_path = [str(DOCS / "_templates")]

# Markdown and notebooks: outputs are the stored ones, and links are resolved by the extension `links`
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 6
myst_all_links_external = True

# the reference
autodoc_typehints = "none"
autodoc_preserve_defaults = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# pages: nothing is loaded from anywhere else
html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = [str(DOCS / "_static")]
html_extra_path = [str(DOCS / "_build" / "extra")]
html_favicon = str(DOCS / "_static" / "favicon.svg")
html_css_files = ["book.css"]
html_js_files = ["map.js", "scroll.js"]
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = html_show_sourcelink = False
html_domain_indices = False
pygments_style, pygments_dark_style = "friendly", "monokai"
