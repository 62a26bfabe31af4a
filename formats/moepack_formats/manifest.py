"""``moepack.json``: what a pack holds, how it was made, and the checksum of every file."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import FORMAT_VERSION, checksum, strict_json
from .errors import FormatError
from .paths import check_names
from .schemes import get_scheme

MANIFEST_NAME = "moepack.json"
FORMAT_NAME = "moepack"
PACKED_SUFFIX = ".packed"
TENSOR_FILE_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Source:
    """Where the weights came from.

    Attributes:
        id: Hub id, or the folder's name for a local source.
        revision: Commit of the Hub repository.
        license: Licence as the source states it.
    """

    id: str
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Recipe:
    """How it was quantized.

    Attributes:
        quantizer: Name of the quantizer.
        trunk_scheme: Scheme of the trunk's Linears, or ``source``.
        head_scheme: Scheme of embeddings and output head, or ``source``.
        expert_schemes: Schemes that expert projections have.
    """

    quantizer: str
    trunk_scheme: str
    head_scheme: str
    expert_schemes: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes; bits a weight follow from them."""

    expert_parameters: int
    expert_nbytes: int
    trunk_parameters: int
    trunk_nbytes: int
    source_nbytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of experts and trunk."""
        return self.expert_nbytes + self.trunk_nbytes

    @property
    def expert_bits(self) -> float:
        """True bits an expert weight, metadata and padding included."""
        return self.expert_nbytes * 8 / max(self.expert_parameters, 1)

    @property
    def trunk_bits(self) -> float:
        """True bits a trunk weight."""
        return self.trunk_nbytes * 8 / max(self.trunk_parameters, 1)

    @property
    def total_bits(self) -> float:
        """True bits a weight over the whole model."""
        return self.nbytes * 8 / max(self.expert_parameters + self.trunk_parameters, 1)


@dataclass(frozen=True)
class LayerEntry:
    """One MoE layer: its experts module and its files."""

    index: int
    module: str
    num_experts: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class PackedEntry:
    """A trunk module whose weight is stored in tiles, as the tensor ``<module>.packed``.

    Attributes:
        kind: ``linear`` or ``embedding``.
        scheme: Name of the scheme.
        shape: True ``(rows, cols)``.
        tied_to: For an output head that shares the codes of a packed embedding: the embedding's
            module. Such a head has no tensor of its own.
    """

    kind: str
    scheme: str
    shape: tuple[int, int]
    tied_to: str | None = None


@dataclass(frozen=True)
class FileEntry:
    """One file.

    Attributes:
        size: Bytes.
        sha256: Digest of the whole file, as the Hub's LFS object id.
        header_xxh3: Digest of a safetensors header, or None for other files.
    """

    size: int
    sha256: str
    header_xxh3: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The manifest.

    Attributes:
        format: Always ``moepack``.
        format_version: Version that wrote it.
        min_reader: Oldest version that can read it.
        generator: Program and version that wrote it.
        model_type: transformers' name of the family.
        architecture: Model class.
        source: Where the weights came from.
        recipe: How they were quantized.
        sizes: Parameters and bytes.
        layers: MoE layers in model order.
        packed: Trunk modules stored in tiles.
        trunk: xxh3-128 of each tensor in the trunk's files.
        files: Every file but the manifest and the model card.
    """

    format: str
    format_version: int
    min_reader: int
    generator: str
    model_type: str
    architecture: str
    source: Source
    recipe: Recipe
    sizes: Sizes
    layers: tuple[LayerEntry, ...]
    packed: dict[str, PackedEntry] = field(default_factory=dict)
    trunk: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)

    @property
    def trunk_files(self) -> list[str]:
        """Names of the safetensors files that hold the trunk: those that are no layer's."""
        layer_files = {name for layer in self.layers for name in layer.files}
        with_header = (n for n, facts in self.files.items() if facts.header_xxh3 is not None)
        return [name for name in with_header if name not in layer_files]


