"""Grids without minima: nearest levels, zero, sign, stored scales, size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moepack.quant import get_quantizer, quantize_matrix, signed
from moepack.quant.inputs import InputMoments
from moepack.quant.signed import Encoder, SignedPanel, SignedRows
from moepack.quant.storage import by_super
from moepack_formats.matrix import dequantize
from moepack_formats.schemes import SCHEMES

SCHEME = SCHEMES["q3g16s5"]
LEVELS = torch.tensor(SCHEME.levels, dtype=torch.float32)


def normal(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, cols), generator=torch.Generator().manual_seed(seed)) * 0.02


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-20, 8), negative=st.booleans())
def test_encoder_finds_the_nearest_level(seed: int, power: int, negative: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.rand(7, generator=generator) + 0.1) * 2.0**power * (-1 if negative else 1)
    weights = torch.randn((16, 7), generator=generator) * 12 * scale
    encoder = Encoder(SCHEME.levels, weights.shape)
    levels = encoder.levels(weights, scale).to(torch.float32)
    codes = encoder.codes(weights, scale)
    assert torch.equal(LEVELS[codes.long()], levels)
    found = (weights - levels * scale).abs()
    least = (weights[..., None] - LEVELS * scale[:, None]).abs().amin(dim=-1)
    # Weights in the middle of two levels may go to either.
    torch.testing.assert_close(found, least, rtol=1e-3, atol=1e-4 * float(scale.abs().max()))


def test_a_scale_of_nothing_has_no_codes() -> None:
    weights = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    assert not Encoder(SCHEME.levels, (2, 2)).codes(weights, torch.zeros(2)).any()
    matrix = quantize_matrix(torch.zeros(3, 300), SCHEME, get_quantizer())
    assert not dequantize(matrix).any()


def test_weights_of_zero_stay_zero_beside_large_ones() -> None:
    """What a free minimum cannot do, and what a few weights that drive a model need."""
    weight = torch.zeros(32, 512)
    generator = torch.Generator().manual_seed(5)
    places = torch.randperm(weight.numel(), generator=generator)[:700]
    weight.view(-1)[places] = torch.randn(700, generator=generator)
    values = dequantize(quantize_matrix(weight, SCHEME, get_quantizer()))
    assert not values[weight.numpy() == 0].any()
    lost = np.square(values - weight.numpy()).sum() / float(weight.square().sum())
    assert lost < 0.02


def test_the_sign_of_a_scale_follows_the_largest_weight() -> None:
    weight = normal(16, 256)
    weight[:, ::16] = 0.2 * (1 - 2 * (torch.arange(256)[::16] // 16 % 2))
    matrix = quantize_matrix(weight, SCHEME, get_quantizer())
    assert matrix.scales is not None
    assert matrix.outer_scales is not None
    scales = matrix.scales.astype(np.float32) * np.repeat(matrix.outer_scales, 16, axis=1)
    assert (np.sign(scales) == -np.sign(weight[:, ::16].numpy())).mean() > 0.9


def best_error(panel: SignedPanel, outer: Tensor) -> Tensor:
    """The least error of each group over everything that a file can hold under ``outer``."""
    codes = torch.arange(-16, 16, dtype=torch.float32)
    values = codes[:, None, None] * outer[None, :, None] * LEVELS  # [32, N, 8]
    lost = (panel.weights[None, :, :, None] - values[:, None]).square().amin(dim=-1)
    return lost.sum(dim=1).amin(dim=0)


@pytest.mark.parametrize(("name", "most"), [("hqq", 1.03), ("search", 1.01)])
def test_near_the_best_of_all_stored_scales(name: str, most: float) -> None:
    weight = normal(32, 256, seed=3)
    matrix = quantize_matrix(weight, SCHEME, get_quantizer(name))
    rows = SignedRows(weight, SCHEME)
    outer = torch.from_numpy(matrix.outer_scales).float().expand(32, 16).reshape(-1)
    best = float(best_error(rows.panels[0], outer).sum())
    assert float(np.square(dequantize(matrix) - weight.numpy()).sum()) < most * best


def test_better_quantizers_lose_less() -> None:
    weight = normal(64, 512)
    lost = {
        name: float(
            np.square(
                dequantize(quantize_matrix(weight, SCHEME, get_quantizer(name))) - weight.numpy()
            ).sum()
        )
        for name in ("rtn", "hqq", "search")
    }
    assert lost["search"] < lost["hqq"] < 0.9 * lost["rtn"]


def test_stretched_to_the_size_of_the_weights() -> None:
    rows = SignedRows(normal(32, 512), SCHEME)
    sizes = []
    for full_size in (False, True):
        scales = signed.solve(rows, SCHEME, full_size=full_size)
        (panel,) = rows.panels
        qw, _ = panel.moments(scales.values().reshape(-1))
        explained = by_super((scales.values().reshape(-1) * qw).view(32, -1), SCHEME).sum()
        sizes.append(float(explained / panel.power.sum()))
    assert sizes[0] < 0.985
    assert sizes[1] == pytest.approx(1, abs=0.004)


@pytest.mark.parametrize("name", ["hqq", "search", "gptq"])
def test_important_inputs_lose_less(name: str) -> None:
    weight = normal(48, 512, seed=7)
    squares = torch.ones(512)
    squares[::5] = 50.0
    known = InputMoments(squares, torch.diag(squares), 1000)
    quantizer = get_quantizer(name)

    def lost(inputs: InputMoments | None) -> float:
        matrix = quantize_matrix(weight, SCHEME, quantizer, inputs=inputs)
        error = torch.from_numpy(dequantize(matrix)) - weight
        return float((error.square() * squares).sum())

    assert lost(known) < 0.9 * lost(None)


def test_feedback_lowers_the_error_of_outputs() -> None:
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn((2000, 300), generator=generator) @ torch.randn(
        (300, 300), generator=generator
    )
    weight = normal(48, 300, seed=9)
    known = InputMoments.of(inputs, full=True)

    def lost(name: str) -> float:
        matrix = quantize_matrix(weight, SCHEME, get_quantizer(name), inputs=known)
        error = torch.from_numpy(dequantize(matrix)) - weight
        return float((inputs @ error.t()).square().sum())

    assert lost("gptq") < 0.7 * lost("hqq")
