from __future__ import annotations

import json
from pathlib import Path

from tests.hub.conftest import Client, files_of


def test_round_trip(either: Client, pack: Path, tmp_path: Path) -> None:
    pushed = json.loads(either.ok("push", pack, "me/pack", "--json"))
    assert pushed["kept"] == 0
    # The Hub counts who asks for a token: one serves all files.
    asked = [r for r in either.hub.requests if "/xet-write-token/" in r.path]
    assert len(asked) == (either.mode == "xet")
    out = tmp_path / "out"
    pulled = json.loads(either.ok("pull", "me/pack", out, "--json"))
    assert pulled["complete"]
    assert pulled["fetched"] == pushed["uploaded"]
    assert files_of(out) == files_of(pack)
    either.ok("verify", out)
    # The manifest came with the last commit, and only then.
    commits = either.hub.store.repos["me/pack"].commits
    assert ["moepack.json" in commit.files for commit in commits[-2:]] == [False, True]
    assert {file.xet is None for file in commits[-1].files.values() if file.sha256} == {
        either.mode == "lfs"
    }


def test_second_push_uploads_nothing(either: Client, pack: Path) -> None:
    either.ok("push", pack, "me/pack")
    store = either.hub.store
    commits, stored = len(store.repos["me/pack"].commits), store.stored_nbytes()
    either.hub.forget()
    again = json.loads(either.ok("push", pack, "me/pack", "--json"))
    assert (again["uploaded"], again["bytes"]) == (0, 0)
    assert len(store.repos["me/pack"].commits) == commits
    assert store.stored_nbytes() == stored
    assert not either.hub.uploaded()
