"""The own solver: against the hqq library, and what it adds to the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moepack.quant import get_quantizer, quantize_matrix
from moepack.quant.grid import GroupedRows
from moepack.quant.storage import (
    by_row,
    by_super,
    negative_minima,
    spread,
    store_minima,
    store_scales,
)
from moepack_formats.errors import UsageError
from moepack_formats.matrix import QuantizedMatrix, dequantize
from moepack_formats.schemes import SCHEMES

TINY_MOE = Path(__file__).parents[2] / "assets" / "tiny-moe" / "model.safetensors"


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(64, 512, generator=generator)

    def student(freedom: int) -> Tensor:
        power = sum(torch.randn(64, 512, generator=generator) ** 2 for _ in range(freedom))
        return normal() / (power / freedom) ** 0.5

    with_outliers = normal() * 0.02
    with_outliers[::7, ::97] += 0.7
    return {
        "normal 0.02": normal() * 0.02,
        "normal 1": normal(),  # Shrinkage acts on every group.
        "normal 1e-3": normal() * 1e-3,
        "student-t 3, 0.02": student(3) * 0.02,
        "student-t 3, 1": student(3),
        "outliers": with_outliers,
    }


MATRICES = matrices()
AFFINE = ["q2g64", "q3g64", "q4g64", "q4g128", "q6g64", "q8g64"]


def squared_error(matrix: QuantizedMatrix, weight: Tensor) -> float:
    return float(((dequantize(matrix) - weight.to(torch.float64).numpy()) ** 2).sum())


def error_of_library(weight: Tensor, name: str) -> float:
    """Of the library's own float32 result: no scale rounded."""
    library: Any = pytest.importorskip("hqq.core.quantize").Quantizer
    scheme = SCHEMES[name]
    errors = []
    for round_zero in (False, True):
        codes, meta = library.quantize(
            weight.clone(),
            nbits=scheme.bits,
            group_size=scheme.group,
            axis=1,
            round_zero=round_zero,
            bitpack=False,
            device="cpu",
        )
        values = ((codes - meta["zero"]) * meta["scale"]).reshape(weight.shape)
        errors.append(float(((values - weight).to(torch.float64) ** 2).sum()))
    return min(errors)


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("case", MATRICES)
def test_no_worse_than_the_library(name: str, case: str) -> None:
    weight = MATRICES[case]
    ours = squared_error(quantize_matrix(weight, SCHEMES[name], get_quantizer("hqq")), weight)
    assert ours <= 1.01 * error_of_library(weight, name)


@pytest.mark.parametrize("name", AFFINE)
def test_no_worse_than_the_library_on_trained_weights(name: str) -> None:
    tensors = load_file(TINY_MOE)
    experts = [key for key in tensors if ".experts." in key][:: 144 // 6]
    assert experts
    for key in experts:
        weight = tensors[key].to(torch.float32)
        ours = squared_error(quantize_matrix(tensors[key], SCHEMES[name], get_quantizer()), weight)
        assert ours <= 1.01 * error_of_library(weight, name), key


def test_library_as_a_quantizer_is_the_library() -> None:
    pytest.importorskip("hqq")
    weight = MATRICES["normal 0.02"]
    for name in ("q2g64", "q3g64", "q8g64"):
        found = quantize_matrix(weight, SCHEMES[name], get_quantizer("hqq-lib"))
        # Rounding to float16 is all that is added.
        assert squared_error(found, weight) <= 1.06 * error_of_library(weight, name)


def test_library_names_its_schemes() -> None:
    pytest.importorskip("hqq")
    with pytest.raises(UsageError, match="one of q2g64, q3g64, q4g64, q4g128, q6g64, q8g64"):
        quantize_matrix(MATRICES["normal 1"], SCHEMES["q3g32s4"], get_quantizer("hqq-lib"))


def test_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hqq.core.quantize", None)
    with pytest.raises(UsageError, match=r"pip install '\.\[hqq\]'"):
        get_quantizer("hqq-lib")


@pytest.mark.parametrize(
    "name", ["q2g64", "q2g16s8", "q2g16s4", "q3g64", "q3g32s4", "q3g16s5", "q4g64", "q6g64"]
)
def test_better_than_rounding(name: str) -> None:
    # Where outliers are most of the power and zero is a level, rounding leaves little to win.
    most = 0.95 if SCHEMES[name].has_minima else 0.995
    for weight in MATRICES.values():
        ours = squared_error(quantize_matrix(weight, SCHEMES[name], get_quantizer("hqq")), weight)
        rounded = squared_error(
            quantize_matrix(weight, SCHEMES[name], get_quantizer("rtn")), weight
        )
        assert ours < most * rounded


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("q2g64", 0.112),
        ("q2g16s8", 0.073),
        ("q2g16s4", 0.077),  # Squares of large weights count more than they do here.
        ("q3g64", 0.0285),
        ("q3g32s4", 0.0230),
        ("q3g16s5", 0.0195),
        ("q4g64", 0.0070),
        ("q6g64", 0.0004),
    ],
)
def test_error_on_a_normal_distribution(name: str, most: float) -> None:
    weight = MATRICES["normal 0.02"]
    error = squared_error(quantize_matrix(weight, SCHEMES[name], get_quantizer()), weight)
    assert error / float((weight.to(torch.float64) ** 2).sum()) < most


