"""The Fisher diagonals of norm layers, both backends, against gradients of single loss terms by autograd in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launches import counted_launches
from torch import Tensor, nn

from kfac_triton.kernels import ops
from kfac_triton.kernels.norm_fisher import layout
from kfac_triton.kernels.ops import Norm

TYPES = [torch.float32, torch.bfloat16, torch.float16]
UNTOUCHED = 7.0  # what lies behind a total before and after
both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@dataclass
class Case:
    """One layer of a call: its input and gradient, in the types and layouts that the operation gets."""

    norm: Norm
    x: Tensor
    g: Tensor
    running: tuple[Tensor, Tensor] | None = None

    @property
    def width(self) -> int:
        return self.norm.width(self.x.shape)

    def module(self) -> nn.Module:
        """The layer as PyTorch has it, in float64."""
        norm, shape = self.norm, self.x.shape
        if norm.kind == "group":
            module: nn.Module = nn.GroupNorm(norm.groups, shape[1], eps=norm.eps or 0.0)
        elif norm.kind == "batch":
            kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[self.x.dim()]
            module = kind(shape[1], eps=norm.eps or 0.0)
            if self.running is not None:
                module.running_mean, module.running_var = (x.double() for x in self.running)
                module.eval()
        else:
            sizes = shape[len(shape) - norm.dims :]
            eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
            module = (nn.RMSNorm if norm.kind == "rms" else nn.LayerNorm)(sizes, eps=eps)
        return module.double()

    def terms(self) -> list[tuple[int | slice, ...]]:
        """What each loss term's gradient has of the output: an example, or a position."""
        dims = self.x.dim()
        outer = [0, *range(2, dims)] if self.norm.has_channels else list(range(dims - self.norm.dims))
        if not self.norm.by_position:
            outer = outer[:1]
        chosen = []
        for places in itertools.product(*(range(self.x.shape[d]) for d in outer)):
            where: list[int | slice] = [slice(None)] * dims
            for d, place in zip(outer, places, strict=True):
                where[d] = place
            chosen.append(tuple(where))
        return chosen

    def truth(self) -> Tensor:
        """Sum of squared gradients of [scale | shift] over loss terms, each with a backward pass of its own."""
        total = torch.zeros(2 * self.width, dtype=torch.float64)
        if not self.x.numel():
            return total[: self.width * (1 + self.norm.has_shift)]
        # Contiguous, as the backward pass of nn.GroupNorm may crash on a CPU if channels come last.
        module, x, g = self.module(), self.x.double().contiguous(), self.g.double().contiguous()
        scale = module.weight
        shift = torch.zeros_like(scale, requires_grad=True)
        sizes = (-1, *[1] * (x.dim() - 2)) if self.norm.has_channels else scale.shape
        y = module(x) + shift.view(sizes)
        for where in self.terms():
            gradients = torch.autograd.grad((y * g)[where].sum(), [scale, shift], retain_graph=True)
            total += torch.cat([x.flatten() for x in gradients]).square()
        return total[: self.width * (1 + self.norm.has_shift)]


def run(cases: Sequence[Case], alpha: Sequence[float], beta: Sequence[float], backend: str) -> list[tuple[Tensor, Tensor]]:
    """Totals before and after. Where beta is zero, the old ones are NaN."""
    totals, rooms = [], []
    for case, b in zip(cases, beta, strict=True):
        size = case.width * (1 + case.norm.has_shift)
        room = torch.full((2 * case.width + 1,), UNTOUCHED)  # behind the total there may be another
        room[:size] = torch.rand(size) if b else torch.nan
        rooms.append(room)
        totals.append(room[:size])
    before = [total.clone() for total in totals]
    kept = [(case.x.clone(), case.g.clone()) for case in cases]
    ops.norm_fisher_diagonal(
        totals, [case.x for case in cases], [case.g for case in cases], torch.tensor(alpha), torch.tensor(beta),
        [case.norm for case in cases], [case.running for case in cases], backend=backend,
    )  # fmt: skip
    for case, (x, g) in zip(cases, kept, strict=True):
        torch.testing.assert_close((case.x, case.g), (x, g), rtol=0, atol=0, equal_nan=True)
    for room, total in zip(rooms, totals, strict=True):
        assert (room[len(total) :] == UNTOUCHED).all()
    return list(zip(before, totals, strict=True))


