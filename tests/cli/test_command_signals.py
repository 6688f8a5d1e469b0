"""SIGINT and SIGTERM at any moment of the commands: one line, status 130, nothing half written."""

from __future__ import annotations

import random
import shutil
import signal

import pytest

import vit
from vit.data.preprocess import Preprocessing
from vit.inference.bundle import write_bundle
from vit.inference.description import Description
from vit.model import VisionTransformer

COMMANDS = {
    "classify": ("vit", ["classify", "model", "photos", "--output", "out.csv", "--backend", "torch"]),
    "export onnx": ("vit", ["export", "model", "out.onnx"]),
    "export bundle": ("vit", ["export", "model", "out"]),
    "explain": ("vit", ["explain", "model", "photos", "--output", "out"]),
    "eval": ("eval", ["checkpoint=digits", "data=digits", "data.max_images=60", "output=out", "device=cpu"]),
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A bundle for the data set digits, with random weights."""
    model = VisionTransformer(
        image_size=8, patch_size=2, in_channels=1, num_classes=10, width=16, depth=1, heads=1
    ).eval()
    preprocessing = Preprocessing(image_size=(8, 8), channels=1, mean=(0.5,), std=(0.5,))
    folder = tmp_path_factory.mktemp("digits") / "bundle"
    write_bundle(folder, model, Description(model.architecture, list("0123456789"), preprocessing), onnx=False)
    return folder


def interrupt(name, moments, forked, digits, small_bundle, photographs, place):
    """Run a command to its end, then with a signal at each of these moments (signal, fraction of its time)."""
    program, arguments = COMMANDS[name]
    shutil.copytree(small_bundle, place / "model")
    shutil.copytree(digits, place / "digits")
    shutil.copytree(photographs[0].parent, place / "photos")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    whole = forked(*arguments, program=program, folder=place)
    assert whole["status"] == 0, whole["err"]
    stopped = 0
    for number, fraction in moments:
        for out in list(place.glob("out*")):
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        part = forked(*arguments, program=program, folder=place, number=number, after=fraction * whole["seconds"])
        said = f"{name}: {number!r} after {fraction:.3f}: {part['status']} {part['err']}"
        assert part["status"] in (0, 130), said
        if part["status"] == 130:
            stopped += 1
            last = {"vit": "vit: interrupted", "eval": "interrupted"}[program]
            assert part["err"].splitlines()[-1] == last, said
            assert "Traceback" not in part["err"], said
            assert part["err"].count("interrupted") == 1, said
        found = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        assert before.items() <= found.items(), said
        assert not [path for path in place.rglob("*") if path.name.endswith(".part")], said
        if (place / "out.onnx").exists():  # then it is whole
            vit.load(place / "out.onnx", device="cpu").ready()
    return stopped


@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_leaves_nothing_half_written(name, forked, digits, small_bundle, photographs, tmp_path):
    moments = [(signal.SIGTERM, 0.5), (signal.SIGINT, 0.85)]
    assert interrupt(name, moments, forked, digits, small_bundle, photographs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_thirty_signals_leave_nothing_half_written(name, forked, digits, small_bundle, photographs, tmp_path):
    draw = random.Random(name)
    moments = [(draw.choice((signal.SIGINT, signal.SIGTERM)), draw.uniform(0.02, 1)) for _ in range(30)]
    assert interrupt(name, moments, forked, digits, small_bundle, photographs, tmp_path) > 10
