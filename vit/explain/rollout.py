"""Attention rollout from weights alone: a row of weights goes from the head down through the layers to the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vit.errors import VitError, did_you_mean
from vit.explain.record import Weights
from vit.model.reduction import TokenMap

Fusion = Literal["mean", "max", "min"]
FUSIONS: tuple[Fusion, ...] = ("mean", "max", "min")


def rollout(
    weights: Sequence[Tensor],
    prefix_tokens: int,
    grid: tuple[int, int],
    readout: Tensor | None = None,
    *,
    fusion: Fusion = "mean",
    discard: float = 0.0,
    token_maps: Sequence[TokenMap | None] | None = None,
) -> Tensor:
    """Compute attention rollout (Abnar & Zuidema 2020, section 3): maps (B, rows, columns), each of sum 1.

    `R = Â_L ... Â_1` with `Â = rownorm(fuse_h(A) + I)`, half for the residual connection; the map is the row of `R`
    that the head reads, its part of the patches made to sum to 1.  Where tokens were reduced, the matrices of the
    token maps stand between the layers: `R = M_L Â_L ... M_1 Â_1`.

    Args:
        weights: A_1 to A_L, (B, H, N, N) each; of a record of differential attention, their positive part is taken
            and made to sum to 1 by row, so that every layer is half residual, as with any other attention.
        prefix_tokens: class token and registers, in front of the patches.
        grid: rows and columns of patches.
        readout: (B, N) or (B, R, N), how the head weighs the last tokens; None: the class token, token 0, or without
            prefix tokens the mean of the patches.
        fusion: "mean", "max" or "min" over heads.
        discard: this fraction of each image's and layer's fused weights, the smallest, is set to 0; columns of prefix
            tokens always stay, and rows sum to 1 again afterwards.
        token_maps: see `Record.token_maps`; None: those of `weights`, which a record's weights have.

    Raises `VitError` when the sizes do not fit each other or an option is out of range.
    """
    if not len(weights):
        raise VitError("rollout: there are no weights")
    if token_maps is None:
        token_maps = getattr(weights, "token_maps", None) or [None] * (len(weights) + 1)
    _check_sizes(weights, token_maps)
    weights = weights.fractions() if isinstance(weights, Weights) else weights
    row_BN = unmerge(token_maps[-1], _initial_row(readout, _sizes(weights, token_maps), prefix_tokens))
    return to_map(propagate(weights, row_BN, token_maps, prefix_tokens, fusion, discard), prefix_tokens, grid)


def _check_sizes(weights: Sequence[Tensor], token_maps: Sequence[TokenMap | None]) -> None:
    """Raise `VitError` where layers do not fit each other and the token maps between them."""
    if len(token_maps) != len(weights) + 1:
        raise VitError(f"rollout: {len(weights)} layers need {len(weights) + 1} token maps, not {len(token_maps)}")
    B, N = weights[0].shape[0], weights[0].shape[-1]
    for each, token_map in zip(weights, token_maps[1:], strict=True):
        shape = tuple(each.shape)
        if len(shape) != 4 or (shape[0], *shape[2:]) != (B, N, N):
            reduced = each.ndim == 4 and shape[0] == B and shape[2] == shape[3] and not any(token_maps)
            hint = ": were tokens reduced? Give record.weights as they are, or token_maps=record.token_maps"
            raise VitError(f"rollout: expected all rows of every layer, (B, H, N, N), not {shape}{hint * reduced}")
        if token_map is not None:
            if token_map.index_BN.shape != (B, N):
                shape = tuple(token_map.index_BN.shape)
                raise VitError(f"rollout: a token map of {shape} tokens for weights of ({B}, {N})")
            N = token_map.tokens


def _sizes(weights: Sequence[Tensor], token_maps: Sequence[TokenMap | None]) -> Tensor:
    """Count the tokens of the first layer that each of the last stands for, (B, N)."""
    sizes_BN = torch.ones_like(weights[0][:, 0, 0])
    for token_map in token_maps[1:]:
        if token_map is not None:
            sizes_BN = token_map.scatter_sum(sizes_BN)
    return sizes_BN


def _initial_row(readout: Tensor | None, sizes_BN: Tensor, prefix: int) -> Tensor:
    B, N = sizes_BN.shape
    if readout is None:
        readout = sizes_BN * (torch.arange(N, device=sizes_BN.device) < (1 if prefix else N))
    readout = (readout.mean(dim=1, dtype=sizes_BN.dtype) if readout.ndim == 3 else readout).to(sizes_BN)
    if readout.shape != (B, N):
        raise VitError(f"readout: expected a weight for each of {N} tokens of {B} images, not {tuple(readout.shape)}")
    return readout / readout.sum(dim=1, keepdim=True)


def propagate(
    weights: Sequence[Tensor],
    row_BN: Tensor,
    token_maps: Sequence[TokenMap | None] | None,
    prefix: int,
    fusion: str,
    discard: float,
) -> Tensor:
    """Propagate a row from the last layer to the image: (B, N) -> (B, N), of sum 1."""
    rows_B1N = row_BN[:, None]
    for layer in reversed(range(len(weights))):
        rows_B1N = rollout_step(rows_B1N, weights[layer], prefix, fusion, discard)
        rows_B1N = unmerge(None if token_maps is None else token_maps[layer], rows_B1N)
    return rows_B1N[:, 0]


def unmerge(token_map: TokenMap | None, rows_BxN: Tensor) -> Tensor:
    """Turn rows over the tokens after a token map into rows over those before it."""
    return rows_BxN if token_map is None else token_map.unmerge(rows_BxN)


def rollout_step(rows_BRN: Tensor, weights_BHNN: Tensor, prefix: int, fusion: str, discard: float) -> Tensor:
    """Multiply rows by `Â = rownorm(fuse_h(A) + I)`: (B, R, N) -> (B, R, N)."""
    if fusion not in FUSIONS:
        raise VitError(f"fusion: no {fusion!r}; {did_you_mean(str(fusion), FUSIONS)}")
    if not 0 <= discard < 1:
        raise VitError(f"discard: expected a share from 0 to under 1, not {discard!r}")
    if fusion == "mean" and not discard and rows_BRN.shape[1] == 1:
        # (mean_h A + I) / 2: its rows sum to 1 as they are, and no mean matrix has to be made
        return (attend_mean(rows_BRN[:, 0], weights_BHNN)[:, None] + rows_BRN) / 2
    fused_BNN = _discard_smallest(_fuse(weights_BHNN, fusion), prefix, discard)
    fractions_BRN = rows_BRN / (fused_BNN.sum(dim=2) + 1)[:, None]
    with torch.autocast(fused_BNN.device.type, enabled=False):
        return torch.bmm(fractions_BRN, fused_BNN) + fractions_BRN


def attend_mean(row_BN: Tensor, weights_BHNN: Tensor) -> Tensor:
    """Multiply a row by `mean_h A`, without making the mean matrix: (B, N) -> (B, N)."""
    with torch.autocast(row_BN.device.type, enabled=False):
        return (row_BN[:, None, None] @ weights_BHNN)[:, :, 0].mean(dim=1)


def _fuse(weights_BHNN: Tensor, fusion: str) -> Tensor:
    if fusion == "mean":
        return weights_BHNN.mean(dim=1)
    return weights_BHNN.amax(dim=1) if fusion == "max" else weights_BHNN.amin(dim=1)


def _discard_smallest(fused_BNN: Tensor, prefix: int, discard: float) -> Tensor:
    B, N, _ = fused_BNN.shape
    count = int(discard * N * (N - prefix))
    if not count:
        return fused_BNN
    patches = fused_BNN[:, :, prefix:].flatten(1)
    smallest = patches.topk(count, dim=1, largest=False, sorted=False).indices
    kept = torch.ones_like(patches).scatter_(1, smallest, 0).view(B, N, N - prefix)
    return torch.cat([fused_BNN[:, :, :prefix], fused_BNN[:, :, prefix:] * kept], dim=2)


def to_map(row_BN: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Turn the patches' part of a row into a map of sum 1; where nothing is left of it, every patch gets the same."""
    patches_BP = row_BN[:, prefix:].float()
    if patches_BP.shape[1] != grid[0] * grid[1]:
        raise VitError(
            f"{patches_BP.shape[1]} patch tokens do not make a grid of {grid[0]} x {grid[1]}: were patches dropped? "
            "Record in evaluation mode"
        )
    # scaled first: gradients may be so small that their sum is no longer a number to divide by
    patches_BP = patches_BP / patches_BP.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    total_B1 = patches_BP.sum(dim=1, keepdim=True)
    even = torch.full_like(patches_BP, 1 / patches_BP.shape[1])
    return torch.where(total_B1 > 0, patches_BP / total_B1.clamp(min=1e-12), even).unflatten(1, grid)
