"""A model larger than memory: moepack and llama.cpp under the same limit, on the same disk.

    python tests/bench/memory.py PACK --gguf MODEL.gguf [--limit 1685MB] [--rounds 3]
    make bench-memory

Both get the same uniformly random tokens, never what they write themselves: greedy text repeats
itself, which flatters every cache. Rounds are interleaved and start with the files out of the page
cache. The disk's ceiling is measured between moepack's tokens, at the size of a record and with as
many reads at a time. Without PACK and MODEL.gguf both are made first (16 GB of disk, some
minutes). As root the limit is a control group and the disk's read-ahead is 128 KiB, the kernel's
usual one, which is llama.cpp's fair case; otherwise what could not be set is said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from moepack_runtime.options import format_size, parse_size  # noqa: E402
from tests import memory_limit  # noqa: E402

READ_AHEAD_KIB = 128
BUILD = ROOT / "build" / "bench-memory"


@dataclass
class Results:
    """What the rounds gave, in their order.

    Attributes:
        moepack: JSON of each run of ``memory_moepack.py``.
        llama: JSON of each run of ``memory_llama.py``.
        peaks: Most bytes charged to moepack's group.
    """

    moepack: list[dict[str, Any]] = field(default_factory=list)
    llama: list[dict[str, Any]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


class Limit:
    """Runs a child under the limit, by the first means that works here.

    Attributes:
        how: What the limit is, for a person.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._group = memory_limit.why_not() is None
        self._scope = not self._group and _works("systemd-run", *self._scope_words(), "true")
        self.how = (
            "control group"
            if self._group
            else "systemd scope"
            if self._scope
            else "NONE: no limit could be set, so only --ram holds and llama.cpp has all memory"
        )

    def run(self, *words: object) -> tuple[dict[str, Any], int]:
        """The child's JSON, and the peak of its group in bytes (0 if not known)."""
        if self._group:
            with memory_limit.limited(self._nbytes) as group:
                done = group.run(words)
                peak = group.peak_nbytes
        else:
            scope = ["systemd-run", *self._scope_words()] if self._scope else []
            command = [*scope, *(str(word) for word in words)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            peak = 0
        if done.returncode:
            raise SystemExit(f"{words}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result, peak

    def _scope_words(self) -> list[str]:
        limits = ["-p", f"MemoryMax={self._nbytes}", "-p", "MemorySwapMax=0"]
        return ["--user", "--scope", "--quiet", *limits]


def _works(*words: str) -> bool:
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def read_ahead(path: Path) -> Iterator[str]:
    """Set the disk's read-ahead; yields what it is now."""
    number = os.stat(path).st_dev
    disk = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if not (disk / "queue").is_dir():
        disk = disk.parent  # a partition's queue is its disk's
    setting = disk / "queue" / "read_ahead_kb"
    try:
        before = setting.read_text().strip()
        setting.write_text(str(READ_AHEAD_KIB))
    except OSError as error:
        yield f"not set ({error})"
        return
    try:
        yield f"{READ_AHEAD_KIB} KiB (was {before})"
    finally:
        setting.write_text(before)


def measure(options: argparse.Namespace, limit: Limit) -> tuple[Results, float]:
    """All rounds, and the seconds a token takes when every expert is in memory."""
    here = Path(__file__).parent
    counts = ["--warm", options.warm, "--tokens", options.tokens]
    moepack = [sys.executable, here / "memory_moepack.py", options.pack, *counts]
    files = [path for path in options.pack.rglob("*") if path.is_file()]
    results = Results()
    vocabulary = json.loads((options.pack / "config.json").read_text())["vocab_size"]
    for seed in range(options.rounds):
        memory_limit.drop_from_page_cache(files)
        found, peak = limit.run(*moepack, "--ram", options.limit, "--seed", seed, *options.more)
        results.moepack.append(found)
        results.peaks.append(peak)
        if options.gguf:
            memory_limit.drop_from_page_cache([options.gguf])
            ids = _token_ids(vocabulary, options.warm + options.llama_tokens, seed)
            words = [options.gguf, "--ids", json.dumps(ids), "--warm", options.warm]
            results.llama.append(limit.run(sys.executable, here / "memory_llama.py", *words)[0])
    everything = [*moepack, "--io", "mmap", "--fill", "--prefetch", "0", "--ram", "16GB"]
    done = subprocess.run([str(w) for w in everything], capture_output=True, text=True, check=True)
    return results, json.loads(done.stdout.splitlines()[-1])["median_ms"] / 1e3


def _token_ids(vocabulary: int, count: int, seed: int) -> list[int]:
    from memory_moepack import token_ids

    return token_ids(vocabulary, count, seed)


def summary(results: Results, compute_s: float) -> dict[str, Any]:
    """Medians and ranges."""
    speed = [run["tokens_per_s"] for run in results.moepack]
    missed = statistics.median(run["missed_per_token"] for run in results.moepack)
    fractions = []
    for run in results.moepack:
        ideal_s = max(compute_s, run["missed_per_token"] / run["disk_bytes_per_s"])
        fractions.append(run["tokens_per_s"] * ideal_s)
    values: dict[str, Any] = {
        "tokens_per_s": spread(speed),
        "tokens_per_s_by_round": speed,
        "hit_ratio": spread([run["hit_ratio"] for run in results.moepack]),
        "unguessed_tokens_by_round": [run["unguessed_tokens"] for run in results.moepack],
        "missed_per_token": missed,
        "read_per_token": statistics.median(run["read_per_token"] for run in results.moepack),
        "disk_bytes_per_s": spread([run["disk_bytes_per_s"] for run in results.moepack]),
        "compute_s": compute_s,
        "of_the_ceiling": spread(fractions),
        "peak_nbytes": max(results.peaks),
        "memory": results.moepack[-1]["memory"],
        "residency": results.moepack[-1]["residency"],
    }
    if results.llama:
        theirs = [run["tokens_per_s"] for run in results.llama]
        values["llama_tokens_per_s"] = spread(theirs)
        values["llama_tokens_per_s_by_round"] = theirs
        values["llama_read_per_token"] = statistics.median(
            run["read_per_token"] for run in results.llama
        )
        values["ratio"] = spread([a / b for a, b in zip(speed, theirs, strict=True)])
    return values


def spread(values: list[float]) -> list[float]:
    """Median, least and most."""
    return [round(x, 4) for x in (statistics.median(values), min(values), max(values))]


def show(values: dict[str, Any], limit: Limit, ahead: str) -> None:
    """The results for a person, on stderr."""

    def line(name: str, text: str) -> None:
        print(f"{name:22}{text}", file=sys.stderr)

    def three(key: str, scale: float = 1, digits: int = 2) -> str:
        median, least, most = (f"{scale * value:.{digits}f}" for value in values[key])
        return f"{median} ({least} to {most})"

    line("limit", limit.how)
    line("read-ahead", ahead)
    line("moepack", f"{three('tokens_per_s')} tokens/s; {values['residency']}")
    if "ratio" in values:
        read = format_size(values["llama_read_per_token"])
        line("llama.cpp", f"{three('llama_tokens_per_s')} tokens/s; {read} read a token")
        line("ratio", three("ratio"))
    line("hits", f"{three('hit_ratio', 100, 1)} %")
    missed, read = (format_size(values[f"{key}_per_token"]) for key in ("missed", "read"))
    line("bytes a token", f"{missed} missed, {read} read")
    line("disk", f"{three('disk_bytes_per_s', 1e-6, 0)} MB/s")
    line("compute", f"{1e3 * values['compute_s']:.1f} ms a token with everything in memory")
    line("of the ceiling", f"{three('of_the_ceiling', 100, 1)} %")
    memory = values["memory"]["end"]
    line("memory", ", ".join(f"{format_size(n)} {kind}" for kind, n in memory.items()))
    line("peak of the group", format_size(values["peak_nbytes"]))


def make_inputs(options: argparse.Namespace) -> None:
    """Make the pack and the GGUF that were not named."""
    here = Path(__file__).parent
    if options.pack is None:
        options.pack = BUILD / "olmoe-2"
        if not (options.pack / "moepack.json").exists():
            source = BUILD / "source"
            run = [sys.executable, here / "make_checkpoint.py", "olmoe-1b-7b", "--out", source]
            subprocess.run(run, check=True)
            convert = [sys.executable, "-m", "moepack", "convert", source, options.pack]
            bits = ["--attn-bits", "4", "--expert-bits", "2", "--head-bits", "8"]
            subprocess.run([*convert, *bits, "--quantizer", "rtn"], check=True)
            for path in source.iterdir():
                path.unlink()
    if options.gguf is None and not options.alone:
        options.gguf = BUILD / "olmoe-Q2_K.gguf"
        if not options.gguf.exists():
            BUILD.mkdir(parents=True, exist_ok=True)
            make = [sys.executable, here / "make_gguf.py", "Q2_K", "--out", options.gguf]
            subprocess.run(make, check=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", type=Path, nargs="?")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    parser.add_argument("--limit", type=parse_size, default=parse_size("1685MB"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--llama-tokens", type=int, default=32)
    parser.add_argument(
        "--more", type=str.split, default=[], help='options of memory_moepack.py: "--prefetch 0"'
    )
    options = parser.parse_args()
    # Ended from outside, the disk's setting and the control group are still put back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    make_inputs(options)
    limit = Limit(options.limit)
    with read_ahead(options.pack) as ahead:
        results, compute_s = measure(options, limit)
    values = summary(results, compute_s)
    show(values, limit, ahead)
    print(json.dumps({**values, "limit": limit.how, "read_ahead": ahead}, default=_finite))


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
