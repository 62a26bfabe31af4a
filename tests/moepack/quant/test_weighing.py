"""Large weights count more at 2 bits, so that they are not clipped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moepack.quant import hqq
from moepack.quant.walk import quantize_rows
from moepack.quant.weighing import importance_of_weights
from moepack_formats.matrix import dequantize
from moepack_formats.schemes import SCHEMES

SCHEME = SCHEMES["q2g16s4"]


def normal(rows: int, cols: int) -> Tensor:
    return torch.randn((rows, cols), generator=torch.Generator().manual_seed(11)) * 0.02


def test_large_weights_keep_their_size() -> None:
    weight = normal(1024, 2048)
    large = weight.abs() > 3.5 * 0.02

    def size(by_size: bool) -> float:
        solver = replace(hqq.SOLVER, by_size=by_size)
        values = torch.from_numpy(dequantize(quantize_rows(weight, SCHEME, solver)))
        return float((values[large] / weight[large]).mean())

    assert size(by_size=False) < 0.96
    assert size(by_size=True) > 0.98


def test_size_and_inputs_are_multiplied() -> None:
    rows, inputs = normal(3, 64), torch.rand(64) + 0.5
    counted = importance_of_weights(rows, SCHEME, inputs)
    typical = rows.square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(counted, (rows.abs() + typical) * inputs)


@pytest.mark.parametrize("name", ["q3g16s5", "q3g32s4", "q4g64", "q2g64"])
def test_other_schemes_count_all_alike(name: str) -> None:
    inputs = torch.rand(64)
    assert importance_of_weights(normal(3, 64), SCHEMES[name], inputs) is inputs
    assert importance_of_weights(normal(3, 64), SCHEMES[name]) is None


def test_weights_of_zero_have_some_importance() -> None:
    counted = importance_of_weights(torch.zeros(2, 32), SCHEME)
    assert counted is not None
    assert bool((counted > 0).all())
    rows = normal(2, 32)
    before = rows.clone()
    importance_of_weights(rows, SCHEME)
    assert torch.equal(rows, before)
