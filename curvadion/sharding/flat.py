"""Flat buffers: many tensors in one, and how such a buffer is cut up among the ranks of a replica."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvadion.sharding.region import Axes

BUCKET_BYTES = 1 << 28


@dataclass(frozen=True)
class Cut:
    """How a flat buffer was cut up inside a replica, so that each rank sends its piece.

    Attributes:
        indices: of the tensors in the buffer.
        split, copies: axes along which it was cut, because it was a partial sum or the same there.
        parts: what is left after each of these cuts.
    """

    indices: list[int]
    split: Axes
    copies: Axes
    parts: list["Part"]


@dataclass(frozen=True)
class Part:
    """One of `parts` equal pieces of a flat buffer of `numel` elements; the last ones may be short or
    empty."""

    numel: int
    parts: int
    index: int

    @property
    def chunk(self) -> int:
        return -(-self.numel // self.parts)

    @property
    def length(self) -> int:
        return max(0, min(self.chunk, self.numel - self.index * self.chunk))

    def of(self, flat: Tensor) -> Tensor:
        """Return this part of the buffer."""
        return flat.narrow(0, min(self.index * self.chunk, self.numel), self.length)


def buckets(
    tensors: Sequence[Tensor], keys: Sequence[tuple[Axes, ...]]
) -> Iterator[tuple[tuple[Axes, ...], list[int]]]:
    """Yield (axes, indices of the tensors of one flat buffer), ordered by axes, dtypes and sizes alone."""
    order: dict[tuple, list[int]] = {}
    for i, (t, key) in enumerate(zip(tensors, keys, strict=True)):
        order.setdefault((key, str(t.dtype)), []).append(i)
    for (key, _), indices in sorted(order.items()):
        bucket: list[int] = []
        size = 0
        for i in indices:
            nbytes = tensors[i].numel() * tensors[i].element_size()
            if bucket and size + nbytes > BUCKET_BYTES:
                yield key, bucket
                bucket, size = [], 0
            bucket.append(i)
            size += nbytes
        yield key, bucket


def pad(flat: Tensor, numel: int) -> Tensor:
    """Return the buffer with zeros at its end, contiguous."""
    return (
        torch.nn.functional.pad(flat, (0, numel - flat.numel()))
        if flat.numel() < numel
        else flat.contiguous()
    )


def flatten(tensors: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    return torch.cat([tensors[i].reshape(-1) for i in indices])


def shaped(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the flat buffer, shaped like the tensors it was made of."""
    pieces = flat.split([t.numel() for t in like])
    return [piece if t.ndim == 1 else piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]


def unflatten(flat: Tensor, like: Sequence[Tensor], indices: Sequence[int], result: list[Tensor]) -> None:
    """Put views of the flat buffer, shaped like the tensors it was made of, into `result`."""
    for i, view in zip(indices, shaped(flat, [like[i] for i in indices]), strict=True):
        result[i] = view
