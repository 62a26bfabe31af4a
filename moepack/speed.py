"""Measuring decode and prefill speed of a pack, and of llama.cpp beside it."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moepack_formats.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from moepack_runtime.statistics import Statistics
    from moepack_runtime.tape.profile import Profile

_READ_NBYTES = 512 << 20
"""Memory that is read to measure its bandwidth: more than any cache holds."""


class Runner(Protocol):
    """Something that runs tokens."""

    def prefill(self, ids: Sequence[int]) -> None:
        """Start a new context with some tokens."""

    def decode(self, ids: Sequence[int]) -> None:
        """Go on with given tokens, one after the other."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        prompt_tokens: Tokens of the measured prefill.
        context_tokens: Tokens before the measured decoding.
        new_tokens: Tokens that are decoded.
        rounds: How often, in turns with the peer.
        seed: Of the tokens, which are drawn uniformly.
        vocabulary: Their number of different ones.
    """

    prompt_tokens: int
    context_tokens: int
    new_tokens: int
    rounds: int
    seed: int
    vocabulary: int

    def draws(self) -> Callable[[int], list[int]]:
        """A new source of the tokens: gives as many as it is asked for."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)

        def draw(count: int) -> list[int]:
            ids: list[int] = torch.randint(self.vocabulary, (count,), generator=generator).tolist()
            return ids

        return draw


