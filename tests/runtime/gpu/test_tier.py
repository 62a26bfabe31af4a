"""A whole model over a simulated GPU: nothing about memory changes what it says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moepack_formats.errors import ResourceError, UsageError
from moepack_runtime.cache.slot_cache import record_sizes
from moepack_runtime.gpu.device_cache import DeviceCache
from moepack_runtime.gpu.hybrid import Costs
from moepack_runtime.gpu.pinning import PinnedMemory
from moepack_runtime.gpu.resident import ResidentRecords
from moepack_runtime.gpu.simulated_link import LinkSpec
from moepack_runtime.gpu.tier import resolve_device
from moepack_runtime.gpu.whole_layers import WholeLayers
from moepack_runtime.kernels import native
from moepack_runtime.loading import load_pack
from moepack_runtime.options import RuntimeOptions
from tests.runtime.fake_pack import EXPERTS, LAYERS
from tests.runtime.gpu.test_device_cache import COPY, opened, use

LINK = LinkSpec(bandwidth=1e9, latency=1e-6, memory_bandwidth=1e10, layer_seconds=1e-6)
IDS = torch.tensor([[5, 9, 2, 77, 31]])


def loaded(pack: Path, share: float, **options: Any) -> Any:
    """The pack on a simulated GPU with memory for a share of its experts."""
    options = {"hybrid": "off", "activations": "float", "link": LINK, "device": "cpu", **options}
    model = load_pack(pack, **options)
    sizes = record_sizes(model.moepack.pack)
    everything = sum(nbytes * count for nbytes, count in sizes.items())
    fixed = model.moepack.fixed.nbytes
    model.moepack.close()
    vram = int((fixed + max(share * everything, sum(sizes))) / 0.97)
    return load_pack(pack, vram=vram, **options)


def logits(model: Any, steps: int = 6) -> Tensor:
    """Of a prompt and some greedy tokens after it."""
    with torch.no_grad():
        out = model(IDS, use_cache=True)
        rows = [out.logits[0, -1]]
        for _ in range(steps):
            token = rows[-1].argmax().view(1, 1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1])
    return torch.stack(rows)


@pytest.fixture(scope="module")
def wanted(pack: Path) -> Tensor:
    return logits(load_pack(pack, activations="float", tape=False, device="cpu"))


@pytest.mark.parametrize("share", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("prefetch", [False, True])
def test_memory_changes_no_bit(pack: Path, wanted: Tensor, share: float, prefetch: bool) -> None:
    model = loaded(pack, share, prefetch=prefetch)
    kind = ResidentRecords if share > 1 else DeviceCache
    assert isinstance(model.moepack.residency, kind)
    got = logits(model)
    assert torch.equal(got.argmax(1), wanted.argmax(1))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), got)  # now with other things in the cache
    stats = model.moepack.stats
    assert (stats.bytes_copied > 0) == (share < 1)
    model.moepack.close()


def test_whole_layers_change_no_bit(pack: Path, wanted: Tensor) -> None:
    model = load_pack(
        pack, link=LINK, device="cpu", hybrid="off", activations="float", offload="layers"
    )
    assert isinstance(model.moepack.residency, WholeLayers)
    assert torch.equal(logits(model).argmax(1), wanted.argmax(1))


def test_the_host_waits_once_a_layer(pack: Path) -> None:
    model = loaded(pack, 0.3)
    logits(model)
    link, layers = model.moepack.tier.link, len(model.moepack.pack.layers)
    before = link.waits
    with torch.no_grad():
        for token in range(10):
            model(torch.tensor([[token]]))
    assert link.waits - before == 10 * layers


def test_guesses_reach_the_device_and_are_counted(pack: Path) -> None:
    model = loaded(pack, 0.5)
    logits(model, 12)
    stats = model.moepack.stats
    assert stats.recall is not None
    assert 0 < stats.speculative_used <= stats.speculative_reads


@pytest.mark.skipif(native.available() is None, reason="the CPU's kernels were not built")
@pytest.mark.parametrize("mode", ["on", "auto"])
def test_the_cpu_helps(pack: Path, wanted: Tensor, mode: str) -> None:
    slow = LinkSpec(bandwidth=1e7, latency=1e-6, cpu_bandwidth=1e10, layer_seconds=1e-6)
    model = loaded(pack, 0.3, hybrid=mode, link=slow)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-3, atol=1e-3)
    assert model.moepack.stats.computed_on_cpu > 0


def test_a_fast_link_needs_no_help() -> None:
    costs = Costs("auto", copy_rate=50e9)
    assert costs.choose([(3, 1000), (4, 1000)], 0.0) == [3]  # to know what it costs
    costs.computed(1000, 1000 / 5e9)
    assert costs.choose([(3, 1000), (4, 1000)], 0.0) == []
    # A queue of copies makes the CPU the faster one, until it has as much to do.
    assert costs.choose([(e, 1000) for e in range(4)], 450e-9) == [0, 1]
    costs.copied(1000, 1000 / 1e9)
    for _ in range(60):
        costs.copied(1000, 1000 / 1e9)
    assert costs.choose([(3, 1000), (4, 1000), (5, 1000)], 0.0) == [3, 4, 5]
    assert Costs("off").choose([(3, 1000)], 1.0) == []
    assert Costs("on").choose([(3, 1000)], 0.0) == [3]


def test_too_little_memory_says_the_need(pack: Path) -> None:
    with pytest.raises(ResourceError, match="give --vram") as error:
        load_pack(pack, link=LINK, device="cpu", vram=1000)
    need = int(str(error.value).split("--vram ")[1].split()[0])
    model = load_pack(pack, link=LINK, device="cpu", vram=need)
    assert model.moepack.residency.slots == len(record_sizes(model.moepack.pack))
    model.moepack.close()


def test_a_text_has_its_part_of_the_budget(pack: Path) -> None:
    options: dict[str, Any] = {"link": LINK, "device": "cpu", "hybrid": "off"}
    with pytest.raises(ResourceError) as error:
        load_pack(pack, vram=1000, context=100, **options)
    assert "for a text of 100 tokens, " in str(error.value)
    slots = {}
    vram = int(str(error.value).split("--vram ")[1].split()[0]) + 30_000
    for context in (8, 100):
        model = load_pack(pack, vram=vram, context=context, **options)
        slots[context] = model.moepack.residency.slots
        ids = torch.arange(context).remainder(90)[None]
        with torch.no_grad():
            layers = model(ids, use_cache=True).past_key_values.layers
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert model.moepack.fixed.context == kept
    assert slots[8] > slots[100]


def test_options_that_do_nothing_on_the_cpu_are_named(
    pack: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_pack(pack, device="cpu").moepack.close()
        assert not caplog.records
        load_pack(pack, device="cpu", compile=True).moepack.close()
        load_pack(pack, device="cpu", vram="1GiB", context=64, hybrid="off").moepack.close()
        load_pack(pack, device="cpu", vram="1GiB", link=LINK).moepack.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the CPU computes: compile does nothing",
        "the CPU computes: vram, context and hybrid do nothing",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        resolve_device(RuntimeOptions(device="cuda"))
    assert resolve_device(RuntimeOptions()).type == "cpu"


def test_pinning_goes_as_far_as_the_system_lets_it(caplog: pytest.LogCaptureFixture) -> None:
    pinned: dict[int, int] = {}

    def register(address: int, nbytes: int) -> int:
        if sum(pinned.values()) + nbytes > 2500:
            return 2  # cudaErrorMemoryAllocation
        pinned[address] = nbytes
        return 0

    memory = PinnedMemory(register, pinned.pop, piece_nbytes=1000)
    slots = [torch.empty(5, 300, dtype=torch.uint8), torch.empty(5, 600, dtype=torch.uint8)]
    with caplog.at_level(logging.WARNING):
        memory.pin(slots)
    # Whole slots: a copy from two pieces, or from a part of one, is refused.
    assert [(at - slots[0].data_ptr(), n) for at, n in pinned.items()][:2] == [(0, 900), (900, 600)]
    assert list(pinned.items())[2:] == [(slots[1].data_ptr(), 600)]
    assert memory.nbytes == sum(pinned.values()) == 2100
    assert "can be pinned" in caplog.text
    memory.close()
    assert not pinned


def test_prefetch_pays_where_copies_take_as_long_as_computing() -> None:
    """The scheduler alone: two experts a layer, none cached, three of four guessed right."""
    times = {}
    for guessing in (False, True):
        with opened(8) as (cache, fake, _, link, stats):
            for step in range(90):
                layer, first = step % LAYERS, step // LAYERS * 2
                link.to_host([])
                if guessing:
                    wrong = 2 if step % 2 else 1
                    following = [(step + 1) // LAYERS * 2, (step + 1) // LAYERS * 2 + wrong]
                    cache.prefetch((step + 1) % LAYERS, [e % EXPERTS for e in following])
                use(cache, fake, layer, [first % EXPERTS, (first + 1) % EXPERTS])
                link.computing(2 * COPY)
            link.finish()
            times[guessing] = link.clock()
            if guessing:
                assert stats.speculative_used == pytest.approx(0.75 * 180, rel=0.05)
            else:
                assert stats.hits == 0
    assert times[False] / times[True] >= 1.3
