"""The kernels of orthogonal iteration, interpreted, against the reference: stacks of several sizes, aligned and not."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import emulated_tf32
from support.bases import F64, KINDS, Bases, example, orthonormality, random_basis, step, symmetric, turned
from support.launches import counted_launches
from torch import Tensor

from kfac_triton.kernels import ops, precision, runtime, tuning
from kfac_triton.kernels.factored_newton import launch as newton
from kfac_triton.kernels.factored_newton.tables import programs
from kfac_triton.kernels.orthogonal_iteration import tables
from kfac_triton.kernels.tiles import count, padded

# The interpreter computes with numpy, which remarks on numbers that overflow; a GPU does not.
pytestmark = [
    pytest.mark.usefixtures("scratch_is_nan"),
    pytest.mark.filterwarnings("ignore:overflow|invalid value|divide by zero|All-NaN:RuntimeWarning"),
]
MOST = 1e-4


def stack(kinds: str, n: int) -> Bases:
    """One matrix for each kind, separated by commas."""
    pairs = [example(kind.strip(), 1, n) for kind in kinds.split(",")]
    return Bases(torch.cat([x for x, _ in pairs]).float(), torch.cat([x for _, x in pairs]).float())


def mixed() -> list[Bases]:
    """Aligned and odd sizes, unequal batches. Each has the configuration that it would have alone."""
    return [stack("turned, zero", 48), stack("repeated", 64), stack("converged", 34)]


def wider() -> list[Bases]:
    return [stack("turned", 80), stack("repeated", 70)]


def assert_like(after: list[Bases], expected: list[Bases], tolerance: float = 3e-4) -> None:
    for one, other in zip(after, expected, strict=True):
        assert torch.equal(one.refused, other.refused)
        accepted = ~one.refused
        assert orthonormality(one.basis[accepted]).max(0).values < MOST if accepted.any() else True
        torch.testing.assert_close(one.residual.double(), orthonormality(one.basis), rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(one.basis, other.basis, rtol=0, atol=tolerance)


@pytest.mark.parametrize("stacks", [mixed, wider])
def test_they_are_the_reference(stacks: Callable[[], list[Bases]]) -> None:
    stacks = stacks()
    assert_like(step(stacks, "triton"), step(stacks))


@pytest.mark.parametrize("options", [{"max_steps": 1}, {"max_steps": 3, "rescue_shift": 100.0}])
def test_they_are_the_reference_where_some_attempts_fail(options: dict[str, float]) -> None:
    """Accepted at once, by the second attempt, and refused."""
    stacks = [stack("turned, converged", 48), stack("thin, converged", 35)]
    expected = step(stacks, **options)
    refused = torch.cat([x.refused for x in expected])
    assert not refused.all()
    assert_like(step(stacks, "triton", **options), expected)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_what_is_not_finite_harms_no_other(bad: float) -> None:
    stacks = [stack("converged, turned, zero, turned", 48), stack("converged", 34)]
    clean = step(stacks[:1], "triton", max_steps=3) + step(stacks[1:], "triton", max_steps=3)
    stacks[0].factor[1, 3, 9] = bad
    stacks[0].basis[3, 0, 5] = bad
    after = step(stacks, "triton", max_steps=3)
    assert after[0].refused.tolist() == [False, False, False, True]
    torch.testing.assert_close(after[0].basis[1:], stacks[0].basis[1:], rtol=0, atol=0, equal_nan=True)
    assert after[0].residual[3] == torch.inf
    assert after[0].residual[:3].max() < MOST
    assert torch.equal(after[0].basis[0], clean[0].basis[0])
    assert torch.equal(after[1].basis, clean[1].basis)


def test_what_is_refused_keeps_its_basis_and_its_residual_is_measured() -> None:
    before = stack("turned", 38)
    before.basis[:, :, 3] = before.basis[:, :, 5]
    (after,) = step([before], "triton", max_steps=5)
    assert after.refused.all()
    assert torch.equal(after.basis, before.basis)
    torch.testing.assert_close(after.residual.double(), orthonormality(before.basis), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(("n", "side"), [(9, 16), (40, 48), (66, 80)])
def test_padding_stays_exact(n: int, side: int) -> None:
    inner = Bases(*example("turned", 2, n))
    factor, basis = torch.zeros(2, side, side), torch.eye(side).repeat(2, 1, 1)
    factor[:, :n, :n], basis[:, :n, :n] = inner.factor, inner.basis
    (result,) = step([Bases(factor, basis)], "triton", max_steps=6)
    after = result.basis
    assert not result.refused.any()
    assert torch.equal(after[:, n:, n:], torch.eye(side - n).expand(2, -1, -1))
    assert not after[:, :n, n:].any()
    assert not after[:, n:, :n].any()
    assert not torch.equal(after, basis)


def same(first: Bases, second: Bases) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(first).values(), vars(second).values(), strict=True))


def test_a_call_for_all_is_a_call_for_each() -> None:
    """To the last bit, whatever the others need; and in any order."""
    stacks = mixed()
    together = step(stacks, "triton")
    assert all(same(one, *step([x], "triton")) for one, x in zip(together, stacks, strict=True))
    assert all(map(same, together, step(stacks[::-1], "triton")[::-1]))


def test_parts_of_wider_stacks() -> None:
    """Neither what lies around nor the matrices between are read or written."""
    before = stack("turned, converged", 34)
    (expected,) = step([before], "triton")
    wide_factor, wide_basis = torch.full((4, 40, 40), torch.nan), torch.full((3, 40, 43), torch.nan)
    wide_factor[::2, :34, :34], wide_basis[1:, :34, :34] = before.factor, before.basis
    part = Bases(wide_factor[::2, :34, :34], wide_basis[1:, :34, :34])
    ops.orthogonal_iteration([part.factor], [part.basis], [part.residual], [part.refused], backend="triton")
    assert same(part, expected)
    wide_basis[1:, :34, :34] = torch.nan
    assert wide_basis.isnan().all()


@pytest.mark.parametrize("sizes", [(48,), (48, 32, 64, 80, 1104)])
@pytest.mark.parametrize("max_steps", [1, 9])
def test_launches_depend_on_the_steps_alone(sizes: tuple[int, ...], max_steps: int) -> None:
    """Not on how many stacks there are, nor on their sizes."""
    stacks = [Bases(torch.zeros(2, n, n), torch.zeros(2, n, n)) for n in sizes]
    with counted_launches() as counts:
        step(stacks, "triton", max_steps=max_steps)
    roots = 4
    newton_steps = dict.fromkeys(("factor_kernel", "energy_kernel", "plan_kernel", "update_kernel"), roots * max_steps)
    once = {"start_kernel": 1, "commit_kernel": 1, "prepare_kernel": 1 + roots}
    products = {"turn_kernel": 2, "gram_kernel": 13, "apply_kernel": 4, "judge_kernel": 8, "correct_kernel": 6}
    assert counts == once | products | newton_steps | {"grow_kernel": 6 * roots, "conclude_kernel": roots}
    assert max_steps != 9 or sum(counts.values()) == 212


def test_empty_stacks_are_left_out() -> None:
    full, empty = stack("turned", 16), Bases(torch.zeros(0, 20, 20), torch.zeros(0, 20, 20))
    assert same(step([empty, full, empty], "triton")[1], *step([full], "triton"))
    with counted_launches() as counts:
        step([empty, empty], "triton")
        step([], "triton")
    assert not counts


def test_newton_leaves_matrices_alone_that_are_not_active() -> None:
    """The root bit for bit, and no other number than its residual is written; the active ones are as without flags."""
    factor = stack("turned, turned, turned", 80).factor + torch.eye(80)
    roots, residuals = torch.eye(80).repeat(3, 1, 1), torch.zeros(3)
    roots[1] = torch.nan
    alone, bound = torch.eye(80).repeat(2, 1, 1), torch.zeros(2)
    newton.launch([factor[::2]], [torch.zeros(2)], [alone], [bound], 0.05, 5)
    newton.launch([factor], [torch.zeros(3)], [roots], [residuals], 0.05, 5, active=[torch.tensor([1.0, 0.0, 1.0])])
    assert roots[1].isnan().all()
    assert residuals[1] == torch.inf
    assert torch.equal(roots[::2], alone)
    assert torch.equal(residuals[::2], bound)


def test_every_tile_of_a_whole_matrix_has_one_program_and_the_longest_come_first() -> None:
    rows = programs(((2, 100), (3, 33)), 16, "square", torch.device("cpu")).tolist()
    wanted = {(s, m, i, j) for s, (b, t) in enumerate(((2, 7), (3, 3))) for m in range(b) for i in range(t) for j in range(t)}
    assert len(rows) == len(wanted)
    assert set(map(tuple, rows)) == wanted
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)


def test_parts_of_the_scratch_memory_do_not_overlap() -> None:
    shapes = ((2, 100), (3, 33))
    layout = tables.layout(shapes, 16)
    starts = [start for places in layout.places for start in places]
    assert starts[0] >= tables.NUMBERS * 5
    assert all(start % 16 == 0 for start in starts)
    sizes = [b * size for b, n in shapes for size in (*[n * padded(n)] * 7, 2 * count(n, 16) ** 2)]
    assert all(b - a >= size for a, b, size in zip(starts, [*starts[1:], layout.size], sizes, strict=True))
    parts = tables.matrices(torch.arange(float(layout.size)), shapes, 16, tables.ROOT)
    assert [float(x[0, 0, 0]) for x in parts] == [places[6] for places in layout.places]
    assert [x.shape for x in parts] == [(2, 100, 100), (3, 33, 33)]


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of the interpreter round as TF32 tensor cores do, in as many passes as the kernel asks for."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton brings the interpreter")

    def create_dot(self: Any, a: Any, b: Any, d: Any, mode: Any, imprecise: Any) -> Any:
        left, right = torch.from_numpy(a.data.copy()), torch.from_numpy(b.data.copy())
        assert "TF32" in str(mode)
        product = (emulated_tf32.three_passes if "x3" in str(mode) else emulated_tf32.one_pass)(left, right)
        return interpreter.TensorHandle(product.numpy() + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    target = runtime.Target("cuda", "sm_90", 4)
    modes = {purpose: precision.resolve(purpose, target) for purpose in precision.PURPOSES}
    monkeypatch.setattr(precision, "resolve", lambda purpose, target: modes[purpose])
    yield


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_cores_lose_nothing(kind: str, tensor_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthonormal within the same bound, and the emulation in PyTorch is what the kernels do."""
    before = Bases(*(x.float() for x in example(kind, 1, 48)))
    (after,) = step([before], "triton")
    emulated_tf32.use(monkeypatch)
    (expected,) = step([before])
    assert torch.equal(after.refused, expected.refused)
    assert orthonormality(after.basis).max() < MOST
    assert (after.residual - orthonormality(after.basis)).abs().max() < 5e-6
    torch.testing.assert_close(after.basis, expected.basis, rtol=0, atol=1e-3)


def test_one_pass_alone_would_not_do(tensor_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main products need three: the test above is not blind."""
    basis = random_basis(1, 48)
    factor = symmetric(torch.logspace(0, -3, 48, dtype=F64)[None], turned(basis, 0.1))
    monkeypatch.setattr(precision, "resolve", lambda purpose, target: "tf32")
    (after,) = step([Bases(factor.float(), basis.float())], "triton")
    assert after.refused.all() or orthonormality(after.basis).max() > MOST


def test_tuning_has_tiles_for_every_shipped_architecture() -> None:
    for file in tuning.SHIPPED.glob("*.json"):
        assert all(entry["BLOCK"] >= 16 for entry in tuning.load(file)["orthogonal_iteration"])


def test_a_step_is_a_function_of_its_inputs() -> None:
    before: list[Bases] = [stack("turned", 40)]
    first, second = step(before, "triton"), step(before, "triton")
    assert same(*first, *second)
    kept: Tensor = before[0].basis
    assert not torch.equal(kept, first[0].basis)
