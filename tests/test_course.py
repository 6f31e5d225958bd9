"""The course as a whole: one path, links that lead somewhere, algorithms in open cells, questions and tests that name each other."""

import ast
import re

import pytest

pytest.importorskip("jupytext", reason="the notebooks need jupytext: pip install -e '.[notebooks]'")

from test_notebooks import LAST_OF_THE_CORE, NOTEBOOKS, build, grading, linux, shown_open

import marking  # isort: skip

SOURCES = grading.sources()
TOP = NOTEBOOKS.parent
PAGE, README = ((NOTEBOOKS / name).read_text(encoding="utf-8") for name in ("build_it.md", "README.md"))
each = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def markdown(source):
    """All Markdown of a notebook."""
    return "\n\n".join(cell.source for cell in grading.read(source).cells if cell.cell_type == "markdown")


def title(source):
    """Its title, without its number."""
    return re.match(r"# \d\d · (.*?)(?: \(appendix\))?\n", markdown(source))[1]


def sections(source):
    """The numbers of its sections."""
    return [int(k) for k in re.findall(r"^## (\d+) · ", markdown(source), re.M)]


def test_the_core_is_at_most_ten_and_all_are_numbered_in_order():
    numbers = [source.name[:2] for source in SOURCES]
    assert numbers == [f"{k:02d}" for k in range(1, len(numbers) + 1)] and LAST_OF_THE_CORE == "10"


@each
def test_a_notebook_leads_to_the_one_before_and_the_one_after(source):
    i, head = SOURCES.index(source), grading.read(source).cells[0].source
    links = re.findall(r"\[(← )?(\d\d) ([^\]]*?)( →)?\]\((\w+)\.ipynb\)", head.partition("**Question")[0])
    expected = [("←", s) for s in SOURCES[max(i - 1, 0) : i]] + [("→", s) for s in SOURCES[i + 1 : i + 2]]
    assert [((before or after).strip(), name) for before, _, _, after, name in links] == [
        (way, s.stem) for way, s in expected
    ]
    assert [(number, text) for _, number, text, _, _ in links] == [(s.name[:2], title(s)) for _, s in expected]


