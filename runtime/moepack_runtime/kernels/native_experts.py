"""Whole experts in one native call.

Shape letters: T tokens, K experts of a token, H hidden size.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moepack_formats.record import RecordSpec

from .native_buffers import check_bytes, check_floats, check_rows
from .native_interface import (
    ACTIVATION_KINDS,
    POINTER,
    SCHEME_NUMBERS,
    Activation,
    ExpertsLayer,
    Layout,
)
from .native_library import check, loaded


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
        self._activation = Activation(ACTIVATION_KINDS.index(kind), *numbers)
        # By identity: hashing a spec takes as long as the rest of the call's preparation.
        self._layouts: dict[int, tuple[RecordSpec, Layout]] = {}

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
        x_address = check_floats(x, (hidden,), "x")
        weights_address = check_floats(weights, (count,), "weights")
        for record, spec in zip(records, specs, strict=True):
            check_bytes(record, spec.payload_nbytes, "record")
        if outputs is not None:
            check_floats(outputs, (count, hidden), "outputs")
        y = torch.empty(hidden, dtype=torch.float32) if outputs is None else None
        pointers = POINTER * count
        check(
            loaded().moepack_experts(
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
        records: Sequence[Tensor],
        specs: Sequence[RecordSpec],
        sizes: Sequence[int],
        tokens: Tensor,
        places: Tensor,
        weights: Tensor,
        outputs: Tensor,
        *,
        int8: bool,
        threads: int,
    ) -> None:
        """Send tokens through some experts; their weighted outputs go to rows of ``outputs``.

        Args:
            x: ``[T, H]`` float32.
            records: The experts' records, uint8.
            specs: Their layouts.
            sizes: How many tokens go through each; N in all.
            tokens: ``[N]`` int64, rows of ``x``: those of the first expert, then of the next.
            places: ``[N]`` int64, rows of ``outputs``, each once.
            weights: ``[N]`` float32, the router's.
            outputs: ``[P, H]`` float32.
            int8: Whether activations are rounded to 8 bits.
            threads: How many to use.

        Raises:
            FormatError: A record is too short.
            TypeError: A tensor has another dtype or is not on the CPU.
            ValueError: A tensor has another shape or is not contiguous, or a row does not exist.
        """
        (hidden, intermediate), experts, count = self._sizes, len(records), sum(sizes)
        for record, spec, _ in zip(records, specs, sizes, strict=True):
            check_bytes(record, spec.payload_nbytes, "record")
        check_rows(tokens, count, len(x), "tokens")
        check_rows(places, count, len(outputs), "places")
        pointers = POINTER * experts
        check(
            loaded().moepack_experts_tokens(
                pointers(*(record.data_ptr() for record in records)),
                pointers(*(ctypes.addressof(self._layout(spec)) for spec in specs)),
                (ctypes.c_int64 * (experts + 1))(0, *itertools.accumulate(sizes)),
                experts,
                hidden,
                intermediate,
                ctypes.addressof(self._activation),
                self._gated,
                check_floats(x, (len(x), hidden), "x"),
                tokens.data_ptr(),
                places.data_ptr(),
                check_floats(weights, (count,), "weights"),
                check_floats(outputs, (len(outputs), hidden), "outputs"),
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
        records = (POINTER * len(specs))()
        layouts = (POINTER * len(specs))(*(ctypes.addressof(self._layout(s)) for s in specs))
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

    def _layout(self, spec: RecordSpec) -> Layout:
        known = self._layouts.get(id(spec))
        if known is None:
            first = "gate_up" if self._gated else "up"
            offsets = [
                -1 if tensor is None else tensor.offset
                for tensor in map(spec.tensor, (first, f"{first}_bias", "down", "down_bias"))
            ]
            schemes = [
                -1 if tensor is None else SCHEME_NUMBERS[tensor.scheme]
                for tensor in map(spec.tensor, (first, "down"))
            ]
            # Kept with the spec, so that its identity is not given to another one.
            known = spec, Layout(*schemes, *offsets, spec.payload_nbytes)
            self._layouts[id(spec)] = known
        return known[1]