def to_json(manifest: Manifest) -> bytes:
    """The manifest as it is stored: UTF-8 JSON, fields in a fixed order."""
    return strict_json.dumps(manifest, indent=1).encode() + b"\n"


def from_json(data: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """Parse and check a manifest.

    Raises:
        FormatError: It is not one that this version reads.
    """
    value = strict_json.loads(data, where)
    if value.get("format") != FORMAT_NAME:
        raise FormatError(
            "not a moepack manifest", where=where, wanted=FORMAT_NAME, got=value.get("format")
        )
    # Before the fields, which a newer version may have changed.
    minimum = value.get("min_reader")
    if isinstance(minimum, int) and minimum > FORMAT_VERSION:
        raise FormatError(
            "the pack needs a newer reader",
            where=where,
            wanted=f"format version {FORMAT_VERSION} or older",
            got=minimum,
            remedy="upgrade moepack",
        )
    manifest = strict_json.decode(Manifest, value, where)
    if not 1 <= manifest.min_reader <= manifest.format_version:
        raise FormatError(
            "min_reader is not a version up to format_version",
            where=where,
            wanted=f"1 to {manifest.format_version}",
            got=manifest.min_reader,
        )
    _check_files(manifest, where)
    _check_trunk(manifest, where)
    _check_layers(manifest, where)
    return manifest


def _check_files(manifest: Manifest, where: str) -> None:
    check_names([MANIFEST_NAME, *manifest.files])
    if MANIFEST_NAME in manifest.files:
        raise FormatError("the manifest lists itself", where=where)
    for name, entry in manifest.files.items():
        place = f"{where}: {name}"
        checksum.check_hex(entry.sha256, checksum.SHA256_CHARS, place)
        if name.endswith(TENSOR_FILE_SUFFIX) != (entry.header_xxh3 is not None):
            raise FormatError("safetensors files, and only they, have a header_xxh3", where=place)
        if entry.header_xxh3 is not None:
            checksum.check_hex(entry.header_xxh3, checksum.XXH3_CHARS, place)


def _check_trunk(manifest: Manifest, where: str) -> None:
    for name, digest in manifest.trunk.items():
        checksum.check_hex(digest, checksum.XXH3_CHARS, f"{where}: {name}")
    for name, entry in manifest.packed.items():
        place = f"{where}: {name}"
        get_scheme(entry.scheme, place)
        if entry.kind not in ("linear", "embedding") or min(entry.shape) < 1:
            raise FormatError("unknown kind or impossible shape", where=place)
        if entry.tied_to is not None:
            embedding = manifest.packed.get(entry.tied_to)
            if embedding is None or (embedding.kind, embedding.tied_to) != ("embedding", None):
                raise FormatError(
                    "a head is tied to something else than a packed embedding",
                    where=place,
                    got=entry.tied_to,
                )
            if (entry.scheme, entry.shape) != (embedding.scheme, embedding.shape):
                raise FormatError("a tied head differs from its embedding", where=place)
        elif f"{name}{PACKED_SUFFIX}" not in manifest.trunk:
            raise FormatError("a packed module has no tensor in the trunk", where=place)


def _check_layers(manifest: Manifest, where: str) -> None:
    if [layer.index for layer in manifest.layers] != list(range(len(manifest.layers))):
        raise FormatError("layers are not numbered from 0", where=where)
    modules: set[str] = set()
    files: set[str] = set()
    for layer in manifest.layers:
        place = f"{where}: layer {layer.index}"
        if not layer.num_experts or not layer.files:
            raise FormatError("a layer without experts or without files", where=place)
        if layer.module in modules:
            raise FormatError("two layers have one module", where=place, got=layer.module)
        modules.add(layer.module)
        for name in layer.files:
            if name not in manifest.files:
                raise FormatError("a layer's file is not listed", where=place, wanted=name)
            if name in files or not name.endswith(TENSOR_FILE_SUFFIX):
                raise FormatError(
                    "a layer's file is named twice or not a safetensors file",
                    where=place,
                    got=name,
                )
            files.add(name)
