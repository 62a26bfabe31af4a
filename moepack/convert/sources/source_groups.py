"""Which of a checkpoint's tensors become which parameter, by transformers' conversion table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class Target:
    """One tensor of the trunk, as the model names it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class SourceGroup:
    """The source tensors that become one parameter, or several by one conversion.

    Attributes:
        first: The parameter's name; of several, the first of the converter's targets.
        converter: How; None when the tensor is only renamed.
        sources: ``(key, pattern it matched)`` in the loader's order.
    """

    first: str
    converter: WeightConverter | None
    sources: list[tuple[str, str | None]] = field(default_factory=list)

    @cached_property
    def by_pattern(self) -> dict[str | None, list[str]]:
        """The sources, sorted by the pattern they matched; complete only after grouping."""
        patterns: dict[str | None, list[str]] = {}
        for key, pattern in self.sources:
            patterns.setdefault(pattern, []).append(key)
        return patterns

    @property
    def merges(self) -> bool:
        """Whether the sources are one tensor per expert."""
        operations = () if self.converter is None else self.converter.operations
        return self.shared or any(isinstance(o, MergeModulelist) for o in operations)

    @property
    def shared(self) -> bool:
        """Whether the sources are the experts of several modules, one module after the other."""
        several = self.converter is not None and len(self.converter.target_patterns) > 1
        return several and all(len(keys) > 1 for keys in self.by_pattern.values())


class OneExpertModel:
    """The model, as a conversion sees it that is given one expert instead of all.

    Some conversions look at the shape of their target to decide whether to transpose.
    """

    def __init__(self, model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> None:
        self._model = model
        self._shapes = shapes

    def get_parameter(self, name: str) -> Tensor:
        """The model's parameter, or one of an expert's shape in its place."""
        whole = self._model.get_parameter(name)
        shape = self._shapes.get(name)
        return whole if shape is None else torch.empty(shape, dtype=whole.dtype, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def group_keys(
    model: PreTrainedModel,
    keys: Iterable[str],
    parameters: dict[str, Tensor],
    quantizer: Any,
) -> tuple[dict[str, SourceGroup], tuple[str, ...]]:
    """Sort every key of a checkpoint to its target, as transformers' loader does.

    Args:
        model: The model on the meta device.
        keys: The checkpoint's tensors.
        parameters: The model's, by name.
        quantizer: From :func:`moepack.convert.sources.dequantize.dequantizer`.

    Returns:
        The groups by the name of their (first) parameter, and the keys that the model has no
        place for.
    """
    transforms = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, SourceGroup] = {}
    unexpected: list[str] = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters and key in parameters:
            # The table would rename a key that already has its final name.
            name, pattern = rename_source_key(key, [], [], prefix, parameters)
        if name not in parameters:
            unexpected.append(key)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        group = groups.setdefault(name, SourceGroup(name, converter))
        if group.converter is None and group.sources:
            unexpected.append(key)  # the loader keeps the first of two keys for one name
        else:
            group.sources.append((key, pattern))
    return groups, tuple(unexpected)


def sliced_shape(shape: Sequence[int], index: Sequence[slice]) -> tuple[int, ...]:
    """The shape of a part of a tensor."""
    return tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True))
