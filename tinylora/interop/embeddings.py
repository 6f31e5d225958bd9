"""What a PEFT adapter's file says of embeddings and heads, and what it means on a model.

    <path>.weight                                 a whole embedding or head: trained (modules_to_save), or brought along because
                                                  tokens were added (save_embedding_layers)
    <path>.base_layer.weight                      the base's own, where LoRA adapts it
    <path>.original_module.weight                 the base's own, beside a copy that was trained whole
    <path>.modules_to_save.weight                 that copy once more
    <path>.token_adapter.trainable_tokens_delta   rows that take the place of the base's (trainable_token_indices)
    <path>.token_adapter.base_layer.weight        the base's own, beside such rows

A base's own weight is compared with the model's. If it has more rows, tokens were added before the training: the adapter then brings
the whole weight along, and the model has it while the adapter is active. (With PEFT the base must be resized by hand before.)

Of a tied model, in which the head is the embedding, PEFT writes both or one of them, and they are equal; rows that replace some of the
embedding's are the head's too, unless the head has rows of its own. Where the adapter changes one of the two alone, the model has a head
of its own here that equals its embedding (`twins`).
"""

from dataclasses import replace

import numpy as np

from ..adapters.targets import HEAD, own_weights
from ..backend import move
from ..models.identity import equal_but_for_rounding
from ..tensor import Tensor

EMBEDDING = "model.embed_tokens.weight"
LAYERS = ("embed_tokens", "lm_head")
_FORMS = {  # what follows a path -> what it is
    ".token_adapter.trainable_tokens_delta": "rows",
    ".token_adapter.base_layer.weight": "brought",
    ".original_module.weight": "brought",
    ".modules_to_save.weight": "again",
    ".base_layer.weight": "base",
}


def form_of(key):
    """(path of a module, form) of a tensor's name: "rows", "brought", "again", "base", or "whole" for a plain weight of an embedding
    or a head; (None, None) for anything else."""
    for ending, form in _FORMS.items():
        if key.endswith(ending):
            return key.removesuffix(ending).removesuffix(".base_layer"), form
    path, _, leaf = key.rpartition(".")
    return (path, "whole") if leaf == "weight" and path.rpartition(".")[2] in LAYERS else (None, None)


def resize_to(n):
    """What is to be done where a base has too few rows."""
    return (
        "the adapter was trained after tokens had been added. Add the rows to the base first (in transformers "
        f"model.resize_token_embeddings({n}), then save_pretrained) and give that folder as the model"
    )


def tie(adapter, bases, rows):
    """(Adapter, bases, rows) with one copy of what PEFT wrote twice for a tied model, that of the embedding.

    bases   {path of a module: (the base's own weight, whether the adapter brings it along)}
    rows    {path of a module: the rows that replace some of its}
    """
    embedding, head = EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight")
    indices, bases, rows = dict(adapter.config.trainable_token_indices), dict(bases), dict(rows)
    if embedding in rows and head in rows and indices[embedding] == indices[head]:
        del rows[head], indices[head]
    whole = adapter.saved.get(EMBEDDING) if adapter.config.ensure_weight_tying else None
    if head in bases and whole is not None and np.array_equal(bases[head][0], whole):
        del bases[head]
        bases.pop(embedding, None)
    return replace(adapter, config=replace(adapter.config, trainable_token_indices=indices)), bases, rows


def settle(model, adapter, bases, rows, where):
    """The Adapter with what it brings along for this model; ValueError for another base's weights, and for rows that are missing."""
    bases, saved, brought = {f"{path}.weight": given for path, given in bases.items()}, dict(adapter.saved), {}
    asked = {EMBEDDING, HEAD, *bases, *(f"{path}.weight" for path in rows)}
    own = {path: _array(weight) for path, weight in own_weights(model).items() if path in asked}
    tied = EMBEDDING in getattr(model, "tied_parameters", ())
    twins = not tied and HEAD in own and np.array_equal(own[HEAD], own.get(EMBEDDING))
    if tied and HEAD in bases:
        bases = {EMBEDDING: bases[HEAD], **{path: given for path, given in bases.items() if path != HEAD}}
    for path, twin in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)) if twins else ():
        if path in bases and twin not in bases:
            bases[twin] = bases[path][0], True
    for path, (array, comes_along) in bases.items():
        if path not in own:
            raise ValueError(f"{where}: the file holds {path}, which the model lacks")
        if path not in saved and _differs(array, own[path], path, comes_along, where):
            brought[path] = array
    for path, delta in rows.items():
        name, indices = f"{path}.weight", adapter.config.trainable_token_indices[path]
        if name not in own:
            raise ValueError(f"{where}: trainable_token_indices names {path}, which the model lacks")
        saved[name] = _with_rows(brought.pop(name, own[name]), name, indices, delta, where)
    if twins and HEAD not in saved and EMBEDDING.removesuffix(".weight") in rows:
        brought[HEAD] = saved[EMBEDDING]
    config = replace(adapter.config, saved_embeddings=tuple(sorted(brought)))
    adapter = replace(adapter, config=config, saved=saved | brought)
    _refuse_missing_rows(adapter, own, tied, where)
    return adapter


