"""The commands where there is no user and no home: a container or a service under a bare user number."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ANOTHER = 12345
"""A user number without an entry in the list of users."""
TINY = ["trainer=cpu", "trainer.max_steps=2", "data.max_images=60", "model.size=null", "model.width=16"]
TINY += ["model.depth=1", "model.heads=1", "export.onnx=false", "logging.progress=false"]
WAYS = [(["unshare", "-U", f"--map-user={ANOTHER}"], {}), ([], {"user": ANOTHER, "group": ANOTHER, "extra_groups": []})]


@pytest.fixture
def place():
    """An empty folder that anybody may write to."""
    folder = Path(tempfile.mkdtemp(prefix="vit-place-"))
    folder.chmod(0o777)
    yield folder
    if (folder / "home").is_dir():
        (folder / "home").chmod(0o777)
    shutil.rmtree(folder)


@pytest.fixture
def command(place):
    """Run Python as a bare user in `place`: `command(home, *arguments)`, without HOME where `home` is None."""
    gone = ("HOME", "USER", "LOGNAME", "MPLCONFIGDIR", "ORT_DISABLE_TELEMETRY")
    plain = {key: value for key, value in os.environ.items() if key not in gone and not key.startswith("XDG_")}
    plain |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(way, home, *arguments):
        environment = plain if home is None else {**plain, "HOME": str(home)}
        return subprocess.run(
            [*way[0], sys.executable, *arguments],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            **way[1],
        )

    def works(way):
        try:
            result = run(way, None, "-c", "import os, vit; print(os.path.expanduser('~'), os.getuid())")
        except OSError:  # no such program, or only root may
            return False
        return result.stdout == f"~ {ANOTHER}\n"

    way = next((way for way in WAYS if works(way)), None)
    if way is None:
        pytest.skip("no process can be started here as another user that may read this checkout")
    return lambda home, *arguments: run(way, home, *arguments)


def home_of(kind, place):
    """A HOME of this kind, for the bare user."""
    if kind in ("read-only", "missing"):
        (place / "home").mkdir(mode=0o555)
    homes = {"none": None, "read-only": place / "home", "missing": place / "home" / "gone", "a file": "/dev/null"}
    return homes[kind]


def check(result, expected=()):
    """The command went well, and said no more on standard error than lines that begin so."""
    assert result.returncode == 0, result.stderr
    odd = [line for line in result.stderr.splitlines() if not line.startswith(tuple(expected))]
    assert not odd, result.stderr


TRAINING = ("digits: ", "torch computes with", "run folder: ", "60 images held")


@pytest.mark.parametrize(
    "kind", ["none", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("read-only", "missing", "a file"))]
)
def test_training_and_evaluation_need_no_home(command, place, kind):
    home = home_of(kind, place)
    check(command(home, str(ROOT / "train.py"), *TINY, "run.root=runs"), TRAINING)
    (run,) = (place / "runs" / "digits").iterdir()
    check(command(home, str(ROOT / "eval.py"), f"checkpoint={run}"))
    assert (run / "evaluation" / "confusion.png").is_file()
    assert {path.name for path in place.iterdir()} <= {"runs", "home"}
    assert not (place / "home").exists() or not list((place / "home").iterdir())


@pytest.mark.parametrize("kind", ["none", "read-only", pytest.param("a file", marks=pytest.mark.slow)])
def test_classifying_and_exporting_need_no_home(command, place, small_bundle, photographs, kind):
    home = home_of(kind, place)
    shutil.copytree(small_bundle, place / "model")
    shutil.copy(photographs[0], place / "a.jpg")
    for path in place.rglob("*"):
        path.chmod(0o777 if path.is_dir() and path.name != "home" else path.stat().st_mode | 0o444)
    check(command(home, "-m", "vit", "classify", "model", "a.jpg", "--output", "rows.csv"))
    check(command(home, "-m", "vit", "export", "model", "out.onnx"))
    result = command(home, "-m", "vit", "classify", "out.onnx", "a.jpg", "--format", "csv")
    check(result)
    assert result.stdout == (place / "rows.csv").read_text()
    assert {path.name for path in place.iterdir()} - {"home"} == {"model", "a.jpg", "rows.csv", "out.onnx"}
    assert not (place / "home").exists() or not list((place / "home").iterdir())
