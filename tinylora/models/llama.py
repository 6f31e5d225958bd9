"""Llama and its family: RMSNorm, rotary positions, grouped-query attention, SwiGLU; parameters named as Hugging Face names them.

    x ← x + W_o attention(rope(W_q n), rope(W_k n), W_v n),   n = rms_norm(x)
    x ← x + W_down (silu(W_gate n) ⊙ W_up n),                 n = rms_norm(x)
    logits = W_head rms_norm(x)            (W_head is the embedding where `tie_word_embeddings` is true)

(Touvron et al. 2023, Llama 2.) What the others do otherwise, told apart by the config's `model_type`:

    llama      `attention_bias`: biases on W_q, W_k, W_v, W_o; `mlp_bias`: on W_gate, W_up, W_down
    mistral    a query sees `sliding_window` tokens, itself included (null: all)
    qwen2      biases on W_q, W_k, W_v; with `use_sliding_window` the layers named in `layer_types` slide, or those from
               `max_window_layers` on
    qwen3      rms_norm of each head of W_q n and W_k n before the rotation; `attention_bias` and windows as above

Rotary positions may be scaled: see `rope`. `from_pretrained` reads the embedded model, Hugging Face folders and GGUF files, one weight
at a time; `save_pretrained` writes a folder that transformers opens as the same model. See `folders`.

Left out, with a sentence if a config asks for it: activations other than silu, rotary positions on a part of a head, attention in both
directions, other architectures. `attention_dropout` is not applied in training.
"""

import contextlib
import math
import re
import warnings
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields

import numpy as np

from .. import backend, ops
from ..backend import array_module, move
from ..dtypes import BFloat16Array
from ..kernels.products import DTYPES
from ..nn import (
    Embedding,
    Linear,
    Linear4bit,
    Linear16bit,
    Module,
    RMSNorm,
    is_adapter_weight,
    normal,
    quantized_linear,
    stored_array,
)
from ..tape import checkpoint
from ..tensor import Tensor, no_grad
from . import eightbit, files, folders, fourbit, rope
from .dense import DenseWeights
from .fields import check, either, flag, number, optional, several, shown, text, whole
from .safetensors import check_finite
from .tokenizers import ByteTokenizer

