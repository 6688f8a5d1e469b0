"""A plain loop of timm's model and AdamW on the handwritten digits: a contestant of `benchmarks/busy.py`.

Prints images a second over so many epochs as the command line says.  The model has the size of `python train.py`'s
default; the images are in memory, normalised and not augmented.
"""

from __future__ import annotations

import sys
import time


def main(epochs: int) -> float:
    import torch
    from sklearn.datasets import load_digits
    from timm.models import create_model
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear")
    images, labels = ((images - images.mean()) / images.std())[:1438], torch.tensor(digits.target)[:1438]
    shape = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
    model = create_model("vit_tiny_patch16_224", num_classes=10, **shape)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    began = time.perf_counter()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(128):
            loss = torch.nn.functional.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return epochs * len(images) / (time.perf_counter() - began)


if __name__ == "__main__":
    print(main(int(sys.argv[1])))
