"""Adapters on a whole model: targets, counts, several at once, switching, combining, merging, and PEFT's files."""

import json
import re
from dataclasses import replace

import fake_cupy
import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import Tensor, adapters, backend, nn, ops
from tinylora.interop import peft
from tinylora.models import safetensors
from tinylora.nn import Linear4bit


# ---------------------------------------------------------------------------------------------------------- targets and counts
@pytest.mark.parametrize(
    "targets, count",
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["self_attn.q_proj"], 2),
        (["model.layers.1.mlp.up_proj"], 1),
        (r".*layers\.0\.mlp\..*", 3),
    ],
)
def test_targets(targets, count):
    assert len(adapters.lora_layers(tl.add_lora(tiny.model(), r=2, target_modules=targets))) == count


def test_all_linear_leaves_the_head_out():
    m = tl.add_lora(tiny.model(tie_word_embeddings=False), r=2)
    assert "lm_head" not in [path for path, _ in adapters.lora_layers(m)]
    assert (
        len(adapters.lora_layers(tl.add_lora(tiny.model(tie_word_embeddings=False), r=2, target_modules=["lm_head"])))
        == 1
    )


@pytest.mark.parametrize(
    "options, left",
    [
        ({"exclude_modules": ["q_proj", "layers.2.mlp.up_proj"]}, lambda p: p[-6:] != "q_proj" and "2.mlp.up" not in p),
        ({"exclude_modules": r".*\.mlp\..*"}, lambda p: "self_attn" in p),
        ({"layers_to_transform": 1}, lambda p: ".1." in p),
        (
            {"layers_to_transform": [0, 2], "exclude_modules": ["mlp.down_proj"]},
            lambda p: ".1." not in p and "down" not in p,
        ),
        ({"layers_to_transform": [2], "layers_pattern": "layers"}, lambda p: ".2." in p),
        ({"layers_to_transform": [2], "layers_pattern": ["blocks", "layers"]}, lambda p: ".2." in p),
        (
            {"target_modules": ["up_proj", "model.layers.0.self_attn.q_proj"], "layers_to_transform": [2]},
            lambda p: (
                p.endswith("2.mlp.up_proj") or p.endswith("0.self_attn.q_proj")
            ),  # a whole path is meant wherever it lies
        ),
    ],
)
def test_targets_can_be_narrowed(options, left):
    m = tiny.model(num_hidden_layers=3)
    every = adapters.find_targets(m)
    found = adapters.find_targets(m, **options)
    assert found == [p for p in every if left(p)] and 0 < len(found) < len(every) == 21
    assert [path for path, _ in adapters.lora_layers(tl.add_lora(m, r=2, **options))] == found


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"exclude_modules": ["qproj"]},
            "exclude_modules names 'qproj', which does not exist; the layers are down_proj",
        ),
        ({"exclude_modules": "qproj"}, "exclude_modules 'qproj' matches nothing"),
        ({"exclude_modules": "(q"}, r"exclude_modules '\(q' is no regular expression"),
        ({"exclude_modules": r".*"}, r"target_modules = 'all-linear' with exclude_modules = '\.\*' leaves no layer"),
        (
            {"layers_to_transform": 2},
            r"with layers_to_transform = \(2,\) leaves no layer; the first of those without it is model",
        ),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "layers_pattern = 'blocks' leaves no layer"),
        ({"layers_to_transform": True}, "layers_to_transform = True, expected the number of a layer"),
        ({"layers_to_transform": [-1]}, r"layers_to_transform = \[-1\]"),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, "layers_to_transform is for a list of names"),
        ({"layers_pattern": "layers"}, "layers_pattern is for layers_to_transform"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "cannot be trained here"),
    ],
)
def test_a_selection_that_makes_no_sense_gets_a_sentence(options, words):
    m = tiny.model()
    with pytest.raises(ValueError, match=words):
        tl.add_lora(m, r=2, **options)
    assert not adapters.lora_layers(m) and all(p.requires_grad for p in m.parameters())


def test_a_head_that_only_peft_has_may_be_excluded():
    """A tied model has no layer of that name here; in transformers it has."""
    assert len(adapters.find_targets(tiny.model(), exclude_modules=["lm_head"])) == 14


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"target_modules": ["q_proj", "query"]},
            "'query' does not exist; the layers are down_proj, embed_tokens, gate_proj, k_proj, o_proj",
        ),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": "(q"}, "is no regular expression"),
        ({"target_modules": "query.*"}, "matches no layer; the layers are named down_proj"),
        ({"r": 0}, "r = 0, expected a whole number, 1 or more"),
        ({"r": 2.5}, "r = 2.5"),
        ({"dropout": 1.0}, "dropout = 1.0"),
    ],
)
def test_bad_choices_get_a_sentence_and_change_nothing(options, words):
    m = tiny.model()
    with pytest.raises(ValueError, match=words):
        tl.add_lora(m, **options)
    assert not adapters.lora_layers(m) and all(p.requires_grad for p in m.parameters()) and len(m.parameters()) == 20


def test_a_second_adapter_of_the_same_name_is_refused():
    m = tl.add_lora(tiny.model(), r=2)
    with pytest.raises(ValueError, match="carries an adapter already"):
        tl.add_lora(m, r=2)
    adapters.detach(m)
    with pytest.raises(ValueError, match="carries no adapter"):
        adapters.detach(m)


def test_counts_are_of_weights_and_not_of_bytes():
    plain, m = tiny.model(), tiny.model()
    total = sum(p.size for p in plain.parameters())
    tl.add_lora(tl.quantize_linears(m), r=2)
    added = sum(2 * (layer.in_features + layer.out_features) for _, layer in adapters.lora_layers(m))
    assert adapters.count_parameters(m) == (added, total + added)
    assert tl.trainable_parameters(m) == (
        f"trainable params: {added:,d} || all params: {total + added:,d} || "
        f"trainable%: {100 * added / (total + added):.4f}"
    )


def test_quantizing_leaves_embeddings_norms_and_head_alone():
    m = tl.quantize_linears(tiny.model(tie_word_embeddings=False))
    kinds = {path: type(layer).__name__ for path, layer in m.named_modules()}
    assert kinds["lm_head"] == "Linear" and kinds["model.embed_tokens"] == "Embedding"
    assert sum(kind == "Linear4bit" for kind in kinds.values()) == 14
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight holds 1 NaN"):
        bad = tiny.model()
        bad.model.layers[0].self_attn.q_proj.weight.data[3, 4] = np.nan
        tl.quantize_linears(bad)


def test_quantizing_is_all_or_nothing_and_comes_before_the_adapter():
    m = tiny.model()
    m.model.layers[1].mlp.down_proj.weight.data[0, 0] = np.inf
    with pytest.raises(ValueError, match="down_proj"):
        tl.quantize_linears(m)
    assert not any(isinstance(layer, Linear4bit) for _, layer in m.named_modules()) and len(m.trainable()) == 20
    with pytest.raises(ValueError, match="quantize first, then add_lora"):
        tl.quantize_linears(tl.add_lora(tiny.model(), r=2))


def test_a_quantized_models_state_can_be_loaded_into_another(rng):
    x, (a, b) = tiny.ids(rng, 1, 9), (tl.add_lora(tl.quantize_linears(tiny.model(seed)), r=2) for seed in (0, 1))
    assert tiny.logits(a, x).tobytes() != tiny.logits(b, x).tobytes()
    b.load_state_dict(a.state_dict())
    assert tiny.logits(a, x).tobytes() == tiny.logits(b, x).tobytes()
    with pytest.raises(ValueError, match="dense on one side and quantized on the other"):
        tiny.model().load_state_dict(tl.quantize_linears(tiny.model()).state_dict())


def test_only_the_adapter_is_on_the_tape_beside_activations(rng):
    """LoRA's saving, seen in the engine: full fine-tuning keeps the input of every layer for ∂L/∂W, LoRA not that of frozen layers."""
    x, t = tiny.ids(rng, 4, 32), tiny.ids(rng, 4, 32)

    def held(m):
        return tl.tape_bytes(ops.softmax_cross_entropy(m(x), t), exclude=m.parameters())

    full, frozen = held(tiny.model()), held(tl.add_lora(tiny.model(), r=2, target_modules=["q_proj", "v_proj"]))
    tokens, c = x.size, tiny.CONFIG
    widths = c.hidden_size + c.hidden_size + c.intermediate_size  # the inputs of o, of gate and up, of down
    inputs_of_frozen_layers = 4 * tokens * c.num_hidden_layers * widths
    assert full - frozen > inputs_of_frozen_layers


