"""The command line, `kfac-triton` and `python -m kfac_triton`.

A new command is a module with `add_parser(subparsers)`, listed in `main`; its parser names the function to run with
`set_defaults(run=...)`.
"""

import argparse
from collections.abc import Sequence

from .. import __version__
from .demo.command import add_parser as add_demo
from .report.command import add_parser as add_report
from .tuning.doctor import add_parser as add_doctor
from .tuning.tune import add_parser as add_tune


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: Arguments after the program name; those of the process if None.
    """
    parser = argparse.ArgumentParser(prog="kfac-triton", description="K-FAC optimizer for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True)
    for add_parser in (add_demo, add_report, add_tune, add_doctor):
        add_parser(subparsers)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
