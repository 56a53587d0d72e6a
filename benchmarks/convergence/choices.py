"""What `fewer_rows` compares: statistics from fewer rows, factors as blocks, both, and with settings retuned for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from kfac_triton.capture.gate import LEAST_ROWS, auto_stride
from kfac_triton.layers import meeting_all

from .contest import CONTEST
from .optimizers import KFAC_NAME, Config
from .problems import Problem

EVERYTHING, CONTROL = "everything", "control: damping 2 % higher"
DEFAULT = "the default"  # which takes all rows of layers that the other choices reduce, such as a ViT's head

_TEXT = CONTEST["text-large"][KFAC_NAME].fixed
# Settings of the race, and of two to four rates and dampings that were tried on seed 0 with all rows and whole factors, the
# best. The wide transformer has the settings of text; with two blocks, half the learning rate was worse there.
BASE: dict[str, Config] = {
    "text-large": _TEXT | {"lr": 6e-3, "damping": 1e-3, "ema_decay": 0.8},
    "vit-large": CONTEST["vit-large"][KFAC_NAME].fixed | {"lr": 6e-3, "damping": 3e-4, "weight_sharing": "expand"},
    "wide": _TEXT | {"lr": 6e-3, "damping": 1e-3, "ema_decay": 0.8},
}
_WHOLE: Config = {"stats_fraction": 1.0, "max_stats_tokens": None, "max_factor_size": None, "oversize": "block"}


@dataclass(frozen=True)
class Choice:
    """Rows and blocks of K-FAC on one problem, and the settings that follow them.

    Attributes:
        name: For the table.
        config: All settings of the run.
        rows: Rows that a step keeps of the layer with the largest factor.
        size: The size of its largest factor.
        block: The size of the largest block that is kept of it.
    """

    name: str
    config: Config
    rows: int
    size: int
    block: int

    @property
    def rows_per_size(self) -> float:
        """Rows for each row of the largest factor. A covariance of fewer rows than its size is singular before averaging."""
        return self.rows / self.size


def rows_of(problem: Problem) -> int:
    """Rows that the linear layers inside of the blocks have in a step: tokens."""
    if problem.is_text:
        return problem.batch * problem.network["context"]
    return problem.batch * (problem.network["side"] // problem.network["patch"]) ** 2


def largest_side(problem: Problem) -> int:
    """The largest number of inputs or outputs of a linear layer, the column for the bias not counted."""
    return max(max(m.in_features, m.out_features) for m in problem.build(0).modules() if isinstance(m, nn.Linear))


def _largest_kernel(problem: Problem) -> int:
    """The largest number of elements of a convolution's kernel: K-FAC does not cut through one."""
    return max((math.prod(m.kernel_size) for m in problem.build(0).modules() if isinstance(m, nn.Conv2d)), default=0)


def rows_kept(rows: int, positions: int, size: int, config: Config) -> int:
    """Rows that are left of so many, of examples with so many positions, for a factor of this size."""
    if config["stats_fraction"] == "auto":
        every = auto_stride(rows, max(LEAST_ROWS, size))
    else:
        every = math.ceil(1 / config["stats_fraction"] - 1e-9)
    if config["max_stats_tokens"] is not None:
        every = max(every, -(-rows // config["max_stats_tokens"]))
    return -(-rows // meeting_all(every, positions))


def choices(problem: Problem) -> list[Choice]:
    """Everything that is compared on a problem, in the order in which it runs; the first is the reference."""
    side, base = largest_side(problem), BASE[problem.name] | _WHOLE
    size = side + 1  # the column for the bias
    rows = rows_of(problem)

    def choice(name: str, **settings: Any) -> Choice:
        config = base | settings
        limit = config["max_factor_size"]
        count = 1 if limit is None else -(-side // (limit - 1))
        return Choice(name, config, rows_kept(rows, rows // problem.batch, size, config), size, -(-side // count) + 1)

    def blocks(count: int) -> Config:
        return {"max_factor_size": max(-(-side // count), _largest_kernel(problem)) + 1}

    eighth: Config = {"stats_fraction": 1 / 8}
    few = 1 / 4 if problem.name == "wide" else 1 / 2
    limits = (few,) if problem.name == "wide" else (few, 1)  # the fractions are the other limits of the wide transformer
    return [
        choice(EVERYTHING),
        choice("1/8 of the rows", **eighth),
        choice("4 blocks", **blocks(4)),
        choice("1/8 of the rows, longer average", **eighth, ema_decay=(1 + base["ema_decay"]) / 2),
        choice("1/8 of the rows, 4 blocks", **eighth, **blocks(4)),
        choice("1/4 of the rows", stats_fraction=1 / 4),
        choice("2 blocks", **blocks(2)),
        *(choice(f"at most {n:g} x size rows", max_stats_tokens=int(n * size)) for n in limits),
        choice("1/2 of the rows", stats_fraction=1 / 2),
        choice("1/8 of the rows, damping x 3", **eighth, damping=3 * base["damping"]),
        choice("4 blocks, damping x 3", **blocks(4), damping=3 * base["damping"]),
        choice(CONTROL, damping=1.02 * base["damping"]),
        choice("1/4 of the rows, 2 blocks", stats_fraction=1 / 4, **blocks(2)),
        choice("3 blocks", **blocks(3)),
        choice(DEFAULT, stats_fraction="auto"),
    ]
