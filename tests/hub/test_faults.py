"""What a user sees when the Hub refuses, is busy, breaks off, or sends damaged bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.hub.conftest import DRIVER, Client, files_of
from tests.hub.hub_server import TOKEN
from tests.hub.loopback import Fault

LAYER = "experts/layer-00002.safetensors"


def test_private_repository(client: Client, pack: Path, tmp_path: Path) -> None:
    client.ok("push", pack, "me/secret", "--private")
    assert client.hub.store.repos["me/secret"].private
    line = client.fails(6, "pull", "me/secret", tmp_path / "out", HF_TOKEN="")
    assert "me/secret" in line
    assert "log in" in line
    assert not (tmp_path / "out" / "moepack.json").exists()
    # Logged in, without a variable.
    client.home.mkdir(exist_ok=True)
    (client.home / "token").write_text(TOKEN)
    client.ok("pull", "me/secret", tmp_path / "out", HF_TOKEN="")
    # A public repository is never taken for a private one.
    client.hub.store.create("me/public")
    assert "public" in client.fails(2, "push", pack, "me/public", "--private")
    assert len(client.hub.store.repos["me/public"].commits) == 1


def test_gated_repository(shared: Client, tmp_path: Path) -> None:
    shared.hub.store.repos["me/pack"].gated = True
    line = shared.fails(6, "pull", "me/pack", tmp_path / "out")
    assert "gated" in line
    assert "accept the licence" in line
    assert "gated" in shared.fails(6, "inspect", "me/pack")


def test_no_such_thing(shared: Client, tmp_path: Path) -> None:
    assert "me/nothing" in shared.fails(6, "pull", "me/nothing", tmp_path / "out")
    line = shared.fails(6, "pull", "me/pack", tmp_path / "out", "--revision", "v9")
    assert "no such revision" in line
    assert "v9" in line
    shared.hub.store.put("me/other", {"config.json": b"{}"})
    assert "it has no moepack.json" in shared.fails(3, "pull", "me/other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_push_without_login(client: Client, pack: Path) -> None:
    line = client.fails(6, "push", pack, "me/pack", HF_TOKEN="")
    assert "log in" in line
    client.hub.faults = [Fault("/commit/", status=403, times=-1)]
    assert "HTTP 403" in client.fails(6, "push", pack, "me/pack")


@pytest.mark.parametrize("status", [429, 500])
def test_a_busy_hub_is_tried_again(either: Client, pack: Path, tmp_path: Path, status: int) -> None:
    either.hub.faults = [
        Fault("/api/repos/create", status=status),
        Fault("/preupload/", status=status),
        Fault("/commit/", status=status),
        Fault("/objects/batch", status=status),
    ]
    either.ok("push", pack, "me/pack")
    either.hub.faults = [
        Fault("/api/models/", status=status),
        Fault("/tree/", status=503),
        Fault("/resolve/", "HEAD", status=status),
        Fault("/resolve/.*/experts/", "GET", status=status),
    ]
    either.ok("pull", "me/pack", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(pack)


def test_a_hub_that_stays_busy(shared: Client, pack: Path, tmp_path: Path) -> None:
    shared.hub.faults = [Fault("/api/models/", status=429, times=-1)]
    line = shared.fails(6, "pull", "me/pack", tmp_path / "out")
    assert "HTTP 429" in line
    assert "try again later" in line
    shared.hub.faults = [Fault("/commit/", status=500, times=-1)]
    assert "HTTP 500" in shared.fails(6, "push", pack, "me/new")
    shared.hub.forget()
    shared.ok("push", pack, "me/new")
    assert not shared.hub.uploaded()  # every object had arrived


@pytest.mark.parametrize("status", [409, 412])
def test_somebody_else_pushes_at_the_same_time(shared: Client, own_pack: Path, status: int) -> None:
    change_config(own_pack)
    shared.hub.faults = [Fault("/commit/", status=status, times=-1)]
    line = shared.fails(6, "push", own_pack, "me/pack")
    assert f"HTTP {status}" in line
    assert "run it again" in line
    shared.hub.forget()
    shared.ok("push", own_pack, "me/pack")


def test_the_branch_moves_between_two_commits_of_a_push(shared: Client, own_pack: Path) -> None:
    change_config(own_pack)
    intruder = Fault("/commit/", act=lambda: shared.hub.store.put("me/pack", {"x.txt": b"x"}))
    shared.hub.faults = [intruder]
    assert "HTTP 412" in shared.fails(6, "push", own_pack, "me/pack")


def test_dropped_connections(shared: Client, pack: Path, tmp_path: Path) -> None:
    shared.hub.faults = [Fault(LAYER, "GET", drop_after=20_000, times=2)]
    shared.ok("pull", "me/pack", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(pack)
    shared.hub.faults = [Fault("/lfs-put/", "PUT", drop_after=20_000, times=2)]
    shared.hub.store.objects.rename(tmp_path / "gone")
    shared.hub.store.objects.mkdir()
    shared.ok("push", pack, "me/again")


def test_no_connection(client: Client, tmp_path: Path) -> None:
    client.hub.close()
    line = client.fails(6, "pull", "me/pack", tmp_path / "out")
    assert "connection" in line
    line = client.fails(6, "verify", "me/pack", HF_HUB_OFFLINE="1")
    assert "offline" in line


def test_a_bit_flipped_on_the_way_is_repaired(shared: Client, pack: Path, tmp_path: Path) -> None:
    shared.hub.faults = [Fault(LAYER, "GET", flip=True)]
    done = shared.run("pull", "me/pack", tmp_path / "out")
    assert done.code == 0, done.err
    assert "damaged on the way" in done.err
    assert files_of(tmp_path / "out") == files_of(pack)
    assert len(shared.hub.downloads(LAYER)) == 2


def test_damage_that_stays(shared: Client, tmp_path: Path) -> None:
    stored = shared.hub.store.repos["me/pack"].commits[-1].files[LAYER]
    path = shared.hub.content(stored)
    data = bytearray(path.read_bytes())
    data[-5000] ^= 4
    path.write_bytes(data)
    line = shared.fails(4, "pull", "me/pack", tmp_path / "out")
    assert LAYER in line
    assert not (tmp_path / "out" / LAYER).exists()
    assert "unfinished pull" in shared.fails(3, "verify", tmp_path / "out")
    data[-5000] ^= 4
    path.write_bytes(data)
    shared.hub.forget()
    shared.ok("pull", "me/pack", tmp_path / "out")
    assert not shared.hub.downloads("layer-00000")  # what had arrived is kept


def test_repair_fetches_what_is_wrong(shared: Client, pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shared.ok("pull", "me/pack", out)
    damaged, lost = out / LAYER, out / "tokenizer.json"
    data = bytearray(damaged.read_bytes())
    data[-5000] ^= 4
    damaged.write_bytes(data)
    lost.unlink()
    assert "--repair" in shared.fails(4, "pull", "me/pack", out)
    shared.hub.forget()
    report = json.loads(shared.ok("pull", "me/pack", out, "--repair", "--json"))
    assert report["fetched"] == 2
    assert files_of(out) == files_of(pack)
    assert not shared.hub.downloads("layer-00001")
    assert json.loads(shared.ok("pull", "me/pack", out, "--json"))["fetched"] == 0


def test_the_revision_moves_during_a_pull(
    either: Client, own_pack: Path, pack: Path, tmp_path: Path
) -> None:
    either.ok("push", pack, "me/pack")
    first = either.hub.store.repos["me/pack"].commits[-1].oid
    either.hub.forget()
    change_config(own_pack)
    new = {"config.json": (own_pack / "config.json").read_bytes()}
    new["moepack.json"] = (own_pack / "moepack.json").read_bytes()
    moves = Fault(LAYER, "HEAD", act=lambda: either.hub.store.put("me/pack", new))
    either.hub.faults = [moves]
    either.ok("pull", "me/pack", tmp_path / "out")
    assert moves.times == 0
    assert files_of(tmp_path / "out") == files_of(pack)
    # The first request asks what `main` is; the others name the commit.
    asked = [r.path for r in either.hub.requests if "/me/pack" in r.path]
    assert asked[0] == "/api/models/me/pack"
    assert len(asked) > 10
    assert all(f"/{first}" in path for path in asked[1:])
    either.ok("pull", "me/pack", tmp_path / "new")
    assert files_of(tmp_path / "new") == files_of(own_pack)


def test_the_revision_moves_on_the_way_to_the_cache(
    shared: Client, own_pack: Path, pack: Path
) -> None:
    change_config(own_pack)
    new = {name: (own_pack / name).read_bytes() for name in ("config.json", "moepack.json")}
    shared.hub.faults = [
        Fault(LAYER, "GET", act=lambda: shared.hub.store.put("me/pack", new)),
    ]
    shared.ok("verify", "me/pack")
    snapshot = next(shared.home.rglob("moepack.json")).parent
    assert files_of(snapshot) == files_of(pack)
    shared.ok("verify", "me/pack")
    newer = next(path for path in snapshot.parent.iterdir() if path != snapshot)
    assert files_of(newer) == files_of(own_pack)


def test_a_pull_goes_on_at_the_commit_where_it_began(
    shared: Client, own_pack: Path, pack: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shared.hub.faults = [Fault(LAYER, "GET", status=404, code="EntryNotFound", times=-1)]
    shared.fails(6, "pull", "me/pack", out)
    shared.hub.forget()
    change_config(own_pack)
    shared.ok("push", own_pack, "me/pack")
    done = shared.run("pull", "me/pack", out)
    assert done.code == 0, done.err
    assert "has moved on" in done.err
    assert files_of(out) == files_of(pack)


def test_the_commit_of_a_broken_off_pull_is_gone(
    shared: Client, own_pack: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shared.hub.faults = [Fault(LAYER, "GET", status=404, code="EntryNotFound", times=-1)]
    shared.fails(6, "pull", "me/pack", out)
    shared.hub.forget()
    change_config(own_pack)
    shared.ok("push", own_pack, "me/pack")
    commits = shared.hub.store.repos["me/pack"].commits
    del commits[:-1]  # as when a history is squashed
    left = out / ".moepack-pull" / ".cache" / "huggingface" / "download" / "x.1.incomplete"
    left.write_bytes(b"what a killed download leaves behind")
    line = shared.fails(4, "pull", "me/pack", out)
    assert not left.exists()
    assert "revision changed" in line
    assert "--repair" in line
    shared.ok("pull", "me/pack", out, "--repair")
    assert files_of(out) == files_of(own_pack)


def test_a_repository_in_the_middle_of_a_push(shared: Client, tmp_path: Path) -> None:
    repo = shared.hub.store.repos["me/pack"]
    files = {k: v for k, v in repo.commits[-1].files.items() if k != "moepack.json"}
    shared.hub.store.add_commit(repo, "main", "half", files)
    assert "unfinished push" in shared.fails(3, "pull", "me/pack", tmp_path / "out")
    assert "unfinished push" in shared.fails(3, "verify", "me/pack")
    # New layers under an old manifest.
    shared.hub.store.put("me/pack", {LAYER: b"new"})
    repo.commits[-1].files["moepack.json"] = repo.commits[-3].files["moepack.json"]
    line = shared.fails(4, "pull", "me/pack", tmp_path / "out")
    assert "not the one that its manifest lists" in line
    assert LAYER in line


def test_some_layers_only(shared: Client, pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = json.loads(shared.ok("pull", "me/pack", out, "--layers", "0-1,4", "--json"))
    assert not report["complete"]
    assert sorted(path.name[10:11] for path in (out / "experts").iterdir()) == ["0", "1", "4"]
    assert "unfinished pull" in shared.fails(3, "inspect", out)
    assert "layer" in shared.fails(2, "pull", "me/pack", out, "--layers", "0-99")
    assert "list of layers" in shared.fails(2, "pull", "me/pack", out, "--layers", "3-1")
    shared.ok("pull", "me/pack", out)
    assert files_of(out) == files_of(pack)


def test_folders_that_are_not_for_a_pull(shared: Client, own_pack: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert "letter.txt" in shared.fails(5, "pull", "me/pack", tmp_path / "full")
    change_config(own_pack)
    assert "another pack" in shared.fails(5, "pull", "me/pack", own_pack)


def test_a_damaged_pack_is_not_pushed(client: Client, own_pack: Path) -> None:
    data = bytearray((own_pack / LAYER).read_bytes())
    data[-5000] ^= 4
    (own_pack / LAYER).write_bytes(data)
    assert LAYER in client.fails(4, "push", own_pack, "me/pack")
    assert not client.hub.uploaded()
    shutil.rmtree(own_pack / "experts")
    client.fails(3, "push", own_pack, "me/pack")


def test_a_file_that_changes_while_it_is_pushed(either: Client, own_pack: Path) -> None:
    def change() -> None:
        data = bytearray((own_pack / LAYER).read_bytes())
        data[-5000] ^= 4
        (own_pack / LAYER).write_bytes(data)

    either.hub.faults = [Fault("/preupload/", act=change)]  # the comparison is over by then
    line = either.fails(4, "push", own_pack, "me/pack")
    assert "was changed while it was sent" in line
    assert LAYER in line
    assert "moepack.json" not in either.hub.store.repos["me/pack"].commits[-1].files


def test_a_file_that_is_lost_before_the_manifest_comes(client: Client, pack: Path) -> None:
    def lose() -> None:
        commits = client.hub.store.repos["me/pack"].commits
        if len(commits) > 1:
            commits[-1].files.pop(LAYER, None)

    client.hub.faults = [Fault("/api/models/me/pack", "GET", act=lose, times=-1)]
    line = client.fails(6, "push", pack, "me/pack")
    assert LAYER in line
    assert "moepack.json" not in client.hub.store.repos["me/pack"].commits[-1].files


def test_two_pulls_into_one_folder(shared: Client, pack: Path, tmp_path: Path) -> None:
    out, reached, go_on = tmp_path / "out", threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        go_on.wait(60)

    shared.hub.faults = [Fault(LAYER, "GET", act=wait)]
    first = shared.start("pull", "me/pack", out)
    assert reached.wait(60)
    assert "in use by" in shared.fails(5, "pull", "me/pack", out)
    go_on.set()
    assert first.communicate(timeout=60)[1] == ""
    assert files_of(out) == files_of(pack)


def test_offline(shared: Client, pack: Path, tmp_path: Path) -> None:
    for words in (("push", pack, "me/pack"), ("pull", "me/pack", tmp_path / "out")):
        line = shared.fails(6, *words, HF_HUB_OFFLINE="1")
        assert "HF_HUB_OFFLINE" in line
    assert not shared.hub.requests


@pytest.mark.parametrize("into", ["folder", pytest.param("cache", marks=pytest.mark.slow)])
def test_a_full_disk(shared: Client, tmp_path: Path, into: str) -> None:
    """A real one, where the system lets us make it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=3m tmpfs "{disk}"'
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("no private mounts here")
    words = {"folder": f"pull me/pack {disk}/out", "cache": "verify me/pack"}[into]
    home = {"HF_HOME": f"{disk}/home"} if into == "cache" else {}
    done = subprocess.run(
        [*unshare, f'{mount} && "{sys.executable}" -W ignore "{DRIVER}" {words}; echo $?'],
        env=shared.environment(**home),
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["5"]
    assert "space" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not shared.hub.downloads(".safetensors")  # it is known beforehand


def change_config(folder: Path) -> None:
    """Make it another pack: a blank at the end of its config."""
    path, manifest = folder / "config.json", folder / "moepack.json"
    data = path.read_bytes() + b" "
    path.write_bytes(data)
    values = json.loads(manifest.read_bytes())
    facts = values["files"]["config.json"]
    facts["size"], facts["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    manifest.write_text(json.dumps(values))


def test_a_cache_that_cannot_be_written_is_named(
    shared: Client, pack: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "home"
    line = shared.fails(5, "verify", "me/pack", HF_HOME=str(home))
    assert line.startswith(f"moepack: me/pack: {home}")
    # These need none.
    shared.ok("pull", "me/pack", tmp_path / "out", HF_HOME=str(home))
    assert files_of(tmp_path / "out") == files_of(pack)
