"""Save in every mode, in every way, on every mesh; load on every other: the tables of docs/saving.md.

python tests/resume_matrix.py          # each pair of meshes in three of the modes, some minutes
python tests/resume_matrix.py --all    # in all of them, which takes much longer
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.ranks import run_ranks
from support.resume import ASYNCHRONOUS, MODES, WAYS, Found, Shape, moves, resume

SHAPES: list[Shape] = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)]


def chosen(mode: str, modes: Sequence[str], source: Shape, *, each: int, all_: bool) -> list[Shape]:
    """Return the meshes that a mode's checkpoint of this one is loaded on: so that each pair of meshes has
    `each` modes, and they take turns."""
    turn, of = modes.index(mode), SHAPES.index(source) * len(SHAPES)
    gap = max(1, len(modes) // each)
    taken = [{(of + k + gap * n) % len(modes) for n in range(each)} for k in range(len(SHAPES))]
    return [shape for shape, turns in zip(SHAPES, taken, strict=True) if all_ or turn in turns]


def everything(folder: str, all_: bool) -> list[Found]:
    """Be one rank of four."""
    found, root = [], Path(folder)
    for mode in MODES:
        for shape in SHAPES if all_ else [(2, 2)]:
            for way in WAYS:
                found.append(resume(mode, way, shape, root / f"{mode} {way} {shape}"))
        for source in SHAPES:
            for live, modes, each in ((False, list(MODES), 2), (True, ASYNCHRONOUS, 1)):
                targets = chosen(mode, modes, source, each=each, all_=all_) if mode in modes else []
                if targets:
                    found += moves(mode, source, targets, root / f"{mode} {live} {source}", live=live)
    return found


def count(found: Iterable[Found], row: str, column: str) -> dict[tuple[object, object], str]:
    """Return "good of all" for each pair of what two attributes are."""
    all_, good = Counter[tuple[object, object]](), Counter[tuple[object, object]]()
    for one in found:
        key = getattr(one, row), getattr(one, column)
        all_[key] += 1
        good[key] += not one.wrong
    return {key: f"{good[key]} of {all_[key]}" for key in all_}


def table(
    head: str, rows: Sequence[object], columns: Sequence[object], cells: dict[tuple[object, object], str]
) -> None:
    """Print a table in Markdown."""

    def words(value: object) -> str:
        return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    print(f"| {head} | {' | '.join(map(words, columns))} |")
    print("|---" * (len(columns) + 1) + "|")
    for row in rows:
        print(f"| {words(row)} | {' | '.join(cells.get((row, column), '') for column in columns)} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="all modes for each pair of meshes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        by_rank = run_ranks(4, everything, folder, arguments.all, deadline=7200)
    worst: dict[tuple[object, ...], Found] = {}
    for one in (one for found in by_rank for one in found):  # wrong on any rank is wrong
        key = (one.mode, one.way, one.saved_on, one.loaded_on)
        worst[key] = worst[key] if key in worst and worst[key].wrong else one
    moved = [one for one in worst.values() if one.way not in WAYS]
    same = [one for one in worst.values() if one.way in WAYS]
    table("mode", list(MODES), WAYS, count(same, "mode", "way"))
    table("saved on", SHAPES, SHAPES, count(moved, "saved_on", "loaded_on"))
    if wrong := [str(one) for one in worst.values() if one.wrong]:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
