"""Triton kernels on the CPU, in the interpreter; on a GPU where ``make test-gpu`` asks for one.

``TRITON_INTERPRET`` has to be set before the kernels are imported; ``tests/conftest.py`` does.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")

from tests.runtime.kernels.triton_gpu import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED:
    interpreter.install()


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device(DEVICE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here) and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)
