"""What cannot be done with a loaded pack, said in one line where it is asked for."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from moepack_formats.errors import UsageError

from ..trunk.packed_modules import PackedEmbedding, PackedLinear, TiedHead, refuse_copy


def refuse(model: nn.Module) -> None:
    """Make a loaded model say what it cannot do: move, change its dtype, be copied, grow.

    Args:
        model: With its weights, on its device.
    """
    weak, this = weakref.ref(model), cast(Any, model)
    apply: Callable[..., nn.Module] = cast(Any, type(model))._apply
    resize: Callable[..., Any] = cast(Any, type(model)).resize_token_embeddings

    @functools.wraps(apply)
    def checked_apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        living = cast(nn.Module, weak())
        if _changes_nothing(fn, cast(Any, living)):
            return living
        return apply(living, fn, recurse)

    @functools.wraps(resize)
    def checked_resize(new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        living: Any = weak()
        embedding = living.get_input_embeddings()
        rows = _rows(embedding)
        if new_num_tokens in (None, rows):
            return embedding
        parts = (embedding, living.get_output_embeddings())
        if any(isinstance(part, (PackedEmbedding, PackedLinear, TiedHead)) for part in parts):
            raise UsageError(
                "the packed token embeddings of a pack cannot be resized",
                wanted=rows,
                got=new_num_tokens,
                remedy="resize the source model and convert it again",
            )
        return resize(living, new_num_tokens, *args, **kwargs)

    this._apply, this.resize_token_embeddings = checked_apply, checked_resize
    this.__deepcopy__ = this.__reduce_ex__ = refuse_copy


def _changes_nothing(fn: Callable[[Tensor], Tensor], model: Any) -> bool:
    """Whether what is to be done to all tensors leaves them as they are.

    Raises:
        UsageError: It moves them or changes their dtype.
    """
    before = torch.zeros(1, dtype=model.dtype, device=model.moepack.device)
    after = fn(before)
    if after.device != before.device:
        raise UsageError(
            "a loaded pack stays on its device",
            wanted=before.device,
            got=after.device,
            remedy='load it inside moepack.options(device="cuda") or device="cpu"',
        )
    if after.dtype != before.dtype:
        raise UsageError(
            "a loaded pack keeps the dtype that it was loaded with",
            wanted=before.dtype,
            got=after.dtype,
            remedy="load it inside moepack.options(dtype=...)",
        )
    if before.is_cpu and after.is_shared():
        raise UsageError(
            "a loaded pack cannot be shared between processes",
            remedy="load it in each of them; the system keeps one copy of mapped files",
        )
    return after is before


def _rows(embedding: Any) -> int:
    found: int = embedding.num_embeddings
    return found
