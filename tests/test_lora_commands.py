"""switch, ranks, merge, count, experiments: what they print, write, resume and refuse."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny

from tinylora import adapters, data, quantize_linears
from tinylora.cli import main
from tinylora.interop import bitsandbytes, peft
from tinylora.models import chat, safetensors
from tinylora.models.llama import Llama
from tinylora.papers import ranks, switching

QUICK = ["--batch-size", "2", "--seq-len", "32", "--warmup", "2", "--steps", "3"]


@pytest.fixture
def folder(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model", dtype="float32")
    for name, word in (("one", "spam "), ("two", "eggs ")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{word * 20}{i}" for i in range(60)))
    return tmp_path


def switch(folder, *more):
    texts = [str(folder / "one.txt"), str(folder / "two.txt")]
    command = ["switch", "--model", str(folder / "model"), "--texts", *texts, "--out", str(folder / "out")]
    return main([*command, *QUICK, "-r", "2", "--max-new-tokens", "5", *more])


def test_switch_prints_scores_pieces_and_the_price_of_each_way(folder, capsys, monkeypatch):
    assert switch(folder, "--pieces", "3") == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^--- (\w+)", printed, re.M) == ["one", "two", "one"]
    for row in ("base", "one", "two"):
        assert re.search(rf"^{row} +\d+\.\d{{4}} +\d+\.\d{{4}}$", printed, re.M)
    adapter = peft.read_adapter(folder / "out" / "two" / "adapter")
    moved = {way: int(n.replace(",", "")) for way, n in re.findall(r"^(\S.*?)  +([\d,]+)(?: |$)", printed, re.M)}
    assert moved["set_adapter, both on the base"] == 0 and moved["A and B read from disk"] == adapter.nbytes
    assert moved["merged anew, W₀ + s B A"] < moved["a whole fine-tuned model"]
    assert "the base's bits are unchanged" in printed
    error = float(re.search(r"largest difference (\S+)$", printed, re.M)[1])
    assert error < 1e-4
    # the adapters are there: only the switching is done again
    monkeypatch.setattr("tinylora.training.finetune.fit", None)
    assert switch(folder, "--prompts", "x", "y") == 0
    pieces = re.findall(r"^--- (\w+)", capsys.readouterr().out, re.M)
    assert pieces == ["one", "two", "one", "two"]


def test_two_adapters_predict_their_own_texts_best(folder):
    texts = {name: folder / f"{name}.txt" for name in ("one", "two")}
    job = switching.replace(switching.JOB, model=str(folder / "model"), r=2)
    recipe = switching.replace(switching.RECIPE, batch_size=4, seq_len=32, steps=40, lr=1e-2)
    folders = switching.train(texts, folder / "out", job, recipe, progress=False)
    shown = switching.demonstrate(texts, folders, job, recipe, tokens=2, pieces=1, progress=False)
    for mine, other in (("one", "two"), ("two", "one")):
        assert shown.scores[mine, mine] < min(shown.scores[other, mine], shown.scores["base", mine])


def test_a_base_that_changed_while_switching_is_said(folder, monkeypatch):
    monkeypatch.setattr(switching, "_restored", lambda model: model.model.norm.weight.data.__imul__(2) is None)
    assert switch(folder) == 2


def test_the_fingerprint_sees_every_part_of_a_4_bit_weight():
    import tinylora as tl

    m = tl.quantize_linears(tiny.model())
    seen = {switching.fingerprint(m)}
    q = m.model.layers[0].mlp.up_proj.weight
    for array in (q.packed, q.absmax_codes, m.model.norm.weight.data):
        array.reshape(-1)[0] += 1
        seen.add(switching.fingerprint(m))
    assert len(seen) == 4


def test_switch_wants_two_names(folder, capsys):
    (folder / "sub").mkdir()
    (folder / "sub" / "one.txt").write_text("x" * 2000)
    texts = [str(folder / "one.txt"), str(folder / "sub" / "one.txt")]
    assert main(["switch", "--model", str(folder / "model"), "--texts", *texts, "--out", str(folder / "out")]) == 2
    assert "which need two names, neither of them 'base'" in capsys.readouterr().err


def test_own_source_is_the_frozen_text_to_the_byte(tmp_path):
    path = switching.own_source(tmp_path)
    assert path.read_bytes() == data.source()
    text = path.read_text(encoding="utf-8")
    assert "def own_source(folder):" in text and "class LoRALinear(LoRALayer):" in text and len(text) > 300_000


def test_ranks_prints_one_line_a_rank_and_reads_finished_runs(folder, capsys, monkeypatch):
    command = ["ranks", "--model", str(folder / "model"), "--text", str(folder / "one.txt"), *QUICK]
    command += ["-r", "1", "2", "--seeds", "0", "1", "--out", str(folder / "ranks")]
    assert main(command) == 0
    first = capsys.readouterr().out
    for label in ranks.TARGETS:
        assert f"\n{label}\n" in first
    assert len(re.findall(r"r = [12] +\d\.\d{4} ± \d\.\d{4}   \([\d,]+\)", first)) == 4
    c = tiny.CONFIG
    qv = c.num_hidden_layers * (c.hidden_size * 2 + c.hidden_size + c.num_key_value_heads * c.head_dim)
    assert f"({qv:,})" in first and f"({2 * qv:,})" in first
    assert (folder / "ranks" / "ranks.svg").is_file()
    monkeypatch.setattr("tinylora.training.finetune.fit", None)
    assert main(command) == 0
    assert capsys.readouterr().out == first


def test_merge_into_a_dense_base(folder, capsys, rng):
    m = tiny.randomize_lora(adapters.add_lora(Llama.from_pretrained(folder / "model"), r=2), rng)
    peft.save_adapter(m, folder / "adapter")
    command = ["merge", "--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--out"]
    assert main([*command, str(folder / "merged")]) == 0
    assert "error of merging" not in capsys.readouterr().out
    x = tiny.ids(rng, 1, 9)
    np.testing.assert_allclose(
        tiny.logits(Llama.from_pretrained(folder / "merged"), x), tiny.logits(m, x), rtol=1e-3, atol=1e-4
    )


def test_merge_into_4_bits_prints_what_it_costs(folder, capsys, rng):
    m = tiny.randomize_lora(adapters.add_lora(Llama.from_pretrained(folder / "model"), r=2), rng)
    peft.save_adapter(m, folder / "adapter")
    command = ["merge", "--model", str(folder / "model"), "--adapter", str(folder / "adapter")]
    assert main([*command, "--quantize", "nf4", "--out", str(folder / "merged")]) == 0
    printed = capsys.readouterr().out
    errors = re.findall(r"^  (model\.layers\S+) +(0\.\d{4})$", printed, re.M)
    assert len(errors) == 14 and re.search(r"^  mean +0\.\d{4}$", printed, re.M)
    assert all(0.02 < float(e) < 0.3 for _, e in errors)
    again = Llama.from_pretrained(folder / "merged")
    assert len(adapters.merge_errors(again)) == 0 and again.model.layers[0].mlp.up_proj.weight.code_name == "nf4"


@pytest.fixture
def trained(folder, rng):
    """`folder` with an adapter that was trained on its model in NF4, blocks of 32; returns (folder, the model with the adapter)."""
    m = Llama.from_pretrained(folder / "model", quantize={"code": "nf4", "blocksize": 32})
    m = tiny.randomize_lora(adapters.add_lora(m, r=2), rng)
    peft.save_adapter(m, folder / "adapter", base_model=str(folder / "model"))
    return folder, m.eval()


def merged(folder, *more, adapter="adapter"):
    """What `merge` makes, opened; AssertionError if it fails."""
    more = [*map(str, more), *([] if "--model" in more else ["--model", str(folder / "model")])]
    assert main(["merge", "--adapter", str(folder / adapter), "--out", str(folder / "merged"), *more]) == 0
    return Llama.from_pretrained(folder / "merged")


def test_a_merge_asks_for_the_name_of_its_base(trained, capsys):
    """It is for good; only the embedded model need not be named."""
    folder, _ = trained
    assert main(["merge", "--adapter", str(folder / "adapter"), "--out", str(folder / "merged")]) == 2
    assert f"name its base: --model {folder / 'model'}" in capsys.readouterr().err and not (folder / "merged").exists()


def test_an_adapter_goes_on_the_base_that_it_names(trained, capsys, rng):
    folder, m = trained
    x = tiny.ids(rng, 1, 9)
    again = merged(folder)
    assert capsys.readouterr().err == "" and not again.config.to_dict().get("quantization_config")
    np.testing.assert_allclose(
        tiny.logits(again, x), tiny.logits(m, x), rtol=1e-4, atol=1e-5
    )  # W = dequantized + s B A
    for layer in (m.model.layers[0].mlp.up_proj, m.model.layers[1].self_attn.k_proj):
        path = next(path for path, wrapped in adapters.lora_layers(m) if wrapped is layer)
        assert again.get(path).weight.data.tobytes() == (layer.base_layer.dense() + layer.delta()).tobytes()
    written = generated(capsys, "--adapter", folder / "adapter")
    assert written == "x" + m.generate("x", 12, temperature=0) + "\n"
    assert generated(capsys, "--adapter", folder / "adapter", "--model", folder / "model") == written


def generated(capsys, *more, prompt="x"):
    """What `generate` prints, greedily; AssertionError if it says anything beside it."""
    capsys.readouterr()
    command = ["generate", "--prompt", prompt, "--max-new-tokens", "12", "--temperature", "0"]
    assert main([*command, *map(str, more)]) == 0
    written, said = capsys.readouterr()
    assert said == ""
    return written


def test_merge_into_the_dense_base_says_that_it_was_trained_otherwise(trained, capsys, rng):
    folder, m = trained
    x = tiny.ids(rng, 1, 9)
    dense = merged(folder, "--quantize", "none")
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 1
        and "was trained on this base in nf4 (blocks of 32, double quantization), and here it is held in float32"
        in said[0]
    )
    with pytest.warns(UserWarning, match="was trained on this base in nf4"):
        wanted = peft.load_adapter(Llama.from_pretrained(folder / "model"), folder / "adapter")
    np.testing.assert_allclose(tiny.logits(dense, x), tiny.logits(wanted, x), rtol=1e-4, atol=1e-5)
    assert np.abs(tiny.logits(dense, x) - tiny.logits(m, x)).max() > 1e-2


def test_the_block_size_is_the_adapters_unless_another_is_given(trained, capsys, rng):
    folder, _ = trained
    assert merged(folder, "--quantize", "nf4").model.layers[0].mlp.up_proj.weight.blocksize == 32
    assert "error of merging into 4 bits" in capsys.readouterr().out
    assert merged(folder, "--quantize", "nf4", "--blocksize", 64).model.layers[0].mlp.up_proj.weight.blocksize == 64
    assert "here it is held in nf4 (blocks of 64, double quantization)" in capsys.readouterr().err
    assert generated(capsys, "--adapter", folder / "adapter", "--quantize", "nf4") == generated(
        capsys, "--adapter", folder / "adapter"
    )
    main(["generate", "--adapter", str(folder / "adapter"), "--blocksize", "128", "--max-new-tokens", "1"])
    assert "(blocks of 128, double quantization)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--quantize", "nf4", "--dtype", "bfloat16", "--out", "merged"], "--dtype bfloat16 is for a dense file"),
        (["--model", "model", "--out", "model"], "would overwrite its source"),
    ],
)
def test_a_merge_that_would_lose_something_is_refused(arguments, words, trained, capsys, monkeypatch):
    folder, _ = trained
    before = (folder / "model" / "model.safetensors").read_bytes()
    monkeypatch.chdir(folder)
    assert main(["merge", "--adapter", "adapter", *arguments]) == 2
    assert words in capsys.readouterr().err and not (folder / "merged").exists()
    assert (folder / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("command", ["generate", "merge"])
def test_another_base_is_refused_by_the_commands_and_force_puts_it_there(command, trained, capsys):
    folder, _ = trained
    tiny.model(seed=1).save_pretrained(folder / "other")
    more = {"generate": ["--max-new-tokens", "1"], "merge": ["--out", str(folder / "merged")]}[command]
    arguments = [command, "--adapter", str(folder / "adapter"), "--model", str(folder / "other"), *more]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"was trained on another base ({folder / 'model'})" in said and "--force" in said
    assert not (folder / "merged").exists()
    assert main([*arguments, "--force"]) == 0
    assert main([*arguments[:3], "--model", str(folder / "nowhere"), *more]) == 2


def test_a_base_that_is_not_here_is_named(trained, capsys):
    folder, _ = trained
    (folder / "model").rename(folder / "moved")
    for more in (["generate", "--max-new-tokens", "1"], ["merge", "--out", str(folder / "merged")]):
        assert main([*more, "--adapter", str(folder / "adapter")]) == 2
        said = capsys.readouterr().err
        assert (
            f"was trained on '{folder / 'model'}', which is no folder or file here; give the base with --model" in said
        )
        assert main([*more, "--adapter", str(folder / "adapter"), "--model", str(folder / "moved")]) == 0
    peft.save_adapter(adapters.add_lora(Llama.from_pretrained(folder / "moved"), r=2), folder / "unnamed")
    assert main(["generate", "--adapter", str(folder / "unnamed")]) == 2
    assert "unnamed does not name its base; give the base with --model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/an/environment/that/is/gone", None])
def test_the_embedded_model_is_known_wherever_it_lay(name, folder, capsys, rng):
    m = tiny.randomize_lora(adapters.add_lora(Llama.from_pretrained("base", quantize="fp4"), r=2), rng)
    peft.save_adapter(m, folder / "adapter", base_model=name)
    assert generated(capsys, "--adapter", folder / "adapter") == "x" + m.eval().generate("x", 12, temperature=0) + "\n"


def test_a_base_in_4_bits_is_merged_dense_or_into_its_code(folder, capsys, rng):
    bitsandbytes.save(quantize_linears(tiny.model(), "fp4", 128), folder / "four")
    m = tiny.randomize_lora(adapters.add_lora(Llama.from_pretrained(folder / "four"), r=2), rng).eval()
    peft.save_adapter(m, folder / "adapter", base_model=str(folder / "four"))
    x = tiny.ids(rng, 1, 9)
    model = ["--model", str(folder / "four")]
    np.testing.assert_allclose(tiny.logits(merged(folder, *model), x), tiny.logits(m, x), rtol=1e-4, atol=1e-5)
    assert merged(folder, "--quantize", "fp4", *model).model.layers[0].mlp.up_proj.weight.blocksize == 128
    adapter = ["--adapter", str(folder / "adapter")]
    for arguments, words in (
        (
            ["merge", "--out", str(folder / "x"), "--quantize", "nf4"],
            "the base is stored in fp4 already, and merging keeps that: --quantize nf4 cannot; leave it out for a dense",
        ),
        (
            ["merge", "--out", str(folder / "x"), "--quantize", "none"],
            "four is in few bits and has no dense weights; leave --quantize out",
        ),
        (["generate", "--quantize", "fp4"], "four is in 4 bits already; leave --quantize out"),
        (["generate", "--blocksize", "64"], "four is in few bits already, in blocks of its own; leave --blocksize out"),
    ):
        assert main([*arguments, *adapter, *model]) == 2
        assert words in capsys.readouterr().err
    assert not (folder / "x").exists()


def test_a_base_in_8_bits_is_called_as_the_option_is(folder, capsys, rng):
    bitsandbytes.save(quantize_linears(tiny.model(), "int8_vectorwise"), folder / "eight")
    m = tiny.randomize_lora(adapters.add_lora(Llama.from_pretrained(folder / "eight"), r=2), rng)
    peft.save_adapter(m, folder / "adapter", base_model=str(folder / "eight"))
    words = [
        "merge",
        "--adapter",
        str(folder / "adapter"),
        "--model",
        str(folder / "eight"),
        "--out",
        str(folder / "x"),
    ]
    assert main([*words, "--quantize", "nf4"]) == 2
    assert "the base is stored in int8 already" in capsys.readouterr().err and not (folder / "x").exists()
    assert main([*words, "--quantize", "int8"]) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--blocksize", "32"], "--blocksize 32: the base is held in float32, without blocks"),
        (["--quantize", "none", "--blocksize", "32"], "--blocksize 32: the base is held in float32, without blocks"),
        (["--weights", "1"], "--weights is for several adapters"),
        (["--adapter", "one", "--weights", "0.5"], "--weights is for several adapters"),
        (["--adapter", "one", "--weights", "0.5", "0.5"], "--weights is for several adapters"),
        (["--force"], "--force is for an adapter"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(arguments, words, folder, capsys):
    assert main(["generate", "--model", str(folder / "model"), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_several_adapters_add_up_and_may_be_weighted(folder, capsys, rng):
    models = {}
    for name in ("one", "two"):
        m = adapters.add_lora(Llama.from_pretrained(folder / "model"), r=2, target_modules=["q_proj", "up_proj"])
        models[name] = tiny.randomize_lora(m, rng)
        peft.save_adapter(m, folder / name, base_model=str(folder / "model"))
    both = peft.load_adapter(Llama.from_pretrained(folder / "model"), folder / "one", "a")
    peft.load_adapter(both, folder / "two", "b")
    adapters.set_adapter(both, ["a", "b"])
    added = "x" + both.eval().generate("x", 12, temperature=0) + "\n"
    assert generated(capsys, "--adapter", folder / "one", folder / "two") == added
    assert generated(capsys, "--adapter", folder / "one", "--adapter", folder / "two") == added
    adapters.add_weighted_adapter(both, ["a", "b"], [1.5, -0.5], "c", "cat")
    adapters.set_adapter(both, "c")
    weighted = "x" + both.generate("x", 12, temperature=0) + "\n"
    command = ["--adapter", folder / "one", folder / "two", "--weights"]
    assert generated(capsys, *command, "1.5", "-0.5") == weighted
    assert main(["generate", *map(str, command), "1"]) == 2
    assert "--weights: 1 numbers for 2 adapters" in capsys.readouterr().err


def test_adapters_of_different_bases_or_holdings_are_not_added_up(trained, capsys):
    folder, _ = trained
    tiny.model(seed=1).save_pretrained(folder / "other")
    for name, base, options in (("b", "other", {}), ("c", "model", {}), ("d", "model", {"code": "nf4"})):
        m = Llama.from_pretrained(folder / base, quantize=options or None)
        peft.save_adapter(adapters.add_lora(m, r=2), folder / name, base_model=str(folder / base))

    def said(*names):
        assert main(["generate", "--max-new-tokens", "1", "--adapter", *(str(folder / name) for name in names)]) == 2
        return capsys.readouterr().err

    assert f"have different bases, {folder / 'model'} and {folder / 'other'}" in said("adapter", "b")
    words = "was trained on a base in nf4 (blocks of 32, double quantization), and"
    assert words in said("adapter", "c") and "on one in float32; choose with --quantize" in said("adapter", "c")
    assert "on one in nf4 (blocks of 64, double quantization)" in said("adapter", "d")
    command = [
        "generate",
        "--max-new-tokens",
        "1",
        "--adapter",
        str(folder / "c"),
        str(folder / "d"),
        "--quantize",
        "nf4",
    ]
    assert main(command) == 0


def test_an_adapter_without_a_description_is_used_and_this_is_said_once(trained, capsys, rng):
    folder, _ = trained
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = {name: w.copy() for name, w in safetensors.load_safetensors(path)[0].items()}
    safetensors.save_safetensors(path, tensors)  # as PEFT writes it
    m = peft.load_adapter(Llama.from_pretrained(folder / "model"), folder / "adapter").eval()
    x = tiny.ids(rng, 1, 9)
    np.testing.assert_allclose(tiny.logits(merged(folder), x), tiny.logits(m, x), rtol=1e-4, atol=1e-5)
    assert capsys.readouterr().err == ""  # its own folder, as PEFT would open it
    (folder / "model").rename(folder / "moved")
    merged(folder, "--model", folder / "moved")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "does not say what its base" in said[0] and "cannot be checked" in said[0]


def test_warnings_are_sentences_on_stderr_each_of_them_once(trained, capsys):
    folder, _ = trained
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_magic": True}))
    merged(folder)
    assert capsys.readouterr().err.splitlines() == [f"tinylora: {path}: the keys use_magic are unknown and are ignored"]


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}],
)
def test_the_commands_untie_by_themselves(options, folder, capsys, rng):
    m = adapters.add_lora(
        Llama.from_pretrained(folder / "model").untie(), r=2, **{"target_modules": ["q_proj"], **options}
    )
    tiny.randomize_trainable(m, rng).eval()
    peft.save_adapter(m, folder / "adapter", base_model=str(folder / "model"))
    x = tiny.ids(rng, 1, 9)
    again = merged(folder)
    assert not again.config.tie_word_embeddings
    np.testing.assert_allclose(tiny.logits(again, x), tiny.logits(m, x), rtol=1e-4, atol=1e-4)
    assert generated(capsys, "--adapter", folder / "adapter") == "x" + m.generate("x", 12, temperature=0) + "\n"
    with pytest.raises(
        ValueError,
        match=r"they are one weight in this model \(tied\); call model.untie\(\) first, or load it with untie",
    ):
        peft.load_adapter(Llama.from_pretrained(folder / "model"), folder / "adapter")


@pytest.fixture
def talker(folder, monkeypatch):
    """A model with turns in `folder`/talker; returns (the arguments that choose it, the model, what to type)."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    import llm_files

    m = tiny.model(vocab_size=300, max_position_embeddings=256)
    m.tokenizer = llm_files.trained()
    m.save_pretrained(folder / "talker", dtype="float32")
    arguments = ["generate", "--model", str(folder / "talker"), "--chat", "--max-new-tokens", "6", "--seed", "3"]
    return arguments, m.eval(), lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_conversation_reads_lines_and_remembers_what_was_said(talker, capsys):
    arguments, m, type_in = talker
    lines, shown = ["Who had three sons?", "And what else?"], []
    reader = iter(lines)
    said = chat.converse(m, lambda: next(reader, "/exit"), shown.append, max_new_tokens=6, temperature=0.7, seed=3)
    assert [message["role"] for message in said] == ["user", "assistant"] * 2
    capsys.readouterr()
    for text in ("\n".join(lines), "\n".join([*lines, "/exit", "more"])):  # until the input ends, or /exit
        type_in(text)
        assert main(arguments) == 0
        assert capsys.readouterr().out == "".join(shown)


