"""The real libraries as witnesses: bitsandbytes, torch, transformers and PEFT compute the same thing from the same random inputs.

Quantization is compared bit for bit. Whatever goes through a matrix product is compared within a tolerance, since
another BLAS adds in another order; the largest relative error is printed (pytest -s shows it).

Where a library disagrees with itself, the comparison goes round it: dequantized values are taken with shape (n, 1),
because the AVX-512 kernel reads a wrong absmax if rows are a multiple of 16 but not of the blocksize; layers are
compared in train mode, because in eval mode that kernel rounds absmax to bfloat16; and torch runs on one thread, so
that its means add in a fixed order.
"""

import copy
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinylora as tl
from tinylora import Tensor, adapters, codebooks, nn, ops
from tinylora.data import base_folder, jargon
from tinylora.dtypes import bfloat16_bits
from tinylora.interop import peft as adapter_files
from tinylora.kernels.rounding import cpu_quantize_8bit, torch_mean
from tinylora.models.llama import Llama, LlamaConfig
from tinylora.optim import clip_grad_norm
from tinylora.quant import quantize
from tinylora.training.corpus import Pairs

pytestmark = pytest.mark.oracle

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # the same arithmetic, without waiting for a compiler
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
F = torch.nn.functional

CODES = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(autouse=True)
def one_thread():
    """torch.mean adds in another order on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def array(tensor):
    """A torch tensor as a NumPy array; bfloat16 comes as float32, which is exact."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def same_bits(ours, theirs):
    """Equal dtype, shape and bits, signs of zeros included; any NaN equals any other."""
    ours, theirs = np.asarray(ours), array(theirs) if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    if ours.dtype.kind == "f":
        ours, theirs = (np.where(np.isnan(x), x.dtype.type(np.nan), x) for x in (ours, theirs))
    return ours.tobytes() == theirs.tobytes()


def agree(ours, theirs, tolerance, what="values"):
    """max |ours - theirs| / max |theirs| is below the tolerance, which is printed with the error."""
    ours, theirs = np.asarray(ours, np.float64), array(theirs).astype(np.float64)
    assert ours.shape == theirs.shape, what
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)
    print(f"{what}: relative error {error:.2e} (allowed {tolerance:.0e})")
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


# ------------------------------------------------------------------------------------------------------ the code tables
def test_the_four_bit_tables_are_bitsandbytes_tables():
    for name in CODES:
        assert same_bits(codebooks.NAMED[name](), bnb.functional.get_4bit_type(name, device="cpu")), name


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_bitsandbytes_map(signed):
    assert same_bits(codebooks.dynamic8(signed), bnb.functional.create_dynamic_map(signed=signed))


def test_linspace_is_torchs_in_every_bit(rng):
    grids = [(codebooks.NF4_OFFSET, 0.5, 8), (codebooks.NF4_OFFSET, 0.5, 9), *((0.1, 1.0, 2**i + 1) for i in range(9))]
    grids += [
        (float(np.float32(rng.uniform(-2, 2))), float(np.float32(rng.uniform(-2, 2))), int(rng.integers(2, 300)))
        for _ in range(200)
    ]
    for start, stop, n in grids:
        assert same_bits(codebooks.linspace_f32(start, stop, n), torch.linspace(start, stop, n)), (start, stop, n)


# --------------------------------------------------------------------------------------------------------- quantization
def check_quantization(values, code, blocksize, dtype, nested):
    """Every stored number and every dequantized one equals bitsandbytes', bit for bit. values: float32, any shape."""
    w = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(getattr(torch, dtype))
    packed, state = bnb.functional.quantize_4bit(w, blocksize=blocksize, quant_type=code, compress_statistics=nested)
    q = quantize(w.numpy() if dtype == "float16" else array(w), code, blocksize, nested, check_finite=False)
    assert q.dtype == ("float16" if dtype == "float16" else "float32")
    assert same_bits(q.packed, packed.reshape(-1)), "packed"
    if nested:
        restored = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert same_bits(q.absmax_codes, state.absmax), "codes of absmax"
        assert same_bits(q.nested_absmax, state.state2.absmax), "nested absmax"
        assert same_bits(q.offset, state.offset), "offset"
        assert same_bits(q.constants.code, state.state2.code), "nested code"
        assert same_bits(q.absmax, restored), "restored absmax"
    else:
        assert same_bits(q.absmax, state.absmax), "absmax"
    assert same_bits(q.code, state.code), "code"
    for name in DTYPES:
        state.dtype, state.shape = getattr(torch, name), torch.Size((q.size, 1))
        dequantized = bnb.functional.dequantize_4bit(packed, state).reshape(q.shape)
        assert same_bits(q.dequantize(name), dequantized), f"dequantized to {name}"


