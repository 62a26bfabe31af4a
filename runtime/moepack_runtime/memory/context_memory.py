"""How much memory the keys and values, or states, of a text take."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..experts import IMPLEMENTATION, ExpertsAdapter, register_experts_function

if TYPE_CHECKING:  # also imported while transformers is still importing its own
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096
"""Tokens that there is room for where nobody says how long a text becomes."""


def context_tokens(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens to have room for: what was asked for, or the default if the model reads as many."""
    if asked is not None:
        return asked
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(DEFAULT_CONTEXT, longest) if isinstance(longest, int) else DEFAULT_CONTEXT


def context_nbytes(model: PreTrainedModel, adapters: Sequence[ExpertsAdapter], tokens: int) -> int:
    """Bytes of transformers' own cache after one text of so many tokens.

    The model reads the text on the meta device, where nothing is computed, so that windows,
    compressed keys and states count as what they are.

    Args:
        model: On the meta device, with modules that can run there.
        adapters: Its experts modules, stripped or not; they are given something else to compute.
        tokens: Length of the text.
    """
    text = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    for adapter in adapters:
        adapter.install(_same_shape)
    register_experts_function()
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        with torch.no_grad():
            output = cast(Any, model)(input_ids=text, past_key_values=_usual(model), use_cache=True)
        cache = output.past_key_values
        kept = _tensors([vars(cache), *map(vars, cache.layers)])
        return sum(tensor.nbytes for tensor in {id(t): t for t in kept}.values())
    except (RuntimeError, NotImplementedError) as error:  # asks for what it has computed
        _log.info("the context's memory is estimated from the config: %s", error)
        return _estimate(model, tokens)


def _same_shape(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return torch.empty_like(hidden)


def _usual(model: PreTrainedModel) -> Any:
    """The usual cache; None where a model makes its own."""
    from transformers import DynamicCache

    if not cast(Any, model)._supports_default_dynamic_cache():
        return None
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a cache."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _estimate(model: PreTrainedModel, tokens: int) -> int:
    """Keys and values as wide as the config says, in all layers: more than windows or states."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize)
