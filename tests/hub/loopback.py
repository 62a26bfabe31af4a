"""A small HTTP/1.1 server on the loopback interface: records requests, has faults on demand."""

from __future__ import annotations

import json
import re
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.commands import wait_for

PIECE = 1 << 20


@dataclass
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    range: str | None = None
    nbytes_in: int = 0
    nbytes_out: int = 0
    was_read: bool = False


@dataclass
class Fault:
    """Something that goes wrong with the requests that match.

    Attributes:
        path: Regular expression for the path.
        method: Of which method, any if empty.
        status: Answer this instead.
        code: The ``X-Error-Code`` that goes with it.
        headers: More headers of that answer.
        drop_after: Close the connection after so many bytes of the body.
        flip: Flip one bit of the body.
        act: Called before anything else.
        times: How often; negative for always.
        skip: Let so many matching requests pass first.
    """

    path: str
    method: str = ""
    status: int = 0
    code: str = "Injected"
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int = -1
    flip: bool = False
    act: Callable[[], object] | None = None
    times: int = 1
    skip: int = 0


class _Quiet(ThreadingHTTPServer):
    """Clients that are killed are nothing to print about; counts the connections that are open."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._open, self._counting = 0, threading.Lock()
        super().__init__(*arguments)

    def handle_error(self, *_: object) -> None:
        pass

    def get_request(self) -> Any:
        self._count(1)  # before it is accepted: a connection is waiting or counted, never neither
        try:
            return super().get_request()
        except OSError:
            self._count(-1)
            raise

    def process_request_thread(self, *arguments: Any) -> None:
        try:
            super().process_request_thread(*arguments)
        finally:
            self._count(-1)

    def is_idle(self) -> bool:
        """Whether no connection is open, or waits to be."""
        waiting, _, _ = select.select([self.socket], [], [], 0)
        with self._counting:
            return not waiting and self._open == 0

    def _count(self, change: int) -> None:
        with self._counting:
            self._open += change


class Server:
    """A running server.

    Args:
        handler: The class that answers; it finds this object as ``hub``.
    """

    def __init__(self, handler: type[Handler]) -> None:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.ranges = True  # or whole files, whatever part is asked for
        self.lock = threading.Lock()
        kind = type("BoundHandler", (handler,), {"hub": self})
        self._server = _Quiet(("127.0.0.1", 0), kind)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def drain(self) -> None:
        """Wait until everything that clients which are gone had asked for is answered."""
        wait_for(self._server.is_idle)

    def forget(self) -> None:
        """Start counting requests anew, without faults."""
        self.requests.clear()
        self.faults.clear()

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method in ("", method) and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class Stop(Exception):
    """The answer is sent."""


class Handler(BaseHTTPRequestHandler):
    """Reads requests, sends answers, and makes the faults happen that are asked for."""

    hub: Any
    routes: Sequence[tuple[str, Callable[..., None]]] = ()
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        self.seen = Request(self.command, self.route, self.headers.get("Range"))
        with self.hub.lock:
            self.hub.requests.append(self.seen)
        self.trouble = self.hub.fault(self.command, self.route)
        try:
            if self.trouble is not None:
                if self.trouble.act is not None:
                    self.trouble.act()
                if self.trouble.status:
                    self.body()
                    self.fail(self.trouble.status, self.trouble.code, self.trouble.headers)
                if self.trouble.drop_after >= 0 and self.command in ("POST", "PUT"):
                    self.rfile.read(self.trouble.drop_after)
                    self.drop()
            self.dispatch()
            self.body()
            self.fail(404, "NotFound")
        except Stop:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def dispatch(self) -> None:
        for pattern, answer in self.routes:
            match = re.fullmatch(pattern, self.route)
            if match:
                answer(self, *match.groups())

    # Sending

    def reply(
        self, value: object, headers: dict[str, str] | None = None, status: int = 200
    ) -> None:
        self.send(status, json.dumps(value).encode(), headers)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.start(status, len(data), headers)
        if self.command != "HEAD":
            self.write(data)
        raise Stop

    def start(self, status: int, nbytes: int, headers: dict[str, str] | None) -> None:
        self.send_response(status)
        every = {"Content-Type": "application/json", "Content-Length": str(nbytes)}
        for name, value in {**every, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def write(self, data: bytes) -> None:
        fault = self.trouble
        if fault is not None and fault.flip and data:
            changed = bytearray(data)
            changed[len(changed) // 2] ^= 1
            data, fault.flip = bytes(changed), False
        if fault is not None and 0 <= fault.drop_after < self.seen.nbytes_out + len(data):
            self.wfile.write(data[: max(fault.drop_after - self.seen.nbytes_out, 0)])
            self.drop()
        self.wfile.write(data)
        self.seen.nbytes_out += len(data)

    def drop(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(2)
        self.close_connection = True
        raise Stop

    def fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}
        self.send(status, json.dumps({"error": code}).encode(), named)

    def body(self) -> bytes:
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """The request's body; nothing when it was read before."""
        if self.seen.was_read:
            return
        self.seen.was_read = True
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while nbytes := int(self.rfile.readline().split(b";")[0], 16):
                yield from self._exactly(nbytes)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield from self._exactly(int(self.headers.get("Content-Length") or 0))

    def _exactly(self, nbytes: int) -> Iterator[bytes]:
        while nbytes:
            piece = self.rfile.read(min(nbytes, PIECE))
            if not piece:
                self.drop()
            nbytes -= len(piece)
            self.seen.nbytes_in += len(piece)
            yield piece

    def send_content(self, content: bytes | Path, headers: dict[str, str]) -> None:
        """Answer with a file's bytes, or the range of them that was asked for."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        start, stop, status = 0, size, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.hub.ranges:
            start, status = int(wanted[1]), 206
            stop = min(int(wanted[2]) + 1, size) if wanted[2] else size
            if start >= size:
                self.fail(416, "RangeNotSatisfiable")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.start(status, stop - start, headers)
        if isinstance(content, bytes):
            self.write(content[start:stop])
            raise Stop
        with open(content, "rb") as source:
            source.seek(start)
            while start < stop:
                piece = source.read(min(PIECE, stop - start))
                if not piece:
                    self.drop()
                start += len(piece)
                self.write(piece)
        raise Stop
