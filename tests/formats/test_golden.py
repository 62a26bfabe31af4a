"""The format's bytes, written out: a change of one of them must not pass unnoticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moepack_formats import checksum, strict_json
from moepack_formats.journal import Journal
from moepack_formats.layer import LayerPlan
from moepack_formats.manifest import (
    FileEntry,
    LayerEntry,
    Manifest,
    PackedEntry,
    Recipe,
    Sizes,
    Source,
    from_json,
    to_json,
)
from moepack_formats.matrix import dequantize, pack_matrix
from moepack_formats.record import pack_record
from moepack_formats.schemes import SCHEMES, get_scheme
from moepack_formats.tensor_file import TensorPlan
from moepack_formats.writer import TensorFileWriter
from tests.formats import golden, golden_bytes
from tests.formats.builders import layer_plan, write_layer

SPEC_MD = Path(__file__).parents[2] / "formats" / "SPEC.md"


def spec_example(name: str) -> str:
    """A fenced block of SPEC.md."""
    text = SPEC_MD.read_text(encoding="utf-8")
    return text.partition(f"```{name}\n")[2].partition("\n```")[0]


@pytest.mark.parametrize("name", SCHEMES)
def test_matrix(name: str) -> None:
    size, digest, text = golden_bytes.MATRICES[name]
    packed = pack_matrix(golden.golden_matrix(name, full=False)).tobytes()
    assert golden.dump(packed) == golden.dump(golden.undump(text, size))
    assert len(packed) == size
    full = pack_matrix(golden.golden_matrix(name, full=True)).tobytes()
    assert checksum.xxh3(full) == digest


def test_every_scheme_has_a_name_that_says_what_it_is() -> None:
    parameters = {s.name: (s.bits, s.group, s.scale_bits, s.span) for s in SCHEMES.values()}
    assert parameters == {
        "q2g64": (2, 64, 16, 64),
        "q3g64": (3, 64, 16, 64),
        "q4g64": (4, 64, 16, 64),
        "q4g128": (4, 128, 16, 128),
        "q6g64": (6, 64, 16, 64),
        "q8g64": (8, 64, 16, 64),
        "q2g16s8": (2, 16, 8, 64),
        "q2g16s4": (2, 16, 4, 256),
        "q3g32s4": (3, 32, 4, 256),
        "q3g16s5": (3, 16, 5, 256),
        "f16": (16, 0, 0, 64),
        "bf16": (16, 0, 0, 64),
        "f32": (32, 0, 0, 64),
    }


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("q2g64", 2.5),
        ("q3g64", 3.5),
        ("q4g64", 4.5),
        ("q4g128", 4.25),
        ("q6g64", 6.5),
        ("q8g64", 8.5),
        ("q2g16s8", 3 + 64 / 4096),
        ("q2g16s4", 2.625),
        ("q3g32s4", 3.375),
        ("q3g16s5", 3.375),
        ("f16", 16),
        ("bf16", 16),
        ("f32", 32),
    ],
)
def test_true_bits(name: str, bits: float) -> None:
    assert get_scheme(name).bits_per_weight(14336, 4096) == bits


def test_examples_of_the_specification(tmp_path: Path) -> None:
    matrix = pack_matrix(golden.SPEC_GATE)
    assert golden.dump(matrix.tobytes()) == spec_example("hex q4g64")
    three_bits = pack_matrix(golden.SPEC_THREE_BITS)
    assert golden.dump(three_bits.tobytes()) == spec_example("hex q3g64")
    six_bits = pack_matrix(golden.SPEC_SIX_BITS)
    assert golden.dump(six_bits.tobytes()) == spec_example("hex q6g64")
    assert dequantize(golden.SPEC_SIX_BITS)[0, ::4].tolist() == [1, 2, 3, 45]
    signed = pack_matrix(golden.SPEC_SIGNED)
    assert golden.dump(signed.tobytes()) == spec_example("hex q3g16s5")
    assert dequantize(golden.SPEC_SIGNED)[0, ::16].tolist() == [-9, 6, -32, 97.5]
    left_over = pack_matrix(golden.SPEC_LEFT_OVER)
    assert golden.dump(left_over.tobytes()) == spec_example("hex q2g16s4")
    values = dequantize(golden.SPEC_LEFT_OVER)[0]
    assert (values[0], values[256]) == (1, 2.75)
    assert not values[1:256].any()
    assert (values[257:272] == -0.25).all()
    assert not values[272:].any()
    sizes = matrix.size, three_bits.size, six_bits.size, signed.size, left_over.size
    assert sizes == (576, 448, 832, 480, 1664)
    record = pack_record(golden.SPEC_RECORD, golden.SPEC_PARTS)
    assert record.size == 4096
    assert golden.dump(record.tobytes()) == spec_example("hex record")
    assert checksum.xxh3(record.data) == "16eb2a6d2693a6de6ca4518ff20aa06d"

    journal = Journal(tmp_path, "x")
    plan = LayerPlan(0, "model.layers.0.mlp.experts", (golden.SPEC_RECORD,), (0,))
    (layer,) = write_layer(tmp_path, plan, [record], journal, 10**9).items()
    header = spec_example("json layer").encode()
    stored = (tmp_path / layer[0]).read_bytes()
    assert stored == bytes.fromhex("f80f000000000000") + header.ljust(4088) + record.tobytes()

    name = "model.layers.0.self_attn.o_proj"
    tensor = TensorPlan(f"{name}.packed", "U8", (576,))
    writer = TensorFileWriter(
        tmp_path, "model.safetensors", [tensor], lambda _: {"format": "pt"}, journal
    )
    writer.resume()
    writer.append(matrix)
    trunk = writer.finish()
    manifest = Manifest(
        format="moepack",
        format_version=1,
        min_reader=1,
        generator="moepack 0.1.0",
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        source=Source("example/tiny-moe", "0123456789abcdef0123456789abcdef01234567", "apache-2.0"),
        recipe=Recipe("rtn", "q4g64", "source", ("q3g32s4", "q4g64")),
        sizes=Sizes(golden.SPEC_RECORD.parameters, 4096, 12, 576, 116),
        layers=(LayerEntry(0, plan.module, 1, (layer[0],)),),
        packed={name: PackedEntry("linear", "q4g64", (2, 6))},
        trunk={tensor.name: trunk.digests[0]},
        files={
            file: FileEntry(facts.size, facts.sha256, facts.header_xxh3)
            for file, facts in (layer, ("model.safetensors", trunk))
        },
    )
    assert to_json(manifest).decode() == spec_example("json manifest") + "\n"
    assert from_json(to_json(manifest)) == manifest
    text = SPEC_MD.read_text(encoding="utf-8")
    assert layer[1].sha256 in text
    assert layer[1].header_xxh3 is not None
    assert layer[1].header_xxh3 in text


def test_split_layer(tmp_path: Path) -> None:
    """A larger layer: mixed schemes, a split, all digests."""
    plan = layer_plan(3)
    records = [
        (np.arange(plan.specs[spec].nbytes) * (expert + 3) % 251).astype(np.uint8)
        for expert, spec in enumerate(plan.spec_of)
    ]
    facts = write_layer(tmp_path, plan, records, Journal(tmp_path, "x"), 12_288)
    assert {name: (f.size, f.header_xxh3, f.sha256) for name, f in facts.items()} == {
        "experts/layer-00003-of-00002-00000.safetensors": (
            16384,
            "8b7adcad83a88c7359760b4f24d71899",
            "951cd8248a3afb443e4336924205a3d06c823f39e841e26e547c83b782c2e61b",
        ),
        "experts/layer-00003-of-00002-00001.safetensors": (
            8192,
            "6aa6174becf738a43558990f8dbd6c8b",
            "29692aa373b3371f8a533ea5e040b47b45540a0beaad398611e7a192aedc0982",
        ),
    }


def test_json_is_one_text_for_one_value() -> None:
    assert strict_json.dumps({"b": [1, None, "é"], "a": {}}) == '{"b":[1,null,"\\u00e9"],"a":{}}'
    text = spec_example("json layer")
    assert json.dumps(json.loads(text), separators=(",", ":")) == text
