"""One evaluation, whole: a model, a split, and a folder of results.

Read `evaluate` for the order of things.  Notable:

- a model says itself what data it was trained on, so by default its own test split is opened again, the very same
  images;
- everything is computed before anything is written, and `metrics.json` is written last: where it is, the rest is;
- a data set of other sizes or channels goes through the model's own preprocessing, one of other classes is matched to
  the model's by name or refused.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vit.data.catalogue import DataConfig, open_data
from vit.data.dataset import SPLITS, ImageData
from vit.data.memory import NAME as MEMORY
from vit.data.memory import Gathered
from vit.data.run_splits import FILE
from vit.errors import VitError, did_you_mean
from vit.evaluation.collect import collect_logits
from vit.evaluation.figures import confusion_figure, reliability_figure, save_png
from vit.evaluation.metrics import as_arrays, evaluate_logits, outcomes, reliability
from vit.evaluation.mistakes import find_mistakes, mistakes_figure, write_mistakes
from vit.files import write_json, write_text
from vit.inference.classifier import Classifier

if TYPE_CHECKING:
    from torch import nn

    from vit.inference.description import Description

FILES = ("metrics.json", "confusion.csv", "confusion.png", "reliability.png", "mistakes.csv", "mistakes.png")
"""What an evaluation leaves in its folder."""

_DECIDES_SPLIT = frozenset(
    {"name", "root", "val_fraction", "test_fraction", "split_seed", "max_images", "kinds", "objects", "clutter"}
    | {"object_scale", "train_images", "val_images", "test_images", "image_column", "label_column", "content"}
)


def evaluate(
    model: str | os.PathLike[str],
    data: DataConfig | Mapping[str, Any] | None = None,
    *,
    split: str = "test",
    output: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    reduction: str | None = None,
    faithfulness: int = 0,
    given: Gathered | None = None,
) -> dict[str, Any]:
    """Evaluate `model` on a split and write what came of it.

    Args:
        model: a run folder, a `.ckpt`, a bundle folder or an `.onnx`.
        data: which data; None: what the model was trained on.  A dictionary gives some keys of `DataConfig`, see
            `data_config`.
        split: "test", "val" or "train".
        output: folder of the results; None: `default_output(model)`.
        batch_size: images at a time; None: the data's `eval_batch_size`.
        device: "auto", "cpu", "cuda", "cuda:1".
        reduction: fewer tokens, as one line such as "merge:0.5"; None: as the model has it.
        faithfulness: measure attention maps on this many images of the split, as "faithfulness" (see
            `vit.evaluation.faithful`); 0: not.

    Returns:
        What `metrics.json` holds: the figures under the split's name (`evaluate_logits` without the confusion matrix),
        and "split", "model", "data", "bad_files", "at_training" (see `at_training`), "reliability" (the bins before
        and after temperature), "seconds", "images_per_second", and "folder", where the files are.

    Raises:
        VitError: a model or data that cannot be used, classes that do not match, a split without images, an image
            that can no longer be read, a folder that cannot be written.
    """
    from vit.model.reduction import spell

    if split not in SPLITS:
        raise VitError(f"split={split!r}: {did_you_mean(str(split), SPLITS)}")
    if batch_size is not None and batch_size < 1:
        raise VitError(f"batch_size={batch_size}: expected at least 1")
    scorer, description, where = _load(model, device, reduction)
    if given is not None:
        # the images trained on keep their splits, so the test has none of those; of others all are the test
        own = description.data.get("content") == given.content
        data = {**({} if own else {"test_fraction": 1.0}), **_given(data), "name": MEMORY, "content": given.content}
    config = data_config(description, data)
    splits = trained_splits(model, description, config, None if given else data)
    opened = open_data(config, description.class_names, splits, given)
    chosen = opened.splits[split]
    if not len(chosen):
        raise VitError(_empty(opened, split))
    folder = Path(output) if output is not None else default_output(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitError(f"output={folder}: cannot make this folder: {error.strerror or error}") from error

    started = time.perf_counter()
    logits, labels = as_arrays(
        *collect_logits(scorer, chosen, description.preprocessing, config, batch_size=batch_size, device=where)
    )
    seconds = time.perf_counter() - started
    names, temperature = description.class_names, description.temperature
    block = evaluate_logits(logits, labels, names, temperature)
    confusion = np.array(block.pop("confusion"))
    measured = None
    if faithfulness:
        from vit.evaluation.faithful import measure_faithfulness
        from vit.inference.loading import load_torch

        # of an ONNX file the weights, since its graph does not give its attention away
        network = load_torch(model, device=device, reduction=reduction)[0] if isinstance(scorer, Classifier) else scorer
        measured = measure_faithfulness(
            network, chosen, description.preprocessing, images=faithfulness, temperature=temperature
        )
    before, after = (reliability(outcomes(logits, labels, t)) for t in (1.0, temperature))
    mistakes = find_mistakes(logits, labels, temperature)

    write_confusion(folder / "confusion.csv", confusion, names)
    save_png(folder / "confusion.png", confusion_figure(confusion, names))
    save_png(folder / "reliability.png", reliability_figure(before, after, temperature))
    write_mistakes(folder / "mistakes.csv", mistakes, chosen, names)
    save_png(folder / "mistakes.png", mistakes_figure(mistakes, chosen, names))
    metrics = {
        split: block,
        "split": split,
        "model": os.fspath(model),
        "data": opened.source,
        "bad_files": len(opened.bad_files),
        # what training measured was measured with the reduction that the model has
        "at_training": at_training(description, config, split) if reduction is None else None,
        **({} if reduction is None else {"reduction": spell(description.architecture)}),
        "reliability": {"uncalibrated": before.rows(), "calibrated": after.rows()},
        **({} if measured is None else {"faithfulness": measured}),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(chosen) / seconds, 1),
        "folder": str(folder),
    }
    write_json(folder / "metrics.json", metrics)
    return metrics


def data_config(description: Description, data: DataConfig | Mapping[str, Any] | None) -> DataConfig:
    """Which data to evaluate on.

    Keys that are not given, or None, are those that the model was trained with, as long as it is the same data set
    (no other name or root): so its splits are the same too, and no training image gets into the test.  Of another data
    set they are that set's own.  Size and channels are always the model's.

    Raises `VitError` when the model does not say what it was trained on and `data` does not name any.
    """
    trained: dict[str, Any] = dict(description.data)
    preprocessing = description.preprocessing
    size = {"image_size": list(preprocessing.image_size), "channels": preprocessing.channels}
    if isinstance(data, DataConfig):
        return DataConfig.from_dict({**data.to_dict(), **size})
    given = _given(data)
    if not trained and "name" not in given:
        raise VitError(
            "the model does not say what data it was trained on: name some, such as data=folder data.root=photos"
        )
    same = given.get("name", trained.get("name")) == trained.get("name")
    moved = "name" in given and "root" in given and not _same_path(given["root"], trained.get("root"))
    moved = moved or ("content" in given and given["content"] != trained.get("content"))
    # data.root alone says that the same data has moved; with data=folder beside it, it is another folder
    base = trained if same and not moved else {}
    for key in ("mean", "std"):
        # they belong to the model's preprocessing, which has them
        base = {**base, key: None}
    return DataConfig.from_dict({**base, **given, **size})


def trained_splits(
    model: str | os.PathLike[str], description: Description, config: DataConfig, data: Any = None
) -> Path | None:
    """The file that says which image was in which split, where `config` is the data that `model` was trained on.

    `data` is what was given for it: `data.root` alone says that the data has moved.  None where it is other data, or
    cut otherwise, or the model lies in no run folder.
    """
    folder = _run_folder(Path(os.path.abspath(model)))
    if folder is None or not (folder / FILE).is_file():
        return None
    differ = {key for key, value in config.to_dict().items() if value != description.data.get(key)} & _DECIDES_SPLIT
    moved = differ == {"root"} and not isinstance(data, DataConfig) and "name" not in (data or {})
    return folder / FILE if not differ or moved else None


def _given(data: DataConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys that were given."""
    values = data.to_dict() if isinstance(data, DataConfig) else data or {}
    return {key: value for key, value in values.items() if value is not None}


