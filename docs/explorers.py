"""Two pages to explore by hand: `python docs/explorers.py FOLDER` writes nf4.html and pager.html into FOLDER.

    nf4.html     NF4's recipe with its offset and the block size to drag: what the code costs, against the best code with −1, 0 and 1
    pager.html   a paged AdamW to scrub through, at every budget, in a circle and back and forth, with and without fetching ahead

Each page is one file that needs nothing else: style, script and data are inside. tinylora computes the data here. The pages are
made from the templates in `_explorer/`.

The data of nf4.html are the integrals ∫₀ˣ yⁿ g_k(y) dy of `numerics.optimality` at the nodes `blocksizes` × `x`, NF4's recipe at the
offsets 1 − exp(−t) of the nodes `t`, and the best codes and best offsets at `blocksizes`. The page puts polynomials through the nodes
(barycentric Lagrange interpolation). `Interpolated` does the same here, so that `measured` can say how far it is from the library.
"""

import json
import sys
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
from scipy.optimize import minimize_scalar

from tinylora import codebooks
from tinylora.costs.paging import predicted
from tinylora.models.files import write_text
from tinylora.numerics import optimality
from tinylora.optim import AdamW
from tinylora.paging import Pager
from tinylora.papers.nf4_construction import nf4_excess, predicted_blocksize, recipe
from tinylora.tensor import Tensor

TEMPLATES = Path(__file__).parent / "_explorer"
OFFSETS, BLOCKSIZES = (0.9, 0.999), (8, 4096)  # what the sliders reach
INTEGRALS = {"00": (0, 0), "10": (1, 0), "11": (1, 1), "20": (2, 0), "21": (2, 1), "22": (2, 2)}  # name: (k, n)
PAGES, STEPS, PAGE_BYTES = 12, 6, 1 << 18


# --------------------------------------------------------------------------------------------------------------- interpolation
def chebyshev(lo, hi, n):
    """n Chebyshev points from lo to hi, both included, ascending."""
    return (lo + hi) / 2 - (hi - lo) / 2 * np.cos(np.pi * np.arange(n) / (n - 1))


def basis(nodes, at):
    """The Lagrange polynomials of the nodes at one point. (n,) -> (n,)"""
    nodes = np.asarray(nodes)
    apart = np.subtract.outer(nodes, nodes) * 4 / np.ptp(nodes) + np.eye(len(nodes))
    distance = at - nodes
    if not distance.all():
        return (distance == 0).astype(float)
    terms = 1 / apart.prod(axis=1) / distance
    return terms / terms.sum()


class Interpolated:
    """What the page computes from its data, as its script does."""

    def __init__(self, data):
        self.data, self.log_blocksizes = data, np.log(data["blocksizes"])

    def at(self, name, blocksize):
        """What stands at `name`, between the block sizes."""
        values = self.data
        for key in name.split("."):
            values = values[key]
        return basis(self.log_blocksizes, np.log(blocksize)) @ np.array(values)

    def code(self, offset):
        """The 16 values; at NF4's own offset they are NF4's."""
        if offset == self.data["offset"]:
            return np.array(self.data["values"])
        return basis(self.data["t"], -np.log1p(-offset)) @ np.array(self.data["codes"])

    def best_offset(self, power, blocksize):
        """The offset at which the recipe costs least."""
        return float(-np.expm1(-self.at(f"offsets.{power}", blocksize)))

    def costs(self, q, blocksize):
        """(entropy in bits, mean absolute error, mean squared error) of a code with −1 and 1."""
        ends = np.concatenate([[-1], (q[1:] + q[:-1]) / 2, [1]])
        table = {name: self.at(f"integrals.{name}", blocksize) for name in INTEGRALS}

        def integral(name, places):
            sides = np.sign(places) if name[1] in "02" else np.ones(len(places))
            return sides * [basis(self.data["x"], abs(place)) @ table[name] for place in places]

        usage = np.diff(integral("00", ends))
        usage[[0, -1]] += 1 / (2 * blocksize)
        # ∫ |y − q| over a cell from a to b, n = 0 and 1 of the integrals at q twice, less those at a and at b
        twice = [2 * integral(name, q) - integral(name, ends[:-1]) - integral(name, ends[1:]) for name in ("10", "11")]
        absolute = (q * twice[0] - twice[1]).sum()
        mass, first, second = (np.diff(integral(name, ends)) for name in ("20", "21", "22"))
        return -(usage @ np.log2(usage)), absolute, (second - 2 * q * first + q * q * mass).sum()

    def excess(self, offset, blocksize, power):
        """What the recipe costs above the best code with −1, 0 and 1; for power 0, what its entropy lacks of 4 bits."""
        cost = self.costs(self.code(offset), blocksize)[power]
        if not power:
            return 4 - cost
        return cost / self.costs(self.at(f"best.{power}", blocksize), blocksize)[power] - 1


