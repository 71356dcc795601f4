"""Fragments: equal shares of all elements, whatever the shapes, the same elements on every layout.

Element j of the list of all parameters, each flattened and one after the other, belongs to fragment j modulo
the number of fragments. So each fragment holds its share of every parameter, and of every rank's shard, to
within one element of each.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvadion.sharding.layout import Layout
from curvadion.state.table import Table
from curvadion_kernels.reference import compute_dtype


@dataclass(frozen=True)
class Part:
    """What belongs to a fragment of this rank's shard of one parameter.

    Attributes:
        index: of the parameter.
        first, stride: every stride-th element of the flattened shard from the first on, where the shard is
            one run of the parameter's elements;
        elements: their indices in the flattened shard, where it is not (columns split).
    """

    index: int
    first: int = 0
    stride: int = 1
    elements: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of the shard."""
        return self.stride == 1 and self.elements is None

    def like(self, x: Tensor) -> Tensor:
        """Return a tensor without memory, of the shape of the elements and the dtype of the computation."""
        shape: tuple[int, ...] = tuple(x.shape)
        if not self.whole:
            run = range(self.first, x.numel(), self.stride)
            shape = (len(run) if self.elements is None else len(self.elements),)
        return torch.empty(shape, dtype=compute_dtype(x.dtype), device="meta")

    def take(self, x: Tensor) -> Tensor:
        """Return the elements, flat; all of the tensor as it is where it is whole."""
        if self.whole:
            return x
        flat = x.reshape(-1)
        return flat[self.first :: self.stride] if self.elements is None else flat[self.elements.to(x.device)]

    def put(self, x: Tensor, values: Tensor) -> None:
        """Put values where `take` found the elements."""
        if self.whole:
            if values is not x:
                x.copy_(values, non_blocking=True)
            return
        flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
        if self.elements is None:
            flat[self.first :: self.stride].copy_(values, non_blocking=True)
        else:
            flat.index_copy_(0, self.elements.to(x.device), values.to(x.device, x.dtype))
        if not x.is_contiguous():
            x.copy_(flat.view(x.shape))


def parts_of(table: Table, fragment: int, fragments: int) -> list[Part]:
    """Return the parts of a fragment, one for each parameter, in order."""
    if fragments == 1:
        return [Part(i) for i in range(len(table.params))]
    if (fragment, fragments) not in table.parts:
        sizes = [math.prod(layout.shape) for layout in table.layouts]
        starts = itertools.accumulate(sizes[:-1], initial=0)
        table.parts[fragment, fragments] = [
            _part(i, layout, fragment - start, fragments, table.device)
            for i, (layout, start) in enumerate(zip(table.layouts, starts, strict=True))
        ]
    return table.parts[fragment, fragments]


def _part(index: int, layout: Layout, wanted: int, stride: int, device: torch.device) -> Part:
    """Return the elements of a shard whose index in the whole parameter is `wanted` modulo the stride."""
    if layout.local_shape[1:] == layout.shape[1:]:  # rows split at most: one run of elements
        begin = layout.offset[0] * math.prod(layout.shape[1:]) if layout.shape else 0
        return Part(index, (wanted - begin) % stride, stride)
    numbers = torch.zeros((1,) * len(layout.shape), dtype=torch.int64)
    for dim, (length, offset) in enumerate(zip(layout.local_shape, layout.offset, strict=True)):
        along = (torch.arange(length) + offset) * math.prod(layout.shape[dim + 1 :])
        numbers = numbers + along.view([-1 if d == dim else 1 for d in range(len(layout.shape))])
    return Part(
        index, 0, stride, (numbers.reshape(-1) % stride == wanted % stride).nonzero().view(-1).to(device)
    )
