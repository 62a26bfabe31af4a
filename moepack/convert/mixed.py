"""Mixed precision: more bits for the experts and projections where they save most.

What a scheme loses is measured expert by expert. With calibration text it is the squared error of
what the expert adds to the residual stream, summed over the tokens routed to it and measured by the
stream's own power behind the layer: an expert counts as often as it is asked, and with the router's
weight. Without, it is the relative squared error of the weights, every expert alike.

Errors of the two halves of a record (gate and up; down) are taken to add up. Schemes are chosen by
:mod:`moepack.convert.knapsack`; at most three different records, so that cache slots stay tight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from moepack.quant import InputAwareQuantizer, Quantizer, get_quantizer, quantize_matrix
from moepack_formats.errors import UsageError
from moepack_formats.layer import LayerPlan
from moepack_formats.matrix import dequantize
from moepack_formats.schemes import get_scheme
from moepack_runtime.experts import ExpertsAdapter
from moepack_runtime.options import format_size

from .calibration import Calibration, ExpertInputs, first_projections, inner_activations
from .knapsack import Floats, Ints, choose
from .plan import expert_record
from .sources.mapping import WeightMapping

CANDIDATES = ("q2g64", "q2g16s4", "q3g16s5", "q4g64")
"""Schemes to choose from, for each half of a record."""

MOST_RECORDS = 3

SAMPLE = 256
"""Tokens of an expert that its error is measured on."""

Parts = dict[str, Tensor]

N = TypeVar("N", np.float64, np.int64)


@dataclass(frozen=True)
class Losses:
    """What each scheme loses: ``[experts of all layers, candidates]`` float64.

    Attributes:
        first: With gate and up in the scheme.
        down: With down in the scheme.
    """

    first: Floats
    down: Floats


@dataclass(frozen=True)
class Mix:
    """An assignment of schemes.

    Attributes:
        layers: The plans of the layers.
        line: What was chosen, for the user.
    """

    layers: tuple[LayerPlan, ...]
    line: str


def measure(
    mapping: WeightMapping,
    calibration: Calibration | None,
    quantizer: str = "hqq",
    advance: Callable[[int, int], None] | None = None,
) -> Losses:
    """Quantize every expert in every candidate and see what it loses.

    Args:
        mapping: The source.
        calibration: What is known of the inputs, or None.
        quantizer: Which; gptq is replaced by its solver, ``hqq``, which is several times faster.
        advance: Is told of each layer and expert that is done.

    Raises:
        IntegrityError: A weight is NaN or infinite.
    """
    chosen = get_quantizer("hqq" if quantizer == "gptq" else quantizer)
    first, down = [], []
    for layer, adapter in enumerate(mapping.adapters):
        for expert in range(adapter.num_experts):
            parts = mapping.experts(adapter, expert)
            where = f"{adapter.name}, expert {expert}"
            if calibration is None:
                found = _of_weights(parts, chosen, where)
            else:
                inputs = calibration.expert(layer, expert, parts, adapter, full=False)
                found = _of_outputs(
                    parts, chosen, where, adapter, calibration, layer, expert, inputs
                )
            first.append(found[0])
            down.append(found[1])
            if advance is not None:
                advance(layer, expert)
    return Losses(np.array(first, np.float64), np.array(down, np.float64))


def mix(
    adapters: Sequence[ExpertsAdapter], losses: Losses, limit: int, *, per_layer: bool = False
) -> Mix:
    """Choose schemes under a limit.

    Args:
        adapters: The experts modules.
        losses: From ``measure``.
        limit: Largest size of all records in bytes.
        per_layer: Give all experts of a layer the same record.

    Raises:
        UsageError: No choice fits.
    """
    pairs = [(a, b) for a in range(len(CANDIDATES)) for b in range(len(CANDIDATES))]
    specs = [
        [expert_record(adapter, CANDIDATES[a], CANDIDATES[b]) for a, b in pairs]
        for adapter in adapters
    ]
    owner = np.repeat(np.arange(len(adapters)), [a.num_experts for a in adapters])  # [E]
    lost = losses.first[:, [a for a, _ in pairs]] + losses.down[:, [b for _, b in pairs]]
    sizes = np.array([[spec.nbytes for spec in row] for row in specs], np.int64)[owner]
    if per_layer:
        lost, sizes = _sum_by(lost, owner), _sum_by(sizes, owner)
    choice = choose(lost, sizes, limit, most=MOST_RECORDS)
    if choice is None:
        smallest = int(sizes.min(axis=1).sum())
        raise UsageError(
            "no mixture of schemes fits",
            wanted=f"{format_size(smallest)} or more for the experts",
            got=format_size(limit),
        )
    option = choice.option[owner] if per_layer else choice.option
    layers, start = [], 0
    for index, adapter in enumerate(adapters):
        own = [int(o) for o in option[start : start + adapter.num_experts]]
        start += adapter.num_experts
        used = sorted(set(own))
        kinds = tuple(specs[index][o] for o in used)
        layers.append(LayerPlan(index, adapter.name, kinds, tuple(used.index(o) for o in own)))
    counts = {o: int((option == o).sum()) for o in sorted(set(option.tolist()))}
    names = ", ".join(
        f"{count} experts {CANDIDATES[pairs[o][0]]}/{CANDIDATES[pairs[o][1]]}"
        for o, count in counts.items()
    )
    gap = (choice.loss - choice.bound) / max(choice.loss, 1e-300)
    return Mix(tuple(layers), f"mixed: {names}; at most {gap:.2%} from the best choice")


def _sum_by(values: npt.NDArray[N], owner: Ints) -> npt.NDArray[N]:
    """Sum ``[E, M]`` rows of the same owner."""
    out = np.zeros((int(owner[-1]) + 1, values.shape[1]), values.dtype)
    np.add.at(out, owner, values)
    return out


def _quantized(
    parts: Parts,
    names: Sequence[str],
    scheme: str,
    quantizer: Quantizer,
    where: str,
    inputs: ExpertInputs | None = None,
) -> Parts:
    """The parts, those named as the scheme leaves them."""
    changed = dict(parts)
    for name in names:
        matrix = quantize_matrix(
            parts[name],
            get_scheme(scheme),
            quantizer,
            where=f"{where}, {name}",
            inputs=None if inputs is None else inputs.of(name),
        )
        changed[name] = torch.from_numpy(dequantize(matrix))
    return changed


def _of_weights(parts: Parts, quantizer: Quantizer, where: str) -> tuple[list[float], list[float]]:
    """Relative squared errors of an expert's matrices, by candidate."""

    def lost(names: Sequence[str], scheme: str) -> float:
        changed = _quantized(parts, names, scheme, quantizer, where)
        error = sum(float((changed[n] - parts[n].float()).square().sum()) for n in names)
        power = sum(float(parts[n].float().square().sum()) for n in names)
        return error / max(power, 1e-30)

    return (
        [lost(first_projections(parts), scheme) for scheme in CANDIDATES],
        [lost(["down"], scheme) for scheme in CANDIDATES],
    )


