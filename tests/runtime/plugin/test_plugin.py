"""Packs in transformers: every way in, what is refused, and what is left behind."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    pipeline,
)

import moepack
from moepack_formats.errors import FormatError, IntegrityError, MoepackError, UsageError
from moepack_formats.pack import Pack
from moepack_runtime.cache.slot_cache import SlotCache
from moepack_runtime.disk.reads_at_once import DEFAULT_THREADS
from moepack_runtime.loading import load_pack, load_tokenizer
from moepack_runtime.trunk.files import check_trunk
from tests import families
from tests.commands import edit_json
from tests.moepack.pack_edits import edit_header, reseal

PROMPT = "Alice was beginning to get very tired"
GREEDY = {"max_new_tokens": 6, "do_sample": False}

# --- the order of imports ------------------------------------------------------------------------

LOAD = """
ids = AutoTokenizer.from_pretrained(pack)("Alice was beginning", return_tensors="pt").input_ids
model = AutoModelForCausalLM.from_pretrained(pack)
print("tokens", *model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist())
"""
ORDERS = {
    "moepack first": "import moepack\nfrom transformers import AutoModelForCausalLM, AutoTokenizer",
    "transformers first": "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    "AutoModelForCausalLM._model_mapping.keys()\nimport moepack",
    "another class first": "import moepack\nfrom transformers import PreTrainedModel, pipeline\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
}


def python(code: str, pack: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"pack = {str(pack)!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_import(pack: Path, order: str) -> None:
    ids = load_tokenizer(pack)("Alice was beginning", return_tensors="pt").input_ids
    wanted = load_pack(pack).generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()
    done = python(f"{ORDERS[order]}\n{LOAD}", pack)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == " ".join(["tokens", *map(str, wanted)])


def test_only_config_and_tokenizer(pack: Path) -> None:
    done = python(
        "import moepack\n"
        "from transformers import AutoConfig, AutoTokenizer\n"
        "config = AutoConfig.from_pretrained(pack)\n"
        "print(type(config).__name__, config.num_local_experts)\n"
        "print(type(AutoTokenizer.from_pretrained(pack)).__name__)\n",
        pack,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "MixtralConfig 8"


def test_stock_transformers_refuses(pack: Path) -> None:
    """Without moepack there is an error, not a model with random experts."""
    done = python(
        "from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM, pipeline\n"
        "for call in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained,\n"
        "             lambda pack: pipeline('text-generation', model=pack)):\n"
        "    try:\n"
        "        call(pack)\n"
        "    except (ValueError, KeyError) as error:\n"
        "        print('refused', 'moepack' in str(error))\n"
        "import sys\n"
        "print('moepack' in sys.modules)\n",
        pack,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["refused True"] * 3 + ["False"]


def test_importing_moepack_loads_nothing(pack: Path) -> None:
    done = python(
        "import sys, moepack\n"
        "print([m for m in ('numpy', 'torch', 'transformers') if m in sys.modules])\n",
        pack,
    )
    assert done.stdout.strip() == "[]"


# --- ways in -------------------------------------------------------------------------------------


@pytest.fixture
def ids(pack: Path) -> torch.Tensor:
    tokens: torch.Tensor = load_tokenizer(pack)(PROMPT, return_tensors="pt").input_ids
    return tokens


def test_from_pretrained(pack: Path, ids: torch.Tensor) -> None:
    wanted = load_pack(pack).generate(ids, **GREEDY)
    for folder in (pack, str(pack)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert isinstance(model, MixtralForCausalLM)
        assert torch.equal(model.generate(ids, **GREEDY), wanted)
    with moepack.options(io="buffered", prefetch=False):
        model = AutoModelForCausalLM.from_pretrained(pack, dtype=torch.float32)
    assert model.moepack.speculator is None
    assert "slots" in model.moepack.residency.describe()
    assert torch.equal(model.generate(ids, **GREEDY), wanted)
    assert not model.training
    assert all(not parameter.is_meta for parameter in model.parameters())


def test_the_familys_own_class(pack: Path, ids: torch.Tensor) -> None:
    """It would believe all of config.json, so it has to be given the config."""
    with pytest.raises(UsageError, match=r"use AutoModelForCausalLM\.from_pretrained"):
        MixtralForCausalLM.from_pretrained(pack)
    config = AutoConfig.from_pretrained(pack)
    model = MixtralForCausalLM.from_pretrained(pack, config=config, dtype=torch.float32)
    assert torch.equal(model.generate(ids, **GREEDY), load_pack(pack).generate(ids, **GREEDY))


def test_a_pass_keeps_nothing_for_a_backward_pass(pack: Path, ids: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(pack)
    assert not model(ids).logits.requires_grad


def test_pipeline(pack: Path, ids: torch.Tensor) -> None:
    generator = pipeline("text-generation", model=str(pack), dtype=torch.float32)
    text = generator(PROMPT, return_full_text=False, **GREEDY)[0]["generated_text"]
    wanted = load_pack(pack).generate(ids, **GREEDY)[0, ids.shape[1] :]
    assert text == load_tokenizer(pack).decode(wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_other_dtypes(pack: Path, ids: torch.Tensor, dtype: Any) -> None:
    chosen = None if dtype == "auto" else dtype
    # int8's rounding would be most of the difference.
    with moepack.options(activations="float", dtype=chosen):
        model = AutoModelForCausalLM.from_pretrained(pack)
    wanted = chosen or torch.float32
    assert model.dtype == wanted
    assert model(ids).logits.dtype == wanted
    assert model.generate(ids, **GREEDY).shape == (1, ids.shape[1] + 6)
    exact = families.logits(load_pack(pack, activations="float"), ids)
    error = (families.logits(model, ids) - exact).square().mean().sqrt() / exact.std()
    assert error < (1e-6 if dtype == "auto" else 0.1)


def test_a_checkpoint_of_16_bits_computes_in_32(
    damaged: Path, ids: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers asks for the checkpoint's dtype, in which nothing would be recorded."""
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with caplog.at_level("INFO", logger="moepack_runtime"):
        model = AutoModelForCausalLM.from_pretrained(damaged)
    assert "computes in torch.float32, not in torch.bfloat16" in caplog.text
    assert model.dtype == torch.float32
    assert torch.equal(model.generate(ids, **GREEDY), load_pack(damaged).generate(ids, **GREEDY))
    assert model.moepack.tape is None or model.moepack.tape.playing


