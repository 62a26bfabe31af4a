"""The same on a real GPU: order, races, waits, greedy tokens. Run by ``make test-gpu``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moepack_runtime.gpu.cuda_link import CudaLink
from moepack_runtime.gpu.device_cache import CacheOptions, DeviceCache
from moepack_runtime.gpu.host_source import HostSource
from moepack_runtime.gpu.pinning import cuda_pinned_memory
from moepack_runtime.statistics import Statistics
from tests.bench.gpu import models
from tests.runtime.fake_pack import EXPERTS, LAYERS, SMALL, FakePack
from tests.runtime.gpu.fake_host import FakeHost

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def device() -> torch.device:
    return torch.device("cuda", 0)


def busy(cycles: int = 20_000_000) -> None:
    """Keep the compute stream occupied for some milliseconds."""
    torch.cuda._sleep(cycles)


def test_a_copy_waits_for_the_kernels_and_they_for_it() -> None:
    link = CudaLink(device())
    source = torch.ones(1 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.zeros(1 << 20, dtype=torch.uint8, device=device())
    busy()
    before = target.sum()
    link.copy_after(link.computed())
    event = link.copy(source, target)
    assert not link.done(event)
    link.compute_after(event)
    after = target.sum()
    assert (int(before), int(after)) == (0, 1 << 20)
    assert link.waits == 0
    assert (link.seconds(event) or 0) > 0


@pytest.mark.parametrize("slots", [1, 4, 9])
def test_no_slot_is_used_too_early(slots: int) -> None:
    """Kernels that start late read what their turn was given, whatever was queued since."""
    with tempfile.TemporaryDirectory() as folder:
        pack, link, stats = FakePack(Path(folder), 1), CudaLink(device()), Statistics()
        source = HostSource(FakeHost(pack, 3), link)
        options = CacheOptions()
        cache = DeviceCache(pack, source, slots * SMALL.nbytes, options, stats, link)  # type: ignore[arg-type]
        seen, wanted = [], []
        for step in range(40):
            layer = step % LAYERS
            cache.prefetch((layer + 1) % LAYERS, [step % EXPERTS])
            busy(1_000_000)
            for expert, record in cache.fetch(layer, [step % EXPERTS, (step + 2) % EXPERTS]):
                seen.append(record.clone())
                wanted.append(pack.bytes[layer, expert])
        link.finish()
        for record, data in zip(seen, wanted, strict=True):
            assert bytes(record.cpu().numpy().data) == data
        cache.close()
        pack.close()


def test_memory_can_be_pinned_in_place() -> None:
    memory, pinned = torch.zeros(8 << 20, dtype=torch.uint8), cuda_pinned_memory()
    pinned.pin([memory])
    assert pinned.nbytes == memory.numel()
    assert memory.is_pinned()
    pinned.close()


def test_the_same_greedy_tokens_in_every_setting(tmp_path: Path) -> None:
    pack = models.convert_tiny(tmp_path / "pack")
    rows = models.greedy_everywhere(pack, device())
    assert all(row.same for row in rows), rows


def test_one_wait_a_layer(tmp_path: Path) -> None:
    pack = models.convert_tiny(tmp_path / "pack")
    base: dict[str, Any] = {"device": "cuda", "hybrid": "off"}
    model = models.load_pack(pack, vram=models.vram_for(pack, 0.3, **base), **base)
    ids = torch.tensor([[3, 4, 5]], device=device())
    with torch.no_grad():
        model(ids)
        link, layers = model.moepack.tier.link, len(model.moepack.pack.layers)
        before = link.waits
        for _ in range(5):
            model(ids[:, :1])
    assert link.waits - before <= 5 * layers
    model.moepack.close()
