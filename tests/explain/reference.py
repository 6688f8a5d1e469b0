"""What the tests of attention hold the code against: a model's weights and each method's formula, NumPy, float64.

Written from the papers, one image at a time, with loops where a formula has a sum and whole matrices where the code
carries a row.  Gradients are central differences of a forward pass that takes its attention weights as given.  The
parts of a model (norms, MLP, patches, rotary positions) are those of `tests/model/reference.py`.  At the end, the
small models that the tests share.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from vit.model import VisionTransformer

Array = np.ndarray


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"formulas_of_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parts = _load(Path(__file__).parents[1] / "model" / "reference.py")


# a model that takes its attention weights as given


class Pass(NamedTuple):
    """One image's forward pass: logits (K,), each layer's weights (H, N, N) and output (N, D), readout (R, N)."""

    logits: Array
    weights: list[Array]
    tokens: list[Array]
    readout: Array


class Model:
    """A Vision Transformer from its state dict and architecture; one image at a time."""

    def __init__(self, state: Mapping[str, Array], architecture: Mapping[str, Any]) -> None:
        self.state, self.a = state, architecture
        (height, width), (ph, pw) = architecture["image_size"], architecture["patch_size"]
        self.grid = (height // ph, width // pw)
        self.prefix = parts.prefix_of(architecture)
        self.heads, self.first = architecture["heads"], 0 if architecture["pool_prefix"] else self.prefix

    def norm(self, x: Array, name: str) -> Array:
        return parts.norm(x, self.state, name, self.a["norm_eps"])

    def embed(self, image_CHW: Array) -> Array:
        return parts.embed(image_CHW, self.state, self.a)

    def block(self, x_ND: Array, layer: int, weights: Array | None = None) -> tuple[Array, Array]:
        """One block with its weights (H, N, N), computed from `x` or as given."""
        name = f"blocks.{layer}"
        pre = self.a["norm"] == "pre"
        first, second = (self.state.get(f"{name}.ls{i}.gamma", 1.0) for i in (1, 2))
        inner = self.norm(x_ND, f"{name}.norm1") if pre else x_ND
        y_ND, weights = self._attend(inner, name, weights)
        x_ND = x_ND + first * y_ND
        if not pre:
            x_ND = self.norm(x_ND, f"{name}.norm1")
        inner = self.norm(x_ND, f"{name}.norm2") if pre else x_ND
        x_ND = x_ND + second * parts.block_mlp(inner, self.state, f"{name}.mlp", self.a)
        return (x_ND if pre else self.norm(x_ND, f"{name}.norm2")), weights

    def _attend(self, x_ND: Array, name: str, weights: Array | None) -> tuple[Array, Array]:
        if self.a["attention"] == "dot_product":
            if weights is None:
                weights = _softmax(x_ND @ x_ND.T)[None]
            return weights[0] @ x_ND, weights
        q, k, v = np.split(parts.linear(x_ND, self.state, f"{name}.attn.qkv"), 3, axis=1)
        d = x_ND.shape[1] // self.heads
        own = [slice(head * d, (head + 1) * d) for head in range(self.heads)]
        if weights is None:
            weights = np.stack([self._weights(q[:, part], k[:, part], f"{name}.attn") for part in own])
        y_ND = np.concatenate([weights[head] @ v[:, part] for head, part in enumerate(own)], axis=1)
        return parts.linear(self.norm(y_ND, f"{name}.attn.norm"), self.state, f"{name}.attn.proj"), weights

    def _weights(self, q_Nd: Array, k_Nd: Array, name: str) -> Array:
        q_Nd, k_Nd = self.norm(q_Nd, f"{name}.q_norm"), self.norm(k_Nd, f"{name}.k_norm")
        if "rotary" in self.a["position"]:
            box = self.a["position"] == "rotary_box"
            q_Nd, k_Nd = (parts.turn(x, self.grid, self.prefix, box=box) for x in (q_Nd, k_Nd))
        return _softmax(q_Nd @ k_Nd.T / math.sqrt(q_Nd.shape[1]))

    def answer(self, x_ND: Array, readout: Array | None = None) -> tuple[Array, Array]:
        """The last tokens -> logits, with how they were read: (R, N), computed or as given."""
        x_ND = self.norm(x_ND, "norm")
        N, first = len(x_ND), self.first
        if self.a["pool"] == "attention":
            latent = self.state["attn_pool.latent"][0]
            q_1D = parts.linear(latent, self.state, "attn_pool.q")
            k, v = np.split(parts.linear(x_ND[first:], self.state, "attn_pool.kv"), 2, axis=1)
            d = x_ND.shape[1] // self.heads
            own = [slice(head * d, (head + 1) * d) for head in range(self.heads)]
            if readout is None:
                readout = np.zeros((self.heads, N))
                for head, part in enumerate(own):
                    readout[head, first:] = _softmax(q_1D[:, part] @ k[:, part].T / math.sqrt(d))[0]
            y_D = np.concatenate([readout[head, first:] @ v[:, part] for head, part in enumerate(own)])
            y_D = parts.linear(y_D, self.state, "attn_pool.proj")
            inner = self.norm(y_D, "attn_pool.norm")
            x_D = y_D + parts.mlp(inner, self.state, "attn_pool.mlp", self.a["activation"])
        else:
            if readout is None:
                readout = np.zeros((1 + self.a["distillation_token"], N))
                if self.a["pool"] == "token":
                    for row in range(len(readout)):
                        readout[row, row] = 1
                else:
                    readout[0, first:] = 1 / (N - first)
            x_D = readout[0] @ x_ND
        logits = parts.linear(self.norm(x_D, "fc_norm"), self.state, "head")
        if self.a["distillation_token"]:
            logits = (logits + parts.linear(self.norm(readout[1] @ x_ND, "fc_norm"), self.state, "head_dist")) / 2
        return logits, readout

    def run(self, image_CHW: Array) -> Pass:
        x_ND, weights, tokens = self.embed(image_CHW), [], []
        for layer in range(self.a["depth"]):
            x_ND, found = self.block(x_ND, layer)
            weights.append(found)
            tokens.append(x_ND)
        logits, readout = self.answer(x_ND)
        return Pass(logits, weights, tokens, readout)

    # gradients, as central differences

    def gradients(self, image_CHW: Array, target: int) -> tuple[list[Array], Array]:
        """Of the target's logit by every weight of every layer, each moved alone, and by the readout."""
        done = self.run(image_CHW)
        starts = [self.embed(image_CHW), *done.tokens]

        def from_layer(layer: int, weights: Array) -> float:
            x_ND, _ = self.block(starts[layer], layer, weights)
            for later in range(layer + 1, self.a["depth"]):
                x_ND, _ = self.block(x_ND, later)
            return self.answer(x_ND)[0][target]

        by_weights = [
            _differences(lambda weights, layer=layer: from_layer(layer, weights), found)  # type: ignore[misc]
            for layer, found in enumerate(done.weights)
        ]
        return by_weights, _differences(lambda readout: self.answer(starts[-1], readout)[0][target], done.readout)

    def own_gradients(self, image_CHW: Array, target: int) -> list[Array]:
        """LeGrad's: the mean of layer l's output read as if it were the class token; by layer l's weights (H, N, N).

        With a pooling head, by that head's weights (R, N) instead; with mean pooling, read as the model reads.
        """
        done = self.run(image_CHW)
        starts = [self.embed(image_CHW), *done.tokens]
        found = []
        for layer in range(self.a["depth"]):
            if self.a["pool"] == "attention":
                x_ND = done.tokens[layer]
                readout = self.answer(x_ND)[1]
                found.append(_differences(lambda given, x=x_ND: self.answer(x, given)[0][target], readout))  # type: ignore[misc]
            else:

                def read(given: Array, layer: int = layer) -> float:
                    x_ND = self.block(starts[layer], layer, given)[0]
                    if self.a["pool"] == "token":
                        x_ND = np.repeat(x_ND.sum(axis=0, keepdims=True) / len(x_ND), len(x_ND), axis=0)
                    return self.answer(x_ND)[0][target]

                found.append(_differences(read, done.weights[layer]))
        return found


