"""From attention weights to a map of what mattered: one number a patch, for each image.

`explain` is the way in.  Every method gives maps (B, rows, columns) on the model's patch grid, not negative, each of
sum 1; `trace` runs the model once for several of them.

| method | formula, A_l the weights of layer l | says |
| --- | --- | --- |
| `raw` | the head's row of one A_l | where one layer looks |
| `rollout` | the head's row of Â_L ... Â_1, Â = rownorm(fuse_h A + I) (Abnar & Zuidema 2020) | where information comes from |
| `gradient_rollout` | the same with fuse = mean_h (A ∘ ∂s/∂A)⁺ | ... that speaks for a class |
| `relevance` | the head's row of (I + Ā_L) ... (I + Ā_1), Ā = mean_h (A ∘ ∂s/∂A)⁺ (Chefer et al., ICCV 2021) | the same, not normalised |
| `legrad` | sum over layers of mean (∂s_l/∂A_l)⁺, s_l the score read off layer l (Bousselham et al. 2024) | what would raise the score |
| `random` | uniform noise | nothing: the baseline |

Notable: the head's row is `Record.readout`, one-hot for a class token, uniform for a mean, a pooling head's own
weights; it is carried down as a row, a vector times a matrix a layer, and never multiplies two matrices.
Class-specific methods weigh it by its own gradient like any other attention, except where it is one-hot.
"""  # noqa: E501  # the table's rows

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vit.errors import VitError, nearest
from vit.explain.record import Record, find, record_attention, resolve_layer, single

Fusion = Literal["mean", "max", "min"]
FUSIONS: tuple[Fusion, ...] = ("mean", "max", "min")


@dataclass
class Trace:
    """One forward pass, and what a class's score says about it.

    Attributes
        logits: (B, K).
        target: int64 (B,), the class whose score `gradients` are of.
        weights: L times (B, H, N, N).
        readout: (B, R, N), see `Record.readout`.
        gradients, readout_gradients: of the score by `weights` and `readout`; None where not asked for.
        legrad: L times (B, N), mean positive gradient of each layer's own score; None where not asked for.
        tokens: (B, N, D), the last layer's.
        prefix_tokens, grid, pool: of the model.
    """

    logits: Tensor
    target: Tensor
    weights: list[Tensor]
    readout: Tensor
    tokens: Tensor
    prefix_tokens: int
    grid: tuple[int, int]
    pool: str
    gradients: list[Tensor] | None = None
    readout_gradients: Tensor | None = None
    legrad: list[Tensor] | None = None


