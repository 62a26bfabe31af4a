"""``moepack serve``: requests, streams, errors, and prompts that begin as the last one did."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from moepack_runtime.kernels import native
from tests.commands import Command, wait_for
from tests.served import GREEDY, LONG, PROMPT, Served, message, tiny

__all__ = ["tiny"]

PICTURE = {
    "role": "user",
    "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "y"}}],
}


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"), tiny)
    yield served
    served.child.send(signal.SIGINT)
    result = served.child.wait()
    assert result.code == 130
    assert result.err.endswith("moepack: interrupted\n")
    assert "Traceback" not in result.err


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


# --- answers -------------------------------------------------------------------------------------


def test_models(server: Served) -> None:
    (model,) = server.ask("/models")["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert server.ask("/models/tiny") == model
    assert server.ask("health") == {"status": "ok"}


def test_a_completion(server: Served, command: Command, tiny: Path) -> None:
    answer = server.ask("/completions", {"prompt": PROMPT, "model": "tiny", **GREEDY})
    by_hand = ["generate", tiny, "--prompt", PROMPT, "--greedy", "--max-new-tokens", 8]
    by_hand += ["--activations", "float"]
    (choice,) = answer["choices"]
    assert choice["text"] + "\n" == command(*by_hand, "--threads", 1).out
    assert choice["finish_reason"] == "length"
    assert answer["model"] == "tiny"
    prompt = len(AutoTokenizer.from_pretrained(tiny)(PROMPT)["input_ids"])
    usage = {"prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8}
    assert answer["usage"] == usage
    chunks = server.chunks("/completions", {"prompt": PROMPT, **GREEDY})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    assert len(chunks) > 4
    assert chunks[-1]["usage"] == usage
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.skipif(native.available() is None, reason=native.why_not())
def test_decoding_is_recorded(server: Served) -> None:
    server.says(PROMPT)
    assert "decoding recorded" in server.log


def test_a_chat(server: Served) -> None:
    body = {"messages": [message("Be brief.", "system"), message(PROMPT)], **GREEDY}
    answer = server.ask("/chat/completions", body)
    text = answer["choices"][0]["message"]["content"]
    assert text == server.says(f"system:Be brief.\nuser:{PROMPT}\nassistant:")
    chunks = server.chunks("/chat/completions", body)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert chunks[-1]["usage"]["total_tokens"] == answer["usage"]["total_tokens"]


def test_openais_client(client: openai.OpenAI) -> None:
    (name,) = [model.id for model in client.models.list()]
    messages: Any = [message(PROMPT)]
    whole = client.chat.completions.create(model=name, messages=messages, **GREEDY)
    stream = client.chat.completions.create(model=name, messages=messages, stream=True, **GREEDY)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == whole.choices[0].message.content
    response = client.responses.create(model=name, input=PROMPT, max_output_tokens=8, temperature=0)
    assert response.output_text == whole.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=messages)


def test_a_seed_makes_sampling_repeatable(server: Served) -> None:
    def text(seed: int) -> str:
        body = {"prompt": PROMPT, "temperature": 1.5, "max_tokens": 12, "seed": seed}
        return str(server.ask("/completions", body)["choices"][0]["text"])

    texts = [text(seed) for seed in (1, 2, 3)]
    assert len(set(texts)) == 3
    assert text(2) == texts[1]


def test_stop_texts(server: Served) -> None:
    whole = server.says(PROMPT)
    stop = whole[2:6]
    for stops in (stop, [stop, "never so"]):
        body = {"prompt": PROMPT, **GREEDY, "stop": stops}
        (choice,) = server.ask("/completions", body)["choices"]
        assert choice["finish_reason"] == "stop"
        assert stop in choice["text"]
        assert len(choice["text"]) < len(whole)
    body = {"prompt": PROMPT, **GREEDY, "stop": []}
    assert server.ask("/completions", body)["choices"][0]["text"] == whole


def test_an_answer_ends_with_the_context(server: Served) -> None:
    prompt = "word " * 470
    body = {"messages": [message(prompt)], "temperature": 0}
    for more in ({}, {"max_tokens": 100000}):
        answer = server.ask("/chat/completions", {**body, **more})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 512


# --- prompts that begin as the last one did ------------------------------------------------------


def test_a_conversation_is_computed_once(server: Served) -> None:
    messages = [message(PROMPT)]
    server.says("Something else before.")
    reused, total = [], []
    for turn in range(3):
        answer = server.ask("/chat/completions", {"messages": messages, **GREEDY})
        text = answer["choices"][0]["message"]["content"]
        reused.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        total.append(answer["usage"]["total_tokens"])
        messages += [message(text, "assistant"), message(f"And then, {turn}?")]
    assert reused[0] < 3
    # All but the last token of the turn before, which was not computed yet.
    assert reused[1:] == [total[0] - 1, total[1] - 1]
    # The same as without anything to reuse.
    server.says("Something else again.")
    last = server.ask("/chat/completions", {"messages": messages[:-2], **GREEDY})
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] < 3
    assert last["choices"][0]["message"]["content"] == text


def test_the_same_again(server: Served) -> None:
    body = {"messages": [message("Go up, and speak.")], **GREEDY}
    first = server.ask("/chat/completions", body)
    chunks = server.chunks("/chat/completions", body)
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
    again = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert again == first["choices"][0]["message"]["content"]


# --- refusals ------------------------------------------------------------------------------------


def test_another_model(server: Served) -> None:
    refusal = server.refusal("/completions", {"prompt": "x", "model": "mixtral"})
    assert refusal == (404, "there is no model 'mixtral' here, only 'tiny'", "model_not_found")
    for name in ("tiny@main", "tiny:x.gguf", "../tiny", 5, ["tiny"]):
        assert server.refusal("/completions", {"prompt": "x", "model": name})[0] == 404
    for path in ("load_model", "reset", "/audio/transcriptions", "/systemone"):
        assert server.refusal(path, {"model": "mixtral"})[0] == 404


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"null", b"[" * 10000])
def test_bodies_that_are_no_objects(server: Served, body: bytes) -> None:
    for path in ("/completions", "/chat/completions", "/responses"):
        status, line, _ = server.refusal(path, body)
        assert status == 400
        assert "\n" not in line


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("/completions", {"prompt": ""}, "the prompt is empty"),
        ("/completions", {"prompt": ["a", "b"]}, "prompt must be a string"),
        ("/completions", {"prompt": "x", "max_tokens": 0}, "max_new_tokens is out of its range"),
        ("/completions", {"prompt": "x", "max_tokens": "many"}, "cannot be used"),
        ("/completions", {"prompt": "x", "temperature": -1}, "temperature is out of its range"),
        ("/completions", {"prompt": "x", "top_p": 3}, "top_p is out of its range"),
        ("/completions", {"prompt": "x", "frequency_penalty": -2}, "repetition_penalty is out"),
        ("/completions", {"prompt": "x", "seed": "y"}, "seed must be an integer"),
        ("/chat/completions", {}, "KeyError: 'messages'"),
        ("/chat/completions", {"messages": "x"}, "cannot be used"),
        ("/chat/completions", {"messages": [{"role": "user", "content": 5}]}, "cannot be used"),
        ("/chat/completions", {"messages": [PICTURE]}, "reads text alone, and no image_url"),
        ("/completions", {"prompt": "\ud800"}, "cannot be used"),
        ("/responses", {}, "KeyError: 'input'"),
        # What the handlers would pass over.
        ("/completions", {"prompt": "x", "n": 2}, "n is not supported"),
        ("/completions", {"prompt": "x", "logprobs": 0}, "logprobs is not supported"),
        ("/completions", {"prompt": "x", "echo": True}, "echo is not supported"),
        ("/chat/completions", {"response_format": {"type": "json_object"}}, "response_format is"),
        ("/chat/completions", {"tool_choice": "required"}, "tool_choice is not supported"),
        ("/responses", {"previous_response_id": "x"}, "previous_response_id is not supported"),
        ("/chat/completions", {"logit_bias": {"5": 100}}, "logit_bias is not supported"),
        ("/completions", {"prompt": "x", "logit_bias": {"5": 100}}, "logit_bias is not supported"),
        ("/completions", {"prompt": "x", "stop": 5}, "stop must be a text"),
        ("/completions", {"prompt": "x", "stop": ["a", 5]}, "stop must be a text"),
        ("/completions", {"prompt": "x", "stop": ""}, "stop must be a text"),
        ("/completions", {"prompt": "x", "stop": ["a", ""]}, "stop must be a text"),
    ],
)
def test_requests_that_cannot_be_used(
    server: Served, path: str, body: dict[str, Any], why: str
) -> None:
    for stream in (False, True):
        status, line, _ = server.refusal(path, {**body, "stream": stream})
        assert status == 400
        assert why in line


def test_usual_values_of_what_is_not_supported(server: Served) -> None:
    usual = {"n": 1, "logprobs": None, "presence_penalty": 0, "user": "x"}
    plain = {"response_format": {"type": "text"}, "logprobs": False, "tool_choice": "auto"}
    assert server.ask("/completions", {"prompt": PROMPT, **usual, **GREEDY})["choices"]
    body = {"messages": [message(PROMPT)], **usual, **plain, **GREEDY}
    assert server.ask("/chat/completions", body)["choices"]


def test_fields_that_nobody_knows(server: Served) -> None:
    status, line, _ = server.refusal("/completions", {"prompt": "x", "tempratur": 1})
    assert status == 422
    assert "tempratur" in line
    for path in ("/completions", "/chat/completions", "/responses"):
        body = {"generation_config": json.dumps({"use_mtp": True}), "prompt": "x"}
        assert server.refusal(path, body)[0] == 422


def test_a_prompt_beyond_the_context(server: Served) -> None:
    for path, body in {
        "/completions": {"prompt": "word " * 600},
        "/chat/completions": {"messages": [message("word " * 600)]},
    }.items():
        for stream in (False, True):
            status, line, code = server.refusal(path, {**body, "stream": stream})
            assert (status, code) == (400, "context_length_exceeded")
            assert "the model's context is 512 tokens" in line


# --- clients that leave, and several at once -----------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves(server: Served, stream: bool) -> None:
    """What it asked for is not computed on; another client waits for no more than a token."""
    stopped = server.log.count("a request was stopped")
    host, port = "localhost", int(server.url.split(":")[2].partition("/")[0])
    body = json.dumps({"prompt": PROMPT, "max_tokens": LONG, "stream": stream})
    with socket.create_connection((host, port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n"
        connection.sendall(f"{head}content-type: application/json\r\n\r\n{body}".encode())
        if stream:
            assert b"200" in connection.recv(100)
        else:
            time.sleep(0.3)
    wait_for(lambda: server.log.count("a request was stopped") > stopped, timeout=10)
    assert len(server.says(PROMPT)) > 8


def test_clients_take_turns(server: Served) -> None:
    wanted = {text: server.says(text) for text in (PROMPT, "Go up, and", "In the beginning")}
    got: dict[str, str] = {}

    def ask(text: str) -> None:
        got[text] = server.says(text)

    threads = [threading.Thread(target=ask, args=(text,)) for text in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == wanted


def test_an_answer_does_not_keep_others_from_the_list(server: Served) -> None:
    with server.open("/completions", {"prompt": PROMPT, "max_tokens": LONG, "stream": True}) as r:
        assert r.readline()
        assert server.ask("/models")["data"]
        assert server.ask("health") == {"status": "ok"}
