"""Hard matrices at random through every inverse: what each method made of them, and that nothing wrong was certified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from support.hard_matrices import KINDS, HardStack, drifted, hard_stack, uniform
from torch import Generator, Tensor

from kfac_triton.curvature import factorizations, triangular
from kfac_triton.curvature.eigenbasis import EigenStack
from kfac_triton.curvature.inverse import ACCEPT, InverseStack
from kfac_triton.settings import METHODS

NAMED_METHODS = [method for method in METHODS if method != "auto"]
STACKS = [*NAMED_METHODS, "eigenbasis"]
FLOOR = 2e-6  # below it a certificate says no more than that float32 was used
LARGEST = 1.2 * ACCEPT  # error of anything certified; from 1 on it would be wrong
# Error over certificate: the rounding that a certificate is itself subject to is estimated, not bounded.
MARGIN = {"newton_schulz": 2.0, "factored": 1.0, "cholesky": 1.001, "eigh": 1.001, "eigenbasis": 1.2}


def energy_errors(target: np.ndarray, values: np.ndarray, factored: bool) -> Tensor:
    """||I - B^1/2 X B^1/2||_2 of each matrix, (B,); infinite where B or X is not positive definite.

    Args:
        target: B, (B, n, n), in more digits than X was made with.
        values: X, or T with X = T^T T.
        factored: which of the two.
    """
    with np.errstate(all="ignore"):
        root = values.transpose(0, 2, 1) if factored else _lower_factor(target)
        energy = root.transpose(0, 2, 1) @ (target if factored else values) @ root
        energy = torch.from_numpy(((energy + energy.transpose(0, 2, 1)) / 2).astype(np.float64))
    finite = torch.isfinite(energy).flatten(1).all(1)
    distance = torch.eye(energy.shape[-1], dtype=torch.float64) - torch.where(finite[:, None, None], energy, 0.0)
    return torch.where(finite, torch.linalg.eigvalsh(distance).abs().amax(-1), torch.inf)


def _lower_factor(target: np.ndarray) -> np.ndarray:
    """Cholesky, column by column, in any precision; not finite where there is none."""
    lower = np.zeros_like(target)
    for j in range(target.shape[-1]):
        column = target[:, j:, j] - (lower[:, j:, :j] @ lower[:, j, :j, None])[..., 0]
        lower[:, j:, j] = column / np.sqrt(column[:, :1])
    return lower


@dataclass
class Results:
    """What became of many matrices.

    Attributes:
        counts: of outcomes, by kind.
        margin: the largest error that was certified, over its certificate.
        error: the largest error that was certified.
    """

    counts: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in [*KINDS, "mixture"]})
    margin: float = 0.0
    error: float = 0.0


class Subject:
    """One stack under test, with what its values are inverses of: the newest factors, or older ones where it kept those."""

    def __init__(self, name: str, factors: Tensor, waits: bool) -> None:
        self.name, self.waits = name, waits
        sizes = [factors.shape[-1]] * len(factors)
        self.stack: InverseStack | EigenStack = (
            EigenStack(factors, sizes) if name == "eigenbasis" else InverseStack(factors, name, 0.05, "torch", wait=waits)
        )
        self.inverted, self.asked = torch.zeros_like(factors), torch.zeros(len(factors), dtype=factors.dtype)
        self._late = torch.zeros(len(factors), dtype=torch.bool)
        self._is_cold = True

    def refresh(self, case: HardStack) -> list[str]:
        """Refreshes, and says of each matrix how it went."""
        stack = self.stack
        before = self._state()
        fallbacks, raised = stack.fallbacks.clone(), stack.raised.clone()
        stack.refresh(case.factors, case.damping)
        refused, grew = stack.fallbacks > fallbacks, stack.raised > raised
        kept, nobody_waited = torch.zeros_like(refused), not (self.waits or self._is_cold)
        same = (self._state() == before).all(1)
        if self.name == "eigenbasis":
            kept = refused & same
        elif nobody_waited:
            kept = refused & ~self._late
        assert same[kept].all(), "what is not certified keeps its last inverse"
        self.inverted = torch.where(kept[:, None, None], self.inverted, case.factors)
        self.asked = torch.where(kept, self.asked, case.damping)
        flags = {"kept": kept, "raised": grew, "fell back": refused | self._late}
        self._late, self._is_cold = refused & nobody_waited, False
        return [
            next((name for name, flag in flags.items() if flag[i]), "converged") if stack.residual[i] <= ACCEPT else "refused"
            for i in range(len(refused))
        ]

    def _state(self) -> Tensor:
        """All that the stack holds of each matrix, as rows."""
        stack = self.stack
        parts = [stack.values.flatten(1), stack.residual[:, None], stack.damping[:, None]]
        return torch.cat([*parts, stack.eigenvalues] if isinstance(stack, EigenStack) else parts, 1)

    def errors(self) -> Tensor:
        """True errors of what the stack holds, (B,)."""
        stack, exact = self.stack, np.float64 if self.inverted.dtype == torch.float32 else np.longdouble
        target, damping, asked, values = (
            x.numpy().astype(exact) for x in (self.inverted, stack.damping, self.asked, stack.values)
        )
        places = range(target.shape[-1])
        target[:, places, places] += damping[:, None]
        if isinstance(stack, InverseStack):
            return energy_errors(target, values, stack.factored)
        with np.errstate(all="ignore"):
            root = values.transpose(0, 2, 1) / np.sqrt(stack.eigenvalues.numpy().astype(exact) + asked[:, None])[..., None]
        return energy_errors(target, root, factored=True)


def judge(subject: Subject, case: HardStack, results: Results) -> None:
    """Refreshes one stack, counts, and compares what is certified with the truth."""
    outcomes = subject.refresh(case)
    kinds = list(results.counts)
    certified, errors = subject.stack.residual <= ACCEPT, subject.errors()
    for kind, outcome, error in zip(case.kinds.tolist(), outcomes, errors.tolist(), strict=True):
        results.counts[kinds[kind]][outcome] += 1
        if outcome != "refused" and error > 1:
            results.counts[kinds[kind]]["wrong"] += 1
    values = subject.stack.values
    assert torch.isfinite(values).all()
    assert (values[subject.stack.residual == torch.inf] == 0).all()
    if isinstance(subject.stack, InverseStack):
        assert torch.equal(values, values.tril() if subject.stack.factored else values.mT)
    if bool(certified.any()):
        margins = errors / subject.stack.residual.double().clamp_min(FLOOR)
        results.margin = max(results.margin, float(margins[certified].max()))
        results.error = max(results.error, float(errors[certified].max()))


def fuzz(name: str, count: int, seed: int) -> Results:
    """So many matrices, cold, then two refreshes later; every other stack does not wait for its certificates."""
    random, results, done, waits = Generator().manual_seed(seed), Results(), 0, False
    while done < count:
        n = int(2 ** (7.1 * float(torch.rand(1, generator=random)) ** 2))  # 1 to 137, mostly small
        dtype = torch.float64 if n <= 12 and float(torch.rand(1, generator=random)) < 0.1 else torch.float32
        case = hard_stack(random, min(count - done, 400 if n <= 24 else 40), n, dtype)
        done, waits = done + len(case.factors), not waits
        subject = Subject(name, case.factors, waits)
        for _ in range(3):
            judge(subject, case, results)
            case = drifted(random, case)
    return results


def report(results: dict[str, Results]) -> str:
    columns = ["converged", "fell back", "raised", "kept", "refused", "wrong"]
    lines = [f"{'kind':20}" + "".join(f"{column:>11}" for column in columns)]
    for name, result in results.items():
        lines.append(f"{name}: largest error {result.error:.2g}, largest error over certificate {result.margin:.2g}")
        rows = {**result.counts, "all": sum(result.counts.values(), Counter())}
        lines += [f"  {kind:18}" + "".join(f"{row[column]:11,}" for column in columns) for kind, row in rows.items()]
    return "\n".join(lines)


@pytest.mark.parametrize("name", STACKS)
def test_hard_matrices(name: str) -> None:
    results = fuzz(name, 800, seed=0)
    totals = sum(results.counts.values(), Counter())
    assert results.error <= LARGEST
    assert results.margin <= MARGIN[name]
    assert all(totals[outcome] > 0 for outcome in ("converged", "fell back", "raised", "kept", "refused"))


@pytest.mark.parametrize("name", NAMED_METHODS)
def test_hard_matrices_in_batches_as_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solved against the identity by the library, in pieces that are smaller than the stacks."""
    for module in (triangular, factorizations):
        monkeypatch.setattr(module, "prefers_batches", lambda device: True)
    monkeypatch.setattr(factorizations, "_PIECE_IN_BATCHES", 2**14)
    results = fuzz(name, 800, seed=2)
    totals = sum(results.counts.values(), Counter())
    assert results.error <= LARGEST
    assert results.margin <= MARGIN[name]
    assert all(totals[outcome] > 0 for outcome in ("converged", "fell back", "raised", "kept", "refused"))


