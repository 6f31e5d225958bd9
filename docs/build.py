"""Build the book: every page, notebook and source file of the repository as pages for a browser.

    python docs/build.py                 into docs/_build/html; open index.html there
    python docs/build.py --out FOLDER    into FOLDER, which must be new, empty or an earlier book
    python docs/build.py --repository OWNER/NAME    notebooks link to their copies on Colab and Binder, from that repository of GitHub

It needs `pip install -e '.[book]'`. Notebooks are shown with their stored outputs and are not executed. The book works from a disk
and from any web server, without a network: nothing in it is loaded from anywhere else.

A new page is a Markdown file in docs/ whose name stands in a toctree of docs/index.md. Its links are those that work in the
repository, such as ../tinylora/quant.py or ../notebooks/05_building_nf4.ipynb#section-3, and lead to the book's pages.
A file that is named in backticks becomes a link by itself: `tests/test_quant.py`, `tests/test_quant.py::test_name`,
`tinylora/quant.py:quantize`, `05_building_nf4`, `05_building_nf4#3`.

A warning ends the build: a link or an anchor that leads nowhere, a page that no toctree names, a formula that cannot be
converted, an image without alt text. FOLDER is replaced only when all pages are right.
"""

import argparse
import ast
import json
import os
import re
import shutil
import sys
import time
import zipfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS)]

import check  # noqa: E402
import explorers  # noqa: E402
from folders import replace  # noqa: E402
from layout import book, globbed, relative  # noqa: E402

from tinylora.models.files import write_text  # noqa: E402

FORMULA = re.compile(r"(?<![$`\\])\$[^$`]+\$")
# what an explorer's page has in the book and not alone: the theme that the reader chose there, and the way back
THEME = """<script>try { document.documentElement.dataset.theme = localStorage.getItem("theme"); } catch { /* not kept */ }</script>
</head>"""
WAY = """<main>
<nav aria-label="The book"><a href="../index.html">tinylora</a> / <a href="../explorer.html">Explore by hand</a></nav>"""

# what a reader of the book downloads: all that the two commands below need, and a copy of what students write in
ARCHIVE = ("pyproject.toml", "README.md", "LICENSE", "tinylora/**/*", *(f"notebooks/*.{end}" for end in ("py", "ipynb", "md")),
           "notebooks/checks/*.py", "notebooks/drawings/*.py")  # fmt: skip
SINGLE = ("notebooks/my_qlora.py", "notebooks/build_it.md")
# where the box stands that leads to the downloads: before this mark of a page
GET = {
    "README.md": "<!-- main-job -->",
    "docs/zh/README.md": "```bash",
    "notebooks/README.md": "<!-- get it -->",
    "notebooks/build_it.md": "<!-- get it -->",
}
BOX = """:::{{admonition}} Get it
:class: get-it
{archive} holds the package, the model and the text that come with it, the notebooks, and what grades the answers. Unpack it, and in a
terminal in its folder:

```bash
python3 -m venv .venv && .venv/bin/pip install -q -e '.[notebooks]'
.venv/bin/pytest notebooks -k my-1  # grades step 1 of "Build it"
```

It needs Python 3.11 or later and pip, and a network once, for the installation. Single files: {single}.
:::

"""
CHINESE_BOX = """:::{{admonition}} 下载
:class: get-it
{archive} 里有软件包、随附的模型和文本、notebook，以及批改答案的程序。解压后，在终端里进入该文件夹，再运行下面的命令。单个文件：{single}。
:::

"""


