"""What a user may choose about running a pack, and the sizes they write."""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from moepack_formats.errors import UsageError

from .policies import Key, check_runnable

if TYPE_CHECKING:
    import torch

    from .gpu.simulated_link import LinkSpec

IO_MODES = ("auto", "direct", "buffered", "mmap")
ENGINES = ("auto", "native", "reference")
ACTIVATIONS = ("int8", "float")
DEVICES = ("auto", "cpu", "cuda")
HYBRID_MODES = ("off", "on", "auto")
SCOPES = ("global", "layer")
GPU_OPTIONS = ("vram", "context", "hybrid", "offload", "keep", "compile")
"""Fields of :class:`RuntimeOptions` that do nothing where the CPU computes."""
MAX_THREADS = 1024
"""More of them the system may refuse in the middle of a computation."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class RuntimeOptions:
    """How a pack is run.

    Attributes:
        ram: Bytes for everything that the process takes (interpreter and libraries, trunk, expert
            slots, context); None for a safe share of what is free.
        slots: The most expert slots, whatever ``ram`` allows; None for as many as fit.
        io: ``direct`` reads records into slots past the page cache, ``buffered`` through it;
            ``mmap`` computes from mapped files; ``auto`` maps when the whole pack fits in the
            budget and reads directly otherwise.
        prefetch: Whether the next layer's experts are guessed and read early.
        policy: Which cached expert gives way: a file in ``policies``.
        scope: ``global`` when all layers share the slots, ``layer`` when each has an equal part.
        pins: Experts that stay once they were read, the most wanted first; they fill at most half
            of the slots. :func:`moepack_runtime.trace.trace_file.most_used` finds them in a trace.
        cache_bias: How much routing is nudged towards resident experts, as a share of the spread
            of a token's router scores; not 0 changes what the model says.
        io_threads: Threads that read; None for as many as the disk was measured to need.
        engine: What computes with packed weights: ``native``, ``reference``, or ``auto`` for
            native where it was built.
        activations: ``int8`` or ``float``: whether inputs of quantized matrices are rounded to 8
            bits; see :func:`moepack_runtime.kernels.select`.
        threads: Threads of the native kernels; None for as many as torch has.
        dtype: What the trunk computes in, a torch dtype; None for float32 on the CPU, whatever
            the checkpoint's, and for what transformers is asked for on a GPU.
        tape: Whether decoding is recorded and played by the native library, where it can be.
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.
        vram: Bytes of GPU memory for the trunk, the expert slots there and the context; None for
            most of what is free.
        context: Tokens of the longest text, prompt and answer, that ``vram`` has to have room for;
            None for 4,096, or as many as the model reads if these are fewer.
        hybrid: Whether missing experts are computed on the CPU rather than copied: never, always,
            or where that is estimated to be faster.
        offload: What is moved to a GPU: ``experts`` as they are needed, or whole ``layers``, to
            compare with.
        keep: Whether experts stay in GPU memory after their use.
        compile: Whether decoding on a GPU is compiled into CUDA graphs.
        link: A simulated device; None for real ones.
    """

    ram: int | None = None
    slots: int | None = None
    io: str = "auto"
    prefetch: bool = True
    policy: str = "lfu"
    scope: str = "global"
    pins: tuple[Key, ...] = ()
    cache_bias: float = 0.0
    io_threads: int | None = None
    engine: str = "auto"
    activations: str = "int8"
    threads: int | None = None
    dtype: torch.dtype | None = None
    tape: bool = True
    device: str = "auto"
    vram: int | None = None
    context: int | None = None
    hybrid: str = "auto"
    offload: str = "experts"
    keep: bool = True
    compile: bool = False
    link: LinkSpec | None = None

    def __post_init__(self) -> None:
        if self.io not in IO_MODES:
            raise UsageError("unknown I/O mode", wanted=" or ".join(IO_MODES), got=self.io)
        for what, number in (
            ("threads", self.threads),
            ("I/O threads", self.io_threads),
            ("slots", self.slots),
            ("tokens of context", self.context),
        ):
            if number is not None and number < 1:
                raise UsageError(f"too few {what}", wanted="1 or more", got=number)
        for what, number in (("threads", self.threads), ("I/O threads", self.io_threads)):
            if number is not None and number > MAX_THREADS:
                raise UsageError(f"too many {what}", wanted=f"{MAX_THREADS} or less", got=number)
        for name, value, known in (
            ("engine", self.engine, ENGINES),
            ("activations", self.activations, ACTIVATIONS),
            ("device", self.device, DEVICES),
            ("hybrid", self.hybrid, HYBRID_MODES),
            ("offload", self.offload, ("experts", "layers")),
            ("scope", self.scope, SCOPES),
        ):
            if value not in known:
                raise UsageError(f"unknown {name}", wanted=" or ".join(known), got=value)
        if not 0 <= self.cache_bias <= 1:
            raise UsageError("not a cache bias", wanted="0 to 1", got=self.cache_bias)
        check_runnable(self.policy)


_DEFAULT = RuntimeOptions()
_current: contextvars.ContextVar[RuntimeOptions] = contextvars.ContextVar("moepack_options")


def current_options() -> RuntimeOptions:
    """The options that a model loaded now would get."""
    return _current.get(_DEFAULT)


@contextlib.contextmanager
def options(**changes: Any) -> Iterator[RuntimeOptions]:
    """Set options for the models that are loaded inside the block.

    ``with moepack.options(ram="6GiB"): AutoModelForCausalLM.from_pretrained(pack)``

    Raises:
        UsageError: No such option, or a value that it cannot have.
    """
    known = {field.name for field in fields(RuntimeOptions)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise UsageError(f"no option {unknown[0]!r}", wanted=f"one of {', '.join(sorted(known))}")
    for name in ("ram", "vram"):
        if isinstance(changes.get(name), str):
            changes[name] = parse_size(changes[name])
    token = _current.set(replace(current_options(), **changes))
    try:
        yield current_options()
    finally:
        _current.reset(token)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``6GiB``, ``512MB``, ``1.5G`` or ``4096``.

    Raises:
        UsageError: It is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    unit = match.group(2) if match else None
    factor = {**_UNITS, **_BINARY_UNITS}.get(unit if unit is not None else "?")
    if match is None or factor is None:
        raise UsageError("not a size", wanted="a number and a unit, as 6GiB", got=repr(text))
    return int(float(match.group(1)) * factor)


def format_size(nbytes: float) -> str:
    """Bytes for a person: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
