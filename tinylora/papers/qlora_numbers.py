"""What the QLoRA paper says of memory, and what else in it is arithmetic: printed beside recomputed. `tinylora memory --audit` prints it.

    full fine-tuning    12 bytes a parameter: 16-bit weights and gradients, float32 m and v
    double quantization 32/64 = .5 bits a weight become 8/64 + 32/(64 · 256) = .127                          (QLoRA §3)
    figure 6            adapters: L · 64 · 18 h · 2 bytes in MiB; optimizer: 4 times that
    Elo                 P(win) = 1 / (1 + 10^(−Δ/400))

What is computed: `audit()` goes through "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314) in the paper's order.

    §1, §2       > 780 GB and < 48 GB; equations 1 to 3; 567, 18, 26 and 5,048 MB
    §3           equations 4 to 6; NF4's bins and its block maximum; the bits of the constants and what 8 of them cost; paged AdamW
    §4           tables 2 to 4 and figure 3: what is arithmetic in them
    §5           tables 1 and 5 to 7: footprints, ratings, and where the paper differs from itself
    appendices   B (hyper-parameters), E (NF4's values), F (normality), figure 6; then the counts that the authors' script prints

A printed number is a `verdict.Row`. A sentence without a number is a `verdict.Claim`: what decides it is computed, with the functions that
quantize, multiply and update elsewhere in this package. Where the paper differs from itself, `computed` is its other number.

What is said: `describe()` is the audit as text. Below the rows stand the entries of the map of the papers that they are about, with its
statements and verdicts (`agreement`), each followed by what was derived from the rows; `contradictions()` says where rows and map differ.
`five_gigabytes()` and `halved_counts()` answer two questions that learners ask.

What is drawn: `figure_6()` is the paper's figure 6, our account of the four Llamas over the paper's own labels.

The verdicts are those of `verdict`, and "holds" or "does not hold" for bounds and claims. "not derivable" is what only a run of those
models could tell (perplexities, accuracies, speed); its note says which part is arithmetic. Figure 6's labels, tables 5 to 7, and appendix
F's 7.5 % are as transcribed by others, the hyper-parameters as in the authors' scripts; all else was read in the paper. What is about
training at scale alone (figures 2 and 4) has no row. Sizes are the released Llamas' (`memory.MODELS`). GB are 10⁹ bytes, MiB 2²⁰. Only
what 8-bit constants cost is drawn at random (a fixed seed, 2²⁰ weights, its standard error in the note); equations are checked on fixed
draws too.
"""

from statistics import NormalDist

import numpy as np

from .. import backend, codebooks, nn
from ..costs.memory import MODELS, PAPER, block_tape, codes_bytes, parameters, predict
from ..costs.parameters import llama_shapes, lora_on
from ..costs.tables import aligned, in_units
from ..figures.memory import GB, PARTS, look, stacked_bar, write_over_bar
from ..figures.style import SMALL, canvas, narrow
from ..kernels import rounding
from ..lora import LoRALinear
from ..numerics import optimality
from ..optim import AdamW
from ..paging import Pager
from ..quant import quantize
from ..tensor import Tensor
from ..training.schedule import schedule
from . import agreement, nf4_construction, normality
from .verdict import FAILS, HOLDS, Claim, Row, agrees, decimals, fail, parse, pick, tally

