"""Sizes that Dion's factors have, and pieces in which they are worked on; without torch."""

import math

# Elements that are worked on at a time, by kind of device.
PIECE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 22}


def rank_of(short: int, rank_fraction: float, rank_multiple_of: int) -> int:
    """Return r = round_up(rank_fraction * short, rank_multiple_of), clipped to the short side."""
    # A product such as 0.07 * 100 = 7.000000000000001 must not round up to 8.
    wanted = math.ceil(round(rank_fraction * short, 6))
    return min(short, math.ceil(max(wanted, 1) / rank_multiple_of) * rank_multiple_of)


def piece_elements(device: str) -> int:
    """Return how many elements to work on at a time: a GPU wants many, a CPU's caches hold few.

    Args:
        device: "cuda" or "cpu".
    """
    return PIECE_ELEMENTS.get(device, PIECE_ELEMENTS["cuda"])
