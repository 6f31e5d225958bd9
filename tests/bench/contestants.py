"""What the contestants of the benchmark do: each function sets up, and returns what is then called and timed, again and again.

A function of tinylora's imports it inside and uses what has stood in it for long, so that older checkouts run too: what one does not have
ends in an ImportError or AttributeError, which the table then calls "not there". Data are random, drawn from fixed seeds. Sizes are
arguments, so that a test can ask for tiny ones. `rows` says who meets whom.

A returned callable may carry `number` (how often one call does the work), `times(k)` (it keeps its own time), and `facts` (numbers beside
the times, for the report).
"""

import contextlib
import importlib
import math
import os
import queue
import subprocess
import sys
import threading
import time

import numpy as np

f32 = np.float32
R, ALPHA = 16, 32  # of every adapter
LR = 1e-4
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def numbers(*shape, std=1.0, seed=0):
    """N(0, std²), float32: at most 4M are drawn, and then repeated."""
    n = math.prod(shape)
    block = np.random.default_rng(seed).standard_normal(min(n, (1 << 22) - 3), dtype=f32) * f32(std)
    return np.resize(block, shape) if n > len(block) else block.reshape(shape)


def repeated(call, number):
    """A callable that makes `number` calls, for what is too short to be timed alone."""

    def many():
        for _ in range(number):
            call()

    many.number = number
    return many


def of_tinylora(*places):
    """The first of these modules of tinylora that exists: rooms were moved."""
    for place in places[:-1]:
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"tinylora.{place}")
    return importlib.import_module(f"tinylora.{places[-1]}")


def training():
    """tinylora's module with `fit`, `Recipe` and `workers`."""
    return of_tinylora("training.train", "train")


# ---------------------------------------------------------------------------------------------------------------------- floors
def copy(n):
    """np.copyto of n float32 into a buffer that is there."""
    x, out = numbers(n), np.empty(n, f32)
    return lambda: np.copyto(out, x)


def sgemm(rows, size):
    """The two products that a frozen layer cannot do without: x Wᵀ, and g W for the gradient of its input."""
    w, x, g = numbers(size, size), numbers(rows, size), numbers(rows, size)
    y, back = np.empty_like(x), np.empty_like(x)

    def call():
        np.matmul(x, w.T, out=y)
        np.matmul(g, w, out=back)

    call.facts = {"flops": 4 * rows * size * size}
    return call


# ------------------------------------------------------------------------------------------------------------------------- NF4
def tinylora_quantize(shape):
    from tinylora import quantize

    w = numbers(*shape, std=0.02)
    return lambda: quantize(w, "nf4", 64)


def tinylora_constants(n):
    """n constants, the largest magnitudes of blocks, in 8 bits around their mean."""
    from tinylora.quant import quantize_constants

    absmax = abs(numbers(n, std=0.02)) + f32(0.03)
    return lambda: quantize_constants(absmax)


def bitsandbytes_quantize(shape):
    import bitsandbytes.functional as bnb
    import torch

    w = torch.from_numpy(numbers(*shape, std=0.02))
    return lambda: bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)


def tinylora_dequantize(shape):
    """Into a ready buffer where `dequantize` takes one (out=), else into a new array."""
    from tinylora import quantize

    q, out = quantize(numbers(*shape, std=0.02), "nf4", 64), np.empty(shape, f32)
    try:
        q.dequantize(out=out)
    except TypeError:
        return lambda: q.dequantize("float32")
    return lambda: q.dequantize(out=out)


def bitsandbytes_dequantize(shape):
    """The function that its layers call; it has no out=."""
    import bitsandbytes.functional as bnb
    import torch

    w = torch.from_numpy(numbers(*shape, std=0.02))
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    return lambda: bnb.dequantize_4bit(packed, state)