# ----------------------------------------------------------------------------------------------------------------------- nf4
def recipe_values(offset):
    """NF4's recipe in float64, which is smooth in the offset. (16,)"""
    quantiles = recipe(grid=np.linspace, offset=offset, precision=np.float64)[1]
    return quantiles / quantiles.max()


def excess(code, blocksize, power):
    """The library's value of `Interpolated.excess`, for any code."""
    if not power:
        return 4 - optimality.entropy(code, blocksize)
    return optimality.expected_error(code, blocksize, power) / least_error(blocksize, power) - 1


@cache
def least_error(blocksize, power):
    """The error of the best code with −1, 0 and 1."""
    return optimality.expected_error(optimality.optimal_code(blocksize, power), blocksize, power)


def best_offset(blocksize, power):
    """-> (t, offset = 1 − exp(−t)) at which the recipe has the least error of this power, or the largest entropy."""

    def cost(t):
        code = recipe_values(-np.expm1(-t))
        return optimality.expected_error(code, blocksize, power) if power else -optimality.entropy(code, blocksize)

    t = float(minimize_scalar(cost, bounds=(1, 14), method="bounded", options={"xatol": 1e-9}).x)
    return t, -np.expm1(-t)


def expected_offset(blocksize, power):
    """t of the offset Φ(E[M]/√(1 + p)) of `codebooks.closed_form`."""
    return -np.log(NormalDist().cdf(-optimality.expected_max(blocksize) / (1 + power) ** 0.5))


@cache
def nf4_data():
    """What nf4.html computes with. -> dict"""
    sizes = [int(I) for I in np.unique(np.exp(chebyshev(*np.log(BLOCKSIZES), 24)).round())]
    x, t = chebyshev(0, 1, 33), chebyshev(*-np.log1p(-np.array(OFFSETS)), 24)
    laws = [optimality.block_law(I) for I in sizes]
    data = {
        "offset": codebooks.NF4_OFFSET,
        "values": codebooks.nf4().tolist(),
        "offset_range": OFFSETS,
        "blocksize_range": BLOCKSIZES,
        "blocksizes": sizes,
        "x": _short(x),
        "t": _short(t),
        "integrals": {name: _short([law.moments(x, k)[n] for law in laws]) for name, (k, n) in INTEGRALS.items()},
        "density": _short([law.density(x, 0) for law in laws], 8),
        "codes": _short([recipe_values(-np.expm1(-at)) for at in t]),
        "best": {p: _short([optimality.optimal_code(I, p) for I in sizes]) for p in (1, 2)},
        "offsets": {p: _short([best_offset(I, p)[0] for I in sizes], 8) for p in (0, 1, 2)},
        "theory": {p: _short([expected_offset(I, p) for I in sizes], 8) for p in (0, 1, 2)},
    }
    data = json.loads(json.dumps(data))
    return data | {"measured": measured(data)}


def measured(data, points=60, seed=0):
    """The largest differences between the page and the library at random offsets and block sizes -> dict

    excess, bits, offset   what is shown, against the library's quadrature of the recipe in float64
    float32                of an excess, against the recipe in float32
    """
    page, rng = Interpolated(data), np.random.default_rng(seed)
    worst = dict.fromkeys(("excess", "bits", "offset", "float32"), 0.0)
    for offset, place in zip(rng.uniform(*OFFSETS, points), rng.uniform(*np.log(BLOCKSIZES), points), strict=True):
        I = round(np.exp(place))
        for power in (0, 1, 2):
            name = "excess" if power else "bits"
            shown, codes = page.excess(offset, I, power), (recipe_values(offset), codebooks.normal_float(4, offset))
            apart, rounded = (abs(shown - excess(code, I, power)) for code in codes)
            worst[name], worst["float32"] = max(worst[name], apart), max(worst["float32"], rounded)
            best = best_offset(I, power)[1]
            worst["offset"] = max(worst["offset"], abs(page.best_offset(power, I) - best))
    return worst | {"points": points}


def _short(values, digits=14):
    """Nested lists of numbers of so many digits."""
    if np.ndim(values):
        return [_short(value, digits) for value in values]
    return float(f"{values:.{digits}g}")


