"""GGUF files of Llamas, one tensor at a time, under Hugging Face's names.

    magic "GGUF" · version · tensors · entries | entries: name, type, value | tensors: name, shape, type, offset | data, aligned

A GGUF pairs the neighbouring rows 2i and 2i + 1 of each head for the rotary turn, Hugging Face rows i and i + d/2:

    row i of a head here = row 2i there,    row i + d/2 here = row 2i + 1 there,    i < d/2        (q and k only)

Dequantizing is the `gguf` package's (extra `llm`): F32, F16, BF16, Q4_0, Q4_1, Q8_0 and whatever else it knows, in pieces, so that
a tensor lies in memory once. The header is read here and not by gguf.GGUFReader, which maps the whole file into memory (its
pages count as resident) and keeps an array for each of the vocabulary's strings.

Differs from transformers' reader in that whatever would change the model and is not understood is refused: other
architectures, tensors that a Llama does not have (rope_freqs, biases, experts), rope scaling, a file that is cut short.
"""

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_FAMILY = "llama"
_PIECE = 1 << 22  # bytes dequantized at a time

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUF(Mapping):
    """{Hugging Face's name: float32 array} of a GGUF file, each read and dequantized when it is asked for.

    config    the model's sizes as a Hugging Face config.json names them
    fields    {name: value} of everything that stands in the header, the vocabulary included
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist")
        self._package = _package()
        try:
            self.fields, tensors = _read_header(self.path)
        except (ValueError, struct.error, OverflowError, MemoryError) as error:
            raise ValueError(f"{self.path} is not a whole GGUF file ({error})") from None
        family = self.fields.get("general.architecture")
        if family != _FAMILY:
            raise ValueError(f"{self.path}: the architecture is {family!r}, tinylora reads {_FAMILY!r}")
        self._tensors = {self._rename(name): tensor for name, tensor in tensors.items()}
        self._check_types()
        self.config = self._config()

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)

    def __contains__(self, name):
        return name in self._tensors

    def kind(self, name):
        """(dtype, shape): the dtype as GGUF names it, such as "Q4_1"."""
        shape, kind, _ = self._tensors[name]
        return self._package.GGMLQuantizationType(kind).name, shape

    def is_float(self, name):
        """Every type that can be dequantized holds floats; a file with another does not open."""
        return True

    def where(self, name):
        """The file that holds a tensor."""
        return self.path

    def __getitem__(self, name):
        shape, kind, place = self._tensors[name]
        kind = self._package.GGMLQuantizationType(kind)
        out = np.empty((math.prod(shape[:-1]), shape[-1]), np.float32)
        row = self._row_bytes(shape, kind)
        step = max(_PIECE // max(row, 1), 1)
        with open(self.path, "rb") as f:
            f.seek(place)
            for start in range(0, len(out), step):
                raw = np.empty((min(step, len(out) - start), row), np.uint8)
                if f.readinto(raw) != raw.nbytes:
                    raise ValueError(f"{self.path}: tensor {name} ends too early; the file changed after it was opened")
                out[start : start + len(raw)] = self._package.dequantize(raw, kind)
        out = out.reshape(shape)
        for which, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if name.endswith(f".{which}.weight"):
                out = halves(out, self.config[heads])
        return out

    def float32(self, name):
        return self[name]

    def _rename(self, name):
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
        ours = _NAMES.get(match[2]) if match else None
        in_block = ours is not None and not ours.startswith(("model.", "lm_head"))
        if ours is None or in_block != (match[1] is not None):
            raise ValueError(f"{self.path}: a tensor is named {name}, which tinylora's Llama does not have")
        return f"model.layers.{match[1]}.{ours}.weight" if in_block else f"{ours}.weight"

    def _row_bytes(self, shape, kind):
        block, size = self._package.GGML_QUANT_SIZES[kind]
        return shape[-1] // block * size

    def _check_types(self):
        """Each tensor's type can be dequantized, its rows are whole blocks, and it lies in the file beside the others."""
        spans, tried, size = [], {}, self.path.stat().st_size
        for name, (shape, code, place) in self._tensors.items():
            if code not in tried:
                tried[code] = self._can(code)
            kind = tried[code]
            if kind is None:
                raise ValueError(
                    f"{self.path}: tensor {name} is of type {code}, which the gguf package cannot dequantize"
                )
            block = self._package.GGML_QUANT_SIZES[kind][0]
            if not shape or shape[-1] % block:
                raise ValueError(
                    f"{self.path}: tensor {name} of shape {shape} is not made of {kind.name} blocks of {block}"
                )
            spans.append((place, place + math.prod(shape[:-1]) * self._row_bytes(shape, kind), name))
        for (_, end, name), (begin, _, after) in zip(sorted(spans), [*sorted(spans)[1:], (size, 0, "")], strict=True):
            if end > begin:
                what = (
                    f"and {after} overlap"
                    if after
                    else f"should end at byte {end:,}, the file at {size:,}; it is truncated"
                )
                raise ValueError(f"{self.path} is not a whole GGUF file (tensor {name} {what})")

    def _can(self, code):
        try:
            kind = self._package.GGMLQuantizationType(code)
            self._package.dequantize(np.zeros((1, self._package.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            return None
        return kind

    def _config(self):
        def field(name, default=None, kind=int):
            value = self.fields.get(f"{_FAMILY}.{name}", default)
            if type(value) not in (int, kind) or value <= 0:
                raise ValueError(f"{self.path}: {_FAMILY}.{name} is {value!r}, expected a positive number")
            return value

        heads, hidden = field("attention.head_count"), field("embedding_length")
        head_dim = field("attention.key_length", hidden // heads or None)
        alike = {
            "attention.value_length": (head_dim, "heads of keys and values of one size"),
            "rope.dimension_count": (head_dim, "every dimension of a head to be turned"),
            "rope.scaling.type": ("none", "no rope scaling"),
            "rope.scaling.factor": (1.0, "no rope scaling"),
            "rope.scale_linear": (1.0, "no rope scaling"),
            "expert_count": (0, "no experts"),
        }
        for name, (expected, what) in alike.items():
            if self.fields.get(f"{_FAMILY}.{name}", expected) != expected:
                raise ValueError(
                    f"{self.path}: {_FAMILY}.{name} is {self.fields[f'{_FAMILY}.{name}']!r}; expected {what}"
                )
        if "model.embed_tokens.weight" not in self._tensors:
            raise ValueError(f"{self.path} holds no token_embd.weight")
        blocks = {int(name.split(".")[2]) for name in self._tensors if name.startswith("model.layers.")}
        if len(blocks) != field("block_count"):
            raise ValueError(
                f"{self.path}: its block_count is {field('block_count')}, it holds tensors of {len(blocks)} blocks"
            )
        tokens = {
            f"{ours}_token_id": self.fields.get(f"tokenizer.ggml.{theirs}_token_id")
            for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        return {
            "model_type": "llama",
            "vocab_size": self._tensors["model.embed_tokens.weight"][0][0],
            "hidden_size": hidden,
            "intermediate_size": field("feed_forward_length"),
            "num_hidden_layers": field("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": field("attention.head_count_kv", heads),
            "max_position_embeddings": field("context_length"),
            "rms_norm_eps": _shortest(field("attention.layer_norm_rms_epsilon", kind=float)),
            "rope_theta": _shortest(field("rope.freq_base", 10000.0, kind=float)),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "head_dim": head_dim,
            **tokens,
        }


def halves(w, heads):
    """Rows paired as neighbours -> rows paired as halves, head by head. (heads · d, ...) -> the same shape."""
    if len(w) % (2 * heads):
        raise ValueError(f"{len(w)} rows are not {heads} heads of an even size")
    return w.reshape(heads, len(w) // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _shortest(x):
    """The shortest decimal that is the same float32: 9.999999747378752e-06, as a float32 reads in Python, is 1e-05."""
    return float(str(np.float32(x)))


def _package():
    try:
        import gguf
    except ModuleNotFoundError:
        raise ValueError(
            "reading a GGUF file needs the gguf package: pip install -e '.[llm]' in a clone of tinylora"
        ) from None
    return gguf


# ---------------------------------------------------------------------------------------------------------------- header
def _read_header(path):
    """({name: value}, {name: (shape, type, place in the file)}) of a GGUF file, versions 2 and 3, little-endian."""
    with open(path, "rb") as f:
        source = _Bytes(f, path.stat().st_size)
        if source.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, entries = source.number("<I"), *source.numbers("<Q", 2)
        if version not in (2, 3):
            raise ValueError(f"version {version}, expected 2 or 3, little-endian")
        fields = {}
        for _ in range(entries):
            name = source.string()
            if name in fields:
                raise ValueError(f"the entry {name} occurs twice")
            fields[name] = source.value(source.number("<I"))
        found = {}
        for _ in range(tensors):
            name = source.string()
            if name in found:
                raise ValueError(f"the tensor {name} occurs twice")
            count = source.number("<I")
            if count > 8:
                raise ValueError(f"tensor {name} has {count} dimensions")
            shape = tuple(reversed(source.numbers("<Q", count)))  # GGUF counts from the fastest dimension
            found[name] = (shape, source.number("<I"), source.number("<Q"))
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-f.tell() // alignment) * alignment
    for name, (_, _, offset) in found.items():
        if offset % alignment:
            raise ValueError(f"tensor {name} lies at byte {offset}, not a multiple of {alignment}")
    return fields, {name: (shape, kind, start + offset) for name, (shape, kind, offset) in found.items()}


class _Bytes:
    """A file read from the front that says where it ended, and never asks for more than is left."""

    def __init__(self, file, size):
        self.file, self.left = file, size

    def take(self, n):
        if n > self.left:
            raise ValueError("its header is cut short")
        self.left -= n
        return self.file.read(n)

    def numbers(self, kind, n):
        size = struct.calcsize(kind)
        return [x for (x,) in struct.iter_unpack(kind, self.take(n * size))]

    def number(self, kind):
        return self.numbers(kind, 1)[0]

    def string(self):
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind):
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value is of type {kind}, which GGUF does not have")
        inner, n = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            return self.numbers(_SCALARS[inner], n)
        if inner != _STRING:
            raise ValueError(f"an array holds values of type {inner}")
        return [self.string() for _ in range(n)]
