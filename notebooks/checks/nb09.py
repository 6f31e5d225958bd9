"""Checks of notebook 09, the memory of a training step."""

import math

import numpy as np
from grading import check

import tinylora as tl
from tinylora.costs import memory
from tinylora.models.llama import MLP, LlamaConfig

NAMES = ("gate", "up", "down")


def _tape(rows, d, m, r, adapted, x_needs_gradient, rng):
    """Bytes of the tape of an MLP that exists."""
    mlp = tl.quantize_linears(MLP(LlamaConfig(hidden_size=d, intermediate_size=m, num_attention_heads=1, head_dim=2,
                                              num_key_value_heads=1)))  # fmt: skip
    for name in adapted:
        mlp.replace(f"{name}_proj", tl.LoRALinear(getattr(mlp, f"{name}_proj"), r=r))
    x = tl.Tensor(rng.standard_normal((rows, d)).astype(np.float32), requires_grad=x_needs_gradient)
    return tl.tape_bytes(mlp(x), exclude=[w for _, w in mlp.named_weights()])


@check("09-1")
def _(answer, rng):
    "All sixteen cases of what is adapted and whether x needs a gradient, on MLPs that exist."
    cases = [tuple(n for i, n in enumerate(NAMES) if bits >> i & 1) for bits in (7, 1, 2, 4, 3, 5, 6, 0)]
    for x_needs_gradient in (True, False):
        for adapted in cases:
            rows, d, m, r = (int(n) for n in rng.integers([3, 10, 40, 1], [40, 30, 70, 8]))
            got, held = answer(rows, d, m, r, adapted, x_needs_gradient), _tape(
                rows, d, m, r, adapted, x_needs_gradient, rng
            )  # fmt: skip
            who = f"bypasses on {', '.join(adapted)}" if adapted else "no bypass"
            assert got == held, (
                f"{rows} rows, d = {d}, m = {m}, r = {r}, {who}, x {'needs a' if x_needs_gradient else 'needs no'} gradient: "
                f"the tape holds {held:,} bytes ({held / 4 / rows:g} numbers a row), and the answer is {got!r}."
            )


def _held(blocks, method, h, f, vocabulary, r):
    """Bytes of a step without its activations, from memory.predict."""
    config = LlamaConfig(vocabulary, h, f, blocks, 1, 1, 2, tie_word_embeddings=False)
    a = memory.predict(config, method, r=r, seq_len=1, precision=memory.PAPER)
    return a.total - a.activations


@check("09-2")
def _(answer, rng):
    "Budgets that fit to the byte, one byte less, and any; for the three methods, odd widths, and nothing that fits."
    sizes = [(4096, 11008, 32000, 64), (40, 97, 300, 3)]
    sizes += [tuple(int(n) for n in rng.integers([30, 100, 200, 1], [600, 2000, 9000, 40])) for _ in range(3)]
    for h, f, vocabulary, r in ((h + h % 2, f, v, r) for h, f, v, r in sizes):
        for method in ("full", "lora", "qlora"):
            one, two = (_held(blocks, method, h, f, vocabulary, r) for blocks in (1, 2))
            deep = int(rng.integers(2, 150))
            exact = _held(deep, method, h, f, vocabulary, r)
            for budget, blocks in (
                (exact, deep),
                (exact - 1, deep - 1),
                (exact + (two - one) // 2, deep),
                (one - 1, 0),
                (one // 2, 0),
            ):
                got = answer(budget, method, h, f, vocabulary, r)
                assert isinstance(got, (int, np.integer)), f"Expected a number of blocks, an int, and got {got!r}."
                if got == blocks:
                    continue
                tried = max(int(got), 1)
                assert got == blocks, (
                    f"{method}, h = {h}, f = {f}, vocabulary {vocabulary:,}, r = {r}, {budget:,} bytes: the answer is {got}; "
                    f"{tried} blocks take {_held(tried, method, h, f, vocabulary, r):,} bytes, "
                    f"{tried + 1} take {_held(tried + 1, method, h, f, vocabulary, r):,}."
                )


def _savings(config, r, t):
    """(saved by four bits, saved by checkpointing), in bytes."""
    how = {"r": r, "seq_len": t, "precision": memory.PAPER}
    before = memory.predict(config, "lora", **how).total
    bits, ckpt = memory.predict(config, "qlora", **how).total, memory.predict(config, "lora", checkpointing=True, **how)
    return before - bits, before - ckpt.total


@check("09-3")
def _(answer, rng):
    "At the answer checkpointing saves as much, one token below it does not."
    configs = [memory.config_of(name) for name in ("llama-7b", "base", "llama-65b")]
    for _ in range(3):
        d, m = 32 * int(rng.integers(5, 100)), 8 * int(rng.integers(100, 900))
        configs.append(LlamaConfig(1000, d, m, int(rng.integers(2, 60)), 16, 16, 64, tie_word_embeddings=False))
    for config in configs:
        r = int(rng.integers(4, 65))
        t = answer(config, r)
        assert isinstance(t, (int, np.integer)) and t >= 1, f"Expected a number of tokens, 1 or more, and got {t!r}."
        what = f"Width {config.hidden_size}, {config.num_hidden_layers} blocks, r = {r}"
        bits, ckpt = _savings(config, r, int(t))
        assert ckpt >= bits, (
            f"{what}: at {t:,} tokens checkpointing saves {ckpt:,} bytes, four bits {bits:,}, which is more."
        )
        if t > 1:
            bits, ckpt = _savings(config, r, int(t) - 1)
            assert ckpt < bits, (
                f"{what}: at {t - 1:,} tokens checkpointing saves {ckpt:,} bytes already, four bits {bits:,}; "
                f"{t:,} is not the smallest."
            )


def _peak(blocks, k, a, c):
    """Bytes held at most, by walking through the step."""
    groups = [range(start, min(start + k, blocks)) for start in range(0, blocks, k)]
    return max(len(groups) * a + len(group) * c for group in groups)


@check("09-4")
def _(answer, rng):
    "The peak of the answer's k against that of every other k, for inputs that are small, large, or as large as a tape."
    cases = [(32, 1, 19), (36, 10, 10), (80, 100, 7), (1, 3, 5), (30, 1000, 1), (4, 2, 4)]
    cases += [tuple(int(n) for n in rng.integers([2, 1, 1], [150, 1000, 1000])) for _ in range(40)]
    for blocks, a, c in cases:
        peaks = {k: _peak(blocks, k, a, c) for k in range(1, blocks + 1)}
        best = min(peaks, key=lambda k: (peaks[k], k))
        got = answer(blocks, a, c)
        assert isinstance(got, (int, np.integer)) and got in peaks, (
            f"L = {blocks}: expected an int from 1 to {blocks}, and got {got!r}."
        )
        groups = math.ceil(blocks / int(got))
        assert peaks[int(got)] == peaks[best], (
            f"L = {blocks}, a = {a}, c = {c}: with k = {got}, {groups} groups hold up to {peaks[int(got)]:,} bytes at once; "
            f"there is a k with {peaks[best]:,}."
        )
        assert got == best, f"L = {blocks}, a = {a}, c = {c}: a smaller k than {got} has the same peak."
