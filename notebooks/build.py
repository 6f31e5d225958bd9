"""Make the notebooks from their sources.

    python notebooks/build.py              every NN_name.ipynb from its NN_name.py, executed, with its outputs
    python notebooks/build.py 05           only notebook 05
    python notebooks/build.py my_qlora     only my_qlora.py, the file of the six steps, from build_it.py
    python notebooks/build.py --check      what CI runs: do they run, and is each .ipynb what its source gives?
    python notebooks/build.py --solutions FOLDER   the solution versions, executed, and my_qlora.py solved, for a teacher
    python notebooks/build.py --student FOLDER     what students need to answer and to grade, without the sources
    python notebooks/build.py --html FOLDER        pages for a browser (what is typeset in them loads MathJax from its server)

A source is a Python file in jupytext's percent format. A code cell tagged "exercise" defines one function exercise_K, in
which the solution lies between the lines "# BEGIN SOLUTION" and "# END SOLUTION". Two versions are made from it: the
student's has `raise NotImplementedError("your answer")` in place of that block, the solution version loses the two lines.

Built twice on one machine, with one BLAS kernel, a notebook has the same bytes. With another kernel the last digits of
what float32 arithmetic measures move, and the pixels drawn from it. --check allows for that (outputs.py says how far) and
names the cells that differ. The seconds are printed, and no notebook fails by them: --limit only ends one that hangs.
"""

import argparse
import os
import re
import shutil
import sys
import time
from pathlib import Path

import outputs
from grading import HERE, read, sources, tags

from tinylora.models.files import atomic

BEGIN, END, BLANK = "# BEGIN SOLUTION", "# END SOLUTION", 'raise NotImplementedError("your answer")'
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def split(code, solution):
    """An exercise's code without its marker lines: with its solution, or with BLANK instead."""
    lines = code.splitlines()
    begin, end = ([i for i, line in enumerate(lines) if line.strip() == mark] for mark in (BEGIN, END))
    if len(begin) != 1 or len(end) != 1 or begin[0] > end[0]:
        raise ValueError(f"an exercise needs one line {BEGIN!r} and after it one line {END!r}")
    (begin,), (end,) = begin, end
    indent = lines[begin][: -len(BEGIN)]
    return "\n".join([*lines[:begin], *(lines[begin + 1 : end] if solution else [indent + BLANK]), *lines[end + 1 :]])


def steps(text, solutions=False):
    """The file of the six steps, my_qlora.py, from the text of build_it.py: with its solutions, or with BLANK instead of each."""
    if solutions:
        return "".join(line for line in text.splitlines(keepends=True) if line.strip() not in (BEGIN, END))
    return re.sub(rf"^([ ]*){BEGIN}\n.*?^[ ]*{END}\n", lambda found: f"{found[1]}{BLANK}\n", text, flags=re.M | re.S)


def make(source, solutions=False):
    """The student's or the solution version of a source, not executed. ValueError names a cell that cannot be split."""
    import nbformat

    notebook = read(source)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:03d}"
        folded = {"jupyter": {"source_hidden": True}} if "hide-input" in tags(cell) else {}
        cell.metadata = nbformat.from_dict({"tags": tags(cell), **folded} if tags(cell) else {})
        if "exercise" in tags(cell):
            try:
                cell.source = split(cell.source, solutions)
            except ValueError as error:
                raise ValueError(f"{Path(source).name}, cell {i + 1}: {error}") from None
    notebook.metadata, notebook.nbformat, notebook.nbformat_minor = nbformat.from_dict(METADATA), 4, 5
    return notebook


def execute(notebook, limit):
    """Run a notebook in this folder on the running interpreter; ValueError names the cell that fails, or hangs.

    Its outputs are left without paths and addresses, which differ from run to run. Returns the seconds it took. BLAS has
    one thread unless the environment says otherwise: the matrices are small, and threads that wait for each other on a
    busy machine take ten times as long.
    """
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    began, at = time.perf_counter(), [0]
    # without folders to look in, python3 is the interpreter that runs this, whatever kernels the user has installed
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(
        notebook,
        km=kernel,
        resources={"metadata": {"path": str(HERE)}},
        timeout_func=lambda cell: max(0.1, limit - (time.perf_counter() - began)),
        startup_timeout=max(60, limit),
        iopub_timeout=max(60, limit),  # on a busy machine an output may come seconds after its cell has ended
        on_cell_start=lambda cell, cell_index: at.append(cell_index),
        record_timing=False,
        coalesce_streams=True,
        shutdown_kernel="immediate",
        extra_arguments=["--log-level=ERROR"],
    )
    client.log.disabled = True  # what it would say is in the errors below
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # OpenBLAS and MKL heed it if their own variables are not set
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONHASHSEED": "0"}
    try:
        client.execute(env=environment, cleanup_kc=True)
    except CellExecutionError as error:
        what = f"raised {error.ename}: {error.evalue}\n{error.traceback}"
        raise ValueError(f"{outputs.name(notebook.cells, at[-1])} {what}") from None
    except CellTimeoutError:
        where = outputs.name(notebook.cells, at[-1])
        raise ValueError(f"after {limit:g} seconds {where} has not ended: does it hang? (--limit)") from None
    except DeadKernelError:
        where = outputs.name(notebook.cells, at[-1])
        raise ValueError(f"in {where} its Python process died, perhaps for lack of memory") from None
    seconds = time.perf_counter() - began
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel's own names its version of Python
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "text" in output:
            output.text = plain(output.text)
        for kind in output.get("data", {}):
            if kind.startswith("text/"):
                output.data[kind] = plain(output.data[kind])
    return seconds


