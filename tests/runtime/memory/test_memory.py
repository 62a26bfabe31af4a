"""Budgets: what there is, what is needed, and that slots give way."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from moepack_formats.errors import ResourceError
from moepack_formats.pack import Pack
from moepack_runtime.cache import residency, slot_cache
from moepack_runtime.cache.mapped import MappedRecords
from moepack_runtime.cache.residency import Residency, open_budget, open_residency
from moepack_runtime.cache.slot_cache import SLACK, SlotCache
from moepack_runtime.memory import available, budget, cgroups
from moepack_runtime.memory.budget import OVERHEAD_NBYTES, MemoryLimit
from moepack_runtime.options import RuntimeOptions
from moepack_runtime.statistics import Statistics
from tests.runtime.fake_pack import EXPERTS, LAYERS, SMALL, check_invariants, opened

OWN, TRUNK = 100 << 20, 5 << 20


def test_this_machine() -> None:
    assert available.own_nbytes() > 1 << 20
    assert available.available_nbytes() > 1 << 20


def test_the_default_budget_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "own_nbytes", lambda: OWN)
    monkeypatch.setattr(available, "available_nbytes", lambda: 1000)
    assert available.default_budget() == OWN + 700


def test_own_memory_is_not_that_of_files(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "file"
    path.write_bytes(b"x" * (32 << 20))
    gc.collect()  # what other tests have left is not given back in between
    available.give_back_freed()
    before = available.own_nbytes()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[i] for i in range(0, 32 << 20, 4096)) > 0
        assert available.own_nbytes() - before < 8 << 20
        taken = b"y" * (32 << 20)
        assert available.own_nbytes() - before > 24 << 20
        del taken


def test_no_meminfo_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: "MemTotal: 5 kB\n")
    assert available.available_nbytes() == 0


@pytest.mark.parametrize(("room", "wanted"), [(1000, 1000), (1 << 60, 5120), (None, 5120)])
def test_a_group_limits_what_is_available(
    monkeypatch: pytest.MonkeyPatch, room: int | None, wanted: int
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: "MemTotal: 9 kB\nMemAvailable: 5 kB\n")
    monkeypatch.setattr(cgroups, "available_nbytes", lambda: room)
    assert available.available_nbytes() == wanted


def opened_residency(pack: Pack, options: RuntimeOptions) -> Residency:
    found = open_budget(pack, options).with_trunk(TRUNK)
    return open_residency(pack, options, found, Statistics())


@pytest.mark.parametrize("slots", [1, 2, 7, 24, 100])
def test_slots_are_what_the_budget_leaves(
    pack: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Process, trunk, work space and slots together stay within --ram, whatever it is."""
    for module in (residency, budget):
        monkeypatch.setattr(module, "own_nbytes", lambda: OWN)
    with Pack(pack) as opened_pack:
        (size,) = slot_cache.record_sizes(opened_pack)
        fixed = OWN + OVERHEAD_NBYTES + TRUNK + SLACK
        options = RuntimeOptions(io="direct", ram=fixed + slots * size + size // 2)
        found = opened_residency(opened_pack, options)
        assert isinstance(found, SlotCache)
        assert found.slots == min(slots, 24)
        found.close()
        with pytest.raises(ResourceError, match="smallest working set") as error:
            opened_residency(opened_pack, RuntimeOptions(ram=fixed + size - 1))
        assert f"got {(fixed + size - 1) / 2**20:.1f} MiB" in str(error.value)


def test_slots_give_way_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else the process takes is taken from the slots, and given back to them later."""
    others = 0
    monkeypatch.setattr(slot_cache, "SLACK", 0)
    with opened(15 * SMALL.nbytes, sizes=1) as (cache, pack, stats):
        (size,) = cache._classes.values()

        def own_nbytes() -> int:
            return (others + size.slots - len(size.untouched)) * SMALL.nbytes

        def use_all() -> None:
            for layer in range(LAYERS):
                got = {e: bytes(d.numpy().data) for e, d in cache.fetch(layer, range(EXPERTS))}
                assert got == {e: pack.bytes[layer, e] for e in range(EXPERTS)}
            check_invariants(cache)

        monkeypatch.setattr(budget, "own_nbytes", own_nbytes)
        cache._limit = MemoryLimit(OVERHEAD_NBYTES + 15 * SMALL.nbytes)
        use_all()
        assert (cache.slots, stats.misses, size.untouched) == (15, 15, set())
        for others in (1, 5, 9, 14):
            use_all()
            assert cache.slots == 15 - others
        others = 7
        use_all()
        assert cache.slots == 7  # one is kept in hand, so that it does not go to and fro
        cache.make_room(3 * SMALL.nbytes)
        assert cache.slots == 5
        with pytest.raises(ResourceError, match=r"no longer fit in memory.*raise --ram"):
            cache.make_room(9 * SMALL.nbytes)
        assert cache.slots == 1
        others = 0
        use_all()
        assert cache.slots == 14


def test_mapped_records_have_nothing_to_give(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "own_nbytes", lambda: OWN)
    with Pack(pack) as opened_pack:
        limit = MemoryLimit(OWN + OVERHEAD_NBYTES + 100)
        mapped = MappedRecords(opened_pack, Statistics(), limit)
        mapped.make_room(100)
        with pytest.raises(ResourceError, match="no longer fit in memory"):
            mapped.make_room(101)
