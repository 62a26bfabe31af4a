from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from moepack.commands.pull_command import parse_layers
from moepack.convert.sources.shard_stage import Schedule, Span
from moepack.hub.card import model_card
from moepack_formats.errors import NetworkError, ResourceError, UsageError
from moepack_formats.manifest import FORMAT_NAME, Manifest, Recipe, Sizes, Source
from moepack_runtime.hub.errors import explain, is_transient
from moepack_runtime.hub.repo_id import looks_like_repo_id
from moepack_runtime.hub.retry import retrying


def test_layer_lists() -> None:
    assert parse_layers("0-2, 7") == [0, 1, 2, 7]
    for text in ("", "a", "3-1", "1-", "-1", "1,,2", "9999999"):
        with pytest.raises(UsageError):
            parse_layers(text)


def test_hub_ids() -> None:
    for name in ("me/pack", "a/b.c-d_e"):
        assert looks_like_repo_id(name)
    for name in ("pack", "../pack", "/tmp/pack", "a/b/c", "a/b--c", "a/b.git", "a/" + "b" * 96):
        assert not looks_like_repo_id(name)


def test_a_full_disk_is_not_tried_again() -> None:
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("writing: No space left on device (os error 28)"),
    ):
        assert not is_transient(error)
        assert isinstance(explain(error, "me/pack"), ResourceError)
        with pytest.raises(ResourceError, match="no space left"):
            retrying(lambda error=error: throw(error), "me/pack")


def test_what_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    with pytest.raises(NetworkError, match="ConnectionResetError"):
        retrying(lambda: throw(ConnectionResetError("hf_secret")), "me/pack")
    assert pauses == [1.0, 4.0, 10.0]
    for error in (OfflineModeIsEnabled("x"), LocalEntryNotFoundError("x"), ValueError("x")):
        assert not is_transient(error)


def test_the_hub_says_how_long_to_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    answers = [
        (
            {"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'},
            56,
        ),
        ({"Retry-After": "20"}, 20),
        ({"Retry-After": "86400"}, 310),
        None,
    ]
    tries = iter(answers)

    def ask() -> str:
        answer = next(tries)
        if answer is None:
            return "done"
        response = SimpleNamespace(status_code=429, headers=answer[0], request=None)
        raise HfHubHTTPError("busy: https://hub/x?token=hf_secret", response=response)

    assert retrying(ask, "me/pack") == "done"
    assert pauses == [answer[1] for answer in answers if answer]
    # Who waits so long is told why, without what the address holds.
    assert "HTTP 429; trying again in 56 s" in caplog.text
    assert "hf_secret" not in caplog.text


def throw(error: Exception) -> None:
    raise error


def test_disk_of_a_streamed_source() -> None:
    schedule = Schedule(
        first_layer={"a": 0, "b": 0, "c": 1},
        last_layer={"a": 0, "b": 1, "c": 1},
        trunk={"a": [Span("a", 0, 5)], "d": [Span("d", 0, 20)]},
    )
    # Layer 0 needs a and b, layer 1 b and c; the trunk of a stays, and d is fetched last.
    assert schedule.staged_nbytes({"a": 100, "b": 50, "c": 70, "d": 20}) == 150 + 25 + 20


def test_a_card_is_yaml_whatever_the_source_says() -> None:
    import yaml

    strange = 'org/x: "y"\n- z'
    manifest = Manifest(
        format=FORMAT_NAME,
        format_version=1,
        min_reader=1,
        generator="moepack",
        model_type="mixtral",
        architecture="M",
        source=Source(strange, None, "a: [b"),
        recipe=Recipe("rtn", "q4g64", "source", ("q2g64",)),
        sizes=Sizes(1, 1, 1, 1, 1),
        layers=(),
    )
    head = model_card(manifest).decode().split("---\n")[1]
    values = yaml.safe_load(head)
    assert values["base_model"].split() == strange.split()
    assert values["license"] == "a: [b"
    assert values["tags"] == ["moepack", "moe", "quantized"]
