"""Models shaken out of their zeros, and the formulas of `reference.py`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The formulas in NumPy; tests are imported one file at a time, so the module is loaded by its place."""
    spec = importlib.util.spec_from_file_location("formulas_in_numpy", Path(__file__).with_name("reference.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shake() -> Callable[..., nn.Module]:
    """Add noise to every parameter, so that no zero bias, unit gain or tiny token can hide an error."""

    def shaken(module: nn.Module, scale: float = 0.1, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        return module

    return shaken
