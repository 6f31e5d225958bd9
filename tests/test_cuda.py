"""Each kernel of cuda.cu against the array operations that it stands for; on a GPU, and on a CPU where there is a compiler."""

import importlib
import importlib.util
import subprocess
from types import SimpleNamespace

import cuda_on_host
import fake_cupy
import numpy as np
import pytest
import tiny

from tinylora import AdamW, Llama, Tensor, add_lora, backend, codebooks, ops, quantize, quantize_linears
from tinylora.dtypes import round_to
from tinylora.kernels import casts, cuda, device, products
from tinylora.lora import LoRALinear
from tinylora.models.llama import LlamaConfig
from tinylora.nn import Linear, Linear4bit, Linear16bit
from tinylora.optim import adamw_step, clip_grad_norm
from tinylora.quant import dequantize
from tinylora.tape import checkpoint
from tinylora.tensor import no_grad, setting
from tinylora.training.adamw8bit import adamw8bit_step

f32 = np.float32


def _machines():
    yield pytest.param("fake_cupy", id="on-host")
    if importlib.util.find_spec("cupy"):
        import cupy

        if cupy.cuda.is_available():
            yield pytest.param("cupy", id="cupy")


@pytest.fixture(params=_machines())
def xp(request):
    """An array module that compiles kernels."""
    if request.param == "fake_cupy":
        if not cuda_on_host.available():
            pytest.skip("no compiler")
        fake_cupy.compile_kernels(True)
        request.addfinalizer(lambda: fake_cupy.compile_kernels(False))
    return importlib.import_module(request.param)


def host(x):
    x = np.asarray(backend.move(x, "cpu"))
    return x.astype(f32) if x.dtype.itemsize == 2 and x.dtype != np.float16 else x


def same(a, b):
    """Equal values of one shape; NaN equals NaN."""
    a, b = host(a), host(b)
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def launched(before=None):
    """How many kernels of cuda.cu the stand-in has run."""
    return cuda_on_host.launches if before is None else cuda_on_host.launches - before


# ------------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("dtype", products.DTYPES)
@pytest.mark.parametrize("rule", ["bitsandbytes-cpu", "bitsandbytes-cuda"])
@pytest.mark.parametrize(
    "code, blocksize, nested",
    [("nf4", 64, True), ("nf4", 64, False), ("fp4", 32, True), ("int4", 4096, True), ("nf4", 8, True)],
)
def test_dequantizing_is_the_equation_in_every_bit(code, blocksize, nested, rule, dtype, xp, rng):
    w = (rng.standard_normal((130, 512)) * 10.0 ** rng.uniform(-3, 1, (130, 1))).astype(f32)
    w[3] *= f32(1e-37)
    w[5:8] = 0
    q = quantize(w, code, blocksize, double_quant=nested, rule=rule)
    expected = dequantize(q)
    if rule.endswith("cuda"):
        expected = np.where(np.abs(expected) < 2.0**-126, f32(0), expected)
    before = launched()
    ours = q.to(lambda a: backend.move(a, xp)).dequantize(dtype)
    assert same(ours, round_to(expected, dtype)) and ours.dtype.itemsize == (4 if dtype == "float32" else 2)
    assert xp is not fake_cupy or launched(before) == 1


@pytest.mark.parametrize("shape, blocksize", [((3, 5), 64), ((64, 3), 48), ((7, 9), 64), ((0, 8), 64)])
def test_what_a_kernel_cannot_is_left_to_arrays(shape, blocksize, xp, rng):
    q = quantize(rng.standard_normal(shape).astype(f32), blocksize=blocksize, double_quant=True)
    for dtype in products.DTYPES:
        assert same(q.to(lambda a: backend.move(a, xp)).dequantize(dtype), round_to(dequantize(q), dtype))


