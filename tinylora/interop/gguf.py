"""Adapters as llama.cpp's LoRA files: `llama-cli -m model.gguf --lora adapter.gguf`.

    general.type = "adapter", general.architecture, adapter.type = "lora", adapter.lora.alpha
    blk.0.attn_q.weight.lora_a    (r, in)       A
    blk.0.attn_q.weight.lora_b    (out, r)      B, its rows in the order of the file's own weight (see models.gguf_writer)
    token_embd.weight.lora_a      (vocabulary, r), and lora_b (d, r): an adapted embedding

llama.cpp computes W x + (α / r) B A x with one α for the file and r the rows of each A (and with factor 1 where α is 0). Here a layer's
scale s may come from alpha_pattern or rsLoRA (α/√r). What a layer's s is more than α / r is multiplied into its B,

    B ← B · s r / α,        α = s r of most layers, so that with one scale for all nothing is multiplied

Refused, since the format has no place for it: DoRA, the bias of B, parameters trained whole, embeddings that come along, and factors of
an embedding that is the head as well. Merge such an adapter, and convert the merged model.

llama.cpp puts the adapter on whatever base it is told to. Written here, the file says which base it was trained on (the entry "tinylora",
as `peft` has it in a folder), and read here, another one is refused.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .. import adapters
from ..adapters.kinds import LoRAEmbedding
from ..adapters.targets import adaptable_layers, linears, own_weights
from ..backend import move
from ..models import folders, fourbit, gguf, gguf_writer, identity
from ..models.fields import number, shown
from ..models.llama import Llama, _unfilled
from . import embeddings, peft

_NO_PLACE = "and llama.cpp's LoRA files have no place for that: merge the adapter and convert the merged model instead"


def convert_adapter(folder, path, base=None, kind="f32", bar=iter, check_base=True):
    """Write the adapter of a folder (of PEFT's or tinylora's) as a GGUF. -> gguf_writer.Written

    base         the model that it was trained on: "base", a folder, or FILE.gguf; its dense weights are read one at a time.
                 Without it, the one that the adapter tells
    kind         "f32", "f16", "bf16" or "q8_0"
    check_base   False: write it for another base than it was trained on, too
    """
    gguf_writer.check_target(None, path, kind)
    file, base = peft._read(Path(folder)), base or peft.read_base(folder).find()
    opened = folders.open_model(base, held=fourbit.held(base))
    model = _unfilled(Llama, opened)
    with peft._naming(folder):
        _refuse_what_has_no_place(model, file.adapter)
    _refuse_what_comes_along(file, opened.weights, folder)
    try:
        adapters.refuse_unfit(model, file.adapter)
        peft.refuse_too_large(file.adapter)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder} does not fit the model {base}: {error.args[0]}") from None
    peft._refuse_other_layers(model, file.adapter, folder)
    if check_base and file.about is not None:
        _refuse_other_base(model, opened, file.about, folder)
    adapters.attach(model, file.adapter)
    return _write(model, "default", path, kind, bar, file.about)


@dataclass(frozen=True)
class _Unread:
    """A dense weight that is read each time that it is asked for."""

    shape: tuple
    read: Callable

    @property
    def data(self):
        return self.read()


def _refuse_other_base(model, opened, about, folder):
    """ValueError if the ModelFiles, of which `model` has the shapes, are another base than described."""
    if fourbit.is_quantized(opened.path):
        model = Llama.from_pretrained(opened.path)
        weights = own_weights(model)
    else:
        shapes = {name: tuple(w.shape) for name, w in own_weights(model).items()}
        weights = {n: _Unread(shape, partial(opened.weights.float32, n)) for n, shape in shapes.items()}
    peft._refuse_other_base(about, weights, linears(model), folder)


def _refuse_what_comes_along(file, base, folder):
    """ValueError if an adapter's folder holds an embedding or a head, or rows of one, that are not the base's own."""
    rows = next(iter(file.rows), None)
    if rows is not None:
        raise ValueError(f"{folder} has rows of its own for {rows} (trainable_token_indices), {_NO_PLACE}")
    for module, (array, _) in file.bases.items():
        own = f"{module}.weight"
        name = own if own in base else embeddings.EMBEDDING  # of a head that is the embedding
        if base.kind(name)[1] != array.shape or not identity.equal_but_for_rounding(base.float32(name), array):
            raise ValueError(f"{folder} brings {module} along, which is not the base's own, {_NO_PLACE}")


def save_adapter(model, path, base_model=None, name=None, kind="f32", bar=iter):
    """Write one adapter of a model (without a name, the active one) as a GGUF. -> gguf_writer.Written

    base_model   what the file should record as the base (a name or a folder)

    ValueError names what the format cannot carry.
    """
    gguf_writer.check_target(None, path, kind)
    return _write(
        model, name, path, kind, bar, {"base": base_model, **identity.identity(own_weights(model), linears(model))}
    )


def _write(model, name, path, kind, bar, about):
    """Write the adapter of this name; about: what models.identity says of its base, or None."""
    adapter, config = adapters.adapter_of(model, name), model.config
    _refuse_what_has_no_place(model, adapter)
    name = name or adapters.active_adapters(model)[0]
    layers = dict(adapters.lora_layers(model, name))
    alphas = {p: layer.bypasses[name].scaling * layer.bypasses[name].r for p, layer in layers.items()}  # s r
    alpha = Counter(map(_rounded, alphas.values())).most_common(1)[0][0] or 1.0  # 0 would mean a scale of 1
    arrays, folded = {}, [p for p in alphas if _rounded(alphas[p]) != alpha]
    for p, factors in adapter.weights.items():
        a, b = move(factors["lora_A"], "cpu"), move(factors["lora_B"], "cpu")
        if p in folded:
            b = (b * np.float64(alphas[p] / alpha)).astype(np.float32)
        there = gguf_writer.theirs(f"{p}.weight")
        arrays[f"{there}.lora_a"] = a.T if isinstance(layers[p], LoRAEmbedding) else a
        arrays[f"{there}.lora_b"] = gguf_writer.rows_there(f"{p}.weight", b, config)
    plan, notes = gguf_writer.planned({tensor: x.shape for tensor, x in arrays.items()}, kind)
    if folded:
        notes.append(
            f"{len(folded)} of {len(alphas)} layers have another scale than alpha / r = {alpha:g} / r, which is multiplied into "
            f"their lora_b; the first is {folded[0]}"
        )
    fields = {
        "general.architecture": gguf_writer.architecture(config),
        "general.type": "adapter",
        "general.file_type": gguf_writer.TYPES[kind][1],
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
        peft._METADATA: json.dumps(about) if about else None,
    }
    if about and about["held"]:
        notes.append(
            f"it was trained on its base in {identity.described(about['held'])}; beside another form it is less exact"
        )
    gguf_writer.write(path, fields, plan, arrays.__getitem__, bar)
    return gguf_writer.Written(sum(x.size for x in arrays.values()), tuple(notes))


def _rounded(alpha):
    """A number as the header holds it, in float32."""
    return float(np.float32(alpha))


def _refuse_what_has_no_place(model, adapter):
    """ValueError for whatever an adapter has beside A, B and a scale."""
    if adapter.config.use_dora:
        raise ValueError(f"the adapter has DoRA's magnitudes, {_NO_PLACE}")
    if adapter.config.lora_bias:
        raise ValueError(f"the adapter has biases of lora_B (lora_bias), {_NO_PLACE}")
    if adapter.saved:
        raise ValueError(f"the adapter has a whole {next(iter(adapter.saved))} of its own, {_NO_PLACE}")
    tied = {p.removesuffix(".weight") for p in model.tied_parameters}
    if both := sorted(adapter.weights.keys() & {*tied, "lm_head"} if tied else ()):
        raise ValueError(f"the adapter changes {both[0]} alone where embedding and head are one weight, {_NO_PLACE}")


# ------------------------------------------------------------------------------------------------------------------- reading
class _Opened(gguf.GGUF):
    """The tensors of a LoRA file under the names that they have there."""

    holds = "adapter"

    def _rename(self, name):
        return name

    def _config(self, divisors):
        return {}


def read_adapter(path, model):
    """An Adapter (see adapters.attach) for this model from a LoRA file of llama.cpp's format, dequantized to float32.

    r is the rank that most layers have, and rank_pattern names the others; alpha is the file's.
    """
    file = _Opened(path)
    try:
        return _adapter(file, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _adapter(file, model):
    """The Adapter in an _Opened file."""
    for key, value in {"adapter.type": "lora", "general.architecture": gguf_writer.architecture(model.config)}.items():
        if file.fields.get(key) != value:
            raise ValueError(f"{key} is {shown(file.fields.get(key))}, expected {value!r}")
    if "adapter.alora.invocation_tokens" in file.fields:
        raise ValueError("it waits for its invocation tokens (aLoRA), which is not read")
    here = {gguf_writer.theirs(f"{p}.weight"): p for p in adaptable_layers(model)}
    weights = {}
    for tensor in file:
        there, _, factor = tensor.rpartition(".lora_")
        if factor not in ("a", "b") or there not in here:
            raise ValueError(f"it holds {peft._said(tensor)}, for which the model has no layer to adapt")
        if f"{here[there]}.weight" in model.tied_parameters:
            raise ValueError(
                f"it holds {tensor}, and in the model embedding and head are one weight (tied); untie it first"
            )
        p, x = here[there], file[tensor]
        heads = gguf_writer.turned_heads(f"{p}.weight", model.config) if factor == "b" else None
        if x.ndim != 2 or not x.size or (heads is not None and len(x) % (2 * heads)):
            raise ValueError(f"tensor {tensor} has shape {x.shape}, which fits no layer of the model")
        if not np.isfinite(x).all():
            raise ValueError(f"tensor {tensor} holds NaN or Inf, expected finite numbers")
        x = x.T if there == "token_embd.weight" and factor == "a" else x
        weights.setdefault(p, {})[f"lora_{factor.upper()}"] = x if heads is None else gguf.halves(x, heads)
    for p, factors in weights.items():
        if len(factors) < 2:
            raise ValueError(f"{p} has {next(iter(factors))} but not its partner")
    if not weights:
        raise ValueError("it holds no factors")
    alpha = file.fields.get("adapter.lora.alpha", 0.0)
    if not number().fits(alpha):
        raise ValueError(f"adapter.lora.alpha is {shown(alpha)}, expected {number().expected}")
    return adapters.Adapter(_lora_config(model, alpha, weights), weights)


def _lora_config(model, alpha, weights):
    """The LoRAConfig under which each layer has its rank and the scale alpha / r, or 1 where alpha is 0."""
    ranks = {p: len(factors["lora_A"]) for p, factors in weights.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {p: rank for p, rank in ranks.items() if rank != r}
    names = tuple(sorted({p.rpartition(".")[2] for p in weights}))
    if set(adapters.find_targets(model, names)) != set(weights):
        names = tuple(sorted(weights))
    return adapters.LoRAConfig(
        r=r,
        alpha=gguf._shortest(alpha) if alpha else r,
        target_modules=names,
        rank_pattern=others,
        alpha_pattern={} if alpha else others,
    )


def read_base(path):
    """The peft.Base of a LoRA file: what it says of its base, if it was written here."""
    about = peft._description(_Opened(path).fields, path)
    return peft.Base(Path(path), (about or {}).get("base"), about)


def load_adapter(model, path, name="default", check_base=True, untie=False):
    """Put the adapter of a LoRA file on the model, in place, and let it compute; returns the model.

    check_base   False: put it on another base than it was trained on, too. (A file that was written elsewhere does not say which.)
    untie        True: a model whose head is its embedding gets a head of its own if the adapter changes one of the two
    """
    file = _Opened(path)
    if untie and model.tied_parameters and any(tensor.startswith(("token_embd.", "output.")) for tensor in file):
        adapters.untie(model)
    try:
        adapter = _adapter(file, model)
        adapters.refuse_unfit(model, adapter)
        peft.refuse_too_large(adapter)
    except ValueError as error:
        raise ValueError(f"{path} does not fit this model: {error}") from None
    about = peft._description(file.fields, path)
    if check_base and about is not None:
        peft._check_base(model, about, path)
    return adapters.attach(model, adapter, name)
