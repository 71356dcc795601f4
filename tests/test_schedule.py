"""The schedule alone: host values, no tensors, all bounds enumerated, against the rules as the docstring
states them."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from curvadion.gate.key import Decision, decode
from curvadion.gate.schedule import GAIN, LEAST_TAU, MOST_TAU, Schedule, ScheduleOptions

NOTHING = decode(0)
OPEN = Decision(synchronize=True, nonfinite=False, failed=False, rmmc=1.0, argmax=0)
STEPS = 24
BOUNDS = [
    ScheduleOptions(warmup, low, high, None, every, lag)
    for warmup, low, high, every, lag in itertools.product(
        (0, 3), (0, 1, 2), (None, 0, 2, 5), (1, 2, 3, None), (0, 1)
    )
    if (high is None or low <= high) and not (every is None and (high is None or lag))
]


def drive(options: ScheduleOptions, opens: list[bool]) -> list[tuple[bool, bool]]:
    """By step: asked in this step (now or for the next one), and synchronized. `opens`: what the signal
    says."""
    schedule, told, trace = Schedule(options), NOTHING, []
    for signal in opens:
        plan = schedule.plan(told)
        assert not (plan.ask and plan.ask_later), "a key is not sent twice"
        assert plan.ask or not plan.must, "a step that must synchronize waits for the answer"
        opened = plan.must or (signal and not plan.hold_closed)
        told = OPEN if plan.ask_later and opened else NOTHING
        synchronized = plan.ask and opened
        trace.append((plan.ask or plan.ask_later, synchronized))
        schedule.took(synchronized)
    return trace


def by_the_rules(options: ScheduleOptions, opens: list[bool]) -> list[tuple[bool, bool]]:
    """The same, from what the options say in words."""
    local, promised, trace = 0, False, []
    for step, signal in enumerate(opens):
        bound = step < max(1, options.warmup_steps)
        bound = bound or (options.max_local_steps is not None and local == options.max_local_steps)
        asked = bound or (options.gate_every is not None and step % options.gate_every == 0)
        if options.gate_lag:
            # The step after the one whose key opened; that one's own key goes nowhere, for its step waits.
            synchronized = bound or promised
            promised = asked and not synchronized and signal and local + 1 >= options.min_local_steps
            asked = asked or synchronized
        else:
            synchronized = bound or (asked and signal and local >= options.min_local_steps)
        local = 0 if synchronized else local + 1
        trace.append((asked, synchronized))
    return trace


@pytest.mark.parametrize("options", BOUNDS, ids=str)
def test_every_combination_of_bounds(options: ScheduleOptions) -> None:
    for seed in range(8):
        opens = [random.Random(seed).random() < share for share in (0.1, 0.5, 0.9) for _ in range(STEPS // 3)]
        assert drive(options, opens) == by_the_rules(options, opens), f"opens {opens}"


@pytest.mark.parametrize("options", [o for o in BOUNDS if o.max_local_steps is not None], ids=str)
def test_never_more_local_steps_in_a_row_than_allowed(options: ScheduleOptions) -> None:
    in_a_row = [
        len(list(run))
        for synchronized, run in itertools.groupby(s for _, s in drive(options, [False] * STEPS))
        if not synchronized
    ]
    assert max(in_a_row, default=0) == options.max_local_steps


def test_without_gate_every_only_the_bounds_ask() -> None:
    trace = drive(ScheduleOptions(0, 0, 7, None, None, 0), [True] * 17)
    assert [asked for asked, _ in trace] == [synchronized for _, synchronized in trace]
    assert [step for step, (asked, _) in enumerate(trace) if asked] == [0, 8, 16]


def test_a_forced_step_shifts_the_interval_and_nobody_is_asked_in_between() -> None:
    schedule, asked = Schedule(ScheduleOptions(0, 0, 3, None, None, 0)), []
    for step in range(12):
        schedule.forced |= step == 6  # as after add_param_group()
        plan = schedule.plan(NOTHING)
        asked.append(plan.ask)
        schedule.took(plan.must)
    assert [step for step, a in enumerate(asked) if a] == [0, 4, 6, 10]


@pytest.mark.parametrize("every", [1, 2])
def test_steering_finds_the_rate(every: int) -> None:
    schedule, tau, opened = Schedule(ScheduleOptions(0, 0, None, 0.125, every, 0)), 50.0, 0
    draw = random.Random(0)
    for _ in range(4000):
        plan = schedule.plan(NOTHING)
        synchronized = plan.must or (draw.lognormvariate(0, 1) > tau and not plan.hold_closed)
        tau = schedule.steer(tau, synchronized, plan.due)
        schedule.took(synchronized)
        opened += synchronized
    assert opened / 4000 == pytest.approx(0.125, rel=0.1)


def test_steering_moves_by_its_gain_and_stops_at_its_bounds() -> None:
    schedule = Schedule(ScheduleOptions(0, 0, None, 0.25, 1, 0))
    assert schedule.steer(1.0, True, True) == 1.0, "not in the warm-up, which the first step is"
    schedule.took(True)
    assert schedule.steer(1.0, True, True) == pytest.approx(math.exp(GAIN * 0.75))
    assert schedule.steer(1.0, False, True) == pytest.approx(math.exp(-GAIN * 0.25))
    assert (schedule.steer(LEAST_TAU, False, True), schedule.steer(MOST_TAU, True, True)) == (
        LEAST_TAU,
        MOST_TAU,
    )
    assert (schedule.steer(0.0, True, True), schedule.steer(math.inf, True, True)) == (0.0, math.inf)
