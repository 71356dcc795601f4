"""Layouts: which part of a parameter this rank holds, read off the DTensor, as data.

`ShardMesh` is the mesh of one replica (FSDP, tensor parallel, both or nothing); `Layout` says which of its
axes split which dimension of a parameter and over which it is copied. Optimizer state is wrapped back into
DTensors here and nowhere else.
"""

import functools
import itertools
import math
import operator
import re
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor._utils import (
    _compute_local_shape_and_global_offset,
    compute_local_shape_and_global_offset,
)
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from curvadion.sharding.dry import has_no_values, with_values
from curvadion.sharding.elastic import ElasticGroup
from curvadion.sharding.group import Group, ThreadGroup, TorchGroup
from curvadion.sharding.region import Axes, Region

_PLACEMENTS = operator.attrgetter("placements")
_LOCAL = operator.attrgetter("_local_tensor")
_REQUIRES_GRAD = operator.attrgetter("requires_grad")

_KIND = operator.attrgetter("shape", "dtype", "device", "layout")
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_HELD_AT: MutableMapping[Tensor, str] = WeakTensorKeyDictionary()  # by wrapper, the name of what it holds

_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def canonical_name(name: str) -> str:
    """Return the parameter's name without the prefixes that torch.compile, activation checkpointing, FSDP and
    DDP insert."""
    return _WRAPPERS.sub("", name).removeprefix("module.")


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a parameter, gradient or state tensor, and what a wrapper holds in place of
    that; call it under `torch.no_grad()`."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor  # to_local() returns it in a view, which costs a microsecond
    if type(tensor) in _PLAIN:
        return tensor
    return _held(tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor)


def _held(x: Tensor) -> Tensor:
    """Return the tensor that a wrapper holds, if it is alike and all there is: float8 training wraps weights
    so, to cast them on their way to other ranks. Return any other tensor as it is.

    A wrapper is asked once where that is: torchao's holds a scale as well later on, and waits for the device
    to answer.
    """
    place = _HELD_AT.get(x)
    if place is None:
        if not is_traceable_wrapper_subclass(x):
            return x
        places = x.__tensor_flatten__()[0]
        inner = getattr(x, places[0], None) if len(places) == 1 else None
        if not isinstance(inner, Tensor) or _KIND(inner) != _KIND(x):
            return x
        if not is_dense(inner) or inner.stride() != x.stride():
            return x
        _HELD_AT[x] = place = places[0]
    return getattr(x, place)


def is_dense(x: Tensor) -> bool:
    """Say whether a tensor's elements lie in memory, as those of sparse and nested ones do not, and of ones
    that wrap others. Without values they count as if they did."""
    if x.layout != torch.strided or x.is_nested:
        return False
    if type(x) is Tensor:
        return True
    try:
        return has_no_values(x) or x.untyped_storage().data_ptr() >= 0
    except RuntimeError:  # a wrapper
        return False


