"""``docs/families.md`` names every family with experts, and says the truth about those refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.commands import Command
from tests.documented_families import documented
from tests.families import FAMILIES
from tests.more_families import MORE_FAMILIES

ROWS = documented()
REFUSED = sorted(family for family, row in ROWS.items() if row.converts != "yes")
_SMALL: dict[str, dict[str, Any]] = {
    "doge": {"is_moe": True, "num_experts": 16},
    "diffusion_gemma": {
        "text_config": {
            "model_type": "diffusion_gemma_text",
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 40,
        },
    },
}


def test_the_page_lists_what_is_tested() -> None:
    converted = {family for family, row in ROWS.items() if row.converts == "yes"}
    assert converted == {*FAMILIES, *MORE_FAMILIES}


def test_the_page_leaves_out_no_family_of_transformers() -> None:
    """Every package with a class of experts, under one of its model types."""
    experts = re.compile(
        r"^@use_experts_implementation|^class \w*(Experts|SparseMLP|CDMoE)\b", re.M
    )
    models = Path(transformers.__file__).parent / "models"
    packages = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if experts.search(path.read_text("utf-8"))
    }
    named = {CONFIG_MAPPING[family].__module__.split(".")[-2] for family in ROWS}
    named |= {
        text["model_type"] for row in MORE_FAMILIES.values() if (text := row.get("text_config"))
    }
    assert len(packages) > 60
    assert sorted(packages - named) == []


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_packed_is_refused(family: str, command: Command, tmp_path: Path) -> None:
    """In one line, before anything is written."""
    source = tmp_path / "source"
    source.mkdir()
    AutoConfig.for_model(family, **_SMALL.get(family, {})).save_pretrained(source)
    save_file({"x": torch.zeros(2)}, source / "model.safetensors", metadata={"format": "pt"})
    line = command("convert", source, tmp_path / "out").error(2)
    assert ROWS[family].converts.removeprefix("no: ") in line
    assert not (tmp_path / "out").exists()
