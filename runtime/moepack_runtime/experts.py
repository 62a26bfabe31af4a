"""What the runtime has to know about one experts module of a transformers model.

transformers keeps the routed experts of a layer in one module. Classes that carry its
``use_experts_implementation`` decorator describe their own layout in attributes, so one adapter
serves all of them without naming a family. The few classes without the decorator have a file each
in ``moepack_runtime.adapters``, found by the model type.

Every adapter speaks the *canonical* form of one expert: ``gate`` and ``up`` are ``[intermediate,
hidden]``, ``down`` is ``[hidden, intermediate]``, biases are vectors. Packing and kernels use
nothing else; the module's own order comes back only in front of its own activation.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from moepack_formats.errors import UsageError

IMPLEMENTATION = "moepack"
"""The name under which transformers knows our experts function."""

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``compute(hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]`` in hidden's dtype.

An index of ``num_experts`` or more marks an empty place: it contributes nothing and its weights
must not be asked for.
"""

_LAYOUT_ATTRIBUTES = (
    "has_gate",
    "has_bias",
    "has_post_expert_norm",
    "is_transposed",
    "is_concatenated",
    "_apply_gate",
)


class ExpertsAdapter:
    """One experts module, on the meta device or real; this class serves the decorated ones.

    Sizes are read once, at construction, so an adapter stays valid after ``strip``.

    Attributes:
        name: Dotted name of the module in the model.
        module: The module itself.
        num_experts: How many experts have weights.
        hidden_size: Inputs of gate and up, outputs of down.
        intermediate_size: Outputs of gate and up, inputs of down.
        gated: Whether there is a gate; without one only ``up`` and ``down`` exist.
        has_bias: Whether every projection has a bias.
        parameters: The parameters with an expert axis, relative to the module, in the order in
            which they are used.
        shapes: The true shape of each of them in the module.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    has_bias: bool
    parameters: tuple[str, ...]

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self._describe()
        self.shapes = {p: tuple(module.get_parameter(p).shape) for p in self.parameters}

    def _describe(self) -> None:
        """Reads the layout from the attributes the decorator has set."""
        from transformers.integrations.moe import _default_apply_gate

        module = cast(Any, self.module)
        self.gated = bool(module.has_gate)
        self.has_bias = bool(module.has_bias)
        self._transposed = bool(module.is_transposed)
        self._interleaved = self.gated and not module.is_concatenated
        first = "gate_up_proj" if self.gated else "up_proj"
        biases = (f"{first}_bias", "down_proj_bias") if self.has_bias else ()
        self.parameters = (first, "down_proj", *biases)
        self._own_gate = type(module)._apply_gate is not _default_apply_gate
        self._read_sizes()

    def _read_sizes(self) -> None:
        """Takes the sizes from ``down_proj``; some configs name an input width that is not it."""
        self.num_experts, rows, cols = map(int, self.module.get_parameter("down_proj").shape)
        sizes = (cols, rows) if self._transposed else (rows, cols)
        self.hidden_size, self.intermediate_size = sizes

    def expert_slice(self, parameter: str, shape: Sequence[int], expert: int) -> tuple[slice, ...]:
        """Where one expert lies in a parameter.

        Args:
            parameter: One of ``parameters``.
            shape: The shape of the tensor to slice; a source may hold the parameter under
                another name, but with the same first axis.
            expert: 0 <= expert < num_experts.

        Returns:
            One slice per axis. The expert axis stays, with length 1.
        """
        return (slice(expert, expert + 1), *(slice(None) for _ in shape[1:]))

    def without_expert_axis(self, parameter: str, sliced: Tensor) -> Tensor:
        """Drops the axis of length 1 that ``expert_slice`` leaves."""
        return sliced[0]

    def canonical(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Brings one expert's tensors from the module's layout into the canonical one.

        Args:
            tensors: ``{parameter: tensor}`` without the expert axis, any dtype.

        Returns:
            ``gate`` and ``up`` [I, H], ``down`` [H, I], ``*_bias`` vectors, in the same dtype and
            possibly as views. Without a gate there is neither ``gate`` nor ``gate_bias``.
        """
        out: dict[str, Tensor] = {}
        for parameter in self.parameters:
            tensor = tensors[parameter]
            if tensor.dim() == 2 and self._transposed:
                tensor = tensor.t()
            suffix = "_bias" if parameter.endswith("_bias") else ""
            if parameter.startswith("gate_up"):
                if self._interleaved:
                    gate, up = tensor[0::2], tensor[1::2]
                else:
                    gate, up = tensor.chunk(2, dim=0)
                out[f"gate{suffix}"], out[f"up{suffix}"] = gate, up
            else:
                out[f"{parameter.partition('_')[0]}{suffix}"] = tensor
        return out

    def restore_gate_up(self, gate_up: Tensor) -> Tensor:
        """Puts ``[..., 2I]`` (all of gate, then all of up) into the module's own order."""
        if not self._interleaved:
            return gate_up
        return torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)

    def activate(self, projected: Tensor) -> Tensor:
        """Applies the module's own activation.

        Args:
            projected: ``[T, 2I]``, gate first, or ``[T, I]`` without a gate; biases already added.

        Returns:
            ``[T, I]``.
        """
        if not self.gated:
            return self._act_fn(projected)
        if self._own_gate:
            gate_up = self.restore_gate_up(projected)
            return cast(Tensor, cast(Any, self.module)._apply_gate(gate_up))
        gate, up = projected.chunk(2, dim=-1)
        return self._act_fn(gate) * up

    def finish(self, output: Tensor) -> Tensor:
        """Applies what follows ``down`` and comes before the router's weight; ``[T, H]``."""
        if getattr(self.module, "has_post_expert_norm", False):
            return cast(Tensor, cast(Any, self.module).post_expert_norm(output))
        return output

    @property
    def is_plain_swiglu(self) -> bool:
        """Whether an expert is ``down(silu(gate) * up)`` and nothing else but biases."""
        return (
            self.gated
            and not self._own_gate
            and not getattr(self.module, "has_post_expert_norm", False)
            and _is_silu(self._act_fn)
        )

    @property
    def _act_fn(self) -> Callable[[Tensor], Tensor]:
        return cast("Callable[[Tensor], Tensor]", self.module.act_fn)

    def strip(self) -> None:
        """Deletes the expert parameters and keeps transformers from initialising them again."""
        for parameter in self.parameters:
            owner_name, _, leaf = parameter.rpartition(".")
            owner = self.module.get_submodule(owner_name)
            if owner._parameters.pop(leaf, None) is not None:
                # Some families initialise the parameter from the block around the experts: it
                # finds a tensor of no content there, which says that nothing is left to do.
                nothing = torch.empty(0, dtype=torch.float32)
                cast(Any, nothing)._is_hf_initialized = True
                setattr(owner, leaf, nothing)
            cast(Any, owner)._is_hf_initialized = True
        cast(Any, self.module)._is_hf_initialized = True

    def install(self, compute: Compute) -> None:
        """Makes the module call ``compute`` once the implementation is set to ``moepack``."""
        cast(Any, self.module)._moepack_compute = compute

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name!r}, {self.num_experts} experts, "
            f"hidden {self.hidden_size}, intermediate {self.intermediate_size})"
        )


