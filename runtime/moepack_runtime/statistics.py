"""What happened while a model ran: hits, misses, bytes, guesses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields


@dataclass
class LayerGuesses:
    """How well the experts of one layer were guessed.

    Attributes:
        guessed: Experts that were guessed.
        needed: Experts that were then needed.
        right: Experts that were both.
        rounds: How often a guess was made.
    """

    guessed: int = 0
    needed: int = 0
    right: int = 0
    rounds: int = 0


@dataclass
class Statistics:
    """Counters of one loaded model; reset them with :meth:`reset`.

    Attributes:
        hits: Demanded experts that were resident, or being read already by a right guess.
        misses: Demanded experts that had to be read on demand.
        bytes_read: Bytes of records read from files, guesses included.
        speculative_reads: Records read on a guess.
        speculative_used: Of these, records that were then demanded.
        bytes_copied: Bytes of records copied to a GPU, guesses included.
        computed_on_cpu: Demanded experts that the CPU computed for the GPU.
        prefetch_stops: How often guessing turned itself off because tokens were slower with it.
        unguessed_tokens: Decoded tokens for which nothing was guessed, for that reason or to
            measure it.
        nudged: Choices of a router that ``cache_bias`` has changed.
        tokens: Tokens that went through the first MoE layer.
        layers: Guesses by layer.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    speculative_reads: int = 0
    speculative_used: int = 0
    bytes_copied: int = 0
    computed_on_cpu: int = 0
    prefetch_stops: int = 0
    unguessed_tokens: int = 0
    nudged: int = 0
    tokens: int = 0
    layers: dict[int, LayerGuesses] = field(default_factory=dict)

    def reset(self) -> None:
        """Set every counter to zero."""
        self.__init__()  # type: ignore[misc]

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count nothing inside the block."""
        before = copy.deepcopy(vars(self))
        try:
            yield
        finally:
            vars(self).update(before)

    def add(self, other: Statistics) -> None:
        """Add the counters of another run."""
        for counter in fields(self):
            if counter.name != "layers":
                total = getattr(self, counter.name) + getattr(other, counter.name)
                setattr(self, counter.name, total)
        for layer, guesses in other.layers.items():
            mine = self.layers.setdefault(layer, LayerGuesses())
            mine.guessed += guesses.guessed
            mine.needed += guesses.needed
            mine.right += guesses.right
            mine.rounds += guesses.rounds

    @property
    def hit_ratio(self) -> float | None:
        """Hits over demands, or None before the first demand."""
        demands = self.hits + self.misses
        return self.hits / demands if demands else None

    @property
    def recall(self) -> float | None:
        """Share of the needed experts that were guessed, or None without guesses."""
        needed = sum(layer.needed for layer in self.layers.values())
        right = sum(layer.right for layer in self.layers.values())
        return right / needed if needed else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes read per token, or None before the first token."""
        return self.bytes_read / self.tokens if self.tokens else None
