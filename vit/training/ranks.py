"""The processes of one run: which of them this is, and what to do when another is lost.

Notable:
- A run of one process is alone, whatever a cluster or another program has left in the environment.
- The first process ends within seconds, in one line, when another one is gone; Lightning's own observer would kill it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities import rank_zero_only

from vit.errors import VitError
from vit.training.sections import TrainerConfig

log = logging.getLogger("vit")

FOLDER = "VIT_RUN_FOLDER"  # the run folder, for the processes that the first one starts
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "PMI_RANK")
_SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "JSM_NAMESPACE_SIZE", "PMI_SIZE")
_PREFIXES = ("SLURM_", "JSM_", "LSB_", "PMI_", "PMIX_", "OMPI_", "TORCHELASTIC_")
_OTHERS = ("LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OBSERVER = "_launch_process_observer"
_GRACE, _POLL = 4.0, 0.5  # seconds that a process has to notice by itself, and between looks at the others


class LostProcess(VitError):
    """Another process of the run is gone: the call was right, so the exit status is 1."""

    status = 1


def count(trainer: TrainerConfig) -> int:
    """How many processes a run has, over all machines."""
    devices = trainer.devices
    if not isinstance(devices, int):
        devices = max(1, torch.cuda.device_count()) if trainer.accelerator != "cpu" else 1
    return devices * trainer.num_nodes


@contextlib.contextmanager
def joined(trainer: TrainerConfig) -> Iterator[int]:
    """Give the rank of this process in its run, 0 for the first; the environment is as before afterwards.

    Raises `VitError` when the environment says something else than `trainer`.
    """
    before, size = dict(os.environ), count(trainer)
    try:
        if size == 1:
            _leave_others()
            setattr(rank_zero_only, "rank", 0)  # noqa: B010  # read from the environment when Lightning was imported
            yield 0
        else:
            yield _rank(size, trainer.num_nodes)
    finally:
        for key in {*before, *os.environ}:
            if key not in before and _concerns(key):
                del os.environ[key]
            elif _concerns(key):
                os.environ[key] = before[key]


def environment() -> ClusterEnvironment:
    """What has started this process, in Lightning's terms."""
    kind: type[ClusterEnvironment]
    for kind in (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment):
        # inside a SLURM allocation, but not started by srun: nothing else starts the other processes
        if kind.detect() and (kind is not SLURMEnvironment or "SLURM_PROCID" in os.environ):
            return kind()
    return LightningEnvironment()


def _leave_others() -> None:
    """Take variables that make a lone process one of several out of the environment, and name the first."""
    claims = [key for key in _RANKS if os.environ.get(key, "0") != "0"]
    claims += [key for key in _SIZES if os.environ.get(key, "1") != "1"]
    if not claims:
        return
    log.info(
        "%s=%s is set, but this run is one process, on its own; trainer.devices=N shares it among several",
        claims[0],
        os.environ[claims[0]],
    )
    for key in list(os.environ):
        if _concerns(key):
            del os.environ[key]


def _concerns(key: str) -> bool:
    return key.startswith(_PREFIXES) or key in (*_RANKS, *_SIZES, *_OTHERS, FOLDER)


def _rank(size: int, nodes: int) -> int:
    around = environment()
    if not isinstance(around, LightningEnvironment):
        if around.world_size() != size:
            raise VitError(
                f"trainer.devices and trainer.num_nodes make {size} processes, and {around.world_size()} were started "
                f"(by {type(around).__name__.removesuffix('Environment')}): set trainer.devices to those of a machine"
            )
        return around.global_rank()
    if "LOCAL_RANK" not in os.environ:
        return around.node_rank() * (size // nodes)
    if "MASTER_PORT" not in os.environ:
        raise VitError(
            f"LOCAL_RANK={os.environ['LOCAL_RANK']} is set, so something else starts the processes of this run, but it "
            "left out MASTER_ADDR and MASTER_PORT: unset LOCAL_RANK, or start the run with torchrun"
        )
    return around.node_rank() * (size // nodes) + around.local_rank()


@contextlib.contextmanager
def faults_in(path: Path) -> Iterator[None]:
    """Write the traceback of a fault in the body to the run's log, and end this process with status 1.

    For the processes that the first one has started: it says in a line that they are gone.  Where nobody started them
    so, or tracebacks are asked for, the fault goes on.
    """
    try:
        yield
    except VitError:
        raise
    except Exception:
        if FOLDER not in os.environ or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"a fault of process {os.environ.get('LOCAL_RANK')}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None


@contextlib.contextmanager
def watched(trainer: L.Trainer, go_on: Callable[[], str]) -> Iterator[None]:
    """Turn the loss of another process in the body into one line.

    Args:
        go_on: says, as the end of a sentence, how to go on.

    Raises:
        LostProcess: an error of the connection; where none shows up, the process ends itself.
    """
    if trainer.world_size == 1:
        yield
        return
    observer = getattr(subprocess_script, _OBSERVER)
    setattr(subprocess_script, _OBSERVER, lambda child_processes: None)
    over, parent = threading.Event(), os.getppid()

    def children() -> list[subprocess.Popen[bytes]]:
        return getattr(trainer.strategy.launcher, "procs", [])

    def lost() -> str | None:
        for rank, child in enumerate(children(), start=1):
            if child.poll():
                return f"process {rank} of {trainer.world_size} of this run is gone ({_ended(child.returncode)})"
        if FOLDER in os.environ and trainer.global_rank and os.getppid() != parent:
            return "the first process of this run is gone"
        return None

    def watch() -> None:
        while not over.wait(_POLL):
            if lost() and not over.wait(_GRACE):  # this process waits for the other, for ever
                _kill(children())
                sys.stderr.write(f"{lost()}: {go_on()}\n")
                sys.stderr.flush()
                os._exit(LostProcess.status)

    threading.Thread(target=watch, name="watch-processes", daemon=True).start()
    seconds = 1.0
    try:
        yield
        seconds = 10.0  # the others have ended training too, and are about to leave
    except RuntimeError as error:
        if not _of_the_connection(error):
            raise
        until = time.monotonic() + _GRACE
        while (line := lost()) is None and time.monotonic() < until:
            time.sleep(_POLL / 5)
        raise LostProcess(f"{line or 'another process of this run is gone'}: {go_on()}") from None
    finally:
        over.set()
        setattr(subprocess_script, _OBSERVER, observer)
        _reap(children(), seconds)


def _reap(children: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait for processes, at most so long; then end them."""
    until = time.monotonic() + seconds
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, until - time.monotonic()))
    _kill(children)


def _kill(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()


def _ended(status: int) -> str:
    if status >= 0:
        return f"it ended with status {status}" + ": see train.log" * (status == 1)
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}" + ", as when memory is short" * (-status == signal.SIGKILL)
    return f"killed by signal {-status}"


def _of_the_connection(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
