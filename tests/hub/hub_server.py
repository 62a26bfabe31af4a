"""A Hugging Face Hub on the loopback interface, for the real client to talk to.

Spoken are the parts of the protocol that moving model repositories takes: create, whoami, model
info, tree, paths-info, preupload, LFS batch and upload, Xet tokens, commit, branches, and resolve
with ranges and ETags; with private and gated repositories, and with faults on demand. The Xet
storage that clients are sent to is in ``xet_server.py``, on the same port.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.hub.hub_store import (
    Commit,
    HubFile,
    HubStore,
    Repo,
    is_large,
    large_file,
    small_file,
)
from tests.hub.loopback import Handler, Request, Server, Stop
from tests.hub.xet_server import XET_ROUTES, XET_TOKEN, rebuild

TOKEN = "hf_secretTokenOfTheTests"


class Hub(Server):
    """The running server.

    Args:
        root: A folder for what is uploaded.
        store: What another server has stored, instead.
    """

    def __init__(self, root: Path, store: HubStore | None = None) -> None:
        self.store = store or HubStore(root)
        super().__init__(_Handler)

    def uploaded(self) -> list[Request]:
        """The uploads of large objects: LFS objects and blocks of the Xet store."""
        kinds = (("PUT", "/lfs-put/"), ("POST", "/xet/v1/xorbs/"))
        return [r for r in self.requests if any(r.method == m and p in r.path for m, p in kinds)]

    def downloads(self, part: str = "") -> list[Request]:
        """The requests for file contents whose path holds ``part``."""
        found = [r for r in self.requests if r.method == "GET" and "/resolve/" in r.path]
        return [r for r in found if part in r.path]

    def content(self, file: HubFile) -> bytes | Path:
        """A file's bytes, or where they are; those of a Xet file are put together once."""
        if file.data is not None:
            return file.data
        path = self.store.objects / str(file.sha256)
        if path.exists():
            return path
        path = self.store.rebuilt / str(file.sha256)
        with self.store.lock:
            if not path.exists():
                door = Hub(path, self.store)  # requests there are no client's
                rebuild(door.url, str(file.xet), file.size, path)
                door.close()
        return path

    def read(self, file: HubFile) -> bytes:
        content = self.content(file)
        return content if isinstance(content, bytes) else content.read_bytes()