@pytest.mark.slow
def test_a_hundred_thousand_hard_matrices(show: Callable[..., None]) -> None:
    results = {name: fuzz(name, 100_000, seed=1) for name in STACKS}
    show(f"\n{report(results)}")
    for name, result in results.items():
        assert result.error <= LARGEST
        assert result.margin <= MARGIN[name]


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("waits", [True, False])
def test_bad_neighbours_change_nothing(name: str, waits: bool) -> None:
    """What a matrix gets does not depend on whether those beside it are finite."""
    random = Generator().manual_seed(0)
    for n in (1, 5, 16, 40):
        case = hard_stack(random, 100, n)
        cases = [case, drifted(random, case)]
        spoiled = torch.rand(100, generator=random) < 0.2
        subjects = [Subject(name, case.factors, waits) for _ in range(2)]
        for stage in cases:
            good = HardStack(stage.kinds, torch.where(torch.isfinite(stage.factors), stage.factors, 1.0), stage.damping)
            factors = good.factors.clone()
            factors[spoiled, 0, -1] = factors[spoiled, -1, 0] = torch.nan
            for subject, one in zip(subjects, (good, HardStack(stage.kinds, factors, stage.damping)), strict=True):
                subject.refresh(one)
            for field_name in ("values", "residual", "damping"):
                alone, beside = (getattr(subject.stack, field_name)[~spoiled] for subject in subjects)
                assert torch.equal(alone, beside), f"{field_name} of {n} rows"


