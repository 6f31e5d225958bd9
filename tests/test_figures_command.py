"""tinylora figures: the same bytes again, legible on a phone and without colours; and the gallery that shows them."""

import importlib.util
import json
import math
import re
import xml.dom.minidom
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import matplotlib

from tinylora.cli import main
from tinylora.figures import style
from tinylora.papers import gallery, normality
from tinylora.training.finetune import Job, inputs

TOP = Path(__file__).parents[1]
FIGURES, GALLERY = TOP / "figures", (TOP / "docs" / "gallery.md").read_text(encoding="utf-8")
#: Neither trained here nor computed by a product of matrices: the bytes do not depend on the BLAS kernel.
EXACT = [name for name in gallery.PICTURES if not name.startswith("claims/")]
PHONE = 390  # pixels


@pytest.fixture(scope="module")
def drawn():
    """{name: SVG} of the figures that take no training, and of one that does."""
    return {name: svg for name, svg, _ in gallery.draw([*EXACT, "claims/aligned_first_step"], FIGURES / "data")}


def test_every_file_has_its_place_in_the_table_and_every_long_run_its_numbers():
    assert {str(path.relative_to(FIGURES).with_suffix("")) for path in FIGURES.rglob("*.svg")} == set(gallery.PICTURES)
    stored = {name for name, picture in gallery.PICTURES.items() if picture.stored}
    assert {path.stem for path in (FIGURES / "data").iterdir()} == stored | {"bench-avx2"}  # a table without a figure


@pytest.mark.parametrize("name", EXACT)
def test_the_committed_file_is_what_is_drawn(name, drawn):
    committed = (FIGURES / f"{name}.svg").read_bytes()
    version = re.search(rb"Matplotlib v([0-9.]+[0-9])", committed)[1].decode()
    if version != matplotlib.__version__:
        pytest.skip(
            f"matplotlib {version} drew the committed file, and {matplotlib.__version__} places letters otherwise"
        )
    assert drawn[name] == committed


@pytest.mark.parametrize("name", ["curves-base", "tape", "claims/aligned_first_step"])
def test_drawn_twice_the_bytes_are_the_same(name, drawn, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["serif"])  # as a matplotlibrc of somebody's may say
    (again,) = [svg for _, svg, _ in gallery.draw([name], FIGURES / "data")]
    assert again == drawn[name] and b"<dc:date>" not in again


def sizes(svg):
    """(width of the figure, the sizes of its letters), in points; the small ones of an exponent are not counted."""
    letters = re.findall(r'<g (?:style="[^"]*" )?transform="[^"]*scale\(([\d.]+) -[\d.]+\)">', svg)
    return float(re.search(r'<svg [^>]*?width="([\d.]+)pt"', svg)[1]), {100 * float(size) for size in letters}


@pytest.mark.parametrize("name", gallery.PICTURES)
def test_letters_are_legible_on_a_phone(name):
    width, letters = sizes((FIGURES / f"{name}.svg").read_text(encoding="utf-8"))
    assert len(letters) > 1 and min(letters) * PHONE / width > 8.9, f"{min(letters)} points in {width}"


def test_letters_stand_out_from_the_paper_and_long_titles_are_broken():
    with style.one_column():
        figure, (left, right) = style.canvas(9, 3, ncols=2, sharey=True)
    left.set(ylabel="bits")
    left.set_title("a title of one panel: which says much more than there is room for in one line of a column")
    text = right.text(0, 0, "pale", color="0.8", fontsize=5)
    white = right.text(0, 0, "on a bar", color="white")
    style._fit(figure)
    assert left.get_position().y0 > right.get_position().y1 and right.get_ylabel() == "bits"
    assert 1 < len(left.get_title().splitlines()) < 4 and max(map(len, left.get_title().splitlines())) <= style.LETTERS
    assert 1.05 / (style.luminance(text.get_color()) + 0.05) >= style.CONTRAST and text.get_fontsize() == style.SMALLEST
    assert white.get_color() == (1, 1, 1)
    assert style.canvas(9, 3, ncols=2)[0].get_figwidth() == 9, "a notebook's figure is wide"


