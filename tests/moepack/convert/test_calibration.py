"""Calibrated and mixed conversion, end to end on the small model."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from moepack.cli import run
from moepack.convert import calibrated
from moepack.convert.calibration import FOLDER_NAME, Calibration, inner_activations, record
from moepack.convert.meta_model import build_meta_model
from moepack.convert.sources.checkpoint import open_checkpoint
from moepack.convert.sources.mapping import WeightMapping
from moepack_formats.errors import UsageError
from moepack_formats.pack import Pack
from tests import families
from tests.commands import Command, make_checkpoint
from tests.packs import make_pack

ASSETS = Path(__file__).parents[2] / "assets"
TINY, TEXT = ASSETS / "tiny-moe", ASSETS / "text" / "tiny-moe-valid.txt"
CALIBRATED: dict[str, Any] = {"calibrate": TEXT, "calibrate_tokens": 2048}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    return families.save_checkpoint(families.random_model("mixtral"), folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, in which schemes of few bits are not mostly padding."""
    sizes = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
    return make_checkpoint(tmp_path_factory.mktemp("small") / "source", **sizes)


def recorded(source: Path, folder: Path, ids: torch.Tensor, fewest: int) -> Any:
    checkpoint = open_checkpoint(str(source))
    mapping = WeightMapping(build_meta_model(checkpoint.config), checkpoint)
    record(mapping, ids, folder, "a source")
    return checkpoint, mapping, Calibration(folder, fewest)


def test_moments_are_those_of_the_tokens_routed_to_an_expert(mixtral: Path, tmp_path: Path) -> None:
    ids = families.tokens(1, 200)[0]
    checkpoint, mapping, calibration = recorded(mixtral, tmp_path / "c", ids, fewest=1)
    stock = families.random_model("mixtral")
    seen: list[tuple[torch.Tensor, ...]] = []
    experts = stock.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    families.logits(stock, ids[None])
    hidden, index, weights = seen[0]
    with closing(checkpoint):
        for expert in range(8):
            rows, places = (index == expert).nonzero(as_tuple=True)
            assert calibration.counts[1][expert] == len(rows)
            parts = mapping.experts(mapping.adapters[1], expert)
            found = calibration.expert(1, expert, parts, mapping.adapters[1], full=True)
            assert (found.tokens, found.pooled) == (len(rows), len(rows) < 1)
            if found.pooled:
                continue
            x, share = hidden[rows], weights[rows, places, None].square()
            wanted = (x * share).t() @ x / share.sum()
            assert found.of("up").products is not None
            torch.testing.assert_close(found.of("gate").products, wanted, atol=2e-3, rtol=2e-3)
            inner = inner_activations(parts, mapping.adapters[1], x)
            squares = (inner.square() * share).sum(0) / share.sum()
            torch.testing.assert_close(found.of("down").squares, squares, atol=1e-3, rtol=1e-2)


def test_rare_experts_are_given_the_whole_layer(mixtral: Path, tmp_path: Path) -> None:
    ids = families.tokens(1, 40)[0]
    checkpoint, mapping, calibration = recorded(mixtral, tmp_path / "c", ids, fewest=10**6)
    with closing(checkpoint):
        adapter = mapping.adapters[0]
        found = [
            calibration.expert(0, e, mapping.experts(adapter, e), adapter, full=False)
            for e in range(2)
        ]
    assert all(one.pooled for one in found)
    assert torch.equal(found[0].of("up").squares, found[1].of("up").squares)
    assert not torch.equal(found[0].of("down").squares, found[1].of("down").squares)
    hidden = calibration.layer(0).hidden.float()
    torch.testing.assert_close(found[0].of("up").squares, hidden.square().mean(0))
    assert "24 of 24 experts were seen fewer than 1000000 times" in calibration.report()


def test_what_is_recorded_is_not_recorded_again(mixtral: Path, tmp_path: Path) -> None:
    ids, folder = families.tokens(1, 20)[0], tmp_path / "c"
    checkpoint, mapping, _ = recorded(mixtral, folder, ids, fewest=1)
    with closing(checkpoint):
        before = (folder / "summary.json").stat().st_mtime_ns
        record(mapping, ids, folder, "a source")
        assert (folder / "summary.json").stat().st_mtime_ns == before
        record(mapping, ids + 1, folder, "a source")
        assert (folder / "summary.json").stat().st_mtime_ns != before


