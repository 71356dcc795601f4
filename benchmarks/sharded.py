"""Measure optimizer steps on sharded matrices, rank by rank: time, CPU time, bytes over the shards,
collectives, FLOPs, memory, of CurvaDion and of its peers, in turns.

    python benchmarks/sharded.py                              # on a CPU: 2 and 4 processes, gloo, 12m
    python benchmarks/sharded.py --ranks 4 --only muon        # local Muon steps, and microsoft/dion's
    python benchmarks/sharded.py --device cuda --models 1b3   # as many processes as GPUs, NCCL

Parameters are DTensors, Shard(0) over all ranks, as FSDP2 leaves them. Families:

    muon        local_update="muon", tau=inf: by owners and by all ranks together, in float32 and in bfloat16;
                microsoft/dion's Muon, in its bfloat16 and with CurvaDion's Newton-Schulz in float32
    dion        local_update="dion", tau=inf, of rank 1/4 and 1; microsoft/dion's Dion
    gradient    local_update="gradient", tau=inf; fused AdamW
    ceilings    the rates that `curvadion project --hardware` assumes: products of matrices as large as the
                model's, triangular solves, Householder's QR and Cholesky factors, a copy, norms, collectives
                of 8 MB a rank, a small one, small operations; per second of CPU time. With them, what
                `curvadion project` makes of each step is set beside its CPU time
    outer       LOW_COMMUNICATION on two replicas of half of the ranks: its local step, and its synchronized
                step in 1 and in 32 bits
    torch       torch.optim.Muon on DTensors, which takes seconds a step; only where asked for

In each round every variant takes one step, in an order that is drawn anew. `ms` is the time of the slowest
rank in a step, `cpu_ms` the mean over ranks of what a process was given of the CPU: on a machine that is
busy, or with fewer cores than ranks, the one that says more. Bytes leave the rank that sends most. The
transient is what is allocated in a step on top of what there was, on the rank with the most; on CPUs by the
profiler.
microsoft/dion runs eagerly (it compiles for minutes), in its disfavour; on CPUs with random numbers of ours,
since DTensor has none.
"""

import argparse
import faulthandler
import functools
import gc
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from timing import (
    MODELS,
    Results,
    Timing,
    Variant,
    add_common_arguments,
    describe_run,
    installed,
    names,
    start,
    synchronize,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from curvadion.algebra.iteration import Iteration
from curvadion.formats import name_of
from curvadion.projection.rates import Rates
from curvadion.projection.work import LOCAL, local_step
from curvadion.projection.work import Settings as WorkSettings
from curvadion.sharding.ledger import WIRE

FAMILIES = ("muon", "dion", "gradient", "ceilings", "outer", "torch")
LR, SCALAR_LR, MU, DECAY = 1e-3, 1e-4, 0.95, 0.01
INF = float("inf")
PATIENCE = 120  # seconds that the steps before those that are timed may take
# Which torch does not count.
IN_PLACE = {
    torch.ops.aten.addmm_: lambda x, a, b, out_shape=None, **_: 2 * math.prod(a) * b[-1],
    torch.ops.aten.baddbmm_: lambda x, a, b, out_shape=None, **_: 2 * math.prod(a) * b[-1],
}
CEILINGS = (
    *("product float32", "product bfloat16", "product float64", "solve float32", "solve float64"),
    *("householder", "cholesky", "copy", "norm", "all_to_all", "all_reduce", "call", "operation"),
)
SMALL = 200  # small operations
Optimizers = list[Any]
# Collectives by their names in torch.ops.c10d and torch.ops._c10d_functional: what they are, and which of
# their arguments is sent.
KINDS = {
    "allreduce_": ("all_reduce", 0),
    "allgather_": ("all_gather", 1),
    "_allgather_base_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "all_reduce": ("all_reduce", 0),
    "all_reduce_": ("all_reduce", 0),
    "all_reduce_coalesced": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "all_to_all_single": ("all_to_all", 0),
    "broadcast": ("broadcast", 0),
}


@dataclass
class Entry:
    """An optimizer that takes its turn.

    Attributes:
        build: makes it, and of torch's what takes the other parameters.
        ms, cpu_ms: samples of this rank.
        counted: of one step of this rank: FLOPs, wire bytes, collectives, transient bytes.
    """

    operation: str
    name: str
    build: Callable[[], Optimizers]
    optimizers: Optimizers = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)


