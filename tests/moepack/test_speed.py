"""Measuring speed where work is queued on a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from moepack.commands.eval_command import _logits
from moepack.speed import PackRunner

META = torch.device("meta")


class OnDevice:
    """Stands for a model on a GPU: takes ids of its own device alone."""

    device = META

    def __init__(self) -> None:
        self.calls = 0
        self.finished: list[int] = []  # calls before each wait for the device
        link = SimpleNamespace(finish=lambda: self.finished.append(self.calls))
        self.moepack = SimpleNamespace(tier=SimpleNamespace(link=link), compiled=None)

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        assert input_ids.device == self.device
        self.calls += 1
        return SimpleNamespace(past_key_values=None, logits=torch.zeros(1, 2, 3))


def test_tokens_go_to_the_device_and_times_end_when_it_is_done() -> None:
    model = OnDevice()
    runner = PackRunner(model)
    runner.prefill([1, 2, 3])
    runner.decode([4, 5])
    assert model.finished == [1, 3]


def test_a_model_is_compared_with_its_source_on_the_cpu() -> None:
    assert _logits(OnDevice(), torch.tensor([[1, 2]])).is_cpu
