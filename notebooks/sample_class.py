"""A class of eight invented students, with usual mistakes, for a teacher to grade before the first real one.

    python notebooks/sample_class.py FOLDER             folders, as Moodle gives them
    python notebooks/sample_class.py FOLDER --canvas    files, as Canvas gives them
    python notebooks/sample_class.py FILE --open 1 3    a my_qlora.py in which only steps 1 and 3 are to be written

Each student hands in my_qlora.py and notebooks 05 and 07, or some of these. The files are made from the solutions (build_it.py and
the notebooks' sources) by replacing lines, so this is not for students. It prints the command that grades the class. The last form is
for a course of one day, and its file holds the solutions of the other steps.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

import build
from grading import HERE, tags

STEPS, NF4, LAYER = "my_qlora.py", "05_building_nf4.ipynb", "07_the_qlora_layer.ipynb"
ALL = (STEPS, NF4, LAYER)

HELPER = """
def means_of(values):
    return (values[:-1] + values[1:]) / 2
"""

# (name, id, what it is about, the files, {file: [(what stands in the solution, what the student wrote), …]})
CLASS = [
    ("Amara Okafor", 4101, "everything is right", ALL, {}),
    (
        "Bram de Wit",
        4102,
        "cuts instead of rounding, has ε inside the root, and keeps a helper in another cell",
        ALL,
        {
            STEPS: [
                ("np.round(127 * rows", "np.trunc(127 * rows"),
                ("np.sqrt(v / (1 - beta2**t)) + eps", "np.sqrt(v / (1 - beta2**t) + eps)"),
            ],
            NF4: [("    q = (Q[:-1] + Q[1:]) / 2\n    return q / q.max()", "    q = means_of(Q)\n    return q / q.max()")],
        },
    ),
    (
        "Chiara Russo",
        4103,
        "does not clear the gradients, has the wrong denominator, and forgets that groups of rows share an input",
        ALL,
        {
            STEPS: [("            p.grad = None\n", "            pass\n")],
            NF4: [("D = 2**k + 2", "D = 2**k + 1")],
            LAYER: [("x_bar += g[:, start:end] @ w", "x_bar = g[:, start:end] @ w")],
        },
    ),
    (
        "Deniz Aydin",
        4104,
        "computes all distances, forgets the scale twice, and takes W − Ŵ to be orthogonal to Ŵ",
        ALL,
        {
            STEPS: [
                ("np.searchsorted(middles, x).astype", "np.abs(x[..., None] - NF4).argmin(-1).astype"),
                ("s * (u @ layer", "(u @ layer"),
                ('np.float32(layer["s"]) * (layer["B"] @', '(layer["B"] @'),
            ],
            LAYER: [("cross *= float((w * w_hat).sum()) / energy", "cross *= 1.0")],
        },
    ),
    (
        "Esther Lindqvist",
        4105,
        "is half done: steps 1 to 3, and exercise 05-1",
        (STEPS, NF4),
        {STEPS: ["adamw", "paged_adamw", "train", "merge", "merge_into_nf4"], NF4: ["exercise_2"]},
    ),
    (
        "Farid Haddad",
        4106,
        "calls the library's own quantize in step 1",
        (STEPS, NF4),
        {
            STEPS: [
                (
                    "    n = w.size\n    rows",
                    "    q = __import__('tinylora').quantize(w, 'nf4', blocksize)\n    return q.packed, q.absmax\n    rows",
                )
            ]
        },
    ),
    (
        "Grace Mbeki",
        4107,
        "bisects until two floats meet, which they never do",
        (STEPS, NF4),
        {NF4: [("for _ in range(60):", "while hi - lo > 0:")]},
    ),
    (
        "Hana Sato",
        4108,
        "has lost a bracket in the last edit before handing in",
        (STEPS, NF4),
        {STEPS: [("absmax, blocksize)[:n]).reshape(shape)", "absmax, blocksize)[:n].reshape(shape)")]},
    ),
]  # fmt: skip


def changed(text, changes, where):
    """A text with some replacements, each of which must find its place exactly once."""
    for old, new in changes:
        if text.count(old) != 1:
            raise ValueError(f"{where}: {old!r} stands there {text.count(old)} times, expected once")
        text = text.replace(old, new)
    return text


def steps(changes):
    """The text of a student's my_qlora.py."""
    text = (HERE / "build_it.py").read_text(encoding="utf-8")
    open_ones = [one for one in changes if isinstance(one, str)]
    for name in open_ones:  # as in the file that students get
        begin = text.index(f"\ndef {name}(")
        end = text.index(build.END, begin)
        text = text[:begin] + build.steps(text[begin : end + len(build.END) + 1]) + text[end + len(build.END) + 1 :]
    return changed(build.steps(text, solutions=True), [one for one in changes if not isinstance(one, str)], STEPS)


