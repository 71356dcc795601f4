"""What all replicas hold alike between two steps, and what of a replica's state is its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from curvadion.sharding.layout import reshard_gathered_modules
from curvadion.state.batch import RIGHT_FACTORS
from curvadion.state.store import States, Store

# State of a parameter that is equal in all replicas whatever steps they take; Q is too, where it is common.
COMMON_KEYS = ("step", "local_steps", "synchronized_steps", "outer_momentum")


def without_own(states: States, store: Store, *, first: bool) -> dict[Tensor, dict[str, Tensor]]:
    """Return the state that goes into a checkpoint while replicas differ, by parameter.

    What is common, with no local step behind it; and of the first replica also what is its own, momentum,
    moments and their like, which all replicas go on with after a load.

    Args:
        first: whether this is the first replica.
    """
    own_Q = store.own_Q

    def chosen(p: Tensor, key: str) -> bool:
        return first or key in COMMON_KEYS or (key in RIGHT_FACTORS and p not in own_Q)

    return {
        p: {
            key: torch.zeros_like(value) if key == "local_steps" else value
            for key, value in values.items()
            if chosen(p, key)
        }
        for p, values in states.items()
    }


@contextmanager
def holding(X: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Let tensors and other ones of the same shapes and dtypes change places inside the context, bit for
    bit. Costs the memory of the largest."""
    swapped: list[tuple[Tensor, Tensor]] = []
    try:
        for x, value in zip(X, values, strict=True):
            if x is not value:
                _swap(x, value)
                swapped.append((x, value))
        reshard_gathered_modules()
        yield
    finally:
        for x, value in swapped:
            _swap(x, value)
        reshard_gathered_modules()


@torch.no_grad()
def _swap(x: Tensor, value: Tensor) -> None:
    mine = x.clone()
    x.copy_(value, non_blocking=True)
    value.copy_(mine, non_blocking=True)
