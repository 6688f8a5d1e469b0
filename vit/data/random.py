"""Counter-based random numbers in torch: a function of their purpose, not of when they are drawn.

Notable:
- A value is `f(seed, epoch, sample index, stream, k)`. Worker count, process count, batch size and resuming cannot
  change it, because nothing is remembered between calls: no generator object, no global state.
- Each level is a SplitMix64 generator seeded by the level above (Steele, Lea and Flood, "Fast splittable
  pseudorandom number generators", OOPSLA 2014, with the finaliser "Mix13" that David Stafford fitted for avalanche):
  `child(state, i) = mix(state + (i + 1) * GAMMA)`, and the value is
  `child(child(child(child(0, seed), epoch), index), stream * 2^20 + k)`.
- int64 arithmetic that wraps, the same on a CPU and a GPU bit for bit; about 25 small tensor operations a call.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, made odd: the Weyl increment of SplitMix64
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # Stafford's Mix13
_SHIFTS = (30, 27, 31)
_WORD = (1 << 64) - 1
_STREAM_BITS = 20


class Stream(enum.IntEnum):
    """Names the purposes of random numbers.

    One list, so that no two uses share a stream; a number once given never changes, because a run resumed later must
    draw the same.
    """

    ORDER = 0
    CROP = 1
    SHIFT = 2
    FLIP = 3
    AFFINE = 4
    RAND_AUGMENT = 5
    JITTER = 6
    ERASING = 7
    MIXING = 8


def uniform(seed: int, epoch: int, index: Tensor, stream: int, n: int) -> Tensor:
    """Draw `n` numbers for each sample.

    Args:
        seed: the run's seed, any integer (taken modulo 2^64).
        epoch: from 0.
        index: int64 (B,), each sample's index in its data set; the result lives on its device.
        stream: what the numbers are for (`Stream`, or any of 0 to 2^20 - 1); two streams are independent of each other.
        n: how many, at most 2^20. The first of `n` numbers are the same for every larger `n`.

    Returns:
        float32 (B, n) in [0, 1), multiples of 2^-24.
    """
    return draw(seed, epoch, index, offsets(stream, n, index.device))


def offsets(stream: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Name the numbers 0 to `n` - 1 of a stream, int64 (n,), for `draw`; several streams may be concatenated."""
    first = (stream << _STREAM_BITS) + 1
    return torch.arange(first, first + n, device=device) * _signed(GAMMA)


def draw(seed: int, epoch: int, index: Tensor, offsets: Tensor) -> Tensor:
    """Draw the numbers named by `offsets` (n,) for each sample of `index` (B,): float32 (B, n) in [0, 1)."""
    word = _mix(_states(seed, epoch, index).unsqueeze(-1) + offsets)
    # the 24 high bits: as many as a float32 holds exactly, so 1.0 is never reached by rounding
    return word.bitwise_right_shift_(40).bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def permutation(seed: int, epoch: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Shuffle 0 to `n` - 1: int64 (n,) on `device`, the order of an epoch, the same on every device and release.

    Sorts one 64-bit key a sample, so every order is as likely as the keys are random.
    """
    states = _states(seed, epoch, torch.arange(n, device=device))
    keys = _mix(states.add_(offsets(Stream.ORDER, 1, device)))
    return torch.argsort(keys, stable=True)


def _states(seed: int, epoch: int, index: Tensor) -> Tensor:
    """Give each sample its generator's state, int64 (B,)."""
    key = _child(_child(0, seed), epoch)
    return _mix(index * _signed(GAMMA) + _signed(key + GAMMA))


def _child(state: int, i: int) -> int:
    word = (state + (i + 1) * GAMMA) & _WORD
    for shift, multiplier in zip(_SHIFTS[:2], _MULTIPLIERS, strict=True):
        word = ((word ^ (word >> shift)) * multiplier) & _WORD
    return word ^ (word >> _SHIFTS[2])


def _mix(word: Tensor) -> Tensor:
    """Scramble int64 words in place; the caller gives up `word`."""
    for shift, multiplier in zip(_SHIFTS[:2], _MULTIPLIERS, strict=True):
        word.bitwise_xor_(_shift_right(word, shift)).mul_(_signed(multiplier))
    return word.bitwise_xor_(_shift_right(word, _SHIFTS[2]))


def _shift_right(word: Tensor, bits: int) -> Tensor:
    # int64 shifts repeat the sign; the mask makes the shift logical
    return (word >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """Read 64 bits as two's complement, the range that torch takes a scalar from."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word
