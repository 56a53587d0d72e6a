"""The warm refresh against inverse-free K-FAC (Lin et al. 2024): two iterations for one fixed point, of one batch's factors."""

from __future__ import annotations

import torch
from singd.optim.optimizer import SINGD
from support.helpers import mlp, relative_error
from torch import nn

from kfac_triton import KFACPreconditioner
from kfac_triton.curvature.inverse import InverseStack

DAMPING = 0.1


def test_the_fixed_point_is_singds() -> None:
    """K K^T -> (A + damping I)^-1 and C C^T -> (G + damping I)^-1, from SINGD's own hooks, statistics and iteration."""
    model, x, y = mlp(), torch.randn(16, 5, dtype=torch.float64), torch.randint(4, (16,))
    # The loss times 3: G is then not lost beside the damping.
    theirs = SINGD(model, lr=0.0, momentum=0.0, damping=DAMPING, alpha1=0.0, T=1, lr_cov=0.1, kfac_like=True)
    for _ in range(400):
        theirs.zero_grad()
        (3 * nn.functional.cross_entropy(model(x), y)).backward()
        theirs.step()
    with KFACPreconditioner(model, damping=DAMPING) as ours:
        model.zero_grad()
        (3 * nn.functional.cross_entropy(model(x), y)).backward()
        ours.precondition_()
        factors = ours.factors()
    assert set(theirs.Ks) == {"0", "2", "4"} == set(factors)
    for name, pair in factors.items():
        for factor, kept in zip(pair, (theirs.Ks[name], theirs.Cs[name]), strict=True):
            root = kept.to_dense()
            stack = InverseStack(factor[None], "factored", tolerance=1e-12)
            damping = torch.full((1,), DAMPING, dtype=torch.float64)
            stack.refresh(0.95 * factor[None], damping)  # the start, by Cholesky, of another factor
            stack.refresh(factor[None], damping)
            assert stack.fallbacks.tolist() == [0]
            found = stack.values[0].T @ stack.values[0]
            assert relative_error(found, root @ root.T) <= 1e-9
