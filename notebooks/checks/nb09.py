"""Checks of notebook 09, the memory of a training step."""

import numpy as np
from grading import check

import tinylora as tl
from tinylora.costs import memory
from tinylora.models.llama import MLP, LlamaConfig


def _held(blocks, method, h, f, vocabulary, r):
    """Bytes of a step without its activations, from memory.predict."""
    config = LlamaConfig(vocabulary, h, f, blocks, 1, 1, 2, tie_word_embeddings=False)
    a = memory.predict(config, method, r=r, seq_len=1, precision=memory.PAPER)
    return a.total - a.activations


@check("09-1", without="predict")
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


NAMES = ("gate", "up", "down")


def _layers(d, m):
    """The frozen 4-bit layers of an MLP, by name."""
    config = LlamaConfig(hidden_size=d, intermediate_size=m, num_attention_heads=1, head_dim=2, num_key_value_heads=1)
    mlp = tl.quantize_linears(MLP(config))
    return mlp, {name: getattr(mlp, f"{name}_proj") for name in NAMES}


def _tape(mlp, layers, rows, d, r, adapted, x_needs_gradient, rng):
    """Bytes of the tape of an MLP that exists, with bypasses on the adapted ones of its layers."""
    for name, layer in layers.items():
        mlp.replace(f"{name}_proj", tl.LoRALinear(layer, r=r) if name in adapted else layer)
    x = tl.Tensor(rng.standard_normal((rows, d)).astype(np.float32), requires_grad=x_needs_gradient)
    return tl.tape_bytes(mlp(x), exclude=[w for _, w in mlp.named_weights()])


@check("09-2", without=("tape_bytes", "block_tape"))
def _(answer, rng):
    "All sixteen cases of what is adapted and whether x needs a gradient, on MLPs that exist."
    cases = [tuple(n for i, n in enumerate(NAMES) if bits >> i & 1) for bits in (7, 1, 2, 4, 3, 5, 6, 0)]
    for i, (x_needs_gradient, adapted) in enumerate((needs, case) for needs in (True, False) for case in cases):
        if i % 4 == 0:  # quantizing is what takes time
            d, m = (int(n) for n in rng.integers([10, 40], [30, 70]))
            mlp, layers = _layers(d, m)
        rows, r = (int(n) for n in rng.integers([3, 1], [40, 8]))
        got = answer(rows, d, m, r, adapted, x_needs_gradient)
        held = _tape(mlp, layers, rows, d, r, adapted, x_needs_gradient, rng)
        who = f"bypasses on {', '.join(adapted)}" if adapted else "no bypass"
        assert got == held, (
            f"{rows} rows, d = {d}, m = {m}, r = {r}, {who}, x {'needs a' if x_needs_gradient else 'needs no'} gradient: "
            f"the tape holds {held:,} bytes ({held / 4 / rows:g} numbers a row), and the answer is {got!r}."
        )
