"""Build optimisers: AdamW, Muon on the block matrices with AdamW on the rest, and SGD.

Notable:

- decay is applied to matrices only: never to norms, biases, tokens, position embeddings or LayerScale;
- layer-wise decay and the factor of the head are part of each group's learning rate, so every schedule applies them;
- `Muon` steps all matrices of one shape as one batch, and in float32 on CPUs, where bfloat16 is emulated and slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vit.errors import VitError, did_you_mean

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic of Jordan et al. 2024, "Muon": https://kellerjordan.github.io/posts/muon/."""


def orthogonalise(g_KMN: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalise each of K matrices approximately: (K, M, N) -> (K, M, N).

    Newton-Schulz iteration X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X.  The singular values end between about 0.7 and 1.2,
    which works as well as exactly 1 (Jordan et al. 2024).  In bfloat16 on GPUs, in float32 elsewhere.
    """
    a, b, c = NEWTON_SCHULZ
    x = g_KMN.to(torch.bfloat16 if g_KMN.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.mT if tall else x).to(g_KMN.dtype)


class Muon(torch.optim.Optimizer):
    """Optimise matrices inside the blocks by orthogonalised momentum, every other group by AdamW.

    A group with `muon=True` holds 2-D parameters and takes `lr`, `momentum`, `weight_decay`; its step is
    `lr * sqrt(max(1, rows / columns)) * orthogonalise(nesterov momentum)` (Jordan et al. 2024).  Query, key and value
    are three maps in one matrix, so `qkv` weights (group key `parts=3`) are orthogonalised part by part.
    Other groups take `lr`, `betas`, `eps`, `weight_decay` as `torch.optim.AdamW` has them.
    Decay is decoupled in both: weights shrink by `lr * weight_decay` a step.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params,
            dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay, muon=False, parts=1),
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            if params and group["muon"]:
                self._muon_step(group, params, grads)
            elif params:
                self._adamw_step(group, params, grads)
        return loss

    def _muon_step(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        buffers = []
        for p in params:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])
        momentum = group["momentum"]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        nesterov = torch._foreach_lerp(grads, buffers, momentum)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for shape in {p.shape for p in params}:
            same = [i for i, p in enumerate(params) if p.shape == shape]
            stacked = torch.stack([nesterov[i] for i in same])
            parts = stacked.reshape(-1, shape[0] // group["parts"], shape[1])
            rows, columns = parts.shape[-2:]
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            steps = orthogonalise(parts).reshape(stacked.shape).unbind()
            torch._foreach_add_([params[i] for i in same], list(steps), alpha=-scale)

    def _adamw_step(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=torch.zeros(()))
        exp_avgs = [self.state[p]["exp_avg"] for p in params]
        exp_avg_sqs = [self.state[p]["exp_avg_sq"] for p in params]
        counts = [self.state[p]["step"] for p in params]
        torch._foreach_add_(counts, 1)
        steps = [int(count) for count in counts]  # they are on the CPU, so reading them does not wait for the device
        (beta1, beta2), lr = group["betas"], group["lr"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominator, [math.sqrt(1 - beta2**t) for t in steps])
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, exp_avgs, denominator, [-lr / (1 - beta1**t) for t in steps])


NO_DECAY = ("cls_token", "dist_token", "reg_token", "pos_embed", "latent", "gamma")
HEAD_PREFIXES = ("head.", "head_dist.")


def layer_index(name: str, depth: int) -> int:
    """Return a parameter's layer for layer-wise decay: 0 the embedding, 1 .. depth the blocks, depth + 1 the head.

    As in Bao et al. 2022 (BEiT) and Clark et al. 2020 (ELECTRA).
    """
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1 if name.startswith(("norm.", "fc_norm.", "attn_pool.", *HEAD_PREFIXES)) else 0


def build_parameter_groups(model: nn.Module, *, kind: str, lr: float, matrix_lr: float, weight_decay: float,
                     layer_decay: float, head_lr: float = 1.0) -> list[dict[str, Any]]:  # fmt: skip
    """Sort a `VisionTransformer`'s trainable parameters into optimiser groups.

    Parameters of one group have the same decay, layer and kind of step.  With `layer_decay` < 1 the group's learning
    rate is `lr * layer_decay ** (layers above it)`; that of the classifier is `lr * head_lr`.  With `kind="muon"`, 2-D
    weights inside blocks form `muon` groups at `matrix_lr`, except LoRA's, which are too thin to orthogonalise.  Each
    group has a readable `name`.
    """
    names = [name for name, _ in model.named_parameters()]
    depth = max((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=-1) + 1
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in NO_DECAY
        matrix = (
            kind == "muon" and decays and parameter.ndim == 2 and name.startswith("blocks.") and ".lora_" not in name
        )
        parts = 3 if matrix and ".qkv." in name else 1
        scale = layer_decay ** (depth + 1 - layer_index(name, depth))
        label = ("matrices_qkv" if parts == 3 else "matrices") if matrix else "decay" if decays else "no_decay"
        if layer_decay != 1:
            label += f"_layer{layer_index(name, depth):02d}"
        if head_lr != 1 and name.startswith(HEAD_PREFIXES):
            label += "_head"
            scale *= head_lr
        group = groups.setdefault(
            label,
            {"name": label, "params": [], "lr": (matrix_lr if matrix else lr) * scale}
            | {"weight_decay": weight_decay if decays else 0.0}
            | ({"muon": matrix, "parts": parts} if kind == "muon" else {}),
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    matrix_lr: float = 0.02,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.999),
    layer_decay: float = 1.0,
    head_lr: float = 1.0,
) -> torch.optim.Optimizer:
    """Build the optimiser `name` = "muon", "adamw" or "sgd" for a `VisionTransformer`.

    `lr` is the learning rate of AdamW or SGD, `matrix_lr` that of Muon's matrices, `head_lr` a factor for the
    classifier.  As in torch, `weight_decay` is multiplied by the learning rate.  Raises `VitError` for another name.
    """
    groups = build_parameter_groups(
        model,
        kind=name,
        lr=lr,
        matrix_lr=matrix_lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        head_lr=head_lr,
    )
    if name == "muon":
        return Muon(groups, lr=lr, momentum=momentum, betas=betas, weight_decay=weight_decay)
    if name == "adamw":
        fused = all(p.is_cuda for p in model.parameters())
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    raise VitError(f"optim.name: no optimiser {name!r}; {did_you_mean(name, ('muon', 'adamw', 'sgd'))}")
