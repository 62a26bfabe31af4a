"""The command line: what it says, where it says it, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moepack
from moepack import speed
from moepack.commands.common import print_json
from moepack_formats.errors import UsageError
from moepack_runtime.kernels import native
from moepack_runtime.options import RuntimeOptions
from tests.commands import ASSETS, Command, edit_json

COMMANDS = ("bench", "convert", "eval", "generate", "inspect", "verify")
HEAVY = ("numpy", "safetensors", "tokenizers", "torch", "transformers")
BRIEF = ("--max-new-tokens", 4, "--threads", 1)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


# --- help, version and usage ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (["--help"], HEAVY),
        (["--version"], HEAVY),
        *((([name, "--help"]), ("torch", "transformers")) for name in COMMANDS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_loads_nothing_heavy(arguments: list[str], forbidden: tuple[str, ...]) -> None:
    code = "import sys; from moepack import cli; code = cli.run(sys.argv[1:])\n"
    code += "print(code, *sys.modules, file=sys.stderr)"
    done = python(code, *arguments)
    first, *loaded = done.stderr.split()
    assert first == "0"
    assert not set(forbidden) & set(loaded)
    # Its time, a fifth of a second, goes by how much is loaded: 236 modules when this was written.
    assert forbidden != HEAVY or len(loaded) < 320
    assert done.stdout.strip()


def test_help_names_every_command(command: Command) -> None:
    result = command("--help")
    assert result.code == 0
    assert result.err == ""
    for name in COMMANDS:
        assert f"  {name} " in result.out
        described = command(name, "--help")
        assert (described.code, described.err) == (0, "")
        assert described.out.startswith(f"Usage: moepack {name} ")
        assert command(name, "-h").out == described.out


def test_version(command: Command) -> None:
    result = command("--version")
    assert (result.code, result.err) == (0, "")
    assert moepack.__version__ in result.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["--nonsense"],
        ["inspect", "--nonsense"],
        ["convert"],
        ["convert", "only-one"],
        ["generate", "pack", "--prompt", "x", "--max-new-tokens", "0"],
        ["generate", "pack", "--prompt", "x", "--max-new-tokens", "many"],
        ["generate", "pack", "--prompt", "x", "--temperature", "0"],
        ["generate", "pack", "--prompt", "x", "--io", "telepathy"],
        ["generate", "pack", "--prompt", "x", "--policy", "fifo"],
        ["eval", "pack"],
        ["convert", "src", "out", "--scheme", "q5"],
    ],
    ids=" ".join,
)
def test_wrong_usage(command: Command, arguments: list[str]) -> None:
    result = command(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("Usage: moepack")
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "pack"], "--prompt or --interactive"),
        (["generate", "pack", "--prompt", "x", "--interactive"], "--prompt or --interactive"),
        (["generate", "pack", "--prompt", ""], "the prompt is empty"),
        (["generate", "pack", "--interactive", "--json"], "--json does not go"),
        (["generate", "pack", "--prompt", "x", "--greedy", "--top-k", 3], "--greedy excludes"),
        (["generate", "pack", "--prompt", "x", "--system", "s"], "--system goes with"),
        (["generate", "pack", "--prompt", "x", "--ram", "lots"], "not a size"),
        (["generate", "pack", "--prompt", "x", "--ram", "6XB"], "as 6GiB"),
        (["generate", "no-such", "--prompt", "x"], "no-such: no such folder"),
        (["inspect"], "name a pack"),
        (["inspect", "no-such"], "no-such: no such folder"),
        (["verify", "no-such"], "no-such: no such folder"),
        (["bench", "no-such"], "no-such: no such folder"),
        (["convert", "no-such", "out"], "no such folder, and not a Hub id"),
        (["convert", "src", "out", "--attn-bits", 5], "one of 2, 3, 4, 6, 8, 16"),
        (["convert", "src", "out", "--head-bits", 3], "one of 4, 6, 8, 16"),
        (["convert", "src", "out", "--expert-bits", 7], "or a decimal cap"),
        (["convert", "src", "out", "--expert-bits", "nan"], "or a decimal cap"),
        (["convert", "src", "out", "--expert-bits", "inf"], "or a decimal cap"),
        (["convert", "src", "out", "--expert-bits", -2.5], "or a decimal cap"),
        (["convert", "src", "out", "--quantizer", "nope"], "hqq"),
        (["convert", "src", "out", "--scheme", "q4g64", "--budget", "1GiB"], "exclude each other"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_values(command: Command, arguments: list[object], words: str) -> None:
    assert words in command(*arguments).error(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(command: Command, pack: Path) -> None:
    result = command("generate", pack, "--prompt", "x", "--device", "cuda")
    assert "there is no CUDA device" in result.error(2)


@pytest.mark.parametrize(
    "option",
    [
        ("--vram", "1GB"),
        ("--context", "64"),
        ("--hybrid", "on"),
        ("--hybrid", "off"),
        ("--compile",),
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompt", "x"],
        ["bench"],
        ["eval", "--text", ASSETS / "text" / "alice29.txt"],
        ["trace", "--text", ASSETS / "text" / "alice29.txt", "out.parquet"],
    ],
    ids=lambda value: value[0],
)
def test_options_about_a_gpu_where_the_cpu_computes(
    command: Command,
    pack: Path,
    arguments: list[object],
    option: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *rest = arguments
    result = command(name, pack, *rest, "--device", "cpu", *option)
    assert f"{option[0]} does nothing where the CPU computes" in result.error(2)
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []
    if torch.cuda.is_available():
        return
    error = command(name, pack, *rest, *option).error(2)
    assert f"{option[0]} does nothing where the CPU computes (got no CUDA device)" in error


def test_an_ablation_over_a_simulated_link(command: Command, pack: Path) -> None:
    arguments = ["bench", pack, "--ablation", "--max-new-tokens", 3, "--prompt-tokens", 2,
                 "--hybrid", "off", "--simulate-link", "1GB"]  # fmt: skip
    assert "nothing to compare" in command(*arguments, "--vram", "1GB").error(2)
    need = command(*arguments, "--vram", 1000).error(5).split("--vram ")[1].split()[0]
    result = json.loads(command(*arguments, "--vram", int(need) + 50_000, "--json").out)
    assert result["same_tokens"]
    full, guessless, cacheless, naive = result["ablation"]
    assert full["recall"] is not None
    assert guessless["recall"] is None
    assert cacheless["hit_ratio"] == naive["hit_ratio"] == 0
    assert naive["bytes_per_token"] > cacheless["bytes_per_token"] > full["bytes_per_token"]
    assert full["tokens_per_s"] > naive["tokens_per_s"]
    table = command(*arguments, "--vram", int(need) + 50_000).out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "full", "without prefetch", "without cache and prefetch", "naive"
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_ablation_without_a_gpu_says_what_to_do(command: Command, pack: Path) -> None:
    assert "--simulate-link" in command("bench", pack, "--ablation").error(2)


# --- inspect, verify, eval, bench ----------------------------------------------------------------


def test_inspect(command: Command, pack: Path) -> None:
    values = command("inspect", pack, "--json").json
    assert values["model_type"] == "mixtral"
    assert values["architecture"] == "MixtralForCausalLM"
    assert (values["moe_layers"], values["experts"]) == (3, 24)
    assert values["expert_schemes"] == ["q3g16s5"]
    assert values["expert_bits"] == values["expert_bytes"] * 8 / values["expert_parameters"]
    assert values["bytes"] == sum(p.stat().st_size for p in listed(pack))
    text = command("inspect", pack)
    assert (text.code, text.err) == (0, "")
    assert "24 in 3 layers, q3g16s5" in text.out


def listed(pack: Path) -> list[Path]:
    """The files that a manifest lists."""
    return [
        path
        for path in pack.rglob("*")
        if path.is_file() and path.name not in ("moepack.json", "README.md")
    ]


def test_inspect_one_layer(command: Command, pack: Path) -> None:
    values = command("inspect", pack, "--layer", 1, "--json").json
    assert values["module"] == "model.layers.1.mlp.experts"
    assert [record["expert"] for record in values["records"]] == list(range(8))
    assert all(record["offset"] % 4096 == 0 for record in values["records"])
    assert command("inspect", pack, "--layer", 1).out.count("\n") == 8
    assert "0 to 2" in command("inspect", pack, "--layer", 3).error(2)


def test_inspect_engine(command: Command) -> None:
    name = command("inspect", "--engine").out.strip()
    assert name.startswith(("native (", "reference"))
    assert command("inspect", "--engine", "--json").json == {"engine": name}


def test_verify(command: Command, pack: Path) -> None:
    values = command("verify", pack, "--json").json
    assert values["ok"] is True
    assert values["records"] == 24
    assert values["bytes"] == sum(path.stat().st_size for path in listed(pack))
    assert command("verify", pack).out.startswith("good: ")


def test_eval(command: Command, pack: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("There was nothing so very remarkable in that. " * 60)
    result = command("eval", pack, "--text", text, "--json", "--threads", 1)
    values = result.json
    assert values["perplexity"] > 1
    assert values["windows"] == -(-(values["tokens"] + values["windows"]) // 256)
    assert result.err == ""
    few = command("eval", pack, "--text", text, "--max-tokens", 10, "--json", "--threads", 1).json
    assert (few["tokens"], few["windows"]) == (9, 1)
    line = command("eval", pack, "--text", text, "--max-tokens", 10, "--threads", 1)
    assert line.out.startswith(f"perplexity {few['perplexity']:.4f} ")


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 5, "No such file"),
        (b"", 2, "too short"),
        (b"a", 2, "too short"),
        (b"caf\xe9 au lait", 2, "not a UTF-8 text"),
    ],
)
def test_eval_of_a_text_that_cannot_be(
    command: Command, pack: Path, tmp_path: Path, content: bytes | None, code: int, words: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    result = command("eval", pack, "--text", text, "--threads", 1)
    assert words in result.error(code)
    assert result.out == ""


def test_eval_of_a_folder(command: Command, pack: Path, tmp_path: Path) -> None:
    assert str(tmp_path) in command("eval", pack, "--text", tmp_path).error(5)


def test_bench(command: Command, pack: Path) -> None:
    few = ["--max-new-tokens", 3, "--prompt-tokens", 5, "--rounds", 2, "--threads", 1]
    result = command("bench", pack, *few, "--io", "buffered", "--json")
    values = result.json
    assert result.err == ""
    for name in ("decode_tokens_per_s", "prefill_tokens_per_s"):
        assert values[name] > 0
    assert 0 <= values["hit_ratio"] <= 1
    assert values["bytes_per_token"] >= 0
    text = command("bench", pack, *few)
    assert [line.split()[0] for line in text.out.splitlines() if not line.startswith(" ")] == [
        "decode",
        "prefill",
        "cache",
        "packed",
        "memory",
        "engine",
    ]


def test_bench_does_not_read_memory_where_experts_are_streamed(
    command: Command, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take 512 MiB beside a budget that has no room for all experts."""
    calls = []
    monkeypatch.setattr(speed, "read_bandwidth", lambda threads: calls.append(threads) or 1e12)
    few = ["bench", pack, "--max-new-tokens", 2, "--prompt-tokens", 2, "--rounds", 1, "--json"]
    need = command(*few, "--ram", 1000).error(5).split("--ram ")[1].split()[0]
    for budget in (("--slots", 12), ("--ram", need)):
        values = command(*few, "--threads", 1, *budget).json
        assert (values["read_bytes_per_s"], values["read_share"]) == (None, None)
    assert calls == []
    values = command(*few, "--threads", 1, "--ram", "64GiB").json
    if native.available() is not None:
        assert calls
        assert values["read_share"] is not None


