"""A Llama, and every format that it is read from. The one door is `Llama.from_pretrained`.

llama         the model: configuration, forward pass, generation
folders       model folders, opened without loading them and written one tensor at a time
fourbit       a 4-bit weight as bitsandbytes stores it
eightbit      LLM.int8: the weight, the layer, and how bitsandbytes stores them
identity      which base a model is, and how it is held: what an adapter carries of its base
dense         frozen weights that stay dense while a text is generated
safetensors   the file format of folders, with bfloat16
rope          rotary positions, scaled or not
gguf          the file format of llama.cpp, read; gguf_writer writes it
tokenizers    bytes, and byte-pair vocabularies; tokenizer_file checks a tokenizer.json
vocabularies  the vocabulary inside a GGUF, built anew; gguf_vocabulary writes one
identity      which base a model is, and how its weights are held
templates     a conversation as text: the model's chat template, run in a process of its own (sandbox)
chat          what is learned of a conversation, and a conversation on a terminal
files         files that are written whole or not at all
"""
