"""Are real weights normal? The test, its power, the sizes beside it, and tinylora quantize --normality."""

import json
import os

import numpy as np
import pytest
import tiny

from tinylora import cli, codebooks
from tinylora.models import safetensors
from tinylora.numerics import distributions, optimality
from tinylora.papers import codes_on_weights, normality

LLM, MINILM = os.environ.get("TINYLORA_LLM"), os.environ.get("TINYLORA_MINILM")


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def share(law, rng, n, rows=400):
    return normality.rejected(np.asarray(normality.LAWS[law](rng, (rows, n)), np.float32)).mean()


def within(observed, expected, rows):
    """Five deviations of a binomial share: one run in a million or so fails by chance."""
    return abs(observed - expected) < 5 * (expected * (1 - expected) / rows) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------- the test
@pytest.mark.parametrize("n", [20, 192, 1000, 6000])
def test_normal_rows_are_rejected_at_the_level_of_the_test(n, rng):
    assert within(share(normality.NORMAL, rng, n, 1000), 0.05, 1000)


def test_storage_in_4_bits_alone_rejects_few(rng):
    """6.2 % of 20,000 rows of 4,096 values, with another seed."""
    assert within(share(normality.STORED, rng, 4096, 1000), 0.062, 1000)


def test_power_grows_with_the_length(rng):
    shares = [share("Student t, 30", rng, n) for n in (64, 1024, 4096)]
    assert shares[0] < shares[1] < shares[2]
    assert (share("one value of 6 sigma", rng, 192, 200) == 1) and (share("one value of 6 sigma", rng, 4096, 50) == 1)


@pytest.mark.parametrize("law, power", [("Student t, 30", 0.567), ("Student t, 60", 0.178), ("Student t, 100", 0.094)])
def test_power_at_the_length_of_llama_7b(law, power, rng):
    """The powers of 20,000 rows with another seed, each to ± 0.35 % (one deviation)."""
    assert within(share(law, rng, 4096, 800), power, 800)


def test_rows_of_heavy_tails_are_rejected(rng):
    rows = rng.standard_t(5, (50, 2000))
    assert normality.rejected(rows).mean() > 0.95 and np.median(normality.excess_kurtosis(rows)) > 1


def test_a_verdict_is_scipy_s_and_knows_no_scale(rng):
    from scipy.stats import shapiro

    rows = rng.standard_t(10, (60, 300)).astype(np.float32)
    expected = np.array([shapiro(row).pvalue <= 0.05 for row in rows])
    assert 0 < expected.sum() < 60
    for scale in (1, 1e-30, 1e30):
        assert np.array_equal(normality.rejected(rows * np.float32(scale)), expected)


def test_of_a_long_row_4096_evenly_spaced_values_are_tested(rng):
    rows = rng.standard_normal((5, 9000))
    picked = np.linspace(0, 8999, 4096).astype(int)
    unseen = np.setdiff1d(np.arange(9000), picked)
    spoilt = rows.copy()
    spoilt[:, unseen[:50]] = 50
    assert len(set(picked)) == 4096 and np.array_equal(normality.rejected(spoilt), normality.rejected(rows))
    spoilt[:, picked[7]] = 50
    assert normality.rejected(spoilt).all()
    rows = rng.standard_normal((3, 5000))
    rows[:, unseen[0]] = 9
    assert normality.rejected(rows).all()  # at 5,000 all are


def test_constant_and_zero_rows_are_not_normal_and_no_crash(rng):
    w = rng.standard_normal((6, 128)).astype(np.float32)
    w[0], w[1], w[2] = 0, 3, np.float32(1e-42)
    rows = normality.Rows.of(w)
    assert rows.rejected[:3].all() and rows.by_block[:3].all()
    assert np.isnan(rows.kurtosis[:3]).all() and np.isfinite(rows.kurtosis[3:]).all()
    assert np.isnan(rows.nf4[0]) and np.isfinite(rows.nf4[3:]).all()
    group = normality.Group.of("x", 128, normality.Rows.of(np.zeros((4, 128), np.float32)))
    assert (
        group.rejected == 1 and np.isnan(group.nu) and np.isnan(group.kurtosis).all() and np.isnan(group.nf4_rejected)
    )


