"""`python -m benchmarks.convergence.derivatives`: its problems, its contestants in miniature, and its arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.convergence import derivatives
from benchmarks.convergence.contest import Config
from benchmarks.convergence.derivative_problems import DTYPE, QUICK, DerivativeProblem, Forces, Poisson, laplacian
from benchmarks.convergence.derivative_runs import (
    ADAM,
    AUTO,
    CONTEST,
    FIXED,
    LOSS,
    DerivativeLog,
    DerivativeRun,
    factor,
    horizon,
    make_optimizer,
    train,
)
from kfac_triton import KFAC

PROBLEMS = {problem.name: problem for problem in QUICK}


def poisson() -> Poisson:
    problem = PROBLEMS["poisson"]
    assert isinstance(problem, Poisson)
    return problem


def forces() -> Forces:
    problem = PROBLEMS["forces"]
    assert isinstance(problem, Forces)
    return problem


class Exact(nn.Module):
    """A model that is right, up to a term that a test chooses."""

    def __init__(self, problem: Poisson | Forces, extra: float = 0.0) -> None:
        super().__init__()
        self.problem, self.extra = problem, extra

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.problem, Forces):
            return self.problem.potential(x) + self.extra * x.flatten(1).sum(1)
        return (self.problem.solution(x) + self.extra * x.square().sum(1))[:, None]


# The problems.


@pytest.mark.parametrize("problem", QUICK, ids=lambda problem: problem.name)
def test_the_exact_solution_has_no_residual(problem: Poisson | Forces) -> None:
    model, data = Exact(problem), problem.data(0)
    assert problem.residuals(model, data).abs().max() < 1e-11
    assert problem.error(model) < 1e-13


def test_the_source_is_minus_the_laplacian_by_central_differences() -> None:
    problem, h = poisson(), 1e-4
    x = torch.rand(20, 2, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    steps = h * torch.eye(2, dtype=DTYPE)
    u = problem.solution
    found = sum((u(x + step) - 2 * u(x) + u(x - step)) / h**2 for step in steps)
    assert torch.allclose(-found, problem.source(x), rtol=1e-5, atol=1e-4)


def test_laplacian_of_a_polynomial() -> None:
    x = torch.rand(7, 2, dtype=DTYPE).requires_grad_()
    found = laplacian(x[:, 0] ** 3 * x[:, 1] + x[:, 1] ** 2, x)
    assert torch.allclose(found, 6 * x[:, 0] * x[:, 1] + 2)


def test_forces_are_central_differences_of_the_potential() -> None:
    problem, h = forces(), 1e-5
    x, energy, force = problem.data(0)
    assert torch.equal(energy, problem.potential(x))
    for particle in range(3):
        for axis in range(3):
            step = torch.zeros_like(x)
            step[:, particle, axis] = h
            slope = (problem.potential(x + step) - problem.potential(x - step)) / (2 * h)
            assert torch.allclose(force[:, particle, axis], -slope, rtol=1e-7, atol=1e-8)
    assert force.sum(1).abs().max() < 1e-12, "no force on the whole"


def test_the_boundary_points_lie_on_all_four_sides() -> None:
    inside, edge = poisson().data(3)
    assert ((inside > 0) & (inside < 1)).all()
    sides = [(edge[:, 0] == 0), (edge[:, 0] == 1), (edge[:, 1] == 0), (edge[:, 1] == 1)]
    assert [int(side.sum()) for side in sides] == [3, 3, 3, 3]


def test_the_loss_of_poisson_is_the_sum_of_two_means() -> None:
    """The extra term 2 |x|^2 has the Laplacian 8 everywhere, and its own value on the boundary."""
    problem = poisson()
    data = problem.data(0)
    residuals = problem.residuals(Exact(problem, extra=2.0), data).detach()
    expected = 8.0**2 / 2 + problem.boundary_weight / 2 * (2 * data[1].square().sum(1)).square().mean()
    assert float(LOSS(residuals, torch.zeros_like(residuals))) == pytest.approx(float(expected), rel=1e-10)


def test_the_loss_of_forces_is_the_sum_of_two_means() -> None:
    """The extra term is three times the sum of the coordinates: each component of the forces is wrong by -3."""
    problem = forces()
    data = problem.data(0)
    residuals = problem.residuals(Exact(problem, extra=3.0), data).detach()
    expected = (3 * data[0].flatten(1).sum(1)).square().mean() + problem.force_weight * 9.0
    assert float(LOSS(residuals, torch.zeros_like(residuals))) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("problem", QUICK, ids=lambda problem: problem.name)
def test_weights_and_data_belong_to_the_seed(problem: DerivativeProblem) -> None:
    state = torch.get_rng_state()
    first, again, other = problem.build(0), problem.build(0), problem.build(1)
    assert torch.equal(state, torch.get_rng_state())
    parameters = [nn.utils.parameters_to_vector(model.parameters()) for model in (first, again, other)]
    assert torch.equal(parameters[0], parameters[1]) and not torch.equal(parameters[0], parameters[2])
    assert torch.equal(problem.data(0)[0], problem.data(0)[0]) and not torch.equal(problem.data(0)[0], problem.data(1)[0])


# The contestants.


@pytest.mark.parametrize("problem", QUICK, ids=lambda problem: problem.name)
def test_no_kfac_has_more_configurations_than_adam_and_none_twice(problem: DerivativeProblem) -> None:
    found = CONTEST[problem.name]
    assert list(found) == [ADAM, FIXED, AUTO]
    for name, configs in found.items():
        assert len({json.dumps(config, sort_keys=True) for config in configs}) == len(configs) == (2 if name == AUTO else 3)
        for config in configs:
            optimizer = make_optimizer(name, problem.build(0), config, 40)
            assert getattr(optimizer, "is_auto", False) == (name == AUTO)
            if name != ADAM:
                optimizer.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [ADAM, FIXED, AUTO])
@pytest.mark.parametrize("problem", QUICK, ids=lambda problem: problem.name)
def test_a_short_run_lowers_the_loss(problem: DerivativeProblem, name: str) -> None:
    config = CONTEST[problem.name][name][-1]
    counted: list[int] = []
    run = train(problem, name, config, 0, 40, lambda: counted.append(1))
    assert run.steps == [0, 5, 10, 15, 20, 25, 30, 35, 40] and len(counted) == 40
    assert len(run.losses) == len(run.errors) == len(run.seconds) == len(run.steps)
    assert run.final < 0.95 * run.losses[0]
    assert all(a < b for a, b in zip(run.seconds, run.seconds[1:], strict=False))


def test_a_run_that_diverges_ends_with_an_infinite_loss() -> None:
    run = train(PROBLEMS["poisson"], ADAM, {"lr": 1e200, "schedule": "constant"}, 0, 40, lambda: None)
    assert run.final == run.errors[-1] == math.inf and run.steps[-1] < 40


def test_damping_falls_exponentially_until_the_last_step() -> None:
    config: Config = {"lr": 1.0, "schedule": "cosine", "damping": 1.0, "damping_end": 1e-2}
    optimizer = make_optimizer(FIXED, poisson().build(0), config, 100)
    assert isinstance(optimizer, KFAC)
    damping = optimizer.engine.settings.damping
    assert callable(damping)
    assert [damping(step) for step in (0, 50, 100, 200)] == pytest.approx([1, 0.1, 1e-2, 1e-2])
    optimizer.close()


def test_schedules_start_with_a_warm_up() -> None:
    assert [factor(name, 50, 100) for name in ("constant", "cosine", "exponential")] == pytest.approx([1, 0.5, 1e-3**0.5])
    assert factor("constant", 0, 400) == pytest.approx(1 / 8) and factor("constant", 8, 400) == 1


# Its arithmetic.


def run_with(losses: list[float], optimizer: str = FIXED, seed: int = 0) -> DerivativeRun:
    count = range(len(losses))
    run = DerivativeRun("poisson", "v", optimizer, {"lr": 1.0}, seed, 100, 1)
    run.steps, run.losses = [10 * i for i in count], losses
    run.errors, run.seconds = [0.5] * len(losses), [0.2 * i for i in count]
    return run


def test_ratios_are_taken_of_all_of_adams_steps() -> None:
    adam = run_with([4.0, 0.5, 2.0, 1.0, 1.0], ADAM)
    assert derivatives.ratios(adam, run_with([4.0, 1.0, 0.1])) == pytest.approx((10 / 40, 0.2 / 0.8))
    assert derivatives.ratios(adam, run_with([4.0, 2.0, 1.5])) == (math.inf, math.inf)
    assert derivatives.ratios(adam, adam) == pytest.approx((10 / 40, 0.2 / 0.8)), "the first time counts"
    assert all(math.isnan(ratio) for ratio in derivatives.ratios(run_with([4.0, math.inf], ADAM), run_with([4.0])))


def test_the_table_tells_how_many_seeds_reach_the_goal() -> None:
    problem = PROBLEMS["poisson"]
    adam, kfac = (derivatives.Standing([run_with([3.0, 1.0], name)]) for name in (ADAM, FIXED))
    adam.finals = [run_with([4.0] * 10 + [1.0], ADAM, seed) for seed in range(3)]
    kfac.finals = [run_with(losses, FIXED, seed) for seed, losses in enumerate(([4.0, 2.0, 0.9], [4.0, 0.9], [4.0, 2.0, 1.1]))]
    text = derivatives.render(problem, {ADAM: adam, FIXED: kfac})
    assert "is reached with 2 of 3 seeds; median 0.200 of the steps, 0.200 of the seconds." in text
    rows = [line.split() for line in text.splitlines() if line.startswith("K-FAC  ")]
    assert rows[0] == ["K-FAC", "0", "0.9", "0.5", "20", "0.200", "0.4", "0.200", "20.0"]
    assert rows[2] == ["K-FAC", "2", "1.1", "0.5", "never", "never", "never", "never", "20.0"]


def test_kfac_has_a_fifth_of_adams_steps() -> None:
    for problem in derivatives.PROBLEMS:
        assert (horizon(problem, ADAM), horizon(problem, FIXED), horizon(problem, AUTO)) == (2000, 400, 400)


def test_the_program_continues_from_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.json"
    command = ["--quick", "--quiet", "--problem", "poisson", "--seeds", "1", "--log", str(path), "--output", "none"]
    assert derivatives.main(command) == 0
    first = capsys.readouterr().out
    assert first.startswith("poisson: ") and first.count("K-FAC, lr=auto") == 3
    assert len(DerivativeLog(path).runs) == 9

    def refuse(*arguments: object) -> DerivativeRun:
        raise AssertionError("a run that is in the log was made again")

    monkeypatch.setattr(derivatives, "train", refuse)
    assert derivatives.main(command) == 0
    assert capsys.readouterr().out == first


def test_the_program_refuses_a_file_that_is_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.json"
    path.write_text('{"format": 99, "runs": []}')
    with pytest.raises(SystemExit):
        derivatives.main(["--log", str(path), "--output", "none"])
    assert "is no log of these runs" in capsys.readouterr().err


def test_the_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    standing = derivatives.Standing([run_with([3.0, math.inf])])
    standing.finals = [run_with([3.0, 1.0]), run_with([3.0, math.inf])]
    path = tmp_path / "picture.png"
    derivatives.draw([(PROBLEMS["poisson"], {ADAM: standing, FIXED: standing})], path)
    assert path.read_bytes().startswith(b"\x89PNG")
