"""Counting: the formulas against built models, and the audit of the paper's numbers, one test for each claim."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora.costs import parameters
from tinylora.nn import Linear, Module
from tinylora.papers import lora_numbers
from tinylora.papers.verdict import judge

ROWS = lora_numbers.audit()


def rows(where=None, method=None, model=None):
    return [
        r
        for r in ROWS
        if (where is None or r.where == where)
        and (method is None or r.method == method)
        and (model is None or r.model == model)
    ]


def verdicts(*args, **kwargs):
    return [r.verdict for r in rows(*args, **kwargs)]


# ----------------------------------------------------------------------------------------------- the formulas and built models
def test_a_count_is_that_of_a_built_layer(rng):
    d_in, d_out, r = (int(n) for n in rng.integers(2, 40, 3))
    layer = tl.LoRALinear(Linear(d_in, d_out), r=r)
    assert parameters.lora(d_in, d_out, r) == sum(w.size for _, w in layer.trainable()) == r * (d_in + d_out)
    assert parameters.lora_square(5, d_in, r) == 5 * parameters.lora(d_in, d_in, r)  # the paper's formula: squares only


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "down_proj"], None])
def test_a_count_is_that_of_an_adapted_llama(targets):
    names = {} if targets is None else {"targets": targets}
    model = tl.add_lora(tiny.model(), r=3, target_modules=targets or "all-linear")
    assert parameters.lora_on(parameters.llama_shapes(tiny.CONFIG, **names), 3) == sum(
        w.size for _, w in model.trainable()
    )
    with pytest.raises(ValueError, match="'query' does not exist; a Llama's matrices are q_proj, k_proj"):
        parameters.llama_shapes(tiny.CONFIG, ["query"])


def test_counts_take_arrays_and_tensors():
    assert parameters.lora_on([np.zeros((3, 5)), tl.Tensor(np.zeros((2, 7))), (4, 4)], 2) == 2 * (8 + 9 + 8)


def test_adapters_and_biases_are_those_of_a_block(rng):
    """Houlsby's bottleneck and a GPT-2 block, with every weight written down."""
    d, r, layers = (int(n) for n in rng.integers(2, 20, 3))

    class Bottleneck(Module):
        def __init__(self):
            self.down, self.up = Linear(d, r, bias=True), Linear(r, d, bias=True)

    one = sum(w.size for w in Bottleneck().parameters())
    assert parameters.adapter_h(layers, d, r) == 2 * layers * one
    assert parameters.adapter_l(layers, d, r) == layers * (one + 2 * d)
    biases = [d, d, d, d, 4 * d, d, d, d]  # q, k, v, o, two of the MLP, two LayerNorms
    assert parameters.bitfit(layers, d) == layers * sum(biases)
    weights = 4 * d * d + 2 * 4 * d * d + 2 * d  # and the LayerNorms' gains
    assert parameters.transformer(layers, d, 50, 9) == layers * (weights + sum(biases)) + 59 * d + 2 * d
    assert parameters.prefix_layer(layers, d, 3, 4) == layers * parameters.prefix_embedding(d, 3, 4) == layers * 7 * d


# ------------------------------------------------------------------------------------------------------------------- the verdict
@pytest.mark.parametrize(
    "printed, computed, about, verdict",
    [
        ("18.8M", 18.8, False, "match"),
        ("18.8M", 18.84, False, "rounds to"),
        ("18.8M", 18.85, False, "rounds to"),
        ("18.8M", 18.76, False, "rounds to"),
        ("18.8M", 18.874, False, "truncated"),
        ("18.8M", 18.91, False, "does not follow"),
        ("18.8M", 18.74, False, "does not follow"),
        ("350GB", 350.6, True, "roughly"),
        ("35MB", 39.0, True, "does not follow"),
        ("175,255.8M", 175255.84, False, "rounds to"),
        ("0.01%", 0.0108, False, "rounds to"),
        ("3x", None, False, "not derivable"),
    ],
)
def test_verdicts(printed, computed, about, verdict):
    assert judge(printed, computed, about) == verdict


# --------------------------------------------------------------------------------------------------------------------- the audit
def test_table_15_lora_rows_follow_2_L_d_r():
    printed = [r.value for r in rows("Table 15", "LoRA")]
    computed = [r.computed for r in rows("Table 15", "LoRA")]
    np.testing.assert_allclose(
        computed, [4.718592] * 2 + [9.437184] * 2 + [18.874368] * 2 + [37.748736] * 2 + [301.989888, 603.979776]
    )
    np.testing.assert_allclose(printed, computed, rtol=0.005)


