"""From a checkpoint's tensors to the model's, through transformers' own conversion table.

Publishers name and split tensors in many ways: one tensor per expert or all of a layer in one,
fused or separate projections, FP8 blocks or MXFP4. transformers has a table that says how each
becomes a parameter of its model, and ``WeightMapping`` applies that table piece by piece: to one
expert, or to one tensor of the trunk, so that nothing larger is ever in memory. It gives exactly
what ``from_pretrained`` would load, and has no table of its own.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moepack.convert.meta_model import build_meta_model
from moepack.convert.sources.checkpoint import Checkpoint
from moepack.convert.sources.dequantize import align_block_scales, dequantizer
from moepack.convert.sources.source_groups import (
    OneExpertModel,
    SourceGroup,
    Target,
    group_keys,
    sliced_shape,
)
from moepack_formats.errors import UsageError
from moepack_runtime.experts import ExpertsAdapter, find_experts

__all__ = ["WeightMapping", "build_meta_model"]


class WeightMapping:
    """A checkpoint seen through the model it belongs to.

    Args:
        model: The model on the meta device, with its experts.
        checkpoint: Where the tensors are.

    Attributes:
        adapters: The experts modules, in model order.
        unexpected: Keys of the checkpoint that the model has no place for (the layers for
            multi-token prediction, for instance).
        missing: Parameters that are absent and may be: tied ones and those the model ignores.

    Raises:
        UsageError: A parameter has no source, the experts cannot be read one at a time, or the
            source is quantized in a way that transformers cannot undo.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.adapters = find_experts(model)
        self._parameters: dict[str, Tensor] = model.state_dict()
        self._quantizer = dequantizer(checkpoint.config)
        self._expert_names = {f"{a.name}.{p}" for a in self.adapters for p in a.parameters}
        if self._expert_names & getattr(model, "all_tied_weights_keys", {}).keys():
            raise UsageError(
                "experts that share their weights with other experts cannot be packed",
                where=f"{type(model).__name__} (model type {model.config.model_type})",
            )
        self._groups, self.unexpected = group_keys(
            model, checkpoint.keys(), self._parameters, self._quantizer
        )
        self._targets = {first: self._targets_of(group) for first, group in self._groups.items()}
        self.missing = self._check_complete()
        self._expert_groups = {a.name: self._groups_of(a) for a in self.adapters}
        for adapter in self.adapters:
            self._check_experts(adapter)

    def _targets_of(self, group: SourceGroup) -> list[Target]:
        """What a group becomes: known beforehand, but for a converter with several targets."""
        names = [group.first]
        if group.converter is not None and len(group.converter.target_patterns) > 1:
            # Only the conversion itself knows the names; on the meta device it costs nothing.
            sources = [
                torch.empty(
                    self.checkpoint.shape(key), dtype=self._dtype(group, key), device="meta"
                )
                for key, _ in group.sources
            ]
            names = list(self._convert(group, group.sources, sources, self.model))
        targets = []
        for name in names:
            parameter = self._parameters.get(name)
            if parameter is None:
                raise UsageError(
                    "transformers' conversion table gives a parameter that the model lacks",
                    where=name,
                    got=f"it comes from {group.sources[0][0]}",
                )
            targets.append(Target(name, self._dtype_of(group, name), tuple(parameter.shape)))
        return targets

    def _check_complete(self) -> tuple[str, ...]:
        """Names of parameters without a source that may be absent; the others are an error."""
        found = {target.name for targets in self._targets.values() for target in targets}
        absent = [name for name in self._parameters if name not in found]
        tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", {})
        partners: dict[str, set[str]] = {}
        for target, source in tied.items():
            partners.setdefault(target, set()).add(source)
            partners.setdefault(source, set()).add(target)
        ignored = self.model._keys_to_ignore_on_load_missing or ()
        may_be_absent = re.compile("|".join(f"({p})" for p in ignored) or r"(?!)")
        lost = [
            name
            for name in absent
            if not partners.get(name, set()) & found and not may_be_absent.search(name)
        ]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise UsageError(
                f"the checkpoint has no tensor for {lost[0]}{more}",
                where=self.checkpoint.folder,
                remedy="download the checkpoint again if files are missing",
            )
        return tuple(absent)

    def experts(self, adapter: ExpertsAdapter, expert: int) -> dict[str, Tensor]:
        """Reads one expert; no other expert's bytes are touched.

        Args:
            adapter: One of ``adapters``.
            expert: 0 <= expert < adapter.num_experts.

        Returns:
            Canonical ``gate``, ``up``, ``down`` and biases (see ``ExpertsAdapter.canonical``),
            contiguous, in the model's dtype.

        Raises:
            UsageError: The tensors do not have the shapes that the model needs.
        """
        tensors: dict[str, Tensor] = {}
        shapes = {}
        for parameter in adapter.parameters:
            whole = adapter.shapes[parameter]
            index = adapter.expert_slice(parameter, whole, expert)
            shapes[f"{adapter.name}.{parameter}"] = sliced_shape(whole, index)
        view = cast(PreTrainedModel, OneExpertModel(self.model, shapes))
        for group in self._expert_groups[adapter.name]:
            sources = self._sources_of(adapter, group, expert)
            values = [self._read(group, key, index) for key, _, index in sources]
            converted = self._convert(group, [(k, p) for k, p, _ in sources], values, view)
            tensors.update((name, value) for name, value in converted.items() if name in shapes)
        one: dict[str, Tensor] = {}
        for parameter in adapter.parameters:
            name = f"{adapter.name}.{parameter}"
            if tuple(tensors[name].shape) != shapes[name]:
                raise UsageError(
                    "an expert's tensor does not have the shape the model needs",
                    where=f"{name}, expert {expert}",
                    wanted=shapes[name],
                    got=tuple(tensors[name].shape),
                )
            value = tensors[name].detach().to(self._parameters[name].dtype)
            one[parameter] = adapter.without_expert_axis(parameter, value)
        return {part: value.contiguous() for part, value in adapter.canonical(one).items()}

    def expert_keys(self, adapter: ExpertsAdapter) -> list[str]:
        """The checkpoint's tensors that the experts of one module come from."""
        return [key for group in self._expert_groups[adapter.name] for key, _ in group.sources]

    def _groups_of(self, adapter: ExpertsAdapter) -> list[SourceGroup]:
        prefix = f"{adapter.name}."
        names = {prefix + parameter for parameter in adapter.parameters}
        return [
            group
            for first, group in self._groups.items()
            if any(target.name in names for target in self._targets[first])
        ]

    def _parameter_of(self, adapter: ExpertsAdapter, group: SourceGroup) -> str:
        """The first of a module's parameters that a group becomes, relative to the module."""
        names = (target.name for target in self._targets[group.first])
        prefix = f"{adapter.name}."
        return next(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    def _sources_of(
        self, adapter: ExpertsAdapter, group: SourceGroup, expert: int
    ) -> list[tuple[str, str | None, tuple[slice, ...] | None]]:
        """``(key, pattern, what to read of it)`` for one expert of one group."""
        if group.merges:
            # Where modules share a list, the conversion wants an expert of each.
            step = adapter.num_experts if group.shared else sys.maxsize
            return [
                (key, pattern, None)
                for pattern, keys in group.by_pattern.items()
                for key in keys[expert::step]
            ]
        parameter = self._parameter_of(adapter, group)
        return [
            (key, pattern, adapter.expert_slice(parameter, self.checkpoint.shape(key), expert))
            for key, pattern in group.sources
        ]

    def _check_experts(self, adapter: ExpertsAdapter) -> None:
        """Makes sure, before anything is read, that single experts can be."""
        for group in self._expert_groups[adapter.name]:
            parameter = self._parameter_of(adapter, group)
            length = adapter.shapes[parameter][0]
            if group.merges:
                counts = {len(keys) for keys in group.by_pattern.values()}
                modules = len(self._targets[group.first]) if group.shared else 1
                allowed = {adapter.num_experts * modules, length * modules}
            else:
                counts = {(self.checkpoint.shape(key) or (0,))[0] for key, _ in group.sources}
                allowed = {length}
            if not counts <= allowed or len(counts) != 1:
                raise UsageError(
                    "the checkpoint's experts are incomplete or cannot be read one at a time",
                    where=group.first,
                    wanted=" or ".join(str(n) for n in sorted(allowed)),
                    got=f"{', '.join(str(n) for n in sorted(counts))} ({group.sources[0][0]})",
                )

    def trunk_targets(self) -> list[Target]:
        """Everything but the routed experts, in the order ``trunk`` gives it; reads no data."""
        return [target for group in self._trunk_groups() for target in self._targets[group.first]]

    def trunk(
        self, start: int = 0, wanted: Callable[[str], bool] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Reads the trunk tensor by tensor.

        Args:
            start: How many of ``trunk_targets`` to pass over; they are not read.
            wanted: Chooses by name; all by default.

        Yields:
            ``(name, contiguous tensor)`` with the dtype and shape that ``trunk_targets`` states.

        Raises:
            UsageError: A tensor does not have the shape that the model needs.
        """
        position = 0
        for group in self._trunk_groups():
            targets = self._targets[group.first]
            position += len(targets)
            if position <= start:
                continue
            if wanted is not None and not any(wanted(target.name) for target in targets):
                continue
            values = [self._read(group, key, None) for key, _ in group.sources]
            converted = self._convert(group, group.sources, values, self.model)
            del values
            for i, target in enumerate(targets, position - len(targets)):
                value = converted.pop(target.name)
                if tuple(value.shape) != target.shape:
                    raise UsageError(
                        "a tensor does not have the shape the model needs",
                        where=target.name,
                        wanted=target.shape,
                        got=tuple(value.shape),
                    )
                if i >= start and (wanted is None or wanted(target.name)):
                    yield target.name, value.detach().to(target.dtype).contiguous()

    def _trunk_groups(self) -> Iterator[SourceGroup]:
        for first, group in self._groups.items():
            if not any(target.name in self._expert_names for target in self._targets[first]):
                yield group

    def _read(self, group: SourceGroup, key: str, index: tuple[slice, ...] | None) -> Tensor:
        tensor = self.checkpoint.read(key, index)
        # The loader casts before it converts, which matters as soon as a conversion computes.
        return tensor.to(self._dtype(group, key))

    def _dtype(self, group: SourceGroup, key: str) -> torch.dtype:
        """The dtype in which a source tensor enters its conversion."""
        stored = self.checkpoint.dtype(key)
        if self._quantizer is None:
            return self._planned_dtype(group.first)
        wanted = self._quantizer.get_new_dtype(
            group.converter,
            torch.empty(0, dtype=stored, device="meta"),
            self._planned_dtype(group.first),
        )
        return stored if wanted is None else cast(torch.dtype, wanted)

    def _dtype_of(self, group: SourceGroup, name: str) -> torch.dtype:
        """The dtype of a target."""
        if self._quantizer is not None and len(group.sources) == 1:
            # Not quantized after all: a norm's weight in a quantized checkpoint, for instance.
            return self._dtype(group, group.sources[0][0])
        return self._planned_dtype(name)

    def _planned_dtype(self, name: str) -> torch.dtype:
        """The dtype the loader gives a parameter: the model's, or float32 where it insists."""
        own = self._parameters[name].dtype
        plan = self.model._get_dtype_plan(self.model.dtype)
        for pattern, dtype in plan.items():
            if re.search(pattern.replace("*", ".*"), name):
                return cast(torch.dtype, dtype)
        return own

    def _convert(
        self,
        group: SourceGroup,
        sources: Sequence[tuple[str, str | None]],
        tensors: Sequence[Tensor],
        model: PreTrainedModel,
    ) -> dict[str, Tensor]:
        """Applies a group's conversion to all or a part of its sources."""
        if group.converter is None:
            return {group.first: tensors[0]}
        # A conversion consumes what it has collected, and the table holds one for all layers.
        converter = copy.deepcopy(group.converter)
        tensors = align_block_scales(self._quantizer, [p for _, p in sources], tensors)
        for (key, pattern), tensor in zip(sources, tensors, strict=True):
            converter.add_tensor(group.first, key, cast(str, pattern), cast(Any, tensor))
        try:
            with torch.no_grad():
                # Without loading_info errors are raised instead of collected.
                out = converter.convert(group.first, model=model, config=self.model.config)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as e:
            raise UsageError(
                "the checkpoint's tensors do not fit transformers' conversion",
                where=group.first,
                got=f"{type(e).__name__}: {e}",
            ) from e
        return {name: v[0] if isinstance(v, list) else v for name, v in out.items()}
