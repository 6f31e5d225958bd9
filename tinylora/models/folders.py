"""Model folders and GGUF files, opened without loading them and written one tensor at a time.

    open_model(path)          "base", a Hugging Face folder (safetensors, one file or several) or FILE.gguf -> ModelFiles
    write_folder(folder, …)   config.json, model.safetensors, tokenizer.json, generation_config.json: what transformers opens

ModelFiles know names, shapes, the config and the vocabulary; a weight is read when it is asked for. `Llama.from_pretrained`
and `llama.convert` are built on it.
"""

from dataclasses import dataclass
from pathlib import Path

from ..data import base_folder
from ..dtypes import BFloat16Array
from . import files, fourbit, safetensors
from .fields import check, either, optional, several, whole
from .gguf import GGUF, is_gguf
from .tokenizers import BPETokenizer, ByteTokenizer, fitting, load_tokenizer

_ID = whole(0, (1 << 31) - 1)
_TOKENS = {
    "bos_token_id": optional(_ID),
    "eos_token_id": optional(either(_ID, several(_ID, most=1000))),
    "pad_token_id": optional(_ID),
}
#: What a model folder consists of, here and in transformers. A model that is saved takes the place of all of them.
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
DTYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class ModelFiles:
    """A model that lies on a disk.

    config     a Hugging Face config.json as a dict, with the ids of generation_config.json; it stands in `config_path`
    weights    {name: array}, lazily; also kind(name) -> (dtype, shape), is_float(name) -> bool, float32(name) -> array,
               where(name) -> file, and in folders pieces(name) -> the same float32 numbers, piece by piece
    saved      the `files.stamp` of a folder's config.json, so that nothing is read of another save than this one
    """

    path: Path
    config: dict
    config_path: Path
    weights: object
    saved: tuple | None = None

    def check(self, shapes, whole=True):
        """Whether the file holds these tensors, and no others if `whole`; ValueError names the first that does not fit.

        Two kinds of tensors may be there as well: see `spare`.
        """
        names = set(self.weights) - self.spare(shapes)
        unfit = f"does not fit its {'header' if self.config_path == self.path else self.config_path.name}"
        if missing := sorted(shapes.keys() - names):
            why = ", and tie_word_embeddings is false" if missing == ["lm_head.weight"] else ""
            where = getattr(self.weights, "path", self.path)
            raise ValueError(f"{where} {unfit}: {len(missing)} tensors are missing, the first is {missing[0]}{why}")
        if whole and (unknown := sorted(names - shapes.keys())):
            where = self.weights.where(unknown[0])
            raise ValueError(f"{where} {unfit}: it holds {unknown[0]}, which the model does not have")
        for name, shape in shapes.items():
            found = self.weights.kind(name)[1]
            if tuple(found) != tuple(shape):
                where = self.weights.where(name)
                raise ValueError(f"{where} {unfit}: {name} has shape {tuple(found)}, the model's is {tuple(shape)}")
            self.check_floats(name)

    def check_floats(self, name):
        if not self.weights.is_float(name):
            where, kind = self.weights.where(name), self.weights.kind(name)[0]
            raise ValueError(f"{where}: {name} has dtype {kind}, expected floats")

    def spare(self, names):
        """The tensors that a model with these parameters does without: the rotary tables that old folders carry along (`rope.agrees`
        compares them with the config), and a head where the model has none but its embedding (`own_head` compares the two)."""
        return {n for n in self.weights if is_rotary_table(n) or (n == "lm_head.weight" and n not in names)}

    def own_head(self):
        """Whether there is a head that is not the embedding over again: transformers does not tie them then, whatever the config says."""
        head, embedding, w = "lm_head.weight", "model.embed_tokens.weight", self.weights
        if head not in w:
            return False
        if not w.is_float(head) or w.kind(head)[1] != w.kind(embedding)[1]:
            return True
        return any((a != b).any() for a, b in zip(w.pieces(head), w.pieces(embedding), strict=True))

    def tokenizer(self):
        """The model's tokenizer; ValueError if it has more tokens than the model."""
        size = self.config.get("vocab_size", 0)
        if not isinstance(self.weights, GGUF):
            tokenizer = load_tokenizer(self.path, size)
            files.check_unchanged(self.config_path, self.saved)
            return tokenizer
        if "tokenizer.ggml.tokens" not in self.weights.fields:
            if size == 256:
                return ByteTokenizer()
            raise ValueError(
                f"{self.path} holds no vocabulary (tokenizer.ggml.tokens), and its model has {size} tokens; expected a file with its "
                "vocabulary, or a model of the 256 bytes"
            )
        return fitting(BPETokenizer.from_gguf(self.weights.fields, self.path), size, self.path)


