"""``moepack serve`` as a command: Ctrl-C, addresses, and what is missing."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
import urllib.error
from pathlib import Path

import pytest

from tests.commands import Command
from tests.served import LONG, PROMPT, Served, message, tiny

__all__ = ["tiny"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_ctrl_c_while_it_answers(tiny: Path, tmp_path: Path, stream: bool) -> None:
    served = Served(tmp_path, tiny)
    answers: list[str] = []

    def ask() -> None:
        body = {"prompt": PROMPT, "max_tokens": LONG, "stream": stream}
        try:
            with served.open("/completions", body) as response:
                answers.append(response.read().decode())
        except urllib.error.HTTPError as error:
            answers.append(error.read().decode())

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    served.child.send(signal.SIGINT)
    for thread in threads:
        thread.join()
    result = served.child.wait(timeout=20)
    assert result.code == 130
    assert "Traceback" not in result.err
    assert result.err.endswith("moepack: interrupted\n")
    assert all("the server is stopping" in answer for answer in answers)


def test_a_port_in_use(command: Command, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = command("serve", tiny, "--port", port).error(5)
    assert "another program listens there" in line
    assert f"port {port}" in line


def test_hosts_that_are_not_here(command: Command, tiny: Path) -> None:
    assert "203.0.113.1, port" in command("serve", tiny, "--host", "203.0.113.1").error(5)
    assert "no such address" in command("serve", tiny, "--host", "no such host").error(2)


def test_a_missing_extra(command: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moepack.commands import serve_command

    monkeypatch.setattr(serve_command, "_NEEDED", ("json", "no_such_package"))
    line = command("serve", tiny).error(2)
    assert "needs no_such_package; pip install '.[serve]' in a clone" in line


def test_a_transformers_without_the_server(
    command: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("moepack.server.app", "moepack.server.handlers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "transformers.cli.serving.response", None)
    line = command("serve", tiny, "--port", 0).error(2)
    assert "this version of transformers or openai has not the server that moepack uses" in line


def test_a_pack_that_is_none(command: Command, tmp_path: Path) -> None:
    assert "moepack.json" in command("serve", tmp_path, "--port", 0).error(3)


def test_without_a_chat_template(pack: Path, tmp_path: Path) -> None:
    served = Served(tmp_path, pack)
    status, line, _ = served.refusal("/chat/completions", {"messages": [message("x")]})
    assert status == 400
    assert "chat template" in line
    assert served.says("x")
    served.child.send(signal.SIGINT)
    assert served.child.wait().code == 130