def test_rows_that_are_too_short_are_named(rng):
    weights = {"a.weight": rng.standard_normal((9, 7)), "b.weight": rng.standard_normal((9, 8))}
    groups, short = normality.measure(weights.items())
    assert short == ["a.weight"] and {g.length for g in groups} == {8} and groups[0].rows == 9
    with pytest.raises(ValueError, match="8 values or more"):
        normality.rejected(weights["a.weight"])
    with pytest.raises(ValueError, match="no weight has rows of 8"):
        normality.measure([("a.weight", weights["a.weight"])])


# ----------------------------------------------------------------------------------------------------------------- sizes beside it
def test_excess_kurtosis_is_the_unbiased_one(rng):
    from scipy.stats import kurtosis

    rows = rng.standard_t(6, (20, 77)) * np.exp(rng.uniform(-60, 60, (20, 1)))
    assert np.allclose(normality.excess_kurtosis(rows), kurtosis(rows, axis=1, bias=False), rtol=1e-9)
    short = normality.excess_kurtosis(rng.standard_normal((100_000, 12)))
    assert abs(short.mean()) < 5 * short.std() / 100_000**0.5


def test_the_kurtosis_of_a_student_t_names_its_nu(rng):
    for nu in (12, 30):
        assert np.isclose(normality.student_nu(6 / (nu - 4)), nu)
    kappa = normality.excess_kurtosis(rng.standard_t(30, (40, 100_000))).mean()
    assert 25 < normality.student_nu(kappa) < 37
    assert normality.student_nu(0.0) == normality.student_nu(-0.3) == float("inf")


def test_nf4_costs_what_the_quadrature_says_for_each_law(rng):
    rows = rng.standard_t(12, (200, 2048)).astype(np.float32)
    expected = optimality.expected_error(codebooks.nf4(), 64, law=distributions.StudentT(12))
    assert abs(normality.nf4_error(rows).mean() / expected - 1) < 0.01
    line = codes_on_weights.measure("w", rows, ["nf4"], double_quant=False)
    power = np.square(rows, dtype=np.float64).sum(axis=1)
    assert np.isclose(normality.nf4_error(rows) @ power / power.sum(), line.error["nf4"], rtol=1e-6)


def test_normal_rows_whose_scale_changes_from_head_to_head_are_normal_by_block(rng):
    w = rng.standard_normal((300, 576)) * np.repeat(np.exp(0.5 * rng.standard_normal(9)), 64)
    w[:, :64] *= 3  # at least one head stands out
    rows = normality.Rows.of(w.astype(np.float32))
    assert rows.rejected.mean() > 0.7 and rows.by_block.mean() < 0.12
    assert np.isnan(normality.Rows.of(rng.standard_normal((5, 100))).by_block).all()
    with pytest.raises(ValueError, match="not whole blocks of 64"):
        normality.by_block(rng.standard_normal((5, 100)))


def test_q4_1_is_what_gguf_computes(rng):
    gguf = pytest.importorskip("gguf")
    rows = (rng.standard_normal((40, 96)) * np.exp(rng.uniform(-4, 4, (40, 1)))).astype(np.float32)
    rows[0], rows[1, :32] = 0, 0.25
    theirs = gguf.quants.dequantize(
        gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q4_1), gguf.GGMLQuantizationType.Q4_1
    )
    # they multiply by 1/d and here w − m is divided by d: a value on the edge of two steps may fall either way
    ours = normality.q4_1(rows)
    differ = ours != theirs
    assert differ.mean() < 1e-3
    assert np.array_equal(normality.q4_1(rows[:, :50])[:, :32], ours[:, :32]) and ours[:, :50].shape == (40, 50)


def test_batches_change_nothing(rng, monkeypatch):
    w = rng.standard_t(6, (150, 192)).astype(np.float32)
    whole = normality.Rows.of(w)
    monkeypatch.setattr(normality, "_BATCH", 1)
    for a, b in zip(vars(whole).values(), vars(normality.Rows.of(w)).values(), strict=True):
        assert np.array_equal(a, b)


def test_the_least_share_that_is_not_normal():
    assert round(100 * normality.least_share(0.075), 1) == 2.6
    assert normality.least_share(0.05) == normality.least_share(0.02) == 0 and normality.least_share(1) == 1


