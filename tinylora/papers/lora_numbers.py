"""Every number of the LoRA paper that arithmetic can reach, printed beside recomputed: what `tinylora count` prints.

What is computed: `audit()` recomputes the numbers of "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685 v2) from the
formulas of `costs.parameters` and the shapes (layers, widths, vocabularies) of the released models and of the GPT-3 paper. These are the
parameter counts of tables 1 to 5, 13 and 15 and of appendix D, table 1's percentages, table 2's 14 averages, §4.2 and its footnotes, and
§7.3's ratios. (Table 7's random column is `subspaces.expected_projection`.) Tables 6, 8 and 16 to 18 print no counts; table 14 repeats
table 13's, and 13 repeats table 3's but for three.

Beside the paper: `post()` derives the line that PEFT prints in a post of 2023, for LoRA on a T5 of 11 billion weights in 8 bits.

What is said: each number gets a verdict (see `verdict`), and most are about an entry of the map of the papers, whose statement, verdict and
reason `describe()` prints below the numbers (`agreement`). What was derived beside them, `derived()`, comes from the rows. Where the map
and the rows contradict each other, `contradictions()` says so. Printed numbers are kept as printed, with their place.

What is drawn: nothing here. Notebook 11 draws printed against recomputed (notebooks/drawings/nb11.py).
"""

from ..costs.parameters import (
    adapter,
    adapter_h,
    adapter_l,
    bitfit,
    lora,
    lora_square,
    prefix_embedding,
    prefix_layer,
    t5,
    transformer,
)
from ..costs.tables import aligned
from . import agreement
from .verdict import FAILS, Row, agrees, decimals, fail, in_unit_of, judge, parse, pick, tally


def _row(where, model, method, setting, printed, exact, note="", about=False, claim=""):
    """A Row from an exact number in ones (weights, bytes, ratios)."""
    return Row.judged(where, model, method, setting, printed, in_unit_of(printed, exact), note, about, claim)


def _fitting(printed, count):
    """The whole numbers up to 1,024 whose count rounds to what is printed."""
    return [n for n in range(1, 1025) if judge(printed, in_unit_of(printed, count(n))) == "rounds to"]


def _fit(where, model, method, letter, printed, count, claim=""):
    """A row whose size the paper leaves out: the whole number that gives the printed count, or the nearest if there is none."""
    value, _, unit = parse(printed)
    fits = _fitting(printed, count)
    n = fits[0] if fits else min(range(1, 1025), key=lambda n: abs(count(n) - value * unit))
    note = f"no {letter} fits; this is the nearest"
    if fits:
        note = f"{letter} is not printed; {fits[0]} fits" + f", as do those up to {fits[-1]}" * (len(fits) > 1)
    return _row(where, model, method, f"{letter} = {n}", printed, count(n), note, claim=claim)


# -------------------------------------------------------------------------------------------------------------------- the models
#: (layers, width) of the models of the paper
GPT3, GPT2_M, GPT2_L = (96, 12288), (24, 1024), (36, 1280)
ROBERTA_BASE, ROBERTA_LARGE, DEBERTA_XXL = (12, 768), (24, 1024), (48, 1536)
_FULL = {  # all weights
    "GPT-3": transformer(*GPT3, 50257, 2048),
    "GPT-2 M": transformer(*GPT2_M, 50257, 1024),
    "GPT-2 L": transformer(*GPT2_L, 50257, 1024),
    "RoBERTa base": transformer(*ROBERTA_BASE, 50265, 514, extra=768 * 768 + 2 * 768),
    "RoBERTa large": transformer(*ROBERTA_LARGE, 50265, 514, extra=1024 * 1024 + 2 * 1024),
}
_GPT3_FT = 175_255.8e6  # as printed in table 4


def _qv(model, r, matrices=2):
    layers, d = model
    return lora_square(matrices * layers, d, r)