def check(cases: Sequence[Case], alpha: Sequence[float], beta: Sequence[float], backend: str, digits: float = 1e-5) -> None:
    """Within the rounding of sums in single precision; scale and shift each by itself."""
    for case, a, b, (old, new) in zip(cases, alpha, beta, run(cases, alpha, beta, backend), strict=True):
        expected = a * case.truth() + (b * old.double() if b else 0.0)
        for part, truth in zip(new.double().split(case.width), expected.split(case.width), strict=True):
            # The last term is for inputs that are all the same, whose deviation is the rounding of their mean.
            bound = digits * (truth.abs() + 0.1 * truth.abs().mean()) + 1e-7 * case.g.double().square().sum()
            assert (part - truth).abs().le(bound).all(), (case.norm, tuple(case.x.shape), part, truth)


def lay_out(values: Tensor, layout_name: str) -> Tensor:
    """The same values behind other strides; "expanded" has other values."""
    if layout_name == "last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1) if values.dim() > 2 else values
    if layout_name == "transposed":
        return values.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout_name == "strided":
        spread = values.new_full([2 * size + 1 for size in values.shape], torch.nan)
        return spread[tuple(slice(1, None, 2) for _ in values.shape)].copy_(values)
    if layout_name == "rows apart":  # rows of a wider matrix
        wide = values.new_full((*values.shape[:-1], values.shape[-1] + 8), torch.nan)
        return wide[..., : values.shape[-1]].copy_(values)
    if layout_name == "expanded":
        return values[:1].expand(values.shape) if len(values) else values
    return values


