"""A run folder as training leaves it, made in a few seconds: a small model of the digits."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoint and bundle of a model that is right about most digits.  Copy it to write in it."""
    import torch

    from vit.data.augment import normalise
    from vit.data.catalogue import DataConfig, open_data, preprocessing_for
    from vit.data.loaders import eval_loader
    from vit.evaluation import collect_logits, evaluate_logits, fit_temperature, scalars
    from vit.inference.bundle import write_bundle
    from vit.inference.description import Description
    from vit.model import VisionTransformer

    config = DataConfig(name="digits", image_size=8)
    data = open_data(config)
    preprocessing = preprocessing_for(config, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(image_size=8, patch_size=4, in_channels=1, num_classes=10, width=48, depth=1, heads=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(8):
            for batch in eval_loader(data.splits["train"], preprocessing, DataConfig(eval_batch_size=128)):
                images = normalise(batch.images, preprocessing.mean, preprocessing.std)
                torch.nn.functional.cross_entropy(model(images), batch.labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    description = Description(model.architecture, data.class_names, preprocessing, data=data.source)
    for name in ("val", "test"):
        logits, labels = collect_logits(model, data.splits[name], preprocessing, config)
        if name == "val":
            description.temperature = fit_temperature(logits, labels)
        block = scalars(evaluate_logits(logits, labels, data.class_names, description.temperature))
        description.metrics[name] = block

    run = tmp_path_factory.mktemp("runs") / "digits" / "2026-01-01_10-00-00"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    checkpoint = {"state_dict": weights, "vit": {**description.to_dict(), "weights_prefix": "model."}}
    torch.save(checkpoint, run / "checkpoints" / "best.ckpt")
    write_bundle(run / "model", model.eval(), description, onnx=True)
    return run
