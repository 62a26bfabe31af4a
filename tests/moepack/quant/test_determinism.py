"""The same weights give the same bytes, whatever the threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from moepack.quant import get_quantizer, quantize_matrix, walk
from moepack_formats.matrix import pack_matrix
from moepack_formats.schemes import SCHEMES, Scheme

QUANTIZED = [scheme for scheme in SCHEMES.values() if not scheme.is_raw]


def packed(weight: Tensor, scheme: Scheme, name: str) -> bytes:
    return bytes(pack_matrix(quantize_matrix(weight, scheme, get_quantizer(name))))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in a small matrix."""
    monkeypatch.setattr(walk, "CHUNK_WEIGHTS", 1 << 16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["hqq", "rtn"])
@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_number_of_threads(name: str, scheme: Scheme) -> None:
    # Large weights too: there the shrinkage takes part, and with it powers of residuals.
    weight = torch.randn(200, 1100, generator=torch.Generator().manual_seed(1))
    weight[:100] *= 0.02
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 3, 9):
            torch.set_num_threads(threads)
            found.add(packed(weight, scheme, name))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda scheme: scheme.name)
def test_rows_do_not_depend_on_their_neighbours(scheme: Scheme) -> None:
    weight = torch.randn(64, 700, generator=torch.Generator().manual_seed(2)) * 0.02
    weight[5] *= 40
    whole = quantize_matrix(weight, scheme, get_quantizer("rtn"))
    alone = quantize_matrix(weight[16:32], scheme, get_quantizer("rtn"))
    assert (whole.codes[16:32] == alone.codes).all()


def test_callers_in_several_threads() -> None:
    weight = torch.randn(300, 1024, generator=torch.Generator().manual_seed(3)) * 0.02
    scheme = SCHEMES["q3g32s4"]
    wanted = packed(weight, scheme, "hqq")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: packed(weight, scheme, "hqq"), range(8)))
    assert set(found) == {wanted}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork() -> None:
    """Worker threads are not there in a child process: it must not wait for them."""
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(4))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP itself does not survive a fork with more.
    try:
        quantize_matrix(weight, SCHEMES["q4g64"], get_quantizer("rtn"))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                quantize_matrix(weight, SCHEMES["q4g64"], get_quantizer("rtn"))
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


def test_workers_use_one_thread_each() -> None:
    """Torch's own threads under every worker would wait for each other all the time."""

    def threads_of_an_operation() -> int:
        torch.zeros(1 << 20).add_(1)
        return torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert walk.in_workers([threads_of_an_operation] * 9) == [1] * 9
    finally:
        torch.set_num_threads(before)
