"""Whether a pack is one of the model that its config describes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moepack_formats.errors import FormatError, UsageError
from moepack_formats.pack import Pack

from ..experts import ExpertsAdapter
from ..policies import Key
from .pack_config import MODEL_TYPE

if TYPE_CHECKING:  # also imported while transformers is still importing its own
    from transformers import PreTrainedModel


def check_layers(model: PreTrainedModel, pack: Pack, adapters: list[ExpertsAdapter]) -> None:
    """The pack must hold exactly the experts that the config's model has.

    Raises:
        FormatError: It does not.
        UsageError: The model was not loaded through an auto class, or through one of another kind.
    """
    entries, family = pack.manifest.layers, pack.manifest.model_type
    if model.config.model_type == MODEL_TYPE:
        # The family's own class has read config.json itself, and believed all of it.
        raise UsageError(
            "a pack is loaded through an auto class",
            got=f"{type(model).__name__}.from_pretrained",
            remedy="use AutoModelForCausalLM.from_pretrained",
        )
    if model.config.model_type != family:
        raise FormatError(
            "config.json names another family than the manifest",
            where=pack.folder,
            wanted=family,
            got=model.config.model_type,
        )
    from .auto_class import auto_class_of, classes_of  # needs all of transformers

    wanted = classes_of(type(model.config))
    if wanted and not isinstance(model, wanted):
        auto = auto_class_of(type(model.config)).__name__
        raise UsageError(
            "a pack is loaded as a model that generates text",
            wanted=" or ".join(one.__name__ for one in wanted),
            got=type(model).__name__,
            remedy=f"use {auto}.from_pretrained",
        )
    if len(entries) != len(adapters):
        raise FormatError(
            "the number of MoE layers differs from the config's",
            where=pack.folder,
            wanted=len(adapters),
            got=len(entries),
        )
    for entry, adapter in zip(entries, adapters, strict=True):
        if (entry.module, entry.num_experts) != (adapter.name, adapter.num_experts):
            raise FormatError(
                "a layer differs from the config's",
                where=f"{pack.folder}, layer {entry.index}",
                wanted=f"{adapter.name} with {adapter.num_experts} experts",
                got=f"{entry.module} with {entry.num_experts}",
            )
        for expert, at in enumerate(pack.layers[entry.index]):
            down, first = (
                at.spec.tensor("down"),
                at.spec.tensor("gate_up" if adapter.gated else "up"),
            )
            shape = (adapter.hidden_size, adapter.intermediate_size)
            has_bias = at.spec.tensor("down_bias") is not None
            if down is None or first is None or down.shape != shape or has_bias != adapter.has_bias:
                raise FormatError(
                    "a record has another shape than the config's",
                    where=f"{at.file}, layer {entry.index}, expert {expert}",
                    wanted=f"down {list(shape)}",
                    got=None if down is None else list(down.shape),
                )


def check_pins(pack: Pack, pins: tuple[Key, ...]) -> None:
    """Experts to pin must be some that the pack has.

    Raises:
        UsageError: They are another model's.
    """
    for layer, expert in pins:
        if layer >= len(pack.layers) or expert >= len(pack.layers[layer]):
            raise UsageError(
                "the trace with the experts to pin is of another model",
                where=pack.folder,
                got=f"layer {layer}, expert {expert}",
                remedy="record one with `moepack trace`",
            )
