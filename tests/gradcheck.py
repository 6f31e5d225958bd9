"""The one helper that checks an operation: its value, and each pullback against central differences in float64.

Along a random unit direction d, ⟨x̄, d⟩ must equal (f(x + h d) − f(x − h d)) / 2h, with f = ⟨ḡ, op(x)⟩ for a random ḡ. In
float64 and with two step sizes combined (Richardson, error O(h⁴)) the two differ by less than 1e-7 of ‖x̄‖. The same
inputs in float32 must give float32, and nearly the same numbers.
"""

import numpy as np

from tinylora import Tensor, backend

DIRECTIONS = 3


def check(op, *arrays, xp=np, value=None, rng=None, rtol=1e-7):
    """Check op(*tensors) at float64 host arrays.

    value   a plain NumPy function for the expected result
    Every array becomes a Tensor that requires a gradient; bind other arguments with a lambda. Non-contiguous arrays
    stay so.
    """
    rng = rng or np.random.default_rng(0)

    def run(values, dtype):
        tensors = [Tensor(_to(xp, v, dtype), requires_grad=True) for v in values]
        return op(*tensors), tensors

    y, tensors = run(arrays, np.float64)
    host = y.numpy()
    assert host.dtype == np.float64
    if value is not None:
        np.testing.assert_allclose(host, value(*arrays), rtol=1e-12, atol=1e-12)
    g = rng.standard_normal(y.shape)
    y.backward(_to(xp, g, np.float64))

    def f(values):
        return float((g * run(values, np.float64)[0].numpy()).sum())

    gradients = [backend.move(t.grad, "cpu") if t.grad is not None else None for t in tensors]
    for i, (x, grad) in enumerate(zip(arrays, gradients, strict=True)):
        assert grad is not None and grad.shape == x.shape and grad.dtype == np.float64
        for _ in range(DIRECTIONS):
            d = rng.standard_normal(x.shape)
            d /= max(np.linalg.norm(d), 1e-300)

            def slope(h, x=x, d=d, i=i):
                plus, minus = ([*arrays[:i], x + s * h * d, *arrays[i + 1 :]] for s in (1, -1))
                return (f(plus) - f(minus)) / (2 * h)

            h = 1e-3
            numeric = (4 * slope(h / 2) - slope(h)) / 3
            analytic = float((grad * d).sum())
            scale = max(float(np.linalg.norm(grad)), 1e-6)
            assert abs(numeric - analytic) <= rtol * scale, (
                f"input {i}: pullback {analytic}, central difference {numeric}, "
                f"difference {abs(numeric - analytic) / scale:.2e} of the gradient's norm"
            )

    y32, t32 = run(arrays, np.float32)
    assert y32.dtype == np.float32, f"float32 in, {y32.dtype} out"
    np.testing.assert_allclose(y32.numpy(), host, rtol=2e-4, atol=2e-4)
    y32.backward(_to(xp, g, np.float32))
    for t, grad in zip(t32, gradients, strict=True):
        assert t.grad.dtype == np.float32
        assert np.linalg.norm(backend.move(t.grad, "cpu") - grad) <= 1e-4 * np.linalg.norm(grad) + 1e-4


def _to(xp, x, dtype):
    """x in a dtype on xp's device, its memory layout kept: a transposed array comes out transposed."""
    x = x.astype(dtype, order="K")
    if xp is np:
        return x
    if x.ndim >= 2 and not x.flags.c_contiguous:
        return xp.asarray(np.ascontiguousarray(x.T)).T
    return xp.asarray(x)
