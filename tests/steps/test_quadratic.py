"""J d by forward mode against torch.func and finite differences; the quadratic model against a dense GGN."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import batch_for_mlp, mlp, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_triton.fisher.distributions import Categorical, Gaussian
from kfac_triton.steps.forward_mode import jacobian_products, outputs_and_targets, require_agreement
from kfac_triton.steps.quadratic import QuadraticModel


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).movedim(2, 0).transpose(2, 3)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.layer(y.transpose(1, 2).flatten(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(x))))


class Rebinding(nn.Module):
    """Binds a new tensor to its buffer in each pass, one that depends on the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("constant", torch.ones(1, dtype=torch.float64).expand(3))  # not to be written to

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
        return y * self.constant


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def images() -> Tensor:
    return torch.randn(4, 2, 6, 6, dtype=torch.float64)


def conv_batch_norm() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: batch_for_mlp()[0]),
    "conv, batch norm": (conv_batch_norm, images),
    "conv, batch norm in eval mode": (lambda: conv_batch_norm().eval(), images),
    "attention": (Attention, lambda: torch.randn(2, 5, 6, dtype=torch.float64)),
    "attention in eval mode": (lambda: Attention().eval(), lambda: torch.randn(2, 5, 6, dtype=torch.float64)),
    "tied embedding": (Tied, lambda: torch.randint(7, (3, 4))),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Linear(40, 3)), lambda: batch_for_mlp()[0]),
    "rebound buffer": (Rebinding, lambda: batch_for_mlp()[0]),
    "lstm": (Recurrent, lambda: torch.randn(4, 2, 5, dtype=torch.float64)),
}


def make(name: str) -> tuple[nn.Module, Tensor, list[nn.Parameter], list[list[Tensor | None]]]:
    torch.manual_seed(0)
    model, x = MODELS[name][0]().double(), MODELS[name][1]()
    parameters = list(model.parameters())
    directions: list[list[Tensor | None]] = [[torch.randn_like(p) for p in parameters] for _ in range(2)]
    directions[1][-1] = None
    return model, x, parameters, directions


def finite_difference(model: nn.Module, x: Tensor, direction: list[Tensor | None], step: float = 1e-6) -> Tensor:
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad(), torch.random.fork_rng():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(0 if d is None else d, alpha=sign * step)
            sides.append(moved(x))
    return (sides[0] - sides[1]) / (2 * step)


@pytest.mark.parametrize("name", MODELS)
def test_products_are_derivatives_and_leave_everything_as_it_was(name: str) -> None:
    model, x, parameters, directions = make(name)
    expected = [finite_difference(model, x, d) for d in directions]
    buffers = dict(model.named_buffers())
    contents = {k: v.clone() for k, v in buffers.items()}
    registered = {k: id(p) for k, p in model.named_parameters(remove_duplicate=False)}
    fast_path, rng = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()

    products = jacobian_products(model, lambda: (model(x), None), parameters, directions)

    for product, truth in zip(products, expected, strict=True):
        assert relative_error(product, truth) < 1e-7
        assert not product.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert {k: id(p) for k, p in model.named_parameters(remove_duplicate=False)} == registered
    after = dict(model.named_buffers())
    assert all(after[k] is buffers[k] and torch.equal(after[k], contents[k]) for k in buffers)


@pytest.mark.parametrize("name", ["mlp", "conv, batch norm in eval mode", "tied embedding"])
def test_products_are_those_of_torch_func(name: str) -> None:
    model, x, parameters, directions = make(name)
    names = [k for k, _ in model.named_parameters()]
    products = jacobian_products(model, lambda: (model(x), None), parameters, directions)
    for product, direction in zip(products, directions, strict=True):
        tangents = {k: torch.zeros_like(p) if d is None else d for k, p, d in zip(names, parameters, direction, strict=True)}
        state = dict(zip(names, (p.detach() for p in parameters), strict=True))
        _, truth = torch.func.jvp(lambda s: torch.func.functional_call(model, s, (x,)), (state,), (tangents,))
        assert relative_error(product, truth) < 1e-13


def test_products_of_a_recurrent_net_in_float32() -> None:
    """Where oneDNN would serve it, without a forward derivative."""
    model, x, parameters, directions = make("lstm")
    truth = jacobian_products(model, lambda: (model(x), None), parameters, directions)
    model.float()
    products = jacobian_products(model, lambda: (model(x.float()), None), parameters, directions)
    assert relative_error(products[0].double(), truth[0]) < 1e-5
    assert torch.backends.mkldnn.enabled or not torch.backends.mkldnn.is_available()


