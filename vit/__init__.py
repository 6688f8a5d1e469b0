"""Train, use and explain a Vision Transformer image classifier.

    import vit

    run = vit.train("digits")  # or a folder, [(path, label)], (images, labels), a torch or Hugging Face data set
    model = vit.create_model("vit_tiny", image_size=32, patch_size=4, num_classes=10)  # a torch.nn.Module
    classifier = vit.load("runs/digits/2026-01-01_10-00-00")
    results = classifier.classify(["photo.jpg"])
    with vit.record_attention(model) as record:
        logits = model(images)
    maps = vit.rollout(record.weights, prefix_tokens=model.num_prefix_tokens, grid=model.grid)  # (B, rows, columns)

Notable: `import vit` imports nothing else.  Each public name is imported from its module when it is first used, so a
program that only classifies never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "create_model": "vit.pretrained.create",
    "load_pretrained": "vit.pretrained.create",
    "VisionTransformer": "vit.model",
    "load": "vit.inference.loading",
    "load_torch": "vit.inference.loading",
    "Classifier": "vit.inference.classifier",
    "Result": "vit.inference.classifier",
    "Description": "vit.inference.description",
    "Preprocessing": "vit.data.preprocess",
    "train": "vit.training.api",
    "evaluate": "vit.training.api",
    "Run": "vit.training.api",
    "Explanation": "vit.explain.maps",
    "ImageError": "vit.data.decode",
    "VitError": "vit.errors",
    "record_attention": "vit.explain.record",
    "rollout": "vit.explain.rollout",
}

__all__ = [
    "Classifier",
    "Description",
    "Explanation",
    "ImageError",
    "Preprocessing",
    "Result",
    "Run",
    "VisionTransformer",
    "VitError",
    "create_model",
    "evaluate",
    "load",
    "load_pretrained",
    "load_torch",
    "record_attention",
    "rollout",
    "train",
]

if TYPE_CHECKING:
    from vit.data.decode import ImageError
    from vit.data.preprocess import Preprocessing
    from vit.errors import VitError
    from vit.explain.maps import Explanation
    from vit.explain.record import record_attention
    from vit.explain.rollout import rollout
    from vit.inference.classifier import Classifier, Result
    from vit.inference.description import Description
    from vit.inference.loading import load, load_torch
    from vit.model import VisionTransformer
    from vit.pretrained.create import create_model, load_pretrained
    from vit.training.api import Run, evaluate, train


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'vit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
