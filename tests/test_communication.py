"""What crosses which axis, byte for byte, and what it makes equal.

The witness is torch's Flight Recorder, which notes every collective where the process group runs it, in C++
below all
Python: nothing the optimizer could do in Python escapes it. A reduce-scatter appears there as gloo carries it
out, with its whole input. `expected` is computed from shapes alone.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import (
    DENSE,
    MATRICES,
    Shapes,
    TinyGPT,
    Toy,
    digest,
    gathered,
    grid,
    local,
    outcome,
    state_digest,
    whole,
)
from support.ranks import run_ranks
from support.wire import Sent, Wire, run_recorded
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from curvadion import CurvaDion
from curvadion.sharding.exchange import Exchange
from curvadion.sharding.group import TorchGroup, _Done
from curvadion.sharding.layout import ShardMesh
from curvadion.sharding.ledger import Ledger

RANDOM: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
ALWAYS: dict[str, Any] = {"max_local_steps": 0}
NEVER: dict[str, Any] = {"tau": math.inf}


@dataclass(frozen=True)
class Layout:
    """Replicas x shards, and how the matrices lie on the shards."""

    replicas: int
    shards: tuple[int, ...]
    matrices: Shapes
    placements: dict[str, tuple[Any, ...]]

    @property
    def shard_ranks(self) -> int:
        return math.prod(self.shards)

    @property
    def world_size(self) -> int:
        return self.replicas * self.shard_ranks

    def meshes(self) -> tuple[DeviceMesh, DeviceMesh | None]:
        names = ("replicate", "first", "second")[: 1 + len(self.shards)]
        mesh = init_device_mesh("cpu", (self.replicas, *self.shards), mesh_dim_names=names)
        return mesh["replicate"], mesh[names[1:]] if self.shards else None

    def toy(self, mesh: DeviceMesh | None, **options: Any) -> Toy:
        return Toy(mesh, matrices=self.matrices, placements=self.placements, **options)


UNEVEN: Shapes = {"layers.0.weight": (7, 5), "layers.1.weight": (5, 9), "layers.2.weight": (1, 3)}
COLWISE = (Shard(0),)
ROWWISE = (Shard(1),)
LAYOUTS = {
    "plain-4x1": Layout(4, (), MATRICES, {}),
    "fsdp-2x2": Layout(2, (2,), MATRICES, {}),
    "fsdp-1x4": Layout(1, (4,), MATRICES, {}),
    "fsdp-2x2-uneven-and-empty": Layout(2, (2,), UNEVEN, {}),
    "rowwise-2x2": Layout(
        2, (2,), MATRICES, dict.fromkeys(MATRICES, ROWWISE) | {n: (Replicate(),) for n in DENSE}
    ),
    "fsdp-tp-2x2x2": Layout(
        2,
        (2, 2),
        MATRICES,
        {
            "layers.0.weight": (Shard(0), Shard(1)),
            "layers.1.weight": (Shard(1), Shard(0)),
            "layers.2.weight": (Shard(0), Replicate()),
        }
        | {name: (Shard(0), Replicate()) for name in DENSE},
    ),
}
TWO_AXES = ["fsdp-2x2", "fsdp-2x2-uneven-and-empty", "rowwise-2x2", "fsdp-tp-2x2x2"]
LOCAL_UPDATES = ["gradient", "dion"]
CASES = [(name, update, "adamw") for name in ("plain-4x1", *TWO_AXES) for update in LOCAL_UPDATES]
CASES += [("plain-4x1", "gradient", "lion"), ("rowwise-2x2", "dion", "lion")]


def rank_of(shape: tuple[int, ...], fraction: float = 0.25) -> int:
    return max(1, min(math.ceil(fraction * min(shape)), min(shape)))


def elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def p_and_r_elements(layout: Layout) -> int:
    """Of one replica; and with each part of a P one number, that says whether the matrix has a gradient."""
    total = 0
    for name, (rows, cols) in layout.matrices.items():
        placements = layout.placements.get(name, (Shard(0),) * len(layout.shards))
        long = Shard(0 if rows >= cols else 1)
        parts = [size for size, p in zip(layout.shards, placements, strict=True) if p == long]
        total += (rows + cols) * rank_of((rows, cols)) + math.prod(parts)
    return total


def q_elements(matrices: Shapes) -> int:
    return sum(min(shape) * rank_of(shape) for shape in matrices.values())


# Of one step: synchronized, what the wire saw, and the ledger's calls and bytes.
Step = tuple[bool, list[Sent], dict[tuple[str, str], int], dict[tuple[str, str], int]]


class Run:
    """An optimizer on this rank of a layout, watched by the wire and by the ledger."""

    def __init__(self, layout: Layout, **options: Any) -> None:
        replicate, mesh = layout.meshes()
        self.layout, self.replica = layout, replicate.get_local_rank()
        self.toy = layout.toy(mesh, dtype=options.pop("dtype", torch.float32))
        groups = self.toy.groups(options.pop("dense_algorithm", "adamw"))
        self.opt = CurvaDion(groups, replicate_mesh=replicate, **RANDOM | options)
        self.wire = Wire(layout.shard_ranks)
        self.taken = 0

    def step(self) -> Step:
        self.toy.set_gradients(self.taken, self.replica)
        self.taken += 1
        ledger = self.opt.ledger
        self.wire.since_last()
        calls, sizes = Counter(ledger.calls), Counter(ledger.bytes)
        self.opt.step()
        return (
            bool(self.opt.metrics()["curvadion/synchronized"]),
            self.wire.since_last(),
            dict(Counter(ledger.calls) - calls),
            dict(Counter(ledger.bytes) - sizes),
        )

    def equal(self) -> dict[str, bool]:
        """Whether replicas have the same bits of a parameter, by name."""
        hashes = gathered({name: digest([param]) for name, param in self.toy.params.items()})
        shards = self.layout.shard_ranks
        return {
            name: all(of_rank[name] == hashes[rank % shards][name] for rank, of_rank in enumerate(hashes))
            for name in self.toy.params
        }


def steps(layout: Layout, count: int, **options: Any) -> list[Step]:
    run = Run(layout, **options)
    return [run.step() for _ in range(count)]


@dataclass(frozen=True)
class Story:
    """S L L S L L S and then L, with checks in the first and in the fifth step; and what synchronize() makes
    of it."""

    trace: list[Step]
    equal: list[dict[str, bool]]
    diverged: list[bool]  # before and after synchronize()
    hashes: list[list[str]]  # of all state, by rank: before, after, and after another
    local_steps: set[float]

    @staticmethod
    def of(layout: Layout, **options: Any) -> Story:
        run = Run(layout, max_local_steps=2, check_every=4, **options, **NEVER)
        opt, params, matrices = run.opt, run.toy.params, run.toy.matrices
        both = [(run.step(), run.equal()) for _ in range(8)]
        diverged, hashes = [opt.diverged], [gathered(state_digest(opt))]
        means = replica_means(params, layout)
        momenta = replica_means({name: opt.state[params[name]]["momentum"] for name in matrices}, layout)
        opt.synchronize()
        for name, mean in means.items():
            torch.testing.assert_close(local(params[name]).detach(), mean, msg=f"{name} is the average")
        for name, mean in momenta.items():
            torch.testing.assert_close(
                local(opt.state[params[name]]["momentum"]), mean, msg=f"M of {name} is the average"
            )
        diverged, hashes = [*diverged, opt.diverged], [*hashes, gathered(state_digest(opt))]
        local_steps = {float(opt.state[param]["local_steps"]) for param in params.values()}
        opt.synchronize()
        hashes.append(gathered(state_digest(opt)))
        return Story([step for step, _ in both], [equal for _, equal in both], diverged, hashes, local_steps)


@functools.cache
def stories(name: str, local_update: str, dense_algorithm: str) -> list[Story]:
    """By rank of a layout; the same runs serve many tests."""
    layout = LAYOUTS[name]
    options = {"local_update": local_update, "dense_algorithm": dense_algorithm}
    return run_recorded(layout.world_size, lambda: Story.of(layout, **options))


def replica_total(traces: list[Any], layout: Layout, replica: int, step: int) -> Counter[str]:
    """Bytes over the replicate axis by purpose, summed over all ranks of one replica."""
    total: Counter[str] = Counter()
    for rank in range(replica * layout.shard_ranks, (replica + 1) * layout.shard_ranks):
        for (axis, purpose), size in traces[rank][step][3].items():
            if axis == "replicate":
                total[purpose] += size
    return total


@pytest.mark.parametrize("local_update", LOCAL_UPDATES)
@pytest.mark.parametrize("name", ["plain-4x1", *TWO_AXES])
def test_a_closed_gate_sends_eight_bytes_over_the_replicate_axis(name: str, local_update: str) -> None:
    layout = LAYOUTS[name]
    norms = 4 * (2 * len(layout.matrices) + 2)
    for rank, trace in enumerate(story.trace for story in stories(name, local_update, "adamw")):
        for step in (1, 2, 5):
            synchronized, sent, _, _ = trace[step]
            assert not synchronized
            crossing = [entry for entry in sent if entry.axis != "shard"]
            assert crossing == [Sent("replicate", "all_reduce", 8)], f"rank {rank}, step {step}: {crossing}"
            within = [entry for entry in sent if entry.axis == "shard"]
            if not layout.shards:
                assert within == [], "there is no shard axis"
            elif local_update == "gradient":
                one_sum = [Sent("shard", "all_reduce", norms)] * len(layout.shards)
                assert within == one_sum, (
                    "one SUM of 4 (2 L + 2) bytes along each shard axis and nothing else"
                )
            else:
                assert within[0] == Sent("shard", "all_reduce", norms)


def test_the_gate_is_an_int64_maximum() -> None:
    """The wire does not show the operation: gloo's MAX on floats loses NaN, so the type matters."""

    def worker() -> list[Any]:
        seen: list[Any] = []
        replicate, _ = LAYOUTS["plain-4x1"].meshes()
        toy = Toy()
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **RANDOM, **NEVER)
        original = dist.all_reduce

        def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, *args: Any, **kwargs: Any) -> Any:
            seen.append((tensor.dtype, tensor.numel(), op == dist.ReduceOp.MAX))
            return original(tensor, op, *args, **kwargs)

        for step in range(2):
            toy.set_gradients(step, replicate.get_local_rank())
            seen.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "all_reduce", all_reduce)
                opt.step()
        return seen

    for seen in run_ranks(4, worker):
        assert seen == [(torch.int64, 1, True)]