def test_18_8_and_301_9_are_truncated_and_603_8_is_neither():
    found = {r.printed: r.verdict for r in rows("Table 15", "LoRA")}
    assert found == {
        "4.7M": "rounds to",
        "9.4M": "rounds to",
        "18.8M": "truncated",
        "37.7M": "rounds to",
        "301.9M": "truncated",
        "603.8M": "does not follow",
    }
    assert pytest.approx(603.8) == 2 * 301.9


def test_table_15_prelayer_rows_do_not_follow_their_own_formula():
    found = rows("Table 15", "PrefixLayer")
    assert [r.verdict for r in found] == ["does not follow"] * 5
    assert [round(100 * (r.value / r.computed - 1), 1) for r in found] == [8.1, 7.0, 7.0, 3.8, 0.8]
    # nor does any other number of vectors a token: bounds from the printed digits do not overlap
    tokens = [4, 8, 16, 36, 64]
    low, high = ([(r.value + e) * 1e6 / 12288 / n for r, n in zip(found, tokens, strict=True)] for e in (-0.05, 0.05))
    assert max(low) > min(high)


def test_table_15_the_same_error_is_in_lora_with_prefix_layers():
    (row,) = rows("Table 15", "LoRA+PL")
    assert row.verdict == "does not follow" and row.computed == pytest.approx(51.904512) and row.value == 52.8


def test_table_15_adapter_rows_follow_their_formula():
    assert [round(r.computed, 3) for r in rows("Table 15", "Adapter^H")] == [7.078, 21.234, 40.11, 77.86, 304.361]
    assert set(verdicts("Table 15", "Adapter^H")) == {"rounds to"}


def test_table_15_prefix_embedding_rows_follow_their_formula_and_the_first_is_truncated():
    assert verdicts("Table 15", "PrefixEmbed") == ["truncated"] + ["rounds to"] * 4
    assert rows("Table 15", "PrefixEmbed")[0].computed == pytest.approx(0.49152)


def test_table_15_lora_with_prefix_embeddings_follows_and_the_first_is_truncated():
    assert verdicts("Table 15", "LoRA+PE") == ["truncated", "rounds to", "rounds to"]
    assert rows("Table 15", "LoRA+PE")[0].computed == pytest.approx(37.748736 + 0.147456)


def test_table_4_the_two_budgets_of_lora_are_4_7_and_37_7_million():
    assert [(r.printed, r.verdict) for r in rows("Table 4", "LoRA")] == [("4.7M", "rounds to"), ("37.7M", "rounds to")]
    assert verdicts("Table 4", "Adapter^H") == ["rounds to"] * 2 and verdicts("Table 4", "PreLayer") == [
        "does not follow"
    ]


def test_appendix_d4_gives_the_rank_of_37_7_million_wrongly():
    wrong = [r for r in rows("D.4", "LoRA") if r.verdict != "rounds to"]
    assert [(r.setting, r.printed) for r in wrong] == [("r_q = r_k = r_v = r_o = 2", "37.7M")]
    assert wrong[0].computed == pytest.approx(18.874368)
    assert any(r.setting == "r_q = r_k = r_v = r_o = 4" and r.printed == "37.7M" for r in rows("Table 15", "LoRA"))


def test_table_4_bitfit_counts_12_d_a_layer_where_a_block_has_11_d_of_biases():
    (row,) = rows("Table 4", "BitFit")
    assert row.verdict == "does not follow" and row.computed == pytest.approx(12.976128)
    assert judge("14.2M", 12 * 96 * 12288 / 1e6) == "rounds to"


def test_table_4_gpt_3_as_described_has_fewer_weights_than_the_fine_tuned_one():
    (row,) = rows("Table 4", "FT")
    assert row.computed == pytest.approx(174604.259328) and row.difference == pytest.approx(651.54, abs=0.01)


def test_table_2_roberta_counts_follow_and_deberta_has_r_16_not_8():
    assert [round(r.computed, 3) for r in rows("Table 2", "LoRA") if r.printed.endswith("M")] == [0.295, 0.786, 2.359]
    row = next(r for r in rows("Table 2", "LoRA", "DeBERTa XXL") if r.printed == "4.7M")
    assert row.verdict == "does not follow" and row.setting == "r_q = r_v = 8"
    fits = [r for r in range(1, 65) if judge("4.7M", parameters.lora_square(2 * 48, 1536, r) / 1e6) == "rounds to"]
    assert fits == [16]


