"""Settings as they are asked for in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import relative_error
from torch import nn

from kfac_triton import KFACPreconditioner
from kfac_triton.settings import CHANGEABLE, Settings


def test_a_loss_scale_in_a_tensor_is_handed_on_unread_and_used() -> None:
    scale = torch.tensor(8.0)
    assert Settings(loss_scale=lambda: scale).current_loss_scale() is scale
    factors = []
    for setting, factor in ((1.0, 1.0), (lambda: scale, scale), (lambda: 8, scale)):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        with KFACPreconditioner(model, loss_scale=setting) as preconditioner:
            (factor * model(torch.randn(6, 4)).square().mean()).backward()
            preconditioner.precondition_()
            factors.append(preconditioner.factors()[""][1])
    assert max(relative_error(x, factors[0]) for x in factors[1:]) <= 1e-6


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_is_found_as_such_or_by_its_method(enabled: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=32.0, enabled=enabled)
    for given in (scaler, scaler.get_scale):
        settings = Settings(loss_scale=given)
        assert settings.scaler is (scaler if enabled else None)
        assert float(settings.current_loss_scale()) == (32.0 if enabled else 1.0)  # before anything was scaled
    scaler.scale(torch.ones(()))
    assert float(Settings(loss_scale=scaler).current_loss_scale()) == (32.0 if enabled else 1.0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"statistics_every": 2}, "statistics_every must be 1, but is 2"),
        ({"inverse_every": 2}, "inverse_every must be 1, but is 2"),
        ({"damping": lambda step: 0.1}, "damping must be a number"),
        ({"loss_scale": lambda: 2.0}, "loss_scale must be a number or a GradScaler"),
        ({"curvature": "ekfac"}, "curvature must be 'kfac'"),
        ({"exact_damping": True}, "without exact_damping"),
        ({"factor_dtype": "bfloat16"}, "factor_dtype must be 'float32'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_a_recorded_step_cannot_do_is_refused(bad: dict[str, Any], message: str) -> None:
    Settings(**bad)
    scaler = torch.amp.GradScaler("cpu")
    Settings(capturable=True, loss_scale=scaler.get_scale)
    with pytest.raises(ValueError, match=f"capturable is True, so .*{message}"):
        Settings(capturable=True, **bad)


def test_what_can_be_changed_and_what_is_fixed() -> None:
    settings = Settings()
    for name in Settings.__dataclass_fields__:
        value = getattr(settings, name)
        if name in CHANGEABLE:
            assert settings.changed(**{name: value}) == settings
        else:
            with pytest.raises(TypeError, match=f"{name} is fixed at construction"):
                settings.changed(**{name: value})
    with pytest.raises(TypeError, match="dumping is not a setting"):
        settings.changed(dumping=1.0)