def nf4_words(data):
    """The numbers in the text of nf4.html."""
    at_most = {name: _round_up(data["measured"][name]) for name in ("excess", "bits", "offset", "float32")}
    most_even = max(range(2, 65), key=lambda I: optimality.entropy(codebooks.nf4(), I))
    return {
        "offset": data["offset"],
        "nf4_absolute": f"{100 * nf4_excess(64, 1):.3f}",
        "nf4_squared": f"{100 * nf4_excess(64, 2):.2f}",
        "nf4_entropy": f"{optimality.entropy(codebooks.nf4(), 64):.4f}",
        "smallest": data["blocksize_range"][0],
        "most_even": most_even,
        "most_entropy": f"{optimality.entropy(codebooks.nf4(), most_even):.4f}",
        "s0": f"{NormalDist().inv_cdf(codebooks.NF4_OFFSET):.4f}",
        "predicted_1": predicted_blocksize(1),
        "predicted_2": predicted_blocksize(2),
        "points": data["measured"]["points"],
        "nodes_blocksize": len(data["blocksizes"]),
        "nodes_x": len(data["x"]),
        "nodes_offset": len(data["t"]),
        **{f"at_most_{name}": value for name, value in at_most.items()},
    }


def _round_up(value):
    """As a power of ten to say "at most": 3.2e-9 -> 10⁻⁸."""
    exponent = int(np.ceil(np.log10(value)))
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# --------------------------------------------------------------------------------------------------------------------- pager
def paged_run(budget, around, ahead):
    """AdamW for STEPS steps with `budget` of PAGES pages resident. -> (trace, Counters after each step, bytes of the parameters)"""
    n = PAGES * PAGE_BYTES // 8
    rng = np.random.default_rng(0)
    weight = Tensor(rng.standard_normal(n, dtype=np.float32), requires_grad=True)
    pager = Pager(budget * PAGE_BYTES, PAGE_BYTES, trace=True, prefetch=ahead)
    optimizer, counters = AdamW([weight], pager=pager), []
    optimizer.back_and_forth = not around
    for _ in range(STEPS):
        weight.grad = rng.standard_normal(n, dtype=np.float32)
        optimizer.step()
        counters.append(pager.counters.__dict__.copy())
    return pager.trace, counters, weight.numpy().tobytes()


@cache
def pager_data():
    """What pager.html replays: runs[order][ahead][budget − 1] is a string a step, such as "f0 h1 p2 e3" (fault, hit, prefetch, evict)."""
    runs, ends = {}, set()
    for order in ("around", "back and forth"):
        runs[order] = {}
        for ahead in (False, True):
            runs[order]["ahead" if ahead else "waiting"] = listed = []
            for budget in range(1, PAGES + 1):
                trace, _, parameters = paged_run(budget, order == "around", ahead)
                steps = [" ".join(f"{e[0]}{page}" for step, page, e, _ in trace if step == s + 1) for s in range(STEPS)]
                listed.append(steps)
                ends.add(parameters)
    if len(ends) != 1:
        raise ArithmeticError(f"pager: expected the same parameters in every run, got {len(ends)} different ones")
    state = PAGES * PAGE_BYTES
    return {
        "pages": PAGES,
        "page_bytes": PAGE_BYTES,
        "steps": STEPS,
        "runs": runs,
        "predicted": {order: [predicted((b + 1) / PAGES, order, state) for b in range(PAGES)] for order in runs},
    }


def pager_words(data):
    """The numbers in the text of pager.html."""
    pages, each = data["pages"], data["page_bytes"]
    return {
        "pages": pages,
        "page_bytes": f"{each:,}",
        "state_bytes": f"{pages * each:,}",
        "elements": f"{pages * each // 8:,}",
        "steps": data["steps"],
        "runs": sum(len(listed) for kinds in data["runs"].values() for listed in kinds.values()),
    }


# ---------------------------------------------------------------------------------------------------------------------- pages
def page(name, data, words):
    """A template with style, script, data and words put in. -> str"""
    text = (TEMPLATES / f"{name}.html").read_text(encoding="utf-8")
    parts = {part: (TEMPLATES / part).read_text(encoding="utf-8").strip() for part in ("common.css", "common.js")}
    for key, value in {**parts, "data": json.dumps(data, separators=(",", ":")), **words}.items():
        if f"{{{{{key}}}}}" not in text:
            raise ValueError(f"{name}.html: expected the mark {{{{{key}}}}} in the template, and it is not there")
        text = text.replace(f"{{{{{key}}}}}", str(value))
    if "{{" in text:
        start = text.index("{{")
        raise ValueError(f"{name}.html: nothing was given for the mark {text[start : start + 30]!r}")
    return text


def pages():
    """{file name: text} of both pages."""
    return {
        "nf4.html": page("nf4", nf4_data(), nf4_words(nf4_data())),
        "pager.html": page("pager", pager_data(), pager_words(pager_data())),
    }


def main(arguments):
    if len(arguments) != 1:
        raise SystemExit("explorers.py: expected one argument, the folder to write nf4.html and pager.html into")
    if Path(arguments[0]).is_file():
        raise SystemExit(f"explorers.py: {arguments[0]} is a file; expected a folder")
    for name, text in pages().items():
        write_text(Path(arguments[0]) / name, text)
        print(f"{Path(arguments[0]) / name}: {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
