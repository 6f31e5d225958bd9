"""The two explorer pages: their numbers against the library at fresh random places, and how they behave in a real browser."""

import os
from pathlib import Path

import numpy as np
import pytest
from scripts import loaded

from tinylora import codebooks
from tinylora.costs.paging import predicted
from tinylora.numerics import optimality
from tinylora.papers.nf4_construction import nf4_excess

explorers = loaded(Path(__file__).parents[1] / "docs" / "explorers.py")


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
        for outside in ("http:", "https:", 'href="..', "<a ", "src=", "url(", "@import", "fetch(", "import("):
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
@pytest.fixture
def written(request):
    """The folder of both pages: the book's, where one was built, or newly written ones."""
    book = os.environ.get("TINYLORA_BOOK")
    return (Path(book, "explorer") if book else request.getfixturevalue("folder")).resolve()


def says(page, name, words):
    """An element says words, or will in a moment."""
    there = "([id, words]) => document.getElementById(id).textContent.replaceAll('\\u00a0', ' ').includes(words)"
    try:
        page.wait_for_function(there, arg=[name, words], timeout=5000)
    except Exception:
        raise AssertionError(f"#{name} says {page.text_content(f'#{name}')!r}, expected {words!r}") from None


def press(page, name, *keys):
    page.focus(f"#{name}")
    for key in keys:
        page.keyboard.press(key)


def box_of(page, name):
    page.evaluate("name => document.getElementById(name).scrollIntoView({ block: 'center' })", name)
    return page.locator(f"#{name}").bounding_box()


def drag(page, name, start, end):
    """Drag with the mouse along an element, from one share of its width to another."""
    box = box_of(page, name)
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + start * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], y, steps=4)
    page.mouse.up()


def assert_sound(page, wrong, asked, path):
    """No error, no request but the page itself, no horizontal scroll on a phone, light and dark."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 844})
            page.evaluate("new Promise(requestAnimationFrame).then(() => new Promise(requestAnimationFrame))")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (scheme, width)
        light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(252, 251, 248)"
        assert light == (scheme == "light")
    assert wrong == [] and asked == [path.as_uri()]


def test_the_nf4_page_in_a_browser(open_page, written, rng):
    path = written / "nf4.html"
    page, *heard = open_page(path.as_uri())
    for words in ("0.025 % above the best", "5.86 % above the best", "3.8847 of 4 bits"):
        says(page, "gauges", words)
    # the script's arithmetic against the library's
    places = random_places(rng, 10)
    shown = page.evaluate("places => places.map(([o, I]) => [0, 1, 2].map((p) => excess(o, I, p)))", places)
    for (offset, I), row in zip(places, shown, strict=True):
        exact = [explorers.excess(explorers.recipe_values(offset), I, power) for power in (0, 1, 2)]
        assert np.abs(np.subtract(row, exact)).max() < 1e-9, (offset, I)
    # arrow keys: one stop up and back to NF4's own number
    press(page, "offset", "ArrowRight")
    says(page, "words", "Offset 0.9678 in blocks of 64 weights")
    assert page.get_attribute("#offset", "aria-valuetext") == "offset 0.9678"
    press(page, "offset", "ArrowLeft")
    says(page, "words", "Offset 0.9677083, NF4's own, in blocks of 64 weights")
    press(page, "blocksize", *["ArrowLeft"] * (64 - 12))
    says(page, "words", "3.9964 of 4 bits")
    says(page, "gauges", "3.9964 of 4 bits")
    press(page, "blocksize", "End")
    says(page, "words", "in blocks of 4,096 weights")
    # a number that is typed, and one that cannot be
    page.fill("#blocksize-number", "32")
    press(page, "blocksize-number", "Enter")
    says(page, "words", f"lies {100 * nf4_excess(32, 1):.3f} % above")
    says(page, "words", f"{100 * nf4_excess(32, 2):.2f} % above")
    page.fill("#blocksize-number", "7")
    press(page, "blocksize-number", "Enter")
    says(page, "error", 'Block size "7": expected a whole number from 8 to 4,096.')
    # dragging a curve moves the offset
    drag(page, "by-offset", 0.5, 0.25)
    assert 0.9 < page.evaluate("state.offset") < 0.93
    assert page.evaluate("document.querySelectorAll('#table td').length") == 16 * 6
    assert_sound(page, *heard, path)


def test_the_pager_page_in_a_browser(open_page, written):
    path = written / "pager.html"
    page, *heard = open_page(path.as_uri())
    # every run replays to the counters, in the script as in Python
    counted = page.evaluate(
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
    # arrow keys: a moment on, whether it lies near or far, and a page more; the slider's knob lies under the moment
    for event in (54, 55, 56):
        press(page, "moment", "ArrowRight")
        says(page, "words", f"event {event} of 139")
        share = page.evaluate("$('moment').value / $('moment').max")
        assert abs(share - page.evaluate("events[state.moment - 1].at") / (explorers.PAGES * explorers.STEPS)) < 1e-3
    press(page, "moment", "ArrowLeft")
    says(page, "words", "event 55 of 139")
    press(page, "moment", "End")
    total = replayed(data["runs"]["around"]["waiting"][4])[0][-1]
    says(page, "words", f"So far {total['f']} faults, {total['h']} hits")
    press(page, "budget", "ArrowRight")
    says(page, "budget-says", "6 of 12")
    page.check("input[value='back and forth']")
    half = round(data["predicted"]["back and forth"][5])
    says(page, "cost-caption", f"With 6 of 12 pages back and forth: {half:,} bytes")
    drag(page, "timeline", 0.5, 0.25)
    assert 0 < page.evaluate("state.moment") < page.evaluate("events.length") / 2
    assert_sound(page, *heard, path)


def slide(page, hand, box, start, end, down=0):
    """A finger from one share of a box's width to another, and so many pixels down."""
    for i in range(6):
        x = box["x"] + (start + (end - start) * i / 5) * box["width"]
        place = {"x": x, "y": box["y"] + box["height"] / 2 + down * i / 5}
        hand.send("Input.dispatchTouchEvent", {"type": "touchMove" if i else "touchStart", "touchPoints": [place]})
    hand.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


