"""Build a model without random initialisation, for weights that are loaded at once.  Imports torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SkipInit(TorchFunctionMode):
    """Replaces torch's random initialisation by zeros, for a model whose weights are loaded at once.

    Random draws take seconds for a ViT-B.  Uninitialised memory does not work: some of torch's initialisers draw again
    until the values lie in a range.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", None) == "torch.nn.init":
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)
