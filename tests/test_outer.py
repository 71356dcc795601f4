"""consensus="outer": what crosses replicas in few bits, what rounding keeps back, and that nothing gets lost
on the way."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cases import (
    RTOL,
    SCALES,
    Case,
    gradients,
    initial_values,
    make_optimizer,
    rounded_case,
    run_case,
    trajectory,
)
from support.layouts import LAYOUTS, Layout, local, whole
from support.models import digest
from support.ranks import run_ranks
from support.reference import muon, rounded
from support.wire import Wire, run_recorded
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from curvadion import LOW_COMMUNICATION, CurvaDion
from curvadion.algebra.newton_schulz import newton_schulz
from curvadion.consensus.codec import CODECS, Grid, Sign
from curvadion.consensus.fragments import parts_of
from curvadion.sharding import flat, journey
from curvadion.sharding.group import ThreadGroup
from curvadion.sharding.journey import Arrival, UnderWay, round_, unrounded
from curvadion.sharding.ledger import WIRE
from curvadion.state.table import Table

BLOCK = Grid.block

BITS = [1, 2, 4, 8, 16]
OUTER: Mapping[str, object] = {
    "consensus": "outer",
    "local_update": "muon",
    "max_local_steps": 2,
    "tau": math.inf,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the payload


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_payload_decodes_to_the_nearest_level(bits: int, dtype: torch.dtype) -> None:
    x = (draw(7 * BLOCK) * torch.logspace(-20, 10, 7, dtype=torch.float64).repeat_interleave(BLOCK)).to(dtype)
    sent = CODECS[bits].encode(x)
    assert sent.dtype == torch.uint8 and sent.numel() == int(x.numel() * CODECS[bits].bits_per_value / 8)
    torch.testing.assert_close(
        CODECS[bits].decode(sent, dtype),
        rounded(x, bits),
        rtol=1e-6 if dtype == torch.float32 else 1e-12,
        atol=0,
    )


@pytest.mark.parametrize(("bits", "per_value"), [(1, 1.125), (2, 2.125), (4, 4.125), (8, 8.125), (16, 16.0)])
def test_a_payload_is_as_small_as_it_says(bits: int, per_value: float) -> None:
    assert 8 * CODECS[bits].encode(draw(10 * BLOCK)).numel() == per_value * 10 * BLOCK


@pytest.mark.parametrize("bits", BITS[:-1])
def test_every_code_survives_the_packing(bits: int) -> None:
    """Values that lie on the levels come back exactly: all codes, in every place of a byte."""
    levels = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    codes = torch.cat([levels.roll(shift) for shift in range(8)]).repeat(BLOCK // 8 // min(2**bits, 16) + 1)
    x = codes[: len(codes) // BLOCK * BLOCK] if len(codes) >= BLOCK else codes.repeat(BLOCK)[:BLOCK]
    payload = CODECS[bits].encode(x)
    step = (
        1.0 if bits > 2 else float(payload[:2].view(torch.bfloat16))
    )  # 1 and 2 bits take theirs from the block's statistics
    if bits > 2:
        payload.view(-1, int(BLOCK * CODECS[bits].bits_per_value / 8))[:, :2] = torch.tensor(
            [1.0], dtype=torch.bfloat16
        ).view(torch.uint8)
        expected = x
        encoded_with = x.view(-1, BLOCK).abs().amax(-1, keepdim=True) * 2 / 2**bits
        expected = (
            ((x.view(-1, BLOCK) / encoded_with).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) + 0.5
        ).view(-1)
    else:
        expected = step * ((x / step).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5)
    assert torch.equal(CODECS[bits].decode(payload, torch.float64), expected)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_has_no_preferred_sign_and_shrinks_what_is_left(bits: int) -> None:
    x = draw(200 * BLOCK)
    codec = CODECS[bits]
    y, mirrored = codec.decode(codec.encode(x), x.dtype), codec.decode(codec.encode(-x), x.dtype)
    assert torch.equal(y, -mirrored)
    assert abs(float((y - x).mean())) < 4 * float((y - x).std()) / math.sqrt(len(x)), "a bias"
    assert float((x - y).norm()) < {1: 0.61, 2: 0.36, 4: 0.12, 8: 0.01, 16: 0.003}[bits] * float(x.norm())


@pytest.mark.parametrize("bits", BITS)
def test_rounding_in_chunks_changes_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, codec = draw(7 * BLOCK), CODECS[bits]
    assert codec is not None
    payload = codec.encode(x)
    values = codec.decode(payload, x.dtype)
    monkeypatch.setattr(journey, "CHUNK", 3 * BLOCK)
    residual, short = x.clone(), x[: 5 * BLOCK + 9].clone()
    residual[: len(short)] -= short  # is zero
    assert torch.equal(round_(codec, residual, short), payload)
    assert torch.equal(residual, x - values)
    assert torch.equal(unrounded(codec, payload, len(x), x.dtype), values)
    sent = torch.cat([payload, codec.encode(-2 * x), codec.encode(4 * x)])
    torch.testing.assert_close(unrounded(codec, sent, len(x), x.dtype, 3), values, rtol=1e-14, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_are_exact_and_what_is_not_finite_stays_so(bits: int) -> None:
    x = torch.zeros(3 * BLOCK)
    x[5], x[BLOCK + 5] = math.nan, math.inf
    y = CODECS[bits].decode(CODECS[bits].encode(x))
    assert not y[5].isfinite() and not y[BLOCK + 5].isfinite()
    assert not y[2 * BLOCK :].any()


# ---- Muon


@pytest.mark.parametrize("shape", [(12, 5), (8, 8), (40, 3)])
def test_newton_schulz_is_a_function_of_singular_values(shape: tuple[int, int]) -> None:
    M = torch.stack(
        [
            draw(*shape),
            draw(*shape, seed=1) * 1e-20,
            draw(shape[0], 2) @ draw(2, shape[1]),
            torch.zeros(shape),
        ]
    )
    [O] = newton_schulz([M])  # noqa: E741
    for got, m in zip(O, M, strict=True):
        torch.testing.assert_close(got, muon(m), rtol=1e-9, atol=1e-9)
    assert float(torch.linalg.svdvals(O[0]).min()) > 0.6 and float(torch.linalg.svdvals(O[0]).max()) < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)], ids=str)
def test_newton_schulz_forgets_size_at_every_size(shape: tuple[int, int], dtype: torch.dtype) -> None:
    M = draw(*shape, seed=6)
    expected = muon(M)
    for exponent in range(-44, 39):
        scaled = (M * (10.0**exponent / M.abs().max())).to(dtype)
        tall = scaled if shape[0] >= shape[1] else scaled.mT
        result = newton_schulz([tall.unsqueeze(0)])[0][0]
        got = (result if shape[0] >= shape[1] else result.mT).double()
        assert bool(got.isfinite().all()), f"1e{exponent}"
        if exponent < -39:
            assert float(got.abs().max()) < 1e-30, "no direction left"
        elif exponent > -37:  # in between, float32 has fewer digits for the entries than for the norm
            torch.testing.assert_close(
                got, expected, rtol=0, atol=2e-3, msg=lambda text, e=exponent: f"1e{e}: {text}"
            )


def test_a_matrix_without_gradients_never_becomes_nan() -> None:
    """Its momentum decays through every size down to zero."""
    W, other = nn.Parameter(draw(16, 16, seed=1).float()), nn.Parameter(draw(16, 16, seed=2).float())
    opt = CurvaDion([W, other], **LOW_COMMUNICATION)
    for step in range(520):
        W.grad = draw(16, 16, seed=step).float() if step < 3 else None
        other.grad = draw(16, 16, seed=step + 1).float()
        opt.step()
        assert bool(W.isfinite().all()), f"{step - 2} steps after its last gradient"
    assert float(opt.state[W]["momentum"].norm()) < 1e-38, "through every size"


def test_newton_schulz_in_float32_is_accurate_to_its_rounding() -> None:
    M = (
        torch.linalg.qr(draw(64, 48))[0]
        @ torch.diag(torch.logspace(0, -6, 48, dtype=torch.float64))
        @ torch.linalg.qr(draw(48, 48))[0]
    )
    [O] = newton_schulz([M.float().unsqueeze(0)])  # noqa: E741
    torch.testing.assert_close(O[0].double(), muon(M), rtol=0, atol=2e-3)


# ---- between replicas


ROUNDED = [
    rounded_case(bits, delay) for bits, delay in [*((bits, 0) for bits in BITS), (1, 1), (1, 2), (4, 5)]
]
ROUNDED_AND_KEPT = [
    rounded_case(bits, delay, fragments, kept)
    for bits, fragments, delay, kept in [
        *((1, 1, 0, 0.5), (1, 1, 0, 1.0), (4, 1, 0, 0.25), (2, 3, 0, 0.5)),
        *((1, 1, 1, 0.5), (1, 1, 2, 1.0), (4, 2, 5, 0.5)),
    ]
]


def run_rounded(replicas: int, cases: list[Case]) -> list[str]:
    placed = LAYOUTS[0].build(initial_values(), replicas)
    parts = [placed.parts_of(G[placed.replica]) for G in gradients(replicas)]
    return [problem for case in cases for problem in run_case(placed, parts, case, replicas)]


@pytest.mark.parametrize("cases", [ROUNDED, ROUNDED_AND_KEPT], ids=["rounded", "and kept"])
@pytest.mark.parametrize("replicas", [2, 3])
def test_rounded_pseudo_gradients_are_those_of_the_reference(
    replicas: int, cases: list[Case], complete: bool
) -> None:
    assert RTOL < 1e-8
    cases = cases if complete or replicas == 2 else cases[::2]
    for case in cases:
        trajectory(case, replicas)  # here, not in every forked rank
    problems = [line for of_rank in run_ranks(replicas, run_rounded, replicas, cases) for line in of_rank]
    assert not problems, "\n".join(problems[:20])


def run_conserved(layout: Layout, bits: int, fragments: int, delay: int, kept: float) -> None:
    """Without weight decay the updates depend on prescribed gradients alone, so where replicas end shows what
    got lost."""
    ends = {}
    for b in (32, bits):
        placed = layout.build(initial_values(), 2)
        parts = {"outer_bits": b, "outer_fragments": fragments, "outer_delay": delay}
        if b < 32:
            parts["outer_residual_kept"] = kept
        optimizer = make_optimizer(placed, Case("conserved", {**OUTER, **parts, "weight_decay": 0.0}))
        for step, G in enumerate(gradients(2)):
            placed.set_gradients(placed.parts_of(G[placed.replica]))
            optimizer.step()
            if optimizer.metrics()["curvadion/synchronized"] and not optimizer._consensus.leaves_apart:
                own = torch.cat([local(p).flatten() for p in placed.bag.parameters()])
                first = own.clone()
                torch.distributed.broadcast(first, group=optimizer._peers.group, group_src=0)
                assert torch.equal(first, own), f"replicas differ after synchronized step {step}"
        before = {name: whole(p).clone() for name, p in placed.bag.named_parameters()}
        optimizer.synchronize()
        ends[b] = before, {name: whole(p).clone() for name, p in placed.bag.named_parameters()}
    for name, exact in ends[32][1].items():
        torch.testing.assert_close(
            ends[bits][1][name], exact, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert any(not torch.allclose(ends[bits][0][n], ends[32][0][n]) for n in ends[32][0]), (
        "nothing was rounded"
    )


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.world_size(2) <= 4], ids=str)
def test_what_rounding_keeps_back_is_sent_later(layout: Layout) -> None:
    run_ranks(layout.world_size(2), run_conserved, layout, 1, 1, 0, 0.0)


@pytest.mark.sample
@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if layout.name in ("plain_group", "fsdp2")], ids=str
)
@pytest.mark.parametrize(
    ("fragments", "delay", "kept"), [(3, 0, 0.0), (1, 2, 0.0), (3, 4, 0.0), (1, 0, 0.5), (3, 2, 1.0)]
)
def test_fragments_delays_and_kept_residuals_lose_nothing_either(
    layout: Layout, fragments: int, delay: int, kept: float
) -> None:
    run_ranks(layout.world_size(2), run_conserved, layout, 4, fragments, delay, kept)


def run_fragments(layout: Layout, count: int) -> list[tuple[float, int, int]]:
    """By synchronized step: the share of elements that are equal in both replicas, the bytes, and this rank's
    elements."""
    placed = layout.build(initial_values(), 2)
    options = {**OUTER, "max_local_steps": 0, "outer_fragments": count}
    optimizer = make_optimizer(placed, Case("fragments", options))
    trace, group = [], optimizer._peers.group
    for step in range(2 * count):
        placed.set_gradients(placed.parts_of(gradients(2)[step % len(SCALES)][placed.replica]))
        optimizer.step()
        mine = torch.cat([local(p).detach().flatten() for p in placed.bag.parameters()])
        theirs = mine.clone()
        torch.distributed.broadcast(theirs, group=group, group_src=0)
        equal = torch.tensor(float((theirs == mine).double().mean()))
        torch.distributed.broadcast(equal, group=group, group_src=1)
        trace.append(
            (float(equal), optimizer.ledger.last_step["replicate", "pseudo_gradients"], mine.numel())
        )
    return trace


@pytest.mark.sample
@pytest.mark.parametrize(
    "layout",
    [layout for layout in LAYOUTS if layout.name in ("plain_group", "fsdp2", "tp2_rowwise")],
    ids=str,
)
@pytest.mark.parametrize("count", [2, 4, 7])
def test_fragments_take_turns_and_share_the_bytes(layout: Layout, count: int) -> None:
    parameters = len(initial_values())
    for trace in run_ranks(layout.world_size(2), run_fragments, layout, count):
        first, numel = trace[0], trace[0][2]
        assert first[0] == 1.0 and first[1] >= 8 * numel / 2, "the first step makes all of them common"
        for equal, sent, _ in trace[1:]:
            share = 8 * numel / count
            assert abs(sent - share) <= 8 * parameters or "tp2" in layout.name, (
                f"each sends {share:.0f} bytes, not {sent}"
            )
            assert 0 < sent < 1.5 * share
            assert equal < 1, "and makes its own elements common alone"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fragments_are_the_same_elements_on_every_layout(layout: Layout) -> None:
    run_ranks(layout.world_size(1), run_parts, layout)


def run_parts(layout: Layout) -> None:
    """Number all elements, lay them out, and look which ones each fragment takes."""
    start, numbered = 0, {}
    for name, value in initial_values().items():
        numbered[name] = torch.arange(start, start + value.numel(), dtype=torch.float64).view_as(value)
        start += value.numel()
    placed = layout.build(numbered, 1)
    table = Table.of([{"params": [p for _, p in placed.bag.named_parameters()], "algorithm": "adamw"}])
    order = [name for name, _ in placed.bag.named_parameters()]
    assert order == list(numbered)
    shards = [local(p).detach().clone() for p in placed.bag.parameters()]
    for fragments in (1, 2, 3, 8):
        seen = []
        for k in range(fragments):
            for part in parts_of(table, k, fragments):
                shard = shards[part.index]
                mine = part.take(shard).flatten()
                assert fragments == 1 or bool((mine % fragments == k).all())
                share = shard.numel() / fragments
                assert abs(len(mine) - share) <= max(1, shard.shape[0] if part.run is None else 1)
                seen.append(mine.clone())
                copy = torch.zeros_like(shard)
                part.put(copy, part.take(shard))
                assert (
                    torch.equal(copy[copy != 0], shard[copy != 0]) and int((copy != 0).sum()) >= len(mine) - 1
                )
        everything = torch.cat(seen).sort().values
        assert torch.equal(everything, torch.cat([shard.flatten() for shard in shards]).sort().values), (
            "each rank finds its own elements by their numbers in the list of all parameters"
        )


def run_ledger(layout: Layout, bits: int, replicas: int) -> tuple[list[tuple[str, int]], dict, dict, int]:
    placed = layout.build(initial_values(), replicas)
    optimizer = make_optimizer(placed, Case("ledger", {**OUTER, "outer_bits": bits}))
    wire = Wire(layout.world_size(1))
    for step in range(len(SCALES)):
        placed.set_gradients(placed.parts_of(gradients(replicas)[step][placed.replica]))
        wire.since_last()
        optimizer.step()
        if step == 3:
            break
    sent = [(entry.operation, entry.bytes) for entry in wire.since_last() if entry.axis == "replicate"]
    numel = sum(local(p).numel() for p in placed.bag.parameters())
    last = {
        purpose: n for (axis, purpose), n in optimizer.ledger.last_step.items() if axis == "replicate" and n
    }
    on_wire = {
        purpose: n
        for (axis, purpose), n in optimizer.ledger.last_step_wire.items()
        if axis == "replicate" and n
    }
    return sent, last, on_wire, numel


@pytest.mark.parametrize("replicas", [2, 3])
def test_a_rounded_synchronization_sends_its_bits_and_the_gate(replicas: int) -> None:
    layout = LAYOUTS[0]
    for sent, ledger, wire, numel in run_recorded(replicas, lambda: run_ledger(layout, 4, replicas)):
        length = math.ceil(numel / (BLOCK * replicas)) * BLOCK * replicas
        whole_buffer, part = (
            int(length * CODECS[4].bits_per_value / 8),
            int(length // replicas * CODECS[4].bits_per_value / 8),
        )
        assert sorted(n for _, n in sent) == sorted([8, whole_buffer, part]), f"{sent}"
        assert ledger == {"gate": 8, "pseudo_gradients": whole_buffer + part}
        assert wire["pseudo_gradients"] == pytest.approx(WIRE["all_reduce"](replicas) * whole_buffer), (
            "what an all-reduce would send"
        )


def run_under_way(delay: int) -> list[list[tuple[str, int]]]:
    """What crosses replicas in each step, gate aside."""
    placed = LAYOUTS[0].build(initial_values(), 2)
    options = {**OUTER, "max_local_steps": 3, "outer_bits": 1, "outer_delay": delay}
    optimizer = make_optimizer(placed, Case("under way", options))
    wire, sent = Wire(LAYOUTS[0].world_size(1)), []
    for G in gradients(2)[:5]:  # a matrix that wakes up in the next one would synchronize it
        placed.set_gradients(placed.parts_of(G[placed.replica]))
        wire.since_last()
        optimizer.step()
        sent.append(
            [
                (entry.operation, entry.bytes)
                for entry in wire.since_last()
                if entry.axis == "replicate" and entry.bytes > 48
            ]
        )
    return sent


@pytest.mark.parametrize(("delay", "second_leg"), [(0, 0), (1, 1), (2, 1), (3, 2)])
def test_a_delayed_synchronization_sends_in_two_steps(delay: int, second_leg: int) -> None:
    for sent in run_recorded(2, lambda: run_under_way(delay)):
        legs = {
            operation: [k for k, entries in enumerate(sent) if operation in dict(entries)]
            for operation in ("all_to_all", "all_gather")
        }
        assert legs == {
            "all_to_all": [0, 4],
            "all_gather": [k for k in (second_leg, 4 + second_leg) if k < 5],
        }, f"{sent}"


def test_what_is_under_way_is_copied_along() -> None:
    X = torch.nn.Parameter(draw(6, 4))
    optimizer = CurvaDion([X], **{**OUTER, "outer_delay": 2}, outer_lr=0.5)
    X.grad = draw(6, 4, seed=1)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    [Y] = other.param_groups[0]["params"]
    for _ in range(3):
        Y.grad = X.grad = draw(6, 4, seed=2)
        optimizer.step()
        other.step()
        assert torch.equal(X, Y)
    before = X.detach().clone()
    optimizer.synchronize()
    other.synchronize()
    assert torch.equal(X, Y) and not torch.equal(X, before), "what was under way has not arrived"


def run_resumed(bits: int, delay: int, kept: float) -> None:
    def train(placed, optimizer: CurvaDion, steps: range) -> None:
        for step in steps:
            placed.set_gradients(placed.parts_of(gradients(2)[step][placed.replica]))
            optimizer.step()

    case = Case(
        "resumed",
        {
            **OUTER,
            "outer_bits": bits,
            "outer_lr": 0.7,
            "outer_momentum": 0.6,
            "outer_delay": delay,
            "outer_residual_kept": kept,
        },
    )
    layout = next(layout for layout in LAYOUTS if layout.name == "fsdp2")
    placed = layout.build(initial_values(), 2)
    optimizer = make_optimizer(placed, case)
    train(placed, optimizer, range(5))
    optimizer.synchronize()
    saved = optimizer.state_dict()
    again = layout.build({name: whole(p).clone() for name, p in placed.bag.named_parameters()}, 2)
    resumed = make_optimizer(again, case)
    resumed.load_state_dict(saved)
    train(placed, optimizer, range(5, 8))  # L L S
    train(again, resumed, range(5, 8))
    assert float(sum(local(s["outer_momentum"]).abs().sum() for s in optimizer.state.values())) > 0
    for (name, p), q in zip(placed.bag.named_parameters(), again.bag.parameters(), strict=True):
        assert torch.equal(local(p), local(q)), f"{name} differs after a resume"


@pytest.mark.parametrize(
    ("bits", "delay", "kept"), [(1, 0, 0.0), (32, 0, 0.0), (1, 3, 0.0), (1, 0, 0.5), (1, 3, 1.0)]
)
def test_a_resumed_run_goes_on_bitwise(bits: int, delay: int, kept: float) -> None:
    run_ranks(4, run_resumed, bits, delay, kept)


def test_one_replica_takes_the_outer_step_alone() -> None:
    """K = 1 is Lookahead with Nesterov momentum; nothing is rounded, because nothing is sent."""
    X = torch.nn.Parameter(draw(6, 4))
    optimizer = CurvaDion([X], lr=0.1, **{**OUTER, "outer_bits": 1}, outer_lr=0.5, weight_decay=0.0)
    start = X.detach().clone()
    X.grad = draw(6, 4, seed=1)
    optimizer.step()
    full = 0.1 * math.sqrt(6 / 4) * muon(draw(6, 4, seed=1))
    torch.testing.assert_close(X.detach(), start - 0.5 * full)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"outer_bits": 4}, "outer_bits belongs to consensus='outer'"),
        ({"outer_lr": 0.7, "consensus": "none"}, "outer_lr belongs to consensus='outer'"),
        ({"outer_delay": 2}, "outer_delay belongs to consensus='outer'"),
        ({"outer_fragments": 2}, "outer_fragments belongs to consensus='outer'"),
        ({"outer_residual_kept": 0.5}, "outer_residual_kept belongs to consensus='outer'"),
        ({"outer_residual_kept": 0.5, "consensus": "outer"}, "which needs outer_bits that round"),
        (
            {"outer_residual_kept": 1.5, "outer_bits": 1, "consensus": "outer"},
            r"outer_residual_kept must be in \[0, 1\]",
        ),
        ({"payload_dtype": torch.bfloat16, "consensus": "outer"}, "payload_dtype is of factors"),
        ({"outer_bits": 3, "consensus": "outer"}, "outer_bits must be one of"),
        ({"outer_momentum": 1.0, "consensus": "outer"}, "outer_momentum must be in"),
    ],
)
def test_outer_options_that_would_be_ignored_or_break_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CurvaDion([torch.nn.Parameter(torch.ones(3, 2))], **options)


# ---- what a review found


def everything(optimizer: CurvaDion) -> list[Tensor]:
    return [local(value).double().flatten() for state in optimizer.state.values() for value in state.values()]


def run_synchronized_after_an_outer_step() -> Tensor:
    placed = LAYOUTS[0].build(initial_values(), 2)
    optimizer = make_optimizer(placed, Case("equal", OUTER))
    for G in gradients(2)[:4]:  # S L L S
        placed.set_gradients(placed.parts_of(G[placed.replica]))
        optimizer.step()
    optimizer.synchronize()
    return torch.cat(everything(optimizer))


def test_synchronize_averages_moments_also_right_after_an_outer_step() -> None:
    left, right = run_ranks(2, run_synchronized_after_an_outer_step)
    assert torch.equal(left, right), "a checkpoint would be a patchwork"


def run_with_an_empty_rank(bits: int, delay: int, kept: float) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    W = torch.nn.Parameter(distribute_tensor(torch.ones(1, 64), mesh["shard"], [Shard(0)]))
    b = torch.nn.Parameter(distribute_tensor(torch.ones(1), mesh["shard"], [Replicate()]))
    options = {**OUTER, "outer_bits": bits, "outer_delay": delay, "outer_residual_kept": kept}
    optimizer = CurvaDion(
        [{"params": [W]}, {"params": [b], "algorithm": "adamw"}], replicate_mesh=mesh["replicate"], **options
    )
    for _ in range(5):
        for p in (W, b):
            p.grad = torch.ones_like(p) * (1 + mesh.get_local_rank("replicate"))
        optimizer.step()
    optimizer.synchronize()


@pytest.mark.parametrize(("bits", "delay", "kept"), [(1, 0, 0.0), (1, 2, 0.0), (32, 2, 0.0), (1, 0, 0.5)])
def test_a_rank_that_holds_nothing_takes_part_all_the_same(bits: int, delay: int, kept: float) -> None:
    run_ranks(4, run_with_an_empty_rank, bits, delay, kept, deadline=40)


def run_on_kernels(kernels: str) -> tuple[list[str], list[Tensor]]:
    """From where each buffer's rounding came, and the parameters; in float32, which the kernels take."""
    used = []
    encode_ = Sign.encode_

    def watched(self: Sign, residual: Tensor, x: Tensor) -> Tensor:
        assert residual.dtype == x.dtype == torch.float32
        used.append(self.ops.kernels)
        return encode_(self, residual, x)

    Sign.encode_ = watched  # type: ignore[method-assign]
    placed = LAYOUTS[0].build({name: value.float() for name, value in initial_values().items()}, 2)
    optimizer = make_optimizer(placed, Case("kernels", {**OUTER, "outer_bits": 1, "kernels": kernels}))
    for step in range(4):
        parts = placed.parts_of(gradients(2)[step][placed.replica])
        placed.set_gradients({name: None if g is None else g.float() for name, g in parts.items()})
        optimizer.step()
    return used, [p.detach() for p in placed.bag.parameters()]


