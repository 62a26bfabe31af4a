"""Limits of control groups, from the files as the kernel writes them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moepack_runtime.memory import cgroups
from tests import memory_limit

V2 = "34 24 0:30 / {} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "35 24 0:31 {} {} rw,nosuid shared:10 - cgroup cgroup rw,memory\n"
OTHER = "36 24 0:32 / /x rw - cgroup cgroup rw,cpu,cpuacct\n37 24 0:33 / / rw - ext4 /dev/vda rw\n"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the hierarchy; /proc/self/{mountinfo,cgroup} are read from it."""
    real = cgroups._read

    def read(path: Path) -> str:
        return real(tmp_path / path.name) if str(path).startswith("/proc/") else real(path)

    monkeypatch.setattr(cgroups, "_read", read)
    return tmp_path


def group2(folder: Path, limit: str, usage: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file 7\n")


def group1(folder: Path, limit: int, usage: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {inactive}\n")


@pytest.mark.parametrize(
    ("inner", "outer", "room"),
    [
        (("max", 10), ("max", 10), None),
        (("500", 100), ("max", 10), 400),
        (("500", 100), ("300", 150), 150),  # the group around it is the narrower one
        (("max", 100), ("300", 150), 150),
        (("500", 600), ("max", 10), 0),
        (("500", 400, 250), ("max", 10), 350),  # old pages of files are as good as free
    ],
)
def test_version_2(
    system: Path, inner: tuple[str, int], outer: tuple[str, int], room: int | None
) -> None:
    mount = system / "cg root"
    (system / "mountinfo").write_text(OTHER + V2.format(str(mount).replace(" ", "\\040")))
    (system / "cgroup").write_text("0::/outer/inner\n")
    group2(mount / "outer", *outer)
    group2(mount / "outer" / "inner", *inner)
    assert cgroups.available_nbytes() == room


def test_version_1(system: Path) -> None:
    mount = system / "memory"
    (system / "mountinfo").write_text(OTHER + V1.format("/", mount))
    (system / "cgroup").write_text("9:cpu,cpuacct:/other\n4:memory:/a/b\n0::/\n")
    group1(mount, 1 << 62, 5)
    group1(mount / "a", 1000, 400)
    group1(mount / "a" / "b", 9223372036854771712, 100)
    assert cgroups.available_nbytes() == 600
    group1(mount / "a" / "b", 800, 700, 150)
    assert cgroups.available_nbytes() == 250


def test_in_a_container(system: Path) -> None:
    """The mount shows a part of the tree, and the path may be the host's or another's."""
    mount = system / "memory"
    (system / "mountinfo").write_text(V1.format("/docker/123", mount))
    group1(mount, 1000, 400)
    for path in ("/docker/123", "/docker/456", "/../.."):
        (system / "cgroup").write_text(f"4:memory:{path}\n")
        assert cgroups.available_nbytes() == 600
    group1(mount / "inner", 300, 200)
    (system / "cgroup").write_text("4:memory:/docker/123/inner\n")
    assert cgroups.available_nbytes() == 100


@pytest.mark.parametrize("text", ["", "nonsense\n", "1 2 3 - cgroup2\n"])
def test_without_groups(system: Path, text: str) -> None:
    (system / "mountinfo").write_text(text)
    (system / "cgroup").write_text(text)
    assert cgroups.available_nbytes() is None


def test_the_kernels_own_files() -> None:
    """In a real group, when one can be made: what is left is the limit less what is used."""
    reason = memory_limit.why_not()
    if reason:
        pytest.skip(reason)
    program = "from moepack_runtime.memory import cgroups; print(cgroups.available_nbytes())"
    with memory_limit.limited(200 << 20) as group:
        done = group.run([sys.executable, "-c", program])
    assert 100 << 20 < int(done.stdout) < 200 << 20
