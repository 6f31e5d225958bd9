"""DoRA: the bypass with a magnitude for each output, trained apart from the direction (Liu et al. 2024, eq. 5 and §4.3).

    h = m ⊙ (W₀ + s B A) x / ‖W₀ + s B A‖,      m = ‖W₀ + s B A‖ at the start

The norm of each output's row is held constant in the backward pass, as the paper proposes for memory's sake. `use_dora=True` makes
these classes in the place of the plain bypasses.

A row of W₀ + s B A that is all zeros has no direction, and m/‖·‖ is 0/0 there. Such a row, as pruning and padding leave it, stays what
it is: its factor is 1, so the first output is the base's there too. (PEFT 0.21 gives NaN.)

Differs from PEFT: the norm always belongs to the base, also where another adapter is active beside this one.
"""

from ..backend import array_module
from ..lora import LinearBypass
from ..nn import Embedding
from ..tensor import Tensor
from .kinds import ConvBypass, EmbeddingBypass


class DoRA:
    """What a bypass of any kind becomes with a magnitude.   magnitude (out,), which starts as ‖W₀ + s B A‖."""

    def __init__(self, base, *args, lora_bias=False, **options):
        if lora_bias:
            raise ValueError("lora: use_dora and lora_bias do not go together (nor do they in PEFT)")
        super().__init__(base, *args, **options)
        self.magnitude = Tensor(self.norm(base), requires_grad=True)

    def forward(self, x, base, base_output):
        """(m/‖·‖ − 1) W₀x + (m/‖·‖) s B A x: what is added to the base's output W₀x."""
        dropped = self.dropped(x)
        low = self.through(dropped, base) * self.scaling
        plain = base_output if dropped is x else base(dropped)
        if getattr(base, "bias", None) is not None:
            plain = plain - self.row(base.bias, plain)
        factor = self.row(self.factor(self.magnitude, base), plain)
        return (factor - 1.0) * plain + factor * low

    def norm(self, base):
        """‖W₀ + s B A‖ (out,): for each output over all its weights."""
        w = super().weight(base)
        w = w.T if isinstance(base, Embedding) else w.reshape(len(w), -1)
        return array_module(w).sqrt((w * w).sum(axis=1))

    def factor(self, m, base):
        """m/‖W₀ + s B A‖ (out,), and 1 where that norm is 0. The norm is an array: no gradient goes through it (§4.3)."""
        norm = self.norm(base)
        zero = norm == 0
        return m / (norm + zero) * ~zero + zero

    def weight(self, base):
        """m (W₀ + ΔW)/‖W₀ + ΔW‖: the weight that this bypass makes of its base's."""
        w = super().weight(base)
        factor = self.factor(self.magnitude.data, base)
        return w * (factor if isinstance(base, Embedding) else factor.reshape(-1, *[1] * (w.ndim - 1)))

    def change(self, base, w0):
        return self.weight(base) - w0


class DoRALinearBypass(DoRA, LinearBypass):
    """DoRA beside a linear layer."""


class DoRAEmbeddingBypass(DoRA, EmbeddingBypass):
    """DoRA beside an embedding."""


class DoRAConvBypass(DoRA, ConvBypass):
    """DoRA beside a convolution."""


LinearBypass.dora, EmbeddingBypass.dora, ConvBypass.dora = DoRALinearBypass, DoRAEmbeddingBypass, DoRAConvBypass
