"""The text of a conversation as a model was taught to read it: its chat template, run by jinja2 in its sandbox.

    messages  [{"role": "user", "content": "hi"}, ...]
    text      <|im_start|>user⏎hi<|im_end|>⏎<|im_start|>assistant⏎        (here ChatML's; each model has marks of its own)

A template is a program that came with a model. It runs as transformers runs it (utils/chat_template_utils.py there): the immutable
sandbox, blocks trimmed, `break` and `continue`, `tojson` without HTML's escapes, `raise_exception`, `strftime_now`, and
`{% generation %}` around what the assistant says. It sees the messages, the tools, the documents, add_generation_prompt, the
special tokens by name, and whatever else is given by name. Needs jinja2 (extra `llm`).
"""

import functools
import json
import re
from datetime import datetime

from . import files

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
        """
        messages, pieces, marked = [_plain(message) for message in messages], [], []
        try:
            template = _compiled(self.source)
            template.environment.generation.watch(pieces, marked)
            for piece in template.generate(messages=messages, **variables):
                pieces.append(piece)
        except _Missing:
            raise
        except Exception as error:  # a template is a program and may fail in any way
            line = f" line {error.lineno}" if getattr(error, "lineno", None) else ""
            what = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self.where}: the chat template{line} fails on this conversation: {what}") from None
        text = "".join(pieces)
        found = all(text.startswith(said, start) for start, said in marked)
        return text, [(start, start + len(said)) for start, said in marked] if found else []


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


class _Missing(ValueError):
    """jinja2 is not there, or too old."""


@functools.cache
def _environment():
    """The sandbox in which templates run."""
    from importlib.metadata import version

    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox
    except ModuleNotFoundError:
        raise _Missing(
            "this model's chat template needs the jinja2 package: pip install -e '.[llm]' in a clone of tinylora"
        ) from None
    found = version("jinja2")
    if [int(n) for n in re.findall(r"\d+", found)] < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise _Missing(f"chat templates need jinja2 {wanted} or newer, and this is {found}; upgrade it")

    class Generation(ext.Extension):
        """{% generation %}…{% endgeneration %}: notes where in the output it begins, and what it is."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's way to name them)

        def __init__(self, environment):
            super().__init__(environment)
            environment.extend(generation=self)
            self.pieces = self.marked = None

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

        def note(self, caller):
            self.marked.append((sum(map(len, self.pieces)), text := caller()))
            return text

        def watch(self, pieces, marked):
            self.pieces, self.marked = pieces, marked

    class Namespace(jinja2.utils.Namespace):
        """jinja2's, without names that begin with an underscore: they reach into the interpreter."""

        def __init__(*args, **values):
            self, *positional = args
            for name in (values := dict(*positional, **values)):
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            Namespace.check(name)
            super().__setitem__(name, value)

        @staticmethod
        def check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(
                    f"a namespace holds no name with an underscore in front: {name!r}"
                )

    class Dict:
        """dict without its attributes."""

        def __call__(self, *args, **values):
            return dict(*args, **values)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": Namespace,
        "dict": Dict(),
    }
    return environment


@functools.lru_cache(maxsize=32)
def _compiled(source):
    return _environment().from_string(source)


# ------------------------------------------------------------------------------------------------------------ where templates stand
def beside(folder):
    """[(templates, where)] in files beside a tokenizer, as tokenizer_config.json would name them; they count before its own.

    chat_template.jinja                  the default
    additional_chat_templates/*.jinja    others, named after their files
    """
    default, others = folder / "chat_template.jinja", sorted((folder / "additional_chat_templates").glob("*.jinja"))
    texts = {"default": default.read_text(encoding="utf-8")} if default.is_file() else {}
    texts |= {path.name.removesuffix(".jinja"): path.read_text(encoding="utf-8") for path in others}
    if not others:
        return [(text, default) for text in texts.values()]
    return [([{"name": name, "template": text} for name, text in texts.items()], others[0].parent)]


def of_processor(folder):
    """[(template, where)] in chat_template.json, which processors of images wrote; it counts where nothing else does."""
    path = folder / "chat_template.json"
    return [(files.read_json(path).get("chat_template"), path)] if path.is_file() else []


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
