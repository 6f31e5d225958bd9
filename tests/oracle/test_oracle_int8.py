"""LLM.int8 against bitsandbytes' Linear8bitLt on a CPU, and against transformers and PEFT on top of it.

Codes, scales and products of whole numbers are compared bit for bit. What goes through a product of floats (outlier columns, training,
gradients) is compared within a bound for a sum in another order, and its weights bit for bit through rows of the identity. Whole models
in eval mode are compared loosely: an activation that differs in its last bit may be rounded to the neighbouring code.

Two faults of the libraries are gone round: torch._int_mm, which bitsandbytes calls where there is AVX-512, is wrong for rows of length 1;
and without AVX-512 bitsandbytes sums in float32, which is not exact for rows longer than 1,040.
"""

import numpy as np
import pytest
from test_oracle import (
    agree,
    array,
    gradients_agree,
    in_peft,
    losses,
    one_thread,  # noqa: F401 (used by itself)
    open_in_transformers,
    other_architecture,
    parameter_line,
    random_ids,
    random_llama,
    randomize,
    same_bits,
    their_logits,
    trained_by_peft,
)

import tinylora as tl
from tinylora import Tensor, nn
from tinylora.adapters.kbit import prepare_model_for_int8_training, store_in_16_bits
from tinylora.dtypes import BFloat16Array, round_to
from tinylora.interop import peft as adapter_files
from tinylora.kernels import vectorwise
from tinylora.models.eightbit import CODE, Linear8bit, VectorwiseInt8
from tinylora.models.llama import Llama

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LONGEST = 2300 if torch.backends.cpu.get_cpu_capability() == "AVX512" else vectorwise.EXACT
F = np.float32


def weights(rng, n, k):
    """Rows of very different sizes, among them zeros, float16's smallest numbers and its largest; ties as well."""
    w = rng.standard_normal((n, k)) * 10.0 ** rng.uniform(-6, 4, (n, 1))
    w[rng.integers(n)] = 0
    w[rng.integers(n)] = rng.choice([6e-8, -6e-8, 0, 1e-8], k)
    w[rng.integers(n)] = rng.integers(-127, 128, k) / 2
    return np.clip(w, -65504, 65504).astype(F)


def their_weight(w, dtype="float32"):
    return bnb.nn.Int8Params(torch.from_numpy(w).to(DTYPES[dtype]), requires_grad=False, has_fp16_weights=False).to(
        "cpu"
    )


def own_weight(w, dtype="float32"):
    return VectorwiseInt8.of(BFloat16Array.of(w) if dtype == "bfloat16" else w.astype(dtype))


def both(w, bias=None, threshold=6.0, compute="float32", training=False):
    """(ours, theirs) with the same weight."""
    theirs = bnb.nn.Linear8bitLt(
        w.shape[1], w.shape[0], bias=bias is not None, has_fp16_weights=False, threshold=threshold
    )
    theirs.weight = their_weight(w)
    if bias is not None:
        theirs.bias = torch.nn.Parameter(torch.from_numpy(bias.copy()))
    ours = Linear8bit(own_weight(w), None if bias is None else Tensor(bias, requires_grad=True), compute, threshold)
    return ours.train(training), theirs.to("cpu").train(training)


def run(ours, theirs, x, g):
    """((y, x̄) of ours, (y, x̄) of theirs)."""
    a, b = Tensor(x, requires_grad=True), torch.from_numpy(x).to(DTYPES[ours.compute_dtype]).requires_grad_()
    y, z = ours(a), theirs(b)
    y.backward(g)
    z.backward(torch.from_numpy(g).to(b.dtype))
    return (y.data, a.grad), (z.detach(), b.grad)


