"""A step of training in a plain loop: normalise, forward, cross-entropy, backward, AdamW: a contestant of
`benchmarks/training_step.py`.

Data is there already, so that what is timed is the model, its gradients and the optimiser, as each library has them.
The answer is the loss of the first steps, from the same weights on the same images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forward import architecture, product, vit_pytorch_sizes
from served import serve

Built = tuple[Callable[[], Any], Callable[[], Any] | None]
RATE, DECAY = 1e-4, 0.05
STEPS = 3


def contestant(model: Any, optimizer: Any, batch: int, size: int, classes: int, same: bool = True) -> Built:
    """A loop over the same few batches; the losses of its first steps are kept, to be compared."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, batch, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (4, batch), generator=generator)
    model.train()
    losses: list[Any] = []

    def step() -> None:
        turn = len(losses) % 4
        out = model(images[turn].float().mul_(2 / 255).sub_(1))
        loss = F.cross_entropy(getattr(out, "logits", out), labels[turn])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    def answer() -> list[list[float]]:
        while len(losses) < STEPS:
            step()
        return [[float(loss) for loss in losses[:STEPS]]]

    return step, answer if same else None


def own(model: str, optimizer: str) -> tuple[Any, Any]:
    """This project's model, weights from the file, and its optimiser."""
    from safetensors.torch import load_file

    from vit.model import VisionTransformer
    from vit.training.optim import build_optimizer

    built = VisionTransformer(**architecture(model))
    built.load_state_dict(load_file(Path(model) / "model.safetensors"))
    return built, build_optimizer(built, name=optimizer, lr=RATE, weight_decay=DECAY)


def timms(model: str) -> tuple[Any, Any]:
    """timm's model, the same weights, and its own choice of AdamW."""
    import timm
    from timm.optim import create_optimizer_v2

    built = timm.create_model(f"local-dir:{model}", pretrained=True)
    return built, create_optimizer_v2(built, opt="adamw", lr=RATE, weight_decay=DECAY)


def vit(model: str, batch: int, size: int) -> Built:
    """This project's model and AdamW."""
    return contestant(*own(model, "adamw"), batch, size, architecture(model)["num_classes"])


def vit_muon(model: str, batch: int, size: int) -> Built:
    """The same with Muon, this project's default for small images: more arithmetic a step, fewer steps."""
    return contestant(*own(model, "muon"), batch, size, architecture(model)["num_classes"], same=False)


def timm(model: str, batch: int, size: int) -> Built:
    """timm's model and AdamW, in a plain loop."""
    return contestant(*timms(model), batch, size, architecture(model)["num_classes"])


def transformers(model: str, batch: int, size: int) -> Built:
    import torch
    from transformers import AutoModelForImageClassification

    built = AutoModelForImageClassification.from_pretrained(f"{model}-transformers")
    decays = [parameter for parameter in built.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in built.parameters() if parameter.ndim <= 1]
    groups = [{"params": decays, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    # tokens and positions have three axes and decay here, not in timm: the losses part by less than is asked
    return contestant(built, optimizer, batch, size, architecture(model)["num_classes"])


def vit_pytorch(model: str, batch: int, size: int) -> Built:
    """vit-pytorch's model of these sizes, with AdamW, as its documentation trains."""
    import torch
    from vit_pytorch import ViT

    a = architecture(model)
    built = ViT(**vit_pytorch_sizes(a))
    optimizer = torch.optim.AdamW(built.parameters(), lr=RATE, weight_decay=DECAY)
    return contestant(built, optimizer, batch, size, a["num_classes"], same=False)


if __name__ == "__main__":
    del sys.path[0]  # a module there may bear a library's name
    here = (vit, vit_muon, timm, transformers, vit_pytorch, product)
    serve({builder.__name__: builder for builder in here})
