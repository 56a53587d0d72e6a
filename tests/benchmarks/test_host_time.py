"""The host's share of a step: its kernel launches do not grow with depth, and stay below what the benchmark's goals allow."""

import argparse
from typing import Any

import pytest

from benchmarks.steps import host_time

pytest.importorskip("triton")
pytestmark = pytest.mark.slow  # the kernels are compiled; `tests/engine/test_launches.py` counts launches without that


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """Counts of three models; the times of two steps mean nothing."""
    arguments = argparse.Namespace(repeats=2, settings={})
    return {name: host_time.run_in_process(name, host_time.ROOT, arguments) for name in ("gpt-few", "gpt48-few", "autoencoder")}


def launches(result: dict[str, Any]) -> int:
    return int(result["passes_launches"] + result["step_launches"])


def test_launches_do_not_grow_with_depth(results: dict[str, dict[str, Any]]) -> None:
    assert launches(results["gpt-few"]) == launches(results["gpt48-few"])


@pytest.mark.parametrize(("name", "most"), [("gpt-few", 60), ("autoencoder", 40)])
def test_launches_stay_below_the_goal(results: dict[str, dict[str, Any]], name: str, most: int) -> None:
    assert launches(results[name]) <= most, results[name]["step_kernels"]


def test_the_table_has_a_line_for_each_model(results: dict[str, dict[str, Any]]) -> None:
    text = host_time.table({(name, "this"): result for name, result in results.items()})
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == list(results)
