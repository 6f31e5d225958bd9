"""The six steps: the file that students get, its solution, and what the checks say of usual mistakes."""

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("jupytext", reason="the notebooks need jupytext: pip install -e '.[notebooks]'")

from test_notebooks import NOTEBOOKS, build, grading

from tinylora import quantize

TEXT = (NOTEBOOKS / "build_it.py").read_text(encoding="utf-8")
SOLVED = build.steps(TEXT, solutions=True)
STEPS = [f"my-{k}" for k in range(1, 7)]


def verdict(text, exercise, rng, parts=slice(None)):
    """The Verdict on some parts of a step."""
    grading.load_checks()
    names = grading.own_answer(text)
    return grading.together(
        [(part, grading.said(exercise, part, names, rng)) for part in grading.CHECKS[exercise][parts]]
    )


@pytest.mark.parametrize("exercise", STEPS)
def test_the_solution_is_right(exercise, rng):
    assert verdict(SOLVED, exercise, rng, slice(2) if exercise == "my-5" else slice(None)).said == "right"


@pytest.mark.parametrize("exercise", STEPS)
def test_the_file_that_students_get_is_not_answered_yet(exercise, rng):
    text = (NOTEBOOKS / "my_qlora.py").read_text(encoding="utf-8")
    assert text == build.steps(TEXT), "run `python notebooks/build.py my_qlora`"
    assert verdict(text, exercise, rng).said.startswith("not answered yet (")


MISTAKES = [  # step, what stands in the solution, what a student writes, what the check says
    ("my-1", "(NF4[:-1] + NF4[1:]) / 2", "NF4[1:]", "indices are not those of the nearest value"),
    ("my-1", "index[0::2] << 4 | index[1::2]", "index[1::2] << 4 | index[0::2]", "the two halves of each byte are swapped"),
    ("my-1", "np.where(absmax > 0, absmax, 1)", "absmax", "block"),
    ("my-1", "np.abs(rows).max(axis=1)", "rows.max(axis=1)", "the largest magnitude of block"),
    ("my-1", "np.repeat(absmax, blocksize)[:n])", "np.resize(absmax, n))", "weights are wrong; the first is element"),
    ("my-1", "np.searchsorted(middles, x).astype", "np.abs(x[..., None] - NF4).argmin(-1).astype", "The values are sorted"),

    ("my-2", "np.round(127 * rows", "np.trunc(127 * rows", "Is it cut instead?"),
    ("my-2", "np.round(127 * rows", "np.round(128 * rows", "128 wraps around"),
    ("my-2", "absmax - mean\n", "absmax\n", "nested[0] should be the largest"),
    ("my-2", "blocksize)[: codes.size] + mean", "blocksize)[: codes.size]", "restore is off by"),
    ("my-2", '"codes": codes', '"codes": codes.astype(np.int32)', "bits a weight; 4.1270 are enough"),
    ("my-3", "s * (u @ layer", "(u @ layer", "the scale s is missing"),
    ("my-3", " + v @ layer[\"A\"], v.T", ", v.T", "goes through the bypass is missing"),

    ("my-3", "np.zeros((d_out, r), np.float32)", "np.ones((d_out, r), np.float32)", "B should be 0 at the start"),
    ("my-4", "(m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)", "m / (np.sqrt(v) + eps)", "m and v are not divided"),
    ("my-4", "np.sqrt(v / (1 - beta2**t)) + eps", "np.sqrt(v / (1 - beta2**t) + eps)", "stands inside the root"),
    ("my-4", "    m *= beta1\n", "    g = g + weight_decay * p\n    weight_decay = 0\n    m *= beta1\n", "in Adam with L2"),
    ("my-4", "    p *= 1 - lr * weight_decay\n", "", "the weight decay is missing"),
    ("my-4", "(m / (1 - beta1**t))", "m", ": m is not divided"),
    ("my-4", "(np.sqrt(v / (1 - beta2**t)) + eps)", "(np.sqrt(v) + eps)", ": v is not divided"),
    ("my-4", "1 - lr * weight_decay", "1 - weight_decay", "the weight decay is not multiplied by lr"),
    ("my-4", "np.sqrt(v / (1 - beta2**t)) + eps", "np.float32(np.nan)", "off by nan of its largest element."),
    ("my-4", "    m *= beta1\n", "    m = beta1 * m\n", "it should be changed in place"),
    ("my-4", "        memory.put_back(v, start, fast_v)\n", "", "do not fit"),
    ("my-5", "            p.grad = None\n", "            pass\n", "the gradients of the steps before are not cleared"),
    ("my-5", "(t - 1) / len(batches)", "t / len(batches)", "one step too early"),
    ("my-5", "p.grad = None\n", "p.grad = None\n        [one.fill(0) for both in states for one in both]\n", "anew"),
    ("my-5", "min(1.0, max_norm / norm)", "max_norm / norm", "although their norm is below it"),
    ("my-5", "losses.append(loss.item())", "losses.append(loss)", "loss.item() is a float"),
    ("my-5", "        loss.backward()\n", "        loss_of(batch)\n        loss.backward()\n", "once for each is enough"),
    ("my-5", "p.data.reshape(-1), scale", "p.data.flatten(), scale", "is a copy trained?"),
    ("my-5", "lr * (1 - (t - 1) / len(batches))", "lr", "the rate does not fall"),
    ("my-5", "np.float32(min(1.0, max_norm / norm)) if norm > 0 else np.float32(1)", "np.float32(1)", "not scaled to max_norm"),

    ("my-6", "np.float32(layer[\"s\"]) * (layer[\"B\"] @", "(layer[\"B\"] @", "the scale s is missing"),
    ("my-6", "/ np.linalg.norm(merged))", ")", "was returned"),
    ("my-6", "/ np.linalg.norm(merged))", "/ np.linalg.norm(rebuild(stored)))", "was returned"),
    ("my-6", "    stored = store(merged)\n", "    stored = layer[\"stored\"] = store(merged)\n", "changes the layer's own arrays"),
]  # fmt: skip


