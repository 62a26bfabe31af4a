"""Whole models decoded with a compiled trunk over a simulated GPU: nothing but speed changes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moepack.speed import PackRunner
from moepack_formats.record import RecordSpec
from moepack_runtime.experts import ExpertsAdapter
from moepack_runtime.gpu.resident import ResidentRecords
from moepack_runtime.kernels.reference import ReferenceEngine
from moepack_runtime.loading import load_pack
from moepack_runtime.options import RuntimeOptions
from moepack_runtime.plugin import quantizer
from moepack_runtime.prefix_reuse import PrefixReuse
from tests import families
from tests.packs import make_family_pack, make_pack
from tests.runtime.gpu.test_tier import LINK, loaded

IDS = torch.tensor([[5, 9, 2, 77, 31]])
OTHER = torch.tensor([[3, 50, 8, 8, 1, 90, 4, 17, 60]])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    gc.collect()  # not in the middle of a trace, whose tensors are none
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def greedy(model: Any, ids: Tensor = IDS, tokens: int = 12) -> list[int]:
    """New tokens, as many as asked for."""
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return model.generate(ids, **options)[0].tolist()  # type: ignore[no-any-return]


def check_graphs(model: Any, passes: int = 1) -> None:
    """That decoding was traced so often, whole, and is replayed."""
    compiled = model.moepack.compiled
    assert compiled.refusal is None
    assert len(compiled.passes) == passes
    assert all(stretch.is_recorded for stretch in compiled.passes[-1].stretches)


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("prefetch", [False, True])
def test_the_same_tokens_and_traffic(pack: Path, share: float, prefetch: bool) -> None:
    options = {"prefetch": prefetch, "policy": "lru" if share else "lfu"}
    plain, model = loaded(pack, share, **options), loaded(pack, share, compile=True, **options)
    waits = []
    for each in (plain, model):
        before = each.moepack.tier.link.waits
        # So many tokens that prefetch has been judged by its time.
        texts = greedy(each), greedy(each, OTHER, 100)
        waits.append((texts, each.moepack.tier.link.waits - before))
    assert waits[0] == waits[1]
    assert asdict(plain.moepack.stats) == asdict(model.moepack.stats)
    assert model.moepack.stats.bytes_copied > 0
    check_graphs(model)
    (cut,) = model.moepack.compiled.passes
    assert len(cut.stretches) == 1 + len(model.moepack.pack.layers)
    # Ids, positions and mask: weights and caches are where they were.
    assert len(cut.moving) == 3


def test_the_cpu_helps_a_compiled_pass(pack: Path) -> None:
    plain, model = (loaded(pack, 0.3, hybrid="on", compile=flag) for flag in (False, True))
    assert greedy(plain) == greedy(model)
    assert plain.moepack.stats.computed_on_cpu == model.moepack.stats.computed_on_cpu > 0
    check_graphs(model)


class _Grouped:
    """What Triton's engine has for all experts of a layer: here on the CPU, one by one."""

    def __init__(self, adapter: ExpertsAdapter) -> None:
        self._adapter, self._engine = adapter, ReferenceEngine()

    def warm_up(self, specs: list[RecordSpec], device: torch.device) -> None:
        """Nothing to compile."""

    def table(self, records: list[Tensor], specs: list[RecordSpec]) -> Any:
        return list(zip(records, specs, strict=True))

    def token(self, x: Tensor, index: Tensor, weights: Tensor, table: Any) -> Tensor:
        rows = [self._engine.expert(*table[e], self._adapter, x[None])[0] for e in index.tolist()]
        return (torch.stack(rows) * weights[:, None]).sum(0)

    def many_tokens(
        self, x: Tensor, index: Tensor, weights: Tensor, table: Any, out: Tensor
    ) -> None:
        for place, expert in enumerate(index.reshape(-1).tolist()):
            token, choice = divmod(place, index.shape[1])
            y = self._engine.expert(*table[expert], self._adapter, x[token : token + 1])
            out[place] = y[0] * weights[token, choice]


class _GroupedEngine(ReferenceEngine):
    def grouped(self, adapter: ExpertsAdapter) -> _Grouped:
        return _Grouped(adapter)


def test_with_all_experts_there_a_token_is_one_graph(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "select", lambda *_, **__: _GroupedEngine())
    plain, model = (loaded(pack, 2.0, compile=flag) for flag in (False, True))
    assert isinstance(model.moepack.residency, ResidentRecords)
    assert greedy(plain) == greedy(model)
    check_graphs(model)
    assert len(model.moepack.compiled.passes[0].stretches) == 1
    assert model.moepack.tier.link.waits == plain.moepack.tier.link.waits
    # The host has not seen the tokens, and knows of them.
    assert asdict(plain.moepack.stats) == asdict(model.moepack.stats)


