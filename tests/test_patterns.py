"""Expressions for names of layers: the same answers as `re`, in bounded time."""

import random
import re
import time

import pytest

from tinylora import adapters
from tinylora.adapters import patterns, targets
from tinylora.adapters.config import LoRAConfig, matches
from tinylora.adapters.patterns import compiled

MODULES = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
PATHS = [f"model.layers.{i}.{module}" for i in range(143) for module in MODULES.split()]
ATTENTION, PROJECTIONS = (
    "self_attn|attention|attn|mlp|feed_forward|ffn|dense",
    "|".join(MODULES.replace(".", " ").split()),
)
#: Expressions that programs for fine-tuning write, and people.
REAL = [
    rf"(?:.*?(?:vision|image|language|text).*?(?:{ATTENTION}).*?(?:{PROJECTIONS}).*?)|"
    rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{ATTENTION})\.(?:(?:{PROJECTIONS})))",
    r"^(?!.*vision).*\.(q_proj|v_proj)$",
    r"model\.layers\.(1[0-9]|2\d)\..*",
    r".*\.(?!1\d\.)\d+\.self_attn\.[qkvo]_proj",
    r"(?i)MODEL\.LAYERS\.\d+\.MLP\.(up|down)_PROJ",
    r"(?:model\.)?layers\.(?:[0-9]|1[0-5])\.mlp\.\w+(?<!gate_proj)",
]
#: Expressions for which `re` takes longer than anyone waits.
ENDLESS = [
    "(([a-z_.0-9]+)+)+!",
    "(([a-z_.0-9]+)+)+!?x",
    "(a|a|[^b]|.)*!x?",
    "(.*)*" * 30 + "(!|x)",
    "(?:(?:(?:.*)*)*)*[!?]",
    "(.?){500}" * 20 + "[!?]",
    "^(?=(([^ ]+)*)*!)",
    "(?i)(([a-z_.0-9]+)+)+!",
    "(x+x+)+y|((.+)+)+[!?]",
]


class Expressions:
    """Random expressions over few letters, most of which `re` takes, and random texts of these."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def atom(self, depth):
        pick, kind = self.rng.choice, self.rng.random()
        if kind < 0.35:
            return pick(["a", "b", "c", "q", "_", "1", r"\.", ".", "k", "K", "S"])
        if kind < 0.5:
            return pick(
                [r"\d", r"\w", r"\s", r"\D", r"\W", "[ab]", "[^a.]", "[a-c1]", r"[\d_]", "[A-C]", r"[^\w]", "\n"]
            )
        if kind < 0.6 or depth == 0:
            return pick(["^", "$", r"\b", r"\B", r"\A", r"\Z"])
        inner, kind = self.expression(depth - 1), self.rng.random()
        if kind < 0.7:
            return pick(["(", "(?:", "(?=", "(?!", "(?i:", "(?s:", "(?m:", "(?a:", "(?-i:", "(?i-s:"]) + inner + ")"
        if kind < 0.8:
            return pick(["(?<=", "(?<!"]) + pick(["a", "ab", r"\.", "[ab]1", "(?:a|b)", "^", r"\b.", "a{2}"]) + ")"
        return f"(?:{inner}|{self.expression(depth - 1)})"

    def several(self, depth, least, most):
        parts = []
        for _ in range(self.rng.randint(least, most)):
            atom = self.atom(depth)
            if atom in ("^", "$") or atom.startswith(("(?=", "(?!", "(?<")) or self.rng.random() < 0.2:
                atom = f"(?:{atom})"
            times = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{0,2}?", "{2,}", "{,2}", "{3,}?"]
            parts.append(atom + (self.rng.choice(times) if self.rng.random() < 0.4 else ""))
        return "".join(parts)

    def expression(self, depth):
        ways = [self.several(depth, 1, 4)]
        while self.rng.random() < 0.2:
            ways.append(self.several(depth, 0, 3))
        return "|".join(ways)

    def whole(self, flags=("", "", "", "(?i)", "(?s)", "(?ia)", "(?m)")):
        """(expression, what `re` makes of it) of at most 70 characters, so that `re` ends."""
        while True:
            found = self.rng.choice(flags) + self.expression(3)
            if len(found) <= 70:
                try:
                    return found, re.compile(found)
                except re.error:
                    with pytest.raises(ValueError):
                        compiled(found)

    def text(self):
        return "".join(self.rng.choice("aabbc.1_qkKsS\nAB") for _ in range(self.rng.randint(0, 9)))


@pytest.mark.parametrize("seed", range(4))
def test_a_match_is_what_re_says_it_is(seed):
    made, matched = Expressions(seed), 0
    for _ in range(1500):
        expression, witness = made.whole()
        for text in [made.text() for _ in range(3)]:
            whole, begun, ends = witness.fullmatch(text), witness.match(text), compiled(expression).ends(text)
            assert compiled(expression).fullmatch(text) == (whole is not None), (expression, text)
            assert ends[:1] == ([begun.end()] if begun else []), (expression, text)
            matched += whole is not None
    assert matched > 100


def test_parts_of_pefts_expressions_mean_what_they_mean_there():
    """The end of a path, a module that is trained whole, and the number of a layer, as PEFT's own expressions find them."""
    made, hits = Expressions(7), [0, 0, 0]
    for _ in range(1200):
        p, _ = made.whole(flags=("",))
        path = ".".join(
            made.rng.choice(["a", "b1", "cab", "q_", "1", "12", "2"]) for _ in range(made.rng.randint(1, 6))
        )
        path += made.rng.choice(["", "", "", "\n"])
        end = re.match(rf"(.*\.)?({p})$", path) is not None
        assert matches(p, path) == end, (p, path)
        inside = re.match(rf"(^|.*\.){p}($|\..*)", path) is not None
        assert targets._inside(path, [p]) == inside, (p, path)
        if not compiled(rf"(?:^|.*?\.){p}\.").parted:
            found = re.match(rf"(?:^|.*?\.){p}\.(?P<number>\d+)\.", path)
            for n in (1, 2, 12):
                assert targets.in_layers(path, (n,), p) == (found is not None and int(found["number"]) == n), (p, path)
            hits[2] += found is not None
        hits[0] += end
        hits[1] += inside
    assert min(hits) > 25


