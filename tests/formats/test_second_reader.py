"""Two readers, one of them written from SPEC.md alone, get the same float32 values bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from moepack_formats.journal import Journal
from moepack_formats.layer import LayerPlan
from moepack_formats.matrix import QuantizedMatrix, dequantize, pack_matrix, unpack_matrix
from moepack_formats.record import Part, pack_record, plan_record
from moepack_formats.schemes import get_scheme
from tests.formats import second_reader
from tests.formats.builders import (
    ODD_SHAPES,
    SCHEME_NAMES,
    TRUNK_PACKED,
    build_pack,
    layer_plan,
    random_matrix,
    random_parts,
    trunk_data,
    write_layer,
)


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return (
        ours.dtype == theirs.dtype == np.float32
        and ours.shape == theirs.shape
        and np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    )


def values(part: Part) -> np.ndarray:
    return dequantize(part) if isinstance(part, QuantizedMatrix) else part


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_matrix(name: str, shape: tuple[int, int]) -> None:
    scheme = get_scheme(name)
    matrix = random_matrix(scheme, *shape, np.random.default_rng(sum(shape)))
    packed = pack_matrix(matrix)
    assert second_reader.tile_nbytes(name, shape[1]) == scheme.tile_nbytes(shape[1])
    theirs = second_reader.read_matrix(name, packed.tobytes(), *shape)
    assert same_bits(dequantize(matrix), theirs)
    assert same_bits(dequantize(unpack_matrix(packed, scheme, shape)), theirs)


@pytest.mark.parametrize("name", ["q2g16s8", "q2g16s4", "q3g32s4", "q3g16s5"])
def test_products_that_round_and_underflow(name: str) -> None:
    """Extreme outer factors: every product is rounded by itself, subnormals are kept."""
    scheme, rng = get_scheme(name), np.random.default_rng(3)
    matrix = random_matrix(scheme, 16, 256, rng)
    assert matrix.outer_scales is not None
    tiny = np.float32(1.1e-42) if scheme.scale_bits == 8 else np.float16(6e-8)
    matrix.outer_scales[:8] = tiny
    if scheme.has_minima:
        assert matrix.outer_minima is not None
        matrix.outer_minima[4:12] = -tiny
    theirs = second_reader.read_matrix(name, pack_matrix(matrix).tobytes(), 16, 256)
    assert same_bits(dequantize(matrix), theirs)


RECORDS = {
    "mixed schemes": plan_record(100, 48, "q2g16s4", "q3g32s4"),
    "biases, rows not of 16": plan_record(65, 17, "q4g64", "q4g128", bias=True),
    "no gate": plan_record(48, 100, "q3g64", "q2g16s8", gated=False),
    "no gate, biases": plan_record(20, 33, "q8g64", "q2g64", gated=False, bias=True),
    "raw": plan_record(33, 20, "bf16", "f16", bias=True),
    "raw 32": plan_record(20, 33, "f32", "f32"),
    "smallest": plan_record(1, 1, "q3g32s4", "q2g16s4", bias=True),
    "signed scales": plan_record(320, 48, "q3g16s5", "q3g16s5", bias=True),
    "last super-group short": plan_record(320, 16, "q3g32s4", "q3g32s4"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_layer_file(name, tmp_path) -> None:
    spec = RECORDS[name]
    parts = [random_parts(spec, np.random.default_rng(seed)) for seed in (0, 1)]
    records = [pack_record(spec, part) for part in parts]
    plan = LayerPlan(4, "model.layers.9.mlp.experts", (spec,), (0, 0))
    (file,) = write_layer(tmp_path, plan, records, Journal(tmp_path, "x"), 10**9)
    theirs = second_reader.read_layer_file(tmp_path / file)
    assert list(theirs) == [0, 1]
    for expert, part in enumerate(parts):
        assert theirs[expert].keys() == part.keys()
        for key, ours in part.items():
            assert same_bits(values(ours), theirs[expert][key]), key


def test_pack_with_records_of_two_sizes_and_split_layers(tmp_path) -> None:
    manifest = build_pack(tmp_path, max_nbytes=9000)
    for layer in manifest.layers:
        assert len(layer.files) == 3
        plan = layer_plan(layer.index)
        rng = np.random.default_rng(100 + layer.index)
        theirs: dict[int, dict[str, np.ndarray]] = {}
        for file in layer.files:
            theirs |= second_reader.read_layer_file(tmp_path / file)
        for expert in range(layer.num_experts):
            for key, ours in random_parts(plan.specs[plan.spec_of[expert]], rng).items():
                assert same_bits(values(ours), theirs[expert][key])


def test_packed_trunk(tmp_path) -> None:
    build_pack(tmp_path)
    theirs = second_reader.read_packed_trunk(tmp_path)
    (entry,) = TRUNK_PACKED.values()
    ours = dequantize(unpack_matrix(trunk_data()[0], get_scheme(entry.scheme), entry.shape))
    assert list(theirs) == list(TRUNK_PACKED)
    assert same_bits(ours, theirs["lm_head"])