def test_on_a_terminal_each_turn_is_asked_for(talker, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    arguments, _, _ = talker
    monkeypatch.setattr("sys.stdin", Terminal("Who had three sons?\n\n/reset\n"))
    capsys.readouterr()
    assert main(arguments) == 0
    shown, said = capsys.readouterr()
    assert shown.startswith("> ") and shown.count("> ") >= 4 and "[the conversation begins anew]" in shown
    assert said == "/reset begins anew, /exit or the end of input ends\n"


def test_one_answer_is_the_same_on_the_terminal_and_in_a_file(talker, folder, capsys):
    arguments, m, _ = talker
    question, path = "Is it 3.14159?", folder / "answer.txt"
    wanted = m.generate(m.tokenizer.chat_prompt(question), 6, temperature=0.7, seed=3, stop=chat.ends(m))
    capsys.readouterr()
    assert main([*arguments, "--prompt", question]) == 0
    assert main([*arguments, "--prompt", question, "--out", str(path)]) == 0
    assert capsys.readouterr().out == wanted + "\n" == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments, words",
    [(["--chat"], "--chat: the model knows no turns"), (["--chat", "--out", "x.txt"], "--out takes one answer")],
)
def test_a_chat_that_cannot_be_is_a_sentence(arguments, words, folder, capsys):
    assert main(["generate", "--model", str(folder / "model"), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_count_prints_the_audit(capsys):
    from tinylora.papers import lora_numbers

    assert main(["count"]) == 0
    assert capsys.readouterr().out.strip() == f"{lora_numbers.describe()}\n\n{lora_numbers.post()[0]}".strip()


def test_experiments_by_name(capsys):
    assert main(["experiments", "--list"]) == 0
    assert "rank_sweep" in capsys.readouterr().out
    assert main(["experiments", "invariance", "--seeds", "0"]) == 0
    assert "holds" in capsys.readouterr().out
    assert main(["experiments", "nothing"]) == 2
    assert "there is no 'nothing'" in capsys.readouterr().err


def test_the_page_of_claims_has_a_section_and_a_figure_for_each(tmp_path, capsys):
    assert main(["experiments", "invariance", "two_seeds", "vera_counts", "--seeds", "0", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.count("\n## ") == 3 and page.count("* verdict: **") == 3
    assert re.findall(r"!\[.*\]\((.*)\)", page) == ["invariance.svg", "two_seeds.svg"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("invariance.svg", "two_seeds.svg"))


def test_every_claim_of_the_paper_has_a_figure_and_the_committed_page_has_them_all():
    from tinylora.papers import claims

    figures = {e.draw.file: (name, *e.draw.beside) for name, e in claims.EXPERIMENTS.items() if e.draw}
    drawn = {name for needed in figures.values() for name in needed}
    assert set(claims.EXPERIMENTS) - drawn == {"vera_counts", "lora_plus_start"}  # a count, and an equality
    folder = Path(__file__).parent.parent / "figures" / "claims"
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert {f"{name}.svg" for name in figures} == {p.name for p in folder.glob("*.svg")}
    for name, e in claims.EXPERIMENTS.items():
        assert f"## {e.title}\n" in page, name


def test_finetune_takes_rslora_and_dora(folder, capsys):
    command = ["finetune", "--model", str(folder / "model"), "--text", str(folder / "one.txt"), *QUICK, "-r", "4"]
    assert main([*command, "--rslora", "--dora", "--out", str(folder / "run")]) == 0
    config = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["use_dora"]
    m = peft.load_adapter(Llama.from_pretrained(folder / "model", quantize="nf4"), folder / "run" / "adapter")
    layer = m.model.layers[0].mlp.up_proj
    assert layer.scaling == 16.0 and layer.magnitude.shape == (tiny.CONFIG.intermediate_size,)