def test_table_2_all_fourteen_averages_are_right():
    found = [r for r in rows("Table 2") if r.setting == "average of 8"]
    assert len(found) == 14 and all(abs(r.difference) <= 0.05 + 1e-9 for r in found)
    assert {r.verdict for r in found} <= {"match", "rounds to"}


def test_table_2_adapters_of_3_and_6_million_are_counted_in_units_of_2_to_the_20():
    found = {
        (r.method, r.printed): r for r in rows("Table 2", model="RoBERTa large") if r.method.startswith("Adapter^")
    }
    for method, printed, matrices in (("Adapter^P", "3.0M", 2 * 24), ("Adapter^H", "6.0M", 4 * 24)):
        assert found[method, printed].verdict == "does not follow"
        assert matrices * 1024 * 64 / 2**20 == float(printed[:-1])
        assert found[method, "0.8M"].verdict == "rounds to"


def test_table_3_gpt_2_counts_of_lora_are_neither_r_4_nor_a_whole_number_of_prefix_tokens():
    for model, count, printed in (("GPT-2 M", 0.393216, "0.35M"), ("GPT-2 L", 0.73728, "0.77M")):
        (low_rank,), (prefix,) = rows("Table 3", "LoRA", model), rows("Table 3", "PreLayer*", model)
        assert low_rank.computed == pytest.approx(count) and low_rank.verdict == "does not follow"
        assert low_rank.printed == prefix.printed == printed and prefix.verdict == "does not follow"
    assert judge("0.35M", 354.92 / 1000) == judge("0.77M", 774.03 / 1000) == "rounds to"


def test_table_3_adapter_l_follows_its_formula_with_layernorms_at_whole_ranks():
    found = rows("Table 3", "Adapter^L")
    assert [r.setting for r in found] == ["r = 6", "r = 224", "r = 8", "r = 248"]
    assert {r.verdict for r in found} == {"rounds to"} and all("fits" in r.note for r in found)
    assert verdicts("Table 3", "Adapter^H") == ["does not follow"]
    assert verdicts("Table 3", "FT^Top2*") == ["rounds to"] and verdicts("Table 13", "FT^Top2") == ["does not follow"]


def test_table_3_full_counts_gpt_2_large_is_right_and_medium_is_not():
    assert verdicts("Table 3", "FT*", "GPT-2 L") == ["rounds to"]
    (row,) = rows("Table 3", "FT*", "GPT-2 M")
    assert row.verdict == "does not follow" and row.computed == pytest.approx(354.823168)


def test_table_5_all_seven_configurations_have_one_budget():
    assert {r.computed for r in rows("Table 5")} == {18.874368} and len(rows("Table 5")) == 7
    assert set(verdicts("Table 5")) == {"truncated"}


def test_table_1_all_six_percentages_are_right():
    found = [r for r in rows("Table 1") if r.printed.endswith("%")]
    assert len(found) == 6 and {r.verdict for r in found} == {"rounds to"}


def test_section_4_2_the_checkpoint_the_memory_and_the_speed():
    by = {(r.where, r.printed): r for r in ROWS}
    assert by["§4.2", "10,000x"].verdict == "match"
    assert by["Abstract", "10,000x"].computed == pytest.approx(9285.4, abs=0.1)
    assert by["§4.2", "35MB"].computed == pytest.approx(37.748736) and by["§4.2", "35MB"].verdict == "roughly"
    assert by["§4.2", "1.2TB"].verdict == "not derivable"
    assert by["§4.2", "3x"].computed == pytest.approx(3.4286, abs=1e-4)
    assert by["Footnote 4", "354GB"].computed == pytest.approx(353.5)
    assert (
        by["Footnote 5", "25%"].computed == pytest.approx(24.59, abs=0.01)
        and pytest.approx(1.326, abs=1e-3) == 43.1 / 32.5
    )


def test_section_7_3_the_amplification_factors_are_those_of_rounded_norms():
    (four,), (sixty_four,) = rows("§7.3"), rows("H.4")
    assert (round(four.computed, 2), round(sixty_four.computed, 2)) == (21.59, 1.88)
    assert 6.91 / 0.325 < 21.5 < 6.91 / 0.315


def test_table_18_from_r_512_on_lora_has_as_many_parameters_as_the_matrices_it_changes():
    matrices, d = 48, 1024
    assert [r for r in (1, 256, 512, 1024) if parameters.lora_square(matrices, d, r) >= matrices * d * d] == [512, 1024]


