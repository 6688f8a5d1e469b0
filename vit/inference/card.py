"""Make the model card, the README.md of a bundle, from the model's description.

Notes:
- All text from outside (class names, data set names, recipe values) is in fenced JSON on separate lines, where no
  character can end the fence, start markup or hide.
- Paths of the training machine are shortened to the last name.
- The Hugging Face hub reads the front matter (https://huggingface.co/docs/hub/model-cards): library, task, metrics,
  and the accuracy on the test split as `model-index`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from vit.data.catalogue import CATALOGUE, DataConfig
from vit.data.decode import printable
from vit.inference.description import Description, plain, without_folders
from vit.inference.timm_config import timm_obstacle
from vit.options import list_keys

_MARK = "<!-- Made by vit ({}); as long as nobody edits it, vit push makes it again. -->"
_MAX_NAMES = 200
_MACHINE_KEYS = ("root", "workers", "download", "resident", "cache")
_TIMM_NAME = re.compile(r"(?:timm/)?((?:vit|deit)\w*_patch\d\w*\.\w+)(?:@.*)?", re.ASCII)
_HUB_NAME = re.compile(r"hf[-_]hub:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@.*)?", re.ASCII)
_FIGURES = {
    "top1": ("top-1 accuracy", "share"),
    "top5": ("top-5 accuracy", "share"),
    "loss": ("cross-entropy", "number"),
    "ece": ("expected calibration error", "share"),
    "ece_uncalibrated": ("the same before temperature scaling", "share"),
}


def model_card(description: Description, *, parameters: int, onnx: bool, repo: str | None = None) -> str:
    """Make the model card: Markdown with YAML front matter, as model hubs read it.

    Args:
        description: the description of the model.
        parameters: the number of parameters.
        onnx: whether the bundle has a `model.onnx`.
        repo: the repository on the hub; None for a folder.
    """
    a = description.architecture
    obstacle = timm_obstacle(a)
    height, width = a["image_size"]
    count = len(description.class_names)
    parts = [
        _front_matter(description, obstacle, repo),
        f"# Vision Transformer, {count} classes",
        f"An image classifier: images of {height} x {width} pixels (height x width), {a['in_channels']} channels, cut "
        f"into patches of {a['patch_size'][0]} x {a['patch_size'][1]}; {a['depth']} blocks of width {a['width']} with "
        f"{a['heads']} heads; {parameters:,} parameters.",
        "## Use",
        *_use(obstacle, onnx, repo),
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
    text = "\n\n".join(parts) + "\n"
    return f"{text}\n{_MARK.format(_digest(text))}\n"


def is_generated(text: str) -> bool:
    """Check whether a card of `model_card`, of any version, is unchanged."""
    body, _, mark = text.removesuffix("\n").rpartition("\n\n")
    return mark == _MARK.format(_digest(f"{body}\n"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _front_matter(description: Description, obstacle: str | None, repo: str | None) -> str:
    """Format the YAML front matter; text from outside is quoted as ASCII JSON, which is valid YAML."""
    tags = ["image-classification", "vision-transformer", "vit"] + (["timm"] if obstacle is None else [])
    lines = ["---", "pipeline_tag: image-classification", f"library_name: {'timm' if obstacle is None else 'vit'}"]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    base = _base(description.training.get("pretrained"))
    if base:
        lines.append(f"base_model: {base}")
    test = description.metrics.get("test")
    top1 = test.get("top1") if isinstance(test, dict) else None
    lines += ["metrics:", "- accuracy"]
    if _figure(top1, "share"):
        data = str(description.data.get("name") or "not named")
        lines += [
            "model-index:",
            f"- name: {json.dumps(repo.split('/')[-1] if repo else 'Vision Transformer')}",
            "  results:",
            "  - task: {type: image-classification}",
            f"    dataset: {{name: {json.dumps(data)}, type: {json.dumps(data)}, split: test}}",
            f"    metrics: [{{type: accuracy, value: {top1:.6f}}}]",
        ]
    return "\n".join([*lines, "---"])


def _base(pretrained: Any) -> str | None:
    """Find the hub's repository of the pretrained weights; None if they came from elsewhere."""
    table = pretrained if isinstance(pretrained, dict) else {}
    name = table.get("weights") or table.get("name")
    if not isinstance(name, str):
        return None
    if found := _TIMM_NAME.fullmatch(name):
        return f"timm/{found[1]}"
    found = _HUB_NAME.fullmatch(name)
    return found[1] if found else None


