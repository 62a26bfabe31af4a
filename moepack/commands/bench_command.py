"""``moepack bench``."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import click

from moepack_formats.errors import UsageError
from moepack_runtime.options import format_size, parse_size

from .common import (
    common_options,
    load,
    print_json,
    runtime_options,
    set_up,
    statistics_json,
    statistics_line,
)


@click.command("bench")
@click.argument("pack")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
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
@runtime_options
@common_options
def command(
    pack: str,
    max_new_tokens: int,
    prompt_tokens: int,
    rounds: int,
    seed: int,
    ablation: bool,
    simulate_link: int | None,
    as_json: bool,
    verbose: bool,
    debug: bool,
    **runtime: Any,
) -> None:
    """Measure decode and prefill speed of PACK on random tokens.

    Tokens are drawn uniformly from the vocabulary: a model's own greedy text repeats itself, which
    would flatter the cache. Medians over rounds are printed.
    """
    set_up(verbose)
    if ablation:
        lengths = prompt_tokens, max_new_tokens
        _ablation(pack, lengths, seed, simulate_link, as_json, runtime)
        return
    model = load(pack, **runtime)
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    length = prompt_tokens + max_new_tokens
    prefill, decode = [], []
    stats, decoding = model.moepack.stats, type(model.moepack.stats)()
    for _ in range(rounds):
        ids = torch.randint(vocabulary, (1, length), generator=generator).to(model.device)
        start = time.perf_counter()
        cache = model(ids[:, :prompt_tokens], use_cache=True, logits_to_keep=1).past_key_values
        prefill.append(prompt_tokens / (time.perf_counter() - start))
        stats.reset()  # hits and bytes are those of decoding
        start = time.perf_counter()
        for i in range(prompt_tokens, length):
            cache = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
        decode.append(max_new_tokens / (time.perf_counter() - start))
        decoding.add(stats)
    values = {
        "decode_tokens_per_s": statistics.median(decode),
        "decode_range": [min(decode), max(decode)],
        "prefill_tokens_per_s": statistics.median(prefill),
        "prefill_range": [min(prefill), max(prefill)],
        **statistics_json(decoding),
    }
    if as_json:
        print_json(values)
        return
    click.echo(f"decode   {_speed(decode)} tokens/s")
    click.echo(f"prefill  {_speed(prefill)} tokens/s")
    click.echo(f"cache    {statistics_line(decoding)}")
    if decoding.bytes_per_token is not None:
        click.echo(f"         {format_size(decoding.bytes_per_token)} a token")
    click.echo(f"memory   {model.moepack.residency.describe()}")


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


def _speed(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
