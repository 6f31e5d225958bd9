"""QLoRA's statements about memory, and what else in the paper is arithmetic: printed beside recomputed, with a verdict.

    full fine-tuning    12 bytes a parameter: 16-bit weights and gradients, float32 m and v
    double quantization 32/64 = .5 bits a weight become 8/64 + 32/(64 · 256) = .127                          (QLoRA §3)
    figure 6            adapters: L · 64 · 18 h · 2 bytes in MiB; optimizer: 4 times that
    Elo                 P(win) = 1 / (1 + 10^(−Δ/400))

`audit()` gives `counting.Row`s for "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314): §1's > 780 GB and < 48 GB,
§2's 567, 18, 26 and 5,048 MB, §3's bits, figure 6, the footprints of tables 1 and 6, the means of table 4, the Elo arithmetic,
and the parameter counts that the authors' script prints. `describe()` is the same as text, with what does not hold.
`five_gigabytes()` and `halved_counts()` answer two questions that learners ask.

The verdicts are counting's, and "holds" for a printed bound. Figure 6's labels and table 7's ratings are as transcribed by others;
all else was read in the paper. Sizes are the released Llamas' (`memory.MODELS`). GB are 10⁹ bytes, MiB 2²⁰.
"""

from .counting import Row, judge, llama_shapes, lora_on
from .memory import MODELS, PAPER, aligned, block_tape, codes_bytes, in_units, parameters, predict

SIZES = ("7b", "13b", "33b", "65b")
GB, MB, MIB = 1e9, 1e6, 2**20

#: Figure 6's labels: model, adapters and optimizer in MB as printed, and the total in GB.
FIGURE_6 = {
    "7b": ("5,046", "288", "1,152", "6.9"),
    "13b": ("8,476", "450", "1,800", "11.3"),
    "33b": ("19,302", "877.5", "3,510", "24.7"),
    "65b": ("37,074", "1,440", "5,760", "45.0"),
}
#: Tables 1 and 6: (table, size, printed).
FOOTPRINTS = (
    ("1, 6", "65b", "41GB"),
    ("1, 6", "33b", "21GB"),
    ("1, 6", "13b", "10GB"),
    ("6", "7b", "5GB"),
    ("1", "7b", "6GB"),
)
#: Table 4: mean 5-shot MMLU of 7, 13, 33 and 65B on Alpaca and FLAN v2, and the printed mean.
TABLE_4 = {
    "BFloat16": ((38.4, 45.6, 47.2, 50.6, 57.7, 60.5, 61.8, 62.5), "53.0"),
    "Float4": ((37.2, 44.0, 47.3, 50.0, 55.9, 58.5, 61.3, 63.3), "52.2"),
    "NFloat4 + DQ": ((39.0, 44.5, 47.5, 50.7, 57.3, 59.2, 61.8, 63.9), "53.1"),
}


def llama(size):
    return MODELS[f"llama-{size}"]


def account(size, **options):
    """The Account of a published Llama in the paper's setting: NF4 with double quantization, r = 64 on all linear layers, PAPER."""
    return predict(llama(size), **{"method": "qlora", "r": 64, "precision": PAPER, **options})


def base_bytes(size):
    """Bytes of the frozen base: linear layers in NF4 with double quantization, embedding, head and norms in 16 bits."""
    a = account(size)
    return a.weights + a.codes + a.constants


def _number(label):
    return float(label.replace(",", ""))


def figure_6_adapters(size, r=64, widths=18):
    """L · r · 18 h · 2 bytes: a block of four h × h matrices (8 h) and two of h × 4 h (10 h), in 16 bits. Llama's has other shapes."""
    c = llama(size)
    return 2 * c.num_hidden_layers * r * widths * c.hidden_size


def win_rate(difference):
    """P = 1 / (1 + 10^(−Δ/400)): the expected score of a player rated Δ above the opponent (Elo 1967)."""
    return 1 / (1 + 10 ** (-difference / 400))


