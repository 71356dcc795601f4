"""Lists of tensors for operations on all of them: what was found out about them, and small ones together.

On a CPU an operation on a list is one operation for each tensor, whose dispatch takes longer than the work on
a small one; so there small tensors are worked on as stacks. A GPU takes the list in one launch.
"""

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

# On a CPU: elements of a tensor up to which a copy costs less than a dispatch, and of a stack of such.
SMALL_ELEMENTS = 1 << 13
STACK_ELEMENTS = 1 << 15

T = TypeVar("T", bound=Tensor | None, covariant=True)
_DTYPE = operator.attrgetter("dtype")
_SHAPE = operator.attrgetter("shape")


class Fixed(tuple[T, ...]):
    """Tensors whose memory, shapes and dtypes stay as they are while it lives, so that they need to be looked
    at only once.

    Every operation takes it where it takes a list of tensors. None stands for a missing gradient.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return Fixed, (tuple(self),)  # what was found out is not true of copies

    @functools.cached_property
    def present(self) -> list[Tensor]:
        """Those that are not None."""
        return [t for t in self if t is not None]

    @functools.cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where each begins, 0 for None."""
        if len(self.present) == len(self):
            return tuple(map(Tensor.data_ptr, self.present))
        return tuple([0 if t is None else t.data_ptr() for t in self])

    @functools.cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each, -1 for None."""
        if len(self.present) == len(self):
            return tuple(map(Tensor.numel, self.present))
        return tuple([-1 if t is None else t.numel() for t in self])

    @functools.cached_property
    def dtypes(self) -> set[torch.dtype]:
        """The different dtypes."""
        return set(map(_DTYPE, self.present))

    @functools.cached_property
    def devices(self) -> set[int]:
        """The different devices: indices of GPUs, -1 for the CPU."""
        return set(map(Tensor.get_device, self.present))

    @functools.cached_property
    def contiguous(self) -> bool:
        """Whether all are contiguous. Raises RuntimeError if one is not even strided."""
        return all(map(Tensor.is_contiguous, self.present))

    def take(self, indices: tuple[int, ...]) -> "Fixed[T]":
        """Return some of them, in their order; the same object when asked again."""
        if len(indices) == len(self):
            return self
        if indices not in self.memo:
            self.memo[indices] = Fixed([self[i] for i in indices])
        return self.memo[indices]

    @functools.cached_property
    def memo(self) -> dict[Any, Any]:
        """What others found out about them."""
        return {}


@dataclass(frozen=True)
class Lot:
    """Equal tensors that are worked on together: their places in a list, and all of them, (b, *shape)."""

    places: list[int]
    stack: Tensor


class Views(Fixed[Tensor]):
    """All tensors of some stacks, in any order; `lots` has them as parts of the stacks, in place."""

    lots: list[Lot]

    @staticmethod
    def of(stacks: Sequence[tuple[Sequence[int], Tensor]]) -> "Views":
        """Make the list from pairs (the place of each tensor of a stack in it, the stack)."""
        found = {k: view for places, stack in stacks for k, view in zip(places, stack.unbind(), strict=True)}
        views = Views(found[k] for k in range(len(found)))
        views.lots = [
            Lot(list(places[some]), stack[some])
            for places, stack in stacks
            for some in _slices(len(places), stack[0].numel())
        ]
        return views

    @functools.cached_property
    def order(self) -> Tensor:
        """(L,) int64: where each tensor is in the list of all lots."""
        return order_of([lot.places for lot in self.lots], self[0].device)


def _slices(count: int, numel: int) -> Iterator[slice]:
    """Cut a stack of `count` tensors into parts to work on one after the other."""
    together = 1 if numel > SMALL_ELEMENTS else max(1, STACK_ELEMENTS // max(1, numel))
    for start in range(0, count, together):
        yield slice(start, start + together)


def order_of(places: Sequence[list[int]], device: torch.device) -> Tensor:
    """Return the permutation that undoes the one of going through these places one after the other."""
    through = torch.tensor([k for some in places for k in some], dtype=torch.int64, device="cpu")
    return through.argsort().to(device)


def gathered(tensors: Sequence[Tensor | None], places: Sequence[int], like: Tensor) -> Tensor:
    """Return some equal tensors as a stack, zeros like this one for a missing one. One alone is not
    copied."""
    some = [tensors[k] for k in places]
    found = [like.new_zeros(like.shape) if t is None else t for t in some]
    return torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)


def extremes(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest value of each tensor of a stack, NaN where there is one, 0 where it
    is empty: (b,), (b,)."""
    flat = stack.reshape(len(stack), -1)
    if not flat.numel():
        nothing = flat.new_zeros(len(flat))
        return nothing, nothing
    return flat.amax(1), flat.amin(1)


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest |t| of each tensor, NaN where there is one, in the widest dtype: (L,). None may be
    empty."""
    if tensors[0].device.type != "cpu":
        found = torch._foreach_norm(list(tensors), float("inf"))
        alike = len(set(map(_DTYPE, found))) == 1
        return torch.stack(found if alike else [value.to(torch.float64) for value in found])
    equal: dict[Any, list[int]] = {}
    for k, kind in enumerate(zip(map(_SHAPE, tensors), map(_DTYPE, tensors), strict=True)):
        equal.setdefault(kind, []).append(k)
    lots = [
        members[some]
        for (shape, _), members in equal.items()
        for some in _slices(len(members), shape.numel())
    ]
    high, low = map(
        torch.cat, zip(*(extremes(gathered(tensors, some, tensors[0])) for some in lots), strict=True)
    )
    return torch.maximum(high, -low).index_select(0, order_of(lots, high.device))
