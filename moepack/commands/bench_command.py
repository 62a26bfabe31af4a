"""``moepack bench``."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from moepack_formats.errors import UsageError
from moepack_runtime.options import format_size, parse_size

from .common import (
    common_options,
    is_mapped,
    load,
    physical_cores,
    print_json,
    refuse_with,
    runtime_options,
    set_up,
    statistics_json,
    statistics_line,
)
from .types import Seed


@click.command("bench")
@click.argument("pack")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens of the measured prefill.",
)
@click.option(
    "--context-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens before the measured decoding.",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seed", type=Seed(), default=0, show_default=True)
@click.option(
    "--ablation",
    is_flag=True,
    help="What cache and prefetch are worth on a GPU: full, without prefetch, without both, and "
    "whole layers moved. Give --vram, less than the experts need.",
)
@click.option(
    "--simulate-link",
    type=parse_size,
    metavar="SIZE",
    help="With --ablation: simulate a GPU behind a link of so many bytes a second, as 16GB. Times "
    "are then simulated too.",
)
@click.option(
    "--peer-gguf",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="Run llama.cpp with a GGUF file in turns with the pack (needs the extra `bench`).",
)
@click.option(
    "--profile",
    is_flag=True,
    help="Decode once more and say what of a token's time goes where (CPU).",
)
@runtime_options
@common_options
def command(
    pack: str,
    max_new_tokens: int,
    prompt_tokens: int,
    context_tokens: int,
    rounds: int,
    seed: int,
    ablation: bool,
    simulate_link: int | None,
    peer_gguf: Path | None,
    profile: bool,
    as_json: bool,
    verbose: bool,
    debug: bool,
    **runtime: Any,
) -> None:
    """Measure decode and prefill speed of PACK on random tokens.

    Tokens are drawn uniformly from the vocabulary: a model's own greedy text repeats itself, which
    would flatter the cache. Medians over rounds are printed; a round before them does not count.
    """
    from moepack_runtime.kernels import native

    from .. import speed

    set_up(verbose)
    if ablation:
        refuse_with("--ablation", "rounds", "context_tokens", "peer_gguf", "prefetch", "profile")
        lengths = prompt_tokens, max_new_tokens
        _ablation(pack, lengths, seed, simulate_link, as_json, runtime)
        return
    refuse_with("a measurement that is no --ablation", "simulate_link")
    runtime["context"] = runtime["context"] or max(prompt_tokens, context_tokens + max_new_tokens)
    model = load(pack, **runtime)
    threads = runtime["threads"] or physical_cores()
    vocabulary = model.config.get_text_config().vocab_size
    peer = None
    if peer_gguf is not None:
        room = max(prompt_tokens, context_tokens + max_new_tokens)
        peer = speed.LlamaRunner(peer_gguf, room, threads)
        vocabulary = min(vocabulary, peer.vocabulary)
    plan = speed.Plan(prompt_tokens, context_tokens, max_new_tokens, rounds, seed, vocabulary)
    # The CPU's memory says nothing about what a GPU reads from its own.
    reads = model.moepack.tier is None and native.available() is not None
    reads = reads and speed.room_to_read(model)
    memory = functools.partial(speed.read_bandwidth, threads) if reads else None
    runner = speed.PackRunner(model)
    mine, others, decoding = speed.measure(plan, runner, model.moepack.stats, peer, memory)
    demands = (decoding.hits + decoding.misses) / max(decoding.tokens, 1)
    nbytes = speed.packed_nbytes_per_token(model, demands)
    times = speed.profile(plan, runner, model) if profile else None
    values = {
        **_speeds_json("", mine),
        **statistics_json(decoding, model),
        "packed_bytes_per_token": nbytes,
        "packed_bytes_per_s": nbytes * statistics.median(mine.decode),
        "read_bytes_per_s": statistics.median(mine.memory) if mine.memory else None,
        "read_share": mine.share(nbytes),
    }
    if others is not None:
        values |= _speeds_json("peer_", others)
        values["decode_ratio"] = _ratio(mine.decode, others.decode)
        values["prefill_ratio"] = _ratio(mine.prefill, others.prefill)
    if profile:
        values["profile"] = None if times is None else asdict(times)
    if as_json:
        print_json(values)
        return
    _print_speeds("", mine)
    click.echo(f"cache    {statistics_line(decoding, model)}")
    if decoding.bytes_per_token is not None and not is_mapped(model):
        click.echo(f"         {format_size(decoding.bytes_per_token)} a token")
    rate = f"packed   {format_size(nbytes)} a token, {values['packed_bytes_per_s'] / 1e9:.1f} GB/s"
    if values["read_share"] is not None:
        memory_rate = values["read_bytes_per_s"] / 1e9
        rate += f", {values['read_share']:.0%} of the {memory_rate:.1f} GB/s that memory gives"
    click.echo(rate)
    click.echo(f"memory   {model.moepack.residency.describe()}")
    if model.moepack.tape is not None:
        click.echo(f"engine   {model.moepack.engine.name}; {model.moepack.tape.describe()}")
    if profile:
        _print_profile(times)
    if others is not None:
        click.echo(f"llama.cpp, {peer_gguf}")
        _print_speeds("  ", others)
        click.echo(
            f"ratio    decode {values['decode_ratio']:.2f}, prefill {values['prefill_ratio']:.2f} "
            "(medians of the rounds' ratios)"
        )


def _ablation(
    pack: str,
    lengths: tuple[int, int],
    seed: int,
    bandwidth: int | None,
    as_json: bool,
    runtime: dict[str, Any],
) -> None:
    """The paper's table."""
    import torch

    from moepack_runtime.gpu.measure import pinned_copy_peak
    from moepack_runtime.gpu.simulated_link import LinkSpec

    from ..ablation import Setting, table
    from ..ablation import ablation as run

    if bandwidth is None and not torch.cuda.is_available():
        raise UsageError(
            "an ablation needs a GPU", got="no CUDA device", remedy="--simulate-link 16GB"
        )
    more: dict[str, Any] = {}
    if bandwidth is not None:
        more = {"link": LinkSpec(bandwidth), "device": "cpu"}

    def loaded(setting: Setting) -> Any:
        choice: dict[str, Any] = {
            "prefetch": setting.prefetch,
            "keep": setting.keep,
            "offload": setting.offload,
        }
        if setting.offload == "layers":
            choice["vram"] = None  # two whole layers take what they take
        return load(pack, **{**runtime, **more, **choice})

    def tokens(model: Any) -> Any:
        vocabulary = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary, (1, sum(lengths)), generator=generator)

    rows = run(loaded, tokens, lengths[0], pinned_copy_peak)
    same = all(row.choices == rows[0].choices for row in rows)
    if as_json:
        values = [{k: v for k, v in asdict(row).items() if k != "choices"} for row in rows]
        print_json({"ablation": values, "same_tokens": same})
        return
    click.echo(table(rows))
    if not same:
        click.echo("the settings did not choose the same tokens (see --hybrid)")


