"""What calibration text shows of the inputs of every expert.

The text is run through the source once, layer by layer (``moepack.streaming``). What enters each
MoE layer is kept on the disk, in half precision: tokens x hidden size x 2 bytes a layer. From that
an expert's moments follow on demand, one expert at a time, from the tokens routed to it. So no
moments of a whole layer are ever in memory, which at a wide model would be tens of gigabytes.

Shape letters: N tokens, K experts a token, H hidden size, I intermediate size, n tokens of one
expert.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moepack.perplexity import window_length, windows
from moepack.quant.inputs import InputMoments
from moepack.streaming import StreamedModel
from moepack_formats import osio
from moepack_runtime.experts import ExpertsAdapter

from .sources.mapping import WeightMapping

FOLDER_NAME = ".moepack-calibration"
_SUMMARY = "summary.json"

FEWEST_TOKENS = 64
"""An expert that fewer tokens are routed to is given all tokens of its layer instead."""

_HALF_LARGEST = 65504.0


@dataclass(frozen=True)
class LayerInputs:
    """What enters the experts of a layer.

    Attributes:
        hidden: ``[N, H]`` float16.
        index: ``[N, K]`` int32, the experts of each token.
        weights: ``[N, K]`` float32, the router's weights.
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """``[n, H]`` float32 inputs of one expert, and ``[n]`` the router's weights."""
        rows, places = (self.index == expert).nonzero(as_tuple=True)
        return self.hidden[rows].float(), self.weights[rows, places]


@dataclass(frozen=True)
class ExpertInputs:
    """Moments of what one expert's matrices are multiplied with.

    Attributes:
        first: Of gate and up.
        down: Of down.
        tokens: How many tokens were routed to the expert.
        pooled: Whether they were too few, and all tokens of the layer were used.
    """

    first: InputMoments
    down: InputMoments
    tokens: int
    pooled: bool

    def of(self, part: str) -> InputMoments:
        """Of ``gate``, ``up`` or ``down``."""
        return self.down if part == "down" else self.first


class Calibration:
    """Inputs of every MoE layer, on the disk.

    Args:
        folder: Where ``record`` put them.
        fewest: Tokens below which an expert is given those of its whole layer.

    Attributes:
        counts: ``counts[layer][expert]`` tokens routed to each expert.
        residual: Mean square of the residual stream behind each layer.
        tokens: Tokens in all.
    """

    def __init__(self, folder: Path, fewest: int = FEWEST_TOKENS) -> None:
        self.folder, self.fewest = folder, fewest
        with osio.io_errors(folder):
            summary = json.loads((folder / _SUMMARY).read_bytes())
        self.counts: list[list[int]] = summary["counts"]
        self.residual: list[float] = summary["residual"]
        self.tokens: int = summary["tokens"]
        self._loaded: tuple[int, LayerInputs] | None = None

    def layer(self, layer: int) -> LayerInputs:
        """The inputs of a layer; the last one asked for stays in memory."""
        if self._loaded is None or self._loaded[0] != layer:
            self._loaded = None
            with osio.io_errors(self.folder):
                self._loaded = layer, LayerInputs(**load_file(self.folder / _file(layer)))
        return self._loaded[1]

    def expert(
        self,
        layer: int,
        expert: int,
        parts: dict[str, Tensor],
        adapter: ExpertsAdapter,
        *,
        full: bool,
    ) -> ExpertInputs:
        """Moments of one expert's inputs.

        Args:
            layer: Ordinal of the MoE layer.
            expert: The expert.
            parts: Its canonical tensors, as the source has them.
            adapter: Its module, for the activation.
            full: Whether products are wanted, and not only squares.
        """
        inputs = self.layer(layer)
        x, weights = inputs.of_expert(expert)
        tokens = len(x)
        pooled = tokens < self.fewest
        # What an expert gives counts by the router's weight, and squared errors by its square.
        shares: Tensor | None = weights.square()
        if pooled:
            # Inner neurons of other experts are others: all tokens go through this one's instead.
            x, shares = inputs.hidden.float(), None
        inner = inner_activations(parts, adapter, x)
        return ExpertInputs(
            InputMoments.of(x, shares, full=full),
            InputMoments.of(inner, shares, full=full),
            tokens,
            pooled,
        )

    def report(self) -> str:
        """One line on what was seen."""
        counts = [count for layer in self.counts for count in layer]
        few = sum(count < self.fewest for count in counts)
        line = f"calibrated on {self.tokens} tokens"
        if few:
            line += (
                f"; {few} of {len(counts)} experts were seen fewer than {self.fewest} times "
                "and use the statistics of their whole layer"
            )
        return line


