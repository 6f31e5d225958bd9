"""QLoRA in NumPy, in six steps, in one file of your own.

build_it.md says what each function is for, and has hints that can be opened. Write your answer in place of each
`raise NotImplementedError`. Later steps call the functions of earlier ones, so take them in order. In a terminal,

    pytest notebooks -k my-1

grades step 1, and says what is off (my-5 takes half a minute). NumPy and Python's own library are enough; what tinylora has ready
is what you build.
"""

import numpy as np

#: The 16 values of NF4 (QLoRA, appendix E). Notebook 05 computes them.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip

# ----------------------------------------------------------------------------------------- step 1: quantize to NF4


def nearest(x):
    """The index of the value of NF4 that is nearest to each x.

    x         float32, any shape, between -1 and 1
    returns   uint8, of the shape of x
    """
    # BEGIN SOLUTION
    middles = (NF4[:-1] + NF4[1:]) / 2
    return np.searchsorted(middles, x).astype(np.uint8)
    # END SOLUTION


def quantize(w, blocksize=64):
    """(packed, absmax): a weight in 4 bits, and the largest magnitude of each block.

    w         float32, any shape; its n elements are read row by row. The last block may be shorter
    packed    uint8, ⌈n/2⌉: two indices in a byte, the first of them in the high four bits; an odd last one has its byte alone
    absmax    float32, ⌈n/blocksize⌉. In a block of zeros it is 0, and each index is 7, that of the value 0
    """
    # BEGIN SOLUTION
    n = w.size
    rows = np.zeros((-(-n // blocksize), blocksize), np.float32)
    rows.reshape(-1)[:n] = w.reshape(-1)
    absmax = np.abs(rows).max(axis=1)
    index = np.zeros(n + n % 2, np.uint8)
    index[:n] = nearest(rows / np.where(absmax > 0, absmax, 1)[:, None]).reshape(-1)[:n]
    return index[0::2] << 4 | index[1::2], absmax
    # END SOLUTION


def dequantize(packed, absmax, shape, blocksize=64):
    """The weight that the bits stand for: the value of each index times its block's absmax, float32, of the given shape."""
    # BEGIN SOLUTION
    n = int(np.prod(shape))
    index = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]
    return (NF4[index] * np.repeat(absmax, blocksize)[:n]).reshape(shape)
    # END SOLUTION


# ------------------------------------------------------------------------------------------ step 2: double-quantize


def double_quantize(absmax, blocksize=256):
    """(codes, nested, mean): the constants of the blocks in 8 bits, around their mean.

    codes     int8, one a constant: round(127 (absmax - mean) / nested), between -127 and 127; 0 where nested is 0
    nested    float32, the largest |absmax - mean| of each `blocksize` constants. The last group may be shorter
    mean      a float32 number, the mean of all constants
    """
    # BEGIN SOLUTION
    mean = absmax.mean(dtype=np.float32)
    rows = np.zeros((-(-absmax.size // blocksize), blocksize), np.float32)
    rows.reshape(-1)[: absmax.size] = absmax - mean
    nested = np.abs(rows).max(axis=1)
    codes = np.round(127 * rows / np.where(nested > 0, nested, 1)[:, None]).astype(np.int8)
    return codes.reshape(-1)[: absmax.size], nested, mean
    # END SOLUTION


def restore(codes, nested, mean, blocksize=256):
    """The constants that the 8 bits stand for, codes/127 · nested + mean, float32. (In NumPy int8 / 127 is float64.)"""
    # BEGIN SOLUTION
    return codes / np.float32(127) * np.repeat(nested, blocksize)[: codes.size] + mean
    # END SOLUTION


def store(w):
    """All that is kept of a weight: a dict of "shape", "packed", "codes", "nested" and "mean". Its arrays hold 4.127 bits a weight."""
    # BEGIN SOLUTION
    packed, absmax = quantize(w)
    codes, nested, mean = double_quantize(absmax)
    return {"shape": w.shape, "packed": packed, "codes": codes, "nested": nested, "mean": mean}
    # END SOLUTION


def rebuild(stored):
    """The weight Ŵ that a dict of `store` stands for, float32 (eq. 6: first the constants, then the weights)."""
    # BEGIN SOLUTION
    absmax = restore(stored["codes"], stored["nested"], stored["mean"])
    return dequantize(stored["packed"], absmax, stored["shape"])
    # END SOLUTION


# ------------------------------------------------------ step 3: a frozen linear layer with LoRA, forward and backward


def new_layer(w, r, alpha, rng):
    """A layer over the weight w (out × in): a dict of "stored" (see `store`), "A", "B" and "s".

    A   float32 (r × in), uniform between ±1/√in, drawn from rng        B   float32 (out × r), zeros        s   alpha / r, a float
    """
    # BEGIN SOLUTION
    d_out, d_in = w.shape
    A = rng.uniform(-(d_in**-0.5), d_in**-0.5, (r, d_in)).astype(np.float32)
    return {"stored": store(w), "A": A, "B": np.zeros((d_out, r), np.float32), "s": alpha / r}
    # END SOLUTION


def forward(layer, x):
    """(y, saved): y = x Ŵᵀ + s (x Aᵀ) Bᵀ, and what `backward` needs beside the layer.

    x       float32 (tokens × in)        y   float32 (tokens × out)
    saved   a tuple of arrays, at most x and x Aᵀ. Not Ŵ: it is rebuilt when it is needed, or 4 bits would save nothing
    """
    # BEGIN SOLUTION
    u = x @ layer["A"].T  # (tokens × r)
    s = np.float32(layer["s"])
    return x @ rebuild(layer["stored"]).T + s * (u @ layer["B"].T), (x, u)
    # END SOLUTION


def backward(layer, saved, g):
    """(x̄, Ā, B̄): the gradients for the input, A and B, of the shapes of these, where g = ȳ (tokens × out)."""
    # BEGIN SOLUTION
    x, u = saved
    g_scaled = np.float32(layer["s"]) * g
    v = g_scaled @ layer["B"]  # (tokens × r)
    return g @ rebuild(layer["stored"]) + v @ layer["A"], v.T @ x, g_scaled.T @ u
    # END SOLUTION


# ---------------------------------------------------------------------------------------------- step 4: AdamW, paged


def adamw(p, g, m, v, t, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    """One step of AdamW, number t = 1, 2, …, which changes p, m and v in place. All are float32 vectors of one length.

    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
    p ← p − lr λ p               p ← p − lr m̂ / (√v̂ + ε),    m̂ = m/(1 − β₁ᵗ),  v̂ = v/(1 − β₂ᵗ), in this order
    """
    # BEGIN SOLUTION
    m *= beta1
    m += (1 - beta1) * g
    v *= beta2
    v += (1 - beta2) * g**2
    p *= 1 - lr * weight_decay
    p -= lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    # END SOLUTION


def paged_adamw(p, g, m, v, t, lr, memory, page, **options):
    """The same step where m and v lie in a slow memory, and only a few pages of them fit into the fast one.

    memory.fetch(a, start, stop)        a copy of a[start:stop] in the fast memory; an error if it does not fit
    memory.put_back(a, start, copy)     writes the copy back to a[start:…], and frees its place
    page                                elements of m, and as many of v, that are treated at a time; there is room for both
    """
    # BEGIN SOLUTION
    for start in range(0, len(p), page):
        piece = slice(start, min(start + page, len(p)))
        fast_m, fast_v = memory.fetch(m, piece.start, piece.stop), memory.fetch(v, piece.start, piece.stop)
        adamw(p[piece], g[piece], fast_m, fast_v, t, lr, **options)
        memory.put_back(m, start, fast_m)
        memory.put_back(v, start, fast_v)
    # END SOLUTION


# ---------------------------------------------------------------------------------------- step 5: the training loop


def train(parameters, loss_of, batches, lr, max_norm, memory, page):
    """Train on each batch once, in order; returns the losses, a list of floats.

    parameters        a list of objects with .data (float32, changed in place) and .grad (None, or an array of that shape)
    loss_of(batch)    computes a loss: an object with .item() and with .backward(), which *adds* to each parameter's .grad

    Of T batches, number t = 1 … T: clear the gradients; compute the loss; go backward; if the norm of all gradients together
    exceeds max_norm, scale all of them to it; one step of `paged_adamw` for each parameter, at the rate lr (1 − (t − 1)/T) and
    without weight decay. m and v of each parameter are float32 vectors, zeros before the first step.
    """
    # BEGIN SOLUTION
    states = [(np.zeros(p.data.size, np.float32), np.zeros(p.data.size, np.float32)) for p in parameters]
    losses = []
    for t, batch in enumerate(batches, 1):
        for p in parameters:
            p.grad = None
        loss = loss_of(batch)
        loss.backward()
        losses.append(loss.item())
        norm = np.sqrt(sum(np.square(p.grad, dtype=np.float64).sum() for p in parameters))
        scale = np.float32(min(1.0, max_norm / norm)) if norm > 0 else np.float32(1)
        rate = lr * (1 - (t - 1) / len(batches))
        for p, (m, v) in zip(parameters, states, strict=True):
            paged_adamw(p.data.reshape(-1), scale * p.grad.reshape(-1), m, v, t, rate, memory, page)
    return losses
    # END SOLUTION


# -------------------------------------------------------------------------------------------------- step 6: merge


def merge(layer):
    """The one weight that does what the layer does: Ŵ + s B A, float32 (out × in). The layer stays as it is."""
    # BEGIN SOLUTION
    return rebuild(layer["stored"]) + np.float32(layer["s"]) * (layer["B"] @ layer["A"])
    # END SOLUTION


def merge_into_nf4(layer):
    """(stored, error): the merged weight in 4 bits again, and ‖Ŵ′ − (Ŵ + s B A)‖ / ‖Ŵ + s B A‖ (Frobenius), what that loses."""
    # BEGIN SOLUTION
    merged = merge(layer)
    stored = store(merged)
    return stored, float(np.linalg.norm(rebuild(stored) - merged) / np.linalg.norm(merged))
    # END SOLUTION
