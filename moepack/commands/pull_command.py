"""``moepack pull``."""

from __future__ import annotations

from pathlib import Path

import click

from moepack_formats.errors import UsageError
from moepack_runtime.hub.repo_id import looks_like_repo_id
from moepack_runtime.options import format_size

from .common import common_options, print_json, say, set_up


@click.command("pull")
@click.argument("repo")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--layers", metavar="LIST", help="Only the experts of these MoE layers, as 0-3,7.")
@click.option("--repair", is_flag=True, help="Replace what differs in a folder that has a pack.")
@common_options
def command(
    repo: str,
    out: Path,
    revision: str | None,
    layers: str | None,
    repair: bool,
    as_json: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """Download the pack in REPO, a Hub id as org/name, into the folder OUT.

    Every file's sha256 is compared, damaged ones are fetched again, and the manifest comes last.
    The same command again goes on with a pull that was broken off, at the commit where it began.
    In a folder that holds the pack already everything is compared and nothing fetched, unless
    --repair is given. With --layers the folder stays unfinished until the rest is pulled.
    """
    set_up(verbose)
    if not looks_like_repo_id(repo):
        raise UsageError("not a Hub id", where=repo, wanted="org/name")
    chosen = None if layers is None else parse_layers(layers)
    from moepack.hub.pull import pull
    from moepack_runtime.hub.progress import Bar

    bar = Bar(f"pulling {repo}")
    try:
        report = pull(repo, out, bar, revision=revision, layers=chosen, repair=repair)
    finally:
        bar.close()
    if as_json:
        print_json(
            {
                "pack": str(out),
                "commit": report.commit,
                "fetched": report.fetched,
                "kept": report.kept,
                "bytes": report.nbytes,
                "complete": report.complete,
            }
        )
        return
    if not report.complete:
        say("moepack: some layers only; pull without --layers to finish the pack")
    click.echo(
        f"{report.fetched} files ({format_size(report.nbytes)}) fetched, {report.kept} were there"
    )
    click.echo(f"{out} at {report.commit}")


def parse_layers(text: str) -> list[int]:
    """Numbers of a list such as ``0-3,7``.

    Raises:
        UsageError: It is no such list.
    """
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        numbers = (first, last if dash else first)
        if not all(n.isdecimal() and len(n) < 6 for n in numbers) or int(first) > int(numbers[1]):
            raise UsageError("not a list of layers", where="--layers", wanted="0-3,7", got=text)
        chosen.extend(range(int(first), int(numbers[1]) + 1))
    return chosen
