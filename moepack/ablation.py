"""What the parts of offloading are worth: the paper's table, measured.

Eliseev & Mazur, arXiv 2312.17238, table 2: the full method, without prefetch, without cache and
prefetch, and naive, which moves every layer whole. All rows run the same tokens through the same
packed records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moepack_formats.errors import UsageError


@dataclass(frozen=True)
class Setting:
    """One row's choice.

    Attributes:
        name: For a person.
        prefetch: Whether the next layer's experts are guessed.
        keep: Whether experts stay in GPU memory.
        offload: Whether ``experts`` are moved or whole ``layers``.
    """

    name: str
    prefetch: bool
    keep: bool
    offload: str


SETTINGS = (
    Setting("full", True, True, "experts"),
    Setting("without prefetch", False, True, "experts"),
    Setting("without cache and prefetch", False, False, "experts"),
    Setting("naive", False, True, "layers"),
)


@dataclass(frozen=True)
class Row:
    """What a setting gave.

    Attributes:
        name: Of the setting.
        tokens_per_s: Decoded tokens a second.
        hit_ratio: Demands that found their expert in GPU memory, or on its way.
        recall: Share of the needed experts that were guessed; None without prefetch.
        bytes_per_token: Bytes of records copied to the GPU for a token.
        link_share: Bytes copied a second over the peak of pinned copies.
        choices: The most likely next token at each step, to compare settings by.
    """

    name: str
    tokens_per_s: float
    hit_ratio: float | None
    recall: float | None
    bytes_per_token: float
    link_share: float
    choices: tuple[int, ...]


def ablation(
    load: Callable[[Setting], Any],
    tokens: Callable[[Any], Tensor],
    prompt_tokens: int,
    peak: Callable[[Any], float],
) -> list[Row]:
    """Decode the same tokens in every setting.

    Args:
        load: Loads the model with a setting.
        tokens: ``[1, T]`` tokens for a model, the same for each of them.
        prompt_tokens: How many of them go through the model at once before decoding.
        peak: Bytes a second of pinned copies of a model's link.

    Raises:
        UsageError: The experts all fit, so that there is nothing to compare.
    """
    rows = []
    for setting in SETTINGS:
        model = load(setting)
        try:
            ids = tokens(model).to(model.device)
            rows.append(_measure(setting, model, ids, prompt_tokens, peak))
        finally:
            model.moepack.close()
    return rows


def _measure(
    setting: Setting, model: Any, ids: Tensor, prompt_tokens: int, peak: Callable[[Any], float]
) -> Row:
    runtime = model.moepack
    if setting.offload == "experts" and not hasattr(runtime.residency, "slots"):
        raise UsageError(
            "all experts fit in GPU memory: there is nothing to compare", remedy="lower --vram"
        )
    link, stats = runtime.tier.link, runtime.stats
    rate = peak(link)
    prompt = model(ids[:, :prompt_tokens], use_cache=True, logits_to_keep=1)
    cache, choices = prompt.past_key_values, []
    link.finish()
    stats.reset()
    start = link.clock()
    for i in range(prompt_tokens, ids.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        choices.append(out.logits[0, -1].argmax())
    link.finish()
    seconds = link.clock() - start
    tokens = ids.shape[1] - prompt_tokens
    return Row(
        setting.name,
        tokens / seconds,
        stats.hit_ratio,
        stats.recall,
        stats.bytes_copied / tokens,
        stats.bytes_copied / seconds / rate,
        tuple(int(choice) for choice in choices),
    )


def table(rows: list[Row]) -> str:
    """The rows for a person; the same text is valid Markdown."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    lines = [
        "| setting | tokens/s | hits | recall | MB a token | of the link's peak |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.tokens_per_s:.2f} | {share(row.hit_ratio)} | "
            f"{share(row.recall)} | {row.bytes_per_token / 1e6:.2f} | {row.link_share:.1%} |"
        )
    return "\n".join(lines)
