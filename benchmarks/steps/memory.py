"""What a training step of a transformer takes in memory, with and without K-FAC, as counted on a CPU.

    PYTHONPATH=tests python -m benchmarks.steps.memory

Every tensor that is alive counts once, what autograd saves for the backward pass included; what a library asks for inside one
operation does not. The figures are exact, and need no quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from support.memory_meter import MemoryMeter
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFAC, KFACAdam

CONTESTANTS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD, momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "KFACAdam": lambda model: KFACAdam(model),
    "K-FAC": lambda model: KFAC(model, lr=0.01, damping=0.1),
    "K-FAC, 16-bit factors": lambda model: KFAC(model, lr=0.01, damping=0.1, factor_dtype="bfloat16"),
}
# Of the optimizer's state: what diagnostics() calls it.
KINDS = ("factors", "sums", "inverses", "gradients", "moments")


@dataclass(frozen=True)
class Size:
    """Of a transformer and its batch."""

    blocks: int = 6
    width: int = 256
    heads: int = 4
    tokens: int = 128
    batch: int = 8


class Block(nn.Module):
    """Attention and two layers, each behind a norm."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.before_attention, self.before_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        h = self.before_attention(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.before_layers(x))))


class Transformer(nn.Module):
    """Blocks one after the other; each runs again in the backward pass if it is checkpointed."""

    def __init__(self, size: Size, checkpointed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


@dataclass(frozen=True)
class Usage:
    """Bytes of a training step.

    Attributes:
        parameters: of the model.
        state: of the optimizer between steps, all of it.
        kinds: what K-FAC's diagnostics say of it.
        activations: what the forward pass leaves alive, without its result.
        backward: most at once until the backward pass is over, all of the above and gradients included.
        step: most at once in the optimizer's step.
    """

    parameters: int
    state: int
    kinds: dict[str, int]
    activations: int
    backward: int
    step: int

    @property
    def peak(self) -> int:
        """Most at once."""
        return max(self.backward, self.step)


def measure(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    size: Size | None = None,
    checkpointed: bool = False,
    autocast: bool = False,
) -> Usage:
    """Bytes of the third training step."""
    size = size or Size()

    def precision() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    with MemoryMeter() as meter:
        torch.manual_seed(0)
        model = Transformer(size, checkpointed)
        parameters = meter.current
        optimizer = make_optimizer(model)
        x, y = torch.randn(2, size.batch, size.tokens, size.width).unbind()
        batch = x.untyped_storage().nbytes()
        for _ in range(3):
            optimizer.zero_grad()
            state = meter.current - parameters - batch
            meter.restart()
            with precision():
                outputs = model(x)
            activations = meter.current - state - parameters - batch - outputs.nbytes
            nn.functional.mse_loss(outputs.float(), y).backward()
            del outputs
            backward = meter.peak - batch
            meter.restart()
            optimizer.step()
            step = meter.peak - batch
        kinds = optimizer.diagnostics()["memory"] if isinstance(optimizer, KFAC) else {}
    return Usage(parameters, state, {kind: kinds[kind] for kind in KINDS if kind in kinds}, activations, backward, step)


def table(found: dict[tuple[str, ...], Usage]) -> str:
    """A table in Markdown, in mebibytes; a row for each name, of as many columns as names have parts."""
    columns = ("parameters", "state", *KINDS, "activations", "backward", "step", "peak")
    names = len(next(iter(found)))
    lines = ["| " + " | ".join([*[""] * names, *columns]) + " |", "|" + "---|" * names + "--:|" * len(columns)]
    for name, usage in found.items():
        numbers = [usage.kinds.get(c) if c in KINDS else getattr(usage, c) for c in columns]
        cells = ["" if number is None else f"{number / 2**20:,.1f}" for number in numbers]
        lines.append("| " + " | ".join([*name, *cells]) + " |")
    return "\n".join(lines)


def main(arguments: Iterable[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Size()
    for name in ("blocks", "width", "heads", "tokens", "batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    size = Size(**vars(parser.parse_args(None if arguments is None else list(arguments))))
    found = {
        ("bfloat16" if autocast else "float32", "yes" if checkpointed else "no", name): measure(
            make, size, checkpointed, autocast
        )
        for autocast in (False, True)
        for checkpointed in (False, True)
        for name, make in CONTESTANTS.items()
    }
    print(f"{size}; MiB; columns one to three: autocast, checkpointed, optimizer\n")
    print(table(found))


if __name__ == "__main__":
    main()