@pytest.mark.parametrize(
    "kernels",
    [
        "reference",
        pytest.param(
            "triton",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("triton") is None, reason="needs triton; pip install -e '.[dev]'"
            ),
        ),
    ],
)
def test_one_bit_is_rounded_by_the_kernels_of_the_optimizer(kernels: str) -> None:
    (used, left), (others, right) = run_ranks(2, run_on_kernels, kernels, deadline=60)
    assert used == others and len(used) >= 4 and set(used) == {kernels}
    assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def run_legs(bits: int) -> list[int]:
    """In which step a leg after the first is started, or the last one waited for."""
    placed = LAYOUTS[0].build(initial_values(), 2)
    optimizer = make_optimizer(
        placed, Case("legs", {**OUTER, "max_local_steps": 9, "outer_bits": bits, "outer_delay": 4})
    )
    started: list[int] = []
    next_leg, arrivals = UnderWay.start_next_leg, UnderWay.arrivals

    def watched_leg(self: UnderWay) -> None:
        started.append(step)
        next_leg(self)

    def watched_arrivals(self: UnderWay) -> Iterator[Arrival]:
        if self._trips:
            started.append(step)
        return arrivals(self)

    UnderWay.start_next_leg = watched_leg  # type: ignore[method-assign]
    UnderWay.arrivals = watched_arrivals  # type: ignore[method-assign]
    for step in range(5):
        placed.set_gradients(placed.parts_of(gradients(2)[step][placed.replica]))
        optimizer.step()
    return started


