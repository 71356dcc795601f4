"""Regions: which part of a tensor a rank holds; without torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Axes = tuple[int, ...]  # axes of the shard mesh, ascending


class Region(NamedTuple):
    """The part of a tensor that a rank holds: where it begins, and its shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def of(self, whole: Tensor) -> Tensor:
        """Return this part of a whole matrix, or of a stack of them."""
        for dim, (start, length) in enumerate(zip(self.offset, self.shape, strict=True), -len(self.shape)):
            if length != whole.shape[dim]:
                whole = whole.narrow(dim, start if length else 0, length)
        return whole

    def within(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Region:
        """Return the part that it has of a block, which begins at `start` of the last dimensions."""
        pairs = list(zip(self.offset[-len(shape) :], self.shape[-len(shape) :], start, shape, strict=True))
        low = [min(max(o - first, 0), size) for o, _, first, size in pairs]
        high = [min(max(o + length - first, 0), size) for o, length, first, size in pairs]
        return Region(tuple(low), tuple(max(h - k, 0) for k, h in zip(low, high, strict=True)))
