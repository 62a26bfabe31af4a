"""Which shards of a Hub source lie on the disk while it is read, without a Hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from moepack.convert.sources.shard_stage import Schedule, ShardStage, Span
from moepack_runtime.hub.remote import RemoteFile

NBYTES = 64
SHARDS = {"a": (0, 1), "b": (1, 2), "c": (3,)}
"""The MoE layers with experts in each; ``d`` has none."""
TRUNK = {"embeddings": "a", 0: "a", 1: "a", 2: "b", 3: "c", "head": "c", "more": "d"}
"""Which shard the trunk of each layer, and the rest of it, is in."""
Read = tuple[str, int | None]


class Remote:
    """A repository whose files are their names over and over."""

    repo_id = "org/model"

    def __init__(self) -> None:
        self.files = {name: RemoteFile(NBYTES, None, "") for name in "abcd"}
        self.fetched: Counter[str] = Counter()

    def download(self, name: str, *, folder: Path, **_: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * NBYTES)
        self.fetched[name] += 1
        return folder / name


def experts(layers: tuple[int, ...] = (0, 1, 2, 3)) -> Iterator[Read]:
    for layer in layers:
        yield from ((shard, layer) for shard, inside in SHARDS.items() if layer in inside)


def calibration() -> Iterator[Read]:
    """Everything outside the layers, then each layer's trunk and its experts."""
    for name in ("embeddings", "head", "more"):
        yield TRUNK[name], None
    for layer in range(4):
        yield TRUNK[layer], None
        yield from experts((layer,))


def trunk() -> Iterator[Read]:
    return ((shard, None) for shard in TRUNK.values())


@pytest.mark.parametrize(
    ("passes", "fetched"),
    [
        ((experts, trunk), {"a": 1, "b": 1, "c": 1, "d": 1}),
        ((experts, experts, trunk), {"a": 2, "b": 2, "c": 2, "d": 1}),
        # Calibration needs the head, which lies with the last layer, before all layers.
        ((calibration, experts, trunk), {"a": 2, "b": 2, "c": 3, "d": 1}),
        ((trunk,), {"a": 1, "b": 1, "c": 1, "d": 1}),  # the experts were done by an earlier run
    ],
    ids=["plain", "mixed", "calibrated", "resumed"],
)
def test_shards_are_there_while_a_layer_needs_them(
    tmp_path: Path, passes: tuple[Any, ...], fetched: dict[str, int]
) -> None:
    remote = Remote()
    stage = ShardStage(cast(Any, remote), tmp_path)
    stage.plan(
        Schedule(
            first_layer={shard: layers[0] for shard, layers in SHARDS.items()},
            last_layer={shard: layers[-1] for shard, layers in SHARDS.items()},
            trunk={shard: [Span(shard, 8, 16)] for shard in "abcd"},
        )
    )
    for part in passes:
        for shard, layer in part():
            data = bytearray(16)
            stage.read_into(memoryview(data), Span(shard, 8, 16), layer, "test")
            assert data == shard.encode() * 16
            whole = {path.name for path in (tmp_path / "whole").iterdir()}
            if layer is not None:
                assert whole <= {name for name, inside in SHARDS.items() if layer in inside}
            assert len(whole) <= 2
    assert remote.fetched == fetched
    stage.clear()
    assert not tmp_path.exists()
