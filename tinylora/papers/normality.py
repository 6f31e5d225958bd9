"""Are real weights normal? Shapiro and Wilk's test on every row of every linear weight, with what the test can see beside it.

QLoRA, appendix F: at 5 %, 7.5 % of the rows (output neurons) of LLaMA-7B are rejected; the others are called normal. What a share of
rejected rows means depends on their length, because the test's power grows with it, and a share is not a size. So what is computed are
these (`measure` for a model's weights, `drawn` for rows of a known law):

    rejected        P(p ≤ .05). Normal rows: 5 % by construction. With a share s of rows that are not normal, found with chance β,
                        rejected = s β + (1 − s) α        hence   s ≥ (rejected − α) / (1 − α)
                    which is 2.6 % for the paper's 7.5 % if β = 1, and any larger share if β is smaller
    drawn rows      the same measurement, with a fixed seed, of rows whose law is known and whose length is the same: normal; normal and
                    kept in Q4_1 (what storage in 4 bits alone does); Student t with 100, 60 and 30 degrees of freedom; normal with one
                    value of 6 σ. Their share is the test's power β, with its Monte Carlo error √(β(1 − β)/draws)
    by block        the share once each block of 64 along a row is divided by its own deviation, as NF4 divides by its largest magnitude.
                    The test sees less then, as the drawn rows show; a larger drop than theirs says that the scale changes along the row (in
                    o_proj from head to head), which blocks take care of
    kurtosis, NF4   two sizes that do not grow with the length: the excess kurtosis κ of a row, with ν = 4 + 6/κ of the Student t that
                    has it (SF4's law, 2405.03103); and NF4's relative squared error on rows that pass and on rows that do not

Unlike the paper, which gives one number: rows are grouped by kind and length, and every row is tested. scipy's p-values hold up to 5,000
values; of a longer row 4,096 evenly spaced ones are tested (the length of most of LLaMA-7B's rows). Rows below 8 values are left out.
A constant row is not normal.

What is said: `describe` prints the table by length and kind, and what it comes to; `tinylora quantize --normality` shows it. What is drawn:
`rejected_against_length` shows the share of rejected rows against their length, the model's kinds among the known laws.
"""

from dataclasses import asdict, dataclass, fields, replace
from itertools import takewhile

import numpy as np

from .. import codebooks
from ..costs.tables import printable
from ..dtypes import as_float32
from ..figures.style import COLOURS, canvas, label, narrow
from ..numerics import optimality
from ..quant import quantize

ALPHA = 0.05  # the paper's level
SHORTEST, LONGEST, SUBSAMPLE = 8, 5000, 4096  # values of a row: fewer are not tested, and of more than 5,000 only 4,096
#: QLoRA, appendix F; 4096 is LLaMA-7B's width (its down_proj rows have 11,008)
PAPER = {"rejected": 0.075, "length": 4096}
_BATCH = 1 << 20  # values held in float64 at a time


def q4_1(w):
    """ŵ = d·⌊(w − m)/d + ½⌋ + m in blocks of 32 along a row, m the block's minimum, d = (max − min)/15, both kept in float16.

    (…, n) -> (…, n) float32. GGUF's Q4_1: 5 bits a weight. A row's last block may be shorter; the format itself asks for multiples of 32.
    """
    w = np.asarray(w, np.float32)
    n = w.shape[-1]
    blocks = np.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, -n % 32)], mode="edge").reshape(*w.shape[:-1], -1, 32)
    m = blocks.min(axis=-1, keepdims=True)
    d = (blocks.max(axis=-1, keepdims=True) - m) / np.float32(15)
    steps = np.clip(np.trunc((blocks - m) / np.where(d > 0, d, np.float32(1)) + np.float32(0.5)), 0, 15)
    kept = steps * d.astype(np.float16).astype(np.float32) + m.astype(np.float16).astype(np.float32)
    return kept.reshape(*w.shape[:-1], -1)[..., :n]


def _with_outlier(rng, size):
    x = rng.standard_normal(size, dtype=np.float32)
    x[:, 0] = 6
    return x


NORMAL, STORED, ALL = "normal", "normal, kept in Q4_1", "all of this length"
#: {name: rows of a known law, drawn as (generator, (rows, n))}; the first two are the null
LAWS = {
    NORMAL: lambda rng, size: rng.standard_normal(size, dtype=np.float32),
    STORED: lambda rng, size: q4_1(rng.standard_normal(size, dtype=np.float32)),
    "Student t, 100": lambda rng, size: rng.standard_t(100, size),
    "Student t, 60": lambda rng, size: rng.standard_t(60, size),
    "Student t, 30": lambda rng, size: rng.standard_t(30, size),
    "one value of 6 sigma": _with_outlier,
}