@functools.cache
def always_open(name: str) -> list[Any]:
    """By rank: `steps` with each payload."""
    layout = LAYOUTS[name]
    return run_recorded(
        layout.world_size,
        lambda: {item: steps(layout, 2, payload_dtype=dtype, **ALWAYS) for item, dtype in PAYLOADS.items()},
    )


PAYLOADS = {4: None, 2: torch.bfloat16}  # by the bytes of an element


@pytest.mark.parametrize("item", PAYLOADS, ids=["own-dtype", "bf16-payload"])
@pytest.mark.parametrize("name", ["plain-4x1", *TWO_AXES])
def test_an_open_gate_without_local_steps_sends_factors_and_gradients_once(name: str, item: int) -> None:
    layout = LAYOUTS[name]
    traces = [of_rank[item] for of_rank in always_open(name)]
    for replica in range(layout.replicas):
        total = replica_total(traces, layout, replica, 1)
        assert total.pop("gate") == 8 * layout.shard_ranks
        assert total.pop("factors") == item * p_and_r_elements(layout), (
            f"{name}: each element of P and R crosses the replicate axis once per replica"
        )
        assert total.pop("gradients") == item * elements(DENSE), "AdamW gradients: dense, once per replica"
        assert not total, f"no local step happened, so nothing else crosses the replicate axis: {dict(total)}"


