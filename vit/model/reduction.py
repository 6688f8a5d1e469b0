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
- where each patch went is kept as a row-normalised matrix (N' x N) with one entry a column (`TokenMap`), from which
  `vit.explain` makes maps on the grid of the image.

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


class TokenMap(NamedTuple):
    """Which tokens became one: new token i is the sum of `fraction_j` times token j over all j with `index_j = i`.

    `index_BN` int64 and `fraction_BN` are the one entry a column of the matrix (N' x N), whose rows sum to 1; `tokens`
    is N', how many there are afterwards.
    """

    index_BN: Tensor
    fraction_BN: Tensor
    tokens: int

    def compose(self, later: TokenMap) -> TokenMap:
        """Compose two token maps, this one first."""
        index_BN, fraction_BN = (each.gather(1, self.index_BN) for each in (later.index_BN, later.fraction_BN))
        return TokenMap(index_BN, self.fraction_BN * fraction_BN, later.tokens)

    def unmerge(self, rows_BxM: Tensor) -> Tensor:
        """Multiply rows over the new tokens by the matrix: rows over the tokens before, (B, ..., N') -> (B, ..., N)."""
        index_BxN, fraction_BxN = self.index_BN, self.fraction_BN
        for _ in range(rows_BxM.ndim - 2):
            index_BxN, fraction_BxN = index_BxN[:, None], fraction_BxN[:, None]
        return rows_BxM.gather(-1, index_BxN.expand(*rows_BxM.shape[:-1], -1)) * fraction_BxN.to(rows_BxM.dtype)

    def scatter_sum(self, values_BN: Tensor) -> Tensor:
        """Sum a value over the tokens that became one: (B, N) -> (B, N')."""
        return values_BN.new_zeros(values_BN.shape[0], self.tokens).scatter_add(1, self.index_BN, values_BN)

    @property
    def matrix(self) -> Tensor:
        """The matrix, (B, N', N)."""
        rows = torch.arange(self.tokens, device=self.index_BN.device)
        return (self.index_BN[:, None] == rows[:, None]) * self.fraction_BN[:, None]


def parse(text: str) -> dict[str, Any]:
    """Parse a reduction from one line: none, METHOD, METHOD:RATE, METHOD:RATE:SCHEDULE or METHOD:COUNTS.

    Returns arguments of `VisionTransformer`.  Examples: `merge:0.5:decreasing`; `keep:0-0-60-0-40-0`, with how many
    tokens go in each layer.  Raises `VitError`.
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


def format_reduction(a: Mapping[str, Any]) -> str:
    """Format the reduction of a model's arguments as one line, as `parse` reads it."""
    method, plan = a.get("reduction", "none"), a.get("reduction_schedule")
    if method == "none":
        return "none"
    if isinstance(plan, list | tuple):
        return f"{method}:{'-'.join(map(str, plan))}"
    return f"{method}:{a.get('reduction_rate', RATE):g}:{plan or DEFAULT_SCHEDULE[method]}"


def compose_all(token_maps: Sequence[TokenMap | None]) -> TokenMap | None:
    """Compose token maps, the first one first; None where all are None."""
    found = [token_map for token_map in token_maps if token_map is not None]
    return functools.reduce(TokenMap.compose, found) if found else None


class Reduction:
    """A model's plan of token reduction: a method, and how many patch tokens are removed in each layer.

    Args:
        method: "keep" or "merge".
        removed_per_layer: how many tokens, for an image of `patches` patches.
        proportional: a token that stands for several patches is attended to as if it were there as often, by adding
            the logarithm of their number to its scores (Bolya et al. 2023, equation 1).
        prefix: tokens in front of the patches.
        read: which of the last tokens the head reads; what these attend to decides what "keep" keeps.
    """

    def __init__(
        self,
        method: str,
        removed_per_layer: Sequence[int],
        patches: int,
        *,
        proportional: bool,
        prefix: int,
        read: slice,
    ) -> None:
        self.method, self.removed_per_layer, self.patches = method, tuple(removed_per_layer), patches
        self.proportional, self.prefix, self.read = proportional, prefix, read

    def begin(self, tokens: int, rotary: Rotary | None) -> Reducer:
        """Return the reducer of one forward pass, which begins with so many tokens."""
        patches, counts = int(tokens) - self.prefix, self.removed_per_layer  # a tracer has numbers of its own kind
        if patches != self.patches:  # patch dropout: the same fractions of fewer patches
            counts = clamp_removed(self.method, [round(each * patches / self.patches) for each in counts], patches)
        return (Keeper if self.method == "keep" else Merger)(self, counts, patches, rotary)


def schedule(method: str, rate: float, name: str, patches: int, depth: int) -> tuple[int, ...]:
    """Plan how many patch tokens each of `depth` layers removes, so that the fraction `rate` is gone in the end.

    "constant": as many in every layer; "decreasing": falling by equal steps to nearly none in the last; "stages": at a
    quarter, half and three quarters of the depth, each time the same fraction of those that are left, as Liang et al.
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
    return clamp_removed(method, [after - before for before, after in itertools.pairwise(whole)], patches)


def clamp_removed(method: str, counts: Sequence[int], patches: int) -> tuple[int, ...]:
    """Lower each count to what a layer can remove of the patch tokens that are left."""
    found = []
    for count in counts:
        found.append(max(0, min(count, max_removable(method, patches))))
        patches -= found[-1]
    return tuple(found)


def max_removable(method: str, patches: int) -> int:
    """Return how many of so many patch tokens one layer can remove at most."""
    return max(0, patches - 2) if method == "keep" else patches // 2


class Reducer:
    """Reduces the tokens of one forward pass, block by block, by what attention says about them.

    Attributes:
        rotary: angles of the tokens there are now.
        sizes_BN: how many patches each token stands for, or 1 for one in front of them; None while each is itself.
    """

    _needs: slice

    def __init__(self, plan: Reduction, counts: Sequence[int], patches: int, rotary: Rotary | None) -> None:
        self.plan, self.patches, self.rotary = plan, patches, rotary
        self.sizes_BN: Tensor | None = None
        self._left, self._now = list(counts), patches
        self._token_maps: list[Callable[[], TokenMap] | None] = []

    @property
    def token_maps(self) -> list[TokenMap | None]:
        """The token map of each layer so far; None where all tokens stayed.  Made when asked for."""
        return [make and make() for make in self._token_maps]

    @property
    def rows(self) -> slice | None:
        """Which queries' weights `reduce` needs of this layer's attention; None where no token goes."""
        return self._needs if self._left[0] else None

    def bias(self) -> Tensor | None:
        """Return what attention adds to the scores of each token, (B, 1, 1, N); None for nothing."""
        return log_sizes(self.sizes_BN) if self.plan.proportional else None

    def reduce(self, x_BND: Tensor, rows_BHRN: Tensor | None = None, keys_BHNd: Tensor | None = None) -> Tensor:
        """Turn the tokens of this layer into those that go on, (B, N', D).

        Takes the weights of `rows` in this layer's attention, and its keys; neither is read where `rows` is None.
        """
        count = self._left.pop(0)
        if not count:
            self._token_maps.append(None)
            return x_BND
        assert rows_BHRN is not None
        assert keys_BHNd is not None
        with torch.autocast(x_BND.device.type, enabled=False):
            x_BND = self._reduce(x_BND, rows_BHRN, keys_BHNd, self._now, count)
        self._now -= count
        return x_BND

    def _reduce(self, x_BND: Tensor, rows_BHRN: Tensor, keys_BHNd: Tensor, P: int, count: int) -> Tensor:
        raise NotImplementedError

    def _gather_rotary(self, rows_BK: Tensor) -> None:
        """Keep the rotary angles of these tokens alone."""
        if self.rotary is not None:
            cos, sin = (each[rows_BK] if each.ndim == 2 else gather_tokens(each[:, 0], rows_BK) for each in self.rotary)
            self.rotary = cos[:, None], sin[:, None]

    def _token_map(self, index_BP: Tensor, fraction_BP: Tensor, patches: int) -> TokenMap:
        """Return the map of all tokens, given that of the patches; the tokens in front of them stay."""
        prefix = self.plan.prefix
        first = torch.arange(prefix, device=index_BP.device).expand(index_BP.shape[0], -1)
        indices_BN = torch.cat([first, index_BP + prefix], dim=1)
        return TokenMap(indices_BN, F.pad(fraction_BP, (prefix, 0), value=1.0), prefix + patches)


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
            scores_BN = (to_fractions(self.sizes_BN[:, self.plan.read])[:, None] @ rows_BRN)[:, 0]
        # a patch that nothing looks at has a weight in the rest all the same, so that weights always have a sum
        return scores_BN[:, self.plan.prefix :].clamp(min=1e-12)

    def _reduce(self, x_BND: Tensor, rows_BHRN: Tensor, keys_BHNd: Tensor, P: int, count: int) -> Tensor:
        prefix, scores_BP, B = self.plan.prefix, self._scores(rows_BHRN), x_BND.shape[0]
        keep = P - count - 1
        candidates_BP = scores_BP.detach()
        if self.sizes_BN is not None:  # the last is the rest already
            candidates_BP = candidates_BP[:, :-1]
        kept_BK = candidates_BP.topk(keep, dim=1).indices.sort(dim=1).values
        rest_BP = to_fractions(scores_BP.scatter(1, kept_BK, 0.0))
        patches_BPD = x_BND[:, prefix:]
        fused_B1D = rest_BP[:, None].to(x_BND.dtype) @ patches_BPD
        first = torch.arange(prefix, device=kept_BK.device).expand(B, -1)
        rows_BK = torch.cat([first, kept_BK + prefix], dim=1)

        weights_BP = rest_BP.detach()

        def token_map() -> TokenMap:
            stays_BP = torch.zeros_like(weights_BP, dtype=torch.int64).scatter(1, kept_BK, 1)
            index_BP = torch.where(stays_BP > 0, stays_BP.cumsum(dim=1) - 1, keep)
            return self._token_map(index_BP, torch.where(stays_BP > 0, 1.0, weights_BP), keep + 1)

        self._token_maps.append(token_map)
        self._gather_rotary(rows_BK)
        if self.rotary is not None:
            cos, sin = self.rotary
            self.rotary = F.pad(cos, (0, 0, 0, 1), value=1.0), F.pad(sin, (0, 0, 0, 1))
        ones = torch.ones(prefix + keep, dtype=scores_BP.dtype, device=x_BND.device)
        self.sizes_BN = F.pad(ones, (0, 1), value=float(self.patches - keep)).expand(B, -1)
        return torch.cat([gather_tokens(x_BND, rows_BK), fused_B1D], dim=1)


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
        brought_BRD = gather_tokens(x_BND, prefix + 2 * gone_BR) * mass_BR[:, :, None].to(x_BND.dtype)
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

        def token_map() -> TokenMap:
            target_BP = torch.arange(P, device=device).expand(B, -1).scatter(1, 2 * gone_BR, 2 * target_BR + 1)
            stays_BP = torch.ones_like(target_BP).scatter(1, 2 * gone_BR, 0)
            index_BP = (stays_BP.cumsum(dim=1) - 1).gather(1, target_BP)
            return self._token_map(index_BP, sizes_BP / new_sizes_BK[:, prefix:].gather(1, index_BP), P - count)

        self._token_maps.append(token_map)
        self._gather_rotary(rows_BK)
        self.sizes_BN = new_sizes_BK
        return gather_tokens(torch.cat([x_BND, merged_BQD.to(x_BND.dtype)], dim=1), sources_BK)


def gather_tokens(x_BND: Tensor, rows_BK: Tensor) -> Tensor:
    """Gather tokens of each image by their numbers: (B, N, D), int64 (B, K) -> (B, K, D).

    As one choice of rows from a matrix (B N, D), which copies whole rows; torch's `gather` and ONNX's GatherElements
    go number by number.
    """
    B, N, D = x_BND.shape
    starts_B1 = torch.arange(B, device=x_BND.device)[:, None] * N
    return x_BND.reshape(B * N, D).index_select(0, (rows_BK + starts_B1).flatten()).view(B, rows_BK.shape[1], D)


def to_fractions(weights_BN: Tensor) -> Tensor:
    """Divide weights by their sum, by row."""
    return weights_BN / weights_BN.sum(dim=1, keepdim=True)


def log_sizes(sizes_BN: Tensor | None) -> Tensor | None:
    """Return the logarithms of sizes as a bias of scores, (B, 1, 1, N)."""
    return None if sizes_BN is None else sizes_BN.log()[:, None, None]
