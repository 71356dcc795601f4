"""The parameters of an optimizer on this rank, as a table that is made once and never changes."""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parameter import is_lazy

from curvadion.sharding.blocks import Blocks, block_sizes, cut_by
from curvadion.sharding.dry import has_no_values
from curvadion.sharding.layout import (
    Layout,
    ShardMesh,
    canonical_name,
    is_dense,
    local_tensor,
    refuse_gathered,
)
from curvadion.sharding.region import Axes
from curvadion.state.memory import refuse_shared, repeats
from curvadion_kernels.reference import Fixed


class Matrix(NamedTuple):
    """A matrix that a local rule updates: a parameter, or a block of one.

    Attributes:
        param: the position of its parameter.
        block: which of the blocks of `Blocks.layouts` it is.
        name: the parameter's, and where in it the matrix stands.
        layout: its own.
    """

    param: int
    block: int
    name: str
    layout: Layout


_REQUIRES_GRAD = operator.attrgetter("requires_grad")


@dataclass(frozen=True)
class Table:
    """All parameters that are trained, in the order of the groups.

    Attributes:
        listed, sizes: all parameters of the groups, frozen ones included, and how many each group has.
        frozen: those with requires_grad=False, which are left alone.
        names: canonical names; an unnamed parameter has its position for a name.
        params, group_of: the parameters, and the index of each one's group.
        weights, scalars: positions of what a local rule updates ("dion" groups), and of the rest (AdamW,
            Lion).
        blocks: which matrices each of `weights` is, by position.
        cut_by: for each group, the options that say so.
        matrices: all of them, those of one parameter after the other; the same on all ranks.
        device: of all of them.
        shards, layouts: the mesh of one replica, and which part of each parameter is here.
    """

    listed: list[Tensor]
    sizes: list[int]
    frozen: list[Tensor]
    names: list[str]
    params: list[Tensor]
    group_of: list[int]
    weights: tuple[int, ...]
    scalars: tuple[int, ...]
    blocks: dict[int, Blocks]
    cut_by: list[tuple[Any, ...]]
    matrices: tuple[Matrix, ...]
    device: torch.device
    shards: ShardMesh
    layouts: list[Layout]

    @staticmethod
    def of(groups: Sequence[Mapping[str, Any]]) -> "Table":
        """Read the table off parameter groups. Raises ValueError or TypeError for parameters that cannot be
        updated, or do not go together."""
        for group in groups:
            _check_parameters(group)
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
        refuse_shared((name, p) for name, p, _ in live)
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
        names, layouts = [name for name, _, _ in live], [Layout.of(p, shards) for p in params]
        weights = tuple(i for i, matrix in enumerate(is_matrix) if matrix)
        blocks = {i: Blocks.of(layouts[i], groups[group_of[i]]) for i in weights}
        return Table(
            listed=[p for _, p, _ in named],
            sizes=[len(group["params"]) for group in groups],
            frozen=[p for _, p, _ in named if not p.requires_grad],
            names=names,
            params=params,
            group_of=group_of,
            weights=weights,
            scalars=tuple(i for i, matrix in enumerate(is_matrix) if not matrix),
            blocks=blocks,
            cut_by=[cut_by(group) for group in groups],
            matrices=tuple(
                Matrix(i, k % len(of.sizes), names[i] + label, of.layouts[k % len(of.sizes)])
                for i, of in blocks.items()
                for k, label in enumerate(of.labels)
            ),
            device=device,
            shards=shards,
            layouts=layouts,
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
    def some_copied_apart(self) -> bool:
        """Whether a matrix that some ranks have nothing of is the same on several of those that have it."""
        return any(bool(m.layout.copied) for m in self.matrices if m.layout.apart)

    @functools.cached_property
    def placements(self) -> list[tuple[Placement, ...] | None]:
        """For each parameter, how it is placed; None for a plain one."""
        return [p.placements if isinstance(p, DTensor) else None for p in self.params]

    @functools.cached_property
    def numels(self) -> tuple[tuple[int, ...], ...]:
        """Elements of this rank's shards, of the matrices and of the rest."""
        return tuple(
            tuple(math.prod(self.layouts[i].local_shape) for i in members)
            for members in (self.weights, self.scalars)
        )

    @functools.cached_property
    def first(self) -> list[bool]:
        """For each parameter, whether this rank counts it for all who hold copies of it."""
        return [self.shards.is_first(copied) for copied in self.copied]

    @functools.cached_property
    def owns_all(self) -> bool:
        """Whether this rank counts the norms of all its matrices; others hold copies that somebody else
        counts."""
        return all(self.first[i] for i in self.weights)

    @functools.cached_property
    def owned(self) -> Tensor:
        """(L,) float32 on the device: 1 for each matrix whose norm this rank counts, 0 for the others."""
        return torch.tensor(
            [float(self.first[m.param]) for m in self.matrices], dtype=torch.float32, device=self.device
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
        first: dict[str, int] = {}
        for k, matrix in enumerate(self.matrices):
            first.setdefault(matrix.name, k)
        return [
            matrix.name if first[matrix.name] == k else f"{matrix.name}#{matrix.param}"
            for k, matrix in enumerate(self.matrices)
        ]

    @functools.cached_property
    def first_matrix(self) -> dict[int, int]:
        """The position in `matrices` of the first one of each of `weights`."""
        found: dict[int, int] = {}
        for k, matrix in enumerate(self.matrices):
            found.setdefault(matrix.param, k)
        return found

    @functools.cached_property
    def uncut(self) -> bool:
        """Whether each of `weights` is one matrix as it stands."""
        return all(blocks.single for blocks in self.blocks.values())

    def cut(self, tensors: Fixed[Any]) -> Fixed[Any]:
        """Return the matrices of parameters, or of their gradients, as views; the same object when asked
        again."""
        if self.uncut:
            return tensors.take(self.weights)
        if "matrices" not in tensors.memo:
            parts: list[Tensor | None] = []
            for i in self.weights:
                blocks, x = self.blocks[i], tensors[i]
                parts += [None] * blocks.count if x is None else blocks.cut(x)
            tensors.memo["matrices"] = Fixed(parts)
        return tensors.memo["matrices"]

    @property
    def outdated(self) -> bool:
        """Whether a parameter has been frozen, or one that was is so no longer."""
        return any(map(_REQUIRES_GRAD, self.frozen)) or not all(map(_REQUIRES_GRAD, self.params))

    def replacements(self, groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Tensor]:
        """Return what the groups hold in place of the parameters, by parameter, if each has the place, the
        shape and the requires_grad of the one before; nothing if they hold the same, or something else."""
        current = [p for group in groups for p in group["params"]]
        sizes = [len(group["params"]) for group in groups]
        if sizes != self.sizes or all(map(operator.is_, current, self.listed)):
            return {}
        pairs = dict(zip(self.listed, current, strict=True))
        moved = [(p, q) for p, q in pairs.items() if p is not q]  # some that are frozen have no shape
        alike = all(p.shape == q.shape and p.requires_grad == q.requires_grad for p, q in moved)
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
        return [self.group_of[matrix.param] for matrix in self.matrices]


def _check_parameters(group: Mapping[str, Any]) -> None:
    """Raise if a parameter of the group cannot be updated by its algorithm, or stands there twice; one that
    is frozen may be of any kind."""
    seen = set[int]()
    for position, p in enumerate(group["params"]):
        name = group.get("param_names", {position: f"number {position}"})[position]
        if id(p) in seen:
            raise ValueError(
                f"a parameter must stand once in a group, or it takes its step twice; got {name} again; pass "
                "each tied parameter once, as model.parameters() does"
            )
        seen.add(id(p))
        if p.requires_grad:
            _check_kind(name, p)
            _check_shape(name, p, group)


def _check_kind(name: str, p: Tensor) -> None:
    """Raise if a parameter is no tensor that can be updated in place."""
    if is_lazy(p):
        raise ValueError(
            f"parameters must have a shape; got {name}, of a lazy module; run a batch through the model "
            "before its optimizer is built"
        )
    x = local_tensor(p)
    if not is_dense(x):
        kind = "a nested tensor" if x.is_nested else f"a {type(x).__name__} of layout {x.layout}"
        raise TypeError(
            "parameters must be dense tensors, whose elements lie in memory one by one, or wrap one such; "
            f"got {name}, {kind}; make it dense, as to_dense() does, train what it wraps, or freeze it"
        )
    if p.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"parameters must be real floating-point tensors; got {name} of {p.dtype}; train in float32 or "
            "bfloat16, or freeze it"
        )
    if repeats(x):
        raise ValueError(
            f"parameters must not repeat elements in memory; got {name} of shape {tuple(x.shape)} with "
            f"strides {x.stride()}; make it contiguous(), or expand() it in the model's forward"
        )


def _check_shape(name: str, p: Tensor, group: Mapping[str, Any]) -> None:
    """Raise if a parameter cannot be updated by the algorithm of its group."""
    if group["algorithm"] != "dion":
        return
    try:
        block_sizes(p.shape, group)
    except ValueError as error:
        raise ValueError(
            f"a parameter of a group with algorithm='dion' {error}; got {name} of shape {tuple(p.shape)}; "
            "put it into a group with algorithm='adamw', as param_groups_for(model) does, or say by "
            "batch_dims and splits which matrices it is"
        ) from None
    if not p.numel():
        raise ValueError(
            f"a parameter of a group with algorithm='dion' must have elements; got {name} of shape "
            f"{tuple(p.shape)}; leave it out, or put it into a group with algorithm='adamw'"
        )
