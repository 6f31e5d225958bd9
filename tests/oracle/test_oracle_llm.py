"""transformers as a witness for files of real models: it opens the same GGUF and the same folders, and computes the same logits.

transformers reads a GGUF's weights with its own code, and so is a second opinion on names, permutation and dequantizing. Its
reader takes the vocabulary as gpt-2's, whatever the file says (see tokenizers.py); where that shows, the test says so.
"""

import os
from dataclasses import replace
from pathlib import Path

import llm_files
import numpy as np
import pytest
import tiny

from tinylora import Llama, no_grad
from tinylora.models import llama

pytestmark = pytest.mark.oracle

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

#: Words, numbers, code, marks, Latin and other letters. Every digit is one of 0 to 9, and none follows two white spaces.
STRINGS = [
    "Once upon a time there was a miller who had three sons, his mill, a donkey and a cat.",
    "In 1984 and 2001, 12345 apples cost $3.14159 (or 99%); it isn't cheap, they'll say: \"we've paid\".",
    "def f(x):\n    return x ** 2  # squared\n\n\tif __name__ == '__main__':\r\n        print(f(7))",
    "naïve café Ωmega 你好 — “quoted” e\u0301 \u0442\u0435\u043a\u0441\u0442",
    "  two  spaces   three\n\n\n and \u00a0 more \n",
    "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
]
APART = [
    "a\n\n 5",
    "x  7",
    "\t\t1",
    "a ½ and x³",
    "\u0663\u0664",
]  # here the two readings of a smollm vocabulary may differ


