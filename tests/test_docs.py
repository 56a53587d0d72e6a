"""Every Python block of README and docs runs as it stands, given a model, a loader and a loss."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from kfac_triton.layers import LAYER_TYPES

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCKS = [
    (f"{page.name}-{number}", block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = list(LAYER_TYPES)
    yield
    LAYER_TYPES[:] = before


def _names() -> dict[str, object]:
    from kfac_triton import KFAC, KFACPreconditioner

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    decoder = nn.ModuleDict({"encoder": nn.Linear(4, 4), "decoder": nn.Linear(4, 3)})
    loss_function = nn.CrossEntropyLoss()
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    loss = loss_function(model(x), y)
    optimizer = KFAC(model)
    return {
        "torch": torch,
        "KFAC": KFAC,
        "KFACPreconditioner": KFACPreconditioner,
        "model": model,
        "decoder_model": decoder,
        "loader": [(x, y)] * 2,
        "loss_function": loss_function,
        "loss": loss,
        "others": list(model[2].parameters()),
        "optimizer": optimizer,
    }


@pytest.mark.parametrize(("name", "block"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_blocks_run(name: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "decoder" in block:
        names = _names()
        names["model"] = names["decoder_model"]
    else:
        names = _names()
    exec(compile(block, name, "exec"), names)


def test_pages_have_blocks() -> None:
    assert {name.split("-")[0] for name, _ in BLOCKS} >= {"README.md", "curvature.md", "layers.md"}
