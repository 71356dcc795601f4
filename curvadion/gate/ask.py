"""Asking the gate: flags and norms over the shards, the key over the replicas, the answer to the host."""

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress

import torch
from torch import Tensor

from curvadion.consensus import Consensus
from curvadion.gate.key import Decision, decode
from curvadion.gate.schedule import ASKED, Plan
from curvadion.gate.trouble import SPOILED, Trouble
from curvadion.rules import RULES, Step
from curvadion.sharding.agreement import all_refuse
from curvadion.sharding.exchange import Answer
from curvadion.signals.base import Signal
from curvadion_kernels.reference import FAILED_KEY, NONFINITE_BIT, OUTSIDE_KEY, SYNCHRONIZE_BIT


class Gate:
    """Turns what this rank saw in a step into one decision of all ranks.

    Args:
        signal: what it looks at.

    Attributes:
        decision: the last one.
        rmmc: (L,) float32, of every matrix in the last step that was taken.
    """

    def __init__(self, signal: Signal):
        self.signal = signal
        self.decision = decode(0)
        self.rmmc = torch.empty(0)
        self._answer: Answer | None = None  # to the key of the step before, with gate_lag
        self._host_key = torch.empty(0, dtype=torch.int64)

    def attach(self, step: Step) -> None:
        """Make ready for these parameters, at construction and after a group was added."""
        device = step.table.device
        pin = device.type == "cuda"
        self._host_key = torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=pin)
        self.rmmc = torch.full((len(step.table.matrices),), torch.nan, dtype=torch.float32, device=device)
        self.signal.attach(step)

    @property
    def awaits_answer(self) -> bool:
        """Whether a key is on its way that nobody has read."""
        return self._answer is not None

    def last_answer(self) -> Decision:
        """Return what the replicas answered to the key of the step before, if it was sent with gate_lag."""
        answer, self._answer = self._answer, None
        return decode(answer.read() if answer is not None else 0)

    def ask(
        self, step: Step, message: Tensor, plan: Plan, trouble: Trouble, *, failed: bool
    ) -> tuple[Tensor | int, Callable[[], None]]:
        """Return the reduced key, and what to call once the step is sure to be taken; both on the device.
        In a dry run the key is what has to be foretold, see `_foretell`.

        Where the plan does not ask, the key stays inside this replica and says "local step", unless something
        is wrong here; with ask_later it also goes to the other replicas, and the next step reads what came of
        it.

        Args:
            message: (2 L + 2,), this rank's part of what `Signal` starts from, and of which gradients are not
                zero.
            trouble: what this replica has to tell the others from earlier steps.
            failed: this rank could not do its part.
        """
        failed = failed or trouble.held == "failed"
        count = len(step.table.matrices)
        # Slices: a number assigned to an element would make the host wait for the device.
        nonfinite, must = message[count : count + 1], message[count + 1 : count + 2]
        if not step.table.owns_all:
            message[:count].mul_(step.table.owned)
        if trouble.overflow is not None:
            nonfinite.add_(trouble.overflow.to(message))
        if failed or trouble.held:
            nonfinite.fill_(torch.nan if failed else 1.0)
        if plan.must:
            must.fill_(1.0)
        message = step.exchange.sum_over_all_shards(message, "norms")
        taus = [math.inf if failed else float(group["tau"]) for group in step.groups]
        step.store.live = message[count + 2 :] > 0
        norm, rmmc, key = self.signal.read(step, message[: count + 2], taus, plan)

        def commit() -> None:
            step.store.last_norm.copy_(norm)
            self.rmmc = rmmc

        if plan.ask:
            key = step.exchange.max_over_replicas(key)
            return self._foretell(step, plan, failed) if step.table.dry else key, commit
        if plan.ask_later:  # of a step that this replica skips, nobody need know
            sent = torch.where((key & NONFINITE_BIT) != 0, 0, key) if trouble.skips else key
            sent = torch.where(key == FAILED_KEY, key, sent)
            self._answer = step.exchange.start_max_over_replicas(sent)
        if step.table.dry:
            return self._foretell(step, plan, failed) & ~SYNCHRONIZE_BIT, commit
        return torch.where(key == FAILED_KEY, key, key & ~SYNCHRONIZE_BIT), commit

    def _foretell(self, step: Step, plan: Plan, failed: bool) -> int:
        """Return the key of a dry run, where gradients count as finite; raise RuntimeError where only values
        could tell."""
        asked = (plan.ask or plan.ask_later) and not (plan.must or plan.hold_closed)
        taus = [float(group["tau"]) for group in step.groups if group["algorithm"] == "dion"]
        if asked and any(tau < math.inf for tau in taus):
            raise RuntimeError(
                "a step without values must know beforehand whether it is synchronized; got parameters under "
                f"FakeTensorMode and a gate with tau={min(taus)}; for a dry run try tau=inf with "
                "max_local_steps, or max_local_steps=0"
            )
        return FAILED_KEY if failed else SYNCHRONIZE_BIT if plan.must else 0

    def fetch(self, key: Tensor | int) -> Callable[[], int]:
        """Start copying the key to the host; the function returned waits for that copy, and for nothing after
        it."""
        if isinstance(key, int) or not key.is_cuda:
            return lambda: int(key)
        self._host_key.copy_(key, non_blocking=True)
        copied = torch.cuda.current_stream(key.device).record_event()

        def wait() -> int:
            copied.synchronize()
            return int(self._host_key)

        return wait

    def tell(self, trouble: Trouble, step: Step, consensus: Consensus) -> None:
        """Tell the other replicas outside of a step what this one met since they were asked last, and whether
        there is a NaN or an infinity in its parameters; all raise or skip if some did."""
        self.last_answer()
        told = torch.tensor(trouble.key, dtype=torch.int64, device=step.exchange.device)
        seen = step.ops.momentum_norm_((), (), watch=step.X).to(step.exchange.device)
        seen = step.exchange.sum_over_all_shards(seen, "norms")
        told = torch.where((seen[0] > 0) & (told == OUTSIDE_KEY), told + 1, told)
        decision = decode(int(step.exchange.max_over_replicas(told)))
        if decision.trouble:
            self.meet(trouble, decision, ASKED, None, step, consensus)
            step.exchange.ledger.end_step()

    def forget(self) -> None:
        """Start anew: state was loaded."""
        self._answer = None
        self.signal.forget()

    def meet(
        self,
        trouble: Trouble,
        decision: Decision,
        plan: Plan,
        failure: Exception | None,
        step: Step,
        consensus: Consensus,
    ) -> bool:
        """Raise or skip on every rank, if every rank was asked; else let this replica stand still, and
        remember.

        Returns: whether the step counts, because the other replicas take it.
        """

        def names() -> list[str]:
            found = []
            for name, x, g in zip(step.table.names, step.X, step.G, strict=True):
                if not bool(x.isfinite().all()):
                    found.append(f"{SPOILED}{name}")
                if g is not None and not bool(g.isfinite().all()):
                    found.append(f"the gradient of {name}")
            return found

        asked = plan.ask or step.exchange.replicas == 1
        if asked:
            steps, untouched = step.schedule.steps, False
            if decision.failed and not step.schedule.options.gate_lag:
                untouched = all_refuse(step.exchange, steps, failure is not None and trouble.held is None)
            trouble.raise_or_skip(decision, failure, names, steps=steps, untouched=untouched)
        else:
            # Parameters may be others by now.
            with suppress(RuntimeError) if decision.failed else nullcontext():
                consensus.stand_still(step)
            for b in step.store.batches:  # as in the replicas that take the step
                rule = RULES.get(step.groups[b.group].get("local_update", ""))  # which may be what is wrong
                if b.Q is not None and (rule is None or rule.uses_Q):
                    b.common_Q = False
            trouble.hold(decision, failure, names())
        trouble.skipped_steps += 1
        return not asked
