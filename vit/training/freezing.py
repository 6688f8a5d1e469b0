"""Which layers of a pretrained model learn, and from when: frozen layers, and layers freed one by one from the top.

Notable:
- layers are counted as for layer-wise decay: 0 the embedding (patches, tokens, positions), 1 .. depth the blocks, and
  above them what always learns: the last norm, the pooling and the head;
- what is frozen has no gradient at all, so optimisers leave it alone to the bit, weight decay included, and the
  backward pass ends where the lowest learning layer does;
- a layer's state is a function of progress alone, so a resumed run, and every process of a distributed one, has the
  same layers learn at the same step.
"""

from __future__ import annotations

from torch import nn

from vit.training.optim import layer_of


def lowest_layer(progress: float, *, depth: int, freeze: int | str, unfreeze: float) -> int:
    """The lowest layer that learns at `progress` in [0, 1].

    With `freeze` = n the embedding and the n lowest blocks never learn, with "all" no block does.  The other layers
    learn from the start where `unfreeze` is 0; else they come free one by one from the top, at equal distances, the
    lowest at `unfreeze` (after Howard & Ruder 2018, "Universal Language Model Fine-tuning", section 3.3).
    """
    lowest = depth + 1 if freeze == "all" else int(freeze) + 1 if freeze else 0
    if not unfreeze:
        return lowest
    waiting = depth + 1 - lowest
    # a hair above, so that a share that is met exactly is not lost to rounding
    return depth + 1 - min(waiting, int(waiting * progress / unfreeze + 1e-9))


class Freezing:
    """Freeze and free a `VisionTransformer`'s layers.

    Args:
        model: whose parameters are frozen; those that are no parameters to it now (fixed positions) never will be.
        freeze, unfreeze: see `lowest_layer`.

    From the start what will never learn is frozen, so that an optimiser made afterwards does not hold it.
    """

    def __init__(self, model: nn.Module, *, freeze: int | str = 0, unfreeze: float = 0.0) -> None:
        self.freeze, self.unfreeze = freeze, unfreeze
        names = [name for name, _ in model.named_parameters()]
        self.depth = max((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=-1) + 1
        found = [(layer_of(name, self.depth), p) for name, p in model.named_parameters() if p.requires_grad]
        self._layers = found if freeze or unfreeze else []
        self._lowest = -1
        self.update(1.0)

    @property
    def gradual(self) -> bool:
        """Whether layers come free while training runs."""
        return self.unfreeze > 0

    def update(self, progress: float) -> int | None:
        """Let the layers learn that should at `progress`; returns the lowest of them where that has changed."""
        lowest = lowest_layer(progress, depth=self.depth, freeze=self.freeze, unfreeze=self.unfreeze)
        if lowest == self._lowest:
            return None
        self._lowest = lowest
        for layer, parameter in self._layers:
            parameter.requires_grad_(layer >= lowest)
        return lowest

    def named(self, layer: int) -> str:
        """What to call a layer in a message."""
        if layer > self.depth:
            return "the head"
        return f"block {layer - 1} and what is above it" if layer else "every layer"


def num_trainable(model: nn.Module) -> int:
    """How many numbers of a model learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
