"""Build the course for a browser: notebooks 01 and 02 on a page of JupyterLite, where Python runs in the browser and nothing is installed.

    python docs/lite.py                     into docs/_build/lite; Python itself comes from a public address, cdn.jsdelivr.net
    python docs/lite.py --pyodide FOLDER    with Python in the site, so that no request leaves it
    python docs/lite.py --out FOLDER        into FOLDER, which must be new, empty or an earlier site
    python -m http.server -d docs/_build/lite

Then open http://localhost:8000/notebooks/index.html?path=01_qlora_happens.ipynb and choose Run, Run All Cells. The site is a folder of
files for any web server. It needs `pip install -e '.[lite]'`, and a network while it is built: pip fetches three small packages.

The FOLDER of --pyodide is an unpacked full distribution of Pyodide, the release file pyodide-VERSION.tar.bz2. It must be the VERSION
that this command prints, since the page and its Python go together.

The notebooks of the repository stay as they are. The copies in the site begin with a cell that installs tinylora from the site, have
no stored outputs, and links to files that the site lacks are text. Notebook 01 trains for 20 steps there and not for 60, since a
browser multiplies matrices more slowly (docs/zero_install.md has the seconds).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS / "_ext"))

from folders import replace  # noqa: E402

NOTEBOOKS = ("01_qlora_happens", "02_a_small_autograd")
INSTALL = "%pip install -q tinylora tinylora-course matplotlib"
FROM_PYODIDE = ("numpy", "scipy")  # tinylora's compiled dependencies, which Pyodide has
FROM_SITE = ("comm",)  # what the kernel asks PyPI for
KERNEL = "@jupyterlite/pyodide-kernel-extension:kernel"
NEEDED = ("ipython", "jedi", "matplotlib", "micropip", "numpy", "scipy")  # of a Pyodide distribution
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#]+)(?:#[^)]*)?\)")

#: (what stands in notebook 01, what stands in its copy, how often)
SHORTER = (
    ("60 * 8, seed=2).reshape(60,", "20 * 8, seed=2).reshape(20,", 1),
    ("if step % 15 == 0:", "if step % 10 == 0:", 1),
    ("Every 15 steps", "Every 10 steps", 1),
    ("60 steps", "20 steps", 3),
)


def course_copy(name, text, there):
    """A notebook's text for the site, which has the files `there`."""
    notebook = json.loads(text)
    says = "**In the browser.** The cell below installs tinylora into this page. It takes less than a minute."
    if name == NOTEBOOKS[0]:
        says += " Training takes 20 steps here, and 60 in the repository, where NumPy is faster."
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])
        for old, new, times in SHORTER:
            if (found := sum(cell["source"].count(old) for cell in notebook["cells"])) != times:
                raise ValueError(
                    f"{name}.ipynb has {old!r} {found} times; expected {times}, see SHORTER in docs/lite.py"
                )
            for cell in notebook["cells"]:
                cell["source"] = cell["source"].replace(old, new)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
        else:
            source = LINK.sub(lambda found: found[0] if found[2] in there else found[1], source)
        cell["source"] = source
    first = {"cell_type": "code", "id": "lite-install", "metadata": {}, "execution_count": None, "outputs": []}
    notebook["cells"][1:1] = [
        {"cell_type": "markdown", "id": "lite-says", "metadata": {}, "source": says},
        {**first, "source": INSTALL},
    ]
    notebook["metadata"]["kernelspec"] = {"display_name": "Python (Pyodide)", "language": "python", "name": "python"}
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def requirements(project):
    """The packages that the site carries beside tinylora, as pip is told."""
    pure = [line for line in project["dependencies"] if re.match(r"[\w-]+", line)[0] not in FROM_PYODIDE]
    return [*pure, *FROM_SITE]


def course_package(folder, version):
    """Write the source of tinylora-course: what the notebooks import that is not tinylora."""
    numbers = [name[:2] for name in NOTEBOOKS]
    files = ["grading.py"] + [f"{room}/nb{n}.py" for room in ("checks", "drawings") for n in numbers]
    for name in (*files, "checks/__init__.py", "drawings/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "notebooks" / name, folder / name)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling>=1.27"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "tinylora-course"\nversion = "{version}"\n'
        '[tool.hatch.build.targets.wheel]\nonly-include = ["grading.py", "checks", "drawings"]\n',
        encoding="utf-8",
    )


def config(url, alone):
    """The site's jupyter-lite.json: where Python comes from, and whether packages may come from PyPI."""
    settings = {"pyodideUrl": url, **({"disablePyPIFallback": True} if alone else {})}
    data = {"appName": "tinylora in a browser", "litePluginSettings": {KERNEL: settings}}
    return json.dumps({"jupyter-lite-schema-version": 0, "jupyter-config-data": data}, indent=1) + "\n"


