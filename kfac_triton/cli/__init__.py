"""The command line, `kfac-triton` and `python -m kfac_triton`.

A new command is a module, listed in `COMMANDS`, with `HELP` and `DESCRIPTION`, `add_arguments(parser)`, and
`run(parser, arguments)`, which returns the exit status.
"""

import argparse
from collections.abc import Sequence
from functools import partial

from .. import __version__
from .demo import command as demo_command
from .report import command as report_command
from .tuning import doctor, tune

COMMANDS = {"demo": demo_command, "report": report_command, "tune": tune, "doctor": doctor}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: Arguments after the program name; those of the process if None.
    """
    parser = argparse.ArgumentParser(prog="kfac-triton", description="K-FAC optimizer for PyTorch.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.DESCRIPTION)
        command.add_arguments(subparser)
        subparser.set_defaults(run=partial(command.run, subparser))
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))