def _use(obstacle: str | None, onnx: bool, repo: str | None) -> list[str]:
    model = f"hf-hub:{repo}" if repo else "FOLDER"
    where = "" if repo else " (`FOLDER` is where this file is)"
    parts = [
        f"With `vit`, from a shell and from Python{where}:",
        f"```\nvit classify {model} photo.jpg\n```\n\n"
        f'```python\nimport vit\n\nresults = vit.load("{model}").classify(["photo.jpg"])\n```',
    ]
    if obstacle is None:
        name = model if repo else "local-dir:FOLDER"
        parts += [
            "With timm, which builds the same model from `config.json` and `model.safetensors`:",
            f'```python\nimport timm\n\nmodel = timm.create_model("{name}", pretrained=True).eval()\n```',
        ]
    else:
        parts.append(f"timm cannot load this model: its VisionTransformer has no counterpart for {obstacle}.")
    if onnx:
        fetch = (
            f'from huggingface_hub import hf_hub_download\n\nfile = hf_hub_download("{repo}", "model.onnx")\n'
            if repo
            else '\nfile = "FOLDER/model.onnx"\n'
        )
        parts += [
            "With ONNX Runtime alone (`images` float32 (B, C, H, W), prepared as below; the class names are in the "
            "file's metadata entry `vit`):",
            f"```python\nimport onnxruntime\n{fetch}"
            "session = onnxruntime.InferenceSession(file)\n"
            '(logits,) = session.run(["logits"], {"image": images})\n```',
        ]
    elif not repo:
        parts.append("There is no `model.onnx` in this folder; `vit export FOLDER model.onnx` writes one.")
    return parts


def _data(description: Description) -> list[str]:
    data = about_data(without_folders(description.data))
    if not data.get("name"):
        return ["Not recorded."]
    settings = {key: value for key, value in data.items() if value is not None and key not in _MACHINE_KEYS}
    return ["Trained on the data set of this name, opened with these settings:", _fenced(settings)]


def about_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings that apply to the data set of this name."""
    owners = {key.name: key.rule.help.partition(":")[0] for key in list_keys(DataConfig)}
    others = CATALOGUE.keys() - {data.get("name")}
    return {key: value for key, value in data.items() if owners.get(key) not in others}


def _recipe(description: Description) -> list[str]:
    if not description.training:
        return ["Not recorded."]
    return [_fenced(without_folders(description.training))]


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
        "own images (`vit eval FOLDER data=folder data.root=...`) before anything depends on it.",
        "- It has not been examined for bias, nor for decisions about people.",
    ]
    return "\n".join(lines)


def _classes(names: list[str]) -> str:
    lines = [
        f"{index} {printable(json.dumps(name, ensure_ascii=False))}" for index, name in enumerate(names[:_MAX_NAMES])
    ]
    if len(names) > _MAX_NAMES:
        lines.append(f"and {len(names) - _MAX_NAMES} more, in config.json")
    return "```\n" + "\n".join(lines) + "\n```"


def _fenced(value: Any) -> str:
    """Format JSON in a code fence: strings are quoted on one line, so no line can begin with backticks."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False)
    return "```json\n" + "\n".join(printable(line) for line in text.split("\n")) + "\n```"


def _cell(text: str) -> str:
    clean = "".join(char if char.isalnum() or char in " -_." else " " for char in printable(text))
    return " ".join(clean.split())
