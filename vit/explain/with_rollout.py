"""A model with a second output: images in, logits and attention rollout out.

Made to be exported: `vit.inference.export` writes it as one graph.  The output is computed from the recorded weights
(Abnar & Zuidema 2020 for the map), so attention is computed once, and torch's tracers see plain matrix products.
"""

from __future__ import annotations

from torch import Tensor, nn

from vit.explain.record import record_attention
from vit.explain.rollout import rollout
from vit.model import VisionTransformer


class WithRollout(nn.Module):
    """Images (B, C, height, width) -> logits (B, K) and rollout (B, rows, columns) of patches, at least 0, of sum 1.

    The rollout is `vit.rollout` with the mean over heads, from what the head reads; logits are the model's to rounding.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with record_attention(self.model, gradients=True) as record:
            logits = self.model(images)
        return logits, rollout(record.weights, record.prefix_tokens, record.grid, record.readout)