def _softmax(scores: Array) -> Array:
    return np.stack([parts.softmax(row) for row in scores])


def _differences(function: Any, at: Array, step: float = 1e-5) -> Array:
    """(f(x + h e_i) - f(x - h e_i)) / 2h for every element i."""
    gradient = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (2 * step)
    return gradient


# methods, one image: weights L times (H, N, N), readout (R, N); maps (rows, columns) of sum 1


def as_map(row_N: Array, prefix: int, grid: tuple[int, int]) -> Array:
    """The patches' part of a row, scaled to sum 1; where nothing is left, every patch the same."""
    patches = [float(value) for value in row_N[prefix:]]
    total = sum(patches)
    shares = [value / total if total > 0 else 1 / len(patches) for value in patches]
    return np.array([[shares[row * grid[1] + column] for column in range(grid[1])] for row in range(grid[0])])


def fuse(weights_HNN: Array, fusion: str) -> Array:
    H, N, _ = weights_HNN.shape
    fused = np.zeros((N, N))
    for i in range(N):
        for j in range(N):
            values = [float(weights_HNN[h, i, j]) for h in range(H)]
            fused[i, j] = {"mean": sum(values) / H, "max": max(values), "min": min(values)}[fusion]
    return fused


def without_smallest(fused_NN: Array, prefix: int, discard: float) -> Array:
    """The share `discard` of the weights to patches, the smallest of this image and layer, set to 0."""
    N = len(fused_NN)
    places = [(i, j) for i in range(N) for j in range(prefix, N)]
    places.sort(key=lambda place: fused_NN[place])
    kept = fused_NN.copy()
    for place in places[: int(discard * len(places))]:
        kept[place] = 0
    return kept


