"""The numbers of the map are those that are computed by the audits and stored of the experiments, and every page has the same."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tinylora.cli import main
from tinylora.costs import memory, parameters
from tinylora.papers import agreement, claims, lora_numbers, map, qlora_numbers, switching
from tinylora.papers.claims import dynamics, page, registry
from tinylora.papers.verdict import HOLDS, Claim, Row

TOP = Path(__file__).parents[2]
BY_ID = {claim.id: claim for claim in map.claims()}
LORA, QLORA = lora_numbers.audit(), qlora_numbers.audit()


# ------------------------------------------------------------------------------------------------------------------- the two audits
@pytest.mark.parametrize("module, rows", [(lora_numbers, LORA), (qlora_numbers, QLORA)], ids=["LoRA", "QLoRA"])
def test_the_map_says_what_the_audits_compute(module, rows):
    assert module.contradictions(rows) == []
    assert all(sentence for _, sentence in module.derived(rows))


def test_every_row_that_does_not_follow_has_an_entry_that_says_so():
    for row in (*LORA, *QLORA):
        if row.verdict in ("does not follow", HOLDS[False]):
            assert BY_ID[row.claim].verdict == "does not follow", row
    assert sum(not row.claim for row in LORA) == 23 and sum(not row.claim for row in QLORA) == 3


def test_the_commands_print_place_statement_verdict_and_number_of_the_map():
    for text, rows, entries in ((lora_numbers.describe(LORA), LORA, 31), (qlora_numbers.describe(QLORA), QLORA, 52)):
        found = re.findall(r"^(.+) \[([a-z\d-]+)\]: (.+)\n  (.+?): (.+)$", text, re.M)
        assert len(found) == entries and {row.claim for row in rows} - {""} <= {name for _, name, *_ in found}
        for place, name, says, verdict, reason in found:
            c = BY_ID[name]
            assert (place, says, verdict) == (c.place, c.says, c.verdict)
            assert reason == (f"{c.number}. {c.why}" if c.number else c.why)


def changed(monkeypatch, **fields):
    """The map with other fields in one entry: id, and what is replaced."""
    name = fields.pop("id")
    altered = tuple(replace(claim, **fields) if claim.id == name else claim for claim in map.claims())
    assert altered != map.claims()
    monkeypatch.setattr(map, "claims", lambda: altered)


@pytest.mark.parametrize(
    "command, change, said",
    [
        (
            ["count"],
            {"id": "lora-table-4-bitfit", "verdict": "holds exactly"},
            "lora-table-4-bitfit: the map says 'holds exactly', and what is computed gives 'does not follow'",
        ),
        (
            ["count"],
            {"id": "lora-table-1", "verdict": "does not follow"},
            "lora-table-1: the map says 'does not follow', and what is computed gives 'holds'",
        ),
        (
            ["count"],
            {"id": "lora-counts", "number": "21 of 116"},
            "lora-counts: the map has 21, which was not computed",
        ),
        (["count"], {"id": "peft-t5-count", "number": "18,874,386"}, "peft-t5-count: the map has 18,874,386, which"),
        (
            ["memory", "--audit", "--out", "none"],
            {"id": "qlora-app-b-warm-up", "verdict": "holds exactly"},
            "qlora-app-b-warm-up: the map says 'holds exactly', and what is computed gives 'does not follow'",
        ),
        (
            ["memory", "--audit", "--out", "none"],
            {"id": "qlora-780-gb", "number": "783.5 GB at 12 bytes a weight"},
            "qlora-780-gb: the map has 783.5, which was not computed",
        ),
    ],
    ids=lambda x: x["id"] if isinstance(x, dict) else None,
)
def test_a_map_that_lies_is_named_and_the_exit_status_is_1(command, change, said, monkeypatch, capsys):
    changed(monkeypatch, **change)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert f"the paper map disagrees: {said}" in error and len(error.splitlines()) == 1


def test_an_entry_that_the_map_lacks_is_named(monkeypatch, capsys):
    kept = tuple(claim for claim in map.claims() if claim.id != "lora-table-1")
    monkeypatch.setattr(map, "claims", lambda: kept)
    assert main(["count"]) == 2
    assert "map.toml: expected an entry lora-table-1, which rows of the audit are about" in capsys.readouterr().err


def test_the_map_is_read_only_where_it_is_printed():
    code = "import sys, tinylora, tinylora.cli; print(sorted({'tomllib', 'tinylora.papers.map'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_verdict_of_rows_is_that_of_the_worst():
    claim = BY_ID["lora-eq-1"]
    good, bad, unknown, rough = (
        Row("§1", "", "", "", "1", 1.0, verdict) for verdict in ("match", "does not follow", "not derivable", "roughly")
    )
    false = Claim.decided("§1", "", "", "words", 1, False)
    for rows, verdict in (
        ([good], "holds"), ([good, bad], "does not follow"), ([unknown, good], "cannot be checked here"),
        ([unknown, bad], "does not follow"), ([false], "does not follow"), ([good, rough], "does not follow"),
    ):  # fmt: skip
        assert agreement.bears_out(claim, rows) == verdict
    assert agreement.bears_out(replace(claim, says="It is roughly 1."), [good, rough]) == "holds"
    assert agreement.bears_out(claim, [Claim.decided("§1", "", "", "none", 1e-9, "roughly")]) == "holds"


# ------------------------------------------------------------------------------------------------------------------ the experiments
@cache
def stored():
    """{experiment: [the result of each seed]} of the run that figures/claims/README.md was written from."""
    return json.loads((TOP / "figures" / "claims" / "results.json").read_text(encoding="utf-8"))


def every(experiment, key):
    """The number `key` of every seed."""
    return registry.values(stored()[experiment], key)


def mean(experiment, key):
    return every(experiment, key).mean(axis=0)


def cut(x, digits):
    """A bound from below: cut off and not rounded."""
    return f"{np.floor(x * 10**digits) / 10**digits:.{digits}f}"


def full_rank_target():
    mse = every("full_rank_target", "mse")
    return f"r = 8 leaves {(mse[:, 3] / mse[:, -1]).min():.0f} times the error of full rank"


def weight_types():
    three, all_, one = (mean("weight_types", f"gain_{where}") for where in ("spread", "everywhere", "one"))
    return (
        f"error of the best single matrix over that of all four: {three:.1f} where three matrices were moved, {all_:.2f} and {one:.2f} "
        "otherwise"
    )


def rank_sweep():
    mse = mean("rank_sweep", "mse")
    assert {f"{x:.4f}" for x in mse[1:]} == {f"{mse[1]:.4f}"}
    return f"{mse[0]:.4f} at r = 1; {mse[1]:.4f} from r = 2 on, where rank 2 was planted"


def amplification():
    weak, random = mean("amplification", "weak"), mean("amplification", "random")
    return f"{weak[1]:.1f} at r = 4 and {weak[2]:.2f} at r = 64; a ΔW in random directions has {random[1]:.1f} at r = 4"


def learning_rates():
    r4, r16, one = (dynamics.rate_ratio(stored()["learning_rate_ratio"], name) for name in ("r4", "r16", "r4_alpha1"))
    return (
        f"{r4[0]:g} to {r4[1]:g} times at r = 4, {r16[0]:g} to {r16[1]:g} at r = 16, {one[0]:g} to {one[1]:g} at α = 1"
    )


def exchanged_alpha():
    n = mean("alpha_is_like_lr", "different_scaled")
    return f"{n:g} losses of 4 α with A₀ halved differ in any bit from those of 2 η"


def few_examples():
    sizes = mean("low_data", "sizes")
    low, full = mean("low_data", "ratio"), mean("low_data", "ratio_full_rank")
    best = int(low.argmax())
    most = every("low_data", "ratio_full_rank").max()
    assert full.max() < most
    return f"full / LoRA {low[best]:.2f} at n = {sizes[best]:g}; at most {most:.2f} with an update of full rank"


def shape_of_table_18():
    best, rise = np.unique(every("table18_shape", "best_scarce")), every("table18_shape", "rise_scarce")
    return (
        f"least at r = {' or '.join(f'{r:g}' for r in best)}; {rise.min():.2f} to {rise.max():.2f} times that at r = d"
    )


def rank_8_and_64():
    phi, chance = mean("subspace_overlap", "phi"), mean("subspace_overlap", "chance")
    return f"φ(1, 1) = {phi[0]:.2f} and φ(8, 64) = {phi[3]:.2f}; {chance[3]:.2f} by chance"


def two_seeds():
    phi, gaussian = every("two_seeds", "phi"), mean("two_seeds", "gaussian")
    return f"φ(2, 2) at least {cut(phi[:, 1].min(), 3)}; at 16 dimensions {phi[:, 2].mean():.2f} against {gaussian[2]:.2f} of Gaussians"


def top_of_delta():
    weak, random, chance, top = (mean("top_of_delta_in_w", key) for key in ("weak", "random", "chance", "top"))
    return f"φ = {weak:.2f} and {random:.2f}; chance {chance:.2f}; {top:.2f} where W's top was planted"


def intrinsic_dimension():
    most = max(every("intrinsic_dimension", f"d90_{start}").max() for start in ("random", "head", "near"))
    return f"at most {most:.0f} of {mean('intrinsic_dimension', 'weights'):,.0f} weights"


def unmerged():
    a, b, c, d = (f"{100 * share:.0f} %" for share in mean("merge_restores", "restored"))
    sizes = "{:g}, {:g}, {:g} and {:g}".format(*mean("merge_restores", "sizes"))
    assert every("merge_restores", "largest").max() < 1e-6  # which the entry's `why` says
    return f"{a}, {b}, {c} and {d} of the float32 entries restored to the bit at ‖ΔW‖/‖W₀‖ = {sizes}"


def first_step():
    sgd, root, adam, adam_root = (mean("first_step", key)[-1] for key in ("sgd_r", "sgd_rs", "adam_r", "adam_rs"))
    return f"gain at r = 256 over that at r = 1: {sgd:.3f} and {root:.2f} under SGD, {adam:.2f} and {adam_root:.1f} under Adam"


def exchange():
    assert every("invariance", "relative_three").max() < 1e-14
    return (
        f"{mean('invariance', 'different_powers'):g} losses differ in any bit at p = 4 and q = 8; below 1e-14 at p = 3"
    )


def starts():
    of = {key: f"{mean('quantized_starts', key):.3f}" for key in stored()["quantized_starts"][0]}
    return (
        f"error on a Gaussian {of['gauss_nf4']} with NF4 alone, {of['gauss_pissa']} with PiSSA, {of['gauss_loftq_5']} with 5 steps of "
        f"LoftQ; on a falling spectrum {of['power_nf4']}, {of['power_pissa']} and {of['power_loftq_5']}"
    )


def aligned():
    ours, bound, lora = (f"{mean('aligned_first_step', key):.2f}" for key in ("lora_ga", "bound", "lora"))
    assert ours == bound
    return f"cosine {ours}, the best that rank 2r allows; {lora} for LoRA"


def rate_ratio():
    narrow, wide = (
        (every("lora_plus_ratio", f"width_{n}_ratio_1") / every("lora_plus_ratio", f"width_{n}_ratio_16")).mean()
        for n in (32, 128)
    )
    return f"a ratio of 1 leaves {narrow:.3g} times the error of 16 at width 32, {wide:.2g} times at width 128"


def larger_start():
    descent, sign = every("lora_plus_start", "descent"), every("lora_plus_start", "sign")
    return f"the two runs differ by {descent.max():g} under gradient descent, by more than {cut(sign.min(), 1)} under sign descent"


def vera():
    ours, lora = mean("vera_counts", "vera"), mean("vera_counts", "lora")
    return f"{ours:.2f} million at r = 256; {lora:.2f} million for LoRA of r = 1 on W_q and W_v of GPT-3"


def allocation():
    one, two, error, lora = (mean("adalora_allocation", key) for key in ("rank_one", "rank_two", "error", "error_lora"))
    return f"planted ranks 1 and 6 are given {one:g} and {two:g}; error {error:.2f} against LoRA's {lora:.2f}"


def correlation():
    found = (f"{mean('magnitude_and_direction', f'{method}_rows'):.3f}" for method in ("lora", "dora", "full"))
    lora, dora, full = (number.replace("-", "−") for number in found)
    return f"{lora} for LoRA, {dora} for DoRA, {full} for full fine-tuning"


def entropy():
    rise = mean("calibrated_entropy", "entropy_best") - mean("calibrated_entropy", "entropy_nf4")
    return f"{rise:.2f} bits more, at {mean('calibrated_entropy', 'error_best'):.2f} times NF4's squared error"


def learned():
    lora, full = mean("learns_less_forgets_less", "learned_lora"), mean("learns_less_forgets_less", "learned_full")
    ranks = every("learns_less_forgets_less", "rank_full") / every("learns_less_forgets_less", "rank_lora")
    return f"{lora:.3f} learned against {full:.3f}; {ranks.mean():.3g} times the rank"


def forgotten():
    return f"{-mean('learns_less_forgets_less', 'kept_more'):.3f} less of the old task kept at equal learning"


NUMBERS = {
    "lora-full-rank-target": full_rank_target, "lora-table-5-spread": weight_types, "lora-table-6": rank_sweep,
    "lora-table-7": amplification, "lora-table-12": learning_rates, "lora-alpha-rate": exchanged_alpha,
    "lora-table-16": few_examples, "lora-table-18": shape_of_table_18, "lora-fig-3": rank_8_and_64, "lora-fig-4": two_seeds,
    "lora-fig-8": top_of_delta, "lora-intrinsic-dimension": intrinsic_dimension, "lora-unmerge": unmerged,
    "rslora-first-step": first_step, "lwr-exchange": exchange, "pissa-loftq": starts, "lora-ga": aligned, "lora-plus": rate_ratio,
    "lora-plus-start": larger_start, "vera-counts": vera, "adalora": allocation, "dora-correlation": correlation,
    "ir-qlora-entropy": entropy, "lora-learns-less": learned, "lora-forgets-less": forgotten,
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_the_number_of_an_experiment_is_what_the_stored_run_gives(name):
    assert BY_ID[name].number == NUMBERS[name]()
    assert (
        "tests/papers/test_map_numbers.py::test_the_number_of_an_experiment_is_what_the_stored_run_gives"
        in BY_ID[name].test
    )


def test_every_entry_on_an_experiment_has_its_number_held():
    code = {
        f"tinylora/papers/claims/{Path(e.function.__code__.co_filename).name}:{e.function.__name__}"
        for e in claims.EXPERIMENTS.values()
    }
    assert {name for name, claim in BY_ID.items() if code & set(claim.code)} == set(NUMBERS)


def test_the_page_of_the_experiments_is_what_the_stored_run_gives():
    assert list(stored()) == list(claims.EXPERIMENTS) and {len(found) for found in stored().values()} == {3}
    drawn = {}
    for name, e in claims.EXPERIMENTS.items():
        if e.draw:
            drawn |= dict.fromkeys((name, *e.draw.beside), e.draw.file)
    written = (TOP / "figures" / "claims" / "README.md").read_text(encoding="utf-8")
    assert written == page.text(stored(), registry.SEEDS, drawn)


def test_what_a_switch_moves_are_the_bytes_of_A_and_B_of_the_embedded_model():
    moved = 4 * parameters.lora_on(parameters.llama_shapes(memory.config_of("base")), switching.JOB.r)
    assert BY_ID["lora-switch"].number.endswith(f"; {moved:,} bytes from disk on the embedded model")


# -------------------------------------------------------------------------------------------------------------------- on other pages
TABLE_4 = r"| $I$ | $\text{E}[M]$ |"
#: (page, what stands before the number there and names what it is about, entry, the number as the map has it, the same with more digits)
PRINTED = [
    ("docs/questions.md", '<a id="offset">', "bnb-offset", "929/960", "929/960"),
    ("docs/questions.md", '<a id="paging">', "bnb-paged-states", "100,000", "100,000"),
    ("docs/questions.md", '<a id="halved-counts">', "qlora-py-counts", "6,898,323,456", "6,898,323,456"),
    ("docs/questions.md", '<a id="halved-counts">', "qlora-py-counts", "159,907,840", "159,907,840"),
    ("docs/nf4.md", "entropy of the indices would be 4 bits", "qlora-equal-bins", "3.8847", "3.8847"),
    ("docs/nf4.md", "entropy of the indices would be 4 bits", "af4-title", "3.8847", "3.8847"),
    ("docs/nf4.md", "# What is NF4 optimal for", "qlora-nf4-optimal", "0.025 %", "0.0250 %"),
    ("docs/nf4.md", "# What is NF4 optimal for", "qlora-nf4-optimal", "5.86 %", "5.8628 %"),
    (
        "docs/questions.md",
        "the gain of the first step at r = 256 by that at r = 1",
        "rslora-first-step",
        "0.004",
        "0.004",
    ),
    (
        "docs/questions.md",
        "the gain of the first step at r = 256 by that at r = 1",
        "rslora-first-step",
        "1.02",
        "1.02",
    ),
    ("docs/nf4.md", "\n| 1 | 2.6137 |", "qlora-nf4-three-sizes", "67", "67"),
    ("docs/nf4.md", "\n| 1 | 2.6137 |", "qlora-nf4-three-sizes", "69", "69"),
    ("docs/nf4.md", "\n| 2 | 3.2011 |", "qlora-nf4-three-sizes", "434", "434"),
    ("docs/nf4.md", "\n| 2 | 3.2011 |", "qlora-nf4-three-sizes", "453", "453"),
    ("docs/nf4.md", TABLE_4, "af4-law", "2.077", "2.077204"),
    ("docs/nf4.md", TABLE_4, "af4-law", "3.802", "3.802295"),
    ("docs/nf4.md", TABLE_4, "qlora-absmax-rescales", "2.596", "2.596111"),
    ("docs/nf4.md", TABLE_4, "bof4-signed", "0.007992", "0.0079915257"),
    ("docs/nf4.md", "The test of Shapiro and Wilk", "qlora-app-f-small", "6.1 %", "6.1 %"),
]


@pytest.mark.parametrize("page_, mark, name, number, there", PRINTED, ids=lambda x: x if "/" not in x else None)
def test_a_number_that_another_page_prints_is_the_maps(page_, mark, name, number, there):
    text = (TOP / page_).read_text(encoding="utf-8")
    _, found, after = text.partition(mark)
    assert found and re.search(rf"(?<![\d.,]){re.escape(there)}(?![\d]|[.,]\d)", after[:1500]), there
    assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", BY_ID[name].number), BY_ID[name].number
    if there != number:
        digits, more = (x.removesuffix(" %") for x in (number, there))
        assert f"{float(more):.{len(digits.partition('.')[2])}f}" == digits


def test_the_pages_that_are_written_from_the_map_have_its_numbers_word_for_word():
    for name, chosen in (("papers", BY_ID.values()), ("errata", [c for c in BY_ID.values() if c.erratum])):
        text = (TOP / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for claim in chosen:
            entry = text.partition(f'<a id="{claim.id}"></a>')[2].partition("\n- <a")[0]
            assert claim.says in entry and (not claim.number or f"  Found: {claim.number}. {claim.why}" in entry), (
                claim.id
            )
