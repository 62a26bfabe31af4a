"""Generating after a text whose beginning was computed before, without computing that again.

A conversation is one text that grows: every turn sends all of it. For a model that is read from
disk a prompt costs a read of nearly all experts, however little of it is new. So the cache of the
last text is kept. What the next one has in common with it from the front stays; what follows in the
cache is cut off.

Two kinds of cache cannot be cut everywhere. A layer that sees a window of the last tokens has left
earlier ones behind, and a state of linear attention or of a convolution has no places at all. They
are gone on from where the new text continues all of the old one, and begun anew otherwise.

What is reused was computed by other kernels than a prompt's, and is kept as they keep it: results
are those of decoding on, and differ from a prompt's in rounding.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.generation.configuration_utils import GenerationMode

from .tape.kv import GrowingLayer

_PLACES = (
    DynamicLayer,
    DynamicIndexedLayer,
    DynamicSlidingWindowLayer,
    DummyLayer,
)
_STATES = (
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

_ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""Ways to generate that tell of each token."""

_PROBE = 8
"""Tokens by which a model with states is asked whether it goes on from them."""

_PROBE_TOLERANCE = 0.02
"""Difference of logits, relative to the largest, from which on it does not."""


Check = Callable[[], object] | None


class Streamer(Protocol):
    """What ``generate()`` tells of its tokens."""

    def put(self, value: Tensor) -> None:
        """The prompt first, then each token."""

    def end(self) -> None:
        """There are no more."""


