"""What the native library computes for quantizers against the same with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moepack.quant import InputAwareQuantizer, get_quantizer, quantize_matrix
from moepack.quant.columns import Rounding
from moepack.quant.grid import Panel, invert
from moepack.quant.inputs import InputMoments
from moepack.quant.signed import SignedPanel
from moepack.quant.superscale import best_neighbour
from moepack_formats.matrix import dequantize
from moepack_formats.schemes import SCHEMES
from moepack_runtime.kernels import native, native_solver

pytestmark = pytest.mark.skipif(native.available() is None, reason=native.why_not())

LEVELS = SCHEMES["q3g16s5"].levels
NEIGHBOURS = tuple((up, (0, -1, 1)) for up in (0, -1, 1))
some_groups = st.tuples(
    st.integers(1, 40), st.integers(1, 70), st.booleans(), st.integers(0, 2**32 - 1)
)


def both(compute: Callable[[], Any]) -> tuple[Any, Any]:
    """The same by the native library and without it."""
    found = compute()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_solver, "available", lambda: None)
        return found, compute()


def close(left: Tensor, right: Tensor) -> None:
    """Sums in another order."""
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))


def drawn(case: tuple[int, int, bool, int]) -> tuple[Tensor, Tensor | None, torch.Generator]:
    """Rows ``[N, g]`` of one group each, what each weight counts, and a generator for more."""
    size, count, weighed, seed = case
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn((count, size), generator=generator) * 0.02
    return (
        rows,
        torch.rand((count, size), generator=generator) + 0.1 if weighed else None,
        generator,
    )


@settings(max_examples=40)
@given(case=some_groups, bits=st.sampled_from([2, 3, 4, 6, 8]))
def test_sums_over_codes(case: tuple[int, int, bool, int], bits: int) -> None:
    rows, importance, _ = drawn(case)
    panel, top = Panel(rows, rows.shape[1], importance), (1 << bits) - 1
    inverse = invert((panel.high - panel.low) * (0.8 / top))
    zero = -panel.low * inverse
    sums, wanted = both(lambda: panel.moments(inverse, zero, top))
    for name in ("q", "qq", "qw"):
        close(getattr(sums, name), getattr(wanted, name))
    close(*both(lambda: panel.code_sum(inverse, zero, top)))
    close(*both(lambda: panel.squared_steps(inverse, zero, top)))


@settings(max_examples=40)
@given(case=some_groups)
def test_sums_over_levels(case: tuple[int, int, bool, int]) -> None:
    rows, importance, generator = drawn(case)
    panel = SignedPanel(rows, rows.shape[1], LEVELS, importance)
    scale = (
        panel.extreme / 15 * torch.where(torch.rand(len(rows), generator=generator) < 0.5, 1, -1)
    )
    # The fallback rounds thresholds' sides otherwise; of a weight there, either level is right.
    (qw, qq), (wanted_qw, wanted_qq) = both(lambda: panel.moments(scale))
    close(scale * (scale * qq - 2 * qw), scale * (scale * wanted_qq - 2 * wanted_qw))


@settings(max_examples=40)
@given(case=some_groups, bits=st.sampled_from([2, 3]))
def test_best_neighbours(case: tuple[int, int, bool, int], bits: int) -> None:
    rows, importance, generator = drawn(case)
    panel, top = Panel(rows, rows.shape[1], importance), (1 << bits) - 1
    codes = [torch.randint(0, 16, (len(rows),), generator=generator).float() for _ in range(2)]
    outer = [torch.rand(len(rows), generator=generator) * 0.005 for _ in range(2)]

    def moved() -> tuple[Tensor, Tensor]:
        return best_neighbour(
            panel,
            panel.mean,
            codes[0],
            outer[0],
            codes[1],
            outer[1],
            neighbours=NEIGHBOURS,
            top=top,
        )

    def error(scale: Tensor, minimum: Tensor) -> Tensor:
        inverse = invert(scale * outer[0])
        zero = (minimum * outer[1] + panel.mean) * inverse
        return panel.squared_steps(inverse, zero, top) * (scale * outer[0]).square()

    (scale, minimum), wanted = both(moved)
    close(error(scale, minimum), error(*wanted))
    for found, present, lowest in zip((scale, minimum), codes, (1, 0), strict=True):
        assert bool(((found - present.clamp(min=lowest)).abs() <= 1).all())
        assert lowest <= float(found.min()) <= float(found.max()) <= 15


@settings(max_examples=40)
@given(case=some_groups)
def test_best_moves(case: tuple[int, int, bool, int]) -> None:
    rows, importance, generator = drawn(case)
    panel = SignedPanel(rows, rows.shape[1], LEVELS, importance)
    code = torch.randint(-16, 16, (len(rows),), generator=generator).float()
    outer = torch.rand(len(rows), generator=generator) * 2e-4
    found, wanted = both(lambda: panel.best_move(code, outer, (0, -1, 1, 2)))

    def error(moved: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        scale = moved[0] * outer
        return scale * (scale * moved[2] - 2 * moved[1])

    close(error(found), error(wanted))
    assert -16 <= float(found[0].min()) <= float(found[0].max()) <= 15
    close(error(found), error((found[0], *panel.moments(found[0] * outer))))


@settings(max_examples=40)
@given(case=some_groups, levels=st.booleans())
def test_feedback(case: tuple[int, int, bool, int], levels: bool) -> None:
    rows, _, generator = drawn(case)
    weights = rows.t().contiguous()
    size, count = weights.shape
    upper = torch.randn((size, size), generator=generator).triu(1) * 0.1
    upper += torch.diag(torch.rand(size, generator=generator) + 0.5)
    wide = torch.zeros(size, size + 5)
    wide[:, :size] = upper  # Rows of the whole factor are longer than the group.
    step = torch.rand(count, generator=generator) * 0.01 + 1e-3
    step[torch.rand(count, generator=generator) < 0.1] = 0
    rounding = (
        Rounding(step, invert(step), None, 7, LEVELS)
        if levels
        else Rounding(step, invert(step), torch.rand(count, generator=generator) * 0.03, 3)
    )

    def run() -> tuple[Tensor, Tensor]:
        codes, errors = (
            torch.full(weights.shape, 99, dtype=torch.uint8),
            torch.full_like(weights, 9),
        )
        rounding.feed_back(weights.clone(), wide[:, :size], codes, errors)
        return codes, errors

    (codes, errors), (wanted_codes, wanted_errors) = both(run)
    # A last bit may send a weight to another code, and all that follows in its row with it.
    same = (codes == wanted_codes).all(dim=0)
    assert float(same.float().mean()) > 0.9 or int((~same).sum()) <= 2
    torch.testing.assert_close(errors[:, same], wanted_errors[:, same], rtol=1e-3, atol=1e-5)
    assert not codes[:, step == 0].any()


@pytest.mark.parametrize("name", ["hqq", "search", "gptq"])
@pytest.mark.parametrize("scheme", ["q2g64", "q2g16s4", "q2g16s8", "q3g16s5", "q6g64"])
def test_quantizers_fit_as_well(name: str, scheme: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn((40, 600), generator=generator) * 0.02
    inputs = InputMoments.of(torch.randn((900, 600), generator=generator), full=True)
    quantizer = get_quantizer(name)
    assert isinstance(quantizer, InputAwareQuantizer)

    def error() -> float:
        matrix = quantize_matrix(weight, SCHEMES[scheme], quantizer, inputs=inputs)
        return float(np.square(dequantize(matrix) - weight.numpy()).sum())

    found, wanted = both(error)
    assert found == pytest.approx(wanted, rel=0.01)


def test_refusals() -> None:
    weights, each = torch.randn(16, 5), torch.ones(5)
    with pytest.raises(TypeError, match="float32"):
        native_solver.code_sums(weights.double(), None, each, each, 3)
    with pytest.raises(ValueError, match=r"measure must be contiguous \[16, 5\]"):
        native_solver.code_sums(weights, weights[:, :4], each, each, 3)
    with pytest.raises(ValueError, match="contiguous"):
        native_solver.squared_steps(weights.t(), None, each, each, 3)
    with pytest.raises(ValueError, match="inverse"):
        native_solver.squared_steps(weights, None, each[:4], each, 3)
    with pytest.raises(ValueError, match="bad argument"):
        native_solver.squared_steps(weights, None, each, each, 256)
    with pytest.raises(ValueError, match="9 levels"):
        native_solver.level_sums(weights, None, each, range(9))
    with pytest.raises(ValueError, match="bad argument"):
        native_solver.level_sums(weights, None, each, [1, 1, 2])
    with pytest.raises(ValueError, match="bad argument"):
        native_solver.best_moves(weights, None, (each, each), LEVELS, (), (-16, 15))
    with pytest.raises(ValueError, match="scale"):
        native_solver.best_moves(weights, None, (each[:3], each), LEVELS, (0,), (-16, 15))
    pairs, moves = ((each, each), (each, each)), [(0, 0)]
    with pytest.raises(ValueError, match="mean"):
        native_solver.best_neighbours(weights, None, *pairs, each[:3], moves, top=3, code_top=15)
    with pytest.raises(ValueError, match="bad argument"):
        native_solver.best_neighbours(weights, None, *pairs, each, [], top=3, code_top=15)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": torch.randn(129, 5)}, ValueError, "129 columns"),
        ({"codes": torch.zeros(16, 5)}, TypeError, "uint8"),
        ({"codes": torch.zeros((15, 5), dtype=torch.uint8)}, ValueError, "shapes"),
        ({"upper": torch.eye(15)}, ValueError, "shapes"),
        ({"upper": torch.eye(16).double()}, TypeError, "float32"),
        ({"errors": torch.zeros(16, 4)}, ValueError, "errors"),
        ({"minimum": None}, ValueError, "either"),
        ({"levels": LEVELS}, ValueError, "either"),
        ({"top": 0}, ValueError, "bad argument"),
    ],
)
def test_refusals_of_feedback(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    each = torch.ones(5)
    arguments: dict[str, Any] = {
        "weights": torch.randn(16, 5),
        "upper": torch.eye(16),
        "inverse": each,
        "step": each,
        "codes": torch.zeros((16, 5), dtype=torch.uint8),
        "errors": torch.zeros(16, 5),
        "minimum": each,
        "top": 3,
    }
    with pytest.raises(error, match=message):
        native_solver.feed_back(**{**arguments, **changes})
