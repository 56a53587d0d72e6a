"""The part `tune`: tile configurations that `kfac-triton tune --quick` finds for kernels; they stay in the folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from .findings import Bench
from .processes import ROOT, environment

SECONDS = 60
LARGEST = {"factored_newton": 2048}  # side of the largest matrices, where it is not 1024


def run(bench: Bench, names: Sequence[str]) -> None:
    """Says what was found for each kernel."""
    if not bench.on_gpu:
        bench.say("skipped", reason="no GPU")
        return
    for name in names:
        bench.attempt(name, partial(_tune, bench, name))


def _tune(bench: Bench, name: str) -> None:
    command = [sys.executable, "-m", "kfac_triton", "tune", "--quick", "--quiet", "--device", bench.device, "--kernel", name]
    command += ["--largest", str(LARGEST.get(name, 1024))]
    variables = environment() | {"KFAC_TRITON_CONFIGS": os.fspath(bench.folder / "configs")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, env=variables)
    facts = {"FAILED": f"exit status {done.returncode}"} if done.returncode else {}
    bench.say(name, found=done.stdout.strip().splitlines()[:6], error=done.stderr.strip()[-200:], **facts)
