"""K replicas in one process, on a CPU or a GPU: K optimizers in K threads.

A `Replica` is a model and the `CurvaDion` that a `Setting` asks for; what the optimizer has not is registered
by `variants`. `Replicas` steps K of them together, and they tell each other what processes would.
tests/test_simulation.py compares them, parameter by parameter, with real processes.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from choosing import choosing, seldom
from torch import nn
from variants import codec_of, outer_of, pair_of, rule_of

from curvadion import CurvaDion, param_groups_for
from curvadion.gate.trouble import NonFiniteError
from curvadion.sharding.group import ThreadGroup, computing_threads, results_of
from curvadion.sharding.ledger import WIRE

STEERED = ("rmmc", "directional", "drift")
NEVER = 10**9


@dataclass(frozen=True)
class Setting:
    """What K replicas do in a step, and what they send.

    Attributes:
        baseline: gradients are averaged in every step, so replicas never differ.
        rule: of matrices: `local_update`, "dion, retention 0.9" (`variants.Retained`) or "adamw".
        momentum, nesterov: mu, and whether Muon takes G + mu m for m.
        newton_schulz, newton_schulz_steps: Muon's polynomials and the number of their rounds.
        newton_schulz_dtype, newton_schulz_method: the name of a dtype, and "gram" or "standard".
        consensus: "outer"; or "average", as in the paper.
        interval: steps from one synchronization to the next; math.inf for none after the first.
        gate: what opens it: "interval"; "rmmc", "directional" or "drift" (`variants.Directional`, `Distance`;
            not the optimizer's own "drift"), each with a threshold steered so that 1 / interval of the steps
            synchronize; "qsr" or "late" (`variants.Qsr`, `Late`), whose interval is that at the highest
            learning rate.
        threshold_power: of the learning rate, to which the threshold is proportional.
        bits, mean_bits: of the pseudo-gradient, and of its mean on the way back (None: the same); negative:
            so many of 4096 values, at 14 bits each.
        codec, mean_codec: in place of `bits` and `mean_bits`, codecs as `rounding` names them.
        tau, warmup: a fixed threshold in place of a steered one, and the first steps, all synchronized.
        two_stages: the mean is rounded and sent back; without, everybody sends to everybody.
        error_feedback: keep what rounding leaves out, and send it later.
        outer_lr, outer_momentum: as in the optimizer.
        outer_lr_end: what the outer learning rate comes to as the learning rate falls to 0; None: the same.
        shrink: of each value's mean, by how little replicas agree, see `variants.OtherBack`.
        sawtooth: the share by which the learning rate is higher after a synchronization, and lower before.
        at_synchronization: what happens to momentum, see `variants.OuterVariant`.
        fragments: synchronize one of so many parts of the parameters at a time, so many times as often.
        delay: steps for which a synchronization is under way.
        kept: outer_residual_kept; in the end all replicas go back to X_0.
        choice: the score by which matrices are chosen, see `choosing.Choosing`: of 1 / fragments of all
            elements at a time. "": fragments are the same share of every matrix, and take turns.
        others_every: of the synchronizations, those that are of embedding, head and norms too: every n-th.
        rich: with `choice`, the share of these elements that gets 2 bits.
        decay, end: the share of the steps, the last ones, over which the learning rate falls, and what it
            falls to, as a share of the highest.
        averaged: the final loss is that of the mean of the last so many consensus models, 8 steps apart; 0:
            of the last alone.
        exact, together: what replicas are told in each step, see `oracles.Oracle`; "" and 0: nothing.
    """

    name: str
    baseline: bool = False
    rule: str = "muon"
    rank_fraction: float = 1.0
    lr: float = 0.02
    adamw_lr: float = 3e-3
    momentum: float = 0.9
    nesterov: bool = False
    newton_schulz: str = "jordan"
    newton_schulz_steps: int = 5
    newton_schulz_dtype: str | None = None
    newton_schulz_method: str = "gram"
    weight_decay: float = 0.01
    consensus: str = "outer"
    interval: float = 8
    gate: str = "interval"
    threshold_power: int = 0
    tau: float | None = None
    warmup: int = 1
    bits: int = 32
    mean_bits: int | None = None
    two_stages: bool = True
    error_feedback: bool = True
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    outer_lr_end: float | None = None
    shrink: float = 0.0
    sawtooth: float = 0.0
    at_synchronization: str = "keep"
    fragments: int = 1
    delay: int = 0
    kept: float = 0.0
    codec: str = ""
    mean_codec: str = ""
    choice: str = ""
    rich: float = 0.0
    others_every: int = 1
    decay: float = 1.0
    end: float = 0.1
    averaged: int = 0
    exact: str = ""
    together: float = 0.0


def options_of(setting: Setting) -> dict[str, Any]:
    """Return the setting as arguments of `CurvaDion`."""
    s = setting
    every = s.interval / s.fragments
    options: dict[str, Any] = {
        "lr": s.lr,
        "momentum": s.momentum,
        "weight_decay": s.weight_decay,
        "rank_fraction": s.rank_fraction,
        "local_update": "muon" if s.rule == "adamw" else rule_of(s.rule),  # with AdamW there are no matrices
        "nesterov": s.nesterov,
        "newton_schulz": s.newton_schulz,
        "newton_schulz_steps": s.newton_schulz_steps,
        "newton_schulz_dtype": getattr(torch, s.newton_schulz_dtype) if s.newton_schulz_dtype else None,
        "newton_schulz_method": s.newton_schulz_method,
        "tau": math.inf,
        "check_every": 0,
    }
    if s.baseline:
        return options | {"consensus": "alone"}
    options["warmup_steps"] = s.warmup
    if s.gate == "interval":
        most = NEVER if math.isinf(every) else max(0, math.ceil(every) - 1)
        options |= {"max_local_steps": most, "gate_every": None}
    elif s.gate in STEERED:
        options["gate"] = "distance" if s.gate == "drift" else s.gate
        if s.tau is not None:
            options["tau"] = s.tau
        else:  # `Replica.step` lets it begin where the signal does; until then nothing opens it, or all
            options |= {"tau": 1e-6 if s.threshold_power else 1e6, "target_sync_rate": 1 / every}
    else:
        options |= {"gate": s.gate, "tau": every}
    if s.consensus != "outer":
        return options | {"consensus": s.consensus}
    there = codec_of(s.bits, s.codec)
    back = codec_of(s.mean_bits or s.bits, s.mean_codec) if s.mean_codec or s.mean_bits else there
    two = back != there and s.two_stages
    odd: Any = {"two_stages": s.two_stages, "feedback": s.error_feedback, "momenta": s.at_synchronization}
    odd |= {"shrink": s.shrink, "turning": bool(s.codec or s.mean_codec)}
    odd |= {"of": choosing(s.choice, s.rich)} if s.choice or s.rich else {}
    odd |= {"of": seldom(s.others_every)} if s.others_every > 1 else {}
    return options | {
        "consensus": outer_of(two_codecs=two, **odd),
        "outer_bits": pair_of(there, back) if two else there,
        "outer_lr": s.outer_lr,
        "outer_momentum": s.outer_momentum,
        "outer_fragments": s.fragments,
        "outer_delay": s.delay,
        "outer_residual_kept": s.kept,
    }


class Replica:
    """One replica: a model's optimizer, and what the study does between its steps.

    Args:
        model: its gradients are there when `step` is called.
        group: this replica's place among all; None where gradients have been averaged before.

    Attributes:
        synchronized: whether the last step was.
        signal: what the gate looked at in the last step, the largest of all replicas; None if nothing.
    """

    def __init__(self, model: nn.Module, setting: Setting, group: Any):
        everything = {"": "adamw"} if setting.rule == "adamw" else None
        groups = param_groups_for(model, adamw_lr=setting.adamw_lr, overrides=everything)
        self.setting = setting
        self.opt = CurvaDion(groups, replicate_mesh=group, **options_of(setting))
        for param_group in self.opt.param_groups:
            param_group["initial_lr"] = float(param_group["lr"])
        self._factor, self._begun = 1.0, setting.gate not in STEERED or setting.tau is not None
        self.synchronized = False
        self.signal: float | None = None

    def step(self, factor: float = 1.0, *, last: bool = False) -> None:
        """Take one step; the arguments are those of `Replicas.step`."""
        opt, schedule = self.opt, self.opt._schedule
        if self.setting.sawtooth:
            along = min(1.0, schedule.local_steps / max(1, self.setting.interval - 1))
            factor *= 1 + self.setting.sawtooth * (1 - 2 * along)
        moved = (factor / self._factor) ** self.setting.threshold_power
        self._factor = factor
        for group in opt.param_groups:
            group["lr"] = group["initial_lr"] * factor
            group["tau"] *= moved
        if self.setting.outer_lr_end is not None:
            end = self.setting.outer_lr_end
            outer: Any = opt._consensus
            outer._o = replace(outer._o, lr=end + factor * (self.setting.outer_lr - end))
        if last:  # as in the warm-up: of all fragments
            schedule.options = replace(schedule.options, warmup_steps=schedule.steps + 1)
        opt.step()
        if last and self.setting.delay:
            with torch.no_grad():
                opt._consensus.land(opt._built.step(opt.param_groups, schedule))
        if last and self.setting.kept:
            with torch.no_grad():
                X_0 = opt._consensus.common(opt._built.store)["X_0"]
                torch._foreach_copy_(opt._built.X(), X_0)
        told = opt.metrics()
        if told["curvadion/skipped_steps"]:  # where nobody is asked, it would stand still without a word
            raise NonFiniteError(f"a replica met a NaN or an infinity after {schedule.steps - 1} steps")
        self.synchronized, signal = bool(told["curvadion/synchronized"]), told["curvadion/rmmc_max"]
        self.signal = signal if self.setting.gate != "interval" and math.isfinite(signal) else None
        if not self._begun and self.signal:
            self._begun = True
            threshold = self.signal * factor**self.setting.threshold_power
            for group in opt.param_groups:
                group["tau"] = schedule.steer(threshold, self.synchronized, True)


class Replicas:
    """K replicas of a model, each with its optimizer in a thread of its own.

    Args:
        model: the common start; not changed.
        setting: what they do.
        count: K.

    Attributes:
        models: K copies, whose parameters are views of X and whose gradients are views of G.
        X, G: by parameter name, (K, *shape).
        exact: the names of those whose gradients are averaged before each step: of the baseline all.
        steps, synchronized: steps so far, and how many of them were synchronized.
        drift: sqrt(E_i ||(X_0 - X_i) - D||^2) / ||D||, D being what arrived last, if the last step was
            synchronized; None for the consensus "average".
        signal: what the gate looked at in the last step.
    """

    def __init__(self, model: nn.Module, setting: Setting, count: int):
        self.setting, self.K = setting, count
        self.models = [copy.deepcopy(model) for _ in range(count)]
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.X = {name: p.detach().expand(count, *p.shape).clone() for name, p in parameters}
        self.G = {name: torch.zeros_like(x) for name, x in self.X.items()}
        for k, replica in enumerate(self.models):
            for name, x in self.X.items():
                p = replica.get_parameter(name)
                p.data, p.grad = x[k], self.G[name][k]
        self.numel = sum(x[0].numel() for x in self.X.values())
        self.exact = set(self.X) if setting.baseline else set[str]()
        # Replicas that take the same steps with the same gradients are one.
        self._groups = [None] if setting.baseline else ThreadGroup.of(count)
        pairs = zip(self.models, self._groups, strict=False)
        self._replicas = [Replica(replica, setting, group) for replica, group in pairs]
        self._threads = computing_threads(len(self._groups))
        self.steps = self.synchronized = 0
        self.drift: float | None = None
        self.signal: float | None = None

    def step(self, factor: float = 1.0, *, last: bool = False) -> bool:
        """Take one step with the gradients in G; return whether it was synchronized.

        Args:
            factor: of both learning rates, by schedule.
            last: synchronize in any case, all fragments, and wait for it.
        """
        baseline = self.setting.baseline
        for name in self.exact:
            g = self.G[name]
            g.copy_(g.mean(0, keepdim=True).expand_as(g))
        self._together(lambda replica: replica.step(factor, last=last))
        for x in self.X.values() if baseline else ():
            x[1:] = x[:1]
        first = self._replicas[0]
        synchronized = baseline or first.synchronized
        self.steps += 1
        self.synchronized += synchronized
        self.signal = None if baseline else first.signal
        apart = [told for replica in self._replicas if synchronized and (told := replica.opt.drift())]
        own = sum(own for own, _ in apart) / self.K
        self.drift = math.sqrt(own / max(apart[0][1], 1e-60)) if apart else None
        return synchronized

    def _together(self, act: Callable[[Replica], None]) -> None:
        """Let each replica act in its thread. If one raises, the others' collectives do, and so does this."""

        def guarded(replica: Replica, group: ThreadGroup | None) -> None:
            with group or nullcontext():
                act(replica)

        pairs = zip(self._replicas, self._groups, strict=True)
        results_of([self._threads.submit(guarded, replica, group) for replica, group in pairs])

    def close(self) -> None:
        """End the threads: a process should not fork while they run."""
        self._threads.shutdown()

    @property
    def sent(self) -> dict[str, float]:
        """Bytes so far of the buffers that one replica sent, by purpose; the baseline, bf16 gradients."""
        if self.setting.baseline:
            return {"gradients": 2.0 * self.numel * self.steps}
        counted = self._replicas[0].opt.ledger.bytes
        return {purpose: float(n) for (axis, purpose), n in counted.items() if axis == "replicate" and n}

    @property
    def wire(self) -> float:
        """Bytes so far that left one replica for it."""
        if self.setting.baseline:
            return sum(self.sent.values()) * WIRE["all_reduce"](self.K)
        return sum(n for (axis, _), n in self._replicas[0].opt.ledger.wire.items() if axis == "replicate")

    @torch.no_grad()
    def consensus(self) -> nn.Module:
        """Return a model with the mean of all replicas' parameters."""
        model = copy.deepcopy(self.models[0])
        for name, x in self.X.items():
            p = model.get_parameter(name)
            p.data, p.grad = x.mean(0), None
        return model
