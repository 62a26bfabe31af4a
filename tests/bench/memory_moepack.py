"""One measurement of moepack for ``memory.py``, in a process of its own: prints one JSON object.

``python tests/bench/memory_moepack.py PACK --ram 1685MB --warm 16 --tokens 48``
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moepack_runtime.lean_imports.lean_transformers import import_transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import_transformers()  # as the command line does

from moepack_formats.pack import Pack  # noqa: E402
from moepack_runtime.loading import load_pack  # noqa: E402
from moepack_runtime.memory.available import own_nbytes  # noqa: E402
from moepack_runtime.options import parse_size  # noqa: E402
from tests.bench.disk import Disk  # noqa: E402


def token_ids(vocabulary: int, count: int, seed: int) -> list[int]:
    """Uniformly random tokens: what a model writes by itself repeats, which flatters a cache."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count,), generator=generator).tolist()


def resident() -> dict[str, int]:
    """Bytes of this process's memory by kind, as the kernel tells it."""
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(facts[key].split()[0]) * 1024
        for name, key in (("anonymous", "RssAnon"), ("files", "RssFile"), ("tables", "VmPTE"))
    }


def run(
    model: Any, ids: list[int], context: int, disk: Disk | None = None
) -> tuple[list[float], list[int]]:
    """Feed tokens one by one, from an empty context after every ``context`` of them.

    The disk has a turn after every seventh, which is not counted.

    Returns:
        Seconds of each token, and the process's own memory after every hundredth.
    """
    seconds, memory, cache = [], [], None
    for i, token in enumerate(ids):
        if i % context == 0:
            cache = None
        start = time.perf_counter()
        out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        seconds.append(time.perf_counter() - start)
        if disk is not None and i % 7 == 6:
            disk.turn()
        if i % 100 == 99:
            memory.append(own_nbytes())
    return seconds, memory


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack")
    parser.add_argument("--ram", type=parse_size)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--io", default="auto")
    parser.add_argument("--io-threads", type=int)
    parser.add_argument("--policy", default="lfu")
    parser.add_argument("--prefetch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--depth", type=int, default=4, help="reads at a time for the ceiling, or 0"
    )
    parser.add_argument("--fill", action="store_true", help="read every expert before timing")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads)
    imported = resident()
    model = load_pack(
        options.pack,
        ram=options.ram,
        slots=options.slots,
        io=options.io,
        io_threads=options.io_threads,
        policy=options.policy,
        prefetch=bool(options.prefetch),
        threads=options.threads,
    )
    runtime = model.moepack
    loaded = resident()
    if options.fill:
        for layer, records in enumerate(runtime.pack.layers):
            for _ in runtime.residency.fetch(layer, range(len(records))):
                pass
    vocabulary = model.config.get_text_config().vocab_size
    ids = token_ids(vocabulary, options.warm + options.tokens, options.seed)
    run(model, ids[: options.warm], options.context)
    runtime.stats.reset()
    disk = None
    if options.depth and not options.fill:
        disk = Disk(Pack(Path(options.pack)), options.depth, runtime.residency.holds)
    seconds, memory = run(model, ids[options.warm :], options.context, disk)
    stats = runtime.stats
    nbytes = statistics.mean(at.spec.nbytes for layer in runtime.pack.layers for at in layer)
    result = {
        "tokens_per_s": options.tokens / sum(seconds),
        "median_ms": 1e3 * statistics.median(seconds),
        "hit_ratio": stats.hit_ratio,
        "recall": stats.recall,
        "unguessed_tokens": stats.unguessed_tokens,
        "disk_bytes_per_s": None if disk is None else disk.bytes_per_s,
        "read_per_token": stats.bytes_per_token,
        # What was needed and was not there, whether a guess or a demand has fetched it.
        "missed_per_token": (stats.misses + stats.speculative_used) * nbytes / options.tokens,
        "residency": runtime.residency.describe(),
        "memory": {"imported": imported, "loaded": loaded, "end": resident()},
        "own_every_100_tokens": memory,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
