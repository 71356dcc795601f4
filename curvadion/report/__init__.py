"""`curvadion report RUN ...`: what runs and studies measured, as one HTML page that needs no network, and its
pictures.

`runs` reads what `scripts/train.py` leaves behind, `studies` aggregates many runs over seeds, `figures`
draws, `page` puts it all together; `display` is the live line of a run. They need the [report] extra (rich,
matplotlib) and nothing else of the library.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `curvadion report`."""
    run_help = (
        "--out folder of a training run, or a .jsonl file of a study or of a slow-link benchmark; any "
        "number, in any mix"
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=run_help)
    out_help = (
        "folder for index.html and the PNG files; none: report/ in the first run's folder, or beside the "
        "first file"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=out_help)


def main(args: argparse.Namespace) -> None:
    """Write the page, and print its tables."""
    from curvadion.report.page import (
        write_report,
    )  # which needs the [report] extra; `curvadion --help` does not

    write_report(args.runs, args.out)
