"""What a step of the engine asks of the device: as many launches for 48 layers as for 12, and no wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from support.helpers import relative_error
from support.launches import CountedOperators, counted_launches, nobody_waits
from torch import Tensor, nn

from kfac_triton import KFAC, KFACAdam
from kfac_triton.kernels import device_tables

WIDTH, TOKENS = 16, 6
REFRESH = ("prepare_kernel", "factor_kernel", "energy_kernel", "plan_kernel", "grow_kernel", "conclude_kernel", "update_kernel")


@pytest.fixture(autouse=True)
def _no_tables_of_other_tests() -> None:
    """Tables are kept for later steps, the last used ones: those of other tests must not crowd out those that are counted."""
    device_tables._copies.cache_clear()


class Transformer(nn.Module):
    """The Linear layers of a transformer of this depth, with its four shapes; attention itself has no weights."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(WIDTH, 3 * WIDTH),
                    "out": nn.Linear(WIDTH, WIDTH),
                    "up": nn.Linear(WIDTH, 4 * WIDTH),
                    "down": nn.Linear(4 * WIDTH, WIDTH),
                }
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            q, k, v = block["qkv"](x).chunk(3, -1)
            x = x + block["out"](nn.functional.scaled_dot_product_attention(q, k, v))
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x).movedim(-1, 1)


def _backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    tokens = torch.randint(10, (2, TOKENS))
    nn.functional.cross_entropy(model(tokens), tokens).backward()


def _forget_refused(optimizer: KFAC) -> None:
    """No refactoring: where kernels are only counted, what they would have written is not certified."""
    for group in optimizer.engine.curvature.inverse_groups:
        assert group.refused is not None
        group.refused.arrived()


def _refresh_launches(depth: int, inverse: str) -> tuple[Counter[str], Counter[str]]:
    """Kernel launches, and torch operators beside them, of one step: statistics, inverses, preconditioning."""
    torch.manual_seed(0)
    model = Transformer(depth)
    with counted_launches() as counts:
        optimizer = KFAC(model, loss_terms="tokens", inverse=inverse, backend="triton", skip="embedding")
        for _ in range(2):
            _backward(model, optimizer)
            optimizer.engine.precondition(lambda _: 0.1)
            _forget_refused(optimizer)
        counts.clear()
        _backward(model, optimizer)
        device_tables._copies.cache_clear()  # a table of the same numbers may be there from an earlier test, or may not
        with CountedOperators() as operators:
            optimizer.engine.precondition(lambda _: 0.1)
    return counts, operators.counts


@pytest.mark.parametrize("inverse", ["newton_schulz", "factored"])
def test_launches_do_not_depend_on_the_depth(inverse: str, show: Callable[..., None]) -> None:
    (few, beside_few), (many, beside_many) = (_refresh_launches(depth, inverse) for depth in (12, 48))
    torch_counts = {}
    for depth in (12, 48):
        model = Transformer(depth)
        optimizer = KFAC(model, loss_terms="tokens", backend="torch", skip="embedding")
        _backward(model, optimizer)
        with CountedOperators() as operators:
            optimizer.engine.precondition(lambda _: 0.1)
        torch_counts[depth] = sum(operators.counts.values())
    show(
        f"\nOne curvature refresh, inverse={inverse!r}, transformers of 12 and 48 blocks (49 and 193 layers):",
        f"  kernel launches {sum(few.values())} and {sum(many.values())}: {dict(many)}",
        f"  torch operators beside them {sum(beside_few.values())} and {sum(beside_many.values())}",
        f"  torch backend, operators {torch_counts[12]} and {torch_counts[48]}, statistics in backward not counted",
    )
    assert few == many
    if inverse == "factored":  # stacks of four sizes
        assert sum(count for name, count in few.items() if name in REFRESH) == 24
    # The head's 10 outputs cannot be copied 16 bytes at a time, and go by themselves.
    assert few["covariance_kernel"] == 2
    assert sum(beside_few.values()) == sum(beside_many.values())


@pytest.mark.parametrize("inverse", ["newton_schulz", "factored"])
@pytest.mark.parametrize("statistics_every", [1, 2])
def test_a_step_makes_nobody_wait(inverse: str, statistics_every: int) -> None:
    model = Transformer(2)
    with counted_launches():
        optimizer = KFAC(
            model, loss_terms="tokens", inverse=inverse, statistics_every=statistics_every, backend="triton", lr=1e-3
        )
        for step in range(7):
            _backward(model, optimizer)
            if step < 3:
                optimizer.step()
                continue
            _forget_refused(optimizer)
            with nobody_waits():
                optimizer.step()


def _adam_steps(depth: int, refresh_every: int) -> list[tuple[Counter[str], Counter[str]]]:
    """Launches and torch operators of two steps of KFACAdam, after those that may wait; every other one refreshes, or all."""
    torch.manual_seed(0)
    model, result = Transformer(depth), []
    with counted_launches() as counts:
        optimizer = KFACAdam(model, refresh_every=refresh_every, refresh_warmup=0, backend="triton", stats_fraction=1.0)
        for _ in range(2):
            _backward(model, optimizer)
            optimizer.step()
        for _ in range(2):
            _backward(model, optimizer)
            counts.clear()
            device_tables._copies.cache_clear()
            with nobody_waits(), CountedOperators() as operators:
                optimizer.step()
            result.append((counts.copy(), operators.counts))
    return result


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_steps_of_kfac_adam_do_not_depend_on_the_depth_and_make_nobody_wait(
    refresh_every: int, show: Callable[..., None]
) -> None:
    few, many = _adam_steps(12, refresh_every), _adam_steps(48, refresh_every)
    for refreshes, here, there in zip((True, refresh_every == 1), few, many, strict=True):
        show(
            f"\nA step of KFACAdam with{'' if refreshes else 'out'} a refresh, transformers of 12 and 48 blocks:",
            f"  kernel launches {sum(here[0].values())} and {sum(there[0].values())}: {dict(there[0])}",
            f"  torch operators {sum(here[1].values())} and {sum(there[1].values())}: {dict(there[1].most_common(12))}",
        )
        assert here[0] == there[0]
        assert sum(here[1].values()) == sum(there[1].values())


def test_the_guard_has_teeth() -> None:
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: bool(x.all()), lambda: x.nonzero(), lambda: x.tolist(), lambda: x[x > 0]):
        with pytest.raises(AssertionError, match="device"), nobody_waits():
            wait()


def test_a_compiled_step_is_an_eager_step() -> None:
    """On the kernels: compiled passes are summed in backward, eager ones wait; training is the same."""
    trained = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch.compiler.reset()
        model = Transformer(1)
        optimizer = KFAC(model, lr=0.1, loss_terms="tokens", backend="triton", skip="embedding")
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for _ in range(3):
            optimizer.zero_grad()
            tokens = torch.randint(10, (2, TOKENS))
            nn.functional.cross_entropy(run(tokens), tokens).backward()
            assert all(bool(s.deferred) != compiled for s in optimizer.engine.statistics)
            optimizer.step()
        trained.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert relative_error(trained[1], trained[0]) <= 1e-5