@pytest.mark.parametrize("exercise, old, new, sentence", MISTAKES)
def test_a_usual_mistake_is_explained(exercise, old, new, sentence, rng):
    assert old in SOLVED
    found = verdict(SOLVED.replace(old, new), exercise, rng, slice(2) if exercise == "my-5" else slice(None))
    assert found.said.startswith("not right") and sentence in found.said, found.said
    assert found.points < found.of


class AtOneEnd:
    """A generator whose single numbers are the lowest that may be drawn, or the highest; its arrays are drawn."""

    def __init__(self, rng, end):
        self.drawn, self.end, self.standard_normal = rng, end, rng.standard_normal

    def uniform(self, low, high, size=None):
        return (low, high)[self.end] if size is None else self.drawn.uniform(low, high, size)

    def integers(self, low, high):
        return (low, high - 1)[self.end]


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("old, new, sentence", [one[1:] for one in MISTAKES if one[0] == "my-4"])
def test_what_is_said_of_adamw_holds_for_the_smallest_rate_and_for_the_largest(old, new, sentence, end, rng):
    """A bound that falls with the rate falls below what float32 rounds p by; and Adam's first step hides how large g + λp is."""
    for _ in range(10):
        said = verdict(SOLVED.replace(old, new), "my-4", AtOneEnd(rng, end)).said
        assert sentence in said, said


@pytest.mark.parametrize("exercise", STEPS)
def test_an_empty_answer_has_no_points(exercise, rng):
    empty = build.steps(TEXT).replace(build.BLANK, "return None")
    assert verdict(empty, exercise, rng).points == 0


