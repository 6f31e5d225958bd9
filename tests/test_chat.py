"""Chat templates, what is learned of a conversation, and a conversation on a terminal.

The templates are those of published models (chats.py); what transformers makes of them lies in goldens/chats.json.
"""

import builtins
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import chats
import pytest
import tiny

from tinylora import Llama, backend
from tinylora.models import chat, sandbox, templates
from tinylora.models.templates import Template
from tinylora.training.corpus import question_and_answer

jinja2 = pytest.importorskip("jinja2")


def variables(name):
    bos, eos, _, _ = chats.MARKS[name]
    return {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None, **chats.ALWAYS}


# ------------------------------------------------------------------------------------------------------------------ templates
@pytest.mark.parametrize("name", chats.MARKS)
def test_a_published_template_writes_what_transformers_writes(name):
    template = Template(chats.source(name), "FOLDER")
    for key, (messages, more) in chats.CONVERSATIONS.items():
        for asking in (False, True):
            expected = chats.goldens()[f"{name}/{key}/{asking}"]
            options = {**variables(name), **more, "add_generation_prompt": asking}
            if expected is None:
                with pytest.raises(ValueError, match="FOLDER: the chat template"):
                    template.render(messages, **options)
            else:
                assert template.render(messages, **options)[0] == expected, (key, asking)


def test_the_goldens_are_of_these_templates_and_conversations():
    assert list(chats.goldens()) == [f"{name}/{key}/{asking}" for name, key, asking in chats.cases()]
    assert len(chats.MARKS) >= 12 and {f"{name}.jinja" for name in chats.MARKS} == {
        p.name for p in chats.FOLDER.iterdir()
    }
    assert sum(text is None for text in chats.goldens().values()) < 30


def test_chatml_without_a_template_is_what_the_template_writes():
    for key in ("asked", "three turns", "system", "odd"):
        messages = chats.CONVERSATIONS[key][0]
        for asking in (False, True):
            assert templates.chatml(messages, asking) == chats.goldens()[f"chatml/{key}/{asking}"]
    for content in (None, [{"type": "text", "text": "a"}]):
        with pytest.raises(ValueError, match="takes messages whose content is a text"):
            templates.chatml([{"role": "user", "content": content}])


def test_the_date_is_todays(monkeypatch):
    class Fixed:
        @staticmethod
        def now():
            from datetime import datetime

            return datetime(2024, 7, 26)

    monkeypatch.setattr(templates, "datetime", Fixed)
    options = {name: value for name, value in variables("llama-3.2").items() if name != "date_string"}
    text, _ = Template(chats.source("llama-3.2")).render(chats.talk("What is a mill?"), **options)
    assert text == chats.goldens()["llama-3.2/asked/False"]


