"""``moepack trace``."""

from __future__ import annotations

import hashlib
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepack_formats import osio
from moepack_formats.errors import MoepackError, ResourceError, UsageError
from moepack_formats.manifest import MANIFEST_NAME

from .common import (
    common_options,
    load,
    pack_tokenizer,
    print_json,
    read_text,
    runtime_options,
    say,
    set_up,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moepack_formats.pack import Pack
    from moepack_runtime.trace.trace_file import TraceInfo, TraceWriter

MAX_AHEAD = 64
"""Each is a column of the file, and of the last there are no guesses in most models."""

_TIMED = 48
_FEWEST_TIMED = 8
_DISK_SECONDS = 0.5


@click.command("trace")
@click.argument("pack")
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--text", required=True, type=click.Path(path_type=Path), help="A UTF-8 text file.")
@click.option("--max-tokens", type=click.IntRange(2), help="Use only this many tokens.")
@click.option(
    "--ahead",
    type=click.IntRange(0, MAX_AHEAD),
    default=3,
    show_default=True,
    help="Also record what routers say when asked 1 to N layers early.",
    metavar="N",
)
@runtime_options
@common_options
def command(
    pack: str,
    out: Path,
    text: Path,
    max_tokens: int | None,
    ahead: int,
    as_json: bool,
    verbose: bool,
    debug: bool,
    **runtime: Any,
) -> None:
    """Record which experts the tokens of a text use in PACK, as a Parquet file OUT.

    `moepack simulate` reads it, and --pin of the commands that run a pack. The text is read in
    windows as by `moepack eval`. Speed of decoding and of the pack's disk are measured for a
    second and kept in the file. All of it runs on the CPU.
    """
    set_up(verbose)
    if runtime["device"] == "cuda":
        raise UsageError("routing is recorded on the CPU", remedy="leave out --device cuda")
    runtime["device"] = "cpu"  # which is what auto means here
    content = read_text(text)
    if out.exists() and out.samefile(text):
        raise UsageError("the trace would take the place of the text", where=out)
    from moepack_runtime.trace.trace_file import TraceWriter

    writer = TraceWriter(out, ahead)
    try:
        model = load(pack, **{**runtime, "prefetch": False})
        ids = _token_ids(model, content, max_tokens, pack)
        tokens, top_k = _record(model, ids, ahead, writer)
        info = _info(model, ids, ahead, top_k)
        writer.finish(info)
    finally:
        writer.abandon()
    if as_json:
        print_json(
            {
                "tokens": tokens,
                "layers": info.layers,
                "compute_ms": info.compute_ms,
                "disk_mbps": info.disk_mbps,
            }
        )
    else:
        click.echo(f"{tokens} tokens in {info.layers} layers: {out}")


def _token_ids(model: Any, content: str, max_tokens: int | None, pack: str) -> Tensor:
    import torch

    tokenizer = pack_tokenizer(model, pack)
    ids = tokenizer(content, verbose=False)["input_ids"][:max_tokens]
    if len(ids) < 2:
        raise UsageError("the text is too short", wanted="two tokens", got=len(ids))
    return torch.tensor(ids)


def _record(model: Any, ids: Tensor, ahead: int, writer: TraceWriter) -> tuple[int, int]:
    """Write the routing of each window; returns the number of tokens, and of experts a token."""
    from tqdm import tqdm

    from moepack.perplexity import window_length, windows
    from moepack_runtime.trace.recorder import RoutingRecorder

    tokens = top_k = 0
    runs = list(windows(ids, window_length(model)))
    with RoutingRecorder(model, ahead) as recorder:
        recorder.find_routers()
        if recorder.missing:
            say(
                f"the routers of {len(recorder.missing)} layers cannot be asked early; "
                "nothing is guessed for them"
            )
        for run in tqdm(runs, unit="window", disable=None):
            model(run[None], use_cache=False, logits_to_keep=1)
            routing = recorder.take(len(run))
            writer.write(routing)
            tokens += len(run)
            top_k = routing.experts.shape[-1]
    return tokens, top_k


def _info(model: Any, ids: Tensor, ahead: int, top_k: int) -> TraceInfo:
    from moepack_runtime.trace.trace_file import TraceInfo

    runtime = model.moepack
    manifest = (runtime.pack.folder / MANIFEST_NAME).read_bytes()
    return TraceInfo(
        pack=hashlib.sha256(manifest).hexdigest(),
        model=runtime.pack.manifest.source.id,
        record_nbytes=tuple(
            tuple(at.spec.nbytes for at in records) for records in runtime.pack.layers
        ),
        top_k=top_k,
        ahead=ahead,
        fixed_nbytes=runtime.budget.fixed,
        compute_ms=_compute_ms(model, ids),
        disk_mbps=_disk_mbps(runtime.pack),
    )


def _compute_ms(model: Any, ids: Tensor) -> float | None:
    """Milliseconds to decode a token that finds all its experts, or None if too few do."""
    stats, times = model.moepack.stats, []
    cache = model(ids[None, :1], use_cache=True).past_key_values
    for token in ids[1 : 1 + _TIMED]:
        misses, start = stats.misses, time.perf_counter()
        cache = model(token[None, None], past_key_values=cache, use_cache=True).past_key_values
        if stats.misses == misses:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3 if len(times) >= _FEWEST_TIMED else None


def _disk_mbps(pack: Pack) -> float | None:
    """Of the pack's own records, one after another past the page cache; None where that fails.

    What the page cache gives is not recorded in its place: `moepack simulate` would promise it.
    """
    from moepack_runtime.disk.reads_at_once import read_speed

    records = [at for layer in pack.layers for at in layer]
    try:
        for at in {at.descriptor: at for at in records}.values():
            with osio.io_errors(at.file):
                if not osio.set_direct(at.descriptor, True):
                    raise ResourceError("the file system refuses direct reads", where=at.file)
        return read_speed(records, 1, _DISK_SECONDS) / 1e6
    except MoepackError as error:
        say(f"the speed of the disk is not known: {error}")
        return None
