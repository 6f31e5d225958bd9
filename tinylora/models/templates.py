"""The text of a conversation as a model was taught to read it: its chat template, run by jinja2 in a process of its own.

    messages  [{"role": "user", "content": "hi"}, ...]
    text      <|im_start|>user⏎hi<|im_end|>⏎<|im_start|>assistant⏎        (here ChatML's; each model has marks of its own)

A template is a program that came with a model. It runs as transformers runs it, and with limits: see `sandbox`. It sees the messages,
the tools, the documents, add_generation_prompt, the special tokens by name, and whatever else is given by name. Needs jinja2
(extra `llm`).
"""

import functools
import os
import re
from datetime import datetime

from . import files, sandbox

OLDEST = [3, 1, 6]  # older sandboxes are known to leak
START, END = "<|im_start|>", "<|im_end|>"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Template:
    """A chat template.

    source    its text
    where     the file it stands in, for sentences about it
    """

    def __init__(self, source, where="the chat template"):
        self.source, self.where = source, where

    def render(self, messages, **variables):
        """(text, [(start, end), ...]): the conversation, and where in it `{% generation %}` says that the assistant speaks.

        No place is known where the marks stand in a macro or in a text that is set aside: then there are none.

        variables    what JSON can say; and strftime_now, the `strftime` of a datetime (by default of now)
        """
        return said(self.renderings([(messages, {})], **variables)[0])

    def renderings(self, conversations, **variables):
        """[(text, spans) or the ValueError in which it ends] for each of several conversations, which is faster than one by one.

        conversations    (messages, variables of its own) each
        """
        _require_jinja2()
        now = _when(variables.pop("strftime_now", None)).isoformat()
        asked = [
            {"messages": [_plain(message) for message in messages], "variables": {**variables, **own}, "now": now}
            for messages, own in conversations
        ]
        try:
            answers = [
                answer for i in range(0, len(asked), 16) for answer in sandbox.run(self.source, asked[i : i + 16])
            ]
        except sandbox.Stopped as error:
            raise ValueError(f"{self.where}: the chat template {error}") from None
        except OSError as error:
            raise OSError(f"{self.where}: no process can be started to run the chat template in: {error}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.where}: the chat template cannot be given this conversation: {error}") from None
        return [self._outcome(answer) for answer in answers]

    def _outcome(self, answer):
        if "error" in answer:
            line = f" line {answer['line']}" if answer["line"] else ""
            return ValueError(f"{self.where}: the chat template{line} fails on this conversation: {answer['error']}")
        return answer["text"], [tuple(span) for span in answer["spans"]]


def said(outcome):
    """(text, spans) of one of the `renderings`, or its ValueError is raised."""
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


def chatml(messages, add_generation_prompt=False):
    """A conversation in ChatML, for vocabularies that have its marks and no template: <|im_start|>role⏎content<|im_end|>⏎.

    A system without words has no turn.
    """
    messages = [m for m in messages if m.get("role") != "system" or m.get("content") != ""]
    if any(not isinstance(m.get("content"), str) for m in messages):
        raise ValueError(
            "chat: a vocabulary with ChatML's marks and no template takes messages whose content is a text"
        )
    written = "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)
    return written + (f"{START}assistant\n" if add_generation_prompt else "")


def _plain(message):
    """A message as transformers hands it on: no entry that is None, and reasoning under the names that templates read."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _when(strftime):
    """The datetime whose `strftime` this is; now for None."""
    now = datetime.now() if strftime is None else getattr(strftime, "__self__", None)
    if not hasattr(now, "isoformat"):
        raise ValueError(f"strftime_now: expected the strftime of a datetime, found {strftime!r}")
    return now


@functools.cache
def _require_jinja2():
    """A sentence if jinja2 is not there, or too old. It is looked for and not imported: the sandbox's process does that."""
    from importlib.metadata import version
    from importlib.util import find_spec

    if find_spec("jinja2") is None:
        raise ValueError(
            "this model's chat template needs the jinja2 package: pip install -e '.[llm]' in a clone of tinylora"
        )
    found = version("jinja2")
    if [int(n) for n in re.findall(r"\d+", found)] < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise ValueError(f"chat templates need jinja2 {wanted} or newer, and this is {found}; upgrade it")


# ------------------------------------------------------------------------------------------------------------ where templates stand
def beside(folder):
    """[(templates, where)] in files beside a tokenizer, as tokenizer_config.json would name them; they count before its own.

    chat_template.jinja                  the default
    additional_chat_templates/*.jinja    others, named after their files
    """
    default, others = folder / "chat_template.jinja", sorted((folder / "additional_chat_templates").glob("*.jinja"))
    texts = {"default": _text(default)} if os.path.lexists(default) else {}
    texts |= {path.name.removesuffix(".jinja"): _text(path) for path in others}
    if not others:
        return [(text, default) for text in texts.values()]
    return [([{"name": name, "template": text} for name, text in texts.items()], others[0].parent)]


def of_processor(folder):
    """[(template, where)] in chat_template.json, which processors of images wrote; it counts where nothing else does."""
    path = folder / "chat_template.json"
    return [(files.read_json(path, most=1 << 16).get("chat_template"), path)] if os.path.lexists(path) else []


def _text(path):
    """The text of a file; a sentence that names it if it has none, or more than 16 MiB."""
    files.check_regular(path, 2**24)
    with files.opened(path) as f:
        data = f.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8: {error}") from None


def named(setting, where):
    """{name: text} of what tokenizer_config.json has under chat_template: a text, [{"name", "template"}, ...] or {name: text}."""
    if not setting:
        return {}
    found = {"default": setting} if isinstance(setting, str) else setting
    if isinstance(found, list) and all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in found):
        found = {t["name"]: t["template"] for t in found}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError(
            f'{where}: chat_template is neither a text nor a list of {{"name", "template"}} objects; no conversation can be written'
        )
    return found


def chosen(found, name, tools, where):
    """The Template of this name; without one "tool_use" for a conversation with tools, if there is such, else "default"."""
    if name is None:
        name = "tool_use" if tools is not None and "tool_use" in found else "default"
    if name not in found:
        raise ValueError(f"{where} has no chat template named {name!r}; it has {', '.join(sorted(found))}")
    return Template(found[name], where)
