"""A step that fails half way leaves factors and counters as they were before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..engine import Engine


@contextmanager
def transaction(engine: Engine) -> Iterator[None]:
    """Context of one step.

    If anything is raised inside (a device out of memory, an interrupt, an error in a closure), factors, their counters and the
    engine's progress are restored, and the exception is passed on. The statistics of the step are dropped. If inverses or
    EKFAC's moments had been overwritten, the next step computes inverses from the factors, and the moments start again. With
    curvature="adam" eigenvectors and averages are restored, too.

    The old factors are kept in the buffers of the sums, which are not read before the next backward pass: neither keeping nor
    restoring them needs memory.
    """
    before, counts = engine.progress, None
    try:
        counts = engine.bank.updates.clone(), engine.bank.sampling.clone()
        yield
    except BaseException:
        engine.bank.roll_back()
        if counts is not None:
            engine.bank.updates.copy_(counts[0])
            engine.bank.sampling.copy_(counts[1])
        if engine.curvature.adam is not None:
            engine.curvature.adam.roll_back()
        elif engine.progress.rewrites != before.rewrites:
            before = replace(before, is_stale=True, has_new_layers=True)
            for number in range(len(engine.layers)):
                engine.curvature.forget_moments(number)
        engine.forget_statistics()
        engine.resume(before)
        raise
    engine.bank.commit()
