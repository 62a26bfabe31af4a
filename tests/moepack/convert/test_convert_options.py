"""What the options of ``moepack convert`` promise: sizes, schemes, heads, plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moepack.convert.options import default_quantizer
from moepack_formats.errors import UsageError
from moepack_formats.manifest import Manifest
from moepack_formats.schemes import SCHEMES
from moepack_runtime.kernels.reference import decode_matrix
from moepack_runtime.loading import load_pack
from moepack_runtime.trunk.packed_modules import PackedEmbedding, PackedLinear, TiedHead
from tests import families
from tests.commands import TINY, Command, hashes
from tests.packs import make_pack, with_weights_of_pack

SIZES = (
    "expert_parameters",
    "expert_bytes",
    "expert_bits",
    "trunk_parameters",
    "trunk_bytes",
    "trunk_bits",
    "total_bits",
    "source_bytes",
)


def expert_nbytes(pack: Path) -> int:
    return sum(path.stat().st_size for path in pack.glob("experts/*"))


# --- what the command prints ---------------------------------------------------------------------


def test_json(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command("convert", checkpoint, out, "--quantizer", "rtn", "--json")
    values = result.json
    assert result.err == ""
    assert set(values) == {"pack", *SIZES}
    assert values["pack"] == str(out)
    assert values["expert_parameters"] == 3 * 8 * 3 * 64 * 40
    assert values["source_bytes"] >= values["expert_parameters"] * 4
    # Each file has at least a page of header before its records.
    assert 0 <= expert_nbytes(out) - values["expert_bytes"] <= 3 * 8192
    shown = command("inspect", out, "--json").json
    assert all(values[name] == shown[name] for name in SIZES if name != "source_bytes")


def test_text(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    result = command("convert", checkpoint, tmp_path / "out", "--quantizer", "rtn", "-v")
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()] == [
        "experts",
        "trunk",
        "saved",
        "pack",
    ]
    # Why some Linears stay as they are is for the curious, and not a result.
    assert "kept as it is" not in result.out


def test_dry_run(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    """The plan tells the sizes that the conversion then has, and nothing is written."""
    out = tmp_path / "deep" / "out"
    words = ["convert", checkpoint, out, "--quantizer", "rtn", "--expert-bits", 2, "--json"]
    plan = command(*words, "--dry-run").json
    assert not out.parent.exists()
    done = command(*words).json
    assert {name: plan[name] for name in SIZES} == {name: done[name] for name in SIZES}
    assert plan["disk_needed"] == done["expert_bytes"] + done["trunk_bytes"]
    assert plan["disk_free"] > 0
    assert plan["memory_needed"] > 0
    assert (plan["moe_layers"], plan["experts"]) == (3, 24)
    assert plan["expert_schemes"] == ["q2g16s4"]
    assert plan["unused_tensors"] == []
    assert all(isinstance(reason, str) for reason in plan["kept"].values())
    # A plan is no conversion: what lies in the folder does not matter.
    assert command(*words, "--dry-run").code == 0
    text = command(*words[:-1], "--dry-run")
    assert text.out.splitlines()[0] == "MixtralForCausalLM, 24 experts in 3 MoE layers"


# --- widths and budgets --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts wide enough that padding does not decide their size."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    model = families.random_model(
        "olmoe", hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_experts=4
    )
    return families.save_checkpoint(model, folder, dtype=torch.bfloat16)


def planned(source: Path, **options: Any) -> tuple[tuple[str, ...], int, float]:
    """Schemes, bytes and true bits of the experts of a plan; the bytes of all is its sum."""
    from moepack.convert.options import ConvertOptions
    from moepack.convert.plan import make_plan
    from moepack.convert.sources.checkpoint import open_checkpoint

    plan = make_plan(open_checkpoint(str(source)), ConvertOptions(**options))
    return plan.expert_schemes, plan.sizes.nbytes, plan.sizes.expert_bits


def test_integer_widths(wide: Path) -> None:
    expected = {2: "q2g16s4", 3: "q3g16s5", 4: "q4g64", 6: "q6g64", 8: "q8g64", 16: "bf16"}
    assert {bits: planned(wide, expert_bits=bits)[0] for bits in expected} == {
        bits: (name,) for bits, name in expected.items()
    }


@pytest.mark.parametrize("cap", [2.7, 3.3, 3.6, 4.3, 4.6, 6.7, 8.7, 15.9, 16.5, 40.5])
def test_a_decimal_caps_the_true_bits(wide: Path, cap: float) -> None:
    """The best scheme that stays below it, metadata and padding included."""
    all_bits = {
        name: planned(wide, scheme=name)[2]
        for name, scheme in SCHEMES.items()
        if not scheme.is_raw or name == "bf16"
    }
    (name,), _, bits = planned(wide, expert_bits=cap)
    assert bits <= cap
    assert bits == max(other for other in all_bits.values() if other <= cap)
    assert all_bits[name] == bits


def test_a_cap_below_everything(wide: Path, command: Command, tmp_path: Path) -> None:
    line = command("convert", wide, tmp_path / "out", "--expert-bits", 1.5).error(2)
    assert "--expert-bits: no scheme has so few bits" in line
    assert not (tmp_path / "out").exists()
    least = float(line.split("wanted ")[1].split()[0])
    smallest = min(planned(wide, scheme=name)[2] for name in SCHEMES)
    assert planned(wide, expert_bits=least + 1e-9)[2] == smallest


def test_budget(wide: Path) -> None:
    for name in ("q2g64", "q3g16s5", "q4g64"):
        nbytes = planned(wide, scheme=name)[1]
        (chosen,), got, _ = planned(wide, budget=nbytes)
        assert got == nbytes, (name, chosen)
        (chosen,), got, _ = planned(wide, budget=nbytes + 1)
        assert got == nbytes
        if name != "q2g64":
            assert planned(wide, budget=nbytes - 1)[1] < nbytes


def test_a_budget_below_everything(wide: Path, command: Command, tmp_path: Path) -> None:
    """The error states the smallest, and exactly that then works."""
    nbytes = min(planned(wide, scheme=name)[1] for name in SCHEMES)
    words = ["convert", wide, tmp_path / "out", "--quantizer", "rtn", "--json", "--budget"]
    line = command(*words, "1KiB").error(2)
    assert "no scheme fits the budget" in line
    assert line.endswith(f"give --budget {nbytes} or more")
    values = command(*words, nbytes).json
    assert values["expert_bytes"] + values["trunk_bytes"] == nbytes


def test_a_scheme_is_exact(wide: Path, tmp_path: Path) -> None:
    for name in SCHEMES:
        assert planned(wide, scheme=name)[0] == (name,)
    manifest = make_pack(wide, tmp_path / "f16", scheme="f16", attn_bits=16)
    assert manifest.recipe.expert_schemes == ("f16",)
    assert manifest.recipe.trunk_scheme == "source"


# --- embeddings and head -------------------------------------------------------------------------


def logits_of(pack: Path, ids: torch.Tensor) -> torch.Tensor:
    return families.logits(load_pack(pack, activations="float"), ids)


def convert_heads(source: Path, folder: Path) -> dict[int, Manifest]:
    return {
        bits: make_pack(source, folder / str(bits), head_bits=bits, quantizer="hqq")
        for bits in (16, 8, 6, 4)
    }


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Manifest]]:
    folder = tmp_path_factory.mktemp("tied")
    return folder, convert_heads(TINY, folder)


@pytest.fixture(scope="module")
def untied(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("untied")
    return folder, convert_heads(checkpoint, folder)


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_head_sizes(which: str, request: pytest.FixtureRequest) -> None:
    _, manifests = request.getfixturevalue(which)
    sizes = {bits: manifest.sizes.trunk_nbytes for bits, manifest in manifests.items()}
    heads = 1 if which == "tied" else 2
    packed = manifests[8].packed
    rows, cols = packed["model.embed_tokens"].shape
    dense = rows * cols * (2 if which == "tied" else 4) * heads
    for bits in (8, 6, 4):
        true = SCHEMES[f"q{bits}g64"].packed_nbytes(rows, cols) * heads
        assert sizes[16] - sizes[bits] == dense - true
    assert sizes[4] < sizes[6] < sizes[8] < sizes[16]
    schemes = [manifest.recipe.head_scheme for manifest in manifests.values()]
    assert schemes == ["source", "q8g64", "q6g64", "q4g64"]
    assert packed["lm_head"].tied_to == ("model.embed_tokens" if which == "tied" else None)


@pytest.mark.parametrize(
    ("which", "bits", "tolerance"),
    [
        ("tied", 8, 0.01),
        ("tied", 6, 0.04),
        ("tied", 4, 0.15),
        # A random router is undecided: a slightly other embedding picks other experts.
        ("untied", 8, 0.1),
        ("untied", 6, 0.2),
        ("untied", 4, 0.4),
    ],
)
def test_head_logits(
    which: str, bits: int, tolerance: float, request: pytest.FixtureRequest
) -> None:
    """The error of the logits, as a share of their spread, is what so few bits allow."""
    folder, _ = request.getfixturevalue(which)
    ids = families.tokens(batch=2, length=16) + 100
    wanted, got = logits_of(folder / "16", ids), logits_of(folder / str(bits), ids)
    error = (got - wanted).square().mean().sqrt() / wanted.std()
    assert 0 < error < tolerance


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("which", ["tied", "untied"])
def test_head_equals_its_codes(which: str, bits: int, request: pytest.FixtureRequest) -> None:
    """Embedding rows, and logits, are exactly those of a stock model with the same weights."""
    folder, _ = request.getfixturevalue(which)
    model = load_pack(folder / str(bits), activations="float")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    shape = embedding.num_embeddings, embedding.embedding_dim
    table = decode_matrix(embedding.packed, embedding.scheme, shape, torch.float32)
    ids = torch.tensor([[0, 1, 15, 16, 17, shape[0] - 1], [5, 5, 4000, 31, 32, 5]])
    assert torch.equal(embedding(ids), table[ids])
    assert isinstance(head, TiedHead if which == "tied" else PackedLinear)
    x = torch.randn(3, shape[1])
    weight = table if which == "tied" else head.dequantized(torch.float32)
    torch.testing.assert_close(head(x), x @ weight.T)


def test_untied_heads_equal_the_stock_model(untied: Any, checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = untied
    packed = load_pack(folder / "4", activations="float")
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    same = with_weights_of_pack(stock, packed)
    ids = families.tokens()
    torch.testing.assert_close(
        families.logits(packed, ids), families.logits(same, ids), atol=1e-3, rtol=1e-3
    )


def test_a_tied_head_is_stored_once(tied: Any) -> None:
    folder, manifests = tied
    assert "model.embed_tokens.packed" in manifests[4].trunk
    assert "lm_head.packed" not in manifests[4].trunk
    assert "lm_head.weight" not in manifests[4].trunk
    model = load_pack(folder / "4", activations="float")
    assert not any(name.startswith("lm_head") for name in model.state_dict())


# --- files ---------------------------------------------------------------------------------------


def test_split_files(checkpoint: Path, tmp_path: Path) -> None:
    """A layer or a trunk over the limit becomes several files; the model is the same."""
    whole, split = tmp_path / "whole", tmp_path / "split"
    make_pack(checkpoint, whole, quantizer="rtn")
    manifest = make_pack(checkpoint, split, quantizer="rtn", max_file_nbytes=30_000)
    assert all(len(layer.files) > 1 for layer in manifest.layers)
    assert (split / "model.safetensors.index.json").exists()
    assert len(list(split.glob("model-*.safetensors"))) > 1
    ids = families.tokens()
    assert torch.equal(logits_of(split, ids), logits_of(whole, ids))


def test_the_same_bytes_every_time(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_pack(checkpoint, tmp_path / name)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_options_refuse_what_they_cannot_be() -> None:
    from moepack.convert.options import ConvertOptions

    for wrong in (
        {"attn_bits": 5},
        {"head_bits": 2},
        {"expert_bits": 0},
        {"expert_bits": float("nan")},
        {"scheme": "q5"},
        {"scheme": "q4g64", "budget": 5},
    ):
        with pytest.raises(UsageError):
            ConvertOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expert_bits", "scheme", "calibrated", "wanted"),
    [
        (3.0, None, False, "hqq"),
        (2.0, None, False, "search"),
        (2.6, None, False, "hqq"),
        (3.0, "q2g16s4", False, "search"),
        (2.0, "q3g16s5", False, "hqq"),
        (2.0, None, True, "gptq"),
    ],
)
def test_quantizer_of_who_names_none(
    expert_bits: float, scheme: str | None, calibrated: bool, wanted: str
) -> None:
    assert default_quantizer(expert_bits, scheme, calibrated=calibrated) == wanted


def test_two_bits_are_searched(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    assert command("convert", checkpoint, tmp_path / "out", "--expert-bits", 2).code == 0
    recipe = json.loads((tmp_path / "out" / "moepack.json").read_text())["recipe"]
    assert recipe["quantizer"] == "search"
