"""Arguments that do not fit are refused before the library sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moepack_formats.errors import FormatError, UsageError
from moepack_formats.record import plan_record
from moepack_formats.schemes import SCHEMES
from moepack_runtime.kernels import native, select
from tests.runtime.kernels.matrices import packed, random_record

SCHEME, SHAPE = SCHEMES["q4g64"], (32, 128)

needs_native = pytest.mark.skipif(native.available() is None, reason=native.why_not())


def linear(**changes: Any) -> torch.Tensor:
    arguments = {"x": torch.randn(2, 128), "packed": packed(SCHEME, *SHAPE), "bias": None}
    arguments.update(changes)
    return native.linear(scheme=SCHEME, shape=SHAPE, int8=True, threads=1, **arguments)


@needs_native
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"packed": packed(SCHEME, *SHAPE)[:-1]}, FormatError, "too short"),
        ({"packed": packed(SCHEME, *SHAPE).repeat(2)[::2]}, ValueError, "contiguous"),
        ({"packed": packed(SCHEME, *SHAPE).view(torch.int8)}, TypeError, "uint8"),
        ({"x": torch.randn(2, 127)}, ValueError, r"\[2, 128\]"),
        ({"x": torch.randn(128, 2).t()}, ValueError, "contiguous"),
        ({"x": torch.randn(2, 128).double()}, TypeError, "float32"),
        ({"x": torch.randn(2, 128, device="meta")}, TypeError, "CPU"),
        ({"x": torch.randn(2, 128).bfloat16()}, TypeError, "float32"),
        ({"bias": torch.randn(31)}, ValueError, "bias"),
        ({"x": torch.empty(0, 128)}, ValueError, "bad argument"),
    ],
)
def test_linear(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear(**changes)


@needs_native
def test_misaligned_floats() -> None:
    # Only memory from outside torch can start at such an address.
    memory = np.zeros(2 * 128 * 4 + 4, np.uint8)
    odd = torch.from_numpy(np.ndarray((2, 128), np.float32, memory.data, offset=2))
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        linear(x=odd)


@needs_native
def test_decoding_beyond_the_end() -> None:
    data = packed(SCHEME, *SHAPE)
    for tiles, error in ((torch.tensor([0, 2]), FormatError), (torch.tensor([-1]), ValueError)):
        with pytest.raises(error):
            native.decode(data, SCHEME, 128, 16, torch.float32, tiles=tiles, threads=1)
    with pytest.raises(ValueError, match="33 rows"):
        native.decode(data, SCHEME, 128, 33, torch.float32, tiles=torch.tensor([0, 1]), threads=1)
    with pytest.raises(FormatError, match="too short"):
        native.decode(data, SCHEME, 128, 33, torch.float32, threads=1)
    with pytest.raises(TypeError, match="int64"):
        native.decode(
            data, SCHEME, 128, 16, torch.float32, tiles=torch.tensor([0]).int(), threads=1
        )


@needs_native
def test_experts() -> None:
    spec = plan_record(64, 32, "q4g64", "q4g64")
    record, weights, x = random_record(spec, 0), torch.ones(1), torch.randn(64)
    fused = native.FusedExperts(64, 32, True, ("silu", 1.0, float("inf"), 0.0))

    def call(**changes: Any) -> Any:
        arguments = {"x": x, "records": [record], "specs": [spec], "weights": weights}
        arguments.update(changes)
        return fused(**arguments, int8=True, threads=1)

    assert call().shape == (64,)
    for changes, error in (
        ({"records": [record[: spec.payload_nbytes - 1]]}, FormatError),
        ({"weights": torch.ones(2)}, ValueError),
        ({"x": torch.randn(63)}, ValueError),
        ({"outputs": torch.empty(2, 64)}, ValueError),
        ({"specs": [plan_record(64, 32, "q8g64", "q8g64")]}, FormatError),
        ({"specs": [plan_record(32, 32, "q2g64", "q2g64")]}, ValueError),
    ):
        with pytest.raises(error):
            call(**changes)
    with pytest.raises(ValueError, match="bad argument"):
        native.FusedExperts(64, 32, False, ("silu", 1.0, 1.0, 0.0))(
            x, [record], [spec], weights, int8=True, threads=1
        )


def test_unknown_choices() -> None:
    with pytest.raises(UsageError, match="unknown engine"):
        select("fast")
    if native.available():
        with pytest.raises(UsageError, match="no instruction set"):
            native.set_isa("mmx")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not os.environ.get("MOEPACK_REQUIRE_NATIVE"), reason="it may be absent")
def test_the_library_is_there_where_it_must_be() -> None:
    """Without it many tests are skipped, and nobody looks."""
    assert native.available(), native.why_not()


def test_without_the_library_there_is_one_notice(tmp_path: Path) -> None:
    code = (
        "from moepack_runtime.kernels import select\n"
        "print(select().name, '|', select().name)\n"
        "try:\n    select('native')\nexcept Exception as e:\n    print(type(e).__name__, e)\n"
    )
    done = run(code, MOEPACK_NATIVE_LIBRARY=str(tmp_path / "none.so"), MOEPACK_ENGINE="")
    assert "reference (torch) | reference (torch)" in done.stdout
    assert "UsageError" in done.stdout
    assert done.stderr.count("not built") == 1


def test_a_library_of_another_version_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    code = "from moepack_runtime.kernels import native; print(native.available(), native.why_not())"
    done = run(code, MOEPACK_NATIVE_LIBRARY=str(tmp_path / "broken.so"))
    assert done.stdout.startswith("None the native library cannot be loaded")


@needs_native
def test_the_environment_chooses_the_instruction_set() -> None:
    code = "from moepack_runtime.kernels import select; print(select().name)"
    done = run(code, MOEPACK_ISA="portable", MOEPACK_ENGINE="native")
    assert done.stdout.strip() == "native (portable, int8 activations)"
    assert "no instruction set" in run(code, MOEPACK_ISA="mmx").stderr


@needs_native
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer needs the address space")
def test_threads_that_the_system_refuses() -> None:
    """Said once; those that there are compute all of it."""
    code = """
import resource, torch
from moepack_formats.schemes import SCHEMES
from moepack_runtime.kernels import native, select
from tests.runtime.kernels.matrices import packed

shape, scheme = (512, 128), SCHEMES["q4g64"]
x, matrix = torch.randn(1, 128), packed(scheme, *shape)
wanted = native.linear(x, matrix, scheme, shape, None, int8=True, threads=1)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
most = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20), most))
engines = [select("native", threads=200) for _ in range(2)]
resource.setrlimit(resource.RLIMIT_AS, (most, most))
print(engines[0].threads, engines[1].threads)
print(all(torch.equal(e.linear(x, matrix, scheme, shape, None), wanted) for e in engines))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    threads, same = done.stdout.splitlines()
    first, second = map(int, threads.split())
    assert 1 <= first < 200
    assert same == "True"
    assert done.stderr.splitlines() == [
        f"the system gives {first} of 200 threads; computing is slower for it"
    ]
    assert second == first


def test_a_library_with_another_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    from moepack_runtime.kernels import native_library

    if native.available() is None:
        pytest.skip(native.why_not())
    monkeypatch.setattr(native_library, "ABI", 10_000)
    native_library._load.cache_clear()
    try:
        assert "another version (wanted ABI 10000" in native.why_not()
    finally:
        monkeypatch.undo()
        native_library._load.cache_clear()
