"""All or nothing: a step that fails half way leaves factors and counters as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..engine import Engine


@contextmanager
def transaction(engine: Engine) -> Iterator[None]:
    """Context of one step.

    Whatever is raised inside (a device out of memory, an interrupt, an error of a closure) is passed on, after factors, their
    counters and the engine's step are what they were. Statistics are forgotten, inverses are made anew at the next step, and
    EKFAC's moments begin anew.

    The old factors wait in the buffers of the sums, which nobody reads before the next backward pass: no memory is needed for
    them, nor to put them back.
    """
    before, updates = engine.progress, None
    try:
        updates = engine.bank.updates.clone()
        yield
    except BaseException:
        engine.bank.roll_back()
        if updates is not None:
            engine.bank.updates.copy_(updates)
        if engine.progress.rewrites != before.rewrites:
            before = replace(before, is_stale=True, has_new_layers=True)
            for number in range(len(engine.layers)):
                engine.curvature.forget_moments(number)
        engine.forget_statistics()
        engine.resume(before)
        raise
    engine.bank.commit()
