"""Links of the repository's pages lead to pages of the book, and mentions of files become links.

A link that leads nowhere is a warning, and build.py makes warnings errors. The anchors are looked at by check.py when the book is built.
"""

import posixpath
import re

from docutils import nodes
from layout import Unresolved, book, relative
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

log = logging.getLogger(__name__)
BOOK = book()
FILES = {page: path for path, page in BOOK.pages.items()}  # a page's file in the repository


class Links(SphinxTransform):
    """Runs on each page when it has been read, before its images are collected."""

    default_priority = 600  # after the sections have their identifiers

    def apply(self):
        page = self.env.docname
        if page not in FILES:  # the reference, which is made by Sphinx
            return
        path = FILES[page]
        for node in list(self.document.findall(nodes.reference)):
            self.follow(node, path, page)
        for node in list(self.document.findall(nodes.literal)):
            self.mention(node, path, page)
        for node in self.document.findall(nodes.image):
            self.image(node, path)
        for section in self.document.findall(nodes.section):
            number(section)

    def follow(self, node, path, page):
        href = node.get("refuri")
        if not href:
            return
        try:
            url = BOOK.link(href, path)
        except Unresolved as error:
            return log.warning("%s", error, location=node)
        if url is None:
            node.replace_self(node.children)
        else:
            node["refuri"] = relative(url, page)
            node["internal"] = ":" not in url

    def mention(self, node, path, page):
        if any(isinstance(above, nodes.reference | nodes.title) for above in parents(node)):
            return
        try:
            url = BOOK.mention(node.astext(), path)
        except Unresolved as error:
            return log.warning("%s", error, location=node)
        if url:
            reference = nodes.reference("", "", refuri=relative(url, page), internal=True)
            node.replace_self(reference)
            reference += node

    def image(self, node, path):
        """Images are found from the repository's root, since a page may stand elsewhere in the book than its file."""
        uri = node["uri"]
        if not re.match(r"[a-z]+:|/", uri):
            file = posixpath.normpath(posixpath.join(posixpath.dirname(path), uri))
            if (BOOK.root / file).exists():
                node["uri"] = f"/{file}"


def parents(node):
    while node := node.parent:
        yield node


def number(section):
    """The section "3 · Where …" of a notebook gets the anchor section-3, which a page can link to without its title."""
    title = section.next_node(nodes.title)
    if title is not None and (found := re.match(r"(\d+) · ", title.astext())):
        section["ids"].append(f"section-{found[1]}")


def setup(app):
    app.add_transform(Links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