def bitsandbytes_kernel(shape):
    """The C function alone, into a ready buffer."""
    import ctypes

    import bitsandbytes.functional as bnb
    import torch
    from bitsandbytes.cextension import lib

    w = torch.from_numpy(numbers(*shape, std=0.02))
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    expected, out = bnb.dequantize_4bit(packed, state), torch.empty(shape)
    given = [ctypes.c_void_p(t.data_ptr()) for t in (packed, state.absmax, out)]
    sizes = [ctypes.c_longlong(n) for n in (64, *shape)]

    def call(kept=(packed, state, out)):
        lib.cdequantize_blockwise_cpu_nf4_fp32(*given, *sizes)

    call()
    if not torch.equal(out, expected):
        raise RuntimeError("the bare kernel gave other values than bitsandbytes' own call of it")
    return call


# -------------------------------------------------------------------------------------------------------------- a QLoRA linear
def tinylora_linear(rows, size, shards=1):
    """y = x Ŵᵀ + s x Aᵀ Bᵀ on NF4 with double quantization, and the gradients of x, A and B.

    shards: 1 calls the layer as it is; more cut the rows as training does, into threads with BLAS held to one thread each.
    """
    from tinylora import LoRALinear, Tensor, quantize
    from tinylora.nn import Linear4bit

    q = quantize(numbers(size, size, std=1 / math.sqrt(size)), "nf4", 64, double_quant=True)
    layer = LoRALinear(Linear4bit(q), r=R, alpha=ALPHA)
    layer.lora_B.weight.data = numbers(size, R, std=0.1)
    x, g = numbers(rows, size), numbers(rows, size, seed=1)
    factors = layer.lora_A.weight, layer.lora_B.weight
    if shards == 1:

        def call():
            given = Tensor(x, requires_grad=True)
            for factor in factors:
                factor.grad = None
            layer(given).backward(g)

        return call
    held = training().workers(shards)
    pool = held.__enter__()
    parts = list(zip(np.array_split(x, shards), np.array_split(g, shards), strict=True))

    def shard(part):
        found = {}
        layer(Tensor(part[0], requires_grad=True)).backward(part[1], into=found)
        return found

    def sharded(held=held):  # so that the pool lives as long as this
        first, *others = pool.map(shard, parts)
        for other in others:
            for factor in factors:
                first[factor] += other[factor]

    return sharded


def peft_linear(rows, size):
    """The same with bitsandbytes' Linear4bit and PEFT's bypass."""
    import bitsandbytes
    import peft
    import torch

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = bitsandbytes.nn.Linear4bit(size, size, bias=False, **_four_bits())

        def forward(self, x):
            return self.proj(x)

    model = One().to("cpu")
    model = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.from_numpy(numbers(rows, size)).requires_grad_()
    g = torch.from_numpy(numbers(rows, size, seed=1))

    def call():
        x.grad = None
        for p in trained:
            p.grad = None
        model(x).backward(g)

    return call


def _four_bits():
    import torch

    return {"compute_dtype": torch.float32, "compress_statistics": True, "quant_type": "nf4"}


# -------------------------------------------------------------------------------------------------------------- training steps
class Fit:
    """`train.fit` in a thread, held before each step until it is told to go on.

    What is timed is the loop of `tinylora finetune`, without its pager.

    A step goes from drawing its batch (which lies ready here) to the next step's drawing: forward, backward, clipping, AdamW.
    """

    def __init__(self, model, ids, shards, facts=None):
        train = training()
        self.batches, self.facts, self.began = ids, facts or {}, None
        self.go, self.ended = threading.Semaphore(0), queue.Queue()
        size, seq_len = ids[0][0].shape
        recipe = train.Recipe(steps=1 << 30, batch_size=size, seq_len=seq_len, shards=shards, lr=LR, clip=1.0, warmup=0)
        threading.Thread(target=self._run, args=(train.fit, model, recipe), daemon=True).start()
        self._next()  # it stands before its first step

    def _run(self, fit, model, recipe):
        try:
            fit(model, self, recipe, progress=False)
        except Exception as error:  # who waits for the step is told
            self.ended.put(error)

    def _next(self):
        found = self.ended.get()
        if isinstance(found, Exception):
            raise RuntimeError(f"training ended: {type(found).__name__}: {found}") from found
        return found

    def times(self, k):
        found = []
        for _ in range(k):
            self.go.release()
            found.append(self._next())
        return found

    # What fit takes for its data:
    def batch(self, rng, size, length):
        now = time.perf_counter()
        self.ended.put(0.0 if self.began is None else now - self.began)
        self.go.acquire()
        self.began = time.perf_counter()
        self.batches = self.batches[1:] + self.batches[:1]
        return self.batches[0]

    def fingerprint(self):
        return "random tokens"


