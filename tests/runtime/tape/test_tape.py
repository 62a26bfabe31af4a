"""Decoding that is recorded once gives what transformers' own code gives."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moepack_runtime.loading import load_pack
from moepack_runtime.tape.kv import GrowingLayer
from moepack_runtime.tape.steps import BINARY, UNARY, Op, contraction, elementwise, loops
from tests import families
from tests.documented_families import documented
from tests.packs import make_family_pack

IDS = families.tokens(batch=1, length=14)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_pack("olmoe", tmp_path_factory.mktemp("olmoe"))


def decode(model: PreTrainedModel, ids: torch.Tensor, start: int = 4) -> list[torch.Tensor]:
    """Logits of every token after the first ``start``, one token at a time."""
    with torch.no_grad():
        cache = model(input_ids=ids[:, :start], use_cache=True).past_key_values
        found = []
        for i in range(start, ids.shape[1]):
            output = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    return found


def assert_same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family(family: str, tmp_path: Path) -> None:
    folder = make_family_pack(family, tmp_path)
    wanted = decode(load_pack(folder, activations="float", tape=False), IDS)
    model = load_pack(folder, activations="float")
    assert_same(decode(model, IDS), wanted)
    told = documented()[family].decoding
    assert model.moepack.tape.playing == (told == "recorded")
    if not model.moepack.tape.playing:
        assert model.moepack.tape.describe() == f"decoding by transformers' own code: {told}"


@pytest.mark.parametrize("options", [{"io": "mmap"}, {"io": "buffered", "slots": 4}])
def test_generate_gives_the_same_tokens(pack: Path, options: dict[str, Any]) -> None:
    keywords = {"max_new_tokens": 20, "do_sample": False, "min_new_tokens": 20}
    ids = IDS[:, :5]
    wanted = load_pack(pack, tape=False, **options).generate(ids, **keywords)
    model = load_pack(pack, **options)
    assert torch.equal(model.generate(ids, **keywords), wanted)
    assert model.moepack.tape.playing
    # A second text begins with a cache of its own.
    assert torch.equal(model.generate(ids, **keywords), wanted)


def test_a_cache_goes_back_and_forth(pack: Path) -> None:
    """Played tokens, then several at once by transformers, then played ones again."""
    plain, model = load_pack(pack, activations="float", tape=False), None
    results = []
    for model in (plain, load_pack(pack, activations="float")):
        with torch.no_grad():
            output = model(input_ids=IDS[:, :3], use_cache=True)
            for begin, end in ((3, 4), (4, 5), (5, 9), (9, 10)):
                output = model(
                    input_ids=IDS[:, begin:end],
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
            cache = output.past_key_values
            cache.crop(-2)
            output = model(input_ids=IDS[:, 10:11], past_key_values=cache, use_cache=True)
        results.append(output.logits)
        assert output.past_key_values.get_seq_length() == 9
    assert model is not None
    assert model.moepack.tape.playing
    assert_same(results[1:], results[:1])


def test_what_is_not_one_token_is_left_alone(pack: Path) -> None:
    model = load_pack(pack)
    with torch.no_grad():
        two = families.tokens(batch=2, length=3)
        cache = model(input_ids=two, use_cache=True).past_key_values
        model(input_ids=two[:, :1], past_key_values=cache, use_cache=True)
        cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
        mask = torch.tensor([[0, 1, 1, 1, 1]])
        model(input_ids=IDS[:, 4:5], past_key_values=cache, attention_mask=mask, use_cache=True)
    assert not model.moepack.tape.playing


def test_a_text_of_one_token_is_no_refusal(pack: Path) -> None:
    model = load_pack(pack)
    model.generate(IDS[:, :1], max_new_tokens=1, do_sample=False)
    assert model.moepack.tape.refusal is None
    assert not model.moepack.tape.playing


def test_counters_count_what_is_played_and_not_what_is_recorded(pack: Path) -> None:
    """As many tokens and demands as without a recording, which takes passes of its own."""
    counted = {}
    for tape in (True, False):
        model = load_pack(pack, io="mmap", prefetch=False, tape=tape)
        decode(model, IDS)
        assert model.moepack.tape is None or model.moepack.tape.playing
        stats = model.moepack.stats
        counted[tape] = stats.tokens, stats.hits + stats.misses
    assert counted[True] == counted[False]
    assert counted[True][0] == IDS.shape[1]


def test_routers_are_asked_ahead_only_while_something_is_to_be_read(pack: Path) -> None:
    """With every record in place a shorter recording is played, and gives the same bits."""
    logits = {}
    for prefetch in (True, False):
        model = load_pack(pack, io="mmap", prefetch=prefetch)
        decode(model, IDS)  # which records, and uses some experts
        tape = model.moepack.tape
        with torch.no_grad():
            model(input_ids=families.tokens(batch=1, length=400))  # uses all of them
        logits[prefetch] = torch.cat(decode(model, IDS))
        assert all(compute.all_in_place for compute in tape._computes)
        best = tape._best_player()
        if prefetch:
            assert best is tape._lean
            assert best._count < tape._player._count
        else:
            assert best is tape._player
    assert torch.equal(logits[True], logits[False])


def test_records_of_the_prompt_need_no_python_afterwards(pack: Path) -> None:
    model = load_pack(pack, io="mmap")
    prompt = families.tokens(batch=1, length=400)
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        assert model.moepack.stats.misses > 0
        output = model(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True)
        tape = model.moepack.tape
        assert all(compute.all_in_place for compute in tape._computes)
        calls = []
        for compute in tape._computes:
            compute.compute = lambda *_: calls.append(1)
        model(input_ids=IDS[:, 1:2], past_key_values=output.past_key_values, use_cache=True)
    assert not calls


def test_a_cache_lives_no_longer_than_its_owner_wants(pack: Path) -> None:
    """Neither the cache that was recorded nor the last one that was played is kept."""
    model = load_pack(pack)
    for _ in range(2):
        with torch.no_grad():
            cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
            model(input_ids=IDS[:, 3:4], past_key_values=cache, use_cache=True)
        assert model.moepack.tape.playing
        keys = [weakref.ref(layer.buffers.keys) for layer in cache.layers]
        del cache
        gc.collect()
        assert not any(ref() is not None for ref in keys)


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_guesses_are_as_good_as_without(family: str, tmp_path: Path) -> None:
    """Routers are asked about what the token that is played reads, not about what is left over."""
    folder, recalls = make_family_pack(family, tmp_path), []
    for tape in (False, True):
        model = load_pack(folder, activations="float", tape=tape, io="buffered", slots=4)
        decode(model, IDS, 2)
        recalls.append([counts.right for counts in model.moepack.stats.layers.values()])
    # The recording itself takes one token's guesses.
    for plain, played in zip(*recalls, strict=True):
        assert plain - 3 <= played <= plain
    assert sum(recalls[1]) > 0


def test_beam_search_takes_the_cache_apart(pack: Path) -> None:
    keywords = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    wanted = load_pack(pack, activations="float", tape=False).generate(IDS[:, :5], **keywords)
    model = load_pack(pack, activations="float")
    decode(model, IDS)
    assert torch.equal(model.generate(IDS[:, :5], **keywords), wanted)


def test_a_growing_layer_is_a_dynamic_one() -> None:
    layer, parts = GrowingLayer(), torch.randn(2, 700, 1, 2, 1, 4)
    for i in range(700):
        keys, values = layer.update(parts[0, i], parts[1, i])
    assert torch.equal(keys, parts[0, :, 0].permute(2, 1, 0, 3))
    assert torch.equal(values, parts[1, :, 0].permute(2, 1, 0, 3))
    layer.crop(-600)
    assert layer.get_seq_length() == 100
    assert torch.equal(layer.update(parts[0, 0], parts[1, 0])[0][0, :, 100:], parts[0, 0, 0])
    layer.reset()
    assert layer.get_seq_length() == 0


def test_loops_merge_axes_that_lie_in_a_row() -> None:
    assert loops((2, 3, 4), [(12, 4, 1)]) == ([1, 1, 1, 24], [[0, 0, 0, 1]])
    assert loops((2, 3, 4), [(12, 4, 1), (0, 4, 1)]) == (
        [1, 1, 2, 12],
        [[0, 0, 12, 1], [0, 0, 0, 1]],
    )
    assert loops((2, 2, 2, 2, 2), [(1, 2, 4, 8, 16)]) is None


@pytest.mark.parametrize("kind", [kind for kind in UNARY if kind != "from_int64"])
@pytest.mark.parametrize("size", [1, 17, 64])
def test_elementwise_steps(kind: str, size: int) -> None:
    from moepack_runtime.kernels import native
    from moepack_runtime.tape.steps import NativeStep

    if native.available() is None:
        pytest.skip("needs the native library")
    x = torch.rand(size) * 3 + 0.1
    x = x if kind in ("sqrt", "rsqrt", "log") else torch.cat([x, -x])
    out = torch.empty_like(x)
    step = elementwise(Op.UNARY, UNARY.index(kind), out, x)
    assert step is not None
    step.scalar[:] = (-1.0, 2.0)
    assert native.play((NativeStep * 1)(step), 0, 1, True, 1) == 1
    wanted = {
        "copy": lambda: x,
        "square": lambda: x * x,
        "gelu": lambda: torch.nn.functional.gelu(x),
        "gelu_tanh": lambda: torch.nn.functional.gelu(x, approximate="tanh"),
        "silu": lambda: torch.nn.functional.silu(x),
        "softplus": lambda: torch.nn.functional.softplus(x),
        "clamp": lambda: x.clamp(-1, 2),
        "fill": lambda: torch.full_like(x, -1.0),
    }.get(kind, lambda: getattr(torch, kind)(x))()
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=2e-6)


def test_integers_become_floats() -> None:
    from moepack_runtime.kernels import native
    from moepack_runtime.tape.lower import lower
    from moepack_runtime.tape.record import Step
    from moepack_runtime.tape.steps import NativeStep

    if native.available() is None:
        pytest.skip("needs the native library")
    source = torch.tensor([[3, -70_000, 1 << 40], [0, 5, 16_777_217]])[:, ::2]
    out = torch.empty(2, 2)
    keywords = {"dtype": torch.float32}
    found = lower(Step(torch.ops.aten._to_copy.default, (source,), keywords, (out,)), set())
    assert isinstance(found, list)
    (step,) = found
    assert native.play((NativeStep * 1)(step), 0, 1, True, 1) == 1
    assert torch.equal(out, source.float())


def play(step: Any) -> bool:
    from moepack_runtime.kernels import native
    from moepack_runtime.tape.steps import NativeStep

    if native.available() is None:
        pytest.skip("needs the native library")
    assert step is not None
    return native.play((NativeStep * 1)(step), 0, 1, True, 2) == 1


@pytest.mark.parametrize("size", [1, 7, 40, 700])
def test_products_are_summed_in_any_order_of_memory(size: int) -> None:
    """A matrix and a vector from both sides, a batch of them, and windows of a convolution."""
    x, y = torch.randn(3, size, 50), torch.randn(3, size)
    cases = [
        (x, y.unsqueeze(-1), 1),
        (x, torch.randn(3, 1, 50), 2),
        (x.mT, y.unsqueeze(1), -1),
        (torch.randn(size, 9).unfold(-1, 4, 1), torch.randn(size, 1, 4), -1),
        (torch.randn(size), torch.randn(size), 0),
    ]
    for left, right, axis in cases:
        wanted = (left * right).sum(axis)
        for offset in (None, torch.randn(wanted.shape[-1:])):
            out = torch.full_like(wanted, torch.nan)
            assert play(contraction(out, left, right, axis, offset))
            full = wanted if offset is None else wanted + offset
            torch.testing.assert_close(out, full, atol=1e-4, rtol=1e-4)
    assert contraction(torch.empty(3), x, y.unsqueeze(-1), 1) is None
    assert contraction(torch.empty(0), torch.empty(0, 4), torch.empty(4), 1) is None


@pytest.mark.parametrize("size", [3, 40_000])
def test_elementwise_steps_along_any_loop(size: int) -> None:
    """Few elements in a row, many rows, a part for each thread."""
    x = torch.randn(size, 4)
    for source, other in ((x, x.flip(0)), (x.mT, x.mT), (x, x[:, :1]), (x.view(-1), x.view(-1))):
        out = torch.empty(source.shape)
        assert play(elementwise(Op.BINARY, BINARY.index("add"), out, source, other))
        assert torch.equal(out, source + other)
        padded = torch.zeros(*source.shape[:-1], source.shape[-1] + 3)[..., 1:-2]
        assert play(elementwise(Op.UNARY, UNARY.index("neg"), padded, source))
        assert torch.equal(padded, -source)


def test_gathering_refuses_what_is_no_index() -> None:
    from moepack_runtime.tape.lower import lower
    from moepack_runtime.tape.record import Step

    source, index = torch.randn(1, 9), torch.tensor([[8, 0, 3]])
    out = torch.empty(1, 3)
    found = lower(Step(torch.ops.aten.gather.default, (source, 1, index), {}, (out,)), set())
    assert isinstance(found, list)
    assert play(found[0])
    assert torch.equal(out, source[:, [8, 0, 3]])
    for wrong in (9, -1):
        index[0, 1] = wrong
        assert not play(found[0])


@pytest.mark.parametrize("head_bits", [4, 16])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_token_that_is_not_of_the_vocabulary(
    head_bits: int, recorded: bool, pack: Path, tmp_path: Path
) -> None:
    """As stock torch's embedding, whether tokens are played or not; what follows is unharmed."""
    folder = pack if head_bits == 16 else make_family_pack("olmoe", tmp_path, head_bits=head_bits)
    model = load_pack(folder)
    embedding = model.get_input_embeddings()
    rows = embedding.num_embeddings
    cache = None
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
        for i in range(3, 5 if recorded else 3):
            model(input_ids=IDS[:, i : i + 1], past_key_values=cache, use_cache=True)
        assert model.moepack.tape.playing == recorded
        for wrong in (-1, rows, rows + 15, 1 << 40):
            with pytest.raises(IndexError):
                model(input_ids=torch.tensor([[wrong]]), past_key_values=cache, use_cache=True)
            with pytest.raises(IndexError):
                embedding(torch.tensor([[0, wrong]]))
        model(input_ids=IDS[:, 5:6], past_key_values=model(IDS[:, :5]).past_key_values)
    assert model.moepack.tape.playing