@pytest.mark.parametrize("rule", ["bitsandbytes-cpu", "bitsandbytes-cuda"])
@pytest.mark.parametrize(
    "code, blocksize", [("nf4", 64), ("fp4", 64), ("int4", 32), ("af4", 128), ("nf4", 4096), ("nf4", 2)]
)
def test_quantizing_on_a_device_has_the_hosts_bits(code, blocksize, rule, xp, rng):
    values = codebooks.af4(blocksize) if code == "af4" else codebooks.get(code)[1]
    w = (rng.standard_normal(65_536) * 10.0 ** rng.uniform(-4, 4, 65_536)).astype(f32)
    points = np.concatenate([codebooks.midpoints(values), values])
    near = (
        (rng.choice(points[points != 0], 65_536).view(np.int32) + rng.integers(-1, 2, 65_536))
        .astype(np.int32)
        .view(f32)
    )
    w[:32_768] = near[:32_768]
    w[: 32_768 : min(blocksize, 64)] = 1
    w[40_000:44_096] *= f32(1e-38)
    w[44_096:48_192] = 0
    w[50_000:50_003] = np.nan, np.inf, -np.inf
    w[53_248:57_344] = np.nan
    how = {"code": values if code == "af4" else code, "blocksize": blocksize, "rule": rule, "check_finite": False}
    before = launched()
    theirs, ours = quantize(w, **how), quantize(xp.asarray(w), **how)
    assert same(ours.packed, theirs.packed) and same(ours.absmax, theirs.absmax)
    assert xp is not fake_cupy or launched(before) == (not (code == "fp4" and rule.endswith("cuda")))
    assert backend.array_module(ours.packed) is xp
    with pytest.raises(ValueError, match=r"holds 4099 NaN or Inf \(the first is nan at \(50000,\)\)"):
        quantize(xp.asarray(w), code=how["code"], blocksize=blocksize, rule=rule)
    w[~np.isfinite(w)] = 3
    theirs, ours = (quantize(x, double_quant=True, blocksize=blocksize, rule=rule) for x in (w, xp.asarray(w)))
    assert all(same(getattr(ours, part), getattr(theirs, part)) for part in ("packed", "absmax_codes", "nested_absmax"))
    assert ours.offset == theirs.offset


# ---------------------------------------------------------------------------------------------------------------- operations
def both(operation, xp, rng, *arrays, bound=1e-6, plain=(), **options):
    """Value and gradients by kernels and by NumPy, at most `bound` of the largest number apart."""
    results = []
    for where in (np, xp):
        xs = [Tensor(where.asarray(a), requires_grad=True) for a in arrays]
        y = operation(*xs, *(where.asarray(a) for a in plain), **options)
        results.append((y, xs))
    (y, xs), (z, zs) = results
    assert backend.array_module(z.data) is xp and z.dtype == f32 and z.shape == y.shape
    g = rng.standard_normal(y.shape).astype(f32)
    before = launched()
    y.backward(g)
    z.backward(xp.asarray(g))
    pairs = [(y.data, z.data), *((a.grad, b.grad) for a, b in zip(xs, zs, strict=True))]
    for theirs, ours in pairs:
        assert np.abs(host(ours) - theirs).max() <= bound * max(np.abs(theirs).max(), 1e-30)
    return pairs, launched(before)


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 192), (1, 1), (3, 2049)])
def test_rms_norm(shape, xp, rng):
    x, w = rng.standard_normal(shape).astype(f32), rng.standard_normal(shape[-1]).astype(f32)
    both(ops.rms_norm, xp, rng, x, w, bound=4e-6, eps=1e-5)


@pytest.mark.parametrize("b, t, heads, d", [(2, 7, 3, 16), (1, 1, 1, 2), (2, 33, 4, 48)])
def test_rope_in_every_bit(b, t, heads, d, xp, rng):
    cos, sin = ops.rope_table(np.arange(5, 5 + t), d)
    x = rng.standard_normal((b, t, heads, d)).astype(f32)
    pairs, _ = both(ops.rope, xp, rng, x, plain=(cos, sin), bound=0)
    assert len(pairs) == 2


