"""The families of ``tests/more_families.py``: converted, loaded, computed and decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from moepack_runtime.loading import load_pack
from tests import families
from tests.documented_families import documented
from tests.more_families import MORE_FAMILIES
from tests.packs import make_pack, with_weights_of_pack
from tests.runtime.tape.test_tape import IDS, assert_same, decode

NEW_TOKENS: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize("family", sorted(MORE_FAMILIES))
def test_every_family(family: str, tmp_path: Path) -> None:
    """Stock logits at 16 bits; those of the same weights at 3; tokens played as not played."""
    stock = families.random_model(family)
    source = families.save_checkpoint(stock, tmp_path / "source")
    make_pack(source, tmp_path / "16", attn_bits=16, expert_bits=16)
    model, ids = load_pack(tmp_path / "16"), families.tokens()
    wanted = families.logits(stock, ids)
    assert wanted.std() > 0.02
    tolerance = 1e-5 * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(families.logits(model, ids), wanted, atol=tolerance, rtol=0)
    assert torch.equal(model.generate(ids, **NEW_TOKENS), stock.generate(ids, **NEW_TOKENS))

    make_pack(source, tmp_path / "pack", attn_bits=4, expert_bits=3, quantizer="rtn")
    plain = load_pack(tmp_path / "pack", activations="float", tape=False)
    wanted = families.logits(with_weights_of_pack(stock, plain), ids)
    torch.testing.assert_close(families.logits(plain, ids), wanted, atol=1e-3, rtol=1e-3)
    model = load_pack(tmp_path / "pack", activations="float")
    assert_same(decode(model, IDS), decode(plain, IDS))
    tape = model.moepack.tape
    assert (tape.refusal or "recorded") == documented()[family].decoding
    assert tape.playing == (documented()[family].decoding == "recorded")


def test_a_multimodal_checkpoint_of_which_the_text_is_run(tmp_path: Path) -> None:
    """transformers' causal class for it has no vision; the checkpoint has."""
    torch.manual_seed(0)
    config = families.config_of("qwen3_5_moe")
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    families.save_checkpoint(whole, tmp_path / "source")
    make_pack(tmp_path / "source", tmp_path / "16", attn_bits=16, expert_bits=16)
    model, ids = load_pack(tmp_path / "16"), families.tokens()
    assert type(model) is not type(whole)
    torch.testing.assert_close(families.logits(model, ids), families.logits(whole, ids))


def test_experts_that_only_images_need(tmp_path: Path) -> None:
    """They are packed, and their routers are not waited for."""
    source = families.save_checkpoint(families.random_model("ernie4_5_vl_moe"), tmp_path / "source")
    make_pack(source, tmp_path / "pack", attn_bits=4, expert_bits=3, quantizer="rtn")
    model = load_pack(tmp_path / "pack", io="buffered")
    decode(model, IDS)
    names = [adapter.name for adapter in model.moepack.adapters]
    vision = [layer for layer, name in enumerate(names) if "vision" in name]
    assert vision
    assert model.moepack.speculator.missing == vision
    assert model.moepack.tape.playing
