"""Triton's interpreter with current numpy.

Triton 3.6 converts arrays of one element with ``int``, which numpy 2.4 refuses; later versions of
Triton squeeze them first. Nothing else is changed.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def install() -> None:
    """Let loop bounds be tensors; calling it again is harmless."""
    original = interpreter._patch_lang_tensor
    if getattr(original, "squeezes", False):
        return

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    patched.squeezes = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