def is_rotary_table(name):
    """Whether a tensor is the table of rotary frequencies that transformers once saved with each layer."""
    return name.endswith("rotary_emb.inv_freq")


def place(path):
    """The folder or file that a model's name means."""
    return base_folder() if str(path) == "base" else Path(path)


def open_model(path, held="dense"):
    """The ModelFiles of "base" (the embedded model), a folder with config.json and safetensors, or FILE.gguf.

    held   how the weights of the folder must be held: "dense", "4bit" or "8bit" (see `fourbit.held`)
    """
    folder = place(path)
    if is_gguf(folder):
        opened = GGUF(folder)
        return ModelFiles(folder, opened.config, folder, opened)
    files.settle(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: expected 'base' or a folder with config.json and model.safetensors, or FILE.gguf"
        )
    saved = files.stamp(folder / "config.json")
    config = fourbit.read_config(folder)
    if (folder / "generation_config.json").is_file():  # an instruction-tuned model may end its answers at other tokens
        generation = folder / "generation_config.json"
        said = files.read_json(generation, fourbit.LONGEST_CONFIG, fourbit.MOST_SETTINGS)
        ids = check(said, _TOKENS, generation)
        config |= {name: ids[name] for name in _TOKENS if ids.get(name) is not None}
    if (found := fourbit.held(folder)) != held:
        names = {"dense": "dense", "4bit": "in bitsandbytes' 4 bits", "8bit": "in bitsandbytes' LLM.int8()"}
        raise ValueError(
            f"{folder / 'config.json'}: its weights are {names[found]}; expected a model that is {names[held]} (a GGUF file is "
            "written of either)"
        )
    weights = safetensors.open_folder(folder)
    files.check_unchanged(folder / "config.json", saved)
    return ModelFiles(folder, config, folder / "config.json", weights, saved)


def write_folder(folder, config, shapes, read, tokenizer, dtype="bfloat16", bar=iter, where=None):
    """Write a model folder: shapes {name: shape}, read(name) -> float32 array. dtype "bfloat16" (ties to even) or "float32".

    where   where(name) -> the file that a weight was read from, for the sentence on NaN or Inf: such a model is not written
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: expected 'bfloat16' or 'float32'")
    folder = Path(folder)
    files.settle(folder)
    if isinstance(tokenizer, ByteTokenizer) and (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} holds the vocabulary of another model (tokenizer.json); choose another folder")
    ids = {name: config[name] for name in _TOKENS if config.get(name) is not None}
    with files.whole_folder(folder, replaces=MODEL_FILES) as new:
        safetensors.write_safetensors(
            new / "model.safetensors",
            {name: (DTYPES[dtype], tuple(shape)) for name, shape in shapes.items()},
            lambda name: _stored(read(name), dtype, f"{where(name) if where else folder}: {name}"),
            bar=bar,
        )
        tokenizer.save(new)
        if ids:
            files.write_json(new / "generation_config.json", ids)
        files.write_json(new / "config.json", {**config, "dtype": dtype})


def _stored(w, dtype, name):
    """A weight as a folder of this dtype stores it; ValueError with its `name` if that is not finite."""
    w = BFloat16Array.of(w) if dtype == "bfloat16" else w
    _check_stored(w, dtype, name)
    return w


def _check_stored(w, dtype, name):
    if not safetensors.is_finite(w):
        raise ValueError(f"{name} holds NaN, Inf or numbers that {dtype} does not hold; expected finite numbers")


def rounded(w, dtype, name="weight"):
    """A float32 array's values rounded to "bfloat16", in place and row by row; "float32" leaves them."""
    if dtype == "bfloat16":
        rows = w.reshape(len(w), -1)
        step = max((1 << 20) // max(rows.shape[1], 1), 1)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            part[:] = BFloat16Array.of(part).dequantize("float32")
            _check_stored(part, dtype, name)
    elif dtype != "float32":
        raise ValueError(f"dtype {dtype!r} is unknown: expected 'float32' or 'bfloat16'")
    return w


Checkpoint, open_checkpoint = ModelFiles, open_model  # their names of before, for one release
