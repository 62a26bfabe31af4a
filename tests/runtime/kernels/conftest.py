"""Every instruction set that this machine has, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moepack_formats.errors import UsageError
from moepack_runtime.kernels import native

ISAS = ("avx512_vbmi", "avx512", "avx2", "neon", "portable")


def supported() -> list[str]:
    """The instruction sets that run here; none without the native library."""
    default = native.available()
    found = []
    for isa in ISAS if default else ():
        try:
            native.set_isa(isa)
        except UsageError:
            continue
        found.append(isa)
    if default:
        native.set_isa(default)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        found = supported() or [pytest.param("none", marks=pytest.mark.skip(native.why_not()))]
        metafunc.parametrize("isa", found, indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that computes during the test."""
    before = native.available()
    assert before is not None
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)
