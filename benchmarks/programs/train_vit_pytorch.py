"""vit-pytorch's documented recipe: a contestant of `benchmarks/race.py`.

Its README shows how its models are built, and its notebook `examples/cats_and_dogs.ipynb` how one is trained:
torchvision's transforms, a `DataLoader`, Adam at 3e-5 in batches of 64, cross-entropy, and a rate that is multiplied by
0.7 after each of twenty epochs; here, of twentieths of the budget.  The rest is for the search: its other small models,
with mean pooling, QK norm and PatchDropout, and a cosine.
"""

from __future__ import annotations

import math
from typing import Any

from course import Course, Data, contend, transforms
from forward import vit_pytorch_sizes


def build(kind: str, patch_dropout: float, a: dict[str, Any]) -> Any:
    """The model `kind`, of the sizes of `a`: "ViT", "ViT mean", "SimpleViT" or "SimpleViT QK norm"."""
    from vit_pytorch import SimpleViT, ViT
    from vit_pytorch.simple_vit_with_patch_dropout import SimpleViT as SimpleViTDropout
    from vit_pytorch.simple_vit_with_qk_norm import SimpleViT as SimpleViTNorm
    from vit_pytorch.vit_with_patch_dropout import ViT as ViTDropout

    same = vit_pytorch_sizes(a)
    name, _, more = kind.partition(" ")
    dropped = {"patch_dropout": patch_dropout} if patch_dropout else {}
    if name == "ViT":
        pool = {"pool": more or "cls"}
        return ViTDropout(**same, **pool, **dropped) if dropped else ViT(**same, **pool)
    if more:
        return SimpleViTNorm(**same)
    return SimpleViTDropout(**same, **dropped) if dropped else SimpleViT(**same)


def train(given: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader

    data, c = Data(given["data"]), given["choices"]
    torch.manual_seed(given["seed"])
    model = build(c["model"], c["patch_dropout"], data.about["architecture"])
    dataset = data.dataset(transforms(data, c["crop"]))
    loader = DataLoader(dataset, batch_size=c["batch_size"], shuffle=True, num_workers=c["workers"])
    optimizer = torch.optim.Adam(model.parameters(), lr=c["lr"])
    course = Course(model, data, given)
    for images, labels in course.batches(loader):
        step = 0.7 ** int(20 * course.progress)
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * course.progress)) / 2
            group["lr"] = c["lr"] * (step if c["schedule"] == "step" else cosine)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return course.result()


if __name__ == "__main__":
    contend(train)
