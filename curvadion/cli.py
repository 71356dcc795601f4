"""The command `curvadion`, also `python -m curvadion`: one module for each subcommand, imported when it is
called."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from curvadion import __version__

# Each module has add_arguments(parser) and main(args).
COMMANDS = {
    "doctor": ("curvadion.doctor", "look at versions, ranks, links and options before a run does"),
    "project": ("curvadion.projection", "project bytes and seconds per step over a link"),
    "report": ("curvadion.report", "show runs and studies: tables, and one HTML page with pictures"),
    "rendezvous": (
        "curvadion.rendezvous",
        "run the store at which replicas meet that may leave and come back",
    ),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults that say something; where nothing is the default, an option says itself what happens
    then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, "") or action.default is False
        return action.help if silent else super()._get_help_string(action)


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run the subcommand that the arguments name; none: those of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="curvadion", description="Tools around the CurvaDion optimizer.")
    parser.add_argument("--version", action="version", version=f"curvadion {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (where, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        if arguments[:1] == [name]:
            module = import_module(where)
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:  # with the usage of the subcommand, where argparse would show that of `curvadion` alone
        commands.choices.get(arguments[0], parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    return args.main(args)
