"""A number of the paper map that the audits do not compute is noticed: every digit is changed, and what passes is listed."""

import re
from dataclasses import replace

import pytest

from tinylora.papers import agreement, lora_numbers, map, qlora_numbers
from tinylora.papers.verdict import Claim, Row

MODULES = {"LoRA": lora_numbers, "QLoRA": qlora_numbers}
#: The numbers of which some change is not noticed: (entry, number) -> why.
UNNOTICED = {
    ("qlora-eq-3", "1e-6"): "a bound may be 10 times as large",
    ("qlora-eq-5", "1e-6"): "a bound may be 10 times as large",
    ("qlora-gradients", "2e-8"): "a bound may be 10 times as large",
    ("qlora-nf4-counts", "0"): "the rows compute 8 and 9",
    ("qlora-dq-no-loss", "0.2"): "the note has 0.5 % without the mean",
    ("qlora-26-mb", "8"): "the formula has a factor of 2, too",
}


@pytest.fixture(scope="module")
def audits():
    """{paper: (its audit, [(entry, its rows, what was derived from them)])}"""
    found = {}
    for paper, module in MODULES.items():
        audit = module._audited(module.audit())
        said = {c.id: [s for ids, s in audit.derived if c.id in ids] for c in map.claims()}
        found[paper] = audit, [(c, rows, said[c.id]) for c, rows in agreement.entries(audit)]
    return found


def changed(text):
    """Each number of a text with the texts in which one of its digits is another."""
    for n in re.finditer(r"(?<!\w)(?<!\w-)(?<!\d[.,])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", text):
        places = [i for i in range(*n.span()) if text[i].isdigit()]
        yield n[0], [text[:i] + d + text[i + 1 :] for i in places for d in "0123456789" if d != text[i]]


def test_a_changed_digit_of_a_number_is_noticed(audits):
    tried = passed = counted = 0
    unnoticed = set()
    for audit, entries in audits.values():
        for claim, rows, said in entries:
            for number, texts in changed(claim.number):
                lies = [replace(claim, number=text) for text in texts]
                if claim.id == audit.whole:
                    silent = [lie for lie in lies if not agreement.miscounted(lie, rows)]
                else:
                    silent = [lie for lie in lies if not agreement.missing(lie, rows, said)]
                tried, passed, counted = tried + len(lies), passed + len(silent), counted + 1
                unnoticed |= {(claim.id, number)} if silent else set()
    print(
        f"{tried - passed} of {tried} changed digits are noticed, {passed / tried:.2%} are not, in {len(unnoticed)} of {counted} numbers"
    )
    bounds = {
        key for key, why in UNNOTICED.items() if why.startswith("a bound")
    }  # which digit passes is in the last bits of a BLAS
    assert set(UNNOTICED) - bounds <= unnoticed <= set(UNNOTICED) and tried > 5000
    assert len(unnoticed) <= counted / 10 and passed <= tried / 100


def test_a_changed_digit_of_a_statement_is_noticed_but_for_two_percent(audits):
    tried = passed = 0
    for audit, entries in audits.values():
        for claim, rows, said in entries:
            for _, texts in changed(claim.says):
                lies = [replace(claim, says=text) for text in texts]
                if claim.id == audit.whole:
                    silent = [lie for lie in lies if not agreement.miscounted(lie, rows)]
                else:
                    silent = [lie for lie in lies if not agreement.misquoted(lie, rows, said)]
                tried, passed = tried + len(lies), passed + len(silent)
    print(f"{tried - passed} of {tried} changed digits are noticed, {passed / tried:.2%} are not")
    assert passed <= tried / 50 and tried > 3000


