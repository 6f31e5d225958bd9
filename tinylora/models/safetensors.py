"""safetensors with sixteen-bit floats, read and written one tensor at a time.

    8 bytes: n, little-endian · n bytes of JSON: {name: {dtype, shape, data_offsets: [begin, end)}} · the data

The safetensors package reads and writes NumPy arrays but no bfloat16; here a bfloat16 tensor is a BFloat16Array. And a model
need not be in memory twice: `open_folder` reads the header and then each tensor when it is asked for, `write_safetensors`
takes them one at a time. A file that is half written is the one that `files.atomic` removes again: the package's own, which it
would leave behind where it is killed, is never there.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..dtypes import BFloat16Array, as_float32, from_bfloat16_bits
from .fields import check, check_value, mapping, several, shown, text, whole
from .files import atomic, check_regular, is_plain_name, opened, read_json, settle, stamp

#: Wide dtypes first, which aligns all of them; in this order the safetensors package writes them too.
_NUMPY = {
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "F32": np.float32,
    "U32": np.uint32,
    "I32": np.int32,
    "BF16": np.uint16,  # its bits
    "F16": np.float16,
    "U16": np.uint16,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_CODES = {np.dtype(kind).name: name for name, kind in _NUMPY.items() if name != "BF16"} | {"bfloat16": "BF16"}
_BYTES = {name: np.dtype(kind).itemsize for name, kind in _NUMPY.items()}
_PLACES = {name: place for place, name in enumerate(_NUMPY)}
_FLOATS = ("F64", "F32", "F16", "BF16")
_PIECE = 1 << 20  # elements widened at a time

_LONGEST_HEADER, _MOST_TENSORS = 16 << 20, 1 << 16  # bytes, entries
#: How often what makes a JSON value may stand in a header: a list of three bytes takes sixty in memory.
_MOST_OF = {
    b"[": 4 * _MOST_TENSORS,
    b"{": 4 * _MOST_TENSORS,
    b",": 20 * _MOST_TENSORS,
    b":": 4 * _MOST_TENSORS + (1 << 14),
}
_MOST_SHARDS, _MOST_LISTED = 4096, 1 << 19  # files of an index, and values in it
_ENTRY = {"dtype": text(16), "shape": several(whole(), most=16), "data_offsets": several(whole(), most=2)}
_METADATA = mapping(text(_LONGEST_HEADER))
_WEIGHT_MAP = mapping(text(255))


def save_safetensors(path, tensors, metadata=None):
    """Write {name: array or BFloat16Array} atomically. Metadata: strings to strings, {"format": "pt"} by default, as torch's tools ask."""
    plan = {}
    for name, x in tensors.items():
        if _dtype(x) not in _CODES:
            raise ValueError(f"{path}: {name} is {_dtype(x)}, expected one of {', '.join(_CODES)}")
        plan[name] = _CODES[_dtype(x)], x.shape
    write_safetensors(path, plan, tensors.__getitem__, metadata)