def tinylora_step(sizes, batch, tokens, method, shards):
    """A training step as `tinylora finetune` does it, with as many workers as threads; the optimizer's state is not paged.

    sizes: of the config, or None for the embedded model. method: "full" in float32; "lora" on a bfloat16 base; "qlora" on NF4.
    """
    from tinylora import Llama, LlamaConfig, add_lora, quantize_linears

    model = Llama.from_pretrained("base") if sizes is None else Llama(LlamaConfig(**sizes))
    if method != "full":
        quantize_linears(model, code={"lora": "bfloat16", "qlora": "nf4"}[method])
        add_lora(model, r=R, alpha=ALPHA, target_modules="all-linear")
    return Fit(model, _batches(model.config.vocab_size, batch, tokens), shards)


def _batches(vocabulary, batch, tokens, n=4):
    """n times (inputs, targets, mask) of random tokens."""
    rng = np.random.default_rng(2)
    ids = [rng.integers(0, vocabulary, (batch, tokens + 1)) for _ in range(n)]
    return [(x[:, :-1], x[:, 1:], np.ones((batch, tokens), f32)) for x in ids]


def torch_step(sizes, batch, tokens, method):
    """The same step on transformers' Llama: "full" in torch, "lora" with PEFT, "qlora" with bitsandbytes and PEFT, all in float32.

    AdamW is the fused one, which transformers' Trainer takes as well.
    """
    import torch

    model = _torch_llama(sizes)
    if method == "qlora":
        import bitsandbytes

        for path, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and path != "lm_head":
                new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, **_four_bits())
                new.weight = bitsandbytes.nn.Params4bit(
                    layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
                )
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, new.to("cpu"))
        model.is_loaded_in_4bit = True  # which PEFT asks for
    if method != "full":
        import peft

        model.requires_grad_(False)
        lora = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=MATRICES, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    vocabulary = sizes["vocab_size"]
    given = [
        (torch.from_numpy(x.copy()), torch.from_numpy(y.copy())) for x, y, _ in _batches(vocabulary, batch, tokens)
    ]

    def call():
        given.append(given.pop(0))
        ids, targets = given[0]
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, vocabulary), targets.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return call


def _torch_llama(sizes):
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa")
    return transformers.LlamaForCausalLM(config)


def growth_step(sizes, batch, tokens, shards):
    """A QLoRA step on random weights, which are never all in float32 at once; the facts are its FLOPs, counted, and bytes, predicted."""
    from tinylora import Llama, LlamaConfig, add_lora, ops
    from tinylora.costs import flops, memory
    from tinylora.nn import Linear, quantized_linear

    model = Llama(LlamaConfig(**sizes), draw=False)
    for name in [name for name, _ in model.named_parameters()]:
        path, _, part = name.rpartition(".")
        layer = model.get(path)
        shape = getattr(layer, part).shape
        std = 1 / math.sqrt(shape[-1])
        getattr(layer, part).data = np.ones(shape, f32) if len(shape) == 1 else numbers(*shape, std=std).copy()
        if isinstance(layer, Linear):
            model.replace(path, quantized_linear(path, layer))
    model.requires_grad_(False)
    add_lora(model, r=R, alpha=ALPHA, target_modules="all-linear")
    batches = _batches(model.config.vocab_size, batch, tokens)
    inputs, targets, _ = batches[0]
    with flops.counting() as count:  # one sequence, whose products grow with the number of them
        ops.softmax_cross_entropy(model(inputs[:1]), targets[:1]).backward()
    model.zero_grad()
    about = {"r": R, "batch_size": batch, "seq_len": tokens, "shards": shards}
    facts = {"flops": batch * count.flops, "bytes": memory.predict(model.config, "qlora", **about).total}
    return Fit(model, batches, shards, facts)