@pytest.mark.parametrize(("name", "local_update", "dense_algorithm"), CASES)
def test_an_open_gate_after_local_steps_sends_consensus_too(
    name: str, local_update: str, dense_algorithm: str
) -> None:
    layout = LAYOUTS[name]
    traces = [story.trace for story in stories(name, local_update, dense_algorithm)]
    assert [entry[0] for entry in traces[0]] == [True, False, False, True, False, False, True, False]
    moments = 2 if dense_algorithm == "adamw" else 1
    for replica in range(layout.replicas):
        total = replica_total(traces, layout, replica, 3)
        assert total.pop("gate") == 8 * layout.shard_ranks
        assert total.pop("factors") == 4 * p_and_r_elements(layout)
        assert total.pop("gradients") == 4 * elements(DENSE)
        assert total.pop("parameters") == 4 * (elements(layout.matrices) + elements(DENSE)), (
            "each parameter once"
        )
        assert total.pop("moments") == 4 * moments * elements(DENSE), "each moment once"
        if local_update == "dion":
            assert total.pop("right_factor") == 4 * q_elements(layout.matrices), "each element of Q once"
        assert not total, f"nothing else crosses the replicate axis: {dict(total)}"


def test_consensus_none_sends_no_parameters() -> None:
    layout = LAYOUTS["fsdp-2x2"]
    traces = run_recorded(4, lambda: steps(layout, 5, consensus="none", max_local_steps=2, **NEVER))
    total = replica_total(traces, layout, 0, 3)
    assert set(total) == {"gate", "factors", "gradients"}


@pytest.mark.parametrize(
    ("param_dtype", "momentum_dtype", "item"),
    [(torch.bfloat16, torch.float32, 2), (torch.float64, None, 8)],
    ids=["bf16-parameters", "fp64"],
)
def test_parameters_travel_in_their_own_dtype(
    param_dtype: torch.dtype, momentum_dtype: Any, item: int
) -> None:
    layout = LAYOUTS["fsdp-2x2"]
    options = {"dtype": param_dtype, "momentum_dtype": momentum_dtype, "max_local_steps": 1, **NEVER}
    traces = run_recorded(4, lambda: steps(layout, 3, **options))  # S L S
    total = replica_total(traces, layout, 0, 2)
    assert total["parameters"] == item * (elements(MATRICES) + elements(DENSE))