class _Handler(Handler):
    hub: Hub

    # Who asks

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, repo_id: str, *, content: bool = False) -> Repo:
        repo = self.hub.store.repos.get(repo_id)
        if repo is None or (repo.private and not self.has_token()):
            self.body()
            self.fail(404 if self.has_token() else 401, "RepoNotFound")
        assert repo is not None
        if content and repo.gated:
            self.fail(403 if self.has_token() else 401, "GatedRepo")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        try:
            return repo.commit(revision)
        except KeyError:
            self.body()
            self.fail(404, "RevisionNotFound")
            raise

    def needs_token(self) -> None:
        if not self.has_token():
            self.body()
            self.fail(401, "Unauthorized", {"X-Error-Message": "Invalid username or password."})

    # What is asked

    def whoami(self) -> None:
        self.needs_token()
        role = {"accessToken": {"role": "write"}, "type": "access_token"}
        self.reply({"type": "user", "name": "me", "fullname": "me", "orgs": [], "auth": role})

    def validate(self) -> None:
        self.body()
        self.reply({"errors": [], "warnings": []})

    def create(self) -> None:
        data = json.loads(self.body())
        self.needs_token()
        repo_id = f"{data.get('organization') or 'me'}/{data['name']}"
        with self.hub.store.lock:
            if repo_id in self.hub.store.repos:
                self.reply({"error": "exists", "url": f"{self.hub.url}/{repo_id}"}, status=409)
            private = bool(data.get("private") or data.get("visibility") == "private")
            self.hub.store.create(repo_id, private=private)
        self.reply({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "0" * 24})

    def branch(self, repo_id: str, name: str) -> None:
        data = json.loads(self.body() or b"{}")
        self.needs_token()
        repo = self.repo(repo_id)
        if name in repo.branches or name == "main":
            self.fail(409, "Conflict")
        start = self.commit_of(repo, data.get("startingPoint") or "main")
        repo.branches[name] = [start]
        self.reply({})

    def lfs_batch(self, repo_id: str) -> None:
        data = json.loads(self.body())
        self.needs_token()
        self.repo(repo_id)
        objects = []
        for item in data["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not (self.hub.store.objects / item["oid"]).exists():
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs-put/{item['oid']}"}}
            objects.append(answer)
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        part = self.hub.store.objects / f"{oid}.{threading.get_ident()}.part"
        digest = hashlib.sha256()
        try:
            with open(part, "wb") as file:
                for piece in self.pieces():
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != oid:
                self.fail(422, "BadOid")
            part.replace(self.hub.store.objects / oid)
        finally:
            part.unlink(missing_ok=True)
        self.send(200, b"", {"ETag": f'"{oid}"'})

    def xet_token(self, repo_id: str, kind: str, _: str) -> None:
        if kind == "write":
            self.needs_token()
        self.repo(repo_id, content=True)
        url, expires = f"{self.hub.url}/xet", int(time.time()) + 3600
        self.reply(
            {"casUrl": url, "exp": expires, "accessToken": XET_TOKEN},
            {
                "X-Xet-Cas-Url": url,
                "X-Xet-Access-Token": XET_TOKEN,
                "X-Xet-Token-Expiration": str(expires),
            },
        )

    def preupload(self, repo_id: str, revision: str) -> None:
        data = json.loads(self.body())
        self.needs_token()
        commit = self.commit_of(self.repo(repo_id), revision)
        files = []
        for item in data["files"]:
            name, there = item["path"], commit.files.get(item["path"])
            mode = "lfs" if is_large(name, item["size"]) else "regular"
            answer = {"path": name, "uploadMode": mode, "shouldIgnore": False}
            files.append({**answer, "oid": there.etag} if there else answer)
        self.reply({"files": files, "commitOid": commit.oid})

    def commit(self, repo_id: str, branch: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        self.needs_token()
        repo, header = self.repo(repo_id), lines[0]["value"]
        with self.hub.store.lock:
            head = self.commit_of(repo, branch)
            parent = header.get("parentCommit")
            if parent and not head.oid.startswith(parent):
                self.fail(412, "Conflict")
            files = dict(head.files)
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            commit = self.hub.store.add_commit(repo, branch, header["summary"], files)
        url = f"{self.hub.url}/{repo_id}/commit/{commit.oid}"
        self.reply({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, HubFile], key: str, value: dict[str, Any]) -> None:
        name = value["path"]
        if key == "file":
            files[name] = small_file(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            path = self.hub.store.objects / value["oid"]
            xet = self.hub.store.xet.by_sha256.get(value["oid"])
            if path.exists():
                files[name] = large_file(value["oid"], path.stat().st_size)
            elif xet is not None:
                files[name] = large_file(value["oid"], xet.nbytes, xet.hash)
            else:
                self.fail(400, "LfsMissing")
        elif key == "deletedFile":
            files.pop(name, None)
        else:
            self.fail(400, "UnknownOperation")

    def info(self, repo_id: str, revision: str | None = None) -> None:
        repo = self.repo(repo_id)
        commit = self.commit_of(repo, revision or "main")
        self.reply(
            {
                "_id": "0" * 24,
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit.oid,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": name} for name in sorted(commit.files)],
            }
        )

    def refs(self, repo_id: str) -> None:
        repo = self.repo(repo_id)
        heads = {"main": repo.commits, **repo.branches}
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
            for name, commits in heads.items()
        ]
        self.reply({"branches": branches, "tags": [], "converts": []})

    def tree(self, repo_id: str, revision: str, _: str | None = None) -> None:
        commit = self.commit_of(self.repo(repo_id), revision)
        # Pages, as the real Hub gives them.
        names, each = sorted(commit.files), 400
        start = int(self.query.get("cursor", ["0"])[0])
        page = [_entry(name, commit.files[name]) for name in names[start : start + each]]
        headers = {}
        if start + each < len(names):
            url = f"{self.hub.url}{self.route}?recursive=true&cursor={start + each}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.reply(page, headers)

    def paths_info(self, repo_id: str, revision: str) -> None:
        raw = self.body()
        asked = json.loads(raw) if raw.lstrip()[:1] == b"{" else parse_qs(raw.decode())
        commit = self.commit_of(self.repo(repo_id), revision)
        found = [n for n in asked["paths"] if n in commit.files]
        self.reply([_entry(name, commit.files[name]) for name in found])

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self.repo(repo_id, content=True)
        commit = self.commit_of(repo, revision)
        file = commit.files.get(name)
        if file is None:
            self.fail(404, "EntryNotFound", {"X-Repo-Commit": commit.oid})
        assert file is not None
        headers = {
            "X-Repo-Commit": commit.oid,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "ETag": f'"{file.etag}"',
        }
        if file.sha256:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if file.xet:
            route = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": file.xet, "X-Xet-Refresh-Route": route}
            headers["Link"] = f'<{route}>; rel="xet-auth"'
        if self.command == "HEAD":
            self.start(200, file.size, headers)
            raise Stop
        self.send_content(self.hub.content(file), headers)


def _entry(name: str, file: HubFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.size, "path": name}
    if file.sha256:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    if file.xet:
        entry["xetHash"] = file.xet
    return entry


_REPO = r"([^/]+/[^/]+)"
_Handler.routes = [
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/validate-yaml", _Handler.validate),
    (r"/api/repos/create", _Handler.create),
    (rf"/api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"/lfs-put/([0-9a-f]{64})", _Handler.lfs_put),
    (rf"/api/models/{_REPO}/xet-(read|write)-token/(.+)", _Handler.xet_token),
    (rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"/api/models/{_REPO}/refs", _Handler.refs),
    (rf"/api/models/{_REPO}/tree/([^/]+)(/.*)?", _Handler.tree),
    (rf"/api/models/{_REPO}/paths-info/([^/]+)", _Handler.paths_info),
    (rf"/api/models/{_REPO}/revision/(.+)", _Handler.info),
    (rf"/api/models/{_REPO}", _Handler.info),
    (rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    *XET_ROUTES,
]
