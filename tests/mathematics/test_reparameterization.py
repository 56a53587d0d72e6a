"""K-FAC's near-invariance: an affine change of a layer's inputs and outputs does not change the function that a step makes.

Martens and Grosse 2015, theorem 1: for W' = T_out W T_in^-1 (acting on inputs T_in a, with outputs mapped back by T_out^-1),
the K-FAC update maps as dW' = T_out dW T_in^-1 when there is no damping. SGD's does not.
"""

from __future__ import annotations

import pytest
import torch
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner

DAMPING = 1e-20
SAMPLES, INPUTS, OUTPUTS = 200, 4, 3


class Reparameterized(nn.Module):
    """tanh(T_out^-1 (W T_in a~)) with a~ = [a, 1] and T_in affine: the same function for matching W."""

    def __init__(self, weight: Tensor, t_in: Tensor, t_out: Tensor, head: Tensor) -> None:
        super().__init__()
        # [W | b] of the original layer, expressed in the changed coordinates.
        changed = t_out @ weight @ torch.linalg.inv(t_in)
        self.layer = nn.Linear(INPUTS, OUTPUTS, dtype=torch.float64)
        self.layer.weight.data, self.layer.bias.data = changed[:, :INPUTS].clone(), changed[:, INPUTS].clone()
        self.head = nn.Linear(OUTPUTS, 3, bias=False, dtype=torch.float64)
        self.head.weight.data = head.clone()
        self.t_in, self.t_out_inverse = t_in, torch.linalg.inv(t_out)

    def forward(self, x: Tensor) -> Tensor:
        homogeneous = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) @ self.t_in.T
        return self.head(torch.tanh(self.layer(homogeneous[:, :INPUTS]) @ self.t_out_inverse.T))


def _setup() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t_in = torch.randn(INPUTS + 1, INPUTS + 1, dtype=torch.float64) + 2 * torch.eye(INPUTS + 1, dtype=torch.float64)
    t_in[INPUTS] = 0
    t_in[INPUTS, INPUTS] = 1  # affine: the homogeneous coordinate stays 1
    t_out = torch.randn(OUTPUTS, OUTPUTS, dtype=torch.float64) + 2 * torch.eye(OUTPUTS, dtype=torch.float64)
    weight = torch.randn(OUTPUTS, INPUTS + 1, dtype=torch.float64)
    head = torch.randn(3, OUTPUTS, dtype=torch.float64)
    x, y = torch.randn(SAMPLES, INPUTS, dtype=torch.float64), torch.randint(3, (SAMPLES,))
    return t_in, t_out, weight, head, x, y


def _update(model: Reparameterized, x: Tensor, y: Tensor, kfac: bool, inverse: str) -> Tensor:
    preconditioner = KFACPreconditioner(model, damping=DAMPING, kl_clip=None, inverse=inverse) if kfac else None
    nn.functional.cross_entropy(model(x), y).backward()
    if preconditioner is not None:
        preconditioner.precondition_()
    assert model.layer.weight.grad is not None
    assert model.layer.bias.grad is not None
    return torch.cat([model.layer.weight.grad, model.layer.bias.grad[:, None]], 1)


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "factored"])
@pytest.mark.parametrize("seed", range(5))
def test_update_maps_with_the_parameters(seed: int, inverse: str) -> None:
    torch.manual_seed(seed)
    t_in, t_out, weight, head, x, y = _setup()
    original = Reparameterized(weight, torch.eye(INPUTS + 1).double(), torch.eye(OUTPUTS).double(), head)
    changed = Reparameterized(weight, t_in, t_out, head)
    torch.testing.assert_close(changed(x), original(x))  # the same function
    mapped = t_out @ _update(original, x, y, True, inverse) @ torch.linalg.inv(t_in)
    assert relative_error(_update(changed, x, y, True, inverse), mapped) <= 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_sgd_does_not(seed: int) -> None:
    torch.manual_seed(seed)
    t_in, t_out, weight, head, x, y = _setup()
    original = Reparameterized(weight, torch.eye(INPUTS + 1).double(), torch.eye(OUTPUTS).double(), head)
    changed = Reparameterized(weight, t_in, t_out, head)
    mapped = t_out @ _update(original, x, y, False, "") @ torch.linalg.inv(t_in)
    assert relative_error(_update(changed, x, y, False, ""), mapped) > 0.1
