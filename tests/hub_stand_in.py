"""The Hugging Face hub, as much of it as downloading takes, on this machine: a server of folders, commit by commit.

What `huggingface_hub` asks for: HEAD and GET of /ORG/NAME/resolve/REVISION/FILE, answered with the file, its ETag and
the commit, or with an error and its reason in X-Error-Code.
"""

from __future__ import annotations

import hashlib
import http.server
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class Hub:
    """`hub.add("org/name", folder)` publishes a folder as a new commit of main and returns the commit's hash.

    `hub.url` is the endpoint; `hub.requests` what was asked for so far, as "METHOD path"; `hub.gated` names of
    repositories that want a login.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}  # name -> revision -> folder
        self.commits: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                status, headers, body = hub.answer(unquote(self.path.partition("?")[0]))
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_GET = do_HEAD

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, folder: Path) -> str:
        commit = hashlib.sha1(f"{name} {folder} {len(self.commits)}".encode()).hexdigest()
        revisions = self.repositories.setdefault(name, {})
        for revision in ("main", commit):
            revisions[revision], self.commits[name, revision] = folder, commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
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

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
