"""A small converted model on a GPU: in every setting of its memory, compiled and not."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moepack.speed import PackRunner
from moepack_runtime.cache.slot_cache import record_sizes
from moepack_runtime.gpu.device_cache import CacheOptions, DeviceCache
from moepack_runtime.gpu.host_source import HostSource
from moepack_runtime.gpu.link import Link
from moepack_runtime.loading import load_pack
from moepack_runtime.policies import runnable_names
from moepack_runtime.statistics import Statistics
from tests.bench.gpu import kernels, offloading
from tests.packs import make_pack

TINY = Path(__file__).parents[2] / "assets" / "tiny-moe"
TOKENS, ROUNDS = 48, 5
PROMPT = [11, 5, 77, 31, 9]
_LAUNCHES = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")
"""What a call that gives a GPU work has in its name, in the runtime's and in the driver's."""


@dataclass(frozen=True)
class Greedy:
    """One setting's greedy text."""

    slots: str
    policy: str
    prefetch: bool
    cache: str
    tokens_per_s: float
    same: bool


@dataclass(frozen=True)
class Decoding:
    """How fast a setting decodes.

    Attributes:
        slots: How many experts have room.
        compiled: Whether with CUDA graphs.
        tokens_per_s: The median of rounds that took turns.
        launches: Calls a token that gave the GPU work; None where there is none to count on.
    """

    slots: str
    compiled: bool
    tokens_per_s: float
    launches: float | None


def convert_tiny(out: Path) -> Path:
    """The small model in tests/assets, at 4 and 3 bits."""
    make_pack(TINY, out, attn_bits=4, expert_bits=3)
    return out


def vram_for(pack: Path, share: float, **options: Any) -> int:
    """Budget with slots for a share of the experts; above 1 for all of them."""
    model = load_pack(pack, **options)
    sizes = record_sizes(model.moepack.pack)
    everything = sum(nbytes * count for nbytes, count in sizes.items())
    fixed = model.moepack.fixed.nbytes
    model.moepack.close()
    return int((fixed + max(share * everything, sum(sizes))) / 0.97)


Guard = Callable[[str], contextlib.AbstractContextManager[object]]
"""What goes around a row; it may keep its failure from ending the others."""


def greedy_everywhere(
    pack: Path, device: torch.device, guard: Guard = contextlib.nullcontext
) -> list[Greedy]:
    """The same prompt in all settings; each is compared with the first of its kind of cache.

    A static cache is read by other kernels than a growing one. On it, ``compiled`` must come to the
    tokens of the row without.
    """
    base: dict[str, Any] = {"device": "cuda", "hybrid": "off"}
    rows: list[Greedy] = []
    wanted: dict[str, list[int]] = {}
    for share, name in ((2.0, "all"), (0.5, "half"), (0.25, "a quarter"), (0.0, "one of a size")):
        vram = vram_for(pack, share, **base)
        for policy in runnable_names() if 0 < share < 1 else ["lru"]:
            for prefetch in (True, False):
                for cache in ("growing", "static", "static, compiled"):
                    if cache != "growing" and policy != "lru":
                        continue
                    options = {"vram": vram, "policy": policy, "prefetch": prefetch, **base}
                    with guard(f"greedy tokens, {name}, {policy}, {prefetch}, {cache}"):
                        seconds, out = _greedy(pack, device, cache, options)
                        first = wanted.setdefault(cache.partition(",")[0], out)
                        speed = TOKENS / seconds
                        rows.append(Greedy(name, policy, prefetch, cache, speed, out == first))
    return rows


def _greedy(
    pack: Path, device: torch.device, cache: str, options: dict[str, Any]
) -> tuple[float, list[int]]:
    """Seconds and tokens of a text."""
    model = load_pack(pack, compile=cache.endswith("compiled"), **options)
    try:
        if cache == "static":
            model.generation_config.cache_implementation = "static"
            model.generation_config.max_cache_len = model.moepack.fixed.tokens
        ids = torch.tensor([PROMPT], device=device)
        start = time.perf_counter()
        out: list[int] = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
        return time.perf_counter() - start, out
    finally:
        model.moepack.close()


def decoding_speeds(pack: Path, **base: Any) -> list[Decoding]:
    """Decoding with all experts there and with half of them, compiled and not, taking turns."""
    rows = []
    ids = [token % 90 for token in range(TOKENS)]
    for share, name in ((2.0, "all"), (0.5, "half")):
        vram = vram_for(pack, share, context=128, **base)
        options = {"vram": vram, "context": 128, **base}
        loaded = {kind: load_pack(pack, compile=kind, **options) for kind in (False, True)}
        runners = {kind: PackRunner(model) for kind, model in loaded.items()}
        times: dict[bool, list[float]] = {kind: [] for kind in runners}
        for number in range(ROUNDS + 1):
            for kind, runner in runners.items():
                runner.prefill(PROMPT)
                start = time.perf_counter()
                runner.decode(ids)
                if number > 0:  # the first round traces and records
                    times[kind].append(time.perf_counter() - start)
        for kind, runner in runners.items():
            runner.prefill(PROMPT)
            launches = _launches(lambda runner=runner: runner.decode(ids))  # type: ignore[misc]
            speed = TOKENS / statistics.median(times[kind])
            rows.append(Decoding(name, kind, speed, launches and launches / TOKENS))
        for model in loaded.values():
            assert model.moepack.compiled is None or model.moepack.compiled.refusal is None
            model.moepack.close()
    return rows


def _launches(run: Callable[[], None]) -> int | None:
    """Calls that gave a GPU work."""
    if not torch.cuda.is_available():
        run()
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
    events = seen.key_averages()
    return sum(e.count for e in events if any(word in e.key for word in _LAUNCHES))


def memory_kept(device: torch.device) -> tuple[int, int]:
    """A budget of slots, and how much GPU memory they were seen to take, bytes."""
    from moepack_runtime.gpu.cuda_link import CudaLink

    load = offloading.Workload(kernels.MIXTRAL, "q2g16s4", layers=4, experts=8, tokens=2)
    link: Link = CudaLink(device)
    pack: Any = offloading.pack_of(load)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    budget = 24 * pack.nbytes
    source = HostSource(offloading.NoHost(), link)
    cache = DeviceCache(pack, source, budget, CacheOptions(), Statistics(), link)
    used = free - torch.cuda.mem_get_info(device)[0]
    cache.close()
    return budget, used
