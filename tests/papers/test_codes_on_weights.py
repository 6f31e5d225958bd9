"""tinylora quantize and tinylora nf4: what is measured, what is written, what is printed."""

import json

import numpy as np
import pytest
import tiny

from tinylora import cli, codebooks, quantize
from tinylora.models import files, fourbit, safetensors
from tinylora.numerics import optimality
from tinylora.papers import codes_on_weights, nf4_construction


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path, rng):
    """A checkpoint of no known architecture: one normal weight, one heavy-tailed, an embedding and a norm."""
    tensors = {
        "embed.weight": rng.standard_normal((50, 64)).astype(np.float32),
        "a.weight": rng.standard_normal((256, 128)).astype(np.float32) * np.float32(0.02),
        "b.weight": rng.standard_t(3, (128, 256)).astype(np.float32),
        "norm.weight": np.ones(64, np.float32),
    }
    safetensors.save_safetensors(tmp_path / "in" / "model.safetensors", tensors)
    files.write_json(tmp_path / "in" / "config.json", {"model_type": "something"})
    return tmp_path / "in", tensors


# ------------------------------------------------------------------------------------------------------------------- measuring
@pytest.mark.parametrize("code", codes_on_weights.CODES)
def test_normal_weights_cost_what_the_quadrature_says(code, rng):
    w = rng.standard_normal((512, 1024)).astype(np.float32)
    line = codes_on_weights.measure("w", w, [code], double_quant=False)
    expected = codes_on_weights.theory([code], 64)[code]
    assert abs(line.error[code] / expected - 1) < 0.02
    assert abs(sum(line.usage[code]) - 1) < 1e-12 and line.bits == 4.5
    make, signed = codes_on_weights.CODES[code]
    values = codebooks.get(make(64))[1]
    assert abs(line.entropy(code) - optimality.entropy(values, 64, signed)) < 0.01


def test_an_error_is_that_of_quantize(rng):
    w = rng.standard_t(4, (70, 33)).astype(np.float32)
    line = codes_on_weights.measure("w", w, ["int4"], blocksize=32)
    q = quantize(w, "int4", 32, double_quant=True)
    error = (q.dequantize().astype(np.float64) - w) ** 2
    assert np.isclose(line.error["int4"], error.sum() / (w.astype(np.float64) ** 2).sum(), rtol=1e-6)
    assert line.bits == q.bits_per_param and len(line.usage["int4"]) == 15


def test_normality_and_outliers_tell_normal_weights_from_others(rng):
    normal = rng.standard_normal((200, 1024)).astype(np.float32)
    heavy = rng.standard_t(3, (200, 1024)).astype(np.float32)
    assert codes_on_weights.normality(normal) > 0.75 and codes_on_weights.normality(heavy) < 0.1
    assert codes_on_weights.outlier_blocks(normal, 64) < 0.06 < 0.2 < codes_on_weights.outlier_blocks(heavy, 64)
    assert codes_on_weights.normality(np.ones((5, 100), np.float32)) == 0
    assert np.isnan(codes_on_weights.normality(normal[:, :4])) and np.isnan(
        codes_on_weights.outlier_blocks(normal[:1, :8], 64)
    )


def test_odd_tensors_are_left_out_or_named(tmp_path, capsys, rng):
    tensors = {
        "whole.weight": np.ones((8, 64), np.int8),
        "short.weight": rng.standard_normal((64, 4)).astype(np.float32),
        "a.weight": rng.standard_normal((16, 64)).astype(np.float16),
        "bad.weight": np.full((4, 64), np.nan, np.float32),
    }
    safetensors.save_safetensors(tmp_path / "model.safetensors", tensors)
    files.write_json(tmp_path / "config.json", {"model_type": "something"})
    assert run("quantize", tmp_path, "--codes", "nf4") == 2
    assert "bad.weight holds NaN or Inf; leave it out (--skip bad.weight)" in capsys.readouterr().err
    assert (
        run("quantize", tmp_path, "--codes", "nf4", "--skip", "bad.weight", "--out", tmp_path / "out", "--force") == 0
    )
    assert "whole.weight" not in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert {t["name"]: t["normal"] is None for t in report["tensors"]} == {"a.weight": False, "short.weight": True}


def test_outliers_do_not_depend_on_the_scale(rng):
    w = rng.standard_t(4, (200, 64)).astype(np.float32)
    shares = [codes_on_weights.outlier_blocks(w * np.float32(s), 64) for s in (1, 1e-25, 1e25)]
    assert shares[0] == shares[1] == shares[2] > 0.05


def test_the_mean_weighs_by_size(rng):
    a, b = rng.standard_normal((64, 64)).astype(np.float32), rng.standard_t(3, (64, 192)).astype(np.float32)
    la, lb = (codes_on_weights.measure("x", w, ["nf4"]) for w in (a, b))
    total = codes_on_weights.mean([la, lb])
    assert total.shape == (64 * 256,) and np.isclose(
        total.error["nf4"], 0.25 * la.error["nf4"] + 0.75 * lb.error["nf4"]
    )
    assert np.isclose(sum(total.usage["nf4"]), 1)


