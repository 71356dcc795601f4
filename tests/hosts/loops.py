"""A model that remembers what it was trained on, and the plain loop that a host's run is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from support.models import digest
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from curvadion import CurvaDion, param_groups_for

WORDS, LENGTH = 32, 9
DEADLINE = 500.0  # seconds; the hosts start slowly


class Net(nn.Module):
    """Tokens in, (loss, logits) out; `seen` are the batches of training, `judged` the hashes of the weights
    in each forward of an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, WORDS, bias=False)
        self.seen: list[Tensor] = []
        self.judged: list[str] = []

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            self.seen.append(input_ids.clone())
        else:
            self.judged.append(digest([p.detach().clone() for p in self.parameters()]))  # FSDP2 frees its own
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.relu(layer(hidden))
        logits = self.head(self.norm(hidden))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        return loss, logits


class Tokens(torch.utils.data.Dataset):
    """So many sequences, the same in every process."""

    def __init__(self, count: int):
        self._all = torch.randint(0, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._all[index], "labels": self._all[index]}


def weights(model: nn.Module) -> str:
    """A hash of this rank's parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return digest(model.parameters())


def optimizer(model: nn.Module, replicate: Any, **options: Any) -> CurvaDion:
    return CurvaDion(param_groups_for(model), lr=0.02, replicate_mesh=replicate, **options)


def plain(
    model: Net,
    opt: CurvaDion,
    batches: Sequence[Sequence[Tensor]],
    *,
    clip: float = 0.0,
    lightning: bool = False,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """The loop of README.md on the same batches: so many of them in each step. `after` is called with the
    number of each step taken.

    Bit for bit it matters that Lightning takes norms of gradients in the order of the groups, and that FSDP2
    sums them over the shards for each batch there, once in a step elsewhere.
    """
    by_group = [p for group in opt.param_groups for p in group["params"]]
    clipped = by_group if lightning else list(model.parameters())
    model.train()
    for step, pieces in enumerate(batches, 1):
        for number, tokens in enumerate(pieces, 1):
            if isinstance(model, FSDPModule) and not lightning:
                model.set_requires_gradient_sync(number == len(pieces))
            (model(tokens)[0] / len(pieces)).backward()
        if clip:
            nn.utils.clip_grad_norm_(clipped, clip)
        opt.step()
        opt.zero_grad()
        after(step)


def in_steps(seen: Sequence[Tensor], pieces: int = 1) -> list[list[Tensor]]:
    return [list(seen[i : i + pieces]) for i in range(0, len(seen), pieces)]


def mean_of(opt: CurvaDion, model: Net) -> str:
    """A hash of the mean of the replicas, as an evaluation sees it."""
    with opt.consensus(), torch.no_grad():
        model.eval()
        model(torch.zeros(1, LENGTH, dtype=torch.long))
        model.train()
    return model.judged[-1]
