"""The four operators as torch sees them: schemas, opcheck, torch.compile, and the checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_triton.kernels import ops
from kfac_triton.kernels.covariance.window import flatten

FLOATS = [torch.float32, torch.float64]
MUTATED = {
    "covariance_ema": {"factors"},
    "newton_schulz_inverse": {"inverse", "residual"},
    "factored_newton_refresh": {"roots", "residuals", "used", "fallbacks", "refused"},
    "precondition": {"out", "product"},
}


def spd(batch: int, n: int, dtype: torch.dtype) -> Tensor:
    rows = torch.randn(batch, 2 * n, n, dtype=dtype)
    return rows.mT @ rows / (2 * n)


def arguments(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of a call that is fine."""
    if name == "covariance_ema":
        return {
            "factors": [spd(1, 4, dtype)[0], spd(1, 10, dtype)[0]],
            "inputs": [torch.randn(5, 3, dtype=dtype), torch.randn(2, 2, 4, 5, dtype=dtype)],
            "alpha": torch.tensor([1.0, 0.5], dtype=dtype),
            "beta": torch.tensor([0.0, 0.9], dtype=dtype),
            "ones_column": [True, False],
            "windows": [ops.ROWS, ops.window((2, 2), (1, 2), (1, 0))],
            "accept": torch.tensor([True, True]),
        }
    if name == "precondition":
        return {
            "gradient": torch.randn(2, 3, 4, dtype=dtype),
            "left": spd(2, 3, dtype),
            "right": spd(2, 4, dtype),
            "out": torch.zeros(2, 3, 4, dtype=dtype),
            "product": torch.zeros(2, dtype=dtype),
            "factored": False,
        }
    if name == "factored_newton_refresh":
        factors = [spd(2, 5, dtype), spd(1, 3, dtype)]
        starts = [x + 0.5 * torch.eye(x.shape[-1], dtype=dtype) for x in factors]
        return {
            "factors": factors,
            "dampings": [torch.tensor([0.1, 1.0], dtype=dtype), torch.ones(1, dtype=dtype)],
            "roots": [torch.linalg.inv(torch.linalg.cholesky(x)) for x in starts],
            "residuals": [torch.zeros(len(x), dtype=dtype) for x in factors],
            "tolerance": 1e-3,
            "max_steps": 4,
            "accept": 0.3,
            "used": [torch.zeros(len(x), dtype=dtype) for x in factors],
            "fallbacks": [torch.zeros(len(x), dtype=torch.long) for x in factors],
            "refused": [torch.zeros(len(x), dtype=torch.bool) for x in factors],
        }
    factor = spd(2, 5, dtype)
    return {
        "factor": factor,
        "damping": torch.tensor([0.1, 1.0], dtype=dtype),
        "inverse": torch.linalg.inv(torch.linalg.cholesky(factor + 0.5 * torch.eye(5, dtype=dtype))),
        "residual": torch.zeros(2, dtype=dtype),
        "tolerance": 1e-3,
        "max_steps": 4,
    }


def tensors(values: dict[str, Any]) -> list[Tensor]:
    flat: list[Any] = []
    for value in values.values():
        flat += value if isinstance(value, list) else [value]
    return [x for x in flat if isinstance(x, Tensor)]


def copies(values: dict[str, Any]) -> dict[str, Any]:
    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(x) for x in value]
        return value.clone() if isinstance(value, Tensor) else value

    return {name: copy(value) for name, value in values.items()}


