"""The GPU's rounding rule against what a GPU wrote, and its kernels spelled out; where it parts from the CPU's; signed absmax."""

from fractions import Fraction

import numpy as np
import plain
import pytest
from goldens import INDEX, INDEX_CUDA, QUANT_CUDA, arrays, make_goldens

from tinylora import codebooks, quantize
from tinylora.dtypes import from_bfloat16_bits
from tinylora.kernels import reciprocal, rounding
from tinylora.kernels.rounding import CPU, CUDA, cuda_quantize_8bit

TREES = {"nf4": plain.cuda_nf4, "fp4": plain.cuda_fp4}
f32 = np.float32


def same(a, b):
    """Equal values; NaN equals NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


# ------------------------------------------------------------------------------------------------------------- what a GPU wrote
@pytest.mark.parametrize("place", range(len(INDEX["cases"])), ids=[case["name"] for case in INDEX["cases"]])
def test_the_gpu_rule_is_what_a_gpu_wrote(place):
    """Can 4-bit weights be dequantized on a CPU? (bitsandbytes issues 1311 and 1551; notebooks/04_blockwise_absmax.py, section 3)"""
    given, case = INDEX["cases"][place], INDEX_CUDA["cases"][place]
    assert [case[name] for name in ("kind", "code", "blocksize", "dtype", "shape", "nested")] == [
        given[name] for name in ("kind", "code", "blocksize", "dtype", "shape", "nested")
    ]
    w, theirs = arrays(given)["input_" + case["dtype"]].reshape(case["shape"]), arrays(case, QUANT_CUDA)
    w = from_bfloat16_bits(w) if case["dtype"] == "bfloat16" else w
    how = {"rule": "bitsandbytes-cuda", "check_finite": False}
    q = quantize(w, case["code"], case["blocksize"], **how)
    assert same(q.packed, theirs["packed"]) and same(q.absmax, theirs["absmax"])
    assert same(q.dequantize("float32").reshape(-1), theirs["deq_float32"])
    assert same(q.dequantize("bfloat16").reshape(-1), from_bfloat16_bits(theirs["deq_bfloat16"]))
    assert same(q.dequantize("float16").reshape(-1), theirs["deq_float16"])
    if case["nested"]:
        q = quantize(w, case["code"], case["blocksize"], double_quant=True, offset=theirs["offset"][0], **how)
        assert same(q.absmax_codes, theirs["codes"]) and same(q.nested_absmax, theirs["nested"])


@pytest.mark.parametrize("case", INDEX_CUDA["blockwise8"], ids=lambda case: f"{case['kind']}-{case['i']}")
def test_the_gpu_rule_in_8_bits_is_what_a_gpu_wrote(case):
    i, kind, theirs = case["i"], getattr(make_goldens, case["kind"]), arrays(case, QUANT_CUDA)
    blocksize, n = (256, 64, 128)[i % 3], (300, 512, 257, 200)[i % 4]
    x = kind(np.random.default_rng([2110, 2861, i]), n, None, blocksize).astype(f32)
    x = x if case["signed"] or kind is make_goldens.normal else np.abs(x)
    with np.errstate(all="ignore"):
        codes, absmax = cuda_quantize_8bit(x, codebooks.dynamic8(case["signed"]), blocksize)
    assert same(codes, theirs["b8_codes"]) and same(absmax, theirs["b8_absmax"])


def test_a_boundary_is_the_midpoints_decimal_rounded_once():
    """In the source's own decimals (tests/plain.py): four of NF4's fifteen are the float32 beside the midpoint."""
    values = codebooks.nf4()
    ours, middle = rounding.decimal_midpoints(values), codebooks.midpoints(values)
    edges = [(x, np.nextafter(x, f32(2))) for x in ours]
    assert all(plain.cuda_nf4(x) == i and plain.cuda_nf4(above) == i + 1 for i, (x, above) in enumerate(edges))
    apart = np.flatnonzero(
        ours != middle
    )  # boundary i lies between values i and i + 1: 1, 9, 13 and 15 are the upper ones
    assert apart.tolist() == [0, 8, 12, 14] and (apart + 1).tolist() == [1, 9, 13, 15]
    assert [float(x).hex() for x in ours[[0, 8, 12, 14]]] == [
        "-0x1.b239b20000000p-1",
        "0x1.ec90c60000000p-4",
        "0x1.00da060000000p-1",
        "0x1.b913b20000000p-1",
    ]
    assert [f"{x:.4f}" for x in ours[[0, 8, 12, 14]]] == ["-0.8481", "0.1203", "0.5017", "0.8615"]
    assert (np.abs(ours.view(np.int32) - middle.view(np.int32)) <= 1).all(), (
        "so that of each, 1 float32 is rounded otherwise"
    )


def test_what_a_gpu_wrote_has_the_16_values_of_nf4_and_no_neighbours_of_them():
    """Were one of the 16 values an ulp off in the CUDA kernel, a product that it wrote would not be the one of codebooks.nf4()."""
    products = []
    for case in INDEX_CUDA["cases"]:
        if case["code"] == "nf4" and not case["nested"]:
            theirs = arrays(case, QUANT_CUDA)
            codes = np.stack([theirs["packed"] >> 4, theirs["packed"] & 15], axis=1).ravel()[
                : theirs["deq_float32"].size
            ]
            products.append(
                (codes, np.repeat(theirs["absmax"], case["blocksize"])[: codes.size], theirs["deq_float32"])
            )
    codes, m, written = (np.concatenate(part) for part in zip(*products, strict=True))
    fine = (m > 1e-30) & (m < 1e30)
    codes, m, written = codes[fine], m[fine], written[fine]
    values = codebooks.nf4()
    assert same(values[codes] * m, written) and len(set(codes.tolist())) == 16
    for i in range(16):
        here = codes == i
        for other in (np.nextafter(values[i], f32(2)), np.nextafter(values[i], f32(-2))):
            assert not same(other * m[here], written[here]), i


def test_the_gpus_reciprocal(rng):
    """Never further than an ulp from the nearest, as its table says; the same mantissa at every exponent; zeros for denormals."""
    x = np.concatenate([2.0 ** rng.uniform(-100, 125, 20000), [1, 2, 3, 2.0**-126, 2.0**126]]).astype(f32)
    y = reciprocal.rcp(x)
    nearest = f32(1) / x  # all of them normal numbers
    assert (np.abs(y.view(np.int32) - nearest.view(np.int32)) <= 1).all() and 0.1 < (y != nearest).mean() < 0.17
    assert (reciprocal.rcp(-x) == -y).all() and (
        reciprocal.rcp(np.float32(2.0**-20) * x[:1000]) == y[:1000] * 2.0**20
    ).all()
    assert (
        max(abs(Fraction(float(a)) * Fraction(float(b)) - 1) for a, b in zip(x[:300], y[:300], strict=True)) < 2.0**-23
    )
    odd = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 2.0**127], f32)
    assert same(reciprocal.rcp(odd), np.array([np.inf, -np.inf, 0, -0.0, np.nan, np.inf, -np.inf, 0], f32))


# ------------------------------------------------------------------------------------------------------- the kernels spelled out
def inputs(rng, n, code):
    """Numbers of all sizes, ties and their neighbours, blocks of zeros, denormals, and what is no number."""
    w = (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 3, n)).astype(f32)
    points = np.concatenate([codebooks.midpoints(codebooks.get(code)[1]), [0.00260417, 0.0859375, 0.583333]]).astype(
        f32
    )
    near = (rng.choice(points[points != 0], n).view(np.int32) + rng.integers(-1, 2, n)).astype(np.int32).view(f32)
    kind = rng.integers(0, 6, n)
    w = np.where(kind == 0, near, w)
    w[::32] = 1.0
    for start in range(0, n, 64):
        case, part = rng.integers(0, 10), slice(start, start + 64)
        if case == 0:
            w[part] = 0
        elif case == 1:
            w[part] = rng.standard_normal(len(w[part])) * 1e-39
        elif case == 2:
            w[part] = w[part] * f32(2.0**126)
        elif case == 3:
            w[start + rng.integers(len(w[part]))] = rng.choice([np.nan, np.inf, -np.inf])
        elif case == 4:
            w[part] = np.nan
    return w


@pytest.mark.parametrize("code", TREES)
@pytest.mark.parametrize(
    "n, blocksize", [(1, 64), (2, 64), (63, 64), (64, 64), (1000, 64), (999, 32), (4097, 128), (641, 64)]
)
def test_the_gpu_rule_is_its_kernel_spelled_out(code, n, blocksize, rng):
    with np.errstate(all="ignore"):
        w = inputs(rng, n, code)
        codes, absmax = plain.cuda_quantize_4bit(w, TREES[code], blocksize)
    q = quantize(w, code, blocksize, rule="bitsandbytes-cuda", check_finite=False)
    assert q.absmax.tobytes() == absmax.tobytes()
    assert q.packed.tolist() == (codes[0::2] << 4 | codes[1::2]).tolist()


@pytest.mark.parametrize("signed", [True, False])
def test_the_gpu_rule_in_8_bits_is_its_search_spelled_out(signed, rng):
    code = codebooks.dynamic8(signed)
    ties = codebooks.midpoints(code)
    x = np.concatenate(
        [
            ties,
            np.nextafter(ties, f32(2)),
            np.nextafter(ties, f32(-2)),
            code,
            rng.uniform(-1, 1, 2000).astype(f32),
            [np.nan],
        ]
    ).astype(f32)
    x[np.abs(x) < 2.0**-126] = 0
    x[0] = 1
    codes, absmax = cuda_quantize_8bit(x, code, blocksize=len(x))  # the largest is 1, so nothing is rescaled
    assert absmax.tolist() == [1.0] and codes.tolist() == [plain.cuda_8bit(code, v) for v in x]


def test_ordinary_weights_are_coded_alike_by_both_rules(rng):
    """But for one in some ten million, which lies within the rounding of a quotient of the middle between two values."""
    w = rng.standard_normal(64 * 4000).astype(f32)
    for code in ("nf4", "int4"):
        cpu, gpu = (quantize(w, code, rule=rule) for rule in ("bitsandbytes-cpu", "bitsandbytes-cuda"))
        assert cpu.absmax.tobytes() == gpu.absmax.tobytes()
        apart = np.flatnonzero(cpu.indices() != gpu.indices())
        x, values = w[apart].astype(float) / cpu.absmax[apart // 64], np.sort(cpu.code.astype(float))
        middles = (values[:-1] + values[1:]) / 2
        assert len(apart) <= 5 and all(np.abs(middles - one).min() < 2.0**-22 for one in x)


def test_where_the_rules_part():
    def indices(w, code="nf4", blocksize=4):
        w = np.array(w, f32)
        return [
            quantize(w, code, blocksize, rule=r, check_finite=False).indices().tolist()
            for r in ("bitsandbytes-cpu", "bitsandbytes-cuda")
        ]

    assert indices([0, 0, 0, 0]) == [[7, 7, 7, 7], [0, 0, 0, 0]]  # a block of zeros
    assert indices([1, np.nan, 0, -1]) == [[15, 15, 15, 15], [15, 0, 7, 0]]  # NaN
    assert indices([1, np.inf, 0, -1]) == [[7, 15, 7, 7], [7, 0, 7, 7]]  # infinity
    assert indices([1, -0.75, 0.75, -0.001], "fp4") == [[3, 10, 2, 0], [3, 10, 2, 8]]  # a small negative number
    middle = float(codebooks.midpoints(codebooks.get("fp4")[1])[1])
    assert (
        indices([1, middle, -middle, 0], "fp4")[0][2] != indices([1, middle, -middle, 0], "fp4")[1][2]
    )  # a negative tie


def test_8_bit_rounding_of_zero_is_where_the_cpu_rule_errs():
    x = np.array([0.0, 1.0, -0.5], f32)
    code = codebooks.dynamic8()
    (cpu, _), (gpu, _) = CPU.quantize_8bit(x, code), CUDA.quantize_8bit(x, code)
    assert code[gpu[0]] == 0 and cpu[0] == 131 and round(float(code[131]), 7) == 2.12e-05


@pytest.mark.parametrize("rule", ["bitsandbytes-cpu", "bitsandbytes-cuda"])
@pytest.mark.parametrize("nested", codebooks.NESTED)
def test_constants_in_8_bits_are_the_nearest_code_but_for_the_table(nested, rule, rng):
    w = (rng.standard_normal((700, 64)) * rng.lognormal(0, 0.3, (700, 1))).astype(f32)
    exact, q = quantize(w), quantize(w, double_quant=True, rule=rule, nested_code=nested)
    code, scale = q.constants.code, np.repeat(q.nested_absmax, 256)[:700]
    error = np.abs(q.absmax - exact.absmax)
    nearest = np.abs(code[None, :] * scale[:, None] + q.offset - exact.absmax[:, None]).min(axis=1)
    slack = scale * (2 / 65535 if rule.endswith("cpu") else 1e-6)
    assert (error <= nearest + slack + 1e-6).all()
    assert q.packed.tobytes() == quantize(w, rule=rule).packed.tobytes()


#: Squared error of NF4 in blocks of 64 of normal weights over that with float32 constants, less 1, for 2^22 weights: mean and standard
#: deviation over 30 draws. {8-bit code: (with the mean, without)}
COST = {
    "dynamic8": ((0.00051, 0.00004), (0.00516, 0.00014)),
    "fp8_e4m3": ((0.00200, 0.00006), (0.09198, 0.00083)),
    "fp8_e5m2": ((0.00794, 0.00018), (0.36608, 0.00270)),
    "int8": ((0.00022, 0.00002), (0.00162, 0.00005)),
}


def test_what_double_quantization_costs_with_and_without_the_mean(rng):
    w = rng.standard_normal(1 << 22).astype(f32)

    def cost(**how):
        return np.square(quantize(w, **how).dequantize() - w).mean(dtype=np.float64)

    exact = cost()
    for nested, (with_mean, without) in COST.items():
        for offset, (expected, deviation) in ((None, with_mean), (0.0, without)):
            more = cost(double_quant=True, nested_code=nested, offset=offset) / exact - 1
            assert abs(more - expected) < 6 * deviation, (nested, offset, more)


def test_a_signed_scale_spoils_the_mean(rng):
    w = rng.standard_normal(1 << 22).astype(f32)
    code = codebooks.bof4(64, "mse", signed=True)

    def cost(**how):
        return np.square(quantize(w, code, signed=True, **how).dequantize() - w).mean(dtype=np.float64)

    for nested, expected, deviation in (("dynamic8", 0.0058, 0.00015), ("fp8_e4m3", 0.106, 0.001)):
        more = cost(double_quant=True, nested_code=nested) / cost() - 1
        assert abs(more - expected) < 6 * deviation, (nested, more)


def test_signed_absmax_makes_the_largest_plus_one(rng):
    w = rng.standard_normal((50, 64)).astype(f32)
    q = quantize(w, codebooks.bof4(64, "mse", signed=True), signed=True)
    top = np.abs(w).argmax(axis=1)
    assert (q.absmax == w[np.arange(50), top]).all() and (q.indices()[np.arange(50), top] == 15).all()
    assert (q.dequantize()[np.arange(50), top] == w[np.arange(50), top]).all()
    tie = np.array([-2, 2, 0, 1], f32)
    assert quantize(tie, blocksize=4, signed=True).absmax.tolist() == [2.0]


def test_a_whole_tensor_is_one_block(rng):
    w = rng.standard_normal((37, 11)).astype(f32)
    q = quantize(w, blocksize=None)
    assert q.blocksize == w.size and q.absmax.tolist() == [np.abs(w).max()]
    assert q.packed.tobytes() == quantize(w, blocksize=w.size).packed.tobytes()
    for rule in ("bitsandbytes-cpu", "bitsandbytes-cuda"):
        assert quantize(np.zeros((0, 3), f32), blocksize=None, double_quant=True, rule=rule).dequantize().shape == (
            0,
            3,
        )


@pytest.mark.parametrize("blocksize", [16, 48, 4096])
@pytest.mark.parametrize("rule", ["bitsandbytes-cpu", "bitsandbytes-cuda"])
def test_any_block_size_comes_back_within_half_a_step(blocksize, rule, rng):
    w = rng.standard_normal(10_000).astype(f32)
    q = quantize(w, "int4", blocksize, rule=rule)
    scale = np.repeat(q.absmax, blocksize)[: len(w)]
    assert (np.abs(q.dequantize() - w) <= scale / 14 * 1.00001).all()


def test_the_gpu_rule_refuses_what_is_no_number_too():
    w = np.ones(70, f32)
    w[3] = np.nan
    with pytest.raises(ValueError, match="holds 1 NaN or Inf"):
        quantize(w, rule="bitsandbytes-cuda")
    assert quantize(np.full(70, 3e38, f32), rule="bitsandbytes-cuda").size == 70  # large, and a number
    with pytest.raises(ValueError, match="nested_code 'fp9'"):
        quantize(np.ones(4, f32), nested_code="fp9")
