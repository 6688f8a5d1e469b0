"""The `.pt2` file: loads in a process without `vit`, any batch size, same logits, describes itself, nothing private."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.explain.with_rollout import WithRollout
from vit.inference import program
from vit.inference.description import Description
from vit.inference.loading import load
from vit.inference.program import export_program
from vit.model import VisionTransformer


def make(**options) -> tuple[VisionTransformer, Description]:
    torch.manual_seed(1)
    model = VisionTransformer(image_size=24, patch_size=8, num_classes=3, width=32, heads=2, depth=2, **options).eval()
    return model, Description(model.architecture, ["a", "b", "c"], Preprocessing(image_size=(24, 24)), 1.5)


def test_a_process_that_has_only_torch_gets_logits_and_description(tmp_path):
    model, description = make(position="rotary", registers=1)
    given = np.random.default_rng(0).normal(3, 1, (4, 3, 24, 24)).astype(np.float32)
    assert export_program(tmp_path / "x.pt2", model, description, images=given) < 1e-5
    np.save(tmp_path / "images.npy", given)
    code = (
        "import sys, json, numpy, torch; sys.modules['vit'] = None\n"
        "extra = {'vit.json': ''}\n"
        "program = torch.export.load('x.pt2', extra_files=extra).module()\n"
        "images = torch.from_numpy(numpy.load('images.npy'))\n"
        "logits = torch.cat([program(images[:1]), program(images[1:])])\n"
        "numpy.save('logits.npy', logits.detach().numpy()); print(extra['vit.json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    assert Description.from_dict(json.loads(done.stdout)) == description
    with torch.no_grad():
        wanted = model(torch.from_numpy(given)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted, rtol=0, atol=1e-5)
    # neither paths of this machine nor anybody's images are in it
    content = (tmp_path / "x.pt2").read_bytes()
    assert program.__file__.rpartition("/vit/")[0].encode() not in content
    assert given[0].tobytes()[:400] not in content


def test_with_a_rollout(tmp_path):
    model, description = make(pool="mean", drop_path=0.5)
    export_program(tmp_path / "x.pt2", model, description, with_rollout=WithRollout)
    images = torch.randn(2, 3, 24, 24)
    logits, shown = torch.export.load(tmp_path / "x.pt2").module()(images)
    with torch.no_grad():
        wanted = WithRollout(model)(images)
    torch.testing.assert_close((logits, shown), wanted, rtol=0, atol=1e-5)


def test_a_program_that_disagrees_is_not_kept(tmp_path, monkeypatch):
    model, description = make()
    monkeypatch.setattr(program, "expected", lambda twin, shown, images: [np.ones((len(images), 3), np.float32)])
    with pytest.raises(VitError, match=r"x\.pt2 was not written: the program and torch disagree"):
        export_program(tmp_path / "x.pt2", model, description)
    assert not list(tmp_path.iterdir())


def test_it_is_no_model(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"PK")
    with pytest.raises(VitError, match=r"x\.pt2 is a program for torch\.export\.load, which vit does not run"):
        load(tmp_path / "x.pt2")