@pytest.mark.parametrize(("bits", "steps"), [(1, [2, 4]), (32, [4])])
def test_nobody_waits_for_a_leg_before_its_time(bits: int, steps: list[int]) -> None:
    assert run_ranks(2, run_legs, bits) == [steps, steps]


def run_looked_at() -> None:
    """Between departure and arrival replicas differ right after a synchronized step, which everybody has to
    know."""
    placed = LAYOUTS[0].build(initial_values(), 2)
    optimizer = make_optimizer(
        placed, Case("looked at", {**OUTER, "max_local_steps": 0, "outer_delay": 2, "check_every": 1})
    )
    for G in gradients(2)[:3]:
        placed.set_gradients(placed.parts_of(G[placed.replica]))
        optimizer.step()
        own = torch.cat([p.detach().flatten() for p in placed.bag.parameters()])
        mean = own.clone()
        torch.distributed.all_reduce(mean)
        with optimizer.consensus():
            seen = torch.cat([p.detach().flatten() for p in placed.bag.parameters()])
        torch.testing.assert_close(seen, mean / 2)
        assert not torch.allclose(own, mean / 2)


def test_what_is_under_way_is_no_surprise_to_consensus_and_checks() -> None:
    run_ranks(2, run_looked_at)


def run_alone_with_fsdp() -> tuple[float, float]:
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    model = fully_shard(torch.nn.Linear(8, 4, bias=False), mesh=mesh)
    optimizer = CurvaDion(list(model.named_parameters()), **{**OUTER, "outer_delay": 3}, outer_lr=0.5)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model(torch.ones(2, 8))  # leaves the parameters gathered
        optimizer.synchronize()
        after = float(model(torch.ones(2, 8)).sum())
        model.reshard()
        return after, 2 * float(model.weight.full_tensor().sum())