def with_residual(matrix_NN: Array) -> Array:
    """rownorm(A + I)."""
    N = len(matrix_NN)
    mixed = np.zeros((N, N))
    for i in range(N):
        row = [matrix_NN[i, j] + (i == j) for j in range(N)]
        mixed[i] = [value / sum(row) for value in row]
    return mixed


def rollout(
    weights: Sequence[Array],
    readout: Array,
    prefix: int,
    grid: tuple[int, int],
    fusion: str = "mean",
    discard: float = 0.0,
) -> Array:
    """Abnar and Zuidema 2020: R = Â_L ... Â_1, Â = rownorm(fuse(A) + I), read by the mean of the readout's heads."""
    R_NN = np.eye(weights[0].shape[-1])
    for layer in weights:
        R_NN = with_residual(without_smallest(fuse(layer, fusion), prefix, discard)) @ R_NN
    return as_map(readout.mean(axis=0) @ R_NN, prefix, grid)


def positive(weights: Array, gradient: Array) -> Array:
    """mean_h (A ∘ ∂s/∂A)⁺: (H, ...) -> (...)."""
    return sum(np.maximum(a * g, 0) for a, g in zip(weights, gradient, strict=True)) / len(weights)


def read_for_class(readout: Array, readout_gradient: Array | None) -> Array:
    """The row that class-specific methods start from: (N,); of a class token, whose weight is fixed, the token."""
    if readout_gradient is None:
        return readout.mean(axis=0)
    row = positive(readout, readout_gradient)
    return row if row.sum() > 0 else readout.mean(axis=0)


def gradient_rollout(
    weights: Sequence[Array], gradients: Sequence[Array], row_N: Array, prefix: int, grid: tuple[int, int]
) -> Array:
    R_NN = np.eye(len(row_N))
    for layer, gradient in zip(weights, gradients, strict=True):
        R_NN = with_residual(positive(layer, gradient)) @ R_NN
    return as_map(row_N @ R_NN, prefix, grid)


