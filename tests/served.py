"""A server over a pack, in a process of its own, and requests to it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.commands import TINY, Child, edit_json, wait_for
from tests.packs import make_pack

PROMPT = "And the king said unto him, Thou shalt not"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LONG = 400
"""From so many tokens on the server is slow, so that there is time to leave it."""


class Served:
    """A server in a process of its own.

    Args:
        folder: Where its output goes.
        pack: What it serves.
    """

    def __init__(self, folder: Path, pack: Path) -> None:
        # In exact numbers, so that a near tie does not depend on what was computed before.
        exact = ("--threads", 1, "--activations", "float")
        words = ("serve", pack, "--port", 0, "--json", "-v", *exact)
        self.child = Child(folder, *words, before=slow_down)
        self._log = folder / "child-stderr"
        wait_for(lambda: self.child.out.endswith("\n"))
        self.url: str = json.loads(self.child.out)["url"]

    @property
    def log(self) -> str:
        return self._log.read_text()

    def open(self, path: str, body: object = None) -> Any:
        """A response; an object is sent as JSON, bytes as they are. /paths are below /v1."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        url = self.url + path if path[0] == "/" else self.url.removesuffix("v1") + path
        request = urllib.request.Request(url, data)
        request.add_header("content-type", "application/json")
        return urllib.request.urlopen(request, timeout=60)

    def ask(self, path: str, body: object = None) -> dict[str, Any]:
        with self.open(path, body) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def chunks(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """What a stream sends, but for its closing mark."""
        with self.open(path, {**body, "stream": True}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = response.read().decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def refusal(self, path: str, body: object) -> tuple[int, str, str | None]:
        """Status, message and code."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.open(path, body)
        error = json.load(caught.value)["error"]
        return caught.value.code, error["message"], error["code"]

    def says(self, text: str) -> str:
        """The greedy continuation of a text."""
        return str(self.ask("/completions", {"prompt": text, **GREEDY})["choices"][0]["text"])


GREEDY = {"temperature": 0, "max_tokens": 8}


def slow_down() -> None:
    """Long generations take their time; called in the server's process."""
    from moepack.server import handlers

    generate, check = handlers._Writer.generate, handlers._Writer._check
    slow = threading.local()

    def slow_generate(writer: Any, **options: Any) -> Any:
        slow.s = 0.02 * (options["generation_config"].max_new_tokens >= LONG)
        return generate(writer, **options)

    def slow_check(writer: Any) -> None:
        time.sleep(slow.s)
        check(writer)

    handlers._Writer.generate = slow_generate  # type: ignore[method-assign]
    handlers._Writer._check = slow_check  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small trained model, with a chat template."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    make_pack(TINY, folder, quantizer="rtn")
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


def message(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}