# -------------------------------------------------------------------------------------------------------------------- codes
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 64), (16, 129), (5, 1041), (3, 2500)])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_codes_and_scales_of_weights_are_bitsandbytes_in_every_bit(dtype, shape, rng):
    for _ in range(5):
        w = weights(rng, *shape)
        if dtype == "bfloat16":
            w = np.clip(w, -65280, 65280)  # the largest bfloat16 below float16's end
        ours, theirs = own_weight(w, dtype), their_weight(w, dtype)
        assert same_bits(ours.codes, theirs.data) and same_bits(ours.scales, theirs.SCB)
        dense = bnb.functional.int8_vectorwise_dequant(theirs.data, theirs.SCB)
        for name, kind in DTYPES.items():
            assert same_bits(ours.dequantize(name), dense.to(kind)), name


@pytest.mark.parametrize("threshold", [0.0, 6.0, 1.0, 5.9999, 6.001])
def test_codes_scales_and_outlier_columns_of_activations_are_bitsandbytes(threshold, rng):
    for n, k in ((1, 9), (2, 64), (17, 33), (4, 1200)):
        x = (3 * rng.standard_normal((n, k))).astype(F)
        x[rng.integers(n), : k // 3] *= rng.choice([0, 1, 1e5], k // 3)  # some beyond float16
        x.flat[rng.integers(x.size)] = 6
        codes, scales, columns = bnb.functional.int8_vectorwise_quant(torch.from_numpy(x).half(), threshold=threshold)
        ours = vectorwise.quantize(x, threshold)
        assert same_bits(ours[0], codes) and same_bits(ours[1], scales)
        assert ours[2].tolist() == ([] if columns is None else columns.tolist())


# ------------------------------------------------------------------------------------------------------------------- outputs
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead, n, k", [((5,), 9, 64), ((1,), 4, 33), ((2, 7), 12, 40), ((3,), 5, LONGEST)])
def test_without_outliers_outputs_are_bitsandbytes_in_every_bit(lead, n, k, bias, compute, rng):
    """Products of whole numbers are exact, and all that follows is elementwise: nothing is left to an order of summation."""
    w, b = weights(rng, n, k), rng.standard_normal(n).astype(F)
    x = rng.standard_normal((*lead, k)).astype(F)
    for threshold in (0.0, 6.0):
        ours, theirs = both(w, b if bias else None, threshold, compute)
        with torch.no_grad():
            theirs = theirs(torch.from_numpy(x).to(DTYPES[compute]))
        assert same_bits(ours(Tensor(x)).data, theirs.float())


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("lead, n, k", [((5,), 9, 64), ((1,), 4, 33), ((2, 7), 12, 40), ((3,), 5, LONGEST)])
def test_with_outliers_outputs_are_bitsandbytes_up_to_the_order_of_a_sum(lead, n, k, compute, rng):
    """|Δy| ≤ 2⁻²³ (m + 2) (Σ_O |x||w| + |y|) for m outlier columns; in bfloat16 besides a step of 2⁻⁷ where y lies near a tie."""
    w, x = rng.standard_normal((n, k)).astype(F), (3 * rng.standard_normal((*lead, k))).astype(F)
    x[..., rng.integers(k)] = 20
    ours, theirs = both(w, None, 6.0, compute)
    _, _, columns = vectorwise.quantize(round_to(x, compute).reshape(-1, k), 6.0)
    assert len(columns)
    with torch.no_grad():
        z = array(theirs(torch.from_numpy(x).to(DTYPES[compute])))
    y = ours(Tensor(x)).data
    terms = np.abs(x[..., columns]) @ np.abs(ours.weight.dequantize("float32")[:, columns]).T
    allowed = 2.0**-23 * (len(columns) + 2) * (terms + np.abs(z))
    if compute == "bfloat16":
        allowed += 2.0**-7 * np.abs(z)
        assert (y == z).mean() > 0.97
    print(f"largest error {np.abs(y - z).max():.1e}, allowed there {allowed.max():.1e}")
    assert (np.abs(y - z) <= allowed).all()


def test_the_order_matters_nothing_where_one_column_is_an_outlier(rng):
    """The weight that an outlier meets, in every bit: one column of x is a power of two and an outlier, the others are 0."""
    w = rng.standard_normal((9, 40)).astype(F)
    x = (8 * np.eye(40)).astype(F)
    for compute in ("float32", "bfloat16"):
        ours, theirs = both(w, None, 6.0, compute)
        with torch.no_grad():
            assert same_bits(ours(Tensor(x)).data, theirs(torch.from_numpy(x).to(DTYPES[compute])).float())


# ---------------------------------------------------------------------------------------------------- training and gradients
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_the_weights_of_forward_and_backward_are_bitsandbytes_in_every_bit(training, compute, rng):
    """Products with rows of the identity are exact, and show the weight. (In eval mode the forward rounds x: see above.)"""
    w = weights(rng, 24, 40)
    w[np.abs(w).max(axis=1) > 1e3] = 0  # 0 · Inf is not wanted here
    eye = np.eye(40, dtype=F)
    ours, theirs = both(w, None, 6.0, compute, training)
    (y, _), (z, _) = run(ours, theirs, eye, np.zeros((40, 24), F))
    assert same_bits(y, z.float())
    (_, gx), (_, hx) = run(ours, theirs, np.zeros((24, 40), F), np.eye(24, dtype=F))
    assert same_bits(gx, hx.float())
    if training:
        assert (gx == y.T).all()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_bitsandbytes(training, threshold, compute, rng):
    w, b = rng.standard_normal((30, 64)).astype(F), rng.standard_normal(30).astype(F)
    x, g = rng.standard_normal((9, 64)).astype(F), rng.standard_normal((9, 30)).astype(F)
    x[4, 5] = -9
    ours, theirs = both(w, b, threshold, compute, training)
    (y, gx), (z, hx) = run(ours, theirs, x, g)
    # in bfloat16 a sum in another order may be rounded to the neighbouring number, half a step of 2⁻⁷ away from both
    tolerance = 1e-6 if compute == "float32" else 2**-7
    agree(y, z, tolerance, "outputs")
    agree(gx, hx, tolerance, "input gradients")
    agree(ours.bias.grad, theirs.bias.grad, tolerance, "bias gradients")


# --------------------------------------------------------------------------------------------------------------- whole models
def eight_bits(folder, **options):
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, **options)
    return open_in_transformers(folder, quantization_config=config)


