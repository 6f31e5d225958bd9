"""What a page says of itself: its title beside others, its language, and the tests that it names after a link to their file."""

import re

from docutils import nodes
from layout import book, lines_of, relative
from links import FILES
from sphinx.transforms import SphinxTransform

TITLES = {"readme": "The README", "zh/index": "中文说明"}  # whose own title, tinylora, is the book's


class Tests(SphinxTransform):
    """A test that is named after a link to its file, in the same paragraph, is a link to the test's line."""

    default_priority = 590  # before the extension `links`, which makes the files' links those of the book

    def apply(self):
        page = self.env.docname
        if page not in FILES:
            return
        for paragraph in self.document.findall(nodes.paragraph):
            file = None
            for node in list(paragraph.findall(lambda node: isinstance(node, nodes.reference | nodes.literal))):
                if isinstance(node, nodes.reference):
                    file = re.search(r"(?:^|/)(tests/[\w/]+\.py)$", node.get("refuri", ""))
                elif file and not isinstance(node.parent, nodes.reference):
                    self.named(node, file[1], page)

    def named(self, node, file, page):
        line = lines_of(book().root / file).get(node.astext())
        if line is not None:
            # as seen from the page's file, since `links` comes after
            reference = nodes.reference("", "", refuri=f"{relative(file, FILES[page])}#L-{line}")
            node.replace_self(reference)
            reference += node


def titles(app, env):
    for page, title in TITLES.items():
        env.titles[page] = env.longtitles[page] = nodes.title("", title)


def language(app, page, template, context, doctree):
    if page.startswith("zh/"):
        context["language"] = "zh-Hans"


def setup(app):
    app.add_transform(Tests)
    app.connect("env-updated", titles)
    app.connect("html-page-context", language)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
