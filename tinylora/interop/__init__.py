"""Other people's formats and layers.

peft          adapters as PEFT saves them
embeddings    what PEFT's files say of embeddings and heads
gguf          adapters as llama.cpp reads them
bitsandbytes  4- and 8-bit folders that transformers opens
loralib       its layers, as they are
"""

from . import bitsandbytes, gguf, loralib, peft

__all__ = ["bitsandbytes", "gguf", "loralib", "peft"]
