"""Where a run stands: a value, whose changes leave the one before as it is."""

from __future__ import annotations

import dataclasses

import pytest
from support.runs import SETTINGS, net, train

from kfac_triton import KFAC
from kfac_triton.progress import Progress

START = Progress(damping=0.1, without_statistics=frozenset({0, 1, 2}))


def test_first_statistics_ask_for_inverses() -> None:
    after = START.with_statistics({0, 2}).refreshed()
    assert (after.without_statistics, after.refreshes, after.is_stale, after.has_new_layers) == ({1}, 1, False, False)
    assert after.with_statistics(set()) is after
    last = after.with_statistics({1})
    assert (last.without_statistics, last.is_stale, last.has_new_layers) == (set(), True, True)


def test_damping_makes_inverses_stale_only_if_it_changes() -> None:
    fresh = START.refreshed()
    assert fresh.at_damping(0.1) == fresh
    assert fresh.at_damping(0.2) == dataclasses.replace(fresh, damping=0.2, is_stale=True)
    assert fresh.at_damping(0.2).at_damping(0.2).is_stale


def test_it_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        START.steps = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", ["default", "ekfac"])
def test_an_engine_resumes_from_it(name: str) -> None:
    """Schedules, intervals and the gate go on from there."""
    model = net()
    optimizer = KFAC(model, lr=0.1, **{**SETTINGS[name], "statistics_every": 2, "inverse_every": 4})
    train(model, optimizer, range(2))
    engine = optimizer.engine
    before = engine.progress
    train(model, optimizer, range(2, 5))
    assert engine.progress.steps == 5
    assert engine.progress.rewrites > before.rewrites
    assert not engine.gate.open
    engine.resume(before)
    assert engine.progress is before
    assert engine.gate.open  # statistics are due in step 2