def _speeds_json(prefix: str, speeds: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in ("decode", "prefill"):
        figures = getattr(speeds, name)
        values[f"{prefix}{name}_tokens_per_s"] = statistics.median(figures)
        values[f"{prefix}{name}_range"] = [min(figures), max(figures)]
    return values


def _print_speeds(indent: str, speeds: Any) -> None:
    for name in ("decode", "prefill"):
        figures = getattr(speeds, name)
        text = f"{statistics.median(figures):.2f} ({min(figures):.2f} to {max(figures):.2f})"
        click.echo(f"{indent}{name:8} {text} tokens/s")


def _print_profile(times: Any) -> None:
    if times is None:
        click.echo("profile  none: transformers' own code decodes")
        return
    click.echo(f"profile  {1e3 * times.seconds / times.tokens:.2f} ms a token, of which")
    for name, part in sorted(times.parts.items(), key=lambda item: -item[1].seconds):
        line = f"{1e3 * part.seconds / times.tokens:7.2f} ms  {name}"
        if part.nbytes and part.seconds:
            each, rate = part.nbytes / times.tokens, part.nbytes / part.seconds / 1e9
            line += f", {format_size(each)}, {rate:.1f} GB/s"
        click.echo(f"  {line}")


def _ratio(mine: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios round by round: a drift of the machine's speed cancels out."""
    return statistics.median(a / b for a, b in zip(mine, others, strict=True))