# where the page is when it has stopped scrolling
AT_REST = """new Promise((done) => {
  const look = (before) => (scrollY === before ? done(scrollY) : setTimeout(look, 100, scrollY));
  setTimeout(look, 100, -1);
})"""
TOUCHED = {
    "nf4": {"offset": "offset", "blocksize": "blocksize", "by-offset": "offset", "by-blocksize": "blocksize"},
    "pager": {"budget": "budget", "moment": "moment", "timeline": "moment"},
}


@pytest.mark.parametrize("name", TOUCHED)
def test_fingers_in_a_browser(open_page, written, name):
    """Sideways a finger drags and the page stays; up and down it scrolls the page and moves nothing; a tap counts."""
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    page, wrong, _ = open_page((written / f"{name}.html").as_uri(), **phone)
    hand = page.context.new_cdp_session(page)
    for touched, moved in TOUCHED[name].items():
        box, value = box_of(page, touched), f"state.{moved}"
        before, scrolled = page.evaluate(value), page.evaluate("[scrollX, scrollY]")
        slide(page, hand, box, 0.5, 0.1)
        left = page.evaluate(value)
        slide(page, hand, box, 0.1, 0.9)
        right = page.evaluate(value)
        assert left < min(before, right), (touched, left, before, right)
        page.wait_for_timeout(300)  # the sentence is written when the finger rests, and must not push the page
        assert page.evaluate("[scrollX, scrollY]") == scrolled and page.locator(f"#{touched}").bounding_box() == box
        assert page.evaluate("[visualViewport.scale, document.documentElement.scrollWidth]") == [1, 390]
        page.touchscreen.tap(box["x"] + 0.6 * box["width"], box["y"] + box["height"] / 2)
        tapped = page.evaluate(value)
        assert left < tapped < right, (touched, left, tapped, right)
        slide(page, hand, box, 0.3, 0.3, -200)
        assert page.evaluate(AT_REST) > scrolled[1] + 100 and page.evaluate(value) == tapped, touched
    assert wrong == []