def _of_outputs(
    parts: Parts,
    quantizer: Quantizer,
    where: str,
    adapter: ExpertsAdapter,
    calibration: Calibration,
    layer: int,
    expert: int,
    inputs: ExpertInputs,
) -> tuple[list[float], list[float]]:
    """Squared errors of an expert's outputs over all its tokens, by candidate."""
    known = inputs if isinstance(quantizer, InputAwareQuantizer) else None
    seen = calibration.layer(layer)
    x, weights = seen.of_expert(expert)
    if inputs.pooled:
        # Nobody's favourite, but not worth nothing: one more token than were seen.
        x = seen.hidden.float()
        weights = torch.full((len(x),), float(seen.weights.mean()))
    often = (inputs.tokens + 1) / len(x)
    step = max(1, len(x) // SAMPLE)
    x, weights = x[::step], weights[::step]
    often *= step
    inner = inner_activations(parts, adapter, x)
    scale = often / max(calibration.residual[layer], 1e-30)

    def lost(changed: Tensor, down: Tensor) -> float:
        error = F.linear(changed, down).square().sum(dim=1) * weights.square()
        return float(error.sum()) * scale

    first, second = [], []
    for scheme in CANDIDATES:
        changed = _quantized(parts, first_projections(parts), scheme, quantizer, where, known)
        off = inner_activations(changed, adapter, x) - inner
        first.append(lost(off, parts["down"].float()))
        down = _quantized(parts, ["down"], scheme, quantizer, where, known)["down"]
        second.append(lost(inner, down - parts["down"].float()))
    return first, second
