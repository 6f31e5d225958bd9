"""Other people's formats. peft: adapters as PEFT saves them."""

from . import peft

__all__ = ["peft"]
