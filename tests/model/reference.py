"""The formulas of a Vision Transformer in NumPy, float64: what the tests hold the model against.

Everything here is written from the papers, with loops where the formula has a sum, and knows nothing of torch beyond
the names in a state dict.  `logits` puts the parts together for any architecture that `VisionTransformer` takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray


def softmax(scores: Array) -> Array:
    """exp(s_j) / sum_j exp(s_j), of one row of scores."""
    powers = [math.exp(score - max(scores)) for score in scores]
    return np.array([power / sum(powers) for power in powers])


def dot_product_attention(x_ND: Array) -> tuple[Array, Array]:
    """w'_ij = <x_i, x_j>, w_ij = exp(w'_ij) / sum_j exp(w'_ij), y_i = sum_j w_ij x_j, for one sequence."""
    return attention(x_ND, x_ND, x_ND, scale=1.0)


def attention(q_Nd: Array, k_Md: Array, v_Md: Array, scale: float | None = None) -> tuple[Array, Array]:
    """softmax(q kᵀ / sqrt(d)) v for one sequence and one head, with the weights (N, M)."""
    (N, d), M = q_Nd.shape, len(k_Md)
    scale = 1 / math.sqrt(d) if scale is None else scale
    weights, outputs = np.zeros((N, M)), np.zeros((N, v_Md.shape[1]))
    for i in range(N):
        weights[i] = softmax([scale * sum(q_Nd[i, c] * k_Md[j, c] for c in range(d)) for j in range(M)])
        for j in range(M):
            outputs[i] += weights[i, j] * v_Md[j]
    return outputs, weights


def linear(x: Array, state: Mapping[str, Array], name: str) -> Array:
    """x Wᵀ + b; the bias is optional."""
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)


def norm(x: Array, state: Mapping[str, Array], name: str, eps: float = 1e-6) -> Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis; the identity where there is no norm.

    Without a bias it is an RMS norm: x / sqrt(mean of squares + eps) * weight.
    """
    if f"{name}.weight" not in state:
        return x
    if f"{name}.bias" not in state:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * state[f"{name}.weight"]
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: Array) -> Array:
    """x times the share of a normal distribution below x: x (1 + erf(x / sqrt 2)) / 2."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    """Hendrycks & Gimpel 2016: x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def quick_gelu(x: Array) -> Array:
    return x * sigmoid(1.702 * x)


def mlp(
    x: Array, state: Mapping[str, Array], name: str, activation: str = "gelu", kind: str = "plain", eps: float = 1e-6
) -> Array:
    """W_2 norm(activation(W_1 x)), or gated: W_2 norm(silu(W_g x) * W_x x)."""
    if kind == "plain":
        hidden = {"gelu": gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}[activation](
            linear(x, state, f"{name}.fc1")
        )
    else:
        if kind == "swiglu_packed":
            gate, value = np.split(linear(x, state, f"{name}.fc1"), 2, axis=-1)
        else:
            gate, value = linear(x, state, f"{name}.fc1_g"), linear(x, state, f"{name}.fc1_x")
        hidden = gate * sigmoid(gate) * value
    return linear(norm(hidden, state, f"{name}.norm", eps), state, f"{name}.fc2")


def block_mlp(x: Array, state: Mapping[str, Array], name: str, architecture: Mapping[str, Any]) -> Array:
    """The MLP of a block of this architecture."""
    a = architecture
    return mlp(x, state, name, a.get("activation", "gelu"), a.get("mlp", "plain"), a.get("norm_eps", 1e-6))


