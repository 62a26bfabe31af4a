"""Decoding with a compiled trunk, so that launching kernels is not what a token takes.

A GPU is given some 30 kernels a layer, each of which costs the host a few microseconds: more than
many of them run. transformers compiles a model's forward for decoding where its cache is static and
the quantizer says that it may; what it compiles with is put in its place here: torch's compiler
traces a pass (:mod:`.opaque` says what it does not look into), and :mod:`.graphs` makes CUDA graphs
of it. Prompts, and whatever is not decoding on a static cache, run as ever.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from ..experts import ExpertsAdapter
from .compute import DeviceCompute
from .graphs import CutPass
from .link import Link
from .speculator import DeviceSpeculator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)
_numbers = itertools.count()


class CompiledTrunk:
    """What ``generate()`` decodes with.

    Args:
        model: The model, on its device.
        adapters: Its experts modules.
        computes: What each of them computes with.
        speculator: Guesses experts; None without.
        link: The device.
        context: Tokens that a static cache has room for; a longer text gets a longer one.

    Attributes:
        passes: What was compiled, one for each kind of pass.
        refusal: Why nothing is compiled, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Sequence[ExpertsAdapter],
        computes: Sequence[DeviceCompute],
        speculator: DeviceSpeculator | None,
        link: Link,
        context: int,
    ) -> None:
        self._model, self._computes = model, computes
        self._speculator, self._link, self.context = speculator, link, context
        self.passes: list[CutPass] = []
        self.refusal = _why_not(model)
        if self.refusal is None:
            self._install(adapters)
        else:
            _log.warning("decoding is not compiled: %s", self.refusal)

    def _install(self, adapters: Sequence[ExpertsAdapter]) -> None:
        from transformers import CompileConfig

        from .opaque import make_opaque

        make_opaque(self._model, adapters, self._computes)
        model, settings = cast(Any, self._model), self._model.generation_config
        model.get_compiled_call = lambda _settings: self
        settings.cache_implementation = "static"
        # Of one size for all texts: another one would be traced and recorded anew.
        settings.max_cache_len = self.context
        if self._link.device.type == "cpu":  # where transformers would not think of compiling
            settings.compile_config = CompileConfig()
            settings.compile_config._compile_all_devices = True
        self._compiled = torch.compile(
            _function_of(self._model), backend=self._backend, fullgraph=True
        )

    def new_cache(self) -> Any:
        """A cache on which decoding is compiled."""
        from transformers import StaticCache

        config = self._model.config.get_text_config(decoder=True)
        return StaticCache(config=config, max_cache_len=self.context)

    def _backend(self, graph: fx.GraphModule, _inputs: Sequence[Any]) -> CutPass:
        from .opaque import HOST_TAKES_PART

        cut = CutPass(graph, HOST_TAKES_PART, self._link.recorder())
        self.passes.append(cut)
        return cut

    def __call__(self, **inputs: Any) -> Any:
        """The model's output for its own inputs: new tokens and the cache of earlier ones."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if self.refusal is not None or not all(compute.ready for compute in self._computes):
            return self._model(**inputs)
        try:
            output = self._compiled(**inputs)
        except (
            TorchDynamoException,
            FailOnRecompileLimitHit,
        ) as error:  # while tracing: nothing has been computed
            self.refusal = str(error).strip().partition("\n")[0]
            _log.warning("decoding is not compiled: %s", self.refusal)
            return self._model(**inputs)
        if self._speculator is not None:
            self._speculator.end_token()
        for compute in self._computes:
            if not compute.waits:
                compute.count(_tokens(inputs))
        return output


def _function_of(model: PreTrainedModel) -> Callable[..., Any]:
    """A function that calls the model, with code of its own.

    torch keeps what it compiles by code objects and refuses after eight for one, which
    ``Module.__call__`` would be for all models of a process.
    """

    def call(**inputs: Any) -> Any:
        return model(**inputs)

    call.__code__ = call.__code__.replace(co_name=f"call_{next(_numbers)}")
    return call


def _tokens(inputs: dict[str, Any]) -> int:
    ids = inputs.get("input_ids")
    return int(ids.numel()) if ids is not None else int(inputs["inputs_embeds"].shape[:-1].numel())


def _why_not(model: PreTrainedModel) -> str | None:
    """Why a model cannot be compiled, as far as transformers says."""
    kind = type(model).__name__
    if not model._can_compile_fullgraph or "llama4" in model.config.model_type:
        return f"transformers does not compile {kind}"
    if not model.can_generate() or not cast(Any, model)._supports_default_dynamic_cache():
        return f"{kind} has a cache of its own kind"
    return None
