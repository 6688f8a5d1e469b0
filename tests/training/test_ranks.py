"""Two processes on the CPU: signals to one or all of them, one that is killed or fails, and torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = ["model.size=null", "model.width=16", "model.depth=1", "model.heads=1", "data.max_images=200"]
TINY += ["data.batch_size=64", "data.eval_batch_size=16", "logging=none", "export.onnx=false", "trainer.threads=1"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
LIMIT = 240
slow = pytest.mark.slow

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="groups of processes, /proc")


def started(mark):
    """The processes that have `mark` for VIT_TEST_RUN in their environment, as those have that torchrun starts."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"VIT_TEST_RUN={mark}\0".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


@pytest.fixture
def two(tmp_path):
    """Run two processes: `two(moment, *overrides)` gives the status, what was printed and said, and the run folder.

    `moment` is that of `moments/sitecustomize.py`.  No process may be left.
    """

    def run(moment, *overrides, start=()):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "VIT_TEST_MOMENT": json.dumps(moment)}
        environment["VIT_TEST_RUN"] = str(tmp_path)
        environment["PYTHONPATH"] = str(Path(__file__).with_name("moments"))
        command = [
            sys.executable,
            *start,
            str(ROOT / "train.py"),
            "trainer=ddp_cpu",
            *TINY,
            f"run.root={tmp_path}/runs",
        ]
        process = subprocess.Popen(
            [*command, "trainer.max_epochs=200", *overrides],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            # both pipes end when the last process that writes to them has ended
            out, err = process.communicate(timeout=LIMIT)
            deadline = time.monotonic() + 10
            while (left := started(tmp_path)) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            for number in started(tmp_path):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        assert not left, err
        (folder,) = (tmp_path / "runs" / "digits").iterdir()
        assert not list(folder.rglob("*.part"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
        return process.returncode, out, err, folder

    return run


def steps(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


STEP, VALIDATION, LATER = ("training_step", 2), ("validation_step", 3), ("validation_step", 6)  # of 3 an epoch


@pytest.mark.parametrize(
    ("moment", "rank", "whom"),
    [
        (STEP, 1, "leader"),
        pytest.param(STEP, 0, "all", marks=slow),
        pytest.param(STEP, 1, "self", marks=slow),
        pytest.param(VALIDATION, 1, "leader", marks=slow),
        pytest.param(VALIDATION, 0, "all", marks=slow),
        pytest.param(VALIDATION, 1, "self", marks=slow),
    ],
)
def test_sigterm_to_any_process_ends_all_with_a_checkpoint(two, forked, moment, rank, whom):
    hook, step = moment
    status, out, err, folder = two({"hook": hook, "step": step, "rank": rank, "send": "SIGTERM", "whom": whom})
    assert status == 130, err
    assert "Traceback" not in err
    assert "gloo" not in err
    assert err.splitlines()[-1] == f"stopped at step {steps(folder)} by SIGTERM"
    assert steps(folder) >= step
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["interrupted"], metrics["steps"]) == (True, steps(folder))
    assert f"go on      python {ROOT / 'train.py'} resume={folder}\n" in out
    limit = f"trainer.max_steps={steps(folder) + 3}"
    rest = forked(f"resume={folder}", "trainer=cpu", "trainer.max_epochs=null", limit, "trainer.threads=1")
    assert rest["status"] == 0, rest["err"]
    assert steps(folder) == metrics["steps"] + 3


@pytest.mark.parametrize(
    ("moment", "rank", "send", "reason"),
    [
        (STEP, 1, "SIGKILL", "process 1 of 2 of this run is gone (killed by SIGKILL, as when memory is short)"),
        (LATER, 1, None, "process 1 of 2 of this run is gone (it ended with status 1: see train.log)"),
        pytest.param(VALIDATION, 1, "SIGKILL", "process 1 of 2 of this run is gone (killed by SIGKILL, ", marks=slow),
        pytest.param(LATER, 1, "SIGKILL", "process 1 of 2 of this run is gone (", marks=slow),
        pytest.param(STEP, 1, None, "process 1 of 2 of this run is gone (it ended with status 1", marks=slow),
    ],
)
def test_a_lost_process_is_named_in_one_line_and_how_to_go_on(two, moment, rank, send, reason):
    hook, step = moment
    what = {} if send is None else {"send": send, "whom": "self"}
    status, out, err, folder = two({"hook": hook, "step": step, "rank": rank, **what})
    assert status == 1, err
    assert out == ""
    assert "Traceback" not in err
    said = err[err.index("images held on the device") :].splitlines()[1:]
    assert len(said) == 1, err
    assert said[0].startswith(reason)
    learned = (folder / "checkpoints" / "last.ckpt").is_file()
    assert learned == (step > 3)
    way = (
        f"go on with python {ROOT / 'train.py'} resume={folder}"
        if learned
        else "nothing was learned yet: start it again"
    )
    assert said[0].endswith(f"): {way}")
    assert (send is None) == ("ValueError: a fault of process 1" in (folder / "train.log").read_text())


@slow
@pytest.mark.parametrize("send", ["SIGKILL", None])
def test_when_the_first_process_is_lost_the_other_ends(two, send):
    what = {} if send is None else {"send": send, "whom": "self"}
    status, _, err, _ = two({"hook": "training_step", "step": 4, "rank": 0, **what})
    assert status == (1 if send is None else -signal.SIGKILL)
    assert err.count("Traceback") == (send is None)  # its own fault, and nothing of the other process


def test_torchrun_starts_a_run_and_sigterm_to_one_process_ends_it(two):
    moment = {"hook": "training_step", "step": 6, "rank": 1, "send": "SIGTERM", "whom": "self"}
    status, out, err, folder = two(moment, start=TORCHRUN)
    assert (folder / "metrics.json").is_file(), err
    assert f"stopped at step {steps(folder)} by SIGTERM" in err
    assert f"resume={folder}\n" in out
    assert status != 0


@slow
def test_torchrun_trains_to_the_end(two):
    moment = {"hook": "training_step", "step": 100, "rank": 1}
    status, out, err, folder = two(moment, "trainer.max_epochs=null", "trainer.max_steps=6", start=TORCHRUN)
    assert status == 0, err
    assert "Traceback" not in err
    assert steps(folder) == 6
    assert "top-1" in out
