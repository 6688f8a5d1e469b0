"""`python eval.py`, as a person types it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vit.training.eval_app import eval_main

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def here(digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one run in it."""
    shutil.copytree(digits_run, tmp_path / "runs" / "digits" / "one")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, REPOSITORY / "eval.py", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_one_command(here: Path):
    done = command("checkpoint=runs/digits/one")
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout
    assert "written to runs/digits/one/evaluation" in done.stdout
    metrics = json.loads((here / "runs/digits/one/evaluation/metrics.json").read_text())
    assert {"top1", "top5", "loss", "ece", "per_class"} <= metrics["test"].keys()
    assert sorted(path.name for path in here.iterdir()) == ["runs"]


def test_a_mistake_is_one_line_and_a_traceback_only_when_asked_for(here: Path):
    done = command("checkpoint=runs/digits/two")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [done.stderr.strip()]
    assert "did you mean 'runs/digits/one'" in done.stderr
    assert done.stdout == ""
    asked = command("checkpoint=runs/digits/two", HYDRA_FULL_ERROR="1")
    assert asked.returncode == 2
    assert "Traceback" in asked.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint is missing: vit eval checkpoint=MODEL, a run folder"),
        ([], "the newest run here is runs/digits/one"),
        (["checkpoint="], "checkpoint is missing"),
        (["chekpoint=runs/digits/one"], "did you mean 'checkpoint'?"),
        (["checkpoint=runs/digits/one", "split=tets"], "split: expected one of train, val, test"),
        (["checkpoint=runs/digits/one", "data=fashion_mnst"], "did you mean 'fashion_mnist'"),
        (["checkpoint=runs/digits/one", "data.rot=x"], "did you mean 'data.root'"),
        (["checkpoint=runs/digits/one", "batch_size=0"], "batch_size: expected a whole number of at least 1"),
        (["checkpoint=runs/digits/one", "data=folder"], "data.root"),
        (["checkpoint=runs/digits/one", "data=folder", "data.root=nowhere"], "nowhere"),
        (["checkpoint=runs/digits/one", "data=shapes"], "the model does not know 'circle'"),
        (["checkpoint=runs/digits/one", "data.test_fraction=0"], "data=digits has no test images; split=train has"),
        (["checkpoint=empty"], "no model at empty"),
    ],
)
def test_mistakes_in_the_call(here: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert eval_main(arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert not (here / "runs/digits/one/evaluation").exists()


def test_options_reach_the_evaluation(here: Path, capfd: pytest.CaptureFixture[str]):
    model = "runs/digits/one/checkpoints/best.ckpt"
    assert eval_main([f"checkpoint={model}", "split=val", "batch_size=11", "output=out", "device=cpu"]) == 0
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics["val"]["images"] == 180
    assert metrics["model"] == model
    assert "180 val images of digits" in capfd.readouterr().out


def test_a_data_set_chosen_by_name(here: Path, capfd: pytest.CaptureFixture[str]):
    assert eval_main(["checkpoint=runs/digits/one", "data=digits", "data.max_images=50"]) == 0
    metrics = json.loads(Path("runs/digits/one/evaluation/metrics.json").read_text())
    assert metrics["test"]["images"] == 50
    assert metrics["at_training"] is None


def test_help_says_what_can_be_typed(capfd: pytest.CaptureFixture[str]):
    assert eval_main(["--help"]) == 0
    text = capfd.readouterr().out
    for word in ("checkpoint", "split", "data", "output", "batch_size", "device"):
        assert f"\n{word} " in text
    for name in (path.stem for path in (REPOSITORY / "conf" / "data").glob("*.yaml")):
        assert name in text
