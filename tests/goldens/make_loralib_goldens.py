"""Write loralib.npz: what loralib 0.1.2 itself computes on a CPU, for tests/test_loralib.py to compare with.

Run `python tests/goldens/make_loralib_goldens.py` where torch and loralib are installed; the tests need only the file. It holds a JSON
index (as bytes) and, for each quantity, one array in which the cases lie end to end, as in quant.npz.

    z = dict(np.load("tests/goldens/loralib.npz"))
    index = json.loads(z["index"].tobytes())
    for case in index["cases"]:
        get = {name: z[name][start:stop].reshape(shape) for name, (start, stop, shape) in case["at"].items()}

`case` has name, kind (a class of loralib), arguments and options (of its constructor). `get` has, in float32 (ids: int64),

    x                                     the input; for Embedding `ids`
    state.weight, state.lora_A, ...       every entry of the layer's state dict, each drawn from a normal distribution
    y                                     the output in train mode
    g                                     the gradient that is sent back from y
    grad.x, grad.bias, grad.lora_A, ...   what it becomes, for everything that has a gradient
    merged                                the weight after eval()
    y_eval                                the output then
    restored                              the weight after train() again

Cases without `merged` have merge_weights=False; of those, and of layers with r = 0, the weight does not change.
"""

import json
from pathlib import Path

import numpy as np

OUT = Path(__file__).with_name("loralib.npz")


def plan():
    """(kind, arguments, options, shape of x) of every case; small, and no two dimensions alike."""
    for r, alpha in ((0, 1), (1, 1), (3, 8), (8, 4)):
        for turned in (False, True):
            yield "Linear", (7, 10), {"r": r, "lora_alpha": alpha, "fan_in_fan_out": turned}, (2, 3, 7)
    yield "Linear", (5, 6), {"r": 2, "lora_alpha": 3, "bias": False}, (4, 5)
    yield "Linear", (5, 6), {"r": 2, "lora_alpha": 3, "merge_weights": False}, (4, 5)

    T, F = True, False
    for enable in ([T], [T, F, T], [F, T, F], [T, T, T], [F, T], [F, F, T, T]):
        for turned in (False, True):
            options = {"r": 2, "lora_alpha": 6, "enable_lora": enable, "fan_in_fan_out": turned}
            yield "MergedLinear", (5, 12), options, (2, 3, 5)
    yield "MergedLinear", (5, 12), {"r": 3, "enable_lora": [T, F, T], "bias": False}, (2, 5)
    yield "MergedLinear", (5, 12), {"r": 3, "enable_lora": [T, F, T], "merge_weights": False}, (2, 5)
    yield "MergedLinear", (5, 12), {"r": 0, "enable_lora": [T, F, T]}, (2, 5)

    for r, alpha in ((0, 1), (1, 1), (4, 6)):
        yield "Embedding", (11, 5), {"r": r, "lora_alpha": alpha}, (3, 4)
    yield "Embedding", (11, 5), {"r": 2, "lora_alpha": 5, "merge_weights": False}, (7,)

    for r in (0, 1, 3):
        yield "Conv2d", (4, 6, 3), {"r": r, "lora_alpha": 2}, (2, 4, 5, 6)
    yield "Conv2d", (4, 6, 3), {"r": 2, "groups": 2, "padding": 1, "stride": 2}, (2, 4, 5, 6)
    yield "Conv2d", (4, 8, 2), {"r": 2, "groups": 4, "dilation": 2}, (1, 4, 5, 5)
    yield "Conv2d", (3, 5, 1), {"r": 2, "bias": False}, (2, 3, 3, 4)
    yield "Conv2d", (3, 5, 2), {"r": 2, "merge_weights": False}, (2, 3, 3, 4)
    yield "Conv1d", (4, 6, 1), {"r": 2, "lora_alpha": 3, "groups": 2}, (2, 4, 5)
    yield "Conv3d", (4, 6, 1), {"r": 2, "lora_alpha": 3, "stride": 2}, (1, 4, 3, 4, 3)


def main():
    import loralib
    import torch

    torch.set_num_threads(1)
    parts = {}

    def put(name, value):
        """Append to the array of that name; returns its place and shape."""
        value = (value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(value)).numpy()
        before = sum(p.size for p in parts.setdefault(name, []))
        parts[name].append(value.copy().reshape(-1))
        return before, before + value.size, value.shape

    cases = []
    for i, (kind, arguments, options, shape) in enumerate(plan()):
        rng = np.random.default_rng([2106, 9685, i])
        layer = getattr(loralib, kind)(*arguments, **options)
        ids = kind == "Embedding"
        x = rng.integers(0, arguments[0], shape) if ids else rng.standard_normal(shape).astype(np.float32)
        x = torch.from_numpy(x).requires_grad_(not ids)
        values = {}
        with torch.no_grad():
            for name, p in layer.named_parameters():
                p.copy_(torch.from_numpy(rng.standard_normal(tuple(p.shape)).astype(np.float32)))
                values[f"state.{name}"] = p.clone()
        frozen = layer.conv.weight if "Conv" in kind else layer.weight
        y = layer(x)
        g = torch.from_numpy(rng.standard_normal(tuple(y.shape)).astype(np.float32))
        y.backward(g)
        values |= {"ids" if ids else "x": x, "y": y, "g": g}
        values |= {f"grad.{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
        if not ids:
            values["grad.x"] = x.grad
        if options.get("merge_weights", True) and options["r"]:
            layer.eval()
            values |= {"merged": frozen.clone(), "y_eval": layer(x)}
            layer.train()
            values["restored"] = frozen.clone()
        words = [f"{i:02d}", kind, *map(str, arguments), *(f"{k}={v}".replace(" ", "") for k, v in options.items())]
        case = {"name": "-".join(words), "kind": kind, "arguments": arguments, "options": options}
        cases.append(case | {"at": {name: put(name, value) for name, value in values.items()}})

    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    index = {"versions": {"loralib": "0.1.2", "torch": torch.__version__, "numpy": np.__version__}, "cases": cases}
    arrays["index"] = np.frombuffer(json.dumps(index, separators=(",", ":")).encode(), np.uint8)
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT.name}: {len(cases)} cases, {OUT.stat().st_size:,d} bytes")


if __name__ == "__main__":
    main()
