"""Dry runs: parameters without values, under `FakeTensorMode` or on the meta device, to see what there would
be."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily


def has_no_values(tensor: Tensor) -> bool:
    """Say whether a tensor has a shape only."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


@contextmanager
def with_values() -> Iterator[None]:
    """Let tensors made inside have values also in a dry run: torch counts ranks and offsets with tensors."""
    with unset_fake_temporarily(), torch.device("cpu"):
        yield
