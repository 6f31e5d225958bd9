"""An adapter knows its base: the same one in every form is known again, another one is refused, and how it was held is compared."""

import json
import warnings

import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import adapters, backend
from tinylora.interop import bitsandbytes, peft
from tinylora.models import identity, safetensors
from tinylora.nn import Linear
from tinylora.tensor import Tensor


def adapted(base, rng, folder, **options):
    """An adapter with random factors, saved; returns the model."""
    m = tiny.randomize_lora(tl.add_lora(base, **{"r": 2, **options}), rng)
    peft.save_adapter(m, folder)
    return m


def load(base, folder, **options):
    """What load_adapter warns of, as one string."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        peft.load_adapter(base, folder, **options)
    return " | ".join(str(w.message) for w in heard)


def half(m):
    """The model with every weight rounded to float16."""
    for w in m.parameters():
        w.data = w.data.astype(np.float16).astype(np.float32)
    return m


def read(m, folder, dtype):
    m.save_pretrained(folder, dtype=dtype)
    return tl.Llama.from_pretrained(folder)


def in_4_bits(m, folder):
    bitsandbytes.save(tl.quantize_linears(m), folder)
    return tl.Llama.from_pretrained(folder)


FORMS = {
    "a float32 file": lambda folder: read(tiny.model(), folder, "float32"),
    "its bfloat16 copy": lambda folder: read(tiny.model(), folder, "bfloat16"),
    "its float16 copy": lambda folder: half(tiny.model()),
    "the float16 copy of its bfloat16 copy": lambda folder: half(read(tiny.model(), folder, "bfloat16")),
    "with a head of its own": lambda folder: tiny.model().untie(),
    "in bfloat16": lambda folder: tl.quantize_linears(tiny.model(), "bfloat16"),
}


@pytest.mark.parametrize(
    "one, other",
    [
        *(("a float32 file", other) for other in FORMS if other != "the float16 copy of its bfloat16 copy"),
        ("its bfloat16 copy", "the float16 copy of its bfloat16 copy"),
        ("its bfloat16 copy", "in bfloat16"),
        ("its bfloat16 copy", "with a head of its own"),
        ("its float16 copy", "with a head of its own"),
    ],
)
def test_a_base_is_known_in_every_form_of_16_or_32_bits(one, other, rng, tmp_path):
    for here, there in ((one, other), (other, one)):
        adapted(FORMS[here](tmp_path / "here"), rng, tmp_path / "a")
        assert load(FORMS[there](tmp_path / "there"), tmp_path / "a") == ""


def test_two_copies_of_one_base_that_share_no_rounding_are_refused_with_that_reason(rng, tmp_path):
    """float16 and bfloat16 of float32 weights, and Q8_0: weights that differ by their rounding, of which a hash tells no size."""
    adapted(half(tiny.model()), rng, tmp_path / "a")
    copy = read(tiny.model(), tmp_path / "copy", "bfloat16")
    with pytest.raises(ValueError, match=r"another base, or on a copy of this one in another precision: .* --force"):
        peft.load_adapter(copy, tmp_path / "a")
    peft.load_adapter(copy, tmp_path / "a", check_base=False)
    eighths = tiny.model()
    for w in eighths.parameters():
        scale = np.abs(w.data).max(-1, keepdims=True) / 127
        w.data = (np.round(w.data / scale) * scale).astype(np.float32)
    with pytest.raises(ValueError, match="a copy of this one in another precision"):
        peft.load_adapter(eighths, tmp_path / "a")


@pytest.mark.parametrize("code", ["nf4", "fp4", "int4"])
def test_another_way_to_hold_the_base_is_said_and_its_own_is_not(code, rng, tmp_path):
    def base(**options):
        return tl.quantize_linears(tiny.model(), **{"code": code, **options})

    adapted(base(), rng, tmp_path / "a")
    assert load(base(), tmp_path / "a") == "" == load(base(compute_dtype="bfloat16"), tmp_path / "a")
    for other, words in (
        (base(blocksize=32), f"{code} (blocks of 32, double quantization)"),
        (base(double_quant=False), f"{code} (blocks of 64)"),
        (base(code="sf4"), "sf4 (blocks of 64, double quantization)"),
        (tiny.model(), "float32"),
        (base(code="bfloat16"), "bfloat16"),
    ):
        said = load(other, tmp_path / "a")
        assert said.endswith(
            f"was trained on this base in {code} (blocks of 64, double quantization), and here it is held in {words}"
        )
    adapted(tiny.model(), rng, tmp_path / "b")
    assert "was trained on this base in float32, and here it is held in nf4" in load(base(code="nf4"), tmp_path / "b")


def test_a_4_bit_folder_is_the_base_that_it_was_made_from(rng, tmp_path):
    adapted(tl.quantize_linears(tiny.model()), rng, tmp_path / "a")
    assert load(in_4_bits(tiny.model(), tmp_path / "base"), tmp_path / "a") == ""
    assert "here it is held in nf4" in load(in_4_bits(tiny.model(), tmp_path / "base"), _dense(rng, tmp_path / "b"))
    with pytest.raises(ValueError, match="was trained on another base"):
        peft.load_adapter(in_4_bits(tiny.model(seed=1), tmp_path / "other"), tmp_path / "a")


def _dense(rng, folder):
    adapted(tiny.model(), rng, folder)
    return folder


@pytest.mark.parametrize("code", ["nf4", "int4", "int8_vectorwise"])
def test_codes_that_differ_by_the_rounding_of_a_file_are_the_base_and_this_is_said(code, rng, tmp_path):
    """The codes of a float32 file and of its bfloat16 copy: 0.1 to 0.2 % apart, which no merge of any effect is."""
    adapted(tl.quantize_linears(tiny.model(), code), rng, tmp_path / "a")
    copy = read(tiny.model(), tmp_path / "copy", "bfloat16")
    assert "made from a file of another precision" in load(tl.quantize_linears(copy, code), tmp_path / "a")
    assert "here it is held in float32" in load(read(tiny.model(), tmp_path / "copy", "bfloat16"), tmp_path / "a")


def changed(m, path, by=0.02):
    w = m.get(path)
    w.data = w.data + (by * np.abs(w.data).mean() * np.random.default_rng(0).standard_normal(w.shape)).astype(
        np.float32
    )
    return m


def merged(rng, quantize=None):
    m = tiny.model() if quantize is None else tl.quantize_linears(tiny.model(), quantize)
    m = tl.add_lora(m, r=2)
    for _, layer in adapters.lora_layers(m):
        layer.lora_B.weight.data += 0.05
    return tl.merge(m)


OTHERS = {
    "other weights of the same sizes": lambda rng: tiny.model(seed=1),
    "another embedding": lambda rng: changed(tiny.model(), "model.embed_tokens.weight"),
    "another norm": lambda rng: changed(tiny.model(), "model.layers.1.input_layernorm.weight"),
    "one linear layer fine-tuned": lambda rng: changed(tiny.model(), "model.layers.1.mlp.up_proj.weight"),
    "a merged model": merged,
    "a merged model, in bfloat16": lambda rng: tl.quantize_linears(merged(rng), "bfloat16"),
    "a head of its own": lambda rng: changed(tiny.model().untie(), "lm_head.weight"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_base_is_refused_and_nothing_has_changed(other, rng, tmp_path):
    adapted(tiny.model(), rng, tmp_path / "a")
    m, x = OTHERS[other](rng), tiny.ids(rng, 1, 9)
    before = tiny.logits(m, x)
    with pytest.raises(
        ValueError, match=r"a was trained on another base, or on a copy of .*: this model's weights are others"
    ):
        peft.load_adapter(m, tmp_path / "a")
    assert not adapters.lora_layers(m) and tiny.logits(m, x).tobytes() == before.tobytes()
    peft.load_adapter(m, tmp_path / "a", check_base=False)


@pytest.mark.parametrize("code", ["nf4", "fp4", "int8_vectorwise"])
def test_a_merged_model_is_another_base_in_few_bits_too(code, rng, tmp_path):
    """Also where the base was in few bits and what is here is dense: the codes that it would get are compared."""
    adapted(tl.quantize_linears(tiny.model(), code), rng, tmp_path / "a")
    assert "here it is held in float32" in load(tiny.model(), tmp_path / "a")
    for other in (merged(rng, code), merged(rng), tl.quantize_linears(merged(rng), "bfloat16")):
        with pytest.raises(ValueError, match="A fine-tuned or merged copy is another base too"):
            peft.load_adapter(other, tmp_path / "a")


def test_what_an_adapter_trained_whole_is_no_part_of_its_base(rng, tmp_path):
    m = tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1"], bias="all", modules_to_save=["head", "fc2"])
    tiny.randomize_trainable(m, rng)
    peft.save_adapter(m, tmp_path / "a")
    tl.add_lora(m, r=2, target_modules=["embed"], name="b")
    tl.set_adapter(m, "b")
    peft.save_adapter(m, tmp_path / "b", name="b")  # beside another one
    about = [peft.read_base(tmp_path / name).about for name in "ab"]
    assert about[0] == about[1] and load(tiny.zoo(), tmp_path / "a") == ""
    both = peft.load_adapter(tiny.zoo(), tmp_path / "a", "a")
    assert load(both, tmp_path / "b", name="b") == ""


def test_the_base_is_named_and_described_in_the_metadata_alone(rng, tmp_path):
    m = tl.add_lora(tl.quantize_linears(tiny.model(), "fp4", 32), r=2)
    peft.save_adapter(m, tmp_path, base_model="somewhere/base")
    metadata = safetensors.Safetensors(tmp_path / "adapter_model.safetensors").metadata
    assert (
        metadata["format"] == "pt" and metadata.keys() == {"format", "tinylora"} and len(metadata["tinylora"]) < 10_000
    )
    about = json.loads(metadata["tinylora"])
    assert about["base"] == "somewhere/base" and "tinylora" not in (tmp_path / "adapter_config.json").read_text()
    wanted = {"code": "fp4", "blocksize": 32, "double_quant": True, "compute_dtype": "float32"}
    assert about["held"] == wanted == peft.read_base(tmp_path).held


def test_a_base_whose_weights_were_bfloat16_is_opened_so_again(rng, tmp_path):
    tiny.model().save_pretrained(tmp_path / "base", dtype="float32")
    m = tl.Llama.from_pretrained(tmp_path / "base", dtype="bfloat16", quantize="nf4")
    adapted(m, rng, tmp_path / "a")
    again = tl.Llama.from_pretrained(tmp_path / "base", **identity.opening(peft.read_base(tmp_path / "a").held))
    assert load(again, tmp_path / "a") == "" and again.model.layers[0].mlp.up_proj.weight.dtype == "bfloat16"
    x = tiny.ids(rng, 1, 9)
    assert tiny.logits(again, x).tobytes() == tiny.logits(m, x).tobytes()


@pytest.mark.parametrize(
    "options",
    [
        {"code": "nf4", "blocksize": 128, "double_quant": False},
        {"code": "nf4", "rule": "bitsandbytes-cuda", "nested_code": "fp8_e4m3", "compute_dtype": "bfloat16"},
        {"code": "sf4", "signed": True},
        {"code": [-1.0, -0.5, 0.0, 0.25, 1.0]},
        {"code": "bfloat16"},
        {"code": "int8_vectorwise", "threshold": 3.0, "integer_products": "never"},
        {"code": "nf4", "skip": ("lm_head", "down_proj")},
    ],
)
def test_the_recorded_options_hold_the_base_so_again(options, rng, tmp_path):
    tiny.model().save_pretrained(tmp_path / "base", dtype="float32")
    m = adapted(tl.Llama.from_pretrained(tmp_path / "base", quantize=options), rng, tmp_path / "a")
    held = peft.read_base(tmp_path / "a").held
    again = tl.Llama.from_pretrained(tmp_path / "base", **identity.opening(held))
    assert load(again, tmp_path / "a") == ""
    x = tiny.ids(rng, 1, 9)
    assert tiny.logits(again, x).tobytes() == tiny.logits(m, x).tobytes()


def test_layers_that_are_held_in_several_ways_have_no_options(rng, tmp_path):
    m = tl.quantize_linears(tiny.model())
    m.replace("model.layers.0.mlp.up_proj", tl.nn.Linear4bit.of(tiny.model().model.layers[0].mlp.up_proj, "fp4"))
    adapted(m, rng, tmp_path / "a")
    assert peft.read_base(tmp_path / "a").held == {"code": "mixed"}
    with pytest.raises(ValueError, match="held in several codes"):
        identity.opening({"code": "mixed"})
    with pytest.raises(ValueError, match="another base"):
        peft.load_adapter(tiny.model(seed=1), tmp_path / "a")


def test_a_file_without_a_description_is_taken_as_pefts(rng, tmp_path):
    m = adapted(tiny.model(), rng, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors, _ = safetensors.load_safetensors(path)
    safetensors.save_safetensors(path, {name: w.copy() for name, w in tensors.items()})
    assert load(tiny.model(seed=1), tmp_path) == "" and peft.read_base(tmp_path).about is None
    assert m is not None


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"dense": 1}', '{"dense": [], "linear": [], "codes": "xy", "held": {"code": "nf4"}}']
)
def test_a_damaged_description_is_a_sentence(damage, rng, tmp_path):
    adapted(tiny.model(), rng, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors, _ = safetensors.load_safetensors(path)
    metadata = {"format": "pt", "tinylora": damage}
    safetensors.save_safetensors(path, {name: w.copy() for name, w in tensors.items()}, metadata)
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors: its description of the adapter's base is damaged"
    ):
        peft.load_adapter(tiny.model(), tmp_path)


GOOD = {"dense": ["a"], "linear": None, "codes": None, "held": {"code": "nf4", "blocksize": 64}}


@pytest.mark.parametrize(
    "damage, words",
    [
        ("[" * 100_000, "maximum recursion depth"),
        ("x" * (5 << 20), "the metadata: tinylora = 'x{59}…, expected a text of at most"),
        (GOOD | {"held": {"code": "nf4"}}, "held.blocksize is missing beside the code 'nf4'"),
        (GOOD | {"held": {"code": "nf4", "blocksize": 0}}, "held: blocksize = 0, expected a whole number"),
        (GOOD | {"held": {"code": "nf4", "blocksize": 64, "zzz": 1}}, "held.zzz is no option of the code 'nf4'"),
        (GOOD | {"held": {"code": "int8_vectorwise", "blocksize": 64}}, "held.blocksize is no option of the code"),
        (GOOD | {"held": {"code": "mixed", "threshold": 6.0}}, "held.threshold is no option of the code 'mixed'"),
        (GOOD | {"held": {"code": "int8_vectorwise", "threshold": float("nan")}}, "held: threshold = nan"),
        (GOOD | {"held": {"code": [0.0, float("inf")], "blocksize": 64}}, r"held: code = \[0.0, inf\], expected one of"),
        (GOOD | {"held": {"code": [1.0, 0.0], "blocksize": 64}}, "in ascending order"),
        (GOOD | {"held": {"code": "nf4", "blocksize": 64, "skip": "lm_head"}}, "held: skip = 'lm_head', expected a list"),
        (GOOD | {"held": ["nf4"]}, "the description: held = .*, expected an object"),
        (GOOD | {"codes": "00" * (1 << 20)}, "the description: codes = '0{59}…, expected a text"),
        (GOOD | {"codes": "00ff"}, "codes holds numbers that the code 'nf4' does not have"),
        (GOOD | {"codes": "0003", "held": {"code": [0.0, 1.0], "blocksize": 2}}, "codes holds numbers that the code"),
        (GOOD | {"codes": "00", "held": None}, "codes holds numbers that the code None does not have"),
        (GOOD | {"dense": [["a"]]}, r"the description: dense\[0\] = "),
        (GOOD | {"dense": None}, "the description: dense = None, expected a list"),
        (GOOD | {"base": 7}, "the description: base = 7, expected a name or a path"),
        (GOOD | {"base": "a\0b"}, "expected a name or a path"),
    ],
)  # fmt: skip
def test_a_description_is_believed_in_nothing(damage, words, rng, tmp_path):
    adapted(tiny.model(), rng, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors, _ = safetensors.load_safetensors(path)
    damage = damage if isinstance(damage, str) else json.dumps(damage)
    safetensors.save_safetensors(path, {name: w.copy() for name, w in tensors.items()}, {"tinylora": damage})
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: its description .* is damaged \(.*{words}"):
        peft.load_adapter(tiny.model(), tmp_path)


@pytest.mark.parametrize("held", [{"code": "nf4", "blocksize": 1 << 40}, {"code": "bfloat16"}, {"code": "mixed"}, None])
def test_a_strange_way_to_hold_a_base_is_compared_without_more_memory(held, rng, tmp_path):
    adapted(tiny.model(), rng, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors, metadata = safetensors.load_safetensors(path)
    about = json.loads(metadata["tinylora"]) | {"held": held}
    about["linear"] = about["linear"] if held in (None, {"code": "bfloat16"}, {"code": "mixed"}) else None
    safetensors.save_safetensors(path, {n: w.copy() for n, w in tensors.items()}, {"tinylora": json.dumps(about)})
    said = load(tiny.model(), tmp_path)
    assert ("was trained on this base in" in said) == (held not in (None, {"code": "bfloat16"}))


@pytest.mark.parametrize("name", ["a" * 5000, "\x1b[31mred\n", "/dev/zero", "../nowhere", "~", "."])
def test_a_base_of_a_strange_name_is_not_found(name, rng, tmp_path):
    peft.save_adapter(adapted(tiny.model(), rng, tmp_path), tmp_path, base_model=name)
    with pytest.raises(ValueError, match="which is no folder or file here; give the base with --model") as caught:
        peft.read_base(tmp_path).find()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 900


def test_a_base_on_a_device_is_known(rng, tmp_path, xp):
    adapted(tl.quantize_linears(tiny.model()).to(xp), rng, tmp_path / "a")
    adapted(tiny.model().to(xp), rng, tmp_path / "b")
    assert load(tl.quantize_linears(tiny.model()), tmp_path / "a") == "" == load(tiny.model().to(xp), tmp_path / "b")
    assert "here it is held in float32" in load(tiny.model().to(xp), tmp_path / "a")


@pytest.mark.parametrize("shape, blocksize", [((3, 5), 64), ((7, 48), 64), ((40, 96), 64), ((8, 16), 1024)])
def test_the_codes_that_a_dense_weight_would_get_are_those_that_it_gets(shape, blocksize, rng):
    """Blocks that end within a row, a weight smaller than a block, a partial block at the end."""
    layer = Linear.of(Tensor(rng.standard_normal(shape).astype(np.float32)))
    held = {"code": "nf4", "blocksize": blocksize, "double_quant": True}
    stored = tl.nn.quantized_linear("w", layer, **held)
    for n in (1, 500):
        a, b = (identity._codes(w, held, n) for w in (layer.weight, stored.weight))
        assert len(a) and a.tobytes() == b.tobytes()
    whole = identity._codes(stored.weight, held, 1)
    assert set(whole) <= set(stored.weight.indices().reshape(-1))


def test_a_large_base_is_described_in_few_bytes_and_little_time():
    backend.seed(0)
    m = tl.Llama.from_pretrained("base", quantize="nf4")
    about = identity.identity(adapters.targets.own_weights(m), adapters.targets.linears(m))
    assert len(json.dumps(about)) < 12_000
    assert about["held"] == {"code": "nf4", "blocksize": 64, "double_quant": True, "compute_dtype": "float32"}


# ---------------------------------------------------------------------------------------------- with the extra llm: GGUF, tokenizers
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_gguf_and_the_folder_that_it_is_converted_to_are_one_base(kind, rng, tmp_path):
    pytest.importorskip("gguf")
    import llm_files

    from tinylora.models.llama import convert

    source = tmp_path / "model.gguf"
    llm_files.write_gguf(source, tiny.model(hidden_size=64, intermediate_size=96), (kind,))
    adapted(tl.Llama.from_pretrained(source), rng, tmp_path / "dense")
    adapted(tl.Llama.from_pretrained(source, quantize="nf4"), rng, tmp_path / "nf4")
    for dtype in ("float32", "bfloat16"):
        convert(source, tmp_path / dtype, dtype)
        assert load(tl.Llama.from_pretrained(tmp_path / dtype), tmp_path / "dense") == ""
        said = load(tl.Llama.from_pretrained(tmp_path / dtype, quantize="nf4"), tmp_path / "nf4")
        assert said == "" or (dtype == "bfloat16" and "a file of another precision" in said)


@pytest.fixture
def grown(tmp_path, rng):
    """A base with a vocabulary, and an adapter's folder with two more tokens in its tokenizer and rows for them in its file."""
    pytest.importorskip("tokenizers")
    import llm_files

    tokenizer = llm_files.trained()
    size = tokenizer.vocab_size
    base = tiny.model(vocab_size=size)
    base.tokenizer = tokenizer
    base.save_pretrained(tmp_path / "base", dtype="float32")
    m = tiny.randomize_lora(tl.add_lora(base, r=2, target_modules=["q_proj"]), rng)
    peft.save_adapter(m, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, metadata = safetensors.load_safetensors(path)
    rows = np.concatenate([base.model.embed_tokens.weight.data, rng.standard_normal((2, 32)).astype(np.float32)])
    tensors = {name: w.copy() for name, w in tensors.items()} | {"base_model.model.model.embed_tokens.weight": rows}
    safetensors.save_safetensors(path, tensors, metadata)
    more = llm_files.trained()
    more.backend.add_special_tokens(["<tool>", "</tool>"])
    more.save(tmp_path / "adapter")
    return tmp_path, m, rows


def test_added_tokens_come_with_the_adapter_and_their_tokenizer(grown, capsys):
    from tinylora.cli import main

    folder, m, rows = grown
    command = ["--adapter", str(folder / "adapter")]
    assert main(["merge", *command, "--model", str(folder / "base"), "--out", str(folder / "merged")]) == 0
    again = tl.Llama.from_pretrained(folder / "merged")
    assert again.config.vocab_size == len(rows) == again.tokenizer.backend.token_to_id("</tool>") + 1
    np.testing.assert_array_equal(again.model.embed_tokens.weight.data, rows)
    x = np.array([[1, 5, len(rows) - 1, 7]])
    with pytest.raises(IndexError):
        m(x)
    loaded = peft.load_adapter(tl.Llama.from_pretrained(folder / "base"), folder / "adapter")
    np.testing.assert_allclose(tiny.logits(again, x), tiny.logits(loaded, x), rtol=1e-4, atol=1e-5)
    assert main(["generate", *command, "--prompt", "a<tool>b", "--max-new-tokens", "2", "--temperature", "0"]) == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"adapter brings model.embed_tokens along, or rows of it"):
        peft.read_adapter(folder / "adapter")


