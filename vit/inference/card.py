"""The README.md of a bundle: a model card made from the model's description.

Notable: everything that came from outside (class names, data set names, recipe values) is shown as data, in fenced
JSON on a line of its own, where no character can end the fence, start markup or hide.
"""

from __future__ import annotations

import json
import math
from typing import Any

from vit.data.decode import printable
from vit.inference.description import Description, plain
from vit.inference.timm_config import timm_obstacle

_MOST_NAMES = 200
_FIGURES = {
    "top1": ("top-1 accuracy", "share"),
    "top5": ("top-5 accuracy", "share"),
    "loss": ("cross-entropy", "number"),
    "ece": ("expected calibration error", "share"),
    "ece_uncalibrated": ("the same before temperature scaling", "share"),
}


def model_card(description: Description, *, parameters: int, onnx: bool) -> str:
    """Markdown with YAML front matter, as model hubs read it.

    `parameters`: how many numbers the weights are; `onnx`: whether the bundle has a `model.onnx`.
    """
    a = description.architecture
    obstacle = timm_obstacle(a)
    height, width = a["image_size"]
    count = len(description.class_names)
    parts = [
        _front_matter(obstacle),
        f"# Vision Transformer, {count} classes",
        f"An image classifier: images of {height} x {width} pixels (height x width), {a['in_channels']} channels, cut "
        f"into patches of {a['patch_size'][0]} x {a['patch_size'][1]}; {a['depth']} blocks of width {a['width']} with "
        f"{a['heads']} heads; {parameters:,} parameters.",
        "## Use",
        *_use(obstacle, onnx),
        "## Data",
        *_data(description),
        "## Recipe",
        *_recipe(description),
        "## Figures",
        *_figures(description.metrics),
        "## Calibration",
        _calibration(description),
        "## Intended use and limits",
        _limits(),
        "## Preprocessing and architecture",
        _fenced({"preprocessing": description.preprocessing.to_dict(), "architecture": a}),
        "## Classes",
        _classes(description.class_names),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(obstacle: str | None) -> str:
    tags = ["image-classification", "vision-transformer"] + (["timm"] if obstacle is None else [])
    lines = ["---", "pipeline_tag: image-classification", f"library_name: {'timm' if obstacle is None else 'vit'}"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _use(obstacle: str | None, onnx: bool) -> list[str]:
    parts = [
        "With `vit`, from a shell and from Python (`FOLDER` is where this file is):",
        "```\nvit classify FOLDER photo.jpg\n```\n\n"
        '```python\nimport vit\n\nresults = vit.load("FOLDER").classify(["photo.jpg"])\n```',
    ]
    if obstacle is None:
        parts += [
            "With timm, which builds the same model from `config.json` and `model.safetensors`:",
            '```python\nimport timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n```',
        ]
    else:
        parts.append(f"timm cannot load this model: its VisionTransformer has no counterpart for {obstacle}.")
    if onnx:
        parts += [
            "With ONNX Runtime alone (`images` float32 (B, C, H, W), prepared as below; the class names are in the "
            "file's metadata entry `vit`):",
            "```python\nimport onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("FOLDER/model.onnx")\n'
            '(logits,) = session.run(["logits"], {"image": images})\n```',
        ]
    else:
        parts.append("There is no `model.onnx` in this folder; `vit export FOLDER model.onnx` writes one.")
    return parts


def _data(description: Description) -> list[str]:
    data = plain(description.data)
    if not data.get("name"):
        return ["Not recorded."]
    # where the data lay on the machine that trained is nobody's business
    shown = {
        key: value for key, value in data.items() if value is not None and key not in ("root", "workers", "download")
    }
    return ["Trained on the data set of this name, opened with these settings:", _fenced(shown)]


def _recipe(description: Description) -> list[str]:
    if not description.training:
        return ["Not recorded."]
    return [_fenced(plain(description.training))]


def _figures(metrics: dict[str, Any]) -> list[str]:
    blocks = {name: block for name, block in metrics.items() if isinstance(block, dict) and _cells(block)}
    if not blocks:
        return ["None were measured."]
    rows = ["| | " + " | ".join(_cell(name) for name in blocks) + " |", "|---" * (len(blocks) + 1) + "|"]
    for key, (name, kind) in _FIGURES.items():
        values = [_figure(block.get(key), kind) for block in blocks.values()]
        if any(values):
            rows.append(f"| {name} | " + " | ".join(value or "-" for value in values) + " |")
    note = "Validation figures chose the checkpoint and fitted the temperature; test figures were measured once, after."
    return ["\n".join(rows), note] if {"val", "test"} <= set(blocks) else ["\n".join(rows)]


def _cells(block: dict[str, Any]) -> bool:
    return any(_figure(block.get(key), kind) for key, (_, kind) in _FIGURES.items())


def _figure(value: Any, kind: str) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return ""
    return f"{value:.2%}" if kind == "share" else f"{value:.4f}"


def _calibration(description: Description) -> str:
    if description.temperature == 1.0:
        return "Probabilities are softmax(logits): no temperature was fitted (temperature 1)."
    return (
        f"Probabilities are softmax(logits / {description.temperature:.4f}); the temperature was fitted on validation "
        'data (Guo et al. 2017, "On Calibration of Modern Neural Networks"). timm and ONNX give the logits before it.'
    )


def _limits() -> str:
    lines = [
        "- Meant for images like those it was trained on, of the classes below. It knows no others: whatever the image "
        "shows, the answer is one of them.",
        "- Its probabilities are calibrated on data of the same kind at best; elsewhere they say little.",
        "- The figures above are means over all images: single classes and groups may fare worse. Measure it on your "
        "own images (`python eval.py checkpoint=FOLDER data=folder data.root=...`) before anything depends on it.",
        "- It has not been examined for bias, nor for decisions about people.",
    ]
    return "\n".join(lines)


def _classes(names: list[str]) -> str:
    lines = [
        f"{index} {printable(json.dumps(name, ensure_ascii=False))}" for index, name in enumerate(names[:_MOST_NAMES])
    ]
    if len(names) > _MOST_NAMES:
        lines.append(f"and {len(names) - _MOST_NAMES} more, in config.json")
    return "```\n" + "\n".join(lines) + "\n```"


def _fenced(value: Any) -> str:
    """As JSON in a code fence: strings are quoted and on one line, so none can begin a line with backticks."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False)
    return "```json\n" + "\n".join(printable(line) for line in text.split("\n")) + "\n```"


def _cell(text: str) -> str:
    kept = "".join(char if char.isalnum() or char in " -_." else " " for char in printable(text))
    return " ".join(kept.split())
