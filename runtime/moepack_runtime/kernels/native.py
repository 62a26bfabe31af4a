"""The native library: found, checked, and called with arguments that were checked first.

Packed bytes may start at any address; float buffers are contiguous float32. ``ctypes`` releases
the GIL during a call.

Shape letters: T tokens, K experts of a token, H hidden size.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepack_formats.errors import FormatError, UsageError
from moepack_formats.record import RecordSpec
from moepack_formats.schemes import SCHEMES, TILE_ROWS, Scheme

ABI = 2
ACTIVATION_KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

_SCHEME_NUMBERS = {name: number for number, name in enumerate(SCHEMES)}
_SUFFIX = "dylib" if sys.platform == "darwin" else "so"
_REFUSALS = {1: "a bad argument", 2: "a short buffer", 3: "not supported on this machine"}


class _Activation(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("up_offset", ctypes.c_float),
    )


class _Layout(ctypes.Structure):
    _fields_ = (
        ("first_scheme", ctypes.c_int32),
        ("down_scheme", ctypes.c_int32),
        ("first", ctypes.c_int64),
        ("first_bias", ctypes.c_int64),
        ("down", ctypes.c_int64),
        ("down_bias", ctypes.c_int64),
        ("nbytes", ctypes.c_int64),
    )


class ExpertsLayer(ctypes.Structure):
    """``moepack_experts_layer``: the experts of one layer whose records are at hand."""

    _fields_ = (
        ("records", ctypes.c_void_p),
        ("layouts", ctypes.c_void_p),
        ("experts", ctypes.c_int64),
        ("chosen", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("activation", _Activation),
        ("gated", ctypes.c_int32),
        ("demanded", ctypes.c_int64),
    )


_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "moepack_isa": (ctypes.c_char_p, []),
    "moepack_set_isa": (_INT, [ctypes.c_char_p]),
    "moepack_linear": (
        _INT,
        [_INT, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _INT, _INT],
    ),
    "moepack_decode": (
        _INT,
        [_INT, _POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _INT, _POINTER, _INT],
    ),
    "moepack_experts": (
        _INT,
        [*[_POINTER] * 3, *[_LONG] * 3, _POINTER, _INT, *[_POINTER] * 3, _INT, _INT],
    ),
    "moepack_expert_tokens": (
        _INT,
        [
            *[_POINTER] * 2,
            *[_LONG] * 2,
            _POINTER,
            _INT,
            *[_POINTER] * 4,
            _LONG,
            _POINTER,
            _INT,
            _INT,
        ],
    ),
    "moepack_sum_rows": (_INT, [_POINTER, _LONG, _LONG, _LONG, _POINTER, _INT]),
    "moepack_tape_run": (_LONG, [_POINTER, _LONG, _LONG, _INT, _INT]),
    "moepack_read": (ctypes.c_uint64, [_POINTER, _LONG, _INT]),
}


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    override = os.environ.get("MOEPACK_NATIVE_LIBRARY")
    folder = Path(__file__).parent.parent / "_native"
    path = Path(override) if override else folder / f"libmoepack_native.{_SUFFIX}"
    if not path.is_file():
        return f"the native library was not built ({path} does not exist)"
    try:
        library = ctypes.CDLL(str(path))
        abi = library.moepack_abi()
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"the native library cannot be loaded: {error}"
    if abi != ABI:
        return f"the native library is of another version (wanted ABI {ABI}, got {abi})"
    isa = os.environ.get("MOEPACK_ISA")
    if isa:
        _set_isa(library, isa)
    return library


def _set_isa(library: ctypes.CDLL, isa: str) -> None:
    status = library.moepack_set_isa(isa.encode())
    if status:
        raise UsageError(
            f"the instruction set {isa!r} is not supported on this machine"
            if status == 3
            else f"no instruction set {isa!r}",
            wanted="portable, avx2, avx512 or neon",
            got=isa,
            remedy="unset MOEPACK_ISA",
        )


def available() -> str | None:
    """Name of the instruction set the native kernels use here, None without them."""
    library = _load()
    return None if isinstance(library, str) else library.moepack_isa().decode()


def why_not() -> str:
    """Why the native kernels are not available; empty when they are."""
    library = _load()
    return library if isinstance(library, str) else ""


def set_isa(isa: str) -> None:
    """Compute with another instruction set; for tests and measurements.

    Raises:
        UsageError: No such instruction set, or not on this machine.
    """
    _set_isa(_library(), isa)


def read_memory(data: Tensor, threads: int) -> None:
    """Read every byte of a tensor once: what the bandwidth of memory is measured with."""
    _library().moepack_read(data.data_ptr(), data.numel() * data.element_size(), threads)


def linear(
    x: Tensor,
    packed: Tensor,
    scheme: Scheme,
    shape: tuple[int, int],
    bias: Tensor | None,
    *,
    int8: bool,
    threads: int,
) -> Tensor:
    """Multiply a few tokens with a packed matrix.

    Args:
        x: ``[T, cols]`` float32.
        packed: At least ``scheme.packed_nbytes(*shape)`` uint8.
        scheme: How it is packed.
        shape: True ``(rows, cols)``.
        bias: ``[rows]`` float32 or None.
        int8: Whether activations are rounded to 8 bits; raw schemes never do.
        threads: How many to use.

    Returns:
        ``[T, rows]`` float32.

    Raises:
        FormatError: The packed bytes are too short.
        TypeError: A tensor has another dtype or is not on the CPU.
        ValueError: A tensor has another shape or is not contiguous.
    """
    rows, cols = shape
    tokens = x.shape[0]
    _check_bytes(packed, _packed_nbytes(scheme.name, rows, cols), scheme.name)
    x_address = _check_floats(x, (tokens, cols), "x")
    bias_address = None if bias is None else _check_floats(bias, (rows,), "bias")
    y = torch.empty(tokens, rows)
    _check(
        _library().moepack_linear(
            _SCHEME_NUMBERS[scheme.name],
            packed.data_ptr(),
            packed.numel(),
            rows,
            cols,
            x_address,
            tokens,
            bias_address,
            y.data_ptr(),
            int8,
            threads,
        )
    )
    return y


def decode(
    packed: Tensor,
    scheme: Scheme,
    cols: int,
    rows: int,
    dtype: torch.dtype,
    *,
    tiles: Tensor | None = None,
    threads: int,
) -> Tensor:
    """Decode tiles to dense rows, to the same bits as the reference.

    Args:
        packed: The packed matrix, uint8.
        scheme: How it is packed.
        cols: True inputs of a row.
        rows: Rows wanted, counted from the first decoded tile; the last tile may be cut.
        dtype: float32 or bfloat16, others by way of float32.
        tiles: Indices of the tiles, int64 on the CPU; None for all from the first.
        threads: How many to use.

    Returns:
        ``[rows, cols]``.

    Raises:
        FormatError: The packed bytes are too short for a tile that was asked for.
        TypeError: A tensor has another dtype or is not on the CPU.
        ValueError: More rows are wanted than the tiles hold, or a tensor is not contiguous.
    """
    if tiles is not None and (tiles.dtype != torch.int64 or not tiles.is_contiguous()):
        raise TypeError("tile indices must be contiguous int64")
    count = -(-rows // TILE_ROWS) if tiles is None else len(tiles)
    if rows > count * TILE_ROWS:
        raise ValueError(f"{rows} rows are more than {count} tiles hold")
    if rows == 0:
        return torch.empty(0, cols, dtype=dtype)
    first, last = (0, count - 1) if tiles is None else (int(tiles.min()), int(tiles.max()))
    if first < 0:
        raise ValueError(f"negative tile index {first}")
    _check_bytes(packed, (last + 1) * scheme.tile_nbytes(cols), scheme.name)
    exact = dtype in (torch.float32, torch.bfloat16)
    out = torch.empty(rows, cols, dtype=dtype if exact else torch.float32)
    _check(
        _library().moepack_decode(
            _SCHEME_NUMBERS[scheme.name],
            packed.data_ptr(),
            packed.numel(),
            cols,
            None if tiles is None else tiles.data_ptr(),
            count,
            rows,
            int(dtype == torch.bfloat16),
            out.data_ptr(),
            threads,
        )
    )
    return out if exact else out.to(dtype)


class FusedExperts:
    """The experts of one MoE layer at one token, each call one walk over the records.

    Args:
        hidden: H.
        intermediate: Inputs of down.
        gated: Whether there is a gate.
        activation: ``(kind, alpha, limit, up_offset)``; see csrc/moepack.h.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        gated: bool,
        activation: tuple[str, float, float, float],
    ) -> None:
        kind, *numbers = activation
        self._sizes = hidden, intermediate
        self._gated = gated
        self._activation = _Activation(ACTIVATION_KINDS.index(kind), *numbers)
        # By identity: hashing a spec takes as long as the rest of the call's preparation.
        self._layouts: dict[int, tuple[RecordSpec, _Layout]] = {}

    def __call__(
        self,
        x: Tensor,
        records: Sequence[Tensor],
        specs: Sequence[RecordSpec],
        weights: Tensor,
        *,
        int8: bool,
        threads: int,
        outputs: Tensor | None = None,
    ) -> Tensor:
        """Compute, with the weighted sum in the order given.

        Args:
            x: ``[H]`` float32.
            records: K records, uint8.
            specs: Their layouts.
            weights: ``[K]`` float32, the router's.
            int8: Whether activations are rounded to 8 bits.
            threads: How many to use.
            outputs: ``[K, H]`` float32 that takes each expert's weighted output; nothing is
                summed then.

        Returns:
            ``[H]`` float32, or ``outputs``.

        Raises:
            FormatError: A record is too short.
            TypeError: A tensor has another dtype or is not on the CPU.
            ValueError: A tensor has another shape or is not contiguous.
        """
        count, (hidden, intermediate) = len(records), self._sizes
        x_address = _check_floats(x, (hidden,), "x")
        weights_address = _check_floats(weights, (count,), "weights")
        for record, spec in zip(records, specs, strict=True):
            _check_bytes(record, spec.payload_nbytes, "record")
        if outputs is not None:
            _check_floats(outputs, (count, hidden), "outputs")
        y = torch.empty(hidden) if outputs is None else None
        pointers = _POINTER * count
        _check(
            _library().moepack_experts(
                pointers(*(record.data_ptr() for record in records)),
                pointers(*(ctypes.addressof(self._layout(spec)) for spec in specs)),
                weights_address,
                count,
                hidden,
                intermediate,
                ctypes.addressof(self._activation),
                self._gated,
                x_address,
                None if y is None else y.data_ptr(),
                None if outputs is None else outputs.data_ptr(),
                int8,
                threads,
            )
        )
        result = y if outputs is None else outputs
        assert result is not None  # one of the two was made
        return result

    def tokens(
        self,
        x: Tensor,
        record: Tensor,
        spec: RecordSpec,
        tokens: Tensor,
        places: Tensor,
        weights: Tensor,
        outputs: Tensor,
        *,
        int8: bool,
        threads: int,
    ) -> None:
        """Send N tokens through one expert; their weighted outputs go to rows of ``outputs``.

        Args:
            x: ``[T, H]`` float32.
            record: The expert's record, uint8.
            spec: Its layout.
            tokens: ``[N]`` int64, rows of ``x``.
            places: ``[N]`` int64, rows of ``outputs``.
            weights: ``[N]`` float32, the router's.
            outputs: ``[P, H]`` float32.
            int8: Whether activations are rounded to 8 bits.
            threads: How many to use.

        Raises:
            FormatError: The record is too short.
            TypeError: A tensor has another dtype or is not on the CPU.
            ValueError: A tensor has another shape or is not contiguous, or a row does not exist.
        """
        hidden, intermediate = self._sizes
        count = len(tokens)
        _check_bytes(record, spec.payload_nbytes, "record")
        _check_rows(tokens, count, len(x), "tokens")
        _check_rows(places, count, len(outputs), "places")
        _check(
            _library().moepack_expert_tokens(
                record.data_ptr(),
                ctypes.addressof(self._layout(spec)),
                hidden,
                intermediate,
                ctypes.addressof(self._activation),
                self._gated,
                _check_floats(x, (len(x), hidden), "x"),
                tokens.data_ptr(),
                places.data_ptr(),
                _check_floats(weights, (count,), "weights"),
                count,
                _check_floats(outputs, (len(outputs), hidden), "outputs"),
                int8,
                threads,
            )
        )

    def layer(self, specs: Sequence[RecordSpec]) -> tuple[ExpertsLayer, ctypes.Array[Any]]:
        """What a tape computes a whole layer with.

        Args:
            specs: The layout of every expert's record.

        Returns:
            The layer, and the table of its records' addresses, all of them still missing.
        """
        records = (_POINTER * len(specs))()
        layouts = (_POINTER * len(specs))(*(ctypes.addressof(self._layout(s)) for s in specs))
        hidden, intermediate = self._sizes
        layer = ExpertsLayer(
            ctypes.addressof(records),
            ctypes.addressof(layouts),
            len(specs),
            0,
            hidden,
            intermediate,
            self._activation,
            self._gated,
        )
        layer.owner = (records, layouts, specs, self)  # addresses keep nothing alive
        return layer, records

    def _layout(self, spec: RecordSpec) -> _Layout:
        known = self._layouts.get(id(spec))
        if known is None:
            first = "gate_up" if self._gated else "up"
            offsets = [
                -1 if tensor is None else tensor.offset
                for tensor in map(spec.tensor, (first, f"{first}_bias", "down", "down_bias"))
            ]
            schemes = [
                -1 if tensor is None else _SCHEME_NUMBERS[tensor.scheme]
                for tensor in map(spec.tensor, (first, "down"))
            ]
            # Kept with the spec, so that its identity is not given to another one.
            known = spec, _Layout(*schemes, *offsets, spec.payload_nbytes)
            self._layouts[id(spec)] = known
        return known[1]


