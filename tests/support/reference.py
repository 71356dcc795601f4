"""An independent fp64 reference: one process that simulates K replicas on whole matrices.

Written from the equations below and nothing else, for reading rather than speed: no batching, no sharding, no
process groups, its own orientation, its own QR. The letters: X, G, m, M, P, R, Q, and rho for the RMMC.

    synchronized step (rho > tau):                          local step (rho <= tau):
      P   =  orthogonalize( E_i[ m_i Q ] )                    "gradient":  M_i <- mu m_i
      R_i =  m_i^T P ;  R = E_i[ R_i ]                                   X_i <- (1 - eta wd) X_i - eta_l G_i
      M_i <- m_i - (1 - mu) P R_i^T   or  mu m_i              "dion":    synchronized lines without E_i[.],
      Q   <- column_normalize(R)      or  orthogonalize(R)               on this replica's own m_i and Q_i,
      X_i <- consensus(X_i)                                              eta_l in place of eta
      X   <- (1 - eta wd) X - eta s P Q^T                   "muon":      M_i <- mu m_i
                                                              X_i <- (1 - eta wd) X_i - eta_l s muon(m_i)
                                                            "normuon":  as "muon", with normuon(muon(m_i))
                                                            "dion2":    only m_i's largest slices, see `dion2`

    s, by update_scale: "spectral": sqrt(rows/cols); "match_rms_adamw": 0.2 sqrt(max(rows, cols)); "original":
    sqrt(max(1, rows/cols)). With nesterov "muon" and "normuon" have muon(G_i + mu m_i) in place of muon(m_i).

    no gradient (zero, or missing) in this replica, in a Dion step with E_i[.] in any: 0 in place of the
    update, P and R

    consensus "outer": a synchronized step is a local step, and then, with X_0 the parameters when replicas
    were equal last,
      D = C(E_i[C(X_0 - X_i)]),  U <- outer_mu U + D,  X = X_0 - outer_lr (D + outer_mu U),
    C rounding with error feedback;
    with a delay of d steps, all of this d steps later, when X_i moves by X - (what X_i was);
    with outer_residual_kept = kappa, r_i being what rounding has kept back of replica i's own contribution,
      wanted_i = X_0 - X_i + (1 - kappa) r_i,  sent_i = C(wanted_i),  r_i <- wanted_i - sent_i,
      and X_i goes on from X - kappa r_i in place of X
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# A column is dead when less than this share of the largest column is left after removing the earlier ones.
# Tests keep live columns above 1e-3 and dead ones at rounding (1e-13), so the exact value decides nothing.
DEAD = 1e-7

GROUP_DEFAULTS = {
    "algorithm": "dion",
    "lr": 0.02,
    "momentum": 0.95,
    "weight_decay": 0.01,
    "tau": 0.1,
    "local_update": "gradient",
    "local_lr_scale": 1.0,
    "update_scale": "spectral",
    "nesterov": False,
    "newton_schulz": "jordan",
    "newton_schulz_steps": 5,
    "error_feedback": True,
    "right_factor": "column_norm",
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "rank_fraction": 0.25,
    "rank_multiple_of": 1,
}


# As printed in arXiv:2505.16932, one line for each round, before the safety factor; then always the last.
POLAR_EXPRESS = """
    8.28721201814563     -23.595886519098837   17.300387312530933
    4.107059111542203    -2.9478499167379106   0.5448431082926601
    3.9486908534822946   -2.908902115962949    0.5518191394370137
    3.3184196573706015   -2.488488024314874    0.51004894012372
    2.300652019954817    -1.6689039845747493   0.4188073119525673
    1.891301407787398    -1.2679958271945868   0.37680408948524835
    1.8750014808534479   -1.2500016453999487   0.3750001645474248