def explain(
    model: nn.Module,
    images: Tensor,
    method: str = "rollout",
    *,
    target: int | Tensor | None = None,
    layer: int | None = None,
    head: int | None = None,
    fusion: Fusion = "mean",
    discard: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """A map for each image: (B, rows, columns) of patches, float32, at least 0, sum 1.

    Arguments
        model: a `VisionTransformer`; runs in evaluation mode, and is left as it was.
        images: normalised, (B, C, height, width).
        method: a key of `METHODS`.
        target: the class to explain, one or one an image; None: the predicted one.  Ignored by methods that do not
            depend on the class (see `CLASS_SPECIFIC`).
        layer: `raw`: which layer, None: the last, which of an attention pool is the pool's own; the others: go no
            higher than this one, None: the last.
        head: this head alone, instead of all; not for `legrad`.
        fusion: how `rollout` makes one matrix of a layer's heads.
        discard: `rollout`: the share of each layer's smallest weights that is left out.
        seed: of `random`.

    Raises `VitError` for a method, target, layer or head that does not exist.
    """
    check_method(method)
    traced = trace(model, images, target, methods=[method])
    return METHODS[method](traced, layer=layer, head=head, fusion=fusion, discard=discard, seed=seed)


def trace(
    model: nn.Module, images: Tensor, target: int | Tensor | None = None, *, methods: Iterable[str] | None = None
) -> Trace:
    """Run `model` once, with what `methods` (None: all of them) need.

    In evaluation mode and float32, without touching parameters' gradients or any random generator; arguments as those
    of `explain`.  Raises `VitError`.
    """
    wanted = set(METHODS if methods is None else methods)
    for method in wanted:
        check_method(method)
    gradients = bool(wanted & CLASS_SPECIFIC)
    vit = find(model)
    with _undisturbed(model, images.device, gradients), record_attention(model, gradients=gradients) as record:
        # from the images on there is a graph, also where no parameter is trained
        images = images.detach().clone().requires_grad_(gradients)
        logits = vit(images)
        chosen = _target(target, logits.detach())
        out = Trace(
            logits=single(logits.detach()),
            target=chosen,
            weights=record.weights,
            readout=record.readout,
            tokens=record.tokens[-1],
            prefix_tokens=record.prefix_tokens,
            grid=record.grid,
            pool=vit.pool,
        )
        if gradients:
            _differentiate(out, logits, vit, record, legrad="legrad" in wanted)
    return out


def _differentiate(out: Trace, logits: Tensor, vit: Any, record: Record, *, legrad: bool) -> None:
    """Fill in gradients, then cut what `out` holds off the graph."""
    score = logits.gather(1, out.target[:, None]).sum()
    inputs = [*out.weights, *([out.readout] if out.readout.requires_grad else [])]
    found = torch.autograd.grad(score, inputs, retain_graph=legrad)
    out.gradients = [single(gradient) for gradient in found[: len(out.weights)]]
    out.readout_gradients = single(found[-1]) if len(found) > len(out.weights) else None
    readout = out.readout.detach()
    if legrad:
        out.legrad = []
        for weights, tokens in zip(out.weights, record.tokens, strict=True):
            logits = vit.answer(tokens)
            own = record.readout if out.pool == "attention" else weights
            (gradient,) = torch.autograd.grad(logits.gather(1, out.target[:, None]).sum(), own, retain_graph=True)
            positive = single(gradient).clamp(min=0)
            out.legrad.append(positive.mean(dim=1) if positive.ndim == 3 else positive.mean(dim=(1, 2)))
    out.readout, out.tokens = single(readout), out.tokens.detach()
    out.weights = [single(weights.detach()) for weights in out.weights]


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device, gradients: bool) -> Iterator[None]:
    """Evaluation mode, float32, with or without a graph, whatever is around; each module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _target(target: int | Tensor | None, logits: Tensor) -> Tensor:
    B, K = logits.shape
    if target is None:
        return logits.argmax(1)
    chosen = torch.as_tensor(target, device=logits.device)
    if chosen.dtype == torch.bool or chosen.is_floating_point() or chosen.is_complex():
        raise VitError(f"target: expected a class as a whole number, not {target!r}")
    if chosen.ndim > 1 or (chosen.ndim and len(chosen) != B):
        raise VitError(f"target: expected a class, or one for each of {B} images, not shape {tuple(chosen.shape)}")
    chosen = chosen.to(torch.int64).expand(B)
    wrong = [label for label in chosen.tolist() if not 0 <= label < K]
    if wrong:
        raise VitError(f"target: the model has classes 0 to {K - 1}, not {wrong[0]}")
    return chosen


def check_method(method: str) -> None:
    """Raise `VitError` for a method that does not exist."""
    if method not in METHODS:
        raise VitError(f"no method {method!r}; {nearest(str(method), METHODS)}")


# on weights alone


def rollout(
    weights: Sequence[Tensor],
    prefix_tokens: int,
    grid: tuple[int, int],
    readout: Tensor | None = None,
    *,
    fusion: Fusion = "mean",
    discard: float = 0.0,
) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, section 3): maps (B, rows, columns), each of sum 1.

    `R = Â_L ... Â_1` with `Â = rownorm(fuse_h(A) + I)`, half for the residual connection; the map is the row of `R`
    that the head reads, its patches' share made to sum to 1.

    Arguments
        weights: A_1 to A_L, (B, H, N, N) each.
        prefix_tokens: class token and registers, in front of the patches.
        grid: rows and columns of patches.
        readout: (B, N) or (B, R, N), how the head weighs the last tokens; None: the class token, token 0, or without
            prefix tokens the mean of the patches.
        fusion: "mean", "max" or "min" over heads.
        discard: this share of each image's and layer's fused weights, the smallest, is set to 0; columns of prefix
            tokens always stay, and rows sum to 1 again afterwards.

    Raises `VitError` when the sizes do not fit each other or an option is out of range.
    """
    if not len(weights):
        raise VitError("rollout: there are no weights")
    B, N = weights[0].shape[0], weights[0].shape[-1]
    for shape in (each.shape for each in weights):
        if len(shape) != 4 or (shape[0], *shape[2:]) != (B, N, N):
            raise VitError(f"rollout: expected all rows of every layer, (B, H, N, N), not {tuple(shape)}")
    row = _start(readout, B, N, prefix_tokens, weights[0])
    return _map(_roll(weights, row, prefix_tokens, fusion, discard), prefix_tokens, grid)