@pytest.mark.parametrize("name", MUTATED)
def test_schema(name: str) -> None:
    """It writes to the tensors that its documentation calls outputs, to no other, and returns nothing."""
    operator = getattr(torch.ops.kfac_triton, name).default
    assert operator._schema.returns == []
    assert operator._schema.is_mutable
    mutated = {a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert mutated == MUTATED[name]
    assert [a.name for a in operator._schema.arguments] == [*arguments(name), "backend"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", MUTATED)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schema, autograd registration, fake tensors and ahead-of-time dispatch with dynamic shapes."""
    operator = getattr(torch.ops.kfac_triton, name).default
    values = arguments(name, dtype)
    if "windows" in values:
        values["windows"] = flatten(values["windows"])
    result = torch.library.opcheck(operator, (), values)
    assert result == dict.fromkeys(result, "SUCCESS")
    assert {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"} <= result.keys()


@pytest.mark.parametrize("name", MUTATED)
def test_compiled_calls_are_the_eager_ones(name: str) -> None:
    """One graph, without a break; what it writes is what the eager call writes, and inputs stay inputs."""
    function: Callable[..., None] = getattr(ops, name)

    def call(values: dict[str, Any]) -> None:
        function(**values)

    eager = arguments(name)
    graph = copies(eager)
    call(eager)
    torch._dynamo.reset()
    torch.compile(call, backend="aot_eager", fullgraph=True)(graph)
    for a, b in zip(tensors(eager), tensors(graph), strict=True):
        assert torch.equal(a, b)


def test_a_compiled_graph_uses_what_it_wrote() -> None:
    """Written results are seen by operations after it, and a second call sees the first."""

    def twice(factor: Tensor, x: Tensor) -> Tensor:
        for _ in range(2):
            ops.covariance_ema([factor], [x], torch.ones(1), torch.ones(1), [False], [ops.ROWS])
        return factor.trace()

    x = torch.randint(-3, 4, (7, 3)).float()
    factor = torch.zeros(3, 3)
    torch._dynamo.reset()
    trace = torch.compile(twice, backend="aot_eager", fullgraph=True)(factor, x)
    assert torch.equal(factor, 2 * x.T @ x)
    assert trace == 2 * x.square().sum()


def other_device(x: Tensor) -> Tensor:
    return x.to("meta")


def other_dtype(x: Tensor) -> Tensor:
    return x.double()


def one_more(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1]])


def one_dimension_more(x: Tensor) -> Tensor:
    return x[None]


def wider(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :1]], -1)


CHANGES = [other_device, other_dtype, one_more, one_dimension_more, wider]
STACKED = ["newton_schulz_inverse", "precondition"]
TENSORS = [(name, argument) for name in STACKED for argument, value in arguments(name).items() if isinstance(value, Tensor)]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_an_argument_that_does_not_fit_is_named_before_anything_is_written(
    name: str, argument: str, change: Callable[[Tensor], Tensor]
) -> None:
    """Every tensor argument, changed alone. If the first one differs, the message names that or one that should match it."""
    values = arguments(name)
    values[argument] = change(values[argument])
    before = copies(values)
    first = next(iter(values))
    named = argument if argument != first else "|".join(n for n, v in values.items() if isinstance(v, Tensor))
    with pytest.raises(ValueError, match=rf"^({named}) must have|^({named}) must be"):
        getattr(ops, name)(**values)
    for a, b in zip(tensors(values), tensors(before), strict=True):
        assert a.is_meta or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("name", STACKED)