SIZES = ("7b", "13b", "33b", "65b")
MB, MIB = 1e6, 2**20

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
#: Table 2: mean perplexity on Pile Common Crawl, and the code whose error stands beside it.
TABLE_2 = {
    "Int4": ("34.34", "int4"),
    "Float4 (E2M1)": ("31.07", "fp4_e2m1"),
    "Float4 (E3M0)": ("29.48", "fp4_e3m0"),
    "NFloat4 + DQ": ("27.41", "nf4"),
}
#: Table 3, its first and last column: full fine-tuning in 16 bits, and adapters on 16, 8, 4 (FP4) and, for T5, 4 bits (NF4 + DQ).
TABLE_3 = {
    "RoBERTa-large": (88.6, (88.8, 88.8, 88.6)),
    "T5-11B": (62.0, (60.7, 60.7, 60.9, 60.9)),
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
def _model(size):
    return f"Llama {size.upper()}" if size else ""


def _row(where, size, method, setting, printed, computed, note="", about=False, claim=""):
    """The Row of a Llama of this size, or of none ("")."""
    return Row.judged(where, _model(size), method, setting, printed, computed, note, about, claim)


def _bound(where, size, method, setting, printed, computed, claim):
    """The Row of a bound, ">780GB" or "<48GB": it holds or does not."""
    bound = parse(printed)[0]
    holds = computed > bound if printed.startswith(">") else computed < bound
    return Row(where, _model(size), method, setting, printed, computed, HOLDS[holds], claim=claim)


def _roughly(difference, bound):
    """The verdict on what should be 0."""
    return difference == 0 or (difference < bound and "roughly")


def audit():
    """Every row of the paper that the module's first lines name. -> [verdict.Row], in the paper's order"""
    parts = (
        *(_section_1, _saved, _equations_1_to_3, _section_2),
        *(_equation_4, _bins, _constants, _equations_5_and_6, _paged),
        *(_table_2, _table_3, _table_4),
        *(_footprints, _scores, _elo),
        *(_appendices, _figure_6, _counts),
    )
    return [row for part in parts for row in part()]


# fmt: off
def _section_1():
    rows = []
    for size in SIZES:
        rows.append(_row("§1", size, "", "weights", size.upper(), parameters(llama(size)) / GB, about=True,
             claim="qlora-sizes"))
    full, n = 12 * parameters(llama("65b")) / GB, account("65b", checkpointing=True)
    rest = (n.total - n.activations) / GB
    return [
        *rows,
        _bound("§1", "65b", "full", "12 bytes a weight", ">780GB", full, claim="qlora-780-gb"),
        _bound("§1", "65b", "QLoRA", "r = 64, no activations", "<48GB", rest, claim="qlora-48-gb"),
        _bound("§1", "65b", "QLoRA", "the same, 512 tokens, checkpointing", "<48GB", n.total / GB, claim="qlora-48-gb"),
    ]


def _section_2():
    c, n = llama("7b"), parameters(llama("7b"))
    blocks, base = 567 * inputs_ratio(), base_bytes("7b") / MB
    return [
        _row("§2", "7b", "LoRA", "0.2 % of the weights, 2 bytes", "26MB", 0.002 * n * 2 / MB, claim="qlora-26-mb"),
        _row("§2", "7b", "LoRA", "L · 8 · 13 h · 2 bytes, MiB", "26", figure_6_adapters("7b", 8, 13) / MIB, "inferred",
             claim="qlora-26-mb"),
        _row("§2", "7b", "LoRA", "input gradients", "567MB", None, "no sequence length is given",
             claim="qlora-checkpointing"),
        _row("§2", "7b", "LoRA", "567 MB / L: one layer's", "18MB", 567 / c.num_hidden_layers, f"L = {c.num_hidden_layers}",
             claim="qlora-checkpointing"),
        _row("§2", "7b", "LoRA", "567 MB as inputs of blocks only", "18MB", blocks, claim="qlora-checkpointing"),
        _row("§2", "7b", "QLoRA", "NF4 + DQ, rest in 16 bits", "5,048MB", base, claim="qlora-5048-mb"),
    ]


def inputs_ratio():
    """h / (h + h + h + f): the input of a Llama-7B block over the inputs of its linear layers (q k v, o, gate up, down)."""
    c = llama("7b")
    return c.hidden_size / (3 * c.hidden_size + c.intermediate_size)


def _bits():
    return 32 / 64, 8 / 64 + 32 / (64 * 256)


def _saved():
    (one, two), n = _bits(), parameters(llama("65b"))
    plain, double = (predict(llama("65b"), double_quant=dq).constants for dq in (False, True))
    linear = f"{(plain - double) / GB:.2f} of the linear layers"
    return [
        _row("§1", "", "NF4 + DQ", "saved a weight, bits", "0.37", one - two, claim="qlora-dq-bits"),
        _row("§1", "65b", "NF4 + DQ", "saved in all", "3GB", (one - two) / 8 * n / GB, linear, claim="qlora-dq-3-gb"),
    ]


def _normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _equations_1_to_3():
    x = _normal(1 << 16)
    codes, absmax = rounding.CUDA.quantize_8bit(x, codebooks.int8(), 64)
    integers, m = codes.astype(int) - 127, np.repeat(absmax.astype(np.float64), 64)
    by_c = integers / (127 / m)
    by_code = codebooks.int8()[codes].astype(np.float64) * m
    unequal = np.count_nonzero(integers != np.rint(127 / m * x))
    worst, apart = (np.abs(d / m).max() for d in (by_c - x, by_c - by_code))
    shapes = {shape for size in SIZES for shape in llama_shapes(llama(size))}
    left, blocks = sum(o * i % (64 * 256) for o, i in shapes), len(quantize(_normal(5, 13)).absmax)
    off = _off("dense")
    note = "NF4's code is multiplied by absmax; this c divides"
    return [
        Claim.decided("§2, eq. 1", "Int8", "values that are not the nearest", "round(127/absmax · X)", unequal, unequal == 0,
             f"of {x.size:,}", "qlora-eq-1"),
        Claim.decided("§2, eq. 1", "Int8", "round trip: largest error / absmax", "<=1/254", worst, worst <= 1 / 254 + 1e-9,
             claim="qlora-eq-1"),
        Claim.decided("§2, eq. 2", "Int8", "X/c against code · absmax, / absmax", "X/c", apart, apart < 1e-7, note,
             claim="qlora-eq-2"),
        Claim.decided("§2", "blocks", "b h mod 64 · 256, a Llama's matrices", "b h/B", left, left == 0, f"5 × 13: {blocks} blocks",
             claim="qlora-blocks"),
        Claim.decided("§2, eq. 3", "LoRA", "float32 layer against float64", "XW + s X L1 L2", off, off < 1e-6,
             claim="qlora-eq-3"),
    ]


def _adapted(kind, compute_dtype="float32"):
    """(layer, x, W): 256 × 128 normal weights with a bypass of r = 64 and α = 16 (the scripts'), and an input; the same at every call."""
    with backend.using_generator(np.random.default_rng(0)):
        base = nn.Linear(256, 128)
        base.weight.data = w = nn.normal((128, 256), 1.0)
        frozen = base if kind == "dense" else nn.Linear4bit.of(base, compute_dtype=compute_dtype)
        layer = LoRALinear(frozen, r=64, alpha=16)
        layer.lora_B.weight.data = nn.normal((128, 64), 1.0)
        return layer, nn.normal((32, 256), 1.0), w


def _off(kind, compute_dtype="float32"):
    """‖Y − (X W + s X L1 L2)‖ / ‖…‖: a layer's output against eq. 3 (or 5, with the W that dequantizing gives) in float64."""
    layer, x, _ = _adapted(kind, compute_dtype)
    factors = layer.base_layer.dense(), layer.lora_A.weight.data, layer.lora_B.weight.data
    X, (W, L1, L2) = x.astype(np.float64), (a.T.astype(np.float64) for a in factors)
    wanted = X @ W + layer.scaling * (X @ L1 @ L2)
    return np.linalg.norm(layer(Tensor(x)).data - wanted) / np.linalg.norm(wanted)


def _equation_4():
    q, nf4 = nf4_construction.equation_4(), codebooks.nf4()
    rest = q[np.isfinite(q)]
    least = np.abs(rest).min()
    note = f"q_0 = {q[0]}, then {rest[0]:.3f} … {rest[-1]:.3f}".replace("-inf", "−∞").replace("-", "−")
    return [
        _row("§3, eq. 4", "", "NF4", "i = 0 … 15 as printed: finite values", "16", len(rest), note, claim="qlora-eq-4"),
        Claim.decided("§3, eq. 4", "NF4", "the least magnitude of these", "no exact 0", least, least > 0, "symmetric",
             claim="qlora-eq-4-zero"),
        _row("§3", "", "NF4", "2^(k−1) quantiles below: values up to 0", "8", int((nf4 <= 0).sum()), "7 negative values, and 0",
             claim="qlora-nf4-counts"),
        _row("§3", "", "NF4", "2^(k−1) + 1 above: values from 0 on", "9", int((nf4 >= 0).sum()), "0, and 8 positive values",
             claim="qlora-nf4-counts"),
    ]


def normal_usage(scale):
    """P of each NF4 value for w/scale, w ~ N(0, 1): what a block's usage would be if its absmax were a constant. (16,) float64, sum 1."""
    bounds = codebooks.midpoints(codebooks.nf4()).astype(np.float64) * scale
    return np.diff([0.0, *map(NormalDist().cdf, bounds), 1.0])


def _bins():
    nf4 = codebooks.nf4()
    edge, rows = NormalDist().inv_cdf(codebooks.NF4_OFFSET), []
    usage = {"B = 64": optimality.usage(nf4, 64), f"N(0, 1) / {edge:.3f}": normal_usage(edge)}
    for of, P in usage.items():
        least, most = P.min(), P.max()
        rows.append(Claim.decided("§3", "NF4", f"entropy of the bins, {of}, bits", "equal bins: 4", -P @ np.log2(P), most - least < 1e-9,
                           f"P from {least:.4f} to {most:.4f}", claim="qlora-equal-bins"))
    means = {B: optimality.expected_max(B) for B in (16, 64, 256, 4096)}
    cv = np.sqrt(optimality.expected_max(64, 2) - means[64] ** 2) / means[64]
    listed = f"mean {', '.join(f'{m:.3f}' for m in means.values())} σ: B = {', '.join(map(str, means))}"
    return [*rows, Claim.decided("§3", "absmax", "deviation / mean of the maximum, B = 64", "rescales σ", cv, cv < 1e-9, listed,
         claim="qlora-absmax-rescales")]


def constants_cost(nested_code="dynamic8", offset=None, size=1 << 20):
    """(E|W − Ŵ|² with 8-bit constants) / (the same with exact ones), and its standard error, on `size` normal weights of a fixed seed.

    nested_code, offset as in `quant.quantize`; size a multiple of 64 · 256, the weights of one block of constants, by which the error is
    estimated (ValueError otherwise).
    """
    if size < 1 or size % (64 * 256):
        raise ValueError(f"constants_cost: size = {size}, expected a multiple of {64 * 256:,}")
    w = _normal(size)
    exact, double = (
        np.square(quantize(w, double_quant=dq, nested_code=nested_code, offset=offset).dequantize().astype(np.float64) - w)
        .reshape(-1, 64 * 256)
        .mean(axis=1)
        for dq in (False, True)
    )
    return double.mean() / exact.mean(), (double - exact).std() / np.sqrt(len(exact)) / exact.mean()


def _constants():
    (one, two), rows = _bits(), []
    for code, name in (("dynamic8", "dynamic map (scripts)"), ("fp8_e4m3", "FP8 E4M3 (text)")):
        (ratio, error), (bare, _) = constants_cost(code), constants_cost(code, offset=0.0)
        more, spread, without = (100 * r for r in (ratio - 1, error, bare - 1))
        note = f"± {spread:.3f}; without the mean {without:.1f}"
        rows.append(Claim.decided("§3", "NF4 + DQ", f"more squared error, {name}, %", "no loss", more, _roughly(more, 1), note,
             claim="qlora-dq-no-loss"))
    return [
        _row("§3", "", "NF4", "32/64 bits a weight", "0.5", one, claim="qlora-dq-bits"),
        _row("§3", "", "NF4 + DQ", "8/64 + 32/(64·256) bits a weight", "0.127", two, "and 32 bits a tensor, the mean",
             claim="qlora-dq-bits"),
        _row("§3", "", "NF4 + DQ", "saved a weight, bits", "0.373", one - two, claim="qlora-dq-bits"),
        *rows,
    ]


def _equations_5_and_6():
    layer, x, w = _adapted("4bit")
    q, s = layer.weight, layer.scaling
    absmax = q.constants.code[q.absmax_codes] * np.repeat(q.nested_absmax, 256)[: len(q.absmax_codes)] + q.offset
    by_hand = codebooks.nf4()[q.indices()] * np.repeat(absmax, 64).reshape(q.shape)
    unequal = np.count_nonzero(by_hand.view(np.uint32) != q.dequantize("float32").view(np.uint32))
    near, coarse = _off("4bit"), _off("4bit", "bfloat16")
    slope, otherwise, trained = _gradients(layer, x, w)
    only = trained == ["bypasses.default.lora_A.weight", "bypasses.default.lora_B.weight"]
    return [
        Claim.decided("§3, eq. 5", "QLoRA", "float32 layer against dense Ŵ", "X Ŵ + X L1 L2", near, near < 1e-6, f"bfloat16: {coarse:.4f}",
             claim="qlora-eq-5"),
        Claim.decided("§3, eq. 5", "QLoRA", "eq. 3's s, in the scripts α/r = 16/64", "no s", s, s == 1 or FAILS,
             claim="qlora-eq-5-scale"),
        Claim.decided("§3, eq. 6", "QLoRA", "constants, then weights: unequal values", "equal", unequal, unequal == 0,
             claim="qlora-eq-6"),
        Claim.decided("§3", "QLoRA", "gradients of X, L1, L2 against differences", "through Ŵ", slope, slope < 1e-5 and only,
               f"X's with W for Ŵ: {100 * otherwise:.1f} % off; W has none", claim="qlora-gradients"),
    ]


def _gradients(layer, x, w):
    """(largest error, error with W for Ŵ, names that have a gradient): E = Σ G ⊙ Y, which is linear in each of X, L1 and L2.

    The derivative along a fixed direction against (E(+1) − E(−1))/2, exact for what is linear but for float32's rounding; relative to the
    norms of gradient and direction.
    """
    rng = np.random.default_rng(1)
    X, G = Tensor(x, requires_grad=True), rng.standard_normal((len(x), layer.out_features), dtype=np.float32)

    def energy():
        return (layer(X) * G).sum()

    energy().backward()
    worst = 0.0
    for t in (X, layer.lora_A.weight, layer.lora_B.weight):
        kept, d = t.data, rng.standard_normal(t.shape, dtype=np.float32)
        ends = []
        for sign in (1, -1):
            t.data = kept + np.float32(sign) * d
            ends.append((layer(X).data.astype(np.float64) * G).sum())
        t.data = kept
        slope = (ends[0] - ends[1]) / 2
        worst = max(worst, abs(slope - np.vdot(t.grad, d)) / (np.linalg.norm(t.grad) * np.linalg.norm(d)))
    other = G @ (w + layer.delta())
    return worst, np.linalg.norm(other - X.grad) / np.linalg.norm(X.grad), [name for name, _ in layer.trainable()]


def _paged():
    def trained(pager, steps=5):
        rng = np.random.default_rng(0)
        params = [Tensor(rng.standard_normal(n, dtype=np.float32), requires_grad=True) for n in (3000, 1000, 96)]
        optimizer = AdamW(params, pager=pager)
        for _ in range(steps):
            for p in params:
                p.grad = rng.standard_normal(p.shape, dtype=np.float32)
            optimizer.step()
        return np.concatenate([p.data for p in params]).view(np.uint32)

    pager = Pager(budget=8 * 1024, page_bytes=2048)
    unequal = np.count_nonzero(trained(None) != trained(pager))
    note = f"{pager.counters.bytes_moved:,} bytes moved in 5 steps, {pager.total_bytes:,} held"
    return [
        Claim.decided("§3", "paged AdamW", "a quarter resident: unequal values", "equal", unequal, unequal == 0, note,
             claim="qlora-paged"),
        Claim.decided("§3", "paged AdamW", "speed, 65B, batches of 16", "the same", None, "not derivable", "bytes can be counted, above",
             claim="qlora-paged-speed"),
    ]


def normal_errors():
    """{table 2's name of a code: its mean squared error on normal weights in blocks of 64}"""
    return {name: optimality.expected_error(codebooks.NAMED[code](), 64) for name, (_, code) in TABLE_2.items()}


def _table_2():
    errors = normal_errors()
    other = optimality.expected_error(codebooks.fp4(), 64)
    best, *_ = order = sorted(errors, key=errors.get)
    nearest = min(errors[name] for name in errors if name != best) / errors[best]
    notes = {name: f"normal weights' squared error {e:.5f}" for name, e in errors.items()}
    notes["Float4 (E2M1)"] += f"; bitsandbytes' grid {other:.5f}"
    place, last = order.index("Float4 (E3M0)") + 1, errors["Float4 (E3M0)"] / errors[best]
    return [
        *(_row("Table 2", "", n, "mean perplexity", p, None, notes[n], claim="qlora-table-2") for n, (p, _) in TABLE_2.items()),
        Claim.decided("Table 2", "order", "the nearest rival's error / NF4's", "NF4 first", nearest, best == "NFloat4 + DQ",
             claim="qlora-table-2-first"),
        Claim.decided("Table 2", "order", "E3M0's place by error", "2nd of 4", place, "not derivable",
               f"{last:.1f} times NF4's error; a perplexity need not follow it", "qlora-table-2-order"),
    ]


def _table_3():
    one, two = _bits()
    note = f"its bits axis: {4 + one} bits a weight, {4 + two:.3f} with DQ; table 2 has perplexities"
    rows = [Claim.decided("Figure 3", "", "mean zero-shot accuracy", "a curve", None, "not derivable", note,
         claim="qlora-fig-3")]
    for model, (full, adapters) in TABLE_3.items():
        apart = np.subtract(adapters, full)
        note = f"{apart.min():+.1f} to {apart.max():+.1f}; scores as printed".replace("-", "−")
        reached = bool(apart.min() >= 0)
        claim = f"qlora-table-3-{model.partition('-')[0].lower()}"
        rows.append(Claim.decided("Table 3", model, "adapters − full fine-tuning, mean", "replicates", apart.mean(), reached, note, claim))
    return rows


#: The points between the two by §5.3, which §1 calls more than 20.
NEARLY = 20


def _scores():
    return [
        Claim.decided("Table 5", "", "MMLU by data set", "accuracies", None, "not derivable", "no arithmetic in it",
             claim="qlora-table-5"),
        Claim.decided("Table 6", "", "scores against ChatGPT", "percentages", None, "not derivable",
               "one row twice: Open Assistant 33B, Vicuna 13B", claim="qlora-table-6"),
        Claim.decided("§1", "Table 6", "7B's points above Alpaca 13B", "> 20", NEARLY, NEARLY > 20 or FAILS,
               f'§5.3: "nearly {NEARLY}"', "qlora-20-points"),
    ]


def _appendix_e():
    published = np.array(codebooks.NF4_PUBLISHED, np.uint32)

    def apart(offset):
        quantiles = nf4_construction.recipe(np.linspace, offset, np.float64)[1]
        return np.abs(quantiles / quantiles.max() - published.view(np.float32)).max()

    equal = int((codebooks.nf4().view(np.uint32) == published).sum())
    seven, exact = apart(codebooks.NF4_OFFSET), apart(929 / 960)
    return [
        _row("App. E", "", "NF4", "from quantiles in float32: equal bits", "16", equal, claim="qlora-app-e"),
        Claim.decided("App. E", "NF4", "in float64: largest difference", "equal", seven, _roughly(seven, 1e-6),
               f"{exact:.1e} with 929/960, not cut to 7 digits", claim="qlora-app-e"),
    ]


def _appendices():
    share = 100 * normality.PAPER["rejected"]
    least = 100 * normality.least_share(normality.PAPER["rejected"])
    warm, below = 0.03 * 1875, sum(schedule("constant", step, 1875) < 1 for step in range(1875))
    return [
        _row("App. B", "", "dropout", "7B and 13B: the text; the table has", "0.05", 0.1, claim="qlora-app-b-dropout"),
        Claim.decided("App. B", "warm-up", "steps: 3 % of 1,875", "constant", warm, below == warm or FAILS,
               f"of a schedule that is constant {below} lie below the full rate", "qlora-app-b-warm-up"),
        *_appendix_e(),
        _row("App. F", "", "normality", "Llama 7B's rows rejected at 5 %", "7.5%", None, "others: quantize --normality",
             claim="qlora-app-f"),
        _row("App. F", "", "normality", "not normal, if all of these are found", f"{share:.1f}%", least,
             "5 % of normal rows are rejected; these are Llama 7B's", claim="qlora-app-f-share"),
    ]


def figure_6_rest(size):
    """GiB that figure 6's total leaves beside model, adapters and optimizer, if its MB are MiB and its GB are GiB."""
    model, adapters, optimizer, total = map(_number, FIGURE_6[size])
    return total - (model + adapters + optimizer) / 1024


def _figure_6():
    rows, small = [], llama("7b").num_hidden_layers * llama("7b").hidden_size
    for size, (model, adapters, optimizer, total) in FIGURE_6.items():
        rows.append(_row("Figure 6", size, "model", "NF4 + DQ, rest in 16 bits, MiB", model, base_bytes(size) / MIB,
             claim="qlora-fig-6-model"))
        rows.append(_row("Figure 6", size, "adapters", "L · 64 · 18 h · 2 bytes, MiB", adapters, figure_6_adapters(size) / MIB,
             claim="qlora-fig-6-adapters"))
        real = account(size).adapters / MIB
        rows.append(_row("Figure 6", size, "adapters", "all 7 matrices of a Llama, MiB", adapters, real,
             claim="qlora-fig-6-llama"))
        four = 4 * figure_6_adapters(size) / MIB
        rows.append(_row("Figure 6", size, "optimizer", "4 × the adapters, MiB", optimizer, four,
             claim="qlora-fig-6-optimizer"))
        c, labels = llama(size), list(map(_number, (model, adapters, optimizer)))
        inputs = 567 * c.num_hidden_layers * c.hidden_size / small
        rows.append(_row("Figure 6", size, "total", "the three labels, GiB", total, sum(labels) / 1024,
             claim="qlora-fig-6-totals"))
        rows.append(_row("Figure 6", size, "total", "and 567 MB × L h, GiB", total, (sum(labels) + inputs) / 1024, "inferred",
             claim="qlora-fig-6-totals"))
    return rows


def _footprints():
    rows = []
    for table, size, printed in FOOTPRINTS:
        held = base_bytes(size) + account(size).adapters
        rows.append(_row(f"Table {table}", size, "4-bit", "NF4 + DQ and adapters of r = 64", printed, held / GB,
             claim="qlora-footprints"))
    rows.append(_row("Table 1, 6", "13b", "Vicuna, 16-bit", "2 bytes a weight", "26GB", 2 * parameters(llama("13b")) / GB,
         claim="qlora-footprint-26"))
    n = 2 * parameters(llama("33b")) / GB
    return [
        *rows,
        _row("Table 6", "33b", "16-bit", "2 bytes a weight", "66GB", n, "2 · 33B, the nominal size, is 66",
             claim="qlora-footprint-66"),
    ]


def _table_4():
    behind = np.subtract(TABLE_4["BFloat16"][0], TABLE_4["Float4"][0])
    note = f"{behind.min():.1f} to {behind.max():.1f}; behind in {(behind > 0).sum()} of 8".replace("-", "−")
    return [
        *(_row("Table 4", "", name, "mean of its 8 values", mean, sum(v) / 8, claim="qlora-table-4-mean")
          for name, (v, mean) in TABLE_4.items()),
        Claim.decided("Table 4", "Float4", "points behind BFloat16, mean of 8", "consistently 1", behind.mean(), behind.min() > 0, note,
               "qlora-table-4-fp4"),
    ]


def _elo():
    return [
        _row("Table 1", "13b", "Elo", "the same model's in table 7", "916", 913, claim="qlora-elo-13b"),
        _row("§5.2", "", "Elo", "1100 against 1000", "65%", 100 * win_rate(100), "a lead of 100 points", about=True,
             claim="qlora-elo"),
        _row("Table 7", "", "Elo", "10 points", "1.5%", 100 * (win_rate(10) - 0.5), about=True, claim="qlora-elo"),
        _row("§5.3", "65b", "Elo", "1023 against GPT-4's 1176", "30%", 100 * win_rate(1023 - 1176), about=True,
             claim="qlora-elo"),
        _row("§5.3", "33b", "Elo", "1009 against GPT-4's 1176", "30%", 100 * win_rate(1009 - 1176), about=True,
             claim="qlora-elo"),
    ]


# fmt: on
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


def derived(rows):
    """What follows from several rows together, with its numbers: [(ids of the map's entries that it is about, sentence)].

    None stands for a sentence that the rows do not bear out.
    """
    return [(claims, derive(rows)) for claims, derive in DERIVED]


def contradictions(rows=None):
    """What the map of the papers says of these rows and they do not bear out, as sentences; rows: those of `audit`. -> [str]"""
    return agreement.contradictions(_audited(audit() if rows is None else rows))


def _audited(rows):
    """The rows with what was derived from them, and with what the script would print if it counted weights, as `agreement` takes them."""
    trained, _, there = halved_counts()
    counted = [
        _row("qlora.py", "7b", what, "weights, r = 64", printed, n, claim="qlora-py-counts")
        for what, printed, n in (
            ("all", "3,660,320,768", there),
            ("trained", "79,953,920", trained),
            ("trained", "2.184%", 100 * trained / there),
        )
    ]
    return agreement.Audit(rows, "qlora-counts", derived(rows), counted)


def _one(rows, where, setting, **fields):
    """The row of this place and setting."""
    (row,) = pick(rows, where=where, setting=setting, **fields)
    return row


def _verdicts(rows):
    return {row.verdict for row in rows}


def _each(numbers, digits=0):
    return ", ".join(f"{n:,.{digits}f}" for n in numbers)


def _bounds(rows):
    """Said if both of §1's bounds hold."""
    full, beside, together = (r for r in pick(rows, where="§1", model="Llama 65B") if r.printed[0] in "<>")
    if _verdicts([full, beside, together]) != {"holds"}:
        return None
    n = parameters(llama("65b"))
    return (
        f"> 780 GB: {n:,} weights at 12 bytes are {full.computed:.1f} GB; with a float32 copy of the weights (16 bytes) "
        f"{16 * n / GB:,.1f} GB. < 48 GB: {beside.computed:.1f} GB beside the activations, "
        f"{together.computed:.1f} GB with those of 512 tokens."
    )


def _input_gradients(rows):
    """Said if 18 MB is 567 MB's share of a layer, and not what checkpointing keeps."""
    share, kept = _one(rows, "§2", "567 MB / L: one layer's"), _one(rows, "§2", "567 MB as inputs of blocks only")
    if _one(rows, "§2", "input gradients").computed is not None or share.verdict != "rounds to" or not fail([kept]):
        return None
    c, tokens = llama("7b"), 512
    stream = 2 * c.num_hidden_layers * c.hidden_size  # bytes a token: the inputs of all blocks in 16 bits
    linears = stream / inputs_ratio()
    block = block_tape(c, 1, tokens, ("q_proj", "v_proj"), r=8, number=2)
    return (
        "the inputs of all linear layers are "
        f"{linears / 1e3:,.0f} kB a token in 16 bits, so 567 MB would be {567e6 / linears:.0f} tokens. 18 is "
        f"567/{c.num_hidden_layers} = {share.computed:.1f}: one layer's share. What checkpointing keeps are the "
        f"inputs of the blocks, {stream / 1e3:.0f} kB a token: {kept.computed:.0f} MB at that length, and 18 MB only "
        f"up to {18e6 / stream:.0f} tokens. (This package's tape of the blocks, q and v adapted, {tokens} tokens in 16 bits: "
        f"{c.num_hidden_layers * sum(block.values()) / MB:,.0f} MB, and {stream * tokens / MB:.0f} MB of inputs.)"
    )


def _unequal_bins(rows):
    """Said if neither law of the block's scale fills the bins equally, and the maximum is not constant."""
    bins = [r for r in pick(rows, where="§3", method="NF4") if r.setting.startswith("entropy of the bins")]
    if _verdicts([*bins, *pick(rows, where="§3", method="absmax")]) != {HOLDS[False]}:
        return None
    blocks, constant = (r.note.removeprefix("P from ") for r in bins)
    return f"in blocks of 64 a bin of NF4 holds {blocks} of normal weights; with a constant {constant}."


def _order_of_table_2(rows):
    """Said if the code of the least perplexity, and no other, has the same place by error."""
    errors = normal_errors()
    by_error = sorted(errors, key=errors.get)
    by_perplexity = sorted(TABLE_2, key=lambda name: float(TABLE_2[name][0]))
    if [a == b for a, b in zip(by_error, by_perplexity, strict=True)] != [True, False, False, False]:
        return None
    listed = ", ".join(f"{name} {errors[name]:.5f}" for name in by_error)
    return f"errors of normal weights in their order: {listed}; only NF4's place is the same."


def _fifth_of_a_percent(rows):
    """Said if 26 MB does not round 0.2 % of the weights, and is 13 h a layer in MiB."""
    share, formula = _one(rows, "§2", "0.2 % of the weights, 2 bytes"), _one(rows, "§2", "L · 8 · 13 h · 2 bytes, MiB")
    if agrees(share.printed, share.computed) or formula.verdict != "match":
        return None
    return (
        f"0.2 % of the weights in 16 bits are {share.computed:.2f} MB; {formula.computed:.0f} MiB exactly is r = 8 with 13 h a "
        "layer (four h × h matrices and one of h × 4 h)."
    )


def _adapters_of_figure_6(rows):
    """Said if the formula gives every label, and a Llama's own matrices give none."""
    formula = pick(rows, where="Figure 6", setting="L · 64 · 18 h · 2 bytes, MiB")
    real = pick(rows, where="Figure 6", setting="all 7 matrices of a Llama, MiB")
    wide = {f"{llama(s).intermediate_size / llama(s).hidden_size:.1f}" for s in SIZES}
    if _verdicts(formula) != {"match"} or not fail(real) or len(wide) != 1:
        return None
    return (
        f"L · 64 · 18 h · 2 bytes are {_each([r.computed for r in formula], 1)} MiB; with a Llama's gate, up and down of {wide.pop()} h "
        f"they are {_each([r.computed for r in real], 1)} MiB."
    )


def _models_of_figure_6(rows):
    """Said if no bar follows, all are too long, and something is left of each even without double quantization and in 32 bits."""
    bars = pick(rows, where="Figure 6", method="model")
    gaps = [r.difference for r in bars]
    undoubled = [predict(llama(s), double_quant=False).constants - account(s).constants for s in SIZES]
    wider = [account(s).weights for s in SIZES]
    left = [g - (u + w) / MIB for g, u, w in zip(gaps, undoubled, wider, strict=True)]
    if not fail([*bars, _one(rows, "§2", "NF4 + DQ, rest in 16 bits")]) or min(left) <= 0:
        return None
    return (
        f"weights and constants are {_each([r.computed for r in bars])} MiB, "
        f"the bars lie {_each(gaps)} MiB above. Without double quantization and with the rest in 32 bits {_each(left)} MiB remain."
    )


def _totals_of_figure_6(rows):
    """Said if every total is more than its labels; which of them 567 MB fills is read off the rows."""
    labels = pick(rows, where="Figure 6", setting="the three labels, GiB")
    filled = pick(rows, where="Figure 6", setting="and 567 MB × L h, GiB")
    yes, no = (
        [r.model.removeprefix("Llama ") for r in filled if (r.verdict == FAILS) == fails] for fails in (False, True)
    )
    if not fail(labels) or min(r.difference for r in labels) <= 0 or not (yes and no):
        return None
    return (
        f"the totals leave {_each([r.difference for r in labels], 2)} GiB beside the three labels. 567 MB, scaled "
        f"by L h, fills it for {' and '.join(yes)}, not for {' and '.join(no)}."
    )


def _footprint_of_5_bits(rows):
    """Said if 5 bits of the nominal size give 41 and 21 GB and none of the smaller footprints."""
    printed = {(size, label): 5 / 8 * float(size.removesuffix("b")) for _, size, label in FOOTPRINTS}
    five_bits = [label for (_, label), n in printed.items() if agrees(label, n)]
    small = [label for label in (label for _, label in printed) if label not in five_bits]
    if five_bits != ["41GB", "21GB"] or small != ["10GB", "5GB", "6GB"]:
        return None
    return (
        f"5 bits of 65 and 33 billion weights are {printed['65b', '41GB']:.1f} and {printed['33b', '21GB']:.1f} GB, of 13 and 7 billion "
        f"not 10 GB and 5 or 6 ({printed['13b', '10GB']:.1f} and {printed['7b', '5GB']:.1f})."
    )


def _means_of_table_4(rows):
    """Said if NFloat4's mean does not follow and is less than BFloat16's, and Float4 is ahead somewhere."""
    bf16, nf4 = (_one(rows, "Table 4", "mean of its 8 values", method=m) for m in ("BFloat16", "NFloat4 + DQ"))
    consistently = _one(rows, "Table 4", "points behind BFloat16, mean of 8")
    if not fail([nf4]) or nf4.computed >= bf16.computed or consistently.verdict != HOLDS[False]:
        return None
    behind = [round(a - b, 1) for a, b in zip(TABLE_4["BFloat16"][0], TABLE_4["Float4"][0], strict=True)]
    return (
        f"NFloat4 + DQ has a mean of {nf4.computed:.2f}, not {nf4.printed}, and BFloat16 {bf16.computed:.2f}. FP4 is behind by "
        f"{_each(behind, 1)}, in {sum(x > 0 for x in behind)} of 8 columns."
    )


def _elo_rounded_up(rows):
    """Said if the four shares agree with the printed ones roughly and no better, and the first two are printed too large."""
    hundred, ten = _one(rows, "§5.2", "1100 against 1000"), _one(rows, "Table 7", "10 points")
    large, small = (_one(rows, "§5.3", f"{rating} against GPT-4's 1176") for rating in (1023, 1009))
    if _verdicts([hundred, ten, large, small]) != {"roughly"} or min(hundred.difference, ten.difference) <= 0:
        return None
    return (
        f"{hundred.computed:.1f} % and {ten.computed:.2f} %, rounded up to {hundred.value:.0f} and {ten.value}; Guanaco 65B and 33B "
        f"against GPT-4 {large.computed:.1f} % and {small.computed:.1f} %, both called {large.value:.0f} %."
    )


def _why_5_gigabytes(rows):
    """Said if the paper's base is more than its weights and constants."""
    row = _one(rows, "§2", "NF4 + DQ, rest in 16 bits")
    if not fail([row]) or row.difference <= 0:
        return None
    half, rest, base, _, _, state, whole = (in_units(n) for _, n in five_gigabytes())
    return (
        f"{half} are half a byte for every weight. Embedding and head stay in 16 bits ({rest}), "
        f"each block has a constant ({base}); training adds adapters, gradients, m and v ({state}) and activations ({whole}). "
        "What lies between the base and 5,048 MB is not derivable: the driver's context and the allocator's reserve are candidates."
    )


def _why_halved_counts(rows):
    """Said if counting bytes gives what the authors' script prints."""
    if not all(agrees(r.printed, r.computed) for r in pick(rows, where="qlora.py's log")):
        return None
    trained, counted, there = halved_counts()
    return (
        f"as bytes are counted, {counted:,} = {there:,} less "
        f"half of the linear layers. qlora.py halves the {trained:,} trained 16-bit weights too, though these are not packed. "
        "`size` counts weights here."
    )


#: (ids of the entries, what derives the sentence)
DERIVED = (
    (("qlora-780-gb", "qlora-48-gb"), _bounds),
    (("qlora-checkpointing",), _input_gradients),
    (("qlora-equal-bins", "qlora-absmax-rescales"), _unequal_bins),
    (("qlora-table-2-first", "qlora-table-2-order"), _order_of_table_2),
    (("qlora-26-mb",), _fifth_of_a_percent),
    (("qlora-fig-6-adapters", "qlora-fig-6-llama"), _adapters_of_figure_6),
    (("qlora-fig-6-model", "qlora-5048-mb"), _models_of_figure_6),
    (("qlora-fig-6-totals",), _totals_of_figure_6),
    (("qlora-footprints",), _footprint_of_5_bits),
    (("qlora-table-4-mean", "qlora-table-4-fp4"), _means_of_table_4),
    (("qlora-elo",), _elo_rounded_up),
    (("qlora-5048-mb",), _why_5_gigabytes),
    (("qlora-py-counts",), _why_halved_counts),
)


def describe_size(name):
    """The audit's rows of one model ("llama-65b"): the claims, figure 6's bars and the footprints, printed beside recomputed."""
    size = name.removeprefix("llama-").upper()
    rows = [row for part in (_section_1, _saved, _section_2, _footprints, _figure_6, _counts) for row in part()]
    return f"the paper's numbers for {size}, recomputed (all of them: --audit)\n" + _table(
        [r for r in rows if r.model == f"Llama {size}"]
    )


def _table(rows):
    table = [("where", "model", "what", "setting", "printed", "computed", "verdict", "note")]
    for r in rows:
        table.append((r.where, r.model, r.method, r.setting, r.printed, _shown(r), r.verdict, r.note))
    return aligned(table, left=(0, 1, 2, 3, 6, 7))


def _shown(row):
    """The computed number, two digits longer than the printed one; beside words four significant digits, of rounding errors two."""
    if row.computed is None:
        return ""
    if isinstance(row, Claim):
        return f"{row.computed:.1e}" if 0 < abs(row.computed) < 1e-5 else f"{row.computed:.4g}"
    digits = decimals(row.printed) + 2
    return f"{row.computed:,.{0 if row.verdict == 'match' and row.computed > 1e6 else digits}f}"


def describe(rows=None):
    """The rows (`audit`) as aligned text, the four sizes, and what the map of the papers says of them."""
    rows = audit() if rows is None else rows
    counted = f"{len(rows)} rows: {tally(rows)}"
    return "\n".join([_table(rows), "", counted, "", by_size(), "", agreement.text(_audited(rows))])


# --------------------------------------------------------------------------------------------------------------------- as figure
def figure_6(seq_len=512):
    """QLoRA's figure 6: our account of the four Llamas (NF4 + DQ, r = 64, checkpointing) over the paper's labels, read as MiB. -> figure

    White is what the printed total, read as GiB, leaves beside the three labels.
    """
    figure, ax = canvas(9.2, 7.4 if narrow() else 5.2)
    ticks, ends = [], []
    for i, size in enumerate(SIZES):
        y, below = 2.6 * i, 2.6 * i + 0.95
        ours, theirs = _our_parts(size, seq_len), _their_parts(size)
        total = account(size, seq_len=seq_len, checkpointing=True).total
        if narrow():
            _labelled_bars(ax, size, (y, y + 1.3), ours, theirs, total)
            ends.append(total / GB)
            continue
        ends.append(_bar(ax, y, ours, f"{total / GB:.1f} GB"))
        ends.append(_bar(ax, below, theirs, f"{_number(FIGURE_6[size][3])} GiB printed"))
        said = "   ".join(f"{_SHORT.get(part, part)} {n:.2f}" for part, n in ours.items())
        _write_over_bar(ax, y, f"{said} GB")
        printed = zip(("model", "adapters", "optimizer"), FIGURE_6[size], strict=False)
        said = "   ".join(f"{name} {label}" for name, label in printed)
        _write_over_bar(ax, below, f"{said} MiB   not labelled {figure_6_rest(size):.2f} GiB")
        ticks += [(y, f"{size.upper()}, recomputed"), (below, "paper")]
    ax.axvline(48, color="0.3", lw=0.9, ls=":", zorder=0)
    ax.annotate("48 GB", (48, -0.55), (4, 0), **SMALL, color="0.3", va="center")
    _legend(ax)
    ax.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=9)
    ax.set(
        xlim=(0, 1.2 * max(ends)),
        ylim=(9.4, -1.2) if narrow() else (9.2, -0.9),
        xlabel=f"GB, one sequence of {seq_len} tokens",
    )
    gap = [100 * (_number(FIGURE_6[s][0]) * MIB / base_bytes(s) - 1) for s in SIZES]
    ax.set_title(
        f"adapters: one formula to the digit; model bars: {min(gap):.0f} to {max(gap):.0f} % above weights and constants",
        fontsize=10,
    )
    return figure


