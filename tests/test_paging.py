"""The pager's pools, its prefetching, what it does when memory runs out, and the difference between pages and whole tensors."""

import subprocess
import sys

import fake_cupy
import numpy as np
import pytest
import tiny

from tinylora import AdamW, Pager, Tensor
from tinylora.kernels import pools
from tinylora.kernels.pools import WHOLE_TENSORS_FROM
from tinylora.training.train import Recipe, fit

POOLS = ["host", "file", "managed"]


def skip_managed_on_a_cpu(pool, xp):
    if pool == "managed" and xp is np:
        pytest.skip("managed memory is CUDA's")


def walk(xp, numbers, rng, *, then=None, **options):
    """Add one to each page named in turn. -> (pager, contents in the end)"""
    pager = Pager(page_bytes=64, device=xp, trace=True, **options)
    pages = pager.allocate(2, 37)  # five pages, the last one short
    pager.write(pages, rng.standard_normal((2, 37)).astype(np.float32))
    for i, number in enumerate(numbers):
        after = then[i] if then else (numbers[i + 1] if i + 1 < len(numbers) else None)
        pager.page(number, then=after)[...] += 1
    return pager, pager.read(pages)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("budget", [64, 128, 192, 10**6, None])
def test_every_pool_keeps_what_is_written(pool, prefetch, budget, xp, rng):
    skip_managed_on_a_cpu(pool, xp)
    numbers, seed = rng.integers(0, 5, 60).tolist(), int(rng.integers(1 << 30))
    _, plain = walk(np, numbers, np.random.default_rng(seed))
    pager, paged = walk(xp, numbers, np.random.default_rng(seed), pool=pool, budget=budget, prefetch=prefetch)
    assert plain.tobytes() == paged.tobytes()
    assert budget is None or pager.peak_resident_bytes <= budget


@pytest.fixture(params=["late", "early"])
def copies(request, monkeypatch):
    """Copies in a stream of their own may happen at any time between their call and what waits for them: try both ends."""
    monkeypatch.setitem(fake_cupy.streams, "lazy", request.param == "late")


@pytest.mark.parametrize("budget", [64, 128, 192, 10**6])
def test_copies_may_come_early_or_late(budget, copies, rng):
    numbers, seed = rng.integers(0, 5, 60).tolist(), int(rng.integers(1 << 30))
    _, plain = walk(np, numbers, np.random.default_rng(seed))
    _, paged = walk(fake_cupy, numbers, np.random.default_rng(seed), budget=budget, prefetch=True)
    assert plain.tobytes() == paged.tobytes()


def test_a_frame_on_its_way_to_the_host_lives_until_it_is_there_also_where_the_next_copy_fails(copies, monkeypatch):
    pager = Pager(2048, 1024, device=fake_cupy, prefetch=False)
    pages = pager.allocate(2, 384)
    for i in pages[:2]:
        pager.page(i)[...] = i + 1
    whole, left = pools.copies.copy_to_device, [1]

    def fails_once(*arguments):
        left[0] -= 1
        if not left[0]:
            raise MemoryError
        whole(*arguments)

    monkeypatch.setattr(pools.copies, "copy_to_device", fails_once)
    pager.page(pages[2])  # page 0 goes for it, and when the copy fails page 1 goes too
    assert (pager.read(pages)[0] == np.repeat([1, 2, 0], 128)).all()


def test_of_several_frames_that_fit_the_next_page_none_is_freed_before_it_is_copied(copies):
    pager = Pager(3072, 1024, device=fake_cupy, prefetch=False)
    pages = pager.allocate(2, 512)
    for i in pages[:3]:
        pager.page(i)[...] = i + 1
    pager.budget = 1024  # and so three pages go for one
    pager.page(pages[3])
    assert (pager.read(pages)[0] == np.repeat([1, 2, 3, 0], 128)).all()


def test_with_room_for_one_frame_a_guess_takes_no_page_away(copies):
    """The device is full: the page that is worked on must not make room for the one that may come next."""
    pager = Pager(10**9, 1024, device=fake_cupy)
    pages = pager.allocate(2, 384)
    fake_cupy.memory["limit"] = fake_cupy.memory["used"] + 1024
    for _ in range(3):
        for i, after in zip(pages, [*pages[1:], None], strict=True):
            frame = pager.page(i, then=after)
            frame[...] += 1
            del frame
    fake_cupy.memory["limit"] = None
    assert pager.resident_bytes == 1024 and (pager.read(pages) == 3).all()
    assert pager.counters.hits + pager.counters.faults == 9


