"""``make bench-gpu``: measure this machine's GPU and write ``docs/gpu/REPORT-<gpu>.md``."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moepack_formats.schemes import SCHEMES
from moepack_runtime.gpu.simulated_link import LinkSpec
from tests.bench.gpu import kernels, models, offloading

FOLDER = Path(__file__).parents[3] / "docs" / "gpu"
NO_GPU = "no CUDA device: make bench-gpu needs one, and has measured nothing"


@dataclass
class Report:
    """Text and verdicts."""

    lines: list[str] = field(default_factory=list)
    checks: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def say(self, *lines: str) -> None:
        """Add text."""
        self.lines += lines
        print(*lines, sep="\n", file=sys.stderr, flush=True)

    def check(self, what: str, wanted: str, got: str, holds: bool) -> None:
        """Add a verdict."""
        self.checks.append((what, wanted, got, holds))
        print(f"{'ok  ' if holds else 'FAIL'} {what}: {got} (wanted {wanted})", file=sys.stderr)

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """One row or part: where it fails it is named in the report, and the others go on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            why = str(error).strip().partition("\n")[0].replace("|", "/")
            self.check(what, "measured", f"failed: {type(error).__name__}: {why}", False)
            with contextlib.suppress(RuntimeError):  # after some errors a GPU does nothing any more
                torch.cuda.empty_cache()

    def text(self, title: str) -> str:
        """The whole report as Markdown."""
        verdicts = [
            f"| {what} | {wanted} | {got} | {'yes' if holds else '**no**'} |"
            for what, wanted, got, holds in self.checks
        ]
        head = [f"# {title}", "", "| what | wanted | measured | holds |", "|---|---|---|---|"]
        return "\n".join([*head, *verdicts, "", *self.lines, ""])


def main() -> int:
    """Measure and write; 1 without a GPU, 2 where something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    import triton

    start = time.perf_counter()
    device = torch.device("cuda", 0)
    name, report = torch.cuda.get_device_name(device), Report()
    report.say(
        "## Machine",
        "",
        f"{name}, compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}, "
        f"driver {_driver()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"Python {platform.python_version()}.",
        "",
    )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"REPORT-{re.sub('[^A-Za-z0-9]+', '-', name).strip('-')}.md"
    for part in (parity, bandwidth, offload, whole_models):
        with report.guard(part.__name__.replace("_", " ")):
            part(report, device)
        path.write_text(report.text(name))  # in case that the machine is taken away
    report.say(f"Measured in {time.perf_counter() - start:.0f} s.")
    path.write_text(report.text(name))
    print(path)
    return 0 if all(holds for *_, holds in report.checks) else 2


def parity(report: Report, device: torch.device) -> None:
    """Every scheme against the reference."""
    report.say(
        "## Parity",
        "",
        "Largest difference to the reference in float32, over the largest value; two experts.",
        "",
        "| scheme | type | one token | many tokens |",
        "|---|---|---|---|",
    )
    worst = 0.0
    # A process a scheme: most of the time goes into compiling, and what they compile stays in
    # Triton's cache for the measurements below.
    context = multiprocessing.get_context("spawn")
    workers = min(len(SCHEMES), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        tables = {scheme: pool.submit(scheme_parity, scheme, device) for scheme in SCHEMES}
    for scheme, table in tables.items():
        with report.guard(f"parity of {scheme}"):
            for row in table.result():
                worst = max(worst, row.one_token, row.many_tokens)
                report.say(
                    f"| {row.scheme} | {row.dtype} | {row.one_token:.1e} | {row.many_tokens:.1e} |"
                )
    report.say("")
    report.check("kernel parity", "1e-2", f"{worst:.1e}", worst <= 1e-2)


def scheme_parity(scheme: str, device: torch.device) -> list[kernels.Parity]:
    """A scheme's rows; compiles the kernels that are measured later."""
    rows = [kernels.parity(scheme, dtype, device) for dtype in (torch.bfloat16, torch.float16)]
    kernels.expert_speed(scheme, kernels.MIXTRAL, device, cycled=1)
    kernels.linear_speed(scheme, 4096, 4096, device, cycled=1)
    return rows


