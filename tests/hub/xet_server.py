"""The Xet storage of the Hub on loopback, see https://huggingface.co/docs/xet/api."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hub.loopback import Handler
from tests.hub.xet_store import XetFile, terms_of_range

XET_TOKEN = "xetTokenOfTheTests"


def put_xorb(handler: Handler, name: str) -> None:
    _needs_token(handler)
    store = handler.hub.store.xet
    path, part = store.xorb(name), store.root.with_name(f"{name}.{threading.get_ident()}.part")
    there = path.exists()
    try:
        with open(part, "wb") as file:
            for piece in handler.pieces():
                file.write(piece)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    handler.reply({"was_inserted": not there})


def put_shard(handler: Handler) -> None:
    _needs_token(handler)
    try:
        handler.hub.store.xet.add_shard(handler.body())
    except KeyError:
        handler.fail(400, "XorbMissing")
    # A stream of events, a line each; the last one is what counts.
    handler.send(200, b'{"type":"validating","verified":1,"total":1}\n{"type":"result"}\n')


def reconstruction(handler: Handler, name: str) -> None:
    """Which chunks of which xorbs a file, or a range of it, is made of, and where they are."""
    _needs_token(handler)
    store = handler.hub.store.xet
    file: XetFile | None = store.by_hash.get(name)
    if file is None:
        handler.fail(404, "FileNotFound")
    assert file is not None
    start, stop = 0, file.nbytes
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    if wanted:
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, stop)
        if start >= stop:
            handler.fail(416, "RangeNotSatisfiable")
    skip, terms = terms_of_range(store, file, start, stop)
    xorbs: dict[str, list[dict[str, Any]]] = {}
    for term in terms:
        offsets = store.chunks(term.xorb).offsets
        nbytes = {"start": offsets[term.first], "end": offsets[term.stop] - 1}
        chunks = {"start": term.first, "end": term.stop}
        url = f"{handler.hub.url}/xet/fetch/{term.xorb}"
        entry = {"url": url, "ranges": [{"chunks": chunks, "bytes": nbytes}]}
        xorbs.setdefault(term.xorb, []).append(entry)
    handler.reply(
        {
            "offset_into_first_range": skip,
            "terms": [
                {
                    "hash": term.xorb,
                    "unpacked_length": term.nbytes,
                    "range": {"start": term.first, "end": term.stop},
                }
                for term in terms
            ],
            "xorbs": xorbs,
        }
    )


def fetch(handler: Handler, name: str) -> None:
    """Bytes of a xorb. As behind a signed address, no token is asked for."""
    handler.send_content(handler.hub.store.xet.xorb(name), {})


def ignore(handler: Handler) -> None:
    handler.body()
    handler.reply({})


XET_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/xet/v1/xorbs/default/([0-9a-f]{64})", put_xorb),
    (r"/xet/v2/shards", put_shard),
    (r"/xet/v2/reconstructions/([0-9a-f]{64})", reconstruction),
    (r"/xet/fetch/([0-9a-f]{64})", fetch),
    (r"/xet/v1/telemetry", ignore),
]


def rebuild(url: str, name: str, nbytes: int, path: Path) -> None:
    """Put a file together again, with the client's own library."""
    import hf_xet

    part, expires = path.with_suffix(".part"), int(time.time()) + 3600
    session = hf_xet.XetSession()
    with session.new_file_download_group(
        endpoint=f"{url}/xet", token=XET_TOKEN, token_expiry_unix_secs=expires
    ) as group:
        group.start_download_file(hf_xet.XetFileInfo(name, nbytes), str(part))
    part.replace(path)


def _needs_token(handler: Handler) -> None:
    if handler.headers.get("Authorization") != f"Bearer {XET_TOKEN}":
        handler.body()
        handler.fail(401, "Unauthorized")