def scales(rng, n, blocksize, low, high):
    """10^u, one u in [low, high) a block, repeated for its n elements."""
    return np.repeat(10.0 ** rng.uniform(low, high, -(-n // blocksize)), blocksize)[:n]


def near_ties(rng, n, blocksize, code):
    """Midpoints between code values, a few units in the last place to either side, at a power of two or at any scale."""
    points = codebooks.midpoints(codebooks.NAMED[code]())
    x = rng.choice(points[points != 0], n).view(np.int32) + rng.integers(-2, 3, n)
    scale = 2.0 ** rng.integers(-20, 20) if rng.random() < 0.5 else 10.0 ** rng.uniform(-4, 4)
    x = x.astype(np.int32).view(np.float32) * np.float32(scale)
    x[::blocksize] = np.float32(scale)
    return x


def with_zero_blocks(rng, n, blocksize, code):
    zero = np.repeat(rng.random(-(-n // blocksize)) < 0.5, blocksize)[:n]
    return np.where(zero, rng.choice([0.0, -0.0], n), rng.standard_normal(n))


def with_special_values(rng, n, blocksize, code):
    x = rng.standard_normal(n)
    x[rng.integers(n, size=1 + n // 100)] = rng.choice([np.nan, np.inf, -np.inf])
    return x


CONTENTS = {
    "normal": lambda rng, n, blocksize, code: rng.standard_normal(n),
    "weights": lambda rng, n, blocksize, code: rng.standard_normal(n) * 0.02,
    "heavy tails": lambda rng, n, blocksize, code: rng.standard_t(2, n),
    "blocks of many scales": lambda rng, n, blocksize, code: rng.standard_normal(n) * scales(rng, n, blocksize, -3, 2),
    "few values": lambda rng, n, blocksize, code: rng.integers(-7, 8, n) / 7,
    "equal": lambda rng, n, blocksize, code: np.full(n, rng.standard_normal()),
    "denormal": lambda rng, n, blocksize, code: rng.standard_normal(n) * 1e-40,
    "absmax near the clamp": lambda rng, n, blocksize, code: (
        rng.standard_normal(n) * scales(rng, n, blocksize, -41, -36)
    ),
    "huge": lambda rng, n, blocksize, code: np.clip(rng.standard_normal(n), -1, 1) * 3.4e38,
    "any bits": lambda rng, n, blocksize, code: (
        rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32).view(np.float32)
    ),
    "near ties": near_ties,
    "zero blocks": with_zero_blocks,
    "NaN or Inf": with_special_values,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("contents", CONTENTS)
def test_quantization_is_bitsandbytes_in_every_bit(contents, code, dtype, rng):
    for blocksize in BLOCKSIZES:
        n = int(
            rng.choice(
                [
                    rng.integers(1, 4),
                    rng.integers(1, 3 * blocksize),
                    blocksize * rng.integers(1, 4),
                    rng.integers(1, 5000),
                ]
            )
        )
        with np.errstate(all="ignore"):
            values = np.asarray(CONTENTS[contents](rng, n, blocksize, code)).astype(np.float32)
        nested = bool(rng.integers(2))
        print(f"n = {n}, blocksize = {blocksize}, nested = {nested}")
        check_quantization(values, code, blocksize, dtype, nested)


@pytest.mark.parametrize("shape", [(1,), (2,), (7, 13), (4, 96), (3, 5, 11), (190, 1), (1, 190), (65, 64)])
@pytest.mark.parametrize("code", CODES)
def test_blocks_run_along_the_flattened_weight(code, shape, rng):
    check_quantization(rng.standard_normal(shape), code, 64, str(rng.choice(DTYPES)), bool(rng.integers(2)))


@pytest.mark.parametrize("blocks", [255, 256, 257, 1500, 40_000])
def test_double_quantization_of_many_blocks_is_bitsandbytes_in_every_bit(blocks, rng):
    n = 32 * blocks - int(rng.integers(32))
    check_quantization(
        rng.standard_normal(n) * scales(rng, n, 32, -3, 0), str(rng.choice(CODES)), 32, str(rng.choice(DTYPES)), True
    )


@settings(max_examples=150, deadline=None, database=None)
@given(
    values=hnp.arrays(
        np.float32, st.integers(1, 150), elements=st.floats(width=32, allow_subnormal=True), fill=st.nothing()
    ),
    code=st.sampled_from(CODES),
    blocksize=st.sampled_from((32, 64, 128)),
    dtype=st.sampled_from(DTYPES),
    nested=st.booleans(),
)
def test_whatever_hypothesis_thinks_of_is_quantized_as_by_bitsandbytes(values, code, blocksize, dtype, nested):
    check_quantization(values, code, blocksize, dtype, nested)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bit_rounding_is_bitsandbytes_in_every_bit(signed, rng):
    code = codebooks.dynamic8(signed)
    for contents in CONTENTS:
        n, blocksize = int(rng.integers(1, 2000)), int(rng.choice([64, 100, 256, 4096]))
        with np.errstate(all="ignore"):
            x = np.asarray(CONTENTS[contents](rng, n, blocksize, "nf4")).astype(np.float32)
            codes, absmax = cpu_quantize_8bit(x if signed else np.abs(x), code, blocksize)
        theirs, state = bnb.functional.quantize_blockwise(
            torch.from_numpy(x if signed else np.abs(x)), torch.from_numpy(code), blocksize=blocksize
        )
        assert same_bits(codes, theirs) and same_bits(absmax, state.absmax), (contents, n, blocksize)


def test_the_mean_is_torchs_in_every_bit(rng):
    for n in (*range(1, 70), *rng.integers(70, 5000, 60).tolist(), *rng.integers(5000, 300_000, 15).tolist()):
        x = rng.lognormal(-3, 1, n).astype(np.float32)
        assert same_bits(torch_mean(x), torch.from_numpy(x).mean()), n


def test_rounding_to_bfloat16_is_torchs_for_any_bits(rng):
    x = CONTENTS["any bits"](rng, 200_000, 0, "")
    numbers = x[~np.isnan(x)]
    assert same_bits(bfloat16_bits(numbers), torch.from_numpy(numbers).to(torch.bfloat16).view(torch.uint16))
    assert same_bits(tl.dtypes.round_to(x, "bfloat16"), torch.from_numpy(x).to(torch.bfloat16))


# ------------------------------------------------------------------------------------------------------ the 4-bit layer
def their_linear4bit(w, bias, code, blocksize, nested, compute_dtype):
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=bias is not None, compute_dtype=compute_dtype)
    layer.weight = bnb.nn.Params4bit(
        torch.from_numpy(w),
        requires_grad=False,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=code,
        module=layer,
    )
    if bias is not None:
        layer.bias.data = torch.from_numpy(bias.copy())
    return layer.to("cpu").train()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_linear4bit_and_its_input_gradient_are_bitsandbytes(code, nested, rng):
    for blocksize, bias in ((32, True), (64, False), (128, True)):
        w, b = (
            rng.standard_normal((160, 256)).astype(np.float32),
            rng.standard_normal(160).astype(np.float32) if bias else None,
        )
        x, g = rng.standard_normal((3, 5, 256)).astype(np.float32), rng.standard_normal((3, 5, 160)).astype(np.float32)
        theirs = their_linear4bit(w, b, code, blocksize, nested, torch.float32)
        ours = nn.Linear4bit(quantize(w, code, blocksize, nested), None if b is None else Tensor(b))
        ours_x, theirs_x = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
        y, z = ours(ours_x), theirs(theirs_x)
        y.backward(g)
        z.backward(torch.from_numpy(g))
        agree(y.data, z, 2e-6, "forward")
        agree(ours_x.grad, theirs_x.grad, 2e-6, "input gradient")


@pytest.mark.parametrize("code", CODES)
def test_linear4bit_in_bfloat16_rounds_where_bitsandbytes_rounds(code, rng):
    w, x = rng.standard_normal((64, 128)).astype(np.float32), rng.standard_normal((40, 128)).astype(np.float32)
    g = rng.standard_normal((40, 64)).astype(np.float32)
    theirs = their_linear4bit(w, None, code, 64, True, torch.bfloat16)
    ours = nn.Linear4bit(quantize(w, code, 64, True), compute_dtype="bfloat16")
    ours_x, theirs_x = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    y, z = ours(ours_x), theirs(theirs_x)
    y.backward(g)
    z.backward(torch.from_numpy(g))
    for what, a, b in (("forward", y.data, array(z)), ("input gradient", ours_x.grad, array(theirs_x.grad))):
        assert same_bits(a, tl.dtypes.round_to(a, "bfloat16")) and same_bits(b, tl.dtypes.round_to(b, "bfloat16")), what
        assert (a == b).mean() > 0.97, what  # a float32 sum in another order rarely falls on the other side of a tie
        np.testing.assert_allclose(a, b, rtol=2.0**-7, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- the operations
def compare(ours, theirs, *arrays, rng):
    """Values and all gradients of two functions of float64 arrays, for a random output gradient."""
    xs = [Tensor(a, requires_grad=True) for a in arrays]
    ts = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, z = ours(*xs), theirs(*ts)
    assert y.shape == tuple(z.shape) and y.dtype == np.float64
    g = np.asarray(rng.standard_normal(y.shape))
    y.backward(g)
    z.backward(torch.from_numpy(g))
    np.testing.assert_allclose(y.data, array(z), rtol=1e-10, atol=1e-10)
    for x, t in zip(xs, ts, strict=True):
        np.testing.assert_allclose(x.grad, array(t.grad), rtol=1e-10, atol=1e-10)


ACTIVATIONS = {
    "relu": (ops.relu, F.relu),
    "sigmoid": (ops.sigmoid, torch.sigmoid),
    "softmax": (ops.softmax, lambda t: F.softmax(t, -1)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_torchs(name, rng):
    compare(*ACTIVATIONS[name], rng.standard_normal((4, 5, 33)) * 4, rng=rng)


def test_swiglu_is_torchs(rng):
    a, b = rng.standard_normal((2, 4, 33)) * 4
    compare(ops.swiglu, lambda a, b: F.silu(a) * b, a, b, rng=rng)


def test_normalizations_and_linear_are_torchs(rng):
    x, w = rng.standard_normal((3, 7, 24)) * 3, rng.standard_normal(24)
    for eps in (1e-5, 1e-6, 0.1):
        compare(
            lambda x, w, eps=eps: ops.rms_norm(x, w, eps=eps),
            lambda x, w, eps=eps: F.rms_norm(x, (24,), w, eps),
            x,
            w,
            rng=rng,
        )
    compare(ops.linear, F.linear, x, rng.standard_normal((5, 24)), rng.standard_normal(5), rng=rng)


@pytest.mark.parametrize("t, s", [(1, 1), (9, 9), (130, 130), (1, 12), (5, 12), (70, 150)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_causal_attention_with_grouped_heads_is_torchs(heads, kv_heads, t, s, rng):
    q, k, v = (rng.standard_normal((2, n, h, 8)) for n, h in ((t, heads), (s, kv_heads), (s, kv_heads)))
    seen = {"is_causal": True} if t == s else {"attn_mask": torch.ones(t, s, dtype=torch.bool).tril(s - t)}

    def theirs(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **seen).transpose(1, 2)

    compare(ops.causal_attention, theirs, q, k, v, rng=rng)


def test_rotary_positions_are_transformers(rng):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = ops.rope_table(rng.integers(0, 500, 11), 16, theta=500.0, dtype=np.float64)
    wide = [torch.from_numpy(np.concatenate([a, a], 1))[None] for a in (cos, sin)]
    compare(
        lambda x: ops.rope(x, cos, sin),
        lambda t: apply_rotary_pos_emb(t, t, *wide, unsqueeze_dim=2)[0],
        rng.standard_normal((3, 11, 4, 16)),
        rng=rng,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_masked_cross_entropy_is_torchs_with_an_ignored_index(reduction, rng):
    logits, targets, mask = rng.standard_normal((4, 9, 13)) * 5, rng.integers(0, 13, (4, 9)), rng.random((4, 9)) < 0.4
    mask[0, 0] = True
    labels = torch.from_numpy(np.where(mask, targets, -100))
    compare(
        lambda z: ops.softmax_cross_entropy(z, targets, mask.astype(np.float64), reduction=reduction),
        lambda z: F.cross_entropy(z.reshape(-1, 13), labels.reshape(-1), reduction=reduction),
        logits,
        rng=rng,
    )


def test_embedding_adds_up_the_gradients_of_a_repeated_token_as_torch_does(rng):
    ids = rng.integers(0, 6, (4, 9))
    compare(
        lambda w: ops.embedding(ids, w),
        lambda w: F.embedding(torch.from_numpy(ids), w),
        rng.standard_normal((6, 5)),
        rng=rng,
    )


# -------------------------------------------------------------------------------------------------------- the optimizer
@pytest.mark.parametrize(
    "lr, betas, eps, decay",
    [(1e-3, (0.9, 0.999), 1e-8, 0.0), (1e-2, (0.8, 0.95), 1e-6, 0.1), (2e-4, (0.9, 0.999), 1e-8, 0.01)],
)
def test_twenty_steps_of_adamw_are_torchs(lr, betas, eps, decay, rng):
    starts = [rng.standard_normal(shape).astype(np.float32) for shape in ((7, 33), (100,), (1,))]
    ours, theirs = (
        [Tensor(x.copy(), requires_grad=True) for x in starts],
        [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in starts],
    )
    # two groups, of which the second has a rate and a decay of its own
    groups = [lambda p: {"params": p[:2]}, lambda p: {"params": p[2:], "lr": 3 * lr, "weight_decay": 0.5}]
    a = tl.AdamW([group(ours) for group in groups], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    b = torch.optim.AdamW([group(theirs) for group in groups], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    for _ in range(20):
        for x, t in zip(ours, theirs, strict=True):
            x.grad = (rng.standard_normal(x.shape) * 10.0 ** rng.uniform(-4, 1)).astype(np.float32)
            t.grad = torch.from_numpy(x.grad.copy())
        a.step()
        b.step()
    for x, t in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x.data, array(t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.3, 1000.0])
def test_clipping_is_torchs(max_norm, rng):
    grads = [rng.standard_normal(shape).astype(np.float32) for shape in ((7, 33), (100,))]
    ours, theirs = (
        [Tensor(np.zeros_like(g), requires_grad=True) for g in grads],
        [torch.nn.Parameter(torch.zeros(g.shape)) for g in grads],
    )
    for x, t, g in zip(ours, theirs, grads, strict=True):
        x.grad, t.grad = g.copy(), torch.from_numpy(g.copy())
    assert clip_grad_norm(ours, max_norm) == pytest.approx(
        torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), rel=1e-5
    )
    for x, t in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x.grad, array(t.grad), rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------ the Llama
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "odd sizes": {
        "tie_word_embeddings": False,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "rope_theta": 700.0,
        "rms_norm_eps": 1e-3,
    },
}


def random_llama(rng, **sizes):
    """A tiny model of fresh random weights; the norms' weights, which start at one, are random too."""
    tl.seed(int(rng.integers(2**32)))
    model = Llama(LlamaConfig(**{**TINY, **sizes}))
    for w in model.parameters():
        if w.ndim == 1:
            w.data = rng.uniform(0.5, 1.5, w.shape).astype(np.float32)
    return model


def open_in_transformers(folder, cls=None, dtype=torch.float32, **options):
    """The folder's model, in train mode; nothing may be missing or left over."""
    cls = cls or transformers.AutoModelForCausalLM
    model, report = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.train()


def random_ids(rng, tokens=40):
    return rng.integers(0, 256, (2, tokens))


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(ids, np.int64))).logits


def losses(ours, theirs, ids):
    """Mean cross-entropy of the next token in both models, backward done."""
    a = ops.softmax_cross_entropy(ours(ids[:, :-1]), ids[:, 1:])
    b = F.cross_entropy(
        theirs(torch.from_numpy(ids[:, :-1])).logits.flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten()
    )
    a.backward()
    b.backward()
    return a.item(), b.item()


def gradients_agree(ours, theirs, rename=lambda name: name, atol=1e-4):
    """The same parameters ask for a gradient in both models, and the gradients agree; atol is a part of the largest entry."""
    ours = {rename(name): w.grad for name, w in ours.trainable()}
    theirs = {name: array(w.grad) for name, w in theirs.named_parameters() if w.requires_grad}
    assert ours.keys() == theirs.keys()
    largest = {name: float(np.abs(g).max()) for name, g in theirs.items()}
    assert min(largest.values()) > 0, largest
    worst = max(float(np.abs(ours[name] - g).max()) / largest[name] for name, g in theirs.items())
    print(f"gradients of {len(theirs)} parameters: relative error {worst:.2e}")
    for name, g in theirs.items():
        np.testing.assert_allclose(ours[name], g, rtol=1e-3, atol=atol * largest[name], err_msg=name)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_saved_llama_opens_in_transformers_with_the_same_logits(config, rng, tmp_path):
    model, ids = random_llama(rng, **CONFIGS[config]), random_ids(rng)
    model.save_pretrained(tmp_path, dtype="float32")
    for cls in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        theirs = open_in_transformers(tmp_path, cls)
        assert isinstance(theirs, transformers.LlamaForCausalLM)
        agree(model(ids).data, their_logits(theirs, ids), 1e-4, "logits")


@pytest.mark.parametrize("config", CONFIGS)
def test_a_llama_saved_in_bfloat16_opens_in_transformers_with_the_same_weights(config, rng, tmp_path):
    model, ids = random_llama(rng, **CONFIGS[config]), random_ids(rng)
    model.save_pretrained(tmp_path, dtype="bfloat16")
    theirs = open_in_transformers(tmp_path, dtype="auto")
    for name, w in model.named_parameters():
        assert theirs.get_parameter(name).dtype == torch.bfloat16
        assert same_bits(tl.dtypes.round_to(w.data, "bfloat16"), theirs.get_parameter(name)), name
    reopened = Llama.from_pretrained(tmp_path)
    agree(reopened(ids).data, their_logits(open_in_transformers(tmp_path), ids), 1e-4, "logits")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_llama_that_transformers_saved_opens_here_with_the_same_logits(tied, dtype, rng, tmp_path):
    torch.manual_seed(int(rng.integers(2**32)))
    config = transformers.LlamaConfig(
        **TINY,
        vocab_size=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 2000.0},
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path)
    ids = random_ids(rng)
    agree(Llama.from_pretrained(tmp_path)(ids).data, their_logits(open_in_transformers(tmp_path), ids), 1e-4, "logits")


def test_a_config_in_the_older_spelling_means_the_same_to_both(rng, tmp_path):
    model, ids = random_llama(rng, rope_theta=300.0), random_ids(rng)
    model.save_pretrained(tmp_path, dtype="float32")
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "head_dim", "dtype"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32", "rope_scaling": None}))
    agree(Llama.from_pretrained(tmp_path)(ids).data, their_logits(open_in_transformers(tmp_path), ids), 1e-4, "logits")
    agree(model(ids).data, their_logits(open_in_transformers(tmp_path), ids), 1e-4, "logits")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_parameter_of_a_llama_has_transformers_gradient(config, checkpointing, rng, tmp_path):
    ours = random_llama(rng, **CONFIGS[config])
    ours.gradient_checkpointing = checkpointing
    ours.save_pretrained(tmp_path, dtype="float32")
    theirs = open_in_transformers(tmp_path)
    a, b = losses(ours, theirs, random_ids(rng))
    assert a == pytest.approx(b, rel=1e-5)
    gradients_agree(ours, theirs)


def test_the_loss_on_an_answer_is_transformers_loss_with_the_prompt_labelled_minus_100(rng, tmp_path):
    ours = random_llama(rng)
    ours.save_pretrained(tmp_path, dtype="float32")
    pairs = [
        (rng.integers(0, 256, p).tolist(), rng.integers(0, 256, a).tolist())
        for p, a in ((5, 3), (2, 9), (8, 1), (0, 4))
    ]
    ids, labels = np.zeros((4, 13), np.int64), np.full((4, 13), -100)
    for row, label, (prompt, answer) in zip(ids, labels, pairs, strict=True):
        row[: len(prompt + answer)] = prompt + answer
        label[len(prompt) : len(prompt + answer)] = answer
    theirs = open_in_transformers(tmp_path)(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss.item()
    inputs, targets, mask = Pairs(pairs).windows(12)
    assert ops.softmax_cross_entropy(ours(inputs), targets, mask).item() == pytest.approx(theirs, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------- LoRA
NAMES = ("q_proj", "v_proj", "model.layers.1.mlp.down_proj")
TARGETS = {"all-linear": "all-linear", "names": NAMES, "expression": r".*layers\.[01]\.(self_attn\.k|mlp\.gate)_proj"}


def in_peft(name):
    """PEFT's name of one of our parameters: it wraps the model twice and puts the adapter's name before `weight`."""
    return "base_model.model." + name.replace(".bypasses.default", "").removesuffix(".weight") + ".default.weight"


def randomize(model, rng):
    """B, which starts at zero, becomes random."""
    for _, layer in adapters.lora_layers(model):
        layer.lora_B.weight.data = (rng.standard_normal(layer.lora_B.weight.shape) * 0.1).astype(np.float32)
    return model


def parameter_line(model, capsys):
    capsys.readouterr()
    model.print_trainable_parameters()
    return capsys.readouterr().out.strip()


def trained_by_peft(base, rng, **config):
    """A PEFT model after three steps of torch's AdamW, so that B is no longer zero."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(int(rng.integers(2**32)))
    model = peft.get_peft_model(
        base, peft.LoraConfig(**{k: list(v) if isinstance(v, tuple) else v for k, v in config.items()})
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        ids = torch.from_numpy(random_ids(rng))
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_saved_here_opens_in_peft(targets, config, rng, tmp_path, capsys):
    ours, ids = random_llama(rng, **CONFIGS[config]), random_ids(rng)
    ours.save_pretrained(tmp_path / "base", dtype="float32")
    before = ours(ids).data
    randomize(tl.add_lora(ours, r=4, alpha=8, target_modules=TARGETS[targets]), rng)
    adapter_files.save_adapter(ours, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(
        open_in_transformers(tmp_path / "base"), tmp_path / "adapter", is_trainable=True
    ).train()
    agree(ours(ids).data, their_logits(theirs, ids), 1e-4, "logits")
    assert np.abs(ours(ids).data - before).max() > 1e-2 * np.abs(before).max()
    assert parameter_line(theirs, capsys) == tl.trainable_parameters(ours)
    a, b = losses(ours, theirs, ids)
    assert a == pytest.approx(b, rel=1e-5)
    gradients_agree(ours, theirs, in_peft)


def test_a_saved_adapter_brings_its_base_along_in_auto_peft_model(rng, tmp_path):
    ours, ids = random_llama(rng), random_ids(rng)
    ours.save_pretrained(tmp_path / "base", dtype="float32")
    randomize(tl.add_lora(ours, r=2, alpha=12.5), rng)
    adapter_files.save_adapter(ours, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    agree(ours(ids).data, their_logits(theirs, ids), 1e-4, "logits")


def test_an_adapter_on_the_head_opens_in_peft(rng, tmp_path):
    ours, ids = random_llama(rng, tie_word_embeddings=False), random_ids(rng)
    ours.save_pretrained(tmp_path / "base", dtype="float32")
    randomize(tl.add_lora(ours, r=4, alpha=8, target_modules=["lm_head", "q_proj"]), rng)
    adapter_files.save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(open_in_transformers(tmp_path / "base"), tmp_path / "adapter")
    agree(ours(ids).data, their_logits(theirs, ids), 1e-4, "logits")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_that_peft_trained_opens_here(targets, config, rng, tmp_path, capsys):
    base, ids = random_llama(rng, **CONFIGS[config]), random_ids(rng)
    base.save_pretrained(tmp_path / "base", dtype="float32")
    theirs = trained_by_peft(open_in_transformers(tmp_path / "base"), rng, target_modules=TARGETS[targets])
    theirs.save_pretrained(tmp_path / "adapter")
    ours = adapter_files.load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    agree(ours(ids).data, their_logits(theirs, ids), 1e-4, "logits")
    assert np.abs(ours(ids).data - base(ids).data).max() > 1e-2 * np.abs(ours(ids).data).max()
    assert parameter_line(theirs, capsys) == tl.trainable_parameters(ours)
    losses(ours, theirs, ids)
    gradients_agree(ours, theirs, in_peft)


def test_an_adapter_goes_from_peft_to_here_and_back_unchanged(rng, tmp_path):
    random_llama(rng).save_pretrained(tmp_path / "base", dtype="float32")
    theirs = trained_by_peft(open_in_transformers(tmp_path / "base"), rng, r=3, lora_alpha=7)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = adapter_files.load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "theirs")
    adapter_files.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(open_in_transformers(tmp_path / "base"), tmp_path / "ours")
    found = dict(again.named_parameters())
    for name, w in theirs.named_parameters():
        assert torch.equal(w, found[name]), name


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_peft_options_that_matter_only_at_the_start_do_not_matter_here(options, rng, tmp_path):
    random_llama(rng).save_pretrained(tmp_path / "base", dtype="float32")
    theirs, ids = trained_by_peft(open_in_transformers(tmp_path / "base"), rng, **options), random_ids(rng)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = adapter_files.load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    agree(ours(ids).data, their_logits(theirs, ids), 1e-4, "logits")


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [(0, 1), (0, 1)]},
        {"alora_invocation_tokens": [5, 6]},
    ],
    ids=str,
)
def test_a_peft_adapter_that_means_something_else_is_refused_or_computed_as_peft_does(options, rng, tmp_path):
    random_llama(rng, tie_word_embeddings=False).save_pretrained(tmp_path / "base", dtype="float32")
    ids = random_ids(rng)
    ids[:, 30:32] = [5, 6]
    theirs = trained_by_peft(open_in_transformers(tmp_path / "base"), rng, **options)
    for name, w in theirs.named_parameters():
        if "lora_B" in name:
            w.data = torch.from_numpy((rng.standard_normal(w.shape) * 0.1).astype(np.float32))
    theirs.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(open_in_transformers(tmp_path / "base"), tmp_path / "adapter")
    try:
        ours = adapter_files.load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    except ValueError as error:
        print(error)
    else:
        agree(ours(ids).data, their_logits(again, ids), 1e-4, f"logits of an adapter with {options}")


def test_merging_is_pefts_merging(rng, tmp_path):
    ours, ids = random_llama(rng), random_ids(rng)
    ours.save_pretrained(tmp_path / "base", dtype="float32")
    randomize(tl.add_lora(ours, r=4, alpha=8), rng)
    adapter_files.save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        open_in_transformers(tmp_path / "base"), tmp_path / "adapter"
    ).merge_and_unload()
    tl.merge(ours)
    for name, w in ours.named_parameters():
        agree(w.data, theirs.get_parameter(name), 1e-6, name)
    agree(ours(ids).data, their_logits(theirs, ids), 1e-4, "logits")


# ---------------------------------------------------------------------------------------------------------------- QLoRA
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_a_quantized_llama_with_an_adapter_is_transformers_with_bitsandbytes_and_peft(
    code, nested, rng, tmp_path, capsys
):
    random_llama(rng).save_pretrained(tmp_path / "base", dtype="float32")
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=code,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = open_in_transformers(tmp_path / "base", quantization_config=four_bits)
    ours = tl.quantize_linears(Llama.from_pretrained(tmp_path / "base"), code=code, double_quant=nested)
    quantized = [path for path, layer in ours.named_modules() if isinstance(layer, nn.Linear4bit)]
    assert quantized == [path for path, layer in theirs.named_modules() if isinstance(layer, bnb.nn.Linear4bit)]
    for path in quantized:
        q, weight = ours.get(path).weight, theirs.get_submodule(path).weight
        assert same_bits(q.packed, weight.data.reshape(-1)), path
        assert same_bits(q.absmax_codes if nested else q.absmax, weight.quant_state.absmax), path
    ids = random_ids(rng)
    agree(ours(ids).data, their_logits(theirs, ids), 1e-4, "logits of the quantized model")
    theirs = trained_by_peft(theirs, rng)
    theirs.save_pretrained(tmp_path / "adapter")
    adapter_files.load_adapter(ours, tmp_path / "adapter")
    agree(ours(ids).data, their_logits(theirs, ids), 1e-4, "logits with the adapter")
    assert parameter_line(theirs, capsys) == tl.trainable_parameters(ours)
    losses(ours, theirs, ids)
    gradients_agree(ours, theirs, in_peft)


def their_dequantized(weight):
    """A Params4bit of bitsandbytes in float32, taken round the AVX-512 kernel's wrong scales: as one column."""
    state = copy.copy(weight.quant_state)
    shape, state.shape, state.dtype = state.shape, torch.Size((state.shape.numel(), 1)), torch.float32
    return array(bnb.functional.dequantize_4bit(weight.data, state)).reshape(tuple(shape))


def their_tensors(name, weight):
    """What bitsandbytes itself writes for a Params4bit."""
    parts = weight.quant_state.as_dict(packed=True)
    return {name: weight.data, **{f"{name}.{key}": value for key, value in parts.items()}}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_a_4_bit_folder_opens_in_transformers_with_the_same_bits(code, nested, rng, tmp_path):
    model = tl.quantize_linears(random_llama(rng), code, int(rng.choice([32, 64])), nested)
    tl.interop.bitsandbytes.save(model, tmp_path)
    theirs = open_in_transformers(tmp_path)
    quantized = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear4bit)]
    assert quantized == [path for path, layer in theirs.named_modules() if isinstance(layer, bnb.nn.Linear4bit)]
    for path in quantized:
        q, weight = model.get(path).weight, theirs.get_submodule(path).weight
        assert same_bits(q.dequantize("float32"), their_dequantized(weight)), path
        expected = their_tensors("w", weight)
        for name, tensor in tl.interop.bitsandbytes.to_tensors("w", q).items():
            assert same_bits(tensor, expected.pop(name)), (path, name)
        assert not expected
    ids = random_ids(rng)
    agree(model(ids).data, their_logits(theirs, ids), 1e-4, "logits")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_4_bit_folder_that_transformers_wrote_opens_here_with_the_same_bits(code, nested, dtype, rng, tmp_path):
    random_llama(rng).save_pretrained(tmp_path / "base", dtype=dtype)
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=code,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = open_in_transformers(tmp_path / "base", quantization_config=four_bits, dtype=getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "four")
    model = tl.interop.bitsandbytes.load(tmp_path / "four")
    for path, layer in theirs.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            q = model.get(path).weight
            assert same_bits(q.dequantize("float32"), their_dequantized(layer.weight)), path
            assert q.dtype == dtype and q.double_quant == nested and q.code_name == code
    if dtype == "float32":
        ids = random_ids(rng)
        agree(model(ids).data, their_logits(theirs, ids), 1e-4, "logits")


SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def other_architecture(kind):
    """A small model of another architecture, its class, and a function that runs it on ids."""
    grouped = {**SIZES, "num_key_value_heads": 2}
    if kind == "whisper":
        config = transformers.WhisperConfig(
            vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        sound = torch.randn(1, 80, 3000)
        return transformers.WhisperForConditionalGeneration(
            config
        ), lambda m, ids: m(sound, decoder_input_ids=ids).logits
    cls, config = {
        "bert": (transformers.BertModel, transformers.BertConfig(**SIZES)),
        "bert, masked": (transformers.BertForMaskedLM, transformers.BertConfig(**SIZES)),
        "gpt_neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**SIZES)),
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**grouped)),
        "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(**grouped)),
        "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**grouped)),
        "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**grouped, head_dim=16)),
    }[kind]
    return cls(config), lambda m, ids: m(ids)[0]


@pytest.mark.parametrize("kind", ["bert", "bert, masked", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "whisper"])
def test_a_4_bit_copy_of_another_architecture_runs_in_transformers(kind, tmp_path):
    """The same modules are in 4 bits as in transformers' own quantization, with the same bits, and the model runs."""
    model, run = other_architecture(kind)
    model.eval().save_pretrained(tmp_path / "dense")
    done = tl.interop.bitsandbytes.quantize_folder(tmp_path / "dense", tmp_path / "four", progress=False)
    theirs, report = type(model).from_pretrained(tmp_path / "four", output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    own = type(model).from_pretrained(tmp_path / "dense", quantization_config=four_bits)
    layers = {path: layer for path, layer in theirs.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert set(layers) == {path for path, layer in own.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert len(layers) == len(done)
    for path, layer in layers.items():
        (name,) = (n for n in done if f"{path}.weight".endswith(n))
        assert same_bits(done[name].dequantize("float32"), their_dequantized(layer.weight)), path
    theirs.train()  # in eval mode the CPU kernel rounds absmax to bfloat16
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        dense, four = run(model, torch.arange(20)[None]), run(theirs, torch.arange(20)[None])
    assert float((dense - four).norm() / dense.norm()) < 0.5


@pytest.mark.parametrize("nested", [False, True])
def test_merging_into_four_bits_is_pefts_merging(nested, rng):
    layer = nn.Linear(128, 32)
    layer.weight.data = rng.standard_normal((32, 128)).astype(np.float32)
    theirs = torch.nn.Sequential(their_linear4bit(layer.dense(), None, "nf4", 64, nested, torch.float32))
    theirs.is_loaded_in_4bit = True  # transformers sets this; PEFT asks for it
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    ours = tl.LoRALinear(nn.Linear4bit.of(layer, "nf4", 64, nested), r=4, alpha=8)
    ours.lora_B.weight.data = rng.standard_normal((32, 4)).astype(np.float32)
    for factor in ("lora_A", "lora_B"):
        w = theirs.get_parameter(f"base_model.model.0.{factor}.default.weight")
        w.data = torch.from_numpy(getattr(ours, factor).weight.data.copy())
    merged, weight = ours.merge().weight, theirs.merge_and_unload()[0].weight
    state, packed = weight.quant_state, array(weight.data).reshape(-1)
    # the product B A comes from another BLAS, so a weight on the edge between two code values may fall to either side
    assert (merged.packed == packed).mean() > 0.99
    agree(merged.absmax_codes if nested else merged.absmax, state.absmax, 0.01 if nested else 1e-5, "constants")
    agree(
        merged.dequantize().mean(axis=0),
        bnb.functional.dequantize_4bit(weight.data, state).mean(0),
        0.01,
        "column means",
    )


# ---------------------------------------------------------------------------------------------- the embedded base model
@pytest.fixture(params=["tiny", "embedded"])
def folder(request, rng, tmp_path):
    """A model folder: a random tiny one, and the embedded base model."""
    if request.param == "embedded":
        if not (base_folder() / "model.safetensors").is_file():
            pytest.skip("tinylora/data/base holds no model.safetensors; the embedded model has not been trained yet")
        return base_folder()
    random_llama(rng).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def text(rng):
    """256 bytes from a random place in the Jargon File's held-out half, as token ids (1, 256)."""
    words = jargon("heldout")
    start = int(rng.integers(len(words) - 256))
    return np.frombuffer(words[start : start + 256], np.uint8)[None].astype(np.int64)


def test_a_base_model_computes_in_transformers_what_it_computes_here(folder, text):
    # transformers computes the rotary angles in float32, tinylora in float64: most of the difference comes from the
    # later positions
    ours, theirs = Llama.from_pretrained(folder), open_in_transformers(folder)
    agree(ours(text).data, their_logits(theirs, text), 1e-4, "logits")
    a, b = losses(ours, theirs, text)
    assert a == pytest.approx(b, rel=1e-5)
    gradients_agree(ours, theirs, atol=5e-4)


def test_a_quantized_base_model_with_an_adapter_computes_in_peft_what_it_computes_here(folder, text, rng, tmp_path):
    ours, theirs = tl.quantize_linears(Llama.from_pretrained(folder)), open_in_transformers(folder)
    for path, layer in ours.named_modules():
        if isinstance(layer, nn.Linear4bit):
            theirs.get_submodule(path).weight.data = torch.from_numpy(layer.dense())
    tl.seed(int(rng.integers(2**32)))
    randomize(tl.add_lora(ours, r=8, alpha=16), rng)
    adapter_files.save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).train()
    agree(ours(text).data, their_logits(theirs, text), 1e-4, "logits")
    losses(ours, theirs, text)
    gradients_agree(ours, theirs, in_peft, atol=5e-4)
