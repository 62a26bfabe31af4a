"""verify_pack: every byte of a pack is covered, and the message says where the damage is."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack_formats import checksum, osio
from moepack_formats.errors import FormatError, IntegrityError, MoepackError, ResourceError
from moepack_formats.journal import Journal
from moepack_formats.manifest import FileEntry, Manifest
from moepack_formats.pack import Pack
from moepack_formats.verify import VerifyReport, verify_pack
from tests.formats.builders import (
    build_pack,
    layer_plan,
    layer_records,
    rewrite_manifest,
    seal_file,
    write_layer,
)
from tests.formats.hostile import refused

LAYER = "experts/layer-00000.safetensors"
INFINITE = {"f2": 0x7C00, "f4": 0x7F800000}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("original")
    return folder, build_pack(folder)


@pytest.fixture
def manifest(original: tuple[Path, Manifest]) -> Manifest:
    return original[1]


@pytest.fixture
def pack(original: tuple[Path, Manifest], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[0], tmp_path / "pack"))


def flip(path: Path, at: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def test_good_pack(pack: Path, manifest: Manifest) -> None:
    told: list[int] = []
    total = sum(entry.size for entry in manifest.files.values())
    assert verify_pack(pack, told.append) == VerifyReport(4, 6, 2, total)
    assert sum(told) == total


def test_split_layers(tmp_path: Path) -> None:
    build_pack(tmp_path, max_nbytes=5000)
    report = verify_pack(tmp_path)
    assert (report.files, report.records) == (8, 6)


def test_flipped_payload_bit(pack: Path) -> None:
    # The records start at 4096, 8192 and 16384.
    for at, expert in ((4096, 0), (8191, 0), (8192, 1), (16383, 1), (20479, 2)):
        flip(pack / LAYER, at)
        error = refused(
            IntegrityError,
            f"{LAYER}: layer 0, expert {expert}: the record's bytes are damaged",
            lambda: verify_pack(pack),
        )
        assert "restore the file or convert again" in str(error)
        Pack(pack).close()  # found on reading the record, not before
        flip(pack / LAYER, at)
    verify_pack(pack)


def test_flipped_scale(pack: Path) -> None:
    """In expert 1 the scales of gate's first block are at 512, so that 513 has an exponent."""
    flip(pack / LAYER, 8192 + 513, 6)
    refused(IntegrityError, "layer 0, expert 1: the record's bytes", lambda: verify_pack(pack))


def test_flipped_trunk_bit(pack: Path) -> None:
    flip(pack / "model.safetensors", 4096 + 17)
    refused(
        IntegrityError,
        "model.safetensors: lm_head.packed: a trunk tensor's bytes are damaged",
        lambda: verify_pack(pack),
    )
    flip(pack / "model.safetensors", 4096 + 17)
    flip(pack / "model.safetensors", 5327)
    refused(IntegrityError, "model.norm.weight", lambda: verify_pack(pack))


def test_sha256_mismatch(pack: Path) -> None:
    flip(pack / "config.json", 5)
    error = refused(
        IntegrityError,
        "config.json: the file is not the one that was written .*sha256",
        lambda: verify_pack(pack),
    )
    assert "restore the file" in str(error)


@pytest.mark.parametrize("name", [LAYER, "model.safetensors"])
def test_sha256_of_a_tensor_file(pack: Path, manifest: Manifest, name: str) -> None:
    entry = replace(manifest.files[name], sha256="0" * 64)
    rewrite_manifest(pack, manifest, files={**manifest.files, name: entry})
    refused(IntegrityError, f"{name}: the file is not the one", lambda: verify_pack(pack))


def test_exchanged_records_of_one_size(pack: Path) -> None:
    data = (pack / LAYER).read_bytes()
    swapped = data[:4096] + data[16384:] + data[8192:16384] + data[4096:8192]
    (pack / LAYER).write_bytes(swapped)
    refused(IntegrityError, "layer 0, expert 0", lambda: verify_pack(pack))


@settings(max_examples=120)
@given(st.data())
def test_any_flipped_bit_is_found(original: tuple[Path, Manifest], data: st.DataObject) -> None:
    folder, manifest = original
    name = data.draw(st.sampled_from(sorted(manifest.files)))
    at = data.draw(st.integers(0, manifest.files[name].size - 1))
    bit = data.draw(st.integers(0, 7))
    flip(folder / name, at, bit)
    try:
        with pytest.raises(MoepackError) as caught:
            verify_pack(folder)
        assert caught.value.exit_code in (3, 4)
        assert name in str(caught.value)
    finally:
        flip(folder / name, at, bit)


@settings(max_examples=40)
@given(st.data())
def test_any_truncation_is_found(original: tuple[Path, Manifest], data: st.DataObject) -> None:
    folder, manifest = original
    name = data.draw(st.sampled_from(sorted(manifest.files)))
    content = (folder / name).read_bytes()
    os.truncate(folder / name, data.draw(st.integers(0, len(content) - 1)))
    try:
        with pytest.raises(MoepackError) as caught:
            verify_pack(folder)
        assert caught.value.exit_code in (3, 4)
    finally:
        (folder / name).write_bytes(content)