def plain(text):
    """A text output without the paths of this machine and without addresses in memory."""
    text = re.sub(r"\S*ipykernel_\d+/\d+\.py", "cell.py", text)
    for folder, name in ((HERE.parent, "."), (sys.prefix, "python"), (sys.base_prefix, "python"), (Path.home(), "~")):
        text = re.sub(rf"(?<![\w/.]){re.escape(str(folder))}(?=/)", name, text)
    return re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x…", text)


def build_steps(check):
    """Write the file of the six steps, my_qlora.py, from build_it.py, or check that it is what that gives. Answers are not overwritten."""
    target = HERE / "my_qlora.py"
    old, new = (
        target.read_text(encoding="utf-8") if target.exists() else "",
        steps((HERE / "build_it.py").read_text(encoding="utf-8")),
    )
    if check and old != new:
        raise ValueError("my_qlora.py is not what build_it.py gives; run `python notebooks/build.py my_qlora`")
    if old and old.count(BLANK) < new.count(BLANK):
        raise ValueError("my_qlora.py holds answers, which would be lost; move it away first")
    if not check:
        with atomic(target) as temporary:
            Path(temporary).write_text(new, encoding="utf-8", newline="\n")
    return f"{new.count(BLANK)} functions to write"


def form(notebook):
    """What two versions of a notebook must share: type, source and tags of every cell."""
    return [(cell.cell_type, cell.source, tags(cell)) for cell in notebook.cells]


def build(source, limit, folder=None):
    """Write a source's student version beside it, or its solution version into a folder.

    A notebook that someone has answered is not overwritten.
    """
    import nbformat

    target = (folder or source.parent) / f"{source.stem}.ipynb"
    answered = target.exists() and any("exercise" in tags(c) and BLANK not in c.source for c in read(target).cells)
    if answered and not folder:
        raise ValueError(f"{target.name} holds answers, which would be lost; move it away first")
    notebook = make(source, solutions=folder is not None)
    seconds = execute(notebook, limit)
    with atomic(target) as temporary:
        Path(temporary).write_text(nbformat.writes(notebook).rstrip() + "\n", encoding="utf-8", newline="\n")
    return f"{seconds:.1f} s"


def stale(target, student):
    """Why the notebook at a path is not the student version of its source, naming the first cell that differs; or None."""
    if not target.exists():
        return f"{target.name} does not exist"
    old, new = form(read(target)), form(student)
    for i in range(min(len(old), len(new))):
        if old[i] != new[i]:
            return f"{target.name} is stale: in its source {outputs.name(student.cells, i)} is another"
    return None if len(old) == len(new) else f"{target.name} is stale: {len(old)} cells, and {len(new)} in its source"


def check(source, limit):
    """Execute both versions without writing, and compare the notebook beside the source with its student version.

    Of the solution version only what differs is run: its exercises, what they need, and their grades.
    """
    target, student = source.with_suffix(".ipynb"), make(source)
    redo = f"run `python notebooks/build.py notebooks/{source.name}`"
    if why := stale(target, student):
        raise ValueError(f"{why}; {redo}")
    solved = make(source, solutions=True)
    solved.cells = [cell for cell in solved.cells if {"setup", "exercise"} & set(tags(cell)) or "grade(" in cell.source]
    seconds = [execute(version, limit) for version in (student, solved)]
    took = "student {:.1f} s, solutions {:.1f} s".format(*seconds)
    margins = {i: cell.metadata["margin"] for i, cell in enumerate(read(source).cells) if "margin" in cell.metadata}
    if found := outputs.differences(read(target), student, margins):
        what = f"{took}\n{target.name} holds other outputs than this run gave"
        raise ValueError("\n".join([f"{what}; if they are to change, {redo}", *found]))
    return took


def hand_out(source, folder):
    """Copy a notebook, its checks and figures and what grades it into a folder, if it is the student version of its source."""
    target = source.with_suffix(".ipynb")
    if not target.exists() or form(read(target)) != form(make(source)):
        raise ValueError(f"{target.name} is not the student version of its source: move your answers away and build it")
    own = f"nb{source.name[:2]}.py"
    rooms = [room for room in ("checks", "drawings") if (HERE / room / own).exists()]
    beside = [f"{room}/{name}" for room in rooms for name in ("__init__.py", own)]
    for name in (target.name, "grading.py", "marking.py", "conftest.py", "test_exercises.py", *beside):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / name, folder / name)
    return f"copied to {folder}"


