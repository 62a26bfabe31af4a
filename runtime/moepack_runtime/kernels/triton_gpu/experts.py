"""Launching the kernels for the experts of one MoE layer.

Records are named by device addresses in a table, so that a launch needs nothing of the host but
the shapes: which experts a token goes to may stay on the device.

Shape letters: T tokens, K choices of a token, E experts, H hidden size, I intermediate size,
P = T * K places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepack_formats.record import RecordSpec, SubTensor
from moepack_formats.schemes import BLOCK_COLS, TILE_ROWS

from ..activation import Activation
from . import matmul, matvec, sizes
from .layout import cell_width
from .products import check_packed, combine


@dataclass(frozen=True)
class RecordTable:
    """Where the records of a layer are.

    Attributes:
        addresses: ``[E]`` int64 on the device; multiples of 16.
        layout_of: ``[E]`` int64 on the device, indices of ``layouts``.
        layouts: The distinct layouts.
    """

    addresses: Tensor
    layout_of: Tensor
    layouts: tuple[RecordSpec, ...]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.addresses)


@dataclass(frozen=True)
class ExpertShape:
    """What the experts of a layer have in common.

    Attributes:
        hidden: H.
        intermediate: I.
        experts: How many the layer has, wherever their records are.
        gated: Whether there is a gate.
        activation: Kind, alpha, limit and offset of up; see csrc/moepack.h.
    """

    hidden: int
    intermediate: int
    experts: int
    gated: bool
    activation: Activation


class GpuExperts:
    """The experts of one MoE layer on a GPU.

    Args:
        shape: Their sizes and activation.
    """

    def __init__(self, shape: ExpertShape) -> None:
        self.shape = shape
        self._split = sizes.split_inputs(shape.hidden, shape.intermediate)

    @staticmethod
    def table(records: Sequence[Tensor], specs: Sequence[RecordSpec]) -> RecordTable:
        """A table of records anywhere on one device; their number is the index.

        Raises:
            FormatError: A record is shorter than its layout says.
            ValueError: Records are on several devices, or not aligned.
        """
        device = records[0].device
        for record, spec in zip(records, specs, strict=True):
            check_packed(record, spec.payload_nbytes, device)
        layouts = tuple({id(spec): spec for spec in specs}.values())
        numbers = {id(spec): number for number, spec in enumerate(layouts)}
        addresses = [record.data_ptr() for record in records]
        both = torch.tensor([addresses, [numbers[id(spec)] for spec in specs]])
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        return RecordTable(both[0], both[1], layouts)

    def partial(self, choices: int, device: torch.device) -> Tensor:
        """Room for :meth:`one_token`: ``[K, S, H]`` float32."""
        shape = choices, self._split.count, self.shape.hidden
        return torch.empty(shape, dtype=torch.float32, device=device)

    def one_token(self, x: Tensor, index: Tensor, table: RecordTable, partial: Tensor) -> None:
        """Compute the chosen experts at one token.

        Choices that are no expert (``index`` below 0, or E and more) are left out, so that a token
        can be computed in several turns.

        Args:
            x: ``[H]``.
            index: ``[K]`` int64 on the device.
            table: The layer's records.
            partial: From :meth:`partial`; :func:`combine` makes the sum of it.
        """
        at, (kind, alpha, limit, offset) = self.shape, self.shape.activation
        h = x.new_empty(len(index), at.intermediate, dtype=torch.float32)
        up_tiles = TILE_ROWS if at.gated else 2 * TILE_ROWS
        for number, spec in enumerate(table.layouts):
            up, up_bias, down, down_bias = self._parts(spec)
            matvec.experts_up[(-(-at.intermediate // up_tiles), len(index))](
                x,
                index,
                *self._records(table, number),
                *_matrix(up, up_bias, at.hidden),
                alpha,
                limit,
                offset,
                h,
                SCHEME=up.scheme,
                GATED=at.gated,
                HAS_BIAS=up_bias is not None,
                KIND=kind,
                W=sizes.vector_cells(up.scheme),
                EVEN=at.hidden % BLOCK_COLS == 0,
                num_warps=sizes.VECTOR_WARPS,
            )
            matvec.experts_down[
                (
                    -(-at.hidden // (TILE_ROWS * sizes.VECTOR_TILES)),
                    self._split.count,
                    len(index),
                )
            ](
                h,
                index,
                *self._records(table, number),
                *_matrix(down, down_bias, at.intermediate),
                self._split.blocks,
                partial,
                SCHEME=down.scheme,
                HAS_BIAS=down_bias is not None,
                N=sizes.VECTOR_TILES,
                W=sizes.vector_cells(down.scheme),
                EVEN=at.intermediate % BLOCK_COLS == 0,
                num_warps=sizes.VECTOR_WARPS,
            )

    def warm_up(self, specs: Sequence[RecordSpec], device: torch.device) -> None:
        """Compile what one token takes with these layouts, before a text needs it.

        The launches compute nothing: none of their choices is an expert.

        Args:
            specs: Of all records of the layer.
            device: The GPU.
        """
        nothing = torch.zeros(1, dtype=torch.int64, device=device)
        layouts = tuple({id(spec): spec for spec in specs}.values())
        table = RecordTable(nothing[:0], nothing[:0], layouts)
        x = torch.zeros(self.shape.hidden, device=device)
        partial, weights = self.partial(1, device).zero_(), torch.zeros(1, device=device)
        self.one_token(x, nothing, table, partial)
        combine(partial, weights, x)
        combine(partial, weights, x.unsqueeze(0))
        combine(x.view(1, 1, -1), None, torch.empty_like(x))
        combine(partial, weights, x, index=nothing, num_experts=0)

    def token(self, x: Tensor, index: Tensor, weights: Tensor, table: RecordTable) -> Tensor:
        """``x`` [H], ``index`` [K] and ``weights`` [K] float32 to the weighted sum [H] float32."""
        partial = self.partial(len(index), x.device)
        self.one_token(x, index, table, partial)
        y = x.new_empty(self.shape.hidden, dtype=torch.float32)
        combine(partial, weights, y, index=index, num_experts=table.num_experts)
        return y

    def many_tokens(
        self, x: Tensor, index: Tensor, weights: Tensor, table: RecordTable, out: Tensor
    ) -> None:
        """Compute the chosen experts at many tokens.

        Args:
            x: ``[T, H]``.
            index: ``[T, K]`` int64; places that are no expert (E and more) are left out.
            weights: ``[T, K]`` float32.
            table: The layer's records.
            out: ``[P, H]`` float32; the weighted outputs of the places that were computed are
                written, nothing else is.
        """
        tokens, choices = index.shape
        at, (kind, alpha, limit, offset) = self.shape, self.shape.activation
        # Of the layer's experts and not of the table's: what a turn has changes no rounding.
        rows = sizes.rows_tile(tokens * choices / at.experts, x)
        order, tiles = sort_places(index, table.num_experts, rows)
        source, columns = x[order // choices], sizes.columns_tile()
        stored = -(-at.intermediate // TILE_ROWS) * TILE_ROWS * (2 if at.gated else 1)
        weights = weights.reshape(-1).float().contiguous()
        for number, spec in enumerate(table.layouts):
            up, up_bias, down, down_bias = self._parts(spec)
            laid = sizes.arrange(source, up.scheme)
            # Zeros: what is beyond I meets the minima of down's padding.
            h = x.new_zeros(len(order), sizes.arranged_width(at.intermediate, down.scheme))
            matmul.up_rows[(tiles.expert.numel(), -(-stored // columns))](
                laid,
                laid.shape[1],
                tiles.expert,
                tiles.first,
                tiles.last,
                *self._records(table, number),
                *_matrix(up, up_bias, at.hidden),
                alpha,
                limit,
                offset,
                h,
                h.shape[1],
                SCHEME=up.scheme,
                GATED=at.gated,
                HAS_BIAS=up_bias is not None,
                KIND=kind,
                DOWN_CELL=cell_width(down.scheme),
                DOWN_W=sizes.chunk_cells(down.scheme),
                M=rows,
                C=columns,
                W=sizes.chunk_cells(up.scheme),
                PRECISION="ieee",
                num_warps=sizes.VECTOR_WARPS,
                num_stages=sizes.ROWS_STAGES,
            )
            matmul.down_rows[(tiles.expert.numel(), -(-at.hidden // columns))](
                h,
                h.shape[1],
                tiles.expert,
                tiles.first,
                tiles.last,
                *self._records(table, number),
                *_matrix(down, down_bias, at.intermediate),
                order,
                weights,
                out,
                SCHEME=down.scheme,
                HAS_BIAS=down_bias is not None,
                M=rows,
                C=columns,
                W=sizes.chunk_cells(down.scheme),
                PRECISION="ieee",
                num_warps=sizes.VECTOR_WARPS,
                num_stages=sizes.ROWS_STAGES,
            )

    def _records(self, table: RecordTable, layout: int) -> tuple[Tensor | int, ...]:
        """What every kernel is told of the records: where they are, and the layer's sizes."""
        sizes_of = self.shape.hidden, self.shape.intermediate
        return table.addresses, table.layout_of, layout, table.num_experts, *sizes_of

    def _parts(
        self, spec: RecordSpec
    ) -> tuple[SubTensor, SubTensor | None, SubTensor, SubTensor | None]:
        first = "gate_up" if self.shape.gated else "up"
        up, down = spec.tensor(first), spec.tensor("down")
        assert up is not None  # check_spec has seen both
        assert down is not None
        return up, spec.tensor(f"{first}_bias"), down, spec.tensor("down_bias")


