"""What the Attention tab shows of a batch of images, from a model: plain values and NumPy arrays.

Training's callback writes it into event files, `vit explain` into a page; `vit.dashboard.format` packs the arrays and
says what each key means.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vit.explain.diagnostics import sinks
from vit.explain.faithfulness import perturb
from vit.explain.methods import METHODS, Trace, rollout_by_depth, trace
from vit.explain.record import find
from vit.explain.rollout import FUSIONS
from vit.map_methods import BY_CLASS, IN_TAB
from vit.model.reduction import TokenMap

_TOP = 5
_STAYS = 0xFFFF


def token_pairs(t: Trace, i: int, *, per_head: bool) -> dict[str, Any]:
    """Return every token's attention to every other in image `i`: (L, H or 1, N, N).

    Patches that are one token attend alike, and each gets its fraction of the attention to that token.
    """
    layers = [weights[i] if per_head else weights[i].mean(dim=0, keepdim=True) for weights in t.weights]
    to_layer: TokenMap | None = None
    for layer, token_map in enumerate(t.token_maps or ()):
        if token_map is not None:
            own = TokenMap(token_map.index_BN[i : i + 1], token_map.fraction_BN[i : i + 1], token_map.tokens)
            to_layer = own if to_layer is None else to_layer.compose(own)
        if to_layer is not None and layer < len(layers):
            layers[layer] = to_layer.unmerge(layers[layer][None])[0][:, to_layer.index_BN[0]]
    return {"per_head": per_head, "attention": torch.stack(layers).cpu().numpy()}


def run_info(model: nn.Module, class_names: list[str], name: str) -> dict[str, Any]:
    """Describe a model as the tab needs it, without probes."""
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
        "methods": list(IN_TAB),
        **({} if vit.reduction is None else {"reduction": vit.reduction.method}),
    }


def summarise(
    model: nn.Module, images: Tensor, labels: list[int | None], *, temperature: float = 1.0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Trace]:
    """Summarise attention as the tab shows it: two lists with an entry for each image, and the trace behind them.

    The first has prediction, probabilities and sinks; "faithfulness" is None, for `measure`.  The second has class rows
    (L, H, P), rollout by fusion (L, P), maps of class-specific methods (T, P) for "targets", and where tokens are
    reduced, "reduced": `token_assignments`.  The trace is of the predicted class.  The model runs forward and back,
    twice where some image is labelled otherwise than predicted.

    Args:
        images: normalised (B, C, height, width), on the model's device.
        labels: the true class of each, None where it is not known.
        temperature: probabilities are softmax(logits / temperature).
    """
    first = trace(model, images)
    predicted = first.target.tolist()
    wrong = [i for i, label in enumerate(labels) if label is not None and label != predicted[i]]
    second = trace(model, images[wrong], torch.tensor([labels[i] for i in wrong]), methods=BY_CLASS) if wrong else None
    by_class = {name: _flat(METHODS[name](first)) for name in BY_CLASS}
    by_label = {name: _flat(METHODS[name](second)) for name in BY_CLASS} if second is not None else {}
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
        own = {name: by_label[name][wrong.index(i)] for name in BY_CLASS} if i in wrong else None
        maps = {
            name: np.stack([by_class[name][i]] + ([] if label is None else [own[name] if own else by_class[name][i]]))
            for name in BY_CLASS
        }
        rolled = {fusion: each[:, i] for fusion, each in rollouts.items()}
        probes.append({"rows": rows[i], "rollout": rolled, "targets": [predicted[i], label], **maps})
        if found := token_assignments(first, i):
            probes[-1]["reduced"] = found
    return steps, probes, first


def token_assignments(t: Trace, i: int) -> dict[str, str] | None:
    """Return what became of the patches of image `i`; None where all stay.

    "gone": after which layer (from 0) each was no token of its own; "into": which patch it joined, the first of those
    that are now one.  Both uint16 (P,) in base64.

    A patch that stays is gone after layer 65535.  Following "into" while "gone" is not later than a layer leads to the
    first patch of the token that a patch is in after that layer.
    """
    P = t.grid[0] * t.grid[1]
    if not any(t.token_maps or ()):
        return None
    index = np.arange(t.prefix_tokens, t.prefix_tokens + P)
    own = np.arange(P)
    first, removed_after, merged_into = own.copy(), np.full(P, _STAYS), own.copy()
    for layer, token_map in enumerate((t.token_maps or [])[1:]):
        if token_map is None:
            continue
        index = token_map.index_BN[i].cpu().numpy()[index]
        leads = np.full(token_map.tokens, P)
        np.minimum.at(leads, index, first)
        joined = (first == own) & (leads[index] != own)
        removed_after[joined], merged_into[joined] = layer, leads[index][joined]
        first = leads[index]
    found = {"gone": removed_after, "into": merged_into}
    return {name: base64.b64encode(each.astype("<u2").tobytes()).decode() for name, each in found.items()}


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
    """Add deletion and insertion of `maps`, by method, to the "faithfulness" of the steps that `summarise` returns.

    Costs 2 (counts + 1) forward passes a method and image; arguments as those of `summarise` and `perturb`.
    """
    for method, each in maps.items():
        with torch.compiler.set_stance("force_eager"):  # other sizes of batch would be compiled anew
            curves = perturb(model, images, each, target, steps=counts, temperature=temperature, batch_size=batch_size)
        for step, deletion, insertion in zip(steps, curves.deletion.tolist(), curves.insertion.tolist(), strict=True):
            areas = {"deletion": deletion, "insertion": insertion}
            step["faithfulness"] = {**(step["faithfulness"] or {}), method: areas}


def _class_rows(t: Trace) -> np.ndarray:
    """The attention of what the head reads to the patches, by layer and head: (B, L, H, P)."""
    layers = [t.readout_attention(layer)[:, :, t.prefix_tokens :] for layer in range(len(t.weights))]
    return torch.stack(layers, dim=1).float().cpu().numpy()


def _flat(maps: Tensor) -> np.ndarray:
    """(..., rows, columns) -> (..., P)."""
    return maps.flatten(-2).float().cpu().numpy()
