"""Recorded attention over compressed keys and values."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moepack_runtime.kernels import native
from moepack_runtime.loading import load_pack
from moepack_runtime.tape.attention import _reference
from moepack_runtime.tape.kv import GrowingLayer
from moepack_runtime.tape.latent import read_off
from moepack_runtime.tape.record import CannotRecord
from moepack_runtime.tape.steps import Kv, NativeStep, Op
from tests import families
from tests.packs import FamilyPacks

FAMILIES = ("deepseek_v2", "deepseek_v3", "longcat_flash")
IDS = families.tokens(batch=1, length=40)

needs_native = pytest.mark.skipif(native.available() is None, reason=native.why_not())


class Expands(nn.Module):
    """Two heads of keys [3 plain, 2 rotary] and values of 4, from latents of 5."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.change = change
        generator = torch.Generator().manual_seed(0)
        self.a = torch.randn(2, 5, 3, generator=generator)
        self.c = torch.randn(2, 5, 4, generator=generator)

    def expand_kv(self, latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        plain, values = latents @ self.a, latents @ self.c  # [1, 2, T, .]
        turned = rotary.expand(1, 2, -1, -1)
        match self.change:
            case "bias":
                values = values + 1
            case "scaled":
                turned = turned * 2
            case "swapped":
                turned = turned.flip(-1)
            case "values":
                values = values + rotary.sum(-1, keepdim=True)
            case "first":
                return torch.cat([turned, plain], dim=-1), values
            case "nothing":
                plain = plain * 0
        return torch.cat([plain, turned], dim=-1), values


def test_weights_are_read_off() -> None:
    for change, plain_at, rotary_at in (("", 0, 3), ("first", 2, 0)):
        module = Expands(change)
        found = read_off(module, 5, 2, half=False)
        assert torch.equal(found.key_weights, module.a)
        assert torch.equal(found.value_weights, module.c)
        assert (found.width, found.plain_at, found.rotary_at) == (5, plain_at, rotary_at)
    assert read_off(Expands(), 5, 2, half=True).key_weights.dtype is torch.float16
    big = Expands()
    big.a = big.a * 1e6
    assert read_off(big, 5, 2, half=True).key_weights.dtype is torch.float32


@pytest.mark.parametrize("change", ["bias", "scaled", "swapped", "values", "nothing"])
def test_other_maps_are_not_believed(change: str) -> None:
    with pytest.raises(CannotRecord):
        read_off(Expands(change), 5, 2, half=False)


def logits(model: Any, start: int) -> Tensor:
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :start], use_cache=True).past_key_values
        found = []
        for i in range(start, IDS.shape[1]):
            output = model(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
            found.append(output.logits)
    return torch.cat(found)


@needs_native
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_attended_to(family: str, family_packs: FamilyPacks) -> None:
    """Also where the cache grows beyond its buffers, and with weights in float16."""
    pack = family_packs(family)

    def played(tape: bool, **options: Any) -> Tensor:
        model = load_pack(pack, tape=tape, **options)
        got = logits(model, 3)
        assert not tape or model.moepack.tape.playing
        return got

    wanted = played(False, activations="float")
    error = (played(True, activations="float") - wanted).abs().max()
    assert error < 1e-4 * wanted.abs().max()
    # Rounded inputs choose other experts at times, in such small layers; as often as not played.
    rounded, other = (played(tape, activations="int8") - wanted for tape in (True, False))
    assert rounded.square().mean() < 2 * other.square().mean()


@needs_native
def test_a_conversation_goes_on(family_packs: FamilyPacks) -> None:
    """Played tokens, several at once by transformers' own code, and played ones again."""
    pack = family_packs("deepseek_v3")
    found = []
    for tape in (False, True):
        model = load_pack(pack, activations="float", tape=tape)
        with torch.no_grad():
            cache, outputs = None, []
            for begin, end in ((0, 6), (6, 7), (7, 8), (8, 20), (20, 21), (21, 22)):
                ids = IDS[:, begin:end]
                output = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                outputs.append(output.logits[:, -1])
        found.append(torch.cat(outputs))
    torch.testing.assert_close(found[0], found[1], atol=1e-4 * found[0].abs().max().item(), rtol=0)


@needs_native
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("window", [0, 3, 7, 50])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_window_a_cap_and_sinks(half: bool, window: int, cap: float, with_sinks: bool) -> None:
    """As over the expanded keys and values."""
    torch.manual_seed(0)
    module, tokens = Expands(), 7
    latents, rotary = torch.randn(1, 1, tokens, 5), torch.randn(1, 1, tokens, 2)
    layer = GrowingLayer()
    layer.half = half
    layer.update(latents, rotary)
    if half:  # what is kept is rounded, so that this is what the reference reads
        module.a, module.c = module.a.half().float(), module.c.half().float()
    keys, values = module.expand_kv(*layer.update(latents[:, :, :0], rotary[:, :, :0]))
    query, sinks = torch.randn(1, 2, 1, 5), torch.randn(2) if with_sinks else None
    wanted = _reference(query, keys[:, :, -window:], values[:, :, -window:], 0.4, cap, sinks)

    buffers = layer.buffers
    assert buffers is not None
    assert buffers.half == half
    kv = Kv(buffers.keys.data_ptr(), buffers.values.data_ptr(), 1, 5, 2, buffers.capacity)
    kv.end, kv.half = tokens - 1, half
    expansion = read_off(module, 5, 2, half=half)
    form, out = expansion.step(kv), torch.full((2, 4), torch.nan)
    step = NativeStep(op=Op.ATTEND_LATENT, extra=ctypes.addressof(form))
    step.data[:2], step.data[3] = (
        (out.data_ptr(), query.data_ptr()),
        None if sinks is None else sinks.data_ptr(),
    )
    step.stride[0][0], step.stride[1][:2], step.stride[3][0] = 4, (5, 1), 1
    step.number[:2], step.scalar[:] = (2, window), (0.4, cap)
    assert native.play((NativeStep * 1)(step), 0, 1, False, 2) == 1
    torch.testing.assert_close(out, wanted[0, 0], atol=1e-5, rtol=1e-5)


@needs_native
@pytest.mark.parametrize("prompt", [1, 4, 20])
@pytest.mark.parametrize("family", ["dots3_note_text", "hy_v4"])
def test_latents_with_windows_and_with_sinks(
    family: str, prompt: int, family_packs: FamilyPacks
) -> None:
    """The first has windows in some layers, the second sinks; indexers pick all there is."""
    changes = {"sliding_window": 5} if family == "dots3_note_text" else {}
    pack = family_packs(family, {"index_topk": 100, **changes})
    wanted = logits(load_pack(pack, activations="float", tape=False), prompt)
    model = load_pack(pack, activations="float")
    got = logits(model, prompt)
    assert model.moepack.tape.playing
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
