"""The families of ``tests/more_families.py``: converted, loaded, computed and decoded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moepack_runtime.loading import load_pack
from tests import families
from tests.more_families import MORE_FAMILIES
from tests.packs import make_pack, with_weights_of_pack
from tests.runtime.test_tape import IDS, assert_same, decode

NEW_TOKENS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(params=sorted(MORE_FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, PreTrainedModel]:
    """A family's name, a folder with its checkpoint in ``source``, and its stock model."""
    model = families.random_model(request.param)
    families.save_checkpoint(model, tmp_path / "source")
    return request.param, tmp_path, model


def test_sixteen_bits_equal_the_stock_model(family: Any) -> None:
    _, folder, stock = family
    make_pack(folder / "source", folder / "16", attn_bits=16, expert_bits=16)
    model = load_pack(folder / "16")
    ids = families.tokens()
    wanted = families.logits(stock, ids)
    assert wanted.isfinite().all()
    tolerance = 1e-5 * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(families.logits(model, ids), wanted, atol=tolerance, rtol=0)
    assert torch.equal(model.generate(ids, **NEW_TOKENS), stock.generate(ids, **NEW_TOKENS))


def test_packed_equals_stock_and_decodes(family: Any) -> None:
    """With the pack's weights; and tokens that are played are those that are not."""
    name, folder, stock = family
    options = {"attn_bits": 4, "expert_bits": 3, "quantizer": "rtn"}
    make_pack(folder / "source", folder / "pack", **options)
    plain = load_pack(folder / "pack", activations="float", tape=False)
    same = with_weights_of_pack(copy.deepcopy(stock), plain)
    ids = families.tokens()
    wanted = families.logits(same, ids)
    torch.testing.assert_close(families.logits(plain, ids), wanted, atol=1e-3, rtol=1e-3)
    model = load_pack(folder / "pack", activations="float")
    got = decode(model, IDS)
    assert_same(got, decode(plain, IDS))
