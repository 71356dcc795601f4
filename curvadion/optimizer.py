"""The optimizer: all state, and a `step()` that reads like the equations.

Mathematics is in `dion.py`, `gate.py` and `scalar.py`, placements in `layout.py`, everything that involves another rank in
`collectives.py` (its docstring lists the order of collectives in a step).
"""

import hashlib
import logging
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from curvadion import dion, gate, scalar
from curvadion.collectives import WIRE, Answer, Collectives, Ledger
from curvadion.layout import (
    Axes,
    Layout,
    ShardMesh,
    canonical_name,
    check_replicas,
    local_tensor,
    local_tensors,
    partial_axes,
    ranks_of,
    replicate_group,
    reshard_gathered_modules,
    usual_gradients,
)
from curvadion.muon import newton_schulz
from curvadion.options import GROUP_OPTIONS, OPTIMIZER_OPTIONS, check_group, check_options, check_parameter
from curvadion.outer import Outer
from curvadion.state import Batch, assign, check_loadable, copy_into, hash_tensors, make_batches, or_zeros
from curvadion_kernels import Ops, choose
from curvadion_kernels.reference import FAILED_KEY, NO_NORM, NONFINITE_BIT, SYNCHRONIZE_BIT, Fixed, compute_dtype, scale_

logger = logging.getLogger(__name__)

LEAST_TAU, MOST_TAU = 1e-6, 1e6  # where it stops
GAIN = 0.3  # of the controller that steers tau: how much log(tau) moves for one synchronization too many or too few

RELOAD = "; the momentum has swallowed this step's gradients: load the last checkpoint (load_state_dict) before going on"


class NonFiniteError(RuntimeError):
    """A gradient held a NaN or an infinity; raised on every rank in the same step, parameters untouched."""


class ReplicaMismatchError(RuntimeError):
    """Ranks disagree on what must be common: weights at the start, hyper-parameters, the list of parameters, or the step."""


