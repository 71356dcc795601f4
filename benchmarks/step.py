"""Measure whole optimizer steps: CurvaDion's branches with each set of kernels, against AdamW, Muon and
microsoft/dion.

    python benchmarks/step.py                            # 160M and 1.3B, under 8 minutes on one GPU
    python benchmarks/step.py --models 160m --seconds 120
    python benchmarks/step.py --device cpu               # a small model, without the Triton kernels
    python benchmarks/step.py --device cpu --interpret   # with them, interpreted: a test, not a measurement
    python benchmarks/step.py --host-time            # steps of 300 small matrices: host_time.py
    python benchmarks/step.py --host-time --ranks 2  # the same on shards

One shard, float32 parameters and gradients of a Llama-style model, embedding, head and norms included.
Nothing leaves the process: what is measured is the arithmetic and the host; benchmarks/sharded.py measures
several ranks. Operations:

    local           the gate stays closed: local_update="gradient", tau=inf
    local_dion      the gate stays closed: local_update="dion", tau=inf
    local_muon      the gate stays closed: local_update="muon", consensus="outer", tau=inf
    outer           LOW_COMMUNICATION, each step synchronized: two replicas in two threads, the time of both
    synchronized    the gate is always open: max_local_steps=0
    peer            fused AdamW; torch.optim.Muon, microsoft/dion's Muon and Dion, each with AdamW for what is
                    not a hidden matrix; microsoft/dion's are compiled where that takes no more than a tenth
                    of the time that is left, otherwise, and on CPUs, they run eagerly
    local_branch    the kernels of `local` alone (momentum_norm_, gate_key, local_step_), matrices only, eager
                    and as a CUDA graph

The step waits for the gate's value once, so its host time includes the kernels before it. Peak memory is what
a step allocates on top of parameters, gradients and state.
"""

import argparse
import functools
import gc
import importlib.util
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import host_time
import torch
from timing import (
    MODELS,
    Results,
    Variant,
    add_common_arguments,
    copy_variant,
    count_launches,
    describe_run,
    installed,
    measure,
    names,
    random_tensors,
    spread,
    start,
)
from torch import Tensor
from torch.testing import assert_close

from curvadion.projection.nominal import Decoder

FRACTIONS = ("1/4", "1", "1/2", "1/8")
OPERATIONS = ("local", "local_muon", "local_branch", "synchronized", "local_dion", "outer", "peer")
RANKED = ("synchronized", "local_dion")  # whose work depends on the rank
REPLICAS = 2  # of `outer`
LR, SCALAR_LR, MU, DECAY = 1e-3, 1e-4, 0.95, 0.01
SHARE = {"160m": 0.4, "1b3": 0.6}  # of the time, where both are asked for


@dataclass
class Weights:
    """The parameters, with gradients, that all optimizers of a model share."""

    matrices: list[tuple[str, torch.nn.Parameter]]
    others: list[tuple[str, torch.nn.Parameter]]

    @staticmethod
    def of(model: Decoder, device: torch.device) -> "Weights":
        shapes = [(shape, count) for shape, count in model.matrices().items()]
        matrix_shapes: list[tuple[int, ...]] = [shape for shape, count in shapes for _ in range(count)]
        named = []
        for kind, group in (("layers.weight", matrix_shapes), ("others.weight", model.others())):
            parameters = []
            tensors = zip(
                random_tensors(group, device, torch.float32),
                random_tensors(group, device, torch.float32),
                strict=True,
            )
            for number, (x, g) in enumerate(tensors):
                p = torch.nn.Parameter(x.mul_(0.02))
                p.grad = g.mul_(1e-3)
                parameters.append((f"{kind}.{number}", p))
            named.append(parameters)
        return Weights(*named)

    @property
    def tensors(self) -> list[Tensor]:
        return [p.data for _, p in (*self.matrices, *self.others)]

    def copy(self) -> "Weights":
        """Return those of another replica: equal parameters, other gradients."""

        def copied(named: list[tuple[str, torch.nn.Parameter]]) -> list[tuple[str, torch.nn.Parameter]]:
            new = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in named]
            for (_, p), (_, old) in zip(new, named, strict=True):
                p.grad = torch.randn_like(p).mul_(old.grad.std())
            return new

        return Weights(copied(self.matrices), copied(self.others))

    def count(self) -> tuple[int, int]:
        return sum(p.numel() for _, p in self.matrices), sum(p.numel() for _, p in self.others)


