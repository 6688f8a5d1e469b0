"""Build Lightning's trainer: devices, processes, precision."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy

from vit.errors import VitError
from vit.training import ranks
from vit.training.checkpoints import AtomicCheckpointIO
from vit.training.config import Config, device_kind

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def resolve_precision(precision: str, cuda: bool) -> str:
    """Return Lightning's name for a precision; "auto" is bfloat16 on NVIDIA GPUs that have it, else float32.

    bfloat16 has the range of float32, so it needs no loss scaling.  Most CPUs emulate it, which is slow.
    """
    if precision != "auto":
        return PRECISIONS[str(precision)]
    if not cuda:
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def build_trainer(config: Config, folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    """Build Lightning's trainer.  Raises `VitError` for missing devices."""
    t = config.trainer
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", module="lightning", message=".*`isinstance\\(treespec, LeafSpec\\)`.*")
    warnings.filterwarnings("ignore", module="lightning", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", module="lightning", message=".*module\\(s\\) in eval mode.*")  # the average
    warnings.filterwarnings("ignore", module="lightning", message=".*It is recommended to use `self.log.*sync_dist.*")
    warnings.filterwarnings("ignore", message=".*find_unused_parameters=True was specified in DDP constructor.*")
    warnings.filterwarnings("ignore", module="lightning", message=".*Total length of `list` across ranks is zero.*")
    warnings.filterwarnings("ignore", module="lightning", message=".*callbacks used to create the checkpoint need.*")
    kind = device_kind(t.accelerator)
    cuda = kind == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")
    if config.optim.name == "muon" and t.strategy == "fsdp":
        raise VitError("optim=muon steps whole matrices, which trainer=fsdp cuts up: use optim=adamw or trainer=ddp")
    try:
        return L.Trainer(
            accelerator=kind,
            devices=t.devices,
            num_nodes=t.num_nodes,
            strategy=_strategy(config, cuda),
            precision=resolve_precision(t.precision, cuda),  # type: ignore[arg-type]
            max_epochs=-1 if t.epochs is None else t.epochs,
            check_val_every_n_epoch=t.validate_every,
            limit_train_batches=t.limit_train_batches,
            limit_val_batches=t.limit_val_batches,
            accumulate_grad_batches=config.optim.accumulate,
            gradient_clip_val=config.optim.clip,
            deterministic=t.deterministic,
            num_sanity_val_steps=0,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(), *([ranks.detect_environment()] if ranks.count_processes(t) > 1 else [])],
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        raise VitError(f"trainer: {error}") from error


def _strategy(config: Config, cuda: bool) -> str | Strategy:
    t, gradual = config.trainer, config.finetune.unfreeze > 0
    devices = t.devices if isinstance(t.devices, int) else max(1, torch.cuda.device_count()) if cuda else 1
    if t.strategy == "ddp" or (gradual and t.strategy == "auto" and devices * t.num_nodes > 1):
        options: dict[str, Any] = {} if cuda else {"process_group_backend": "gloo"}
        # frozen layers have no gradients to exchange, and which layers are frozen changes
        return DDPStrategy(gradient_as_bucket_view=True, static_graph=False, find_unused_parameters=gradual, **options)
    if t.strategy == "fsdp":
        return FSDPStrategy(state_dict_type="full", use_orig_params=True)
    return "auto"