_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
_QWEN |= {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
#: {model_type: (transformers' class, what its config means where an entry is missing)}
FAMILY = {
    "llama": ("LlamaForCausalLM", {"max_position_embeddings": 2048}),
    "mistral": ("MistralForCausalLM", _MISTRAL),
    "qwen2": ("Qwen2ForCausalLM", _QWEN),
    "qwen3": ("Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}),
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NULL_MEANS_SOMETHING = ("num_key_value_heads", "head_dim", "sliding_window")  # as many, hidden over heads, none
_SLIDING, _FULL = "sliding_attention", "full_attention"
_SIZE, _TOKEN = whole(1, 1 << 20), whole(0, (1 << 31) - 1)

#: What each field of a config may be. Where there are weights, the sizes must be theirs as well (`_unfilled`).
FIELDS = {
    "vocab_size": whole(1, 1 << 24),
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": whole(1, 4096),
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "max_position_embeddings": whole(1, 1 << 31),
    "rms_norm_eps": number(0, 1),
    "rope_theta": number(1e-30, 1e30),
    "tie_word_embeddings": flag(),
    "head_dim": optional(_SIZE),
    "bos_token_id": optional(_TOKEN),
    "eos_token_id": optional(either(_TOKEN, several(_TOKEN, most=1000))),
    "pad_token_id": optional(_TOKEN),
    "model_type": text(100),
    "rope_scaling": optional(rope.SCALING),
    "attention_bias": flag(),
    "mlp_bias": flag(),
    "sliding_window": optional(whole(1)),
    "layer_types": optional(several(text(100), most=4096)),
}
#: The same for a config.json, in which null is as good as nothing, and more stands.
JSON_FIELDS = {
    **{name: kind if kind.fits(None) else optional(kind) for name, kind in FIELDS.items()},
    "model_type": text(100),
    "rope_parameters": optional(rope.SCALING),
    "use_sliding_window": optional(flag()),
    "max_window_layers": optional(whole()),
}

#: What else would change the numbers: {entry of a config: the values that it may have}
_COMPUTED = {
    "hidden_act": ("silu", "swish"),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "per_layer_config": ({},),
}


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama, and the tokens that begin and end its texts, under Hugging Face's names.

    eos_token_id      may be several: an instruction-tuned model may end its answers at another token than its texts
    model_type        "llama", "mistral", "qwen2" or "qwen3": what these change stands at the top of the file
    rope_scaling      None, or {"rope_type": "llama3", its numbers}: see `rope`
    sliding_window    how many tokens a query sees, itself included; None for all
    layer_types       for each layer "sliding_attention" or "full_attention"; None: all layers alike
    """

    vocab_size: int = 256
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 5
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    head_dim: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple | None = None
    pad_token_id: int | None = None
    model_type: str = "llama"
    rope_scaling: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())
        check(dict(vars(self)), FIELDS, "config")
        if isinstance(self.eos_token_id, list):  # as JSON has it
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim = {self.head_dim} must be even, because rotary positions turn pairs")
        _check_family(self.model_type)
        for name, types in {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}.items():
            if getattr(self, name) and self.model_type not in types:
                raise ValueError(f"config: {name} = True is not supported for model_type {self.model_type!r}")
        object.__setattr__(self, "rope_scaling", rope.checked(self.rope_scaling, self.head_dim))
        self._check_windows()

    def _check_windows(self):
        """Refuse windows that are not computed; write those that are in one way: layer_types only where layers differ."""
        window, kinds = self.sliding_window, self.layer_types
        if window is not None and self.model_type == "llama":
            raise ValueError(f"config: sliding_window = {window} is not supported for model_type 'llama'")
        listed = kinds is not None and all(kind in (_SLIDING, _FULL) for kind in kinds)
        if kinds is not None and not (listed and len(kinds) == self.num_hidden_layers):
            raise ValueError(
                f"config: layer_types = {shown(kinds)} is not supported: expected {self.num_hidden_layers} times {_FULL!r} or "
                f"{_SLIDING!r}"
            )
        found = set(kinds or (_FULL if window is None else _SLIDING,))
        if _SLIDING in found and window is None:
            raise ValueError(f"config: layer_types has {_SLIDING!r} and there is no sliding_window")
        if self.model_type == "mistral" and window is not None and found != {_SLIDING}:
            raise ValueError("config: layer_types that differ are not supported for model_type 'mistral'")
        object.__setattr__(self, "sliding_window", window if _SLIDING in found else None)
        object.__setattr__(self, "layer_types", tuple(kinds) if len(found) > 1 else None)

    def window(self, layer):
        """How many tokens a query of this layer sees, itself included; None for all."""
        return None if self.layer_types and self.layer_types[layer] == _FULL else self.sliding_window

    @property
    def positions(self):
        """How many positions are defined: max_position_embeddings, or with rope_scaling "dynamic" without end."""
        dynamic = self.rope_scaling is not None and self.rope_scaling["rope_type"] == "dynamic"
        return math.inf if dynamic else self.max_position_embeddings

    @property
    def biased(self):
        """The names of the linear layers of a block that have a bias."""
        attention = ("q_proj", "k_proj", "v_proj") if self.attention_bias or self.model_type == "qwen2" else ()
        out = ("o_proj",) if self.attention_bias else ()
        return {*attention, *out, *(("gate_proj", "up_proj", "down_proj") if self.mlp_bias else ())}

    @classmethod
    def from_dict(cls, config, where="config.json"):
        """Read a Hugging Face config; refuse what this Llama does not compute. ValueError names `where` and the field."""
        check(config, JSON_FIELDS, where, required=("model_type", *_SIZES))
        try:
            return cls(**cls._understood(config))
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix('config: ')}") from None

    @classmethod
    def _understood(cls, config):
        """The fields of a Hugging Face config, with transformers' defaults for its model_type."""
        kind = config["model_type"]
        _check_family(kind)
        for name, values in _COMPUTED.items():
            if config.get(name) not in (None, *values):
                raise ValueError(f"{name} = {shown(config[name])} is not supported by tinylora's Llama")
        given = {name: value for name, value in config.items() if value is not None or name in _NULL_MEANS_SOMETHING}
        config = {**FAMILY[kind][1], **given}
        known = {f.name: config[f.name] for f in dataclass_fields(cls) if config.get(f.name) is not None}
        for name in _SIZES:
            if name not in known:
                raise ValueError(f"{name} is missing")
        known.setdefault("num_key_value_heads", known["num_attention_heads"])
        known.setdefault("tie_word_embeddings", False)
        known.setdefault("rms_norm_eps", 1e-6)
        known["rope_theta"], known["rope_scaling"] = rope.read(config)
        if kind == "qwen2":
            known["attention_bias"] = False  # it has its biases whatever this says
        if kind in ("qwen2", "qwen3"):
            known["sliding_window"], known["layer_types"] = _qwen_windows(config)
        return known

    def to_dict(self):
        """The config as transformers reads it, old and new spelling of the rotary positions included."""
        sizes = asdict(self)
        windows = {"sliding_window": sizes.pop("sliding_window")}
        biases = {name: sizes.pop(name) for name in ("attention_bias", "mlp_bias")}
        del sizes["layer_types"]
        own = {"llama": biases, "mistral": windows, "qwen2": {}, "qwen3": {"attention_bias": self.attention_bias}}
        if self.model_type in ("qwen2", "qwen3"):
            kinds = [_SLIDING if self.window(i) else _FULL for i in range(self.num_hidden_layers)]
            slides = {"use_sliding_window": self.sliding_window is not None, "max_window_layers": kinds.count(_FULL)}
            own[self.model_type] |= {**windows, **slides, "layer_types": kinds}
        return {
            "architectures": [FAMILY[self.model_type][0]],
            "hidden_act": "silu",
            **sizes,
            **own[self.model_type],
            **rope.written(self),
        }


def _check_family(model_type):
    if model_type not in FAMILY:
        raise ValueError(f"config: model_type is {shown(model_type)}, tinylora reads {', '.join(map(repr, FAMILY))}")


def _qwen_windows(config):
    """(sliding_window, layer_types) of a Qwen's config: which layers slide may be a list, or all from max_window_layers on."""
    window, kinds, full = config["sliding_window"], config.get("layer_types"), config["max_window_layers"]
    if not config["use_sliding_window"] or window is None:
        return None, kinds
    return window, kinds or [_FULL if i < full else _SLIDING for i in range(config["num_hidden_layers"])]


def _undrawn(*shape):
    """A Tensor that is one zero seen as a whole array: nothing is drawn and no memory used."""
    return Tensor(np.broadcast_to(np.float32(0), shape), requires_grad=True)


def _undrawn_norm(d, eps):
    norm = RMSNorm(1, eps)
    norm.weight = _undrawn(d)
    return norm


def _undrawn_linear(in_features, out_features, bias=False):
    return Linear.of(_undrawn(out_features, in_features), _undrawn(out_features) if bias else None)


class Attention(Module):
    """y = W_o [softmax(q kᵀ/√d) v], q and k rotated; key heads shared by groups of query heads."""

    compute_dtype = "float32"  # of the products q kᵀ and p v

    def __init__(self, c, layer=0, linear=Linear, norm=RMSNorm):
        self.config, self.layer = c, layer
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = linear(c.hidden_size, queries, bias="q_proj" in c.biased)
        self.k_proj = linear(c.hidden_size, keys, bias="k_proj" in c.biased)
        self.v_proj = linear(c.hidden_size, keys, bias="v_proj" in c.biased)
        self.o_proj = linear(queries, c.hidden_size, bias="o_proj" in c.biased)
        if c.model_type == "qwen3":
            self.q_norm, self.k_norm = (norm(c.head_dim, c.rms_norm_eps) for _ in range(2))

    def forward(self, x, table, cache=None):  # x (b, t, hidden), table: cos and sin -> (b, t, hidden)
        b, t, _ = x.shape
        q, k, v = (ops.reshape(w(x), (b, t, -1, self.config.head_dim)) for w in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.model_type == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = ops.rope(q, *table), ops.rope(k, *table)
        if cache is not None:
            k, v = cache.extend(self.layer, k.data, v.data)
        window = self.config.window(self.layer)
        y = ops.causal_attention(q, k, v, window=window, compute_dtype=self.compute_dtype)
        return self.o_proj(ops.reshape(y, (b, t, -1)))


class MLP(Module):
    """y = W_down (silu(W_gate x) ⊙ W_up x): SwiGLU, Shazeer 2020."""

    def __init__(self, c, linear=Linear):
        self.gate_proj = linear(c.hidden_size, c.intermediate_size, bias="gate_proj" in c.biased)
        self.up_proj = linear(c.hidden_size, c.intermediate_size, bias="up_proj" in c.biased)
        self.down_proj = linear(c.intermediate_size, c.hidden_size, bias="down_proj" in c.biased)

    def forward(self, x):
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(Module):
    """One layer: attention, then the MLP, each on a normalized copy and added back."""

    def __init__(self, c, layer=0, linear=Linear, norm=RMSNorm):
        self.input_layernorm = norm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer, linear, norm)
        self.post_attention_layernorm = norm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c, linear)

    def forward(self, x, table, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), table, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(Module):
    """Embedding, blocks, last norm: what Hugging Face calls `model`."""

    def __init__(self, c, linear=Linear, norm=RMSNorm):
        size = c.vocab_size, c.hidden_size
        self.embed_tokens = Embedding(*size) if linear is Linear else Embedding.of(_undrawn(*size))
        self.layers = [Block(c, i, linear, norm) for i in range(c.num_hidden_layers)]
        self.norm = norm(c.hidden_size, c.rms_norm_eps)


class KVCache:
    """Keys and values of the tokens seen so far, one buffer a layer, filled from the left.

    The logits are those of the whole text at once. With rope_scaling "dynamic" this holds up to max_position_embeddings; beyond, the
    frequencies change with each token, and a key stays as it was turned when it came, as in transformers.
    """

    def __init__(self, capacity):
        self.capacity, self.length, self._buffers = capacity, 0, {}

    def extend(self, layer, k, v):
        """Append k and v (b, t, kv_heads, d) of the layer of this number; return everything so far."""
        xp, (b, t, heads, d) = array_module(k), k.shape
        if layer not in self._buffers:
            self._buffers[layer] = [xp.empty((b, self.capacity, heads, d), k.dtype) for _ in range(2)]
        end = self.length + t
        if end > self.capacity:
            raise ValueError(
                f"kv cache: {self.length} tokens are held and {t} come in; its capacity is {self.capacity}"
            )
        for buffer, new in zip(self._buffers[layer], (k, v), strict=True):
            buffer[:, self.length : end] = new
        return tuple(buffer[:, :end] for buffer in self._buffers[layer])


class Llama(Module):
    """The model. `Llama(config)` draws fresh weights from the current generator; `Llama.from_pretrained` reads them.

    tokenizer                 bytes for the embedded model (256 tokens), else what the folder or file holds
    draw                      False: every weight is a read-only view of one zero, for whoever puts others in its place
    gradient_checkpointing    True: each block is recomputed in the backward pass
    """

    gradient_checkpointing = False
    compute_dtype = "float32"  # of the head, where that is the embedding

    def __init__(self, config, tokenizer=None, draw=True):
        self.config, self.tokenizer = config, tokenizer or ByteTokenizer()
        linear, norm = (Linear, RMSNorm) if draw else (_undrawn_linear, _undrawn_norm)
        self.model = Stack(config, linear, norm)
        self.lm_head = None if config.tie_word_embeddings else linear(config.hidden_size, config.vocab_size)
        self._rope = rope.Tables()
        self.read_from = ""  # " (FILE)" of a model that was read, for sentences about its numbers
        for layer in self.model.layers if draw else ():
            for module in (layer.self_attn, layer.mlp):
                for name, child in module.named_children():
                    if not isinstance(child, Linear):
                        continue
                    depth = math.sqrt(2 * config.num_hidden_layers) if name in ("o_proj", "down_proj") else 1.0
                    std = 1 / math.sqrt(child.in_features) / depth
                    child.weight.data = normal(child.weight.shape, std)

    @property
    def tied_parameters(self):
        """Paths of parameters that are used twice: the embedding, if it is the head as well."""
        return ("model.embed_tokens.weight",) if self.lm_head is None else ()

    def untie(self):
        """Give the model a head of its own, with the embedding's values; returns the model."""
        if self.lm_head is None:
            weight = self.model.embed_tokens.weight
            if isinstance(weight, Tensor):
                self.lm_head = Linear.of(Tensor(weight.data.copy(), weight.requires_grad))
            else:
                self.lm_head = Linear16bit(weight)  # frozen, and so it can be shared
            self.lm_head.training = self.training
            self.config = replace(self.config, tie_word_embeddings=False)
        return self

    def compute_in(self, dtype):
        """Multiply in "float32", "bfloat16" or "float16" everywhere: frozen layers, adapters, attention, head; returns the model.

        Norms, softmax, rotations and sums stay in float32 (see kernels.products).
        """
        if dtype not in DTYPES:
            raise ValueError(f"compute_in: {dtype!r} is unknown: expected one of {', '.join(map(repr, DTYPES))}")
        for _, module in self.named_modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = dtype
        return self

    def forward(self, ids, cache=None):
        """logits (b, t, vocab) of integer ids (b, t). With a KVCache, ids continue what the cache has seen.

        ValueError where a position reaches max_position_embeddings, which the model was not made for; rope_scaling "dynamic" was.
        """
        weight = stored_array(self.model.embed_tokens.weight)
        ids = np.asarray(ids) if not backend.is_array(ids) else ids
        if ids.ndim != 2:
            raise ValueError(f"llama: ids must be (batch, tokens), got shape {ids.shape}")
        # on the host, where ids come from: the device would have to be waited for
        ops.check_ids(ids, self.model.embed_tokens.weight.shape[0])
        ids = move(ids, array_module(weight))
        start = cache.length if cache else 0
        table = self._positions(start, start + ids.shape[1], weight)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            if self.gradient_checkpointing and cache is None:
                x = checkpoint(lambda h, layer=layer: layer(h, table), x)
            else:
                x = layer(x, table, cache)
        if cache:
            cache.length += ids.shape[1]
        x = self.model.norm(x)
        if self.lm_head is not None:
            return self.lm_head(x)
        head = self.model.embed_tokens.weight
        product = ops.linear if isinstance(head, Tensor) else ops.linear_frozen
        return product(x, head, compute_dtype=self.compute_dtype)

    def _positions(self, start, end, like):
        """cos and sin for positions start … end − 1, on `like`'s device."""
        c = self.config
        if end > c.positions:
            raise ValueError(
                f"llama: a sequence of {end} tokens is longer than max_position_embeddings = {c.max_position_embeddings}, "
                "the positions that the model knows; shorten it"
            )
        return self._rope(c, start, end, array_module(like))

    # ------------------------------------------------------------------------------------------------------------- generation
    def generate(
        self,
        prompt,
        max_new_tokens=200,
        temperature=0.8,
        top_k=None,
        top_p=None,
        seed=0,
        use_cache=True,
        stop=None,
        dense=False,
    ):
        """The continuation of `prompt` as text. temperature 0 is greedy; equal seeds give equal text. See `stream`."""
        return self.tokenizer.continuation(
            self.stream(prompt, max_new_tokens, temperature, top_k, top_p, seed, use_cache, stop, dense=dense)
        )

    def stream(
        self,
        prompt,
        max_new_tokens=200,
        temperature=0.8,
        top_k=None,
        top_p=None,
        seed=0,
        use_cache=True,
        stop=None,
        cache=None,
        dense=False,
    ):
        """Yield new token ids one at a time, each drawn from softmax(logits / temperature).

        The prompt is a text, before which the tokenizer puts what it puts before a text (BOS), or ids, taken as they are.
        top_k keeps the k likeliest tokens, top_p the smallest set whose probability reaches p (Holtzman et al. 2019).
        `stop` ends the text at that token id, or at one of several; by default at the config's eos_token_id, or else the
        tokenizer's end_ids, if there are any (stop=() never stops). With a KV cache each token is one position of work;
        `cache` is one that has seen the prompt's first tokens already. Past max_position_embeddings the window slides:
        the second half of the context is read again and the cache starts anew. A prompt that is longer than that loses its
        beginning, which a warning says. `dense` keeps frozen weights dense in between, for 4 bytes each (see models.dense).
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"generate: temperature = {temperature}, expected 0 (greedy) or more")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"generate: top_p = {top_p}, expected 0 < top_p <= 1")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k = {top_k}, expected 1 or more")
        ids = self.tokenizer.begun(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("generate: the prompt is empty; give at least one token to continue from")
        if stop is None:
            stop = self.tokenizer.end_ids if self.config.eos_token_id is None else self.config.eos_token_id
        stops = {stop} if isinstance(stop, (int, np.integer)) else set(stop)
        rng, window = np.random.default_rng(seed), self.config.max_position_embeddings
        first = 0  # where the window that the model sees begins
        weights = DenseWeights(self) if dense else contextlib.nullcontext
        if len(ids) > window and max_new_tokens > 0:
            first, cache = len(ids) - max(window - 1, 1), None
            warnings.warn(
                f"generate: the model does not see the first {first} of the prompt's {len(ids)} tokens; it reads {window} at a time "
                "(max_position_embeddings)",
                stacklevel=2,
            )
        for _ in range(max_new_tokens):
            if len(ids) - first > window:
                first, cache = len(ids) - max(window // 2, 1), None
            if use_cache and cache is None:
                cache = KVCache(min(window, len(ids) - first + max_new_tokens))
            new = ids[first + cache.length :] if use_cache else ids[first:]
            training = self.training
            self.eval()  # no dropout; the mode is put back before the caller gets the token
            try:
                with weights(), no_grad(), np.errstate(all="ignore"):  # what overflows is said below, and not by NumPy
                    logits = self.forward(np.array([new]), cache).data[0, -1]
            finally:
                self.train(training)
            logits = move(logits, "cpu")
            self._check_logits(logits, len(ids))
            token = _draw(logits, temperature, top_k, top_p, rng)
            ids.append(token)
            yield token
            if token in stops:
                return

    def _check_logits(self, logits, place):
        """ValueError for logits from which no token can be drawn. Where hidden numbers overflow, an RMSNorm makes zeros of them."""
        if np.isfinite(logits).all() and logits.any():
            return
        what = "NaN" if np.isnan(logits).any() else "Inf" if logits.any() else "nothing but zeros"
        raise ValueError(
            f"generate: the model's logits hold {what} at token {place}: its weights{self.read_from}, or those of an adapter, are not "
            "finite or too large"
        )

    # ------------------------------------------------------------------------------------------------------------------ folders
    @classmethod
    def from_pretrained(cls, path, dtype="float32", quantize=None, compute_dtype="float32"):
        """A model from "base" (the embedded one), a folder with config.json and safetensors, dense or in 4 or 8 bits, or FILE.gguf.

        dtype           "float32": as stored, 16 bits widened exactly; "bfloat16": each weight rounded to it, in float32 storage
        quantize        None, a code ("nf4", ..., "bfloat16", "int8_vectorwise"), or a dict of nn.quantized_linear's options: each linear
                        weight is quantized as it is read and its dense form dropped. The result is that of quantize_linears, all frozen;
                        with dtype "bfloat16" the quantized weights say that they were bfloat16, as bitsandbytes' then do
        compute_dtype   of the quantized layers, whether `quantize` makes them or a 4- or 8-bit folder has them (bitsandbytes,
                        transformers or interop.bitsandbytes.save wrote it); all of that model is frozen. A dense layer has none

        Else `requires_grad` is True. Nothing random is drawn, and never more than one dense matrix is in memory beside what
        stays. Errors are sentences that name the file, the tensor and the shapes; they come before anything is loaded.
        """
        options = {"code": quantize} if isinstance(quantize, str) else quantize
        compute_dtype = (options or {}).get("compute_dtype", compute_dtype)
        for what, name, known in (("dtype", dtype, DTYPES[:2]), ("compute_dtype", compute_dtype, DTYPES)):
            if name not in known:
                raise ValueError(
                    f"from_pretrained: {what} {name!r} is unknown: expected {' or '.join(map(repr, known))}"
                )
        held = fourbit.held(path)
        if held != "dense" and quantize is not None:
            raise ValueError(f"{path} is in {held[0]} bits already; leave --quantize out")
        if held != "dense":
            return _in_few_bits(cls, path, held, compute_dtype)
        model, opened = _open(cls, path)
        unknown = set(options or ()) - set(_QUANTIZE_OPTIONS)
        if unknown:
            raise ValueError(
                f"from_pretrained: quantize has no option {min(unknown)!r}: expected {', '.join(_QUANTIZE_OPTIONS)}"
            )
        for name in [name for name, _ in model.named_parameters()]:
            path, _, part = name.rpartition(".")
            layer, where = model.get(path), opened.weights.where(name)
            getattr(layer, part).data = folders.rounded(opened.weights.float32(name), dtype, f"{where}: {name}")
            if options is not None and isinstance(layer, Linear) and part == "weight":
                new = quantized_linear(path, layer, dtype=dtype, **{**options, "compute_dtype": compute_dtype})
                fourbit.check_finite(new.weight, f"{where}: {name}")
                model.replace(path, new)
        return model if options is None else model.requires_grad_(False)

    def save_pretrained(self, folder, dtype="bfloat16", extra_config=None):
        """Write a folder that transformers opens: config.json, model.safetensors (dtype "bfloat16", rounded to nearest even, or
        "float32"), and for a model with a vocabulary tokenizer.json, tokenizer_config.json and generation_config.json."""
        if any(not isinstance(w, Tensor) or is_adapter_weight(name) for name, w in self.named_weights()):
            raise ValueError(
                "save_pretrained: the model is quantized or carries an adapter; merge the adapter first, or save it alone with "
                "interop.peft.save_adapter (only dense weights are written here)"
            )
        weights = dict(self.named_parameters())
        folders.write_folder(
            folder,
            {**self.config.to_dict(), **(extra_config or {})},
            {name: w.shape for name, w in weights.items()},
            lambda name: move(weights[name].data, "cpu"),
            self.tokenizer,
            dtype,
        )


def _in_few_bits(cls, path, held, compute_dtype):
    """The model of a folder in bitsandbytes' format: Linear4bit or Linear8bit layers, and the rest widened to float32."""
    opened = folders.open_model(path, held)
    model = _unfilled(cls, opened)
    layers, tensors, state = dict(model.named_modules()), dict(opened.weights.items()), {}
    for name in opened.spare(dict(model.named_parameters())):
        del tensors[name]
    stored, few, options = fourbit, Linear4bit, {}
    if held == "8bit":
        options = eightbit.options(opened.config, tensors, opened.config_path)
        stored, few = eightbit, eightbit.Linear8bit
    for name in stored.names(tensors):
        where = name.removesuffix(".weight")
        file = next((opened.weights.where(n) for n in opened.weights if n.startswith(f"{where}.")), opened.config_path)
        q = stored.from_tensors(name, tensors, file)
        if not isinstance(layers.get(where), Linear) or layers[where].weight.shape != q.shape:
            raise ValueError(f"{file}: {name} of shape {shown(q.shape)} fits no linear layer of its config.json")
        model.replace(where, few(q, layers[where].bias, compute_dtype, **options))
        state[name] = q
    if not state:
        raise ValueError(f"{opened.config_path} says load_in_4bit, and none of the folder's weights is in 4 bits")
    for name, w in tensors.items():
        opened.check_floats(name)
        w = w.dequantize("float32") if isinstance(w, BFloat16Array) else w
        state[name] = check_finite(w, opened.weights.where(name), name)
    try:
        model.load_state_dict(state)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{opened.weights.path} does not fit its config.json: {error.args[0]}") from None
    return model.requires_grad_(False)


def _unfilled(cls, opened):
    """A model of zeros for ModelFiles. A head beside an embedding to which the config ties it is the model's own if the two differ."""
    config = LlamaConfig.from_dict(opened.config, opened.config_path)
    _check_layers(config.num_hidden_layers, opened)
    tokenizer = opened.tokenizer()
    opened.check({"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}, whole=False)
    if config.tie_word_embeddings and opened.own_head():
        config = replace(config, tie_word_embeddings=False)
    for name in filter(folders.is_rotary_table, opened.weights):
        if not rope.agrees(opened.weights.float32(name), config):
            raise ValueError(
                f"{opened.weights.where(name)}: {name} holds other frequencies than {opened.config_path.name} asks for"
            )
    model = cls(config, tokenizer, draw=False)
    model.read_from = f" ({getattr(opened.weights, 'path', opened.path)})"
    return model


def _check_layers(n, opened):
    """ValueError if a config asks for more layers than there are weights for: that many would be built."""
    found = {m[1] for m in (re.match(r"model\.layers\.([0-9]+)\.", name) for name in opened.weights) if m}
    if n > len(found):
        raise ValueError(
            f"{opened.config_path}: num_hidden_layers = {n}, and {opened.path} holds the weights of {len(found)} layers"
        )


def _open(cls, path):
    """(a model of zeros, the ModelFiles it is to be filled from): names, shapes and tokens fit, and nothing has been loaded."""
    opened = folders.open_model(path)
    model = _unfilled(cls, opened)
    opened.check({name: w.shape for name, w in model.named_parameters()})
    return model, opened


def convert(path, folder, dtype="bfloat16", bar=iter):
    """Write the model at `path` (FILE.gguf, a folder, "base") as a Hugging Face folder, one weight in memory at a time.

    dtype "float32" holds exactly what a GGUF's 4 or 8 bits stand for, "bfloat16" rounds it once more (ties to even).
    Returns the number of weights written.
    """
    files.check_target(folder, folders.place(path))
    model, opened = _open(Llama, path)
    shapes = {name: w.shape for name, w in model.named_parameters()}
    read, where = opened.weights.float32, opened.weights.where
    folders.write_folder(folder, model.config.to_dict(), shapes, read, model.tokenizer, dtype, bar, where)
    return sum(math.prod(shape) for shape in shapes.values())


# fmt: off
_QUANTIZE_OPTIONS = ("code", "blocksize", "double_quant", "compute_dtype", "skip", "rule", "offset", "check_finite", "nested_code",
                     "signed", "threshold", "integer_products")
# fmt: on


def _draw(logits, temperature, top_k, top_p, rng):
    """One token id from the logits (vocab,)."""
    if temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):
        z = logits.astype(np.float64) / temperature
        if not np.isfinite(z).all():  # a temperature next to 0, which takes the likeliest token
            z = (logits.astype(np.float64) - logits.max()) / temperature
    p = np.exp(z - z.max())
    order = np.argsort(-p, kind="stable")
    p = p[order] / p.sum()
    if top_k is not None:
        p = p[:top_k]
    if top_p is not None:
        p = p[: int(np.searchsorted(np.cumsum(p), top_p * p.sum())) + 1]
    return int(order[rng.choice(len(p), p=p / p.sum())])