# ------------------------------------------------------------------------------------------------------------------- the audit
def _row(where, size, method, setting, printed, computed, note="", about=False, verdict=None):
    model = f"Llama {size.upper()}" if size else ""
    return Row(where, model, method, setting, printed, computed, verdict or judge(printed, computed, about), note)


def audit():
    """Every row of the paper that the module's first lines name. -> [counting.Row], in the paper's order"""
    return [*_section_1(), *_section_2(), *_section_3(), *_figure_6(), *_footprints(), *_table_4(), *_elo(), *_counts()]


def _section_1():
    rows = []
    for size in SIZES:
        rows.append(_row("§1", size, "", "weights", size.upper(), parameters(llama(size)) / GB, about=True))
    full, n = 12 * parameters(llama("65b")) / GB, account("65b", checkpointing=True)
    rest = (n.total - n.activations) / GB
    holds = {True: "holds", False: "does not hold"}
    return [
        *rows,
        _row("§1", "65b", "full", "12 bytes a weight", ">780GB", full, verdict=holds[full > 780]),
        _row("§1", "65b", "QLoRA", "r = 64, no activations", "<48GB", rest, verdict=holds[rest < 48]),
        _row(
            "§1",
            "65b",
            "QLoRA",
            "the same, 512 tokens, checkpointing",
            "<48GB",
            n.total / GB,
            verdict=holds[n.total / GB < 48],
        ),
    ]


def _section_2():
    c, n = llama("7b"), parameters(llama("7b"))
    blocks, base = 567 * inputs_ratio(), base_bytes("7b") / MB
    return [
        _row("§2", "7b", "LoRA", "0.2 % of the weights, 2 bytes", "26MB", 0.002 * n * 2 / MB),
        _row("§2", "7b", "LoRA", "L · 8 · 13 h · 2 bytes, MiB", "26", figure_6_adapters("7b", 8, 13) / MIB, "inferred"),
        _row("§2", "7b", "LoRA", "input gradients", "567MB", None, "no sequence length is given"),
        _row("§2", "7b", "LoRA", "567 MB / L: one layer's", "18MB", 567 / c.num_hidden_layers),
        _row("§2", "7b", "LoRA", "567 MB as inputs of blocks only", "18MB", blocks),
        _row("§2", "7b", "QLoRA", "NF4 + DQ, rest in 16 bits", "5,048MB", base),
    ]


def inputs_ratio():
    """h / (h + h + h + f): the input of a Llama-7B block over the inputs of its linear layers (q k v, o, gate up, down)."""
    c = llama("7b")
    return c.hidden_size / (3 * c.hidden_size + c.intermediate_size)


def _section_3():
    one, two, n = 32 / 64, 8 / 64 + 32 / (64 * 256), parameters(llama("65b"))
    return [
        _row("§3", "", "NF4", "32/64 bits a weight", "0.5", one),
        _row("§3", "", "NF4 + DQ", "8/64 + 32/(64·256)", "0.127", two),
        _row("§3", "", "NF4 + DQ", "saved a weight", "0.373", one - two),
        _row("§1", "", "NF4 + DQ", "saved a weight", "0.37", one - two),
        _row("§1", "65b", "NF4 + DQ", "saved in all", "3GB", (one - two) / 8 * n / GB),
    ]


def figure_6_rest(size):
    """GiB that figure 6's total leaves beside model, adapters and optimizer, if its MB are MiB and its GB are GiB."""
    model, adapters, optimizer, total = map(_number, FIGURE_6[size])
    return total - (model + adapters + optimizer) / 1024


