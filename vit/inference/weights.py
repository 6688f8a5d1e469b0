"""Load weights from this project's files, and build models from them; `vit.pretrained.reading` reads the files.

Notes:
- Weights must fit a model exactly: missing, unexpected and misshapen entries are named.
- Sizes in a description are compared with the tensors before anything of that size is allocated.

Imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vit.errors import VitError
from vit.inference.description import Description
from vit.model import VisionTransformer
from vit.pretrained.native import check_sizes, read_checkpoint
from vit.pretrained.skip_init import SkipInit


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Description]:
    """Load the weights of a training checkpoint (`.ckpt`), with LoRA merged, and its description.

    Raises `VitError` when the file is missing, empty, truncated, not a checkpoint of this project, or would need code
    to load.
    """
    weights, table = read_checkpoint(path)
    return weights, Description.from_dict(table, path)


def build(
    description: Description, weights: Mapping[str, Any], source: str | os.PathLike[str] = "the weights"
) -> VisionTransformer:
    """Build the described model with these weights, on the CPU in float32, in evaluation mode.

    Raises `VitError`, naming `source`, when the architecture is impossible or the weights do not fit it exactly.
    """
    source = os.fspath(source)
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise VitError(f"{source}: {key} is {type(value).__name__}, not a tensor")
    check_sizes(description.architecture, weights, source)
    try:
        with SkipInit():
            # any scheme works, since the weights are loaded next; this one computes nothing
            model = VisionTransformer(**{**description.architecture, "init": "trunc_normal"})
    except VitError as error:
        raise VitError(f"{source}: {error}") from None
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise VitError(f"{source}: its architecture cannot be built: {error}") from None
    model.architecture = dict(description.architecture)
    _check_fit(model, weights, source)
    model.load_state_dict(dict(weights))
    return model.eval()


def _check_fit(model: VisionTransformer, weights: Mapping[str, Tensor], source: str) -> None:
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    misshapen = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    problems = [
        f"{name} {_format_keys(keys)}"
        for name, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        raise VitError(f"{source}: the weights do not fit the described model: {'; '.join(problems)}")


def _format_keys(keys: list[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")
