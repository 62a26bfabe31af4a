"""The plan of a conversion: what will be written, before anything is read or written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from moepack_formats.errors import UsageError
from moepack_formats.layer import LayerPlan
from moepack_formats.manifest import PACKED_SUFFIX, PackedEntry, Sizes
from moepack_formats.record import RecordSpec, plan_record
from moepack_formats.schemes import DEFAULT_SCHEME, SCHEMES, Scheme, get_scheme
from moepack_formats.tensor_file import TensorPlan
from moepack_runtime.experts import ExpertsAdapter
from moepack_runtime.options import format_size

from .meta_model import build_meta_model
from .options import RAW_SCHEMES, ConvertOptions, scheme_of_bits
from .sources.checkpoint import Checkpoint
from .sources.mapping import WeightMapping
from .sources.source_groups import Target
from .trunk_policy import KeptLinear, TrunkPolicy, has_tied_head, head_policy, trunk_policy

SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

_BASE_NBYTES = 500_000_000
"""What Python, torch and transformers take before any weight is read."""


@dataclass(frozen=True)
class TrunkTensor:
    """One tensor of the trunk: as the source gives it, and as it will be stored.

    Attributes:
        target: Name, dtype and shape in the model.
        stored: Name, dtype and shape in the pack.
        scheme: Scheme of a packed weight, or None for one stored as it is.
    """

    target: Target
    stored: TensorPlan
    scheme: str | None


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that decides a pack's bytes but the weights themselves.

    Attributes:
        checkpoint: The source.
        mapping: The source seen through its model.
        options: The user's choices.
        layers: One plan per MoE layer.
        trunk: Tensors of the trunk, in the order in which they are read.
        packed: Entries of trunk modules stored in tiles.
        kept: Linears that stay as they are, and why.
        sizes: Parameters and bytes.
        memory_nbytes: Estimate of the peak memory of the conversion.
        expert_limit: Largest size of all experts in bytes, where mixed precision is to choose their
            schemes; ``layers`` then are those of the largest single scheme that fits.
    """

    checkpoint: Checkpoint
    mapping: WeightMapping
    options: ConvertOptions
    layers: tuple[LayerPlan, ...]
    trunk: tuple[TrunkTensor, ...]
    packed: dict[str, PackedEntry]
    kept: tuple[KeptLinear, ...]
    sizes: Sizes
    memory_nbytes: int
    expert_limit: int | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model on the meta device."""
        return self.mapping.model

    @property
    def adapters(self) -> list[ExpertsAdapter]:
        """The experts modules, in the order of ``layers``."""
        return self.mapping.adapters

    @property
    def expert_schemes(self) -> tuple[str, ...]:
        """The schemes that expert projections have."""
        names = {
            tensor.scheme
            for layer in self.layers
            for spec in layer.specs
            for tensor in spec.tensors
            if len(tensor.shape) == 2
        }
        return tuple(sorted(names))


def with_layers(plan: ConversionPlan, layers: tuple[LayerPlan, ...]) -> ConversionPlan:
    """The plan with other records for the experts."""
    nbytes = sum(layer.nbytes for layer in layers)
    return replace(
        plan, layers=layers, sizes=replace(plan.sizes, expert_nbytes=nbytes), expert_limit=None
    )


def make_plan(checkpoint: Checkpoint, options: ConvertOptions) -> ConversionPlan:
    """Plan the conversion of an open checkpoint; no tensor is read.

    Raises:
        UsageError: The model is not supported, or the budget cannot be met.
    """
    dtype = _main_dtype(checkpoint)
    model = build_meta_model(checkpoint.config, dtype=dtype)
    mapping = WeightMapping(model, checkpoint)
    checkpoint.plan_reads([mapping.expert_keys(adapter) for adapter in mapping.adapters])
    scheme = get_scheme(scheme_of_bits(options.attn_bits, dtype))
    policy = trunk_policy(model, mapping.adapters, scheme)
    packed = {} if scheme.is_raw else _packed_entries(policy, scheme)
    kept = [] if scheme.is_raw else [*policy.kept]
    if options.head_bits < 16:
        tied = has_tied_head(model, mapping.missing)
        heads, kept_heads = head_policy(model, DEFAULT_SCHEME[options.head_bits], tied=tied)
        packed |= heads
        kept += kept_heads
    trunk = tuple(_trunk_tensor(target, packed) for target in mapping.trunk_targets())
    trunk_nbytes = sum(tensor.stored.nbytes for tensor in trunk)
    layers = _plan_layers(mapping.adapters, options, model.dtype, trunk_nbytes)
    sizes = Sizes(
        expert_parameters=sum(layer.specs[i].parameters for layer in layers for i in layer.spec_of),
        expert_nbytes=sum(layer.nbytes for layer in layers),
        trunk_parameters=sum(math.prod(tensor.target.shape) for tensor in trunk),
        trunk_nbytes=trunk_nbytes,
        source_nbytes=sum(checkpoint.nbytes(key) for key in checkpoint.keys()),  # noqa: SIM118
    )
    largest_expert = max(spec.parameters for layer in layers for spec in layer.specs)
    largest_tensor = max(math.prod(t.target.shape) * t.target.dtype.itemsize for t in trunk)
    # Alive at once: a few float32 copies of one expert, or two of the largest trunk tensor.
    memory = _BASE_NBYTES + max(24 * largest_expert, 2 * largest_tensor)
    limit = None
    if options.is_mixed:
        limit = (
            options.budget - trunk_nbytes
            if options.budget is not None
            else int(options.expert_bits * sizes.expert_parameters / 8)
        )
    return ConversionPlan(
        checkpoint, mapping, options, layers, trunk, packed, tuple(kept), sizes, memory, limit
    )


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that most of the source's bytes have, for configs that name none."""
    sizes: Counter[torch.dtype] = Counter()
    for key in checkpoint.keys():  # noqa: SIM118 - a protocol, not a mapping
        sizes[checkpoint.dtype(key)] += checkpoint.nbytes(key)
    known = [dtype for dtype, _ in sizes.most_common() if dtype in RAW_SCHEMES]
    return known[0] if known else torch.bfloat16


