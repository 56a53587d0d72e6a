"""Parts as processes of their own, with a time limit: an illegal access, a hang or an exception costs one part."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .findings import Bench

ROOT = Path(__file__).resolve().parents[2]
LOG = "log.txt"


def environment() -> dict[str, str]:
    """This process's, with the repository first on the path."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def run_together(bench: Bench, commands: Mapping[str, Sequence[str]], seconds: float) -> None:
    """Starts all commands, waits for them, and ends those that still run when the time is over.

    Args:
        bench: which says what failed; the errors that processes print go to its log.
        commands: what to call a process in the findings -> its command line.
        seconds: for all of them.
    """
    end = time.monotonic() + seconds
    with (bench.folder / LOG).open("a", encoding="utf-8") as log:
        # A session of its own makes a process the leader of a group, which can be ended with all of its children.
        running = {
            name: subprocess.Popen(command, stderr=log, env=environment(), start_new_session=True)
            for name, command in commands.items()
        }
    try:
        for name, process in running.items():
            try:
                process.wait(max(0.1, end - time.monotonic()))
                if process.returncode:
                    bench.say(f"process {name}", FAILED=f"exit status {process.returncode}, see {LOG}")
            except subprocess.TimeoutExpired:
                bench.say(f"process {name}", FAILED=f"ended after {seconds:.0f} s")
    finally:  # also when this process is interrupted
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
