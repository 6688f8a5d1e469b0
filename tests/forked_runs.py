"""Runs of the commands that start at once: everything is imported here, and each run is a fork of this process.

A program for tests that need many real processes and real signals: it reads a JSON object a line, `{"program",
"arguments", "signal", "after", "environment", "folder"}`, calls the main function of the program ("train", "eval" or
"vit") in a child in that folder, sends it `signal` when `after` seconds have passed since it began, and answers
`{"status", "out", "err", "seconds"}`.  A child that takes longer than LIMIT is killed, and its status is then "hangs".
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time
from typing import Any

LIMIT = 240.0


def child(request: dict[str, Any], began: int, out: Any, err: Any) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    from vit.cli import main
    from vit.training.app import train_main
    from vit.training.eval_app import eval_main

    program = {"train": train_main, "eval": eval_main, "vit": main}[request["program"]]
    status = 1
    try:
        os.write(began, b".")
        status = program(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        waits, began = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(request, began, out, err)
        os.read(waits, 1)
        os.close(waits)
        os.close(began)
        start = time.monotonic()
        handle = os.pidfd_open(pid)
        hangs = False
        if request.get("signal") and not select.select([handle], [], [], request["after"])[0]:
            os.kill(pid, request["signal"])
        if not select.select([handle], [], [], LIMIT)[0]:
            hangs = True
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(handle)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
        seconds = time.monotonic() - start
        return {"status": "hangs" if hangs else status, "out": texts[0], "err": texts[1], "seconds": seconds}


if __name__ == "__main__":
    import torch

    import vit.training.run  # noqa: F401  # so that the children need not

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
