"""transformers, PEFT and the gguf package as witnesses for GGUF files that are written here.

transformers reads a GGUF with its own code: names, the order of rows, sizes and the vocabulary. What llama.cpp makes of a LoRA file
is its own formula, W x + (alpha / r) B A x on the tensors as they lie in both files: here it is computed with NumPy on what
gguf.GGUFReader reads, written as a GGUF again, opened by transformers, and compared with PEFT.
"""

import os

import llm_files
import numpy as np
import pytest
import tiny

from tinylora import Llama, no_grad
from tinylora.interop.gguf import convert_adapter
from tinylora.models import gguf_writer
from tinylora.models.tokenizers import BPETokenizer

pytestmark = pytest.mark.oracle

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

STRINGS = [
    "Once upon a time there was a miller who had three sons, his mill, a donkey and a cat.",
    "In 1984 and 2001, 12345 apples cost $3.14159 (or 99%); it isn't cheap, they'll say: \"we've paid\".",
    "def f(x):\n    return x ** 2  # squared\n\n\tif __name__ == '__main__':\r\n        print(f(7))",
    "naïve café Ωmega 你好，世界 — “quoted” 🙂👩‍👩‍👧 текст",
    "  two  spaces   three\n\n\n and \u00a0 more \n",
    "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
]


def opened(path, config=None):
    """The model that transformers reads from a GGUF; with a config, what that says of it."""
    auto, options = transformers.AutoModelForCausalLM, {} if config is None else {"config": config}
    return auto.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **options).eval()


def relative_error(ours, theirs, ids):
    """The largest |difference| of the logits over the largest |logit|. Each a model here or there, or logits."""

    def logits(model):
        if isinstance(model, np.ndarray):
            return model
        if isinstance(model, Llama):
            with no_grad():
                return model(ids).data
        with torch.no_grad():
            return model(torch.from_numpy(ids)).logits.numpy()

    ours, theirs = logits(ours), logits(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def spread(model, rng):
    """Give norms and biases values that would show if they were lost."""
    for _, p in model.named_parameters():
        if p.ndim == 1:
            p.data = (1 + 0.3 * rng.standard_normal(p.shape)).astype(np.float32)
    return model


@pytest.mark.parametrize("kind", list(gguf_writer.TYPES))
@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1, "tie_word_embeddings": False},
        {"num_key_value_heads": 4, "head_dim": 16, "rope_theta": 5e5, "rms_norm_eps": 1e-6},
    ],
)
def test_transformers_reads_the_same_model(kind, changes, tmp_path, rng):
    t = llm_files.trained(digits=False)
    m = spread(tiny.model(int(rng.integers(1000)), intermediate_size=64, vocab_size=t.vocab_size + 5, **changes), rng)
    m.tokenizer = t
    gguf_writer.save(m, tmp_path / "m.gguf", kind)
    ours, theirs = Llama.from_pretrained(tmp_path / "m.gguf"), opened(tmp_path / "m.gguf")
    ids = rng.integers(0, t.vocab_size, (2, 50))
    error = relative_error(ours, theirs, ids)
    print(f"{kind} {changes}: relative error {error:.2e}")
    assert error < 1e-5
    if kind == "f32":
        assert relative_error(m, theirs, ids) < 1e-5
    words = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in STRINGS:
        assert words.encode(text, add_special_tokens=False) == t.encode(text) == ours.tokenizer.encode(text), text
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (1, 2, 2)
    assert words.chat_template == llm_files.TEMPLATE


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"k_proj": 5}, "rank_pattern": {"q_proj": 3}}]
)
def test_what_llama_cpp_computes_with_an_adapter_of_peft_is_what_peft_computes(options, tmp_path, rng):
    peft = pytest.importorskip("peft")
    t = llm_files.trained(digits=False)
    m = tiny.model(int(rng.integers(1000)), intermediate_size=64, vocab_size=t.vocab_size, tie_word_embeddings=False)
    m.tokenizer = t
    m.save_pretrained(tmp_path / "base", "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options)).eval()
    torch.manual_seed(int(rng.integers(1000)))
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    convert_adapter(tmp_path / "adapter", tmp_path / "a.gguf", tmp_path / "base")
    gguf_writer.convert(tmp_path / "base", tmp_path / "base.gguf", "f32")

    adapter, base = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "base.gguf")
    alpha, factors = adapter.fields["adapter.lora.alpha"].contents(), {t.name: t.data for t in adapter.tensors}
    writer = gguf.GGUFWriter(tmp_path / "by-hand.gguf", "llama")
    for name, field in base.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in base.tensors:
        w = tensor.data
        if f"{tensor.name}.lora_a" in factors:
            a, b = factors.pop(f"{tensor.name}.lora_a"), factors.pop(f"{tensor.name}.lora_b")
            w = w + np.float32(alpha / b.shape[1]) * (b @ a)
        writer.add_tensor(tensor.name, np.ascontiguousarray(w))
    assert not factors, "each pair has its weight"
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = rng.integers(0, t.vocab_size, (2, 30))
    error = relative_error(opened(tmp_path / "by-hand.gguf"), theirs, ids)
    print(f"{options}: relative error {error:.2e}")
    assert error < 1e-5
    with theirs.disable_adapter():
        assert relative_error(opened(tmp_path / "base.gguf"), theirs, ids) < 1e-5


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
FAMILY = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 30},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 128},  # its reader takes every qwen3's head for 128 wide
}


