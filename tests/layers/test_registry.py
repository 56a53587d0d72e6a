"""A user's own layer: what the documentation shows, and what `register` refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.adapters import assert_checkpoint_keeps_the_run, assert_close, kronecker_solve, preconditioned
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.kernels import ops
from kfac_triton.layers import LAYER_TYPES, Layer, Rows, find_layers, register
from kfac_triton.layers.linear import LinearLayer

N, IN, OUT = 6, 5, 4

# The documentation shows this:


class ScaledLinear(nn.Module):
    """Linear whose weights are drawn from N(0, 1) and scaled when they are used (Karras et al. 2018, section 4.1)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.scale = in_features**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scale * self.weight, self.bias)


class ScaledLinearLayer(Layer):
    """The output is W a with a = scale * x, so these are the rows of A."""

    module_type = ScaledLinear

    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        assert isinstance(self.module, ScaledLinear)
        examples, positions = len(x), x.shape[1:-1].numel()
        return Rows(
            inputs=[self.module.scale * x.flatten(0, -2)],
            gradients=[gradient.flatten(0, -2)],
            input_window=ops.ROWS,
            gradient_window=ops.ROWS,
            input_count=examples * positions,
            terms=examples * positions if self.tokens else examples,
            examples=examples,
        )


# Until here; there it is decorated with @register.


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = list(LAYER_TYPES)
    yield
    LAYER_TYPES[:] = before


def losses(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, 3, IN, generator=generator, dtype=torch.float64)
    return model(x).square().flatten(1).sum(1)


def net() -> nn.Sequential:
    return nn.Sequential(ScaledLinear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 2)).double()


def test_a_layer_of_ones_own() -> None:
    assert [layer.name for layer in find_layers(net())[0]] == ["2"]
    assert register(ScaledLinearLayer) is ScaledLinearLayer
    model = net()
    assert [layer.name for layer in find_layers(model)[0]] == ["0", "2"]

    twin = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 2)).double()
    twin[0].weight.data, twin[0].bias.data = model[0].weight.data * IN**-0.5, model[0].bias.data.clone()
    twin[2].load_state_dict(model[2].state_dict())
    ours, before = preconditioned(model, losses)
    theirs, _ = preconditioned(twin, losses)
    a, g = ours.factors()["0"]
    scale = torch.tensor([IN**-0.5] * IN + [1.0], dtype=torch.float64)
    twin_a, twin_g = theirs.factors()["0"]
    assert_close(a, scale[:, None] * twin_a * scale)
    assert_close(g, twin_g)
    expected = kronecker_solve(torch.cat([before[0], before[1][:, None]], 1), a, g)
    assert_close(model[0].weight.grad, expected[:, :IN], 1e-10)
    assert_close(model[0].bias.grad, expected[:, IN], 1e-10)
    assert_checkpoint_keeps_the_run(net, losses)


def test_what_is_registered_last_is_asked_first() -> None:
    @register
    class First(LinearLayer):
        pass

    @register
    class Second(LinearLayer):
        pass

    assert [type(layer) for layer in find_layers(nn.Linear(3, 2))[0]] == [Second]
    LAYER_TYPES.remove(Second)
    assert [type(layer) for layer in find_layers(nn.Linear(3, 2))[0]] == [First]


def test_a_module_with_another_forward_is_another_module() -> None:
    register(ScaledLinearLayer)

    class Doubled(ScaledLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Renamed(ScaledLinear):
        pass

    layers, skipped = find_layers(nn.Sequential(Doubled(3, 2), Renamed(3, 2)))
    assert [layer.name for layer in layers] == ["1"]
    assert skipped == {}


def test_a_family_that_is_known_by_something_else_than_its_class() -> None:
    @register
    class AnyLora(LinearLayer):
        @classmethod
        def matches(cls, module: nn.Module) -> bool:
            return type(module).__name__.startswith("Lora")

    class LoraDown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    layers, _ = find_layers(nn.Sequential(LoraDown(), nn.Linear(2, 2)))
    assert [type(layer) for layer in layers] == [AnyLora, LinearLayer]


@pytest.mark.parametrize("wrong", [nn.Linear, nn.Linear(2, 2), "Linear", None, Layer, object], ids=str)
def test_what_is_no_adapter_is_refused(wrong: object) -> None:
    before = list(LAYER_TYPES)
    with pytest.raises(TypeError, match="layer_type must be a class derived from Layer with a module_type"):
        register(wrong)  # type: ignore[arg-type]
    assert before == LAYER_TYPES


def test_an_adapter_without_rows_cannot_be_made() -> None:
    class Incomplete(Layer):
        module_type = ScaledLinear

    register(Incomplete)
    with pytest.raises(TypeError, match=r"abstract method '?rows"):
        find_layers(ScaledLinear(2, 2))


def test_an_attribute_of_the_module_is_not_taken_for_channel_groups() -> None:
    """A norm is one block, whatever its module's `groups` are: a number, a list of processes, or None."""

    class Groups(nn.GroupNorm):
        def __init__(self, groups: Any) -> None:
            super().__init__(2, 8)
            self.groups = groups

    for groups in (2, None, [0, 1]):
        model = nn.Sequential(nn.Linear(4, 8), Groups(groups))
        with KFAC(model) as optimizer:
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
            assert [len(g) for _, g in optimizer.factors().values()] == [8, 16]


def test_an_adapter_may_say_how_many_groups_it_has() -> None:
    class Layer(LinearLayer):
        @property
        def groups(self) -> int:
            return 1

    assert Layer("", nn.Linear(2, 3), "expand", "examples").groups == 1


def test_an_adapter_does_not_inherit_that_its_modules_can_be_tied() -> None:
    """Two modules with one weight and different scales are not one module that is called twice."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class ScaledLayer(LinearLayer):
        module_type = Scaled

    modules = [Scaled(3, 3), Scaled(3, 3)]
    assert LinearLayer.tie([nn.Linear(3, 3)]) is LinearLayer
    assert ScaledLayer.tie(modules) is None
    assert type("Tied", (ScaledLayer,), {"can_be_tied": True}).tie(modules) is not None


def test_the_old_name_of_output_parts_is_refused() -> None:
    with pytest.raises(TypeError, match="output_blocks is called output_parts now; rename it"):
        type("Layer", (LinearLayer,), {"output_blocks": 2})
