"""The main path where POSIX's own calls are missing: they are taken away from a process that trains and classifies."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PROGRAM = """
import sys

# the libraries have their own ways on each system: they are loaded whole, and Lightning keeps four signals more
import datetime, multiprocessing, platform, subprocess, tempfile, hydra, lightning.pytorch, matplotlib.pyplot, onnx
import onnxruntime, rich.progress, sklearn.datasets, tensorboard, torch, torch.utils.tensorboard, torchmetrics
import torchvision, timm, torch.onnx

import os, signal

for module, names in {
    os: "pwrite pread sched_getaffinity sysconf getuid geteuid getgid getpgid killpg setsid fork forkpty nice "
    "mkfifo getloadavg uname chown fchmod fchown link readlink posix_fallocate sendfile register_at_fork",
    signal: "pthread_sigmask SIGPIPE SIGHUP SIGQUIT SIGALRM SIGCHLD SIGCONT SIGTSTP "
    "setitimer alarm pause sigwait siginterrupt set_wakeup_fd",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "pwd", "grp", "termios", "resource", "posix", "tty", "pty"):
    sys.modules[name] = None

from vit.cli import main

status = main(["train", "photos", "debug=fast", "data.cache=true", "data.cache_folder=cache", "data.image_size=16",
    "data.workers=0", "trainer=cpu", "run.root=runs", "augment=crop", "model.patch_size=8"])
assert status == 0, status
(run,) = os.scandir(os.path.join("runs", "debug"))
for backend in ("onnx", "torch"):
    status = main(["classify", run.path, "photos", "--output", backend + ".csv", "--backend", backend])
    assert status == 0, status
assert main(["eval", run.path, "device=cpu"]) == 0
"""


def test_training_and_classification_need_nothing_of_posix(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 128, (24, 30, 3), np.uint8) + 120 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{number}.png")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("onnx", "torch")]
    assert [len(each) for each in rows] == [20, 20]
    assert [row["label"] for row in rows[0]] == [row["label"] for row in rows[1]]
    assert any((tmp_path / "cache").rglob("pixels"))