# ------------------------------------------------------------------------------------------------------------------ one matrix
def rejected(w):
    """p(W) ≤ .05 of Shapiro and Wilk's test, row by row. w (rows, n), n ≥ 8 -> (rows,) bool

    Of rows longer than 5,000 values 4,096 evenly spaced ones are tested. A constant row is rejected. The scale of a row does not matter.
    """
    from scipy.stats import shapiro

    w = np.asarray(w)
    if w.ndim != 2 or w.shape[1] < SHORTEST:
        raise ValueError(f"expected rows of {SHORTEST} values or more, got shape {w.shape}")
    if w.shape[1] > LONGEST:
        w = w[:, np.linspace(0, w.shape[1] - 1, SUBSAMPLE).astype(int)]
    w = w.astype(np.float64)
    spread = np.ptp(w, axis=1)
    # the test takes tiny ranges for 0
    w = (w - w.min(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)[:, None]
    return np.array([not s > 0 or shapiro(row).pvalue <= ALPHA for row, s in zip(w, spread, strict=True)], bool)


def by_block(w, blocksize=64):
    """w/σ_b, σ_b the deviation (about 0) of each block of `blocksize` values along a row. w (rows, n) -> (rows, n) float64

    ValueError if the rows do not consist of whole blocks. A block of zeros stays.
    """
    w = np.asarray(w, np.float64)
    if w.shape[1] % blocksize:
        raise ValueError(f"rows of {w.shape[1]} values are not whole blocks of {blocksize}")
    blocks = w.reshape(len(w), -1, blocksize)
    top = np.abs(blocks).max(axis=2, keepdims=True)
    blocks = blocks / np.where(top > 0, top, 1)
    sigma = np.sqrt(np.square(blocks).mean(axis=2, keepdims=True))
    return (blocks / np.where(sigma > 0, sigma, 1)).reshape(w.shape)


def excess_kurtosis(w):
    """G₂ = (n−1)/((n−2)(n−3)) · [(n+1)(m₄/m₂² − 3) + 6], row by row. w (rows, n), n ≥ 4 -> (rows,) float64

    Unbiased for normal rows: its mean is 0 at any n (Joanes and Gill 1998). NaN for a constant row.
    """
    w = np.asarray(w, np.float64)
    n = w.shape[1]
    d = w - w.mean(axis=1, keepdims=True)
    top = np.abs(d).max(axis=1, keepdims=True)
    varies = (np.ptp(w, axis=1, keepdims=True) > 0) & (top > 0)
    d = np.square(d / np.where(varies, top, 1))
    m2 = np.where(varies[:, 0], d.mean(axis=1), np.nan)
    return (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * (np.square(d).mean(axis=1) / m2**2 - 3) + 6)


def student_nu(kappa):
    """ν = 4 + 6/κ: the degrees of freedom of the Student t with excess kurtosis κ > 0; ∞ (normal) for κ ≤ 0, NaN for NaN. -> float"""
    return float("inf") if kappa <= 0 else 4 + 6 / kappa


def nf4_error(w, blocksize=64):
    """Σ (w − ŵ)² / Σ w² of NF4, row by row, constants exact. w (rows, n) -> (rows,) float64; NaN for a row of zeros

    Blocks run on from row to row, as bitsandbytes lays them.
    """
    w = np.ascontiguousarray(w, np.float32)
    error = quantize(w, "nf4", blocksize).dequantize("float32") - w
    power = np.square(w, dtype=np.float64).sum(axis=1)
    power[power == 0] = np.nan
    return np.square(error, dtype=np.float64).sum(axis=1) / power


@dataclass
class Rows:
    """What was measured on each row of a matrix: four vectors of one length."""

    rejected: np.ndarray
    by_block: np.ndarray  # rejected once each block has its own scale; NaN where rows are not whole blocks
    kurtosis: np.ndarray
    nf4: np.ndarray

    @classmethod
    def of(cls, w, blocksize=64):
        """Measure w (rows, n), a batch of rows at a time."""
        step = blocksize * max(1, _BATCH // (w.shape[1] * blocksize))  # whole blocks in each batch
        parts = [w[i : i + step] for i in range(0, len(w), step)]
        whole = w.shape[1] % blocksize == 0 and blocksize >= SHORTEST
        return cls.join(
            [
                cls(
                    rejected(x),
                    rejected(by_block(x, blocksize)).astype(float) if whole else np.full(len(x), np.nan),
                    excess_kurtosis(x),
                    nf4_error(x, blocksize),
                )
                for x in parts
            ]
        )

    @classmethod
    def join(cls, parts):
        """The rows of several matrices as one."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


# ------------------------------------------------------------------------------------------------------------ groups of rows
@dataclass
class Group:
    """Rows of one kind and one length."""

    name: str
    length: int
    rows: int
    rejected: float  # share
    by_block: float  # the same, once each block has its own scale
    kurtosis: tuple  # 10 %, 50 % and 90 % quantile of the rows' excess kurtosis
    nu: float  # of the Student t with the median kurtosis
    nf4_passed: float  # mean relative squared error of NF4 over the rows that pass
    nf4_rejected: float

    @classmethod
    def of(cls, name, length, rows):
        """Summarize Rows."""
        known = rows.kurtosis[~np.isnan(rows.kurtosis)]
        kurtosis = tuple(map(float, np.quantile(known, (0.1, 0.5, 0.9)))) if len(known) else (float("nan"),) * 3
        errors = [_mean(rows.nf4[rows.rejected == r]) for r in (False, True)]
        shares = float(rows.rejected.mean()), _mean(rows.by_block)
        return cls(name, length, len(rows.rejected), *shares, kurtosis, student_nu(kurtosis[1]), *errors)

    @property
    def monte_carlo_error(self):
        """√(β(1 − β)/rows): of a share of independent rows, which drawn ones are."""
        return (self.rejected * (1 - self.rejected) / self.rows) ** 0.5


def _mean(x):
    x = x[~np.isnan(x)]
    return float(x.mean()) if len(x) else float("nan")


def drawn(length, draws=2000, blocksize=64):
    """{law: Group} of `draws` rows of `length` values from each of LAWS: the null, and the test's power.

    The seed is fixed for each law and length.
    """
    groups = {}
    for i, (name, law) in enumerate(LAWS.items()):
        rng, parts, left = np.random.default_rng([i, length]), [], draws
        while left:
            some = min(left, max(1, _BATCH // length))
            parts.append(Rows.of(np.asarray(law(rng, (some, length)), np.float32), blocksize))
            left -= some
        groups[name] = Group.of(name, length, Rows.join(parts))
    return groups


def kinds(names):
    """{name: kind} of weights: the shortest end of the name, without its numbers, that no other kind shares.

    "model.layers.3.self_attn.q_proj.weight" is of kind "q_proj".
    """
    paths = {name: tuple(p for p in name.removesuffix(".weight").split(".") if not p.isdigit()) for name in names}
    different = set(paths.values())

    def shared(path, k):
        return sum(other[-k:] == path[-k:] for other in different) > 1

    # of two kinds one may end the other's name: then no end of the shorter is its own, and it keeps all of it
    short = {p: sum(1 for _ in takewhile(lambda k, p=p: shared(p, k), range(1, len(p)))) + 1 for p in different}
    return {name: ".".join(path[-short[path] :]) for name, path in paths.items()}


def measure(weights, blocksize=64):
    """Test every row of every matrix. weights: pairs (name, array (out, in)) -> ([Group] by length, then as they came, and names left out)

    ValueError with the name for NaN or Inf, and if no row is long enough.
    """
    found, short = {}, []
    for name, w in weights:
        w = as_float32(w)[0]
        if not np.isfinite(w).all():
            raise ValueError(f"{name} holds NaN or Inf; leave it out (--skip {name})")
        if w.shape[1] < SHORTEST:
            short.append(name)
            continue
        found[name] = (w.shape[1], Rows.of(w, blocksize))
    if not found:
        raise ValueError(f"no weight has rows of {SHORTEST} values or more, the fewest that are tested")
    kind = kinds([*found, *short])
    order = dict.fromkeys((n, kind[name]) for name, (n, _) in found.items())
    groups = []
    for n in sorted({n for n, _ in order}):
        for key in (k for k in order if k[0] == n):
            rows = [r for name, (length, r) in found.items() if (length, kind[name]) == key]
            groups.append(Group.of(key[1], n, Rows.join(rows)))
        every = [r for length, r in found.values() if length == n]
        groups.append(Group.of(ALL, n, Rows.join(every)))
    return groups, short


def least_share(share, alpha=ALPHA):
    """s ≥ (rejected − α)/(1 − α): the least share of rows that are not normal; equal if the test finds all of them. At least 0."""
    return max(0.0, (share - alpha) / (1 - alpha))


# ---------------------------------------------------------------------------------------------------------------------- printing
def describe(groups, power, stored=False, short=(), blocksize=64):
    """The table: for each length the kinds of the model, all of them together, and the drawn rows; then what it comes to.

    groups, short as `measure` gives them; power: {length: `drawn`}, for 4,096 as well; stored: the weights come from 4 bits
    """
    groups = [replace(g, name=printable(g.name)) for g in groups]  # the names are a file's
    normal = optimality.expected_error(codebooks.nf4(), blocksize) if blocksize >= 2 else float("nan")
    width = max(len(x) for x in [*(g.name for g in groups), *LAWS]) + 2

    def percent(x, form=".1f"):
        return f"{100 * x:{form}} %" if x == x else "-"

    def freedom(nu):
        if not nu > 0:
            return "-"
        return f"{nu:.0f}" if nu < 1000 else "inf"

    def row(g, error=""):
        low, middle, high = g.kurtosis
        kurtosis = f"{middle:+.2f} ({low:+.2f} .. {high:+.2f})" if middle == middle else "-"
        nf4 = [percent(e / normal - 1, "+.1f") for e in (g.nf4_passed, g.nf4_rejected)]
        return (
            f"  {g.name:<{width}}{g.rows:>8,}{percent(g.rejected):>9} {error:<5}{percent(g.by_block):>9}"
            f"{kurtosis:>25}{freedom(g.nu):>6}{nf4[0]:>11}{nf4[1]:>10}"
        )

    text = [
        "Shapiro and Wilk's test at 5 % on every row (output neuron) of every linear weight",
        "",
        f"{'':<{width + 2}}{'rows':>8}{'rejected':>9}{'by block':>15}{'excess kurtosis, median':>25}{'t, nu':>6}"
        f"{f'NF4 above {normal:.5f}':>21}",
        f"{'':<{width + 2}}{'':>17}{f'of {blocksize}':>15}{'(10 % .. 90 % of rows)':>25}{'':>6}{'passed':>11}{'rejected':>10}",
    ]
    for n in sorted({g.length for g in groups}):
        text += ["", f"rows of {n:,} values" + (f", {SUBSAMPLE:,} of them tested" if n > LONGEST else "")]
        text += [row(g) for g in groups if g.length == n]
        text += ["  drawn:", *(row(g, f"±{100 * g.monte_carlo_error:.1f}") for g in power[n].values())]
    if short:
        text += ["", f"left out, rows below {SHORTEST} values: {', '.join(map(printable, short))}"]
    return "\n".join([*text, "", *_verdict(groups, power, stored)])


def _verdict(groups, power, stored):
    totals = [g for g in groups if g.name == ALL]
    rows = sum(g.rows for g in totals)
    share = sum(g.rows * g.rejected for g in totals) / rows
    null = sum(g.rows * (power[g.length][STORED].rejected if stored else ALPHA) for g in totals) / rows
    n, at = PAPER["length"], power[PAPER["length"]]
    seen = [f"{law} {100 * at[law].rejected:.1f} ± {100 * at[law].monte_carlo_error:.1f} %" for law in LAWS]
    return [
        f"all {rows:,} rows: {100 * share:.1f} % rejected. Of normal rows{' kept in Q4_1' if stored else ''} "
        f"{100 * null:.1f} % would be; at least {100 * least_share(share, null):.1f} % are not normal.",
        f"QLoRA, appendix F, LLaMA-7B: {100 * PAPER['rejected']:.1f} % rejected. If the test found every row that is not normal, "
        f"{100 * least_share(PAPER['rejected']):.1f} % were not: (0.075 - 0.05)/0.95.",
        f"At {n:,} values, the length of most rows there, it rejects",
        f"  {'; '.join(seen)}.",
    ]


def as_json(groups, power, short=(), **about):
    """Everything measured, for report.json; NaN and ∞ become null."""

    def plain(g):
        finite = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(g).items()}
        return finite | {"kurtosis": [v if np.isfinite(v) else None for v in g.kurtosis]}

    return {
        **about,
        "level": ALPHA,
        "groups": [plain(g) for g in groups],
        "drawn": [plain(g) for laws in power.values() for g in laws.values()],
        "left_out": list(short),
    }


# --------------------------------------------------------------------------------------------------------------------- as figure
_TICKS = (3, 5, 10, 20, 50, 100)


def rejected_against_length(models, power):
    """The share of rows rejected at 5 %: a labelled dot for each kind of layer, a curve for each known law.

    models {label: [Group]} as `normality.measure` gives them; power {length: `normality.drawn`}. The bands are two Monte Carlo errors wide
    on either side. The paper's 7.5 % stands at 4,096, the width of the model it was measured on. -> figure
    """
    figure, ax = canvas(11, 6.6)
    lengths = np.array(sorted(power))
    last = int(lengths[-1])
    ends = []
    for i, law in enumerate(LAWS):
        share = np.array([100 * power[n][law].rejected for n in lengths])
        error = np.array([200 * power[n][law].monte_carlo_error for n in lengths])
        null = i < 2
        style = {"color": "black" if null else "0.5", "lw": 1.2 if null else 1, "ls": ":" if law == STORED else "-"}
        ax.plot(lengths, share, **style)
        ax.fill_between(lengths, np.maximum(share - error, 0.1), share + error, color=style["color"], alpha=0.08, lw=0)
        ends.append((share[-1], f"{law}: {share[-1]:.1f} %", "black" if null else "0.35"))
    paper = 100 * PAPER["rejected"]
    where = "LLaMA-7B, paper" if narrow() else "LLaMA-7B, QLoRA appendix F"
    theirs = [(paper, f"{where}: {paper:.1f} %", COLOURS[2])]
    if last == PAPER["length"]:
        ends += theirs
    else:
        _labels(ax, PAPER["length"], -10, theirs)
    _labels(ax, last, 10, ends)
    ax.plot(PAPER["length"], paper, "D", color=COLOURS[2], ms=7)
    for i, (name, groups) in enumerate(models.items()):
        colour, side = COLOURS[i % 2], 1 - 2 * (i % 2)  # every other model is labelled to the left
        kinds = [g for g in groups if g.name != ALL]
        shares = np.maximum([100 * g.rejected for g in kinds], _TICKS[0])  # none rejected: on the lower edge
        ax.plot([g.length for g in kinds], shares, "o", color=colour, ms=5, label=label(name))
        for n in {g.length for g in kinds}:
            here = [
                (100 * g.rejected, f"{label(g.name)} {100 * g.rejected:.1f} %", colour) for g in kinds if g.length == n
            ]
            _labels(ax, n, -8 if n == last else 8 * side, here)
    ax.axhline(100 * ALPHA, color="black", lw=0.6, ls="--")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlim(lengths[0] * 0.94, last * (32 if narrow() else 1.06))
    ax.set_ylim(_TICKS[0], 115)
    ticks = [n for n in lengths if n & (n - 1) == 0][:: 2 if narrow() else 1]
    ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
    ax.set_yticks(_TICKS, [f"{t} %" for t in _TICKS])
    ax.minorticks_off()
    ax.set_xlabel("values in a row (in-features)", fontsize=9)
    ax.set_ylabel("rows rejected by Shapiro and Wilk's test at 5 %", fontsize=9)
    draws = next(iter(power[last].values())).rows
    ax.set_title(
        f"Lines: rows drawn from known laws, {draws:,} for each point (band: ± 2 Monte Carlo errors). Dots: all rows of each kind of layer",
        fontsize=9,
        loc="left",
    )
    ax.legend(loc="upper left", bbox_to_anchor=(0, 0.93), fontsize=9, frameon=False)
    return figure


def _labels(ax, x, offset, entries, gap=11.0):
    """Write (y, text, colour) beside x, left where offset < 0: moved apart where they would overlap, with a thin line to y."""
    entries = sorted(entries)
    points = 72 * 6.6 * 0.8 / np.log(115 / _TICKS[0])  # of a factor e, about
    wanted = np.array([np.log(max(y, _TICKS[0])) * points for y, _, _ in entries])
    at = wanted.copy()
    for _ in range(200):  # push neighbours apart by halves until all gaps are wide enough
        lack = np.maximum(0, gap - np.diff(at)) / 2
        at[:-1] -= lack
        at[1:] += lack
    for (y, text, colour), shift in zip(entries, at - wanted, strict=True):
        ax.annotate(
            text,
            (x, max(y, _TICKS[0])),
            xytext=(offset, shift),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            va="center",
            ha="left" if offset > 0 else "right",
            bbox={"boxstyle": "square,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.75},
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": colour, "shrinkA": 0, "shrinkB": 2},
        )
