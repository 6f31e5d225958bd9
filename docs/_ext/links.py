"""Links of the repository's pages lead to pages of the book, and mentions of files, of public issues and of preprints become links.

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

# whose issues the pages mention; the address of an issue leads to a pull request too
TRACKERS = {
    "bitsandbytes": "bitsandbytes-foundation/bitsandbytes",
    "peft": "huggingface/peft",
    "PEFT": "huggingface/peft",
    "qlora": "artidoro/qlora",
    "LoRA": "microsoft/LoRA",
    "trl": "huggingface/trl",
    "micrograd": "karpathy/micrograd",
    "LLMs-from-scratch": "rasbt/LLMs-from-scratch",
}
NAME = rf"(?<![\w-])(?:{'|'.join(TRACKERS)})\b"
ISSUES = re.compile(
    rf"(?:(?P<name>{NAME})\s)?(?P<word>(?:[Ii]ssues?|pull\srequests?)\s)?"
    r"(?P<numbers>\b\d+(?:(?:,\s|\sand\s|、|\s和\s)\d+)*)(?![.,]?\w)"
    rf"(?:\sof\s(?P<owner>{NAME}))?(?P<ends>[;,.:)\"”’]|\s*$)?"
)
VERBATIM = nodes.literal | nodes.math | nodes.raw | nodes.reference
PREPRINT = re.compile(r"(?:\barXiv\s|(?<=\()|(?<=,\s))(\d\d(?:0[1-9]|1[0-2])\.\d{5})(?!\w|\.\d)")


def outside(text, before="", known=None):
    """What a text mentions that stands elsewhere, in order: (start, end, address) of each.

    "qlora issues 258 and 286" and "(qlora 258, 286; …" lead to both. "Issue 286" alone belongs to the tracker in `known`, which has the
    page's numbers so far, or else to the last one that is named in the text or in what stands before it. ValueError if there is none.
    """
    known, found = {} if known is None else known, []
    for mention in ISSUES.finditer(text):
        name, numbers = mention["name"] or mention["owner"], list(re.finditer(r"\d+", mention["numbers"]))
        if not mention["word"] and not (mention["name"] and mention["ends"] is not None):
            continue
        if name is None:
            named = re.findall(NAME, before + text[: mention.start()])
            name = known.get(numbers[0][0]) or (named[-1] if named else None)
        if name is None:
            raise ValueError(
                f"{text[mention.start() : mention.end('numbers')]} is an issue of no tracker that is named before it"
            )
        first = mention.start("numbers")
        for i, number in enumerate(numbers):  # the first link begins with the name
            known[number[0]] = name
            start = first + number.start() if i else mention.start()
            found.append((start, first + number.end(), f"https://github.com/{TRACKERS[name]}/issues/{number[0]}"))
    found += [(each.start(), each.end(), f"https://arxiv.org/abs/{each[1]}") for each in PREPRINT.finditer(text)]
    return sorted(found)


class Links(SphinxTransform):
    """Runs on each page when it has been read, before its images are collected."""

    default_priority = 600  # after the sections have their identifiers

    def apply(self):
        page = self.env.docname
        self.mention_outside()
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

    def mention_outside(self):
        known = {}
        for block in self.document.findall(nodes.TextElement):
            if isinstance(block, nodes.Inline | nodes.FixedTextElement):
                continue
            join(block)
            before = ""
            for node in list(block.findall(nodes.Text)):
                if not any(isinstance(above, VERBATIM) for above in parents(node)):
                    try:
                        link(node, outside(node, before, known))
                    except ValueError as error:
                        log.warning("%s", error, location=block)
                before += node

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


def join(block):
    """Make one text node of those that follow each other, of which MyST makes one for each line."""
    for parent in list(block.findall(nodes.TextElement)):
        children = []
        for child in parent.children:
            if children and isinstance(child, nodes.Text) and isinstance(children[-1], nodes.Text):
                child = nodes.Text(children.pop() + child)
            children.append(child)
        parent[:] = children


def link(node, found):
    """Make links of parts of a text node: (start, end, address) of each."""
    new, done = [], 0
    for start, end, url in found:
        new += [nodes.Text(node[done:start]), nodes.reference("", node[start:end], refuri=url, internal=False)]
        done = end
    if new:
        node.parent.replace(node, [*new, nodes.Text(node[done:])])


def number(section):
    """The section "3 · Where …" of a notebook gets the anchor section-3, which a page can link to without its title."""
    title = section.next_node(nodes.title)
    if title is not None and (found := re.match(r"(\d+) · ", title.astext())):
        section["ids"].append(f"section-{found[1]}")


def setup(app):
    app.add_transform(Links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
