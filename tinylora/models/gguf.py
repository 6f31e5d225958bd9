"""GGUF files of the Llama family, one tensor at a time, under Hugging Face's names.

    magic "GGUF" · version · tensors · entries | entries: name, type, value | tensors: name, shape, type, offset | data, aligned

The architecture is "llama" (Mistral too: with `attention.sliding_window` it is read as one), "qwen2" or "qwen3". A GGUF of a llama pairs
the neighbouring rows 2i and 2i + 1 of each head for the rotary turn, Hugging Face and the GGUFs of the others rows i and i + d/2:

    row i of a head here = row 2i there,    row i + d/2 here = row 2i + 1 there,    i < d/2        (q and k of a llama only)

Scaled rotary positions stand in `rope.scaling.type` ("linear") and `rope.scaling.factor`, or as one divisor a frequency in the tensor
rope_freqs.weight (Llama 3.1 and later); see `rope`.

Dequantizing is the `gguf` package's (extra `llm`): F32, F16, BF16, Q4_0, Q8_0, the K and IQ types and whatever else it knows, in
pieces, so that a tensor lies in memory once. The header is read here and not by gguf.GGUFReader, which maps the whole file into memory
(its pages count as resident) and keeps an array for each of the vocabulary's strings.

Differs from transformers' reader, which reads neither scaled rotary positions nor windows, in that whatever would change the model
and is not understood is refused: other architectures, tensors that the model does not have (experts, scales), other kinds of rope
scaling, a file that is cut short. llama.cpp does not look at a llama's `attention.sliding_window`.
"""

