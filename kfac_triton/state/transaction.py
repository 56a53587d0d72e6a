"""All or nothing: a step that fails half way leaves factors and counters as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    host = {name: getattr(engine, name) for name in ("steps", "damping", "is_stale", "has_new_layers", "refreshes")}
    missing, updates = set(engine.without_statistics), None
    engine.inverses_changed = False
    try:
        updates = engine.bank.updates.clone()
        yield
    except BaseException:
        engine.bank.roll_back()
        if updates is not None:
            engine.bank.updates.copy_(updates)
        engine.without_statistics = missing
        for name, value in host.items():
            setattr(engine, name, value)
        if engine.inverses_changed:
            engine.forget_inverses()
        engine.forget_statistics()
        engine.restore_step(engine.steps)
        raise
    engine.bank.commit()
