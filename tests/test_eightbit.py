"""LLM.int8 without torch: the kernel against a loop that says each rounding, the layer, gradients, tape, folders, and a whole job.

tests/oracle/test_oracle_int8.py compares the same with bitsandbytes, transformers and PEFT.
"""

import json

import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import Llama, Tensor, backend, nn, no_grad, ops
from tinylora.adapters import kbit
from tinylora.adapters.merge import merge_errors
from tinylora.costs import parameters
from tinylora.dtypes import BFloat16Array, round_to
from tinylora.interop import bitsandbytes
from tinylora.kernels import vectorwise
from tinylora.models.eightbit import CODE, Linear8bit, VectorwiseInt8, linear_8bit
from tinylora.tape import tape_bytes

F = np.float32


# --------------------------------------------------------------------------------------------------------------- the kernel
def slow_quantize(x, threshold):
    """One number after the other, each rounded as the module says: (codes, scales, outlier columns)."""
    half = [[np.float16(v) for v in row] for row in x]
    limit = np.float16(threshold)
    outliers = {(i, j) for i, row in enumerate(half) for j, v in enumerate(row) if threshold > 0 and abs(v) >= limit}
    columns = sorted({j for _, j in outliers})
    codes, scales = [], []
    for i, row in enumerate(half):
        kept = [F(0) if (i, j) in outliers else F(v) for j, v in enumerate(row)]
        scale = max(abs(v) for v in kept)
        factor = F(F(1) / scale) * F(127) if scale > 0 else F(0)
        codes.append([0 if j in columns else round(float(F(v * factor))) for j, v in enumerate(kept)])
        scales.append(scale)
    return np.array(codes), np.array(scales, F), columns


@pytest.mark.parametrize("threshold", [0.0, 6.0, 2.5])
def test_each_row_is_quantized_as_the_loop_says(threshold, xp, rng):
    for n, k in ((1, 1), (1, 7), (5, 3), (4, 33), (3, 130)):
        x = (rng.standard_normal((n, k)) * 10.0 ** rng.uniform(-3, 1.5, (n, 1))).astype(F)
        x[rng.integers(n)] = 0
        x[0, 0] = 2.5  # in the third case exactly the threshold
        codes, scales, columns = slow_quantize(x, threshold)
        found = [backend.move(a, "cpu") for a in vectorwise.quantize(xp.asarray(x), threshold)]
        assert found[0].dtype == np.int8 and (found[0] == codes).all()
        assert found[1].dtype == F and found[1].tobytes() == scales.tobytes()
        assert found[2].tolist() == columns


def test_ties_go_to_the_even_code_and_the_largest_weight_has_code_127(xp):
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -127], [0, 0, 0, 0, 0, 0, 0], [1e-9, 0, 0, 0, 0, 0, 0]], F)
    codes, scales, _ = vectorwise.quantize(xp.asarray(x))
    assert backend.move(codes, "cpu").tolist() == [[127, 0, 2, 2, 0, -2, -127], [0] * 7, [0] * 7]
    assert backend.move(scales, "cpu").tolist() == [127, 0, 0]  # 1e-9 is 0 in float16


def test_the_scale_keeps_what_is_no_outlier_in_an_outliers_column():
    codes, scales, columns = vectorwise.quantize(np.array([[7, 1.0], [5, 0.5]], F), 6.0)
    assert columns.tolist() == [0] and codes.tolist() == [[0, 127], [0, 13]]
    assert scales.tolist() == [1, 5]  # 13 = round(127 · 0.5/5): the second row's 5 is in column 0 and still its scale


