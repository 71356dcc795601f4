"""The command `curvadion`, also `python -m curvadion`: one module for each subcommand, imported when it is
called."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from curvadion import __version__

# Each of these modules has DESCRIPTION, add_arguments(parser) and main(args).
COMMANDS = {
    "doctor": "curvadion.doctor",
    "report": "curvadion.report",
    "project": "curvadion.projection.command",
    "rendezvous": "curvadion.rendezvous",
}


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run the subcommand that the arguments name; none: those of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="curvadion", description="Tools around the CurvaDion optimizer.")
    parser.add_argument("--version", action="version", version=f"curvadion {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in arguments[:1] if arguments and arguments[0] in COMMANDS else COMMANDS:
        module = import_module(COMMANDS[name])
        command = commands.add_parser(name, help=module.DESCRIPTION, description=module.DESCRIPTION)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args = parser.parse_args(arguments)
    return args.main(args)
