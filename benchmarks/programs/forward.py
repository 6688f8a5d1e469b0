"""A forward pass without anything around it, by each library: a contestant of `benchmarks/forward.py`.

The weights are those of the bundle in `model`; each library's own names are mapped here.  vit-pytorch's model cannot
take them: it normalises patches before and after their embedding and has no bias on queries, keys and values.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from served import serve

Built = tuple[Callable[[], Any], Callable[[], Any] | None]


def images(batch: int, size: int = 224) -> Any:
    """The same normalised images for all."""
    import numpy as np

    return np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)


def torch_contestant(model: Any, batch: int, same: bool = True) -> Built:
    import torch

    x, model = torch.from_numpy(images(batch)), model.eval()

    @torch.inference_mode()
    def forward() -> Any:
        out = model(x)
        return getattr(out, "logits", out)

    return forward, (lambda: forward().tolist()) if same else None


def vit_torch(model: str, batch: int) -> Built:
    """The module as `vit classify --backend torch` calls it."""
    import vit

    classifier = vit.load(model, device="cpu", backend="torch")
    return classifier_contestant(classifier, batch)


def vit_onnx(model: str, batch: int) -> Built:
    """ONNX Runtime as `vit classify` calls it, for one image or for many."""
    from vit.inference.loading import load

    return classifier_contestant(load(model, device="cpu", backend="onnx", throughput=batch > 1), batch)


def classifier_contestant(classifier: Any, batch: int) -> Built:
    x = images(batch)
    return lambda: classifier.logits(x), lambda: classifier.logits(x).tolist()


def timm(model: str, batch: int) -> Built:
    import timm

    return torch_contestant(timm.create_model(f"local-dir:{model}", pretrained=True), batch)


def timm_compiled(model: str, batch: int) -> Built:
    """As timm's scripts compile with --torchcompile."""
    import timm
    import torch

    built = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    return torch_contestant(torch.compile(built, backend="inductor"), batch)


def transformers(model: str, batch: int) -> Built:
    from transformers import AutoModelForImageClassification

    return torch_contestant(AutoModelForImageClassification.from_pretrained(f"{model}-transformers"), batch)


def torchvision(model: str, batch: int) -> Built:
    import torch
    from safetensors.torch import load_file
    from torchvision.models import VisionTransformer

    a = architecture(model)
    width, depth = a["width"], a["depth"]
    built = VisionTransformer(
        image_size=a["image_size"][0],
        patch_size=a["patch_size"][0],
        num_layers=depth,
        num_heads=a["heads"],
        hidden_dim=width,
        mlp_dim=4 * width,
        num_classes=a["num_classes"],
    )
    names = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}
    names |= {f"patch_embed.proj.{each}": f"conv_proj.{each}" for each in ("weight", "bias")}
    names |= {f"norm.{each}": f"encoder.ln.{each}" for each in ("weight", "bias")}
    names |= {f"head.{each}": f"heads.head.{each}" for each in ("weight", "bias")}
    inner = {"norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
    inner |= {"attn.proj": "self_attention.out_proj"}
    for layer in range(depth):
        block = f"encoder.layers.encoder_layer_{layer}"
        for each in ("weight", "bias"):
            names |= {f"blocks.{layer}.{ours}.{each}": f"{block}.{theirs}.{each}" for ours, theirs in inner.items()}
            names[f"blocks.{layer}.attn.qkv.{each}"] = f"{block}.self_attention.in_proj_{each}"
    with torch.no_grad():
        state = load_file(Path(model) / "model.safetensors")
        built.load_state_dict({names[key]: value for key, value in state.items()})
    return torch_contestant(built, batch)


def vit_pytorch(model: str, batch: int) -> Built:
    from vit_pytorch import ViT

    return torch_contestant(ViT(**vit_pytorch_sizes(architecture(model))), batch, same=False)


def vit_pytorch_sizes(a: dict[str, Any]) -> dict[str, Any]:
    """An architecture as vit-pytorch's models take it."""
    return {
        "image_size": tuple(a["image_size"]),
        "patch_size": tuple(a["patch_size"]),
        "num_classes": a["num_classes"],
        "dim": a["width"],
        "depth": a["depth"],
        "heads": a["heads"],
        "mlp_dim": 4 * a["width"],
        "dim_head": a["width"] // a["heads"],
        "channels": a["in_channels"],
    }


def product(size: int) -> Built:
    """A product of two square float32 matrices, by torch or NumPy, whichever is faster: what the machine can do."""
    import time

    import numpy as np
    import torch

    left, right = torch.randn(2, size, size)
    out = torch.empty(size, size)
    left_array, right_array, out_array = left.numpy(), right.numpy(), out.numpy()
    both = [lambda: torch.mm(left, right, out=out), lambda: np.matmul(left_array, right_array, out=out_array)]
    taken = []
    for each in both:
        each()
        began = time.perf_counter()
        for _ in range(3):
            each()
        taken.append(time.perf_counter() - began)
    return both[taken.index(min(taken))], None


def architecture(model: str) -> dict[str, Any]:
    return json.loads((Path(model) / "config.json").read_text(encoding="ascii"))["vit"]["architecture"]


if __name__ == "__main__":
    # a module in this folder may bear a library's name
    del sys.path[0]
    here = (vit_torch, vit_onnx, timm, timm_compiled, transformers, torchvision, vit_pytorch, product)
    serve({builder.__name__: builder for builder in here})