@pytest.mark.parametrize("k", [2, 1040, 1041, 2500])
def test_products_of_codes_are_exact_however_long_the_rows_are(k, xp, rng):
    a, b = rng.integers(-127, 128, (3, k), np.int8), rng.integers(-127, 128, (5, k), np.int8)
    a[0], b[0] = 127, 127  # the largest sum there is: in one float32 sum it is wrong from k = 1041 on
    b[0, ::3] = 126
    found = backend.move(vectorwise.whole_product(xp.asarray(a), xp.asarray(b)), "cpu")
    assert found.dtype == np.int32 and (found == a.astype(np.int64) @ b.astype(np.int64).T).all()
    assert vectorwise.EXACT * 127**2 <= 1 << 24 < (vectorwise.EXACT + 1) * 127**2


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_a_product_is_the_sum_of_its_two_parts(threshold, rng):
    x, w = (3 * rng.standard_normal((6, 40))).astype(F), rng.standard_normal((9, 40)).astype(F)
    x[:, 5] = 30 * rng.choice([-1, 1], 6)
    codes, scales, _ = vectorwise.quantize(w)
    own, own_scales, columns = slow_quantize(x, threshold)
    y = (own @ codes.T).astype(np.float64) * np.outer(own_scales, scales) * 6.200124e-05
    y += x[:, columns].astype(np.float64) @ (codes[:, columns] * scales[:, None] / 127.0).T
    found = vectorwise.product(x, codes, scales, threshold)
    assert np.abs(found - y).max() <= 1e-6 * np.abs(y).max()
    assert (5 in columns) == (threshold == 6.0)


def test_rounding_costs_less_with_the_outliers_apart(rng):
    """What the decomposition is for (§3.2): beside an outlier of 40, a value within ±5 is rounded to steps eight times as large."""
    x, w = rng.uniform(-5, 5, (6, 40)).astype(F), rng.standard_normal((9, 40)).astype(F)
    x[:, 5] = 40 * rng.choice([-1, 1], 6)
    codes, scales, _ = vectorwise.quantize(w)
    exact = x.astype(np.float64) @ vectorwise.dequantized(codes, scales).T
    apart, together = (np.linalg.norm(vectorwise.product(x, codes, scales, t) - exact) for t in (6.0, 0.0))
    assert apart < together / 4  # 1/8, and a spread of a few per cent over the 54 products


# ----------------------------------------------------------------------------------------------------------------- the weight
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_a_weight_is_held_in_a_byte_and_a_scale_a_row(kind, rng):
    w = rng.standard_normal((24, 50)).astype(F)
    w = BFloat16Array.of(w) if kind == "bfloat16" else w.astype(kind)
    q = VectorwiseInt8.of(w)
    dense = w.dequantize("float32") if kind == "bfloat16" else w.astype(F)
    assert (q.shape, q.size, q.dtype, q.nbytes) == ((24, 50), 1200, kind, 1200 + 4 * 24)
    assert q.bits_per_param == 8 + 32 / 50 and q.held is q.codes
    assert q.dequantize("float32").tobytes() == vectorwise.dequantized(q.codes, q.scales).tobytes()
    assert (q.dequantize() == round_to(q.dequantize("float32"), kind)).all()
    half_a_step = np.abs(dense).max(1, keepdims=True) * (1 / 254 + 2**-10)  # and two roundings to float16
    assert (np.abs(q.dequantize("float32") - dense) <= half_a_step).all()
    again = q.like(q.dequantize("float32"))
    assert (again.codes == q.codes).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -7e4, 65520.0])
def test_a_weight_that_float16_cannot_hold_is_refused_by_name(value):
    w = np.ones((3, 4), F)
    w[1, 2] = value
    with pytest.raises(ValueError, match=r"mlp\.up_proj holds NaN, Inf or numbers above 65,504"):
        VectorwiseInt8.of(w, "mlp.up_proj")
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(out, in\)"):
        VectorwiseInt8.of(np.ones(4, F))
    model = tiny.model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        tl.quantize_linears(model, code=CODE)
    assert not any(isinstance(m, Linear8bit) for _, m in model.named_modules())  # nothing was replaced


# ------------------------------------------------------------------------------------------------------------------ the layer
def layer(rng, n=20, k=30, bias=False, **options):
    dense = nn.Linear.of(
        Tensor(rng.standard_normal((n, k)).astype(F)), Tensor(rng.standard_normal(n).astype(F), bias) if bias else None
    )
    return dense, Linear8bit.of(dense, **options)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["training", "eval", "always", "never"])