@each
def test_every_link_and_section_exists(source):
    text = markdown(source)
    for name, target in re.findall(r"\[([^\]]*)\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (NOTEBOOKS / target).exists(), f"{source.name}: [{name}]({target})"
    for stem, first, rest in re.findall(r"\]\((\w+)\.ipynb\),\s+sections?\s+(\d+)((?:(?:, | and | to )\d+)*)", text):
        there = sections(NOTEBOOKS / f"{stem}.py")
        assert {int(first), *map(int, re.findall(r"\d+", rest))} <= set(there), (
            f"{source.name}: {stem}, section {first}{rest}"
        )
    for number in re.findall(r"[Nn]otebooks?\s+(\d\d)\b", text):
        assert any(s.name.startswith(number) for s in SOURCES), f"{source.name} names notebook {number}"


def test_the_page_of_notebooks_names_each_with_its_hours_and_its_question():
    for source in SOURCES:
        head = markdown(source)
        hours = re.search(r"\*\*Hours:\*\* (\S+)", head)[1]
        row = re.search(
            rf"^\| \[{source.name[:2]} ([^\]]*)\]\({source.stem}\.ipynb\) \| (\S+) \| (.*) \|$", README, re.M
        )
        assert row and (row[1], row[2]) == (title(source), hours), source.stem
        if source.name[:2] <= LAST_OF_THE_CORE:
            question = " ".join(re.search(r"\*\*Question\.\*\* ([^?]*\?)", head)[1].split())
            assert row[3] == question, source.stem


@pytest.mark.parametrize(
    "number, names",
    [
        ("02", {"linear", "backward", "overwrite", "at_once", "one_path"}),  # the walk, and three wrong ones
        ("07", {"TwoWeights", "slope"}),
        ("16", {"lloyd"}),
        ("22", {"lloyd"}),
        ("08", {"adamw"}),
        ("12", {"train_lora"}),
        ("14", {"adam", "adam_norm", "first_step"}),
        ("20", {"alternate"}),  # LoftQ
    ],
)
def test_what_the_prose_names_stands_open(number, names):
    source = next(s for s in SOURCES if s.name.startswith(number))
    assert names <= shown_open(source), names - shown_open(source)


def test_the_first_notebook_shows_a_whole_training_loop():
    cells = [c for c in grading.read(SOURCES[0]).cells if c.cell_type == "code" and not grading.tags(c)]
    loop = next(c.source for c in cells if "optimizer.step(" in c.source)
    assert (
        loop.index("zero_grad()") < loop.index(".backward()") < loop.index("optimizer.step(")
        and len(loop.splitlines()) <= 20
    )


@pytest.mark.parametrize(
    "number, section, issues, test",
    [
        ("04", 3, ("1311", "1551"), "tests/test_rounding.py::test_the_gpu_rule_is_what_a_gpu_wrote"),
        ("08", 6, ("801", "962"), "tests/test_paging.py::test_whole_tensors_pages_what_bitsandbytes_pages"),
    ],
)
def test_a_question_and_its_test_name_each_other(number, section, issues, test):
    source, (file, name) = next(s for s in SOURCES if s.name.startswith(number)), test.split("::")
    text = markdown(source)
    assert all(issue in text for issue in issues) and name in text and section in sections(source)
    functions = {
        node.name: node
        for node in ast.parse((TOP / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    said = ast.get_docstring(functions[name])
    assert f"notebooks/{source.name}, section {section}" in said and all(issue in said for issue in issues)
    row = next(line for line in README.splitlines() if issues[0] in line)
    assert f"[{number}]({source.stem}.ipynb), section {section} " in row and f"`{file}`" in row


# ------------------------------------------------------------------------------------------------------------------- the steps


def test_the_page_of_the_steps_names_every_function_and_the_points():
    grading.load_checks()
    names = {
        node.name
        for node in ast.parse((NOTEBOOKS / "build_it.py").read_text(encoding="utf-8")).body
        if hasattr(node, "name")
    }
    rows = re.findall(r"^\| \[(\d)\]\(#(\S+)\) \| (.*?) \| (\d+) \| ", PAGE, re.M)
    assert [int(k) for k, *_ in rows] == [1, 2, 3, 4, 5, 6]
    assert sorted(re.findall(r"`(\w+)`", " ".join(row[2] for row in rows))) == sorted(names)
    for k, _, _, points in rows:
        assert int(points) == sum(part.points for part in grading.CHECKS[f"my-{k}"]), f"step {k}"
    assert PAGE.count("<details>") == PAGE.count("</details>") >= 12
    wide = [line for line in PAGE.splitlines() if len(line) > 90 and not line.startswith("|")]
    assert wide == []


def test_folded_cells_fold_in_a_page_for_a_browser(tmp_path):
    pytest.importorskip("nbconvert", reason="pages need nbconvert, which comes with pip install -e '.[notebooks]'")
    source = next(s for s in SOURCES if s.name.startswith("05"))
    build.page(source, tmp_path)
    page = (tmp_path / f"{source.stem}.html").read_text(encoding="utf-8")
    folded = [cell for cell in grading.read(source).cells if "hide-input" in grading.tags(cell)]
    assert page.count('<details class="jp-Cell-inputWrapper">') == len(folded) > 3
    assert 'href="04_blockwise_absmax.html"' in page and "<details open" not in page
    built = grading.read(source.with_suffix(".ipynb"))
    assert all(
        c.metadata["jupyter"]["source_hidden"] for c in built.cells if "hide-input" in c.metadata.get("tags", [])
    )


# -------------------------------------------------------------------------------------- answers that once passed, and are no answers

FRAME = """
    frame = __import__("sys")._getframe(1)
    while frame:
        for value in list(frame.f_locals.values()):
            if hasattr(value, "dequantize"):
                return value.dequantize()
        frame = frame.f_back
"""
SHORTCUTS = {
    "03-2": """
    from tinylora.costs import flops as counted
    from tinylora.nn import Linear as Dense

    class Net(tl.nn.Module):
        def __init__(self):
            made = [tl.LoRALinear(Dense(n, m), r=r) if h == "lora" else Dense(n, m) for n, m, h in zip(sizes, sizes[1:], how)]
            self.layers = [one.requires_grad_(False) if h == "frozen" else one for one, h in zip(made, how)]

        def forward(self, x):
            return self.layers[1](ops.relu(self.layers[0](x)))

    with counted.counting() as count:
        Net()(tl.Tensor(np.ones((tokens, sizes[0]), np.float32))).backward(np.ones((tokens, sizes[2]), np.float32))
    return count.multiply_adds
""",
    "04-1": FRAME,
    "05-2": "    return __import__('sys')._getframe(1).f_locals['offset']",
    "06-1": """
    import tinylora as tl
    for blocksize in range(1, min(size, 500)):
        if tl.quantize(np.zeros(size, np.float32), blocksize=blocksize, double_quant=True).nbytes <= budget:
            return blocksize
""",
    "17-1": """
    from tinylora.numerics import optimality
    h = 1e-5
    E = lambda q: optimality.expected_error(q, blocksize, 2, signed)
    return np.array([(E(q + h * e) - E(q - h * e)) / 2 / h for e in np.eye(len(q))])
""",
    "17-3": """
    from tinylora.numerics import optimality
    start = np.concatenate([np.linspace(-0.9, 0, below + 1), np.linspace(0, 1, 16 - below)[1:]])
    return optimality.optimal_code(int(sum(sizes) / 2), 2, pins=(0, 1), signed=True, start=start)
""",
}


@linux
@pytest.mark.parametrize("exercise", SHORTCUTS)
def test_a_shortcut_is_not_right(exercise):
    import nbformat

    source = next(s for s in SOURCES if s.name.startswith(exercise[:2]))
    notebook = build.make(source)
    cell = next(c for c in notebook.cells if f"def exercise_{exercise[3:]}(" in c.source)
    cell.source = cell.source.replace(f"    {build.BLANK}", SHORTCUTS[exercise].strip("\n"))
    student = marking.Student(60, 2)
    try:
        found = student.mark(source.with_suffix(".ipynb"), nbformat.writes(notebook), exercise, 1)
    finally:
        student.close()
    assert found.points == 0 and found.said.startswith("not right") and "NameError" not in found.said, found
    assert exercise not in ("03-2", "06-1") or "memory" in found.said, found  # what these ask for fits into none


def test_a_look_at_the_callers_frame_is_noticed(rng):
    def peeking(code):
        return __import__("sys")._getframe(1).f_locals["offset"]

    said = grading.verdict("05-2", peeking, rng).said
    assert (
        said
        == "not right: it looks at the frame of its caller, which knows the answer; the arguments are all that is needed"
    )


def test_what_is_handed_out_links_only_to_itself(tmp_path):
    (tmp_path / "build_it.md").write_text(
        "[a](README.md#x), [b](../tinylora/quant.py), [c](#c), [d](https://d.org), `q[i](x)`, ![p](x.svg) and [e f](TEACHING.md)."
    )
    (tmp_path / "README.md").write_text("[all](build_it.md)")
    build.without_dead_links(tmp_path)
    assert (
        tmp_path / "build_it.md"
    ).read_text() == "[a](README.md#x), b, [c](#c), [d](https://d.org), `q[i](x)`, ![p](x.svg) and e f."
    assert (tmp_path / "README.md").read_text() == "[all](build_it.md)"