def test_calibrated_conversion_is_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: dict[str, Any] = {"attn_bits": 16, "expert_bits": 2}
    make_pack(TINY, tmp_path / "plain", **plain)
    make_pack(TINY, tmp_path / "text", quantizer="gptq", **plain, **CALIBRATED)
    assert not (tmp_path / "text" / FOLDER_NAME).exists()
    found = []
    for name in ("plain", "text"):
        capsys.readouterr()
        more = ("--text", str(ASSETS / "text" / "alice29.txt"), "--max-tokens", "1024")
        assert run(["eval", str(tmp_path / name), "--source", str(TINY), *more, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["kl_divergence"])
    assert found[1] < 0.75 * found[0]


def test_same_bytes_again_and_after_a_kill(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"expert_bits": 2.9, "quantizer": "gptq", **CALIBRATED}
    make_pack(small, tmp_path / "a", **options)
    wanted = sorted((tmp_path / "a" / "experts").iterdir())
    assert len(wanted) == 2

    from moepack.convert import run as conversion

    real, calls = conversion.quantize_matrix, []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 40:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(conversion, "quantize_matrix", dying)
    with pytest.raises(KeyboardInterrupt):
        make_pack(small, tmp_path / "b", **options)
    monkeypatch.setattr(conversion, "quantize_matrix", real)
    # What calibration has found is still there, and nothing is measured a second time.
    monkeypatch.setattr(calibrated, "measure", None)
    make_pack(small, tmp_path / "b", **options)
    for path in wanted:
        assert (tmp_path / "b" / "experts" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("mix", ["expert", "layer"])
@pytest.mark.parametrize("limit", [{"expert_bits": 2.9}, {"budget": 2_300_000}])
def test_mixed_precision_keeps_its_limit(
    small: Path, tmp_path: Path, mix: str, limit: dict[str, Any]
) -> None:
    manifest = make_pack(small, tmp_path, mix=mix, quantizer="rtn", **limit)
    sizes = manifest.sizes
    if "budget" in limit:
        assert limit["budget"] * 0.98 < sizes.expert_nbytes + sizes.trunk_nbytes <= limit["budget"]
    else:
        assert 2.8 < sizes.expert_nbytes * 8 / sizes.expert_parameters <= 2.9
    pack = Pack(tmp_path)
    try:
        records = [{at.spec for at in layer} for layer in pack.layers]
    finally:
        pack.close()
    assert len({spec for specs in records for spec in specs}) in (2, 3)
    if mix == "layer":
        assert all(len(specs) == 1 for specs in records)


def test_a_budget_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no scheme fits the budget"):
        make_pack(TINY, tmp_path, budget=3_000_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantizer", "gptq"], "gptq needs text; give --calibrate TEXT"),
        (["--quantizer", "rtn", "--calibrate", str(TEXT)], "rtn cannot use calibration text"),
        (["--calibrate", "no/such/file"], "no such file"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run(["convert", str(TINY), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["convert", "dry run"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "too short (wanted two tokens, got 0)"), (b"a", "too short"), (b"\xff", "UTF-8")],
)
def test_a_text_of_no_use_is_refused_before_anything_is_written(
    tmp_path: Path, command: Command, content: bytes, message: str, more: list[str]
) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_bytes(content)
    error = command("convert", TINY, out, "--calibrate", text, *more).error(2)
    assert message in error
    assert str(text) in error
    assert not out.exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe"])
def test_a_text_that_is_no_regular_file(tmp_path: Path, command: Command, kind: str) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    if kind == "folder":
        text.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer that never comes
        text.symlink_to(tmp_path / "pipe")
    text = text if kind != "pipe" else tmp_path / "pipe"
    assert "not a regular file" in command("convert", TINY, out, "--calibrate", text).error(2)
    assert not out.exists()
