"""TAB in a real shell: it is sent the keys a person types, and shows what it made of them."""

from __future__ import annotations

import os
import re
import select
import shutil
import sys
import time
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
BIN = Path(sys.executable).parent
REGISTER = {
    "bash": 'eval "$(register-python-argcomplete vit)"',
    "zsh": 'autoload -U compinit; compinit -u; eval "$(register-python-argcomplete vit)"',
    "fish": "register-python-argcomplete --shell fish vit | source",
}
START = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"], "fish": ["fish", "--no-config"]}


class Shell:
    """An interactive shell on a terminal of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PS1": "> ", "TERM": "dumb"}
            os.execvpe(START[name][0], START[name], {**environment, "HOME": str(folder), "COLUMNS": "200"})
        self.type(REGISTER[name] + "; echo rea''dy\n")
        self.read_until("ready")

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def read_until(self, pattern: str, seconds: float = 120) -> str:
        """What the shell writes until `pattern` is in it."""
        text, end = "", time.monotonic() + seconds
        while not re.search(pattern, text):
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {text!r}"
            if select.select([self.terminal], [], [], left)[0]:
                text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(self.terminal, 65536).decode(errors="replace"))
        return text

    def clear(self) -> None:
        self.type("\x15")  # Ctrl-U

    def close(self) -> None:
        os.kill(self.process, 9)
        os.waitpid(self.process, 0)
        os.close(self.terminal)


@pytest.mark.parametrize("name", START)
def test_tab_completes_a_command(name, tmp_path):
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    (tmp_path / "photos").mkdir()
    shell = Shell(name, tmp_path)
    try:
        for typed, completed in [
            ("vit class", "vit classify "),
            ("vit train fashion_m", "vit train fashion_mnist"),
            ("vit train optim=ad", "optim=adamw"),
            ("vit train seed=1 model.patch_s", r"model\.patch_size="),
            ("vit eval x faithfulness=t", "faithfulness=true"),
        ]:
            shell.type(typed + "\t")
            shell.read_until(completed)
            shell.clear()
        if name == "bash":
            shell.type("vit train pho\t")  # what is no name of the catalogue: a folder
            shell.read_until("photos/")
    finally:
        shell.close()
