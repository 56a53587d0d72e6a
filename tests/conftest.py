"""Fixtures of every test. Kernels are interpreted, to be said before they are imported; `make gpu` runs them compiled."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