@dataclass
class Branch:
    """The tensors of the local branch's kernels."""

    X: list[Tensor]
    G: list[Tensor]
    M: list[Tensor]
    last_norm: Tensor
    tau: Tensor
    mu: Tensor
    decay: Tensor
    step_size: Tensor
    graph: Any = None
    outputs: Any = None


@dataclass
class Group:
    """Variants that are measured together, in turns."""

    title: str
    build: Callable[[], list[Variant]]
    rows: list[dict[str, Any]] = field(default_factory=list)


def curvadion(
    weights: Weights, operation: str, kernels: str, fraction: float, replicas: Any = None
) -> torch.optim.Optimizer:
    """Return CurvaDion such that every step but the first is of one kind."""
    from curvadion import LOW_COMMUNICATION, CurvaDion

    groups = [{"params": weights.matrices}, {"params": weights.others, "algorithm": "adamw", "lr": SCALAR_LR}]
    options: dict[str, Any] = {
        "local": {"local_update": "gradient"},
        "local_dion": {"local_update": "dion", "rank_fraction": fraction},
        "local_muon": {"local_update": "muon", "consensus": "outer"},
        "synchronized": {"max_local_steps": 0, "rank_fraction": fraction},
        "outer": dict(LOW_COMMUNICATION(max_local_steps=0), replicate_mesh=replicas),
    }[operation]
    common = {"lr": LR, "momentum": MU, "weight_decay": DECAY, "tau": float("inf")}
    return CurvaDion(groups, check_every=0, kernels=kernels, **(common | options))


def step(optimizers: list[torch.optim.Optimizer]) -> None:
    """Take a step, under a schedule: the learning rate is another one in every call."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= 1 - 1e-6
        optimizer.step()


def adamw(parameters: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for _, p in parameters], lr=SCALAR_LR, betas=(0.9, 0.95), weight_decay=DECAY, fused=True
    )


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body when the time is over."""

    def late(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds:.0f} s to compile; give more --seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def microsoft(
    name: str, weights: Weights, compile_seconds: float, **options: Any
) -> tuple[torch.optim.Optimizer, bool] | None:
    """Return an optimizer of the package `dion` after a first step, and whether it is compiled; None where it
    is not installed or does not run."""
    if importlib.util.find_spec("dion") is None:
        return None
    import dion

    groups = [
        {"params": [p for _, p in weights.matrices]},
        {"params": [p for _, p in weights.others], "algorithm": "adamw", "lr": SCALAR_LR},
    ]
    for compiled in (True, False):
        if compiled and compile_seconds <= 0:
            continue
        torch.compiler.set_stance("default" if compiled else "force_eager")
        optimizer = getattr(dion, name)(groups, lr=LR, mu=MU, weight_decay=DECAY, **options)
        try:
            with within(compile_seconds if compiled else 60):
                optimizer.step()
            return optimizer, compiled
        except Exception as error:  # another version may need something else; ours is still worth measuring
            what = "not compiled" if compiled else "left out"
            print(f"microsoft/dion's {name} is {what}: {type(error).__name__}: {error}")
    return None


