"""Changing packs as someone might who also mends the checksums."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepack_formats import checksum
from moepack_formats.pack import Pack
from tests.commands import Command, Result

LAYER = "experts/layer-00001.safetensors"
OTHER = "experts/layer-00002.safetensors"
GENERATE = ("--prompt", "x", "--greedy", "--max-new-tokens", 3, "--threads", 1)


def generate(command: Command, pack: Path, *arguments: object) -> Result:
    return command("generate", pack, *GENERATE, *arguments)


def each(command: Command, pack: Path, code: int, *, lazily: bool = False) -> str:
    """Every command that reads the pack refuses with one line; returns it.

    Args:
        command: Runs commands.
        pack: The damaged pack.
        code: The exit code.
        lazily: Only reading the bytes shows it, which inspect does not do.
    """
    results = [
        command("verify", pack),
        generate(command, pack, "--io", "buffered"),
        generate(command, pack, "--io", "mmap"),
    ]
    if not lazily:
        results.append(command("inspect", pack))
    lines = {result.error(code) for result in results}
    assert all(result.out == "" for result in results)
    assert len(lines) == 1, lines
    return lines.pop()


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a safetensors header; the data stays where it is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def edit_layer(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a layer file says of itself."""

    def inside(header: dict[str, Any]) -> None:
        layer = json.loads(header["__metadata__"]["moepack"])
        change(layer)
        header["__metadata__"]["moepack"] = json.dumps(layer, separators=(",", ":"))

    edit_header(path, inside)


def edit_manifest(pack: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = pack / "moepack.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def reseal(pack: Path, name: str) -> None:
    """Bring the manifest's checksums of a file up to date."""
    data = (pack / name).read_bytes()

    def change(manifest: dict[str, Any]) -> None:
        facts = manifest["files"][name]
        facts["size"] = len(data)
        descriptor = os.open(pack / name, os.O_RDONLY)
        facts["sha256"] = checksum.sha256_of_file(descriptor, name)
        os.close(descriptor)
        if facts["header_xxh3"] is not None:
            end = 8 + struct.unpack("<Q", data[:8])[0]
            facts["header_xxh3"] = checksum.xxh3(data[:end])

    edit_manifest(pack, change)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def record(pack: Path, layer: int, expert: int) -> tuple[int, int]:
    """Offset and size of a record."""
    with Pack(pack) as opened:
        at = opened.layers[layer][expert]
        return at.offset, at.spec.nbytes
