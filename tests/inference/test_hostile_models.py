"""Model files that somebody made up: each is refused in one line, or answers, in seconds and little memory."""

from __future__ import annotations

import collections
import copy
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vit
from vit.checksums import add_onnx_checksum
from vit.cli import main
from vit.data.preprocess import Preprocessing
from vit.errors import VitError
from vit.inference.bundle import CONFIG, ONNX, WEIGHTS, write_bundle
from vit.inference.description import Description
from vit.model import VisionTransformer

IMAGE = np.full((16, 16), 99, dtype=np.uint8)
MOST = 1.0  # GB that a small file may take


def shared(levels: int = 40) -> list:
    value: list = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


def shared_tuple(levels: int = 40) -> tuple:
    value: tuple = (1,)
    for _ in range(levels):
        value = (value, value)
    return value


class Unhashed:
    """A dictionary with this item in a pickle; to make it here would never end."""

    def __init__(self, key: tuple) -> None:
        self.key = key

    def __reduce__(self):
        return collections.OrderedDict, (), None, None, iter([(self.key, 1)])


class OfSet(Unhashed):
    def __reduce__(self):
        return set, ([self.key],)


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def ring() -> list:
    value: list = []
    value.append(value)
    return value


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A bundle with learned positions, one with rotary ones, and a checkpoint, as they should be."""
    folder = tmp_path_factory.mktemp("originals")
    options = {"image_size": 16, "patch_size": 4, "in_channels": 1, "num_classes": 3, "width": 16, "depth": 2}
    for position in ("learned", "rotary"):
        torch.manual_seed(0)
        model = VisionTransformer(**options, heads=1, position=position).eval()
        preprocessing = Preprocessing(image_size=(16, 16), channels=1, mean=(0.5,), std=(0.5,))
        description = Description(model.architecture, ["a", "b", "c"], preprocessing, training={"seed": 0})
        write_bundle(folder / position, model, description, onnx=position == "learned")
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3, "vit": description.to_dict()}, folder / f"{position}.ckpt")
    return folder


def peak() -> float:
    """Of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def answer(model: Path, backend: str = "auto") -> str | None:
    """The line that refuses the model or the image, None where it answers."""
    before = peak()
    try:
        (result,) = vit.load(model, device="cpu", backend=backend).classify([IMAGE])
        return result.error
    except VitError as error:
        line = str(error)
    finally:
        assert peak() - before < MOST
    assert line.isprintable()
    return line


def information(model: Path, capsys) -> str | None:
    """As `answer`, of `vit info`."""
    before = peak()
    status = main(["info", str(model), "--format", "json"])
    error = capsys.readouterr().err
    assert peak() - before < MOST
    assert status in (0, 2)
    assert error.count("\n") == (status == 2), error
    return error or None


@pytest.mark.parametrize("kind", ["zip", "before 1.6", "key", "key before 1.6", "members of a set"])
@pytest.mark.timeout(120)
def test_a_tuple_that_is_shared_at_every_level(kind, tmp_path, originals, capsys):
    saved = torch.load(originals / "learned.ckpt", weights_only=True)
    value = shared_tuple()
    saved["vit"]["training"] = Unhashed(value) if "key" in kind else [value]
    if kind == "members of a set":
        saved["vit"]["training"] = OfSet(value)
    torch.save(saved, tmp_path / "made.ckpt", _use_new_zipfile_serialization="before" not in kind)
    told = "holds a tuple of over 1000000 tuples, level by level"
    assert told in str(answer(tmp_path / "made.ckpt"))
    assert told in str(information(tmp_path / "made.ckpt", capsys))


def weight(make):
    def change(saved):
        saved["state_dict"]["model.head.weight"] = make(saved["state_dict"]["model.head.weight"])

    return change


def expanded(saved):
    wide = {16: 16384, 48: 3 * 16384, 64: 4 * 16384}
    saved["vit"]["architecture"].update(width=16384, heads=1)
    for key, tensor in saved["state_dict"].items():
        saved["state_dict"][key] = torch.zeros(1).expand([wide.get(side, side) for side in tensor.shape])


