"""PEFT as a witness: the same adapters, opened by either side, compute the same; and the places where PEFT misleads, shown.

The model is tests/tiny.py's zoo (an embedding, linear layers with biases, a norm, a head), and a small convolutional
one, each with a twin in torch that has the same parameter names. Tolerances are for products added in another order.
"""

import math
import os
import warnings

import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import adapters, backend, nn
from tinylora.adapters.conv import Conv1d, Conv2d, Conv3d
from tinylora.interop import peft as adapter_files

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::UserWarning")]


class TorchZoo(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 8)
        self.fc1, self.fc2 = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
        self.norm, self.head = torch.nn.RMSNorm(8, eps=1e-5), torch.nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.fc2(torch.relu(self.fc1(x)))
        return self.head(self.norm(x))


class TorchConvs(torch.nn.Module):
    def __init__(self, axes):
        super().__init__()
        self.conv = getattr(torch.nn, f"Conv{axes}d")(4, 6, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Convs(nn.Module):
    def __init__(self, axes):
        self.conv = (Conv1d, Conv2d, Conv3d)[axes - 1](4, 6, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


def twin(ours, theirs):
    """theirs with ours' weights."""
    state = {name: torch.from_numpy(w.data.copy()) for name, w in ours.named_parameters()}
    assert state.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(state)
    return theirs


def pair(kind):
    """(ours, theirs, an input) of one architecture."""
    if kind == "zoo":
        ours = tiny.zoo()
        return ours, twin(ours, TorchZoo()), np.random.default_rng(1).integers(0, 20, (6, 4))
    axes = int(kind[4])
    backend.seed(0)
    ours = Convs(axes)
    x = np.random.default_rng(1).standard_normal((2, 4, *(9, 8, 5)[:axes])).astype(np.float32)
    return ours, twin(ours, TorchConvs(axes)), x


def run(model, x, **kwargs):
    if isinstance(model, torch.nn.Module):
        model.eval()
        with torch.no_grad():
            return model(torch.from_numpy(x), **kwargs).numpy()
    return model.eval()(x).numpy()


def agree(a, b, bound=1e-5, what="outputs"):
    error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
    print(f"{what}: {error:.1e}")
    assert error < bound, what


def randomize(theirs, rng):
    """Other values for all that PEFT trains."""
    for _, p in theirs.named_parameters():
        if p.requires_grad:
            p.data = torch.from_numpy((0.4 * rng.standard_normal(p.shape)).astype(np.float32))
    return theirs


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"fc2": 3}, "alpha_pattern": {"f.*1": 5}},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "saved": {"modules_to_save": ["head", "norm"]},
    "saved and bias": {"modules_to_save": ["head"], "bias": "lora_only"},
    "embedding": {"target_modules": ["embed", "fc1"]},
    "dora on an embedding": {"target_modules": ["embed"], "use_dora": True},
    "dora, rslora, saved": {"use_dora": True, "use_rslora": True, "modules_to_save": ["head"]},
}
CONVS = {f"{kind}, {axes}-d": (f"conv{axes}", options)
         for axes in (1, 2, 3)
         for kind, options in {"plain": {}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}.items()}  # fmt: skip
CASES = {name: ("zoo", options) for name, options in KINDS.items()} | CONVS


def options_of(kind, options):
    targets = options.get("target_modules", ["fc1", "fc2"] if kind == "zoo" else ["conv"])
    return {"r": 2, "target_modules": targets, **{k: v for k, v in options.items() if k != "target_modules"}}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_computes_the_same_here_and_survives_the_way_back(case, rng, tmp_path):
    kind, options = CASES[case]
    ours, base, x = pair(kind)
    torch.manual_seed(0)
    theirs = randomize(peft.get_peft_model(base, peft.LoraConfig(lora_alpha=7, **options_of(kind, options))), rng)
    wanted = run(theirs, x)
    theirs.save_pretrained(tmp_path / "theirs")
    plain = run(ours, x)
    adapter_files.load_adapter(ours, tmp_path / "theirs")
    agree(run(ours, x), wanted, what=f"{case}, opened here")
    assert np.abs(wanted - plain).max() > 1e-2
    assert adapters.count_parameters(ours)[0] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    adapter_files.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(pair(kind)[1], tmp_path / "ours")
    assert run(again, x).tobytes() == run(theirs, x).tobytes()


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_made_here_computes_the_same_in_peft_and_merges_alike(case, rng, tmp_path):
    kind, options = CASES[case]
    ours, base, x = pair(kind)
    tiny.randomize_trainable(tl.add_lora(ours, alpha=7, **options_of(kind, options)), rng)
    adapter_files.save_adapter(ours, tmp_path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert not [str(w.message) for w in heard if "missing" in str(w.message) or "nexpected" in str(w.message)]
    agree(run(theirs, x), run(ours, x), what=f"{case}, opened in PEFT")
    merged = theirs.merge_and_unload()
    agree(run(tl.merge(ours), x), run(merged, x), what=f"{case}, merged by each")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "lora_dropout": 0.0}])
