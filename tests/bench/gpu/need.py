"""Ends with one line where there is no GPU; ``make test-gpu`` asks first."""

from __future__ import annotations

import sys

import torch

if not torch.cuda.is_available():
    print("no CUDA device: make test-gpu needs one, and has tested nothing", file=sys.stderr)
    sys.exit(1)