def local_tensors(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return `local_tensor` of each; fast where all are DTensors and where none is."""
    kinds = set(map(type, tensors))
    local = tensors
    if kinds == {DTensor}:
        local = list(map(_LOCAL, tensors))
        kinds = set(map(type, local))
    return local if kinds <= _PLAIN else list(map(local_tensor, tensors))


def usual_gradients(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    placements: Sequence[tuple[Placement, ...] | None],
) -> list[Tensor] | None:
    """Return the local gradients if they are as nearly always, and None if they need a closer look, one by
    one.

    As nearly always: all there and wanted, none on its way from another rank, and either all plain or all
    placed like their parameters.

    Args:
        placements: of the parameters; None for a plain one.
    """
    if not all(map(_REQUIRES_GRAD, params)):
        return None
    kinds = set(map(type, grads))
    if kinds == {DTensor}:
        if list(map(_PLACEMENTS, grads)) != placements:
            return None
        local = list(map(_LOCAL, grads))
        kinds = set(map(type, local))
    else:
        local = [] if any(placements) else list(grads)
    return local if kinds == {Tensor} else None


def reshard_gathered_modules() -> None:
    """Make FSDP2 forget parameters that it keeps gathered, before or after somebody changes the shards behind
    its back.

    After a forward without backward the root module's parameters stay gathered, and the next forward would
    use those copies as they were. FSDP2 offers no way from a parameter to its module, hence the register of
    all modules under `fully_shard`; a module that is gathered for no reason only pays one more all-gather.
    """
    from torch.distributed._composable_state import _module_state_mapping  # private, so: only here

    if not _module_state_mapping:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in list(_module_state_mapping):
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_gathered(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError if some of these parameters are FSDP2's gathered copies, whose memory it frees.

    A module has them in place of its shards after a forward without a backward, and after `unshard()`.
    """
    reshard_gathered_modules()
    gone = []
    for name, p in named:
        x = local_tensor(p)
        plain = type(x) in _PLAIN and not has_no_values(x)
        if plain and x.numel() and not x.untyped_storage().nbytes():
            gone.append(name)
    if gone:
        raise ValueError(
            "parameters must be the shards that FSDP2 keeps; got some that it has gathered, and whose memory "
            f"it frees: {', '.join(gone[:5])}{' and others' if len(gone) > 5 else ''}; call module.reshard() "
            "before listing parameters, or take param_groups_for(model), which does so"
        )


class ShardMesh:
    """The ranks that together hold one replica, and their axes (mesh dimensions of more than one rank).

    Args:
        params: all parameters of the optimizer. Their meshes must be sub-meshes of one of them. Plain tensors
            count as copied over every axis.
    """

    def __init__(self, params: Iterable[Tensor]):
        meshes: list[DeviceMesh] = []
        for p in params:
            if isinstance(p, DTensor) and all(p.device_mesh is not m for m in meshes):
                meshes.append(p.device_mesh)
        self.mesh = max(meshes, key=lambda m: m.size(), default=None)
        with with_values():
            self.ranks: tuple[int, ...] = (
                tuple(self.mesh.mesh.flatten().tolist()) if self.mesh is not None else ()
            )
        self.names: list[str] = []
        self._axis_ranks: list[tuple[int, ...]] = []
        self._groups: list[Group] = []
        if self.mesh is not None:
            for dim, ranks in _dims(self.mesh):
                self._groups.append(TorchGroup(self.mesh.get_group(dim)))
                self.names.append(
                    (self.mesh.mesh_dim_names or ())[dim] if self.mesh.mesh_dim_names else f"dimension {dim}"
                )
                self._axis_ranks.append(ranks)
        self.axes: Axes = tuple(range(len(self.names)))
        self._axis_of_dim = {id(m): self._match(m) for m in meshes}
        self._meshes = meshes  # keeps the ids above alive
        self._regions: dict[tuple, tuple[Region, ...]] = {}

    def _match(self, mesh: DeviceMesh) -> dict[int, int]:
        """Return the axis of each dimension of a parameter's mesh (dimensions of size 1 have none)."""
        found = {}
        for dim, ranks in _dims(mesh):
            if ranks not in self._axis_ranks:
                raise ValueError(
                    "the meshes of all parameters must be sub-meshes of one mesh, which holds one replica; "
                    f"got a parameter on {mesh} beside one on {self.mesh}. Build one DeviceMesh, for "
                    "instance with dimensions "
                    '("replicate", "shard", "tp"), and slice the meshes for fully_shard and '
                    "parallelize_module from it"
                )
            found[dim] = self._axis_ranks.index(ranks)
        return found

    @property
    def size(self) -> int:
        """The number of ranks of a replica."""
        return max(1, len(self.ranks))

    @functools.cached_property
    def members(self) -> list[int]:
        """The global ranks of the replica, in order."""
        if not self.axes:
            return [dist.get_rank() if dist.is_initialized() else 0]
        return self._groups[0].ranks if len(self.axes) == 1 else sorted(self.ranks)

    @functools.cached_property
    def index(self) -> int:
        """This rank's place among them."""
        return self.members.index(dist.get_rank()) if self.axes else 0

    @functools.cached_property
    def coordinates(self) -> list[tuple[int, ...]]:
        """The place along each axis of each of the `members`."""
        if self.mesh is None or not self.axes:
            return [()]
        sizes = tuple(self.mesh.shape)
        place_of = dict(zip(self.ranks, itertools.product(*map(range, sizes)), strict=True))
        wide = [dim for dim, size in enumerate(sizes) if size > 1]
        return [tuple(place_of[rank][dim] for dim in wide) for rank in self.members]

    def regions(self, layout: "Layout") -> tuple[Region, ...]:
        """Return the part of a parameter, or of a block of one, that each of the `members` holds."""
        if layout.whole is not None:
            return tuple(region.within(layout.start, layout.shape) for region in self.regions(layout.whole))
        key = (layout.shape, id(layout.mesh), str(layout.placements))
        if key not in self._regions:
            self._regions[key] = tuple(self._region(layout, place) for place in self.coordinates)
        return self._regions[key]

    def _region(self, layout: "Layout", place: tuple[int, ...]) -> Region:
        if layout.mesh is None:
            return Region((0,) * len(layout.shape), layout.shape)
        axes = [self.axis_of(layout.mesh, dim) for dim in range(layout.mesh.ndim)]
        coordinate = [0 if axis is None else place[axis] for axis in axes]
        with with_values():
            shape, offset = _compute_local_shape_and_global_offset(
                layout.shape, tuple(layout.mesh.shape), coordinate, layout.placements
            )
        return Region(tuple(offset), tuple(shape))

    def axis_of(self, mesh: DeviceMesh, dim: int) -> int | None:
        """Return the axis that a dimension of a parameter's mesh is, None if it has one rank."""
        return self._axis_of_dim[id(mesh)].get(dim)

    def group(self, axis: int) -> Group:
        """Return this rank's group along an axis."""
        return self._groups[axis]

    def count(self, axes: Axes) -> int:
        """Return the number of ranks along the axes."""
        return math.prod(self._groups[axis].size for axis in axes)

    def complement(self, axes: Axes) -> Axes:
        """Return the other axes."""
        return tuple(a for a in self.axes if a not in axes)

    def is_first(self, axes: Axes) -> bool:
        """Say whether this rank is at coordinate 0 of all the given axes."""
        return all(self._groups[axis].rank == 0 for axis in axes)


# Optimizers come and go, and share them.
_GROUPS: dict[tuple[int, ...], ProcessGroup] = {}


def group_of(ranks: tuple[int, ...]) -> ProcessGroup:
    """Return a group of these ranks, all of which call this together; nobody else has to."""
    if len(ranks) == dist.get_world_size():
        assert dist.group.WORLD is not None, "a mesh has process groups"
        return dist.group.WORLD
    try:
        dist.get_process_group_ranks(_GROUPS[ranks])
    except (KeyError, ValueError, RuntimeError):  # not made yet; or destroyed, with all others
        group = dist.new_group(list(ranks), use_local_synchronization=True)
        assert isinstance(group, ProcessGroup), "this rank is one of them"
        _GROUPS[ranks] = group
    return _GROUPS[ranks]


def _dims(mesh: DeviceMesh) -> list[tuple[int, tuple[int, ...]]]:
    """Return (dimension, the ranks along it through this rank) for dimensions of more than one rank."""
    return [
        (dim, tuple(dist.get_process_group_ranks(mesh.get_group(dim))))
        for dim in range(mesh.ndim)
        if mesh.size(dim) > 1
    ]


@dataclass(frozen=True)
class Layout:
    """Which part of a parameter this rank holds, or of a matrix that is a block of one.

    Attributes:
        shape, local_shape, offset: of the whole tensor, of this rank's part, and where that part begins.
        sharded: for each tensor dimension, the axes that split it.
        copied: the axes over which the parameter is copied.
        mesh, placements: of the DTensor; None and () for a plain tensor.
        whole, start: of a block, the layout of its parameter, and where in that's last two dimensions it
            begins.
        apart: of a block, the axes along which a rank has all of it or nothing, as that of an expert whose
            fellows are on other ranks.
    """

    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    offset: tuple[int, ...]
    sharded: tuple[Axes, ...]
    copied: Axes
    mesh: DeviceMesh | None
    placements: tuple[Placement, ...]
    whole: "Layout | None" = None
    start: tuple[int, int] = (0, 0)
    apart: Axes = ()

    @staticmethod
    def of(param: Tensor, shards: ShardMesh) -> "Layout":
        """Read the layout off a parameter."""
        shape = tuple(param.shape)
        if not isinstance(param, DTensor):
            return Layout(shape, shape, (0,) * len(shape), ((),) * len(shape), shards.axes, None, ())
        sharded: list[list[int]] = [[] for _ in shape]
        for dim, placement in enumerate(param.placements):
            axis = shards.axis_of(param.device_mesh, dim)
            if axis is None or isinstance(placement, Replicate):
                continue
            if not isinstance(placement, (Shard, _StridedShard)):
                raise ValueError(f"parameters must be placed Shard or Replicate; got {param.placements}")
            sharded[placement.dim].append(axis)
        with with_values():
            local_shape, offset = compute_local_shape_and_global_offset(
                param.shape, param.device_mesh, param.placements
            )
        used = {axis for axes in sharded for axis in axes}
        return Layout(
            shape,
            tuple(local_shape),
            tuple(offset),
            tuple(tuple(sorted(axes)) for axes in sharded),
            tuple(a for a in shards.axes if a not in used),
            param.device_mesh,
            tuple(param.placements),
        )

    @property
    def split(self) -> Axes:
        """The axes that split the parameter, in whichever dimension."""
        return tuple(sorted(axis for axes in self.sharded for axis in axes))

    @property
    def transposed(self) -> bool:
        """Whether a matrix has more columns than rows, so that Dion's equations hold for its transpose."""
        return self.shape[0] < self.shape[1]

    @property
    def long(self) -> int:
        """The dimension of a matrix that P has."""
        return 1 if self.transposed else 0

    @property
    def short(self) -> int:
        """The dimension of a matrix that Q and R have."""
        return 0 if self.transposed else 1

    def wrap(self, local: Tensor, dims: Sequence[int | None] | None = None) -> Tensor:
        """Return a state tensor as the user sees it, a DTensor: its dimension k is placed as dimension
        dims[k] of the parameter, None for one that is not split; by default, all of it as the parameter."""
        if self.mesh is None:
            return local
        if dims is None:
            return _wrapped(local, self.mesh, self.placements, self.shape)
        shape = [n if d is None else self.shape[d] for n, d in zip(local.shape, dims, strict=True)]
        return _wrapped(local, self.mesh, [_along(p, dims) for p in self.placements], shape)

    def take(self, whole: Tensor, dim: int, tensor_dim: int) -> Tensor:
        """Return this rank's part of `whole` along its dimension `tensor_dim`, which is the parameter's
        dimension `dim`."""
        if not self.sharded[dim]:
            return whole
        length = self.local_shape[dim]
        return whole.narrow(tensor_dim, self.offset[dim] if length else 0, length)


def _wrapped(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]
) -> Tensor:
    """Return a DTensor of this local part, which may be a view of a stack.

    torch copies and pickles a DTensor by the storage that it pretends to have if its local part does not
    begin where its storage does; so it is made of another local part first.
    """
    stride = torch.empty(shape, device="meta").stride()
    tensor = DTensor.from_local(
        torch.empty_like(local), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    tensor._local_tensor = local
    return tensor


def _along(placement: Placement, dims: Sequence[int | None]) -> Placement:
    """Return the placement of a tensor whose dimensions follow these of another, placed so."""
    if not isinstance(placement, (Shard, _StridedShard)) or placement.dim not in dims:
        return Replicate()
    dim = list(dims).index(placement.dim)
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim, split_factor=placement.split_factor)
    return Shard(dim)