#: Table 2: model, method, printed count, scores on MNLI, SST-2, MRPC, CoLA, QNLI, QQP, RTE, STS-B, printed average
_GLUE = [
    ("RoBERTa base", "FT*", "125.0M", (87.6, 94.8, 90.2, 63.6, 92.8, 91.9, 78.7, 91.2), "86.4"),
    ("RoBERTa base", "BitFit*", "0.1M", (84.7, 93.7, 92.7, 62.0, 91.8, 84.0, 81.5, 90.8), "85.2"),
    ("RoBERTa base", "Adapter^D*", "0.3M", (87.1, 94.2, 88.5, 60.8, 93.1, 90.2, 71.5, 89.7), "84.4"),
    ("RoBERTa base", "Adapter^D*", "0.9M", (87.3, 94.7, 88.4, 62.6, 93.0, 90.6, 75.9, 90.3), "85.4"),
    ("RoBERTa base", "LoRA", "0.3M", (87.5, 95.1, 89.7, 63.4, 93.3, 90.8, 86.6, 91.5), "87.2"),
    ("RoBERTa large", "FT*", "355.0M", (90.2, 96.4, 90.9, 68.0, 94.7, 92.2, 86.6, 92.4), "88.9"),
    ("RoBERTa large", "LoRA", "0.8M", (90.6, 96.2, 90.9, 68.2, 94.9, 91.6, 87.4, 92.6), "89.0"),
    ("RoBERTa large", "Adapter^P", "3.0M", (90.2, 96.1, 90.2, 68.3, 94.8, 91.9, 83.8, 92.1), "88.4"),
    ("RoBERTa large", "Adapter^P", "0.8M", (90.5, 96.6, 89.7, 67.8, 94.8, 91.7, 80.1, 91.9), "87.9"),
    ("RoBERTa large", "Adapter^H", "6.0M", (89.9, 96.2, 88.7, 66.5, 94.7, 92.1, 83.4, 91.0), "87.8"),
    ("RoBERTa large", "Adapter^H", "0.8M", (90.3, 96.3, 87.7, 66.3, 94.7, 91.5, 72.9, 91.5), "86.4"),
    ("RoBERTa large", "LoRA (restricted)", "0.8M", (90.6, 96.2, 90.2, 68.2, 94.8, 91.6, 85.2, 92.3), "88.6"),
    ("DeBERTa XXL", "FT*", "1500.0M", (91.8, 97.2, 92.0, 72.0, 96.0, 92.7, 93.9, 92.9), "91.1"),
    ("DeBERTa XXL", "LoRA", "4.7M", (91.9, 96.9, 92.6, 72.4, 96.0, 92.9, 94.9, 93.0), "91.3"),
]

_GLUE_CLAIMS = {  # the counts with an entry of their own on the map
    ("RoBERTa base", "LoRA", "0.3M"): "lora-table-2-roberta",
    ("RoBERTa large", "LoRA", "0.8M"): "lora-table-2-roberta",
    ("RoBERTa large", "Adapter^P", "3.0M"): "lora-table-2-adapters",
    ("RoBERTa large", "Adapter^H", "6.0M"): "lora-table-2-adapters",
    ("DeBERTa XXL", "LoRA", "4.7M"): "lora-table-2-deberta",
}


def _glue_count(model, method, printed):
    """(setting, exact count or None, note) of a row of table 2, with the sizes of tables 9 and 10."""
    if method == "FT*":
        return "", _FULL.get(model), "a nominal size" if model in _FULL else "a nominal size; shapes not in the paper"
    if method == "BitFit*":
        return "", bitfit(*ROBERTA_BASE), ""
    if method == "Adapter^D*":
        return "", None, "its bottleneck and dropped layers are not in the paper"
    if method == "Adapter^P":
        r = {"3.0M": 64, "0.8M": 16}[printed]
        return f"r = {r}", adapter(ROBERTA_LARGE[0], ROBERTA_LARGE[1], r), ""
    if method == "Adapter^H":
        r = {"6.0M": 64, "0.8M": 8}[printed]
        return f"r = {r}", adapter_h(*ROBERTA_LARGE, r), ""
    size = {"RoBERTa base": ROBERTA_BASE, "RoBERTa large": ROBERTA_LARGE, "DeBERTa XXL": DEBERTA_XXL}[model]
    return "r_q = r_v = 8", _qv(size, 8), "r from table 10" if model == "DeBERTa XXL" else ""


