"""A model made ready for training on a base of few bits."""

from .. import ops
from ..dtypes import BFloat16Array
from ..nn import Embedding, Linear, Linear16bit, Module
from ..tensor import Tensor


class Embedding16bit(Module):
    """y = W[ids] with W (n, d) stored in bfloat16, two bytes a weight, and frozen."""

    def __init__(self, weight):
        self.weight = weight

    @classmethod
    def of(cls, embedding):
        return cls(BFloat16Array.of(embedding.dense()))

    def forward(self, ids):
        ops.check_ids(ids, self.weight.shape[0])
        return Tensor(BFloat16Array(self.weight.bits[ids]).dequantize("float32"))

    def dense(self):
        """W as a float32 array (n, d), freshly made."""
        return self.weight.dequantize("float32")


def store_in_16_bits(model):
    """Hold each dense Linear and Embedding in bfloat16, frozen, in place: what a 16-bit checkpoint takes. Norms and fewer bits stay."""
    for path, layer in list(model.named_modules()):
        if type(layer) in (Linear, Embedding):
            model.replace(path, (Linear16bit if isinstance(layer, Linear) else Embedding16bit).of(layer))
    return model.requires_grad_(False)


def prepare_for_kbit_training(model, gradient_checkpointing=True):
    """What PEFT's prepare_model_for_kbit_training does: freeze all, 16-bit weights to float32, checkpoint each block. Returns the model.

    Layers in 4 and in 8 bits stay. Everything else that is stored in 16 bits (embedding, head) then takes twice the bytes. PEFT lets
    the embedding's output ask for a gradient too: torch's reentrant checkpoint needs that, and `tape.checkpoint` does not.
    """
    for path, layer in list(model.named_modules()):
        if isinstance(layer, (Linear16bit, Embedding16bit)):
            weight = Tensor(layer.dense())
            dense = Linear.of(weight, layer.bias) if isinstance(layer, Linear16bit) else Embedding.of(weight)
            dense.training = layer.training
            model.replace(path, dense)
    if hasattr(model, "gradient_checkpointing"):
        model.gradient_checkpointing = gradient_checkpointing
    return model.requires_grad_(False)


#: PEFT's name for it until 4-bit bases came in May 2023 and it was renamed prepare_model_for_kbit_training; PEFT 0.10 dropped this name.
prepare_model_for_int8_training = prepare_for_kbit_training
