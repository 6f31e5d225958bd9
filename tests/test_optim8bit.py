"""AdamW in 8 bits against bitsandbytes' own numbers (goldens/optim8bit.npz), its kernel spelled out, and for every page budget."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from goldens.make_optim8bit_goldens import gradient, plan, start

from tinylora import AdamW, Pager, Tensor, backend, codebooks
from tinylora.kernels import eightbit
from tinylora.kernels.reciprocal import rcp
from tinylora.kernels.rounding import cpu_quantize_8bit, cuda_quantize_8bit
from tinylora.training import adamw8bit
from tinylora.training.adamw8bit import AdamW8bit, adamw8bit_step, fma

f32 = np.float32
FOLDER = Path(__file__).parent / "goldens"
#: {rule: (what bitsandbytes computed, the share of a step by which parameters may part: a square root's ulp; or the powers βᵗ, too)}
GOLDENS = {
    "bitsandbytes-cpu": (dict(np.load(FOLDER / "optim8bit.npz")), 2.0**-21),
    "bitsandbytes-cuda": (dict(np.load(FOLDER / "optim8bit_cuda.npz")), 2.0**-15),
}
PLAN = list(plan())
RULES = tuple(GOLDENS)


def cases(goldens):
    return json.loads(goldens["index"].tobytes())["cases"]


def fresh(xp, n):
    """codes_m, codes_v, absmax_m, absmax_v before the first step."""
    blocks = -(-n // 256)
    return [xp.zeros(n, np.uint8), xp.zeros(n, np.uint8), xp.zeros(blocks, f32), xp.zeros(blocks, f32)]


def on_host(arrays):
    return [np.array(backend.move(x, "cpu")) for x in arrays]


def same(a, b):
    """Equal bits; any NaN equals any other."""
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def flushes(xp):
    """Whether array operations make denormals zero: CuPy's do (float32, in every one), NumPy's do not."""
    return xp.__name__ == "cupy"


def gradients(rng, n, zeros=0.3):
    """Of many sizes, some of them 0."""
    g = rng.standard_normal(n) * 10.0 ** rng.uniform(-8, 2, n)
    return np.where(rng.random(n) < zeros, 0, g).astype(f32)


# ------------------------------------------------------------------------------------------------------------------ bitsandbytes
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", range(len(PLAN)), ids=[f"{case['kind']}-{case['n']}" for case in PLAN])
def test_each_step_is_bitsandbytes_step(place, rule):
    """Codes and absmax in every bit; p within a share of its change and an ulp, from where bitsandbytes stood a step before."""
    goldens, share = GOLDENS[rule]
    case = cases(goldens)[place]
    n, steps = case["n"], case["steps"]
    theirs = {part: goldens[part][slice(*at)].reshape(steps, -1) for part, at in case["at"].items()}
    p = Tensor(start(case), requires_grad=True)
    options = {name: case[name] for name in ("lr", "betas", "eps", "weight_decay", "min_8bit_size")}
    optimizer = AdamW8bit([("p", p)], rule=rule, **options)
    for t in range(steps):
        before, p.grad = p.data.copy(), gradient(case, t + 1)
        optimizer.step()
        state = optimizer.state_dict()
        if n < case["min_8bit_size"]:
            for part in ("m", "v"):  # 1 − β₂ of float32 is 0.001 less 1.3e-5 of it on the GPU
                assert_close_moments(state[f"p.{part}"], theirs[part][t], 1e-6 if rule.endswith("cpu") else 2e-5)
        else:
            for ours, part in {"m": "codes_m", "v": "codes_v", "absmax_m": "absmax_m", "absmax_v": "absmax_v"}.items():
                assert same(state[f"p.{ours}"], theirs[part][t]), (part, t)
        share_of_step = share * (1 + (n < case["min_8bit_size"] and rule.endswith("cuda")))
        assert_close_parameters(p.data, theirs["p"][t], before, share_of_step, case["lr"] * case["weight_decay"])
        p.data[...] = theirs["p"][t]


def assert_close_moments(ours, theirs, share):
    assert np.abs(ours - theirs).max() <= share * np.abs(theirs).max()


def assert_close_parameters(ours, theirs, before, share, decay):
    """decay: ηλ, by which p shrinks beside the step: another operation that rounds."""
    assert (np.isnan(ours) == np.isnan(theirs)).all()
    ours, theirs, before = (x[~np.isnan(theirs)].astype(np.float64) for x in (ours, theirs, before))
    ulp = np.spacing(np.maximum(np.abs(before), np.abs(theirs)).astype(f32))
    step = np.abs(theirs - before) + decay * np.abs(before)
    assert (np.abs(ours - theirs) <= step * share + ulp * (2 if decay and share > 2.0**-20 else 1)).all()


def test_the_goldens_hold_what_the_rule_is_for_and_are_small():
    kinds = {case["kind"] for case in PLAN}
    assert {"ordinary", "some_zero", "zero_blocks", "tiny", "tiniest", "huge", "overflowing", "no_numbers"} <= kinds
    assert {4095, 4096, 4097} <= {case["n"] for case in PLAN} and any(case["weight_decay"] == 0 for case in PLAN)
    for goldens, _ in GOLDENS.values():
        found = [{name: value for name, value in case.items() if name != "at"} for case in cases(goldens)]
        assert found == json.loads(json.dumps(PLAN))
    assert all(file.stat().st_size < 300_000 for file in FOLDER.glob("optim8bit*.npz"))


def nearest_float32(q):
    """The float32 nearest to a fraction, a tie to the even one; by comparing fractions."""
    r = f32(float(q))
    near = [np.nextafter(r, f32(-np.inf)), r, np.nextafter(r, f32(np.inf))]
    return min(near, key=lambda x: (abs(Fraction(float(x)) - q), int(x.view(np.int32)) & 1))


def test_fused_multiply_adds_round_once(xp, rng):
    """Against fractions: any numbers, sums next to half way between two float32, and denormal results."""
    n, u = 600, 2.0**-23
    a = rng.standard_normal(n) * 2.0 ** rng.integers(-20, 20, n)
    b = rng.standard_normal(n) * 2.0 ** rng.integers(-20, 20, n)
    c = rng.standard_normal(n) * 2.0 ** rng.integers(-40, 40, n)
    i = np.arange(200, 400)  # c + half an ulp of c, less or more a trifle
    j = rng.integers(1, 50, 200) * u
    a[i], b[i] = (1 + j) * rng.choice([-1, 1], 200), np.where(rng.random(200) < 0.5, 1 - j, 1 + 0 * j)
    exponent = rng.integers(-100, 100, 200)
    b[i] *= 2.0 ** (exponent - 24)
    c[i] = (1 + rng.integers(0, 1000, 200) * u) * 2.0**exponent * rng.choice([-1, 1], 200)
    i = np.arange(400, 600)  # the same among denormals
    a[i] = (1 + j) * rng.choice([-1, 1], 200)
    b[i] = (1 - j) * 2.0 ** -(rng.integers(74, 77, 200).astype(float))
    a[i] *= 2.0**-75
    c[i] = rng.integers(0, 1 << 22, 200) * 2.0**-149
    a, b, c = (x.astype(f32) for x in (a, b, c))
    (ours,) = on_host([fma(xp.asarray(a), xp.asarray(b), xp.asarray(c))])
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    expected = [nearest_float32(q) for q in exact]
    normal = [abs(q) >= 2.0**-126 and not 0 < abs(z) < 2.0**-126 for q, z in zip(exact, c, strict=True)]
    told = normal if flushes(xp) else [True] * len(c)
    assert ours.dtype == f32 and ours[told].tolist() == np.array(expected)[told].tolist()
    twice = (a.astype(np.float64) * b + c).astype(f32)
    assert (ours[200:400] != twice[200:400]).any() and (flushes(xp) or (ours[400:] != twice[400:]).any())
    if xp is not np:
        return
    for some in (
        slice(None),
        slice(200),
        slice(200, 400),
        slice(400, None),
    ):  # the fast one: all kinds together, and each alone
        x, y, z = a[some].copy(), b[some].copy(), c[some].copy()
        for out in (np.empty_like(x), z):
            eightbit._fma(x, y, z, out)
            assert out.tobytes() == ours[some].tobytes()
    a, c, half = (2.0**exponent).astype(f32), c[200:400], f32(2.0**-24)  # half an ulp of c: ties
    eightbit._fma(a, half, c, a)
    assert a.tolist() == [
        nearest_float32(Fraction(2) ** int(e) * Fraction(1, 1 << 24) + Fraction(float(z)))
        for e, z in zip(exponent, c, strict=True)
    ]


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_to_8_bits_is_that_of_the_rules(xp, signed, rng):
    x = (rng.standard_normal((40, 256)) * 10.0 ** rng.uniform(-8, 2, (40, 256))).astype(f32)
    bounds = codebooks.midpoints(codebooks.dynamic8(signed))
    x[0], x[1, 7], x[2, 9], x[3] = 0, np.nan, np.inf, 1e-41
    x[4, :255], x[4, 255] = bounds, 1  # ties
    x[5, :255], x[5, 255] = np.nextafter(bounds, f32(2)), -1
    x = x if signed else np.abs(x)
    x[3] = 0 if flushes(xp) else x[3]
    with np.errstate(all="ignore"):
        ours = on_host(adamw8bit._cpu_round(xp.asarray(x), signed))
        codes, absmax = cpu_quantize_8bit(x.reshape(-1), codebooks.dynamic8(signed))
        assert same(ours[0].reshape(-1), codes) and same(ours[1], absmax)
        x[1, 7], x[3] = 1, 0  # the kernel's m and v are no NaN, and were flushed
        ours = on_host(adamw8bit._cuda_round(xp.asarray(x), signed))
        codes, absmax = cuda_quantize_8bit(x.reshape(-1), codebooks.dynamic8(signed))
        assert same(ours[0].reshape(-1), codes) and same(ours[1], absmax)


# ------------------------------------------------------------------------------------------------------------------------ CUDA
def flush(x):
    return x * f32(0) if abs(x) < f32(2.0**-126) else x


def halving(code, x):
    """Seven halvings of the 256 codes from 127, then the midpoint to the neighbour on x's side."""
    at, upper, lower = 127, 255, 0
    for i in (64, 32, 16, 8, 4, 2, 1):
        if x > code[at]:
            lower, at = at, at + i
        else:
            upper, at = at, at - i
    if x > code[at]:
        return upper if x > (code[upper] + code[at]) * f32(0.5) else at
    bottom = code[lower] if lower != at else code[at]
    return lower if x < (bottom + code[at]) * f32(0.5) else at