#: Table 15: l_p, l_i, printed;  r, printed;  setting, matrices, r, printed
_PRE_EMBED = [(32, "0.4M"), (64, "0.9M"), (128, "1.7M"), (256, "3.2M"), (512, "6.4M")]
_PRE_LAYER = [(2, 2, "5.1M"), (8, 0, "10.1M"), (8, 8, "20.2M"), (32, 4, "44.1M"), (64, 0, "76.1M")]
_ADAPTER_H = [(1, "7.1M"), (4, "21.2M"), (8, "40.1M"), (16, "77.9M"), (64, "304.4M")]
_LORA = [
    ("r_v = 2", 1, 2, "4.7M"),
    ("r_q = r_v = 1", 2, 1, "4.7M"),
    ("r_q = r_v = 2", 2, 2, "9.4M"),
    ("r_q = r_k = r_v = r_o = 1", 4, 1, "9.4M"),
    ("r_q = r_v = 4", 2, 4, "18.8M"),
    ("r_q = r_k = r_v = r_o = 2", 4, 2, "18.8M"),
    ("r_q = r_v = 8", 2, 8, "37.7M"),
    ("r_q = r_k = r_v = r_o = 4", 4, 4, "37.7M"),
    ("r_q = r_v = 64", 2, 64, "301.9M"),
    ("r_q = r_k = r_v = r_o = 64", 4, 64, "603.8M"),
]
_LORA_PE = [(8, "37.8M"), (32, "151.1M"), (64, "302.1M")]
#: Table 1: batch × length, fine-tuned or LoRA, (Adapter^L, its percentage), (Adapter^H, its percentage); milliseconds
_LATENCY = [
    ("32 × 512", 1449.4, (1482.0, "2.2%"), (1492.2, "3.0%")),
    ("16 × 256", 338.0, (354.8, "5.0%"), (366.3, "8.4%")),
    ("1 × 128", 19.8, (23.9, "20.7%"), (25.8, "30.3%")),
]


def audit():
    """Every number of the paper that arithmetic can reach, printed beside recomputed. -> [Row], in the paper's order"""
    parts = (
        *(_section_2_to_4, _table_1, _table_2, _table_3, _table_4, _table_5),
        *(_appendix_d, _table_13, _table_15, _table_7),
    )
    return [row for part in parts for row in part()]


# fmt: off
def _section_2_to_4():
    r4, fewer, slower = _qv(GPT3, 4), "fewer trained parameters", "time; in tokens a second it is +32.6 %"
    mixed, one = "16 bytes a weight (Adam, mixed) would be 2.8TB", _qv(GPT3, 1) / _GPT3_FT
    return [
        _row("Abstract", "GPT-3", "LoRA", "q, v, r = 4", "10,000x", _GPT3_FT / r4, fewer, about=True,
             claim="lora-abstract-10000"),
        _row("§2", "GPT-3", "LoRA", "q, v, r = 4", "0.01%", r4 / _GPT3_FT, f"|Θ| as a share of |Φ₀|; {one:.4%} at r = 1",
             claim="lora-eq-2"),
        _row("§4.2", "GPT-3", "FT", "2 bytes a weight", "350GB", 2 * _GPT3_FT, "checkpoint", about=True,
             claim="lora-checkpoint"),
        _row("§4.2", "GPT-3", "LoRA", "q, v, r = 4, 2 bytes", "35MB", 2 * r4, f"checkpoint; {2 * r4 / 2**20:.1f} MiB", about=True,
             claim="lora-checkpoint"),
        _row("§4.2", "GPT-3", "LoRA", "350GB/35MB", "10,000x", 350e9 / 35e6, "checkpoints, of the printed sizes",
             claim="lora-checkpoint"),
        _row("§4.2", "GPT-3", "FT", "memory in training", "1.2TB", None, mixed, claim="lora-vram"),
        _row("§4.2", "GPT-3", "LoRA", "1.2TB/350GB", "3x", 1.2e12 / 350e9, "abstract: GPU memory by 3 times; §4.2: up to 2/3",
             claim="lora-vram"),
        _row("Footnote 4", "GPT-3", "LoRA", "350GB + 100 × 35MB", "354GB", 350e9 + 100 * 35e6, claim="lora-100-adapters"),
        _row("Footnote 4", "GPT-3", "FT", "100 × 350GB", "35TB", 100 * 350e9, claim="lora-100-adapters"),
        _row("Footnote 5", "GPT-3", "LoRA", "1 − 32.5/43.1", "25%", 1 - 32.5 / 43.1, slower, claim="lora-speedup"),
    ]


