"""Other people's formats and layers.

peft: adapters as PEFT saves them. gguf: adapters as llama.cpp reads them. bitsandbytes: 4-bit folders that transformers opens.
loralib: its layers, as they are.
"""

from . import bitsandbytes, gguf, loralib, peft

__all__ = ["bitsandbytes", "gguf", "loralib", "peft"]
