"""Differences of losses between choices that ran with the same seeds, and how large one has to be to be told from chance."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev


@dataclass(frozen=True)
class Differences:
    """How choices compare with the first one.

    Attributes:
        means: Mean over the seeds of log(loss / loss of the first choice), which is a relative difference if it is small; None
            if a run diverged.
        spread: Standard deviation over the seeds of the first choice's log loss; 0 for one seed.
        detectable: The smallest difference that 95 % of differences by chance alone stay below; None for one seed.
    """

    means: list[float | None]
    spread: float
    detectable: float | None


def differences(losses: Sequence[Sequence[float]], uncounted: Collection[int] = ()) -> Differences:
    """Compares choices with the first.

    A seed changes the loss of all choices alike, and by more than a choice does. The model is therefore: log loss = choice +
    seed + chance. The variance of chance is estimated from all choices together, with (choices - 1) (seeds - 1) degrees of
    freedom.

    Args:
        losses: For each choice, the final loss of each seed, seeds in the same order; infinite if the run diverged.
        uncounted: Numbers of choices that the variance of chance is not estimated from, as they are nearly the first one.

    Raises:
        ValueError: if the first choice diverged.
    """
    logs = [[math.log(loss) for loss in of_choice] if all(map(math.isfinite, of_choice)) else None for of_choice in losses]
    first = logs[0]
    if first is None:
        raise ValueError(f"the reference must have finite losses, but has {list(losses[0])}")
    means = [None if x is None else fmean(x) - fmean(first) for x in logs]
    seeds, finite = len(first), [x for i, x in enumerate(logs) if x is not None and i not in uncounted]
    if seeds < 2:
        return Differences(means, 0.0, None)
    freedom = (len(finite) - 1) * (seeds - 1)
    detectable = None
    if freedom:
        by_seed = [fmean(column) for column in zip(*finite, strict=True)]
        overall = fmean(by_seed)
        squares = sum(
            (x - fmean(of_choice) - by_seed[i] + overall) ** 2 for of_choice in finite for i, x in enumerate(of_choice)
        )
        detectable = student(0.975, freedom) * math.sqrt(2 * squares / freedom / seeds)
    return Differences(means, stdev(first), detectable)


def student(probability: float, freedom: int) -> float:
    """Quantile of Student's distribution by the expansion of Cornish and Fisher around the normal one.

    From 4 degrees of freedom on, the error at 0.975 is below one percent.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
