"""What mathematics on local shards needs to know of other ranks: how one side of the matrices is spread, as
functions."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Tensors = list[Tensor]


def _same(tensors: Tensors) -> Tensors:
    return tensors


def same_twice(tensors: Tensors) -> tuple[Tensors, Tensors]:
    return tensors, tensors


def _same_sum(tensors: Tensors, purpose: str) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Side:
    """How the rows of (B, rows, r) factors are spread over ranks, batch by batch.

    Attributes:
        sum: sums small tensors, one per batch, over the ranks that hold different rows; second argument: the
            purpose, for the ledger.
        gather: returns the whole factors.
        take: returns this rank's rows of whole factors.
    """

    sum: Callable[[Tensors, str], Tensors] = _same_sum
    gather: Callable[[Tensors], Tensors] = _same
    take: Callable[[Tensors], Tensors] = _same


LOCAL = Side()
