"""A plain Lightning loop, such as a tutorial has: a contestant of `benchmarks/race.py`.

torchvision's transforms and its `VisionTransformer`, a `DataLoader`, a `LightningModule` with AdamW, a `Trainer`
without logger, checkpoints or progress bar.  It starts from what Lightning's own tutorial on vision transformers does
on CIFAR-10: AdamW at 3e-4, batches of 128, dropout of 0.2, slight crops, gradients clipped at 1, a class token, a rate
that falls to a tenth and to a hundredth late.  The rest is for the search: rates, batches, a cosine, mean pooling.
"""

from __future__ import annotations

import math
from typing import Any

from course import Course, Data, contend, transforms

RATIO = (0.9, 1.1)


def build(c: dict[str, Any], a: dict[str, Any]) -> Any:
    """torchvision's model, for as many channels as the images have, with one more way of pooling."""
    import torch
    from torchvision.models import VisionTransformer

    class Model(VisionTransformer):
        def forward(self, x: Any) -> Any:
            if c["pool"] == "token":
                return super().forward(x)
            tokens = self._process_input(x)
            token = self.class_token.expand(len(tokens), -1, -1)
            return self.heads(self.encoder(torch.cat([token, tokens], dim=1))[:, 1:].mean(dim=1))

    patch, width = a["patch_size"][0], a["width"]
    model = Model(
        image_size=a["image_size"][0],
        patch_size=patch,
        num_layers=a["depth"],
        num_heads=a["heads"],
        hidden_dim=width,
        mlp_dim=4 * width,
        dropout=c["dropout"],
        num_classes=a["num_classes"],
    )
    if a["in_channels"] != 3:
        model.conv_proj = torch.nn.Conv2d(a["in_channels"], width, patch, stride=patch)
    return model


def train(given: dict[str, Any]) -> dict[str, Any]:
    import lightning as L
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader

    data, c = Data(given["data"]), given["choices"]
    L.seed_everything(given["seed"], workers=True, verbose=False)
    model = build(c, data.about["architecture"])
    course = Course(model, data, given)

    def factor(_: int) -> float:
        if c["schedule"] == "cosine":
            return (1 + math.cos(math.pi * course.progress)) / 2
        # the tutorial's: a tenth after 100 of 180 epochs, a hundredth after 150
        return 1.0 if course.progress < 100 / 180 else 0.1 if course.progress < 150 / 180 else 0.01

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=c["lr"])
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            course.passed(len(batch[0]))
            trainer.should_stop = course.over

    class Watched:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Any:
            return course.watched(self.loader)

        def __len__(self) -> int:
            return len(self.loader)

    loader = DataLoader(
        data.dataset(transforms(data, c["crop"], RATIO)),
        batch_size=c["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=c["workers"],
        persistent_workers=c["workers"] > 0,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        gradient_clip_val=c["clip"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch()],
    )
    trainer.fit(Module(), Watched(loader))
    return course.result()


if __name__ == "__main__":
    contend(train)
