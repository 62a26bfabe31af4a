"""Packing and unpacking matrices: round trips, sizes, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack_formats.errors import FormatError, IntegrityError
from moepack_formats.matrix import (
    QuantizedMatrix,
    dequantize,
    floats_are_finite,
    pack_matrix,
    unpack_matrix,
)
from moepack_formats.schemes import SCHEMES, get_scheme
from moepack_formats.tiles import pack_codes, unpack_codes
from tests.formats.builders import SCHEME_NAMES, random_matrix

FIELDS = ("codes", "scales", "minima", "outer_scales", "outer_minima")
QUANTIZED = [name for name in SCHEME_NAMES if not SCHEMES[name].is_raw]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=150)
@given(
    name=st.sampled_from(SCHEME_NAMES),
    rows=st.integers(1, 50),
    cols=st.integers(1, 900),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(name: str, rows: int, cols: int, seed: int) -> None:
    scheme = get_scheme(name)
    matrix = random_matrix(scheme, rows, cols, rng(seed))
    packed = pack_matrix(matrix)
    assert packed.dtype == np.uint8
    assert packed.shape == (scheme.packed_nbytes(rows, cols),)
    back = unpack_matrix(packed, scheme, (rows, cols))
    for field in FIELDS:
        stored, found = getattr(matrix, field), getattr(back, field)
        assert (stored is None) == (found is None)
        if stored is not None:
            assert stored.dtype == found.dtype
            assert stored.tobytes() == found.tobytes(), field
    assert np.array_equal(pack_matrix(back), packed)
    assert floats_are_finite(packed.reshape(-1, scheme.tile_nbytes(cols)), scheme, cols)


@settings(max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 6, 8, 16, 32]),
    tiles=st.integers(1, 3),
    blocks=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_take_every_bit(bits: int, tiles: int, blocks: int, seed: int) -> None:
    """Packed codes and codes correspond one to one: any bytes are some codes."""
    nbytes = 16 * 64 * bits // 8
    packed = rng(seed).integers(0, 256, (tiles, blocks, nbytes)).astype(np.uint8)
    codes = unpack_codes(packed, bits)
    assert codes.shape == (16 * tiles, 64 * blocks)
    assert int(codes.max()) < 2**bits
    assert np.array_equal(pack_codes(codes, bits), packed)


@pytest.mark.parametrize("blocks", range(1, 14))
def test_what_is_left_over_has_super_scales_of_its_own_only_with_signed_scales(blocks: int) -> None:
    for cols in (64 * blocks, 64 * blocks - 63):
        for name, nbytes in (("q2g16s4", 320), ("q3g32s4", 416)):
            scheme = get_scheme(name)
            assert scheme.tile_nbytes(cols) == 64 * max(1, blocks // 4) + nbytes * blocks
            assert scheme.spans(cols) == max(1, blocks // 4)
        signed = get_scheme("q3g16s5")
        assert signed.tile_nbytes(cols) == 64 * -(-blocks // 4) + 416 * blocks


def test_two_bits_cost_no_more_where_blocks_are_left_over() -> None:
    scheme = get_scheme("q2g16s4")
    assert scheme.bits_per_weight(1536, 576) == pytest.approx(2.6111, abs=1e-4)
    assert all(scheme.bits_per_weight(16, 64 * blocks) <= 2.625 for blocks in range(4, 100))


def test_padding_is_zero_and_unread() -> None:
    for name in SCHEME_NAMES:
        scheme = get_scheme(name)
        matrix = random_matrix(scheme, 16, 64, rng())
        part = unpack_matrix(pack_matrix(matrix), scheme, (16, 64))
        cut = replace(
            part,
            shape=(3, 5),
            codes=part.codes[:3, :5],
            **{
                field: getattr(part, field)[:3, : (1 if field.startswith("outer") else None)]
                for field in FIELDS[1:]
                if getattr(part, field) is not None
            },
        )
        if not scheme.is_raw:
            groups = scheme.groups(5)
            cut = replace(cut, scales=cut.scales[:, :groups])
            if scheme.has_minima:
                cut = replace(cut, minima=cut.minima[:, :groups])
        assert np.array_equal(dequantize(cut), dequantize(part)[:3, :5])
        found = unpack_matrix(pack_matrix(cut), scheme, (16, 64))
        assert not found.codes[3:].any()
        assert not found.codes[:, 5:].any()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite_are_refused(name: str, value: float) -> None:
    scheme = get_scheme(name)
    fields = ("outer_scales", "outer_minima") if scheme.scale_bits != 16 else ("scales", "minima")
    for field in fields:
        matrix = random_matrix(scheme, 17, 300, rng())
        if getattr(matrix, field) is None:
            continue
        getattr(matrix, field)[16, -1] = value
        with pytest.raises(IntegrityError, match=f"{field} hold a value that is not finite") as e:
            pack_matrix(matrix)
        assert e.value.exit_code == 4


@pytest.mark.parametrize("name", QUANTIZED)
def test_scales_that_a_file_cannot_hold_are_refused(name: str) -> None:
    """A float32 scale that float16 rounds to infinity, a code over its bits."""
    scheme = get_scheme(name)
    matrix = random_matrix(scheme, 4, 64, rng())
    if scheme.scale_bits == 16:
        large = np.full(matrix.scales.shape, 65520, np.float32)
        with pytest.raises(IntegrityError, match="not finite"):
            pack_matrix(replace(matrix, scales=large))
        return
    lowest, top = {4: (0, 15), 5: (-16, 15), 8: (0, 255)}[scheme.scale_bits]
    for outside in (lowest - 1, top + 1):
        with pytest.raises(FormatError, match="scales do not fit their bits"):
            pack_matrix(replace(matrix, scales=np.full(matrix.scales.shape, outside)))
    if not scheme.has_minima:
        return
    with pytest.raises(FormatError, match="minima do not fit their bits"):
        pack_matrix(replace(matrix, minima=np.full(matrix.minima.shape, -129)))


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_arrays_that_do_not_fit_the_scheme_are_refused(name: str) -> None:
    scheme = get_scheme(name)
    matrix = random_matrix(scheme, 20, 300, rng())
    bad = [
        replace(matrix, codes=matrix.codes[:, :-1]),
        replace(matrix, codes=matrix.codes[:-1]),
        replace(matrix, codes=matrix.codes.astype(np.float32)),
        replace(matrix, codes=matrix.codes.astype(np.uint64)),
    ]
    if scheme.bits < 8:
        bad.append(replace(matrix, codes=np.full_like(matrix.codes, 1 << scheme.bits)))
    for field in FIELDS[1:]:
        values = getattr(matrix, field)
        if values is not None:
            bad += [
                replace(matrix, **{field: None}),
                replace(matrix, **{field: values[:-1]}),
                replace(matrix, **{field: np.concatenate([values, values], axis=1)}),
            ]
    for broken in bad:
        with pytest.raises(FormatError):
            pack_matrix(broken)


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_a_buffer_of_another_size_is_refused(name: str) -> None:
    scheme = get_scheme(name)
    packed = pack_matrix(random_matrix(scheme, 17, 65, rng()))
    for wrong in (packed[:-1], np.append(packed, np.uint8(0)), packed[:0]):
        with pytest.raises(FormatError, match="wrong size"):
            unpack_matrix(wrong, scheme, (17, 65))


def test_unpacking_needs_no_alignment_and_no_writable_buffer() -> None:
    for name in SCHEME_NAMES:
        scheme = get_scheme(name)
        matrix = random_matrix(scheme, 17, 300, rng())
        packed = pack_matrix(matrix)
        shifted = np.frombuffer(b"x" + packed.tobytes(), np.uint8)[1:]
        back = unpack_matrix(shifted, scheme, (17, 300))
        assert np.array_equal(dequantize(back), dequantize(matrix))


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_finite_check_sees_every_place(name: str) -> None:
    """Any float of a packed matrix set to infinity is found; codes of all ones are not taken."""
    scheme, cols = get_scheme(name), 330
    matrix = random_matrix(scheme, 32, cols, rng())
    if scheme.is_raw:
        infinite = {"f16": 0x7C00, "bf16": 0xFF80, "f32": 0x7F800001}[name]
        for row, col in [(0, 0), (31, cols - 1), (15, 64)]:
            codes = matrix.codes.copy()
            codes[row, col] = infinite
            tiles = pack_matrix(replace(matrix, codes=codes)).reshape(2, -1)
            assert not floats_are_finite(tiles, scheme, cols)
        return
    ones = np.full_like(matrix.codes, (1 << scheme.bits) - 1)
    packed = pack_matrix(replace(matrix, codes=ones))
    assert floats_are_finite(packed.reshape(2, -1), scheme, cols)
    for field in ("scales", "minima") if scheme.scale_bits == 16 else FIELDS[3:]:
        values = getattr(matrix, field)
        if values is None:
            continue
        for row, col in [(0, 0), (31, values.shape[1] - 1), (16, values.shape[1] // 2)]:
            marked = values.copy()
            marked[row, col] = 1.0 if values[row, col] != 1.0 else 2.0
            other = pack_matrix(replace(matrix, codes=ones, **{field: marked}))
            broken = packed.copy()
            size = values.dtype.itemsize
            first = int(np.flatnonzero(other != packed)[0]) // size * size
            exponent = 0x7C00 if size == 2 else 0x7F800000
            broken[first : first + size].view(f"<u{size}")[:] |= exponent
            assert not floats_are_finite(broken.reshape(2, -1), scheme, cols), field


def test_a_quantized_matrix_without_scales_has_no_values() -> None:
    scheme = get_scheme("q4g64")
    with pytest.raises(FormatError, match="lacks scales"):
        dequantize(QuantizedMatrix(scheme, (1, 1), np.zeros((1, 1), np.uint8)))
