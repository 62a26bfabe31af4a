"""Settings of every test."""

from __future__ import annotations

import os

from hypothesis import settings

# Two workers share the cores, and tiny tensors gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# GPU kernels run on the CPU unless `make test-gpu` says otherwise; Triton reads this when they are
# imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every machine, so that a failure is the change's; `make test-explore` looks
# for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", print_blob=True)
settings.load_profile("repeatable")
