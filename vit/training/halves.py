"""Both processors for a model that is too small for torch's own threads: each half of a batch on a thread of its own.

torch divides one operation at a time among its threads, and a small model's operations are too short for that; a half
of a batch is a whole forward and backward pass.  The two threads meet twice in a step and sleep while they wait, so
another program costs no more than the processor it takes.

Notable: where there is one processor, the halves are computed in turn, and so the weights are the same, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor, nn

from vit.model import VisionTransformer
from vit.model.threads import is_small
from vit.processors import available
from vit.training import ranks
from vit.training.config import Config, device_kind

_DRAWS = ("dropout", "attention_dropout", "drop_path", "patch_dropout")

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Halves:
    """Compute a loss and its gradients in two halves of the batch.

    Args:
        threads: 2, or 1 for one half after the other.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._other = ThreadPoolExecutor(1, "half", torch.set_num_threads, (1,)) if threads > 1 else None
        self._losses: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def create_for_run(cls, config: Config, model: VisionTransformer) -> Halves | None:
        """Return the halves for this run, None where they would not help or could change what is learned.

        They are for a small model with one thread of torch, on the CPU, in one process.  Two threads would draw from
        one random generator and share no autocast, so there is no dropout of any kind and no lower precision.
        """
        trainer, options = config.trainer, model.architecture
        alone = ranks.count(trainer) == 1 and trainer.strategy == "auto"
        plain = trainer.precision in ("auto", "32") and not (config.model.compile or config.lora.rank)
        plain = plain and options["reduction"] == "none" and config.distill.teacher is None
        small = torch.get_num_threads() == 1 and is_small(options, config.data.batch_size)
        draws = any(options[key] for key in _DRAWS)
        if device_kind(trainer.accelerator) != "cpu" or not (alone and plain and small) or draws:
            return None
        given = trainer.threads is not None or "OMP_NUM_THREADS" in os.environ
        return cls(1 if given else min(2, available()))

    def forward(self, compute: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Call `compute`, which gives the logits and the mean loss of images and targets, on both halves.

        Returns:
            The logits (B, K), and the loss of the whole batch, for `backward`.
        """
        parts = [(*part, len(part[0]) / len(images)) for part in zip(images.chunk(2), targets.chunk(2), strict=True)]

        def half(images: Tensor, targets: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
            logits, loss = compute(images, targets)
            return logits, loss * fraction

        done = self._map(half, parts)
        self._losses = [(loss, loss.detach().requires_grad_()) for _, loss in done]
        return torch.cat([logits.detach() for logits, _ in done]), _sum([leaf for _, leaf in self._losses])

    def backward(self, loss: Tensor, model: nn.Module) -> None:
        """Add to `.grad` what `loss.backward()` would add, for the loss that the last `forward` gave or a multiple."""
        loss.backward()
        losses, self._losses = self._losses, []
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def half(loss: Tensor, leaf: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(loss, learning, leaf.grad, allow_unused=True)

        for parameter, *parts in zip(learning, *self._map(half, losses), strict=True):
            found = [part for part in parts if part is not None]
            if found:  # added in this order, whichever half was there first
                gradient = _sum(found)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _map(self, function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
        if self._other is None or len(arguments) < 2:
            return [function(*each) for each in arguments]
        other = self._other.submit(function, *arguments[1])
        try:
            first = function(*arguments[0])
        finally:
            wait([other])
        return [first, other.result()]


def _sum(tensors: list[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0])
