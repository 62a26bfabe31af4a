"""A loaded pack among other transformers models: threads, hooks, modes, other weights, refusals."""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import moepack
from moepack_formats.errors import UsageError
from moepack_runtime.loading import load_pack
from moepack_runtime.prefix_reuse import PrefixReuse
from tests import families
from tests.packs import make_family_pack

TEXTS = [families.tokens(batch=1, length=6, seed=seed) for seed in range(4)]
LONG = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_pack("mixtral", tmp_path_factory.mktemp("mixtral"))


def load(pack: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = load_pack(pack, activations="float", **options)
    return model


@pytest.fixture(scope="module")
def plain(pack: Path) -> PreTrainedModel:
    return load(pack, tape=False)


@pytest.fixture(scope="module")
def wanted(plain: PreTrainedModel) -> list[Tensor]:
    return [plain.generate(text, **LONG) for text in TEXTS]


@pytest.fixture
def model(pack: Path) -> PreTrainedModel:
    """One that has recorded a token."""
    model = load(pack)
    model.generate(TEXTS[0], **LONG)
    return model


# --- threads and processes -----------------------------------------------------------------------


def in_threads(run: Callable[[int], Tensor]) -> list[Any]:
    """What a function gives in a thread for each text, or raises."""
    found: list[Any] = [None] * len(TEXTS)

    def collect(number: int) -> None:
        try:
            found[number] = run(number)
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=collect, args=(n,)) for n in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"io": "buffered", "slots": 4}, {"tape": False, "slots": 4, "io": "buffered"}]
)
def test_threads_take_turns(pack: Path, wanted: list[Tensor], options: dict[str, Any]) -> None:
    model, before = load(pack, **options), torch.get_num_threads()
    for _ in range(2):
        found = in_threads(lambda number: model.generate(TEXTS[number], **LONG))
        for got, right in zip(found, wanted, strict=True):
            assert torch.equal(got, right)
    assert torch.get_num_threads() == before
    assert model.moepack.engine._kept is None


def test_threads_that_reuse_prefixes(model: PreTrainedModel, wanted: list[Tensor]) -> None:
    texts = PrefixReuse(model)
    main = threading.get_ident()

    def check() -> None:
        assert threading.get_ident() != main

    def run(number: int) -> Tensor:
        model.generate(TEXTS[number], **LONG)  # whose passes nobody checks
        return texts.generate(TEXTS[number], check=check, **LONG)

    for got, right in zip(in_threads(run), wanted, strict=True):
        assert torch.equal(got, right)


def test_a_pass_that_raises_ends_its_turn(model: PreTrainedModel, wanted: list[Tensor]) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    hook = model.model.layers[1].register_forward_hook(fail)
    assert all(
        isinstance(e, ZeroDivisionError) for e in in_threads(lambda n: model.generate(TEXTS[n]))
    )
    hook.remove()
    found = in_threads(lambda number: model.generate(TEXTS[number], **LONG))
    assert all(torch.equal(got, right) for got, right in zip(found, wanted, strict=True))


def test_a_hook_that_generates(model: PreTrainedModel, wanted: list[Tensor]) -> None:
    inside: list[Tensor] = []

    def generate(*_: object) -> None:
        hook.remove()
        inside.append(model.generate(TEXTS[1], **LONG))

    hook = model.model.layers[1].register_forward_hook(generate)
    assert torch.equal(model.generate(TEXTS[0], **LONG), wanted[0])
    assert torch.equal(inside[0], wanted[1])


def in_child(model: PreTrainedModel, told: Any) -> None:
    try:
        model.generate(TEXTS[0], **LONG)
    except UsageError as error:
        told.put(str(error))


def test_a_forked_process_is_refused(model: PreTrainedModel) -> None:
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    child = context.Process(target=in_child, args=(model, told))
    child.start()
    assert "forked off" in told.get(timeout=60)
    child.join(20)
    assert child.exitcode == 0