@pytest.mark.parametrize("expression", REAL)
def test_expressions_of_the_wild_match_a_thousand_layers_as_re_does(expression):
    start = time.perf_counter()
    found = [path for path in PATHS if compiled(expression).fullmatch(path)]
    print(f"{time.perf_counter() - start:.2f} s for {len(PATHS)} layers")
    assert found == [path for path in PATHS if re.fullmatch(expression, path)] and found
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("expression", ENDLESS)
def test_no_expression_is_tried_for_long(expression):
    start = time.perf_counter()
    for path in PATHS[:28]:
        try:
            assert not compiled(expression).fullmatch(path)
        except ValueError as error:
            assert "it takes too long to match" in str(error)
        assert not matches("(x|y)", path)
    assert time.perf_counter() - start < 10


def test_case_is_ignored_as_re_does():
    for c in map(re.escape, map(chr, range(128))):
        for expression in (f"(?i){c}", f"(?i)[{c}-\x7f]", f"(?ia)[^{c}]"):
            for letter in map(chr, range(128)):
                assert compiled(expression).fullmatch(letter) == bool(re.fullmatch(expression, letter))
    for letter in map(chr, range(128, 0x3000)):  # what stands in the expression may be anything
        for c in "aikms_1":
            assert compiled(f"(?i){letter}").fullmatch(c) == bool(re.fullmatch(f"(?i){letter}", c))
    with pytest.raises(ValueError, match="for names in ASCII only"):
        compiled("(?i)straße").fullmatch("straße")


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        (r"(a)\1", "groupref is not supported"),
        (r"(a)?(?(1)b|c)", "groupref exists is not supported"),
        ("(?>a+)b", "atomic group is not supported"),
        ("a++b", "possessive repeat is not supported"),
        ("(?<=a+)b", "look-behind requires a fixed width"),
        ("(" * 60 + ")" * 60, "groups are more than 50 deep"),
        ("(" * 20000 + ")" * 20000, "groups are more than 50 deep"),
        ("a{1,100000000}", "more than 1000 times"),
        ("a{99999999999999999999}", "repetition number is too large"),
        ("a{" + "9" * 5000 + "}", "."),
        ("(?au)a", "incompatible"),
        ("[\x1b-\x01]", r"bad character range \\x1b-\\x01"),
        ("(", "missing"),
    ],
)
def test_what_is_refused_is_refused_in_a_sentence(expression, said):
    with pytest.raises(ValueError, match=said):
        compiled(expression)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank_pattern": {"(?i)q": 3}}, r"the pattern '\(\?i\)q' sets flags for the whole expression"),
        ({"modules_to_save": ["(?s)q"]}, r"modules_to_save '\(\?s\)q' sets flags"),
        (
            {"layers_pattern": "h|layers", "layers_to_transform": 1},
            r"layers_pattern 'h\|layers' is a part of an expression",
        ),
        (
            {"alpha_pattern": {f"{'a' * 99}{i}": 1 for i in range(1000)}},
            "its patterns have 1.* characters, expected at most",
        ),
        ({"rank_pattern": {f"{i}": 1 for i in range(20000)}}, "it has 20001 names, numbers and patterns"),
        ({"layers_to_transform": range(20000)}, "it has 20001 names, numbers and patterns"),
        ({"target_modules": [1]}, r"target_modules = \[1\], expected a list of names or"),
        ({"target_modules": 7}, "target_modules = 7, expected a list of names or"),
        ({"exclude_modules": 7}, "exclude_modules = 7, expected a list of names or"),
        ({"layers_pattern": 7.5, "layers_to_transform": 1}, r"layers_pattern = 7\.5, expected a list of names or"),
        ({"layers_to_transform": 7.5}, r"layers_to_transform = 7\.5, expected the number of a layer"),
        ({"layers_to_transform": "12"}, "layers_to_transform = '12', expected the number of a layer"),
        ({"modules_to_save": None}, "modules_to_save = None, expected a list of names"),
        ({"rank_pattern": [("a", 1)]}, "rank_pattern = .*, expected names and numbers"),
        ({"alpha_pattern": {7: 1}}, r"alpha_pattern = \{7: 1\}, expected names and numbers"),
        ({"alpha": 10**400}, "alpha = 1000"),
        ({"alpha": 1e39}, r"alpha = 1e\+39, expected a number"),
        ({"dropout": float("nan")}, "dropout = nan, expected 0 <= dropout < 1"),
        ({"rank_pattern": {"x" * 1_000_000: 0}}, r"rank_pattern\['x{99}\] = 0, expected a whole number"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_in_a_short_sentence(options, said):
    with pytest.raises(ValueError, match=said) as caught:
        LoRAConfig(**options)
    assert len(str(caught.value)) < 400


def test_many_patterns_are_tried_for_a_bounded_time():
    """A rank for each of 350 layers, as some methods write it; and ten thousand that are costly."""
    ranks = {path: 1 + i for i, path in enumerate(PATHS[:350])}
    config, start = LoRAConfig(rank_pattern=ranks), time.perf_counter()
    assert all(config.options(path)["r"] == ranks[path] for path in PATHS[:350])
    print(f"{time.perf_counter() - start:.2f} s")
    costly = LoRAConfig(rank_pattern={f"({i}|.?)*[!?]": 2 for i in range(6000)})
    with pytest.raises(ValueError, match=r"lora: the pattern '\(\d+\|\.\?\)\*\[!\?\]': it takes too long to match"):
        for path in PATHS:
            costly.options(path)
    assert time.perf_counter() - start < 20


def test_the_field_that_takes_too_long_is_named():
    import tiny

    slow = "(.*.*.*.*)*" * 90
    for field, options in {
        "target_modules": {"target_modules": slow + "q?_proj"},
        "exclude_modules": {"exclude_modules": slow + "[!?]"},
        "modules_to_save": {"modules_to_save": [slow + "[!?]"]},
        "layers_pattern": {"layers_pattern": slow + "[!?]", "layers_to_transform": 1},
        "the pattern": {"rank_pattern": {slow + "[!?]": 2}},
    }.items():
        config = LoRAConfig(**{"target_modules": ("q_proj",), **options})
        with pytest.raises(ValueError, match=rf"lora: {field} .*it takes too long to match"):
            targets.targeted("model.layers.0.self_attn.q_proj", config, (), config.modules_to_save)
            config.options("model.layers.0.self_attn.q_proj")
    with pytest.raises(ValueError, match=r"lora: target_modules .*it takes too long to match"):
        adapters.find_targets(tiny.model(), slow + "q?_proj")
    assert patterns.Work().left == patterns.WORK
