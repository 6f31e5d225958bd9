"""switch, ranks, merge, count, experiments: what they print, write, resume and refuse."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny

from tinylora import adapters, data
from tinylora.cli import main
from tinylora.interop import peft
from tinylora.models.llama import Llama
from tinylora.papers import ranks, switching

QUICK = ["--batch-size", "2", "--seq-len", "32", "--warmup", "2", "--steps", "3"]


@pytest.fixture
def folder(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model", dtype="float32")
    for name, word in (("one", "spam "), ("two", "eggs ")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{word * 20}{i}" for i in range(60)))
    return tmp_path


def switch(folder, *more):
    texts = [str(folder / "one.txt"), str(folder / "two.txt")]
    command = ["switch", "--model", str(folder / "model"), "--texts", *texts, "--out", str(folder / "out")]
    return main([*command, *QUICK, "-r", "2", "--max-new-tokens", "5", *more])


def test_switch_prints_scores_pieces_and_the_price_of_each_way(folder, capsys, monkeypatch):
    assert switch(folder, "--pieces", "3") == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^--- (\w+)", printed, re.M) == ["one", "two", "one"]
    for row in ("base", "one", "two"):
        assert re.search(rf"^{row} +\d+\.\d{{4}} +\d+\.\d{{4}}$", printed, re.M)
    adapter = peft.read_adapter(folder / "out" / "two" / "adapter")
    moved = {way: int(n.replace(",", "")) for way, n in re.findall(r"^(\S.*?)  +([\d,]+)(?: |$)", printed, re.M)}
    assert moved["set_adapter, both on the base"] == 0 and moved["A and B read from disk"] == adapter.nbytes
    assert moved["merged anew, W₀ + s B A"] < moved["a whole fine-tuned model"]
    assert "the base's bits are unchanged" in printed
    error = float(re.search(r"largest difference (\S+)$", printed, re.M)[1])
    assert error < 1e-4
    # the adapters are there: only the switching is done again
    monkeypatch.setattr("tinylora.training.finetune.fit", None)
    assert switch(folder, "--prompts", "x", "y") == 0
    pieces = re.findall(r"^--- (\w+)", capsys.readouterr().out, re.M)
    assert pieces == ["one", "two", "one", "two"]


def test_two_adapters_predict_their_own_texts_best(folder):
    texts = {name: folder / f"{name}.txt" for name in ("one", "two")}
    job = switching.replace(switching.JOB, model=str(folder / "model"), r=2)
    recipe = switching.replace(switching.RECIPE, batch_size=4, seq_len=32, steps=40, lr=1e-2)
    folders = switching.train(texts, folder / "out", job, recipe, progress=False)
    shown = switching.demonstrate(texts, folders, job, recipe, tokens=2, pieces=1, progress=False)
    for mine, other in (("one", "two"), ("two", "one")):
        assert shown.scores[mine, mine] < min(shown.scores[other, mine], shown.scores["base", mine])


def test_a_base_that_changed_while_switching_is_said(folder, monkeypatch):
    monkeypatch.setattr(switching, "_restored", lambda model: model.model.norm.weight.data.__imul__(2) is None)
    assert switch(folder) == 2


def test_the_fingerprint_sees_every_part_of_a_4_bit_weight():
    import tinylora as tl

    m = tl.quantize_linears(tiny.model())
    seen = {switching.fingerprint(m)}
    q = m.model.layers[0].mlp.up_proj.weight
    for array in (q.packed, q.absmax_codes, m.model.norm.weight.data):
        array.reshape(-1)[0] += 1
        seen.add(switching.fingerprint(m))
    assert len(seen) == 4


def test_switch_wants_two_names(folder, capsys):
    (folder / "sub").mkdir()
    (folder / "sub" / "one.txt").write_text("x" * 2000)
    texts = [str(folder / "one.txt"), str(folder / "sub" / "one.txt")]
    assert main(["switch", "--model", str(folder / "model"), "--texts", *texts, "--out", str(folder / "out")]) == 2
    assert "which need two names, neither of them 'base'" in capsys.readouterr().err


def test_own_source_is_the_frozen_text_to_the_byte(tmp_path):
    path = switching.own_source(tmp_path)
    assert path.read_bytes() == data.source()
    text = path.read_text(encoding="utf-8")
    assert "def own_source(folder):" in text and "class LoRALinear(LoRALayer):" in text and len(text) > 300_000


def test_ranks_prints_one_line_a_rank_and_reads_finished_runs(folder, capsys, monkeypatch):
    command = ["ranks", "--model", str(folder / "model"), "--text", str(folder / "one.txt"), *QUICK]
    command += ["-r", "1", "2", "--seeds", "0", "1", "--out", str(folder / "ranks")]
    assert main(command) == 0
    first = capsys.readouterr().out
    for label in ranks.TARGETS:
        assert f"\n{label}\n" in first
    assert len(re.findall(r"r = [12] +\d\.\d{4} ± \d\.\d{4}   \([\d,]+\)", first)) == 4
    c = tiny.CONFIG
    qv = c.num_hidden_layers * (c.hidden_size * 2 + c.hidden_size + c.num_key_value_heads * c.head_dim)
    assert f"({qv:,})" in first and f"({2 * qv:,})" in first
    assert (folder / "ranks" / "ranks.svg").is_file()
    monkeypatch.setattr("tinylora.training.finetune.fit", None)
    assert main(command) == 0
    assert capsys.readouterr().out == first


def test_merge_into_a_dense_base(folder, capsys, rng):
    m = tiny.randomize_lora(adapters.add_lora(Llama.from_pretrained(folder / "model"), r=2), rng)
    peft.save_adapter(m, folder / "adapter")
    command = ["merge", "--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--out"]
    assert main([*command, str(folder / "merged")]) == 0
    assert "error of merging" not in capsys.readouterr().out
    x = tiny.ids(rng, 1, 9)
    np.testing.assert_allclose(
        tiny.logits(Llama.from_pretrained(folder / "merged"), x), tiny.logits(m, x), rtol=1e-3, atol=1e-4
    )


def test_merge_into_4_bits_prints_what_it_costs(folder, capsys, rng):
    m = tiny.randomize_lora(adapters.add_lora(Llama.from_pretrained(folder / "model"), r=2), rng)
    peft.save_adapter(m, folder / "adapter")
    command = ["merge", "--model", str(folder / "model"), "--adapter", str(folder / "adapter")]
    assert main([*command, "--quantize", "nf4", "--out", str(folder / "merged")]) == 0
    printed = capsys.readouterr().out
    errors = re.findall(r"^  (model\.layers\S+) +(0\.\d{4})$", printed, re.M)
    assert len(errors) == 14 and re.search(r"^  mean +0\.\d{4}$", printed, re.M)
    assert all(0.02 < float(e) < 0.3 for _, e in errors)
    again = Llama.from_pretrained(folder / "merged")
    assert len(adapters.merge_errors(again)) == 0 and again.model.layers[0].mlp.up_proj.weight.code_name == "nf4"


def test_count_prints_the_audit(capsys):
    from tinylora.papers import lora_numbers

    assert main(["count"]) == 0
    assert capsys.readouterr().out.strip() == f"{lora_numbers.describe()}\n\n{lora_numbers.post()[0]}".strip()


def test_experiments_by_name(capsys):
    assert main(["experiments", "--list"]) == 0
    assert "rank_sweep" in capsys.readouterr().out
    assert main(["experiments", "invariance", "--seeds", "0"]) == 0
    assert "holds" in capsys.readouterr().out
    assert main(["experiments", "nothing"]) == 2
    assert "there is no 'nothing'" in capsys.readouterr().err


def test_the_page_of_claims_has_a_section_and_a_figure_for_each(tmp_path, capsys):
    assert main(["experiments", "invariance", "two_seeds", "vera_counts", "--seeds", "0", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == 3 and page.count("* verdict: **") == 3
    assert re.findall(r"!\[.*\]\((.*)\)", page) == ["invariance.svg", "two_seeds.svg"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("invariance.svg", "two_seeds.svg"))


def test_every_claim_of_the_paper_has_a_figure_and_the_committed_page_has_them_all():
    from tinylora.papers import claims

    figures = {e.draw.file: (name, *e.draw.beside) for name, e in claims.EXPERIMENTS.items() if e.draw}
    drawn = {name for needed in figures.values() for name in needed}
    assert set(claims.EXPERIMENTS) - drawn == {"vera_counts", "lora_plus_start"}  # a count, and an equality
    folder = Path(__file__).parent.parent / "figures" / "claims"
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert {f"{name}.svg" for name in figures} == {p.name for p in folder.glob("*.svg")}
    for name, e in claims.EXPERIMENTS.items():
        assert f"## {e.title}\n" in page, name


def test_finetune_takes_rslora_and_dora(folder, capsys):
    command = ["finetune", "--model", str(folder / "model"), "--text", str(folder / "one.txt"), *QUICK, "-r", "4"]
    assert main([*command, "--rslora", "--dora", "--out", str(folder / "run")]) == 0
    config = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["use_dora"]
    m = peft.load_adapter(Llama.from_pretrained(folder / "model"), folder / "run" / "adapter")
    layer = m.model.layers[0].mlp.up_proj
    assert layer.scaling == 16.0 and layer.magnitude.shape == (tiny.CONFIG.intermediate_size,)