# --- dtypes and modes ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype(pack: Path, wanted: list[Tensor], dtype: torch.dtype) -> None:
    before = load(pack)
    torch.set_default_dtype(dtype)
    try:
        for model in (before, load(pack), load(pack, slots=4, io="buffered")):
            assert torch.equal(model.generate(TEXTS[0], **LONG), wanted[0])
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": contextlib.nullcontext,
}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_modes_change_within_a_text(
    pack: Path, wanted: list[Tensor], first: str, second: str
) -> None:
    model, ids, cache = load(pack), TEXTS[0], None
    found = []
    for number in range(16):
        with MODES[first if number % 4 < 2 else second]():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = output.logits[:, -1:].argmax(-1).clone(), output.past_key_values
        found.append(int(ids))
    assert found == wanted[0][0, -16:].tolist()
    assert model.moepack.tape.playing


def test_a_model_loaded_in_inference_mode(pack: Path, wanted: list[Tensor]) -> None:
    with torch.inference_mode():
        model = load(pack)
        model.generate(TEXTS[1], **LONG)
    assert torch.equal(model.generate(TEXTS[0], **LONG), wanted[0])


def test_int32_ids(model: PreTrainedModel, wanted: list[Tensor]) -> None:
    assert torch.equal(model.generate(TEXTS[0].int(), **LONG).long(), wanted[0])
    with torch.no_grad():
        assert torch.equal(model(TEXTS[0].int()).logits, model(TEXTS[0]).logits)


def test_gradients_are_refused(model: PreTrainedModel) -> None:
    embedded = model.get_input_embeddings()(TEXTS[0]).clone().requires_grad_()
    with pytest.raises(UsageError, match="no gradients go through packed weights"):
        model(inputs_embeds=embedded)
    with torch.no_grad():
        model(inputs_embeds=embedded)


def test_training_mode_is_not_played(model: PreTrainedModel, wanted: list[Tensor]) -> None:
    calls = played(model)
    model.train()
    model.generate(TEXTS[0], **LONG)
    assert calls == []
    model.eval()
    assert torch.equal(model.generate(TEXTS[0], **LONG), wanted[0])
    assert len(calls) == 15


def played(model: PreTrainedModel) -> list[int]:
    """Grows with every token that is played."""
    calls: list[int] = []
    play = model.moepack.tape._play

    def counted(*args: Any) -> Any:
        calls.append(1)
        return play(*args)

    model.moepack.tape._play = counted
    return calls


# --- looking inside ------------------------------------------------------------------------------


def test_hooks_of_submodules_are_called(model: PreTrainedModel, wanted: list[Tensor]) -> None:
    layer, seen, calls = model.model.layers[1], [], played(model)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        seen.clear()
        hook = register(lambda *_: seen.append(1))
        assert torch.equal(model.generate(TEXTS[0], **LONG), wanted[0])
        hook.remove()
        assert len(seen) == 16
    forward = layer.forward
    seen.clear()
    layer.forward = lambda *args, **kwargs: (seen.append(1), forward(*args, **kwargs))[1]
    model.generate(TEXTS[0], **LONG)
    del layer.forward
    assert len(seen) == 16
    assert calls == []
    model.generate(TEXTS[0], **LONG)
    assert len(calls) == 15


@pytest.mark.parametrize("name", ["hidden_states", "attentions", "router_logits"])
@pytest.mark.parametrize("through_config", [False, True])
def test_further_outputs(model: PreTrainedModel, name: str, through_config: bool) -> None:
    model.set_attn_implementation("eager")
    asked = {f"output_{name}": True}
    with torch.no_grad():
        cache = model(TEXTS[0], use_cache=True).past_key_values
        if through_config:
            setattr(model.config, f"output_{name}", True)
        output = model(
            input_ids=TEXTS[1][:, :1],
            past_key_values=cache,
            **({} if through_config else asked),
        )
    assert len(output[name]) >= 2
    setattr(model.config, f"output_{name}", False)
    # transformers leaves hooks of its own behind, which nothing has to see.
    calls = played(model)
    model.generate(TEXTS[0], **LONG)
    assert len(calls) == 15


# --- ways to generate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"repetition_penalty": 1.3},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=lambda keywords: " ".join(keywords),
)
def test_ways_to_generate(
    pack: Path, plain: PreTrainedModel, keywords: dict[str, Any], wanted: list[Tensor]
) -> None:
    model = load(pack)  # nothing is recorded yet
    right = plain.generate(TEXTS[0], **LONG, **keywords)
    for _ in range(2):
        assert torch.equal(model.generate(TEXTS[0], **LONG, **keywords), right)
        assert torch.equal(model.generate(TEXTS[0], **LONG), wanted[0])


