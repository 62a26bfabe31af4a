"""``moepack inspect``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from moepack_formats.errors import UsageError
from moepack_formats.pack import Pack
from moepack_runtime.hub.repo_id import looks_like_repo_id
from moepack_runtime.options import format_size

from .common import common_options, print_json, refuse_with, set_up


@click.command("inspect")
@click.argument("pack", required=False)
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option("--layer", type=click.IntRange(0), help="Show the records of one MoE layer.")
@click.option("--engine", is_flag=True, help="Show what computes with packed weights here.")
@common_options
def command(
    pack: str | None,
    revision: str | None,
    layer: int | None,
    engine: bool,
    as_json: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """Show what PACK, a pack's folder or Hub id, holds.

    Only its manifest and headers are read, those on the Hub by range requests.
    """
    set_up(verbose)
    if engine:
        refuse_with("--engine, which asks about this machine", "pack", "revision", "layer")
        from moepack_runtime.kernels import select  # brings torch, which nothing else here needs

        name = select().name
        print_json({"engine": name}) if as_json else click.echo(name)
        return
    if pack is None:
        raise UsageError("name a pack, or give --engine")
    with _open(pack, revision) as opened:
        if layer is not None:
            _print_layer(opened, layer, as_json)
            return
        values = _summary(opened)
    if as_json:
        print_json(values)
    else:
        _print_summary(values)


def _open(name: str, revision: str | None) -> contextlib.AbstractContextManager[Pack]:
    if Path(name).exists() or not looks_like_repo_id(name):
        if revision is not None:
            raise UsageError("a revision belongs to a Hub id, not to a folder", where=name)
        return Pack(Path(name))
    from moepack.hub.peek import remote_pack

    return remote_pack(name, revision)


def _summary(pack: Pack) -> dict[str, Any]:
    manifest = pack.manifest
    sizes = manifest.sizes
    return {
        "architecture": manifest.architecture,
        "model_type": manifest.model_type,
        "source": manifest.source.id,
        "revision": manifest.source.revision,
        "license": manifest.source.license,
        "format_version": manifest.format_version,
        "generator": manifest.generator,
        "quantizer": manifest.recipe.quantizer,
        "moe_layers": len(manifest.layers),
        "experts": sum(layer.num_experts for layer in manifest.layers),
        "expert_schemes": list(manifest.recipe.expert_schemes),
        "expert_parameters": sizes.expert_parameters,
        "expert_bytes": sizes.expert_nbytes,
        "expert_bits": sizes.expert_bits,
        "record_bytes": sorted({at.spec.nbytes for layer in pack.layers for at in layer}),
        "trunk_scheme": manifest.recipe.trunk_scheme,
        "head_scheme": manifest.recipe.head_scheme,
        "trunk_parameters": sizes.trunk_parameters,
        "trunk_bytes": sizes.trunk_nbytes,
        "trunk_bits": sizes.trunk_bits,
        "total_bits": sizes.total_bits,
        "packed_linears": len(manifest.packed),
        "files": len(manifest.files),
        "bytes": sum(entry.size for entry in manifest.files.values()),
    }


def _print_summary(values: dict[str, Any]) -> None:
    licence = f", licence {values['license']}" if values["license"] else ""
    revision = f" at {values['revision']}" if values["revision"] else ""
    records = ", ".join(format_size(nbytes) for nbytes in values["record_bytes"])
    schemes = ", ".join(values["expert_schemes"])
    rows = {
        "model": f"{values['architecture']} from {values['source']}{revision}{licence}",
        "format": f"version {values['format_version']}, by {values['generator']}, "
        f"quantizer {values['quantizer']}",
        "experts": f"{values['experts']} in {values['moe_layers']} layers, {schemes}, "
        f"{format_size(values['expert_bytes'])}, {values['expert_bits']:.3f} bits a weight",
        "records": f"{records} each",
        "trunk": f"{values['packed_linears']} packed modules ({values['trunk_scheme']}, head "
        f"{values['head_scheme']}), {format_size(values['trunk_bytes'])}, "
        f"{values['trunk_bits']:.3f} bits a weight",
        "total": f"{values['files']} files, {format_size(values['bytes'])}, "
        f"{values['total_bits']:.3f} bits a weight",
    }
    for name, text in rows.items():
        click.echo(f"{name:8} {text}")


def _print_layer(pack: Pack, layer: int, as_json: bool) -> None:
    if layer >= len(pack.layers):
        raise UsageError("no such MoE layer", wanted=f"0 to {len(pack.layers) - 1}", got=layer)
    records = [
        {
            "expert": expert,
            "file": at.file,
            "offset": at.offset,
            "bytes": at.spec.nbytes,
            "xxh3": at.xxh3,
            "tensors": {t.name: [t.scheme, list(t.shape)] for t in at.spec.tensors},
        }
        for expert, at in enumerate(pack.layers[layer])
    ]
    if as_json:
        print_json(
            {"layer": layer, "module": pack.manifest.layers[layer].module, "records": records}
        )
        return
    for record in records:
        tensors: Any = record["tensors"]
        parts = ", ".join(f"{name} {scheme} {shape}" for name, (scheme, shape) in tensors.items())
        click.echo(
            f"expert {record['expert']}: {record['file']} at {record['offset']}, "
            f"{record['bytes']} bytes: {parts}"
        )
