"""Whatever is read is damaged first: the reader finds the same, or something else that is whole, or says in a sentence what is wrong.

Nothing else may happen: no error of Python's own, no work without end (20 s), no memory beyond what the file takes twice, no crash, and no
number that is not finite in what a model answers. Each reader runs in a forked process under a limit of memory, many damaged files in
one; a process that ends or hangs is charged to the file that it was reading, and the next one goes on behind it.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import llm_files
import mutations
import numpy as np
import pytest
import tiny
from injector import Fault, Process, forked
from operations import model

from tinylora import Llama, adapters, backend, quantize_linears
from tinylora.interop import bitsandbytes, gguf, loralib, peft
from tinylora.models import eightbit, files, safetensors
from tinylora.models.tokenizers import ByteTokenizer, load_tokenizer
from tinylora.tensor import no_grad
from tinylora.training import finetune
from tinylora.training.corpus import read_corpus, running_text
from tinylora.training.train import Recipe, fit

DEADLINE, MARGIN = 20, 64 << 20  # seconds for one file; bytes of memory beside twice its size


class NotFinite(Exception):
    """A model answered with NaN or infinity, and nothing had been said."""


@dataclass(frozen=True)
class Subject:
    """A format: `make(folder)` writes it, `read(folder)` reads all of it and returns what it found, `files` is how each is damaged."""

    make: object
    read: object
    files: dict
    share: float = 1.0
    needs: tuple = ()
    places: tuple = mutations.PLACES


# --------------------------------------------------------------------------------------------------------------------- what is read
IDS = np.arange(12)[None] * 7


def answers(m):
    """A digest of a model's logits, and what follows greedily."""
    ids = IDS[:, : m.config.positions] % m.config.vocab_size
    said = m.eval().generate(ids[0].tolist(), max_new_tokens=2, temperature=0)
    with no_grad():
        z = m(ids).data
    if not np.isfinite(z[:, -1]).all():
        raise NotFinite("the logits are not finite, and generate says nothing of it")
    return hashlib.sha256(z.tobytes()).hexdigest()[:16], said


def opened(folder):
    m = Llama.from_pretrained(folder)
    return answers(m), m.tokenizer.encode("the fox"), str(m.config)


def model_folder(folder):
    model(2).save_pretrained(folder)
    files.write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 3]})


def sharded(folder):
    m = model(2, num_hidden_layers=2)
    tensors, where = {n: p.data for n, p in m.named_parameters()}, {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        name = f"model-{i:05}-of-00002.safetensors"
        safetensors.save_safetensors(folder / name, {n: tensors[n] for n in names})
        where |= dict.fromkeys(names, name)
    files.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": where})
    files.write_json(folder / "config.json", m.config.to_dict())


def vocabulary(folder):
    m = model(2, vocab_size=320)
    m.tokenizer = llm_files.trained()
    m.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(llm_files.TEMPLATE)
    files.write_json(
        folder / "special_tokens_map.json", {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}}
    )
    files.write_json(folder / "added_tokens.json", {"<|im_end|>": 2})


def read_vocabulary(folder):
    tokenizer = load_tokenizer(folder, 320)
    ids = tokenizer.encode(llm_files.TEXT[1])
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "?"}]
    asked = tokenizer.chat_prompt(talk, system="be kind") if tokenizer.chats else None
    return ids, tokenizer.decode(ids), asked


def few_bits(code, folder):
    bitsandbytes.save(quantize_linears(model(2, hidden_size=64, intermediate_size=64), code=code), folder)


def adapter(folder):
    m = model(3)
    adapters.add_lora(
        m, r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 5}
    )
    tiny.randomize_lora(m, np.random.default_rng(0))
    peft.save_adapter(m, folder, base_model="base")


def read_adapter(folder):
    base = peft.read_base(folder)
    base.find()
    m = peft.load_adapter(model(3), folder)
    return answers(m), str(peft.read_config(folder))


def gguf_model(folder):
    llm_files.write_gguf(folder / "m.gguf", model(2, vocab_size=320), ("F32", "Q8_0"), tokenizer=llm_files.trained(320))


def read_gguf(folder):
    m = Llama.from_pretrained(folder / "m.gguf")
    return answers(m), m.tokenizer.encode("the fox"), str(m.config)


def gguf_adapter(folder):
    m = adapters.add_lora(model(3), r=2, target_modules=["q_proj", "v_proj"])
    gguf.save_adapter(tiny.randomize_lora(m, np.random.default_rng(0)), folder / "a.gguf")