def test_gradients_are_pefts(options, rng, tmp_path):
    ours, base, x = pair("zoo")
    theirs = randomize(
        peft.get_peft_model(
            base, peft.LoraConfig(r=3, lora_alpha=7, target_modules=["embed", "fc1", "fc2"], **options)
        ),
        rng,
    )
    theirs.save_pretrained(tmp_path)
    adapter_files.load_adapter(ours, tmp_path)
    g = rng.standard_normal((6, 4, 5)).astype(np.float32)
    theirs(torch.from_numpy(x)).backward(torch.from_numpy(g))
    ours(x).backward(g)
    named = dict(theirs.named_parameters())
    compared = 0
    for path, layer in adapters.lora_layers(ours):
        embedding = path == "embed"
        bypass = layer.bypasses["default"]
        for factor in ("lora_A", "lora_B"):
            key = f"base_model.model.{path}." + (
                f"lora_embedding_{factor[-1]}.default" if embedding else f"{factor}.default.weight"
            )
            agree(getattr(bypass, factor).weight.grad, named[key].grad.numpy(), 1e-4, f"{path} {factor}")
            compared += 1
        if options.get("use_dora"):
            key = f"base_model.model.{path}.lora_magnitude_vector.default.weight"
            agree(bypass.magnitude.grad, named[key].grad.numpy(), 1e-4, f"{path} magnitude")
    assert compared == 6


# ---------------------------------------------------------------------------------------------------------- several adapters
def several(rng, tmp_path, b=("embed", "fc1"), **options):
    """(ours, theirs, x) with the adapters default, b, c; random; default active."""
    ours, base, x = pair("zoo")
    config = {"default": (2, ["fc1", "fc2"]), "b": (2, list(b)), "c": (3, ["fc1", "fc2"])}
    theirs = None
    for name, (r, targets) in config.items():
        c = peft.LoraConfig(r=r, lora_alpha=2 * r + 1, target_modules=targets, **options)
        if theirs is None:
            theirs = peft.get_peft_model(base, c)
        else:
            theirs.add_adapter(name, c)
    for name in config:
        theirs.set_adapter(name)
        randomize(theirs, rng)
    theirs.set_adapter("default")
    theirs.save_pretrained(tmp_path)
    for name in config:
        adapter_files.load_adapter(ours, tmp_path if name == "default" else tmp_path / name, name)
    tl.set_adapter(ours, "default")
    return ours, theirs, x


def test_add_set_sum_disable_and_delete_do_what_pefts_do(rng, tmp_path):
    ours, theirs, x = several(rng, tmp_path)
    for names in (["default"], ["b"], ["c"], ["default", "c"], ["default", "b", "c"]):
        tl.set_adapter(ours, names)
        theirs.base_model.set_adapter(names)
        agree(run(ours, x), run(theirs, x), what=f"active: {names}")
        trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
        assert len(trained) == len(ours.trainable())
    with tl.disable_adapter(ours), theirs.disable_adapter():
        agree(run(ours, x), run(theirs, x), what="disabled")


def test_deleting_the_active_adapter_falls_back_as_pefts_does(rng, tmp_path):
    ours, theirs, x = several(rng, tmp_path, b=("fc1", "fc2"))
    theirs.set_adapter("c")
    tl.set_adapter(ours, "c")
    theirs.delete_adapter("c")
    adapters.delete_adapter(ours, "c")
    assert theirs.active_adapters == list(adapters.active_adapters(ours)) == ["b"]  # the first in the alphabet
    agree(run(ours, x), run(theirs, x), what="after deleting the active adapter")


