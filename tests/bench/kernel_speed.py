"""Measure the native kernels: packed bytes per second, beside the speed of memory.

    python tests/bench/kernel_speed.py [--threads 2] [--isa avx2] [--rounds 9] [SCHEME ...]

For each scheme: a linear of 14336 x 4096 and one of 2048 x 2048, and a MoE layer of OLMoE's shape
(hidden 2048, intermediate 1024, 8 experts a token) at one token. Matrices rotate through more
memory than any cache holds. Memory is read (`read`) in the same rounds, so that a ratio holds on
a machine with other work beside. The table goes to stderr, one JSON object to stdout.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moepack_formats.record import plan_record
from moepack_formats.schemes import SCHEMES, get_scheme
from moepack_runtime.cache.arena import Arena
from moepack_runtime.kernels import native

SPREAD = 256 << 20
"""Bytes that a measurement walks over: more than a last-level cache."""
HIDDEN, INTERMEDIATE, TOP_K = 2048, 1024, 8
LINEARS = ((14336, 4096), (2048, 2048))


def slots(nbytes: int, at_least: int = 1) -> list[Tensor]:
    """Buffers of random bytes that are finite in every float format."""
    count = max(at_least, SPREAD // nbytes)
    arena = Arena(-(-nbytes // 4096) * 4096, count)
    pattern = torch.randint(0, 0x3C, (nbytes,), dtype=torch.uint8)
    buffers = [arena.tensor(slot)[:nbytes] for slot in range(count)]
    for buffer in buffers:
        buffer.copy_(pattern)
    return buffers


def layer(name: str, int8: bool, threads: int) -> tuple[Callable[[], None], int]:
    """A round of MoE layers, and the bytes it reads."""
    spec = plan_record(HIDDEN, INTERMEDIATE, name, name)
    records = slots(spec.nbytes, TOP_K)
    rounds = max(1, len(records) // TOP_K)
    picks = [random.sample(records, TOP_K) for _ in range(rounds)]
    fused = native.FusedExperts(HIDDEN, INTERMEDIATE, True, ("silu", 1.0, float("inf"), 0.0))
    x, weights, specs = torch.randn(HIDDEN), torch.full((TOP_K,), 1 / TOP_K), [spec] * TOP_K

    def run() -> None:
        for pick in picks:
            fused(x, pick, specs, weights, int8=int8, threads=threads)

    return run, rounds * TOP_K * spec.payload_nbytes


def linear(
    name: str, rows: int, cols: int, int8: bool, threads: int
) -> tuple[Callable[[], None], int]:
    """A round of products with different matrices, and the bytes it reads."""
    scheme = get_scheme(name)
    matrices, x = slots(scheme.packed_nbytes(rows, cols)), torch.randn(1, cols)

    def run() -> None:
        for matrix in matrices:
            native.linear(x, matrix, scheme, (rows, cols), None, int8=int8, threads=threads)

    return run, sum(matrix.numel() for matrix in matrices)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, int8: bool, threads: int, rounds: int) -> dict[str, float]:
    """Median GB/s of a scheme's measurements and of plain reading, round by round."""
    memory = slots(SPREAD)[0]
    runs = {"read": (lambda: native.read_memory(memory, threads), SPREAD)}
    runs["layer"] = layer(name, int8, threads)
    for rows, cols in LINEARS:
        runs[f"{rows}x{cols}"] = linear(name, rows, cols, int8, threads)
    times: dict[str, list[float]] = {key: [] for key in runs}
    for run, _ in runs.values():
        run()
    for _ in range(rounds):
        for key, (run, _) in runs.items():
            times[key].append(seconds(run))
    speeds = {key: runs[key][1] / statistics.median(times[key]) / 1e9 for key in runs}
    ratios = [
        (runs["layer"][1] / layer_time) / (SPREAD / read_time)
        for layer_time, read_time in zip(times["layer"], times["read"], strict=True)
    ]
    return {
        **{key: round(speed, 2) for key, speed in speeds.items()},
        "layer_us": round(
            TOP_K
            * plan_record(HIDDEN, INTERMEDIATE, name, name).payload_nbytes
            / speeds["layer"]
            / 1e3,
            1,
        ),
        "layer_of_read": round(statistics.median(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("schemes", nargs="*", default=[n for n in SCHEMES if n != "f32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--activations", choices=["int8", "float"], default="int8")
    parser.add_argument("--isa", help="portable, avx2, avx512, avx512_vbmi or neon")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if native.available() is None:
        sys.exit(native.why_not())
    if arguments.isa:
        native.set_isa(arguments.isa)
    columns = ["read", *(f"{rows}x{cols}" for rows, cols in LINEARS), "layer", "layer_us"]
    print(
        f"{native.available()}, {arguments.threads} threads, GB/s of packed bytes", file=sys.stderr
    )
    print(f"{'scheme':9}" + "".join(f"{c:>12}" for c in [*columns, "layer/read"]), file=sys.stderr)
    results = {}
    for name in arguments.schemes:
        found = measure(name, arguments.activations == "int8", arguments.threads, arguments.rounds)
        cells = [*(found[column] for column in columns), found["layer_of_read"]]
        print(f"{name:9}" + "".join(f"{cell:12.2f}" for cell in cells), file=sys.stderr)
        results[name] = found
    print(json.dumps({"isa": native.available(), "threads": arguments.threads, "gb_s": results}))


if __name__ == "__main__":
    main()
