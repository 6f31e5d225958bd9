"""Random walks through the adapters of a model, beside plain matrices that do the same in float64.

hypothesis adds, sets, disables, merges, unmerges, combines, detaches, deletes, saves and loads adapters in any order. After each step every
layer computes W + Σ s B A (DoRA: m ⊙ V/‖V‖), the base has the bits that it had, and what was refused has changed nothing.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny

pytest.importorskip("hypothesis")

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tinylora import adapters, backend
from tinylora.adapters.config import matches
from tinylora.adapters.state import state
from tinylora.adapters.targets import adaptable_layers, base_of, lora_layers, named, own_weights
from tinylora.interop.peft import load_adapter, read_adapter, save_adapter
from tinylora.nn import Embedding, quantize_linears
from tinylora.tensor import Tensor

LLAMA = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_bias": True,
}
MODELS = {
    "zoo": tiny.zoo,
    "zoo in 4 bits": lambda: quantize_linears(tiny.zoo(), blocksize=32),
    "llama": lambda: tiny.model(**LLAMA, tie_word_embeddings=False),
    "tied llama": lambda: tiny.model(**LLAMA, tie_word_embeddings=True),
}
LLAMAS = (
    "all-linear",
    ("q_proj", "down_proj"),
    ("v_proj",),
    ("embed_tokens", "o_proj"),
    ("lm_head", "k_proj"),
    r".*up_proj",
)
TARGETS = {
    "zoo": ("all-linear", ("fc1",), ("fc1", "head"), ("embed",), ("embed", "fc2"), r".*fc1", ("fc2",)),
    "llama": LLAMAS,
    "zoo in 4 bits": ("all-linear", ("fc1",), ("embed", "fc2"), ("head",)),
    "tied llama": [targets for targets in LLAMAS if "lm_head" not in targets],
}
WRONG = (("nowhere",), (), "nowhere", ("fc1", "q_proj"))
STYLES = st.sampled_from([
    {}, {}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}, {"lora_bias": True}, {"bias": "all"},
    {"bias": "lora_only"}, {"modules_to_save": ("norm",)}, {"modules_to_save": ("head",)}, {"modules_to_save": ("fc2", "norm")},
    {"rank_pattern": {".*_proj|fc.": 3}}, {"alpha_pattern": {".*_proj|fc.|embed": 7}}, {"dropout": 0.5}, {"init": "gaussian"},
    {"use_dora": True, "bias": "all"}, {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True},
])  # fmt: skip
NAMES = ["a", "b", "c", "default"]
ODD_NAMES = ["", "a.b", "__base__", 3]


# ------------------------------------------------------------------------------------------------------------- the plain model
@dataclass
class Plain:
    """An adapter as arrays: its config, {path: {factor: array}}, and {path: array} of what it trains whole."""

    config: adapters.LoRAConfig
    factors: dict
    copies: dict

    def scaling(self, path):
        options = self.config.options(path)
        return options["alpha"] / (math.sqrt(options["r"]) if self.config.use_rslora else options["r"])

    def delta(self, path, embedding):
        """(s B A, s |B| |A|) in the shape of the weight."""
        a, b = (np.asarray(self.factors[path][n], np.float64) for n in ("lora_A", "lora_B"))
        s = self.scaling(path)
        both = s * (b @ a), abs(s) * (abs(b) @ abs(a))
        return [d.T for d in both] if embedding else both

    def factor(self, path, w, embedding):
        """DoRA's m/‖W + s B A‖, shaped to multiply the weight."""
        v = w + self.delta(path, embedding)[0]
        m = np.asarray(self.factors[path]["lora_magnitude_vector"], np.float64)
        norm = np.sqrt((v * v).sum(axis=0 if embedding else 1))
        return m / norm if embedding else (m / norm)[:, None]

    def change(self, path, w, embedding):
        """(what it adds to the weight W, and the sum of the absolute terms of that)."""
        d, size = self.delta(path, embedding)
        if not self.config.use_dora:
            return d, size
        f = self.factor(path, w, embedding)
        return f * (w + d) - w, abs(f) * (abs(w) + size) + abs(w)

    def bias(self, path):
        """What B's bias adds to the output."""
        bias = self.factors[path].get("lora_B.bias")
        return 0.0 if bias is None else self.scaling(path) * np.asarray(bias, np.float64)


