"""Which layers of a model can carry an adapter, which do, and what they are called."""

import contextlib
import re

from ..lora import LoRALayer
from ..nn import is_adapter_weight
from . import patterns
from .config import BASE, LoRAConfig, as_tuple, quoted
from .kinds import ADAPTABLE, LINEAR
from .state import state

HEAD = "lm_head.weight"  # of a model that has a head of its own
_NUMBER = re.compile(r"\.(\d+)\.")


# ------------------------------------------------------------------------------------------------------------ choosing layers
def find_targets(
    model, target_modules="all-linear", exclude_modules=None, layers_to_transform=None, layers_pattern=None
):
    """Paths of the layers that these settings name, as PEFT reads them.

    target_modules        "all-linear"       every linear layer except lm_head
                          another string     a regular expression that must match the whole path
                          a list             names: a whole path, or the end of one ("q_proj" means every …q_proj)
    exclude_modules       a list of names, or a regular expression for the whole path: these are left out
    layers_to_transform   a number, or several: of names that end a path, only those in layers.0, layers.1, … of these numbers
    layers_pattern        what stands before that number, a name or several (any)

    Names and expressions may mean embeddings and convolutions too. A name that is no layer, and a choice that leaves none, raise
    ValueError and list what exists. As in PEFT, a whole path among the target_modules is meant whichever its number.
    """
    chosen = LoRAConfig(
        target_modules=target_modules if isinstance(target_modules, str) else tuple(target_modules),
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
    )
    return select(model, chosen)


def select(model, config):
    """Paths of the layers that a LoRAConfig names (see `find_targets`); modules_to_save takes none away."""
    named_ones = _without_narrowing(model, config.target_modules, config.all_linear)
    exclude = config.exclude_modules
    if exclude is not None:
        names = exclude if isinstance(exclude, tuple) else ()
        tied = ("lm_head",) if getattr(model, "tied_parameters", ()) else ()  # PEFT's model has such a module
        modules = [*tied, *(path for path, _ in model.named_modules())]
        if unknown := [n for n in names if not any(named(m, n) for m in modules)]:
            raise ValueError(
                f"lora: exclude_modules names {unknown[0]!r}, which does not exist; the layers are {_names(model)}"
            )
        if not names and not any(_is("exclude_modules", exclude, m) for m in modules):
            raise ValueError(f"lora: exclude_modules {quoted(exclude)} matches nothing; the layers are {_names(model)}")
    found = [path for path in named_ones if targeted(path, config, whole_paths=named_ones)]
    if not found:
        narrowed = {n: getattr(config, n) for n in ("exclude_modules", "layers_to_transform", "layers_pattern")}
        said = ", ".join(f"{name} = {quoted(value)}" for name, value in narrowed.items() if value is not None)
        raise ValueError(
            f"lora: target_modules = {quoted(config.target_modules)} with {said} leaves no layer; the first of those without it is "
            f"{named_ones[0]}"
        )
    return found


def _without_narrowing(model, target_modules, all_linear):
    """The layers that target_modules alone names; ValueError for what names none."""
    layers = adaptable_layers(model)
    if not layers:
        raise ValueError("lora: the model has no layer to adapt")
    if all_linear:
        if not any(isinstance(base_of(layer), LINEAR) for layer in layers.values()):
            raise ValueError(f"lora: the model has no linear layer; it has {_names(model)}")
        found = list(linears(model))
        if not found:
            raise ValueError("lora: 'all-linear' leaves lm_head out, and the model has no other linear layer; name it")
        return found
    if isinstance(target_modules, str):
        found = [p for p in layers if _is("target_modules", target_modules, p)]
        if not found:
            raise ValueError(
                f"lora: target_modules {quoted(target_modules)} matches no layer; the layers are named {_names(model)} "
                f"(paths such as {next(iter(layers))})"
            )
        return found
    if not target_modules:
        raise ValueError(f"lora: target_modules is empty; the layers are {_names(model)}")
    for name in target_modules:
        if not any(named(p, name) for p in layers):
            raise ValueError(f"lora: target module {name!r} does not exist; the layers are {_names(model)}")
    return [p for p in layers if any(named(p, name) for name in target_modules)]


def _names(model):
    return ", ".join(sorted({path.rpartition(".")[2] for path in adaptable_layers(model)}))


