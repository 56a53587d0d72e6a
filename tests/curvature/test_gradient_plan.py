"""Gradients and updates of all layers in one launch each: the same numbers as layer by layer, dense, and up to date."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.curvature.gradient_plan import GradientPlan
from kfac_triton.layers import registry
from kfac_triton.layers.linear import LinearLayer
from kfac_triton.steps.fused import FusedSteps

ROUNDING = 1e-5


class Everything(nn.Module):
    """A layer of each kind: gradients as views, transposed and copied, packed parameters, and one that is not covered."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.bare = nn.RMSNorm(16)
        self.plain = nn.Linear(16, 16)
        self.unbiased = nn.Linear(16, 6, bias=False)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.grouped = nn.Conv1d(4, 6, 3, groups=2)
        self.back = nn.ConvTranspose1d(6, 3, 2)
        self.scale = nn.Parameter(torch.ones(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.tokens(x))
        h = torch.tanh(self.plain(self.bare(h + self.attention(h, h, h, need_weights=False)[0])))
        h = self.grouped(torch.tanh(self.conv(self.unbiased(h).transpose(1, 2))))
        return self.scale * self.back(torch.tanh(h))


def _backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    torch.manual_seed(seed)
    nn.functional.cross_entropy(model(torch.randint(7, (4, 6))), torch.randint(3, (4, 5))).backward()


def _gradients(backend: str, prepare: Callable[[nn.Module], object] = lambda model: None, **settings: Any) -> list[Tensor]:
    """The preconditioned gradients of three steps; before the third, something happens to the model."""
    torch.manual_seed(0)
    model = Everything()
    preconditioner = KFACPreconditioner(
        model, damping=0.1, loss_terms="tokens", inverse="cholesky", backend=backend, **settings
    )
    found = []
    for seed in range(3):
        if seed == 2:
            prepare(model)
        _backward(model, seed)
        preconditioner.precondition_()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return found


@pytest.mark.parametrize("settings", [{}, {"max_factor_size": 9, "oversize": "block"}, {"norms": "full"}], ids=str)
def test_updates_are_those_of_a_layer_at_a_time(settings: dict[str, Any]) -> None:
    pairs = zip(_gradients("triton", **settings), _gradients("torch", **settings), strict=True)
    assert max(relative_error(x, y) for x, y in pairs) <= 100 * ROUNDING


def _freeze(model: nn.Module) -> None:
    model.plain.bias.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    model.conv.requires_grad_(False)


def _replace(model: nn.Module) -> None:
    """As torch.nn.utils and load_state_dict(assign=True) do."""
    for module in (model.plain, model.norm):
        module.weight = nn.Parameter(module.weight.detach().clone())
        module.bias = nn.Parameter(module.bias.detach().clone())


def _turn(model: nn.Module) -> None:
    """The same parameter with data behind other strides."""
    model.plain.weight.data = model.plain.weight.detach().T.contiguous().T


@pytest.mark.parametrize("prepare", [_freeze, _replace, _turn])
def test_a_plan_does_not_outlive_what_it_is_made_for(prepare: Callable[[nn.Module], object]) -> None:
    pairs = zip(_gradients("triton", prepare), _gradients("torch", prepare), strict=True)
    assert max(relative_error(x, y) for x, y in pairs) <= 100 * ROUNDING


def _flattened(model: nn.Module, gap: int) -> None:
    """All gradients become views of one buffer, with gaps of so many NaN before each."""
    owners = [p for p in model.parameters() if p.grad is not None]
    buffer = torch.full((sum(p.numel() + gap for p in owners),), torch.nan)
    start = 0
    for p in owners:
        view = buffer[start + gap : start + gap + p.numel()].view(p.shape)
        start += gap + p.numel()
        assert p.grad is not None
        p.grad = view.copy_(p.grad)


def test_gradients_may_be_views_of_one_buffer_that_changes() -> None:
    """As DistributedDataParallel makes them, which arranges its buffers anew after the first step."""
    updates: list[list[Tensor]] = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = Everything()
        preconditioner = KFACPreconditioner(model, damping=0.1, loss_terms="tokens", inverse="cholesky", backend=backend)
        updates.append([])
        for seed, gap in enumerate((0, 3, None)):
            _backward(model, seed)
            if gap is not None:
                _flattened(model, gap)
            preconditioner.precondition_()
            updates[-1] += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert max(relative_error(x, y) for x, y in zip(*updates, strict=True)) <= 100 * ROUNDING


def _optimizer(model: nn.Module, **settings: Any) -> KFAC:
    return KFAC(model, damping=0.1, loss_terms="tokens", inverse="cholesky", backend="triton", **settings)


def test_updates_are_dense_and_in_the_layout_of_their_parameters() -> None:
    """So that operations over many parameters take them. Only adapters that copy, and packed parameters, get others."""
    torch.manual_seed(0)
    model = Everything()
    model.unbiased.weight = nn.Parameter(torch.randn(16, 6).T)  # dense, and transposed
    optimizer = _optimizer(model)
    for seed in range(2):
        _backward(model, seed)
        updates = optimizer.engine.precondition(lambda _: 0.1)
    named = {name: (p, updates[p]) for name, p in model.named_parameters() if p in updates}
    dense = {name for name, (p, update) in named.items() if update is not None and update.stride() == p.stride()}
    copied = {"grouped.weight", "grouped.bias", "back.weight", "back.bias"}
    assert dense | copied >= named.keys() == {name for name, _ in model.named_parameters()} - {"scale"}
    buffers = {stack.gradient.untyped_storage().data_ptr() for stack in optimizer.engine.curvature.gradients}
    inside = {name for name, (_, update) in named.items() if update.untyped_storage().data_ptr() in buffers}  # type: ignore[union-attr]
    assert inside == named.keys() - copied - {"attention.in_proj_weight", "attention.in_proj_bias"}
    for name in inside:
        assert named[name][1].data_ptr() % 16 == 0, name  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_of_16_bits_are_of_16_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    found = {}
    for backend in ("triton", "torch"):
        optimizer = KFAC(model, damping=0.1, backend=backend)
        model.zero_grad()
        torch.manual_seed(1)
        model(torch.randn(8, 6, dtype=dtype)).float().square().mean().backward()
        updates = optimizer.engine.precondition(lambda _: 0.1)
        found[backend] = [updates[p] for p in model.parameters()]
        optimizer.close()
    for ours, theirs in zip(found["triton"], found["torch"], strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours.float(), theirs.float()) <= 2 * torch.finfo(dtype).eps


def test_the_plan_is_kept_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = GradientPlan.__init__

    def counted(self: GradientPlan, *arguments: Any) -> None:
        made.append(1)
        original(self, *arguments)

    monkeypatch.setattr(GradientPlan, "__init__", counted)
    model = Everything()
    optimizer = _optimizer(model, lr=0.1)
    for seed in range(3):
        _backward(model, seed)
        optimizer.step()
    assert len(made) == 1
    model.plain.bias.requires_grad_(False)
    _backward(model, 3)
    optimizer.step()
    assert len(made) == 2


def test_diagnostics_are_those_of_the_step() -> None:
    """Norms and products, although the updates have overwritten the gradients; one layer has a bad one."""
    found = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = Everything()
        preconditioner = KFACPreconditioner(model, damping=0.1, loss_terms="tokens", inverse="cholesky", backend=backend)
        if backend == "torch":
            preconditioner.engine.host_looks = False
        for seed in range(2):
            _backward(model, seed)
            if seed == 1:
                model.conv.weight.grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]
            preconditioner.precondition_()
        found.append(preconditioner.diagnostics()["layers"])
    for name, layer in found[0].items():
        for key in ("update_norm", "cosine", "product", "gradient_norm", "dropped_gradients"):
            if name != "conv" or key in ("update_norm", "dropped_gradients"):
                assert layer[key] == pytest.approx(found[1][name][key], rel=1e-3, abs=1e-6), (name, key)
    assert found[0]["conv"]["dropped_gradients"] == 1
    assert found[0]["conv"]["update_norm"] == 0


