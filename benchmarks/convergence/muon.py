"""Muon as it is raced: `torch.optim.Muon` on hidden weights and AdamW on everything else, as Muon's authors advise.

Muon orthogonalizes in bfloat16, which a CPU multiplies ten times slower than float32. `Float32Muon` is its twin for CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, chosen by Muon's authors for its slope at zero
ITERATIONS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """Singular values to roughly 1, singular vectors as they are: the iteration of `torch.optim.Muon` in the matrix's dtype."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class Float32Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with Nesterov momentum and the original adjustment of the learning rate, in the gradients' dtype.

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: decoupled, times `lr`.
        momentum: weight of the past in the average of gradients.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves all matrices that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                direction = orthogonalize(p.grad.lerp(average, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1])))


class MuonWithAdamW:
    """Muon on the weights of hidden layers, AdamW on embeddings, positions, norms, biases and the head.

    A convolution's kernel is a matrix with a row for each output channel. Muon moves a matrix that shares its storage.

    Args:
        model: the network; its last layer is called `head`, if it has one that is a classifier.
        lr: learning rate of Muon.
        momentum: of Muon.
        weight_decay: of Muon, and of matrices that AdamW moves.
        rest_lr: learning rate of AdamW.
        rest_betas: of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        rest_lr: float = 4e-3,
        rest_betas: tuple[float, float] = (0.9, 0.99),
    ):
        hidden = hidden_weights(model)
        self._model = model
        self._views = [(weight, nn.Parameter(weight.detach().view(len(weight), -1))) for weight in hidden]
        matrices = [view for _, view in self._views]
        on_gpu = any(matrix.is_cuda for matrix in matrices)
        self._muon = (torch.optim.Muon if on_gpu else Float32Muon)(
            matrices, lr=lr, momentum=momentum, weight_decay=weight_decay
        )
        covered = {id(weight) for weight in hidden}
        rest = [p for p in model.parameters() if id(p) not in covered]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=rest_lr, betas=rest_betas, fused=True)

    @property
    def param_groups(self) -> list[dict]:
        """Those of both optimizers, Muon's first."""
        return [*self._muon.param_groups, *self._adamw.param_groups]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._model.zero_grad()

    def step(self) -> None:
        """Both optimizers' step."""
        for weight, view in self._views:
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()
        self._adamw.step()


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of all linear layers and convolutions but the head."""
    head = getattr(model, "head", None)
    return [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m is not head]