@pytest.mark.parametrize("local_update", LOCAL_UPDATES)
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_ledger_agrees_with_the_flight_recorder(name: str, local_update: str) -> None:
    """Calls and bytes, per rank, per axis, on every step of a run with both branches and two checks."""
    for rank, trace in enumerate(story.trace for story in stories(name, local_update, "adamw")):
        for step, (_, sent, calls, sizes) in enumerate(trace):
            checks = [entry for entry in sent if entry.bytes == 48 and entry.axis == "both"]
            # A check over everybody has one row in the ledger, whichever axis it is filed under.
            rest = Counter(entry.axis for entry in sent if entry not in checks)
            rest_bytes: Counter[str] = Counter()
            for entry in sent:
                if entry not in checks:
                    rest_bytes[entry.axis] += entry.bytes
            ledger: Counter[str] = Counter()
            ledger_bytes: Counter[str] = Counter()
            for (axis, purpose), count in calls.items():
                if not (checks and purpose == "check"):
                    ledger[axis] += count
                    ledger_bytes[axis] += sizes.get((axis, purpose), 0)  # some send nothing to owners
            where = f"{name}, rank {rank}, step {step}"
            assert ledger == rest, f"{where}: number of collectives, ledger {dict(ledger)}, wire {dict(rest)}"
            assert ledger_bytes == rest_bytes, (
                f"{where}: bytes, ledger {dict(ledger_bytes)}, wire {dict(rest_bytes)}"
            )


@pytest.mark.parametrize("name", ["plain-4x1", "fsdp-2x2", "fsdp-tp-2x2x2"])
def test_the_check_has_a_row_of_its_own_and_comes_first(name: str) -> None:
    layout = LAYOUTS[name]
    for trace in (story.trace for story in stories(name, "gradient", "adamw")):
        checked = [{key: size for key, size in entry[3].items() if key[1] == "check"} for entry in trace]
        assert [bool(rows) for rows in checked] == [True, False, False, False, True, False, False, False], (
            "the check runs on the first step and every check_every steps"
        )
        for step, sent in ((0, [8, 48]), (4, [8, 48])):
            expected = {("replicate", "check"): sum(sent), ("shard", "check"): 48 * len(layout.shards)}
            assert checked[step] == {key: size for key, size in expected.items() if size}, (
                "six int64 along each axis, and one that a gate's key may be paired with"
            )
            first = [entry.bytes for entry in trace[step][1][: len(sent)]]
            assert first == sent, "the check is the first collective of its step"


@pytest.mark.parametrize("name", ["plain-4x1", "fsdp-2x2"])
def test_the_ledger_agrees_with_comm_debug_mode(name: str) -> None:
    layout = LAYOUTS[name]

    def worker() -> list[tuple[int, int]]:
        replicate, mesh = layout.meshes()
        toy = layout.toy(mesh)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, max_local_steps=1, **RANDOM, **NEVER)
        counts = []
        for step in range(4):
            toy.set_gradients(step, replicate.get_local_rank())
            before = sum(opt.ledger.calls.values())
            with CommDebugMode() as mode:
                opt.step()
            counts.append((mode.get_total_counts(), sum(opt.ledger.calls.values()) - before))
        return counts

    for counts in run_ranks(layout.world_size, worker):
        for step, (dispatched, booked) in enumerate(counts):
            assert dispatched == booked > 0, (
                f"step {step}: torch dispatched {dispatched} collectives, ledger {booked}"
            )


def test_metrics_report_the_ledger_and_the_dense_baseline() -> None:
    layout = LAYOUTS["fsdp-2x2"]

    def worker() -> Any:
        replicate, mesh = layout.meshes()
        toy = layout.toy(mesh)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, max_local_steps=1, **RANDOM, **NEVER)
        metrics = []
        for step in range(3):
            toy.set_gradients(step, replicate.get_local_rank())
            opt.step()
            metrics.append(opt.metrics())
        numel = sum(local(param).numel() for param in toy.params.values())
        return metrics, dict(opt.ledger.bytes), numel

    total = 0
    for metrics, ledger, numel in run_ranks(4, worker):
        for (axis, purpose), size in ledger.items():
            if size:
                assert metrics[-1][f"curvadion/bytes_total/{axis}/{purpose}"] == float(size)
        for axis in ("replicate", "shard"):
            booked = sum(size for (where, _), size in ledger.items() if where == axis)
            assert metrics[-1][f"curvadion/bytes_total/{axis}"] == float(booked)
            assert sum(entry[f"curvadion/bytes/{axis}"] for entry in metrics) == float(booked)
        assert metrics[1]["curvadion/bytes/replicate"] == metrics[1]["curvadion/bytes/replicate/gate"] == 8.0
        assert metrics[0]["curvadion/dense_bf16_bytes"] == 2.0 * numel, "this rank's share of a bf16 gradient"
        assert metrics[2]["curvadion/dense_bf16_bytes_total"] == 3 * 2.0 * numel
        total += numel
    assert total == 2 * (elements(MATRICES) + elements(DENSE))


