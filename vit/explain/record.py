"""Recording: the attention weights of a model that normally runs fused attention, which never holds them.

    with record_attention(model) as record:
        logits = model(images)
    record.weights  # one tensor (B, H, N, N) a layer

Where tokens are reduced, later layers have fewer of them; `record.token_maps` says where they went, and
`record.weights` keep that, so that `vit.rollout` gives maps of the image's own grid all the same.

Notable:
- all attention of a model runs through `vit.model.attention.Attend`; forward hooks on these modules compute the weights
  beside the output, so logits are those of the model, to the bit, also with dropout; `gradients=True` replaces the
  output by one that is computed from the weights, so that they have gradients;
- the head's own weighting of the last tokens is recorded like one more layer (`record.readout`), whatever the pooling,
  so every method works with a class token, a mean and an attention pool alike;
- hooks are removed on leaving, also by an exception.  A compiled model runs uncompiled for the while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit.errors import VitError
from vit.model.attention import Attend, at_least_float32
from vit.model.heads import MeanPool
from vit.model.reduction import Reducer, TokenMap
from vit.model.vision_transformer import VisionTransformer


class Weights(list[Tensor]):
    """Attention weights by layer, with what their readers have to know.

    Attributes:
        token_maps: see `Record.token_maps`.
        signed: whether weights may be negative and rows need not sum to 1, as in differential attention.
    """

    def __init__(self, weights: Iterable[Tensor], token_maps: Sequence[TokenMap | None], signed: bool = False) -> None:
        super().__init__(weights)
        self.token_maps, self.signed = list(token_maps), signed

    def fractions(self) -> Weights:
        """Return weights that are at least 0 and whose rows sum to 1: where they are signed, their positive part."""
        return Weights([_positive_part(each) for each in self], self.token_maps) if self.signed else self


def _positive_part(weights_BHNN: Tensor) -> Tensor:
    positive = weights_BHNN.clamp(min=0)
    return positive / positive.sum(dim=-1, keepdim=True).clamp(min=1e-12)


class Record:
    """What the last forward pass inside `record_attention` left.

    Properties raise `VitError` before the model has run.  Tensors are in float32 at least and detached; with gradients
    they are in the graph and as the model computes them.

    Attributes:
        prefix_tokens, grid: tokens in front of the patches, and rows and columns of patches.
    """

    def __init__(self, vit: VisionTransformer, gradients: bool) -> None:
        self.prefix_tokens, self.grid = vit.num_prefix_tokens, vit.grid
        self._signed = any(block.attn.attend.signed for block in vit.blocks)  # type: ignore[union-attr]
        self._gradients, self._read = gradients, vit.read
        self._weights: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}
        self._sizes: dict[int, Tensor | None] = {}
        self._reducer: Reducer | None = None
        self._readout: Tensor | None = None

    @property
    def weights(self) -> Weights:
        """Weights after softmax, one tensor for each layer: (B, H, N, N), rows sum to 1.

        Those of differential attention are differences: they may be negative, and `weights.signed` is true.
        """
        return Weights(self._layers(self._weights), self.token_maps, self._signed)

    @property
    def token_maps(self) -> list[TokenMap | None]:
        """Where reduction took tokens: `token_maps[i]` in front of the attention of layer i, the last after all.

        None where every token stayed."""
        self._check_ran()
        return [None, *(self._reducer.token_maps if self._reducer else [None] * len(self._weights))]

    @property
    def sizes(self) -> list[Tensor | None]:
        """How many patches each of `tokens` stands for, (B, N) a layer; None where each is one."""
        return self._layers(self._sizes)

    @property
    def readout(self) -> Tensor:
        """How the head weighs the tokens of the last layer, (B, R, N), rows sum to 1.

        The class token alone, all patches equally (both R = 1), the pooling head's own weights (R = its heads), or the
        class token and the distillation token, one for each head (R = 2).
        """
        self._check_ran()
        assert self._readout is not None
        return self._readout

    @property
    def tokens(self) -> list[Tensor]:
        """What the layers put out, (B, N, D) each."""
        return self._layers(self._tokens)

    def _layers(self, found: Mapping[int, Any]) -> list[Any]:
        self._check_ran()
        return [found[layer] for layer in sorted(found)]

    def _check_ran(self) -> None:
        if self._readout is None:
            raise VitError("nothing is recorded yet: call the model inside `with record_attention(model)`")

    def _kept(self, x: Tensor) -> Tensor:
        return x if self._gradients else at_least_float32(x.detach())

    # forward hooks, as torch calls them: what they return takes the place of the output

    def _see_attention(
        self, layer: int, attend: Attend, qkv: Sequence[Tensor], options: Mapping[str, Any], output: Tensor
    ) -> Tensor | None:
        self._weights[layer], replaced = self._attend(attend, qkv, options)
        return replaced

    def _see_pool(
        self, attend: Attend, qkv: Sequence[Tensor], options: Mapping[str, Any], output: Tensor
    ) -> Tensor | None:
        first = self._read.start
        weights_BH1P, _ = self._attend(attend, qkv, options)
        self._readout = F.pad(weights_BH1P[:, :, 0], (first, 0))
        return attend.average(self._readout[:, :, None, first:], qkv[2]) if self._gradients else None

    def _see_mean(
        self, mean: MeanPool, inputs: Sequence[Any], options: Mapping[str, Any], output: Tensor
    ) -> Tensor | None:
        x_BND, sizes_BN = inputs
        if self._gradients:
            self._readout = mean.weights(x_BND, sizes_BN).requires_grad_()
            return mean.average(self._readout, x_BND)
        self._readout = mean.weights(at_least_float32(x_BND.detach()), sizes_BN)
        return None

    def _see_last_tokens(self, norm: nn.Module, inputs: Any, options: Any, x_BND: Tensor) -> None:
        B, N, _ = x_BND.shape
        read_R = torch.arange(self._read.stop, device=x_BND.device)
        self._readout = self._kept(F.one_hot(read_R, N).to(x_BND.dtype).expand(B, -1, -1))

    def _see_block(self, layer: int, block: nn.Module, inputs: Sequence[Any], options: Any, output: Tensor) -> None:
        self._reducer = inputs[2] if len(inputs) > 2 else None
        self._tokens[layer] = output if self._gradients else output.detach()
        self._sizes[layer] = None if self._reducer is None else self._reducer.sizes_BN

    def _attend(
        self, attend: Attend, qkv: Sequence[Tensor], options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the weights, and with gradients the output from them."""
        q, k, v = qkv
        if self._gradients:
            weights = attend.weights(q, k, **options)
            return weights, attend.average(weights, v)
        with torch.no_grad():
            return attend.exact_weights(q, k, **options), None


