"""A log of synthetic runs whose attention forms over training, for the viewer's tests and for screenshots.

    python tests/dashboard/sample.py LOGDIR [--full]

`--full` writes runs of the size of a ViT-Ti/16 (196 patches, 12 layers, 3 heads).
"""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from vit.dashboard.format import PAIRS, PROBE, RUN, STEPS, encode, pack
from vit.dashboard.summary import blob_summary, tensor_summary

EVIL_CLASS = "<img src=x onerror=alert(1)>"
EVIL_RUN = "z<b onclick=alert(2)>&amp;run"
CLASSES = ["circle", "square", "triangle", "star", "cross", EVIL_CLASS]
FILLS = ["#e4572e", "#2e86ab", "#f3a712", "#8e5572", "#4c9f70", "#5b5f97"]


@dataclass(frozen=True)
class Run:
    """What one synthetic run is like."""

    name: str
    grid: tuple[int, int] = (8, 8)
    patch: int = 8
    layers: int = 4
    heads: int = 3
    registers: int = 0
    probes: int = 6
    steps: tuple[int, ...] = (0, 20, 40, 60, 80, 100)
    pairs: tuple[int, ...] = (0, 60, 100)
    faithfulness: tuple[int, ...] = (0, 60, 100)
    labels: bool = True
    per_head: bool = True
    sink: bool = False
    quality: float = 1.0
    damaged: tuple[int, ...] = ()  # steps whose record of probe 0 is not readable
    future: tuple[int, ...] = ()  # steps whose record of probe 0 is of version 2
    version: int = 1
    seed: int = 0

    @property
    def image(self) -> tuple[int, int]:
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def prefix(self) -> int:
        return 1 + self.registers


RUNS = [
    Run("shapes/first", sink=True),
    Run("shapes/registers", registers=4, seed=1, steps=(0, 25, 50, 75, 100), pairs=(50, 100)),
    Run("wide", grid=(4, 8), labels=False, per_head=False, probes=3, pairs=()),
    Run("worn", damaged=(40,), future=(60,), probes=2, quality=0.0),
    Run("next", version=2, probes=1, steps=(0, 10), pairs=()),
    Run(EVIL_RUN, probes=2, steps=(0, 50)),
]
FULL = [
    Run("shapes/vit_tiny", grid=(14, 14), patch=16, layers=12, probes=12, steps=tuple(range(0, 1001, 50)),
        pairs=(0, 500, 1000), faithfulness=(0, 500, 1000)),
    Run("shapes/vit_tiny_registers", grid=(14, 14), patch=16, layers=12, registers=4, probes=12, seed=1,
        steps=tuple(range(0, 1001, 50)), pairs=(0, 500, 1000), faithfulness=(0, 500, 1000), sink=True),
]  # fmt: skip


def write_log(logdir: Path, runs: list[Run] | None = None) -> None:
    """Write `runs` (all of `RUNS` where none are given) as event files under `logdir`."""
    for run in RUNS if runs is None else runs:
        write_run(logdir, run)


