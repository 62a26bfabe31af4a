"""Measure `moepack convert` on a random checkpoint: parameters a second and peak memory.

    python tests/bench/convert_speed.py [--shape olmoe-1b-7b] [--layers 2] [-- CONVERT OPTIONS]

Prints one JSON object on stdout; the conversion's own output goes to stderr. The checkpoint is
made under --work and kept there for the next run; the pack is removed unless --keep is given.
Times include the start of the interpreter and its imports, as a user sees them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from math import prod
from pathlib import Path

HERE = Path(__file__).resolve().parent


def source_parameters(folder: Path) -> int:
    """Count the values of a checkpoint from its safetensors headers alone."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        total += sum(prod(entry["shape"]) for entry in header.values())
    return total


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run_measured(command: list[str]) -> tuple[int, float, int]:
    """Run a command with its stdout on our stderr.

    Returns:
        Its exit status, wall seconds and peak resident set size in bytes. A child's peak starts at
        what its parent had resident, so this process must stay small: no torch here.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait again
    unit = 1 if sys.platform == "darwin" else 1024
    return process.returncode, seconds, usage.ru_maxrss * unit


def checkpoint(shape: str, layers: int | None, seed: int, work: Path) -> Path:
    """Return the folder of a random checkpoint, made by an earlier run or now."""
    folder = work / f"{shape}-{'all' if layers is None else layers}-layers-seed-{seed}"
    done = folder / "config.json"  # written after the shards
    if not done.exists():
        command = [sys.executable, str(HERE / "make_checkpoint.py"), shape, "--out", str(folder)]
        command += ["--seed", str(seed)]
        if layers is not None:
            command += ["--layers", str(layers)]
        subprocess.run(command, check=True)
    return folder


def main() -> None:
    """Read the command line, convert once and print the figures."""
    parser = argparse.ArgumentParser(description="measure the speed and memory of moepack convert")
    parser.add_argument("--shape", default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, help="number of layers, the shape's own if absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--source", type=Path, help="measure this checkpoint, make none")
    parser.add_argument("--keep", action="store_true", help="do not remove the pack")
    parser.add_argument("options", nargs="*", help="after --: options for moepack convert")
    arguments = parser.parse_args()

    source = arguments.source or checkpoint(
        arguments.shape, arguments.layers, arguments.seed, arguments.work
    )
    pack = arguments.work / f"{source.name}-pack"
    shutil.rmtree(pack, ignore_errors=True)  # an unfinished one would be resumed
    code = "import sys; from moepack.cli import main; sys.argv[0] = 'moepack'; sys.exit(main())"
    convert = [sys.executable, "-c", code, "convert", str(source), str(pack), *arguments.options]
    status, seconds, peak = run_measured(convert)
    if status != 0:
        sys.exit(status)

    parameters = source_parameters(source)
    report = {
        "source": source.name,
        "options": arguments.options,
        "parameters": parameters,
        "seconds": round(seconds, 2),
        "parameters_per_second": round(parameters / seconds),
        "peak_rss_bytes": peak,
        "source_bytes": folder_bytes(source),
        "pack_bytes": folder_bytes(pack),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }
    if not arguments.keep:
        shutil.rmtree(pack)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