@dataclass(frozen=True)
class Speeds:
    """What was measured, one figure a round.

    Attributes:
        prefill: Tokens a second of the prompt.
        decode: Tokens a second, one after another.
        memory: Bytes a second at which memory was read just before and after that decoding; empty
            where it was not asked for.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    memory: tuple[float, ...] = ()

    def share(self, nbytes: float) -> float | None:
        """Share of memory's speed at ``nbytes`` a token, the median of the rounds'."""
        if not self.memory:
            return None
        return statistics.median(
            speed * nbytes / memory for speed, memory in zip(self.decode, self.memory, strict=True)
        )


class PackRunner:
    """A loaded pack.

    Args:
        model: From :func:`moepack_runtime.loading.load_pack`.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, None
        compiled = model.moepack.compiled
        self._compiled = compiled if compiled is not None and compiled.refusal is None else None

    def prefill(self, ids: Sequence[int]) -> None:
        """See :class:`Runner`."""
        import torch

        prompt = torch.tensor([ids], device=self._model.device)
        cache = None if self._compiled is None else self._compiled.new_cache()
        output = self._model(
            input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        self._cache = output.past_key_values
        self._finish()

    def decode(self, ids: Sequence[int]) -> None:
        """See :class:`Runner`."""
        import torch

        forward = self._model if self._compiled is None else self._compiled
        for token in ids:
            one = torch.tensor([[token]], device=self._model.device)
            output = forward(input_ids=one, past_key_values=self._cache, use_cache=True)
            self._cache = output.past_key_values
        self._finish()

    def _finish(self) -> None:
        """Wait for a GPU, which takes work into a queue."""
        tier = self._model.moepack.tier
        if tier is not None:
            tier.link.finish()


class LlamaRunner:
    """A GGUF file in llama.cpp, on the CPU, through llama-cpp-python.

    It runs in a process of its own with OpenMP's default settings. Loaded beside torch it would
    share torch's OpenMP, whose threads are told to sleep while our own compute
    (``common.set_up``), and would be slower for it.

    Args:
        file: The file.
        context: Tokens that it must have room for.
        threads: Threads that compute.

    Raises:
        UsageError: llama-cpp-python is not installed, or cannot load the file.
    """

    def __init__(self, file: Path, context: int, threads: int) -> None:
        if importlib.util.find_spec("llama_cpp") is None:
            raise UsageError(
                "comparing with llama.cpp needs llama-cpp-python",
                remedy="pip install '.[bench]' in a clone",
            )
        processes = multiprocessing.get_context("spawn")
        self._pipe, other = processes.Pipe()
        arguments = (str(file), context, threads, other)
        processes.Process(target=_serve_llama, args=arguments, daemon=True).start()
        other.close()
        try:
            answer = self._pipe.recv()
        except EOFError:
            answer = "its process ended"
        if isinstance(answer, str):
            raise UsageError("llama.cpp cannot load the file", where=file, got=answer)
        self._vocabulary = int(answer)

    @property
    def vocabulary(self) -> int:
        """Number of its tokens."""
        return self._vocabulary

    def prefill(self, ids: Sequence[int]) -> None:
        """See :class:`Runner`."""
        self._ask("prefill", ids)

    def decode(self, ids: Sequence[int]) -> None:
        """See :class:`Runner`."""
        self._ask("decode", ids)

    def _ask(self, what: str, ids: Sequence[int]) -> None:
        try:
            self._pipe.send((what, list(ids)))
            self._pipe.recv()
        except (EOFError, ConnectionError):
            raise ResourceError(
                "llama.cpp's process ended", remedy="see whether memory is short"
            ) from None


def _serve_llama(file: str, context: int, threads: int, pipe: Connection) -> None:
    """What llama.cpp's process does: one answer for each request, until the other end closes."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):  # not what this process chose
        os.environ.pop(name, None)
    from llama_cpp import Llama

    try:
        llama: Any = Llama(
            file,
            n_ctx=context,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            verbose=False,
        )
    except (ValueError, OSError) as error:
        pipe.send(str(error))
        return
    pipe.send(llama.n_vocab())
    while True:
        try:
            what, ids = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        if what == "prefill":
            llama.reset()
            llama.eval(ids)
        else:
            for token in ids:
                llama.eval([token])
        pipe.send(None)


def measure(
    plan: Plan,
    pack: PackRunner,
    stats: Statistics,
    peer: Runner | None = None,
    memory: Callable[[], float] | None = None,
) -> tuple[Speeds, Speeds | None, Statistics]:
    """Run a pack, and a peer in turns with it.

    One round that does not count comes first: it touches every page and records the decoding.

    Args:
        plan: What to run.
        pack: The pack.
        stats: The pack's counters.
        peer: What to compare with.
        memory: Measures the speed of memory, which is asked around each of the pack's decodings:
            it changes with what else a host does.

    Returns:
        The pack's speeds, the peer's, and the counters of the pack's decoding alone.
    """
    draw = plan.draws()
    decoding = type(stats)()
    runners: list[Runner] = [pack] if peer is None else [pack, peer]
    prefill: list[list[float]] = [[] for _ in runners]
    decode: list[list[float]] = [[] for _ in runners]
    bandwidth: list[float] = []
    for number in range(plan.rounds + 1):
        prompt, context = draw(plan.prompt_tokens), draw(plan.context_tokens)
        following = draw(plan.new_tokens)
        for runner, prefills, decodes in zip(runners, prefill, decode, strict=True):
            taken = _seconds(runner.prefill, prompt)
            runner.prefill(context)
            if runner is pack:
                stats.reset()  # hits and bytes are those of decoding
            asks = memory if runner is pack and number > 0 else None
            around = [asks()] if asks else []
            taken_next = _seconds(runner.decode, following)
            if number == 0:
                continue
            if asks:
                bandwidth.append(statistics.mean([*around, asks()]))
            prefills.append(len(prompt) / taken)
            decodes.append(len(following) / taken_next)
            if runner is pack:
                decoding.add(stats)
    mine = Speeds(tuple(prefill[0]), tuple(decode[0]), tuple(bandwidth))
    others = Speeds(tuple(prefill[1]), tuple(decode[1])) if peer is not None else None
    return mine, others, decoding


def packed_nbytes_per_token(model: Any, demands_per_token: float) -> float:
    """Bytes of packed weights that one token multiplies with.

    Args:
        model: A loaded pack.
        demands_per_token: Experts that a token goes through, all layers together.
    """
    from moepack_runtime.trunk.packed_modules import PackedLinear, TiedHead

    trunk = 0
    for module in model.modules():
        if isinstance(module, (PackedLinear, TiedHead)):
            source = module.source if isinstance(module, TiedHead) else module
            trunk += 0 if source.packed is None else source.packed.numel()
    return float(trunk + demands_per_token * record_nbytes(model))


def profile(plan: Plan, pack: PackRunner, model: Any) -> Profile | None:
    """Decode a round once more and see where its time goes.

    Returns:
        The times, or None where transformers' own code decodes.
    """
    from moepack_runtime.tape.profile import Profile

    tape = model.moepack.tape
    if tape is None or not tape.playing:
        return None
    draw = plan.draws()
    pack.prefill(draw(plan.context_tokens))
    found = Profile(record_nbytes(model))
    tape.profile(found)
    try:
        pack.decode(draw(plan.new_tokens))
    finally:
        tape.profile(None)
    return found


def record_nbytes(model: Any) -> float:
    """Bytes of an expert's record, in the mean."""
    return float(
        statistics.mean(
            at.spec.payload_nbytes for layer in model.moepack.pack.layers for at in layer
        )
    )


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second at which the native library reads memory, the median."""
    import torch

    from moepack_runtime.kernels import native

    data = torch.ones(_READ_NBYTES, dtype=torch.uint8)
    taken = [_seconds(native.read_memory, data, threads) for _ in range(rounds)]
    return _READ_NBYTES / statistics.median(taken)


def room_to_read(model: Any) -> bool:
    """Whether :func:`read_bandwidth` is within the model's budget, beside all of its experts.

    Where experts are read from the disk memory's speed is not what bounds a token, and what the
    budget leaves is for them.
    """
    budget, slots = model.moepack.budget, getattr(model.moepack.residency, "slots", None)
    whole = slots is None or slots >= sum(map(len, model.moepack.pack.layers))
    return bool(whole and budget.for_slots >= budget.everything + _READ_NBYTES)


def _seconds(run: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start
