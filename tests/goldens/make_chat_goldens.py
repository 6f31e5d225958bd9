"""Write chats.json: what transformers' apply_chat_template makes of the templates and conversations in tests/chats.py.

Run `python tests/goldens/make_chat_goldens.py` where transformers, tokenizers and jinja2 are installed; the tests need only the file.
{"template/conversation/asking": text}, asking being add_generation_prompt; null where the template refuses the conversation.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import chats


def opened(name):
    """transformers' tokenizer with a template of ours."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        chats.tokenizer(name).save(Path(folder))
        return AutoTokenizer.from_pretrained(folder)


def main():
    written, theirs = {}, {name: opened(name) for name in chats.MARKS}
    for name, talk, asking in chats.cases():
        messages, variables = chats.CONVERSATIONS[talk]
        try:
            text = theirs[name].apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asking, **chats.ALWAYS, **variables
            )
        except Exception:  # the template refuses, or is not made for such messages
            text = None
        written[f"{name}/{talk}/{asking}"] = text
    text = json.dumps(written, indent=0, ensure_ascii=False) + "\n"
    chats.GOLDENS.write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(written)} texts, {sum(t is None for t in written.values())} refused")


if __name__ == "__main__":
    main()