def _array(weight):
    """A weight as a float32 array on the host."""
    return move(weight.data if isinstance(weight, Tensor) else weight.dequantize("float32"), "cpu")


def _differs(array, mine, path, comes_along, where):
    """Whether the file's base weight is another than the model's and may take its place."""
    if mine.shape == array.shape:
        half = len(array) // 2
        if equal_but_for_rounding(mine, array):
            return False
        if comes_along or (half and equal_but_for_rounding(mine[:half], array[:half])):  # added tokens stand at the end
            return True
        raise ValueError(
            f"{where}: the base weight of {path.removesuffix('.weight')} that came along is not this model's; is it another base?"
        )
    if array.ndim == 2 and array.shape[1:] == mine.shape[1:] and len(array) > len(mine):
        return True
    raise ValueError(f"{where}: it brings {path} of shape {array.shape}, and the model's is {tuple(mine.shape)}")


def _with_rows(whole, name, indices, delta, where):
    """A whole weight with other rows at these indices."""
    if delta.shape != (len(indices), *whole.shape[1:]):
        raise ValueError(
            f"{where}: its rows for {name} have shape {delta.shape}, expected {(len(indices), *whole.shape[1:])}"
        )
    if indices and max(indices) >= len(whole):
        raise ValueError(
            f"{where}: trainable_token_indices names the token {max(indices)}, and the model's {name} has {len(whole)} rows; "
            + resize_to(max(indices) + 1)
        )
    whole = whole.copy()
    whole[list(indices)] = delta
    return whole


def _refuse_missing_rows(adapter, own, tied, where):
    """ValueError if the embedding and the head would not have equally many rows, or fewer than the adapter's factors."""
    rows = {
        path: len(adapter.saved[path] if path in adapter.saved else own[path])
        for path in (EMBEDDING, HEAD)
        if path in own or path in adapter.saved
    }
    for path, factors in adapter.weights.items():
        name = f"{path}.weight"
        needed = {EMBEDDING: factors["lora_A"].shape[-1], HEAD: len(factors["lora_B"])}.get(name, 0)
        if needed > rows.get(name, needed):
            raise ValueError(f"{where}: its factors for {path} are for {needed} tokens, and the model has {rows[name]} rows; "
                             + resize_to(needed))  # fmt: skip
    if not tied and len(set(rows.values())) > 1:
        raise ValueError(
            f"{where}: with it the embedding has {rows[EMBEDDING]} rows and the head {rows[HEAD]}; "
            + resize_to(max(rows.values()))
        )


def _without(indices, module, saved, mine):
    """A whole weight with the base's rows in place of those that an adapter replaces, as far as they are known.

    They stand in the model if it has them. Of a model that was tied, the embedding and the head are one weight to PEFT: a row that
    is replaced in one of them only stands in the other.
    """
    base, own = saved[f"{module}.weight"].copy(), set(indices[module])
    for other in indices.keys() - {module}:
        twin, either = saved[f"{other}.weight"], sorted(own | set(indices[other]))
        if twin.shape == base.shape and np.array_equal(
            np.delete(twin, either, axis=0), np.delete(base, either, axis=0)
        ):
            here = sorted(own - set(indices[other]))
            base[here] = twin[here]
    there = [i for i in sorted(own) if i < len(mine)]
    base[there] = mine[there]
    return base


def tensors_of(model, adapter):
    """{name in PEFT's file: array} of the embeddings and heads that an Adapter brings along, whole or some of their rows."""
    own, config, found = own_weights(model), adapter.config, {}
    saved = {path: move(array, "cpu") for path, array in adapter.saved.items()}
    for path in config.saved_embeddings:
        module = path.removesuffix(".weight")
        if path == HEAD and EMBEDDING in config.token_weights and np.array_equal(saved[HEAD], saved[EMBEDDING]):
            continue  # the embedding's rows are those of a tied head, too
        found[f"{module}.base_layer.weight" if module in adapter.weights else path] = saved[path]
    for module, indices in config.trainable_token_indices.items():
        whole, mine = saved[f"{module}.weight"], _array(own[f"{module}.weight"])
        found[f"{module}.token_adapter.trainable_tokens_delta"] = whole[list(indices)]
        others = np.setdiff1d(np.arange(len(whole)), indices)
        if len(whole) != len(mine) or not np.array_equal(whole[others], mine[others]):
            found[f"{module}.token_adapter.base_layer.weight"] = _without(
                config.trainable_token_indices, module, saved, mine
            )
    if config.ensure_weight_tying and EMBEDDING in saved and EMBEDDING in getattr(model, "tied_parameters", ()):
        found[HEAD] = saved[EMBEDDING]
    return found
