"""safetensors files, read strictly and written front to back.

The reader takes less than stock safetensors does: no duplicate keys, no unknown fields, no leading
space, no hole, no trailing bytes, a header of at most 16 MB. The writer pads the header with
spaces so that the data starts at a multiple of 4096, which stock readers accept.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import RECORD_ALIGN, osio, strict_json
from .errors import FormatError

MAX_HEADER_NBYTES = 16_000_000
_MAX_NAME = 200

DTYPE_NBYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: its type, shape and place.

    Attributes:
        dtype: safetensors' name, as ``"BF16"``.
        shape: Dimensions.
        start: First byte, counted from the start of the file.
        nbytes: Size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A parsed header.

    Attributes:
        raw: The header's bytes as stored, length word and padding included.
        metadata: The ``__metadata__`` strings.
        tensors: Entries by name, in order of their place in the file.
        data_start: First byte of the data.
        end: Size that the header gives the file, in bytes.
    """

    raw: bytes
    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]
    data_start: int
    end: int


def read_header(descriptor: int, where: object) -> Header:
    """Parse the header of an open file and check it against the file's size.

    Raises:
        FormatError: The file is not a safetensors file, or not one that this reader accepts.
    """
    header = read_header_only(descriptor, where)
    size = os.fstat(descriptor).st_size
    if size != header.end:
        what = "bytes follow the last tensor" if size > header.end else "the data ends early"
        raise FormatError(what, where=where, wanted=f"{header.end} bytes", got=size)
    return header


def read_header_only(descriptor: int, where: object) -> Header:
    """Parse the header without asking whether the data is all there.

    Raises:
        FormatError: The header is not one that this reader accepts.
    """
    size = os.fstat(descriptor).st_size
    if size < 8:
        raise FormatError("file is too small", where=where, wanted="8 bytes or more", got=size)
    (length,) = struct.unpack("<Q", osio.read_bytes(descriptor, 0, 8, where))
    if length > MAX_HEADER_NBYTES:
        raise FormatError(
            "header is over the cap", where=where, wanted=f"<= {MAX_HEADER_NBYTES}", got=length
        )
    if length > size - 8:
        raise FormatError(
            "header ends beyond the file", where=where, wanted=f"<= {size - 8}", got=length
        )
    body = osio.read_bytes(descriptor, 8, length, where)
    fields = strict_json.loads(body, where)
    metadata = strict_json.decode(
        dict[str, str], fields.pop("__metadata__", {}), f"{where}: __metadata__"
    )
    data_start = 8 + length
    entries = [_entry(name, value, data_start, where) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.start, entry.start + entry.nbytes))
    end = data_start
    for entry in entries:
        if entry.start != end:
            what = "hole before a tensor" if entry.start > end else "tensors overlap"
            raise FormatError(what, where=f"{where}: {entry.name}", wanted=end, got=entry.start)
        end += entry.nbytes
    raw = struct.pack("<Q", length) + body
    return Header(raw, metadata, {entry.name: entry for entry in entries}, data_start, end)


def _entry(name: str, value: Any, data_start: int, where: object) -> TensorEntry:
    place = f"{where}: {name[:_MAX_NAME]}"
    fields = strict_json.decode(_RawEntry, value, place)
    itemsize = DTYPE_NBYTES.get(fields.dtype)
    if itemsize is None:
        raise FormatError(
            "unknown dtype",
            where=place,
            wanted=f"one of {', '.join(DTYPE_NBYTES)}",
            got=fields.dtype,
        )
    nbytes = itemsize
    for dimension in fields.shape:
        nbytes *= dimension
        if nbytes > strict_json.MAX_INTEGER:
            raise FormatError("shape overflows", where=place, got=list(fields.shape))
    start, stop = fields.data_offsets
    if stop + data_start > strict_json.MAX_INTEGER:
        raise FormatError("offset overflows", where=place, got=stop)
    if stop - start != nbytes:
        raise FormatError(
            "offsets and shape disagree", where=place, wanted=f"{nbytes} bytes", got=stop - start
        )
    return TensorEntry(name, fields.dtype, fields.shape, data_start + start, nbytes)


@dataclass(frozen=True)
class _RawEntry:
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written: ``dtype`` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_NBYTES[self.dtype]


def build_header(tensors: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    """Header bytes for tensors laid end to end, space-padded so that data starts at 4096 * n."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        stop = offset + tensor.nbytes
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    body = strict_json.dumps(fields).encode()
    body += b" " * (-(8 + len(body)) % RECORD_ALIGN)
    if len(fields) != len(tensors) + bool(metadata):
        raise FormatError("two tensors have one name")
    if len(body) > MAX_HEADER_NBYTES:
        raise FormatError("header is over the cap", wanted=f"<= {MAX_HEADER_NBYTES}", got=len(body))
    return struct.pack("<Q", len(body)) + body
