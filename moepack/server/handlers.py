"""What is taken from transformers' server, and what a pack changes in it.

transformers' handlers turn requests into prompts and tokens into answers, with streams, tools and
reasoning. They ask for a model by name and generate with it; here both are one loaded pack, so that
no request can make anything be loaded. This is the only file that knows their insides.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moepack_formats.errors import MoepackError, UsageError
from moepack_runtime.prefix_reuse import PrefixReuse

try:
    from openai.types.completion_usage import CompletionUsage, PromptTokensDetails
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import (
        BaseHandler,
        GenerateManager,
        GenerationState,
        Modality,
        _GenerationCancelled,
    )
except ImportError as error:
    raise UsageError(
        "this version of transformers or openai has not the server that moepack uses",
        got=error,
        remedy="pip install -c constraints.txt '.[serve]' in a clone",
    ) from error

_log = logging.getLogger(__name__)

Cancelled = _GenerationCancelled
"""Raised where a request's generation was stopped."""


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        status: HTTP status.
        code: OpenAI's name for the reason, if it has one.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Job:
    """One request, as the thread that generates sees it.

    Attributes:
        seed: For sampling.
        gone: Set once nobody waits for the answer any more.
        reused: Tokens of the prompt that were not computed again.
    """

    seed: int | None = None
    gone: threading.Event = field(default_factory=threading.Event)
    reused: int = 0


current_job: ContextVar[Job] = ContextVar("moepack_job")
"""The request that a handler was called for."""


class Handlers:
    """transformers' handlers over one pack.

    Args:
        name: What requests call the pack.
        model: The loaded pack.
        tokenizer: Its tokenizer.

    Attributes:
        name: As above.
        chat: Answers ``/v1/chat/completions``: ``await chat.handle_request(body, id)``.
        completion: Answers ``/v1/completions``.
        response: Answers ``/v1/responses``.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name = name
        self._manager = _Manager(model)
        parts: tuple[Any, Any] = (_OnlyModel(name, model, tokenizer), _State(self._manager))
        self.chat = _Chat(*parts)
        self.completion = _Completion(*parts)
        self.response = _Response(*parts)

    def stop(self) -> None:
        """End what is generated and what waits for it, and take no more."""
        self._manager.stopping.set()

    @property
    def busy(self) -> bool:
        """Whether something is generated."""
        return self._manager.busy


class _OnlyModel:
    """Stands in for transformers' ModelManager, which loads what a request names."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.force_model, self._parts = name, (model, tokenizer)

    def process_model_name(self, model_id: str) -> str:
        return self.force_model

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self._parts

    def get_model_modality(self, *_: Any, **__: Any) -> Modality:
        return Modality.LLM


class _State(GenerationState):
    """Hands out the one manager."""

    def __init__(self, manager: _Manager) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> _Manager:
        return self._manager


