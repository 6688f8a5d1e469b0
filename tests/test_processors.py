"""How many processors there are, how threads wait for each other, and how many of them a model gets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vit import processors
from vit.model import VisionTransformer
from vit.model.threads import same_threads, use_threads

ROOT = Path(__file__).parents[1]
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "max 100000"}, 12),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 12),
        ({}, 12),
    ],
)
def test_a_containers_quota_counts(files, expected, tmp_path, monkeypatch) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(processors, "_CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert processors.count_cpus.__wrapped__() == expected


@pytest.mark.parametrize("name", WAITING)
def test_what_the_user_says_about_waiting_holds(name, monkeypatch) -> None:
    for each in WAITING:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "1")
    processors.set_passive_waiting()
    assert [each for each in WAITING if each in os.environ] == [name]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP tells what it has read")
@pytest.mark.parametrize("said", [None, "ACTIVE"])
@pytest.mark.parametrize("program", ["train", "classify"])
def test_openmp_is_loaded_passive(program, said, small_bundle, photographs, tmp_path) -> None:
    plain = {key: value for key, value in os.environ.items() if key not in WAITING}
    given = {"OMP_WAIT_POLICY": said} if said else {}
    if program == "train":
        command = [ROOT / "train.py", "data=folder", f"data.root={tmp_path / 'absent'}"]
    else:
        command = ["-m", "vit", "classify", small_bundle, photographs[0], "--backend", "torch"]
    done = subprocess.run(
        [sys.executable, *command],
        env={**plain, **given, "OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == (2 if program == "train" else 0)
    assert f"OMP_WAIT_POLICY = '{said or 'PASSIVE'}'" in done.stderr
    assert ("GOMP_SPINCOUNT = '1000'" in done.stderr) == (said is None)


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("vit.model.threads.count_cpus", lambda: 2)
    torch.set_num_threads(2)


def architecture(**options):
    return VisionTransformer(num_classes=10, **options).architecture


def test_a_small_model_uses_one_thread(two_threads) -> None:
    digits = architecture(size="nano", image_size=16, patch_size=4, in_channels=1)
    larger = architecture(size="tiny", image_size=64, patch_size=8)
    with same_threads():
        assert use_threads(larger, 64) == 2
        assert use_threads(digits, 128) == 1
    assert torch.get_num_threads() == 2
    assert use_threads(digits, 4096) == 2  # the work of a batch counts


def test_what_the_user_says_about_threads_holds(two_threads, monkeypatch) -> None:
    digits = architecture(size="nano", image_size=16, patch_size=4, in_channels=1)
    assert use_threads(digits, 128, wanted=2) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert use_threads(digits, 128) == 2


def test_a_container_with_one_processor_gets_one_thread(two_threads, monkeypatch) -> None:
    monkeypatch.setattr("vit.model.threads.count_cpus", lambda: 1)
    assert use_threads(architecture(size="tiny", image_size=64, patch_size=8), 64) == 1
