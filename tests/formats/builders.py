"""Small matrices, records and packs for the tests of the formats package."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moepack_formats import osio
from moepack_formats.journal import FinishedFile, Journal
from moepack_formats.layer import LayerPlan, layer_writer
from moepack_formats.manifest import (
    MANIFEST_NAME,
    FileEntry,
    LayerEntry,
    Manifest,
    PackedEntry,
    Recipe,
    Sizes,
    Source,
    to_json,
)
from moepack_formats.matrix import QuantizedMatrix, pack_matrix
from moepack_formats.record import Part, RecordSpec, pack_record, plan_record
from moepack_formats.schemes import SCHEMES, Scheme, get_scheme
from moepack_formats.tensor_file import TensorPlan
from moepack_formats.tiles import Bytes
from moepack_formats.writer import TensorFileWriter

SCHEME_NAMES = tuple(SCHEMES)
ODD_SHAPES = (
    *((1, 1), (17, 65), (16, 64), (5, 100), (33, 48)),
    *((3, 320), (3, 400), (18, 440), (2, 2880)),
)


def random_matrix(
    scheme: Scheme, rows: int, cols: int, rng: np.random.Generator
) -> QuantizedMatrix:
    """Codes over their whole range, signed minima, finite scales of many sizes."""
    if scheme.is_raw:
        values = (rng.standard_normal((rows, cols)) * 3).astype(np.float32)
        codes = {
            "f16": lambda: values.astype(np.float16).view(np.uint16),
            "bf16": lambda: (values.view(np.uint32) >> 16).astype(np.uint16),
            "f32": lambda: values.view(np.uint32),
        }[scheme.name]()
        return QuantizedMatrix(scheme, (rows, cols), codes)
    codes = rng.integers(0, 1 << scheme.bits, (rows, cols)).astype(np.uint8)
    groups, supers = -(-cols // scheme.group), -(-cols // 256)
    if scheme.scale_bits == 4:  # What is left over is under the last whole one.
        supers = max(-(-cols // 64) // 4, 1)

    def floats(width: int, dtype: type) -> np.ndarray:
        exponents = rng.integers(-9, 6, (rows, width))
        return (rng.standard_normal((rows, width)) * 2.0**exponents).astype(dtype)

    if scheme.scale_bits == 16:
        both = floats(groups, np.float16), floats(groups, np.float16)
        return QuantizedMatrix(scheme, (rows, cols), codes, *both)
    if scheme.scale_bits == 8:
        return QuantizedMatrix(
            scheme,
            (rows, cols),
            codes,
            rng.integers(0, 256, (rows, groups)).astype(np.uint8),
            rng.integers(-128, 128, (rows, groups)).astype(np.int8),
            floats(1, np.float32),
            floats(1, np.float32),
        )
    if scheme.scale_bits == 5:
        return QuantizedMatrix(
            scheme,
            (rows, cols),
            codes,
            scales=rng.integers(-16, 16, (rows, groups)).astype(np.int8),
            outer_scales=floats(supers, np.float16),
        )
    return QuantizedMatrix(
        scheme,
        (rows, cols),
        codes,
        rng.integers(0, 16, (rows, groups)).astype(np.uint8),
        rng.integers(0, 16, (rows, groups)).astype(np.uint8),
        floats(supers, np.float16),
        floats(supers, np.float16),
    )


def random_parts(spec: RecordSpec, rng: np.random.Generator) -> dict[str, Part]:
    """Something for every part of a record."""
    parts: dict[str, Part] = {}
    for tensor in spec.tensors:
        stem = tensor.name.removesuffix("_bias")
        names = ("gate", "up") if stem == "gate_up" else (stem,)
        rows = tensor.shape[0] // len(names)
        for name in names:
            if len(tensor.shape) == 1:
                parts[f"{name}_bias"] = rng.standard_normal(rows).astype(np.float32)
            else:
                scheme = get_scheme(tensor.scheme)
                parts[name] = random_matrix(scheme, rows, tensor.shape[1], rng)
    return parts


SMALL_SPEC = plan_record(20, 24, "q2g16s4", "q3g32s4")
LARGE_SPEC = plan_record(20, 24, "q4g64", "q8g64")
EXPERTS = 3


def layer_plan(index: int = 0) -> LayerPlan:
    """Three experts, the middle one with more bits than the others."""
    return LayerPlan(
        index, f"model.layers.{index}.mlp.experts", (SMALL_SPEC, LARGE_SPEC), (0, 1, 0)
    )


def layer_records(plan: LayerPlan) -> list[Bytes]:
    """Records for every expert of a layer, the same on every call."""
    rng = np.random.default_rng(100 + plan.index)
    specs = [plan.specs[i] for i in plan.spec_of]
    return [pack_record(spec, random_parts(spec, rng)) for spec in specs]


def write_layer(
    folder: Path, plan: LayerPlan, records: Sequence[Bytes], journal: Journal, max_nbytes: int
) -> dict[str, FinishedFile]:
    """Write all files of a layer, resuming whatever is there."""
    facts = {}
    for name, experts in plan.files(max_nbytes):
        writer = layer_writer(folder, plan, name, experts, journal)
        for expert in experts[writer.resume() :]:
            writer.append(records[expert])
        facts[name] = writer.finish()
    return facts


TRUNK = (
    TensorPlan("lm_head.packed", "U8", (get_scheme("q4g64").packed_nbytes(18, 20),)),
    TensorPlan("model.norm.weight", "F32", (20,)),
)
TRUNK_PACKED = {"lm_head": PackedEntry("linear", "q4g64", (18, 20))}


def trunk_data() -> list[Bytes]:
    """Bytes for ``TRUNK``."""
    rng = np.random.default_rng(7)
    head = pack_matrix(random_matrix(get_scheme("q4g64"), 18, 20, rng))
    return [head, rng.standard_normal(20).astype("<f4").view(np.uint8)]


def write_trunk(folder: Path, journal: Journal) -> FinishedFile:
    """Write ``model.safetensors``, resuming whatever is there."""
    writer = TensorFileWriter(
        folder, "model.safetensors", TRUNK, lambda _: {"format": "pt"}, journal
    )
    data = trunk_data()
    for piece in data[writer.resume() :]:
        writer.append(piece)
    return writer.finish()


def make_manifest(
    layers: Mapping[int, Mapping[str, FinishedFile]],
    trunk: FinishedFile,
    others: Mapping[str, bytes],
) -> Manifest:
    """The manifest of a pack made of these files."""
    plans = [layer_plan(index) for index in layers]
    files = {
        name: FileEntry(facts.size, facts.sha256, facts.header_xxh3)
        for name, facts in [
            *[item for layer in layers.values() for item in layer.items()],
            ("model.safetensors", trunk),
        ]
    }
    for name, data in others.items():
        files[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
    return Manifest(
        format="moepack",
        format_version=1,
        min_reader=1,
        generator="moepack tests",
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        source=Source("example/tiny-moe", "0123456789abcdef", "apache-2.0"),
        recipe=Recipe("rtn", "q4g64", "source", ("q2g16s4", "q3g32s4", "q4g64", "q8g64")),
        sizes=Sizes(8640, sum(plan.nbytes for plan in plans), 380, trunk.size, 36080),
        layers=tuple(
            LayerEntry(plan.index, plan.module, plan.num_experts, tuple(layers[plan.index]))
            for plan in plans
        ),
        packed=TRUNK_PACKED,
        trunk={plan.name: digest for plan, digest in zip(TRUNK, trunk.digests, strict=True)},
        files=files,
    )


def build_pack(folder: Path, *, num_layers: int = 2, max_nbytes: int = 5_000_000_000) -> Manifest:
    """Write a whole small pack the way a conversion does, resuming whatever is there."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, "tests")
    plans = [layer_plan(index) for index in range(num_layers)]
    layers = {
        plan.index: write_layer(folder, plan, layer_records(plan), journal, max_nbytes)
        for plan in plans
    }
    trunk = write_trunk(folder, journal)
    config = b'{"model_type": "moepack", "base_model_type": "mixtral"}\n'
    osio.write_file(folder / "config.json", config)
    manifest = make_manifest(layers, trunk, {"config.json": config})
    osio.write_file(folder / MANIFEST_NAME, to_json(manifest))
    journal.remove()
    return manifest


def rewrite_manifest(folder: Path, manifest: Manifest, **changes: object) -> Manifest:
    """Store a manifest with some fields exchanged."""
    changed = replace(manifest, **changes)  # type: ignore[arg-type]
    (folder / MANIFEST_NAME).write_bytes(to_json(changed))
    return changed


def seal_file(folder: Path, manifest: Manifest, name: str) -> Manifest:
    """Give ``name`` the size and digests that it has now: damage that is consistent with itself."""
    from moepack_formats import checksum

    data = (folder / name).read_bytes()
    header = None
    if name.endswith(".safetensors"):
        header = checksum.xxh3(data[: 8 + int.from_bytes(data[:8], "little")])
    entry = FileEntry(len(data), hashlib.sha256(data).hexdigest(), header)
    return rewrite_manifest(folder, manifest, files={**manifest.files, name: entry})