def one_storage(saved):
    """A thousand blocks, each a view of the same weights."""
    memory = torch.zeros(4_000_000)
    a = saved["vit"]["architecture"]
    a.update(depth=1000, width=512, heads=1)
    wide = {16: 512, 48: 1536, 64: 2048}
    state = saved["state_dict"]
    for key in [key for key in state if "blocks.1." not in key]:
        for block in range(1000) if "blocks.0." in key else (0,):
            shape = [wide.get(side, side) for side in state[key].shape]
            size = int(np.prod(shape))
            state[key.replace("blocks.0.", f"blocks.{block}.")] = memory[:size].view(shape)


def put(value, *path):
    def change(table):
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value

    return change


CHECKPOINTS = {
    "sparse": (weight(lambda t: t.to_sparse()), "a tensor that is torch.sparse_coo"),
    "meta": (weight(lambda t: t.to("meta")), "a tensor that is on no device"),
    "number": (weight(lambda t: 5), "the weight head.weight is int: expected a tensor of floating-point numbers"),
    "text": (weight(lambda t: "weights"), "the weight head.weight is str"),
    "whole numbers": (weight(lambda t: t.long()), "the weight head.weight is torch.int64"),
    "expanded": (expanded, "bytes in the file"),
    "one storage": (one_storage, "its tensors share memory, and would take"),
    "shared": (put({"a": shared()}, "vit", "training"), "holds over 2000000 values"),
    "ring": (put({"a": ring()}, "vit", "training"), "nested more than 50 deep"),
    "keys": (put({(1, 2): 3}, "vit", "training"), "training should be a table of names and values"),
    "prefix": (put(5, "vit", "weights_prefix"), "holds no weights for it"),
    "scalar": (put(torch.zeros(()), "state_dict", "model.blocks.0.mlp.fc1.weight"), None),
    "names of weights": (put(torch.zeros(1), "state_dict", ("a", 1)), None),
    "patches": (put([4000, 4000], "vit", "architecture", "image_size"), "architecture makes 1000000 patches"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, originals, tmp_path, capsys):
    change, told = CHECKPOINTS[name]
    saved = torch.load(originals / "learned.ckpt", weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "made.ckpt")
    line, shown = answer(tmp_path / "made.ckpt"), information(tmp_path / "made.ckpt", capsys)
    assert told is None or (told in str(line) and told in str(shown)), (line, shown)


def pixels(config):
    for part in ("architecture", "preprocessing"):
        config["vit"][part]["image_size"] = [4000, 4000]


def norm(config):
    del config["vit"]
    config["model_args"]["norm_layer"] = "builtins.print"


CONFIGS = {
    "pixels": (pixels, "architecture makes 1000000 patches an image; expected 1 to 65536"),
    "mean": (put([10**400], "vit", "preprocessing", "mean"), "a whole number of more than 64 bits"),
    "temperature": (put(1e-320, "vit", "temperature"), "temperature should be a number from 1e-06 to 1e+06"),
    "nested": (put({"a": nested(900)}, "vit", "training"), "nested more than 50 deep"),
    "norm": (norm, "'builtins.print', which is no name of a layer of timm's"),
    "width": (put(60_000, "vit", "architecture", "width"), "its description says"),
    "depth": (put(1000, "vit", "architecture", "depth"), "its description says 1000"),
    "channels": (put(4000, "vit", "architecture", "in_channels"), "channels"),
}


def made(originals, folder: Path, change, base: str = "rotary") -> Path:
    """A bundle whose configuration is changed, without its checksum."""
    folder.mkdir(exist_ok=True)
    config = json.loads((originals / base / CONFIG).read_text())
    del config["vit_checksum"]
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes((originals / base / WEIGHTS).read_bytes())
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, originals, tmp_path, capsys):
    change, told = CONFIGS[name]
    folder = made(originals, tmp_path / "made", change, "learned" if name == "norm" else "rotary")
    assert told in str(answer(folder, "torch"))
    information(folder, capsys)


def add(operator: str, inputs: dict[str, list], output: bool = False):
    def change(message):
        for name, values in inputs.items():
            message.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values), name))
        message.graph.node.append(onnx.helper.make_node(operator, list(inputs), ["huge"]))
        if output:
            message.graph.output.append(onnx.helper.make_tensor_value_info("huge", 1, None))

    return change


def sparse(message):
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "huge")
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "at")
    message.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [1 << 33]))


def outside(message):
    tensor = message.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../../../../etc/passwd"), ("offset", "0")):
        tensor.external_data.add(key=key, value=value)


