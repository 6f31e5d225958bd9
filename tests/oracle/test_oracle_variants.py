"""PEFT as the witness for the descendants of LoRA: the same weights, the same gradients, the same numbers.

Where PEFT does something else than the paper or its authors' code, the test says what and shows it.
"""

import inspect
import os

import numpy as np
import pytest

import tinylora as tl
from tinylora import LoRALinear, Tensor, nn, variants
from tinylora.nn import Linear

pytestmark = pytest.mark.oracle

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # the same arithmetic, without waiting for a compiler
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

SHAPES = {"a": (20, 48), "b": (36, 20)}  # (out, in): two layers of different shapes, one after the other


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def agree(ours, theirs, tolerance, what="values"):
    """max |ours − theirs| / max |theirs| is below the tolerance, which is printed with the error."""
    ours = np.asarray(ours, np.float64)
    theirs = np.asarray(theirs.detach() if isinstance(theirs, torch.Tensor) else theirs, np.float64)
    assert ours.shape == theirs.shape, what
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)
    print(f"{what}: relative error {error:.2e} (allowed {tolerance:.0e})")
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def f32(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


class Net(torch.nn.Module):
    """Two linear layers, as the model to adapt; forward gives a loss too if asked."""

    def __init__(self, weights):
        super().__init__()
        for name, (out, inn) in SHAPES.items():
            layer = torch.nn.Linear(inn, out, bias=False)
            layer.weight.data = torch.from_numpy(weights[name].copy())
            setattr(self, name, layer)
        self.loss = None

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        return y if self.loss is None else type("Output", (), {"loss": self.loss(y), "y": y})()


class Ours(nn.Module):
    def __init__(self, weights):
        for name, (out, inn) in SHAPES.items():
            layer = Linear(inn, out)
            layer.weight.data = weights[name].copy()
            setattr(self, name, layer)

    def forward(self, x):
        return self.b(tl.ops.relu(self.a(x)))


@pytest.fixture
def weights(rng):
    return {name: f32(rng, *shape) for name, shape in SHAPES.items()}


def adapted(weights, config):
    return peft.get_peft_model(Net(weights), config)


# --------------------------------------------------------------------------------------------------------------------- VeRA
def test_vera_is_pefts_forward_gradient_slices_and_count(rng, weights):
    theirs = adapted(weights, peft.VeraConfig(r=8, target_modules=["a", "b"], d_initial=0.1))
    ours = variants.add_vera(Ours(weights), r=8)
    x, g = f32(rng, 5, 48), f32(rng, 5, 36)
    for name in SHAPES:
        layer, mine = getattr(theirs.base_model.model, name), getattr(ours, name)
        assert mine.vera_A.shape == tuple(layer.vera_A["default"].shape)
        assert mine.vera_B.shape == tuple(layer.vera_B["default"].shape)
        mine.vera_A.data, mine.vera_B.data = layer.vera_A["default"].numpy(), layer.vera_B["default"].numpy()
        agree(mine.lambda_d.data, layer.vera_lambda_d["default"], 0)
        agree(mine.lambda_b.data, layer.vera_lambda_b["default"], 0)
        layer.vera_lambda_b["default"].data = torch.from_numpy(f32(rng, *mine.lambda_b.shape))
        mine.lambda_b.data = layer.vera_lambda_b["default"].detach().numpy().copy()
        agree(mine.delta(), layer.get_delta_weight("default"), 1e-6, "ΔW")
    bound = np.abs(theirs.base_model.model.a.vera_B["default"].numpy()).max()
    assert 0.9 * np.sqrt(6 / 8) < bound <= np.sqrt(6 / 8)
    y, z = theirs(torch.from_numpy(x)), ours(Tensor(x))
    agree(z.data, y, 1e-5, "output")
    y.backward(torch.from_numpy(g))
    z.backward(g)
    for name in SHAPES:
        layer, mine = getattr(theirs.base_model.model, name), getattr(ours, name)
        agree(mine.lambda_b.grad, layer.vera_lambda_b["default"].grad, 1e-5, "λ_b")
        agree(mine.lambda_d.grad, layer.vera_lambda_d["default"].grad, 1e-5, "λ_d")
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trained == sum(w.size for _, w in ours.trainable()) == 20 + 36 + 2 * 8


# ------------------------------------------------------------------------------------------------------------------ AdaLoRA
def two_adaloras(rng, weights, **options):
    config = peft.AdaLoraConfig(init_r=6, lora_alpha=9, target_modules=["a", "b"], **{"total_step": 40, **options})
    theirs, ours = adapted(weights, config), variants.add_adalora(Ours(weights), r=6, alpha=9)
    for name in SHAPES:
        layer, mine = getattr(theirs.base_model.model, name), getattr(ours, name)
        for factor, w in (("lora_B", mine.P), ("lora_E", mine.Lambda), ("lora_A", mine.Q)):
            parameter = getattr(layer, factor)["default"]
            w.data = f32(rng, *w.shape)
            parameter.data = torch.from_numpy(w.data.reshape(parameter.shape).copy())
    return theirs, ours


def test_adalora_is_pefts_forward_and_gradient(rng, weights):
    theirs, ours = two_adaloras(rng, weights)
    x, g = f32(rng, 5, 48), f32(rng, 5, 36)
    y, z = theirs(torch.from_numpy(x)), ours(Tensor(x))
    agree(z.data, y, 2e-5, "output, where PEFT divides by r + 1e-5")
    y.backward(torch.from_numpy(g))
    z.backward(g)
    for name in SHAPES:
        layer, mine = getattr(theirs.base_model.model, name), getattr(ours, name)
        agree(mine.delta(), layer.get_delta_weight("default"), 1e-5, "ΔW")
        agree(mine.P.grad, layer.lora_B["default"].grad, 2e-5, "P")
        agree(mine.Lambda.grad, layer.lora_E["default"].grad.reshape(-1), 2e-5, "Λ")
        agree(mine.Q.grad, layer.lora_A["default"].grad, 2e-5, "Q")


def test_pefts_regularizer_is_the_mean_of_the_norms_and_not_of_their_squares(rng, weights):
    theirs, ours = two_adaloras(rng, weights, orth_reg_weight=0.5)
    theirs.base_model.model.loss = lambda y: torch.zeros(())
    x = torch.from_numpy(f32(rng, 3, 48))
    assert theirs(x).loss == 0, "a PeftModel without a task type goes past the model that adds it"
    added = theirs.base_model(x).loss
    norms = variants.orthogonality(ours, squared=False)
    agree(0.5 * norms.data, added, 1e-6, "γ R")
    assert abs(0.5 * variants.orthogonality(ours).item() / added.item() - 1) > 0.5
    added.backward()
    (norms * 0.5).backward()
    agree(ours.a.P.grad, theirs.base_model.model.a.lora_B["default"].grad, 1e-5, "P")


def test_the_allocator_masks_what_pefts_masks_at_every_step(rng, weights):
    theirs, ours = two_adaloras(rng, weights, target_r=2, tinit=4, tfinal=10, deltaT=3, beta1=0.8, beta2=0.7)
    mine = variants.RankAllocator(ours, target=4, steps=40, warmup=4, final=10, interval=3, beta1=0.8, beta2=0.7)
    for t in range(1, 41):
        for name in SHAPES:
            layer, w = getattr(theirs.base_model.model, name), getattr(ours, name)
            for factor, own in (("lora_B", w.P), ("lora_E", w.Lambda), ("lora_A", w.Q)):
                parameter = getattr(layer, factor)["default"]
                own.data, own.grad = own.data + f32(rng, *own.shape), f32(rng, *own.shape)
                parameter.data = torch.from_numpy(own.data.reshape(parameter.shape).copy())
                parameter.grad = torch.from_numpy(own.grad.reshape(parameter.shape).copy())
        theirs.base_model.update_and_allocate(t)
        b = mine.step(t)
        assert b == theirs.base_model.rankallocator.budget_schedule(t)[0]
        for name in SHAPES:
            left = getattr(theirs.base_model.model, name).lora_E["default"].detach().numpy().reshape(-1)
            agree(getattr(ours, name).Lambda.data, left, 0, f"Λ at step {t}")
    assert sum(mine.ranks.values()) == 4


# --------------------------------------------------------------------------------------------------------- PiSSA and LoftQ
def lora_pair(weights, name="a", r=4, alpha=10):
    layer = Linear(*SHAPES[name][::-1])
    layer.weight.data = weights[name].copy()
    return LoRALinear(layer, r=r, alpha=alpha)


def test_pissa_is_pefts_start(rng, weights):
    u, v = (np.linalg.qr(rng.standard_normal((n, 20)))[0] for n in SHAPES["a"])
    weights["a"] = ((u * 2.0 ** -np.arange(20)) @ v.T).astype(np.float32)  # well apart: PEFT's SVD is a float32 one
    theirs = adapted(weights, peft.LoraConfig(r=4, lora_alpha=10, target_modules=["a"], init_lora_weights="pissa"))
    layer, ours = theirs.base_model.model.a, variants.pissa(lora_pair(weights))
    difference = ours.base_layer.dense() - layer.base_layer.weight.detach().numpy()
    assert np.abs(difference).max() < 1e-5 * np.abs(weights["a"]).max(), "W_res"
    agree(ours.delta(), layer.get_delta_weight("default"), 1e-5, "s B A")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    signs = np.sign((ours.lora_A.weight.data * a.detach().numpy()).sum(axis=1))
    agree(ours.lora_A.weight.data * signs[:, None], a, 1e-4, "A up to signs")
    agree(ours.lora_B.weight.data * signs, b, 1e-4, "B up to signs")


@pytest.mark.parametrize("steps", [1, 5])
def test_loftq_is_pefts_except_for_the_scale(steps, rng):
    """PEFT's loftq_init, with the name of the device changed: it knows only "cuda" and "xpu"."""
    bnb = pytest.importorskip("bitsandbytes")
    from peft.utils import loftq_utils

    source = inspect.getsource(loftq_utils.loftq_init)
    assert source.count('"cuda"') == 1
    space = dict(vars(loftq_utils), bnb=bnb)
    exec(source.replace('"cuda"', '"cpu"'), space)
    linear = Linear(128, 64)
    linear.weight.data = f32(rng, 64, 128)
    dequantized, a, b = space["loftq_init"](torch.from_numpy(linear.dense().copy()), 4, 8, num_iter=steps)
    ours = variants.loftq(linear, r=8, alpha=8, steps=steps)
    agree(ours.base_layer.dense(), dequantized.reshape(64, 128), 1e-6 if steps == 1 else 2e-2, "Q")
    agree(ours.delta(), b @ a, 1e-4 if steps == 1 else 2e-2, "B A")
    scaled = variants.loftq(linear, r=8, alpha=32, steps=steps)
    agree(scaled.delta(), ours.delta(), 1e-5, "s B A, whatever alpha is")
    w, start = linear.dense(), dequantized.reshape(64, 128).numpy() + 4 * (b @ a).numpy()
    assert np.linalg.norm(start - w) > np.linalg.norm(dequantized.reshape(64, 128).numpy() - w), (
        "with alpha = 4 r, PEFT starts farther from W than the quantized weight alone"
    )


# ------------------------------------------------------------------------------------------------------------------ LoRA-GA
def test_lora_ga_takes_the_vectors_that_peft_takes_and_not_its_scale(rng, weights):
    from peft.tuners.lora.loraga import preprocess_loraga

    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["a"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    )
    u, v = (np.linalg.qr(rng.standard_normal((n, 8)))[0] for n in SHAPES["a"])
    gradient = ((u * 2.0 ** -np.arange(8)) @ v.T).astype(np.float32)  # well apart, so that svd_lowrank is exact
    net = Net(weights)

    def train_step():
        net.a.weight.grad = torch.from_numpy(gradient.copy())

    preprocess_loraga(net, config, train_step)
    net.a._peft_loraga_grad = torch.from_numpy(gradient.copy())
    layer = peft.get_peft_model(net, config).base_model.model.a
    ours = variants.lora_ga(lora_pair(weights, r=3, alpha=6), gradient, gamma=16)
    a, b = (m["default"].weight.detach().numpy().astype(np.float64) for m in (layer.lora_A, layer.lora_B))
    c = 20**0.25 / 4
    signs_a = np.sign((ours.lora_A.weight.data * a).sum(axis=1))
    signs_b = np.sign((ours.lora_B.weight.data * b).sum(axis=0))
    agree(ours.lora_A.weight.data / c * signs_a[:, None], a, 1e-4, "A is not scaled in PEFT")
    agree(ours.lora_B.weight.data * 2.0 ** -np.arange(3, 6) * signs_b, b, 1e-4, "B has the singular values in PEFT")
    agree(layer.base_layer.weight.detach().numpy() + 2 * b @ a, weights["a"], 1e-5, "PEFT's start")

    def cosine(a, b):  # of the first step with G's best approximation of rank 6
        step, s = gradient @ a.T @ a + b @ b.T @ gradient, 2.0 ** -np.arange(8)
        best = (u[:, :6] * s[:6]) @ v[:, :6].T
        return (step * best).sum() / np.linalg.norm(step) / np.linalg.norm(best)

    mine = cosine(ours.lora_A.weight.data.astype(np.float64), ours.lora_B.weight.data.astype(np.float64))
    assert mine > 1 - 1e-6 > cosine(a, b) + 1e-3


# -------------------------------------------------------------------------------------------------------- LoRA+ and LoRA-FA
def test_lora_plus_groups_are_pefts(weights):
    from peft.optimizers import create_loraplus_optimizer

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["a", "b"])
    theirs = create_loraplus_optimizer(
        adapted(weights, config), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1
    )
    ours = variants.lora_plus_groups(tl.add_lora(Ours(weights), r=4, alpha=8), lr=1e-3, ratio=8, weight_decay=0.1)
    for mine, group in zip(ours, (g for g in theirs.param_groups if g["params"]), strict=True):
        assert (mine["lr"], mine["weight_decay"]) == (group["lr"], group["weight_decay"])
        assert [w.shape for _, w in mine["params"]] == [tuple(p.shape) for p in group["params"]]


def test_the_corrected_gradient_is_pefts_lora_fa_optimizers(rng, weights, monkeypatch):
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # else it rounds to bfloat16
    theirs = adapted(weights, peft.LoraConfig(r=4, lora_alpha=10, target_modules=["a"]))
    optimizer = create_lorafa_optimizer(theirs, r=4, lora_alpha=10, lr=1e-3)
    ours = variants.freeze_A(lora_pair(weights))
    ours.lora_A.weight.data = theirs.base_model.model.a.lora_A["default"].weight.detach().numpy().copy()
    x, g = f32(rng, 7, 48), f32(rng, 7, 20)
    theirs.base_model.model.a(torch.from_numpy(x)).backward(torch.from_numpy(g))
    ours(Tensor(x)).backward(g)
    variants.correct_gradients(ours)
    optimizer.step()
    (state,) = (s for s in optimizer.state.values() if "exp_avg_B" in s)
    agree(ours.lora_B.weight.grad, state["exp_avg_B"] / 0.1, 1e-4, "B̄ (A Aᵀ)⁻¹/s²")
