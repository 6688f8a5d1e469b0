"""A real `tensorboard` process to ask.  Loaded by tests by its place."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from vit.dashboard.format import PLUGIN

PREFIX = f"/data/plugin/{PLUGIN}"


class Server:
    """A real `tensorboard` process."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
        command += ["--host", "127.0.0.1", "--reload_interval", "1", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.said: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r" at (http://\S+?)/? ", line):
                self.url = found[1]
                return
        raise AssertionError("".join(self.said))

    def get(self, route: str, **query: Any) -> Any:
        status, _, body = self.open(f"{PREFIX}{route}", **query)
        assert status == 200, body
        return json.loads(body)

    def open(self, path: str, headers: dict[str, str] | None = None, **query: Any) -> tuple[int, Any, bytes]:
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=30) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def wait(self, ready: Any) -> Any:
        """The contents of /runs, once `ready` says so of it."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found = {run["run"]: run for run in self.get("/runs")["runs"]}
            if ready(found):
                return found
            time.sleep(0.2)
        raise AssertionError("".join(self.said))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
