"""Keys and values of recorded decoding in float16, and where they stay float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from moepack_runtime.kernels import native
from moepack_runtime.loading import load_pack
from moepack_runtime.tape import forward
from moepack_runtime.tape.caches import take_over
from moepack_runtime.tape.kv import GrowingLayer
from tests import families
from tests.packs import make_family_pack

IDS = families.tokens(batch=1, length=14)

needs_native = pytest.mark.skipif(native.available() is None, reason=native.why_not())


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_pack("olmoe", tmp_path_factory.mktemp("olmoe"))


def step(model: Any, cache: Any, begin: int, end: int) -> Any:
    with torch.no_grad():
        ids = IDS[:, begin:end]
        return model(input_ids=ids, past_key_values=cache, use_cache=True)


def kept(cache: Any) -> list[torch.dtype]:
    return [layer.buffers.keys.dtype for layer in cache.layers]


def filled(keys: Tensor, values: Tensor) -> DynamicCache:
    cache = DynamicCache()
    cache.update(keys, values, 0)
    return cache


@needs_native
@pytest.mark.parametrize(
    ("activations", "dtype"), [("int8", torch.float16), ("float", torch.float32)]
)
def test_halves_go_with_int8_activations(pack: Path, activations: str, dtype: torch.dtype) -> None:
    model = load_pack(pack, activations=activations)
    output = step(model, step(model, None, 0, 4).past_key_values, 4, 5)
    assert model.moepack.tape.playing
    assert set(kept(output.past_key_values)) == {dtype}


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves with float activations, so that nothing else is rounded."""
    monkeypatch.setattr(forward, "take_over", lambda cache, half: take_over(cache, half=True))


@needs_native
@pytest.mark.usefixtures("halves")
def test_decoding_in_halves_is_close_to_transformers_own(pack: Path) -> None:
    """Prompts, played tokens, several at once and a crop, on the same cache."""
    results = []
    for tape in (False, True):
        model = load_pack(pack, activations="float", tape=tape)
        output, logits = step(model, None, 0, 4), []
        for begin, end in ((4, 5), (5, 6), (6, 10), (10, 11)):
            output = step(model, output.past_key_values, begin, end)
            logits.append(output.logits[:, -1])
        output.past_key_values.crop(-3)
        output = step(model, output.past_key_values, 11, 12)
        logits.append(output.logits[:, -1])
        assert output.past_key_values.get_seq_length() == 9
        results.append(torch.cat(logits))
    assert model.moepack.tape.playing
    assert set(kept(output.past_key_values)) == {torch.float16}
    assert 0 < (results[1] - results[0]).norm() < 1e-3 * results[0].norm()


@needs_native
@pytest.mark.usefixtures("halves")
def test_a_value_beyond_float16_in_a_played_token(pack: Path) -> None:
    """Its layer goes on in float32, with this value as it is; the others stay."""
    results = []
    for tape in (False, True):
        model = load_pack(pack, activations="float", tape=tape)
        output = step(model, step(model, None, 0, 4).past_key_values, 4, 5)
        model.model.layers[1].input_layernorm.weight.data.mul_(1e7)
        logits = []
        for at in range(5, 9):
            output = step(model, output.past_key_values, at, at + 1)
            logits.append(output.logits)
        results.append(torch.cat(logits))
    cache = output.past_key_values
    assert model.moepack.tape.playing
    assert kept(cache)[:2] == [torch.float16, torch.float32]
    assert cache.layers[1].values.abs().max() > 65504
    assert (results[1] - results[0]).norm() < 1e-3 * results[0].norm()


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [
        (1.0, torch.float16),
        (65504.0, torch.float16),
        (65520.0, torch.float32),
        (float("inf"), torch.float32),
        (float("nan"), torch.float32),
        (1e-3, torch.float32),
    ],
)
def test_a_prompt_decides_what_a_layer_keeps(largest: float, dtype: torch.dtype) -> None:
    keys, values = torch.rand(1, 2, 5, 8), torch.rand(1, 2, 5, 4) * min(largest, 1.0) * 0.9
    values[0, 1, 3, 2] = -largest
    cache = filled(keys, values)
    layers = take_over(cache, half=True)
    assert layers is not None
    assert kept(cache) == [dtype]
    assert layers[0].values is not None
    torch.testing.assert_close(layers[0].values, values, rtol=1e-3, atol=1e-6, equal_nan=True)
    assert take_over(cache, half=True) == layers


def test_a_layer_in_halves_is_a_dynamic_one() -> None:
    keys, values = torch.randn(2, 1, 2, 600, 4)
    cache = filled(keys[:, :, :300], values[:, :, :300])
    layers = take_over(cache, half=True)
    assert layers is not None
    layer = layers[0]
    for at in range(300, 600, 50):
        seen = layer.update(keys[:, :, at : at + 50], values[:, :, at : at + 50])
    assert layer.buffers is not None
    assert layer.buffers.half
    for got, wanted in zip(seen, (keys, values), strict=True):
        assert torch.equal(got, wanted.half().float())
    layer.crop(-500)
    large = torch.full((1, 2, 1, 4), 1e6)
    after = layer.update(keys[:, :, :1], large)
    assert not layer.buffers.half
    assert torch.equal(after[1], torch.cat([values[:, :, :100].half().float(), large], dim=2))
    layer.batch_repeat_interleave(3)
    assert layer.get_seq_length() == 101
    assert torch.equal(
        layer.update(large.expand(3, -1, -1, -1), large.expand(3, -1, -1, -1))[1][2],
        torch.cat([after[1], large], dim=2)[0],
    )


def test_without_leave_nothing_is_rounded() -> None:
    keys, values = torch.randn(2, 1, 2, 5, 4)
    cache = filled(keys, values)
    layers = take_over(cache)
    assert layers is not None
    assert isinstance(layers[0], GrowingLayer)
    assert torch.equal(layers[0].keys, keys)