@pytest.mark.parametrize(
    "source, words",
    [
        ("{{ messages.__class__ }}{{ messages.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe|undefined"),
        ("{{ dict.__call__.__globals__ }}{{ dict.__call__.__globals__.x }}", "unsafe|undefined"),
        ("{{ strftime_now.__globals__.json }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
        ("{{ messages[0].update({'role': 'system'}) }}", "is not safely callable|unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "underscore"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "underscore|private"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe|undefined"),
        ("{% for i in range(99999999) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('no cats') }}", "no cats"),
        ("{{ raise_exception('no cats,\\n  no dogs') }}", "no cats, no dogs"),
        ("{{ messages[0].nothing.at_all }}", "'dict object' has no attribute 'nothing'"),
        ("{{ 'a' + nothing }}", "'nothing' is undefined"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for m in messages %}", "line 1 fails on this conversation: Unexpected end"),
        ("a\nb\n{% if %}", "line 3"),
        ("{{ messages | tojson(1, 2, 3, 4, 5, 6, 7) }}", "positional"),
        ("{% include 'a' %}", "no loader"),
        ("{% generation %}", "Unexpected end"),
    ],
)
def test_a_template_is_a_program_that_may_fail_but_not_reach_out(source, words):
    with pytest.raises(ValueError, match=rf"FOLDER: the chat template.*({words})") as caught:
        Template(source, "FOLDER").render(chats.talk("hi"))
    assert "\n" not in str(caught.value)


def test_what_is_not_text_of_the_messages_is_as_in_transformers():
    def shown(source, messages, **more):
        return Template(source).render(messages, **more)[0]

    assert shown("{{ x | tojson }}", [], x={"b": "<é>", "a": [1, None]}) == '{"b": "<é>", "a": [1, null]}'
    assert shown("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}", []) == '{\n  "a": 2,\n  "b": 1\n}'
    assert shown("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", []) == "01"
    assert shown("{{ dict(a=1).a }}{{ dict.fromkeys(['x']) }}", []) == "1{'x': None}"
    assert shown("{{ 'name' in messages[0] }}", [{"role": "user", "content": "a", "name": None}]) == "False"
    thought = [{"role": "assistant", "content": "a", "reasoning": "b"}]
    assert shown("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}", thought) == "bb"
    assert thought == [{"role": "assistant", "content": "a", "reasoning": "b"}], "the caller's messages stay"
    assert shown("    {% if true %}\n  a\n    {% endif %}\nb", []) == "  a\nb", "blocks take their line with them"


def test_without_jinja2_or_with_an_old_one_a_sentence_says_what_to_install(monkeypatch):
    templates._require_jinja2.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        ValueError, match=r"needs the jinja2 package: pip install -e '\.\[llm\]' in a clone of tinylora"
    ):
        Template("a").render([])
    monkeypatch.setitem(sys.modules, "jinja2", jinja2)
    monkeypatch.setattr("importlib.metadata.version", lambda package: "3.1.5")
    with pytest.raises(ValueError, match=r"need jinja2 3\.1\.6 or newer, and this is 3\.1\.5"):
        Template("b").render([])
    monkeypatch.undo()
    templates._require_jinja2.cache_clear()
    assert Template("c").render([]) == ("c", [])


def test_marks_around_what_the_assistant_says():
    source = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endfor %}"
    text, spans = Template(source).render(chats.talk("é", "bc"))
    assert text == "<é><bc>" and [text[a:b] for a, b in spans] == ["é", "bc"]
    assert Template(source).render(chats.talk("é", "bc")) == (text, spans), "nothing is left of the first time"
    macro = "{% macro say(m) %}({% generation %}{{ m }}{% endgeneration %}){% endmacro %}"
    source = macro + "{% for m in messages %}{{ say(m.content) }}{% endfor %}"
    assert Template(source).render(chats.talk("a", "b")) == ("(a)(b)", []), "where they stand cannot be told"


# ------------------------------------------------------------------------------------------------- a template has its own process
LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.fixture
def given(monkeypatch):
    """given(0.5): templates have half a second."""

    def given(seconds):
        monkeypatch.setattr(sandbox, "SECONDS", seconds)
        sandbox._end()

    yield given
    sandbox._end()


@pytest.mark.parametrize(
    "source",
    [
        LOOPS,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ (10 ** 9 ** 5) % 7 }}{{ 7 ** (9 ** 9) }}",  # one step of Python's, which nothing interrupts
        "{% for i in range(99999) %}{{ (messages[0].content * 10 ** 7) | wordwrap(1) | length }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_ended(source, given):
    given(0.5)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^FOLDER: the chat template takes longer than 0\.5 seconds$"):
        Template(source, "FOLDER").render(chats.talk("hi"))
    assert time.monotonic() - began < 60
    assert Template("{{ messages[0].content }}").render(chats.talk("hi")) == ("hi", []), "the next one is run"


@pytest.mark.skipif(sys.platform != "linux", reason="not every system limits the memory of a process")
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{% set n = namespace(x='a' * 999) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ 'a' | center(10 ** 11) }}",
        "{{ 'a' | indent(10 ** 11, true) }}",
        "{{ '%100000000000d' % 1 }}",
        "{{ '{:>100000000000}'.format(1) }}",
        "{{ ([1] * 10 ** 9) | join }}",
        "{{ [1] | tojson(indent=10 ** 11) }}",
        "{{ ('a' * 10 ** 5).replace('a', 'b' * 10 ** 5) }}",
        "{% for i in range(9) %}{{ 'a' * 10 ** 7 }}{% endfor %}",  # more text than anyone reads
    ],
)
def test_a_template_gets_no_more_memory_than_it_needs(source, given):
    given(60)
    with pytest.raises(
        ValueError,
        match=r"^FOLDER: the chat template (needs more than 1024 MiB of memory, or writes more|fails .*it writes much more)",
    ):
        Template(source, "FOLDER").render(chats.talk("hi"))
    assert Template("a").render([]) == ("a", [])


