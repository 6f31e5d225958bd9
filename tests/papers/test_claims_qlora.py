"""QLoRA's statements, as far as arithmetic or a CPU reaches: one test for each, with its number.

A name that says "not" holds a claim that fails, or a number that does not follow.
"""

import re
from dataclasses import replace
from math import erf, sqrt
from statistics import NormalDist

import numpy as np
import pytest

import tinylora as tl
from tinylora import codebooks, quantize
from tinylora.costs import memory
from tinylora.papers import map, nf4_construction, normality, qlora_numbers
from tinylora.papers.qlora_numbers import FIGURE_6, SIZES, TABLE_4

ROWS = qlora_numbers.audit()


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
    assert qlora_numbers.inputs_ratio() == pytest.approx(1 / 5.6875)  # h of h + h + h + 2.6875 h


def test_s2_26_MB_is_a_truncated_fifth_of_a_percent_or_26_MiB_of_13_h_a_layer():
    rough, exact = rows("§2", "L · 8")[0], rows("§2", "0.2 %")[0]
    assert (exact.verdict, f"{exact.computed:.2f}") == ("truncated", "26.95")
    assert (rough.verdict, rough.computed) == ("match", 26.0)


def test_s2_5048_MB_is_not_the_4_bit_base_which_is_3866():
    row = one("§2", "NF4 + DQ")
    assert row.verdict == "does not follow" and f"{row.computed:.0f}" == "3866"
    a = memory.predict("llama-7b", r=64, precision=memory.PAPER)
    assert (a.weights + a.codes + a.constants) / 1e6 == row.computed
    assert [f"{qlora_numbers.base_bytes(s) / 1e6:,.0f}" for s in SIZES] == ["3,866", "7,201", "17,414", "34,459"]


# ---------------------------------------------------------------------------------------------------------- equations 1 to 3
def test_eq_1_rounds_to_the_nearest_of_255_values_and_errs_by_at_most_absmax_over_254(rng):
    nearest, worst = rows("§2, eq. 1")
    assert (nearest.computed, nearest.verdict, worst.verdict) == (0, "holds", "holds")
    assert 0.999 / 254 < worst.computed <= 1 / 254
    x = rng.standard_normal(64) * 10 ** rng.uniform(-3, 3)
    c = 127 / np.abs(x).max()
    assert np.abs(np.round(c * x) / c - x).max() <= np.abs(x).max() / 254 * (1 + 1e-12)


def test_eq_2_divides_by_c_where_a_code_is_multiplied_by_absmax():
    row = one("§2, eq. 2", "Int8")
    assert row.verdict == "holds" and 0 < row.computed < 2**-24  # float32's rounding of k/127
    assert "multiplied by absmax" in row.note


