"""Playing a recorded token."""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..experts_compute import ExpertsCompute
from ..kernels import native
from ..kernels.native_engine import NativeEngine
from ..trunk.packed_modules import PackedEmbedding, PackedLinear, TiedHead
from .kv import GrowingLayer
from .latent import read_off
from .lower import Call, embedding_step, lower
from .pool import compact
from .products import summed_at_once
from .profile import Profile
from .record import CannotRecord, Opaque, Step
from .slices import slice_runs
from .steps import Kv, NativeStep, Op, contraction, elementwise, is_floats


class Player:
    """A recording, ready to be played with other tokens.

    Args:
        steps: The recording.
        token: ``[1, 1]`` int64, which the recording reads the token from.
        position: ``[1, 1]`` int64, where it reads the position.
        logits: ``[1, 1, vocabulary]``, which it writes.
        layers: The cache layers it used, in the order of the model.
        engine: The native engine.
        keep: Further results that are read from outside, and must stay where they are.

    Attributes:
        profile: Where each token's times go, if somebody wants them.

    Raises:
        CannotRecord: Something in it cannot be played.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        token: Tensor,
        position: Tensor,
        logits: Tensor,
        layers: Sequence[GrowingLayer],
        engine: NativeEngine,
        keep: Sequence[Tensor] = (),
    ) -> None:
        self._token, self._position, self._logits = token, position, logits
        self._engine = engine
        self._kv = {id(layer): Kv() for layer in layers}
        self._caches = list(self._kv.values())
        # The keys that each entry of _kv points at; weak, as a cache's memory is its owner's.
        self._known: list[weakref.ref[Tensor] | None] = [None] * len(layers)
        self._calls: dict[int, Call] = {}
        self._playing: Sequence[GrowingLayer] = ()
        self._length = 0  # of the text before the token that is played
        self.profile: Profile | None = None
        self._alive: list[Any] = [_memory(step) for step in steps]
        found: list[NativeStep] = []
        fixed = [token, position, logits]
        mutated = _mutated(steps)
        steps = summed_at_once(steps, mutated, (token, position, logits, *keep))
        for step in steps:
            lowered = (
                self._own(step.operation, step)
                if isinstance(step.operation, Opaque)
                else lower(step, mutated)
            )
            if callable(lowered) or _is_experts(step):
                fixed += tree_flatten((step.arguments, step.keywords, step.results))[0]
            if callable(lowered):
                self._calls[len(found)] = lowered
                found.append(NativeStep(op=Op.PYTHON))
            elif lowered is not None:
                for native_step in lowered:
                    if native_step.op == Op.EXPERTS:
                        self._calls[len(found)] = self._experts_call(step)
                    if native_step.op == Op.APPEND:
                        self._calls[len(found)] = self._wide_append(step, len(found))
                    found.append(native_step)
        runs = slice_runs(found, parts=2 * engine.threads)
        # Steps whose attention stays in chunks of so many tokens.
        attends = [(i, s.number[2]) for i, s in enumerate(found) if s.op == Op.ATTEND]
        self._chunks = {i: chunk for i, chunk in attends if chunk}
        self._steps = (NativeStep * len(found))(*found)
        stay = {t.untyped_storage().data_ptr() for t in fixed if isinstance(t, Tensor)}
        stay |= {t.untyped_storage().data_ptr() for t in keep}
        results = [result for step in steps for result in step.results]
        self._alive.append(compact(list(self._steps), results, stay, runs))
        self._count = len(found)

    @property
    def native_share(self) -> float:
        """Share of the steps that the native library does, experts included."""
        calls = sum(self._steps[i].op == Op.PYTHON for i in self._calls)
        return 1 - calls / self._count if self._count else 1.0

    def play(self, token: int, position: int, layers: Sequence[GrowingLayer]) -> Tensor:
        """One token after those in the cache, which grows by it.

        Args:
            token: Its number.
            position: How many tokens are before it.
            layers: The cache.

        Returns:
            Logits ``[1, 1, vocabulary]``, a copy.
        """
        start = time.perf_counter()
        self._token.fill_(token)
        self._position.fill_(position)
        self._playing, self._length = layers, position
        for number, chunk in self._chunks.items():
            self._steps[number].number[1] = position % chunk + 1  # a window
        for number, (layer, kv) in enumerate(zip(layers, self._caches, strict=True)):
            self._point(number, layer, kv)
        at = 0
        mode, threads = self._engine.int8, self._engine.threads
        taken = None if self.profile is None else (ctypes.c_double * self._count)()
        while True:
            at = native.play(self._steps, at, self._count, mode, threads, taken)
            if at == self._count:
                break
            start_call = time.perf_counter()
            self._calls[at]()
            if taken is not None:
                taken[at] = time.perf_counter() - start_call
            at += 1
        self._playing = ()
        for layer in layers:
            layer.played()
        # Not clone(): so large a copy wakes torch's threads, which takes longer than the copy.
        logits = torch.empty_like(self._logits)
        ctypes.memmove(logits.data_ptr(), self._logits.data_ptr(), logits.nbytes)
        if self.profile is not None and taken is not None:
            seconds = time.perf_counter() - start
            self.profile.add(list(self._steps), list(taken), seconds)
        return logits

    def _point(self, number: int, layer: GrowingLayer, kv: Kv) -> None:
        """Make a native layer stand for a layer of the cache, with room for one more token."""
        buffers = layer.reserve(self._length + 1)
        kv.end = buffers.filled
        known = self._known[number]
        if known is None or known() is not buffers.keys:
            self._known[number] = weakref.ref(buffers.keys)
            kv.keys, kv.values = buffers.keys.data_ptr(), buffers.values.data_ptr()
            kv.heads, kv.key_width = buffers.keys.shape[1], buffers.keys.shape[3]
            kv.value_width, kv.capacity = buffers.values.shape[3], buffers.capacity
            kv.half = buffers.half

    def _own(self, what: Opaque, step: Step) -> list[NativeStep] | Call:
        make: Callable[[Opaque, Step], list[NativeStep] | Call]
        make = getattr(self, f"_lower_{what.kind}")
        return make(what, step)

    def _lower_packed(self, what: Opaque, step: Step) -> list[NativeStep]:
        module: PackedLinear | TiedHead = what.subject
        x, out = step.arguments[0], step.results[0]
        source = module.source if isinstance(module, TiedHead) else module
        packed, (rows, cols) = source.packed, source.shape
        assert packed is not None  # only embeddings that nothing multiplies with are left in files
        if not is_floats(x, out) or x.numel() != cols:
            raise CannotRecord("a packed matrix gets something else than one float32 token")
        steps, x = self._contiguous(x)
        found = NativeStep(op=Op.PACKED)
        bias = module.bias
        if bias is not None and not (is_floats(bias) and bias.is_contiguous()):
            raise CannotRecord("a bias is not float32")
        address = None if bias is None else bias.data_ptr()
        found.data[:] = (out.data_ptr(), x.data_ptr(), packed.data_ptr(), address)
        number = native.SCHEME_NUMBERS[source.scheme.name]
        found.number[:] = (number, packed.numel(), rows, cols)
        return [*steps, found]

    def _lower_embed(self, what: Opaque, step: Step) -> list[NativeStep] | Call:
        module: PackedEmbedding = what.subject
        ids, out = step.arguments[0], step.results[0]
        packed = module.packed
        if packed is None:  # its tiles are read from the file, which takes Python

            def call() -> None:
                out.copy_(module(ids).view(out.shape))

            return call
        if not is_floats(out) or ids.numel() != 1 or ids.dtype is not torch.int64:
            raise CannotRecord("an embedding gets something else than one token")
        number = native.SCHEME_NUMBERS[module.scheme.name]
        numbers = (number, packed.numel(), *module.shape)
        return [embedding_step(out, packed, ids, numbers)]

    def _lower_contract(self, what: Opaque, step: Step) -> list[NativeStep] | Call:
        (left, right), (out,), (axis,) = step.arguments, step.results, what.numbers
        found = contraction(out, left, right, axis)
        if found is not None:
            return [found]

        def call() -> None:
            torch.sum(left * right, axis, out=out)

        return call

    def _lower_append(self, what: Opaque, step: Step) -> list[NativeStep]:
        found = NativeStep(op=Op.APPEND)
        found.extra = ctypes.addressof(self._kv[id(what.subject)])
        for place, tensor in enumerate(step.arguments, start=1):  # [1, heads, 1, width]
            if not is_floats(tensor):
                raise CannotRecord("keys or values are not float32")
            found.data[place] = tensor.data_ptr()
            found.stride[place][:2] = (tensor.stride(1), tensor.stride(3))
        return [found]

    def _wide_append(self, step: Step, at: int) -> Call:
        """What is done where float16 cannot hold a key or a value: the layer goes on in float32."""
        assert isinstance(step.operation, Opaque)
        number = list(self._kv).index(id(step.operation.subject))

        def call() -> None:
            layer, kv = self._playing[number], self._caches[number]
            layer.reserve(self._length + 1).widen()
            self._point(number, layer, kv)
            native.play(self._steps, at, at + 1, self._engine.int8, self._engine.threads)

        return call

    def _lower_attend(self, what: Opaque, step: Step) -> list[NativeStep]:
        query, out = step.arguments[0], step.results[0]
        if not is_floats(query, out):
            raise CannotRecord("queries are not float32")
        kv, expands = self._kv[id(what.subject)], what.numbers[3]
        found = NativeStep(op=Op.ATTEND if expands is None else Op.ATTEND_LATENT)
        found.extra = ctypes.addressof(kv)
        found.data[:2] = (out.data_ptr(), query.data_ptr())
        found.stride[0][0] = out.shape[-1]
        found.stride[1][:2] = (query.stride(1), query.stride(3))
        found.number[:3] = (query.shape[1], int(what.numbers[2]), what.numbers[4])
        found.scalar[:] = what.numbers[:2]
        if expands is not None:
            buffers = what.subject.buffers
            rank, rotary = buffers.keys.shape[3], buffers.values.shape[3]
            expansion = read_off(expands, rank, rotary, half=what.subject.half)
            native_form = expansion.step(kv)
            self._alive += [expansion, native_form]
            found.extra = ctypes.addressof(native_form)
        if len(step.arguments) > 1:
            sinks = step.arguments[1]
            if not is_floats(sinks) or sinks.numel() != query.shape[1]:
                raise CannotRecord("attention sinks of another kind")
            found.data[3], found.stride[3][0] = sinks.data_ptr(), sinks.stride(-1)
        return [found]

    def _lower_experts(self, what: Opaque, step: Step) -> list[NativeStep] | Call:
        hidden, index, weights = step.arguments
        out, layer = step.results[0], what.subject.native_layer
        plain = is_floats(hidden, weights, out) and index.dtype is torch.int64
        if layer is None or not plain or len(index) != 1:  # several rows for one token: see llama4
            return self._experts_call(step)
        steps, hidden = self._contiguous(hidden)
        found = NativeStep(op=Op.EXPERTS)
        found.data[:] = (out.data_ptr(), hidden.data_ptr(), index.data_ptr(), weights.data_ptr())
        found.stride[2][0], found.stride[3][0] = index.stride(-1), weights.stride(-1)
        layer.chosen = index.numel()
        found.extra = ctypes.addressof(layer)
        return [*steps, found]

    def _lower_demand(self, what: Opaque, step: Step) -> Call:
        compute: ExpertsCompute = what.subject
        (index,) = step.arguments
        return lambda: compute.demand(index)

    def _experts_call(self, step: Step) -> Call:
        assert isinstance(step.operation, Opaque)
        compute: ExpertsCompute = step.operation.subject
        out = step.results[0]
        inputs = step.arguments

        def call() -> None:
            out.copy_(compute.compute(*inputs).view(out.shape))

        return call

    def _contiguous(self, x: Tensor) -> tuple[list[NativeStep], Tensor]:
        """A tensor whose values lie in a row, and the copy that makes it so."""
        if x.is_contiguous():
            return [], x
        copy = torch.empty(x.shape, dtype=x.dtype)
        self._alive.append(copy)
        step = elementwise(Op.UNARY, 0, copy, x)
        if step is None:
            raise CannotRecord("a matrix gets values from all over memory")
        return [step], copy


def _memory(step: Step) -> list[Any]:
    """What native steps point into, without the cache of the recording, which must not stay."""
    appends = isinstance(step.operation, Opaque) and step.operation.kind == "append"
    return [step.arguments, step.keywords, () if appends else step.results]


def _is_experts(step: Step) -> bool:
    return isinstance(step.operation, Opaque) and step.operation.kind == "experts"


def _mutated(steps: Sequence[Step]) -> set[int]:
    """Storages that an operation writes into besides the one that made them."""
    found: set[int] = set()
    for step in steps:
        if isinstance(step.operation, Opaque) or not step.operation._schema.is_mutable:
            continue
        leaves = tree_flatten(step.arguments[:1])[0]
        found.update(t.untyped_storage().data_ptr() for t in leaves if isinstance(t, Tensor))
    return found