def _table_1():
    rows = []
    for printed in ("0.5M", "11M"):
        rows.append(_fit("Table 1", "GPT-2 M", "Adapter^L", "r", printed, lambda r: adapter_l(*GPT2_M, r)))
        rows.append(_fit("Table 1", "GPT-2 M", "Adapter^H", "r", printed, lambda r: adapter_h(*GPT2_M, r)))
    for setting, base, low, high in _LATENCY:
        for method, (ms, printed) in (("Adapter^L", low), ("Adapter^H", high)):
            rows.append(_row("Table 1", "GPT-2 M", method, setting, printed, ms / base - 1, "added latency",
                 claim="lora-table-1"))
    return rows


def _table_2():
    rows = []
    for model, method, printed, scores, average in _GLUE:
        setting, exact, note = _glue_count(model, method, printed)
        claim = _GLUE_CLAIMS.get((model, method, printed), "")
        rows.append(_row("Table 2", model, method, setting, printed, exact, note, method == "FT*", claim))
        rows.append(_row("Table 2", model, method, "average of 8", average, sum(scores) / 8, claim="lora-table-2-averages"))
    return rows


def _table_3():
    rows = []
    for model, size, full, adapters, prefix, low_rank in (
        ("GPT-2 M", GPT2_M, "354.92M", ("0.37M", "11.09M"), "0.35M", "0.35M"),
        ("GPT-2 L", GPT2_L, "774.03M", ("0.88M", "23.00M"), "0.77M", "0.77M"),
    ):
        rows.append(_row("Table 3", model, "FT*", "", full, _FULL[model], claim="lora-table-3-full"))
        rows += [_fit("Table 3", model, "Adapter^L", "r", p, lambda r, s=size: adapter_l(*s, r), "lora-table-3-adapter-l")
                 for p in adapters]
        if model == "GPT-2 M":
            rows.append(_fit("Table 3", model, "Adapter^H", "r", "11.09M", lambda r: adapter_h(*GPT2_M, r),
                 claim="lora-table-3-adapter-h"))
            rows.append(_row("Table 3", model, "FT^Top2*", "2 layers", "25.19M", _top_2(size[1]),
                 claim="lora-table-13-top-2"))
        rows.append(_fit("Table 3", model, "PreLayer*", "l", prefix, lambda n, s=size: prefix_layer(*s, n),
             claim="lora-table-3-gpt-2"))
        rows.append(_row("Table 3", model, "LoRA", "r_q = r_v = 4", low_rank, _qv(size, 4), claim="lora-table-3-gpt-2"))
    return rows


def _top_2(d):
    """The last two blocks of a GPT-2 of width d: 12 d² weights and 13 d biases and gains each."""
    return 2 * (12 * d * d + 13 * d)


def _table_4():
    L, d = GPT3
    return [
        _row("Table 4", "GPT-3", "FT", "", "175,255.8M", _FULL["GPT-3"], "the GPT-3 paper's shapes, tied head",
             claim="lora-table-4-full"),
        _row("Table 4", "GPT-3", "BitFit", "11 d a layer", "14.2M", bitfit(L, d), "12 d a layer would be 14.16M",
             claim="lora-table-4-bitfit"),
        _row("Table 4", "GPT-3", "PreEmbed", "l_p = 256, l_i = 8", "3.2M", prefix_embedding(d, 256, 8)),
        _row("Table 4", "GPT-3", "PreLayer", "l_p = 8, l_i = 8", "20.2M", prefix_layer(L, d, 8, 8), claim="lora-prelayer"),
        _row("Table 4", "GPT-3", "Adapter^H", "r = 1", "7.1M", adapter_h(L, d, 1)),
        _row("Table 4", "GPT-3", "Adapter^H", "r = 8", "40.1M", adapter_h(L, d, 8)),
        _row("Table 4", "GPT-3", "LoRA", "r_v = 2", "4.7M", _qv(GPT3, 2, 1), claim="lora-table-4-lora"),
        _row("Table 4", "GPT-3", "LoRA", "r_q = r_k = r_v = r_o = 4", "37.7M", _qv(GPT3, 4, 4), claim="lora-table-4-lora"),
    ]


