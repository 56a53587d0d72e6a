"""Capture inside a forward pass: what it recognizes, what it leaves alone, and that nothing stays behind."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFACPreconditioner
from kfac_triton.capture.attention import AttentionHook, _columns
from kfac_triton.capture.statistics import Statistics
from kfac_triton.layers import find_layers

EMBED, HEADS = 6, 2


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(EMBED, HEADS, batch_first=True, **options)


def counts(preconditioner: KFACPreconditioner) -> list[list[float]]:
    return [s.counts.tolist() for s in preconditioner.engine.statistics]


NOTHING = [[0.0, 0.0]] * 4
ONCE = [[12.0, 3.0]] * 4


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, EMBED)


def test_output_and_gradients_are_bitwise_those_without_capture(x: Tensor) -> None:
    module = attention()
    results = []
    for hooked in (False, True):
        module.zero_grad()
        preconditioner = KFACPreconditioner(module) if hooked else None
        leaf = x.clone().requires_grad_()
        output, weights = module(leaf, leaf, leaf)
        assert type(output) is Tensor
        assert type(weights) is Tensor
        (output.sin().sum() + weights.square().sum()).backward()
        results.append([output, weights, leaf.grad, *(p.grad.clone() for p in module.parameters())])
        if preconditioner is not None:
            preconditioner.close()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_is_captured_without_gradients_or_when_paused(x: Tensor) -> None:
    module = attention()
    preconditioner = KFACPreconditioner(module)
    with torch.no_grad():
        module(x, x, x)
        module.eval()(x, x, x)  # the fast path
    with torch.inference_mode():
        module(x, x, x)
    module.train()
    with preconditioner.paused():
        module(x, x, x)[0].sum().backward()
    torch.func.grad(lambda x: module(x, x, x)[0].sum())(x)
    torch.func.vmap(lambda x: module(x, x, x)[0], randomness="different")(x.unsqueeze(1))
    assert counts(preconditioner) == NOTHING
    module(x, x, x)[0].sum().backward()
    assert counts(preconditioner) == ONCE
    preconditioner.close()
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("batch_first", [True, False])
def test_identical_inputs_stay_identical(batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-attention is one product with the whole packed weight, told by identity of the inputs."""
    module, seen = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first), []
    monkeypatch.setattr(Statistics, "add", lambda self, x, gradient, *args, **kw: seen.append(gradient))
    x, y = torch.randn(3, 4, EMBED), torch.randn(3, 4, EMBED)
    with KFACPreconditioner(module):
        for inputs, products in (((x, x, x), 2), ((x, y, y), 3), ((x, y, x), 4)):
            seen.clear()
            module(*inputs)[0].sum().backward()
            assert len({gradient.untyped_storage().data_ptr() for gradient in seen}) == products


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_forward_pass_leaves_nothing_behind(
    x: Tensor, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = attention()

    class Broken(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention or func is torch.baddbmm:
                raise error
            return super().__torch_function__(func, types, args, kwargs or {})

    with KFACPreconditioner(module) as preconditioner:
        mask = torch.zeros(4, 4).as_subclass(Broken)
        with pytest.raises(error):
            module(x, x, x, attn_mask=mask)
        assert _get_current_function_mode_stack() == []
        assert counts(preconditioner) == NOTHING
        module(x, x, x)[0].sum().backward()
        assert counts(preconditioner) == ONCE


def test_early_stop_of_checkpointing(x: Tensor) -> None:
    """The recomputation ends by an exception once the last saved tensor is there."""
    module = attention()
    leaf = x.requires_grad_()
    with KFACPreconditioner(module) as preconditioner:
        checkpoint(lambda x: module(x, x, x)[0], leaf, use_reentrant=False).sum().backward()
        assert _get_current_function_mode_stack() == []
        assert counts(preconditioner) == ONCE


class Twice(nn.Module):
    """Attention to what attention has made."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.attention(x, x, x)[0], x, x)[0]


def test_a_module_that_runs_twice_in_one_call_counts_rows_twice_and_terms_once(x: Tensor) -> None:
    model = Twice()
    with KFACPreconditioner(model) as preconditioner:
        model(x).sum().backward()
        assert counts(preconditioner) == [[24.0, 3.0]] * 4


def test_two_calls_have_terms_of_their_own(x: Tensor) -> None:
    module = attention()
    with KFACPreconditioner(module) as preconditioner:
        once = module(x, x, x)[0]
        module(once, x, x)[0].sum().backward()
        assert counts(preconditioner) == [[24.0, 6.0]] * 4


def test_attention_inside_attention(x: Tensor) -> None:
    """A hook of the outer one's forward pass runs the inner one: each has its own calls."""
    outer, inner = attention(), attention()
    outer.register_forward_pre_hook(lambda m, args: (inner(*args[:3])[0], *args[1:]))
    with KFACPreconditioner(nn.ModuleList([outer, inner])) as preconditioner:
        outer(x, x, x)[0].sum().backward()
        assert counts(preconditioner) == ONCE * 2


def test_under_a_mode_of_the_users(x: Tensor) -> None:
    module = attention()
    with KFACPreconditioner(module) as preconditioner:
        with torch.device("cpu"):  # a TorchFunctionMode
            module(x, x, x)[0].sum().backward()
        assert counts(preconditioner) == ONCE


def test_under_autocast(x: Tensor) -> None:
    module = attention()
    with KFACPreconditioner(module) as preconditioner:
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x, x, x)[0]
        output.float().sum().backward()
        assert counts(preconditioner) == ONCE
        preconditioner.precondition_()
        assert not preconditioner.engine.progress.without_statistics


def test_a_tensor_of_another_class_is_left_alone(x: Tensor) -> None:
    class Own(Tensor):
        pass

    module = attention()
    with KFACPreconditioner(module) as preconditioner:
        module(*[x.as_subclass(Own)] * 3)[0].sum().backward()
        assert counts(preconditioner) == NOTHING


def test_copies_and_pickles_of_a_hooked_model_are_inert(x: Tensor) -> None:
    module = attention()
    with KFACPreconditioner(module) as preconditioner:
        for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            clone(x, x, x)[0].sum().backward()
            hooks = clone._forward_pre_hooks.values()
            assert all(not h.statistics if isinstance(h, AttentionHook) else h.gate is None for h in hooks)
        assert counts(preconditioner) == NOTHING


def test_which_columns_are_whose() -> None:
    q, k, v, out = find_layers(attention())[0]
    packed = q.weight
    w_q, w_kv = packed.split([EMBED, 2 * EMBED])
    assert [_columns(x, packed) for x in (q, k, v)] == [slice(i * EMBED, (i + 1) * EMBED) for i in range(3)]
    assert [_columns(x, w_q) for x in (q, k, v, out)] == [slice(0, EMBED), None, None, None]
    assert [_columns(x, w_kv) for x in (q, k, v, out)] == [None, slice(0, EMBED), slice(EMBED, 2 * EMBED), None]
    assert [_columns(x, packed[1 : 2 * EMBED]) for x in (q, k, v)] == [None, slice(EMBED - 1, 2 * EMBED - 1), None]
    assert _columns(q, packed[:, 1:]) is None
    assert _columns(q, packed[::2]) is None
    assert _columns(q, packed.view(-1)[1 : 1 + EMBED * EMBED].view(EMBED, EMBED)) is None
    assert _columns(k, packed.view(-1)[1 : 1 + 2 * EMBED * EMBED].view(2 * EMBED, EMBED)) is None
    assert _columns(out, out.weight) == slice(0, EMBED)
    assert _columns(out, out.weight.T) is None
    assert _columns(q, torch.randn(3 * EMBED, EMBED)) is None


def test_weights_that_are_views_of_one_buffer() -> None:
    """As FSDP and flat optimizers keep them: a slice is then a view of the buffer, not of the parameter."""
    q, k, v, _ = find_layers(attention())[0]
    flat = torch.zeros(1000)
    view = flat[7 : 7 + q.weight.numel()].view_as(q.weight).requires_grad_()
    q.module._parameters["in_proj_weight"] = view  # type: ignore[assignment]
    q_part, kv_part = view.split([EMBED, 2 * EMBED])
    assert [_columns(x, q_part) for x in (q, k, v)] == [slice(0, EMBED), None, None]
    assert [_columns(x, kv_part) for x in (q, k, v)] == [None, slice(0, EMBED), slice(EMBED, 2 * EMBED)]


def test_compiling_breaks_no_graph_and_says_that_nothing_came() -> None:
    torch.compiler.reset()
    module = attention()
    with KFACPreconditioner(module) as ours:
        run = torch.compile(lambda x: module(x, x, x)[0], fullgraph=True, backend="aot_eager")
        run(torch.randn(4, 3, EMBED)).sum().backward()
        with pytest.warns(UserWarning, match="no statistics came from layers 'q', 'k', 'v', 'out_proj'"):
            ours.precondition_()