def scalar_fma(a, b, c):
    """float32(a b + c), rounded once: exactly, but for the sign of a zero, which is a sum's."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    return nearest_float32(exact) if exact else a * b + c


def cuda_kernel(p, g, codes_m, codes_v, absmax_m, absmax_v, t, lr, b1, b2, eps, decay):
    """kOptimizerStatic8bit2StateBlockwise in float32 scalars, a thread after the other; roots, powers, quotients rounded correctly."""
    map_m, map_v = codebooks.dynamic8(True), codebooks.dynamic8(False)
    c1, c2 = f32(1) - f32(float(b1) ** t), np.sqrt(f32(1) - f32(float(b2) ** t))
    for block in range(len(absmax_m)):
        here = range(block * 256, min(block * 256 + 256, len(p)))
        m, v = {}, {}
        for i in here:
            m[i] = v[i] = f32(0)
            if np.isfinite(g[i]):
                gi = flush(g[i])
                old = flush(flush(map_v[codes_v[i]] * absmax_v[block]) * b2)
                v[i] = flush(scalar_fma(flush((f32(1) - b2) * gi), gi, old))
                old = flush(flush(map_m[codes_m[i]] * absmax_m[block]) * b1)
                m[i] = flush(scalar_fma(f32(1) - b1, gi, old))
        absmax_m[block], absmax_v[block] = max(map(abs, m.values())), max(map(abs, v.values()))
        for i in here:
            if np.isfinite(g[i]):
                p[i] = flush(p[i] - flush(lr * c2 / c1 * flush(m[i] / (np.sqrt(v[i]) + c2 * eps))))
                if decay > 0:
                    p[i] = flush(p[i] * (f32(1) - lr * decay))
        for i in here:
            code = halving(map_m, flush(m[i] * rcp(absmax_m[block])))
            codes_v[i] = halving(map_v, flush(v[i] * rcp(absmax_v[block])))
            if np.signbit(map_m[code]) != np.signbit(m[i]):
                code += 1 if m[i] > 0 else -1
            codes_m[i] = code % 256


@pytest.mark.parametrize("n", [1, 256, 700, 3 * 4096 + 40])
def test_the_step_in_buffers_gives_the_bits_of_the_plain_one(n, rng, monkeypatch):
    """`kernels.eightbit` stands for `_cpu_update` on the host: eight steps, gradients of all sizes, some of them no numbers."""
    monkeypatch.setattr(eightbit, "CHUNK", 4096)
    p = rng.standard_normal(n).astype(f32)
    slow, slow_state, state = p.copy(), fresh(np, n), fresh(np, n)
    for t in range(1, 9):
        g = gradients(rng, n)
        g[:256] *= t != 3  # a block of zeros, after others
        for scale in (1e-38, 1e-22, 1e18)[: t - 1]:  # denormals, squares that vanish, squares that overflow
            g[rng.integers(n, size=n // 500)] *= f32(scale)
        if t > 5:
            g[rng.integers(n, size=3)] = rng.choice([np.nan, np.inf, -np.inf], 3)
        settings = t, 1e-3, (0.9, 0.999), 1e-8, 0.01
        adamw8bit_step(p, g, *state, *settings)
        for at in range(0, n, 256):
            here, block = slice(at, at + 256), slice(at // 256, at // 256 + 1)
            with np.errstate(all="ignore"):
                parts = [x[here].reshape(1, -1) for x in (slow, g, *slow_state[:2])]
                adamw8bit._cpu_update(*parts, *(x[block] for x in slow_state[2:]), *settings)
        for ours, theirs in zip([p, *state], [slow, *slow_state], strict=True):
            assert same(ours, theirs), t


@pytest.mark.parametrize(
    "n, lr, decay", [(1, 1e-3, 0.01), (256, 1e-3, 0.0), (700, 1e-2, 0.01), (513, 0.7, 0.9), (9, 0.3, 0.7)]
)
def test_the_gpu_rule_is_its_kernel_spelled_out(xp, n, lr, decay, rng):
    lr *= rng.uniform(0.5, 1)
    p = rng.standard_normal(n).astype(f32)
    plain, plain_state = p.copy(), fresh(np, n)
    p, state = xp.asarray(p), fresh(xp, n)
    for t in range(1, 5):
        g = gradients(rng, n)
        g[rng.integers(n, size=n // 10)] *= f32(1e-38)
        g[:256] *= t != 3  # a block of zeros, after others
        if n > 2:
            g[rng.integers(n, size=3)] = rng.choice([np.nan, np.inf, -np.inf, -0.0, 1e-30], 3)
        adamw8bit_step(p, xp.asarray(g), *state, t, lr, weight_decay=decay, rule="bitsandbytes-cuda")
        with np.errstate(all="ignore"):
            cuda_kernel(plain, g, *plain_state, t, *map(f32, (lr, 0.9, 0.999, 1e-8, decay)))
        for ours, theirs in zip(on_host([p, *state]), [plain, *plain_state], strict=True):
            assert same(ours, theirs), t


def test_the_gpu_rule_keeps_the_sign_of_m_and_lets_no_negative_one_vanish(xp):
    n = 256
    for sign, code in ((1, 127), (-1, 126)):
        g = np.full(n, sign * 1e-9, f32)
        g[0] = 1
        p, state = xp.zeros(n, f32), fresh(xp, n)
        adamw8bit_step(p, xp.asarray(g), *state, 1, 1e-3, rule="bitsandbytes-cuda")
        assert (on_host(state)[0][1:] == code).all()
    assert codebooks.dynamic8()[126] < 0 == codebooks.dynamic8()[127]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_spreads_on_a_cpu_and_is_skipped_on_a_gpu(bad, rng):
    n = 512
    p, g = rng.standard_normal(n).astype(f32), gradients(rng, n, zeros=0)
    g[5] = bad
    cpu, gpu, state = p.copy(), p.copy(), fresh(np, n)
    adamw8bit_step(cpu, g, *fresh(np, n), 1, 1e-3)
    adamw8bit_step(gpu, g, *state, 1, 1e-3, rule="bitsandbytes-cuda")
    assert np.isnan(cpu[5]) and np.isfinite(gpu).all() and gpu[5] == p[5] and (np.delete(gpu != p, 5)).all()
    assert codebooks.dynamic8()[state[0][5]] == 0 == codebooks.dynamic8(False)[state[1][5]]


# ----------------------------------------------------------------------------------------------------------------- what it does
def test_the_numbers_of_the_docstring():
    signed, unsigned, zero = codebooks.dynamic8(True), codebooks.dynamic8(False), np.zeros(256, f32)
    zero[0] = 1  # absmax
    assert cpu_quantize_8bit(zero, signed)[0][1] == 131 and f"{signed[131]:.1e}" == "2.1e-05"
    assert cpu_quantize_8bit(zero, unsigned)[0][1] == 7 and f"{unsigned[7]:.1e}" == "1.6e-05"
    assert f"{1 - float(f32(1) - f32(0.999)) / 0.001:.1e}" == "1.3e-05"
    assert f"{0.9 * signed[131] / np.sqrt(0.999 * unsigned[7]):.1e}" == "4.8e-03"
    assert f"{np.sqrt(float(np.finfo(f32).max) / 0.001):.1e}" == "5.8e+20"
    p = Tensor(np.zeros((64, 256), f32), requires_grad=True)
    assert AdamW8bit([p]).state_bytes == p.size * (2 + 8 / 256)


def drift(rule, g, steps, lr=1e-3):
    p, state = np.zeros(len(g), f32), fresh(np, len(g))
    for t in range(1, steps + 1):
        adamw8bit_step(p, g, *state, t, lr, weight_decay=0, rule=rule)
    return p


def test_on_a_cpu_a_parameter_without_gradient_falls():
    """−4.8e-4 after 100 steps at η = 1e-3, beside constant, positive gradients far above ε; not in a block of zeros, and not on a GPU."""
    g = np.zeros(512, f32)
    for size in (1e-2, 1.0, 30.0):
        g[:256:2] = size
        p = drift("bitsandbytes-cpu", g, 100)
        assert np.unique(p[1:256:2]).size == 1 and f"{p[1]:.1e}" == "-4.8e-04"
        assert (p[256:] == 0).all()
        assert abs((drift("bitsandbytes-cpu", g, 101) - p)[1] / -4.8e-6 - 1) < 0.02
        gpu = drift("bitsandbytes-cuda", g, 100)
        assert (gpu[1::2] == 0).all() and (gpu[256:] == 0).all() and (gpu[:256:2] != 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_constant_negative_gradient_takes_smaller_steps_than_a_positive_one(rule):
    """map₁ has no −1: m = −absmax is read back as −0.993 absmax, and settles at 0.1/(1 − 0.9 · 0.993) = 0.94 of g."""
    g = np.repeat(np.array([1, -1], f32), 256)
    at_300, at_301 = drift(rule, g, 300), drift(rule, g, 301)
    up, down = (at_301 - at_300)[[300, 10]]
    lowest = codebooks.dynamic8()[0]
    assert f"{lowest:.3f}" == "-0.993" and f"{0.1 / (1 + 0.9 * lowest):.2f}" == "0.94"
    assert abs(up / -down - 0.1 / (1 + 0.9 * lowest)) < 0.003


@pytest.mark.parametrize("rule", RULES)
def test_a_square_that_overflows_makes_nan_of_its_parameter_one_step_later(rule):
    for size, overflows in ((5.7e20, False), (5.9e20, True)):
        g = np.zeros(256, f32)
        g[3] = size
        p, state = np.ones(256, f32), fresh(np, 256)
        adamw8bit_step(p, g, *state, 1, 1e-3, rule=rule)
        assert np.isfinite(p).all() and np.isinf(state[3][0]) == overflows
        adamw8bit_step(p, g * 0, *state, 2, 1e-3, rule=rule)
        assert np.isnan(p[3]) == overflows


def test_training_in_8_bits_follows_training_in_32(rng):
    """A least-squares problem with noise: both end at the same loss, within 5 %."""
    x = rng.standard_normal((256, 64)).astype(f32)
    w = rng.standard_normal((64, 64)).astype(f32)
    y = x @ w + rng.standard_normal((256, 64)).astype(f32)
    losses = {}
    for kind in (AdamW, AdamW8bit):
        p = Tensor(np.zeros((64, 64), f32), requires_grad=True)
        optimizer = kind([p], lr=0.03, weight_decay=0.0)
        for _ in range(200):
            rest = x @ p.data - y
            p.grad = x.T @ rest / f32(256)
            optimizer.step()
        losses[kind] = float((rest**2).mean())
    assert losses[AdamW] < 1.2 and abs(losses[AdamW8bit] / losses[AdamW] - 1) < 0.05


# --------------------------------------------------------------------------------------------------------------- pages and state
@pytest.mark.parametrize("rule", RULES)
def test_pieces_of_whole_blocks_give_the_bits_of_the_whole(xp, rule, rng, monkeypatch):
    n = 5 * 256 + 77
    p = rng.standard_normal(n).astype(f32)
    whole, pieces, w_state, p_state = xp.asarray(p), xp.asarray(p), fresh(xp, n), fresh(xp, n)
    monkeypatch.setattr(eightbit, "CHUNK", 512)
    for t in range(1, 4):
        g = xp.asarray(gradients(rng, n))
        adamw8bit_step(whole, g, *w_state, t, 1e-2, rule=rule)
        for a, b in ((0, 2), (2, 5), (5, 6)):
            here, blocks = slice(a * 256, b * 256), slice(a, b)
            codes, absmax = [x[here] for x in p_state[:2]], [x[blocks] for x in p_state[2:]]
            adamw8bit_step(pieces[here], g[here], *codes, *absmax, t, 1e-2, rule=rule)
    for a, b in zip(on_host([whole, *w_state]), on_host([pieces, *p_state]), strict=True):
        assert same(a, b)


SHAPES = ((70, 61), (4096,), (4095,), (3, 7), (5000,))  # three in 8 bits, two in 32


def train(xp, pager, rule="bitsandbytes-cpu", steps=3, seed=0):
    rng = np.random.default_rng(seed)
    params = [Tensor(xp.asarray(rng.standard_normal(s).astype(f32)), requires_grad=True) for s in SHAPES]
    optimizer = AdamW8bit(params, lr=1e-2, pager=pager, rule=rule)
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = None if i == t % len(params) else xp.asarray(gradients(rng, p.size).reshape(p.shape))
        optimizer.step(lr_scale=0.5 + t)
    return on_host([p.data for p in params]), optimizer


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("page_bytes, budget", [(512, 512), (512, 2048), (1640, 5000), (1 << 18, 10**9)])
def test_any_budget_gives_the_same_bits(xp, rule, page_bytes, budget, rng):
    seed = int(rng.integers(2**31))
    plain, free = train(xp, Pager(device=xp), rule, seed=seed)
    paged, tight = train(xp, Pager(budget, page_bytes, device=xp), rule, seed=seed)
    assert all(same(a, b) for a, b in zip(plain, paged, strict=True))
    a, b = free.state_dict(), tight.state_dict()
    assert a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    assert 0 < tight.pager.peak_resident_bytes <= budget


def test_codes_are_paged_and_absmax_is_not():
    _, optimizer = train(np, Pager(1024, 1024))
    in_8 = [n for n in map(np.prod, SHAPES) if n >= 4096]
    in_32 = [n for n in map(np.prod, SHAPES) if n < 4096]
    assert optimizer.pager.total_bytes == 2 * sum(in_8) + 8 * sum(in_32)
    assert optimizer.state_bytes == optimizer.pager.total_bytes + 8 * sum(-(-n // 256) for n in in_8)


def test_a_small_parameter_takes_adamws_step(rng):
    for n, in_8_bits in ((4095, False), (4096, True)):
        p, q = (Tensor(np.ones(n, f32), requires_grad=True) for _ in range(2))
        ours, plain = AdamW8bit([("p", p)], weight_decay=0.1), AdamW([("p", q)], weight_decay=0.1)
        for _ in range(3):
            p.grad = q.grad = gradients(rng, n)
            ours.step()
            plain.step()
        state = ours.state_dict()
        assert (state["p.m"].dtype == np.uint8) == in_8_bits == ("p.absmax_m" in state)
        assert (p.data.tobytes() == q.data.tobytes()) != in_8_bits
    assert AdamW8bit([p]).groups[0]["weight_decay"] == 0.01


def test_the_state_comes_back(xp):
    _, a = train(xp, Pager(1024, 512, device=xp), steps=3)
    _, b = train(xp, Pager(512, 512, device=xp), steps=1, seed=1)
    saved = a.state_dict()
    assert saved["param0.m"].shape == (70, 61) and saved["param0.absmax_v"].shape == (17,)
    b.load_state_dict(saved)
    again = b.state_dict()
    assert b.step_count == 3 and saved.keys() == again.keys()
    assert all(same(np.asarray(saved[name]), np.asarray(again[name])) for name in saved)
    for x, y in zip(a._slots, b._slots, strict=True):  # and what comes next is the same
        y.p.data[...] = x.p.data
        x.p.grad = y.p.grad = x.p.data * f32(0.1)
    kept = {name: np.array(x) for name, x in saved.items()}
    a.step()
    b.step()
    assert all(same(kept[name], np.asarray(saved[name])) for name in saved)  # what was saved is a copy
    for x, y in zip(a._slots, b._slots, strict=True):
        assert same(*on_host([x.p.data, y.p.data]))


def test_a_state_of_32_bits_is_refused_and_changes_nothing(rng):
    p = Tensor(np.ones(5000, f32), requires_grad=True)
    wide, narrow = AdamW([("p", p)]), AdamW8bit([("p", p)])
    p.grad = gradients(rng, 5000)
    narrow.step()
    before = narrow.state_dict()
    with pytest.raises(ValueError, match=r"the saved state has no p\.m of shape \(5000,\), uint8"):
        narrow.load_state_dict(wide.state_dict())
    with pytest.raises(ValueError, match=r"the saved state has no p\.m of shape \(5000,\), float32"):
        wide.load_state_dict(narrow.state_dict())
    assert all(same(np.asarray(before[name]), np.asarray(x)) for name, x in narrow.state_dict().items())


def test_errors_are_sentences():
    p, n = np.zeros(300, f32), 300
    with pytest.raises(
        ValueError, match="rule 'nearest' is unknown: expected one of 'bitsandbytes-cpu', 'bitsandbytes-"
    ):
        AdamW8bit([Tensor(p, requires_grad=True)], rule="nearest")
    with pytest.raises(ValueError, match="rule 'nearest' is unknown"):
        adamw8bit_step(p, p, *fresh(np, n), 1, 1e-3, rule="nearest")
    with pytest.raises(ValueError, match=r"absmax_m is float32 \(1,\), expected float32 \(2,\)"):
        adamw8bit_step(p, p, *fresh(np, n)[:2], *fresh(np, 256)[2:], 1, 1e-3)
    with pytest.raises(ValueError, match=r"g is float64 \(300,\), expected float32 \(300,\)"):
        adamw8bit_step(p, p.astype(np.float64), *fresh(np, n), 1, 1e-3)
    assert (p == 0).all()