@pytest.mark.parametrize("scheme", [-1, 2])
@pytest.mark.parametrize("token", [-1, 5])
def test_the_library_refuses_a_row_that_is_not_there(scheme: int, token: int) -> None:
    from moepack_runtime.kernels import native
    from moepack_runtime.tape.lower import embedding_step
    from moepack_runtime.tape.steps import NativeStep

    if native.available() is None:
        pytest.skip("needs the native library")
    memory = torch.zeros(1 << 14, dtype=torch.uint8)  # more rows than the step says
    out, ids = torch.empty(64), torch.tensor([token])
    step = embedding_step(out, memory[4096:], ids, (scheme, 4096, 5, 64))
    assert native.play((NativeStep * 1)(step), 0, 1, True, 1) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_recording_that_is_cut_short_leaves_the_cache_as_it_was(
    error: type[BaseException], pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moepack_runtime.tape.forward import TapeForward

    record, passes = TapeForward._recorded, []

    def cut(*arguments: Any) -> Any:
        passes.append(record(*arguments))
        if len(passes) == 2:
            raise error
        return passes[-1]

    model = load_pack(pack)
    monkeypatch.setattr(TapeForward, "_recorded", cut)
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
        with pytest.raises(error):
            model(input_ids=IDS[:, 3:4], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 3