def infinite_record(kind: str, offset: int, expert: int, folder: Path, manifest: Manifest) -> None:
    """A pack with right checksums around one infinity, as only a faulty writer would make it."""
    plan = layer_plan()
    records = layer_records(plan)
    view = records[expert][offset:].view(f"<u{kind[1]}")
    view[0] |= INFINITE[kind]
    (folder / LAYER).unlink()
    journal = Journal(folder, "again")
    write_layer(folder, plan, records, journal, 10**9)
    journal.remove()
    seal_file(folder, manifest, LAYER)


@pytest.mark.parametrize(
    ("offset", "expert", "part"),
    [
        (0, 0, "gate_up"),  # super-scales of gate, q2g16s4
        (384, 0, "gate_up"),  # super-scales of up
        (1536 + 32, 2, "down"),  # super-minima, q3g32s4
        (512 + 2, 1, "gate_up"),  # scales, q4g64
        (2304 + 1024 + 32, 1, "down"),  # minima, q8g64
    ],
)
def test_scales_that_are_not_finite(
    pack: Path, manifest: Manifest, offset: int, expert: int, part: str
) -> None:
    infinite_record("f2", offset, expert, pack, manifest)
    error = refused(
        IntegrityError,
        f"{LAYER}: layer 0, expert {expert}: {part} holds a value that is not finite",
        lambda: verify_pack(pack),
    )
    assert "convert again from an undamaged source" in str(error)


def edit_trunk(folder: Path, manifest: Manifest, at: int, data: bytes) -> Manifest:
    """Change bytes of the trunk's first tensor and all checksums over them."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[4096 + at : 4096 + at + len(data)] = data
    path.write_bytes(content)
    head = checksum.xxh3(bytes(content[4096 : 4096 + 1152]))
    manifest = replace(manifest, trunk={**manifest.trunk, "lm_head.packed": head})
    return seal_file(folder, manifest, "model.safetensors")


def test_trunk_scales_that_are_not_finite(pack: Path, manifest: Manifest) -> None:
    edit_trunk(pack, manifest, 576 + 512, b"\x00\xfc")
    refused(
        IntegrityError,
        "model.safetensors: lm_head.packed: a packed tensor holds a value that is not finite",
        lambda: verify_pack(pack),
    )


def test_trunk_tensors_must_be_those_of_the_manifest(pack: Path, manifest: Manifest) -> None:
    more = {**manifest.trunk, "x": "0" * 32}
    rewrite_manifest(pack, manifest, trunk=more)
    refused(FormatError, "x: a trunk tensor is missing", lambda: verify_pack(pack))
    fewer = {k: v for k, v in manifest.trunk.items() if k != "model.norm.weight"}
    rewrite_manifest(pack, manifest, trunk=fewer)
    refused(FormatError, "model.norm.weight: unknown tensor", lambda: verify_pack(pack))


def test_a_trunk_tensor_in_two_files(pack: Path, manifest: Manifest) -> None:
    shutil.copy(pack / "model.safetensors", pack / "model-2.safetensors")
    files: dict[str, FileEntry] = {
        **manifest.files,
        "model-2.safetensors": manifest.files["model.safetensors"],
    }
    rewrite_manifest(pack, manifest, files=files)
    refused(FormatError, "in two files", lambda: verify_pack(pack))


def test_packed_tensor_of_another_size(pack: Path, manifest: Manifest) -> None:
    entry = replace(manifest.packed["lm_head"], shape=(18, 65))
    rewrite_manifest(pack, manifest, packed={"lm_head": entry})
    refused(
        FormatError,
        r"lm_head.packed: packed tensor has the wrong type or size .*got U8 \[1152\]",
        lambda: verify_pack(pack),
    )


def test_trunk_header_altered_but_consistent(pack: Path) -> None:
    path = pack / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"np"'))
    refused(IntegrityError, "model.safetensors: the header is not", lambda: verify_pack(pack))


def test_truncated_while_it_is_read(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, path = osio.read_at, pack / LAYER

    def cut(descriptor: int, buffer: memoryview, offset: int, where: object) -> None:
        if where == LAYER and offset == 8192:
            os.truncate(path, 9000)
        real(descriptor, buffer, offset, where)

    monkeypatch.setattr(osio, "read_at", cut)
    error = refused(ResourceError, f"{LAYER}: the file ended early", lambda: verify_pack(pack))
    assert "wanted 8192 bytes at 8192, got 808" in str(error)


def test_read_error(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with Pack(pack):
        pass
    monkeypatch.setattr(os, "preadv", failing)
    refused(ResourceError, "the disk reported an input/output error", lambda: verify_pack(pack))


def test_unlisted_files_are_left_alone(pack: Path) -> None:
    (pack / "README.md").write_text("mine")
    (pack / "note.safetensors").write_bytes(np.zeros(3).tobytes())
    verify_pack(pack)
