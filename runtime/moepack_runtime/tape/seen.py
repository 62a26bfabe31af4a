"""What a user may have done to a model since it was recorded, looked at ahead of every token.

Hooks, and forwards put in the place of a module's own, are called by nobody while tokens are
played; a replaced weight is not what the recording reads. A model has a thousand modules, so both
are looked for without a loop in Python: 0.04 ms a token for 79 modules.
"""

from __future__ import annotations

from itertools import chain, repeat
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

_version = attrgetter("_version")
_training = itemgetter("training")

_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Fields of a config that ask for more than logits."""

_HARMLESS = ("moepack_runtime.", "transformers.utils.output_capturing")
"""Where hooks are from that have nothing to see in a played token. transformers' own stay on a
model after a call that asked for hidden states, and do nothing in calls that do not."""


class Wishes:
    """What a model's config, its mode, and hooks and forwards of its submodules ask of a pass.

    Hooks of the model itself are called at any rate.

    Args:
        model: The model, as nobody has changed it yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._harmless: set[int] = set()
        self._depth = _depth(model)
        self._own: dict[nn.Module, Any] = {}
        self.look_again(model)

    def look_again(self, model: nn.Module) -> None:
        """The model has other modules now."""
        modules = [module for module in model.modules() if module is not model]
        new = {module: vars(module).get("forward") for module in modules}
        self._own = {module: self._own.get(module, own) for module, own in new.items()}
        self._tables: list[dict[int, Any]] = [
            of_all_modules._global_forward_hooks,
            of_all_modules._global_forward_pre_hooks,
        ]
        for module in modules:
            self._tables += (module._forward_hooks, module._forward_pre_hooks)
        self._attributes = [vars(module) for module in modules]
        self._forwards = list(self._own.values())

    def more_than_logits(self, model: nn.Module) -> bool:
        """Whether a user wants to see, or do, something inside of a pass.

        So does ``generate()`` where it guesses tokens with the first few layers.
        """
        config: Any = model.config
        if model.training or _depth(model) != self._depth:
            return True
        inner = config.get_text_config()
        if any(getattr(one, name, False) for one in (config, inner) for name in _OUTPUTS):
            return True
        return self._somebody_looks()

    def _somebody_looks(self) -> bool:
        if any(map(_training, self._attributes)):
            return True
        forwards = list(map(dict.get, self._attributes, repeat("forward")))
        if forwards != self._forwards:
            return True
        if self._harmless.issuperset(chain.from_iterable(self._tables)):
            return False
        hooks = {number: hook for table in self._tables for number, hook in table.items()}
        self._harmless = {number for number, hook in hooks.items() if _is_harmless(hook)}
        return len(self._harmless) < len(hooks)


class Weights:
    """The modules and tensors of a model at one time.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tables: list[dict[str, Any]] = []
        for module in model.modules():
            tables = (module._modules, module._parameters, module._buffers)
            self._tables += [table for table in tables if table]
        self._tensors = [t for table in self._tables for t in table.values() if _is_tensor(t)]
        # In inference mode made ones count no versions.
        self._counted = [t for t in self._tensors if not t.is_inference()]
        self._state = self._look()

    @property
    def same(self) -> bool:
        """Whether nothing was replaced or written to since."""
        return self._state == self._look()

    def _look(self) -> tuple[list[int], ...]:
        held = chain.from_iterable(map(dict.values, self._tables))
        addresses = map(Tensor.data_ptr, self._tensors)
        return list(map(id, held)), list(addresses), list(map(_version, self._counted))


def _depth(model: nn.Module) -> Any:
    config: Any = model.config
    return getattr(config.get_text_config(), "num_hidden_layers", None)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _is_harmless(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_HARMLESS)