# ---------------------------------------------------------------------------------------------------------------- PEFT's files
def test_an_adapter_survives_the_disk(tmp_path, rng):
    m, x = (
        tiny.randomize_lora(tl.add_lora(tiny.model(), r=4, alpha=6, target_modules=["q_proj", "down_proj"]), rng),
        tiny.ids(rng, 1, 9),
    )
    peft.save_adapter(m, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["target_modules"]) == (
        "LORA",
        4,
        6,
        ["down_proj", "q_proj"],
    )
    again = peft.load_adapter(tiny.model(), tmp_path)
    assert tiny.logits(again, x).tobytes() == tiny.logits(m, x).tobytes()
    assert adapters.configs(again) == adapters.configs(m)


def test_names_that_would_mean_more_layers_are_saved_as_paths(tmp_path):
    """As after loading an adapter whose PEFT config restricted it to some layers."""
    m = tl.add_lora(tiny.model(), r=4, target_modules=["q_proj"])
    adapter = adapters.detach(m)
    del adapter.weights["model.layers.0.self_attn.q_proj"]
    peft.save_adapter(adapters.attach(m, adapter), tmp_path)
    assert peft.read_adapter(tmp_path).config.target_modules == ("model.layers.1.self_attn.q_proj",)


def test_saving_twice_gives_the_same_bytes(tmp_path, rng):
    m = tiny.randomize_lora(tl.add_lora(tiny.model(), r=4), rng)
    for name in ("a", "b"):
        peft.save_adapter(m, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path, rng):
    peft.save_adapter(tl.add_lora(tiny.model(), r=4), tmp_path)
    for changes, words in (
        ({"intermediate_size": 64}, r"with r = 4 needs lora_A \(4, 64\), lora_B \(32, 4\)"),
        ({"num_hidden_layers": 1}, "which the model lacks"),
    ):
        other = tiny.model(**changes)
        with pytest.raises(ValueError, match=words):
            peft.load_adapter(other, tmp_path)
        assert not adapters.lora_layers(other)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_dora": True}, r"needs lora_A .*, lora_magnitude_vector \(32,\)"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "some"}, "bias = 'some' is not supported here, only 'none', 'all', 'lora_only'"),
        ({"rank_pattern": {"q_proj": 2}}, r"this model with r = 2 needs lora_A \(2, 32\)"),
        (
            {"modules_to_save": ["model.norm"]},
            r"parameters trained whole: none; on this model .* mean model.norm.weight \(32,\)",
        ),
    ],
)
def test_what_is_not_read_is_refused(change, words, tmp_path):
    peft.save_adapter(tl.add_lora(tiny.model(), r=4), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        peft.load_adapter(tiny.model(), tmp_path)


def test_a_config_without_r_and_alpha_means_8(tmp_path):
    peft.save_adapter(tl.add_lora(tiny.model(), r=8, alpha=8), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["r"], config["lora_alpha"]
    path.write_text(json.dumps(config))
    assert peft.read_adapter(tmp_path).config.alpha == peft.read_adapter(tmp_path).config.r == 8


SELECTIONS = {  # 14 of the 21 layers of three blocks, by each of the ways
    "a regular expression": {"target_modules": r"model\.layers\.[02]\..*_proj"},
    "excluded names": {"exclude_modules": ["k_proj", "o_proj", "layers.1.self_attn.q_proj"]},
    "an excluding expression": {"exclude_modules": r".*layers\.1\..*"},
    "numbers of layers": {"target_modules": ["q_proj", "mlp.up_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "one number": {"layers_to_transform": 2},
    "a pattern": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
    "an expression and names": {"target_modules": r".*_proj", "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "all of it": {},
}


@pytest.mark.parametrize("way", SELECTIONS)
def test_a_selection_means_the_same_layers_after_every_trip(way, tmp_path):
    def base():
        return tiny.model(num_hidden_layers=3)

    m = tl.add_lora(base(), r=2, **SELECTIONS[way])
    wanted = [path for path, _ in adapters.lora_layers(m)]
    for trip in ("a", "b", "c"):
        peft.save_adapter(m, tmp_path / trip)
        m = peft.load_adapter(base(), tmp_path / trip)
        assert [path for path, _ in adapters.lora_layers(m)] == wanted
        fresh = adapters.configs(m)["default"]  # a new adapter with these words adapts them as well
        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        assert adapters.find_targets(base(), **{name: getattr(fresh, name) for name in names}) == wanted
    files = [(tmp_path / trip / "adapter_config.json").read_bytes() for trip in "bc"]
    assert files[0] == files[1]


def test_what_narrowed_the_targets_is_in_the_file_in_pefts_words(tmp_path):
    m = tl.add_lora(
        tiny.model(num_hidden_layers=3),
        r=2,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["layers.1.self_attn.v_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
    )
    peft.save_adapter(m, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["layers_pattern"] == "layers"
    assert config["layers_to_transform"] == [0, 1] and config["exclude_modules"] == ["layers.1.self_attn.v_proj"]
    assert adapters.configs(peft.load_adapter(tiny.model(num_hidden_layers=3), tmp_path)) == adapters.configs(m)


@pytest.mark.parametrize(
    "options, written",
    [
        ({"target_modules": r".*layers\.1\.mlp\..*"}, ("target_modules", 3)),  # in PEFT it would mean act_fn as well
        ({"target_modules": [f"model.layers.{i}.mlp.{p}_proj" for i in range(8) for p in ("up", "gate", "down")],
          "exclude_modules": ["layers.3.mlp.up_proj"]}, ("exclude_modules", 1)),
        ({"layers_to_transform": [4], "target_modules": [f"model.layers.{i}.mlp.up_proj" for i in range(8)]
          + [f"layers.{i}.mlp.down_proj" for i in range(16)]}, ("target_modules", 9)),  # PEFT condenses 20 names and more
    ],
)  # fmt: skip
def test_words_that_would_mean_other_layers_in_peft_are_not_written(options, written, tmp_path):
    config = {"num_hidden_layers": 16}
    m = tl.add_lora(tiny.model(**config), r=2, **options)
    peft.save_adapter(m, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    name, count = written
    assert isinstance(saved[name], list) and len(saved[name]) == count
    again = peft.load_adapter(tiny.model(**config), tmp_path)
    assert [p for p, _ in adapters.lora_layers(again)] == [p for p, _ in adapters.lora_layers(m)]


def test_a_path_that_ends_another_one_is_saved_as_an_expression(tmp_path):
    """Among target_modules PEFT reads "fc" as the end of "inner.fc" as well."""

    class Inner(nn.Module):
        def __init__(self):
            self.fc = nn.Linear(4, 4)

    class Outer(nn.Module):
        def __init__(self):
            self.fc, self.inner = nn.Linear(4, 4), Inner()

    m = tl.add_lora(Outer(), r=2, target_modules="fc")
    peft.save_adapter(m, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "fc"
    m = tl.add_lora(Outer(), r=2, target_modules=["fc"], exclude_modules=["inner.fc"])
    adapter = adapters.detach(m)
    adapter = adapters.Adapter(adapters.LoRAConfig(r=2, target_modules=("fc",)), adapter.weights)
    peft.save_adapter(adapters.attach(m, adapter), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "fc"


def test_factors_of_a_layer_that_the_config_does_not_adapt_are_refused(tmp_path):
    """PEFT would leave them out in silence: 14 layers instead of 21."""
    peft.save_adapter(tl.add_lora(tiny.model(num_hidden_layers=3), r=2), tmp_path)
    path = tmp_path / "adapter_config.json"
    for change in ({"layers_to_transform": [0, 1]}, {"exclude_modules": ["layers.2.self_attn.q_proj"]}):
        config = json.loads(path.read_text()) | {"layers_to_transform": None, "exclude_modules": None}
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"has factors for model\.layers\.2\.\S+, which the config does not adapt"):
            peft.load_adapter(tiny.model(num_hidden_layers=3), tmp_path)


def test_modules_to_save_are_named_by_the_end_of_a_path_as_peft_reads_them(tmp_path, rng):
    """ "norm" ends input_layernorm too; a file of PEFT's holds them all."""
    m = tl.add_lora(tiny.model(), r=2, modules_to_save=["norm"], target_modules=["q_proj"])
    saved = {path for owner, path in adapters.state.state(m).copies if owner == "default"}
    assert len(saved) == 5 and all("norm" in path for path in saved)
    tiny.randomize_trainable(m, rng)
    peft.save_adapter(m, tmp_path)
    x = tiny.ids(rng, 1, 9)
    assert tiny.logits(peft.load_adapter(tiny.model(), tmp_path), x).tobytes() == tiny.logits(m, x).tobytes()
    with pytest.raises(ValueError, match="is a target and among modules_to_save"):
        tl.add_lora(tiny.model(), r=2, target_modules=["q_proj"], modules_to_save=["proj"])


@pytest.mark.parametrize("whole, inside", [("attn", "self_attn"), ("ers.1", "layers.1")])
def test_an_adapted_layer_inside_a_module_that_is_saved_whole_is_refused_by_that_reason(whole, inside, tmp_path, rng):
    """PEFT makes such an adapter where the name is the bare end of a module's, and its own load_adapter fails on it."""
    m = tiny.randomize_lora(tl.add_lora(tiny.model(), r=2, target_modules=["q_proj"]), rng)
    peft.save_adapter(m, tmp_path)
    tensors, metadata = safetensors.load_safetensors(tmp_path / "adapter_model.safetensors")
    for path, w in m.named_parameters():
        if inside in path and "lora" not in path:
            tensors[f"base_model.model.{path}"] = w.data + 1  # trained too
    safetensors.save_safetensors(tmp_path / "adapter_model.safetensors", tensors, metadata)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": [whole]}))
    for read in (peft.read_adapter, lambda folder: peft.load_adapter(tiny.model(), folder)):
        with pytest.raises(ValueError, match=r"q_proj is adapted and lies in a module that is trained whole .*PEFT"):
            read(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"r": "8"}, "r = '8', expected a whole number, 1 or more"),
        ({"r": 0}, "r = 0, expected a whole number, 1 or more"),
        ({"r": 2.5}, r"r = 2\.5, expected a whole number"),
        ({"r": None}, "r = None, expected a whole number"),
        ({"r": True}, "r = True, expected a whole number"),
        ({"rank_pattern": {"q_proj": "2"}}, r"rank_pattern\['q_proj'\] = '2', expected a whole number"),
        ({"rank_pattern": {"q_proj": 2, "v_proj": 2.5}}, r"rank_pattern\['v_proj'\] = 2\.5, expected a whole number"),
        ({"rank_pattern": {"nowhere": 0}}, r"rank_pattern\['nowhere'\] = 0, expected a whole number"),
        ({"rank_pattern": [2]}, r"rank_pattern = \[2\], expected names and numbers"),
        ({"alpha_pattern": 3}, "alpha_pattern = 3, expected names and numbers"),
        ({"target_modules": 3}, "target_modules = 3, expected names"),
        ({"modules_to_save": [1]}, r"modules_to_save = \[1\], expected names"),
    ],
)
def test_a_config_with_a_wrong_number_is_one_sentence_with_its_file(change, words, tmp_path):
    peft.save_adapter(tl.add_lora(tiny.model(), r=2), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for read in (peft.read_config, lambda folder: peft.load_adapter(tiny.model(), folder)):
        with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{words}"):
            read(tmp_path)


def test_unknown_keys_of_a_config_are_named_and_known_ones_are_not(tmp_path, recwarn):
    peft.save_adapter(tl.add_lora(tiny.model(), r=2), tmp_path)
    path = tmp_path / "adapter_config.json"
    plain = json.loads(path.read_text())
    known = {
        "peft_version": "0.21.2",
        "auto_mapping": None,
        "eva_config": None,
        "megatron_core": "megatron.core",
        "revision": None,
    }
    path.write_text(json.dumps(plain | known))
    peft.load_adapter(tiny.model(), tmp_path)
    assert not recwarn.list
    path.write_text(json.dumps(plain | known | {"use_hyperlora": True, "lora_aplha": 4}))
    with pytest.warns(
        UserWarning, match=r"adapter_config\.json: the keys lora_aplha, use_hyperlora are unknown"
    ) as heard:
        peft.load_adapter(tiny.model(), tmp_path)
    assert len(heard) == 1


@pytest.mark.parametrize("change", [{"lora_alpha": "x"}, {"layers_to_transform": "0"}, {"target_modules": "(q"}])
def test_a_bad_value_in_a_config_is_a_sentence_with_its_file(change, tmp_path):
    peft.save_adapter(tl.add_lora(tiny.model(), r=2), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: (lora: )?{next(iter(change))}"):
        peft.load_adapter(tiny.model(), tmp_path)


def changed(folder, change):
    """Rewrite a folder's adapter_model.safetensors after a change of its tensors and metadata."""
    path = folder / "adapter_model.safetensors"
    tensors, metadata = safetensors.load_safetensors(path)
    tensors = {name: np.array(x) for name, x in tensors.items()}
    change(tensors)
    safetensors.save_safetensors(path, tensors, metadata)


FACTOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: (x * 100).astype(np.int8), "has dtype I8, expected floats"),
        (lambda x: (x * 100).astype(np.int64), "has dtype I64, expected floats"),
        (lambda x: x > 0, "has dtype BOOL, expected floats"),
        (lambda x: np.where(x == x.max(), np.nan, x).astype(np.float32), "holds NaN"),
        (lambda x: np.where(x == x.max(), -np.inf, x).astype(np.float16), "holds Inf"),
        (lambda x: x.astype(np.float64) * 1e300, "holds Inf"),
        (
            lambda x: np.where(x == x.max(), -3e38, x).astype(np.float32),
            r"holds numbers up to 3e\+38, expected at most 1e\+15",
        ),
        (lambda x: np.float32(1).reshape(()), r"has shape \(\), expected 2 axes or more"),
        (lambda x: x[:0], r"has shape \(0, 32\), expected 2 axes or more, none empty"),
        (lambda x: x.reshape(1, 1, 1, 1, *x.shape), r"has shape \(1, 1, 1, 1, 2, 32\), expected"),
    ],
)
def test_a_tensor_that_is_no_factor_is_refused_by_name(change, words, tmp_path, rng):
    tiny.randomize_lora(m := tl.add_lora(tiny.model(), r=2, target_modules=["q_proj"]), rng)
    peft.save_adapter(m, tmp_path)
    changed(tmp_path, lambda tensors: tensors.update({FACTOR: np.array(change(tensors[FACTOR]))}))
    for read in (peft.read_adapter, peft.read_base, lambda folder: peft.load_adapter(tiny.model(), folder)):
        with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: (tensor )?{FACTOR} {words}"):
            read(tmp_path)


@pytest.mark.parametrize("large, alpha", [(1e15, 1e6), (1.0, 3e38)])
def test_factors_whose_product_leaves_float32_are_refused_by_name(large, alpha, tmp_path, rng):
    m = tiny.randomize_lora(tl.add_lora(tiny.model(), r=2, alpha=alpha, target_modules=["q_proj"]), rng)
    peft.save_adapter(m, tmp_path)
    changed(tmp_path, lambda tensors: tensors.update({FACTOR: np.full_like(tensors[FACTOR], large)}))
    m = tiny.model()
    with pytest.raises(
        ValueError,
        match=rf"adapter_model\.safetensors: model\.layers\.0\.self_attn\.q_proj has lora_A up to {re.escape(format(large, '.0e'))} and",
    ):
        peft.load_adapter(m, tmp_path)
    assert not adapters.configs(m)


@pytest.mark.parametrize(
    "name, words",
    [
        (FACTOR.replace("q_proj", "q\n\x1b[31m"), r"a tensor is named 'base_model.*q\\n\\x1b"),
        ("x" * 10000, "did not expect the tensor 'x{59}…"),
        (
            FACTOR.replace("lora_A.weight", "lora_embedding_A"),
            "it holds .*lora_embedding_A twice, under another name too",
        ),
        ("base_model.model.lm_head.base_layer.weight", "did not expect a base weight for lm_head"),
        ("base_model.model.lm_head.modules_to_save.weight", "two copies of lm_head.weight, and they differ"),
        ("base_model.model.lm_head.token_adapter.trainable_tokens_delta", "the file holds rows for lm_head"),
    ],
)
def test_a_tensor_too_many_is_refused_by_name(name, words, tmp_path):
    peft.save_adapter(tl.add_lora(tiny.model(), r=2, target_modules=["q_proj"]), tmp_path)
    changed(tmp_path, lambda tensors: tensors.update({name: tensors[FACTOR]}))
    with pytest.raises(ValueError, match=words) as caught:
        peft.load_adapter(tiny.model(), tmp_path)
    assert str(tmp_path) in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 600


#: What a hostile program would write into each field of adapter_config.json.
HOSTILE = ["", "8", "\x1b[31m\n", "(", "(a+)+!", "a|b", "\0", "\ud800", "x" * 200_000, -1, 1 << 31, 1 << 63, 10**400, 1.5, 1e39,
           float("nan"), float("inf"), True, [], {}, [1], [None], ["x", 3], [[[[]]]], {"q_proj": "2"}, {"q_proj": {}},
           ["x"] * 20_000, list(range(20_000)), {str(i): 1 for i in range(20_000)}]  # fmt: skip


UNDECLARED = "lora_alpha target_modules exclude_modules layers_to_transform layers_pattern modules_to_save peft_type revision use_qalora"


@pytest.mark.parametrize("field", [*peft._FIELDS, *peft._ONLY, *peft._PATTERNS, *UNDECLARED.split()])
def test_whatever_a_field_holds_it_is_used_or_refused_in_a_sentence(field, tmp_path):
    peft.save_adapter(tl.add_lora(tiny.model(), r=2, target_modules=["q_proj"]), tmp_path, base_model="base")
    path = tmp_path / "adapter_config.json"
    plain, model = json.loads(path.read_text()), tiny.model()
    for value in HOSTILE:
        path.write_text(json.dumps(plain | {field: value}))
        try:
            peft.read_base(tmp_path).find()
            adapters.detach(peft.load_adapter(model, tmp_path))
        except ValueError as error:
            said = str(error)
            assert said.isprintable() and len(said) < 600, said
            assert str(tmp_path) in said, said
        assert not adapters.configs(model)


def test_a_model_with_no_such_embedding_is_a_sentence(tmp_path):
    """A file may save whole what the model lacks."""
    peft.save_adapter(tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1"], modules_to_save=["norm"]), tmp_path)
    changed(tmp_path, lambda t: t.update({"base_model.model.model.embed_tokens.norm.weight": np.ones((2, 2))}))
    with pytest.raises(ValueError, match=r"holds these parameters trained whole"):
        peft.load_adapter(tiny.zoo(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["embed_tokens", "norm"]}))
    changed(tmp_path, lambda t: t.update({"base_model.model.model.embed_tokens.weight": np.ones((2, 2))}))
    with pytest.raises(ValueError, match=r"modules_to_save names .embed_tokens., which is no module"):
        peft.load_adapter(tiny.zoo(), tmp_path)


def test_missing_files_get_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        peft.load_adapter(tiny.model(), tmp_path)
    with pytest.raises(ValueError, match="carries no adapter"):
        peft.save_adapter(tiny.model(), tmp_path)


# -------------------------------------------------------------------------------------------------------------------- merging
def test_merge_of_a_model(xp, rng):
    m = tiny.randomize_lora(tl.add_lora(tiny.model(), r=4), rng).to(xp)
    x = tiny.ids(rng, 2, 10)
    before = tiny.logits(m, x)
    tl.merge(m)
    assert not adapters.lora_layers(m)
    np.testing.assert_allclose(tiny.logits(m, x), before, rtol=1e-3, atol=1e-4)


def test_detach_restores_the_base_bit_for_bit_and_attach_puts_another_on(xp, rng):
    m, x = tiny.model().to(xp), tiny.ids(rng, 2, 10)
    base = tiny.logits(m, x)
    first = adapters.detach(tiny.randomize_lora(tl.add_lora(m, r=4), rng))
    assert tiny.logits(m, x).tobytes() == base.tobytes()
    second = adapters.detach(tiny.randomize_lora(tl.add_lora(m, r=2, target_modules=["q_proj"]), rng))
    outputs = []
    for adapter in (first, second, first):
        adapters.attach(m, adapter)
        outputs.append(tiny.logits(m, x))
        adapters.detach(m)
    assert outputs[0].tobytes() == outputs[2].tobytes() != outputs[1].tobytes()
    assert first.nbytes > second.nbytes > 0


def test_unmerging_puts_the_base_back_bit_for_bit(xp, rng):
    """Float32 subtraction would not: W₀ is kept instead."""
    m = tiny.zoo()
    tl.add_lora(m, r=2, target_modules=["fc1", "fc2"], bias="lora_only", modules_to_save=["head"])
    m, x = tiny.randomize_trainable(m, rng).to(xp), tiny.ids(rng, 3, 4) % 20
    before, base = host(m, x), _base_output(m, x)
    adapters.merge(m, keep=True)
    assert not adapters.lora_layers(m) and not m.trainable()
    np.testing.assert_allclose(host(m, x), before, rtol=1e-3, atol=1e-4)
    adapters.unmerge(m)
    assert host(m, x).tobytes() == before.tobytes() and _base_output(m, x).tobytes() == base.tobytes()
    assert len(m.trainable()) == 2 * 2 + 2 + 2  # two pairs, two biases, the head
    adapters.merge(m)
    with pytest.raises(ValueError, match="only merge"):
        adapters.unmerge(m)


def test_merging_one_of_several_drops_the_others(rng):
    m, x = tiny.zoo(), tiny.ids(rng, 3, 4) % 20
    for name in ("a", "b"):
        tl.add_lora(m, r=2, target_modules=["fc1"] if name == "a" else ["fc1", "fc2"], name=name)
        tl.set_adapter(m, name)
        tiny.randomize_trainable(m, rng)
    tl.set_adapter(m, "a")
    wanted, fc2 = host(m, x), m.fc2.base_layer
    tl.set_adapter(m, ["b"])
    adapters.merge(m, "a")
    np.testing.assert_allclose(host(m, x), wanted, rtol=1e-3, atol=1e-4)
    assert m.fc2 is fc2 and not adapters.configs(m)
    with pytest.raises(ValueError, match="merge: the model carries no adapter"):
        adapters.merge(m)


def test_the_price_of_merging_into_4_bits_is_listed_by_layer(rng):
    m = tiny.randomize_lora(tl.add_lora(tl.quantize_linears(tiny.model()), r=4), rng)
    errors = adapters.merge_errors(tl.merge(m))
    assert len(errors) == 14 and all(0.01 < e < 0.2 for e in errors.values())
    assert set(adapters.merge_errors(tl.merge(tl.add_lora(tiny.model(), r=4))).values()) == {0.0}


def test_an_adapted_embedding_is_not_merged_under_a_tied_head(rng):
    """PEFT warns that merging moves the head along; here it is refused until the head has its own weights."""
    m, x = tiny.model(), tiny.ids(rng, 1, 9)
    tl.add_lora(m, r=2, target_modules=["embed_tokens", "q_proj"])
    tiny.randomize_trainable(m, rng)
    before = tiny.logits(m, x)
    with pytest.raises(ValueError, match=r"the head reads the weight of model\.embed_tokens too.*untie"):
        tl.merge(m)
    assert tiny.logits(m, x).tobytes() == before.tobytes()
    np.testing.assert_allclose(tiny.logits(tl.merge(m.untie()), x), before, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="is tied to the model's head"):
        tl.add_lora(tiny.model(), r=2, modules_to_save=["embed_tokens"])


# ------------------------------------------------------------------------------------------------------- several on one base
def host(m, x):
    return backend.move(m(x).data, "cpu")


def _base_output(m, x):
    with tl.disable_adapter(m):
        return host(m, x)


def several(rng, xp=np, **options):
    """A zoo with the adapters a (trained), b and c, all random; a is active."""
    m = tiny.zoo()
    for name, r in (("a", 2), ("b", 2), ("c", 3)):
        tl.add_lora(
            m,
            r=r,
            alpha=2 * r + 1,
            target_modules=["embed", "fc1"] if name == "b" else ["fc1", "fc2"],
            name=name,
            **options,
        )
        tl.set_adapter(m, name)
        tiny.randomize_trainable(m, rng)
    tl.set_adapter(m, "a")
    return m.to(xp)


def test_a_further_adapter_waits_frozen_until_it_is_set():
    m = tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1"], name="a")
    first = [name for name, _ in m.trainable()]
    tl.add_lora(m, r=2, target_modules=["fc1", "fc2"], name="b")
    assert [name for name, _ in m.trainable()] == first and adapters.active_adapters(m) == ("a",)
    tl.set_adapter(m, "b")
    assert all(".b." in name for name, _ in m.trainable()) and len(m.trainable()) == 4
    tl.set_adapter(m, ["a", "b"])
    assert len(m.trainable()) == 6
    tl.set_adapter(m, "b", inference_mode=True)
    assert not m.trainable()
    for bad, words in (("d", "no adapter called 'd'; it carries a, b"), (["a", "d"], "'d'")):
        with pytest.raises(ValueError, match=words):
            tl.set_adapter(m, bad)
    for name in ("a.b", "", "__base__", "a:b", "a/b", 1, []):
        with pytest.raises(ValueError, match="an adapter cannot be called"):
            tl.add_lora(m, r=2, target_modules=["fc1"], name=name)


def test_disabled_adapters_leave_the_base_bit_for_bit(xp, rng):
    x = tiny.ids(rng, 3, 4) % 20
    base = host(tiny.zoo().to(xp), x)
    m = several(rng, xp)
    a = host(m, x)
    assert a.tobytes() != base.tobytes() == _base_output(m, x).tobytes()
    assert host(m, x).tobytes() == a.tobytes() and adapters.active_adapters(m) == ("a",)
    assert all(".a." in name for name, _ in m.trainable())
    with pytest.raises(KeyError), tl.disable_adapter(m):
        raise KeyError
    assert host(m, x).tobytes() == a.tobytes()


def test_active_adapters_add_up_in_a_layer(rng):
    m, h = several(rng), Tensor(rng.standard_normal((5, 8)).astype(np.float32))
    outputs = {}
    for names in ((), ("a",), ("b",), ("c",), ("a", "b", "c")):
        tl.set_adapter(m, names)
        outputs[names] = m.fc1(h).data
    total = sum(outputs[(n,)] - outputs[()] for n in "abc") + outputs[()]
    np.testing.assert_allclose(outputs["a", "b", "c"], total, rtol=1e-4, atol=1e-4)


def test_deleting_the_active_adapter_falls_back_to_the_first_in_the_alphabet(rng):
    m, x = several(rng), tiny.ids(rng, 3, 4) % 20
    tl.set_adapter(m, "c")
    c = host(m, x)
    tl.set_adapter(m, "b")
    adapters.delete_adapter(m, "b")
    assert adapters.active_adapters(m) == ("a",) and not isinstance(m.embed, tl.lora.LoRALayer)
    adapters.delete_adapter(m, "a")
    assert adapters.active_adapters(m) == ("c",) and host(m, x).tobytes() == c.tobytes()
    adapters.delete_adapter(m, "c")
    assert not adapters.lora_layers(m) and host(m, x).tobytes() == host(tiny.zoo(), x).tobytes()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_each_row_of_a_batch_through_its_own_adapter_equals_a_loop(xp, rng, options):
    """LoRA §4.2 names this as the price of merging; unmerged it is one product with W₀ and one small one for each adapter."""
    m, x = several(rng, xp, **options), tiny.ids(rng, 7, 4) % 20
    names = ["a", "__base__", "c", "a", "b", "c", "__base__"]
    with tl.adapter_rows(m, names):
        together = host(m, x)
    for i, name in enumerate(names):
        tl.set_adapter(m, () if name == "__base__" else name)
        np.testing.assert_allclose(together[i], host(m, x[i : i + 1])[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="2 adapter names for a batch of 7 rows"), tl.adapter_rows(m, ["a", "b"]):
        m(x)
    with pytest.raises(ValueError, match="no adapter called 'd'"), tl.adapter_rows(m, ["d"]):
        pass
    assert adapters.active_adapters(m) == ()  # as before: the loop ended with the base


def test_gradients_reach_each_rows_adapter(rng):
    m = several(rng)
    with tl.adapter_rows(m, ["a", "c"]):
        for bypass in m.fc1.bypasses.values():
            bypass.requires_grad_(True)
        m(tiny.ids(rng, 2, 4) % 20).sum().backward()
    reached = {name for name, b in m.fc1.bypasses.items() if b.lora_B.weight.grad is not None}
    assert reached == {"a", "c"}


# ------------------------------------------------------------------------------------------------------------------- combining
def test_cat_is_exact_and_svd_the_best_of_its_rank(rng):
    m = several(rng)
    parts = {
        n: {p: layer.bypasses[n].delta(layer.base_layer) for p, layer in adapters.lora_layers(m, n)} for n in "abc"
    }
    weights = {"a": 0.7, "b": -0.4, "c": 1.5}
    wanted = {}
    for n, w in weights.items():
        for p, d in parts[n].items():
            wanted[p] = wanted.get(p, 0) + w * d
    tl.add_weighted_adapter(m, "abc", weights.values(), "cat", "cat")
    tl.add_weighted_adapter(m, "abc", weights.values(), "full", "svd", svd_rank=7)
    tl.add_weighted_adapter(m, "abc", weights.values(), "best", "svd")
    assert adapters.active_adapters(m) == ("a",)
    for path, layer in adapters.lora_layers(m):
        delta = {n: layer.bypasses[n].delta(layer.base_layer) for n in ("cat", "full", "best")}
        np.testing.assert_allclose(delta["cat"], wanted[path], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(delta["full"], wanted[path], rtol=1e-4, atol=1e-5)
        s = np.linalg.svd(wanted[path], compute_uv=False)
        assert np.linalg.norm(delta["best"] - wanted[path]) == pytest.approx(np.linalg.norm(s[3:]), rel=1e-3, abs=1e-4)
        assert all(layer.bypasses[n].scaling == 1 for n in delta)
    assert [adapters.configs(m)[n].r for n in ("cat", "full", "best")] == [7, 7, 3]


def test_linear_combination_has_cross_terms_as_large_as_what_was_asked_for(rng):
    """B A = Σ wᵢ sᵢ Bᵢ Aᵢ + Σ_{i≠j} √(wᵢsᵢwⱼsⱼ) Bᵢ Aⱼ: right for one adapter, about 100 % wrong for two unrelated ones."""
    m = tl.add_lora(tiny.model(), r=4, name="a")
    tl.add_lora(m, r=4, name="b")
    errors, single = [], []
    for n in "ab":
        tl.set_adapter(m, n)
        tiny.randomize_trainable(m, rng)
    tl.add_weighted_adapter(m, ["a", "b"], [0.5, 0.5], "both", "linear")
    tl.add_weighted_adapter(m, ["a"], [-0.5], "one", "cat")  # one adapter: always linear, as in PEFT
    for _, layer in adapters.lora_layers(m):
        a, b, both, one = (layer.bypasses[n].delta(layer.base_layer) for n in ("a", "b", "both", "one"))
        wanted = 0.5 * a + 0.5 * b
        errors.append(np.linalg.norm(both - wanted) / np.linalg.norm(wanted))
        single.append(np.linalg.norm(one + 0.5 * a) / np.linalg.norm(a))
    assert 0.7 < np.mean(errors) < 1.3 and max(single) < 1e-6


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((["a", "c"], [1, 1], "n", "linear"), r"'linear' needs equal ranks, got \[2, 3\]"),
        ((["a", "b"], [1], "n"), "2 adapters and 1 weights"),
        ((["a", "b"], [1, 1], "n", "ties"), "combination_type 'ties', expected one of cat, svd, linear"),
        ((["a", "x"], [1, 1], "n"), "no adapter called 'x'"),
        ((["a", "b"], [1, 1], "c"), "already that is called 'c'"),
    ],
)
def test_combinations_that_make_no_sense_get_a_sentence(arguments, words, rng):
    m = several(rng)
    with pytest.raises(ValueError, match=words):
        tl.add_weighted_adapter(m, *arguments)
    assert list(adapters.configs(m)) == ["a", "b", "c"]


def test_a_combination_with_dora_or_biases_is_refused(rng):
    for options in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["head"]}):
        m = tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1"], name="a", **options)
        with pytest.raises(ValueError, match="'a' does more than add s B A"):
            tl.add_weighted_adapter(m, ["a"], [1], "n")


# ----------------------------------------------------------------------------------------------- patterns, biases, saved modules
def test_patterns_override_rank_and_alpha_by_the_end_of_a_path():
    m = tl.add_lora(
        tiny.model(), r=4, alpha=8, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 3}, alpha_pattern={"down_proj": 1}
    )
    ranks = {path: layer.r for path, layer in adapters.lora_layers(m)}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2 and ranks["model.layers.0.mlp.up_proj"] == 4
    assert ranks["model.layers.1.mlp.up_proj"] == 3
    with pytest.raises(ValueError, match="the pattern 'qproj' matches none of the adapted layers"):
        tl.add_lora(tiny.model(), r=4, rank_pattern={"qproj": 2})
    assert m.model.layers[0].mlp.down_proj.scaling == 1 / 4 and m.model.layers[1].mlp.down_proj.scaling == 1 / 3


@pytest.mark.parametrize(
    "options, whole",
    [
        ({"bias": "none"}, set()),
        ({"bias": "lora_only"}, {"fc1.base_layer.bias"}),
        ({"bias": "all"}, {"fc1.base_layer.bias", "fc2.bias", "head.bias"}),
        ({"modules_to_save": ["head", "norm"]}, {"head.weight", "head.bias", "norm.weight"}),
        ({"bias": "lora_only", "modules_to_save": ["head"]}, {"fc1.base_layer.bias", "head.weight", "head.bias"}),
    ],
)
def test_what_is_trained_whole_belongs_to_the_adapter_and_the_base_keeps_its_own(options, whole, xp, rng):
    x = tiny.ids(rng, 3, 4) % 20
    base = host(tiny.zoo().to(xp), x)
    m = tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1"], **options)
    assert {name for name, _ in m.trainable() if "bypasses" not in name} == whole
    tiny.randomize_trainable(m, rng)
    m.to(xp)
    y = host(m, x)
    assert _base_output(m, x).tobytes() == base.tobytes() and host(m, x).tobytes() == y.tobytes()
    off = adapters.detach(m)
    assert host(m, x).tobytes() == base.tobytes() and set(off.saved) == {p.replace(".base_layer", "") for p in whole}
    assert host(adapters.attach(m, off), x).tobytes() == y.tobytes()
    assert {name for name, _ in m.trainable() if "bypasses" not in name} == whole


def test_two_adapters_that_train_the_same_parameters_take_turns(rng):
    m, x = tiny.zoo(), tiny.ids(rng, 3, 4) % 20
    outputs = {}
    for name in "ab":
        tl.add_lora(
            m, r=2, target_modules=["fc1", "fc2"][: 1 + (name == "b")], modules_to_save=["head"], bias="all", name=name
        )
        tl.set_adapter(m, name)
        tiny.randomize_trainable(m, rng)
        outputs[name] = host(m, x)
    for name in "abba":
        tl.set_adapter(m, name)
        assert host(m, x).tobytes() == outputs[name].tobytes()
    with pytest.raises(ValueError, match="more than one trains the same parameters whole"):
        tl.set_adapter(m, ["a", "b"])
    assert host(m, x).tobytes() == outputs["a"].tobytes()
    with pytest.raises(ValueError, match="'a' trains parameters whole"), tl.adapter_rows(m, ["a", "b", "a"]):
        pass
    assert _base_output(m, x).tobytes() == host(tiny.zoo(), x).tobytes()
    assert host(tl.merge(m), x) == pytest.approx(outputs["a"], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bias": "some"}, "bias = 'some', expected"),
        ({"modules_to_save": ["tail"]}, "'tail', which is no module"),
        ({"modules_to_save": "head"}, "is a list of names"),
        ({"modules_to_save": ["fc1"]}, "fc1 is a target and among modules_to_save"),
    ],
)
def test_bad_choices_of_what_is_trained_whole(options, words):
    m = tiny.zoo()
    with pytest.raises(ValueError, match=words):
        tl.add_lora(m, r=2, target_modules=["fc1"], **options)
    assert not adapters.lora_layers(m) and all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"fc2": 3}, "alpha_pattern": {"fc1": 5}},
        {"bias": "all", "modules_to_save": ["head"]},
        {"target_modules": ["embed", "fc1"], "use_dora": True},
        {"init": "gaussian"},
    ],
)
def test_every_kind_of_adapter_survives_the_disk(options, tmp_path, rng):
    m, x = tl.add_lora(tiny.zoo(), **{"r": 2, "target_modules": ["fc1", "fc2"], **options}), tiny.ids(rng, 3, 4) % 20
    tiny.randomize_trainable(m, rng)
    peft.save_adapter(m, tmp_path)
    again = peft.load_adapter(tiny.zoo(), tmp_path)
    assert host(again, x).tobytes() == host(m, x).tobytes() and adapters.configs(again) == adapters.configs(m)