def test_wrong_and_stretched_arguments_are_left_to_the_operation(xp, rng):
    x, w = rng.standard_normal((1, 6)).astype(f32), rng.standard_normal(1).astype(f32)
    both(ops.rms_norm, xp, rng, x, w, bound=4e-6)
    cos, sin = ops.rope_table(np.arange(1), 8)
    both(ops.rope, xp, rng, rng.standard_normal((1, 5, 2, 8)).astype(f32), plain=(cos, sin), bound=0)
    a = Tensor(xp.asarray(f32(0.5)), requires_grad=True)
    assert ops.swiglu(a, a).shape == ()


def test_a_gradient_in_float64_is_no_other_number(xp, rng):
    x, w = rng.standard_normal((3, 4, 2, 8)).astype(f32), rng.standard_normal(8).astype(f32)
    g, cos_sin = rng.standard_normal((3, 4, 2, 8)), ops.rope_table(np.arange(4), 8)
    for operation in (
        lambda x, where: ops.rms_norm(x, Tensor(where.asarray(w))),
        lambda x, where: ops.rope(x, *map(where.asarray, cos_sin)),
        lambda x, where: ops.swiglu(x, x),
        lambda x, where: ops.causal_attention(x, x, x),
    ):
        found = []
        for where in (np, xp):
            leaf = Tensor(where.asarray(x), requires_grad=True)
            operation(leaf, where).backward(where.asarray(g))
            found.append(host(leaf.grad))
        assert np.abs(found[1] - found[0]).max() < 1e-5 * np.abs(found[0]).max()


def test_swiglu(xp, rng):
    a, b = (rng.standard_normal((4, 5, 33)) * 4).astype(f32), rng.standard_normal((4, 5, 33)).astype(f32)
    _, kernels = both(ops.swiglu, xp, rng, a, b, bound=1e-6)
    assert xp is not fake_cupy or kernels == 1
    both(ops.swiglu, xp, rng, a, b[:1, :1], bound=1e-5)  # which is stretched: left to arrays


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [True, False])
def test_cross_entropy(reduction, masked, xp, rng):
    z, targets = (rng.standard_normal((3, 11, 70)) * 5).astype(f32), rng.integers(0, 70, (3, 11))
    mask = (rng.random((3, 11)) < 0.6).astype(f32) if masked else None
    plain = (targets,) if mask is None else (targets, mask)
    both(ops.softmax_cross_entropy, xp, rng, z, plain=plain, bound=3e-6, reduction=reduction)
    targets[1, 2] = 70
    loss = ops.softmax_cross_entropy(Tensor(xp.asarray(z)), *map(xp.asarray, (targets,)), reduction=reduction)
    assert np.isnan(host(loss.data)), "a target out of range is no silent number"
    with pytest.raises(ValueError, match="targets must be"):
        ops.softmax_cross_entropy(Tensor(xp.asarray(z)), xp.asarray(targets[:2]))


def test_embedding(xp, rng):
    w, ids = rng.standard_normal((20, 6)).astype(f32), rng.integers(0, 20, (3, 4))
    y = ops.embedding(xp.asarray(ids), Tensor(xp.asarray(w), requires_grad=True))
    assert same(y.data, w[ids])
    ids[0, 0], ids[1, 1] = -1, 20
    bad = host(ops.embedding(xp.asarray(ids), Tensor(xp.asarray(w))).data)
    assert np.isnan(bad[[0, 1], [0, 1]]).all() and np.isfinite(bad).sum() == 10 * 6