def _labelled_bars(ax, size, at, ours, theirs, total):
    """Our bar and the paper's for one column: what stands beside a wide bar, and in one line over it, stands over it in three."""
    for y, parts in zip(at, (ours, theirs), strict=True):
        length = stacked_bar(ax, y, [(n, PARTS[part][1] if part else "white") for part, n in parts.items()], 0.3)
        ax.barh(y, length, 0.3, **_OUTLINE)
    said = [f"{_SHORT.get(part, part)} {n:.2f}" for part, n in ours.items()]
    write_over_bar(ax, at[0] - 0.17, f"{size.upper()}, recomputed: {total / GB:.1f} GB", said)
    printed = zip(("model", "adapters", "optimizer"), FIGURE_6[size], strict=False)
    said = [f"{name} {label}" for name, label in printed]
    rest = f"not labelled {figure_6_rest(size):.2f} GiB"
    title = f"{size.upper()}, printed: {_number(FIGURE_6[size][3])} GiB"
    write_over_bar(ax, at[1] - 0.17, title, [*said[:2], f"{said[2]} MiB", rest])


_SHORT = {"codes": "model"}  # what the figure calls a part of an Account
_OUTLINE = {"fill": False, "edgecolor": "0.45", "lw": 0.7}


def _our_parts(size, seq_len):
    """{part: GB} of our account, the model as one."""
    a = account(size, seq_len=seq_len, checkpointing=True)
    rest = {part: getattr(a, part) / GB for part in ("adapters", "gradients", "optimizer", "activations")}
    return {"codes": base_bytes(size) / GB, **rest}


