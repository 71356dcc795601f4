"""More of what `gpu_first_run.py` checks: ranks, streams, compiled models, graphs."""

import itertools
import math
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_checks import (
    EXACT,
    OUTER,
    SEED,
    SUMS,
    Check,
    LeftOut,
    Replica,
    Run,
    Where,
    deviation,
    difference,
    digest,
    draw,
    expect,
    tolerance,
    train,
)
from torch import Tensor, nn

from curvadion import CurvaDion
from curvadion.consensus import CONSENSUS
from curvadion.rules import RULES
from curvadion.sharding.group import ThreadGroup, TorchGroup
from curvadion_kernels import OPS, choose

# ---- part 2: ranks


class Staged(ThreadGroup):
    """A group of processes that share a GPU, over gloo: tensors go by way of the host."""

    def __init__(self) -> None:
        self.group = TorchGroup(dist.group.WORLD)
        self.size, self.rank, self.ranks = self.group.size, self.group.rank, self.group.ranks

    def _meet(self, kind: str, mine: Tensor, target: Tensor, sizes: Any = None) -> Any:
        given = mine.cpu()
        result = given if mine is target else target.cpu()
        if kind in ("sum", "max"):
            self.group.all_reduce(result, dist.ReduceOp.MAX if kind == "max" else dist.ReduceOp.SUM).wait()
        elif kind == "broadcast":
            self.group.broadcast(result).wait()
        else:
            getattr(self.group, kind)(result, given).wait()
        target.copy_(result)
        return _Waited()


class _Waited:
    def wait(self) -> None:
        """Return: it is done."""


# What the optimizer sends, and how: see curvadion.sharding.exchange.
SENT: list[tuple[str, torch.dtype, Any]] = [
    ("all_reduce", torch.int64, dist.ReduceOp.MAX),
    *(("all_reduce", dtype, dist.ReduceOp.SUM) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    *(
        (kind, dtype, None)
        for kind in ("all_to_all", "all_gather")
        for dtype in (torch.uint8, torch.float32, torch.float64)
    ),
    ("reduce_scatter", torch.float32, None),
    ("reduce_scatter", torch.float64, None),
    ("broadcast", torch.float32, None),
]


def collective(group: Any, kind: str, dtype: torch.dtype, op: Any, device: torch.device) -> None:
    """Do one collective of small whole numbers, and compare with what it must give, exactly."""
    size, n = group.size, 6 * group.size
    top = 2**62 - 5 if dtype == torch.int64 else 0
    values = [top + torch.arange(n, dtype=torch.int64) + 3 * rank for rank in range(size)]
    given = [v.to(dtype) for v in values]
    mine = given[group.rank].to(device)
    part = n // size
    here = slice(group.rank * part, (group.rank + 1) * part)
    if kind == "all_reduce":
        want = torch.stack(given)
        want = want.amax(0) if op == dist.ReduceOp.MAX else want.sum(0, dtype=dtype)
        got = mine
        group.all_reduce(got, op).wait()
    elif kind == "all_to_all":
        want, got = torch.cat([g[here] for g in given]), torch.empty_like(mine)
        group.all_to_all(got, mine).wait()
    elif kind == "all_gather":
        want, got = torch.cat(given), mine.new_empty(n * size)
        group.all_gather(got, mine).wait()
    elif kind == "reduce_scatter":
        want, got = torch.stack(given).sum(0, dtype=dtype)[here], mine.new_empty(part)
        group.reduce_scatter(got, mine).wait()
    else:
        want, got = given[0], mine
        group.broadcast(got).wait()
    expect(torch.equal(got.cpu(), want), f"{kind} of {dtype} gave {got.cpu().tolist()}, not {want.tolist()}")


@dataclass(frozen=True)
class World:
    """Processes that do tasks together.

    Attributes:
        size, backend: of the process group.
        device: the type of the ranks' devices.
        shared: whether all use the first device.
        steps: of each task.
    """

    size: int
    backend: str
    device: str
    shared: bool
    steps: int


def rank_main(rank: int, world: World, folder: str, task: str, options: list[dict[str, Any]]) -> None:
    """Be one rank: do a task with each of the options, until one fails, and leave what came of them."""
    device = torch.device(world.device, 0 if world.shared else rank) if world.device == "cuda" else None
    device = device or torch.device("cpu")
    done: list[Any] = []
    failure = None
    try:
        torch.set_num_threads(1)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = f"file://{folder}/store"
        dist.init_process_group(world.backend, init_method=store, rank=rank, world_size=world.size)
        group = Staged() if world.shared and world.size > 1 else TorchGroup(dist.group.WORLD)
        for some in options:
            done.append(TASKS[task](group, device, some, world.steps))
    except BaseException:
        failure = traceback.format_exc()
    part = Path(folder, f"rank{rank}.part")
    part.write_bytes(pickle.dumps((done, failure)))
    part.rename(part.with_suffix(""))
    if failure is None:
        dist.barrier()
        dist.destroy_process_group()


class Tasks:
    """What ranks do one after the other, in one set of processes that is started when first asked."""

    def __init__(self, world: World, task: str, options: list[dict[str, Any]]):
        self._world, self._task, self._options = world, task, options
        self._results: list[tuple[list[Any], str | None]] = []

    def of(self, number: int) -> list[Any]:
        """Return what all ranks returned for these options; raise with the tracebacks of those that
        failed."""
        if not self._results:
            self._run()
        failed = [f"rank {rank}:\n{words}" for rank, (_, words) in enumerate(self._results) if words]
        least = min(len(done) for done, _ in self._results)
        if number > least:
            raise LeftOut("what the same processes did before has failed")
        if number == least:
            raise RuntimeError("\n".join(failed))
        return [done[number] for done, _ in self._results]

    def _run(self, seconds: float = 60.0) -> None:
        context = torch.multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder:
            arguments = (self._world, folder, self._task, self._options)
            ranks = range(self._world.size)
            processes = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in ranks]
            for process in processes:
                process.start()
            until = time.monotonic() + seconds
            for rank, process in enumerate(processes):
                file = Path(folder, f"rank{rank}")
                while not file.exists() and process.is_alive() and time.monotonic() < until:
                    time.sleep(0.02)
                result: tuple[list[Any], str | None] = (
                    [],
                    f"it did not end in its time, or died (exit code {process.exitcode})",
                )
                self._results.append(pickle.loads(file.read_bytes()) if file.exists() else result)
            for process in processes:
                process.join(2.0)
                process.kill()


