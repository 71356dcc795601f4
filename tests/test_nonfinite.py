"""Values that go wrong: NaN and Inf anywhere, zero and rank-deficient gradients, shapes that do not batch.

The first half is a promise about all ranks at once, so every case returns what each rank saw and the parent
compares.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import MATRICES, Shapes, Toy, digest, grid, local, outcome, state_digest, whole
from support.ranks import run_ranks
from torch import Tensor, nn

from curvadion import CurvaDion, NonFiniteError
from curvadion.sharding.group import ThreadGroup

BAD = {"nan": math.nan, "+inf": math.inf, "-inf": -math.inf}
OPTIONS: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "tau": math.inf, "max_local_steps": 2}
# Three rows on two shards and one row on two shards: the second leaves rank 1 and rank 3 with an empty shard.
SHAPES: Shapes = MATRICES | {"layers.3.weight": (3, 5), "layers.4.weight": (1, 4)}
PLACES = [
    (name, branch) for name in ("layers.0.weight", "embedding.weight") for branch in ("synchronized", "local")
]
PLACES += [("layers.3.weight", "local"), ("norm.weight", "synchronized")]


def bad_values(place: str, branch: str, complete: bool, first: int) -> list[tuple[int, str]]:
    """The rank that has the value, and its name in BAD: both vary, over all places. If not complete, one."""
    number = PLACES.index((place, branch))
    ranks = (0, 3, 0) if number % 2 else (3, 0, 3)
    chosen = (number + first) % 3
    return list(zip(ranks, BAD, strict=True))[slice(None) if complete else slice(chosen, chosen + 1)]


def poison(param: nn.Parameter, value: float, everywhere: bool = False) -> None:
    """Put `value` into this rank's shard of the gradient: one element, the last, or all of them."""
    assert param.grad is not None
    gradient = local(param.grad)
    if everywhere:
        gradient.fill_(value)
    else:
        gradient.view(-1)[-1] = value


@pytest.mark.parametrize(("place", "branch"), PLACES)
def test_raise_on_every_rank_in_the_same_step(place: str, branch: str, complete: bool) -> None:
    """By default every rank raises, parameters untouched, until a state dict is loaded."""
    bad_step = 3 if branch == "synchronized" else 2  # S L L S

    def one(where: int, value: float) -> Any:
        toy = Toy(shard, matrices=SHAPES)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **OPTIONS)
        saved, seen = copy.deepcopy(opt.state_dict()), []  # torch's state dicts alias the live state
        for step in range(bad_step + 1):
            toy.set_gradients(step, replica)
            if step == bad_step and dist.get_rank() == where:
                poison(toy.params[place], value)
            before = digest(toy.params.values())
            seen.append(outcome(opt.step))
        untouched = digest(toy.params.values()) == before
        toy.set_gradients(bad_step + 1, replica)  # good again
        again = [outcome(opt.step) for _ in range(2)]
        still_untouched = digest(toy.params.values()) == before
        opt.load_state_dict(saved)
        opt.broadcast_parameters()
        return seen, untouched and still_untouched, again, outcome(opt.step)

    replicate = shard = None
    replica = 0

    def worker() -> list[Any]:
        nonlocal replicate, shard, replica
        replicate, shard = grid(2, 2)
        replica = replicate.get_local_rank()
        return [one(where, BAD[name]) for where, name in cases]

    cases = bad_values(place, branch, complete, first=0)
    for rank, results in enumerate(run_ranks(4, worker)):
        for (where, name), (seen, untouched, again, healed) in zip(cases, results, strict=True):
            note = f"rank {rank}, {name} in {place} on rank {where}"
            assert [kind for kind, _ in seen[:-1]] == ["ok"] * bad_step, f"{note}: {seen}"
            assert seen[-1][0] == "NonFiniteError", (
                f"{note}: every rank must raise in this step, got {seen[-1]}"
            )
            assert untouched, f"{note}: the parameters must be untouched"
            for kind, message in again:
                assert kind in ("NonFiniteError", "RuntimeError"), (
                    f"{note}: later steps must raise, got {kind}"
                )
                assert "load_state_dict" in message, f"{note}: and say what to do: {message}"
            assert healed == ("ok", ""), f"{note}: after load_state_dict() the optimizer works again"


def test_the_error_says_what_to_do() -> None:
    toy = Toy()
    opt = CurvaDion(toy.groups(), lr=0.01)
    toy.set_gradients(0, 0)
    poison(toy.params["embedding.weight"], math.nan)
    with pytest.raises(NonFiniteError, match="load_state_dict") as first:
        opt.step()
    assert isinstance(first.value, RuntimeError)
    assert "embedding.weight" in str(first.value), "the rank that saw the value names the parameter"
    assert "skip" in str(first.value), "the alternative is named"


