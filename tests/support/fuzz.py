"""Random runs: layouts, options, gradients, events and faults, all drawn from one seed, and what must hold.

A run is a function of its seed. All ranks of four draw the same plan; what only one of them does is part of
it. After every call all ranks compare: all raised or none did; every group has seen the same collectives on
all its ranks (the Flight Recorder's word); replicas are equal where they must be. Every third run has no
faults, and is compared to the float64 reference after each step.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from curvadion import CurvaDion
from support.cases import (
    BASE,
    MARGIN,
    SHAPES,
    Case,
    gradients,
    groups_of,
    initial_values,
    run_case,
    trajectory,
)
from support.layouts import LAYOUTS, Layout, Placed, local
from support.models import digest

WORLD = 4
RULES = ["gradient", "dion", "muon", "normuon", "dion2"]
RECORDS = 4000  # of the Flight Recorder; a run makes fewer


class Wrong(AssertionError):
    """Something that must hold does not."""


def layouts() -> list[tuple[Layout, int]]:
    """Of four ranks each."""
    return [
        (layout, replicas)
        for layout in LAYOUTS
        for replicas in (1, 2, 4)
        if layout.world_size(replicas) == WORLD
    ]


def options_of(draw: random.Random) -> dict[str, Any]:
    """Options that go together."""
    o: dict[str, Any] = {
        "tau": draw.choice([math.inf, 0.4, 0.4, 0.05]),
        "local_update": draw.choice(RULES),
        "max_local_steps": draw.choice([0, 1, 2, 3, 5]),
        "min_local_steps": draw.choice([0, 0, 0, 1]),
        "warmup_steps": draw.choice([0, 0, 2]),
        "gate_every": draw.choice([1, 1, 2, 3]),
        "consensus": draw.choice(["average", "outer", "outer", "outer", "none"]),
        "momentum": draw.choice([0.8, 0.95]),
        "rank_fraction": draw.choice([0.25, 0.5, 1.0]),
        "owners": draw.choice(["auto", "always", "never"]),
    }
    o["min_local_steps"] = min(o["min_local_steps"], o["max_local_steps"])
    if o["consensus"] == "outer":
        o |= {
            "outer_lr": draw.choice([1.0, 0.7, 1.4]),
            "outer_momentum": draw.choice([0.0, 0.6]),
            "outer_fragments": draw.choice([1, 1, 2, 3]),
        }
        o["outer_delay"] = draw.choice([0, 0, 1, 2, 4])
    if draw.random() < 0.2 and o["gate_every"] == 1:
        o["gate_lag"] = 1
    steered = (
        not o.get("gate_lag") and not o["min_local_steps"] and o["max_local_steps"] and o["gate_every"] == 1
    )
    if draw.random() < 0.1 and o["tau"] < math.inf and steered:
        o["target_sync_rate"] = 0.5
    if o["local_update"] == "normuon":
        o["eps"] = 1e-6  # the reference's SVD leaves 1e-16 in rows of zeros
    if o["local_update"] in ("muon", "normuon", "dion2"):
        o["newton_schulz"] = draw.choice(["jordan", "polar_express"])
        if draw.random() < 0.5 and o["local_update"] != "dion2":
            o["nesterov"] = True
    return o


def only_runs(draw: random.Random) -> dict[str, Any]:
    """Further options, which the reference does not know."""
    return {
        "on_nonfinite": draw.choice(["raise", "skip"]),
        "check_every": draw.choice([0, 3, 1000]),
        "momentum_dtype": draw.choice([None, None, torch.float32]),
        "orthogonalization": draw.choice(["cholesky_qr", "qr"]),
    }


@dataclass
class Event:
    """What happens before a step.

    Attributes:
        kind: see `Run.EVENTS`.
        rank: who alone does it, where one does.
        name: of a parameter.
        number: drawn for it.
    """

    kind: str
    rank: int
    name: str
    number: float


@dataclass
class Draft:
    """A run, drawn from its seed."""

    seed: int
    layout: Layout
    replicas: int
    options: dict[str, Any]
    dtype: torch.dtype
    steps: int
    events: dict[int, list[Event]] = field(default_factory=dict)

    @staticmethod
    def of(seed: int) -> Draft:
        draw = random.Random(seed)
        layout, replicas = draw.choice(layouts())
        options = options_of(draw) | only_runs(draw)
        if options["consensus"] == "outer":
            options["outer_bits"] = draw.choice([32, 16, 8, 4, 2, 1])
            if options["outer_bits"] != 32:
                options["outer_residual_kept"] = draw.choice([0.0, 0.5, 1.0])
        if replicas == 1 and options["consensus"] == "none":
            options["consensus"] = "average"
        draft = Draft(seed, layout, replicas, options, torch.float32, draw.randint(8, 20))
        for step in range(1, draft.steps):
            while draw.random() < 0.25:
                event = Event(
                    draw.choice(list(Run.EVENTS)),
                    draw.randrange(WORLD),
                    draw.choice(list(SHAPES)),
                    draw.random(),
                )
                draft.events.setdefault(step, []).append(event)
        return draft

    def __str__(self) -> str:
        changed = {
            step: [f"{e.kind} {e.name} rank {e.rank}" for e in events] for step, events in self.events.items()
        }
        return (
            f"seed {self.seed}: {self.layout} x{self.replicas} {self.options} {self.steps} steps, {changed}"
        )


class Witness:
    """The collectives that torch's Flight Recorder has seen, by group."""

    def __init__(self) -> None:
        assert os.environ.get("TORCH_FR_BUFFER_SIZE"), "the Flight Recorder must be on before the first group"
        self.last = -1

    def since_last(self) -> dict[str, list[str]]:
        entries = json.loads(torch._C._distributed_c10d._dump_fr_trace_json())["entries"]
        new = [entry for entry in entries if entry["record_id"] > self.last]
        self.last = max((entry["record_id"] for entry in new), default=self.last)
        seen: dict[str, list[str]] = {}
        for entry in new:
            name, uneven = entry["profiling_name"], "all_to_all" in entry["profiling_name"]
            sizes = "" if uneven else f"{entry['input_sizes']} {entry['input_dtypes']}"
            seen.setdefault(entry["process_group"][0], []).append(f"{name} {sizes}")
        return seen


