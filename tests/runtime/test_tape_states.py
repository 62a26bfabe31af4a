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

from moepack_runtime.loading import load_pack
from moepack_runtime.tape.states import state_layers
from tests import families
from tests.packs import make_family_pack

IDS = families.tokens(batch=1, length=16)
OTHER = families.tokens(batch=1, length=16, seed=5)


@pytest.fixture(scope="module", params=["qwen3_next", "lfm2_moe", "jamba", "nemotron_h"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_pack(request.param, tmp_path_factory.mktemp(request.param))


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
    played, plain = ([vars(layer) for layer in state_layers(text.cache)] for text in texts)
    for mine, wanted in zip(played, plain, strict=True):
        for name in ("conv_states", "recurrent_states"):
            for place, state in wanted[name].items():
                if state is not None:
                    assert_close(mine[name][place], state)


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
    states = [layer.conv_states[0].clone() for layer in state_layers(first.cache)]
    second = Text(model, OTHER)
    second.go()
    for layer, state in zip(state_layers(first.cache), states, strict=True):
        assert torch.equal(layer.conv_states[0], state)


def test_a_cache_ends_with_its_owner(models: tuple[Any, Any]) -> None:
    text = Text(models[0], IDS)
    text.go()
    ends = [weakref.ref(layer) for layer in state_layers(text.cache)]
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
        for layer in state_layers(text.cache):
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


def test_a_layer_of_other_shapes_does_not_fit() -> None:
    from moepack_runtime.tape.states import Home, can_be_played

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
