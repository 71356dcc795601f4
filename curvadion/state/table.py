"""The parameters of an optimizer on this rank, as a table that is made once and never changes."""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from curvadion.sharding.dry import has_no_values
from curvadion.sharding.layout import (
    Axes,
    Layout,
    ShardMesh,
    canonical_name,
    local_tensor,
    refuse_gathered,
)


@dataclass(frozen=True)
class Table:
    """All parameters that are trained, in the order of the groups.

    Attributes:
        listed, sizes: all parameters of the groups, frozen ones included, and how many each group has.
        frozen: those with requires_grad=False, which are left alone.
        names: canonical names; an unnamed parameter has its position for a name.
        params, group_of: the parameters, and the index of each one's group.
        matrices, scalars: positions of what a local rule updates ("dion" groups), and of the rest (AdamW,
            Lion).
        device: of all of them.
        shards, layouts: the mesh of one replica, and which part of each parameter is here.
    """

    listed: list[Tensor]
    sizes: list[int]
    frozen: list[Tensor]
    names: list[str]
    params: list[Tensor]
    group_of: list[int]
    matrices: tuple[int, ...]
    scalars: tuple[int, ...]
    device: torch.device
    shards: ShardMesh
    layouts: list[Layout]

    @staticmethod
    def of(groups: Sequence[Mapping[str, Any]]) -> "Table":
        """Read the table off parameter groups. Raises ValueError for parameters that do not go together."""
        named = [
            (canonical_name(name), p, index)
            for index, group in enumerate(groups)
            for name, p in zip(
                group.get("param_names", [""] * len(group["params"])), group["params"], strict=True
            )
        ]
        live = [(name or str(i), p, index) for i, (name, p, index) in enumerate(named) if p.requires_grad]
        params = [p for _, p, _ in live]
        refuse_gathered((name, p) for name, p, _ in live)
        group_of = [index for _, _, index in live]
        is_matrix = [groups[index]["algorithm"] == "dion" for index in group_of]
        devices = {local_tensor(p).device for p in params}
        if len(devices) > 1:
            raise ValueError(
                f"all parameters of a rank must be on one device; got {sorted(map(str, devices))}; move the "
                "model first"
            )
        device = next(iter(devices), torch.device("cpu"))
        shards = ShardMesh(params)
        if shards.mesh is not None and device.type not in (shards.mesh.device_type, "meta"):
            raise ValueError(
                f"parameters must be on their mesh's device type; got {device} on {shards.mesh}; FSDP's CPU "
                "offload is not supported, keep the shards on the accelerator"
            )
        return Table(
            listed=[p for _, p, _ in named],
            sizes=[len(group["params"]) for group in groups],
            frozen=[p for _, p, _ in named if not p.requires_grad],
            names=[name for name, _, _ in live],
            params=params,
            group_of=group_of,
            matrices=tuple(i for i, matrix in enumerate(is_matrix) if matrix),
            scalars=tuple(i for i, matrix in enumerate(is_matrix) if not matrix),
            device=device,
            shards=shards,
            layouts=[Layout.of(p, shards) for p in params],
        )

    @functools.cached_property
    def dry(self) -> bool:
        """Whether parameters have shapes only, under `FakeTensorMode` or on the meta device."""
        return any(has_no_values(local_tensor(p)) for p in self.params)

    def refuse_meta(self) -> None:
        """Raise RuntimeError if parameters are on the meta device, where a step would do nothing."""
        if self.device.type == "meta":
            raise RuntimeError(
                "parameters must have memory for a step; got parameters on the meta device; build the "
                "optimizer after to_empty(), or use FakeTensorMode for a dry run of steps"
            )

    @functools.cached_property
    def copied(self) -> list[Axes]:
        """For each parameter, the axes over which it is the same."""
        return [layout.copied for layout in self.layouts]

    @functools.cached_property
    def placements(self) -> list[tuple[Placement, ...] | None]:
        """For each parameter, how it is placed; None for a plain one."""
        return [p.placements if isinstance(p, DTensor) else None for p in self.params]

    @functools.cached_property
    def numels(self) -> tuple[tuple[int, ...], ...]:
        """Elements of this rank's shards, of the matrices and of the rest."""
        return tuple(
            tuple(math.prod(self.layouts[i].local_shape) for i in members)
            for members in (self.matrices, self.scalars)
        )

    @functools.cached_property
    def first(self) -> list[bool]:
        """For each parameter, whether this rank counts it for all who hold copies of it."""
        return [self.shards.is_first(copied) for copied in self.copied]

    @functools.cached_property
    def owns_all(self) -> bool:
        """Whether this rank counts the norms of all its matrices; others hold copies that somebody else
        counts."""
        return all(self.first[i] for i in self.matrices)

    @functools.cached_property
    def owned(self) -> Tensor:
        """(L,) float32 on the device: 1 for each matrix whose norm this rank counts, 0 for the others."""
        return torch.tensor(
            [float(self.first[i]) for i in self.matrices], dtype=torch.float32, device=self.device
        )

    @functools.cached_property
    def owned_elements(self) -> int:
        """Elements of the shards on this rank that it counts for all who hold copies."""
        return sum(local_tensor(p).numel() for p, first in zip(self.params, self.first, strict=True) if first)

    @functools.cached_property
    def parts(self) -> dict[tuple[int, int], list[Any]]:
        """What `curvadion.consensus.fragments` has found out, by fragment and number of fragments."""
        return {}

    @functools.cached_property
    def matrix_names(self) -> list[str]:
        """Names of the matrices; one whose name was there before gets its position appended."""
        names = [self.names[i] for i in self.matrices]
        return [
            name if names.index(name) == k else f"{name}#{self.matrices[k]}" for k, name in enumerate(names)
        ]

    @property
    def outdated(self) -> bool:
        """Whether a parameter has been frozen, or one that was is so no longer."""
        return any(p.requires_grad for p in self.frozen) or not all(p.requires_grad for p in self.params)

    def replacements(self, groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Tensor]:
        """Return what the groups hold in place of the parameters, by parameter, if each has the place, the
        shape and the requires_grad of the one before; nothing if they hold the same, or something else."""
        current = [p for group in groups for p in group["params"]]
        sizes = [len(group["params"]) for group in groups]
        if sizes != self.sizes or all(map(operator.is_, current, self.listed)):
            return {}
        pairs = dict(zip(self.listed, current, strict=True))
        alike = all(p.shape == q.shape and p.requires_grad == q.requires_grad for p, q in pairs.items())
        return pairs if alike else {}

    def describe(self) -> list[tuple[Any, ...]]:
        """Return what must be equal on all ranks: names, shapes, dtypes, groups, placements, and what is
        frozen."""
        pairs = zip(self.names, self.params, self.group_of, self.layouts, strict=True)
        trained = [
            (name, tuple(p.shape), str(p.dtype), of, str(layout.placements)) for name, p, of, layout in pairs
        ]
        return [*trained, tuple(p.requires_grad for p in self.listed)]

    @functools.cached_property
    def group_of_matrix(self) -> list[int]:
        """The index of each matrix's group."""
        return [self.group_of[i] for i in self.matrices]
