"""The first-order rule of a parameter group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """SGD with momentum, or AdamW; both with decoupled weight decay (Loshchilov and Hutter 2019).

    Attributes:
        adam: whether it is AdamW.
        momentum: of SGD.
        nesterov: whether the momentum of SGD, or the mean of AdamW, looks ahead as Nesterov's does.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: the decay.
        maximize: whether to move along the gradient instead of against it.
    """

    adam: bool
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False

    @property
    def moments(self) -> int:
        """How many tensors of the size of a parameter the rule keeps of it."""
        return 2 if self.adam else int(self.momentum > 0)

    @property
    def kind(self) -> tuple[bool, bool, bool, bool]:
        """What the kernel is compiled for: AdamW, momentum, Nesterov's, along the gradient."""
        return self.adam, self.momentum > 0, self.nesterov, self.maximize