def partial_axes(grad: Tensor, param: Tensor, shards: ShardMesh) -> tuple[Axes, int]:
    """Return the axes over which a gradient still has to be summed, and the divisor (for an average).

    Raises ValueError where the gradient is placed in any other way than its parameter.
    """
    if not isinstance(grad, DTensor) or not isinstance(param, DTensor) or grad.placements == param.placements:
        if isinstance(grad, DTensor) != isinstance(param, DTensor):
            raise ValueError(
                f"gradient and parameter must both be DTensors or both plain; got {type(grad)} and "
                f"{type(param)}"
            )
        return (), 1
    axes, divisor = [], 1
    for dim, (g, p) in enumerate(zip(grad.placements, param.placements, strict=True)):
        axis = shards.axis_of(param.device_mesh, dim)
        if g == p or axis is None:
            continue
        if not (isinstance(g, Partial) and isinstance(p, Replicate) and g.reduce_op in ("sum", "avg")):
            raise ValueError(
                f"a gradient must be placed like its parameter {param.placements}, or Partial where that is "
                f"Replicate; got {grad.placements}. Redistribute the gradient before step()"
            )
        axes.append(axis)
        divisor *= param.device_mesh.size(dim) if g.reduce_op == "avg" else 1
    return tuple(sorted(axes)), divisor


