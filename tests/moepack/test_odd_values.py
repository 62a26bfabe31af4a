"""Values of options that no command can use: refused in a line, before anything is done."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.commands import ASSETS, TINY, Command

TEXT = ASSETS / "text" / "tiny-moe-valid.txt"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        *((option, value, "not a finite number")
          for option in ("--temperature", "--repetition-penalty") for value in ("nan", "inf")),
        ("--top-p", "nan", "not a finite number"),
        ("--min-p", "nan", "not a finite number"),
        ("--seed", 2**64, "more than 64 bits"),
        ("--seed", -(2**63) - 1, "more than 64 bits"),
    ],
)  # fmt: skip
def test_numbers_that_are_none(command: Command, option: str, value: object, words: str) -> None:
    result = command("generate", "nothere", "--prompt", "x", option, value)
    assert (result.code, result.out) == (2, "")
    assert words in result.err.splitlines()[-1]


def test_no_standard_input(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    line = command("generate", "nothere", "--prompt", "-").error(2)
    assert "standard input is closed" in line


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_the_widest_seeds(command: Command, pack: Path, seed: int) -> None:
    few = ["--prompt", "x", "--max-new-tokens", 2, "--threads", 1, "--json"]
    assert command("generate", pack, *few, "--seed", seed).json["new_tokens"] > 0


def test_a_seed_of_a_measurement(command: Command) -> None:
    result = command("bench", "nothere", "--seed", 2**64)
    assert result.code == 2
    assert "more than 64 bits" in result.err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--disk-mbps", "--compute-ms"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_speeds_that_are_none(command: Command, option: str, value: str) -> None:
    result = command("simulate", "nothere", "--slots", 1, option, value)
    assert result.code == 2
    assert "not a finite number" in result.err.splitlines()[-1]


def test_a_trace_takes_the_place_of_files_only(
    command: Command, pack: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "not a regular file" in command("trace", pack, pipe, "--text", TEXT).error(2)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert "not a file's name" in command("trace", pack, "", "--text", TEXT).error(2)


def test_a_trace_does_not_take_the_place_of_its_text(
    command: Command, pack: Path, tmp_path: Path
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words")
    (tmp_path / "link").symlink_to(text)
    for name in ("a.txt", "link"):
        line = command("trace", pack, tmp_path / name, "--text", text).error(2)
        assert "take the place of the text" in line
    assert text.read_text() == "some words"


def test_a_trace_cannot_look_ahead_without_end(command: Command, tmp_path: Path) -> None:
    result = command("trace", "nothere", tmp_path / "a", "--text", TEXT, "--ahead", 10**12)
    assert result.code == 2
    assert "0<=x<=64" in result.err


def test_a_folder_has_no_revision(command: Command) -> None:
    line = command("plan", TINY, "--revision", "main").error(2)
    assert "a revision belongs to a Hub id" in line


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["convert", "src", "out", "--budget", "1GiB", "--expert-bits", 2], "--expert-bits"),
        (["convert", "src", "out", "--mix", "layer"], "--mix"),
        (["convert", "src", "out", "--mix", "layer", "--expert-bits", 2], "--mix"),
        (["inspect", "--engine", "--layer", 1], "--layer"),
        (["inspect", "pack", "--engine"], "pack"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_an_option_that_would_do_nothing(
    command: Command, arguments: list[object], option: str
) -> None:
    assert f"{option} does nothing with" in command(*arguments).error(2)


@pytest.mark.parametrize("choice", [["--budget", "1GiB"], ["--expert-bits", 2.6]])
def test_a_mixture_by_layer_is_not_refused(command: Command, choice: list[object]) -> None:
    line = command("convert", "no/such/folder", "out", *choice, "--mix", "layer").error(2)
    assert "does nothing" not in line
