"""``moepack eval --source``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moepack.cli import run
from tests import families
from tests.commands import Command
from tests.packs import make_pack

ASSETS = Path(__file__).parents[1] / "assets"
TINY, TEXT = ASSETS / "tiny-moe", ASSETS / "text" / "tiny-moe-valid.txt"


def evaluate(pack: Path, source: Path, *more: str) -> int:
    text = ("--text", str(TEXT), "--max-tokens", "1100")
    return run(["eval", str(pack), *text, "--source", str(source), *more])


def test_sixteen_bits_do_not_diverge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pack(TINY, tmp_path, attn_bits=16, expert_bits=16)
    capsys.readouterr()
    assert evaluate(tmp_path, TINY, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert values["top1_agreement"] == 1
    assert values["perplexity"] == pytest.approx(values["source_perplexity"])
    assert (values["windows"], values["tokens"]) == (3, 1097)


def test_two_bits_diverge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pack(TINY, tmp_path, attn_bits=16, expert_bits=2)
    capsys.readouterr()
    assert evaluate(tmp_path, TINY, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert 0.01 < values["kl_divergence"] < 0.1
    assert 0.6 < values["top1_agreement"] < 0.95
    assert 0 < values["kl_divergence_95"] < 0.1
    above = values["nats_per_token"] - values["source_nats_per_token"]
    assert values["nats_per_token_above_source"] == pytest.approx(above)
    assert evaluate(tmp_path, TINY) == 0
    assert "top-1 agreement" in capsys.readouterr().out


def test_one_window_has_no_interval(tmp_path: Path, command: Command) -> None:
    make_pack(TINY, tmp_path, attn_bits=16, expert_bits=2)
    few = ["eval", tmp_path, "--text", TEXT, "--max-tokens", 60, "--source", TINY]
    shown = command(*few).out
    assert "(59 tokens in one window: no interval)" in shown
    assert "inf" not in shown
    assert "±" not in shown
    assert command(*few, "--json").json["kl_divergence_95"] is None


def test_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pack(TINY, tmp_path / "pack", attn_bits=16, expert_bits=2)
    other = families.save_checkpoint(families.random_model("mixtral"), tmp_path / "other")
    assert evaluate(tmp_path / "pack", other) == 2
    assert "not the source of this pack: vocab_size differs" in capsys.readouterr().err
