"""Recorded decoding reads records while shared experts compute, and gives the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moepack_runtime.loading import load_pack
from moepack_runtime.tape import forward
from moepack_runtime.tape.overlap import reads_early
from moepack_runtime.tape.record import Opaque, Step
from tests import families
from tests.packs import FamilyPacks

IDS = families.tokens(batch=1, length=12)


def kinds(steps: list[Step]) -> list[str]:
    return [s.operation.kind if isinstance(s.operation, Opaque) else "" for s in steps]


def recorded(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Logits of decoding, and the steps before and after they were put in order."""
    seen: list[tuple[list[Step], list[Step]]] = []

    def watched(steps: list[Step]) -> list[Step]:
        seen.append((steps, reads_early(steps)))
        return seen[-1][1]

    monkeypatch.setattr(forward, "reads_early", watched)
    model = load_pack(folder, io="buffered", slots=6, **options)
    with torch.no_grad():
        output = model(input_ids=IDS[:, :3], use_cache=True)
        logits = []
        for i in range(3, IDS.shape[1]):
            cache = output.past_key_values
            output = model(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
            logits.append(output.logits)
    assert model.moepack.tape.playing
    ((before, after),) = seen
    return torch.cat(logits), before, after


# Shared experts ahead of the router, behind the routed experts, and of every kind between.
@pytest.mark.parametrize("family", ["qwen2_moe", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe"])
def test_shared_experts_compute_while_records_are_read(
    family: str, family_packs: FamilyPacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_packs(family)
    logits, before, after = recorded(folder, monkeypatch)
    assert "demand" not in kinds(before)
    assert "demand" in kinds(after)
    assert {id(step) for step in before} <= {id(step) for step in after}
    between = 0
    for place, kind in enumerate(kinds(after)):
        if kind == "demand":
            rest = kinds(after)[place:]
            between += rest[: rest.index("experts")].count("packed")
    assert between >= 2 * kinds(after).count("demand")  # gate and up in one, down: a shared expert
    monkeypatch.setattr(forward, "reads_early", lambda steps: steps)
    model = load_pack(folder, io="buffered", slots=6)
    with torch.no_grad():
        output, wanted = model(input_ids=IDS[:, :3], use_cache=True), []
        for i in range(3, IDS.shape[1]):
            cache = output.past_key_values
            output = model(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
            wanted.append(output.logits)
    assert torch.equal(logits, torch.cat(wanted))


def test_models_without_shared_experts_stay_as_they_are(
    family_packs: FamilyPacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, before, after = recorded(family_packs("olmoe"), monkeypatch)
    assert [id(step) for step in before] == [id(step) for step in after]


def test_memory_that_is_written_over_keeps_its_order() -> None:
    hidden, index = torch.zeros(1, 4), torch.zeros(1, 2, dtype=torch.long)
    out, shared, total = (torch.zeros(1, 4) for _ in range(3))
    packed, experts = Opaque("packed", None), Opaque("experts", None)
    steps = [
        Step(experts, (hidden, index, hidden), {}, (out,)),
        Step(packed, (hidden,), {}, (shared,)),
        Step(torch.ops.aten.add.Tensor, (out, shared), {}, (total,)),
    ]
    assert kinds(reads_early(steps)) == ["demand", "packed", "experts", ""]
    # In place: the sum's two steps stay together, and shared experts still come first.
    steps[2] = Step(torch.ops.aten.add_.Tensor, (out, shared), {}, (out,))
    assert kinds(reads_early(steps)) == ["demand", "packed", "experts", ""]
    # What the shared experts made is written over later, and must not be before.
    steps[2] = Step(torch.ops.aten.add_.Tensor, (shared, out), {}, (shared,))
    assert kinds(reads_early(steps)) == ["experts", "packed", ""]
