"""Fixtures of the tests of the runtime."""

from tests.commands import checkpoint, command, damaged, pack

__all__ = ["checkpoint", "command", "damaged", "pack"]
