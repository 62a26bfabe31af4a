"""``moepack plan``: sizes from a config alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moepack.cli import run
from moepack.convert.meta_model import build_meta_model
from moepack.convert.sizing import RECIPES, Fit, Machine, best, lacking, recipes, sizes_of
from moepack_formats.schemes import SCHEMES
from moepack_runtime.cache.residency import fixed_nbytes
from moepack_runtime.loading import load_pack
from tests import families
from tests.commands import Command
from tests.packs import make_pack

TINY = Path(__file__).parents[1] / "assets" / "tiny-moe"
CONFIG: dict[str, Any] = json.loads((TINY / "config.json").read_text())


def machine(ram: int, disk: int = 1 << 40) -> Machine:
    return Machine(0, ram, disk, memory_speed=40e9, disk_speed=1e9)


def chosen_of(machine: Machine) -> Fit:
    chosen = best(recipes(sizes_of(CONFIG), machine))
    assert chosen is not None
    return chosen


@pytest.mark.parametrize("scheme", ["q2g64", "q3g16s5"])
def test_sizes_are_those_of_the_pack(tmp_path: Path, scheme: str) -> None:
    sizes = sizes_of(CONFIG)
    manifest = make_pack(TINY, tmp_path, scheme=scheme, quantizer="rtn")
    assert sizes.record_nbytes[scheme] == manifest.sizes.expert_nbytes
    assert sizes.trunk_nbytes == manifest.sizes.trunk_nbytes
    assert sizes.expert_parameters == manifest.sizes.expert_parameters
    assert sizes.token_nbytes[scheme] == manifest.sizes.expert_nbytes // 4  # 2 of 8


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family_can_be_sized(family: str) -> None:
    config = families.config_of(family).to_dict()
    sizes = sizes_of(config)
    assert build_meta_model(config) is not None
    assert 0 < sizes.token_nbytes["q2g64"] < sizes.record_nbytes["q2g64"]


def test_a_token_reads_one_row_of_an_embedding_that_is_not_the_head() -> None:
    tied = sizes_of(CONFIG)
    untied = sizes_of({**CONFIG, "tie_word_embeddings": False})
    shape = CONFIG["vocab_size"], CONFIG["hidden_size"]
    embedding = SCHEMES["q6g64"].packed_nbytes(*shape)  # as convert makes it by default
    assert tied.trunk_token_nbytes == tied.trunk_nbytes
    assert untied.trunk_nbytes == tied.trunk_nbytes + embedding
    assert untied.trunk_token_nbytes == tied.trunk_nbytes


def test_a_width_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(TINY), "--attn-bits", "5"]) == 2
    assert "--attn-bits (wanted one of 2, 3, 4, 6, 8, 16, got 5)" in capsys.readouterr().err


def test_more_memory_is_more_bits() -> None:
    sizes = sizes_of(CONFIG)
    rooms = (3_018_656, 3_618_656, 6_318_656)  # beside the trunk
    chosen = [chosen_of(machine(sizes.trunk_ram_nbytes + room)) for room in rooms]
    assert [one.resident for one in chosen] == [1, 1, 1]
    assert chosen[0].bits < chosen[1].bits < chosen[2].bits
    assert chosen[1].name.startswith("mixed")


def test_too_little_memory_reads_from_the_disk() -> None:
    found = chosen_of(machine(4_000_000))
    assert found.name == "q2g64"
    assert 0 < found.resident < 1
    slow = Machine(0, 4_000_000, 1 << 40, memory_speed=40e9, disk_speed=1e7)
    assert chosen_of(slow).tokens_per_s < found.tokens_per_s


@pytest.mark.parametrize(
    ("ram", "disk", "what"),
    [
        (1 << 30, 1 << 20, ["disk"]),
        (1 << 20, 1 << 40, ["memory"]),
        (1 << 20, 1 << 20, ["memory", "disk"]),
    ],
)
def test_nothing_fits(ram: int, disk: int, what: list[str]) -> None:
    sizes, there = sizes_of(CONFIG), machine(ram, disk)
    assert best(recipes(sizes, there)) is None
    line = str(lacking(sizes, there))
    assert [word in line for word in (" of memory", " of disk")] == [
        word in what for word in ("memory", "disk")
    ]


def test_what_is_missing_on_a_gpu() -> None:
    sizes = sizes_of(CONFIG)
    trunk = sizes.trunk_nbytes
    there = Machine(
        trunk + sizes.context_nbytes, 1 << 30, 1 << 40, memory_speed=40e9, disk_speed=1e9
    )
    assert best(recipes(sizes, there)) is None
    assert "of GPU memory, got" in str(lacking(sizes, there))
    # A shorter text leaves room for some experts.
    shorter = sizes_of(CONFIG, context=64)
    assert 0 < shorter.context_nbytes < sizes.context_nbytes
    assert best(recipes(shorter, there)) is not None


@pytest.mark.parametrize("budget", [("--ram", "1MiB"), ("--disk", "1MiB"), ("--vram", "1MiB")])
def test_figures_where_nothing_fits(
    tmp_path: Path, command: Command, budget: tuple[str, str]
) -> None:
    arguments = ["plan", TINY, "--folder", tmp_path, *budget]
    result = command(*arguments)
    assert "no recipe fits, not even q2g64 (wanted more than " in result.error(5)
    assert "1.0 MiB" in result.err
    assert [f" {name} " in result.out for name in RECIPES] == [True] * len(RECIPES)
    assert "moepack convert" not in result.out
    values = command(*arguments, "--json").json
    assert values["recipe"] is None
    assert values["recipes"][-1]["nbytes"] > 1 << 20


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_room_is_what_generate_gets(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, process = "q3g16s5", 300 << 20
    monkeypatch.setattr("moepack_runtime.cache.residency.own_nbytes", lambda: process)
    make_pack(TINY, tmp_path, scheme=scheme, quantizer="rtn")
    sizes, fixed = sizes_of(CONFIG), fixed_nbytes()
    ram = int(fixed + sizes.trunk_ram_nbytes + share * sizes.record_nbytes[scheme])
    model = load_pack(tmp_path, ram=ram, io="buffered", device="cpu")
    plan = Machine(0, ram, 1 << 40, memory_speed=40e9, disk_speed=1e9, fixed=fixed)
    budget = model.moepack.budget
    (fit,) = [one for one in recipes(sizes, plan) if one.name == scheme]
    assert fit.resident == pytest.approx(budget.for_slots / budget.everything, abs=0.01)
    assert fit.resident == pytest.approx(share, abs=0.01)


def test_on_a_gpu_the_trunk_and_an_expert_in_both_memories_count_once() -> None:
    sizes = sizes_of(CONFIG)
    trunk = sizes.trunk_nbytes + sizes.context_nbytes  # what is no expert
    for vram, ram, room in (
        (2 * trunk, 3 << 20, max(int(2 * trunk * 0.98) - trunk, 2 << 20)),
        (2 * trunk, 1 << 30, (1 << 30) - (1 << 20)),
        (trunk, 1 << 30, int(trunk * 0.98) - trunk),  # not even the trunk fits
    ):
        plan = Machine(vram, ram, 1 << 40, memory_speed=40e9, disk_speed=1e9, fixed=1 << 20)
        assert plan.room(sizes) == room


def test_the_context_is_shown_where_it_takes_gpu_memory(tmp_path: Path, command: Command) -> None:
    arguments = ["plan", TINY, "--folder", tmp_path, "--ram", "1GiB"]
    assert "context" not in command(*arguments).out
    shown = command(*arguments, "--vram", "8MiB", "--context", 128).out
    heads = CONFIG["num_key_value_heads"]
    assert ", context " in shown
    values = command(*arguments, "--vram", "8MiB", "--context", 128, "--json").json
    width = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    nbytes = torch.bfloat16.itemsize * 2 * CONFIG["num_hidden_layers"] * heads * width * 128
    assert values["context_bytes"] in (nbytes, 2 * nbytes)


def test_only_the_config_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moepack_runtime.cache.residency.fixed_nbytes", lambda: 0)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(TINY / "config.json", source)
    folder = ["--folder", str(tmp_path)]
    assert run(["plan", str(source), "--ram", "6MiB", *folder, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["recipe"]["nbytes"] <= 6 << 20
    assert values["machine"]["disk_speed"] > 0
    assert run(["plan", str(source), "--ram", "6MiB", *folder]) == 0
    shown = capsys.readouterr().out
    assert f"convert {source} OUT --attn-bits 4 {values['recipe']['options']}" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