@pytest.mark.parametrize("dtype, bound", [("float32", 3e-6), ("bfloat16", 2.0**-6), ("float16", 2.0**-9)])
@pytest.mark.parametrize(
    "t, s, heads, groups, window",
    [
        (1, 1, 1, 1, None),
        (9, 9, 4, 2, None),
        (40, 40, 6, 1, 7),
        (5, 12, 4, 4, None),
        (1, 30, 4, 2, 8),
        (70, 75, 2, 1, 16),
    ],
)
def test_attention(t, s, heads, groups, window, dtype, bound, xp, rng, monkeypatch):
    q = rng.standard_normal((2, t, heads, 8)).astype(f32)
    k, v = (rng.standard_normal((2, s, groups, 8)).astype(f32) for _ in range(2))
    for scores in (1 << 29, 1):  # in one piece, and in blocks of 64 queries
        monkeypatch.setattr(device, "_SCORES", scores)
        both(ops.causal_attention, xp, rng, q, k, v, bound=bound, window=window, compute_dtype=dtype)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 2.0**-7), ("float16", 2.0**-10)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_mean_the_same_on_a_device(dtype, bound, biased, xp, rng):
    x, w = rng.standard_normal((3, 5, 64)).astype(f32), rng.standard_normal((24, 64)).astype(f32)
    bias = [rng.standard_normal(24).astype(f32)] if biased else []
    pairs, _ = both(ops.linear, xp, rng, x, w, *bias, bound=bound, compute_dtype=dtype)
    q = quantize(w, double_quant=True)

    def frozen(x, *bias):
        on = q if isinstance(x.data, np.ndarray) else q.to(lambda a: backend.move(a, xp))
        return ops.linear_frozen(x, on, *bias, compute_dtype=dtype)

    pairs += both(frozen, xp, rng, x, *bias, bound=bound)[0]
    if dtype == "bfloat16" and biased:  # rounded once: the product alone is 1.0058…, and 1.0078… if it is rounded
        a, b, one = (xp.asarray(np.array(x, f32)) for x in ([[1, 2.0**-8]], [[1, 1.5]], [-1]))
        assert host(ops.linear(Tensor(a), Tensor(b), Tensor(one), compute_dtype=dtype).data).item() == 1.5 * 2.0**-8
    if dtype != "float32":
        assert all(same(ours, products.rounded(host(ours), dtype)) for _, ours in pairs), "the result is rounded"


@pytest.mark.parametrize("dtype", products.DTYPES)
@pytest.mark.parametrize("a_t", [True, False])
@pytest.mark.parametrize("b_t", [True, False])
def test_stacks_of_matrices(a_t, b_t, dtype, xp, rng):
    a, b = rng.standard_normal((2, 3, 5, 7)).astype(f32), rng.standard_normal((2, 3, 7, 4)).astype(f32)
    a, b = (products.rounded(x, dtype) for x in (a, b))
    ours = [np.ascontiguousarray(x.swapaxes(-1, -2)) if turned else x for x, turned in ((a, a_t), (b, b_t))]
    y = products.batched(*(products.held(xp.asarray(x), dtype) for x in ours), a_t, b_t)
    assert y.dtype.itemsize == (4 if dtype == "float32" else 2)
    bound = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert np.abs(host(y).astype(f32) - a @ b).max() <= bound * np.abs(a @ b).max()


def test_a_gpu_without_bfloat16_is_told_so(xp, monkeypatch):
    if xp is not fake_cupy:
        pytest.skip("this one has it, or the other tests say")
    monkeypatch.setattr(fake_cupy.cuda, "Device", lambda: SimpleNamespace(compute_capability="75"))
    products.multiplied_in.cache_clear()
    try:
        x = Tensor(xp.ones((2, 4), f32))
        with pytest.raises(
            ValueError, match=r"capability 75, and products of bfloat16 begin with 80 \(Ampere\); use 'float16'"
        ):
            ops.linear(x, x, compute_dtype="bfloat16")
        assert host(ops.linear(x, x, compute_dtype="float16").data)[0, 0] == 4
    finally:
        products.multiplied_in.cache_clear()


@pytest.mark.parametrize("dtype", products.DTYPES)
@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 5, 12)])
def test_numbers_are_rounded_and_added_four_at_a_time_in_every_bit(shape, dtype, xp, rng):
    x = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-42, 6, shape)).astype(f32)
    x.reshape(-1)[:8] = np.nan, np.inf, -np.inf, 0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-45
    scale = f32(rng.uniform(0.1, 3))
    assert casts.vectorizable(xp.asarray(x)) and not casts.vectorizable(xp.asarray(x), 6) and not casts.vectorizable(x)
    with np.errstate(all="ignore"):
        y, z = round_to(x, dtype), round_to(x * scale, dtype)
        total = y + z * scale
    before = launched()
    ours = casts.to_16bit(xp.asarray(x), dtype, scale)
    assert same(ours[0], y) and same(ours[1], z) and ours[0].dtype.itemsize == (4 if dtype == "float32" else 2)
    assert same(casts.to_16bit(xp.asarray(x), dtype), y)
    assert same(casts.to_float32(*ours, scale), total) and same(casts.to_float32(ours[0]), y)
    assert xp is not fake_cupy or launched(before) == 4
    if len(shape) == 4:
        turn = shape[1:]
        assert same(casts.to_16bit(xp.asarray(x), dtype, swap=turn).reshape(2, 5, 3, 12), y.swapaxes(1, 2))
        assert same(casts.to_float32(ours[0], swap=turn).reshape(2, 5, 3, 12), y.swapaxes(1, 2))


