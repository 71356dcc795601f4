"""What ranks tell each other about themselves, and how fast: for `curvadion doctor`, outside any step."""

import time
from datetime import timedelta

import torch
from torch.distributed import ProcessGroup, ReduceOp

from curvadion.sharding.group import TorchGroup
from curvadion.sharding.ledger import WIRE


def timeout_of(group: ProcessGroup, device: torch.device) -> timedelta | None:
    """Return how long a collective of the group waits for a rank; None where the backend does not say."""
    try:
        return group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None


def measure(group: ProcessGroup, device: torch.device, nbytes: int, repeats: int) -> tuple[float, float]:
    """Return (seconds, bytes per second) of an all-reduce of so many bytes: the median time, and what leaves
    this rank in it. All ranks of the group call it together."""
    peers, buffer = TorchGroup(group), torch.zeros(max(1, nbytes // 8), dtype=torch.int64, device=device)
    taken = []
    for _ in range(repeats + 1):
        peers.all_reduce(torch.zeros(1, device=device), ReduceOp.MAX, wait=True)  # all begin together
        finish(device)
        began = time.perf_counter()
        peers.all_reduce(buffer, ReduceOp.MAX, wait=True)
        finish(device)
        taken.append(time.perf_counter() - began)
    seconds = sorted(taken[1:])[repeats // 2]  # the first sets up connections
    return seconds, buffer.nbytes * WIRE["all_reduce"](peers.size) / seconds


def finish(device: torch.device) -> None:
    """Wait for what was given to the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
