"""Recorded decoding of models whose attention sees a window of the last tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from moepack_runtime.kernels import native
from moepack_runtime.loading import load_pack
from moepack_runtime.tape import forward, kv_window
from moepack_runtime.tape.caches import take_over
from moepack_runtime.tape.kv_states import GrowingStatesLayer, GrowingStatesWindowLayer
from moepack_runtime.tape.kv_window import GrowingWindowLayer
from tests import families
from tests.packs import FamilyPacks

WINDOW = 5
IDS = families.tokens(batch=1, length=40)

needs_native = pytest.mark.skipif(native.available() is None, reason=native.why_not())


@pytest.fixture(scope="module")
def pack(family_packs: FamilyPacks) -> Path:
    """gpt_oss: every other layer has a window, and there are sinks."""
    return family_packs("gpt_oss", {"sliding_window": WINDOW})


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens before the window are left behind soon."""
    monkeypatch.setattr(kv_window, "GROWTH", 3)
    monkeypatch.setattr("moepack_runtime.tape.kv.GROWTH", 3)


def decode(model: Any, prompt: int, cache: Any = None) -> tuple[list[Tensor], Any]:
    with torch.no_grad():
        output = model(input_ids=IDS[:, :prompt], past_key_values=cache, use_cache=True)
        found = []
        for at in range(prompt, IDS.shape[1]):
            cache = output.past_key_values
            output = model(input_ids=IDS[:, at : at + 1], past_key_values=cache, use_cache=True)
            found.append(output.logits)
    return found, output.past_key_values


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=0)


def check_played(pack: Path, prompt: int, make_cache: Callable[[], Any] = lambda: None) -> Any:
    """Played tokens give transformers' own logits. Returns the cache."""
    wanted, _ = decode(load_pack(pack, activations="float", tape=False), prompt, make_cache())
    model = load_pack(pack, activations="float")
    got, cache = decode(model, prompt, make_cache())
    assert model.moepack.tape.playing
    assert_same(got, wanted)
    return cache


@needs_native
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("prompt", [1, WINDOW - 1, WINDOW, 3 * WINDOW])
def test_played_tokens_see_their_window(pack: Path, prompt: int) -> None:
    cache = check_played(pack, prompt)
    windows = [layer for layer in cache.layers if isinstance(layer, GrowingWindowLayer)]
    assert 0 < len(windows) < len(cache.layers)
    for layer in windows:
        assert layer.buffers is not None
        assert layer.buffers.capacity <= max(prompt, WINDOW) + 2 * WINDOW
        assert layer.get_seq_length() == IDS.shape[1]


@needs_native
def test_a_window_over_a_cache_that_keeps_everything(pack: Path) -> None:
    """A cache made without the model's config has no layers with windows."""
    cache = check_played(pack, 7, DynamicCache)
    assert not any(isinstance(layer, GrowingWindowLayer) for layer in cache.layers)


