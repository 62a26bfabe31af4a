"""Routing traces: what is recorded, what is written, and that it is read back."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moepack
from moepack_formats.errors import UsageError
from moepack_runtime.loading import load_pack
from moepack_runtime.trace.recorder import RoutingRecorder
from moepack_runtime.trace.trace_file import (
    NOTHING,
    Routing,
    Trace,
    TraceInfo,
    TraceWriter,
    most_used,
    read_trace,
)
from tests import families
from tests.packs import FamilyPacks

LAYERS, EXPERTS, CHOICES, GUESSES = 3, 5, 2, 4
INFO = TraceInfo(
    pack="ab" * 32,
    model="someone/model",
    record_nbytes=((4096,) * EXPERTS, (8192,) * EXPERTS, (4096,) * EXPERTS),
    top_k=CHOICES,
    ahead=2,
    fixed_nbytes=123456,
    compute_ms=1.25,
    disk_mbps=None,
)


def routing(tokens: int, seed: int) -> Routing:
    """Random routing with empty places at the ends."""
    generator = np.random.default_rng(seed)
    shape = (tokens, LAYERS, CHOICES)
    experts = generator.permuted(
        np.broadcast_to(np.arange(EXPERTS, dtype=np.int16), (tokens, LAYERS, EXPERTS)), axis=-1
    )[..., :CHOICES]
    experts[..., -1][generator.random(shape[:2]) < 0.2] = NOTHING
    weights = np.where(experts >= 0, generator.random(shape, np.float32), 0).astype(np.float32)
    guesses = generator.integers(0, EXPERTS, (2, tokens, LAYERS, GUESSES)).astype(np.int16)
    guesses[0, :, 0], guesses[1, :, :2] = NOTHING, NOTHING
    return Routing(experts, weights, guesses)


def write(path: Path, windows: list[Routing], info: TraceInfo = INFO) -> Path:
    writer = TraceWriter(path, info.ahead)
    for window in windows:
        writer.write(window)
    writer.finish(info)
    return path


@settings(max_examples=25)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 99))
def test_a_trace_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int
) -> None:
    windows = [routing(length, seed + i) for i, length in enumerate(lengths)]
    read = read_trace(write(tmp_path_factory.mktemp("trace") / "a.parquet", windows))
    assert read.info == INFO
    experts = np.concatenate([w.experts for w in windows])
    weights = np.concatenate([w.weights for w in windows])
    guesses = np.concatenate([w.guesses for w in windows], axis=1)
    width = read.routing.experts.shape[-1]  # narrower if no token has all its places
    assert np.array_equal(read.routing.experts, experts[..., :width])
    assert np.array_equal(read.routing.weights, weights[..., :width])
    assert np.array_equal(read.routing.guesses, guesses)
    assert (experts[..., width:] == NOTHING).all()


def test_other_programs_can_read_it(tmp_path: Path) -> None:
    window = routing(4, 0)
    path = write(tmp_path / "a.parquet", [window])
    table = pq.read_table(path)
    assert table.column_names == ["token", "layer", "experts", "weights", "guess_1", "guess_2"]
    rows = table.to_pylist()
    assert [(row["token"], row["layer"]) for row in rows[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert rows[4]["experts"] == [e for e in window.experts[1, 1].tolist() if e >= 0]
    assert rows[0]["guess_1"] == []
    assert rows[5]["guess_2"] == window.guesses[1, 1, 2].tolist()
    assert json.loads(pq.read_metadata(path).metadata[b"moepack"])["model"] == "someone/model"


def test_nothing_is_left_of_an_unfinished_trace(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "a.parquet", 2)
    writer.write(routing(3, 0))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
    writer = TraceWriter(tmp_path / "a.parquet", 2)
    writer.write(routing(3, 0))
    writer.finish(INFO)
    writer.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(moepack.MoepackError, match=r"a\.parquet.*No such file") as error:
        TraceWriter(tmp_path / "none" / "a.parquet", 0)
    assert error.value.exit_code == 5
    with pytest.raises(moepack.MoepackError, match=r"none\.parquet.*No such file") as error:
        read_trace(tmp_path / "none.parquet")
    assert error.value.exit_code == 5


def _damage(path: Path, how: str) -> None:
    if how == "text":
        path.write_text("not Parquet at all")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif how == "other Parquet":
        pq.write_table(pa.table({"a": [1]}), path)
    elif how == "rows":
        table = pq.read_table(path)
        pq.write_table(table.slice(1), path)
    elif how == "expert":
        write(path, [routing(3, 0)], replace(INFO, record_nbytes=((4096,),) * LAYERS))
    elif how == "version":
        table = pq.read_table(path)
        values = json.loads(pq.read_metadata(path).metadata[b"moepack"]) | {"version": 2}
        pq.write_table(table.replace_schema_metadata({"moepack": json.dumps(values)}), path)
    elif how == "fields":
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({"moepack": '{"version": 1}'}), path)


@pytest.mark.parametrize(
    "how", ["text", "cut", "other Parquet", "rows", "expert", "version", "fields"]
)
def test_files_that_are_not_traces(tmp_path: Path, how: str) -> None:
    path = write(tmp_path / "a.parquet", [routing(3, 0)])
    _damage(path, how)
    with pytest.raises(UsageError, match=r"not a routing trace .*moepack trace") as error:
        read_trace(path)
    assert "\n" not in str(error.value)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for use in (lambda: TraceWriter(tmp_path / "a", 0), lambda: read_trace(tmp_path / "a")):
        with pytest.raises(UsageError, match=r"need pyarrow.*pip install pyarrow"):
            use()


def test_most_used() -> None:
    experts = np.array([[[0, 1]], [[1, 2]], [[1, 2]]], np.int16)
    weights = np.ones(experts.shape, np.float32)
    info = replace(INFO, record_nbytes=((4096,) * 3,), ahead=0)
    none = np.empty((0, *experts.shape), np.int16)
    assert most_used(Trace(info, Routing(experts, weights, none))) == ((0, 1), (0, 2), (0, 0))


def stock_routing(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the routers of a Mixtral give out, by hooks of the test's own."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out: seen.append((out[2], out[1])))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_pass_is_recorded_as_it_was(pack: Path) -> None:
    model = load_pack(pack, prefetch=False)
    ids = families.tokens(batch=1, length=7)
    wanted = stock_routing(model, ids)
    with torch.no_grad(), RoutingRecorder(model, ahead=2) as recorder:
        recorder.find_routers()
        assert recorder.missing == []
        model(ids, use_cache=False)
        got = recorder.take(7)
    assert got.experts.shape == got.weights.shape == (7, 3, 2)
    assert got.guesses.shape == (2, 7, 3, 8)
    for layer, (index, weights) in enumerate(wanted):
        assert got.experts[:, layer].tolist() == index.tolist()
        assert np.allclose(got.weights[:, layer], weights.numpy())
    # Each guess ranks all experts; layers that are too early have none.
    for ahead in (0, 1):
        for layer in range(3):
            ranks = got.guesses[ahead, :, layer]
            if layer > ahead:
                assert (np.sort(ranks, -1) == np.arange(8)).all()
            else:
                assert (ranks == NOTHING).all()
    assert all(compute.watcher is None for compute in model.moepack.layers)


def test_the_best_guesses_are_those_of_prefetch(pack: Path) -> None:
    """The first of the ranked guesses are what the speculator would read."""
    model = load_pack(pack, io="buffered")
    guessed: list[tuple[int, list[int]]] = []
    residency = model.moepack.residency
    real = residency.prefetch
    residency.prefetch = lambda layer, experts: (
        guessed.append((layer, list(experts))),
        real(layer, experts),
    )
    ids = families.tokens(batch=1, length=3)
    with torch.no_grad(), RoutingRecorder(model, ahead=1) as recorder:
        recorder.find_routers()
        model(ids[:, :1], use_cache=False)
        got = recorder.take(1)
    assert [layer for layer, _ in guessed] == [1, 2]
    for layer, experts in guessed:
        assert got.guesses[0, 0, layer, :2].tolist() == experts


@pytest.mark.parametrize("family", ["llama4_text", "longcat_flash", "deepseek_v3", "phimoe"])
def test_families_of_other_kinds_are_recorded(
    family: str, tmp_path: Path, family_packs: FamilyPacks
) -> None:
    model = load_pack(family_packs(family), prefetch=False)
    with torch.no_grad(), RoutingRecorder(model, ahead=1) as recorder:
        recorder.find_routers()
        model(families.tokens(batch=1, length=6), use_cache=False)
        got = recorder.take(6)
    layers = len(model.moepack.layers)
    top_k = 3 if family == "longcat_flash" else 2
    assert got.experts.shape == (6, layers, top_k)
    assert ((got.experts >= NOTHING) & (got.experts < 8)).all()
    assert (got.experts >= 0).any(-1).any()
    read = read_trace(_saved(tmp_path / "a.parquet", got, layers))
    assert len(read.routing.experts) == 6


def _saved(path: Path, got: Routing, layers: int) -> Path:
    info = replace(INFO, record_nbytes=((4096,) * 8,) * layers, ahead=len(got.guesses))
    return write(path, [got], info)