@pytest.mark.parametrize(("place", "branch"), PLACES)
def test_skip_leaves_everything_as_it_was(place: str, branch: str, complete: bool) -> None:
    """on_nonfinite="skip": the run goes on, bitwise, as if the bad step had never been asked for."""
    bad_step = 3 if branch == "synchronized" else 2

    def run(bad: tuple[int, float] | None) -> Any:
        toy = Toy(shard, matrices=SHAPES)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, on_nonfinite="skip", **OPTIONS)
        as_before = True
        for step in range(bad_step + 2):
            if step == bad_step and bad is not None:
                toy.set_gradients(99, replica)
                if dist.get_rank() == bad[0]:
                    poison(toy.params[place], bad[1], everywhere=bad[0] % 2 == 0)
                before = state_digest(opt)
                opt.step()
                as_before = state_digest(opt) == before
            toy.set_gradients(step, replica)
            opt.step()
        return as_before, state_digest(opt), opt.metrics()["curvadion/skipped_steps"]

    replicate = shard = None
    replica = 0

    def worker() -> list[Any]:
        nonlocal replicate, shard, replica
        replicate, shard = grid(2, 2)
        replica = replicate.get_local_rank()
        return [run(None)] + [run((where, BAD[name])) for where, name in cases]

    cases = bad_values(place, branch, complete, first=1)
    for rank, (clean, *results) in enumerate(run_ranks(4, worker)):
        assert clean[2] == 0.0
        for (where, name), (as_before, final, skipped) in zip(cases, results, strict=True):
            note = f"rank {rank}, {name} in {place} on rank {where}"
            assert as_before, f"{note}: parameters and state must be bitwise as before the skipped step"
            assert skipped == 1.0, f"{note}: the skipped step must be counted on every rank"
            assert final == clean[1], f"{note}: the run must go on as if the bad step had not happened"


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_the_first_step_may_be_the_bad_one(mode: str) -> None:
    def worker() -> Any:
        replicate, shard = grid(2, 2)
        toy = Toy(shard)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, on_nonfinite=mode, **OPTIONS)
        toy.set_gradients(0, replicate.get_local_rank())
        if dist.get_rank() == 2:
            poison(toy.params["layers.1.weight"], math.nan)
        before = state_digest(opt)
        first = outcome(opt.step)[0]
        unchanged = state_digest(opt) == before
        toy.set_gradients(1, replicate.get_local_rank())
        second = outcome(opt.step)[0]
        return first, unchanged, second, opt.metrics()["curvadion/synchronized"]

    for first, unchanged, second, synchronized in run_ranks(4, worker):
        if mode == "raise":
            assert first == "NonFiniteError"
            assert second != "ok", "and every later step raises"
        else:
            assert (first, unchanged, second) == ("ok", True, "ok")
            assert synchronized == 1.0, (
                "a skipped first step leaves no previous norm: the next one synchronizes"
            )


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_rank_that_cannot_do_its_part_stops_every_rank(on_nonfinite: str) -> None:
    """A sparse gradient on one rank: raising there before the gate would leave the others waiting for
    ever."""

    def worker() -> Any:
        replicate, shard = grid(2, 2)
        toy = Toy(shard)
        embedding = nn.Embedding(6, 3, sparse=True)
        nn.init.ones_(embedding.weight)
        groups = [*toy.groups(), {"params": [("sparse.weight", embedding.weight)], "algorithm": "adamw"}]
        opt = CurvaDion(groups, replicate_mesh=replicate, on_nonfinite=on_nonfinite, **OPTIONS)
        toy.set_gradients(0, replicate.get_local_rank())
        if dist.get_rank() == 3:
            embedding(torch.tensor([1])).sum().backward()
        before = digest(toy.params.values())
        return outcome(opt.step), digest(toy.params.values()) == before

    *others, (own, _) = run_ranks(4, worker)
    assert own[0] == "ValueError"
    assert "sparse.weight" in own[1]
    for (kind, _), untouched in others:
        assert kind == "RuntimeError", "every other rank raises in the same step"
        assert untouched


@pytest.mark.parametrize("value", [1e25, 3e38], ids=["squares-overflow", "near-the-largest-float"])
def test_a_finite_gradient_whose_norm_overflows_is_handled_alike_on_all_ranks(value: float) -> None:
    def worker() -> Any:
        replicate, shard = grid(2, 2)
        toy = Toy(shard)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **OPTIONS)
        toy.set_gradients(0, replicate.get_local_rank())
        opt.step()
        toy.set_gradients(1, replicate.get_local_rank())
        if dist.get_rank() == 1:
            poison(toy.params["layers.0.weight"], value, everywhere=True)
        kind = outcome(opt.step)[0]
        finite = all(bool(local(param).isfinite().all()) for param in toy.params.values())
        return kind, finite

    results = run_ranks(4, worker)
    assert len({kind for kind, _ in results}) == 1, f"the ranks must act alike, got {results}"
    assert results[0][0] in ("ok", "NonFiniteError")
    assert all(finite for _, finite in results), "the parameters must stay finite"


