"""Writing one safetensors file front to back, so that a killed run can go on where it stopped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from . import checksum, osio
from .errors import FormatError, ResourceError
from .journal import FinishedFile, Journal
from .tensor_file import TensorPlan, build_header
from .tiles import Bytes

Metadata = Callable[[Sequence[str]], Mapping[str, str]]


class TensorFileWriter:
    """Appends tensors in a fixed order to ``<name>.part`` and renames it when complete.

    Args:
        folder: The output folder.
        name: Relative file name inside it.
        tensors: What will be appended, in order.
        metadata: Gives ``__metadata__`` from the digests of all tensors; the header's length may
            depend on how many digests there are, not on what they are.
        journal: Where progress is noted.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        tensors: Sequence[TensorPlan],
        metadata: Metadata,
        journal: Journal,
    ) -> None:
        self.name = name
        self.tensors = tuple(tensors)
        self._path = folder / name
        self._part = self._path.with_name(f"{self._path.name}.part")
        self._metadata = metadata
        self._journal = journal
        self._digests: list[str] = []
        blank = build_header(self.tensors, metadata(["0" * checksum.XXH3_CHARS] * len(tensors)))
        self._data_start = self._offset = len(blank)
        self._descriptor = -1

    @property
    def facts(self) -> FinishedFile | None:
        """What is known of the file when it is complete, else None."""
        facts = self._journal.finished(self.name)
        return facts if facts is not None and _size(self._path) == facts.size else None

    def resume(self) -> int:
        """Open the partial file and keep the tensors whose bytes match the journal.

        Returns:
            How many tensors need not be written again; all of them when the file is complete.

        Raises:
            ResourceError: The file cannot be opened or read.
        """
        if self.facts is not None:
            return len(self.tensors)
        with osio.io_errors(self._part):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._part, flags, 0o644)
        try:
            self._keep_what_matches()
        except BaseException:
            self.close()
            raise
        return len(self._digests)

    def append(self, data: Bytes) -> None:
        """Write the next tensor's bytes.

        Raises:
            FormatError: The size is not the planned one.
            ResourceError: The write failed; the partial file is removed.
        """
        tensor = self.tensors[len(self._digests)]
        view = np.ascontiguousarray(data).view(np.uint8).reshape(-1).data
        if len(view) != tensor.nbytes:
            raise FormatError(
                "wrong size",
                where=f"{self.name}: {tensor.name}",
                wanted=tensor.nbytes,
                got=len(view),
            )
        digest = checksum.xxh3(view)
        with self._removing_on_failure():
            osio.write_at(self._descriptor, view, self._offset)
            self._journal.add(self.name, digest)
        self._offset += len(view)
        self._digests.append(digest)

    def finish(self) -> FinishedFile:
        """Write the header, force everything to the disk and rename.

        Raises:
            FormatError: Tensors are missing.
            ResourceError: The write failed.
        """
        known = self.facts
        if known is not None:
            return known
        if len(self._digests) != len(self.tensors):
            raise FormatError(
                "file is incomplete",
                where=self.name,
                wanted=len(self.tensors),
                got=len(self._digests),
            )
        header = build_header(self.tensors, self._metadata(self._digests))
        if len(header) != self._data_start:
            raise FormatError("the header changed its length", where=self.name)
        with self._removing_on_failure():
            osio.write_at(self._descriptor, memoryview(header), 0)
            osio.sync(self._descriptor)
            sha256 = checksum.sha256_of_file(self._descriptor, self._part)
            osio.replace(self._part, self._path)
        facts = FinishedFile(self._offset, sha256, checksum.xxh3(header), tuple(self._digests))
        self.close()
        self._journal.finish(self.name, facts)
        return facts

    def close(self) -> None:
        """Close the partial file; what is written stays for a later run."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _keep_what_matches(self) -> None:
        with osio.io_errors(self._part):
            size = os.fstat(self._descriptor).st_size
            noted = self._journal.digests(self.name)[: len(self.tensors)]
            for tensor, digest in zip(self.tensors, noted, strict=False):
                if self._offset + tensor.nbytes > size:
                    break
                data = osio.read_bytes(self._descriptor, self._offset, tensor.nbytes, self._part)
                if checksum.xxh3(data) != digest:
                    break
                self._digests.append(digest)
                self._offset += tensor.nbytes
            os.ftruncate(self._descriptor, self._offset if self._digests else 0)
        self._journal.rewind(self.name, len(self._digests))

    @contextlib.contextmanager
    def _removing_on_failure(self) -> Iterator[None]:
        # A full disk is the user's to clear: leave no half file of ours on it.
        with osio.io_errors(self._part):
            try:
                yield
            except (OSError, ResourceError):
                self.close()
                self._part.unlink(missing_ok=True)
                raise


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
