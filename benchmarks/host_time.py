"""How long a step keeps the host: many small matrices, CPU time, against fused AdamW in the same rounds.

`benchmarks/step.py --host-time` runs it. All variants take turns in one process, with one thread, so that CPU
time is that of the host alone; with --ranks 2 each of two processes (gloo) has half the rows of every matrix,
and rank 0 is reported. On a CPU arithmetic is in it: of matrices of 16 x 16 mainly Newton-Schulz and power
iteration; of 2 x 2 there is next to none, and what is left is dispatch and Python.

    adamw_fused           torch.optim.AdamW(fused=True); on shards, of the local tensors
    adamw_fused_dtensor   the same of DTensors, with --ranks 2
    gradient, ...         local steps by the names of `local_update`, tau=inf; "muon" with consensus="outer"
    synchronized          Dion's synchronized step, of one replica
    fragment              "muon" with a part of the parameters made common in every step: consensus="outer",
                          outer_fragments=4; of one replica, so that nothing is sent
"""

import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import describe_run, spread
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

SIDES = (16, 2)
BASE = "adamw_fused"
LOCAL: dict[str, dict[str, Any]] = {
    "gradient": {"local_update": "gradient"},
    "muon": {"local_update": "muon", "consensus": "outer"},
    "normuon": {"local_update": "normuon", "consensus": "outer"},
    "dion2": {"local_update": "dion2", "consensus": "outer"},
    "dion": {"local_update": "dion"},
}
SYNCHRONIZED: dict[str, dict[str, Any]] = {
    "synchronized": {"max_local_steps": 0},
    "fragment": {"local_update": "muon", "consensus": "outer", "outer_fragments": 4, "max_local_steps": 0},
}


def parameters(count: int, side: int) -> list[torch.nn.Parameter]:
    """Return matrices with gradients, on shards where there are several ranks."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() else None

    def normal() -> Tensor:
        if mesh is None:
            return torch.randn(side, side)
        return DTensor.from_local(torch.randn(side // mesh.size(), side), mesh, [Shard(0)], run_check=False)

    found = [torch.nn.Parameter(normal()) for _ in range(count)]
    for p in found:
        p.grad = normal()
    return found


def adamw(found: list[torch.nn.Parameter], *, local: bool) -> torch.optim.Optimizer:
    """Return fused AdamW, local: of the shards as plain tensors."""
    own = found
    if local and isinstance(found[0], DTensor):
        own = [torch.nn.Parameter(p.detach().to_local()) for p in found]
        for plain, p in zip(own, found, strict=True):
            assert isinstance(p.grad, DTensor)
            plain.grad = p.grad.to_local()
    return torch.optim.AdamW(own, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def optimizers(count: int, side: int) -> dict[str, torch.optim.Optimizer]:
    """Return all variants, each with parameters of its own."""
    from curvadion import CurvaDion

    sharded = dist.is_initialized()
    found = {BASE: adamw(parameters(count, side), local=True)}
    if sharded:
        found["adamw_fused_dtensor"] = adamw(parameters(count, side), local=False)
    for name, options in (LOCAL if sharded else LOCAL | SYNCHRONIZED).items():
        common = {"lr": 1e-3, "tau": float("inf"), "check_every": 0}
        found[name] = CurvaDion(parameters(count, side), **(common | options))
    return found


def step(optimizer: torch.optim.Optimizer) -> None:
    """Take a step, under a schedule."""
    for group in optimizer.param_groups:
        group["lr"] *= 1 - 1e-6
    optimizer.step()


def operations(optimizer: torch.optim.Optimizer) -> int:
    """Return the operations of ATen in a step, those that others call included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(optimizer)
    return sum(e.count for e in profile.key_averages() if e.key.startswith("aten::"))


def measured(count: int, side: int, seconds: float) -> list[dict[str, Any]]:
    """Return a row for each variant; on all ranks, which take the same number of rounds."""
    variants = optimizers(count, side)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(3):  # the first step is synchronized
        for optimizer in variants.values():
            step(optimizer)
    gc.collect()
    gc.disable()
    begin, go_on = time.perf_counter(), torch.ones(())
    while bool(go_on):
        for name, optimizer in variants.items():
            start = time.process_time()
            step(optimizer)
            samples[name].append(1e3 * (time.process_time() - start))
        go_on.fill_(time.perf_counter() - begin < seconds)
        if dist.is_initialized():
            dist.broadcast(go_on, 0)
    gc.enable()
    rows = []
    for name, optimizer in variants.items():
        cpu_ms, base = spread(samples[name]), spread(samples[BASE])
        assert cpu_ms is not None and base is not None
        rows.append(
            {
                "benchmark": "host_time",
                "variant": name,
                "ranks": dist.get_world_size() if dist.is_initialized() else 1,
                "matrices": count,
                "side": side,
                "cpu_ms": cpu_ms,
                "least_ms": min(samples[name]),
                "ratio": cpu_ms["median"] / base["median"],
                "ratio_of_least": min(samples[name]) / min(samples[BASE]),
                "operations": operations(optimizer),
                "repetitions": len(samples[name]),
            }
        )
    return rows


def work(rank: int, ranks: int, store: str, count: int, seconds: float, found: Any) -> None:
    """Measure on one rank; rank 0 puts the rows."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    rows = [row for side in SIDES for row in measured(count, side, seconds / len(SIDES))]
    if rank == 0:
        found.put(rows)
    if ranks > 1:
        dist.destroy_process_group()


def main(arguments: Any, store: Path) -> None:
    """Measure, and report."""
    torch.set_num_threads(1)
    run, context = describe_run(arguments, torch.device("cpu")), mp.get_context("spawn")
    found, ranks = context.SimpleQueue(), arguments.ranks
    os.environ |= {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}
    settings = (ranks, str(store / "store"), arguments.matrices, arguments.seconds, found)
    processes = [context.Process(target=work, args=(rank, *settings), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    rows: list[dict[str, Any]] = []
    while not rows and all(process.exitcode in (None, 0) for process in processes):
        if found.empty():
            time.sleep(0.1)
        else:
            rows = found.get()
    for process in processes:
        if not rows:
            process.terminate()
        process.join()
    if not rows:
        raise SystemExit("a rank failed; see above")
    report(rows, arguments, run)


def report(rows: list[dict[str, Any]], arguments: Any, run: dict[str, Any]) -> None:
    """Print rows, and append them to arguments.out with what they were measured with."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, "run": run}) + "\n")
            print(
                f"{row['variant']:20} {row['matrices']} of {row['side']} x {row['side']}, {row['ranks']} rank"
                f"{'s' * (row['ranks'] > 1)}: {row['cpu_ms']['median']:7.3f} ms of CPU, least "
                f"{row['least_ms']:7.3f}; {row['ratio']:5.2f} x {BASE} (least {row['ratio_of_least']:.2f}); "
                f"{row['operations']} operations"
            )
    print(f"{len(rows)} results appended to {arguments.out}")
