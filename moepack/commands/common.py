"""Options and habits that the commands share."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from moepack_formats import osio
from moepack_formats.errors import UsageError
from moepack_runtime.options import (
    ACTIVATIONS,
    DEVICES,
    ENGINES,
    GPU_OPTIONS,
    HYBRID_MODES,
    IO_MODES,
    MAX_THREADS,
    SCOPES,
    RuntimeOptions,
    format_size,
    parse_size,
)
from moepack_runtime.policies import runnable_names
from moepack_runtime.statistics import Statistics

_log = logging.getLogger(__name__)

_SLOT_OPTIONS = ("slots", "policy", "scope", "pin", "cache_bias")
"""Options about slots, by parameter name; mapped files have none."""

F = TypeVar("F", bound=Callable[..., Any])


def common_options(function: F) -> F:
    """``--json``, ``--verbose`` and ``--debug``."""
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("-v", "--verbose", is_flag=True, help="Say more on stderr."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    ):
        function = option(function)
    return function


def _choice(name: str, choices: Sequence[str], text: str) -> Callable[[F], F]:
    """An option for a field of :class:`RuntimeOptions` that has one of a few values."""
    default = getattr(RuntimeOptions, name.removeprefix("--"))
    return click.option(
        name, type=click.Choice(choices), default=default, show_default=True, help=text
    )


def runtime_options(function: F) -> F:
    """The options of every command that runs a model."""
    for option in (
        click.option(
            "--threads",
            type=click.IntRange(1, MAX_THREADS),
            help="Threads [default: physical cores].",
        ),
        _choice("--device", DEVICES, "Where to compute; auto is a GPU where there is one."),
        click.option(
            "--compile/--no-compile",
            "compile",
            default=RuntimeOptions.compile,
            help="On a GPU: decode with CUDA graphs of everything between experts that have to be "
            "brought, of whole tokens where all are there. Tracing the model for them takes up to "
            "minutes, and the cache of the text has the full size of --context.",
        ),
        _choice(
            "--hybrid",
            HYBRID_MODES,
            "Experts that are not in GPU memory: compute them on the CPU never, always, or "
            "where that is estimated to be faster than copying. The CPU rounds otherwise than the "
            "GPU: only with off does any budget give the same tokens.",
        ),
        _choice(
            "--activations",
            ACTIVATIONS,
            "Inputs of packed matrices: rounded to 8 bits, or exact and slower.",
        ),
        _choice(
            "--engine",
            ENGINES,
            "What computes with packed weights; auto is native where it was built.",
        ),
        click.option(
            "--cache-bias",
            type=click.FloatRange(0, 1),
            default=RuntimeOptions.cache_bias,
            metavar="X",
            help="Lossy: choose experts in memory where router scores are close, X of their spread "
            "(such as 0.1); `moepack eval` says what it costs [default: 0, off].",
        ),
        click.option(
            "--pin",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="TRACE",
            help="Keep the experts most used in a trace, in half of the memory for experts.",
        ),
        _choice(
            "--scope",
            SCOPES,
            "Whether all layers share the memory for experts or each has an equal part.",
        ),
        _choice("--policy", runnable_names(), "Which cached expert gives way."),
        click.option(
            "--record/--no-record",
            "tape",
            default=RuntimeOptions.tape,
            help="On the CPU: record one decoded token and let the native library play the next "
            "ones, which is faster; or leave all of them to transformers' own code.",
        ),
        click.option(
            "--prefetch/--no-prefetch",
            default=RuntimeOptions.prefetch,
            help="Guess the next layer's experts.",
        ),
        _choice(
            "--io",
            IO_MODES,
            "How records are read; auto maps the files when the whole pack fits and reads "
            "them past the page cache otherwise.",
        ),
        click.option(
            "--slots",
            type=click.IntRange(1),
            metavar="N",
            help="Keep at most N experts in memory [default: as many as --ram allows].",
        ),
        click.option("--revision", help="Branch, tag or commit of a Hub id."),
        click.option(
            "--ram",
            type=parse_size,
            metavar="SIZE",
            help="Memory for the whole process, as 6GiB [default: a safe share of what is free].",
        ),
        click.option(
            "--vram",
            type=parse_size,
            metavar="SIZE",
            help="GPU memory for trunk, experts and the text's context [default: a safe share of "
            "what is free].",
        ),
        click.option(
            "--context",
            type=click.IntRange(1),
            metavar="TOKENS",
            help="The longest text, prompt and answer, that --vram has room for [default: 4096, "
            "or as many as the model reads].",
        ),
    ):
        function = option(function)
    return function


def read_text(path: Path) -> str:
    """A text file that the user names.

    Raises:
        UsageError: It is not UTF-8.
        ResourceError: It cannot be read.
    """
    try:
        with osio.io_errors(path):
            return path.read_text(encoding="utf-8")  # line ends of any system become \n
    except UnicodeDecodeError:
        raise UsageError("not a UTF-8 text", where=path) from None


def set_up(verbose: bool) -> None:
    """Quiet libraries, warnings of ours on stderr, no progress bars but our own."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="moepack: %(message)s", stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Torch's threads would spin for milliseconds after each of its operations, on the cores that
    # the native kernels' threads want. GNU's OpenMP takes a number of turns, some 20 us here: to
    # the next of torch's own operations, whose threads would have to be woken otherwise. Read when
    # torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if not verbose:  # what is tried again is no news
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def load(
    pack: str,
    *,
    io: str,
    pin: Path | None,
    threads: int | None,
    **more: Any,
) -> Any:
    """Load a pack for a command, fetching it first if ``pack`` is a Hub id.

    Args:
        pack: Folder or Hub id.
        io: As in :class:`RuntimeOptions`.
        pin: A trace whose most used experts stay.
        threads: None for one for each physical core.
        more: The other options of :func:`runtime_options`, and fields of
            :class:`RuntimeOptions` that have no option.

    Raises:
        UsageError: There is no such device, or an option was given that would do nothing.
        MoepackError: The pack is not valid or does not fit.
    """
    if io == "mmap":
        refuse_with("--io mmap, where the page cache decides", *_SLOT_OPTIONS)
    import torch
    from transformers.utils import logging as transformers_logging

    if not more.get("compile"):  # which needs torch's compiler
        from moepack_runtime.lean_imports.lean_transformers import import_transformers

        import_transformers()
    from moepack_runtime.gpu.tier import on_cpu
    from moepack_runtime.loading import load_pack
    from moepack_runtime.trace.trace_file import most_used, read_trace

    if on_cpu(RuntimeOptions(device=more["device"], link=more.get("link"))):
        _refuse_gpu_options()
        more["context"] = None  # of a command's own
    pins = most_used(read_trace(pin)) if pin is not None else ()
    transformers_logging.disable_progress_bar()
    threads = threads or physical_cores()
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = load_pack(pack, io=io, pins=pins, threads=threads, **more)
    unused = given(*_SLOT_OPTIONS)
    if unused and is_mapped(model):
        _log.info("the whole pack fits and is mapped: %s does nothing", ", ".join(unused))
    return model