def test_a_guess_that_fails_in_the_thread_leaves_the_books_as_they_were(monkeypatch):
    pager = Pager(2048, 1024, prefetch=True, trace=True)
    pages = pager.allocate(2, 512)
    exchange = pager.pool._exchange

    def full(back, source):
        if sum(page is source for page in pager._pages[1:]):
            raise MemoryError
        return exchange(back, source)

    pager.page(pages[0])
    monkeypatch.setattr(pager.pool, "_exchange", full)
    for after in list(pages[1:]) * 3:
        pager.page(pages[0], then=after)
    pager._arrive()
    assert pager.resident_bytes == 1024 and pager.counters.prefetches == 0 and pager.counters.bytes_in == 1024
    assert [event for _, _, event, _ in pager.trace if event != "hit"] == ["fault"]
    assert pager.evict_all() == 1024


@pytest.mark.parametrize("error", [OSError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_page_that_cannot_be_put_back_stays(error, ahead, monkeypatch):
    pager = Pager(2048, 1024, prefetch=ahead, trace=True)
    pages = pager.allocate(2, 512)
    for i in pages[:2]:
        pager.page(i)[...] = i + 1

    class Full(np.ndarray):
        def __setitem__(self, key, value):
            raise error("full")

    put, pager._pages[0] = pager._pages[0], pager._pages[0].view(Full)
    with pytest.raises(error):  # page 0 is the least recently used
        pager.page(pages[2], then=pages[3])
    with pytest.raises(error):
        pager.evict_all()
    pager._pages[0] = put
    assert (pager.read(pages[:2])[0] == np.repeat([1, 2], 128)).all()
    assert pager.resident_bytes == sum(frame.nbytes for frame in pager._resident.values()) <= 2048
    assert pager.counters.evictions == sum(event == "evict" for _, _, event, _ in pager.trace)
    assert pager.page(pages[2]).any() == 0 and pager.evict_all() <= 2048


def test_where_no_thread_can_be_started_nothing_comes_early(monkeypatch, rng):
    def none(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", none)
    _, pages = walk(np, [0, 3, 1, 4, 2, 0], rng, budget=128, prefetch=True)
    monkeypatch.undo()
    assert pages.shape == (2, 37)


def test_a_page_has_one_number_and_takes_only_what_fits():
    pager = Pager(64, 64)
    pages = pager.allocate(2, 24)
    pager.page(pages[2])[...] = 7
    assert (pager.page(-1) == 7).all() and (pager.read([-1]) == 7).all()
    for values in (np.ones((2, 1), np.float32), np.ones((2, 25), np.float32), np.ones((2, 24), np.complex64)):
        with pytest.raises(ValueError, match=r"pager: got .* to write, expected float32 \(2, 24\)"):
            pager.write(pages, values)


def test_an_unlimited_budget_from_now_on_leaves_old_pages_usable():
    pager = Pager(64, 64, pool="file")
    pages = pager.allocate(2, 24)
    pager.budget = None
    for _ in range(2):
        for i in pages:
            pager.page(i)[...] += 1
    assert (pager.read(pages) == 2).all()


def test_many_tensors_share_few_mappings():
    pager = Pager(1 << 12, 1 << 12, pool="file")
    for _ in range(400):
        pager.allocate(2, 2000)
    assert len({id(page.mapped) for page in pager._pages}) <= 12


def test_a_wrong_guess_about_the_next_page_costs_only_time(xp, rng):
    numbers, wrong = rng.integers(0, 5, 40).tolist(), rng.integers(0, 5, 40).tolist()
    seed = int(rng.integers(1 << 30))
    _, plain = walk(np, numbers, np.random.default_rng(seed))
    _, paged = walk(xp, numbers, np.random.default_rng(seed), then=wrong, budget=128, prefetch=True)
    assert plain.tobytes() == paged.tobytes()


def test_prefetching_turns_faults_into_hits_and_moves_the_same_bytes(rng):
    around = list(range(5)) * 4
    demand, a = walk(np, around, np.random.default_rng(1), budget=128, prefetch=False)
    ahead, b = walk(np, around, np.random.default_rng(1), budget=128, prefetch=True)
    assert a.tobytes() == b.tobytes()
    assert demand.counters.faults == 20 and demand.counters.hits == 0, (
        "two frames and five pages in a circle: LRU always fails"
    )
    assert ahead.counters.faults == 1 and ahead.counters.prefetches == ahead.counters.hits == 19
    assert demand.counters.bytes_in == ahead.counters.bytes_in


def test_with_room_for_one_page_there_is_no_prefetching():
    pager, _ = walk(np, list(range(5)), np.random.default_rng(0), budget=64, prefetch=True)
    assert pager.counters.prefetches == 0 and pager.counters.faults == 5


@pytest.mark.parametrize("pool", POOLS)
def test_the_trace_adds_up(pool, xp, rng):
    skip_managed_on_a_cpu(pool, xp)
    pager, _ = walk(xp, rng.integers(0, 5, 50).tolist(), rng, pool=pool, budget=192, prefetch=True)
    resident = peak = 0
    for _, _, event, nbytes in pager.trace:
        resident += {"fault": nbytes, "prefetch": nbytes, "evict": -nbytes, "hit": 0}[event]
        peak = max(peak, resident)
    assert resident == pager.resident_bytes and peak == pager.peak_resident_bytes <= 192
    events = [event for _, _, event, _ in pager.trace]
    c = pager.counters
    assert [events.count(e) for e in ("hit", "fault", "prefetch", "evict")] == [
        c.hits,
        c.faults,
        c.prefetches,
        c.evictions,
    ]
    assert c.hits + c.faults == 50


def test_managed_memory_is_prefetched_to_the_device_and_back():
    pager, _ = walk(fake_cupy, list(range(5)), np.random.default_rng(0), pool="managed", budget=128)
    sides = [fake_cupy.managed[page.data.ptr] for page in pager._pages]
    assert sides.count(0) == len(pager._resident) == 2 and sides.count(-1) == 3
    free, _ = walk(fake_cupy, list(range(5)), np.random.default_rng(0), pool="managed")
    assert free.counters.evictions == 0, "without a budget the driver evicts, as for bitsandbytes"


def test_pages_of_bytes_are_cut_between_blocks():
    pager = Pager(page_bytes=2048)
    pages = pager.allocate(2, 5000, dtype=np.uint8, multiple=256)
    assert [pager.page(i).shape for i in pages] == [(2, 1024)] * 4 + [(2, 904)]
    assert pager.page(0).dtype == np.uint8


def test_a_page_of_a_file_takes_no_memory_of_ours():
    """The resident set grows by the budget and not by the state, also where pages are read for a checkpoint."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/statm")

    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    pager, before = Pager(1 << 20, 1 << 18, pool="file"), resident()
    for i in pager.allocate(2, 4 << 20):  # 32 MB
        pager.page(i)[...] = 1
        if i % 16 == 0:
            pager.read([i])
    assert resident() - before < 8 << 20, f"{resident() - before:,} bytes"


# ---------------------------------------------------------------------------------------------------------------- whole tensors
def test_whole_tensors_pages_what_bitsandbytes_pages():
    """What is paged, and what is not? (bitsandbytes issues 801 and 962; notebooks/08_paged_optimizers.py, section 6)"""
    assert WHOLE_TENSORS_FROM == 100_000
    pager = Pager(budget=1 << 20, page_bytes=4096, whole_tensors=True)
    small, large = pager.allocate(2, WHOLE_TENSORS_FROM - 1), pager.allocate(2, WHOLE_TENSORS_FROM)
    assert len(small) == len(large) == 1
    pager.page(small[0])[...] = 1
    assert pager.counters.faults == 0 and pager.unpaged_bytes == 8 * (WHOLE_TENSORS_FROM - 1)
    pager.page(large[0])[...] = 1
    assert pager.counters.faults == 1 and pager.resident_bytes == 8 * WHOLE_TENSORS_FROM
    with pytest.raises(
        ValueError, match=r"page of 1600000 bytes .* exceeds the budget of 1048576 bytes; page without whole_tensors"
    ):
        pager.allocate(2, 200_000)


def test_whole_tensors_and_pages_give_the_same_bits(rng):
    start, grads = rng.standard_normal(120_000).astype(np.float32), rng.standard_normal((3, 120_000)).astype(np.float32)
    ends = []
    for whole in (False, True):
        p = Tensor(start.copy(), requires_grad=True)
        optimizer = AdamW([p], lr=0.01, pager=Pager(1 << 20, whole_tensors=whole))
        for g in grads:
            p.grad = g
            optimizer.step()
        ends.append(p.data.tobytes())
    assert ends[0] == ends[1]


# ---------------------------------------------------------------------------------------------------------------- out of memory
class Spike:
    """Short sequences, and a long one at step `at`."""

    def __init__(self, at, long, rng_seed=5):
        self.at, self.long, self.step = at, long, -1
        self.ids = np.random.default_rng(rng_seed).integers(0, 256, 4096)

    def batch(self, rng, size, length):
        self.step += 1
        n = self.long if self.step == self.at else length
        starts = rng.integers(0, len(self.ids) - n - 1, size)
        ids = np.stack([self.ids[s : s + n + 1] for s in starts])
        return ids[:, :-1], ids[:, 1:], np.ones((size, n), np.float32)

    def fingerprint(self):
        return "spike"


def train_through_a_spike(xp, limit):
    model = tiny.model().to(xp)
    pager = Pager(10**9, 4096, device=xp, trace=True)  # all may be resident, until the room is wanted
    recipe = Recipe(steps=5, batch_size=2, seq_len=8, shards=1, lr=1e-2)
    fake_cupy.memory["limit"] = limit
    try:
        fit(model, Spike(3, 48), recipe, pager=pager, progress=False)
    finally:
        fake_cupy.memory["limit"] = None
    return [p.numpy().tobytes() for _, p in model.named_parameters()], pager


def test_a_long_sequence_evicts_the_pages_and_the_step_goes_on():
    free, unpressed = train_through_a_spike(fake_cupy, None)
    used = fake_cupy.memory["used"]
    state = unpressed.total_bytes
    del unpressed
    for limit in range(used + 4 * state, used, -state // 8):  # down to where the spike no longer fits beside the state
        tight = pager = None  # the run before must not hold memory in this one
        tight, pager = train_through_a_spike(fake_cupy, limit)
        if pager.counters.rescues:
            break
    assert pager.counters.rescues == 1, "no limit was found at which the pages had to go"
    assert tight == free, "the weights are the same bits"
    assert {step for step, _, event, _ in pager.trace if event == "evict"} == {4}, "the spike is in the fourth step"
    assert pager.counters.evictions == len(pager), "every page went"
    faults = [step for step, _, event, _ in pager.trace if event in ("fault", "prefetch")]
    assert faults.count(4) == len(pager) and 5 not in faults, "and came back in the same step's update"


def test_without_pages_to_evict_the_error_stands():
    pager = Pager()

    def fails():
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        pager.yielding(fails)


def test_a_frame_that_finds_no_room_takes_that_of_another_page(rng):
    pager = Pager(10**9, 1024, device=fake_cupy)
    pages = pager.allocate(2, 1024)
    fake_cupy.memory["limit"] = fake_cupy.memory["used"] + 3 * 1024  # the budget would allow all eight
    try:
        for i in list(pages) * 2:
            pager.page(i)[...] += 1
    finally:
        fake_cupy.memory["limit"] = None
    assert pager.counters.evictions > 0 and (pager.read(pages) == 2).all()


PRESSED = """
import resource, sys
import numpy as np
import tinylora as tl
from tinylora.backend import keep_freed_memory

limited, long = int(sys.argv[1]), int(sys.argv[2])
if "kept" in sys.argv:  # as in training
    keep_freed_memory()
p = tl.Tensor(np.zeros(4 << 20, np.float32), requires_grad=True)
optimizer = tl.AdamW([p], lr=0.01, pager=tl.Pager(1 << 30, 1 << 20, pool="file", prefetch=False))

def gradient(n):
    x = np.ones((n, 1 << 20), np.float32)  # an activation that grows with the sequence
    return np.full(4 << 20, x[:, 0].sum(), np.float32)

for step, n in enumerate([1, 1, long, 1]):
    if step == 2 and limited:  # what is in use, and room for 40 MB
        used = int(open("/proc/self/statm").read().split()[5]) * 4096
        resource.setrlimit(resource.RLIMIT_DATA, (used + (40 << 20), -1))
    p.grad = optimizer.pager.yielding(gradient, n)
    optimizer.step()
print(optimizer.pager.counters.rescues, optimizer.pager.counters.evictions > 0, p.data.tobytes()[:400].hex())
"""


@pytest.mark.parametrize("how", ["returned", "kept"])
def test_under_a_limit_of_the_system_the_host_pages_go_to_the_file(how):
    """RAM and disk for real: 32 MB of state and 48 MB of activations do not fit into 40 MB more than what is in use."""
    if not sys.platform.startswith("linux"):
        pytest.skip("RLIMIT_DATA is Linux's")
    out = [
        subprocess.run([sys.executable, "-c", PRESSED, limited, "12", how], capture_output=True, text=True)
        for limited in "01"
    ]
    assert not out[1].stderr, out[1].stderr
    (free, _, a), (rescues, evicted, b) = (run.stdout.split() for run in out)
    assert (free, rescues, evicted) == ("0", "1", "True") and a == b


def test_a_file_that_pages_lie_in_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pager = Pager(64, 64, pool="file")
    pager.page(pager.allocate(2, 8)[0])[...] = 1
    del pager
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Pager(pool="tape"), "pool 'tape' is unknown: expected one of 'host', 'file', 'managed'"),
        (lambda: Pager(pool="managed"), "pool 'managed' is CUDA managed memory, and the device is the CPU"),
        (lambda: Pager(float("nan")), "the budget of nan bytes is smaller than one page"),
        (lambda: Pager().allocate(2, 0), "pager: n = 0, expected a whole number, 1 or more"),
        (lambda: Pager().allocate(0, 2), "pager: rows = 0, expected a whole number, 1 or more"),
    ],
)
def test_errors_are_sentences(make, words):
    with pytest.raises(ValueError, match=words):
        make()
