"""The one helper that checks an operation: its value, and each pullback against central differences in float64.

Along a random direction d, ⟨x̄, d⟩ must equal (f(x + h d) − f(x − h d)) / 2h, with f = ⟨ḡ, op(x)⟩ for a random ḡ. With
float64 and two step sizes combined (Richardson, error O(h⁴)) the relative error is below 1e-7. The same inputs in
float32 must give float32.
"""

import numpy as np

from tinylora import Tensor, backend


def check(op, *arrays, xp=np, value=None, rng=None, atol=0.0, rtol=1e-7):
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

    for i, (x, t) in enumerate(zip(arrays, tensors, strict=True)):
        assert t.grad is not None and t.grad.shape == x.shape and t.grad.dtype == np.float64
        d = rng.standard_normal(x.shape)
        d /= max(np.linalg.norm(d), 1e-300)

        def slope(h, x=x, d=d, i=i):
            plus, minus = ([*arrays[:i], x + s * h * d, *arrays[i + 1 :]] for s in (1, -1))
            return (f(plus) - f(minus)) / (2 * h)

        h = 1e-3
        numeric = (4 * slope(h / 2) - slope(h)) / 3
        analytic = float((backend.move(t.grad, "cpu") * d).sum())
        scale = max(abs(numeric), abs(analytic), float(np.linalg.norm(backend.move(t.grad, "cpu"))), 1e-3)
        assert abs(numeric - analytic) <= rtol * scale + atol, (
            f"input {i}: pullback {analytic}, central difference {numeric}, relative error {abs(numeric - analytic) / scale:.2e}"
        )

    y32, t32 = run(arrays, np.float32)
    assert y32.dtype == np.float32, f"float32 in, {y32.dtype} out"
    y32.backward(_to(xp, g, np.float32))
    assert all(t.grad.dtype == np.float32 for t in t32)
    np.testing.assert_allclose(y32.numpy(), host, rtol=2e-4, atol=2e-4)


def _to(xp, x, dtype):
    """x in a dtype on xp's device, its memory layout kept: a transposed array comes out transposed."""
    x = x.astype(dtype, order="K")
    if xp is np:
        return x
    if x.ndim >= 2 and not x.flags.c_contiguous:
        return xp.asarray(np.ascontiguousarray(x.T)).T
    return xp.asarray(x)
