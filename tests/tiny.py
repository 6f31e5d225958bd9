"""A Llama small enough to test with, and helpers for it."""

import numpy as np

from tinylora import Llama, LlamaConfig, backend

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def model(seed=0, **changes):
    """A fresh model; the same seed gives the same weights."""
    from dataclasses import replace

    backend.seed(seed)
    return Llama(replace(CONFIG, **changes))


def ids(rng, *shape):
    return rng.integers(0, 256, shape)


def logits(m, x):
    return backend.move(m(x).data, "cpu")


def randomize_lora(m, rng):
    """Give every B random values, so that the bypass does something."""
    from tinylora.lora import adapters

    for _, layer in adapters(m):
        b = layer.lora_B.weight
        random = (0.1 * rng.standard_normal(b.shape)).astype(np.float32)
        b.data = backend.move(random, backend.array_module(b.data))
    return m
