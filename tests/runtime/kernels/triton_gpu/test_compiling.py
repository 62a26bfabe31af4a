"""Every kernel becomes machine code, for GPUs that this machine need not have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moepack_formats.schemes import SCHEMES

PROGRAM = Path(__file__).with_name("compiling.py")


def compiled(capability: int, schemes: list[str], cache: Path) -> list[list[str]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(PROGRAM), str(capability), *schemes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.split() for line in done.stdout.splitlines()]


def check(lines: list[list[str]], schemes: list[str]) -> None:
    assert len(lines) == 11 * len(schemes)  # of three kernels two sizes
    for name, scheme, _, spilled, shared, vector in lines:
        assert int(spilled) <= (64 if name.endswith("_rows") else 0), (name, scheme)
        assert int(shared) <= 99 * 1024, (name, scheme)  # what compute capability 8.6 has
        if name in ("experts_up", "experts_down", "linear"):
            assert vector == "True", (name, scheme)  # 16 bytes of codes in one load


def test_for_an_ampere_gpu(tmp_path: Path) -> None:
    check(compiled(80, ["q4g128"], tmp_path), ["q4g128"])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_scheme(tmp_path: Path, capability: int) -> None:
    check(compiled(capability, list(SCHEMES), tmp_path), list(SCHEMES))
