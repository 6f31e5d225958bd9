"""Intrinsic dimension: the gradient of a random subspace, what training it moves, SAID's scales, and d90."""

import itertools

import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import Tensor, backend, ops
from tinylora.nn import Linear, Module
from tinylora.papers import intrinsic


class MLP(Module):
    def __init__(self, sizes=(8, 16, 3)):
        self.layers = [Linear(a, b) for a, b in itertools.pairwise(sizes)]

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = ops.relu(layer(x))
        return self.layers[-1](x)


def flat(model):
    return np.concatenate([w.data.reshape(-1) for w in model.parameters()])


def fit(model, parameters, x, y, steps, lr):
    optimizer = tl.AdamW(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        ops.softmax_cross_entropy(model(Tensor(x)), y).backward()
        optimizer.step()
    return float((model(Tensor(x)).data.argmax(-1) == y).mean())


# ----------------------------------------------------------------------------------------------------------------- the subspace
def test_at_the_start_the_output_is_the_models_bit_for_bit(rng, xp):
    model = MLP().to(xp)
    x = Tensor(xp.asarray(rng.standard_normal((5, 8)).astype(np.float32)))
    before = model(x).numpy()
    assert intrinsic.RandomSubspace(model, 4)(x).numpy().tobytes() == before.tobytes()


@pytest.mark.parametrize("per_weight", [False, True])
def test_the_gradient_of_theta_is_Pt_times_the_gradient_of_the_weights(per_weight, rng):
    model, x, g = MLP(), rng.standard_normal((5, 8)).astype(np.float32), rng.standard_normal((5, 3)).astype(np.float32)
    model(Tensor(x)).backward(g)
    full = np.concatenate([w.grad.reshape(-1) for w in model.parameters()])
    subspace = intrinsic.RandomSubspace(model, 6, seed=3, per_weight=per_weight)
    subspace(Tensor(x)).backward(g)
    np.testing.assert_allclose(subspace.theta.grad[0], subspace.projection @ full, rtol=1e-4, atol=1e-5)
    assert subspace.d == 6 == sum(w.size for _, w in subspace.trainable())
    if per_weight:  # θ = 0, so that λ has no gradient yet
        assert subspace.scales.size == 2 and (subspace.scales.grad == 0).all()
        subspace.theta.data[...] = 1
        subspace(Tensor(x)).backward(g)
        assert (subspace.scales.grad != 0).all()


def test_the_columns_of_P_have_length_1_and_the_seed_decides_them():
    p, same, other = (intrinsic.RandomSubspace(MLP(), 5, seed=s).projection for s in (1, 1, 2))
    np.testing.assert_allclose(np.linalg.norm(p, axis=1), 1, rtol=1e-6)
    assert (p == same).all() and (p != other).any()


def test_training_moves_the_weights_inside_the_subspace_only(rng):
    model, x, y = MLP(), rng.standard_normal((20, 8)).astype(np.float32), rng.integers(0, 3, 20)
    start = flat(model).copy()
    subspace = intrinsic.RandomSubspace(model, 5, seed=int(rng.integers(99)))
    fit(subspace, subspace.trainable(), x, y, 10, 0.1)
    assert (flat(model) == start).all()  # the model itself waits for apply
    p = subspace.projection.copy()
    out = subspace(Tensor(x)).data
    np.testing.assert_allclose(subspace.apply()(Tensor(x)).data, out, rtol=1e-5, atol=1e-6)
    moved = flat(model) - start
    inside = np.linalg.lstsq(p.T, moved, rcond=None)[0] @ p
    assert np.linalg.norm(moved) > 0.1 and np.linalg.norm(moved - inside) < 1e-5 * np.linalg.norm(moved) + 1e-6
    assert all(w.requires_grad for w in model.parameters()) and (subspace.theta.data == 0).all()


def test_with_d_equal_to_D_the_subspace_is_everything(rng):
    """P is then square and, being random, invertible: any weights can be reached."""
    model = MLP((3, 4, 2))
    size = flat(model).size
    subspace = intrinsic.RandomSubspace(model, size)
    wanted = rng.standard_normal(size).astype(np.float32)
    subspace.theta.data[0] = np.linalg.solve(subspace.projection.T.astype(np.float64), wanted - flat(model))
    np.testing.assert_allclose(np.concatenate([w.data.reshape(-1) for w in subspace.moved()]), wanted, atol=1e-2)


def test_a_tied_llama_and_an_adapted_one_can_be_trained_in_a_subspace(rng):
    for model in (tiny.model(), tl.add_lora(tiny.model(), r=2)):
        ids = tiny.ids(rng, 2, 8)
        before = tiny.logits(model, ids)
        subspace = intrinsic.RandomSubspace(model, 3)
        subspace(ids).sum().backward()
        assert subspace.theta.grad.shape == (1, 3) and tiny.logits(model, ids).tobytes() == before.tobytes()


@pytest.mark.parametrize(
    "d, per_weight, words", [(0, False, "from 1 to 176"), (177, False, "d = 177"), (2, True, "from 3 to 176")]
)
def test_a_dimension_that_does_not_fit_gets_a_sentence_and_changes_nothing(d, per_weight, words):
    model = MLP()
    with pytest.raises(ValueError, match=words):
        intrinsic.RandomSubspace(model, d, per_weight=per_weight)
    assert all(w.requires_grad for w in model.parameters())


# -------------------------------------------------------------------------------------------------------------------------- d90
def test_d90_is_of_the_score():
    assert intrinsic.d90({1: 0.3, 8: 0.9, 4: 0.91, 2: 0.8}, full=1.0) == 4
    assert intrinsic.d90({1: 0.3}, full=1.0) is None
    assert intrinsic.d90({3: 0.45, 5: 0.5}, full=0.5) == 3
    with pytest.raises(ValueError, match="at least one score"):
        intrinsic.d90({}, 1.0)


def test_a_pretrained_start_needs_fewer_dimensions_than_a_random_one():
    """Aghajanyan et al. 2020 in small: a teacher's 4 classes, and the same task with its input slightly turned. Fixed seed."""
    rng = np.random.default_rng(5)
    backend.seed(5)
    x = rng.standard_normal((300, 10)).astype(np.float32)
    teacher = rng.standard_normal((10, 4))
    turned = teacher + 0.2 * rng.standard_normal((10, 4))
    y, y_new = (x @ teacher).argmax(1), (x @ turned).argmax(1)
    pretrained = MLP((10, 24, 4))
    fit(pretrained, pretrained.parameters(), x, y, 150, 0.02)
    full = MLP((10, 24, 4))
    full_score = fit(full, full.parameters(), x, y_new, 150, 0.02)
    found = {}
    for name, state in (("random", MLP((10, 24, 4)).state_dict()), ("pretrained", pretrained.state_dict())):
        scores = {}
        for d in (1, 4, 16, 64, 256):
            model = MLP((10, 24, 4))
            model.load_state_dict(state)
            subspace = intrinsic.RandomSubspace(model, d, seed=d)
            scores[d] = fit(subspace, subspace.trainable(), x, y_new, 150, 0.1)
        found[name] = intrinsic.d90(scores, full_score)
        print(name, "D = 336, full", full_score, scores, "d90 =", found[name])
    assert full_score > 0.95
    assert found["pretrained"] < found["random"] <= 256


def test_threads_that_share_a_model_take_turns(rng):
    """Data-parallel shards call the subspace from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    subspace = intrinsic.RandomSubspace(tiny.model(), 5, seed=1)
    subspace.theta.data = rng.standard_normal((1, 5)).astype(np.float32)
    rows = [tiny.ids(rng, 1, 9) for _ in range(12)]
    alone = [subspace(x).data for x in rows]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: subspace(x).data, rows))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(alone, together, strict=True))