def relevance(
    weights: Sequence[Array], gradients: Sequence[Array], row_N: Array, prefix: int, grid: tuple[int, int]
) -> Array:
    """Chefer et al., ICCV 2021, equations 5 and 6: R = I; R <- R + Ā R, layer by layer from the first."""
    R_NN = np.eye(len(row_N))
    for layer, gradient in zip(weights, gradients, strict=True):
        R_NN = R_NN + positive(layer, gradient) @ R_NN
    return as_map(row_N @ R_NN, prefix, grid)


def legrad(own_gradients: Sequence[Array], prefix: int, grid: tuple[int, int]) -> Array:
    """Bousselham et al. 2024: sum over the last two layers of the mean over heads (and rows) of (∂s_l/∂A_l)⁺."""
    total = np.zeros(own_gradients[0].shape[-1])
    for gradient in own_gradients[-2:]:
        rows = np.maximum(gradient, 0).reshape(-1, gradient.shape[-1])
        total += sum(rows) / len(rows)
    return as_map(total, prefix, grid)


# small models

SMALL: dict[str, Any] = dict(image_size=8, patch_size=4, num_classes=3, in_channels=2, width=16, depth=2, heads=2)
VARIANTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "registers": dict(registers=2),
    "not square": dict(image_size=(8, 12), patch_size=(4, 4)),
    "other patches": dict(image_size=(4, 12), patch_size=(2, 4), depth=3, heads=4),
    "mean": dict(pool="mean", registers=1, qk_norm=True, layer_scale=0.3, image_size=(12, 8)),
    "mean with class token": dict(pool="mean", class_token=True, position_prefix=False),
    "attention pool": dict(pool="attention", registers=1, image_size=(8, 12)),
    "attention pool with class token": dict(pool="attention", class_token=True, norm="post"),
    "rotary": dict(position="rotary", registers=1, image_size=(8, 12)),
    "sine-cosine": dict(position="sincos", pool="mean"),
    "no positions": dict(position="none", qkv_bias=False),
    "post-norm": dict(norm="post", layer_scale=0.5),
    "post-norm with mean": dict(norm="post", pool="mean"),
    "dot product": dict(attention="dot_product", registers=1),
    "dot product with attention pool": dict(attention="dot_product", pool="attention"),
    "one head": dict(attention="scaled_dot_product", qk_norm=True),
    "one layer": dict(depth=1),
    "CLIP": dict(embed_norm="tokens", patch_bias=False, norm_eps=1e-5, activation="quick_gelu"),
    "BEiT-3": dict(attention_norm=True, mlp_norm=True, pool="mean", class_token=True, norm_eps=1e-5),
    "AIMv2": dict(norm_layer="rms", embed_norm="patches", mlp="swiglu", pool="mean", qkv_bias=False, proj_bias=False),
    "DeiT": dict(distillation_token=True, registers=1),
    "DINOv3": dict(position="rotary_box", registers=2, image_size=(8, 12), layer_scale=0.5),
    "no last norm, some pixels left over": dict(final_norm="none", image_size=(10, 13), crop_to_patches=True),
    "mean of all tokens": dict(pool="mean", pool_prefix=True, registers=2),
    "attention pool, all tokens": dict(pool="attention", pool_prefix=True, class_token=True),
}


def build(options: Mapping[str, Any], dtype: torch.dtype = torch.float32, **more: Any) -> VisionTransformer:
    """A small model in evaluation mode, shaken out of its zeros so that attention is far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(**{**SMALL, **options, **more}).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.6 if "qkv" in name or ".q." in name or ".kv." in name else 0.2
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def images_for(model: VisionTransformer, count: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = model.patch_embed.proj.weight
    return torch.randn(count, weight.shape[1], *model.image_size, generator=generator, dtype=torch.float64).to(weight)


def formulas(model: VisionTransformer) -> Model:
    """The same model in NumPy."""
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    return Model(state, model.architecture)


def assert_maps(maps: torch.Tensor, B: int, grid: tuple[int, int]) -> None:
    assert maps.shape == (B, *grid)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(B))