def at_training(description: Description, config: DataConfig, split: str) -> dict[str, Any] | None:
    """The figures that training measured on this very split; None where `config` is not the data trained on.

    Where they differ from what is measured now, the data has changed since: images came or went, and with a split made
    by seed some that were trained on may now be tested on.
    """
    trained: dict[str, Any] = description.metrics.get(split) or {}
    ours = {key: value for key, value in config.to_dict().items() if key in _DECIDES_SPLIT}
    theirs = {key: value for key, value in description.data.items() if key in _DECIDES_SPLIT}
    figures = {key: trained[key] for key in ("images", "top1", "loss") if isinstance(trained.get(key), int | float)}
    return figures if ours == theirs and {"images", "top1"} <= figures.keys() else None


def default_output(model: str | os.PathLike[str]) -> Path:
    """Where results go: `evaluation/` in the run folder that the model is, or is in; else `./evaluation/<its name>`."""
    path = Path(os.path.abspath(model))
    if (folder := _run_folder(path)) is not None:
        return Path(os.path.relpath(folder)) / "evaluation" if _below(folder) else folder / "evaluation"
    name = (path.stem if path.is_file() else path.name) if path.exists() else os.fspath(model)
    return Path("evaluation") / (name.replace(os.sep, "_").replace(":", "_").strip(". ") or "model")


def _run_folder(path: Path) -> Path | None:
    """The run folder that a model is, or is in: RUN, RUN/model, RUN/model/model.onnx, RUN/checkpoints/best.ckpt."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
            inside = path.exists() and (folder == path or path.relative_to(folder).parts[0] in ("checkpoints", "model"))
            return folder if inside else None
    return None


def write_confusion(path: str | os.PathLike[str], confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Write counts as CSV: a row for each true class, a column for each predicted one, names in the first of each."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["true \\ predicted", *class_names])
    for name, row in zip(class_names, confusion.tolist(), strict=True):
        table.writerow([name, *row])
    write_text(path, text.getvalue())


def _load(
    model: str | os.PathLike[str], device: str, reduction: str | None
) -> tuple[nn.Module | Classifier, Description, Any]:
    """What gives logits, what it says of itself, and the device that it is on."""
    from vit.inference.bundle import WEIGHTS
    from vit.inference.loading import load, load_torch, locate

    found = locate(model)
    without_weights = found.kind == "onnx" or (found.bundle is not None and not (found.bundle / WEIGHTS).is_file())
    if without_weights and reduction is None:
        classifier = load(model, device=device, backend="onnx")
        return classifier, classifier.description, "cpu"
    network, description = load_torch(model, device=device, reduction=reduction)
    return network, description, next(network.parameters()).device


def _empty(data: ImageData, split: str) -> str:
    others = [f"split={name} has {len(data.splits[name]):,}" for name in SPLITS if len(data.splits[name])]
    return f"data={data.name} has no {split} images; {', '.join(others)}"


def _same_path(one: Any, other: Any) -> bool:
    return other is not None and os.path.realpath(os.path.expanduser(one)) == os.path.realpath(other)


def _below(folder: Path) -> bool:
    return folder.is_relative_to(Path.cwd())
