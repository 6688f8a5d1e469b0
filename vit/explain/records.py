"""What the Attention tab shows of a batch of images, from a model: plain values and NumPy arrays.

Training's callback writes it into event files, `vit explain` into a page; `vit.dashboard.format` packs the arrays and
says what each key means.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vit.explain.carry import FUSIONS
from vit.explain.diagnostics import sinks
from vit.explain.faithfulness import perturb
from vit.explain.methods import METHODS, Trace, rollout_by_depth, trace
from vit.explain.record import find
from vit.model.reduction import Move

SHOWN = ("rollout", "raw", "relevance", "gradient_rollout", "legrad")
"""The methods that the tab offers."""
_BY_CLASS = ("relevance", "gradient_rollout", "legrad")
_TOP = 5
_STAYS = 0xFFFF


@dataclass
class Observed:
    """A batch, observed.  Lists have one entry an image.

    Attributes
        steps: prediction, probabilities, sinks; "faithfulness" is None, for others to fill in.
        probes: class rows (L, H, P), rollout by fusion (L, P), maps of class-specific methods (T, P) for "targets"; and
            where tokens are reduced, "reduced": `fates`.
        weights: L times (B, H, N, N), for `pairs`.
        predicted: Trace of the predicted class, for further measures.
    """

    steps: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    weights: list[Tensor]
    predicted: Trace

    def pairs(self, i: int, *, per_head: bool) -> dict[str, Any]:
        """Every token's attention to every other in image `i`: (L, H or 1, N, N).

        Patches that are one token attend alike, and have its attention in the shares that they have in it.
        """
        layers = [weights[i] if per_head else weights[i].mean(dim=0, keepdim=True) for weights in self.weights]
        gone: Move | None = None
        for layer, move in enumerate(self.predicted.moves or ()):
            if move is not None:
                only = Move(move.place_BN[i : i + 1], move.share_BN[i : i + 1], move.tokens)
                gone = only if gone is None else gone.then(only)
            if gone is not None and layer < len(layers):
                layers[layer] = gone.back(layers[layer][None])[0][:, gone.place_BN[0]]
        return {"per_head": per_head, "attention": torch.stack(layers).cpu().numpy()}

    def maps(self, method: str) -> Tensor:
        """Maps (B, rows, columns) of a method, for the predicted class."""
        return METHODS[method](self.predicted)


def run_info(model: nn.Module, class_names: list[str], name: str) -> dict[str, Any]:
    """What the tab needs to know of a model, without probes."""
    vit = find(model)
    grid, patch, image = vit.grid, vit.patch_size, vit.covered
    first: Any = vit.blocks[0]
    return {
        "name": name,
        "classes": class_names,
        "grid": list(grid),
        "image": list(image),
        "patch": list(patch),
        "prefix": vit.num_prefix_tokens,
        "layers": len(vit.blocks),
        "heads": first.attn.heads,
        "readout": vit.pool,
        "methods": list(SHOWN),
        **({} if vit.reduction is None else {"reduction": vit.reduction.method}),
    }


def observe(model: nn.Module, images: Tensor, labels: list[int | None], *, temperature: float = 1.0) -> Observed:
    """Run the model forward and back, twice where some image is labelled otherwise than predicted.

    Arguments
        images: normalised (B, C, height, width), on the model's device.
        labels: the true class of each, None where it is not known.
        temperature: probabilities are softmax(logits / temperature).
    """
    first = trace(model, images)
    predicted = first.target.tolist()
    wrong = [i for i, label in enumerate(labels) if label is not None and label != predicted[i]]
    second = trace(model, images[wrong], torch.tensor([labels[i] for i in wrong]), methods=_BY_CLASS) if wrong else None
    by_class = {name: _flat(METHODS[name](first)) for name in _BY_CLASS}
    by_label = {name: _flat(METHODS[name](second)) for name in _BY_CLASS} if second is not None else {}
    rollouts = {fusion: _flat(rollout_by_depth(first, fusion=fusion)) for fusion in FUSIONS}
    rows = _class_rows(first)
    probabilities = (first.logits.cpu().double() / temperature).softmax(dim=1)
    top_mass, outliers = sinks(first)

    steps, probes = [], []
    for i, label in enumerate(labels):
        top = probabilities[i].topk(min(_TOP, probabilities.shape[1]))
        steps.append(
            {
                "predicted": predicted[i],
                "probability": float(probabilities[i, predicted[i]]),
                "label_probability": None if label is None else float(probabilities[i, label]),
                "top": [[int(k), float(p)] for p, k in zip(*top, strict=True)],
                "faithfulness": None,
                "sink": {"top_mass": float(top_mass[i]), "outliers": float(outliers[i])},
            }
        )
        own = {name: by_label[name][wrong.index(i)] for name in _BY_CLASS} if i in wrong else None
        maps = {
            name: np.stack([by_class[name][i]] + ([] if label is None else [own[name] if own else by_class[name][i]]))
            for name in _BY_CLASS
        }
        rolled = {fusion: each[:, i] for fusion, each in rollouts.items()}
        probes.append({"rows": rows[i], "rollout": rolled, "targets": [predicted[i], label], **maps})
        if found := fates(first, i):
            probes[-1]["reduced"] = found
    return Observed(steps, probes, first.weights, first)


def fates(t: Trace, i: int) -> dict[str, str] | None:
    """What became of the patches of image `i`; None where all stay.

    "gone": after which layer (from 0) each was no token of its own; "into": which patch it joined, the first of those
    that are now one.  Both uint16 (P,) in base64.

    A patch that stays is gone after layer 65535.  Following "into" while "gone" is not later than a layer leads to the
    first patch of the token that a patch is in after that layer.
    """
    P = t.grid[0] * t.grid[1]
    if not any(t.moves or ()):
        return None
    place = np.arange(t.prefix_tokens, t.prefix_tokens + P)
    own = np.arange(P)
    first, gone, into = own.copy(), np.full(P, _STAYS), own.copy()
    for layer, move in enumerate((t.moves or [])[1:]):
        if move is None:
            continue
        place = move.place_BN[i].cpu().numpy()[place]
        leads = np.full(move.tokens, P)
        np.minimum.at(leads, place, first)
        joined = (first == own) & (leads[place] != own)
        gone[joined], into[joined] = layer, leads[place][joined]
        first = leads[place]
    return {
        name: base64.b64encode(each.astype("<u2").tobytes()).decode() for name, each in (("gone", gone), ("into", into))
    }


def measure(
    model: nn.Module,
    images: Tensor,
    steps: list[dict[str, Any]],
    maps: Mapping[str, Tensor],
    target: Tensor,
    *,
    counts: int = 10,
    temperature: float = 1.0,
    batch_size: int = 128,
) -> None:
    """Add deletion and insertion of `maps`, by method, to the "faithfulness" of observed steps.

    Costs 2 (counts + 1) forward passes a method and image; arguments as those of `observe` and `perturb`.
    """
    for method, each in maps.items():
        with torch.compiler.set_stance("force_eager"):  # other sizes of batch would be compiled anew
            curves = perturb(model, images, each, target, steps=counts, temperature=temperature, batch_size=batch_size)
        for step, deletion, insertion in zip(steps, curves.deletion.tolist(), curves.insertion.tolist(), strict=True):
            areas = {"deletion": deletion, "insertion": insertion}
            step["faithfulness"] = {**(step["faithfulness"] or {}), method: areas}


def _class_rows(t: Trace) -> np.ndarray:
    """The attention of what the head reads to the patches, by layer and head: (B, L, H, P)."""
    layers = [t.looks(layer)[:, :, t.prefix_tokens :] for layer in range(len(t.weights))]
    return torch.stack(layers, dim=1).float().cpu().numpy()


def _flat(maps: Tensor) -> np.ndarray:
    """(..., rows, columns) -> (..., P)."""
    return maps.flatten(-2).float().cpu().numpy()
