"""Recording: the attention weights of a model that normally runs fused attention, which never holds them.

    with record_attention(model) as record:
        logits = model(images)
    record.weights  # one tensor (B, H, N, N) a layer

Where tokens are reduced there are fewer of them in later layers, N of each layer; `record.moves` says where they went,
and `record.weights` carry that along, so that `vit.rollout` gives maps of the image's own grid all the same.

Notable:
- by default the output still comes from the fused kernel and the weights are computed beside it, so logits are those
  of the model, to the bit, also with dropout; `gradients=True` computes the output from the weights, so that they have
  gradients;
- the head's own weighting of the last tokens is recorded like one more layer (`record.readout`), whatever the pooling,
  so every method works with a class token, a mean and an attention pool alike;
- what is changed is changed on the instance, and undone on leaving, also by an exception.  A compiled model runs
  uncompiled for the while.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit.errors import VitError
from vit.model.attention import DotProductAttention, MultiHeadAttention, attention_weights, dot_product_attention
from vit.model.positions import Rotary
from vit.model.reduction import Move, Reducer, shares, together
from vit.model.vision_transformer import VisionTransformer

Rows = Literal["all", "readout"]


class Weights(list[Tensor]):
    """Weights by layer, and `moves`: see `Record.moves`."""

    def __init__(self, weights: Iterable[Tensor], moves: Sequence[Move | None]) -> None:
        super().__init__(weights)
        self.moves = list(moves)


class Record:
    """What the last forward pass inside `record_attention` left.

    Attributes
        layers: which layers are recorded, in order.
        prefix_tokens, grid: tokens in front of the patches, and rows and columns of patches.
    """

    def __init__(self, layers: tuple[int, ...], prefix_tokens: int, grid: tuple[int, int]) -> None:
        self.layers, self.prefix_tokens, self.grid = layers, prefix_tokens, grid
        self._weights: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}
        self._sizes: dict[int, Tensor | None] = {}
        self._reducer: Reducer | None = None
        self._readout: Tensor | None = None

    @property
    def weights(self) -> Weights:
        """Weights after softmax, one tensor for each recorded layer: (B, H, N, N), rows sum to 1.

        In single precision at least, whatever the model runs in; with gradients, in the model's.
        With `rows="readout"` (B, H, 1, N): the class token's row or, without one that is read, the mean of the rows of
        the tokens that are.  Detached, unless recorded with gradients.  Raises `VitError` before the model has run.
        """
        self._check_ran()
        return Weights([self._weights[layer] for layer in self.layers], self.moves)

    @property
    def moves(self) -> list[Move | None]:
        """Where reduction took tokens, one more than recorded layers: `moves[i]` in front of the i-th one's attention,
        the last after all of them; None where every token stayed.  Raises `VitError` before the model has run.
        """
        self._check_ran()
        if self._reducer is None:
            return [None] * (len(self.layers) + 1)
        by_layer = self._reducer.moves
        bounds = [0, *self.layers, len(by_layer)]
        return [together(by_layer[low:high]) for low, high in itertools.pairwise(bounds)]

    @property
    def sizes(self) -> list[Tensor | None]:
        """How many patches each of `tokens` stands for, (B, N) a layer; None where each is one.

        Raises `VitError` before the model has run.
        """
        self._check_ran()
        return [self._sizes[layer] for layer in self.layers]

    @property
    def readout(self) -> Tensor:
        """How the head weighs the tokens of the last layer, (B, R, N), rows sum to 1.

        The class token alone, all patches equally (both R = 1), the pooling head's own weights (R = its heads), or the
        class token and the distillation token, one for each head (R = 2).
        Raises `VitError` before the model has run.
        """
        self._check_ran()
        assert self._readout is not None
        return self._readout

    @property
    def tokens(self) -> list[Tensor]:
        """What the recorded layers put out, (B, N, D) each; detached, unless recorded with gradients.

        Raises `VitError` before the model has run.
        """
        self._check_ran()
        return [self._tokens[layer] for layer in self.layers]

    def _check_ran(self) -> None:
        if self._readout is None:
            raise VitError("nothing is recorded yet: call the model inside `with record_attention(model)`")


@contextlib.contextmanager
def record_attention(
    model: nn.Module, *, layers: Sequence[int] | None = None, rows: Rows = "all", gradients: bool = False
) -> Iterator[Record]:
    """Record the attention weights of every forward pass of `model` inside the block; the last one is kept.

    Arguments
        model: a `VisionTransformer`, or a module that holds one (compiled, distributed).  Not for several threads.
        layers: which blocks, from 0, negative from the end; None: all.
        rows: "readout" keeps, of each layer, only the row that leads to the head: 1 / N of the memory.
        gradients: keep the weights in the graph, so that `torch.autograd.grad(score, record.weights)` works; the
            output is then computed from the weights, equal to rounding where there is no attention dropout.

    Recordings may nest, also of one model: each records every pass.
    Raises `VitError` for a layer that does not exist, gradients of single rows, or a model that is no
    `VisionTransformer`.
    """
    vit = find(model)
    if rows not in ("all", "readout"):
        raise VitError(f"rows: expected all or readout, not {rows!r}")
    if rows == "readout" and gradients:
        raise VitError("gradients=True needs rows='all': the output is computed from whole matrices")
    row = None if rows == "all" else vit.read
    record = Record(_layers(layers, len(vit.blocks)), vit.num_prefix_tokens, vit.grid)
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.callback(vit.blocks[0].register_forward_pre_hook(_keep_reducer(record)).remove)
        for layer in record.layers:
            block: Any = vit.blocks[layer]
            undo.enter_context(_replaced(block.attn, "forward", _Attention(block.attn, record, layer, row, gradients)))
            undo.callback(block.register_forward_hook(_keep_tokens(record, layer, gradients)).remove)
        undo.enter_context(_replaced(vit, "pool_tokens", _Pool(vit, record, gradients)))
        yield record


def find(model: nn.Module) -> VisionTransformer:
    """The `VisionTransformer` that `model` is or holds.  Raises `VitError` when there is none, or more than one."""
    found = [module for module in model.modules() if isinstance(module, VisionTransformer)]
    if len(found) != 1:
        raise VitError(
            f"attention is recorded from a VisionTransformer; {type(model).__name__} holds {len(found) or 'none'}"
        )
    return found[0]


def _layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    chosen = range(depth) if layers is None else layers
    return tuple(sorted({resolve_layer(layer, depth) for layer in chosen}))


def resolve_layer(layer: int, depth: int) -> int:
    """A layer's number from 0, given that or the number from the end.  Raises `VitError`."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not -depth <= layer < depth:
        raise VitError(f"layer {layer!r}: the model has layers 0 to {depth - 1} (or -{depth} to -1, from the end)")
    return layer % depth


