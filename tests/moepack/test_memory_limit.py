"""Commands inside a control group of their budget: they finish, and nobody is killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import memory_limit
from tests.moepack.pack_edits import GENERATE

REASON = memory_limit.why_not()

pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def words(pack: Path, *more: object) -> list[object]:
    return [sys.executable, "-m", "moepack", "generate", pack, *GENERATE, *more]


@pytest.mark.parametrize("margin", [pytest.param(0, marks=pytest.mark.slow), 16])
def test_the_smallest_budget_is_enough(pack: Path, margin: int) -> None:
    """What a refusal asks for is what the process then stays within.

    A group is charged for more than its processes' pages, kernel memory among it, and how much
    differs between kernels.

    Args:
        pack: What is run.
        margin: MiB on top for the group alone.
    """
    refused = subprocess.run(
        [str(word) for word in words(pack, "--ram", "1MiB")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert refused.returncode == 5
    found = re.search(r"give --ram (\d+)MiB or more", refused.stderr)
    assert found is not None, refused.stderr
    need = int(found.group(1))
    with memory_limit.limited((need + margin) << 20) as group:
        done = group.run(words(pack, "--io", "direct", "--ram", f"{need}MiB"), env=ENVIRONMENT)
        assert (done.returncode, group.kills) == (0, 0), done.stderr
        assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("io", ["auto", "buffered", "mmap"])
@pytest.mark.parametrize("more", [0, 30])
def test_other_budgets(pack: Path, io: str, more: int) -> None:
    budget = 420 + more
    with memory_limit.limited(budget << 20) as group:
        line = words(pack, "--io", io, "--ram", f"{budget}MiB")
        done = group.run(line, env=ENVIRONMENT)
        assert (done.returncode, group.kills) == (0, 0), done.stderr


@pytest.mark.slow
def test_the_default_budget_knows_the_group(pack: Path) -> None:
    """Without --ram, in a group around this process: a share of what the group allows."""
    with memory_limit.limited(600 << 20) as group:
        done = group.run(words(pack, "-v"), env=ENVIRONMENT)
        assert (done.returncode, group.kills) == (0, 0), done.stderr
    with memory_limit.limited(120 << 20) as group:
        done = group.run([sys.executable, "-c", DEFAULT], env=ENVIRONMENT)
        assert 10 << 20 < int(done.stdout) < 120 << 20


DEFAULT = "from moepack_runtime.memory.available import default_budget; print(default_budget())"
