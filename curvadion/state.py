"""Optimizer state as tensors: matrices stacked in batches, values copied in and out of it, what a checkpoint must hold."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from curvadion import dion
from curvadion.layout import Axes, Layout, local_tensor
from curvadion.options import GROUP_OPTIONS, check_options
from curvadion_kernels.reference import compute_dtype


@dataclass
class Batch:
    """Matrices of one group with one shape, dtype and layout, stacked.

    Attributes:
        group: index of the parameter group.
        params: positions in the optimizer's list of parameters.
        layout: of each of them.
        momentum: (B, rows, cols), local shards; Q: (B, n, r), local rows.
        common_Q: whether Q is the same on all replicas.
        decay: factor of the momentum that was left for the next pass over it.
    """

    group: int
    params: list[int]
    layout: Layout
    momentum: Tensor
    Q: Tensor
    common_Q: bool = True
    decay: float = 1.0

    @property
    def M(self) -> Tensor:
        """The momenta in the equations' orientation, (B, m, n) with m >= n, in the dtype of the computation."""
        M = self.momentum.mT if self.layout.transposed else self.momentum
        return M.to(compute_dtype(M.dtype))

    @property
    def rows(self) -> Axes:
        """The axes that split m."""
        return self.layout.sharded[self.layout.long]

    @property
    def columns(self) -> Axes:
        """The axes that split n."""
        return self.layout.sharded[self.layout.short]


def make_batches(
    members: Iterable[int],
    *,
    names: Sequence[str],
    params: Sequence[Tensor],
    layouts: Sequence[Layout],
    group_of: Sequence[int],
    groups: Sequence[Mapping[str, Any]],
    momentum_dtype: torch.dtype | None,
) -> list[Batch]:
    """Stack the matrices that are equal in group, shape, dtype and layout, with their first state; the same list on every rank."""
    alike: dict[Any, list[int]] = {}
    for i in members:
        layout = layouts[i]
        key = (group_of[i], layout.shape, layout.sharded, str(layout.placements), params[i].dtype)
        alike.setdefault(key, []).append(i)
    batches = []
    for stack in alike.values():
        like, layout, group = params[stack[0]], layouts[stack[0]], groups[group_of[stack[0]]]
        n = layout.shape[layout.short]
        r = dion.rank_of(n, group["rank_fraction"], group["rank_multiple_of"])
        Q = torch.stack([layout.take(dion.initial_right_factor(names[i], n, r), layout.short, 0) for i in stack])
        momentum = torch.zeros((len(stack), *layout.local_shape), dtype=momentum_dtype or like.dtype, device=like.device)
        Q = Q.to(device=like.device, dtype=compute_dtype(momentum.dtype))
        batches.append(Batch(group_of[stack[0]], stack, layout, momentum, Q))
    return batches


def assign(target: Tensor, value: Any) -> None:
    """Copy a saved value into a state tensor in place; the target keeps its dtype, device and placement."""
    if isinstance(target, DTensor):
        if not isinstance(value, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        elif value.placements != target.placements:
            value = value.redistribute(target.device_mesh, target.placements)
    local_tensor(target).copy_(local_tensor(value) if isinstance(value, Tensor) else torch.as_tensor(value))


def copy_into(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors in place."""
    if targets:
        torch._foreach_copy_(list(targets), list(values))


def or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient, zeros where there is none."""
    return torch.zeros_like(like) if grad is None else grad


def check_loadable(
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    states: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Tensor]]],
) -> None:
    """Raise ValueError if a checkpoint does not fit.

    Args:
        saved_groups, groups: parameter groups of the checkpoint and of the optimizer.
        states: (name, saved state, own state) of every parameter.
    """
    for group, saved in zip(groups, saved_groups, strict=True):
        check_options(saved, GROUP_OPTIONS, " in a parameter group of the checkpoint")
        if saved.get("algorithm", group["algorithm"]) != group["algorithm"]:
            raise ValueError(
                f"a checkpoint must hold the same algorithm for each group; got {saved['algorithm']!r} for a group with "
                f"{group['algorithm']!r}; build the groups as they were when it was saved"
            )
    for name, saved, own in states:
        missing, unknown = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
        if missing or unknown:
            raise ValueError(
                f"a checkpoint must hold exactly {sorted(own)} for {name!r}; missing {missing}, unknown {unknown}; load one that "
                "CurvaDion saved for the same groups"
            )
        for key, value in saved.items():
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if shape != tuple(own[key].shape):
                raise ValueError(
                    f"a checkpoint must hold state of the same shape; got {key} {shape} for {name!r}, expected "
                    f"{tuple(own[key].shape)}; construct with the rank_fraction and rank_multiple_of it was saved with"
                )


def hash_tensors(tensors: Iterable[Tensor], chunk: int = 1 << 22) -> int:
    """Return 62 bits that tell the tensors' contents apart: a weighted sum of their bits modulo 2^64, taken on their device."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors = [t.contiguous().view(integer[t.element_size()]).reshape(-1) for t in tensors]
    if not tensors:
        return 0
    longest = min(chunk, max(t.numel() for t in tensors))
    weights = torch.arange(longest, device=tensors[0].device).mul_(0x9E3779B97F4A7C1).add_(1).bitwise_or_(1)
    total = 0
    for number, bits in enumerate(tensors):
        for part in bits.split(chunk):
            mixed = (part.to(torch.int64) + 0x2545F4914F6CDD1) * weights[: part.numel()]
            total = hash((total, number, int((mixed ^ (mixed >> 29)).sum())))
    return total & ((1 << 62) - 1)