@pytest.mark.parametrize("dtype", products.DTYPES)
@pytest.mark.parametrize(
    "rows, n, out, r, backward",
    [((2, 3), 64, 24, 4, "stored"), ((5,), 21, 13, 3, "forward"), ((1, 1), 32, 7, 1, "stored")],
)
@pytest.mark.parametrize("trained", ["x A B", "x B", "A"])
def test_a_layer_and_its_bypass_in_one_operation_are_the_two_in_every_bit(
    trained, rows, n, out, r, backward, dtype, xp, rng, monkeypatch
):
    """Sizes in whole fours and others, 4 bits and 16, an x that lies in columns, and with the operation made again by a checkpoint."""
    weight = rng.standard_normal((out, n)).astype(f32)
    base = Linear4bit(quantize(weight, double_quant=True), compute_dtype=dtype, backward_weight=backward)
    if out == 7:
        dense = Linear(n, out)
        dense.weight.data = weight
        base = Linear16bit.of(dense, dtype)
    x, g, b, a = (rng.standard_normal(shape).astype(f32) for shape in ((*rows, n), (*rows, out), (out, r), (r, n)))
    found = {}
    for name in ("in one", "checkpointed", "composed"):
        layer = LoRALinear(base, r=r, alpha=6)
        layer.lora_A.weight.data, layer.lora_B.weight.data = a, b
        layer.lora_A.compute_dtype = layer.lora_B.compute_dtype = dtype
        layer.to(xp)
        layer.lora_A.requires_grad_("A" in trained)
        layer.lora_B.requires_grad_("B" in trained)
        given = Tensor(xp.asarray(np.asfortranarray(x)), requires_grad="x" in trained)
        if name == "composed":
            monkeypatch.setattr(LoRALinear, "fused_forward", lambda layer, x: None)
        h = checkpoint(layer, given) if name == "checkpointed" else layer(given)
        # with a frozen factor the composed operations keep less on the tape
        fused = name == "in one" and trained == "x A B"
        assert name == "checkpointed" or (h._node.name == "lora_linear") == fused
        h.backward(xp.asarray(np.asfortranarray(g)))
        found[name] = h.data, given.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad
    for name in ("in one", "checkpointed"):
        for ours, theirs in zip(found[name], found["composed"], strict=True):
            if theirs is None:
                assert ours is None
                continue
            assert xp is not fake_cupy or same(ours, theirs)  # cuBLAS may choose another order for another shape
            bound = {"float32": 1e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]
            assert np.abs(host(ours) - host(theirs)).max() <= bound * max(np.abs(host(theirs)).max(), 1e-30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_and_matrices_that_do_not_fit_are_an_error(dtype, xp, rng):
    def matrix(*shape):
        return xp.asarray(rng.standard_normal(shape).astype(f32))

    for a, b in (((4, 8), (12, 4)), ((4, 8), (4, 8)), ((2, 4, 8), (3, 8, 4)), ((4, 8), (7,))):
        with pytest.raises(ValueError):
            products.product(matrix(*a), matrix(*b), dtype)
    with pytest.raises(ValueError, match="do not fit"):
        products.batched(products.held(matrix(2, 4, 8), dtype), products.held(matrix(3, 8, 4), dtype))
    assert products.product(matrix(4, 8), matrix(3, 8, 4), dtype).shape == (3, 4, 4)
    for shape_a, shape_b in (((4, 128), (8, 4)), ((4, 32), (8, 4)), ((4, 64), (8, 3))):
        layer = LoRALinear(Linear4bit(quantize(np.ones((8, 64), f32)), compute_dtype=dtype), r=4).to(xp)
        layer.lora_A.compute_dtype = layer.lora_B.compute_dtype = dtype
        layer.lora_A.weight.data, layer.lora_B.weight.data = matrix(*shape_a), matrix(*shape_b)
        with pytest.raises(ValueError, match="linear: x has"):
            layer(Tensor(matrix(3, 64)))


def test_what_is_not_one_operation_is_composed(xp, rng):
    x, layer = Tensor(xp.asarray(rng.standard_normal((3, 64)).astype(f32))), tiny.adapted().to(xp)
    assert layer.fused_forward(x) is not None and tiny.adapted(dropout=0.5).to(xp).eval().fused_forward(x) is not None
    for one in tiny.composed():
        assert one.to(xp).fused_forward(x) is None
        one(x)
    frozen = tiny.composed()[0].to(xp)
    with no_grad():
        assert frozen.fused_forward(x) is not None
    assert layer.fused_forward(x.data) is None  # an array that is no Tensor
    with setting("around", lambda f, *arguments, **options: f(*arguments, **options)):
        assert layer.fused_forward(x) is None


# ---------------------------------------------------------------------------------------------------------------- optimizers
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_in_every_bit(decay, xp, rng):
    n = 1000
    start = [rng.standard_normal(n).astype(f32), np.zeros(n, f32), np.zeros(n, f32)]
    theirs, ours = [x.copy() for x in start], [xp.asarray(x) for x in start]
    for t in range(1, 4):
        g = (rng.standard_normal(n) * 10.0 ** rng.uniform(-6, 3, n)).astype(f32)
        g[:3] = np.nan, np.inf, 0
        how = (t, 1e-3, (0.9, 0.999), 1e-8, decay)
        with np.errstate(all="ignore"):
            adamw_step(theirs[0], g, *theirs[1:], *how)
        device.adamw_step(ours[0], xp.asarray(g), *ours[1:], *how)
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True)), t


