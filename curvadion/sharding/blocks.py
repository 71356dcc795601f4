"""Blocks: the matrices that a parameter is, where it is several in one, as views of what this rank holds.

A fused projection is matrices one beside the other, a weight of experts matrices one behind the other:

    (*leading, rows, columns)    `batch_dims` leading dimensions count matrices; along the dimension of the
                                 outputs, or of the inputs, `splits` cuts each of them into blocks

Rules see matrices only, each with a `Layout` of its own. Whatever this rank holds of a block is a view of
what it holds of the parameter, contiguous where rows are cut. Of state, what stands for a parameter is one
tensor whose shape does not depend on how the parameter is sharded.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvadion.sharding.layout import Layout
from curvadion.sharding.region import Axes

# The names of the option `weight_layout`: the dimension of the outputs, "rows" in the equations.
WEIGHT_LAYOUTS = {"out_in": 0, "in_out": 1}
SPLIT_ALONG = ("outputs", "inputs")


def output_dim(group: Mapping[str, Any]) -> int:
    """Return the dimension of the group's matrices along which their outputs lie."""
    return WEIGHT_LAYOUTS[group["weight_layout"]]


def split_dim(group: Mapping[str, Any]) -> int:
    """Return the dimension of the group's matrices that `splits` cuts."""
    outputs = output_dim(group)
    return outputs if group["split_along"] == "outputs" else 1 - outputs


