"""Finding routers by what they do, not by their names.

The router of a layer is the module whose output holds the very tensor that reaches the experts as
``top_k_index``. It is looked for with hooks during the first real forward pass, together with the
norm whose output it reads. A router that cannot be called again alone (it takes tensors that are
not the model's own, or gives other indices the second time) is not used: that layer's experts are
then not guessed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import ExpertsAdapter

_RECENT = 24
"""Module outputs that are kept while looking; a norm stands close before its router."""


@dataclass(frozen=True)
class Router:
    """How to ask a layer's router again.

    Attributes:
        module: The router.
        arguments: Its further positional arguments.
        keywords: Its keyword arguments.
        position: Place of the indices in its output.
        flat: Whether it reads ``[T, H]`` rather than ``[B, S, H]``.
        norm: The module whose output it reads, if there is one.
    """

    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    position: int
    flat: bool
    norm: nn.Module | None

    def ask(self, x: Tensor, *, normed: bool) -> Tensor:
        """The experts that the router picks.

        Args:
            x: ``[..., H]``.
            normed: Whether ``x`` has gone through a norm; if not, this layer's own is applied.

        Returns:
            ``[T, K]`` indices.
        """
        if not normed and self.norm is not None:
            # forward(), not the call: hooks that watch the real pass must not see this one.
            x = self.norm.forward(x)
        x = x.reshape(-1, x.shape[-1]) if self.flat else x.reshape(1, -1, x.shape[-1])
        output = self.module.forward(x, *self.arguments, **self.keywords)
        indices: Tensor = output[self.position]
        return indices.reshape(-1, indices.shape[-1])


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any


class RouterFinder:
    """Watches one forward pass.

    Args:
        model: The model.
        adapters: Its experts modules, which are not watched.

    Attributes:
        routers: For each layer seen, its router or None.
    """

    def __init__(self, model: nn.Module, adapters: list[ExpertsAdapter]) -> None:
        self.routers: dict[int, Router | None] = {}
        self._calls: deque[_Call] = deque(maxlen=_RECENT)
        self._layers = len(adapters)
        self._model = model
        inside = {m for adapter in adapters for m in adapter.module.modules()}
        self._hooks = [
            module.register_forward_hook(self._note, with_kwargs=True)
            for module in model.modules()
            if module not in inside
        ]

    @property
    def done(self) -> bool:
        """Whether every layer was seen."""
        return len(self.routers) == self._layers

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._calls.clear()

    def found(self, layer: int, top_k_index: Tensor) -> None:
        """The experts of ``layer`` were called with these indices."""
        if layer not in self.routers:
            self.routers[layer] = self._look(top_k_index)
        self._calls.clear()
        if self.done:
            self.close()

    def give_up(self) -> None:
        """What the first pass has not shown is not looked for any longer."""
        for layer in range(self._layers):
            self.routers.setdefault(layer, None)
        self.close()

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._calls.append(_Call(module, args, kwargs, output))

    def _look(self, top_k_index: Tensor) -> Router | None:
        for call in reversed(self._calls):
            outputs = call.output if isinstance(call.output, (tuple, list)) else ()
            for position, value in enumerate(outputs):
                if value is top_k_index:
                    return self._checked(call, position, top_k_index)
        return None

    def _checked(self, call: _Call, position: int, top_k_index: Tensor) -> Router | None:
        x, arguments, keywords = _split_input(call)
        others = [*arguments, *keywords.values()]
        if x is None or any(self._varies(value) for value in others):
            return None
        router = Router(call.module, arguments, keywords, position, x.dim() == 2, self._norm_of(x))
        with torch.no_grad():
            again = router.ask(x, normed=True)
        return router if torch.equal(again, top_k_index.reshape(again.shape)) else None

    def _varies(self, value: Any) -> bool:
        """Whether an argument is a tensor that another pass would change."""
        own = (*self._model.parameters(), *self._model.buffers())
        return isinstance(value, Tensor) and not any(value is tensor for tensor in own)

    def _norm_of(self, x: Tensor) -> nn.Module | None:
        """The module that made ``x`` out of one tensor of the same size, without weights mixing."""
        for call in self._calls:
            source, arguments, keywords = _split_input(call)
            same = (
                isinstance(call.output, Tensor)
                and call.output.data_ptr() == x.data_ptr()
                and call.output.numel() == x.numel()
            )
            if same and source is not None and source.numel() == x.numel():
                # A norm has at most two vectors of parameters; anything else mixes channels.
                vectors = all(p.dim() <= 1 for p in call.module.parameters())
                return call.module if vectors and not arguments and not keywords else None
        return None


def _split_input(call: _Call) -> tuple[Tensor | None, tuple[Any, ...], dict[str, Any]]:
    """The first tensor a module was given, and the rest of its arguments."""
    if call.arguments and isinstance(call.arguments[0], Tensor):
        return call.arguments[0], tuple(call.arguments[1:]), dict(call.keywords)
    for name, value in call.keywords.items():
        if isinstance(value, Tensor):
            rest = {k: v for k, v in call.keywords.items() if k != name}
            # The input comes first when the router is asked again.
            return value, tuple(call.arguments), rest
    return None, (), {}
