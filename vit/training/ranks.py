"""Find the rank of this process, and end the run if another process is lost.

Notable:
- A run of one process ignores variables that a cluster or another program has set in the environment.
- If a process is gone, the first one ends within seconds with one line; Lightning's own observer would kill it.
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

FOLDER_VARIABLE = "VIT_RUN_FOLDER"  # tells the other processes the run folder
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "PMI_RANK")
_SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "JSM_NAMESPACE_SIZE", "PMI_SIZE")
_PREFIXES = ("SLURM_", "JSM_", "LSB_", "PMI_", "PMIX_", "OMPI_", "TORCHELASTIC_")
_OTHER_VARIABLES = ("LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OBSERVER = "_launch_process_observer"
_GRACE, _POLL = 4.0, 0.5  # seconds: time to notice a loss by itself; interval of checks


class LostProcess(VitError):
    """Another process of the run is gone although the call was correct, so the exit status is 1."""

    status = 1


def count_processes(trainer: TrainerConfig) -> int:
    """Return the number of processes of a run, over all machines."""
    devices = trainer.devices
    if not isinstance(devices, int):
        devices = max(1, torch.cuda.device_count()) if trainer.accelerator != "cpu" else 1
    return devices * trainer.num_nodes


@contextlib.contextmanager
def join_run(trainer: TrainerConfig) -> Iterator[int]:
    """Yield the rank of this process, 0 for the first; restore the environment afterwards.

    Raises:
        VitError: the environment contradicts `trainer`.
    """
    saved_environment, size = dict(os.environ), count_processes(trainer)
    try:
        if size == 1:
            _drop_cluster_variables()
            setattr(rank_zero_only, "rank", 0)  # noqa: B010  # Lightning has read it from the environment at import
            yield 0
        else:
            yield _read_rank(size, trainer.num_nodes)
    finally:
        for key in {*saved_environment, *os.environ}:
            if key not in saved_environment and _is_cluster_variable(key):
                del os.environ[key]
            elif _is_cluster_variable(key):
                os.environ[key] = saved_environment[key]


def detect_environment() -> ClusterEnvironment:
    """Return Lightning's environment for the launcher of this process."""
    kind: type[ClusterEnvironment]
    for kind in (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment):
        # in a SLURM allocation but not started by srun, Lightning must start the other processes
        if kind.detect() and (kind is not SLURMEnvironment or "SLURM_PROCID" in os.environ):
            return kind()
    return LightningEnvironment()


def _drop_cluster_variables() -> None:
    """Remove variables of a distributed run from the environment of a single process, and log the first."""
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
        if _is_cluster_variable(key):
            del os.environ[key]


def _is_cluster_variable(key: str) -> bool:
    return key.startswith(_PREFIXES) or key in (*_RANKS, *_SIZES, *_OTHER_VARIABLES, FOLDER_VARIABLE)


def _read_rank(size: int, nodes: int) -> int:
    cluster = detect_environment()
    if not isinstance(cluster, LightningEnvironment):
        if cluster.world_size() != size:
            raise VitError(
                f"trainer.devices and trainer.num_nodes make {size} processes, and {cluster.world_size()} were started "
                f"(by {type(cluster).__name__.removesuffix('Environment')}): set trainer.devices to those of a machine"
            )
        return cluster.global_rank()
    if "LOCAL_RANK" not in os.environ:
        return cluster.node_rank() * (size // nodes)
    if "MASTER_PORT" not in os.environ:
        raise VitError(
            f"LOCAL_RANK={os.environ['LOCAL_RANK']} is set, so something else starts the processes of this run, but it "
            "left out MASTER_ADDR and MASTER_PORT: unset LOCAL_RANK, or start the run with torchrun"
        )
    return cluster.node_rank() * (size // nodes) + cluster.local_rank()


@contextlib.contextmanager
def log_errors_to(path: Path) -> Iterator[None]:
    """Write the traceback of an error in the body to the run's log, and end this process with status 1.

    For processes that the first one has started, which reports their loss in one line.  In other processes, and with
    HYDRA_FULL_ERROR=1, the error is raised again.
    """
    try:
        yield
    except VitError:
        raise
    except Exception:
        if FOLDER_VARIABLE not in os.environ or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"a fault of process {os.environ.get('LOCAL_RANK')}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None


@contextlib.contextmanager
def watch_processes(trainer: L.Trainer, resume_hint: Callable[[], str]) -> Iterator[None]:
    """Report the loss of another process in the body in one line.

    Args:
        resume_hint: returns how to continue, as the end of a sentence.

    Raises:
        LostProcess: after a connection error; without one, the process exits.
    """
    if trainer.world_size == 1:
        yield
        return
    observer = getattr(subprocess_script, _OBSERVER)
    setattr(subprocess_script, _OBSERVER, lambda child_processes: None)
    finished, parent = threading.Event(), os.getppid()

    def children() -> list[subprocess.Popen[bytes]]:
        return getattr(trainer.strategy.launcher, "procs", [])

    def describe_loss() -> str | None:
        for rank, child in enumerate(children(), start=1):
            if child.poll():
                return f"process {rank} of {trainer.world_size} of this run is gone ({_format_exit(child.returncode)})"
        if FOLDER_VARIABLE in os.environ and trainer.global_rank and os.getppid() != parent:
            return "the first process of this run is gone"
        return None

    def watch() -> None:
        while not finished.wait(_POLL):
            if describe_loss() and not finished.wait(_GRACE):  # this process waits for the other forever
                _kill(children())
                sys.stderr.write(f"{describe_loss()}: {resume_hint()}\n")
                sys.stderr.flush()
                os._exit(LostProcess.status)

    threading.Thread(target=watch, name="watch-processes", daemon=True).start()
    timeout = 1.0
    try:
        yield
        timeout = 10.0  # the others have finished training and will exit soon
    except RuntimeError as error:
        if not _is_connection_error(error):
            raise
        deadline = time.monotonic() + _GRACE
        while (line := describe_loss()) is None and time.monotonic() < deadline:
            time.sleep(_POLL / 5)
        raise LostProcess(f"{line or 'another process of this run is gone'}: {resume_hint()}") from None
    finally:
        finished.set()
        setattr(subprocess_script, _OBSERVER, observer)
        _reap(children(), timeout)


def _reap(children: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait for processes at most `seconds`, then kill them."""
    deadline = time.monotonic() + seconds
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    _kill(children)


def _kill(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()


def _format_exit(status: int) -> str:
    if status >= 0:
        return f"it ended with status {status}" + ": see train.log" * (status == 1)
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}" + ", as when memory is short" * (-status == signal.SIGKILL)
    return f"killed by signal {-status}"


def _is_connection_error(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
