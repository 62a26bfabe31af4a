"""Sparse attention: tokens are played while its indexers pick all of those before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from moepack_runtime.loading import load_pack
from moepack_runtime.prefix_reuse import PrefixReuse
from moepack_runtime.tape.kv_indexed import GrowingIndexedLayer, own_indexer
from tests import families
from tests.packs import make_family_pack
from tests.runtime.tape.test_tape import IDS, assert_same, decode

PICKED = 6
"""``index_topk`` of the tiny configs."""


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_pack("deepseek_v32", tmp_path_factory.mktemp("indexed"))


def positions_played(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where tokens are played from now on, those that are tried while recording among them."""
    tape, found = model.moepack.tape, []
    play = tape._play

    def watched(player: Any, token: int, position: int, layers: Any) -> torch.Tensor:
        found.append(position)
        return play(player, token, position, layers)

    monkeypatch.setattr(tape, "_play", watched)
    return found


@pytest.mark.parametrize(
    ("family", "limit"),
    [("deepseek_v32", PICKED), ("glm_moe_dsa", PICKED), ("minimax_m3_vl_text", 8)],
)
def test_tokens_are_played_up_to_the_limit(
    family: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shares an indexer's choice between layers, the third picks two blocks of four."""
    folder = make_family_pack(family, tmp_path)
    wanted = decode(load_pack(folder, activations="float", tape=False), IDS, 3)
    model = load_pack(folder, activations="float")
    assert_same(decode(model, IDS, 3), wanted)  # records
    played = positions_played(model, monkeypatch)
    assert_same(decode(model, IDS, 3), wanted)
    assert played == list(range(3, limit))


def test_a_text_beyond_the_limit_is_not_recorded(pack: Path) -> None:
    model = load_pack(pack, activations="float")
    wanted = decode(load_pack(pack, activations="float", tape=False), IDS, PICKED - 1)
    assert_same(decode(model, IDS, PICKED - 1), wanted)
    assert not model.moepack.tape.playing
    assert model.moepack.tape.refusal is None
    decode(model, IDS, 3)
    assert model.moepack.tape.playing


def test_a_config_that_promises_too_much_is_not_believed(pack: Path) -> None:
    model = load_pack(pack, activations="float")
    model.config.index_topk = 100
    wanted = decode(load_pack(pack, activations="float", tape=False), IDS, 9)
    assert_same(decode(model, IDS, 9), wanted)
    assert model.moepack.tape.refusal == "an indexer has not picked all tokens"


def test_beams_and_what_is_taken_back(pack: Path) -> None:
    keywords: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    plain = load_pack(pack, activations="float", tape=False)
    model = load_pack(pack, activations="float")
    decode(model, IDS, 3)
    ids = IDS[:, :3]
    assert torch.equal(model.generate(ids, **keywords), plain.generate(ids, **keywords))
    logits = []
    for one in (plain, model):
        with torch.no_grad():
            cache = one(input_ids=ids, use_cache=True).past_key_values
            for i in (3, 4):
                one(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache.crop(-1)
            assert cache.layers[0].indexer_keys.shape[1] == cache.get_seq_length() == 4
            for i in range(4, 12):
                output = one(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
                logits.append(output.logits)
            cache.reset()
            assert cache.layers[0].indexer_keys is None
    assert_same(logits[8:], logits[:8])


def test_a_layer_of_a_model_s_own(tmp_path: Path) -> None:
    """Its keys go with the others: cut back, beside each other in beams, and in a conversation."""
    folder = make_family_pack("minimax_m3_vl_text", tmp_path)
    plain = load_pack(folder, activations="float", tape=False)
    model = load_pack(folder, activations="float")
    decode(model, IDS, 3)
    keywords: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = IDS[:, :3]
    for more in ({"num_beams": 3}, {}):
        wanted = plain.generate(ids, **keywords, **more)
        assert torch.equal(model.generate(ids, **keywords, **more), wanted)
    logits = []
    for one in (plain, model):
        with torch.no_grad():
            cache = one(input_ids=ids, use_cache=True).past_key_values
            one(input_ids=IDS[:, 3:4], past_key_values=cache, use_cache=True)
            one(input_ids=IDS[:, 4:5], past_key_values=cache, use_cache=True)
            cache.crop(-1)
            assert cache.layers[1].idx_keys.shape[2] == cache.get_seq_length() == 4
            for i in range(4, 12):
                output = one(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
                logits.append(output.logits)
            cache.reset()
            assert cache.layers[1].idx_keys is None
    assert_same(logits[8:], logits[:8])
    assert isinstance(cache.layers[1], GrowingIndexedLayer)
    reuse = PrefixReuse(model)
    text = reuse.generate(ids, **keywords)
    again = reuse.generate(torch.cat([text, IDS[:, :2]], dim=1), **keywords)
    assert reuse.reused == text.shape[1] - 1
    assert again.shape[1] == text.shape[1] + 10


class Appends(DynamicLayer):
    """A key a token beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: torch.Tensor | None = None

    def update_kept(self, new: torch.Tensor) -> torch.Tensor:
        self.kept = new if self.kept is None else torch.cat([self.kept, new], dim=-2)
        return self.kept


class Counts(Appends):
    """Derived from another one."""


class Sees(DynamicLayer):
    """Fewer tokens than there are."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: torch.Tensor | None = None

    def update_kept(self, new: torch.Tensor) -> torch.Tensor:
        return new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


def test_whose_keys_are_known() -> None:
    assert own_indexer(Appends) == ("kept", "update_kept")
    for kind in (Counts, Sees, DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer):
        assert own_indexer(kind) is None


def test_what_an_indexer_computes_is_left_out(pack: Path) -> None:
    """Its keys are appended; no step depends on how many there are."""
    model = load_pack(pack, activations="float")
    decode(model, IDS, 3)
    player = model.moepack.tape._player
    layers = len(families.config_of("deepseek_v32").mlp_layer_types)
    assert len(player._kv) == 2 * layers
    assert player.native_share > 0.9
