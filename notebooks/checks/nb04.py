"""Checks of notebook 04, blockwise absmax."""

import numpy as np
from grading import check

from tinylora import codebooks, quantize


@check("04-1")
def _(answer, rng):
    code = np.linspace(-1, 1, 16).astype(np.float32)
    first = np.asarray(answer(np.array([0xF0], np.uint8), np.ones(1, np.float32), code, 64, (2,)))
    assert first.shape == (2,), "For shape (2,) the answer should have shape (2,)."
    assert first.tolist() == [1, -1], (
        "Of byte 0xF0, index 15 (the high half) belongs to the first element and index 0 to the second."
    )
    cases = [
        ((4, 64), 64, "nf4"),
        ((5, 133), 64, "nf4"),  # odd, and a partial last block
        ((11, 13), 7, "int4"),  # a block ends within a byte
        ((7,), 16, "nf4"),  # one partial block
        ((1,), 1, "nf4"),
        ((3, 5, 7), int(rng.integers(1, 110)), "fp4"),  # not ascending
        (tuple(rng.integers(1, 40, 2).tolist()), int(rng.integers(1, 70)), "nf4"),
    ]
    for shape, blocksize, name in cases:
        w = (rng.standard_normal(shape) * 10.0 ** rng.integers(-2, 3, shape)).astype(np.float32)
        q = quantize(w, name, blocksize)
        found = np.asarray(answer(q.packed.copy(), q.absmax.copy(), q.code.copy(), blocksize, shape))
        case = f"for {name}, shape {shape}, blocksize {blocksize}"
        assert found.shape == shape, f"The answer should have the weight's shape {case}; it has {found.shape}."
        assert found.dtype == np.float32, f"The answer should be float32; it is {found.dtype} {case}."
        wrong = np.flatnonzero(found != q.dequantize())
        assert len(wrong) == 0, (
            f"{len(wrong)} of {w.size} weights are wrong {case}; the first is element {wrong[0]} of the flattened weight, "
            f"in block {wrong[0] // blocksize}."
        )


@check("04-2")
def _(answer, rng):
    def compare(w, code, blocksize, why):
        name, values = codebooks.get(code)
        given = w.copy()
        found = answer(given, values.copy(), blocksize)
        q = quantize(w, code, blocksize)
        case = f"for {name} ({len(values)} values), shape {w.shape}, blocksize {blocksize} ({why})"
        assert isinstance(found, (tuple, list)) and len(found) == 2, f"The answer should be (index, absmax) {case}."
        index, absmax = map(np.asarray, found)
        assert np.array_equal(given, w), f"The answer should leave w as it is; it changes it {case}."
        assert absmax.shape == q.absmax.shape, (
            f"There should be {len(q.absmax)} absmax, one a block of the flattened weight, also for a last partial block; "
            f"their shape is {absmax.shape} {case}."
        )
        assert absmax.dtype == np.float32, f"absmax should be float32; it is {absmax.dtype} {case}."
        wrong = np.flatnonzero(~(np.abs(absmax - q.absmax) <= 1e-37))  # a partial block of zeros has 1e-38 there
        assert len(wrong) == 0, (
            f"The absmax of block {wrong[0]} is {absmax[wrong[0]]:.6g}, and {q.absmax[wrong[0]]:.6g} is the largest magnitude "
            f"among elements {wrong[0] * blocksize} to {min((wrong[0] + 1) * blocksize, w.size) - 1} of the row-major weight {case}."
        )
        assert index.shape == (w.size,), f"index should have shape ({w.size},); it has {index.shape} {case}."
        assert index.dtype.kind in "iu", f"index should hold whole numbers; its dtype is {index.dtype} {case}."
        assert ((index >= 0) & (index < len(values))).all(), f"An index lies outside 0 to {len(values) - 1} {case}."
        block = np.arange(w.size) // blocksize
        m = np.where(q.absmax > 1e-37, q.absmax, 1).astype(np.float64)[block]
        x = w.reshape(-1) / m
        far = np.abs(values.astype(np.float64)[index] - x) - np.abs(values.astype(np.float64) - x[:, None]).min(axis=1)
        theirs = np.abs(values.astype(np.float64)[q.indices().reshape(-1)] - x)
        assert (theirs - np.abs(values - x[:, None]).min(axis=1) <= 1e-6).all()  # the library is held to the same
        wrong = np.flatnonzero(~(far <= 1e-6))
        if len(wrong):
            i = wrong[0]
            zeros = (
                " All weights of this block are zero; w/absmax counts as 0 there, and not as 0/0."
                if q.absmax[block[i]] <= 1e-37
                else ""
            )
            raise AssertionError(
                f"{len(wrong)} of {w.size} indices do not belong to the nearest value {case}. The first is element {i}, in block "
                f"{block[i]}: w/absmax = {x[i]:.6f}, index {index[i]} stands for {values[index[i]]:.6f}, and index "
                f"{np.abs(values - x[i]).argmin()} for {values[np.abs(values - x[i]).argmin()]:.6f}.{zeros}"
            )

    def weights(*shape):
        return (rng.standard_normal(shape) * np.exp(rng.normal(0, 1, shape))).astype(np.float32)

    odd = np.sort(np.concatenate([[-1, 1], rng.uniform(-0.95, 0.95, 9)]))
    compare(weights(256), "nf4", 64, "whole blocks")
    compare(-np.abs(weights(128)), "nf4", 64, "negative weights only")
    compare(weights(6, 70), "nf4", 64, "rows that end inside a block, and a partial last block")
    compare(weights(5), "int4", 8, "one block, not full")
    compare(weights(4, 9), "nf4", 1, "blocks of one weight, which is its own absmax")
    compare(weights(3, 5, 7), odd, 7, "11 values")
    compare(weights(300), "fp4", 50, "values that are not ascending")
    compare(weights(300) * np.float32(1e-20), "nf4", 64, "tiny weights")
    holes = weights(5, 64)
    holes[2] = 0
    compare(holes, "nf4", 64, "block 2 is all zero")
    holes = weights(150)
    holes[128:] = 0
    compare(holes, odd, 64, "the last, partial block is all zero")
    for _ in range(3):
        shape, blocksize = tuple(rng.integers(1, 30, 2).tolist()), int(rng.integers(1, 90))
        compare(weights(*shape), np.sort(rng.uniform(-1, 1, int(rng.integers(2, 17)))), blocksize, "a random code")
