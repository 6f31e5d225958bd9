"""bitsandbytes as the witness for AdamW in 8 bits: the same gradients, the same codes in every bit, at every step, on a CPU.

Parameters are compared one step at a time, from where bitsandbytes stood before it: torch's square root is not always the nearest
float32. That is the only difference: with torch's square root in its place the parameters are equal in every bit too.
"""

import os
import types

import numpy as np
import pytest

from tinylora import AdamW, Tensor
from tinylora.paging import WHOLE_TENSORS_FROM
from tinylora.training import adamw8bit
from tinylora.training.adamw8bit import AdamW8bit, adamw8bit_step

pytestmark = pytest.mark.oracle

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # the same arithmetic, without waiting for a compiler

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")
f32 = np.float32
FLT_MAX = float(np.finfo(f32).max)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_special_values(rng, n):
    x = rng.standard_normal(n)
    x[rng.integers(n, size=3)] = np.nan, np.inf, -np.inf
    return x


def bit_patterns(rng, n):
    x = rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32).view(f32)
    return np.where(np.isfinite(x), x, f32(0.5))


GRADIENTS = {
    "normal": lambda rng, n: rng.standard_normal(n) * 1e-3,
    "many scales": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.uniform(-12, 6, n),
    "half of them zero": lambda rng, n: np.where(np.arange(n) % 2, 0, rng.standard_normal(n)),
    "blocks of zeros": lambda rng, n: np.where(np.arange(n) // 256 % 2, 0, rng.standard_normal(n)),
    "nothing but zeros": lambda rng, n: np.zeros(n),
    "coarse": lambda rng, n: rng.integers(-8, 9, n) / 8,
    "denormal squares": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.uniform(-24, -19, n),
    "tiny": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.uniform(-45, -18, n),
    "huge": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.uniform(10, 19, n),
    "overflowing squares": lambda rng, n: np.clip(rng.standard_normal(n) * 10.0 ** rng.uniform(10, 38, n), -FLT_MAX, FLT_MAX),
    "bit patterns": bit_patterns,
    "special values": with_special_values,
}  # fmt: skip


def witness(p, **options):
    """bitsandbytes' optimizer on a copy of p."""
    theirs = torch.nn.Parameter(torch.from_numpy(p.copy()))
    return theirs, bnb.optim.AdamW8bit([theirs], **options)


def fresh(n):
    """codes_m, codes_v, absmax_m, absmax_v before the first step."""
    blocks = -(-n // 256)
    return [np.zeros(n, np.uint8), np.zeros(n, np.uint8), np.zeros(blocks, f32), np.zeros(blocks, f32)]


def settings(rng):
    """Defaults, or anything else."""
    if rng.random() < 0.3:
        return {}
    return {
        "lr": float(10 ** rng.uniform(-5, -1)),
        "betas": (float(rng.uniform(0, 0.99)), float(rng.uniform(0.5, 0.9999))),
        "eps": float(10 ** rng.uniform(-10, -4)),
        "weight_decay": float(rng.choice([0, rng.uniform(0, 0.3)])),
    }


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000, 4096, 4097, 70001])
def test_codes_and_absmax_are_bitsandbytes_in_every_bit_at_every_step(kind, n, rng):
    options = settings(rng)
    print(options)
    p = (rng.standard_normal(n) * rng.choice([0, 1e-3, 1, 100])).astype(f32)
    theirs, optimizer = witness(p, min_8bit_size=1, **options)
    state = fresh(n)
    for t in range(1, 9):
        g, before = GRADIENTS[kind](rng, n).astype(f32), p.copy()
        theirs.grad = torch.from_numpy(g.copy())
        optimizer.step()
        adamw8bit_step(p, g, *state, t, **({"lr": 1e-3} | options))
        for ours, name in zip(state, ("state1", "state2", "absmax1", "absmax2"), strict=True):
            other = optimizer.state[theirs][name].numpy()
            assert ours.dtype == other.dtype and np.array_equal(ours, other, equal_nan=ours.dtype == f32), (name, t)
        after = theirs.detach().numpy()
        assert (np.isnan(p) == np.isnan(after)).all()
        known = ~np.isnan(after)
        ulp = np.spacing(np.maximum(np.abs(before), np.abs(after))[known]).astype(np.float64)
        change = np.abs(after.astype(np.float64) - before)[known]
        assert (np.abs(p.astype(np.float64) - after)[known] <= change * 2.0**-21 + ulp).all(), t
        p[...] = after