# ---------------------------------------------------------------------------------------------------------------- the commands
def test_quantize_prints_a_line_for_each_linear_weight(folder, capsys):
    path, _ = folder
    assert run("quantize", path, "--codes", "nf4", "bof4", "sf4") == 0
    out = capsys.readouterr().out
    names = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert (
        names.count("a.weight") == names.count("b.weight") == 2
        and "embed.weight" not in names
        and "norm.weight" not in names
    )
    table = {line.split()[0]: line for line in out.splitlines() if ".weight" in line and "%" in line}
    assert table["a.weight"].split()[-2].endswith("*")  # bof4 is best for normal weights
    assert not list(path.parent.glob("*.svg"))


def test_quantize_writes_a_folder_that_opens(folder, tmp_path, capsys):
    path, tensors = folder
    assert (
        run("quantize", path, "--codes", "nf4", "--out", tmp_path / "out", "--code", "fp4", "--skip", "b.", "--force")
        == 0
    )
    assert "1 weights written" in capsys.readouterr().out
    written = safetensors.load_folder(tmp_path / "out")
    q = fourbit.from_tensors("a.weight", written)
    assert q.dequantize().tobytes() == quantize(tensors["a.weight"], "fp4", double_quant=True).dequantize().tobytes()
    assert written["b.weight"].tobytes() == tensors["b.weight"].tobytes()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [t["name"] for t in report["tensors"]] == ["a.weight"] and len(report["tensors"][0]["usage"]["nf4"]) == 16
    assert (tmp_path / "out" / "errors.svg").read_text().startswith("<?xml")


def test_a_4_bit_folder_is_a_base_for_generating_and_fine_tuning(tmp_path, capsys):
    """What quantize wrote computes what quantizing on the fly computes."""
    tiny.model().save_pretrained(tmp_path / "model", dtype="float32")
    assert run("quantize", tmp_path / "model", "--codes", "nf4", "--out", tmp_path / "four") == 0
    capsys.readouterr()
    texts = []
    for arguments in (["--model", tmp_path / "four"], ["--model", tmp_path / "model", "--quantize", "nf4"]):
        assert run("generate", *arguments, "--prompt", "word", "--max-new-tokens", 20) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    (tmp_path / "text.txt").write_text("A word that was made for a test, and means nothing else.\n\n" * 50)
    job = [
        "finetune",
        "--model",
        tmp_path / "four",
        "--text",
        tmp_path / "text.txt",
        "--steps",
        2,
        "--batch-size",
        2,
        "--seq-len",
        32,
        "-r",
        2,
    ]
    assert run(*job, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert run("generate", "--model", tmp_path / "four", "--quantize", "nf4") == 2
    assert run(*job, "--method", "full", "--out", tmp_path / "full") == 2
    err = capsys.readouterr().err
    assert "is in 4 bits already" in err and "is stored in nf4; the method 'full' starts from dense weights" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["quantize", "nowhere"], "nowhere: expected 'base' or a folder"),
        (["quantize", "{in}", "--skip", "weight"], "holds no linear weights"),
        (["quantize", "{in}", "--out", "{in}"], "would overwrite its source"),
        (["quantize", "{in}", "--out", "{in}2", "--blocksize", "48", "--force"], "in blocks of 48"),
        (["quantize", "{in}", "--out", "{in}2"], "'something' were not tried in transformers"),
        (["nf4", "--blocksizes", "1", "--figure", "none"], "blocksize = 1"),
    ],
)
def test_bad_input_gets_a_sentence(arguments, words, folder, capsys):
    assert run(*(a.replace("{in}", str(folder[0])) for a in arguments)) == 2
    assert words in capsys.readouterr().err


def test_a_missing_matplotlib_costs_only_the_figure(folder, tmp_path, capsys, monkeypatch):
    from tinylora.figures import style

    def absent():
        raise RuntimeError("figures need matplotlib: pip install -e '.[notebooks]' in a clone of tinylora")

    monkeypatch.setattr("tinylora.figures.style.require_matplotlib", absent)
    monkeypatch.setattr(style, "require_matplotlib", absent)
    monkeypatch.chdir(tmp_path)
    assert run("nf4", "--blocksizes", "64") == 0
    out = capsys.readouterr().out
    assert (
        "16 of 16 bit patterns" in out
        and "no figure: figures need matplotlib" in out
        and not list(tmp_path.glob("*.svg"))
    )
    assert run("nf4", "--figure", "x.svg") == 2


def test_nf4_prints_the_values_beside_the_published_ones(tmp_path, capsys):
    assert run("nf4", "--blocksizes", "64", "12", "--figure", tmp_path / "nf4.svg") == 0
    out = capsys.readouterr().out
    assert out.count("bf3239b1") == 2 and "929/960 = 0.967708333333" in out
    assert "0.0084601   5.863%" in out and "0.0727955   0.025%" in out and "3.9964" in out
    assert (tmp_path / "nf4.svg").read_text().startswith("<?xml")


def test_the_derivation_ends_at_the_library_s_code():
    probabilities, quantiles, values = nf4_construction.recipe()
    assert values.tobytes() == codebooks.nf4().tobytes() and (np.diff(probabilities) > 0).all() and quantiles[7] == 0