def test_several_adapters_saved_here_open_in_peft(rng, tmp_path):
    ours, _, x = several(rng, tmp_path / "theirs")
    adapter_files.save_adapters(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(pair("zoo")[1], tmp_path / "ours")
    for name in ("b", "c"):
        theirs.load_adapter(tmp_path / "ours" / name, name)
    for names in (["default"], ["b"], ["c"], ["default", "b", "c"]):
        tl.set_adapter(ours, names)
        theirs.base_model.set_adapter(names)
        agree(run(theirs, x), run(ours, x), what=f"active in PEFT: {names}")


def test_a_batch_with_an_adapter_for_each_row_is_pefts(rng, tmp_path):
    ours, theirs, x = several(rng, tmp_path)
    names = ["c", "__base__", "default", "b", "c", "default"]
    with tl.adapter_rows(ours, names):
        agree(run(ours, x), run(theirs, x, adapter_names=names), what="rows")


@pytest.mark.parametrize(
    "kind, names", [("cat", "abc"), ("svd", "abc"), ("svd 7", "abc"), ("linear", "ab"), ("cat", "a")]
)
def test_weighted_adapters_are_pefts(kind, names, rng, tmp_path):
    ours, theirs, x = several(rng, tmp_path)
    names, weights = [{"a": "default"}.get(n, n) for n in names], [0.7, -0.4, 1.5][: len(names)]
    how, _, rank = kind.partition(" ")
    rank = {"svd_rank": int(rank)} if rank else {}
    tl.add_weighted_adapter(ours, names, weights, "n", how, **rank)
    theirs.add_weighted_adapter(names, weights, "n", how, **rank)
    tl.set_adapter(ours, "n")
    theirs.set_adapter("n")
    assert adapters.configs(ours)["n"].r == theirs.peft_config["n"].r
    agree(run(ours, x), run(theirs, x), 1e-4, f"{kind} of {names}")
    theirs.save_pretrained(tmp_path / "all")
    alone = adapter_files.load_adapter(tiny.zoo(), tmp_path / "all" / "n")
    agree(run(alone, x), run(theirs, x), 1e-4, "the combination, from PEFT's file")


@pytest.mark.parametrize("options", [{"bias": "all"}, {"modules_to_save": ["fc1"]}])
def test_one_of_several_opens_alone_in_peft(options, rng, tmp_path):
    ours, base, x = pair("zoo")
    tl.add_lora(ours, r=2, target_modules=["fc1"], name="a")
    tl.add_lora(ours, r=2, target_modules=["fc2"], name="b", **options)
    tl.set_adapter(ours, "b")
    tiny.randomize_trainable(ours, rng)
    adapter_files.save_adapter(ours, tmp_path, name="b")
    agree(run(peft.PeftModel.from_pretrained(base, tmp_path), x), run(ours, x), what="b alone, in PEFT")


def test_a_gaussian_start_with_lora_bias_opens_in_peft(rng, tmp_path):
    ours, base, x = pair("zoo")
    tiny.randomize_trainable(tl.add_lora(ours, r=2, target_modules=["fc1"], init="gaussian", lora_bias=True), rng)
    adapter_files.save_adapter(ours, tmp_path)
    agree(run(peft.PeftModel.from_pretrained(base, tmp_path), x), run(ours, x))


@pytest.mark.parametrize("target, tied", [("embed_tokens", True), ("embed_tokens", False), ("lm_head", False)])
def test_an_adapted_embedding_or_head_of_a_transformers_model_opens_here(target, tied, rng, tmp_path):
    """PEFT then adds the base's own embedding or head to the file; here it is compared with the model's."""
    transformers = pytest.importorskip("transformers")
    ours, x = tiny.model(tie_word_embeddings=tied), rng.integers(0, 256, (2, 9))
    ours.save_pretrained(tmp_path / "base", dtype="float32")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = randomize(
        peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj", target])), rng
    )
    theirs.save_pretrained(tmp_path / "adapter")
    theirs.eval()
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(x)).logits.numpy()
    agree(run(adapter_files.load_adapter(ours, tmp_path / "adapter"), x), wanted, 1e-4, f"{target}, tied: {tied}")
    with pytest.raises(ValueError, match="is not this model's"):
        adapter_files.load_adapter(tiny.model(seed=1, tie_word_embeddings=tied), tmp_path / "adapter")


