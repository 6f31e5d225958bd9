"""Other people's formats and layers.

peft: adapters as PEFT saves them. bitsandbytes: 4-bit folders that transformers opens. loralib: its layers, as they are.
"""

from . import bitsandbytes, loralib, peft

__all__ = ["bitsandbytes", "loralib", "peft"]
