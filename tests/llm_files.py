"""Tiny models in the formats of real ones: a trained byte-pair vocabulary, and GGUF files written by the gguf package."""

import json

import numpy as np

from tinylora.models import rope

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat.",
    "In 1984 and 2001, there were 12345 apples; it isn't 3.14159, is it?\n\n    return x ** 2  # squared\n\tdone",
    "naïve café Ωmega 你好 world — “quoted”",
] * 20
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "miller.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = {  # llama.cpp's names by Hugging Face's, as its converter writes them
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def trained(vocab_size=300, digits=True, template=TEMPLATE):
    """A small byte-level BPE as SmolLM2's is: digits by themselves, ChatML's marks."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from tinylora.models.tokenizers import BPETokenizer

    backend = tokenizers.Tokenizer(models.BPE())
    cut = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "unk_token": SPECIAL[0],
        "pad_token": SPECIAL[2],
        "clean_up_tokenization_spaces": False,
    }
    return BPETokenizer(backend, settings | ({"chat_template": template} if template else {}))


def gguf_name(name):
    """Hugging Face's name of a weight as GGUF has it."""
    if name in NAMES:
        return NAMES[name]
    _, _, block, rest = name.split(".", 3)
    rest, _, suffix = rest.rpartition(".")
    return f"blk.{block}.{NAMES[rest]}.{suffix}"


def interleaved(w, heads):
    """Rows paired as halves -> rows paired as neighbours, one row after the other."""
    out, d = np.empty_like(w), len(w) // heads
    for h in range(heads):
        for i in range(d // 2):
            out[h * d + 2 * i], out[h * d + 2 * i + 1] = w[h * d + i], w[h * d + d // 2 + i]
    return out


def write_gguf(path, model, kinds=("F32",), tokenizer=None, pre="smollm", more=None, extra_tensors=None, **overrides):
    """Write a model as llama.cpp's converter does; matrices take the types of `kinds` in turn. {Hugging Face's name: what was written}."""
    import gguf

    c = model.config
    arch = "llama" if c.model_type == "mistral" else c.model_type
    writer = gguf.GGUFWriter(path, arch)
    entries = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.head_dim,
        "vocab_size": c.vocab_size,
        "attention.sliding_window": c.sliding_window,
        **overrides,
    }
    for name, value in entries.items():
        if value is not None:
            writer.add_uint32(f"{arch}.{name}", value)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    if tokenizer is not None:
        add_vocabulary(writer, tokenizer, pre)
    more, extra_tensors = dict(more or {}), dict(extra_tensors or {})
    if (c.rope_scaling or {}).get("rope_type") == "linear":
        more |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": c.rope_scaling["factor"]}
    elif c.rope_scaling:
        divisors = rope.divisors(c.head_dim, c.rope_theta, c.rope_scaling)
        extra_tensors["rope_freqs.weight"] = divisors.astype(np.float32)
    for name, value in more.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(name, value)
    written, turn = {}, 0
    for name, w in model.named_parameters():
        kind = gguf.GGMLQuantizationType["F32"]
        if w.ndim == 2:
            kind, turn = gguf.GGMLQuantizationType[kinds[turn % len(kinds)]], turn + 1
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        heads = heads if arch == "llama" else None
        packed = gguf.quantize(interleaved(w.data, heads) if heads else w.data, kind)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
        written[name] = gguf.dequantize(
            gguf.quantize(w.data, kind), kind
        )  # whole rows are quantized, so their order does not matter
    for name, w in extra_tensors.items():
        writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def add_vocabulary(writer, tokenizer, pre):
    """The tokenizer.ggml.* entries of a BPETokenizer."""
    described = json.loads(tokenizer.backend.to_str())
    by_id = sorted(tokenizer.backend.get_vocab().items(), key=lambda item: item[1])
    special = {token["content"] for token in described["added_tokens"] if token["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in by_id])
    writer.add_token_types([3 if token in special else 1 for token, _ in by_id])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    if "chat_template" in tokenizer.settings:
        writer.add_chat_template(tokenizer.settings["chat_template"])


def write_vocabulary(path, architecture="llama", **entries):
    """A GGUF of a vocabulary and next to nothing else: tokenizer.ggml.* by name, in GGUF's own types."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32}
    for name, value in {**sizes, "attention.head_count": 2, "attention.head_count_kv": 2}.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in entries.items():
        kinds = {bool: writer.add_bool, str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
        kinds[type(value)](f"tokenizer.ggml.{name}", value)
    writer.add_tensor("token_embd.weight", np.zeros((len(entries["tokens"]), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
