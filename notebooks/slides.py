"""Slides of the core notebooks: one HTML file each, which needs no network and nothing but a browser.

    python notebooks/slides.py FOLDER              a deck of each of 01 to 10
    python notebooks/slides.py FOLDER 05 16        only of those that begin so, appendices too

A deck has a title slide (the question, and what one will be able to do), a slide for each section, and the summary. A section's slide
has its first two sentences and its figure; without a figure, its displayed equation or table, and its first open cell with what it
prints. The figures are those of the built notebook. The equations are drawn by matplotlib; the few that it cannot draw stand as TeX.
Arrow keys, the space bar and clicks turn the page; printing gives a page a slide, and Ctrl + and − change the size.
"""

import argparse
import functools
import html
import re
import sys
from pathlib import Path

from grading import HERE, read, tags
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from mdit_py_plugins.dollarmath import dollarmath_plugin

from tinylora.models.files import atomic

CORE = 10  # the last notebook of the core
SENTENCES, ITEMS, LINES, PRINTED = (
    2,
    5,
    14,
    4,
)  # that a slide shows of a section, of a list, of a cell and of what it prints

STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1a1a1a; font: 3.2vmin/1.45 Georgia, "DejaVu Serif", serif; }
section { width: 100%; height: 100vh; padding: 6vmin 9vmin 8vmin; display: flex; flex-direction: column; position: relative; }
section { break-after: page; overflow: hidden; }
.turning section { display: none; }
.turning section.now { display: flex; }
h1, h2 { font-family: "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; line-height: 1.2; margin: 0 0 3vmin; }
h1 { font-size: 6.5vmin; margin-top: 6vmin; } h2 { font-size: 4.6vmin; border-bottom: .4vmin solid #1a1a1a; padding-bottom: 1vmin; }
p, ul, table { margin: 0 0 2vmin; } ul { padding-left: 4vmin; } li { margin-bottom: 1vmin; } .key { font-weight: bold; }
figure { flex: 1; min-height: 0; margin: 0; display: flex; flex-direction: column; align-items: center; justify-content: center; }
figure img { max-width: 100%; max-height: 100%; min-height: 0; object-fit: contain; flex: 1; }
.equation { margin: auto; font-size: 3.6vmin; max-width: 100%; }
pre { margin: auto 0; padding: 1.5vmin 2vmin; background: #f2f2f2; overflow: hidden; }
pre { font: 2.3vmin/1.35 Menlo, "DejaVu Sans Mono", monospace; }
pre.said { margin: 1.5vmin 0 auto; background: none; color: #444; }
.equation svg { max-width: 100%; } svg { fill: currentColor; overflow: visible; }
code, .tex { font-family: Menlo, "DejaVu Sans Mono", monospace; font-size: .88em; background: #eee; }
.tex { white-space: pre-wrap; padding: 1.5vmin; display: inline-block; }
table { border-collapse: collapse; margin: auto; font-size: 2.8vmin; } th, td { border: 1px solid #666; padding: .6vmin 1.6vmin; }
footer { position: absolute; bottom: 3vmin; left: 9vmin; right: 9vmin; font-size: 1.8vmin; color: #444; display: flex; }
footer span:last-child { margin-left: auto; }
@page { size: 297mm 167mm; margin: 0; }
@media print { body { font-size: 4.3mm; } .turning section { display: flex; } section { height: 166mm; padding: 10mm 15mm 13mm; } }
@media print { h1 { font-size: 11mm; } h2 { font-size: 7.6mm; } .equation { font-size: 5mm; } table { font-size: 4mm; } }
@media print { footer { font-size: 3mm; bottom: 5mm; left: 15mm; right: 15mm; } section:last-of-type { break-after: auto; } }
"""

SCRIPT = """
const slides = document.querySelectorAll("section");
let at = 0;
function show(i) {
  at = Math.max(0, Math.min(slides.length - 1, i));
  slides.forEach((slide, k) => slide.classList.toggle("now", k === at));
  history.replaceState(null, "", "#" + (at + 1));
}
const turns = {ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1, Home: -1e6, End: 1e6};
document.addEventListener("keydown", event => {
  if (event.key in turns && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); show(at + turns[event.key]); }
});
document.addEventListener("click", event => show(at + (event.clientX < innerWidth / 3 ? -1 : 1)));
document.body.classList.add("turning");
show((parseInt(location.hash.slice(1)) || 1) - 1);
"""

# --- formulas

ALIKE = {  # what matplotlib calls otherwise, or leaves out
    r"\\[lr]Vert\b": r"\\Vert",
    r"\\[td]?frac *(\d) *(?=[\d{])": r"\\frac{\1}",
    r"\\frac(\{[^{}]*\}) *(\d)": r"\\frac\1{\2}",
    r"\\[td]frac\b": r"\\frac",
    r"\\mathcal (\w)": r"\\mathcal{\1}",
    r"\\[bB]igg?(?=[(\[])": r"\\left",
    r"\\[bB]igg?(?=[)\]])": r"\\right",
    r"\\(operatorname|text)\b": r"\\mathrm",
    r"\\(?:,|;|:) *": r"\\,",
    r"\\ldots\b": r"\\dots",
    r"\\mid\b": "|",
    r"\\mathrm E\b": r"\\mathrm{E}",
    r"½": r"\\frac{1}{2}",
}


@functools.cache
def drawn(tex, large=False):
    """A formula as an <svg> of the size of the text around it, its fractions large or small, or None if matplotlib cannot draw it."""
    from matplotlib import rc_context
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Curve
    from matplotlib.textpath import TextToPath

    plain = " ".join(tex.split())
    for theirs, ours in ALIKE.items():
        plain = re.sub(theirs, ours, plain)
    if large:
        plain = re.sub(r"\\frac\b", r"\\dfrac", plain)
    plain = re.sub(r"\\(mathrm)\{([^{}]*)\}", lambda m: rf"\mathrm{{{m[2].replace(' ', chr(92) + ' ')}}}", plain)
    try:
        with rc_context({"mathtext.fontset": "dejavuserif"}):
            font, maker = FontProperties(size=100), TextToPath()
            width, height, depth = maker.get_text_width_height_descent(f"${plain}$", font, ismath=True)
            points, codes = maker.get_text_path(font, f"${plain}$", ismath=True)
    except ValueError:
        return None
    letters = {Curve.MOVETO: "M", Curve.LINETO: "L", Curve.CURVE3: "Q", Curve.CURVE4: "C", Curve.CLOSEPOLY: "Z"}
    outline = []
    for numbers, code in Curve(points, codes).iter_segments(simplify=False, curves=True):
        pairs = [] if code == Curve.CLOSEPOLY else [f"{x:.0f} {-y:.0f}" for x, y in numbers.reshape(-1, 2)]
        outline.append(letters[code] + " ".join(pairs))
    size = f'width="{width / 100:.3f}em" height="{height / 100:.3f}em" style="vertical-align:{-depth / 100:.3f}em"'
    box = f'viewBox="0 {depth - height:.0f} {width:.0f} {height:.0f}"'
    return f'<svg role="img" aria-label="{html.escape(tex)}" {size} {box}><path d="{"".join(outline)}"/></svg>'


def formula(tex, large=False):
    """A formula in a sentence, or on lines of its own if it is large."""
    if re.fullmatch(r"[A-Za-z]", tex):
        return f"<i>{tex}</i>"
    return drawn(tex, large) or f'<span class="tex">{html.escape(tex)}</span>'


def displayed(tex):
    """A formula on lines of its own, where \\qquad begins a new one if it is long."""
    parts = re.split(r"\\qquad(?!\s*\(\d+\)$)", tex) if len(tex) > 90 else [tex]
    lines = [formula(part.strip(" ,.\n"), large=True) for part in parts if part.strip(" ,.\n")]
    return "".join(f'<p class="equation">{line}</p>' for line in lines)


# --- Markdown


MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table").use(dollarmath_plugin)
MARKDOWN.add_render_rule("math_inline", lambda _, tokens, i, *others: formula(tokens[i].content))
MARKDOWN.add_render_rule("link_open", lambda *_: "")
MARKDOWN.add_render_rule("link_close", lambda *_: "")
inline = MARKDOWN.renderInline


LOWER = "bitsandbytes|loralib|micrograd|tinylora"  # with which a sentence may begin


def sentences(text):
    """The sentences of a paragraph. A full stop in code, in a formula or in brackets ends none."""
    hidden = re.sub(
        r"`[^`]+`|\$[^$]+\$|\([^()]*\)|\b[Ee]q\.", lambda m: m[0].replace(".", "\1").replace("?", "\2"), text
    )
    ends = re.split(rf"(?<=[.?!])\s+(?=[^a-z]|{LOWER})|(?<=[.?!]\*\*)\s+", hidden)
    found = [one.replace("\1", ".").replace("\2", "?").strip() for one in ends if one.strip()]
    return [one + "**" if one.count("**") % 2 else one for one in found]


def source(node):
    """The Markdown of a paragraph, a heading or an item, on one line."""
    return " ".join(" ".join(part.content for part in node.walk() if part.type == "inline").split())


def blocks(text):
    """[(kind, …)] of a cell's Markdown: ("h2", title), ("text", paragraph), ("list", [items]), ("equation", tex), ("table", HTML)."""
    found = []
    for node in SyntaxTreeNode(MARKDOWN.parse(text)).children:
        match node.type:
            case "paragraph":
                found.append(("text", source(node)))
            case "heading":
                found.append((node.tag, source(node)))
            case "bullet_list" | "ordered_list":
                found.append(("list", [source(item) for item in node.children]))
            case "math_block":
                found.append(("equation", node.content.strip(" ,.\n")))
            case "table":
                found.append(("table", MARKDOWN.renderer.render(node.to_tokens(), MARKDOWN.options, {})))
    return found


def listed(items):
    """A list as HTML."""
    return f"<ul>{''.join(f'<li>{inline(item)}</li>' for item in items)}</ul>"


# --- slides


class Section:
    """What stands below one heading of a notebook: its blocks, its figures as (kind, data, what it draws), its first open cell."""

    def __init__(self, title):
        self.title, self.parts, self.figures, self.code, self.printed = title, [], [], "", ""


def sections(notebook):
    """The Sections of a notebook; the first is the header."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for kind, text in blocks(cell.source):
                if kind in ("h1", "h2"):
                    found.append(Section(text))
                elif found:
                    found[-1].parts.append((kind, text))
        elif found:
            if (
                not found[-1].code
                and not tags(cell)
                and "grade(" not in cell.source
                and len(cell.source.splitlines()) <= LINES
            ):
                found[-1].code = cell.source
                found[-1].printed = "".join(o.text for o in cell.get("outputs", []) if o.output_type == "stream")
            comment = cell.source.partition("\n")[0].removeprefix("# Draws: ")
            for output in cell.get("outputs", []):
                for kind in ("image/svg+xml", "image/png"):
                    if kind in output.get("data", {}):
                        found[-1].figures.append((kind, output.data[kind], comment))
                        break
    return found


def figure(kind, data, what):
    """A figure as HTML, its data in it."""
    import base64

    data = base64.b64encode(data.encode()).decode() if kind == "image/svg+xml" else "".join(data.split())
    alt = html.escape(what[:1].upper() + what[1:])
    return f'<figure><img src="data:{kind};base64,{data}" alt="{alt}"></figure>'


def title_slide(section):
    """The question, and what one will be able to do."""
    said = " ".join(text for kind, text in section.parts if kind == "text")
    question = re.search(r"\*\*Question\.\*\* (.+?\?)", said)
    able = next((items for kind, items in section.parts if kind == "list"), [])
    question = f'<p class="key">{inline(question[1])}</p>' if question else ""
    return f"<h1>{inline(section.title)}</h1>{question}<p>You will be able to</p>{listed(able)}"


def shortened(item):
    """An item of a list: its first sentence, and one more if that is a title in bold."""
    found = sentences(item)
    return " ".join(found[: 2 if found[0].startswith("**") else 1])


def chosen(parts, figure):
    """The numbers of the blocks that a slide shows, with their sentences: {i: text, or None for all of it}.

    These are the section's first sentences, its list if it begins with one, and, if there is no figure, its first equation or else its
    table, with the sentences that lead to it. What ends in a colon is left out if what it announces is.
    """
    kinds = [kind for kind, _ in parts]
    shown = {0: None} if kinds[:1] == ["list"] else {}
    main = next((kinds.index(kind) for kind in ("equation", "table") if kind in kinds and not figure), None)
    if main is not None:
        shown |= {i: None for i in range(main, len(parts)) if set(kinds[main : i + 1]) == {kinds[main]}}
    left = 0 if shown.get(0, "") is None else SENTENCES
    for i, (kind, text) in enumerate(parts):
        said = sentences(re.sub(r"^\*\*(?:[^\s*]+ ?){1,3}\.\*\*\s*", "", text)) if kind == "text" else []
        then = kinds[i + 1] if i + 1 < len(kinds) else ""
        if said and then == "list" and len(said) <= left and not figure:
            shown[i + 1] = None
        if said and not said[-1].endswith((".", "?", "!")) and i + 1 not in shown:
            said.pop()
        leads = said[-2:] if i + 1 == main else []
        first = said[:left]
        if first or leads:
            shown[i] = " ".join([*first, *(one for one in leads if one not in first)])
        left -= len(first)
    return dict(sorted(shown.items()))


def content(section):
    """What a section's slide shows below its heading."""
    if section.title == "Exercises":
        return listed(text for kind, text in section.parts if kind == "h3") + "<p>Each is graded in its notebook.</p>"
    parts = [(kind, whole) for kind, whole in section.parts if kind != "h3"]
    if section.title == "Summary":
        return listed(next(items for kind, items in parts if kind == "list"))
    made, shown = {"equation": displayed, "table": str}, []
    picked = chosen(parts, section.figures)
    bold = [b for kind, text in parts if kind == "text" for b in re.findall(r"\*\*(.+?)\*\*", text)]
    key = next((b for b in bold if len(b.split()) >= 8), None)
    if key and not any(key in (text or "") for text in picked.values()):
        shown.append(f'<p class="key">{inline(key)}</p>')
    for i, text in picked.items():
        kind, whole = parts[i]
        if text:
            shown.append(f"<p>{inline(text)}</p>")
        else:
            shown.append(listed(map(shortened, whole[:ITEMS])) if kind == "list" else made[kind](whole))
    if section.figures:
        return "".join(shown) + figure(*section.figures[0])
    if section.code and not any(parts[i][0] == "table" for i in picked):
        shown.append(f"<pre>{html.escape(section.code)}</pre>")
        if section.printed:
            shown.append(f'<pre class="said">{html.escape(chr(10).join(section.printed.splitlines()[:PRINTED]))}</pre>')
    return "".join(shown)


def deck(path):
    """The HTML of the slides of a built notebook. ValueError if it has no outputs."""
    first, *rest = sections(read(path))
    if not any(section.figures for section in rest):
        raise ValueError(f"{path.name} holds no figure; build it first: python notebooks/build.py {path.name[:2]}")
    slides = [title_slide(first), *(f"<h2>{inline(section.title)}</h2>{content(section)}" for section in rest)]
    name = html.escape(re.sub(r"[$*`]", "", first.title))
    pages = [
        f"<section>{slide}<footer><span>{name}</span><span>{i} / {len(slides)}</span></footer></section>"
        for i, slide in enumerate(slides, 1)
    ]
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    body = "\n".join([*pages, f"<script>{SCRIPT}</script>"])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the .html files go")
    parser.add_argument("names", nargs="*", metavar="NAME", help="how a notebook begins, such as 05 (01 to 10)")
    args = parser.parse_args(argv)
    notebooks = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
    for name in args.names:
        if not any(path.name.startswith(name) for path in notebooks):
            parser.error(f"no notebook begins with {name!r}; expected one of {[path.stem for path in notebooks]}")
    wanted = [p for p in notebooks if (p.name.startswith(tuple(args.names)) if args.names else int(p.name[:2]) <= CORE)]
    failed = False
    args.folder.mkdir(parents=True, exist_ok=True)
    for path in wanted:
        try:
            text = deck(path)
        except (ValueError, ImportError) as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        target = args.folder / f"{path.stem}.html"
        with atomic(target) as temporary:
            Path(temporary).write_text(text, encoding="utf-8", newline="\n")
        print(f"{target}: {text.count('<section>')} slides, {len(text) / 1e6:.1f} MB", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