EXACT: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "max_local_steps": 0}
RTOL = 1e-9  # fp64 throughout, a handful of steps: only the order of the sums over shards differs


def degenerate(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """A gradient with a defect; the same on every mesh, since it is drawn for the whole matrix."""
    generator = torch.Generator().manual_seed(17 * step + len(shape) + shape[0])
    full = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name == "zero-shard":
        full[: shape[0] // 2] = 0.0
    elif name == "dead-rows":
        full[1::2] = 0.0
    elif name == "zero":
        full.zero_()
    elif name == "zero-at-first":
        full *= float(step > 1)
    elif name == "rank-one" and len(shape) == 2:
        full = full[:, :1] @ full[:1]
    elif name == "one-element":
        full = torch.zeros_like(full)
        full.view(-1)[-1] = 1.0
    elif name == "dead-columns" and len(shape) == 2:
        full[:, 1:] = 0.0
    return full


DEFECTS = ["zero-shard", "dead-rows", "zero", "zero-at-first", "rank-one", "one-element", "dead-columns"]


@pytest.mark.parametrize("shards", [2, 4])
def test_degenerate_gradients_give_the_same_result_on_any_number_of_shards(shards: int, quick: bool) -> None:
    shapes: Shapes = {"a": (8, 6), "b": (6, 10), "c": (12, 4)}

    def train(mesh: Any, defect: str, right_factor: str) -> tuple[dict[str, Tensor], bool]:
        toy = Toy(mesh, matrices=shapes, dtype=torch.float64)
        opt = CurvaDion(toy.groups(), rank_fraction=0.5, right_factor=right_factor, **EXACT)
        for step in range(5):
            for name, param in toy.params.items():
                param.grad = toy.place(name, degenerate(defect, tuple(param.shape), step))
            opt.step()
        for name in shapes:
            for key in ("momentum", "Q"):
                assert whole(opt.state[toy.params[name]][key]).isfinite().all(), f"{key} of {name}"
        norms = torch.stack([whole(opt.state[toy.params[name]]["Q"]).norm(dim=0).min() for name in shapes])
        return toy.whole(), bool((norms > 0.1).all())

    def worker() -> Any:
        mesh = grid(1, shards)[1]
        return [train(mesh, *case) for case in cases]

    cases = list(itertools.product(DEFECTS, ["column_norm", "qr"]))[: 2 if quick else None]
    alone = [train(None, *case) for case in cases]
    for rank, results in enumerate(run_ranks(shards, worker)):
        for case, (expected, alive), (actual, sharded_alive) in zip(cases, alone, results, strict=True):
            note = f"{case}, rank {rank}"
            assert alive and sharded_alive, f"{note}: no column of Q may die"
            for name, value in expected.items():
                torch.testing.assert_close(
                    actual[name],
                    value,
                    rtol=RTOL,
                    atol=1e-12,
                    msg=lambda text, n=name, note=note: f"{note}, {n}: {text}",
                )


def test_a_dead_projection_wakes_up() -> None:
    """A zero gradient for some steps must not freeze the matrix: the update has full size once gradients
    arrive."""
    toy = Toy(matrices={"a": (8, 6)}, dense={}, dtype=torch.float64)
    opt = CurvaDion(
        toy.groups(), lr=1.0, momentum=0.9, weight_decay=0.0, rank_fraction=0.5, max_local_steps=0
    )
    [param] = toy.params.values()
    for _ in range(3):
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        opt.step()
        assert torch.equal(param, before), "a zero momentum gives no update"
    before = param.detach().clone()
    param.grad = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    opt.step()
    update = (param.detach() - before) / math.sqrt(8 / 6)
    values = torch.linalg.svdvals(update)
    assert (values[:3] > 0.1).all(), f"three directions must be updated, singular values {values.tolist()}"
    assert (values[3:] < 1e-9).all(), "the update has rank r = 3"


def test_an_update_is_orthonormal_in_every_direction_it_uses() -> None:
    """P has orthonormal columns and Q unit columns, so ||update|| = lr sqrt(m r / n) however small G is."""
    for scale in (1e-12, 1.0, 1e12):
        toy = Toy(matrices={"a": (9, 4)}, dense={}, dtype=torch.float64)
        opt = CurvaDion(toy.groups(), lr=0.1, weight_decay=0.0, rank_fraction=1.0, max_local_steps=0)
        [param] = toy.params.values()
        before = param.detach().clone()
        toy.set_gradients(0, 0, scale=scale)
        opt.step()
        update = param.detach() - before
        expected = 0.1 * math.sqrt(9 / 4) * math.sqrt(4)
        torch.testing.assert_close(float(update.norm()), expected, rtol=1e-9, atol=0.0)


def test_a_missing_gradient_counts_as_zero() -> None:
    """Momentum, moments and weight decay still apply, on both branches, also for a parameter that never has
    one."""

    def train(missing: bool) -> list[dict[str, Tensor]]:
        toy = Toy(dtype=torch.float64)
        opt = CurvaDion(
            toy.groups(), lr=0.02, momentum=0.9, weight_decay=0.1, max_local_steps=1, tau=math.inf
        )
        trace = []
        for step in range(6):
            toy.set_gradients(step, 0)
            for name in ("layers.1.weight", "norm.weight", *(["embedding.weight"] if step == 2 else [])):
                toy.params[name].grad = None if missing else torch.zeros_like(toy.params[name])
            opt.step()
            trace.append(toy.whole())
        return trace

    start = Toy(dtype=torch.float64).whole()
    trace = train(missing=True)
    for step, (left, right) in enumerate(zip(trace, train(missing=False), strict=True)):
        for name in left:
            assert torch.equal(left[name], right[name]), f"step {step}, {name}: None must equal zeros"
    for name in ("layers.1.weight", "norm.weight"):
        decayed = start[name] * (1 - 0.02 * 0.1) ** 6
        torch.testing.assert_close(trace[-1][name], decayed, rtol=RTOL, atol=0.0)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("local_update", ["muon", "normuon", "dion2"])
def test_no_zero_makes_a_rule_divide_by_it(local_update: str, dtype: torch.dtype, eps: float) -> None:
    """Matrices without a gradient, with zeros, with rows and columns of zeros, and long after the last
    gradient."""
    shapes: Shapes = {
        "missing": (6, 4),
        "zero": (4, 6),
        "row": (6, 8),
        "column": (8, 6),
        "once": (5, 5),
        "tiny": (5, 3),
    }
    toy = Toy(matrices=shapes, dtype=dtype)
    opt = CurvaDion(
        toy.groups(),
        lr=0.01,
        momentum=0.1,
        tau=math.inf,
        local_update=local_update,
        betas=(0.9, 0.1),
        eps=eps,
    )
    start = toy.whole()
    for step in range(60):  # 0.1^60 is no float32 any more, and its square long before
        toy.set_gradients(step, 0)
        toy.params["missing"].grad = None
        toy.params["zero"].grad = torch.zeros_like(toy.params["zero"])
        for name, dim in (("row", 0), ("column", 1)):
            gradient = toy.params[name].grad
            assert gradient is not None
            gradient.select(dim, 1).mul_(float(step == 0))
        if step:
            toy.params["once"].grad = None
        toy.params["tiny"].grad = 1e-30 * torch.ones_like(toy.params["tiny"])
        opt.step()
    for name, param in toy.params.items():
        for key, value in {**opt.state[param], "parameter": param}.items():
            assert value.isfinite().all(), f"{key} of {name}"
    for name in ("missing", "zero"):
        decayed = start[name].float() * (1 - 0.01 * 0.01) ** 60
        torch.testing.assert_close(
            toy.params[name].detach().float(), decayed, rtol=0.03, atol=0.03, msg=f"{name} moved"
        )


def test_a_gradient_missing_on_one_replica_alone() -> None:
    """Replica 1 has no gradient at all: the same order of collectives, and the mean counts it as zero."""

    def worker() -> Any:
        def train(missing: bool) -> str:
            toy = Toy(shard)
            opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **OPTIONS)
            for step in range(5):
                toy.set_gradients(step, replica)
                for param in toy.params.values():
                    if replica == 1 and step in (0, 2, 3):
                        param.grad = None if missing else torch.zeros_like(param)
                opt.step()
            return state_digest(opt)

        replicate, shard = grid(2, 2)
        replica = replicate.get_local_rank()
        return train(missing=True) == train(missing=False)

    assert run_ranks(4, worker) == [True] * 4


def test_many_shapes_and_groups() -> None:
    """Seven distinct shapes, two of them twice, 1 x n and n x 1 among them: batching by shape must not mix
    them up."""
    shapes: Shapes = {
        "a": (8, 6),
        "b": (6, 8),
        "c": (5, 5),
        "d": (1, 7),
        "e": (7, 1),
        "f": (12, 3),
        "g": (8, 6),
        "h": (5, 5),
        "i": (16, 16),
    }
    together = Toy(matrices=shapes, dtype=torch.float64)
    opt = CurvaDion(together.groups(), **EXACT)
    for step in range(4):
        together.set_gradients(step, 0)
        opt.step()
    for index, name in enumerate(shapes):
        alone = nn.Parameter(Toy(matrices=shapes, dtype=torch.float64).params[name].detach().clone())
        single = CurvaDion([(name, alone)], **EXACT)
        for step in range(4):
            generator = torch.Generator().manual_seed(1_000_003 * step + index)
            alone.grad = torch.randn(alone.shape, generator=generator, dtype=torch.float64)
            single.step()
        torch.testing.assert_close(
            together.params[name], alone, rtol=RTOL, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_betas_and_learning_rates_of_a_group_are_used() -> None:
    """Each AdamW group against torch.optim.AdamW with that group's values."""
    settings = [
        {"betas": (0.5, 0.6), "lr": 0.1, "weight_decay": 0.0, "eps": 1e-3},
        {"betas": (0.9, 0.99), "lr": 0.01, "weight_decay": 0.2, "eps": 1e-8},
    ]
    ours = [nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64)) for _ in settings]
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]
    opt = CurvaDion([{"params": [p], "algorithm": "adamw", **s} for p, s in zip(ours, settings, strict=True)])
    reference = torch.optim.AdamW([{"params": [p], **s} for p, s in zip(theirs, settings, strict=True)])
    for step in range(5):
        for param in (*ours, *theirs):
            param.grad = torch.sin(torch.arange(6, dtype=torch.float64) + step)
        opt.step()
        reference.step()
    for setting, mine, expected in zip(settings, ours, theirs, strict=True):
        torch.testing.assert_close(
            mine, expected, rtol=RTOL, atol=1e-12, msg=lambda text, s=setting: f"{s}: {text}"
        )