def test_assistant_and_padding(
    model: PreTrainedModel, plain: PreTrainedModel, wanted: list[Tensor]
) -> None:
    assert torch.equal(model.generate(TEXTS[0], assistant_model=plain, **LONG), wanted[0])
    ids = torch.cat([TEXTS[0], TEXTS[1]])
    ids[0, :3] = 0
    mask = (ids != 0).long()
    right = plain.generate(ids, attention_mask=mask, **LONG)
    assert torch.equal(model.generate(ids, attention_mask=mask, **LONG), right)


# --- other weights -------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A module with something of low rank beside it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Parameter(torch.linspace(-1, 1, 2 * inner.in_features).view(2, -1))
        self.up = nn.Parameter(torch.linspace(-1, 2, 2 * inner.out_features).view(-1, 2))

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.inner(x)
        return inner + x @ self.down.T @ self.up.T


def scales(size: int) -> Tensor:
    return torch.linspace(0.2, 3, size)


def new_data(model: Any) -> None:
    norm = model.model.norm
    norm.weight.data = norm.weight.data * scales(len(norm.weight))


def new_parameter(model: Any) -> None:
    norm = model.model.norm
    norm.weight = nn.Parameter(norm.weight.detach() * scales(len(norm.weight)))


def written_over(model: Any) -> None:
    norm = model.model.norm
    norm.weight.detach().mul_(scales(len(norm.weight)))


def loaded(model: Any) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.norm.weight"] *= scales(len(state["model.norm.weight"]))
    model.load_state_dict(state)


def adapted(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapted(attention.q_proj)


@pytest.mark.parametrize("change", [new_data, new_parameter, written_over, loaded, adapted])
def test_other_weights_are_seen(
    pack: Path, model: PreTrainedModel, change: Callable[[Any], None]
) -> None:
    other = load(pack, tape=False)
    with torch.no_grad():
        change(model)
        change(other)
        logits = [next_logits(one) for one in (model, other)]
    torch.testing.assert_close(*logits, atol=1e-4 * float(logits[1].abs().max()), rtol=0)
    assert model.moepack.tape.playing


def next_logits(model: PreTrainedModel) -> Tensor:
    """Of one token after a text."""
    cache = model(TEXTS[0], use_cache=True).past_key_values
    logits: Tensor = model(input_ids=TEXTS[1][:, :1], past_key_values=cache).logits
    return logits


def test_weights_that_change_all_the_time(model: PreTrainedModel) -> None:
    for _ in range(5):
        with torch.no_grad():
            new_data(model)
            next_logits(model)
    assert "replaced all the time" in model.moepack.tape.describe()


# --- refusals ------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, Callable[[Any], object]]] = {
    "deepcopy": ("cannot be copied or pickled", copy.deepcopy),
    "a layer": ("cannot be copied or pickled", lambda m: copy.deepcopy(m.model.layers[0])),
    "pickle": ("cannot be copied or pickled", pickle.dumps),
    "torch.save": ("cannot be copied or pickled", lambda m: torch.save(m, io.BytesIO())),
    "share_memory": ("cannot be shared", lambda m: m.share_memory()),
    "meta": ("stays on its device", lambda m: m.to("meta")),
    "to_empty": ("stays on its device", lambda m: m.to_empty(device="meta")),
    "bfloat16": ("keeps the dtype", lambda m: m.to(torch.bfloat16)),
    "resize": ("cannot be resized", lambda m: m.resize_token_embeddings(300)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(model: PreTrainedModel, wanted: list[Tensor], what: str) -> None:
    said, ask = REFUSED[what]
    with pytest.raises(UsageError, match=said) as caught:
        ask(model)
    assert "\n" not in str(caught.value)
    assert torch.equal(model.generate(TEXTS[0], **LONG), wanted[0])


def test_what_changes_nothing_is_allowed(model: PreTrainedModel) -> None:
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    torch.save(model.state_dict(), io.BytesIO())


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification])
def test_another_auto_class(pack: Path, auto_class: Any) -> None:
    with pytest.raises(UsageError, match=r"use AutoModelForCausalLM\.from_pretrained"):
        auto_class.from_pretrained(pack)


def test_the_example_of_the_options(pack: Path) -> None:
    with moepack.options(ram="6GiB"):
        model = AutoModelForCausalLM.from_pretrained(pack)
    assert model.moepack.budget is not None
