"""The number formats a matrix may be stored in.

A scheme fixes how many bits a weight's code has, how many inputs share a scale, and how the
scales themselves are stored. ``SPEC.md`` gives the bytes; this file gives the sizes.

A matrix ``[rows, cols]`` (outputs x inputs) is cut into tiles of 16 rows. Inside a tile the inputs
run in blocks of 64, and in *spans*: the smallest run of inputs that carries its own metadata.
Under 4-bit scales the last span of a row also has the blocks that are left over (SPEC.md, 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import FormatError

TILE_ROWS = 16
BLOCK_COLS = 64
SUPER_COLS = 256
"""Inputs under one float16 super-scale; of the last one of a row see `Scheme.span_runs`."""


@dataclass(frozen=True)
class Scheme:
    """One storage format.

    Attributes:
        name: The identifier in files.
        bits: Bits of one code; 16 or 32 for the raw schemes.
        group: Inputs that share one scale and one minimum; 0 for the raw schemes.
        scale_bits: Bits of one stored scale: 16 (float16), 8 (under a float32 scale per row),
            5 (signed) or 4 (both under a float16 super-scale per span) or 0 (raw).
        span: Inputs per self-contained run of bytes in a tile, a multiple of 64; of the last one
            fewer, or under 4-bit scales more.
        levels: What each code stands for, in scales, ascending, for schemes without minima. Empty:
            the code itself, and a minimum is subtracted.
    """

    name: str
    bits: int
    group: int
    scale_bits: int
    span: int
    levels: tuple[int, ...] = ()

    @property
    def is_raw(self) -> bool:
        """Whether the source's own bits are kept."""
        return self.group == 0

    @property
    def has_minima(self) -> bool:
        """Whether a group stores a minimum beside its scale."""
        return not self.is_raw and not self.levels

    @property
    def head_nbytes(self) -> int:
        """Bytes at the head of each tile: per-row float32 scales and min-scales."""
        return 2 * 4 * TILE_ROWS if self.scale_bits == 8 else 0

    @property
    def span_head_nbytes(self) -> int:
        """Bytes at the head of each span: super-scales, and what is left of 5-bit scales."""
        return 4 * TILE_ROWS if self.scale_bits in (4, 5) else 0

    def groups(self, cols: int) -> int:
        """Number of groups a row of ``cols`` inputs has; the last may be short."""
        return 0 if self.is_raw else -(-cols // self.group)

    def spans(self, cols: int) -> int:
        """Number of spans a row has."""
        return sum(count for count, _ in self.span_runs(cols))

    def span_runs(self, cols: int) -> tuple[tuple[int, int], ...]:
        """Runs of equal spans that a row is made of: how many, and the blocks of each.

        Blocks that are left over after full spans are a short span of their own. Under 4-bit scales
        they belong to the last full span, so that they need no super-scales of their own.
        """
        each = self.span // BLOCK_COLS
        full, rest = divmod(-(-cols // BLOCK_COLS), each)
        runs = (full, each), (min(rest, 1), rest)
        if self.scale_bits == 4 and full and rest:
            runs = (full - 1, each), (1, each + rest)
        return tuple(run for run in runs if run[0])

    def padded_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape after padding rows to 16 and columns to 64."""
        return -(-rows // TILE_ROWS) * TILE_ROWS, -(-cols // BLOCK_COLS) * BLOCK_COLS

    def span_nbytes(self, blocks: int) -> int:
        """Bytes of one span of ``blocks`` 64-input blocks in a 16-row tile."""
        codes = blocks * BLOCK_COLS * TILE_ROWS * self.bits // 8
        if self.is_raw:
            return codes
        groups = -(-blocks * BLOCK_COLS // self.group)
        nibbles = {16: 8, 8: 4, 5: 1, 4: 2}[self.scale_bits]  # of a group's scale and minimum
        return self.span_head_nbytes + codes + groups * nibbles * TILE_ROWS // 2

    def tile_nbytes(self, cols: int) -> int:
        """Bytes of one tile: 16 rows x all inputs."""
        runs = self.span_runs(cols)
        return self.head_nbytes + sum(count * self.span_nbytes(blocks) for count, blocks in runs)

    def packed_nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a packed matrix, metadata and padding included."""
        return -(-rows // TILE_ROWS) * self.tile_nbytes(cols)

    def bits_per_weight(self, rows: int, cols: int) -> float:
        """True bits a weight: every stored byte, over the weights that are real."""
        return self.packed_nbytes(rows, cols) * 8 / (rows * cols)


SIGNED_LEVELS = (-18, -12, -7, -3, 0, 4, 8, 13)
"""Eight levels fitted to groups of 16 weights of language models. Zero is one of them; the reach
differs by sign, as the largest weight of a group chooses the sign of its scale; and they are small,
so that products of 16 codes and bytes sum up in 16 bits."""

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("q2g64", bits=2, group=64, scale_bits=16, span=64),
        Scheme("q3g64", bits=3, group=64, scale_bits=16, span=64),
        Scheme("q4g64", bits=4, group=64, scale_bits=16, span=64),
        Scheme("q4g128", bits=4, group=128, scale_bits=16, span=128),
        Scheme("q6g64", bits=6, group=64, scale_bits=16, span=64),
        Scheme("q8g64", bits=8, group=64, scale_bits=16, span=64),
        Scheme("q2g16s8", bits=2, group=16, scale_bits=8, span=64),
        Scheme("q2g16s4", bits=2, group=16, scale_bits=4, span=256),
        Scheme("q3g32s4", bits=3, group=32, scale_bits=4, span=256),
        Scheme("q3g16s5", bits=3, group=16, scale_bits=5, span=256, levels=SIGNED_LEVELS),
        Scheme("f16", bits=16, group=0, scale_bits=0, span=64),
        Scheme("bf16", bits=16, group=0, scale_bits=0, span=64),
        Scheme("f32", bits=32, group=0, scale_bits=0, span=64),
    )
}

DEFAULT_SCHEME: dict[int, str] = {
    2: "q2g16s4",
    3: "q3g16s5",
    4: "q4g64",
    6: "q6g64",
    8: "q8g64",
}
"""The scheme an integer width stands for: the best measured of that width (docs/log.md)."""


def get_scheme(name: str, where: object = None) -> Scheme:
    """Look a scheme up by its name in a file; ``where`` is for the message.

    Raises:
        FormatError: No such scheme in this version of the format.
    """
    try:
        return SCHEMES[name]
    except (KeyError, TypeError):
        raise FormatError(
            "unknown scheme",
            where=where,
            wanted=f"one of {', '.join(SCHEMES)}",
            got=repr(name),
            remedy="upgrade moepack",
        ) from None