def rollout_by_depth(t: Trace, *, fusion: Fusion = "mean", discard: float = 0.0) -> Tensor:
    """Rollout through layers 0 to l, as if the head read there, for every l: (L, B, rows, columns).

    The last is the rollout.  All are carried down together, so it costs hardly more than the deepest alone.
    """
    start_B1N = t.readout.mean(dim=1, keepdim=True)
    rows_BLN = start_B1N[:, :0]
    for weights_BHNN in reversed(t.weights):
        rows_BLN = _down(torch.cat([start_B1N, rows_BLN], dim=1), weights_BHNN, t.prefix_tokens, fusion, discard)
    return torch.stack([_map(row_BN, t.prefix_tokens, t.grid) for row_BN in rows_BLN.unbind(dim=1)])


def _start(readout: Tensor | None, B: int, N: int, prefix: int, like: Tensor) -> Tensor:
    if readout is None:
        readout = like.new_zeros(B, N)
        readout[:, slice(0, 1) if prefix else slice(None)] = 1
    readout = (readout.mean(dim=1, dtype=like.dtype) if readout.ndim == 3 else readout).to(like)
    if readout.shape != (B, N):
        raise VitError(f"readout: expected a weight for each of {N} tokens of {B} images, not {tuple(readout.shape)}")
    return readout / readout.sum(dim=1, keepdim=True)


def _roll(weights: Sequence[Tensor], row_BN: Tensor, prefix: int, fusion: str, discard: float) -> Tensor:
    """Carry a row down through all layers: (B, N) -> (B, N), of sum 1."""
    rows_B1N = row_BN[:, None]
    for weights_BHNN in reversed(weights):
        rows_B1N = _down(rows_B1N, weights_BHNN, prefix, fusion, discard)
    return rows_B1N[:, 0]


def _down(rows_BRN: Tensor, weights_BHNN: Tensor, prefix: int, fusion: str, discard: float) -> Tensor:
    """Rows times `Â = rownorm(fuse_h(A) + I)`: (B, R, N) -> (B, R, N)."""
    if fusion not in FUSIONS:
        raise VitError(f"fusion: no {fusion!r}; {nearest(str(fusion), FUSIONS)}")
    if not 0 <= discard < 1:
        raise VitError(f"discard: expected a share from 0 to under 1, not {discard!r}")
    if fusion == "mean" and not discard and rows_BRN.shape[1] == 1:
        # (mean_h A + I) / 2: its rows sum to 1 as they are, and no mean matrix has to be made
        return (_through(rows_BRN[:, 0], weights_BHNN)[:, None] + rows_BRN) / 2
    fused_BNN = _discarded(_fuse(weights_BHNN, fusion), prefix, discard)
    shares_BRN = rows_BRN / (fused_BNN.sum(dim=2) + 1)[:, None]
    with torch.autocast(fused_BNN.device.type, enabled=False):
        return torch.bmm(shares_BRN, fused_BNN) + shares_BRN


def _through(row_BN: Tensor, weights_BHNN: Tensor) -> Tensor:
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