def optimizer_variants(
    weights: Weights,
    operations: list[str],
    kernels: list[str],
    fraction: str,
    peers: bool,
    compile_seconds: float,
) -> list[Variant]:
    """Return the wanted kinds of steps, each with its own optimizer on the shared parameters."""
    from curvadion.algebra import power_iteration as dion

    # The first Q of a matrix is drawn on the CPU, which takes longer than many steps; the optimizers compared
    # here share the draws.
    original = dion.initial_right_factor
    dion.initial_right_factor = functools.cache(original)
    matrices, others = weights.count()
    variants = []
    try:
        for operation in operations:
            for name in kernels:
                if operation == "outer":
                    variants.append(outer_variant(weights, name))
                    continue
                optimizer = curvadion(weights, operation, name, float(Fraction(fraction)))
                notes: dict[str, Any] = {"state_bytes": state_bytes([optimizer])}
                if operation in RANKED:
                    notes["rank_fraction"] = fraction
                least = 24 * matrices + 28 * others if operation == "local" else 0
                variants.append(
                    Variant(operation, f"curvadion_{name}", step, [[optimizer]], least, notes=notes)
                )
    finally:
        dion.initial_right_factor = original
    if peers and "local" in operations:
        together = [adamw([*weights.matrices, *weights.others])]
        variants.append(Variant("peer", "adamw_fused", step, [together], 28 * (matrices + others)))
    if peers and "local_muon" in operations:
        if hasattr(torch.optim, "Muon"):
            muon = torch.optim.Muon([p for _, p in weights.matrices], lr=LR, momentum=MU, weight_decay=DECAY)
            variants.append(Variant("peer", "muon", step, [[muon, adamw(weights.others)]], 0))
        else:
            print("torch.optim.Muon is left out: this torch has none")
    theirs = []
    if peers and "local_muon" in operations:
        theirs.append(("microsoft_muon", "Muon", {}))
    if peers and "synchronized" in operations:
        theirs.append(("microsoft_dion", "Dion", {"rank_fraction": float(Fraction(fraction))}))
    for label, name, options in theirs:
        found = microsoft(name, weights, compile_seconds, **options)
        if found is not None:
            notes = {"version": installed("dion"), "compiled": found[1]}
            notes |= {"rank_fraction": fraction} if options else {}
            variants.append(Variant("peer", label, step, [[found[0]]], 0, notes=notes))
    return variants


