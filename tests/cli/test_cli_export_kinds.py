"""`vit export` of every kind, as processes: what each file answers, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
NO_TORCH = "import sys; sys.modules['torch'] = None\nfrom vit.cli import main\nsys.exit(main(sys.argv[1:]))"


def vit(*arguments, cwd=None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=300)


def rows(*arguments) -> list[dict]:
    """What `vit classify` says, in a process that has no torch."""
    command = [sys.executable, "-c", NO_TORCH, "classify", *map(str, arguments), "--format", "jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def many(tmp_path_factory, photographs) -> list[Path]:
    """The photographs, and as many again on their heads: enough to fit integers to half of them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("many")
    for path in photographs:
        Image.open(path).save(folder / path.name)
        Image.open(path).rotate(180).save(folder / f"turned_{path.name}")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def exported(small_bundle, many, tmp_path_factory) -> Path:
    """A folder with the model in every form, and what was printed."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "run").mkdir()
    calls = {
        "plain.onnx": (),
        "rollout.onnx": ("--with-rollout",),
        "int8.onnx": ("--int8", "--with-rollout", "--calibration", many[0].parent),
        "run/model": ("--calibration", *many),
    }
    for name, options in calls.items():
        done = vit("export", small_bundle, folder / name, *options)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        (folder / f"{name.replace('/', '_')}.txt").write_text(done.stdout)
    return folder


def test_every_form_gives_the_same_rows_without_torch(exported, small_bundle, photographs):
    wanted = rows(small_bundle, *photographs)
    assert len(wanted) == len(photographs)
    for name in ("plain.onnx", "rollout.onnx", "run", "run/model"):
        for row, want in zip(rows(exported / name, *photographs), wanted, strict=True):
            assert (row["label"], row["index"]) == (want["label"], want["index"])
            theirs = {each["index"]: each["probability"] for each in row["top"]}
            for each in want["top"]:
                assert theirs[each["index"]] == pytest.approx(each["probability"], abs=1e-4)
    same = [
        row["label"] == want["label"]
        for row, want in zip(rows(exported / "int8.onnx", *photographs), wanted, strict=True)
    ]
    assert np.mean(same) >= 0.9


def test_it_says_what_it_was_compared_on_and_what_integers_cost(exported):
    assert "compared with torch on noise, as there are no real images" in (exported / "plain.onnx.txt").read_text()
    assert "compared with torch on 8 images (the images that were named)" in (exported / "run_model.txt").read_text()
    told = (exported / "int8.onnx.txt").read_text()
    assert "fitted to 12 images (the images that were named), measured on 12 images" in told
    shown = vit("info", exported / "int8.onnx").stdout
    figures = json.loads(vit("info", exported / "int8.onnx", "--format", "json").stdout)["metrics"]["int8"]
    assert f"the same class as in float32: {figures['agreement']:.1%}" in told
    assert f"rollout shared with float32: {figures['rollout_overlap']:.1%}" in told
    assert "top1" not in figures  # nobody said what the images show
    assert f"int8.agreement          {figures['agreement']:.6g}".split() in [
        line.split() for line in shown.splitlines()
    ]
    assert "photographs" not in json.dumps(figures)  # where the images lay is nobody's business


def test_a_program_is_written_and_is_no_model(small_bundle, tmp_path):
    done = vit("export", small_bundle, "x.pt2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "wrote x.pt2"
    for command in (["classify", "x.pt2", "y.jpg"], ["info", "x.pt2"], ["export", "x.pt2", "y.onnx"]):
        done = vit(*command, cwd=tmp_path)
        assert done.returncode == 2
        assert "x.pt2 is a program for torch.export.load, which vit does not run" in done.stderr
        assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["x.pt2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("folder", "--int8"), "--int8 is for an ONNX file"),
        (("x.pt2", "--int8"), "--int8 is for an ONNX file"),
        (("folder", "--with-rollout"), "expected a name ending in .onnx or .pt2"),
        (("taken.pt2",), "it is a folder"),
        (("taken.pt2/file/x.onnx",), "cannot write"),
        (("x.onnx", "--int8"), "integers are fitted to real images: name some with --calibration"),
        (("x.onnx", "--int8", "--calibration", "nothing*.jpg"), "no input: nothing*.jpg: no file matches"),
        (("x.onnx", "--calibration", "taken.pt2/file"), "none of the 1 images for calibration can be used"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(small_bundle, tmp_path, arguments, message):
    (tmp_path / "taken.pt2").mkdir()
    (tmp_path / "taken.pt2" / "file").write_text("mine")
    done = vit("export", small_bundle, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["taken.pt2"]
    assert os.listdir(tmp_path / "taken.pt2") == ["file"]


def test_too_few_images_for_integers(small_bundle, photographs, tmp_path):
    done = vit("export", small_bundle, tmp_path / "x.onnx", "--int8", "--calibration", *photographs)
    assert done.returncode == 2
    assert "at least 8 images each, not 6 and 6" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_foreign_onnx_file_is_no_model_to_export(exported, tmp_path):
    import onnx

    message = onnx.load(exported / "plain.onnx")
    del message.metadata_props[:]
    onnx.save(message, tmp_path / "foreign.onnx")
    done = vit("export", tmp_path / "foreign.onnx", tmp_path / "x.onnx", "--int8")
    assert done.returncode == 2
    assert "does not describe its classes and preprocessing" in done.stderr
    assert os.listdir(tmp_path) == ["foreign.onnx"]
