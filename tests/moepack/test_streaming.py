"""A source that is run layer by layer computes what transformers computes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moepack.convert.sources.checkpoint import open_checkpoint
from moepack.streaming import StreamedModel
from tests import families


def stream(folder: Path, batches: Sequence[Tensor], **arguments: object) -> list[Tensor]:
    with closing(open_checkpoint(str(folder))) as checkpoint:
        return list(StreamedModel(checkpoint, **arguments).run(batches))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_logits_equal_the_stock_model(family: str, tmp_path: Path) -> None:
    stock = families.random_model(family)
    families.save_checkpoint(stock, tmp_path)
    batches = [families.tokens(2, 9), families.tokens(1, 5, seed=2), families.tokens(1, 70, seed=3)]
    for found, ids in zip(stream(tmp_path, batches), batches, strict=True):
        wanted = families.logits(stock, ids)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


class Counting:
    """Counts what an observer is told."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.left: dict[int, int] = {}
        self.finished: list[int] = []

    def experts_called(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        assert index.shape == weights.shape == (len(hidden), 2)
        assert layer == len(self.finished)
        self.rows[layer] = self.rows.get(layer, 0) + len(hidden)

    def layer_left(self, layer: int, hidden: Tensor) -> None:
        assert hidden.shape[2] == 64
        self.left[layer] = self.left.get(layer, 0) + hidden.shape[0] * hidden.shape[1]

    def layer_finished(self, layer: int) -> None:
        self.finished.append(layer)


def test_one_layer_at_a_time_and_every_token_seen(tmp_path: Path) -> None:
    families.save_checkpoint(families.random_model("mixtral"), tmp_path)
    observer = Counting()
    with closing(open_checkpoint(str(tmp_path))) as checkpoint:
        streamed = StreamedModel(checkpoint, observer=observer)

        def loaded() -> set[str]:
            return {
                name.split(".")[2]
                for name, tensor in streamed.model.named_parameters()
                if "layers." in name and not tensor.is_meta
            }

        assert loaded() == set()
        passed: list[int] = []

        def progress(count: int) -> None:
            passed.append(count)
            assert loaded() == set()

        list(streamed.run([families.tokens(2, 9), families.tokens(1, 4)], progress))
    assert passed == [1, 2, 3]
    assert observer.finished == [0, 1, 2]
    assert observer.rows == observer.left == dict.fromkeys(range(3), 18 + 4)


def test_changed_weights_are_used(tmp_path: Path) -> None:
    stock = families.random_model("mixtral")
    families.save_checkpoint(stock, tmp_path)
    ids = families.tokens()

    def zeroed(layer: int, expert: int, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**parts, "down": parts["down"] * (layer != 1)}

    with torch.no_grad():
        stock.model.layers[1].mlp.experts.down_proj.zero_()
    found = stream(tmp_path, [ids], experts=zeroed)[0]
    torch.testing.assert_close(found, families.logits(stock, ids), atol=1e-4, rtol=1e-4)


def test_an_abandoned_run_leaves_the_model_usable(tmp_path: Path) -> None:
    stock = families.random_model("mixtral")
    families.save_checkpoint(stock, tmp_path)
    ids = families.tokens()
    with closing(open_checkpoint(str(tmp_path))) as checkpoint:
        streamed = StreamedModel(checkpoint)
        first = streamed.run([ids, ids])
        next(first)
        first.close()
        again = next(iter(streamed.run([ids])))
    torch.testing.assert_close(again, families.logits(stock, ids), atol=1e-4, rtol=1e-4)
