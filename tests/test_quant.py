"""Quantization: bitsandbytes' golden cases bit for bit, the fast path against the plain one, and what a QuantizedTensor says of itself."""

from dataclasses import replace

import numpy as np
import plain
import pytest
from goldens import INDEX, QUANT, arrays

from tinylora import Tensor, backend, codebooks, ops, quantize
from tinylora.dtypes import BFloat16Array, bfloat16_bits, from_bfloat16_bits, round_to
from tinylora.kernels import dequantize, products, rounding
from tinylora.kernels.rounding import cpu_quantize_8bit, torch_mean


def same(a, b):
    """Equal shapes and values; NaN equals NaN, and −0 equals 0 (fp4's two zeros)."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


@pytest.mark.parametrize("case", INDEX["cases"], ids=lambda c: c["name"])
def test_golden(case):
    g = arrays(case)
    w = g["input_" + case["dtype"]].reshape(case["shape"])
    if case["dtype"] == "bfloat16":
        w = from_bfloat16_bits(w)
    q = quantize(w, case["code"], case["blocksize"], case["nested"], check_finite=False)
    assert same(q.packed, g["packed"])
    if case["nested"]:
        assert same(q.absmax_codes, g["absmax_codes"])
        assert same(q.nested_absmax, g["nested_absmax"])
        assert same(np.array([q.offset]), g["offset"])
    else:
        assert same(q.absmax, g["absmax"])
    assert q.shape == tuple(case["shape"]) and q.size == w.size
    assert same(q.dequantize("float32").reshape(-1), g["dequantized_float32"])
    assert same(q.dequantize("bfloat16").reshape(-1), from_bfloat16_bits(g["dequantized_bfloat16"]))
    assert same(q.dequantize("float16").reshape(-1), g["dequantized_float16"])


@pytest.mark.parametrize("case", INDEX["blockwise8"], ids=lambda c: c["kind"])
def test_golden_8bit(case):
    g = arrays(case)
    with np.errstate(all="ignore"):
        codes, absmax = cpu_quantize_8bit(g["blockwise8_input"], codebooks.dynamic8(case["signed"]), case["blocksize"])
    assert same(codes, g["blockwise8_codes"]) and same(absmax, g["blockwise8_absmax"])


@pytest.mark.parametrize(
    "n, blocksize", [(0, 256), (1, 256), (256, 256), (70_001, 256), (999, 7), (40_000, 40_000), (90_000, 50_000)]
)
def test_rounding_to_8_bits_in_buffers_is_the_plain_rule(n, blocksize, rng):
    """Of numbers of all sizes, blocks of zeros and of denormals, the largest floats, NaN and infinities among them."""
    for signed in (True, False):
        code, x = (
            codebooks.dynamic8(signed),
            rng.standard_normal(n) * 10.0 ** rng.uniform(-44, 37, -(-n // 16)).repeat(16)[:n],
        )
        x = x.astype(np.float32)
        for i, what in enumerate((0, 1e-45, -3e-39, 3.4e38, np.nan, np.inf)):
            x[3 * i * blocksize :][:blocksize] = what
        x[rng.integers(max(n, 1), size=n // 3000)] = rng.choice([np.nan, np.inf, -np.inf], n // 3000)
        with np.errstate(all="ignore"):
            (ours, absmax), (codes, largest) = (
                f(x, code, blocksize) for f in (cpu_quantize_8bit, plain.cpu_quantize_8bit)
            )
        assert same(ours, codes) and same(absmax, largest)


def test_the_mean_is_torchs_for_every_golden_size():
    for n, expected in zip(QUANT["mean_size"].tolist(), QUANT["mean"], strict=True):
        k = np.arange(n, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
        x = (k >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
        assert torch_mean(x).tobytes() == expected.tobytes(), n


@pytest.mark.parametrize("rule", ["bitsandbytes-cpu", "bitsandbytes-cuda"])
@pytest.mark.parametrize("n, blocksize", [(4096, 64), (4097, 64), (4031, 64), (5000, 7), (5001, 3000), (900, 2000)])
def test_pieces_of_a_weight_give_the_bits_of_the_whole(n, blocksize, rule, rng, monkeypatch):
    for signed, code in ((False, "nf4"), (False, "fp4"), (True, codebooks.bof4(signed=True))):
        w = rng.standard_normal(n).astype(np.float32)
        w[7] = 0 if signed else np.nan
        how = {"rule": rule, "signed": signed, "check_finite": False}
        monkeypatch.setattr(rounding, "_CHUNK", 1 << 18)
        whole = quantize(w, code, blocksize, **how)
        monkeypatch.setattr(rounding, "_CHUNK", 500)
        pieces = quantize(w, code, blocksize, **how)
        assert same(whole.packed, pieces.packed) and same(whole.absmax, pieces.absmax)
    w[[7, n - 1]] = 1, np.inf
    with pytest.raises(ValueError, match=rf"1 NaN or Inf \(the first is inf at \({n - 1},\)\)"):
        quantize(w, blocksize=blocksize, rule=rule)


@pytest.mark.parametrize("code", ["nf4", "int4", "custom"])
@pytest.mark.parametrize(
    "n, blocksize", [(1, 64), (63, 64), (64, 64), (1000, 64), (999, 32), (515, 128), (300, 7), (260, 1), (4097, 4096)]
)
@pytest.mark.parametrize("large", [False, True], ids=["pairs", "quadruples"])
def test_the_fast_path_is_the_plain_one(code, n, blocksize, large, rng, monkeypatch):
    monkeypatch.setattr(dequantize, "_LARGE", 0 if large else n + 1)
    monkeypatch.setattr(dequantize, "_CHUNK", 100)
    values = np.sort(rng.standard_normal(11)).astype(np.float32) if code == "custom" else codebooks.get(code)[1]
    w = (rng.standard_normal(n) * 10.0 ** rng.integers(-30, 30, n)).astype(np.float32)
    ties = rng.integers(0, n, n // 4)
    w[ties] = rng.choice(codebooks.midpoints(values), len(ties))
    if n > 2 * blocksize:
        w[blocksize : 2 * blocksize] = 0
    q = quantize(w, values if code == "custom" else code, blocksize)
    codes, absmax = plain.quantize_4bit(w, values, blocksize)
    assert same(q.indices(), codes) and same(q.absmax, absmax)
    assert same(q.packed, plain.pack(codes, int((codebooks.midpoints(values) < 0).sum())))
    expected = plain.dequantize_4bit(codes, absmax, values, blocksize)
    assert q.dequantize().tobytes() == expected.tobytes()
    ready = np.full(n, np.nan, np.float32)
    assert q.dequantize(out=ready) is ready and ready.tobytes() == expected.tobytes()
    assert dequantize.for_product(q, "float32").tobytes() == expected.tobytes()
    assert q.dequantize("bfloat16", out=ready) is ready and ready.tobytes() == round_to(expected, "bfloat16").tobytes()
    flushed = replace(q, rule="bitsandbytes-cuda")  # denormals are zeros under this rule
    assert flushed.dequantize(out=ready) is ready and ready.tobytes() == flushed.dequantize().tobytes()


@pytest.mark.parametrize(
    "out",
    [
        np.empty(64, np.float32),
        np.empty((8, 8)),
        np.empty((8, 8), np.float32).T,
        np.frombuffer(bytes(256), np.float32).reshape(8, 8),
        np.empty((8, 16), np.float32)[:, ::2],
        [0.0] * 64,
    ],
    ids=["shape", "dtype", "order", "read-only", "gaps", "list"],
)
def test_what_cannot_hold_the_weight_is_refused(out):
    q = quantize(np.ones((8, 8), np.float32))
    with pytest.raises(
        ValueError, match=r"dequantize: out is .*, expected a NumPy array, float32 \(8, 8\), in one piece and writeable"
    ):
        q.dequantize(out=out)


def test_float16_goes_into_no_float32():
    with pytest.raises(ValueError, match="out is float32 and cannot hold float16"):
        quantize(np.ones((8, 8), np.float32)).dequantize("float16", out=np.empty((8, 8), np.float32))


def test_the_memory_of_a_product_is_used_again_and_a_result_never_lies_in_it(rng):
    """Two layers of one shape, one after the other: neither the outputs nor the gradients change when the other's weight comes."""
    x, g = (rng.standard_normal((3, 8)).astype(np.float32) for _ in range(2))
    weights = [quantize(rng.standard_normal((8, 8)).astype(np.float32)) for _ in range(2)]
    assert not np.shares_memory(dequantize.for_product(weights[0], "float32"), weights[0].dequantize())
    assert np.shares_memory(*(dequantize.for_product(q, "float32") for q in weights))
    inputs = [Tensor(x, requires_grad=True) for _ in weights]
    outputs = [ops.linear_frozen(given, q) for given, q in zip(inputs, weights, strict=True)]
    for y in outputs:
        y.backward(g)
    for given, y, q in zip(inputs, outputs, weights, strict=True):
        w = q.dequantize()
        assert y.data.tobytes() == (x @ w.T).tobytes() and given.grad.tobytes() == (g @ w).tobytes()


