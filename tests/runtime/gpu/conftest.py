"""Fixtures of the GPU tier's tests."""

from tests.commands import checkpoint, pack

__all__ = ["checkpoint", "pack"]
