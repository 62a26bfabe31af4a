"""Native products with packed matrices equal those of the reference."""

from __future__ import annotations

import pytest
import torch

from moepack_formats.matrix import pack_matrix
from moepack_formats.schemes import BLOCK_COLS, SCHEMES
from moepack_runtime.kernels import native, reference
from tests.runtime.kernels.matrices import BLOCKS, SHAPES, as_int8, packed, quantized, relative

NAMES = list(SCHEMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_the_reference(isa: str, name: str, shape: tuple[int, int]) -> None:
    scheme = SCHEMES[name]
    data = packed(scheme, *shape)
    weight = reference.decode_matrix(data, scheme, shape, torch.float32).double()
    bias = torch.randn(shape[0])
    for tokens in (1, 2, 3, 9, 131):
        x = torch.randn(tokens, shape[1])
        for int8 in (False, True):
            seen = as_int8(x) if int8 and not scheme.is_raw else x
            wanted = seen.double() @ weight.T + bias
            got = native.linear(x, data, scheme, shape, bias, int8=int8, threads=2)
            assert relative(got, wanted) < 2e-6, (tokens, int8)


@pytest.mark.parametrize("name", [n for n in NAMES if SCHEMES[n].span > BLOCK_COLS])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("missing", [0, 27])
def test_rows_of_every_number_of_blocks(isa: str, name: str, blocks: int, missing: int) -> None:
    """Blocks that fill no span lie where the reference reads them, whatever their number."""
    scheme, shape = SCHEMES[name], (20, blocks * BLOCK_COLS - missing)
    data = packed(scheme, *shape)
    weight = reference.decode_matrix(data, scheme, shape, torch.float32)
    assert torch.equal(native.decode(data, scheme, shape[1], 20, torch.float32, threads=1), weight)
    for tokens in (1, 2, 4, 9, 33):
        x = torch.randn(tokens, shape[1])
        for int8 in (False, True):
            wanted = (as_int8(x) if int8 else x).double() @ weight.double().T
            got = native.linear(x, data, scheme, shape, None, int8=int8, threads=1)
            assert relative(got, wanted) < 2e-6, (tokens, int8)


@pytest.mark.parametrize("name", [n for n in NAMES if not SCHEMES[n].is_raw])
def test_int8_activations_are_within_one_percent(isa: str, name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    scheme, shape = SCHEMES[name], (128, 1024)
    data = torch.from_numpy(pack_matrix(quantized(name, *shape, generator)))
    weight = reference.decode_matrix(data, scheme, shape, torch.float32)
    normal = torch.randn(4, 1024, generator=generator)
    after_swiglu = torch.nn.functional.silu(normal) * torch.randn(4, 1024, generator=generator)
    for x in (normal, after_swiglu):
        got = native.linear(x, data, scheme, shape, None, int8=True, threads=2)
        assert relative(got, x @ weight.T) < 1e-2


@pytest.mark.parametrize("name", ["q2g16s4", "q4g64", "bf16"])
@pytest.mark.parametrize("int8", [False, True])
def test_threads_change_no_bit(isa: str, name: str, int8: bool) -> None:
    scheme, shape = SCHEMES[name], (1000, 640)
    data, x = packed(scheme, *shape), torch.randn(3, 640)
    one, two, three, many = (
        native.linear(x, data, scheme, shape, None, int8=int8, threads=threads)
        for threads in (1, 2, 3, 64)
    )
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    assert torch.equal(one, many)


@pytest.mark.parametrize("name", NAMES)
def test_packed_bytes_may_start_anywhere(isa: str, name: str) -> None:
    scheme, shape = SCHEMES[name], (32, 200)
    data = packed(scheme, *shape)
    moved = torch.empty(data.numel() + 7, dtype=torch.uint8)[7:]
    moved.copy_(data)
    x = torch.randn(2, 200)
    for int8 in (False, True):
        a = native.linear(x, data, scheme, shape, None, int8=int8, threads=1)
        b = native.linear(x, moved, scheme, shape, None, int8=int8, threads=1)
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("int8", [False, True])
def test_what_is_not_finite_stays_visible(isa: str, value: float, int8: bool) -> None:
    scheme, shape = SCHEMES["q4g64"], (16, 128)
    x = torch.zeros(1, 128)
    x[0, 70] = value
    y = native.linear(x, packed(scheme, *shape), scheme, shape, None, int8=int8, threads=1)
    assert not torch.isfinite(y).any()


def test_zeros_and_the_smallest_numbers(isa: str) -> None:
    scheme, shape = SCHEMES["q3g32s4"], (16, 128)
    data = packed(scheme, *shape)
    for x in (torch.zeros(1, 128), torch.full((1, 128), 1e-42)):
        y = native.linear(x, data, scheme, shape, None, int8=True, threads=1)
        assert torch.count_nonzero(y.abs() > 1e-30) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoding_gives_the_bits_of_the_reference(
    isa: str, name: str, shape: tuple[int, int]
) -> None:
    scheme = SCHEMES[name]
    data = packed(scheme, *shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wanted = reference.decode_matrix(data, scheme, shape, dtype)
        for threads in (1, 3):
            got = native.decode(data, scheme, shape[1], shape[0], dtype, threads=threads)
            assert torch.equal(got, wanted)


def test_decoding_some_tiles(isa: str) -> None:
    scheme, shape = SCHEMES["q2g16s4"], (80, 100)
    data = packed(scheme, *shape)
    whole = reference.decode_matrix(data, scheme, shape, torch.float32)
    tiles = torch.tensor([4, 0, 2, 2])
    got = native.decode(data, scheme, 100, 64, torch.float32, tiles=tiles, threads=2)
    assert torch.equal(got, torch.cat([whole[64:], whole[:16], whole[32:48], whole[32:48]]))
    none = native.decode(
        data, scheme, 100, 0, torch.float32, tiles=torch.empty(0, dtype=torch.int64), threads=2
    )
    assert none.shape == (0, 100)