def outer_variant(weights: Weights, kernels: str) -> Variant:
    """Return the synchronized step of several replicas, each in a thread of its own."""
    from curvadion.sharding.group import ThreadGroup, computing_threads, results_of

    threads = computing_threads(REPLICAS)
    replicas = [weights, *(weights.copy() for _ in range(REPLICAS - 1))]

    def build(own: Weights, group: Any) -> torch.optim.Optimizer:
        return curvadion(own, "outer", kernels, 1.0, group)

    def together(optimizers: list[torch.optim.Optimizer]) -> None:
        results_of([threads.submit(step, [optimizer]) for optimizer in optimizers])

    groups = ThreadGroup.of(REPLICAS)
    optimizers = results_of([threads.submit(build, *pair) for pair in zip(replicas, groups, strict=True)])
    notes = {"replicas": REPLICAS, "state_bytes": state_bytes(optimizers) // REPLICAS}
    return Variant("outer", f"curvadion_{kernels}", together, [optimizers], 0, notes=notes)


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Return the size of all state tensors."""
    values = [
        value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()
    ]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def branch_variants(weights: Weights, kernels: list[str], device: torch.device) -> list[Variant]:
    """Return the kernels of the local branch on the matrices, called one by one and as a CUDA graph."""
    from curvadion_kernels import OPS

    def run(name: str, s: Branch) -> tuple[Tensor, Tensor]:
        sums = getattr(OPS["momentum_norm_"], name)(s.M, s.G, decay=s.mu)
        norm, _, key = getattr(OPS["gate_key"], name)(sums, s.last_norm, s.tau, hold_closed=False)
        getattr(OPS["local_step_"], name)(s.X, s.G, decay=s.decay, step_size=s.step_size, key=key)
        return norm, key

    X, G = [p.data for _, p in weights.matrices], [p.grad for _, p in weights.matrices]
    count, numel = len(X), weights.count()[0]

    def scalar(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=device)

    def branch() -> Branch:
        M = random_tensors([tuple(x.shape) for x in X], device, torch.float32)
        last, tau = torch.ones(count, device=device), torch.full((count,), torch.inf, device=device)
        return Branch(X, G, M, last, tau, scalar(MU), scalar(1 - LR * DECAY), scalar(LR))

    variants = [
        Variant("local_branch", f"kernels_{name}", functools.partial(run, name), [branch()], 24 * numel)
        for name in kernels
    ]
    if "triton" in kernels and device.type == "cuda":
        s = branch()
        run("triton", s)  # compiles, and uploads the tables
        torch.cuda.synchronize(device)
        before = ([x.clone() for x in s.X], [m.clone() for m in s.M])
        run("triton", s)
        expected = ([x.clone() for x in s.X], [m.clone() for m in s.M])
        torch._foreach_copy_([*s.X, *s.M], [*before[0], *before[1]])
        torch.cuda.synchronize(device)
        s.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(s.graph):
            s.outputs = run("triton", s)
        s.graph.replay()
        torch.cuda.synchronize(device)
        assert_close(s.X, expected[0], rtol=0, atol=0)
        assert_close(s.M, expected[1], rtol=0, atol=0)
        variants.append(
            Variant("local_branch", "kernels_triton_graph", lambda s: s.graph.replay(), [s], 24 * numel)
        )
    return variants


def check(variants: list[Variant], weights: Weights) -> None:
    """Compare two steps of CurvaDion with either set of kernels from the same start. Needs all optimizers to
    be fresh."""
    pairs: dict[str, dict[str, Variant]] = {}
    for variant in variants:
        if variant.name.startswith("curvadion_"):
            pairs.setdefault(variant.operation, {})[variant.name] = variant
    X = weights.tensors
    for operation, pair in pairs.items():
        if len(pair) < 2 or operation == "outer":  # a bit of a sum near zero may be the other one
            continue
        before = [x.clone() for x in X]
        results = []
        for variant in pair.values():
            torch._foreach_copy_(X, before)
            for _ in range(2):
                variant.run(variant.states[0])
            results.append(torch._foreach_sub(X, before))
        torch._foreach_copy_(X, before)
        update, difference = (
            torch.stack(torch._foreach_norm(tensors)).norm()
            for tensors in (results[0], torch._foreach_sub(results[0], results[1]))
        )
        # Orthogonalization multiplies rounding errors by the condition number of a random matrix, and Muon's
        # is in bfloat16 on a GPU.
        bound = 5e-2 if operation == "local_muon" else 1e-2
        if not difference < bound * update:
            raise RuntimeError(
                f"{' and '.join(pair)} must agree to {bound:g} of the update in {operation}; got "
                f"{float(difference / update):.2g}"
            )


def check_branches(variants: list[Variant]) -> None:
    """Make sure that what was timed was what its name says."""
    for variant in variants:
        if variant.name.startswith("curvadion_"):
            synchronized = variant.states[0][0].metrics()["curvadion/synchronized"]
            if synchronized != float(variant.operation in ("synchronized", "outer")):
                raise RuntimeError(
                    f"steps of {variant.operation} ({variant.name}) took the wrong branch: synchronized = "
                    f"{synchronized}"
                )


def run_model(arguments: argparse.Namespace, model: str, device: torch.device, begin: float) -> None:
    """Measure one model in this process."""
    kernels = ["reference"]
    if device.type == "cuda" or arguments.interpret:
        from curvadion_kernels import choose

        try:
            choose("triton", device)
            kernels.insert(0, "triton")
        except RuntimeError as error:
            print(f"the Triton kernels are left out: {error}")
    else:
        print("the Triton kernels are left out: there is no GPU; --interpret tests them")
    if importlib.util.find_spec("dion") is None:
        print("microsoft/dion is left out: there is no package dion")

    on_gpu = device.type == "cuda"
    weights = Weights.of(MODELS[model], device)
    wanted = arguments.chosen_operations
    peers = "peer" in wanted
    groups = []
    deadline = begin + arguments.seconds * (0.8 if on_gpu else 1.0)

    def steps(operations: list[str], fraction: str = "1/4") -> list[Variant]:
        patience = 0.1 * (deadline - time.perf_counter()) if on_gpu else 0.0
        return optimizer_variants(weights, operations, kernels, fraction, peers, patience)

    for operation in ("local", "local_muon", "outer"):
        if operation in wanted:
            groups.append(Group(operation, functools.partial(steps, [operation])))
    if "local_branch" in wanted:
        groups.append(Group("local_branch", functools.partial(branch_variants, weights, kernels, device)))
    for fraction in arguments.chosen_fractions:
        some = [o for o in RANKED if o in wanted]
        if some:
            groups.append(Group(f"rank fraction {fraction}", functools.partial(steps, some, fraction)))

    wrong: list[str] = []
    with Results("step", arguments.out, describe_run(arguments, device)) as results:
        copy = copy_variant(device)
        [timing] = measure([copy], device, seconds=0.5)
        results.add(copy, timing, copy_gbps=None, model="")
        for number, group in enumerate(groups):
            left = deadline - time.perf_counter()
            if left <= 0:
                print(
                    f"left out, the time is used up: {', '.join(g.title for g in groups[number:])}; give "
                    "more --seconds"
                )
                break
            try:
                variants = group.build()
                check(variants, weights)
            except Exception as error:  # the others are still worth measuring
                wrong.append(f"{group.title}: {error}")
                print(f"LEFT OUT: {wrong[-1]}", flush=True)
                continue
            share = min(20.0 if on_gpu else 2.0, max(0.1, 0.3 * left / (len(groups) - number)))
            timings = measure([*variants, copy], device, seconds=share, least=1 if arguments.interpret else 3)
            check_branches(variants)
            best = spread(timings.pop().device_ms)
            assert best is not None
            gbps = copy.bytes / best["median"] / 1e6
            for variant, timing in zip(variants, timings, strict=True):
                params = weights.count()[0] if variant.operation == "local_branch" else sum(weights.count())
                fields = {"model": model, "shard": 1, "dtype": "float32", "params": params, "copy_GBps": gbps}
                fields["matmul_precision"] = torch.get_float32_matmul_precision()
                group.rows.append(results.add(variant, timing, copy_gbps=gbps, **fields))
            del variants, variant
            free(device)
        if on_gpu:  # after all timing, which the profiler could disturb
            deadline = begin + arguments.seconds
            for group in groups:
                if not group.rows:
                    continue
                if time.perf_counter() > deadline:
                    print(f"launches from {group.title} on were not counted, the time is used up")
                    break
                variants = group.build()
                for variant, row in zip(variants, group.rows, strict=True):
                    variant.run(variant.states[0])  # the first step is always synchronized
                    row["launches"] = count_launches(variant.run, variant.states[0], device)
                del variants, variant
                free(device)
    if wrong:
        raise SystemExit("\n".join(["left out, because they failed or the kernels differ:", *wrong]))


def free(device: torch.device) -> None:
    """Give the memory of optimizers back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Measure each model in a process of its own, so that counting the launches of one does not slow the
    next."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, models=tuple(MODELS), seconds=400, out="step.jsonl")
    parser.add_argument("--only", help=f"comma-separated operations of {', '.join(OPERATIONS)}; none: all")
    parser.add_argument("--rank-fractions", help=f"comma-separated, of {', '.join(FRACTIONS)}; none: all")
    parser.add_argument("--host-time", action="store_true", help="see benchmarks/host_time.py; on the CPU")
    parser.add_argument("--ranks", type=int, default=1, help="with --host-time: processes, 1 or more")
    parser.add_argument("--matrices", type=int, default=300, help="with --host-time: how many there are")
    arguments = parser.parse_args()
    if arguments.host_time:
        if arguments.out == parser.get_default("out"):
            arguments.out = arguments.out.with_name("host_time.jsonl")
        arguments.device = "cpu"
        start(arguments)
        with tempfile.TemporaryDirectory() as folder:
            host_time.main(arguments, Path(folder))
        return
    begin = time.perf_counter()
    device = start(arguments)
    default = ("160m", "1b3") if device.type == "cuda" else ("small",)
    models = names(arguments.models, default, tuple(MODELS), "--models")
    if arguments.interpret and models != ["small"]:
        raise SystemExit(f"--interpret is for --models small; got {arguments.models}")
    arguments.chosen_operations = names(arguments.only, OPERATIONS, OPERATIONS, "--only")
    arguments.chosen_fractions = names(arguments.rank_fractions, FRACTIONS, FRACTIONS, "--rank-fractions")
    if len(models) == 1:
        run_model(arguments, models[0], device, begin)
        return
    weight = [SHARE.get(model, 0.1) for model in models]
    failed = False
    for model, part in zip(models, weight, strict=True):
        seconds = arguments.seconds * part / sum(weight)
        options = [
            f"--{key}={value}" for key in ("only", "commit") if (value := getattr(arguments, key)) is not None
        ]
        options += [f"--rank-fractions={arguments.rank_fractions}"] if arguments.rank_fractions else []
        fixed = [
            f"--device={device.type}",
            f"--seconds={seconds:g}",
            f"--out={arguments.out}",
            f"--seed={arguments.seed}",
        ]
        program = [sys.executable, str(Path(__file__).resolve()), f"--models={model}", *fixed, *options]
        with subprocess.Popen(program) as child:
            try:
                failed |= child.wait() != 0
            except BaseException:
                child.terminate()  # it still writes what it has
                raise
    if failed:
        raise SystemExit("a model failed; see above")


if __name__ == "__main__":
    main()
