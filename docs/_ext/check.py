"""What must hold of the built pages: nothing is loaded from elsewhere, every link and anchor leads somewhere, and no TeX is left."""

import html
import json
import posixpath
import re
from urllib.parse import unquote

TAG = re.compile(r"<([a-zA-Z][\w-]*)\b([^>]*)>")
ATTRIBUTE = re.compile(r"""([\w:-]+)\s*=\s*"([^"]*)\"""")
ELSEWHERE = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//", re.I)
LOADS = {"link", "script", "img", "iframe", "source", "video", "audio", "object", "embed", "use", "image"}
VERBATIM = re.compile(r"<(pre|code|script|style|math|title)\b.*?</\1>", re.S)
COMMANDS = "frac|tfrac|text|mathrm|qquad|quad|sum|hat|bar|sqrt|operatorname|big|Big|cdot|times|begin"
TEX = re.compile(rf"\$\$|\\(?:{COMMANDS})\b")


def problems(folder):
    """What is wrong with the built pages in a folder, a sentence each, and how many pages and links were looked at."""
    found, ids, links = [], {}, []
    for path in sorted(folder.rglob("*.html")):
        page, text = path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")
        ids[page] = set()
        for name, inside in TAG.findall(text):
            attributes = {key.lower(): html.unescape(value) for key, value in ATTRIBUTE.findall(inside)}
            ids[page] |= {attributes[key] for key in ("id", "name") if key in attributes}
            if name == "img" and not attributes.get("alt", "").strip():
                found.append(f"{page}: the image {attributes.get('src')} has no alt text")
            for key in ("src", "href"):
                url = attributes.get(key)
                if url and name in LOADS and ELSEWHERE.match(url):
                    found.append(f"{page}: <{name}> loads {url}")
                elif url and not re.match(r"[a-z][a-z0-9+.-]*:", url):
                    links.append((page, url))
        prose = re.sub(r"<[^>]*>", "", VERBATIM.sub("", text))
        if left := TEX.search(prose):
            found.append(f"{page}: TeX is left in the text, {prose[max(0, left.start() - 20) : left.end() + 20]!r}")
    for path in sorted(folder.rglob("*.css")):
        for url in re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s]+)", path.read_text(encoding="utf-8")):
            if ELSEWHERE.match(url):
                found.append(f"{path.relative_to(folder).as_posix()} loads {url}")
    for page, url in links:
        target, _, anchor = url.partition("#")
        target = unquote(target.partition("?")[0])
        file = posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) if target else page
        if not (folder / file).is_file():
            found.append(f"{page}: the link {url} leads to no file")
        elif anchor and file in ids and unquote(anchor) not in ids[file]:
            found.append(f"{page}: the link {url} leads to no anchor")
    return found, len(ids), len(links)


def terms(folder):
    """The words that search knows."""
    text = (folder / "searchindex.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))["terms"]