def _figure_6():
    rows, small = [], llama("7b").num_hidden_layers * llama("7b").hidden_size
    for size, (model, adapters, optimizer, total) in FIGURE_6.items():
        rows.append(_row("Figure 6", size, "model", "NF4 + DQ, rest in 16 bits, MiB", model, base_bytes(size) / MIB))
        rows.append(
            _row("Figure 6", size, "adapters", "L · 64 · 18 h · 2 bytes, MiB", adapters, figure_6_adapters(size) / MIB)
        )
        real = account(size).adapters / MIB
        rows.append(_row("Figure 6", size, "adapters", "all 7 matrices of a Llama, MiB", adapters, real))
        four = 4 * figure_6_adapters(size) / MIB
        rows.append(_row("Figure 6", size, "optimizer", "4 × the adapters, MiB", optimizer, four))
        c, labels = llama(size), list(map(_number, (model, adapters, optimizer)))
        inputs = 567 * c.num_hidden_layers * c.hidden_size / small
        rows.append(_row("Figure 6", size, "total", "the three labels, GiB", total, sum(labels) / 1024))
        rows.append(
            _row("Figure 6", size, "total", "and 567 MB × L h, GiB", total, (sum(labels) + inputs) / 1024, "inferred")
        )
    return rows


def _footprints():
    rows = []
    for table, size, printed in FOOTPRINTS:
        held = base_bytes(size) + account(size).adapters
        rows.append(_row(f"Table {table}", size, "4-bit", "NF4 + DQ and adapters of r = 64", printed, held / GB))
    rows.append(
        _row("Table 1, 6", "13b", "Vicuna, 16-bit", "2 bytes a weight", "26GB", 2 * parameters(llama("13b")) / GB)
    )
    n = 2 * parameters(llama("33b")) / GB
    return [*rows, _row("Table 6", "33b", "16-bit", "2 bytes a weight", "66GB", n, "2 · 33B, the nominal size, is 66")]


def _table_4():
    return [_row("Table 4", "", name, "mean of its 8 values", mean, sum(v) / 8) for name, (v, mean) in TABLE_4.items()]


def _elo():
    return [
        _row("§5.2", "", "Elo", "1100 against 1000", "65%", 100 * win_rate(100), about=True),
        _row("Table 7", "", "Elo", "10 points", "1.5%", 100 * (win_rate(10) - 0.5), about=True),
        _row("§5.3", "65b", "Elo", "1023 against GPT-4's 1176", "30%", 100 * win_rate(1023 - 1176), about=True),
        _row("§5.3", "33b", "Elo", "1009 against GPT-4's 1176", "30%", 100 * win_rate(1009 - 1176), about=True),
    ]


def halved_counts(size="7b", r=64):
    """(trained, bytes and numbers as torch counts them, weights that there are), for Llama with NF4 and bypasses on all layers.

    A packed 4-bit weight is an array of bytes, each with two weights: whoever adds up `numel` finds half of the linear layers.
    """
    shapes = llama_shapes(llama(size))
    trained, packed = lora_on(shapes, r), sum(codes_bytes(o * i) for o, i in shapes)
    dense = parameters(llama(size)) - sum(o * i for o, i in shapes)
    return trained, packed + dense + trained, parameters(llama(size)) + trained


def _counts():
    trained, counted, _ = halved_counts()
    log = "qlora.py's log"
    return [
        _row(log, "7b", "all params", "two 4-bit weights counted as one", "3,660,320,768", counted),
        _row(log, "7b", "trainable params", "r (in + out), halved", "79,953,920", trained / 2),
        _row(log, "7b", "trainable %", "the two together", "2.184", 100 * trained / 2 / counted),
    ]


# ------------------------------------------------------------------------------------------------------------------------ as text
def by_size():
    """The four Llamas: bytes of full fine-tuning at 12 and 16 a parameter, of the 4-bit base, of adapters and of a QLoRA step, as text."""
    head = (
        "Llama",
        "parameters",
        "12 bytes each",
        "16 bytes each",
        "NF4 + DQ base",
        "r = 64 adapters",
        "QLoRA, 512 tokens",
    )
    table = [head]
    for size in SIZES:
        n, a = parameters(llama(size)), account(size, checkpointing=True)
        sums = (12 * n, 16 * n, base_bytes(size), a.adapters, a.total)
        table.append((size.upper(), f"{n:,}", *(f"{b / GB:,.2f} GB" for b in sums)))
    return aligned(table)


