"""What was found, and how it is shown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FINE, WARNING, FAULT = "ok", "warning", "FAULT"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: FINE, WARNING or FAULT, which makes the command fail.
        about: what was looked at, in a word or two.
        text: what was found; of a warning or a fault also what to do.
    """

    level: str
    about: str
    text: str


def show(by_rank: Sequence[Iterable[Finding]]) -> None:
    """Print what all ranks found, each finding once, and where it is not all ranks' whose it is."""
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    for finding, found_by in ranks.items():
        some = len(found_by) < len(by_rank)
        of = f" (rank{'s' * (len(found_by) > 1)} {', '.join(map(str, found_by))})" if some else ""
        first, *rest = finding.text.splitlines() or [""]
        print(f"{finding.level:8} {finding.about + of}: {first}")
        print("".join(f"{'':9}{line}\n" for line in rest), end="")


def bad(by_rank: Sequence[Iterable[Finding]]) -> bool:
    """Say whether any rank found a fault."""
    return any(finding.level == FAULT for findings in by_rank for finding in findings)
