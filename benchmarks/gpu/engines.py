"""A few steps of an optimizer with its kernels and without, which must agree; a batch with a NaN, which must move nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_triton import KFAC, KFACAdam

from .findings import Bench

STEPS = 6  # inverses are refreshed from their predecessors from the second one on
ALLOWED_FACTORS = 5e-3  # relative difference of the worst factor, after products of TF32 and of float32
ALLOWED_LOSS = 0.02, 1e-3  # relative, absolute
# Of the way that parameters go with KFACAdam: an error of 7e-4 in the factors turns eigenvectors with neighbouring eigenvalues
# so far that it differs by 0.15. Its steps are short, so that factors differ by what kernels compute and by nothing else.
ALLOWED_WAY, ADAM_RATE = 0.5, 1e-4


def compare(bench: Bench, kind: str) -> None:
    """Says how far apart they end; of the kind "adam" with KFACAdam."""
    device = torch.device(bench.device)
    (parameters, way, factors, loss, troubles), (others, other_way, other_factors, other_loss, _) = (
        _train(kind, device, backend) for backend in ("auto", "torch")
    )
    off = max(_relative(a, b) for a, b in zip(factors, other_factors, strict=True))
    relative, absolute = ALLOWED_LOSS
    right = off < ALLOWED_FACTORS and abs(loss - other_loss) < relative * abs(other_loss) + absolute
    ways = {"way_off": _relative(way, other_way)} if kind == "adam" else {}
    right = right and all(far < ALLOWED_WAY for far in ways.values())
    bench.say(
        f"engine {kind}",
        verdict="right" if right else "WRONG",
        factors_off=off,
        **ways,
        parameters_off=_relative(parameters, others),
        loss=loss,
        loss_torch=other_loss,
        **troubles,
    )


def hold(bench: Bench, first_order_rule: str) -> None:
    """Says whether a batch with a NaN leaves parameters and moments as they are, bit for bit, and other batches do not."""
    model, inputs = _network("norms", torch.device(bench.device))
    target = torch.randint(10, (len(inputs),), generator=torch.Generator().manual_seed(1)).to(inputs.device)
    optimizer = KFAC(model, lr=0.01, weight_decay=0.1, tail=first_order_rule)
    moved = []
    for is_bad in (False, False, True, False):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs * torch.nan if is_bad else inputs), target).backward()
        before = copy.deepcopy(_numbers(model, optimizer))
        optimizer.step()
        after = _numbers(model, optimizer)
        moved.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
    is_finite = all(bool(x.isfinite().all()) for x in _numbers(model, optimizer))
    verdict = "right" if moved == [True, True, False, True] and is_finite else "WRONG"
    bench.say(f"hold {first_order_rule}", verdict=verdict, moved=moved)


def _numbers(model: nn.Module, optimizer: KFAC) -> list[Tensor]:
    """Parameters, moments and counters."""
    state = [value for p in model.parameters() for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    return [p.detach() for p in model.parameters()] + state


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _train(kind: str, device: torch.device, backend: str) -> tuple[Tensor, Tensor, list[Tensor], float, dict[str, Any]]:
    """Parameters, their way, factors, the last loss, and the diagnostics' counts of refused inverses and dropped gradients."""
    model, inputs = _network(kind, device)
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    target = torch.randint(10, (len(inputs),), generator=torch.Generator().manual_seed(1)).to(device)
    if kind == "adam":
        optimizer: KFAC = KFACAdam(model, lr=ADAM_RATE, backend=backend, refresh="products")
    else:
        optimizer = KFAC(model, lr=0.05, damping=0.03, backend=backend, inverse="factored", inverse_tolerance=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
    troubles = {name: value for name, value in optimizer.diagnostics().items() if "fallback" in name or "dropped" in name}
    factors = [factor for pair in optimizer.factors().values() for factor in pair]
    end = nn.utils.parameters_to_vector(model.parameters()).detach()
    return end, end - start, factors, loss.item(), troubles


def _network(kind: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind in ("mlp", "adam"):
        layers = [nn.Linear(200, 513), nn.Tanh(), nn.Linear(513, 64), nn.Tanh(), nn.Linear(64, 10)]
        shape: tuple[int, ...] = (256, 200)
    elif kind == "conv":
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2), nn.ReLU(), nn.Flatten()]
        layers, shape = [*layers, nn.Linear(24 * 49, 10)], (64, 3, 16, 16)
    else:
        layers = [nn.Linear(40, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 96), nn.LayerNorm(96), nn.Linear(96, 10)]
        shape = (4096, 40)
    return nn.Sequential(*layers).to(device), torch.randn(shape, device=device)