def first_projections(parts: dict[str, Tensor]) -> tuple[str, ...]:
    """The projections that an expert's input goes through: gate and up, or up alone."""
    return ("gate", "up") if "gate" in parts else ("up",)


def inner_activations(parts: dict[str, Tensor], adapter: ExpertsAdapter, x: Tensor) -> Tensor:
    """What enters ``down``: ``[n, H]`` float32 to ``[n, I]``."""

    def project(name: str) -> Tensor:
        bias = parts.get(f"{name}_bias")
        return F.linear(x, parts[name].float(), None if bias is None else bias.float())

    with torch.no_grad():
        projected = [project(name) for name in first_projections(parts)]
        return adapter.activate(torch.cat(projected, dim=-1))


def record(
    mapping: WeightMapping,
    ids: Tensor,
    folder: Path,
    fingerprint: str,
    notice: Callable[[str], None] | None = None,
) -> None:
    """Run text through a source and keep what enters its experts; done already, do nothing.

    Args:
        mapping: The source seen through its model.
        ids: ``[T]`` token ids, two or more.
        folder: Created; what an interrupted run left there is cleared.
        fingerprint: Names the source; the text is added to it.
        notice: Is told what is being done.

    Raises:
        ResourceError: The disk is full or read-only.
    """
    text = hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()
    if _is_recorded(folder, fingerprint + text):
        return
    with osio.io_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    recorder = _Recorder(folder, [adapter.num_experts for adapter in mapping.adapters])
    streamed = StreamedModel(mapping.checkpoint, mapping=mapping, observer=recorder)
    runs = [run[None] for run in windows(ids, window_length(streamed.model))]
    if notice is not None:
        count = sum(run.numel() for run in runs)
        notice(f"running {count} tokens through the source, layer by layer")
    streamed.pass_layers(runs)
    summary = {
        "fingerprint": fingerprint + text,
        "tokens": sum(run.numel() for run in runs),
        "counts": recorder.counts,
        "residual": recorder.residual,
    }
    osio.write_file(folder / _SUMMARY, json.dumps(summary).encode())


class _Recorder:
    """Writes each layer's inputs as soon as all batches have passed it."""

    def __init__(self, folder: Path, experts: list[int]) -> None:
        self._folder, self._experts = folder, experts
        self._batches: list[LayerInputs] = []
        self._power, self._values = 0.0, 0
        self.counts: list[list[int]] = []
        self.residual: list[float] = []

    def experts_called(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        half = hidden.clamp(-_HALF_LARGEST, _HALF_LARGEST).to(torch.float16)
        self._batches.append(LayerInputs(half, index.to(torch.int32), weights.float()))

    def layer_left(self, layer: int, hidden: Tensor) -> None:
        self._power += float(hidden.double().square().sum())
        self._values += hidden.numel()

    def layer_finished(self, layer: int) -> None:
        hidden = torch.cat([batch.hidden for batch in self._batches])
        index = torch.cat([batch.index for batch in self._batches])
        weights = torch.cat([batch.weights for batch in self._batches])
        self._batches.clear()
        with osio.io_errors(self._folder):
            tensors = {"hidden": hidden, "index": index, "weights": weights}
            save_file({k: v.contiguous() for k, v in tensors.items()}, self._folder / _file(layer))
        self.counts.append(_counts(index, self._experts[layer]))
        self.residual.append(self._power / max(self._values, 1))
        self._power, self._values = 0.0, 0


def _counts(index: Tensor, experts: int) -> list[int]:
    """Tokens of each expert; an index outside them marks an empty place."""
    chosen = index.flatten()
    chosen = chosen[(chosen >= 0) & (chosen < experts)]
    return [int(count) for count in torch.bincount(chosen, minlength=experts)]


def _file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def _is_recorded(folder: Path, fingerprint: str) -> bool:
    try:
        summary = json.loads((folder / _SUMMARY).read_bytes())
        for layer in range(len(summary["counts"])):
            load_file(folder / _file(layer))
    except (OSError, ValueError, LookupError, TypeError, SafetensorError):
        return False
    return bool(summary.get("fingerprint") == fingerprint)
