"""``moepack serve``."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from moepack_formats import osio
from moepack_formats.errors import ResourceError, UsageError

from .common import (
    common_options,
    load,
    pack_tokenizer,
    print_json,
    runtime_options,
    say,
    set_up,
)

_NEEDED = ("fastapi", "openai", "pydantic", "uvicorn")

_STOP_S = 0.5
"""How long a generation may take to end after Ctrl-C."""


@click.command("serve")
@click.argument("pack")
@click.option("--host", default="localhost", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 for any that is free.",
)
@runtime_options
@common_options
def command(
    pack: str, host: str, port: int, as_json: bool, verbose: bool, debug: bool, **runtime: Any
) -> None:
    """Serve PACK, a pack's folder or Hub id, with OpenAI's interface, until Ctrl-C.

    Endpoints: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models and /health. One
    request computes at a time. What a prompt has in common with the last one is not computed
    again. There are no keys: whoever reaches the port may use it. --json prints the address and
    the model's name once it listens; -v tells of each request. Needs the extra `serve`.
    """
    set_up(verbose)
    _check_extra()
    sockets = _listen(host, port)
    try:
        _serve(pack, host, sockets, as_json, verbose, debug, runtime)
    finally:
        for one in sockets:
            one.close()


def _serve(
    pack: str,
    host: str,
    sockets: list[socket.socket],
    as_json: bool,
    verbose: bool,
    debug: bool,
    runtime: dict[str, Any],
) -> None:
    # Ahead of the server's own imports, which would bring in all of transformers; and they come
    # before the model, so that the memory they take is not given to experts.
    if not runtime["compile"]:
        from moepack_runtime.lean_imports.lean_transformers import import_transformers

        import_transformers()
    import uvicorn

    from moepack.server.app import build_app
    from moepack.server.handlers import Handlers

    model = load(pack, **runtime)
    tokenizer = pack_tokenizer(model, pack)
    name = Path(pack).resolve().name if Path(pack).is_dir() else pack
    handlers = Handlers(name, model, tokenizer)
    url = f"http://{_in_url(host)}:{sockets[0].getsockname()[1]}/v1"

    class Server(uvicorn.Server):
        """Ends what is generated when it stops, and says when it has begun."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            say(f"moepack: serving {name} at {url} (Ctrl-C stops)")
            if as_json:
                print_json({"url": url, "model": name})
                sys.stdout.flush()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            handlers.stop()
            await super().shutdown(sockets)
            await _wait_for_end(handlers)

    if not verbose:  # errors of requests are ours
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    if debug:
        logging.getLogger("moepack.server").setLevel(logging.DEBUG)
    if verbose:
        say(f"moepack: {model.moepack.residency.describe()}")
    if not _is_local(sockets):
        say(f"moepack: whoever reaches {host} may use it: there are no keys")
    config = uvicorn.Config(
        build_app(handlers), log_config=None, access_log=verbose, timeout_graceful_shutdown=1
    )
    try:
        Server(config).run(sockets)
    except KeyboardInterrupt:
        if handlers.busy:
            # A thread that computes cannot be left behind by an interpreter that ends.
            say("moepack: interrupted")
            os._exit(130)
        raise


async def _wait_for_end(handlers: Any) -> None:
    end = asyncio.get_running_loop().time() + _STOP_S
    while handlers.busy and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.01)


def _check_extra() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"a server needs {' and '.join(missing)}", remedy="pip install '.[serve]' in a clone"
        )


def _listen(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of a host, before a model is loaded for nothing.

    Raises:
        UsageError: There is no such host.
        ResourceError: The port is taken, or may not be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UsageError("no such address", where=f"--host {host}", got=error) from None
    # IPv4 first: where there are both, a machine without IPv6 still has a name for itself in it.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, address in found:
        if sockets:
            port = sockets[0].getsockname()[1]
        try:
            one = socket.socket(family, kind, protocol)
        except OSError:
            continue
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port, *address[2:]))
        except OSError as error:
            one.close()
            if sockets and error.errno == errno.EADDRNOTAVAIL:
                continue
            for other in sockets:
                other.close()
            where = f"{host}, port {port}"
            if error.errno == errno.EADDRINUSE:
                raise ResourceError(
                    "another program listens there", where=where, remedy="choose another --port"
                ) from None
            raise osio.resource_error(error, where) from error
        sockets.append(one)
    if not sockets:
        raise UsageError("this machine has no such address", where=f"--host {host}")
    return sockets


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_local(sockets: list[socket.socket]) -> bool:
    hosts = [one.getsockname()[0] for one in sockets]
    return all(ipaddress.ip_address(host.partition("%")[0]).is_loopback for host in hosts)