class Weights:
    """Sharded parameters with gradients, which all optimizers of a layout share."""

    def __init__(self, model: str, mesh: dist.DeviceMesh):
        shapes = [shape for shape, count in MODELS[model].matrices().items() for _ in range(count)]
        self.matrices = [self._one(shape, mesh, number) for number, shape in enumerate(shapes)]
        self.others = [
            self._one(shape, mesh, len(shapes) + number)
            for number, shape in enumerate(MODELS[model].others())
        ]
        self.first = [p.detach().to_local().clone() for _, p in (*self.matrices, *self.others)]

    def reset(self) -> None:
        """Go back to the first values, which are equal in all replicas."""
        for (_, p), value in zip((*self.matrices, *self.others), self.first, strict=True):
            p.detach().to_local().copy_(value)

    @staticmethod
    def _one(shape: tuple[int, ...], mesh: dist.DeviceMesh, number: int) -> tuple[str, torch.nn.Parameter]:
        sizes = [len(part) for part in torch.arange(shape[0]).chunk(mesh.size())]
        rows = (*sizes, *([0] * mesh.size()))[mesh.get_local_rank()]
        stride = (shape[1], 1) if len(shape) == 2 else (1,)

        def placed(scale: float) -> DTensor:
            local = torch.randn(rows, *shape[1:], device=mesh.device_type) * scale
            return DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size(shape), stride=stride)

        p = torch.nn.Parameter(placed(0.02))
        p.grad = placed(1e-3)
        return f"layers.weight.{number}", p