class PrefixReuse:
    """A model's ``generate()`` that keeps the cache of the last text for the next.

    Texts of several threads take turns.

    Args:
        model: A loaded pack.

    Attributes:
        reused: Tokens of the last prompt that were not computed again.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._lock = model, threading.RLock()
        self._cache: Cache | None = None
        self._text: list[int] = []  # that the cache holds
        self._goes_on: bool | None = None  # None until a model with states was asked
        self.reused = 0

    def generate(
        self,
        input_ids: Tensor,
        *,
        streamer: Streamer | None = None,
        check: Check = None,
        **options: Any,
    ) -> Tensor:
        """``model.generate()`` for one text.

        Args:
            input_ids: ``[1, T]``, all of the text.
            streamer: Is told each token.
            check: Is called ahead of every MoE layer of a pass and at every token. What it raises
                ends the generation; what was computed until then is kept if it was at a token.
            options: Others of ``generate()``, as ``generation_config``.

        Returns:
            ``[1, T + new]``.
        """
        with self._lock:
            return self._in_turn(input_ids, streamer, check, options)

    def _in_turn(
        self, input_ids: Tensor, streamer: Streamer | None, check: Check, options: dict[str, Any]
    ) -> Tensor:
        options["attention_mask"] = torch.ones_like(input_ids)
        hooks: list[Any] = []
        if check is not None:
            ask, thread = check, threading.get_ident()

            def before(*_: object) -> None:
                # A compiled pass runs no hooks; and of others' passes nobody is asked.
                if not torch.compiler.is_compiling() and threading.get_ident() == thread:
                    ask()

            modules = [adapter.module for adapter in self._model.moepack.adapters]
            hooks += [module.register_forward_pre_hook(before) for module in modules]
        try:
            if not self._keeps(options):
                self.forget()
                told: dict[str, Any] = {} if streamer is None else {"streamer": streamer}
                # A compiled pass calls nobody: at least at every token somebody is asked.
                if check is not None and self._asked(options).get_generation_mode() in _ONE_BY_ONE:
                    told["streamer"] = _Listener(input_ids[0].tolist(), streamer, check)
                sequences: Tensor = self._model.generate(input_ids, **told, **options)
                return sequences
            return self._generate(input_ids, streamer, check, options)
        finally:
            for hook in hooks:
                hook.remove()

    def _generate(
        self, input_ids: Tensor, streamer: Streamer | None, check: Check, options: dict[str, Any]
    ) -> Tensor:
        text = input_ids[0].tolist()
        cache = self._begin(text)
        listener = _Listener(text, streamer, check)
        try:
            sequences: Tensor = self._model.generate(
                input_ids, past_key_values=cache, streamer=listener, **options
            )
        except BaseException:
            if listener.between_passes:
                self._keep(cache, listener.text)
            raise
        self._keep(cache, sequences[0].tolist())
        return sequences

    def forget(self) -> None:
        """Keep nothing for the next text."""
        self._cache, self._text, self.reused = None, [], 0

    def _keeps(self, options: dict[str, Any]) -> bool:
        """Whether one text is written, token by token, on a cache of the usual kind."""
        own: GenerationConfig = self._model.generation_config
        asked = self._asked(options)

        def value(name: str) -> Any:
            # generate() takes what is left open from the model's own.
            given = getattr(asked, name)
            return getattr(own, name) if given is None else given

        supported = getattr(self._model, "_supports_default_dynamic_cache", None)
        return (
            supported is not None
            and supported()
            and asked.get_generation_mode() in _ONE_BY_ONE
            and value("cache_implementation") in (None, "dynamic")
            and value("use_cache") is not False
            and value("num_return_sequences") in (None, 1)
        )

    def _asked(self, options: dict[str, Any]) -> GenerationConfig:
        """What ``generate()`` would be asked for."""
        given = options.get("generation_config") or self._model.generation_config
        asked: GenerationConfig = copy.deepcopy(given)
        asked.update(**{k: v for k, v in options.items() if k != "generation_config"})
        return asked

    def _begin(self, text: Sequence[int]) -> Cache:
        """A cache that holds the first ``reused`` tokens of a text; it is no longer kept here."""
        cache, held = self._cache, self._text
        self.forget()
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(held, text, strict=False))
        common = min(sum(1 for _ in same), len(text) - 1)  # the last one's logits are needed
        if cache is not None and common > 0 and self._ends_at(cache, len(held), common):
            self.reused = common
            return cache
        del cache  # before the new one grows
        config = self._model.config.get_text_config(decoder=True)
        return DynamicCache(config=config)

    def _ends_at(self, cache: Cache, held: int, length: int) -> bool:
        """Cut a cache of ``held`` tokens, unless that cannot be done."""
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
            return length == held and self._goes_on_from_states()
        if length < held:
            try:
                cache.crop(length - held)
            except (RuntimeError, ValueError):  # a window has left tokens behind
                return False
        return bool(cache.get_seq_length() == length)

    def _keep(self, cache: Cache, text: list[int]) -> None:
        """Keep a cache for the next text; ``text`` is what it holds and a token or more besides."""
        known = (*_PLACES, *_STATES)
        if not all(isinstance(x, GrowingLayer) or type(x) in known for x in cache.layers):
            return  # what a layer of a family's own keeps may depend on where the prompt ended
        try:
            length = int(cache.get_seq_length())
        except ValueError:  # nothing but states
            return
        if length <= len(text):
            self._cache, self._text = cache, text[:length]

    def _goes_on_from_states(self) -> bool:
        """Whether several tokens at once begin from the states that there are.

        Some models do that at one token only, and begin from none otherwise. So a few tokens are
        computed at once and in two parts; what is read for them is about what a prompt reads.
        """
        if self._goes_on is None:
            rows = self._model.get_input_embeddings().num_embeddings
            ids = torch.arange(1, _PROBE + 1, device=self._model.device).remainder(rows)[None]
            with torch.no_grad(), self._model.moepack.stats.uncounted():
                whole = self._last_logits(ids)
                cut = _PROBE // 2
                parts = self._last_logits(ids[:, :cut], ids[:, cut:])
            error = (whole - parts).abs().max() / whole.abs().max().clamp(min=1e-6)
            self._goes_on = bool(error <= _PROBE_TOLERANCE)
        return self._goes_on

    def _last_logits(self, *parts: Tensor) -> Tensor:
        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        for part in parts:
            output = self._model(input_ids=part, past_key_values=cache, use_cache=True)
        logits: Tensor = output.logits[0, -1].float()
        return logits


class _Listener:
    """Stands between ``generate()`` and a streamer.

    Attributes:
        text: The prompt and the tokens that have come.
        between_passes: Whether a token is being told, so that no pass is under way.
    """

    def __init__(self, prompt: list[int], streamer: Streamer | None, check: Check) -> None:
        self.text, self._streamer, self._check = list(prompt), streamer, check
        self._began = self.between_passes = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then each token."""
        self.between_passes = True
        if self._began:
            self.text += value.reshape(-1).tolist()
        self._began = True
        if self._check is not None:
            self._check()
        if self._streamer is not None:
            self._streamer.put(value)
        self.between_passes = False

    def end(self) -> None:
        """There are no more."""
        if self._streamer is not None:
            self._streamer.end()
