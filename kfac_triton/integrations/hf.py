"""For transformers.Trainer: factories of KFAC and KFACAdam with the parameter groups that the trainer uses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from ..adam import KFACAdam
from ..optimizer import KFAC

_Kind = TypeVar("_Kind", bound=KFAC)


def kfac_factory() -> Callable[..., KFAC]:
    """For `transformers.Trainer(optimizer_cls_and_kwargs=(kfac_factory, options))`.

    The trainer calls the returned function with the model and the options, which are arguments of `KFAC`. The optimizer does
    not read TrainingArguments: pass `"lr": args.learning_rate`, `"weight_decay": args.weight_decay`. (K-FAC needs another
    learning rate than AdamW.) As with the trainer's own optimizers, `weight_decay` applies to the parameters that
    `Trainer.get_decay_parameter_names` names; biases and norms are a second group without weight decay.

    Returns:
        A function of the model and the options that makes the optimizer.

    Examples:
        >>> import torch
        >>> from kfac_triton.integrations import kfac_factory
        >>> from transformers import Trainer, TrainingArguments
        >>> class Regression(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(4, 2)
        ...     def forward(self, x, labels):
        ...         return {"loss": (self.layer(x) - labels).square().mean()}
        >>> args = TrainingArguments(
        ...     max_steps=3, learning_rate=0.1, weight_decay=0.01,
        ...     max_grad_norm=0, save_strategy="no",
        ... )
        >>> options = {
        ...     "lr": args.learning_rate, "weight_decay": args.weight_decay,
        ...     "damping": 0.03,
        ... }
        >>> data = [
        ...     {"x": torch.randn(4), "labels": torch.randn(2)} for _ in range(16)
        ... ]
        >>> trainer = Trainer(
        ...     Regression(), args, train_dataset=data,
        ...     optimizer_cls_and_kwargs=(kfac_factory, options),
        ... )
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
    """
    return functools.partial(_make, KFAC)


def kfac_adam_factory() -> Callable[..., KFACAdam]:
    """For `transformers.Trainer(optimizer_cls_and_kwargs=(kfac_adam_factory, options))`.

    As `kfac_factory`, but for `KFACAdam` and its arguments: the optimizer does not read TrainingArguments, and biases and
    norms are a second group without weight decay. Options that are not passed have the defaults of `KFACAdam`.

    Returns:
        A function of the model and the options that makes the optimizer.

    Examples:
        >>> import torch
        >>> from kfac_triton.integrations import kfac_adam_factory
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = kfac_adam_factory()(model, lr=0.016)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.01, 0.0]
    """
    return functools.partial(_make, KFACAdam)


def _make(kind: type[_Kind], model: nn.Module, **options: Any) -> _Kind:
    return kind(model, _groups(model), **options)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """The groups that `Trainer.create_optimizer` makes; the first one takes the optimizer's weight decay."""
    from transformers import Trainer  # not at the top: it takes seconds

    # The method does not use self. It is called rather than copied, so that the groups are right in every version.
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if name in decayed]},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
