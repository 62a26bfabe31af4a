"""``moepack plan``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moepack_runtime.options import format_size, parse_size

from .common import common_options, print_json, set_up

if TYPE_CHECKING:
    from moepack.convert.sizing import Fit, Machine, ModelSizes


@click.command("plan")
@click.argument("src")
@click.option("--vram", type=parse_size, default="0", metavar="SIZE", help="GPU memory, if any.")
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="TOKENS",
    help="The longest text that --vram has room for, as for generate [default: 4096, or as many as "
    "the model reads].",
)
@click.option(
    "--ram",
    type=parse_size,
    metavar="SIZE",
    help="Memory for the whole process, as for generate [default: a safe share of what is free].",
)
@click.option(
    "--disk", type=parse_size, metavar="SIZE", help="Disk to use [default: what is free]."
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=".",
    help="Where the pack would lie; that disk is measured.",
)
@click.option("--attn-bits", type=int, default=4, show_default=True, help="As for convert.")
@click.option("--revision", help="Branch, tag or commit of a Hub source.")
@common_options
def command(
    src: str,
    vram: int,
    context: int | None,
    ram: int | None,
    disk: int | None,
    folder: Path,
    attn_bits: int,
    revision: str | None,
    as_json: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """Say which recipe for SRC, a checkpoint folder or a Hub id, fits this machine.

    Of a Hub source only the small files are downloaded. Memory and disk are measured for a second.
    Where none fits, the figures are printed all the same, and what is missing (exit code 5).
    """
    set_up(verbose)
    from moepack.convert.bandwidth import disk_speed, memory_speed
    from moepack.convert.sizing import Machine, best, lacking, recipes, sizes_of
    from moepack.convert.sources.checkpoint import source_config
    from moepack_runtime.cache.residency import fixed_nbytes
    from moepack_runtime.disk.room import free_nbytes
    from moepack_runtime.memory.available import default_budget

    sizes = sizes_of(source_config(src, revision=revision), attn_bits=attn_bits, context=context)
    machine = Machine(
        vram,
        default_budget() if ram is None else ram,
        free_nbytes(folder) if disk is None else disk,
        memory_speed(),
        disk_speed(folder),
        fixed_nbytes(),
    )
    fits = recipes(sizes, machine)
    chosen = best(fits)
    if as_json:
        print_json(
            {
                "recipe": asdict(chosen) if chosen is not None else None,
                "recipes": [asdict(one) for one in fits],
                "expert_parameters": sizes.expert_parameters,
                "trunk_bytes": sizes.trunk_nbytes,
                "context_bytes": sizes.context_nbytes,
                "machine": asdict(machine),
            }
        )
    else:
        _print(sizes, machine, fits, chosen)
    if chosen is None:
        raise lacking(sizes, machine)
    if not as_json:
        click.echo(f"moepack convert {src} OUT --attn-bits {attn_bits} {chosen.options}")


def _print(sizes: ModelSizes, machine: Machine, fits: list[Fit], chosen: Fit | None) -> None:
    context = f", context {format_size(sizes.context_nbytes)}" if machine.vram else ""
    speeds = f"{machine.memory_speed / 1e9:.1f} GB/s, disk {machine.disk_speed / 1e9:.2f} GB/s"
    click.echo(
        f"{sizes.expert_parameters:,} expert parameters, trunk {format_size(sizes.trunk_nbytes)}"
        f"{context}; memory {speeds}"
    )
    click.echo("  experts          bits  size        in memory  tok/s at most")
    for one in fits:
        mark = "*" if one == chosen else " "
        note = "" if one.fits_disk else "  (more than the disk)"
        click.echo(
            f"{mark} {one.name:14} {one.bits:6.3f}  {format_size(one.nbytes):10}  "
            f"{one.resident:8.0%}  {one.tokens_per_s:10.1f}{note}"
        )
