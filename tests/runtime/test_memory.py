"""Budgets: what there is, and that it is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from moepack_runtime import memory
from moepack_runtime.loading import load_pack
from tests import families


@pytest.mark.parametrize(
    ("limit", "used", "machine", "available"),
    [
        (None, None, 800, 800),
        ("max", "100", 800, 800),
        ("500", "100", 800, 400),
        ("5000", "100", 800, 800),
        ("100", "500", 800, 0),
        ("500", None, 800, 800),
        ("nonsense", "1", 800, 800),
    ],
)
def test_available(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    limit: str | None,
    used: str | None,
    machine: int,
    available: int,
) -> None:
    files = {
        "/sys/fs/cgroup/memory.max": limit,
        "/sys/fs/cgroup/memory.current": used,
        "/proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {machine} kB\n",
    }
    kilobyte = {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"}

    def read_text(path: Path) -> str:
        text = files[str(path)]
        if text is None:
            raise FileNotFoundError(path)
        return f"{int(text) * 1024}\n" if str(path) in kilobyte and text.isdigit() else text

    monkeypatch.setattr(Path, "read_text", read_text)
    assert memory.available_nbytes() == available * 1024
    assert memory.default_budget() == int(available * 1024 * memory.SAFE_SHARE)


def test_this_machine() -> None:
    assert 0 < memory.default_budget() < memory.available_nbytes()


def test_no_meminfo_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: "MemTotal: 5 kB\n")
    assert memory.available_nbytes() == 0


def test_slots_keep_the_budget(pack: Path) -> None:
    """Trunk, work space and slots together stay within --ram, whatever it is."""
    import re

    from moepack_formats.errors import ResourceError

    with pytest.raises(ResourceError) as refusal:
        load_pack(pack, io="buffered", ram=1)
    found = re.search(r"--ram (\d+)", str(refusal.value))
    assert found is not None
    need = int(found.group(1))
    one = load_pack(pack, io="buffered", ram=need)
    (size,) = one.moepack.residency._classes
    for extra in (0, size - 1, size, 5 * size + 1, 100 * size):
        model = load_pack(pack, io="buffered", ram=need + extra)
        slots = model.moepack.residency.slots
        assert slots == min(1 + extra // size, 24)
        trunk = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        assert trunk + slots * size <= need + extra
        model.generate(families.tokens(batch=1), max_new_tokens=2, do_sample=False)
        assert len(model.moepack.residency._entries) <= slots