GRAPHS = {
    "an output": (add("ConstantOfShape", {"sides": [100_000, 20_000]}, output=True), "it has an output 'huge'"),
    "no output": (add("ConstantOfShape", {"sides": [100_000, 20_000]}), "makes a tensor of 2,000,000,000 numbers"),
    "expand": (add("Expand", {"x": [1.0], "sides": [1 << 33]}), "a node Expand makes a tensor"),
    "range": (add("Range", {"a": [0], "b": [1 << 40], "c": [1]}), "a node Range makes a tensor"),
    "tile": (add("Tile", {"x": [1.0], "times": [1 << 33]}), "a node Tile, which no Vision Transformer has"),
    "sparse": (sparse, "it has sparse weights"),
    "outside": (outside, None),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name, originals, tmp_path, capsys):
    change, told = GRAPHS[name]
    message = onnx.load_model(originals / "learned" / ONNX)
    del message.metadata_props[-1]  # its checksum
    change(message)
    (tmp_path / "made.onnx").write_bytes(add_onnx_checksum(message.SerializeToString()))
    line = answer(tmp_path / "made.onnx")
    assert line is not None
    assert told is None or told in line, line
    information(tmp_path / "made.onnx", capsys)


def doubling(operator: str, source: str):
    """Nodes each of which makes something larger of what the one before made, up to the logits."""

    def change(message):
        graph, last = message.graph, source
        graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 1, 256), np.float32), "one"))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 1, 1], np.int64), "column"))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 1, -1], np.int64), "row"))
        nodes = []
        for step in range(24 if operator == "Concat" else 2):
            name = f"double {step}"
            if operator == "Concat":
                nodes.append(onnx.helper.make_node("Concat", [last, last], [name], axis=0))
            else:  # a column by a row
                for side in ("column", "row"):
                    nodes.append(onnx.helper.make_node("Reshape", [last, side], [f"{side} {step}"]))
                nodes.append(onnx.helper.make_node(operator, [f"column {step}", f"row {step}"], [name]))
            last = name
        nodes.append(onnx.helper.make_node("ReduceMax", [last], ["largest"], keepdims=0))
        nodes.append(onnx.helper.make_node("Add", ["largest", "honest"], ["logits"]))
        for node in graph.node:
            node.output[:] = ["honest" if name == "logits" else name for name in node.output]
        graph.node.extend(nodes)

    return change


DOUBLING = [(operator, source) for operator in ("Concat", "Mul", "MatMul") for source in ("one", "image")]
HERE = """
import sys, vit.processors
free = int(sys.argv.pop(1))
vit.processors.free_memory = lambda: free
import numpy as np, vit
try:
    (result,) = vit.load(sys.argv[1], device="cpu", backend="onnx").classify([np.full((16, 16), 99, dtype=np.uint8)])
    print("answered", result.label)
except vit.VitError as error:
    print(error)
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(peak.split()[1])
"""
"""`getrusage` would count the process that starts this one, too."""


