"""Torch's threads while ``generate()`` plays tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from moepack_runtime.kernels import native
from moepack_runtime.loading import load_pack
from tests import families
from tests.packs import FamilyPacks

IDS = families.tokens(batch=1, length=6)

pytestmark = pytest.mark.skipif(native.available() is None, reason=native.why_not())


@pytest.fixture(scope="module")
def pack(family_packs: FamilyPacks) -> Path:
    return family_packs("olmoe")


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Seen(BaseStreamer):
    """Torch's threads and the engine's at every token; raises at one of them."""

    def __init__(self, model: Any, fails_at: int = -1) -> None:
        self.model, self.fails_at = model, fails_at
        self.threads: list[tuple[int, int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.threads.append((torch.get_num_threads(), self.model.moepack.engine.threads))
        if len(self.threads) == self.fails_at:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


def generate(model: Any, streamer: Seen, **more: Any) -> torch.Tensor:
    ids: torch.Tensor = model.generate(
        IDS, streamer=streamer, max_new_tokens=6, min_new_tokens=6, do_sample=False, **more
    )
    return ids


def test_one_thread_while_tokens_are_played(pack: Path, three_threads: None) -> None:
    model = load_pack(pack)
    generate(model, Seen(model))
    seen = Seen(model)
    generate(model, seen)
    # The prompt, and the token after it.
    assert seen.threads[:2] == [(3, 3), (3, 3)]
    assert set(seen.threads[2:]) == {(1, 3)}
    assert torch.get_num_threads() == model.moepack.engine.threads == 3


def test_a_failure_gives_threads_back(pack: Path, three_threads: None) -> None:
    model = load_pack(pack)
    generate(model, Seen(model))
    with pytest.raises(KeyboardInterrupt):
        generate(model, Seen(model, fails_at=4))
    assert torch.get_num_threads() == model.moepack.engine.threads == 3


def test_nothing_changes_outside_generate(pack: Path, three_threads: None) -> None:
    model = load_pack(pack)
    cache = model(IDS, use_cache=True).past_key_values
    for _ in range(3):
        model(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True)
    assert model.moepack.tape.playing
    assert torch.get_num_threads() == 3


def test_what_is_not_played_keeps_its_threads(pack: Path, three_threads: None) -> None:
    model = load_pack(pack, tape=False)
    seen = Seen(model)
    generate(model, seen)
    assert {threads for threads, _ in seen.threads} == {3}
    model = load_pack(pack)
    generate(model, Seen(model))
    seen = Seen(model)
    generate(model, seen, use_cache=False)
    assert {threads for threads, _ in seen.threads} == {3}
