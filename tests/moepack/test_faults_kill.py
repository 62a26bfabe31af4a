"""Conversions that end suddenly, and go on when they are started again."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepack_formats import osio
from moepack_formats.journal import JOURNAL_NAME
from tests.commands import (
    Child,
    hashes,
    leftovers,
    make_checkpoint,
    wait_for,
)
from tests.moepack.conversions import WORDS, progress, slow_writes
from tests.packs import make_pack

OPERATIONS = ("write_at", "sync", "replace")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], Counter[str]]:
    """A checkpoint of many experts, its pack, and how many operations writing it takes."""
    folder = tmp_path_factory.mktemp("many")
    source = make_checkpoint(
        folder / "source", num_local_experts=24, num_hidden_layers=2, hidden_size=32,
        intermediate_size=24, vocab_size=512,
    )  # fmt: skip
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            counting = functools.partial(_counted, counts, name, getattr(osio, name))
            patch.setattr(osio, name, counting)
        make_pack(source, folder / "pack", quantizer="rtn")
    return source, hashes(folder / "pack"), counts


def _counted(counts: Counter[str], name: str, real: Callable[..., Any], *args: Any) -> Any:
    counts[name] += 1
    return real(*args)


@pytest.mark.parametrize("seed", range(10))
def test_killed(many: tuple[Path, dict[str, str], Counter[str]], tmp_path: Path, seed: int) -> None:
    """``kill -9`` in the middle of a write, before or after a sync or a rename; then once more."""
    source, wanted, counts = many
    chance = random.Random(seed)
    out = tmp_path / "out"
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choices(OPERATIONS, weights=(3, 1, 1))[0]
        at = chance.randint(1, counts[name])
        kill = functools.partial(_kill_at, name, at, chance.random() < 0.5)
        result = Child(tmp_path, "convert", source, out, *WORDS, before=kill).wait()
        assert result.code in (-signal.SIGKILL, 0)  # the second time there may be less to do
    result = Child(tmp_path, "convert", source, out, *WORDS, "--json").wait()
    if (out / "moepack.json").exists() and result.code == 5:  # killed after the last step
        assert "already holds a pack" in result.err
    else:
        assert result.code == 0
    assert hashes(out) == wanted
    assert leftovers(out) == []


def _kill_at(name: str, at: int, half: bool) -> None:
    """End this process at the ``at``-th call of an operation: half way through, or before it."""
    real = getattr(osio, name)
    calls = 0

    def operation(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            if half and name == "write_at":
                descriptor, data, offset = arguments
                os.pwrite(descriptor, data[: len(data) // 2], offset)
            elif half:
                real(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    setattr(osio, name, operation)


@pytest.mark.parametrize("seed", range(3))
def test_killed_from_outside(
    many: tuple[Path, dict[str, str], Counter[str]], tmp_path: Path, seed: int
) -> None:
    """At any instruction, over and over, until one run gets through."""
    source, wanted, _ = many
    chance = random.Random(seed)
    out, kills = tmp_path / "out", 0
    while not (out / "moepack.json").exists() and kills < 5:
        child = Child(tmp_path, "convert", source, out, *WORDS)
        before = progress(out)
        wait_for(lambda before=before: progress(out) > before or (out / "moepack.json").exists())
        time.sleep(chance.random() / 30)
        child.send(signal.SIGKILL)
        child.wait()
        kills += 1
    if not (out / "moepack.json").exists() or leftovers(out):
        assert Child(tmp_path, "convert", source, out, *WORDS).wait().code == 0
    assert hashes(out) == wanted
    assert leftovers(out) == []


def test_interrupted(checkpoint: Path, tmp_path: Path, wanted: dict[str, str]) -> None:
    out = tmp_path / "out"
    child = Child(tmp_path, "convert", checkpoint, out, *WORDS, before=slow_writes)
    wait_for(lambda: progress(out) > 500)
    child.send(signal.SIGINT)
    result = child.wait()
    assert result.code == 130
    assert result.out == ""
    assert [line for line in result.err.splitlines() if line] == [
        "moepack: the same command again resumes this conversion",
        "moepack: interrupted",
    ]
    assert (out / JOURNAL_NAME).exists()
    assert Child(tmp_path, "convert", checkpoint, out, *WORDS).wait().code == 0
    assert hashes(out) == wanted
    assert leftovers(out) == []


def test_interrupted_with_force(checkpoint: Path, tmp_path: Path, wanted: dict[str, str]) -> None:
    """--force would start over: the advice leaves it out."""
    out = tmp_path / "out"
    child = Child(tmp_path, "convert", checkpoint, out, *WORDS, "--force", before=slow_writes)
    wait_for(lambda: progress(out) > 500)
    child.send(signal.SIGINT)
    assert "same command again, without --force, resumes" in child.wait().err
    assert Child(tmp_path, "convert", checkpoint, out, *WORDS).wait().code == 0
    assert hashes(out) == wanted
