"""Opening a pack: links, devices, missing, exchanged and truncated files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from moepack_formats import osio
from moepack_formats.errors import FormatError, IntegrityError, ResourceError
from moepack_formats.manifest import Manifest
from moepack_formats.pack import Pack, check_record, read_manifest
from moepack_formats.paths import resolve_inside
from moepack_formats.verify import verify_pack
from tests.formats.builders import EXPERTS, build_pack, rewrite_manifest, seal_file
from tests.formats.hostile import refused, safetensors

LAYER = "experts/layer-00000.safetensors"
OTHER = "experts/layer-00001.safetensors"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return build_pack(tmp_path / "pack")


@pytest.fixture
def pack(tmp_path: Path, manifest: Manifest) -> Path:
    return tmp_path / "pack"


def opened(folder: Path) -> None:
    Pack(folder).close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_open_and_read(pack: Path) -> None:
    before = open_descriptors()
    with Pack(pack) as found:
        assert [len(layer) for layer in found.layers] == [EXPERTS, EXPERTS]
        for layer, records in enumerate(found.layers):
            for expert, at in enumerate(records):
                data = osio.read_bytes(at.descriptor, at.offset, at.spec.nbytes, at.file)
                check_record(memoryview(data), at, layer, expert)
    assert open_descriptors() == before


def test_nothing_stays_open_after_a_failure(pack: Path) -> None:
    before = open_descriptors()
    os.truncate(pack / OTHER, 9000)
    refused(IntegrityError, "truncated", lambda: opened(pack))
    assert open_descriptors() == before


def test_a_pack_can_be_read_while_it_is_made_again(pack: Path) -> None:
    """54: open descriptors keep the old bytes."""
    with Pack(pack) as found:
        old = [osio.read_bytes(at.descriptor, at.offset, 64, at.file) for at in found.layers[0]]
        (pack / "moepack.json").unlink()
        for name in (LAYER, OTHER, "model.safetensors"):
            (pack / name).unlink()
        build_pack(pack, max_nbytes=5000)
        again = [osio.read_bytes(at.descriptor, at.offset, 64, at.file) for at in found.layers[0]]
    assert old == again


def test_expert_count(pack: Path, manifest: Manifest) -> None:
    for count in (EXPERTS - 1, EXPERTS + 1, 2**63 - 1):
        layers = (replace(manifest.layers[0], num_experts=count), *manifest.layers[1:])
        rewrite_manifest(pack, manifest, layers=layers)
        refused(FormatError, "expert count differs from the manifest's", lambda: opened(pack))


def test_missing_expert(tmp_path: Path) -> None:
    """A split layer whose manifest forgets a file."""
    manifest = build_pack(tmp_path, max_nbytes=5000)
    layer = manifest.layers[1]
    for kept in (layer.files[:-1], layer.files[1:]):
        rewrite_manifest(
            tmp_path, manifest, layers=(manifest.layers[0], replace(layer, files=kept))
        )
        refused(FormatError, "layer 1: experts are missing", lambda: opened(tmp_path))


def test_missing_experts_of_a_huge_count(pack: Path, manifest: Manifest) -> None:
    """Manifest and file agree on 2^62 experts; nothing of that size is made."""
    path = pack / LAYER
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'num_experts\\":3', b'num_experts\\":%d' % 2**62)
    header = header.rstrip().ljust(length)
    path.write_bytes(safetensors(header, data[8 + length :]))
    layers = (replace(manifest.layers[0], num_experts=2**62), *manifest.layers[1:])
    manifest = rewrite_manifest(pack, manifest, layers=layers)
    seal_file(pack, manifest, LAYER)
    refused(FormatError, "layer 0: experts are missing", lambda: opened(pack))


@pytest.mark.parametrize("name", [LAYER, "model.safetensors", "config.json"])
def test_missing_file(pack: Path, name: str) -> None:
    (pack / name).unlink()
    error = refused(FormatError, f"{name}: file is missing", lambda: opened(pack))
    assert "convert again" in str(error)


def test_folder_part_that_is_a_file(pack: Path) -> None:
    shutil.rmtree(pack / "experts")
    (pack / "experts").write_bytes(b"")
    refused(FormatError, "file is missing", lambda: opened(pack))


@pytest.mark.parametrize("name", [LAYER, "config.json", "moepack.json"])
def test_link_that_leaves_the_pack(pack: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    shutil.move(pack / name, outside)
    (pack / name).symlink_to(outside)
    refused(FormatError, "a symbolic link leaves the pack", lambda: opened(pack))


def test_linked_folder_and_loops(pack: Path, tmp_path: Path) -> None:
    shutil.move(pack / "experts", tmp_path / "elsewhere")
    (pack / "experts").symlink_to(tmp_path / "elsewhere")
    refused(FormatError, "a symbolic link leaves the pack", lambda: opened(pack))
    (pack / "experts").unlink()
    (pack / "experts").symlink_to("experts")
    refused(FormatError, "cannot follow the path|file is missing", lambda: opened(pack))


def test_link_inside_and_linked_root_pass(pack: Path, tmp_path: Path) -> None:
    (pack / LAYER).rename(pack / "experts" / "real")
    (pack / LAYER).symlink_to("real")
    link = tmp_path / "link"
    link.symlink_to(pack)
    verify_pack(link)


def hub_cache(pack: Path, root: Path) -> Path:
    """The pack as the Hub client stores it: links into blobs beside the snapshot."""
    snapshot = root / "models--me--pack" / "snapshots" / "0123abc"
    blobs = root / "models--me--pack" / "blobs"
    blobs.mkdir(parents=True)
    for path in pack.rglob("*"):
        if path.is_file():
            name = path.relative_to(pack)
            target = snapshot / name
            target.parent.mkdir(parents=True, exist_ok=True)
            blob = blobs / str(name).replace("/", "-")
            shutil.copy(path, blob)
            target.symlink_to(os.path.relpath(blob, target.parent))
    return snapshot


def test_links_of_a_hub_cache_pass(pack: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(pack, tmp_path)
    assert (snapshot / LAYER).is_symlink()
    verify_pack(snapshot)


def test_other_links_of_a_hub_cache_do_not_pass(pack: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(pack, tmp_path)
    foreign = tmp_path / "models--other--secret" / "blobs"
    foreign.mkdir(parents=True)
    shutil.copy(pack / LAYER, foreign / "x")
    (snapshot / LAYER).unlink()
    (snapshot / LAYER).symlink_to(foreign / "x")
    refused(FormatError, "a symbolic link leaves the pack", lambda: opened(snapshot))
    refused(FormatError, "unsafe", lambda: resolve_inside(snapshot, "../../blobs/x"))


def test_fifo_device_folder_socket(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is opened in a way that waits."""
    for name in (LAYER, "config.json", "moepack.json"):
        path = pack / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        refused(FormatError, "not a regular file", lambda: opened(pack))
        path.unlink()
        path.mkdir()
        refused(FormatError, "not a regular file", lambda: opened(pack))
        path.rmdir()
        with socket.socket(socket.AF_UNIX) as server:
            monkeypatch.chdir(path.parent)  # a socket's name may have about 100 bytes
            server.bind(path.name)
            refused(FormatError, "not a regular file", lambda: opened(pack))
        path.unlink()
        path.write_bytes(content)
    with pytest.raises(FormatError, match="not a regular file"):
        osio.open_regular(Path("/dev/zero"))
    opened(pack)