def test_batches_with_padding(pack: Path) -> None:
    """A row of a batch gives what it gives alone, where inputs are not rounded to 8 bits."""
    tokenizer = load_tokenizer(pack)
    tokenizer.padding_side = "left"
    model = load_pack(pack, activations="float")
    texts = [PROMPT, "Once"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for text, row in zip(texts, together, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        assert torch.equal(model.generate(**alone, **GREEDY)[0, -6:], row)


def test_beams_and_samples(pack: Path, ids: torch.Tensor) -> None:
    model = load_pack(pack, io="buffered")
    assert model.generate(ids, num_beams=3, **GREEDY).shape == (1, ids.shape[1] + 6)
    torch.manual_seed(0)
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3}
    assert model.generate(ids, **options).shape == (3, ids.shape[1] + 4)


def test_two_models_from_one_pack(pack: Path, ids: torch.Tensor) -> None:
    one, two = load_pack(pack, io="buffered"), load_pack(pack, io="mmap")
    assert torch.equal(one.generate(ids, **GREEDY), two.generate(ids, **GREEDY))
    del one
    gc.collect()
    assert torch.equal(two.generate(ids, **GREEDY), load_pack(pack).generate(ids, **GREEDY))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cuda", "cuda:1", "auto", {"": 0}, {"model": "cuda", "": "cpu"}])
def test_device_maps(pack: Path, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by us; where accelerate is absent, transformers asks for that before."""
    for present, message in ((True, "packs take no device map"), (False, "requires `accelerate`")):
        monkeypatch.setattr(
            "transformers.integrations.accelerate.is_accelerate_available",
            lambda present=present: present,
        )
        with pytest.raises(UsageError if present else ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(pack, device_map=place)


def test_validate_environment_says_what_is_wrong() -> None:
    """Where accelerate is installed, this is what the user sees."""
    from moepack_runtime.plugin.quantizer import MoepackConfig, MoepackQuantizer

    quantizer = MoepackQuantizer(MoepackConfig())
    for place in ("cuda", {"": torch.device("cuda", 0)}, {"a": "cpu", "b": 0}):
        with pytest.raises(UsageError, match="packs take no device map"):
            quantizer.validate_environment(device_map=place)
    for place in (None, "cpu", {"": "cpu"}, {"": torch.device("cpu")}):
        quantizer.validate_environment(device_map=place)
    assert not quantizer.is_trainable


def test_saving_is_refused(pack: Path, tmp_path: Path) -> None:
    model = load_pack(pack)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_quantizing_while_loading_is_refused(tmp_path: Path) -> None:
    """A stock checkpoint is made a pack by converting it."""
    from moepack_runtime.plugin.quantizer import MoepackConfig

    families.save_checkpoint(families.random_model("mixtral"), tmp_path / "stock")
    with pytest.raises((MoepackError, ValueError)):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "stock", quantization_config=MoepackConfig()
        )


def test_experts_without_a_pack() -> None:
    from moepack_runtime.experts import IMPLEMENTATION, register_experts_function

    register_experts_function()
    model = families.random_model("mixtral")
    model.set_experts_implementation(IMPLEMENTATION)
    with pytest.raises(UsageError, match="needs a pack"):
        model(families.tokens())


def test_configs_that_are_not_believed(damaged: Path) -> None:
    """From transformers' own entry points too."""
    edit_json(damaged / "config.json", quantization_config=None)
    for call in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(FormatError, match="must name its quantization"):
            call(damaged)


def test_an_untied_model_stays_untied(damaged: Path) -> None:
    """Both tensors are stored and differ, whatever the config says."""
    edit_json(damaged / "config.json", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(damaged, dtype=torch.float32)
    wanted = load_pack(damaged)
    ids = families.tokens()
    assert torch.equal(families.logits(model, ids), families.logits(wanted, ids))


def test_a_tied_model_made_untied(tmp_path: Path) -> None:
    """A tensor that the trunk lacks is an error; transformers would make one up and warn."""
    from tests.packs import make_pack

    model = families.random_model("mixtral", tie_word_embeddings=True)
    families.save_checkpoint(model, tmp_path / "source")
    make_pack(tmp_path / "source", tmp_path / "pack", quantizer="rtn", head_bits=16)
    edit_json(tmp_path / "pack" / "config.json", tie_word_embeddings=False)
    with pytest.raises(FormatError, match=r"lm_head\.weight: the trunk lacks a tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pack")


# --- what is left behind -------------------------------------------------------------------------


def io_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("moepack-io")]


def descriptors(pack: Path) -> list[str]:
    """Files of the pack that this process has open."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            target = str(path.readlink())
        except OSError:
            continue
        if target.startswith(str(pack)):
            found.append(target)
    return found


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("io", ["direct", "mmap"])
def test_a_model_is_collected(damaged: Path, ids: torch.Tensor, used: bool, io: str) -> None:
    gc.collect()
    threads = len(io_threads())
    model = load_pack(damaged, io=io)
    assert len(descriptors(damaged)) >= 3
    assert len(io_threads()) == threads + (DEFAULT_THREADS if io == "direct" else 0)
    if used:
        model.generate(ids, **GREEDY)
    reference: weakref.ref[PreTrainedModel] = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert len(io_threads()) == threads
    assert descriptors(damaged) == []


def test_a_failed_load_leaves_nothing(damaged: Path) -> None:
    gc.collect()
    threads = len(io_threads())
    for changes in ({"num_local_experts": 4}, {"vocab_size": 5000}, {"num_key_value_heads": 4}):
        edit_json(damaged / "config.json", **changes)
        with pytest.raises(FormatError):
            load_pack(damaged, io="buffered")
    with pytest.raises(MoepackError):
        load_pack(damaged, ram=1)
    gc.collect()
    assert len(io_threads()) == threads
    assert descriptors(damaged) == []


def test_closing_by_hand(damaged: Path) -> None:
    model = load_pack(damaged, io="buffered")
    model.moepack.close()
    assert descriptors(damaged) == []


def test_a_load_that_fails_late_ends_its_threads(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the garbage collector, which comes when it likes."""
    closed: list[object] = []
    close = SlotCache.close
    monkeypatch.setattr(SlotCache, "close", lambda self: (closed.append(self), close(self)))

    def fails(*_: object) -> None:
        raise AttributeError("a defect")

    for target in ("Speculator", "_untie_packed"):
        with monkeypatch.context() as patched:
            patched.setattr(f"moepack_runtime.plugin.quantizer.{target}", fails)
            # A defect of ours is not called the config's fault.
            with pytest.raises(AttributeError, match="a defect"):
                load_pack(damaged, io="buffered")
    assert len(closed) == 2


def test_a_config_nested_too_deeply(damaged: Path) -> None:
    (damaged / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(FormatError):
        load_pack(damaged)


def test_packed_bytes_are_bytes(damaged: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        name = next(name for name in header if name.endswith(".packed"))
        header[name]["dtype"] = "I8"

    edit_header(damaged / "model.safetensors", change)
    with Pack(damaged) as opened, pytest.raises(IntegrityError, match="the header is not the one"):
        check_trunk(opened)
    reseal(damaged, "model.safetensors")
    with Pack(damaged) as opened, pytest.raises(FormatError, match="wrong type or size"):
        check_trunk(opened)