# ------------------------------------------------------------------------------------------------------------- whole Llamas
def llamas(tmp_path, tied=True, layers=2):
    """(a folder, a function that opens it with transformers)."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "base"
    tiny.model(tie_word_embeddings=tied, num_hidden_layers=layers).save_pretrained(folder, dtype="float32")
    return folder, lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained_by_peft(base, folder, **options):
    """An adapter of PEFT's with random weights, saved; returns the PeftModel."""
    options = {"r": 2, "lora_alpha": 7, "task_type": "CAUSAL_LM", **options}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options))
    for _, p in theirs.named_parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))  # in place: tied parameters stay tied
    theirs.save_pretrained(folder)
    return theirs.eval()


def logits(theirs, x):
    with torch.no_grad():
        return theirs(torch.from_numpy(x)).logits.numpy()


def adapted(theirs):
    """The paths that PEFT adapts."""
    return set(theirs.base_model.targeted_module_names)


SELECTIONS = {
    "expression, excluded names": {"target_modules": r".*_proj", "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "names, excluding expression": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*q_proj"},
    "all-linear, excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.2.mlp.up_proj"]},
    "numbers": {"target_modules": ["q_proj", "mlp.down_proj"], "layers_to_transform": [0, 2]},
    "number and pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "a whole path and numbers": {
        "target_modules": ["up_proj", "model.layers.0.self_attn.q_proj"],
        "layers_to_transform": [2],
    },
    "saved modules take targets away": {
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["layers.1.mlp.up_proj"],
    },
    "patterns": {"target_modules": r".*layers\.[12]\..*_proj", "rank_pattern": {"q_proj": 3, r"2\.mlp\..*": 4}},
}


@pytest.mark.parametrize("way", SELECTIONS)
def test_a_selection_is_read_as_peft_means_it_and_written_so_that_peft_reads_it(way, rng, tmp_path):
    folder, fresh = llamas(tmp_path, layers=3)
    theirs = trained_by_peft(fresh(), tmp_path / "a", **SELECTIONS[way])
    ours = adapter_files.load_adapter(tl.Llama.from_pretrained(folder), tmp_path / "a")
    assert {path for path, _ in adapters.lora_layers(ours)} == adapted(theirs)
    x = rng.integers(0, 256, (2, 9))
    agree(run(ours, x), logits(theirs, x), 1e-5, "opened here")
    adapter_files.save_adapter(ours, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "b").eval()
    assert adapted(again) == adapted(theirs)
    assert logits(again, x).tobytes() == logits(theirs, x).tobytes()
    options = {
        name: value for name, value in SELECTIONS[way].items() if name.endswith(("modules", "transform", "pattern"))
    }
    if "modules_to_save" not in SELECTIONS[way]:  # a new adapter with these words adapts the same layers
        selection = {name: value for name, value in options.items() if not name.startswith(("rank", "alpha"))}
        assert set(adapters.find_targets(tl.Llama.from_pretrained(folder), **selection)) == adapted(theirs)


@pytest.mark.parametrize("whole", ["norm", "proj", "post_attention_layernorm", "1.input_layernorm"])
def test_modules_to_save_mean_what_peft_means_by_them(whole, rng, tmp_path):
    """PEFT compares the bare end of a path: "norm" is every …layernorm too."""
    folder, fresh = llamas(tmp_path)
    targets = ["embed_tokens"] if whole == "proj" else ["q_proj"]
    theirs, x = (
        trained_by_peft(fresh(), tmp_path / "a", target_modules=targets, modules_to_save=[whole]),
        rng.integers(0, 256, (1, 9)),
    )
    ours = adapter_files.load_adapter(tl.Llama.from_pretrained(folder), tmp_path / "a")
    agree(run(ours, x), logits(theirs, x), 1e-5, whole)
    mine = tl.add_lora(tl.Llama.from_pretrained(folder), r=2, target_modules=targets, modules_to_save=[whole])
    assert adapters.count_parameters(mine)[0] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    adapter_files.save_adapter(tiny.randomize_trainable(mine, rng), tmp_path / "b")
    agree(
        logits(peft.PeftModel.from_pretrained(fresh(), tmp_path / "b").eval(), x),
        run(mine, x),
        1e-4,
        f"{whole}, in PEFT",
    )


