"""A step that is captured or compiled (conventions 18 and 19)."""

from __future__ import annotations

import pytest
import torch
from support.contenders import Contender, Fails, batch, convention, loss_of, net, train, vector
from support.helpers import relative_error
from support.launches import counted_launches, nobody_waits
from torch import Tensor, nn


@convention(18, AdamW=Fails("on a CPU it raises", "supported devices"))
def test_capturable(contender: Contender) -> None:
    """Counters are tensors, and the numbers are those of a step that is not to be captured."""
    for options in contender.tails:
        results = []
        for capturable in (False, True):
            model = net()
            optimizer = contender(model, capturable=capturable, lr=torch.tensor(0.1, dtype=torch.float64), **options)
            results.append(train(model, optimizer, 3))
            steps = [optimizer.state[p]["step"] for p in model.parameters()]
            assert all(isinstance(step, Tensor) and step.dtype == torch.float32 and step == 3 for step in steps)
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@convention(18, AdamW=Fails("reads its counter, with capturable=False", "reads from the device"))
def test_a_step_reads_nothing_back(contender: Contender) -> None:
    """On the kernels, with a learning rate on the device; what kernels would write is counted as certified."""
    options = {"capturable": True, "lr": torch.tensor(1e-3)} if contender.is_kfac else {}
    model = net(torch.float32)
    with counted_launches():
        how = {} if contender.is_adam else {"inverse": "factored"}
        optimizer = contender(model, settings={"backend": "triton", **how}, weight_decay=0.1, **options)
        train(model, optimizer, 3)
        for step in range(3, 6):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            for group in optimizer.engine.curvature.inverse_groups if contender.is_kfac else ():
                group.refused.arrived()
            with nobody_waits():
                optimizer.step()


@convention(19)
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_step(contender: Contender, whole: bool) -> str:
    """The step alone, and a function that has forward, backward and step; after two steps nothing is compiled again."""
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = net()
        lr = torch.tensor(0.1, dtype=torch.float64)
        optimizer = contender(model, lr=lr)

        def step_of(x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer = optimizer, model: nn.Module = model) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        if compiled and whole:
            step_of = torch.compile(step_of, backend="aot_eager")
        elif compiled:
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore[method-assign]
        for seed in range(5):
            with torch._dynamo.config.patch(error_on_recompile=seed >= 2):
                step_of(*batch(model, seed))
            lr.mul_(0.9)
        results.append(vector(model))
    error = relative_error(results[1], results[0])
    assert error <= (1e-12 if contender.is_kfac else 1e-4)  # compiled, AdamW corrects its bias in float32
    return "pass" if error <= 1e-12 else f"pass: off by {error:.0e}"
