"""Other people's formats. peft: adapters as PEFT saves them. bitsandbytes: 4-bit folders that transformers opens."""

from . import bitsandbytes, peft

__all__ = ["bitsandbytes", "peft"]
