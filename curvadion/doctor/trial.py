"""Steps of a real optimizer on the real ranks: what would be refused, what crosses, and how long it takes."""

import ast
import logging
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import curvadion
from curvadion import CurvaDion, param_groups_for
from curvadion.doctor import PRESETS
from curvadion.doctor.findings import FAULT, FINE, WARNING, Finding
from curvadion.sharding.group import gather
from curvadion.sharding.layout import local_tensor
from curvadion.sharding.survey import finish

MOST_STEPS = 40


class Block(nn.Module):
    """Matrices, norms and biases in the shapes of a decoder block; nobody runs it forward."""

    def __init__(self, dim: int, ffn: int):
        super().__init__()
        self.attention = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm = nn.LayerNorm(dim)


class Decoder(nn.Module):
    """A stand-in for a model."""

    def __init__(self, dim: int, ffn: int, layers: int, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Block(dim, ffn) for _ in range(layers))
        self.head = nn.Linear(dim, vocabulary, bias=False)


def stand_in(device: torch.device, replicas: int, options: dict[str, Any], **sizes: int) -> CurvaDion:
    """Return an optimizer of a model of these sizes, which FSDP2 shards over the ranks of each replica."""
    torch.manual_seed(0)  # replicas start from equal weights
    model = Decoder(**sizes).to(device)
    if not dist.is_initialized():
        return CurvaDion(param_groups_for(model), **options)
    from torch.distributed.fsdp import fully_shard

    shape = (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    if shape[1] > 1:
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh["shard"])
    return CurvaDion(param_groups_for(model), replicate_mesh=mesh["replicate"], **options)


def called(where: str) -> CurvaDion:
    """Return what MODULE:FUNCTION returns when it is called: an optimizer.

    Raises ValueError or TypeError if there is no such function, or it returns something else.
    """
    module, _, function = where.partition(":")
    if not function:
        raise ValueError(f"--build must be MODULE:FUNCTION; got {where!r}; try train:build_optimizer")
    optimizer = getattr(import_module(module), function)()
    if not isinstance(optimizer, CurvaDion):
        raise TypeError(f"--build must return a CurvaDion; {where} returned {type(optimizer).__name__}")
    return optimizer


def options_of(preset: str, given: Sequence[str]) -> dict[str, Any]:
    """Return a preset's options with those of NAME=VALUE in their place; values are Python literals, `inf`,
    dtypes as in torch.bfloat16, or else words."""
    values: dict[str, Any] = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set must be NAME=VALUE; got {pair!r}; try max_local_steps=15")
        dtype = getattr(torch, text.removeprefix("torch."), None) if text.startswith("torch.") else None
        try:
            values[name] = dtype if dtype is not None else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = math.inf if text == "inf" else text
    chosen = PRESETS[preset]
    return getattr(curvadion, chosen)(**values) if chosen else values


class Steps:
    """What a few steps with random gradients took and sent.

    Attributes:
        seconds: of each local and each synchronized step but the first.
        sent: bytes that left this rank for other replicas in each of these steps.
        dense: the same for an all-reduce of bfloat16 gradients.
        interval: steps from one synchronized step to the next, on average.
    """

    def __init__(self, optimizer: CurvaDion):
        o = optimizer
        self.seconds: dict[str, list[float]] = {"local": [], "synchronized": []}
        self.sent: list[float] = []
        parameters = [p for group in o.param_groups for p in group["params"] if p.requires_grad]
        device = local_tensor(parameters[0]).device
        noise = torch.Generator(device).manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        for number in range(MOST_STEPS):
            for p in parameters:
                p.grad = torch.empty_like(p)
                local_tensor(p.grad).normal_(0.0, 1e-3, generator=noise)
            finish(device)
            began = time.perf_counter()
            o.step()
            finish(device)
            taken, metrics = time.perf_counter() - began, o.metrics()
            if number:
                kind = "synchronized" if metrics["curvadion/synchronized"] else "local"
                self.seconds[kind].append(taken)
                self.sent.append(metrics["curvadion/wire/replicate"])
            if min(map(len, self.seconds.values())) == 2 or (o.replicas == 1 and number == 4):
                break
        o.zero_grad()
        o.synchronize()
        self.dense = metrics["curvadion/dense_bf16_wire"]
        self.interval = len(self.sent) / max(1, len(self.seconds["synchronized"]))

    def findings(self) -> Iterator[Finding]:
        """Say how long a step took and what it sent; all ranks call it."""
        for kind, seconds in self.seconds.items():
            if seconds:
                slowest = max(gather(statistics.median(seconds)))
                text = f"{1e3 * slowest:.3g} ms on the slowest rank, median of {len(seconds)}"
                yield Finding(FINE, f"{kind} step", text)
        mean = sum(self.sent) / len(self.sent)
        share = f", {mean / self.dense:.2%} of dense bfloat16 gradients" if self.dense else ""
        yield Finding(FINE, "sent", f"{mean:,.0f} bytes a step and rank to other replicas{share}")


@contextmanager
def warnings_of(findings: list[Finding]) -> Iterator[None]:
    """Make findings of what curvadion logs as warnings."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            findings.append(Finding(WARNING, "log", record.getMessage()))

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("curvadion")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def refusal(error: Exception) -> Finding:
    """Return the finding that something was refused."""
    return Finding(FAULT, "refused", f"{type(error).__name__}: {error}")