class _Manager(GenerateManager):
    """Generates for one request at a time, in a thread of its own; the others wait."""

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._texts, self.stopping = PrefixReuse(model), threading.Event()
        self._last: Any = None
        config = model.config.get_text_config()
        self._limit: int | None = getattr(config, "max_position_embeddings", None)

    @property
    def busy(self) -> bool:
        return self._last is not None and not self._last.done()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _check(inputs, gen_config, self._limit)
        writer: Any = _Writer(self._texts, self.stopping, streams=True)
        return super().generate_streaming(writer, processor, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _check(inputs, gen_config, self._limit)
        writer: Any = _Writer(self._texts, self.stopping)
        return await super().generate_non_streaming(
            writer, processor, inputs, gen_config, *args, **kwargs
        )

    def submit(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self._last = super().submit(fn, *args, **kwargs)
        return self._last

    def async_submit(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        # The base class's future ends the thread if it is cancelled before the thread is done.
        return asyncio.shield(asyncio.wrap_future(self.submit(fn, *args, **kwargs)))


class _Writer:
    """What the manager takes for a model: generates for the request that it was made for."""

    def __init__(
        self, texts: PrefixReuse, stopping: threading.Event, *, streams: bool = False
    ) -> None:
        self._texts, self._stopping, self._streams = texts, stopping, streams
        self._job = current_job.get()

    def _check(self) -> None:
        if self._job.gone.is_set() or self._stopping.is_set():
            raise Cancelled
        self._job.reused = self._texts.reused  # a stream ends before generate() returns

    def generate(self, *, input_ids: Tensor, attention_mask: Any = None, **options: Any) -> Tensor:
        # Other inputs that a tokenizer gives, such as types of tokens, are not for a text alone.
        known = ("streamer", "generation_config", "tokenizer")
        options = {name: options[name] for name in known if name in options}
        start = time.perf_counter()
        self._texts.reused = 0
        try:
            self._check()
            if self._job.seed is not None:
                torch.manual_seed(self._job.seed)
            sequences = self._texts.generate(input_ids.long(), check=self._check, **options)
        except Cancelled as error:
            _log.info("a request was stopped")
            _let_go(error)
            if self._streams and self._stopping.is_set():  # or it would look complete
                raise RuntimeError("the server is stopping") from None
            raise
        except Exception as error:
            line = _line(error)
            _log.error("a request failed: %s", line)
            _log.debug("where", exc_info=error)
            _let_go(error)
            if not self._streams:
                raise Refusal(500, line) from error
            # The handlers put it between quotation marks as it is.
            line = "".join(c if c.isprintable() else " " for c in line)
            raise RuntimeError(line.replace("\\", "/").replace('"', "'")) from error
        _log.info(
            "%d tokens after %d, %d of them known from before, in %.2f s",
            sequences.shape[1] - input_ids.shape[1],
            input_ids.shape[1],
            self._job.reused,
            time.perf_counter() - start,
        )
        return sequences


class _Options(BaseHandler):
    """Generation options of a request as OpenAI's clients mean them; messages of text alone."""

    @staticmethod
    def get_processor_inputs_from_messages(messages: Any, modality: Modality) -> Any:
        for message in messages:
            parts = message.get("content")
            for part in parts if isinstance(parts, list) else ():
                if part["type"] not in ("text", "input_text", "output_text", "refusal"):
                    # The base class would leave it out.
                    raise Refusal(400, f"a pack reads text alone, and no {part['type']}")
        return BaseHandler.get_processor_inputs_from_messages(messages, modality)

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        temperature, top_p = body.get("temperature"), body.get("top_p")
        if temperature != 0 and (temperature is not None or top_p is not None):
            config.do_sample = True  # a checkpoint may be greedy by default
        return config


class _Unbounded(_Options):
    """Where no limit is given, an answer ends where the model or its context does."""

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        limits = ("max_completion_tokens", "max_tokens", "max_output_tokens")
        if all(body.get(name) is None for name in limits):
            config.max_new_tokens = None
        return config


class _Chat(_Unbounded, ChatCompletionHandler):
    """Counts the reused tokens besides the others."""

    def _build_completion(self, *args: Any, **kwargs: Any) -> Any:
        return super()._build_completion(*args, **_with_reused(kwargs))

    def _build_chunk_sse(self, *args: Any, **kwargs: Any) -> str:
        return super()._build_chunk_sse(*args, **_with_reused(kwargs))


class _Completion(_Options, CompletionHandler):
    pass


class _Response(_Unbounded, ResponseHandler):
    pass


def _with_reused(arguments: dict[str, Any]) -> dict[str, Any]:
    usage: CompletionUsage | None = arguments.get("usage")
    if usage is not None:
        reused = current_job.get().reused
        usage.prompt_tokens_details = PromptTokensDetails(cached_tokens=reused)
    return arguments


_NO_LIMIT = 1024
"""New tokens for a model whose config does not say how long its texts may be."""


def _check(inputs: Any, config: Any, limit: int | None) -> None:
    """Refuse what cannot be generated, before an answer begins; bound what can.

    Raises:
        Refusal: The prompt is empty or too long, or an option is out of its range.
    """
    length = inputs["input_ids"].shape[-1]
    if length == 0:
        raise Refusal(400, "the prompt is empty")
    if limit is not None and length >= limit:
        raise Refusal(
            400,
            f"the model's context is {limit} tokens, and the prompt has {length}",
            "context_length_exceeded",
        )
    left = None if limit is None else limit - length
    if config.max_new_tokens is None:
        config.max_new_tokens = left or _NO_LIMIT
    elif left is not None:
        config.max_new_tokens = min(config.max_new_tokens, left)
    for name, least, most in (
        ("max_new_tokens", 1, sys.maxsize),
        ("temperature", 0, sys.float_info.max),
        ("top_p", sys.float_info.min, 1),
        ("repetition_penalty", sys.float_info.min, sys.float_info.max),
    ):
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise Refusal(400, f"{name} is out of its range: {value}")


def _let_go(error: Exception) -> None:
    """Free what the passes that failed still hold; an error would keep it to the next request."""
    traceback.clear_frames(error.__traceback__)


def _line(error: Exception) -> str:
    if isinstance(error, MoepackError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"
