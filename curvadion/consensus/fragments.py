"""Fragments: equal shares of all elements, whatever the shapes, the same elements on every layout.

Element j of the list of all parameters, each flattened and one after the other, belongs to fragment j modulo
the number of fragments. So each fragment holds its share of every parameter, and of every rank's shard, to
within one element of each.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvadion.sharding.layout import Layout
from curvadion.state.table import Table
from curvadion_kernels.reference import Fixed, compute_dtype


@dataclass(frozen=True)
class Part:
    """What belongs to a fragment of this rank's shard of one parameter.

    Attributes:
        index: of the parameter.
        shape: of the shard as so many runs of elements that follow one another in the parameter, (..., run).
        cuts: slices of that, whose elements belong to the fragment, one cut after the other; None for all.
        run: the only one, where the shard is one run, as without tensor parallelism.
    """

    index: int
    shape: tuple[int, ...] = ()
    cuts: tuple[tuple[slice, ...], ...] | None = None
    run: slice | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of the shard."""
        return self.cuts is None

    def views(self, x: Tensor) -> list[Tensor]:
        """Return the elements where they are in a contiguous tensor."""
        if self.cuts is None:
            return [x]
        runs = x.view(self.shape)
        return [runs[cut] for cut in self.cuts]

    def like(self, x: Tensor) -> Tensor:
        """Return a tensor without memory, of the shape of the elements and the dtype of the computation."""
        like = torch.empty(x.shape, dtype=compute_dtype(x.dtype), device="meta")
        return like if self.whole else like.new_empty(sum(view.numel() for view in self.views(like)))

    def take(self, x: Tensor) -> Tensor:
        """Return the elements, flat; all of the tensor as it is where it is whole."""
        if self.whole:
            return x
        if self.run is not None:
            return x.reshape(-1)[self.run]
        views = self.views(x.contiguous())
        if len(views) == 1:
            return views[0].reshape(-1)
        return torch.cat([view.reshape(-1) for view in views]) if views else x.new_empty(0)

    def in_place(self, x: Tensor) -> Tensor | None:
        """Return what `take` does if it is in the tensor's own memory, None if it is a copy."""
        if self.whole:
            return x
        return x.view(-1)[self.run] if self.run is not None and x.is_contiguous() else None

    def put(self, x: Tensor, values: Tensor) -> None:
        """Put values where `take` found the elements."""
        if self.whole:
            if values is not x:
                x.copy_(values, non_blocking=True)
            return
        if self.run is not None and x.is_contiguous():
            x.view(-1)[self.run].copy_(values, non_blocking=True)
            return
        target = x.contiguous()
        views = self.views(target)
        pieces = [values] if len(views) == 1 else values.split([view.numel() for view in views])
        if values.untyped_storage()._cdata != target.untyped_storage()._cdata:  # not what `take` found there
            for view, piece in zip(views, pieces, strict=True):
                view.copy_(piece.view(view.shape), non_blocking=True)
        if target is not x:
            x.copy_(target)


def parts_of(table: Table, fragment: int, fragments: int) -> list[Part]:
    """Return the parts of a fragment, one for each parameter, in order."""
    if (fragment, fragments) not in table.parts and fragments == 1:
        table.parts[fragment, fragments] = [Part(i) for i in range(len(table.params))]
    if (fragment, fragments) not in table.parts:
        sizes = [math.prod(layout.shape) for layout in table.layouts]
        starts = itertools.accumulate(sizes[:-1], initial=0)
        table.parts[fragment, fragments] = [
            _part(i, layout, fragment - start, fragments)
            for i, (layout, start) in enumerate(zip(table.layouts, starts, strict=True))
        ]
    return table.parts[fragment, fragments]


def take_all(parts: Sequence[Part], tensors: Fixed[Tensor], indices: Sequence[int]) -> list[Tensor]:
    """Return what `Part.take` does of the tensors with these indices.

    Args:
        parts: from `parts_of`.
    """
    places = _places(parts, tensors)
    return [parts[i].take(tensors[i]) if (view := places[i]) is None else view for i in indices]


def put_all(
    parts: Sequence[Part], tensors: Fixed[Tensor], indices: Sequence[int], values: Sequence[Tensor]
) -> None:
    """Put values where `take_all` found the elements."""
    places, targets, sources = _places(parts, tensors), [], []
    for i, value in zip(indices, values, strict=True):
        if (view := places[i]) is None:
            parts[i].put(tensors[i], value)
        elif view is not value:
            targets.append(view)
            sources.append(value)
    if targets:
        torch._foreach_copy_(targets, sources, non_blocking=True)


def _places(parts: Sequence[Part], tensors: Fixed[Tensor]) -> list[Tensor | None]:
    """Return `Part.in_place` of each tensor, made once."""
    if id(parts) not in tensors.memo:  # which are kept, so that no others get that id
        views = [part.in_place(x) for part, x in zip(parts, tensors, strict=True)]
        tensors.memo[id(parts)] = parts, views
    return tensors.memo[id(parts)][1]


def _part(index: int, layout: Layout, wanted: int, stride: int) -> Part:
    """Return the elements of a shard whose index in the whole parameter is `wanted` modulo the stride."""
    if 0 in layout.local_shape:
        return Part(index, layout.local_shape, ())
    # The shard as runs: a dimension that is whole here goes on where the one before it ends.
    shape, steps, first = [1], [1], 0
    for length, size, offset in zip(layout.local_shape, layout.shape, layout.offset, strict=True):
        first = first * size + offset
        steps = [step * size for step in steps]
        if length == size:
            shape[-1], steps[-1] = shape[-1] * size, steps[-1] // size
        else:
            shape, steps = [*shape, length], [*steps, 1]
    cuts = []
    # Places repeat along a dimension after `period` elements, along the last one after `stride`.
    periods = [stride // math.gcd(step, stride) for step in steps[:-1]]
    for begin in itertools.product(*(range(min(p, n)) for p, n in zip(periods, shape[:-1], strict=True))):
        place = first + sum(k * step for k, step in zip(begin, steps[:-1], strict=True))
        last = slice((wanted - place) % stride, None, stride)
        if last.start < shape[-1]:
            cuts.append((*(slice(k, None, p) for k, p in zip(begin, periods, strict=True)), last))
    run = cuts[0][0] if len(shape) == len(cuts) == 1 else None
    return Part(index, tuple(shape), tuple(cuts), run)
