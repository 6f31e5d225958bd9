"""convert: a GGUF file (or any model that opens here) as a folder that transformers opens."""

from .options import command


def convert_parser(commands):
    p = command(
        commands,
        "convert",
        _convert,
        "write a GGUF file as a Hugging Face folder",
        "Write config.json, model.safetensors, the tokenizer and the ids that end a text, which AutoModelForCausalLM and\n"
        "AutoTokenizer open. One weight is in memory at a time. Needs the packages of tinylora[llm].\n\n"
        "A GGUF's 4- and 8-bit weights are dequantized: float32 holds them exactly, bfloat16 rounds them once more.",
        "examples:\n"
        "  tinylora convert SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2\n"
        "  tinylora convert model.gguf --out model --dtype float32      exact, and twice the size\n",
        device=False,
        seed=False,
    )
    p.add_argument("path", help="FILE.gguf, a model folder, or 'base' (embedded)")
    p.add_argument("--out", required=True, help="the model folder to write")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the file (bfloat16)")


def _convert(args):
    from ..llama import convert

    written = convert(args.path, args.out, args.dtype)
    print(f"{written:,} weights written to {args.out} in {args.dtype}")