class _Attention:
    """What stands in for the forward pass of an attention layer."""

    def __init__(self, attn: Any, record: Record, layer: int, row: slice | None, gradients: bool) -> None:
        assert isinstance(attn, MultiHeadAttention | DotProductAttention)
        self.attn, self.record, self.layer, self.row, self.gradients = attn, record, layer, row, gradients
        around = attn.__dict__.get("forward")
        self.around = around if isinstance(around, _Attention) else None
        """A recording in which this one is: it sees every pass, too."""
        self.explicit: bool = gradients or (self.around is not None and self.around.explicit)

    def __call__(self, x_BND: Tensor, rotary: Rotary | None = None, reducer: Reducer | None = None) -> Tensor:
        attn: Any = self.attn
        bias, sizes_BN = (None, None) if reducer is None else (reducer.bias(), reducer.sizes_BN)
        if self.explicit:
            y_BND, weights_BHNN = attn.attend(x_BND, rotary, reducer)
            self.keep(weights_BHNN, sizes_BN)
            return y_BND
        if isinstance(attn, DotProductAttention):
            with _exact(x_BND):
                self.keep(dot_product_attention(single(x_BND[:, None]), bias=bias)[1], sizes_BN)
            return attn.attend(x_BND, rotary, reducer)[0]
        q, k, v = attn.project(x_BND, rotary, reducer)
        with _exact(x_BND):
            # nobody asks for the rest, and what is cut from the front can be cut again
            first = self.around is None and self.row is not None and self.row.start == 0 and self.row.stop is not None
            self.keep(attention_weights(single(q[:, :, self.row] if first else q), single(k), bias), sizes_BN)
        return attn.mix(q, k, v, bias)

    def keep(self, weights_BHNN: Tensor, sizes_BN: Tensor | None) -> None:
        if self.around is not None:
            self.around.keep(weights_BHNN, sizes_BN)
        if self.row is not None:
            rows_BHRN = weights_BHNN[:, :, self.row]
            if sizes_BN is None:
                weights_BHNN = rows_BHRN.mean(dim=2, keepdim=True)
            else:  # of the patches that the tokens stand for
                weights_BHNN = shares(sizes_BN[:, self.row])[:, None, None].to(rows_BHRN.dtype) @ rows_BHRN
        self.record._weights[self.layer] = weights_BHNN if self.gradients else single(weights_BHNN.detach())


