"""The second output of an ONNX file: attention rollout, equal to that of recorded weights, whatever the model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.explain import record_attention
from vit.explain.rollout import rollout
from vit.explain.with_rollout import WithRollout
from vit.inference import export
from vit.inference.description import Description
from vit.inference.export import export_onnx, trace
from vit.inference.onnx_backend import OnnxBackend, open_session
from vit.inference.onnx_weights import load_onnx
from vit.model import VisionTransformer

OPTIONS = {
    "class token": {},
    "mean": {"pool": "mean"},
    "mean without a class token, rotary": {"pool": "mean", "class_token": False, "position": "rotary"},
    "attention pool, registers": {"pool": "attention", "registers": 2},
    "registers": {"registers": 3},
    "distilled": {"distillation_token": True},
    "not square, one channel": {"image_size": (24, 40), "patch_size": (8, 4), "in_channels": 1},
    "dot product": {"attention": "dot_product"},
    "differential": {"attention": "differential"},
    "post-norm": {"norm": "post"},
    "RMS norm, gated": {"norm_layer": "rms", "mlp": "swiglu"},
    "noise in training": {"drop_path": 0.5, "dropout": 0.5, "attention_dropout": 0.5},
}


def make(seed: int = 1, **options) -> tuple[VisionTransformer, Description]:
    torch.manual_seed(seed)
    defaults = {"image_size": 24, "patch_size": 8, "num_classes": 3, "size": "nano", "width": 32, "depth": 3}
    model = VisionTransformer(**{**defaults, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # so that attention is far from even
    a = model.architecture
    preprocessing = Preprocessing(image_size=tuple(a["image_size"]), channels=a["in_channels"])
    return model, Description(a, ["a", "b", "c"], preprocessing)


def written_out(weights: list[torch.Tensor], readout: torch.Tensor, prefix: int, grid: tuple[int, int]) -> np.ndarray:
    """Abnar & Zuidema 2020, section 3, in float64 and with whole matrices: R = product of (mean_h A + I) / 2."""
    product = torch.eye(weights[0].shape[-1], dtype=torch.float64)
    for each in weights:
        product = (each.double().mean(dim=1) + torch.eye(each.shape[-1], dtype=torch.float64)) / 2 @ product
    row = (readout.double().mean(dim=1, keepdim=True) @ product)[:, 0, prefix:]
    return (row / row.sum(dim=1, keepdim=True)).view(len(row), *grid).numpy()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_rollout_of_recorded_weights_at_every_batch_size(tmp_path, options):
    model, description = make(**options)
    export_onnx(tmp_path / "x.onnx", model, description, with_rollout=WithRollout)
    session, a = open_session(tmp_path / "x.onnx"), model.architecture
    for batch in (1, 4):
        images = torch.randn(batch, a["in_channels"], *a["image_size"])
        with torch.no_grad(), record_attention(model) as record:
            logits = model(images)
        given, shown = session.run(["logits", "rollout"], {"image": images.numpy()})
        np.testing.assert_allclose(given, logits.numpy(), rtol=0, atol=1e-4)
        assert shown.shape == (batch, *model.grid)
        assert shown.min() >= 0
        np.testing.assert_allclose(shown.sum(axis=(1, 2)), 1, rtol=0, atol=1e-5)
        ours = rollout(record.weights, model.num_prefix_tokens, model.grid, record.readout)
        np.testing.assert_allclose(shown, ours.numpy(), rtol=0, atol=1e-5)
        formula = written_out(record.weights.fractions(), record.readout, model.num_prefix_tokens, model.grid)
        np.testing.assert_allclose(shown, formula, rtol=0, atol=1e-5)
        assert np.ptp(shown) > 1e-3  # it says something


def test_the_newer_exporter_writes_the_same(tmp_path, monkeypatch):
    model, description = make(registers=1)
    images = torch.randn(2, 3, 24, 24).numpy()
    answers = []
    for dynamo in (False, True):
        monkeypatch.setattr(export, "_trace", lambda model, images, dynamo=dynamo: trace(model, images, dynamo=dynamo))
        export_onnx(tmp_path / "x.onnx", model, description, with_rollout=WithRollout)
        answers.append(open_session(tmp_path / "x.onnx").run(["rollout"], {"image": images})[0])
    np.testing.assert_allclose(*answers, rtol=0, atol=1e-6)


def test_the_file_says_what_it_gives_and_is_a_model_as_before(tmp_path):
    model, description = make()
    export_onnx(tmp_path / "x.onnx", model, description, with_rollout=WithRollout)
    message = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(message, full_check=True)
    shapes = {
        node.name: [axis.dim_value or axis.dim_param for axis in node.type.tensor_type.shape.dim]
        for node in message.graph.output
    }
    assert shapes["logits"] == ["batch", 3]
    assert shapes["rollout"][0] == "batch"
    assert len(shapes["rollout"]) == 3
    images = np.random.default_rng(0).normal(size=(2, 3, 24, 24)).astype(np.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(OnnxBackend(tmp_path / "x.onnx").logits(images), wanted, rtol=0, atol=1e-4)
    weights, _ = load_onnx(tmp_path / "x.onnx")  # and torch has it back
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_rollout_that_is_wrong_is_not_kept(tmp_path):
    class Wrong(WithRollout):
        def forward(self, images):
            logits, shown = super().forward(images)
            return logits, shown.flip(1) if torch.jit.is_tracing() else shown

    model, description = make()
    with pytest.raises(VitError, match=r"x\.onnx was not written: .* disagree by"):
        export_onnx(tmp_path / "x.onnx", model, description, with_rollout=Wrong)
    assert not list(tmp_path.iterdir())


def test_it_is_compared_on_the_images_that_are_given(tmp_path):
    model, description = make()
    seen = []
    real = export.check
    images = np.full((2, 3, 24, 24), 7, np.float32)

    def check(path, run, given, wanted, *rest):
        seen.append(given)
        return real(path, run, given, wanted, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "check", check)
        assert export_onnx(tmp_path / "x.onnx", model, description, images=images) < 1e-4
        export_onnx(tmp_path / "x.onnx", model, description)
    assert (seen[0] == 7).all()
    assert len(seen[0]) == 3  # several batch sizes, however few there are
    assert abs(seen[1].mean()) < 0.1
    assert abs(seen[1].std() - 1) < 0.1