import itertools
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from . import rope
from .fields import check_value, number, one_of, shown, whole
from .files import check_regular, opened, stamp
from .safetensors import check_finite, reopened

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
#: What a header may hold: entries and tensors, bytes of a text, and values in all arrays together (a large vocabulary has 850,000).
_MOST_ENTRIES, _LONGEST_TEXT, _MOST_VALUES = 1 << 16, 1 << 24, 1 << 21
_COUNT, _POSITIVE = whole(1, (1 << 31) - 1), number(1e-30, 1e30)
ARCHITECTURES = ("llama", "qwen2", "qwen3")
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
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"
#: The numbers of Llama 3.1 to 3.3 but for the factor: what a rope_freqs.weight that fits them was made from.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GGUF(Mapping):
    """{Hugging Face's name: float32 array} of a GGUF file, each read and dequantized when it is asked for.

    config    the model's sizes as a Hugging Face config.json names them
    fields    {name: value} of everything that stands in the header, the vocabulary included
    """

    holds = "model"  # what general.type must say

    def __init__(self, path):
        self.path = Path(path)
        check_regular(self.path)
        self._package = _package()
        try:
            with opened(self.path) as f:
                self._file = stamp(f.fileno())
                self.fields, tensors = _read_header(f)
        except (ValueError, struct.error, OverflowError, MemoryError) as error:
            raise ValueError(f"{self.path} is not a whole GGUF file ({error})") from None
        self._family = self.fields.get("general.architecture")
        if self._family not in ARCHITECTURES:
            known = ", ".join(map(repr, ARCHITECTURES))
            raise ValueError(
                f"{self.path}: the architecture is {shown(self._family)} (general.architecture), tinylora reads {known}"
            )
        if (found := self.fields.get("general.type", "model")) != self.holds:
            raise ValueError(f"{self.path}: general.type is {shown(found)}, expected {self.holds!r}")
        self._tensors = {self._rename(name): tensor for name, tensor in tensors.items()}
        self._check_types()
        divisors = self._read(_FREQUENCIES) if _FREQUENCIES in self._tensors else None
        self._tensors.pop(_FREQUENCIES, None)
        self.config = self._config(divisors)

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
        out = self._read(name)
        for which, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if self._family == "llama" and f".{which}." in name:
                try:
                    out = halves(out, self.config[heads])
                except ValueError as error:
                    raise ValueError(f"{self.path}: {name}: {error}") from None
        return out

    def _read(self, name):
        """A tensor as it lies in the file, dequantized; ValueError for NaN and Inf."""
        shape, kind, place = self._tensors[name]
        kind = self._package.GGMLQuantizationType(kind)
        out = np.empty((math.prod(shape[:-1]), shape[-1]), np.float32)
        row = self._row_bytes(shape, kind)
        step = max(_PIECE // max(row, 1), 1)
        with reopened(self.path, self._file, place) as f:
            for start in range(0, len(out), step):
                raw = np.empty((min(step, len(out) - start), row), np.uint8)
                if f.readinto(raw) != raw.nbytes:
                    raise ValueError(f"{self.path}: tensor {name} ends too early; the file changed after it was opened")
                part = out[start : start + len(raw)]
                try:
                    with np.errstate(all="ignore"):  # of numbers that are refused in the next line
                        part[:] = self._package.dequantize(raw, kind)
                except Exception as error:  # of another package, in whatever it meets
                    raise ValueError(
                        f"{self.path}: tensor {name} of type {kind.name} was not dequantized: {error!r}"
                    ) from None
                check_finite(part, self.path, name)
        return out.reshape(shape)

    def float32(self, name):
        return self[name]

    def _rename(self, name):
        if name == _FREQUENCIES:
            return name
        match = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,5})\.)?(\w+)\.(weight|bias)", name)
        ours = _NAMES.get(match[2]) if match else None
        in_block = ours is not None and not ours.startswith(("model.", "lm_head"))
        if ours is None or in_block != (match[1] is not None):
            raise ValueError(f"{self.path}: a tensor is named {name}, which tinylora's Llama does not have")
        return f"model.layers.{match[1]}.{ours}.{match[3]}" if in_block else f"{ours}.{match[3]}"

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
                    f"{self.path}: tensor {name} is of type {self._type_name(code)}, which the gguf package cannot dequantize"
                )
            block = self._package.GGML_QUANT_SIZES[kind][0]
            if not shape or 0 in shape or shape[-1] % block:
                raise ValueError(
                    f"{self.path}: tensor {name} of shape {shown(shape)} is not made of {kind.name} blocks of {block}"
                )
            spans.append((place, place + math.prod(shape[:-1]) * self._row_bytes(shape, kind), name))
        spans = [*sorted(spans), (size, 0, "")]
        for (_, end, name), (begin, _, after) in itertools.pairwise(spans):
            if end > begin:
                what = (
                    f"and {after} overlap"
                    if after
                    else f"should end at byte {end:,}, the file at {size:,}; it is truncated"
                )
                raise ValueError(f"{self.path} is not a whole GGUF file (tensor {name} {what})")

    def _type_name(self, code):
        """GGUF's name of a type, or its number where the gguf package has no name for it."""
        known = {int(kind): kind.name for kind in self._package.GGMLQuantizationType}
        return known.get(code, code)

    def _can(self, code):
        try:
            kind = self._package.GGMLQuantizationType(code)
            self._package.dequantize(np.zeros((1, self._package.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            return None
        return kind

    def _field(self, name, default=None, kind=_COUNT):
        """A number of the header: by default a whole one, 1 or more."""
        name = f"{self._family}.{name}"
        return check_value(self.fields.get(name, default), kind, self.path, name)

    def _or_one(self, name):
        """A positive number of the header; 1 where it is not there, or 0, which says nothing."""
        return self._field(name, kind=_POSITIVE) if self.fields.get(f"{self._family}.{name}") else 1.0

    def _expect(self, expected):
        """{entry: (the value that it must have if it is there, what that means)}"""
        for name, (value, what) in expected.items():
            found = self.fields.get(f"{self._family}.{name}", value)
            if found != value:
                raise ValueError(f"{self.path}: {self._family}.{name} is {shown(found)}; expected {what}")

    def _config(self, divisors):
        field = self._field
        heads, hidden = field("attention.head_count"), field("embedding_length")
        head_dim = field("attention.key_length", hidden // heads or None)
        self._expect(
            {
                "attention.value_length": (head_dim, "heads of keys and values of one size"),
                "attention.causal": (True, "attention to what came before"),
                "rope.dimension_count": (head_dim, "every dimension of a head to be turned"),
                "expert_count": (0, "no experts"),
                "logit_scale": (1.0, "logits that are not scaled"),
                "residual_scale": (1.0, "residuals that are not scaled"),
                "embedding_scale": (1.0, "embeddings that are not scaled"),
            }
        )
        scale = self.fields.get(f"{self._family}.attention.scale")  # 0 says nothing
        if scale and abs(self._field("attention.scale", kind=_POSITIVE) * math.sqrt(head_dim) - 1) > 1e-3:
            raise ValueError(f"{self.path}: {self._family}.attention.scale is {scale}, expected 1/√{head_dim}")
        if "model.embed_tokens.weight" not in self._tensors:
            raise ValueError(f"{self.path} holds no token_embd.weight")
        blocks = {int(name.split(".")[2]) for name in self._tensors if name.startswith("model.layers.")}
        if len(blocks) != field("block_count"):
            raise ValueError(
                f"{self.path}: its block_count is {field('block_count')}, it holds tensors of {len(blocks)} blocks"
            )
        bos, pad, *ends = map(self._token, ("bos", "padding", "eos", "eot", "eom"))
        ends = list(dict.fromkeys(i for i in ends if i is not None))
        tokens = {
            "bos_token_id": bos,
            "eos_token_id": ends if len(ends) > 1 else (ends or [None])[0],
            "pad_token_id": pad,
        }
        theta = _shortest(field("rope.freq_base", 10000.0, kind=_POSITIVE))
        return {
            "model_type": self._family,
            "vocab_size": self._tensors["model.embed_tokens.weight"][0][0],
            "hidden_size": hidden,
            "intermediate_size": field("feed_forward_length"),
            "num_hidden_layers": field("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": field("attention.head_count_kv", heads),
            "max_position_embeddings": field("context_length"),
            "rms_norm_eps": _shortest(field("attention.layer_norm_rms_epsilon", kind=number(above=0, high=1))),
            "rope_theta": theta,
            "rope_scaling": self._scaling(divisors, theta, head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "head_dim": head_dim,
            "attention_bias": any(".self_attn." in n and n.endswith("_proj.bias") for n in self._tensors),
            "mlp_bias": any(".mlp." in n and n.endswith(".bias") for n in self._tensors),
            **self._windows(),
            **tokens,
        }

    def _token(self, name):
        """The id of a special token; None where the file has none, or llama.cpp's word for none, −1."""
        i = self.fields.get(f"tokenizer.ggml.{name}_token_id")
        if i is None or i in (-1, 2**32 - 1):
            return None
        tokens = self.fields.get("tokenizer.ggml.tokens")
        n = len(tokens) if isinstance(tokens, list) else self._tensors["model.embed_tokens.weight"][0][0]
        if type(i) is not int or not 0 <= i < n:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.{name}_token_id is {shown(i)}, and there are {n} tokens, counted from 0"
            )
        return i

    def _windows(self):
        """The entries of a config.json about the sliding window. A window as long as the text is none."""
        if not self.fields.get(f"{self._family}.attention.sliding_window"):
            return {}
        window = self._field("attention.sliding_window")
        if window >= self._field("context_length"):
            return {}
        if self._family != "llama":  # which layers slide stands in different places for different architectures
            raise ValueError(f"{self.path}: {self._family}.attention.sliding_window is {window!r}; expected none")
        return {"model_type": "mistral", "sliding_window": window}

    def _scaling(self, divisors, theta, head_dim):
        """rope_scaling as a config.json has it: llama.cpp takes a factor whose type is not said for "linear"."""
        kind = self.fields.get(f"{self._family}.rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise ValueError(
                f"{self.path}: {self._family}.rope.scaling.type is {shown(kind)}; expected 'linear' or 'none'"
            )
        self._expect({"rope.scaling.attn_factor": (1.0, "attention that is not scaled")})
        factor = _shortest(self._or_one("rope.scaling.factor"))
        factor = _shortest(self._or_one("rope.scale_linear")) if factor == 1 else factor  # its name in older files
        linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None
        if divisors is None:
            return linear
        if divisors.shape != (head_dim // 2,) or not all(map(_POSITIVE.fits, divisors.tolist())):
            raise ValueError(
                f"{self.path}: {_FREQUENCIES} is {shown(divisors.tolist())}, expected {head_dim // 2} positive numbers"
            )
        if linear is not None:
            raise ValueError(
                f"{self.path}: rope.scaling.factor is {factor!r} beside {_FREQUENCIES}; expected one of the two"
            )
        if (divisors == 1).all():
            return None
        llama3 = {"rope_type": "llama3", "factor": _shortest(divisors.max()), **_LLAMA3}
        same = np.allclose(rope.divisors(head_dim, theta, llama3), divisors, rtol=1e-5, atol=0)
        return llama3 if same else rope.divided(divisors)


def is_gguf(path):
    """Whether a path is a GGUF file by its name: .gguf, in capital letters or not, and no folder."""
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()


def halves(w, heads):
    """Rows paired as neighbours -> rows paired as halves, head by head. (heads · d, ...) -> the same shape."""
    if len(w) % (2 * heads):
        raise ValueError(f"{len(w)} rows are not {heads} heads of an even size")
    return w.reshape(heads, len(w) // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _shortest(x):
    """The shortest decimal that is the same float32: 9.999999747378752e-06, as a float32 reads in Python, is 1e-05."""
    return float(str(np.float32(x)))


def _package(what="reading"):
    try:
        import gguf
    except ModuleNotFoundError:
        raise ValueError(
            f"{what} a GGUF file needs the gguf package: pip install -e '.[llm]' in a clone of tinylora"
        ) from None
    return gguf


# ---------------------------------------------------------------------------------------------------------------- header
def _read_header(f):
    """({name: value}, {name: (shape, type, place in the file)}) of an open GGUF file, versions 2 and 3, little-endian."""
    source = _Bytes(f, os.fstat(f.fileno()).st_size)
    if source.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensors, entries = source.number("<I"), *source.numbers("<Q", 2)
    if version in (2 << 24, 3 << 24):
        raise ValueError("it is big-endian: its numbers begin with their highest byte, expected the lowest")
    if version not in (2, 3):
        raise ValueError(f"version {version}, expected 2 or 3, little-endian")
    if max(tensors, entries) > _MOST_ENTRIES:
        raise ValueError(f"{entries} entries and {tensors} tensors, expected at most {_MOST_ENTRIES} of each")
    fields = {}
    for _ in range(entries):
        name = source.name(fields, "entry")
        fields[name] = source.value(name, source.number("<I"))
    found = {}
    for _ in range(tensors):
        name = source.name(found, "tensor")
        count = source.number("<I")
        if count > 8:
            raise ValueError(f"tensor {name} has {count} dimensions")
        shape = tuple(reversed(source.numbers("<Q", count)))  # GGUF counts from the fastest dimension
        found[name] = (shape, source.number("<I"), source.number("<Q"))
    alignment = fields.get("general.alignment", 32)
    check_value(alignment, one_of(*(1 << i for i in range(21))), "its header", "general.alignment")
    start = -(-f.tell() // alignment) * alignment
    for name, (_, _, offset) in found.items():
        if offset % alignment:
            raise ValueError(f"tensor {name} lies at byte {offset}, not a multiple of {alignment}")
    return fields, {name: (shape, kind, start + offset) for name, (shape, kind, offset) in found.items()}


class _Bytes:
    """A file read from the front that says where it ended, and never asks for more than is left."""

    def __init__(self, file, size):
        self.file, self.left, self.values = file, size, _MOST_VALUES

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
        n = self.number("<Q")
        if self.left >= n > _LONGEST_TEXT:
            raise ValueError(f"a text of {n} bytes, expected at most {_LONGEST_TEXT}")
        return self.take(n).decode("utf-8")

    def name(self, taken, what):
        """The name of an entry or a tensor, which is none of those that are taken."""
        name = self.string()
        if not name.isprintable():
            raise ValueError(f"the {what} {shown(name)} has a name that cannot be printed")
        if name in taken:
            raise ValueError(f"the {what} {shown(name)} occurs twice")
        return name

    def value(self, name, kind):
        """The value of an entry; ValueError for NaN, which no entry means."""
        if kind != _ARRAY:
            return self._values(name, kind, 1)[0]
        kind, n = self.number("<I"), self.number("<Q")
        if n <= self.left and n > self.values:
            raise ValueError(f"{name} brings the values of its arrays to more than {_MOST_VALUES}")
        self.values -= n
        return self._values(name, kind, n)

    def _values(self, name, kind, n):
        if kind == _STRING:
            return [self.string() for _ in range(n)]
        if kind not in _SCALARS:
            raise ValueError(f"{name} is of type {kind}, which is none that is read")
        found = self.numbers(_SCALARS[kind], n)
        if any(x != x for x in found):
            raise ValueError(f"{name} holds NaN; expected a number")
        return found
