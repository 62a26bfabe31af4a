"""Texts that begin as the last one did: what is computed again, and that tokens are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from moepack_runtime.loading import load_pack
from moepack_runtime.prefix_reuse import PrefixReuse
from tests import families
from tests.packs import FamilyPacks

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = [
    "olmoe",
    "gpt_oss",
    "qwen3_next",
    "lfm2_moe",
    "jamba",
    "deepseek_v2",
    "llama4_text",
    "zaya",
]
HAVE_STATES = ("qwen3_next", "lfm2_moe", "zaya")


class Texts:
    """A pack's texts, and how many tokens passes of transformers' own have computed."""

    def __init__(self, pack: Path, **options: Any) -> None:
        # In exact numbers: with rounded ones a random model's tokens are a matter of luck.
        self.model = load_pack(pack, threads=1, activations="float", **options)
        self.reuse = PrefixReuse(self.model)
        self.computed = 0
        self.model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, _: Any, inputs: tuple[Tensor, ...], __: Any) -> None:
        self.computed += inputs[0].numel()

    def write(self, ids: Tensor, new: int = 6, **more: Any) -> Tensor:
        self.computed = 0
        return self.reuse.generate(ids, max_new_tokens=new, **GREEDY, **more)

    def afresh(self, ids: Tensor, new: int = 6) -> Tensor:
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new}
        with torch.no_grad():
            tokens: Tensor = self.model.generate(ids, **options, **GREEDY)
        return tokens


def some(length: int, seed: int = 1) -> Tensor:
    return families.tokens(batch=1, length=length, seed=seed)


@pytest.mark.parametrize("record", [True, False], ids=["recorded", "unrecorded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_goes_on(family_packs: FamilyPacks, family: str, record: bool) -> None:
    """Three turns of a conversation."""
    texts = Texts(family_packs(family), tape=record)
    text = some(12)
    for turn in range(3):
        written = texts.write(text)
        assert torch.equal(written, texts.afresh(text))
        # All but the last token has been computed, except where states cannot be gone on from.
        begun_anew = turn == 0 or family == "jamba"
        assert texts.reuse.reused == (0 if begun_anew else text.shape[1] - 5)
        text = torch.cat([written, some(4, seed=turn + 2)], dim=1)


@pytest.mark.parametrize("record", [True, False], ids=["recorded", "unrecorded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_differs(family_packs: FamilyPacks, family: str, record: bool) -> None:
    """Another question after the same beginning; then the same question once more."""
    texts = Texts(family_packs(family), tape=record)
    beginning = some(12)
    first, second = (torch.cat([beginning, some(7, seed)], dim=1) for seed in (2, 3))
    texts.write(first)
    for text, common in ((second, 12), (second, 18)):
        assert torch.equal(texts.write(text), texts.afresh(text))
        states = family in (*HAVE_STATES, "jamba")
        assert texts.reuse.reused == (0 if states else common)


def test_what_is_computed(family_packs: FamilyPacks) -> None:
    texts = Texts(family_packs("olmoe"), tape=False)
    text = some(12)
    text = texts.write(text)
    assert texts.computed == 12 + 5
    text = texts.write(torch.cat([text, some(4)], dim=1))
    assert texts.computed == 1 + 4 + 5
    texts.write(text[:, :20], new=1)  # a part of it: its last token
    assert (texts.computed, texts.reuse.reused) == (1, 19)
    texts.write(some(12, seed=9), new=1)
    assert (texts.computed, texts.reuse.reused) == (12, 0)


def test_a_window_has_left_tokens_behind(family_packs: FamilyPacks) -> None:
    texts = Texts(family_packs("gpt_oss"), tape=False)
    window = texts.model.config.sliding_window
    text = some(window + 20)
    texts.write(text)
    other = torch.cat([text[:, :-10], some(10, seed=5)], dim=1)
    assert torch.equal(texts.write(other), texts.afresh(other))
    assert texts.reuse.reused == 0


class Stopped(Exception):
    pass


def test_stopped_at_a_token(family_packs: FamilyPacks) -> None:
    """What was computed until then stays."""
    texts = Texts(family_packs("olmoe"))
    text = some(12)
    wanted = texts.afresh(text, new=12)
    told: list[int] = []

    class Stream:
        def put(self, value: Tensor) -> None:
            told.append(value.numel())
            if len(told) == 5:
                raise Stopped

        def end(self) -> None:
            pass

    with pytest.raises(Stopped):
        texts.write(text, new=12, streamer=Stream())
    assert torch.equal(texts.write(text, new=12), wanted)
    assert texts.reuse.reused == 11
    told.clear()
    with pytest.raises(Stopped):
        texts.write(text, new=12, streamer=Stream())
    assert torch.equal(texts.write(wanted[:, :20]), texts.afresh(wanted[:, :20]))
    assert texts.reuse.reused == 15


def test_stopped_in_a_pass(family_packs: FamilyPacks) -> None:
    """Layers may hold different numbers of tokens then: nothing is kept."""
    texts = Texts(family_packs("olmoe"))
    text = some(12)
    calls: list[None] = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        texts.write(text, check=check)
    assert len(calls) == 3  # the prompt is told, and two of three layers ask
    assert torch.equal(texts.write(text), texts.afresh(text))
    assert texts.reuse.reused == 0
    assert len(calls) == 3  # the layers no longer ask


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=lambda options: next(iter(options)),
)
def test_other_ways_to_generate(family_packs: FamilyPacks, options: dict[str, Any]) -> None:
    """They pass by, and what was kept is let go."""
    texts = Texts(family_packs("olmoe"))
    text = some(12)
    texts.write(text)
    texts.write(text, **options)
    assert texts.reuse.reused == 0
    config = GenerationConfig(max_new_tokens=6, **GREEDY)
    got = texts.reuse.generate(text, generation_config=config)
    assert torch.equal(got, texts.afresh(text))
    assert texts.reuse.reused == 0
