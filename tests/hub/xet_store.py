"""A Xet store: blocks of compressed chunks ("xorbs"), and which chunks make up which file.

The formats are those of https://huggingface.co/docs/xet: a shard lists files as terms, runs of
chunks of one xorb, and a xorb is one chunk after the other, each behind a header of 8 bytes.
"""

from __future__ import annotations

import itertools
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

_SHARD_HEADER_NBYTES = 48
_ENTRY_NBYTES = 48
_HAS_METADATA, _HAS_VERIFICATION = 1 << 30, 1 << 31
_CHUNK_HEADER_NBYTES = 8
_XORB_FOOTER = b"XETBLOB"


@dataclass(frozen=True)
class Term:
    """Chunks ``first`` up to ``stop`` of a xorb, ``nbytes`` long when they are expanded."""

    xorb: str
    first: int
    stop: int
    nbytes: int


@dataclass(frozen=True)
class XetFile:
    """A file, by its Xet hash and its sha256."""

    hash: str
    sha256: str | None
    terms: tuple[Term, ...]

    @property
    def nbytes(self) -> int:
        return sum(term.nbytes for term in self.terms)


@dataclass(frozen=True)
class Chunks:
    """Where the chunks of a xorb begin in it, its end included, and how long they are expanded."""

    offsets: list[int]
    nbytes: list[int]


class XetStore:
    """All xorbs and files.

    Args:
        root: A folder for the xorbs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.lock = threading.Lock()
        self.by_hash: dict[str, XetFile] = {}
        self.by_sha256: dict[str, XetFile] = {}
        self._chunks: dict[str, Chunks] = {}

    def xorb(self, name: str) -> Path:
        return self.root / name

    def add_shard(self, data: bytes) -> None:
        """Register the files of a shard.

        Raises:
            KeyError: A xorb that a file is made of is not there.
        """
        for file in _files_of_shard(data):
            for term in file.terms:
                if not self.xorb(term.xorb).exists():
                    raise KeyError(term.xorb)
            with self.lock:
                self.by_hash[file.hash] = file
                if file.sha256 is not None:
                    self.by_sha256[file.sha256] = file

    def chunks(self, name: str) -> Chunks:
        if name not in self._chunks:
            self._chunks[name] = _chunks_of_xorb(self.xorb(name).read_bytes())
        return self._chunks[name]

    def stored_nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.root.iterdir())


def terms_of_range(store: XetStore, file: XetFile, start: int, stop: int) -> tuple[int, list[Term]]:
    """What of a file's terms covers bytes ``start`` to ``stop``, in whole chunks.

    Returns:
        How many bytes of the first chunk come before ``start``, and the terms.
    """
    found, at, skip = [], 0, 0
    for term in file.terms:
        sizes = store.chunks(term.xorb).nbytes[term.first : term.stop]
        ends = list(itertools.accumulate(sizes, initial=at))
        inside = [i for i in range(len(sizes)) if ends[i] < stop and ends[i + 1] > start]
        if inside:
            if not found:
                skip = start - ends[inside[0]]
            first, last = inside[0], inside[-1] + 1
            nbytes = sum(sizes[first:last])
            found.append(Term(term.xorb, term.first + first, term.first + last, nbytes))
        at = ends[-1]
    return skip, found


def _files_of_shard(data: bytes) -> list[XetFile]:
    found = []
    at = _SHARD_HEADER_NBYTES
    while at + _ENTRY_NBYTES <= len(data):
        file_hash = data[at : at + 32]
        flags, count = struct.unpack_from("<II", data, at + 32)
        if file_hash == b"\xff" * 32:
            break
        at += _ENTRY_NBYTES
        terms = []
        for i in range(count):
            entry = at + _ENTRY_NBYTES * i
            nbytes, first, stop = struct.unpack_from("<III", data, entry + 36)
            terms.append(Term(_hash_text(data[entry : entry + 32]), first, stop, nbytes))
        at += _ENTRY_NBYTES * count * (2 if flags & _HAS_VERIFICATION else 1)
        sha256 = None
        if flags & _HAS_METADATA:
            sha256 = _hash_text(data[at : at + 32])
            at += _ENTRY_NBYTES
        found.append(XetFile(_hash_text(file_hash), sha256, tuple(terms)))
    return found


def _chunks_of_xorb(data: bytes) -> Chunks:
    offsets, nbytes, at = [0], [], 0
    while at < len(data) and data[at : at + len(_XORB_FOOTER)] != _XORB_FOOTER:
        compressed = int.from_bytes(data[at + 1 : at + 4], "little")
        nbytes.append(int.from_bytes(data[at + 5 : at + 8], "little"))
        at += _CHUNK_HEADER_NBYTES + compressed
        offsets.append(at)
    return Chunks(offsets, nbytes)


def _hash_text(data: bytes) -> str:
    """A hash as Xet writes it: four little-endian words in hexadecimal."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))
