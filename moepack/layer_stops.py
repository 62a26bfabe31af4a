"""A model's ``forward`` in a thread of its own, which stops at each decoder layer.

The batch's thread and the main thread take turns: only one of them ever runs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moepack_formats.errors import UsageError


@dataclass(frozen=True)
class LayerCall:
    """A decoder layer's call that waits to be made."""

    layer: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Ended(BaseException):
    """Ends a batch's thread in the middle of ``forward``."""


_current = threading.local()


class HandOver:
    """Stands in for a decoder layer's ``forward``: hands the call to the main thread.

    Args:
        layer: The decoder layer's name in the model.
    """

    def __init__(self, layer: str) -> None:
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the main thread answers."""
        batch: BatchThread = _current.batch
        return batch.ask(LayerCall(self._layer, args, kwargs))


class BatchThread:
    """A batch's own thread; it and the main thread take turns.

    Args:
        model: Its decoder layers' ``forward`` are ``HandOver`` objects while the thread runs.
        ids: ``[B, T]`` token ids.
    """

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self._model, self._ids = model, ids
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._call: LayerCall | None = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._stopping = False
        self._logits: Tensor | None = None
        self._thread = threading.Thread(target=self._work, name="moepack-batch", daemon=True)

    def start(self) -> LayerCall | None:
        """Run to the first decoder layer; None when there is none."""
        self._thread.start()
        return self._wait()

    def answer(self, value: Any) -> LayerCall | None:
        """Give the decoder layer's result, and run to the next; None when there is none."""
        self._answer, self._call = value, None
        self._mine.release()
        return self._wait()

    def logits(self) -> Tensor:
        """What the model returned, ``[B, T, V]`` float32; the thread computes it now.

        Raises:
            UsageError: The model returns no logits.
        """
        self._mine.release()
        self._wait()
        if self._logits is None:
            raise UsageError("the model returns no logits", where=type(self._model).__name__)
        logits, self._logits = self._logits, None
        return logits.to(torch.float32)

    def stop(self) -> None:
        """End the thread, wherever it is."""
        if self._thread.is_alive():
            self._stopping = True
            self._mine.release()
            self._thread.join()

    def ask(self, call: LayerCall) -> Any:
        """From the batch's thread: have a call made."""
        self._call = call
        self._pause()
        answer, self._answer = self._answer, None
        return answer

    def _pause(self) -> None:
        self._theirs.release()
        self._mine.acquire()
        if self._stopping:
            raise _Ended

    def _wait(self) -> LayerCall | None:
        self._theirs.acquire()
        if self._error is not None:
            raise self._error
        return self._call

    def _work(self) -> None:
        _current.batch = self
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        # Logits are large: those of a batch are made when it is their turn to be read.
        hook = head.register_forward_pre_hook(self._before_head) if head is not None else None
        try:
            with torch.no_grad():
                self._logits = self._model(self._ids, use_cache=False).logits
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            if hook is not None:
                hook.remove()
            self._theirs.release()

    def _before_head(self, *_: Any) -> None:
        if getattr(_current, "batch", None) is self:
            self._call = None
            self._pause()
