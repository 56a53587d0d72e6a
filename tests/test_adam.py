"""KFACAdam as a user meets it: arguments, groups, what is not covered, and layers that come later."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_triton import KFAC, KFACAdam, KFACPreconditioner


class Mixed(nn.Module):
    """Layers that are covered, an embedding, a norm, and a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 5)
        self.first, self.norm, self.second = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(self.norm(self.first(self.embedding(tokens))).tanh()) * self.scale


def _model(dtype: torch.dtype = torch.float64) -> Mixed:
    torch.manual_seed(0)
    return Mixed().to(dtype)


def _backward(model: nn.Module, step: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens, labels = torch.randint(6, (16, 4), generator=generator), torch.randint(3, (16, 4), generator=generator)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten())
    (scale * loss).backward()
    return loss.detach()


def _nesterov_adam(gradients: list[Tensor], lr: float, betas: tuple[float, float], eps: float, nesterov: bool) -> list[Tensor]:
    """The movements that some gradients of a parameter lead to, without weight decay."""
    mean, square, moves = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0]), []
    for t, g in enumerate(gradients, 1):
        mean, square = betas[0] * mean + (1 - betas[0]) * g, betas[1] * square + (1 - betas[1]) * g * g
        ahead = mean / (1 - betas[0] ** t)
        if nesterov:
            ahead = betas[0] * ahead + (1 - betas[0]) * g
        moves.append(-lr * ahead / ((square / (1 - betas[1] ** t)).sqrt() + eps))
    return moves


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_what_is_not_covered_moves_by_adam_in_its_own_coordinates(nesterov: bool, maximize: bool) -> None:
    model = _model()
    options: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-3, "nesterov": nesterov}
    optimizer = KFACAdam(model, weight_decay=0.1, maximize=maximize, skip="embedding", **options)
    assert [layer.name for layer in optimizer.engine.layers] == ["first", "second"]
    others = [model.embedding.weight, model.first.bias, model.norm.weight, model.norm.bias, model.scale]
    gradients: list[list[Tensor]] = [[] for _ in others]
    wanted = [p.detach().clone() for p in others]
    for step in range(4):
        _backward(model, step)
        for i, p in enumerate(others):
            assert p.grad is not None
            gradients[i].append(-p.grad if maximize else p.grad.clone())
            wanted[i] = wanted[i] * (1 - 0.03 * 0.1) + _nesterov_adam(gradients[i], **options)[-1]
        optimizer.step()
        for p, value in zip(others, wanted, strict=True):
            torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-14)


def test_a_layer_without_statistics_moves_by_adam_in_its_own_coordinates_and_is_named() -> None:
    """Its weight is used outside of its forward pass. Once statistics come, it starts in its eigenbasis."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    optimizer = KFACAdam(model, lr=0.03, weight_decay=0.0, eps=1e-3)
    gradients, wanted = [], model[1].weight.detach().clone()
    x = torch.randn(9, 4, dtype=torch.float64)
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.linear(model[0](x), model[1].weight, model[1].bias).square().mean().backward()
        assert model[1].weight.grad is not None
        gradients.append(model[1].weight.grad.clone())
        wanted = wanted + _nesterov_adam(gradients, 0.03, (0.9, 0.95), 1e-3, True)[-1]
        if step == 0:
            with pytest.warns(UserWarning, match="'1'"):
                optimizer.step()
        else:
            optimizer.step()
        torch.testing.assert_close(model[1].weight.detach(), wanted, rtol=1e-12, atol=1e-14)
    assert optimizer.diagnostics()["without_statistics"] == ["1"]
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    assert optimizer.diagnostics()["without_statistics"] == []
    _, _, steps = optimizer.engine.curvature.adam.views(1)  # type: ignore[union-attr]
    assert int(steps) == 1


def _kept(optimizer: KFACAdam, name: str) -> list[Tensor]:
    """Copies of a layer's averages, and of the eigenvectors of its factors."""
    engine = optimizer.engine
    number = [layer.name for layer in engine.layers].index(name)
    assert engine.curvature.adam is not None
    averages = [x for tile in engine.curvature.tiles_of(number) for x in engine.curvature.adam.views(tile)]
    parts = [part for block in engine.partition.blocks_of(number) for side in engine.partition.parts_of[block] for part in side]
    bases = [engine.curvature.inverse_at[engine.bank.slots[part]] for part in parts]
    return [x.clone() for x in (*averages, *(basis.kept(place) for basis, place in bases))]


def test_a_layer_that_wakes_up_leaves_the_averages_of_the_others() -> None:
    model = _model()
    model.second.requires_grad_(requires_grad=False)
    optimizer = KFACAdam(model, lr=0.02, refresh_warmup=0, refresh_every=3, statistics_every=1)
    for step in range(5):
        _backward(model, step)
        optimizer.step()
    before = {name: _kept(optimizer, name) for name in ("embedding", "first")}
    model.second.requires_grad_()
    optimizer.add_param_group({"params": list(model.second.parameters())})
    for name, kept in before.items():
        assert all(torch.equal(x, y) for x, y in zip(kept, _kept(optimizer, name), strict=True))
        assert float(kept[-1].abs().sum()) > 0
        assert not torch.equal(kept[-1], torch.eye(len(kept[-1]), dtype=torch.float64))
    _backward(model, 5)
    optimizer.step()
    assert optimizer.diagnostics()["without_statistics"] == []
    for name, steps in {"embedding": 6, "first": 6, "second": 1}.items():
        assert int(_kept(optimizer, name)[2]) == steps