def _their_parts(size):
    """{part: GB} of the printed labels, read as MiB; None is what the printed total leaves."""
    model, adapters, optimizer, _ = map(_number, FIGURE_6[size])
    mib = MIB / GB
    labels = {"codes": model * mib, "adapters": adapters * mib, "optimizer": optimizer * mib}
    return {**labels, None: figure_6_rest(size) * 1024 * mib}


def _bar(ax, y, parts, total):
    """A stacked bar with its outline, and the total at its end. -> its length"""
    length = stacked_bar(ax, y, [(n, PARTS[part][1] if part else "white") for part, n in parts.items()], 0.42)
    ax.barh(y, length, 0.42, **_OUTLINE)
    paper = {"fc": "white", "ec": "none", "pad": 0.6}  # so that the line at 48 GB does not cross the number
    bold = {"va": "center", "fontsize": 9, "weight": "bold", "bbox": paper}
    ax.annotate(total, (length, y), (5, 0), textcoords="offset points", **bold)
    return length


def _write_over_bar(ax, y, text):
    small = {"textcoords": "offset points", "fontsize": 7.5, "color": "0.25", "va": "bottom"}
    ax.annotate(text, (0, y - 0.25), (2, 0), **small)


def _legend(ax):
    for part in ("codes", "adapters", "gradients", "optimizer", "activations"):
        name, colour = PARTS[part]
        ax.barh(0, 0, label=_SHORT.get(part, name), **look(colour))
    ax.barh(0, 0, **_OUTLINE, label="not labelled in the paper")
    if narrow():
        below = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.09), "ncols": 3}
        ax.legend(frameon=False, handlelength=2.4, handleheight=1.2, fontsize=8.5, **below)
        return
    white = {"facecolor": "white", "edgecolor": "none", "framealpha": 1}  # the line at 48 GB ends at it
    ax.legend(**white, fontsize=8.5, loc="center right", bbox_to_anchor=(1.0, 0.62))
