"""The exact quadratic model of a loss on the few directions that a step may combine (Martens and Grosse 2015, section 6.4)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Direction = Sequence[Tensor | None]
Evaluate = Callable[[], tuple[Tensor, Any]]

# Of what rounding may do, in units of the machine precision: to an entry of a Gram matrix, or to a loss.
ROUNDING = 16.0

# By which the derivative along a direction may differ between forward and reverse mode, in shares of itself and of the sum
# of its terms' magnitudes, where bfloat16 errs by about 0.01 a term.
AGREEMENT = (0.05, 0.01)


class Snapshot:
    """The state of the random generators (the CPU's and those of the model's GPUs) and the buffers of a model, as they are now.

    A model in the same state makes the same function of its parameters: the same dropout masks, the same running statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._cpu = torch.get_rng_state()
        devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
        self._gpus = [(device, torch.cuda.get_rng_state(device)) for device in devices]

    def restore(self) -> None:
        """Puts both back."""
        self.restore_generators()
        self.restore_buffers()

    def restore_generators(self) -> None:
        """Puts the random generators back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._gpus:
            torch.cuda.set_rng_state(state, device)

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Puts the buffers back: the same tensors, some modules bind new ones, with the same contents."""
        for module, name, buffer, contents in self._buffers:
            module._buffers[name] = buffer
            # An expanded tensor cannot be written to, so nobody has written to it.
            if all(stride > 0 or size < 2 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)):
                buffer.copy_(contents)


def outputs_and_targets(result: Any) -> tuple[Tensor, Any]:
    """What a closure returned, checked.

    Raises:
        TypeError: if it is not a pair whose first element is a tensor.
    """
    advice = "for a Hugging Face model return (model(x).logits, labels)"
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        is_sequence = isinstance(result, (tuple, list))
        what = f"a {type(result).__name__} of {len(result)}" if is_sequence else f"a {type(result).__name__}"
        raise TypeError(
            "closure must return (outputs, targets), what the loss function takes, with lr='auto', but returned "
            f"{what}; end it with `return model(inputs), targets`, without loss and backward; {advice}"
        )
    outputs, targets = result
    if not isinstance(outputs, Tensor):
        raise TypeError(
            "closure must return (outputs, targets) with a tensor of outputs, but outputs is a "
            f"{type(outputs).__name__}; return the tensor that the loss function takes; {advice}"
        )
    return outputs, targets


@torch.no_grad()
def jacobian_products(
    model: nn.Module, evaluate: Evaluate, parameters: Sequence[nn.Parameter], directions: Sequence[Direction]
) -> list[Tensor]:
    """J d for each direction d, with J the Jacobian of the outputs with respect to the parameters, by forward-mode AD.

    For a direction the closure runs once, with dual numbers p + d e in place of the parameters (a tied weight in each of its
    places), in eager mode, and with attention, the Transformer's fast path and recurrent layers as operations that have a
    forward derivative. The random generators and buffers are before each run, and afterwards, what they are now.

    Args:
        model: holds the parameters.
        evaluate: runs the model and returns (outputs, targets). Hooks on the model must not mind.
        parameters: what to differentiate by.
        directions: tensors aligned with parameters, None for zero.

    Returns:
        Tensors of the outputs' shape, zero where no output depends on the direction.

    Raises:
        TypeError: if evaluate returns no (outputs, targets).
        RuntimeError: if an operation of the model has no forward derivative.
    """
    start = Snapshot(model)
    products = []
    for direction in directions:
        try:
            with forward_ad.dual_level(), _differentiable(model):
                duals = {
                    id(p): forward_ad.make_dual(p.detach(), d.detach().to(p))
                    for p, d in zip(parameters, direction, strict=True)
                    if d is not None
                }
                with _in_place_of_parameters(model, duals):
                    outputs, _ = outputs_and_targets(evaluate())
                value, tangent = forward_ad.unpack_dual(outputs)
                # Out of the level a tensor may not keep a tangent of its own.
                products.append(torch.zeros_like(value) if tangent is None else tangent.detach().clone())
        except NotImplementedError as error:
            raise RuntimeError(
                "lr='auto' needs forward-mode derivatives of the model, and one of its operations has none: "
                f"{str(error).splitlines()[0]} Write it with other operations (checkpoint with use_reentrant=False, give a "
                "custom autograd.Function a jvp), or pass a number as lr"
            ) from error
        finally:
            start.restore()
    return products