def _table_5():
    rows = []
    for names, r in (("q", 8), ("k", 8), ("v", 8), ("o", 8), ("q, k", 4), ("q, v", 4), ("q, k, v, o", 2)):
        rows.append(_row("Table 5", "GPT-3", "LoRA", f"{names}, r = {r}", "18M", _qv(GPT3, r, len(names.split(", "))),
             claim="lora-table-5-budget"))
    return rows


def _appendix_d():
    L, d = GPT3
    four = "r_q = r_k = r_v = r_o = 2"
    return [
        _row("D.4", "GPT-3", "PreEmbed", "l_p = 256, l_i = 8", "3.2M", prefix_embedding(d, 256, 8)),
        _row("D.4", "GPT-3", "PreLayer", "l_p = 8, l_i = 8", "20.2M", prefix_layer(L, d, 8, 8), claim="lora-prelayer"),
        _row("D.4", "GPT-3", "LoRA", "r_q = r_v = 1", "4.7M", _qv(GPT3, 1)),
        _row("D.4", "GPT-3", "LoRA", "r_v = 2", "4.7M", _qv(GPT3, 2, 1)),
        _row("D.4", "GPT-3", "LoRA", "r_q = r_v = 8", "37.7M", _qv(GPT3, 8)),
        _row("D.4", "GPT-3", "LoRA", four, "37.7M", _qv(GPT3, 2, 4), "table 15 has r = 4 for it", claim="lora-app-d4-rank"),
    ]


def _table_13():
    top = _top_2(GPT2_M[1])
    return [
        _row("Table 13", "GPT-2 M", "Fine-Tune", "", "354M", _FULL["GPT-2 M"]),
        _row("Table 13", "GPT-2 M", "FT^Top2", "2 layers", "24M", top, "table 3 has 25.19M for it",
             claim="lora-table-13-top-2"),
        _row("Table 13", "GPT-2 L", "Fine-Tune", "", "774M", _FULL["GPT-2 L"]),
    ]


def _table_15():
    (L, d), rows = GPT3, []
    rows.append(_row("Table 15", "GPT-3", "Fine-Tune", "", "175B", _FULL["GPT-3"]))
    for l_p, printed in _PRE_EMBED:
        count = prefix_embedding(d, l_p, 8)
        rows.append(_row("Table 15", "GPT-3", "PrefixEmbed", f"l_p = {l_p}, l_i = 8", printed, count,
             claim="lora-table-15-prefix-embedding"))
    for l_p, l_i, printed in _PRE_LAYER:
        setting = f"l_p = {l_p}, l_i = {l_i}"
        rows.append(_row("Table 15", "GPT-3", "PrefixLayer", setting, printed, prefix_layer(L, d, l_p, l_i),
             claim="lora-prelayer"))
    for r, printed in _ADAPTER_H:
        rows.append(_row("Table 15", "GPT-3", "Adapter^H", f"r = {r}", printed, adapter_h(L, d, r),
             claim="lora-table-15-adapters"))
    for setting, matrices, r, printed in _LORA:
        claim = "lora-table-15-603" if printed == "603.8M" else "lora-table-15-lora"
        rows.append(_row("Table 15", "GPT-3", "LoRA", setting, printed, _qv(GPT3, r, matrices), claim=claim))
    for r, printed in _LORA_PE:
        exact = _qv(GPT3, r) + prefix_embedding(d, 8, 4)
        rows.append(_row("Table 15", "GPT-3", "LoRA+PE", f"r_q = r_v = {r}, l_p = 8, l_i = 4", printed, exact,
             claim="lora-app-e"))
    exact = _qv(GPT3, 8) + prefix_layer(L, d, 8, 4)
    rows.append(_row("Table 15", "GPT-3", "LoRA+PL", "r_q = r_v = 8, l_p = 8, l_i = 4", "52.8M", exact,
         claim="lora-table-15-lora-pl"))
    return rows


def _table_7():
    return [
        _row("§7.3", "GPT-3", "LoRA", "r = 4: 6.91/0.32", "21.5", 6.91 / 0.32, "amplification, from rounded norms",
             claim="lora-table-7-factors"),
        _row("H.4", "GPT-3", "LoRA", "r = 64: 3.57/1.90", "2", 3.57 / 1.90, "amplification", claim="lora-table-7-factors"),
    ]