def test_reading_metrics_and_state_sends_nothing() -> None:
    def worker() -> list[Sent]:
        replicate, mesh = grid(2, 2)
        toy = Toy(mesh)
        wire = Wire(2)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **RANDOM)
        made = wire.since_last()
        toy.set_gradients(0, replicate.get_local_rank())
        opt.step()
        opt.synchronize()
        wire.since_last()
        opt.metrics()
        opt.named_rmmc()
        opt.state_dict()
        opt.zero_grad()
        return made + wire.since_last()

    for sent in run_recorded(4, worker):
        assert sent == [], "construction, metrics(), named_rmmc() and state_dict() do not communicate"


def test_one_process_sends_nothing() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), max_local_steps=1, **RANDOM, **NEVER)
    for step in range(3):
        toy.set_gradients(step, 0)
        opt.step()
    opt.synchronize()
    opt.broadcast_parameters()
    with opt.consensus():
        pass
    assert sum(opt.ledger.bytes.values()) == 0
    assert sum(opt.ledger.calls.values()) == 0
    assert opt.replicas == 1
    assert not opt.diverged, "one replica cannot diverge"
    opt.state_dict()


def test_factors_are_not_padded_on_the_shard_axis() -> None:
    """A partial sum goes in whole once (reduce-scatter) and comes back in pieces (all-gather), in flat
    buffers."""
    layout = LAYOUTS["fsdp-2x2-uneven-and-empty"]
    traces = run_recorded(4, lambda: steps(layout, 2, **ALWAYS))
    # Rows are split: R (n x r) of a tall matrix is partial, and P of a wide one, where the equations hold for
    # X^T.
    partial_p = sum(cols * rank_of((rows, cols)) for rows, cols in layout.matrices.values() if rows < cols)
    partial_r = sum(cols * rank_of((rows, cols)) for rows, cols in layout.matrices.values() if rows >= cols)
    # P: whole in, half back. R: whole in, half of this replica's R_i and half of the mean back.
    elements_sent = 1.5 * partial_p + 2.0 * partial_r
    slack = (
        2 * layout.shard_ranks * len(("P", "R"))
    )  # each buffer rounded up to the number of shards, in and out
    for rank, trace in enumerate(traces):
        sent = trace[1][3]["shard", "factors"]
        assert 4 * elements_sent <= sent <= 4 * (elements_sent + slack), f"rank {rank}: {sent} bytes"


def replica_hashes(params: Any, shards: int) -> list[list[str]]:
    """hashes[replica][shard] of the local parameters."""
    values = gathered(digest(params))
    return [values[start : start + shards] for start in range(0, len(values), shards)]


@pytest.mark.parametrize(("name", "local_update", "dense_algorithm"), CASES)
def test_replicas_drift_in_local_steps_and_are_equal_after_a_synchronized_one(
    name: str, local_update: str, dense_algorithm: str
) -> None:
    story = stories(name, local_update, dense_algorithm)[0]
    assert [entry[0] for entry in story.trace] == [True, False, False, True, False, False, True, False]
    for step, ((synchronized, *_), equal) in enumerate(zip(story.trace, story.equal, strict=True)):
        for param_name, same in equal.items():
            if synchronized:
                assert same, f"step {step}: {param_name} must be bitwise equal over the replicas"
            else:
                assert not same, f"step {step}: {param_name} must differ, each replica had its own gradients"


def test_replicas_are_equal_after_warm_up_and_after_a_new_group() -> None:
    def worker() -> list[tuple[bool, bool]]:
        run = Run(LAYOUTS["fsdp-2x2"], local_update="dion", max_local_steps=2, warmup_steps=2, **NEVER)
        trace = []
        for step in range(5):  # S S L, by the new group S, and L
            if step == 3:
                run.opt.add_param_group({"params": [("new.weight", nn.Parameter(torch.ones(4, 4)))]})
            trace.append((run.step()[0], all(run.equal().values())))
        return trace

    for trace in run_recorded(4, worker):
        assert trace == [(True, True), (True, True), (False, False), (True, True), (False, False)]


def test_consensus_none_drifts() -> None:
    """The literal formula, for study: a synchronized step adds one update to different weights."""

    def worker() -> list[bool]:
        replicate, mesh = grid(2, 2)
        toy = Toy(mesh)
        opt = CurvaDion(
            toy.groups(), replicate_mesh=replicate, consensus="none", max_local_steps=1, **RANDOM, **NEVER
        )
        equal = []
        for step in range(5):
            toy.set_gradients(step, replicate.get_local_rank())
            opt.step()
            hashes = replica_hashes(toy.params.values(), 2)
            equal.append(hashes[0] == hashes[1])
        return equal

    assert run_ranks(4, worker)[0] == [True, False, False, False, False]


