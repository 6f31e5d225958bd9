"""The engine: accumulation, order, the tape and what it holds."""

import numpy as np
import pytest

from tinylora import Tensor, backend, checkpoint, no_grad, ops, primitive, quantize, tape_bytes


def leaf(xp, *shape, rng=None):
    a = (
        np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
        if rng is None
        else rng.standard_normal(shape).astype(np.float32)
    )
    return Tensor(xp.asarray(a), requires_grad=True)


def host(x):
    return backend.move(x, "cpu")


def test_a_tensor_used_twice_receives_the_sum(xp):
    a = leaf(xp, 3)
    b = a + a
    c = b + b  # the recursive walk without an order gets this one wrong (micrograd issue 2)
    c.backward(xp.ones(3, dtype=np.float32))
    assert host(a.grad).tolist() == [4, 4, 4]


def test_a_0d_tensor_used_many_times_receives_every_contribution(xp):
    a = leaf(xp, 3)
    s = a.sum()
    (((s + s) + s) + (s + s)).backward()
    assert host(a.grad).tolist() == [5, 5, 5]
    b = Tensor(xp.asarray(np.float32(2.0).reshape(())), requires_grad=True)
    for _ in range(2):
        ((b + b) + b).backward()
    assert float(b.grad) == 6 and b.grad.shape == ()


def test_gradients_accumulate_over_backwards(xp):
    a = leaf(xp, 3)
    for _ in range(3):
        (a * 2.0).sum().backward()
    assert host(a.grad).tolist() == [6, 6, 6]


def test_gradients_of_two_leaves_do_not_share_memory(xp):
    a, b = leaf(xp, 3), leaf(xp, 3)
    (a + b).backward(xp.ones(3, dtype=np.float32))
    a.grad *= 2
    assert host(b.grad).tolist() == [1, 1, 1]


def test_a_model_deeper_than_the_stack(xp):
    a = leaf(xp, 2)
    x = a
    for _ in range(5000):
        x = x + 1.0
    x.sum().backward()
    assert host(a.grad).tolist() == [1, 1]


def test_a_second_backward_gets_a_sentence_and_changes_nothing(xp):
    a, b = leaf(xp, 3), leaf(xp, 3)
    h = ops.exp(a)
    (h * 1.0).sum().backward()
    before = host(a.grad).copy()
    with pytest.raises(RuntimeError, match="already walked and released"):
        (h * b).sum().backward()
    assert (host(a.grad) == before).all() and b.grad is None


def test_backward_asks_for_what_it_needs(xp):
    with pytest.raises(RuntimeError, match="requires_grad=True"):
        Tensor(xp.ones(3)).backward()
    with pytest.raises(ValueError, match="shape"):
        (leaf(xp, 3) * 2.0).backward()
    with pytest.raises(ValueError, match="gradient has shape"):
        (leaf(xp, 3) * 2.0).backward(xp.ones(2, dtype=np.float32))
    with pytest.raises(TypeError, match="only floats"):
        Tensor(xp.asarray(np.arange(3)), requires_grad=True)


def test_a_wrong_pullback_is_named(xp):
    @primitive
    def broken(x):
        return x * 2, (lambda g: g[:1, :1] * xp.ones((7, 7), dtype=np.float32),)

    with pytest.raises(RuntimeError, match="broken: a pullback returned shape"):
        broken(leaf(xp, 2, 3)).backward(xp.ones((2, 3), dtype=np.float32))


def test_no_grad_decorates_functions_and_is_used_again():
    x, off = leaf(np, 3), no_grad()

    @no_grad()
    def inner(n):
        return x + x if n == 0 else inner(n - 1)

    assert not inner(3).requires_grad
    with off, off:
        assert not (x + x).requires_grad
    assert (x + x).requires_grad


def test_no_grad_builds_no_tape(xp):
    a = leaf(xp, 3)
    with no_grad():
        y = ops.exp(a)
    assert not y.requires_grad and tape_bytes(y) == 0


def test_a_frozen_weight_has_no_pullback_and_costs_no_tape(xp):
    x, w = leaf(xp, 100, 50), Tensor(xp.ones((60, 50), dtype=np.float32))
    frozen = ops.linear(x, w)
    assert tape_bytes(frozen) == w.nbytes  # x is not held: only the pullback of w would need it
    w.requires_grad = True
    assert tape_bytes(ops.linear(x, w)) == w.nbytes + x.nbytes
    assert tape_bytes(ops.linear(x, w), exclude=[w]) == x.nbytes


