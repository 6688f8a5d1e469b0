"""The wheel has all that the checkout has, and works where there is no checkout; so does one built from the sdist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys, setuptools.build_meta as backend; getattr(backend, 'build_' + sys.argv[1])(sys.argv[2])"


def build(folder: Path, dist: Path) -> None:
    """Write the sdist and the wheel of a project's folder, as pip has them built."""
    for kind in ("sdist", "wheel"):
        command = [sys.executable, "-c", BUILD, kind, str(dist)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, built from a copy: building leaves folders behind."""
    place = tmp_path_factory.mktemp("dist")
    source = place / "source"
    for name in ("vit", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build(source, place)
    return place


def names(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_has_all_that_the_checkout_has(dist):
    (wheel,) = dist.glob("*.whl")
    there = {path for name in ("vit", "conf") for path in (ROOT / name).rglob("*") if path.is_file()}
    there = {path for path in there if "__pycache__" not in path.parts}
    expected = {path.relative_to(ROOT).as_posix() for path in there}
    assert names(wheel) == {name if name.startswith("vit/") else f"vit/{name}" for name in expected}
    assert "vit/py.typed" in names(wheel)


def test_the_wheel_says_what_the_project_says(dist):
    import vit

    (wheel,) = dist.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(about).decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert (metadata["Name"], metadata["Version"]) == (project["name"], vit.__version__)
    assert "version" in project["dynamic"]
    entries = archive.read(about.replace("METADATA", "entry_points.txt")).decode()
    assert "vit = vit.cli:command" in entries
    assert "vit_attention = vit.dashboard.plugin:Loader" in entries


def test_the_sdist_gives_the_same_wheel(dist, tmp_path):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    build(source, tmp_path)
    (again,), (wheel,) = tmp_path.glob("*.whl"), dist.glob("*.whl")
    assert names(again) == names(wheel)


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(dist, tmp_path):
    """In an environment that shares the libraries of this one, but not the project."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=False, symlinks=os.name != "nt")
    bin = place / ("Scripts" if os.name == "nt" else "bin")
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(bin / "python"), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, timeout=300)
    (site,) = {path.parent for path in place.rglob("vit") if (path / "py.typed").is_file()}
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # the .pth files of those folders, one of which names the checkout, are not read
    (site / "libraries.pth").write_text("\n".join(libraries))
    program = [sys.executable, str(Path(__file__).with_name("installed.py")), str(bin / "python")]
    done = subprocess.run(
        [*program, str(tmp_path / "new"), "trainer.max_epochs=2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout
