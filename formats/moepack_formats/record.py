"""A record: everything one expert computes with, in one aligned run of bytes.

Sub-tensors stand in the order they are used: ``gate_up`` (or ``up`` where experts have no gate),
its bias, ``down``, its bias. In ``gate_up`` tiles alternate: 16 gate rows, then the same 16 rows of
up, so that a kernel which walks the bytes once has both halves of each output at hand.

Shape letters: H hidden size, I intermediate size of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import RECORD_ALIGN, TENSOR_ALIGN
from .errors import REMEDY_DRAFT, FormatError, IntegrityError
from .matrix import QuantizedMatrix, pack_matrix, unpack_matrix
from .schemes import TILE_ROWS, get_scheme
from .tiles import Bytes

TILES = "tiles"
GATE_UP_TILES = "gate_up_tiles"
VECTOR = "vector"
GATE_UP_VECTOR = "gate_up_vector"
_LAYOUTS = {
    "gate_up": GATE_UP_TILES,
    "gate_up_bias": GATE_UP_VECTOR,
    "up": TILES,
    "up_bias": VECTOR,
    "down": TILES,
    "down_bias": VECTOR,
}

Part = QuantizedMatrix | npt.NDArray[np.float32]


@dataclass(frozen=True)
class SubTensor:
    """One matrix or bias inside a record.

    Attributes:
        name: ``gate_up``, ``up``, ``down`` or one of these with ``_bias``.
        layout: How rows are ordered; fixed by the name.
        scheme: Name of the scheme; ``f32`` for biases.
        shape: True shape: ``[rows, cols]`` or ``[rows]``; gate and up count as 2 * I rows.
        padded: Shape with padding.
        offset: First byte in the record, a multiple of 256.
        nbytes: Size in bytes.
    """

    name: str
    layout: str
    scheme: str
    shape: tuple[int, ...]
    padded: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class RecordSpec:
    """What a record holds and where.

    Attributes:
        tensors: Sub-tensors in the order of their offsets.
        payload_nbytes: Bytes up to the end of the last sub-tensor.
        nbytes: Bytes with padding, a multiple of 4096.
    """

    tensors: tuple[SubTensor, ...]
    payload_nbytes: int
    nbytes: int

    def tensor(self, name: str) -> SubTensor | None:
        """The sub-tensor of that name, if the record has one."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)

    @property
    def parameters(self) -> int:
        """Weights and biases a record stands for, padding excluded."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """True bits a parameter, all padding and metadata included."""
        return self.nbytes * 8 / self.parameters


def plan_record(
    hidden: int,
    intermediate: int,
    gate_up_scheme: str,
    down_scheme: str,
    *,
    gated: bool = True,
    bias: bool = False,
) -> RecordSpec:
    """Lay out a record.

    Args:
        hidden: H, inputs of gate and up, outputs of down.
        intermediate: I, outputs of gate and up, inputs of down.
        gate_up_scheme: Scheme of gate and up (of up alone where there is no gate).
        down_scheme: Scheme of down.
        gated: Whether there is a gate projection.
        bias: Whether every projection has a bias.
    """
    first = "gate_up" if gated else "up"
    rows = intermediate * (2 if gated else 1)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {first: (gate_up_scheme, (rows, hidden))}
    if bias:
        shapes[f"{first}_bias"] = ("f32", (rows,))
    shapes["down"] = (down_scheme, (hidden, intermediate))
    if bias:
        shapes["down_bias"] = ("f32", (hidden,))
    tensors, offset = [], 0
    for name, (scheme, shape) in shapes.items():
        padded, nbytes = _extent(name, scheme, shape)
        tensors.append(SubTensor(name, _LAYOUTS[name], scheme, shape, padded, offset, nbytes))
        offset = _align(offset + nbytes, TENSOR_ALIGN)
    payload = tensors[-1].offset + tensors[-1].nbytes
    return RecordSpec(tuple(tensors), payload, _align(payload, RECORD_ALIGN))


def check_spec(spec: RecordSpec, where: str) -> None:
    """Check a spec that came from a file: sizes follow from shapes, nothing overlaps.

    Raises:
        FormatError: A field disagrees with the others.
    """
    names = tuple(tensor.name for tensor in spec.tensors)
    first = names[0] if names else None
    expected: tuple[str, ...] = (str(first), "down")
    if f"{first}_bias" in names:
        expected = (str(first), f"{first}_bias", "down", "down_bias")
    if first not in ("gate_up", "up") or names != expected:
        raise FormatError("sub-tensors are not those of an expert", where=where, got=list(names))
    end = 0
    for tensor in spec.tensors:
        start = _align(end, TENSOR_ALIGN)
        place = f"{where}, {tensor.name}"
        dimensions = 1 if tensor.layout.endswith(VECTOR) else 2
        if tensor.layout != _LAYOUTS[tensor.name] or len(tensor.shape) != dimensions:
            raise FormatError("wrong layout", where=place, wanted=_LAYOUTS[tensor.name])
        if min(tensor.shape) < 1 or (tensor.name.startswith("gate_up") and tensor.shape[0] % 2):
            raise FormatError("impossible shape", where=place, got=list(tensor.shape))
        padded, nbytes = _extent(tensor.name, tensor.scheme, tensor.shape, place)
        if (tensor.padded, tensor.nbytes) != (padded, nbytes):
            raise FormatError(
                "size does not follow from shape and scheme",
                where=place,
                wanted=f"{list(padded)}, {nbytes} bytes",
                got=f"{list(tensor.padded)}, {tensor.nbytes} bytes",
                remedy=REMEDY_DRAFT,
            )
        if tensor.offset % TENSOR_ALIGN:
            raise FormatError("misaligned sub-tensor", where=place, got=tensor.offset)
        if tensor.offset != start:
            what = "hole before a sub-tensor" if tensor.offset > start else "sub-tensors overlap"
            raise FormatError(what, where=place, wanted=start, got=tensor.offset)
        end = tensor.offset + nbytes
    _check_spec_shapes(spec, where)
    if spec.payload_nbytes != end or spec.nbytes != _align(end, RECORD_ALIGN):
        short = spec.nbytes < end
        raise FormatError(
            "record is shorter than its payload" if short else "record is not padded as it must be",
            where=where,
            wanted=f"{end} bytes of payload, padded to a multiple of {RECORD_ALIGN}",
            got=f"{spec.payload_nbytes} in {spec.nbytes}",
        )


def _check_spec_shapes(spec: RecordSpec, where: str) -> None:
    """The projections must fit together: down undoes the shape of gate and up."""
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
    gated = "gate_up" in shapes
    rows, hidden = shapes["gate_up" if gated else "up"]
    wanted = hidden, rows // (2 if gated else 1)
    biases = [shapes.get(f"{'gate_up' if gated else 'up'}_bias"), shapes.get("down_bias")]
    if shapes["down"] != wanted or biases not in ([None, None], [(rows,), (hidden,)]):
        raise FormatError("projections do not fit together", where=where, got=shapes)


def pack_record(spec: RecordSpec, parts: Mapping[str, Part]) -> Bytes:
    """Lay an expert's parts out as a record.

    Args:
        spec: From :func:`plan_record`.
        parts: ``gate``, ``up``, ``down`` as quantized ``[out, in]`` matrices, and ``gate_bias``,
            ``up_bias``, ``down_bias`` as float32 vectors.

    Returns:
        ``[spec.nbytes]`` uint8.

    Raises:
        FormatError: A part has another shape or scheme than planned.
        IntegrityError: A scale, a minimum or a bias is not finite.
    """
    record = np.zeros(spec.nbytes, np.uint8)
    for tensor in spec.tensors:
        stem, suffix = tensor.name.removesuffix("_bias"), tensor.name.endswith("_bias")
        names = ("gate", "up") if stem == "gate_up" else (stem,)
        packed = [
            _pack_part(parts[f"{n}_bias" if suffix else n], tensor, len(names)) for n in names
        ]
        # Tiles of gate and up alternate: [T, 2, bytes of a tile].
        joined = np.stack(
            [part.reshape(_tiles(tensor) // len(names), -1) for part in packed], axis=1
        )
        record[tensor.offset : tensor.offset + tensor.nbytes] = joined.reshape(-1)
    return record


def unpack_record(spec: RecordSpec, record: Bytes) -> dict[str, Part]:
    """Read the parts back: the inverse of :func:`pack_record`.

    Raises:
        FormatError: The record has another size.
    """
    if record.size != spec.nbytes:
        raise FormatError("record has the wrong size", wanted=spec.nbytes, got=record.size)
    return dict(_unpack_parts(spec, record))


def _unpack_parts(spec: RecordSpec, record: Bytes) -> Iterator[tuple[str, Part]]:
    for tensor in spec.tensors:
        data = record[tensor.offset : tensor.offset + tensor.nbytes]
        stem = tensor.name.removesuffix("_bias")
        names = ("gate", "up") if stem == "gate_up" else (stem,)
        halves = data.reshape(_tiles(tensor) // len(names), len(names), -1)
        rows = tensor.shape[0] // len(names)
        for i, name in enumerate(names):
            half = np.ascontiguousarray(halves[:, i]).reshape(-1)
            if len(tensor.shape) == 1:
                yield f"{name}_bias", half.view("<f4")[:rows].astype(np.float32)
            else:
                yield name, unpack_matrix(half, get_scheme(tensor.scheme), (rows, tensor.shape[1]))


def _pack_part(part: Part, tensor: SubTensor, share: int) -> Bytes:
    rows = tensor.shape[0] // share
    shape = (rows, *tensor.shape[1:])
    if part.shape != shape:
        raise FormatError("wrong shape", where=tensor.name, wanted=list(shape), got=part.shape)
    if isinstance(part, QuantizedMatrix):
        if part.scheme.name != tensor.scheme:
            raise FormatError(
                "wrong scheme", where=tensor.name, wanted=tensor.scheme, got=part.scheme.name
            )
        return pack_matrix(part)
    if not np.isfinite(part).all():
        raise IntegrityError("a bias is not finite", where=tensor.name)
    padded = np.zeros(tensor.padded[0] // share, "<f4")
    padded[:rows] = part
    return padded.view(np.uint8)


def _tiles(tensor: SubTensor) -> int:
    return tensor.padded[0] // TILE_ROWS


def _extent(
    name: str, scheme_name: str, shape: tuple[int, ...], where: object = None
) -> tuple[tuple[int, ...], int]:
    """Padded shape and bytes; gate and up are padded apart, so that tiles can alternate."""
    scheme = get_scheme(scheme_name, where)
    share = 2 if name.startswith("gate_up") else 1
    cols = shape[1] if len(shape) == 2 else 1
    rows, padded_cols = scheme.padded_shape(shape[0] // share, cols)
    if len(shape) == 1:
        if scheme_name != "f32":
            raise FormatError("a bias is not float32", where=where or name, got=scheme_name)
        return (rows * share,), rows * share * 4
    return (rows * share, padded_cols), share * scheme.packed_nbytes(shape[0] // share, cols)


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
