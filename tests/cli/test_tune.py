"""`kfac-triton tune`: the search with an injected clock and real checks in the interpreter, the files, the command."""

import json
import math
import re

import pytest
import torch

from kfac_triton.cli import main
from kfac_triton.cli.tuning import stopwatch, tune
from kfac_triton.cli.tuning.search import (
    SPACE,
    BestConfig,
    ConfigEntry,
    every_candidate,
    neighbours,
    problem_for,
    search,
    slots,
    trial,
    values_of,
    write,
)
from kfac_triton.kernels import ops, runtime, tuning

CPU = torch.device("cpu")
PRESENT = {"BLOCK": 16, "BLOCK_K": 16}
SLOT = ConfigEntry("covariance", 40, 20, PRESENT)
INTERPRETED = runtime.Target("interpreter", "interpreter", 4)


class FakeClock:
    """Seconds from a table by configuration; remembers what it was asked for. It sees the configuration as a launch does."""

    def __init__(self, seconds, kernel="covariance"):
        self.seconds = seconds
        self.kernel = kernel
        self.timed = []

    def __call__(self, problem):
        config = tuning.lookup(self.kernel, 20, INTERPRETED)
        self.timed.append(tuple(config.values()))
        return self.seconds[self.timed[-1]]


SECONDS = {(16, 16): 4.0, (16, 32): 3.0, (32, 16): 5.0, (32, 32): 1.0}


def run_search(clock, exhaustive=True):
    lines = []
    return search(SLOT, CPU, clock, lines.append, exhaustive), lines


def test_the_fastest_of_all_combinations_wins():
    clock = FakeClock(SECONDS)
    outcome, lines = run_search(clock)
    assert outcome == BestConfig(SLOT, {"BLOCK": 32, "BLOCK_K": 32}, seconds=1.0, before=4.0)
    assert clock.timed[0] == (16, 16) and sorted(clock.timed) == sorted(SECONDS)
    assert len(lines) == 4 and "covariance {'BLOCK': 16, 'BLOCK_K': 16} 4000000 us" in lines


def test_a_quick_search_goes_downhill():
    clock = FakeClock(SECONDS)
    outcome, _ = run_search(clock, exhaustive=False)
    assert outcome.best == {"BLOCK": 32, "BLOCK_K": 32}
    assert clock.timed.count((16, 16)) == 1, "a candidate was timed twice"
    stuck = FakeClock(SECONDS | {(16, 32): 6.0})
    assert run_search(stuck, exhaustive=False)[0].best == PRESENT
    assert (32, 32) not in stuck.timed


def perturbed(monkeypatch, bad, damage):
    """The operation goes wrong for configurations that `bad` picks, as a miscompiled kernel would."""
    right = ops.covariance_ema

    def wrong(factors, *rest, **options):
        right(factors, *rest, **options)
        if bad(tuning.lookup("covariance", 20, INTERPRETED)):
            damage(factors)

    monkeypatch.setattr(ops, "covariance_ema", wrong)


@pytest.mark.parametrize(
    "damage",
    [
        lambda factors: factors[0].mul_(1.01),
        lambda factors: factors[0][0, 1].add_(1e-6),  # no longer symmetric
        lambda factors: factors[1][0, 0].fill_(torch.nan),
    ],
    ids=["wrong", "asymmetric", "nan"],
)
def test_a_wrong_candidate_is_rejected_however_fast(damage, monkeypatch):
    perturbed(monkeypatch, lambda config: config["BLOCK"] == 32, damage)
    clock = FakeClock(SECONDS)
    outcome, lines = run_search(clock)
    assert outcome.best == {"BLOCK": 16, "BLOCK_K": 32}
    assert (outcome.wrong, outcome.failed) == (2, 0)
    assert not any(key[0] == 32 for key in clock.timed), "a wrong candidate was timed"
    assert sum("wrong" in line for line in lines) == 2


def test_a_candidate_that_does_not_compile_is_passed_over(monkeypatch):
    def fail(factors):
        raise RuntimeError("PassManager::run failed")

    perturbed(monkeypatch, lambda config: config["BLOCK_K"] == 32, fail)
    outcome, _ = run_search(FakeClock(SECONDS))
    assert outcome.best == PRESENT and (outcome.failed, outcome.wrong) == (2, 0)