# --------------------------------------------------------------------------------------------------------------------- the groups
def test_kinds_are_the_shortest_ends_that_tell_names_apart():
    names = [
        f"encoder.layer.{i}.{x}.weight" for i in (0, 1) for x in ("attention.output.dense", "output.dense", "self.key")
    ]
    kinds = normality.kinds([*names, "pooler.dense.weight", "mlp.3.weight"])
    assert [kinds[n] for n in names[:3]] == ["attention.output.dense", "layer.output.dense", "key"]
    assert kinds["pooler.dense.weight"] == "pooler.dense" and kinds["mlp.3.weight"] == "mlp"
    assert normality.kinds(["a.b.weight", "b.weight"]) == {"a.b.weight": "a.b", "b.weight": "b"}


def test_groups_are_by_kind_and_length_and_hold_every_row(rng):
    weights = {
        "layers.0.q.weight": rng.standard_normal((30, 64)).astype(np.float32),
        "layers.1.q.weight": rng.standard_t(3, (50, 64)).astype(np.float32),
        "layers.0.k.weight": rng.standard_t(3, (20, 64)).astype(np.float16),
        "layers.1.k.weight": rng.standard_t(3, (20, 128)).astype(np.float32),
    }
    groups, _ = normality.measure(weights.items())
    found = {(g.name, g.length): g for g in groups}
    assert list(found) == [("q", 64), ("k", 64), (normality.ALL, 64), ("k", 128), (normality.ALL, 128)]
    q = np.concatenate([normality.rejected(weights[f"layers.{i}.q.weight"]) for i in (0, 1)])
    assert found["q", 64].rows == 80 and found["q", 64].rejected == q.mean() and found[normality.ALL, 64].rows == 100


def test_drawn_rows_are_the_same_each_time():
    first, again = (normality.drawn(96, draws=60) for _ in range(2))
    assert list(first) == list(normality.LAWS) and repr(first) == repr(again)
    assert repr(first) != repr(normality.drawn(97, draws=60))
    assert all(g.rows == 60 and g.monte_carlo_error <= 0.5 / 60**0.5 for g in first.values())


# -------------------------------------------------------------------------------------------------------------------- the command
def test_the_command_on_the_embedded_base(tmp_path, capsys):
    """The base's rows are short, of 192 and 512 values: 6.1 % are rejected, where 5 % of normal rows would be."""
    assert run("quantize", "base", "--normality", "--draws", 40, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert lines["gate_proj"][1] == "2,560" and "rows of 192 values" in out and "rows of 512 values" in out
    assert "(0.075 - 0.05)/0.95" in out and "2.6 %" in out and "relative squared error" not in out
    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    every = [g for g in report["groups"] if g["name"] == normality.ALL]
    assert sum(g["rows"] for g in every) == 8960
    assert round(100 * sum(g["rows"] * g["rejected"] for g in every) / 8960, 1) == 6.1
    assert {g["length"] for g in report["drawn"]} >= {192, 512, 4096}
    assert (tmp_path / "out" / "normality.svg").read_text().startswith("<?xml")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["normality.svg", "report.json"]


def test_the_command_on_a_folder_with_odd_rows(tmp_path, rng, capsys):
    tensors = {
        "embed.weight": rng.standard_normal((50, 64)).astype(np.float32),
        "a.weight": np.zeros((8, 64), np.float32),
        "b.weight": rng.standard_normal((8, 4)).astype(np.float32),
        "c.weight": rng.standard_normal((8, 33)).astype(np.float16),
        "d.weight": rng.standard_normal((3, 6000)).astype(np.float32),
    }
    safetensors.save_safetensors(tmp_path / "in" / "model.safetensors", tensors)
    assert run("quantize", tmp_path / "in", "--normality", "--draws", 20, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "left out, rows below 8 values: b.weight" in out and "rows of 6,000 values, 4,096 of them tested" in out
    assert next(x for x in out.splitlines() if x.split()[:1] == ["a"]).split()[1:4] == ["8", "100.0", "%"]
    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["left_out"] == ["b.weight"] and report["groups"][0]["kurtosis"] is not None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{in}", "--codes", "nf4"], "--codes has nothing to do where --normality measures no code"),
        (["{in}", "--no-double-quant"], "--no-double-quant has nothing to do"),
        (["{in}", "--out", "{in}/config.json"], "is a file; expected a folder"),
        (["{in}", "--skip", "proj"], "holds no linear weights"),
        (["nowhere"], "nowhere: expected 'base' or a folder"),
        (["nowhere.gguf"], "nowhere.gguf does not exist"),
    ],
)
def test_bad_input_gets_a_sentence_and_writes_nothing(arguments, words, tmp_path, capsys):
    tiny.model().save_pretrained(tmp_path / "in", dtype="float32")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert run("quantize", "--normality", *(a.replace("{in}", str(tmp_path / "in")) for a in arguments)) == 2
    assert words in capsys.readouterr().err and sorted(p.name for p in tmp_path.rglob("*")) == before


