"""Quantizers that know the inputs a matrix will see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moepack.quant import InputAwareQuantizer, get_quantizer, quantize_matrix, quantizer_names
from moepack.quant.inputs import InputMoments
from moepack_formats.matrix import QuantizedMatrix, dequantize, pack_matrix
from moepack_formats.schemes import SCHEMES, Scheme

QUANTIZED = [scheme for scheme in SCHEMES.values() if not scheme.is_raw]
AWARE = [
    quantizer
    for name in quantizer_names()
    if name != "hqq-lib" and isinstance(quantizer := get_quantizer(name), InputAwareQuantizer)
]
every_aware = pytest.mark.parametrize("quantizer", AWARE, ids=lambda one: one.name)
every_scheme = pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)


def inputs_and_weight(rows: int = 48, cols: int = 600) -> tuple[Tensor, Tensor]:
    """Inputs ``[N, cols]`` of unequal size that depend on one another, and a weight."""
    generator = torch.Generator().manual_seed(3)
    causes = torch.randn(2000, 60, generator=generator)
    mixed = causes @ torch.randn(60, cols, generator=generator) / 8
    mixed += torch.randn(2000, cols, generator=generator) * 0.3
    sizes = torch.rand(cols, generator=generator).square() * 3 + 0.1
    return mixed * sizes, torch.randn(rows, cols, generator=generator) * 0.02


def lost(matrix: QuantizedMatrix, weight: Tensor, inputs: Tensor) -> float:
    """Relative squared error of what comes out."""
    wanted = inputs @ weight.t()
    found = inputs @ torch.from_numpy(dequantize(matrix)).t()
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_which_quantizers_know_inputs() -> None:
    assert {quantizer.name for quantizer in AWARE} == {"hqq", "search", "gptq"}


@every_aware
@every_scheme
def test_knowing_the_inputs_helps(quantizer: InputAwareQuantizer, scheme: Scheme) -> None:
    inputs, weight = inputs_and_weight()
    known = InputMoments.of(inputs[:1000], full=quantizer.needs_products)
    held_out = inputs[1000:]
    without = lost(quantize_matrix(weight, scheme, quantizer), weight, held_out)
    found = lost(quantize_matrix(weight, scheme, quantizer, inputs=known), weight, held_out)
    assert found < without * (0.6 if quantizer.needs_products else 0.99)


@every_aware
@every_scheme
def test_threads_do_not_matter(quantizer: InputAwareQuantizer, scheme: Scheme) -> None:
    inputs, weight = inputs_and_weight(rows=1100, cols=300)
    known = InputMoments.of(inputs, full=quantizer.needs_products)
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            matrix = quantize_matrix(weight, scheme, quantizer, inputs=known)
            found.add(bytes(pack_matrix(matrix)))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@every_aware
def test_inputs_that_are_all_alike_say_nothing(quantizer: InputAwareQuantizer) -> None:
    _, weight = inputs_and_weight()
    scheme = SCHEMES["q2g16s4"]
    alike = InputMoments(torch.ones(600), torch.eye(600), 1000)
    found = dequantize(quantize_matrix(weight, scheme, quantizer, inputs=alike))
    wanted = dequantize(quantize_matrix(weight, scheme, quantizer))
    errors = [float(np.square(v - weight.numpy()).sum()) for v in (found, wanted)]
    assert errors[0] < errors[1] * 1.01


@every_aware
@pytest.mark.parametrize("moments", ["dead", "few", "huge"])
def test_poor_moments_stay_sensible(quantizer: InputAwareQuantizer, moments: str) -> None:
    inputs, weight = inputs_and_weight()
    chosen = {"dead": inputs * 0, "few": inputs[:2], "huge": inputs * 1e12}[moments]
    known = InputMoments.of(chosen, full=quantizer.needs_products)
    matrix = quantize_matrix(weight, SCHEMES["q3g32s4"], quantizer, inputs=known)
    values = dequantize(matrix)
    assert np.isfinite(values).all()
    assert np.square(values - weight.numpy()).sum() < 0.2 * float(weight.square().sum())


def test_router_weights_count() -> None:
    inputs, _ = inputs_and_weight()
    weights = torch.zeros(2000)
    weights[:500] = 0.25
    weighted = InputMoments.of(inputs, weights, full=True)
    plain = InputMoments.of(inputs[:500], full=True)
    torch.testing.assert_close(weighted.squares, plain.squares)
    torch.testing.assert_close(weighted.products, plain.products, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weighted.products.diagonal(), weighted.squares)


def test_importance_is_never_zero() -> None:
    moments = InputMoments(torch.tensor([0.0, 0.0, 9.0]), None, 5)
    importance = moments.importance()
    assert float(importance.min()) > 0
    assert float(importance.mean()) == pytest.approx(1)
    assert torch.isfinite(InputMoments(torch.zeros(4), None, 5).importance()).all()