def test_matrix_options_of_a_group_are_used() -> None:
    """momentum, weight_decay, rank_fraction and lr per group equal separate optimizers with those values."""
    settings: list[dict[str, Any]] = [
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0, "rank_fraction": 1.0, "right_factor": "qr"},
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.3, "rank_fraction": 0.3, "error_feedback": False},
        {"lr": 0.02, "momentum": 0.0, "weight_decay": 0.1, "rank_fraction": 0.3, "rank_multiple_of": 3},
    ]
    toys = [Toy(matrices={f"m{i}": (8, 6)}, dense={}, dtype=torch.float64) for i in range(len(settings))]
    alone = [Toy(matrices={f"m{i}": (8, 6)}, dense={}, dtype=torch.float64) for i in range(len(settings))]
    opt = CurvaDion(
        [group | setting for toy, setting in zip(toys, settings, strict=True) for group in toy.groups()],
        max_local_steps=0,
    )
    singles = [
        CurvaDion(toy.groups(), max_local_steps=0, **s) for toy, s in zip(alone, settings, strict=True)
    ]
    for step in range(4):
        for toy in (*toys, *alone):
            toy.set_gradients(step, 0)
        for optimizer in (opt, *singles):
            optimizer.step()
    for setting, toy, single in zip(settings, toys, alone, strict=True):
        for name in toy.params:
            torch.testing.assert_close(
                toy.params[name],
                single.params[name],
                rtol=RTOL,
                atol=1e-12,
                msg=lambda text, s=setting: f"{s}: {text}",
            )
    ranks = [opt.state[param]["Q"].shape[1] for toy in toys for param in toy.params.values()]
    assert ranks == [6, 2, 3], (
        "r = round_up(rank_fraction * min(m, n), rank_multiple_of), clipped to min(m, n)"
    )