def test_several_adapters_are_saved_as_peft_saves_them(tmp_path, rng):
    m, x = tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1"]), tiny.ids(rng, 3, 4) % 20
    tl.add_lora(m, r=3, target_modules=["fc2"], name="b")
    peft.save_adapters(m, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and (tmp_path / "b" / "adapter_config.json").is_file()
    both = peft.load_adapter(peft.load_adapter(tiny.zoo(), tmp_path), tmp_path / "b", "b")
    assert list(adapters.configs(both)) == ["default", "b"] and adapters.active_adapters(both) == ("b",)
    tl.set_adapter(both, "default")
    assert host(both, x).tobytes() == host(m, x).tobytes()


# ------------------------------------------------------------------------------------------------------ what belongs to what
def shaken(m, rng, name):
    """Adapter `name` active, trained, and random."""
    tl.set_adapter(m, name)
    return tiny.randomize_trainable(m, rng)


def two(rng, a=None, b=None):
    """A zoo with the adapters a and b, both random; a is active."""
    m = tl.add_lora(tiny.zoo(), **{"r": 2, "target_modules": ["fc1"], **(a or {})}, name="a")
    tl.add_lora(m, **{"r": 2, "target_modules": ["fc1"], **(b or {})}, name="b")
    shaken(shaken(m, rng, "b"), rng, "a")
    return m, tiny.ids(rng, 3, 4) % 20


@pytest.mark.parametrize("way", ["add", "attach", "unmerge"])
def test_an_adapter_put_on_a_model_in_eval_mode_does_not_drop(way, rng):
    m, x = tiny.zoo().eval(), tiny.ids(rng, 3, 4) % 20
    tl.add_lora(m, r=2, target_modules=["fc1"], dropout=0.5)
    tiny.randomize_trainable(m, rng)
    if way == "attach":
        adapters.attach(m, adapters.detach(m))
    elif way == "unmerge":
        adapters.unmerge(adapters.merge(m.train(), keep=True).eval())
    assert not any(module.training for _, module in m.named_modules())
    assert host(m, x).tobytes() == host(m, x).tobytes()


def test_merging_an_adapter_that_is_not_active_takes_its_own_bias(rng):
    m, x = two(rng, a={"bias": "lora_only"})
    wanted = host(m, x)
    tl.set_adapter(m, "b")
    np.testing.assert_allclose(host(tl.merge(m, "a"), x), wanted, rtol=1e-3, atol=1e-3)


def test_a_merge_that_fails_changes_nothing(rng, monkeypatch):
    m, x = two(rng, a={"bias": "lora_only"}, b={"target_modules": ["fc2"]})
    tl.set_adapter(m, "b")
    before = host(m, x)

    def broken(self, names=None):
        raise MemoryError("no room")

    monkeypatch.setattr(type(m.fc2), "merge", broken)
    with pytest.raises(MemoryError):
        tl.merge(m, "a")
    assert host(m, x).tobytes() == before.tobytes() and adapters.active_adapters(m) == ("b",)


def test_contexts_nest(rng):
    m, x = two(rng)
    base, a = _base_output(m, x), host(m, x)
    with tl.adapter_rows(m, ["b"] * 3):
        b = host(m, x)
        with tl.disable_adapter(m):
            assert host(m, x).tobytes() == base.tobytes()
        with tl.adapter_rows(m, ["a"] * 3):
            np.testing.assert_allclose(host(m, x), a, rtol=1e-5, atol=1e-6)
        assert host(m, x).tobytes() == b.tobytes()
        tl.set_adapter(m, "a")
        assert host(m, x).tobytes() == a.tobytes()
    assert host(m, x).tobytes() == a.tobytes()


def test_an_adapter_may_be_taken_off_inside_a_context_and_an_error_there_is_the_one_that_is_seen(rng):
    m, x = two(rng)
    base = _base_output(m, x)
    with tl.disable_adapter(m):
        adapters.delete_adapter(m, "a")
        assert host(m, x).tobytes() == base.tobytes()
    assert adapters.active_adapters(m) == ()
    m, x = two(rng)
    with pytest.raises(KeyError, match="mine"), tl.disable_adapter(m):
        adapters.detach(m, "a")
        raise KeyError("mine")


def test_deleting_an_inactive_adapter_activates_nothing(rng):
    m, _ = two(rng)
    tl.set_adapter(m, ())
    adapters.delete_adapter(m, "b")
    assert adapters.active_adapters(m) == ()


def test_adding_deleting_and_unmerging_leave_alone_what_is_trained(rng):
    m, _ = two(rng)
    m.fc1.bypasses["a"].lora_A.weight.requires_grad = False  # as LoRA-FA
    trained = [name for name, _ in m.trainable()]
    tl.add_lora(m, r=2, target_modules=["fc2"], name="c")
    assert [name for name, _ in m.trainable()] == trained
    adapters.delete_adapter(m, "c")
    assert [name for name, _ in m.trainable()] == trained
    adapters.unmerge(adapters.merge(m, keep=True))
    assert [name for name, _ in m.trainable()] == trained
    tl.set_adapter(m, "a", inference_mode=True)
    tl.add_lora(m, r=2, target_modules=["fc2"], name="c")
    assert not m.trainable()


def test_a_fresh_dora_starts_from_the_bases_norms_whatever_is_active(rng):
    m, x = two(rng, a={"modules_to_save": ["fc2"]})
    tl.add_lora(m, r=2, target_modules=["fc2"], use_dora=True, name="d")
    base = _base_output(m, x)
    tl.set_adapter(m, "d")
    np.testing.assert_allclose(host(m, x), base, rtol=1e-5, atol=1e-5)


def test_what_unmerge_needs_is_kept_safe(rng):
    import fake_cupy

    m, x = two(rng, a={"bias": "all"})
    before, base = host(m, x), _base_output(m, x)
    adapters.merge(m, keep=True)
    tl.add_lora(m, r=2, target_modules=["fc2"], name="x")
    with pytest.raises(ValueError, match="the merged model carries x; detach or merge that first"):
        adapters.unmerge(m)
    with pytest.raises(ValueError, match="of an earlier merge are kept"):
        adapters.merge(m, keep=True)
    adapters.detach(m)
    m.to(fake_cupy)
    adapters.unmerge(m)
    np.testing.assert_allclose(host(m, x), before, rtol=1e-5, atol=1e-5)
    assert _base_output(m.to("cpu"), x).tobytes() == base.tobytes()


def test_a_waiting_copy_moves_with_its_gradient(rng):
    import fake_cupy

    m, x = two(rng, a={"bias": "all"})
    m(x).sum().backward()
    tl.set_adapter(m, "b")
    m.to(fake_cupy)
    tl.set_adapter(m, "a")
    m(x).sum().backward()
    assert all(p.grad is not None for _, p in m.trainable())


def test_an_adapter_named_twice_counts_once(rng):
    m, x = two(rng)
    a = host(m, x)
    tl.set_adapter(m, ["a", "a"])
    assert host(m, x).tobytes() == a.tobytes()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"init": "pissa"}, "init 'pissa' is unknown"),
        ({"alpha": "16"}, "alpha = '16', expected a number"),
        ({"alpha": float("nan")}, "alpha = nan, expected a number"),
        ({"r": True}, "r = True, expected a whole number"),
        ({"dropout": "a"}, "dropout = a, expected 0 <= dropout < 1"),
        ({"target_modules": None}, "target_modules = None, expected 'all-linear'"),
        ({"target_modules": [3]}, r"target_modules = \[3\]"),
        ({"alpha_pattern": {"fc1": None}}, "alpha_pattern = None, expected a number"),
        ({"rank_pattern": {"(": 3}}, r"the pattern '\(' is no regular expression"),
        ({"target_modules": "all-linear", "modules_to_save": ["fc1"]}, "is a target and among modules_to_save"),
    ],
)
def test_bad_options_get_a_sentence_before_anything_changes(options, words):
    m = tiny.zoo()
    with pytest.raises(ValueError, match=words):
        tl.add_lora(m, **{"r": 2, "target_modules": ["fc1"], **options})
    assert not adapters.lora_layers(m) and len(m.trainable()) == 8


