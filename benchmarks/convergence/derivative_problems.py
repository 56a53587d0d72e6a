"""Problems whose losses contain derivatives by the input: Poisson's equation by a network, and energies with forces.

Each loss is the mean square of `residuals`, that is nn.MSELoss() of them and zeros. So every optimizer minimizes the same
number, those included that need outputs and targets. Networks and data have double precision, as usual where the loss falls
by many orders of magnitude. The data are drawn once for a seed, and every step takes all of them: the loss is then one
function, and its values at different steps can be compared without the noise of batches.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

# Raise it with every change that makes old curves incomparable and that the numbers of a problem do not show.
REVISION = 1
DTYPE = torch.float64
HELD_OUT_SEED = 1_000_003

Data = tuple[Tensor, ...]


@dataclass(frozen=True)
class DerivativeProblem(ABC):
    """A network, its data, and a loss with derivatives by the input.

    Attributes:
        name: For the command line.
        title: For tables and pictures.
        error_name: What `error` returns.
        widths: Of the hidden layers.
        steps: Steps of Adam.
    """

    name: str
    title: str
    error_name: str
    widths: tuple[int, ...]
    steps: int

    @property
    def version(self) -> str:
        """Fingerprint of everything that a curve depends on beside optimizer and seed."""
        definition = json.dumps([REVISION, asdict(self)], sort_keys=True)
        return hashlib.sha256(definition.encode()).hexdigest()[:12]

    def build(self, seed: int) -> nn.Module:
        """The network with the seed's initial weights; the global random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network().to(DTYPE)

    def data(self, seed: int) -> Data:
        """The seed's data."""
        return self.draw(torch.Generator().manual_seed(seed))

    @abstractmethod
    def network(self) -> nn.Module:
        """A network with random weights."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Data:
        """Random data."""

    @abstractmethod
    def residuals(self, model: nn.Module, data: Data) -> Tensor:
        """Differentiable residuals of shape (terms, residuals of each term), whose mean square is the loss."""

    @abstractmethod
    def error(self, model: nn.Module) -> float:
        """Relative error on data that are not trained on."""


def tanh_network(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """A perceptron with one output, in the initialization of Glorot and Bengio."""
    sizes = [inputs, *widths, 1]
    layers: list[nn.Module] = []
    for size, following in itertools.pairwise(sizes):
        layer = nn.Linear(size, following)
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def laplacian(u: Tensor, x: Tensor) -> Tensor:
    """The sum of the second derivatives of u (N,) with respect to x (N, d), for each row."""
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    parts = [torch.autograd.grad(slope[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(x.shape[1])]
    return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class Poisson(DerivativeProblem):
    """-Laplace(u) = f on the unit square, u given on the boundary (a physics-informed network).

    The loss is half the mean square of the residual inside plus `boundary_weight` times half of that on the boundary.

    Attributes:
        interior: Points inside.
        boundary: Points on the boundary.
        boundary_weight: Of the loss on the boundary.
        waves: (amplitude, half waves in x, half waves in y, phase in x) of the summands of the solution. Those with a phase do
            not vanish on the boundary.
    """

    interior: int = 900
    boundary: int = 100
    boundary_weight: float = 100.0
    waves: tuple[tuple[float, int, int, float], ...] = ((1.0, 1, 1, 0.3), (0.5, 2, 1, 0.0), (0.25, 3, 2, 0.5))

    def network(self) -> nn.Module:
        """The approximation of u."""
        return tanh_network(2, self.widths)

    def draw(self, generator: torch.Generator) -> Data:
        """Points inside and points on the boundary, a quarter of them on each side."""
        inside = torch.rand(self.interior, 2, generator=generator, dtype=DTYPE)
        edge = torch.rand(self.boundary, 2, generator=generator, dtype=DTYPE)
        point = torch.arange(self.boundary)
        side = point % 4
        edge[point, side // 2] = (side % 2).to(DTYPE)
        return inside, edge

    def solution(self, x: Tensor) -> Tensor:
        """The exact u."""
        return torch.stack([wave for _, wave in self._waves(x)]).sum(0)

    def source(self, x: Tensor) -> Tensor:
        """The f of the exact u."""
        return torch.stack([factor * wave for factor, wave in self._waves(x)]).sum(0)

    def _waves(self, x: Tensor) -> list[tuple[float, Tensor]]:
        """Eigenvalue of -Laplace and value of each summand of u."""
        return [
            (math.pi**2 * (p**2 + q**2), a * torch.sin(math.pi * p * x[:, 0] + shift) * torch.sin(math.pi * q * x[:, 1]))
            for a, p, q, shift in self.waves
        ]

    def residuals(self, model: nn.Module, data: Data) -> Tensor:
        """Those inside and those on the boundary, by two calls of the model."""
        inside, edge = data
        x = inside.detach().requires_grad_()
        equation = laplacian(model(x)[:, 0], x) + self.source(inside)
        value = model(edge)[:, 0] - self.solution(edge)
        # The mean over all points has to be the sum of two means.
        points = len(inside) + len(edge)
        weights = math.sqrt(points / (2 * len(inside))), math.sqrt(self.boundary_weight * points / (2 * len(edge)))
        return torch.cat([equation * weights[0], value * weights[1]])[:, None]

    def error(self, model: nn.Module) -> float:
        """Relative L2 error of u on a grid of 41 x 41 points."""
        side = torch.linspace(0, 1, 41, dtype=DTYPE)
        grid = torch.cartesian_prod(side, side)
        with torch.no_grad():
            exact = self.solution(grid)
            return float((model(grid)[:, 0] - exact).norm() / exact.norm())


class EnergyNetwork(nn.Module):
    """Energy of particles at x (N, particles, 3) from their distances."""

    def __init__(self, particles: int, widths: Sequence[int], mean: float, spread: float) -> None:
        super().__init__()
        self.pairs = torch.triu_indices(particles, particles, 1)
        self.mean, self.spread = mean, spread
        self.layers = tanh_network(self.pairs.shape[1], widths)

    def forward(self, x: Tensor) -> Tensor:
        """(N,)."""
        return self.layers((distances(x, self.pairs) - self.mean) / self.spread)[:, 0]


def distances(x: Tensor, pairs: Tensor) -> Tensor:
    """(N, pairs)."""
    return (x[:, pairs[0]] - x[:, pairs[1]]).norm(dim=2)


def energy_and_forces(energy_of: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Energy (N,) and forces of the shape of x, which are minus its gradient, as differentiable functions of the weights."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = energy_of(x)
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return energy, -slope


@dataclass(frozen=True)
class Forces(DerivativeProblem):
    """Energies and forces of three particles that a sum of Morse potentials binds.

    The loss is the mean square of the error of the energy plus `force_weight` times that of a component of the forces.

    Attributes:
        examples: Configurations, which spread around an equilateral triangle.
        side: Of the triangle.
        spread: Standard deviation of each coordinate.
        force_weight: Of the loss of the forces.
        depths, lengths: Of the potentials of the pairs (0, 1), (0, 2), (1, 2).
        steepness: Of the potentials.
    """

    examples: int = 1000
    side: float = 1.1
    spread: float = 0.1
    force_weight: float = 1.0
    depths: tuple[float, ...] = (1.0, 1.5, 0.7)
    lengths: tuple[float, ...] = (1.0, 1.1, 1.2)
    steepness: float = 2.0

    def network(self) -> nn.Module:
        """The approximation of the energy."""
        return EnergyNetwork(3, self.widths, self.side, self.spread)

    def draw(self, generator: torch.Generator) -> Data:
        """Coordinates, energies and forces."""
        corners = torch.tensor([[0, 0, 0], [1, 0, 0], [0.5, math.sqrt(0.75), 0]], dtype=DTYPE) * self.side
        x = corners + self.spread * torch.randn(self.examples, 3, 3, generator=generator, dtype=DTYPE)
        energy, force = energy_and_forces(self.potential, x)
        return x, energy.detach(), force.detach()

    def potential(self, x: Tensor) -> Tensor:
        """The exact energy, up to a constant that keeps the energies of random configurations near zero."""
        depth, length = torch.tensor(self.depths, dtype=DTYPE), torch.tensor(self.lengths, dtype=DTYPE)
        away = distances(x, torch.triu_indices(3, 3, 1)) - length
        return (depth * ((1 - torch.exp(-self.steepness * away)) ** 2 - 0.3)).sum(1)

    def residuals(self, model: nn.Module, data: Data) -> Tensor:
        """For each configuration the error of its energy and those of the components of the forces."""
        x, energy, force = data
        found, forces = energy_and_forces(model, x)
        components = force[0].numel()
        # The mean over the residuals of a configuration has to be the sum of two means.
        weights = math.sqrt(1 + components), math.sqrt(self.force_weight * (1 + components) / components)
        return torch.cat([(found - energy)[:, None] * weights[0], (forces - force).flatten(1) * weights[1]], 1)

    def error(self, model: nn.Module) -> float:
        """Relative error of the forces of configurations that are not trained on, in the norm of all components."""
        x, _, force = self.data(HELD_OUT_SEED)
        with torch.enable_grad():
            found = energy_and_forces(model, x)[1].detach()
        return float((found - force).norm() / force.norm())


PROBLEMS: tuple[DerivativeProblem, ...] = (
    Poisson("poisson", "Poisson's equation", "relative L2 error", widths=(48, 48, 48), steps=2000),
    Forces("forces", "energies and forces", "relative error of held-out forces", widths=(48, 48, 48), steps=2000),
)
QUICK: tuple[DerivativeProblem, ...] = (
    Poisson("poisson", "Poisson's equation", "relative L2 error", widths=(8, 8), steps=40, interior=40, boundary=12),
    Forces("forces", "energies and forces", "relative error of held-out forces", widths=(8, 8), steps=40, examples=32),
)
