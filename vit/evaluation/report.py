"""Evaluate a model on a split and write a folder of results.

`evaluate` has the steps in order.  Notes:

- a model stores what data it was trained on, so by default its own test split is opened again, with the same images;
- everything is computed before anything is written, and `metrics.json` is written last: if it exists, all files do;
- images of other sizes or channels go through the model's preprocessing; other classes are matched to the model's by
  name or refused.
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
from vit.evaluation.metrics import as_arrays, compute_outcomes, compute_reliability, evaluate_logits
from vit.evaluation.mistakes import find_mistakes, mistakes_figure, write_mistakes
from vit.files import write_json, write_text
from vit.inference.classifier import Classifier

if TYPE_CHECKING:
    from torch import nn

    from vit.inference.description import Description

FILES = ("metrics.json", "confusion.csv", "confusion.png", "reliability.png", "mistakes.csv", "mistakes.png")
"""Files that an evaluation writes into its folder."""

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
    """Evaluate `model` on a split and write the results.

    Args:
        model: a run folder, a `.ckpt`, a bundle folder or an `.onnx`.
        data: the data; None: the data that the model was trained on.  A dictionary gives some keys of `DataConfig`,
            see `data_config`.
        split: "test", "val" or "train".
        output: folder of the results; None: `default_output(model)`.
        batch_size: images in a batch; None: the data's `eval_batch_size`.
        device: "auto", "cpu", "cuda", "cuda:1".
        reduction: token reduction as one line, such as "merge:0.5"; None: the model's own.
        faithfulness: number of images to measure attention maps on, as "faithfulness" (see
            `vit.evaluation.faithful`); 0: none.
        given: images from Python, in place of those of `data`.

    Returns:
        The contents of `metrics.json`: the metrics under the split's name (`evaluate_logits` without the confusion
        matrix), "split", "model", "data", "bad_files", "at_training" (see `at_training`), "reliability" (the bins
        before and after temperature scaling), "seconds", "images_per_second", and "folder", the folder of the files.

    Raises:
        VitError: if the model or data cannot be used, the classes do not match, the split has no images, an image can
            no longer be read, or the folder cannot be written.
    """
    from vit.model.reduction import format_reduction

    if split not in SPLITS:
        raise VitError(f"split={split!r}: {did_you_mean(str(split), SPLITS)}")
    if batch_size is not None and batch_size < 1:
        raise VitError(f"batch_size={batch_size}: expected at least 1")
    scorer, description, model_device = _load_scorer(model, device, reduction)
    if given is not None:
        # the training images keep their splits, so the test split has none of them; of other images all are tested
        same_images = description.data.get("content") == given.content
        fractions = {} if same_images else {"test_fraction": 1.0}
        data = {**fractions, **_given_values(data), "name": MEMORY, "content": given.content}
    config = data_config(description, data)
    splits = trained_splits(model, description, config, None if given else data)
    opened = open_data(config, description.class_names, splits, given)
    images = opened.splits[split]
    if not len(images):
        raise VitError(_format_no_images(opened, split))
    folder = Path(output) if output is not None else default_output(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitError(f"output={folder}: cannot make this folder: {error.strerror or error}") from error

    started = time.perf_counter()
    logits, labels = as_arrays(
        *collect_logits(scorer, images, description.preprocessing, config, batch_size=batch_size, device=model_device)
    )
    seconds = time.perf_counter() - started
    names, temperature = description.class_names, description.temperature
    block = evaluate_logits(logits, labels, names, temperature)
    confusion = np.array(block.pop("confusion"))
    map_measures = None
    if faithfulness:
        from vit.evaluation.faithful import measure_faithfulness
        from vit.inference.loading import load_torch

        # an ONNX graph has no attention as output, so the weights are loaded
        network = load_torch(model, device=device, reduction=reduction)[0] if isinstance(scorer, Classifier) else scorer
        map_measures = measure_faithfulness(
            network, images, description.preprocessing, images=faithfulness, temperature=temperature
        )
    before, after = (compute_reliability(compute_outcomes(logits, labels, t)) for t in (1.0, temperature))
    mistakes = find_mistakes(logits, labels, temperature)

    write_confusion(folder / "confusion.csv", confusion, names)
    save_png(folder / "confusion.png", confusion_figure(confusion, names))
    save_png(folder / "reliability.png", reliability_figure(before, after, temperature))
    write_mistakes(folder / "mistakes.csv", mistakes, images, names)
    save_png(folder / "mistakes.png", mistakes_figure(mistakes, images, names))
    metrics = {
        split: block,
        "split": split,
        "model": os.fspath(model),
        "data": opened.source,
        "bad_files": len(opened.bad_files),
        # training measured with the model's own reduction
        "at_training": at_training(description, config, split) if reduction is None else None,
        **({} if reduction is None else {"reduction": format_reduction(description.architecture)}),
        "reliability": {"uncalibrated": before.rows(), "calibrated": after.rows()},
        **({} if map_measures is None else {"faithfulness": map_measures}),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(images) / seconds, 1),
        "folder": str(folder),
    }
    write_json(folder / "metrics.json", metrics)
    return metrics


def data_config(description: Description, data: DataConfig | Mapping[str, Any] | None) -> DataConfig:
    """Build the configuration of the data to evaluate on.

    For the same data set (no other name or root), keys that are missing or None have the values of training: so the
    splits are the same too, and no training image gets into the test.  For another data set they have that set's
    defaults.  Image size and channels are always the model's.

    Raises `VitError` when neither the model nor `data` names the data.
    """
    trained: dict[str, Any] = dict(description.data)
    preprocessing = description.preprocessing
    size = {"image_size": list(preprocessing.image_size), "channels": preprocessing.channels}
    if isinstance(data, DataConfig):
        return DataConfig.from_dict({**data.to_dict(), **size})
    given = _given_values(data)
    if not trained and "name" not in given:
        raise VitError(
            "the model does not say what data it was trained on: name some, such as data=folder data.root=photos"
        )
    same = given.get("name", trained.get("name")) == trained.get("name")
    moved = "name" in given and "root" in given and not _is_same_path(given["root"], trained.get("root"))
    moved = moved or ("content" in given and given["content"] != trained.get("content"))
    # data.root alone means that the same data has moved; together with data=folder it is another folder
    base = trained if same and not moved else {}
    base = {**base, "mean": None, "std": None}  # the model's preprocessing has them
    return DataConfig.from_dict({**base, **given, **size})


def trained_splits(
    model: str | os.PathLike[str], description: Description, config: DataConfig, data: Any = None
) -> Path | None:
    """Find the file of the splits that `model` was trained with.

    `data` is the data as the user gave it: `data.root` alone means that the data has moved.  Returns None if `config`
    is other data or splits it otherwise, or if the model is in no run folder.
    """
    folder = _run_folder(Path(os.path.abspath(model)))
    if folder is None or not (folder / FILE).is_file():
        return None
    changed = {key for key, value in config.to_dict().items() if value != description.data.get(key)} & _DECIDES_SPLIT
    moved = changed == {"root"} and not isinstance(data, DataConfig) and "name" not in (data or {})
    return folder / FILE if not changed or moved else None


def _given_values(data: DataConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """Select the values that are not None."""
    values = data.to_dict() if isinstance(data, DataConfig) else data or {}
    return {key: value for key, value in values.items() if value is not None}


def at_training(description: Description, config: DataConfig, split: str) -> dict[str, Any] | None:
    """Read the metrics that training measured on this split; None if `config` is not the training data.

    If they differ from those of now, the data has changed since: with a split made by seed, training images may now be
    test images.
    """
    trained: dict[str, Any] = description.metrics.get(split) or {}
    now = {key: value for key, value in config.to_dict().items() if key in _DECIDES_SPLIT}
    then = {key: value for key, value in description.data.items() if key in _DECIDES_SPLIT}
    metrics = {key: trained[key] for key in ("images", "top1", "loss") if isinstance(trained.get(key), int | float)}
    return metrics if now == then and {"images", "top1"} <= metrics.keys() else None


def default_output(model: str | os.PathLike[str]) -> Path:
    """Choose the folder of the results: `evaluation/` in the model's run folder, else `./evaluation/<its name>`."""
    path = Path(os.path.abspath(model))
    if (folder := _run_folder(path)) is not None:
        return Path(os.path.relpath(folder)) / "evaluation" if _is_below_cwd(folder) else folder / "evaluation"
    name = (path.stem if path.is_file() else path.name) if path.exists() else os.fspath(model)
    return Path("evaluation") / (name.replace(os.sep, "_").replace(":", "_").strip(". ") or "model")