def same_layers(ours, theirs):
    """The same layers are in 8 bits, with the same codes, scales and threshold."""
    found = [path for path, layer in ours.named_modules() if isinstance(layer, Linear8bit)]
    assert found and found == [path for path, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    for path in found:
        layer, module = ours.get(path), theirs.get_submodule(path)
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        assert same_bits(layer.weight.codes, module.weight.data) and same_bits(layer.weight.scales, scales), path
        assert layer.threshold == module.state.threshold


def agree_where_x_is_rounded(ours, theirs, not_rounded, what):
    """In eval mode each layer rounds x to int8, and a difference in its last bit may move a code by one. That is less than rounding does.

    The norm of the difference was at most 0.23 of the norm of what rounding changes in 80 draws; without any rounding it would be 1.
    """
    theirs, not_rounded = (array(a).astype(np.float64) for a in (theirs, not_rounded))
    share = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - not_rounded)
    print(f"{what}: {share:.3f} of what rounding x changes (allowed 0.5)")
    assert share <= 0.5, f"{what}: {share:.3f} of what rounding x changes"


def test_the_whole_example_is_transformers_with_bitsandbytes_and_peft(rng, tmp_path, capsys):
    """An 8-bit base from a folder, prepared, an adapter on q and v trained by PEFT, its line, logits, a loss's gradients, and merged."""
    random_llama(rng).save_pretrained(tmp_path / "base", dtype="float32")
    theirs = peft.prepare_model_for_kbit_training(eight_bits(tmp_path / "base"), use_gradient_checkpointing=False)
    ours = Llama.from_pretrained(tmp_path / "base", quantize=CODE)
    ours = prepare_model_for_int8_training(ours, gradient_checkpointing=False)
    same_layers(ours, theirs)
    ids = random_ids(rng)
    agree(ours(ids).data, their_logits(theirs, ids), 1e-4, "logits of the 8-bit model, training mode")
    theirs = trained_by_peft(theirs, rng, target_modules=["q_proj", "v_proj"], r=16, lora_alpha=32)
    theirs.save_pretrained(tmp_path / "adapter")
    adapter_files.load_adapter(ours, tmp_path / "adapter")
    agree(ours(ids).data, their_logits(theirs, ids), 1e-4, "logits with the adapter")
    assert parameter_line(theirs, capsys) == tl.trainable_parameters(ours)
    losses(ours, theirs, ids)
    gradients_agree(ours, theirs, in_peft)
    training = their_logits(theirs, ids)
    agree_where_x_is_rounded(ours.eval()(ids).data, their_logits(theirs.eval(), ids), training, "logits, eval mode")
    tl.merge(ours)
    theirs = theirs.merge_and_unload()
    for path, layer in ours.named_modules():
        if isinstance(layer, Linear8bit):
            codes = array(theirs.get_submodule(path).weight.data).astype(int)
            difference = np.abs(
                layer.weight.codes - codes
            )  # B A comes from another BLAS: a tie may fall to either side
            assert difference.max() <= 1 and (difference > 0).mean() < 1e-3, path


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_an_8_bit_folder_opens_in_transformers_with_the_same_bits(threshold, rng, tmp_path):
    model = tl.quantize_linears(random_llama(rng), CODE, threshold=threshold)
    tl.interop.bitsandbytes.save(model, tmp_path)
    theirs = open_in_transformers(tmp_path)
    same_layers(model, theirs)
    ids = random_ids(rng)
    agree(model(ids).data, their_logits(theirs, ids), 1e-4, "logits, training mode")
    training = their_logits(theirs, ids)
    agree_where_x_is_rounded(model.eval()(ids).data, their_logits(theirs.eval(), ids), training, "logits, eval mode")


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("threshold", [6.0, 2.5])
def test_an_8_bit_folder_that_transformers_wrote_opens_here_with_the_same_bits(threshold, dtype, rng, tmp_path):
    random_llama(rng).save_pretrained(tmp_path / "base", dtype="float32")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    theirs = open_in_transformers(tmp_path / "base", quantization_config=config, dtype=DTYPES[dtype])
    theirs.save_pretrained(tmp_path / "eight")
    model = tl.interop.bitsandbytes.load(tmp_path / "eight")
    same_layers(model, theirs)
    if dtype == "float32":
        ids = random_ids(rng)
        agree(model(ids).data, their_logits(theirs, ids), 1e-4, "logits")