def test_types_without_the_digits_are_refused(name: str, dtype: torch.dtype) -> None:
    """Documented: float32 or float64."""
    values = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments(name).items()}
    first = next(iter(values))
    before = copies(values)
    with pytest.raises(ValueError, match=first):
        getattr(ops, name)(**values)
    for a, b in zip(tensors(values), tensors(before), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", STACKED)
def test_an_empty_stack_is_fine(name: str) -> None:
    values = {k: v[:0] if isinstance(v, Tensor) else v for k, v in arguments(name).items()}
    assert getattr(ops, name)(**values) is None


UNTOUCHED = 7.0


def covariance_call(**changes: Any) -> list[Tensor]:
    """Two layers with one argument replaced; returns the factors."""
    arguments: dict[str, Any] = {
        "factors": [torch.full((4, 4), UNTOUCHED), torch.full((8, 8), UNTOUCHED)],
        "inputs": [torch.randn(5, 3), torch.randn(2, 2, 4, 4)],
        "alpha": torch.ones(2),
        "beta": torch.zeros(2),
        "ones_column": [True, False],
        "windows": [ops.ROWS, ops.window((2, 2))],
        "accept": None,
    } | changes
    factors = arguments["factors"]
    try:
        ops.covariance_ema(**arguments)
    except ValueError:
        assert all((f == UNTOUCHED).all() for f in factors if not f.is_meta), "written before the error"
        raise
    return factors


def test_the_call_that_the_refusals_vary_is_fine() -> None:
    assert all((f != UNTOUCHED).all() for f in covariance_call())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        pytest.param("inputs", [torch.zeros(5, 3)], id="one input missing"),
        pytest.param("ones_column", [True], id="one flag missing"),
        pytest.param("windows", [ops.ROWS], id="one window missing"),
        pytest.param("windows", [ops.ROWS, ops.window((2, 2))._replace(stride=(1,))], id="one number missing"),
        pytest.param("alpha", torch.ones(3), id="alpha too long"),
        pytest.param("alpha", torch.ones(()), id="scalar alpha"),
        pytest.param("beta", torch.ones(1), id="beta too short"),
        pytest.param("beta", torch.ones(2, 1), id="beta is a matrix"),
        pytest.param("accept", torch.ones(1, dtype=torch.bool), id="accept too short"),
        pytest.param("accept", torch.ones(3, dtype=torch.bool), id="accept too long"),
        pytest.param("factors", [torch.full((3, 3), UNTOUCHED), torch.full((8, 8), UNTOUCHED)], id="no room for the ones"),
        pytest.param("factors", [torch.full((4, 4), UNTOUCHED), torch.full((7, 7), UNTOUCHED)], id="no room for the patches"),
        pytest.param("factors", [torch.full((4, 5), UNTOUCHED), torch.full((8, 8), UNTOUCHED)], id="not square"),
        pytest.param("factors", [torch.full((1, 4, 4), UNTOUCHED), torch.full((8, 8), UNTOUCHED)], id="a stack"),
        pytest.param("factors", [torch.full((4, 4), 7), torch.full((8, 8), UNTOUCHED)], id="integer factor"),
        pytest.param(
            "factors", [torch.full((4, 4), UNTOUCHED, dtype=torch.bfloat16), torch.full((8, 8), UNTOUCHED)], id="bf16 factor"
        ),
        pytest.param("inputs", [torch.zeros(3), torch.zeros(2, 2, 4, 4)], id="a vector"),
        pytest.param("inputs", [torch.zeros(1, 3, 2, 2, 2, 2), torch.zeros(2, 2, 4, 4)], id="four spatial dimensions"),
        pytest.param("inputs", [torch.zeros(5, 3), torch.zeros(2, 2, 1, 1)], id="image smaller than the kernel"),
        pytest.param("windows", [ops.ROWS, ops.ROWS], id="image without a window"),
        pytest.param("inputs", [torch.zeros(5, 3, device="meta"), torch.zeros(2, 2, 4, 4)], id="input on another device"),
        pytest.param("alpha", torch.ones(2, device="meta"), id="alpha on another device"),
        pytest.param("beta", torch.ones(2, device="meta"), id="beta on another device"),
    ],
)
def test_refusals_name_the_argument_and_write_nothing(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        covariance_call(**{argument: value})


def test_a_factor_that_is_too_small_is_named_by_its_number() -> None:
    with pytest.raises(ValueError, match=r"factors\[1\] .* 8 wide .* inputs\[1\] of shape \(2, 2, 4, 4\), .* \(7, 7\)"):
        covariance_call(factors=[torch.full((4, 4), UNTOUCHED), torch.full((7, 7), UNTOUCHED)])