def _map(row_BN: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
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


# on a trace


def _raw(t: Trace, *, layer: int | None = None, head: int | None = None, **_: Any) -> Tensor:
    if t.pool == "attention" and layer is None:
        return _map(_heads(t.readout, head).mean(dim=1), t.prefix_tokens, t.grid)
    weights = t.weights[-1 if layer is None else resolve_layer(layer, len(t.weights))]
    row_BN = t.readout.mean(dim=1)
    return _map(_through(row_BN, _heads(weights, head)), t.prefix_tokens, t.grid)


def _rollout(
    t: Trace, *, layer: int | None = None, head: int | None = None, fusion: str = "mean", discard: float = 0.0, **_: Any
) -> Tensor:
    weights, row_BN = _below(t, t.weights, layer, head), _entry(t, layer)
    return _map(_roll(weights, row_BN, t.prefix_tokens, fusion, discard), t.prefix_tokens, t.grid)


def _gradient_rollout(t: Trace, *, layer: int | None = None, head: int | None = None, **_: Any) -> Tensor:
    row_BN = _entry(t, layer, gradients=True)
    for weights in reversed(_below(t, _positive(t), layer, head)):
        share_BN = row_BN / (weights.mean(dim=1).sum(dim=2) + 1)
        row_BN = _through(share_BN, weights) + share_BN
    return _map(row_BN, t.prefix_tokens, t.grid)


def _relevance(t: Trace, *, layer: int | None = None, head: int | None = None, **_: Any) -> Tensor:
    row_BN = _entry(t, layer, gradients=True)
    for weights in reversed(_below(t, _positive(t), layer, head)):
        row_BN = row_BN + _through(row_BN, weights)
    return _map(row_BN, t.prefix_tokens, t.grid)


def _legrad(t: Trace, *, layer: int | None = None, **_: Any) -> Tensor:
    assert t.legrad is not None
    layers = t.legrad if layer is None else t.legrad[: resolve_layer(layer, len(t.legrad)) + 1]
    return _map(torch.stack(layers).sum(dim=0), t.prefix_tokens, t.grid)


def _random(t: Trace, *, seed: int = 0, **_: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(t.logits), t.grid[0] * t.grid[1], generator=generator).to(t.logits.device)
    return _map(draws, 0, t.grid)


METHODS: dict[str, Callable[..., Tensor]] = {
    "rollout": _rollout,
    "raw": _raw,
    "relevance": _relevance,
    "gradient_rollout": _gradient_rollout,
    "legrad": _legrad,
    "random": _random,
}
CLASS_SPECIFIC = frozenset({"relevance", "gradient_rollout", "legrad"})
"""Methods whose maps depend on the class that is asked about."""


def _positive(t: Trace) -> list[Tensor]:
    """(A ∘ ∂s/∂A)⁺ of every layer."""
    assert t.gradients is not None
    return [(a * g).clamp(min=0) for a, g in zip(t.weights, t.gradients, strict=True)]


def _entry(t: Trace, layer: int | None, gradients: bool = False) -> Tensor:
    """The row that a method carries down: (B, N).  From the head, or from `layer` as if the head read there."""
    readout = t.readout
    last = layer is None or resolve_layer(layer, len(t.weights)) == len(t.weights) - 1
    if gradients and t.readout_gradients is not None and last:
        # each patch's share in the score, as for any attention; scaled to sum 1, which changes no map
        readout = (readout * t.readout_gradients).clamp(min=0)
        total = readout.sum(dim=(1, 2), keepdim=True)
        readout = torch.where(total > 0, readout / total.clamp(min=1e-30), t.readout)
    return readout.mean(dim=1)


def _below(t: Trace, tensors: list[Tensor], layer: int | None, head: int | None) -> list[Tensor]:
    top = len(tensors) if layer is None else resolve_layer(layer, len(tensors)) + 1
    return [_heads(each, head) for each in tensors[:top]]


def _heads(weights_BHxx: Tensor, head: int | None) -> Tensor:
    if head is None:
        return weights_BHxx
    H = weights_BHxx.shape[1]
    if isinstance(head, bool) or not isinstance(head, int) or not -H <= head < H:
        raise VitError(f"head {head!r}: there are heads 0 to {H - 1}")
    return weights_BHxx[:, [head]]
