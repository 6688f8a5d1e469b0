"""Records of a small invented run, and a log folder that holds them.  Loaded by tests by its place."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vit.dashboard.format import PAIRS, PROBE, RUN, STEPS, encode, pack
from vit.dashboard.summary import blob_summary, tensor_summary
from vit.training.events import EventFile

L, H, GRID, PREFIX = 3, 2, (2, 3), 1
P = GRID[0] * GRID[1]
HOSTILE = "<img src=x onerror=alert(1)>"
NAMES = ["dark", HOSTILE, "</script><script>alert(1)</script>"]


def png(value: int = 100) -> str:
    file = io.BytesIO()
    Image.new("L", (12, 8), value).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def shares(*shape: int, seed: int = 0) -> np.ndarray:
    """Rows that sum to 1."""
    rows = np.random.default_rng(seed).random(shape) ** 3
    return rows / rows.sum(-1, keepdims=True)


def run_record(probes: int = 3, **changes: Any) -> dict[str, Any]:
    made = [{"name": f"{HOSTILE}/{i}", "label": i % 3 if i else None, "png": png()} for i in range(probes)]
    record = {"name": "invented", "classes": NAMES, "grid": list(GRID), "image": [8, 12], "patch": [4, 4]}
    record |= {"prefix": PREFIX, "layers": L, "heads": H, "readout": "token", "probes": made}
    return record | {"methods": ["rollout", "raw", "relevance", "gradient_rollout", "legrad"]} | changes


def steps_record(step: int, probes: int = 3, measured: bool = False) -> dict[str, Any]:
    areas = {name: {"deletion": 0.25, "insertion": 0.75} for name in ("rollout", "relevance", "random")}
    each = {
        "predicted": 1,
        "probability": 0.75,
        "label_probability": 0.25,
        "top": [[1, 0.75], [0, 0.25]],
        "faithfulness": areas if measured else None,
        "sink": {"top_mass": 0.5, "outliers": 0.0},
    }
    return {"step": step, "probes": [{**each, "label_probability": 0.25 if i else None} for i in range(probes)]}


def probe_record(step: int, number: int = 0) -> dict[str, Any]:
    targets = [1, None if number == 0 else 0]
    rows = sum(target is not None for target in targets)
    maps = {name: pack(shares(rows, P, seed=step)) for name in ("relevance", "gradient_rollout", "legrad")}
    rollout = {fusion: pack(shares(L, P, seed=step)) for fusion in ("mean", "max", "min")}
    return {"step": step, "rows": pack(shares(L, H, P, seed=step)), "rollout": rollout, "targets": targets, **maps}


def pairs_record(step: int) -> dict[str, Any]:
    n = PREFIX + P
    return {"step": step, "per_head": True, "attention": pack(shares(L, H, n, n, seed=step))}


def write(folder: Path, steps: list[int], probes: int = 3, pairs: tuple[int, ...] = (0,)) -> EventFile:
    """A run; more can be written to what is returned."""
    events = EventFile(folder)
    events.write(tensor_summary(RUN, encode(run_record(probes))), steps[0])
    for step in steps:
        events.write(tensor_summary(STEPS, encode(steps_record(step, probes, step == steps[0]))), step)
        for i in range(probes):
            events.write(tensor_summary(f"{PROBE}{i:02d}", encode(probe_record(step, i))), step)
            if step in pairs:
                events.write(blob_summary(f"{PAIRS}{i:02d}", encode(pairs_record(step))), step)
    events.flush()
    return events
