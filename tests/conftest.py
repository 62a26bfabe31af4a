"""Settings of every test."""

from __future__ import annotations

import os

# Two workers share the cores, and tiny tensors gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# GPU kernels run on the CPU unless `make test-gpu` says otherwise; Triton reads this when they are
# imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