def test_the_mode_says_which_product_is_made_and_the_gradient_is_the_same(mode, compute, rng):
    products = mode if mode in ("always", "never") else "eval"
    _, q = layer(rng, bias=True, compute_dtype=compute, integer_products=products)
    q.train(mode in ("training", "always"))
    x, g = rng.standard_normal((2, 3, 30)).astype(F), rng.standard_normal((2, 3, 20)).astype(F)
    x[0, 1, 7] = 9.0  # an outlier
    a = Tensor(x, requires_grad=True)
    y = q(a)
    y.backward(g)
    r = lambda v: round_to(v, compute)  # noqa: E731
    w = r(vectorwise.multiplied(q.weight.codes, q.weight.scales))
    if mode in ("eval", "always"):
        expected = vectorwise.product(r(x).reshape(6, 30), q.weight.codes, q.weight.scales, 6.0, r(q.bias.data), r)
        assert (y.data.reshape(6, 20) == expected).all()
        assert np.linalg.norm(y.data - (x @ w.T + q.bias.data)) / np.linalg.norm(y.data) < 0.02
    else:
        assert np.abs(y.data - r(r(x) @ w.T + r(q.bias.data))).max() <= (1e-5 if compute == "float32" else 2**-7 * 16)
    assert np.abs(a.grad - r(r(g) @ w)).max() <= (1e-5 if compute == "float32" else 2**-7 * 16)
    assert np.abs(q.bias.grad - g.sum((0, 1))).max() <= (1e-5 if compute == "float32" else 2**-7 * 8)


def test_the_tape_holds_the_codes_and_nothing_dense(rng):
    for products in ("always", "never"):
        _, q = layer(rng, 64, 96, integer_products=products)
        y = q(Tensor(rng.standard_normal((5, 96)).astype(F), requires_grad=True))
        assert tape_bytes(y) == q.weight.nbytes == 64 * 96 + 4 * 64
        assert tape_bytes(y, exclude=[q.weight]) == 0


def test_the_layer_moves_and_computes_on_a_device(xp, rng):
    _, q = layer(rng)
    x = rng.standard_normal((4, 30)).astype(F)
    x[2, 3] = -8
    for training in (True, False):
        q.train(training)
        here = q(Tensor(x)).data
        moved = Linear8bit(q.weight.to(lambda a: backend.move(a, xp)), None).train(training)
        there = backend.move(moved(Tensor(xp.asarray(x))).data, "cpu")
        assert np.abs(here - there).max() < 1e-5 and type(moved.weight.codes).__module__ == type(xp.zeros(1)).__module__


def test_options_that_do_not_exist_are_named(rng):
    dense, _ = layer(rng)
    for options, message in (
        ({"threshold": -1}, "threshold = -1, expected a number, 0 or more"),
        ({"threshold": float("nan")}, "threshold = nan"),
        ({"integer_products": "often"}, "'often', expected one of eval, always, never"),
        ({"blocks": 3}, "int8_vectorwise has no option 'blocks'"),
        ({"compute_dtype": "float64"}, "Linear8bit: compute_dtype 'float64'"),
    ):
        with pytest.raises(ValueError, match=message):
            Linear8bit.of(dense, **options)
    with pytest.raises(ValueError, match=r"x is \(2, 7\), w is \(out, in\) = \(20, 30\)"):
        linear_8bit(Tensor(np.ones((2, 7), F)), Linear8bit.of(dense).weight)


# ----------------------------------------------------------------------------------------------------------------- whole models
def test_a_model_is_quantized_on_the_way_in_or_afterwards(tmp_path, rng):
    tiny.model().save_pretrained(tmp_path, dtype="float32")
    one = Llama.from_pretrained(tmp_path, quantize={"code": CODE, "threshold": 3.0})
    two = tl.quantize_linears(Llama.from_pretrained(tmp_path), code=CODE, threshold=3.0)
    layers = [(path, m) for path, m in one.named_modules() if isinstance(m, Linear8bit)]
    assert len(layers) == 14 and not one.trainable() and isinstance(one.model.embed_tokens.weight, Tensor)
    assert all(m.threshold == 3.0 and (m.weight.codes == two.get(path).weight.codes).all() for path, m in layers)
    ids = tiny.ids(rng, 2, 20)
    with no_grad():
        assert (one.eval()(ids).data == two.eval()(ids).data).all()
        dense = tiny.model()(ids).data
        assert np.linalg.norm(one(ids).data - dense) < 0.05 * np.linalg.norm(dense)