def test_truncated_layer_file(pack: Path) -> None:
    # Data starts at 4096; the records are 4096, 8192 and 4096 bytes.
    for size, expert in ((4096, 0), (8191, 0), (8192, 1), (16383, 1), (16384, 2), (20479, 2)):
        os.truncate(pack / LAYER, size)
        error = refused(
            IntegrityError,
            f"{LAYER}: layer 0, expert {expert}: the file is truncated .*got {size}",
            lambda: opened(pack),
        )
        assert "restore the file or convert again" in str(error)
        with open(pack / LAYER, "r+b") as file:
            file.truncate(20480)


def test_truncated_trunk(pack: Path) -> None:
    os.truncate(pack / "model.safetensors", 5000)
    refused(IntegrityError, "model.safetensors: the file has another size", lambda: opened(pack))


def test_trailing_bytes(pack: Path) -> None:
    with open(pack / LAYER, "ab") as file:
        file.write(b"\0")
    refused(FormatError, f"{LAYER}: bytes follow the last record", lambda: opened(pack))


def test_two_layer_files_swapped(pack: Path) -> None:
    (pack / LAYER).rename(pack / "x")
    (pack / OTHER).rename(pack / LAYER)
    (pack / "x").rename(pack / OTHER)
    error = refused(
        IntegrityError,
        f"{LAYER}: this file belongs to another layer: two files were swapped",
        lambda: opened(pack),
    )
    assert "wanted layer 0 (model.layers.0.mlp.experts), got layer 1" in str(error)


def test_two_files_of_one_layer_swapped(tmp_path: Path) -> None:
    manifest = build_pack(tmp_path, max_nbytes=5000)
    first, _, last = (tmp_path / name for name in manifest.layers[0].files)
    first.rename(tmp_path / "x")
    last.rename(first)
    (tmp_path / "x").rename(last)
    refused(IntegrityError, "layer 0: the header is not the one", lambda: opened(tmp_path))


def test_header_altered_but_consistent(pack: Path) -> None:
    """Another program exchanges two checksums: the file agrees with itself, not with the pack."""
    data = (pack / LAYER).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    layer = json.loads(header["__metadata__"]["moepack"])
    layer["xxh3"].reverse()
    header["__metadata__"]["moepack"] = json.dumps(layer, separators=(",", ":"))
    body = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    (pack / LAYER).write_bytes(safetensors(body, data[8 + length :]))
    error = refused(
        IntegrityError,
        f"{LAYER}: layer 0: the header is not the one that was written",
        lambda: opened(pack),
    )
    assert "restore the file or convert again" in str(error)


def test_too_many_open_files(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = os.open, 0

    def limited(path: object, flags: int, *rest: int) -> int:
        nonlocal count
        count += 1
        if count > 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", limited)
    before = open_descriptors()
    refused(ResourceError, "too many open files.*ulimit", lambda: opened(pack))
    assert open_descriptors() == before


def test_permission_denied(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root ignores modes, so the system call is exchanged."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "stat", denied)
    refused(ResourceError, "permission denied", lambda: read_manifest(pack))
    refused(ResourceError, "permission denied", lambda: opened(pack))
