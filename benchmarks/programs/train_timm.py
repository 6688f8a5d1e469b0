"""timm's train.py in a loop: a contestant of `benchmarks/race.py`.

timm's own script is in its repository alone, neither in its wheel nor in its sdist.  So this is written after it, of
the same parts in the same order: `create_loader` with the prefetcher, its transforms and worker processes,
`create_model`, `create_optimizer_v2`, `create_scheduler_v2` stepped on updates, `LabelSmoothingCrossEntropy`, or
`FastCollateMixup` with `SoftTargetCrossEntropy`.  Options bear the script's names.

Where it differs, it is to timm's advantage: the scheduler's updates are those of the time that is left, so that its end
is the budget's, and Muon is kept from tokens, positions, the embedding of patches and the head (`--opt-kwargs`).
"""

from __future__ import annotations

from typing import Any

from course import Course, Data, contend

UPDATES = 100_000
"""Into how many the scheduler's whole is cut."""


def train(given: dict[str, Any]) -> dict[str, Any]:
    import torch
    from timm.data import FastCollateMixup, create_loader
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    from timm.models import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import random_seed

    data, c = Data(given["data"]), given["choices"]
    a = data.about["architecture"]
    random_seed(given["seed"], 0)
    model = create_model(
        "vit_tiny_patch16_224",
        img_size=tuple(a["image_size"]),
        patch_size=tuple(a["patch_size"]),
        in_chans=a["in_channels"],
        num_classes=data.classes,
        embed_dim=a["width"],
        depth=a["depth"],
        num_heads=a["heads"],
        global_pool=c["gp"],
        class_token=c["gp"] == "token",
        qk_norm=c["qk_norm"],
        patch_drop_rate=c["patch_drop"],
    )
    muon: dict[str, Any] = {"fallback_list": ["patch_embed.*", "head.*"], "fallback_no_weight_decay": True}
    muon["fallback_lr_scale"] = c["fallback_lr_scale"]
    optimizer = create_optimizer_v2(
        model, opt=c["opt"], lr=c["lr"], weight_decay=c["weight_decay"], **(muon if "muon" in c["opt"] else {})
    )
    mixup = FastCollateMixup(c["mixup"], label_smoothing=c["smoothing"], num_classes=data.classes)
    loader = create_loader(
        data.dataset(),
        input_size=(a["in_channels"], *a["image_size"]),
        batch_size=c["batch_size"],
        is_training=True,
        scale=c["scale"],
        ratio=c["ratio"],
        color_jitter=c["color_jitter"],
        interpolation="random",
        mean=data.mean,
        std=data.std,
        num_workers=c["workers"],
        collate_fn=mixup if c["mixup"] else None,
        device=torch.device("cpu"),
    )
    criterion = SoftTargetCrossEntropy() if c["mixup"] else LabelSmoothingCrossEntropy(c["smoothing"])
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=c["sched"],
        num_epochs=1,
        warmup_epochs=c["warmup"],
        warmup_lr=1e-5,
        step_on_epochs=False,
        updates_per_epoch=UPDATES,
    )
    course = Course(model, data, given)
    model.train()
    for images, targets in course.batches(loader):
        scheduler.step_update(int(course.progress * UPDATES))
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return course.result()


if __name__ == "__main__":
    contend(train)
