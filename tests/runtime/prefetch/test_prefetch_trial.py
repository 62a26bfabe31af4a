"""Prefetch measures itself: on a clock of the test's own, and on a simulated disk."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moepack_runtime.cache import slot_cache
from moepack_runtime.cache.slot_cache import SlotCache
from moepack_runtime.loading import load_pack
from moepack_runtime.prefetch.early_routers import EarlyRouters
from moepack_runtime.prefetch.trial import FIRST_HOLD, TRIAL, WARM_UP, PrefetchTrial
from tests import families
from tests.runtime.stepped_io import SimulatedDisk

WITHIN = 64
"""Tokens within which prefetch that costs speed must be off."""


def run(trial: PrefetchTrial, tokens: int, seconds: Callable[[bool], float]) -> None:
    for _ in range(tokens):
        trial.took(seconds(trial.token()))


def test_off_when_it_costs_and_on_when_it_pays() -> None:
    assert WARM_UP + TRIAL < WITHIN
    for cost, pays in ((1.02, False), (0.98, True), (1.0, True)):
        trial = PrefetchTrial()
        run(trial, WITHIN, lambda guessing, cost=cost: cost if guessing else 1.0)
        assert trial.pays == pays
        assert trial.guessing == pays
        assert trial.stops == (not pays)
        assert trial.verdict is not None
        assert trial.verdict.with_guesses == pytest.approx(cost)
        assert trial.verdict.without == pytest.approx(1)


@pytest.mark.parametrize(("effect", "least"), [(1.1, 0.85), (1.25, 0.97), (0.9, 0.85), (0.8, 0.97)])
def test_noise_seldom_misleads(effect: float, least: float) -> None:
    """Times spread by a fifth, and every twentieth token takes two to eight times as long."""
    right = 0
    for seed in range(200):
        generator = random.Random(seed)

        def seconds(guessing: bool, generator: random.Random = generator) -> float:
            outlier = generator.uniform(2, 8) if generator.random() < 0.05 else 1
            return (effect if guessing else 1) * generator.lognormvariate(0, 0.2) * outlier

        trial = PrefetchTrial()
        run(trial, WITHIN, seconds)
        right += trial.pays == (effect < 1)
    assert right >= least * 200


def test_a_slowing_machine_is_not_the_guesses_fault() -> None:
    """Every token takes longer than the one before, far more than the guesses save."""
    trial = PrefetchTrial()
    slower = iter(range(1000))
    run(trial, WITHIN, lambda guessing: 1 + next(slower) / 50 - (0.02 if guessing else 0))
    assert trial.pays


def test_it_is_tried_again_and_less_often() -> None:
    trial = PrefetchTrial()
    states = []
    for _ in range(3000):
        states.append(trial.token())
        trial.took(2.0 if states[-1] else 1.0)
    off = [i for i, guessing in enumerate(states) if not guessing]
    tried = [i for i in range(WITHIN, 3000) if states[i] and not states[i - 1]]
    assert trial.stops == 1
    assert trial.withheld == len(off)
    # After 256 tokens, then after 512, then after 1024.
    trials = [t for i, t in enumerate(tried) if i == 0 or t - tried[i - 1] > TRIAL]
    gaps = [b - a - TRIAL for a, b in pairwise(trials)]
    assert gaps == [2 * FIRST_HOLD, 4 * FIRST_HOLD]


def test_it_comes_back_when_it_pays_again() -> None:
    trial = PrefetchTrial()
    run(trial, WITHIN, lambda guessing: 2.0 if guessing else 1.0)
    assert not trial.pays
    run(trial, FIRST_HOLD + TRIAL, lambda guessing: 1.0 if guessing else 2.0)
    assert trial.pays
    assert trial.stops == 1


def test_a_new_text_is_measured_soon() -> None:
    trial = PrefetchTrial()
    run(trial, WITHIN + FIRST_HOLD + TRIAL, lambda guessing: 1.0 if guessing else 2.0)
    run(trial, FIRST_HOLD + 10, lambda guessing: 1.0)
    trial.interrupted()
    run(trial, WITHIN, lambda guessing: 2.0 if guessing else 1.0)
    assert not trial.pays


def test_tokens_that_were_not_timed() -> None:
    trial = PrefetchTrial()
    for i in range(400):
        guessing = trial.token()
        if i % 5:
            trial.took(1.0 if guessing else 1.1)
    assert trial.pays
    # Where nothing is ever timed, nothing is decided.
    trial = PrefetchTrial()
    for _ in range(400):
        trial.token()
    assert trial.verdict is None
    assert trial.pays


def test_what_happens_between_tokens_is_not_theirs(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller who takes his time over every guessed token does not turn guessing off."""
    now = 0.0
    model = load(pack)
    speculator = model.moepack.speculator
    speculator._clock = lambda: now
    model.model.layers[1].register_forward_pre_hook(lambda *_: pass_time(1.0))

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    ids = families.tokens(batch=1, length=1)
    with torch.no_grad():
        model(ids, use_cache=False)  # shows the routers
        for _ in range(WITHIN + 1):
            model(ids, use_cache=False)
            pass_time(5.0 if speculator._trial.guessing else 0.0)
    verdict = speculator._trial.verdict
    assert verdict is not None
    assert (verdict.pays, verdict.with_guesses, verdict.without) == (True, 1.0, 1.0)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimulatedDisk:
    """What packs that are loaded from now on read from: 3 ms a record."""
    simulated = SimulatedDisk(0.003)
    monkeypatch.setattr(slot_cache, "IoPool", lambda threads: simulated)
    return simulated


