"""What the findings say of the embedded model on a text that is unlike what it has read."""

import re
from pathlib import Path

import numpy as np

import tinylora as tl

FINDINGS = Path(__file__).parents[1] / "figures" / "README.md"
LOG2 = np.log(2)


def scores_and_answers(n=1 << 14):
    """The model's scores for the first n bytes of the held-out text, as it was loaded and in NF4, and the bytes that came."""
    text = np.frombuffer(tl.data.jargon("heldout"), np.uint8)[: n + 1].astype(int)
    x, y = (t.reshape(-1, 256) for t in (text[:-1], text[1:]))
    for code in (None, "nf4"):
        model = tl.Llama.from_pretrained("base")
        if code:
            tl.quantize_linears(model, code=code, double_quant=True)
        with tl.no_grad():
            yield model(x).data.astype(np.float64), y


def cost_and_entropy(z, y, divisor=1.0):
    """Bits per byte of the answers, and the entropy of the predictions in bits, if the scores are divided by a number."""
    z = z / divisor - (z / divisor).max(axis=-1, keepdims=True)
    log_p = (z - np.log(np.exp(z).sum(axis=-1, keepdims=True))) / LOG2
    return -np.take_along_axis(log_p, y[..., None], axis=-1).mean(), -(np.exp2(log_p) * log_p).sum(axis=-1).mean()


def test_rounding_to_nf4_makes_a_model_that_is_too_sure_less_sure():
    loaded, rounded = scores_and_answers()
    said = FINDINGS.read_text(encoding="utf-8").split("**Rounding to NF4 lowers the bits")[1].split("\n- ")[0]
    found = [number for pair in (loaded, rounded) for number in cost_and_entropy(*pair)]
    less_sure = [cost_and_entropy(*pair, divisor=1.5)[0] for pair in (loaded, rounded)]
    assert found[2] < found[0] and found[3] > found[1] and less_sure[0] < less_sure[1]
    numbers = [*(f"{x:.2f}" for x in found), *(f"{x:.3f}" for x in less_sure)]
    assert re.findall(r"\d\.\d{2,3}(?!\d)", said) == numbers
