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
        timeout=300,
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
        [sys.executable, "-c", "import vit; vit.nothing"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert "module 'vit' has no attribute 'nothing'" in done.stderr


def modules_of(*arguments: object) -> set[str]:
    """All modules in memory after a command, by their full names."""
    tail = "\nprint('MODULES', *sys.modules, file=sys.stderr)"
    # a measured run would load the tool that measures
    plain = {key: value for key, value in ENVIRONMENT.items() if not key.startswith("COV")}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{COMMAND}{tail}", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=plain,
        check=True,
        timeout=300,
    )
    return set(done.stderr.split("MODULES ")[-1].split())


def test_one_photograph_loads_nothing_that_it_does_not_need(small_bundle, photographs):
    """Neither what opens data sets, nor Pillow's rarer readers, nor the package that writes ONNX files."""
    for source in (photographs[0], photographs[0].parent):
        names = modules_of("classify", small_bundle, source, "--device", "cpu")
        ours = {name for name in names if name.startswith("vit.")}
        assert ours <= {
            *("vit.cli", "vit.cli.classify", "vit.cli.output", "vit.cli.parser", "vit.data", "vit.data.decode"),
            *("vit.data.filetype", "vit.data.walk"),
            *("vit.data.preprocess", "vit.errors", "vit.files", "vit.inference", "vit.inference.bundle"),
            *("vit.inference.classifier", "vit.inference.description", "vit.inference.loading"),
            *(
                "vit.inference.onnx_backend",
                "vit.inference.onnx_file",
                "vit.processors",
                "vit.signals",
                "vit.checksums",
            ),
            *("vit.inference.sources", "vit.map_methods"),
        }
        assert "PIL.JpegImagePlugin" in names
        assert "PIL.TiffImagePlugin" not in names
        assert not names & {"PIL.PdfImagePlugin", "difflib", "hashlib", "sqlite3", "asyncio", "multiprocessing"}


def test_what_describes_a_model_is_read_without_pillow(small_bundle):
    """So that Pillow is loaded by a thread, while the session is built."""
    code = "from vit.inference.bundle import read_bundle; read_bundle(sys.argv[1])\nimport vit.inference.loading"
    assert "PIL" not in imported(code, small_bundle)


def test_numpy_starts_no_threads(small_bundle, photographs):
    """OpenBLAS's, which cost more than the rest of NumPy's start-up; unless somebody asks for them."""
    code = f"{COMMAND}\nimport os\nprint('MODULES', os.environ['OPENBLAS_NUM_THREADS'], file=sys.stderr)"
    for wanted, given in (("1", {}), ("3", {"OPENBLAS_NUM_THREADS": "3"})):
        plain = {key: value for key, value in ENVIRONMENT.items() if key != "OPENBLAS_NUM_THREADS"}
        done = subprocess.run(
            [sys.executable, "-c", f"import sys\n{code}", "classify", small_bundle, photographs[0]],
            capture_output=True,
            text=True,
            env={**plain, **given},
            check=True,
            timeout=300,
        )
        assert done.stderr.split("MODULES ")[-1].strip() == wanted


def test_the_process_leaves_with_everything_written(small_bundle, photographs, tmp_path):
    """It ends at once; what others have registered for the end is still done, and the status is the command's."""
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'registered')\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"}

    def vit(*arguments):
        command = [sys.executable, "-m", "vit", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    done = vit("classify", small_bundle, photographs[0], "--format", "csv")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "registered"
    assert done.stdout.count("\n") == 3
    assert (vit("--version").returncode, vit("nothing").returncode) == (0, 2)
    assert vit("classify", small_bundle, photographs[0], tmp_path / "none.jpg").returncode == 1