def five_gigabytes(size="7b"):
    """[(what, bytes so far)]: from half a byte a weight to all that a QLoRA step holds."""
    c, a = llama(size), account(size, checkpointing=True)
    n = parameters(c)
    linear = sum(o * i for o, i in llama_shapes(c))
    return [
        ("half a byte for every weight", n // 2),
        ("embedding, head and norms in 16 bits instead", a.weights + codes_bytes(linear)),
        ("constants of the blocks of 64, double-quantized", base_bytes(size)),
        ("adapters of r = 64 on all linear layers, 16 bits", base_bytes(size) + a.adapters),
        ("their gradients, 16 bits", base_bytes(size) + a.adapters + a.gradients),
        ("their m and v, 32 bits", base_bytes(size) + a.adapters + a.gradients + a.optimizer),
        ("activations of 512 tokens, checkpointing", a.total),
    ]


def findings():
    """What the audit shows, as sentences with their numbers. -> [str]"""
    return [_f_bounds(), _f_inputs(), *_f_bars(), *_f_tables(), _f_five_gigabytes(), _f_halved_counts()]


def _each(numbers, digits=0):
    return ", ".join(f"{n:,.{digits}f}" for n in numbers)


def _f_bounds():
    n, step = parameters(llama("65b")), account("65b", checkpointing=True)
    return (
        f"> 780 GB: {n:,} weights at 12 bytes are {12 * n / GB:.1f} GB; with a float32 copy of the weights (16 bytes) "
        f"{16 * n / GB:,.1f} GB. < 48 GB: {(step.total - step.activations) / GB:.1f} GB beside the activations, "
        f"{step.total / GB:.1f} GB with those of 512 tokens."
    )


def _f_inputs():
    c, tokens = llama("7b"), 512
    stream = 2 * c.num_hidden_layers * c.hidden_size  # bytes a token: the inputs of all blocks in 16 bits
    linears = stream / inputs_ratio()
    block = block_tape(c, 1, tokens, ("q_proj", "v_proj"), r=8, number=2)
    return (
        "567 MB and 18 MB: no sequence length is given. The inputs of all linear layers are "
        f"{linears / 1e3:,.0f} kB a token in 16 bits, so 567 MB would be {567e6 / linears:.0f} tokens. 18 is "
        f"567/{c.num_hidden_layers} = {567 / c.num_hidden_layers:.1f}: one layer's share. What checkpointing keeps are the "
        f"inputs of the blocks, {stream / 1e3:.0f} kB a token: {567 * inputs_ratio():.0f} MB at that length, and 18 MB only "
        f"up to {18e6 / stream:.0f} tokens. (This package's tape of the blocks, q and v adapted, {tokens} tokens in 16 bits: "
        f"{c.num_hidden_layers * sum(block.values()) / MB:,.0f} MB, and {stream * tokens / MB:.0f} MB of inputs.)"
    )


def _f_bars():
    c, base = llama("7b"), [base_bytes(s) / MIB for s in SIZES]
    gaps = [_number(FIGURE_6[s][0]) - b for s, b in zip(SIZES, base, strict=True)]
    undoubled = [predict(llama(s), double_quant=False).constants - account(s).constants for s in SIZES]
    wider = [account(s).weights for s in SIZES]
    left = [g - (u + w) / MIB for g, u, w in zip(gaps, undoubled, wider, strict=True)]
    return [
        f"26 MB: 0.2 % of the weights in 16 bits are {0.004 * parameters(c) / MB:.2f} MB; 26 MiB exactly is r = 8 with 13 h a "
        "layer (four h × h matrices and one of h × 4 h).",
        "Figure 6's adapters follow one formula to the last digit, L · 64 · 18 h · 2 bytes in MiB: a block with a 4 h MLP. A "
        f"Llama has gate, up and down of 2.7 h: {_each([account(s).adapters / MIB for s in SIZES], 1)} MiB.",
        f"Figure 6's model bars (and §2's 5,048 MB) do not follow: weights and constants are {_each(base)} MiB, the bars lie "
        f"{_each(gaps)} MiB above. Without double quantization and with the rest in 32 bits {_each(left)} MiB remain.",
        f"Figure 6's totals leave {_each([figure_6_rest(s) for s in SIZES], 2)} GiB beside the three labels. 567 MB, scaled "
        "by L h, fills it for 7B and 13B, not for 33B and 65B.",
    ]


def _f_tables():
    bf16, fp4, nf4 = (TABLE_4[name][0] for name in ("BFloat16", "Float4", "NFloat4 + DQ"))
    behind = [round(a - b, 1) for a, b in zip(bf16, fp4, strict=True)]
    return [
        f"Footprints: 41 and 21 GB are 5 bits of 65 and 33 billion weights; 10 GB, and 5 or 6, are not ({13 * 5 / 8:.1f} and "
        f"{7 * 5 / 8:.1f}). Table 1 has 6 GB and table 6 has 5 GB for the same model.",
        f"Table 4: NFloat4 + DQ has a mean of {sum(nf4) / 8:.2f}, not 53.1, and so lies below BFloat16's {sum(bf16) / 8:.2f}. FP4 "
        f'is not "consistently one percentage point behind": by {_each(behind, 1)}, in {sum(x > 0 for x in behind)} of 8 columns.',
        f"Elo: {100 * win_rate(100):.1f} % and {100 * (win_rate(10) - 0.5):.2f} %, rounded up to 65 and 1.5; Guanaco 65B and 33B "
        f"against GPT-4 {100 * win_rate(-153):.1f} % and {100 * win_rate(-167):.1f} %, both called 30 %.",
    ]


def _f_five_gigabytes():
    half, rest, base, _, _, state, whole = (in_units(n) for _, n in five_gigabytes())
    return (
        f"Why 5 GB and not 3.5 GB for 7B? {half} are half a byte for every weight. Embedding and head stay in 16 bits ({rest}), "
        f"each block has a constant ({base}); training adds adapters, gradients, m and v ({state}) and activations ({whole}). "
        "What lies between the base and 5,048 MB is not derivable: the driver's context and the allocator's reserve are candidates."
    )


def _f_halved_counts():
    trained, counted, there = halved_counts()
    return (
        f"Why are my parameter counts halved? Two 4-bit weights share a byte, and bytes were counted: {counted:,} = {there:,} less "
        f"half of the linear layers. qlora.py halves the {trained:,} trained 16-bit weights too, though these are not packed. "
        "`size` counts weights here."
    )


def describe_size(name):
    """The audit's rows of one model ("llama-65b"): the claims, figure 6's bars and the footprints, printed beside recomputed."""
    size = name.removeprefix("llama-").upper()
    return f"the paper's numbers for {size}, recomputed (all of them: --audit)\n" + _table(
        [r for r in audit() if r.model == f"Llama {size}" and "Elo" not in r.method]
    )


def _table(rows):
    table = [("where", "model", "what", "setting", "printed", "computed", "verdict")]
    for r in rows:
        digits = len(r.printed.partition(".")[2].rstrip("%MBG")) + 2
        computed = (
            ""
            if r.computed is None
            else f"{r.computed:,.{0 if r.verdict == 'match' and r.computed > 1e6 else digits}f}"
        )
        table.append((r.where, r.model, r.method, r.setting, r.printed, computed, r.verdict))
    return aligned(table, left=(0, 1, 2, 3, 6))


def describe():
    """The audit as aligned text, the four sizes, and the findings."""
    rows = audit()
    verdicts = [r.verdict for r in rows]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    return "\n".join(
        [_table(rows), "", f"{len(verdicts)} numbers: {counts}", "", by_size(), "", *(f"* {f}" for f in findings())]
    )


# fmt: off
__all__ = ["SIZES", "FIGURE_6", "FOOTPRINTS", "TABLE_4", "llama", "account", "base_bytes", "figure_6_adapters", "figure_6_rest", "win_rate",
           "inputs_ratio", "halved_counts", "five_gigabytes", "audit", "by_size", "findings", "describe",
           "describe_size"]
# fmt: on