@pytest.mark.parametrize(
    "opening", ["{{", "{%", "{{ (", "{{ '", "{% if a %}", "{#", "{{ -", "{% raw %}", "{{ [", "{{ a."]
)
def test_a_template_of_openings_alone_takes_no_time(opening):
    began = time.monotonic()
    try:
        Template(opening * (400_000 // len(opening)), "FOLDER").render(chats.talk("hi"))
    except ValueError as error:
        assert str(error).startswith("FOLDER: the chat template")
    assert time.monotonic() - began < 60


def test_what_a_template_says_of_itself_is_shortened():
    with pytest.raises(ValueError, match="aaa") as caught:
        Template("{{ raise_exception('a' * 10 ** 7) }}", "FOLDER").render([])
    assert len(str(caught.value)) < 1200


@pytest.mark.skipif(os.name != "posix", reason="kills")
def test_the_process_of_a_template_ends_with_the_one_that_asked(tmp_path):
    code = (
        "from tinylora.models import sandbox, templates; sandbox.SECONDS = 1; t = templates.Template\n"
        f"t('a').render([]); print(sandbox._child.process.pid, flush=True); t({LOOPS!r}).render([])"
    )
    for busy in (True, False):
        script = code if busy else code.rpartition("; t(")[0] + "; import time; time.sleep(60)"
        parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        child = int(parent.stdout.readline())
        parent.kill()
        parent.communicate()
        until = time.monotonic() + 20
        while _runs(child) and time.monotonic() < until:
            time.sleep(0.02)
        assert not _runs(child), busy


def _runs(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as f:  # a zombie is waited for by nobody where process 1 does not
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupted_answer_is_no_ones(monkeypatch):
    receive = sandbox._receive

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Template("one").render([])
    monkeypatch.setattr(sandbox, "_receive", receive)
    assert Template("two").render([]) == ("two", [])


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_process_that_was_killed_is_replaced_and_ctrl_c_is_for_the_parent():
    assert Template("one").render([]) == ("one", [])
    child = sandbox._child.process
    os.kill(child.pid, signal.SIGINT)
    assert Template("two").render([]) == ("two", []) and sandbox._child.process is child
    child.kill()
    child.wait()
    assert Template("two").render([]) == ("two", []) and sandbox._child.process is not child


def test_several_conversations_at_once_are_each_what_one_alone_is():
    template = Template("{{ messages[0].content }}{{ x }}{{ y }}{{ 1 / messages | length }}", "FOLDER")
    every = [(chats.talk(*"abc"[: i % 3]), {"x": i}) for i in range(40)]
    for (messages, own), outcome in zip(every, template.renderings(every, x="", y="!"), strict=True):
        if messages:
            assert templates.said(outcome) == template.render(messages, **own, y="!") and "!" in outcome[0]
        else:
            with pytest.raises(ValueError, match=r"^FOLDER: the chat template fails .* has no element 0"):
                templates.said(outcome)


def test_threads_get_their_own_texts():
    wrong = []

    def ask(name):
        for i in range(50):
            text, _ = Template("{{ messages[0].content }}" + name).render(chats.talk(str(i)))
            wrong.extend([text] if text != f"{i}{name}" else [])

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_that_was_forked_asks_one_of_its_own():
    Template("one").render([])
    child = sandbox._child.process
    pid = os.fork()
    if pid == 0:
        os._exit(0 if Template("two").render([])[0] == "two" and sandbox._child.process is not child else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert Template("three").render([])[0] == "three" and sandbox._child.process is child


def test_where_no_process_can_be_started_a_template_is_run_all_the_same(monkeypatch):
    sandbox._end()
    monkeypatch.setattr(sys, "platform", "emscripten")
    text = Template("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}")
    assert text.render(chats.talk("é", "b")) == ("éb", [(0, 1), (1, 2)]) and sandbox._child is None
    monkeypatch.undo()
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **b: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory"))
    )
    with pytest.raises(OSError, match=r"^FOLDER: no process can be started to run the chat template in: .*allocate"):
        Template("a", "FOLDER").render([])


def test_a_template_is_given_what_json_can_say():
    for wrong in ({1, 2}, b"a", object(), {(1, 2): 3}):
        with pytest.raises(ValueError, match=r"^FOLDER: the chat template cannot be given this conversation: "):
            Template("a", "FOLDER").render([], x=wrong)
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match=r"^FOLDER: the chat template cannot be given this conversation: .*recursion"):
        Template("a", "FOLDER").render([], x=nested)
    with pytest.raises(ValueError, match="strftime_now: expected the strftime of a datetime"):
        Template("a").render([], strftime_now=lambda form: "today")


# -------------------------------------------------------------------------------------------------------------- where they stand
FORMS = {
    "a text": ({"chat_template": "one"}, {}, "one"),
    "a list": (
        {"chat_template": [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]},
        {},
        "one",
    ),
    "an object": ({"chat_template": {"default": "one", "rag": "two"}}, {}, "one"),
    "a file": ({"chat_template": "old"}, {"chat_template.jinja": "one"}, "one"),
    "files": (
        {"chat_template": "old"},
        {"chat_template.jinja": "one", "additional_chat_templates/rag.jinja": "two"},
        "one",
    ),
    "a processor's file": ({}, {"chat_template.json": '{"chat_template": "one"}'}, "one"),
    "a processor's file is the last": (
        {"chat_template": "one"},
        {"chat_template.json": '{"chat_template": "old"}'},
        "one",
    ),
}


def written(folder, settings, beside=()):
    """A tokenizer's folder with these settings and files."""
    t = chats.tokenizer("chatml")
    t.settings = {**{k: v for k, v in t.settings.items() if k != "chat_template"}, **settings}
    t.save(folder)
    for name, text in dict(beside).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_template_is_found(form, tmp_path):
    pytest.importorskip("tokenizers")
    from tinylora.models.tokenizers import load_tokenizer

    settings, beside, expected = FORMS[form]
    t = load_tokenizer(written(tmp_path, settings, beside), 1000)
    assert t.chats and t.render(chats.talk("hi")) == expected
    if "rag" in str(FORMS[form]):
        assert t.render(chats.talk("hi"), chat_template="rag") == "two"
        with pytest.raises(ValueError, match="has no chat template named 'poem'; it has default, rag"):
            t.render(chats.talk("hi"), chat_template="poem")
    t.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again", 1000).render(chats.talk("hi")) == expected


def test_a_template_that_fails_is_named_by_its_file(tmp_path):
    pytest.importorskip("tokenizers")
    from tinylora.models.tokenizers import load_tokenizer

    bad = "{{ messages[0].content + 1 }}"
    files = {
        "tokenizer_config.json": ({"chat_template": bad}, {}),
        "chat_template.jinja": ({}, {"chat_template.jinja": bad}),
        "additional_chat_templates": ({}, {"additional_chat_templates/default.jinja": bad}),
        "chat_template.json": ({}, {"chat_template.json": f'{{"chat_template": "{bad}"}}'}),
    }
    for i, (name, (settings, beside)) in enumerate(files.items()):
        folder = written(tmp_path / str(i), settings, beside)
        with pytest.raises(ValueError) as caught:
            load_tokenizer(folder, 1000).chat_prompt("hi")
        assert str(caught.value).startswith(f"{folder / name}: the chat template"), name


def test_tools_have_a_template_of_their_own_and_no_default_is_a_sentence(tmp_path):
    pytest.importorskip("tokenizers")
    from tinylora.models.tokenizers import load_tokenizer

    two = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    t = load_tokenizer(written(tmp_path / "a", {"chat_template": two}), 1000)
    assert t.render(chats.talk("hi"), tools=[chats.TOOL]) == "two" and t.render(chats.talk("hi")) == "one"
    beside = {"additional_chat_templates/rag.jinja": "two"}  # transformers takes these alone then
    t = load_tokenizer(written(tmp_path / "b", {"chat_template": "one"}, beside), 1000)
    with pytest.raises(ValueError, match="has no chat template named 'default'; it has rag"):
        t.chat_prompt("hi")
    for wrong in (3, [{"name": "default"}], [1], {"default": 1}):
        t = load_tokenizer(written(tmp_path / "c", {"chat_template": wrong}), 1000)
        with pytest.raises(ValueError, match=r"c.tokenizer_config\.json: chat_template is neither a text nor a list"):
            t.chat_prompt("hi")
    with pytest.raises(ValueError, match="the conversation is empty"):
        t.render([])


# ---------------------------------------------------------------------------------------------------------------- what is learned
def read_and_learned(t, example):
    """[(whether it is learned, its text)]."""
    return [(i % 2 == 1, t.backend.decode(part, skip_special_tokens=False)) for i, part in enumerate(example)]


@pytest.mark.parametrize("name", chats.MARKS)
def test_the_loss_is_on_what_the_assistant_says_and_on_its_end(name):
    pytest.importorskip("tokenizers")
    t, messages = chats.tokenizer(name), chats.talk("What?", "A mill.", "Why?", "Corn is ground.", "Where?")
    end = chats.MARKS[name][3]
    assert t.backend.id_to_token(t.end_id) == end and t.end_id in t.end_ids
    examples = chat.turns(t, messages)
    apart = name in ("alpaca", "qwen-3")  # no token behind an answer, and earlier turns that are rewritten
    assert len(examples) == (2 if apart else 1)
    learned = [text for example in examples for is_learned, text in read_and_learned(t, example) if is_learned]
    assert len(learned) == 2 and all(text.endswith(end) for text in learned)
    thought = "<think>\n\n</think>\n\n" if name == "qwen-3" else ""
    assert [text.removesuffix(end).strip() for text in learned] == [thought + "A mill.", thought + "Corn is ground."]
    for example in examples:
        if name != "alpaca":  # which has no end to write
            given = t.backend.decode([i for part in example for i in part], skip_special_tokens=False)
            upto = messages[:4] if not apart or "ground" in given else messages[:2]
            assert t.render(upto, strftime_now=chat.DAY.strftime).startswith(given)
    asked = t.encode(t.render(messages[:1], add_generation_prompt=True, strftime_now=chat.DAY.strftime))
    if name != "deepseek-r1":  # which asks with "<think>" and writes answers without
        assert list(examples[0][0]) == asked, "what is read before the first answer is the prompt"


@pytest.mark.parametrize("name", chats.MARKS)
def test_an_end_that_the_data_write_out_is_there_once(name):
    pytest.importorskip("tokenizers")
    t, end, eos = chats.tokenizer(name), chats.MARKS[name][3], chats.MARKS[name][1]
    plain = chat.turns(t, chats.talk("What?", "A mill.", "Why?", "Corn."))
    for first, last in ((end, end), (end + "\n", eos), (end + " " + end, "")):
        messages = chats.talk("What?", "A mill." + first, "Why?", "Corn." + last)
        kept = [dict(message) for message in messages]
        assert chat.turns(t, messages) == plain and messages == kept
    assert question_and_answer([("What?", "A mill." + end)], t).pairs == chat.turns(t, chats.talk("What?", "A mill."))


def test_an_end_that_is_written_ten_thousand_times_takes_no_time():
    def without(content, *marks):
        return chat._without_end({"role": "assistant", "content": content}, marks)["content"]

    assert without("a </s> \n<e></s>\t", "</s>", "<e>") == "a " and without(" </s>", "</s>") == " "
    assert without("a </s> b ", "</s>") == "a </s> b " and without("", "</s>") == ""
    assert without("a</s>", "", "</s>") == "a", "a mark without letters ends nothing"
    began = time.process_time()
    assert (
        without("a" + "</s> " * 100_000, "<e>", "</s>") == "a" and without("a" + " " * 400_000, "</s>").strip() == "a"
    )
    assert time.process_time() - began < 5


def test_the_systems_words_of_a_template_are_found_in_time_that_grows_as_the_text():
    pytest.importorskip("tokenizers")
    t, start, end = chats.tokenizer("chatml"), templates.START, templates.END

    def words(text):
        t.settings["chat_template"] = text
        return t._default_system()

    assert words(f"{{{{ '{start}system\nYou are\\na miller.{end}' }}}}") == "You are\na miller."
    assert words(f"{start}system\\nA{end}{start}system\nB{end}") == "A"
    assert words(f"{start}system\nA'{start}system\nB{start}system\nC{end}D") == f"B{start}system\nC"
    assert words(f"{start}system\n{{{{ x }}}}{end} {start}system\nB{end}") == "B"
    for without in (
        "",
        f"{start}system\nA",
        f"{start}system A{end}",
        f"{end}{start}system\n",
        None,
        [{"name": "default"}],
    ):
        assert words(without) == ""
    began = time.process_time()
    for openings in (
        f"{start}system\n" * 20_000,
        f"{start}system\n'{end}" * 20_000,
        f"{start}system\n" * 20_000 + f"'{end}",
    ):
        assert words(openings) == ""
    assert time.process_time() - began < 2


def test_white_space_that_is_a_token_of_its_own_ends_nothing():
    pytest.importorskip("tokenizers")
    from tinylora.models.tokenizers import BPETokenizer

    t = chats.tokenizer("alpaca")
    t.backend.add_tokens(["\n\n", "\u2581\u2581"])
    t = BPETokenizer(t.backend, t.settings)
    assert t.ending == ("", "\n\n") and t.end_id == t.eos_id
    t.settings["chat_template"] = chats.source("alpaca").replace("\\n\\n' }}{% endif", "\u2581\u2581' }}{% endif")
    assert BPETokenizer(t.backend, t.settings).ending == ("", "\u2581\u2581")


@pytest.mark.parametrize("name", ["chatml", "marked", "alpaca", "qwen-3"])
def test_only_the_later_answers_are_learned_if_so_asked(name):
    pytest.importorskip("tokenizers")
    t, messages = chats.tokenizer(name), chats.talk("a", "one", "c", "two")
    ((read, learned),) = chat.turns(t, messages, first=2)
    read, learned = (t.backend.decode(part, skip_special_tokens=False) for part in (read, learned))
    assert "one" in read and "two" not in read and learned.endswith("two" + chats.MARKS[name][3])
    every = [text for example in chat.turns(t, messages) for is_it, text in read_and_learned(t, example) if is_it]
    assert len(every) == 2 and every[1] == learned


def test_what_is_thought_is_learned_where_the_template_writes_it():
    pytest.importorskip("tokenizers")
    t, (messages, _) = chats.tokenizer("qwen-3"), chats.CONVERSATIONS["thought"]
    first, second = (read_and_learned(t, example) for example in chat.turns(t, messages))
    assert first[1][1] == "<think>\nEasy.\n</think>\n\nFour.<|im_end|>"
    assert "Easy" not in second[0][1] and second[1][1] == "<think>\nAgain.\n</think>\n\nYes.<|im_end|>"


def test_tools_are_read_and_calls_learned():
    pytest.importorskip("tokenizers")
    t, (messages, more) = chats.tokenizer("qwen-2.5"), chats.CONVERSATIONS["called"]
    (example,) = chat.turns(t, messages, **more)
    parts = read_and_learned(t, example)
    assert "# Tools" in parts[0][1] and "<tool_call>" in parts[1][1] and parts[3] == (True, "It rains.<|im_end|>")


def test_marks_count_and_the_end_behind_them_is_learned_too():
    pytest.importorskip("tokenizers")
    source = chats.source("marked").replace(
        "{{- message.content + '<|im_end|>' }}\n        {%- endgeneration %}",
        "{{- message.content }}\n        {%- endgeneration %}{{- '<|im_end|>' }}",
    )
    assert source != chats.source("marked")
    inside, behind = chats.tokenizer("marked"), chats.tokenizer("marked", chat_template=source)
    messages = chats.talk("a", "b", "c", "d")
    assert chat.turns(inside, messages) == chat.turns(behind, messages)
    words = read_and_learned(inside, chat.turns(inside, messages)[0])
    assert [text for learned, text in words if learned] == ["b<|im_end|>", "d<|im_end|>"]


def test_an_assistant_that_speaks_first_or_twice():
    pytest.importorskip("tokenizers")
    t = chats.tokenizer("chatml")
    first = [{"role": "assistant", "content": "Welcome."}, *chats.talk("hi", "Hello.")]
    (example,) = chat.turns(t, [*first, {"role": "assistant", "content": "Again."}])
    learned = [text for is_learned, text in read_and_learned(t, example) if is_learned]
    assert learned == ["Welcome.<|im_end|>", "Hello.<|im_end|>", "Again.<|im_end|>"]
    silent = chats.tokenizer("chatml", chat_template="{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}")
    with pytest.raises(ValueError, match=r"template \(.*\) does not write what the assistant says in message 1"):
        chat.turns(silent, first)


@pytest.mark.parametrize("source", ["{{ 'a mill ' * 8000000 }}", "{% for i in range(99999) %}{{ i }} {% endfor %}"])
def test_a_template_that_writes_more_than_was_said_is_stopped(source):
    """What it writes would be encoded, which takes a hundred times as much memory."""
    pytest.importorskip("jinja2")
    said = [{"role": "user", "content": "hi"}]
    with pytest.raises(ValueError, match=r"here: the chat template needs more .* or writes more than 20 times the"):
        Template(source, "here").render(said)
    text, _ = Template("{{ messages[0].content * 15 }}", "here").render([{"role": "user", "content": "a" * 100_000}])
    assert len(text) == 1_500_000


# ------------------------------------------------------------------------------------------------------------------ conversations
def talking(window=200, name="chatml", seed=0):
    """A tiny model that knows turns."""
    pytest.importorskip("tokenizers")
    t = chats.tokenizer(name)
    backend.seed(seed)
    return Llama(replace(tiny.CONFIG, vocab_size=t.vocab_size, max_position_embeddings=window), t)


def had(model, *said, **options):
    """(the messages, what was shown) of a conversation in which the user says this and leaves."""
    lines, shown = iter(said), []

    def read():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    return chat.converse(model, read, shown.append, **options), "".join(shown)


def test_a_conversation_is_what_single_prompts_would_give():
    m = talking()
    messages, shown = had(m, "a mill", "", "why?", max_new_tokens=12, temperature=0, system="Be brief.")
    assert [x["role"] for x in messages] == ["system", "user", "assistant", "user", "assistant"]
    for i in (2, 4):
        prompt = m.tokenizer.chat_prompt(messages[:i])
        assert messages[i]["content"] == m.generate(prompt, 12, temperature=0, stop=chat.ends(m))
    assert shown == f"{messages[2]['content']}\n{messages[4]['content']}\n"


def test_what_was_said_is_not_read_again(monkeypatch):
    m, seen = talking(), []
    forward = m.forward
    monkeypatch.setattr(m, "forward", lambda ids, cache=None: (seen.append(ids.shape[1]), forward(ids, cache))[1])
    messages, _ = had(m, "a mill", "why?", max_new_tokens=6, temperature=0)
    first, second = (len(m.tokenizer.chat_prompt(messages[:n])) for n in (1, 3))
    assert seen[0] == first and seen.count(1) == len(seen) - 2, "two prompts, and one token at a time"
    assert max(seen[1:]) <= second - first, "of the second only what is new"
    m = talking(window=4000)  # beyond what was set aside at first, all is read anew
    messages, _ = had(m, "a", "b " * 700, "c", max_new_tokens=6, temperature=0)
    for i in (1, 3, 5):
        prompt = m.tokenizer.chat_prompt(messages[:i])
        assert messages[i]["content"] == m.generate(prompt, 6, temperature=0, stop=chat.ends(m))


def test_a_conversation_ends_and_begins_anew():
    m = talking()
    messages, shown = had(m, "one", "/reset", "two", "/exit", "three", max_new_tokens=4, system="Be brief.")
    assert [x["content"] for x in messages[:2]] == ["Be brief.", "two"] and len(messages) == 3
    assert "[the conversation begins anew]\n" in shown
    first, second = (had(m, "one", "one", max_new_tokens=8, temperature=1, seed=s)[0] for s in (3, 3))
    assert first == second and first != had(m, "one", "one", max_new_tokens=8, temperature=1, seed=4)[0]


def test_the_oldest_turns_are_dropped_and_it_is_said():
    m = talking(window=160)
    messages, shown = had(m, *(f"question {i}" for i in range(5)), max_new_tokens=20, system="S", temperature=1)
    assert shown.count("were dropped: the model reads 160 tokens at a time]") >= 1
    assert messages[0]["content"] == "S" and messages[-2]["content"] == "question 4" and len(messages) < 11
    assert messages[1]["role"] == "user", "an answer does not stand without its question"
    assert len(m.tokenizer.chat_prompt(messages[:-1])) + 20 <= 160
    messages, shown = had(m, "x" * 300, "short", max_new_tokens=20)
    assert "[this message takes" in shown and [x["content"] for x in messages[:1]] == ["short"]


@pytest.mark.parametrize(
    "words, text",
    [
        (["\u2581a", "\u2581b"], "a b"),
        (["\u2581", "c", "a", "d"], "cad"),
        (["\u2581", "\u2581a"], " a"),
        (["<s>", "\u2581", "<0xC3>", "<0xA9>", "</s>"], "é"),
        (["ab", "\u2581a"], "ab a"),
        (["<0xC3>"], "\ufffd"),
    ],
)
def test_the_space_before_a_sentencepiece_text_is_no_part_of_an_answer(words, text, monkeypatch):
    pytest.importorskip("tokenizers")
    from test_tokenizers import sentencepiece

    t = sentencepiece()
    t.settings["chat_template"] = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    m = Llama(replace(tiny.CONFIG, vocab_size=t.vocab_size, max_position_embeddings=99), t)
    ids = [t.backend.token_to_id(word) for word in words]
    monkeypatch.setattr(m, "stream", lambda *args, **options: iter(ids))
    messages, shown = had(m, "a", "b")
    assert [x["content"] for x in messages[1::2]] == [text] * 2 and shown == f"{text}\n" * 2


def test_half_a_surrogate_pair_is_named_where_it_was_typed():
    m, half = talking(), r"the text holds '\\udce9' at character 2: half of a surrogate pair, no character"
    messages, shown = had(m, "a", "ab\udce9", "\udce9" * 3, "b", max_new_tokens=4, system="Be brief.")
    assert [x["content"] for x in messages[1::2]] == ["a", "b"]
    assert "\n[" + half.replace("\\\\", "\\") + "]\n[the text holds" in shown
    for call in (m.tokenizer.chat_prompt, m.tokenizer.following, m.tokenizer.encode):
        with pytest.raises(ValueError, match=half):
            call("ab\udce9")


def test_an_answer_can_be_interrupted():
    m = talking()
    pieces = m.tokenizer.pieces

    def interrupted(tokens):
        yield from itertools.islice(pieces(tokens), 3)
        raise KeyboardInterrupt

    m.tokenizer.pieces = interrupted
    messages, shown = had(m, "a", max_new_tokens=9, temperature=1)
    assert len(messages) == 2 and shown.endswith("\n")
    m.tokenizer.pieces = pieces
    again, _ = had(m, "a", max_new_tokens=9, temperature=1)
    assert again[1]["content"].startswith(messages[1]["content"]) and again != messages


def test_a_model_without_turns_does_not_converse():
    with pytest.raises(ValueError, match="the model knows no turns"):
        chat.converse(tiny.model(), builtins.input, print)
    assert chat.ends(tiny.model(eos_token_id=7)) == (7,) and chat.ends(tiny.model(eos_token_id=(7, 9))) == (7, 9)
