"""How many numbers LoRA trains, and how many its rivals train: the formulas, as functions.

    LoRA              r (d_in + d_out) a matrix;   |Θ| = 2 L̂ d r for L̂ square ones
    prefix-embedding  d (l_p + l_i)
    prefix-layer      L d (l_p + l_i)
    adapters          L̂ (2 d r + r + d) + 2 L̂_LN d:  two a layer in Adapter^H, one and a LayerNorm in Adapter^L
    BitFit            every bias                                                             (LoRA §5.1)

The paper's 2 L̂ d r holds for square matrices only; `lora` is the general count, which PEFT prints as "trainable params". Whether the
paper's tables follow these formulas is told by `papers.lora_numbers`, which recomputes every number printed there.
"""


# ----------------------------------------------------------------------------------------------------------------------- formulas
def lora(d_in, d_out, r):
    """r (d_in + d_out): A is (r, d_in), B is (d_out, r). -> int"""
    return r * (d_in + d_out)


def lora_on(shapes, r):
    """Σ r (d_in + d_out) over matrices (d_out, d_in): a list of shapes, or of anything with a `shape`. -> int"""
    return sum(lora(d_in, d_out, r) for d_out, d_in in (getattr(w, "shape", w) for w in shapes))


def lora_square(matrices, d, r):
    """|Θ| = 2 L̂ d r for L̂ square matrices.   LoRA §5.1. -> int"""
    return 2 * matrices * d * r


def prefix_embedding(d, l_p, l_i=0):
    """|Θ| = d (l_p + l_i): l_p prefix and l_i infix tokens have trained embeddings.   LoRA §5.1. -> int"""
    return d * (l_p + l_i)


def prefix_layer(layers, d, l_p, l_i=0):
    """|Θ| = L d (l_p + l_i): they have trained activations after every layer.   LoRA §5.1. -> int"""
    return layers * d * (l_p + l_i)


def adapter(count, d, r, layernorms=0):
    """|Θ| = L̂ (2 d r + r + d) + 2 L̂_LN d: L̂ bottlenecks of width r with biases, L̂_LN trained LayerNorms.   LoRA §5.1. -> int"""
    return count * (2 * d * r + r + d) + 2 * layernorms * d


def adapter_h(layers, d, r):
    """Adapter^H (Houlsby et al. 2019): after the attention and after the MLP, so 2 a layer. -> int"""
    return adapter(2 * layers, d, r)


def adapter_l(layers, d, r):
    """Adapter^L (Lin et al. 2020): after the MLP and a trained LayerNorm, 1 a layer. -> int"""
    return adapter(layers, d, r, layers)


def bitfit(layers, d):
    """11 d a layer: q, k, v, o (4 d), the MLP (4 d + d), two LayerNorms (2 d).   Every bias of a block with a 4 d MLP. -> int"""
    return 11 * layers * d


def transformer(layers, d, vocab, positions, extra=0):
    """L (12 d² + 13 d) + (V + n) d + 2 d: blocks with biases and a 4 d MLP, tied token and learned position embeddings. -> int

    2 d is one more LayerNorm, GPT-2's last or that on RoBERTa's embeddings; extra: what else a model has (RoBERTa: token type, pooler).
    """
    return layers * (12 * d * d + 13 * d) + (vocab + positions) * d + 2 * d + extra


def t5(layers, d, heads, d_kv, d_ff, vocab, buckets=32):
    """L (4 d h + 3 d m + 2 d) + L (8 d h + 3 d m + 3 d) + 2 b n + 2 d + 2 V d: T5 1.1, L layers in each half, h = n d_kv. -> int

    A decoder's layer has two attentions. The MLP is gated, nothing has a bias, embedding and head are apart, and the first
    attention of each half adds one of b learned biases for each of its n heads.
    """
    attention, mlp = 4 * d * heads * d_kv, 3 * d * d_ff
    halves = layers * (attention + mlp + 2 * d) + layers * (2 * attention + mlp + 3 * d)
    return halves + 2 * (buckets * heads + d) + 2 * vocab * d


def llama_shapes(config, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")):
    """[(out, in)] of the named matrices in all layers of a Llama, from anything with LlamaConfig's fields."""
    d, m = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    block = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
    block |= {"gate_proj": (m, d), "up_proj": (m, d), "down_proj": (d, m)}
    unknown = [name for name in targets if name not in block]
    if unknown:
        raise ValueError(f"llama_shapes: {unknown[0]!r} does not exist; a Llama's matrices are {', '.join(block)}")
    return [block[name] for name in targets] * config.num_hidden_layers
