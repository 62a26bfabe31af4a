"""Settings of every test."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

# Two workers share the cores, and tiny tensors gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# GPU kernels run on the CPU unless `make test-gpu` says otherwise; Triton reads this when they are
# imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every machine, so that a failure is the change's; `make test-explore` looks
# for new ones.
# How long one takes says more about what else runs than about it.
TIMELESS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", TIMELESS, derandomize=True)
settings.register_profile("explore", TIMELESS, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Draws do not depend on which tests a worker has run before."""
    # Not imported for this: some tests are about what is not.
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
