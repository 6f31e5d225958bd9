"""A Llama small enough to test with, and helpers for it."""

import itertools

import numpy as np

from tinylora import Llama, LlamaConfig, LoRALinear, Tensor, backend, ops, quantize
from tinylora.models.tokenizers import ByteTokenizer
from tinylora.nn import Embedding, Linear, Linear4bit, Module, RMSNorm, normal

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


#: One of each kind of the family, as changes of CONFIG.
FAMILY = {
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2 with windows": {
        "model_type": "qwen2",
        "sliding_window": 4,
        "layer_types": ("full_attention", "sliding_attention"),
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e5},
    "qwen3 with biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
}


def model(seed=0, **changes):
    """A fresh model; the same seed gives the same weights."""
    from dataclasses import replace

    backend.seed(seed)
    return Llama(replace(CONFIG, **changes))


def of_the_family(kind, rng):
    """A model of FAMILY whose norms and biases are not those of a fresh one, ones and zeros."""
    m = model(int(rng.integers(1000)), **FAMILY[kind])
    for _, p in m.named_parameters():
        if p.ndim == 1:
            p.data += (0.3 * rng.standard_normal(p.shape)).astype(np.float32)
    return m


def ids(rng, *shape):
    return rng.integers(0, 256, shape)


def logits(m, x):
    return backend.move(m(x).data, "cpu")


def randomize_lora(m, rng):
    """Give every B random values, so that the bypass does something."""
    from tinylora.adapters.targets import lora_layers

    for _, layer in lora_layers(m):
        b = layer.lora_B.weight
        random = (0.1 * rng.standard_normal(b.shape)).astype(np.float32)
        b.data = backend.move(random, backend.array_module(b.data))
    return m


class Zoo(Module):
    """An embedding, two linear layers with biases, a norm and a head: enough to hold every feature of an adapter."""

    def __init__(self):
        self.embed = Embedding(20, 8)
        self.embed.weight.data *= 50
        self.fc1, self.fc2 = Linear(8, 12, bias=True), Linear(12, 8, bias=True)
        self.norm, self.head = RMSNorm(8), Linear(8, 5, bias=True)
        for layer in (self.fc1, self.fc2, self.head):
            layer.bias.data = normal(layer.bias.shape, 0.5)

    def forward(self, ids):
        x = self.embed(backend.move(ids, backend.array_module(self.norm.weight.data)))
        x = x + self.fc2(ops.relu(self.fc1(x)))
        return self.head(self.norm(x))


def zoo(seed=0):
    backend.seed(seed)
    return Zoo()


def randomize_trainable(m, rng):
    """Give everything that is trained other values."""
    for _, p in m.trainable():
        new = (0.4 * rng.standard_normal(p.shape)).astype(np.float32)
        p.data = backend.move(new, backend.array_module(p.data))
    return m


class Turns(ByteTokenizer):
    """Bytes with turns, <user> by \\x01 ... \\x02 and the assistant's up to \\x03, and a system's by \\x04 ... \\x02."""

    chats, end_id, ending = True, 3, ("\x03", "")

    def spoken(self, messages, add_generation_prompt=False, **more):
        turns = {"user": "\x01{}\x02", "assistant": "{}\x03", "system": "\x04{}\x02"}
        if messages[0]["role"] == "assistant":
            raise ValueError("chat: the user begins")
        if unknown := {m["role"] for m in messages} - turns.keys():
            raise ValueError(f"chat: nobody is called {min(unknown)!r}")
        return "".join(turns[m["role"]].format(m["content"]) for m in messages), []

    def render(self, messages, **more):
        return self.spoken(messages, **more)[0]

    def segments(self, text, spans):
        cuts = [0, *(place for span in spans for place in span)]
        return tuple(self.encode(text[a:b]) for a, b in itertools.pairwise(cuts))


def adapted(bias=None, compute_dtype="float32", r=2, **options):
    """A LoRALinear, 64 to 8 features, on a base in NF4."""
    base = Linear4bit(quantize(np.ones((8, 64), np.float32)), bias, compute_dtype)
    return LoRALinear(base, r=r, **options)


def composed():
    """Layers that `adapters.fused` leaves to LoRALayer.forward, on the host and on a device."""
    frozen, without_A, without_B, own, two, other = (adapted() for _ in range(6))
    for layer, factors in ((frozen, "AB"), (without_A, "A"), (without_B, "B")):
        for name in factors:
            getattr(layer, f"lora_{name}").requires_grad_(False)
    own.base_layer.forward = lambda x: x[:, :8]
    two.bypasses["b"], two.active = two.bypasses["default"], ("default", "b")
    other.lora_A.compute_dtype = "bfloat16"
    with_bias = adapted(Tensor(np.ones(8, np.float32)))
    return [frozen, without_A, without_B, own, two, other, with_bias,
            adapted(dropout=0.5), adapted(lora_bias=True), adapted(use_dora=True)]  # fmt: skip