@contextlib.contextmanager
def record_attention(model: nn.Module, *, gradients: bool = False) -> Iterator[Record]:
    """Record the attention weights of every forward pass of `model` inside the block; the last one is kept.

    Args:
        model: a `VisionTransformer`, or a module that holds one (compiled, distributed).  Not for several threads.
        gradients: keep the weights in the graph, so that `torch.autograd.grad(score, record.weights)` works; the
            output is then computed from the weights, equal to rounding where there is no attention dropout.

    Recordings may nest, also of one model: each records every pass.  Of several with gradients, the innermost has them.
    Raises `VitError` for a model that is no `VisionTransformer`.
    """
    vit = find(model)
    record = Record(vit, gradients)
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.compiler.set_stance("force_eager"))

        def hook(module: Any, see: Any) -> None:
            undo.callback(module.register_forward_hook(see, with_kwargs=True).remove)

        for layer, block in enumerate(vit.blocks):
            hook(block.attn.attend, partial(record._see_attention, layer))  # type: ignore[union-attr]
            hook(block, partial(record._see_block, layer))
        if vit.attn_pool is not None:
            hook(vit.attn_pool.attend, record._see_pool)
        elif vit.pool == "mean":
            hook(vit.mean_pool, record._see_mean)
        else:
            hook(vit.norm, record._see_last_tokens)
        yield record


def find(model: nn.Module) -> VisionTransformer:
    """Find the `VisionTransformer` that `model` is or holds.  Raises `VitError` for none, or more than one."""
    found = [module for module in model.modules() if isinstance(module, VisionTransformer)]
    if len(found) != 1:
        raise VitError(
            f"attention is recorded from a VisionTransformer; {type(model).__name__} holds {len(found) or 'none'}"
        )
    return found[0]


def resolve_layer(layer: int, depth: int) -> int:
    """Return a layer's number from 0, given that or the number from the end.  Raises `VitError`."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not -depth <= layer < depth:
        raise VitError(f"layer {layer!r}: the model has layers 0 to {depth - 1} (or -{depth} to -1, from the end)")
    return layer % depth
