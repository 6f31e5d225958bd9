"""Linear4bit against bitsandbytes' in train mode: which weight meets the input, which one the gradient, and where each is rounded.

A product with rows of the identity is exact, so it shows the weight itself; products of arbitrary rows differ in the order of a sum.
"""

import numpy as np
import pytest
from test_oracle import agree, array, same_bits

from tinylora import Tensor, nn
from tinylora.adapters import kbit
from tinylora.dtypes import BFloat16Array, round_to
from tinylora.quant import quantize

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def both(w, bias, stored, compute, nested=True):
    """(ours, theirs) of a weight that was stored in one dtype and computes in another."""
    theirs = bnb.nn.Linear4bit(
        w.shape[1], w.shape[0], bias=bias is not None, compute_dtype=DTYPES[compute], quant_type="nf4",
        compress_statistics=nested,
    )  # fmt: skip
    weight = torch.from_numpy(w).to(DTYPES[stored])
    theirs.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested)
    if bias is not None:
        theirs.bias = torch.nn.Parameter(torch.from_numpy(bias.copy()))
    theirs = theirs.to("cpu").train()
    source = BFloat16Array.of(w) if stored == "bfloat16" else w.astype(stored)
    q = quantize(source, "nf4", 64, nested)
    assert q.dtype == stored
    return nn.Linear4bit(q, None if bias is None else Tensor(bias, requires_grad=True), compute), theirs


def run(ours, theirs, x, g):
    a, b = Tensor(x, requires_grad=True), torch.from_numpy(x).requires_grad_()
    y, z = ours(a), theirs(b)
    y.backward(g)
    z.backward(torch.from_numpy(g))
    return (y.data, a.grad), (z.detach(), b.grad)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", list(DTYPES))
def test_the_weights_of_forward_and_backward_are_bitsandbytes_in_every_bit(stored, compute, nested, rng):
    w = rng.standard_normal((64, 128)).astype(np.float32)
    ours, theirs = both(w, None, stored, compute, nested)
    (y, _), (z, _) = run(ours, theirs, np.eye(128, dtype=np.float32), np.zeros((128, 64), np.float32))
    assert same_bits(y, z)
    (_, gx), (_, hx) = run(ours, theirs, np.zeros((64, 128), np.float32), np.eye(64, dtype=np.float32))
    assert same_bits(gx, hx)
    different = int((gx != y.T).sum())
    if (stored, compute) in {("bfloat16", "float32"), ("float16", "float32")}:
        assert different > w.size / 2, "forward and backward use two different weights"
        assert same_bits(gx, round_to(ours.weight.dequantize("float32"), stored).astype(np.float32))
    elif (stored, compute) != ("float16", "bfloat16"):  # rounded twice on the way back, there: a few differ
        assert different == 0
    ours.backward_weight = "forward"
    x = Tensor(np.zeros((64, 128), np.float32), requires_grad=True)
    ours(x).backward(np.eye(64, dtype=np.float32))
    assert same_bits(x.grad, np.ascontiguousarray(y.T))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", list(DTYPES))
def test_outputs_and_gradients_are_bitsandbytes(stored, bias, compute, rng):
    w, b = rng.standard_normal((96, 64)).astype(np.float32), rng.standard_normal(96).astype(np.float32)
    x, g = rng.standard_normal((9, 64)).astype(np.float32), rng.standard_normal((9, 96)).astype(np.float32)
    ours, theirs = both(w, b if bias else None, stored, compute)
    (y, gx), (z, hx) = run(ours, theirs, x, g)
    # in bfloat16 a sum in another order may be rounded to the neighbouring number, half a step of 2⁻⁷ away from both
    tolerance = 1e-6 if compute == "float32" else 2**-7
    agree(y, z, tolerance, "outputs")
    agree(gx, hx, tolerance, "input gradients")
    if compute == "bfloat16":
        assert (y == array(z)).mean() > 0.98 and (gx == array(hx)).mean() > 0.98
        assert (y == round_to(y, "bfloat16")).all() and (gx == round_to(gx, "bfloat16")).all()
    if bias:
        agree(ours.bias.grad, theirs.bias.grad, 1e-6 if compute == "float32" else 2**-7, "bias gradients")


def test_prepare_does_what_pefts_prepare_does(tmp_path, rng):
    """16 bits become 32 around the 4-bit layers, nothing is trained, and each block is checkpointed."""
    import tiny
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    own = tiny.model(hidden_size=64, intermediate_size=64)
    own.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    theirs = prepare_model_for_kbit_training(theirs)
    ours = kbit.prepare_for_kbit_training(kbit.store_in_16_bits(nn.quantize_linears(own)))
    assert not any(p.requires_grad for p in theirs.parameters()) and not ours.trainable()
    kinds = {
        name: "4bit" if isinstance(p, bnb.nn.Params4bit) else str(p.dtype) for name, p in theirs.named_parameters()
    }
    mine = {name: str(w.dtype) if isinstance(w, Tensor) else "4bit" for name, w in ours.named_weights()}
    assert {k: v.removeprefix("torch.") for k, v in kinds.items()} == mine
    assert set(mine.values()) == {"float32", "4bit"}
    assert theirs.is_gradient_checkpointing and ours.gradient_checkpointing
    dense = dict(theirs.named_parameters())["model.embed_tokens.weight"]
    assert same_bits(ours.model.embed_tokens.weight.data, array(dense))