def test_no_other_row_fails():
    """22 numbers do not follow: each of them is in a test above."""
    wrong = {(r.where, r.model, r.method) for r in ROWS if r.verdict == "does not follow"}
    assert sum(r.verdict == "does not follow" for r in ROWS) == 22
    assert wrong == {
        ("Table 2", "RoBERTa large", "Adapter^P"),
        ("Table 2", "RoBERTa large", "Adapter^H"),
        ("Table 2", "DeBERTa XXL", "LoRA"),
        ("Table 3", "GPT-2 M", "FT*"),
        ("Table 3", "GPT-2 M", "Adapter^H"),
        ("Table 3", "GPT-2 M", "PreLayer*"),
        ("Table 3", "GPT-2 M", "LoRA"),
        ("Table 3", "GPT-2 L", "PreLayer*"),
        ("Table 3", "GPT-2 L", "LoRA"),
        ("Table 4", "GPT-3", "FT"),
        ("Table 4", "GPT-3", "BitFit"),
        ("Table 4", "GPT-3", "PreLayer"),
        ("D.4", "GPT-3", "PreLayer"),
        ("D.4", "GPT-3", "LoRA"),
        ("Table 13", "GPT-2 M", "FT^Top2"),
        ("Table 15", "GPT-3", "PrefixLayer"),
        ("Table 15", "GPT-3", "LoRA"),
        ("Table 15", "GPT-3", "LoRA+PL"),
    }


def sentences(rows):
    """What is derived from the rows, as far as they bear it out."""
    return [sentence for _, sentence in lora_numbers.derived(rows) if sentence]


def test_the_description_holds_every_row_and_all_that_is_derived():
    text = lora_numbers.describe()
    lines = text.splitlines()
    assert lines[0].split() == ["where", "model", "method", "setting", "printed", "computed", "difference", "verdict"]
    assert len({line.find(r.verdict, 60) for line, r in zip(lines[1:], ROWS, strict=False)}) == 1  # one column
    for row in ROWS:
        assert row.printed in text
    for words in (
        "(8, 0) would take 102.7",
        "r = 16 (4.72M)",
        "0.35M and 0.77M",
        "603.98M",
        "18.874M truncated",
        "(37.896M)",
    ):
        assert words in text
    assert f"{len(ROWS)} numbers" in text and all(f"  computed: {s}\n" in text for s in sentences(ROWS))


def test_what_is_derived_is_said_only_where_the_rows_bear_it_out():
    assert len(sentences(ROWS)) == 11
    assert sentences([replace(r, verdict="rounds to") for r in ROWS]) == []
    right = [replace(r, verdict="rounds to") if r.method == "BitFit" else r for r in ROWS]
    left = [s for s in sentences(ROWS) if not s.startswith("11 d a layer")]
    assert sentences(right) == left and len(left) == 10
    assert lora_numbers.contradictions(right) == [
        "lora-counts: the map has 22, which was not computed",
        "lora-table-4-bitfit: the map says 'does not follow', and what is computed gives 'holds'",
        "lora-table-4-bitfit: what was derived from its rows does not come out",
    ]


# ----------------------------------------------------------------------------------------------------------------------- the post
def test_the_line_that_pefts_example_prints_follows_from_the_shapes(capsys):
    """LoRA with r = 16 on W_q and W_v of T5 1.1 XXL: 24 + 24 + 24 attentions on 11,135,332,352 weights."""
    from tinylora.cli import main

    said = "trainable params: 18874368 || all params: 11154206720 || trainable%: 0.16921300163961817"
    assert main(["count"]) == 0
    printed = capsys.readouterr().out
    assert said in printed.splitlines() and "11,135,332,352 weights" in printed and "= 18,874,368." in printed
    assert re.search(r"^116 numbers: .*22 does not follow", printed, re.M)
    assert lora_numbers.post()[1:] == (72 * 2 * 16 * (4096 + 4096), 11_135_332_352 + 18_874_368)
    assert lora_numbers.post(r=8)[1] == 18_874_368 // 2


def test_the_weights_of_a_t5_are_counted_one_by_one(rng):
    L, d, n, d_kv, m, V, b = (int(x) for x in rng.integers(2, 30, 7))
    attention = [(n * d_kv, d)] * 3 + [(d, n * d_kv)]  # q, k, v, o
    mlp, norm = [(m, d), (m, d), (d, m)], [(d,)]
    encoder = L * (attention + norm + mlp + norm)
    decoder = L * (attention + norm + attention + norm + mlp + norm)
    ends = 2 * [(b, n), (d,)] + 2 * [
        (V, d)
    ]  # the biases by distance and the last norm of each half; embedding and head
    assert parameters.t5(L, d, n, d_kv, m, V, b) == sum(int(np.prod(shape)) for shape in encoder + decoder + ends)