def write_run(logdir: Path, run: Run, steps: tuple[int, ...] | None = None) -> None:
    """Write one run, or only some `steps` of it: a second call adds to the first."""
    scenes = [_scene(run, number) for number in range(run.probes)]
    writer = EventFileWriter(str(logdir / run.name))
    if steps is None or run.steps[0] in steps:
        _add(writer, run.steps[0], tensor_summary(RUN, encode({**_run_record(run, scenes), "v": run.version})))
    for step in run.steps if steps is None else steps:
        progress = (step - run.steps[0]) / max(1, run.steps[-1] - run.steps[0])
        formed = run.quality / (1 + np.exp(-10 * (progress - 0.45)))
        answers = [_answer(run, number, progress) for number in range(run.probes)]
        probes = [_step_probe(run, number, answers[number], formed, step) for number in range(run.probes)]
        _add(writer, step, tensor_summary(STEPS, encode({"v": run.version, "step": step, "probes": probes})))
        for number, scene in enumerate(scenes):
            data = encode({**_probe_record(run, number, scene, answers[number], formed, step), "v": run.version})
            if number == 0 and step in run.damaged:
                data = data[: len(data) // 2]
            if number == 0 and step in run.future:
                data = encode({"v": 2, "step": step})
            _add(writer, step, tensor_summary(f"{PROBE}{number:02}", data))
            if step in run.pairs:
                data = encode(_pairs_record(run, number, scene, formed, step))
                _add(writer, step, blob_summary(f"{PAIRS}{number:02}", data))
    writer.close()


def _add(writer: EventFileWriter, step: int, summary: Any) -> None:
    writer.add_event(Event(step=step, wall_time=1.7e9 + step, summary=summary))


@dataclass(frozen=True)
class Scene:
    """An image of one shape, and where its patches are: `here` (P,) in 0..1."""

    label: int
    png: str
    here: np.ndarray


def _scene(run: Run, number: int) -> Scene:
    random = np.random.default_rng(100 + number)
    (height, width), (rows, columns) = run.image, run.grid
    label = (5 - number) % len(CLASSES)
    x, y = random.uniform(0.3, 0.7, 2) * (width, height)
    radius = min(height, width) * random.uniform(0.17, 0.26)
    coarse = Image.fromarray(random.integers(110, 190, (6, 6, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    mask = Image.new("L", (width * 4, height * 4))
    _shape(ImageDraw.Draw(mask), label, 4 * x, 4 * y, 4 * radius)
    mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    image.paste(Image.new("RGB", (width, height), FILLS[label]), (0, 0), mask)
    grain = random.normal(0, 7, (height, width, 3))
    image = Image.fromarray(np.clip(np.asarray(image, dtype=float) + grain, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    soft = mask.filter(ImageFilter.GaussianBlur(run.patch / 3)).resize((columns, rows), Image.Resampling.BOX)
    here = np.asarray(soft, dtype=np.float32).ravel() / 255
    return Scene(label, base64.b64encode(buffer.getvalue()).decode(), here)


def _shape(draw: ImageDraw.ImageDraw, label: int, x: float, y: float, radius: float) -> None:
    def polygon(corners: int, inner: float = 0.0, turn: float = 0.0) -> None:
        angles = 2 * np.pi * np.arange(corners) / corners + turn - np.pi / 2
        sizes = np.where(np.arange(corners) % 2 == 1, inner or 1.0, 1.0) * radius
        draw.polygon([(x + s * np.cos(a), y + s * np.sin(a)) for s, a in zip(sizes, angles, strict=True)], fill=255)

    drawings: list[Callable[[], Any]] = [
        lambda: draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255),
        lambda: polygon(4, turn=np.pi / 4),
        lambda: polygon(3),
        lambda: polygon(10, inner=0.45),
        lambda: polygon(8, inner=0.35),
        lambda: polygon(6),
    ]
    drawings[label]()


def _run_record(run: Run, scenes: list[Scene]) -> dict[str, Any]:
    return {
        "name": "shapes", "classes": CLASSES, "grid": list(run.grid), "image": list(run.image),
        "patch": [run.patch, run.patch], "prefix": run.prefix, "layers": run.layers, "heads": run.heads,
        "readout": "token", "methods": ["rollout", "raw", "relevance", "gradient_rollout", "legrad"],
        "probes": [{"name": f"val/{number:04}.png", "label": scene.label if run.labels else None, "png": scene.png}
                   for number, scene in enumerate(scenes)],
    }  # fmt: skip


def _answer(run: Run, number: int, progress: float) -> np.ndarray:
    """Probabilities (K,).  Every third probe stays wrong, and the last of the first run at the start only."""
    random = np.random.default_rng(1000 * run.seed + number)
    label = (5 - number) % len(CLASSES)
    wanted = (label + 1) % len(CLASSES) if number % 3 == 1 and run.seed == 0 else label
    logits = random.normal(0, 0.8, len(CLASSES)) * (1 - 0.5 * progress)
    logits[wanted] += (2.5 + random.uniform(0, 3)) * progress
    logits[label] += progress
    raised = np.exp(logits)
    return raised / raised.sum()


def _step_probe(run: Run, number: int, answer: np.ndarray, formed: float, step: int) -> dict[str, Any]:
    label = (5 - number) % len(CLASSES)
    order = np.argsort(-answer)
    faithfulness = None
    if step in run.faithfulness:
        spread = {"rollout": 0.5, "raw": 0.0, "relevance": 1.0, "gradient_rollout": 0.8, "legrad": 0.9}
        faithfulness = {name: {"deletion": 0.45 - 0.27 * share * formed, "insertion": 0.5 + 0.3 * share * formed}
                        for name, share in spread.items()}  # fmt: skip
        faithfulness["random"] = {"deletion": 0.44, "insertion": 0.51}
    return {
        "predicted": int(order[0]), "probability": float(answer[order[0]]),
        "label_probability": float(answer[label]) if run.labels else None,
        "top": [[int(index), float(answer[index])] for index in order[:5]],
        "faithfulness": faithfulness,
        "sink": {"top_mass": 0.08 + (0.55 * formed if run.sink and number % 2 == 0 else 0.0),
                 "outliers": 0.01 if run.sink and number % 2 == 0 else 0.0},
    }  # fmt: skip


def _normal(values: np.ndarray) -> np.ndarray:
    return values / values.sum(-1, keepdims=True)


def _form(scene: Scene, formed: float, sharp: float, random: np.random.Generator) -> np.ndarray:
    """A map (P,) between noise and the place of the shape."""
    noise = random.gamma(6, 1, scene.here.size)
    return _normal((1 - formed) * _normal(noise) + formed * _normal(scene.here**sharp * (0.6 + 0.1 * noise) + 0.02))


def _probe_record(run: Run, number: int, scene: Scene, answer: np.ndarray, formed: float, step: int) -> dict[str, Any]:
    random = np.random.default_rng(hash((run.seed, number, step)) % 2**32)
    patches = scene.here.size
    rows = np.empty((run.layers, run.heads, patches), np.float32)
    border = np.ones(run.grid, np.float32)
    border[1:-1, 1:-1] = 0.15
    kinds: list[np.ndarray] = [scene.here + 0.02, 1 - 0.8 * scene.here, border.ravel()]
    for layer in range(run.layers):
        depth = (layer + 1) / run.layers
        for head in range(run.heads):
            kind = kinds[(head + layer // 3) % 3]
            row = (1 - formed * depth) * random.gamma(5, 1, patches) / 5 + 4 * formed * depth * kind
            if run.sink and number % 2 == 0 and head == 1 and depth > 0.6:
                row[patches - 2] += 0.8 * patches * formed
            rows[layer, head] = _normal(row) * (0.9 - 0.4 * depth)
    target, wrong = _form(scene, formed, 1.0, random), np.roll(_form(scene, formed, 2.0, random), run.grid[1] + 1)
    predicted = int(answer.argmax())
    targets = [predicted, scene.label if run.labels else None]
    both = [target] if targets[1] is None else [target, target if predicted == scene.label else wrong]

    def rollout(sharp: float) -> dict[str, Any]:
        depths = [_form(scene, formed * (layer + 1) / run.layers, sharp, random) for layer in range(run.layers)]
        return pack(np.stack(depths))

    return {
        "step": step, "rows": pack(rows),
        "rollout": {"mean": rollout(0.5), "max": rollout(0.9), "min": rollout(0.3)}, "targets": targets,
        "relevance": pack(np.stack(both)), "gradient_rollout": pack(np.stack(both) ** 1.5),
        "legrad": pack(np.stack(both) ** 0.7),
    }  # fmt: skip


def _pairs_record(run: Run, number: int, scene: Scene, formed: float, step: int) -> dict[str, Any]:
    random = np.random.default_rng(hash((run.seed, number, step, 2)) % 2**32)
    (rows, columns), prefix = run.grid, run.prefix
    place = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    apart: np.ndarray = ((place[:, None] - place[None]) ** 2).sum(-1)
    alike: np.ndarray = np.exp(-3 * np.abs(scene.here[:, None] - scene.here[None]))
    tokens, heads = prefix + scene.here.size, run.heads if run.per_head else 1
    attention = np.empty((run.layers, heads, tokens, tokens), np.float32)
    for layer in range(run.layers):
        depth = (layer + 1) / run.layers
        for head in range(heads):
            matrix = random.gamma(4, 0.25, (tokens, tokens))
            near = np.exp(-apart / (2 + 8 * depth * (head + 1)))
            matrix[prefix:, prefix:] += 12 * ((1 - depth * formed) * near + depth * formed * alike * (0.2 + near))
            matrix[:prefix, prefix:] += 6 * formed * scene.here
            attention[layer, head] = _normal(matrix)
    return {"step": step, "per_head": run.per_head, "attention": pack(attention)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("--full", action="store_true", help="two runs of the size of a ViT-Ti/16, instead of all kinds")
    arguments = parser.parse_args()
    write_log(arguments.logdir, FULL if arguments.full else None)
