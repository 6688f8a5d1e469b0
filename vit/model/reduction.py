"""Token reduction: many tasks do not need the whole input, and attention says which part they do need.

A block that reduces does so between its attention and its MLP.  Tokens in front of the patches are never touched.

- keep: the patches that the head's tokens attend to most stay; the rest become one token, their mean weighted by that
  attention (the idea of Liang et al. 2022, "Not All Patches are What You Need").  One row of attention says which.
- merge: similar tokens become one, their mean weighted by how many patches each stands for.  Tokens are dealt out in
  turn to two sets; each of the first finds its most similar one in the second, by the keys of attention, and the most
  similar pairs merge (the idea of Bolya et al. 2023, "Token Merging").

Notable:
- how many tokens go is fixed for each layer, so shapes do not depend on the image: batches, compilers and exporters
  see an ordinary model;
- patches stay in the order of the image, each with its own rotary position; a fused rest has none, like a class token;
- where each patch went is on record as a row-normalised matrix (N' x N) with one entry a column (`Move`), from which
  `vit.explain` finds its way back to the grid.

Letters in names are axes: B batch, N tokens, K tokens that stay, D width, H heads, d width of one head.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vit.errors import VitError, did_you_mean
from vit.model.attention import at_least_float32
from vit.model.positions import Rotary

SCHEDULES = ("constant", "decreasing", "stages")
METHODS = ("none", "keep", "merge")
DEFAULT_SCHEDULE = {"keep": "stages", "merge": "constant"}
RATE = 0.5
REDUCTION = {
    "reduction": "none",
    "reduction_rate": RATE,
    "reduction_schedule": None,
    "reduction_proportional": None,
}
"""The arguments of `VisionTransformer` that any model may have otherwise without other weights, and their defaults."""


class ReducedTokens(NamedTuple):
    """Tokens (B, N, D), and how many patches each stands for, (B, N)."""

    x_BND: Tensor
    sizes_BN: Tensor | None


class Move(NamedTuple):
    """Where tokens went: new token i is the sum of `share_j` times token j over all j with `place_j = i`.

    `place_BN` int64 and `share_BN` are the one entry a column of the matrix (N' x N), whose rows sum to 1; `tokens` is
    N', how many there are afterwards.
    """

    place_BN: Tensor
    share_BN: Tensor
    tokens: int

    def then(self, later: Move) -> Move:
        """Both moves as one, this one first."""
        place_BN, share_BN = (each.gather(1, self.place_BN) for each in (later.place_BN, later.share_BN))
        return Move(place_BN, self.share_BN * share_BN, later.tokens)

    def back(self, rows_BxM: Tensor) -> Tensor:
        """Rows over new tokens times the matrix: the same rows over the tokens before, (B, ..., N') -> (B, ..., N)."""
        place_BxN, share_BxN = self.place_BN, self.share_BN
        for _ in range(rows_BxM.ndim - 2):
            place_BxN, share_BxN = place_BxN[:, None], share_BxN[:, None]
        return rows_BxM.gather(-1, place_BxN.expand(*rows_BxM.shape[:-1], -1)) * share_BxN.to(rows_BxM.dtype)

    def added(self, values_BN: Tensor) -> Tensor:
        """The sum of a value over the tokens that went to the same place: (B, N) -> (B, N')."""
        return values_BN.new_zeros(values_BN.shape[0], self.tokens).scatter_add(1, self.place_BN, values_BN)

    @property
    def matrix(self) -> Tensor:
        """The matrix itself, (B, N', N)."""
        rows = torch.arange(self.tokens, device=self.place_BN.device)
        return (self.place_BN[:, None] == rows[:, None]) * self.share_BN[:, None]


def parse(text: str) -> dict[str, Any]:
    """Arguments of `VisionTransformer` from one line: none, METHOD, METHOD:RATE, METHOD:RATE:SCHEDULE or METHOD:COUNTS.

    `merge:0.5:decreasing`; COUNTS are how many tokens go in each layer, joined by "-", such as `keep:0-0-60-0-40-0`.
    Raises `VitError`.
    """
    method, *rest = text.strip().split(":")
    if method not in METHODS:
        raise VitError(f"reduction: no method {method!r}; {did_you_mean(method, METHODS)}")
    found: dict[str, Any] = {"reduction": method, "reduction_schedule": None}
    if rest and "-" in rest[0] and len(rest) == 1:
        counts = rest[0].split("-")
        if all(each.isascii() and each.isdecimal() and len(each) < 8 for each in counts):
            return {**found, "reduction_schedule": [int(each) for each in counts]}
    elif method != "none" and len(rest) <= 2:
        try:
            rate = float(rest[0]) if rest else RATE
        except ValueError:
            rate = -1.0
        if 0 <= rate < 1:
            if len(rest) == 2 and rest[1] not in SCHEDULES:
                raise VitError(f"reduction: no schedule {rest[1]!r}; {did_you_mean(rest[1], SCHEDULES)}")
            return {**found, "reduction_rate": rate, "reduction_schedule": rest[1] if len(rest) == 2 else None}
    elif not rest:
        return found
    raise VitError(
        f"reduction: expected none, or a method with a share of patches such as merge:0.5 or keep:0.6:stages, or with "
        f"a number of tokens for each layer such as merge:0-8-8-4, not {text!r}"
    )


def spell(a: Mapping[str, Any]) -> str:
    """The line for the arguments of a model, as `parse` reads it."""
    method, plan = a.get("reduction", "none"), a.get("reduction_schedule")
    if method == "none":
        return "none"
    if isinstance(plan, list | tuple):
        return f"{method}:{'-'.join(map(str, plan))}"
    return f"{method}:{a.get('reduction_rate', RATE):g}:{plan or DEFAULT_SCHEDULE[method]}"


def together(moves: Sequence[Move | None]) -> Move | None:
    """Moves one after the other as one; None for no move at all."""
    found = [move for move in moves if move is not None]
    return functools.reduce(Move.then, found) if found else None


class Reduction:
    """What a model does to its tokens: a method, and how many patch tokens fewer there are after each layer.

    Arguments
        method: "keep" or "merge".
        counts: by layer, for an image of `patches` patches.
        proportional: a token that stands for several patches is attended to as if it were there as often, by adding
            the logarithm of their number to its scores (Bolya et al. 2023, equation 1).
        prefix: tokens in front of the patches.
        read: which of the last tokens the head reads; what these attend to decides what "keep" keeps.
    """

    def __init__(
        self, method: str, counts: Sequence[int], patches: int, *, proportional: bool, prefix: int, read: slice
    ) -> None:
        self.method, self.counts, self.patches = method, tuple(counts), patches
        self.proportional, self.prefix, self.read = proportional, prefix, read

    def begin(self, tokens: int, rotary: Rotary | None) -> Reducer:
        """What reduces the tokens of one forward pass, `tokens` of them at the start."""
        patches, counts = int(tokens) - self.prefix, self.counts  # a tracer has numbers of its own kind
        if patches != self.patches:  # patch dropout: the same shares of fewer patches
            counts = possible(self.method, [round(each * patches / self.patches) for each in counts], patches)
        return (Keeper if self.method == "keep" else Merger)(self, counts, patches, rotary)


def schedule(method: str, rate: float, name: str, patches: int, depth: int) -> tuple[int, ...]:
    """How many patch tokens go in each of `depth` layers, so that a share `rate` of `patches` is gone in the end.

    "constant": as many in every layer; "decreasing": falling by equal steps to nearly none in the last; "stages": at a
    quarter, half and three quarters of the depth, each time the same share of those that are left, as Liang et al.
    place them.  Never more than a layer can do: merging at most halves, keeping leaves one patch and the rest.
    """
    total = rate * patches
    if name == "stages":
        layers = sorted({depth * k // 4 for k in (1, 2, 3)})
        left = [patches * (1 - rate) ** (sum(at <= layer for at in layers) / len(layers)) for layer in range(depth)]
        gone = [patches - each for each in left]
    elif name == "decreasing":
        gone = [total * (1 - (1 - (layer + 1) / depth) ** 2) for layer in range(depth)]
    else:
        gone = [total * (layer + 1) / depth for layer in range(depth)]
    whole = [0, *(round(each) for each in gone)]
    return possible(method, [after - before for before, after in itertools.pairwise(whole)], patches)


def possible(method: str, counts: Sequence[int], patches: int) -> tuple[int, ...]:
    """`counts`, each lowered to what can go of the patch tokens that are there."""
    found = []
    for count in counts:
        found.append(max(0, min(count, most(method, patches))))
        patches -= found[-1]
    return tuple(found)


def most(method: str, patches: int) -> int:
    """How many of so many patch tokens one layer can do without."""
    return max(0, patches - 2) if method == "keep" else patches // 2


class Reducer:
    """Reduces the tokens of one forward pass, block by block, by what attention says about them.

    Attributes
        rotary: angles of the tokens there are now.
        sizes_BN: how many patches each token stands for, or 1 for one in front of them; None while each is itself.
    """

    _needs: slice

    def __init__(self, plan: Reduction, counts: Sequence[int], patches: int, rotary: Rotary | None) -> None:
        self.plan, self.patches, self.rotary = plan, patches, rotary
        self.sizes_BN: Tensor | None = None
        self._left, self._now = list(counts), patches
        self._moves: list[Callable[[], Move] | None] = []

    @property
    def moves(self) -> list[Move | None]:
        """Of the layers so far, where the tokens went; None where all stayed.  Made when asked for."""
        return [make and make() for make in self._moves]

    @property
    def rows(self) -> slice | None:
        """Which queries' weights `reduce` needs of this layer's attention; None where no token goes."""
        return self._needs if self._left[0] else None

    def bias(self) -> Tensor | None:
        """What is added to the scores of attention to each token, (B, 1, 1, N); None for nothing."""
        return log_sizes(self.sizes_BN) if self.plan.proportional else None

    def reduce(self, x_BND: Tensor, rows_BHRN: Tensor | None = None, keys_BHNd: Tensor | None = None) -> Tensor:
        """Turn the tokens of this layer into those that go on, (B, N', D).

        Takes the weights of `rows` in this layer's attention, and its keys; neither is read where `rows` is None.
        """
        count = self._left.pop(0)
        if not count:
            self._moves.append(None)
            return x_BND
        assert rows_BHRN is not None
        assert keys_BHNd is not None
        with torch.autocast(x_BND.device.type, enabled=False):
            x_BND = self._reduce(x_BND, rows_BHRN, keys_BHNd, self._now, count)
        self._now -= count
        return x_BND

    def _reduce(self, x_BND: Tensor, rows_BHRN: Tensor, keys_BHNd: Tensor, P: int, count: int) -> Tensor:
        raise NotImplementedError

    def _turn(self, rows_BK: Tensor) -> None:
        """Leave the angles of these tokens."""
        if self.rotary is not None:
            cos, sin = (each[rows_BK] if each.ndim == 2 else take(each[:, 0], rows_BK) for each in self.rotary)
            self.rotary = cos[:, None], sin[:, None]

    def _moved(self, place_BP: Tensor, share_BP: Tensor, patches: int) -> Move:
        """A move of the patch tokens, with the tokens in front of them staying where they are."""
        prefix = self.plan.prefix
        first = torch.arange(prefix, device=place_BP.device).expand(place_BP.shape[0], -1)
        places_BN = torch.cat([first, place_BP + prefix], dim=1)
        return Move(places_BN, F.pad(share_BP, (prefix, 0), value=1.0), prefix + patches)


class Keeper(Reducer):
    """Keeps the patches that matter, and fuses the rest into one token, the last."""

    def __init__(self, plan: Reduction, counts: Sequence[int], patches: int, rotary: Rotary | None) -> None:
        super().__init__(plan, counts, patches, rotary)
        self._needs = plan.read

    def _scores(self, rows_BHRN: Tensor) -> Tensor:
        """Score patches by the attention of what the head reads: (B, P), its mean over heads and, where that is several
        tokens, over the patches they stand for."""
        rows_BRN = rows_BHRN.mean(dim=1)
        if self.sizes_BN is None:
            scores_BN = rows_BRN.mean(dim=1)
        else:
            scores_BN = (shares(self.sizes_BN[:, self.plan.read])[:, None] @ rows_BRN)[:, 0]
        # a patch that nothing looks at has a weight in the rest all the same, so that weights can always be shares
        return scores_BN[:, self.plan.prefix :].clamp(min=1e-12)

    def _reduce(self, x_BND: Tensor, rows_BHRN: Tensor, keys_BHNd: Tensor, P: int, count: int) -> Tensor:
        prefix, scores_BP, B = self.plan.prefix, self._scores(rows_BHRN), x_BND.shape[0]
        keep = P - count - 1
        candidates_BP = scores_BP.detach()
        if self.sizes_BN is not None:  # the last is the rest already
            candidates_BP = candidates_BP[:, :-1]
        kept_BK = candidates_BP.topk(keep, dim=1).indices.sort(dim=1).values
        rest_BP = shares(scores_BP.scatter(1, kept_BK, 0.0))
        patches_BPD = x_BND[:, prefix:]
        fused_B1D = rest_BP[:, None].to(x_BND.dtype) @ patches_BPD
        first = torch.arange(prefix, device=kept_BK.device).expand(B, -1)
        rows_BK = torch.cat([first, kept_BK + prefix], dim=1)

        weights_BP = rest_BP.detach()

        def move() -> Move:
            stays_BP = torch.zeros_like(weights_BP, dtype=torch.int64).scatter(1, kept_BK, 1)
            place_BP = torch.where(stays_BP > 0, stays_BP.cumsum(dim=1) - 1, keep)
            return self._moved(place_BP, torch.where(stays_BP > 0, 1.0, weights_BP), keep + 1)

        self._moves.append(move)
        self._turn(rows_BK)
        if self.rotary is not None:
            cos, sin = self.rotary
            self.rotary = F.pad(cos, (0, 0, 0, 1), value=1.0), F.pad(sin, (0, 0, 0, 1))
        ones = torch.ones(prefix + keep, dtype=scores_BP.dtype, device=x_BND.device)
        self.sizes_BN = F.pad(ones, (0, 1), value=float(self.patches - keep)).expand(B, -1)
        return torch.cat([take(x_BND, rows_BK), fused_B1D], dim=1)


class Merger(Reducer):
    """Merges similar tokens."""

    _needs = slice(0, 0)

    def _reduce(self, x_BND: Tensor, rows_BHRN: Tensor, keys_BHNd: Tensor, P: int, count: int) -> Tensor:
        prefix, device, B = self.plan.prefix, x_BND.device, x_BND.shape[0]
        keys_BPd = at_least_float32(keys_BHNd.detach())[:, :, prefix:].mean(dim=1)
        keys_BPd = F.normalize(keys_BPd, dim=-1)
        ones_BP = torch.ones(B, P, dtype=keys_BPd.dtype, device=device)
        sizes_BP = ones_BP if self.sizes_BN is None else self.sizes_BN[:, prefix:]
        # each token of the first set with its most similar one of the second, the most similar pairs in front
        nearest_BA = (keys_BPd[:, 0::2] @ keys_BPd[:, 1::2].transpose(1, 2)).max(dim=2)
        order_BA = nearest_BA.values.argsort(dim=1, descending=True)
        gone_BR, target_BR = order_BA[:, :count], nearest_BA.indices.gather(1, order_BA[:, :count])
        # what each of the second set takes in, as a matrix product: sums in a fixed order, whatever the device
        halves = P // 2
        taken_BQR = (target_BR[:, None] == torch.arange(halves, device=device)[:, None]).to(x_BND.dtype)
        mass_BR = sizes_BP.gather(1, 2 * gone_BR)
        own_BQ = sizes_BP[:, 1::2]
        sum_BQ = own_BQ + (taken_BQR.to(mass_BR.dtype) @ mass_BR[:, :, None])[:, :, 0]
        brought_BRD = take(x_BND, prefix + 2 * gone_BR) * mass_BR[:, :, None].to(x_BND.dtype)
        second_BQD = x_BND[:, prefix + 1 :: 2]
        merged_BQD = (second_BQD * own_BQ[:, :, None] + taken_BQR @ brought_BRD) / sum_BQ[:, :, None]
        # those that stay, in the order of the image: the first set without those that went, and the second
        second = torch.arange(1, P, 2, device=device).expand(B, -1)
        stay_BK = torch.cat([2 * order_BA[:, count:], second], dim=1).sort(dim=1).values
        first = torch.arange(prefix, device=device).expand(B, -1)
        rows_BK = torch.cat([first, stay_BK + prefix], dim=1)
        # a token of the second set is found behind all those that were there
        sources_BK = torch.where(stay_BK % 2 == 1, prefix + P + stay_BK // 2, stay_BK + prefix)
        sources_BK = torch.cat([first, sources_BK], dim=1)
        everything_BN = F.pad(sizes_BP, (prefix, 0), value=1.0)
        new_sizes_BK = torch.cat([everything_BN, sum_BQ], dim=1).gather(1, sources_BK)

        def move() -> Move:
            target_BP = torch.arange(P, device=device).expand(B, -1).scatter(1, 2 * gone_BR, 2 * target_BR + 1)
            stays_BP = torch.ones_like(target_BP).scatter(1, 2 * gone_BR, 0)
            place_BP = (stays_BP.cumsum(dim=1) - 1).gather(1, target_BP)
            return self._moved(place_BP, sizes_BP / new_sizes_BK[:, prefix:].gather(1, place_BP), P - count)

        self._moves.append(move)
        self._turn(rows_BK)
        self.sizes_BN = new_sizes_BK
        return take(torch.cat([x_BND, merged_BQD.to(x_BND.dtype)], dim=1), sources_BK)


def take(x_BND: Tensor, rows_BK: Tensor) -> Tensor:
    """Of each image the tokens that its rows name: (B, N, D), int64 (B, K) -> (B, K, D).

    As one choice of rows from a matrix (B N, D), which copies whole rows; torch's `gather` and ONNX's GatherElements
    go number by number.
    """
    B, N, D = x_BND.shape
    starts_B1 = torch.arange(B, device=x_BND.device)[:, None] * N
    return x_BND.reshape(B * N, D).index_select(0, (rows_BK + starts_B1).flatten()).view(B, rows_BK.shape[1], D)


def shares(weights_BN: Tensor) -> Tensor:
    """Weights as shares of their sum, by row."""
    return weights_BN / weights_BN.sum(dim=1, keepdim=True)


def log_sizes(sizes_BN: Tensor | None) -> Tensor | None:
    """The logarithms as a bias of scores, (B, 1, 1, N)."""
    return None if sizes_BN is None else sizes_BN.log()[:, None, None]
