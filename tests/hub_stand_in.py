"""The Hugging Face hub, as much of it as downloading and pushing take, on this machine: folders, commit by commit.

What `huggingface_hub` asks for.  Downloads: HEAD and GET of /ORG/NAME/resolve/REVISION/FILE, answered with the file,
its ETag and the commit, or with an error and its reason in X-Error-Code.  Pushes: a repository is created, the front
matter of the card checked, each file's way asked for, large ones put by their SHA-256 (git-lfs's batch API:
https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md), and all of it named in one commit.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import tempfile
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class Hub:
    """`hub.add("org/name", folder)` publishes a folder as a new commit of main and returns the commit's hash.

    `hub.url` is the endpoint; `hub.requests` what was asked for so far, as "METHOD path"; `hub.gated` names of
    repositories that want a login.

    `hub.token` may write to the repositories of "me"; `hub.private` are those that were made private, `hub.messages`
    those of the commits that came, `hub.cards` the cards that were to be checked.
    """

    token = "hf_AllowedToWriteToMe"

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}  # name -> revision -> folder
        self.commits: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.private: set[str] = set()
        self.messages: list[str] = []
        self.cards: list[str] = []
        self._objects: dict[str, bytes] = {}  # of large files, by their SHA-256
        self._uploads = tempfile.TemporaryDirectory()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                self.reply(*hub.answer(self.path.partition("?")[0]))

            def do_POST(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                body = self.rfile.read(int(self.headers["Content-Length"]))
                # where large files go, the address is the permission
                allowed = self.headers["Authorization"] == f"Bearer {hub.token}" or self.command == "PUT"
                status, answer = hub.take(self.path.partition("?")[0], body) if allowed else (401, {})
                self.reply(status, {"Content-Type": "application/json"}, json.dumps(answer).encode())

            def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET, do_PUT = do_HEAD, do_POST

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, folder: Path, branch: str = "main") -> str:
        commit = hashlib.sha1(f"{name} {folder} {len(self.commits)}".encode()).hexdigest()
        revisions = self.repositories.setdefault(name, {})
        for revision in (branch, commit):
            revisions[revision], self.commits[name, revision] = folder, commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = [unquote(part) for part in path.strip("/").split("/")]  # a branch may have a slash
        if parts[:2] == ["api", "models"] and (found := "/".join(parts[2:])) in self.repositories:
            return 200, {}, json.dumps({"id": found, "private": found in self.private, "tags": []}).encode()
        if len(parts) < 5 or parts[2] != "resolve":
            return 404, {}, b"{}"
        name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if name not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        folder = self.repositories[name].get(revision)
        if folder is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        headers = {"X-Repo-Commit": self.commits[name, revision]}
        if not (folder / file).is_file():
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        body = (folder / file).read_bytes()
        return 200, {**headers, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}, body

    def take(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Do what a POST or PUT to `path` asks for; the status and the answer."""
        parts = [unquote(part) for part in path.strip("/").split("/")]  # a branch may have a slash
        if parts[0] == "lfs":
            self._objects[parts[1]] = body
            return 200, {}
        if parts[-2:] == ["objects", "batch"]:
            wanted = json.loads(body)["objects"]
            places = [{"upload": {"href": f"{self.url}/lfs/{each['oid']}"}} for each in wanted]
            return 200, {
                "transfer": "basic",
                "objects": [{**each, "actions": place} for each, place in zip(wanted, places, strict=True)],
            }
        if parts == ["api", "repos", "create"]:
            return self._create(**json.loads(body))
        if parts == ["api", "validate-yaml"]:
            self.cards.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        _, _, owner, name, action, revision = parts
        if action == "branch":
            return (409, {}) if revision in self.repositories[f"{owner}/{name}"] else (200, {})
        if action == "preupload":
            ways = {each["path"]: "regular" if each["size"] < 10_000 else "lfs" for each in json.loads(body)["files"]}
            return 200, {
                "files": [{"path": path, "uploadMode": way, "shouldIgnore": False} for path, way in ways.items()]
            }
        assert action == "commit"
        commit = self._commit(f"{owner}/{name}", revision, [json.loads(line) for line in body.splitlines()])
        return 200, {"commitUrl": f"{self.url}/{owner}/{name}/commit/{commit}", "commitOid": commit}

    def _create(
        self, name: str, organization: str, visibility: str = "", private: bool = False, **_: Any
    ) -> tuple[int, dict[str, Any]]:
        full = f"{organization}/{name}"
        if organization != "me":
            return 403, {"error": f"You don't have the rights to create a model under the namespace {organization!r}"}
        if full in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{full}"}
        self.repositories[full] = {}
        if private or visibility == "private":  # as client 1.0 says it, and 2.4
            self.private.add(full)
        return 200, {"url": f"{self.url}/{full}"}

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> str:
        folder = Path(tempfile.mkdtemp(dir=self._uploads.name))
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                self.messages.append(value["summary"])
            elif kind == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            else:
                content = self._objects[value["oid"]]
                assert kind == "lfsFile"
                assert (hashlib.sha256(content).hexdigest(), len(content)) == (value["oid"], value["size"])
                (folder / value["path"]).write_bytes(content)
        return self.add(name, folder, branch)

    def close(self) -> None:
        self._uploads.cleanup()
        self._server.shutdown()
        self._server.server_close()