def test_the_example_of_the_post(rng, tmp_path, capsys):
    """An 8-bit base, prepared; LoRA on q and v; what is trained, counted; a step; merged, with what that costs."""
    from tinylora.adapters.kbit import prepare_model_for_int8_training
    from tinylora.interop import peft

    shape = {"hidden_size": 64, "head_dim": 16}
    model = tl.quantize_linears(tiny.model(**shape), code=CODE)
    model = prepare_model_for_int8_training(kbit.store_in_16_bits(model))
    assert isinstance(model.model.embed_tokens.weight, Tensor) and model.gradient_checkpointing
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear8bit) and not model.trainable()
    ids = tiny.ids(rng, 2, 24)
    before = model(ids).data
    tl.add_lora(model, r=4, alpha=32, dropout=0.05, target_modules=["q_proj", "v_proj"])
    count = 2 * 4 * (64 + 64) + 2 * 4 * (64 + 32)
    total = sum(w.size for _, w in tiny.model(**shape).named_weights()) + count
    tl.print_trainable_parameters(model)
    said = f"trainable params: {count:,} || all params: {total:,} || trainable%: {100 * count / total:.4f}\n"
    assert capsys.readouterr().out == said
    assert (model(ids).data == before).all()  # B starts at 0

    base = {path: m.weight.codes.copy() for path, m in model.named_modules() if isinstance(m, Linear8bit)}
    optimizer, losses = tl.AdamW(model.trainable(), lr=1e-2), []
    for _ in range(3):
        loss = ops.softmax_cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(float(loss.data))
    assert losses[2] < losses[1] < losses[0]
    assert all((model.get(path).weight.codes == codes).all() for path, codes in base.items())

    peft.save_adapter(model, tmp_path / "adapter")
    with no_grad():
        adapted = model.eval()(ids).data
        deltas = {path: l.merged() for path, l in tl.adapters.lora_layers(model)}
        tl.merge(model)
        errors = merge_errors(model)
        assert set(errors) == set(deltas) and len(errors) == 4
        for path, wanted in deltas.items():
            merged = model.get(path)
            assert isinstance(merged, Linear8bit) and 0 < errors[path] < 0.02
            own = np.linalg.norm(merged.weight.dequantize("float32") - wanted) / np.linalg.norm(wanted)
            assert errors[path] == pytest.approx(own, rel=1e-4)
        # in eval mode s B A x, which was exact, is now rounded with x and with W: 0.02 to 0.03 over 150 seeds
        assert np.linalg.norm(model(ids).data - adapted) < 0.06 * np.linalg.norm(adapted)


# -------------------------------------------------------------------------------------------------------------------- folders
def eight_bits(folder, threshold=6.0, **changes):
    model = tl.quantize_linears(tiny.model(**changes), code=CODE, threshold=threshold)
    bitsandbytes.save(model, folder)
    return model


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_comes_back_as_it_was_saved(threshold, tied, tmp_path, rng):
    model, ids = eight_bits(tmp_path, threshold, tie_word_embeddings=tied), tiny.ids(rng, 2, 20)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] and not config["load_in_4bit"] and config["llm_int8_threshold"] == threshold
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    again = Llama.from_pretrained(tmp_path)
    layers = [(p, m) for p, m in again.named_modules() if isinstance(m, Linear8bit)]
    assert len(layers) == 14 and all(m.threshold == threshold for _, m in layers) and not again.trainable()
    for path, m in layers:
        old = model.get(path).weight
        assert (m.weight.codes == old.codes).all() and m.weight.scales.tobytes() == old.scales.tobytes()
    for mode in (True, False):
        assert (model.train(mode)(ids).data == again.train(mode)(ids).data).all()
    with pytest.raises(ValueError, match="is in 8 bits already"):
        Llama.from_pretrained(tmp_path, quantize="nf4")
    assert Llama.from_pretrained(tmp_path, compute_dtype="bfloat16").get(layers[0][0]).compute_dtype == "bfloat16"