@pytest.mark.parametrize("fragments", [None, 1, 3])
def test_dense_shapes_are_any(fragments: int | None) -> None:
    """AdamW and Lion take scalars, vectors and higher dimensions, empty ones too."""
    params = [nn.Parameter(torch.ones(shape)) for shape in ((), (3,), (2, 3, 4), (0,), (2, 0, 3))]
    options = {} if fragments is None else {"consensus": "outer", "outer_fragments": fragments}
    for algorithm in ("adamw", "lion"):
        opt = CurvaDion([{"params": params, "algorithm": algorithm}], lr=0.1, **options)
        for param in params:
            param.grad = torch.ones_like(param)
        before = [param.detach().clone() for param in params]
        opt.step()
        assert all((b > p).all() for b, p in zip(before, params, strict=True)), f"{algorithm} must descend"


# Steps 0 and 4 are synchronized, and on 1 to 3 nothing crosses replicas, so nobody else can know.
SELDOM: dict[str, Any] = {"lr": 0.01, "tau": math.inf, "max_local_steps": 3, "gate_every": 4}


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("place", ["layers.0.weight", "embedding.weight"])
def test_what_happens_between_two_gates_is_told_at_the_next(place: str, on_nonfinite: str) -> None:
    def worker() -> Any:
        replicate, shard = grid(2, 2)
        toy = Toy(shard)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, on_nonfinite=on_nonfinite, **SELDOM)
        seen, digests, sent = [], [], []
        for step in range(5):
            toy.set_gradients(step, replicate.get_local_rank())
            if step == 2 and dist.get_rank() == 3:
                poison(toy.params[place], math.nan)
            seen.append(outcome(opt.step)[0])
            digests.append(digest(toy.params.values()))
            sent.append(sum(n for (axis, _), n in opt.ledger.last_step.items() if axis == "replicate"))
        return seen, digests, sent, opt.metrics()["curvadion/step"], opt.metrics()["curvadion/skipped_steps"]

    for rank, (seen, digests, sent, steps, skipped) in enumerate(run_ranks(4, worker)):
        assert seen[:4] == ["ok"] * 4 and sent[1:4] == [0, 0, 0], f"rank {rank}: {seen}, {sent}"
        here = rank >= 2
        if on_nonfinite == "raise":
            assert seen[4] == "NonFiniteError", f"rank {rank}: {seen}"
            assert (digests[1] == digests[3]) == here, (
                "the replica that saw it stands still, the other does not know"
            )
            assert digests[4] == digests[3]
        else:
            assert seen[4] == "ok" and steps == 5 and skipped == here, (
                "the others need not know of a step that one replica skips"
            )
            assert (digests[1] == digests[2]) == here
            assert digests[3] != digests[2]