@pytest.mark.parametrize("which", FAMILY)
def test_transformers_reads_the_whole_family(which, tmp_path, rng):
    """Its reader looks for neither a llama's biases nor scaled positions, so it is told; Mistral it reads as a llama without window."""
    t = llm_files.trained(digits=False)
    changes = {"vocab_size": t.vocab_size, "intermediate_size": 64, "tie_word_embeddings": False, **FAMILY[which]}
    m = spread(tiny.model(int(rng.integers(1000)), **changes), rng)
    m.tokenizer = t
    gguf_writer.save(m, tmp_path / "m.gguf", "f32")
    config = transformers.LlamaConfig.from_dict(m.config.to_dict()) if which.startswith(("llama", "linear")) else None
    ids = rng.integers(0, t.vocab_size, (2, 30 if which == "mistral" else 60))
    theirs = opened(tmp_path / "m.gguf", config)
    error = relative_error(m, theirs, ids)
    print(f"{which}: {type(theirs).__name__}, relative error {error:.2e}")
    assert error < 1e-5


@pytest.mark.parametrize("which", [*FAMILY, "qwen3 with biases"])
def test_a_note_says_what_transformers_passes_over(which, tmp_path, rng):
    """Opened without being told, it computes something else exactly where a note says so."""
    t = llm_files.trained(digits=False)
    changes = {**FAMILY, "qwen3 with biases": {**FAMILY["qwen3"], "attention_bias": True}}[which]
    m = spread(tiny.model(int(rng.integers(1000)), vocab_size=t.vocab_size, intermediate_size=64, **changes), rng)
    m.tokenizer = t
    written = gguf_writer.save(m, tmp_path / "m.gguf", "f32")
    error = relative_error(m, opened(tmp_path / "m.gguf"), rng.integers(0, t.vocab_size, (2, 30)))
    print(f"{which}: relative error {error:.2e}")
    said = any("transformers does not read" in note for note in written.notes)
    assert error > 1e-3 if said else error < 1e-5


def test_a_sentencepiece_vocabulary_of_its_own_makers(tmp_path):
    """Trained by the sentencepiece package, made a tokenizer.json by transformers, written here and read back: its own ids."""
    from transformers.tokenization_utils_base import generate_merges

    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join(line for text in llm_files.TEXT for line in text.splitlines()))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=True, minloglevel=2, character_coverage=1.0,
    )  # fmt: skip
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    vocab = {theirs.id_to_piece(i): i for i in range(theirs.get_piece_size())}
    merges = generate_merges(vocab, {token: theirs.get_score(i) for token, i in vocab.items()})
    transformers.LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True).save_pretrained(tmp_path)
    m = tiny.model(intermediate_size=64, vocab_size=len(vocab))
    m.tokenizer = BPETokenizer.from_file(tmp_path / "tokenizer.json")
    gguf_writer.save(m, tmp_path / "m.gguf")
    again = Llama.from_pretrained(tmp_path / "m.gguf").tokenizer
    for text in STRINGS[:-1]:
        assert again.encode(text) == theirs.encode(text), text
        assert text.startswith(" ") or m.tokenizer.encode(text) == theirs.encode(text), text
    assert again.front == (theirs.bos_id(),)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in STRINGS[:4]:
        assert words.encode(text) == [theirs.bos_id(), *theirs.encode(text)], text


def test_the_embedded_model_opens_in_transformers(tmp_path, rng):
    """A GGUF without a vocabulary: its sizes and weights are read all the same."""
    gguf_writer.convert("base", tmp_path / "base.gguf", "f32")
    error = relative_error(Llama.from_pretrained("base"), opened(tmp_path / "base.gguf"), tiny.ids(rng, 2, 40))
    assert error < 1e-5
