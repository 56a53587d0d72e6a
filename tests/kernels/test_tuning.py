"""Configurations: the shipped ones, the user's, the nearest architecture, broken files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfac_triton.kernels import tuning
from kfac_triton.kernels.runtime import Target


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of the user, and no memory of other tests' files."""
    monkeypatch.setenv("KFAC_TRITON_CONFIGS", str(tmp_path))
    tuning.lookup.cache_clear()
    tuning.load.cache_clear()
    yield tmp_path
    tuning.lookup.cache_clear()
    tuning.load.cache_clear()


def target(arch: str) -> Target:
    return Target("hip" if arch.startswith("gfx") else "cuda", arch, 100)


@pytest.mark.parametrize(
    ("arch", "file"),
    [
        ("sm_80", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_100", "sm_100"),
        ("sm_120", "sm_100"),
        ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
    ],
)
def test_an_architecture_without_a_file_takes_the_nearest_older_one(arch: str, file: str) -> None:
    assert tuning.shipped_file(target(arch)).stem == file


def test_the_first_entry_that_is_large_enough_counts(folder: Path) -> None:
    entries = [{"up_to": 64, "BLOCK": 1}, {"up_to": 256, "BLOCK": 2}, {"up_to": None, "BLOCK": 3, "num_warps": 8}]
    (folder / "sm_90.json").write_text(json.dumps({"mine": entries}))
    found = [tuning.lookup("mine", size, target("sm_90")) for size in (1, 64, 65, 256, 257, 10**6)]
    assert found == [{"BLOCK": 1}] * 2 + [{"BLOCK": 2}] * 2 + [{"BLOCK": 3, "num_warps": 8}] * 2


def test_what_the_user_tuned_wins_kernel_by_kernel(folder: Path) -> None:
    shipped = {kernel: tuning.lookup(kernel, 512, target("sm_90")) for kernel in ("covariance", "newton_schulz_step")}
    tuning.lookup.cache_clear()
    (folder / "sm_90.json").write_text(json.dumps({"covariance": [{"up_to": None, "BLOCK": 32, "BLOCK_K": 16}]}))
    assert tuning.lookup("covariance", 512, target("sm_90")) == {"BLOCK": 32, "BLOCK_K": 16}
    assert tuning.lookup("newton_schulz_step", 512, target("sm_90")) == shipped["newton_schulz_step"]
    assert tuning.lookup("covariance", 512, target("sm_80")) != {"BLOCK": 32, "BLOCK_K": 16}


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"covariance": []}',
        '{"covariance": [{"BLOCK": 64}]}',
        '{"covariance": [{"up_to": 64, "BLOCK": 64}]}',
        '{"covariance": [{"up_to": null, "BLOCK": 64}, {"up_to": 64, "BLOCK": 64}]}',
    ],
)
def test_a_broken_file_is_named(folder: Path, text: str) -> None:
    path = folder / "sm_90.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path.name} is not a table of kernel configurations .*tune again"):
        tuning.lookup("covariance", 64, target("sm_90"))


def test_the_users_file_lies_where_configurations_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KFAC_TRITON_CONFIGS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tuning.user_file("sm_90") == tmp_path / "kfac_triton" / "sm_90.json"
