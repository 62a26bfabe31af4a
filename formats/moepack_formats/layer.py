"""Layer files: one safetensors file per MoE layer, one U8 tensor per expert.

The records' layout and checksums stand in the header's ``__metadata__`` under ``moepack``. A layer
over the size limit is split; a record never spans files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import FORMAT_VERSION, RECORD_ALIGN, checksum, osio, strict_json
from .errors import FormatError
from .journal import Journal
from .record import RecordSpec, check_spec
from .tensor_file import Header, TensorPlan, read_header_only
from .writer import TensorFileWriter

METADATA_KEY = "moepack"
MAX_FILE_NBYTES = 5_000_000_000


@dataclass(frozen=True)
class LayerHeader:
    """What a layer file says of itself.

    Attributes:
        format_version: Version of the format.
        layer: Ordinal of the MoE layer in the model, from 0.
        module: Dotted name of its experts module.
        num_experts: Experts of the whole layer.
        first_expert: First expert in this file.
        specs: The distinct record layouts.
        spec_of: For each expert of this file, the index of its layout.
        xxh3: For each expert of this file, the checksum of its record.
    """

    format_version: int
    layer: int
    module: str
    num_experts: int
    first_expert: int
    specs: tuple[RecordSpec, ...]
    spec_of: tuple[int, ...]
    xxh3: tuple[str, ...]


@dataclass(frozen=True)
class LayerPlan:
    """A layer to be written.

    Attributes:
        index: Ordinal of the MoE layer.
        module: Dotted name of its experts module.
        specs: The distinct record layouts.
        spec_of: For each expert, the index of its layout.
    """

    index: int
    module: str
    specs: tuple[RecordSpec, ...]
    spec_of: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return len(self.spec_of)

    def spec(self, expert: int) -> RecordSpec:
        """The record layout of one expert."""
        return self.specs[self.spec_of[expert]]

    @property
    def nbytes(self) -> int:
        """Bytes of all its records."""
        return sum(self.specs[i].nbytes for i in self.spec_of)

    def files(self, max_nbytes: int = MAX_FILE_NBYTES) -> list[tuple[str, range]]:
        """File names and the experts in each, none over ``max_nbytes`` of records."""
        starts, filled = [0], 0
        for expert, spec in enumerate(self.spec_of):
            size = self.specs[spec].nbytes
            if filled and filled + size > max_nbytes:
                starts.append(expert)
                filled = 0
            filled += size
        stem = f"experts/layer-{self.index:05d}"
        if len(starts) == 1:
            return [(f"{stem}.safetensors", range(self.num_experts))]
        stops = [*starts[1:], self.num_experts]
        return [
            (f"{stem}-of-{len(starts):05d}-{i:05d}.safetensors", range(start, stop))
            for i, (start, stop) in enumerate(zip(starts, stops, strict=True))
        ]


def layer_writer(
    folder: Path, plan: LayerPlan, name: str, experts: range, journal: Journal
) -> TensorFileWriter:
    """A writer for one file of a layer; records are appended in the order of ``experts``."""

    def metadata(digests: Sequence[str]) -> dict[str, str]:
        header = LayerHeader(
            format_version=FORMAT_VERSION,
            layer=plan.index,
            module=plan.module,
            num_experts=plan.num_experts,
            first_expert=experts.start,
            specs=plan.specs,
            spec_of=tuple(plan.spec_of[e] for e in experts),
            xxh3=tuple(digests),
        )
        return {"format": "pt", METADATA_KEY: strict_json.dumps(header)}

    tensors = [TensorPlan(f"experts.{e}", "U8", (plan.spec(e).nbytes,)) for e in experts]
    return TensorFileWriter(folder, name, tensors, metadata, journal)


@dataclass(frozen=True)
class RecordLocation:
    """Where a record is.

    Attributes:
        file: Name of its file in the pack.
        descriptor: Open file descriptor.
        offset: First byte, a multiple of 4096.
        spec: Its layout; ``spec.nbytes`` is what to read.
        xxh3: Its checksum.
    """

    file: str
    descriptor: int
    offset: int
    spec: RecordSpec
    xxh3: str


class LayerFile:
    """An open layer file whose header was checked.

    Args:
        path: Where it is.
        name: What to call it in messages.

    Raises:
        FormatError: It is not a layer file of this format.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.descriptor = osio.open_regular(path)
        try:
            self.header = read_header_only(self.descriptor, name)
            self.layer = _layer_header(self.header, name)
            self.locations = self._locate()
        except BaseException:
            self.close()
            raise

    @property
    def experts(self) -> range:
        """The experts whose records are here."""
        return range(self.layer.first_expert, self.layer.first_expert + len(self.layer.spec_of))

    @property
    def size(self) -> int:
        """Bytes that the file has now."""
        return os.fstat(self.descriptor).st_size

    def close(self) -> None:
        """Close the descriptor."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _locate(self) -> dict[int, RecordLocation]:
        layer, tensors = self.layer, self.header.tensors
        names = [f"experts.{e}" for e in self.experts]
        for name in names:
            if name not in tensors:
                raise FormatError("an expert is missing", where=self.name, wanted=name)
        if len(tensors) != len(names):
            extra = next(iter(tensors.keys() - names))
            raise FormatError("unknown tensor", where=self.name, got=extra)
        if list(tensors) != names:
            raise FormatError("records are not in the order of the experts", where=self.name)
        locations = {}
        for expert, name, spec, digest in zip(
            self.experts, names, layer.spec_of, layer.xxh3, strict=True
        ):
            entry, place = tensors[name], f"{self.name}, expert {expert}"
            nbytes = layer.specs[spec].nbytes
            if entry.dtype != "U8" or entry.shape != (nbytes,):
                raise FormatError(
                    "record has the wrong type or size",
                    where=place,
                    wanted=f"U8 [{nbytes}]",
                    got=f"{entry.dtype} {list(entry.shape)}",
                )
            locations[expert] = RecordLocation(
                self.name, self.descriptor, entry.start, layer.specs[spec], digest
            )
        return locations


def _layer_header(header: Header, name: str) -> LayerHeader:
    if header.data_start % RECORD_ALIGN:
        raise FormatError(
            "records are not aligned: another program has saved this file again",
            where=name,
            wanted=f"data at a multiple of {RECORD_ALIGN}",
            got=header.data_start,
            remedy="restore the original file or convert again",
        )
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        raise FormatError("not a layer file: no moepack metadata", where=name)
    fields = strict_json.loads(text.encode(), name)
    version = fields.get("format_version")
    # Before the fields, which a newer version may have changed.
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise _unknown_version(version, name)
    layer = strict_json.decode(LayerHeader, fields, f"{name}: {METADATA_KEY}")
    count = len(layer.spec_of)
    if layer.format_version != FORMAT_VERSION:
        raise _unknown_version(layer.format_version, name)
    if not count or len(layer.xxh3) != count or layer.first_expert + count > layer.num_experts:
        raise FormatError("expert counts disagree", where=name, wanted=layer.num_experts, got=count)
    for i, spec in enumerate(layer.specs):
        check_spec(spec, f"{name}, layout {i}")
    if any(i >= len(layer.specs) for i in layer.spec_of):
        raise FormatError("an expert names a layout that is not there", where=name)
    for expert, digest in enumerate(layer.xxh3, layer.first_expert):
        checksum.check_hex(digest, checksum.XXH3_CHARS, f"{name}, expert {expert}")
    return layer


def _unknown_version(version: int, name: str) -> FormatError:
    return FormatError(
        "unknown format version",
        where=name,
        wanted=FORMAT_VERSION,
        got=version,
        remedy="upgrade moepack",
    )
