"""Groups of ranks: threads that end together, and collectives that are waited for at once."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import Toy
from support.ranks import run_ranks

from curvadion import CurvaDion
from curvadion.sharding.group import ThreadGroup


def test_threads_return_what_they_computed_by_rank() -> None:
    def replica(group: ThreadGroup) -> tuple[float, float]:
        total, largest = torch.tensor([10.0**group.rank]), torch.tensor([-float(group.rank)])
        group.all_reduce(total, dist.ReduceOp.SUM).wait()
        group.all_reduce(largest, dist.ReduceOp.MAX, wait=True).wait()
        return total.item() + group.rank, largest.item()

    assert ThreadGroup.run(3, replica) == [(111.0, 0.0), (112.0, 0.0), (113.0, 0.0)]


def test_threads_compute_with_as_many_threads_as_their_caller() -> None:
    """What OpenMP says, which is not what torch says in a thread that has not computed yet. A pool of threads
    in each replica would break products in processes that are forked afterwards."""
    most = getattr(ctypes.CDLL(None), "omp_get_max_threads", None)
    if most is None:
        pytest.skip("torch computes without OpenMP here")
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert ThreadGroup.run(2, lambda group: most()) == [count, count]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("guilty", [0, 2])
def test_a_thread_that_raises_leaves_nobody_waiting(guilty: int) -> None:
    broken = []

    def replica(group: ThreadGroup) -> None:
        try:
            group.broadcast(torch.zeros(1))  # a slow thread may find this one broken already
            if group.rank == guilty:
                raise ZeroDivisionError("the replica's own error")
            group.broadcast(torch.zeros(1))
        except threading.BrokenBarrierError:
            broken.append(group.rank)
            raise

    with pytest.raises(ZeroDivisionError, match="own error"):
        ThreadGroup.run(3, replica)
    assert sorted([*broken, guilty]) == [0, 1, 2]


COLLECTIVES = ["all_reduce", "all_to_all_single", "all_gather_single", "reduce_scatter_single", "broadcast"]


def run_and_note_what_is_not_waited_for(options: dict[str, Any]) -> list[tuple[str, torch.dtype]]:
    """What `step` and `synchronize` start and wait for later: (collective, dtype)."""
    toy = Toy()
    optimizer = CurvaDion(toy.groups(), replicate_mesh=dist.group.WORLD, lr=0.01, **options)
    later = []
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            original = getattr(dist, name, None)
            if original is None:  # torch 2.11
                continue

            def noting(
                tensor: torch.Tensor, *args: Any, _o: Any = original, _n: str = name, **kw: Any
            ) -> Any:
                if kw.get("async_op"):
                    later.append((_n, tensor.dtype))
                return _o(tensor, *args, **kw)

            patch.setattr(dist, name, noting)
        for step in range(4):
            toy.set_gradients(step, dist.get_rank())
            optimizer.step()
        optimizer.synchronize()
    return later


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"local_update": "dion", "max_local_steps": 1}, set()),
        ({"gate": "drift", "tau": 1e-4}, set()),
        ({"gate_lag": 1, "max_local_steps": 1}, {("all_reduce", torch.int64)}),
        (
            {"consensus": "outer", "local_update": "muon", "outer_delay": 1, "max_local_steps": 1},
            {("all_reduce", torch.float32)},
        ),
    ],
    ids=str,
)
def test_only_what_is_overlapped_is_asynchronous(options: dict[str, Any], expected: set[Any]) -> None:
    """On NCCL every collective with async_op=True runs on a stream of its own."""
    for later in run_ranks(2, run_and_note_what_is_not_waited_for, options):
        assert set(later) == expected
