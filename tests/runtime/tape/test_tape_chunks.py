"""Recorded decoding of models whose attention goes back to the begin of a chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from moepack_runtime.kernels import native
from moepack_runtime.loading import load_pack
from moepack_runtime.tape import attention, forward
from moepack_runtime.tape.caches import take_over
from moepack_runtime.tape.kv_window import GrowingWindowLayer
from tests import families
from tests.packs import make_pack
from tests.runtime.tape.test_tape_window import assert_same, check_played, decode, few

__all__ = ["few"]
CHUNK = 5
IDS = families.tokens(batch=1, length=40)

pytestmark = pytest.mark.skipif(native.available() is None, reason=native.why_not())


@pytest.fixture(scope="module", params=[1, 2], ids=["one expert", "two"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama4: the last layer has no chunks, and queries that grow with the position."""
    folder = tmp_path_factory.mktemp("llama4")
    changes = {"num_hidden_layers": 4, "attention_chunk_size": CHUNK, "floor_scale": 3}
    model = families.random_model("llama4_text", num_experts_per_tok=request.param, **changes)
    assert model.config.layer_types == ["chunked_attention"] * 3 + ["full_attention"]
    families.save_checkpoint(model, folder / "source")
    make_pack(folder / "source", folder / "pack", attn_bits=4, expert_bits=3, quantizer="rtn")
    return folder / "pack"


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("prompt", [1, CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2])
def test_played_tokens_see_their_chunk(pack: Path, prompt: int) -> None:
    cache = check_played(pack, prompt)
    chunked = [layer for layer in cache.layers if isinstance(layer, GrowingWindowLayer)]
    assert len(chunked) == 3


def test_chunks_in_a_cache_that_keeps_everything(pack: Path) -> None:
    """A cache made without the model's config has no layers with windows."""
    cache = check_played(pack, 7, DynamicCache)
    assert not any(isinstance(layer, GrowingWindowLayer) for layer in cache.layers)


@pytest.mark.usefixtures("few")
def test_halves_and_a_second_prompt(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, with nothing else rounded; transformers' own code goes on over a boundary."""
    monkeypatch.setattr(forward, "take_over", lambda cache, half: take_over(cache, half=True))
    results = []
    for tape in (False, True):
        model = load_pack(pack, activations="float", tape=tape)
        with torch.no_grad():
            output, logits = model(input_ids=IDS[:, :6], use_cache=True), []
            for begin, end in ((6, 7), (7, 8), (8, 12), (12, 13), (13, 26), (26, 27), (27, 28)):
                cache = output.past_key_values
                output = model(input_ids=IDS[:, begin:end], past_key_values=cache, use_cache=True)
                logits.append(output.logits[:, -1])
        results.append(torch.cat(logits))
    assert model.moepack.tape.playing
    assert all(layer.buffers.half for layer in output.past_key_values.layers)
    assert (results[1] - results[0]).norm() < 1e-3 * results[0].norm()


def test_cut_back_into_the_chunk_before(pack: Path) -> None:
    results: list[Any] = []
    for tape in (False, True):
        model = load_pack(pack, activations="float", tape=tape)
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            for layer in cache.layers[:3]:
                layer.activate_past_recording()
            for begin, end, back in ((0, 6, 0), (6, 7, 0), (7, 13, -4), (9, 10, 0), (10, 11, 0)):
                output = model(input_ids=IDS[:, begin:end], past_key_values=cache, use_cache=True)
                cache.crop(back)
                results.append(output.logits[:, -1:])
    assert model.moepack.tape.playing
    assert_same(results[5:], results[:5])


@pytest.mark.usefixtures("few")
def test_generate_gives_the_same_tokens(pack: Path) -> None:
    keywords: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    wanted = load_pack(pack, activations="float", tape=False).generate(IDS[:, :8], **keywords)
    model = load_pack(pack, activations="float")
    assert torch.equal(model.generate(IDS[:, :8], **keywords), wanted)
    assert model.moepack.tape.playing


def test_without_a_mask_nothing_is_taken_for_granted(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_mask", lambda *_, **__: None)
    model = load_pack(pack)
    decode(model, 4)
    assert "a window of another kind" in model.moepack.tape.describe()
