"""Light entry points stay light: what is imported is read from `sys.modules` of a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
HEAVY = {"torch", "torchvision", "timm", "lightning", "hydra", "omegaconf", "scipy", "sklearn", "matplotlib", "onnx"}
HEAVY |= {"onnxscript", "tensorboard", "torchmetrics", "safetensors", "pandas", "pyarrow"}


def imported(code: str, *arguments: object) -> set[str]:
    """The top-level modules in memory after `code`."""
    tail = "\nprint('MODULES', *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}{tail}", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=True,
    )
    return set(done.stderr.split("MODULES ")[-1].split())


COMMAND = "from vit.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass"


def test_import_vit_imports_nothing():
    bare = imported("import importlib, typing")
    assert imported("import vit") - bare == {"vit"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["classify", "--help"], ["export", "--help"], ["info", "--help"], ["--version"]]
)
def test_help_imports_no_libraries(arguments):
    assert not imported(COMMAND, *arguments) & (HEAVY | {"numpy", "PIL", "rich", "onnxruntime"})


def test_classifying_through_onnx_imports_no_torch(small_bundle, photographs):
    for model in (small_bundle, small_bundle / "model.onnx"):
        names = imported(COMMAND, "classify", model, photographs[0].parent, "--format", "jsonl", "--device", "cpu")
        assert "onnxruntime" in names
        assert not names & (HEAVY | {"rich"})


def test_info_imports_no_torch(small_bundle):
    assert not imported(COMMAND, "info", small_bundle) & HEAVY


def test_the_torch_backend_imports_only_torch(small_bundle, photographs):
    names = imported(COMMAND, "classify", small_bundle, photographs[0], "--backend", "torch")
    assert "torch" in names
    assert not names & {"timm", "lightning", "hydra", "torchvision", "matplotlib", "sklearn", "onnxruntime"}


def test_every_public_name_is_there():
    code = "import vit\nfor name in vit.__all__:\n    assert getattr(vit, name) is not None and name in dir(vit)"
    assert "torch" in imported(code)
    done = subprocess.run(
        [sys.executable, "-c", "import vit; vit.nothing"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert "module 'vit' has no attribute 'nothing'" in done.stderr