"""


def singular_values(S: Tensor, polynomials: str, rounds: int) -> Tensor:
    """What so many rounds of Newton-Schulz make of singular values whose root sum of squares is 1."""
    printed = [[float(word) for word in line.split()] for line in POLAR_EXPRESS.strip().splitlines()]
    for k in range(rounds):
        if polynomials == "jordan":
            S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
        elif k < len(printed):
            a, b, c = printed[k]
            x = S / 1.01
            S = a * x + b * x**3 + c * x**5
        else:
            S = 1.875 * S - 1.25 * S**3 + 0.375 * S**5
    return S


def muon(M: Tensor, polynomials: str = "jordan", rounds: int = 5) -> Tensor:
    """U f(S) V^T, f the polynomials of Newton-Schulz, on the singular values divided by their root sum of
    squares."""
    U, S, V = torch.linalg.svd(M, full_matrices=False)
    if float(S.max()) == 0:
        return torch.zeros_like(M)
    return U @ torch.diag(singular_values(S / S.norm(), polynomials, rounds)) @ V


def normuon(update: Tensor, v: Tensor, beta2: float, eps: float) -> tuple[Tensor, Tensor]:
    """Each row divided by the root of the running mean v of its squares, all of it as large as before; and
    the new v."""
    new, divided = v.clone(), update.clone()
    for i in range(len(update)):
        mean = sum(float(x) ** 2 for x in update[i]) / len(update[i])
        new[i] = beta2 * float(v[i]) + (1 - beta2) * mean
        divided[i] = update[i] / (math.sqrt(float(new[i])) + eps)
    size = float(divided.norm())
    return (divided if size == 0 else divided * float(update.norm()) / size), new


def dion2(m: Tensor, k: int, mu: float, *iteration: Any) -> tuple[Tensor, Tensor]:
    """The update of the k rows (of a tall matrix: columns) with the largest sums of absolute values, and the
    new M."""
    rows, cols = m.shape
    if rows > cols:
        update, M = dion2(m.T, k, mu, *iteration)
        return update.T, M.T.clone()
    size = [float(row.abs().sum()) for row in m]
    chosen = sorted(range(rows), key=lambda i: (-size[i], i))[:k]
    update, M = torch.zeros_like(m), m.clone()
    update[chosen] = muon(m[chosen], *iteration)
    M[chosen] = mu * m[chosen]
    return update, M


def rounded(x: Tensor, bits: int) -> Tensor:
    """Each 128 values on 2^bits levels around zero, at odd multiples of half a step that bfloat16 holds; 16:
    bfloat16."""
    if bits == 16:
        return x.to(torch.bfloat16).to(x.dtype)
    result = torch.empty_like(x)
    for start in range(0, len(x), 128):
        block = x[start : start + 128]
        if bits == 1:
            step = 2 * block.abs().mean()
        elif bits == 2:
            step = 0.996 * (block * block).mean().sqrt()
        else:
            step = 2 * block.abs().max() / 2**bits
        step = step.to(torch.bfloat16).to(x.dtype)
        levels = step * (
            (2**bits - 1) / 2 - torch.arange(2**bits, dtype=x.dtype)
        )  # the larger first: it wins where two are as near
        result[start : start + 128] = levels[(block[:, None] - levels).abs().argmin(dim=1)]
    return result


def scale(convention: object, rows: int, cols: int) -> float:
    """The factor of the learning rate that a shape asks for."""
    if convention == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(rows / cols if convention == "spectral" or rows > cols else 1)


@dataclass(frozen=True)
class Outcome:
    """What one step did."""

    synchronized: bool
    rmmc: dict[str, list[float]]  # per matrix, one value per replica; nan where it is undefined
    margin: float  # the smallest relative distance of a matrix's largest RMMC from its tau


@dataclass
class Replica:
    """What one replica holds, by parameter name."""

    X: dict[str, Tensor]
    M: dict[str, Tensor] = field(default_factory=dict)
    Q: dict[str, Tensor] = field(default_factory=dict)
    last_norm: dict[str, float] = field(default_factory=dict)  # absent: no previous norm
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    second_moment: dict[str, Tensor] = field(default_factory=dict)  # of "normuon", one number for each row
    U: dict[str, Tensor] = field(default_factory=dict)  # outer momentum, the same on all replicas


def rank_of(rows: int, cols: int, rank_fraction: float, rank_multiple_of: int = 1) -> int:
    """r = round_up(rank_fraction * min(rows, cols), rank_multiple_of), at most min(rows, cols)."""
    short = min(rows, cols)
    return min(short, rank_multiple_of * math.ceil(rank_fraction * short / rank_multiple_of))


def live_columns(A: Tensor) -> list[int]:
    """The columns that are not combinations of earlier ones: Gram-Schmidt, each vector orthogonalized
    twice."""
    largest = float(A.norm(dim=0).max())
    basis = torch.zeros_like(A)
    live = []
    for j in range(A.shape[1]):
        v = A[:, j].clone()
        for _ in range(2):
            v -= basis @ (basis.T @ v)
        if largest > 0 and float(v.norm()) > DEAD * largest:
            basis[:, j] = v / v.norm()
            live.append(j)
    return live


def orthogonalize(A: Tensor) -> Tensor:
    """Householder QR of the live columns; a dead column is zero in the result.

    Signs are those of Gram-Schmidt, p_j . a_j > 0. For P they are free, but in Q = orthogonalize(R) a flipped
    column would turn its part of the update P Q^T uphill.
    """
    live = live_columns(A)
    P = torch.zeros_like(A)
    if live:
        q, r = torch.linalg.qr(A[:, live])
        P[:, live] = q * r.diagonal().sign()
    return P


def power_iteration(
    ms: Sequence[Tensor], Q: Tensor, right_factor: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """P, the P Q^T to apply, the new Q and every R_i, for the mean over the given m_i (long side first)."""
    P = orthogonalize(sum(m @ Q for m in ms) / len(ms))
    R = sum(m.T @ P for m in ms) / len(ms)
    if right_factor == "qr":
        new = orthogonalize(R)
    else:
        norms = R.norm(dim=0)
        dead = norms <= DEAD * norms.max()
        new = torch.where(dead, 0.0, R / torch.where(dead, 1.0, norms))
    alive = new.norm(dim=0) > 0
    P = P * alive  # a dead column takes no part in the update or the error feedback ...
    Q = torch.where(alive, new, Q)  # ... and keeps its old column of Q
    return P, P @ Q.T, Q, [m.T @ P for m in ms]


class ReferenceReplicas:
    """K replicas of named parameters, stepped together.

    parameters: the common start, by name. Q0: the first right factor of each matrix that has one.
    groups: for each parameter name the options that differ from the keyword defaults (`algorithm`, `lr`,
    `tau`, ... as in GROUP_DEFAULTS).
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        replicas: int,
        Q0: Mapping[str, Tensor],
        groups: Mapping[str, Mapping[str, object]] | None = None,
        consensus: str = "average",
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        outer_bits: int = 32,
        outer_delay: int = 0,
        outer_fragments: int = 1,
        outer_residual_kept: float = 0.0,
        target_sync_rate: float | None = None,
        gate_every: int = 1,
        gate_lag: int = 0,
        warmup_steps: int = 0,
        min_local_steps: int = 0,
        max_local_steps: int | None = None,
        **defaults: object,
    ) -> None:
        unknown = set(defaults) - set(GROUP_DEFAULTS)
        assert not unknown, f"the reference has no option {unknown}"
        self.group = {
            name: {**GROUP_DEFAULTS, **defaults, **(groups or {}).get(name, {})} for name in parameters
        }
        self.consensus, self.warmup_steps = consensus, warmup_steps
        self.min_local_steps, self.max_local_steps = min_local_steps, max_local_steps
        self.target_sync_rate, self.gate_every = target_sync_rate, gate_every
        self.outer_lr, self.outer_momentum, self.outer_bits = outer_lr, outer_momentum, outer_bits
        self.gate_lag, self.told = gate_lag, False  # told: the step before has opened the gate for this one
        self.outer_delay, self.residual_kept = outer_delay, outer_residual_kept
        # By fragment: when it left, D, and what the X_i were then.
        self.under_way: dict[int, tuple[int, Tensor, list[Tensor]]] = {}
        self.X0 = {name: X.detach().clone() for name, X in parameters.items()}
        self.U = {name: torch.zeros_like(X) for name, X in parameters.items()}
        # All parameters end to end, in their order, are one vector; fragment k has every outer_fragments-th
        # element of it.
        flat = torch.cat([X.detach().flatten() for X in parameters.values()])
        self.parts = [torch.arange(k, len(flat), outer_fragments) for k in range(outer_fragments)]
        lengths = [
            -(-len(part) // (128 * replicas)) * 128 * replicas for part in self.parts
        ]  # what is sent is padded
        self.residuals = [[flat.new_zeros(length) for _ in range(replicas)] for length in lengths]
        self.mean_residual = [flat.new_zeros(length) for length in lengths]
        self.synchronized_steps = 0
        self.matrices = [name for name, group in self.group.items() if group["algorithm"] == "dion"]
        self.others = [name for name, group in self.group.items() if group["algorithm"] != "dion"]
        self.steps = self.local_steps = 0  # all steps; local ones in a row
        self.diverged = False  # a local step happened since replicas were last averaged
        self.replicas = []
        for _ in range(replicas):
            replica = Replica({name: X.detach().clone() for name, X in parameters.items()}, U=dict(self.U))
            for name in self.matrices:
                replica.M[name] = torch.zeros_like(replica.X[name])
                if name in Q0:
                    replica.Q[name] = Q0[name].detach().clone()
                if self.group[name]["local_update"] == "normuon":
                    replica.second_moment[name] = torch.zeros_like(replica.X[name][:, 0])
            for name in self.others:
                replica.exp_avg[name] = torch.zeros_like(replica.X[name])
                replica.exp_avg_sq[name] = torch.zeros_like(replica.X[name])
            self.replicas.append(replica)

    def step(self, gradients: Sequence[Mapping[str, Tensor | None]]) -> Outcome:
        """One step of all replicas; gradients[i][name] is replica i's, None (or no entry) counts as zero."""
        G = [
            {name: torch.zeros_like(X) if g.get(name) is None else g[name] for name, X in replica.X.items()}
            for replica, g in zip(self.replicas, gradients, strict=True)
        ]
        m = [{n: r.M[n] + g[n] for n in self.matrices} for r, g in zip(self.replicas, G, strict=True)]
        rmmc, must = self._rmmc(m)
        largest = {
            n: max((x for x in values if not math.isnan(x)), default=0.0) for n, values in rmmc.items()
        }
        opens = any(largest[n] > self.group[n]["tau"] for n in self.matrices)

        counted = self.steps == 0 or self.steps < self.warmup_steps
        counted = counted or (self.max_local_steps is not None and self.local_steps >= self.max_local_steps)
        asked = counted or self.steps % self.gate_every == 0
        # with a lag it is the next step that synchronizes, and by then there is one local step more
        synchronized = asked and (
            must or (opens and self.local_steps + self.gate_lag >= self.min_local_steps)
        )
        if self.gate_lag:
            told, self.told = self.told, synchronized and not counted and not self.told
            synchronized = told
        synchronized = synchronized or counted
        margins = [
            abs(largest[n] / self.group[n]["tau"] - 1)
            for n in self.matrices
            if self.group[n]["tau"] > 0 and asked
        ]
        if self.target_sync_rate is not None and self.steps >= max(1, self.warmup_steps):
            for group in self.group.values():
                group["tau"] *= math.exp(
                    0.3 * (synchronized - self.target_sync_rate * self.gate_every * asked)
                )

        self.steps += 1
        if synchronized and self.consensus == "outer":
            self._local_step(m, G)
            self._let_arrive()
            everything = self.steps <= max(1, self.warmup_steps)
            for k in range(len(self.parts)) if everything else [self.synchronized_steps % len(self.parts)]:
                if k in self.under_way:
                    self._arrive(k)
                self._outer_step(k)
            self.local_steps = 0
        elif synchronized:
            self._synchronized_step(m, G)
        else:
            self._local_step(m, G)
        self._let_arrive()
        self.synchronized_steps += synchronized
        return Outcome(synchronized, rmmc, min(margins, default=math.inf))

    def _rmmc(self, m: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, list[float]], bool]:
        """rho = | ||m_t|| - ||m_{t-1}|| | / ||m_{t-1}||, and whether some matrix asks for synchronization."""
        rmmc: dict[str, list[float]] = {name: [] for name in self.matrices}
        must = False
        for replica, m_i in zip(self.replicas, m, strict=True):
            for name in self.matrices:
                norm, last = float(m_i[name].norm()), replica.last_norm.get(name)
                replica.last_norm[name] = norm
                if last is None or (last == 0 and norm > 0):
                    rmmc[name].append(math.nan)
                    must = True
                else:
                    rmmc[name].append(0.0 if last == norm else abs(norm - last) / last)
        return rmmc, must

    def _synchronized_step(
        self, m: Sequence[Mapping[str, Tensor]], G: Sequence[Mapping[str, Tensor]]
    ) -> None:
        if self.diverged and self.consensus == "average":
            self._average("X", self.matrices + self.others)
            self._average_moments()
            self.diverged = False
        self.local_steps = 0
        for name in self.matrices:
            Q = self.replicas[0].Q[name]
            replicas = range(len(self.replicas))
            ms, gs = ([each[i][name] for i in replicas] for each in (m, G))
            self._dion(name, ms, gs, Q, replicas, lr=self.group[name]["lr"])
        for name in self.others:
            mean = sum(g[name] for g in G) / len(G)
            for replica in self.replicas:
                self._scalar(replica, name, mean)

    def _local_step(self, m: Sequence[Mapping[str, Tensor]], G: Sequence[Mapping[str, Tensor]]) -> None:
        self.local_steps += 1
        self.diverged = True
        for i, replica in enumerate(self.replicas):
            for name in self.matrices:
                group = self.group[name]
                eta, eta_local = group["lr"], group["local_lr_scale"] * group["lr"]
                if group["local_update"] == "dion":
                    self._dion(name, [m[i][name]], [G[i][name]], replica.Q[name], [i], lr=eta_local)
                elif group["local_update"] in ("muon", "normuon", "dion2"):
                    rows, cols = m[i][name].shape
                    how = group["newton_schulz"], group["newton_schulz_steps"]
                    replica.M[name] = group["momentum"] * m[i][name]
                    if group["local_update"] == "dion2":
                        k = rank_of(rows, cols, group["rank_fraction"], group["rank_multiple_of"])
                        update, replica.M[name] = dion2(m[i][name], k, group["momentum"], *how)
                    elif group["nesterov"]:
                        update = muon(G[i][name] + group["momentum"] * m[i][name], *how)
                    else:
                        update = muon(m[i][name], *how)
                    if group["local_update"] == "normuon":
                        v = replica.second_moment[name]
                        update, replica.second_moment[name] = normuon(
                            update, v, group["betas"][1], group["eps"]
                        )
                    decay = 1 - eta * group["weight_decay"]
                    s = scale(group["update_scale"], rows, cols)
                    if not G[i][name].any():  # a momentum without a gradient moves nothing
                        update = torch.zeros_like(update)
                    replica.X[name] = decay * replica.X[name] - eta_local * s * update
                else:
                    replica.M[name] = group["momentum"] * m[i][name]
                    decay = 1 - eta * group["weight_decay"]
                    replica.X[name] = decay * replica.X[name] - eta_local * G[i][name]
            for name in self.others:
                self._scalar(replica, name, G[i][name])

    def _flat(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([values[name].flatten() for name in self.X0])

    def _put(self, values: dict[str, Tensor], part: Tensor, new: Tensor) -> None:
        vector, start = self._flat(values), 0
        vector[part] = new
        for name, X in list(values.items()):
            values[name] = vector[start : start + X.numel()].view_as(X).clone()
            start += X.numel()

    def _outer_step(self, k: int) -> None:
        part, length = self.parts[k], len(self.mean_residual[k])

        def padded(x: Tensor) -> Tensor:
            return torch.cat([x, x.new_zeros(length - len(x))])

        def on_wire(x: Tensor) -> Tensor:
            return x if self.outer_bits == 32 else rounded(x, self.outer_bits)

        x0, sent = self._flat(self.X0)[part], []
        before = [self._flat(replica.X)[part] for replica in self.replicas]
        for i, x in enumerate(before):
            wanted = padded(x0 - x) + (1 - self.residual_kept) * self.residuals[k][i]
            sent.append(on_wire(wanted))
            self.residuals[k][i] = wanted - sent[-1]
        wanted = sum(sent) / len(sent) + self.mean_residual[k]
        D = on_wire(wanted)
        self.mean_residual[k] = wanted - D
        self.under_way[k] = self.steps, D[: len(part)], before

    def _let_arrive(self) -> None:
        for k, (left, _, _) in list(self.under_way.items()):
            if self.steps - left >= self.outer_delay:
                self._arrive(k)

    def _arrive(self, k: int) -> None:
        (_, D, before), part = self.under_way.pop(k), self.parts[k]
        U = self.outer_momentum * self._flat(self.U)[part] + D
        X0 = self._flat(self.X0)[part] - self.outer_lr * (D + self.outer_momentum * U)
        self._put(self.U, part, U)
        self._put(self.X0, part, X0)
        for i, (replica, was) in enumerate(zip(self.replicas, before, strict=True)):
            kept = self.residual_kept * self.residuals[k][i][: len(part)]
            since = self._flat(replica.X)[part] - was if self.outer_delay else 0.0
            self._put(replica.X, part, X0 + since - kept)
            replica.U = dict(self.U)

    def _dion(
        self,
        name: str,
        ms: Sequence[Tensor],
        gs: Sequence[Tensor],
        Q: Tensor,
        replicas: Sequence[int],
        *,
        lr: float,
    ) -> None:
        """The synchronized step's P, R, M, Q and X lines over the given replicas, their m_i and G_i; if no
        replica has a gradient, P and R are 0 and Q stays."""
        group = self.group[name]
        rows, cols = ms[0].shape
        wide = (
            rows < cols
        )  # P lives on the longer side, ties: rows; a wide matrix is treated as its transpose
        if wide:
            ms = [m.T for m in ms]
        if any(bool(g.any()) for g in gs):
            P, update, Q, R = power_iteration(ms, Q, group["right_factor"])
        else:
            P, update = ms[0].new_zeros(len(ms[0]), Q.shape[1]), torch.zeros_like(ms[0])
            R = [torch.zeros_like(Q) for _ in ms]
        for i, m_i, R_i in zip(replicas, ms, R, strict=True):
            replica, mu = self.replicas[i], group["momentum"]
            M_i = m_i - (1 - mu) * P @ R_i.T if group["error_feedback"] else mu * m_i
            replica.M[name] = (M_i.T if wide else M_i).clone()
            replica.Q[name] = Q.clone()
            decay = 1 - group["lr"] * group["weight_decay"]
            s = scale(group["update_scale"], rows, cols)
            replica.X[name] = decay * replica.X[name] - lr * s * (update.T if wide else update)

    def _scalar(self, replica: Replica, name: str, g: Tensor) -> None:
        """AdamW as torch.optim.AdamW has it, or Lion."""
        group = self.group[name]
        lr, (beta1, beta2) = group["lr"], group["betas"]
        X = (1 - lr * group["weight_decay"]) * replica.X[name]
        m, v = replica.exp_avg[name], replica.exp_avg_sq[name]
        if group["algorithm"] == "lion":
            replica.X[name] = X - lr * torch.sign(beta1 * m + (1 - beta1) * g)
            replica.exp_avg[name] = beta2 * m + (1 - beta2) * g
            return
        assert group["algorithm"] == "adamw", f"the reference has no algorithm {group['algorithm']!r}"
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**self.steps), v / (1 - beta2**self.steps)
        replica.X[name] = X - lr * m_hat / (v_hat.sqrt() + group["eps"])
        replica.exp_avg[name], replica.exp_avg_sq[name] = m, v

    def synchronize(self) -> None:
        """Average X, M and moments, make Q common, restart the local-step count, rescale the previous
        norms."""
        for k in list(self.under_way):
            self._arrive(k)
        for name in self.matrices:
            mean_norm = sum(float(r.M[name].norm()) for r in self.replicas) / len(self.replicas)
            norm_mean = float((sum(r.M[name] for r in self.replicas) / len(self.replicas)).norm())
            last = [r.last_norm[name] for r in self.replicas if name in r.last_norm]
            for replica in self.replicas:
                if (
                    last and mean_norm > 0
                ):  # one value for all replicas: what a checkpoint holds cannot differ
                    replica.last_norm[name] = sum(last) / len(last) * norm_mean / mean_norm
                if name in replica.Q:
                    replica.Q[name] = self.replicas[0].Q[name].clone()
        self.told = False
        for k, part in enumerate(self.parts):  # what rounding has kept back is in the average
            for i, replica in enumerate(self.replicas):
                own = (1 - self.residual_kept) * self.residuals[k][i]  # the rest is in X_i
                kept_back = (own + self.mean_residual[k])[: len(part)]
                self._put(replica.X, part, self._flat(replica.X)[part] - kept_back)
                self.residuals[k][i] = torch.zeros_like(self.residuals[k][i])
            self.mean_residual[k] = torch.zeros_like(self.mean_residual[k])
        self._average("X", self.matrices + self.others)
        self.X0 = {name: X.clone() for name, X in self.replicas[0].X.items()}
        self._average("M", self.matrices)
        self._average_moments()
        self.local_steps = 0
        self.diverged = False

    def _average_moments(self) -> None:
        self._average("exp_avg", self.others)
        self._average("exp_avg_sq", self.others)
        self._average("second_moment", list(self.replicas[0].second_moment))

    def _average(self, what: str, names: Sequence[str]) -> None:
        for name in names:
            mean = sum(getattr(replica, what)[name] for replica in self.replicas) / len(self.replicas)
            for replica in self.replicas:
                getattr(replica, what)[name] = mean.clone()
