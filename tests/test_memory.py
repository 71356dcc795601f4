"""What an outer step needs beside its state: bytes under way and two buckets, no copies of the parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peak_memory import PeakMemory
from support.ranks import run_ranks
from torch import nn

from curvadion import CurvaDion
from curvadion.consensus.fragments import Part
from curvadion.sharding import flat, journey

BUCKET = 1 << 17  # bytes, of two matrices
COUNT, SIDE = 24, 128
PARAMETERS = 4 * COUNT * SIDE**2


def outer_step(options: dict[str, Any]) -> tuple[float, float]:
    """The largest transient memory of a step and of the outer step in it, and what stays, in bytes."""
    flat.BUCKET_BYTES, journey.CHUNK = BUCKET, 1 << 12  # type: ignore[misc]
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(SIDE, SIDE)) for _ in range(COUNT)]
    opt = CurvaDion(
        params,
        replicate_mesh=dist.group.WORLD if dist.get_world_size() > 1 else None,
        consensus="outer",
        tau=math.inf,
        max_local_steps=1,
        **options,
    )
    generator = torch.Generator().manual_seed(dist.get_rank())
    peaks, stays = [], []
    for step in range(7):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if step < 4:  # residuals are not there yet
            opt.step()
            continue
        with PeakMemory() as memory:
            opt.step()
        peaks.append(memory.peak)
        stays.append(memory.live)
    return max(peaks), max(stays)


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({"outer_bits": 1}, 0.1),  # bytes sent and received: 2 x 1.125 of 32 bits
        ({"outer_bits": 1, "outer_momentum": 0.6}, 0.1),
        ({"outer_bits": 8}, 0.6),
        ({"outer_bits": 32}, 1.0),
        ({"outer_bits": 1, "outer_delay": 2}, 1.1),  # what was sent stays until the mean is there
        ({"outer_bits": 32, "outer_delay": 2}, 2.0),
        ({"outer_bits": 1, "outer_fragments": 4}, 0.1),
        ({"outer_bits": 1, "outer_residual_kept": 0.5}, 0.1),
    ],
    ids=str,
)
def test_an_outer_step_needs_what_is_under_way_and_a_few_buckets(
    options: dict[str, Any], copies: float
) -> None:
    """One replica sends nothing, so bits are nothing to it."""
    for replicas in (1, 2) if options["outer_bits"] == 1 else (2,):
        for peak, _ in run_ranks(replicas, outer_step, options):
            assert peak <= copies * PARAMETERS + 2 * BUCKET


def test_what_a_fragment_took_as_a_view_may_be_put_back() -> None:
    """U is changed where it is, if its elements can be had without a copy."""
    part = Part(0, (2, 3), ((slice(0, None, 2), slice(1, None, 3)),))  # a single element
    x = torch.zeros(2, 3)
    taken = part.take(x)
    assert taken.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    part.put(x, taken.add_(1))
    expected = torch.zeros(2, 3)
    expected[0, 1] = 1
    assert torch.equal(x, expected)
