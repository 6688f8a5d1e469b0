"""Compute logits with the torch module, on a CPU or a GPU.  Imports torch.

All devices compute in full float32 (no TF32), so that a GPU, a CPU and ONNX Runtime give the same results.
"""

from __future__ import annotations

import numpy as np
import torch

from vit.errors import VitError, did_you_mean
from vit.inference.description import Description
from vit.model import VisionTransformer


class TorchBackend:
    """Computes logits float32 (B, K) of images float32 (B, C, H, W) with the torch module."""

    name = "torch"
    threads = 0

    def __init__(self, model: VisionTransformer, description: Description) -> None:
        self.model, self.description = model.eval(), description
        self._device = next(model.parameters()).device
        self.device = str(self._device)

    def ready(self) -> None:
        """Return at once: the model is loaded."""

    def network(self) -> VisionTransformer:
        return self.model

    def logits(self, images: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            try:
                batch = torch.from_numpy(np.ascontiguousarray(images)).to(self._device)
                return self.model(batch).float().cpu().numpy()
            except torch.OutOfMemoryError:
                raise VitError(
                    f"{self.device} has not enough memory for {len(images)} images: lower the batch size"
                ) from None


def resolve_device(name: str) -> torch.device:
    """Get the torch device `name`; "auto" prefers a GPU.  Raises `VitError` when the device does not exist."""
    kinds = {"cpu": 1, "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    kinds["mps"] = int(torch.backends.mps.is_available())
    if name == "auto":
        return torch.device("cuda" if kinds["cuda"] else "mps" if kinds["mps"] else "cpu")
    kind, _, number = name.partition(":")
    if kind not in kinds or (number and not number.isdecimal()):
        raise VitError(f"no device {name!r}; {did_you_mean(name, ['auto', *kinds])}")
    if int(number or 0) >= kinds[kind]:
        available = ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items() if count)
        raise VitError(f"device {name!r} is not on this machine; it has {available}")
    return torch.device(name)
