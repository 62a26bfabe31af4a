"""Steps that are done slice by slice give what they give one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moepack_runtime.kernels import native
from moepack_runtime.loading import load_pack
from moepack_runtime.tape import slices
from moepack_runtime.tape.pool import compact
from moepack_runtime.tape.slices import slice_runs
from moepack_runtime.tape.steps import (
    BINARY,
    UNARY,
    NativeStep,
    Op,
    along,
    contraction,
    elementwise,
)
from tests import families
from tests.packs import FamilyPacks

H, D = 6, 20

pytestmark = pytest.mark.skipif(native.available() is None, reason="no native library")


def mul(out: Tensor, a: Tensor, b: Tensor) -> NativeStep | None:
    return elementwise(Op.BINARY, BINARY.index("mul"), out, a, b)


def add(out: Tensor, a: Tensor, b: Tensor) -> NativeStep | None:
    return elementwise(Op.BINARY, BINARY.index("add"), out, a, b)


def copy(out: Tensor, a: Tensor) -> NativeStep | None:
    return elementwise(Op.UNARY, UNARY.index("copy"), out, a)


class Tensors:
    """A state, vectors, and results that have nothing in them yet."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.state = torch.randn(H, D, D, generator=generator)
        self.decay = torch.rand(H, 1, 1, generator=generator)
        self.key, self.value = torch.randn(2, H, D, generator=generator)
        self.decayed, self.outer, self.new = (torch.full((H, D, D), torch.nan) for _ in range(3))
        self.out = torch.full((H, D), torch.nan)

    def delta_rule(self) -> list[NativeStep | None]:
        """A head's state decays, takes in a product of vectors, is asked, and is kept."""
        return [
            mul(self.decayed, self.state, self.decay),
            mul(self.outer, self.key.unsqueeze(-1), self.value.unsqueeze(-2)),
            add(self.new, self.decayed, self.outer),
            contraction(self.out, self.new, self.key.unsqueeze(-1), 1),
            copy(self.state, self.new),
        ]


def steps_of(made: list[NativeStep | None]) -> list[NativeStep]:
    assert None not in made
    return [step for step in made if step is not None]


def play(steps: list[NativeStep], threads: int = 2) -> None:
    assert native.play((NativeStep * len(steps))(*steps), 0, len(steps), True, threads) == len(
        steps
    )


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "BIG", H * D * D)


@pytest.mark.parametrize("parts", [1, 4, 100])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_run(parts: int, threads: int, pooled: bool) -> None:
    wanted, got = Tensors(), Tensors()
    for step in steps_of(wanted.delta_rule()):
        play([step])
    steps = steps_of(got.delta_rule())
    assert slice_runs(steps, parts) == [range(5)]
    assert list(steps[0].number[1:]) == [parts, 0, 5]
    if pooled:
        fixed = {t.untyped_storage().data_ptr() for t in (got.state, got.out)}
        results = [got.decayed, got.outer, got.new, got.state, got.out]
        pool = compact(steps, results, fixed, [range(5)])
        assert pool.numel() <= 64 + parts * 3 * 64 * (-(-D * D * 4 // 64))
        assert steps[2].number[2] == 0b111
    play(steps, threads)
    assert torch.equal(got.out, wanted.out)
    assert torch.equal(got.state, wanted.state)
    assert bool(got.new.isnan().all()) == pooled


def test_what_a_later_step_reads_is_kept_whole() -> None:
    got, wanted = Tensors(), Tensors()
    later = [torch.empty(D, H, D) for _ in range(2)]
    for tensors, out in zip((got, wanted), later, strict=True):
        steps = steps_of([*tensors.delta_rule(), copy(out, tensors.new.transpose(0, 1))])
        runs = slice_runs(steps, 2) if tensors is got else []
        assert runs in ([], [range(5)])
        pool = compact(steps, [tensors.decayed, tensors.outer, tensors.new], set(), runs)
        play(steps)
        assert pool.numel() > 0  # it lives until here
    assert torch.equal(*later)
    assert torch.equal(got.state, wanted.state)


def together(make: Callable[[Tensors], NativeStep | None]) -> int:
    """How many of four steps are done together, the third of which is this one."""
    t = Tensors()
    first, last = [mul(t.decayed, t.state, t.decay), copy(t.new, t.decayed)], copy(t.outer, t.new)
    run = slice_runs(steps_of([*first, make(t), last]), 2)[0]
    return len(run)


def test_steps_that_mix_heads_end_a_run() -> None:
    assert together(lambda t: contraction(t.out, t.new, t.key.unsqueeze(-1), 1)) == 4
    assert together(lambda t: copy(t.outer.mT, t.new)) == 4
    # What other heads have left, and what another one has.
    assert together(lambda t: contraction(torch.empty(D, D), t.new, t.state, 0)) == 2
    assert together(lambda t: copy(t.outer[1:], t.new[:-1])) == 2
    assert together(lambda t: copy(t.state, t.new.transpose(0, 1).reshape(H, D, D))) == 4
    assert together(lambda t: copy(torch.empty(D, H, D), t.new.transpose(0, 1))) == 2
    # A result that every head would write.
    assert together(lambda t: mul(t.out[0].expand(H, D, D), t.new, t.new)) == 2
    # Fewer turns than heads, and none.
    assert together(lambda t: copy(t.out[0, :4], t.key[0, :4])) == 2
    assert together(lambda t: copy(t.out[0, :1], t.key[0, :1])) == 2


def test_sums_over_an_axis_are_never_divided_along_it() -> None:
    tensors = Tensors()
    wide, sums = torch.randn(1, H * D * D), torch.empty(1, 1)
    steps = steps_of(
        [
            copy(tensors.new, tensors.state * 1),
            copy(tensors.outer, tensors.new),
            along(Op.REDUCE, 0, 1, wide, sums),
        ]
    )
    assert slice_runs(steps, 2) in ([], [range(2)])
    play(steps)
    torch.testing.assert_close(sums[0, 0], wide.sum(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "nemotron_h", "lfm2_moe", "olmoe"])
def test_whole_models(
    family: str, family_packs: FamilyPacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With runs of any size, on the smallest of models."""
    monkeypatch.setattr(slices, "BIG", 32)
    folder, ids = family_packs(family), families.tokens(batch=1, length=10)
    logits = []
    for tape in (True, False):
        model = load_pack(folder, activations="float", tape=tape)
        with torch.no_grad():
            cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
            for i in range(4, 10):
                output = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        logits.append(output.logits)
        if tape:
            player = model.moepack.tape._player
            assert player is not None
            runs = [step.number[3] for step in player._steps if Op(step.op) in slices._SLICED]
            assert max(runs) > 1
    torch.testing.assert_close(*logits, atol=1e-4 * float(logits[1].abs().max()), rtol=0)
