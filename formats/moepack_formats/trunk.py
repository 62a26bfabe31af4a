"""The trunk's tensors, compared with what the manifest says of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from . import checksum
from .errors import REMEDY_DRAFT, FormatError, IntegrityError
from .manifest import PACKED_SUFFIX, Manifest, PackedEntry
from .pack import REMEDY
from .schemes import get_scheme
from .tensor_file import Header, TensorEntry, read_header


@dataclass(frozen=True)
class TrunkTensor:
    """One tensor of a trunk file.

    Attributes:
        entry: Its type, shape and place.
        digest: The xxh3-128 that its bytes must have.
        packed: How they are packed, None for plain values.
        place: File and name, for messages.
    """

    entry: TensorEntry
    digest: str
    packed: PackedEntry | None
    place: str

    def check(self, digest: str) -> None:
        """Compare the digest of the bytes that were read.

        Raises:
            IntegrityError: They are not those that were written.
        """
        if digest != self.digest:
            raise IntegrityError(
                "a trunk tensor's bytes are damaged",
                where=self.place,
                wanted=f"xxh3 {self.digest}",
                got=digest,
                remedy=REMEDY,
            )


def read_trunk_file(
    manifest: Manifest, descriptor: int, name: str, seen: Collection[str]
) -> tuple[Header, list[TrunkTensor]]:
    """The header of an open trunk file and its tensors, whose bytes are not read yet.

    Args:
        manifest: Of the pack.
        descriptor: Of the file.
        name: The file's name in the pack.
        seen: Tensors of other files.

    Raises:
        FormatError: The file is malformed, or holds a tensor that it should not, or of another
            size or type.
        IntegrityError: The header is not the one that was written.
    """
    header = read_header(descriptor, name)
    if checksum.xxh3(header.raw) != manifest.files[name].header_xxh3:
        raise IntegrityError(
            "the header is not the one that was written", where=name, remedy=REMEDY
        )
    tensors = []
    for entry in header.tensors.values():
        place = f"{name}: {entry.name}"
        digest = manifest.trunk.get(entry.name)
        if digest is None or entry.name in seen:
            raise FormatError("unknown tensor, or one that is in two files", where=place)
        tensors.append(TrunkTensor(entry, digest, _packed(manifest, entry, place), place))
    return header, tensors


def check_complete(manifest: Manifest, seen: Collection[str]) -> None:
    """Every tensor of the trunk has to be there.

    Raises:
        FormatError: One is missing.
    """
    missing = sorted(manifest.trunk.keys() - set(seen))
    if missing:
        raise FormatError("a trunk tensor is missing", where=missing[0], remedy=REMEDY)


def _packed(manifest: Manifest, tensor: TensorEntry, place: str) -> PackedEntry | None:
    """How a tensor of the trunk is packed, if it is."""
    if not tensor.name.endswith(PACKED_SUFFIX):
        return None
    entry = manifest.packed.get(tensor.name.removesuffix(PACKED_SUFFIX))
    if entry is not None:
        nbytes = get_scheme(entry.scheme).packed_nbytes(*entry.shape)
        if (tensor.dtype, tensor.shape) != ("U8", (nbytes,)):
            raise FormatError(
                "packed tensor has the wrong type or size",
                where=place,
                wanted=f"U8 [{nbytes}]",
                got=f"{tensor.dtype} {list(tensor.shape)}",
                remedy=REMEDY_DRAFT,
            )
    return entry