def test_unequal_starts_are_refused_and_broadcast_parameters_cures_it() -> None:
    def worker() -> Any:
        replicate, mesh = grid(2, 2)
        found = []
        for where in range(4):  # one element of one parameter of one rank
            toy = Toy(mesh)
            if dist.get_rank() == where:
                local(toy.params["norm.weight"]).data[0] += 1.0
            opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **RANDOM)
            toy.set_gradients(0, replicate.get_local_rank())
            before = digest(toy.params.values())
            refused = outcome(opt.step)
            untouched = digest(toy.params.values()) == before
            opt.broadcast_parameters()
            hashes = replica_hashes(toy.params.values(), 2)
            first_replica_kept = replicate.get_local_rank() != 0 or digest(toy.params.values()) == before
            after = outcome(opt.step)
            found.append((refused, untouched, hashes[0] == hashes[1], first_replica_kept, after))
        return found

    for rank, found in enumerate(run_ranks(4, worker)):
        for where, (refused, untouched, equal, kept, after) in enumerate(found):
            note = f"rank {rank}, weights of rank {where} changed"
            assert refused[0] == "ReplicaMismatchError", f"{note}: every rank must refuse, got {refused}"
            assert "broadcast_parameters()" in refused[1], f"{note}: the message must name the remedy"
            assert untouched, f"{note}: a refused step changes nothing"
            assert equal, f"{note}: broadcast_parameters() must make the replicas equal"
            assert kept, f"{note}: replica 0's weights are the ones that are kept"
            assert after == ("ok", ""), f"{note}: the next step must work"


def test_a_later_check_finds_replicas_that_were_changed_from_outside() -> None:
    def worker() -> list[str]:
        replicate, mesh = grid(2, 2)
        toy = Toy(mesh)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, check_every=3, **RANDOM, **ALWAYS)
        seen = []
        for step in range(4):
            toy.set_gradients(step, replicate.get_local_rank())
            if step == 1 and dist.get_rank() == 3:
                local(toy.params["layers.0.weight"]).data[0, 0] += 0.5
            seen.append(outcome(opt.step)[0])
        return seen

    for seen in run_ranks(4, worker):
        assert seen == ["ok", "ok", "ok", "ReplicaMismatchError"]


def test_a_check_between_local_steps_accepts_that_replicas_differ() -> None:
    def worker() -> str:
        replicate, mesh = grid(2, 2)
        toy = Toy(mesh)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, check_every=2, **RANDOM, **NEVER)
        for step in range(6):
            toy.set_gradients(step, replicate.get_local_rank())
            opt.step()
        return "ok"

    assert run_ranks(4, worker) == ["ok"] * 4


@pytest.mark.parametrize(("name", "local_update", "dense_algorithm"), CASES)
def test_synchronize_makes_everything_equal(name: str, local_update: str, dense_algorithm: str) -> None:
    layout = LAYOUTS[name]
    for story in stories(name, local_update, dense_algorithm):
        assert story.diverged == [True, False]
        before, after, again = story.hashes
        shards = layout.shard_ranks
        assert before[0] != before[shards], "the replicas must have differed, otherwise this shows nothing"
        for replica in range(1, layout.replicas):
            assert after[replica * shards : (replica + 1) * shards] == after[:shards], (
                "all state is bitwise equal"
            )
        assert story.local_steps == {0.0}, "the local-step counter starts again"
        assert again == after, "a second synchronize() changes nothing"


