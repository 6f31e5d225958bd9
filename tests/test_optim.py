"""AdamW against its equation, paging against no paging, the pager's books, clipping and schedules."""

import copy
import math
import pickle

import numpy as np
import pytest

from tinylora import AdamW, AdamW8bit, Pager, Tensor, add_lora, backend, set_adapter
from tinylora.nn import Linear, Module
from tinylora.optim import clip_grad_norm
from tinylora.training.schedule import schedule


class Sequence(Module):
    """Layers by number."""

    def __init__(self, *layers):
        for i, layer in enumerate(layers):
            setattr(self, str(i), layer)


def by_hand(p, grads, lr, b1, b2, eps, wd):
    """The textbook loop in float64."""
    p, m, v = p.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - lr * wd * p
        p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def test_adamw_is_its_equation(xp, rng):
    start, grads = rng.standard_normal(50).astype(np.float32), rng.standard_normal((20, 50)).astype(np.float32)
    p = Tensor(xp.asarray(start.copy()), requires_grad=True)
    optimizer = AdamW([p], lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, pager=Pager(device=xp))
    for g in grads:
        p.grad = xp.asarray(g)
        optimizer.step()
    np.testing.assert_allclose(p.numpy(), by_hand(start, grads, 0.01, 0.8, 0.95, 1e-6, 0.1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
def test_each_parameter_counts_its_own_steps(kind, rng):
    """One that gets its first gradient late moves as if it had been trained alone, also after saving and loading."""
    early, late, alone = (Tensor(np.zeros(5000, np.float32), requires_grad=True) for _ in range(3))
    together, single = kind([early, late], lr=0.01), kind([alone], lr=0.01)
    grads = rng.standard_normal((40, 5000)).astype(np.float32)
    for step, g in enumerate(grads):
        early.grad, late.grad = g.copy(), g.copy() if step >= 30 else None
        together.step()
        if step == 34:
            saved, together = together.state_dict(), kind([early, late], lr=0.01)
            together.load_state_dict({name: a.copy() for name, a in saved.items()})
    for g in grads[30:]:
        alone.grad = g.copy()
        single.back_and_forth = False
        single.step()
    assert late.data.tobytes() == alone.data.tobytes() and early.data.tobytes() != late.data.tobytes()


def test_adapters_trained_in_turn_move_as_far_as_one_trained_alone(rng):
    """Two adapters in one optimizer: while one rests its clock stands still (LoRA's task switching)."""
    model = Sequence(Linear(8, 8))
    add_lora(model, r=2, name="a")
    add_lora(model, r=2, name="b")
    layer = model.get("0")
    factors = {n: layer.bypasses[n].lora_B.weight for n in "ab"}
    set_adapter(model, ["a", "b"])
    optimizer = AdamW(list(factors.items()), lr=0.01)
    for step in range(100):
        set_adapter(model, "b" if step >= 99 else "a")
        optimizer.zero_grad()
        factors["b" if step >= 99 else "a"].grad = np.ones((8, 2), np.float32)
        optimizer.step()
    np.testing.assert_allclose(factors["b"].data, -0.01, rtol=1e-5)  # the first step is lr long


def test_a_checkpoint_without_clocks_of_its_own_is_read(rng):
    p = Tensor(np.zeros(3, np.float32), requires_grad=True)
    optimizer = AdamW([p])
    p.grad = np.ones(3, np.float32)
    optimizer.step()
    old = {name: a for name, a in optimizer.state_dict().items() if not name.endswith(".t")}
    again = AdamW([p])
    again.load_state_dict(old)
    assert again.state_dict()["param0.t"] == 1


def test_saved_steps_belong_to_a_name_and_not_to_a_place():
    x, y = (Tensor(np.zeros(2, np.float32), requires_grad=True) for _ in range(2))
    optimizer = AdamW([("x", x), ("y", y)])
    for step in range(5):
        x.grad, y.grad = np.ones(2, np.float32), np.ones(2, np.float32) if step == 4 else None
        optimizer.step()
    other = AdamW([("y", y), ("x", x)])
    other.load_state_dict(optimizer.state_dict())
    assert {n: int(t) for n, t in other.state_dict().items() if n.endswith(".t")} == {"y.t": 1, "x.t": 5}


def test_a_parameter_given_twice_is_refused():
    p, q = (Tensor(np.zeros(3, np.float32), requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"AdamW: parameter two of shape \(3,\) is given twice"):
        AdamW([{"params": [("one", p)]}, {"params": [q, ("two", p)], "lr": 0.1}])
    with pytest.raises(ValueError, match=r"AdamW: parameter one of shape \(3,\) is given twice"):
        AdamW([("one", p), ("one", q)])  # the state of one would be saved over that of the other
    w = np.zeros((4, 6), np.float32)
    whole, right, left = (Tensor(x, requires_grad=True) for x in (w, w[:, 3:], w[:, :3]))
    with pytest.raises(ValueError, match=r"AdamW: parameter right of shape \(4, 3\) is given twice"):
        AdamW([("whole", whole), ("right", right)])  # two threads would write to it
    AdamW([("left", left), ("right", right)])  # columns beside each other


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_parameters_of_other_dtypes_are_updated_in_float32(dtype, rng):
    """v of float16's gradients lies below float16's smallest number."""
    start, grads = rng.standard_normal(300).astype(dtype), [rng.standard_normal(300) * 1e-3 for _ in range(3)]
    p, m, v = Tensor(start.copy(), requires_grad=True), 0.0, 0.0
    optimizer, slow = AdamW([p], lr=0.01, weight_decay=0.1), start.astype(np.float64)
    for t, g in enumerate(grads, 1):
        p.grad = g.astype(dtype)
        g = p.grad.astype(np.float64)
        m, v = m * 0.9 + g * 0.1, v * 0.999 + g * g * 0.001
        slow = slow * (1 - 0.01 * 0.1) - 0.01 / (1 - 0.9**t) * m / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        optimizer.step()
    assert p.dtype == dtype
    np.testing.assert_allclose(
        p.data, slow, rtol=2e-3 if dtype == "float16" else 1e-6, atol=2e-3 if dtype == "float16" else 1e-8
    )


def test_a_gradient_that_lies_column_by_column_is_turned_once(rng):
    """As ops leave it now and then: each piece of a page would turn the whole again."""
    p = Tensor(rng.standard_normal((600, 500)).astype(np.float32), requires_grad=True)
    g = rng.standard_normal((500, 600)).astype(np.float32)
    plain = Tensor(p.data.copy(), requires_grad=True)
    p.grad, plain.grad = g.T, np.ascontiguousarray(g.T)
    optimizers = [AdamW([x], pager=Pager(page_bytes=1 << 14)) for x in (p, plain)]
    for optimizer in optimizers:
        optimizer.step()
    assert p.data.tobytes() == plain.data.tobytes() and p.grad.flags.c_contiguous and (p.grad == g.T).all()


@pytest.mark.parametrize("key", ["step", "x.t"])
@pytest.mark.parametrize("value", [None, np.array(-1), np.array(1.5), np.array(np.nan), np.array([1, 1])])
def test_a_state_without_its_steps_changes_nothing(key, value):
    optimizer = AdamW([("x", Tensor(np.zeros(3, np.float32), requires_grad=True))])
    optimizer.groups[0]["params"][0][1].grad = np.ones(3, np.float32)
    optimizer.step()
    before = {name: a.copy() for name, a in optimizer.state_dict().items()}
    state = {name: a + a for name, a in before.items() if name != "x.t"} | {key: value}
    with pytest.raises(ValueError, match=rf"AdamW: the saved state has {key} = .*, expected a number of steps"):
        optimizer.load_state_dict({name: a for name, a in state.items() if a is not None or name == "x.t"})
    assert all((before[name] == a).all() for name, a in optimizer.state_dict().items())


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps, lambda optimizer: copy.copy(optimizer.pager)])
def test_a_copy_of_an_optimizer_is_refused_in_a_sentence(way):
    optimizer = AdamW([Tensor(np.zeros(3, np.float32), requires_grad=True)])
    with pytest.raises(
        TypeError, match=r"a pager cannot be copied; make another, whose optimizer takes load_state_dict"
    ):
        way(optimizer)


SIZES = ((7, 33), (1000,), (1,), (64, 64))


def train(xp, pager, steps=50):
    rng = np.random.default_rng(3)
    params = [Tensor(xp.asarray(rng.standard_normal(s).astype(np.float32)), requires_grad=True) for s in SIZES]
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 0.02}]
    optimizer = AdamW(groups, lr=0.01, pager=pager)
    for _ in range(steps):
        for p in params:
            p.grad = xp.asarray(rng.standard_normal(p.shape).astype(np.float32))
        optimizer.step()
    return [p.numpy() for p in params], optimizer