def _matrix(part: SubTensor, bias: SubTensor | None, cols: int) -> tuple[int, int, int]:
    """What a kernel is told of a matrix in a record: its offset, its bias's, a tile's bytes."""
    return part.offset, bias.offset if bias else 0, sizes.tile_nbytes(part.scheme, cols)


@dataclass(frozen=True)
class RowTiles:
    """Tiles of sorted rows, each of one expert.

    Attributes:
        expert: ``[n]`` int32; E for tiles that have no rows.
        first: ``[n]`` int32, the first row.
        last: ``[n]`` int32, the row after the last of the tile.
    """

    expert: Tensor
    first: Tensor
    last: Tensor


def sort_places(index: Tensor, num_experts: int, rows: int) -> tuple[Tensor, RowTiles]:
    """Sort places by expert and cut them into tiles, without asking the device anything.

    Args:
        index: ``[T, K]`` int64; E and more is no expert.
        num_experts: E.
        rows: Rows of a tile.

    Returns:
        The places in the order of their experts, ``[P]`` int64, and the tiles. There are as many
        tiles as there could be at most, since only the device knows how many there are.
    """
    chosen = index.reshape(-1).clamp(max=num_experts)
    chosen = torch.where(chosen < 0, num_experts, chosen)
    order = chosen.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    starts = counts.cumsum(0) - counts
    tiles = (counts + rows - 1) // rows
    tiles[num_experts] = 0
    ends = tiles.cumsum(0)
    most = min(len(chosen), len(chosen) // rows + num_experts)
    number = torch.arange(most, device=index.device)
    expert = torch.searchsorted(ends, number, right=True).clamp(max=num_experts)
    first = starts[expert] + (number - (ends - tiles)[expert]) * rows
    last = torch.minimum(first + rows, starts[expert] + counts[expert])
    expert = torch.where(number < ends[num_experts], expert, num_experts)
    return order, RowTiles(expert.int(), first.int(), last.int())