def test_every_setting_that_peft_writes_is_known(tmp_path):
    import dataclasses

    known = {*adapter_files._KNOWN, *adapter_files._REFUSED}
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} <= known


TOUCHES = {  # what an adapter may do to an embedding and a head
    "nothing": {},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "both adapted": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "some rows": {"trainable_token_indices": [3, 5]},
    "some rows, the head adapted": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3, 5]},
    "some rows of the head": {"trainable_token_indices": {"lm_head": [3, 5]}},
    "the same rows of both": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}},
    "other rows of each": {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 6, 7]}},
    "saved and kept tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "adapted and kept tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
}
#: Where the base has got new rows, PEFT's file lacks those of the embedding or of the head: (what, tied)
LACKING = {(what, False) for what in ("embedding adapted", "head adapted", "adapted and kept tied")}
LACKING |= {("some rows, the head adapted", tied) for tied in (True, False)}


@pytest.mark.parametrize("rows", [256, 262])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("what", TOUCHES)
def test_what_an_adapter_does_to_embedding_and_head_is_done_here(what, tied, rows, rng, tmp_path, capsys):
    """Opened, switched off, saved again, opened in PEFT, and merged by the command line; rows: of the embedding after tokens were added."""
    from tinylora.cli import main

    folder, fresh = llamas(tmp_path, tied)

    def resized():
        base = fresh()
        if rows > 256:
            torch.manual_seed(int(rng.integers(1 << 30)))
            base.resize_token_embeddings(rows)
        return base

    theirs = trained_by_peft(resized(), tmp_path / "a", **{"target_modules": ["q_proj"], **TOUCHES[what]})
    x = rng.integers(0, rows, (2, 20))
    wanted, ours = logits(theirs, x), tl.Llama.from_pretrained(folder)
    if rows > 256 and (what, tied) in LACKING:
        with pytest.raises(ValueError, match=r"resize_token_embeddings\(262\), then save_pretrained"):
            adapter_files.load_adapter(ours, tmp_path / "a", untie=True)
        ours = tiny.model(tie_word_embeddings=tied, vocab_size=rows)  # what the sentence says
        state = {name: w.numpy() for name, w in resized().state_dict().items() if not (tied and "lm_head" in name)}
        ours.load_state_dict(state)
        adapter_files.load_adapter(ours, tmp_path / "a", untie=True)
        known = logits(theirs, x % 256)[..., :256]
        agree(run(ours, x % 256)[..., :256], known, 1e-5, "on a resized base")
        return
    adapter_files.load_adapter(ours, tmp_path / "a", untie=True)
    agree(run(ours, x), wanted, 1e-5, "opened here")
    with tl.disable_adapter(ours):
        assert run(ours, x % 256).tobytes() == run(tl.Llama.from_pretrained(folder), x % 256).tobytes()
    adapter_files.save_adapter(ours, tmp_path / "b")
    again = adapter_files.load_adapter(tl.Llama.from_pretrained(folder), tmp_path / "b", untie=True)
    assert run(again, x).tobytes() == run(ours, x).tobytes()
    agree(logits(peft.PeftModel.from_pretrained(resized(), tmp_path / "b").eval(), x), wanted, 1e-5, "in PEFT again")
    merge = ["merge", "--model", str(folder), "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "merged")]
    assert main(merge) == 0, capsys.readouterr()
    transformers = pytest.importorskip("transformers")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    agree(logits(merged, x), wanted, 1e-5, "merged")


def test_save_embedding_layers_opens_whether_the_base_has_them_or_not(rng, tmp_path):
    folder, fresh = llamas(tmp_path)
    base = fresh()
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "same", save_embedding_layers=True)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(1.5)  # trained by other means than PEFT's
    theirs.save_pretrained(tmp_path / "other", save_embedding_layers=True)
    x = rng.integers(0, 256, (1, 9))
    ours = adapter_files.load_adapter(tl.Llama.from_pretrained(folder), tmp_path / "other")
    agree(run(ours, x), logits(theirs.eval(), x), 1e-5, "other embeddings")
    assert adapters.configs(ours)["default"].saved_embeddings == ("model.embed_tokens.weight",)
    same = adapter_files.load_adapter(tl.Llama.from_pretrained(folder), tmp_path / "same")
    assert adapters.configs(same)["default"].saved_embeddings == ()


