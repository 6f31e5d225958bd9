"""The two explorer pages: their numbers against the library at fresh random places, and how they behave in a real browser."""

import json
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from scripts import loaded

from tinylora import codebooks
from tinylora.costs.paging import predicted
from tinylora.numerics import optimality
from tinylora.papers.nf4_construction import nf4_excess

explorers = loaded(Path(__file__).parents[1] / "docs" / "explorers.py")

in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def nf4():
    return explorers.Interpolated(explorers.nf4_data())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both pages, written."""
    folder = tmp_path_factory.mktemp("explorers")
    explorers.main([str(folder)])
    return folder


# ------------------------------------------------------------------------------------------------------------------ the numbers
def test_nf4_at_64_and_at_12_to_the_digit(nf4):
    for power, digits in ((1, "0.025%"), (2, "5.863%")):
        shown, exact = nf4.excess(codebooks.NF4_OFFSET, 64, power), nf4_excess(64, power)
        assert f"{shown:.3%}" == f"{exact:.3%}" == digits and abs(shown - exact) < 1e-10
    bits = 4 - nf4.excess(codebooks.NF4_OFFSET, 12, 0)
    assert f"{bits:.4f}" == f"{optimality.entropy(codebooks.nf4(), 12):.4f}" == "3.9964"
    assert nf4.code(codebooks.NF4_OFFSET).tolist() == codebooks.nf4().tolist()


def random_places(rng, n):
    offsets, places = rng.uniform(*explorers.OFFSETS, n), rng.uniform(*np.log(explorers.BLOCKSIZES), n)
    return [(float(offset), round(np.exp(place))) for offset, place in zip(offsets, places, strict=True)]


def test_random_places_agree_with_the_library(nf4, rng):
    edges = [(offset, I) for offset in explorers.OFFSETS for I in explorers.BLOCKSIZES]
    for offset, I in [*random_places(rng, 12), *edges]:
        exact, rounded = explorers.recipe_values(offset), codebooks.normal_float(4, offset)
        assert np.abs(nf4.code(offset) - exact).max() < 1e-9
        for power in (0, 1, 2):
            shown = nf4.excess(offset, I, power)
            assert abs(shown - explorers.excess(exact, I, power)) < 1e-9, (offset, I, power)
            assert abs(shown - explorers.excess(rounded, I, power)) < 1e-4, (offset, I, power)


def test_the_best_offset_is_best(nf4, rng):
    for _, I in random_places(rng, 4):
        for power in (0, 1, 2):
            best = nf4.best_offset(power, I)
            assert abs(best - explorers.best_offset(I, power)[1]) < 1e-6
            least, *others = (
                explorers.excess(explorers.recipe_values(o), I, power)
                for o in (best, best - 0.05 * (1 - best), best + 0.05 * (1 - best))
            )
            assert least < min(others), (I, power)


def test_what_the_page_says_of_its_error_bounds_what_was_measured():
    found, words = explorers.nf4_data()["measured"], explorers.nf4_words(explorers.nf4_data())
    for name in ("excess", "bits", "offset", "float32"):
        exponent = int(
            words[f"at_most_{name}"].removeprefix("10").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
        )
        assert 10.0 ** (exponent - 1) < found[name] <= 10.0**exponent


def replayed(steps):
    """Counters after each step, from the words of a run, and the most pages that were resident."""
    counts, resident, most, after = dict.fromkeys("fhpe", 0), set(), 0, []
    for words in steps:
        for word in words.split():
            kind, page = word[0], int(word[1:])
            counts[kind] += 1
            assert (page in resident) == (kind in "he"), word
            resident = resident - {page} if kind == "e" else resident | {page}
            most = max(most, len(resident))
        after.append(dict(counts))
    return after, most


@pytest.mark.parametrize("order", ["around", "back and forth"])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_traces_replay_to_the_pager_s_counters(order, ahead, rng):
    data, state = explorers.pager_data(), explorers.PAGES * explorers.PAGE_BYTES
    budget = int(rng.integers(1, explorers.PAGES + 1))
    runs = {kind: data["runs"][order][kind] for kind in ("waiting", "ahead")}
    after, most = replayed(runs["ahead" if ahead else "waiting"][budget - 1])
    _, counters, _ = explorers.paged_run(budget, order == "around", ahead)
    for replay, counted in zip(after, counters, strict=True):
        assert [replay[k] for k in "fhpe"] == [counted[k] for k in ("faults", "hits", "prefetches", "evictions")]
        moved = (replay["f"] + replay["p"] + replay["e"]) * explorers.PAGE_BYTES
        assert moved == counted["bytes_in"] + counted["bytes_out"]
    assert most == budget
    # the formulas, and that fetching ahead moves the same: for all budgets, from the third step on
    for b in range(explorers.PAGES):
        assert abs(data["predicted"][order][b] - predicted((b + 1) / explorers.PAGES, order, state)) < 1e-6
        for kind in runs:
            late = " ".join(runs[kind][b][2:]).split()
            moved = sum(word[0] != "h" for word in late) * explorers.PAGE_BYTES / (explorers.STEPS - 2)
            assert abs(moved - data["predicted"][order][b]) < 1e-6


# -------------------------------------------------------------------------------------------------------------------- the files
def test_the_pages_need_nothing_else_and_are_light(folder):
    assert {path.name for path in folder.iterdir()} == {"nf4.html", "pager.html"}
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert len(text.encode()) < 300_000 and "{{" not in text
        for outside in ("http:", "https:", "src=", "url(", "@import", "fetch(", "import("):
            assert outside not in text, (path.name, outside)


def test_bad_input_is_named(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="expected one argument"):
        explorers.main([])
    monkeypatch.setattr(explorers, "TEMPLATES", tmp_path)
    for part, text in (
        ("common.css", ""),
        ("common.js", ""),
        ("t.html", "{{common.css}}{{common.js}}{{data}}{{other}}"),
    ):
        (tmp_path / part).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"nothing was given for the mark '\{\{other\}\}'"):
        explorers.page("t", {}, {})
    with pytest.raises(ValueError, match=r"expected the mark \{\{absent\}\}"):
        explorers.page("t", {}, {"absent": 1, "other": 2})


# -------------------------------------------------------------------------------------------------------------------- the browser
SETTLE = "new Promise((done) => setTimeout(done, 400))"


def focus(page, name):
    page.run(f"document.getElementById('{name}').focus()")


def text(page, name):
    return page.run(f"{SETTLE}.then(() => document.getElementById('{name}').textContent)").replace("\u00a0", " ")


def assert_sound(page, path):
    """No error, no request but the page itself, no horizontal scroll on a phone, light and dark."""
    for scheme in ("light", "dark"):
        page.prefers(color_scheme=scheme)
        for width in (1280, 390):
            page.size(width, 844)
            page.run(SETTLE)
            assert page.run("document.documentElement.scrollWidth") <= width, (scheme, width)
        light = page.run("getComputedStyle(document.body).backgroundColor") == "rgb(252, 251, 248)"
        assert light == (scheme == "light")
    assert page.errors == [] and page.requests == [path.resolve().as_uri()]


@in_chromium
def test_the_nf4_page_in_a_browser(folder, rng):
    path = folder / "nf4.html"
    with Browser(path) as page:
        gauges = text(page, "gauges")
        assert "0.025 % above the best" in gauges and "5.86 % above the best" in gauges and "3.8847 of 4 bits" in gauges
        # the script's arithmetic against the library's
        places = random_places(rng, 10)
        shown = page.run(f"{json.dumps(places)}.map(([o, I]) => [0, 1, 2].map((p) => excess(o, I, p)))")
        for (offset, I), row in zip(places, shown, strict=True):
            exact = [explorers.excess(explorers.recipe_values(offset), I, power) for power in (0, 1, 2)]
            assert np.abs(np.subtract(row, exact)).max() < 1e-9, (offset, I)
        # arrow keys: one stop up and back to NF4's own number
        focus(page, "offset")
        page.key("ArrowRight")
        assert text(page, "words").startswith("Offset 0.9678 in blocks of 64 weights")
        assert page.run("document.getElementById('offset').getAttribute('aria-valuetext')") == "offset 0.9678"
        page.key("ArrowLeft")
        assert text(page, "words").startswith("Offset 0.9677083, NF4's own, in blocks of 64 weights")
        focus(page, "blocksize")
        for _ in range(64 - 12):
            page.key("ArrowLeft")
        assert "3.9964 of 4 bits" in text(page, "words") and "3.9964 of 4 bits" in text(page, "gauges")
        page.key("End")
        assert "in blocks of 4,096 weights" in text(page, "words")
        # a number that is typed, and one that cannot be
        page.run(
            "{ const n = document.getElementById('blocksize-number'); n.value = '32'; n.dispatchEvent(new Event('change')); }"
        )
        said = text(page, "words")
        assert (
            f"lies {100 * nf4_excess(32, 1):.3f} % above" in said and f"{100 * nf4_excess(32, 2):.2f} % above" in said
        )
        page.run(
            "{ const n = document.getElementById('blocksize-number'); n.value = '7'; n.dispatchEvent(new Event('change')); }"
        )
        assert text(page, "error") == 'Block size "7": expected a whole number from 8 to 4,096.'
        # dragging a curve moves the offset; the button glides back, or jumps where motion is not wanted
        box = page.run(
            "(({ x, y, width, height }) => [x, y, width, height])(document.getElementById('by-offset').getBoundingClientRect())"
        )
        page.run("scrollTo(0, document.getElementById('by-offset').getBoundingClientRect().top)")
        top = page.run("document.getElementById('by-offset').getBoundingClientRect().top")
        page.drag(box[0] + 200, top + 80, box[0] + 100, top + 80)
        assert (
            0.9 < page.run("state.offset") < 0.93
            and page.run("document.querySelectorAll('#table td').length") == 16 * 6
        )
        page.prefers(reduced_motion="reduce")
        page.run("document.getElementById('own').click()")
        assert page.run("state.offset") == codebooks.NF4_OFFSET
        assert_sound(page, path)


@in_chromium
def test_the_pager_page_in_a_browser(folder):
    path = folder / "pager.html"
    with Browser(path) as page:
        # every run replays to the counters, in the script as in Python
        counted = page.run(
            "Object.entries(D.runs).flatMap(([order, kinds]) => Object.entries(kinds).flatMap(([kind, runs]) => runs.map((_, i) => {"
            "const run = eventsOf({ order, ahead: kind === 'ahead', budget: i + 1 });"
            "return [order, kind, i, replay(run, run.length, i + 1).counts, movedAStep(run)]; })))"
        )
        data = explorers.pager_data()
        assert len(counted) == 4 * explorers.PAGES
        for order, kind, i, counts, moved in counted:
            last = replayed(data["runs"][order][kind][i])[0][-1]
            assert counts == {"fault": last["f"], "hit": last["h"], "prefetch": last["p"], "evict": last["e"]}
            assert abs(moved - data["predicted"][order][i]) < 1e-6
        # arrow keys: a moment on, a page more
        before = text(page, "words")
        focus(page, "moment")
        page.key("ArrowRight")
        assert text(page, "words") != before and "event 54 of 139" in text(page, "words")
        page.key("End")
        total = replayed(data["runs"]["around"]["waiting"][4])[0][-1]
        assert f"So far {total['f']} faults, {total['h']} hits" in text(page, "words")
        focus(page, "budget")
        page.key("ArrowRight")
        assert text(page, "budget-says") == "6 of 12"
        page.run("document.querySelector('input[value=\"back and forth\"]').click()")
        half = round(data["predicted"]["back and forth"][5])
        assert f"With 6 of 12 pages back and forth: {half:,} bytes" in text(page, "cost-caption")
        page.run("document.getElementById('timeline').scrollIntoView()")
        page.drag(600, 60, 300, 60)
        assert 0 < page.run("state.moment") < page.run("events.length") / 2
        assert_sound(page, path)