# ------------------------------------------------------------------------------------------------------------------ optimizers
def _parameters(n, tensors):
    """Tinylora's parameters with gradients, n numbers in so many tensors."""
    from tinylora import Tensor

    params = [Tensor(numbers(n // tensors, seed=i), requires_grad=True) for i in range(tensors)]
    for i, p in enumerate(params):
        p.grad = numbers(n // tensors, std=0.01, seed=100 + i)
    return params


def tinylora_adamw(n, tensors, kind="AdamW", resident=None):
    """A step by itself, outside of the training loop. resident: the share of the state that the pager may hold (None: not paged)."""
    import tinylora
    from tinylora import Pager

    optimizer_of, params = getattr(tinylora, kind), _parameters(n, tensors)
    if resident is None:
        return optimizer_of(params, lr=LR, weight_decay=0.01).step
    state = optimizer_of(params).state_bytes
    return optimizer_of(params, lr=LR, weight_decay=0.01, pager=Pager(budget=int(resident * state))).step


def torch_adamw(n, tensors, **how):
    import torch

    return _torch_step(n, tensors, lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.01, **how))


def bitsandbytes_adamw8bit(n, tensors):
    import bitsandbytes

    return _torch_step(n, tensors, lambda params: bitsandbytes.optim.AdamW8bit(params, lr=LR, weight_decay=0.01))


def _torch_step(n, tensors, optimizer):
    import torch

    params = [torch.nn.Parameter(torch.from_numpy(numbers(n // tensors, seed=i))) for i in range(tensors)]
    for i, p in enumerate(params):
        p.grad = torch.from_numpy(numbers(n // tensors, std=0.01, seed=100 + i))
    return optimizer(params).step


# ---------------------------------------------------------------------------------------------------- generation, one op, import
PROMPT = "hacker\n  n. "


def tinylora_generate(tokens, held="nf4", more=None):
    """So many tokens from the embedded model. more: {option of `generate`, which an older checkout may lack: value}."""
    import inspect

    from tinylora import Llama

    model = Llama.from_pretrained("base")
    if held != "float32":
        from tinylora import quantize_linears

        quantize_linears(model, code=held)
    more = more or {}
    if lacking := more.keys() - inspect.signature(model.generate).parameters.keys():
        raise AttributeError(f"generate has no option {', '.join(sorted(lacking))}")
    options = {"max_new_tokens": tokens, "temperature": 0.8, "stop": (), **more}
    return lambda: model.generate(PROMPT, **options)


def transformers_generate(sizes, tokens):
    """The same of a model of the same sizes, dense in float32, with its cache."""
    import torch

    model = _torch_llama(sizes).eval()
    ids = torch.tensor([list(PROMPT.encode())])
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": True, "temperature": 0.8, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    return lambda: model.generate(ids, attention_mask=mask, **how)


def tinylora_op(gradients, number):
    """x w of two 4 × 4 matrices; gradients: 0 (forward without a tape), 1 (and that of x), 2 (of both)."""
    from tinylora import Tensor, no_grad, ops

    x, w = (Tensor(numbers(4, 4, seed=i), requires_grad=i < gradients) for i in range(2))
    g, matmul = np.ones((4, 4), f32), ops.matmul
    if not gradients:

        def forward():
            with no_grad():
                for _ in range(number):
                    matmul(x, w)

        forward.number = number
        return forward

    def call():
        x.grad = w.grad = None
        matmul(x, w).backward(g)

    return repeated(call, number)


def torch_op(gradients, number):
    import torch

    x, w = (torch.from_numpy(numbers(4, 4, seed=i)).requires_grad_(i < gradients) for i in range(2))
    g, matmul = torch.ones(4, 4), torch.matmul
    if not gradients:
        return repeated(lambda: matmul(x, w), number)

    def call():
        x.grad = w.grad = None
        matmul(x, w).backward(g)

    return repeated(call, number)


def whole_process(code):
    """A Python process that does this and ends."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}

    def call():
        subprocess.run([sys.executable, "-P", "-c", code], check=True, env=environment)

    return call
