"""Composing configurations as the command line does, in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import hydra
import pytest

from vit.training.app import CONF, resolve_config, train_main


@pytest.fixture
def compose():
    """`compose("data=cifar10")` gives the plain nested values that these overrides come to."""

    def run(*overrides: str, config_name: str = "train"):
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return resolve_config(hydra.compose(config_name, list(overrides)))

    return run


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """The one line that `python train.py ...` refuses its arguments with, in this process."""
    place = tmp_path / "empty"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*arguments: str) -> str:
        status = train_main(list(arguments))
        captured = capsys.readouterr()
        assert status == 2, captured.err
        assert captured.out == ""
        assert captured.err.endswith("\n")
        assert captured.err.count("\n") == 1, captured.err
        assert "Traceback" not in captured.err
        assert "HYDRA_FULL_ERROR" not in os.environ
        assert list(place.iterdir()) == []  # a mistake leaves nothing behind
        return captured.err[:-1]

    return run


@pytest.fixture
def script(tmp_path):
    """Run a script of the project in a process of its own, in a folder of its own."""

    def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
        return subprocess.run(
            [sys.executable, str(CONF.parent / name), *arguments],
            cwd=tmp_path,
            env={**env, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