def test_memory_that_is_kept_is_found(rng):
    kept = SOLVED.replace("(x, u)\n", "(x, u, rebuild(layer['stored']))\n").replace("x, u = saved", "x, u, _ = saved")
    assert "`saved` holds" in verdict(kept, "my-3", rng).said
    hidden = (
        SOLVED.replace("    u = x @ layer", "    KEPT.append(rebuild(layer['stored']))\n    u = x @ layer")
        + "\nKEPT = []\n"
    )
    assert "is it kept somewhere?" in verdict(hidden, "my-3", rng).said
    once = SOLVED.replace("    u = x @ layer", "    layer.setdefault('W', rebuild(layer['stored']))\n    u = x @ layer")
    assert "is it kept somewhere?" in verdict(once, "my-3", rng).said
    keyed = hidden.replace("KEPT.append(", "KEPT.setdefault(layer['stored']['packed'].tobytes(), ").replace(
        "KEPT = []", "KEPT = {}"
    )
    second = hidden.replace(
        "KEPT.append(", "layer['calls'] = layer.get('calls', 0) + 1; layer['calls'] > 1 and KEPT.append("
    )
    for kept in (keyed, second):
        assert "is it kept somewhere?" in verdict(kept, "my-3", rng).said
    tapes = SOLVED.replace("    losses = []\n", "    losses, kept = [], []\n")
    tapes = tapes.replace("loss.backward()\n", "loss.backward(); kept.append(loss)\n")
    assert "Keep the number loss.item(), not the loss" in verdict(tapes, "my-5", rng, slice(2)).said


def test_what_a_scene_passes_in_may_call_the_library(rng):
    def scene(function):
        return function(lambda: quantize(np.ones(64, np.float32)))

    answer = {}
    exec(
        compile(
            "def call(f): return f()\ndef own(f): return __import__('tinylora').quantize(f().packed)",
            "my_qlora.py",
            "exec",
        ),
        answer,
    )
    assert scene(grading.in_scene(answer["call"], ("*",))).packed.nbytes == 32
    with pytest.raises(grading.Raised, match="it calls tinylora's quantize"):
        scene(grading.in_scene(answer["own"], ("*",)))


def test_what_the_library_has_ready_is_no_answer(rng):
    call = "    q = __import__('tinylora').quantize(w, 'nf4', blocksize)\n    return q.packed, q.absmax\n"
    sneaky = SOLVED.replace("    n = w.size\n", f"{call}    n = w.size\n")
    found = verdict(sneaky, "my-1", rng)
    assert "it calls tinylora's quantize, which is what is to be built here" in found.said
    assert [said.startswith("not right: it calls") for *_, said in found.parts] == [False, True, True, False, True]


@pytest.mark.parametrize(
    "exercise, function", [("my-3", "forward"), ("my-4", "paged_adamw"), ("my-5", "train"), ("my-6", "merge")]
)
def test_a_call_of_the_library_is_noticed_where_the_check_plays_a_scene(exercise, function, rng):
    sneaky = re.sub(
        rf"^(def {function}\(.*?\n(?:    \"\"\".*?\"\"\"\n))",
        r"\1    __import__('tinylora').quantize(np.ones(64, 'f4'))\n",
        SOLVED,
        flags=re.M | re.S,
    )
    assert sneaky.count("tinylora") == SOLVED.count("tinylora") + 1
    plays = [
        part
        for part in grading.load_checks()[exercise]
        if re.search(r"\bthere\(|_pages\(", inspect.getsource(part.function))
    ]
    scenes = [part for part in plays if part.without]
    assert len(scenes) >= len(plays) - (exercise == "my-5")  # the model that is trained there is the library's
    for part in scenes:
        said = grading.said(exercise, part, grading.own_answer(sneaky), rng)
        assert said == "not right: it calls tinylora's quantize, which is what is to be built here; write it yourself"
        assert grading.said(exercise, part, grading.own_answer(SOLVED), rng) == "right"


def test_the_finale_says_what_is_missing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(NOTEBOOKS / "finale.py")], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert (
        done.returncode == 1
        and "my_qlora.py: a step is not answered yet (new_layer); `pytest notebooks -k my-` grades them all"
        in done.stderr
    )
    (tmp_path / "mine.py").write_text("import peft")
    command = [sys.executable, str(NOTEBOOKS / "finale.py"), "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "mine.py: my_qlora.py imports peft in line 1" in done.stderr


def test_the_solutions_of_the_steps_can_be_written(tmp_path, capsys):
    assert build.main(["--solutions", str(tmp_path / "solved"), "my_qlora"]) == 0
    assert (tmp_path / "solved" / "my_qlora.py").read_text(encoding="utf-8") == SOLVED
    with pytest.raises(SystemExit):
        build.main(["--html", str(tmp_path / "pages"), "my_qlora"])
    assert "has no page of its own" in capsys.readouterr().err and not (tmp_path / "pages").exists()
