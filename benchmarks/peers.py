"""python -m benchmarks peers: an environment with the tools that this project is measured against.

timm, transformers, torchvision, vit-pytorch, Lightning, and ONNX Runtime with NumPy and Pillow alone, from PyPI, in a
virtual environment of their own, so that no import of theirs is paid for or spared by what else is installed here.

Notable
- torch, torchvision and what they need of NVIDIA's are not downloaded again (4 GB) but linked, package by package, from
  the environment that runs this; everything else there stays out of sight.  So both sides run the same torch.
- NumPy, Pillow, timm, Lightning and ONNX Runtime come in the versions that this project runs with; compared are tools.
- An environment is complete or not there: it is built under another name.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

PACKAGES = (
    *("timm", "transformers", "vit-pytorch", "lightning", "torchvision", "torch", "onnxruntime", "numpy", "pillow"),
    "pandas",
)
"""What is installed; timm's inference.py writes its results with pandas."""

_SAME = ("torch", "torchvision", "timm", "lightning", "onnxruntime", "numpy", "pillow")
_LINKED = ("torch", "functorch", "torchgen", "torchvision", "torchvision.libs", "nvidia", "triton", "cuda")
_LINKED_METADATA = ("torch-", "torchvision-", "triton-", "nvidia_", "cuda_")


def main(arguments: list[str]) -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks peers", description=(__doc__ or "").split("\n\n")[1])
    add_option(options)
    options.add_argument("--again", action="store_true", help="build it anew where there is one")
    given = options.parse_args(arguments)
    if python(given.peers) is None or given.again:
        build(given.peers)
    print(f"{python(given.peers)}: {', '.join(f'{name} {number}' for name, number in versions(given.peers).items())}")
    return 0


def add_option(options: argparse.ArgumentParser) -> None:
    """The option that says where the environment is."""
    options.add_argument(
        "--peers",
        type=Path,
        default=_cache(),
        metavar="DIR",
        help="the peers' environment, and what all are given (%(default)s)",
    )


def python(folder: Path) -> Path | None:
    """The interpreter of the peers' environment in `folder`; None when there is none."""
    found = folder / "environment" / "bin/python"
    return found if found.exists() else None


def versions(folder: Path) -> dict[str, str]:
    """The versions of the peers in `folder`, those that are there; empty when there is no environment."""
    found = python(folder)
    if found is None:
        return {}
    code = (
        "import sys\nfrom importlib.metadata import PackageNotFoundError, version\nfor each in sys.argv[1:]:\n"
        " try: print(each, version(each))\n except PackageNotFoundError: pass"
    )
    done = subprocess.run([found, "-c", code, *PACKAGES], capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


def build(folder: Path) -> None:
    """Make the environment in `folder`, with this interpreter, from PyPI."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "environment"
    # a virtual environment holds its own path in few places, none of which is used here: it may be renamed
    part = Path(tempfile.mkdtemp(prefix=".environment.", dir=folder))
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", part], check=True)
        _link(part)
        wanted = [f"{name}=={metadata.version(name)}" if name in _SAME else name for name in PACKAGES]
        install = [sys.executable, "-m", "pip", "--python", part / "bin/python", "install", "--quiet"]
        subprocess.run([*install, *wanted], check=True)
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _link(environment: Path) -> None:
    """Links to torch and its parts, with their metadata, so that pip takes them for installed."""
    here = Path(str(metadata.distribution("torch").locate_file("")))
    (there,) = environment.glob("lib/python*/site-packages")
    for entry in here.iterdir():
        about = entry.suffix == ".dist-info" and entry.name.startswith(_LINKED_METADATA)
        if entry.name in _LINKED or about:
            (there / entry.name).symlink_to(entry)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit-benchmarks"
