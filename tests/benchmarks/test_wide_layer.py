"""The comparison of a wide layer's forms, in miniature."""

from __future__ import annotations

import pytest

from benchmarks.steps import wide_layer


def test_memory_falls_with_the_blocks() -> None:
    """Of a layer of 256 inputs: factors as counted by hand, with their pad."""
    settings = {
        "full": {"max_factor_size": None},
        "block": {"max_factor_size": 65, "oversize": "block"},
        "diagonal": {"max_factor_size": 64, "oversize": "diagonal"},
    }
    found = {form: wide_layer.measure(256, 16, 32, options) for form, options in settings.items()}
    g = 16**2
    # The bias makes 257 columns: the last of four blocks has 65.
    counts = {"full": 272**2 + g, "block": 3 * 64**2 + 80**2 + g, "diagonal": 257 + g}
    for form, count in counts.items():
        assert found[form]["factors"] == pytest.approx(4 * count / 2**20)
        assert found[form]["inverses"] == pytest.approx(4 * count / 2**20)
        # seconds beside mebibytes, under names of their own
        assert all(0 <= found[form][name] < 60 for name in wide_layer.COLUMNS)
        assert len(found[form]) == len(wide_layer.COLUMNS) + 6


def test_a_process_of_its_own_and_the_table() -> None:
    found = wide_layer.in_a_process(64, 8, 16, {"max_factor_size": None})
    lines = wide_layer.table({"full": found}).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| full |")
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 10


def test_a_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="ended with exit status 1"):
        wide_layer.in_a_process("many", 8, 16, {})