def _keep_tokens(record: Record, layer: int, gradients: bool) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        record._tokens[layer] = output if gradients else output.detach()
        reducer = _reducer_of(inputs)
        record._sizes[layer] = None if reducer is None else reducer.sizes_BN

    return hook


def _keep_reducer(record: Record) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        record._reducer = _reducer_of(inputs)

    return hook


def _reducer_of(inputs: Sequence[Any]) -> Reducer | None:
    """What a block was given beside tokens and angles."""
    return inputs[2] if len(inputs) > 2 else None


class _Pool:
    """What stands in for `pool_tokens`: the same, as a mean by weights that are recorded."""

    def __init__(self, vit: VisionTransformer, record: Record, gradients: bool) -> None:
        self.vit, self.record, self.gradients = vit, record, gradients
        around = vit.__dict__.get("pool_tokens")
        self.around = around if isinstance(around, _Pool) else None
        self.explicit: bool = gradients or (self.around is not None and self.around.explicit)

    def __call__(self, x_BND: Tensor, sizes_BN: Tensor | None = None) -> Tensor:
        (B, N, _), first, pool = x_BND.shape, self.vit.read.start, self.vit.attn_pool
        if pool is not None:
            q, k, v = pool.project(pool.latent.expand(B, -1, -1), x_BND[:, first:])
            bias = self.vit.pool_bias(sizes_BN)
            if self.explicit:
                readout_BHN = F.pad(attention_weights(q, k, bias)[:, :, 0], (first, 0))
                self.keep(readout_BHN)
                return pool.refine(pool.merge(readout_BHN[:, :, None, first:] @ v))
            with _exact(x_BND):
                self.keep(F.pad(attention_weights(single(q), single(k), bias)[:, :, 0], (first, 0)))
        elif self.vit.pool == "mean":
            like = x_BND if self.explicit else single(x_BND[:0])
            readout_B1N = F.pad(like.new_full((B, 1, N - first), 1 / (N - first)), (first, 0))
            if sizes_BN is not None:
                readout_B1N = F.pad(shares(sizes_BN[:, first:]).to(like.dtype)[:, None], (first, 0))
            if self.explicit:
                self.keep(readout_B1N.requires_grad_())
                return (readout_B1N @ x_BND)[:, 0]
            self.keep(readout_B1N)
        else:
            tokens_R = torch.arange(self.vit.read.stop, device=x_BND.device)
            self.keep(F.one_hot(tokens_R, N).to(x_BND.dtype).expand(B, -1, -1))
        return type(self.vit).pool_tokens(self.vit, x_BND, sizes_BN)

    def keep(self, readout: Tensor) -> None:
        if self.around is not None:
            self.around.keep(readout)
        self.record._readout = readout if self.gradients else single(readout.detach())


def single(x: Tensor) -> Tensor:
    """In at least single precision: what is measured has not the precision of what is trained."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextlib.contextmanager
def _exact(like: Tensor) -> Iterator[None]:
    """Off the graph, and in the precision that tensors have."""
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield


@contextlib.contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Shadow a method on one instance."""
    before = module.__dict__.get(name)
    module.__dict__[name] = function
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before