def test_the_present_configuration_may_be_the_broken_one(monkeypatch):
    perturbed(monkeypatch, lambda config: config == PRESENT, lambda factors: factors[0].zero_())
    outcome, _ = run_search(FakeClock(SECONDS))
    assert outcome.before == math.inf and outcome.wrong == 1 and outcome.best == {"BLOCK": 32, "BLOCK_K": 32}
    assert "before: failed" in str(outcome)


def test_nothing_right_leaves_the_present_configuration(monkeypatch):
    perturbed(monkeypatch, lambda config: True, lambda factors: factors[0].zero_())
    outcome, _ = run_search(FakeClock(SECONDS))
    assert outcome.best == PRESENT and outcome.seconds == math.inf and outcome.wrong == 4
    assert "nothing right found; 0 candidates failed, 4 were wrong" in str(outcome)


def test_a_kernel_that_the_problem_does_not_launch_is_left_alone():
    slot = ConfigEntry("newton_schulz_step", None, 20, {"BLOCK": 16})  # for matrices beyond those of the fused kernel
    outcome = search(slot, CPU, lambda problem: pytest.fail("timed"), print, True)
    assert outcome.best == slot.config and "does not launch it" in outcome.note


def test_a_trial_is_over_when_it_ends():
    before = tuning.lookup("covariance", 20, INTERPRETED)
    with pytest.raises(KeyError), trial("covariance", {"BLOCK": 1}):
        assert tuning.lookup("covariance", 20, INTERPRETED) == {"BLOCK": 1}
        assert tuning.lookup("covariance_patches", 20, INTERPRETED) != {"BLOCK": 1}
        raise KeyError
    assert tuning.lookup("covariance", 20, INTERPRETED) == before