def write_safetensors(path, plan, read, metadata=None, bar=iter):
    """Write tensors one at a time, atomically: never more than one is in memory. The same bytes as the safetensors package writes.

    plan   {name: (dtype, shape)}, dtype as the format names it: "F32", "BF16"
    read   read(name) -> array or BFloat16Array of that dtype and shape
    bar    is given the list of the names and hands them on, for a progress bar
    """
    names = sorted(plan, key=lambda name: (_PLACES[plan[name][0]], name))
    header, end = {"__metadata__": {"format": "pt"} if metadata is None else metadata}, 0
    for name in names:
        dtype, shape = plan[name]
        begin, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    head += b" " * (-len(head) % 8)
    with atomic(path) as temporary, open(temporary, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in bar(names):
            dtype, shape = plan[name]
            w = read(name)
            found = _CODES.get(_dtype(w)), w.shape
            if found != (dtype, tuple(shape)):
                raise ValueError(f"{path}: {name} is {found[0]} {found[1]}, planned was {dtype} {tuple(shape)}")
            f.write(_as_stored(w).data)


def _dtype(x):
    """The dtype of an array or BFloat16Array by name, such as "float32": the same for every order of its bytes."""
    return x.dtype if isinstance(x, BFloat16Array) else x.dtype.name


def _as_stored(x):
    """The bytes that a file holds: row after row, each number's lowest byte first, whatever order they have in memory."""
    a = x.bits if isinstance(x, BFloat16Array) else x
    return np.ascontiguousarray(a, a.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)


# --------------------------------------------------------------------------------------------------------------- reading
class Safetensors(Mapping):
    """{name: array or BFloat16Array} of a safetensors file, each read from the disk when it is asked for.

        8 bytes: n, little-endian · n bytes of JSON: {name: {dtype, shape, data_offsets: [begin, end)}} · the data

    Opening reads the header only, and checks it whole: the tensors must fill the rest of the file exactly, without gaps
    or overlaps. ValueError says what is wrong; nothing has been loaded then. Every later read opens the file again, and it
    must still be the one whose header was read.
    """

    def __init__(self, path):
        self.path = Path(path)
        check_regular(self.path)
        try:
            with opened(self.path) as f:
                self._file = stamp(f.fileno())
                self._entries, self.metadata = _read_header(f)
        except RecursionError:
            raise ValueError(f"{self.path} is not a whole safetensors file (its header is nested too deeply)") from None
        except ValueError as error:
            raise ValueError(
                f"{self.path} is not a whole safetensors file ({error}); it may be truncated or corrupted"
            ) from None
        for name, (kind, _, _) in self._entries.items():
            if kind not in _NUMPY:
                raise ValueError(f"{self.path}: tensor {name} has dtype {shown(kind)}, which NumPy cannot hold")

    def __iter__(self):
        return iter(self._entries)

    def __len__(self):
        return len(self._entries)

    def __contains__(self, name):  # Mapping's own would read the tensor
        return name in self._entries

    def kind(self, name):
        """(dtype, shape): the dtype as the format names it, such as "BF16"."""
        return self._entries[name][:2]

    def where(self, name):
        """The file that holds a tensor."""
        return self.path

    def __getitem__(self, name):
        kind, shape, begin = self._entries[name]
        array = np.empty(math.prod(shape), _NUMPY[kind])
        with reopened(self.path, self._file, begin) as f:
            self._fill(f, array, name)
        array = array.reshape(shape)
        return BFloat16Array(array) if kind == "BF16" else array

    def is_float(self, name):
        """Whether a tensor holds floats that NumPy can widen to float32."""
        return self._entries[name][0] in _FLOATS

    def float32(self, name):
        """A tensor as a float32 array of its own; a 16-bit one is widened piece by piece, so that it lies in memory once. ValueError
        for NaN and Inf."""
        shape, start = self._entries[name][1], 0
        out = np.empty(math.prod(shape), np.float32)
        for piece in self.pieces(name):
            out[start : start + len(piece)] = piece
            start += len(piece)
        return out.reshape(shape)

    def pieces(self, name):
        """The numbers of a tensor in order, as float32 arrays (n,) of at most _PIECE elements; ValueError where one is not finite."""
        kind, shape, begin = self._entries[name]
        if kind not in _FLOATS:
            raise ValueError(f"{self.path}: tensor {name} has dtype {kind}, expected floats")
        size = math.prod(shape)
        with reopened(self.path, self._file, begin) as f:
            for start in range(0, size, _PIECE):
                piece = np.empty(min(_PIECE, size - start), _NUMPY[kind])
                self._fill(f, piece, name)
                with np.errstate(over="ignore"):  # what only a float64 holds is told apart next
                    wide = from_bfloat16_bits(piece) if kind == "BF16" else piece.astype(np.float32, copy=False)
                yield check_finite(wide, self.path, name)

    def _fill(self, f, array, name):
        if f.readinto(array.view(np.uint8)) != array.nbytes:
            raise ValueError(f"{self.path}: tensor {name} ends too early; the file changed after it was opened")


class Sharded(Mapping):
    """The same face for several files of one model, which an index lists: {name: the Safetensors that holds it}."""

    def __init__(self, index, shards):
        self.path, self._shards = index, shards

    def __iter__(self):
        return iter(self._shards)

    def __len__(self):
        return len(self._shards)

    def __contains__(self, name):
        return name in self._shards

    def __getitem__(self, name):
        return self._shards[name][name]

    def kind(self, name):
        return self._shards[name].kind(name)

    def where(self, name):
        return self._shards[name].path

    def is_float(self, name):
        return self._shards[name].is_float(name)

    def float32(self, name):
        return self._shards[name].float32(name)

    def pieces(self, name):
        return self._shards[name].pieces(name)


@contextlib.contextmanager
def reopened(path, known, place):
    """A file, opened again at a place; ValueError if another one has taken its name since its `stamp` was `known`, or it was written to."""
    with opened(path) as f:
        if stamp(f.fileno()) != known:
            raise ValueError(f"{path}: the file changed after it was opened; open it again")
        f.seek(place)
        yield f


def _read_header(f):
    """({name: (dtype, shape, place in the file)}, metadata) of an open safetensors file."""
    size = os.fstat(f.fileno()).st_size
    start = 8 + int.from_bytes(f.read(8), "little")
    if not 10 <= start <= size:
        raise ValueError(f"{size} bytes, of which the header should be {start}")
    if start > _LONGEST_HEADER:
        raise ValueError(f"its header should be {start} bytes; expected at most {_LONGEST_HEADER}")
    head = f.read(start - 8)
    for mark, most in _MOST_OF.items():
        if head.count(mark) > most:
            raise ValueError(f"its header holds {mark.decode()} {head.count(mark)} times; expected at most {most}")
    header = json.loads(head, object_pairs_hook=_once)
    if not isinstance(header, dict) or len(header) > _MOST_TENSORS:
        raise ValueError(f"the header is not a JSON object of at most {_MOST_TENSORS} tensors")
    metadata = check_value(header.pop("__metadata__", None) or {}, _METADATA, "the header", "__metadata__")
    entries, spans = {}, []
    for name in sorted(header):
        kind, shape, (begin, end) = _entry(name, header[name])
        entries[name] = (kind, shape, start + begin)
        spans.append((begin, end))
    here = 0
    for begin, end in sorted(spans):
        if begin != here or end < begin:
            raise ValueError(f"a tensor begins at byte {begin} of the data, expected {here}")
        here = end
    if start + here != size:
        raise ValueError(f"it has {size} bytes, its header speaks of {start + here}")
    return entries, metadata


def _entry(name, entry):
    """(dtype, shape, (begin, end)) of a tensor as the header describes it."""
    if not name.isprintable():
        raise ValueError(f"a tensor is named {shown(name)}; expected a name that can be printed")
    check(entry, _ENTRY, f"tensor {name}", required=tuple(_ENTRY))
    kind, shape, span = entry["dtype"], tuple(entry["shape"]), tuple(entry["data_offsets"])
    if len(span) != 2 or span[1] < span[0]:
        raise ValueError(f"tensor {name}: data_offsets = {shown(span)}, expected where it begins and where it ends")
    if kind in _BYTES and span[1] - span[0] != math.prod(shape) * _BYTES[kind]:
        raise ValueError(f"tensor {name}: {span[1] - span[0]} bytes are not {kind} of shape {shown(shape)}")
    return kind, shape, span


def _once(pairs):
    """A JSON object whose keys are all different."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {shown(name)} occurs twice")
        found[name] = value
    return found


def is_finite(x):
    """Whether all numbers of a float array or BFloat16Array are finite."""
    for start in range(0, len(flat := _flat(x)), _PIECE):
        a = flat[start : start + _PIECE]
        a = from_bfloat16_bits(a) if isinstance(x, BFloat16Array) else a
        with np.errstate(all="ignore"):
            if not np.isfinite(a.dot(a)) and not np.isfinite(a).all():  # a large sum of squares alone says nothing
                return False
    return True


def _flat(x):
    return (x.bits if isinstance(x, BFloat16Array) else x).reshape(-1)


def check_finite(x, where, name):
    """`x`, a float array or BFloat16Array, if all its numbers are finite; ValueError names the file and the tensor if one is not."""
    if not is_finite(x):
        what = "NaN" if np.isnan(as_float32(x)[0]).any() else "Inf"
        raise ValueError(f"{where}: {name} holds {what}; expected finite numbers")
    return x


def open_folder(folder):
    """The tensors of a model folder, read when asked for: model.safetensors, or the files that model.safetensors.index.json lists."""
    folder = Path(folder)
    settle(folder)
    index = folder / "model.safetensors.index.json"
    if os.path.lexists(folder / "model.safetensors") or not os.path.lexists(index):
        return Safetensors(folder / "model.safetensors")
    listed = _weight_map(index)
    opened = {name: Safetensors(folder / name) for name in sorted(set(listed.values()))}
    shards = {}
    for shard in opened.values():
        for name in shard:
            if name in shards and name not in listed:
                raise ValueError(
                    f"{shard.path}: {name} lies in {shards[name].path} too, and {index.name} lists neither"
                )
            shards[name] = shard
    for name, file in listed.items():
        if name not in opened[file]:
            raise ValueError(f"{index}: weight_map says that {shown(name)} is in {file}, which does not hold it")
        shards[name] = opened[file]
    return Sharded(index, shards)


def _weight_map(index):
    """{tensor: file} of an index, in which each file is one of the index's own folder."""
    listed = check(read_json(index, most=_MOST_LISTED), {"weight_map": _WEIGHT_MAP}, index, required=("weight_map",))[
        "weight_map"
    ]
    for name, file in listed.items():
        if not (is_plain_name(file) and file.isprintable() and file.endswith(".safetensors")):
            raise ValueError(
                f"{index}: weight_map.{shown(name)} = {shown(file)}, expected the name of a .safetensors file beside the index"
            )
    if not 0 < len(set(listed.values())) <= _MOST_SHARDS:
        raise ValueError(f"{index}: weight_map names {len(set(listed.values()))} files, expected 1 to {_MOST_SHARDS}")
    return listed


def load_safetensors(path):
    """({name: array or BFloat16Array}, metadata). A truncated or corrupted file raises ValueError with a sentence."""
    opened = Safetensors(path)
    return dict(opened.items()), opened.metadata


def load_folder(folder):
    """{name: array or BFloat16Array} of a model folder, all of it (see `open_folder`)."""
    return dict(open_folder(folder).items())
