"""Steps that a CUDA graph could record: replays are steps, bit for bit, and what cannot be recorded is refused.

Recorded and replayed on a CPU (see `recording`): what the host does between two launches happens once, as on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from support.graphed import tiny
from support.helpers import TokenModel, conv_net
from support.recording import LOSS, REPLAYS, WARM, Case, Run, Tape, equal, recorded, rows
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner
from kfac_triton.curvature.inverse import ACCEPT


class Transformer(nn.Module):
    """Embedding, attention, norm, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x)).movedim(-1, 1)


class Gated(nn.Module):
    """A fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.head = nn.Linear(5, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.fused(x).chunk(3, -1)
        return self.head(torch.sigmoid(gate) * up + down)


def _tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(10, (3, 6)), torch.randint(10, (3, 6))


GROUPED = lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 4))  # noqa: E731
CASES = {
    "mlp": Case(),
    "Newton-Schulz": Case(options={"inverse": "newton_schulz"}),
    "nesterov": Case(options={"nesterov": True, "weight_decay": 0.1}),
    "adamw": Case(options={"tail": "adamw", "weight_decay": 0.1}),
    "accumulation and clipping": Case(passes=2, clip=True),
    "dropout": Case(lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(), nn.Tanh(), nn.Linear(6, 4))),
    "transformer": Case(Transformer, _tokens, {"loss_terms": "tokens"}),
    "fused projection": Case(Gated, options={"split": {"fused": 3}}),
    "diagonals": Case(options={"max_factor_size": 6}),
    "drawn labels": Case(options={"fisher": "mc", "loss": LOSS}),
    "drawn outputs": Case(
        batch=lambda: (torch.randn(12, 5), torch.randn(12, 4)), options={"fisher": "mc", "loss": nn.MSELoss()}
    ),
    "Gauss-Newton": Case(options={"fisher": "ggn", "loss": nn.CrossEntropyLoss(ignore_index=2)}),
}
SLOW = {
    "adamw one by one": Case(options={"tail": "adamw", "maximize": True, "foreach": False}),
    "tokens": Case(TokenModel, rows(3, 5), {"weight_sharing": "reduce"}),
    "summed rows": Case(batch=lambda: (torch.randn(400, 5), torch.randint(4, (400,)))),
    "blocks": Case(options={"max_factor_size": 6, "oversize": "block"}),
    "convolutions": Case(lambda: conv_net(torch.float32), rows(2, 9, 9)),
    "channel groups": Case(GROUPED, rows(4, 5, 5)),
    "whole norms, drawn labels": Case(
        Transformer, _tokens, {"loss_terms": "tokens", "norms": "full", "fisher": "mc", "loss": LOSS}
    ),
}
QUICK = ("mlp", "transformer", "diagonals")  # AdamW is replayed below
ALL = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in (*CASES, *SLOW)]


@pytest.mark.parametrize("name", ALL)
def test_replays_are_steps(name: str) -> None:
    eager, graph = (Run({**CASES, **SLOW}[name]) for _ in range(2))
    eager.steps(WARM + 1 + REPLAYS)
    graph.steps(WARM)
    tape = graph.record()
    before = nn.utils.parameters_to_vector(graph.model.parameters()).detach()
    graph.replay(REPLAYS)
    assert not torch.equal(before, nn.utils.parameters_to_vector(graph.model.parameters()))
    assert equal(eager, graph)
    assert "covariance_kernel" in tape.launches


@pytest.mark.slow
def test_steps_and_replays_take_turns() -> None:
    """Steps outside have gradients and temporaries of their own, and leave those of the graph alone."""
    eager, graph = Run(Case()), Run(Case())
    eager.steps(WARM + 7)
    graph.steps(WARM)
    graph.record()
    for _ in range(2):
        graph.replay(2)
        graph.steps(1)
    assert equal(eager, graph)


@pytest.mark.parametrize("tail", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
def test_a_rate_in_a_tensor_is_live_and_a_number_is_not(tail: str) -> None:
    """A scheduler fills the tensor between replays; what it does with a number no replay sees."""
    for lr, is_live in ((torch.tensor(0.1), True), (0.1, False)):
        eager, graph = (Run(Case(tiny, options={"tail": tail, "weight_decay": 0.1}), lr=_copy(lr)) for _ in range(2))
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5) for run in (eager, graph)]
        for run in (eager, graph):
            run.steps(WARM)
        eager.steps(1)
        graph.record()
        for _ in range(REPLAYS):
            for scheduler in schedulers:
                scheduler.step()
            eager.steps(1)
            graph.replay()
        assert equal(eager, graph) == is_live


def _copy(lr: float | Tensor) -> float | Tensor:
    return lr.clone() if isinstance(lr, Tensor) else lr


def _preconditioned(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    KFACPreconditioner(model, damping=0.1, inverse="factored", backend="triton").attach(optimizer)
    return optimizer


@pytest.mark.slow
def test_a_preconditioner_in_front_of_another_optimizer() -> None:
    eager, graph = Run(Case(), _preconditioned), Run(Case(), _preconditioned)
    eager.steps(WARM + 1 + REPLAYS)
    graph.steps(WARM)
    graph.record()
    graph.replay(REPLAYS)
    pairs = zip(eager.model.parameters(), graph.model.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("tail", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_bad_batch_is_dropped_in_a_replay_as_in_a_step(tail: str) -> None:
    eager, graph = (Run(Case(tiny, options={"tail": tail})) for _ in range(2))
    for run in (eager, graph):
        run.steps(WARM)
    eager.steps(1)
    graph.record()
    for step in (eager.step, graph.tape.replay):  # type: ignore[union-attr]
        eager.batch[0].fill_(torch.nan)
        graph.batch[0].fill_(torch.nan)
        run = eager if step == eager.step else graph
        before = _moved(run)
        step()
        assert all(torch.equal(x, y) for x, y in zip(before, _moved(run), strict=True))
    assert graph.optimizer.engine.dropped_statistics.tolist() == [1]
    eager.steps(1)
    graph.replay()
    assert equal(eager, graph)


def _moved(run: Run) -> list[Tensor]:
    """Copies of what the tail changes: parameters, moments and counters."""
    kept = [x for p in run.model.parameters() for x in run.optimizer.state[p].values() if x is not None]
    return [x.detach().clone() for x in (*run.model.parameters(), *kept)]


def test_an_inverse_that_fails_in_a_replay_stays_and_the_next_step_outside_mends_it() -> None:
    """A warm refresh from an inverse this far off is refused, so it stays far off."""
    graph = Run(Case(tiny), damping=1e-3, ema_decay=0.0)
    graph.steps(WARM)
    graph.record()
    stacks = graph.optimizer.engine.curvature.inverses
    before = [x.values.clone() for x in stacks]
    for _ in range(3):
        graph.load()
        graph.batch[0].mul_(1e4)
        graph.tape.replay()  # type: ignore[union-attr]
    failed = [x.fallbacks == 3 for x in stacks]
    assert any(flags.any() for flags in failed)
    for stack, old, flags in zip(stacks, before, failed, strict=True):
        assert torch.equal(stack.values[flags], old[flags])
        assert (stack.residual <= ACCEPT).all()
    graph.load()
    graph.batch[0].mul_(1e4)
    graph.step()
    for stack, old, flags in zip(stacks, before, failed, strict=True):
        assert (stack.residual <= ACCEPT).all()
        assert all(not torch.equal(x, y) for x, y in zip(stack.values[flags], old[flags], strict=True))


def test_what_the_host_counts_stands_still_and_the_device_counts_on() -> None:
    case = Case(tiny, options={"tail": "adamw"})
    graph = Run(case)
    graph.steps(WARM)
    graph.record()
    graph.replay(REPLAYS)
    done = WARM + 1 + REPLAYS
    assert graph.optimizer.engine.progress.steps == WARM + 1
    assert all(graph.optimizer.state[p]["step"] == done for p in graph.model.parameters())
    diagnostics = graph.optimizer.diagnostics()
    assert [x["updates"] for x in diagnostics["layers"].values()] == [done]
    saved = graph.optimizer.state_dict()
    resumed = Run(case)
    resumed.model.load_state_dict(graph.model.state_dict())
    resumed.optimizer.load_state_dict(saved)
    resumed.seed = graph.seed
    graph.steps(2)
    resumed.steps(2)
    assert equal(graph, resumed)


@pytest.mark.slow
def test_the_rows_of_stats_fraction_are_those_of_the_recorded_step() -> None:
    eager, graph = (Run(Case(options={"stats_fraction": 0.5})) for _ in range(2))
    for run in (eager, graph):
        run.steps(WARM)
    graph.record()
    graph.replay(REPLAYS)
    for _ in range(1 + REPLAYS):
        eager.optimizer.engine.resume(eager.optimizer.engine.progress.at_step(WARM))
        eager.steps(1)
    assert equal(eager, graph)


@pytest.mark.slow
def test_of_a_compiled_model_the_step_alone_can_be_recorded() -> None:
    """Its backward pass sums at once, in buffers that stay where they are; gradients must, too."""
    trained = []
    for is_graph in (False, True):
        torch.compiler.reset()
        run = Run(Case())
        model, run.model = run.model, torch.compile(run.model, backend="aot_eager", fullgraph=True)
        run.steps(WARM)
        tape = Tape()
        for step in range(1 + REPLAYS):
            run.load()
            for p in model.parameters():
                p.grad.zero_()  # type: ignore[union-attr]
            run.optimizer.forget_statistics()
            LOSS(run.model(run.batch[0]), run.batch[1]).backward()
            if is_graph and step == 0:
                with recorded() as tape:
                    run.optimizer.step()
            elif is_graph:
                tape.replay()
            else:
                run.optimizer.step()
        trained.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*trained)