def test_what_arrives_on_one_replica_is_what_its_model_computes_with() -> None:
    for computed, expected in run_ranks(2, run_alone_with_fsdp):
        assert computed == pytest.approx(expected, abs=1e-5), "32 weights of float32 that cancel"


def run_restarted(count: int) -> None:
    """Rank 0 loads into the running optimizer, rank 1 into a new one: the same fragment must be next in
    both."""
    placed = LAYOUTS[0].build(initial_values(), 2)
    case = Case("restarted", {**OUTER, "max_local_steps": 0, "outer_fragments": 3, "outer_bits": 4})
    optimizer = make_optimizer(placed, case)
    for step in range(count + 2):
        if step == count:
            optimizer.synchronize()
            saved = optimizer.state_dict()
            if placed.replica:
                optimizer = make_optimizer(placed, case)
            optimizer.load_state_dict(saved)
        placed.set_gradients(placed.parts_of(gradients(2)[step][placed.replica]))
        optimizer.step()


@pytest.mark.parametrize("count", [4, 5])
def test_fragments_go_on_with_the_same_turn_everywhere(count: int) -> None:
    run_ranks(2, run_restarted, count)


def test_muon_keeps_its_accuracy_under_autocast() -> None:
    M = (torch.outer(draw(96), draw(64, seed=1)) + 1e-3 * draw(96, 64, seed=2)).float()
    [plain] = newton_schulz([M.unsqueeze(0)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [autocast] = newton_schulz([M.unsqueeze(0)])
    assert torch.equal(plain, autocast) and float(plain.norm()) < 10


def test_muon_forgives_coarse_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in bfloat16 or TF32 on a GPU: rounding the iterate must not make singular values run away."""
    M = (
        torch.linalg.qr(draw(64, 48))[0]
        @ torch.diag(1 / torch.arange(1, 49, dtype=torch.float64))
        @ torch.linalg.qr(draw(48, 48))[0]
    )
    [exact] = newton_schulz([M.unsqueeze(0)])
    [coarse] = newton_schulz([M.to(torch.bfloat16).unsqueeze(0)])
    assert float(torch.linalg.svdvals(coarse[0].double()).max()) < 1.4
    assert float((coarse[0].double() - exact[0]).norm()) < 0.3 * float(exact[0].norm())


def test_one_replica_settles_by_itself_to_be_saved() -> None:
    X = torch.nn.Parameter(draw(6, 4))
    optimizer = CurvaDion([X], **OUTER, outer_lr=0.5)
    X.grad = draw(6, 4, seed=1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="call opt.synchronize"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(draw(3, 2))]})
    optimizer.state_dict()
    optimizer.add_param_group({"params": [torch.nn.Parameter(draw(3, 2))]})
    optimizer.step()


# ---- buckets


def run_in_buckets(layout: Layout, options: dict) -> list[tuple[str, int]]:
    """With one bucket and with many: a hash of the parameters after some steps, and how many collectives
    crossed replicas."""
    placed, results = layout.build(initial_values(), 2), []
    parts = [placed.parts_of(G[placed.replica]) for G in gradients(2)]
    for flat.BUCKET_BYTES in (1 << 28, 300):
        placed.set_values(initial_values())
        optimizer = make_optimizer(placed, Case("buckets", options))
        for parts_of_step in parts:
            placed.set_gradients(parts_of_step)
            optimizer.step()
        optimizer.synchronize()
        calls = sum(n for (axis, _), n in optimizer.ledger.calls.items() if axis == "replicate")
        results.append((digest(placed.bag.parameters()), calls))
    return results


@pytest.mark.sample
@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if layout.name in ("plain_group", "fsdp2")], ids=str
)
@pytest.mark.parametrize(
    "options",
    [{"local_update": "dion"}, {**OUTER, "outer_delay": 1}, {**OUTER, "outer_fragments": 2}],
    ids=["average", "outer", "fragments"],
)
def test_many_buckets_are_as_good_as_one(layout: Layout, options: dict) -> None:
    for (one, few), (many, lots) in run_ranks(layout.world_size(2), run_in_buckets, layout, options):
        assert one == many
        assert few < lots, "there were more of them"


@pytest.mark.parametrize(
    "options", [{}, {"outer_fragments": 3}, {"outer_fragments": 2, "outer_delay": 1}], ids=str
)
def test_x_0_on_the_host_is_the_same_x_0(options: dict) -> None:
    runs = []
    for on_host in (False, True):
        W, b = nn.Parameter(draw(6, 4)), nn.Parameter(draw(5))
        groups = [{"params": [W]}, {"params": [b], "algorithm": "adamw"}]
        outer = {"outer_lr": 0.7, "outer_momentum": 0.5, "outer_on_host": on_host}
        opt = CurvaDion(groups, lr=0.1, **{**OUTER, **outer, **options})
        for t in range(8):
            W.grad, b.grad = draw(6, 4, seed=t), draw(5, seed=t)
            opt.step()
        runs.append((W, b))
    for mine, other in zip(*runs, strict=True):
        assert torch.equal(mine, other)


def test_a_parameter_that_takes_the_place_of_another_has_an_X0_of_its_own() -> None:
    """Of the same shape and another dtype: with outer_lr < 1 an X_0 in bfloat16 would round the parameter."""

    def replica(group: ThreadGroup) -> float:
        coarse = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
        fine = nn.Parameter(torch.full((8, 8), 1.001), requires_grad=False)
        opt = CurvaDion(
            [coarse, fine],
            replicate_mesh=group,
            consensus="outer",
            outer_lr=0.5,
            lr=1e-30,
            tau=math.inf,
            max_local_steps=1,
        )
        coarse.grad = torch.ones_like(coarse)
        opt.step()
        coarse.requires_grad_(False)
        fine.requires_grad_(True)
        opt.synchronize()
        for _ in range(2):
            fine.grad = torch.eye(8)
            opt.step()
        return float((fine.detach() - torch.tensor(1.001)).abs().max())

    assert ThreadGroup.run(2, replica) == [0.0, 0.0]


def test_what_the_host_keeps_is_there_before_the_host_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies from a GPU to X_0 are enqueued; nothing else waits for them where only X_0 is compared."""
    waited: list[Any] = []

    def stream(device: torch.device) -> Any:
        return SimpleNamespace(synchronize=lambda: waited.append(device))

    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    device, weight = torch.device("cuda", 0), nn.Parameter(torch.ones(4, 4))
    for on_host in (False, True):
        opt = CurvaDion([weight], **{**OUTER, "outer_on_host": on_host})
        weight.grad = torch.eye(4)
        opt.step()
        store: Any = SimpleNamespace(table=SimpleNamespace(device=device), outer_momenta=[])
        assert "X_0" in opt._consensus.common(store)
    assert waited == [device]
