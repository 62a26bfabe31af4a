"""``moepack eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moepack_formats import osio
from moepack_formats.errors import UsageError

from .common import (
    common_options,
    load,
    print_json,
    runtime_options,
    set_up,
    statistics_json,
)


@click.command("eval")
@click.argument("pack")
@click.option("--text", required=True, type=click.Path(path_type=Path), help="A UTF-8 text file.")
@click.option("--max-tokens", type=click.IntRange(2), help="Use only this many tokens.")
@runtime_options
@common_options
def command(
    pack: str,
    text: Path,
    max_tokens: int | None,
    as_json: bool,
    verbose: bool,
    debug: bool,
    **runtime: Any,
) -> None:
    """Measure the perplexity of PACK on a text.

    Windows have 1,024 tokens, or the model's context where that is shorter; the first token of
    each is not scored.
    """
    set_up(verbose)
    try:
        with osio.io_errors(text):
            content = text.read_text(encoding="utf-8")  # line ends of any system become \n
    except UnicodeDecodeError:
        raise UsageError("not a UTF-8 text", where=text) from None

    model = load(pack, **runtime)
    import torch
    from tqdm import tqdm

    from moepack.perplexity import measure
    from moepack_runtime.loading import load_tokenizer

    tokenizer = load_tokenizer(model.moepack.pack.folder)
    if tokenizer is None:
        raise UsageError("the pack has no tokenizer: its source had none", where=pack)
    ids = torch.tensor(tokenizer(content, verbose=False)["input_ids"][:max_tokens])
    result = measure(model, ids, lambda runs: tqdm(runs, unit="window", disable=None))
    if as_json:
        print_json(
            {
                "perplexity": result.perplexity,
                "nats_per_token": result.nats,
                "tokens": result.tokens,
                "windows": result.windows,
                **statistics_json(model.moepack.stats),
            }
        )
    else:
        click.echo(
            f"perplexity {result.perplexity:.4f} ({result.nats:.5f} nats a token, "
            f"{result.tokens} tokens in {result.windows} windows)"
        )
