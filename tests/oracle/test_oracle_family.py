"""The Llama family against transformers, PEFT and bitsandbytes: small random models of each kind, opened on either side.

Logits are compared over the largest logit, gradients over each parameter's largest entry; both sides compute in float32 and add in
another order. Norms and biases are random too: fresh ones, ones and zeros, would hide that they are not used.
"""

import contextlib
import json
import os

import llm_files
import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import KVCache, Llama, cli, no_grad, ops
from tinylora.interop import bitsandbytes as four_bits
from tinylora.interop import peft as adapter_files
from tinylora.models import safetensors
from tinylora.training import finetune
from tinylora.training.train import Recipe

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::UserWarning")]

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IN_4_BITS = {
    "hidden_size": 64,
    "intermediate_size": 128,
}  # whole blocks of 64 a row: see tests/README.md
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
KINDS = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e4, **LLAMA3}}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 with biases and windows": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}


def theirs_of(kind, rng, **changes):
    """A small random model of transformers."""
    torch.manual_seed(int(rng.integers(2**32)))
    family, options = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, w in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            w.copy_(centre + torch.randn_like(w) * (0.3 if w.ndim == 1 else w.shape[1] ** -0.5))
    return model


def opened_by_transformers(folder, **options):
    """The folder's model, in train mode (in eval mode bitsandbytes repacks its weights); nothing may be missing or left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.train()


def logits(model, ids):
    if isinstance(model, tl.nn.Module):
        with no_grad():
            return model(ids).data
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def relative(a, b):
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def agree(a, b, what, bound=1e-5):
    error = relative(a, b)
    print(f"{what}: {error:.1e}")
    assert error < bound, what


def length(kind):
    return 100 if kind == "dynamic" else 64  # dynamic is defined beyond max_position_embeddings


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_every_gradient_are_transformers(kind, attention, tmp_path, rng):
    theirs = theirs_of(kind, rng)
    theirs.set_attn_implementation(attention)
    theirs.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path)
    x, y = rng.integers(0, 256, (2, 2, length(kind)))
    mine, their = ours(x), theirs(torch.from_numpy(x)).logits
    agree(mine.data, their.detach().numpy(), f"{kind}: logits")
    ops.softmax_cross_entropy(mine, y).backward()
    torch.nn.functional.cross_entropy(their.flatten(0, 1), torch.from_numpy(y).flatten()).backward()
    expected = {name: w.grad.numpy() for name, w in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == expected.keys()
    worst = {name: relative(w.grad, expected[name]) for name, w in ours.named_parameters()}
    name = max(worst, key=worst.get)
    print(f"{kind}: gradients: {worst[name]:.1e} ({name})")
    assert worst[name] < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_written_here_is_the_same_model_in_transformers(kind, tmp_path, rng):
    theirs, x = theirs_of(kind, rng), rng.integers(0, 256, (2, length(kind)))
    theirs.save_pretrained(tmp_path / "a")
    ours = Llama.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b", "float32")
    again = opened_by_transformers(tmp_path / "b")
    assert type(again) is type(theirs)
    assert (logits(again, x) == logits(theirs, x)).all()
    first, second = theirs.config.to_dict(), again.config.to_dict()
    for name in (
        "rope_parameters",
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "attention_bias",
        "head_dim",
    ):
        if name != "sliding_window" or first.get("use_sliding_window", True):
            assert (name not in first) or first[name] == second[name], name
    ours.save_pretrained(tmp_path / "half")
    half = opened_by_transformers(tmp_path / "half")
    agree(logits(Llama.from_pretrained(tmp_path / "half"), x), logits(half, x), "bfloat16")


@pytest.mark.parametrize("kind", KINDS)
def test_both_caches_give_the_same(kind, tmp_path, rng):
    """Token by token, beyond max_position_embeddings where that is defined: a key then stays as it was turned when it came."""
    theirs, x = theirs_of(kind, rng), rng.integers(0, 256, (1, 80 if kind == "dynamic" else 64))
    theirs.save_pretrained(tmp_path)
    ours, cache, past = Llama.from_pretrained(tmp_path), KVCache(80), None
    for start, end in ((0, 5), (5, 6), (6, 40), *((i, i + 1) for i in range(40, x.shape[1]))):
        with torch.no_grad():
            step = theirs(torch.from_numpy(x[:, start:end]), past_key_values=past, use_cache=True)
        past = step.past_key_values
        with no_grad():
            mine = ours(x[:, start:end], cache).data
        assert relative(mine, step.logits.numpy()) < 1e-5, end


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nested", [True, False], ids=["double quantization", ""])
def test_4_bits_written_here_run_in_transformers(kind, nested, tmp_path, rng):
    theirs_of(kind, rng, **IN_4_BITS).save_pretrained(tmp_path / "dense")
    ours = Llama.from_pretrained(tmp_path / "dense", quantize={"code": "nf4", "double_quant": nested})
    four_bits.save(ours, tmp_path / "four")
    theirs, x = opened_by_transformers(tmp_path / "four"), rng.integers(0, 256, (2, length(kind)))
    layers = {name: layer for name, layer in theirs.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert len(layers) == 21
    for name, layer in layers.items():
        assert (layer.bias is None) == (ours.get(name).bias is None)
    agree(logits(ours, x), logits(theirs, x), f"{kind}: logits in 4 bits")
    assert (logits(Llama.from_pretrained(tmp_path / "four"), x) == logits(ours, x)).all()


@pytest.mark.parametrize("kind", ["llama with biases", "qwen2", "qwen3 with biases and windows"])
def test_4_bits_written_by_transformers_open_here(kind, tmp_path, rng):
    theirs_of(kind, rng, **IN_4_BITS).save_pretrained(tmp_path / "dense")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    theirs = opened_by_transformers(tmp_path / "dense", quantization_config=how)
    theirs.save_pretrained(tmp_path / "four")
    x = rng.integers(0, 256, (2, 64))
    agree(logits(Llama.from_pretrained(tmp_path / "four"), x), logits(theirs, x), f"{kind}: logits in 4 bits")


def a_step(model, x):
    """One step of SGD on the trainable parameters, here or there."""
    if isinstance(model, tl.nn.Module):
        ops.softmax_cross_entropy(model(x[:, :-1]), x[:, 1:]).backward()
        for _, w in model.trainable():
            w.data = w.data - np.float32(0.5) * w.grad
        return
    out = model(input_ids=torch.from_numpy(x[:, :-1])).logits
    torch.nn.functional.cross_entropy(out.flatten(0, 1), torch.from_numpy(x[:, 1:]).flatten()).backward()
    with torch.no_grad():
        for w in model.parameters():
            if w.requires_grad:
                w -= 0.5 * w.grad


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_all_linear_layers_go_to_peft_and_come_back(kind, tmp_path, rng):
    theirs, (x, y) = theirs_of(kind, rng), rng.integers(0, 256, (2, 2, 40))
    theirs.save_pretrained(tmp_path / "base")
    ours = Llama.from_pretrained(tmp_path / "base")
    base = logits(ours, x)
    tl.add_lora(ours, r=4)
    a_step(ours, y)
    adapter_files.save_adapter(ours, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    assert len([n for n, _ in wrapped.named_parameters() if "lora_A" in n]) == 21
    agree(logits(ours, x), logits(wrapped, x), f"{kind}: trained here, run in PEFT")
    assert relative(logits(ours, x), base) > 1e-3
    before = logits(wrapped, x)
    a_step(wrapped, y)
    wrapped.save_pretrained(tmp_path / "back")
    again = adapter_files.load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "back")
    agree(logits(again, x), logits(wrapped, x), f"{kind}: trained in PEFT, run here")
    assert relative(logits(wrapped, x), before) > 1e-3


# ------------------------------------------------------------------------------------------------------------ heads, tied or not
@pytest.mark.parametrize("four", [False, True], ids=["dense", "4 bits"])
@pytest.mark.parametrize("head", ["its own", "the embedding"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_head_beside_a_tied_embedding_is_what_transformers_makes_of_it(kind, head, four, tmp_path, rng):
    theirs, x = theirs_of(kind, rng, **IN_4_BITS, tie_word_embeddings=False), rng.integers(0, 256, (2, 20))
    if head == "the embedding":
        with torch.no_grad():
            theirs.lm_head.weight.copy_(theirs.model.embed_tokens.weight)
    theirs.save_pretrained(tmp_path / "dense")
    folder = tmp_path / "dense"
    if four:
        four_bits.save(Llama.from_pretrained(folder, quantize="nf4"), tmp_path / "four")
        folder = tmp_path / "four"
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    ours = Llama.from_pretrained(folder)
    agree(logits(ours, x), logits(transformers.AutoModelForCausalLM.from_pretrained(folder).train(), x), "logits")
    assert (ours.lm_head is None) == (head == "the embedding") == ours.config.tie_word_embeddings


# ------------------------------------------------------------------------------------------------------------------------- GGUF
@pytest.mark.parametrize("kinds", [("F32",), ("Q4_1", "Q8_0")], ids=["F32", "Q4_1, Q8_0"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen2, tied", "qwen3", "llama"])
def test_transformers_reads_the_same_model_out_of_a_gguf(kind, kinds, tmp_path, rng):
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    changes = {
        "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
        "qwen2, tied": {"model_type": "qwen2"},
        "qwen3": {
            "model_type": "qwen3",
            "head_dim": 128,
            "tie_word_embeddings": False,
        },  # theirs does not read key_length
        "llama": {},
    }[kind]
    t = llm_files.trained(digits=False)
    m = tiny.model(int(rng.integers(1000)), intermediate_size=64, vocab_size=t.vocab_size, **changes)
    for _, w in m.named_parameters():
        if w.ndim == 1:
            w.data += (0.3 * rng.standard_normal(w.shape)).astype(np.float32)
    llm_files.write_gguf(tmp_path / "m.gguf", m, kinds, t, pre="gpt-2")
    ours = Llama.from_pretrained(tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    assert theirs.config.model_type == ours.config.model_type
    x = rng.integers(0, t.vocab_size, (2, 50))
    agree(logits(ours, x), logits(theirs, x), f"{kind} in {kinds}: logits")


@pytest.mark.parametrize("kind", ["llama3", "linear", "divisors", "mistral", "qwen3"])
def test_transformers_opens_the_folder_that_such_a_gguf_became(kind, tmp_path, rng):
    """Its own GGUF reader knows neither scaled positions nor windows; its folders do."""
    pytest.importorskip("gguf")
    m, more = tiny.of_the_family("linear" if kind == "divisors" else kind, rng), {}
    if kind == "divisors":
        m = tiny.model()
        more = {"extra_tensors": {"rope_freqs.weight": rng.uniform(1, 9, 4).astype(np.float32)}}
    llm_files.write_gguf(tmp_path / "m.gguf", m, **more)
    tl.llama.convert(tmp_path / "m.gguf", tmp_path / "out", "float32")
    theirs, x = opened_by_transformers(tmp_path / "out"), rng.integers(0, 256, (2, 64))
    agree(logits(Llama.from_pretrained(tmp_path / "m.gguf"), x), logits(theirs, x), f"{kind}: logits")
    assert kind == "divisors" or relative(logits(m, x), logits(theirs, x)) < 1e-5


# --------------------------------------------------------------------------------------------------------- from a folder to PEFT
@pytest.mark.parametrize("kind", ["qwen2", "llama3"])
def test_finetune_takes_a_folder_to_peft_and_an_adapter_back(kind, tmp_path, rng):
    """A folder of transformers with a vocabulary, `tinylora finetune`, PEFT, training there, and `tinylora generate` and `merge` here."""
    pytest.importorskip("tokenizers")
    t = llm_files.trained()
    sizes = {**IN_4_BITS, "vocab_size": t.vocab_size, "max_position_embeddings": 128}
    base, run, x = tmp_path / "base", tmp_path / "run", rng.integers(0, t.vocab_size, (2, 60))
    theirs_of(kind, rng, **sizes).save_pretrained(base)
    t.save(base)
    (tmp_path / "text.txt").write_text("".join(llm_files.TEXT), encoding="utf-8")
    options = ["--steps", "4", "--batch-size", "2", "--seq-len", "32", "--lr", "1e-2", "-r", "4"]
    command = ["finetune", "--model", str(base), "--text", str(tmp_path / "text.txt"), *options, "--out", str(run)]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        assert cli.main(command) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["after"] < report["before"]
    four = Llama.from_pretrained(base, quantize="nf4")
    base_logits, ours = logits(four, x), adapter_files.load_adapter(four, run / "adapter")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = opened_by_transformers(base, quantization_config=how)
    wrapped = peft.PeftModel.from_pretrained(theirs, run / "adapter", is_trainable=True).train()
    agree(logits(ours, x), logits(wrapped, x), f"{kind}: QLoRA here, run by PEFT on bitsandbytes")
    assert relative(logits(ours, x), base_logits) > 1e-3
    a_step(wrapped, x)
    wrapped.save_pretrained(tmp_path / "back")
    again = adapter_files.load_adapter(Llama.from_pretrained(base, quantize="nf4"), tmp_path / "back")
    agree(logits(again, x), logits(wrapped, x), f"{kind}: QLoRA in PEFT, run here")
    merge = ["merge", "--model", str(base), "--adapter", str(tmp_path / "back"), "--out", str(tmp_path / "merged")]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        assert cli.main(merge) == 0
    assert safetensors.load_folder(tmp_path / "merged").keys() == safetensors.load_folder(base).keys()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"layers_to_transform": [1]}], ids=str)
def test_an_adapter_that_peft_trained_is_trained_further_here_and_goes_back(options, tmp_path, rng):
    """Held-out bits begin at what PEFT's adapter computes, and PEFT computes what the longer trained one computes here."""
    config = transformers.LlamaConfig(**SIZES)
    torch.manual_seed(int(rng.integers(1000)))
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(opened, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], **options))
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    job = finetune.going_on(tmp_path / "theirs", text=str(tmp_path / "t.txt"), method="lora", compute_dtype="float32")
    assert job.model == str(tmp_path / "base") and (job.r, job.use_dora) == (3, bool(options.get("use_dora")))
    recipe = Recipe(steps=3, batch_size=2, seq_len=32, lr=1e-2, warmup=0)
    finetune.finetune(job, recipe, tmp_path / "run", progress=False)
    x = rng.integers(0, 256, (2, 20))
    ours = adapter_files.load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "run" / "adapter")
    fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    further = peft.PeftModel.from_pretrained(fresh, tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        wanted, before = further(torch.tensor(x)).logits.numpy(), theirs.eval()(torch.tensor(x)).logits.numpy()
    np.testing.assert_allclose(ours.eval()(x).data, wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(wanted - before).max() > 1e-3  # it has learned something
