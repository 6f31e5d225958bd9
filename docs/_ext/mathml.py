"""Mathematics as MathML, made from its TeX when the book is built: it needs no JavaScript and no request.

latex2mathml reads the TeX. What it writes is set as MathJax sets it in the notebooks: bars and the commas in long numbers without space
around them, a function's name with a thin space beside a letter, and none before its parenthesis.
"""

import re
from functools import cache
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

log = logging.getLogger(__name__)
NAMESPACE = "http://www.w3.org/1998/Math/MathML"
M = f"{{{NAMESPACE}}}"
THIN = "0.1667em"
ElementTree.register_namespace("", NAMESPACE)


@cache
def mathml(tex, block):
    """MathML of a formula. ValueError says which formula cannot be converted, and why."""
    bare = re.sub(r"\\.", "", tex)
    if bare.count("{") != bare.count("}"):  # which latex2mathml closes where it sees fit
        raise ValueError(f"the formula {tex!r} cannot be converted to MathML: its braces are not closed")
    try:
        root = ElementTree.fromstring(convert(tex, display="block" if block else "inline"))
    except Exception as error:
        raise ValueError(f"the formula {tex!r} cannot be converted to MathML: {type(error).__name__} {error}") from None
    left = [node.text for node in root.iter() if (node.text or "").startswith("\\")]
    if left:
        raise ValueError(f"the formula {tex!r} cannot be converted to MathML: {', '.join(left)} is not known")
    for parent in root.iter():
        children = list(parent)
        for i, node in enumerate(children):
            before = children[i - 1] if i else None
            after = children[i + 1] if i + 1 < len(children) else None
            space(node, before, after)
    root.set("alttext", tex)
    return ElementTree.tostring(root, encoding="unicode")


def space(node, before, after):
    """Set the space beside one node of a formula."""
    name = node[0] if node.tag in (f"{M}msub", f"{M}msup", f"{M}msubsup", f"{M}munder") else node
    if node.tag == f"{M}mrow" and len(node) == 1 and node[0].text == ",":  # {,} in 65{,}285
        around(node[0], "0", "0")
    if name.tag != f"{M}mo":
        return
    text = name.text or ""
    if text in "|‖":
        around(name, "0", "0")
    elif re.fullmatch(r"[A-Za-z]{2,}", text):  # max, tr
        opens = after is not None and after.tag == f"{M}mo" and after.text in "([{⌈⌊"
        follows = before is not None and before.tag not in (f"{M}mo", f"{M}mspace")
        around(name, THIN if follows else "0", "0" if opens or after is None else THIN)


def around(node, left, right):
    node.set("lspace", left)
    node.set("rspace", right)


class Formulas(SphinxTransform):
    """Converts a page's formulas when it has been read. One that cannot be converted is a warning, which ends the build."""

    default_priority = 600

    def apply(self):
        for node in self.document.findall(lambda node: isinstance(node, nodes.math | nodes.math_block)):
            try:
                node["mathml"] = mathml(node.astext(), isinstance(node, nodes.math_block))
            except ValueError as error:
                log.warning("%s", error, location=node)


def visit(translator, node):
    tag = "div" if isinstance(node, nodes.math_block) else "span"
    names = f' id="{node["ids"][0]}"' if node["ids"] else ""
    translator.body.append(f'<{tag} class="math"{names}>{node["mathml"]}</{tag}>')
    raise nodes.SkipNode


def setup(app):
    app.add_transform(Formulas)
    app.add_html_math_renderer("mathml", inline_renderers=(visit, None), block_renderers=(visit, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
