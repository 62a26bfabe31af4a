"""What lies in a repository is data: never executed, never trusted. Tokens are never shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepack.hub.card import MAX_CARD_NBYTES
from tests.commands import ASSETS
from tests.hub.conftest import Client, files_of
from tests.hub.hub_server import TOKEN
from tests.hub.hub_store import HubFile

BOOM = b"open('BOOM', 'w').write('executed')\n"
EVIL = ("../../evil.txt", "experts/../../evil.txt", "/etc/evil", "C:\\evil.txt", "a\\..\\evil")


def test_code_and_pickles_are_left_there(shared: Client, pack: Path, tmp_path: Path) -> None:
    shared.hub.store.put("me/pack", {"evil.py": BOOM, "pytorch_model.bin": b"\x80\x04boom"})
    shared.hub.forget()
    done = shared.run("pull", "me/pack", tmp_path / "out")
    assert done.code == 0, done.err
    assert "evil.py" in done.err
    assert files_of(tmp_path / "out") == files_of(pack)
    assert not shared.hub.downloads("evil.py")
    assert not shared.hub.downloads("pytorch_model.bin")


@pytest.mark.slow
def test_auto_map_is_not_followed(client: Client, own_pack: Path, tmp_path: Path) -> None:
    config = json.loads((own_pack / "config.json").read_bytes())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    replace_file(own_pack, "config.json", json.dumps(config).encode())
    tokenizer = json.loads((own_pack / "tokenizer_config.json").read_bytes())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    replace_file(own_pack, "tokenizer_config.json", json.dumps(tokenizer).encode())
    client.ok("push", own_pack, "me/pack")
    client.hub.store.put("me/pack", {"evil.py": BOOM})
    client.hub.forget()
    arguments = ("--prompt", "And", "--greedy", "--max-new-tokens", "1")
    done = client.run("generate", "me/pack", *arguments)
    assert done.code == 0, done.err
    assert "auto_map" in done.err
    assert not client.hub.downloads("evil.py")
    assert not Path("BOOM").exists()


@pytest.mark.parametrize("name", ["evil.py", "weights.pkl", *EVIL[1:3]])
def test_a_manifest_that_lists_what_it_may_not(
    shared: Client, own_pack: Path, tmp_path: Path, name: str
) -> None:
    values = json.loads((own_pack / "moepack.json").read_bytes())
    values["files"][name] = {"size": len(BOOM), "sha256": hashlib.sha256(BOOM).hexdigest()}
    shared.hub.store.put("me/pack", {"moepack.json": json.dumps(values).encode(), name: BOOM})
    line = shared.fails(3, "pull", "me/pack", tmp_path / "deep" / "er" / "out")
    assert "not a valid pack" in line
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda m: m.update(format_version=9, min_reader=9), 3, "newer reader"),
        (lambda m: m.update(surprise=1), 3, "unknown field"),
        (lambda m: m["files"].pop("experts/layer-00001.safetensors"), 3, "not listed"),
        (lambda m: m["files"]["config.json"].update(sha256="0" * 64), 4, "config.json"),
    ],
)
def test_a_damaged_manifest(
    shared: Client,
    own_pack: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    code: int,
    words: str,
) -> None:
    values = json.loads((own_pack / "moepack.json").read_bytes())
    change(values)
    shared.hub.store.put("me/pack", {"moepack.json": json.dumps(values).encode()})
    assert words in shared.fails(code, "pull", "me/pack", tmp_path / "out")
    assert not (tmp_path / "out" / "moepack.json").exists()


def test_a_repository_that_lists_files_outside(shared: Client, pack: Path, tmp_path: Path) -> None:
    files = shared.hub.store.repos["me/pack"].commits[-1].files
    for name in EVIL:
        files[name] = HubFile(len(BOOM), "0" * 40, data=BOOM)
    shared.ok("pull", "me/pack", tmp_path / "deep" / "er" / "out")
    assert not list(tmp_path.rglob("evil*"))


def test_the_token_is_never_printed(client: Client, pack: Path, tmp_path: Path) -> None:
    for options in (("--debug",), ("-v",)):
        client.ok("push", pack, "me/pack", *options)  # every run compares its output
        client.run("pull", "me/none", tmp_path / "out", *options)
        client.run("push", pack, "other/none", *options)
    client.hub.close()
    client.run("pull", "me/pack", tmp_path / "out", "--debug")
    stored = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size < 1 << 20]
    assert not [p for p in stored if TOKEN.encode() in p.read_bytes()]


def test_a_push_does_not_write_over_other_weights(client: Client, pack: Path) -> None:
    client.hub.store.put("me/model", {"model-00001-of-00002.safetensors": b"weights"})
    assert "other weights" in client.fails(2, "push", pack, "me/model")
    assert len(client.hub.store.repos["me/model"].commits) == 2


def test_model_card(client: Client, own_pack: Path, tmp_path: Path) -> None:
    quality, text = tmp_path / "quality.json", ASSETS / "text" / "tiny-moe-valid.txt"
    evaluated = client.ok("eval", own_pack, "--text", text, "--max-tokens", 20, "--json")
    quality.write_text(evaluated)
    perplexity = json.loads(evaluated)["perplexity"]
    values = json.loads((own_pack / "moepack.json").read_bytes())
    values["source"] = {"id": "org/model", "revision": "f" * 40, "license": "apache-2.0"}
    (own_pack / "moepack.json").write_text(json.dumps(values))
    client.ok("push", own_pack, "me/pack", "--quality", quality)
    repo = client.hub.store.repos["me/pack"]
    card = (repo.commits[-1].files["README.md"].data or b"").decode()
    for words in (
        "base_model: org/model",
        "license: apache-2.0",
        "- moepack",
        "- moe",
        "- quantized",
        "true bits",
        f"perplexity {perplexity:.4f} on tiny-moe-valid.txt (19 tokens",
        "pip install . ",
        "moepack generate me/pack",
        "f" * 40,
    ):
        assert words.lower() in card.lower()
    # The figures stay although the next push does not know them; an edited card stays, too.
    client.ok("push", own_pack, "me/pack")
    assert repo.commits[-1].files["README.md"].data == card.encode()
    client.hub.store.put("me/pack", {"README.md": b"mine"})
    pushed = client.run("push", own_pack, "me/pack")
    assert (pushed.code, "README.md" in pushed.err) == (0, False)
    assert repo.commits[-1].files["README.md"].data == b"mine"
    # Where this push had something to say there, the user is told.
    for more in (("--quality", quality), ()):
        assert "it was edited on the Hub" in client.run("push", own_pack, "me/pack", *more).err
        assert repo.commits[-1].files["README.md"].data == b"mine"
        (own_pack / "README.md").write_text("# of my own")


def test_a_branch(shared: Client, own_pack: Path, pack: Path, tmp_path: Path) -> None:
    replace_file(own_pack, "config.json", (own_pack / "config.json").read_bytes() + b"\n")
    shared.ok("push", own_pack, "me/pack", "--revision", "v2")
    shared.ok("pull", "me/pack", tmp_path / "main")
    shared.ok("pull", "me/pack", tmp_path / "v2", "--revision", "v2")
    assert files_of(tmp_path / "main") == files_of(pack)
    assert files_of(tmp_path / "v2") == files_of(own_pack)
    commit = shared.hub.store.repos["me/pack"].branches["v2"][-1].oid
    shared.ok("pull", "me/pack", tmp_path / "commit", "--revision", commit)
    assert files_of(tmp_path / "commit") == files_of(own_pack)


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Change a file of a pack and what its manifest says of it."""
    (folder / name).write_bytes(data)
    values = json.loads((folder / "moepack.json").read_bytes())
    values["files"][name] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "moepack.json").write_text(json.dumps(values))


def test_a_readme_that_is_too_large_is_not_read(
    client: Client, own_pack: Path, tmp_path: Path
) -> None:
    client.ok("push", own_pack, "me/pack")
    client.hub.store.put("me/pack", {"README.md": b"x" * (MAX_CARD_NBYTES + 1)})
    pulled = client.run("pull", "me/pack", tmp_path / "out")
    assert (pulled.code, "README.md has 4.0 MiB and is left out" in pulled.err) == (0, True)
    assert not (tmp_path / "out" / "README.md").exists()
    commits = client.hub.store.repos["me/pack"].commits
    before = len(commits)
    pushed = client.run("push", own_pack, "me/pack")
    assert (pushed.code, len(commits)) == (0, before)
    assert "README.md of me/pack stays as it is: it has 4.0 MiB" in pushed.err


def test_a_card_of_the_users_own_replaces_ours(client: Client, own_pack: Path) -> None:
    client.ok("push", own_pack, "me/pack")
    (own_pack / "README.md").write_text("# of my own")
    client.ok("push", own_pack, "me/pack")
    card = client.hub.store.repos["me/pack"].commits[-1].files["README.md"].data
    assert card == b"# of my own"