def targeted(path, config, whole_paths=(), modules_to_save=()):
    """Whether PEFT puts a bypass on the module at this path: its check_target_module_exists, line by line.

    whole_paths       the paths that "all-linear" means
    modules_to_save   names of modules that are trained whole: PEFT puts no bypass on these, nor on what is inside of them
    """
    exclude, targets = config.exclude_modules, config.target_modules
    if isinstance(exclude, str) and _is("exclude_modules", exclude, path):
        return False
    if isinstance(exclude, tuple) and any(named(path, name) for name in exclude):
        return False
    if _inside(path, modules_to_save):
        return False
    if config.all_linear:
        return path in whole_paths and in_layers(path, config.layers_to_transform, config.layers_pattern)
    if isinstance(targets, str):
        return _is("target_modules", targets, path)
    if path in targets:
        return True
    ending = any(path.endswith(f".{name}") for name in targets)
    return ending and in_layers(path, config.layers_to_transform, config.layers_pattern)


def in_layers(path, layers, allowed):
    """Whether the first number in the path, after one of the allowed patterns if there are any, is among `layers` (None: any)."""
    if layers is None:
        return True
    work = patterns.Work()
    starts = [rf"(?:^|.*?\.){p}" for p in as_tuple(allowed)] or [r".*?\.[^.]*"]
    with _naming("layers_pattern", allowed):
        ends = (end for start in starts for end in patterns.compiled(start).ends(path, work=work))
        found = next(filter(None, (_NUMBER.match(path, end) for end in ends)), None)
    return found is not None and int(found[1]) in layers


@contextlib.contextmanager
def _naming(name, value):
    """Say which field of a config it is whose expressions take too long."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"lora: {name} {quoted(value)}: {error}") from None


def _is(name, expression, path):
    """Whether the regular expression of a config's field means this path."""
    with _naming(name, expression):
        return patterns.compiled(expression).fullmatch(path)


def _inside(path, modules):
    """Whether the module at this path is one of these, or in one, as PEFT's expression for it says."""
    work = patterns.Work()
    with _naming("modules_to_save", modules):
        return any(patterns.compiled(rf"(^|.*\.){m}($|\..*)").matches(path, work) for m in modules)


def saved_whole(path, modules_to_save):
    """Whether the parameter at this path is in a module that these names mean: the end of a module's path, as PEFT compares it."""
    return any(module.endswith(name) for module in parents(path) for name in modules_to_save)


def needs_own_head(model, config):
    """Whether the model's head is its embedding (tied), and an adapter of this config would change one of them alone.

    `untie` gives such a model a head of its own. PEFT changes one alone as well, unless ensure_weight_tying is set.
    """
    tied, whole = getattr(model, "tied_parameters", ()), config.modules_to_save
    if not tied:
        return False
    saved = [path for path in (HEAD, *tied) if saved_whole(path, whole)]
    return bool(
        (not config.all_linear and targeted(HEAD.removesuffix(".weight"), config, modules_to_save=whole))
        or (saved and not config.ensure_weight_tying)
        or HEAD in config.token_weights
    )


def named(path, name):
    return path == name or path.endswith("." + name)


def base_of(layer):
    """The layer itself, or what is inside its wrapper."""
    return layer.base_layer if isinstance(layer, LoRALayer) else layer


def adaptable_layers(model):
    """{path: layer} of all that can be adapted, adapted or not."""
    found, inside = {}, None
    for path, layer in model.named_modules():  # depth first: what is inside a wrapper follows it
        if path and not (inside and path.startswith(inside)) and isinstance(layer, (*ADAPTABLE, LoRALayer)):
            found[path] = layer
            inside = path + "." if isinstance(layer, LoRALayer) else None
    return found


def linears(model):
    """{path: base layer} of all linear layers except lm_head: those that nn.quantize_linears stores in few bits."""
    bases = {plain(path): base_of(layer) for path, layer in adaptable_layers(model).items()}
    return {p: base for p, base in bases.items() if isinstance(base, LINEAR) and p.rpartition(".")[2] != "lm_head"}


def lora_layers(model, name=None):
    """[(path, LoRALayer)] in the model's order; with a name, those that carry that adapter."""
    found = ((path, layer) for path, layer in model.named_modules() if isinstance(layer, LoRALayer))
    return [(path, layer) for path, layer in found if name is None or name in layer.bypasses]


def plain(path):
    """A parameter's path as if its layer were not wrapped."""
    return path.replace(".base_layer.", ".")


def parents(path):
    parts = path.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def own_weights(model):
    """{path: weight} of what the base itself holds, as if it carried no adapter: neither factors nor copies."""
    own = {plain(path): w for path, w in model.named_weights() if not is_adapter_weight(path)}
    return own | {path: w for (owner, path), w in state(model).copies.items() if owner == BASE}
