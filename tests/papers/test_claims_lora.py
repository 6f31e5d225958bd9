"""The claims of "LoRA: Low-Rank Adaptation of Large Language Models" that can be decided here: one test names each of them.

Claims about counts are in test_counting.py row by row, those about operations in test_flops.py; they are named here once
more, briefly. A name that says "not" holds a claim that fails, with its number.
"""

import numpy as np
import pytest
from gradcheck import check

import tinylora as tl
from tinylora import LoRALinear, Tensor, ops
from tinylora.costs import flops, parameters
from tinylora.nn import Linear
from tinylora.papers import lora_numbers, subspaces, verdict

f32, f64 = np.float32, np.float64


def layer(rng, d_in=12, d_out=10, r=3, alpha=6, dtype=f64):
    """A LoRALinear with random W₀, A and B of one dtype."""
    h = LoRALinear(Linear(d_in, d_out), r=r, alpha=alpha)
    for part, shape in ((h.base_layer, (d_out, d_in)), (h.lora_A, (r, d_in)), (h.lora_B, (d_out, r))):
        part.weight.data = rng.standard_normal(shape).astype(dtype)
    return h


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# --------------------------------------------------------------------------------------------------------------- §2, equations 1 and 2
def test_eq_1_the_loss_is_over_the_targets_only(rng):
    """max Σ_t log P(y_t | x, y_<t): the prompt's tokens are read, and not learned."""
    logits = Tensor(rng.standard_normal((2, 7, 9)), requires_grad=True)
    targets, mask = rng.integers(0, 9, (2, 7)), np.zeros((2, 7))
    mask[0, 4:], mask[1, 2:5] = 1, 1
    loss = ops.softmax_cross_entropy(logits, targets, mask, reduction="sum")
    z = logits.data - logits.data.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    by_hand = -sum(log_p[i, t, targets[i, t]] for i in range(2) for t in range(7) if mask[i, t])
    assert loss.item() == pytest.approx(by_hand, abs=1e-12)
    loss.backward()
    assert (logits.grad[mask == 0] == 0).all() and (logits.grad[mask == 1] != 0).all()


def test_eq_2_the_parameters_are_a_hundredth_of_a_percent_at_r_4_and_a_quarter_of_that_at_r_1():
    share = {r: parameters.lora_square(2 * 96, 12288, r) / 175_255.8e6 for r in (1, 4)}
    assert f"{share[4]:.4%}" == "0.0108%" and f"{share[1]:.4%}" == "0.0027%"


# ------------------------------------------------------------------------------------------------------------------ §4.1, equation 3
def test_eq_3_the_two_paths_equal_the_merged_weight(rng):
    h = layer(rng)
    x = rng.standard_normal((7, 12))
    w, a, b = h.base_layer.weight.data, h.lora_A.weight.data, h.lora_B.weight.data
    assert relative(h(Tensor(x)).data, x @ (w + h.scaling * b @ a).T) < 1e-12
    assert relative(h.merge()(Tensor(x)).data, h(Tensor(x)).data) < 1e-12


def test_s4_1_with_alpha_fixed_twice_the_rank_halves_the_scale(rng):
    """α/r, α constant in r: the same A and B inside twice the rank (the rest zeros) move the layer half as far."""
    small, large = layer(rng, r=3, alpha=5), layer(rng, r=6, alpha=5)
    assert large.scaling == small.scaling / 2
    large.lora_A.weight.data = np.vstack([small.lora_A.weight.data, np.zeros((3, 12))])
    large.lora_B.weight.data = np.hstack([small.lora_B.weight.data, np.zeros((10, 3))])
    np.testing.assert_allclose(large.delta(), small.delta() / 2, rtol=1e-12)


def test_s4_1_at_the_start_the_output_is_the_bases_bit_for_bit_and_only_B_has_a_gradient(rng):
    h = LoRALinear(Linear(12, 10), r=3)
    x = Tensor(rng.standard_normal((7, 12)).astype(f32))
    y = h(x)
    assert y.data.tobytes() == h.base_layer(x).data.tobytes()
    y.backward(rng.standard_normal((7, 10)).astype(f32))
    assert (h.lora_A.weight.grad == 0).all() and (h.lora_B.weight.grad != 0).all()