class Ceiling:
    """A product, a copy or a collective that takes its turn like an optimizer.

    Attributes:
        amount: FLOPs, or bytes that are read and written, or that leave this rank.
    """

    def __init__(self, run: Callable[[], Any], amount: float):
        self.step, self.amount = run, amount
        self.state: dict[Any, Any] = {}

    @staticmethod
    def of(kind: str, model: str, device: torch.device) -> "Ceiling":
        """Return one of CEILINGS."""
        n, what = MODELS[model].dim, kind.rpartition(" ")
        if what[0] in ("product", "solve"):
            dtype = getattr(torch, what[2])
            a, b = (torch.randn(8, n, n, device=device).to(dtype) for _ in range(2))
            if what[0] == "product":
                return Ceiling(lambda: torch.bmm(a, b), 2 * 8 * n**3)
            upper = a.triu() + n * torch.eye(n, device=device, dtype=dtype)
            return Ceiling(lambda: torch.linalg.solve_triangular(upper, b, upper=True, left=False), 8 * n**3)
        if kind == "householder":
            some = torch.randn(8, n, n, device=device)
            return Ceiling(lambda: torch.linalg.qr(some), 8 * 8 * n**3 / 3)
        if kind == "cholesky":
            gram = torch.eye(n, device=device, dtype=torch.float64).repeat(8, 1, 1)
            return Ceiling(lambda: torch.linalg.cholesky_ex(gram), 8 * n**3 / 3)
        if kind == "norm":
            some = [torch.randn(n, n, device=device) for _ in range(16)]
            # As the gate asks for them: with a dtype torch takes another way on CPUs.
            return Ceiling(lambda: torch._foreach_norm(some, 2, dtype=torch.float32), 4 * 16 * n * n)
        if kind == "operation":
            one = torch.ones(1, device=device)
            return Ceiling(lambda: [one.mul_(1.0) for _ in range(SMALL)], SMALL)
        if kind == "call":
            few = torch.zeros(256, device=device)
            return Ceiling(lambda: dist.all_reduce(few), 1)
        if kind == "copy":  # of more than caches hold
            large, into = (torch.zeros(1 << 26, dtype=torch.uint8, device=device) for _ in range(2))
            return Ceiling(lambda: into.copy_(large), 2 * large.numel())
        size, ranks = 8 << 20, dist.get_world_size()
        x, y = (torch.zeros(size // ranks * ranks, dtype=torch.uint8, device=device) for _ in range(2))
        runs = {
            "all_to_all": (
                lambda: dist.all_to_all_single(y, x),
                WIRE["all_to_all"](ranks) * x.numel(),
            ),
            "all_reduce": (
                lambda: dist.all_reduce(y.view(torch.float32)),
                WIRE["all_reduce"](ranks) * x.numel(),
            ),
        }
        return Ceiling(*runs[kind])


def rates_of(found: list[Entry], cpu_ms: list[float], device: str) -> Rates | None:
    """Return what the ceilings among the entries say of a CPU; None if they are not all there."""
    if device != "cpu":  # where the CPU's time is not the step's
        return None
    a_second = {
        entry.name: entry.optimizers[0].amount / ms * 1e3
        for entry, ms in zip(found, cpu_ms, strict=True)
        if entry.operation == "ceiling"
    }
    if set(a_second) != set(CEILINGS):
        return None
    products = {dtype: a_second[f"product {dtype}"] for dtype in ("bfloat16", "float32", "float64")}
    return Rates(
        **products,
        memory=a_second["copy"],
        inside=a_second["all_to_all"],
        across=a_second["all_to_all"],
        cholesky=a_second["cholesky"],
        solve32=a_second["solve float32"],
        solve64=a_second["solve float64"],
        reduced=a_second["norm"],
        operation=1 / a_second["operation"],
        call=1 / a_second["call"],
        householder=a_second["householder"],
        device=device,
    )


def projected(entry: Entry, model: str, ranks: int, rates: Rates) -> float | None:
    """Return the milliseconds that `curvadion project` gives a step, the mean over ranks; None for others'
    steps."""
    options = getattr(entry.build, "keywords", {})
    rule = options.get("local_update")
    if rule not in LOCAL or entry.build.func is not curvadion:
        return None
    named = {k: name_of(v) if isinstance(v, torch.dtype) else v for k, v in options.items()}
    names = {"owners", "owner_dtype", "rank_fraction"} & named.keys()
    how = Iteration(dtype=named.get("newton_schulz_dtype"))
    settings = WorkSettings(ranks, how, device=rates.device, **{name: named[name] for name in names})
    works = local_step(MODELS[model].model, rule, settings)
    return 1e3 * statistics.mean(sum(w.seconds(rates, ranks, ranks).values()) for w in works)


class Counter(TorchDispatchMode):
    """Counts collectives over all ranks, and what leaves this rank for them, as `curvadion.sharding.ledger`
    does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.wire = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        ranks, me = dist.get_world_size(), dist.get_rank()
        if name in ("wait_tensor", "barrier", "_wrap_tensor_autograd"):
            return
        if name not in KINDS:
            raise NotImplementedError(f"collectives must be in KINDS, to be counted; got {name}")
        kind, place = KINDS[name]
        sent = args[place] if isinstance(args[place], (list, tuple)) else [args[place]]
        total = sum(t.nbytes for t in sent)
        self.calls += 1
        if kind == "all_to_all":
            sizes = [t.nbytes for t in sent] if len(sent) > 1 else args[4] if place else args[2]
            own = sizes[me] / max(1, sum(sizes)) if sizes else 1 / ranks
            self.wire += total * (1 - own)
        else:
            self.wire += total * WIRE[kind](ranks)


def curvadion(weights: Weights, **options: Any) -> Optimizers:
    from curvadion import CurvaDion

    groups = [{"params": weights.matrices}, {"params": weights.others, "algorithm": "adamw", "lr": SCALAR_LR}]
    settings = {"lr": LR, "momentum": MU, "weight_decay": DECAY, "check_every": 0} | options
    return [CurvaDion(groups, **settings)]


def their_groups(weights: Weights) -> list[dict[str, Any]]:
    return [
        {"params": [p for _, p in weights.matrices]},
        {"params": [p for _, p in weights.others], "algorithm": "adamw", "lr": SCALAR_LR},
    ]


def microsoft_muon(weights: Weights, mesh: dist.DeviceMesh, float32: bool) -> Optimizers:
    from dion import Muon

    from curvadion.algebra.newton_schulz import newton_schulz

    how = Iteration(dtype="float32")

    def ours(x: Tensor, epsilon: Any) -> Tensor:
        flat = x.size(-2) < x.size(-1)
        batch = x.float().view(-1, *x.shape[-2:])
        [out] = newton_schulz([batch.mT if flat else batch], how)
        return (out.mT if flat else out).reshape(x.shape)

    options = {"newton_schulz_func": ours} if float32 else {}
    return [Muon(their_groups(weights), mesh, lr=LR, mu=MU, weight_decay=DECAY, **options)]


def microsoft_dion(weights: Weights, mesh: dist.DeviceMesh, fraction: float) -> Optimizers:
    from dion import Dion

    options = {"lr": LR, "mu": MU, "weight_decay": DECAY, "rank_fraction": fraction}
    return [Dion(their_groups(weights), outer_shard_mesh=mesh, **options)]


def random_numbers_on_cpu() -> None:
    """Give microsoft/dion's Dion random DTensors on CPUs, where torch's own are refused."""
    try:
        from dion import dion as theirs
    except ImportError:
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    calls = iter(range(1 << 62))

    def randn(*size: Any, device_mesh: Any, placements: Any, dtype: Any = None, **_: Any) -> DTensor:
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, list)) else size)
        local, offset = compute_local_shape_and_global_offset(shape, device_mesh, placements)
        generator = torch.Generator().manual_seed(hash((next(calls), *offset)) & (1 << 62) - 1)
        values = torch.randn(local, generator=generator, dtype=dtype)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(values, device_mesh, placements, shape=shape, stride=stride)

    theirs.dtensor_randn = randn


def torch_muon(weights: Weights) -> Optimizers:
    muon = torch.optim.Muon([p for _, p in weights.matrices], lr=LR, momentum=MU, weight_decay=DECAY)
    return [muon, *adamw(weights.others)]


def adamw(parameters: list[tuple[str, torch.nn.Parameter]]) -> Optimizers:
    some = [p for _, p in parameters]
    return [torch.optim.AdamW(some, lr=SCALAR_LR, betas=(0.9, 0.95), weight_decay=DECAY, fused=True)]


def entries(wanted: list[str], weights: Weights, mesh: dist.DeviceMesh, model: str) -> list[Entry]:
    """Return the variants of one replica over all ranks."""
    f32, bf16 = torch.float32, torch.bfloat16
    found: list[Entry] = []

    def add(operation: str, name: str, build: Callable[..., Optimizers], *args: Any, **options: Any) -> None:
        found.append(Entry(operation, name, functools.partial(build, *args, **options)))

    muon: dict[str, Any] = {"local_update": "muon", "consensus": "outer", "tau": INF}
    exact = muon | {"newton_schulz_dtype": f32}
    if "muon" in wanted:
        add("local_muon", "curvadion", curvadion, weights, **exact)
        add("local_muon", "curvadion together", curvadion, weights, **exact, owners="never")
        options = muon | {"newton_schulz_dtype": bf16, "owner_dtype": bf16}
        add("local_muon", "curvadion bf16", curvadion, weights, **options)
        add("local_muon", "microsoft_dion", microsoft_muon, weights, mesh, True)
        add("local_muon", "microsoft_dion bf16", microsoft_muon, weights, mesh, False)
    if "dion" in wanted:
        for text, fraction in (("1/4", 0.25), ("1", 1.0)):
            options = {"local_update": "dion", "tau": INF, "rank_fraction": fraction}
            add("local_dion", f"curvadion {text}", curvadion, weights, **options)
            add("local_dion", f"microsoft_dion {text}", microsoft_dion, weights, mesh, fraction)
    if "gradient" in wanted:
        add("local", "curvadion", curvadion, weights, local_update="gradient", tau=INF)
        add("local", "adamw_fused", adamw, [*weights.matrices, *weights.others])
    if "ceilings" in wanted:
        device = torch.device(mesh.device_type)
        for kind in CEILINGS:
            found.append(Entry("ceiling", kind, lambda kind=kind: [Ceiling.of(kind, model, device)]))
    if "torch" in wanted:
        add("local_muon", "torch", torch_muon, weights)
    return found


def outer_entries(weights: Weights, replicate: dist.DeviceMesh) -> list[Entry]:
    """Return the variants of several replicas."""
    from curvadion import LOW_COMMUNICATION

    found = []
    for name, options in {
        "local": {"max_local_steps": 1 << 30},
        "1 bit": {"max_local_steps": 0},
        "32 bits": {"max_local_steps": 0, "outer_bits": 32},
    }.items():
        settings = {"lr": LR, "replicate_mesh": replicate} | LOW_COMMUNICATION(**options)
        found.append(Entry("outer", f"replicas: {name}", functools.partial(curvadion, weights, **settings)))
    return found


def step(optimizers: Optimizers) -> None:
    for optimizer in optimizers:
        optimizer.step()


@contextmanager
def transient(device: torch.device) -> Iterator[dict[str, float]]:
    """Find out how much is allocated at once on top of what there is."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found["transient_bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        yield found
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    found["transient_bytes"] = peak


def count(entry: Entry, device: torch.device, alone: bool) -> None:
    """Count what a step does, beside the clock.

    Args:
        alone: all ranks are one replica, so that the ledger can be compared with what is sent.
    """
    ledger = getattr(entry.optimizers[0], "ledger", None)
    before = sum(ledger.calls.values()) if ledger is not None else 0
    flops = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    with Counter() if alone else nullcontext(Counter()) as counter, flops:
        step(entry.optimizers)
    entry.counted = {"flops": flops.get_total_flops()}
    entry.counted |= {"shard_wire_bytes": counter.wire, "calls": counter.calls}
    if ledger is not None:
        wire = dict.fromkeys(("shard", "replicate"), 0.0)
        for (axis, _), sent in ledger.last_step_wire.items():
            wire[axis] += sent
        calls = sum(ledger.calls.values()) - before
        if alone and (calls != counter.calls or abs(wire["shard"] - counter.wire) > 1e-6 * counter.wire):
            raise RuntimeError(
                f"the ledger must count what is sent; it has {calls} calls of {wire['shard']} bytes, sent: "
                f"{counter.calls} of {counter.wire}"
            )
        entry.counted |= {"shard_wire_bytes": wire["shard"], "replicate_wire_bytes": wire["replicate"]}
        entry.counted |= {"calls": calls, "owned": len(entry.optimizers[0].owners)}
    with transient(device) as found:
        step(entry.optimizers)
        synchronize(device)
    entry.counted |= found
    states = [v for o in entry.optimizers for state in o.state.values() for v in state.values()]
    local = [v.to_local() if isinstance(v, DTensor) else v for v in states if isinstance(v, Tensor)]
    entry.counted["state_bytes"] = sum(v.numel() * v.element_size() for v in local)


def together(value: float, device: torch.device) -> float:
    """Return the largest of all ranks' values."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def prepare(found: list[Entry], weights: Weights, device: torch.device, alone: bool) -> list[Entry]:
    """Build the optimizers and let them take three steps, the first one to warm up, the others to count."""
    from curvadion.algebra import power_iteration

    # The first Q of a matrix is drawn on the CPU; the optimizers compared here share the draws.
    original = power_iteration.initial_right_factor
    power_iteration.initial_right_factor = functools.cache(original)
    ready = []
    for entry in found:
        error = None
        try:
            weights.reset()
            entry.optimizers = entry.build()
            step(entry.optimizers)
            count(entry, device, alone)
        except Exception as e:  # the others are still worth measuring
            error = e
            what = f"{entry.operation} {entry.name}: {type(error).__name__}: {error}"
            print(f"LEFT OUT on rank {dist.get_rank()}: {what}", flush=True)
        if not together(error is not None, device):
            ready.append(entry)
    power_iteration.initial_right_factor = original
    return ready


def measure(found: list[Entry], device: torch.device, until: float, seed: int) -> None:
    """Let the entries take steps in turns, at least three each."""
    draw, rounds = random.Random(seed), 0
    while rounds < 3 or together(time.perf_counter() - until, device) < 0:
        for entry in draw.sample(found, len(found)):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            step(entry.optimizers)
            synchronize(device)
            entry.ms.append(1e3 * (time.perf_counter() - wall))
            entry.cpu_ms.append(1e3 * (time.process_time() - cpu))
        rounds += 1


def report(found: list[Entry], results: Results | None, device: str, **fields: Any) -> None:
    """Collect what the ranks have measured, and let rank 0 write it down."""
    mine = [(entry.ms, entry.cpu_ms, entry.counted) for entry in found]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    of_ranks = [[rank[k] for rank in everyone] for k in range(len(found))]
    cpu_ms = [
        statistics.median(statistics.mean(rounds) for rounds in zip(*(r[1] for r in ranks), strict=True))
        for ranks in of_ranks
    ]
    rates = rates_of(found, cpu_ms, device)
    for entry, ranks, cores in zip(found, of_ranks, cpu_ms, strict=True) if results is not None else ():
        ms = [max(rounds) for rounds in zip(*(r[0] for r in ranks), strict=True)]
        counted = {key: max(r[2][key] for r in ranks) for key in entry.counted}
        notes = {"cpu_ms": cores, **counted}
        guess = projected(entry, fields["model"], len(ranks), rates) if rates is not None else None
        if guess is not None:
            notes["projected_cpu_ms"] = guess
        amount = getattr(entry.optimizers[0], "amount", None)
        if amount is not None:
            notes["giga_per_cpu_second"] = amount / cores / 1e6
        variant = Variant(entry.operation, entry.name, step, [None], 0, flops=int(counted["flops"]))
        assert results is not None
        row = results.add(variant, Timing(device_ms=ms), copy_gbps=None, **fields)
        row |= notes
        print(
            f"{'':41} {cores:.1f} ms cpu; {counted['shard_wire_bytes'] / 1e6:.2f} MB over the shards in "
            f"{counted['calls']:.0f} calls; {counted['flops'] / 1e9:.2f} GFLOP; "
            f"transient {counted['transient_bytes'] / 1e6:.1f} MB"
            + (f"; {notes['giga_per_cpu_second']:.3g} G/s of cpu" if amount is not None else "")
            + (f"; projected {guess:.1f} ms cpu, {guess / cores - 1:+.0%}" if guess is not None else ""),
            flush=True,
        )


def work(rank: int, ranks: int, folder: str, arguments: argparse.Namespace, seconds: float) -> None:
    """Be one rank."""
    device = start(arguments)
    torch.compiler.set_stance("force_eager")
    # A rank that waits for others in vain says where, and ends them all.
    faulthandler.dump_traceback_later(2 * seconds + PATIENCE, exit=True)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(arguments.threads)
        random_numbers_on_cpu()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    wanted = arguments.families
    layouts = {}
    if set(wanted) - {"outer"}:
        layouts[f"1x{ranks}"] = (1, ranks)
    if "outer" in wanted and ranks % 2 == 0:
        layouts[f"2x{ranks // 2}"] = (2, ranks // 2)
    parts = len(layouts) * len(arguments.chosen_models)
    share, end = seconds / max(1, parts), time.perf_counter() + seconds
    results = Results("sharded", arguments.out, describe_run(arguments, device)) if rank == 0 else None
    if results is not None:
        results.__enter__()
    try:
        for layout, sizes in layouts.items():
            mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard"))
            for model in arguments.chosen_models:
                torch.manual_seed(arguments.seed + mesh["shard"].get_local_rank())  # replicas are alike
                weights = Weights(model, mesh["shard"])
                if sizes[0] == 1:
                    found = entries(wanted, weights, mesh["shard"], model)
                else:
                    found = outer_entries(weights, mesh["replicate"])
                ready = prepare(found, weights, device, alone=sizes[0] == 1)
                parts -= 1
                measure(ready, device, end - parts * share, arguments.seed)
                fields = {"model": model, "layout": layout, "shape": layout, "threads": arguments.threads}
                report(ready, results, device.type, **fields, dion=installed("dion"))
                del found, ready, weights
                gc.collect()
    finally:
        if results is not None:
            results.__exit__()
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks, for one number of ranks after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, models=tuple(MODELS), seconds=240, out="sharded.jsonl")
    parser.add_argument(
        "--ranks", help="comma-separated numbers of processes; none: 2,4, on GPUs as many as there are"
    )
    parser.add_argument(
        "--only", help=f"comma-separated families of {', '.join(FAMILIES)}; none: all but torch"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each rank on a CPU (default %(default)s)")
    arguments = parser.parse_args()
    device = start(arguments)
    default = ["2", "4"] if device.type == "cpu" else [str(torch.cuda.device_count())]
    counts = [int(n) for n in (arguments.ranks.split(",") if arguments.ranks else default)]
    if device.type == "cuda" and max(counts) > torch.cuda.device_count():
        raise SystemExit(
            f"--ranks must be at most the number of GPUs; got {max(counts)} on {torch.cuda.device_count()}; "
            "try --device cpu"
        )
    models = ("12m",) if device.type == "cpu" else ("160m", "1b3")
    arguments.chosen_models = names(arguments.models, models, tuple(MODELS), "--models")
    arguments.families = names(arguments.only, FAMILIES[:-1], FAMILIES, "--only")
    for ranks in counts:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # the profiler's, once for each rank
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(
                work,
                (ranks, folder, arguments, arguments.seconds / len(counts)),
                nprocs=ranks,
                daemon=True,
            )


if __name__ == "__main__":
    main()
