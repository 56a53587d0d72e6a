"""SOAP and Shampoo are imported from where the user says, and their absence is said."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from torch import nn

from benchmarks.convergence import __main__ as command
from benchmarks.convergence import peers
from benchmarks.convergence.log import Log
from benchmarks.convergence.optimizers import make_optimizer
from benchmarks.convergence.peers import SHAMPOO, SOAP

# Stand-ins with the constructors of the authors' optimizers; they move as SGD.
FAKE_SOAP = """
import torch
class SOAP(torch.optim.SGD):
    def __init__(self, params, lr=3e-3, betas=(0.95, 0.95), precondition_frequency=10):
        assert isinstance(betas, tuple)
        super().__init__(params, lr=lr)
        self.settings = (betas, precondition_frequency)
"""
FAKE_SHAMPOO = """
import torch
from dataclasses import dataclass
from distributed_shampoo.part import NAME
@dataclass
class AdamPreconditionerConfig:
    beta2: float
    epsilon: float
class DistributedShampoo(torch.optim.SGD):
    def __init__(self, params, lr, betas, grafting_config, start_preconditioning_step=-1, precondition_frequency=1):
        super().__init__(params, lr=lr)
        self.settings = (betas, grafting_config.beta2, start_preconditioning_step, precondition_frequency, NAME)
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("soap", "distributed_shampoo", "distributed_shampoo.part"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    package = tmp_path / "checkout" / "distributed_shampoo"
    package.mkdir(parents=True)
    (tmp_path / "soap.py").write_text(FAKE_SOAP)
    (package / "__init__.py").write_text(FAKE_SHAMPOO)
    (package / "part.py").write_text('NAME = "a part"\n')
    yield {SOAP: tmp_path / "soap.py", SHAMPOO: tmp_path / "checkout"}
    peers.use({})
    for name in ("soap", "distributed_shampoo", "distributed_shampoo.part"):
        sys.modules.pop(name, None)


def test_peers_get_their_settings(places: dict[str, Path]) -> None:
    peers.use(places)
    model = nn.Linear(2, 2)
    soap = make_optimizer(SOAP, model, {"lr": 0.5, "betas": [0.8, 0.9]})
    assert soap.param_groups[0]["lr"] == 0.5 and soap.settings == ((0.8, 0.9), 10)
    shampoo = make_optimizer(SHAMPOO, model, {"lr": 0.25, "betas": [0.8, 0.9], "precondition_frequency": 7})
    assert shampoo.param_groups[0]["lr"] == 0.25 and shampoo.settings == ((0.8, 0.9), 0.9, 7, 7, "a part")


def test_the_code_of_a_peer_has_a_fingerprint(places: dict[str, Path]) -> None:
    peers.use(places)
    before = peers.sources(SOAP), peers.sources(SHAMPOO)
    (places[SHAMPOO] / "distributed_shampoo" / "part.py").write_text('NAME = "another part"\n')
    after = peers.sources(SOAP), peers.sources(SHAMPOO)
    assert before[0] == after[0] and before[1] != after[1]


def test_a_place_without_the_peer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--problem", "text", "--soap", str(tmp_path), "--log", "none"])
    assert re.search(r"is neither soap\.py nor a folder with it; fetch SOAP", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--only", "shampoo"], ["--try", "shampoo:lr=1.0"]])
def test_a_peer_that_is_asked_for_needs_a_place(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--problem", "text", *arguments, "--log", "none"])
    assert "Shampoo has to be fetched by you; give its place by --shampoo" in capsys.readouterr().err


def test_peers_race_in_processes(places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    log = tmp_path / "log.json"
    options = ["--quick", "--quiet", "--problem", "mlp", "--seeds", "0", "--output", "none", "--log", str(log), "--jobs", "2"]
    given = ["--soap", str(places[SOAP]), "--shampoo", str(places[SHAMPOO])]
    assert command.main([*options, *given, "--only", "soap", "--only", "shampoo"]) == 0
    printed = capsys.readouterr().out
    assert re.search("^SOAP ", printed, re.M) and re.search("^Shampoo ", printed, re.M) and "does not race" not in printed
    kept = Log(log).runs
    assert {run.sources for run in kept} == {peers.sources(SOAP), peers.sources(SHAMPOO)} and len(kept) == 4
    here = tmp_path / "here.json"
    command.main([*options[:-4], "--jobs", "1", "--log", str(here), *given, "--only", "soap", "--only", "shampoo"])

    def losses(runs):
        return {(run.optimizer, run.config["lr"]): run.losses for run in runs}

    assert losses(kept) == losses(Log(here).runs), "a process gives the losses that this one gives"
    (places[SHAMPOO] / "distributed_shampoo" / "part.py").write_text('NAME = "newer"\n')
    command.main([*options, *given, "--only", "shampoo"])
    assert "2 runs of Shampoo on mlp" in capsys.readouterr().out, "runs of other sources are named"
