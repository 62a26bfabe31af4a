"""Files that change while a pack runs, limits of the machine, and code in packs."""

from __future__ import annotations

import functools
import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest

from moepack_formats.errors import IntegrityError, ResourceError
from moepack_runtime.loading import load_pack
from tests import families
from tests.commands import Child, Command, Result, edit_json
from tests.moepack.pack_edits import (
    GENERATE,
    LAYER,
    edit_manifest,
    generate,
)
from tests.packs import make_pack


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_truncated_while_loaded(damaged: Path, io: str) -> None:
    """An error that names the file, not a SIGBUS."""
    model = load_pack(damaged, io=io, prefetch=io == "mmap")
    ids = families.tokens(batch=1)
    model.generate(ids[:, :1], max_new_tokens=2, do_sample=False)
    os.truncate(damaged / LAYER, 5000)
    with pytest.raises((ResourceError, IntegrityError), match="truncated while in use") as error:
        # Every expert of the layer is asked for: some are not in a slot yet.
        for _ in model.moepack.residency.fetch(1, range(8)):
            pass
    assert error.value.exit_code == 5
    assert LAYER in str(error.value)
    os.truncate(damaged / LAYER, 0)
    with pytest.raises(ResourceError, match="truncated while in use"):
        list(model.moepack.residency.fetch(1, range(8)))


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_truncated_while_it_writes(damaged: Path, tmp_path: Path, io: str) -> None:
    child = Child(
        tmp_path, "generate", damaged, *GENERATE, "--io", io, before=_truncate_after_loading
    )
    line = child.wait().error(5)
    assert "layer" in line
    assert "truncated while in use" in line


def _truncate_after_loading() -> None:
    import moepack.commands.generate_command as module

    real = module.load

    def load(pack: str, **options: Any) -> Any:
        model = real(pack, **options)
        for path in Path(pack).glob("experts/*"):
            os.truncate(path, 5000)
        return model

    module.load = load  # type: ignore[assignment]


def test_too_many_open_files(pack: Path, tmp_path: Path) -> None:
    """Wherever the limit is met: in our code, or in a library that says it in its own way."""
    for more in range(5):
        limit = functools.partial(_few_descriptors, more)
        line = Child(tmp_path, "generate", pack, *GENERATE, before=limit).wait().error(5)
        assert "too many open files; raise the limit, for example `ulimit -n 4096`" in line


def _few_descriptors(more: int) -> None:
    used = len(os.listdir("/proc/self/fd")) - 1  # the listing itself has one
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, used + more))


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap", "auto"])
def test_not_enough_memory(pack: Path, tmp_path: Path, io: str) -> None:
    """The need is stated, that much is enough, and less is not.

    Each in a process that has done nothing before, for what it holds counts.
    """

    def run(ram: object) -> Result:
        words = ("generate", pack, *GENERATE, "--io", io, "--ram", ram, "--json")
        return Child(tmp_path, *words).wait()

    line = run(1000).error(5)
    found = re.search(r"not enough memory .*got 1000 B.*give --ram (\d+)MiB or more$", line)
    assert found is not None, line
    said = int(found.group(1))
    assert run(f"{said}MiB").json["text"] == run("1TiB").json["text"]
    # What is said has 8 to 16 MiB to spare; twice that is for how processes differ.
    assert "give --ram" in run(f"{said - 32}MiB").error(5)


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_a_reader_during_a_conversion(
    checkpoint: Path, damaged: Path, tmp_path: Path, io: str
) -> None:
    """A loaded model goes on as before while its pack is replaced by another."""
    model = load_pack(damaged, io=io, slots=1)
    ids = families.tokens(batch=1)
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
    make_pack(checkpoint, damaged, force=True, quantizer="rtn", expert_bits=2)
    model.moepack.stats.reset()
    assert model.generate(ids, max_new_tokens=6, do_sample=False).tolist() == wanted
    if io != "mmap":
        assert model.moepack.stats.misses > 0
    new = load_pack(damaged, io=io)
    assert new.moepack.pack.manifest.recipe.expert_schemes == ("q2g16s4",)


# --- what a pack asks for and does not get --------------------------------------------------------

CODE = "open(__import__('os').environ['MARKER'], 'w').close()\n"


def test_code_in_a_pack(
    damaged: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing of it runs, and the user is told what was ignored."""
    wanted = generate(command, damaged).out
    marker = tmp_path / "MARKER"
    monkeypatch.setenv("MARKER", str(marker))
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (damaged / name).write_text(CODE)
    edit_json(
        damaged / "config.json",
        auto_map={
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
        },
        attn_implementation="org/repo",
        _attn_implementation="org/repo",
        experts_implementation="org/repo",
        surprise=1,
    )
    edit_json(
        damaged / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]},
    )
    result = generate(command, damaged)
    assert result.code == 0
    assert result.out == wanted
    assert not marker.exists()
    for name in ("auto_map", "attn_implementation", "experts_implementation", "surprise"):
        assert name in caplog.text


def test_a_tokenizer_that_is_only_code(
    damaged: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "MARKER"
    monkeypatch.setenv("MARKER", str(marker))
    (damaged / "tokenization_evil.py").write_text(CODE)
    (damaged / "tokenizer.json").unlink()
    edit_manifest(damaged, lambda manifest: manifest["files"].pop("tokenizer.json"))
    edit_json(
        damaged / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]},
    )
    assert "cannot read the tokenizer" in generate(command, damaged).error(3)
    assert not marker.exists()