class CurvaDion(torch.optim.Optimizer):
    r"""Dion with synchronization across replicas gated by the relative maximum momentum change (RMMC).

    Per matrix X (m x n, "out x in"), replica i, mean over replicas E_i[.]::

        m_i = M_i + G_i
        rho = max over matrices and replicas of | ||m_t|| - ||m_{t-1}|| | / ||m_{t-1}||

        rho > tau, synchronized step:               rho <= tau, local step:
          P   = orthogonalize(E_i[m_i Q])             "gradient":  M_i <- mu m_i
          R_i = m_i^T P,  R = E_i[R_i]                             X_i <- (1 - lr wd) X_i - lr_local G_i
          M_i <- m_i - (1 - mu) P R_i^T               "dion":      as on the left without E_i[.], lr_local for lr
          Q   <- column_normalize(R)
          X_i <- E_i[X_i] if a local step happened since the last synchronized one
          X   <- (1 - lr wd) X - lr sqrt(m/n) P Q^T      "muon":      M_i <- mu m_i
                                                                 X_i <- (1 - lr wd) X_i - lr_local sqrt(m/n) newton_schulz(m_i)

    With consensus="outer" a synchronized step is a local step (no factors are exchanged, AdamW keeps this replica's gradients), and then,
    X_0 being the parameters after the last synchronized step and C rounding to `outer_bits` with error feedback (`curvadion.payload`)::

          D   = C(E_i[C(X_0 - X_i)]),   U <- outer_momentum U + D
          X   = X_0 - outer_lr (D + outer_momentum U)

    A local step sends one 8-byte all-reduce over `replicate_mesh` and nothing else there. A missing gradient counts as zero: momentum
    and weights decay. Parameters with ``requires_grad=False`` at construction are left alone.

    Args:
        params: anything torch accepts: parameters, named parameters, or groups. A group may set every option marked [g], and
            ``algorithm``: "dion" (default; 2-D parameters only), "adamw" or "lion". See `param_groups_for`.
        lr: learning rate [g], a number or a 0-d tensor.
        replicate_mesh: the slow axis: a 1-D `DeviceMesh`, a `ProcessGroup`, or None for one replica. FSDP must not see it.
        momentum: mu [g].
        weight_decay: decoupled, uses lr on both branches [g].
        rank_fraction, rank_multiple_of: r = round_up(rank_fraction * min(m, n), rank_multiple_of), at most min(m, n) [g].
        tau: threshold of the gate, strict [g]: it opens when any matrix exceeds its group's. inf leaves the bounds alone in charge.
        warmup_steps: synchronize the first steps. The very first one always is.
        min_local_steps: after a synchronized step, ignore RMMC for that many steps.
        max_local_steps: after that many local steps in a row the next one is synchronized; 0 synchronizes every step.
        local_update: "gradient", "dion" or "muon" [g].
        local_lr_scale: lr_local = local_lr_scale * lr, for matrices on local steps [g].
        consensus: "average" makes replicas equal again at each synchronized step; "outer" as well, by the equations above, with one
            more copy of the parameters in memory, one for U if there is outer momentum, and one for what rounding keeps back if
            outer_bits < 32; "none" is the literal formula, and drifts.
        outer_lr, outer_momentum: of consensus="outer"; 1 and 0 are plain averaging.
        outer_bits: bits per parameter between replicas with consensus="outer": 32, 16 (bfloat16), or 8, 4, 2, 1 with a scale for each 128.
        outer_fragments: parts of the parameters that take turns: each synchronized step makes one of them common, so that none sends
            more than its share; each is synchronized every outer_fragments-th time.
        outer_delay: steps for which a synchronization is under way while replicas go on, so that nobody waits for a slow link: begun at the
            end of step t, its second half at the end of step t + ceil(outer_delay / 2), it moves the parameters at the end of step
            t + outer_delay; an even number hides both halves alike. 0 waits for it. Costs one more copy of the parameters that are under
            way, two with outer_bits=32.
        outer_on_host: keep X_0 in the host's memory, from where it is fetched at each synchronized step.
        target_sync_rate: share of synchronized steps: tau is multiplied by exp(GAIN (opened - rate)) each time the gate is asked, so that
            it opens that often in the long run, whatever the level of RMMC. None leaves tau alone.
        gate_every: ask the other replicas in every so-manieth step only, and whenever warmup_steps or max_local_steps say so; in between
            nothing at all crosses replicas, RMMC opens nothing, and a replica that meets a NaN or an error takes no step until it can tell.
        gate_lag: 0: each step waits for the answer of the other replicas. 1: local steps do not; the key travels until the next step,
            which is synchronized if the answer says so, and waits. RMMC then never opens two steps in a row, and a replica that meets
            a NaN or an error takes no step until the others know, one step later.
        error_feedback: keep in the momentum what the low-rank update left out; False is M_i <- mu m_i [g].
        right_factor: "column_norm" (Dion) or "qr" (Orth-Dion) [g].
        betas, eps: of AdamW and Lion [g].
        momentum_dtype: of momentum and moments; None for the parameter's own.
        payload_dtype: of P, R and AdamW/Lion gradients between replicas; None for the tensor's own.
        orthogonalization: "cholesky_qr" or "qr", see `curvadion.dion.orthogonalize` [g].
        on_nonfinite: "raise": every rank raises `NonFiniteError` in the same step, parameters untouched, and state has to be loaded again.
            "skip": every rank skips the step and everything stays as it was (momentum and gradients are read once more); with gate_every
            or gate_lag, in a step that does not ask, only the replica that saw it, and its counters go on.
        check_every: steps between checks that all ranks agree on step, options and weights; 0 for the first step only.
        kernels: "auto" takes Triton's kernels where they compile for the parameters' device, plain torch elsewhere, and logs which;
            "triton" and "reference" ask for one of them. The attribute `kernels` tells.

    Raises:
        ValueError, TypeError: an option or a layout breaks a rule; the message names it, what was got and what to try.

    Source: Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv:2504.05295, for the update; Douillard et al., "DiLoCo",
    arXiv:2311.08105, for the outer step with Nesterov momentum.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then leaves skipping to step(), where all ranks agree
    _built = False
    # Made by `_build`, which runs again when a group is added.
    _params: list[Tensor]
    _outer: Outer | None = None
    _collectives: Collectives
    _ops: Ops
    _X: Fixed[Tensor] | None
    _reshaped: list[str]  # names of parameters that changed shape
    _batches: list[Batch]
    _owned: Tensor
    _last_norm: Tensor
    _rmmc: Tensor
    _counters: Tensor

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        replicate_mesh: DeviceMesh | ProcessGroup | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        rank_fraction: float = 0.25,
        rank_multiple_of: int = 1,
        tau: float = 0.1,
        warmup_steps: int = 0,
        min_local_steps: int = 0,
        max_local_steps: int | None = None,
        local_update: str = "gradient",
        local_lr_scale: float = 1.0,
        consensus: str = "average",
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        outer_bits: int = 32,
        outer_fragments: int = 1,
        outer_delay: int = 0,
        outer_on_host: bool = False,
        target_sync_rate: float | None = None,
        gate_every: int = 1,
        gate_lag: int = 0,
        error_feedback: bool = True,
        right_factor: str = "column_norm",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum_dtype: torch.dtype | None = None,
        payload_dtype: torch.dtype | None = None,
        orthogonalization: str = "cholesky_qr",
        on_nonfinite: str = "raise",
        check_every: int = 1000,
        kernels: str = "auto",
    ):
        options = {
            "warmup_steps": warmup_steps,
            "min_local_steps": min_local_steps,
            "max_local_steps": max_local_steps,
            "consensus": consensus,
            "outer_lr": outer_lr,
            "outer_momentum": outer_momentum,
            "outer_bits": outer_bits,
            "outer_fragments": outer_fragments,
            "outer_delay": outer_delay,
            "outer_on_host": outer_on_host,
            "target_sync_rate": target_sync_rate,
            "gate_every": gate_every,
            "gate_lag": gate_lag,
            "momentum_dtype": momentum_dtype,
            "payload_dtype": payload_dtype,
            "on_nonfinite": on_nonfinite,
            "check_every": check_every,
            "kernels": kernels,
        }
        defaults = {
            "algorithm": "dion",
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rank_fraction": rank_fraction,
            "rank_multiple_of": rank_multiple_of,
            "tau": tau,
            "local_update": local_update,
            "local_lr_scale": local_lr_scale,
            "error_feedback": error_feedback,
            "right_factor": right_factor,
            "orthogonalization": orthogonalization,
            "betas": betas,
            "eps": eps,
        }
        check_options(options, OPTIMIZER_OPTIONS)
        check_group(defaults)
        self._options = SimpleNamespace(**options)
        self._replicate_group = replicate_group(replicate_mesh)
        self._steps = self._local_steps = self._synchronized_steps = self._skipped_steps = 0
        self._dense_bytes_total = 0
        self._in_consensus = False
        self._diverged = False  # replicas hold different state, so that a checkpoint would be a patchwork
        self._must_synchronize = False
        self._check_pending = True
        self._broken: str | None = None
        self._held: str | None = None  # "failed" or "nonfinite": what this replica has to tell the others when the gate asks next
        self._held_failure: Exception | None = None
        self._held_names: list[str] = []
        self._answer: Answer | None = None  # to the key of the step before, with gate_lag
        self._decision = gate.decode(0)
        super().__init__(params, defaults)
        self._build()

    # ---- one step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; every rank of every replica calls it. Returns the closure's value.

        Raises:
            NonFiniteError: on every rank, see `on_nonfinite`.
            ReplicaMismatchError: on every rank, see `check_every`.
            RuntimeError: on every rank, when one of them could not do its part.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._broken:
            raise RuntimeError(self._broken)
        self._refuse_inside_consensus("step()")
        self.ledger.begin_step()
        self._check_agreement_if_due()

        with record_function("curvadion::gate"):
            X = self._local_parameters()
            G, failure = self._gather_gradients()
            sums = self._accumulate_momentum(G, store=not self._skips)
            due = self._must or self._steps % self._options.gate_every == 0
            told = self._last_answer()
            self._must_synchronize |= told.synchronize  # until there is a step that is not skipped
            asked = due
            if self._options.gate_lag:
                asked = self._must or told.failed or told.nonfinite
            key, norm, rmmc = self._gate(sums, failed=failure is not None, ask=asked, ask_later=due and not asked)
            arrived = self._fetch(key)
            if failure is None:  # enqueued before the key is known here; does nothing unless it says "local step"
                if self._outer is not None:
                    self._outer.remember(X)
                self._gradient_step(X, G, key)
            decision = gate.decode(arrived())
        if decision.failed or decision.nonfinite:
            if asked or self.replicas == 1:
                self._refuse(decision, failure, G)
            else:
                self._steer(decision, due)
                self._hold(decision, failure, G, X)
            return loss
        self._last_norm.copy_(norm)
        self._rmmc = rmmc
        if self._skips:
            self._accumulate_momentum(G, store=True)

        if decision.synchronize and self._outer is None:
            with record_function("curvadion::synchronized_step"):
                self._make_common(X, average=self._parameters_differ and self._options.consensus == "average")
                self._dion_step(self._batches, X, synchronized=True)
                self._scalar_step(X, self._mean_gradients(X, G))
        else:
            with record_function("curvadion::local_step"):
                if decision.synchronize:  # the key has kept it from happening above
                    self._gradient_step(X, G, None)
                self._dion_step(self._with_rule("dion"), X, synchronized=False)
                self._muon_step(self._with_rule("muon"), X)
                self._scalar_step(X, G)
                self._postpone_decay([*self._with_rule("gradient"), *self._with_rule("muon")])
        if self._outer is not None and (decision.synchronize or self._outer.in_flight):
            with record_function("curvadion::outer_step"):
                self._outer.advance_(X, self._outer_momenta())
                if decision.synchronize:
                    self._outer.depart_(X, self._outer_momenta(), turn=self._synchronized_steps, **self._spread)
        self._steer(decision, due)
        self._count(decision)
        self._broken = None
        return loss

    def _local_parameters(self) -> Fixed[Tensor]:
        """Return this rank's part of all parameters: the same object as long as nobody moved them."""
        X = Fixed(local_tensors(self._params))
        addresses = X.addresses  # looked up now: it remembers them, and the next step compares
        if self._X is None or not all(map(operator.is_, X, self._X)) or addresses != self._X.addresses:
            self._X = X
            self._reshaped = [n for n, x, layout in zip(self._names, X, self._layouts, strict=True) if tuple(x.shape) != layout.local_shape]
        return self._X

    def _gather_gradients(self) -> tuple[Fixed[Tensor | None], Exception | None]:
        """Return this rank's part of all gradients, None for a missing one, and what was wrong with them or the groups, if anything.

        Never raises: the other ranks have to hear of it through the gate.
        """
        failure: Exception | None = None
        try:
            self._check_groups()
        except Exception as error:
            failure = error
        grads = [p.grad for p in self._params]
        usual = None if self._partial else usual_gradients(self._params, grads, self._placements)
        G: Fixed[Tensor | None] = Fixed(usual or ())
        try:
            parts = (G.take(self._matrices), G.take(self._scalars)) if usual is not None else ()
            fine = tuple(part.numels for part in parts) == self._numels and all(part.contiguous for part in parts)
        except RuntimeError:  # not strided
            fine = False
        if not fine:
            G, strange_failure = self._inspect_gradients(grads)
            failure = failure or strange_failure
        if failure is not None:  # what does not fit must not reach a kernel
            G = Fixed([None] * len(G))
        scale = getattr(self, "grad_scale", None)  # torch.amp.GradScaler sets this and found_inf for the time of step()
        if scale is not None and G.present:
            torch._foreach_mul_(G.present, float(1 / scale))
        return G, failure

    def _inspect_gradients(self, grads: Sequence[Tensor | None]) -> tuple[Fixed[Tensor | None], Exception | None]:
        """Do what `_gather_gradients` does, one by one."""
        X = self._local_parameters()
        G: list[Tensor | None] = []
        failure: Exception | None = None
        for i, (p, x, g) in enumerate(zip(self._params, X, grads, strict=True)):
            try:
                if not p.requires_grad:
                    raise RuntimeError(
                        f"requires_grad must stay as it was at construction; it was switched off for {self._names[i]!r}; to freeze a "
                        "parameter, give its group lr=0 and momentum=0"
                    )
                if g is not None:
                    axes, divisor = partial_axes(g, p, self._shards)
                    if axes:
                        self._partial[i] = axes, divisor
                    g = local_tensor(g)
                    if i in self._partial and not axes:  # whole this time; it is summed all the same, for all ranks to do the same
                        g = g * (self._partial[i][1] / self._shards.count(self._partial[i][0]))
                    if g.layout != torch.strided or g.shape != x.shape:
                        raise ValueError(
                            f"a gradient must be dense and shaped like its parameter's shard {tuple(x.shape)}; got {g.layout}, "
                            f"{tuple(g.shape)} for {self._names[i]!r}; use dense gradients (nn.Embedding(sparse=False))"
                        )
            except Exception as error:
                failure, g = failure or error, None
            G.append(g)
        self._sum_partial(X, G)
        return Fixed(G), failure

    def _check_groups(self) -> None:
        """Raise if parameters or options were changed in a way that this optimizer cannot follow."""
        current = [p for group in self.param_groups for p in group["params"]]
        if list(map(id, current)) != list(map(id, self._group_params)):
            raise RuntimeError(
                "the parameters in param_groups must be those the optimizer was built with; they were replaced; "
                "construct CurvaDion after the model is sharded, wrapped and moved"
            )
        if self._reshaped:
            raise RuntimeError(
                f"parameters must keep the shapes they had at construction; {', '.join(self._reshaped[:5])} changed; construct a new "
                "optimizer for a changed model"
            )
        if any(p.requires_grad for p in self._frozen):
            raise RuntimeError(
                "requires_grad must stay as it was at construction; it was switched on for some parameter; to train a parameter from now "
                "on, leave it out at first and add_param_group() it later"
            )
        for group in self.param_groups:
            if not GROUP_OPTIONS.keys() <= group.keys():
                missing = sorted(GROUP_OPTIONS.keys() - group.keys())
                raise ValueError(f"a parameter group must keep its options; {', '.join(missing)} went missing; set them again")
            check_options(group, GROUP_OPTIONS, " in a parameter group")
        for b in self._batches:
            group = self.param_groups[b.group]
            r = dion.rank_of(min(b.layout.shape), group["rank_fraction"], group["rank_multiple_of"])
            if r != b.Q.shape[-1]:
                raise ValueError(
                    f"rank_fraction and rank_multiple_of must stay as they were at construction; got r = {r} for Q of {b.Q.shape[-1]} "
                    "columns; construct a new optimizer to change the rank"
                )

    def _sum_partial(self, X: Sequence[Tensor], G: list[Tensor | None]) -> None:
        """Sum the gradients that tensor parallelism leaves Partial over the axes they are partial on."""
        members = sorted(self._partial)
        axes = [self._partial[i][0] for i in members]
        summed = self._collectives.sum_over_shards([or_zeros(G[i], X[i]) for i in members], axes, "partial_gradients")
        for i, g in zip(members, summed, strict=True):
            G[i] = g / self._partial[i][1]

    def _accumulate_momentum(self, G: Fixed[Tensor | None], *, store: bool) -> Tensor:
        """m_i <- M_i + G_i; return the gate's message: ||m_i||^2 of every matrix, and whether another gradient is not finite.

        With store=False only the message, for a step that may be skipped.
        """
        decay = self._per_matrix("decay", [b.decay for b in self._batches], self._batch_of)  # what the last step postponed
        if store:
            for b in self._batches:
                b.decay = 1.0
            self._broken = f"an earlier step() did not come to its end{RELOAD}"
        watch = G.take(self._scalars).present
        return self._ops.momentum_norm_(self._momenta, G.take(self._matrices), decay=decay, watch=watch, store=store).to(self._device)

    @property
    def _must(self) -> bool:
        """Whether this step is synchronized whatever RMMC says; the same on all ranks."""
        o = self._options
        return self._must_synchronize or gate.must_synchronize(
            step=self._steps,
            local_steps=self._local_steps,
            warmup_steps=o.warmup_steps,
            max_local_steps=o.max_local_steps,
        )

    def _gate(self, sums: Tensor, *, failed: bool, ask: bool, ask_later: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Reduce norms and flags over the shards, the key over the replicas; return the key, norms and RMMC, all on the device.

        With ask=False the key stays inside this replica and says "local step", unless something is wrong here; with ask_later it also
        goes to the other replicas, and the next step reads what came of it.
        """
        failed = failed or self._held == "failed"
        if not self._owns_all:
            sums[:-2].mul_(self._owned)
        if hasattr(self, "found_inf"):
            sums[-2:-1].add_(self.found_inf.to(sums))
        if failed or self._held:
            sums[-2:-1].fill_(torch.nan if failed else 1.0)
        if self._must:
            sums[-1:].fill_(1.0)  # a slice: a number assigned to an element would make the host wait for the device
        sums = self._collectives.sum_over_all_shards(sums, "norms")
        taus = [math.inf if failed else float(group["tau"]) for group in self.param_groups]
        tau = self._on_device("tau", taus, self._group_of_matrix, torch.float32)
        hold_closed = not (ask or ask_later) or self._local_steps + ask_later < self._options.min_local_steps
        norm, rmmc, key = self._ops.gate_key(sums, self._last_norm, tau, hold_closed=hold_closed)
        if ask:
            return self._collectives.max_over_replicas(key), norm, rmmc
        if ask_later:  # of a step that this replica skips, nobody need know
            skipped = torch.where((key & NONFINITE_BIT) != 0, 0, key) if self._skips else key
            self._answer = self._collectives.start_max_over_replicas(torch.where(key == FAILED_KEY, key, skipped))
        return torch.where(key == FAILED_KEY, key, key & ~SYNCHRONIZE_BIT), norm, rmmc

    def _last_answer(self) -> gate.Decision:
        """Return what the replicas answered to the key of the step before, if it was sent with gate_lag."""
        answer, self._answer = self._answer, None
        return gate.decode(answer.read() if answer is not None else 0)

    def _steer(self, decision: gate.Decision, due: bool) -> None:
        """tau <- tau exp(GAIN (opened - rate)), the rate being that of steps on which the gate is due to be asked."""
        o = self._options
        if o.target_sync_rate is not None and self._steps >= max(1, o.warmup_steps):
            factor = math.exp(GAIN * (decision.synchronize - o.target_sync_rate * o.gate_every * due))
            for group in self.param_groups:
                tau = float(group["tau"])
                if 0 < tau < math.inf:
                    group["tau"] = min(max(tau * factor, LEAST_TAU), MOST_TAU)

    def _gradient_step(self, X: Fixed[Tensor], G: Fixed[Tensor | None], key: Tensor | None) -> None:
        """X_i <- (1 - lr wd) X_i - lr_local G_i for "gradient" matrices, if the key, where there is one, says "local step"."""
        members = self._gradient_matrices(tuple(group["local_update"] for group in self.param_groups))
        if not members:
            return
        lr = [float(group["lr"]) for group in self.param_groups]
        decay = [1 - rate * group["weight_decay"] for rate, group in zip(lr, self.param_groups, strict=True)]
        step_size = [rate * group["local_lr_scale"] for rate, group in zip(lr, self.param_groups, strict=True)]
        of = [self._group_of[i] for i in members]
        self._ops.local_step_(
            X.take(members),
            G.take(members),
            decay=self._per_matrix("local_decay", decay, of),
            step_size=self._per_matrix("local_step_size", step_size, of),
            key=key,
        )

    def _gradient_matrices(self, rules: tuple[str, ...]) -> tuple[int, ...]:
        """Return the matrices whose group's local rule is "gradient"."""
        if rules not in self._members:
            self._members[rules] = tuple(i for i in self._matrices if rules[self._group_of[i]] == "gradient")
        return self._members[rules]

    def _fetch(self, key: Tensor) -> Callable[[], int]:
        """Start copying the key to the host; the function returned waits for that copy, and not for what is enqueued after it."""
        if not key.is_cuda:
            return lambda: int(key)
        self._host_key.copy_(key, non_blocking=True)
        copied = torch.cuda.current_stream(key.device).record_event()

        def wait() -> int:
            copied.synchronize()
            return int(self._host_key)

        return wait

    def _postpone_decay(self, batches: Sequence[Batch]) -> None:
        """M_i <- mu m_i, by the kernel that reads the momentum anyway, in the next step; `_settle` does it before anyone looks."""
        for b in batches:
            b.decay = self.param_groups[b.group]["momentum"]

    def _settle(self) -> None:
        """Apply what `_postpone_decay` left for later."""
        late = [b for b in self._batches if b.decay != 1.0]
        if late:
            with torch.no_grad():
                scale_([b.momentum for b in late], [b.decay for b in late])
            for b in late:
                b.decay = 1.0

    def _dion_step(self, batches: Sequence[Batch], X: Sequence[Tensor], *, synchronized: bool) -> None:
        """P, R_i, R, M_i, Q and X of the synchronized step, or the same on this replica alone."""
        for chosen in self._by_method(batches):
            method = self.param_groups[chosen[0].group]
            factors = dion.power_iteration(
                [b.M for b in chosen],
                [b.Q for b in chosen],
                rows=self._side(chosen, [b.layout.long for b in chosen]),
                columns=self._side(chosen, [b.layout.short for b in chosen]),
                reduce_P=self._reduction(chosen, [b.columns for b in chosen], synchronized),
                reduce_R=self._reduction(chosen, [b.rows for b in chosen], synchronized, keep_own=True),
                orthogonalization=method["orthogonalization"],
                right_factor=method["right_factor"],
                payload_dtype=self._options.payload_dtype if synchronized else None,
                column_sumsq=self._ops.column_sumsq,
            )
            for b, f in zip(chosen, factors, strict=True):
                group = self.param_groups[b.group]
                lr, (m, n), feedback = float(group["lr"]), b.layout.shape, group["error_feedback"]
                self._ops.low_rank_apply_(
                    [X[i] for i in b.params],
                    b.momentum if feedback else None,
                    f.P,
                    f.Q if f.scale is None else None,
                    f.R,
                    scale=f.scale,
                    transposed=b.layout.transposed,
                    decay=1 - lr * group["weight_decay"],
                    step_size=lr * (1.0 if synchronized else group["local_lr_scale"]) * math.sqrt(m / n),
                    feedback=1 - group["momentum"],
                )
                if not feedback:
                    self._postpone_decay([b])
                b.Q.copy_(f.Q)
                b.common_Q = synchronized

    def _muon_step(self, batches: Sequence[Batch], X: Sequence[Tensor]) -> None:
        """X_i <- (1 - lr wd) X_i - lr_local sqrt(m/n) newton_schulz(m_i)."""
        if not batches:
            return
        directions = newton_schulz(
            [b.M for b in batches],
            rows=self._side(batches, [b.layout.long for b in batches]),
            columns=self._side(batches, [b.layout.short for b in batches]),
        )
        for b, direction in zip(batches, directions, strict=True):
            group = self.param_groups[b.group]
            lr, (m, n) = float(group["lr"]), b.layout.shape
            direction = (direction.mT if b.layout.transposed else direction).contiguous()
            self._ops.local_step_(
                [X[i] for i in b.params],
                list(direction.unbind()),
                decay=1 - lr * group["weight_decay"],
                step_size=lr * group["local_lr_scale"] * math.sqrt(m / n),
            )

    def _scalar_step(self, X: Sequence[Tensor], G: Sequence[Tensor | None]) -> None:
        """AdamW or Lion for everything that is not a hidden matrix."""
        for index, group in enumerate(self.param_groups):
            if group["algorithm"] == "dion":
                continue
            members = [i for i in self._scalars if self._group_of[i] == index and X[i].numel()]
            if not members:
                continue
            x = [X[i] for i in members]
            g = [or_zeros(G[i], X[i]) for i in members]
            moments = {k: [self._moments[i][k] for i in members] for k in scalar.MOMENTS[group["algorithm"]]}
            common = {"lr": float(group["lr"]), "betas": tuple(group["betas"]), "weight_decay": group["weight_decay"]}
            if group["algorithm"] == "adamw":
                steps = self._counters[0, members]
                scalar.adamw_(x, g, moments, steps, eps=group["eps"], **common)
            else:
                scalar.lion_(x, g, moments, **common)

    def _count(self, decision: gate.Decision) -> None:
        self._decision = decision
        self._steps += 1
        self._local_steps = 0 if decision.synchronize else self._local_steps + 1
        self._synchronized_steps += decision.synchronize
        self._must_synchronize = False
        self._diverged = self.replicas > 1 or self._outer is not None or self._answer is not None
        self._dense_bytes_total += self._dense_bytes
        self._counters[0] += 1
        self._write_counters()
        self.ledger.end_step()

    def _write_counters(self) -> None:
        self._counters[1].fill_(self._local_steps)
        self._counters[2].fill_(self._synchronized_steps)

    def _hold(self, decision: gate.Decision, failure: Exception | None, G: Sequence[Tensor | None], X: Sequence[Tensor]) -> None:
        """Take no step on this replica, whose ranks alone know what happened, and let it tell the others when the gate asks next."""
        if self._outer is not None:
            with suppress(RuntimeError) if decision.failed else nullcontext():  # parameters may not be what they were
                self._outer.advance_(X, self._outer_momenta())
        for b in self._with_rule("dion"):  # as in the replicas that take the step
            b.common_Q = False
        if decision.failed or not self._skips:
            self._held = "failed" if decision.failed else self._held or "nonfinite"
            self._held_failure = self._held_failure or failure
            self._held_names = self._held_names or self._nonfinite_names(G)
        self._skipped_steps += 1
        self._count(decision)
        self._broken = None

    def _nonfinite_names(self, G: Sequence[Tensor | None]) -> list[str]:
        return [n for n, g in zip(self._names, G, strict=True) if g is not None and not bool(g.isfinite().all())]

    def _refuse(self, decision: gate.Decision, failure: Exception | None, G: Sequence[Tensor | None]) -> None:
        """Skip the step, or raise on this rank as on every other. Parameters are untouched so far."""
        failure, here = failure or self._held_failure, self._held_names
        self._held, self._held_failure, self._held_names = None, None, []
        if decision.failed:
            if not self._skips:
                self._broken = "an earlier step() failed on some rank" + RELOAD
            if failure is not None:
                raise failure
            raise RuntimeError("another rank could not do its part of step(); its own error says why")
        if self._skips:
            self._decision = decision
            self._skipped_steps += 1
            self.ledger.end_step()
            return
        self._broken = "a gradient held a NaN or an infinity in an earlier step()" + RELOAD
        here = here or self._nonfinite_names(G)
        where = "on another rank, or a momentum whose squared norm overflows float32"
        if here:
            where = f"on this rank in {', '.join(here[:5])}{' and others' if len(here) > 5 else ''}"
        raise NonFiniteError(
            f"gradients must be finite; got a NaN or an infinity {where}, after {self._steps} steps. Parameters are untouched"
            f"{RELOAD}, or construct with on_nonfinite='skip' to skip such steps"
        )

    # ---- between replicas

    @property
    def replicas(self) -> int:
        """The number K of replicas."""
        return self._collectives.replicas

    @property
    def diverged(self) -> bool:
        """Whether replicas may hold different state: any step since `synchronize()`, a load, or `discard_divergence()`."""
        return self._diverged

    @property
    def ledger(self) -> Ledger:
        """Calls and bytes of this rank, by (axis, purpose), since construction."""
        return self._collectives.ledger

    @torch.no_grad()
    def synchronize(self) -> None:
        """Make all replicas equal: average parameters, momentum and moments, make Q common. Every rank calls it.

        For use before a checkpoint and at the end. The gate's previous norms are rescaled by ||E_i[M_i]|| / E_i[||M_i||],
        because momenta shrink when they are averaged and the next step would be synchronized for that alone.
        """
        self._refuse_inside_consensus("synchronize()")
        self._settle()
        if self._options.gate_every > 1 or self._options.gate_lag:
            self._tell()
        X = [local_tensor(p) for p in self._params]
        if self._outer is not None and self._diverged:
            self._outer.settle_(X, self._outer_momenta(), **self._spread)
        if self.replicas > 1 and self._diverged:
            self._make_common(X, average=self._parameters_differ or self._outer is not None)
            norms = self._momentum_norms()
            self._collectives.average_([b.momentum for b in self._batches], [b.layout.copied for b in self._batches], "momentum")
            of_mean = self._momentum_norms()
            together = torch.stack([norms, self._last_norm])
            _, [mean] = self._collectives.mean_over_replicas([together], [()], [self._shards.axes], "norms")
            mean_norm, last = mean
            ratio = torch.where(mean_norm > 0, of_mean / mean_norm, 0.0)
            self._last_norm.copy_(torch.where(last < 0, NO_NORM, last * ratio))
        if self._diverged:
            reshard_gathered_modules()
        if self._outer is not None:
            self._outer.forget()
        self._local_steps = 0
        self._write_counters()
        self._diverged = False

    def _tell(self) -> None:
        """Raise on every rank if some replica has met a NaN or an error since the gate asked last."""
        self._last_answer()
        key = FAILED_KEY if self._held == "failed" else NONFINITE_BIT if self._held else 0
        told = self._collectives.max_over_replicas(torch.tensor(key, dtype=torch.int64, device=self._device))
        decision = gate.decode(int(told))
        if decision.failed or decision.nonfinite:
            self._refuse(decision, None, [None] * len(self._params))

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Hold the mean over replicas of the parameters inside the context, this replica's own after it. Every rank enters it.

            with opt.consensus():
                loss = evaluate(model)

        Costs one copy of the local parameters. Enter and leave it between steps, not between a forward and its backward.
        """
        self._refuse_inside_consensus("consensus()")
        own: list[Tensor] | None = None
        with torch.no_grad():
            if self._parameters_differ:
                X = [local_tensor(p) for p in self._params]
                own = [x.clone() for x in X]
                self._collectives.average_(X, self._copied, "parameters")
                reshard_gathered_modules()
        self._in_consensus = True
        try:
            yield
        finally:
            self._in_consensus = False
            if own is not None:
                with torch.no_grad():
                    copy_into([local_tensor(p) for p in self._params], own)
                    reshard_gathered_modules()

    @torch.no_grad()
    def broadcast_parameters(self) -> None:
        """Give every replica the parameters of replica 0. Every rank calls it; for the start of a run."""
        self._refuse_inside_consensus("broadcast_parameters()")
        X = [local_tensor(p) for p in self._params]
        self._collectives.broadcast_(X, self._copied, "parameters")
        reshard_gathered_modules()
        if self._outer is not None:
            self._outer.forget()
        self._check_pending = True

    def discard_divergence(self) -> None:
        """Declare this replica's state worthless, so that a checkpoint can be loaded over it without synchronizing first.

        Loaders such as torch.distributed.checkpoint ask for `state_dict()`, which is refused while replicas differ.
        """
        self._diverged = False

    def _refuse_inside_consensus(self, call: str) -> None:
        if self._in_consensus:
            raise RuntimeError(f"{call} must not be called inside consensus(), which puts the old parameters back; leave the context first")

    @property
    def _parameters_differ(self) -> bool:
        always = self._options.consensus == "none" or self._options.outer_fragments > 1 or self._options.outer_delay > 0
        return self.replicas > 1 and self._diverged and (self._local_steps > 0 or always)

    def _make_common(self, X: Sequence[Tensor], *, average: bool) -> None:
        """X_i <- consensus(X_i), the same for moments; Q <- replica 0's where the replicas' Q differ."""
        if average:
            self._collectives.average_(X, self._copied, "parameters")
            moments = [(moment, self._copied[i]) for i in self._scalars for moment in self._moments[i].values()]
            self._collectives.average_([m for m, _ in moments], [copied for _, copied in moments], "moments")
        differ = [b for b in self._batches if not b.common_Q]
        self._collectives.broadcast_([b.Q for b in differ], [self._shards.complement(b.columns) for b in differ], "right_factor")
        for b in differ:
            b.common_Q = True

    def _mean_gradients(self, X: Sequence[Tensor], G: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients with those of AdamW and Lion parameters averaged over the replicas."""
        mean = list(G)
        local = [or_zeros(G[i], X[i]) for i in self._scalars]
        copied = [self._copied[i] for i in self._scalars]
        dtype = self._options.payload_dtype
        _, reduced = self._collectives.mean_over_replicas(local, [()] * len(local), copied, "gradients", payload_dtype=dtype)
        for i, g in zip(self._scalars, reduced, strict=True):
            mean[i] = g
        return mean

    def _reduction(
        self, batches: Sequence[Batch], partial: Sequence[Axes], synchronized: bool, *, keep_own: bool = False
    ) -> Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
        """Return what sums factors over the shards where they are partial and, on a synchronized step, averages over replicas."""
        copied, dtype = [b.layout.copied for b in batches], self._options.payload_dtype

        def reduce(factors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            if synchronized:
                return self._collectives.mean_over_replicas(factors, partial, copied, "factors", payload_dtype=dtype, keep_own=keep_own)
            own = self._collectives.sum_over_shards(factors, partial, "factors")
            return own, own

        return reduce

    def _side(self, batches: Sequence[Batch], dims: Sequence[int]) -> dion.Side:
        """Tell `dion.power_iteration` how the rows of a factor, which run along dimension `dims[k]` of matrix k, are spread."""
        axes = [b.layout.sharded[dim] for b, dim in zip(batches, dims, strict=True)]

        def gather(factors: list[Tensor]) -> list[Tensor]:
            whole = list(factors)
            for k, (f, b, dim) in enumerate(zip(factors, batches, dims, strict=True)):
                if axes[k]:
                    whole[k] = f.new_zeros(f.shape[0], b.layout.shape[dim], f.shape[-1])
                    b.layout.take(whole[k], dim, 1).copy_(f)
            return self._collectives.sum_over_shards(whole, axes, "gram")

        return dion.Side(
            sum=lambda tensors, purpose: self._collectives.sum_over_shards(tensors, axes, purpose),
            gather=gather,
            take=lambda factors: [b.layout.take(f, d, 1) for f, b, d in zip(factors, batches, dims, strict=True)],
        )

    def _check_agreement_if_due(self) -> None:
        """Raise `ReplicaMismatchError` on every rank if ranks disagree on step, options or, where they should be equal, weights."""
        every = self._options.check_every
        if not (self._check_pending or (every and self._steps % every == 0)):
            return
        comparable = self.replicas > 1 and not self._parameters_differ
        weights = hash_tensors([local_tensor(p) for p in self._params]) if comparable else 0
        different = self._collectives.agree(self._steps, self._hash_config(), weights)
        if "config" in different:
            raise ReplicaMismatchError(
                "all ranks must construct CurvaDion with the same options and the same list of parameters; they differ on some "
                "rank; compare the arguments, the parameter groups and the model on each of them"
            )
        if "step" in different:
            raise ReplicaMismatchError(
                f"all ranks must be at the same step; this one has taken {self._steps}, another a different number; load the same "
                "checkpoint everywhere, and call step() on every rank or on none"
            )
        if "weights" in different and self._steps:
            raise ReplicaMismatchError(
                f"replicas must hold equal weights after a synchronized step or a load; after {self._steps} steps they differ; if a "
                "checkpoint was loaded, load the same model and optimizer everywhere; if hardware or shard layouts differ between "
                "replicas, so does rounding: construct with check_every=0"
            )
        if "weights" in different:
            raise ReplicaMismatchError(
                "replicas must hold equal weights here (FSDP does not compare or broadcast across replicate_mesh); they differ; "
                "seed every replica alike, load the same checkpoint, or call opt.broadcast_parameters() before the first step"
            )
        self._check_pending = False

    def _hash_config(self) -> int:
        """Return 62 bits that are equal on two ranks if everything that must be common is."""
        groups = [
            {key: float(value) if key == "lr" else value for key, value in group.items() if key in GROUP_OPTIONS}
            for group in self.param_groups
        ]
        params = [
            (name, tuple(p.shape), str(p.dtype), of, str(layout.placements))
            for name, p, of, layout in zip(self._names, self._params, self._group_of, self._layouts, strict=True)
        ]
        options = {**vars(self._options), "kernels": self.kernels}  # which round differently, so that replicas would drift apart
        text = repr((options, [sorted(g.items()) for g in groups], params, self.replicas))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 2

    # ---- what a user can see

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State by parameter, as in every torch optimizer; M with all its decay, whatever a kernel has postponed."""
        if self._built:
            self._settle()
        return self.__dict__["state"]

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.__dict__["state"] = value

    @property
    def kernels(self) -> str:
        """Where the hot operations run: "triton" or "reference"."""
        return self._ops.kernels

    @property
    def matrix_names(self) -> list[str]:
        """Names of the matrices, in the order of `metrics()["curvadion/rmmc_argmax"]`.

        An unnamed one has its position for a name; one whose name was there before gets its position appended.
        """
        names = [self._names[i] for i in self._matrices]
        return [name if names.index(name) == k else f"{name}#{self._matrices[k]}" for k, name in enumerate(names)]

    def named_rmmc(self) -> dict[str, float]:
        """Return each matrix's RMMC of the last step on this replica; NaN where it is undefined. Reads from the device."""
        return dict(zip(self.matrix_names, self._rmmc.tolist(), strict=True))

    def drift(self) -> tuple[float, float] | None:
        """Return what this rank's part of the last outer step says about how far apart replicas were; reads from the device.

        Sums of squares of (X_0 - X_i) - D, this replica's own way minus the common one, and of D. Summed over the shards, the root of
        their ratio is the relative distance of this replica from the mean. None without consensus="outer" and before its first step.
        """
        if self._outer is None or self._outer.apart is None:
            return None
        own, common = self._outer.apart.tolist()
        return own, common

    def metrics(self) -> dict[str, float]:
        """Return what the last step did and the totals since construction, as floats. No collective, no device access.

        Keys, all under ``curvadion/``: ``step``, ``synchronized`` (0 or 1), ``sync_rate`` (share of steps), ``steps_since_sync``, ``tau``
        (the smallest of all groups), ``rmmc_max`` (NaN if undefined), ``rmmc_argmax`` (index into `matrix_names`, -1 if none),
        ``skipped_steps``; ``bytes/<axis>`` and ``bytes/<axis>/<purpose>`` of the last step and ``bytes_total/...``, this rank's buffers;
        ``wire/<axis>`` and ``wire_total/<axis>``, the bytes that leave this rank for them (`curvadion.collectives.WIRE`);
        ``dense_bf16_bytes`` and ``..._total``, the buffer of this rank's share of a bfloat16 all-reduce of all gradients,
        ``dense_bf16_wire`` and ``..._total``, what leaves this rank for that.
        """
        d = self._decision
        values: dict[str, float] = {
            "step": self._steps,
            "synchronized": d.synchronize and not d.nonfinite,
            "sync_rate": self._synchronized_steps / max(self._steps, 1),
            "steps_since_sync": self._local_steps,
            "tau": min((float(group["tau"]) for group in self.param_groups if group["algorithm"] == "dion"), default=math.nan),
            "rmmc_max": d.rmmc,
            "rmmc_argmax": d.argmax,
            "skipped_steps": self._skipped_steps,
            "dense_bf16_bytes": self._dense_bytes,
            "dense_bf16_bytes_total": self._dense_bytes_total,
            "dense_bf16_wire": self._dense_bytes * WIRE["all_reduce"](self.replicas),
            "dense_bf16_wire_total": self._dense_bytes_total * WIRE["all_reduce"](self.replicas),
        }
        for prefix, sent in (("wire", self.ledger.last_step_wire), ("wire_total", self.ledger.wire)):
            for axis in ("replicate", "shard"):
                values[f"{prefix}/{axis}"] = sum(n for (a, _), n in sent.items() if a == axis)
        for prefix, counted in (("bytes", self.ledger.last_step), ("bytes_total", self.ledger.bytes)):
            for axis in ("replicate", "shard"):
                values[f"{prefix}/{axis}"] = sum(n for (a, _), n in counted.items() if a == axis)
            values.update({f"{prefix}/{axis}/{purpose}": n for (axis, purpose), n in counted.items()})
        return {f"curvadion/{key}": float(value) for key, value in values.items()}

    # ---- state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at construction or later; the next step is synchronized. With consensus="outer", right after `synchronize()`."""
        if self._built and self._outer is not None and self._outer.under_way:
            raise RuntimeError(
                "with consensus='outer' a group must be added when nothing is under way between replicas; a step was taken since they were "
                "equal; call opt.synchronize() on every rank first"
            )
        check_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for position, p in enumerate(group["params"]):
                name = group.get("param_names", {position: f"number {position}"})[position]
                check_parameter(name, p, group["algorithm"])
            if self._built:
                self._build()
                self._must_synchronize = self._check_pending = True
        except Exception:
            self.param_groups.pop()
            if self._built:
                self._build()
            raise

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; never communicates.

        Raises RuntimeError if there are several replicas and they may differ.
        """
        if self._diverged:
            raise RuntimeError(
                f"the state of {self.replicas} replicas must be equal to be saved (a checkpoint would be a patchwork of them, and lack "
                "what is under way with consensus='outer'); a step was taken since; call opt.synchronize() on every rank before saving, or "
                "opt.discard_divergence() before loading"
            )
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict into the existing state, dtypes and memory kept. Groups take the saved hyper-parameters, as in torch.

        Raises ValueError, before anything is changed, if it does not fit.
        """
        self._refuse_inside_consensus("load_state_dict()")
        own, groups = self.state, self.param_groups
        saved: dict[str, Any] = {}

        def saved_states() -> list[tuple[Tensor, dict[str, Any]]]:
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            number_of = dict(zip(self._group_params, numbers, strict=True))
            return [(p, saved["state"].get(number_of[p], {})) for p in self._params]

        def check(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            saved.update(final)
            sizes = [len(group["params"]) for group in groups]
            if [len(group["params"]) for group in saved["param_groups"]] == sizes:  # otherwise torch says what is wrong
                states = [(name, values, own[p]) for name, (p, values) in zip(self._names, saved_states(), strict=True)]
                check_loadable(saved["param_groups"], groups, states)

        def restore(_: torch.optim.Optimizer) -> None:
            self.state = own
            for group, before in zip(self.param_groups, groups, strict=True):
                for key in GROUP_OPTIONS:
                    group.setdefault(key, before[key])
            for p, values in saved_states():
                for key, value in values.items():
                    assign(own[p][key], value)
            self._read_counters()

        # The last hook before torch casts every state to its parameter's dtype, and the first one after.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        for b in self._batches:
            b.common_Q = True
        if self._outer is not None:
            self._outer.forget()
        self._diverged, self._must_synchronize, self._check_pending, self._broken = False, False, True, None
        self._held, self._held_failure, self._held_names = None, None, []
        self._answer = None

    def _read_counters(self) -> None:
        steps, local_steps, synchronized_steps = self._counters.amax(dim=1).tolist() if self._params else (0, 0, 0)
        self._steps, self._local_steps, self._synchronized_steps = int(steps), int(local_steps), int(synchronized_steps)

    _COPIED = (
        *("_options", "_steps", "_local_steps", "_synchronized_steps", "_skipped_steps", "_dense_bytes_total"),
        *(
            "_must_synchronize",
            "_check_pending",
            "_broken",
            "_held",
            "_held_failure",
            "_held_names",
            "_answer",
            "_outer",
            "_decision",
            "_in_consensus",
        ),
    )

    def __getstate__(self) -> dict[str, Any]:
        if self._replicate_group is not None or self._shards.mesh is not None:
            raise TypeError("a CurvaDion on a mesh or process group cannot be copied or pickled; save opt.state_dict() instead")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._COPIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_options" in state:  # a copy; torch's load_state_dict comes through here as well
            self._replicate_group = None
            self._diverged = self._answer is not None or (self._outer is not None and self._outer.under_way)
            self._build()

    @torch.no_grad()
    def _build(self) -> None:
        """Lay out all parameters and (re)allocate state, keeping the values of state that exists."""
        if self._built:
            self._settle()
        self._group_params = [p for group in self.param_groups for p in group["params"]]
        self._frozen = [p for p in self._group_params if not p.requires_grad]
        named = [
            (canonical_name(name), p, index)
            for index, group in enumerate(self.param_groups)
            for name, p in zip(group.get("param_names", [""] * len(group["params"])), group["params"], strict=True)
        ]
        live = [(name or str(i), p, index) for i, (name, p, index) in enumerate(named) if p.requires_grad]
        self._names = [name for name, _, _ in live]
        self._params = [p for _, p, _ in live]
        self._group_of = [index for _, _, index in live]
        algorithms = [self.param_groups[index]["algorithm"] for index in self._group_of]
        self._matrices = tuple(i for i, algorithm in enumerate(algorithms) if algorithm == "dion")
        self._scalars = tuple(i for i, algorithm in enumerate(algorithms) if algorithm != "dion")
        self._members: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._group_of_matrix = [self._group_of[i] for i in self._matrices]
        devices = {local_tensor(p).device for p in self._params}
        if len(devices) > 1:
            raise ValueError(f"all parameters of a rank must be on one device; got {sorted(map(str, devices))}; move the model first")
        self._device = next(iter(devices), torch.device("cpu"))

        self._ops = choose(self._options.kernels, self._device)
        logger.info("kernels: %s (%s)", self._ops.kernels, self._ops.why)

        self._shards = ShardMesh(self._params)
        if self._shards.mesh is not None and self._shards.mesh.device_type != self._device.type:
            raise ValueError(
                f"parameters must be on their mesh's device type; got {self._device} on {self._shards.mesh}; FSDP's CPU offload is not "
                "supported, keep the shards on the accelerator"
            )
        self._layouts = [Layout.of(p, self._shards) for p in self._params]
        check_replicas(ranks_of(self._replicate_group), self._shards, self._layouts)
        ledger = self._collectives.ledger if self._built else Ledger()
        self._collectives = Collectives(self._shards, self._replicate_group, self._device, ledger)

        o = self._options
        if self._outer is None and o.consensus == "outer":
            self._outer = Outer(**{name.removeprefix("outer_"): value for name, value in vars(o).items() if name.startswith("outer_")})
        if self._outer is not None:
            self._outer.allocate([local_tensor(p) for p in self._params])
        self._numels = tuple(tuple(math.prod(self._layouts[i].local_shape) for i in members) for members in (self._matrices, self._scalars))
        self._placements = [p.placements if isinstance(p, DTensor) else None for p in self._params]
        self._X = None
        self._reshaped = []
        self._copied = [layout.copied for layout in self._layouts]
        sizes = [math.prod(layout.shape) for layout in self._layouts]
        self._spread: dict[str, Any] = {"sizes": sizes, "copied": self._copied, "collectives": self._collectives}
        first = [self._shards.is_first(copied) for copied in self._copied]
        self._owned = torch.tensor([float(first[i]) for i in self._matrices], dtype=torch.float32, device=self._device)
        owned = sum(local_tensor(p).numel() for p, mine in zip(self._params, first, strict=True) if mine)
        self._dense_bytes = 2 * owned if self.replicas > 1 else 0
        self._owns_all = all(first[i] for i in self._matrices)
        self._uploaded: dict[str, tuple[tuple[list[float], list[int]], Tensor]] = {}
        self._host_key = torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=self._device.type == "cuda")
        self._partial: dict[int, tuple[Axes, int]] = {}  # parameters whose gradients came Partial once
        self._rmmc = torch.full((len(self._matrices),), torch.nan, dtype=torch.float32, device=self._device)
        self._last_norm = torch.full((len(self._matrices),), NO_NORM, dtype=torch.float32, device=self._device)
        self._counters = torch.zeros(3, len(self._params), dtype=torch.float32, device="cpu")
        self._batches = make_batches(
            self._matrices,
            names=self._names,
            params=self._params,
            layouts=self._layouts,
            group_of=self._group_of,
            groups=self.param_groups,
            momentum_dtype=self._options.momentum_dtype,
        )
        views = {i: momentum for b in self._batches for i, momentum in zip(b.params, b.momentum, strict=True)}
        self._momenta = Fixed(views[i] for i in self._matrices)
        batch_of = {i: k for k, b in enumerate(self._batches) for i in b.params}
        self._batch_of = [batch_of[i] for i in self._matrices]

        index_of = {position: index for index, position in enumerate(self._matrices)}
        for b in self._batches:
            for Q, i in zip(b.Q, b.params, strict=True):
                self._set_state(
                    i,
                    momentum=b.layout.wrap(views[i]),
                    Q=b.layout.wrap_right_factor(Q),
                    last_norm=self._last_norm[index_of[i]],
                )
        self._moments: dict[int, dict[str, Tensor]] = {}
        for i in self._scalars:
            moments = scalar.MOMENTS[algorithms[i]]
            shape, dtype = self._layouts[i].local_shape, self._options.momentum_dtype or self._params[i].dtype
            self._moments[i] = {key: torch.zeros(shape, dtype=dtype, device=self._device) for key in moments}
            self._set_state(i, **{key: self._layouts[i].wrap(value) for key, value in self._moments[i].items()})
        taus = [group["tau"] for group in self.param_groups if group["algorithm"] == "dion"]
        if self._options.target_sync_rate is not None and not self._built and not any(0 < tau < math.inf for tau in taus):
            raise ValueError(
                f"target_sync_rate steers tau, which must be finite and above 0 in some group of matrices to start from; got {taus}; try "
                "tau=0.1, or for a fixed interval leave target_sync_rate out and set max_local_steps"
            )
        if not self._matrices and self._params and self.replicas > 1 and self._options.max_local_steps is None:
            raise ValueError(
                "with several replicas and no matrix, whose RMMC opens the gate, max_local_steps must be set; got None; try 0, which "
                "synchronizes every step"
            )
        self._built = True

    def _set_state(self, i: int, **tensors: Tensor) -> None:
        """Make the tensors the state of parameter i, with the values of its state so far where there is one."""
        p = self._params[i]
        if self._outer is not None and self._outer.momentum:
            x = local_tensor(p)
            tensors["outer_momentum"] = self._layouts[i].wrap(torch.zeros_like(x, dtype=compute_dtype(x.dtype)))
        fresh = {
            "step": self._counters[0, i],
            "synchronized_steps": self._counters[2, i],
            "local_steps": self._counters[1, i],
            **tensors,
        }
        for key, value in self.state.get(p, {}).items():
            assign(fresh[key], value)
        self.state[p] = fresh

    def _outer_momenta(self) -> list[Tensor]:
        """Return U of every parameter, none without outer momentum."""
        state = self.__dict__["state"]
        return [local_tensor(state[p]["outer_momentum"]) for p in self._params if "outer_momentum" in state[p]]

    def _momentum_norms(self) -> Tensor:
        """Return ||M_i||_F of every matrix, (L,) float32."""
        sumsq = self._ops.momentum_norm_(self._momenta, [None] * len(self._momenta), store=False)[:-2].to(self._device)
        return self._collectives.sum_over_all_shards(sumsq * self._owned, "norms").sqrt()

    def _on_device(self, name: str, values: Sequence[float], of: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return values[of[l]] for every matrix l as a tensor on the device, uploaded only when something changed."""
        before, tensor = self._uploaded.get(name, (None, None))
        if tensor is None or before != (values, of):
            host = torch.tensor([values[k] for k in of], dtype=dtype, device="cpu", pin_memory=self._device.type == "cuda")
            tensor = host.to(self._device, non_blocking=True)
            self._uploaded[name] = (list(values), list(of)), tensor
        return tensor

    def _per_matrix(self, name: str, values: Sequence[float], of: Sequence[int]) -> float | Tensor:
        """Return the number that values[of[l]] is for every matrix l, or else all of them on the device."""
        different = {values[k] for k in set(of)}
        return self._on_device(name, values, of, torch.float64) if len(different) > 1 else next(iter(different), 1.0)

    def _with_rule(self, rule: str) -> list[Batch]:
        return [b for b in self._batches if self.param_groups[b.group]["local_update"] == rule]

    def _by_method(self, batches: Sequence[Batch]) -> list[list[Batch]]:
        """Split batches by what `dion.power_iteration` takes one value of."""
        chosen: dict[tuple[str, str], list[Batch]] = {}
        for b in batches:
            group = self.param_groups[b.group]
            chosen.setdefault((group["orthogonalization"], group["right_factor"]), []).append(b)
        return [chosen[key] for key in sorted(chosen)]

    @property
    def _skips(self) -> bool:
        """Whether a non-finite step is skipped: by option, or because a GradScaler is at work."""
        return self._options.on_nonfinite == "skip" or hasattr(self, "found_inf")