@pytest.mark.parametrize("n", [1, 256, 1000])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_in_8_bits_in_every_bit(n, decay, xp, rng):
    def fresh(where):
        return [
            where.zeros(n, np.uint8),
            where.zeros(n, np.uint8),
            where.zeros(-(-n // 256), f32),
            where.zeros(-(-n // 256), f32),
        ]

    p = rng.standard_normal(n).astype(f32)
    theirs, ours = [p.copy(), *fresh(np)], [xp.asarray(p), *fresh(xp)]
    for t in range(1, 5):
        g = np.where(rng.random(n) < 0.3, 0, rng.standard_normal(n) * 10.0 ** rng.uniform(-8, 2, n)).astype(f32)
        g[:256] *= t != 3
        if n > 500 and t == 2:
            g[300:303] = np.nan, np.inf, 1e25
        before = launched()
        adamw8bit_step(theirs[0], g, *theirs[1:], t, 1e-3, weight_decay=decay)
        adamw8bit_step(ours[0], xp.asarray(g), *ours[1:], t, 1e-3, weight_decay=decay)
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True)), t
        assert xp is not fake_cupy or launched(before) == 1


# --------------------------------------------------------------------------------------------------------------- a whole step
def small(where, compute_dtype="float32"):
    backend.seed(3)
    model = Llama(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    quantize_linears(model, compute_dtype=compute_dtype)
    add_lora(model, r=4)
    for name, w in model.trainable():
        w.data = (np.random.default_rng(len(name)).standard_normal(w.shape) * 0.1).astype(f32)
    return model.compute_in(compute_dtype).to(where)


def step(model, optimizer, ids, where):
    loss = ops.softmax_cross_entropy(model(ids[:, :-1]), where.asarray(ids[:, 1:]))
    loss.backward()
    norm = clip_grad_norm([p for _, p in model.trainable()], 1.0)
    optimizer.step()
    return loss, norm


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 0.05), ("float16", 0.01)])
def test_a_step_is_numpys(dtype, bound, xp, rng):
    ids, found = rng.integers(0, 64, (2, 20)), []
    for where in (np, xp):
        model = small(where, dtype)
        loss, norm = step(model, AdamW(model.trainable(), pager=None if where is np else pager(where)), ids, where)
        found.append((float(loss.item()), norm, {name: host(p.grad) for name, p in model.trainable()}))
    (loss, norm, theirs), (loss_too, norm_too, ours) = found
    assert abs(loss_too - loss) < bound * loss and abs(norm_too - norm) < bound * norm
    largest = max(np.abs(g).max() for g in theirs.values())
    assert max(np.abs(ours[name] - g).max() for name, g in theirs.items()) < bound * largest