def test_s4_1_A_is_not_gaussian_in_the_authors_code_but_uniform_with_variance_1_over_3_d_in():
    a = LoRALinear(Linear(300, 4), r=200).lora_A.weight.data
    assert np.abs(a).max() <= 300**-0.5 and a.var() == pytest.approx(1 / 900, rel=0.02)
    kurtosis = ((a - a.mean()) ** 4).mean() / a.var() ** 2
    assert kurtosis == pytest.approx(1.8, abs=0.05)  # uniform; a Gaussian has 3
    gaussian = LoRALinear(Linear(300, 4), r=200, init="gaussian").lora_A.weight.data
    assert (gaussian**4).mean() / (gaussian**2).mean() ** 2 == pytest.approx(3, abs=0.15)


def test_gradients_of_A_and_B_are_central_differences(rng):
    """∂L/∂A = s Bᵀ G, ∂L/∂B = s G Aᵀ, G = Σ g xᵀ: the closed form, and numbers."""
    h = layer(rng)

    def forward(x, a, b):
        h.base_layer.weight.data = h.base_layer.weight.data.astype(x.dtype)
        h.lora_A.weight, h.lora_B.weight = a, b
        return h(x)

    a, b, x = h.lora_A.weight.data, h.lora_B.weight.data, rng.standard_normal((5, 12))
    check(forward, x, a, b, rng=rng)
    h = layer(rng)
    g = rng.standard_normal((5, 10))
    h(Tensor(x)).backward(g)
    big_g, s = g.T @ x, h.scaling
    np.testing.assert_allclose(h.lora_A.weight.grad, s * h.lora_B.weight.data.T @ big_g, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(h.lora_B.weight.grad, s * big_g @ h.lora_A.weight.data.T, rtol=1e-10, atol=1e-12)


def test_the_gradient_of_the_weight_is_never_formed(rng):
    """Bᵀ(g xᵀ) is computed as (Bᵀ g) xᵀ: no product makes an out × in matrix."""
    h = layer(rng, d_in=17, d_out=19, r=2)
    with flops.counting() as count:
        h(Tensor(rng.standard_normal((5, 17)), requires_grad=True)).backward(rng.standard_normal((5, 19)))
    assert count.products and all((p.left[0], p.right[-1]) not in ((19, 17), (17, 19)) for p in count.products)


def test_s4_1_with_r_of_the_smaller_side_any_update_can_be_written_as_BA(rng):
    wanted = rng.standard_normal((10, 12))
    h = layer(rng, r=10)
    u, s, vt = np.linalg.svd(wanted, full_matrices=False)
    h.lora_A.weight.data, h.lora_B.weight.data = vt, u * s / h.scaling
    assert relative(h.delta(), wanted) < 1e-13


def test_s4_1_below_that_the_best_error_is_the_tail_of_the_spectrum(rng):
    """Eckart–Young to 1e-12, and no r × k, d × r pair that was fitted by least squares gets below it."""
    wanted = rng.standard_normal((10, 12))
    u, s, vt = np.linalg.svd(wanted)
    for r in range(1, 10):
        best = np.linalg.norm(wanted - (u[:, :r] * s[:r]) @ vt[:r]) ** 2
        assert best == pytest.approx(subspaces.best_rank_error(wanted, r), rel=1e-12)
        b = rng.standard_normal((10, r))
        assert np.linalg.norm(wanted - b @ np.linalg.lstsq(b, wanted, rcond=None)[0]) ** 2 > best


@pytest.mark.parametrize("r", [2, 6])
def test_s4_1_training_reaches_that_tail_and_no_less(r):
    """Full fine-tuning is recovered at r = rank; below, AdamW stops at the Eckart–Young error. 6 × 8, inputs = identity, fixed seed."""
    rng = np.random.default_rng(0)
    tl.seed(0)
    h = LoRALinear(Linear(8, 6), r=r, alpha=r)
    wanted = h.base_layer.weight.data + (rng.standard_normal((6, 8)) / 3).astype(f32)
    tail = subspaces.best_rank_error(wanted - h.base_layer.weight.data, r)
    optimizer, x = tl.AdamW([p for _, p in h.trainable()], lr=0.03), Tensor(np.eye(8, dtype=f32))
    for step in range(800):
        optimizer.zero_grad()
        error = h(x) - wanted.T
        loss = (error * error).sum()
        loss.backward()
        optimizer.step(lr_scale=1 - step / 800)
    if r == 6:
        assert loss.item() < 1e-4 and tail < 1e-10
    else:
        assert tail > 0.1 and tail * (1 - 1e-5) <= loss.item() < tail * 1.01


# -------------------------------------------------------------------------------------------------------- §4.1, no added latency
def test_s4_1_a_merge_in_float64_is_exact_to_1e_13_and_so_is_a_switch(rng):
    first, second = layer(rng), layer(rng)
    w0 = first.base_layer.weight.data
    merged = first.merge().weight.data
    np.testing.assert_allclose(merged, w0 + first.delta(), rtol=1e-13, atol=1e-13)
    switched = merged - first.delta() + second.delta()
    assert relative(switched, w0 + second.delta()) < 1e-13
    assert relative(switched, merged) > 0.1


@pytest.mark.parametrize("ratio, share", [(0.11, 0.883), (1.0, 0.653), (8**0.5, 0.46)])
def test_s4_1_subtracting_BA_in_float32_does_not_recover_the_weight(ratio, share):
    """Of the weights, 88 % come back exactly for ‖ΔW‖/‖W‖ = 0.11 (table 7's 6.91/61.95), 65 % for 1, 46 % for √8 (N(0, 1) factors, r = 8).

    Only the ratio matters, as floating point has no scale. 256 × 256, r = 8, ten seeds.
    """
    exact, worst = [], 0.0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        w = rng.standard_normal((256, 256)).astype(f32)
        delta = rng.standard_normal((256, 8)) @ rng.standard_normal((8, 256))
        delta = (delta * (ratio * np.linalg.norm(w) / np.linalg.norm(delta))).astype(f32)
        back = (w + delta) - delta
        exact.append(float((back == w).mean()))
        worst = max(worst, float(np.abs(back - w).max()))
    print(
        f"‖ΔW‖/‖W‖ = {ratio:.2f}: {np.mean(exact):.1%} restored exactly ({min(exact):.1%} to {max(exact):.1%}), worst {worst:.1e}"
    )
    assert np.mean(exact) == pytest.approx(share, abs=0.01) and 1e-8 < worst < 2e-6


def test_s4_1_a_merged_layer_makes_one_product_where_the_adapted_makes_three(rng):
    h = layer(rng)
    made = []
    for net in (h.base_layer, h, h.merge()):
        with flops.counting() as count, tl.no_grad():
            net(Tensor(rng.standard_normal((4, 12))))
        made.append((len(count.products), count.multiply_adds))
    assert made[0] == made[2] == (1, 4 * 120) and made[1] == (3, 4 * (120 + 3 * 22))


# ------------------------------------------------------------------------------------------------------------------- §4.2 and tables
def test_s4_2_unmerged_adapters_can_be_batched_row_by_row(rng):
    """h_i = W₀ x_i + s B_i A_i x_i in two batched products equals the loop over tasks; the gradients too."""
    tasks, n, d_in, d_out, r, s = 3, 8, 12, 10, 2, 1.5
    a, b = rng.standard_normal((tasks, r, d_in)), rng.standard_normal((tasks, d_out, r))
    w, task, x = rng.standard_normal((d_out, d_in)), rng.integers(0, tasks, n), rng.standard_normal((n, 1, d_in))
    g = rng.standard_normal((n, 1, d_out))
    ta, tb = (Tensor(m, requires_grad=True) for m in (a, b))
    h = (
        ops.linear(Tensor(x), w)
        + ops.matmul(ops.matmul(Tensor(x), ops.swapaxes(ta[task], 1, 2)), ops.swapaxes(tb[task], 1, 2)) * s
    )
    loop = np.stack([x[i] @ (w + s * b[t] @ a[t]).T for i, t in enumerate(task)])
    assert relative(h.data, loop) < 1e-12
    einsum = x[:, 0] @ w.T + s * np.einsum("nor,nri,ni->no", b[task], a[task], x[:, 0])
    assert relative(h.data[:, 0], einsum) < 1e-12
    h.backward(g)
    grad_a = np.zeros_like(a)
    for i, t in enumerate(task):
        grad_a[t] += s * b[t].T @ g[i].T @ x[i]
    np.testing.assert_allclose(ta.grad, grad_a, rtol=1e-10, atol=1e-12)


def test_s4_2_merged_adapters_cannot_be_batched(rng):
    """One weight serves one task: with another task's row the merged layer is wrong by all of the difference of the updates."""
    first, second = layer(rng), layer(rng)
    second.base_layer.weight.data = first.base_layer.weight.data
    x = rng.standard_normal((1, 12))
    wrong = first.merge()(Tensor(x)).data - second(Tensor(x)).data
    np.testing.assert_allclose(wrong, x @ (first.delta() - second.delta()).T, rtol=1e-9, atol=1e-11)


def test_s4_2_the_checkpoint_is_10000_times_smaller_by_the_printed_sizes_and_9285_times_in_parameters():
    count = parameters.lora_square(2 * 96, 12288, 4)
    assert 350e9 / 35e6 == 10_000 and round(175_255.8e6 / count) == 9285
    assert 2 * count / 1e6 == pytest.approx(37.7, abs=0.05) and 2 * count / 2**20 == 36.0  # MB, MiB


def test_s4_2_the_25_percent_are_time_and_not_throughput():
    assert pytest.approx(0.246, abs=5e-4) == 1 - 32.5 / 43.1 and pytest.approx(0.326, abs=5e-4) == 43.1 / 32.5 - 1


def test_table_1_the_six_percentages_follow_from_the_milliseconds():
    found = [r for r in lora_numbers.audit() if r.where == "Table 1" and r.printed.endswith("%")]
    assert len(found) == 6 and {r.verdict for r in found} == {"rounds to"}


def test_table_2_the_averages_follow_from_the_scores():
    found = [r for r in lora_numbers.audit() if r.setting == "average of 8"]
    assert len(found) == 14 and all(abs(r.difference) < 0.0501 for r in found)


def test_s5_1_the_counts_of_lora_and_of_four_baselines():
    L, d = 96, 12288
    assert parameters.lora_square(2 * L, d, 1) == 4_718_592
    assert parameters.prefix_embedding(d, 256, 8) == 3_244_032
    assert parameters.prefix_layer(L, d, 8, 8) == 18_874_368
    assert parameters.adapter_h(L, d, 1) == 7_078_080 and parameters.adapter_l(L, d, 1) == 7_078_080 // 2 + 2 * L * d
    assert parameters.lora(3, 5, 2) != 2 * 3 * 2  # 2 d r is for square matrices only


def test_appendix_E_lora_with_prefix_embedding_adds_its_tokens():
    total = parameters.lora_square(2 * 96, 12288, 8) + parameters.prefix_embedding(12288, 8, 4)
    assert total == 37_896_192 and verdict.judge("37.8M", total / 1e6) == "truncated"


def test_lora_costs_two_thirds_of_the_operations_of_full_fine_tuning(rng):
    """2 N² + 6 N R against 3 N² multiply-adds a token, counted."""
    n, r, tokens = 48, 2, 5
    made = []
    for net in (Linear(n, n), LoRALinear(Linear(n, n), r=r)):
        with flops.counting() as count:
            net(Tensor(rng.standard_normal((tokens, n)).astype(f32), requires_grad=True)).backward(
                np.ones((tokens, n), f32)
            )
        made.append(count.multiply_adds)
    assert made == [tokens * 3 * n * n, tokens * (2 * n * n + 6 * n * r)]
    assert made[1] / made[0] == pytest.approx(2 / 3 + 2 * r / n)


# ------------------------------------------------------------------------------------------------------------- §7.2, §7.3, appendix G
def test_eq_4_is_1_for_equal_spans_0_for_orthogonal_ones_and_ignores_the_basis(rng):
    q = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    a = np.diag([3.0, 2, 1]) @ q[:3]
    assert subspaces.similarity(a, np.linalg.qr(rng.standard_normal((3, 3)))[0] @ a, 3, 3) == pytest.approx(
        1, abs=1e-12
    )
    assert subspaces.similarity(a, np.diag([3.0, 2, 1]) @ q[3:6], 3, 3) == pytest.approx(0, abs=1e-12)
    b, turn = rng.standard_normal((5, 30)), np.linalg.qr(rng.standard_normal((30, 30)))[0]
    assert subspaces.similarity(a @ turn, b @ turn, 2, 4) == pytest.approx(subspaces.similarity(a, b, 2, 4), abs=1e-12)


def test_eq_4_two_random_matrices_share_max_i_j_over_d_and_not_nothing():
    """Figure 4's right panel: "do not share any common singular value directions". d = 256, (4, 16): 0.0625. GPT-3's d, (8, 64): 0.0052."""
    assert subspaces.expected_similarity(4, 16, 256) == 0.0625
    assert f"{subspaces.expected_similarity(8, 64, 12288):.4f}" == "0.0052"
    rng = np.random.default_rng(1)
    phis = [subspaces.similarity(*(rng.standard_normal((n, 256)) for n in (4, 16)), 4, 16) for _ in range(60)]
    print(f"measured {np.mean(phis):.4f} ± {np.std(phis) / 60**0.5:.4f}")
    assert abs(np.mean(phis) - 0.0625) < 5 * np.std(phis) / 60**0.5


def test_appendix_G_the_printed_identity_does_not_hold(rng):
    a, b, p = rng.standard_normal((5, 40)), rng.standard_normal((5, 40)), 5
    phi, distance = subspaces.similarity(a, b, p, p), subspaces.projection_distance(a, b, p, p)
    assert 1 - distance**2 / p == pytest.approx(phi, abs=1e-12)
    assert (1 - distance**2) / p == pytest.approx(phi - 0.8, abs=1e-12)  # as printed, and negative


@pytest.mark.parametrize("r, predicted, printed, tolerance", [(4, 0.0202, 0.02, 0.005), (64, 0.3227, 0.33, 0.01)])
def test_table_7_the_random_column_is_w_r_over_d(r, predicted, printed, tolerance):
    """‖W‖ = 61.95, d = 12288. 0.02 and 0.33 are one draw each."""
    d, norm = 12288, 61.95
    assert norm * r / d == pytest.approx(predicted, abs=5e-5) and abs(printed - norm * r / d) < tolerance
    w = np.full((192, 192), norm / 192)  # the library's formula at the same r/d: 1/192 = 64/12288
    assert subspaces.expected_projection(w, 1) == pytest.approx(norm * 64 / d)


def test_table_7_the_factors_follow_from_the_printed_norms():
    assert pytest.approx(21.59, abs=5e-3) == 6.91 / 0.32 and pytest.approx(1.88, abs=5e-3) == 3.57 / 1.90
    assert pytest.approx(0.11, abs=2e-3) == 6.91 / 61.95  # ‖ΔW‖ is a ninth of ‖W‖


def test_s7_1_wq_and_wv_are_not_the_best_of_table_5():
    """ "Adapting both Wq and Wv gives the best performance overall": all four at r = 2 tie on WikiSQL and win on MultiNLI."""
    q_v, all_four = (73.7, 91.3), (73.7, 91.7)
    assert all_four[0] >= q_v[0] and all_four[1] > q_v[1] + 0.1
    assert parameters.lora_square(2 * 96, 12288, 4) == parameters.lora_square(4 * 96, 12288, 2)
