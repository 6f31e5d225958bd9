"""Declared fields: what a file says is checked, and a sentence names the field."""

import pytest

from tinylora.models import fields as f

DECLARED = {
    "layers": f.whole(1, 1 << 20),
    "eps": f.number(above=0, high=1),
    "tied": f.flag(),
    "kind": f.one_of("llama", "qwen2"),
    "ends": f.optional(f.either(f.whole(), f.several(f.whole()))),
    "rope": f.fields({"factor": f.number(above=0)}),
    "ranks": f.mapping(f.whole(1)),
}


@pytest.mark.parametrize(
    "name, value",
    [
        ("layers", 1),
        ("eps", 1),
        ("eps", 1e-300),
        ("tied", False),
        ("kind", "llama"),
        ("ends", None),
        ("ends", [1, 2]),
        ("ends", 3),
        ("rope", {"factor": 2, "more": "x"}),
        ("rope", {}),
        ("ranks", {"q": 2}),
        ("unknown", object()),
    ],
)
def test_what_is_of_its_kind_passes(name, value):
    assert f.check({name: value}, DECLARED, "x.json") == {name: value}


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("layers", 0, "layers = 0, expected a whole number from 1 to 1048576"),
        ("layers", True, "layers = True"),
        ("layers", 3.0, "layers = 3.0"),
        ("layers", "3", "layers = '3'"),
        ("layers", 1 << 300, "layers = a whole number of 301 bits"),
        ("eps", float("nan"), "eps = nan, expected a finite number, more than 0, at most 1"),
        ("eps", 0, "eps = 0"),
        ("eps", 10**400, "eps = a whole number of"),
        ("tied", 1, "tied = 1, expected true or false"),
        ("kind", ["llama"], "kind = ['llama'], expected one of 'llama', 'qwen2'"),
        ("ends", [1, -1], "ends = [1, -1], expected a whole number, 0 or more or a list of at most 1000000 entries"),
        ("rope", "x", "rope = 'x', expected an object"),
        ("rope", {"factor": "\x1b[2J\n"}, r"rope.factor = '\x1b[2J\n', expected"),
        ("ranks", {"q\n": 0}, r"ranks.'q\n' = 0"),
        ("ranks", {str(i): 0 for i in range(9)}, "ranks.'0' = 0"),
        ("kind", "y" * 100, "kind = 'yyyy"),
    ],
)
def test_what_is_not_is_said_with_file_field_and_value(name, value, said):
    with pytest.raises(ValueError) as caught:
        f.check({name: value}, DECLARED, "x.json")
    assert str(caught.value).startswith(f"x.json: {said}") and len(str(caught.value)) < 300


def test_a_field_that_is_required_is_missed_and_only_an_object_has_fields():
    with pytest.raises(ValueError, match="x: layers is missing"):
        f.check({}, DECLARED, "x", required=("layers",))
    with pytest.raises(ValueError, match="x: expected an object, found \\[\\]"):
        f.check([], DECLARED, "x")


def test_whatever_is_quoted_is_short():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (
        deep,
        "x" * 10**7,
        list(range(10**6)),
        {str(i): i for i in range(1000)},
        10**5000,
        [10**5000],
        "\u202e" * 200,
    ):
        quoted = f.shown(value)
        assert len(quoted) <= 70 and quoted.isprintable()
