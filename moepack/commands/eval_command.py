"""``moepack eval``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepack.intervals import Interval, paired_interval
from moepack_formats.errors import UsageError

from .common import (
    common_options,
    load,
    pack_tokenizer,
    print_json,
    read_text,
    runtime_options,
    set_up,
    statistics_json,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moepack.divergence import Scores


@click.command("eval")
@click.argument("pack")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="A UTF-8 text file.")
@click.option("--max-tokens", type=click.IntRange(2), help="Use only this many tokens.")
@click.option("--source", metavar="SRC", help="Compare with this checkpoint, a folder or Hub id.")
@runtime_options
@common_options
def command(
    pack: str,
    text: Path,
    max_tokens: int | None,
    source: str | None,
    as_json: bool,
    verbose: bool,
    debug: bool,
    **runtime: Any,
) -> None:
    """Measure the perplexity of PACK on a text.

    Windows have 1,024 tokens, or the model's context where that is shorter; the first token of
    each is not scored. With --source the mean KL divergence from the checkpoint that PACK was made
    of, and how often both think the same token most likely, with 95% intervals over the windows;
    the checkpoint is read layer by layer and may be larger than memory.

    With --cache-bias the text is decoded token by token, without and with it, and what it costs in
    perplexity and brings in hits is printed.
    """
    set_up(verbose)
    if source is not None and runtime["cache_bias"]:
        raise UsageError("--source and --cache-bias are measured one at a time")
    content = read_text(text)
    model = load(pack, **runtime)
    import torch
    from tqdm import tqdm

    from moepack.perplexity import measure

    tokenizer = pack_tokenizer(model, pack)
    ids = torch.tensor(tokenizer(content, verbose=False)["input_ids"][:max_tokens])
    if source is not None:
        scores = _compare(model, ids, source)
        _print_scores(scores, model, text.name, as_json)
        return
    if model.moepack.bias is not None:
        _print_bias(_bias_cost(model, ids), runtime["cache_bias"], text.name, as_json)
        return
    result = measure(model, ids, lambda runs: tqdm(runs, unit="window", disable=None))
    if as_json:
        print_json(
            {
                "perplexity": result.perplexity,
                "nats_per_token": result.nats,
                "tokens": result.tokens,
                "windows": result.windows,
                "text": text.name,
                **statistics_json(model.moepack.stats, model),
            }
        )
    else:
        click.echo(
            f"perplexity {result.perplexity:.4f} ({result.nats:.5f} nats a token, "
            f"{result.tokens} tokens in {result.windows} windows)"
        )


@dataclass(frozen=True)
class _BiasCost:
    """A text decoded without and with the cache bias.

    Attributes:
        tokens: Scored tokens of each window.
        nats: Nats of each window, without and with.
        hit_ratios: The same of the cache.
        nudged: Choices of routers that were changed, a token.
    """

    tokens: list[int]
    nats: tuple[list[float], list[float]]
    hit_ratios: tuple[float | None, float | None]
    nudged: float

    @property
    def perplexities(self) -> tuple[float, float]:
        """Without and with."""
        without, with_bias = (math.exp(sum(nats) / sum(self.tokens)) for nats in self.nats)
        return without, with_bias

    @property
    def loss(self) -> Interval:
        """Nats a token that the bias costs, paired by window."""
        return paired_interval(self.nats[1], self.nats[0], self.tokens)


def _bias_cost(model: Any, ids: Tensor) -> _BiasCost:
    from tqdm import tqdm

    from moepack.perplexity import decode_nats, window_length, windows

    bias, stats = model.moepack.bias, model.moepack.stats
    tokens = [len(run) - 1 for run in windows(ids, window_length(model))]
    if not tokens:
        raise UsageError("the text is too short to score", wanted="two tokens", got=len(ids))
    nats, hit_ratios = [], []
    for bias.active in (False, True):
        stats.reset()
        nats.append(decode_nats(model, ids, lambda runs: tqdm(runs, unit="window", disable=None)))
        hit_ratios.append(stats.hit_ratio)
    nudged = stats.nudged / sum(tokens)
    return _BiasCost(tokens, (nats[0], nats[1]), (hit_ratios[0], hit_ratios[1]), nudged)


def _print_bias(cost: _BiasCost, share: float, text: str, as_json: bool) -> None:
    without, with_bias = cost.perplexities
    if as_json:
        print_json(
            {
                "perplexity": with_bias,
                "perplexity_without_cache_bias": without,
                "nats_per_token_above": cost.loss.mean,
                "nats_per_token_above_95": cost.loss.half_width,
                "hit_ratio": cost.hit_ratios[1],
                "hit_ratio_without_cache_bias": cost.hit_ratios[0],
                "nudged_per_token": cost.nudged,
                "tokens": sum(cost.tokens),
                "windows": len(cost.tokens),
                "text": text,
            }
        )
        return
    hits = ["none" if ratio is None else f"{ratio:.1%}" for ratio in cost.hit_ratios]
    click.echo(f"cache bias   none       {share:g}")
    click.echo(f"perplexity   {without:<9.4f}  {with_bias:.4f} ({with_bias / without - 1:+.2%})")
    click.echo(f"cache hits   {hits[0]:<9}  {hits[1]}")
    click.echo(
        f"it costs {cost.loss:.4f} nats a token and changes {cost.nudged:.2f} choices a token "
        f"({_extent(cost.tokens)})"
    )


def _compare(model: Any, ids: Tensor, source: str) -> Scores:
    """Score the pack against its source, which is streamed through memory once."""
    from contextlib import closing

    from tqdm import tqdm

    from moepack.convert.sources.checkpoint import open_checkpoint
    from moepack.divergence import compare
    from moepack.perplexity import window_length, windows
    from moepack.streaming import StreamedModel

    runs = list(windows(ids, window_length(model)))
    if not runs:
        raise UsageError("the text is too short to score", wanted="two tokens", got=len(ids))
    with closing(open_checkpoint(source)) as checkpoint:
        streamed = StreamedModel(checkpoint)
        _check_same_model(model, streamed.model, source)
        bar = tqdm(total=len(streamed.adapters), unit="layer", disable=None)
        expected = streamed.run([run[None] for run in runs], lambda _: bar.update())
        return compare(
            runs,
            expected,
            lambda run: _logits(model, run),
            lambda runs: tqdm(runs, unit="window", disable=None),
        )


def _logits(model: Any, run: Tensor) -> Tensor:
    """``[1, T, V]`` on the CPU, where the source computes, for ``[1, T]`` ids."""
    logits: Tensor = model(run.to(model.device), use_cache=False).logits
    return logits.cpu()


def _check_same_model(model: Any, source: Any, where: str) -> None:
    ours, theirs = (m.config.get_text_config() for m in (model, source))
    for key in ("model_type", "vocab_size", "num_hidden_layers", "hidden_size"):
        values = getattr(ours, key, None), getattr(theirs, key, None)
        if values[0] != values[1]:
            raise UsageError(
                f"not the source of this pack: {key} differs",
                where=where,
                wanted=values[0],
                got=values[1],
            )


def _print_scores(scores: Scores, model: Any, text: str, as_json: bool) -> None:
    intervals = {
        "nats_per_token": scores.loss,
        "source_nats_per_token": scores.source_loss,
        "nats_per_token_above_source": scores.loss_difference,
        "kl_divergence": scores.mean_divergence,
        "top1_agreement": scores.agreement,
    }
    perplexity, source_perplexity = scores.loss.exp()[1], scores.source_loss.exp()[1]
    if as_json:
        values: dict[str, Any] = {
            "perplexity": perplexity,
            "source_perplexity": source_perplexity,
            "tokens": sum(scores.tokens),
            "windows": len(scores.tokens),
        }
        for name, interval in intervals.items():
            values[name] = interval.mean
            values[f"{name}_95"] = interval.half_width
        print_json({**values, "text": text, **statistics_json(model.moepack.stats, model)})
        return
    click.echo(
        f"perplexity      {perplexity:.4f}, of the source {source_perplexity:.4f} "
        f"({_extent(scores.tokens)})"
    )
    click.echo(f"above source    {scores.loss_difference:.4f} nats a token")
    click.echo(f"KL divergence   {scores.mean_divergence:.4f} nats a token")
    click.echo(f"top-1 agreement {scores.agreement:.2%}")
    if len(scores.tokens) > 1:
        click.echo("±: 95% intervals over windows")


def _extent(tokens: Sequence[int]) -> str:
    """How much was scored, of windows with so many tokens."""
    if len(tokens) == 1:
        return f"{tokens[0]} tokens in one window: no interval"
    return f"{sum(tokens)} tokens in {len(tokens)} windows"