# What the fuzz found, one by one


def _inverted(name: str, factors: Tensor, damping: Tensor) -> tuple[Subject, list[str]]:
    subject = Subject(name, factors, waits=True)
    kinds = torch.zeros(len(factors), dtype=torch.long)
    return subject, subject.refresh(HardStack(kinds, factors, damping.to(factors)))


@pytest.mark.parametrize("name", ["cholesky", "eigh"])
def test_certificates_hold_where_float32_ends(name: str) -> None:
    """Small, graded and blocked matrices at condition numbers that are just still certified."""
    random, worst = Generator().manual_seed(0), 0.0
    for n in (2, 3, 4, 6, 8, 16):
        case = hard_stack(random, 4000, n, kinds=("rank-deficient", "few examples", "blocks", "graded", "clustered"))
        mean = case.factors.diagonal(dim1=-2, dim2=-1).double().mean(-1)
        subject, _ = _inverted(name, case.factors, mean * 10 ** uniform(random, -8.5, -4.5, len(mean)))
        certified = (subject.stack.residual <= ACCEPT) & (subject.stack.residual > 0.01)
        worst = max(worst, float((subject.errors() / subject.stack.residual)[certified].max()))
    assert worst <= MARGIN[name]


@pytest.mark.parametrize("name", STACKS)
def test_damping_beyond_the_largest_number_is_no_damping(name: str) -> None:
    """It would be told as infinite, and the inverse would be zero or below the normal numbers."""
    factors = torch.zeros(2, 5, 5)
    factors[0, 1, 3] = factors[0, 3, 1] = 7e37
    factors[1] = torch.eye(5)
    subject, outcomes = _inverted(name, factors, torch.tensor([5e-2, 5e-2]))  # 5e37 would be too little
    assert outcomes == ["refused", "converged"]
    assert torch.isfinite(subject.stack.damping).all()


