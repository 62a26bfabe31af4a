"""Conversions that end suddenly, and go on when they are started again."""

from __future__ import annotations

import functools
import os
import pkgutil
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepack.convert.calibration import FOLDER_NAME as CALIBRATION
from moepack.convert.output_folder import LOCK_NAME
from moepack_formats import osio
from moepack_formats.journal import JOURNAL_NAME
from tests.commands import (
    Child,
    hashes,
    leftovers,
    make_checkpoint,
    wait_for,
)
from tests.moepack.conversions import WORDS, progress, stop_after
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
    code = 0
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choices(OPERATIONS, weights=(3, 1, 1))[0]
        at = chance.randint(1, counts[name])
        kill = functools.partial(_kill_at, name, at, chance.random() < 0.5)
        code = Child(tmp_path, "convert", source, out, *WORDS, before=kill).wait().code
        assert code in (-signal.SIGKILL, 0)  # the second time there may be less to do
    result = Child(tmp_path, "convert", source, out, *WORDS, "--json").wait()
    assert result.code == (5 if code == 0 else 0)  # 5: it holds a pack already
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
    complete = (out / "moepack.json").exists() and not (out / JOURNAL_NAME).exists()
    result = Child(tmp_path, "convert", source, out, *WORDS).wait()
    assert result.code == (5 if complete else 0), result
    assert hashes(out) == wanted
    assert leftovers(out) == []


TIDYING = {
    "calibration": "moepack.convert.run.forget",
    "source": "moepack.convert.sources.folder_source.FolderCheckpoint.clear",
    "journal": "moepack.convert.run.Journal.remove",
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", TIDYING)
def test_killed_while_tidying_up(
    checkpoint: Path, tmp_path: Path, wanted: dict[str, str], step: str, late: bool
) -> None:
    """The manifest is in place: the pack is complete, whatever else is still there."""
    out, aside = tmp_path / "out", tmp_path / "aside"
    kill = functools.partial(_kill_around, TIDYING[step], late, out)
    code = Child(tmp_path, "convert", checkpoint, out, *WORDS, before=kill).wait().code
    assert code == -signal.SIGKILL
    assert LOCK_NAME in leftovers(out)
    assert (JOURNAL_NAME in leftovers(out)) == (step != "journal" or not late)
    assert (out / CALIBRATION / "x").exists() == (step == "calibration" and not late)
    before = hashes(out)
    assert wanted.items() <= before.items()

    # Another conversion is none of its business, and takes nothing away but the dead one's lock.
    other = Child(tmp_path, "convert", checkpoint, out, *WORDS, "--expert-bits", 2).wait()
    assert f"{out}: already holds a pack" in other.error(5)
    assert hashes(out) == {name: digest for name, digest in before.items() if name != LOCK_NAME}

    result = Child(tmp_path, "convert", checkpoint, out, *WORDS, "--json").wait()
    assert hashes(out) == wanted
    if step == "journal" and late:  # no trace of what made the pack
        assert f"{out}: already holds a pack" in result.error(5)
        return
    assert result.code == 0
    undisturbed = Child(tmp_path, "convert", checkpoint, aside, *WORDS, "--json").wait()
    assert {**result.json, "pack": str(aside)} == undisturbed.json


def _kill_around(name: str, late: bool, out: Path) -> None:
    """End this process before or after a step, and leave a file for calibration's to remove."""
    owner = pkgutil.resolve_name(name.rpartition(".")[0])
    attribute = name.rpartition(".")[2]
    real = getattr(owner, attribute)

    def step(*arguments: Any) -> None:
        if late:
            real(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, attribute, step)
    (out / CALIBRATION).mkdir(parents=True)
    (out / CALIBRATION / "x").write_text("x")
    (out / JOURNAL_NAME).touch()


def test_interrupted(checkpoint: Path, tmp_path: Path, wanted: dict[str, str]) -> None:
    out = tmp_path / "out"
    stop = functools.partial(stop_after, 500, out, tmp_path / "never")
    child = Child(tmp_path, "convert", checkpoint, out, *WORDS, before=stop)
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
    stop = functools.partial(stop_after, 500, out, tmp_path / "never")
    child = Child(tmp_path, "convert", checkpoint, out, *WORDS, "--force", before=stop)
    wait_for(lambda: progress(out) > 500)
    child.send(signal.SIGINT)
    assert "same command again, without --force, resumes" in child.wait().err
    assert Child(tmp_path, "convert", checkpoint, out, *WORDS).wait().code == 0
    assert hashes(out) == wanted