def replica_means(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Of this rank's parts, the means over replicas."""
    parts = gathered({name: local(tensor).detach().clone() for name, tensor in tensors.items()})
    mine = parts[dist.get_rank() % layout.shard_ranks :: layout.shard_ranks]
    return {name: torch.stack([of_rank[name] for of_rank in mine]).mean(0) for name in tensors}


@pytest.mark.parametrize(("replicas", "shards", "tau"), [(4, 1, 0.25), (2, 2, 0.15)])
def test_synchronize_does_not_fire_the_gate(replicas: int, shards: int, tau: float) -> None:
    """Averaging shrinks the momenta; the previous norms shrink with them, or every checkpoint would fire the
    gate."""

    def worker() -> Any:
        replicate, mesh = grid(replicas, shards)
        toy = Toy(mesh, matrices={"a": (24, 16), "b": (16, 32)}, dense={})
        opt = CurvaDion(toy.groups(), lr=0.0, momentum=0.95, replicate_mesh=replicate, tau=tau)
        branches = []
        for step in range(60):
            toy.set_gradients(step, replicate.get_local_rank())
            opt.step()
            branches.append(bool(opt.metrics()["curvadion/synchronized"]))
        [param, _] = toy.params.values()
        before = float(opt.state[param]["last_norm"])
        opt.synchronize()
        shrunk = float(torch.linalg.matrix_norm(whole(opt.state[param]["momentum"]))) / before
        toy.set_gradients(60, replicate.get_local_rank())
        opt.step()
        return (
            branches[40:],
            shrunk,
            opt.metrics()["curvadion/synchronized"],
            opt.metrics()["curvadion/rmmc_max"],
        )

    for settled, shrunk, synchronized, rmmc in run_ranks(replicas * shards, worker):
        assert not any(settled), "the gate must have been quiet before, otherwise this shows nothing"
        assert 1.0 - shrunk > 1.5 * tau, (
            f"the momenta shrank to {shrunk:.2f}: without rescaling this would fire"
        )
        assert synchronized == 0.0, f"synchronize() must not fire the gate, RMMC was {rmmc}"


@pytest.mark.parametrize("shards", [1, 2])
def test_consensus_shows_the_average_and_leaves_the_run_as_it_was(shards: int) -> None:
    """The same run with and without evaluations in between, through a real FSDP2 model, bitwise."""
    replicas = 2

    def run(evaluate: bool) -> Any:
        replicate, mesh = grid(replicas, shards)
        replica = replicate.get_local_rank()
        torch.manual_seed(0)
        model = TinyGPT()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        opt = CurvaDion(model.groups(), replicate_mesh=replicate, max_local_steps=3, **RANDOM, **NEVER)
        inside, losses = [], []
        for step in range(8):  # S LLL S LLL
            opt.zero_grad()
            loss = model.loss(step, replica)
            loss.backward()
            opt.step()
            losses.append(float(loss))
            if evaluate:
                own = [whole(param) for param in model.parameters()]
                means = [sum(values) / replicas for values in zip(*every_replica(own, shards), strict=True)]
                state = state_digest(opt)
                with opt.consensus():
                    average = [whole(param) for param in model.parameters()]
                    with torch.no_grad():
                        seen = float(model.loss(1000, 0))
                assert state_digest(opt) == state, "leaving consensus() must put back every bit"
                for average_value, mean in zip(average, means, strict=True):
                    torch.testing.assert_close(average_value, mean)
                inside.append((digest(average), seen, replica_hashes_differ(own, shards)))
        return state_digest(opt), losses, gathered(inside)

    def worker() -> Any:
        return run(evaluate=False), run(evaluate=True)

    for rank, (without, with_evaluation) in enumerate(run_ranks(replicas * shards, worker)):
        assert with_evaluation[1] == without[1], f"rank {rank}: evaluation must not change the losses"
        assert with_evaluation[0] == without[0], f"rank {rank}: evaluation must not change the run, bitwise"
        inside = with_evaluation[2]
        assert any(differed for _, _, differed in inside[0]), (
            "some evaluation must have met diverged replicas"
        )
        for step, entries in enumerate(zip(*inside, strict=True)):
            assert len({entry[0] for entry in entries}) == 1, f"step {step}: one averaged model on every rank"
            assert len({entry[1] for entry in entries}) == 1, f"step {step}: one loss of the averaged model"


def every_replica(tensors: list[Tensor], shards: int) -> list[list[Tensor]]:
    return gathered(tensors)[::shards]


def replica_hashes_differ(tensors: list[Tensor], shards: int) -> bool:
    hashes = gathered(digest(tensors))[::shards]
    return len(set(hashes)) > 1


def test_consensus_restores_after_an_exception() -> None:
    def worker() -> tuple[bool, bool, bool]:
        replicate, mesh = grid(2, 2)
        toy = Toy(mesh)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **RANDOM, **NEVER)
        for step in range(3):
            toy.set_gradients(step, replicate.get_local_rank())
            opt.step()
        before, inside = state_digest(opt), ""
        try:
            with opt.consensus():
                inside = digest(toy.params.values())
                raise KeyError("the evaluation failed")
        except KeyError:
            pass
        return state_digest(opt) == before, inside != digest(toy.params.values()), opt.diverged

    for restored, was_average, diverged in run_ranks(4, worker):
        assert restored, "an exception inside consensus() must not leave the averaged weights in place"
        assert was_average
        assert diverged


def test_consensus_is_for_evaluation_only() -> None:
    """What is done to the average would be lost on leaving, or leave replicas unequal that call themselves
    equal."""

    def worker() -> list[tuple[str, str]]:
        replicate, mesh = grid(2, 2)
        toy = Toy(mesh)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **RANDOM, **NEVER)
        saved = copy.deepcopy(opt.state_dict())
        for step in range(3):
            toy.set_gradients(step, replicate.get_local_rank())
            opt.step()
        before = state_digest(opt)
        with opt.consensus():
            actions = [
                opt.step,
                opt.synchronize,
                opt.broadcast_parameters,
                lambda: opt.load_state_dict(saved),
                lambda: opt.add_param_group({"params": [("new", nn.Parameter(torch.ones(4, 4)))]}),
            ]
            found = [outcome(action) for action in actions]
        assert state_digest(opt) == before, "a refused call must change nothing"
        assert opt.diverged
        return [*found, outcome(opt.step)]

    for *found, after in run_ranks(4, worker):
        for kind, message in found:
            assert kind == "RuntimeError", f"must be refused inside consensus(), got {kind}"
            assert "consensus()" in message
        assert after == ("ok", ""), "outside, the run goes on"


