"""``moepack verify``."""

from __future__ import annotations

import click

from moepack_formats.pack import read_manifest
from moepack_formats.verify import verify_pack
from moepack_runtime.hub.locate import locate_pack
from moepack_runtime.options import format_size

from .common import common_options, print_json, set_up


@click.command("verify")
@click.argument("pack")
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@common_options
def command(pack: str, revision: str | None, as_json: bool, verbose: bool, debug: bool) -> None:
    """Check every byte of PACK: each file's sha256, each record's and each tensor's checksum.

    PACK is a folder, or a Hub id, whose pack is fetched into the Hub cache first.
    """
    set_up(verbose)
    folder = locate_pack(pack, revision=revision)
    from tqdm import tqdm

    total = sum(entry.size for entry in read_manifest(folder).files.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        report = verify_pack(folder, bar.update)
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