def cut_by(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a group's options say of the matrices that its parameters are, if they are any."""
    if group["algorithm"] != "dion":
        return ()
    splits = group["splits"]
    if splits is None or isinstance(splits, int):
        return splits, splits and split_dim(group), group["batch_dims"]
    return tuple(splits), split_dim(group), group["batch_dims"]


def block_sizes(shape: Sequence[int], group: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the lengths of the blocks into which the group's options cut a parameter of this shape.

    Raises ValueError if they cannot.
    """
    splits, dims = group["splits"], 2 + group["batch_dims"]
    if len(shape) != dims:
        raise ValueError(
            f"must have two dimensions, and before them batch_dims={group['batch_dims']} that count matrices"
        )
    length = shape[group["batch_dims"] + split_dim(group)]
    if splits is None:
        return (length,)
    if isinstance(splits, int):
        if length % splits:
            raise ValueError(f"must have {group['split_along']} that splits={splits} divides, not {length}")
        return (length // splits,) * splits
    if sum(splits) != length:
        raise ValueError(
            f"must have as many {group['split_along']} as the sizes of splits={tuple(splits)} make together, "
            f"{sum(splits)}, not {length}"
        )
    return tuple(splits)


@dataclass(frozen=True)
class Blocks:
    """The matrices of one parameter, in order: those of the first leading index first.

    Attributes:
        layout: of the parameter.
        dim: the dimension that is cut, 0 for rows, 1 for columns.
        sizes: lengths of the blocks along it; one for a matrix that is not cut.
    """

    layout: Layout
    dim: int
    sizes: tuple[int, ...]

    @staticmethod
    def of(layout: Layout, group: Mapping[str, Any]) -> "Blocks":
        """Return the blocks that the group's options make of a parameter."""
        return Blocks(layout, split_dim(group), block_sizes(layout.shape, group))

    @property
    def single(self) -> bool:
        """Whether the parameter is one matrix as it stands."""
        return self.leading == 0 and len(self.sizes) == 1

    @property
    def leading(self) -> int:
        """How many dimensions count matrices."""
        return len(self.layout.shape) - 2

    @property
    def count(self) -> int:
        """How many matrices there are."""
        return math.prod(self.layout.shape[:-2]) * len(self.sizes)

    @property
    def apart(self) -> Axes:
        """The axes that split the leading dimensions."""
        return tuple(sorted(axis for axes in self.layout.sharded[:-2] for axis in axes))

    @functools.cached_property
    def labels(self) -> list[str]:
        """What follows the parameter's name in that of each matrix: nothing, or where it stands."""
        if self.single:
            return [""]
        counted = [range(n) for n in self.layout.shape[:-2]]
        counted += [range(len(self.sizes))] if len(self.sizes) > 1 else []
        return [f"[{', '.join(map(str, index))}]" for index in itertools.product(*counted)]

    @functools.cached_property
    def here(self) -> list[int]:
        """The leading indices, as one number, of the matrices of which this rank has a part."""
        ranges = [
            range(start, start + length)
            for start, length in zip(self.layout.offset[:-2], self.layout.local_shape[:-2], strict=True)
        ]
        steps = [math.prod(self.layout.shape[k + 1 : -2]) for k in range(self.leading)]
        places = itertools.product(*ranges)
        return [sum(i * step for i, step in zip(index, steps, strict=True)) for index in places]

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each block begins along the dimension that is cut."""
        return tuple(itertools.accumulate(self.sizes[:-1], initial=0))

    @functools.cached_property
    def layouts(self) -> list[Layout]:
        """The layout of each block, the same for all leading indices."""
        return [self.layout] if self.single else [self._layout_of(k) for k in range(len(self.sizes))]

    def _layout_of(self, k: int) -> Layout:
        layout, (rows, columns) = self.layout, self.layout.shape[-2:]
        first, size = self.starts[k], self.sizes[k]
        low, high = self.part(k)
        offset, local = list(layout.offset[-2:]), list(layout.local_shape[-2:])
        offset[self.dim], local[self.dim] = low + layout.offset[-2:][self.dim] - first, high - low
        if not local[self.dim]:
            offset[self.dim] = 0
        return Layout(
            (size, columns) if self.dim == 0 else (rows, size),
            (local[0], local[1]),
            (offset[0], offset[1]),
            layout.sharded[-2:],
            layout.copied,
            layout.mesh,
            layout.placements,
            whole=layout,
            start=(first, 0) if self.dim == 0 else (0, first),
            apart=self.apart,
        )

    def part(self, k: int) -> tuple[int, int]:
        """Return where what this rank has of a block begins and ends in what it has of the parameter."""
        offset, length = self.layout.offset[-2:][self.dim], self.layout.local_shape[-2:][self.dim]
        first, size = self.starts[k], self.sizes[k]
        low = min(max(first - offset, 0), length)
        return low, max(low, min(first + size - offset, length))

    @functools.cached_property
    def runs(self) -> list[tuple[int, ...]]:
        """Blocks that are stacked in one tensor: all of them if they are equal and no rank cuts them."""
        whole = not self.layout.sharded[-2:][self.dim] and self.dim == 0 and len(set(self.sizes)) == 1
        every = tuple(range(len(self.sizes)))
        return [every] if whole else [(k,) for k in every]

    @functools.cached_property
    def run_of(self) -> list[int]:
        """The index of each block's run."""
        return [next(n for n, run in enumerate(self.runs) if k in run) for k in range(len(self.sizes))]

    def cut(self, x: Tensor) -> list[Tensor]:
        """Return what this rank has of each matrix, as views of what it has of the parameter; nothing of
        those that are all on other ranks."""
        matrices = [x]
        for _ in range(self.leading):  # not a reshape, which may copy
            matrices = [m for y in matrices for m in y.unbind()]
        parts = [self.part(k) for k in range(len(self.sizes))]
        if len(parts) == 1:
            blocks = list(matrices)
        else:
            blocks = [m.narrow(self.dim, low, high - low) for m in matrices for low, high in parts]
        if len(blocks) == self.count:
            return blocks
        number, all_of = len(parts), [x.new_empty(0, 0)] * self.count
        for place, index in enumerate(self.here):
            all_of[index * number : (index + 1) * number] = blocks[place * number : (place + 1) * number]
        return all_of

    def members(self, run: Sequence[int]) -> list[int]:
        """Return which of the parameter's matrices this rank has a part of among those of a run, in the order
        of `stack`."""
        return [index * len(self.sizes) + k for index in self.here for k in run]

    def stack(self, stored: Tensor, run: Sequence[int]) -> Tensor:
        """Return the matrices of a run, (B, rows, columns), as a view of what is stored for several
        parameters, (number, *local shape)."""
        number = len(stored) * len(self.here)  # not -1, which no elements leave open
        matrices = stored.view(number, *stored.shape[-2:])
        if len(run) == len(self.sizes):
            return matrices.view(number * len(run), *self.layouts[run[0]].local_shape)
        low, high = self.part(run[0])
        return matrices.narrow(1 + self.dim, low, high - low)


@dataclass(frozen=True)
class Strips:
    """State that has a row for each row or column of the matrices of a parameter, for some of its blocks.

    Along the dimension that is cut it is one strip, as long as the parameter; along the other one there is a
    strip for each block.

    Attributes:
        blocks: of the parameter.
        dim: the dimension of the matrices whose rows or columns these are.
        of: the blocks that it is for.
        width: of each row; None for a number.
    """

    blocks: Blocks
    dim: int
    of: tuple[int, ...]
    width: int | None = None

    @property
    def side_by_side(self) -> bool:
        """Whether there is a strip for each block."""
        return self.dim != self.blocks.dim and len(self.blocks.sizes) > 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's part."""
        *leading, rows, columns = self.blocks.layout.local_shape
        number = (len(self.of),) if self.side_by_side else ()
        return (*leading, *number, (rows, columns)[self.dim], *(() if self.width is None else (self.width,)))

    @property
    def dims(self) -> tuple[int | None, ...]:
        """Which dimension of the parameter each dimension follows."""
        leading = self.blocks.leading
        number = (None,) if self.side_by_side else ()
        return (*range(leading), *number, leading + self.dim, *(() if self.width is None else (None,)))

    def stack(self, stored: Tensor, run: Sequence[int], width: int | None = None) -> Tensor:
        """Return the strips of a run, (B, length) or (B, length, width), as a view of what is stored for
        several parameters."""
        blocks, tail = self.blocks, self.local_shape[self.blocks.leading :]
        number, whole = len(stored) * len(blocks.here), len(run) == len(blocks.sizes)
        strips = stored.view(number, *tail)
        if self.side_by_side:
            strips = strips.flatten(0, 1) if whole else strips.select(1, self.of.index(run[0]))
        elif whole:
            length = blocks.layouts[run[0]].local_shape[self.dim]
            strips = strips.view(number * len(run), length, *tail[1:])
        else:
            low, high = blocks.part(run[0])
            strips = strips.narrow(1, low, high - low)
        return strips if width is None else strips[..., :width]
