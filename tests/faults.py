"""Faults, tried with real processes: what the surviving ranks see, and how long it takes.

python tests/faults.py --times 3 --only skips
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from support.faults import TIMEOUT, Reporter, Told, run_faulty
from support.models import Toy, digest, grid

from curvadion import LOW_COMMUNICATION, CurvaDion, rooms
from curvadion.sharding.ledger import Ledger

MODES: dict[str, dict[str, Any]] = {
    "default": {"tau": 0.05, "max_local_steps": 3},
    "low": LOW_COMMUNICATION,
    "delay": LOW_COMMUNICATION(outer_delay=4),
    "fragments under way": LOW_COMMUNICATION(outer_fragments=2, max_local_steps=3, outer_delay=4),
    "fragments": LOW_COMMUNICATION(outer_fragments=2, max_local_steps=3),
    "lag": {"tau": 0.05, "max_local_steps": 3, "gate_lag": 1},
}


@dataclass(frozen=True)
class Fault:
    """What one rank, or one replica, does that the others do not.

    Attributes:
        name: in words.
        before: called before each step as before(run, step); True leaves this rank's step out.
        guilty: global ranks, or "replica" for all of replica 1.
        purpose: with `sign`, in which collective of which step the process gets it.
        at: step of the fault.
        prepare: called instead of that before construction.
        change: called before that step.
        steps: of the run, which ends with `after` or synchronize().
        lives_on: whether a process that raised stays.
        modes, grids: what it is tried with; replicas x shards.
        all_synchronize: before the fault.
    """

    name: str
    before: Callable[[Run, int], bool | None] | None = None
    prepare: Callable[[Run], None] | None = None
    change: Callable[[Run], None] | None = None
    guilty: str = "rank"
    sign: int = 0
    purpose: str = ""
    at: int = 5
    steps: int = 20
    lives_on: bool = False
    modes: tuple[str, ...] = ("default", "low", "delay", "lag")
    grids: tuple[tuple[int, int], ...] = ((2, 1), (2, 2), (1, 2))
    after: Callable[[Run], None] | None = None
    all_synchronize: bool = False


class Run:
    """A rank of a run in which something goes wrong."""

    def __init__(self, reporter: Reporter, fault: Fault, mode: str, replicas: int, shards: int) -> None:
        self.reporter, self.fault = reporter, fault
        self.replicate, self.mesh = grid(replicas, shards)
        self.replica = self.replicate.get_local_rank()
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self.guilty = self.replica == 1 if fault.guilty == "replica" else self.rank == world - 1
        self.options = dict(MODES[mode], lr=0.01)
        self.matrices: dict[str, tuple[int, ...]] = {
            "a.weight": (8, 6),
            "b.weight": (8, 6),
            "c.weight": (6, 12),
        }
        self.dtype, self.reverse = torch.float32, False
        if self.guilty and fault.prepare:
            self.reporter.fault()
            fault.prepare(self)
        self.toy = Toy(self.mesh if shards > 1 else None, matrices=self.matrices, dtype=self.dtype)
        groups = self.toy.groups()
        if self.reverse:
            groups[0]["params"].reverse()
        self.opt = CurvaDion(groups, replicate_mesh=self.replicate, **self.options)
        self.closure: Callable[[], float] | None = None
        self.step = 0
        if fault.sign and self.guilty:
            record = Ledger.record

            def watched(
                ledger: Ledger, collective: str, size: int, axis: str, purpose: str, sent: Any
            ) -> None:
                if self.step >= fault.at and purpose == fault.purpose:
                    self.reporter.fault()
                    os.kill(os.getpid(), fault.sign)
                record(ledger, collective, size, axis, purpose, sent)

            Ledger.record = watched  # type: ignore[method-assign]

    def go(self) -> dict[str, Any]:
        fault = self.fault
        for self.step in range(fault.steps):
            self.toy.set_gradients(self.step, self.replica)
            self.closure = None
            if self.step == fault.at and fault.all_synchronize:
                self.opt.synchronize()
            if self.step == fault.at and self.guilty:
                if fault.before or fault.change:
                    self.reporter.fault()
                if fault.sign and not fault.purpose:
                    self.reporter.fault()
                    os.kill(os.getpid(), fault.sign)
                if fault.change:
                    fault.change(self)
                if fault.before and fault.before(self, self.step):
                    continue
            self.opt.step(self.closure)
        if fault.after:
            fault.after(self)
        else:
            self.opt.synchronize()
        return {"step": self.opt.metrics()["curvadion/step"], "digest": digest(self.toy.params.values())}


def work(reporter: Reporter, fault: Fault, mode: str, replicas: int, shards: int) -> dict[str, Any]:
    return Run(reporter, fault, mode, replicas, shards).go()


def skip(run: Run, step: int) -> bool:
    return True


def closure_raises(run: Run, step: int) -> None:
    def closure() -> float:
        raise ZeroDivisionError("this batch is empty")

    run.closure = closure


def leave(run: Run, step: int) -> None:
    os._exit(0)


def other_lr(run: Run) -> None:
    for group in run.opt.param_groups:
        group["lr"] *= 2


def add_group(run: Run) -> None:
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    run.opt.add_param_group({"params": [("extra", p)], "algorithm": "dion"})


def freeze(run: Run) -> None:
    p = run.toy.params["b.weight"]
    p.requires_grad_(False)
    p.grad = None


def freeze_and_synchronize(run: Run) -> None:
    freeze(run)
    run.opt.synchronize()


def load(run: Run) -> None:
    run.opt.discard_divergence()
    run.opt.load_state_dict(run.opt.state_dict())


def layout(run: Run) -> None:
    run.opt.param_groups[0]["weight_layout"] = "in_out"


def prepare(what: str) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        if what == "option":
            run.options["local_lr_scale"] = 0.5
        elif what == "order":
            run.reverse = True
        elif what == "shape":
            run.matrices["b.weight"] = (8, 12)
        elif what == "missing":
            del run.matrices["b.weight"]
        elif what == "dtype":
            run.dtype = torch.float64
        elif what == "version":
            rooms.__version__ = "0.0.1"
        elif what == "check_every":
            run.options["check_every"] = 3
        elif what == "consensus":
            run.options.update(MODES["default"], consensus="average", outer_bits=32, local_update="muon")

    return change


def consensus(run: Run) -> None:
    with run.opt.consensus():
        pass


KILLS = [("SIGKILL", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)]
FAULTS = [
    Fault("a rank skips step()", skip),
    Fault("a replica skips step()", skip, guilty="replica", grids=((2, 1), (2, 2))),
    Fault("a closure raises on one rank, which ends", closure_raises),
    Fault("a closure raises on one rank, which lives on", closure_raises, lives_on=True),
    Fault("a rank leaves", leave),
    *[Fault(f"{name} in a local phase", sign=sign, at=6) for name, sign in KILLS],
    *[
        Fault(f"{name} in the gate", sign=sign, purpose="gate", grids=((2, 1), (2, 2)))
        for name, sign in KILLS
    ],
    *[
        Fault(
            f"{name} in a synchronized step, at {purpose}",
            sign=sign,
            purpose=purpose,
            modes=modes,
            grids=((2, 1), (2, 2)),
        )
        for name, sign in KILLS
        for purpose, modes in (("parameters", ("default", "lag")), ("pseudo_gradients", ("low", "fragments")))
    ],
    *[
        Fault(
            f"{name} while outer_delay is under way",
            sign=sign,
            at=10,
            modes=("delay", "fragments under way"),
            grids=((2, 1), (2, 2)),
        )
        for name, sign in KILLS
    ],
    Fault("lr changed on one rank", change=other_lr),
    Fault("a group added on one rank", change=add_group, all_synchronize=True),
    Fault("a parameter frozen on one rank", change=freeze),
    Fault("a parameter frozen and synchronize() on one rank", change=freeze_and_synchronize),
    Fault("a state loaded on one rank", change=load),
    Fault("weight_layout changed on one rank", change=layout),
    *[
        Fault(f"{what} differs on one rank", prepare=prepare(what), at=-1)
        for what in ("option", "order", "shape", "missing", "dtype", "version", "check_every", "consensus")
    ],
    *[
        Fault(
            f"a replica skips a step(), then {name}",
            skip,
            guilty="replica",
            after=after,
            at=6,
            grids=((2, 1), (2, 2)),
        )
        for name, after in (("consensus()", consensus), ("state_dict()", lambda run: run.opt.state_dict()))
    ],
]


@dataclass
class Row:
    """A line of the table.

    Attributes:
        tried: runs.
        outcomes: of surviving ranks, by what they raised.
        worst: seconds from the fault to the last of their errors.
    """

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0

    def add(self, told: list[Told]) -> None:
        """Add a run, unless the fault did not come."""
        if any(t.kind == "not begun" for t in told):
            return
        self.tried += 1
        for t in survivors(told):
            self.outcomes[t.kind] += 1
            if t.kind not in ("ok", "hung", "aborted"):
                self.worst = max(self.worst, t.seconds)

    def __str__(self) -> str:
        outcomes = ", ".join(f"{kind} on {count}" for kind, count in self.outcomes.most_common())
        return f"{self.tried} | {outcomes} ranks | {self.worst:.1f} s"


def cases(only: str) -> Iterator[tuple[Fault, str, tuple[int, int]]]:
    """The faults whose names have all these words, joined by +, with the mode and the mesh."""
    for fault in FAULTS:
        for mode in fault.modes:
            for shape in fault.grids:
                if all(word in f"{fault.name} {mode} {shape[0]}x{shape[1]}" for word in only.split("+")):
                    yield fault, mode, shape


def survivors(told: list[Told]) -> list[Told]:
    """Those that could tell."""
    return [t for t in told if t.kind not in ("killed", "stopped") and not t.message.endswith("exit code 0")]


def attempt(fault: Fault, mode: str, shape: tuple[int, int], timeout: float) -> list[Told]:
    """Try a fault once; up to three times if it does not come to it."""
    deadline = 3 * timeout + 20
    run = partial(run_faulty, math.prod(shape), work, fault, mode, *shape)
    for _ in range(3):
        told = run(timeout=timeout, deadline=deadline, lives_on=fault.lives_on)
        if all(t.kind != "not begun" for t in told):
            break
    return told


def main() -> None:
    """Print what every rank of every case told, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--times", type=int, default=1, help="runs of each case")
    parser.add_argument("--only", default="", help="words, joined by +, that the case's name has")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds, of init_process_group")
    parser.add_argument("--verbose", action="store_true", help="print messages too")
    parser.add_argument("--strict", action="store_true", help="fail if a survivor was not told by an error")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop then; which cases come first changes daily"
    )
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    chosen, rows = list(cases(options.only)), {fault.name: Row() for fault, _, _ in cases(options.only)}
    order = list(range(len(chosen)))
    if options.minutes < math.inf:
        random.Random(int(time.time()) // 86400).shuffle(order)
    for fault, mode, shape in [chosen[k] for _ in range(options.times) for k in order]:
        if time.monotonic() > until:
            break
        told = attempt(fault, mode, shape, options.timeout)
        rows[fault.name].add(told)
        mine = [f"{t.kind} {t.seconds:.1f}" for t in told]
        print(f"{fault.name} | {mode} {shape[0]}x{shape[1]} | {', '.join(mine)}", flush=True)
        for rank, t in enumerate(told if options.verbose else ()):
            print(f"    {rank}: {t.message[:900]} {t.value or ''}", flush=True)
    tried = sum(row.tried for row in rows.values())
    print(f"\n{tried} of {options.times * len(chosen)} were tried")
    print("\n| fault | times | surviving ranks | worst time to error |\n|---|---|---|---|")
    for name, row in rows.items():
        if row.tried:
            print(f"| {name} | {row} |")
    silent = [name for name, row in rows.items() if {"ok", "hung", "aborted"} & row.outcomes.keys()]
    if options.strict and silent:
        sys.exit(f"survivors were not told: {', '.join(silent)}")


if __name__ == "__main__":
    main()
