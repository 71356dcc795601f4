"""The layouts of parameters that the tests run through, as data.

A `Layout` says how many shard ranks a replica has, how their mesh is named, and how a module is laid out over
it with the real APIs (`fully_shard`, `parallelize_module`, `distribute_tensor`). `Layout.build` does that on
this rank for K replicas; `Placed.parts_of` turns whole gradients into this rank's, so a test prescribes them
exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard


class Bag(nn.Module):
    """A module of unrelated layers whose parameters have the given names and values.

    "x.weight" becomes a Linear's (2-D) or a RMSNorm's (1-D) weight, "x.bias" that Linear's bias, and a name
    that starts with "embedding" an Embedding's.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            child, kind = name.split(".")
            if kind == "bias":
                continue
            dtype = value.dtype
            if value.ndim == 1:
                layer: nn.Module = nn.RMSNorm(len(value), dtype=dtype)
            elif child.startswith("embedding"):
                layer = nn.Embedding(*value.shape, dtype=dtype)
            else:
                rows, cols = value.shape
                layer = nn.Linear(cols, rows, bias=f"{child}.bias" in values, dtype=dtype)
            self.add_module(child, layer)
        self.load_state_dict(dict(values))

    def forward(self, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """A scalar whose derivative by each Linear's weight W is the given gradient: sum(Linear(I) * G^T)."""
        total = torch.zeros((), dtype=torch.float64)
        for name, G in gradients.items():
            if G is not None:
                layer = self.get_submodule(name.split(".")[0])
                total = total + (layer(torch.eye(G.shape[1], dtype=G.dtype)) * G.T).sum()
        return total


@dataclass(frozen=True, eq=False)
class Placed:
    """A laid-out module on this rank, and the replica this rank belongs to."""

    bag: Bag
    replica: int
    replicate_mesh: DeviceMesh | ProcessGroup | None
    partial_gradients: bool = False

    def parts_of(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Turn whole gradients into what this rank's parameters take as .grad; None stays None."""
        parts: dict[str, Tensor | None] = {}
        for name, parameter in self.bag.named_parameters():
            G = gradients.get(name)
            if G is None or not isinstance(parameter, DTensor):
                parts[name] = None if G is None else G.clone()
            elif self.partial_gradients and all(p.is_replicate() for p in parameter.placements):
                # What sequence parallelism leaves on replicated weights: each rank has a summand (exact in
                # binary).
                rank, size = parameter.device_mesh.get_local_rank(), parameter.device_mesh.size()
                share = 1 - (size - 1) / 4 if rank == 0 else 1 / 4
                parts[name] = DTensor.from_local(
                    G * share, parameter.device_mesh, [Partial()], run_check=False
                )
            else:
                parts[name] = like(parameter, G)
        return parts

    def set_gradients(self, parts: Mapping[str, Tensor | None]) -> None:
        """Set every parameter's .grad to what `parts_of` returned."""
        for name, parameter in self.bag.named_parameters():
            parameter.grad = parts[name]

    @torch.no_grad()
    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Set the parameters to these whole values."""
        for name, parameter in self.bag.named_parameters():
            local(parameter).copy_(part_of(values[name], parameter))


@dataclass(frozen=True)
class Layout:
    """How one replica's parameters lie over its ranks."""

    name: str
    shards: Mapping[str, int]  # mesh dimension name -> size; empty: one rank a replica
    parallelize: Callable[[Bag, DeviceMesh], None] | None = None
    replicas_by: str = "mesh"  # how CurvaDion learns of K > 1 replicas: a 1-D "mesh" or a process "group"
    mesh_for_one: bool = False  # at K = 1 pass a mesh of size 1 instead of None
    partial_gradients: bool = False

    def __str__(self) -> str:
        return self.name

    def world_size(self, replicas: int) -> int:
        size = replicas
        for extent in self.shards.values():
            size *= extent
        return size

    def build(self, values: Mapping[str, Tensor], replicas: int) -> Placed:
        """Lay out a Bag of these values on this rank; all ranks call it together."""
        names, sizes = tuple(self.shards), tuple(self.shards.values())
        bag, replica, replicate_mesh = Bag(values), 0, None
        with_replicas = replicas > 1 or self.mesh_for_one
        if with_replicas:
            names, sizes = ("replicate", *names), (replicas, *sizes)
        mesh = dist.init_device_mesh("cpu", sizes, mesh_dim_names=names) if sizes else None
        if mesh is not None and with_replicas:
            replica = mesh.get_local_rank("replicate")
            replicate_mesh = mesh["replicate"] if self.replicas_by == "mesh" else mesh.get_group("replicate")
        if mesh is not None and self.parallelize is not None:
            self.parallelize(bag, mesh[tuple(self.shards)])
        return Placed(bag, replica, replicate_mesh, self.partial_gradients)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is distributed (a collective then)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def part_of(value: Tensor, tensor: Tensor) -> Tensor:
    """What this rank holds of a whole value that is distributed as the tensor is.

    Cut by hand, without DTensor's own slicing and without a collective.
    """
    if not isinstance(tensor, DTensor):
        return value
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside a tensor's mesh"
    # A _StridedShard dimension cuts what the later mesh dimensions left over; everything else in mesh order.
    for d in sorted(range(mesh.ndim), key=lambda d: isinstance(placements[d], _StridedShard)):
        placement = placements[d]
        if isinstance(placement, (Shard, _StridedShard)):
            chunks = torch.chunk(value, mesh.size(d), dim=placement.dim)
            has_rows = coordinate[d] < len(chunks)
            value = chunks[coordinate[d]] if has_rows else value.narrow(placement.dim, 0, 0)
        else:
            assert placement.is_replicate(), f"a tensor placed {placement}"
    return value


def like(parameter: DTensor, value: Tensor) -> DTensor:
    """A whole value, distributed as the parameter is."""
    return DTensor.from_local(
        part_of(value, parameter).clone(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=value.shape,
        stride=parameter.stride(),
    )


def _linears(bag: Bag) -> list[str]:
    return [name for name, layer in bag.named_children() if isinstance(layer, nn.Linear)]


def _fully_shard(bag: Bag, mesh: DeviceMesh) -> None:
    """FSDP2: every other layer a group of its own, the rest in the root's."""
    for layer in list(bag.children())[::2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(bag, mesh=mesh)


def _replicate_rest(bag: Bag, mesh: DeviceMesh) -> None:
    """Make DTensors of whatever a tensor-parallel plan left plain, as training libraries do."""

    def replicate(_: str, layer: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in layer.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                layer.register_parameter(
                    name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Replicate()]))
                )

    distribute_module(bag, mesh, replicate)


def _colwise(bag: Bag, mesh: DeviceMesh) -> None:
    parallelize_module(bag, mesh, {name: ColwiseParallel() for name in _linears(bag)})
    _replicate_rest(bag, mesh)


def _rowwise(bag: Bag, mesh: DeviceMesh) -> None:
    plan = {name: RowwiseParallel() for name in _linears(bag)} | {"embedding": RowwiseParallel()}
    parallelize_module(bag, mesh, plan)
    _replicate_rest(bag, mesh)


def _tensor_parallel_mixed(bag: Bag, mesh: DeviceMesh) -> None:
    """Column-wise, row-wise and replicated matrices in turn; norms sequence parallel."""
    plans = [ColwiseParallel(), RowwiseParallel(), None]
    plan = {name: plans[i % 3] for i, name in enumerate(_linears(bag)) if plans[i % 3] is not None}
    plan |= {
        name: SequenceParallel() for name, layer in bag.named_children() if isinstance(layer, nn.RMSNorm)
    }
    parallelize_module(bag, mesh, plan)


def _tensor_parallel_replicated(bag: Bag, mesh: DeviceMesh) -> None:
    _tensor_parallel_mixed(bag, mesh)
    _replicate_rest(bag, mesh)


def _fsdp_and_tp(bag: Bag, mesh: DeviceMesh) -> None:
    """Column-wise weights become (_StridedShard(0), Shard(0)); layers outside the plan live on the fsdp dim
    alone."""
    _tensor_parallel_mixed(bag, mesh["tp"])
    _fully_shard(bag, mesh["fsdp"])


def _rows_twice(bag: Bag, mesh: DeviceMesh) -> None:
    """Every tensor (Shard(0), Shard(0)) over two mesh dimensions: nested chunks, some of them empty."""

    def shard(_: str, layer: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in layer.named_parameters(recurse=False):
            layer.register_parameter(
                name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0), Shard(0)]))
            )

    distribute_module(bag, mesh, shard)


# Those of one size in a row: by their numbers, tests share cases out to them.
LAYOUTS = [
    Layout("plain_group", {}, replicas_by="group"),
    Layout("plain_mesh", {}, mesh_for_one=True),
    Layout("fsdp2", {"shard": 2}, _fully_shard),
    Layout("tp2_colwise", {"tp": 2}, _colwise),
    Layout("tp2_rowwise", {"tp": 2}, _rowwise, replicas_by="group"),
    Layout("tp2_replicated", {"tp": 2}, _tensor_parallel_replicated, partial_gradients=True),
    Layout("tp2_plain_rest", {"tp": 2}, _tensor_parallel_mixed),
    Layout("fsdp2_tp2", {"fsdp": 2, "tp": 2}, _fsdp_and_tp),
    Layout("rows_twice", {"fsdp": 2, "tp": 2}, _rows_twice),
    Layout("fsdp4_empty_shards", {"shard": 4}, _fully_shard),
]
