"""``moepack push``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moepack_formats import osio
from moepack_formats.errors import UsageError
from moepack_runtime.hub.repo_id import looks_like_repo_id
from moepack_runtime.options import format_size

from .common import common_options, print_json, set_up

if TYPE_CHECKING:
    from moepack.hub.card import Quality


@click.command("push")
@click.argument("pack", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Create the repository as a private one.")
@click.option("--revision", help="Branch to push to, made when there is none.")
@click.option(
    "--compress",
    is_flag=True,
    help="Upload experts compressed: smaller, but the Hub can no longer deduplicate them.",
)
@click.option(
    "--quality",
    type=click.Path(path_type=Path),
    help="What `moepack eval --json` printed; its perplexity goes on the model card.",
)
@common_options
def command(
    pack: Path,
    repo: str,
    private: bool,
    revision: str | None,
    compress: bool,
    quality: Path | None,
    as_json: bool,
    verbose: bool,
    debug: bool,
) -> None:
    """Upload PACK, a pack's folder, to REPO, a Hub id as org/name.

    Only what the repository lacks is sent, and the manifest comes last; the same command again
    goes on with a push that was broken off. Log in with `hf auth login`, or set HF_TOKEN.
    """
    set_up(verbose)
    if not looks_like_repo_id(repo):
        raise UsageError("not a Hub id", where=repo, wanted="org/name")
    from moepack.hub.push import push
    from moepack_runtime.hub.progress import Bar

    bar = Bar(f"pushing {repo}")
    try:
        report = push(
            pack,
            repo,
            bar,
            private=private,
            revision=revision,
            compress=compress,
            quality=None if quality is None else _read_quality(quality),
        )
    finally:
        bar.close()
    if as_json:
        print_json(
            {
                "url": report.url,
                "commit": report.commit,
                "uploaded": report.uploaded,
                "kept": report.kept,
                "bytes": report.nbytes,
            }
        )
        return
    click.echo(
        f"{report.uploaded} files ({format_size(report.nbytes)}) sent, {report.kept} were there"
    )
    click.echo(f"{report.url} at {report.commit}")


def _read_quality(path: Path) -> Quality:
    from moepack.hub.card import Quality

    with osio.io_errors(path):
        data = path.read_bytes()
    try:
        values = json.loads(data)
        text = str(values.get("text") or path.stem)
        return Quality(float(values["perplexity"]), int(values["tokens"]), text)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            "not what `moepack eval --json` prints", where=path, got=type(error).__name__
        ) from None
