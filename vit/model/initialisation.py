"""The weights a model starts from.

At small scale the start decides much of what the first minutes of training reach, so it is an option:

- `trunc_normal`: every matrix from a normal of standard deviation 0.02, cut at two deviations; the usual start of
  published ViTs (Touvron et al. 2021, "DeiT", following BERT).
- `xavier`: uniform with variance 2 / (inputs + outputs) (Glorot & Bengio 2010), queries, keys and values each taken
  as a matrix of their own; the start of the original JAX code.
- `mimetic`: xavier, and the attention of each head shaped as it is after training: `W_q W_kᵀ` near a multiple of the
  identity plus noise, `W_v W_proj` near a negative multiple (Trockman & Kolter 2023, "Mimetic Initialization of
  Self-Attention Layers").

`docs/results.md` has what each gave.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit.errors import VitError, did_you_mean
from vit.model.attention import DotProductAttention, MultiHeadAttention
from vit.model.blocks import Block, SwiGlu

SCHEMES = ("trunc_normal", "xavier", "mimetic")


@torch.no_grad()
def initialise(model: nn.Module, scheme: str) -> None:
    """Fill the parameters of a `VisionTransformer` by `scheme`, from torch's generator.

    Whatever the scheme: biases 0, norms 1 and 0, LayerScale at its start, patch embedding variance 1 / fan-in, position
    embeddings and query of the pooling head 0.02, class and register tokens nearly 0, classifier 0.02 (its outputs
    start near 0, so the first loss is near log K).  Raises `VitError` for an unknown scheme.

    A norm in front of plain dot-product attention starts at width^-1/2 instead of 1.  At 1 every token scores itself
    with its squared length, the width, and any other near 0: softmax leaves it alone with itself, no gradient flows
    through the weights, and a class token never sees the patches.  At width^-1/2 it scores itself 1, whatever the
    width, so attention starts near the mean of all tokens and learns from there.
    """
    if scheme not in SCHEMES:
        raise VitError(f"model.init: no scheme {scheme!r}; {did_you_mean(scheme, SCHEMES)}")
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # there is nothing to fill, and drawing nothing takes long
    modules = dict(model.named_modules())
    packed = {f"{name}.fc1" for name, module in modules.items() if isinstance(module, SwiGlu)}
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            if scheme == "trunc_normal" or name in ("head", "head_dist"):
                nn.init.trunc_normal_(module.weight, std=0.02)
            else:
                parts = 3 if name.endswith("qkv") else 2 if name.endswith("kv") or name in packed else 1
                for part in module.weight.chunk(parts):
                    nn.init.xavier_uniform_(part)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters(recurse=False):
        if name in ("cls_token", "dist_token", "reg_token"):
            nn.init.normal_(parameter, std=1e-6)
        elif name == "pos_embed" and parameter.requires_grad:
            nn.init.trunc_normal_(parameter, std=0.02)
    for name, parameter in model.named_parameters():
        if name == "attn_pool.latent":
            nn.init.trunc_normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif ".lambda_" in name:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if type(module) is Block and isinstance(module.attn, DotProductAttention):
            gain = module.norm1.get_parameter("weight")
            nn.init.constant_(gain, gain.numel() ** -0.5)
    if scheme == "mimetic":
        for module in model.modules():
            if type(module) is MultiHeadAttention:
                _shape_attention(module)


def _shape_attention(attention: MultiHeadAttention) -> None:
    """Set `qkv` and `proj`: W_q W_kᵀ = 0.7 Z + 0.7 I for each head, W_v W_proj = 0.4 Z - 0.4 I over all heads.

    Z has entries of variance 1 / width; the constants are those of the paper's section 4.  A head's product has rank d
    only, so it is the best approximation of that rank: the leading d parts of the singular value decomposition.
    """
    width = attention.qkv.in_features
    d = width // attention.heads
    wq, wk, wv = attention.qkv.weight.chunk(3)

    def factors(noise: float, diagonal: float) -> tuple[Tensor, Tensor]:
        target = noise * torch.randn(width, width) * width**-0.5 + diagonal * torch.eye(width)
        u, s, vh = torch.linalg.svd(target)
        return u * s.sqrt(), (s.sqrt()[:, None] * vh).T

    for head in range(attention.heads):
        left, right = factors(0.7, 0.7)
        wq[head * d : (head + 1) * d] = left[:, :d].T
        wk[head * d : (head + 1) * d] = right[:, :d].T
    left, right = factors(0.4, -0.4)
    wv.copy_(left.T)
    attention.proj.weight.copy_(right)
