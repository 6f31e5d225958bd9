"""Modules: named parameters, and the layers that a Llama is made of.

A Module is a plain object. Its parameters are the Tensors, the stored weights and the sub-modules among its attributes,
in the order in which they were assigned. A parameter's name is the path to it, such as
`model.layers.0.self_attn.q_proj.weight`. Nothing is registered.

    Linear         y = x Wᵀ + b
    Linear4bit     y = x Ŵᵀ + b with Ŵ = doubleDequant(weight)                (QLoRA eq. 5 without its adapter, eq. 6)
    Linear16bit    y = x Wᵀ + b with W stored in bfloat16
    Embedding      y = W[ids]
    RMSNorm        y = w x / √(mean(x²) + ε)

A frozen weight need not be a Tensor. Linear4bit and Linear16bit hold plain data that can be dequantized (QuantizedTensor,
BFloat16Array), and no gradient flows into it. `quantize_linears` puts such layers into a model.

Differs from torch.nn: token ids are plain integer arrays, and Linear has no bias unless asked for one. Differs from
bitsandbytes: the compute dtype is given and never guessed from the first input, and `eval()` switches dropout off and
changes no weight.

Leaves out: buffers, hooks, and moving a single layer between dtypes. What PEFT does to prepare a model for 4-bit training is
in `adapters.kbit`.
"""

import functools
import math

import numpy as np

from . import backend, ops
from .backend import array_module, move
from .dtypes import BFloat16Array, Stored, dtype_name
from .kernels import products
from .quant import quantize
from .tensor import Tensor


def stored_array(weight):
    """The array that a weight is held in, whichever kind it is: it tells on which device the weight lives."""
    return weight.held if isinstance(weight, Stored) else weight.data


def move_tensor(tensor, device):
    """Move a Tensor's data and gradient to a device, in place."""
    tensor.data = move(tensor.data, device)
    tensor.grad = None if tensor.grad is None else move(tensor.grad, device)


def is_adapter_weight(path):
    """Whether a dotted path leads into an adapter: through a LoRALayer's bypasses (see `lora`), or to a name that begins with lora_."""
    return any(part == "bypasses" or part.startswith("lora_") for part in path.split("."))


def _child(parent, name):
    """What a part of a dotted path means: an item of a list or dict, or an attribute."""
    if isinstance(parent, dict):
        return parent[name]
    return parent[int(name)] if isinstance(parent, list) else getattr(parent, name)


