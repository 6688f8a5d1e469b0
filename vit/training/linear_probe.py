"""Evaluate frozen features by a linear probe (`method=linear_probe`) and by nearest neighbours.

The fitted head can also be the start of fine-tuning (`finetune.head=probe`).

Notable:
- each image goes through the backbone once; its features are cached under the run root for the next probe;
- the head's penalty and the number of neighbours are chosen on validation data; both are tested once;
- the head becomes part of the model: checkpoint, bundle and metrics are as after any run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vit.data.dataset import SPLITS, ImageData
from vit.data.preprocess import Preprocessing
from vit.inference.description import Description
from vit.model import VisionTransformer
from vit.training import checkpoints, knn, logistic
from vit.training.config import Config, device_kind
from vit.training.events import EventFile
from vit.training.features import Backbone, collect_features

log = logging.getLogger("vit")

_PATIENCE = 4  # penalties in a row without improvement before the search stops
_DEFAULT_PENALTY, _DEFAULT_K = 1e-2, 20  # where there is no validation data

Block = dict[str, Any]


class Probe:
    """Compute the features of a data set's splits, and fit a linear head and nearest neighbours to them.

    `model` stays in its mode, training or evaluation.

    Attributes:
        features, labels: by split, float32 (N, D) and int64 (N,), on the CPU.
        images_per_second: speed of the backbone; 0 if all features came from the cache.
    """

    def __init__(
        self,
        config: Config,
        model: VisionTransformer,
        data: ImageData,
        preprocessing: Preprocessing,
        splits: Sequence[str] = SPLITS,
    ) -> None:
        self.config, self.model, self.data = config, model, data
        self.device = torch.device(device_kind(config.trainer.accelerator))
        cache = Path(config.probe.cache or Path(config.run.root) / ".cache") / "features"
        backbone = Backbone(model).to(self.device).train(model.training)
        self.features: dict[str, Tensor] = {}
        computed, seconds = 0, 0.0
        for name in splits:
            split = data.splits[name]
            began = time.monotonic()
            self.features[name], cached = collect_features(
                backbone,
                split,
                preprocessing,
                config.data,
                cache=cache,
                device=self.device,
                label=f"Features of {name}",
            )
            if cached:
                log.info("features of %d %s images: found in %s", len(split), name, cache)
            else:
                computed, seconds = computed + len(split), seconds + time.monotonic() - began
        self.labels = {name: torch.from_numpy(data.splits[name].labels.copy()) for name in splits}
        self.images_per_second = computed / seconds if seconds else 0.0

    def fit_head(self, events: EventFile | None) -> float:
        """Fit heads with several penalties, put the best on validation data into the model, and return its penalty."""
        best: tuple[tuple[float, float], float, Tensor, Tensor] | None = None
        worse = 0
        for step, (penalty, weight, bias, metrics) in enumerate(self._fit_heads()):
            log.info("penalty %-8.2g %s", penalty, "  ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
            if events is not None:
                events.scalars({f"probe/{key}": value for key, value in metrics.items()}, step)
            rank = checkpoints.ranking_key(metrics, self.config.monitor)
            worse += 1
            if best is None or rank > best[0]:
                best, worse = (rank, penalty, weight, bias), 0
            if worse == _PATIENCE:
                break
        assert best is not None
        _, penalty, weight, bias = best
        with torch.no_grad():
            for head in (self.model.head, self.model.head_dist):
                if head is not None:
                    head.weight.copy_(weight)  # type: ignore[operator]
                    head.bias.copy_(bias)  # type: ignore[operator]
        return penalty

    def _fit_heads(self) -> Iterator[tuple[float, Tensor, Tensor, dict[str, float]]]:
        """Yield each penalty with its weight (K, D), bias (K,) and validation metrics."""
        x, y = self.features["train"].to(self.device), self.labels["train"].to(self.device)
        val, labels = self.features["val"].to(self.device), self.labels["val"].to(self.device)
        penalties = logistic.PENALTIES if len(val) else (_DEFAULT_PENALTY,)
        for penalty, weight, bias in logistic.fit_logistic(x, y, len(self.data.class_names), penalties):
            metrics = {}
            if len(val):
                logits = val @ weight.T + bias
                metrics["val/loss"] = float(F.cross_entropy(logits, labels))
                metrics["val/top1"] = float((logits.argmax(1) == labels).float().mean())
            yield penalty, weight, bias, metrics

    def logits(self, name: str) -> tuple[Tensor, Tensor]:
        """Compute logits (N, K) of a split from its features; return them with the labels (N,)."""
        head = self.model.head
        with torch.no_grad():
            return F.linear(self.features[name].to(self.device), head.weight, head.bias).cpu(), self.labels[name]  # type: ignore[arg-type]

    def knn_metrics(self, events: EventFile | None) -> Block:
        """Return the "knn" block of `metrics.json`: test metrics for the k that is best on validation data.

        `{"k", "temperature", "top1", "top5", "val": {"top1", "top5"}}`; metrics of an empty split are left out.
        """
        train, labels = self.features["train"].to(self.device), self.labels["train"].to(self.device)
        temperature, classes = self.config.probe.temperature, len(self.data.class_names)
        ks = [k for k in knn.NEIGHBOUR_COUNTS if k <= len(train)]

        def evaluate(name: str, ks: list[int]) -> dict[int, dict[str, float]]:
            queries, targets = self.features[name].to(self.device), self.labels[name].to(self.device)
            if not len(queries):
                return {k: {} for k in ks}
            votes = knn.knn_votes(train, labels, queries, classes, ks, temperature)
            return {k: knn.vote_accuracies(votes_MK, targets) for k, votes_MK in votes.items()}

        val_metrics = evaluate("val", ks)
        for k, block in val_metrics.items():
            if block and events is not None:
                events.scalars({f"knn/val_{key}": value for key, value in block.items()}, k)
        chosen = max(ks, key=lambda k: val_metrics[k]["top1"]) if val_metrics[ks[0]] else min(_DEFAULT_K, ks[-1])
        chosen = max(k for k in ks if k <= chosen)
        val = {"val": val_metrics[chosen]} if val_metrics[chosen] else {}
        return {"k": chosen, "temperature": temperature, **evaluate("test", [chosen])[chosen], **val}


def write_checkpoint(path: Path, model: VisionTransformer, description: Description) -> None:
    """Write the model as a checkpoint like those of training; it cannot be resumed."""
    weights = {f"model.{name}": tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    checkpoints.save_checkpoint(
        path, {"vit": description.to_dict() | {"weights_prefix": "model."}, "state_dict": weights}
    )
