"""The memory of a text's keys, values and states, told before there is any."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from moepack_runtime.experts import find_experts
from moepack_runtime.memory.context_memory import DEFAULT_CONTEXT, context_nbytes, context_tokens
from tests import families

TOKENS = 40


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a cache's layer, or of a part of it."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, (dict, list, tuple))
    return [tensor for part in parts for tensor in tensors(part)] if nested else []


def kept(model: Any) -> int:
    """Bytes of what a model really keeps of a text."""
    ids = torch.arange(TOKENS).remainder(90)[None] + 3
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    found = [t for layer in cache.layers for t in tensors(vars(layer))]
    found += tensors(getattr(cache, "linear_cache", []))
    return sum(tensor.nbytes for tensor in {id(t): t for t in found}.values())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("gpt_oss", {"sliding_window": 16}),
        ("deepseek_v3", {}),
        ("qwen3_next", {}),
        ("jamba", {}),
        ("minimax", {}),
    ],
)
def test_it_is_what_a_model_keeps(family: str, changes: dict[str, Any]) -> None:
    """Windows, compressed keys and states among it, and caches of a family's own."""
    real = families.random_model(family, **changes)
    wanted = kept(real)
    model = real.to("meta")
    assert context_nbytes(model, find_experts(model), TOKENS) == wanted > 0


def test_what_cannot_be_told_is_estimated_from_the_config(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Jetmoe's attention asks for numbers that it has computed."""
    real = families.random_model("jetmoe")
    wanted = kept(real)
    model = real.to("meta")
    with caplog.at_level(logging.INFO):
        assert context_nbytes(model, find_experts(model), TOKENS) >= wanted
    assert "estimated from the config" in caplog.text


def test_room_is_for_what_is_asked_or_what_the_model_reads() -> None:
    model = families.random_model("mixtral")  # which reads 256 tokens
    assert context_tokens(model, None) == 256
    assert context_tokens(model, 1000) == 1000
    model.config.max_position_embeddings = 1 << 20
    assert context_tokens(model, None) == DEFAULT_CONTEXT