def play(steps: ctypes.Array[Any], begin: int, end: int, int8: bool, threads: int) -> int:
    """Run steps of a tape; see ``moepack_tape_run`` in csrc/moepack.h.

    Returns:
        The first step that was not done, ``end`` when all were.
    """
    at = int(_library().moepack_tape_run(steps, begin, end, int8, threads))
    if at < begin:
        raise ValueError("the native library refused a tape")
    return at


def sum_rows(rows: Tensor, threads: int) -> Tensor:
    """Sum ``[T, K, H]`` float32 over K, one row after the other, to ``[T, H]``."""
    tokens, count, width = rows.shape
    address = _check_floats(rows, (tokens, count, width), "rows")
    y = rows.new_empty(tokens, width)
    _check(_library().moepack_sum_rows(address, tokens, count, width, y.data_ptr(), threads))
    return y


@functools.cache
def _packed_nbytes(scheme: str, rows: int, cols: int) -> int:
    return SCHEMES[scheme].packed_nbytes(rows, cols)


def _library() -> ctypes.CDLL:
    library = _load()
    if isinstance(library, str):
        raise UsageError(library, remedy="install again with a C++ compiler, or use the reference")
    return library


def _check_bytes(packed: Tensor, wanted: int, where: str) -> None:
    if packed.dtype is not torch.uint8 or not packed.is_cpu:
        raise TypeError(f"packed bytes must be uint8 on the CPU, not {packed.dtype}")
    if not packed.is_contiguous():
        raise ValueError("packed bytes must be contiguous")
    size = packed.numel()
    if size < wanted:
        raise FormatError("packed bytes are too short", where=where, wanted=wanted, got=size)


def _check_floats(values: Tensor, shape: tuple[int, ...], name: str) -> int:
    """Check, and return the address."""
    if values.dtype is not torch.float32 or not values.is_cpu:
        raise TypeError(f"{name} must be float32 on the CPU, not {values.dtype}")
    if values.shape != shape or not values.is_contiguous():
        raise ValueError(f"{name} must be contiguous {list(shape)}, not {list(values.shape)}")
    address = values.data_ptr()
    if address % 4:
        raise ValueError(f"{name} does not start at a multiple of 4 bytes")
    return address


def _check_rows(rows: Tensor, count: int, limit: int, name: str) -> None:
    if rows.dtype is not torch.int64 or not rows.is_cpu or not rows.is_contiguous():
        raise TypeError(f"{name} must be contiguous int64 on the CPU")
    if rows.shape != (count,) or (count and not 0 <= int(rows.min()) <= int(rows.max()) < limit):
        raise ValueError(f"{name} must be [{count}] rows below {limit}")


def _check(status: int) -> None:
    if status:
        raise ValueError(f"the native library refused: {_REFUSALS.get(status, status)}")