class Run:
    """One draft, on this rank."""

    EVENTS: ClassVar[dict[str, Callable[[Run, Event], None]]] = {}

    def __init__(self, draft: Draft, placed: Placed, control: dist.ProcessGroup) -> None:
        self.draft, self.placed, self.control, self.rank = draft, placed, control, dist.get_rank()
        self.params = dict(placed.bag.named_parameters())
        for p in self.params.values():
            p.requires_grad_(True)
            p.grad = None
        placed.set_values(initial_values())
        case = Case(str(draft.seed), {})
        groups = groups_of(placed.bag.named_parameters(), case)
        self.opt = CurvaDion(
            groups, replicate_mesh=placed.replicate_mesh, **{**BASE, "tau": 0.4, **draft.options}
        )
        self.saved: Any = None
        self.extra: list[nn.Parameter] = []
        self.step = 0
        self.may_raise = False  # something was done that ranks may raise for
        self.closure: Callable[[], float] | None = None

    # ---- all ranks compare

    def everybody(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * WORLD
        dist.all_gather_object(values, value, group=self.control)
        return values

    def call(self, what: str, action: Callable[[], Any]) -> bool:
        """Call it on every rank; return whether it went well on all, or find that they differ."""
        try:
            action()
            mine = "ok"
        except Exception as error:
            mine = f"{type(error).__name__}: {error}"
        told = self.everybody(mine)
        well = [t == "ok" for t in told]
        if any(well) and not all(well):
            raise Wrong(f"step {self.step}, {what}: some ranks raised, some did not: {told}")
        if not well[0] and not self.may_raise:
            raise Wrong(f"step {self.step}, {what}: nothing was wrong, and ranks raised: {told}")
        if "LostRankError" in "".join(told):
            raise Wrong(f"step {self.step}, {what}: ranks waited for one another: {told}")
        return well[0]

    def compare_replicas(self, what: str, tensors: list[Tensor]) -> None:
        """The same part is with the peers in the other replicas."""
        shards = WORLD // self.draft.replicas
        told = self.everybody(digest(tensors))
        for rank, theirs in enumerate(told):
            if theirs != told[rank % shards]:
                raise Wrong(f"step {self.step}, {what}: rank {rank} differs from rank {rank % shards}")

    # ---- steps

    def go(self) -> None:
        for step in range(self.draft.steps):
            self.step = step
            self.set_gradients()
            self.closure = None
            for event in self.draft.events.get(self.step, []):
                self.EVENTS[event.kind](self, event)
            if not self.call("step()", lambda: self.opt.step(self.closure)):
                self.recover()
                continue
            metrics = self.opt.metrics()
            if metrics["curvadion/synchronized"]:
                self.after_synchronized()
            self.look_for_nan()
        self.synchronize()

    def look_for_nan(self) -> None:
        bad = [name for name, p in self.params.items() if not bool(local(p).isfinite().all())]
        told = self.everybody(bad)
        if any(told) and not self.may_raise:
            raise Wrong(f"step {self.step}: parameters are not finite: {told}")

    def after_synchronized(self) -> None:
        o = self.draft.options
        if o["consensus"] == "none":
            return
        if not self.opt._parameters_differ and not self.may_raise:
            self.compare_replicas(
                "parameters after a synchronized step", [local(p) for p in self.params.values()]
            )

    def set_gradients(self) -> None:
        draw = random.Random(self.draft.seed * 1000 + self.step)
        scale = 10 ** draw.uniform(-2, 1)
        parts = gradients(self.draft.replicas)[self.step % 8][self.placed.replica]
        G = {name: None if g is None else (scale * g).to(self.draft.dtype) for name, g in parts.items()}
        for name in SHAPES:
            kind, replica = draw.random(), draw.randrange(self.draft.replicas)
            if (kind < 0.08 and self.placed.replica == replica) or 0.08 < kind < 0.12:
                G[name] = None
            elif kind < 0.2 and G[name] is not None:
                G[name] = torch.zeros_like(G[name])
        made = self.placed.parts_of(G)
        for name, p in self.params.items():
            p.grad = made[name] if p.requires_grad else None
        for p in self.extra:
            p.grad = torch.ones_like(p)

    def synchronize(self) -> bool:
        if not self.call("synchronize()", self.opt.synchronize):
            self.recover()
            return False
        tensors = [local(p) for p in self.params.values() if p.requires_grad]
        for p in self.params.values():
            state = self.opt.state.get(p, {})
            tensors += [local(state[key]) for key in sorted(state)]
        if not self.may_raise:
            self.compare_replicas("parameters and state after synchronize()", tensors)
        return True

    def kind(self) -> tuple[bool, ...]:
        """What a checkpoint must have in common with the optimizer that loads it."""
        return bool(self.extra), *(p.requires_grad for p in self.params.values())

    def checkpoint(self) -> dict[str, Any] | None:
        """A copy of what was saved last, if it fits."""
        return copy.deepcopy(self.saved[1]) if self.saved and self.saved[0] == self.kind() else None

    def recover(self) -> None:
        """As a user does after an error: load, on every rank."""
        with torch.no_grad():
            for p in self.params.values():
                if not bool(local(p).isfinite().all()):
                    local(p).nan_to_num_(0.0, 0.0, 0.0)
        for group in self.opt.param_groups:
            group["lr"] = BASE["lr"]
        self.set_gradients()  # whatever had been done to them, and to the closure, before the next step
        self.closure = None
        self.opt.discard_divergence()
        state = self.checkpoint()
        self.may_raise = True
        if state is None:
            groups = groups_of(self.placed.bag.named_parameters(), Case("", {}))
            self.extra = []
            self.opt = CurvaDion(
                groups,
                replicate_mesh=self.placed.replicate_mesh,
                **{**BASE, "tau": 0.4, **self.draft.options},
            )
        elif not self.call("load_state_dict()", lambda: self.opt.load_state_dict(state)):
            raise Wrong(f"step {self.step}: a state that was saved is refused")
        if not self.call("broadcast_parameters()", self.opt.broadcast_parameters):
            raise Wrong(f"step {self.step}: no way back")
        self.may_raise = False


def _event(function: Callable[[Run, Event], None]) -> Callable[[Run, Event], None]:
    Run.EVENTS[function.__name__] = function
    return function


@_event
def nan_gradient(run: Run, event: Event) -> None:
    run.may_raise = True
    p = run.params[event.name]
    if run.rank == event.rank and p.grad is not None and local(p.grad).numel():
        value = [math.nan, math.inf, -math.inf, 3e38][int(event.number * 4)]
        local(p.grad).view(-1)[0] = value


@_event
def nan_parameter(run: Run, event: Event) -> None:
    run.may_raise = True
    p = local(run.params[event.name])
    if run.rank == event.rank and p.numel() and event.number < 0.5:
        with torch.no_grad():
            p.view(-1)[0] = math.nan


@_event
def sparse_gradient(run: Run, event: Event) -> None:
    run.may_raise = True
    if run.rank == event.rank:
        p = run.params[event.name]
        if not isinstance(p, DTensor) and p.ndim == 2:
            p.grad = torch.zeros_like(p).to_sparse()
        else:
            run.opt.param_groups[0]["lr"] = "fast"


@_event
def spoiled_option(run: Run, event: Event) -> None:
    run.may_raise = True
    if run.rank == event.rank:
        run.opt.param_groups[0]["lr"] = [None, -1.0, math.nan][int(event.number * 3)]


@_event
def lr_on_one_rank(run: Run, event: Event) -> None:
    """Found by the next check."""
    if run.draft.options["check_every"] == 3:
        run.may_raise = True
        if run.rank == event.rank:
            run.opt.param_groups[0]["lr"] *= 1.5


@_event
def lr(run: Run, event: Event) -> None:
    for group in run.opt.param_groups:
        if isinstance(group["lr"], float):
            group["lr"] *= 0.5 + event.number


@_event
def freeze(run: Run, event: Event) -> None:
    p = run.params[event.name]
    p.requires_grad_(not p.requires_grad)
    if run.synchronize() and not p.requires_grad:
        p.grad = None


@_event
def synchronize(run: Run, event: Event) -> None:
    run.synchronize()


@_event
def synchronize_next(run: Run, event: Event) -> None:
    if run.rank == event.rank:
        run.opt.synchronize_next()


@_event
def look_at_consensus(run: Run, event: Event) -> None:
    def look() -> None:
        with run.opt.consensus():
            pass

    run.call("consensus()", look)


@_event
def look_at_common_state(run: Run, event: Event) -> None:
    """Bitwise the same in all replicas, whatever each has kept or has under way."""
    if not run.opt.keeps_common_state or run.may_raise:
        return
    held: list[Tensor] = []

    def look() -> None:
        with run.opt.common_state():
            held.extend(local(p).clone() for p in run.params.values())

    if run.call("common_state()", look):
        run.compare_replicas("parameters in common_state()", held)


@_event
def save(run: Run, event: Event) -> None:
    if run.synchronize():
        run.saved = run.kind(), copy.deepcopy(run.opt.state_dict())


@_event
def load(run: Run, event: Event) -> None:
    state = run.checkpoint()
    if state is not None and run.synchronize():
        run.call("load_state_dict()", lambda: run.opt.load_state_dict(state))


@_event
def add_group(run: Run, event: Event) -> None:
    if run.extra or not run.synchronize():
        return
    run.extra = [nn.Parameter(torch.ones(6, 4))]
    run.extra[0].grad = torch.ones(6, 4)
    run.call(
        "add_param_group()", lambda: run.opt.add_param_group({"params": [("extra.weight", run.extra[0])]})
    )


@_event
def closure_raises(run: Run, event: Event) -> None:
    """Replicas of one rank, in a step that asks: the others are told."""
    o = run.draft.options
    if run.draft.replicas < WORLD or o["gate_every"] != 1 or o.get("gate_lag"):
        return
    run.may_raise = True

    def closure() -> float:
        if run.rank == event.rank:
            raise ZeroDivisionError("no batch")
        return 0.0

    run.closure = closure


# ---- many runs


class Bench:
    """The layouts of one set of ranks, made once."""

    def __init__(self) -> None:
        self.control = dist.new_group(list(range(WORLD)))
        assert isinstance(self.control, dist.ProcessGroup)
        self.placed: dict[tuple[str, int, torch.dtype], Placed] = {}
        self.witness = Witness()

    def place(self, layout: Layout, replicas: int, dtype: torch.dtype) -> Placed:
        key = (layout.name, replicas, dtype)
        if key not in self.placed:
            values = {name: value.to(dtype) for name, value in initial_values().items()}
            self.placed[key] = layout.build(values, replicas)
        return self.placed[key]

    def run(self, seed: int) -> str:
        """Do one run; return what it was."""
        if seed % 3 == 2:
            return self.compare_to_reference(seed)
        draft = Draft.of(seed)
        placed = self.place(draft.layout, draft.replicas, draft.dtype)
        self.witness.since_last()
        try:
            Run(draft, placed, self.control).go()
        except Wrong as error:
            raise Wrong(f"{draft}\n{error}") from error
        self.check_order(str(draft))
        return "run"

    def compare_to_reference(self, seed: int) -> str:
        draw = random.Random(seed)
        layout, replicas = draw.choice(layouts())
        options = options_of(draw)
        if options.get("consensus") == "none" and replicas == 1:
            options["consensus"] = "average"
        if replicas == 1:
            return "passed over"
        case = Case(f"seed {seed}", options)
        if min(moment.outcome.margin for moment in trajectory(case, replicas)) < MARGIN:
            return "passed over"
        placed = self.place(layout, replicas, torch.float64)
        self.witness.since_last()
        for p in placed.bag.parameters():
            p.requires_grad_(True)
        G = [placed.parts_of(by_replica[placed.replica]) for by_replica in gradients(replicas)]
        problems = run_case(placed, G, case, replicas)
        told: list[Any] = [None] * WORLD
        dist.all_gather_object(told, problems, group=self.control)
        if any(told):
            raise Wrong(f"seed {seed}: {layout} x{replicas} {options}: {told}")
        self.check_order(f"seed {seed}: {layout} x{replicas} {options}")
        return "reference"

    def check_order(self, what: str) -> None:
        """The collectives of every group are the same on all its ranks, in the same order."""
        seen = self.witness.since_last()
        seen.pop(self.control.group_name, None)
        told: list[Any] = [None] * WORLD
        dist.all_gather_object(told, seen, group=self.control)
        self.witness.since_last()
        groups: dict[str, list[tuple[int, list[str]]]] = {}
        for rank, by_group in enumerate(told):
            for name, calls in by_group.items():
                groups.setdefault(name, []).append((rank, calls))
        for name, members in groups.items():
            ours = dist.distributed_c10d._world.pg_names.values()
            if name in ours and any(calls != members[0][1] for _, calls in members):
                self._tell(what, name, members)

    def _tell(self, what: str, name: str, members: list[tuple[int, list[str]]]) -> None:
        first = members[0][1]
        for rank, calls in members[1:]:
            mine = dist.distributed_c10d._resolve_process_group(name)
            inside = dist.get_process_group_ranks(mine)
            if rank in inside and members[0][0] in inside and calls != first:
                where = next(
                    (k for k, (a, b) in enumerate(zip(first, calls, strict=False)) if a != b),
                    min(len(first), len(calls)),
                )
                raise Wrong(
                    f"{what}\ngroup {inside}: collective {where} differs on {members[0][0]} and {rank}: "
                    f"{first[where:][:2]} and {calls[where:][:2]}"
                )


def seeds(first: int, count: int) -> Iterator[int]:
    yield from range(first, first + count)


def run_seeds(first: int, count: int, until: float = math.inf) -> dict[str, Any]:
    """Do so many runs on this rank; stop at the first that is wrong."""
    import time

    bench, done = Bench(), {"run": 0, "reference": 0, "passed over": 0}
    for seed in seeds(first, count):
        enough: list[Any] = [time.monotonic() > until]
        dist.broadcast_object_list(enough, src=0, group=bench.control)
        if enough[0]:
            break
        try:
            done[bench.run(seed)] += 1
        except Exception as error:
            if isinstance(error, Wrong):
                raise
            raise Wrong(f"seed {seed}: {Draft.of(seed) if seed % 3 != 2 else ''}\n{error!r}") from error
    return done