def test_a_module_in_few_bits_cannot_be_saved_whole():
    m = tiny.zoo()
    m.fc2 = Linear4bit.of(m.fc2, blocksize=32)
    with pytest.raises(ValueError, match=r"modules_to_save names 'fc2', but fc2\.weight is stored in few bits"):
        tl.add_lora(m, r=2, target_modules=["fc1"], modules_to_save=["fc2"])


def test_all_linear_needs_a_layer_beside_the_head():
    class Head(tl.nn.Module):
        def __init__(self):
            self.lm_head = tl.nn.Linear(4, 4)

    with pytest.raises(ValueError, match="'all-linear' leaves lm_head out"):
        tl.add_lora(Head(), r=2)


def test_combinations_are_checked_layer_by_layer_and_change_nothing(rng):
    from tinylora.adapters.conv import Conv2d

    class Grouped(tl.nn.Module):
        def __init__(self):
            self.conv = Conv2d(4, 4, 3, groups=2)

    m = tl.add_lora(Grouped(), r=2, target_modules=["conv"], name="a")
    with pytest.raises(ValueError, match="conv is a grouped convolution"):
        tl.add_weighted_adapter(m, ["a", "a"], [1, 1], "n", "cat")
    assert list(adapters.configs(m)) == ["a"]
    m, _ = two(
        rng, a={"target_modules": ["fc1", "fc2"], "rank_pattern": {"fc1": 1}}, b={"target_modules": ["fc1", "fc2"]}
    )
    for arguments, words in (
        ((["a", "b"], [1, 1], "n", "linear"), "'linear' needs equal ranks"),
        ((["a", "b"], [1, 1], "n", "svd", 0), "svd_rank = 0"),
        ((["a", "b"], [1, 1], "n", "svd", 2.5), "svd_rank = 2.5"),
        ((["a", "b"], [1, float("nan")], "n"), "expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            tl.add_weighted_adapter(m, *arguments)
    assert list(adapters.configs(m)) == ["a", "b"]


def test_a_layer_whose_start_moved_a_part_of_the_base_is_merged_and_not_taken_off(tmp_path, rng):
    """The factors of PiSSA mean nothing on W₀: PEFT's own files for it are refused for the same reason."""
    from tinylora import variants

    m, x = tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1"]), tiny.ids(rng, 3, 4) % 20
    variants.pissa(m.fc1)
    before = host(m, x)
    for f in (lambda: peft.save_adapter(m, tmp_path), lambda: adapters.detach(m)):
        with pytest.raises(ValueError, match="fc1 was started by pissa"):
            f()
    assert not list(tmp_path.iterdir())
    np.testing.assert_allclose(host(tl.merge(m), x), before, rtol=1e-4, atol=1e-4)


def test_one_of_several_is_saved_as_if_it_were_alone(tmp_path, rng):
    from tinylora.models import safetensors

    m, _ = two(rng, b={"target_modules": ["fc2"], "bias": "all"})
    peft.save_adapter(m, tmp_path, name="b")
    keys = safetensors.load_safetensors(tmp_path / "adapter_model.safetensors")[0].keys()
    assert {k for k in keys if "bias" in k} == {f"base_model.model.{p}.bias" for p in ("fc1", "fc2.base_layer", "head")}


def test_a_file_without_a_layer_that_its_config_names_is_refused(tmp_path, rng):
    from tinylora.models import safetensors

    peft.save_adapter(tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1", "fc2"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k: v.copy() for k, v in safetensors.load_safetensors(path)[0].items()}
    safetensors.save_safetensors(path, {k: v for k, v in tensors.items() if "fc2" not in k})
    with pytest.raises(ValueError, match="the config adapts fc2, and the file has no factors for it"):
        peft.load_adapter(tiny.zoo(), tmp_path)


def test_a_base_weight_that_came_along_must_be_the_models(tmp_path, rng):
    """PEFT adds the embedding, or the head, where it is adapted."""
    from tinylora.models import safetensors

    m = tl.add_lora(tiny.zoo(), r=2, target_modules=["embed", "fc1"])
    peft.save_adapter(m, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k: v.copy() for k, v in safetensors.load_safetensors(path)[0].items()}
    for change, words in ((0, None), (1, "the base weight of embed that came along is not this model's")):
        safetensors.save_safetensors(
            path, tensors | {"base_model.model.embed.base_layer.weight": tiny.zoo().embed.weight.data + change}
        )
        if words:
            with pytest.raises(ValueError, match=words):
                peft.load_adapter(tiny.zoo(), tmp_path)
        else:
            peft.load_adapter(tiny.zoo(), tmp_path)
    safetensors.save_safetensors(
        path, tensors | {"base_model.model.head.base_layer.weight": tiny.zoo().head.weight.data}
    )
    with pytest.raises(ValueError, match="a base weight for head, which is not adapted"):
        peft.load_adapter(tiny.zoo(), tmp_path)


def test_a_later_merge_gives_up_what_an_earlier_one_kept(rng):
    m, x = two(rng)
    adapters.merge(m, keep=True)
    shaken(tl.add_lora(m, r=2, target_modules=["fc2"], name="c"), rng, "c")
    wanted = host(m, x)
    tl.merge(m)
    with pytest.raises(ValueError, match="there is nothing to undo"):
        adapters.unmerge(m)
    np.testing.assert_allclose(host(m, x), wanted, rtol=1e-3, atol=1e-3)


def test_numpy_numbers_in_a_config_can_be_written(tmp_path):
    m = tl.add_lora(
        tiny.zoo(),
        r=np.int64(2),
        alpha=np.float32(4),
        target_modules=["fc1", "fc2"],
        rank_pattern={"fc1": np.int64(3)},
        alpha_pattern={"fc1": np.float32(3)},
    )
    peft.save_adapter(m, tmp_path)
    assert adapters.configs(peft.load_adapter(tiny.zoo(), tmp_path)) == adapters.configs(m)


def test_another_adapter_beside_one_that_moved_the_base_can_be_taken_off(rng):
    from tinylora import variants

    m = tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1"])
    variants.pissa(m.fc1)
    tl.add_lora(m, r=2, target_modules=["fc1"], name="b")
    adapters.delete_adapter(m, "b")
    tl.add_lora(m, r=2, target_modules=["fc1"], name="b")
    adapters.detach(m, "b")
    with pytest.raises(ValueError, match="was started by pissa"):
        adapters.detach(m)
    adapters.delete_adapter(m, "default")  # for good, and knowingly: the base keeps the residual
    assert not adapters.lora_layers(m)


def test_a_name_that_the_model_lacks_survives_the_round_trip(tmp_path):
    peft.save_adapter(tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1"]), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["fc1", "query"]}))
    m = peft.load_adapter(tiny.zoo(), tmp_path / "a")
    peft.save_adapter(m, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["target_modules"] == ["fc1"]


def test_the_base_weight_in_a_file_is_compared_under_another_adapter_too(tmp_path):
    from tinylora.models import safetensors

    peft.save_adapter(tl.add_lora(tiny.zoo(), r=2, target_modules=["embed"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k: v.copy() for k, v in safetensors.load_safetensors(path)[0].items()}
    key = "base_model.model.embed.base_layer.weight"
    safetensors.save_safetensors(path, tensors | {key: tiny.zoo().embed.weight.data + 1})
    with pytest.raises(ValueError, match="is not this model's"):
        peft.load_adapter(tl.add_lora(tiny.zoo(), r=2, target_modules=["embed"], name="other"), tmp_path)


def test_moving_a_model_that_keeps_an_earlier_base_gives_every_layer_its_own_weight():
    """Old stored weights are freed while new ones are made: a table of ids that outlives them would mix layers of one shape up."""
    for _ in range(8):
        m = nn.Module()
        m.layers = [nn.Linear(64, 64) for _ in range(12)]
        tl.quantize_linears(m)
        tl.add_lora(m, r=2, target_modules=[f"layers.{i}" for i in range(0, 12, 2)], name="a")
        tl.add_lora(m, r=2, target_modules=[f"layers.{i}" for i in range(1, 12, 2)], name="b")
        adapters.merge(m, "a", keep=True)  # the layers of "b" stand in the model and among what is kept
        before = [layer.dense() for layer in m.layers]
        for device in (fake_cupy, "cpu"):
            m.to(device)
        assert all(a.tobytes() == layer.dense().tobytes() for a, layer in zip(before, m.layers, strict=True))


def test_another_adapter_on_a_layer_that_one_trains_whole_leaves_it_in_training(rng):
    m = tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1"], modules_to_save=["embed"], name="a")
    m.embed.weight.grad = np.ones(m.embed.weight.shape, np.float32)
    tl.add_lora(m, r=2, target_modules=["embed"], name="b")
    assert m.embed.weight.requires_grad and m.embed.weight.grad.all()


@pytest.mark.parametrize("names", [None, 3, [["default"]], [None]])
def test_what_is_no_name_is_refused_in_a_sentence(names):
    m = tl.add_lora(tiny.zoo(), r=2, target_modules=["fc1"])
    with pytest.raises(ValueError, match=r"lora: .*(expected the name of an adapter|carries no adapter called)"):
        tl.set_adapter(m, names)
    with pytest.raises(ValueError, match="carries no adapter called"), tl.adapter_rows(m, ["default", 3]):
        pass
    assert adapters.active_adapters(m) == ("default",)


def test_a_load_that_fails_ties_the_head_again_under_an_adapter_that_brought_rows(tmp_path, rng):
    m, x, embedding = tiny.model(), tiny.ids(rng, 1, 5), "model.embed_tokens.weight"
    off = adapters.detach(tl.add_lora(m, r=2, target_modules=["v_proj"]))
    more = np.concatenate([m.get(embedding).data, np.ones((2, 32), np.float32)])
    adapters.attach(
        m, adapters.Adapter(replace(off.config, saved_embeddings=(embedding,)), off.weights, {embedding: more})
    )
    before, configs = host(m, x), dict(adapters.configs(m))
    peft.save_adapter(tl.add_lora(adapters.untie(tiny.model()), r=2, target_modules=["lm_head"]), tmp_path)
    with pytest.raises(ValueError, match="lm_head"):
        peft.load_adapter(m, tmp_path, "b", untie=True)
    assert adapters.configs(m) == configs and m.lm_head is None
    tl.set_adapter(m, "default")
    assert host(m, x).tobytes() == before.tobytes()


@pytest.mark.parametrize("fails_at", range(4))
def test_an_adapter_that_finds_no_memory_is_not_on_the_model(fails_at, rng, monkeypatch):
    m, x = two(rng, a={"modules_to_save": ["norm"]})
    off, left = adapters.detach(m, "a"), [fails_at]
    before, like = host(m, x), adapters.switch._like

    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return like(*arguments)

    monkeypatch.setattr(adapters.switch, "_like", full)
    if fails_at < 3:  # two factors and one parameter
        with pytest.raises(MemoryError):
            adapters.attach(m, off, "a")
        assert list(adapters.configs(m)) == ["b"] and host(m, x).tobytes() == before.tobytes()
    else:
        assert adapters.active_adapters(adapters.attach(m, off, "a")) == ("a",)


def test_a_combination_trains_no_biases_of_layers_that_the_first_adapter_did_not_have(rng):
    m = tiny.zoo()
    m.fc1.bias = None
    tl.add_lora(m, r=2, target_modules=["fc1"], bias="lora_only", name="a")  # a layer without a bias
    tl.add_lora(m, r=2, target_modules=["fc2"], name="b")
    tl.add_weighted_adapter(m, ["a", "b"], [1.0, 1.0], "c", "cat")
    assert adapters.adapter_of(m, "c").saved == {}


@pytest.mark.parametrize("kind", adapters.COMBINATIONS)
@pytest.mark.parametrize("weight, value", [(1e300, 1.0), (1.0, np.nan), (1.0, np.inf)])
def test_a_combination_that_is_not_finite_is_refused(kind, weight, value, rng):
    m, _ = two(rng)
    m.fc1.bypasses["b"].lora_A.weight.data[0, 0] = value
    with pytest.raises(ValueError, match="the factors of fc1 hold NaN or Inf"):
        tl.add_weighted_adapter(m, ["a", "b"], [1.0, weight], "c", kind)
    assert list(adapters.configs(m)) == ["a", "b"]


def test_no_rows_for_a_batch_of_two_is_a_sentence(rng):
    m = tl.add_lora(tiny.model(), r=2)
    with pytest.raises(ValueError, match="0 adapter names for a batch of 2 rows"), tl.adapter_rows(m, []):
        m(tiny.ids(rng, 2, 4))


def test_a_forward_of_ones_own_on_a_layer_stays():
    m = tl.add_lora(tiny.model(), r=2)
    _, layer = adapters.lora_layers(m)[0]
    layer.forward = own = lambda x: x
    tl.set_adapter(m, "default")
    assert layer.forward is own


@pytest.mark.parametrize("make", [lambda: tl.LoRALinear(nn.Linear(4, 4), r=2), lambda: nn.Embedding(4, 4)])
def test_only_linear_layers_get_the_linear_bypass(make):
    with pytest.raises(TypeError, match="is not one of nn's linear layers"):
        tl.LoRALinear(make(), r=2)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"lora_alpha": "512"}, r"adapter_config\.json: lora_alpha = '512', expected a finite number"),
        ({"lora_alpha": float("inf")}, r"adapter_config\.json: lora_alpha = inf"),
        (
            {"target_modules": ["q_proj"]},
            r"adapter_config\.json: the file has factors for .*\(target_modules\)",
        ),
        ({"r": 1}, r"adapter_config\.json or adapter_model\.safetensors: .* with r = 1 needs"),
        ({"modules_to_save": "nothing"}, r"adapter_config\.json or .*: lora: modules_to_save names 'nothing'"),
    ],
)
def test_a_sentence_on_an_adapter_names_its_files_and_the_field(tmp_path, changes, sentence):
    peft.save_adapter(tl.add_lora(tiny.model(), r=2, alpha=4), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(ValueError, match=sentence):
        peft.load_adapter(tiny.model(), tmp_path)