def bandwidth(report: Report, device: torch.device) -> None:
    """Matrix-vector kernels against a copy within GPU memory."""
    from moepack_runtime.gpu.measure import device_copy_bandwidth

    copy = device_copy_bandwidth(device)
    report.say(
        "## Kernels",
        "",
        f"A copy within GPU memory reads and writes {copy / 1e9:.0f} GB/s. Kernels cycle over "
        f"{kernels.CYCLED / 1e9:.1f} GB of records; Mixtral's layer shape, two experts a token.",
        "",
        "| kernel | scheme | GB/s | of the copy |",
        "|---|---|---|---|",
    )
    least = 1.0
    for scheme in SCHEMES:
        with report.guard(f"decode kernels of {scheme}"):
            speeds = [kernels.expert_speed(scheme, kernels.MIXTRAL, device)]
            if scheme in ("q4g64", "q6g64", "q8g64", "bf16"):
                speeds.append(kernels.linear_speed(scheme, 4096, 4096, device))
            for speed in speeds:
                rate, share = speed.bytes_per_s, speed.bytes_per_s / copy
                least = min(least, share)
                report.say(f"| {speed.what} | {scheme} | {rate / 1e9:.0f} | {share:.0%} |")
        torch.cuda.empty_cache()
    report.say("", "| prefill, scheme | tokens | tokens/s | TFLOP/s |", "|---|---|---|---|")
    for scheme in ("q2g16s4", "q3g32s4", "q4g64"):
        for tokens in (64, 512):
            with report.guard(f"prefill of {tokens} tokens in {scheme}"):
                speed_, operations = kernels.prefill_speed(scheme, kernels.MIXTRAL, tokens, device)
                report.say(f"| {scheme} | {tokens} | {speed_:.0f} | {operations / 1e12:.1f} |")
    report.say("")
    report.check("decode kernels, of the copy's bandwidth", "60%", f"{least:.0%}", least >= 0.6)


def offload(report: Report, device: torch.device) -> None:
    """The paper's table at Mixtral's layer shape, a quarter of the experts resident."""
    from moepack_runtime.gpu.cuda_link import CudaLink
    from moepack_runtime.gpu.measure import pinned_copy_peak
    from moepack_runtime.kernels.triton_gpu.engine import TritonEngine

    link = CudaLink(device)
    peak = pinned_copy_peak(link)
    load = offloading.Workload(kernels.MIXTRAL, "q2g16s4", layers=8, experts=8, tokens=64)
    run = offloading.Run(load, TritonEngine(), link)
    settings: dict[str, dict[str, Any]] = {
        "full": {"share": 0.25, "prefetch": True},
        "without prefetch": {"share": 0.25, "prefetch": False},
        "without cache and prefetch": {"share": 0.25, "prefetch": False, "keep": False},
        "naive": {"share": 0.0, "prefetch": False},
        "everything resident": {"share": 1.0, "prefetch": False},
    }
    rows: dict[str, offloading.Result] = {}
    for name, setting in settings.items():
        with report.guard(f"offloading, {name}"):
            rows[name] = run.measure(name, **setting)
    report.say(
        "## Offloading",
        "",
        f"{load.layers} layers of {load.experts} experts, {load.scheme}, "
        f"{run.pack.nbytes / 1e6:.1f} MB a record; slots for a quarter of them; {load.tokens} "
        f"tokens; choices drawn (a token keeps {offloading.STAYS:.0%} of the last one's, guesses "
        f"are right {offloading.RECALL:.0%} of the time). Pinned copies reach {peak / 1e9:.1f} "
        "GB/s.",
        "",
        "| setting | tokens/s | hits | recall | MB a token | of the link's peak |",
        "|---|---|---|---|---|---|",
        *(_row(row, load.tokens, peak) for row in rows.values()),
        "",
    )
    with report.guard("expert copies"):
        share = offloading.expert_copy_rate(run) / peak
        report.check("expert copies, of the pinned peak", "90%", f"{share:.1%}", share >= 0.9)
    with report.guard("prefetch over a simulated link"):
        equal = simulated_prefetch()
        report.check("prefetch where copies take as long as computing", "1.3x", f"{equal:.2f}x",
                     equal >= 1.3)  # fmt: skip
    same = len({row.checksum for row in rows.values()}) == 1
    report.check("the same sums in every setting", "yes", "yes" if same else "no", same)
    if len(rows) == len(settings):  # what is missing is named above
        compare(report, rows, peak)