def read_gguf_adapter(folder):
    gguf.read_base(folder / "a.gguf")
    return answers(gguf.load_adapter(model(3), folder / "a.gguf"))


def checkpoint(folder):
    return trained(folder)


def trained(folder):
    """Train two steps, or go on from the checkpoint behind the second one."""
    m, recipe = model(3), Recipe(steps=2, batch_size=2, seq_len=16, warmup=0, shards=1)
    text = running_text(b"the quick brown fox jumps over the lazy dog. " * 20, ByteTokenizer())
    result = fit(m, text, recipe, out=folder, checkpoint_every=1, about={"job": {"a": 1}}, progress=False)
    return answers(m), result.history, result.tape_bytes


JOB = finetune.Job(r=2, heldout=1)
RECIPE = Recipe(steps=1, batch_size=1, seq_len=16, warmup=0, shards=1)


def run_folder(folder):
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    model(3).save_pretrained(folder / "model")
    finetune.finetune(_job(folder), RECIPE, folder / "run", progress=False, trace=True)


def _job(folder):
    return replace(JOB, model=str(folder / "model"), text=str(folder / "text.txt"), page_budget=2048, page_bytes=1024)


def read_report(folder):
    report = finetune.finished(_job(folder), RECIPE, folder / "run")
    return None if report is None else finetune.describe(report)


def read_trace(folder):
    return finetune.read_trace(folder / "run")


CHAT = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}", "weight": 1}]}
    for i in range(20)
]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
RECORDS = {
    "data.jsonl": "\n".join(json.dumps({"prompt": f"what is {i}?", "completion": f"it is {i}"}) for i in range(20)),
    "chats.jsonl": "\n".join(map(json.dumps, CHAT)),
    "alpaca.json": json.dumps([{"instruction": f"say {i}", "input": "", "output": f"{i}"} for i in range(20)]),
    "shares.json": json.dumps({"data": [{"conversations": SHARED}] * 20}),
    "data.txt": "the quick brown fox jumps over the lazy dog. \n\n" * 20,
}  # fmt: skip


def data_files(folder):
    for name, text in RECORDS.items():
        (folder / name).write_text(text)


def read_data(folder):
    found = []
    for name in RECORDS:
        for part in read_corpus(folder / name, tiny.Turns()):
            found += [a.tobytes() for a in part.windows(16)]
    return hashlib.sha256(b"".join(found)).hexdigest()


def _loralib():
    backend.seed(0)
    return (
        loralib.Linear(6, 4, r=2),
        loralib.MergedLinear(4, 8, r=2, enable_lora=[True, False]),
        loralib.Embedding(5, 3, r=2),
    )


def loralib_file(folder):
    state = {f"{i}.{n}": w for i, m in enumerate(_loralib()) for n, w in loralib.lora_state_dict(m).items()}
    safetensors.save_safetensors(folder / "lora.safetensors", state)


def read_loralib(folder):
    state, _ = safetensors.load_safetensors(folder / "lora.safetensors")
    digest = hashlib.sha256()
    for i, m in enumerate(_loralib()):
        own = {n.partition(".")[2]: w for n, w in state.items() if n.startswith(f"{i}.")}
        m.load_state_dict(own, strict=False)
        digest.update(b"".join(np.ascontiguousarray(w.data).tobytes() for _, w in m.named_weights()))
    return digest.hexdigest()


def of_file(mutate):
    """A way to damage a JSON file as JSON."""
    return lambda data, rng, others=(): mutate(json.loads(data), rng)


