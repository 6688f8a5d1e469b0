"""Small models of timm's with random weights, as files of every kind; made once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf


def _timm_model(name: str = "vit_tiny_patch16_224", seed: int = 0, **options: Any) -> torch.nn.Module:
    """timm's model with weights that are all random and none of them small, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = timm.create_model(name, **options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
        for key, module in model.named_modules():
            if "norm" in key and getattr(module, "weight", None) is not None:
                with torch.no_grad():
                    module.weight.add_(1)
    return model


SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}


@pytest.fixture(scope="session")
def timm_model() -> Callable[..., torch.nn.Module]:
    """A function: a name, a seed, arguments of timm's -> its model with random weights."""
    return _timm_model


@pytest.fixture(scope="session")
def small_timm(timm_model) -> torch.nn.Module:
    """A ViT of 64 x 64 pixels, two blocks and 1000 classes.  Read only."""
    return timm_model(**SMALL)


@pytest.fixture
def small() -> dict[str, int]:
    """The arguments of timm's that make a model small."""
    return dict(SMALL)


@pytest.fixture(scope="session")
def local_dir(small_timm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_timm` as timm saves it for the hub.  Read only."""
    folder = tmp_path_factory.mktemp("local") / "model"
    save_for_hf(small_timm, str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Three images of 64 x 64 pixels, normalised.  Read only."""
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
