"""Which gradients make the Fisher matrix, and what turns captured sums into its factors.

Capture takes g, the gradient of the backward pass with respect to a layer's output. The factors are those of the mean loss
over N loss terms:

    A = E[a a^T]          = (1 / rows) sum a a^T
    G = E[g_n g_n^T]      = N / scale^2 sum g g^T    where g = scale g_n / N       (loss_reduction="mean")
                          = 1 / (N scale^2) sum g g^T where g = scale g_n          (loss_reduction="sum")

with g_n the gradient of one loss term and scale the loss scale of mixed precision. So a damping has the same meaning for any
batch size, sequence length, spatial size, number of accumulation steps and loss scale (same conventions as curvlinops).

With the labels of the data that is the empirical Fisher (Kunstner et al. 2019 discuss it). `FisherPass` runs other backward
passes before that of the loss: from gradients at labels drawn from the model ("mc", the true Fisher), or from the columns of a
square root of the loss's Hessian ("ggn", the generalized Gauss-Newton matrix, which is the true Fisher for the usual losses).
"""

from __future__ import annotations

from torch import Tensor


def input_scale(rows: Tensor) -> Tensor:
    """Factor from the sum of a a^T over rows to their mean."""
    return 1 / rows


def gradient_scale(terms: Tensor, loss_reduction: str, loss_scale: float | Tensor) -> Tensor:
    """Factor from the sum of captured g g^T to the expectation over loss terms."""
    scale = terms if loss_reduction == "mean" else 1 / terms
    return scale / loss_scale**2
