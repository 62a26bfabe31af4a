"""The same on a real GPU: order, races, waits, greedy tokens. Run by ``make test-gpu``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moepack_runtime.cache.arena import Arena
from moepack_runtime.gpu.cuda_link import CudaLink
from moepack_runtime.gpu.device_cache import CacheOptions, DeviceCache
from moepack_runtime.gpu.graphs import CutPass
from moepack_runtime.gpu.host_source import HostSource
from moepack_runtime.gpu.pinning import PinnedMemory, cuda_pinned_memory
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
    memory, pinned = torch.zeros(8, 1 << 20, dtype=torch.uint8), cuda_pinned_memory()
    pinned.pin([memory])
    assert pinned.nbytes == memory.numel()
    assert memory.is_pinned()
    pinned.close()


def test_every_slot_can_be_copied_whatever_the_pieces() -> None:
    """Three slots of 1.25 MiB in pieces of 2 MiB, which no slot may lie across."""
    arena, link = Arena(5 << 18, 3), CudaLink(device())
    memory = arena.tensor(0, 3).view(3, -1)
    runtime = torch.cuda.cudart()
    pinned = PinnedMemory(
        lambda address, nbytes: int(runtime.cudaHostRegister(address, nbytes, 0)),
        lambda address: runtime.cudaHostUnregister(address),
        piece_nbytes=2 << 20,
    )
    pinned.pin([memory])
    assert pinned.nbytes == memory.numel()
    for number in range(3):
        memory[number] = number + 1
        target = torch.zeros(memory.shape[1], dtype=torch.uint8, device=device())
        link.copy_after(link.computed())
        link.wait(link.copy(arena.tensor(number), target))
        assert torch.equal(target.cpu(), memory[number])
    pinned.close()


def test_what_cannot_be_pinned_leaves_no_error_behind() -> None:
    memory = torch.zeros(1, 1 << 20, dtype=torch.uint8)
    first, again = cuda_pinned_memory(), cuda_pinned_memory()
    first.pin([memory])
    again.pin([memory])  # a second time: the driver refuses
    assert again.nbytes == 0
    assert torch.ones(3, device=device()).sum().item() == 3
    first.close()


def test_the_same_greedy_tokens_in_every_setting(tmp_path: Path) -> None:
    pack = models.convert_tiny(tmp_path / "pack")
    rows = models.greedy_everywhere(pack, device())
    assert all(row.same for row in rows), rows


@pytest.mark.parametrize("share", [0.3, 2.0])
@pytest.mark.parametrize("prefetch", [False, True])
def test_a_compiled_trunk_changes_no_token(tmp_path: Path, share: float, prefetch: bool) -> None:
    """Against the same static cache without graphs: the kernels are the same."""
    pack = models.convert_tiny(tmp_path / "pack")
    base: dict[str, Any] = {"device": "cuda", "hybrid": "off", "context": 128}
    vram = models.vram_for(pack, share, **base)
    ids = torch.tensor([[3, 4, 5]], device=device())
    found, waits = [], []
    for compiled in (False, True):
        model = models.load_pack(pack, vram=vram, prefetch=prefetch, compile=compiled, **base)
        settings = model.generation_config
        settings.cache_implementation, settings.max_cache_len = "static", 128
        link = model.moepack.tier.link
        for _ in range(2):  # the second time on another cache
            before = link.waits
            out = model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)
            waits.append(link.waits - before)
            found.append(out[0].tolist())
        if compiled:
            (cut,) = model.moepack.compiled.passes
            assert all(stretch.is_recorded for stretch in cut.stretches)
            layers = len(model.moepack.pack.layers)
            assert len(cut.stretches) == (1 if share > 1 else layers + 1)
        model.moepack.close()
    assert all(tokens == found[0] for tokens in found)
    assert waits[2:] == waits[:2]


def test_recordings_follow_their_inputs() -> None:
    cut, call = _cut(lambda x, cache: cache.add_(x).mul(2))
    for number in range(3):
        cache = torch.zeros(1 << 20, device=device())
        torch._dynamo.mark_static_address(cache)
        for step in range(1, 5):
            y = call(torch.full_like(cache, float(step)), cache)
            assert torch.equal(cache, torch.full_like(cache, step * (step + 1) / 2))
            assert torch.equal(y, 2 * cache)
        assert len(cut) == 1
        assert 0 < cut[0].recorded <= number + 1
        keep = cache  # so that the next one is elsewhere
    assert keep.numel() > 0


def test_what_waits_is_done_without_a_recording(caplog: pytest.LogCaptureFixture) -> None:
    @torch.library.custom_op("moepack_tests::waits", mutates_args=())
    def waits(x: torch.Tensor) -> torch.Tensor:
        return x * float(x.sum())  # which a stream that captures does not allow

    waits.register_fake(lambda x: torch.empty_like(x))
    _, call = _cut(lambda x: torch.ops.moepack_tests.waits.default(x) + 1)
    for _ in range(4):
        assert call(torch.ones(2, device=device())).tolist() == [3.0, 3.0]
    assert "without a CUDA graph" in caplog.text
    # Nothing is left of the attempt.
    cut, other = _cut(lambda x: x * 2)
    for _ in range(3):
        assert other(torch.ones(2, device=device())).tolist() == [2.0, 2.0]
    assert cut[0].stretches[0].is_recorded


def _cut(function: Any) -> tuple[list[CutPass], Any]:
    """A function compiled into CUDA graphs, and what was made of it."""
    torch._dynamo.reset()
    made: list[CutPass] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> CutPass:
        made.append(CutPass(graph, None, CudaLink(device()).recorder()))
        return made[-1]

    return made, torch.compile(function, backend=backend, fullgraph=True)


def test_a_batch_of_tokens_is_looked_up_without_a_wait(tmp_path: Path) -> None:
    pack = models.convert_tiny(tmp_path / "pack")
    model = models.load_pack(pack, device="cuda", hybrid="off")
    embed = model.get_input_embeddings()
    few = torch.tensor([[5, 5], [17, 90]], device=device())
    many = few.repeat(100, 1)  # which asks what is unique
    assert torch.equal(embed(few), embed(many)[:2])
    model.moepack.close()


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