def do_collectives(group: Any, device: torch.device, options: Any, steps: int) -> list[str]:
    """Do every collective that the optimizer uses; return what went wrong."""
    wrong = []
    for kind, dtype, op in SENT:
        try:
            collective(group, kind, dtype, op, device)
        except Exception:
            wrong.append(f"{kind} of {dtype}:\n{traceback.format_exc()}")
    return wrong


def do_training(group: Any, device: torch.device, options: dict[str, Any], steps: int) -> Any:
    """Train one replica of several; return a hash of its parameters, them, and the decisions."""
    mesh = group if isinstance(group, Staged) else dist.group.WORLD
    replica = Replica(group.rank, mesh, options, device, torch.float32)
    for t in range(steps):
        replica.step(t)
    replica.optimizer.synchronize()
    X = [x.cpu() for x in replica.X]
    return digest(X), X, replica.decisions


def do_sharded(group: Any, device: torch.device, options: dict[str, Any], steps: int) -> list[Tensor]:
    """Train a model that FSDP2 shards over all ranks, or whole where there is one; return its parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 9)).to(device, torch.float64)
    if group.size > 1:
        mesh = init_device_mesh(device.type, (group.size,), mesh_dim_names=("shard",))
        fully_shard(model, mesh=mesh)
    return [p.cpu() for p in _train_model(model, model, steps, device, options)]


def _train_model(
    model: nn.Module, call: Callable[[Tensor], Tensor], steps: int, device: torch.device, options: Any
) -> list[Tensor]:
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim != 2]
    groups = [{"params": matrices}, {"params": rest, "algorithm": "adamw", "lr": 0.01}]
    optimizer = CurvaDion(groups, lr=0.02, **options)
    dtype = matrices[0][1].dtype
    for t in range(steps):
        inputs = draw(32, 24, seed=7000 + t, dtype=dtype).to(device)
        call(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in model.parameters()]
    return whole


TASKS: dict[str, Callable[..., Any]] = {
    "collectives": do_collectives,
    "training": do_training,
    "sharded": do_sharded,
}


def _collectives(tasks: Tasks) -> str:
    for wrong in tasks.of(0):
        expect(not wrong, "\n".join(wrong))
    return f"{len(SENT)} kinds, exact"


def _replicas(where: Where, options: dict[str, Any], tasks: Tasks, number: int) -> str:
    [(hash0, X0, decisions), (hash1, _, other)] = tasks.of(number)
    expect(decisions == other, f"the replicas decided differently: {decisions} and {other}")
    expect(hash0 == hash1, "the replicas' parameters differ after synchronize()")
    cpu = train({**options, "kernels": "reference"}, torch.device("cpu"), torch.float32, where.steps)
    apart, bound = deviation(Run(cpu.start, [X0], decisions), cpu), tolerance(options, torch.float32)
    found = f"equal bits; apart from the CPU by {apart:.1e} of the way, at most {bound:.1e}"
    return expect(apart <= bound, found)


def _sharded(where: Where, options: dict[str, Any], tasks: Tasks, number: int) -> str:
    where.gpu(least=2)
    mine = tasks.of(number)[0]
    whole = do_sharded(OneProcess(), torch.device("cpu"), options, where.steps)
    worst = max(difference(a, b) for a, b in zip(mine, whole, strict=True))
    return expect(worst <= EXACT[torch.float64], f"apart by {worst:.1e} of the largest entry")


class OneProcess:
    """One process by itself."""

    size, rank = 1, 0


def ranks(where: Where) -> Iterator[Check]:
    """Collectives and replicas, each rank a process: over NCCL with a GPU each, or over gloo on one."""
    device = where.device.type
    several = device == "cuda" and torch.cuda.device_count() > 1
    backend, words = "gloo", f"on one {'GPU' if device == 'cuda' else 'CPU'}, gloo"
    if several:
        backend, words = "cpu:gloo,cuda:nccl", "a GPU each, NCCL"
    elif device == "cuda":
        tasks = Tasks(World(1, "nccl", device, True, 0), "collectives", [{}])
        yield Check("every collective over NCCL, one rank", partial(_collectives, tasks))
    two = World(2, backend, device, not several, where.steps)
    yield Check(
        f"every collective, two ranks, {words}", partial(_collectives, Tasks(two, "collectives", [{}]))
    )
    outer = {"outer_bits": 1, "outer_delay": 2}
    runs = [
        {"consensus": consensus, "local_update": rule, **(outer if consensus == "outer" else {})}
        for consensus, rule in itertools.product(CONSENSUS, RULES)
    ]
    tasks = Tasks(two, "training", runs[:1] if where.quick else runs)
    for number, options in enumerate(runs):
        title = f"two replicas, {words}: {options['consensus']}, {options['local_update']}"
        yield Check(title, partial(_replicas, where, options, tasks, number))
    runs = [{"local_update": rule, "tau": 0.3} for rule in RULES]
    tasks = Tasks(two, "sharded", runs)
    for number, options in enumerate(runs):
        title = f"FSDP2 on two GPUs against one process: {options['local_update']}"
        yield Check(title, partial(_sharded, where, options, tasks, number))


# ---- part 4: streams, compiled models, graphs


class Alone(ThreadGroup):
    """One rank that plays two replicas, asynchronously: sums and parts are its own, twice. What it computes
    means nothing; the same run without any overlap must give the same bits."""

    def __init__(self) -> None:
        self.group, self.size, self.rank, self.ranks = TorchGroup(dist.group.WORLD), 2, 0, []

    def _meet(self, kind: str, mine: Tensor, target: Tensor, sizes: Any = None) -> Any:
        if kind in ("sum", "max"):
            return self.group.all_reduce(target, dist.ReduceOp.MAX if kind == "max" else dist.ReduceOp.SUM)
        if kind == "broadcast":
            return self.group.broadcast(target)
        if kind == "all_to_all":
            return self.group.all_to_all(target, mine)
        works = [self.group.all_gather(half, mine) for half in target.chunk(2)]
        return _Both(works)


@dataclass
class _Both:
    works: list[Any]

    def wait(self) -> None:
        """Wait for all."""
        for work in self.works:
            work.wait()


OVERLAPPING: list[dict[str, Any]] = [
    {"gate_lag": 1, "local_update": "dion"},
    {"gate": "drift"},
    {**OUTER, "outer_delay": 2},
    {**OUTER, "outer_delay": 3, "outer_bits": 1},
    {**OUTER, "outer_on_host": True, "outer_momentum": 0.5},
    {**OUTER, "outer_on_host": True, "outer_fragments": 3, "outer_delay": 1},
]


def overlapping(where: Where, options: dict[str, Any]) -> str:
    """Run with the device far behind the host, on a stream of its own; then with a wait after everything."""
    runs = []
    on_gpu = where.device.type == "cuda"
    for hurried in (True, False):
        replica = Replica(0, Alone(), options, where.device, torch.float32, width=12 if on_gpu else 1)
        G = [replica.gradients(t) for t in range(where.steps)]
        where.wait()
        with _stream(where.device, own=hurried):
            for t in range(where.steps):
                if hurried and on_gpu:
                    torch.cuda._sleep(20_000_000)  # about 10 ms
                replica.step(t, G[t])
                if not hurried:
                    where.wait()
        where.wait()
        runs.append(digest(replica.X))
    return expect(runs[0] == runs[1], "the same bits" if runs[0] == runs[1] else "other bits when hurried")


@contextmanager
def _stream(device: torch.device, *, own: bool) -> Iterator[None]:
    if device.type != "cuda" or not own:
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def no_hidden_wait(where: Where, options: dict[str, Any]) -> str:
    """Let torch raise at every operation that makes the host wait; the step's own wait is for an event."""
    where.gpu()
    replica = Replica(0, Alone(), options, where.device, torch.float32)
    G = [replica.gradients(t) for t in range(where.steps)]
    before = torch.cuda.get_sync_debug_mode()
    try:
        for t in range(where.steps):
            replica.step(t, G[t])
            torch.cuda.set_sync_debug_mode("error")  # from the second step on: the first compares all ranks
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return f"none in {where.steps - 1} steps"


