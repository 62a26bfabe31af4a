"""Records: layouts, round trips, and layouts from a file that do not hold together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepack_formats.errors import FormatError, IntegrityError
from moepack_formats.matrix import QuantizedMatrix, dequantize
from moepack_formats.record import (
    RecordSpec,
    SubTensor,
    check_spec,
    pack_record,
    plan_record,
    unpack_record,
)
from tests.formats.builders import SCHEME_NAMES, random_parts


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@settings(max_examples=60)
@given(
    hidden=st.integers(1, 150),
    intermediate=st.integers(1, 100),
    first=st.sampled_from(SCHEME_NAMES),
    second=st.sampled_from(SCHEME_NAMES),
    gated=st.booleans(),
    bias=st.booleans(),
)
def test_round_trip(hidden, intermediate, first, second, gated, bias) -> None:
    spec = plan_record(hidden, intermediate, first, second, gated=gated, bias=bias)
    check_spec(spec, "here")
    assert spec.nbytes % 4096 == 0
    assert 0 <= spec.nbytes - spec.payload_nbytes < 4096
    assert all(tensor.offset % 256 == 0 for tensor in spec.tensors)
    projections = 3 if gated else 2
    biases = (hidden + (projections - 1) * intermediate) if bias else 0
    assert spec.parameters == projections * hidden * intermediate + biases
    parts = random_parts(spec, rng())
    record = pack_record(spec, parts)
    assert record.size == spec.nbytes
    assert not record[spec.payload_nbytes :].any()
    back = unpack_record(spec, record)
    assert back.keys() == parts.keys()
    for name, part in parts.items():
        found = back[name]
        if isinstance(part, QuantizedMatrix):
            assert isinstance(found, QuantizedMatrix)
            assert np.array_equal(dequantize(part), dequantize(found))
        else:
            assert np.array_equal(part, found)
    assert np.array_equal(pack_record(spec, back), record)


def test_gate_and_up_are_padded_apart() -> None:
    spec = plan_record(64, 17, "q4g64", "q4g64", bias=True)
    gate_up, bias = spec.tensor("gate_up"), spec.tensor("gate_up_bias")
    assert gate_up is not None
    assert bias is not None
    assert (gate_up.shape, gate_up.padded, gate_up.nbytes) == ((34, 64), (64, 64), 4 * 576)
    assert (bias.shape, bias.padded) == ((34,), (64,))
    parts = random_parts(spec, rng())
    record = pack_record(spec, parts)
    values = record[bias.offset : bias.offset + bias.nbytes].view("<f4").reshape(2, 2, 16)
    assert np.array_equal(values[0, 0], parts["gate_bias"][:16])
    assert np.array_equal(values[0, 1], parts["up_bias"][:16])
    assert list(values[1, 0, :2]) == [parts["gate_bias"][16], 0]


def test_what_cannot_be_packed() -> None:
    spec = plan_record(20, 24, "q4g64", "q3g32s4", bias=True)
    parts = random_parts(spec, rng())
    other = random_parts(plan_record(20, 25, "q4g64", "q4g64", bias=True), rng())
    with pytest.raises(FormatError, match="wrong shape"):
        pack_record(spec, {**parts, "up": other["up"]})
    with pytest.raises(FormatError, match="wrong shape"):
        pack_record(spec, {**parts, "up_bias": other["up_bias"]})
    swapped = random_parts(plan_record(20, 24, "q4g128", "q4g64", bias=True), rng())
    with pytest.raises(FormatError, match="wrong scheme"):
        pack_record(spec, {**parts, "gate": swapped["gate"]})
    infinite = np.full(24, np.inf, np.float32)
    with pytest.raises(IntegrityError, match="bias is not finite"):
        pack_record(spec, {**parts, "gate_bias": infinite})
    with pytest.raises(FormatError, match="wrong size"):
        unpack_record(spec, np.zeros(spec.nbytes - 1, np.uint8))


def change(name: str, **fields: object) -> Callable[[RecordSpec], RecordSpec]:
    """Exchange fields of one sub-tensor."""

    def apply(spec: RecordSpec) -> RecordSpec:
        tensors = [replace(t, **fields) if t.name == name else t for t in spec.tensors]
        return replace(spec, tensors=tuple(tensors))

    return apply


def spec_with(**fields: object) -> Callable[[RecordSpec], RecordSpec]:
    return lambda spec: replace(spec, **fields)


def swap_order(spec: RecordSpec) -> RecordSpec:
    return replace(spec, tensors=spec.tensors[::-1])


def without(*names: str) -> Callable[[RecordSpec], RecordSpec]:
    return lambda spec: replace(spec, tensors=tuple(t for t in spec.tensors if t.name not in names))


def twice(spec: RecordSpec) -> RecordSpec:
    return replace(spec, tensors=(*spec.tensors, spec.tensors[-1]))


HOSTILE: dict[str, tuple[Callable[[RecordSpec], RecordSpec], str]] = {
    "record shorter than its payload": (spec_with(nbytes=4096), "shorter than its payload"),
    "payload shorter than it is": (spec_with(payload_nbytes=64), "bytes of payload"),
    "record with gigabytes of padding": (spec_with(nbytes=1 << 40), "not padded as it must be"),
    "record size not a multiple": (spec_with(nbytes=14000), "not padded as it must be"),
    "misaligned sub-tensor": (change("down", offset=8192 + 64), "misaligned sub-tensor"),
    "overlap": (change("down", offset=0), "sub-tensors overlap"),
    "hole": (change("down", offset=1 << 30), "hole before a sub-tensor"),
    "first not at 0": (change("gate_up", offset=256), "hole before a sub-tensor"),
    "unknown scheme": (change("down", scheme="q5k"), "down: unknown scheme .*got 'q5k'"),
    "group not in the list": (change("down", scheme="q4g32"), "unknown scheme"),
    "bits not in the list": (change("down", scheme="q1g64"), "unknown scheme"),
    "bias not float32": (change("gate_up_bias", scheme="f16"), "bias is not float32"),
    "layout": (change("gate_up", layout="tiles"), "wrong layout"),
    "unknown layout": (change("down", layout="planar"), "wrong layout"),
    "size": (change("down", nbytes=4096), "does not follow from shape and scheme"),
    "padded": (change("down", padded=(64, 64)), "does not follow from shape and scheme"),
    "padded dimensions": (change("down", padded=(64,)), "does not follow from shape and scheme"),
    "no dimensions": (change("down", shape=()), "wrong layout"),
    "three dimensions": (change("down", shape=(1, 1, 1)), "wrong layout"),
    "no rows": (change("down", shape=(0, 50)), "impossible shape"),
    "odd gate and up": (change("gate_up", shape=(99, 100)), "impossible shape"),
    "huge shape": (change("down", shape=(2**63 - 1, 2**63 - 1)), "does not follow"),
    "order": (swap_order, "not those of an expert"),
    "no down": (without("down"), "not those of an expert"),
    "one bias": (without("down_bias"), "not those of an expert"),
    "one more": (twice, "not those of an expert"),
    "nothing": (spec_with(tensors=()), "not those of an expert"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_layouts_from_a_file(case: str) -> None:
    damage, message = HOSTILE[case]
    spec = plan_record(100, 50, "q4g64", "q3g32s4", bias=True)
    check_spec(spec, "layer-00003.safetensors, layout 0")
    with pytest.raises(FormatError, match=message) as caught:
        check_spec(damage(spec), "layer-00003.safetensors, layout 0")
    assert str(caught.value).startswith("not a valid pack: layer-00003.safetensors, layout 0")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("scheme", "blocks_nbytes"), [("q2g16s4", 320), ("q3g32s4", 416)])
def test_a_layout_with_super_scales_for_what_is_left_over(scheme: str, blocks_nbytes: int) -> None:
    """As drafts of the format wrote it: refused by its size."""
    spec = plan_record(576, 256, scheme, "q4g64")
    (gate_up, down) = spec.tensors
    assert gate_up.nbytes == 32 * (2 * 64 + 9 * blocks_nbytes)
    longer = replace(gate_up, nbytes=gate_up.nbytes + 32 * 64)
    after = replace(down, offset=down.offset + 32 * 64)
    with pytest.raises(FormatError, match=r"does not follow .* convert the source again"):
        check_spec(replace(spec, tensors=(longer, after)), "here")


def test_projections_that_do_not_fit_together() -> None:
    one = plan_record(100, 50, "q4g64", "q4g64")
    other = plan_record(100, 60, "q4g64", "q4g64")

    def with_down(down: SubTensor) -> RecordSpec:
        return replace(one, tensors=(one.tensors[0], replace(down, offset=one.tensors[1].offset)))

    with pytest.raises(FormatError, match="do not fit together"):
        check_spec(with_down(other.tensors[1]), "here")