def pack_tokenizer(model: Any, pack: str) -> Any:
    """The tokenizer of a loaded pack; ``pack`` is what the user named.

    Raises:
        UsageError: The pack has none.
    """
    from moepack_runtime.loading import load_tokenizer

    tokenizer = load_tokenizer(model.moepack.pack.folder)
    if tokenizer is None:
        raise UsageError("the pack has no tokenizer: its source had none", where=pack)
    return tokenizer


def given(*names: str) -> list[str]:
    """Which of some options, by parameter name, stand on the command line; as they stand there."""
    context = click.get_current_context(silent=True)
    if context is None:
        return []
    typed = {
        name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    return [p.opts[0] for p in context.command.params if p.name in typed]


def refuse_with(what: str, *names: str) -> None:
    """Refuse options that do nothing beside another one.

    Raises:
        UsageError: One of them was given.
    """
    for option in given(*names):
        raise UsageError(f"{option} does nothing with {what}", remedy="leave one of them out")


def _refuse_gpu_options() -> None:
    """Refuse options about a GPU; the CPU computes."""
    import torch

    for option in given(*GPU_OPTIONS):
        raise UsageError(
            f"{option} does nothing where the CPU computes",
            got=None if torch.cuda.is_available() else "no CUDA device",
            remedy="leave it out",
        )


def is_mapped(model: Any) -> bool:
    """Whether a loaded pack's records are mapped files."""
    from moepack_runtime.cache.mapped import MappedRecords

    return isinstance(model.moepack.residency, MappedRecords)


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once."""
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            with open(path, encoding="ascii") as file:
                siblings.add(file.read().strip())
        except OSError:
            return len(allowed)
    return len(siblings)


def print_json(values: dict[str, Any]) -> None:
    """One JSON object on stdout; floats that are not numbers become null."""
    click.echo(json.dumps(_finite(values), ensure_ascii=False, allow_nan=False))


def say(line: str) -> None:
    """One line for a person, on stderr."""
    click.echo(line, err=True)


def statistics_json(stats: Statistics, model: Any) -> dict[str, Any]:
    """Counters of a run, under the names that every command's JSON uses.

    What is read of mapped files, and when, the page cache decides and does not tell: null.
    """
    known = not is_mapped(model)
    return {
        "hits": stats.hits if known else None,
        "misses": stats.misses if known else None,
        "hit_ratio": stats.hit_ratio if known else None,
        "prefetch_recall": stats.recall,
        "prefetch_stops": stats.prefetch_stops,
        "bytes_read": stats.bytes_read if known else None,
        "bytes_per_token": stats.bytes_per_token if known else None,
        "bytes_copied": stats.bytes_copied,
        "computed_on_cpu": stats.computed_on_cpu,
    }


def statistics_line(stats: Statistics, model: Any) -> str:
    """Counters of a run for a person."""
    parts = []
    known = not is_mapped(model)
    if not known:
        parts.append("cache hits not known: the page cache decides")
    elif stats.hit_ratio is not None:
        demands = stats.hits + stats.misses
        parts.append(f"cache hits {stats.hit_ratio:.1%} ({stats.hits} of {demands})")
    recall = "none" if stats.recall is None else f"{stats.recall:.1%}"
    parts.append(f"prefetch recall {recall}")
    if known:
        parts.append(f"{format_size(stats.bytes_read)} read")
    if stats.bytes_copied:
        parts.append(f"{format_size(stats.bytes_copied)} copied to the GPU")
    return ", ".join(parts)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
