"""QLoRA's statements about memory, and what else in the paper is arithmetic: one test for each, with its number.

A name that says "not" holds a claim that fails, or a number that does not follow.
"""

import pytest

import tinylora as tl
from tinylora import footprints, memory
from tinylora.footprints import FIGURE_6, SIZES, TABLE_4

ROWS = footprints.audit()


def rows(where, text=""):
    found = [r for r in ROWS if r.where == where and text in f"{r.model} {r.method} {r.setting}"]
    assert found, (where, text)
    return found


def one(where, text):
    (row,) = rows(where, text)
    return row


def numbers(found, digits):
    return [round(r.computed, digits) for r in found]


# -------------------------------------------------------------------------------------------------------------------- §1 and §2
def test_s1_full_fine_tuning_of_65B_takes_more_than_780_GB_at_12_bytes_a_parameter():
    row = one("§1", "12 bytes a weight")
    assert row.verdict == "holds" and f"{row.computed:.1f}" == "783.4"
    a = memory.predict("llama-65b", "full", precision=memory.PAPER)
    assert (a.total - a.activations) / 1e9 == row.computed
    master = memory.predict("llama-65b", "full", precision=memory.MASTER)
    assert f"{(master.total - master.activations) / 1e9:,.1f}" == "1,044.6"


def test_s1_qlora_of_65B_takes_less_than_48_GB():
    beside, together = rows("§1", "QLoRA")
    assert (beside.verdict, together.verdict) == ("holds", "holds")
    assert f"{beside.computed:.1f} {together.computed:.1f}" == "44.1 44.9"
    for r in (beside, together):
        assert r.printed == "<48GB" and r.value == 48


def test_s1_the_sizes_are_the_released_models():
    assert numbers([r for r in rows("§1") if r.setting == "weights"], 3) == [6.738, 13.016, 32.529, 65.286]
    assert {r.verdict for r in rows("§1") if r.setting == "weights"} == {"rounds to"}


def test_s2_18_MB_is_one_layers_share_of_567_and_not_what_checkpointing_keeps():
    assert one("§2", "input gradients").verdict == "not derivable"
    share, kept = (r for r in rows("§2") if r.printed == "18MB")
    assert share.verdict == "rounds to" and f"{share.computed:.2f}" == "17.72"
    assert kept.verdict == "does not follow" and f"{kept.computed:.1f}" == "99.7"
    assert footprints.inputs_ratio() == pytest.approx(1 / 5.6875)  # h of h + h + h + 2.6875 h


def test_s2_26_MB_is_a_truncated_fifth_of_a_percent_or_26_MiB_of_13_h_a_layer():
    rough, exact = rows("§2", "L · 8")[0], rows("§2", "0.2 %")[0]
    assert (exact.verdict, f"{exact.computed:.2f}") == ("truncated", "26.95")
    assert (rough.verdict, rough.computed) == ("match", 26.0)


def test_s2_5048_MB_is_not_the_4_bit_base_which_is_3866():
    row = one("§2", "NF4 + DQ")
    assert row.verdict == "does not follow" and f"{row.computed:.0f}" == "3866"
    a = memory.predict("llama-7b", r=64, precision=memory.PAPER)
    assert (a.weights + a.codes + a.constants) / 1e6 == row.computed
    assert [f"{footprints.base_bytes(s) / 1e6:,.0f}" for s in SIZES] == ["3,866", "7,201", "17,414", "34,459"]


# -------------------------------------------------------------------------------------------------------------------------- §3
def test_s3_double_quantization_takes_127_thousandths_of_a_bit_and_saves_3_GB_of_65B():
    assert [(r.printed, r.verdict) for r in rows("§3")] == [
        ("0.5", "match"),
        ("0.127", "rounds to"),
        ("0.373", "rounds to"),
    ]
    assert [r.computed for r in rows("§3")] == [0.5, 0.126953125, 0.373046875]
    assert f"{one('§1', 'saved in all').computed:.2f}" == "3.04"
    plain, double = (memory.predict("llama-65b", double_quant=d).constants for d in (False, True))
    assert f"{(plain - double) / 1e9:.2f}" == "3.02"  # of the linear layers alone


# ------------------------------------------------------------------------------------------------------------------ figure 6
def test_figure_6_adapters_and_optimizer_follow_one_formula():
    formula, four = rows("Figure 6", "L · 64 · 18 h"), rows("Figure 6", "4 × the adapters")
    assert [r.computed for r in formula] == [288, 450, 877.5, 1440] and {r.verdict for r in formula} == {"match"}
    assert [r.computed for r in four] == [1152, 1800, 3510, 5760] and {r.verdict for r in four} == {"match"}


def test_figure_6_adapters_are_not_those_of_a_llama():
    real = rows("Figure 6", "all 7 matrices")
    assert numbers(real, 1) == [305.0, 477.5, 930.0, 1525.0] and {r.verdict for r in real} == {"does not follow"}
    megabytes = [memory.predict(f"llama-{s}", r=64, precision=memory.PAPER).adapters / 1e6 for s in SIZES]
    assert [f"{n:,.1f}" for n in megabytes] == ["319.8", "500.7", "975.2", "1,599.1"]


def test_figure_6_model_bars_do_not_follow():
    model = rows("Figure 6", "model")
    assert numbers(model, 0) == [3687, 6868, 16607, 32863] and {r.verdict for r in model} == {"does not follow"}
    assert [round(r.difference) for r in model] == [1359, 1608, 2695, 4211]