def small_model(device: torch.device) -> nn.Module:
    """Return a model, the same each time."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 8)).to(device)


def compiled_model(where: Where) -> str:
    """Train a model that torch.compile has compiled, and the same one as it is."""
    runs = []
    for compiled in (False, True):
        model = small_model(where.device)
        call = torch.compile(model, backend="inductor" if where.device.type == "cuda" else "eager")
        options = {"tau": 0.3, "local_update": "dion"}
        runs.append(_train_model(model, call if compiled else model, where.steps, where.device, options))
    worst = max(difference(a, b) for a, b in zip(*runs, strict=True))
    return expect(worst <= 1e-2, f"apart by {worst:.1e} of the largest entry, at most 1e-2")


def graphed_model(where: Where) -> str:
    """Train a model whose forward and backward are CUDA graphs, and the same one as it is."""
    where.gpu()
    runs = []
    for graphed in (False, True):
        model = small_model(where.device)
        sample = draw(32, 24, seed=1).to(where.device)
        call: Any = torch.cuda.make_graphed_callables(model, (sample,)) if graphed else model
        options = {"tau": 0.3, "local_update": "dion"}
        runs.append(_train_model(model, call, where.steps, where.device, options))
    worst = max(difference(a, b) for a, b in zip(*runs, strict=True))
    return expect(worst <= 1e-3, f"apart by {worst:.1e} of the largest entry, at most 1e-3")


def graphed_kernels(where: Where) -> str:
    """Capture the kernels of a local step, and replay them on other values."""
    where.gpu()
    ops = choose("triton", where.device)
    shapes = ((64, 128), (7,), (300, 65))
    X, G, M = ([draw(*s, seed=k).to(where.device) for s in shapes] for k in range(3))
    last, tau = torch.ones(3, device=where.device), torch.full((3,), torch.inf, device=where.device)
    decay = torch.full((), 0.9, dtype=torch.float64, device=where.device)

    def branch() -> Tensor:
        sums = ops.momentum_norm_(M, G, decay=decay)
        _, _, key = ops.gate_key(sums, last, tau, hold_closed=False)
        ops.local_step_(X, G, decay=decay, step_size=decay, key=key)
        return key

    branch()
    before = [t.clone() for t in (*X, *M)]
    branch()
    where.wait()
    expected = digest([*X, *M])
    torch._foreach_copy_([*X, *M], before)
    where.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        branch()
    graph.replay()
    where.wait()
    expect(digest([*X, *M]) == expected, "a replay gives other bits")
    fresh = [t.clone() for t in X]
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            ops.local_step_(fresh, G, decay=decay, step_size=decay)
    except RuntimeError as error:
        return expect(
            "run the same call on the same tensors once" in str(error), f"captured; refused: {error}"
        )
    raise AssertionError("tables that were not uploaded must be refused in a capture; they were not")


def custom_ops(where: Where) -> str:
    """Call a kernel inside a compiled function, without a break of the graph."""
    where.gpu()
    import curvadion_kernels.library  # noqa: F401

    R = draw(2, 300, 33, seed=4).to(where.device)
    call = torch.compile(lambda r: torch.ops.curvadion.column_sumsq(2 * r), fullgraph=True)
    worst = difference(call(R), OPS["column_sumsq"].reference(2 * R))
    return expect(worst <= SUMS, f"apart by {worst:.1e}")


def another_device(where: Where) -> str:
    """Step on the second GPU while the first is the current one."""
    where.gpu(least=2)
    torch.cuda.set_device(0)
    options = {"local_update": "dion"}
    replica = Replica(0, None, options, torch.device("cuda", 1), torch.float64)
    other = Replica(0, None, {**options, "kernels": "reference"}, torch.device("cpu"), torch.float64)
    for t in range(where.steps):
        replica.step(t)
        other.step(t)
    worst = max(difference(a, b) for a, b in zip(replica.X, other.X, strict=True))
    return expect(worst <= 1e-6, f"apart from the CPU by {worst:.1e}")


def twice(where: Where) -> str:
    """Take the same steps twice."""
    runs = []
    for _ in range(2):
        replica = Replica(0, None, {"local_update": "dion"}, where.device, torch.float32)
        for t in range(where.steps):
            replica.step(t)
        runs.append(digest(replica.X))
    return expect(runs[0] == runs[1], "the same bits" if runs[0] == runs[1] else "other bits")


def loss_scaling(where: Where) -> str:
    """Let a GradScaler overflow once; that step is skipped, and only that."""
    model = small_model(where.device)
    optimizer = CurvaDion([p for p in model.parameters() if p.ndim == 2], tau=0.3)
    scaler = torch.amp.GradScaler(where.device.type, init_scale=2.0**8)
    moved = []
    for t in range(3):
        with torch.autocast(where.device.type, dtype=torch.bfloat16):
            loss = model(draw(32, 24, seed=t).to(where.device)).square().mean()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(loss * (math.inf if t == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = model.parameters()
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return expect(moved == [True, False, True], f"moved in steps: {moved}")


def streams(where: Where) -> Iterator[Check]:
    """What overlaps, compiled models, CUDA graphs, devices: one rank that plays two replicas."""
    if not dist.is_initialized():
        store = f"file://{tempfile.mkdtemp()}/store"
        backend = "nccl" if where.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    for options in OVERLAPPING:
        words = ", ".join(f"{name}={value}" for name, value in options.items())
        yield Check(f"overlapping: {words}", partial(overlapping, where, options))
        yield Check(f"no hidden wait: {words}", partial(no_hidden_wait, where, options))
    yield Check("a compiled model", partial(compiled_model, where))
    yield Check("a model as CUDA graphs", partial(graphed_model, where))
    yield Check("kernels in a CUDA graph", partial(graphed_kernels, where))
    yield Check("a custom op in a compiled function", partial(custom_ops, where))
    yield Check("a GPU that is not the current one", partial(another_device, where))
    yield Check("two runs give the same bits", partial(twice, where))
    yield Check("a GradScaler that overflows", partial(loss_scaling, where))