@pytest.mark.parametrize("page_bytes, budget", [(64, 64), (512, 512), (512, 1536), (4096, 8192), (4096, 10**9)])
def test_any_budget_gives_the_same_bits(page_bytes, budget, xp):
    plain, unpaged = train(xp, Pager(device=xp))
    pager = Pager(budget, page_bytes, device=xp, trace=True)
    paged, optimizer = train(xp, pager)
    for a, b in zip(plain, paged, strict=True):
        assert a.tobytes() == b.tobytes()
    for a, b in zip(unpaged.state_dict().values(), optimizer.state_dict().values(), strict=True):
        assert a.tobytes() == b.tobytes()
    c = pager.counters
    assert c.hits + c.faults == 50 * len(pager)
    assert pager.peak_resident_bytes <= budget
    assert c.faults + c.prefetches - c.evictions == len(pager._resident)
    if budget >= pager.total_bytes:
        assert c.faults + c.prefetches == len(pager) and c.evictions == 0


def test_the_state_stays_in_the_pool_and_only_pages_cross(xp):
    if xp is np:
        pytest.skip("nothing crosses on the host")
    pager = Pager(1024, 512, device=xp)
    before = backend.transfers.to_device_bytes
    train(xp, pager, steps=2)
    assert backend.transfers.to_device_bytes - before == pager.counters.bytes_in
    assert all(isinstance(page, np.ndarray) for page in pager._pages)


