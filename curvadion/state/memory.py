"""Whether tensors have memory of their own."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from curvadion.sharding.dry import has_no_values
from curvadion.sharding.layout import local_tensor


def repeats(x: Tensor) -> bool:
    """Say whether elements of a tensor are one in memory, as after `expand()`."""
    pairs = zip(x.shape, x.stride(), strict=True)
    return 0 in x.stride() and 0 not in x.shape and any(n > 1 and not stride for n, stride in pairs)


class Span(NamedTuple):
    """Where in its block of memory the first byte of a tensor is, and where its last one has been passed.

    Of two blocks nothing is compared: some devices say of one where its handle is, not its bytes.
    """

    block: tuple[str, int]
    start: int
    end: int
    name: str
    tensor: Tensor

    @staticmethod
    def of(name: str, x: Tensor) -> "Span":
        block, size = (str(x.device), x.untyped_storage().data_ptr()), x.element_size()
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        start = int(x.storage_offset()) * size
        return Span(block, start, start + int(last + 1) * size, name, x)

    @property
    def full(self) -> bool:
        """Whether every byte of it is the tensor's."""
        return self.end - self.start == self.tensor.numel() * self.tensor.element_size()

    def bytes_in(self, memory: Tensor, first: int) -> Tensor:
        """Return the places of the tensor's bytes in memory that begins at `first`."""
        size = self.tensor.element_size()
        strides = [size * stride for stride in self.tensor.stride()]
        return memory.as_strided((*self.tensor.shape, size), (*strides, 1), self.start - first)

    def shares_with(self, other: "Span") -> bool:
        """Say whether two tensors whose spans overlap have a byte in common: columns of one matrix have
        none."""
        if self.full and other.full:
            return True
        first = min(self.start, other.start)
        mine = torch.zeros(max(self.end, other.end) - first, dtype=torch.bool)
        self.bytes_in(mine, first).fill_(True)
        return bool(other.bytes_in(mine, first).any())


def refuse_shared(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError if two parameters have an element in common, on this rank: it would be moved twice."""
    local = [(name, local_tensor(p)) for name, p in named]
    spans = [Span.of(name, x) for name, x in local if x.numel() and not has_no_values(x)]
    before: list[Span] = []
    for span in sorted((span for span in spans if span.block[1]), key=lambda span: span[:2]):  # 0: freed
        before = [other for other in before if other.block == span.block and other.end > span.start]
        for other in before:
            if span.shares_with(other):
                first, second = sorted((span.name, other.name))
                raise ValueError(
                    f"each parameter must have memory of its own; got {first!r} and {second!r}, which share "
                    "some, so that each step would move it twice; tie them by making both one Parameter "
                    "(head.weight = embedding.weight), or clone() one"
                )
        before.append(span)