def test_an_adapter_with_added_tokens_is_trained_further_with_them(grown, capsys):
    from tinylora.cli import main

    folder, _, rows = grown
    (folder / "text.txt").write_text("\n\n".join(f"<tool>word {i}</tool>\n  n. The {i}th of them." for i in range(80)))
    quick = ["--steps", "2", "--seq-len", "32", "--batch-size", "2", "--text", str(folder / "text.txt")]
    command = ["finetune", "--adapter", str(folder / "adapter"), *quick, "--out", str(folder / "run")]
    assert main(command) == 0, capsys.readouterr().err
    again = peft.load_adapter(
        tl.Llama.from_pretrained(folder / "base", quantize="bfloat16"), folder / "run" / "adapter"
    )
    np.testing.assert_array_equal(again.model.embed_tokens.weight.data, rows)  # brought along, not trained
    capsys.readouterr()
    assert (
        main(["generate", "--adapter", str(folder / "run" / "adapter"), "--prompt", "<tool>", "--max-new-tokens", "1"])
        == 0
    )
    assert capsys.readouterr().err == "" and (folder / "run" / "adapter" / "tokenizer.json").is_file()


def test_a_tokenizer_with_more_tokens_than_rows_says_what_to_do(grown, capsys):
    from tinylora.cli import main

    folder, _, rows = grown
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors, metadata = safetensors.load_safetensors(path)
    safetensors.save_safetensors(path, {n: w.copy() for n, w in tensors.items() if "embed_tokens" not in n}, metadata)
    assert main(["generate", "--adapter", str(folder / "adapter"), "--max-new-tokens", "1"]) == 2
    said = capsys.readouterr().err
    assert f"tokenizer.json has {len(rows)} tokens, and the model's embedding {len(rows) - 2} rows" in said
    assert f"model.resize_token_embeddings({len(rows)}), then save_pretrained" in said


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"trainable_token_indices": [3, 256]},
            r"names the token 256, and the model's model.embed_tokens.weight has 256 rows; .* \(257\)",
        ),
        (
            {"trainable_token_indices": [3]},
            r"its rows for model.embed_tokens.weight have shape \(2, 32\), expected \(1, 32\)",
        ),
        ({"trainable_token_indices": {"lm_head": [3, 4]}}, "the file holds rows for model.embed_tokens"),
        ({"trainable_token_indices": None}, "the file holds rows for model.embed_tokens"),
    ],
)
def test_replaced_rows_that_do_not_fit_are_a_sentence(change, words, rng, tmp_path):
    adapted(tiny.model(), rng, tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, metadata = safetensors.load_safetensors(path)
    delta = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 32), np.float32)}
    safetensors.save_safetensors(path, {n: w.copy() for n, w in tensors.items()} | delta, metadata)
    plain = json.loads(config.read_text())
    config.write_text(json.dumps(plain | {"trainable_token_indices": [3, 4]}))
    m = peft.load_adapter(tiny.model(), tmp_path)
    assert (m.model.embed_tokens.weight.data[[3, 4]] == 1).all() and not m.model.embed_tokens.weight.requires_grad
    from tinylora.training.finetune import going_on

    with pytest.raises(ValueError, match=r"trains single rows of model\.embed_tokens"):
        going_on(tmp_path, model="base")
    config.write_text(json.dumps(plain | change))
    with pytest.raises(ValueError, match=words.replace("rows; .* ", "rows; .*")):
        peft.load_adapter(tiny.model(), tmp_path)
    safetensors.save_safetensors(path, {n: w.copy() for n, w in tensors.items()}, metadata)
    config.write_text(json.dumps(plain | {"trainable_token_indices": [3, 4]}))
    with pytest.raises(ValueError, match="the file holds no rows for these tokens"):
        peft.load_adapter(tiny.model(), tmp_path)
