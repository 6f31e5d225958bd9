"""A run's checkpoint: checkpoint.safetensors, from which the same run goes on to the same bytes.

    param.NAME        the trained parameters
    optimizer.NAME    the optimizer's state_dict
    metadata          {"tinylora": {"identity": what tells this run from others, "history": [{"step", "loss"}], "tape_bytes"}}

It is written whole or not at all, and never with a number in it that is not finite: the last good one stays.
"""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .. import backend
from ..backend import move
from ..models import fields, safetensors

NAME = "checkpoint.safetensors"
#: A row of a run's history: the loss in nats a token, and held-out bits per byte where they were measured.
ROW = fields.fields({"step": fields.whole(1), "loss": fields.number(), "heldout": fields.number()})
_ABOUT = {"identity": fields.fields({}), "history": fields.several(ROW), "tape_bytes": fields.whole()}


def save(path, identity, trainable, optimizer, result):
    """Write the (name, parameter) pairs, the optimizer's state and a Result; FloatingPointError if a number of them is not finite."""
    state = optimizer.state_dict()
    check_finite([*((name, p.data) for name, p in trainable), *state.items()], identity["recipe"], result, path)
    tensors = {f"param.{name}": move(p.data, "cpu") for name, p in trainable}
    tensors |= {f"optimizer.{name}": a for name, a in state.items()}
    about = {"identity": identity, "history": result.history, "tape_bytes": result.tape_bytes}
    safetensors.save_safetensors(path, tensors, {"tinylora": json.dumps(about)})


def check_finite(arrays, recipe, result, path=None):
    """FloatingPointError if the last step has made one of these (name, array) NaN or infinite."""
    for name, array in arrays:
        if array.dtype.kind == "f" and not backend.array_module(array).isfinite(array).all():
            raise FloatingPointError(
                f"step {result.history[-1]['step']}: {name} is no longer finite after the update; lower the learning rate "
                f"(lr = {recipe['lr']}){kept(path)}"
            )


def kept(path):
    """What an error adds about the last checkpoint, if there is one."""
    return f"; the last checkpoint is {path}" if path and path.exists() else ""


def check_run(out, data, recipe, about=None, defaults=None):
    """(identity, path, whether a checkpoint lies there) of a run in `out`; ValueError if the checkpoint is of another run.

    A run may have more steps, or epochs, than the one that left the checkpoint: it goes on from there.
    """
    recipe = recipe.planned(data)
    identity = _as_json({"recipe": asdict(recipe), "data": data.fingerprint(), **(about or {})})
    path = Path(out) / NAME if out else None
    if path is None or not path.exists():
        return identity, path, False
    theirs = _about(path, safetensors.Safetensors(path).metadata)["identity"]
    # Options that are newer than the checkpoint had their defaults; those that no longer matter are not compared.
    for key, values in _as_json({"recipe": {"epochs": None}, **(defaults or {})}).items():
        if isinstance(theirs.get(key), dict):
            theirs[key] = {name: v for name, v in {**values, **theirs[key]}.items() if name in identity[key]}
    if _shorter(theirs.get("recipe"), recipe):
        theirs["recipe"] |= {"steps": recipe.steps, "epochs": recipe.epochs}
    for key in sorted(identity.keys() | theirs.keys()):
        a, b = theirs.get(key), identity.get(key)
        if a != b:
            if isinstance(a, dict) and isinstance(b, dict):
                part = next(k for k in sorted(a.keys() | b.keys()) if a.get(k, "not set") != b.get(k, "not set"))
                key, a, b = f"{key}.{part}", a.get(part), b.get(part)
            raise ValueError(
                f"{path} is the checkpoint of another run: its {key} is {fields.shown(a)}, this run's is {fields.shown(b)}; "
                "choose another output folder or remove the file"
            )
    return identity, path, True


def _about(path, metadata):
    """What a checkpoint's metadata say of its run; ValueError names the field that is damaged."""
    try:
        about = json.loads(metadata.get("tinylora", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: its metadata tinylora is no JSON ({error}); expected a checkpoint of finetune"
        ) from None
    return fields.check(about, _ABOUT, f"{path}: metadata tinylora", required=tuple(_ABOUT))


def _shorter(saved, recipe):
    """Whether a checkpoint's recipe was planned for at most as many steps as this one, and in the same way."""
    planned = saved.get("steps") if isinstance(saved, dict) else None
    return type(planned) is int and planned <= recipe.steps and (saved["epochs"] is None) == (recipe.epochs is None)


def _as_json(x):
    """x as it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(x))


def resume(path, recipe, trainable, optimizer, result):
    """Load a checkpoint of the same run, or of one of fewer steps; returns the step to go on from. Nothing is loaded of a damaged one."""
    tensors, metadata = safetensors.load_safetensors(path)
    about = _about(path, metadata)
    before = about["identity"]["recipe"]["steps"]
    if before != recipe.steps and recipe.schedule != "constant":
        warnings.warn(
            f"{path} was planned for {before} steps and goes on to {recipe.steps}: the {recipe.schedule} schedule is laid over all of "
            "them anew, so it does not end as a run does that was planned for them from the start",
            stacklevel=2,
        )
    for name, p in trainable:
        saved = tensors.get(f"param.{name}")
        if saved is None or saved.shape != p.shape or saved.dtype != np.float32:
            raise ValueError(f"{path} has no parameter {name} of shape {p.shape} in float32")
    if "optimizer.step" not in tensors:
        raise ValueError(f"{path} has no optimizer.step")
    for name, saved in tensors.items():
        _check_tensor(path, name, saved, recipe.steps)
    states = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
    try:
        optimizer.load_state_dict(states)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not len(about["history"]) == optimizer.step_count:
        raise ValueError(
            f"{path}: its history has {len(about['history'])} steps, and its optimizer.step is {optimizer.step_count}"
        )
    for name, p in trainable:  # only now that everything was found fit
        p.data = move(tensors[f"param.{name}"].copy(), backend.array_module(p.data))
    result.history, result.tape_bytes = about["history"], about["tape_bytes"]
    return optimizer.step_count


def _check_tensor(path, name, array, steps):
    """ValueError for numbers that no run leaves: NaN and infinity, a negative mean square, counts beyond the run's steps."""
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: {name} is bfloat16, expected a checkpoint of finetune")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{path}: {name} holds NaN or Inf; remove the file to begin anew")
    if name == "optimizer.step" or (name.startswith("optimizer.") and name.endswith(".t")):
        if array.shape != () or array.dtype.kind not in "iu" or not 0 <= int(array) <= steps:
            raise ValueError(
                f"{path}: {name} is {fields.shown(array.tolist())}, expected a count of 0 to {steps} steps"
            )
    elif name.endswith((".v", ".absmax_m", ".absmax_v")) and array.dtype.kind == "f" and (array < 0).any():
        raise ValueError(f"{path}: {name} holds negative numbers, expected a mean of squares")