def load_timed(pack: Path, disk: SimulatedDisk, compute_s: float) -> Any:
    """A pack on the disk's clock, whose attentions take so long."""
    model = load(pack)
    model.moepack.speculator._clock = lambda: disk.now
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: disk.pass_time(compute_s))
    return model


def decode(model: Any, tokens: int) -> None:
    ids = families.tokens(batch=1, length=tokens)
    with torch.no_grad():
        model(ids[:, :6], use_cache=False)  # a prompt; it shows the routers
        cache = None
        for token in ids[0]:
            cache = model(token[None, None], past_key_values=cache, use_cache=True).past_key_values


def guess_by(
    patch: pytest.MonkeyPatch, choose: Callable[[Any, int, int, Tensor], Sequence[int]]
) -> None:
    """Replace what the early routers say, where they can be asked, one layer ahead."""
    real = EarlyRouters.ask

    def ask(self: Any, layer: int, target: int, *, ranked: bool = False) -> Tensor | None:
        indices = real(self, layer, target, ranked=ranked)
        return None if indices is None else torch.tensor([choose(self, layer, target, indices)])

    patch.setattr(EarlyRouters, "ask", ask)


@pytest.fixture(autouse=True)
def one_layer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotCache, "lookahead", 1)


def load(pack: Path) -> Any:
    """A pack of which half fits in memory, with one thread that reads."""
    return load_pack(pack, io="buffered", slots=12, io_threads=1, policy="lru")


def test_wrong_guesses_turn_themselves_off(
    pack: Path,
    disk: SimulatedDisk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Demands wait behind reads of records that nobody wants, and for the guessing itself."""
    model = load_timed(pack, disk, compute_s=0)
    # Half right, so that the rule about recall does not end it; half wrong and not resident.
    resident = model.moepack.residency.resident

    def choose(_: Any, __: int, target: int, indices: Tensor) -> Sequence[int]:
        disk.pass_time(0.005)
        at_hand, right = resident(target), indices[0].tolist()
        return [*[e for e in range(8) if e not in at_hand and e not in right][:3], *right]

    guess_by(monkeypatch, choose)
    with caplog.at_level(logging.INFO):
        decode(model, WITHIN)
    speculator, stats = model.moepack.speculator, model.moepack.stats
    assert not speculator.pays
    assert stats.prefetch_stops == 1
    assert stats.unguessed_tokens >= TRIAL // 2
    assert speculator.describe() == "prefetch turned itself off: tokens were slower with it"
    assert "prefetch turns itself off: a token takes" in caplog.text
    before = stats.speculative_reads
    with torch.no_grad():
        model(families.tokens(batch=1, length=1), use_cache=False)
    assert stats.speculative_reads == before


def test_right_guesses_stay_on(
    pack: Path,
    disk: SimulatedDisk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A read takes as long as an attention: what is guessed in time is free."""
    ids = families.tokens(batch=1, length=WITHIN)
    oracle = load_pack(pack, io="mmap", prefetch=False)
    used: list[list[list[int]]] = [[] for _ in oracle.moepack.layers]
    for compute in oracle.moepack.layers:
        compute.watcher = lambda layer, index, _: used[layer].append(index[0].tolist())
    decode(oracle, WITHIN)

    model = load_timed(pack, disk, compute_s=0.006)

    def choose(_: Any, layer: int, target: int, indices: Tensor) -> Sequence[int]:
        return used[target][len(seen)]  # the prompt is the first of those used

    seen: list[int] = []
    model.moepack.layers[0].watcher = lambda layer, index, _: (
        seen.append(1) if len(index) == 1 else None
    )
    guess_by(monkeypatch, choose)
    with caplog.at_level(logging.INFO):
        decode(model, len(ids[0]))
    speculator = model.moepack.speculator
    assert speculator.pays
    assert speculator._trial.verdict.with_guesses < speculator._trial.verdict.without
    assert model.moepack.stats.prefetch_stops == 0
    assert model.moepack.stats.recall == 1
    assert "prefetch stays on: a token takes" in caplog.text