class Module:
    """Something with parameters and a forward: subclasses define `forward`, calling the object runs it."""

    training = True

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def named_children(self):
        """(name, module) of the direct sub-modules; a list of modules contributes name.0, name.1, ..., a dict name.key, ..."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, (list, dict)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from ((f"{name}.{key}", m) for key, m in items if isinstance(m, Module))

    def named_modules(self, prefix=""):
        """(path, module) of this module and all below it, depth first."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_weights(self):
        """(path, Tensor or stored weight) of everything held, each object once: a head tied to the embedding appears as that."""
        seen = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, (Tensor, Stored)) and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def named_parameters(self):
        """(path, Tensor) of the weights that can have a gradient; stored weights cannot."""
        return ((name, w) for name, w in self.named_weights() if isinstance(w, Tensor))

    def parameters(self):
        return [w for _, w in self.named_parameters()]

    def trainable(self):
        """[(path, Tensor)] with requires_grad."""
        return [(name, w) for name, w in self.named_parameters() if w.requires_grad]

    def state_dict(self):
        """{path: array or stored weight}: the arrays themselves, not copies."""
        return {name: w.data if isinstance(w, Tensor) else w for name, w in self.named_weights()}

    def load_state_dict(self, state, strict=True):
        """Take weights over by name: arrays are copied into Tensors, stored weights replace stored weights.

        Every name and shape is checked first: nothing is changed if anything does not fit.
        """
        mine = dict(self.named_weights())
        missing, unknown = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
        if strict and (missing or unknown):
            raise KeyError(
                f"load_state_dict: missing {missing[:5]}{' ...' * (len(missing) > 5)}, "
                f"unknown {unknown[:5]}{' ...' * (len(unknown) > 5)}"
            )
        shared = [name for name in mine if name in state]
        for name in shared:
            given, wanted = tuple(state[name].shape), tuple(mine[name].shape)
            if given != wanted:
                raise ValueError(f"load_state_dict: {name} has shape {given}, the model's is {wanted}")
            if isinstance(mine[name], Stored) != isinstance(state[name], Stored):
                raise ValueError(f"load_state_dict: {name} is dense on one side and quantized on the other")
        for name in shared:
            w, new, xp = mine[name], state[name], array_module(stored_array(mine[name]))
            if isinstance(w, Tensor):
                w.data = move(new, xp).astype(w.dtype)
            else:
                path, _, attribute = name.rpartition(".")
                setattr(self.get(path), attribute, new.to(lambda a, xp=xp: move(a, xp)))

    def replace(self, path, module):
        """Put `module` where `path` (such as model.layers.0.mlp.up_proj) points."""
        parent, _, name = path.rpartition(".")
        parent = self.get(parent)
        if isinstance(parent, (list, dict)):
            parent[int(name) if isinstance(parent, list) else name] = module
        else:
            setattr(parent, name, module)

    def get(self, path):
        """The sub-module (or attribute) at a dotted path; "" is this module."""
        return functools.reduce(_child, path.split(".") if path else [], self)

    def train(self, mode=True):
        """Dropout on (or off). No weight changes."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self):
        return self.train(False)

    def requires_grad_(self, value):
        """Let every parameter ask for a gradient, or none."""
        for w in self.parameters():
            w.requires_grad, w.grad = value, None
        return self

    def zero_grad(self):
        for w in self.parameters():
            w.grad = None

    def to(self, device, memo=None):
        """Move every weight to "cpu" or "cuda", in place; a weight that two layers share is moved once, and shared again.

        memo: {id of a weight, old or moved: (moved, old)}
        """
        xp, memo = backend.module_for(device), {} if memo is None else memo
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                move_tensor(value, xp)
            elif isinstance(value, Stored):
                if id(value) not in memo:  # both are kept in it, so that neither id is used again meanwhile
                    moved = value.to(lambda a: move(a, xp))
                    memo[id(value)] = memo[id(moved)] = moved, value
                setattr(self, name, memo[id(value)][0])
        for _, child in self.named_children():
            child.to(xp, memo)
        return self


def uniform(shape, bound):
    """U(−bound, bound) from the current generator, float32."""
    return backend.generator().uniform(-bound, bound, shape).astype(np.float32)


def normal(shape, std):
    """N(0, std²) from the current generator, float32."""
    return (backend.generator().standard_normal(shape, dtype=np.float32) * np.float32(std)).astype(np.float32)


class Linear(Module):
    """y = x Wᵀ + b.   weight (out, in) ~ U(−1/√in, 1/√in), which is torch's kaiming_uniform(a=√5); bias (out,) or None."""

    compute_dtype = "float32"  # of its products; models.llama.Llama.compute_in sets it

    def __init__(self, in_features, out_features, bias=False):
        bound = 1 / math.sqrt(max(in_features, 1))
        self.weight = Tensor(uniform((out_features, in_features), bound), requires_grad=True)
        self.bias = Tensor(np.zeros(out_features, np.float32), requires_grad=True) if bias else None

    @classmethod
    def of(cls, weight, bias=None):
        """A layer that holds these Tensors; nothing is drawn."""
        layer = cls.__new__(cls)
        layer.weight, layer.bias = weight, bias
        return layer

    in_features = property(lambda self: self.weight.shape[1])
    out_features = property(lambda self: self.weight.shape[0])

    def forward(self, x):
        return ops.linear(x, self.weight, self.bias, self.compute_dtype)

    def dense(self):
        """W as a float32 array (out, in)."""
        return self.weight.data


class FrozenLinear(Module):
    """A linear layer whose weight is Stored (see `dtypes`): `ops.linear_frozen` around `weight.dequantize`."""

    def __init__(self, weight, bias=None, compute_dtype="float32", backward_weight="stored"):
        self.weight, self.bias, self.compute_dtype = weight, bias, dtype_name(compute_dtype)
        self.backward_weight = backward_weight
        name = type(self).__name__
        if self.compute_dtype not in products.DTYPES:
            raise ValueError(f"{name}: compute_dtype {compute_dtype!r}, expected one of {products.DTYPES}")
        if backward_weight not in ("stored", "forward"):
            raise ValueError(f"{name}: backward_weight {backward_weight!r}, expected 'stored' or 'forward'")
        if len(weight.shape) != 2:
            raise ValueError(f"{name}: the weight must be (out, in), got {tuple(weight.shape)}")

    in_features, out_features = Linear.in_features, Linear.out_features

    def forward(self, x):
        return ops.linear_frozen(x, self.weight, self.bias, self.compute_dtype, self.backward_weight)

    def dense(self):
        """Ŵ as a float32 array (out, in), freshly dequantized."""
        return self.weight.dequantize("float32")


