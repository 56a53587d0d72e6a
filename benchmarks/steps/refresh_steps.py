"""How many Newton steps the warm refreshes of a training run take, and whether their certificates hold.

    python -m benchmarks.steps.refresh_steps                            # small GPT, autoencoder; 200 steps for each damping
    python -m benchmarks.steps.refresh_steps --models autoencoder --width 1   # with its full widths: half an hour

K-FAC trains on the CPU with the reference of `factored_newton_refresh`, and updates curvature and inverses in every step. Each
refresh of each matrix is one observation. The steps do not depend on the device: a GPU runs the same rule.

Errors ||I - B^1/2 X B^1/2|| are computed in float64, for every `--check-every`-th step of training. A certificate is missed if
an inverse is accepted and its error is above what is accepted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.convergence import problems, training
from benchmarks.convergence.optimizers import make_kfac
from kfac_triton import KFAC
from kfac_triton.cli.demo import autoencoder
from kfac_triton.cli.demo.digits import load_images
from kfac_triton.cli.demo.training import CONTESTANTS, shuffled_batches
from kfac_triton.curvature.inverse import ACCEPT
from kfac_triton.kernels import ops
from kfac_triton.kernels.certificate import damped
from kfac_triton.kernels.factored_newton.reference import factored_newton_refresh_reference

BLIND = 4  # steps that are launched outside of a graph, where the host does not look
Stacks = list[Tensor]
Refresh = Callable[[Stacks, Stacks, Stacks, Stacks, float, int], None]


@dataclass(frozen=True)
class Observation:
    """One refresh of one matrix.

    Attributes:
        side: of the matrix, padded.
        steps: Newton steps.
        iterated: how many of them took the power iteration.
        certificate: bound on the error that the refresh gave; above `ACCEPT` the inverse is refused.
        error: the error in float64; None where it was not computed.
    """

    side: int
    steps: int
    iterated: int
    certificate: float
    error: float | None


def energy_error(target: Tensor, root: Tensor, enough: float) -> float:
    """The 2-norm of I - B^1/2 T^T T B^1/2; or the Frobenius norm, which is above it and cheaper, if that is below `enough`."""
    product = root.double() @ torch.linalg.cholesky(target.double())
    gap = torch.eye(len(target), dtype=torch.float64) - product.mT @ product
    bound = float(torch.linalg.matrix_norm(gap))
    return bound if bound <= enough else float(torch.linalg.matrix_norm(gap, 2))


@dataclass
class Recorder:
    """Takes the place of `ops.factored_newton_refresh`: the same results, matrix by matrix, with each refresh observed.

    Attributes:
        refresh: the implementation, from a module that calls `root_energy` in each step and `_spectral_bounds` in the power
            iteration.
        most_steps: largest number of Newton steps; None for that of the call.
        checks: whether errors are computed now.
        observations: so far.
    """

    refresh: Refresh = factored_newton_refresh_reference
    most_steps: int | None = None
    checks: bool = True
    observations: list[Observation] = field(default_factory=list)

    def __call__(
        self,
        factors: Stacks,
        dampings: Stacks,
        roots: Stacks,
        residuals: Stacks,
        tolerance: float = 0.05,
        max_steps: int = 8,
        backend: str = "auto",
    ) -> None:
        """See `kfac_triton.kernels.ops.factored_newton_refresh`, as it is called where the host reads the residuals."""
        for stack in zip(factors, dampings, roots, residuals, strict=True):
            for one in zip(*(x.split(1) for x in stack), strict=True):
                self._observe(*one, tolerance, self.most_steps or max_steps)

    def _observe(
        self, factor: Tensor, damping: Tensor, root: Tensor, residual: Tensor, tolerance: float, max_steps: int
    ) -> None:
        """Refreshes the only matrix of a stack."""
        is_cold = not bool(root.any())  # its inverse was refused: not a refresh
        with self._counted() as calls:
            self.refresh([factor], [damping], [root], [residual], tolerance, max_steps)
        if is_cold:
            return
        certificate, error = float(residual), None
        if self.checks and certificate <= ACCEPT:
            error = energy_error(damped(factor, damping)[0], root[0], certificate)
        steps, iterated = calls["root_energy"], calls["_spectral_bounds"]
        self.observations.append(Observation(factor.shape[-1], steps, iterated, certificate, error))

    @contextmanager
    def _counted(self) -> Iterator[dict[str, int]]:
        """Counts the calls of the two functions."""
        module = getattr(self.refresh, "__globals__")  # noqa: B009 (mypy knows no such attribute of a callable)
        calls = {"root_energy": 0, "_spectral_bounds": 0}

        def counted(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        with mock.patch.dict(module, {name: partial(counted, name, module[name]) for name in calls}):
            yield calls


def train_gpt(damping: float, steps: int, seed: int, width: float, decay: float | None) -> Iterator[float]:
    """The loss of each step of the transformer of the races, on Python's help texts; a miniature if the width is below 1/2."""
    problem = problems.LARGE[0].miniature() if width < 0.5 else problems.LARGE[0]
    settings = {
        "tail": "adamw", "betas": [0.8, 0.9], "momentum": 0.0, "kl_clip": None, "norms": "skip", "loss_terms": "tokens",
        "skip": "positions", "rest_lr": 4e-3, "lr": 6e-3, "ema_decay": 0.95 if decay is None else decay, "damping": damping,
        "statistics_every": 1, "inverse_every": 1, "inverse": "factored",
    }  # fmt: skip
    model = problem.build(seed)
    optimizer = make_kfac(model, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    batches = problem.batches(seed)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * training.schedule(step, steps)
        yield float(training.train_step(model, optimizer, next(batches), settings))
    optimizer.close()


def train_autoencoder(damping: float, steps: int, seed: int, width: float, decay: float | None) -> Iterator[float]:
    """The loss of each step of the autoencoder of the demo, with its settings, its hidden layers scaled by the width."""
    *hidden, last = autoencoder.WIDTHS[1:]
    code = autoencoder.CODE_WIDTH
    widths = (last, *(side if side == code else max(code + 1, int(width * side)) for side in hidden), last)
    with mock.patch.object(autoencoder, "WIDTHS", widths):
        model = autoencoder.build_autoencoder(seed)
    settings = CONTESTANTS["K-FAC"].settings | {"damping": damping, "inverse": "factored"}
    optimizer = KFAC(model, lr=1.0, **settings | ({} if decay is None else {"ema_decay": decay}))
    batches = shuffled_batches(load_images("mnist", 4000, seed).train, 1000, seed)
    for _ in range(steps):
        batch = next(batches)
        optimizer.zero_grad()
        loss = autoencoder.reconstruction_loss(model(batch), batch)
        loss.backward()
        optimizer.step()
        yield loss.item()
    optimizer.close()


MODELS = {"gpt": train_gpt, "autoencoder": train_autoencoder}
DAMPINGS = {"gpt": (0.03, 0.003), "autoencoder": (3.0, 0.03)}  # the second of each is hard


def measure(
    name: str,
    damping: float,
    steps: int,
    seed: int = 0,
    check_every: int = 1,
    width: float = 0.5,
    decay: float | None = None,
    most_steps: int | None = None,
    refresh: Refresh = factored_newton_refresh_reference,
) -> tuple[list[Observation], float]:
    """The observations of a training run, and its last loss.

    Args:
        name: one of `MODELS`.
        damping: of K-FAC.
        steps: of training.
        seed: of weights and batches.
        check_every: steps of training between those in which errors are computed.
        width: scales the hidden layers of the autoencoder; below 1/2 the GPT is a miniature.
        decay: of the moving averages of the factors; None for that of the races or the demo.
        most_steps: of a refresh, see `Recorder`.
        refresh: another rule to compare with, see `Recorder`.
    """
    recorder, loss = Recorder(refresh, most_steps), float("nan")
    torch.manual_seed(seed)
    with mock.patch.object(ops, "factored_newton_refresh", recorder):
        # A step of training runs when its loss is asked for.
        run = MODELS[name](damping, steps, seed, width, decay)
        for step in range(steps):
            recorder.checks = (step + 1) % check_every == 0
            loss = next(run)
        run.close()  # type: ignore[attr-defined]
    return recorder.observations, loss


def summary(observations: list[Observation]) -> dict[str, float]:
    """Shares of the refreshes, and counts of what should not happen."""
    count = max(1, len(observations))

    def share(holds: Callable[[Observation], bool]) -> float:
        return sum(map(holds, observations)) / count

    checked = [o for o in observations if o.error is not None]
    return {
        "refreshes": len(observations),
        "one": share(lambda o: o.steps == 1),
        "two": share(lambda o: o.steps == 2),
        "three": share(lambda o: o.steps == 3),
        "four": share(lambda o: o.steps == BLIND),
        "more": share(lambda o: o.steps > BLIND),
        "mean": sum(o.steps for o in observations) / count,
        "iterated": share(lambda o: o.iterated > 0),
        "fallbacks": sum(not o.certificate <= ACCEPT for o in observations),
        "checked": len(checked),
        "above": sum(o.error > o.certificate for o in checked if o.error is not None),
        "missed": sum(o.error > ACCEPT for o in checked if o.error is not None),
        "worst": max((o.error for o in checked if o.error is not None), default=0.0),
    }


_COLUMNS = (
    "model, damping", "refreshes", "1 step", "2", "3", "4", "more", "mean", "with power iteration", "fallbacks",
    "errors computed", "largest", "above the certificate", "missed", "last loss",
)  # fmt: skip
HEADER = f"| {' | '.join(_COLUMNS)} |\n|---{'|--:' * (len(_COLUMNS) - 1)}|"


def row(label: str, found: dict[str, float], loss: float) -> str:
    """Markdown."""
    shares = [f"{found[name]:.1%}" for name in ("one", "two", "three", "four", "more")]
    cells = [f"{found['refreshes']:,}", *shares, f"{found['mean']:.2f}", f"{found['iterated']:.1%}", str(found["fallbacks"])]
    cells += [f"{found['checked']:,}", f"{found['worst']:.3f}", str(found["above"]), str(found["missed"]), f"{loss:.4g}"]
    return f"| {label} | " + " | ".join(cells) + " |"


def main() -> None:
    """Trains, and prints a row for each run as it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shown = "(default: %(default)s)"
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help=shown)
    parser.add_argument("--dampings", nargs="+", type=float, help=f"(default: {DAMPINGS})")
    parser.add_argument("--steps", type=int, default=200, help=f"of training {shown}")
    parser.add_argument("--seed", type=int, default=0, help=shown)
    parser.add_argument("--check-every", type=int, default=5, help=f"steps between those with errors in float64 {shown}")
    parser.add_argument("--width", type=float, default=0.5, help=f"of the autoencoder's hidden layers, to scale them {shown}")
    parser.add_argument("--decay", type=float, help="of the factors' averages (default: GPT 0.95, autoencoder 0.5)")
    parser.add_argument("--most-steps", type=int, help="Newton steps of a refresh; 4 are launched on a GPU (default: 8)")
    parser.add_argument("--json", help="file to append the observations to, a line for each run")
    arguments = parser.parse_args()
    print(HEADER, flush=True)
    for name in arguments.models:
        for damping in arguments.dampings or DAMPINGS[name]:
            settings = name, damping, arguments.steps, arguments.seed, arguments.check_every, arguments.width
            observations, loss = measure(*settings, decay=arguments.decay, most_steps=arguments.most_steps)
            print(row(f"{name}, {damping:g}", summary(observations), loss), flush=True)
            if arguments.json:
                with open(arguments.json, "a") as file:
                    line = {"model": name, "damping": damping, "loss": loss, "observations": [*map(asdict, observations)]}
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