LAYOUTS = ["contiguous", "last", "transposed", "strided", "rows apart", "expanded"]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Ragged sizes, and those at which the kernel's tiles end."""
    kind = draw(st.sampled_from(["layer", "rms", "batch", "group"]))
    by_position, has_shift = draw(st.booleans()), draw(st.booleans())
    examples = draw(st.sampled_from([0, 1, 2, 3, 5]))
    inner = draw(st.sampled_from([(), (1,), (3,), (2, 3), (7,), (2, 1, 2)]))
    width = draw(st.sampled_from([1, 2, 3, 8, 15, 16, 17, 64, 72]))
    dims = groups = 1
    if kind == "group":
        groups = draw(st.sampled_from([g for g in (1, 2, 3, 8) if width % g == 0]))
    if kind in ("batch", "group"):
        # PyTorch's modules refuse a batch in which the statistics are of single numbers.
        numbers = examples * torch.Size(inner).numel() * (1 if kind == "batch" else width // groups)
        least = 2 if numbers == 1 else examples
        shape = (least, width, *inner)
    else:
        dims = draw(st.sampled_from([1, 2]))
        shape = (examples, *inner, *((width,) if dims == 1 else (width, 2)))
    x = draw(st.sampled_from([1.0, 3.0])) * torch.randn(shape) + draw(st.sampled_from([0.0, 5.0]))
    running = None
    if kind == "batch" and draw(st.booleans()):
        running = torch.randn(width), torch.rand(width) + 0.5
    eps = draw(st.sampled_from([1e-5, 0.3] + [None] * (kind == "rms")))
    return Case(
        Norm(kind, eps, has_shift, by_position, dims, groups),
        lay_out(x.to(draw(st.sampled_from(TYPES))), draw(st.sampled_from(LAYOUTS[:-1]))),
        lay_out(torch.randn(shape).to(draw(st.sampled_from(TYPES))), draw(st.sampled_from(LAYOUTS))),
        running,
    )


@both_backends
@settings(max_examples=40, deadline=None)
@given(st.lists(cases(), min_size=1, max_size=3), st.data(), st.integers(0, 2**32))
def test_sums_are_those_of_single_gradients(backend: str, layers: list[Case], data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    weights = [data.draw(st.tuples(st.sampled_from([1.0, 0.25]), st.sampled_from([0.0, 1.0, 0.5]))) for _ in layers]
    check(layers, [a for a, _ in weights], [b for _, b in weights], backend, 1e-4)


def normal(norm: Norm, *shape: int, running: bool = False, dtype: torch.dtype = torch.float32) -> Case:
    width = norm.width(shape)
    given_statistics = (torch.randn(width), torch.rand(width) + 0.5) if running else None
    return Case(norm, (2 * torch.randn(shape) + 1).to(dtype), torch.randn(shape).to(dtype), given_statistics)


LARGE = {
    "a width that is loaded 16 bytes at a time": lambda: normal(Norm("layer"), 3, 20, 768),
    "a width that is not": lambda: normal(Norm("layer"), 2, 9, 779),
    "the widest that a program holds": lambda: normal(Norm("layer"), 2, 3, 4096),
    "the widest of 16-bit numbers": lambda: normal(Norm("layer"), 2, 2, 8192, dtype=torch.bfloat16),
    "wider than a program holds": lambda: normal(Norm("layer"), 2, 3, 8200),
    "wider, of positions": lambda: normal(Norm("rms", by_position=True), 2, 3, 8200),
    "wider, unaligned": lambda: normal(Norm("layer"), 3, 2, 4097),
    "one example, shared out": lambda: normal(Norm("layer"), 1, 5000, 16),
    "positions, shared out": lambda: normal(Norm("rms", by_position=True), 40, 60, 24),
    "programs that take several examples": lambda: normal(Norm("layer"), 700, 2, 40),
    "examples of one position": lambda: normal(Norm("layer"), 300, 72),
    "large images": lambda: normal(Norm("batch"), 2, 5, 70, 61),
    "images that are loaded 16 bytes at a time": lambda: normal(Norm("batch"), 3, 8, 16, 24),
    "large images, running statistics": lambda: normal(Norm("batch"), 2, 5, 70, 61, running=True),
    "images whose positions are terms": lambda: normal(Norm("batch", by_position=True), 2, 3, 9, 11),
    "a batch of rows": lambda: normal(Norm("batch"), 403, 72),
    "large groups": lambda: normal(Norm("group", groups=2), 3, 140, 9, 10),
    "groups across programs": lambda: normal(Norm("group", groups=1), 2, 100, 30, 7),
    "groups of few positions": lambda: normal(Norm("group", groups=4), 20, 96),
}


@both_backends
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.usefixtures("scratch_is_nan")
def test_layers_of_many_programs(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split as on a GPU with few processors, into programs that are smaller than it would have."""
    monkeypatch.setattr(layout, "_LEAST_ELEMENTS", 1 << 10)
    layout.plan.cache_clear()
    check([LARGE[name]()], [0.5], [0.0], backend)
    layout.plan.cache_clear()


@pytest.mark.parametrize("norm", [Norm("layer"), Norm("batch"), Norm("group", groups=2)], ids=lambda norm: norm.kind)
@pytest.mark.parametrize("last", [False, True])
def test_a_large_mean_costs_no_digits(norm: Norm, last: bool) -> None:
    """Mean squares minus squared means would leave few digits of deviations that are 1/1000 of the mean.

    So it is with PyTorch's own group_norm on a CPU if channels come last, which the reference calls.
    """
    case = normal(norm, 4, 16, 30, 8)
    x = 1000 + torch.randn(4, 16, 30, 8)
    case.x = x.to(memory_format=torch.channels_last) if last and norm.has_channels else x
    check([case], [1.0], [0.0], "triton", 2e-3)


def test_positions_that_are_not_there_have_no_infinite_deviation() -> None:
    """Without epsilon, what lies behind the last row has a variance of zero."""
    check([normal(Norm("layer", 0.0), 3, 1, 24), normal(Norm("rms", 0.0), 3, 5, 24)], [1.0, 1.0], [0.0, 0.0], "triton")


def test_a_layer_with_a_nan_leaves_the_others_alone() -> None:
    layers = [normal(Norm("layer"), 3, 5, 16) for _ in range(3)] + [normal(Norm("batch"), 3, 5, 16) for _ in range(3)]
    good = [new for _, new in run(layers, [1.0] * 6, [0.0] * 6, "triton")]
    for bad in (1, 4):
        layers[bad].x[0, 0, 0] = torch.nan
    new = [total for _, total in run(layers, [1.0] * 6, [0.0] * 6, "triton")]
    for i in range(6):
        assert torch.equal(new[i], good[i]) != (i in (1, 4))
        assert bool(new[i].isfinite().all()) != (i in (1, 4))


def test_the_sums_are_the_same_every_time() -> None:
    layers = [LARGE[name]() for name in ("a width that is not", "large images", "positions, shared out")]
    first, second = (run(layers, [1.0] * 3, [0.0] * 3, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


def test_a_layer_whose_memory_changes_is_read_as_it_lies_now() -> None:
    """Addresses, strides, types and running statistics are in the key of what is remembered of a call."""
    for norm, shape in (
        (Norm("layer"), (3, 5, 16)),
        (Norm("batch"), (3, 16, 5, 4)),
        (Norm("rms", by_position=True), (3, 5, 16)),
    ):
        values, gradients = torch.randn(shape), torch.randn(shape)
        shifted = torch.zeros(values.numel() + 1)[1:].view(shape).copy_(values)
        turned = values.transpose(0, 1).contiguous().transpose(0, 1)
        gaps = torch.stack([values, values], -1)[..., 0]
        for x in (values, shifted, turned, gaps, values.bfloat16(), values):
            check([Case(norm, x, gradients)], [0.5], [0.0], "triton")
            check([Case(norm, gradients, x)], [0.5], [0.0], "triton")
        if norm.kind == "batch":
            check([Case(norm, values, gradients, (torch.randn(16), torch.rand(16) + 1))], [0.5], [0.0], "triton")
            check([Case(norm, values, gradients)], [0.5], [0.0], "triton")


def test_launches_do_not_depend_on_the_number_of_layers() -> None:
    counts = []
    for number in (1, 20):
        layers = [normal(Norm("layer"), 2, 3, 64 - i) for i in range(number)]
        layers += [normal(Norm("batch"), 2, 8 + 8 * i, 4, 4) for i in range(number)]
        with counted_launches() as launches:
            run(layers, [1.0] * len(layers), [0.0] * len(layers), "triton")
        counts.append(launches)
    assert counts[0] == {"row_sums_kernel": 1, "channel_sums_kernel": 1, "channel_statistics_kernel": 1, "fisher_kernel": 2}
    # Rows that cannot be loaded 16 bytes at a time, and narrower ones, are kinds of their own.
    assert counts[1] == counts[0] | {"row_sums_kernel": 2}


def test_no_layers_are_no_launches() -> None:
    with counted_launches() as launches:
        ops.norm_fisher_diagonal([], [], [], torch.ones(0), torch.ones(0), [], [], backend="triton")
    assert not launches


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4000), st.integers(1, 300), st.sampled_from([1, 1 << 10, 1 << 16]), st.booleans())
def test_every_position_is_in_one_part(examples: int, positions: int, width: int, elements: int, channels: bool) -> None:
    x = torch.empty((examples, width, positions) if channels else (examples, positions, width), device="meta")
    _, _, shape = layout.describe(x, x, Norm("batch" if channels else "layer"), False)
    taken, shares, length = layout.split(shape, elements)
    assert taken == 1 or shares == 1
    assert (shares - 1) * length < shape.positions <= shares * length
    assert shares == 1 or length % shape.tile[0] == 0
    assert taken <= shape.examples


def arguments() -> dict[str, list[object]]:
    norm = Norm("batch")
    return {
        "totals": [torch.zeros(12)], "inputs": [torch.randn(4, 6, 3)], "gradients": [torch.randn(4, 6, 3)], "norms": [norm],
        "running": [None],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("totals", [], "must describe the same number of layers"),
        ("totals", [torch.zeros(6)], r"totals\[0\] must have shape \(12,\)"),
        ("totals", [torch.zeros(12).half()], r"totals\[0\] must be float32 or float64"),
        ("gradients", [torch.randn(4, 6, 2)], r"the shape of gradients\[0\]"),
        ("norms", [Norm("instance")], r"norms\[0\].kind must be one of layer, rms, batch, group"),
        ("norms", [Norm("layer", dims=0)], "positive dims"),
        ("norms", [Norm("layer", dims=4)], r"inputs\[0\] must have at least 4 dimensions"),
        ("norms", [Norm("group", groups=4)], r"norms\[0\].groups must divide the 6 channels"),
        ("running", [(torch.zeros(6), torch.zeros(5))], r"the variance of running\[0\] must have shape \(6,\)"),
        ("gradients", [torch.empty(4, 6, 3, device="meta")], "must be on one device"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: list[object], message: str) -> None:
    call: dict[str, object] = arguments() | {name: value}
    with pytest.raises(ValueError, match=message):
        ops.norm_fisher_diagonal(**call, alpha=torch.ones(1), beta=torch.ones(1))  # type: ignore[arg-type]


def test_running_statistics_belong_to_a_batch() -> None:
    call = arguments() | {"norms": [Norm("group")], "running": [(torch.zeros(6), torch.ones(6))]}
    with pytest.raises(ValueError, match="must be None for kind 'group'"):
        ops.norm_fisher_diagonal(**call, alpha=torch.ones(1), beta=torch.ones(1))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_float64_is_left_to_the_reference(dtype: torch.dtype) -> None:
    total = torch.zeros(12, dtype=torch.float64) if dtype == torch.float64 else torch.zeros(24)[::2]
    call = arguments() | {"totals": [total]}
    with pytest.raises(ValueError, match="the kernel needs contiguous float32; use 'auto' or 'torch'"):
        ops.norm_fisher_diagonal(**call, alpha=torch.ones(1), beta=torch.ones(1), backend="triton")  # type: ignore[arg-type]
    ops.norm_fisher_diagonal(**call, alpha=torch.ones(1), beta=torch.ones(1))  # type: ignore[arg-type]
    assert (total > 0).all()


def test_torch_sees_what_is_changed() -> None:
    """Schema and fake implementation."""
    numbers, epsilons = [2, 1, 0, 1, 1], [1e-5]
    tensors = ([torch.zeros(12)], [torch.randn(4, 6, 3)], [torch.randn(4, 6, 3)], torch.ones(1), torch.ones(1))
    torch.library.opcheck(
        torch.ops.kfac_triton.norm_fisher_diagonal.default, (*tensors, [None], [None], numbers, epsilons), {"backend": "torch"}
    )