# fmt: on
# ------------------------------------------------------------------------------------------------------------------------ as text
def describe(rows=None):
    """The rows (`audit`) as aligned text, in the paper's order, and what the map of the papers says of them."""
    rows = audit() if rows is None else rows
    table = [("where", "model", "method", "setting", "printed", "computed", "difference", "verdict")]
    for r in rows:
        digits = max(3, decimals(r.printed) + 1)
        numbers = ("", "") if r.computed is None else (f"{r.computed:,.{digits}f}", f"{r.difference:+,.{digits}f}")
        table.append((r.where, r.model, r.method, r.setting, r.printed, *numbers, r.verdict))
    counted = f"{len(rows)} numbers: {tally(rows)}"
    return "\n".join([aligned(table, left=(0, 1, 2, 3, 7)), "", counted, "", agreement.text(_audited(rows))])


def contradictions(rows=None):
    """What the map of the papers says of these numbers and they do not bear out, as sentences; rows: those of `audit`. -> [str]"""
    return agreement.contradictions(_audited(audit() if rows is None else rows))


def _audited(rows):
    """The rows with what was derived from them, and with the line that PEFT prints, as `agreement` takes them."""
    _, trained, whole = post()
    line = [
        _row("A post", "T5 11B", "LoRA", f"r = 16, {what}", printed, n, claim="peft-t5-count")
        for what, printed, n in (("trained", "18,874,368", trained), ("all", "11,154,206,720", whole))
    ]
    return agreement.Audit(rows, "lora-counts", derived(rows), line)


#: T5 1.1 XXL (Raffel et al. 2020; google/t5-v1_1-xxl, flan-t5-xxl): layers in each half, width, heads, width of a head and of the MLP.
T5_XXL, T5_VOCABULARY = (24, 4096, 64, 64, 10240), 32128


def post(r=16):
    """(text, trained, all) of the line that PEFT's example prints, "trainable params: …", from shapes alone.

    The example is LoRA with r = 16 on W_q and W_v of flan-t5-xxl, its base in LLM.int8 (2023). PEFT did not separate thousands then.
    """
    layers, d, heads, d_kv, d_ff = T5_XXL
    attentions = 3 * layers  # in the encoder, in the decoder, and from the decoder to the encoder
    trained = 2 * attentions * lora(d, heads * d_kv, r)
    base = t5(*T5_XXL, T5_VOCABULARY)
    text = (
        f"T5 1.1 of 11B: {layers} + {layers} layers of width {d:,}, {heads} heads of {d_kv}, MLPs of {d_ff:,} and {T5_VOCABULARY:,} "
        f"tokens are {base:,} weights.\n"
        f"LoRA with r = {r} on W_q and W_v of {attentions} attentions: {2 * attentions} · {r} · ({d} + {heads * d_kv}) = {trained:,}.\n"
        f"trainable params: {trained} || all params: {base + trained} || trainable%: {100 * trained / (base + trained)}"
    )
    return text, trained, base + trained


def derived(rows):
    """What follows from several rows together, with its numbers: [(ids of the map's entries that it is about, sentence)].

    None stands for a sentence that the rows do not bear out.
    """
    return [(claims, derive(rows)) for claims, derive in DERIVED]


def _prefix_layer(rows):
    """Said if no row follows the formula, all are printed too large, and no other number of vectors a token explains them."""
    L, d = GPT3
    found, mixed = pick(rows, where="Table 15", method="PrefixLayer"), pick(rows, method="LoRA+PL")
    elsewhere = pick(rows, model="GPT-3", method="PreLayer")
    tokens = [l_p + l_i for l_p, l_i, _ in _PRE_LAYER]

    def vectors(error):
        """Vectors a token if each printed count were larger by this many steps of its last digit."""
        counts = [value + error * step for value, step, _ in (parse(r.printed) for r in found)]
        return [1e6 * count / d / n for count, n in zip(counts, tokens, strict=True)]

    too_large = all(r.difference > 0 for r in [*found, *elsewhere, *mixed])
    one_number_fits = max(vectors(-0.5)) <= min(vectors(0.5))
    if not fail([*found, *elsewhere, *mixed]) or not too_large or one_number_fits:
        return None
    above = ", ".join(f"{100 * (r.value / r.computed - 1):.1f}" for r in found)
    (few, fewer), (many, more) = ((l_p, v) for (l_p, l_i, _), v in zip(_PRE_LAYER, vectors(0), strict=True) if l_i == 0)
    return (
        f"table 15's counts are {above} % above L d (l_p + l_i). (l_p, l_i) = ({few}, 0) would take {fewer:.1f} vectors a token, "
        f"and ({many}, 0) {more:.1f}; L = {L}."
    )


