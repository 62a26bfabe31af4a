"""``moepack generate``: prompts, sampling, chat, conversation, and Ctrl-C."""

from __future__ import annotations

import io
import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from moepack.commands import common, generate_command
from moepack_runtime import tape
from moepack_runtime.gpu.simulated_link import LinkSpec
from moepack_runtime.kernels import native
from tests.commands import Child, Command, Result, edit_json, wait_for

PROMPT = "Alice was beginning to get very tired"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def generate(command: Command, pack: Path) -> Command:
    def call(*arguments: object, stdin: str | None = None, of: Path = pack) -> Result:
        words = ("generate", of, "--max-new-tokens", 8, "--threads", 1, *arguments)
        return command(*words, stdin=stdin)

    return call


@pytest.fixture
def chatty(damaged: Path) -> Path:
    """A pack with a chat template."""
    edit_json(damaged / "tokenizer_config.json", chat_template=TEMPLATE)
    return damaged


def test_greedy_is_deterministic(generate: Command) -> None:
    first, second = (generate("--prompt", PROMPT, "--greedy") for _ in range(2))
    assert first.code == 0
    assert first.out == second.out
    assert len(first.out) > 8
    assert generate("--prompt", PROMPT, "--greedy", "--seed", 3).out == first.out


def test_on_a_gpu_compiled_and_with_too_little_room(
    generate: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(pack: str, **options: Any) -> Any:
        return common.load(pack, **{**options, "device": "cpu", "link": LinkSpec()})

    monkeypatch.setattr(generate_command, "load", load)
    torch._dynamo.reset()
    plain = generate("--prompt", PROMPT, "--greedy")
    compiled = generate("--prompt", PROMPT, "--greedy", "--compile", "--context", 64)
    assert (compiled.code, compiled.out) == (0, plain.out)
    assert "moepack:" not in plain.err + compiled.err  # nothing to warn of
    short = generate("--prompt", PROMPT, "--greedy", "--context", 4)
    assert short.out == plain.out
    assert "room for a text of 4 tokens, this one may have" in short.err


def test_a_seed_makes_sampling_repeatable(generate: Command) -> None:
    sampling = ["--prompt", PROMPT, "--temperature", 1.5, "--top-p", 0.99, "--top-k", 500]
    texts = {seed: generate(*sampling, "--seed", seed).out for seed in (1, 2, 3)}
    assert len(set(texts.values())) == 3
    assert generate(*sampling, "--seed", 2).out == texts[2]
    # A seed alone asks for sampling.
    assert len({generate("--prompt", PROMPT, "--seed", seed).out for seed in (1, 2, 3)}) == 3


def test_stdout_holds_the_text_alone(generate: Command) -> None:
    plain = generate("--prompt", PROMPT, "--greedy")
    values = generate("--prompt", PROMPT, "--greedy", "--json")
    assert values.err == ""
    assert values.json["text"] + "\n" == plain.out
    assert values.json["new_tokens"] == 8
    assert values.json["prompt_tokens"] > 4
    assert values.json["decode_tokens_per_s"] > 0
    assert values.json["hit_ratio"] is None  # the pack fits, and is mapped
    lines = plain.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("8 tokens, ")
    verbose = generate("--prompt", PROMPT, "--greedy", "-v", "--ram", "64GiB")  # all of it fits
    assert verbose.out == plain.out
    assert "records memory-mapped" in verbose.err


@pytest.mark.parametrize("io", ["buffered", "mmap"])
@pytest.mark.parametrize("prefetch", ["--prefetch", "--no-prefetch"])
def test_options_change_no_token(generate: Command, io: str, prefetch: str) -> None:
    wanted = generate("--prompt", PROMPT, "--greedy").out
    assert generate("--prompt", PROMPT, "--greedy", "--io", io, prefetch).out == wanted


def test_prompt_from_stdin(generate: Command) -> None:
    wanted = generate("--prompt", PROMPT, "--greedy").out
    assert generate("--prompt", "-", "--greedy", stdin=PROMPT).out == wanted
    assert "the prompt is empty" in generate("--prompt", "-", stdin="").error(2)
    assert "not a UTF-8 text" in generate("--prompt", "-", stdin="caf\udce9").error(2)


def test_a_prompt_beyond_the_context_is_noticed(generate: Command) -> None:
    result = generate("--prompt", "word " * 400, "--greedy", "--max-new-tokens", 1)
    assert result.code == 0
    assert "the model was made for 256 tokens" in result.err


# --- chat ----------------------------------------------------------------------------------------


def test_chat_without_a_template(generate: Command) -> None:
    assert "has no chat template; leave --chat out" in generate("--prompt", "x", "--chat").error(2)


def test_chat_applies_the_template(generate: Command, chatty: Path) -> None:
    by_hand = f"system: Be brief.\nuser: {PROMPT}\nassistant:"
    wanted = generate("--prompt", by_hand, "--greedy", of=chatty)
    chat = ["--chat", "--system", "Be brief.", "--greedy"]
    result = generate("--prompt", PROMPT, *chat, of=chatty)
    assert result.code == 0
    assert result.out == wanted.out
    assert generate("--prompt", PROMPT, "--greedy", of=chatty).out != wanted.out


def test_interactive(generate: Command, chatty: Path) -> None:
    one = generate("--interactive", "--greedy", stdin="Hello there", of=chatty)
    assert (one.code, one.out.count("\n")) == (0, 1)
    # What a turn has in common with the last is not computed again, which rounds otherwise.
    exact = ["--greedy", "--activations", "float"]
    two = generate("--interactive", *exact, stdin="Hello there\n\n  Who?  \n", of=chatty)
    assert two.code == 0
    answers = two.out.splitlines(keepends=True)
    history = f"user: Hello there\nassistant: {answers[0][:-1]}\nuser: Who?\nassistant:"
    assert generate("--prompt", history, *exact, of=chatty).out == answers[1]
    assert generate("--interactive", stdin="", of=chatty) == Result(0, "", "")


def test_interactive_without_a_template(generate: Command) -> None:
    exact = ["--greedy", "--activations", "float"]  # see test_interactive
    result = generate("--interactive", *exact, stdin="One\nTwo\n")
    assert (result.code, result.err) == (0, "")
    first = generate("--prompt", "One", *exact).out
    second = generate("--prompt", f"One\n{first}Two", *exact).out
    assert result.out == first + second  # either may be of several lines


HOSTILE = {
    "classes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "import": "{{ self.__init__.__globals__.__builtins__['exec']('open(\\'MARKER\\', \\'w\\')') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "attribute": "{{ (messages | attr('__class__')).__mro__ }}",
    "syntax": "{% for %}",
    "raises": "{{ raise_exception('this model takes no system role') }}",
    "undefined": "{{ nothing.at.all }}",
    "division": "{{ 1 // 0 }}",
    "deep": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates(
    generate: Command, damaged: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are only ever rendered in transformers' sandbox (fault 65)."""
    monkeypatch.chdir(tmp_path)
    (damaged / "chat_template.jinja").write_text(HOSTILE[name])
    line = generate("--prompt", "x", "--chat", of=damaged).error(2)
    assert "chat template cannot be used" in line
    assert not (tmp_path / "MARKER").exists()
    assert "<class" not in line
    # Without --chat the template is not even looked at.
    assert generate("--prompt", "x", "--greedy", of=damaged).code == 0


# --- Ctrl-C --------------------------------------------------------------------------------------


def test_interrupted(pack: Path) -> None:
    """A real program and a real signal: the text so far stays, there is no traceback."""
    words = ["generate", str(pack), "--prompt", PROMPT, "--greedy", "--max-new-tokens", "100000"]
    child = subprocess.Popen(
        [sys.executable, "-m", "moepack", *words, "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    first = child.stdout.read(30)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert len(first) == 30
    assert rest.endswith(b"\n")
    assert errors.decode().splitlines()[-1] == "moepack: interrupted"
    assert b"Traceback" not in errors


def test_interrupted_while_it_loads(pack: Path, tmp_path: Path) -> None:
    child = Child(tmp_path, "generate", pack, "--prompt", PROMPT, before=interrupt_loading)
    result = child.wait()
    assert result.error(130) == "moepack: interrupted"
    assert result.out == ""


def interrupt_loading() -> None:
    """The signal comes when the trunk is checked."""
    import moepack_runtime.plugin

    def interrupt(_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    moepack_runtime.plugin.quantizer.check_trunk = interrupt  # type: ignore[assignment]


def test_interrupted_reply_of_a_conversation(pack: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the reply, not the conversation."""
    words = ["generate", pack, "--interactive", "--greedy", "--max-new-tokens", 100000]
    child = Child(tmp_path, *words, "--threads", 1, before=say_hello)
    wait_for(lambda: len(child.out) > 20)
    child.send(signal.SIGINT)
    result = child.wait()
    assert result.code == 0
    assert "moepack: reply ended" in result.err
    assert "Traceback" not in result.err


def say_hello() -> None:
    import io

    sys.stdin = io.StringIO("Hello\n")


def test_json_is_one_object_whatever_the_text(generate: Command) -> None:
    values = generate("--prompt", 'quotes " and \\ and \n', "--seed", 1, "--json")
    assert json.loads(values.out) == values.json


def test_a_stop_text_ends_the_reply(command: Command, pack: Path) -> None:
    brief = ["generate", pack, "--prompt", "x", "--greedy", "--threads", 1, "--json"]
    whole = command(*brief, "--max-new-tokens", 8).json
    stop = whole["text"][2:5]
    ended = command(*brief, "--max-new-tokens", 8, "--stop", stop, "--stop", "never so").json
    assert ended["new_tokens"] < whole["new_tokens"]
    assert whole["text"].startswith(ended["text"])
    assert stop in ended["text"]
    assert "--stop is empty" in command(*brief, "--stop", "").error(2)


@pytest.mark.skipif(native.available() is None, reason=native.why_not())
def test_decoding_with_a_stop_text_is_recorded(
    command: Command, pack: Path, caplog: pytest.LogCaptureFixture
) -> None:
    brief = ["generate", pack, "--prompt", "x", "--max-new-tokens", 5, "--threads", 1]
    with caplog.at_level(logging.INFO):
        assert command(*brief, "--stop", "never so").code == 0
    assert "decoding recorded" in caplog.text


def test_repetition_is_penalized_and_unlikely_tokens_left_out(command: Command, pack: Path) -> None:
    brief = ["generate", pack, "--prompt", "x", "--max-new-tokens", 12, "--threads", 1, "--json"]
    greedy = command(*brief, "--greedy").json["text"]
    assert command(*brief, "--greedy", "--repetition-penalty", 50).json["text"] != greedy
    assert command(*brief, "--min-p", 1).json["text"] == greedy
    assert "--min-p" in command(*brief, "--greedy", "--min-p", 0.5).error(2)


def test_recording_can_be_left_out(
    command: Command, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: list[object] = []
    install = tape.install
    monkeypatch.setattr(tape, "install", lambda *a: installed.append(a) or install(*a))
    brief = ["generate", pack, "--prompt", "x", "--max-new-tokens", 3, "--threads", 1]
    assert command(*brief, "--no-record").code == 0
    assert not installed


@pytest.mark.parametrize("option", ["--prompt", "--stop", "--system"])
def test_options_that_are_not_utf8(command: Command, pack: Path, option: str) -> None:
    words = {"--prompt": "x", option: "caf\udce9"}  # what Python makes of other bytes
    arguments = [word for pair in words.items() for word in pair]
    line = command("generate", pack, *arguments, "--chat").error(2)
    assert f"{option}: not a UTF-8 text" in line


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_conversation_that_is_not_utf8(
    command: Command, pack: Path, errors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of the two standard input has goes by the locale."""
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", stdin)
    line = command("generate", pack, "--interactive", "--max-new-tokens", 2).error(2)
    assert "standard input: not a UTF-8 text" in line


def test_a_folder_whose_name_is_not_utf8(command: Command, pack: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pack, tmp_path / "caf\udce9")
    line = command("generate", folder, "--prompt", "x").error(2)
    assert "the folder's name is not UTF-8; rename it" in line
    assert command("verify", folder).code == 0


def test_a_stop_text_of_several_tokens(command: Command, pack: Path) -> None:
    greedy = ["generate", pack, "--prompt", "And the", "--greedy", "--max-new-tokens", 12, "--json"]
    whole = command(*greedy).json
    text = whole["text"]
    stop = text[len(text) // 3 : 2 * len(text) // 3]
    ended = command(*greedy, "--stop", stop).json
    tokenizer = AutoTokenizer.from_pretrained(pack)
    assert len(tokenizer(stop)["input_ids"]) > 1
    assert ended["new_tokens"] < whole["new_tokens"]
    assert text.startswith(ended["text"])
    assert stop in ended["text"]