def test_nan_is_named(tmp_path, rng, capsys):
    safetensors.save_safetensors(tmp_path / "model.safetensors", {"bad.weight": np.full((4, 64), np.nan, np.float32)})
    assert run("quantize", tmp_path, "--normality", "--out", tmp_path / "out") == 2
    assert "bad.weight holds NaN or Inf" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_figure_that_fails_leaves_nothing(tmp_path, rng, monkeypatch, capsys):
    def fails(*_):
        raise ValueError("no figure today")

    monkeypatch.setattr("tinylora.papers.normality.rejected_against_length", fails)
    tiny.model().save_pretrained(tmp_path / "in", dtype="float32")
    assert run("quantize", tmp_path / "in", "--normality", "--draws", 10, "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_a_missing_matplotlib_costs_only_the_figure(tmp_path, monkeypatch, capsys):
    def absent():
        raise RuntimeError("figures need matplotlib: pip install -e '.[notebooks]' in a clone of tinylora")

    monkeypatch.setattr("tinylora.figures.style.require_matplotlib", absent)
    tiny.model().save_pretrained(tmp_path / "in", dtype="float32")
    assert run("quantize", tmp_path / "in", "--normality", "--draws", 10, "--out", tmp_path / "out") == 0
    assert "no figure: figures need matplotlib" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.json"]


# ----------------------------------------------------------------------------------------------------------------- the real models
def passed(groups):
    return {(g.name, g.length): round(100 * (1 - g.rejected), 1) for g in groups}


@pytest.mark.skipif(not MINILM, reason="TINYLORA_MINILM: the folder of all-MiniLM-L6-v2")
def test_the_rows_of_minilm(tmp_path):
    assert run("quantize", MINILM, "--normality", "--draws", 20, "--out", tmp_path) == 0
    groups = [normality.Group(**g) for g in json.loads((tmp_path / "report.json").read_text())["groups"]]
    assert passed(groups) == {
        ("query", 384): 86.5,
        ("key", 384): 77.2,
        ("value", 384): 73.4,
        ("attention.output.dense", 384): 82.3,
        ("intermediate.dense", 384): 82.8,
        ("pooler.dense", 384): 94.3,
        (normality.ALL, 384): 81.6,
        ("layer.output.dense", 1536): 21.2,
        (normality.ALL, 1536): 21.2,
    }


@pytest.mark.skipif(not LLM, reason="TINYLORA_LLM: SmolLM2-135M-Instruct.Q4_1.gguf")
def test_the_rows_of_smollm2(tmp_path):
    """o_proj's scale changes from head to head: 44 % of its rows are rejected, and 12 % once each block has its own scale."""
    assert run("quantize", LLM, "--normality", "--draws", 20, "--out", tmp_path) == 0
    groups = [normality.Group(**g) for g in json.loads((tmp_path / "report.json").read_text())["groups"]]
    assert passed(groups) == {
        ("q_proj", 576): 66.2,
        ("k_proj", 576): 71.0,
        ("v_proj", 576): 58.2,
        ("o_proj", 576): 55.8,
        ("gate_proj", 576): 82.9,
        ("up_proj", 576): 82.3,
        (normality.ALL, 576): 75.7,
        ("down_proj", 1536): 62.1,
        (normality.ALL, 1536): 62.1,
    }
    o = next(g for g in groups if g.name == "o_proj")
    assert round(100 * o.by_block, 1) == 11.7
