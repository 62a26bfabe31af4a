"""A small converted model on a GPU, in every setting of its memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moepack_runtime.gpu.device_cache import CacheOptions, DeviceCache
from moepack_runtime.gpu.host_source import HostSource
from moepack_runtime.gpu.link import Link
from moepack_runtime.loading import load_pack
from moepack_runtime.policies import policy_names
from moepack_runtime.slot_cache import record_sizes
from moepack_runtime.statistics import Statistics
from tests.bench.gpu import kernels, offloading
from tests.packs import make_pack

TINY = Path(__file__).parents[2] / "assets" / "tiny-moe"
TOKENS = 48


@dataclass(frozen=True)
class Greedy:
    """One setting's greedy text."""

    slots: str
    policy: str
    prefetch: bool
    tokens_per_s: float
    same: bool


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


def greedy_everywhere(pack: Path, device: torch.device) -> list[Greedy]:
    """The same prompt in all settings; each is compared with the first."""
    base: dict[str, Any] = {"device": "cuda", "hybrid": "off"}
    rows: list[Greedy] = []
    wanted: list[int] | None = None
    for share, name in ((2.0, "all"), (0.5, "half"), (0.25, "a quarter"), (0.0, "one of a size")):
        vram = vram_for(pack, share, **base)
        for policy in policy_names() if 0 < share < 1 else ["lru"]:
            for prefetch in (True, False):
                model = load_pack(pack, vram=vram, policy=policy, prefetch=prefetch, **base)
                ids = torch.tensor([[11, 5, 77, 31, 9]], device=device)
                start = time.perf_counter()
                out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
                seconds = time.perf_counter() - start
                model.moepack.close()
                wanted = out if wanted is None else wanted
                rows.append(Greedy(name, policy, prefetch, TOKENS / seconds, out == wanted))
    return rows


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