def test_a_damaged_folder_is_refused_with_the_name_of_the_tensor(tmp_path):
    from tinylora.models import safetensors

    eight_bits(tmp_path)
    path = "model.layers.0.mlp.up_proj"
    whole = safetensors.load_folder(tmp_path)
    nan = whole[f"{path}.SCB"].copy()
    nan[3] = np.nan
    for change, message in (
        ({f"{path}.SCB": None}, "expected model.layers.0.mlp.up_proj.SCB as 48 float32"),
        ({f"{path}.SCB": whole[f"{path}.SCB"][1:]}, "as 48 float32, one for each row"),
        ({f"{path}.SCB": nan}, "a scale that is negative, Inf or NaN"),
        ({f"{path}.weight": None}, "expected model.layers.0.mlp.up_proj.weight as a matrix of int8"),
        ({f"{path}.weight": whole[f"{path}.weight"].astype(F)}, "as a matrix of int8"),
        ({f"{path}.weight": whole[f"{path}.weight"] | np.int8(-128)}, "holds −128, to which no weight is rounded"),
        ({f"{path}.weight": whole[f"{path}.weight"][:, 1:].copy()}, "fits no linear layer"),
        ({f"{path}.weight_format": np.array(2, np.uint8)}, "weight_format is 2; only 0, row by row, is read"),
        ({"lm_head2.weight": whole[f"{path}.weight"], "lm_head2.SCB": whole[f"{path}.SCB"]}, "fits no linear layer"),
    ):
        tensors = {name: a for name, a in (whole | change).items() if a is not None}
        safetensors.save_safetensors(tmp_path / "model.safetensors", tensors)
        with pytest.raises(ValueError, match=message):
            Llama.from_pretrained(tmp_path)
    tensors = {name: a for name, a in whole.items() if not name.endswith("weight_format")}
    safetensors.save_safetensors(tmp_path / "model.safetensors", tensors)
    Llama.from_pretrained(tmp_path)  # folders of older versions have none
    # the config says 8 bits, and the weights are dense
    tiny.model().save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="says load_in_8bit and holds no 8-bit weight"):
        Llama.from_pretrained(tmp_path / "dense")


def test_one_folder_has_one_form_of_weights_and_one_threshold(tmp_path):
    model = tl.quantize_linears(tiny.model(), code=CODE)
    model.model.layers[0].mlp.up_proj.threshold = 2.0
    with pytest.raises(ValueError, match="different thresholds"):
        bitsandbytes.save(model, tmp_path / "m")
    model = tl.quantize_linears(tiny.model(), code=CODE)
    model.replace("lm_head", None)
    model.replace("model.layers.0.mlp.up_proj", nn.Linear4bit.of(model.get("model.layers.0.mlp.up_proj")))
    with pytest.raises(ValueError, match="both in 4 and in 8 bits"):
        bitsandbytes.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------------------------------------ the command line
