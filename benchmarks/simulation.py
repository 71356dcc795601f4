"""K replicas in one process, on one CPU core or one GPU: for settings that the optimizer has, and for some that it has not.

`Replicas` takes the same steps as `CurvaDion` on K unsharded replicas (tests/test_simulation.py compares them, parameter by parameter),
with the library's own mathematics on tensors that are stacked along a first dimension of K. What the library does not offer, because
the study found no use for it, can still be tried here: see `Setting`.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from curvadion import param_groups_for
from curvadion.algebra import power_iteration as dion
from curvadion.algebra import scalar
from curvadion.algebra.newton_schulz import newton_schulz
from curvadion.consensus.codec import CODECS, Grid

CHUNK = 4096  # of top-k


@dataclass(frozen=True)
class Setting:
    """What K replicas do in a step, and what they send.

    Attributes:
        baseline: gradients are averaged in every step, so replicas never differ.
        rule: of matrices: "muon", "dion", "gradient" or "adamw".
        momentum, nesterov: mu, and whether Muon takes G + mu m for m.
        consensus: "outer"; or "average", where a synchronized step averages parameters and AdamW moments and then takes a step of Dion (of
            rank_fraction) and AdamW with what all replicas have in common, as in the paper; everything in float32.
        interval: steps from one synchronization to the next; math.inf for none after the first.
        gate: what opens it: "interval"; "rmmc", "directional" (||m_t - m_{t-1}|| / ||m_{t-1}||, the largest of all matrices), "drift"
            (||X_i - X_0||, the largest of all replicas), each with a threshold steered so that 1 / interval of the steps synchronize;
            "qsr" (interval proportional to 1 / lr^2), "late" (interval proportional to lr).
        threshold_power: of the learning rate, to which the threshold is proportional.
        bits, mean_bits: of the pseudo-gradient, and of its mean on the way back (None: the same); negative: so many of 4096 values,
            at 14 bits each.
        tau, warmup: a fixed threshold in place of a steered one, and the first steps, all synchronized.
        two_stages: the mean is rounded and sent back; without, everybody sends to everybody.
        error_feedback: keep what rounding leaves out, and send it later.
        outer_lr, outer_momentum: as in the optimizer.
        at_synchronization: what happens to momentum: "keep", "average" (in as many bits) or "reset".
        fragments: synchronize one of so many parts of the parameters at a time, so many times as often.
        delay: steps for which a synchronization is under way.
    """

    name: str
    baseline: bool = False
    rule: str = "muon"
    rank_fraction: float = 1.0
    lr: float = 0.02
    adamw_lr: float = 3e-3
    momentum: float = 0.9
    nesterov: bool = False
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
    at_synchronization: str = "keep"
    fragments: int = 1
    delay: int = 0

    @property
    def bits_sent(self) -> float:
        """Bits per parameter and synchronization, as an all-reduce of so many bits would send them; over K/2 with one stage."""
        there, back = self.bits, self.bits if self.mean_bits is None else self.mean_bits
        return (_bits(there) + _bits(back)) / 2


def _bits(bits: int) -> float:
    if bits < 0:
        return (-bits * 14 + 16) / CHUNK
    return bits if bits >= 16 else bits + 16 / Grid.block


def _round(x: Tensor, bits: int) -> Tensor:
    """Return what arrives of x, (K, N) or (N,)."""
    if bits == 32:
        return x
    if bits > 0:
        codec = CODECS[bits]
        return codec.decode(codec.encode(x.reshape(-1)), x.dtype).view_as(x)
    chunks = x.view(-1, CHUNK)
    indices = chunks.abs().topk(-bits, -1).indices
    kept = chunks.gather(-1, indices)
    levels = torch.where(kept.abs() > kept.abs().mean(-1, keepdim=True), 1.5, 0.6) * kept.sign()
    scale = (levels * kept).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True).clamp_min(1e-30)
    return torch.zeros_like(chunks).scatter_(-1, indices, levels * scale).view_as(x)


class Replicas:
    """K replicas of a model and their optimizer.

    Args:
        model: the common start; not changed.
        setting: what they do.
        count: K.

    Attributes:
        models: K copies, whose parameters are views of X and whose gradients are views of G.
        X, G: by parameter name, (K, *shape).
        steps, synchronized: steps so far, and how many of them were synchronized.
        sent: bytes that one replica's buffers held, with all-reduces of so many bytes as the unit.
        drift: sqrt(E_i ||X_i - E[X]||^2) / ||E[X] - X_0|| just before the last synchronization; None in other steps.
        signal: what the gate looked at in the last step.
    """

    def __init__(self, model: nn.Module, setting: Setting, count: int):
        self.setting, self.K = setting, count
        self._synchronized_rule = "dion" if setting.consensus == "average" else setting.rule
        names = {id(p): name for name, p in model.named_parameters()}
        everything = {"": "adamw"} if setting.rule == "adamw" else None
        groups = param_groups_for(model, adamw_lr=setting.adamw_lr, overrides=everything)
        members = [(names[id(p)], p, g) for g in groups for _, p in g["params"]]
        self.models = [copy.deepcopy(model) for _ in range(count)]
        self.X = {name: p.detach().expand(count, *p.shape).clone() for name, p, _ in members}
        self.G = {name: torch.zeros_like(x) for name, x in self.X.items()}
        for k, replica in enumerate(self.models):
            for name, p in replica.named_parameters():
                p.data, p.grad = self.X[name][k], self.G[name][k]
        self.matrices = [name for name, _, g in members if g.get("algorithm", "dion") == "dion"]
        self.scalars = [[names[id(p)] for _, p in g["params"]] for g in groups if g.get("algorithm", "dion") != "dion"]
        self._decay = {name: g.get("weight_decay", setting.weight_decay) for name, _, g in members}
        self.M = {name: torch.zeros_like(self.X[name]) for name in self.matrices}
        self.Q = (
            {name: self._first_right_factor(name) for name in self.matrices} if "dion" in (setting.rule, self._synchronized_rule) else {}
        )
        self.moments = [{key: [torch.zeros_like(self.X[n]) for n in part] for key in scalar.MOMENTS["adamw"]} for part in self.scalars]
        self.numel = sum(x[0].numel() for x in self.X.values())

        self._multiple = count * math.lcm(Grid.block, CHUNK if setting.bits < 0 else Grid.block) * setting.fragments
        self._reference = self._flat(self.X)[0].clone()
        self._residual, self._mean_residual = torch.zeros_like(self._flat(self.X)), torch.zeros_like(self._reference)
        self._outer_momentum = torch.zeros_like(self._reference)
        self._flights: list[tuple[int, slice, Tensor, Tensor]] = []  # step and part of the parameters, X_0 - X_i and D
        self._log_tau: float | None = None
        self._last_norms: Tensor | None = None
        self._since = self._local_steps = self.steps = self.synchronized = 0
        self.sent = 0.0
        self.drift: float | None = None
        self.signal: float | None = None

    def _first_right_factor(self, name: str) -> Tensor:
        short = min(self.X[name].shape[1:])
        Q = dion.initial_right_factor(name, short, dion.rank_of(short, self.setting.rank_fraction, 1)).to(self.X[name])
        return Q.expand(self.K, *Q.shape).clone()

    def _flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        flat = torch.cat([t.reshape(self.K, -1) for t in tensors.values()], dim=1)
        return pad(flat, (0, -flat.shape[1] % self._multiple))

    @torch.no_grad()
    def step(self, factor: float = 1.0, *, last: bool = False) -> bool:
        """Take one step with the gradients in G; return whether it was synchronized.

        Args:
            factor: of both learning rates, by schedule.
            last: synchronize in any case.
        """
        s = self.setting
        if s.baseline:
            for g in self.G.values():
                g.copy_(g.mean(0, keepdim=True).expand_as(g))
        before = {name: m.clone() for name, m in self.M.items()} if s.gate == "directional" else {}
        for name, m in self.M.items():
            m.add_(self.G[name])
        self.signal = self._look(before)
        synchronize = s.baseline or self._opens(factor) or self.steps < s.warmup or last
        together = synchronize and s.consensus == "average"
        self.drift = None
        if together:
            self._average()
        self._update_matrices(factor * s.lr, self._synchronized_rule if together else s.rule, together=together)
        for names, moments in zip(self.scalars, self.moments, strict=True):
            X, G = [[tensors[name] for name in names] for tensors in (self.X, self.G)]
            if together:
                G = [g.mean(0, keepdim=True).expand_as(g).contiguous() for g in G]
                self.sent += sum(4 * g[0].numel() for g in G)
            options = {"lr": factor * s.adamw_lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": self._decay[names[0]]}
            scalar.adamw_(X, G, moments, torch.full((len(X),), float(self.steps)), **options)

        self.steps += 1
        self._local_steps += 1
        for flight in [flight for flight in self._flights if self.steps - flight[0] >= s.delay]:
            self._arrive(flight)
        if s.baseline:
            self.sent += 2 * self.numel
        elif synchronize and s.consensus == "outer":
            self._synchronize(whole=last or self.steps <= s.warmup, wait=last)
        if synchronize:
            self._since += 1
            self._local_steps = 0
            self.synchronized += 1
        return synchronize

    def _average(self) -> None:
        """X_i <- E_i[X_i], the same for moments, and Q <- Q_0, if a local step happened since the last time."""
        if not self._local_steps:
            return
        flat = self._flat(self.X)
        D = self._reference - flat
        self.drift = float((D - D.mean(0)).square().sum(1).mean().sqrt() / D.mean(0).norm().clamp_min(1e-30))
        for t in [*self.X.values(), *(m for part in self.moments for both in part.values() for m in both)]:
            t.copy_(t.mean(0, keepdim=True).expand_as(t))
            self.sent += 4 * t[0].numel()
        for Q in self.Q.values():
            Q.copy_(Q[:1].expand_as(Q))
            self.sent += 2 * Q[0].numel() if self.setting.rule == "dion" else 0  # a broadcast is half an all-reduce
        self._reference = self._flat(self.X)[0].clone()

    def _update_matrices(self, lr: float, rule: str, *, together: bool) -> None:
        """X_i and M_i, one batch of equal shapes after the other; `together` averages P and R over the replicas."""

        def over_replicas(factors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            if not together:
                return factors, factors
            self.sent += sum(4 * f.numel() / self.K for f in factors)
            stacked = [f.unflatten(0, (-1, self.K)) for f in factors]
            return factors, [f.mean(1, keepdim=True).expand_as(f).flatten(0, 1) for f in stacked]

        s = self.setting
        shapes: dict[torch.Size, list[str]] = {}
        for name in self.matrices:
            shapes.setdefault(self.X[name].shape[1:], []).append(name)
        for (rows, cols), names in shapes.items():
            M = torch.cat([self.M[name] for name in names])
            M = M.mT if rows < cols else M
            if rule == "gradient":
                update, scale = torch.cat([self.G[name] for name in names]), 1.0
                M = M * s.momentum
            elif rule == "muon":
                G = torch.cat([self.G[name] for name in names])
                [update] = newton_schulz([s.momentum * M + (G.mT if rows < cols else G) if s.nesterov else M])
                update, scale = update.mT if rows < cols else update, math.sqrt(rows / cols)
                M = M * s.momentum
            else:
                Q = torch.cat([self.Q[name] for name in names])
                [f] = dion.power_iteration([M], [Q], reduce_P=over_replicas, reduce_R=over_replicas)
                M = M - (1 - s.momentum) * f.P @ f.R.mT
                update, scale = f.P @ f.Q.mT, math.sqrt(rows / cols)
                update = update.mT if rows < cols else update
                for name, new in zip(names, f.Q.chunk(len(names)), strict=True):
                    self.Q[name].copy_(new)
            M = M.mT if rows < cols else M
            for name, m, u in zip(names, M.chunk(len(names)), update.chunk(len(names)), strict=True):
                self.M[name].copy_(m)
                self.X[name].mul_(1 - lr * self._decay[name]).add_(u, alpha=-lr * scale)

    def _look(self, before: Mapping[str, Tensor]) -> float | None:
        """Return the gate's signal, None where it has none."""
        gate, signal = self.setting.gate, None
        norms = torch.stack([m.flatten(1).norm(dim=1) for m in self.M.values()]) if self.M else None
        if gate == "rmmc" and self._last_norms is not None:
            signal = float(((norms - self._last_norms).abs() / self._last_norms).max())
        elif gate == "directional" and self._last_norms is not None:
            changes = [(self.M[name] - m).flatten(1).norm(dim=1) / m.flatten(1).norm(dim=1) for name, m in before.items()]
            signal = float(torch.stack(changes).max())
        self._last_norms = norms
        return signal

    def _opens(self, factor: float) -> bool:
        s = self.setting
        every = s.interval / s.fragments
        if s.gate == "interval":
            return self._local_steps + 1 >= every
        if s.gate == "qsr":
            return self._local_steps + 1 >= min(every / factor**2, 4 * every)
        if s.gate == "late":
            return self._local_steps + 1 >= max(1.0, every * factor)
        if s.gate == "drift":
            self.signal = float((self._flat(self.X) - self._reference).norm(dim=1).max())
        if self.signal is None:
            return False
        if s.tau is not None:
            return self.signal > s.tau
        if self._log_tau is None and self.signal > 0:
            self._log_tau = math.log(self.signal)
        if self._log_tau is None:
            return False
        opens = self.signal > math.exp(self._log_tau) * factor**s.threshold_power
        self._log_tau += 0.3 * (opens - 1 / every)  # the rate of openings is 1 / every in the long run
        return opens

    def _synchronize(self, *, whole: bool, wait: bool) -> None:
        s = self.setting
        flat = self._flat(self.X)
        length = flat.shape[1] // s.fragments
        for fragment in range(s.fragments) if whole else [self._since % s.fragments]:
            part = slice(fragment * length, (fragment + 1) * length)
            for flight in [flight for flight in self._flights if flight[1] == part]:
                self._arrive(flight)
                flat = self._flat(self.X)
            D = self._reference[part] - flat[:, part]
            if self.drift is None:
                self.drift = float((D - D.mean(0)).square().sum(1).mean().sqrt() / D.mean(0).norm().clamp_min(1e-30))
            wanted = D + self._residual[:, part]
            arrived = _round(wanted, s.bits)
            mean = arrived.mean(0)
            if s.error_feedback:
                self._residual[:, part] = wanted - arrived
            if s.two_stages and s.bits != 32:
                mean = mean + self._mean_residual[part]
                rounded = _round(mean, s.bits if s.mean_bits is None else s.mean_bits)
                if s.error_feedback:
                    self._mean_residual[part] = mean - rounded
                mean = rounded
            self.sent += self.numel / s.fragments * s.bits_sent / 8 * (1 if s.two_stages or s.bits == 32 else self.K / 2)
            self._flights.append((self.steps, part, D, mean))
            if wait or not s.delay:
                self._arrive(self._flights[-1])
        for m in self.M.values() if s.at_synchronization != "keep" else ():
            m.copy_(m.mean(0, keepdim=True).expand_as(m) if s.at_synchronization == "average" else torch.zeros_like(m))
            self.sent += m[0].numel() * s.bits_sent / 8 if s.at_synchronization == "average" else 0

    def _arrive(self, flight: tuple[int, slice, Tensor, Tensor]) -> None:
        """X_i <- X_0 - outer_lr (D + outer_momentum U), or with a delay X_i moves by that minus what X_i was when D left."""
        self._flights.remove(flight)
        s, (_, part, own, mean) = self.setting, flight
        U = self._outer_momentum[part].mul_(s.outer_momentum).add_(mean)
        moved = s.outer_lr * (mean + s.outer_momentum * U)
        self._reference[part] -= moved
        self._reference[self.numel :] = 0.0  # padding
        flat = self._flat(self.X)
        flat[:, part] = flat[:, part] + own - moved if s.delay else self._reference[part]
        start = 0
        for x in self.X.values():
            x.copy_(flat[:, start : start + x[0].numel()].view_as(x))
            start += x[0].numel()

    @torch.no_grad()
    def consensus(self) -> nn.Module:
        """Return a model with the mean of all replicas' parameters."""
        model = copy.deepcopy(self.models[0])
        for name, p in model.named_parameters():
            p.data, p.grad = self.X[name].mean(0), None
        return model
