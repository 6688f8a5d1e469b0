"""Train small models on two threads, each with one half of the batch.

torch divides single operations among its threads, but the operations of a small model are too short for that.  Here
each thread runs a whole forward and backward pass.  The threads synchronise twice in a step and sleep while they wait,
so another busy program slows them down little.

Notable: with one processor the halves are computed one after the other, so the weights are the same, bit for bit.
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
from vit.processors import count_cpus
from vit.training import ranks
from vit.training.config import Config, device_kind

_DROPOUT_KEYS = ("dropout", "attention_dropout", "drop_path", "patch_dropout")

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Halves:
    """Compute the loss and the gradients of a batch in two halves.

    Args:
        threads: 2, or 1 to compute the halves one after the other.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._other = ThreadPoolExecutor(1, "half", torch.set_num_threads, (1,)) if threads > 1 else None
        self._losses: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def create_for_run(cls, config: Config, model: VisionTransformer) -> Halves | None:
        """Return `Halves` for this run, or None if they would not help or would change the result.

        They suit a small model with one torch thread, on the CPU, in one process.  Two threads would share a random
        generator but not autocast, so models with dropout of any kind or lower precision are excluded.
        """
        trainer, architecture = config.trainer, model.architecture
        single_process = ranks.count_processes(trainer) == 1 and trainer.strategy == "auto"
        supported = trainer.precision in ("auto", "32") and not (config.model.compile or config.lora.rank)
        supported = supported and architecture["reduction"] == "none" and config.distill.teacher is None
        small = torch.get_num_threads() == 1 and is_small(architecture, config.data.batch_size)
        has_dropout = any(architecture[key] for key in _DROPOUT_KEYS)
        if device_kind(trainer.accelerator) != "cpu" or not (single_process and supported and small) or has_dropout:
            return None
        threads_set = trainer.threads is not None or "OMP_NUM_THREADS" in os.environ
        return cls(1 if threads_set else min(2, count_cpus()))

    def forward(self, compute: Forward, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Call `compute`, which returns the logits and the mean loss of images and targets, on both halves.

        Returns:
            The logits (B, K), and the loss of the whole batch for `backward`.
        """
        parts = [(*part, len(part[0]) / len(images)) for part in zip(images.chunk(2), targets.chunk(2), strict=True)]

        def half(images: Tensor, targets: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
            logits, loss = compute(images, targets)
            return logits, loss * fraction

        done = self._map(half, parts)
        self._losses = [(loss, loss.detach().requires_grad_()) for _, loss in done]
        return torch.cat([logits.detach() for logits, _ in done]), _sum_tensors([leaf for _, leaf in self._losses])

    def backward(self, loss: Tensor, model: nn.Module) -> None:
        """Add the gradients to `.grad`, like `loss.backward()`; `loss` is that of the last `forward`, or a multiple."""
        loss.backward()
        losses, self._losses = self._losses, []
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def half(loss: Tensor, leaf: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(loss, trainable, leaf.grad, allow_unused=True)

        for parameter, *parts in zip(trainable, *self._map(half, losses), strict=True):
            gradients = [part for part in parts if part is not None]
            if gradients:  # in a fixed order, whichever half was first
                gradient = _sum_tensors(gradients)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _map(self, function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
        if self._other is None or len(arguments) < 2:
            return [function(*item) for item in arguments]
        other = self._other.submit(function, *arguments[1])
        try:
            first = function(*arguments[0])
        finally:
            wait([other])
        return [first, other.result()]


def _sum_tensors(tensors: list[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0])
