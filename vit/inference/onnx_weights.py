"""Store and read the weights in an ONNX file under their own names, so that torch can load the model from it.

Exporters keep most initializers under the parameter's name, but transpose the matrices of linear layers, share equal
tensors, and fold some into constants.  On export, `index` finds each parameter and adds missing ones; the table is in
the file's metadata, and `load_onnx` reads the weights with it.
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
from vit.inference.onnx_backend import read_description

if TYPE_CHECKING:
    from torch import Tensor

TABLE_KEY = "vit_weights"
"""Metadata: {parameter: [initializer, whether it is transposed]} as JSON."""


def index(message: Any, state: dict[str, np.ndarray]) -> str:
    """Make the table for the `onnx.ModelProto` of a model with this state dict.

    A parameter that is not in the message is added as an initializer that no node reads.
    """
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in message.graph.initializer}
    table: dict[str, tuple[str, bool]] = {}
    for name, value in state.items():
        # the parameter's own name first: of equal tensors an exporter may keep only one
        for key in (name, *arrays):
            transposed = _is_transposed(arrays[key], value) if key in arrays else None
            if transposed is not None:
                table[name] = key, transposed
                break
        else:
            key = f"{name}.whole" if name in arrays else name
            message.graph.initializer.append(numpy_helper.from_array(value, key))
            table[name] = key, False
    return json.dumps(table)


def _is_transposed(array: np.ndarray, value: np.ndarray) -> bool | None:
    """Check whether `array` is `value` transposed; None if it is another tensor."""
    if array.size != value.size or array.ndim != value.ndim or array.flat[:1] != value.flat[:1]:
        return None
    if np.array_equal(array, value):
        return False
    return True if value.ndim == 2 and np.array_equal(array.T, value) else None


def load_onnx(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Description]:
    """Read the weights and the description of an ONNX file that `vit export` or training wrote.

    Raises `VitError` when it cannot be read, is not a file of this project, or has no table of its weights.
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
    description = read_description(metadata, path)
    table = parse_json(metadata.get(TABLE_KEY, "null"), path)
    if not isinstance(table, dict):
        reason = "is in integers" if "int8" in description.metrics else "does not say where its weights are"
        raise VitError(f"{path} {reason}, so torch cannot use it: give the run or the bundle")
    initializers = {each.name: each for each in message.graph.initializer}
    arrays: dict[str, np.ndarray] = {}
    weights = {}
    for name, entry in table.items():
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and entry[0] in initializers):
            raise VitError(f"{path} is damaged: it does not hold the weights of {name}")
        if initializers[entry[0]].data_location == onnx.TensorProto.EXTERNAL:
            raise VitError(f"{path} keeps its weights in another file: expected one that `vit export` wrote")
        try:
            if entry[0] not in arrays:
                arrays[entry[0]] = np.array(numpy_helper.to_array(initializers[entry[0]]))
            array = torch.from_numpy(arrays[entry[0]])
        except (ValueError, TypeError) as error:
            raise VitError(f"{path} is damaged: the weights of {name} cannot be read ({error})") from None
        weights[name] = array.T if entry[1] and array.ndim == 2 else array
    check_tensors(weights, path)  # a table may name one tensor a thousand times
    return weights, description
