"""``moepack verify``."""

from __future__ import annotations

from pathlib import Path

import click

from moepack_formats.pack import read_manifest
from moepack_formats.verify import verify_pack
from moepack_runtime.options import format_size

from .common import common_options, print_json, set_up


@click.command("verify")
@click.argument("pack", type=click.Path(path_type=Path))
@common_options
def command(pack: Path, as_json: bool, verbose: bool, debug: bool) -> None:
    """Check every byte of PACK: each file's sha256, each record's and each tensor's checksum."""
    set_up(verbose)
    from tqdm import tqdm

    total = sum(entry.size for entry in read_manifest(pack).files.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        report = verify_pack(pack, bar.update)
    if as_json:
        print_json(
            {
                "ok": True,
                "files": report.files,
                "records": report.records,
                "trunk_tensors": report.trunk_tensors,
                "bytes": report.nbytes,
            }
        )
    else:
        click.echo(
            f"good: {report.files} files, {report.records} expert records, "
            f"{report.trunk_tensors} trunk tensors, {format_size(report.nbytes)}"
        )
