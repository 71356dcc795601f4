"""The witness: torch's Flight Recorder, which notes every collective where the process group runs it, in C++
below all
Python: nothing the optimizer could do in Python escapes it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.ranks import run_ranks


def run_recorded(world_size: int, fn: Callable[[], Any]) -> list[Any]:
    """run_ranks with the Flight Recorder on: it reads the variable when a forked rank makes its first process
    group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FR_BUFFER_SIZE", "20000")
        return run_ranks(world_size, fn)


@dataclass(frozen=True)
class Sent:
    axis: str  # "replicate", "shard", or "both" for a group that spans more than one of each
    operation: str
    bytes: int  # this rank's input buffer


class Wire:
    """Reads the Flight Recorder; `since_last()` returns the collectives since the previous call."""

    def __init__(self, shards: int) -> None:
        assert os.environ.get("TORCH_FR_BUFFER_SIZE"), (
            "the Flight Recorder must be switched on before the first group"
        )
        self.shards, self.last = shards, -1
        dist.all_reduce(torch.zeros(3))
        assert [sent.bytes for sent in self.since_last()][-1:] == [12], (
            "the Flight Recorder does not see collectives"
        )

    def axis(self, group_name: str) -> str:
        ranks = dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(group_name))
        if len({rank // self.shards for rank in ranks}) == 1:
            return "shard"
        return "replicate" if len({rank % self.shards for rank in ranks}) == 1 else "both"

    def since_last(self) -> list[Sent]:
        entries = json.loads(torch._C._distributed_c10d._dump_fr_trace_json())["entries"]
        new = [entry for entry in entries if entry["record_id"] > self.last]
        self.last = max((entry["record_id"] for entry in new), default=self.last)
        sizes = {"Float": 4, "Double": 8, "Long": 8, "BFloat16": 2, "Int": 4, "Byte": 1, "Bool": 1}
        return [
            Sent(
                self.axis(entry["process_group"][0]),
                entry["profiling_name"].removeprefix("gloo:"),
                sum(
                    math.prod(size) * sizes[dtype]
                    for size, dtype in zip(entry["input_sizes"], entry["input_dtypes"], strict=True)
                ),
            )
            for entry in new
            if "barrier" not in entry["profiling_name"]
        ]
