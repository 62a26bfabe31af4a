"""Seeing, and changing, the top-k by which a router picks experts.

Routers differ in what they do before and after (softmax, sigmoid, groups, correction terms,
renormalising), but nearly all of them call ``topk`` once over a ``[tokens, experts]`` matrix. That
call is intercepted, so that no family needs code of its own: whatever follows it works on the
indices it gives out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)


class RouterTopK(TorchFunctionMode):
    """While active, hands the scores of a router's top-k to a function.

    What counts is a call over the last dimension of ``[T, E or more]`` scores. A block may choose
    from the same scores more than once.

    Args:
        experts: E; a router may have further places without an expert.
        change: Given ``[T, E or more]`` scores, returns those to choose by, or None for the same.
            The values of the top-k stay the router's own.
        changed: Is told the ``[T, K]`` indices without and with a change, of the first call.

    Attributes:
        seen: Whether such a call has come.
        ended: Set it when the routing is over; nothing is intercepted any more.
    """

    def __init__(
        self,
        experts: int,
        change: Callable[[Tensor], Tensor | None],
        changed: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._experts, self._change, self._changed = experts, change, changed
        self.seen = self.ended = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Intercept top-k; see the class."""
        keywords = dict(kwargs or {})
        if self.ended or func not in _TOPK:
            return func(*args, **keywords)
        call = dict(zip(("input", "k", "dim", "largest", "sorted"), args, strict=False)) | keywords
        scores: Tensor = call.pop("input")
        last = call.get("dim", -1) in (-1, scores.dim() - 1)
        if scores.dim() != 2 or scores.shape[1] < self._experts or not last:
            return func(*args, **keywords)
        first, self.seen = not self.seen, True
        changed = self._change(scores)
        if changed is None or not call.get("largest", True):
            return func(*args, **keywords)
        indices = torch.topk(changed, **call).indices
        if first and self._changed is not None:
            self._changed(torch.topk(scores, **call).indices, indices)
        return torch.return_types.topk((scores.gather(-1, indices), indices))