def test_the_optimizers_agree_about_what_is_small(rng):
    """4,096 elements have 8 bits, 4,095 have not; two groups with settings of their own; weight decay is 0.01 unless given."""
    values = [rng.standard_normal(n).astype(f32) for n in (4095, 4096)]
    ours = [Tensor(x.copy(), requires_grad=True) for x in values]
    theirs = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in values]

    def groups(params):
        return [{"params": params[:1], "lr": 1e-2}, {"params": params[1:], "weight_decay": 0.2}]

    a, b = AdamW8bit(groups(ours)), bnb.optim.AdamW8bit(groups(theirs))
    assert a.groups[0]["weight_decay"] == b.param_groups[0]["weight_decay"] == 0.01
    for _ in range(5):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = rng.standard_normal(x.shape).astype(f32)
            y.grad = torch.from_numpy(x.grad.copy())
        a.step()
        b.step()
    state = a.state_dict()
    assert state["param0.m"].dtype == f32 and b.state[theirs[0]]["state1"].dtype == torch.float32
    assert state["param1.m"].dtype == np.uint8 and (state["param1.m"] == b.state[theirs[1]]["state1"].numpy()).all()
    for x, y in zip(ours, theirs, strict=True):
        assert np.abs(x.data - y.detach().numpy()).max() < 5e-6


def with_torchs_square_root(monkeypatch):
    """Let the step take torch's square root: the NumPy it sees is one in which `sqrt` is torch's."""
    numpy = types.ModuleType("numpy_with_torchs_square_root")
    numpy.__dict__.update(vars(np), sqrt=lambda x, out: np.copyto(out, torch.from_numpy(x).sqrt().numpy()))
    monkeypatch.setattr(adamw8bit, "array_module", lambda _: numpy)


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("n", [255, 1000, 70000])
def test_with_torchs_square_root_the_parameters_are_bitsandbytes_in_every_bit(kind, n, rng, monkeypatch):
    with_torchs_square_root(monkeypatch)
    options = {"lr": 1e-3, **settings(rng)}
    print(options)
    p = (rng.standard_normal(n) * rng.choice([0, 1e-3, 1, 100])).astype(f32)
    theirs, optimizer = witness(p, min_8bit_size=1, **options)
    state = fresh(n)
    for t in range(1, 9):
        g = GRADIENTS[kind](rng, n).astype(f32)
        theirs.grad = torch.from_numpy(g.copy())
        optimizer.step()
        adamw8bit_step(p, g, *state, t, **options)
        assert np.array_equal(p, theirs.detach().numpy(), equal_nan=True), t


def test_torchs_square_root_is_an_ulp_off_at_times_and_ours_is_the_nearest(rng):
    x = (rng.random(100_000) * 10.0 ** rng.integers(-20, 20, 100_000)).astype(f32)
    off = np.abs(torch.from_numpy(x).sqrt().numpy().view(np.int32) - np.sqrt(x).view(np.int32))
    print(f"torch's square root differs in {np.mean(off > 0):.1%}")
    assert off.max() <= 1
    assert (np.sqrt(x) == np.sqrt(x.astype(np.float64)).astype(f32)).all()