def test_views_count_as_the_buffer_they_keep_alive(xp):
    x = Tensor(xp.ones((10, 10), dtype=np.float32))
    a = leaf(xp, 2, 10)
    assert tape_bytes(a * x[:2]) == x.nbytes
    assert tape_bytes(a * x[:2], a * x[2:4]) == x.nbytes


def test_the_tape_of_a_4bit_layer_holds_packed_bytes_and_never_the_dense_weight(xp, rng):
    n = 512
    q = quantize(rng.standard_normal((n, n)).astype(np.float32)).to(lambda a: backend.move(a, xp))
    x = leaf(xp, 8, n)
    y = ops.linear_frozen(x, q)
    codes_and_absmax = n * n // 2 + n * n // 64 * 4
    assert tape_bytes(y) == codes_and_absmax + q.code.nbytes == 147_520
    dense = Tensor(xp.asarray(rng.standard_normal((n, n)).astype(np.float32)))
    assert tape_bytes(ops.linear(x, dense)) == 1_048_576
    y.backward(xp.ones((8, n), dtype=np.float32))
    assert x.grad.shape == (8, n) and tape_bytes(y) == 0


def mlp(w1, w2):
    return lambda x: ops.linear(ops.dropout(ops.sigmoid(ops.linear(x, w1)), 0.5), w2)


def test_checkpoint_gives_the_same_gradients_with_the_same_dropout(xp, rng):
    results = []
    data = [rng.standard_normal(s).astype(np.float32) for s in ((6, 4), (5, 4), (4, 5))]
    for wrapped in (False, True):
        backend.seed(7)
        x, w1, w2 = (Tensor(xp.asarray(a), requires_grad=True) for a in data)
        f = mlp(w1, w2)
        y = checkpoint(f, x) if wrapped else f(x)
        y = checkpoint(f, y) if wrapped else f(y)
        held = tape_bytes(y, exclude=[w1, w2])
        (y * y).sum().backward()
        results.append((held, [host(t.data) for t in (y,)] + [host(t.grad) for t in (x, w1, w2)]))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a == b).all()
    assert results[1][0] < results[0][0]


def test_checkpoint_reaches_parameters_when_no_input_needs_a_gradient(xp, rng):
    x, w = Tensor(xp.ones((2, 3), dtype=np.float32)), leaf(xp, 4, 3, rng=rng)
    y = checkpoint(lambda x: ops.linear(x, w), x)
    y.sum().backward()
    assert host(w.grad).tolist() == [[2, 2, 2]] * 4
    w.requires_grad = False
    assert not checkpoint(lambda x: ops.linear(x, w), x).requires_grad


def test_nested_checkpoints_and_a_gradient_sink(xp, rng):
    w = leaf(xp, 3, 3, rng=rng)

    def inner(x):
        return ops.tanh(ops.linear(x, w))

    x = leaf(xp, 2, 3, rng=rng)
    found = {}
    checkpoint(lambda x: checkpoint(inner, checkpoint(inner, x)), x).sum().backward(into=found)
    assert w.grad is None and x.grad is None
    inner(inner(x)).sum().backward()
    np.testing.assert_allclose(host(found[w]), host(w.grad), rtol=1e-6)
    np.testing.assert_allclose(host(found[x]), host(x.grad), rtol=1e-6)


def test_a_tensor_given_by_name_gets_a_sentence():
    x, w, b = (Tensor(np.ones(s, np.float32)) for s in ((2, 3), (4, 3), (4,)))
    with pytest.raises(TypeError, match="linear: b is a Tensor and must be given by position"):
        ops.linear(x, w, b=b)


def test_scalars_do_not_promote():
    a = Tensor(np.ones(3, np.float32), requires_grad=True)
    for y in (a * np.float64(0.1), np.float64(2) * a, a / np.float64(3), 1.5 - a):
        assert y.dtype == np.float32


def test_host_and_device_arrays_never_mix():
    import fake_cupy

    a, b = Tensor(np.ones(3, np.float32)), Tensor(np.ones(3, np.float32)).to(fake_cupy)
    with pytest.raises(TypeError, match="different devices"):
        a + b
    assert (a + b.to("cpu")).numpy().tolist() == [2, 2, 2]
    assert backend.transfers.to_device == 1 and backend.transfers.to_host == 1
    assert backend.transfers.to_device_bytes == 12


def test_device_memory_that_runs_out_says_so():
    import fake_cupy

    x = Tensor(np.ones((100, 100), np.float32)).to(fake_cupy)
    fake_cupy.memory["limit"] = fake_cupy.memory["used"] + 1000
    with pytest.raises(fake_cupy.OutOfMemoryError, match="out of memory"):
        x + x
    fake_cupy.memory["limit"] = None
    assert (x + x).shape == (100, 100)
