"""Routing nudged towards resident experts: where it can be, how much, and with which weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moepack_formats.errors import UsageError
from moepack_runtime.loading import load_pack
from moepack_runtime.options import RuntimeOptions
from tests import families
from tests.packs import make_pack

CANNOT = {"phimoe"}
"""Families whose routers do not choose by a top-k."""


def chosen(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Indices and weights of every MoE layer, in order."""
    seen: list[tuple[Tensor, Tensor]] = []
    for compute in model.moepack.layers:
        compute.watcher = lambda _, index, weights: seen.append((index.clone(), weights.clone()))
    with torch.no_grad():
        model(ids, use_cache=False)
    for compute in model.moepack.layers:
        compute.watcher = None
    return seen


def set_resident(model: Any, experts: list[int]) -> None:
    """Say that these experts of every layer are resident."""
    model.moepack.residency.resident = lambda _: experts


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_families(family: str, tmp_path: Path) -> None:
    source = families.save_checkpoint(families.random_model(family), tmp_path / "source")
    make_pack(source, tmp_path / "pack", attn_bits=16, expert_bits=16)
    model = load_pack(tmp_path / "pack", cache_bias=1.0, io="buffered")
    ids = families.tokens(batch=1, length=3)
    if family in CANNOT:
        with pytest.raises(UsageError, match=r"layer 0: --cache-bias cannot be used"):
            model(ids, use_cache=False)
        return
    plain = chosen(model, ids)  # the first pass is left alone
    assert model.moepack.stats.nudged == 0
    if family != "longcat_flash":  # has places without an expert, which need no reading
        set_resident(model, [])
        assert all(_same(*pair) for pair in zip(plain, chosen(model, ids), strict=True))
        assert model.moepack.stats.nudged == 0

    wanted = [5, 6, 7]
    set_resident(model, wanted)
    nudged = chosen(model, ids)
    experts = model.moepack.adapters[0].num_experts
    changed = sum(_count(after, wanted) - _count(before, wanted)
                  for before, after in zip(plain, nudged, strict=True))  # fmt: skip
    assert changed > 0
    assert model.moepack.stats.nudged > 0
    # A token is still sent to as many experts, each once.
    for (before, _), (after, _) in zip(plain, nudged, strict=True):
        assert after.shape == before.shape
        rows = after.reshape(3, -1).tolist()
        assert all(len(set(row)) == len(row) for row in rows)
    # The first layer reads the same in both passes: the weights of experts that were chosen both
    # times relate to one another as before.
    first = 0
    for token in range(3):
        before, after = (_weights(one[first], token, experts) for one in (plain, nudged))
        both = sorted(before.keys() & after.keys())
        for a, b in pairwise(both):
            assert after[a] * before[b] == pytest.approx(after[b] * before[a], rel=1e-4)

    model.moepack.bias.active = False
    assert all(_same(*pair) for pair in zip(plain, chosen(model, ids), strict=True))
    model.moepack.bias.active = True
    long = families.tokens(batch=1, length=9)
    before_long = model.moepack.stats.nudged
    model(long, use_cache=False)
    assert model.moepack.stats.nudged == before_long  # a long pass is left alone


def _same(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(one[0], two[0]) and torch.allclose(one[1], two[1])


def _count(choice: tuple[Tensor, Tensor], wanted: list[int]) -> int:
    return int(torch.isin(choice[0], torch.tensor(wanted)).sum())


def _weights(choice: tuple[Tensor, Tensor], token: int, experts: int) -> dict[int, float]:
    index, weights = (part.reshape(3, -1)[token].tolist() for part in choice)
    return {e: w for e, w in zip(index, weights, strict=True) if e < experts}


@pytest.fixture
def biased(pack: Path) -> Any:
    return load_pack(pack, cache_bias=0.25, io="buffered")


def test_only_close_scores_are_changed(biased: Any) -> None:
    """A resident expert wins against a better one that is at most a quarter of the spread ahead."""
    ids = families.tokens(batch=1, length=2)
    biased(ids, use_cache=False)
    set_resident(biased, [0, 1, 2, 3])
    gate = biased.model.layers[0].mlp.gate
    inputs: list[Tensor] = []
    hook = gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    (index, weights), *_ = chosen(biased, ids)
    hook.remove()
    logits = inputs[0].reshape(2, -1) @ gate.weight.T
    scores = logits.softmax(-1)
    spread = scores.amax(-1) - scores.amin(-1)
    raised = scores.clone()
    raised[:, :4] += 0.25 * spread[:, None]
    lowest = scores.argmin(-1)
    raised[[0, 1], lowest] = scores[[0, 1], lowest]
    wanted = raised.topk(2).indices
    assert index.tolist() == wanted.tolist()
    own = scores.gather(1, wanted)
    assert torch.allclose(weights, own / own.sum(-1, keepdim=True))


def test_guesses_allow_for_it(biased: Any) -> None:
    ids = families.tokens(batch=1, length=1)
    biased(ids, use_cache=False)
    biased.moepack.bias._share = 1.0
    guessed: list[set[int]] = []
    biased.moepack.residency.prefetch = lambda _, experts: guessed.append(set(experts))
    set_resident(biased, [])
    with torch.no_grad():
        biased(ids, use_cache=False)
        plain = guessed.copy()
        guessed.clear()
        # Three at hand: at most one of them has the lowest score, which is never raised.
        set_resident(biased, [5, 6, 7])
        biased(ids, use_cache=False)
    assert all(guess <= {5, 6, 7} for guess in guessed)
    assert guessed != plain
    assert biased.moepack.stats.nudged <= 6  # guesses are not choices


def test_hits_go_up(pack: Path) -> None:
    """On the same text, with the same half of the experts in memory."""
    ratios = []
    for bias in (0.0, 0.5):
        model = load_pack(pack, io="buffered", slots=12, prefetch=False, cache_bias=bias)
        with torch.no_grad():
            for token in families.tokens(batch=1, length=60)[0]:
                model(token[None, None], use_cache=False)
        ratios.append(model.moepack.stats.hit_ratio)
    assert ratios[1] > ratios[0] + 0.1


def test_off_by_default(pack: Path) -> None:
    assert RuntimeOptions().cache_bias == 0
    assert load_pack(pack).moepack.bias is None
    for wrong in (-0.1, 1.5):
        with pytest.raises(UsageError, match="not a cache bias"):
            RuntimeOptions(cache_bias=wrong)