def test_candidates_on_a_gpu(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    present = {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
    candidates = every_candidate(present)
    assert candidates[0] == present
    expected = len(SPACE["BLOCK"]) * len(SPACE["BLOCK_K"]) * len(SPACE["num_warps"]) * len(SPACE["num_stages"])
    assert len(candidates) == expected == len({tuple(c.items()) for c in candidates})
    assert {c["maxnreg"] for c in candidates} == {128}, "a limit of registers is no free value"
    assert values_of("BLOCK_M", 256) == (256, *SPACE["BLOCK"])
    around = list(neighbours(present, present))
    assert all(sum(c[key] != present[key] for key in present) == 1 for c in around)


def test_every_shipped_kernel_has_a_problem_that_launches_it():
    """The names in the configuration files and those that the search knows go together."""
    names = sorted(tuning.load(tuning.shipped_file(INTERPRETED)))
    launched = set()
    for name in names:
        slot = slots(INTERPRETED, [name], largest=72)[-1]
        with trial(name, slot.config) as asked:
            problem_for(name, slot.side, CPU).run("triton")
        launched |= {name} & set(asked)
    assert launched == set(names)
    with pytest.raises(ValueError, match="operation that can be tuned, but is 'sorting'"):
        problem_for("sorting", 20, CPU)


def test_slots_are_timed_at_the_largest_side_that_they_serve(monkeypatch):
    table = {"k": [{"up_to": 64, "A": 1}, {"up_to": 512, "A": 2}, {"up_to": None, "A": 3}]}
    monkeypatch.setattr(tuning, "load", lambda path: table)
    assert [(slot.up_to, slot.side, slot.config["A"]) for slot in slots(INTERPRETED, ["k"], 1024)] == [
        (64, 64, 1),
        (512, 512, 2),
        (None, 1024, 3),
    ]
    assert [slot.side for slot in slots(INTERPRETED, ["k"], 32)] == [32, 65, 528]


BASE = {
    "covariance": [{"up_to": 40, **PRESENT}, {"up_to": None, "BLOCK": 32, "BLOCK_K": 64}],
    "other": [{"up_to": None, "A": 1}],
}


@pytest.mark.parametrize("whole", [False, True])
def test_files_keep_what_was_not_searched(whole, tmp_path):
    base, path = tmp_path / "base.json", tmp_path / "new" / "user.json"
    base.write_text(json.dumps(BASE))
    path.parent.mkdir()
    path.write_text(json.dumps({"mine": [{"up_to": None, "B": 2}]}))
    write(path, base, [BestConfig(SLOT, {"BLOCK": 64, "BLOCK_K": 32}, seconds=1.0)], whole)
    written = tuning.load(path)
    assert written["covariance"] == [{"up_to": 40, "BLOCK": 64, "BLOCK_K": 32}, BASE["covariance"][1]]
    assert written["mine"] == [{"up_to": None, "B": 2}]
    assert ("other" in written) == whole
    assert json.loads(base.read_text()) == BASE


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KFAC_TRITON_CONFIGS", str(tmp_path / "configs"))
    monkeypatch.setattr(tune, "median_time", FakeClock(SECONDS | {(32, 64): 2.0}))
    tuning.lookup.cache_clear()
    yield tmp_path / "configs"
    tuning.lookup.cache_clear()


COMMAND = ["tune", "--device", "cpu", "--kernel", "covariance", "--largest", "20", "--quick", "--quiet"]


def test_the_command_writes_what_launches_then_use(user_folder, capsys):
    assert main(COMMAND) == 0
    printed = capsys.readouterr()
    assert f"Written: {user_folder / 'interpreter.json'}" in printed.out
    assert "covariance, sides up to 40, timed at 20: {'BLOCK': 32, 'BLOCK_K': 32}" in printed.out
    assert "say nothing about a GPU" in printed.err
    assert tuning.lookup("covariance", 20, INTERPRETED) == {"BLOCK": 32, "BLOCK_K": 32}
    assert "newton_schulz_step" in tuning.load(tuning.shipped_file(INTERPRETED))
    tuning.lookup("newton_schulz_step", 100, INTERPRETED)  # what was not tuned comes from the shipped file


def test_emit_writes_a_shipped_file(user_folder, tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "interpreter.json").write_text((tuning.SHIPPED / "interpreter.json").read_text())
    monkeypatch.setattr(tuning, "SHIPPED", shipped)
    tuning.load.cache_clear()
    assert main([*COMMAND, "--emit"]) == 0
    assert f"Written: {shipped / 'interpreter.json'}" in capsys.readouterr().out
    assert not user_folder.exists()
    written = json.loads((shipped / "interpreter.json").read_text())
    assert written["covariance"][0] == {"up_to": 40, "BLOCK": 32, "BLOCK_K": 32}
    assert "newton_schulz_step" in written


def test_nothing_is_written_when_nothing_is_right(user_folder, monkeypatch, capsys):
    perturbed(monkeypatch, lambda config: True, lambda factors: factors[0].zero_())
    assert main(COMMAND) == 1
    assert "nothing is written" in capsys.readouterr().err
    assert not user_folder.exists()


def test_a_machine_without_kernels_is_an_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    assert main(["tune", "--device", "cpu"]) == tune.NO_KERNEL == 2
    assert re.search(r"no kernel can run on cpu: Triton compiles for GPUs.*TRITON_INTERPRET=1", capsys.readouterr().err)


def test_an_unknown_kernel_is_named_with_those_there_are(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "--device", "cpu", "--kernel", "sorting"])
    assert re.search(
        r"argument --kernel: 'sorting' is not in interpreter.json; choose from covariance", capsys.readouterr().err
    )


def test_progress_goes_to_stderr(capsys):
    pytest.importorskip("tqdm")
    with tune.progress("tune", 2, "candidate", quiet=False) as on_candidate:
        on_candidate("first")
        on_candidate("second 5 us")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "2/2" in printed.err and "second 5 us" in printed.err


def test_the_time_of_a_problem_is_a_median_of_runs_from_the_start(monkeypatch):
    problem = problem_for("factored_newton", 16, CPU)
    prepared = []
    monkeypatch.setattr(problem, "prepare", lambda: prepared.append(1))
    monkeypatch.setattr(problem, "run", lambda backend: None)
    times = iter([0.3, 5.0, 1.0, 2.0])
    monkeypatch.setattr(tune, "Stopwatch", lambda device: lambda run: run() or next(times))
    assert tune.median_time(problem) == 2.0
    assert len(prepared) == 4, "a refresh started from its own result"


def test_graphs_are_for_gpus_and_for_runs_that_do_not_wait(monkeypatch):
    assert stopwatch.captured(lambda: pytest.fail("was run"), CPU) is None
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait():
        raise RuntimeError("called a synchronizing CUDA operation")

    def fail():
        raise RuntimeError("out of memory")

    assert stopwatch.waits_for_host(wait) and not stopwatch.waits_for_host(lambda: None)
    with pytest.raises(RuntimeError, match="out of memory"):
        stopwatch.waits_for_host(fail)
    assert modes == ["error", "default"] * 3
