"""The native library: found, loaded, its instruction set chosen."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

from moepack_formats.errors import UsageError

from .native_interface import ABI, REFUSALS, SIGNATURES

_SUFFIX = "dylib" if sys.platform == "darwin" else "so"


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    override = os.environ.get("MOEPACK_NATIVE_LIBRARY")
    folder = Path(__file__).parent.parent / "_native"
    path = Path(override) if override else folder / f"libmoepack_native.{_SUFFIX}"
    if not path.is_file():
        return f"the native library was not built ({path} does not exist)"
    try:
        library = ctypes.CDLL(str(path))
        abi = library.moepack_abi()
        if abi != ABI:
            return f"the native library is of another version (wanted ABI {ABI}, got {abi})"
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"the native library cannot be loaded: {error}"
    isa = os.environ.get("MOEPACK_ISA")
    if isa:
        _set_isa(library, isa)
    return library


def _set_isa(library: ctypes.CDLL, isa: str) -> None:
    status = library.moepack_set_isa(isa.encode())
    if status:
        raise UsageError(
            f"the instruction set {isa!r} is not supported on this machine"
            if status == 3
            else f"no instruction set {isa!r}",
            wanted="portable, avx2, avx512, avx512_vbmi or neon",
            got=isa,
            remedy="unset MOEPACK_ISA",
        )


def available() -> str | None:
    """Name of the instruction set the native kernels use here, None without them."""
    library = _load()
    return None if isinstance(library, str) else library.moepack_isa().decode()


def library() -> ctypes.CDLL | None:
    """The library itself, for its parts that are not kernels; None where it is not available."""
    found = _load()
    return None if isinstance(found, str) else found


def why_not() -> str:
    """Why the native kernels are not available; empty when they are."""
    library = _load()
    return library if isinstance(library, str) else ""


def set_isa(isa: str) -> None:
    """Compute with another instruction set; for tests and measurements.

    Raises:
        UsageError: No such instruction set, or not on this machine.
    """
    _set_isa(loaded(), isa)


def loaded() -> ctypes.CDLL:
    """The library, for a call.

    Raises:
        UsageError: It is not available.
    """
    library = _load()
    if isinstance(library, str):
        raise UsageError(library, remedy="install again with a C++ compiler, or use the reference")
    return library


def check(status: int) -> None:
    """Raise ValueError if a call was refused."""
    if status:
        raise ValueError(f"the native library refused: {REFUSALS.get(status, status)}")
