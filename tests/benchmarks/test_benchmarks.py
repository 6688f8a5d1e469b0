"""The benchmarks run, at a size that takes seconds, and write down what they say they do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)


def test_names_are_listed() -> None:
    assert "recording" in call("--help").stdout
    wrong = call("recoding")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "recording" in wrong.stderr


def test_recording(tmp_path: Path) -> None:
    options = ["--sizes", "nano", "--image-size", "32", "--batch-size", "2", "--rounds", "3"]
    done = call("recording", *options, "--json", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| nano/16 at 32, batch 2 +\|.*%.*\|$", done.stdout, re.MULTILINE)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["machine"]["torch"]
    assert written["command"].startswith("python -m benchmarks recording --sizes nano")
    assert {name: len(each) for name, each in written["figures"]["nano"].items()} == dict.fromkeys(
        ("forward", "recorded", "rollout"), 3
    )


@pytest.mark.slow
def test_export(tmp_path: Path) -> None:
    small = ["--size", "nano", "--image-size", "32", "--batches", "1,2", "--rounds", "2", "--seconds", "10"]
    done = call("export", *small, "--json", str(tmp_path / "e.json"))
    assert done.returncode == 0, done.stderr
    for name in ("torch, float32", "ONNX, float32", "ONNX, with rollout", "ONNX, int8"):
        assert re.search(rf"^\| {name} +\| \d.*\|$", done.stdout, re.MULTILINE)
    figures = json.loads((tmp_path / "e.json").read_text())["figures"]
    assert {batch: {form: len(each) for form, each in own.items()} for batch, own in figures["speed"].items()} == (
        dict.fromkeys("12", dict.fromkeys(("torch", "onnx", "rollout", "int8"), 2))
    )
    accuracy = figures["accuracy"]
    assert (accuracy["images"], accuracy["data"]) == (359, "digits")
    assert accuracy["torch"][1] == 1
    assert accuracy["onnx"] == accuracy["torch"]
    assert accuracy["int8"][1] >= 0.9


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="Fashion-MNIST is not installed")
def test_reduction(tmp_path: Path) -> None:
    short = ["--minutes", "0.1", "--further", "0.05", "--rates", "0.5", "--budgets", "0.6", "--trials", "2"]
    small = ["--images", "64", "--batch-size", "4", "--rounds", "2"]
    small += ["--set", "model.depth=2", "--set", "data.max_images=600", "--keep", str(tmp_path / "runs")]
    done = call("reduction", *short, *small, "--json", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stderr
    models = json.loads((tmp_path / "r.json").read_text())["figures"]["models"]
    assert [(each["line"], each["trained"]) for each in models[:3]] == [
        ("none", True),
        ("keep:0.5", False),
        ("merge:0.5", False),
    ]
    assert all(each["flops"] < 1 and len(each["seconds"]) == 2 for each in models[1:])
    assert sum(each["trained"] for each in models) == 4  # none, what was searched, keep and merge
    written = json.loads((tmp_path / "r_int8.json").read_text())
    assert written["command"].startswith("python -m benchmarks reduction --minutes 0.1 ")
    files = written["figures"]
    assert set(files["top1"]) >= {"timm", "none, ONNX, float32", "none, ONNX, int8"}
    assert files["top1"]["timm"] == files["top1"]["none, ONNX, float32"]

    done = call("reduction", *short, *small, "--no-named", "--json", str(tmp_path / "s.json"))
    assert done.returncode == 0, done.stderr
    searched = json.loads((tmp_path / "s.json").read_text())["figures"]["models"]
    trained = [each["line"] for each in models if each["trained"]]
    assert [each["line"] for each in searched if each["trained"]] == trained[:2]


@pytest.mark.slow
def test_logging(tmp_path: Path) -> None:
    small = ["--set", "data.max_images=128", "--set", "trainer.max_epochs=3", "--set", "trainer.threads=1"]
    done = call("logging", "--cases", "digits", "--rounds", "1", *small, "--json", str(tmp_path / "l.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "l.json").read_text())["figures"]["digits"]
    (with_,), (without,) = figures["with"], figures["without"]
    assert with_["steps"] >= 2
    assert without["steps"] == 0
    assert 0 < with_["attention_seconds"] < with_["seconds"]


@pytest.mark.slow
def test_busy(tmp_path: Path) -> None:
    small = ["--beside", "0,1", "--rounds", "1", "--epochs", "1", "--photographs", "3"]
    done = call("busy", *small, "--json", str(tmp_path / "b.json"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| timm's model in a plain loop +\| \d.*%.*\|$", done.stdout, re.MULTILINE)
    figures = json.loads((tmp_path / "b.json").read_text())["figures"]
    assert figures.keys() == {"train", "timm", "classify"}
    assert all(figures[name][count][0] > 0 for name in figures for count in ("0", "1"))


def test_busy_programs_end_with_what_started_them() -> None:
    code = (
        "import os, subprocess, sys; from benchmarks.busy import BUSY\n"
        "subprocess.Popen([sys.executable, '-c', BUSY, str(os.getpid())])\n"
        "os._exit(0)"
    )
    # until nobody holds the pipe any more: neither the process nor what it started
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, timeout=120, check=True)


@pytest.mark.slow
def test_loaders_and_epochs(tmp_path: Path) -> None:
    small = ["--peers", str(tmp_path), "--photographs", "8", "--rounds", "2"]
    small += ["--least", "0.01", "--workers", "1", "--batch-size", "4"]
    contestants = {"vit_cached", "vit_streamed"}
    for name, starts in (("crops", 1), ("epoch", 3)):
        done = call(name, "--contestants", ",".join(contestants), *small, "--json", str(tmp_path / "f.json"))
        assert done.returncode == 0, done.stderr
        figures = json.loads((tmp_path / "f.json").read_text())["figures"]
        assert figures.keys() == contestants
        for each in figures.values():
            assert (each["images"], len(each["turns"])) == (8, 2 * starts)
            assert all(turn["seconds"] > 0 for turn in each["turns"])
            assert each["difference"] < 0.1
