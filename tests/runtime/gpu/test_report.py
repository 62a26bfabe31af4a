"""What ``make bench-gpu`` runs, over a simulated link and in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moepack_runtime.gpu.simulated_link import LinkSpec, SimulatedLink
from moepack_runtime.kernels.reference import ReferenceEngine
from moepack_runtime.loading import load_pack
from moepack_runtime.policies import runnable_names
from tests.bench.gpu import kernels, models, offloading, report

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def run(tokens: int = 12) -> offloading.Run:
    load = offloading.Workload(kernels.Shape(64, 64, 2), "q4g64", 3, 8, tokens, attention=False)
    spec = LinkSpec(bandwidth=1e9, latency=0.0, memory_bandwidth=1e11, layer_seconds=10e-6)
    return offloading.Run(load, ReferenceEngine(), SimulatedLink(spec))


def test_every_setting_computes_the_same_and_waits_once_a_layer() -> None:
    it = run()
    rows = [
        it.measure("full", share=0.25, prefetch=True),
        it.measure("without prefetch", share=0.25, prefetch=False),
        it.measure("without cache", share=0.25, prefetch=False, keep=False),
        it.measure("naive", share=0.0, prefetch=False),
        it.measure("resident", share=1.0, prefetch=False),
    ]
    assert len({row.checksum for row in rows}) == 1
    assert all(row.waits_per_layer == 1 for row in rows)
    full, guessless, cacheless, naive, resident = rows
    assert full.recall == pytest.approx(offloading.RECALL, abs=0.15)
    assert naive.bytes_copied > cacheless.bytes_copied > guessless.bytes_copied > 0
    assert resident.bytes_copied == 0
    assert full.tokens_per_s > guessless.tokens_per_s > naive.tokens_per_s


def test_prefetch_where_copies_take_as_long_as_computing() -> None:
    assert report.simulated_prefetch() >= 1.3


def test_experts_alone_fill_the_link() -> None:
    assert offloading.expert_copy_rate(run()) >= 0.99e9


def test_what_graphs_are_worth_is_measured_in_turns(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "TOKENS", 6)
    monkeypatch.setattr(models, "ROUNDS", 1)
    rows = models.decoding_speeds(pack, link=LinkSpec(), device="cpu", hybrid="off")
    assert [(row.slots, row.compiled) for row in rows] == [
        ("all", False), ("all", True), ("half", False), ("half", True)
    ]  # fmt: skip
    written = report.Report()
    report.compiled_trunk(written, rows)
    assert "| half | True | " in written.text("GPU")
    assert len(written.checks) == 2


def test_a_row_that_fails_is_named_and_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def parity(report_: report.Report, _: torch.device) -> None:
        with report_.guard("parity of q4g64"):
            raise RuntimeError("out of resource: shared memory\nand more")
        report_.check("another row", "1", "1", True)

    def bandwidth(*_: object) -> None:
        raise ValueError("no GPU | at all")

    for part in (parity, bandwidth):
        monkeypatch.setattr(report, part.__name__, part)
    for name in ("offload", "whole_models"):
        part = lambda it, _: it.check("last", "1", "1", True)  # noqa: E731
        part.__name__ = name
        monkeypatch.setattr(report, name, part)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(sys, "argv", ["report", "--out", str(tmp_path)])
    assert report.main() == 2
    text = (tmp_path / "REPORT-A-GPU.md").read_text()
    failed = "| parity of q4g64 | measured | failed: RuntimeError: out of resource: shared memory |"
    assert failed in text
    assert "| bandwidth | measured | failed: ValueError: no GPU / at all | **no** |" in text
    assert text.count("| last | 1 | 1 | yes |") == 2
    assert "| another row | 1 | 1 | yes |" in text


def test_greedy_texts_are_compared_in_every_setting(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a simulated GPU, and policies that a cache can run: not the one that knows the future."""
    asked = []

    def load(path: Path, **options: Any) -> Any:
        asked.append(options.get("policy"))
        options.update(device="cpu", link=LinkSpec(), compile=False)
        return load_pack(path, **options)

    monkeypatch.setattr(models, "TOKENS", 3)
    monkeypatch.setattr(models, "load_pack", load)
    rows = models.greedy_everywhere(pack, CPU)
    assert all(row.same for row in rows)
    assert {row.policy for row in rows} == set(runnable_names())
    assert "belady" not in asked


def test_random_bytes_are_finite() -> None:
    data = kernels.finite_bytes(1 << 16, CPU)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert data.view(dtype).isfinite().all()


def test_kernels_of_the_report_run() -> None:
    """With the interpreter in place of a GPU; times mean nothing."""
    pytest.importorskip("triton")
    from tests.runtime.kernels.triton_gpu import interpreter

    interpreter.install()
    assert kernels.parity("q4g64", torch.float16, CPU, 64).one_token < 1e-2
    shape = kernels.Shape(64, 32, 1)
    assert kernels.expert_speed("q8g64", shape, CPU, 1).bytes_per_s > 0
    assert kernels.linear_speed("bf16", 32, 64, CPU, 1).bytes_per_s > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments", [["-m", "tests.bench.gpu.report"], ["tests/bench/gpu/need.py"]]
)
def test_without_a_gpu_there_is_one_clear_line(arguments: list[str]) -> None:
    before = reports()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr
    assert reports() == before


def reports() -> dict[Path, int]:
    """Reports that runs on this machine have left, and when."""
    return {path: path.stat().st_mtime_ns for path in (ROOT / "docs" / "gpu").glob("*")}
