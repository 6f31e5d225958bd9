"""Make the PDF of the article docs/nf4.md.

    python docs/pdf.py                  nf4.pdf in this folder
    python docs/pdf.py --out FILE       elsewhere
    python docs/pdf.py --html FILE      only the page that is printed, which needs no Chromium

The article becomes one HTML page that loads nothing: mathematics as MathML, figures as SVG within the page. Chromium prints it. Needs
the extra `book` (markdown-it-py, mdit-py-plugins, latex2mathml, playwright), and Chromium for the PDF.
"""

import argparse
import base64
import re
import shutil
import sys
from pathlib import Path

from tinylora.models.files import atomic, write_text

ARTICLE = Path(__file__).parent / "nf4.md"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
STYLE = """
@page { size: A4; margin: 17mm 19mm 18mm; @bottom-center { content: counter(page); font: 8.5pt serif; color: #555 } }
html { font: 9.9pt/1.42 "TeX Gyre Termes", "Liberation Serif", "Times New Roman", serif; color: #000; hyphens: auto }
body { margin: 0 auto; max-width: 172mm }
math { font-family: "TeX Gyre Termes Math", "STIX Two Math", "Cambria Math", "Latin Modern Math", "DejaVu Math TeX Gyre", math;
  font-size-adjust: .45 }
math[display="block"] { margin: .5em 0 }
h1 { font-size: 19pt; margin: 0 0 .1em; line-height: 1.2 }
h2 { font-size: 12.5pt; margin: 1.35em 0 .4em; break-after: avoid }
p { margin: .5em 0; orphans: 3; widows: 3; text-align: justify }
div.math { break-inside: avoid }
code { font: .86em "DejaVu Sans Mono", monospace; white-space: nowrap }
figure { margin: 1em 0; break-inside: avoid }
figure img { display: block; max-width: 78%; margin: 0 auto }
figcaption { font-size: .92em; margin: .45em 6mm 0; text-align: center }
table { border-collapse: collapse; margin: 0 auto; font-size: .92em; line-height: 1.16; font-variant-numeric: lining-nums tabular-nums }
thead { border-top: 1px solid #000; border-bottom: .6px solid #000 }
tbody { border-bottom: 1px solid #000 }
th, td { padding: .14em .7em }
th { font-weight: normal }
blockquote { margin: .5em 6mm }
ol { padding-left: 1.8em }
li p { margin: .15em 0; text-align: left }
"""


def render(article=ARTICLE):
    """The article as one HTML page that loads nothing. -> str"""
    try:
        from latex2mathml.converter import convert
        from markdown_it import MarkdownIt
        from mdit_py_plugins.dollarmath import dollarmath_plugin
    except ImportError as error:
        raise RuntimeError(f"docs/pdf.py needs {error.name}: pip install -e '.[book]' in a clone of tinylora") from None

    def mathematics(tex, options):
        display = "block" if options["display_mode"] else "inline"
        return convert(tex, display=display)

    markdown = MarkdownIt("commonmark", {"typographer": True}).enable(["table", "smartquotes"])
    markdown.use(dollarmath_plugin, renderer=mathematics)
    body = markdown.render(article.read_text(encoding="utf-8").replace(" %", "\N{NO-BREAK SPACE}%"))
    body = re.sub(r'<img src="([^"]+)"', lambda found: f'<img src="{_embedded(article.parent / found[1])}"', body)
    body = re.sub(
        r'<a href="(?!#)[^"]*">(.*?)</a>', r"\1", body
    )  # files of the repository are not beside what is printed
    caption = r"<p><em>((?:Figure|Table) \d+\..*?)</em></p>"
    body = re.sub(
        rf"(?:<p>(<img [^>]*>)</p>|(<table>.*?</table>))\n{caption}",
        lambda found: f"<figure>{found[1] or found[2]}<figcaption>{found[3]}</figcaption></figure>",
        body,
        flags=re.S,
    )
    title = re.search(r"<h1>(.*?)</h1>", body)[1]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n{body}</html>\n"
    )


def _embedded(path):
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


def print_page(page, out):
    """Print an HTML page to the PDF file `out` with Chromium without a window."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise RuntimeError(f"docs/pdf.py prints with Chromium, and found none of {', '.join(BROWSERS)} on the PATH")
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise RuntimeError("docs/pdf.py needs playwright: pip install -e '.[book]' in a clone of tinylora") from None
    with sync_playwright() as playwright:
        try:
            with playwright.chromium.launch(executable_path=browser) as chromium:
                window = chromium.new_page()
                window.set_content(page)
                printed = window.pdf(prefer_css_page_size=True, tagged=True, outline=True)
        except Error as error:
            raise RuntimeError(f"Chromium printed no PDF: {error.message.strip()[:500]}") from None
    with atomic(out) as temporary:
        Path(temporary).write_bytes(printed)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Make the PDF of the article docs/nf4.md.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--out", default="nf4.pdf", metavar="FILE", help="the PDF (nf4.pdf)")
    what.add_argument("--html", metavar="FILE", help="write the page instead, and print nothing")
    args = parser.parse_args(arguments)
    try:
        if args.html:
            write_text(args.html, render())
        else:
            print_page(render(), args.out)
    except (OSError, RuntimeError) as error:
        print(f"pdf.py: error: {error}", file=sys.stderr)
        return 2
    print(f"article: {args.html or args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