@needs_native
@pytest.mark.usefixtures("few")
def test_halves_and_a_second_prompt(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, with nothing else rounded; a conversation goes on with several tokens at once."""
    monkeypatch.setattr(forward, "take_over", lambda cache, half: take_over(cache, half=True))
    results = []
    for tape in (False, True):
        model = load_pack(pack, activations="float", tape=tape)
        with torch.no_grad():
            output, logits = model(input_ids=IDS[:, :6], use_cache=True), []
            for begin, end in ((6, 7), (7, 8), (8, 20), (20, 21), (21, 22), (22, 23)):
                cache = output.past_key_values
                output = model(input_ids=IDS[:, begin:end], past_key_values=cache, use_cache=True)
                logits.append(output.logits[:, -1])
        results.append(torch.cat(logits))
    assert model.moepack.tape.playing
    assert all(layer.buffers.half for layer in output.past_key_values.layers)
    assert (results[1] - results[0]).norm() < 1e-3 * results[0].norm()


@needs_native
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("prompt", [1, WINDOW - 1, 3 * WINDOW])
def test_windows_beside_states(prompt: int, family_packs: FamilyPacks) -> None:
    kinds = ["hybrid_sliding", "hybrid", "hybrid_sliding"]
    pack = family_packs("zaya", {"sliding_window": WINDOW, "layer_types": kinds})
    cache = check_played(pack, prompt)
    found = [type(layer) for layer in cache.layers]
    assert found == [GrowingStatesWindowLayer, GrowingStatesLayer, GrowingStatesWindowLayer]
    for layer in cache.layers[::2]:
        assert layer.buffers.capacity <= max(prompt, WINDOW) + 2 * WINDOW


def test_keys_beside_states_are_not_cut_alone() -> None:
    """A state cannot be taken back to a token before, unless its past was kept."""
    layer = GrowingStatesLayer()
    layer.update_conv_state(torch.randn(1, 2, 3))
    layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
    with pytest.raises(RuntimeError, match="past"):
        layer.crop(-2)
    assert layer.get_seq_length() == 5
    layer.activate_past_recording()
    layer.update_conv_state(torch.randn(1, 2, 4))
    layer.crop(-2)
    assert (layer.get_seq_length(), layer.conv_states[0].shape[-1]) == (3, 3)
    layer.reset()
    assert layer.get_seq_length() == 0


def pair(half: bool = False) -> tuple[DynamicSlidingWindowLayer, GrowingWindowLayer]:
    """A layer of transformers' with two tokens, and one that has taken over the same."""
    layers = []
    for _ in range(2):
        cache = DynamicCache()
        layer = DynamicSlidingWindowLayer(WINDOW)
        cache.layers, cache.layer_class_to_replicate = [layer], None
        cache.update(torch.ones(1, 2, 2, 4), torch.ones(1, 2, 2, 4), 0)
        layers.append(cache)
    taken = take_over(layers[1], half=half)
    assert taken is not None
    assert isinstance(taken[0], GrowingWindowLayer)
    return layers[0].layers[0], taken[0]


@given(st.lists(st.integers(1, 9), max_size=12), st.booleans(), st.integers(0, 2**32))
def test_a_layer_is_a_sliding_one(counts: list[int], played: bool, seed: int) -> None:
    """The same keys, lengths and masks, whatever comes; single tokens may be played ones."""
    torch.manual_seed(seed)
    theirs, mine = pair()
    for count in counts:
        keys, values = torch.randn(2, 1, 2, count, 4)
        assert mine.get_mask_sizes(count) == theirs.get_mask_sizes(count)
        wanted = theirs.update(keys, values)
        if count == 1 and played:
            buffers = mine.reserve(mine.get_seq_length() + 1)
            buffers.keys[:, :, buffers.filled], buffers.values[:, :, buffers.filled] = (
                keys[:, :, 0],
                values[:, :, 0],
            )
            mine.played()
        else:
            for a, b in zip(mine.update(keys, values), wanted, strict=True):
                assert torch.equal(a, b)
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


@pytest.mark.usefixtures("few")
def test_crop() -> None:
    keys = torch.arange(40.0).view(1, 1, 40, 1).expand(1, 2, 40, 4)
    theirs, mine = pair()
    for layer in (theirs, mine):
        layer.activate_past_recording()
        layer.update(keys, keys)
        layer.crop(-6)
    assert torch.equal(mine.keys, theirs.keys)
    assert mine.get_seq_length() == theirs.get_seq_length() == 36
    with pytest.raises(ValueError, match="minus"):
        mine.crop(3)
    mine.crop(0)
    assert mine.get_seq_length() == 36


@pytest.mark.usefixtures("few")
def test_a_crop_to_what_was_left_behind_is_refused() -> None:
    _, mine = pair()
    for _ in range(20):
        mine.reserve(mine.get_seq_length() + 1)
        mine.played()
    with pytest.raises(RuntimeError, match="left behind"):
        mine.crop(-15)
    assert mine.get_seq_length() == 22


def test_several_texts_are_not_played() -> None:
    _, mine = pair()
    mine.batch_repeat_interleave(3)
    cache = DynamicCache()
    cache.layers = [mine]
    assert take_over(cache) is None
    assert mine.update(torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 4))[0].shape == (3, 2, 3, 4)
