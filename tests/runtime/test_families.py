"""Every family, from its checkpoint through a pack and back into transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests import families
from tests.packs import FamilyPacks, with_weights_of_pack

NEW_TOKENS = 8

# Their routers are not modules that hand out indices, so nothing can be asked early.
WITHOUT_PREFETCH = {"dbrx", "llama4_text"}


@pytest.fixture(scope="module", params=sorted(families.FAMILIES))
def family(request: pytest.FixtureRequest) -> Any:
    """A family's name and its stock model."""
    return request.param, families.random_model(request.param)


def greedy(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(
        ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )


def load(pack: Path, **options: Any) -> PreTrainedModel:
    from moepack_runtime.loading import load_pack

    return load_pack(pack, **options)


def test_sixteen_bits_equal_the_stock_model(family: Any, family_packs: FamilyPacks) -> None:
    name, stock = family
    model = load(family_packs(name, attn_bits=16, expert_bits=16))
    ids = families.tokens()
    wanted = families.logits(stock, ids)
    # Of the largest logit: experts are summed in another order than stock's, and float32 rounds.
    tolerance = 1e-5 * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(families.logits(model, ids), wanted, atol=tolerance, rtol=0)
    assert torch.equal(greedy(model, ids), greedy(stock, ids))


@pytest.mark.parametrize("bits", [3, 2])
def test_packed_equals_stock_with_dequantized_weights(
    family: Any, bits: int, family_packs: FamilyPacks
) -> None:
    name, stock = family
    pack = family_packs(name, expert_bits=bits, quantizer="hqq")
    model = load(pack, activations="float")
    assert any(kind for kind in model.moepack.pack.manifest.packed)
    ids = families.tokens()
    same = with_weights_of_pack(copy.deepcopy(stock), model)
    wanted = families.logits(same, ids)
    torch.testing.assert_close(families.logits(model, ids), wanted, atol=1e-3, rtol=1e-3)


def test_cache_and_prefetch_change_no_token(family: Any, family_packs: FamilyPacks) -> None:
    """Half of the combinations in one family, the others in the next."""
    name, _ = family
    pack = family_packs(name)
    ids = families.tokens(batch=1)
    wanted = greedy(load(pack, io="mmap"), ids)
    odd = sorted(families.FAMILIES).index(name)
    for number, slots in enumerate((1, 3, 9, 10**6)):
        prefetch = (number + odd) % 2 == 1
        model = load(pack, io="direct", prefetch=prefetch, slots=slots)
        assert torch.equal(greedy(model, ids), wanted), (slots, prefetch)


def test_prefetch_guesses(family: Any, family_packs: FamilyPacks) -> None:
    """Routers are found where the family's router is a module of its own."""
    name, _ = family
    model = load(family_packs(name), io="buffered")
    greedy(model, families.tokens(batch=1))
    missing = model.moepack.speculator.missing
    assert missing is not None
    if name in WITHOUT_PREFETCH:
        assert missing == list(range(len(model.moepack.pack.layers)))
        assert model.moepack.stats.recall is None
    else:
        assert missing == []
        assert model.moepack.stats.recall is not None