def test_an_adapter_that_was_saved_in_16_bits_knows_its_base_in_32(rng, tmp_path):
    """PEFT then writes the base's embedding rounded to bfloat16."""
    transformers = pytest.importorskip("transformers")
    folder, _ = llamas(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(target_modules=["embed_tokens", "q_proj"]), autocast_adapter_dtype=False
    )
    theirs.save_pretrained(tmp_path / "a")
    adapter_files.load_adapter(tl.Llama.from_pretrained(folder), tmp_path / "a")
    other = tiny.model(seed=1)
    with pytest.raises(ValueError, match="is not this model's"):
        adapter_files.load_adapter(other, tmp_path / "a")


def test_peft_reads_what_says_the_base_as_if_it_were_not_there(rng, tmp_path):
    folder, fresh = llamas(tmp_path)
    m = tl.add_lora(tl.Llama.from_pretrained(folder, quantize="nf4"), r=2)
    adapter_files.save_adapter(tiny.randomize_lora(m, rng), tmp_path / "a", str(folder))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / "a")
    assert not [
        str(w.message) for w in heard if issubclass(w.category, UserWarning) and "FutureWarning" not in str(w.category)
    ]
    theirs.save_pretrained(tmp_path / "b")  # PEFT drops it
    assert (
        adapter_files.read_base(tmp_path / "a").held["code"] == "nf4"
        and adapter_files.read_base(tmp_path / "b").about is None
    )


# ------------------------------------------------------------------------------------------------------- where PEFT misleads
def test_peft_drops_alpha_silently_when_a_config_lacks_it(rng, tmp_path):
    """Its default is 8, whatever the adapter was trained with: the bypass comes out 8/alpha times as large, without a word."""
    import json

    ours, base, _ = pair("zoo")
    tiny.randomize_trainable(tl.add_lora(ours, r=2, alpha=32, target_modules=["fc1"]), rng)
    adapter_files.save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert theirs.base_model.model.fc1.scaling["default"] == 8 / 2 == ours.fc1.scaling * 8 / 32
    assert adapter_files.read_adapter(tmp_path).config.alpha == 8  # the same file means the same here


def test_peft_cannot_open_its_own_file_if_two_patterns_match_a_layer(tmp_path):
    """The first pattern wins, and its file sorts them: another one is first when it is read."""
    config = peft.LoraConfig(r=2, target_modules=["fc1", "fc2"], rank_pattern={"fc2": 3, "f.*": 4})
    theirs = peft.get_peft_model(pair("zoo")[1], config)
    assert theirs.base_model.model.fc2.r["default"] == 3
    theirs.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(pair("zoo")[1], tmp_path)
    with pytest.raises(ValueError, match=r"fc2 are lora_A \(3, 12\).* with r = 4 needs"):
        adapter_files.load_adapter(tiny.zoo(), tmp_path)


def test_peft_lets_each_layer_choose_after_a_deletion_and_here_the_model_does(rng, tmp_path):
    """With adapters on different layers, PEFT's layers fall back to different ones; the model reports the first layer's choice."""
    ours, theirs, _ = several(rng, tmp_path)
    theirs.set_adapter("c")
    tl.set_adapter(ours, "c")
    theirs.delete_adapter("c")
    adapters.delete_adapter(ours, "c")
    layers = theirs.base_model.model
    assert (layers.fc1.active_adapters, layers.fc2.active_adapters) == (["b"], ["default"])
    assert adapters.active_adapters(ours) == ("b",) and (ours.fc1.active, ours.fc2.active) == (("b",), ())


