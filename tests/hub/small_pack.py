"""Packs to move."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from moepack_formats.journal import Journal
from moepack_formats.layer import LayerPlan, layer_writer
from moepack_formats.manifest import MANIFEST_NAME, FileEntry, LayerEntry, to_json
from moepack_formats.pack import read_manifest
from moepack_formats.record import plan_record
from tests.packs import make_pack

TINY_MOE = Path(__file__).parents[1] / "assets" / "tiny-moe"


def make_small_pack(out: Path) -> Path:
    """The small model of the tests as a pack, quantized quickly."""
    make_pack(TINY_MOE, out, quantizer="rtn", expert_bits=2)
    return out


def make_random_pack(small: Path, out: Path, *, layers: int, experts: int, width: int) -> Path:
    """A pack of any size with random bytes for records: enough to move, not to run.

    Args:
        small: A real pack, whose small files and trunk it gets.
        out: The folder to write.
        layers: MoE layers, each in a file of its own.
        experts: Experts of each.
        width: Hidden and intermediate size: records have about 1.7 * width^2 bytes.
    """
    out.mkdir(parents=True)
    manifest = read_manifest(small)
    first = {name for layer in manifest.layers for name in layer.files}
    files = {name: facts for name, facts in manifest.files.items() if name not in first}
    for name in files:
        (out / name).write_bytes((small / name).read_bytes())
    spec = plan_record(width, width, "q4g64", "q4g64")
    generator = np.random.default_rng(0)
    entries = []
    with closing(Journal(out, "random")) as journal:
        for index in range(layers):
            plan = LayerPlan(index, f"model.layers.{index}.mlp.experts", (spec,), (0,) * experts)
            name, span = plan.files()[0]
            with closing(layer_writer(out, plan, name, span, journal)) as writer:
                writer.resume()
                for _ in span:
                    writer.append(generator.integers(0, 256, spec.nbytes, np.uint8))
                facts = writer.finish()
            files[name] = FileEntry(facts.size, facts.sha256, facts.header_xxh3)
            entries.append(LayerEntry(index, plan.module, experts, (name,)))
        journal.remove()
    changed = replace(manifest, layers=tuple(entries), files=dict(sorted(files.items())))
    (out / MANIFEST_NAME).write_bytes(to_json(changed))
    return out
