"""Output folders that are in use: by another conversion, by a pack, by something else."""

from __future__ import annotations

import errno
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from moepack_formats import osio
from moepack_formats.schemes import Scheme
from tests.commands import (
    TINY,
    Child,
    Command,
    hashes,
    leftovers,
    make_checkpoint,
    wait_for,
)
from tests.moepack.conversions import WORDS, Failing, convert, progress, stop_after
from tests.packs import make_pack


def test_two_conversions_into_one_folder(
    command: Command, checkpoint: Path, tmp_path: Path, wanted: dict[str, str]
) -> None:
    out, until = tmp_path / "out", tmp_path / "until"
    stop = functools.partial(stop_after, 500, out, until)
    child = Child(tmp_path, "convert", checkpoint, out, *WORDS, before=stop)
    wait_for(lambda: progress(out) > 500)
    for force in ([], ["--force"]):
        line = convert(command, checkpoint, out, *force).error(5)
        assert f"{out}: in use by PID {child.pid}; wait until that command ends" in line
    until.touch()
    assert child.wait().code == 0
    assert hashes(out) == wanted
    assert "already holds a pack" in convert(command, checkpoint, out).error(5)


def test_a_conversion_that_ends_while_another_begins(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is looked at again once it is locked."""
    from moepack.convert import run

    out, ready = tmp_path / "out", tmp_path / "ready"
    make_pack(checkpoint, ready, quantizer="rtn")
    real = run.locked

    def late(folder: Path) -> Any:
        ready.rename(out)
        return real(folder)

    monkeypatch.setattr(run, "locked", late)
    assert "already holds a pack" in convert(command, checkpoint, out).error(5)
    assert leftovers(out) == []


def test_a_lock_that_was_taken_away_locks_nothing(tmp_path: Path) -> None:
    """Its last owner removes it; one who had opened it before must not think that it holds it."""
    from moepack.convert import output_folder

    lock = tmp_path / output_folder.LOCK_NAME
    real = output_folder.fcntl.flock
    removed = []

    def flock(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(descriptor)
            lock.unlink()
        real(descriptor, operation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_folder.fcntl, "flock", flock)
        with output_folder.locked(tmp_path):
            assert lock.read_text() == f"{os.getpid()}\n"
    assert removed
    assert not lock.exists()


def test_output_folder_that_is_not_empty(
    command: Command, checkpoint: Path, tmp_path: Path, wanted: dict[str, str]
) -> None:
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    foreign = {"mine/notes.txt": b"1", "film.part": b"2", "experts/other.bin": b"3", "a.json": b""}
    for name, data in foreign.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    before = hashes(out)
    line = convert(command, checkpoint, out).error(5)
    assert "the folder is not empty" in line
    assert line.endswith("give --force to overwrite, or another folder")
    assert hashes(out) == before
    for _ in range(2):  # into a foreign folder, and over the pack that is then there
        assert convert(command, checkpoint, out, "--force").code == 0
        assert hashes(out) == {**wanted, **before}
    assert "already holds a pack" in convert(command, checkpoint, out).error(5)
    assert command("verify", out).code == 0


def test_force_leaves_nothing_of_the_old_pack(
    command: Command, checkpoint: Path, tmp_path: Path, wanted: dict[str, str]
) -> None:
    """More layers, another tokenizer file and an unfinished conversion come before."""
    bigger = make_checkpoint(tmp_path / "micro", num_hidden_layers=5)
    (bigger / "chat_template.jinja").write_text("x")
    out = tmp_path / "out"
    assert convert(command, bigger, out).code == 0
    assert (out / "experts" / "layer-00004.safetensors").exists()
    assert convert(command, checkpoint, out, "--force").code == 0
    assert hashes(out) == wanted
    shutil.rmtree(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moepack.convert.run.model_card", functools.partial(_fail, errno.EIO))
        convert(command, bigger, out).error(5)
    assert (out / "chat_template.jinja").exists()
    assert convert(command, checkpoint, out, "--force").code == 0
    assert hashes(out) == wanted


def _fail(number: int, *_: object) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_output_path_that_is_a_file(
    command: Command, checkpoint: Path, tmp_path: Path, force: list[str]
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert f"{out}: not a folder" in convert(command, checkpoint, out, *force).error(5)
    assert "out" in convert(command, checkpoint, out / "below", *force).error(5)
    assert out.read_text() == "mine"


def test_a_checkpoint_into_itself(command: Command, source: Path, tmp_path: Path) -> None:
    """Refused even with --force, whatever the folder is called."""
    before = hashes(source)
    assert "the folder is not empty" in convert(command, source, source).error(5)
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link", source / ".." / source.name):
        line = convert(command, source, out, "--force").error(2)
        assert "the output folder is the source itself" in line
    assert hashes(source) == before


def test_a_checkpoint_into_a_folder_of_its_own(
    command: Command, source: Path, wanted: dict[str, str]
) -> None:
    before = hashes(source)
    assert convert(command, source, source / "pack").code == 0
    assert hashes(source / "pack") == wanted
    shutil.rmtree(source / "pack")
    assert hashes(source) == before


def test_resuming_with_other_options(
    command: Command, checkpoint: Path, tmp_path: Path, wanted: dict[str, str]
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(osio, "write_at", Failing(osio.write_at, 30, errno.ENOSPC))
        convert(command, checkpoint, out).error(5)
    before = hashes(out)
    for other in (["--expert-bits", 2], ["--attn-bits", 8], ["--head-bits", 16]):
        line = convert(command, checkpoint, out, *other).error(2)
        assert "an unfinished conversion with another source or other options is here" in line
        assert line.endswith("the same command again to resume it, or --force to start over")
    assert hashes(out) == before
    assert command("convert", TINY, out).error(2).endswith("--force to start over")
    assert convert(command, checkpoint, out).code == 0
    assert hashes(out) == wanted


def test_resuming_what_another_draft_of_the_format_began(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheme, "span_runs", lambda scheme, cols: ((-(-cols // 64), 1),))
        patch.setattr(osio, "write_at", Failing(osio.write_at, 30, errno.ENOSPC))
        convert(command, checkpoint, out).error(5)
    line = convert(command, checkpoint, out).error(2)
    assert "an unfinished conversion with another source or other options is here" in line


def test_a_source_that_changed_in_between(command: Command, source: Path, tmp_path: Path) -> None:
    """What is there would not match what is still to come."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(osio, "write_at", Failing(osio.write_at, 30, errno.ENOSPC))
        convert(command, source, out).error(5)
    shard = next(source.glob("model-00003*"))
    os.utime(shard, ns=(1, 1))
    assert "another source or other options" in convert(command, source, out).error(2)
    assert convert(command, source, out, "--force").code == 0
