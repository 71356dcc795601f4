"""The optimizer: `step()`, and what a user calls between steps. The rooms it asks have their own packages."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

from curvadion.consensus import CONSENSUS
from curvadion.elastic import Elastic
from curvadion.gate.ask import Gate
from curvadion.gate.key import Decision, decode
from curvadion.gate.schedule import Plan, Schedule
from curvadion.gate.trouble import Trouble
from curvadion.options import (
    Options,
    check_elastic,
    check_group,
    check_signal,
    check_taus,
    sort_options,
)
from curvadion.rules import Step, begin
from curvadion.sharding.agreement import Agreement
from curvadion.sharding.group import Group
from curvadion.sharding.layout import replicate_group, reshard_gathered_modules
from curvadion.sharding.lost import leave_word
from curvadion.signals import SIGNALS
from curvadion.state.cycled import CycledMomentum
from curvadion.state.store import averaged
from curvadion_kernels.reference import Fixed

logger = logging.getLogger("curvadion.optimizer")


class CurvaDion(Elastic):
    """Dion whose replicas exchange something only on the steps that a gate or an interval says.

    Of a matrix, m_i = M_i + G_i is the momentum of replica i together with its gradient::

        rho = max over matrices and replicas of | ||m_t|| - ||m_{t-1}|| | / ||m_{t-1}||             (RMMC)

    While rho <= tau steps are local: a matrix does what `local_update` says, and 8 bytes cross
    `replicate_mesh`. Otherwise the step is synchronized, as `consensus` says. With one replica every step is,
    unless an option that says when or how to be local is set. docs/how_it_works.md has the equations,
    docs/options.md more on single options. A missing gradient counts as zero; parameters with
    ``requires_grad=False`` are left alone, see `synchronize`.

    Args:
        params: parameters, named parameters or groups, as torch takes them. A group may set every option
            marked [g], and ``algorithm``: "dion" (default; matrices only), "adamw" or "lion".
        lr [g]: learning rate, a number or a 0-d tensor.
        replicate_mesh: the slow axis, which FSDP must not see: a 1-D `DeviceMesh`, a `ProcessGroup` or None;
            or an `ElasticGroup`, whose replicas may leave and come back.
        momentum [g]: factor by which the momentum decays in each step, mu.
        weight_decay [g]: decoupled weight decay; uses lr on local and synchronized steps.
        rank_fraction [g]: rank: r = round_up(rank_fraction * min(m, n), rank_multiple_of), at most min(m, n).
        rank_multiple_of [g]: number of which r is a multiple, by rounding up.
        gate: what opens the gate: "rmmc", or "drift", how far replicas have come apart.
        tau [g]: threshold above which the gate opens; inf leaves warmup_steps and max_local_steps alone in
            charge. With "drift" the smallest of all groups counts.
        warmup_steps: number of first steps that are synchronized. The very first one always is.
        min_local_steps: number of steps after a synchronized one in which the gate stays closed.
        max_local_steps: number of local steps in a row after which the next is synchronized; 0 synchronizes
            every step, None sets no bound.
        local_update [g]: what a matrix does on a local step: a gradient step; Dion's or Muon's; "normuon",
            Muon with rows of like size (betas[1], eps); "dion2", Muon of the largest rank_fraction of the
            rows.
        local_lr_scale [g]: learning rate of matrices on local steps: lr_local = local_lr_scale * lr.
        update_scale [g]: factor of the learning rate of an orthonormal update, m x n: "spectral", sqrt(m/n);
            "match_rms_adamw", 0.2 sqrt(max(m, n)); "original", sqrt(max(1, m/n)).
        weight_layout [g]: how matrices are stored: "out_in", as in torch.nn.Linear, m outputs of n inputs; or
            "in_out", the transpose of that, as in the Conv1D of transformers.
        batch_dims [g]: number of leading dimensions that count matrices, as 1 in weights of experts,
            (experts, out, in).
        splits [g]: blocks that are matrices of their own, as in a fused qkv: how many equal ones, or their
            sizes.
        split_along [g]: dimension that splits cuts: "outputs" or "inputs".
        nesterov [g]: "muon" and "normuon" take G_i + mu m_i for m_i.
        newton_schulz [g]: polynomials of Newton-Schulz in "muon", "normuon" and "dion2": "jordan" is Muon's,
            "polar_express" makes singular values equal within 1 % in six rounds.
        newton_schulz_steps [g]: number of rounds.
        newton_schulz_dtype [g]: dtype in which they are computed; None takes the momentum's, at least
            float32; but bfloat16 on GPUs for all but float64, and on CPUs with units for it for bfloat16.
        newton_schulz_method [g]: "gram" takes several rounds on one Gram matrix where one side is more than
            1.5 times the other, for fewer FLOPs; "standard" takes all on the matrix itself.
        consensus: how replicas become equal on a synchronized step: "average", by means of all they hold;
            "outer", by pseudo-gradients. "none" is the published formula as it stands, and drifts.
        outer_lr: outer learning rate; 1 without outer_momentum is plain averaging.
        outer_momentum: Nesterov momentum of the outer step.
        outer_bits: bits per parameter between replicas: 32 rounds nothing, 16 is bfloat16, fewer have a scale
            for each 128 values; or the name of a registered codec.
        outer_fragments: number of parts of the parameters, equal shares of all elements, that take turns:
            each synchronized step makes one of them common, the first step and the warm-up all.
        outer_delay: steps for which a synchronization is under way while replicas go on; 0 waits for it.
        outer_on_host: keep X_0, the parameters when replicas were equal last, in pinned host memory.
        outer_residual_kept: share of what rounding keeps back of a replica's pseudo-gradient that stays in
            its parameters, X_i = X_0 - outer_residual_kept e_i; with 0 all go on from X_0.
        target_sync_rate: share of steps to synchronize: tau is steered until the gate opens that often.
        gate_every: ask the other replicas on every n-th step, and where warmup_steps or max_local_steps
            synchronize; None asks only there. Nothing at all crosses replicas in between.
        gate_lag: 1 lets local steps go on without the gate's answer, which the next step obeys; 0 waits.
        error_feedback [g]: keep in the momentum what the low-rank update left out; False is M_i <- mu m_i.
        right_factor [g]: how R becomes Q: "column_norm" is Dion, "qr" Orth-Dion.
        betas [g]: decay rates of the moments of AdamW and Lion.
        eps [g]: added to the denominator of AdamW.
        momentum_dtype: dtype of momentum and moments; None takes the parameter's.
        payload_dtype: dtype of P, R and AdamW or Lion gradients between replicas; None takes the tensor's.
        orthogonalization [g]: how P is made orthonormal: by shifted Cholesky QR, or by Householder QR;
            "auto": on CPUs Householder where one rank has all of P, else Cholesky QR.
        owners: whether each matrix of a Muon step, and each P of a Dion step, is orthonormalized by one rank
            of its replica, which is sent the shards: "auto" where that takes less time than all ranks working
            on it together.
        replica_gbit: Gbit/s at which a rank can send to other replicas: where the link between them is fast,
            each P of a synchronized step, which all replicas have alike, may have its owner among the ranks
            of all of them, as `owners` says. None, for a slow link: each replica works on all P.
        owner_dtype: dtype of momenta and updates on their way to owners and back; None takes that of the
            computation, bfloat16 on a GPU.
        on_nonfinite: what all ranks do in a step with a NaN or an infinity: raise `NonFiniteError`, after
            which state has to be loaded again; or skip the step.
        on_equal_gradients: what all ranks do if all replicas have the same gradients in the first step, bit
            for bit, because DistributedDataParallel or HSDP averages them or all read the same data: warn, or
            raise `ReplicaMismatchError`.
        check_every: steps between checks that all ranks agree (step, options, weights); 0: in the first only.
        kernels: where the hot operations run; "auto" takes Triton's where they compile, else plain torch.
        **own: options that something registered has declared, see docs/extending.md; and `foreach` and
            `fused`, which hosts pass to any optimizer and which change nothing.

    Raises:
        ValueError, TypeError: an option or a layout breaks a rule; the message names it, and what to try.

    Source: Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv:2504.05295, for the update;
    Douillard et al., "DiLoCo", arXiv:2311.08105, for the outer step with Nesterov momentum.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        replicate_mesh: DeviceMesh | ProcessGroup | Group | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        rank_fraction: float = 0.25,
        rank_multiple_of: int = 1,
        gate: str = "rmmc",
        tau: float = 0.1,
        warmup_steps: int = 0,
        min_local_steps: int = 0,
        max_local_steps: int | None = None,
        local_update: str = "gradient",
        local_lr_scale: float = 1.0,
        update_scale: str = "spectral",
        weight_layout: str = "out_in",
        batch_dims: int = 0,
        splits: int | tuple[int, ...] | None = None,
        split_along: str = "outputs",
        nesterov: bool = False,
        newton_schulz: str = "jordan",
        newton_schulz_steps: int = 5,
        newton_schulz_dtype: torch.dtype | None = None,
        newton_schulz_method: str = "gram",
        consensus: str = "average",
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        outer_bits: int | str = 32,
        outer_fragments: int = 1,
        outer_delay: int = 0,
        outer_on_host: bool = False,
        outer_residual_kept: float = 0.0,
        target_sync_rate: float | None = None,
        gate_every: int | None = 1,
        gate_lag: int = 0,
        error_feedback: bool = True,
        right_factor: str = "column_norm",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum_dtype: torch.dtype | None = None,
        payload_dtype: torch.dtype | None = None,
        orthogonalization: str = "auto",
        owners: str = "auto",
        replica_gbit: float | None = None,
        owner_dtype: torch.dtype | None = None,
        on_nonfinite: str = "raise",
        on_equal_gradients: str = "warn",
        check_every: int = 1000,
        kernels: str = "auto",
        **own: Any,
    ):
        defaults, common = sort_options(locals())
        self._options = o = Options.of(common, CurvaDion.__init__)
        check_group(defaults)
        self._peers = replicate_group(replicate_mesh)
        self._schedule = Schedule(o.schedule)
        self._gate = Gate(SIGNALS[o.gate](common))
        self._trouble = Trouble(skip=o.on_nonfinite == "skip")
        refuse = o.on_equal_gradients == "raise"
        self._agreement = Agreement(o.check_every, refuse_equal_gradients=refuse, lag=o.schedule.gate_lag > 0)
        self._consensus = CONSENSUS[o.consensus](common)
        check_signal(self._gate.signal, self._consensus, o)
        if self._elastic is not None:
            check_elastic(self._gate.signal, self._consensus, o)
        self._inside, self._cycled = "", CycledMomentum()
        super().__init__(params, defaults)
        self._build()
        check_taus(self.param_groups, o)
        if self._alone:
            logger.info(
                "one replica has nobody to be local to: every step is synchronized, that is, plain Dion; for "
                "local steps say when or how (tau, max_local_steps, local_update, ...)"
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether skipping is left to step(), where all ranks agree: yes, to torch.amp.GradScaler.

        To anybody else no: hosts take a yes for "scaled gradients must not be clipped", and refuse to clip
        where no GradScaler is at work. After its `unscale_()` they can be.
        """
        return sys._getframe(1).f_globals.get("__name__") == "torch.amp.grad_scaler"

    # ---- one step

    @_disable_dynamo  # a compiled training step calls it as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; every rank of every replica calls it. Returns the closure's value.

        Raises:
            NonFiniteError: on every rank, see `on_nonfinite`.
            ReplicaMismatchError: on every rank, see `check_every` and `on_equal_gradients`.
            LeftBehindError: the other replicas of an `ElasticGroup` have gone on without this one.
            LostRankError: on the other ranks, when one has ended, was stopped, or called something else.
            RuntimeError: on every rank, when one of them could not do its part, or none has a gradient in the
                first step.
            ValueError, TypeError: what this rank could not do of it. With gate_lag=0, in a step that asks the
                other replicas, nothing has changed if every rank raises its own: mend it everywhere and call
                step() again.
        """
        self._now_in("step()")
        loss, failure = self._loss(closure)
        self._trouble.refuse_if_broken()
        self._refuse_inside("step()")
        self._built.table.refuse_meta()
        try:
            with torch.autocast(self._built.table.device.type, enabled=False):
                self._take_step(failure)
            if failure is not None:  # which the others hear of when the gate asks next
                raise failure
        except Exception as error:
            leave_word(self._built.exchange.place, error)
            raise
        return loss

    def _loss(self, closure: Callable[[], Any] | None) -> tuple[Any, Exception | None]:
        """Call the closure; return what it returned, and what it raised, if the other ranks can be told.

        Not those of the same replica: they may be waiting in a collective of the model's.
        """
        try:
            with torch.enable_grad():
                return closure() if closure is not None else None, None
        except Exception as error:
            leave_word(self._built.exchange.place, error)
            if self.replicas == 1 or self._built.exchange.shards.axes:
                raise
            return None, error

    def _take_step(self, failure: Exception | None) -> None:
        exchange = self._built.exchange
        if self.replicas == 1 and not (
            exchange.shards.axes or exchange.elastic or not self._built.table.outdated
        ):
            self.synchronize()  # with nobody to agree with
        self._welcome()
        self.ledger.begin_step()
        self._schedule.alone = self._alone
        config = partial(self._built.describe, self.param_groups)
        self._agreement.check_if_due(
            self._built.exchange, self._schedule.steps, config, self._common_weights, self._gradients
        )

        with record_function("curvadion::gate"):
            step, failure = self._take_in(failure)
            sends = self.replicas > 1 and self._schedule.may_ask
            # m_i = M_i + G_i,  ||m_i||^2
            store = failure is None and not self._trouble.skips
            message = self._accumulate(step.G, store=store, also=step.X if sends else ())
            # rho; the answer of the step before may be waited for, so after the kernels are enqueued
            told = self._gate.last_answer()
            self._refuse_if_elsewhere(told)
            plan = self._schedule.plan(told)
            key, commit = self._gate.ask(step, message, plan, self._trouble, failed=failure is not None)
            arrived = self._gate.fetch(key)
            if failure is None:
                self._consensus.remember(step.X)  # X_0
                begin(step, key)  # X_i <- ... - lr_local G_i, on the device, if the key says "local"
            decision = decode(arrived())  # the one wait for the device
        self._refuse_if_elsewhere(decision)
        counts = True
        if decision.trouble:  # all raise; or all skip, uncounted; or this replica stands still
            counts = self._gate.meet(self._trouble, decision, plan, failure, step, self._consensus)
        else:
            commit()  # ||m_{t-1}|| <- ||m_t||
            if self._trouble.skips:
                self._accumulate(step.G, store=True)
            self._consensus.step(step, synchronize=decision.synchronize)
            self._gate.signal.took(step, decision.synchronize)
        self._finish(decision, plan, counts=counts)
        if decision.synchronize and counts:
            self._count_anew()

    def _take_in(self, failure: Exception | None) -> tuple[Step, Exception | None]:
        """Return what there is to a step, and what this rank cannot do of it: the gate tells the others."""
        self._trouble.overflow = getattr(self, "found_inf", None)  # torch.amp.GradScaler sets both for step()
        self._cycled.follow(self.param_groups, in_step=True)
        X = self._built.intake.parameters()
        G, found = self._built.intake.gradients(self.param_groups, getattr(self, "grad_scale", None))
        if failure is not None:  # gradients are those of half a batch, or of none
            G = Fixed([None] * len(G))
        return self._built.step(self.param_groups, self._schedule, X, G), failure or found

    def _accumulate(self, G: Fixed[Tensor | None], *, store: bool, also: Sequence[Tensor] = ()) -> Tensor:
        if store or not self._trouble.skips:  # without skips others store, also where this rank refuses
            self._trouble.begun()
        built = self._built
        return built.store.accumulate(G, built.ops, built.numbers, store=store, also=also)

    def _finish(self, decision: Decision, plan: Plan, *, counts: bool) -> None:
        """Remember the decision; if the step counts, count it and steer tau."""
        schedule = self._schedule
        self._gate.decision = decision
        if not counts:
            self.ledger.end_step()
            return
        if schedule.options.target_sync_rate is not None:
            for group in self.param_groups:
                group["tau"] = schedule.steer(float(group["tau"]), decision.synchronize, plan.due)
        schedule.took(decision.synchronize)
        schedule.diverged = self.replicas > 1 or self._consensus.under_way or self._gate.awaits_answer
        self._built.store.count(schedule)
        self.ledger.end_step(self._built.dense_bytes)
        self._trouble.ended()

    # ---- between replicas

    @torch.no_grad()
    def synchronize(self) -> None:
        """Make replicas equal: average parameters, momentum and moments, make Q common. Every rank calls it.

        For use before a checkpoint, at the end, and after every rank has changed `requires_grad` of some
        parameters: a frozen one moves to the mean of where replicas were, whatever is under way, then not at
        all, and loses its state (one process need not call it). The gate's previous norms are multiplied by
        ||E_i[M_i]|| / E_i[||M_i||], because averaging shrinks momenta, which alone would open the gate in the
        next step.

        Raises:
            ReplicaMismatchError: on every rank, if replicas have taken different numbers of steps, or ranks
                have frozen different parameters.
            NonFiniteError: on every rank, if there is a NaN or an infinity in what is to be averaged.
        """
        self._refuse_inside("synchronize()")
        instead = "replicas are equal in X_0, which common_state() holds"
        self._refuse_if_elastic("synchronize()", instead)
        self._now_in("synchronize()")
        store, exchange = self._built.store, self._built.exchange
        self._trouble.overflow = None  # no GradScaler is at work between steps
        store.settle()
        step = self._built.step(self.param_groups, self._schedule)
        exchange.meet("synchronize()")
        if self.replicas > 1:  # all raise if some replica met something since the gate asked last
            self._gate.tell(self._trouble, step, self._consensus)
        self._compare_steps()
        self._settle(step)
        self._follow_requires_grad()

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Hold the mean over replicas of the parameters inside the context, this replica's own after it.

            with opt.consensus():
                loss = evaluate(model)

        Every rank enters it, between any two steps, but not between a forward and its backward. Costs one
        copy of the local parameters.

        Raises:
            ReplicaMismatchError: on every rank, if replicas have taken different numbers of steps.
        """
        self._refuse_inside("consensus()")
        self._now_in("consensus()")
        self._compare_steps()
        self._inside = "consensus()"
        try:
            with (
                averaged(self._built.table, self._built.exchange)
                if self._parameters_differ
                else nullcontext()
            ):
                yield
        finally:
            self._inside = ""
            reshard_gathered_modules()  # what an evaluation leaves gathered, the next step would not move

    def synchronize_next(self) -> None:
        """Have the next step synchronized in which the gate is asked, whatever it says; with gate_lag the one
        after. Communicates nothing by itself: the request travels in the gate's key, so that any one rank may
        call it. gate_every and max_local_steps say when the gate is asked."""
        self._schedule.wanted = True

    @torch.no_grad()
    def broadcast_parameters(self) -> None:
        """Give every replica the parameters of replica 0. Every rank calls it; for the start of a run."""
        self._refuse_inside("broadcast_parameters()")
        self._refuse_if_elastic("broadcast_parameters()", "join() gives all the state of one")
        self._now_in("broadcast_parameters()")
        self._compare_steps()
        self._built.exchange.broadcast_(self._built.X(), self._built.table.copied, "parameters")
        reshard_gathered_modules()
        self._forget_ways()
        self._agreement.pending = True

    def discard_divergence(self) -> None:
        """Declare this replica's state worthless, so that a checkpoint may be loaded over it.

        Loaders such as torch.distributed.checkpoint ask for `state_dict()`, refused while replicas differ.
        """
        self._schedule.diverged = False

    def _refuse_if_elsewhere(self, said: Decision) -> None:
        if said.elsewhere is not None:
            self._agreement.refuse_to_go_alone(self._built.exchange, said.elsewhere)

    def _compare_steps(self) -> None:
        exchange, steps = self._built.exchange, self._schedule.steps
        if self.replicas > 1 or exchange.shards.axes:
            config = partial(self._built.describe, self.param_groups)
            self._agreement.check(exchange, steps, config, {}, ())

    def _gradients(self) -> list[tuple[str, Tensor | None]]:
        table = self._built.table
        return [(name, p.grad) for name, p in zip(table.names, table.params, strict=True)]

    def _common_weights(self) -> dict[str, Tensor]:
        """Return what must be equal in all replicas by now, by name."""
        if self.replicas == 1:
            return {}
        built, names = self._built, self._built.table.names
        common = {} if self._parameters_differ else dict(zip(names, built.X(), strict=True))
        for what, tensors in self._consensus.common(built.store).items():
            common |= {f"{what} of {name}": t for name, t in zip(names, tensors, strict=True)}
        return common
