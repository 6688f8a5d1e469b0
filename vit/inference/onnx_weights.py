"""The weights inside an ONNX file, under their own names, so that one file is a whole model for torch too.

Exporters keep most initializers under the parameter's name but transpose the matrices of linear layers, share equal
tensors, and fold a few away.  `index` finds where each parameter is while the model is at hand, and adds what is
nowhere; the file keeps that table in its metadata, and `load_onnx` reads the weights back by it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit.checksums import check_onnx
from vit.errors import VitError
from vit.inference.description import Description, parse_json
from vit.inference.onnx_backend import described

if TYPE_CHECKING:
    from torch import Tensor

TABLE_KEY = "vit_weights"
"""Metadata: {parameter: [initializer, whether it is transposed]} as JSON."""


def index(message: Any, state: dict[str, np.ndarray]) -> str:
    """The table for the `onnx.ModelProto` of a model with this state dict.

    A parameter that is not in the message is added as an initializer, which no node reads.
    """
    from onnx import numpy_helper

    arrays = {each.name: numpy_helper.to_array(each) for each in message.graph.initializer}
    table: dict[str, tuple[str, bool]] = {}
    for name, value in state.items():
        # its own name first: of equal tensors an exporter may keep one
        for key in (name, *arrays):
            turned = _turned(arrays[key], value) if key in arrays else None
            if turned is not None:
                table[name] = key, turned
                break
        else:
            key = f"{name}.whole" if name in arrays else name
            message.graph.initializer.append(numpy_helper.from_array(value, key))
            table[name] = key, False
    return json.dumps(table)


def _turned(found: np.ndarray, value: np.ndarray) -> bool | None:
    """Whether `found` is `value` transposed; None where it is another tensor."""
    if found.size != value.size or found.ndim != value.ndim or found.flat[:1] != value.flat[:1]:
        return None
    if np.array_equal(found, value):
        return False
    return True if value.ndim == 2 and np.array_equal(found.T, value) else None


def load_onnx(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Description]:
    """The weights in an ONNX file that `vit export` or training wrote, and its description.

    Raises `VitError` when it cannot be read, is none of ours, or does not say where its weights are.
    """
    import onnx
    import torch
    from onnx import numpy_helper

    from vit.pretrained.reading import check_tensors

    path = Path(path)
    try:
        check_onnx(path)
        message = onnx.load_model_from_string(path.read_bytes())
    except VitError:
        raise
    except OSError as error:
        raise VitError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # protobuf's, whose implementations differ
        raise VitError(f"{path} is damaged or not an ONNX model: {error}") from None
    metadata = {entry.key: entry.value for entry in message.metadata_props}
    description = described(metadata, path)
    table = parse_json(metadata.get(TABLE_KEY, "null"), path)
    if not isinstance(table, dict):
        why = "is in integers" if "int8" in description.metrics else "does not say where its weights are"
        raise VitError(f"{path} {why}, so torch cannot use it: give the run or the bundle")
    held = {each.name: each for each in message.graph.initializer}
    arrays: dict[str, np.ndarray] = {}
    weights = {}
    for name, place in table.items():
        if not (isinstance(place, list) and len(place) == 2 and isinstance(place[0], str) and place[0] in held):
            raise VitError(f"{path} is damaged: it does not hold the weights of {name}")
        if held[place[0]].data_location == onnx.TensorProto.EXTERNAL:
            raise VitError(f"{path} keeps its weights in another file: expected one that `vit export` wrote")
        try:
            if place[0] not in arrays:
                arrays[place[0]] = np.array(numpy_helper.to_array(held[place[0]]))
            array = torch.from_numpy(arrays[place[0]])
        except (ValueError, TypeError) as error:
            raise VitError(f"{path} is damaged: the weights of {name} cannot be read ({error})") from None
        weights[name] = array.T if place[1] and array.ndim == 2 else array
    check_tensors(weights, path)  # a table may name one tensor a thousand times
    return weights, description
