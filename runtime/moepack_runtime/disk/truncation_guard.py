"""Mapped files that are truncated while they are computed with: an error instead of SIGBUS.

The native library handles the signal; without it only the file's size is asked before each use.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from typing import Any

from ..kernels import native


class Guard:
    """Guards some mappings; forgets them when it is closed or collected."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._close = weakref.finalize(self, _remove_all, self._numbers)

    def add(self, key: int, address: int, nbytes: int) -> None:
        """Guard a mapping that stays until :meth:`remove` or :meth:`close`."""
        library = _library()
        if library is not None:
            number = library.moepack_guard_add(address, nbytes)
            if number >= 0:
                self._numbers[key] = number

    def missing(self, key: int) -> int | None:
        """Offset of the first byte that was touched and that the file no longer had, or None."""
        number, library = self._numbers.get(key), _library()
        if number is None or library is None:
            return None
        offset: int = library.moepack_guard_missing(number)
        return offset if offset >= 0 else None

    @property
    def quiet(self) -> bool:
        """Whether no byte of any mapping in the process was ever missing."""
        library = _library()
        return library is None or library.moepack_guard_faults() == 0

    def remove(self, key: int) -> None:
        """Guard a mapping no longer."""
        number, library = self._numbers.pop(key, None), _library()
        if number is not None and library is not None:
            library.moepack_guard_remove(number)

    def close(self) -> None:
        """Guard nothing any more. To be called before the mappings end."""
        self._close()


def _remove_all(numbers: dict[int, int]) -> None:
    library = _library()
    while numbers:
        _, number = numbers.popitem()
        if library is not None:
            library.moepack_guard_remove(number)


@functools.cache
def _library() -> Any | None:
    """The native library with its guard, or None."""
    library = native.library()
    if library is None:
        return None
    library.moepack_guard_add.restype = ctypes.c_int32
    library.moepack_guard_add.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.moepack_guard_remove.restype = None
    library.moepack_guard_remove.argtypes = [ctypes.c_int32]
    library.moepack_guard_missing.restype = ctypes.c_int64
    library.moepack_guard_missing.argtypes = [ctypes.c_int32]
    library.moepack_guard_faults.restype = ctypes.c_int64
    library.moepack_guard_faults.argtypes = []
    return library
