"""Packs to move."""

from __future__ import annotations

from pathlib import Path

from tests.packs import make_pack

TINY_MOE = Path(__file__).parents[1] / "assets" / "tiny-moe"


def make_small_pack(out: Path) -> Path:
    """The small model of the tests as a pack, quantized quickly."""
    make_pack(TINY_MOE, out, quantizer="rtn", expert_bits=2)
    return out