@pytest.mark.parametrize(("operator", "source"), DOUBLING)
def test_nodes_that_make_much_of_little_meet_a_limit(operator, source, originals, tmp_path):
    message = onnx.load_model(originals / "learned" / ONNX)
    del message.metadata_props[-1]  # its checksum
    doubling(operator, source)(message)
    (tmp_path / "made.onnx").write_bytes(add_onnx_checksum(message.SerializeToString()))
    command = [sys.executable, "-c", HERE, str(1 << 30), str(tmp_path / "made.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    line, most = done.stdout.splitlines()
    assert "it takes more memory than there is" in line, (done.stdout, done.stderr)
    assert int(most) < 1.1e6
    assert done.stderr == ""


NUMBERS = [0, -1, 1, 3, 17, 2**31, 2**63, 10**400, 1e-320, 1e308, float("nan"), float("inf"), True, None]
TEXTS = ["", "x", "builtins.print", "\ud800", "a" * 5000, "\0", "\n", "learned", "rotary", "merge", "local-dir:/"]
TREES = [[], {}, [[]], [1], [4, 4], [4000, 4000], [1, 1], [2**40, 1], {"a": 1}, nested(60), [None], ["a", "b"], [1.5]]
PLAIN = st.one_of(st.sampled_from([*NUMBERS, *TEXTS]), st.sampled_from(TREES).map(copy.deepcopy))
ODD = st.sampled_from(
    [
        *(lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: t.long(), lambda t: t.bool(), lambda t: t.half()),
        *(lambda t: t.to(torch.complex64), lambda t: t.flatten(), lambda t: t[:0], lambda t: t.new_zeros(())),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        lambda t: t.new_zeros(1).expand(1 << 20, 1 << 12),
        *(lambda t: t.T if t.ndim == 2 else t, lambda t: 5, lambda t: None, lambda t: [t], lambda t: {"a": t}),
        *(lambda t: torch.full_like(t, float("nan")), lambda t: torch.full_like(t, 1e38)),
    ]
)


def somewhere(draw, table, value) -> None:
    """Put `value`, or nothing, at some place in nested tables and lists."""
    while True:
        keys = list(table) if isinstance(table, dict) else list(range(len(table)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        inner = table[key]
        if isinstance(inner, dict | list) and inner and draw(st.integers(0, 5)):
            table = inner
            continue
        if draw(st.integers(0, 6)) == 0:
            del table[key]
        else:
            table[key] = value
        return


def crafted(count: int, originals: Path, folder: Path) -> None:
    saved = torch.load(originals / "learned.ckpt", weights_only=True)
    message = onnx.load_model(originals / "learned" / ONNX)
    options = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))

    @options
    @given(st.data())
    def test(data):
        kind = data.draw(st.sampled_from(["ckpt", "config", "onnx"]))
        if kind == "ckpt":
            table = copy.deepcopy(saved)
            for _ in range(data.draw(st.integers(1, 2))):
                if data.draw(st.booleans()):
                    key = data.draw(st.sampled_from(sorted(saved["state_dict"])))
                    if isinstance(saved["state_dict"][key], torch.Tensor):
                        table.get("state_dict", {})[key] = data.draw(ODD)(saved["state_dict"][key])
                else:
                    inside = table["vit"] if isinstance(table.get("vit"), dict) else table
                    somewhere(data.draw, inside, data.draw(PLAIN))
            torch.save(table, folder / "made.ckpt")
            answer(folder / "made.ckpt")
        elif kind == "config":

            def change(config):
                somewhere(data.draw, config, data.draw(PLAIN))

            answer(made(originals, folder / "made", change, data.draw(st.sampled_from(["learned", "rotary"]))), "torch")
        else:
            changed = onnx.ModelProto()
            changed.CopyFrom(message)
            del changed.metadata_props[-1]  # its checksum
            spoil(data.draw, changed)
            (folder / "made.onnx").write_bytes(add_onnx_checksum(changed.SerializeToString()))
            answer(folder / "made.onnx", data.draw(st.sampled_from(["onnx", "torch"])))

    test()


def spoil(draw, message) -> None:
    """Change something in an ONNX file."""
    graph = message.graph
    what = draw(st.sampled_from(["known", "node", "input", "tensor", "metadata", "drop"]))
    if what == "known":
        draw(st.sampled_from([change for change, _ in GRAPHS.values()]))(message)
    elif what == "node":
        node = draw(st.sampled_from(list(graph.node)))
        node.op_type = draw(st.sampled_from(["Tile", "Loop", "Add", "Range", "NonZero", "Nope", "", "Concat"]))
    elif what == "input":
        node = draw(st.sampled_from([node for node in graph.node if node.input]))
        node.input[0] = draw(st.sampled_from([draw(st.sampled_from(list(graph.initializer))).name, "nowhere", ""]))
    elif what == "tensor":
        tensor = draw(st.sampled_from(list(graph.initializer)))
        tensor.dims[:] = draw(st.sampled_from([[1 << 40], [], [0], [-1], [1 << 20, 1 << 20], [1]]))
    elif what == "metadata":
        entry = draw(st.sampled_from(list(message.metadata_props)))
        entry.value = draw(st.sampled_from(["", "{}", "[" * 5000, "null", entry.value[:-20], '{"format": 1}']))
    else:
        field = draw(st.sampled_from([graph.node, graph.initializer, graph.output, message.metadata_props]))
        del field[draw(st.integers(0, len(field) - 1))]


def test_models_that_somebody_made_up(originals, tmp_path):
    crafted(60, originals, tmp_path)


@pytest.mark.slow
def test_three_hundred_models_that_somebody_made_up(originals, tmp_path):
    crafted(300, originals, tmp_path)
