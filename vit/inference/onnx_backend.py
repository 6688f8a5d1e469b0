"""Logits from an ONNX file through ONNX Runtime, on the CPU.  No torch.

Notable: threads follow the processors this process may use (affinity and container quota), not those of the machine,
and do not spin when idle, so that decoding threads beside them are not starved.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit.errors import VitError
from vit.inference.description import Description
from vit.inference.processors import available

INPUT, OUTPUT, ROLLOUT, METADATA_KEY = "image", "logits", "rollout", "vit"


def open_session(path: str | os.PathLike[str]) -> Any:
    """An `onnxruntime.InferenceSession` of the file.  Raises `VitError` when there is none or it is no ONNX model."""
    import onnxruntime

    path = Path(path)
    try:
        if path.is_dir():
            raise VitError(f"{path} is a folder, not an ONNX file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise VitError(f"{path} is empty")
    except OSError as error:
        raise VitError(f"cannot read {path}: {error.strerror or error}") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its complaints become the exception below
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        name = str(path)
        name.encode()
        model: str | bytes = name
    except UnicodeEncodeError:  # the library takes names in UTF-8 only
        model = path.read_bytes()
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's exceptions share no base class
        reason = str(error).splitlines()[0][:160]
        raise VitError(f"{path} is damaged or not an ONNX model: {reason}") from None


def described(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> Description:
    """The description in a file's metadata.  Raises `VitError` when it is not a file of this project."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise VitError(
            f"{os.fspath(path)} is an ONNX model that does not describe its classes and preprocessing: "
            "expected one that `vit export` wrote"
        )
    return Description.from_json(text, path)


def session_description(session: Any, path: str | os.PathLike[str]) -> Description:
    """`described`, of the file that a session runs."""
    return described(session.get_modelmeta().custom_metadata_map, path)


class OnnxBackend:
    """Runs a session: float32 (B, C, H, W) -> logits float32 (B, K)."""

    name = "onnx"
    device = "cpu"

    def __init__(self, path: str | os.PathLike[str], description: Description | None = None) -> None:
        self._session = open_session(path)
        own = session_description(self._session, path)
        self.description = description or own
        inputs = {node.name: node for node in self._session.get_inputs()}
        outputs = {node.name: node for node in self._session.get_outputs()}
        if set(inputs) != {INPUT} or OUTPUT not in outputs:
            raise VitError(f"{os.fspath(path)}: expected input {INPUT!r} and output {OUTPUT!r}, not {list(inputs)}")
        architecture = self.description.architecture
        expected = [architecture["in_channels"], *architecture["image_size"]]
        if inputs[INPUT].shape[1:] != expected or outputs[OUTPUT].shape[1:] != [architecture["num_classes"]]:
            raise VitError(f"{os.fspath(path)}: the model inside is not the one that its description tells of")

    def logits(self, images: np.ndarray) -> np.ndarray:
        return self._session.run([OUTPUT], {INPUT: images})[0]
