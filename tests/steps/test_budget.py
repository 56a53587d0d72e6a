"""What curvature costs, and how to pay less: fewer rows, longer intervals, schedules, fewer layers."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from support.helpers import TokenModel, conv_net, mlp, relative_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.curvature.rounding import stochastically_rounded
from kfac_triton.kernels import ops
from kfac_triton.layers import Rows


def _tokens(model: nn.Module, n: int = 6) -> None:
    model.zero_grad()
    tokens = torch.randn(n, 3, 5, dtype=torch.float64)
    nn.functional.cross_entropy(model(tokens), torch.randint(4, (n, 3))).backward()


def _step(ours: KFACPreconditioner, model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    _tokens(model)
    ours.precondition_()


# Fewer rows


@pytest.mark.parametrize("setting", [{"stats_fraction": 0.5}, {"max_stats_tokens": 9}])
def test_rows_are_every_second_one_and_factors_keep_their_scale(setting: dict) -> None:
    """18 tokens: the even ones in the first step, the odd ones in the second; a mean over them, not half of one."""
    model = TokenModel(pool=False).double()
    options = {"damping": 0.1, "kl_clip": None, "loss_terms": "tokens", "ema_decay": 1 - 1e-9}
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    y = torch.randint(4, (6, 3))
    with KFACPreconditioner(model, **options) as ours:
        nn.functional.cross_entropy(model(x), y).backward()
        ours.engine.precondition(lambda _: 0.1)
        whole = ours.factors()
    with KFACPreconditioner(model, **options, **setting) as ours:
        rows = []
        for _ in range(2):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            assert all((s.counts.tolist(), s.rows_taken) == ([18, 18], 9) for s in ours.engine.statistics)
            ours.engine.precondition(lambda _: 0.1)
            rows.append(ours.factors()["first"][0])
        both = ours.factors()
    flat = torch.cat([x.flatten(0, 1), torch.ones(18, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(rows[0], flat[::2].T @ flat[::2] / 9)
    for name in whole:  # the two halves together are the whole
        for got, expected in zip(both[name], whole[name], strict=True):
            assert relative_error(got, expected) <= 1e-7


@pytest.mark.parametrize(("tokens", "fraction"), [(16, 1 / 4), (16, 1 / 8), (15, 1 / 3), (6, 1 / 2), (7, 1 / 7), (1, 1 / 2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_position_of_an_example_is_sampled_in_every_step(tokens: int, fraction: float, compiled: bool) -> None:
    """Tokens are one-hot vectors of their positions: the diagonal of A tells how often each of them was taken.

    In compiled passes as often as at random, within four standard deviations.
    """
    torch.compiler.reset()
    examples = 8 * tokens * 9  # a multiple of each stride, but for 1 / 7
    tolerance = 4 / math.sqrt(examples * fraction) if compiled else 0.1
    model = nn.Linear(tokens, 2, bias=False).double()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    x = torch.eye(tokens, dtype=torch.float64).expand(examples, tokens, tokens)
    with KFACPreconditioner(model, damping=0.1, loss_terms="tokens", stats_fraction=fraction, ema_decay=0.0) as ours:
        for _ in range(3):
            model.zero_grad()
            run(x).square().mean().backward()
            ours.precondition_()
            a = ours.factors()[""][0]
            torch.testing.assert_close(a, torch.eye(tokens, dtype=torch.float64) / tokens, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("positions", [*range(1, 30), 64, 197, 1024])
def test_the_stride_is_the_next_that_meets_every_position(positions: int) -> None:
    for every in range(2, 20):
        rows = torch.arange(every * positions * 40)
        sampled = Rows([rows], [rows], ops.ROWS, ops.ROWS, len(rows), len(rows), len(rows) // positions).sample(every, 5)
        stride = int(sampled.gradients[0][1] - sampled.gradients[0][0])
        good = [n for n in range(every, stride + 1) if len({i * n % positions for i in range(positions)}) == positions]
        assert good == [stride]
        assert sampled.gradients[0][0] == 5 % stride
        assert sampled.input_count == len(rows)
        assert sampled.share == pytest.approx(1 / stride, rel=0.02)


@pytest.mark.parametrize("positions", [*range(1, 30), 64, 197, 1024])
def test_a_compiled_pass_takes_one_row_in_so_many_and_meets_every_position(positions: int) -> None:
    for every in range(2, 20):
        examples = 40 * every
        rows = torch.arange(examples * positions)
        sampled = Rows([rows], [rows], ops.ROWS, ops.ROWS, len(rows), len(rows), examples).sample_compiled(every)
        chosen = sampled.gradients[0]
        assert torch.equal(chosen // every, torch.arange(-(-len(rows) // every)))  # one of each `every` neighbours
        counts = torch.bincount(chosen % positions, minlength=positions).double()
        assert counts.min() > 0, every
        chi_squared, freedom = float((counts - 40).square().sum() / 40), positions - 1
        assert chi_squared <= freedom + 4 * math.sqrt(2 * freedom), every  # as at random, within four standard deviations


def test_a_pass_without_rows_is_sampled() -> None:
    nothing = torch.zeros(0, 3)
    rows = Rows([nothing], [nothing], ops.ROWS, ops.ROWS, 0, 0, 0)
    assert rows.sample(4, 2).input_count == rows.sample_compiled(4).input_count == 0


def test_sampling_compiles_once_for_all_lengths() -> None:
    for setting in ({"stats_fraction": 1 / 4}, {"max_stats_tokens": 20}):
        torch.compiler.reset()
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        optimizer = KFAC(model, lr=0.01, loss_terms="tokens", **setting)
        graphs = CompileCounterWithBackend("aot_eager")
        run = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
        for length in (16, 12, 9, 8, 10, 20, 25, 7):
            optimizer.zero_grad()
            run(torch.randn(5, length, 6)).square().mean().backward()
            optimizer.step()
        assert graphs.frame_count == 1


class Tokens(nn.Module):
    """Layers with a row for each token, and others."""

    def __init__(self, width: int, words: int = 20) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 6)
        self.token = nn.Linear(6, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)
        self.decoder = nn.Linear(6, words, bias=False)
        self.decoder.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.words(tokens)
        x = self.token(embedded)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x.mean(1)).square().mean() + self.decoder(embedded).square().mean()


@pytest.mark.parametrize(
    ("examples", "length", "width", "stride"),
    [
        (32, 63, 8, 1),  # 2,016 tokens
        (32, 64, 8, 3),  # every second one would miss half of the positions
        (32, 65, 8, 2),
        (64, 63, 8, 4),  # every third one of 4,032
        (129, 63, 8, 8),
        (500, 63, 8, 8),
        (129, 64, 8, 9),
        (32, 65, 1500, 1),  # factors of size 1,501
        (64, 65, 1500, 2),
    ],
)
def test_by_default_linear_layers_take_a_part_of_many_tokens(examples: int, length: int, width: int, stride: int) -> None:
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
    with KFACPreconditioner(model, loss_terms="tokens", norms="skip") as ours:
        model(torch.randn(examples, length, 3)).square().mean().backward()
        assert [int(s.rows_taken) for s in ours.engine.statistics] == [-(-examples * length // stride)] * 2


def _factors_of_equal_rows(how: str, terms: str, setting: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of three passes of different lengths, in each of which all rows are equal."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    model = model.float() if how == "kernels" else model
    run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    options = {"loss_terms": terms, "ema_decay": 0.0, "backend": "triton" if how == "kernels" else "torch"}
    with KFACPreconditioner(model, **options, **setting) as ours:
        losses = []
        for value, (examples, length) in ((1.0, (8, 1024)), (3.0, (8, 64)), (-2.0, (9, 35))):
            x = torch.full((examples, length, 5), value, dtype=model[0].weight.dtype)
            loss = value * run(x).sum() / (examples if terms == "examples" else examples * length)
            losses.append(loss)
            if how != "two calls":
                loss.backward()
        if how == "two calls":
            sum(losses).backward()
        ours.precondition_()
        return ours.factors()


@functools.cache
def _factors_of_all_rows(how: str, terms: str) -> dict[str, tuple[Tensor, Tensor]]:
    return _factors_of_equal_rows(how, terms, {"stats_fraction": 1.0})


@pytest.mark.parametrize("setting", [{}, {"stats_fraction": 0.3}, {"max_stats_tokens": 500}], ids=str)
@pytest.mark.parametrize("terms", ["examples", "tokens"])
@pytest.mark.parametrize("how", ["two backward passes", "two calls", "compiled", "kernels"])
def test_passes_of_different_lengths_count_as_if_all_rows_were_taken(how: str, terms: str, setting: dict[str, Any]) -> None:
    """All rows of a pass are equal, so any part of them has the same second moments. Strides differ: 7 or 8, and 1 or 3."""
    sampled = _factors_of_equal_rows(how, terms, setting)
    for name, pair in _factors_of_all_rows(how, terms).items():
        for exact, found in zip(pair, sampled[name], strict=True):
            assert relative_error(found, exact) <= (1e-5 if how == "kernels" else 1e-10)


def test_by_default_everything_else_takes_all_rows() -> None:
    """Embeddings, tied ones too, norms, layers with a row for each example, and what is not divided into examples."""
    model, tokens = Tokens(8), torch.randint(20, (64, 64))
    with KFACPreconditioner(model, loss_terms="examples", norms="diagonal") as ours:
        model(tokens).backward()
        rows = {s.layer.name: (s.rows_taken, s.counts.tolist()) for s in ours.engine.statistics}
    part = {name for name, (taken, _) in rows.items() if taken not in (64, 64 * 64)}
    assert part == {name for name in rows if name.startswith(("token", "attention"))} > {"token"}
    assert all(terms == 64 for _, (_, terms) in rows.values())
    flat, images = nn.Linear(5, 3), nn.Conv2d(2, 3, 3)
    for layer, x in ((flat, torch.randn(5000, 5)), (images, torch.randn(9, 2, 40, 40))):
        with KFACPreconditioner(layer, weight_sharing="expand") as ours:
            layer(x).square().mean().backward()
            assert int(ours.engine.statistics[0].rows_taken) == (5000 if layer is flat else 9 * 38 * 38)
    tokens_of = nn.Linear(5, 3)
    with KFACPreconditioner(tokens_of, weight_sharing="reduce") as ours:
        tokens_of(torch.randn(64, 64, 5)).square().mean().backward()
        assert int(ours.engine.statistics[0].rows_taken) == 64


@pytest.mark.parametrize("oversize", ["diagonal", "block"])
def test_a_vocabulary_with_a_diagonal_is_not_sampled(oversize: str) -> None:
    model = nn.Linear(4, 50)
    with KFACPreconditioner(model, loss_terms="tokens", max_factor_size=10, oversize=oversize) as ours:
        model(torch.randn(64, 63, 4)).square().mean().backward()
        assert int(ours.engine.statistics[0].rows_taken) == (64 * 63 if oversize == "diagonal" else 64 * 63 // 4)


def test_all_rows_are_taken_on_request() -> None:
    model, x = nn.Linear(4, 3), torch.randn(64, 64, 4, dtype=torch.float32)
    with KFACPreconditioner(model, loss_terms="tokens", stats_fraction=1.0, ema_decay=0.0) as ours:
        model(x).square().mean().backward()
        ours.precondition_()
        rows = torch.cat([x.flatten(0, 1), torch.ones(64 * 64, 1)], 1).double()
        assert relative_error(ours.factors()[""][0], (rows.T @ rows / len(rows)).float()) <= 1e-5


def test_gradients_of_a_part_estimate_those_of_all() -> None:
    """Each example as often as it is left out: the same G, also for a sum over terms and several passes."""
    model = mlp()
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(4, (8,))
    doubled = x.repeat_interleave(2, 0), y.repeat_interleave(2, 0)
    results = []
    for data, fraction in (((x, y), 1.0), (doubled, 0.5)):
        for reduction in ("mean", "sum"):
            with KFACPreconditioner(model, damping=0.1, loss_reduction=reduction, stats_fraction=fraction) as ours:
                for part in (slice(None, len(data[0]) // 2), slice(len(data[0]) // 2, None)):
                    scale = 0.5 if reduction == "mean" else 1.0
                    (scale * nn.functional.cross_entropy(model(data[0][part]), data[1][part], reduction=reduction)).backward()
                ours.engine.precondition(lambda _: 0.1)
                results.append(ours.factors())
    for other in results[1:]:
        for name, pair in results[0].items():
            for got, expected in zip(other[name], pair, strict=True):
                assert relative_error(got, expected) <= 1e-12


def test_a_convolution_is_sampled_by_images() -> None:
    model, x = conv_net(), torch.randn(6, 2, 9, 10, dtype=torch.float64)
    results = []
    for images, setting in ((x[::3], {}), (x, {"stats_fraction": 1 / 3}), (x, {"max_stats_tokens": 60})):
        with KFACPreconditioner(model, damping=0.1, **setting) as ours:
            model(images).sum().backward()
            ours.engine.precondition(lambda _: 0.1)
            results.append(ours.factors()["0"][0])
    assert relative_error(results[1], results[0]) <= 1e-12
    assert relative_error(results[2], results[0]) <= 1e-12  # 25 positions an image: 60 of 150 rows are every third image


def test_kernels_sample_too() -> None:
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = mlp(torch.float32)
        ours = KFACPreconditioner(model, damping=0.1, backend=backend, stats_fraction=0.3)
        for _ in range(3):
            model.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(11, 5).requires_grad_()), torch.randint(4, (11,))).backward()
            ours.precondition_()
        results.append(ours.factors())
    for name, pair in results[0].items():
        for got, expected in zip(pair, results[1][name], strict=True):
            assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"stats_fraction": 0.0}, "stats_fraction must be finite and greater than 0"),
        ({"stats_fraction": 1.5}, "stats_fraction must be at most 1, but is 1.5"),
        ({"stats_fraction": "half"}, "stats_fraction must be 'auto' or a number, but is 'half'"),
        ({"max_stats_tokens": 0}, "max_stats_tokens must be at least 1"),
        ({"max_factor_size": 0}, "max_factor_size must be at least 1"),
        ({"oversize": "sparse"}, "oversize must be one of diagonal, block"),
        ({"norms": "none"}, "norms must be one of diagonal, full, skip"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"damping": lambda step: -1.0}, "damping must be finite and greater than 0, but is -1.0"),
        ({"inverse_every": lambda step: 0}, "inverse_every must be at least 1, but is 0"),
        ({"curvature": "shampoo"}, "curvature must be one of kfac, ekfac"),
    ],
)
def test_bad_settings(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(mlp(), **setting)


# Schedules


def test_intervals_and_damping_may_be_functions_of_the_step() -> None:
    model = TokenModel(pool=False).double()
    ours = KFACPreconditioner(
        model,
        loss_terms="tokens",
        damping=lambda step: 0.1 * (step + 1),
        statistics_every=lambda step: 1 if step < 2 else 3,
        inverse_every=lambda step: 1 if step < 3 else 4,
    )
    updates, refreshes, damping = [], [], []
    for step in range(9):
        _step(ours, model, step)
        updates.append(int(ours.engine.bank.updates[0]))
        refreshes.append(ours.diagnostics()["refreshes"])
        damping.append(ours.diagnostics()["damping"])
    assert updates == [1, 2, 2, 3, 3, 3, 4, 4, 4]
    assert refreshes == [1, 2, 3, 3, 4, 4, 4, 4, 5]
    assert damping == pytest.approx([0.1 * (step + 1) for step in range(9)])


def test_the_warm_up_renews_everything_in_every_step() -> None:
    model = TokenModel(pool=False).double()
    ours = KFACPreconditioner(model, loss_terms="tokens", damping=0.1, warmup=3, statistics_every=5, inverse_every=5)
    for step in range(7):
        _step(ours, model, step)
    assert ours.engine.bank.updates[0] == 4  # steps 0, 1, 2 and 5
    assert ours.diagnostics()["refreshes"] == 4


# Fewer layers


def test_skip_and_include_take_names_classes_and_functions() -> None:
    def covered(**options: object) -> list[str]:
        with KFACPreconditioner(TokenModel().double(), **options) as ours:
            return [layer.name for layer in ours.engine.layers]

    assert covered() == ["first", "second", "head"]
    assert covered(skip="head") == ["first", "second"]
    assert covered(skip=["f*", "h*"]) == ["second"]
    assert covered(include=["*e*d"]) == ["second", "head"]
    assert covered(include="Linear") == ["first", "second", "head"]
    assert covered(skip=lambda name, module: module.out_features == 6) == ["head"]
    assert covered(include="*", skip=()) == ["first", "second", "head"]
    with pytest.raises(ValueError, match="second: it is left out by skip or include"):
        covered(skip="Linear")
    with pytest.raises(TypeError, match=r"skip must be a pattern, a list of patterns or a function .* but is 3"):
        covered(skip=3)


def test_what_is_left_out_trains_along_its_gradient() -> None:
    model = TokenModel(pool=False).double()
    before: list[Tensor] = [p.detach().clone() for p in model.parameters()]
    optimizer = KFAC(model, lr=0.1, momentum=0.0, loss_terms="tokens", skip="second")
    _tokens(model)
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        step = (old - p.detach()) / 0.1
        assert (relative_error(step, p.grad) <= 1e-12) == name.startswith("second")
    assert optimizer.diagnostics()["skipped"] == {"second": "it is left out by skip or include"}


# Smaller factors


def test_random_rounding_is_right_in_the_mean_and_symmetric() -> None:
    value = torch.full((1, 300, 300), 1.0 + 2**-10)  # an eighth of the way from 1 to the next bfloat16
    rounded = stochastically_rounded(value)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, rounded.mT)
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.float().mean()) == pytest.approx(1.0 + 2**-10, abs=2e-4)
    exact = torch.tensor([[[2.5, -0.75], [-0.75, 0.0]]])
    assert torch.equal(stochastically_rounded(exact).float(), exact)


def test_factors_in_16_bits_follow_those_in_32() -> None:
    """Also a slow average, whose steps are below the last digit; half of the memory; the same updates, nearly."""
    results, bits = [], []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = mlp(torch.float32)
        ours = KFACPreconditioner(model, damping=0.1, kl_clip=None, ema_decay=0.999, factor_dtype=dtype)
        state = torch.get_rng_state()
        for step in range(200):
            torch.manual_seed(step)
            x = torch.randn(12, 5) * (1 + 2 * (step > 100))  # the inputs' scale changes on the way
            model.zero_grad()
            nn.functional.cross_entropy(model(x), torch.randint(4, (12,))).backward()
            ours.precondition_()
        assert not torch.equal(state, torch.get_rng_state())
        bits.append(torch.get_rng_state())
        results.append((ours.factors(), [p.grad for p in model.parameters()], ours.diagnostics()["memory"]["factors"]))
    assert torch.equal(*bits)  # rounding draws no number from the run's own
    assert results[1][2] * 2 == results[0][2]
    for name, pair in results[0][0].items():
        for got, expected in zip(results[1][0][name], pair, strict=True):
            assert torch.equal(got, got.mT)
            assert relative_error(got, expected) <= 0.03
    for got, expected in zip(results[1][1], results[0][1], strict=True):
        assert relative_error(got, expected) <= 0.05


def test_factors_in_16_bits_serve_kernels_and_checkpoints() -> None:
    torch.manual_seed(0)
    model = mlp(torch.float32)
    optimizer = KFAC(model, damping=0.1, factor_dtype="bfloat16", backend="triton")
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(12, 5)), torch.randint(4, (12,))).backward()
        optimizer.step()
    other = KFAC(mlp(torch.float32), damping=0.1, factor_dtype="bfloat16")
    other.load_state_dict(optimizer.state_dict())
    for name, pair in optimizer.factors().items():
        assert all(torch.equal(a, b) for a, b in zip(pair, other.factors()[name], strict=True))
    with pytest.raises(ValueError, match="factor_dtype must be one of float32, bfloat16, but is 'float16'"):
        KFAC(model, factor_dtype="float16")
