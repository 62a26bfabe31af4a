"""Packs in lm-eval, by the model name ``moepack``."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moepack_formats.errors import UsageError
from tests.packs import make_pack

ASSETS = Path(__file__).parents[1] / "assets"
REASON = "needs lm-eval: pip install 'moepack[lm-eval]'"
TEXT = "And the king said unto him, Thou shalt not"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm-eval") / "pack"
    make_pack(ASSETS / "tiny-moe", folder, attn_bits=16, expert_bits=4)
    return folder


def test_importing_moepack_makes_the_name_known(tmp_path: Path) -> None:
    """Against stand-ins, so that it is tested where the harness is not installed."""
    for name, text in {
        "__init__.py": "",
        "api/__init__.py": "",
        "api/registry.py": (
            "class Registry(dict):\n"
            "    def register(self, name, target): self[name] = target\n"
            "model_registry = Registry()\n"
        ),
        "models/__init__.py": "",
    }.items():
        path = tmp_path / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    program = (
        "import sys, moepack\n"
        "assert 'lm_eval' not in sys.modules\n"
        "import lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "print(model_registry['moepack'], 'torch' in sys.modules)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["moepack.lm_eval:PackLM", "False"]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is there")
def test_without_lm_eval_the_command_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moepack.lm_eval"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("moepack: lm-eval is missing")
    assert done.stderr.endswith("pip install '.[lm-eval]' in a clone\n")


def test_the_harness_s_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against stand-ins, as above."""
    loaded: dict[str, object] = {}

    class Loaded(Exception):
        pass

    def load(_: str, **options: object) -> None:
        loaded.update(options)
        raise Loaded

    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval.models.huggingface"], "HFLM", object, raising=False)
    monkeypatch.delitem(sys.modules, "moepack.lm_eval", raising=False)
    module = importlib.import_module("moepack.lm_eval")
    del sys.modules["moepack.lm_eval"]  # which monkeypatch would put back, stand-ins and all
    monkeypatch.setattr(module, "load_pack", load)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for device, wanted in (("cpu", "cpu"), ("cuda:0", "auto"), ("cuda", "auto"), (None, "auto")):
        with pytest.raises(Loaded):
            module.PackLM("pack", device=device)
        assert (loaded["device"], loaded["dtype"]) == (wanted, None)
    with pytest.raises(UsageError, match="no such device"):
        module.PackLM("pack", device="mps")


def test_scores_are_the_model_s(tiny: Path) -> None:
    pytest.importorskip(
        "lm_eval.models.huggingface", reason="needs lm-eval: pip install .[lm-eval]"
    )
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from moepack_runtime.loading import load_pack, load_tokenizer

    model = load_pack(tiny, activations="float")
    ids = torch.tensor([load_tokenizer(tiny)(TEXT)["input_ids"]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0].log_softmax(-1)
    wanted = float(logits.gather(1, ids[0, 1:, None])[2:].sum())

    harness = get_model("moepack").create_from_arg_string(
        f"pretrained={tiny},ram=4GiB,activations=float", {"batch_size": 1, "device": "cuda:0"}
    )
    split = len(load_tokenizer(tiny).decode(ids[0, :3]))
    request = Instance("loglikelihood", {}, (TEXT[:split], TEXT[split:]), 0)
    ((found, _),) = harness.loglikelihood([request], disable_tqdm=True)
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
def test_a_local_task_runs_from_the_command_line(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "lm_eval.models.huggingface", reason="needs lm-eval: pip install .[lm-eval]"
    )
    lines = [
        {"text": "And the king said unto", "choices": [" him", " tensor"], "answer": 0},
        {"text": "Returns the number of", "choices": [" Israel", " elements"], "answer": 1},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "task.yaml").write_text(
        "task: tiny_choices\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{text}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )

    def lm_eval(pack: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moepack.lm_eval", "--model", "moepack"]
        command += ["--model_args", f"pretrained={pack},ram=4GiB", "--tasks", "tiny_choices"]
        command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")]
        path = os.pathsep.join(sys.path)
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "HF_HOME": str(tmp_path / "home"),
            "HF_DATASETS_OFFLINE": "1",
        }
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = lm_eval(tiny)
    assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(result.read_text())["results"]["tiny_choices"]["acc,none"] == 1.0

    refused = lm_eval(tmp_path / "nowhere")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(
        f"moepack: {tmp_path}/nowhere: no such folder"
    )