def test_products_of_a_compiled_model() -> None:
    model, x, parameters, directions = make("mlp")
    truth = jacobian_products(model, lambda: (model(x), None), parameters, directions)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    products = jacobian_products(compiled, lambda: (compiled(x), None), parameters, directions)
    assert all(torch.equal(a, b) for a, b in zip(products, truth, strict=True))


def test_directions_that_no_output_depends_on_give_zero() -> None:
    model, x, parameters, _ = make("mlp")
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    nothing: list[Tensor | None] = [None] * len(parameters)
    products = jacobian_products(
        model, lambda: (model(x), None), [*parameters, unused], [[*nothing, None], [*nothing, torch.ones_like(unused)]]
    )
    assert all(torch.equal(p, torch.zeros_like(model(x))) for p in products)


def test_a_closure_that_raises_leaves_parameters_and_buffers() -> None:
    model, x, parameters, directions = make("conv, batch norm")
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def evaluate() -> Any:
        model(x)
        raise KeyError("no batch")

    with pytest.raises(KeyError, match="no batch"):
        jacobian_products(model, evaluate, parameters, directions)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_operation_without_forward_derivative_is_named() -> None:
    model = nn.EmbeddingBag(4, 3)
    x = torch.tensor([[0, 1]])
    directions = [[torch.ones_like(model.weight)]]
    with pytest.raises(RuntimeError, match=r"(?s)lr='auto'.*_embedding_bag.*pass a number as lr"):
        jacobian_products(model, lambda: (model(x), None), [model.weight], directions)


def test_lost_tangents_and_new_batches_do_not_agree_with_the_gradient() -> None:
    model, x, parameters, _ = make("mlp")
    y = torch.randn(12, 4, dtype=torch.float64)
    outputs = model(x)
    gradient = list(torch.autograd.grad(nn.functional.mse_loss(outputs, y), parameters))
    slope = (outputs - y).detach() * (2 / y.numel())

    def lossy() -> tuple[Tensor, Tensor]:
        return model[4](checkpoint(model[:4], x, use_reentrant=True)), y

    def another_batch() -> tuple[Tensor, Tensor]:
        return model(torch.randn_like(x)), y

    for evaluate in (lossy, another_batch):
        products = jacobian_products(model, evaluate, parameters, [gradient])
        with pytest.raises(ValueError, match=r"same batch each time.*use_reentrant=False"):
            require_agreement(slope, products, gradient, [gradient])
    products = jacobian_products(model, lambda: (model(x), y), parameters, [gradient])
    require_agreement(slope, products, gradient, [gradient])
    with pytest.raises(ValueError, match=r"shape \(12, 4\), then \(11, 4\)"):
        require_agreement(slope, [slope[1:]], gradient, [gradient])


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (torch.ones(2, 2), r"return \(outputs, targets\).*returned a Tensor.*model\(x\)\.logits, labels"),
        ((torch.ones(2),) * 3, r"return \(outputs, targets\).*tuple of 3.*model\(x\)\.logits, labels"),
        (None, r"return \(outputs, targets\).*NoneType"),
        (({"logits": 1}, torch.ones(2)), r"type of outputs is dict.*model\(x\)\.logits, labels"),
    ],
)
def test_closures_are_told_what_to_return(result: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        outputs_and_targets(result)


def dense_ggn(model: nn.Module, x: Tensor, hessian: Callable[[Tensor], Tensor]) -> Tensor:
    """sum_n J_n^T H_n J_n, with H_n by torch.func.hessian of one term."""
    names = [k for k, _ in model.named_parameters()]
    state = {k: p.detach() for k, p in model.named_parameters()}
    total = 0
    for row in x:
        jacobian = torch.func.jacrev(lambda s, row=row: torch.func.functional_call(model, s, (row[None],))[0])(state)
        J = torch.cat([jacobian[k].flatten(1) for k in names], 1)
        total = total + J.T @ hessian(model(row[None])[0].detach()) @ J
    return torch.as_tensor(total)


def flat(direction: list[Tensor | None], parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if d is None else d).flatten() for p, d in zip(parameters, direction, strict=True)])


