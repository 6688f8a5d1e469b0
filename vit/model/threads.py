"""How many threads of torch a model computes with on a CPU.

A second thread has to be woken for every operation, and beside another busy program the first then waits until it gets
a processor.  `ENOUGH` is where it pays: in steps of plain ViTs on two cores, of the width 32 to 192, one with less in a
block ran up to 1.4 times as fast with two threads while the machine had nothing else to do, and at half the speed of
one thread beside a single busy program; one with more ran 1.5 to 1.9 times as fast.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from vit.model.cost import flops
from vit.processors import count_cpus

ENOUGH = 3e8
"""Floating point operations of a batch's forward pass in one block (`vit.model.cost.flops`)."""


def use_threads(architecture: Mapping[str, Any], batch_size: int, wanted: int | None = None) -> int:
    """Set torch's threads for batches of this size and return their number.

    `wanted`, or what OMP_NUM_THREADS says, or 1 for a model too small to gain from more, or one for each processor
    that this process may use.  A function of the model, the batch and the machine: a resumed run chooses the same.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
    elif "OMP_NUM_THREADS" not in os.environ:
        threads = 1 if is_small(architecture, batch_size) else min(torch.get_num_threads(), count_cpus())
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def is_small(architecture: Mapping[str, Any], batch_size: int) -> bool:
    """Whether batches of this size are too little work for a second thread of torch."""
    return flops(architecture) * batch_size < ENOUGH * architecture["depth"]


@contextlib.contextmanager
def same_threads() -> Iterator[None]:
    """Give torch the threads back that it had before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