# --- a pack without a tokenizer ------------------------------------------------------------------


def test_without_a_tokenizer(command: Command, damaged: Path, tmp_path: Path) -> None:
    for path in damaged.glob("tokenizer*"):
        path.unlink()
    manifest = damaged / "moepack.json"
    files = json.loads(manifest.read_text())["files"]
    edit_json(manifest, files={k: v for k, v in files.items() if not k.startswith("tokenizer")})
    (tmp_path / "text").write_text("hello")
    for arguments in (["generate", "--prompt", "x"], ["eval", "--text", tmp_path / "text"]):
        name, *rest = arguments
        assert "the pack has no tokenizer" in command(name, damaged, *rest).error(2)
    assert command("bench", damaged, "--rounds", 1, *BRIEF).code == 0


def test_a_tokenizer_that_is_damaged(command: Command, damaged: Path) -> None:
    (damaged / "tokenizer.json").write_text("{")
    result = command("generate", damaged, "--prompt", "x", *BRIEF)
    assert "cannot read the tokenizer" in result.error(3)


def test_pack_given_as_a_link(command: Command, pack: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(pack)
    assert command("verify", link).code == 0


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        *((["generate", "pack", "--prompt", "x", "--io", "mmap", *o], o[0]) for o in (
            ["--slots", 4], ["--policy", "lru"], ["--scope", "global"], ["--cache-bias", 0.1],
        )),
        *((["bench", "pack", "--ablation", *o], o[0]) for o in (
            ["--rounds", 3], ["--context-tokens", 128], ["--no-prefetch"],
        )),
        (["bench", "pack", "--simulate-link", "1GB"], "--simulate-link"),
        (["convert", "src", "out", "--scheme", "q4g64", "--mix", "none"], "--mix"),
        (["convert", "src", "out", "--scheme", "q4g64", "--expert-bits", 3], "--expert-bits"),
        (["convert", "src", "out", "--calibrate-tokens", 99], "--calibrate-tokens"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)  # fmt: skip
def test_an_option_that_would_do_nothing(
    command: Command, arguments: list[object], option: str
) -> None:
    assert f"{option} does nothing with" in command(*arguments).error(2).replace(
        "--prefetch", "--no-prefetch"
    )


def test_mapped_files_have_no_hits(command: Command, pack: Path) -> None:
    few = ["--prompt", "x", "--max-new-tokens", 3, "--threads", 1]
    values = command("generate", pack, *few, "--io", "mmap", "--json").json
    assert [values[n] for n in ("hits", "misses", "hit_ratio", "bytes_read")] == [None] * 4
    result = command("generate", pack, *few, "--io", "mmap")
    assert "cache hits not known: the page cache decides" in result.err
    values = command("generate", pack, *few, "--io", "buffered", "--json").json
    assert values["hits"] + values["misses"] > 0


def test_verify_takes_a_revision(command: Command, pack: Path) -> None:
    assert "--revision" in command("verify", "--help").out
    assert command("verify", pack, "--revision", "main").code in (0, 2)


def test_too_many_threads(command: Command) -> None:
    result = command("generate", "pack", "--prompt", "x", "--threads", 1_000_000)
    assert result.code == 2
    with pytest.raises(UsageError, match="too many threads"):
        RuntimeOptions(threads=1_000_000)


def test_json_has_no_nan_in_lists(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1.0, float("nan"), {"b": (float("inf"),)}]})
    assert json.loads(capsys.readouterr().out) == {"a": [1.0, None, {"b": [None]}]}