def test_texts_of_any_length_are_traced_once(pack: Path) -> None:
    model = loaded(pack, 0.4, compile=True, context=64)
    for ids, tokens in ((IDS, 5), (OTHER, 30), (OTHER[:, :2], 50)):
        greedy(model, ids, tokens)
    check_graphs(model)
    plain = loaded(pack, 0.4)
    # Longer than what memory was reserved for: with a larger cache, of any size.
    for tokens in (70, 80, 90):
        assert greedy(model, IDS, tokens) == greedy(plain, IDS, tokens)
    check_graphs(model, passes=2)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_oss", {"sliding_window": 16}),
        ("deepseek_v3", {}),
        pytest.param("qwen3_next", {}, marks=pytest.mark.slow),
    ],
)
def test_windows_latents_and_states(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """Past a window's end, where there is one."""
    families.save_checkpoint(families.random_model(family, **changes), tmp_path / "source")
    pack = tmp_path / "pack"
    make_pack(tmp_path / "source", pack, attn_bits=4, expert_bits=3, quantizer="rtn")
    plain, model = loaded(pack, 0.4), loaded(pack, 0.4, compile=True, context=64)
    assert greedy(plain, tokens=40) == greedy(model, tokens=40)
    assert greedy(plain, OTHER, 20) == greedy(model, OTHER, 20)
    # A window's length is first a number, then any number below its end, then beyond.
    assert len(model.moepack.compiled.passes) <= (3 if changes else 1)
    check_graphs(model, len(model.moepack.compiled.passes))


def test_a_family_that_is_not_compiled_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack = make_family_pack("dbrx", tmp_path)
    with caplog.at_level(logging.WARNING):
        model = loaded(pack, 0.4, compile=True)
    said = [r.getMessage() for r in caplog.records if "not compiled" in r.getMessage()]
    assert said[0] == "decoding is not compiled: transformers does not compile DbrxForCausalLM"
    assert greedy(model) == greedy(loaded(pack, 0.4))


def test_what_cannot_be_traced_is_decoded_and_said(
    pack: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = loaded(pack, 0.4, compile=True)

    def breaks(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        torch._dynamo.graph_break()

    model.model.layers[1].register_forward_pre_hook(breaks)
    with caplog.at_level(logging.WARNING):
        got = greedy(model)
    assert got == greedy(loaded(pack, 0.4))
    said = [r.getMessage() for r in caplog.records if "not compiled" in r.getMessage()]
    assert len(said) == 1
    assert "\n" not in said[0]
    assert model.moepack.compiled.refusal is not None


def test_as_many_models_are_compiled_as_are_loaded(pack: Path) -> None:
    """torch refuses to compile a function more than eight times."""
    for _ in range(10):
        model = loaded(pack, 2.0, compile=True)
        greedy(model, tokens=4)
        check_graphs(model)
        model.moepack.close()


def test_errors_of_a_pass_are_its_own(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that cannot be read is no reason to decode without graphs."""
    model = loaded(pack, 0.0, compile=True)
    greedy(model)

    def broken(*_: object) -> Any:
        raise OSError("disk on fire")

    monkeypatch.setattr(model.moepack.residency, "fetch_ready", broken)
    with pytest.raises(OSError, match="disk on fire"):
        greedy(model)
    monkeypatch.undo()
    assert greedy(model) == greedy(loaded(pack, 0.0))
    assert model.moepack.compiled.refusal is None


def test_a_conversation_can_be_ended(pack: Path) -> None:
    model, asked = loaded(pack, 0.4, compile=True), []

    def check() -> None:
        asked.append(None)
        if len(asked) > 30:
            raise KeyboardInterrupt

    texts = PrefixReuse(model)
    with pytest.raises(KeyboardInterrupt):
        texts.generate(IDS, check=check, max_new_tokens=100, min_new_tokens=100, do_sample=False)
    check_graphs(model)
    again = texts.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert again[0].tolist() == greedy(loaded(pack, 0.4))


def test_bench_measures_what_is_compiled(pack: Path) -> None:
    model = loaded(pack, 0.4, compile=True, context=32)
    runner = PackRunner(model)
    for _ in range(2):
        runner.prefill([5, 9, 2])
        runner.decode([7, 7, 8, 9])
    check_graphs(model)


def test_it_is_off_unless_asked_for(pack: Path) -> None:
    assert RuntimeOptions().compile is False
    model = load_pack(pack, link=LINK, device="cpu")
    assert model.moepack.compiled is None
    assert model.generation_config.cache_implementation is None
    assert not model.hf_quantizer.is_compileable