@pytest.mark.parametrize("place", ["layers.0.weight", "embedding.weight"])
def test_what_happens_between_two_gates_is_told_before_a_checkpoint(place: str) -> None:
    def worker() -> Any:
        replicate, shard = grid(2, 2)
        toy = Toy(shard)
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **SELDOM)
        for step in range(3):
            toy.set_gradients(step, replicate.get_local_rank())
            if step == 2 and dist.get_rank() == 3:
                poison(toy.params[place], math.nan)
            opt.step()
        return outcome(opt.synchronize)

    for kind, _ in run_ranks(4, worker):
        assert kind == "NonFiniteError", "a stale replica must not get into a checkpoint"


@pytest.mark.parametrize("replicas", [1, 2])
def test_after_a_failure_between_two_gates_skipping_goes_on(replicas: int) -> None:
    """One replica has nobody to wait for, and says it at once."""

    def worker() -> Any:
        replicate, _ = grid(replicas, 1)
        W, b = nn.Parameter(torch.ones(3, 2)), nn.Embedding(4, 2, sparse=True)
        nn.init.ones_(b.weight)
        opt = CurvaDion(
            [{"params": [W]}, {"params": [b.weight], "algorithm": "adamw"}],
            replicate_mesh=replicate,
            on_nonfinite="skip",
            **SELDOM,
        )
        seen = []
        for step in range(6):
            W.grad, b.weight.grad = torch.ones(3, 2), None
            if step == 1:
                b(torch.tensor([1])).sum().backward()
            seen.append(outcome(opt.step)[0])
        return seen

    at_once, told = ["ok", "ValueError", "ok", "ok", "ok", "ok"], ["ok", "ok", "ok", "ok", "ValueError", "ok"]
    assert run_ranks(replicas, worker) == [at_once if replicas == 1 else told] * replicas


def test_a_failure_between_two_gates_stops_every_rank_at_the_next() -> None:
    def worker() -> Any:
        replicate, shard = grid(2, 2)
        toy = Toy(shard)
        embedding = nn.Embedding(6, 3, sparse=True)
        nn.init.ones_(embedding.weight)
        opt = CurvaDion(
            [*toy.groups(), {"params": [("sparse.weight", embedding.weight)], "algorithm": "adamw"}],
            replicate_mesh=replicate,
            **SELDOM,
        )
        seen = []
        for step in range(5):
            toy.set_gradients(step, replicate.get_local_rank())
            embedding.weight.grad = None
            if step == 1 and dist.get_rank() == 3:
                embedding(torch.tensor([1])).sum().backward()
            seen.append(outcome(opt.step))
        return seen

    for rank, seen in enumerate(run_ranks(4, worker)):
        assert [kind for kind, _ in seen[:4]] == ["ok"] * 4, f"rank {rank}: {seen}"
        assert seen[4][0] == ("ValueError" if rank == 3 else "RuntimeError")
        assert rank != 3 or "sparse.weight" in seen[4][1]


