"""Fixtures of every test. Kernels are interpreted, to be said before they are imported; `make gpu` runs them compiled."""

import gc
import os

os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # threads of several processes would wait for each other's processors
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from support import interpreter

interpreter.make_quicker()
if find_spec("hypothesis") is not None:  # the environment of the trainers has none
    from hypothesis import settings

    # A change is not judged by another one's luck: `make test` draws the same examples each time, `make test-all` new ones.
    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")

LONGEST = ("test_codegen.py", "test_budget.py", "test_queued_sums.py")
TABLE = "table"  # name under which a test's report carries what it shows


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several processes take whole files, which share fixtures; the table of conventions needs the tests that it is about."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "conventions" if "/test_convention" in file else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: nobody should wait for them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What was imported and collected stays: garbage collections need not look at all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Prints lines at the end of the session, whichever process the test runs in."""
    return lambda *lines: request.node.user_properties.append((TABLE, "\n".join(lines)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what tests show."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, text in getattr(report, "user_properties", ()):
                if name == TABLE and report.when == "call":
                    terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
