"""accumulate_fisher: what it takes, what it leaves alone, and what it counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.helpers import TokenModel, mlp, relative_error
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner, Likelihood

SETTINGS = {"damping": 1e-2, "kl_clip": None}


def _batch(n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, dtype=torch.float64), torch.randint(4, (n,))


def _factors(model: nn.Module, passes: list[Callable[[KFACPreconditioner], None]], **settings: object) -> dict:
    with KFACPreconditioner(model, **SETTINGS, **settings) as ours:
        for one in passes:
            one(ours)
        ours.engine.precondition(lambda _: 0.1)
        return ours.factors()


def _assert_same(one: dict, other: dict, tolerance: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert all(relative_error(a, b) <= tolerance for a, b in zip(one[name], other[name], strict=True))


@pytest.mark.parametrize("fisher", ["mc", "ggn"])
def test_no_gradient_is_touched_and_backward_leaves_no_statistics(fisher: str) -> None:
    """The labels have no part in it: factors are the same with others, and without a backward pass of the loss."""
    model, (x, y) = mlp(), _batch()
    results = []
    for labels, has_backward in ((y, True), (y.flip(0), True), (y, False)):
        model.zero_grad()
        with KFACPreconditioner(model, fisher=fisher, loss=nn.CrossEntropyLoss(), **SETTINGS) as ours:
            outputs = model(x)
            torch.manual_seed(3)
            ours.accumulate_fisher(outputs)
            assert all(p.grad is None for p in model.parameters())
            if has_backward:
                nn.functional.cross_entropy(outputs, labels).backward()
                expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), list(model.parameters()))
                assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
            ours.engine.precondition(lambda _: 0.1)
            results.append(ours.factors())
    _assert_same(results[0], results[1])
    _assert_same(results[0], results[2])


def test_several_ggn_passes_add_up_to_the_whole_batch() -> None:
    """Uneven micro-batches, and a loss scale."""
    model, (x, y) = mlp(), _batch()
    settings = {"fisher": "ggn", "loss": nn.CrossEntropyLoss()}
    whole = _factors(model, [lambda ours: ours.accumulate_fisher(model(x), y)], **settings)
    parts = [lambda ours, i=i, j=j: ours.accumulate_fisher(model(x[i:j]), y[i:j]) for i, j in ((0, 3), (3, 4), (4, 12))]
    _assert_same(whole, _factors(model, parts, **settings))
    _assert_same(whole, _factors(model, parts, loss_scale=1024.0, **settings))
    _assert_same(whole, _factors(model, parts, loss_scale=lambda: torch.tensor(64.0), **settings))


def test_a_sum_has_the_factors_of_a_mean() -> None:
    model, (x, y) = mlp(), _batch()
    mean, total = (
        _factors(model, [lambda ours: ours.accumulate_fisher(model(x), y)], fisher="ggn", loss=nn.CrossEntropyLoss(reduction=r))
        for r in ("mean", "sum")
    )
    _assert_same(mean, total)


def test_ignored_and_weighted_terms_count_as_in_the_loss() -> None:
    """G of the loss with ignored labels is that of the other examples; with whole class weights, of repeated ones."""
    model, (x, y) = mlp(), _batch()
    kept = torch.tensor([0, 1, 4, 5, 6, 11])
    ignored = torch.full_like(y, -100)
    ignored[kept] = y[kept]
    loss = nn.CrossEntropyLoss()
    some = _factors(model, [lambda ours: ours.accumulate_fisher(model(x), ignored)], fisher="ggn", loss=loss)
    alone = _factors(model, [lambda ours: ours.accumulate_fisher(model(x[kept]), y[kept])], fisher="ggn", loss=loss)
    for name in some:
        assert relative_error(some[name][1], alone[name][1]) <= 1e-12
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0]).double()
    repeats = weights.long()[y]
    repeated = x.repeat_interleave(repeats, 0), y.repeat_interleave(repeats, 0)
    weighted = nn.CrossEntropyLoss(weight=weights)
    some = _factors(model, [lambda ours: ours.accumulate_fisher(model(x), y)], fisher="ggn", loss=weighted)
    alone = _factors(model, [lambda ours: ours.accumulate_fisher(model(repeated[0]), repeated[1])], fisher="ggn", loss=loss)
    for name in some:
        assert relative_error(some[name][1], alone[name][1]) <= 1e-12


def test_a_batch_that_is_ignored_altogether_changes_nothing() -> None:
    model, (x, y) = mlp(), _batch()
    with KFACPreconditioner(model, fisher="ggn", loss=nn.CrossEntropyLoss(), **SETTINGS) as ours:
        ours.accumulate_fisher(model(x), y)
        ours.engine.precondition(lambda _: 0.1)
        before = ours.factors()
        ours.accumulate_fisher(model(x), torch.full_like(y, -100))
        ours.engine.precondition(lambda _: 0.1)
        _assert_same(before, ours.factors(), 0.0)


def test_tokens_that_mix_are_right_in_expectation() -> None:
    """One backward pass sends a column of every token: random signs keep their products apart."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            return self.head(x + x.mean(1, keepdim=True)).movedim(-1, 1)

    model, x = Mixing().double(), torch.randn(5, 4, 3, dtype=torch.float64)
    settings = {"loss": nn.CrossEntropyLoss(), "loss_terms": "tokens", **SETTINGS}
    with KFACPreconditioner(model, fisher="ggn", ema_decay=1 - 1e-9, **settings) as ours:
        for _ in range(800):
            ours.accumulate_fisher(model(x))
            ours.engine.precondition(lambda _: 0.1)
        g = ours.factors()["first"][1]
    # By brute force: a backward pass a token and class.
    truth = torch.zeros_like(g)
    hidden = model.first(x).detach().requires_grad_()
    z = torch.tanh(hidden)
    logits = model.head(z + z.mean(1, keepdim=True))
    p = logits.detach().softmax(-1)
    for token in range(4):
        for c in range(3):
            column = torch.zeros_like(logits)
            column[:, token] = -p[:, token] * p[:, token, c : c + 1].sqrt()
            column[:, token, c] += p[:, token, c].sqrt()
            (gradient,) = torch.autograd.grad(logits, hidden, column, retain_graph=True)
            truth += torch.einsum("nti,ntj->ij", gradient, gradient) / 20
    assert relative_error(g, truth) <= 0.05
    with KFACPreconditioner(model, fisher="ggn", **settings) as ours:  # tokens of the head do not mix: exact at once
        ours.accumulate_fisher(model(x))
        ours.engine.precondition(lambda _: 0.1)
        head = ours.factors()["head"][1]
    expected = (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)).mean((0, 1))
    torch.testing.assert_close(head, expected)