def turn(x_Nd: Array, grid: tuple[int, int], prefix: int, temperature: float = 100.0, box: bool = False) -> Array:
    """Axial rotary positions: each pair of channels, read as a complex number, times exp(i position frequency).

    A position is a row or a column, or with `box` 2 pi times a patch's middle between -1 and 1.
    """
    d = x_Nd.shape[1]
    turned = x_Nd.copy()
    for row in range(grid[0]):
        for column in range(grid[1]):
            token = prefix + row * grid[1] + column
            for i in range(d // 4):
                frequency = temperature ** (-i / (d // 4))
                places = [(0, column, grid[1]), (d // 2, row, grid[0])]
                for start, position, count in places:
                    if box:
                        position = 2 * math.pi * (2 * (position + 0.5) / count - 1)
                    c = start + 2 * i
                    z = complex(x_Nd[token, c], x_Nd[token, c + 1])
                    z *= complex(math.cos(position * frequency), math.sin(position * frequency))
                    turned[token, c], turned[token, c + 1] = z.real, z.imag
    return turned


def self_attention(
    x_ND: Array,
    state: Mapping[str, Array],
    name: str,
    heads: int,
    grid: tuple[int, int] | None = None,
    prefix: int = 0,
    box: bool = False,
    eps: float = 1e-6,
) -> tuple[Array, Array]:
    """Multi-head self-attention of one sequence, with the weights (H, N, N); rotary positions where `grid` is given."""
    N, D = x_ND.shape
    d = D // heads
    q, k, v = np.split(linear(x_ND, state, f"{name}.qkv"), 3, axis=1)
    outputs, weights = np.zeros((N, D)), np.zeros((heads, N, N))
    for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        q_Nd = norm(q[:, own], state, f"{name}.q_norm", eps)
        k_Nd = norm(k[:, own], state, f"{name}.k_norm", eps)
        if grid is not None:
            q_Nd, k_Nd = turn(q_Nd, grid, prefix, box=box), turn(k_Nd, grid, prefix, box=box)
        outputs[:, own], weights[head] = attention(q_Nd, k_Nd, v[:, own])
    return linear(norm(outputs, state, f"{name}.norm", eps), state, f"{name}.proj"), weights


def cross_attention(
    x_ND: Array, context_MD: Array, state: Mapping[str, Array], name: str, heads: int
) -> tuple[Array, Array]:
    """Multi-head attention of one sequence to another, with the weights (H, N, M)."""
    d = x_ND.shape[1] // heads
    q = linear(x_ND, state, f"{name}.q")
    k, v = np.split(linear(context_MD, state, f"{name}.kv"), 2, axis=1)
    outputs, weights = np.zeros_like(q), np.zeros((heads, len(x_ND), len(context_MD)))
    for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        outputs[:, own], weights[head] = attention(q[:, own], k[:, own], v[:, own])
    return linear(outputs, state, f"{name}.proj"), weights


def attention_pool(
    patches_PD: Array,
    state: Mapping[str, Array],
    name: str,
    heads: int,
    activation: str = "gelu",
    eps: float = 1e-6,
) -> tuple[Array, Array]:
    """A learned query asks the patches, then x + mlp(norm(x)): (D,), with the query's weights (H, P)."""
    x_1D, weights = cross_attention(state[f"{name}.latent"][0], patches_PD, state, name, heads)
    inner = norm(x_1D, state, f"{name}.norm", eps)
    return (x_1D + mlp(inner, state, f"{name}.mlp", activation))[0], weights[:, 0]


def block(x_ND: Array, state: Mapping[str, Array], name: str, architecture: Mapping[str, Any], **rotary: Any) -> Array:
    """One Transformer block of one sequence, norms before the branches (pre) or after the sums (post)."""

    a, eps = architecture, architecture.get("norm_eps", 1e-6)

    def attend(x: Array) -> Array:
        if a["attention"] == "dot_product":
            return dot_product_attention(x)[0]
        return self_attention(x, state, f"{name}.attn", a["heads"], eps=eps, **rotary)[0]

    def think(x: Array) -> Array:
        return block_mlp(x, state, f"{name}.mlp", a)

    first = state.get(f"{name}.ls1.gamma", 1.0)
    second = state.get(f"{name}.ls2.gamma", 1.0)
    if a["norm"] == "pre":
        x_ND = x_ND + first * attend(norm(x_ND, state, f"{name}.norm1", eps))
        return x_ND + second * think(norm(x_ND, state, f"{name}.norm2", eps))
    x_ND = norm(x_ND + first * attend(x_ND), state, f"{name}.norm1", eps)
    return norm(x_ND + second * think(x_ND), state, f"{name}.norm2", eps)


def patches(image_CHW: Array, patch: tuple[int, int]) -> Array:
    """Cut an image into patches, row by row, each flattened to one vector: (P, C ph pw); what is left over is lost."""
    height, width = patch
    return np.stack(
        [
            image_CHW[:, top : top + height, left : left + width].ravel()
            for top in range(0, image_CHW.shape[1] - height + 1, height)
            for left in range(0, image_CHW.shape[2] - width + 1, width)
        ]
    )


def embed(image_CHW: Array, state: Mapping[str, Array], architecture: Mapping[str, Any]) -> Array:
    """The tokens that the first block sees: (N, D)."""
    eps = architecture["norm_eps"]
    kernel = state["patch_embed.proj.weight"]
    x_PD = patches(image_CHW, architecture["patch_size"]) @ kernel.reshape(len(kernel), -1).T
    x_PD = norm(x_PD + state.get("patch_embed.proj.bias", 0.0), state, "patch_embed.norm", eps)
    first = [state[name][0] for name in ("cls_token", "dist_token", "reg_token") if name in state]
    x_ND = np.concatenate([*first, x_PD])
    if "pos_embed" in state:
        positions = state["pos_embed"][0]
        x_ND[len(x_ND) - len(positions) :] += positions
    return norm(x_ND, state, "norm_pre", eps)


def prefix_of(architecture: Mapping[str, Any]) -> int:
    """How many tokens stand in front of the patches."""
    return int(architecture["class_token"]) + int(architecture["distillation_token"]) + architecture["registers"]


def logits(images_BCHW: Array, state: Mapping[str, Array], architecture: Mapping[str, Any]) -> Array:
    """The whole model, image by image: (B, K)."""
    a, eps, prefix = architecture, architecture["norm_eps"], prefix_of(architecture)
    grid = tuple(image // patch for image, patch in zip(a["image_size"], a["patch_size"], strict=True))
    rotary = {"grid": grid, "prefix": prefix, "box": a["position"] == "rotary_box"} if "rotary" in a["position"] else {}
    answers = []
    for image in images_BCHW:
        x_ND = embed(image, state, a)
        for layer in range(a["depth"]):
            x_ND = block(x_ND, state, f"blocks.{layer}", a, **rotary)
        x_ND = norm(x_ND, state, "norm", eps)
        read = x_ND[0 if a["pool_prefix"] else prefix :]
        if a["pool"] == "token":
            x_D = x_ND[0]
        elif a["pool"] == "mean":
            x_D = sum(read) / len(read)
        else:
            x_D = attention_pool(read, state, "attn_pool", a["heads"], a["activation"], eps)[0]
        answer = linear(norm(x_D, state, "fc_norm", eps), state, "head")
        if "dist_token" in state:
            answer = (answer + linear(norm(x_ND[1], state, "fc_norm", eps), state, "head_dist")) / 2
        answers.append(answer)
    return np.stack(answers)
