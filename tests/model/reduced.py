"""A Vision Transformer that reduces its tokens, in NumPy, float64: what tests hold `vit.model.reduction` against.

One image at a time, with loops and sorting where the code has matrices; each token knows which patches it stands for
and where it is.  The other parts of a model are those of `reference.py`, given as `parts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass
class Token:
    """A token: its vector, its row and column (None: nowhere), how many patches it stands for."""

    x: Array
    place: tuple[int, int] | None = None
    size: int = 1
    rest: bool = False


@dataclass
class Pass:
    """What a forward pass left: by layer the attention (H, N, N), the matrix (N', N) that says where tokens went, and
    those that came out."""

    logits: Array = field(default_factory=lambda: np.zeros(0))
    weights: list[Array] = field(default_factory=list)
    matrices: list[Array] = field(default_factory=list)
    readout: Array = field(default_factory=lambda: np.zeros(0))
    tokens: list[list[Token]] = field(default_factory=list)


def turned(x_d: Array, place: tuple[int, int] | None, parts: ModuleType, grid: tuple[int, int], box: bool) -> Array:
    """One token's query or key, turned by its place."""
    if place is None:
        return x_d
    everywhere = np.repeat(x_d[None], grid[0] * grid[1], axis=0)
    return parts.turn(everywhere, grid, 0, box=box)[place[0] * grid[1] + place[1]]


def run(
    image: Array,
    state: Mapping[str, Array],
    a: Mapping[str, Any],
    counts: Sequence[int],
    parts: ModuleType,
    *,
    given: Sequence[Array | None] | None = None,
    readout: Array | None = None,
) -> Pass:
    """One image through the model; `counts` are the tokens fewer after each layer.

    `given`, by layer, stands in the place of the attention that mixes tokens, not of that which says what to keep;
    None: as computed.  `readout` likewise.
    """
    grid = tuple(side // patch for side, patch in zip(a["image_size"], a["patch_size"], strict=True))
    prefix, eps, heads, done = parts.prefix_of(a), a["norm_eps"], a["heads"], Pass()
    proportional = a["reduction_proportional"]
    proportional = a["reduction"] == "merge" if proportional is None else proportional
    places = [None] * prefix + [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    tokens = [Token(x, place) for x, place in zip(parts.embed(image, state, a), places, strict=True)]
    first = 0 if a["pool_prefix"] else prefix
    read = slice(0, 1 + a["distillation_token"]) if a["pool"] == "token" else slice(first, None)
    for layer, count in enumerate(counts):
        name, pre = f"blocks.{layer}", a["norm"] == "pre"
        scale = [state.get(f"{name}.ls{i}.gamma", 1.0) for i in (1, 2)]
        x = np.stack([token.x for token in tokens])
        inner = parts.norm(x, state, f"{name}.norm1", eps) if pre else x
        bias = np.log([token.size for token in tokens]) if proportional else np.zeros(len(tokens))
        if a["attention"] == "dot_product":
            keys = inner[None]
            weights = np.stack([parts.softmax(row + bias) for row in inner @ inner.T])[None]
            mixing = weights if given is None or given[layer] is None else given[layer]
            y = mixing[0] @ inner
        else:
            q, k, v = (np.split(each, heads, axis=1) for each in
                       np.split(parts.linear(inner, state, f"{name}.attn.qkv"), 3, axis=1))  # fmt: skip
            q = [parts.norm(each, state, f"{name}.attn.q_norm", eps) for each in q]
            k = [parts.norm(each, state, f"{name}.attn.k_norm", eps) for each in k]
            if "rotary" in a["position"]:
                box = a["position"] == "rotary_box"
                q, k = ([np.stack([turned(row, token.place, parts, grid, box) for row, token in
                                   zip(each, tokens, strict=True)]) for each in both] for both in (q, k))  # fmt: skip
            scores = [q[h] @ k[h].T / math.sqrt(q[h].shape[1]) + bias for h in range(heads)]
            weights = np.stack([np.stack([parts.softmax(row) for row in each]) for each in scores])
            keys = np.stack(k)
            mixing = weights if given is None or given[layer] is None else given[layer]
            y = np.concatenate([mixing[h] @ v[h] for h in range(heads)], axis=1)
            y = parts.linear(parts.norm(y, state, f"{name}.attn.norm", eps), state, f"{name}.attn.proj")
        x = x + scale[0] * y
        if not pre:
            x = parts.norm(x, state, f"{name}.norm1", eps)
        for token, vector in zip(tokens, x, strict=True):
            token.x = vector
        matrix = np.eye(len(tokens))
        if count and a["reduction"] == "keep":
            tokens, matrix = keep(tokens, weights, count, prefix, read)
        elif count:
            tokens, matrix = merge(tokens, keys, count, prefix)
        done.weights.append(weights)
        done.matrices.append(matrix)
        x = np.stack([token.x for token in tokens])
        inner = parts.norm(x, state, f"{name}.norm2", eps) if pre else x
        x = x + scale[1] * parts.block_mlp(inner, state, f"{name}.mlp", a)
        if not pre:
            x = parts.norm(x, state, f"{name}.norm2", eps)
        for token, vector in zip(tokens, x, strict=True):
            token.x = vector
        done.tokens.append([replace(token) for token in tokens])
    done.logits, done.readout = answer(tokens, state, a, read, proportional, parts, readout)
    return done


def keep(tokens: list[Token], weights: Array, count: int, prefix: int, read: slice) -> tuple[list[Token], Array]:
    """Patches sorted by the attention of what is read stay as far as there is room; the rest becomes a token."""
    readers = list(range(len(tokens)))[read]
    sizes = [tokens[i].size for i in readers]
    score = sum(size * weights[:, i].mean(axis=0) for size, i in zip(sizes, readers, strict=True)) / sum(sizes)
    patches = list(range(prefix, len(tokens)))
    candidates = [i for i in patches if not tokens[i].rest]
    kept = sorted(sorted(candidates, key=lambda i: -score[i])[: len(patches) - count - 1])
    rest = [i for i in patches if i not in kept]
    total = sum(score[i] for i in rest)
    fused = Token(sum(score[i] / total * tokens[i].x for i in rest), None, sum(tokens[i].size for i in rest), True)
    matrix = np.zeros((prefix + len(kept) + 1, len(tokens)))
    for new, old in enumerate([*range(prefix), *kept]):
        matrix[new, old] = 1
    for old in rest:
        matrix[-1, old] = score[old] / total
    return [*tokens[:prefix], *(tokens[i] for i in kept), fused], matrix


def merge(tokens: list[Token], keys: Array, count: int, prefix: int) -> tuple[list[Token], Array]:
    """Every second patch finds its most similar one among the others; the most similar pairs become one token."""
    key = [each / np.linalg.norm(each) for each in keys.mean(axis=0)]
    first, second = (list(range(start, len(tokens), 2)) for start in (prefix, prefix + 1))
    pairs = []
    for i in first:
        best = max(second, key=lambda j: key[i] @ key[j])
        pairs.append((float(key[i] @ key[best]), i, best))
    gone = {i: j for _, i, j in sorted(pairs, key=lambda pair: -pair[0])[:count]}
    left, matrix = [], np.zeros((len(tokens) - count, len(tokens)))
    for j, token in enumerate(tokens):
        if j in gone:
            continue
        members = [j, *(i for i, into in gone.items() if into == j)]
        size = sum(tokens[i].size for i in members)
        for i in members:
            matrix[len(left), i] = tokens[i].size / size
        left.append(Token(sum(tokens[i].size * tokens[i].x for i in members) / size, token.place, size))
    return left, matrix


def answer(
    tokens: list[Token], state: Mapping[str, Array], a: Mapping[str, Any], read: slice, proportional: bool,
    parts: ModuleType, given: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Logits, and the weights of what the head reads (R, N)."""
    eps, heads = a["norm_eps"], a["heads"]
    x = parts.norm(np.stack([token.x for token in tokens]), state, "norm", eps)
    sizes = np.array([token.size for token in tokens], dtype=float)
    readout = np.zeros((heads if a["pool"] == "attention" else 1 + a["distillation_token"], len(tokens)))
    if a["pool"] == "token":
        readout[range(len(readout)), range(len(readout))] = 1
        pooled = x[0]
    elif a["pool"] == "mean":
        readout[0, read] = sizes[read] / sizes[read].sum()
        readout = readout if given is None else given
        pooled = readout[0] @ x
    else:
        latent = state["attn_pool.latent"][0]
        q = np.split(parts.linear(latent, state, "attn_pool.q"), heads, axis=1)
        k, v = (np.split(each, heads, axis=1) for each in
                np.split(parts.linear(x[read], state, "attn_pool.kv"), 2, axis=1))  # fmt: skip
        bias = np.log(sizes[read]) if proportional else 0.0
        for h in range(heads):
            readout[h, read] = parts.softmax((q[h] @ k[h].T)[0] / math.sqrt(q[h].shape[1]) + bias)
        readout = readout if given is None else given
        y = parts.linear(np.concatenate([readout[h, read] @ v[h] for h in range(heads)])[None], state, "attn_pool.proj")
        inner = parts.norm(y, state, "attn_pool.norm", eps)
        pooled = (y + parts.mlp(inner, state, "attn_pool.mlp", a["activation"], eps=eps))[0]
    logits = parts.linear(parts.norm(pooled, state, "fc_norm", eps), state, "head")
    if a["distillation_token"]:
        logits = (logits + parts.linear(parts.norm(x[1], state, "fc_norm", eps), state, "head_dist")) / 2
    return logits, readout
