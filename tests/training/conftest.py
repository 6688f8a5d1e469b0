"""Small runs of the real thing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import hydra
import pytest

from vit.training.app import CONF, resolve_config
from vit.training.config import load_config
from vit.training.run import train

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "model.depth=2",
    "model.width=32",
    "model.heads=4",
    "data.batch_size=64",
    "augment=light",
    "export.onnx=false",
    "logging.tensorboard=false",
]


@pytest.fixture(scope="module")
def small() -> ModuleType:
    """The module `small_fit.py`, which is a program as well."""
    spec = importlib.util.spec_from_file_location("small_fit", Path(__file__).with_name("small_fit.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def compose(*overrides):
    """The checked configuration of a small run."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return load_config(resolve_config(hydra.compose("train", [*SMALL, *overrides])))


@pytest.fixture
def run(tmp_path):
    """Train in this process: `run("trainer.max_epochs=2")` gives a `RunResult`."""

    def start(*overrides):
        result = train(compose(f"run.root={tmp_path / 'runs'}", *overrides), list(overrides))
        assert result is not None
        return result

    return start


@pytest.fixture
def script(tmp_path):
    """Train in a process of its own: gives the started process."""

    def start(*overrides, **options):
        command = [sys.executable, str(ROOT / "train.py"), *SMALL, f"run.root={tmp_path / 'runs'}", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment |= options.pop("env", {})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **({"cwd": tmp_path} | pipes | options))

    return start