def test_peft_multiplies_a_combination_of_rslora_adapters_by_the_root_of_its_rank(rng, tmp_path):
    """The new adapter keeps use_rslora, with alpha = r: its scaling is √r instead of 1."""
    ours, theirs, _ = several(rng, tmp_path, use_rslora=True)
    tl.add_weighted_adapter(ours, ["default", "c"], [1.0, 1.0], "n", "cat")
    theirs.add_weighted_adapter(["default", "c"], [1.0, 1.0], "n", "cat")
    wanted = sum(ours.fc1.bypasses[n].delta(ours.fc1.base_layer) for n in ("default", "c"))
    agree(ours.fc1.bypasses["n"].delta(ours.fc1.base_layer), wanted, 1e-5, "here")
    agree(
        theirs.base_model.model.fc1.get_delta_weight("n").detach().numpy(), wanted * math.sqrt(5), 1e-5, "PEFT, over √5"
    )


def test_peft_forgets_the_scale_of_lora_bias_when_it_merges_into_4_bits(rng):
    """Its forward and its dense merge add s b, its 4-bit merge adds b."""
    layer = nn.Linear(64, 32, bias=True)
    theirs = torch.nn.Sequential(bnb.nn.Linear4bit(64, 32, bias=True, quant_type="nf4", compute_dtype=torch.float32))
    theirs[0].weight = bnb.nn.Params4bit(torch.from_numpy(layer.dense().copy()), requires_grad=False, quant_type="nf4")
    theirs = theirs.to("cpu")
    theirs.is_loaded_in_4bit = True
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=32, target_modules=["0"], lora_bias=True))
    b = rng.standard_normal(32).astype(np.float32)
    wrapped = theirs.base_model.model[0]
    wrapped.lora_B["default"].bias.data = torch.from_numpy(b.copy())
    before = wrapped.base_layer.bias.detach().numpy().copy()
    zero = torch.zeros(1, 64)
    agree(theirs(zero).detach().numpy()[0], before + 8 * b, 1e-5, "PEFT's forward adds s b")
    merged = theirs.merge_and_unload()[0].bias.detach().numpy()
    agree(merged, before + b, 1e-6, "PEFT's merge adds b")
    ours = tl.LoRALinear(nn.Linear4bit.of(layer, "nf4", 64, False), r=4, alpha=32, lora_bias=True)
    ours.lora_B.bias.data = b
    agree(ours.merge().bias.data, layer.bias.data + 8 * b, 1e-6, "here s b is merged")


def test_peft_lets_dora_rescale_whatever_was_added_before_it(rng, tmp_path):
    """In PEFT's forward DoRA's base is the sum so far, other adapters included, unless dropout is on; merged in turn it is so too.
    Here each adapter's change belongs to the base alone, so the order does not matter."""
    ours, base, x = pair("zoo")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=7, target_modules=["fc1"]))
    theirs.add_adapter("dora", peft.LoraConfig(r=2, lora_alpha=7, target_modules=["fc1"], use_dora=True))
    for name in ("default", "dora"):
        theirs.set_adapter(name)
        randomize(theirs, rng)
    theirs.save_pretrained(tmp_path)
    adapter_files.load_adapter(ours, tmp_path)
    adapter_files.load_adapter(ours, tmp_path / "dora", "dora")
    outputs = {}
    for names in (["default"], ["dora"], ["default", "dora"], ["dora", "default"]):
        tl.set_adapter(ours, names)
        theirs.base_model.set_adapter(names)
        outputs[tuple(names)] = run(ours, x), run(theirs, x)
    for names in (("default",), ("dora",), ("dora", "default")):
        agree(*outputs[names], 1e-5, str(names))
    mine, peftes = outputs["default", "dora"]
    agree(mine, outputs["dora", "default"][0], 1e-5, "here, in either order")
    assert np.abs(peftes - mine).max() > 1e-2


def test_a_dilated_convolution_fails_in_peft_and_works_here(rng):
    theirs = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, dilation=2))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["0"]))
    x = rng.standard_normal((1, 4, 9, 9)).astype(np.float32)
    with pytest.raises(RuntimeError, match="size of tensor"):
        theirs(torch.from_numpy(x))
    h = tl.lora.LoRAConv(Conv2d(4, 6, 3, dilation=2), r=2)
    assert h(x).shape == (1, 6, 5, 5)
