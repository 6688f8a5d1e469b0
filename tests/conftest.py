"""For all tests: a limit to their time, a process that is left as it was found, a small model, real images."""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

# One process a core: threads of their own would only wait for each other, and sums depend on how many there are.
# Read when the libraries are loaded, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# at a desk every run tries new examples; where a change is judged, it is judged by the same ones each time
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

SAMPLE = Path(os.environ.get("VIT_IMAGE_SAMPLE", Path(__file__).parents[2] / "shared/data/imagenet_sample"))

SLOW_SECONDS = 3600
"""The time limit of a test marked `slow`; that of all others is in pyproject.toml."""
_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_stderr] = os.dup(2)  # not yet captured, as it is while a test runs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the process, every thread's stack printed, when a test does not hear the signal of pytest-timeout.

    Compiled code that never returns to Python does not.  xdist starts another process for the tests that follow.
    """
    marker = item.get_closest_marker("timeout")
    limit = float(marker.args[0] if marker else item.config.getoption("timeout") or item.config.getini("timeout"))
    faulthandler.dump_traceback_later(limit + 60, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """Leave the process as it was found, and its random numbers at their start: tests run in any order."""
    torch = sys.modules.get("torch")
    logger = logging.getLogger("vit")
    environment, folder, arguments, path = dict(os.environ), os.getcwd(), sys.argv, list(sys.path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logging_of_vit = list(logger.handlers), logger.level, logger.propagate
    random.seed(0)
    np.random.seed(0)
    if torch is not None:
        threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        torch.manual_seed(0)
    yield
    if torch is not None:
        torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)
    logger.handlers[:], level, logger.propagate = logging_of_vit
    logger.setLevel(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.argv, sys.path[:] = arguments, path
    os.chdir(folder)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment.items() - os.environ.items())


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a model with random weights: 32 x 32 RGB, five classes, temperature 1.5.  Read only."""
    import torch

    from vit.data.preprocess import Preprocessing
    from vit.inference.bundle import write_bundle
    from vit.inference.description import Description
    from vit.model import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(image_size=32, patch_size=8, num_classes=5, size="nano", depth=2).eval()
        with torch.no_grad():
            model.head.weight.mul_(20)  # so that images differ in their answers
    description = Description(
        architecture=model.architecture,
        class_names=["cat", "dog", "größe", 'a, "b"', "x\ty"],
        preprocessing=Preprocessing(image_size=(32, 32)),
        temperature=1.5,
        data={"name": "folder", "root": "photos"},
        metrics={"test": {"top1": 0.9, "loss": 0.3}},
        training={"seed": 0},
    )
    folder = tmp_path_factory.mktemp("small") / "bundle"
    write_bundle(folder, model, description, onnx=True)
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve JPEG files of different sizes, smooth and distinct, sorted by name.  Read only."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for number in range(12):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40 + 7 * number, 90 - 5 * number), Image.Resampling.BICUBIC).save(folder / f"{number:02}.jpg")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def real_photographs() -> list[Path]:
    """JPEG photographs from a camera; the test is skipped where there are none (VIT_IMAGE_SAMPLE names the folder)."""
    files = sorted(SAMPLE.glob("*.JPEG")) if SAMPLE.is_dir() else []
    if not files:
        pytest.skip("no sample of photographs here (VIT_IMAGE_SAMPLE names a folder of *.JPEG)")
    return files


PUBLISHED = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A stand-in for the Hugging Face hub on this machine (`hub_stand_in.Hub`), for processes with `hub_environment`.

    It has timm's `PUBLISHED` with random weights, saved by timm itself, as `hub.commit` of main.
    """
    import timm
    import torch
    from timm.models import save_for_hf

    spec = importlib.util.spec_from_file_location("hub_stand_in", Path(__file__).with_name("hub_stand_in.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(PUBLISHED).eval()
        with torch.no_grad():
            model.head.weight.normal_()  # so that images differ in their answers
    folder = tmp_path_factory.mktemp("hub") / "published"
    save_for_hf(model, str(folder), safe_serialization=True)
    server = module.Hub()
    server.commit, server.folder = server.add(f"timm/{PUBLISHED}", folder), folder
    yield server
    server.close()


@pytest.fixture
def hub_environment(hub: Any, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that has `hub` for its hub and an empty cache of its own."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**plain, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def forked() -> Iterator[Callable[..., dict[str, Any]]]:
    """Run a program as a fork of a process that has imported everything: what `forked_runs.py` answers."""
    command = [sys.executable, str(Path(__file__).with_name("forked_runs.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdin is not None
    assert server.stdout is not None

    def start(
        *arguments: str,
        program: str = "train",
        number: int | None = None,
        after: float = 0.0,
        environment: dict[str, str] | None = None,
        folder: str | os.PathLike[str] = ".",
    ) -> dict[str, Any]:
        request = {"program": program, "arguments": arguments, "signal": number, "after": after}
        request |= {"environment": environment or {}, "folder": os.path.abspath(folder)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield start
    server.stdin.close()
    server.wait(60)
