"""How good a frozen model's features are, by a linear head on them (`method=linear_probe`) and by nearest neighbours;
and that head as the start of fine-tuning (`finetune.head=probe`).

Notable:
- an image goes through the backbone once; its features are kept under the run root for the next probe;
- the head's regularisation and the number of neighbours are chosen on validation data, and both are tested once;
- the head ends in the model that it was fitted to: checkpoint, bundle and figures are those of any run.
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

_PATIENCE = 4  # weaker penalties in a row that are no better
_UNCHOSEN_PENALTY, _UNCHOSEN_K = 1e-2, 20  # where there is no validation data

Block = dict[str, Any]


class Probe:
    """The features of a data set's splits, and what is fitted to them; `model` stays in the mode it is in.

    Attributes
        features, labels: by split, float32 (N, D) and int64 (N,), on the CPU.
        images_per_second: of the backbone; 0 where all features were found kept.
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
            self.features[name], kept = collect_features(
                backbone,
                split,
                preprocessing,
                config.data,
                cache=cache,
                device=self.device,
                label=f"Features of {name}",
            )
            if kept:
                log.info("features of %d %s images: found in %s", len(split), name, cache)
            else:
                computed, seconds = computed + len(split), seconds + time.monotonic() - began
        self.labels = {name: torch.from_numpy(data.splits[name].labels.copy()) for name in splits}
        self.images_per_second = computed / seconds if seconds else 0.0

    def fit_head(self, events: EventFile | None) -> float:
        """Put the head that does best on validation data into the model; returns its penalty."""
        best: tuple[tuple[float, float], float, Tensor, Tensor] | None = None
        since = 0
        for step, (penalty, weight, bias, figures) in enumerate(self._heads()):
            log.info("penalty %-8.2g %s", penalty, "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
            if events is not None:
                events.scalars({f"probe/{key}": value for key, value in figures.items()}, step)
            rank = checkpoints.ranking_key(figures, self.config.monitor)
            since += 1
            if best is None or rank > best[0]:
                best, since = (rank, penalty, weight, bias), 0
            if since == _PATIENCE:
                break
        assert best is not None
        _, penalty, weight, bias = best
        with torch.no_grad():
            for head in (self.model.head, self.model.head_dist):
                if head is not None:
                    head.weight.copy_(weight)  # type: ignore[operator]
                    head.bias.copy_(bias)  # type: ignore[operator]
        return penalty

    def _heads(self) -> Iterator[tuple[float, Tensor, Tensor, dict[str, float]]]:
        x, y = self.features["train"].to(self.device), self.labels["train"].to(self.device)
        val, labels = self.features["val"].to(self.device), self.labels["val"].to(self.device)
        tried = logistic.PENALTIES if len(val) else (_UNCHOSEN_PENALTY,)
        for penalty, weight, bias in logistic.solutions(x, y, len(self.data.class_names), tried):
            figures = {}
            if len(val):
                logits = val @ weight.T + bias
                figures["val/loss"] = float(F.cross_entropy(logits, labels))
                figures["val/top1"] = float((logits.argmax(1) == labels).float().mean())
            yield penalty, weight, bias, figures

    def logits(self, name: str) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and labels (N,) of a split, from its features."""
        head = self.model.head
        with torch.no_grad():
            return F.linear(self.features[name].to(self.device), head.weight, head.bias).cpu(), self.labels[name]  # type: ignore[arg-type]

    def neighbours(self, events: EventFile | None) -> Block:
        """The "knn" block of `metrics.json`: figures on the test split for the k that does best on validation data.

        `{"k", "temperature", "top1", "top5", "val": {"top1", "top5"}}`; a figure that no images give is left out.
        """
        train, labels = self.features["train"].to(self.device), self.labels["train"].to(self.device)
        temperature, classes = self.config.probe.temperature, len(self.data.class_names)
        ks = [k for k in knn.NEIGHBOURS if k <= len(train)]

        def figures(name: str, ks: list[int]) -> dict[int, dict[str, float]]:
            queries, truth = self.features[name].to(self.device), self.labels[name].to(self.device)
            if not len(queries):
                return {k: {} for k in ks}
            found = knn.votes(train, labels, queries, classes, ks, temperature)
            return {k: knn.accuracies(votes, truth) for k, votes in found.items()}

        tried = figures("val", ks)
        for k, block in tried.items():
            if block and events is not None:
                events.scalars({f"knn/val_{key}": value for key, value in block.items()}, k)
        chosen = max(ks, key=lambda k: tried[k]["top1"]) if tried[ks[0]] else min(_UNCHOSEN_K, ks[-1])
        chosen = max(k for k in ks if k <= chosen)
        val = {"val": tried[chosen]} if tried[chosen] else {}
        return {"k": chosen, "temperature": temperature, **figures("test", [chosen])[chosen], **val}


def write_checkpoint(path: Path, model: VisionTransformer, description: Description) -> None:
    """The model as a checkpoint like those of training; one cannot go on from it, as there is nothing to go on with."""
    weights = {f"model.{name}": tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    checkpoints.save_checkpoint(
        path, {"vit": description.to_dict() | {"weights_prefix": "model."}, "state_dict": weights}
    )
