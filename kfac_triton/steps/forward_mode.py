"""Products with the Jacobian of a model by forward-mode AD, which do not change the state of the model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .quadratic import Direction, inner

Evaluate = Callable[[], tuple[Tensor, Any]]

# By how much the derivative along a direction may differ between forward and reverse mode: as a share of itself, and of the sum
# of the magnitudes of its terms, each of which has an error of about 0.01 in bfloat16.
AGREEMENT = (0.05, 0.01)


class Snapshot:
    """The state of the random generators (the CPU's and those of the model's GPUs) and the buffers of a model, as they are now.

    In the same state a model is the same function of its parameters: with the same dropout masks and running statistics.
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
        """Restores both."""
        self.restore_generators()
        self.restore_buffers()

    def restore_generators(self) -> None:
        """Restores the random generators."""
        torch.set_rng_state(self._cpu)
        for device, state in self._gpus:
            torch.cuda.set_rng_state(state, device)

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Restores the buffers: their contents, and the tensors themselves, since some modules assign new ones."""
        for module, name, buffer, contents in self._buffers:
            module._buffers[name] = buffer
            # An expanded tensor cannot be written to, so it has not changed.
            if all(stride > 0 or size < 2 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)):
                buffer.copy_(contents)


def backward_number() -> int:
    """The number of a backward pass that does nothing. The next one has the next number, whoever runs it."""
    numbers = []
    with torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        copy = leaf.view_as(leaf)
    copy.register_hook(lambda gradient: numbers.append(torch._C._current_graph_task_id()))
    torch.autograd.grad(copy, leaf)
    return numbers[0]


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
            "with lr='auto' closure must return (outputs, targets), the arguments of the loss, but it returned "
            f"{what}; end it with `return model(inputs), targets`, without loss and backward; {advice}"
        )
    outputs, targets = result
    if not isinstance(outputs, Tensor):
        raise TypeError(
            "closure must return (outputs, targets) with a tensor of outputs, but the type of outputs is "
            f"{type(outputs).__name__}; return the tensor that the loss function takes; {advice}"
        )
    return outputs, targets


@torch.no_grad()
def jacobian_products(
    model: nn.Module, evaluate: Evaluate, parameters: Sequence[nn.Parameter], directions: Sequence[Direction]
) -> list[Tensor]:
    """J d for each direction d, with J the Jacobian of the outputs with respect to the parameters, by forward-mode AD.

    For a direction the closure runs once, with dual numbers p + d e in place of the parameters (a tied weight in each of its
    places), also where it takes derivatives by backward passes of its own. It runs in eager mode, and with attention, the
    Transformer's fast path and recurrent layers as operations that have a forward derivative. Each run starts with the random
    generators and buffers as they are now; afterwards they are restored.

    Args:
        model: holds the parameters.
        evaluate: runs the model, with its hooks, and returns (outputs, targets).
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
                    # A graph is made only where evaluate enables gradients.
                    id(p): forward_ad.make_dual(p.detach().requires_grad_(p.requires_grad), d.detach().to(p))
                    for p, d in zip(parameters, direction, strict=True)
                    if d is not None
                }
                with _in_place_of_parameters(model, duals):
                    outputs, _ = outputs_and_targets(evaluate())
                value, tangent = forward_ad.unpack_dual(outputs)
                # Outside of the level a tensor must not keep a tangent.
                products.append(torch.zeros_like(value) if tangent is None else tangent.detach().clone())
        except NotImplementedError as error:
            raise RuntimeError(
                "lr='auto' needs forward-mode derivatives of the model (and of backward passes in the closure), and one of the "
                "operations has none: "
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
        forward, size, reverse = float(entries.sum()), float(entries.abs().sum()), float(inner(gradient, direction))
        if abs(forward - reverse) > AGREEMENT[0] * abs(reverse) + AGREEMENT[1] * size:
            raise ValueError(
                f"the derivative of the loss along the step is {forward:.4g} by forward mode, but {reverse:.4g} by backward; "
                f"{causes}. If it does, an operation in the model has a wrong derivative by forward mode (checkpoint needs "
                "use_reentrant=False)"
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
