"""Random runs until something is wrong; the seed is printed, and gives the same run again.

python tests/fuzz.py --minutes 30           # four ranks; new seeds every day
python tests/fuzz.py --first 12345 --count 1
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from support.fuzz import RECORDS, WORLD, run_seeds
from support.ranks import RankFailed, run_ranks


def fuzz(first: int, count: int, seconds: float) -> tuple[dict[str, int], str]:
    """Return how many runs of each kind there were, and what was wrong in the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FR_BUFFER_SIZE", str(RECORDS))
        try:
            results = run_ranks(
                WORLD, run_seeds, first, count, time.monotonic() + seconds, deadline=min(seconds, 1e5) + 300
            )
        except RankFailed as error:
            return {}, str(error)
    return results[0], ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--first", type=int, default=int(time.time()) // 86400 * 10**6, help="seed of the first run"
    )
    parser.add_argument("--count", type=int, default=10**6, help="number of runs")
    parser.add_argument("--minutes", type=float, default=1440.0, help="after these no run starts")
    options = parser.parse_args()
    done, wrong = fuzz(options.first, options.count, 60 * options.minutes)
    if wrong:
        sys.exit(wrong)
    print(f"seeds from {options.first}: {done}")


if __name__ == "__main__":
    main()