# ------------------------------------------------------------------------------------------------------------------- the numbers
def table(heading):
    """The cells of the first table after a heading of figures/README.md."""
    text = (FIGURES / "README.md").read_text(encoding="utf-8").partition(f"# {heading}\n")[2]
    rows = re.search(r"(?:^ *\|.*\n)+", text, re.M)[0].splitlines()
    return [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]


def stored(name):
    return json.loads((FIGURES / "data" / f"{name}.json").read_text(encoding="utf-8"))


def mean_and_deviation(values):
    mean = sum(values) / len(values)
    return f"{mean:.4f} ± {(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5:.4f}"


def test_the_stored_numbers_are_those_of_the_tables():
    rows = table("Full fine-tuning, LoRA and QLoRA on the embedded model")[2:]
    for run, row in zip(stored("compare")["methods"].values(), rows, strict=True):
        held = run["bytes"]
        assert mean_and_deviation(run["after"]) == row[2] and f"{held['optimizer state']:,}" == row[6]
        assert f"{held['frozen weights'] + held['trained weights']:,}" == row[5]
    compare = stored("compare")["methods"]
    for method, run in stored("curves-base")["methods"].items():
        assert [values[-1] for values in run["heldout"]] == compare[method]["after"]
    for run, row in zip(stored("curves-smollm2")["methods"].values(), table("A real LLM")[2:], strict=True):
        assert f"{run['before']:.4f}" == row[1] and mean_and_deviation([v[-1] for v in run["heldout"]]) == row[2]
    for by_rank, row in zip(stored("ranks")["targets"].values(), table("Is a rank of 1 enough?")[2:], strict=True):
        assert list(map(mean_and_deviation, by_rank.values())) == row[1:]
    times = {
        f"{100 * c['fraction']:.0f} %": f"{c['time_ratio']:.1f}"
        for c in stored("paging")["costs"]
        if c["order"] == "back and forth" and not c["prefetch"]
    }
    head, _, row = table("Paging")
    assert [times[share] for share in head[1:]] == row[1:]
    kinds = stored("normality")["kinds"]
    rows = sum(kind["rows"] for kind in kinds)
    said = f"rejects {100 * sum(kind['rejected'] for kind in kinds) / rows:.1f} % of SmolLM2's {rows:,} rows"
    assert said in (FIGURES / "README.md").read_text(encoding="utf-8")
    data = stored("normality")
    for law, group in normality.drawn(data["lengths"][0], data["draws"]).items():
        assert group.rejected == data["rejected"][law][0] / data["draws"], law