def _run_folder(path: Path) -> Path | None:
    """Find the run folder of a model: of RUN, RUN/model, RUN/model/model.onnx, RUN/checkpoints/best.ckpt."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
            inside = path.exists() and (folder == path or path.relative_to(folder).parts[0] in ("checkpoints", "model"))
            return folder if inside else None
    return None


def write_confusion(path: str | os.PathLike[str], confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """Write counts as CSV: a row for each true class, a column for each predicted one; names come first."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["true \\ predicted", *class_names])
    for name, row in zip(class_names, confusion.tolist(), strict=True):
        table.writerow([name, *row])
    write_text(path, text.getvalue())


def _load_scorer(
    model: str | os.PathLike[str], device: str, reduction: str | None
) -> tuple[nn.Module | Classifier, Description, Any]:
    """Load what computes logits, its description and its device."""
    from vit.inference.bundle import WEIGHTS
    from vit.inference.loading import load, load_torch, locate

    resolved = locate(model)
    bundle = resolved.bundle
    without_weights = resolved.kind == "onnx" or (bundle is not None and not (bundle / WEIGHTS).is_file())
    if without_weights and reduction is None:
        classifier = load(model, device=device, backend="onnx")
        return classifier, classifier.description, "cpu"
    network, description = load_torch(model, device=device, reduction=reduction)
    return network, description, next(network.parameters()).device


def _format_no_images(data: ImageData, split: str) -> str:
    others = [f"split={name} has {len(data.splits[name]):,}" for name in SPLITS if len(data.splits[name])]
    return f"data={data.name} has no {split} images; {', '.join(others)}"


def _is_same_path(one: Any, other: Any) -> bool:
    return other is not None and os.path.realpath(os.path.expanduser(one)) == os.path.realpath(other)


def _is_below_cwd(folder: Path) -> bool:
    return folder.is_relative_to(Path.cwd())
