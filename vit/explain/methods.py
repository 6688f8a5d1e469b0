"""From attention weights to a map of what mattered: one number a patch, for each image.

`explain` is the way in.  Every method gives maps (B, rows, columns) on the model's patch grid, not negative, each of
sum 1; `trace` runs the model once for several of them.

| method | formula, A_l the weights of layer l | says |
| --- | --- | --- |
| `raw` | the head's row of one A_l | where one layer looks |
| `rollout` | the head's row of Â_L ... Â_1, Â = rownorm(fuse_h A + I) (Abnar & Zuidema 2020) | where information comes from |
| `gradient_rollout` | the same with fuse = mean_h (A ∘ ∂s/∂A)⁺ | ... that speaks for a class |
| `relevance` | the head's row of (I + Ā_L) ... (I + Ā_1), Ā = mean_h (A ∘ ∂s/∂A)⁺ (Chefer et al., ICCV 2021) | the same, not normalised |
| `legrad` | sum over the last two layers of mean (∂s_l/∂A_l)⁺, s_l the score of what layer l gives out (Bousselham et al. 2024) | what would raise the score |
| `random` | uniform noise | nothing: the baseline |

Notable: the head's row is `Record.readout`, one-hot for a class token, uniform for a mean, a pooling head's own
weights; it is propagated as a row, a vector times a matrix a layer, and never multiplies two matrices.
Class-specific methods weigh it by its own gradient like any other attention, except where it is one-hot.

`legrad` follows its paper (arXiv 2404.03214) and its authors' program: with a class token, s_l is the head's score of the
mean of all of layer l's tokens, normalised after the mean, not of the class token alone; with an attention pool, the
pool reads layer l's tokens and the gradient is by the pool's weights; with mean pooling, the model's own mean is read.
The mean of (∂s_l/∂A_l)⁺ is over heads and rows, and the columns of prefix tokens are left out.  The last two layers are
the default of that program.  It was written for CLIP, where the score is a cosine with a text; here it is a logit, and
maps have sum 1 where there they are scaled to [0, 1], which changes no order.
"""  # noqa: E501  # the table's rows

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit.errors import VitError, did_you_mean
from vit.explain.record import Record, Weights, find, record_attention, resolve_layer
from vit.explain.rollout import Fusion, attend_mean, propagate, rollout_step, to_map, unmerge
from vit.map_methods import BY_CLASS
from vit.model.attention import at_least_float32
from vit.model.reduction import ReducedTokens, TokenMap, compose_all, to_fractions