@pytest.mark.parametrize("trouble", ["nan", "failure"])
def test_a_replica_that_stands_still_lets_through_what_is_under_way(trouble: str) -> None:
    """The second leg is due in the very step that one replica does not take."""

    def worker() -> Any:
        replicate, shard = grid(2, 2)
        toy = Toy(shard)
        opt = CurvaDion(
            toy.groups(),
            replicate_mesh=replicate,
            **SELDOM,
            local_update="muon",
            consensus="outer",
            outer_bits=1,
            outer_delay=3,
        )
        seen = []
        for step in range(5):
            toy.set_gradients(step, replicate.get_local_rank())
            if step == 2 and dist.get_rank() == 3:
                if trouble == "nan":
                    poison(toy.params["layers.0.weight"], math.nan)
                else:
                    opt.param_groups[0]["lr"] = -1.0
            seen.append(outcome(opt.step)[0])
        return seen

    for rank, seen in enumerate(run_ranks(4, worker, deadline=60)):
        here = "ValueError" if rank == 3 else "RuntimeError"
        assert seen == ["ok"] * 4 + ["NonFiniteError" if trouble == "nan" else here], f"rank {rank}"


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("trouble", ["nan", "failure"])
def test_with_a_lag_the_others_know_one_step_later(trouble: str, on_nonfinite: str) -> None:
    def worker() -> Any:
        replicate, shard = grid(2, 2)
        toy = Toy(shard)
        opt = CurvaDion(
            toy.groups(),
            replicate_mesh=replicate,
            lr=0.01,
            tau=math.inf,
            gate_lag=1,
            on_nonfinite=on_nonfinite,
        )
        seen, digests = [], []
        for step in range(5):
            toy.set_gradients(step, replicate.get_local_rank())
            lr = 0.01
            if step == 2 and dist.get_rank() == 3:
                if trouble == "nan":
                    poison(toy.params["layers.0.weight"], math.nan)
                else:
                    lr = -1.0
            opt.param_groups[0]["lr"] = lr
            seen.append(outcome(opt.step)[0])
            digests.append(digest(toy.params.values()))
        return seen, digests

    for rank, (seen, digests) in enumerate(run_ranks(4, worker, deadline=60)):
        there = rank >= 2  # in the replica where it happens
        told = {"nan": "NonFiniteError", "failure": "ValueError" if rank == 3 else "RuntimeError"}[trouble]
        if trouble == "nan" and on_nonfinite == "skip":
            assert seen == ["ok"] * 5, f"rank {rank}: {seen}"
        else:
            assert seen[:4] == ["ok", "ok", "ok", told], f"rank {rank}: {seen}"
            assert seen[4] == ("ok" if on_nonfinite == "skip" else "RuntimeError"), f"rank {rank}: {seen}"
        assert (digests[2] == digests[1]) == there, (
            "the replica that saw it stands still, the other does not know"
        )


@pytest.mark.parametrize("seldom", [{"gate_every": 2}, {"gate_lag": 1}], ids=str)
def test_a_replica_that_skipped_a_local_dion_step_takes_part_in_the_next_synchronization(
    seldom: dict[str, int],
) -> None:
    def worker() -> Any:
        replicate, shard = grid(2, 2)
        toy = Toy(shard)
        options = {
            "lr": 0.01,
            "tau": math.inf,
            "max_local_steps": 1,
            "local_update": "dion",
            "on_nonfinite": "skip",
        }
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **options, **seldom)
        for step in range(4):
            toy.set_gradients(step, replicate.get_local_rank())
            if step == 1 and dist.get_rank() == 3:
                poison(toy.params["layers.0.weight"], math.nan)
            opt.step()
        opt.synchronize()
        return digest(toy.params.values())

    digests = run_ranks(4, worker, deadline=60)
    assert digests[:2] == digests[2:], "replicas must be equal"


def test_with_a_lag_a_skipped_step_changes_nothing_of_the_gate() -> None:
    """tau goes on as in the other replicas, and what they say is not lost because one of them has a NaN."""

    def worker() -> Any:
        replicate, _ = grid(2, 1)
        W = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
        opt = CurvaDion(
            [("W", W)],
            lr=0.01,
            momentum=0.0,
            error_feedback=False,
            replicate_mesh=replicate,
            on_nonfinite="skip",
            tau=0.5,
            target_sync_rate=0.3,
            gate_lag=1,
            check_every=1,
        )
        seen = []
        for step in range(6):
            W.grad = torch.full_like(W, 100.0 if step == 3 and dist.get_rank() == 0 else 1.0)
            if step == 3 and dist.get_rank() == 1:
                W.grad[0, 0] = math.nan
            opt.step()
            seen.append((bool(opt.metrics()["curvadion/synchronized"]), opt.param_groups[0]["tau"]))
        return seen

    left, right = run_ranks(2, worker)
    assert left == right and [synchronized for synchronized, _ in left] == [
        True,
        False,
        False,
        False,
        True,
        False,
    ]


def test_all_that_is_under_way_goes_on_where_a_replica_has_failed() -> None:
    def worker() -> Any:
        replicate, _ = grid(2, 1)
        toy = Toy()
        options = {**SELDOM, "max_local_steps": 1, "gate_every": 2, "check_every": 0}
        outer = {
            "local_update": "muon",
            "consensus": "outer",
            "outer_bits": 4,
            "outer_delay": 5,
            "outer_fragments": 3,
        }
        opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **options, **outer)
        for step in range(7):
            toy.set_gradients(step, replicate.get_local_rank())
            if step == 5 and dist.get_rank() == 1:  # one arrives now, another has its second leg
                for p in toy.params.values():
                    p.data = p.data[:2].clone()
            kind, _ = outcome(opt.step)
        return step, kind

    assert run_ranks(2, worker, deadline=60) == [(6, "RuntimeError")] * 2


