"""The Vision Transformer: an image becomes a sequence of patches, attention relates them, a token tells the class.

`VisionTransformer.forward` is the whole model on one screen.  What is notable:

- every decision is a keyword, and `size` sets width, depth and heads together;
- parameters carry timm's names, so the field's checkpoints load one to one, and the model goes back the same way;
- the mechanisms of the lecture are options: `attention`, `norm`, `pool="attention"` (cross-attention);
- `architecture` holds the arguments that build the same model again, as plain JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vit.errors import VitError, did_you_mean
from vit.model.arguments import SIZES, maps_per_head, removed_per_layer, resolve, resolve_reduction
from vit.model.attention import DifferentialAttention, DotProductAttention, MultiHeadAttention
from vit.model.blocks import Block, PostNormBlock, make_mlp
from vit.model.heads import AttentionPool, MeanPool
from vit.model.initialisation import initialise
from vit.model.norms import make_norm
from vit.model.patches import PatchEmbed, drop_patches
from vit.model.positions import Rotary, rotary_2d, sincos_2d
from vit.model.reduction import RATE, REDUCTION, ReducedTokens, Reduction, log_sizes


class VisionTransformer(nn.Module):
    """A Vision Transformer: images (B, in_channels, height, width) -> logits (B, num_classes).

    Args:
        image_size, patch_size: one number or (height, width), in pixels; the image must divide into whole patches,
            or with `crop_to_patches` loses what is left over at the right and at the bottom.
        num_classes: outputs of the head; 0 for no head, so that the model returns what a head would read, (B, width).
        size: "nano", "tiny", "small", "base", "large" or "huge" sets width, depth and heads; each may be set alone.
        mlp: "plain", or gated as "swiglu" or "swiglu_packed" (both halves in one matrix); mlp_ratio: width of its
            hidden layer, in widths; activation: of a plain one, "gelu", "gelu_tanh" or "quick_gelu".
        attention: "multi_head"; "scaled_dot_product", the same with one head whatever `heads` says; "dot_product",
            no parameters, and one head; "differential", each head takes the difference of two maps of weights.
        norm: "pre" (norm before each branch) or "post" (after each sum, as the original Transformer).
        norm_layer: "layer" or "rms"; norm_eps: added under its root.
        embed_norm: one more, of the "patches" as they are embedded (AIMv2) or of all "tokens" before the first block
            (CLIP); attention_norm, mlp_norm: of the heads' outputs before they are mixed, of the MLP's hidden layer
            (BEiT-3); final_norm: of the last "tokens", of what was "pooled", or "none"; None for what `pool` suggests.
        position: "learned", "sincos", "rotary", "rotary_box" (in fractions of the image, as DINOv3) or "none";
            `position_prefix` gives learned positions to the tokens in front too, as timm's plain ViTs have it.
        pool: "token" (class token), "mean" (of the patches) or "attention" (a learned query cross-attends to them);
            with `pool_prefix` the last two read the tokens in front, too.
        class_token: whether there is one; by default only where `pool` needs it.
        distillation_token: a second class token with a head of its own; the logits are the mean of both (Touvron et
            al. 2021, "DeiT").
        registers: extra learned tokens that no head reads (Darcet et al. 2024).
        layer_scale: start of each branch's scale, None for none; qk_norm: normalise queries and keys, None
            to do so where attention has them; qkv_bias, proj_bias, patch_bias: biases of queries, keys and values, of
            attention's output and the MLP, of the patch embedding.
        dropout, attention_dropout, drop_path, patch_dropout: fractions in [0, 1), in training only; drop_path grows
            linearly from 0 in the first block to its value in the last.
        reduction: "keep" the patches that matter or "merge" similar ones, so that blocks have less to do; or "none".
            reduction_rate: the fraction of the patches that is gone in the end; reduction_schedule: where they go,
            "constant", "decreasing" or "stages", or how many for each layer; None for what suits the method;
            reduction_proportional: attend to a token by how many patches it stands for; None: where they merge.
        init: "trunc_normal", "xavier" or "mimetic".

    Raises `VitError` naming the argument when one is impossible or two contradict each other.
    """

    rotary: Tensor | None

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        in_channels: int = 3,
        size: str = "tiny",
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        mlp: Literal["plain", "swiglu", "swiglu_packed"] = "plain",
        mlp_ratio: float = 4.0,
        activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu",
        attention: Literal["multi_head", "scaled_dot_product", "dot_product", "differential"] = "multi_head",
        norm: Literal["pre", "post"] = "pre",
        norm_layer: Literal["layer", "rms"] = "layer",
        norm_eps: float = 1e-6,
        embed_norm: Literal["none", "patches", "tokens"] = "none",
        attention_norm: bool = False,
        mlp_norm: bool = False,
        final_norm: Literal["tokens", "pooled", "none"] | None = None,
        position: Literal["learned", "sincos", "rotary", "rotary_box", "none"] = "learned",
        position_prefix: bool = True,
        pool: Literal["token", "mean", "attention"] = "token",
        pool_prefix: bool = False,
        class_token: bool | None = None,
        distillation_token: bool = False,
        registers: int = 0,
        layer_scale: float | None = None,
        qk_norm: bool | None = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        patch_bias: bool = True,
        crop_to_patches: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        patch_dropout: float = 0.0,
        reduction: Literal["none", "keep", "merge"] = "none",
        reduction_rate: float = RATE,
        reduction_schedule: str | Sequence[int] | None = None,
        reduction_proportional: bool | None = None,
        init: str = "trunc_normal",
    ) -> None:
        super().__init__()
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        a = self.architecture = resolve(given)
        width, depth, heads, hidden = a["width"], a["depth"], a["heads"], int(a["width"] * mlp_ratio)
        self.image_size, self.patch_size = tuple(a["image_size"]), tuple(a["patch_size"])
        self.num_classes, self.width = num_classes, width
        self.pool, self.patch_dropout = pool, patch_dropout
        self.num_prefix_tokens = int(a["class_token"]) + int(distillation_token) + registers
        # which of the last tokens the head reads
        first = 0 if pool_prefix else self.num_prefix_tokens
        self.read = slice(0, 1 + int(distillation_token)) if pool == "token" else slice(first, None)
        self.reduction = self._reduction()

        make = make_norm(norm_layer, norm_eps)
        patch_norm = make if embed_norm == "patches" else None
        self.patch_embed = PatchEmbed(self.image_size, self.patch_size, in_channels, width, patch_bias, patch_norm)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if a["class_token"] else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width)) if distillation_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed, rotary = self._positions(position, position_prefix, width // heads // maps_per_head(a))
        self.register_buffer("rotary", rotary, persistent=False)
        self.embed_drop = nn.Dropout(dropout)
        self.norm_pre = make(width) if embed_norm == "tokens" else nn.Identity()
        self.blocks = nn.ModuleList(_block(a, layer) for layer in range(depth))
        self.norm = make(width) if a["final_norm"] == "tokens" else nn.Identity()
        self.attn_pool, self.mean_pool = None, MeanPool(first)
        if pool == "attention":
            self.attn_pool = AttentionPool(width, heads, hidden, activation=activation, norm=make)
        self.fc_norm = make(width) if a["final_norm"] == "pooled" else nn.Identity()
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.head_dist = None
        if distillation_token:
            self.head_dist = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        initialise(self, init)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patch_embed.grid

    @property
    def covered(self) -> tuple[int, int]:
        """Height and width of what lies in patches, in pixels: less than the image only with `crop_to_patches`."""
        (rows, columns), (height, width) = self.grid, self.patch_size
        return rows * height, columns * width

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_BCHW))

    def forward_features(
        self, images_BCHW: Tensor, intermediates: dict[str, Tensor] | None = None
    ) -> Tensor | ReducedTokens:
        """Compute the tokens (B, N, D) that the head pools, after the final norm.

        Where tokens are reduced, these are `ReducedTokens`.  `intermediates` gets each block's output by its name,
        such as "blocks.0".
        """
        x_BND, rotary = self.embed(images_BCHW)
        reducer = None if self.reduction is None else self.reduction.begin(x_BND.shape[1], rotary)
        for layer, block in enumerate(self.blocks):
            x_BND = block(x_BND, rotary, reducer)
            if intermediates is not None:
                intermediates[f"blocks.{layer}"] = x_BND
        x_BND = self.norm(x_BND)
        return x_BND if reducer is None else ReducedTokens(x_BND, reducer.sizes_BN)

    def embed(self, images_BCHW: Tensor) -> tuple[Tensor, Rotary | None]:
        """Embed images as class token, registers and patches (B, N, D), with the angles of rotary positions.

        In training with `patch_dropout`, each image keeps a random subset of its patches, each with its own position.
        """
        patches_BPD = self.patch_embed(images_BCHW)
        B, prefix = patches_BPD.shape[0], self.num_prefix_tokens
        own = (self.cls_token, self.dist_token, self.reg_token)
        tokens = [token.expand(B, -1, -1) for token in own if token is not None]
        rotary = None if self.rotary is None else (self.rotary[0], self.rotary[1])
        if self.pos_embed is not None:
            covered = self.pos_embed.shape[1] - patches_BPD.shape[1]
            patches_BPD = patches_BPD + self.pos_embed[:, covered:]
            if covered:
                tokens = [torch.cat(tokens, dim=1) + self.pos_embed[:, :covered]]
        if self.training and self.patch_dropout:
            patches_BPD, indices_BK = drop_patches(patches_BPD, self.patch_dropout)
            if rotary is not None:
                first = torch.arange(prefix, device=indices_BK.device).expand(B, -1)
                rows_BN = torch.cat([first, indices_BK + prefix], dim=1)
                rotary = rotary[0][rows_BN].unsqueeze(1), rotary[1][rows_BN].unsqueeze(1)
        return self.norm_pre(self.embed_drop(torch.cat([*tokens, patches_BPD], dim=1))), rotary

    def forward_head(self, x_BND: Tensor | ReducedTokens, pre_logits: bool = False) -> Tensor:
        """Compute logits (B, num_classes) from what `forward_features` returns.

        With `pre_logits`, what the classifier reads instead: (B, D), or with a distillation token (B, 2, D).
        """
        x_BND, sizes_BN = x_BND if isinstance(x_BND, ReducedTokens) else (x_BND, None)
        x_BD = self.fc_norm(self.pool_tokens(x_BND, sizes_BN))
        if pre_logits:
            return x_BD
        if self.head_dist is None:
            return self.head(x_BD)
        return torch.stack([self.head(x_BD[:, 0]), self.head_dist(x_BD[:, 1])]).mean(dim=0)

    def pool_tokens(self, x_BND: Tensor, sizes_BN: Tensor | None = None) -> Tensor:
        """Pool the sequence (B, N, D) to one vector an image (B, D); class and distillation token, (B, 2, D)."""
        read_BND = x_BND[:, self.read]
        if self.pool == "token":
            return read_BND[:, 0] if self.dist_token is None else read_BND
        if self.attn_pool is not None:
            return self.attn_pool(read_BND, self.pool_bias(sizes_BN))
        return self.mean_pool(x_BND, sizes_BN)

    def pool_bias(self, sizes_BN: Tensor | None) -> Tensor | None:
        """Return what is added to the scores of the pooling query's attention, (B, 1, 1, N of those that it reads)."""
        proportional = self.reduction is not None and self.reduction.proportional
        return log_sizes(sizes_BN[:, self.read]) if proportional and sizes_BN is not None else None

    def get_intermediate_layers(
        self,
        images_BCHW: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        """Compute the patch tokens (B, P, D) that the last `n` blocks put out, or the blocks of these numbers.

        Arguments and results are those of timm's method of this name: `reshape` makes them (B, D, rows, columns);
        `return_prefix_tokens` adds class token and registers to each, as a pair; `norm` applies the final norm.
        Raises `VitError` for a block that does not exist, and for a grid of tokens that are reduced.
        """
        found: dict[str, Tensor] = {}
        depth, prefix = len(self.blocks), self.num_prefix_tokens
        layers = range(depth - n, depth) if isinstance(n, int) else n
        if wrong := [layer for layer in layers if not 0 <= layer < depth]:
            raise VitError(f"n: the model has blocks 0 to {depth - 1}, not {wrong[0]}")
        if reshape and self.reduction is not None:
            raise VitError("reshape: tokens are reduced, so they are no grid; set reduction=none, or reshape=False")
        self.forward_features(images_BCHW, found)
        tokens = [self.norm(x) if norm else x for x in (found[f"blocks.{layer}"] for layer in layers)]
        patches = [x_BND[:, prefix:] for x_BND in tokens]
        if reshape:
            patches = [x_BPD.transpose(1, 2).unflatten(2, self.grid).contiguous() for x_BPD in patches]
        if return_prefix_tokens:
            return [(patch, x_BND[:, :prefix]) for patch, x_BND in zip(patches, tokens, strict=True)]
        return patches

    def reduce(self, reduction: str = "none", **options: Any) -> VisionTransformer:
        """Change the token reduction; the arguments are those of the constructor.  Returns the model itself.

        `model.reduce("merge", reduction_rate=0.5)`; no weights change.  Raises `VitError`, and then nothing changes.
        """
        if unknown := [key for key in options if key not in REDUCTION]:
            raise VitError(f"reduce: no option {unknown[0]!r}; {did_you_mean(unknown[0], tuple(REDUCTION)[1:])}")
        changed = {**self.architecture, **REDUCTION, "reduction": reduction, **options}
        resolve_reduction(changed)
        self.architecture = changed
        self.reduction = self._reduction()
        return self

    def _reduction(self) -> Reduction | None:
        a = self.architecture
        found = removed_per_layer(a)
        if found is None:
            return None
        proportional = a["reduction"] == "merge" if a["reduction_proportional"] is None else a["reduction_proportional"]
        patches = math.prod(image // patch for image, patch in zip(self.image_size, self.patch_size, strict=True))
        prefix = self.num_prefix_tokens
        return Reduction(a["reduction"], found, patches, proportional=proportional, prefix=prefix, read=self.read)

    def _positions(self, kind: str, prefix_too: bool, head_width: int) -> tuple[nn.Parameter | None, Tensor | None]:
        prefix, patches = self.num_prefix_tokens, self.grid[0] * self.grid[1]
        if kind == "learned":
            return nn.Parameter(torch.zeros(1, patches + prefix * prefix_too, self.width)), None
        if kind == "sincos":
            waves = sincos_2d(self.grid, self.width)
            waves = torch.cat([waves.new_zeros(prefix * prefix_too, self.width), waves])
            return nn.Parameter(waves[None], requires_grad=False), None
        if kind in ("rotary", "rotary_box"):
            return None, torch.stack(rotary_2d(self.grid, head_width, prefix, box=kind == "rotary_box"))
        return None, None


def _block(a: dict[str, Any], layer: int) -> Block:
    """Build block number `layer` of the model that has these arguments."""
    width, make = a["width"], make_norm(a["norm_layer"], a["norm_eps"])
    drops = {key: a[key] for key in ("dropout", "attention_dropout")}
    attention: nn.Module = DotProductAttention(**drops)
    if a["attention"] != "dot_product":
        inner = {key: a[key] for key in ("qk_norm", "attention_norm", "qkv_bias", "proj_bias")}
        if a["attention"] == "differential":
            attention = DifferentialAttention(width, a["heads"], layer=layer, norm=make, **inner, **drops)
        else:
            attention = MultiHeadAttention(width, a["heads"], norm=make, **inner, **drops)
    mlp = make_mlp(
        a["mlp"],
        width,
        int(width * a["mlp_ratio"]),
        a["dropout"],
        activation=a["activation"],
        hidden_norm=make if a["mlp_norm"] else None,
        bias=a["proj_bias"],
    )
    return (Block if a["norm"] == "pre" else PostNormBlock)(
        width,
        attention,
        mlp,
        norm=make,
        drop_path=a["drop_path"] * layer / max(1, a["depth"] - 1),
        layer_scale=a["layer_scale"],
    )


def create_model(name: str = "vit_tiny", **options: Any) -> VisionTransformer:
    """Build a model by name: "vit_" and a size, such as `create_model("vit_tiny", image_size=32, patch_size=4, ...)`.

    `options` are the arguments of `VisionTransformer`.  Raises `VitError` for a name that does not exist.
    """
    size = name.removeprefix("vit_")
    if size not in SIZES or not name.startswith("vit_"):
        raise VitError(f"no model is called {name!r}; {did_you_mean(name, [f'vit_{size}' for size in SIZES])}")
    return VisionTransformer(size=size, **options)
