"""The host's share of a step: its kernel launches do not grow with depth, and stay below what the benchmark's goals allow."""

import argparse
from typing import Any

import pytest

from benchmarks.steps import host_time

pytest.importorskip("triton")
slow = pytest.mark.slow  # the kernels are compiled; `tests/engine/test_launches.py` counts launches without that
# Kernels that nothing but a refresh of eigenvectors launches: orthogonal iteration's own, and the Newton iterations' in it.
REFRESH = {"turn_kernel", "gram_kernel", "apply_kernel", "judge_kernel", "commit_kernel", "energy_kernel", "update_kernel"}


def measured(*names: str) -> dict[str, dict[str, Any]]:
    """Counts of some models; the times of two steps mean nothing."""
    arguments = argparse.Namespace(repeats=2, settings={})
    return {name: host_time.run_in_process(name, host_time.ROOT, arguments) for name in names}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return measured("gpt-few", "gpt48-few", "autoencoder")


@pytest.fixture(scope="module")
def of_adam() -> dict[str, dict[str, Any]]:
    return measured("gpt-adam", "gpt48-adam")


def launches(result: dict[str, Any], step: str = "step") -> int:
    return int(result["passes_launches"] + result[f"{step}_launches"])


@slow
def test_launches_do_not_grow_with_depth(results: dict[str, dict[str, Any]]) -> None:
    assert launches(results["gpt-few"]) == launches(results["gpt48-few"])


@slow
@pytest.mark.parametrize(("name", "most"), [("gpt-few", 60), ("autoencoder", 40)])
def test_launches_stay_below_the_goal(results: dict[str, dict[str, Any]], name: str, most: int) -> None:
    assert launches(results[name]) <= most, results[name]["step_kernels"]


@slow
def test_the_table_has_a_line_for_each_model(results: dict[str, dict[str, Any]]) -> None:
    text = host_time.table({(name, "this"): result for name, result in results.items()})
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == list(results)


@slow
@pytest.mark.parametrize(("step", "most"), [("step", 20), ("refresh", 240)])
def test_launches_of_kfacadam_do_not_grow_with_depth(of_adam: dict[str, dict[str, Any]], step: str, most: int) -> None:
    few, many = of_adam.values()
    assert few[f"{step}_kernels"] == many[f"{step}_kernels"]
    assert launches(many, step) <= launches(few, step) <= most, few[f"{step}_kernels"]


@slow
def test_one_of_kfacadams_steps_refreshes_and_the_other_does_not(of_adam: dict[str, dict[str, Any]]) -> None:
    for result in of_adam.values():
        assert result["refresh_kernels"].keys() >= REFRESH and not result["step_kernels"].keys() & REFRESH
        with_refresh, without = (set(result[f"{step}_by_operator"]) for step in ("refresh", "step"))
        assert not (with_refresh | without) & {"linalg_eigh", "_linalg_eigh", "linalg_qr"}
        # What a step does without a refresh, it does with one.
        assert all(result["refresh_kernels"][name] >= count for name, count in result["step_kernels"].items())


def test_kfacadam_has_a_line_for_a_refresh_and_none_in_a_package_without_it() -> None:
    times = dict.fromkeys(("taps_ms", "step_ms", "adamw_ms"), 1.0)
    counts = {"passes_launches": 2, "step_launches": 3, "taps_operators": 4, "step_operators": 5}
    kfacadam = times | counts | {"refresh_launches": 30, "refresh_operators": 50, "refresh_ms": 7.0}
    text = host_time.table({("gpt", "this"): times | counts, ("gpt-adam", "this"): kfacadam, ("gpt-adam", "other"): {}})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["gpt", "this"], ["gpt-adam", "this"], ["gpt-adam, step with a refresh", "this"]]
    assert rows[1][2:] == ["2 + 3 = **5**", "4 + 5", "1.00 + 1.00 = **2.00**", "1.00"]
    assert rows[2][2:] == ["2 + 30 = **32**", "4 + 50", "1.00 + 7.00 = **8.00**", "1.00"]
