"""Attention while it forms: what training writes for the Attention tab, and plain pictures and curves beside it.

Notable:
- the same images all the time (`vit.training.tracked_images`), explained by the model that is kept, in float32;
- at the start, at the end and in between as often as the clock allows: everything here together stays under two per
  cent of the time, and under 100 steps and 50 MB a run (`vit.training.observation`).  Steps are denser at first, when
  most happens;
- training is not touched: no random number is drawn, no gradient accumulated, no mode left changed; a run with and one
  without end with the same weights, to the bit.  If explaining fails, a warning says so, and training goes on;
- one process explains, and asks the others for nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.strategies import FSDPStrategy
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from vit.dashboard.format import PAIRS, PROBE, RUN, STEPS, encode, pack_arrays
from vit.dashboard.summary import blob_summary, tensor_summary
from vit.data.augment import normalise
from vit.data.dataset import ImageData
from vit.data.preprocess import Preprocessing
from vit.data.resident import free_memory
from vit.explain.attention_tab import measure, run_info
from vit.training import attention_pictures, pictures
from vit.training.budget import Budget, CostEstimate
from vit.training.events import EventFile
from vit.training.observation import FIRST, MOST_SHOWS, REST, Observation, Plan, look, plan
from vit.training.tracked_images import Probes, choose_probes

log = logging.getLogger("vit")

_MAPS_SHARE, _FAITHFULNESS_SHARE = 0.01, 0.004  # of the time
_LEAST = 0.4  # seconds for faithfulness, at the end, even where that is more than its share
_PERTURBATIONS = 8
_PICTURED = 8  # images in a picture
_HEADS = 3  # images whose every head is drawn
_FLUSH_EVERY = 5.0

T = TypeVar("T")


class AttentionLog(L.Callback):
    """Write attention into the run's events.

    Args:
        count: images.
        data: where they come from.
        preprocessing: of the model.
        events: the run's file; whoever makes it goes before this in the trainer's callbacks.

    Writes the records of `vit.dashboard.format`; pictures `attention/{rollout,relevance}` and `attention/heads/NN`;
    curves `attention/{distance,entropy,patch_mass}/layer_NN` and `attention/sinks/{top_patch_mass,outlier_share}`.

    Raises `VitError` when events cannot be written.
    """

    def __init__(self, count: int, data: ImageData, preprocessing: Preprocessing, events: EventFile) -> None:
        self.count, self.data, self.preprocessing, self.events = count, data, preprocessing, events
        self.maps, self.faithfulness = Budget(_MAPS_SHARE), Budget(_FAITHFULNESS_SHARE)
        self._probes: Probes | None = None  # None as long as, and once, nothing is to be logged
        self._plan = Plan(0, 0, 0, False, 1)
        self._images: Tensor = torch.empty(0)
        self._grid = (1, 1)
        self._logged = -1
        self._done: dict[str, int] | None = None  # how many of each kind are written; None: not known yet
        self._look, self._show = CostEstimate(), CostEstimate()  # of the records, and of pictures and pairs
        self._method = CostEstimate()  # of a method's faithfulness

    # when

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or not self.count:
            return
        if isinstance(trainer.strategy, FSDPStrategy):
            log.info("attention is not logged: with trainer=fsdp no process has the whole model")
            return
        for budget in (self.maps, self.faithfulness):
            budget.start()
        with self.maps.spend():
            record = self._guarded(lambda: self._prepare(pl_module))
        if record is None or self._probes is None:
            return
        self._logged = trainer.global_step
        self.events.write(record, trainer.global_step)
        if not trainer.global_step:
            self._done = dict.fromkeys(("steps", "shows", "pairs"), 0)
            self._log(trainer.global_step, pl_module, shows=True, pairs=self._plan.pairs > 1)
            self.maps.end_startup()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._probes is None or trainer.global_step == self._logged:
            return
        due = self._due(pl_module.progress)
        if self._done is None:  # a resumed run: what was due before the checkpoint has been written
            self._done = due
            for budget in (self.maps, self.faithfulness):
                budget.start(pl_module.progress)
        end = self._look.seconds + self._show.seconds
        spare = self.maps.remaining(pl_module.progress, reserve=end) - self._look.seconds
        shows, pairs = (due[kind] > self._done[kind] for kind in ("shows", "pairs"))
        if due["steps"] <= self._done["steps"] or spare < shows * self._show.seconds or _ends(trainer):
            return
        self._done = due if shows else {**self._done, "steps": due["steps"]}
        self._log(trainer.global_step, pl_module, shows=shows, pairs=shows and pairs)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._probes is not None and trainer.global_step:
            self._log(trainer.global_step, pl_module, shows=True, pairs=self._plan.pairs > 0, last=True)
            self.events.flush()

    def _due(self, progress: float) -> dict[str, int]:
        """How many of each kind there should be by now, the one at the start aside; the last of each is the end's."""
        share = math.sqrt(min(1.0, max(0.0, progress)))
        counts = {"steps": self._plan.steps, "shows": MOST_SHOWS, "pairs": self._plan.pairs}
        return {kind: max(0, min(count - 2, int((count - 1) * share))) for kind, count in counts.items()}

    # what

    def _prepare(self, module: Any) -> Summary | None:
        """Choose the images and plan; returns the record of the run, None where there is nothing to log."""
        probes = choose_probes(self.data, self.preprocessing, self.count)
        if probes is None:
            return None
        info = run_info(module.eval_model, self.data.class_names, self.data.name)
        self._grid = tuple(info["grid"])
        memory = (free_memory(module.device) or math.inf) / 4
        sizes = len(probes), info["layers"], info["heads"], math.prod(self._grid), info["prefix"]
        self._plan = plan(*sizes, memory, reduced="reduction" in info)
        if not self._plan.steps:
            log.info("attention is not logged: that of one image alone takes more than a quarter of the free memory")
            return None
        if self._plan.pairs_images < len(probes):
            kept = f"{self._plan.pairs_images} of {len(probes)} images" if self._plan.pairs_images else "no image"
            log.info("attention of every patch to every other is large: it is kept of %s", kept)
        images = probes.images.to(module.device)
        self._images = normalise(images, self.preprocessing.mean, self.preprocessing.std)
        height, width = info["image"]  # what maps say something about
        self._probes = probes = replace(probes, images=probes.images[:, :, :height, :width])
        return tensor_summary(RUN, encode({**info, "probes": probes.described()}))

    def _log(self, step: int, module: Any, *, shows: bool, pairs: bool, last: bool = False) -> None:
        probes, images = self._probes, self._images
        assert probes is not None
        self._logged = step
        with self.maps.spend():
            seen = self._guarded(lambda: look(module.eval_model, images, probes.labels, self._plan, pairs=pairs))
        if seen is None:
            return
        took = self.maps.last
        if step:
            self._guarded(lambda: self._measure(module, seen, last))
        with self.maps.spend():
            records = self._guarded(lambda: self._records(step, seen))
            if records is not None:
                self.events.write(records, step)
                self.events.scalars(seen.scalars, step)
        self._look.add(took + self.maps.last)
        with self.maps.spend():
            for summary in self._guarded(lambda: self._pairs(step, seen)) or ():
                self.events.write(summary, step)
            drawings = self._guarded(lambda: self._pictures(step, probes, seen)) if shows else None
            for tag, picture in (drawings or {}).items():
                self.events.image(tag, picture, step)
            self.events.flush(every=_FLUSH_EVERY)
        if shows:
            self._show.add(self.maps.last)

    def _measure(self, module: Any, seen: Observation, last: bool) -> None:
        """Faithfulness, of as many methods as there is time for."""
        model, budget = module.eval_model, self.faithfulness

        def left() -> float:
            if not last:
                return budget.remaining(module.progress)
            spare = (
                self.maps.remaining(1.0) - self._look.seconds - self._show.seconds
            )  # what the maps have left over, too
            return max(budget.remaining(1.0) + max(0.0, spare), _LEAST - budget.spent)

        if not self._method.seconds:  # not known yet: a pass forward for each count of patches, in two orders
            if left() < _PERTURBATIONS / 2 * self.maps.last:  # explaining took half a dozen passes, so that is too much
                return
            with budget.spend():
                _forward(model, self._images)
            self._method.add(budget.last * 2 * (_PERTURBATIONS + 1))
        for methods in (FIRST, REST):
            price = self._method.seconds * len(methods)
            if left() < price + (0 if last else self._method.seconds * len(FIRST)):
                break
            with budget.spend():
                for method in methods:
                    maps = {method: seen.maps[method]}
                    measure(model, self._images, seen.steps, maps, seen.predicted, counts=_PERTURBATIONS)
            self._method.add(budget.last / len(methods))

    def _records(self, step: int, seen: Observation) -> Summary:
        merged = Summary()
        merged.MergeFrom(tensor_summary(STEPS, encode({"step": step, "probes": seen.steps})))
        for i, probe in enumerate(seen.probes):
            merged.MergeFrom(tensor_summary(f"{PROBE}{i:02d}", encode({"step": step, **pack_arrays(probe)})))
        return merged

    def _pairs(self, step: int, seen: Observation) -> list[Summary]:
        found = enumerate(seen.pairs)
        return [blob_summary(f"{PAIRS}{i:02d}", encode({"step": step, **pack_arrays(each)})) for i, each in found]

    def _pictures(self, step: int, probes: Probes, seen: Observation) -> dict[str, Image.Image]:
        shown = np.unique(np.linspace(0, len(probes) - 1, min(_PICTURED, len(probes))).round().astype(int)).tolist()
        images = [pictures.to_rgb(probes.images[i]) for i in shown]
        labels, said = [probes.labels[i] for i in shown], [seen.steps[i] for i in shown]
        names = self.data.class_names
        drawings = {
            f"attention/{method}": attention_pictures.overlays(
                images, seen.maps[method][shown].cpu().numpy(), labels, said, names
            )
            for method in ("rollout", "relevance")
        }
        for number, i in enumerate(shown[:: max(1, len(shown) // _HEADS)][:_HEADS]):
            title = f"{pictures.clean_text(names[probes.labels[i]])}, step {step}"
            drawings[f"attention/heads/{number:02d}"] = attention_pictures.heads(
                pictures.to_rgb(probes.images[i]), seen.probes[i]["rows"], self._grid, title
            )
        return drawings

    def _guarded(self, explain: Callable[[], T]) -> T | None:
        """What `explain` gives; where it fails, None, a warning, and nothing more is logged."""
        try:
            return explain()
        except Exception as error:
            log.warning("attention is not logged any more: %s: %s", type(error).__name__, error)
            log.debug("", exc_info=True)
            self._probes = None
            return None


def _forward(model: Any, images: Tensor) -> None:
    """A forward pass, waited for."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(images).sum().item()
    finally:
        for module in training:
            module.training = True


def _ends(trainer: L.Trainer) -> bool:
    """Whether this was the last step, after which the end's own record comes."""
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    return (
        trainer.should_stop
        or 0 <= steps <= trainer.global_step
        or (trainer.is_last_batch and 0 <= epochs <= trainer.current_epoch + 1)
    )