def require_agreement(slope: Tensor, products: Sequence[Tensor], gradient: Direction, directions: Sequence[Direction]) -> None:
    """Refuses J d that contradict the gradient: <dloss/doutputs, J d> must be <dloss/dparameters, d>.

    They do if the closure does not evaluate the same batch each time, or where forward-mode AD loses a tangent in silence.

    Args:
        slope: gradient of the loss with respect to the outputs.
        products: J d.
        gradient: of the loss with respect to the parameters, by backward.
        directions: d.

    Raises:
        ValueError: if they differ by more than low precision explains.
    """
    causes = (
        "closure must run the model on the same batch each time it is called: take the batch from the loader outside of it, "
        "and run the model in it"
    )
    for product, direction in zip(products, directions, strict=True):
        if product.shape != slope.shape:
            raise ValueError(f"closure returned outputs of shape {tuple(slope.shape)}, then {tuple(product.shape)}; {causes}")
        entries = slope.double() * product.double()
        forward, size, reverse = float(entries.sum()), float(entries.abs().sum()), float(_inner(gradient, direction))
        if abs(forward - reverse) > AGREEMENT[0] * abs(reverse) + AGREEMENT[1] * size:
            raise ValueError(
                f"closure has a derivative along the step of {forward:.4g} by forward mode but {reverse:.4g} by backward; "
                f"{causes}. If it does, an operation in the model loses derivatives (checkpoint with use_reentrant=True does: "
                "make it False)"
            )