@pytest.mark.parametrize("loss", ["cross entropy", "squares"])
@pytest.mark.parametrize("is_mean", [True, False])
def test_gram_matrix_is_that_of_the_dense_ggn(loss: str, is_mean: bool) -> None:
    model, x, parameters, directions = make("mlp")
    _, y = batch_for_mlp()
    if loss == "cross entropy":
        likelihood, term = Categorical(), lambda f: f.logsumexp(-1)
    else:
        likelihood, term = Gaussian(0.5), lambda f: f.square().sum()
    scale = 1 / len(x) if is_mean else 1.0
    ridge = [0.1 + 0.01 * i for i in range(len(parameters))]
    gradient: list[Tensor | None] = [torch.randn_like(p) for p in parameters]
    gradient[0] = None
    products = jacobian_products(model, lambda: (model(x), y), parameters, directions)
    curved = [likelihood.hessian_product(model(x), p) for p in products]
    built = QuadraticModel.build(directions, gradient, products, curved, scale, ridge)

    R = torch.cat([torch.full((p.numel(),), r, dtype=torch.float64) for p, r in zip(parameters, ridge, strict=True)])
    F = scale * dense_ggn(model, x, torch.func.hessian(term)) + R.diag()
    D = torch.stack([flat(d, parameters) for d in directions])
    assert relative_error(built.gram, D @ F @ D.T) < 1e-12
    assert relative_error(built.linear, D @ flat(gradient, parameters)) < 1e-12
    c = torch.tensor([0.3, -0.7], dtype=torch.float64)
    delta = c @ D
    truth = delta @ flat(gradient, parameters) + delta @ F @ delta / 2
    assert relative_error(built.change(c), truth) < 1e-12


def test_the_minimum_is_one() -> None:
    torch.manual_seed(1)
    root = torch.randn(3, 3, dtype=torch.float64)
    model = QuadraticModel(root @ root.T, torch.randn(3, dtype=torch.float64))
    found = model.solve()
    assert relative_error(model.gram @ found.coefficients, -model.linear) < 1e-10
    assert torch.equal(found.change, model.change(found.coefficients))
    for _ in range(20):
        assert model.change(found.coefficients + 1e-3 * torch.randn(3, dtype=torch.float64)) > found.change


def test_zero_and_parallel_directions() -> None:
    rows = torch.tensor([[1.0, 2.0, 0.0], [-2.0, -4.0, 0.0], [0.0, 0.0, 0.0], [1e-6, 0.0, 1e-6]], dtype=torch.float64)
    h = torch.tensor([1.0, -1.0, 3.0], dtype=torch.float64)
    found = QuadraticModel(rows @ rows.T, rows @ h).solve()
    delta = found.coefficients @ rows
    best = -(torch.linalg.pinv(rows) @ rows @ h)
    assert relative_error(delta, best) < 1e-8
    assert found.coefficients[2] == 0
    assert found.coefficients[1] == pytest.approx(found.coefficients[0].item() / -2)  # each takes a share


def test_the_cutoff_is_relative_and_follows_precision() -> None:
    # Two directions, the second one the first up to the rounding of float32.
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-7]], dtype=torch.float64) * 1e-20
    linear = torch.tensor([1.0, 1.0 + 1e-4], dtype=torch.float64) * 1e-20
    loose = QuadraticModel(gram, linear, 16 * torch.finfo(torch.float32).eps).solve()
    assert loose.coefficients.tolist() == pytest.approx([-0.5, -0.5], rel=1e-3)
    assert QuadraticModel(gram, linear).solve().coefficients.abs().max() > 100
    directions = [[torch.ones(2)], [torch.ones(2, dtype=torch.float64)]]
    built = QuadraticModel.build(directions, directions[0], [torch.ones(2)] * 2, [torch.ones(2)] * 2, 1.0, [0.0])
    assert built.cutoff == 16 * torch.finfo(torch.float32).eps


def test_a_direction_without_curvature_is_not_taken() -> None:
    found = QuadraticModel(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([1.0, 1.0])).solve()
    assert found.coefficients.tolist() == [-0.5, 0.0]
    assert found.change == -0.25
    negative = QuadraticModel(torch.tensor([[-2.0]]), torch.tensor([1.0])).solve()
    assert negative.coefficients.tolist() == [0.0]
    assert negative.change == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_promises_nothing(bad: float) -> None:
    assert QuadraticModel(torch.tensor([[bad, 0.0], [0.0, 1.0]]), torch.ones(2)).solve().change.isnan()
    assert QuadraticModel(torch.full((3, 3), bad), torch.ones(3)).solve().change.isnan()
    assert QuadraticModel(torch.eye(2), torch.tensor([bad, 1.0])).solve().change.isnan()


def test_no_direction_is_an_error() -> None:
    with pytest.raises(ValueError, match="directions must have at least one"):
        QuadraticModel.build([], [], [], [], 1.0, [])
