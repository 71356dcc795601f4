"""When replicas ask one another, and which steps they are bound to synchronize: host values, equal on all
ranks."""

import math
from dataclasses import dataclass

from curvadion.gate.key import Decision

LEAST_TAU, MOST_TAU = 1e-6, 1e6  # where steering stops
GAIN = 0.3  # of the controller of tau: how much log(tau) moves for one synchronization too many or too few


@dataclass(frozen=True)
class ScheduleOptions:
    """Options of `CurvaDion` under their own names."""

    warmup_steps: int
    min_local_steps: int
    max_local_steps: int | None
    target_sync_rate: float | None
    gate_every: int | None
    gate_lag: int


@dataclass(frozen=True)
class Plan:
    """What a step does about the gate.

    Attributes:
        due: it is a step of those on which the gate is asked.
        must: this rank wants it synchronized, or the next one, whatever the gate's signal says.
        ask: the replicas' keys are reduced, and this step waits for the answer.
        ask_later: they are reduced, and the next step reads the answer.
        hold_closed: the signal opens nothing.
    """

    due: bool
    must: bool
    ask: bool
    ask_later: bool
    hold_closed: bool


# Of a question outside of a step, which every rank asks and waits for.
ASKED = Plan(due=True, must=True, ask=True, ask_later=False, hold_closed=False)


class Schedule:
    """Counters and bounds of the gate, and the controller of tau.

    Attributes:
        steps, local_steps, synchronized_steps: taken so far; in a row since the last synchronized one; in
            all.
        forced: the next step that is not skipped is synchronized, on all ranks alike.
        wanted: this rank asks the others for a synchronized step; told in the gate's key when it is due.
        diverged: replicas may hold different state, so that a checkpoint would be a patchwork.
        alone: there is one replica, and nobody has asked for local steps: every step is synchronized.
    """

    def __init__(self, options: ScheduleOptions):
        self.options = options
        self.steps = self.local_steps = self.synchronized_steps = 0
        self.forced = self.wanted = self.diverged = self.alone = False

    @property
    def apart(self) -> bool:
        """Whether replicas have taken steps of their own since they were equal."""
        return self.diverged and self.local_steps > 0

    @property
    def warming_up(self) -> bool:
        """Whether the next step is the first one or one of `warmup_steps`."""
        return self.steps < max(1, self.options.warmup_steps)

    @property
    def bound(self) -> bool:
        """Whether the next step must be synchronized: first steps, or `max_local_steps` local ones in a
        row."""
        most = self.options.max_local_steps
        return self.forced or self.alone or self.warming_up or (most is not None and self.local_steps >= most)

    @property
    def due(self) -> bool:
        """Whether the next step is one of those on which the gate is asked."""
        every = self.options.gate_every
        return self.bound or (every is not None and self.steps % every == 0)

    @property
    def may_ask(self) -> bool:
        """Whether the next step may ask the other replicas, and send them something: as far as is known
        without what they answered last."""
        return self.due or self.options.gate_lag > 0

    @property
    def asks_seldom(self) -> bool:
        """Whether there are steps in which a replica cannot tell the others what it met."""
        return self.options.gate_every != 1 or self.options.gate_lag > 0

    def plan(self, told: Decision) -> Plan:
        """Plan the next step; `told` is what the others answered to the key of the step before.

        Whether the gate is due must not depend on that answer, or tau would be steered twice.
        """
        o = self.options
        due = self.due
        self.forced |= told.synchronize
        ask = (self.bound or told.trouble) if o.gate_lag else due
        later = due and not ask
        must = self.bound or (self.wanted and due)
        closed = not (ask or later) or self.local_steps + later < o.min_local_steps
        return Plan(due, must, ask, later, closed)

    def steer(self, tau: float, opened: bool, due: bool) -> float:
        """Return tau exp(GAIN (opened - rate)), the rate being that of steps on which the gate is due."""
        rate, every = self.options.target_sync_rate, self.options.gate_every or 1
        if rate is None or self.steps < max(1, self.options.warmup_steps) or not 0 < tau < math.inf:
            return tau
        return min(max(tau * math.exp(GAIN * (opened - rate * every * due)), LEAST_TAU), MOST_TAU)

    def took(self, synchronized: bool) -> None:
        """Count a step."""
        self.steps += 1
        self.local_steps = 0 if synchronized else self.local_steps + 1
        self.synchronized_steps += synchronized
        self.forced = False
        self.wanted &= not synchronized