def pager(where):
    from tinylora import Pager

    return Pager(device=where)


def test_a_step_waits_for_the_device_twice(xp, rng):
    """For the norm of the gradients, and for the loss of its one micro-batch: what the host does not know and needs."""
    if xp is not fake_cupy:
        pytest.skip("the stand-in counts")
    model, ids = small(xp, "bfloat16"), rng.integers(0, 64, (2, 20))
    optimizer = AdamW(model.trainable(), pager=pager(xp))
    step(model, optimizer, ids, xp)
    fake_cupy.counters.update(stops=0)
    loss, _ = step(model, optimizer, ids, xp)
    assert fake_cupy.counters["stops"] == 1 and loss.item() > 0 and fake_cupy.counters["stops"] == 2


def test_what_was_compiled_is_kept_for_the_next_process(xp, monkeypatch, tmp_path):
    def kernel():
        cuda._module.cache_clear()
        cuda._kernel.cache_clear()
        x = xp.ones((2, 8), f32)
        assert same(ops.rms_norm(Tensor(x), Tensor(xp.ones(8, f32)), eps=0.0).data, np.ones((2, 8), f32))

    xp.ones((2, 8), f32) + xp.ones(8, f32)  # CuPy compiles its own kernels by the same function
    kernel()
    compiler, compiled = xp.cuda.compiler, []
    make = compiler.compile_using_nvrtc
    monkeypatch.setattr(compiler, "compile_using_nvrtc", lambda *a: (compiled.append(1), make(*a))[1])
    monkeypatch.setattr(cuda, "folder", lambda: tmp_path / "kept")
    for _ in range(2):
        kernel()
    (kept,) = (tmp_path / "kept").iterdir()
    assert len(compiled) == 1 and kept.suffix == ".cubin"
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40], b"x" + whole[1:]):  # half a file, or another's
        kept.write_bytes(damaged)
        kernel()
        assert compiled.pop() and kept.read_bytes() == whole
    monkeypatch.setattr(cuda, "folder", lambda: None)
    kernel()
    assert compiled.pop()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cuda, "folder", lambda: tmp_path / "file")  # no folder, and none can be made
    for _ in range(2):
        kernel()
    assert len(compiled) == 3
    cuda._module.cache_clear()
    cuda._kernel.cache_clear()


def test_a_machine_without_kernels_computes_as_before(rng):
    assert not cuda.available(np) and not cuda.available(fake_cupy)
    x = fake_cupy.asarray(rng.standard_normal((3, 8)).astype(f32))
    assert not device.compiles(x)
    ops.rms_norm(Tensor(x), Tensor(fake_cupy.ones(8, f32)))


def test_the_source_is_short_and_compiles_for_a_gpu(tmp_path):
    lines = cuda.source().splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 140
    compiler = next((name for name in ("/usr/local/cuda/bin/nvcc", "nvcc") if _runs(name)), None)
    if compiler is None:
        pytest.skip("no nvcc")
    (tmp_path / "cuda.cu").write_text(cuda.source())
    for architecture in ("sm_75", "sm_80", "sm_90"):
        command = [
            compiler,
            "--fmad=false",
            "-std=c++17",
            f"-arch={architecture}",
            "-cubin",
            "-o",
            str(tmp_path / "x"),
            "cuda.cu",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr


def _runs(name):
    try:
        return subprocess.run([name, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False