def test_large_inputs_cross_the_chunks(rng):
    w = rng.standard_normal(1_300_001).astype(np.float32)
    q = quantize(w, blocksize=64)
    step = 64 * 1000
    for start in range(0, len(w), step):
        part = quantize(w[start : start + step], blocksize=64)
        assert same(part.indices(), q.indices()[start : start + step])
        assert same(part.absmax, q.absmax[start // 64 : (start + step) // 64 + (start + step > len(w))])


@pytest.mark.parametrize("blocksize", [64, 7, 100_000, None])
def test_dequantizing_crosses_the_chunks(blocksize, rng):
    w = rng.standard_normal(int(rng.integers(300_000, 400_000))).astype(np.float32)
    q = quantize(w, "fp4", blocksize)
    expected = q.code[q.indices()] * np.repeat(q.absmax, q.blocksize)[: len(w)]
    assert q.dequantize().tobytes() == expected.tobytes()


def test_bits_per_parameter_of_a_large_layer(rng):
    w = rng.standard_normal((4096, 4096)).astype(np.float32)
    assert quantize(w).bits_per_param == 4.5
    q = quantize(w, double_quant=True)
    assert q.nbytes == w.size // 2 + w.size // 64 + w.size // 64 // 256 * 4 + 4
    assert round(q.bits_per_param, 3) == 4.127
    assert q.size == 4096 * 4096 and q.shape == (4096, 4096)
    saved = 0.5 - (8 / 64 + 32 / (64 * 256))  # QLoRA §3: 0.373 bits a weight, about 3 GB for a 65B model
    assert saved == 0.373046875 and round(saved * 65.286e9 / 8 / 1e9, 2) == 3.04
    assert abs((4.5 - q.bits_per_param) - saved) <= 32 / q.size  # the one mean


def test_double_quantization_restores_absmax_closely(rng):
    w = rng.standard_normal((256, 256)).astype(np.float32)
    exact, nested = quantize(w), quantize(w, double_quant=True)
    assert same(exact.packed, nested.packed)
    error = np.abs(exact.absmax - nested.absmax).max() / np.abs(exact.absmax - nested.offset).max()
    assert 0 < error < 0.02
    assert quantize(w, double_quant=True, offset=1.5).offset == np.float32(1.5)
    assert nested.double_quant and not exact.double_quant and exact.offset is None


def test_nan_and_inf_are_refused_by_name():
    w = np.ones((3, 4), np.float32)
    w[1, 2], w[2, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"layers\.7\.weight holds 2 NaN or Inf \(the first is nan at \(1, 2\)\)"):
        quantize(w, name="layers.7.weight")
    assert np.isnan(quantize(w, check_finite=False).dequantize()).any()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: quantize(np.ones(4, np.float32), blocksize=0), "blocksize = 0"),
        (lambda: quantize(np.ones(4, np.float32), rule="mine"), "rule 'mine' is unknown"),
        (lambda: quantize(np.arange(4)), "expected a float array"),
        (lambda: quantize([1.0, 2.0]), "expected a float array"),
    ],
)
def test_errors_are_sentences(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_empty_tensors_are_fine():
    q = quantize(np.zeros((0, 4), np.float32), double_quant=True)
    assert q.dequantize().shape == (0, 4) and q.size == 0


def test_a_device_gives_the_same_bits(xp, rng):
    for shape, double in (((5, 13), True), ((64, 64), False), ((640, 129), True)):
        w = rng.standard_normal(shape).astype(np.float32)
        q, there = quantize(w, double_quant=double), quantize(xp.asarray(w), double_quant=double)
        assert backend.array_module(there.packed) is xp
        for dtype in ("float32", "bfloat16", "float16"):
            ours = products.widened(backend.move(there.dequantize(dtype), "cpu"))  # two bytes a number, there
            assert ours.tobytes() == products.widened(q.dequantize(dtype)).tobytes()


def test_bfloat16_arrays_are_quantized_as_their_float32_values(rng):
    w = round_to(rng.standard_normal((9, 70)).astype(np.float32), "bfloat16")
    expected = quantize(w, double_quant=True)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for same_w in (BFloat16Array.of(w), w.astype(ml_dtypes.bfloat16)):
        q = quantize(same_w, double_quant=True)
        assert q.dtype == "bfloat16" and q.packed.tobytes() == expected.packed.tobytes()
        assert q.dequantize().tobytes() == expected.dequantize("bfloat16").tobytes()


def test_codes_are_shared_and_read_only(rng):
    a, b = (quantize(rng.standard_normal(100).astype(np.float32), double_quant=True) for _ in range(2))
    assert a.code is b.code and a.constants.code is b.constants.code and not a.code.flags.writeable


def test_bfloat16_rounds_to_nearest_even(rng):
    x = rng.integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    low, high = (x.view(np.uint32) & 0xFFFF0000).view(np.float32), None
    with np.errstate(over="ignore"):
        high = ((x.view(np.uint32) & 0xFFFF0000).astype(np.uint64) + 0x10000).astype(np.uint32).view(np.float32)
    down, up = np.abs(x.astype(np.float64) - low), np.abs(high.astype(np.float64) - x)
    even = (low.view(np.uint32) >> 16) % 2 == 0
    expected = np.where((down < up) | ((down == up) & even), low, high)
    finite = np.isfinite(high)
    assert round_to(x, "bfloat16")[finite].tobytes() == expected[finite].tobytes()
    assert np.isnan(round_to(np.array([np.nan], np.float32), "bfloat16")[0])
    assert round_to(np.float32(1.5).reshape(()), "bfloat16").shape == ()
    assert bfloat16_bits(np.array([np.inf, -np.inf, -0.0], np.float32)).tolist() == [0x7F80, 0xFF80, 0x8000]


def test_bfloat16_array_has_the_face_of_a_quantized_tensor(rng):
    w = rng.standard_normal((3, 5)).astype(np.float32)
    b = BFloat16Array.of(w)
    assert (b.shape, b.size, b.nbytes, b.bits_per_param) == ((3, 5), 15, 30, 16.0)
    assert b.dequantize().tobytes() == round_to(w, "bfloat16").tobytes()


@pytest.mark.parametrize("shape", [(0, 4), (0,)])
def test_a_weight_without_elements_has_no_bits_per_parameter(shape):
    for q in (quantize(np.zeros(shape, np.float32)), BFloat16Array.of(np.zeros(shape, np.float32))):
        with pytest.raises(ValueError, match="no element"):
            _ = q.bits_per_param


@pytest.mark.parametrize("double_quant", [False, True])
def test_arrays_of_the_other_byte_order_mean_the_same_numbers(double_quant, rng):
    """Quantized from them, and dequantized by a code that lies in that order."""
    w = rng.standard_normal((6, 64)).astype(np.float32)
    q = quantize(w, double_quant=double_quant)
    assert quantize(w.astype(">f4"), double_quant=double_quant).packed.tobytes() == q.packed.tobytes()
    turned = replace(q, code=q.code.astype(">f4"))
    assert turned.dequantize("float32").tobytes() == q.dequantize("float32").tobytes()
