"""Operations of torch's that become steps of the native library, each against torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moepack_runtime.kernels import native
from moepack_runtime.tape.lower import Lowered, lower
from moepack_runtime.tape.record import Recorder
from moepack_runtime.tape.steps import NativeStep

pytestmark = pytest.mark.skipif(native.available() is None, reason=native.why_not())

X, B = torch.randn(1, 6, 3), torch.randn(8)
GROUPED, DENSE, EACH = torch.randn(8, 3, 3), torch.randn(8, 6, 3), torch.randn(6, 1, 2)
SHORT = GROUPED[..., :2].contiguous()
CASES = {
    "norm": lambda x: x.norm(p=2, dim=-1, keepdim=True),
    "norm without its axis": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "no padding": lambda x: torch.nn.functional.pad(x, (0, 0)),
    "ones": lambda x: torch.ones_like(x),
    "fives": lambda x: torch.full_like(x, 5.0),
    "groups of channels": lambda x: torch.conv1d(x, GROUPED, B, groups=2),
    "all channels": lambda x: torch.conv1d(x, DENSE, B),
    "each channel": lambda x: torch.conv1d(x, EACH, None, groups=6),
}
CALLS = {
    "padding": lambda x: torch.nn.functional.pad(x, (1, 0)),
    "norm of order 1": lambda x: x.norm(p=1, dim=-1),
    "norm of all": lambda x: torch.linalg.vector_norm(x),
    "two windows": lambda x: torch.conv1d(x, SHORT, B, groups=2),
    "groups of a view": lambda x: torch.conv1d(x[..., ::2], SHORT, B, groups=2),
}


def lowered(name: str) -> tuple[Lowered, Tensor, Tensor]:
    """What an operation becomes, where it writes, and what it must write there."""
    with Recorder() as recorder:
        out = {**CASES, **CALLS}[name](X)
    wanted = out.clone()
    (found,) = (made for step in recorder.steps if (made := lower(step, set())) is not None)
    out.fill_(torch.nan)
    return found, out, wanted


@pytest.mark.parametrize("name", CASES)
def test_native(name: str) -> None:
    found, out, wanted = lowered(name)
    assert isinstance(found, list)
    steps = (NativeStep * len(found))(*found)
    assert native.play(steps, 0, len(found), False, 2) == len(found)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_what_has_no_native_form_is_called(name: str) -> None:
    found, out, wanted = lowered(name)
    assert callable(found)
    found()
    torch.testing.assert_close(out, wanted)
