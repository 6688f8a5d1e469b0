"""Training on a Mac's GPU, as far as that can be seen without one: what is chosen, and that nothing needs float64."""

from __future__ import annotations

import lightning.fabric.accelerators.mps
import lightning.pytorch.accelerators
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vit.data import mixing
from vit.errors import VitError
from vit.training.config import check_model, device_kind, load_config
from vit.training.devices import build_trainer


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(lightning.pytorch.accelerators.MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(lightning.fabric.accelerators.mps, "_get_all_available_mps_gpus", lambda: [0])


def composed(*overrides):
    import hydra

    from vit.training.app import CONF, resolve_config

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return load_config(resolve_config(hydra.compose("train", list(overrides))))


@pytest.mark.parametrize("choice", ["auto", "gpu", "mps"])
def test_a_macs_gpu_is_taken_in_float32(choice, mac, tmp_path):
    config = composed(f"trainer={choice}")
    check_model(config)
    trainer = build_trainer(config, tmp_path, [])
    assert trainer.strategy.root_device.type == "mps"
    assert trainer.precision == "32-true"
    assert trainer.world_size == 1


def test_the_cpu_is_taken_when_it_is_asked_for(mac, tmp_path):
    assert build_trainer(composed("trainer=cpu"), tmp_path, []).strategy.root_device.type == "cpu"


@pytest.mark.parametrize("overrides", [["trainer=ddp"], ["trainer=mps", "trainer.devices=2"]])
def test_a_macs_gpu_is_one_process(overrides, mac):
    with pytest.raises(VitError, match="a Mac's GPU trains in one process: use trainer=mps"):
        check_model(composed(*overrides))


def test_without_a_mac_there_is_no_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(VitError, match=r"trainer\.accelerator=mps: torch finds no GPU here; use trainer=cpu"):
        check_model(composed("trainer=mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_kind(name) for name in ("auto", "gpu", "cpu")] == ["cuda", "cuda", "cpu"]


class WithoutFloat64(TorchDispatchMode):
    """Refuses what a device without float64 refuses."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        wide = {torch.float64, torch.complex128}
        assert not any(isinstance(each, torch.Tensor) and each.dtype in wide for each in tree_leaves(result)), func
        return result


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=muon", "augment=deit", "ema.decay=0.9", "model.patch_dropout=0.25"],
        ["optim=adamw", "augment=strong", "model.pool=attention", "model.position=rotary"],
    ],
    ids=lambda each: each[0],
)
def test_neither_a_step_nor_a_validation_makes_float64(overrides, small, tmp_path, monkeypatch):
    """But for the table of a distribution, which is made on the host."""
    tables = {alpha: mixing.BetaQuantiles(alpha) for alpha in (0.8, 1.0)}
    monkeypatch.setattr(mixing, "BetaQuantiles", lambda alpha, device="cpu": tables[alpha])
    fit = small.prepare(tmp_path, *overrides, epochs=1, train=16, val=8)
    with WithoutFloat64():
        fit.run()
    assert fit.trainer.global_step == 2
