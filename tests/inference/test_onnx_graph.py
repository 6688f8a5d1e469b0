"""Shape arithmetic taken out of a graph: the same outputs for any batch, and nothing left to compute shapes by."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from vit.inference.export import trace
from vit.inference.onnx_graph import simplify
from vit.model import VisionTransformer


def traced(dynamo: bool = False, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = dict(image_size=(24, 32), patch_size=8, num_classes=5, size="nano", depth=2)
        model = VisionTransformer(**{**shape, **options}).eval().requires_grad_(False)
    return model, trace(model, torch.zeros(2, 3, 24, 32), dynamo=dynamo)


def run(message, images):
    session = onnxruntime.InferenceSession(message.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": images})[0]


def kinds(message) -> list[str]:
    return [node.op_type for node in message.graph.node]


@pytest.mark.parametrize(
    ("dynamo", "options"),
    [
        (False, {}),
        (True, {}),
        (False, {"pool": "mean", "class_token": False}),
        (False, {"pool": "attention", "registers": 2}),
        (False, {"position": "rotary", "qk_norm": True}),
        (False, {"attention": "dot_product", "norm": "post", "layer_scale": 0.1}),
    ],
)
def test_the_outputs_stay(dynamo, options):
    model, message = traced(dynamo, **options)
    simplify(message)
    onnx.checker.check_model(message, full_check=True)
    assert not {"Identity", "Constant", "Cast", "Sqrt"}.intersection(kinds(message))
    for batch in (1, 2, 5):
        images = np.random.default_rng(batch).standard_normal((batch, 3, 24, 32), dtype=np.float32)
        expected = model(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(run(message, images), expected, atol=1e-5, rtol=1e-5)


def test_blocks_compute_no_shapes():
    """What is left grows by the same few operators with each block, none of which works on a shape."""
    counts = []
    for depth in (2, 3):
        _, message = traced(depth=depth)
        before = len(message.graph.node)
        simplify(message)
        counts.append(kinds(message))
        assert len(message.graph.node) < before / 2
    added = list(counts[1])
    for kind in counts[0]:
        added.remove(kind)
    assert not {"Shape", "Concat", "Unsqueeze", "Slice", "Cast", "Sqrt", "Gather"}.intersection(added)
    assert 20 < len(added) < 35


def test_once_is_enough():
    _, message = traced()
    simplify(message)
    first = kinds(message)
    simplify(message)
    assert kinds(message) == first


def made(nodes, weights=()):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 6]) for name in ("image", "y")]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(weights).items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_follows_the_batch_is_no_constant():
    """y = image * B, by way of the shape."""
    message = made(
        [
            helper.make_node("Shape", ["image"], ["shape"]),
            helper.make_node("Gather", ["shape", "zero"], ["batch"]),
            helper.make_node("Cast", ["batch"], ["factor"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["image", "factor"], ["y"]),
        ],
        {"zero": np.int64(0)},
    )
    simplify(message)
    for batch in (1, 4):
        np.testing.assert_array_equal(run(message, np.ones((batch, 6), np.float32)), np.full((batch, 6), batch))


def test_a_reshape_of_two_dimensions_that_follow_the_batch_stays():
    """(B, 6) to (B, 2, 3, B)-like shapes cannot be asked for with one -1."""
    message = made(
        [
            helper.make_node("Shape", ["image"], ["shape"]),
            helper.make_node("Gather", ["shape", "first"], ["batch"]),
            helper.make_node("Concat", ["batch", "batch", "six"], ["wide"], axis=0),
            helper.make_node("Expand", ["image", "wide"], ["grown"]),
            helper.make_node("Reshape", ["grown", "wide"], ["again"]),
            helper.make_node("ReduceMean", ["again"], ["y"], axes=[0], keepdims=0),
        ],
        {"first": np.array([0]), "six": np.array([6])},
    )
    images = np.random.default_rng(0).standard_normal((4, 6), dtype=np.float32)
    expected = run(message, images)
    simplify(message)
    np.testing.assert_array_equal(run(message, images), expected)


def test_names_of_outputs_stay():
    message = made([helper.make_node("Relu", ["image"], ["z"]), helper.make_node("Identity", ["z"], ["y"])])
    simplify(message)
    assert run(message, -np.ones((1, 6), np.float32)).tolist() == [[0] * 6]


def test_graphs_inside_are_left_alone():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["B", 6])],
    )
    message = made(
        [helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)], {"yes": np.array(True)}
    )
    before = message.SerializeToString()
    simplify(message)
    assert message.SerializeToString() == before
