"""Whether guessing pays: tokens with guesses are timed against tokens without.

A guess that comes true hides a read behind computing; a wrong one takes the disk's time, and every
guess takes the processor's. Which weighs more depends on model, disk, cache and text, so it is
measured, on the tokens that are decoded anyway.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

WARM_UP = 8
"""Tokens before the first trial: caches and clocks settle."""

TRIAL = 54
"""Tokens of a trial; with the warm-up they are fewer than 64."""

FIRST_HOLD, LONGEST_HOLD = 256, 1024
"""Tokens between a trial and the next; twice as many whenever the answer is the same again."""

FEWEST = 12
"""Times of either side that a verdict needs."""

_PATTERN = (True, False, False, True)  # a drift of speed is the same to both sides
_TRIM = 0.25  # share of the longest and of the shortest times that is left out


class State(enum.Enum):
    """What the tokens are being used for."""

    WARM_UP = "warm-up"
    TRIAL = "trial"
    HOLD = "hold"


@dataclass(frozen=True)
class Verdict:
    """What a trial has shown.

    Attributes:
        pays: Whether tokens with guesses took no longer.
        with_guesses: Seconds a token took with them, the mean of the middle ones.
        without: The same without them.
    """

    pays: bool
    with_guesses: float
    without: float


class PrefetchTrial:
    """Decides for each token whether to guess.

    Attributes:
        guessing: Whether the present token is guessed for.
        pays: The last trial's answer; true before the first.
        verdict: The last trial, or None before its end.
        stops: How often guessing was turned off.
        withheld: Tokens that were not guessed for.
    """

    def __init__(self) -> None:
        self.guessing, self.pays = True, True
        self.verdict: Verdict | None = None
        self.stops = self.withheld = 0
        self._state, self._left, self._hold = State.WARM_UP, WARM_UP, FIRST_HOLD
        self._times: tuple[list[float], list[float]] = ([], [])  # without, with

    def token(self) -> bool:
        """A token starts.

        Returns:
            Whether to guess for it.
        """
        if self._left == 0:
            self._next_state()
        self._left -= 1
        self.guessing = (
            _PATTERN[self._left % len(_PATTERN)] if self._state is State.TRIAL else self.pays
        )
        self.withheld += not self.guessing
        return self.guessing

    def took(self, seconds: float) -> None:
        """How long the token that was started last has taken; not told of every one."""
        if self._state is State.TRIAL:
            self._times[self.guessing].append(seconds)

    def interrupted(self) -> None:
        """A prompt has come.

        Another text may differ, so the next trial comes at once unless the last one was a short
        while ago.
        """
        if self._state is State.HOLD and self._hold - self._left >= FIRST_HOLD:
            self._left = 0

    def _next_state(self) -> None:
        if self._state is not State.TRIAL:
            self._state, self._left = State.TRIAL, TRIAL
            self._times[0].clear()
            self._times[1].clear()
            return
        if min(map(len, self._times)) < FEWEST:  # too few were timed to tell
            self._left = TRIAL
            return
        without, with_guesses = map(_middle, self._times)
        verdict = Verdict(with_guesses <= without, with_guesses, without)
        same = self.verdict is not None and verdict.pays == self.verdict.pays
        self._hold = min(2 * self._hold, LONGEST_HOLD) if same else FIRST_HOLD
        self.stops += self.pays and not verdict.pays
        self.verdict, self.pays = verdict, verdict.pays
        self._state, self._left = State.HOLD, self._hold


def _middle(times: list[float]) -> float:
    """The mean without the longest and shortest times; 0 of none."""
    cut = int(len(times) * _TRIM)
    middle = sorted(times)[cut : len(times) - cut]
    return sum(middle) / len(middle) if middle else 0.0
