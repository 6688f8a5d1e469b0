"""`--multirun`: a process for each job, failures that stop nobody, one table at the end."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit.training import sweep
from vit.training.app import CONF

# a stand-in for training that takes no time and fails as it is told
STUB = """
import sys, time
from dataclasses import dataclass, field
from vit.errors import VitError
from vit.training.app import launch
from vit.training.config import Config, load_config

@dataclass
class Result:
    folder: str
    metrics: dict = field(default_factory=dict)
    status: int = 0

def task(values, overrides):
    config = load_config(values)
    if config.seed == 13:
        raise VitError("seed=13 brings bad luck")
    if config.seed == 14:
        raise RuntimeError("a fault")
    if config.seed == 15:
        print("waiting", flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            return Result(f"runs/{config.seed}", {}, 130)
    top1 = config.optim.lr + config.seed
    return Result(f"runs/{config.seed}", {"test": {"top1": top1, "loss": 1.0}, "val": {"top1": top1}})

sys.exit(launch(task, "train", Config))
"""


@pytest.fixture
def stub(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)

    def start(*arguments):
        env = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
        return subprocess.Popen(
            [sys.executable, "stub.py", *arguments],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def finished(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def results(folder):
    (place,) = (folder / "runs" / "sweeps").iterdir()
    rows = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    table = list(csv.reader((place / "results.csv").read_text().splitlines()))
    return rows, table


def test_every_combination_and_a_table(stub, tmp_path):
    status, out, err = finished(stub("-m", "optim.lr=0.25,0.5", "seed=range(1,3)"))
    assert (status, err.count("job ")) == (0, 4)
    rows, table = results(tmp_path)
    assert [row["overrides"] for row in rows] == [
        [f"optim.lr={lr}", f"seed={seed}"] for lr in (0.25, 0.5) for seed in (1, 2)
    ]
    assert table[0] == ["job", "optim.lr", "seed", "test/top1", "test/loss", "val/top1", "run"]
    assert table[1] == ["0", "0.25", "1", "1.2500", "1.0000", "1.2500", "runs/1"]
    # 1.25 and 2.25: their mean, and their deviation as a sample
    assert table[5] == ["mean", "0.25", "all 2", "1.7500 ± 0.7071", "1.0000 ± 0.0000", "1.7500 ± 0.7071", ""]
    assert "4 of 4 jobs done" in out
    for row in table:
        assert row[0] in out
    assert {path.name for path in tmp_path.iterdir()} == {"stub.py", "runs"}  # and no multirun/, no outputs/


def test_a_job_that_fails_says_why_and_the_others_still_run(stub, tmp_path):
    status, out, err = finished(stub("-m", "seed=13,1"))
    assert status == 2
    assert err.splitlines() == ["job 0: seed=13", "seed=13 brings bad luck", "job 1: seed=1"]
    rows, table = results(tmp_path)
    assert [row["status"] for row in rows] == [2, 0]
    assert table[1][-1] == "failed: seed=13 brings bad luck"
    assert table[2][-1] == "runs/1"
    assert "1 of 2 jobs done" in out


def test_a_fault_is_status_1_and_does_not_stop_the_sweep(stub, tmp_path):
    status, _, err = finished(stub("-m", "seed=14,13,1"))
    assert status == 1
    assert "RuntimeError: a fault" in err
    assert [row["status"] for row in results(tmp_path)[0]] == [1, 2, 0]


def test_ctrl_c_ends_the_job_in_its_own_way_and_then_the_sweep(stub, tmp_path):
    process = stub("-m", "seed=1,15,2")
    assert process.stdout is not None
    while "waiting" not in process.stdout.readline():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group
    status, out, err = finished(process)
    assert status == 130
    assert "Traceback" not in err
    assert [row["status"] for row in results(tmp_path)[0]] == [0, 130]  # the third was never started
    assert "1 of 2 jobs done" in out


def test_results_follow_run_root(stub, tmp_path):
    place = tmp_path / "o'ther place"
    status, _, _ = finished(stub("-m", "seed=1,2", f"run.root='{str(place).replace(chr(39), chr(92) + chr(39))}'"))
    assert status == 0
    (folder,) = (place / "sweeps").iterdir()
    assert {path.name for path in folder.iterdir()} == {"results.jsonl", "results.csv", "multirun.yaml"}
    assert not (tmp_path / "runs").exists()


def test_choices_by_glob_and_values_that_are_lists(stub, tmp_path):
    status, _, _ = finished(stub("-m", "data=glob(*mnist)", "optim.betas=[0.9,0.95],[0.9,0.99]"))
    assert status == 0
    rows, _ = results(tmp_path)
    assert [row["overrides"] for row in rows] == [
        ["data=fashion_mnist", f"optim.betas=[0.9,{beta}]"] for beta in (0.95, 0.99)
    ]


def test_a_group_of_ones_own_reaches_every_job(stub, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\noptim:\n  lr: 0.125\n")
    status, _, _ = finished(stub("-m", "--config-dir", "own", "experiment=mine", "seed=1,2"))
    assert status == 0
    assert [row["metrics"]["test"]["top1"] for row in results(tmp_path)[0]] == [1.125, 2.125]


def test_the_mode_can_be_set_as_hydra_has_it(stub, tmp_path):
    status, _, _ = finished(stub("hydra.mode=MULTIRUN", "seed=1,2"))
    assert status == 0
    assert len(results(tmp_path)[0]) == 2


def test_outside_a_sweep_nothing_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JOB_RESULT", str(tmp_path / "result.json"))
    monkeypatch.setenv("VIT_RUN_FOLDER", "runs/x")  # a helper process of a distributed job
    sweep.write_job_result(None)
    assert not (tmp_path / "result.json").exists()
    monkeypatch.delenv("VIT_RUN_FOLDER")
    monkeypatch.setenv("LOCAL_RANK", "1")  # left over from a cluster
    sweep.write_job_result(None, "why")
    assert json.loads((tmp_path / "result.json").read_text()) == {"metrics": {}, "folder": None, "error": "why"}


def test_two_sweeps_of_one_second_have_a_table_each(stub, tmp_path):
    processes = [stub("-m", f"seed={seed},{seed + 1}", "hydra.sweep.dir=runs/sweeps/now") for seed in (1, 3, 5)]
    for process in processes:
        assert finished(process)[0] == 0
    folders = sorted((tmp_path / "runs" / "sweeps").iterdir())
    assert [folder.name for folder in folders] == ["now", "now_2", "now_3"]
    seeds = [
        [json.loads(line)["overrides"][0] for line in (folder / "results.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    assert sorted(seeds) == [[f"seed={seed}", f"seed={seed + 1}"] for seed in (1, 3, 5)]
    assert all((folder / "results.csv").is_file() for folder in folders)


def test_a_metric_that_is_not_there():
    assert sweep.read_metric({"val": {"top1": 0.5}}, "val/top1") == 0.5
    assert sweep.read_metric({"val": None}, "val/top1") is None
    assert sweep.read_metric({}, "val/top1") is None


@pytest.mark.slow
def test_distributed_jobs_in_a_sweep(tmp_path):
    """Two jobs of two processes each give what the same jobs give alone."""
    small = ["debug=tiny", "trainer.max_epochs=1", "logging=none", "export.onnx=false"]
    train = [sys.executable, str(CONF.parent / "train.py"), *small]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 600, "check": False}
    result = subprocess.run([*train, "-m", "trainer=ddp_cpu", "seed=0,1"], **run)
    assert result.returncode == 0, result.stderr
    rows, _ = results(tmp_path)
    assert len({row["folder"] for row in rows}) == 2
    alone = subprocess.run([*train, "trainer=cpu", "seed=1", "run.name=alone"], **run)
    assert alone.returncode == 0, alone.stderr
    (folder,) = (tmp_path / "runs" / "alone").iterdir()
    expected = json.loads((folder / "metrics.json").read_text())
    assert rows[1]["metrics"]["test"]["top1"] == pytest.approx(expected["test"]["top1"], abs=0.02)
    assert rows[1]["metrics"]["test"]["loss"] == pytest.approx(expected["test"]["loss"], abs=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert all(Path(tmp_path, row["folder"], "metrics.json").is_file() for row in rows)