class Linear4bit(FrozenLinear):
    """y = x Ŵᵀ + b, Ŵ = doubleDequant(weight) (QLoRA eq. 5 and 6). weight is a QuantizedTensor of shape (out, in).

    compute_dtype     "float32" (products as they are), or "bfloat16" or "float16" (operands, bias and result rounded around a float32 sum)
    backward_weight   "stored": in the backward pass Ŵ is first rounded to the weight's original dtype, as bitsandbytes does in train
                      mode (0.50.2). "forward": the backward pass uses the forward's Ŵ

    Differs from bitsandbytes: the compute dtype is never guessed from the first input; eval() changes nothing (there, on CPUs with
    AVX512-BF16, it repacks the weight and rounds its constants).
    """

    @classmethod
    def of(cls, linear, code="nf4", blocksize=64, double_quant=True, compute_dtype="float32", name="weight", **options):
        """Quantize the weight of a Linear (or of any layer with `dense()`); `name` appears in error messages."""
        q = quantize(linear.dense(), code=code, blocksize=blocksize, double_quant=double_quant, name=name, **options)
        return cls(q, linear.bias, compute_dtype)


class Linear16bit(FrozenLinear):
    """y = x Wᵀ + b with W stored in bfloat16, two bytes a weight: the frozen base of 16-bit LoRA."""

    @classmethod
    def of(cls, linear, compute_dtype="float32", name="weight"):
        return cls(BFloat16Array.of(linear.dense()), linear.bias, compute_dtype)


#: How else than by a code of `quantize` a linear layer is stored: {name: function(layer, compute_dtype, name, …) -> FrozenLinear}.
STORES = {"bfloat16": Linear16bit.of}


class Embedding(Module):
    """y = W[ids].   weight (n, d) ~ N(0, 0.02²)."""

    def __init__(self, n, d):
        self.weight = Tensor(normal((n, d), 0.02), requires_grad=True)

    @classmethod
    def of(cls, weight):
        """A layer that holds this Tensor; nothing is drawn."""
        layer = cls.__new__(cls)
        layer.weight = weight
        return layer

    def forward(self, ids):
        return ops.embedding(ids, self.weight)

    def dense(self):
        """W as an array (n, d)."""
        return self.weight.data


class RMSNorm(Module):
    """y = w x / √(mean(x²) + ε).   weight (d,) of ones."""

    def __init__(self, d, eps=1e-5):
        self.weight, self.eps = Tensor(np.ones(d, np.float32), requires_grad=True), eps

    def forward(self, x):
        return ops.rms_norm(x, self.weight, eps=self.eps)


def quantize_linears(model, code="nf4", blocksize=64, double_quant=True, compute_dtype="float32", **options):
    """Replace every Linear of the model but lm_head by a frozen Linear4bit, in place; returns the model. All else is frozen too.

    As in transformers with bitsandbytes, embeddings, norms and the layers named in `skip` (lm_head) keep their 16 or 32 bits.
    code="bfloat16" stores the weights in two bytes instead (16-bit LoRA's base); STORES lists such names. Double quantization is on
    here, and off in `quant.quantize`. options: those of `quantized_linear`.
    """
    if any(is_adapter_weight(path) for path, _ in model.named_modules()):
        raise ValueError("quantize_linears: the model carries an adapter; quantize first, then add_lora (or merge)")
    linears = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, Linear)]
    new = {
        p: quantized_linear(p, layer, code, blocksize, double_quant, compute_dtype, **options) for p, layer in linears
    }
    for path, layer in new.items():  # only now that every weight was found fit
        model.replace(path, layer)
    return model.requires_grad_(False)


def quantized_linear(path, layer, code="nf4", blocksize=64, double_quant=True, compute_dtype="float32",
                     skip=("lm_head",), dtype="float32", **options):  # fmt: skip
    """The frozen layer that takes the place of a Linear at this path; the layer itself if a name in `skip` ends the path.

    dtype     "bfloat16": the weight is rounded to it first, and its `dtype` is then "bfloat16"; options: those of `quant.quantize`
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"quantize: dtype {dtype!r}, expected 'float32' or 'bfloat16'")
    if any(path == s or path.endswith("." + s) for s in skip):
        return layer
    if isinstance(code, str) and code in STORES:
        return STORES[code](layer, compute_dtype, f"{path}.weight", **options)
    w = BFloat16Array.of(layer.dense()) if dtype == "bfloat16" else layer.dense()
    q = quantize(w, code, blocksize, double_quant, name=f"{path}.weight", **options)
    return Linear4bit(q, layer.bias, compute_dtype)