@pytest.mark.parametrize("kind", ["bert", "bert, masked", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "whisper"])
def test_an_8_bit_copy_of_another_architecture_runs_in_transformers(kind, tmp_path):
    """The same modules are in 8 bits as in transformers' own quantization, with the same bits, and the model runs."""
    model, run = other_architecture(kind)
    model.eval().save_pretrained(tmp_path / "dense")
    done = tl.interop.bitsandbytes.quantize_folder(tmp_path / "dense", tmp_path / "eight", CODE, progress=False)
    theirs = open_in_transformers(tmp_path / "eight", type(model)).eval()
    own = open_in_transformers(
        tmp_path / "dense", type(model), quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True)
    )
    layers = {path: layer for path, layer in theirs.named_modules() if isinstance(layer, bnb.nn.Linear8bitLt)}
    assert set(layers) == {path for path, layer in own.named_modules() if isinstance(layer, bnb.nn.Linear8bitLt)}
    assert len(layers) == len(done)
    for path, layer in layers.items():
        (name,) = (n for n in done if f"{path}.weight".endswith(n))
        assert same_bits(done[name].codes, layer.weight.data) and same_bits(done[name].scales, layer.weight.SCB), path
        assert same_bits(done[name].codes, own.get_submodule(path).weight.data), path
    with torch.no_grad():
        dense, eight = run(model, torch.arange(20)[None]), run(theirs, torch.arange(20)[None])
    assert float((dense - eight).norm() / dense.norm()) < 0.05