FOLDED = """\
{%- extends "lab/index.html.j2" -%}
{%- block input -%}
{%- if cell.metadata.get("jupyter", {}).get("source_hidden") -%}
<details class="jp-Cell-inputWrapper"><summary>••• {{ cell.source.splitlines()[0].lstrip("# ") }}</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock input -%}
"""


def page(source, folder):
    """Write a built notebook as a page for a browser, in which folded cells can be opened."""
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(extra_loaders=[DictLoader({"folded.html.j2": FOLDED})], template_file="folded.html.j2")
    body, _ = exporter.from_notebook_node(read(source.with_suffix(".ipynb")))
    links = re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', body)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / f"{source.stem}.html") as temporary:
        Path(temporary).write_text(links, encoding="utf-8", newline="\n")
    return f"written to {folder}"


def solved_steps(folder):
    """Write the file of the six steps with its solutions into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "my_qlora.py") as temporary:
        text = steps((HERE / "build_it.py").read_text(encoding="utf-8"), solutions=True)
        Path(temporary).write_text(text, encoding="utf-8", newline="\n")
    return f"written to {folder}"


def hand_out_steps(folder):
    """Copy the file of the six steps, their page, their checks and the finale into a folder."""
    build_steps(check=True)
    for name in ("README.md", "my_qlora.py", "build_it.md", "finale.py", "checks/__init__.py", "checks/nbmy.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / name, folder / name)
    return f"copied to {folder}"


def without_dead_links(folder):
    """On the pages and notebooks that were handed out, leave only the text of links to files that were not."""
    import nbformat

    def mended(text):
        link = r"`[^`]*`|!\[[^\]]*\]\([^)]*\)|\[([^\]]+)\]\((?!#|\w+:)([^)#]+)(#[^)]*)?\)"  # or code, or an image
        return re.sub(link, lambda f: f[0] if f[2] is None or (folder / f[2]).exists() else f[1], text)

    for path in sorted((*folder.glob("*.md"), *folder.glob("*.ipynb"))):
        if path.suffix == ".md":
            text = mended(path.read_text(encoding="utf-8"))
        else:
            notebook = read(path)
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = mended(cell.source)
            text = nbformat.writes(notebook) + "\n"
        with atomic(path) as temporary:
            Path(temporary).write_text(text, encoding="utf-8", newline="\n")


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status 1 if a notebook raises, hangs, is stale (--check, --student), does not hold what it prints (--check), "
        "or holds answers that would be lost.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a source, or how it begins, such as 08 (all of them)")
    parser.add_argument(
        "--limit",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="when one that is still running is ended as if it hangs; half a minute is usual (1800)",
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--solutions", type=Path, metavar="FOLDER", help="write solution versions into FOLDER instead")
    way.add_argument("--student", type=Path, metavar="FOLDER", help="copy what students need into FOLDER, a new one")
    way.add_argument(
        "--html", type=Path, metavar="FOLDER", help="write pages for a browser into FOLDER, from what is built"
    )
    way.add_argument(
        "--check",
        action="store_true",
        help="write nothing; run both versions, compare each .ipynb with its source and with what it prints now",
    )
    args = parser.parse_args(argv)
    if args.solutions and args.solutions.resolve() == HERE:
        parser.error("--solutions would overwrite the student versions; name another folder")
    if args.student and args.student.exists() and (not args.student.is_dir() or any(args.student.iterdir())):
        parser.error(f"--student would overwrite what is in {args.student}; name a new folder")
    stems = tuple(Path(name).stem for name in args.names)
    own = (HERE / "build_it.py").exists() and (not stems or "my_qlora" in stems)
    if args.html and "my_qlora" in stems:
        parser.error("my_qlora is no notebook and has no page of its own; build_it.md tells of its steps")
    for stem in stems:
        if stem != "my_qlora" and not any(source.stem.startswith(stem) for source in sources()):
            parser.error(f"no source begins with {stem!r}; expected one of {[s.stem for s in sources()]}")
    failed = False
    if own and not args.html:
        try:
            if args.student:
                said = hand_out_steps(args.student)
            else:
                said = solved_steps(args.solutions) if args.solutions else build_steps(args.check)
            print(f"my_qlora: {said}", flush=True)
        except (ValueError, OSError) as error:
            print(f"my_qlora: {error}", file=sys.stderr, flush=True)
            failed = True
    if stems == ("my_qlora",):
        return int(failed)
    for source in (source for source in sources() if source.stem.startswith(stems or "")):
        try:
            if args.student:
                said = hand_out(source, args.student)
            elif args.html:
                said = page(source, args.html)
            else:
                said = check(source, args.limit) if args.check else build(source, args.limit, args.solutions)
            print(f"{source.stem}: {said}", flush=True)
        except (ValueError, ImportError, OSError) as error:
            print(f"{source.stem}: {error}", file=sys.stderr, flush=True)
            failed = True
    if args.student:
        without_dead_links(args.student)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