@pytest.mark.parametrize(
    "paper, name, old, new",
    [
        ("QLoRA", "qlora-paged", "0 parameters", "1 parameters"),
        ("QLoRA", "qlora-eq-1", "0 of", "2 of"),
        ("QLoRA", "qlora-eq-6", "0 values", "1 values"),
        ("QLoRA", "qlora-eq-3", "1e-6", "1"),
        ("QLoRA", "qlora-fig-6-adapters", "288, 450,", "450, 288,"),
        ("QLoRA", "qlora-48-gb", "44.1 GB", "44.1 MB"),
        ("QLoRA", "qlora-counts", "6 do not hold", "30 do not hold"),
        ("LoRA", "lora-table-2-deberta", "2.36 M at r = 8; 4.72 M at r = 16", "4.72 M at r = 8; 2.36 M at r = 16"),
        ("LoRA", "lora-100-adapters", "35 TB", "350 TB"),
        ("LoRA", "lora-100-adapters", "353.5 GB", "354 GB or 35 GB"),
        ("LoRA", "lora-table-4-bitfit", "12.98 M", "14.2 M"),
        ("LoRA", "lora-table-4-bitfit", "12.98 M", "12.97 M"),
        ("LoRA", "lora-checkpoint", "36.0 MiB", "36.0 MB"),
    ],
)  # fmt: skip
def test_a_number_that_lies_is_noticed(paper, name, old, new, audits, monkeypatch):
    assert lying(MODULES[paper], name, "number", old, new, monkeypatch)


@pytest.mark.parametrize(
    "paper, name, old, new",
    [
        ("LoRA", "lora-checkpoint", "35 MB", "3.5 GB"),
        ("LoRA", "lora-table-4-bitfit", "14.2 M", "99.9 M"),
        ("LoRA", "lora-table-4-bitfit", "14.2 M", "14.2 GB"),
        ("LoRA", "lora-counts", "116", "115"),
        ("QLoRA", "qlora-eq-5-scale", "Equation 5", "Equation 6"),
        ("QLoRA", "qlora-dq-bits", "0.127", "0.128"),
    ],
)  # fmt: skip
def test_a_statement_that_lies_is_noticed(paper, name, old, new, monkeypatch):
    assert lying(MODULES[paper], name, "says", old, new, monkeypatch)


def lying(module, name, field, old, new, monkeypatch):
    """Whether something is said of a map in which a field of this entry is another, and of this entry alone."""
    (claim,) = (c for c in map.claims() if c.id == name)
    text = getattr(claim, field)
    assert text.count(old) == 1
    lie = replace(claim, **{field: text.replace(old, new)})
    altered = tuple(lie if c is claim else c for c in map.claims())
    monkeypatch.setattr(map, "claims", lambda: altered)
    said = module.contradictions()
    return bool(said) and all(sentence.startswith(f"{name}: ") for sentence in said)


LORA_EQ_1 = map.claims()[0]


@pytest.mark.parametrize(
    "number, lacking",
    [
        ("12.98 M", []),
        ("12.97 M", ["12.97"]),
        ("12.97 M, cut off", []),
        ("12.99 M", ["12.99"]),
        ("12.98 GB", ["12.98"]),
        ("14.2 M", ["14.2"]),
        ("12.98 M printed as 14.2 M", []),
        ("12.98 M printed as 14.3 M", ["14.3"]),
        ("1.2 M less", []),
        ("1.2 M", ["1.2"]),
        ("1 of 1 rows", []),
        ("1 row", ["1"]),
        ("11 biases", ["11"]),
        ("12.98 M, or 11 d", []),
        ("below 13 M, at most 13 M", []),
        ("below 130 M", ["130"]),
        ("below 12 M, at least 13 M", ["12", "13"]),
        ("NF4 and GPT-3", []),
    ],
)
def test_a_number_is_looked_for_among_what_was_computed(number, lacking):
    row = Row.judged("Table 4", "GPT-3", "BitFit", "11 d a layer", "14.2M", 12.976128)
    assert agreement.missing(replace(LORA_EQ_1, number=number), [row]) == lacking
    assert agreement.missing(replace(LORA_EQ_1, number="13.5 M"), [row], ["It is 13.5M."]) == []


@pytest.mark.parametrize(
    "number, computed, lacking",
    [
        ("at most 0.5", [0.4, 2.0], ["0.5"]),
        ("at most 2.5", [0.4, 2.0], []),
        ("at least 0.3", [0.4, 2.0], []),
        ("at least 0.5", [0.4, 2.0], ["0.5"]),
        ("within 1e-6", [3e-7], []),
        ("within 1e-7", [3e-7], ["1e-7"]),
        ("within 1", [3e-7], ["1"]),
        ("1e-5", [0.3], ["1e-5"]),
        ("1e-5", [1.2e-5], []),
    ],
)
def test_a_bound_is_of_all_that_was_computed_and_tight_and_a_step_has_its_exponent(number, computed, lacking):
    rows = [Claim.decided("§1", "", "", "none", x, True) for x in computed]
    assert agreement.missing(replace(LORA_EQ_1, number=number), rows) == lacking
