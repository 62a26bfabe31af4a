"""Triton's products with packed matrices, and dense rows, equal the reference's."""

from __future__ import annotations

import pytest
import torch

from moepack_formats.errors import FormatError
from moepack_formats.schemes import BLOCK_COLS, SCHEMES
from moepack_runtime.kernels import reference
from moepack_runtime.kernels.triton_gpu import sizes
from moepack_runtime.kernels.triton_gpu.engine import TritonEngine
from tests.runtime.kernels.matrices import BLOCKS, packed, relative

ENGINE = TritonEngine()
NAMES = list(SCHEMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(17, 65), (33, 330)], ids=str)
def test_dense_rows_have_the_same_bits(
    device: torch.device, name: str, shape: tuple[int, int]
) -> None:
    scheme, data = SCHEMES[name], packed(SCHEMES[name], *shape).to(device)
    wanted = reference.decode_matrix(data, scheme, shape, torch.float32)
    assert torch.equal(ENGINE.decode(data, scheme, shape, torch.float32), wanted)


@pytest.mark.parametrize("name", [n for n in NAMES if SCHEMES[n].span > BLOCK_COLS])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_rows_of_every_number_of_blocks(device: torch.device, name: str, blocks: int) -> None:
    """Blocks that fill no span lie where the reference reads them, whatever their number."""
    scheme, shape = SCHEMES[name], (17, blocks * BLOCK_COLS - 27)
    data = packed(scheme, *shape).to(device)
    weight = reference.decode_matrix(data, scheme, shape, torch.float32)
    assert torch.equal(ENGINE.decode(data, scheme, shape, torch.float32), weight)
    for tokens in (1, 5):
        x = torch.randn(tokens, shape[1])
        got = ENGINE.linear(x.to(device), data, scheme, shape, None)
        assert relative(got.cpu(), x.double() @ weight.cpu().double().T) < 2e-5, tokens


@pytest.mark.parametrize("name", ["q4g128", "bf16"])
def test_some_tiles(device: torch.device, name: str) -> None:
    scheme, shape = SCHEMES[name], (70, 65)
    data = packed(scheme, *shape).to(device)
    tiles = torch.tensor([4, 0, 3], device=device)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    wanted = reference.decode_tiles(data.view(5, -1)[tiles], scheme, 65, dtype)
    assert torch.equal(ENGINE.decode(data, scheme, shape, dtype, tiles), wanted)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    assert ENGINE.decode(data, scheme, shape, torch.float32, nothing).shape == (0, 65)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (17, 65), (33, 330)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_equal_the_reference(
    device: torch.device, name: str, shape: tuple[int, int], tokens: int
) -> None:
    scheme, data = SCHEMES[name], packed(SCHEMES[name], *shape)
    weight = reference.decode_matrix(data, scheme, shape, torch.float32).double()
    x, bias = torch.randn(tokens, shape[1]), torch.randn(shape[0])
    got = ENGINE.linear(x.to(device), data.to(device), scheme, shape, bias.to(device))
    assert relative(got.cpu(), x.double() @ weight.T + bias) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_sixteen_bit_inputs(device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16 and tokens > 1:
        pytest.skip("the interpreter has no matrix products of bfloat16")
    scheme, shape = SCHEMES["q4g64"], (32, 192)
    data, x = packed(scheme, *shape), torch.randn(2, tokens, 192).to(dtype)
    x = x if tokens > 1 else x[:1]
    weight = reference.decode_matrix(data, scheme, shape, torch.float32)
    got = ENGINE.linear(x.to(device), data.to(device), scheme, shape, None)
    assert got.dtype == dtype
    assert got.shape == (*x.shape[:-1], 32)
    assert relative(got.cpu().float(), x.float() @ weight.T) < 1e-2


def test_a_split_of_the_inputs_changes_little_and_only_with_the_shape(
    device: torch.device,
) -> None:
    scheme, shape = SCHEMES["q2g16s4"], (16, 1030)
    assert sizes.split_inputs(*shape).count == 2
    data, x = packed(scheme, *shape).to(device), torch.randn(1, 1030, device=device)
    first = ENGINE.linear(x, data, scheme, shape, None)
    assert torch.equal(first, ENGINE.linear(x, data, scheme, shape, None))
    weight = reference.decode_matrix(data, scheme, shape, torch.float32)
    assert relative(first.cpu(), (x @ weight.T).cpu()) < 2e-5


@pytest.mark.parametrize("rows", [1, 100, 4096, 14336, 32000])
@pytest.mark.parametrize("cols", [1, 64, 1024, 2880, 14336])
def test_splits_cover_every_block_once(rows: int, cols: int) -> None:
    split, blocks = sizes.split_inputs(rows, cols), -(-cols // 64)
    assert (split.count - 1) * split.blocks < blocks <= split.count * split.blocks


def test_the_largest_and_smallest_inputs(device: torch.device) -> None:
    """Codes are multiplied as subnormal numbers; inputs of any usual size must survive that."""
    scheme, shape = SCHEMES["q2g16s4"], (16, 256)
    data = packed(scheme, *shape)
    weight = reference.decode_matrix(data, scheme, shape, torch.float32).double()
    for size in (1e-12, 1e10):
        x = torch.randn(1, 256) * size
        got = ENGINE.linear(x.to(device), data.to(device), scheme, shape, None)
        assert relative(got.cpu(), x.double() @ weight.T) < 2e-5


def test_what_is_not_finite_stays_visible(device: torch.device) -> None:
    scheme, shape = SCHEMES["q4g64"], (16, 128)
    x = torch.zeros(1, 128, device=device)
    x[0, 70] = float("nan")
    got = ENGINE.linear(x, packed(scheme, *shape).to(device), scheme, shape, None)
    assert got.isnan().all()


def test_short_and_misplaced_bytes_are_refused(device: torch.device) -> None:
    scheme, shape = SCHEMES["q4g64"], (16, 128)
    data, x = packed(scheme, *shape).to(device), torch.randn(1, 128, device=device)
    with pytest.raises(FormatError, match="too short"):
        ENGINE.linear(x, data[:-16], scheme, shape, None)
    moved = torch.empty(data.numel() + 8, dtype=torch.uint8, device=device)[8:]
    with pytest.raises(ValueError, match="multiple of 16"):
        ENGINE.linear(x, moved, scheme, shape, None)


def test_no_token(device: torch.device) -> None:
    scheme, shape = SCHEMES["q4g64"], (16, 128)
    data = packed(scheme, *shape).to(device)
    empty = torch.empty(0, 3, 128, device=device)
    assert ENGINE.linear(empty, data, scheme, shape, None).shape == (0, 3, 16)
