"""Temperature scaling: one number that makes a classifier's probabilities mean what they say.

Probabilities become softmax(logits / T) with one T for all classes, chosen on validation data by likelihood (Guo et
al., "On Calibration of Modern Neural Networks", 2017, section 4.2).  The ranking of the classes, and with it the
accuracy, does not move.

Notable:
- With a = 1 / T, what is minimised is the negative log-likelihood of the N images plus a mild preference for T = 1:

      sum_n [ log sum_k exp(a z_nk) - a z_n,y(n) ]  +  c (a - 1 - log a),      c = 4

  The second term is a Gamma prior on a with its mode at 1; near 1 it is (log T)^2 / (2 x 0.5^2).  It weighs as much as
  a handful of images.  Without it, a small validation split that the model gets all right asks for ever sharper
  probabilities, and the first mistake on a test image then costs without limit: on digits with 20 validation images,
  plain likelihood made the test loss six times worse, and with the prior it was better than uncalibrated.  With
  thousands of images it changes nothing.
- Both terms are convex in a: the slope is E_p[z] - z_y and the curvature Var_p[z], summed, under p = softmax(a z).
  Newton's method inside a shrinking bracket cannot fail to converge.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vit.evaluation.metrics import as_arrays, blocks

TEMPERATURES = (0.05, 20.0)
"""The range that a fitted temperature lies in."""

PRIOR = 4.0
"""Weight c of the preference for T = 1, in units of images."""


def fit_temperature(logits: Any, labels: Any) -> float:
    """The temperature that suits these validation logits.

    Args:
        logits: (N, K) raw outputs of the model; an array, or a tensor on any device.
        labels: (N,) whole numbers, the true classes.

    Returns:
        T in [0.05, 20], never one under which these images are less likely than under T = 1.  Where the images say
        nothing (there are none, or all logits are equal) it is 1.

    Raises:
        VitError: shapes that do not fit together, labels out of range, or logits that are not finite.
    """
    logits, labels = as_arrays(logits, labels)
    if not len(logits):
        return 1.0
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    a = 1.0
    for _ in range(100):
        slope, curvature = _derivatives(logits, labels, a)
        slope += PRIOR * (1 - 1 / a)
        curvature += PRIOR / a**2
        if slope > 0:
            high = a
        else:
            low = a
        new = a - slope / curvature
        if not low <= new <= high:
            # out of the bracket: take its middle instead, in the logarithm since the range spans three decades
            new = math.sqrt(low * high)
        if abs(new - a) <= 1e-10 * a:
            break
        a = new
    return min(max(1 / a, TEMPERATURES[0]), TEMPERATURES[1])


def _derivatives(logits: np.ndarray, labels: np.ndarray, a: float) -> tuple[float, float]:
    """Sums over images of E_p[z] - z_y and of Var_p[z], p = softmax(a z)."""
    slope = curvature = 0.0
    for part in blocks(logits):
        z = logits[part].astype(np.float64)
        z -= np.take_along_axis(z, labels[part, None], axis=1)
        p = a * z
        p -= p.max(axis=1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True)
        mean = np.einsum("nk,nk->n", p, z)
        slope += float(mean.sum())
        z -= mean[:, None]
        curvature += float(np.einsum("nk,nk,nk->", p, z, z))
    return slope, curvature
