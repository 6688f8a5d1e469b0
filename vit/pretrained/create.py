"""Models by name: this project's own sizes and everything plain in timm's registry.

create_model("vit_tiny", image_size=32, patch_size=4, num_classes=10)
create_model("vit_small_patch16_224")
"""

from __future__ import annotations

from typing import Any

from vit.model import VisionTransformer
from vit.model import create_model as create_own
from vit.pretrained.registry import entry


def create_model(name: str = "vit_tiny", *, num_classes: int | None = None, **overrides: Any) -> VisionTransformer:
    """Build a model by name, with random weights.

    Arguments
        name: "vit_" and a size ("vit_tiny"), which needs `image_size`, `patch_size` and `num_classes`; or a name of
            timm's registry ("vit_small_patch16_224", with a tag or without), which says them itself.
        num_classes: outputs; None for as many as the name has, 0 for no head.
        overrides: other arguments of `vit.VisionTransformer`.

    Raises `VitError` for a name that does not exist, with the nearest ones, or that is no plain Vision Transformer.
    """
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    if name.startswith("vit_") and name.count("_") == 1:  # timm's names have a patch size, or a family's name in front
        return create_own(name, **overrides)
    return VisionTransformer(**{**entry(name).architecture, **overrides})