@contextlib.contextmanager
def _in_place_of_parameters(model: nn.Module, replacements: dict[int, Tensor]) -> Iterator[None]:
    """Modules read replacements[id(p)] where they read p."""
    before = [
        (module, name, p) for module in model.modules() for name, p in module._parameters.items() if id(p) in replacements
    ]
    try:
        for module, name, p in before:
            module._parameters[name] = replacements[id(p)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, p in before:
            module._parameters[name] = p


@contextlib.contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Operations that have a forward derivative, where PyTorch has a choice."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # The flags() of these backends would set, and warn of, more than this.
            stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
            stack.callback(torch._C._set_cudnn_enabled, torch._C._get_cudnn_enabled())
            torch._C._set_mkldnn_enabled(False)
            torch._C._set_cudnn_enabled(False)
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class Minimum(NamedTuple):
    """Where a quadratic model is least.

    Attributes:
        coefficients: c, (directions,), float64.
        change: M(c), (): what the model says a step there changes, at most 0. NaN if the model is not finite.
    """

    coefficients: Tensor
    change: Tensor


class QuadraticModel:
    r"""M(c) = c^T b + 1/2 c^T B c, the change of an objective along sum_i c_i d_i.

        B_ij = scale (J d_i)^T H (J d_j) + <d_i, R d_j>,    b_i = <h, d_i>

    where H is the Hessian of the sum of the loss terms with respect to the outputs, h the gradient of the objective, and R the
    diagonal matrix of damping and L2 penalties (Martens and Grosse 2015, sections 6.4 and 7). So the curvature is exact, the
    generalized Gauss-Newton matrix of the batch, and only the choice of the directions is K-FAC's.

    Args:
        gram: B, (directions, directions), symmetric.
        linear: b, (directions,).
        cutoff: eigenvalues of B, scaled to a unit diagonal, that are at most this are rounding; the largest is at least 1.
    """

    def __init__(self, gram: Tensor, linear: Tensor, cutoff: float = ROUNDING * torch.finfo(torch.float64).eps) -> None:
        self.gram = gram.double()
        self.linear = linear.double()
        self.cutoff = cutoff

    @classmethod
    def build(
        cls,
        directions: Sequence[Direction],
        gradient: Direction,
        products: Sequence[Tensor],
        curved: Sequence[Tensor],
        scale: float,
        ridge: Sequence[float],
    ) -> QuadraticModel:
        """Builds the model, in float64 whatever the types.

        Args:
            directions: d_i.
            gradient: h, aligned with the entries of a direction.
            products: J d_i.
            curved: H J d_i.
            scale: 1 / terms for a mean loss, 1 for a sum.
            ridge: the diagonal of R, a number a parameter.

        Raises:
            ValueError: if there is no direction.
        """
        if not directions:
            raise ValueError("directions must hold at least one direction, but is empty; without a gradient there is no step")
        entries = [  # of the lower triangle, row by row
            scale * _inner([products[i]], [curved[j]]) + _inner(directions[i], directions[j], ridge)
            for i in range(len(directions))
            for j in range(i + 1)
        ]
        triangle = torch.stack(_on_one_device(entries))
        gram = triangle.new_zeros(len(directions), len(directions))
        rows, columns = torch.tril_indices(len(directions), len(directions), device=gram.device)
        gram[rows, columns] = gram[columns, rows] = triangle
        linear = torch.stack(_on_one_device([_inner(gradient, d) for d in directions]))
        precision = max(torch.finfo(x.dtype).eps for x in (*products, *(t for d in directions for t in d if t is not None)))
        return cls(gram, linear.to(gram.device), ROUNDING * precision)

    def change(self, coefficients: Tensor) -> Tensor:
        """M(c), a scalar."""
        c = coefficients.to(self.gram)
        return c @ self.linear + (c @ self.gram @ c) / 2

    def solve(self) -> Minimum:
        """The least M, by the pseudo-inverse of B scaled to a unit diagonal, D B D with D_ii = B_ii^-1/2.

        The scaling makes the result independent of the lengths of the directions. Of parallel directions each takes a share; a
        direction without curvature takes none, for along it the model has no minimum.
        """
        finite = self.gram.isfinite().all() & self.linear.isfinite().all()
        gram = torch.where(finite, self.gram, 0.0)
        diagonal = gram.diagonal()
        d = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
        values, vectors = torch.linalg.eigh(d[:, None] * gram * d)
        inverse = torch.where(values > self.cutoff, 1 / values, 0.0)
        coefficients = -d * (vectors @ (inverse * (vectors.mT @ (d * self.linear))))
        return Minimum(coefficients, self.change(coefficients))


def all_finite(tensors: Direction) -> bool:
    """Whether no entry is NaN or infinite."""
    found = [x.isfinite().all() for x in tensors if x is not None]
    return not found or bool(torch.stack([x.to(found[0].device) for x in found]).all())


def combined(coefficients: Sequence[float], directions: Sequence[Direction]) -> list[Tensor | None]:
    """sum_i c_i d_i, a new tensor a parameter."""
    result: list[Tensor | None] = []
    for entries in zip(*directions, strict=True):
        parts = [x * c for c, x in zip(coefficients, entries, strict=True) if x is not None]
        result.append(sum(parts[1:], parts[0]) if parts else None)
    return result


def _inner(xs: Direction, ys: Direction, weights: Sequence[float] | None = None) -> Tensor:
    """sum_p w_p <x_p, y_p> over the entries that both have, in float64."""
    parts = [
        torch.sum(x.double() * y.double()) * w
        for x, y, w in zip(xs, ys, weights or [1.0] * len(xs), strict=True)
        if x is not None and y is not None
    ]
    return torch.stack(_on_one_device(parts)).sum() if parts else torch.zeros((), dtype=torch.float64)


def _on_one_device(scalars: list[Tensor]) -> list[Tensor]:
    """On the first GPU that one of them is on."""
    home = next((x.device for x in scalars if x.device.type != "cpu"), torch.device("cpu"))
    return [x.to(home) for x in scalars]


__all__ = [
    "ROUNDING",
    "Direction",
    "Evaluate",
    "Minimum",
    "QuadraticModel",
    "Snapshot",
    "all_finite",
    "combined",
    "jacobian_products",
    "outputs_and_targets",
    "require_agreement",
]