def test_figure_6_totals_are_more_than_their_labels_and_567_MB_fills_two_of_four():
    labels, filled = rows("Figure 6", "three labels"), rows("Figure 6", "567 MB")
    assert [r.verdict for r in labels] == ["does not follow"] * 4
    assert [round(footprints.figure_6_rest(s), 2) for s in SIZES] == [0.57, 0.83, 1.57, 1.76]
    assert [r.verdict for r in filled] == ["rounds to", "rounds to", "does not follow", "does not follow"]
    assert numbers(filled, 2) == [6.89, 11.34, 24.82, 46.0]
    assert list(FIGURE_6) == list(SIZES)


# --------------------------------------------------------------------------------------------------- tables 1, 4 and 6; Elo
def test_footprints_of_4_bit_models_are_not_their_weights_and_adapters():
    four_bit = [r for r in ROWS if r.method == "4-bit"]
    assert [(r.printed, round(r.computed, 1)) for r in four_bit] == [
        ("41GB", 36.1), ("21GB", 18.4), ("10GB", 7.7), ("5GB", 4.2), ("6GB", 4.2),
    ]  # fmt: skip
    assert {r.verdict for r in four_bit} == {"does not follow"}
    assert [round(n * 5 / 8, 1) for n in (65, 33, 13, 7)] == [
        40.6,
        20.6,
        8.1,
        4.4,
    ]  # 5 bits a weight: 41 and 21, not 10 and 5


def test_footprints_of_16_bit_models_are_2_bytes_a_weight_the_33B_of_its_nominal_size():
    vicuna, assistant = one("Table 1, 6", "Vicuna"), one("Table 6", "16-bit")
    assert vicuna.verdict == "rounds to" and f"{vicuna.computed:.2f}" == "26.03"
    assert assistant.verdict == "does not follow" and f"{assistant.computed:.2f}" == "65.06"


def test_table_4_the_last_mean_is_not_that_of_its_row():
    found = rows("Table 4")
    assert [f"{r.computed:.2f}" for r in found] == ["53.04", "52.19", "52.99"]
    assert [r.verdict for r in found] == ["rounds to", "rounds to", "does not follow"]


def test_table_4_FP4_is_not_consistently_a_point_behind():
    behind = [round(a - b, 1) for a, b in zip(TABLE_4["BFloat16"][0], TABLE_4["Float4"][0], strict=True)]
    assert behind == [1.2, 1.6, -0.1, 0.6, 1.8, 2.0, 0.5, -0.8]


def test_elo_is_rounded_up():
    assert numbers([one("§5.2", "1100"), one("Table 7", "10 points"), *rows("§5.3")], 2) == [64.01, 1.44, 29.30, 27.66]
    assert {r.verdict for r in ROWS if r.method == "Elo"} == {"roughly"}
    assert footprints.win_rate(0) == 0.5 and footprints.win_rate(77) + footprints.win_rate(-77) == pytest.approx(1)


# --------------------------------------------------------------------------------------------------------- what learners ask
def test_parameter_counts_are_halved_because_bytes_were_counted(rng):
    trained, counted, there = footprints.halved_counts()
    assert (trained, counted, there) == (159_907_840, 3_660_320_768, 6_898_323_456)
    assert [(r.printed, r.verdict) for r in rows("qlora.py's log")] == [
        ("3,660,320,768", "match"),
        ("79,953,920", "match"),
        ("2.184", "rounds to"),
    ]
    q = tl.quantize(rng.standard_normal((6, 64)).astype("float32"))
    assert q.packed.size == q.size / 2 == 6 * 64 / 2  # what others count, and what `size` says


def test_a_7B_model_takes_5_GB_and_not_3_and_a_half():
    steps = footprints.five_gigabytes()
    assert [f"{n / 1e9:.2f}" for _, n in steps] == ["3.37", "3.76", "3.87", "4.19", "4.51", "5.78", "6.05"]
    assert steps[-1][1] == memory.predict("llama-7b", r=64, precision=memory.PAPER, checkpointing=True).total
    assert [n for _, n in steps] == sorted(n for _, n in steps)


# ------------------------------------------------------------------------------------------------------------------- as text
def test_the_audit_is_printed_whole_with_its_verdicts_counted():
    text = footprints.describe()
    assert (
        "59 numbers: 15 rounds to, 3 holds, 1 truncated, 12 match, 1 not derivable, 23 does not follow, 4 roughly"
        in text
    )
    for r in ROWS:
        assert r.printed in text and r.setting in text
    for finding in footprints.findings():
        assert f"* {finding}" in text


def test_the_findings_state_the_numbers_that_were_computed():
    text = " ".join(footprints.findings())
    for said in (
        "783.4 GB", "1,044.6 GB", "44.1 GB", "44.9 GB", "1,491 kB a token", "380 tokens", "567/32 = 17.7", "262 kB a token",
        "100 MB at that length", "only up to 69 tokens", "2,190 MB, and 134 MB of inputs", "26.95 MB", "(8.1 and 4.4)",
        "1,359, 1,608, 2,695, 4,211 MiB above", "571, 418, 453, 329 MiB remain", "52.99, not 53.1", "in 6 of 8 columns",
        "64.0 % and 1.44 %", "29.3 % and 27.7 %", "3.37 GB are half a byte", "3,660,320,768 = 6,898,323,456 less half",
    ):  # fmt: skip
        assert said in text, said


def test_the_table_by_size_holds_12_and_16_bytes_a_parameter():
    lines = [line.split() for line in footprints.by_size().splitlines()]
    found = [[words[i] for i in (0, 2, 4, 6)] for words in lines[1:]]
    assert found == [
        ["7B", "80.86", "107.81", "3.87"],
        ["13B", "156.19", "208.25", "7.20"],
        ["33B", "390.35", "520.46", "17.41"],
        ["65B", "783.43", "1,044.57", "34.46"],
    ]