def test_covered_parameters_keep_no_averages_of_their_own() -> None:
    model = _model(torch.float32)
    optimizer = KFACAdam(model)
    for name, p in model.named_parameters():
        covered = name in ("embedding.weight", "first.weight", "second.weight")
        assert ("exp_avg" in optimizer.state[p]) == (not covered), name
    memory = optimizer.diagnostics()["memory"]
    tiles = [mean.nbytes for mean in optimizer.engine.curvature.adam.means]  # type: ignore[union-attr]
    assert memory["moments"] == 2 * sum(tiles)


def test_groups_have_options_of_their_own() -> None:
    """Options of a layer are those of its weight's group, and may change between steps."""
    model, other = _model(), _model()
    groups = [{"params": list(model.first.parameters()), "betas": (0.5, 0.6), "lr": 0.1, "nesterov": False}]
    rest = [p for name, p in model.named_parameters() if not name.startswith("first")]
    optimizer = KFACAdam(model, [*groups, {"params": rest}], lr=0.01)
    twin = KFACAdam(other, lr=0.1, betas=(0.5, 0.6), nesterov=False)
    for m, o in ((model, optimizer), (other, twin)):
        _backward(m, 0)
        o.step()
    torch.testing.assert_close(model.first.weight, other.first.weight, rtol=1e-12, atol=0)
    assert not torch.allclose(model.second.weight, other.second.weight)
    optimizer.param_groups[0]["betas"] = (0.0, 0.6)
    mean, *_ = optimizer.engine.curvature.adam.views(optimizer.engine.curvature.tiles_of(1)[0])  # type: ignore[union-attr]
    _backward(model, 1)
    before = mean.clone()
    optimizer.step()
    assert not torch.allclose(mean, 0.5 * before, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits(dtype: torch.dtype) -> None:
    """Averages and factors are in single precision, and the loss falls as with parameters in single precision."""
    losses = {}
    for kind in (torch.float32, dtype):
        model = _model(kind)
        optimizer = KFACAdam(model, lr=0.02)
        losses[kind] = [float(_step(model, optimizer, 0)) for _ in range(30)]
        assert all(x.dtype == torch.float32 for x in optimizer.engine.curvature.adam.squares)  # type: ignore[union-attr]
    assert losses[dtype][-1] < 0.85 * losses[dtype][0]
    assert abs(losses[dtype][-1] - losses[torch.float32][-1]) < 0.1


def _step(model: nn.Module, optimizer: KFACAdam, step: int) -> Tensor:
    loss = _backward(model, step)
    optimizer.step()
    return loss


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_part_of_a_packed_projection_is_not_covered_alone(bias: str) -> None:
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    optimizer = KFACAdam(nn.Sequential(nn.Linear(4, 4), model), skip="1.q", bias=bias)
    assert [layer.name for layer in optimizer.engine.layers] == ["0", "1.out_proj"]
    assert "packed" in optimizer.diagnostics()["skipped"]["1.k"]
    assert "exp_avg" in optimizer.state[model.in_proj_weight]


def test_a_gradient_that_overflows_when_it_is_squared_is_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = KFACAdam(model, lr=0.1)
    x = torch.randn(8, 4)
    for step in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if step == 1:
            assert model[1].weight.grad is not None
            model[1].weight.grad.fill_(1e30)
        before = copy.deepcopy(model.state_dict())
        optimizer.step()
        moved = {name: not torch.equal(value, before[name]) for name, value in model.state_dict().items()}
        assert moved == {"0.weight": True, "0.bias": True, "1.weight": step != 1, "1.bias": True}
    assert optimizer.diagnostics()["layers"]["1"]["dropped_gradients"] == 1
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_arguments_of_others_are_refused_in_words() -> None:
    model = nn.Linear(3, 2)
    for name, value in {"damping": 0.1, "ema_decay": 0.9, "tail": "sgd", "inverse_every": 3, "kl_clip": 1.0}.items():
        with pytest.raises(TypeError, match=f"{name} is not an argument of KFACAdam"):
            KFACAdam(model, **{name: value})
    with pytest.raises(TypeError, match="sharpness"):
        KFACAdam(model, sharpness=1)
    with pytest.raises(ValueError, match="noise_damping must be finite and at least 0, but is -1"):
        KFACAdam(model, noise_damping=-1)
    with pytest.raises(ValueError, match="refresh must be one of auto, qr, products, eigh"):
        KFACAdam(model, refresh="svd")
    with pytest.raises(ValueError, match="refresh_every must be 1, but is 10"):
        KFACAdam(model, capturable=True)
    with pytest.raises(ValueError, match="statistics_every must be 1, but is 2"):
        KFACAdam(model, refresh_every=1, statistics_every=2, capturable=True)
    with pytest.raises(ValueError, match="lr is 'auto'"):
        KFACAdam(model, lr="auto")
    with pytest.raises(ValueError, match="tail of every group must be 'adamw'"):
        KFAC(model, curvature="adam")
    with pytest.raises(ValueError, match="exact_damping must be False"):
        KFAC(model, curvature="adam", tail="adamw", exact_damping=True)
    with pytest.raises(ValueError, match="curvature must be 'adam'"):
        KFAC(model, bias="separate")
    with pytest.raises(ValueError, match="use KFACAdam"):
        KFACPreconditioner(model, curvature="adam")
    assert not any(module._forward_hooks for module in model.modules())


def test_it_is_a_mode_of_kfac() -> None:
    models = [_model(), _model()]
    optimizers: list[KFAC] = [
        KFACAdam(models[0], lr=0.02, refresh_every=2, refresh_warmup=3, factor_decay=0.9),
        KFAC(
            models[1], lr=0.02, curvature="adam", tail="adamw", nesterov=True, betas=(0.9, 0.95), weight_decay=0.01,
            inverse_every=2, warmup=3, ema_decay=0.9, norms="skip", bias="separate", statistics_every=2, stats_fraction=1.0,
        ),
    ]  # fmt: skip
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(6):
            _backward(model, step)
            optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize(("refresh_every", "expected"), [(10, 5), (5, 5), (3, 3), (1, 1), (lambda step: 1 + step, 5)])
def test_statistics_are_as_frequent_as_refreshes_at_least(refresh_every: Any, expected: int) -> None:
    """Every five steps unless a refresh comes sooner: it would find the factors as they were."""
    settings = KFACAdam(_model(), refresh_every=refresh_every).engine.settings
    assert (settings.statistics_every, settings.stats_fraction) == (expected, 1.0)
    assert KFACAdam(_model(), refresh_every=refresh_every, statistics_every=7).engine.settings.statistics_every == 7


def test_settings_are_changed_by_their_names_here() -> None:
    optimizer = KFACAdam(_model())
    optimizer.change(refresh_every=3, refresh_warmup=2, factor_decay=0.9, stats_fraction=0.5)
    settings = optimizer.engine.settings
    assert (settings.inverse_every, settings.warmup, settings.ema_decay, settings.stats_fraction) == (3, 2, 0.9, 0.5)
    for name in ("damping", "kl_clip", "ema_decay"):
        with pytest.raises(TypeError, match=name):
            optimizer.change(**{name: 0.5})
    with pytest.raises(TypeError, match="kl_clip has no effect"):
        KFAC(_model(), curvature="adam", tail="adamw").change(kl_clip=1.0)
    for name, value in {"refresh_every": 0, "refresh_warmup": -1, "factor_decay": 1.0}.items():
        with pytest.raises(ValueError, match=name):
            KFACAdam(_model(), **{name: value})  # type: ignore[arg-type]


def test_a_checkpoint_of_another_rule_is_refused_and_one_of_adamw_is_not() -> None:
    """AdamW's averages of parameters that are not covered are taken; those of the others are in other coordinates."""
    model, other = _model(), _model()
    optimizer, adamw = KFACAdam(model), torch.optim.AdamW(other.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"must be 'adamw', but is \['sgd'\]"):
        optimizer.load_state_dict(KFAC(other).state_dict())
    _backward(other, 0)
    adamw.step()
    optimizer.load_state_dict(adamw.state_dict())
    assert torch.equal(optimizer.state[model.scale]["exp_avg"], adamw.state[other.scale]["exp_avg"])
    assert "exp_avg" not in optimizer.state[model.first.weight]
    _backward(model, 1)
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_diagnostics_have_no_damping() -> None:
    optimizer = KFACAdam(model := _model(torch.float32), lr=1e-3)
    for step in range(3):
        _backward(model, step)
        optimizer.step()
    found = optimizer.diagnostics()
    assert not found.keys() & {"damping", "kl_clip_scale"}
    for layer in found["layers"].values():
        assert all(bool(torch.isfinite(torch.tensor(float(value)))) for value in layer.values())
        assert max(layer["residual_A"], layer["residual_G"]) < 1e-4


def test_without_eps_what_has_no_gradient_stays() -> None:
    """A token that never comes, an output that counts for nothing: covered or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3), nn.LayerNorm(3)).double()
    optimizer = KFACAdam(model, lr=0.05, weight_decay=0.0, eps=0.0, skip="Embedding")
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randint(5, (16,)))[:, :2].square().sum(1).mean().backward()
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    embedding, _, _, scale, shift = (p.detach() for p in model.parameters())
    assert torch.equal(embedding[5], before[0][5])
    assert not torch.equal(embedding[4], before[0][4])
    assert torch.equal(torch.stack([scale[2], shift[2]]), torch.stack([before[3][2], before[4][2]]))