def _deberta(rows):
    """Said if r = 8 does not give the printed count and one other rank does."""
    (row,) = (r for r in pick(rows, model="DeBERTa XXL", method="LoRA") if r.printed.endswith("M"))
    fits = _fitting(row.printed, lambda r: _qv(DEBERTA_XXL, r))
    if not fail([row]) or len(fits) != 1:
        return None
    return (
        f"r = 8 is {row.computed:.2f}M; {row.printed} is r = {fits[0]} ({_qv(DEBERTA_XXL, fits[0]) / 1e6:.2f}M), which the released "
        "scripts use."
    )


def _budgets(rows):
    """Said if neither LoRA's r = 4 nor any prefix gives the printed counts, and a thousandth of full fine-tuning does."""
    (m, l), (full_m, full_l) = (pick(rows, where="Table 3", method=method) for method in ("LoRA", "FT*"))
    prefix = pick(rows, where="Table 3", method="PreLayer*")
    share_m, share_l = full_m.value / 1000, full_l.value / 1000
    if not fail([m, l, *prefix]) or not (agrees(m.printed, share_m) and agrees(l.printed, share_l)):
        return None
    return (
        f"r = 4 on q and v is {m.computed:.3f}M and {l.computed:.3f}M, printed as {m.printed} and {l.printed}; 0.1 % of {full_m.printed} "
        f"and {full_l.printed} is {share_m:.3f}M and {share_l:.3f}M."
    )


def _twice_a_truncated(rows):
    """Said if 603.8M does not follow, and is twice a number that was cut off."""
    (four,), (two,) = (pick(rows, where="Table 15", method="LoRA", printed=p) for p in ("603.8M", "301.9M"))
    if not fail([four]) or two.verdict != "truncated" or four.value != 2 * two.value:
        return None
    return f"{four.printed} is {four.computed:.2f}M; {two.printed} is {two.computed:.2f}M truncated, and twice as printed {2 * two.value}M."


def _truncated(rows):
    """Said if these are all the counts of tables 5 and 15 that are cut off, and the rest of those that follow agree with rounding."""
    counts = [*pick(rows, where="Table 5"), *pick(rows, where="Table 15")]
    cut = {(r.method, r.printed): r.computed for r in counts if r.verdict == "truncated"}
    lora, prefix, both = ("LoRA", "18.8M"), ("PrefixEmbed", "0.4M"), ("LoRA+PE", "37.8M")
    others = {r.verdict for r in counts} - {"truncated", FAILS}
    if set(cut) != {lora, prefix, both, ("LoRA", "301.9M"), ("LoRA", "18M")} or others != {"rounds to"}:
        return None
    return (
        f"18.8M is {cut[lora]:.3f}M truncated, as are 301.9M, PrefixEmbed's 0.4M ({cut[prefix]:.3f}M), LoRA+PE's 37.8M "
        f"({cut[both]:.3f}M) and table 5's 18M; the other rows agree with rounding."
    )


def _rank_of_appendix_d(rows):
    """Said if D.4's rank does not give its count, and table 15 has another rank for it, which does."""
    (row,) = pick(rows, where="D.4", method="LoRA", setting="r_q = r_k = r_v = r_o = 2")
    (right,) = (r for r in pick(rows, where="Table 15", method="LoRA", printed=row.printed) if "r_o" in r.setting)
    if not fail([row]) or right.verdict != "rounds to":
        return None
    return (
        f"{row.setting} is {row.computed:.2f}M; table 15 has {row.printed} for r = {right.setting.rpartition(' ')[2]}."
    )


