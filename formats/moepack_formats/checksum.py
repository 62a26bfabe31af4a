"""The two checksums: xxh3-128 for what is read often, sha256 for whole files."""

from __future__ import annotations

import hashlib
import os

import xxhash

from . import osio
from .errors import FormatError

XXH3_CHARS = 32
SHA256_CHARS = 64
_CHUNK = 1 << 20
_HEX = frozenset("0123456789abcdef")


def xxh3(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128 of a buffer, 32 hexadecimal characters."""
    return xxhash.xxh3_128_hexdigest(data)


def xxh3_of_range(descriptor: int, start: int, nbytes: int, where: object) -> str:
    """xxh3-128 of a part of an open file, a piece in memory at a time.

    Raises:
        ResourceError: The file ends early, or the read failed.
    """
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(_CHUNK, nbytes)))
    for done in range(0, nbytes, _CHUNK):
        chunk = buffer[: min(_CHUNK, nbytes - done)]
        osio.read_at(descriptor, chunk, start + done, where)
        digest.update(chunk)
    return digest.hexdigest()


def check_hex(digest: str, chars: int, where: object) -> None:
    """Refuse what cannot be a digest.

    Raises:
        FormatError: Not ``chars`` lowercase hexadecimal digits.
    """
    if len(digest) != chars or not _HEX.issuperset(digest):
        raise FormatError(
            "not a checksum", where=where, wanted=f"{chars} lowercase hex digits", got=repr(digest)
        )


def sha256_of_file(descriptor: int, where: object) -> str:
    """sha256 of a whole open file, 64 hexadecimal characters (the Hub's LFS object id)."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    size = os.fstat(descriptor).st_size
    for offset in range(0, size, _CHUNK):
        chunk = buffer[: min(_CHUNK, size - offset)]
        osio.read_at(descriptor, chunk, offset, where)
        digest.update(chunk)
    return digest.hexdigest()
