"""Opening the GPU tier of a pack: which residency, which budget, what is pinned."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moepack_formats.errors import ResourceError, UsageError
from moepack_formats.pack import Pack

from ..cache.residency import Residency, open_budget, open_residency
from ..cache.slot_cache import SlotCache, record_sizes
from ..experts import ExpertsAdapter
from ..kernels import select
from ..options import GPU_OPTIONS, RuntimeOptions, format_size
from ..statistics import Statistics
from .device_cache import CacheOptions, DeviceCache
from .helper import CpuHelper
from .host_source import HostSource
from .hybrid import Costs
from .link import Link
from .resident import ResidentRecords
from .simulated_link import SimulatedLink
from .whole_layers import WholeLayers

_log = logging.getLogger(__name__)

SAFE_SHARE = 0.9
"""Share of the free GPU memory that is used when the user names no budget."""

WORK_SHARE = 0.02
"""Share of the budget that is left for what kernels need while they run."""


@dataclass(frozen=True)
class Fixed:
    """What a budget of GPU memory is for besides experts.

    Attributes:
        trunk: Bytes of everything but the routed experts.
        context: Bytes of the keys and values of one text.
        tokens: Of that text.
    """

    trunk: int
    context: int = 0
    tokens: int = 0

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.trunk + self.context

    def __str__(self) -> str:
        """For a person."""
        context = f"{format_size(self.context)} for a text of {self.tokens} tokens"
        return f"{format_size(self.trunk)} trunk, {context}"


@dataclass(frozen=True)
class DeviceTier:
    """What a pack's modules compute with on a device.

    Attributes:
        link: The device.
        residency: Brings records to it.
        host_stats: Counters of the records in host memory: reads of files.
        helper: Computes missing experts on the CPU; None without.
    """

    link: Link
    residency: Residency
    host_stats: Statistics
    helper: CpuHelper | None


def resolve_device(options: RuntimeOptions) -> torch.device:
    """The device that a model loaded with these options computes on.

    Raises:
        UsageError: CUDA was asked for and there is none.
    """
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise UsageError(
            "there is no CUDA device, or this torch was built without CUDA",
            got="--device cuda",
            remedy="--device cpu, or install torch for CUDA",
        )
    if options.device == "cpu" or not there:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def on_cpu(options: RuntimeOptions) -> bool:
    """Whether neither a GPU nor a simulated one computes with these options.

    Raises:
        UsageError: CUDA was asked for and there is none.
    """
    return options.link is None and resolve_device(options).type == "cpu"


def warn_unused(options: RuntimeOptions) -> None:
    """One line for options about a GPU that were set; the CPU computes."""
    usual = RuntimeOptions()
    unused = [name for name in GPU_OPTIONS if getattr(options, name) != getattr(usual, name)]
    if unused:
        what = " and ".join([", ".join(unused[:-1]), unused[-1]] if unused[1:] else unused)
        _log.warning("the CPU computes: %s %s nothing", what, "do" if unused[1:] else "does")


def open_tier(
    pack: Pack,
    options: RuntimeOptions,
    device: torch.device,
    fixed: Fixed,
    adapters: list[ExpertsAdapter],
    stats: Statistics,
) -> DeviceTier:
    """Open residency on a device.

    Args:
        pack: An open pack.
        options: Budgets and modes; with ``link`` the device is a simulated one.
        device: The GPU, or the CPU for a simulated one.
        fixed: What else takes memory there.
        adapters: The experts modules.
        stats: Where hits, misses and copied bytes are counted.

    Raises:
        ResourceError: A budget is below the smallest working set; the message says the need.
    """
    link = _open_link(options, device)
    sizes = record_sizes(pack)
    everything = sum(nbytes * count for nbytes, count in sizes.items())
    budget = _budget(options, device, fixed.nbytes + everything)
    for_slots = budget - int(budget * WORK_SHARE) - fixed.nbytes
    host_stats = Statistics()
    whole = options.offload == "layers"
    smallest = 2 * max(sum(at.spec.nbytes for at in layer) for layer in pack.layers)
    smallest = smallest if whole else sum(sizes)
    if for_slots < smallest:
        need = int((smallest + fixed.nbytes) / (1 - WORK_SHARE)) + 1
        raise ResourceError(
            "not enough GPU memory for the smallest working set",
            where=pack.folder,
            wanted=f"{format_size(need)} ({fixed}, {format_size(smallest)} experts)",
            got=format_size(budget),
            remedy=f"give --vram {need} or more, or a shorter --context",
        )
    if not whole and options.keep and everything <= for_slots:
        # Read once, by way of mapped files: no slots in host memory.
        mapped = replace(options, io="mmap", ram=None)
        host = open_residency(pack, mapped, open_budget(pack, mapped), host_stats)
        return DeviceTier(link, ResidentRecords(pack, host, stats, link), host_stats, None)
    host, unpin = _open_host(pack, options, link, host_stats)
    source = HostSource(host, link, unpin)
    if whole:
        return DeviceTier(link, WholeLayers(pack, source, stats, link), host_stats, None)
    cache_options = CacheOptions(options.policy, options.keep)
    cache = DeviceCache(pack, source, for_slots, cache_options, stats, link)
    helper = None
    if options.hybrid != "off":
        cpu = select("auto", options.activations, options.threads)
        costs = Costs(options.hybrid)
        helper = CpuHelper(pack, adapters, cpu, host, cache, costs, link, stats)
    return DeviceTier(link, cache, host_stats, helper)


def _open_link(options: RuntimeOptions, device: torch.device) -> Link:
    if options.link is not None:
        return SimulatedLink(options.link)
    from .cuda_link import CudaLink

    return CudaLink(device)


def _budget(options: RuntimeOptions, device: torch.device, everything: int) -> int:
    if options.vram is not None:
        return options.vram
    if device.type == "cpu":
        return 2 * everything
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * SAFE_SHARE)


def _open_host(
    pack: Pack, options: RuntimeOptions, link: Link, stats: Statistics
) -> tuple[Residency, Callable[[], None]]:
    """Records in host memory, pinned where a real GPU copies from them."""
    if link.device.type == "cpu":
        return open_residency(pack, options, open_budget(pack, options), stats), _nothing
    # Mapped files cannot be pinned: only who asks for them gets them.
    io = "buffered" if options.io == "auto" else options.io
    budget = open_budget(pack, options)
    host = open_residency(pack, replace(options, io=io), budget, stats, pinned=True)
    if not isinstance(host, SlotCache):
        _log.warning("records in mapped files are not pinned: copies to the GPU are slower")
        return host, _nothing
    from .pinning import cuda_pinned_memory

    pinned = cuda_pinned_memory()
    pinned.pin(host.memory())
    return host, pinned.close


def _nothing() -> None:
    pass
