"""Attention rollout, from weights alone: information is followed from the head down to the image, a row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vit.errors import VitError, did_you_mean
from vit.explain.record import Weights
from vit.model.reduction import Move

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
    moves: Sequence[Move | None] | None = None,
) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, section 3): maps (B, rows, columns), each of sum 1.

    `R = Â_L ... Â_1` with `Â = rownorm(fuse_h(A) + I)`, half for the residual connection; the map is the row of `R`
    that the head reads, its patches' share made to sum to 1.  Where tokens were reduced, the matrices that say where
    they went stand between the layers: `R = M_L Â_L ... M_1 Â_1`.

    Arguments
        weights: A_1 to A_L, (B, H, N, N) each; of a record of differential attention, their positive part is taken
            and made to sum to 1 by row, so that every layer is half residual, as with any other attention.
        prefix_tokens: class token and registers, in front of the patches.
        grid: rows and columns of patches.
        readout: (B, N) or (B, R, N), how the head weighs the last tokens; None: the class token, token 0, or without
            prefix tokens the mean of the patches.
        fusion: "mean", "max" or "min" over heads.
        discard: this share of each image's and layer's fused weights, the smallest, is set to 0; columns of prefix
            tokens always stay, and rows sum to 1 again afterwards.
        moves: as `Record.moves` has them; None: as the weights of a record carry them along.

    Raises `VitError` when the sizes do not fit each other or an option is out of range.
    """
    if not len(weights):
        raise VitError("rollout: there are no weights")
    if moves is None:
        moves = getattr(weights, "moves", None) or [None] * (len(weights) + 1)
    _check_sizes(weights, moves)
    weights = weights.fractions() if isinstance(weights, Weights) else weights
    row_BN = back(moves[-1], _start(readout, _sizes(weights, moves), prefix_tokens))
    return to_map(carry(weights, row_BN, moves, prefix_tokens, fusion, discard), prefix_tokens, grid)


def _check_sizes(weights: Sequence[Tensor], moves: Sequence[Move | None]) -> None:
    """Raise `VitError` where layers do not fit each other and what was moved between them."""
    if len(moves) != len(weights) + 1:
        raise VitError(f"rollout: {len(weights)} layers need {len(weights) + 1} moves, not {len(moves)}")
    B, N = weights[0].shape[0], weights[0].shape[-1]
    for each, move in zip(weights, moves[1:], strict=True):
        shape = tuple(each.shape)
        if len(shape) != 4 or (shape[0], *shape[2:]) != (B, N, N):
            reduced = each.ndim == 4 and shape[0] == B and shape[2] == shape[3] and not any(moves)
            hint = ": were tokens reduced? Give record.weights as they are, or moves=record.moves" if reduced else ""
            raise VitError(f"rollout: expected all rows of every layer, (B, H, N, N), not {shape}{hint}")
        if move is not None:
            if move.place_BN.shape != (B, N):
                raise VitError(f"rollout: moves of {tuple(move.place_BN.shape)} tokens for weights of ({B}, {N})")
            N = move.tokens


def _sizes(weights: Sequence[Tensor], moves: Sequence[Move | None]) -> Tensor:
    """How many of the first layer's tokens each of the last stands for, (B, N)."""
    sizes_BN = torch.ones_like(weights[0][:, 0, 0])
    for move in moves[1:]:
        if move is not None:
            sizes_BN = move.added(sizes_BN)
    return sizes_BN


def _start(readout: Tensor | None, sizes_BN: Tensor, prefix: int) -> Tensor:
    B, N = sizes_BN.shape
    if readout is None:
        readout = sizes_BN * (torch.arange(N, device=sizes_BN.device) < (1 if prefix else N))
    readout = (readout.mean(dim=1, dtype=sizes_BN.dtype) if readout.ndim == 3 else readout).to(sizes_BN)
    if readout.shape != (B, N):
        raise VitError(f"readout: expected a weight for each of {N} tokens of {B} images, not {tuple(readout.shape)}")
    return readout / readout.sum(dim=1, keepdim=True)


def carry(
    weights: Sequence[Tensor],
    row_BN: Tensor,
    moves: Sequence[Move | None] | None,
    prefix: int,
    fusion: str,
    discard: float,
) -> Tensor:
    """Carry a row down through all layers: (B, N) -> (B, N) of the image, of sum 1."""
    rows_B1N = row_BN[:, None]
    for layer in reversed(range(len(weights))):
        rows_B1N = down(rows_B1N, weights[layer], prefix, fusion, discard)
        rows_B1N = back(None if moves is None else moves[layer], rows_B1N)
    return rows_B1N[:, 0]


def back(move: Move | None, rows_BxN: Tensor) -> Tensor:
    """Rows over the tokens after a move -> over those before it."""
    return rows_BxN if move is None else move.back(rows_BxN)


def down(rows_BRN: Tensor, weights_BHNN: Tensor, prefix: int, fusion: str, discard: float) -> Tensor:
    """Rows times `Â = rownorm(fuse_h(A) + I)`: (B, R, N) -> (B, R, N)."""
    if fusion not in FUSIONS:
        raise VitError(f"fusion: no {fusion!r}; {did_you_mean(str(fusion), FUSIONS)}")
    if not 0 <= discard < 1:
        raise VitError(f"discard: expected a share from 0 to under 1, not {discard!r}")
    if fusion == "mean" and not discard and rows_BRN.shape[1] == 1:
        # (mean_h A + I) / 2: its rows sum to 1 as they are, and no mean matrix has to be made
        return (through(rows_BRN[:, 0], weights_BHNN)[:, None] + rows_BRN) / 2
    fused_BNN = _discarded(_fuse(weights_BHNN, fusion), prefix, discard)
    shares_BRN = rows_BRN / (fused_BNN.sum(dim=2) + 1)[:, None]
    with torch.autocast(fused_BNN.device.type, enabled=False):
        return torch.bmm(shares_BRN, fused_BNN) + shares_BRN


def through(row_BN: Tensor, weights_BHNN: Tensor) -> Tensor:
    """`row @ mean_h A`, without making the mean matrix: (B, N) -> (B, N)."""
    with torch.autocast(row_BN.device.type, enabled=False):
        return (row_BN[:, None, None] @ weights_BHNN)[:, :, 0].mean(dim=1)


def _fuse(weights_BHNN: Tensor, fusion: str) -> Tensor:
    if fusion == "mean":
        return weights_BHNN.mean(dim=1)
    return weights_BHNN.amax(dim=1) if fusion == "max" else weights_BHNN.amin(dim=1)


def _discarded(fused_BNN: Tensor, prefix: int, discard: float) -> Tensor:
    B, N, _ = fused_BNN.shape
    count = int(discard * N * (N - prefix))
    if not count:
        return fused_BNN
    patches = fused_BNN[:, :, prefix:].flatten(1)
    smallest = patches.topk(count, dim=1, largest=False, sorted=False).indices
    kept = torch.ones_like(patches).scatter_(1, smallest, 0).view(B, N, N - prefix)
    return torch.cat([fused_BNN[:, :, :prefix], fused_BNN[:, :, prefix:] * kept], dim=2)


def to_map(row_BN: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """The patches' part of a row as a map of sum 1; where nothing is left of it, every patch the same."""
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
