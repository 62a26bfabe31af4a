"""Running a source model that is larger than memory: one decoder layer's weights at a time.

Every batch of tokens runs the model's own ``forward`` in a thread of its own, so that masks,
positions and whatever else a family computes are transformers' business. At each decoder layer the
thread stops and waits until all batches have come there; then the layer's weights are read, the
batches pass through it one after the other, and the weights are dropped again. Only one thread
ever runs.

In memory are: embeddings, last norm and head; one decoder layer; one expert's float32 copy; and a
few ``[tokens, hidden]`` float32 states of the whole text.

Shape letters: B sequences of a batch, T tokens of a sequence, N rows of a flat batch, K experts a
token, H hidden size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepack.convert.meta_model import build_meta_model, stored_dtype
from moepack.convert.sources.checkpoint import Checkpoint
from moepack.convert.sources.mapping import WeightMapping
from moepack.layer_stops import BatchThread, HandOver
from moepack_formats.errors import UsageError
from moepack_runtime.experts import (
    IMPLEMENTATION,
    ExpertsAdapter,
    find_experts,
    register_experts_function,
)

Parts = dict[str, Tensor]
"""One expert in canonical form, see ``ExpertsAdapter.canonical``."""

Transform = Callable[[str, Tensor], Tensor]
"""Changes a trunk tensor, given its name, before it is used."""


class Observer(Protocol):
    """Is told what reaches the experts and what leaves the layers."""

    def experts_called(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """A batch has reached a MoE layer's experts.

        Args:
            layer: Ordinal of the MoE layer.
            hidden: ``[N, H]`` float32, what enters gate and up.
            index: ``[N, K]`` the experts of each token; one that does not exist is an empty place.
            weights: ``[N, K]`` the router's weights.
        """

    def layer_left(self, layer: int, hidden: Tensor) -> None:
        """A batch has passed a decoder layer with experts.

        Args:
            layer: Ordinal of the MoE layer.
            hidden: ``[B, T, H]`` float32, the residual stream behind it.
        """

    def layer_finished(self, layer: int) -> None:
        """All batches have passed a MoE layer."""


ExpertWeights = Callable[[int, int, Parts], Parts]
"""Changes an expert, ``(layer, expert, its parts)``, before it is used."""


class StreamedModel:
    """A checkpoint that is run layer by layer, in float32.

    Args:
        checkpoint: The source.
        trunk: Changes trunk tensors.
        experts: Changes experts.
        observer: Is told what reaches the experts.
        mapping: The checkpoint seen through its model, where the caller has one.

    Raises:
        UsageError: The model is not supported.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        trunk: Transform | None = None,
        experts: ExpertWeights | None = None,
        observer: Observer | None = None,
        mapping: WeightMapping | None = None,
    ) -> None:
        dtype = stored_dtype(checkpoint)
        if mapping is None:
            mapping = WeightMapping(build_meta_model(checkpoint.config, dtype=dtype), checkpoint)
        self._mapping = mapping
        self._change_trunk, self._change_expert, self._observer = trunk, experts, observer
        self.model = build_meta_model(checkpoint.config, dtype=dtype)
        self.model.float()
        self.adapters = find_experts(self.model)
        for layer, adapter in enumerate(self.adapters):
            adapter.strip()
            adapter.install(_Experts(self, layer, adapter))
        register_experts_function()
        self.model.set_experts_implementation(IMPLEMENTATION)
        self._layers = _decoder_layers(self.model, self.adapters)
        self._experts: dict[tuple[int, int], Parts] = {}
        self._own: dict[str, Callable[..., Any]] = {}
        self._load_rest()

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    def run(
        self, batches: Sequence[Tensor], progress: Callable[[int], Any] | None = None
    ) -> Iterator[Tensor]:
        """Logits of every batch, in order.

        Args:
            batches: ``[B, T]`` token ids each.
            progress: Is called with the number of decoder layers that have been passed.

        Yields:
            ``[B, T, V]`` float32.
        """
        with self._threads(batches) as threads:
            self._pass(threads, progress)
            for thread in threads:
                yield thread.logits()

    def pass_layers(self, batches: Sequence[Tensor]) -> None:
        """As ``run``, for the observer alone: no logits are computed."""
        with self._threads(batches) as threads:
            self._pass(threads)

    @contextlib.contextmanager
    def _threads(self, batches: Sequence[Tensor]) -> Iterator[list[BatchThread]]:
        """A thread per batch; and the decoder layers hand their calls over."""
        threads = [BatchThread(self.model, ids) for ids in batches]
        self._own = {name: module.forward for name, module in self._layers.items()}
        try:
            for name, module in self._layers.items():
                cast(Any, module).forward = HandOver(name)
            yield threads
        finally:
            for thread in threads:
                thread.stop()
            for module in self._layers.values():
                module.__dict__.pop("forward", None)

    def _pass(
        self, threads: Sequence[BatchThread], progress: Callable[[int], Any] | None = None
    ) -> None:
        """Bring all batches through all decoder layers."""
        asked = [thread.start() for thread in threads]
        passed = 0
        while any(call is not None for call in asked):
            name = next(call.layer for call in asked if call is not None)
            self._load_layer(name)
            for i, call in enumerate(asked):
                if call is None or call.layer != name:
                    raise UsageError("the model's layers depend on its input", where=name)
                with torch.no_grad():
                    value = self._own[name](*call.args, **call.kwargs)
                self._tell_left(name, value)
                asked[i] = threads[i].answer(value)
            self._drop_layer(name)
            passed += 1
            if progress is not None:
                progress(passed)

    def expert(self, layer: int, expert: int) -> Parts:
        """An expert of the decoder layer in work, float32."""
        key = layer, expert
        if key not in self._experts:
            # Left in the source's dtype: a layer's experts are most of what is in memory.
            parts = self._mapping.experts(self._mapping.adapters[layer], expert)
            if self._change_expert is not None:
                parts = self._change_expert(layer, expert, parts)
            self._experts[key] = parts
        return {name: part.to(torch.float32) for name, part in self._experts[key].items()}

    def compute(
        self, layer: int, adapter: ExpertsAdapter, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """The experts of a layer: ``hidden`` [N, H], ``index`` and ``weights`` [N, K]."""
        if self._observer is not None:
            self._observer.experts_called(layer, hidden, index, weights)
        choices = index.shape[1]
        chosen, shares = index.reshape(-1), weights.reshape(-1, 1).to(torch.float32)
        outputs = hidden.new_zeros(len(chosen), hidden.shape[-1])
        for expert in torch.unique(chosen).tolist():
            if not 0 <= expert < adapter.num_experts:
                continue  # a place without an expert
            places = (chosen == expert).nonzero().squeeze(1)
            x, parts = hidden[places // choices], self.expert(layer, expert)
            up = F.linear(x, parts["up"], parts.get("up_bias"))
            if "gate" in parts:
                up = torch.cat([F.linear(x, parts["gate"], parts.get("gate_bias")), up], dim=-1)
            inner = adapter.activate(up)
            y = adapter.finish(F.linear(inner, parts["down"], parts.get("down_bias")))
            outputs[places] = y * shares[places]
        return outputs.view(len(index), choices, -1).sum(dim=1)

    def _load_rest(self) -> None:
        """Everything outside the decoder layers, and the buffers that no file holds."""
        prefixes = tuple(f"{name}." for name in self._layers)
        self._load(lambda name: not name.startswith(prefixes))
        self.model.tie_weights()
        for name, _ in list(self.model.named_non_persistent_buffers()):
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            module._buffers[leaf] = torch.empty_like(getattr(module, leaf), device="cpu")
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.device.type == "cpu" and tensor.numel():
                cast(Any, tensor)._is_hf_initialized = True
        for name, _ in self.model.named_non_persistent_buffers():
            cast(Any, self.model.get_buffer(name))._is_hf_initialized = False
        self.model.initialize_weights()  # Of the others nothing but meta tensors is left.

    def _load_layer(self, name: str) -> None:
        self._load(lambda tensor: tensor.startswith(f"{name}."))

    def _drop_layer(self, name: str) -> None:
        self._experts.clear()
        for module in self._layers[name].modules():
            for table in (module._parameters, module._buffers):
                for leaf, tensor in table.items():
                    if tensor is not None and leaf not in module._non_persistent_buffers_set:
                        table[leaf] = _like(tensor, tensor.to("meta"))
        if self._observer is not None:
            for layer in self._experts_in(name):
                self._observer.layer_finished(layer)

    def _experts_in(self, name: str) -> list[int]:
        """Ordinals of the MoE layers that are a part of this decoder layer."""
        prefix = f"{name}."
        return [i for i, adapter in enumerate(self.adapters) if adapter.name.startswith(prefix)]

    def _tell_left(self, name: str, value: Any) -> None:
        if self._observer is not None:
            hidden = value if isinstance(value, Tensor) else value[0]
            for layer in self._experts_in(name):
                self._observer.layer_left(layer, hidden)

    def _load(self, wanted: Callable[[str], bool]) -> None:
        for name, value in self._mapping.trunk(wanted=wanted):
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if self._change_trunk is not None:
                value = self._change_trunk(name, value)
            if value.is_floating_point():
                value = value.to(torch.float32)
            table = module._parameters if leaf in module._parameters else module._buffers
            table[leaf] = _like(table[leaf], value)


class _Experts:
    """What an experts module calls."""

    def __init__(self, streamed: StreamedModel, layer: int, adapter: ExpertsAdapter) -> None:
        self._streamed, self._layer, self._adapter = streamed, layer, adapter

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self._streamed.compute(self._layer, self._adapter, hidden, index, weights)


def _decoder_layers(model: nn.Module, adapters: Sequence[ExpertsAdapter]) -> dict[str, nn.Module]:
    """Every layer of the lists that hold the experts, by name."""
    layers: dict[str, nn.Module] = {}
    for adapter in adapters:
        parts = adapter.name.split(".")
        for i in range(1, len(parts)):
            name = ".".join(parts[:i])
            module = model.get_submodule(name)
            if isinstance(module, nn.ModuleList):
                layers |= {f"{name}.{child}": layer for child, layer in module.named_children()}
                break
        else:
            raise UsageError("the experts lie in no list of layers", where=adapter.name)
    return layers


def _like(old: Tensor | None, new: Tensor) -> Any:
    """``new`` as a parameter where ``old`` is one."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=False)
    return new