@pytest.mark.parametrize("fisher", ["mc", "ggn"])
def test_compiled_models(fisher: str) -> None:
    """One graph; statistics of the Fisher pass alone, as in eager mode."""
    model, (x, y) = mlp(torch.float32), _batch()
    x = x.float()
    results = []
    for compile_it in (False, True):
        torch.compiler.reset()
        with KFACPreconditioner(model, fisher=fisher, loss=nn.CrossEntropyLoss(), **SETTINGS) as ours:
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
            for _ in range(2):
                model.zero_grad()
                outputs = run(x)
                torch.manual_seed(5)
                ours.accumulate_fisher(outputs, y)
                assert all(p.grad is None for p in model.parameters())
                nn.functional.cross_entropy(outputs, y).backward()
                ours.precondition_()
            results.append((ours.factors(), [p.grad.clone() for p in model.parameters()]))
    _assert_same(results[0][0], results[1][0], 1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert relative_error(one, other) <= 1e-4


@pytest.mark.parametrize("fisher", ["mc", "ggn"])
def test_kernels_take_it_too(fisher: str) -> None:
    """On the path where small passes wait for the step."""
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(2)
        model, x = TokenModel(), torch.randn(4, 3, 5)
        with KFACPreconditioner(model, backend=backend, fisher=fisher, loss=nn.CrossEntropyLoss(), **SETTINGS) as ours:
            for _ in range(2):
                model.zero_grad()
                outputs, y = model(x), torch.tensor([0, 1, 2, 3])
                ours.accumulate_fisher(outputs, y)
                nn.functional.cross_entropy(outputs, y).backward()
                ours.precondition_()
            results.append((ours.factors(), [p.grad for p in model.parameters()]))
    _assert_same(results[0][0], results[1][0], 1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert relative_error(one, other) <= 1e-3


def test_what_was_summed_in_an_earlier_step_does_not_come_back() -> None:
    """A large batch is summed, the next small one waits, with loss terms that the device counts."""
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        with KFACPreconditioner(model, backend=backend, fisher="mc", loss=nn.CrossEntropyLoss(), **SETTINGS) as ours:
            for rows in (400, 4):
                outputs = model(torch.randn(rows, 8))  # the user's batch: the first layer is summed in any case
                ours.accumulate_fisher(outputs, torch.randint(8, (rows,)))
                if backend == "triton":
                    assert [bool(s.deferred) for s in ours.engine.statistics] == [False, rows == 4]
                ours.engine.precondition(lambda _: 0.1)
            results.append(ours.factors())
    _assert_same(results[0], results[1], 1e-5)


def test_a_step_that_takes_no_statistics_takes_no_pass() -> None:
    model, (x, y) = mlp(), _batch()
    ours = KFACPreconditioner(model, fisher="ggn", loss=nn.CrossEntropyLoss(), statistics_every=2, **SETTINGS)
    for step in range(4):
        outputs = model(x)
        ours.accumulate_fisher(outputs, y)
        assert all((s.counts[1] > 0) == (step % 2 == 0) for s in ours.engine.statistics)
        outputs.sum().backward()
        ours.precondition_()
    assert (ours.engine.bank.updates == 2).all()


def test_a_likelihood_of_the_users_own() -> None:
    """Poisson counts with log rates: H = exp(f)."""

    class Poisson(Likelihood):
        def columns(self, outputs: Tensor, targets: Tensor | None = None):
            for d in range(outputs.shape[-1]):
                column = torch.zeros_like(outputs)
                column[..., d] = (outputs[..., d] / 2).exp()
                yield column

    model, (x, _) = mlp(), _batch()
    outputs = model(x)
    factors = _factors(model, [lambda ours: ours.accumulate_fisher(model(x))], fisher="ggn", loss=Poisson())
    expected = torch.diag(outputs.detach().exp().mean(0))
    torch.testing.assert_close(factors["4"][1], expected)


# Bad input


def test_a_fisher_of_the_models_own_needs_the_loss() -> None:
    for fisher in ("mc", "ggn"):
        with pytest.raises(
            ValueError, match=rf"fisher is '{fisher}', which needs .* \(logits\).*pass loss=nn.CrossEntropyLoss"
        ):
            KFAC(mlp(), fisher=fisher)
    with pytest.raises(TypeError, match=r"loss must be .*nn.CrossEntropyLoss.* but is .*L1Loss"):
        KFAC(mlp(), fisher="mc", loss=nn.L1Loss())
    with pytest.raises(ValueError, match="fisher must be one of empirical, mc, ggn, but is 'exact'"):
        KFAC(mlp(), fisher="exact")


def test_outputs_that_cannot_be_read_are_refused_before_anything_changes() -> None:
    model, (x, y) = mlp(), _batch()
    ours = KFACPreconditioner(model, fisher="ggn", loss=nn.CrossEntropyLoss(), **SETTINGS)
    with pytest.raises(TypeError, match=r"outputs must be the tensor.* is dict; for a Hugging Face model pass its \.logits"):
        ours.accumulate_fisher({"logits": model(x)}, y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"targets .*class indices of shape \(12,\).*\(3,\)"):
        ours.accumulate_fisher(model(x), y[:3])
    with torch.no_grad():
        outputs = model(x)
    with pytest.raises(RuntimeError, match="outputs have no graph"):
        ours.accumulate_fisher(outputs, y)
    assert all(s.counts.tolist() == [0, 0] for s in ours.engine.statistics)
    with pytest.raises(RuntimeError, match="needs the loss, but loss is None"):
        KFACPreconditioner(model).accumulate_fisher(model(x), y)
    ours.close()
    with pytest.raises(RuntimeError, match="is closed"):
        ours.accumulate_fisher(model(x), y)


def test_a_loop_without_the_extra_line_is_told() -> None:
    model, (x, y) = mlp(), _batch()
    ours = KFACPreconditioner(model, fisher="mc", loss=nn.CrossEntropyLoss(), **SETTINGS)
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match=r"fisher is 'mc': call accumulate_fisher\(outputs, targets\)"):
        ours.precondition_()