def array_of(weight):
    """A weight's values, a copy: a later change of the model is not to reach the plain one."""
    return np.array(weight.data if isinstance(weight, Tensor) else weight.dequantize("float32"))


def arrays_of(model, name):
    """(factors, copies) of an adapter on a model, as copies."""
    factors = {}
    for path, layer in lora_layers(model, name):
        bypass = layer.bypasses[name]
        found = {"lora_A": bypass.lora_A.weight, "lora_B": bypass.lora_B.weight}
        if bypass.lora_B.bias is not None:
            found["lora_B.bias"] = bypass.lora_B.bias
        if bypass.magnitude is not None:
            found["lora_magnitude_vector"] = bypass.magnitude
        factors[path] = {factor: array_of(t) for factor, t in found.items()}
    return factors, {path: array_of(t) for (owner, path), t in state(model).copies.items() if owner == name}


def same_arrays(left, right):
    """Whether two {key: array or {key: array}} are equal, bit for bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_arrays(left[k], right[k]) for k in left)
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def close(got, wanted, terms):
    """Within 1e-5 of the sum of the absolute terms, element by element."""
    assert got.shape == wanted.shape
    assert (abs(got - wanted) <= 1e-5 * terms + 1e-12).all(), float((abs(got - wanted) / (terms + 1e-12)).max())


# ------------------------------------------------------------------------------------------------------------------ the machine
anything = st.fixed_dictionaries(
    {"r": st.integers(0, 4), "alpha": st.sampled_from([1, 4, math.nan])},
    optional={
        "use_dora": st.booleans(),
        "lora_bias": st.booleans(),
        "init": st.sampled_from(["kaiming", "gaussian", "zeros"]),
        "dropout": st.sampled_from([0.0, 1.5]),
        "bias": st.sampled_from(["none", "all", "lora_only", "some"]),
        "modules_to_save": st.sampled_from([("norm",), ("embed",), ("lm_head",), ("embed_tokens",), ("nothing",)]),
        "rank_pattern": st.sampled_from([{}, {"fc1": 3}, {"fc.": 0}]),
        "alpha_pattern": st.sampled_from([{}, {"fc2": 7}, {"(": 1}]),
    },
)
new_names = st.sampled_from([*NAMES * 4, *ODD_NAMES])
numbers = st.integers(0, 10**4)  # what they choose depends on what is there
choices = st.lists(numbers, max_size=3)


class AdapterMachine(RuleBasedStateMachine):
    """A model beside: `base` {path: array}, `plain` {name: Plain}, `active`, `trains` (names), `kept` (all of these before a merge)."""

    @initialize(kind=st.sampled_from(sorted(MODELS)), first=st.lists(st.tuples(numbers, STYLES), max_size=3))
    def make(self, kind, first):
        self.kind = kind
        self.model, self.fresh = MODELS[kind](), MODELS[kind]
        self.base = {path: array_of(w) for path, w in own_weights(self.model).items()}
        self.embeddings = {p for p, layer in adaptable_layers(self.model).items() if isinstance(layer, Embedding)}
        self.plain, self.active, self.trains, self.kept = {}, (), (), None
        self.shelf, self.saved = [], {}
        self.tmp = Path(tempfile.mkdtemp(prefix="tinylora-machine-"))
        rng = np.random.default_rng(7)
        self.ids = rng.integers(0, 20, (2, 5))
        sizes = {p: base_of(layer).weight.shape[1] for p, layer in adaptable_layers(self.model).items()}
        self.inputs = {p: rng.standard_normal((3, n)).astype(np.float32) for p, n in sizes.items()}
        self.output = self.logits()
        for name, (layers, style) in zip(NAMES, first, strict=False):
            self.add(name, {"r": 2, "alpha": 4, **style}, TARGETS[kind], layers, sure=not style)

    def teardown(self):
        if hasattr(self, "tmp"):
            shutil.rmtree(self.tmp, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------------- what is seen
    def logits(self):
        return np.array(self.model(self.ids).data)

    def name(self, number):
        """The name that a number chooses: mostly one that is there."""
        there = [*self.plain] * 3 if self.plain and number % 8 else [*NAMES, *ODD_NAMES]
        return there[number // 8 % len(there)]

    def noisy(self, active):
        """Whether an output is a matter of chance."""
        return self.model.training and any(self.plain[n].config.dropout for n in active)

    def snapshot(self):
        """All that an operation that is refused must leave alone."""
        m, known = self.model, state(self.model)
        flags = {p: getattr(w, "requires_grad", None) for p, w in m.named_weights()}
        return (
            {p: array_of(w).tobytes() for p, w in m.named_weights()},
            {k: (array_of(t).tobytes(), t.requires_grad) for k, t in known.copies.items()},
            (flags, dict(known.configs), known.active, id(known.kept)),
            [(p, type(module), module.training, getattr(module, "active", None)) for p, module in m.named_modules()],
            getattr(m, "config", None),
            None if self.noisy(known.active) else self.logits().tobytes(),
        )

    @contextlib.contextmanager
    def attempt(self, *expected):
        """An operation that may be refused, in a sentence that changes nothing. Yields a list that then holds the error."""
        before, seen = self.snapshot(), []
        try:
            yield seen
        except (ValueError, *expected) as error:
            assert str(error).strip("'\" ") and "\n" not in str(error)
            assert before == self.snapshot(), f"refused ({error}), and something has changed"
            seen.append(error)

    def adopt(self, name):
        """Take an adapter that has come over into the plain model, with the values that it began with."""
        self.plain[name] = Plain(adapters.configs(self.model)[name], *arrays_of(self.model, name))

    def current(self, active):
        """{path: array} of the parameters that stand in the model while these adapters are active."""
        return self.base | {p: a for n in active for p, a in self.plain[n].copies.items()}

    def conflict(self, several):
        """Whether more than one of these trains the same parameter whole."""
        paths = [p for n in dict.fromkeys(several) for p in self.plain[n].copies]
        return len(set(paths)) < len(paths)

    def layer_says(self, path, active, here):
        """(output, sum of absolute terms) of the layer at a path for its input, in float64."""
        embedding = path in self.embeddings
        w = here[f"{path}.weight"].astype(np.float64)
        bias = here.get(f"{path}.bias", np.zeros(1)).astype(np.float64)
        changes = [self.plain[n].change(path, w, embedding) for n in active if path in self.plain[n].factors]
        total, size = w + sum(c for c, _ in changes), abs(w) + sum(s for _, s in changes)
        if embedding:
            return total, size
        more = [self.plain[n].bias(path) for n in active if path in self.plain[n].factors]
        x = self.inputs[path].astype(np.float64)
        return x @ total.T + bias + sum(more), abs(x) @ size.T + abs(bias) + sum(abs(b) for b in more)

    # -------------------------------------------------------------------------------------------------------------------- adding
    @rule(name=new_names, r=st.integers(1, 4), alpha=st.sampled_from([1, 4, 2.5, -3]), layers=numbers, style=STYLES)
    def adds(self, name, r, alpha, layers, style):
        self.add(name, {"r": r, "alpha": alpha, **style}, TARGETS[self.kind], layers, sure=not style)

    @rule(name=new_names, layers=numbers, given=anything)
    def adds_anything(self, name, layers, given):
        self.add(name, given, (*TARGETS[self.kind], *WRONG), layers, sure=False)

    def add(self, name, given, targets, number, sure):
        """Put an adapter on; where `sure`, nothing but its name may be wrong with it."""
        wanted = targets[number % len(targets)]
        with self.attempt() as refused:
            adapters.add_lora(self.model, name=name, target_modules=wanted, **given)
        if refused:
            assert name not in NAMES or name in self.plain or not sure, refused
            return
        assert name in NAMES and name not in self.plain
        here = list(adaptable_layers(self.model))
        self.adopt(name)
        it, first = self.plain[name], len(self.plain) == 1
        if isinstance(wanted, tuple):
            assert list(it.factors) == [p for p in here if any(named(p, n) for n in wanted)]
        for path, factors in it.factors.items():
            rank = next((r for key, r in given.get("rank_pattern", {}).items() if matches(key, path)), given["r"])
            assert factors["lora_A"].shape[0] == rank == factors["lora_B"].shape[1]
            assert not (factors["lora_A"] if path in self.embeddings else factors["lora_B"]).any()
        assert all(same_arrays(a, self.base[p]) for p, a in it.copies.items())
        if first:
            self.active = self.trains = (name,)

    @precondition(lambda self: self.plain)
    @rule(name=new_names, parts=st.lists(numbers, min_size=1, max_size=3),
          weights=st.tuples(*[st.sampled_from([1, -0.5, 2.0, 0.0])] * 3), wrong=st.integers(0, 19),
          kind=st.sampled_from(adapters.COMBINATIONS), rank=st.sampled_from([None, None, 1, 12]))  # fmt: skip
    def combines(self, name, parts, weights, wrong, kind, rank):
        parts, weights = [self.name(n) for n in parts], list(weights[: len(parts)])
        kind, rank = "sum" if wrong == 1 else kind, 0 if wrong == 2 else rank
        weights = [math.nan, *weights[1:]] if wrong == 3 else weights[1:] if wrong == 4 else weights
        with self.attempt() as refused:
            adapters.add_weighted_adapter(self.model, parts, weights, name, kind, rank)
        if refused:
            return
        assert (
            name in NAMES and name not in self.plain and set(parts) <= self.plain.keys() and math.isfinite(sum(weights))
        )
        self.adopt(name)
        made = self.plain[name]
        assert not made.copies and made.factors.keys() == {p for n in parts for p in self.plain[n].factors}
        if len(parts) > 1 and kind == "linear":
            return  # its cross terms have a test of their own
        for path, factors in made.factors.items():
            embedding, members = path in self.embeddings, [n for n in parts if path in self.plain[n].factors]
            if (
                kind == "svd"
                and len(parts) > 1
                and sum(self.plain[n].config.options(path)["r"] for n in members) > len(factors["lora_A"])
            ):
                continue  # the best of a smaller rank is not the sum
            deltas = [
                (w, self.plain[n].delta(path, embedding)) for n, w in zip(parts, weights, strict=True) if n in members
            ]
            wanted, size = (sum(f * d[i] for f, d in ((abs(w) if i else w, d) for w, d in deltas)) for i in (0, 1))
            got, sizes = made.delta(path, embedding)
            close(got, wanted, np.maximum(size, sizes).max() if kind == "svd" else size)

    # ----------------------------------------------------------------------------------------------------------------- switching
    @precondition(lambda self: self.plain)
    @rule(chosen=st.one_of(numbers, choices), inference=st.booleans())
    def sets(self, chosen, inference):
        chosen = self.name(chosen) if isinstance(chosen, int) else [self.name(n) for n in chosen]
        wanted = tuple(dict.fromkeys([chosen] if not isinstance(chosen, list) else chosen))
        with self.attempt() as refused:
            adapters.set_adapter(self.model, chosen, inference)
        unknown = any(n not in self.plain for n in wanted)
        assert bool(refused) == (unknown or self.conflict(wanted))
        if not refused:
            self.active, self.trains = wanted, () if inference else wanted

    @rule(inside=st.sampled_from(["nothing", "an error", "set", "delete", "nested"]), name=st.sampled_from(NAMES))
    def disables(self, inside, name):
        before = self.active
        with contextlib.suppress(ZeroDivisionError), adapters.disable_adapter(self.model):
            assert adapters.active_adapters(self.model) == ()
            assert self.logits().tobytes() == self.output.tobytes()
            if inside == "an error":
                raise ZeroDivisionError
            if inside == "nested":
                with adapters.disable_adapter(self.model):
                    pass
                assert self.logits().tobytes() == self.output.tobytes()
            if inside == "set" and name in self.plain:
                adapters.set_adapter(self.model, name)
                self.trains = (name,)
            if inside == "delete" and name in self.plain:
                adapters.delete_adapter(self.model, name)
                self.active = ()  # and so none takes its place
                self.forget(name)
        self.active = tuple(n for n in before if n in self.plain)

    @precondition(lambda self: self.plain)
    @rule(rows=st.lists(numbers, min_size=3, max_size=3))
    def gives_each_row_its_own(self, rows):
        rows = ["__base__" if n % 5 == 0 else self.name(n) for n in rows]
        with self.attempt() as refused, adapters.adapter_rows(self.model, rows):
            if not self.noisy(n for n in rows if n in self.plain):
                for path, layer in adaptable_layers(self.model).items():
                    if path not in self.embeddings:
                        got = layer(Tensor(self.inputs[path])).data
                        for i, n in enumerate(rows):
                            y, terms = self.layer_says(path, () if n == "__base__" else (n,), self.base)
                            close(got[i], y[i], terms[i])
        there = [n for n in rows if n != "__base__"]
        assert bool(refused) == any(n not in self.plain or self.plain[n].copies for n in there)

    def forget(self, name):
        """An adapter is off the model; where it was active alone, the first of the others takes its place."""
        alone, self.active = self.active == (name,), tuple(n for n in self.active if n != name)
        self.trains = tuple(n for n in self.trains if n != name)
        del self.plain[name]
        if alone and self.plain:
            self.active = self.trains = (min(self.plain),)

    @precondition(lambda self: self.plain)
    @rule(name=numbers)
    def deletes(self, name):
        name = self.name(name)
        with self.attempt() as refused:
            adapters.delete_adapter(self.model, name)
        assert bool(refused) == (name not in self.plain)
        if not refused:
            self.forget(name)

    @precondition(lambda self: self.plain)
    @rule(name=st.one_of(st.none(), numbers))
    def detaches(self, name):
        name = None if name is None else self.name(name)
        with self.attempt() as refused:
            taken = adapters.detach(self.model, name)
        one = name in self.plain if name is not None else len(self.plain) == 1
        assert bool(refused) != one
        if not refused:
            name = next(iter(self.plain)) if name is None else name
            assert same_arrays(taken.weights, self.plain[name].factors) and same_arrays(
                taken.saved, self.plain[name].copies
            )
            self.shelf.append((taken, self.plain[name]))
            self.forget(name)

    @precondition(lambda self: self.shelf)
    @rule(which=numbers, name=new_names)
    def attaches(self, which, name):
        taken, plain = self.shelf[which % len(self.shelf)]
        with self.attempt() as refused:
            adapters.attach(self.model, taken, name)
        assert bool(refused) == (name not in NAMES or name in self.plain)
        self.arrived(refused, name, plain)

    @precondition(lambda self: self.shelf)
    @rule(
        which=numbers,
        name=st.sampled_from(NAMES),
        damage=st.sampled_from(["path", "shape", "missing", "saved", "none"]),
    )
    def attaches_what_does_not_fit(self, which, name, damage):
        taken, _ = self.shelf[which % len(self.shelf)]
        weights, saved = {p: dict(f) for p, f in taken.weights.items()}, dict(taken.saved)
        path = next(reversed(weights))
        if damage == "path":
            weights["nowhere"] = weights.pop(path)
        elif damage == "shape":
            weights[path]["lora_A"] = weights[path]["lora_A"][:, 1:]
        elif damage == "missing":
            del weights[path]["lora_B"]
        elif damage == "saved":
            saved["norm.bias"] = np.zeros(8, np.float32)
        else:
            weights = {}
        with self.attempt() as refused:
            adapters.attach(self.model, adapters.Adapter(taken.config, weights, saved), name)
        assert refused

    def arrived(self, refused, name, plain):
        """An adapter has been put on the model, and computes; or not."""
        if not refused:
            self.plain[name] = Plain(plain.config, *map(dict, (plain.factors, plain.copies)))
            self.active = self.trains = (name,)
            assert same_arrays(plain.factors, arrays_of(self.model, name)[0])
            assert same_arrays(plain.copies, arrays_of(self.model, name)[1])

    # ------------------------------------------------------------------------------------------------------------------- merging
    @precondition(lambda self: self.plain)
    @rule(chosen=st.one_of(st.none(), numbers, choices), keep=st.sampled_from([True, True, False]))
    def merges(self, chosen, keep):
        if chosen is not None:
            chosen = self.name(chosen) if isinstance(chosen, int) else [self.name(n) for n in chosen]
        wanted = (
            self.active if chosen is None else tuple(dict.fromkeys(chosen if isinstance(chosen, list) else [chosen]))
        )
        with self.attempt() as refused:
            adapters.merge(self.model, chosen, keep)
        if refused:
            tied = "read" in str(refused[0]) and self.kind == "tied llama"
            unknown = any(n not in self.plain for n in wanted)
            assert not self.plain or (keep and self.kept) or unknown or self.conflict(wanted) or tied
            return
        assert self.plain and not (keep and self.kept) and not self.conflict(wanted)
        here, now = self.current(wanted), {p: array_of(w) for p, w in own_weights(self.model).items()}
        touched = {p for n in wanted for p in self.plain[n].factors}
        for path in touched if self.kind != "zoo in 4 bits" else ():
            self.equals_layer(path, wanted, here)
        assert now.keys() >= here.keys()
        for path, array in now.items():
            if path.rpartition(".")[0] not in touched:
                assert same_arrays(array, here[path]), path
        before = (self.base, self.plain, self.active, self.trains, self.output)
        self.kept = before if keep else None
        self.base, self.plain, self.active, self.trains = now, {}, (), ()
        self.output = self.logits()

    @precondition(lambda self: self.kept)
    @rule()
    def unmerges(self):
        with self.attempt() as refused:
            adapters.unmerge(self.model)
        assert bool(refused) == (self.kept is None or bool(self.plain))
        if not refused:
            self.base, self.plain, self.active, self.trains, self.output = self.kept
            self.kept = None

    # -------------------------------------------------------------------------------------------------------- training, and files
    @precondition(lambda self: self.plain)
    @rule(seed=numbers)
    def trains_a_little(self, seed):
        tiny.randomize_trainable(self.model, np.random.default_rng(seed))
        for name in self.plain:
            self.adopt(name)

    @rule()
    def asks_for_what_is_not_there(self):
        m = self.model
        for ask in (
            lambda: adapters.set_adapter(m, ["unknown"]),
            lambda: adapters.set_adapter(m, None),
            lambda: adapters.delete_adapter(m, []),
            lambda: adapters.detach(m, "unknown"),
            lambda: adapters.merge(m, 3),
            lambda: adapters.merge(m, ["unknown"]),
            lambda: adapters.adapter_rows(m, ["unknown"]).__enter__(),
            lambda: adapters.add_weighted_adapter(m, ["unknown"], [1], "d"),
            lambda: save_adapter(m, self.tmp / "nowhere", name="unknown"),
            *([] if self.kept else [lambda: adapters.unmerge(m)]),
            *([] if self.plain else [lambda: adapters.merge(m), lambda: adapters.detach(m)]),
        ):
            with self.attempt() as refused:
                ask()
            assert refused
        assert not (self.tmp / "nowhere").exists()

    @rule(training=st.booleans())
    def changes_mode(self, training):
        self.model.train(training)

    @precondition(lambda self: self.plain)
    @rule(name=st.one_of(st.none(), numbers), where=st.sampled_from(["x", "y"]), fails=st.one_of(st.none(), st.integers(0, 30)),
          error=st.sampled_from([OSError, MemoryError, KeyboardInterrupt]))  # fmt: skip
    def saves(self, name, where, fails, error):
        """Whole or not at all, also where a call of the file system fails."""
        name = None if name is None else self.name(name)
        one = name in self.plain if name is not None else len(self.active) == 1
        with self.attempt(OSError, MemoryError, KeyboardInterrupt) as refused, failing_files(fails, error):
            save_adapter(self.model, self.tmp / where, name=name)
        assert one or refused
        new = self.plain[self.active[0] if name is None else name] if one else None
        if not refused:
            self.saved[where] = new
        elif not (self.tmp / where / "adapter_config.json").exists() and where not in self.saved:
            return
        there = self.held_in(where)
        if there is None:  # the adapter means something on this model only
            return
        if not same_adapter(there, self.saved.get(where)):
            assert new is not None and same_adapter(there, new), "neither the old adapter nor the new one"
            self.saved[where] = new

    def held_in(self, where):
        try:
            return read_adapter(self.tmp / where)
        except ValueError as error:
            assert "brings" in str(error) and "along" in str(error), error

    @precondition(lambda self: self.saved)
    @rule(which=numbers, name=new_names, check=st.booleans())
    def loads(self, which, name, check):
        where = sorted(self.saved)[which % len(self.saved)]
        plain = self.saved[where]
        with self.attempt() as refused:
            load_adapter(self.model, self.tmp / where, name, check_base=check)
        if refused and name in NAMES and name not in self.plain:
            assert (check and "base" in str(refused[0])) or self.kind == "tied llama", refused
        if not refused:
            config = adapters.configs(self.model)[name]
            assert dataclasses.replace(config, **words(plain.config)) == plain.config
            self.arrived(refused, name, dataclasses.replace(plain, config=config))

    @precondition(lambda self: self.saved)
    @rule(
        which=numbers,
        name=st.sampled_from(NAMES),
        damage=st.sampled_from(["cut", "empty", "gone", "r", "words", "other"]),
    )
    def loads_what_is_damaged(self, which, name, damage):
        where, there = sorted(self.saved)[which % len(self.saved)], self.tmp / "damaged"
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(self.tmp / where, there)
        config, weights = there / "adapter_config.json", there / "adapter_model.safetensors"
        if damage == "cut":
            weights.write_bytes(weights.read_bytes()[:-4])
        elif damage == "empty":
            weights.write_bytes(b"")
        elif damage == "gone":
            config.unlink()
        elif damage == "r":
            config.write_text(config.read_text().replace('"r": ', '"r": 1'))
        elif damage == "words":
            config.write_text("{}")
        else:
            text = config.read_text()
            config.write_text(
                text.replace('"use_dora": false', '"use_dora": 0').replace('"use_dora": true', '"use_dora": false')
            )
            if config.read_text() == text or '"use_dora": 0' in config.read_text():
                config.write_text(text[: len(text) // 2])
        with self.attempt(OSError) as refused:
            load_adapter(self.model, there, name, check_base=False)
        if damage == "r" and not refused:  # every layer has a rank of its own
            assert self.saved[where].config.rank_pattern
            self.arrived(
                refused, name, dataclasses.replace(self.saved[where], config=adapters.configs(self.model)[name])
            )
        else:
            assert refused

    @precondition(lambda self: self.saved)
    @rule(which=numbers)
    def loads_into_a_fresh_model(self, which):
        where = sorted(self.saved)[which % len(self.saved)]
        model = self.fresh()
        try:
            load_adapter(model, self.tmp / where, "anew", check_base=False)
        except ValueError as error:
            assert self.kind == "tied llama", error
            return
        factors, copies = arrays_of(model, "anew")
        assert same_arrays(factors, self.saved[where].factors) and same_arrays(copies, self.saved[where].copies)

    # ---------------------------------------------------------------------------------------------------------------- invariants
    @invariant()
    def says_what_it_carries(self):
        if not hasattr(self, "model"):
            return
        m = self.model
        assert list(adapters.configs(m)) == list(self.plain) and adapters.active_adapters(m) == self.active
        assert {n: p.config for n, p in self.plain.items()} == adapters.configs(m)
        for name, plain in self.plain.items():
            factors, copies = arrays_of(m, name)
            assert same_arrays(factors, plain.factors) and same_arrays(copies, plain.copies)
            for _, layer in lora_layers(m, name):
                assert all(p.requires_grad == (name in self.trains) for p in layer.bypasses[name].parameters())
            tensors = [(path, t) for (owner, path), t in state(m).copies.items() if owner == name]
            assert all(t.requires_grad == (name in self.trains) for _, t in tensors)
        assert {type(module).training for _, module in m.named_modules()} and len(
            {module.training for _, module in m.named_modules()}
        ) == 1, "all in one mode"

    @invariant()
    def keeps_the_base(self):
        if hasattr(self, "model"):
            assert same_arrays({p: array_of(w) for p, w in own_weights(self.model).items()}, self.base)
            if not self.active:
                assert self.logits().tobytes() == self.output.tobytes()

    @invariant()
    def computes_what_it_should(self):
        if not hasattr(self, "model") or self.noisy(self.active):
            return
        here = self.current(self.active)
        for path in adaptable_layers(self.model):
            self.equals_layer(path, self.active, here)

    def equals_layer(self, path, active, here):
        layer, embedding = self.model.get(path), path in self.embeddings
        x = np.arange(len(here[f"{path}.weight"])) if embedding else Tensor(self.inputs[path])
        close(backend.move(layer(x).data, "cpu"), *self.layer_says(path, active, here))


def words(config):
    """The fields of a LoRAConfig that a file may say in other words."""
    return {
        n: getattr(config, n)
        for n in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init")
    }


def same_adapter(adapter, plain):
    """Whether an Adapter holds the arrays of a Plain."""
    return (
        plain is not None and same_arrays(adapter.weights, plain.factors) and same_arrays(adapter.saved, plain.copies)
    )


@contextlib.contextmanager
def failing_files(n, error):
    """Let the n-th of the calls that change a folder fail; None: none of them."""
    left = [n]

    def shim(function):
        def call(*arguments, **more):
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    left[0] = None
                    raise error("injected")
            return function(*arguments, **more)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("replace", "rename", "fsync", "chmod", "mkdir", "unlink"):
            stack.enter_context(mock.patch.object(os, name, shim(getattr(os, name))))
        for name in ("mkdir", "touch", "write_text", "iterdir"):
            stack.enter_context(mock.patch.object(Path, name, shim(getattr(Path, name))))
        yield


def test_a_model_computes_with_its_adapters_what_plain_matrices_do(run_machine):
    run_machine(AdapterMachine, examples=70, steps=30)
