"""Freeze layers of a pretrained model, and unfreeze them one by one from the top.

Notable:
- layers are counted as for layer-wise decay: 0 the embedding (patches, tokens, positions), 1 .. depth the blocks; the
  last norm, the pooling and the head above them are always trained;
- frozen parameters have no gradient, so optimisers do not change them, not even by weight decay, and the backward pass
  ends at the lowest trained layer;
- which layers are frozen depends on progress alone, so it is the same in a resumed run and in every process.
"""

from __future__ import annotations

from torch import nn

from vit.training.optim import layer_index


def lowest_layer(progress: float, *, depth: int, freeze: int | str, unfreeze: float) -> int:
    """Return the lowest layer that is trained at `progress` in [0, 1].

    With `freeze` = n the embedding and the n lowest blocks stay frozen, with "all" every block.  With `unfreeze` = 0
    the other layers are trained from the start.  Otherwise they are unfrozen one by one from the top, at equal
    intervals, the lowest at `unfreeze` (Howard & Ruder 2018, "Universal Language Model Fine-tuning", section 3.3).
    """
    lowest = depth + 1 if freeze == "all" else int(freeze) + 1 if freeze else 0
    if not unfreeze:
        return lowest
    frozen = depth + 1 - lowest
    # the small constant guards against rounding when a fraction is reached exactly
    return depth + 1 - min(frozen, int(frozen * progress / unfreeze + 1e-9))


class Freezing:
    """Freeze and unfreeze the layers of a `VisionTransformer`.

    Args:
        model: the model; parameters that do not require gradients now (fixed positions) never will.
        freeze, unfreeze: see `lowest_layer`.

    Layers that stay frozen are frozen at once, so that an optimiser made afterwards does not contain them.
    """

    def __init__(self, model: nn.Module, *, freeze: int | str = 0, unfreeze: float = 0.0) -> None:
        self.freeze, self.unfreeze = freeze, unfreeze
        names = [name for name, _ in model.named_parameters()]
        self.depth = max((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=-1) + 1
        layers = [(layer_index(name, self.depth), p) for name, p in model.named_parameters() if p.requires_grad]
        self._layers = layers if freeze or unfreeze else []
        self._lowest = -1
        self.update(1.0)

    @property
    def gradual(self) -> bool:
        """Whether layers are unfrozen during training."""
        return self.unfreeze > 0

    def update(self, progress: float) -> int | None:
        """Unfreeze the layers that are trained at `progress`; return the lowest if it has changed, else None."""
        lowest = lowest_layer(progress, depth=self.depth, freeze=self.freeze, unfreeze=self.unfreeze)
        if lowest == self._lowest:
            return None
        self._lowest = lowest
        for layer, parameter in self._layers:
            parameter.requires_grad_(layer >= lowest)
        return lowest

    def layer_name(self, layer: int) -> str:
        """Return the name of a layer for messages."""
        if layer > self.depth:
            return "the head"
        return f"block {layer - 1} and what is above it" if layer else "every layer"


def count_trainable(model: nn.Module) -> int:
    """Count the trainable numbers of a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
