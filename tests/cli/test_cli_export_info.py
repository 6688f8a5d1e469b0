"""`vit export` and `vit info`, as processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vit.inference.loading import load_torch

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def vit(*arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vit", *map(os.fsencode, arguments)],
        capture_output=True,
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        timeout=300,
    )


@pytest.fixture
def checkpoint(small_bundle, tmp_path) -> Path:
    model, description = load_torch(small_bundle, device="cpu")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "vit": {**description.to_dict(), "weights_prefix": "model."}}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_export_to_onnx_and_to_a_bundle(checkpoint, photographs, tmp_path):
    rows = []
    for output in ("x.onnx", "folder/bundle"):
        done = vit("export", checkpoint, output, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, b"")
        compared, wrote = done.stdout.decode().splitlines()
        # the data that it names is not here
        assert re.fullmatch(r"compared with torch on noise, as .*: they differ by \de-\d\d at most", compared)
        assert wrote == f"wrote {output}; try: vit classify {output} photo.jpg"
        answer = vit("classify", output, *photographs, "--format", "jsonl", cwd=tmp_path)
        assert answer.returncode == 0
        rows.append(answer.stdout)
    assert rows[0] == rows[1]
    assert sorted(os.listdir(tmp_path / "folder" / "bundle")) == [
        "README.md",
        "config.json",
        "model.onnx",
        "model.safetensors",
    ]


def test_a_bundle_may_be_written_over_itself(checkpoint, tmp_path):
    for source in (checkpoint, tmp_path / "bundle"):
        assert vit("export", source, tmp_path / "bundle").returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "bundle"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("photos", "holds other files"),
        ("photos/a.txt", "no .txt file is written here"),
        ("photos/a", "it is a file"),
        ("folder.onnx", "is a folder"),
        ("photos/a.txt/x.onnx", "cannot write"),
    ],
)
def test_export_never_writes_over_other_things(checkpoint, tmp_path, output, message):
    (tmp_path / "photos").mkdir()
    for name in ("a", "a.txt"):
        (tmp_path / "photos" / name).write_text("mine")
    (tmp_path / "folder.onnx").mkdir()
    done = vit("export", checkpoint, output, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1
    assert [(tmp_path / "photos" / name).read_text() for name in ("a", "a.txt")] == ["mine", "mine"]
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "folder.onnx", "photos"]


def test_an_onnx_file_becomes_a_bundle_again(small_bundle, tmp_path):
    assert vit("export", small_bundle / "model.onnx", tmp_path / "bundle").returncode == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "bundle" / name).read_bytes() == (small_bundle / name).read_bytes()


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    torch.save({"state_dict": {}, "vit": Payload()}, tmp_path / "evil.ckpt")
    for command in (["classify", "evil.ckpt", "x.jpg"], ["info", "evil.ckpt"], ["export", "evil.ckpt", "out"]):
        done = vit(*command, cwd=tmp_path)
        assert done.returncode == 2
        assert b"would run code" in done.stderr
        assert done.stderr.count(b"\n") == 1
    assert os.listdir(tmp_path) == ["evil.ckpt"]


def test_info_tells_what_the_model_is(small_bundle, checkpoint):
    for model, kind in [
        (small_bundle, "bundle"),
        (checkpoint, "checkpoint"),
        (small_bundle / "model.onnx", "ONNX file"),
    ]:
        done = vit("info", model)
        assert (done.returncode, done.stderr) == (0, b"")
        text = done.stdout.decode()
        for part in (
            f": {kind}",
            "32 x 32 pixels",
            "4 x 4",
            "17 tokens",
            "größe",
            "x\\ty",
            "1.5",
            "test.top1",
            "0.9",
            "seed",
        ):
            assert part in text


def test_info_as_json(small_bundle):
    values = json.loads(vit("info", small_bundle, "--format", "json").stdout)
    model, description = load_torch(small_bundle, device="cpu")
    assert values["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert values["grid"] == [4, 4]
    assert values["class_names"] == description.class_names
    assert values["architecture"] == model.architecture


def test_info_prints_in_any_locale(small_bundle):
    done = vit("info", small_bundle, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0
    assert b"gr\\xf6\\xdfe" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", [("info",), ("info", "--format", "json"), ("export", "out")])
def test_a_full_disk_behind_standard_output(small_bundle, tmp_path, arguments):
    command, *rest = arguments
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vit", command, small_bundle, *rest],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=ENVIRONMENT,
            timeout=300,
        )
    assert done.returncode == 2
    assert done.stderr == b"vit: cannot write to standard output: No space left on device\n"


def test_info_of_damaged_weights(small_bundle, tmp_path):
    (tmp_path / "config.json").write_bytes((small_bundle / "config.json").read_bytes())
    for content in (b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b'\x0a\0\0\0\0\0\0\0{"a": "b"}'):
        (tmp_path / "model.safetensors").write_bytes(content)
        done = vit("info", tmp_path)
        assert done.returncode == 2
        assert b"model.safetensors" in done.stderr