def _packed_entries(policy: TrunkPolicy, scheme: Scheme) -> dict[str, PackedEntry]:
    return {
        linear.name: PackedEntry("linear", scheme.name, (linear.rows, linear.cols))
        for linear in policy.packed
    }


def _trunk_tensor(target: Target, packed: dict[str, PackedEntry]) -> TrunkTensor:
    module, _, leaf = target.name.rpartition(".")
    entry = packed.get(module)
    if entry is not None and leaf == "weight":
        nbytes = get_scheme(entry.scheme).packed_nbytes(*entry.shape)
        stored = TensorPlan(f"{module}{PACKED_SUFFIX}", "U8", (nbytes,))
        return TrunkTensor(target, stored, entry.scheme)
    dtype = SAFETENSORS_DTYPES.get(target.dtype)
    if dtype is None:
        raise UsageError("a tensor's dtype cannot be stored", where=target.name, got=target.dtype)
    return TrunkTensor(target, TensorPlan(target.name, dtype, target.shape), None)


def _plan_layers(
    adapters: Sequence[ExpertsAdapter],
    options: ConvertOptions,
    dtype: torch.dtype,
    trunk_nbytes: int,
) -> tuple[LayerPlan, ...]:
    def planned(scheme: str) -> tuple[LayerPlan, ...]:
        return tuple(
            LayerPlan(i, a.name, (expert_record(a, scheme, scheme),), (0,) * a.num_experts)
            for i, a in enumerate(adapters)
        )

    if options.scheme is not None:
        return planned(options.scheme)
    bits = options.expert_bits
    if options.budget is None and float(bits).is_integer():
        return planned(scheme_of_bits(int(bits), dtype))
    raw = RAW_SCHEMES.get(dtype, "f32")
    # Largest first; a raw scheme of another dtype is no choice.
    names = [n for n, s in SCHEMES.items() if not s.is_raw or n == raw]
    plans = sorted((planned(name) for name in names), key=_nbytes, reverse=True)
    parameters = sum(spec.parameters * len(p.spec_of) for p in plans[0] for spec in p.specs)
    for plan in plans:
        fits = (
            _nbytes(plan) + trunk_nbytes <= options.budget
            if options.budget is not None
            else _nbytes(plan) * 8 / parameters <= bits
        )
        if fits:
            return plan
    smallest = _nbytes(plans[-1])
    if options.budget is not None:
        raise UsageError(
            "no scheme fits the budget",
            where="--budget",
            wanted=f"{format_size(smallest + trunk_nbytes)} or more",
            got=format_size(options.budget),
            remedy=f"give --budget {smallest + trunk_nbytes} or more",
        )
    least = math.ceil(smallest * 8000 / parameters) / 1000
    raise UsageError(
        "no scheme has so few bits", where="--expert-bits", wanted=f"{least} or more", got=bits
    )


def expert_record(adapter: ExpertsAdapter, gate_up_scheme: str, down_scheme: str) -> RecordSpec:
    """The record of each of a module's experts with gate and up in one scheme, down in another."""
    return plan_record(
        adapter.hidden_size,
        adapter.intermediate_size,
        gate_up_scheme,
        down_scheme,
        gated=adapter.gated,
        bias=adapter.has_bias,
    )


def _nbytes(plan: Sequence[LayerPlan]) -> int:
    return sum(layer.nbytes for layer in plan)
