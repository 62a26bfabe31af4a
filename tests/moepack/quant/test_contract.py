"""What every quantizer promises, for every scheme it does. New quantizers are found here too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moepack.quant import Quantizer, get_quantizer, quantize_matrix, quantizer_names
from moepack_formats.errors import IntegrityError, UsageError
from moepack_formats.matrix import QuantizedMatrix, dequantize, pack_matrix, unpack_matrix
from moepack_formats.schemes import SCHEMES, Scheme

QUANTIZED = [scheme for scheme in SCHEMES.values() if not scheme.is_raw]

# Twice what round to nearest loses on a normal distribution.
WORST_ERROR = {2: 0.42, 3: 0.08, 4: 0.02, 6: 1.5e-3, 8: 1e-4}


def supported() -> Iterator[tuple[Quantizer, Scheme]]:
    """Quantizers that can be used here, each with the schemes that it does."""
    for name in quantizer_names():
        for scheme in QUANTIZED:
            with contextlib.suppress(UsageError):
                quantizer = get_quantizer(name)
                quantizer.quantize(torch.ones(1, 256), scheme)
                yield quantizer, scheme


PAIRS = list(supported())
every_pair = pytest.mark.parametrize(
    ("quantizer", "scheme"), PAIRS, ids=[f"{one.name}-{scheme.name}" for one, scheme in PAIRS]
)


def normal(*shape: int, seed: int = 0, sigma: float = 0.02) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * sigma


def relative_error(matrix: QuantizedMatrix, weight: Tensor) -> float:
    wanted = weight.to(torch.float64).numpy()
    lost = dequantize(matrix) - wanted
    return float((lost * lost).sum() / (wanted * wanted).sum())


def assert_equal(left: QuantizedMatrix, right: QuantizedMatrix) -> None:
    for field in fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes(), field.name
        else:
            assert a == b


def check_arrays(matrix: QuantizedMatrix, scheme: Scheme, shape: tuple[int, int]) -> None:
    """Shapes and dtypes as ``QuantizedMatrix`` documents them, and everything finite."""
    rows, cols = shape
    groups = scheme.groups(cols)
    assert (matrix.scheme, matrix.shape) == (scheme, shape)
    whole = max(-(-cols // 64) // 4, 1)  # super-groups under 4-bit scales: the last may be long
    outer_cols = {16: None, 8: 1, 5: -(-cols // 256), 4: whole}[scheme.scale_bits]
    dtypes: dict[int, tuple[type, type | None, type | None]] = {
        16: (np.float16, np.float16, None),
        8: (np.uint8, np.int8, np.float32),
        5: (np.int8, None, np.float16),
        4: (np.uint8, np.uint8, np.float16),
    }
    scale_type, minimum_type, outer_type = dtypes[scheme.scale_bits]
    expected: list[tuple[npt.NDArray[np.generic] | None, type | None, tuple[int, int]]] = [
        (matrix.codes, np.uint8, shape),
        (matrix.scales, scale_type, (rows, groups)),
        (matrix.minima, minimum_type, (rows, groups)),
        (matrix.outer_scales, outer_type, (rows, outer_cols or 0)),
        (matrix.outer_minima, outer_type if scheme.has_minima else None, (rows, outer_cols or 0)),
    ]
    for array, dtype, wanted in expected:
        if dtype is None:
            assert array is None
            continue
        assert array is not None
        assert array.dtype == dtype
        assert array.shape == wanted
        assert np.isfinite(array.astype(np.float64)).all()
    assert int(matrix.codes.max()) < 1 << scheme.bits
    if scheme.scale_bits == 4:
        assert matrix.scales is not None
        assert matrix.minima is not None
        assert max(int(matrix.scales.max()), int(matrix.minima.max())) <= 15
    if scheme.scale_bits == 5:
        assert matrix.scales is not None
        assert int(matrix.scales.min()) >= -16
        assert int(matrix.scales.max()) <= 15
    assert_equal(unpack_matrix(pack_matrix(matrix), scheme, shape), matrix)


def test_default_first() -> None:
    assert quantizer_names()[0] == "hqq"
    assert set(quantizer_names()) >= {"hqq", "rtn", "hqq-lib", "search", "gptq"}
    assert get_quantizer().name == "hqq"


@pytest.mark.parametrize("name", ["symmetric", "", "grid", "hqq_lib", "../rtn"])
def test_unknown_quantizer_names_the_others(name: str) -> None:
    with pytest.raises(UsageError, match="one of hqq, gptq, hqq-lib, rtn, search"):
        get_quantizer(name)


@every_pair
def test_arrays_and_error(quantizer: Quantizer, scheme: Scheme) -> None:
    weight = normal(40, 512)
    matrix = quantize_matrix(weight, scheme, quantizer)
    check_arrays(matrix, scheme, (40, 512))
    assert relative_error(matrix, weight) < WORST_ERROR[scheme.bits]


@every_pair
@given(rows=st.integers(1, 20), cols=st.integers(1, 600), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_odd_shapes(quantizer: Quantizer, scheme: Scheme, rows: int, cols: int, seed: int) -> None:
    weight = normal(rows, cols, seed=seed)
    matrix = quantize_matrix(weight, scheme, quantizer)
    check_arrays(matrix, scheme, (rows, cols))
    # A minimum of 4 bits may lie far from the only weight of a group; larger groups are the rule.
    if cols >= 32:
        assert relative_error(matrix, weight) < WORST_ERROR[scheme.bits]


@every_pair
@pytest.mark.parametrize("cols", [48, 100, 2880])
def test_a_short_last_group_is_fitted_for_itself(
    quantizer: Quantizer, scheme: Scheme, cols: int
) -> None:
    weight = normal(16, cols)
    tail = slice(cols - cols % scheme.group, cols)
    if scheme.scale_bits not in (4, 5):  # There the other groups have a say in the last one's.
        weight[:, tail] += 1  # Zeros beside it would stretch its range by far.
    matrix = quantize_matrix(weight, scheme, quantizer)
    if cols % scheme.group:
        lost = np.abs(dequantize(matrix)[:, tail] - weight[:, tail].numpy()).mean()
        assert lost < {2: 0.02, 3: 0.01, 4: 0.005, 6: 0.002, 8: 0.001}[scheme.bits]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["hqq", "rtn"])
def test_any_float_dtype(name: str, dtype: torch.dtype) -> None:
    quantizer = get_quantizer(name)
    weight = normal(4, 128).to(dtype)
    matrix = quantize_matrix(weight, SCHEMES["q4g64"], quantizer)
    assert_equal(matrix, quantize_matrix(weight.to(torch.float32), SCHEMES["q4g64"], quantizer))


@every_pair
def test_layout_of_the_source_does_not_matter(quantizer: Quantizer, scheme: Scheme) -> None:
    weight = normal(256, 64)
    assert_equal(
        quantize_matrix(weight.t(), scheme, quantizer),
        quantize_matrix(weight.t().contiguous(), scheme, quantizer),
    )


@every_pair
def test_source_is_left_alone(quantizer: Quantizer, scheme: Scheme) -> None:
    weight = torch.nn.Parameter(normal(8, 256))
    before = weight.detach().clone()
    quantize_matrix(weight, scheme, quantizer)
    assert torch.equal(weight, before)


EDGES = {
    "zeros": torch.zeros(4, 320),
    "constant": torch.full((4, 320), 0.1),
    "negative constant": torch.full((4, 320), -0.1),
    "a row of zeros": torch.cat([torch.zeros(1, 320), normal(3, 320)]),
    "all positive": normal(4, 320).abs() + 0.05,
    "all negative": -normal(4, 320).abs() - 0.05,
    "one positive group": normal(4, 320).index_add(
        1, torch.arange(32, 48), torch.full((4, 16), 0.2)
    ),
    "tiny": normal(4, 320, sigma=1e-6),
    "below float16": normal(4, 320, sigma=1e-9),
    "below float32": normal(4, 320, sigma=1e-30),
    "large": normal(4, 320, sigma=1.0),
    "the largest": normal(4, 320).sign() * 65504,
    "an outlier": normal(4, 320).index_fill(1, torch.tensor([70]), 5.0),
    "offset": normal(4, 320) + 10,
}


@every_pair
@pytest.mark.parametrize("case", EDGES)
def test_edges_stay_sensible(quantizer: Quantizer, scheme: Scheme, case: str) -> None:
    weight = EDGES[case]
    try:
        matrix = quantize_matrix(weight, scheme, quantizer)
    except IntegrityError as error:  # Refusing is sensible, but not for us.
        assert quantizer.name == "hqq-lib", error  # noqa: PT017
        return
    check_arrays(matrix, scheme, (4, 320))
    values = dequantize(matrix)
    largest = float(weight.abs().max())
    # Never worse than a value for the whole group that is off by the group's own range.
    assert np.isfinite(values).all()
    floor = 2.0**-20 if scheme.scale_bits != 8 else 0.0
    assert float(np.abs(values - weight.numpy()).max()) <= 1.01 * largest + floor
    if case == "zeros":
        assert not values.any()
        assert not matrix.codes.any()
    if "constant" in case:
        assert values == pytest.approx(weight.numpy(), rel=2e-3)
    if case == "a row of zeros":
        assert not values[0].any()
    if case in {"all positive", "all negative", "one positive group", "large"}:
        assert relative_error(matrix, weight) < WORST_ERROR[scheme.bits]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", SCHEMES)
def test_not_finite_is_refused(name: str, bad: float) -> None:
    weight = normal(4, 128).to(torch.bfloat16)
    weight[2, 7] = bad
    with pytest.raises(IntegrityError, match=r"layer 3, expert 5: .* at \[2, 7\], 1 in all"):
        quantize_matrix(weight, SCHEMES[name], get_quantizer("rtn"), where="layer 3, expert 5")


@every_pair
def test_what_float16_cannot_hold_is_refused(quantizer: Quantizer, scheme: Scheme) -> None:
    weight = normal(2, 256)
    weight[1, 3] = -70000.0
    with pytest.raises(IntegrityError, match=r"too large for .*wanted at most 65504, got 70000"):
        quantize_matrix(weight, scheme, quantizer)


@pytest.mark.parametrize(
    "weight", [torch.ones(3), torch.ones(2, 0), torch.ones(2, 2, dtype=torch.int8)]
)
def test_not_a_float_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(UsageError, match="wanted a matrix of floating-point weights"):
        quantize_matrix(weight, SCHEMES["q4g64"], get_quantizer("rtn"))


@pytest.mark.parametrize("name", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_raw_keeps_bits_or_rounds(name: str, dtype: torch.dtype) -> None:
    weight = normal(5, 70).to(dtype)
    matrix = quantize_matrix(weight, SCHEMES[name], get_quantizer("rtn"))
    kept = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[name]
    assert matrix.codes.dtype == (np.uint32 if name == "f32" else np.uint16)
    assert matrix.scales is None
    assert np.array_equal(dequantize(matrix), weight.to(kept).to(torch.float32).numpy())
    if kept == dtype:
        assert matrix.codes.tobytes() == weight.view(torch.uint8).numpy().tobytes()


def test_raw_refuses_what_overflows() -> None:
    weight = torch.full((2, 64), 1e6)
    with pytest.raises(IntegrityError, match="too large for f16"):
        quantize_matrix(weight, SCHEMES["f16"], get_quantizer("rtn"))