@pytest.mark.parametrize("name", ["q2g64", "q2g16s8", "q2g16s4", "q3g64", "q3g32s4", "q3g16s5"])
def test_values_are_as_large_as_the_weights(name: str) -> None:
    """Least squares alone would lose the relative error, a tenth at q2g64, of every layer's size.

    Choosing the codes anew for the stretched values takes a part of it back.
    """
    weight = MATRICES["normal 0.02"].numpy().astype(np.float64)
    matrix = quantize_matrix(MATRICES["normal 0.02"], SCHEMES[name], get_quantizer())
    size = float((dequantize(matrix) * weight).sum() / (weight * weight).sum())
    assert size == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("name", ["q2g64", "q2g16s4", "q3g32s4", "q4g64", "q6g64"])
def test_the_size_of_the_weights_does_not_matter(name: str) -> None:
    """Of a hundred times as large weights the same share is lost."""
    weight = MATRICES["normal 0.02"]
    quantizer = get_quantizer()
    lost = [
        squared_error(quantize_matrix(weight * size, SCHEMES[name], quantizer), weight * size)
        / size**2
        for size in (1.0, 400.0)
    ]
    assert lost[1] == pytest.approx(lost[0], rel=2e-3)


def test_short_groups_are_a_panel_of_their_own() -> None:
    rows = GroupedRows(torch.arange(200.0).view(2, 100), 64)
    assert [panel.size for panel in rows.panels] == [64, 36]
    means = rows.gather(lambda panel: panel.mean)
    assert means.tolist() == [[31.5, 81.5], [131.5, 181.5]]
    assert [part.tolist() for part in rows.split(means)] == [[31.5, 131.5], [81.5, 181.5]]


def test_super_minima_take_the_sign_that_loses_less() -> None:
    scheme = SCHEMES["q3g32s4"]
    minima = torch.tensor([[0.1] * 7 + [-0.1], [-0.2] * 8])
    assert negative_minima(scheme, minima).tolist() == [[False], [True]]
    stored = store_minima(scheme, minima)
    assert stored.values()[0].tolist() == pytest.approx([0.1] * 7 + [0.0], rel=1e-3)
    assert stored.values()[1].tolist() == pytest.approx([-0.2] * 8, rel=1e-3)


@pytest.mark.parametrize("name", ["q2g16s4", "q3g32s4", "q3g16s5"])
@pytest.mark.parametrize("cols", [16, 192, 256, 300, 320, 448, 512, 576, 700, 1024])
def test_groups_of_a_super_group_lie_side_by_side(name: str, cols: int) -> None:
    scheme = SCHEMES[name]
    groups, each, supers = scheme.groups(cols), 256 // scheme.group, scheme.spans(cols)
    values = torch.arange(1.0, 3 * groups + 1).view(3, groups)
    grouped = by_super(values, scheme)
    number = [min(group // each, supers - 1) for group in range(groups)]
    for row in range(3):
        for which in range(supers):
            wanted = [v for v, n in zip(values[row].tolist(), number, strict=True) if n == which]
            column = grouped[:, row * supers + which].tolist()
            assert column == wanted + [0.0] * (len(column) - len(wanted))
    assert torch.equal(by_row(grouped, scheme, groups), values)
    outer = torch.arange(3.0 * supers).view(3, supers)
    assert torch.equal(spread(outer, each, groups), outer[:, number])


@pytest.mark.parametrize("quantizer", ["hqq", "search", "rtn"])
def test_super_scales_suit_the_blocks_left_over_too(quantizer: str) -> None:
    """Weights left over that are larger than all before them are not clipped."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(16, 576, generator=generator)
    weight[:, 512:] *= 20
    matrix = quantize_matrix(weight, SCHEMES["q2g16s4"], get_quantizer(quantizer))
    lost = (torch.from_numpy(dequantize(matrix)) - weight)[:, 512:].square().mean()
    assert lost / weight[:, 512:].square().mean() < 0.2


@pytest.mark.parametrize("name", ["q4g64", "q2g16s8", "q2g16s4"])
def test_stored_scales_are_near_and_never_vanish(name: str) -> None:
    scheme = SCHEMES[name]
    steps = torch.rand(3, scheme.groups(600), generator=torch.Generator().manual_seed(0)) + 0.5
    steps[1, 2] = 1e-12
    values = store_scales(scheme, steps).values()
    near = {16: 1e-3, 8: 6e-3, 4: 0.1}[scheme.scale_bits]
    steps[1, 2] = values[1, 2]
    assert values[1, 2] > 0
    assert values.numpy() == pytest.approx(steps.numpy(), rel=near)