class FusedExpertsAdapter(ExpertsAdapter):
    """Base of the undecorated classes with ``gate_up_proj``, ``down_proj`` and ``act_fn``."""

    transposed = False
    """Whether the parameters are ``[experts, inputs, outputs]``."""

    @override
    def _describe(self) -> None:
        self._transposed, self._interleaved = self.transposed, False
        self._own_gate = hasattr(self.module, "_apply_gate")
        self.gated, self.has_bias = True, False
        self.parameters = ("gate_up_proj", "down_proj")
        self._read_sizes()

    @override
    def install(self, compute: Compute) -> None:
        """Replaces the module's forward, which transformers would not dispatch."""
        super().install(compute)
        cast(Any, self.module).forward = compute


def _is_silu(activation: object) -> bool:
    # transformers maps "silu" and "swish" to a class of its own, whose module has moved before.
    return (
        activation is functional.silu
        or isinstance(activation, nn.SiLU)
        or type(activation).__name__ == "SiLUActivation"
    )


def is_decorated(module: nn.Module) -> bool:
    """Whether the module's class carries transformers' ``use_experts_implementation``."""
    return all(hasattr(module, name) for name in _LAYOUT_ATTRIBUTES)


def register_experts_function() -> None:
    """Makes ``moepack`` an experts implementation of transformers; calling it again is harmless."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


def _experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward transformers calls on a decorated module; ``[T, H] -> [T, H]``."""
    compute = cast("Compute | None", getattr(self, "_moepack_compute", None))
    if compute is None:
        raise UsageError(
            "the experts implementation 'moepack' needs a pack",
            where=type(self).__name__,
            remedy="load the pack with from_pretrained, or choose another experts implementation",
        )
    return compute(hidden_states, top_k_index, top_k_weights)


def find_experts(model: nn.Module) -> list[ExpertsAdapter]:
    """Finds every experts module of a model, in the order of its layers.

    Args:
        model: A transformers model on any device, the meta device included.

    Returns:
        One adapter per experts module, at least one.

    Raises:
        UsageError: The model has no experts, or none of a supported class.
    """
    found = [
        ExpertsAdapter(name, module)
        for name, module in model.named_modules()
        if is_decorated(module)
    ]
    for family in _families_of(model):
        module = importlib.import_module(f"moepack_runtime.adapters.{family}")
        found.extend(module.adapters(model))
    if not found:
        raise _unsupported(model)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda adapter: order[adapter.name])


def undecorated_families() -> list[str]:
    """Names of the families that have an adapter file of their own."""
    package = importlib.import_module("moepack_runtime.adapters")
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__))


def supported_experts() -> str:
    """One sentence fragment that says which models are supported, for messages."""
    return (
        "supported are all models whose experts carry transformers' use_experts_implementation "
        "decorator (mixtral, qwen3_moe, deepseek_v3, gpt_oss, ...) and "
        + ", ".join(undecorated_families())
    )


def _families_of(model: nn.Module) -> list[str]:
    """The undecorated families a model has parts of.

    transformers names a package after the model type, and the text model of a multimodal wrapper
    lives in the same package, whatever type its own config states.
    """
    packages = {type(module).__module__.rpartition(".")[0] for module in model.modules()}
    families = {package.rpartition(".")[2] for package in packages}
    return [family for family in undecorated_families() if family in families]


def _unsupported(model: nn.Module) -> UsageError:
    """The error for a model without a single supported experts module."""
    names = {type(module).__name__ for module in model.modules() if module is not model}
    by_word = ([n for n in names if word in n.lower()] for word in ("expert", "moe", "sparse"))
    suspects = sorted(next(filter(None, by_word), []))
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    where = (
        f"{type(model).__name__} (model type {model_type})" if model_type else type(model).__name__
    )
    if suspects:
        what = f"its experts ({', '.join(suspects)}) are of a kind that cannot be packed"
    else:
        what = "it has no routed experts"
    return UsageError(what, where=where, remedy=supported_experts())
