"""What is kept of a model's attention at one step of training, how large that may become, and how it is computed.

The sizes, with n images, L layers, H heads, P patches and N tokens; a number is a byte before compression:

- a step: `n P (L H + 3 L + 6)`, class rows of every head, rollout by three fusions through every depth, three
  class-specific maps for two targets; where tokens are reduced, 4 more a patch, what became of it.
  16 images of a ViT-Ti/16 at 224 pixels: 16 * 196 * 78 = 245 kB; 100 steps of them 24.5 MB.  A larger model gets
  fewer steps, so that all of them stay under 26 MB.
- pairs: `n L H N^2`, or `n L N^2` for the mean over heads.  Ti/16: 7.5 MB for the mean; so twice, 15 MB, in the
  allowance of 16 MB.  Where all images do not fit once, those that do are kept; at 518 pixels not one does.
- the images themselves, once, at most 256 pixels a side: under 3 MB; pictures for the image tab, seven times: 6 MB.

Together 49 MB where nothing can be compressed; real attention and photographs can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vit.explain.attention_tab import summarise, token_pairs
from vit.explain.diagnostics import attention_distance, entropy, patch_mass
from vit.explain.methods import METHODS, Trace

MOST_STEPS = 100
MOST_SHOWS = 7  # of them with pictures, and with pairs at most
_STEPS_BYTES, _PAIRS_BYTES, _PER_HEAD_BYTES = 26_000_000, 16_000_000, 2_000_000
_LARGEST_PAIRS = 5_600_000  # of one image: beyond, a page would wait for it
_CHUNK_BYTES = 256 * 2**20
_COPIES = 4  # weights, their gradients, and what the graph keeps
_CURVES = 4  # layers that have curves of their own

FIRST = ("relevance", "rollout", "random")
REST = tuple(name for name in METHODS if name not in FIRST)
"""Methods whose faithfulness is measured: the first always, the rest where there is time."""


@dataclass(frozen=True)
class Plan:
    """How much is kept of a run.

    Attributes
        steps: at most, start and end included; 0 where the attention of one image alone fills the memory.
        pairs: at how many of them pairs are written too.
        pairs_images: of how many images.
        per_head: whether pairs are kept for every head, or for their mean.
        chunk: images to explain at a time.
    """

    steps: int
    pairs: int
    pairs_images: int
    per_head: bool
    chunk: int


def plan(
    images: int,
    layers: int,
    heads: int,
    patches: int,
    prefix: int,
    memory: float = math.inf,
    *,
    reduced: bool = False,
) -> Plan:
    """Fit what is kept into its allowance; the module's docstring has the arithmetic.

    `memory`: bytes that explaining may take while it runs; `reduced`: whether the model reduces its tokens.
    """
    tokens = prefix + patches
    mean = layers * tokens**2
    one = 4 * _COPIES * mean * heads  # bytes of explaining one image
    step = images * patches * (layers * heads + 3 * layers + 6 + 4 * reduced)
    per_head = images * mean * heads <= _PER_HEAD_BYTES
    pairs = mean * (heads if per_head else 1)
    kept = 0 if pairs > _LARGEST_PAIRS else min(images, _PAIRS_BYTES // pairs)
    return Plan(
        steps=max(2, min(MOST_STEPS, _STEPS_BYTES // step)) if one <= memory else 0,
        pairs=min(MOST_SHOWS, _PAIRS_BYTES // (pairs * kept)) if kept else 0,
        pairs_images=kept,
        per_head=per_head,
        chunk=max(1, min(images, _CHUNK_BYTES // one)),
    )


@dataclass
class Observation:
    """Attention at one step.  Lists have one entry an image.

    Attributes
        steps, probes: as `vit.explain.attention_tab.summarise` returns them.
        pairs: of the first images, where they were asked for.
        maps: by method, (n, rows, columns), for the predicted class.
        predicted: int64 (n,).
        scalars: diagnostics by tag, means over the images.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    maps: dict[str, Tensor] = field(default_factory=dict)
    predicted: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    scalars: dict[str, float] = field(default_factory=dict)


def look(model: nn.Module, images: Tensor, labels: list[int], kept: Plan, *, pairs: bool) -> Observation:
    """Explain normalised images (n, C, height, width), a chunk at a time."""
    out, maps, predicted = Observation(), [], []
    sums: dict[str, float] = {}
    for start in range(0, len(labels), kept.chunk):
        chunk = slice(start, start + kept.chunk)
        steps, probes, traced = summarise(model, images[chunk], list(labels[chunk]))
        out.steps += steps
        out.probes += probes
        if pairs:
            for i in range(max(0, min(len(steps), kept.pairs_images - start))):
                out.pairs.append(token_pairs(traced, i, per_head=kept.per_head))
        maps.append({method: METHODS[method](traced) for method in (*FIRST, *REST)})
        predicted.append(traced.target)
        for tag, value in _curves(traced).items():
            sums[tag] = sums.get(tag, 0.0) + value * len(steps)
    out.maps = {method: torch.cat([each[method] for each in maps]) for method in maps[0]}
    out.predicted = torch.cat(predicted)
    sink = [step["sink"] for step in out.steps]
    out.scalars = {tag: value / len(labels) for tag, value in sums.items()}
    out.scalars["attention/sinks/top_patch_mass"] = float(np.mean([each["top_mass"] for each in sink]))
    out.scalars["attention/sinks/outlier_share"] = float(np.mean([each["outliers"] for each in sink]))
    return out


def _curves(t: Trace) -> dict[str, float]:
    """Distance in patches, entropy in nats and share of the mass on patches, of some layers, means over heads."""
    depth = len(t.weights)
    layers = sorted({round(i * (depth - 1) / (_CURVES - 1)) for i in range(_CURVES)})
    chosen = t.select_layers(layers)
    found = {
        "distance": attention_distance(chosen, t.prefix_tokens, t.grid),
        "entropy": entropy(chosen),
        "patch_mass": patch_mass(t)[layers],
    }
    return {
        f"attention/{name}/layer_{layer:02d}": value
        for name, by_head in found.items()
        for layer, value in zip(layers, by_head.mean(dim=1).tolist(), strict=True)
    }