def normal(name):
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def missing(folder, version):
    """What a folder lacks that should be this version of Pyodide's distribution: file names, and the version; sorted."""
    files = {"pyodide.mjs", "pyodide.asm.wasm", "pyodide-lock.json", "python_stdlib.zip"}
    lacks = {name for name in files if not (folder / name).is_file()}
    if "pyodide-lock.json" in lacks:
        return sorted(lacks)
    lock = json.loads((folder / "pyodide-lock.json").read_text(encoding="utf-8"))
    if (found := lock.get("info", {}).get("version")) != version:
        lacks.add(f"version {version} (its own is {found})")
    packages, waiting = {normal(name): package for name, package in lock["packages"].items()}, [*NEEDED]
    for name in waiting:  # the list grows while it is walked
        if name not in packages:
            lacks.add(f"the package {name}")
            continue
        if not (folder / packages[name]["file_name"]).is_file():
            lacks.add(packages[name]["file_name"])
        waiting += [one for one in map(normal, packages[name]["depends"]) if one not in waiting]
    return sorted(lacks)


def run(*command, cwd=None):
    """Run a command and show what it says only if it fails."""
    done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise SystemExit(f"the site was not built: `{command[0]} {command[1]}` failed, and says why above")


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status 1 if the site cannot be built, with a sentence that says why; the folder is then as it was.",
    )
    parser.add_argument(
        "--out", type=Path, default=DOCS / "_build" / "lite", metavar="FOLDER", help="where (docs/_build/lite)"
    )
    parser.add_argument(
        "--pyodide", type=Path, metavar="FOLDER", help="an unpacked Pyodide distribution, copied into the site"
    )
    args = parser.parse_args(argv)
    out, began = args.out.resolve(), time.perf_counter()
    if out.exists() and not (out.is_dir() and ((out / "jupyter-lite.json").exists() or not any(out.iterdir()))):
        parser.error(f"{args.out} exists and is no site of JupyterLite; name a new folder")
    try:
        import jupyterlite_core  # noqa: F401
        from jupyterlite_pyodide_kernel.constants import PYODIDE_CDN_URL, PYODIDE_VERSION
    except ImportError as error:
        parser.error(f"{error.name} is not installed; run pip install -e '.[lite]'")
    if args.pyodide and (lacks := missing(args.pyodide, PYODIDE_VERSION)):
        parser.error(
            f"{args.pyodide} lacks {', '.join(lacks[:5])}{' and more' * (len(lacks) > 5)}; "
            f"expected an unpacked full distribution of Pyodide {PYODIDE_VERSION}"
        )
    work, new = DOCS / "_build" / "lite-src", DOCS / "_build" / "lite-new"
    for old in (work, new):
        shutil.rmtree(old, ignore_errors=True)
    contents, wheels = work / "contents", work / "pypi"
    contents.mkdir(parents=True)
    there = {f"{name}.ipynb" for name in NOTEBOOKS}
    for name in NOTEBOOKS:
        text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
        (contents / f"{name}.ipynb").write_text(course_copy(name, text, there), encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = re.search(r'__version__ = "(.+)"', (ROOT / "tinylora" / "__init__.py").read_text(encoding="utf-8"))[1]
    course_package(work / "course", version)
    run("pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT, work / "course", *requirements(project))
    if args.pyodide:
        (work / "static").mkdir()
        (work / "static" / "pyodide").symlink_to(args.pyodide.resolve(), target_is_directory=True)
    url = "./static/pyodide/pyodide.mjs" if args.pyodide else f"{PYODIDE_CDN_URL}/pyodide.mjs"
    (work / "jupyter-lite.json").write_text(config(url, bool(args.pyodide)), encoding="utf-8")
    where = ("--lite-dir", work, "--contents", contents, "--output-dir", new)
    apps = "--apps=lab", "--apps=notebooks", "--apps=tree"
    run("jupyterlite_core", "build", *where, *apps, "--no-sourcemaps", cwd=work)
    replace(new, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(
        f"{os.path.relpath(out)}: {size / 1e6:.0f} MB in {time.perf_counter() - began:.0f} s, with tinylora {version}"
    )
    print(
        f"Python: Pyodide {PYODIDE_VERSION} from {PYODIDE_CDN_URL}"
        if not args.pyodide
        else f"Python: {args.pyodide}, in the site"
    )
    print(f"python -m http.server -d {os.path.relpath(out)}")
    print(*(f"http://localhost:8000/notebooks/index.html?path={name}.ipynb" for name in NOTEBOOKS), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
