"""Fixtures of the tests of the runtime."""

from __future__ import annotations

import os

import pytest

from tests.commands import checkpoint, command, damaged, pack
from tests.packs import FamilyPacks

__all__ = ["checkpoint", "command", "damaged", "pack"]


@pytest.fixture(scope="session")
def family_packs(tmp_path_factory: pytest.TempPathFactory) -> FamilyPacks:
    """Packs of families, which the workers of a test run share; who damages one takes a copy."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each worker has a folder of its own in that of the run
    return FamilyPacks(folder / "family-packs")
