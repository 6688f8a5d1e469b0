"""Token reduction from outside: in a file, in a bundle, by override where a model is loaded, exported, explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vit.cli import main
from vit.data.preprocess import Preprocessing
from vit.explain.methods import explain
from vit.explain.with_rollout import WithRollout
from vit.inference import export
from vit.inference.bundle import read_bundle, write_bundle
from vit.inference.description import Description
from vit.inference.export import export_onnx, stable_images, trace
from vit.inference.loading import load, load_torch
from vit.inference.onnx_backend import ROLLOUT, OnnxBackend, open_session
from vit.inference.program import export_program
from vit.model import VisionTransformer

SMALL: dict[str, Any] = dict(image_size=24, patch_size=4, num_classes=3, width=32, depth=3, heads=2)
OPTIONS: dict[str, dict[str, Any]] = {
    "keep": dict(reduction="keep", reduction_rate=0.6),
    "keep, mean, proportional": dict(reduction="keep", reduction_rate=0.6, pool="mean", reduction_proportional=True),
    "merge": dict(reduction="merge", reduction_rate=0.6),
    "merge, rotary, attention pool": dict(
        reduction="merge", reduction_schedule=[17, 0, 6], position="rotary", registers=2, pool="attention"
    ),
}


def make(**options: Any) -> tuple[VisionTransformer, Description]:
    torch.manual_seed(1)
    model = VisionTransformer(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    preprocessing = Preprocessing(image_size=(24, 24))
    metrics = {"test": {"top1": 0.9}}
    return model, Description(model.architecture, ["a", "b", "c"], preprocessing, temperature=1.5, metrics=metrics)


NEWER = ["keep", "merge, rotary, attention pool"]


@pytest.mark.parametrize(
    ("name", "dynamo"),
    [*((name, False) for name in OPTIONS), *(pytest.param(name, True, marks=pytest.mark.slow) for name in NEWER)],
)
def test_the_file_answers_as_torch_at_every_batch_size(tmp_path, monkeypatch, name, dynamo):
    monkeypatch.setattr(export, "_trace", lambda model, images: trace(model, images, dynamo=dynamo))
    model, description = make(**OPTIONS[name])
    export_onnx(tmp_path / "x.onnx", model, description)
    backend = OnnxBackend(tmp_path / "x.onnx")
    assert backend.description.architecture == model.architecture
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 24, 24)
        with torch.no_grad():
            np.testing.assert_allclose(backend.logits(images.numpy()), model(images).numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_file_gives_maps_of_the_image_s_grid(tmp_path, options):
    model, description = make(**options)
    export_onnx(tmp_path / "x.onnx", model, description, with_rollout=WithRollout)
    images = torch.randn(2, 3, 24, 24)
    (maps,) = open_session(tmp_path / "x.onnx").run([ROLLOUT], {"image": images.numpy()})
    assert maps.shape == (2, 6, 6)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(maps, explain(model, images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [OPTIONS["keep"], OPTIONS["merge"]], ids=["keep", "merge"])
@pytest.mark.parametrize("with_rollout", [None, WithRollout], ids=["logits", "rollout"])
def test_a_program_of_torch_export(tmp_path, options, with_rollout):
    model, description = make(**options)
    assert export_program(tmp_path / "x.pt2", model, description, with_rollout=with_rollout) < 1e-4


class TestBundle:
    @pytest.fixture(scope="class")
    def bundle(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("reduced") / "bundle"
        write_bundle(folder, *make(**OPTIONS["merge"]))
        return folder

    def test_the_reduction_is_the_model_s(self, bundle):
        model, description = load_torch(bundle)
        assert model.reduction is not None
        assert description.architecture["reduction"] == "merge"
        images = np.random.default_rng(0).standard_normal((4, 3, 24, 24), dtype=np.float32)
        want = load(bundle, backend="torch").logits(images)
        np.testing.assert_allclose(load(bundle, backend="onnx").logits(images), want, atol=1e-4)

    def test_timm_is_told_that_it_cannot(self, bundle):
        config = json.loads((bundle / "config.json").read_text())
        assert config["architecture"] == "not in timm (a ViT with token reduction): load it with vit"

    def test_without_the_reduction_it_is_a_model_of_timm(self, bundle, tmp_path, capsys):
        timm = pytest.importorskip("timm")
        assert main(["export", str(bundle), str(tmp_path / "plain"), "--reduction", "none"]) == 0
        theirs = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
        ours, description = load_torch(bundle, reduction="none")
        assert ours.reduction is None
        assert description.metrics == {}  # they were measured with it
        with torch.no_grad():
            images = torch.randn(2, 3, 24, 24)
            torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-5)

    def test_the_same_reduction_keeps_the_figures(self, bundle):
        _, description = load_torch(bundle, reduction="merge:0.6")
        assert description.metrics == {"test": {"top1": 0.9}}

    def test_an_export_with_another_says_so_of_itself(self, bundle, tmp_path, capsys):
        assert main(["export", str(bundle), str(tmp_path / "x.onnx"), "--reduction", "keep:0.5:constant"]) == 0
        backend = OnnxBackend(tmp_path / "x.onnx")
        assert backend.description.architecture["reduction"] == "keep"
        images = np.random.default_rng(0).standard_normal((3, 3, 24, 24), dtype=np.float32)
        want = load(bundle, reduction="keep:0.5:constant").logits(images)
        np.testing.assert_allclose(backend.logits(images), want, atol=1e-4)
        assert main(["info", str(tmp_path / "x.onnx")]) == 0
        assert "keep" in capsys.readouterr().out

    def test_classify_with_another(self, bundle, photographs, tmp_path, capsys):
        rows = []
        for line in (["--backend", "torch"], ["--reduction", "merge:0.6"], ["--reduction", "none"]):
            assert main(["classify", str(bundle), str(photographs[0]), "--format", "jsonl", *line]) == 0
            rows.append(json.loads(capsys.readouterr().out)["probability"])
        assert rows[0] == pytest.approx(rows[1], abs=1e-6)
        assert rows[2] != pytest.approx(rows[0], abs=1e-6)

    @pytest.mark.parametrize(("arguments", "says"), [
        (["--reduction", "mrege"], "reduction: no method 'mrege'; did you mean 'merge'"),
        (["--reduction", "merge:0.5", "--backend", "onnx"], "vit export MODEL X.onnx --reduction merge:0.5"),
        (["--reduction", "merge:1-2"], "one for each of 3 layers"),
    ], ids=str)  # fmt: skip
    def test_a_mistake_is_one_line(self, bundle, photographs, capsys, arguments, says):
        assert main(["classify", str(bundle), str(photographs[0]), *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1

    def test_explain_gives_maps_of_the_image_s_grid(self, bundle, photographs, tmp_path, capsys):
        out = tmp_path / "maps"
        line = ["explain", str(bundle), str(photographs[0]), "--output", str(out), "--save-maps", "--index", "1"]
        assert main([*line, "--reduction", "keep:0.6"]) == 0
        with np.load(next(out.glob("*.npz"))) as saved:
            assert saved["map"].shape == (6, 6)
            assert saved["map"].sum() == pytest.approx(1, abs=1e-5)


def test_the_description_carries_a_schedule(tmp_path):
    folder = tmp_path / "bundle"
    write_bundle(folder, *make(reduction="keep", reduction_schedule=[0, 20, 5]), onnx=False)
    assert read_bundle(folder).architecture["reduction_schedule"] == [0, 20, 5]
    model, _ = load_torch(folder)
    assert model.reduction is not None
    assert model.reduction.removed_per_layer == (0, 20, 5)


class Jumpy:
    """Stands in for a model: a logit that jumps where the first pixel passes 1."""

    reduction = "some"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images[:, 0, :1, 0] >= 1).float()


class TestSteady:
    def test_images_on_the_brink_are_left_out(self):
        images = np.full((4, 1, 2, 2), 0.5, dtype=np.float32)
        images[:, 0, 0, 0] = [0.2, 1.0, 3.0, 1.0]
        found = stable_images(Jumpy(), images)  # type: ignore[arg-type]
        assert found.shape == images.shape
        np.testing.assert_array_equal(found[:, 0, 0, 0], np.float32([0.2, 3.0, 0.2, 3.0]))

    def test_where_all_are_they_are_compared_all_the_same(self):
        images = np.ones((3, 1, 2, 2), dtype=np.float32)
        assert stable_images(Jumpy(), images) is images  # type: ignore[arg-type]

    def test_without_reduction_nothing_is_left_out(self):
        images = np.random.default_rng(0).standard_normal((3, 3, 24, 24), dtype=np.float32)
        assert stable_images(make()[0], images) is images