def theirs_from_gguf(path):
    options = {"gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path.parent, **options)


def relative_error(ours, theirs, ids):
    """The largest |difference| of the logits over the largest |logit|."""
    with no_grad():
        ours = ours(ids).data
    with torch.no_grad():
        theirs = theirs(torch.from_numpy(ids)).logits.numpy()
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def same_ids(ours, theirs, strings):
    for text in strings:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


def chat(tokenizer, text):
    said = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    return said["input_ids"] if hasattr(said, "keys") else said


@pytest.mark.parametrize(
    "kinds, changes",
    [
        (("F32",), {}),
        (("Q4_1", "Q8_0"), {"num_key_value_heads": 4}),
        (("Q4_0", "F16"), {"num_key_value_heads": 1, "tie_word_embeddings": False}),
        (("BF16",), {"head_dim": 16, "rope_theta": 1e5, "rms_norm_eps": 1e-6}),
    ],
)
def test_transformers_reads_the_same_model_out_of_a_gguf(kinds, changes, tmp_path, rng):
    t = llm_files.trained(digits=False)
    m = tiny.model(int(rng.integers(1000)), intermediate_size=64, vocab_size=t.vocab_size, **changes)
    llm_files.write_gguf(tmp_path / "m.gguf", m, kinds, t, pre="gpt-2")
    ours, (theirs, their_tokens) = Llama.from_pretrained(tmp_path / "m.gguf"), theirs_from_gguf(tmp_path / "m.gguf")
    error = relative_error(ours, theirs, rng.integers(0, t.vocab_size, (2, 50)))
    print(f"{kinds} {changes}: relative error {error:.2e}")
    assert error < 1e-5
    same_ids(ours.tokenizer, their_tokens, STRINGS + APART)
    assert ours.tokenizer.chat_prompt("Good morning") == chat(their_tokens, "Good morning")
    ids = t.encode("".join(STRINGS))
    assert ours.tokenizer.decode(ids) == their_tokens.decode(ids, skip_special_tokens=True)
    assert ours.tokenizer.end_id == their_tokens.eos_token_id == theirs.config.eos_token_id == ours.config.eos_token_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_the_folder_that_a_gguf_became(dtype, tied, tmp_path, rng):
    t = llm_files.trained()
    m = tiny.model(intermediate_size=64, vocab_size=t.vocab_size, tie_word_embeddings=tied)
    llm_files.write_gguf(tmp_path / "m.gguf", m, ("Q4_1", "Q8_0"), t)
    llama.convert(tmp_path / "m.gguf", tmp_path / "out", dtype)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert relative_error(Llama.from_pretrained(tmp_path / "out"), theirs, rng.integers(0, 300, (1, 40))) < 1e-5
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    same_ids(t, tokens, STRINGS + APART)
    assert chat(tokens, "hi") == Llama.from_pretrained(tmp_path / "out").tokenizer.chat_prompt("hi")
    assert (tokens.bos_token_id, tokens.eos_token_id, tokens.pad_token_id) == (1, 2, 2)
    assert (theirs.generation_config.eos_token_id, theirs.config.eos_token_id, theirs.config.bos_token_id) == (2, 2, 1)


def test_a_sharded_folder_of_transformers_opens_here(tmp_path, rng):
    t = llm_files.trained()
    config = transformers.LlamaConfig(
        vocab_size=t.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=[2, 0],
        bos_token_id=1,
        rope_theta=3e4,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.generation_config.eos_token_id = [2, 0]
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    t.save(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)  # as transformers itself writes it
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = Llama.from_pretrained(tmp_path)
    assert relative_error(ours, theirs, rng.integers(0, 300, (2, 30))) < 1e-5
    assert ours.config.eos_token_id == (2, 0)
    same_ids(ours.tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path), STRINGS)
    assert ours.tokenizer.chat_prompt("hi") == t.chat_prompt("hi")
    half = tmp_path / "half"
    theirs.to(torch.bfloat16).save_pretrained(half, max_shard_size="20KB")
    t.save(half)
    error = relative_error(Llama.from_pretrained(half), theirs.float(), rng.integers(0, 300, (1, 30)))
    assert error < 1e-5


@pytest.mark.skipif(
    "TINYLORA_LLM" not in os.environ, reason="TINYLORA_LLM points to no SmolLM2-135M-Instruct.Q4_1.gguf"
)
def test_a_real_model_computes_what_transformers_computes(tmp_path):
    path = Path(os.environ["TINYLORA_LLM"])
    ours, (theirs, their_tokens) = Llama.from_pretrained(path), theirs_from_gguf(path)
    same_ids(ours.tokenizer, their_tokens, STRINGS)
    assert ours.tokenizer.chat_prompt("Who are you?") == chat(their_tokens, "Who are you?")
    ids = np.array([ours.tokenizer.encode("".join(STRINGS))])
    error = relative_error(ours, theirs, ids)
    print(f"{path.name}, {ids.shape[1]} tokens: largest relative error of the logits {error:.2e}")
    assert ids.shape[1] >= 64 and error < 1e-3
    llama.convert(path, tmp_path / "out", "float32")
    assert relative_error(Llama.from_pretrained(tmp_path / "out"), theirs, ids[:, :64]) < 1e-3
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    same_ids(ours.tokenizer, tokens, STRINGS + APART)  # a folder says how digits are cut, and transformers does it
    apart = [text for text in APART if tokens.encode(text) != their_tokens.encode(text)]
    print(f"transformers' two readings of the vocabulary differ on {apart}")
    assert apart and all(tokens.decode(tokens.encode(t)) == their_tokens.decode(their_tokens.encode(t)) for t in APART)
    prompt = ours.tokenizer.chat_prompt("What is the capital of France?")
    answer = ours.generate(prompt, 12, temperature=0)
    said = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert answer == their_tokens.decode(said, skip_special_tokens=True) and "Paris" in answer
    print(answer)


def test_ids_of_random_text_are_transformers_own(tmp_path, rng):
    t = llm_files.trained()
    Llama(replace(tiny.CONFIG, vocab_size=t.vocab_size), t).save_pretrained(tmp_path)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)
    alphabet = np.array(list(" \n\t  0123456789abcdefghijklmnopqrstuvwxyz.,'()éü你½"))
    same_ids(Llama.from_pretrained(tmp_path).tokenizer, tokens, ["".join(rng.choice(alphabet, 40)) for _ in range(100)])
