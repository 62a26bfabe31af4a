"""The routes of ``moepack serve``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from .handlers import Cancelled, Handlers, Job, Refusal, current_job

_POLL_S = 0.1
"""How often it is looked whether a client still waits."""

_PLAIN = ({"type": "text"}, {"format": {"type": "text"}})
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of"), (1,)),
    **dict.fromkeys(("logprobs", "echo"), (False,)),
    **dict.fromkeys(("top_logprobs", "presence_penalty"), (0, 0.0)),
    **dict.fromkeys(("response_format", "text"), _PLAIN),
    **dict.fromkeys(("functions", "function_call", "previous_response_id"), ()),
    "logit_bias": ({},),
    **dict.fromkeys(("tool_choice", "truncation"), ("auto", "disabled")),
}
"""Fields that the handlers pass over, with the values that mean what they do anyway."""


def build_app(handlers: Handlers) -> FastAPI:
    """The application: what it answers, by which handler.

    Args:
        handlers: Of the one pack that it serves.
    """
    app = FastAPI(title="moepack", docs_url=None, redoc_url=None, openapi_url=None)
    entry = {
        "id": handlers.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "moepack",
    }

    @app.exception_handler(RequestValidationError)
    async def not_json(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _error(400, f"the body is not a JSON object: {first.get('msg')}")

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Request, error: AnyHTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [entry]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != handlers.name:
            return _no_such_model(name, handlers.name)
        return JSONResponse(entry)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: dict[str, Any]) -> Response:
        return await _answer(handlers, handlers.chat, request, body, "chatcmpl-")

    @app.post("/v1/completions")
    async def completions(request: Request, body: dict[str, Any]) -> Response:
        return await _answer(handlers, handlers.completion, request, body, "cmpl-")

    @app.post("/v1/responses")
    async def responses(request: Request, body: dict[str, Any]) -> Response:
        return await _answer(handlers, handlers.response, request, body, "")

    return app


async def _answer(
    handlers: Handlers, handler: Any, request: Request, body: dict[str, Any], prefix: str
) -> Response:
    """Let a handler answer, and stop it when the client has gone.

    Args:
        handlers: All of them.
        handler: The one for this route.
        request: For whether the client is there still.
        body: What was asked.
        prefix: Of the answer's id.
    """
    name = body.get("model")
    if name not in (None, "", handlers.name):
        return _no_such_model(name, handlers.name)
    if body.get("generation_config") is not None:
        # An extension of transformers' own: some of its fields make more weights be loaded.
        return _error(422, "generation_config is not taken from a request")
    for field, usual in _NO_EFFECT.items():
        value = body.get(field)
        same = any(value == one and type(value) is type(one) for one in usual)  # 0 is not False
        if value is not None and not same:
            return _error(400, f"{field} is not supported: leave it out", "unsupported_parameter")
    body["model"] = handlers.name
    body.setdefault("stream", False)  # one of the handlers would stream otherwise
    # The handlers would use it at once, not when it is this request's turn.
    seed = body.pop("seed", None)
    if not (seed is None or (isinstance(seed, int) and -(2**63) <= seed < 2**63)):
        return _error(400, "seed must be an integer of 64 bits")
    stop = body.get("stop")
    texts = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if not all(isinstance(text, str) and text for text in texts):
        return _error(400, "stop must be a text, or a list of texts, none of them empty")
    if not texts:
        body.pop("stop", None)
    job = Job(seed)
    current_job.set(job)
    work = asyncio.ensure_future(handler.handle_request(body, f"{prefix}{uuid.uuid4().hex}"))
    try:
        while not (await asyncio.wait({work}, timeout=_POLL_S))[0]:
            if await request.is_disconnected():
                job.gone.set()
        response: Response = work.result()
    except asyncio.CancelledError:
        job.gone.set()
        raise
    except Cancelled:
        return _error(503, "the server is stopping")
    except Refusal as error:
        return _error(error.status, str(error), error.code)
    except HTTPException:
        raise
    except Exception as error:
        # The handlers take a request as it comes: what is missing in it, or of another type, or
        # refused by the chat template, is found where it is used.
        return _error(400, f"the request cannot be used ({type(error).__name__}: {error})")
    if isinstance(response, StreamingResponse):
        return _Stream(response, job, closing=handler is not handlers.response)
    return response


class _Stream(StreamingResponse):
    """A handler's stream, whose request ends with it.

    Args:
        response: The handler's.
        job: Its request.
        closing: Whether the stream closes with OpenAI's mark.
    """

    def __init__(self, response: StreamingResponse, job: Job, *, closing: bool) -> None:
        super().__init__(_closed(response.body_iterator, closing), media_type=response.media_type)
        self._job = job

    async def __call__(self, *args: Any) -> None:
        """Send it."""
        try:
            await super().__call__(*args)
        finally:
            self._job.gone.set()


async def _closed(parts: Any, mark: bool) -> AsyncIterator[Any]:
    async with aclosing(parts):
        async for part in parts:
            yield part
    if mark:
        yield "data: [DONE]\n\n"


def _no_such_model(name: Any, ours: str) -> Response:
    return _error(404, f"there is no model {name!r} here, only {ours!r}", "model_not_found")


def _error(status: int, message: str, code: str | None = None) -> Response:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)