JSON = of_file(mutations.of_json)
WEIGHTS, GGUF_FILE, BYTES = mutations.of_safetensors, mutations.of_gguf, mutations.of_bytes
TEMPLATES = [
    *("{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**10 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    *("{% include '/etc/passwd' %}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    *("{{ range(10**8)|list }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "<|im_start|>system\n" * 5000, "{{ 10**10**8 }}"),
    *("{{ (messages|tojson) * 100000000 }}", "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "{% if " + "not " * 20000 + "x %}{% endif %}"),
    "{% set x = namespace(a=[1]) %}{% for i in range(9999) %}{% set x.a = x.a + x.a %}{% endfor %}",
    *("{{ raise_exception('no') }}", "{{ '%0999999999d' % 1 }}", "{{ 'x'|center(10**10) }}", "{{ 'a'.ljust(10**10) }}", "{{"),
    *("{{ '{0:1000000000}'.format(1) }}", "{{ [1] * 10**9 }}", "{{ lipsum(10**6) }}", "{{ messages[99].content }}", "{% for %}", "\ud83d"),
    *("{{ strftime_now('%9999999d') }}", "{{ messages[0].content.__init__.__globals__ }}", "{{ 'a' ~ 1/0 }}", "{{ x.y.z }}", ""),
]  # fmt: skip


def of_template(data, rng, others=()):
    if rng.random() < 0.4:
        return BYTES(data, rng, others)
    text = mutations._pick(rng, TEMPLATES)
    return text.encode("utf-8", "surrogatepass"), f"template {text[:60]!r}"


MODEL = {"config.json": JSON, "model.safetensors": WEIGHTS}
SUBJECTS = {
    "model folder": Subject(model_folder, opened, {**MODEL, "generation_config.json": JSON}, 2),
    "sharded folder": Subject(
        sharded, opened, {"model.safetensors.index.json": JSON, "model-00001-of-00002.safetensors": WEIGHTS}
    ),
    "vocabulary": Subject(
        vocabulary,
        read_vocabulary,
        {
            "tokenizer.json": JSON,
            "tokenizer_config.json": JSON,
            "chat_template.jinja": of_template,
            "special_tokens_map.json": JSON,
            "added_tokens.json": JSON,
        },
        2,
        needs=("tokenizers", "jinja2"),
    ),
    "4-bit folder": Subject(partial(few_bits, "nf4"), opened, MODEL),
    "8-bit folder": Subject(partial(few_bits, eightbit.CODE), opened, MODEL),
    "adapter": Subject(adapter, read_adapter, {"adapter_config.json": JSON, "adapter_model.safetensors": WEIGHTS}, 2),
    "GGUF model": Subject(gguf_model, read_gguf, {"m.gguf": GGUF_FILE}, 1, needs=("gguf", "tokenizers")),
    "GGUF LoRA": Subject(gguf_adapter, read_gguf_adapter, {"a.gguf": GGUF_FILE}, 1, needs=("gguf",)),
    "checkpoint": Subject(checkpoint, trained, {"checkpoint.safetensors": WEIGHTS}, 0.5),
    "report": Subject(run_folder, read_report, {"run/report.json": JSON}, 1),
    "paging.csv": Subject(run_folder, read_trace, {"run/paging.csv": mutations.of_cells}, 0.5),
    "data files": Subject(
        data_files,
        read_data,
        {
            "data.jsonl": mutations.of_lines,
            "chats.jsonl": mutations.of_lines,
            "alpaca.json": JSON,
            "shares.json": JSON,
            "data.txt": BYTES,
        },
        2,
        places=mutations.PLACES[:-1],  # a large text takes memory
    ),
    "loralib file": Subject(loralib_file, read_loralib, {"lora.safetensors": WEIGHTS}, 0.5),
}


LAYERS = re.compile(r"model\.(layers|embed)|lora_[AB]|modules_to_save|another base|--model")
NAMES = re.compile(r"[\w-]+\.(json|safetensors|gguf|csv|jinja|txt|jsonl)\b")


# ------------------------------------------------------------------------------------------------------------------- how it is read
class Reader:
    """Reads damaged files in forked processes, and says how each reading ended."""

    def __init__(self, subject, folder, seed):
        self.subject, self.root, self.before, self.seed = subject, folder / "work", folder / "before", seed
        self.root.mkdir()
        subject.make(self.root)
        shutil.copytree(self.root, self.before)
        self.whole = self.read()
        assert self.whole == self.read(), "reading it twice gives two results"
        self.others = [p.read_bytes() for p in sorted(self.root.rglob("*")) if p.is_file()]
        self.keys = [key for p in self.root.rglob("*.gguf") for key in _keys(p)]

    def read(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.subject.read(self.root)

    def damage(self, i):
        """(file, what was done) of the damage of this number, which is done."""
        rng = np.random.default_rng([*self.seed, i])
        places = [(name, place) for name in self.subject.files for place in self.subject.places]
        if i < len(places):
            name, what = places[i]
            mutations.put(self.root / name, what)
            return name, what
        name = list(self.subject.files)[i % len(self.subject.files)]
        options = {"keys": self.keys} if name.endswith(".gguf") else {}
        data, what = self.subject.files[name]((self.before / name).read_bytes(), rng, others=self.others, **options)
        (self.root / name).write_bytes(data)
        return name, what

    def restore(self, name):
        path = self.root / name
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        shutil.copyfile(self.before / name, path)

    def all(self, numbers):
        """(number, file, what was done, how it ended, details) of each."""
        numbers = list(numbers)
        while numbers:
            process, i, told = Process(self._many(numbers), before=_limit), None, None
            try:
                for told in process.lines(DEADLINE + 10):
                    if "end" in told:
                        yield told["i"], told["file"], told["what"], told["end"], told["text"]
                        numbers.remove(told["i"])
                        i = None
                    elif "i" in told:
                        i = told["i"]
                end = "crashes"
            except TimeoutError:
                end = "hangs"
            process.send(signal.SIGKILL)
            os.close(process.reader)
            status = os.waitstatus_to_exitcode(os.waitpid(process.id, 0)[1])
            if numbers and i is None:
                raise RuntimeError(f"the reading process ended with {status} between two files: {told}")
            if numbers:
                self.restore_all()
                name, what = self.damage(i)
                self.restore_all()
                yield i, name, what, end, f"signal {-status}"
                numbers = numbers[numbers.index(i) + 1 :]

    def restore_all(self):
        for name in self.subject.files:
            self.restore(name)

    def _many(self, numbers):
        def run(tell):
            for i in numbers:
                tell(i=i)
                name, what = self.damage(i)
                size = 0 if not (self.root / name).is_file() else (self.root / name).stat().st_size
                _forget_peak()
                before = _peak()
                end, text = self._end(name)
                taken = _peak() - before
                if end in ("same", "another", "sentences") and taken > 2 * min(size, 1 << 30) + MARGIN:
                    end, text = "memory", f"{taken >> 20} MB for a file of {size} bytes"
                self.restore(name)
                tell(i=i, file=name, what=what, end=end, text=text)

        run.tells = True
        return run

    def _end(self, name):
        """(how reading it ended, what it said)"""
        try:
            found = self.read()
        except (ValueError, OSError) as error:
            said = str(error)
            parts = str(self.root) in said and LAYERS.search(
                said
            )  # of two files of the folder that do not fit each other
            beyond = "NaN" in said or "Inf" in said  # what overflows in a model is no longer of one file
            named = parts or beyond or NAMES.search(said)
            return "sentences" if named else "unnamed", f"{type(error).__name__}: {error}"
        except MemoryError as error:
            return "memory", str(error)
        except NotFinite as error:
            return "NaN", str(error)
        except BaseException as error:
            at = error.__traceback__
            while at.tb_next is not None:
                at = at.tb_next
            return "tracebacks", f"{type(error).__name__}: {error} ({at.tb_frame.f_code.co_filename}:{at.tb_lineno})"
        return ("same" if found == self.whole else "another"), ""


def _keys(path):
    """The names of the entries in a GGUF's header."""
    import gguf as package

    return [key for key in package.GGUFReader(path).fields if not key.startswith("GGUF.")]


def _limit():
    """No more memory than now and a little more: 1 GB of addresses, of which the threads of BLAS take most."""
    warnings.simplefilter("ignore")
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _forget_peak():
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak():
    """The largest resident set since `_forget_peak`, in bytes; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_damaged_file_is_read_whole_or_refused_by_name(name, many, request, count, tmp_path):
    subject = SUBJECTS[name]
    if missing := [package for package in subject.needs if importlib.util.find_spec(package) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    reader = Reader(subject, tmp_path, [request.config.getoption("faults_seed"), *name.encode()])
    some = many(subject.share / 6, least=len(subject.places) * len(subject.files) + 3)
    problems = []
    for i, file, what, end, text in reader.all(range(some)):
        count("reading: " + name, end)
        if end not in ("same", "another", "sentences"):
            problems.append(f"{i}: {file}, {what}: {end}, {text:.300}")
    assert not problems, f"{len(problems)} of {some} files:\n" + "\n".join(problems)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_read_that_fails_is_said_by_name(name, many, draw, count, tmp_path):
    """EIO from the system, at each open and each read of what is read."""
    subject = SUBJECTS[name]
    if missing := [package for package in subject.needs if importlib.util.find_spec(package) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    reader, problems = Reader(subject, tmp_path, [0]), []
    calls = forked(lambda: reader.read() and None, reader.root, reads=True).calls
    reading = [at for at, (call, _) in enumerate(calls) if call in ("open", "read")]
    assert reading
    for at in draw.choice(reading, min(many(1 / 50, least=2), len(reading)), replace=False):
        found = forked(lambda: reader.read() and None, reader.root, Fault(int(at), "EIO"), reads=True)
        said = found.ended == "raised" and "OSError" in found.error and NAMES.search(found.value)
        count("read errors: " + name, "sentences" if said else "tracebacks" if found.ended == "raised" else "crashes")
        if not said:
            problems.append(f"at {found.fired}: {found.ended}, {found.error[:1]} {found.value}")
    assert not problems, "\n".join(problems)