@pytest.mark.parametrize("kind", ["normal", "many scales", "half of them zero", "coarse"])
def test_in_32_bits_bitsandbytes_adds_in_another_order(kind, rng):
    """m and v within 1e-6 of their largest, p within 2e-6 η and an ulp a step; its own order, spelled out, is met far closer."""
    n, lr, decay, steps = 4095, 1e-3, 0.01, 20
    p = rng.standard_normal(n).astype(f32)
    theirs, optimizer = witness(p, lr=lr, weight_decay=decay)
    q = Tensor(p.copy(), requires_grad=True)
    ours = AdamW([("p", q)], lr=lr, weight_decay=decay)
    in_its_order, m, v = p.copy(), np.zeros(n, f32), np.zeros(n, f32)
    largest = np.abs(p)
    for t in range(1, steps + 1):
        q.grad = GRADIENTS[kind](rng, n).astype(f32)
        theirs.grad = torch.from_numpy(q.grad.copy())
        ours.step()
        optimizer.step()
        after = theirs.detach().numpy().copy()
        c1, c2 = 1 - 0.9**t, np.sqrt(1 - 0.999**t)
        m = (q.grad.astype(np.float64) * f32(1 - 0.9) + m * f32(0.9)).astype(f32)
        v = ((q.grad * f32(1 - 0.999)).astype(np.float64) * q.grad + v * f32(0.999)).astype(f32)
        update = m / (np.sqrt(v) + f32(1e-8 * c2))
        in_its_order = in_its_order * f32(1 - lr * decay)
        in_its_order = (update.astype(np.float64) * f32(-lr * c2 / c1) + in_its_order).astype(f32)
        largest = np.maximum(largest, np.abs(after))
    state, other = ours.state_dict(), optimizer.state[theirs]
    for part, name in (("m", "state1"), ("v", "state2")):
        difference = np.abs(state[f"p.{part}"] - other[name].numpy()).max() / other[name].numpy().max()
        print(f"{part}: {difference:.1e} of the largest")
        assert difference <= 1e-6
    assert (m == other["state1"].numpy()).all() and (v == other["state2"].numpy()).all()
    difference = np.abs(q.data - after.astype(np.float64))
    print(f"p: {np.mean(q.data == after):.0%} equal, in its order {np.mean(in_its_order == after):.0%}")
    assert (difference <= steps * (2e-6 * lr + np.spacing(largest))).all()
    assert np.mean(in_its_order == after) > np.mean(q.data == after)


def test_a_parameter_without_gradient_falls_in_bitsandbytes_too():
    g = np.zeros(4096, f32)
    g[::2] = 1
    theirs, optimizer = witness(np.zeros(4096, f32), lr=1e-3, weight_decay=0)
    for _ in range(100):
        theirs.grad = torch.from_numpy(g.copy())
        optimizer.step()
    fallen = theirs.detach().numpy()[1::2]
    print(f"after 100 steps: {fallen[0]:.2e}")
    assert f"{fallen.max():.1e}" == f"{fallen.min():.1e}" == "-4.8e-04"


def test_bitsandbytes_pages_states_from_100_000_elements_on(monkeypatch):
    """Its own choice of a buffer, for weights without memory (device meta): what it pages needs a GPU, and is only asked for here."""
    asked = []

    def get_paged(*shape, dtype, device):
        asked.append(shape)
        return torch.empty(shape, dtype=dtype, device=device)

    monkeypatch.setattr(bnb.functional, "get_paged", get_paged)
    monkeypatch.setattr(bnb.functional, "fill", lambda buffer, value: None)
    sizes = (1, WHOLE_TENSORS_FROM - 1, WHOLE_TENSORS_FROM, WHOLE_TENSORS_FROM + 1)
    weights = [torch.nn.Parameter(torch.empty(n, device="meta")) for n in sizes]
    for paged, optimizer in ((True, bnb.optim.PagedAdamW(weights)), (False, bnb.optim.AdamW(weights))):
        asked.clear()
        for weight in weights:
            assert optimizer.get_state_buffer(weight).shape == weight.shape
        assert asked == ([(n,) for n in sizes if n >= 100_000] if paged else [])
