"""``moepack bench --profile``: where the time of a token goes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moepack import speed
from moepack_runtime.loading import load_pack
from tests.commands import Command

FEW = ("--max-new-tokens", 3, "--prompt-tokens", 5, "--rounds", 1, "--threads", 1, "--profile")


# With three slots some experts' steps are done in Python, once their records are read.
@pytest.mark.parametrize("io", [("mmap",), ("buffered", "--slots", 3)])
def test_parts_add_up(command: Command, pack: Path, io: tuple[object, ...]) -> None:
    times = command("bench", pack, *FEW, "--io", *io, "--json").json["profile"]
    assert times["tokens"] == 3
    parts = times["parts"]
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(times["seconds"])
    with_bytes = {name for name, part in parts.items() if part["nbytes"]}
    assert with_bytes == {"experts", "packed matrices", "head", "attention"}
    assert all(part["seconds"] > 0 for part in parts.values())


def test_text(command: Command, pack: Path) -> None:
    text = command("bench", pack, *FEW).out
    assert re.search(r"^profile  [\d.]+ ms a token, of which$", text, re.M)
    assert re.search(r"^ +[\d.]+ ms  experts, [\d.]+ \w+, [\d.]+ GB/s$", text, re.M)


def test_bytes_are_those_of_the_weights_and_the_context(pack: Path) -> None:
    model = load_pack(pack, io="mmap")
    runner, plan = speed.PackRunner(model), speed.Plan(4, 6, 2, 1, 0, model.config.vocab_size)
    speed.measure(plan, runner, model.moepack.stats)
    times = speed.profile(plan, runner, model)
    assert times is not None
    weights = ("experts", "packed matrices", "head")
    config = model.config
    demands = config.num_hidden_layers * config.num_experts_per_tok
    wanted = speed.packed_nbytes_per_token(model, demands)
    assert sum(times.parts[name].nbytes for name in weights) == 2 * wanted
    width = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    tokens = 7 + 8  # each sees itself too
    assert times.parts["attention"].nbytes == config.num_hidden_layers * tokens * width * 2


def test_none_where_transformers_decodes(pack: Path) -> None:
    model = load_pack(pack, tape=False)
    plan = speed.Plan(4, 4, 1, 1, 0, model.config.vocab_size)
    with torch.no_grad():
        assert speed.profile(plan, speed.PackRunner(model), model) is None
