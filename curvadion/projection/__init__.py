"""Bytes, time per step and speed-up over a link, from formulas: nothing here is measured.

`arguments` and `nominal`, models and links by their names, are known without torch; the rest asks the
optimizer's own code for what it would choose and send.
"""

import argparse

from curvadion.projection.arguments import add_arguments

__all__ = ["add_arguments", "main"]


def main(args: argparse.Namespace) -> None:
    """Run `curvadion project`."""
    from curvadion.projection.command import run  # with torch; `curvadion project --help` is without

    run(args)