@dataclass
class Trace:
    """One forward pass, and what a class's score says about it.

    Attributes:
        logits: (B, K).
        target: int64 (B,), the class whose score `gradients` are of.
        weights: L times (B, H, N, N), at least 0, rows sum to 1.
        signed_weights: those of differential attention, of which `weights` has the positive part; None: the same.
        readout: (B, R, N), see `Record.readout`.
        gradients, readout_gradients: of the score by `weights` and `readout`; None where not asked for.
        legrad: L times (B, N), mean positive gradient of each layer's own score; None where not asked for.
        tokens: (B, N, D), the last layer's.
        token_maps: see `Record.token_maps`; None: all tokens stay.
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
    signed_weights: list[Tensor] | None = None
    token_maps: Sequence[TokenMap | None] | None = None

    def map_before(self, layer: int) -> TokenMap | None:
        """Return the token map in front of the attention of `layer`, or with the number of layers, after the last."""
        return None if self.token_maps is None else self.token_maps[layer]

    def select_layers(self, layers: Sequence[int]) -> Weights:
        """Select the weights of these layers, in order, with the token maps between them."""
        token_maps = [None] * (len(self.weights) + 1) if self.token_maps is None else self.token_maps
        bounds = [0, *(layer + 1 for layer in layers), len(token_maps)]
        between = [compose_all(token_maps[low:high]) for low, high in itertools.pairwise(bounds)]
        return Weights([self.weights[layer] for layer in layers], between)

    def to_image(self, rows: Tensor, layer: int) -> Tensor:
        """Turn rows over the tokens that the attention of `layer` sees (with the number of layers, the head) into rows
        over those of the image: (B, ..., N) -> (B, ..., prefix + P)."""
        for each in range(layer, -1, -1):
            rows = unmerge(self.map_before(each), rows)
        return rows

    def readout_row(self, layer: int) -> Tensor:
        """Return how the head weighs the tokens that come out of the attention of `layer`: (B, N)."""
        row_BN = self.readout.mean(dim=1)
        for each in range(len(self.weights), layer, -1):
            row_BN = unmerge(self.map_before(each), row_BN)
        return row_BN

    def readout_attention(self, layer: int) -> Tensor:
        """Return the attention in `layer` of what the head reads, to tokens of the image: (B, H, prefix + P)."""
        rows_BHN = (self.readout_row(layer)[:, None, None] @ self.weights[layer])[:, :, 0]
        return self.to_image(rows_BHN, layer)


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
    """Compute a map for each image: (B, rows, columns) of patches, float32, at least 0, sum 1.

    Args:
        model: a `VisionTransformer`; runs in evaluation mode, and is left as it was.
        images: normalised, (B, C, height, width).
        method: a key of `METHODS`.
        target: the class to explain, one or one an image; None: the predicted one.  Ignored by methods that do not
            depend on the class (see `vit.map_methods`).
        layer: `raw`: which layer, None: the last, which of an attention pool is the pool's own; the others: go no
            higher than this one, None: the last; `legrad` takes it and the one below.
        head: this head alone, instead of all; not for `legrad`.
        fusion: how `rollout` makes one matrix of a layer's heads.
        discard: `rollout`: the fraction of each layer's smallest weights that is left out.
        seed: of `random`.

    Raises `VitError` for a method, target, layer or head that does not exist.
    """
    check_method(method)
    traced = trace(model, images, target, methods=[method])
    return METHODS[method](traced, layer=layer, head=head, fusion=fusion, discard=discard, seed=seed)


def trace(
    model: nn.Module, images: Tensor, target: int | Tensor | None = None, *, methods: Iterable[str] | None = None
) -> Trace:
    """Run `model` once and return what `methods` (None: all of them) need.

    In evaluation mode and float32, without touching parameters' gradients or any random generator; arguments as those
    of `explain`.  Raises `VitError`.
    """
    wanted = set(METHODS if methods is None else methods)
    for method in wanted:
        check_method(method)
    gradients = bool(wanted & {*BY_CLASS})
    vit = find(model)
    with _undisturbed(model, images.device, gradients), record_attention(model, gradients=gradients) as record:
        # from the images on there is a graph, also where no parameter is trained
        images = images.detach().clone().requires_grad_(gradients)
        logits = vit(images)
        chosen = _target(target, logits.detach())
        out = Trace(
            logits=at_least_float32(logits.detach()),
            target=chosen,
            weights=record.weights,
            readout=record.readout,
            tokens=record.tokens[-1],
            prefix_tokens=record.prefix_tokens,
            grid=record.grid,
            pool=vit.pool,
            token_maps=record.token_maps,
        )
        if gradients:
            _differentiate(out, logits, vit, record, legrad="legrad" in wanted)
    if record.weights.signed:
        out.signed_weights = out.weights
        out.weights = Weights(out.weights, record.token_maps, signed=True).fractions()
    return out


def _differentiate(out: Trace, logits: Tensor, vit: Any, record: Record, *, legrad: bool) -> None:
    """Fill in gradients, then cut what `out` holds off the graph."""
    score = logits.gather(1, out.target[:, None]).sum()
    inputs = [*out.weights, *([out.readout] if out.readout.requires_grad else [])]
    found = torch.autograd.grad(score, inputs, retain_graph=legrad)
    out.gradients = [at_least_float32(gradient) for gradient in found[: len(out.weights)]]
    out.readout_gradients = at_least_float32(found[-1]) if len(found) > len(out.weights) else None
    readout = out.readout.detach()
    if legrad:
        out.legrad = []
        for weights, tokens, sizes in zip(out.weights, record.tokens, record.sizes, strict=True):
            if out.pool == "token":
                mean_B1D = tokens.mean(1, keepdim=True) if sizes is None else to_fractions(sizes)[:, None] @ tokens
                tokens = mean_B1D.expand_as(tokens)
            normed = vit.norm(tokens)
            logits = vit.forward_head(normed if sizes is None else ReducedTokens(normed, sizes))
            own = record.readout if out.pool == "attention" else weights
            (gradient,) = torch.autograd.grad(logits.gather(1, out.target[:, None]).sum(), own, retain_graph=True)
            positive = at_least_float32(gradient).clamp(min=0)
            out.legrad.append(positive.mean(dim=1) if positive.ndim == 3 else positive.mean(dim=(1, 2)))
    out.readout, out.tokens = at_least_float32(readout), out.tokens.detach()
    out.weights = [at_least_float32(weights.detach()) for weights in out.weights]


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
        raise VitError(f"no method {method!r}; {did_you_mean(str(method), METHODS)}")


# on a trace


def rollout_by_depth(t: Trace, *, fusion: Fusion = "mean", discard: float = 0.0) -> Tensor:
    """Compute rollout through layers 0 to l, as if the head read there, for every l: (L, B, rows, columns).

    The last is the rollout.  All are propagated together, so it costs hardly more than the deepest alone.
    """
    start_B1N = t.readout.mean(dim=1, keepdim=True)
    rows_BLN = start_B1N[:, :0]
    for layer in reversed(range(len(t.weights))):
        start_B1N, rows_BLN = (unmerge(t.map_before(layer + 1), each) for each in (start_B1N, rows_BLN))
        rows_BLN = rollout_step(
            torch.cat([start_B1N, rows_BLN], dim=1), t.weights[layer], t.prefix_tokens, fusion, discard
        )
    rows_BLN = unmerge(t.map_before(0), rows_BLN)
    return torch.stack([to_map(row_BN, t.prefix_tokens, t.grid) for row_BN in rows_BLN.unbind(dim=1)])


def _raw(t: Trace, *, layer: int | None = None, head: int | None = None, **_: Any) -> Tensor:
    depth = len(t.weights)
    if t.pool == "attention" and layer is None:
        return to_map(t.to_image(_heads(t.readout, head).mean(dim=1), depth), t.prefix_tokens, t.grid)
    layer = depth - 1 if layer is None else resolve_layer(layer, depth)
    row_BN = attend_mean(t.readout_row(layer), _heads(t.weights[layer], head))
    return to_map(t.to_image(row_BN, layer), t.prefix_tokens, t.grid)


def _rollout(
    t: Trace, *, layer: int | None = None, head: int | None = None, fusion: str = "mean", discard: float = 0.0, **_: Any
) -> Tensor:
    weights, row_BN = _below(t, t.weights, layer, head), _entry(t, layer)
    return to_map(propagate(weights, row_BN, t.token_maps, t.prefix_tokens, fusion, discard), t.prefix_tokens, t.grid)


def _gradient_rollout(t: Trace, *, layer: int | None = None, head: int | None = None, **_: Any) -> Tensor:
    row_BN = _entry(t, layer, gradients=True)
    for each, weights in reversed(list(enumerate(_below(t, _positive(t), layer, head)))):
        fraction_BN = row_BN / (weights.mean(dim=1).sum(dim=2) + 1)
        row_BN = unmerge(t.map_before(each), attend_mean(fraction_BN, weights) + fraction_BN)
    return to_map(row_BN, t.prefix_tokens, t.grid)


def _relevance(t: Trace, *, layer: int | None = None, head: int | None = None, **_: Any) -> Tensor:
    row_BN = _entry(t, layer, gradients=True)
    for each, weights in reversed(list(enumerate(_below(t, _positive(t), layer, head)))):
        row_BN = unmerge(t.map_before(each), row_BN + attend_mean(row_BN, weights))
    return to_map(row_BN, t.prefix_tokens, t.grid)


def _legrad(t: Trace, *, layer: int | None = None, **_: Any) -> Tensor:
    assert t.legrad is not None
    top = len(t.legrad) if layer is None else resolve_layer(layer, len(t.legrad)) + 1
    first = max(0, top - 2)
    # a pooling head's weights are of the tokens that come out of a layer, its own of those that go in
    after = int(t.pool == "attention")
    on_image = [t.to_image(row_BN, each + after) for each, row_BN in enumerate(t.legrad[first:top], start=first)]
    return to_map(torch.stack(on_image).sum(dim=0), t.prefix_tokens, t.grid)


def _random(t: Trace, *, seed: int = 0, **_: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(t.logits), t.grid[0] * t.grid[1], generator=generator).to(t.logits.device)
    return to_map(draws, 0, t.grid)


METHODS: dict[str, Callable[..., Tensor]] = {
    "rollout": _rollout,
    "raw": _raw,
    "relevance": _relevance,
    "gradient_rollout": _gradient_rollout,
    "legrad": _legrad,
    "random": _random,
}


def _positive(t: Trace) -> list[Tensor]:
    """(A ∘ ∂s/∂A)⁺ of every layer."""
    assert t.gradients is not None
    return [(a * g).clamp(min=0) for a, g in zip(t.signed_weights or t.weights, t.gradients, strict=True)]


def _entry(t: Trace, layer: int | None, gradients: bool = False) -> Tensor:
    """Return the row that a method propagates, as if the head read what the attention of `layer` (None: the last) puts
    out: (B, N)."""
    readout, depth = t.readout, len(t.weights)
    layer = depth - 1 if layer is None else resolve_layer(layer, depth)
    last = layer == depth - 1
    if gradients and t.readout_gradients is not None and last:
        # each patch's share in the score, as for any attention; scaled to sum 1, which changes no map
        readout = (readout * t.readout_gradients).clamp(min=0)
        total = readout.sum(dim=(1, 2), keepdim=True)
        readout = torch.where(total > 0, readout / total.clamp(min=1e-30), t.readout)
        return unmerge(t.map_before(depth), readout.mean(dim=1))
    return t.readout_row(layer)


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