def test_s2_blocks_fill_all_matrices_of_the_Llamas_and_others_need_a_partial_one(rng):
    row = one("§2", "b h mod")
    assert (row.computed, row.verdict, row.note) == (0, "holds", "5 × 13: 2 blocks")
    out, inputs = rng.integers(1, 40, 2)
    assert len(quantize(rng.standard_normal((out, inputs)).astype("float32")).absmax) == -(-out * inputs // 64)


def test_eq_3_and_5_are_what_a_layer_computes_and_eq_5_lacks_the_scale():
    lora, near, s = one("§2, eq. 3", "LoRA"), one("§3, eq. 5", "against dense"), one("§3, eq. 5", "eq. 3's s")
    assert lora.verdict == near.verdict == "holds" and 0 < lora.computed < 1e-6 and 0 < near.computed < 1e-6
    assert near.note == "bfloat16: 0.0029"
    assert (s.printed, s.computed, s.verdict) == ("no s", 16 / 64, "does not follow")


# -------------------------------------------------------------------------------------------------------------------------- §3
def test_eq_4_literally_is_not_NF4_and_contains_the_0_that_the_text_denies():
    finite, least = rows("§3, eq. 4")
    assert (finite.computed, finite.verdict, finite.note) == (15, "does not follow", "q_0 = −∞, then −1.376 … 1.376")
    assert (least.computed, least.verdict) == (0, "does not hold")
    q = nf4_construction.equation_4()[1:]
    assert np.abs(q + q[::-1]).max() < 1e-15 and q[7] == 0
    Q = [NormalDist().inv_cdf(i / 16) for i in range(1, 16)]  # 2^k in the denominators: what the text means
    meant = np.add(Q[:-1], Q[1:]) / 2
    assert len(meant) == 14 and np.abs(meant + meant[::-1]).max() < 1e-15 and np.abs(meant).min() > 0.07


def test_s3_NF4_has_8_values_up_to_0_and_9_from_0_on():
    below, above = rows("§3", "2^(k−1)")
    assert (below.computed, below.verdict, above.computed, above.verdict) == (8, "match", 9, "match")
    assert (codebooks.nf4() < 0).sum() == 7 and (codebooks.nf4() > 0).sum() == 8


def test_s3_NF4s_bins_are_not_equally_full_with_or_without_blocks(rng):
    blocks, constant = rows("§3", "entropy of the bins")
    assert f"{blocks.computed:.4f} {blocks.note}" == "3.8847 P from 0.0173 to 0.0924"
    assert f"{constant.computed:.4f} {constant.note}" == "3.9962 P from 0.0557 to 0.0710"
    assert blocks.verdict == constant.verdict == "does not hold"
    assert "1.848" in constant.setting
    scale, code = rng.uniform(1, 3), codebooks.nf4()
    P = qlora_numbers.normal_usage(scale)
    assert P.sum() == pytest.approx(1) and len(P) == 16
    between = [0.5 * (1 + erf(float(m) * scale / sqrt(2))) for m in codebooks.midpoints(code)]
    assert np.cumsum(P)[:-1] == pytest.approx(between)


def test_s3_absmax_does_not_rescale_sigma():
    row = one("§3", "deviation / mean")
    assert row.verdict == "does not hold" and f"{row.computed:.2f}" == "0.16"
    assert row.note == "mean 2.077, 2.596, 3.044, 3.802 σ: B = 16, 64, 256, 4096"


def test_s3_8_bit_constants_cost_little_and_FP8_without_the_mean_much():
    dynamic, fp8 = rows("§3", "more squared error")
    for row, code, known in ((dynamic, "dynamic8", (1.00051, 1.00516)), (fp8, "fp8_e4m3", (1.00200, 1.09198))):
        assert row.verdict == "roughly"
        for offset, expected in zip((None, 0.0), known, strict=True):  # the means of 30 draws of four times the size
            ratio, error = qlora_numbers.constants_cost(code, offset)
            assert 0 < error < 0.002 and abs(ratio - expected) < 5 * error
        ratio, error = qlora_numbers.constants_cost(code)
        assert row.computed == 100 * (ratio - 1) and f"± {100 * error:.3f}" in row.note
    assert f"{dynamic.computed:.2f} {fp8.computed:.1f}" == "0.05 0.2"
    assert dynamic.note.endswith("without the mean 0.5") and fp8.note.endswith("without the mean 9.3")
    with pytest.raises(ValueError, match="size = 100, expected a multiple of 16,384"):
        qlora_numbers.constants_cost(size=100)


def test_eq_6_in_two_steps_is_dequantize_to_the_bit():
    assert (one("§3, eq. 6", "QLoRA").computed, one("§3, eq. 6", "QLoRA").verdict) == (0, "holds")


def test_s3_gradients_run_through_the_dequantized_weight_and_stop_at_it():
    row = one("§3", "gradients of X")
    assert row.verdict == "holds" and 0 < row.computed < 2e-8
    assert row.note == "X's with W for Ŵ: 9.3 % off; W has none"


def test_s3_paged_AdamW_gives_the_same_bits_and_its_speed_is_not_derivable():
    bits, speed = rows("§3", "paged AdamW")
    assert (bits.computed, bits.verdict, bits.note) == (0, "holds", "261,312 bytes moved in 5 steps, 32,768 held")
    assert (speed.computed, speed.verdict) == (None, "not derivable")


def test_s3_double_quantization_takes_127_thousandths_of_a_bit_and_saves_3_GB_of_65B():
    bits = [*rows("§3", "bits a weight"), one("§3", "saved a weight")]
    assert [(r.printed, r.verdict) for r in bits] == [
        ("0.5", "match"),
        ("0.127", "rounds to"),
        ("0.373", "rounds to"),
    ]
    assert [r.computed for r in bits] == [0.5, 0.126953125, 0.373046875]
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
    assert [round(qlora_numbers.figure_6_rest(s), 2) for s in SIZES] == [0.57, 0.83, 1.57, 1.76]
    assert [r.verdict for r in filled] == ["rounds to", "rounds to", "does not follow", "does not follow"]
    assert numbers(filled, 2) == [6.89, 11.34, 24.82, 46.0]
    assert list(FIGURE_6) == list(SIZES)


# ------------------------------------------------------------------------------------------------------------------ figure 3, tables
def test_table_2_has_an_order_of_which_only_the_first_place_follows_from_normal_weights():
    printed = {r.method: r for r in rows("Table 2", "perplexity")}
    assert {r.verdict for r in printed.values()} == {"not derivable"}
    said = " ".join(r.note for r in printed.values())
    for number in ("0.01158", "0.01117; bitsandbytes' grid 0.01487", "0.03542", "0.00846"):
        assert number in said
    first, second = rows("Table 2", "order")
    assert first.verdict == "holds" and f"{first.computed:.2f}" == "1.32"
    assert (second.computed, second.verdict) == (4, "not derivable")
    assert second.note == "4.2 times NF4's error; a perplexity need not follow it"
    by_perplexity = sorted(printed.values(), key=lambda r: r.value)
    assert [r.method for r in by_perplexity] == ["NFloat4 + DQ", "Float4 (E3M0)", "Float4 (E2M1)", "Int4"]


def test_figure_3_and_tables_5_and_6_are_not_derivable():
    for row in (one("Figure 3", ""), one("Table 5", ""), one("Table 6", "ChatGPT")):
        assert (row.computed, row.verdict, row.value, row.difference) == (
            None,
            "not derivable",
            None,
            None,
        ) and row.note
    assert one("Figure 3", "").note == "its bits axis: 4.5 bits a weight, 4.127 with DQ; table 2 has perplexities"


def test_table_3_adapters_replicate_RoBERTa_and_do_not_reach_full_fine_tuning_of_T5_11B():
    small, large = rows("Table 3")
    assert (small.verdict, large.verdict) == ("holds", "does not hold")
    assert f"{small.computed:+.2f} {large.computed:+.1f}" == "+0.13 -1.2"
    assert large.note.startswith("−1.3 to −1.1")


# --------------------------------------------------------------------------------------------------- tables 1, 4 and 6; Elo
def test_footprints_of_4_bit_models_are_not_their_weights_and_adapters():
    four_bit = [r for r in ROWS if r.method == "4-bit"]
    assert [(r.printed, round(r.computed, 1)) for r in four_bit] == [
        ("41GB", 36.1), ("21GB", 18.4), ("10GB", 7.7), ("5GB", 4.2), ("6GB", 4.2),
    ]  # fmt: skip
    assert {r.verdict for r in four_bit} == {"does not follow"}
    # 5 bits a weight: 41 and 21, not 10 and 5
    assert [round(n * 5 / 8, 1) for n in (65, 33, 13, 7)] == [40.6, 20.6, 8.1, 4.4]


def test_footprints_of_16_bit_models_are_2_bytes_a_weight_the_33B_of_its_nominal_size():
    vicuna, assistant = one("Table 1, 6", "Vicuna"), one("Table 6", "16-bit")
    assert vicuna.verdict == "rounds to" and f"{vicuna.computed:.2f}" == "26.03"
    assert assistant.verdict == "does not follow" and f"{assistant.computed:.2f}" == "65.06"


def test_table_4_the_last_mean_is_not_that_of_its_row():
    found = rows("Table 4", "mean of its 8")
    assert [f"{r.computed:.2f}" for r in found] == ["53.04", "52.19", "52.99"]
    assert [r.verdict for r in found] == ["rounds to", "rounds to", "does not follow"]


def test_table_4_FP4_is_not_consistently_a_point_behind():
    behind = [round(a - b, 1) for a, b in zip(TABLE_4["BFloat16"][0], TABLE_4["Float4"][0], strict=True)]
    assert behind == [1.2, 1.6, -0.1, 0.6, 1.8, 2.0, 0.5, -0.8]
    (why,) = (claim.why for claim in map.claims() if claim.id == "qlora-table-4-fp4")
    assert [float(n) for n in re.findall(r"\d\.\d", why)] == [0.1, 0.8, min(x for x in behind if x > 0), max(behind)]
    row = one("Table 4", "points behind")
    assert row.verdict == "does not hold" and f"{row.computed:.2f}" == "0.85"
    assert row.note == "−0.8 to 2.0; behind in 6 of 8"


def test_elo_is_rounded_up():
    assert numbers([one("§5.2", "1100"), one("Table 7", "10 points"), *rows("§5.3")], 2) == [64.01, 1.44, 29.30, 27.66]
    assert {r.verdict for r in ROWS if r.method == "Elo" and r.where != "Table 1"} == {"roughly"}
    assert qlora_numbers.win_rate(0) == 0.5 and qlora_numbers.win_rate(77) + qlora_numbers.win_rate(
        -77
    ) == pytest.approx(1)


def test_the_paper_differs_from_itself():
    rating, points, dropout = one("Table 1", "Elo"), one("§1", "points above"), one("App. B", "dropout")
    assert (rating.value, rating.computed, rating.verdict) == (916, 913, "does not follow")
    assert (points.printed, points.note, points.verdict) == ("> 20", '§5.3: "nearly 20"', "does not follow")
    assert (dropout.value, dropout.computed, dropout.verdict) == (0.05, 0.1, "does not follow")
    warm = one("App. B", "warm-up")
    assert (warm.computed, warm.verdict) == (56.25, "does not follow")
    assert warm.note == "of a schedule that is constant 0 lie below the full rate"


# ------------------------------------------------------------------------------------------------------------------ appendices
def test_appendix_E_is_the_recipe_in_float32_and_not_in_float64():
    bits, wide = rows("App. E")
    assert (bits.computed, bits.verdict, wide.verdict) == (16, "match", "roughly")
    assert f"{wide.computed:.1e}" == "1.1e-07" and wide.note.startswith("1.9e-07")


def test_appendix_F_7_and_a_half_percent_rejected_are_2_point_6_percent_not_normal():
    measured, least = rows("App. F")
    assert (measured.printed, measured.computed, measured.verdict) == ("7.5%", None, "not derivable")
    assert least.verdict == "does not follow" and f"{least.computed:.2f}" == "2.63"
    assert least.computed == 100 * normality.least_share(0.075) == pytest.approx(100 * 0.025 / 0.95)


# --------------------------------------------------------------------------------------------------------- what learners ask
def test_parameter_counts_are_halved_because_bytes_were_counted(rng):
    trained, counted, there = qlora_numbers.halved_counts()
    assert (trained, counted, there) == (159_907_840, 3_660_320_768, 6_898_323_456)
    assert [(r.printed, r.verdict) for r in rows("qlora.py's log")] == [
        ("3,660,320,768", "match"),
        ("79,953,920", "match"),
        ("2.184", "rounds to"),
    ]
    q = tl.quantize(rng.standard_normal((6, 64)).astype("float32"))
    assert q.packed.size == q.size / 2 == 6 * 64 / 2  # what others count, and what `size` says


def test_a_7B_model_takes_5_GB_and_not_3_and_a_half():
    steps = qlora_numbers.five_gigabytes()
    assert [f"{n / 1e9:.2f}" for _, n in steps] == ["3.37", "3.76", "3.87", "4.19", "4.51", "5.78", "6.05"]
    assert steps[-1][1] == memory.predict("llama-7b", r=64, precision=memory.PAPER, checkpointing=True).total
    assert [n for _, n in steps] == sorted(n for _, n in steps)


# ------------------------------------------------------------------------------------------------------------------- as text
def sentences(rows):
    """What is derived from the rows, as far as they bear it out."""
    return [sentence for _, sentence in qlora_numbers.derived(rows) if sentence]


def test_the_audit_is_printed_whole_with_its_verdicts_counted():
    text = qlora_numbers.describe()
    assert (
        "99 rows: 15 rounds to, 14 holds, 1 truncated, 15 match, 11 not derivable, 30 does not follow, "
        "6 does not hold, 7 roughly" in text
    )
    for r in ROWS:
        assert r.printed in text and r.setting in text and r.note in text
    for sentence in sentences(ROWS):
        assert f"  computed: {sentence}" in text


def test_the_audit_changes_no_generator_and_a_models_rows_are_a_part_of_it():
    tl.seed(5)
    before = tl.backend.generator().bit_generator.state
    again = qlora_numbers.audit()
    assert tl.backend.generator().bit_generator.state == before
    assert [(r.setting, r.verdict, r.note) for r in again] == [(r.setting, r.verdict, r.note) for r in ROWS]
    lines = {" ".join(line.split()) for line in qlora_numbers.describe().splitlines()}
    part = [" ".join(line.split()) for line in qlora_numbers.describe_size("llama-7b").splitlines()]
    assert len(part) == 2 + sum(r.model == "Llama 7B" for r in ROWS) and set(part[1:]) <= lines


def test_what_is_derived_states_the_numbers_that_were_computed():
    text = " ".join(sentences(ROWS))
    for said in (
        "783.4 GB", "1,044.6 GB", "44.1 GB", "44.9 GB", "1,491 kB a token", "380 tokens", "567/32 = 17.7", "262 kB a token",
        "100 MB at that length", "only up to 69 tokens", "2,190 MB, and 134 MB of inputs", "26.95 MB", "(8.1 and 4.4)",
        "1,359, 1,608, 2,695, 4,211 MiB above", "571, 418, 453, 329 MiB remain", "52.99, not 53.1", "in 6 of 8 columns",
        "0.0173 to 0.0924 of normal weights; with a constant 0.0557 to 0.0710", "only NF4's place",
        "64.0 % and 1.44 %", "29.3 % and 27.7 %", "3.37 GB are half a byte", "3,660,320,768 = 6,898,323,456 less half",
    ):  # fmt: skip
        assert said in text, said


def test_what_is_derived_is_said_only_where_the_rows_bear_it_out():
    all_of_them = sentences(ROWS)
    assert len(all_of_them) == 13
    other = {
        "does not follow": "rounds to",
        "does not hold": "holds",
        "holds": "does not hold",
        "match": "does not follow",
    }
    changed = [replace(r, verdict=other.get(r.verdict, r.verdict)) for r in ROWS]
    left = sentences(changed)
    assert len(left) < 7 and set(left) < set(all_of_them)
    full = [replace(r, verdict="does not hold") if r.printed == ">780GB" else r for r in ROWS]
    assert sentences(full) == all_of_them[1:]


def test_the_table_by_size_holds_12_and_16_bytes_a_parameter():
    lines = [line.split() for line in qlora_numbers.by_size().splitlines()]
    found = [[words[i] for i in (0, 2, 4, 6)] for words in lines[1:]]
    assert found == [
        ["7B", "80.86", "107.81", "3.87"],
        ["13B", "156.19", "208.25", "7.20"],
        ["33B", "390.35", "520.46", "17.41"],
        ["65B", "783.43", "1,044.57", "34.46"],
    ]