def functions_of(step):
    """The names of the functions of a step."""
    text = (HERE / "build_it.py").read_text(encoding="utf-8")
    parts = re.split(r"^# -+ step (\d):.*$", text, flags=re.M)
    return re.findall(r"^def (\w+)\(", dict(zip(parts[1::2], parts[2::2], strict=True))[str(step)], re.M)


def notebook(name, changes):
    """The text of a student's notebook; a helper that an answer names stands in a cell of its own."""
    import nbformat

    source = HERE / name.replace(".ipynb", ".py")
    made, student = build.make(source, solutions=True), build.make(source)
    exercises = [i for i, cell in enumerate(made.cells) if "exercise" in tags(cell)]
    for i in exercises:
        if any(isinstance(one, str) and f"def {one}(" in made.cells[i].source for one in changes):
            made.cells[i] = student.cells[i]
    for old, new in (one for one in changes if not isinstance(one, str)):
        found = [i for i in exercises if old in made.cells[i].source]
        if len(found) != 1:
            raise ValueError(f"{name}: {old!r} stands in {len(found)} exercises, expected one")
        made.cells[found[0]].source = changed(made.cells[found[0]].source, [(old, new)], name)
        if "means_of" in new:
            made.cells.insert(found[0], nbformat.v4.new_code_cell(HELPER.strip(), id="helper"))
            exercises = [i + (i >= found[0]) for i in exercises]
    return nbformat.writes(made) + "\n"


def path_of(name, number, file, canvas, submission):
    """Where a platform puts a file that a student hands in."""
    if not canvas:
        return f"{name}_{number}_assignsubmission_file_/{file}"
    *first, last = name.lower().split()
    return f"{last}{''.join(first)}_{'LATE_' * (number == 4105)}{number}_{submission}_{file}"


def main(argv=None):
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder, or with --open a new file")
    parser.add_argument("--canvas", action="store_true", help="name the files as Canvas does, not as Moodle does")
    parser.add_argument(
        "--open", nargs="+", type=int, choices=range(1, 7), metavar="STEP", help="write one file instead"
    )
    args = parser.parse_args(argv)
    if args.open:
        if args.folder.exists():
            parser.error(f"{args.folder} exists; name a new file")
        args.folder.write_text(
            steps([f for step in args.open for f in functions_of(step)]), encoding="utf-8", newline="\n"
        )
        print(f"{args.folder}: open are {', '.join(f for step in args.open for f in functions_of(step))}")
        return 0
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        parser.error(f"this would mix with what is in {args.folder}; name a new folder")
    submission = 90_000
    for name, number, about, files, changes in CLASS:
        for file in files:
            submission += 1
            target = args.folder / path_of(name, number, file, args.canvas, submission)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = (steps if file == STEPS else lambda c, file=file: notebook(file, c))(changes.get(file, []))
            target.write_text(text, encoding="utf-8", newline="\n")
        print(f"{name:17} {about}")
    print(
        f"\nGrade them: pytest notebooks --answers {shlex.quote(str(args.folder))} --table marks.csv --seed 7 --limit 60"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
