"""Malformed safetensors headers, made by hand."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepack_formats.errors import MoepackError

U8_16 = {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}


def safetensors(header: object, data: bytes = bytes(16), *, length: int | None = None) -> bytes:
    """File bytes with this header: JSON text, bytes, or something to dump as JSON."""
    if isinstance(header, str):
        header = header.encode()
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


def pad_header(header: bytes) -> bytes:
    """Spaces that make the data start at a multiple of 4096."""
    return header + b" " * (-(8 + len(header)) % 4096)


def refused(
    error: type[MoepackError], message: str, action: Callable[[], Any], *, measured: bool = True
) -> MoepackError:
    """The action fails with this error: one printable line, the exit code, little memory.

    tracemalloc counts what is asked for, also where the system would have given it only on use.
    """
    if measured:
        tracemalloc.start()
    try:
        with pytest.raises(error, match=message) as caught:
            action()
        peak = tracemalloc.get_traced_memory()[1] if measured else 0
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20, f"{peak} bytes were allocated"
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 3000
    assert caught.value.exit_code == error.exit_code
    if error.exit_code == 3:
        assert line.startswith("not a valid pack: ")
    return caught.value


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