def stage(folder, repository=None):
    """Copy what Sphinx reads into a folder, as the book's pages are named; returns how many pages there are."""
    from api import stubs

    known, source, extra = book(), folder / "src", folder / "extra"
    for old in (source, extra, folder / "doctrees"):
        shutil.rmtree(old, ignore_errors=True)
    extra.mkdir(parents=True)
    size = downloads(known, extra / "downloads")
    for path, page in known.pages.items():
        target = source / (page + Path(path).suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (known.root / path).read_text(encoding="utf-8")
        if path in GET:
            text = with_box(text, path, page, size)
        text = prepared(text, hosted(path, repository)) if path.endswith(".ipynb") else text
        target.write_text(text, encoding="utf-8")
    for path in (*known.root.glob("figures/**/*.svg"), *(known.root / path for path in known.files)):
        copy(path, source / path.relative_to(known.root))  # where pages find their images
    for path, url in known.files.items():
        copy(known.root / path, extra / url)
        if url.startswith("explorer/"):
            write_text(extra / url, in_book((extra / url).read_text(encoding="utf-8"), url))
    reference = stubs()
    for page, text in reference.items():
        target = source / f"{page}.rst"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return len(known.pages) + len(reference)


def downloads(known, folder):
    """Write what a reader downloads, without the solutions; returns the bytes of the archive. Equal files give equal bytes."""
    refuse_answers((known.root / "notebooks/my_qlora.py").read_text(encoding="utf-8"))
    folder.mkdir()
    for path in SINGLE:
        copy(known.root / path, folder / Path(path).name)
    with zipfile.ZipFile(folder / "tinylora.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in globbed(ARCHIVE, known.root):
            if path not in known.withheld and not path.endswith(".pyc"):
                entry = zipfile.ZipInfo(f"tinylora/{path}", (1980, 1, 1, 0, 0, 0))
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, (known.root / path).read_bytes(), zipfile.ZIP_DEFLATED)
    return (folder / "tinylora.zip").stat().st_size


def refuse_answers(text):
    """ValueError if a function of my_qlora.py does more than raise NotImplementedError: the book gives that file to students."""
    for function in ast.parse(text).body:
        if isinstance(function, ast.FunctionDef) and not isinstance(function.body[-1], ast.Raise):
            raise ValueError(
                f"notebooks/my_qlora.py holds an answer, {function.name}, which the book would give away; move the file away and run "
                "`python notebooks/build.py my_qlora`"
            )


def with_box(text, path, page, size):
    """A page's text with the box that leads to the downloads, before its mark."""
    before, mark, after = text.partition(GET[path] + "\n")
    if not mark:
        raise ValueError(f"{path} has no line {GET[path]}, before which the book says how to get the files")

    def link(name, more=""):
        return f'<a download href="{relative(f"downloads/{name}", page)}">{name}</a>{more}'

    box = CHINESE_BOX if path.startswith("docs/zh/") else BOX
    single = ("、" if box is CHINESE_BOX else " and ").join(link(Path(name).name) for name in SINGLE)
    return before + box.format(archive=link("tinylora.zip", f" ({size / 1e6:.1f} MB)"), single=single) + mark + after


def copy(path, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def in_book(text, url):
    """An explorer's page as it stands in the book: with the way back, and links to the files that it names."""

    def linked(found):
        leads = book().mention(found[1], url)
        return f'<a href="{relative(leads, url)}">{found[0]}</a>' if leads else found[0]

    text = re.sub("<code>(.+?)</code>", linked, text)
    for mark, new in (("</head>", THEME), ("<main>", WAY)):
        if text.count(mark) != 1:
            raise ValueError(f"{url}: expected one {mark}, got {text.count(mark)}")
        text = text.replace(mark, new)
    return text


def hosted(path, repository):
    """The Markdown that links a notebook to Colab and Binder; empty if the repository OWNER/NAME is not known."""
    if repository is None:
        return ""
    name = repository.partition("/")[2]
    colab = f"https://colab.research.google.com/github/{repository}/blob/HEAD/{path}"
    binder = f"https://mybinder.org/v2/gh/{repository}/HEAD?labpath={path}"
    return (
        f"Open this notebook in [Colab]({colab}) or in [Binder]({binder}). In Colab, run this in a new first cell:\n\n"
        f"    !git clone -q --depth 1 https://github.com/{repository} && pip install -q ./{name}\n    %cd {name}/notebooks"
    )


def prepared(text, links=""):
    """A notebook's text in which folded cells have their first comment as title, drawings have alt text, and `links` stand below the title.

    Both come from the cell's first line: "# Measures: how far the codes lie from appendix E", "# Draws: …". Formulas become one line, since
    Jupyter finds them before it reads Markdown, and a line that begins with + would be a list.
    """
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = FORMULA.sub(lambda found: found[0].replace("\n", " "), "".join(cell["source"]))
        if cell["cell_type"] != "code":
            continue
        first = "".join(cell["source"]).partition("\n")[0]
        what = first.lstrip("# ") if first.startswith("#") else "Code"
        settings = {"code_prompt_show": what, "code_prompt_hide": what}
        if any(kind.startswith("image/") for output in cell["outputs"] for kind in output.get("data", ())):
            if not what.startswith("Draws: "):
                raise ValueError(
                    f"a cell that draws begins with {first!r} and not with '# Draws: …', which is its figure's alt text"
                )
            settings["image"] = {"alt": what.removeprefix("Draws: ")}
        cell["metadata"]["mystnb"] = settings
    if links:
        notebook["cells"].insert(1, {"cell_type": "markdown", "id": "hosted", "metadata": {}, "source": links})
    return json.dumps(notebook)


def repository(text):
    """OWNER/NAME, checked."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no repository; expected OWNER/NAME")
    return text


def sphinx(folder, out):
    """Let Sphinx read what is staged and write pages; returns whether there was no warning."""
    from sphinx.cmd.build import build_main

    command = ["-b", "html", "-c", DOCS, "-d", folder / "doctrees", "-j", min(4, os.cpu_count() or 1)]
    return not build_main([str(word) for word in (*command, "-q", "-W", "--keep-going", folder / "src", out)])


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status 1 if the book cannot be built, with a sentence for each thing that is wrong; the folder is then as it was.",
    )
    parser.add_argument(
        "--out", type=Path, default=DOCS / "_build" / "html", metavar="FOLDER", help="where (docs/_build/html)"
    )
    parser.add_argument(
        "--repository", type=repository, metavar="OWNER/NAME", help="on GitHub, for links to Colab and Binder (none)"
    )
    args = parser.parse_args(argv)
    out, began = args.out.resolve(), time.perf_counter()
    if out.exists() and not (out.is_dir() and ((out / "searchindex.js").exists() or not any(out.iterdir()))):
        parser.error(f"{args.out} exists and is no book; name a new folder")
    try:
        import furo  # noqa: F401
        import latex2mathml  # noqa: F401
        import myst_nb  # noqa: F401
    except ImportError as error:
        parser.error(f"{error.name} is not installed; run pip install -e '.[book]'")
    new = DOCS / "_build" / "new"
    shutil.rmtree(new, ignore_errors=True)
    explorers.main([DOCS / "explorer"])
    pages = stage(DOCS / "_build", args.repository)
    print(
        f"{pages} pages staged in {time.perf_counter() - began:.0f} s; Sphinx reads and writes them (about a minute)",
        flush=True,
    )
    if not sphinx(DOCS / "_build", new):
        print("the book was not built: each warning above names a page and what is wrong there", file=sys.stderr)
        return 1
    print(f"written after {time.perf_counter() - began:.0f} s; links and anchors are looked at", flush=True)
    found, count, links = check.problems(new)
    if found:
        print(
            *found, f"the book was not built: {len(found)} things are wrong with its pages", sep="\n", file=sys.stderr
        )
        return 1
    replace(new, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    seconds = time.perf_counter() - began
    print(f"{count} pages, {links} links, {size / 1e6:.1f} MB, {seconds:.0f} s: {os.path.relpath(out)}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
