"""Chat templates of published models, written from their documentation (templates/*.jinja), and conversations to try them on."""

import functools
import json
from pathlib import Path

FOLDER = Path(__file__).parent / "templates"
GOLDENS = Path(__file__).parent / "goldens" / "chats.json"  # what transformers makes of them: make_chat_goldens.py

#: Each template's bos_token, eos_token and further marks, as the model's vocabulary has them, and the mark that ends an answer.
MARKS = {
    "alpaca": ("<s>", "</s>", [], "</s>"),
    "chatml": ("<s>", "</s>", ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "command-r": (
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        ["<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"],
        "<|END_OF_TURN_TOKEN|>",
    ),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", [], "<｜end▁of▁sentence｜>"),
    "deepseek-r1": (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ["<｜User｜>", "<｜Assistant｜>"],
        "<｜end▁of▁sentence｜>",
    ),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "llama-2": ("<s>", "</s>", [], "</s>"),
    "llama-3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "llama-3.2": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
        "<|eot_id|>",
    ),
    "marked": ("<s>", "</s>", ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "mistral-v1": ("<s>", "</s>", [], "</s>"),
    "mistral-v3": ("<s>", "</s>", ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"], "</s>"),
    "olmo-2": ("<|endoftext|>", "<|endoftext|>", ["<|pad|>"], "<|endoftext|>"),
    "phi-3": ("<s>", "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<|end|>"),
    "qwen-2.5": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], "<|im_end|>"),
    "qwen-3": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], "<|im_end|>"),
    "smollm2": ("<|im_start|>", "<|im_end|>", ["<|endoftext|>"], "<|im_end|>"),
    "vicuna": ("<s>", "</s>", [], "</s>"),
    "zephyr": ("<s>", "</s>", [], "</s>"),
}


def talk(*contents, system=None):
    """Messages whose contents these are: the user's and the assistant's in turn."""
    roles = ["user", "assistant"] * len(contents)
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'What the weather is in a town, <now> & "here"',
        "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "Köln"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Köln"}}}

#: {name: (messages, variables)}
CONVERSATIONS = {
    "asked": (talk("What is a mill?"), {}),
    "answered": (talk("What is a mill?", "A place where corn is ground."), {}),
    "three turns": (talk("What is a mill?", "A place.", "And who works there?", "A miller.", "Why?"), {}),
    "six turns": (talk("1", "one", "2", "two", "3", "three"), {}),
    "system": (talk("hi", "Hello.", "bye", system="You are a miller.\nBe brief."), {}),
    "odd": (talk(' <b>you & me</b> "it\'s" {{ x }} \n', "\n  né 你好 🙂 \n\n", "\tyes ", "  no"), {}),
    "thought": (talk("2 + 2?", "<think>\nEasy.\n</think>\n\nFour.", "sure?", "<think>\nAgain.\n</think>\n\nYes."), {}),
    "reasoned": ([*talk("2 + 2?"), {"role": "assistant", "content": "Four.", "thinking": "Easy.", "name": None}], {}),
    "not thinking": (talk("2 + 2?"), {"enable_thinking": False}),
    "tools": (talk("Weather?", system="Be brief."), {"tools": [TOOL]}),
    "called": (
        [
            *talk("Weather?"),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
        ],
        {"tools": [TOOL]},
    ),
}
ALWAYS = {"date_string": "26 Jul 2024"}


def source(name):
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def cases():
    """(template, conversation, add_generation_prompt) of everything that is tried."""
    return [(name, talk, asking) for name in MARKS for talk in CONVERSATIONS for asking in (False, True)]


@functools.cache
def goldens():
    """{"template/conversation/asking": text, or None where transformers raises an error}."""
    return json.loads(GOLDENS.read_text(encoding="utf-8"))


def tokenizer(name, **settings):
    """A small byte-level tokenizer with a template and its marks; `settings` are further ones."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from tinylora.models.tokenizers import BPETokenizer

    bos, eos, more, _ = MARKS[name]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=list(dict.fromkeys([bos, eos, *more])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["What is a mill? A place where corn is ground. assistant user"], trainer)
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    return BPETokenizer(backend, {**known, "chat_template": source(name), **settings})