def test_the_numbers_of_runs_are_copied_and_print_the_rows_of_the_tables(tmp_path, monkeypatch, capsys):
    """From reports that say what the stored numbers say, the same files and the rows of the page come out."""
    spec = importlib.util.spec_from_file_location("from_runs", FIGURES / "from_runs.py")
    from_runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(from_runs)
    monkeypatch.setattr(from_runs, "DATA", tmp_path / "data")

    here = inputs(Job())

    def report(run, steps=300, **found):
        of = {"recipe": {"steps": steps}, "job": {"model": "base"}, "inputs": here}
        found = {"before": None, "history": [], **of, **found}
        (tmp_path / "runs" / run).mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / run / "report.json").write_text(json.dumps(found))

    def rows_of(name):
        (tmp_path / "data").mkdir(exist_ok=True)
        other = re.sub(r"\d\.\d{4,7}", "9.5", json.dumps(stored(name)))  # other numbers than those of the runs
        (tmp_path / "data" / f"{name}.json").write_text(other)
        from_runs.main([name, str(tmp_path / "runs")])
        assert (tmp_path / "data" / f"{name}.json").read_bytes() == (FIGURES / "data" / f"{name}.json").read_bytes()
        return [[cell.strip() for cell in row.strip("|").split("|")] for row in capsys.readouterr().out.splitlines()]

    page = table("Full fine-tuning, LoRA and QLoRA on the embedded model")[2:]
    for row, (method, run) in zip(page, stored("compare")["methods"].items(), strict=True):
        for seed, after in enumerate(run["after"]):
            report(f"{method}-seed{seed}", before=float(row[1]) if seed == 0 else None, after=after, bytes=run["bytes"])
    assert [row[1:] for row in rows_of("compare")] == [row[1:5] for row in page]
    for method, run in stored("curves-base")["methods"].items():
        for seed, values in enumerate(run["heldout"]):
            history = [
                {"step": 1},
                *({"step": s, "heldout": v} for s, v in zip(range(50, 301, 50), values, strict=True)),
            ]
            report(f"{method}-seed{seed}", before=run["before"], after=values[-1], history=history)
    assert [row[2] for row in rows_of("curves-base")] == [page[2][2], page[1][2]]
    for label, by_rank in stored("ranks")["targets"].items():
        for r, values in by_rank.items():
            for seed, after in enumerate(values):
                report(f"{label.replace(', ', '-')}-r{r}-seed{seed}", steps=200, after=after)
    assert [row[1:] for row in rows_of("ranks")] == [row[1:] for row in table("Is a rank of 1 enough?")[2:]]
    before = (tmp_path / "data" / "ranks.json").read_bytes()
    report("all-linear-r8-seed1", steps=50, after=2.3)
    with pytest.raises(SystemExit, match=r"all-linear-r8-seed1.* is of 50 steps, and `tinylora ranks` takes 200"):
        from_runs.main(["ranks", str(tmp_path / "runs")])
    report("all-linear-r8-seed1", steps=200, after=2.3, inputs={**here, "model": "0123456789abcdef"})
    with pytest.raises(SystemExit, match=r"all-linear-r8-seed1.* is of another embedded model"):
        from_runs.main(["ranks", str(tmp_path / "runs")])
    report("all-linear-r8-seed1", steps=200, after=2.3)
    (tmp_path / "runs" / "all-linear-r64-seed2" / "report.json").unlink()
    with pytest.raises(SystemExit, match=r"all-linear-r64-seed2.*has not ended"):
        from_runs.main(["ranks", str(tmp_path / "runs")])
    assert (tmp_path / "data" / "ranks.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------------- the command
def test_the_command_writes_all_or_nothing_and_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(TOP)
    assert main(["figures", "ranks", "tape", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ranks.svg", "tape.svg"}
    assert all(xml.dom.minidom.parse(str(path)) for path in tmp_path.iterdir())
    assert "2 figures written" in capsys.readouterr().out
    assert main(["figures", "ranks", "--out", str(tmp_path), "--check"]) == 0
    assert re.search(r"ranks\.svg +[0-9.]+ s  the same bytes", capsys.readouterr().out)
    (tmp_path / "ranks.svg").write_text("another")
    assert main(["figures", "ranks", "tape", "--out", str(tmp_path), "--check"]) == 1
    assert "1 of 2 figures" in (out := capsys.readouterr().out) and "not what would be drawn: ranks" in out
    assert (tmp_path / "ranks.svg").read_text() == "another", "--check writes nothing"

    def fail(data):
        raise ValueError("no")

    monkeypatch.setitem(gallery.PICTURES, "compare", gallery.Picture(fail, lambda data: ()))
    assert main(["figures", "ranks", "compare", "--out", str(tmp_path)]) == 2
    assert (tmp_path / "ranks.svg").read_text() == "another", "what was drawn before the failure is not written"


def test_what_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    assert main(["figures", "nf5"]) == 2
    err = capsys.readouterr().err
    assert "there is no 'nf5'" in err and all(name in err for name in gallery.PICTURES)
    monkeypatch.chdir(tmp_path)
    assert main(["figures", "nf4", "ranks"]) == 2
    err = capsys.readouterr().err
    assert "ranks.svg is drawn from the numbers of a long run" in err and "ranks.json is not there" in err
    assert not list(tmp_path.iterdir())


STORED = [name for name, picture in gallery.PICTURES.items() if picture.stored]


def refused(name, text, folder, monkeypatch, capsys):
    """What `tinylora figures NAME` says of a file of numbers with this text; the old figure is still there."""
    monkeypatch.chdir(folder)
    Path("figures/data").mkdir(parents=True, exist_ok=True)
    Path("figures", f"{name}.svg").write_text("the old figure")
    Path("figures/data", f"{name}.json").write_text(text, encoding="utf-8")
    assert main(["figures", name]) == 2, text
    err = capsys.readouterr().err
    assert f"figures/data/{name}.json" in err and re.search("[Ee]xpect|is missing", err) and "fault" not in err, err
    assert Path("figures", f"{name}.svg").read_text() == "the old figure"
    assert {path.name for path in Path("figures").iterdir()} == {"data", f"{name}.svg"}
    return err


#: Of these a figure may have one more or one fewer.
RUNS = {"methods", "targets", "q_proj, v_proj", "all-linear", "kinds", "costs"}


def spoiled(value, name=None):
    """(what is wrong, the value with that wrong in it) for each place in a file of numbers; in a list, for its first and its last."""
    instead = {dict: [3, [], {}, None], list: [3, [], {}, None], str: [3, None], bool: ["yes", None]}
    for wrong in instead.get(type(value), ["3", None, True, math.nan, math.inf, -1]):
        yield f"is {wrong!r}", wrong
    if isinstance(value, list):
        places = sorted({0, len(value) - 1})
        lacking = [("one", value[:-1])]
    else:
        places = list(value) if isinstance(value, dict) else []
        lacking = [(key, {k: v for k, v in value.items() if k != key}) for key in places]
    for what, rest in lacking if name not in RUNS else ():
        yield f"lacks {what}", rest
    for place in places:
        for what, wrong in spoiled(value[place], place):
            new = value.copy()
            new[place] = wrong
            yield f"{place}: {what}", new


@pytest.mark.parametrize("name", STORED)
def test_what_is_no_file_of_numbers_is_said(name, tmp_path, monkeypatch, capsys):
    for text in ("", "[]", "null", "3", "{", '{"command": "tinylora"}'):
        refused(name, text, tmp_path, monkeypatch, capsys)
    assert "command is missing" in refused(name, "{}", tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("name", [name for name in STORED if name not in ("bench", "growth")])
def test_numbers_that_are_not_what_a_figure_is_drawn_from_are_said(name, tmp_path, monkeypatch, capsys):
    nan = stored(name) | {
        "seeds" if "seeds" in stored(name) else "costs" if name == "paging" else "lengths": [math.nan]
    }
    assert "[0] = nan, expected" in refused(name, json.dumps(nan), tmp_path, monkeypatch, capsys)
    path = tmp_path / "figures" / "data" / f"{name}.json"
    for what, wrong in spoiled(stored(name)):
        path.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"{name}\.json: .*(expected|is missing)"):
            next(gallery.draw([name], path.parent))
            pytest.fail(f"drawn, although {what}")


def changed(data, path, value):
    """A copy of data with another value at this path, whose parts are names and numbers; `...` in the value's place removes it."""
    data = json.loads(json.dumps(data))
    *way, last = path
    for step in way:
        data = data[step]
    if value is ...:
        del data[last]
    else:
        data[last] = value
    return data


_LINE, _STEP = ("rows", 0, "lines", 0), ("rows", 0, "contestants", 0)
_BOTH = [(("about", "CPU"), ...), (("about",), []), (("versions",), []), (("versions",), [3]), (("noisy",), 1), (("rows",), []),
         (("rows", -1, "threads"), 0), (("rows", -1, "threads"), ...), (("rows", -1), None)]  # fmt: skip
SPOILED = [("bench", *wrong) for wrong in _BOTH] + [("growth", *wrong) for wrong in _BOTH]
SPOILED += [("bench", (*_LINE, *path), value) for path, value in [
    (("must",), "0.1"), (("aim",), math.inf), (("aim",), -1), (("reached",), "yes"), (("more",), None), (("kind",), 3),
    (("values",), {}), (("values", "here"), [1, 2]), (("values", "here"), [1, math.nan, 2]), (("values", "here"), [0, 1, 2]),
    (("values", "here"), ...), (("name",), ...)]]  # fmt: skip
SPOILED += [("growth", (*_STEP, *path), value) for path, value in [
    (("seconds",), [1, 2]), (("seconds", 1), 0), (("seconds", 1), math.nan), (("facts", "flops"), ...), (("facts", "bytes"), 0),
    (("facts",), []), (("peak",), 0), (("held",), -1), (("version",), 3), (("threads",), "2"), (("name",), ...)]]  # fmt: skip
SPOILED += [
    ("growth", ("rows", 0, "case"), "width 128"),
    ("growth", ("rows", 0, "contestants", 1, "facts", "flops"), ...),
]


@pytest.mark.parametrize(
    "name, path, value", SPOILED, ids=lambda x: ".".join(map(str, x)) if type(x) is tuple else None
)
def test_a_measurement_that_no_figure_can_be_drawn_from_is_said(name, path, value, tmp_path):
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(changed(stored(name), path, value)), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}\.json: .*(expected|is missing)"):
        next(gallery.draw([name], tmp_path))


@pytest.mark.parametrize("name", ["bench", "growth"])
def test_a_measurement_with_nothing_in_it_is_said(name, tmp_path):
    """Every contestant was left out, as where no peer is installed."""
    data = stored(name)
    for row in data["rows"]:
        for line in row["lines"]:
            line["values"] = dict.fromkeys(line["values"])
        for c in row["contestants"]:
            c["seconds"] = None
    (tmp_path / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}\.json: rows.* expected a list with a "):
        next(gallery.draw([name], tmp_path))


def test_claims_stands_for_all_of_theirs():
    assert gallery.chosen(["claims", "nf4"]) == [*(n for n in gallery.PICTURES if n.startswith("claims/")), "nf4"]
    assert gallery.chosen() == list(gallery.PICTURES)


# ------------------------------------------------------------------------------------------------------------------- the gallery
def entries():
    """{name of a figure: (alt text, its caption, how it is drawn)} of the gallery."""
    found = re.findall(
        r"^!\[(.*?)\]\(\.\./figures/(.*?)\.svg\)\n\n(.*?)\n\n(Drawn by .*?)(?:\n\n|\Z)", GALLERY, re.M | re.S
    )
    return {name: (alt, caption, how) for alt, name, caption, how in found}


def test_the_gallery_has_every_figure_with_what_it_shows():
    assert set(entries()) == set(gallery.PICTURES)
    for name, (alt, _, how) in entries().items():
        assert len(alt.split()) > 15 and alt.endswith("."), f"{name}: the alternative text says what is seen"
        assert f"`tinylora figures {name}`" in how
        if gallery.PICTURES[name].stored and name != "curves-smollm2":
            assert f"`{stored(name)['command']}`" in how.replace("\n", " ")


NUMBER = re.compile(r"[-−]?\d+(?:[.,]\d+)*(?:e-?\d+)?")


@pytest.mark.parametrize("name", gallery.PICTURES)
def test_the_number_in_a_caption_is_one_of_the_findings(name):
    page = "claims/README.md" if name.startswith("claims/") else "README.md"
    text = (FIGURES / page).read_text(encoding="utf-8")
    caption = re.sub(r"\[\w+\]\(.*?\)", "", entries()[name][1])
    numbers = NUMBER.findall(caption)
    assert numbers, "a caption has its number"
    assert not set(numbers) - set(NUMBER.findall(text)), name
