import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.bench.make_checkpoint import SHAPES, make_checkpoint, tensors


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_checkpoint("tiny", out, shard_bytes=400_000)
    return out


def test_tiny_loads_with_every_key_used(sharded: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(sharded, output_loading_info=True)

    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = AutoTokenizer.from_pretrained(sharded)("And the king", return_tensors="pt")
    logits = model(**tokens).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10


def test_olmoe_loads_with_every_key_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(
        SHAPES["olmoe-1b-7b"], hidden=64, intermediate=32, experts=4, top_k=2, vocab=4096, eos=0
    )
    monkeypatch.setitem(SHAPES, "olmoe-1b-7b", small)
    make_checkpoint("olmoe-1b-7b", tmp_path, layers=1)

    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)

    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_shards_and_index_agree(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))

    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in tensors(SHAPES["tiny"])
    )


def test_experts_differ_and_the_seed_decides(tmp_path: Path) -> None:
    digests = []
    for number, seed in enumerate((0, 0, 1)):
        make_checkpoint("tiny", tmp_path / str(number), seed=seed, layers=1)
        data = (tmp_path / str(number) / "model.safetensors").read_bytes()
        digests.append(hashlib.sha256(data).hexdigest())
    assert digests[0] == digests[1] != digests[2]

    loaded = load_file(tmp_path / "0" / "model.safetensors")
    first = loaded["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    second = loaded["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)


def test_olmoe_has_the_size_of_the_published_model() -> None:
    total = sum(tensor.numel for tensor in tensors(SHAPES["olmoe-1b-7b"]))
    assert total == 6_919_161_856