@pytest.mark.parametrize("name", TOUCHED)
def test_reduced_motion_in_a_browser(open_page, written, name):
    """Nothing moves by itself, and what is pressed jumps. Where motion is welcome, it glides."""
    act = {"nf4": "$('best').click(); state.offset === lawOf(64).offset[1]", "pager": "$('next').click(); true"}[name]
    for wish in ("reduce", "no-preference"):
        page, wrong, _ = open_page((written / f"{name}.html").as_uri(), reduced_motion=wish)
        page.wait_for_timeout(400)  # the sentence and the table are written once nothing has been asked for a while
        shown = page.evaluate("document.body.innerHTML")
        page.wait_for_timeout(400)
        assert page.evaluate("document.body.innerHTML") == shown
        jumped = page.evaluate(act) and page.evaluate("document.getAnimations().length") == 0
        assert jumped == (wish == "reduce") and wrong == []


CONTRAST = """() => {
  const rgba = (colour) => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, under) => under.map((value, i) => top[i] * top[3] + value * (1 - top[3]));
  const light = (colour) => colour.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const painted = (element) => {
    const style = getComputedStyle(element), shape = element instanceof SVGElement && !(element instanceof SVGSVGElement);
    if (shape && (style.fill === "none" || element instanceof SVGTextElement)) return [0, 0, 0, 0];
    const colour = rgba(shape ? style.fill : style.backgroundColor);
    return [...colour.slice(0, 3), colour[3] * style.opacity];
  };
  const ratio = (element, x, y) => {
    const under = document.elementsFromPoint(x, y).reverse();
    if (!under.includes(element)) return Infinity; // a cell of a table that is scrolled out of sight
    if (element.ownerSVGElement) under.splice(under.indexOf(element));
    const ground = under.reduce((so_far, each) => over(painted(each), so_far), [255, 255, 255]);
    const style = getComputedStyle(element), text = over(rgba(element.ownerSVGElement ? style.fill : style.color), ground);
    const [a, b] = [light(text), light(ground)].sort((p, q) => q - p);
    return (a + 0.05) / (b + 0.05);
  };
  for (const closed of document.querySelectorAll("details")) closed.open = true;
  const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (const input of document.querySelectorAll("input[type=number]")) {
    const box = input.getBoundingClientRect();
    found.push([ratio(input, box.x + box.width / 2, box.y + box.height / 2), input.value]);
  }
  while (texts.nextNode()) {
    const range = document.createRange(), element = texts.currentNode.parentElement;
    range.selectNodeContents(texts.currentNode);
    const box = range.getClientRects()[0];
    if (!box || !box.width || !texts.currentNode.textContent.trim() || element.closest("script, style, :disabled")) continue;
    found.push([ratio(element, box.x + box.width / 2, box.y + box.height / 2), texts.currentNode.textContent.slice(0, 40)]);
  }
  return found.filter(([ratio]) => ratio < Infinity).sort((a, b) => a[0] - b[0]);
}"""


@pytest.mark.parametrize("name", TOUCHED)
def test_contrast_in_a_browser(open_page, written, name):
    """Each text has 4.5 times the light of what is painted under it, or the reverse (WCAG 2.2, 1.4.3)."""
    page, _, _ = open_page((written / f"{name}.html").as_uri())
    page.wait_for_timeout(400)  # the sentence and the table are written once nothing has been asked for a while
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (1280, 390):
            page.set_viewport_size(
                {"width": width, "height": 5000}
            )  # the whole page, since only what is in sight is found
            found = page.evaluate(CONTRAST)
            assert len(found) > 60 and found[0][0] >= 4.5, (scheme, width, found[:3])
            print(f"{name}, {scheme}, {width}: {len(found)} texts, the least contrast {found[0][0]:.2f}: {found[0][1]}")
    page.add_style_tag(content=":root { --soft: #777 }")
    assert page.evaluate(CONTRAST)[0][0] < 4.5
