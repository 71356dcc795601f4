"""Asking the gate: flags and norms over the shards, the key over the replicas, the answer to the host."""

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress

import torch
from torch import Tensor

from curvadion.consensus import Consensus
from curvadion.gate.key import Decision, decode
from curvadion.gate.schedule import ASKED, Plan
from curvadion.gate.trouble import Trouble
from curvadion.rules import RULES, Step
from curvadion.sharding.exchange import Answer
from curvadion.signals.base import Signal
from curvadion_kernels.reference import FAILED_KEY, NONFINITE_BIT, SYNCHRONIZE_BIT


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
    ) -> tuple[Tensor, Callable[[], None]]:
        """Return the reduced key, and what to call once the step is sure to be taken; both on the device.

        Where the plan does not ask, the key stays inside this replica and says "local step", unless something
        is wrong here; with ask_later it also goes to the other replicas, and the next step reads what came of
        it.

        Args:
            message: (L + 2,), this rank's part of what `Signal` starts from.
            trouble: what this replica has to tell the others from earlier steps.
            failed: this rank could not do its part.
        """
        failed = failed or trouble.held == "failed"
        if not step.table.owns_all:
            message[:-2].mul_(step.table.owned)
        if trouble.overflow is not None:
            message[-2:-1].add_(trouble.overflow.to(message))
        if failed or trouble.held:
            message[-2:-1].fill_(torch.nan if failed else 1.0)
        if plan.must:
            # A slice: a number assigned to an element would make the host wait for the device.
            message[-1:].fill_(1.0)
        message = step.exchange.sum_over_all_shards(message, "norms")
        taus = [math.inf if failed else float(group["tau"]) for group in step.groups]
        norm, rmmc, key = self.signal.read(step, message, taus, plan)

        def commit() -> None:
            step.store.last_norm.copy_(norm)
            self.rmmc = rmmc

        if plan.ask:
            return step.exchange.max_over_replicas(key), commit
        if plan.ask_later:  # of a step that this replica skips, nobody need know
            sent = torch.where((key & NONFINITE_BIT) != 0, 0, key) if trouble.skips else key
            sent = torch.where(key == FAILED_KEY, key, sent)
            self._answer = step.exchange.start_max_over_replicas(sent)
        return torch.where(key == FAILED_KEY, key, key & ~SYNCHRONIZE_BIT), commit

    def fetch(self, key: Tensor) -> Callable[[], int]:
        """Start copying the key to the host; the function returned waits for that copy, and for nothing after
        it."""
        if not key.is_cuda:
            return lambda: int(key)
        self._host_key.copy_(key, non_blocking=True)
        copied = torch.cuda.current_stream(key.device).record_event()

        def wait() -> int:
            copied.synchronize()
            return int(self._host_key)

        return wait

    def tell(self, trouble: Trouble, step: Step, consensus: Consensus) -> None:
        """Tell the other replicas outside of a step what this one met since they were asked last; all raise or
        skip if some did."""
        self.last_answer()
        told = torch.tensor(trouble.key, dtype=torch.int64, device=step.exchange.device)
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
            pairs = zip(step.table.names, step.G, strict=True)
            return [name for name, g in pairs if g is not None and not bool(g.isfinite().all())]

        asked = plan.ask or step.exchange.replicas == 1
        if asked:
            trouble.raise_or_skip(decision, failure, names, steps=step.schedule.steps)
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