def compare(report: Report, rows: dict[str, offloading.Result], peak: float) -> None:
    """What cache and prefetch are worth, and how close to the machine's limits they come."""
    full, resident = rows["full"], rows["everything resident"]
    gain = full.tokens_per_s / rows["naive"].tokens_per_s
    report.check("full against naive", "3x", f"{gain:.1f}x", gain >= 3)
    bound = max(full.bytes_copied / peak, resident.seconds)
    over = full.seconds / bound - 1
    report.check("full, over max(copies, computing)", "15%", f"{over:.1%}", over <= 0.15)
    gain = full.tokens_per_s / rows["without prefetch"].tokens_per_s
    report.say(f"Prefetch on this link: {gain:.2f}x.", "")
    waits = full.waits_per_layer
    report.check("host waits a layer", "1", f"{waits:.2f}", waits <= 1)


def simulated_prefetch() -> float:
    """Prefetch's gain over a simulated link where a layer's copies take as long as its kernels."""
    from moepack_runtime.gpu.simulated_link import SimulatedLink
    from moepack_runtime.kernels.reference import ReferenceEngine

    load = offloading.Workload(
        kernels.Shape(64, 64, 2), "q4g64", layers=8, experts=8, tokens=40, attention=False
    )

    def measure(layer_seconds: float, prefetch: bool) -> offloading.Result:
        spec = LinkSpec(1e9, 0.0, memory_bandwidth=1e12, layer_seconds=layer_seconds)
        run = offloading.Run(load, ReferenceEngine(), SimulatedLink(spec))
        return run.measure("", share=0.25, prefetch=prefetch)

    copying = measure(0.0, False).bytes_copied / 1e9
    computing = copying / (load.tokens * load.layers)
    return measure(computing, False).seconds / measure(computing, True).seconds


def whole_models(report: Report, device: torch.device) -> None:
    """A converted model: the same greedy tokens whatever the memory, and the memory kept to."""
    with tempfile.TemporaryDirectory() as folder:
        pack = models.convert_tiny(Path(folder) / "pack")
        rows = models.greedy_everywhere(pack, device, report.guard)
        report.say(
            "## Greedy tokens",
            "",
            "tiny-moe, 4-bit attention and 3-bit experts, 48 tokens, `--hybrid off`.",
            "",
            "| slots for | policy | prefetch | cache | tokens/s | the same tokens |",
            "|---|---|---|---|---|---|",
            *(f"| {r.slots} | {r.policy} | {r.prefetch} | {r.cache} | {r.tokens_per_s:.0f} | "
              f"{r.same} |" for r in rows),
            "",
        )  # fmt: skip
        same = bool(rows) and all(row.same for row in rows)
        report.check("identical greedy tokens", "all", f"{sum(r.same for r in rows)} of "
                     f"{len(rows)} settings", same)  # fmt: skip
        with report.guard("compiled decoding"):
            compiled_trunk(report, models.decoding_speeds(pack, device="cuda", hybrid="off"))
    with report.guard("memory against --vram"):
        budget, used = models.memory_kept(device)
        off = abs(used / budget - 1)
        report.check("memory against --vram", "within 3%", f"{off:.1%}", off <= 0.03)


def compiled_trunk(report: Report, rows: list[models.Decoding]) -> None:
    """What CUDA graphs of the trunk are worth."""
    report.say(
        "## Compiled decoding",
        "",
        "tiny-moe, `--compile` and not, in turns; calls that give the GPU work, a token.",
        "",
        "| slots for | compiled | tokens/s | launches |",
        "|---|---|---|---|",
        *(
            f"| {r.slots} | {r.compiled} | {r.tokens_per_s:.0f} | "
            f"{'-' if r.launches is None else round(r.launches)} |"
            for r in rows
        ),
        "",
    )
    for slots in dict.fromkeys(row.slots for row in rows):
        speed = {row.compiled: row.tokens_per_s for row in rows if row.slots == slots}
        gain = speed[True] / speed[False]
        report.check(f"compiled, slots for {slots}", "faster", f"{gain:.2f}x", gain > 1)


def _row(row: offloading.Result, tokens: int, peak: float) -> str:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    return (
        f"| {row.name} | {row.tokens_per_s:.1f} | {share(row.hit_ratio)} | {share(row.recall)} | "
        f"{row.bytes_copied / tokens / 1e6:.1f} | {row.bytes_copied / row.seconds / peak:.1%} |"
    )


def _driver() -> str:
    command: list[Any] = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
