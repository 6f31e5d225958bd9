"""FLOPs: what is counted equals the formulas exactly, and watching changes nothing."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny

import tinylora as tl
from tinylora import Tensor, ops
from tinylora.costs import flops
from tinylora.kernels.attention import QUERY_BLOCK
from tinylora.nn import Linear, Linear4bit, Linear16bit
from tinylora.tensor import state


def per_token(layer, tokens, n_in, n_out, rng, input_gradient=True):
    """Multiply-adds a token of a forward and a backward pass."""
    x = Tensor(rng.standard_normal((tokens, n_in)).astype(np.float32), requires_grad=input_gradient)
    with flops.counting() as count:
        layer(x).backward(rng.standard_normal((tokens, n_out)).astype(np.float32))
    assert count.multiply_adds % tokens == 0 and count.flops == 2 * count.multiply_adds
    return count.multiply_adds // tokens


@pytest.fixture
def sizes(rng):
    return tuple(int(n) for n in rng.integers(3, 60, 3))  # in, out, tokens


@pytest.mark.parametrize("input_gradient", [True, False])
def test_full_fine_tuning_costs_3_N_squared_a_token_and_2_without_the_inputs_gradient(input_gradient, sizes, rng):
    n_in, n_out, tokens = sizes
    layer = Linear(n_in, n_out)
    found = per_token(layer, tokens, n_in, n_out, rng, input_gradient)
    assert found == flops.full(n_in, n_out, input_gradient) == (3 if input_gradient else 2) * n_in * n_out


@pytest.mark.parametrize("input_gradient", [True, False])
@pytest.mark.parametrize("kind", [lambda w: w, Linear4bit.of, Linear16bit.of])
def test_lora_costs_2_N_squared_and_6_N_R_a_token_on_every_base(kind, input_gradient, sizes, rng):
    n_in, n_out, tokens = sizes
    r = int(rng.integers(1, 9))
    layer = tl.LoRALinear(kind(Linear(n_in, n_out)), r=r)
    found = per_token(layer, tokens, n_in, n_out, rng, input_gradient)
    assert found == flops.lora(n_in, r, n_out, input_gradient)


def test_the_square_formulas_are_those_of_the_table():
    for n, r in ((7, 2), (64, 64)):
        assert flops.full(n) == 3 * n**2 and flops.lora(n, r) == 2 * n**2 + 6 * n * r
        assert flops.lora(n, r, input_gradient=False) == n**2 + 5 * n * r
    assert flops.lora(60, 10) == flops.full(60)  # R = N/6


@pytest.mark.parametrize("r, ratio, digits", [(16, 0.6745, 4), (64, 0.698, 3), (256, 0.792, 3)])
def test_ratios_at_width_4096(r, ratio, digits):
    found = flops.lora(4096, r) / flops.full(4096)
    assert round(found, digits) == ratio
    assert found == pytest.approx(2 / 3 + 2 * r / 4096)


def test_the_gradient_is_taken_as_Bt_g_times_x_and_the_gradient_of_W_is_never_formed(rng):
    """Every product has the rank or the number of tokens on one side: none is out × in from tokens."""
    n_in, n_out, r, tokens = 23, 31, 2, 7
    layer = tl.LoRALinear(Linear(n_in, n_out), r=r)
    with flops.counting() as count:
        layer(Tensor(np.ones((tokens, n_in), np.float32), requires_grad=True)).backward(
            np.ones((tokens, n_out), np.float32)
        )
    shapes = [(p.left, p.right) for p in count.products]
    assert len(shapes) == 8 and ((n_out, tokens), (tokens, n_in)) not in shapes
    assert sorted(shapes) == sorted(
        [
            ((tokens, n_in), (n_in, n_out)),  # W₀ x
            ((tokens, n_in), (n_in, r)),  # A x
            ((tokens, r), (r, n_out)),  # B (A x)
            ((tokens, n_out), (n_out, r)),  # Bᵀ g
            ((n_out, tokens), (tokens, r)),  # B̄
            ((r, tokens), (tokens, n_in)),  # Ā = (Bᵀ g) xᵀ
            ((tokens, r), (r, n_in)),  # Aᵀ (Bᵀ g)
            ((tokens, n_out), (n_out, n_in)),  # W₀ᵀ g
        ]
    )


def linear_layers(model):
    """(in, out) of every linear layer of a Llama, adapted or not, with the tied head."""
    c = model.config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    d, m = c.hidden_size, c.intermediate_size
    return [(d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d)], (d, c.vocab_size)


def attention(config, batch, length, block=QUERY_BLOCK):
    """Multiply-adds of q kᵀ and P v in a forward pass, block by block of queries."""
    pairs = sum((min(s + block, length) - s) * min(s + block, length) for s in range(0, length, block))
    return batch * config.num_attention_heads * config.head_dim * 2 * pairs


@pytest.mark.parametrize("length", [9, 70])
def test_a_forward_pass_of_a_llama_is_its_matrices_and_its_attention(length, rng):
    model, batch = tiny.model(max_position_embeddings=128), 2
    layers, (d, vocab) = linear_layers(model)
    with flops.counting() as count, tl.no_grad():
        model(tiny.ids(rng, batch, length))
    each = sum(a * b for a, b in layers) * batch * length + attention(model.config, batch, length)
    assert count.multiply_adds == model.config.num_hidden_layers * each + d * vocab * batch * length
    assert any(p.kind == "vecdot" for p in count.products)


def test_a_training_step_of_a_llama_and_what_lora_saves(rng):
    """Full: every matrix 3 N². LoRA: 2 N² + 3 R (in + out), but no x̄ below the first adapter (q, k, v of layer 0)."""
    ids, r = tiny.ids(rng, 2, 12), 2
    found = {}
    for name in ("full", "lora"):
        model = tiny.model() if name == "full" else tl.add_lora(tiny.model(), r=r)
        with flops.counting() as count:
            ops.softmax_cross_entropy(model(ids), ids).backward()
        found[name] = count.multiply_adds
    layers, (d, vocab) = linear_layers(model)
    tokens, scores = ids.size, attention(model.config, *ids.shape)
    assert found["full"] == tokens * (2 * 3 * sum(a * b for a, b in layers) + 3 * d * vocab) + 2 * 3 * scores
    saved = sum(flops.lora(a, r, b) - flops.lora(a, r, b, input_gradient=False) for a, b in layers[:3])
    adapted = 2 * sum(flops.lora(a, r, b) for a, b in layers) - saved
    assert found["lora"] == tokens * (adapted + 2 * d * vocab) + 2 * 3 * scores  # the head is frozen: forward and x̄


def test_checkpointing_costs_one_more_forward(rng):
    layer = Linear(8, 8)
    x = Tensor(rng.standard_normal((5, 8)).astype(np.float32), requires_grad=True)
    with flops.counting() as count:
        tl.checkpoint(layer, x).backward(np.ones((5, 8), np.float32))
    assert count.multiply_adds == 5 * 4 * 8 * 8


def test_a_merge_is_seen_too(rng):
    layer = tl.LoRALinear(Linear(6, 9), r=2)
    with flops.counting() as count:
        layer.merge()
    assert count.multiply_adds == 6 * 9 * 2


def test_watching_changes_no_bit_and_leaves_plain_arrays_behind(rng):
    ids = tiny.ids(rng, 2, 10)
    outcomes = []
    for watch in (False, True):
        model = tl.add_lora(tiny.model(seed=3), r=2)
        optimizer = tl.AdamW([p for _, p in model.trainable()], lr=0.01)
        with flops.counting() if watch else tl.backend.using_generator(tl.backend.generator()):
            loss = ops.softmax_cross_entropy(model(ids), ids)
            loss.backward()
            optimizer.step()
        arrays = [w.grad for _, w in model.trainable()] + [w.data for w in model.parameters()] + [np.asarray(loss.data)]
        assert all(type(a) is np.ndarray for a in arrays)
        outcomes.append([a.tobytes() for a in arrays])
    assert outcomes[0] == outcomes[1]


def test_the_engine_is_itself_again_after_an_error_and_counters_do_not_nest():
    with pytest.raises(RuntimeError, match="a counter is open already"), flops.counting(), flops.counting():
        pass
    assert state.around is None
    with flops.counting() as count:
        pass
    assert count.flops == 0 and count.products == []


def test_another_thread_is_not_counted_and_may_count_for_itself():
    x = Tensor(np.ones((2, 3), np.float32))

    def other():
        ops.matmul(x, np.ones((3, 5), np.float32))
        with flops.counting() as count:
            ops.matmul(x, np.ones((3, 7), np.float32))
        return count.multiply_adds

    with flops.counting() as count, ThreadPoolExecutor(1) as pool:
        assert pool.submit(other).result() == 2 * 3 * 7
    assert count.products == []


def test_the_shards_of_a_training_run_are_counted():
    """Their threads belong to the run: as many operations for two shards as for one."""
    found = []
    for shards in (1, 2):
        recipe = tl.train.Recipe(steps=1, batch_size=2, seq_len=8, shards=shards)
        with flops.counting() as count:
            tl.train.fit(tiny.model(), tl.corpus.Text([np.arange(60)]), recipe, progress=False)
        found.append(count.multiply_adds)
    assert found[0] == found[1] > 0


def test_a_tape_that_outlives_the_block_is_walked_uncounted():
    w = Tensor(np.ones((3, 3), np.float32), requires_grad=True)
    with flops.counting() as count:
        loss = ops.sum(ops.matmul(w, w))
    loss.backward()
    assert count.multiply_adds == 27 and type(w.grad) is np.ndarray


def test_a_device_array_is_refused_and_not_counted_as_nothing(xp):
    x = Tensor(xp.asarray(np.ones((2, 2), np.float32)))
    if xp is np:
        return
    with pytest.raises(TypeError, match="only NumPy arrays can be watched"), flops.counting():
        ops.matmul(x, x)
