"""Layer files: stock safetensors reads them, and what our own reader refuses in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from moepack_formats.errors import FormatError
from moepack_formats.journal import Journal
from moepack_formats.layer import LayerFile, LayerPlan
from tests.formats.builders import LARGE_SPEC, SMALL_SPEC, layer_plan, layer_records, write_layer
from tests.formats.hostile import pad_header, refused, safetensors, write

NAME = "layer-00000.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layer")
    plan = layer_plan()
    (name,) = write_layer(folder, plan, layer_records(plan), Journal(folder, "x"), 10**9)
    return folder / name


def open_layer(path: Path) -> None:
    LayerFile(path, path.name).close()


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def rebuild(path: Path, header: dict[str, Any], data: bytes) -> Path:
    return write(path, safetensors(pad_header(json.dumps(header).encode()), data))


def test_stock_safetensors_reads_it(original: Path) -> None:
    records = layer_records(layer_plan())
    with safe_open(original, framework="numpy") as file:
        assert sorted(file.keys()) == [f"experts.{e}" for e in range(len(records))]
        assert json.loads(file.metadata()["moepack"])["num_experts"] == len(records)
        for expert, record in enumerate(records):
            assert np.array_equal(file.get_tensor(f"experts.{expert}"), record)


def test_records_are_aligned_and_in_place(original: Path) -> None:
    file = LayerFile(original, NAME)
    data = original.read_bytes()
    for expert, record in enumerate(layer_records(layer_plan())):
        location = file.locations[expert]
        assert location.offset % 4096 == 0
        assert data[location.offset : location.offset + record.size] == record.tobytes()
        assert location.spec == (LARGE_SPEC if expert == 1 else SMALL_SPEC)
    assert file.experts == range(3)
    assert file.size == file.header.end
    file.close()
    file.close()


def test_saved_again_by_stock_safetensors(original: Path, tmp_path: Path) -> None:
    again = tmp_path / NAME
    with safe_open(original, framework="numpy") as file:
        save_file(load_file(original), again, metadata=file.metadata())
    error = refused(
        FormatError, "another program has saved this file again", lambda: open_layer(again)
    )
    assert "restore the original file or convert again" in str(error)


def test_misaligned_base(original: Path, tmp_path: Path) -> None:
    data = original.read_bytes()
    length = int.from_bytes(data[:8], "little")
    shifted = safetensors(data[8 : 8 + length] + b" " * 8, data[8 + length :])
    path = write(tmp_path / NAME, shifted)
    refused(FormatError, "not aligned.*multiple of 4096, got 4104", lambda: open_layer(path))


TENSOR_CASES = {
    "dtype": (
        lambda h: h["experts.1"].update(dtype="I8"),
        "expert 1: record has the wrong type",
    ),
    "shape": (
        lambda h: h["experts.1"].update(shape=[2, 4096]),
        r"expert 1: .*wanted U8 \[8192\], got U8 \[2, 4096\]",
    ),
    "missing": (lambda h: h.update({"experts.9": h.pop("experts.2")}), "wanted experts.2"),
    "extra": (
        lambda h: h.update(x={"dtype": "U8", "shape": [0], "data_offsets": [16384, 16384]}),
        "unknown tensor .got x",
    ),
    "exchanged": (
        lambda h: h.update({"experts.0": h["experts.2"], "experts.2": h["experts.0"]}),
        "not in the order of the experts",
    ),
    "no metadata": (lambda h: h.pop("__metadata__"), "no moepack metadata"),
    "other metadata": (lambda h: h["__metadata__"].pop("moepack"), "no moepack metadata"),
}


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_tensors(case: str, original: Path, tmp_path: Path) -> None:
    damage, message = TENSOR_CASES[case]
    header = header_of(original)
    damage(header)
    path = rebuild(tmp_path / NAME, header, original.read_bytes()[-16384:])
    refused(FormatError, message, lambda: open_layer(path))


def spec(layer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = layer["specs"][0]
    return found


HUGE = 2**62
METADATA_CASES = {
    "version": (lambda m: m.update(format_version=2), "unknown format version.*upgrade moepack"),
    "version with unknown fields": (
        lambda m: m.update(format_version=2, codec="zstd"),
        "unknown format version",
    ),
    "version 0": (lambda m: m.update(format_version=0), "unknown format version"),
    "version as text": (lambda m: m.update(format_version="1"), "format_version: .*wrong type"),
    "unknown field": (lambda m: m.update(more=1), "unknown field 'more'"),
    "missing field": (lambda m: m.pop("layer"), "field 'layer' is missing"),
    "negative layer": (lambda m: m.update(layer=-1), "layer: .*wrong type"),
    "module": (lambda m: m.update(module=None), "module: .*wrong type"),
    "more experts than the layer": (lambda m: m.update(num_experts=2), "expert counts disagree"),
    "huge first": (lambda m: m.update(first_expert=HUGE), "expert counts disagree"),
    "huge first and count": (
        lambda m: m.update(first_expert=HUGE, num_experts=HUGE + 3),
        f"an expert is missing .wanted experts.{HUGE}",
    ),
    "no experts": (lambda m: m.update(spec_of=[], xxh3=[]), "expert counts disagree"),
    "checksums": (lambda m: m["xxh3"].pop(), "expert counts disagree"),
    "checksum length": (
        lambda m: m.update(xxh3=[m["xxh3"][0], "ab", m["xxh3"][2]]),
        "expert 1: not a checksum",
    ),
    "checksum letters": (
        lambda m: m.update(xxh3=[m["xxh3"][0].upper().replace("0", "X"), *m["xxh3"][1:]]),
        "expert 0: not a checksum",
    ),
    "layout index": (lambda m: m.update(spec_of=[0, 2, 0]), "names a layout that is not there"),
    "no layouts": (lambda m: m.update(specs=[]), "names a layout that is not there"),
    "scheme": (
        lambda m: spec(m)["tensors"][0].update(scheme="zstd"),
        "layout 0, gate_up: unknown scheme",
    ),
    "scheme not text": (
        lambda m: spec(m)["tensors"][0].update(scheme=4),
        "scheme: .*wrong type",
    ),
    "short record": (lambda m: spec(m).update(nbytes=0), "layout 0: record is shorter"),
    "huge record": (lambda m: spec(m).update(nbytes=2**63 - 4096), "layout 0: record is not"),
    "misaligned": (
        lambda m: spec(m)["tensors"][1].update(offset=1537),
        "layout 0, down: misaligned sub-tensor",
    ),
    "unused bad layout": (
        lambda m: m["specs"].append({**spec(m), "tensors": []}),
        "layout 2: sub-tensors are not those of an expert",
    ),
    "another layout": (lambda m: m.update(spec_of=[0, 0, 0]), "expert 1: record has the wrong"),
}


@pytest.mark.parametrize("case", METADATA_CASES)
def test_metadata(case: str, original: Path, tmp_path: Path) -> None:
    damage, message = METADATA_CASES[case]
    header = header_of(original)
    layer = json.loads(header["__metadata__"]["moepack"])
    damage(layer)
    header["__metadata__"]["moepack"] = json.dumps(layer)
    path = rebuild(tmp_path / NAME, header, original.read_bytes()[-16384:])
    refused(FormatError, message, lambda: open_layer(path))


@pytest.mark.parametrize(
    "text", ["", "[]", "1", " {}", '{"layer":1,"layer":1}', '{"a":' + "[" * 100_000, "\ud83d"]
)
def test_metadata_that_is_not_an_object(text: str, original: Path, tmp_path: Path) -> None:
    header = header_of(original)
    header["__metadata__"]["moepack"] = text
    path = rebuild(tmp_path / NAME, header, b"")
    refused(FormatError, "JSON", lambda: open_layer(path))


def test_other_metadata_is_ignored(original: Path, tmp_path: Path) -> None:
    header = header_of(original)
    header["__metadata__"]["note"] = "mine"
    open_layer(rebuild(tmp_path / NAME, header, original.read_bytes()[-16384:]))


def test_split_names_and_places() -> None:
    plan = LayerPlan(7, "m", (SMALL_SPEC, LARGE_SPEC), (0, 1, 1, 0, 0))
    assert plan.files() == [("experts/layer-00007.safetensors", range(5))]
    assert plan.files(4096 + 8192) == [
        ("experts/layer-00007-of-00003-00000.safetensors", range(2)),
        ("experts/layer-00007-of-00003-00001.safetensors", range(2, 4)),
        ("experts/layer-00007-of-00003-00002.safetensors", range(4, 5)),
    ]
    assert [experts for _, experts in plan.files(1)] == [range(i, i + 1) for i in range(5)]
