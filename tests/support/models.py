"""Small parameter sets, repeatable gradients, a tiny language model, and the hashes the contract tests
compare.

Weights are drawn for the whole matrix and then sliced, gradients depend only on (step, replica, index): what
a test sees does not depend on how many ranks run it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

Shapes = dict[str, tuple[int, ...]]
# Wide, tall and square; rows that two shards divide (12, 8, 6) and rows that four do not (6, 10).
MATRICES: Shapes = {"layers.0.weight": (12, 8), "layers.1.weight": (8, 16), "layers.2.weight": (6, 6)}
DENSE: Shapes = {"embedding.weight": (10, 4), "norm.weight": (8,)}


def grid(replicas: int, shards: int) -> tuple[DeviceMesh, DeviceMesh]:
    """The replicate mesh and the shard mesh; rank = replica * shards + shard."""
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    return mesh["replicate"], mesh["shard"]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Toy:
    """Named parameters, plain or sharded over `mesh`, and gradients for them."""

    def __init__(
        self,
        mesh: DeviceMesh | None = None,
        *,
        matrices: Shapes = MATRICES,
        dense: Shapes = DENSE,
        placements: Mapping[str, tuple[Placement, ...]] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.mesh, self.matrices, self.dense = mesh, matrices, dense
        self.placements = dict(placements or {})
        generator = torch.Generator().manual_seed(seed)
        self.params: dict[str, nn.Parameter] = {}
        for name, shape in {**matrices, **dense}.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.params[name] = nn.Parameter(self.place(name, value))

    def place(self, name: str, value: Tensor) -> Tensor:
        """`value` as the parameter `name` is placed; slices locally, no collective."""
        if self.mesh is None:
            return value.clone()
        placements = self.placements.get(name, (Shard(0),) * self.mesh.ndim)
        return distribute_tensor(value.clone(), self.mesh, placements, src_data_rank=None)

    def groups(self, dense_algorithm: str = "adamw", **matrix_options: Any) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [
            {"params": [(n, self.params[n]) for n in self.matrices], **matrix_options}
        ]
        if self.dense:
            groups.append({"params": [(n, self.params[n]) for n in self.dense], "algorithm": dense_algorithm})
        return groups

    def set_gradients(self, step: int, replica: int, scale: float = 1.0) -> None:
        for index, (name, param) in enumerate(self.params.items()):
            generator = torch.Generator().manual_seed(1_000_003 * step + 1_009 * replica + index)
            value = scale * torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = self.place(name, value.to(param.dtype))

    def whole(self) -> dict[str, Tensor]:
        return {name: whole(param) for name, param in self.params.items()}


class TinyGPT(nn.Module):
    """Embedding, two blocks of two matrices and a norm, an untied head: what a real model has, and nothing
    more."""

    def __init__(self, vocabulary: int = 20, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    def loss(self, step: int, replica: int) -> Tensor:
        generator = torch.Generator().manual_seed(7919 * step + replica)
        tokens = torch.randint(0, self.head.out_features, (4, 9), generator=generator)
        logits = self(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def groups(self, **matrix_options: Any) -> list[dict[str, Any]]:
        """Hidden matrices by Dion, everything else by AdamW, spelled out so that no other part is on
        trial."""
        named = list(self.named_parameters())
        matrices = [(n, p) for n, p in named if n.startswith("layers.") and p.ndim == 2]
        rest = [(n, p) for n, p in named if not (n.startswith("layers.") and p.ndim == 2)]
        return [{"params": matrices, **matrix_options}, {"params": rest, "algorithm": "adamw", "lr": 1e-3}]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.down(nn.functional.silu(self.up(self.norm(hidden))))
        return out


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the exact local bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        data = local(tensor.detach())
        data = torch.empty(data.shape, dtype=data.dtype).copy_(data)  # of a wrapper, what it holds
        sha.update(f"{tuple(data.shape)} {data.dtype}".encode())
        sha.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def state_digest(optimizer: torch.optim.Optimizer) -> str:
    """A hash of every parameter and every state tensor of this rank, in a fixed order."""
    tensors: list[Tensor] = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            tensors += [param, *(state[key] for key in sorted(state))]
    return digest(tensors)


def outcome(action: Callable[[], Any]) -> tuple[str, str]:
    """("ok", "") or the name and the message of the exception: what ranks compare after a failure."""
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "ok", ""


def gathered(value: Any) -> list[Any]:
    """`value` of every rank, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def shipped(table: Mapping[str, Any]) -> list[str]:
    """The package's own; other tests register more."""
    kinds = {name: one if isinstance(one, type) else type(one) for name, one in table.items()}
    return [name for name, kind in kinds.items() if kind.__module__.startswith("curvadion.")]
