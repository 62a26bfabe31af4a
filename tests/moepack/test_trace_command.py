"""``moepack trace``, ``moepack simulate``, ``--pin`` and ``--cache-bias``."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moepack.commands import trace_command
from moepack_formats import osio
from moepack_formats.errors import UsageError
from moepack_runtime.gpu.simulated_link import LinkSpec
from moepack_runtime.loading import load_pack
from moepack_runtime.policies import policy_names
from moepack_runtime.trace.recorder import RoutingRecorder
from moepack_runtime.trace.trace_file import read_trace
from tests.commands import ASSETS, Command

TEXT = ASSETS / "text" / "tiny-moe-valid.txt"


@pytest.fixture
def trace(pack: Path, tmp_path: Path, command: Command) -> Path:
    out = tmp_path / "a.parquet"
    result = command("trace", pack, out, "--text", TEXT, "--max-tokens", 300, "--ahead", 2)
    assert (result.code, result.out) == (0, f"300 tokens in 3 layers: {out}\n")
    return out


def test_a_trace_of_a_text(trace: Path, pack: Path) -> None:
    read = read_trace(trace)
    assert read.routing.experts.shape == (300, 3, 2)
    assert read.routing.guesses.shape == (2, 300, 3, 8)
    assert read.info.top_k == 2
    assert read.info.compute_ms is not None
    assert read.info.compute_ms > 0
    assert read.info.disk_mbps is not None
    assert read.info.disk_mbps > 0
    assert [path.name for path in trace.parent.iterdir()] == ["a.parquet"]
    assert not any("speed" in path.name for path in pack.parent.iterdir())


def test_simulate(trace: Path, command: Command) -> None:
    result = command(
        "simulate", trace, "--slots", "6,12", "--compute-ms", 2, "--disk-mbps", 100, "--json"
    )
    values = result.json
    assert [(r["policy"], r["slots"]) for r in values["results"]] == [
        (name, slots) for slots in (6, 12) for name in policy_names()
    ]
    assert (values["tokens"], values["layers"], values["experts"]) == (300, 3, 24)
    by_policy = {r["policy"]: r for r in values["results"] if r["slots"] == 12}
    assert by_policy["belady"]["hit_ratio"] == max(r["hit_ratio"] for r in by_policy.values())
    for one in values["results"]:
        reading = one["bytes_per_token"] / 100e6
        assert one["tokens_per_s_serial"] == pytest.approx(1 / (0.002 + reading))
        assert one["tokens_per_s_overlapped"] == pytest.approx(1 / max(0.002, reading))
    assert [len(shares) for shares in values["recall"].values()] == [8, 8]
    assert values["recall"]["1"][-1] == pytest.approx(1)

    table = command("simulate", trace, "--slots", 12, "--policy", "lru,lfu").out.splitlines()
    assert table[0].startswith("300 tokens, 24 experts in 3 layers, 2 a token; computing a token")
    assert [line.split()[0] for line in table[1:]] == ["policy", "lru", "lfu"]
    assert f"{by_policy['lru']['hit_ratio']:.1%}" in table[2]


def test_simulate_a_budget(trace: Path, command: Command) -> None:
    info = read_trace(trace).info
    nbytes = info.record_nbytes[0][0]
    results = command(
        "simulate", trace, "--ram", f"{info.fixed_nbytes + 7 * nbytes},1GiB", "--policy", "lru",
        "--json",
    ).json["results"]  # fmt: skip
    assert [one["slots"] for one in results] == [7, 24]


def test_simulate_a_budget_below_what_is_needed(trace: Path, pack: Path, command: Command) -> None:
    info = read_trace(trace).info
    least = info.fixed_nbytes + info.record_nbytes[0][0]
    arguments = ["simulate", trace, "--policy", "lru", "--ram"]
    assert command(*arguments, least, "--json").json["results"][0]["slots"] == 1
    line = command(*arguments, f"1GiB,{least - 1}").error(5)
    assert "not enough memory for the smallest working set" in line
    need = line.split("--ram ")[1].split()[0]
    assert command(*arguments, need).code == 0
    # The same words as of a run.
    run = command("generate", pack, "--prompt", "x", "--ram", 1000).error(5)
    assert [words in run for words in ("not enough memory for the smallest", "; give --ram ")] == [
        True,
        True,
    ]


def test_what_is_named_twice_is_simulated_once(trace: Path, command: Command) -> None:
    twice = ["--slots", "6,12,6", "--policy", "lru,lfu,lru"]
    results = command("simulate", trace, *twice, "--json").json["results"]
    assert [(one["policy"], one["slots"]) for one in results] == [
        ("lru", 6), ("lfu", 6), ("lru", 12), ("lfu", 12)
    ]  # fmt: skip


def test_the_ways_to_simulate_differ(trace: Path, command: Command) -> None:
    ways: list[tuple[Any, ...]] = [
        (), ("--scope", "layer"), ("--prefetch",), ("--pin", trace)
    ]  # fmt: skip
    read = [
        command("simulate", trace, "--slots", 9, "--policy", "lru", "--json", *way).json["results"]
        for way in ways
    ]
    assert len({one["bytes_per_token"] for (one,) in read}) == len(ways)


def test_figures(trace: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "new" / "plots"
    result = command("simulate", trace, "--slots", 6, "--plot", folder)
    assert result.code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["hit-ratio.png", "recall.png"]
    for path in folder.iterdir():
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
        assert width > 800
        assert height > 500


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no cache size; give --slots or --ram"),
        (("--slots", "0"), "not a number of slots"),
        (("--slots", "many"), "not a number of slots"),
        (("--ram", "many"), "not a size"),
        (("--slots", "3", "--policy", "fifo"), "unknown policy"),
        (("--slots", "3", "--policy", ","), "no policy"),
    ],
)
def test_simulate_refuses(
    trace: Path, command: Command, arguments: tuple[str, ...], words: str
) -> None:
    assert words in command("simulate", trace, *arguments).error(2)


def test_optional_libraries(
    trace: Path, pack: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = command("simulate", trace, "--slots", 3, "--plot", trace.parent).error(2)
    assert "need matplotlib" in line
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "need pyarrow" in command("simulate", trace, "--slots", 3).error(2)
    out = trace.parent / "b.parquet"
    assert "need pyarrow" in command("trace", pack, out, "--text", TEXT).error(2)
    assert not out.exists()


def test_a_trace_that_fails_leaves_nothing(pack: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "empty.txt").write_text("")
    out = tmp_path / "a.parquet"
    result = command("trace", pack, out, "--text", tmp_path / "empty.txt")
    assert "too short" in result.error(2)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_pins(trace: Path, pack: Path, tmp_path: Path, command: Command) -> None:
    prompt = ("--prompt", "And the", "--greedy", "--max-new-tokens", 8, "--io", "buffered")
    plain = command("generate", pack, *prompt)
    pinned = command("generate", pack, *prompt, "--pin", trace)
    assert (pinned.code, pinned.out) == (0, plain.out)
    line = command("generate", pack, *prompt, "--pin", TEXT).error(2)
    assert "not a routing trace" in line


def test_pins_of_another_model(pack: Path) -> None:
    from moepack_formats.errors import UsageError
    from moepack_runtime.loading import load_pack

    with pytest.raises(UsageError, match="the trace with the experts to pin is of another model"):
        load_pack(pack, pins=((0, 0), (3, 0)))


def test_the_optimum_does_not_run(pack: Path, command: Command) -> None:
    result = command("generate", pack, "--prompt", "a", "--policy", "belady")
    assert result.code == 2
    assert "'belady' is not one of 'least-stale', 'lfu'" in result.err


def test_what_a_cache_bias_costs(pack: Path, command: Command) -> None:
    options = ("--text", TEXT, "--max-tokens", 60, "--io", "buffered")
    half = ("--slots", 12)
    values = command(
        "eval", pack, *options, *half, "--no-prefetch", "--cache-bias", 0.5, "--json"
    ).json
    assert values["hit_ratio"] > values["hit_ratio_without_cache_bias"]
    assert values["nudged_per_token"] > 0
    assert values["perplexity"] != values["perplexity_without_cache_bias"]
    # Token by token or in windows, without a bias it is the same perplexity.
    plain = command("eval", pack, *options, "--activations", "float", "--json").json
    again = command(
        "eval", pack, *options, "--activations", "float", "--cache-bias", 0.001, "--json"
    ).json
    assert again["perplexity_without_cache_bias"] == pytest.approx(plain["perplexity"], rel=1e-3)
    assert again["tokens"] == plain["tokens"] == 59
    text = command("eval", pack, *options, *half, "--cache-bias", 0.5).out
    assert [line.split()[0] for line in text.splitlines()] == ["cache", "perplexity", "cache", "it"]
    assert "(59 tokens in one window: no interval)" in text
    assert "inf" not in text
    both = command("eval", pack, *options, "--cache-bias", 0.5, "--source", pack)
    assert "one at a time" in both.error(2)


def test_json_says_how_often_prefetch_stopped(pack: Path, command: Command) -> None:
    result = command("bench", pack, "--max-new-tokens", 2, "--rounds", 1, "--json")
    assert json.loads(result.out)["prefetch_stops"] == 0


def test_a_trace_is_recorded_on_the_cpu(
    command: Command, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is not taken where there is one, and refused where it is asked for."""
    arguments = ["trace", pack, tmp_path / "a.parquet", "--text", TEXT, "--max-tokens", 3]
    assert "recorded on the CPU" in command(*arguments, "--device", "cuda").error(2)
    loaded: dict[str, Any] = {}
    load = trace_command.load
    monkeypatch.setattr(trace_command, "load", lambda p, **o: loaded.update(o) or load(p, **o))
    assert command(*arguments).code == 0
    assert loaded["device"] == "cpu"


def test_a_recorder_refuses_a_model_on_a_device(pack: Path) -> None:
    model = load_pack(pack, link=LinkSpec(), device="cpu", hybrid="off")
    with pytest.raises(UsageError, match="recorded on the CPU"):
        RoutingRecorder(model)
    model.moepack.close()


def test_the_disk_is_measured_on_the_pack_and_nothing_is_written(
    command: Command, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("moepack.convert.bandwidth.NamedTemporaryFile", refuse)
    out = tmp_path / "a.parquet"
    assert command("trace", pack, out, "--text", TEXT, "--max-tokens", 3).code == 0
    assert read_trace(out).info.disk_mbps


def test_the_page_cache_is_not_recorded_as_the_disk(
    command: Command, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(osio, "set_direct", lambda *_: False)
    out = tmp_path / "a.parquet"
    result = command("trace", pack, out, "--text", TEXT, "--max-tokens", 3)
    assert "the speed of the disk is not known" in result.err
    assert "refuses direct reads" in result.err
    assert (result.code, read_trace(out).info.disk_mbps) == (0, None)
