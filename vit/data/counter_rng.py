"""Counter-based random numbers in NumPy: a counter through a 64-bit mixing function, without a generator.

What decides which image is in which split, and what a generated image shows, must be the same in every release of
every library and whatever else was drawn before.  (`vit.data.random` does the same for training, in torch, on the
device.)
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the increment of SplitMix64
_STEP = np.uint64(0xD1342543DE82EF95)


def mix_bits(values: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finaliser (Steele, Lea and Flood 2014): uint64 -> uint64, every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keys(seed: int, stream: int, index: np.ndarray) -> np.ndarray:
    """Derive a uint64 for each index: independent for different seeds, streams and indices."""
    start = np.array([(seed + _GOLDEN * (stream + 1)) % 2**64], dtype=np.uint64)
    return mix_bits(mix_bits(start) + index.astype(np.uint64) * np.uint64(_GOLDEN))


def uniform(key: np.ndarray, stream: int, n: int) -> np.ndarray:
    """Draw `n` numbers in [0, 1) for each key: float64 (len(key), n)."""
    counter = np.uint64(stream << 32) + np.arange(1, n + 1, dtype=np.uint64)
    bits = mix_bits(key[:, None] + counter[None] * _STEP)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(count: int, seed: int, stream: int) -> np.ndarray:
    """Draw a permutation of range(count): int64."""
    return np.argsort(keys(seed, stream, np.arange(count)), kind="stable")
