"""Decoding through MoE layers of a real shape, with records that a cache cannot hold.

There is no checkpoint: records are random bytes, and what routers pick is drawn so that a token's
experts resemble the previous token's, and guesses are right as often as the paper found. What is
measured is everything between the router and the sum of the experts; attention is a set of packed
4-bit Linears of the same width.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moepack_formats import checksum
from moepack_formats.layer import RecordLocation
from moepack_formats.record import plan_record
from moepack_formats.schemes import SCHEMES
from moepack_runtime.gpu.compute import DeviceCompute
from moepack_runtime.gpu.device_cache import CacheOptions, DeviceCache
from moepack_runtime.gpu.host_source import HostSource
from moepack_runtime.gpu.link import Link
from moepack_runtime.gpu.resident import ResidentRecords
from moepack_runtime.gpu.whole_layers import WholeLayers
from moepack_runtime.kernels import Engine
from moepack_runtime.statistics import Statistics
from tests.bench.gpu.kernels import Shape, finite_bytes
from tests.runtime.kernels.matrices import ACTIVATIONS, FakeAdapter

STAYS, RECALL = 0.4, 0.85
"""How often a choice is one of the previous token's; how often a guess is right."""


@dataclass(frozen=True)
class Workload:
    """What is decoded.

    Attributes:
        shape: Of an expert.
        scheme: Of its matrices.
        layers: MoE layers.
        experts: Of a layer.
        tokens: Decoded.
        attention: Whether packed Linears stand for attention.
    """

    shape: Shape
    scheme: str
    layers: int
    experts: int
    tokens: int
    attention: bool = True


@dataclass(frozen=True)
class Result:
    """What a setting gave."""

    name: str
    tokens_per_s: float
    seconds: float
    hit_ratio: float | None
    recall: float | None
    bytes_copied: int
    waits_per_layer: float
    checksum: float