@pytest.mark.parametrize("name", STACKS)
def test_the_damping_that_is_told_is_the_one_that_was_used(name: str) -> None:
    """It leaves 1e-6 of an eigenvalue: to round it to float32 afterwards would change the inverse by some percent."""
    damping = torch.tensor([0.1])
    raised = 10 * damping  # in float32
    factors = -(raised.double() * (1 - 1e-6)).float()[:, None, None].expand(1, 1, 1)
    factors = torch.block_diag(factors[0], torch.eye(2))[None]
    subject, outcomes = _inverted(name, factors, damping)
    assert outcomes == ["raised"]
    assert float(subject.errors()[0]) <= 1.01 * float(subject.stack.residual[0]) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STACKS)
def test_damping_rises_from_nothing(name: str, dtype: torch.dtype) -> None:
    """From zero, which what is split between two factors may be rounded to, and from the smallest numbers of each type."""
    limits = torch.finfo(dtype)
    factors = torch.diag(torch.tensor([1.0, 1.0, -1.0, 0.0], dtype=dtype)).repeat(3, 1, 1)
    damping = torch.tensor([0.0, limits.tiny * limits.eps, limits.tiny], dtype=dtype)
    subject, outcomes = _inverted(name, factors, damping)
    assert outcomes == ["raised"] * 3
    assert ((subject.stack.damping > 1) & (subject.stack.damping <= 100)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", STACKS)
def test_what_is_not_finite_is_refused_at_once(name: str, bad: float) -> None:
    """No damping helps it, and none is raised; its neighbour is served by the method itself."""
    factors = torch.eye(4).repeat(2, 1, 1)
    factors[0, 1, 2] = factors[0, 2, 1] = bad
    subject, outcomes = _inverted(name, factors, torch.tensor([0.1, 0.1]))
    assert outcomes == ["refused", "converged"]
    assert subject.stack.raised.tolist() == [0, 0]


@pytest.mark.parametrize("name", NAMED_METHODS)
def test_a_negative_number_is_not_certified(name: str) -> None:
    """A warm refresh scales M to 1, whatever its sign is, but of a negative scale there is no root."""
    subject, _ = _inverted(name, torch.ones(1, 1, 1), torch.tensor([0.1]))
    factors = -torch.ones(1, 1, 1)
    assert subject.refresh(HardStack(torch.zeros(1).long(), factors, torch.tensor([0.1]))) == ["raised"]
    assert torch.isfinite(subject.stack.values).all()
    assert float(subject.errors()[0]) <= ACCEPT


def test_an_eigenbasis_of_an_indefinite_matrix_is_certified_with_more_damping() -> None:
    """Its negative eigenvalues count as zero, which damping has to make true; the spectrum is what the inverse is made of."""
    factors = torch.diag(torch.tensor([1.0, -0.5, 0.0]))[None]
    subject, outcomes = _inverted("eigenbasis", factors, torch.tensor([0.1]))
    assert outcomes == ["raised"]
    assert subject.stack.damping.tolist() == pytest.approx([10.0])
    torch.testing.assert_close(subject.stack.eigenvalues[0].sort()[0], torch.tensor([9.9, 9.9, 10.9]))