def _biases(rows):
    """Said if 11 d a layer does not give the printed count, and 12 d does."""
    L, d = GPT3
    (row,) = pick(rows, model="GPT-3", method="BitFit")
    twelve = 12 * L * d / 1e6
    if not fail([row]) or not agrees(row.printed, twelve):
        return None
    return f"{bitfit(L, d) // (L * d)} d a layer are {row.computed:.2f}M, and 12 d {twelve:.2f}M."


def _full_fine_tuning(rows):
    """Said if neither of the two counts follows."""
    (gpt3,) = pick(rows, where="Table 4", method="FT")
    (medium,) = pick(rows, where="Table 3", model="GPT-2 M", method="FT*")
    if not fail([gpt3, medium]):
        return None
    return (
        f"GPT-3's shapes give {gpt3.computed:,.1f}M, printed {gpt3.printed}; those of GPT-2 M {medium.computed:.2f}M, printed "
        f"{medium.printed}."
    )


def _binary_millions(rows):
    """Said if three counts do not follow in millions, and do in units of 2²⁰."""
    (L, d), r = ROBERTA_LARGE, 64
    p, h = (pick(rows, model="RoBERTa large", method=m, setting=f"r = {r}")[0] for m in ("Adapter^P", "Adapter^H"))
    (top,), (right,) = pick(rows, where="Table 13", method="FT^Top2"), pick(rows, where="Table 3", method="FT^Top2*")
    binary = [2 * L * d * r / 2**20, 4 * L * d * r / 2**20, top.computed * 1e6 / 2**20]
    if not fail([p, h, top]) or not all(agrees(x.printed, n) for x, n in zip((p, h, top), binary, strict=True)):
        return None
    if not agrees(right.printed, right.computed):
        return None
    return (
        f"RoBERTa large, r = {r}: {p.computed:.2f}M and {h.computed:.2f}M, printed {p.printed} and {h.printed}; in units of 2²⁰ and "
        f"without biases {binary[0]:.2f} and {binary[1]:.2f}. FT^Top2 is {top.computed:.2f}M, and {binary[2]:.2f} · 2²⁰."
    )


def _adapters_of_gpt_2(rows):
    """Said if each count of Adapter^L is that of a whole number, and that of Adapter^H of none."""
    found, (houlsby,) = pick(rows, where="Table 3", method="Adapter^L"), pick(rows, where="Table 3", method="Adapter^H")
    if {r.verdict for r in found} != {"rounds to"} or not fail([houlsby]):
        return None
    *first, last = (r.setting.removeprefix("r = ") for r in found)
    return f"Adapter^L's counts are those of r = {', '.join(first)} and {last}, and {houlsby.printed} is none of Adapter^H's."


def _ten_thousand(rows):
    """Said if 10,000 is the quotient of the printed sizes, and only roughly that of the parameters."""
    (sizes,), (numbers,) = pick(rows, where="§4.2", printed="10,000x"), pick(rows, where="Abstract", printed="10,000x")
    (saved,) = pick(rows, where="§4.2", printed="35MB")
    if sizes.verdict != "match" or numbers.verdict != "roughly" or saved.verdict != "roughly":
        return None
    return (
        f"{sizes.setting} is {sizes.computed:,.0f}; in parameters it is {numbers.computed:,.0f} times, and {saved.printed} is "
        f"{saved.computed:.1f}MB."
    )


#: (ids of the entries, what derives the sentence)
DERIVED = (
    (("lora-prelayer", "lora-table-15-lora-pl"), _prefix_layer),
    (("lora-table-2-deberta",), _deberta),
    (("lora-table-3-gpt-2",), _budgets),
    (("lora-table-15-603",), _twice_a_truncated),
    (("lora-table-15-lora", "lora-table-15-prefix-embedding", "lora-app-e", "lora-table-5-budget"), _truncated),
    (("lora-app-d4-rank",), _rank_of_appendix_d),
    (("lora-table-4-bitfit",), _biases),
    (("lora-table-4-full", "lora-table-3-full"), _full_fine_tuning),
    (("lora-table-2-adapters", "lora-table-13-top-2"), _binary_millions),
    (("lora-table-3-adapter-l", "lora-table-3-adapter-h"), _adapters_of_gpt_2),
    (("lora-abstract-10000", "lora-checkpoint"), _ten_thousand),
)
