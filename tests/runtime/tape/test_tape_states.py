"""Recorded decoding of models whose cache holds states: linear attention and convolutions."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import LinearAttentionLayer
from transformers.models.minimax.modeling_minimax import MiniMaxCache

from moepack_runtime.loading import load_pack
from moepack_runtime.tape.caches import odd_kind, take_over
from moepack_runtime.tape.record import CannotRecord, Recorder
from moepack_runtime.tape.states import Home, can_be_played, state_holders, states_of
from tests import families
from tests.packs import FamilyPacks

IDS = families.tokens(batch=1, length=16)
FAMILIES = ["qwen3_next", "lfm2_moe", "jamba", "nemotron_h", "minimax", "zaya"]
"""minimax's cache keeps states itself; zaya's layers have keys and values beside them."""
OTHER = families.tokens(batch=1, length=16, seed=5)


@pytest.fixture(scope="module", params=FAMILIES)
def pack(request: pytest.FixtureRequest, family_packs: FamilyPacks) -> Path:
    return family_packs(request.param)


class Text:
    """A text and its cache."""

    def __init__(self, model: Any, ids: torch.Tensor, start: int = 4) -> None:
        self.model, self.ids, self.at = model, ids, start
        with torch.no_grad():
            self.cache = model(input_ids=ids[:, :start], use_cache=True).past_key_values

    def go(self, tokens: int = 1) -> torch.Tensor:
        """Logits after so many more tokens, given in one call."""
        ids = self.ids[:, self.at : self.at + tokens]
        with torch.no_grad():
            output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.at += tokens
        assert output.past_key_values is self.cache
        return output.logits[:, -1]


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)


@pytest.fixture
def models(pack: Path) -> tuple[Any, Any]:
    """The same pack, played and not."""
    loaded = load_pack(pack, activations="float"), load_pack(pack, activations="float", tape=False)
    Text(loaded[0], OTHER).go()
    assert loaded[0].moepack.tape.playing
    return loaded


def test_recording_leaves_the_text_as_it_was(pack: Path) -> None:
    """What is recorded are passes of their own, and the first token of a text counts once."""
    texts = [Text(load_pack(pack, activations="float", tape=tape), IDS) for tape in (True, False)]
    for _ in range(3):
        played, plain = (text.go() for text in texts)
        assert_close(played, plain)
    played, plain = (states_of(state_holders(text.cache)) for text in texts)
    assert played
    for mine, wanted in zip(played, plain, strict=True):
        assert_close(mine, wanted)


def test_two_texts_in_turns(models: tuple[Any, Any]) -> None:
    turns = [Text(model, ids) for model in models for ids in (IDS, OTHER)]
    for _ in range(4):
        a, b, wanted_a, wanted_b = (text.go() for text in turns)
        assert_close(a, wanted_a)
        assert_close(b, wanted_b)


def test_several_tokens_in_between(models: tuple[Any, Any]) -> None:
    """transformers' own code reads and writes the states that played tokens use."""
    played, plain = (Text(model, IDS) for model in models)
    for tokens in (1, 3, 1, 1, 2, 1):
        assert_close(played.go(tokens), plain.go(tokens))


def test_a_copy_of_a_cache_goes_its_own_way(models: tuple[Any, Any]) -> None:
    played, plain = (Text(model, IDS) for model in models)
    for text in (played, plain):
        text.go()
    branches = [copy.copy(text) for text in (played, plain)]
    for branch, text in zip(branches, (played, plain), strict=True):
        branch.cache, branch.ids = copy.deepcopy(text.cache), OTHER
    for _ in range(3):
        assert_close(played.go(), plain.go())
        assert_close(branches[0].go(), branches[1].go())


def test_a_text_that_is_left_keeps_its_states(models: tuple[Any, Any]) -> None:
    """Also when nobody plays it on: its cache can be read."""
    model = models[0]
    first = Text(model, IDS)
    first.go()
    states = [state.clone() for state in states_of(state_holders(first.cache))]
    second = Text(model, OTHER)
    second.go()
    for now, state in zip(states_of(state_holders(first.cache)), states, strict=True):
        assert torch.equal(now, state)


def test_a_cache_ends_with_its_owner(models: tuple[Any, Any]) -> None:
    text = Text(models[0], IDS)
    text.go()
    ends = [weakref.ref(layer) for layer in state_holders(text.cache)]
    assert ends
    del text
    gc.collect()
    assert not any(end() is not None for end in ends)
    Text(models[0], OTHER).go()


def test_states_of_another_kind_are_not_played(models: tuple[Any, Any]) -> None:
    """A cache that keeps its past, to be cropped, and two texts at once."""
    model, plain = models
    texts = [Text(m, IDS) for m in (model, plain)]
    for text in texts:
        for layer in state_holders(text.cache):
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
    assert_close(texts[0].go(), texts[1].go())
    with torch.no_grad():
        two = torch.cat([IDS, OTHER])
        logits = []
        for m in (model, plain):
            cache = m(input_ids=two[:, :4], use_cache=True).past_key_values
            logits.append(m(input_ids=two[:, 4:5], past_key_values=cache, use_cache=True).logits)
    assert_close(*logits)


def test_generate_gives_the_same_tokens(pack: Path) -> None:
    keywords: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    # In float: sums in another order may change a code of an activation, and that a token.
    wanted = load_pack(pack, activations="float", tape=False).generate(IDS[:, :5], **keywords)
    model = load_pack(pack, activations="float")
    for _ in range(2):
        assert torch.equal(model.generate(IDS[:, :5], **keywords), wanted)
    assert model.moepack.tape.playing


def test_a_state_that_is_put_in_the_place_of_another() -> None:
    """It is copied to where the other was, behind everything that reads that or makes it."""
    cache = MiniMaxCache()
    old = torch.ones(1, 2)
    cache.set_linear_cache(0, old)
    home = Home([cache])
    with home.lent([cache]):
        with Recorder() as recorder:
            mine = cache.get_linear_cache(0)
            assert mine is home.tensors[0]
            new = mine * 2.0
            late = mine + 1.0
            new.add_(1.0)
            _ = late * late
        cache.set_linear_cache(0, new)
        home.take_back([cache], recorder.steps)
        assert cache.get_linear_cache(0) is mine
        names = [str(step.operation) for step in recorder.steps]
        assert [name.split(".")[1] for name in names] == ["mul", "add", "add_", "copy_", "mul"]
        cache.set_linear_cache(0, torch.ones(1, 3))
        with pytest.raises(CannotRecord, match="shape"):
            home.take_back([cache], recorder.steps)
    assert cache.get_linear_cache(0) is old
    assert torch.equal(home.tensors[0], torch.full((1, 2), 3.0))


def test_a_cache_that_keeps_something_else_is_not_played() -> None:
    cache = MiniMaxCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    cache.set_linear_cache(1, torch.ones(1, 2))
    assert odd_kind(cache) is None
    vars(cache)["tokens"] = 3
    assert odd_kind(cache) == "MiniMaxCache"
    assert take_over(cache) is None


def test_a_layer_of_other_shapes_does_not_fit() -> None:
    def layer(width: int) -> LinearAttentionLayer:
        new = LinearAttentionLayer()
        assert not can_be_played(new)
        new.update_conv_state(torch.randn(1, width, 4))
        assert can_be_played(new)
        return new

    home = Home([layer(8)])
    assert home.fits([layer(8)])
    assert not home.fits([layer(6)])
    assert not home.fits([])
    both = layer(8)
    both.update_recurrent_state(torch.randn(1, 2, 4, 4))
    assert not home.fits([both])
