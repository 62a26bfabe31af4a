"""An open pack: its manifest checked, its layer files open, its records at hand."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from . import checksum, osio
from .errors import FormatError, IntegrityError, ResourceError, UsageError
from .journal import JOURNAL_NAME
from .layer import LayerFile, RecordLocation
from .manifest import MANIFEST_NAME, LayerEntry, Manifest, from_json
from .paths import resolve_inside

REMEDY = "restore the file or convert again"
"""What to do about a damaged file."""
MAX_MANIFEST_NBYTES = 16_000_000
PULL_NAME = ".moepack-pull"
"""The folder inside a pack's where a pull keeps what it has not finished."""


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the pack in ``folder``.

    Raises:
        UsageError: There is no such folder.
        FormatError: The folder is not a complete pack, or the manifest is not valid.
    """
    with osio.io_errors(folder):
        if not folder.is_dir():
            raise UsageError("no such folder", where=folder)
        if not (folder / MANIFEST_NAME).exists():
            if (folder / PULL_NAME).is_dir():
                raise FormatError("unfinished pull: run pull again", where=folder)
            unfinished = (folder / JOURNAL_NAME).exists()
            what = "unfinished conversion" if unfinished else f"no {MANIFEST_NAME}"
            raise FormatError(f"{what}: run convert again", where=folder)
    descriptor = osio.open_regular(resolve_inside(folder, MANIFEST_NAME))
    try:
        size = os.fstat(descriptor).st_size
        if size > MAX_MANIFEST_NBYTES:
            raise FormatError(
                "manifest is over the cap",
                where=MANIFEST_NAME,
                wanted=f"<= {MAX_MANIFEST_NBYTES} bytes",
                got=size,
            )
        return from_json(osio.read_bytes(descriptor, 0, size, MANIFEST_NAME))
    finally:
        os.close(descriptor)


class Pack:
    """A pack opened for reading. Descriptors stay open, so a later re-conversion does no harm.

    Args:
        folder: The pack's folder.

    Raises:
        FormatError: Not a complete pack of a known version.
        IntegrityError: A file was truncated, exchanged or altered; names layer and expert.
        ResourceError: A file could not be opened.

    Attributes:
        folder: The pack's folder.
        manifest: The checked manifest.
        files: The open layer files.
        layers: For each MoE layer, its experts' records in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.files: list[LayerFile] = []
        try:
            layer_files = {name for layer in self.manifest.layers for name in layer.files}
            for name in self.manifest.files:
                self._check_present(name, is_layer=name in layer_files)
            self.layers = [self._open_layer(entry) for entry in self.manifest.layers]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every layer file."""
        for file in self.files:
            file.close()
        self.files.clear()

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_present(self, name: str, *, is_layer: bool) -> None:
        path, facts = resolve_inside(self.folder, name), self.manifest.files[name]
        try:
            with osio.io_errors(name):
                found = path.stat()
        except ResourceError as error:
            if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
                raise FormatError("file is missing", where=name, remedy=REMEDY) from None
            raise
        if not stat.S_ISREG(found.st_mode):
            raise FormatError("not a regular file", where=name)
        # A layer file's size is checked with its header, which tells the expert. Others that are
        # not tensors may be edited by hand; `verify` reports them.
        if facts.header_xxh3 is not None and not is_layer and found.st_size != facts.size:
            raise IntegrityError(
                "the file has another size than when it was written",
                where=name,
                wanted=f"{facts.size} bytes",
                got=found.st_size,
                remedy=REMEDY,
            )

    def _open_layer(self, entry: LayerEntry) -> list[RecordLocation]:
        locations: dict[int, RecordLocation] = {}
        for name in entry.files:
            file = LayerFile(resolve_inside(self.folder, name), name)
            self.files.append(file)
            self._check_file(file, entry)
            locations.update(file.locations)
        # Every expert is below num_experts, so that their number says whether all are here.
        if len(locations) != entry.num_experts:
            raise FormatError(
                "experts are missing",
                where=f"layer {entry.index}",
                wanted=entry.num_experts,
                got=len(locations),
            )
        return [locations[expert] for expert in range(entry.num_experts)]

    def _check_file(self, file: LayerFile, entry: LayerEntry) -> None:
        """The file must be the one that the manifest means, and whole."""
        layer = file.layer
        if (layer.layer, layer.module) != (entry.index, entry.module):
            raise IntegrityError(
                "this file belongs to another layer: two files were swapped",
                where=file.name,
                wanted=f"layer {entry.index} ({entry.module})",
                got=f"layer {layer.layer} ({layer.module})",
                remedy=REMEDY,
            )
        if layer.num_experts != entry.num_experts:
            raise FormatError(
                "expert count differs from the manifest's",
                where=file.name,
                wanted=entry.num_experts,
                got=layer.num_experts,
            )
        size = file.size
        if size < file.header.end:
            at = next(e for e, at in file.locations.items() if at.offset + at.spec.nbytes > size)
            raise IntegrityError(
                f"layer {entry.index}, expert {at}: the file is truncated",
                where=file.name,
                wanted=f"{file.header.end} bytes",
                got=size,
                remedy=REMEDY,
            )
        if size > file.header.end:
            raise FormatError(
                "bytes follow the last record", where=file.name, wanted=file.header.end, got=size
            )
        facts = self.manifest.files[file.name]
        if checksum.xxh3(file.header.raw) != facts.header_xxh3:
            raise IntegrityError(
                f"layer {entry.index}: the header is not the one that was written",
                where=file.name,
                remedy=REMEDY,
            )


def check_record(data: memoryview, location: RecordLocation, layer: int, expert: int) -> None:
    """Compare a record's bytes with its checksum.

    Raises:
        IntegrityError: They differ; names the layer and the expert.
    """
    got = checksum.xxh3(data)
    if got != location.xxh3:
        raise IntegrityError(
            f"layer {layer}, expert {expert}: the record's bytes are damaged",
            where=location.file,
            wanted=f"xxh3 {location.xxh3}",
            got=got,
            remedy=REMEDY,
        )