class NoHost:
    """Host memory with nothing in it."""

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for records in self.fetch_ready(layer, experts):
            yield from records.items()

    def fetch_ready(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        yield {}

    def holds(self, layer: int, expert: int) -> bool:
        return True

    def address(self, layer: int, expert: int) -> None:
        return None

    lookahead = 1

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[int]:
        return []

    def describe(self) -> str:
        return "random records in memory"

    def close(self) -> None:
        return None


class _HostRecords(NoHost):
    """All records in (pinned) host memory."""

    def __init__(self, load: Workload, nbytes: int, pinned: bool) -> None:
        torch.manual_seed(0)
        self._nbytes, self._experts = nbytes, load.experts
        count = load.layers * load.experts
        self._memory = torch.empty(count * nbytes, dtype=torch.uint8, pin_memory=pinned)
        # One record's bytes for all would do, but then a mix-up would not show in the sums.
        for i, slot in enumerate(self._memory.split(nbytes)):
            slot.copy_(finite_bytes(nbytes, torch.device("cpu")) if i < 4 else self._slot(i % 4))

    def _slot(self, number: int) -> Tensor:
        return self._memory[number * self._nbytes : (number + 1) * self._nbytes]

    def fetch_ready(self, layer: int, experts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        yield {e: self._slot(layer * self._experts + e) for e in experts}


class _Pack:
    """As much of a pack as residencies use."""

    folder = "random records"

    def __init__(self, load: Workload) -> None:
        spec = plan_record(load.shape.hidden, load.shape.intermediate, load.scheme, load.scheme)
        place = RecordLocation("", -1, 0, spec, checksum.xxh3(b""))
        self.layers = [[place] * load.experts for _ in range(load.layers)]
        self.nbytes = spec.nbytes


class _Guesses:
    """Stands for a speculator: right answers, and sometimes wrong ones."""

    def __init__(self, run: Run, residency: Any) -> None:
        self._run, self._residency = run, residency
        self.right = self.needed = 0

    def ask(self, layer: int, top_k_index: Tensor) -> Tensor | None:
        if layer + 1 >= self._run.load.layers:
            return None
        return self._run.guesses[self._run.token, layer + 1].unsqueeze(0)

    def told(self, layer: int, needed: list[int], guess: Tensor | None) -> None:
        if guess is None:
            return
        picks: list[int] = guess[0].tolist()
        wanted = self._run.picks[self._run.token][layer + 1]
        self.right += len(set(picks) & set(wanted))
        self.needed += len(wanted)
        self._residency.prefetch(layer + 1, picks)


class Run:
    """One workload, the same choices in every setting."""

    def __init__(self, load: Workload, engine: Engine, link: Link) -> None:
        self.load, self.engine, self.link = load, engine, link
        self.pack: Any = _Pack(load)
        pinned = link.device.type == "cuda"
        self.host: Any = _HostRecords(load, self.pack.nbytes, pinned)
        self._random, self.token = random.Random(0), 0
        self.picks = self._draw()
        # On the device from the start, as a router's output is.
        self.index = torch.tensor(self.picks, device=link.device)  # [tokens, layers, K]
        guesses = [
            [self._guess(token, layer) for layer in range(load.layers)]
            for token in range(len(self.picks))
        ]
        self.guesses = torch.tensor(guesses, device=link.device)
        hidden, scheme = load.shape.hidden, SCHEMES["q4g64"]
        self._attention = finite_bytes(scheme.packed_nbytes(hidden, hidden), link.device)

    def _guess(self, token: int, layer: int) -> list[int]:
        """What a router would be guessed to pick."""
        return [
            pick if self._random.random() < RECALL else self._random.randrange(self.load.experts)
            for pick in self.picks[token][layer]
        ]

    def measure(self, name: str, *, share: float, prefetch: bool, keep: bool = True) -> Result:
        """Decode with slots for a share of the experts; 1 for all, 0 for whole layers moved."""
        stats, pack, link = Statistics(), self.pack, self.link
        source = HostSource(self.host, link)
        if share >= 1:
            residency: Any = ResidentRecords(pack, self.host, stats, link)
        elif share <= 0:
            residency = WholeLayers(pack, source, stats, link)
        else:
            slots = max(self.load.shape.chosen, int(share * self.load.layers * self.load.experts))
            budget = slots * pack.nbytes
            residency = DeviceCache(pack, source, budget, CacheOptions(keep=keep), stats, link)
        guesses: Any = _Guesses(self, residency) if prefetch else None
        shape = self.load.shape
        layers = []
        for layer in range(self.load.layers):
            adapter: Any = FakeAdapter(shape.hidden, shape.intermediate, ACTIVATIONS["silu"][0])
            adapter.num_experts = self.load.experts
            layers.append(
                DeviceCompute(
                    layer,
                    adapter,
                    pack.layers[layer],
                    residency,
                    guesses,
                    stats,
                    self.engine,
                    link,
                )
            )
        try:
            self._decode(layers, 2)  # compiles, and fills the cache
            link.finish()
            stats.reset()
            waits, start = link.waits, link.clock()
            total = self._decode(layers, self.load.tokens)
            link.finish()
            seconds = link.clock() - start
        finally:
            residency.close()
        return Result(
            name,
            self.load.tokens / seconds,
            seconds,
            stats.hit_ratio,
            guesses.right / guesses.needed if guesses and guesses.needed else None,
            stats.bytes_copied,
            (link.waits - waits) / (self.load.tokens * self.load.layers),
            float(total),
        )

    def _decode(self, layers: list[DeviceCompute], tokens: int) -> Tensor:
        device, shape = self.link.device, self.load.shape
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        weights = torch.full((1, shape.chosen), 1 / shape.chosen, device=device)
        total = torch.zeros((), device=device)
        for self.token in range(tokens):
            x = torch.ones(1, shape.hidden, device=device, dtype=dtype)
            for layer, compute in enumerate(layers):
                if self.load.attention:
                    x = self._attend(x)
                y = compute(x, self.index[self.token, layer].unsqueeze(0), weights)
                x = torch.nn.functional.layer_norm(x + y, (shape.hidden,))
            total += x.float().abs().sum() * (self.token + 1)
        return total

    def _attend(self, x: Tensor) -> Tensor:
        hidden = self.load.shape.hidden
        for _ in range(4):
            y = self.engine.linear(x, self._attention, SCHEMES["q4g64"], (hidden, hidden), None)
            x = torch.nn.functional.layer_norm(x + y, (hidden,))
        return x

    def _draw(self) -> list[list[list[int]]]:
        """``[token][layer]`` the experts that a router picks."""
        load, draw = self.load, self._random
        before: list[list[int]] = [[] for _ in range(load.layers)]
        out = []
        for _ in range(max(load.tokens, 2)):
            token = []
            for layer in range(load.layers):
                picks: list[int] = [e for e in before[layer] if draw.random() < STAYS]
                while len(picks) < load.shape.chosen:
                    pick = draw.randrange(load.experts)
                    if pick not in picks:
                        picks.append(pick)
                before[layer] = picks
                token.append(picks)
            out.append(token)
        return out


def expert_copy_rate(run: Run) -> float:
    """Bytes a second at which experts alone cross the link, every one a miss."""
    stats, link = Statistics(), run.link
    slots = 2 * run.load.experts * run.pack.nbytes
    cache = DeviceCache(
        run.pack, HostSource(run.host, link), slots, CacheOptions(keep=False), stats, link
    )
    link.finish()
    start = link.clock()
    for _ in range(2):
        for layer in range(run.load.layers):
            for _records in cache.fetch_ready(layer, range(run.load.experts)):
                pass
    link.finish()
    seconds = link.clock() - start
    cache.close()
    return stats.bytes_copied / seconds


def pack_of(load: Workload) -> Any:
    """As much of a pack as residencies use."""
    return _Pack(load)