def test_an_adapter_trained_here_on_8_bits_computes_the_same_in_peft(rng, tmp_path):
    random_llama(rng).save_pretrained(tmp_path / "base", dtype="float32")
    ours = Llama.from_pretrained(tmp_path / "base", quantize=CODE)
    tl.seed(int(rng.integers(2**32)))
    randomize(tl.add_lora(ours, r=8, alpha=16, target_modules=["q_proj", "v_proj"]), rng)
    optimizer, ids = tl.AdamW(ours.trainable(), lr=1e-2), random_ids(rng)
    tl.ops.softmax_cross_entropy(ours(ids[:, :-1]), ids[:, 1:]).backward()
    optimizer.step()
    for _, p in ours.trainable():
        p.grad = None
    adapter_files.save_adapter(ours, tmp_path / "adapter")
    theirs = eight_bits(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).train()
    assert isinstance(
        theirs.get_submodule("base_model.model.model.layers.0.self_attn.q_proj"), peft.tuners.lora.Linear8bitLt
    )
    agree(ours(ids).data, their_logits(theirs, ids), 1e-4, "logits")
    losses(ours, theirs, ids)
    gradients_agree(ours, theirs, in_peft)


def test_prepare_does_what_pefts_prepare_does_on_8_bits(rng, tmp_path):
    own = random_llama(rng)
    own.save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16
    )
    theirs = peft.prepare_model_for_kbit_training(theirs)
    ours = prepare_model_for_int8_training(store_in_16_bits(tl.quantize_linears(own, CODE)))
    assert not any(p.requires_grad for p in theirs.parameters()) and not ours.trainable()
    kinds = {name: str(p.dtype).removeprefix("torch.") for name, p in theirs.named_parameters()}
    assert kinds == {
        name: "int8" if isinstance(w, VectorwiseInt8) else str(w.dtype) for name, w in ours.named_weights()
    }
    assert (
        set(kinds.values()) == {"float32", "int8"} and theirs.is_gradient_checkpointing and ours.gradient_checkpointing
    )
    assert isinstance(ours.get("model.layers.0.mlp.up_proj"), nn.FrozenLinear)


def test_torchs_int8_product_is_wrong_for_rows_of_one(rng):
    """Why rows of length 1 are left out above: the product here is right, and that of torch 2.13 is not."""
    a, b = rng.integers(1, 128, (40, 1), np.int8), rng.integers(1, 128, (40, 1), np.int8)
    right = a.astype(int) @ b.astype(int).T
    assert (vectorwise.whole_product(a, b) == right).all()
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.__version__.startswith("2.13."):
        assert (torch._int_mm(torch.from_numpy(a), torch.from_numpy(b).t()).numpy() != right).any()


def test_the_line_of_the_post_is_what_peft_counts_on_the_shapes_of_the_model():
    """T5 1.1 XXL on torch's meta device, where shapes have no memory. (transformers 5 ties a T5's head; that model had its own.)"""
    from tinylora.papers import lora_numbers

    layers, d, heads, d_kv, d_ff = lora_numbers.T5_XXL
    config = transformers.T5Config(
        vocab_size=lora_numbers.T5_VOCABULARY, d_model=d, d_kv=d_kv, d_ff=d_ff, num_layers=layers, num_decoder_layers=layers,
        num_heads=heads, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
        model.lm_head.weight = torch.nn.Parameter(torch.empty(lora_numbers.T5_VOCABULARY, d))
        lora = peft.LoraConfig(
            r=16, lora_alpha=32, target_modules=["q", "v"], lora_dropout=0.05, task_type="SEQ_2_SEQ_LM"
        )
        counted = peft.get_peft_model(model, lora).get_nb_trainable_parameters()
    assert counted == lora_numbers.post()[1:] == (18_874_368, 11_154_206_720)