def test_least_recently_used_goes_first_and_the_trace_tells():
    pager = Pager(budget=2 * 8, page_bytes=8, trace=True)
    pages = pager.allocate(1, 6)  # three pages of two floats
    assert list(pages) == [0, 1, 2]
    for step, number in enumerate([0, 1, 0, 2, 1]):
        pager.step = step
        pager.page(number)[...] += 1
    assert pager.trace == [
        (0, 0, "fault", 8),
        (1, 1, "fault", 8),
        (2, 0, "hit", 0),
        (3, 1, "evict", 8),
        (3, 2, "fault", 8),
        (4, 0, "evict", 8),
        (4, 1, "fault", 8),
    ]
    assert pager.read(pages).tolist() == [[2, 2, 2, 2, 1, 1]]
    assert pager.counters.bytes_in == 32 and pager.counters.bytes_out == 16 and pager.counters.bytes_moved == 48


def test_without_a_budget_nothing_is_copied():
    pager = Pager(page_bytes=8)
    pages = pager.allocate(2, 3)
    assert all(pager.page(i) is pager._pages[i] for i in pages)
    assert pager.counters.faults == pager.counters.bytes_moved == 0


def test_state_round_trip_through_pages():
    _, a = train(np, Pager(1024, 512), steps=5)
    _, b = train(np, Pager(512, 512), steps=1)
    b.load_state_dict(a.state_dict())
    assert b.step_count == 5
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert (x == y).all()
    with pytest.raises(ValueError, match=r"no param0.m of shape \(7, 33\)"):
        b.load_state_dict({"step": np.array(1)})


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Pager(100, 4096), "budget of 100 bytes is smaller than one page of 4096"),
        (lambda: Pager(page_bytes=10), "multiple of 8"),
        (lambda: Pager(pool="tape"), "pool 'tape' is unknown"),
        (lambda: AdamW([]), "nothing to optimize"),
        (lambda: AdamW([Tensor(np.ones(3, np.float32))]), "does not require a gradient"),
        (lambda: schedule("linaer", 0, 10), "'linaer' is unknown: expected one of 'constant', 'linear', 'cosine'"),
    ],
)
def test_errors_are_sentences(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_clipping(xp):
    params = [Tensor(xp.zeros(n, dtype=np.float32), requires_grad=True) for n in (3, 4)]
    for p in params:
        p.grad = xp.full(p.shape, 2.0, dtype=np.float32)
    norm = clip_grad_norm(params, 1.0)
    assert math.isclose(norm, math.sqrt(7 * 4), rel_tol=1e-6)
    assert math.isclose(clip_grad_norm(params, 1.0), 1.0, rel_tol=1e-6)
    untouched = params[0].grad.copy()
    clip_grad_norm(params, 100.0)
    assert bool((params[0].grad == untouched).all())


def test_schedules():
    assert [schedule("constant", i, 10, warmup=4) for i in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [schedule("linear", i, 6, warmup=2) for i in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = [schedule("cosine", i, 101, warmup=1, floor=0.1) for i in range(1, 102)]
    assert cosine[0] == 1.0 and math.isclose(cosine[50], 0.55) and math.isclose(cosine[100], 0.1)
    assert all(np.diff(cosine) < 0)