def check_replicas(replica_ranks: Sequence[int], shards: ShardMesh, layouts: Iterable[Layout]) -> None:
    """Raise ValueError if the replicate axis is inside a parameter's mesh, or a mesh axis splits no parameter
    at all."""
    shared = sorted(set(replica_ranks) & set(shards.ranks) - {dist.get_rank()}) if shards.ranks else []
    remedy = (
        'call fully_shard(model, mesh=mesh["shard"]) and pass replicate_mesh=mesh["replicate"]: FSDP must '
        "not see the replicate axis"
    )
    if shared:
        raise ValueError(
            "replicate_mesh must not overlap the mesh that the parameters are sharded on; "
            f"got replicas on ranks {list(replica_ranks)} and parameters on {shards.mesh}. To mend it, "
            f"{remedy}"
        )
    splitting = {axis for layout in layouts for axis in layout.split}
    for axis in shards.axes:
        if axis not in splitting:
            raise ValueError(
                "every dimension of the parameters' mesh must split some parameter (a dimension over which "
                "all are Replicate() is a data-parallel one, as under native HSDP); got "
                f"{shards.names[axis]!r} of {shards.mesh}, which splits none. To mend it, {remedy}"
            )


def replicate_group(mesh: DeviceMesh | ProcessGroup | Group | None) -> Group | None:
    """Return the group of this rank and its peers in the other replicas."""
    if mesh is None or isinstance(mesh, ThreadGroup | ElasticGroup):
        return mesh
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(
                f"replicate_mesh must have one dimension; got {mesh}; slice it, as in "
                'init_device_mesh(...)["replicate"]'
            )
        mesh = mesh.get_group()
    if not isinstance(mesh, ProcessGroup):
        raise TypeError(
            f"replicate_mesh must be a 1-D DeviceMesh, a ProcessGroup or None; got {mesh!r}; try "
            "mesh['replicate']"
        )
    if dist.get_rank(mesh) < 0:
        raise ValueError(
            "replicate_mesh must contain this rank; got a group without it; pass the group of this rank's "
            "own peers"
        )
    return TorchGroup(mesh)
