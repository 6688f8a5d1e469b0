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


def layer_norm(x: Array, state: Mapping[str, Array], name: str) -> Array:
    """(x - mean) / sqrt(variance + 1e-6) * weight + bias over the last axis; the identity where there is no norm."""
    if f"{name}.weight" not in state:
        return x
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-6) * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: Array) -> Array:
    """x times the share of a normal distribution below x: x (1 + erf(x / sqrt 2)) / 2."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def mlp(x: Array, state: Mapping[str, Array], name: str) -> Array:
    return linear(gelu(linear(x, state, f"{name}.fc1")), state, f"{name}.fc2")


def turn(x_Nd: Array, grid: tuple[int, int], prefix: int, temperature: float = 100.0) -> Array:
    """Axial rotary positions: each pair of channels, read as a complex number, times exp(i position frequency)."""
    d = x_Nd.shape[1]
    turned = x_Nd.copy()
    for row in range(grid[0]):
        for column in range(grid[1]):
            token = prefix + row * grid[1] + column
            for i in range(d // 4):
                frequency = temperature ** (-i / (d // 4))
                for start, position in ((0, column), (d // 2, row)):
                    c = start + 2 * i
                    z = complex(x_Nd[token, c], x_Nd[token, c + 1])
                    z *= complex(math.cos(position * frequency), math.sin(position * frequency))
                    turned[token, c], turned[token, c + 1] = z.real, z.imag
    return turned


def self_attention(
    x_ND: Array, state: Mapping[str, Array], name: str, heads: int, grid: tuple[int, int] | None = None, prefix: int = 0
) -> tuple[Array, Array]:
    """Multi-head self-attention of one sequence, with the weights (H, N, N); rotary positions where `grid` is given."""
    N, D = x_ND.shape
    d = D // heads
    q, k, v = np.split(linear(x_ND, state, f"{name}.qkv"), 3, axis=1)
    outputs, weights = np.zeros((N, D)), np.zeros((heads, N, N))
    for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        q_Nd = layer_norm(q[:, own], state, f"{name}.q_norm")
        k_Nd = layer_norm(k[:, own], state, f"{name}.k_norm")
        if grid is not None:
            q_Nd, k_Nd = turn(q_Nd, grid, prefix), turn(k_Nd, grid, prefix)
        outputs[:, own], weights[head] = attention(q_Nd, k_Nd, v[:, own])
    return linear(outputs, state, f"{name}.proj"), weights


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


def attention_pool(patches_PD: Array, state: Mapping[str, Array], name: str, heads: int) -> tuple[Array, Array]:
    """A learned query asks the patches, then x + mlp(norm(x)): (D,), with the query's weights (H, P)."""
    x_1D, weights = cross_attention(state[f"{name}.latent"][0], patches_PD, state, name, heads)
    return (x_1D + mlp(layer_norm(x_1D, state, f"{name}.norm"), state, f"{name}.mlp"))[0], weights[:, 0]


def block(x_ND: Array, state: Mapping[str, Array], name: str, architecture: Mapping[str, Any], **rotary: Any) -> Array:
    """One Transformer block of one sequence, norms before the branches (pre) or after the sums (post)."""

    def attend(x: Array) -> Array:
        if architecture["attention"] == "dot_product":
            return dot_product_attention(x)[0]
        return self_attention(x, state, f"{name}.attn", architecture["heads"], **rotary)[0]

    first = state.get(f"{name}.ls1.gamma", 1.0)
    second = state.get(f"{name}.ls2.gamma", 1.0)
    if architecture["norm"] == "pre":
        x_ND = x_ND + first * attend(layer_norm(x_ND, state, f"{name}.norm1"))
        return x_ND + second * mlp(layer_norm(x_ND, state, f"{name}.norm2"), state, f"{name}.mlp")
    x_ND = layer_norm(x_ND + first * attend(x_ND), state, f"{name}.norm1")
    return layer_norm(x_ND + second * mlp(x_ND, state, f"{name}.mlp"), state, f"{name}.norm2")


def patches(image_CHW: Array, patch: tuple[int, int]) -> Array:
    """Cut an image into patches, row by row, and flatten each to one vector: (P, C ph pw)."""
    height, width = patch
    return np.stack(
        [
            image_CHW[:, top : top + height, left : left + width].ravel()
            for top in range(0, image_CHW.shape[1], height)
            for left in range(0, image_CHW.shape[2], width)
        ]
    )


def logits(images_BCHW: Array, state: Mapping[str, Array], architecture: Mapping[str, Any]) -> Array:
    """The whole model, image by image: (B, K)."""
    a = architecture
    ph, pw = a["patch_size"]
    grid = (a["image_size"][0] // ph, a["image_size"][1] // pw)
    prefix = int(a["class_token"]) + a["registers"]
    rotary = {"grid": grid, "prefix": prefix} if a["position"] == "rotary" else {}
    answers = []
    for image in images_BCHW:
        kernel = state["patch_embed.proj.weight"]
        x_PD = patches(image, (ph, pw)) @ kernel.reshape(len(kernel), -1).T + state["patch_embed.proj.bias"]
        first = [state[name][0] for name in ("cls_token", "reg_token") if name in state]
        x_ND = np.concatenate([*first, x_PD])
        if "pos_embed" in state:
            positions = state["pos_embed"][0]
            x_ND[len(x_ND) - len(positions) :] += positions
        for layer in range(a["depth"]):
            x_ND = block(x_ND, state, f"blocks.{layer}", a, **rotary)
        x_ND = layer_norm(x_ND, state, "norm")
        if a["pool"] == "token":
            x_D = x_ND[0]
        elif a["pool"] == "mean":
            x_D = sum(x_ND[prefix:]) / len(x_PD)
        else:
            x_D = attention_pool(x_ND[prefix:], state, "attn_pool", a["heads"])[0]
        answers.append(linear(layer_norm(x_D, state, "fc_norm"), state, "head"))
    return np.stack(answers)
