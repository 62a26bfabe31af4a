"""Guessing the next layer's experts: how, how well, and when it stops."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moepack_runtime.loading import load_pack
from moepack_runtime.prefetch import guesses
from moepack_runtime.statistics import LayerGuesses, Statistics
from tests import families


class Watching:
    """Notes guesses and demands on their way to a residency."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.notes: list[tuple[str, int, list[int]]] = []

    def demand(self, layer: int, experts: Sequence[int]) -> None:
        self.notes.append(("demand", layer, list(experts)))
        self.inner.demand(layer, experts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        self.notes.append(("fetch", layer, list(experts)))
        found: Iterator[tuple[int, Tensor]] = self.inner.fetch(layer, experts)
        return found

    def fetch_ready(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        self.notes.append(("fetch", layer, list(experts)))
        found: Iterator[dict[int, Tensor]] = self.inner.fetch_ready(layer, experts)
        return found

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        self.notes.append(("prefetch", layer, list(experts)))
        begun: list[int] = self.inner.prefetch(layer, experts)
        return begun

    def close(self) -> None:
        self.inner.close()


ONE_AHEAD = [
    ("demand", 0),
    ("prefetch", 1),
    ("fetch", 0),
    ("demand", 1),
    ("prefetch", 2),
    ("fetch", 1),
    ("demand", 2),
    ("fetch", 2),
]
"""What a token of three layers asks of the residency where the next layer is guessed for."""


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Residencies note what they are asked."""
    from moepack_runtime.plugin import quantizer

    real = quantizer.open_residency
    monkeypatch.setattr(quantizer, "open_residency", lambda *args: Watching(real(*args)))


@pytest.fixture
def watched(pack: Path, watching: None) -> Any:
    """A model whose residency notes what it is asked."""
    return load_pack(pack, io="buffered", engine="reference")  # whose tokens are not played


def test_layers_are_guessed_before_they_are_needed(watched: Any) -> None:
    ids = families.tokens(batch=1, length=5)
    watched.generate(ids, max_new_tokens=3, do_sample=False)
    notes = [note[:2] for note in watched.moepack.residency.notes]
    # The prompt finds the routers; each later token guesses layers 1 and 2 one layer ahead, after
    # it has begun to read what it needs now.
    assert notes[:6] == [(kind, i) for i in range(3) for kind in ("demand", "fetch")]
    assert notes[6:] == ONE_AHEAD * 2


@pytest.fixture
def played(pack: Path, watching: None) -> Any:
    """The same with tokens that are played."""
    return load_pack(pack, io="buffered", slots=9)


def test_played_tokens_are_guessed_two_layers_ahead(played: Any) -> None:
    ids = families.tokens(batch=1, length=5)
    played.generate(ids, max_new_tokens=4, do_sample=False)
    assert played.moepack.tape.playing
    token = [
        ("demand", 0),
        ("prefetch", 1),
        ("prefetch", 2),
        ("fetch", 0),
        ("demand", 1),
        ("prefetch", 2),
        ("fetch", 1),
        ("demand", 2),
        ("fetch", 2),
    ]
    notes = [note[:2] for note in played.moepack.residency.notes]
    assert notes[-2 * len(token) :] == token * 2


def test_guesses_two_layers_ahead_that_are_wrong_stop(
    played: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guesses, "TRIAL_ROUNDS", 4)
    monkeypatch.setattr(guesses, "FAR_PRECISION", 1.1)
    ids = families.tokens(batch=1, length=5)
    with caplog.at_level(logging.INFO, guesses.__name__):
        # Rounds count in which something is read; a greedy text may go in a circle.
        torch.manual_seed(0)
        played.generate(ids, max_new_tokens=32, do_sample=True)
    notes = [note[:2] for note in played.moepack.residency.notes]
    assert notes[-len(ONE_AHEAD) :] == ONE_AHEAD
    assert caplog.messages == ["prefetch two layers ahead stops for layers 2: it guesses badly"]


def test_guesses_are_counted(watched: Any) -> None:
    ids = families.tokens(batch=1, length=5)
    watched.generate(ids, max_new_tokens=9, do_sample=False)
    stats, notes = watched.moepack.stats, watched.moepack.residency.notes
    for layer in (1, 2):
        guesses = [set(e) for kind, at, e in notes if (kind, at) == ("prefetch", layer)]
        needed = [set(e) for kind, at, e in notes if (kind, at) == ("fetch", layer)][1:]
        right = sum(len(g & n) for g, n in zip(guesses, needed, strict=True))
        assert stats.layers[layer] == LayerGuesses(
            guessed=sum(map(len, guesses)),
            needed=sum(map(len, needed)),
            right=right,
            rounds=len(guesses),
        )
    assert 0 not in stats.layers
    assert stats.tokens == 5 + 8


def test_long_passes_are_not_guessed(watched: Any) -> None:
    short = families.tokens(batch=1, length=guesses.MAX_TOKENS)
    long = families.tokens(batch=1, length=guesses.MAX_TOKENS + 1)
    watched(long)  # finds the routers
    watched.moepack.residency.notes.clear()
    watched(long)
    assert {kind for kind, *_ in watched.moepack.residency.notes} == {"demand", "fetch"}
    watched(short)
    assert {kind for kind, *_ in watched.moepack.residency.notes} == {"demand", "fetch", "prefetch"}


def test_guesses_that_are_wrong_stop(
    watched: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guesses, "TRIAL_ROUNDS", 4)
    monkeypatch.setattr(guesses, "MIN_RECALL", 1.1)
    ids = families.tokens(batch=1, length=5)
    with caplog.at_level(logging.INFO, guesses.__name__):
        watched.generate(ids, max_new_tokens=12, do_sample=False)
    stats = watched.moepack.stats
    assert {layer: guesses.rounds for layer, guesses in stats.layers.items()} == {1: 4, 2: 4}
    assert caplog.messages == ["prefetch one layer ahead stops for layers 1, 2: it guesses badly"]


def test_router_weights_decide_the_guess(watched: Any) -> None:
    """The guess is what layer i+1's router says of the residual that layer i's block reads."""
    ids = families.tokens(batch=1, length=5)
    watched(ids)
    watched.moepack.residency.notes.clear()
    seen: dict[int, Tensor] = {}
    for layer, block in enumerate(watched.model.layers):
        block.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, layer=layer: seen.__setitem__(layer, args[0])
        )
    watched(ids[:, :1])
    for layer in (0, 1):
        block = watched.model.layers[layer + 1]
        normed = block.post_attention_layernorm.forward(seen[layer])
        _, _, indices = block.mlp.gate.forward(normed.view(-1, normed.shape[-1]))
        (guess,) = [
            e for kind, at, e in watched.moepack.residency.notes
            if (kind, at) == ("prefetch", layer + 1)
        ]  # fmt: skip
        assert guess == indices[0].tolist()


def test_no_gradient_and_no_change(pack: Path) -> None:
    """Asking routers early leaves the results alone, to the last bit."""
    ids = families.tokens(batch=2, length=4)
    with torch.no_grad():
        plain = load_pack(pack, prefetch=False)
        guessing = load_pack(pack, prefetch=True)
        for _ in range(3):
            assert torch.equal(plain(ids[:, :2]).logits, guessing(ids[:, :2]).logits)


def test_sum_of_statistics() -> None:
    one = Statistics(hits=3, misses=1, bytes_read=100, tokens=2)
    one.layers[1] = LayerGuesses(4, 2, 1, 2)
    total = Statistics()
    assert (total.hit_ratio, total.recall, total.bytes_per_token) == (None, None, None)
    total.add(one)
    total.add(one)
    assert (total.hits, total.misses, total.tokens) == (6, 2, 4)
    assert (total.hit_ratio, total.recall, total.bytes_per_token) == (0.75, 0.5, 50)
    assert total.layers[1] == LayerGuesses(8, 4, 2, 4)
    assert one.layers[1] == LayerGuesses(4, 2, 1, 2)
    total.reset()
    assert total == Statistics()