def test_ddp_style_replicas_through_a_process_group() -> None:
    """Plain tensors and a ProcessGroup, with two replicas out of four ranks each: a subgroup works too."""

    def worker() -> tuple[int, list[str]]:
        rank = dist.get_rank()
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        toy = Toy()
        opt = CurvaDion(toy.groups(), replicate_mesh=groups[rank // 2], max_local_steps=1, **RANDOM, **NEVER)
        for step in range(3):
            toy.set_gradients(step, rank)
            opt.step()
        return opt.replicas, gathered(digest(toy.params.values()))

    for replicas, hashes in run_ranks(4, worker):
        assert replicas == 2
        assert hashes[0] == hashes[1], "equal inside the first group"
        assert hashes[2] == hashes[3], "equal inside the second group"
        assert hashes[0] != hashes[2], "the groups know nothing of each other"


@pytest.fixture(scope="module", autouse=True)
def _no_group_in_the_parent() -> Iterator[None]:
    assert not dist.is_initialized(), "a process group in the parent would be inherited by the forked ranks"
    yield


# ---- backends that add up in another order in every group


@contextmanager
def in_another_order(first: int) -> Iterator[None]:
    """Let every group of this rank add floats up from rank `first` on, as NCCL may in one of its groups."""
    original = TorchGroup.all_reduce

    def all_reduce(group: TorchGroup, tensor: Tensor, op: Any, *, wait: bool = False) -> Any:
        if op != dist.ReduceOp.SUM or not tensor.is_floating_point() or group.size < 3:
            return original(group, tensor, op, wait=wait)
        parts = [torch.empty_like(tensor) for _ in range(group.size)]
        dist.all_gather(parts, tensor, group=group.group)
        tensor.zero_()
        for k in range(group.size):
            tensor += parts[(k + first) % group.size]
        return _Done()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchGroup, "all_reduce", all_reduce)
        yield


ORDER_CASES: list[dict[str, Any]] = [
    {"max_local_steps": 0},
    {"max_local_steps": 0, "right_factor": "qr"},
    {"max_local_steps": 1, "tau": math.inf, "local_update": "muon"},
]


@pytest.mark.parametrize("options", ORDER_CASES, ids=str)
def test_replicas_stay_equal_where_each_sums_its_shards_in_its_own_order(options: dict[str, Any]) -> None:
    """NCCL promises all ranks of one call the same bits, and not the same order in another communicator."""
    shapes = {"layers.0.weight": (40, 30), "layers.1.weight": (30, 50)}

    def worker() -> Any:
        replicate, mesh = grid(2, 3)
        with in_another_order(replicate.get_local_rank()):
            probe = torch.tensor([1.0, 1e8, -1e8][mesh.get_local_rank()])
            TorchGroup(mesh.get_group()).all_reduce(probe, dist.ReduceOp.SUM).wait()
            toy = Toy(mesh, matrices=shapes)
            opt = CurvaDion(toy.groups(), replicate_mesh=replicate, check_every=1, **RANDOM, **options)
            equal = []
            for step in range(6):
                toy.set_gradients(step, replicate.get_local_rank())
                opt.step()
                if opt.metrics()["curvadion/synchronized"]:
                    equal.append(digest(toy.params.values()))
            opt.synchronize()
            return float(probe), equal, state_digest(opt)

    results = run_ranks(6, worker)
    assert results[0][0] != results[3][0], "the replicas should add up in different orders"
    for shard in range(3):
        assert results[shard][1:] == results[shard + 3][1:], f"shard {shard} differs between the replicas"
    assert len(results[0][1]) >= 3


def test_all_ranks_of_a_replica_get_one_sum_where_groups_side_by_side_add_up_differently() -> None:
    """The gate's key has to be the same on all ranks of a replica, on a mesh of several axes too."""

    def worker() -> Any:
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("fsdp", "tp"))
        toy = Toy(mesh, placements={})
        with in_another_order(mesh.get_local_rank("fsdp")):
            shards = ShardMesh(list(toy.params.values()))
            exchange = Exchange(shards, None, torch.device("cpu"), Ledger())
            mine = torch.randn(1000, generator=torch.Generator().manual_seed(dist.get_rank()))
            return digest([exchange.sum_over_all_shards(mine, "norms")])

    assert len(set(run_ranks(6, worker))) == 1
