"""Fixtures of the tests of the command line and the conversion."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.commands import checkpoint, command, damaged, hashes, pack

__all__ = ["checkpoint", "command", "damaged", "pack"]


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint."""
    return Path(shutil.copytree(checkpoint, tmp_path / "micro"))


@pytest.fixture(scope="session")
def wanted(pack: Path) -> dict[str, str]:
    """What an undisturbed conversion of the checkpoint writes."""
    return hashes(pack)