def test_an_adapter_that_reads_other_parameters_is_asked_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 5))
            self.shift = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight) + self.shift

    class ScaledLayer(LinearLayer):
        module_type = Scaled
        calls = 0

        def read_update(self, blocks: list[Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
            type(self).calls += 1
            return [*super().read_update(blocks), (self.module.shift, blocks[0][: self.output_size, 0])]

    monkeypatch.setattr(registry, "LAYER_TYPES", [ScaledLayer, *registry.LAYER_TYPES])
    model = nn.Sequential(Scaled())
    optimizer = KFAC(model, damping=0.1, backend="triton")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(6, 5)).square().mean().backward()
        updates = optimizer.engine.precondition(lambda _: 0.1)
        shift, weight = updates[model[0].shift], updates[model[0].weight]
        assert shift is not None and weight is not None
        assert torch.equal(shift, weight[:, 0])
    assert ScaledLayer.calls == 4  # and once for the plan


TAILS = [{}, {"tail": "adamw"}]
OTHER_TAILS = [{"nesterov": True, "weight_decay": 0.1}, {"momentum": 0.0}]  # whose rules the tests of the kernel vary


@pytest.mark.parametrize("tail", [*TAILS, *(pytest.param(tail, marks=pytest.mark.slow) for tail in OTHER_TAILS)], ids=str)
def test_all_parameters_are_moved_by_the_kernel_as_pytorch_moves_them(tail: dict[str, Any], monkeypatch: Any) -> None:
    """But those whose updates are copies in other strides."""
    trained, rest = [], []
    original = FusedSteps.apply

    def apply(steps: FusedSteps) -> None:
        rest.append(len(steps.rest[0]))
        original(steps)

    monkeypatch.setattr(FusedSteps, "apply", apply)
    for foreach in (None, False):
        torch.manual_seed(0)
        model = Everything()
        optimizer = _optimizer(model, lr=0.05, foreach=foreach, **tail)
        for seed in range(3):
            _backward(model, seed)
            if seed == 1:
                model.scale.grad[0] = model.plain.bias.grad[0] = torch.inf  # type: ignore[index]
            optimizer.step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        steps = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
        assert {name for name, count in steps.items() if count == 2} == {"scale", "plain.weight", "plain.bias"}
    assert relative_error(*trained) <= ROUNDING
    assert len(rest) == 3
    assert set(rest) == {3}  # two biases and a weight