@pytest.mark.parametrize("seldom", [{"gate_every": 4}, {"gate_lag": 1}], ids=str)
def test_one_replica_does_not_wait_to_say_what_is_wrong(seldom: dict[str, int]) -> None:
    W = nn.Parameter(torch.ones(4, 3))
    opt = CurvaDion([W], tau=0.5, **seldom)
    for norm in (1.0, 100.0):
        W.grad = torch.full_like(W, norm)
        opt.step()
    opt.state_dict()
    W.grad = torch.full_like(W, math.nan)
    with pytest.raises(NonFiniteError):
        opt.step()


@pytest.mark.parametrize("interrupted", ["skip", "synchronize", "load"])
def test_an_answer_outlives_a_skipped_step_and_nothing_else(interrupted: str) -> None:
    def worker() -> Any:
        replicate, _ = grid(2, 1)
        W = nn.Parameter(torch.ones(4, 3))
        opt = CurvaDion(
            [("W", W)],
            replicate_mesh=replicate,
            momentum=0.0,
            error_feedback=False,
            on_nonfinite="skip",
            tau=0.5,
            gate_lag=1,
        )
        seen = []
        opt.synchronize()
        saved = copy.deepcopy(opt.state_dict())
        for step, norm in enumerate((1.0, 100.0, 100.0)):
            if step == 2 and interrupted == "synchronize":
                opt.synchronize()
            elif step == 2 and interrupted == "load":
                opt.discard_divergence()
                opt.load_state_dict(saved)
            elif step == 2:
                W.grad = torch.full_like(W, math.nan)
                opt.step()
            W.grad = torch.full_like(W, norm)
            opt.step()
            seen.append(bool(opt.metrics()["curvadion/synchronized"]))
        return seen

    first = interrupted == "load"  # the first step after the beginning is always synchronized
    expected = {
        "skip": [True, False, True],
        "synchronize": [True, False, False],
        "load": [True, False, first],
    }
    for seen in run_ranks(2, worker):
        assert seen == expected[interrupted]


def run_bogus_rule() -> tuple[list[str], str]:
    """An option that breaks its rule on one rank, in a step that asks nobody."""
    toy = Toy()
    opt = CurvaDion(toy.groups(), replicate_mesh=dist.group.WORLD, gate_every=3, tau=math.inf)
    outcomes = []
    for step in range(4):
        if step == 1 and dist.get_rank() == 1:
            opt.param_groups[0]["local_update"] = "bogus"
        toy.set_gradients(step, dist.get_rank())
        outcomes.append(outcome(opt.step)[0])
        if outcomes[-1] != "ok":
            break
    return outcomes, outcomes[-1]


def test_a_rule_that_does_not_exist_is_told_when_the_gate_asks_next() -> None:
    (others, error), (own, cause) = run_ranks(2, run_bogus_rule)
    assert len(others) == len(own) == 4, "both ranks raise in the same step"
    assert (error, cause) == ("RuntimeError", "ValueError")


def run_broadcast() -> str:
    toy = Toy()
    opt = CurvaDion(toy.groups(), replicate_mesh=dist.group.WORLD, consensus="outer", max_local_steps=0)
    for step in range(3):
        toy.set_gradients(step, dist.get_rank())
        opt.step()
    opt.broadcast_parameters()
    opt.synchronize()
    return state_digest(opt)


def test_moments_are_common_after_a_broadcast_and_synchronize() -> None:
    left, right = run_ranks(2, run_broadcast)
    assert left == right


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_synchronize_does_not_spread_a_nan_among_the_parameters(on_nonfinite: str) -> None:
    """There is nothing to skip there: the mean would be NaN in all replicas, and the next checkpoint too."""

    def replica(group: ThreadGroup) -> tuple[str, bool]:
        weight = nn.Parameter(torch.ones(8, 8))
        options: dict[str, Any] = {"tau": math.inf, "max_local_steps": 9, "on_nonfinite": on_nonfinite}
        # Triton's interpreter is not made for threads.
        opt = CurvaDion([weight], replicate_mesh=group, kernels="reference", **options)
        for step in range(2):
            weight.grad = torch.eye(8) * (1 + step + group.rank)
            opt.step()
        if group.rank == 1:
            weight.data[0, 0] = math.nan
        return outcome(opt.synchronize)[0], bool(weight.isfinite().all())

    assert ThreadGroup.run(2, replica) == [("NonFiniteError", True), ("NonFiniteError", False)]