def test_an_adapter_on_8_bits_from_the_command_line_to_a_merged_folder(tmp_path, capsys):
    """finetune --method int8, generate on the same base, merge into 8 bits with its price, and go on from the folder."""
    from tinylora.cli import main

    tiny.model().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\n\n".join(f"word {i}\n  n. The {i}th of them." for i in range(80)))
    train = [
        "finetune",
        "--steps",
        "2",
        "--seq-len",
        "32",
        "--batch-size",
        "2",
        "-r",
        "2",
        "--text",
        str(tmp_path / "text.txt"),
    ]
    base, run = ["--model", str(tmp_path / "base")], tmp_path / "run"
    assert main([*train, *base, "--method", "int8", "--blocksize", "32", "--out", str(run)]) == 0
    printed, said = capsys.readouterr()
    assert printed.startswith("LoRA, LLM.int8 base") and "--blocksize has no effect here" in said
    report = json.loads((run / "report.json").read_text())
    model = tl.quantize_linears(tiny.model(), code=CODE)
    held = [w for _, w in model.named_weights() if isinstance(w, VectorwiseInt8)]
    assert report["bits_per_param"] == 8 * sum(w.nbytes for w in held) / sum(w.size for w in held)
    dense = dict(Llama.from_pretrained(tmp_path / "base").named_parameters())
    quantized = dict(Llama.from_pretrained(tmp_path / "base", quantize=CODE).named_weights())
    pairs = [(dense[n].data, w.dequantize("float32")) for n, w in quantized.items() if isinstance(w, VectorwiseInt8)]
    lost, power = (
        sum(float(np.square(x, dtype=float).sum()) for x in xs)
        for xs in ([b - a for a, b in pairs], [a for a, _ in pairs])
    )
    assert 1e-5 < report["weight_error"] < 1e-4 and report["weight_error"] == pytest.approx(lost / power)

    adapted = [*base, "--adapter", str(run / "adapter"), "--quantize", "int8"]
    assert main(["generate", *adapted, "--prompt", "word", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("word")
    merged = str(tmp_path / "merged")
    assert main(["merge", *adapted, "--out", merged]) == 0
    printed = capsys.readouterr().out
    assert "error of merging into 8 bits" in printed and printed.count("_proj") == 14
    assert isinstance(Llama.from_pretrained(merged).get("model.layers.0.mlp.up_proj"), Linear8bit)
    assert main([*train, "--model", merged, "--method", "int8", "--out", str(tmp_path / "again")]) == 0
    assert (
        json.loads((tmp_path / "again" / "report.json").read_text())["weight_error"] is None
    )  # the dense weights are gone
    capsys.readouterr()
    assert main([*train, "--model", merged, "--out", str(tmp_path / "no")]) == 2
    assert "is stored in int8_vectorwise; the method 'qlora' starts from nf4" in capsys.readouterr().err


def test_a_folder_is_quantized_to_8_bits_by_the_command(tmp_path, capsys):
    from tinylora.cli import main

    tiny.model().save_pretrained(tmp_path / "base")
    assert (
        main(["quantize", str(tmp_path / "base"), "--codes", "nf4", "--code", "int8", "--out", str(tmp_path / "eight")])
        == 0
    )
    printed = capsys.readouterr().out
    shapes = parameters.llama_shapes(tiny.CONFIG)
    bits = 8 + 32 * sum(out for out, _ in shapes) / sum(out * n for out, n in shapes)
    assert f"14 weights written to {tmp_path / 'eight'} in int8, {bits:.3f} bits each" in printed
    here, there = Llama.from_pretrained(tmp_path / "base", quantize=CODE), Llama.from_pretrained(tmp_path / "eight")
    for name, w in here.named_weights():
        if isinstance(w, VectorwiseInt8):
            assert (dict(there.named_weights())[name].codes == w.codes).all()
    large = tiny.model()
    large.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    large.save_pretrained(tmp_path / "large")
    assert (
        main(["quantize", str(tmp_path / "large"), "--codes", "nf4", "--code", "int8", "--out", str(tmp_path / "no")])
        == 2
    )
    assert "up_proj.weight holds NaN, Inf or numbers above 65,504" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_comparison_takes_8_bits_where_they_are_named(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from tinylora.cli import main
    from tinylora.training.compare import compare
    from tinylora.training.finetune import COMPARED

    tiny.model().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("one and two and three and four and five\n" * 60)
    methods = ["lora", "int8", "qlora", "qlora-fp4", "qlora-int4", "full"]
    words = [
        "--steps",
        "1",
        "--seq-len",
        "16",
        "--batch-size",
        "2",
        "-r",
        "2",
        "--compare",
        "--seeds",
        "0",
        "--methods",
        *methods,
    ]
    files = ["--model", str(tmp_path / "base"), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    assert main(["finetune", *files, *words]) == 0
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    row = lines["LoRA, LLM.int8 base"]
    shapes = parameters.llama_shapes(tiny.CONFIG)
    bits = 8 + 32 * sum(out for out, _ in shapes) / sum(out * n for out, n in shapes)
    assert row[3:5] == ["1", f"{bits:.3f}"] and 1e-5 < float(row[5]) < 1e-4
    assert lines["LoRA, bfloat16 base"][3:6] == ["1", "16.000", "0.00e+00"]
    assert "int8" not in COMPARED and compare.__defaults__[2] == COMPARED
    assert (tmp_path / "run" / "compare.svg").read_text().count("LLM.int8") >= 1
