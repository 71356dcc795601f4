"""What the study tries and the optimizer has not: rules, gates, a codec and outer steps, registered by name.

`import variants` makes the names known, but for those that `codec_of`, `rule_of` and `outer_of` register when
asked.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from rounding import ThereAndBack, as_bytes, as_scales, at, codec_named, pack_bits, unpack_bits
from torch import Tensor

from curvadion.consensus import CODECS, CONSENSUS, Consensus, register_codec, register_consensus
from curvadion.consensus.outer import Flight, Outer
from curvadion.gate.schedule import Plan
from curvadion.rules import RULES, Step, local_step, register_rule
from curvadion.rules.dion import Dion
from curvadion.sharding.flat import pad, shaped
from curvadion.sharding.journey import Codec, RoundedMean
from curvadion.signals import Reading, Signal, measure, register_signal
from curvadion.state.batch import Batch
from curvadion.state.store import or_zeros
from curvadion_kernels.reference import FAILED_KEY, INDEX_BITS, INDEX_MASK, SYNCHRONIZE_BIT

# ---- gate


class Valued(Signal):
    """Opens when a number exceeds tau. It takes RMMC's place in the key, so that all learn the largest."""

    def value(self, step: Step) -> float | Tensor:
        """Return this replica's number, 0 where it has none yet."""
        raise NotImplementedError

    def exceeds(self, value: Tensor, tau: float) -> Tensor:
        return value > tau

    def read(self, step: Step, message: Tensor, taus: list[float], plan: Plan) -> Reading:
        closed = measure(step, message, [math.inf] * len(taus), plan)
        value = torch.as_tensor(self.value(step), dtype=torch.float32, device=closed.key.device)
        bits = value.nan_to_num(0.0).view(torch.int32).to(torch.int64) << INDEX_BITS
        key = closed.key & ~(SYNCHRONIZE_BIT - 1) | bits | INDEX_MASK
        told = closed._replace(key=torch.where(closed.key == FAILED_KEY, closed.key, key))
        return told.opening(self.exceeds(value, min(taus)) & (not plan.hold_closed))


class Directional(Valued):
    """||G_t|| / ||mu m_{t-1}||, the largest of all matrices: what is new in the momentum."""

    def value(self, step: Step) -> Tensor:
        table = step.table
        new = torch.stack(torch._foreach_norm([or_zeros(step.G[i], step.X[i]) for i in table.weights]))
        mu = new.new_tensor([step.groups[table.group_of[i]]["momentum"] for i in table.weights])
        last = step.store.last_norm
        return torch.where(last > 0, new / (mu * last), 0.0).max()


class Distance(Valued):
    """||X_i - X_0||, X_0 being the parameters after the last synchronized step."""

    needs_equal_replicas = True

    def __init__(self, options: Mapping[str, Any]):
        self._X0: list[Tensor] = []

    def value(self, step: Step) -> float | Tensor:
        if not self._X0:
            self.took(step, True)
        return torch.stack(torch._foreach_norm(torch._foreach_sub(list(step.X), self._X0))).norm()

    def took(self, step: Step, synchronized: bool) -> None:
        if synchronized:
            self._X0 = [x.clone() for x in step.X]

    def forget(self) -> None:
        self._X0 = []


class Clock(Valued):
    """Opens every so many steps, and how many depends on the learning rate; tau is the number at its peak."""

    def value(self, step: Step) -> float:
        group = step.groups[0]
        self._factor = float(group["lr"]) / group["initial_lr"]
        return step.schedule.local_steps + 1.0

    def exceeds(self, value: Tensor, tau: float) -> Tensor:
        return value >= self.interval(tau, self._factor)

    def interval(self, most: float, factor: float) -> float:
        raise NotImplementedError


class Qsr(Clock):
    """Interval ~ 1 / lr^2, four times the least at most. Source: Gu et al., arXiv:2310.14423."""

    def interval(self, most: float, factor: float) -> float:
        return min(most / factor**2, 4 * most)


class Late(Clock):
    """Interval ~ lr."""

    def interval(self, most: float, factor: float) -> float:
        return max(1.0, most * factor)


class Early(Clock):
    """Interval ~ 1.25 - lr: short while the learning rate is high."""

    def interval(self, most: float, factor: float) -> float:
        return max(1.0, most * (1.25 - factor))


# ---- outer_bits


class TopK:
    """The `kept` largest of each 4096 values, 14 bits each: place, sign, one of two levels; a scale."""

    block = 4096
    levels = 0.6, 1.5

    def __init__(self, kept: int):
        if not 0 < kept <= self.block or kept % 4:
            raise ValueError(f"the values kept of {self.block} must fill whole bytes; got {kept}; try 64")
        self.kept = kept

    @property
    def bits_per_value(self) -> float:
        return (self.kept * 14 + 16) / self.block

    def encode(self, x: Tensor) -> Tensor:
        chunks = x.view(-1, self.block)
        places = chunks.abs().topk(self.kept, -1).indices
        values = chunks.gather(-1, places)
        large = values.abs() > values.abs().mean(-1, keepdim=True)
        levels = torch.where(large, self.levels[1], self.levels[0]).to(x.dtype)
        scale = (levels * values.abs()).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        codes = places << 2 | (values < 0) << 1 | large
        return torch.cat([as_bytes(scale), pack_bits(codes, 14)], -1).view(-1)

    def decode(self, payload: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        payload = payload.view(-1, 2 + self.kept * 14 // 8)
        scale, codes = as_scales(payload, 1, dtype), unpack_bits(payload[:, 2:], 14)
        sizes = torch.where((codes & 1).bool(), self.levels[1], self.levels[0]).to(dtype)
        values = torch.where((codes & 2).bool(), -sizes, sizes) * scale
        return values.new_zeros(len(payload), self.block).scatter_(-1, codes >> 2, values).view(-1)


def codec_of(bits: int, named: str = "") -> int | str:
    """Return the name of a codec: the one that is named in `rounding`; without, of so many bits, or if
    negative of so many of 4096 values."""
    if not named and bits > 0:
        return bits
    name = named or f"{-bits} of {TopK.block}"
    if name not in CODECS:
        register_codec(name, codec_named(named) if named else TopK(-bits))
    return name


def pair_of(there: int | str, back: int | str) -> int | str:
    """Return the name of a codec that is one for what each replica sends and another for the mean."""
    name, first, second = f"{there} | {back}", CODECS[there], CODECS[back]
    if first is None or second is None:
        raise ValueError(f"both ways have to be rounded if one is otherwise; got {name}; try 16 bits")
    if name not in CODECS:
        register_codec(name, ThereAndBack(first, second))
    return name


# ---- local_update


class Retained(Dion):
    """Dion whose momentum also decays where the factors have left it out.

        M_i <- beta (m_i - P R_i^T) + mu P R_i^T

    Dion itself is beta = 1. Source: Orth-Dion, arXiv:2605.16341.
    """

    def __init__(self, retention: float):
        self.retention = retention

    def end(self, step: Step, batches: list[Batch], *, begun: bool) -> None:
        # beta (m - (1 - mu / beta) P R^T): Dion's own step with another mu, and a decay.
        groups = [step.groups[b] for b in {b.group for b in batches}]
        momenta = [group["momentum"] for group in groups]
        try:
            for group, mu in zip(groups, momenta, strict=True):
                group["momentum"] = mu / self.retention
            super().end(step, batches, begun=begun)
        finally:
            for group, mu in zip(groups, momenta, strict=True):
                group["momentum"] = mu
        for batch in batches:
            batch.momentum.mul_(self.retention)


def rule_of(name: str) -> str:
    """Return the name of a local rule; "dion, retention 0.9" is `Retained`."""
    if name not in RULES:
        _, found, retention = name.partition("dion, retention ")
        if not found:
            raise ValueError(f"a rule is one of {list(RULES)} or 'dion, retention 0.9'; got {name!r}")
        register_rule(name, Retained(float(retention)))
    return name


# ---- consensus


class Alone(Consensus):
    """Local steps only: of a replica that gets gradients which others have averaged."""

    def step(self, step: Step, *, synchronize: bool) -> None:
        local_step(step, begun=not synchronize)


class OtherBack(RoundedMean):
    """Sends something else back than the rounded mean: with the second codec of a `ThereAndBack`, and each
    value smaller the less the replicas agree on it (a Wiener filter).

        mean <- mean mean^2 / (mean^2 + shrink var / K)
    """

    shrink = 0.0

    def next_leg(self) -> Tensor | None:
        if self._received is None:
            return super().next_leg()
        self._work.wait()
        parts = self._codec.decode(self._received, self._dtype).view(self._exchange.replicas, -1)
        self._received, self._codec = None, getattr(self._codec, "back", self._codec)
        mean = parts.mean(0)
        if self.shrink:
            square, noise = mean.square(), parts.var(0) / len(parts)
            mean = mean * (square / (square + self.shrink * noise).clamp_min(1e-38))
        self._ours.add_(mean)
        part = self._codec.encode(self._ours)
        self._ours.sub_(self._codec.decode(part, self._dtype))
        self._sent = part.new_empty(len(part) * self._exchange.replicas)
        self._work = self._exchange.over_replicas("all_gather", self._purpose, self._sent, part)
        return None


class OneStage(RoundedMean):
    """Everybody to everybody, and nobody rounds the mean."""

    legs = 1

    def __init__(self, exchange: Any, piece: Tensor, purpose: str, codec: Codec, number: int, kept: Any):
        self._replicas, self._codec, self._like = exchange.replicas, codec, piece
        flat = pad(piece, piece.numel() + -piece.numel() % codec.block)
        mine, _ = kept.of(number, flat.numel(), 0, flat)
        mine.add_(flat)
        sent = codec.encode(mine)
        mine.sub_(codec.decode(sent, piece.dtype))
        self._all = sent.new_empty(len(sent) * self._replicas)
        self._work = exchange.over_replicas("all_gather", purpose, self._all, sent)

    def next_leg(self) -> Tensor:
        self._work.wait()
        parts = self._codec.decode(self._all, self._like.dtype).view(self._replicas, -1)
        return parts.mean(0)[: self._like.numel()]


class OuterVariant(Outer):
    """The outer step, but for what a subclass says.

    Attributes:
        feedback: what rounding leaves out is kept and sent later.
        momenta: what happens to momentum: "keep", "average" (in full), "reset", or "turn c": toward where the
            mean went and away from where this replica did, for no bytes,

                M_i <- M_i + c ||M_i|| (D / ||D|| - D_i / ||D_i||)
    """

    feedback, momenta = True, "keep"

    def __init__(self, options: Mapping[str, Any]):
        super().__init__(options)
        self._turning = self._codec

    def _depart(self, step: Step, fragment: int) -> None:
        # What it sends may depend on which outer step of the fragment it is.
        self._codec = at(self._turning, step.schedule.synchronized_steps // self._o.fragments)
        super()._depart(step, fragment)

    def step(self, step: Step, *, synchronize: bool) -> None:
        super().step(step, synchronize=synchronize)
        for kept in self._residuals if not self.feedback else ():
            kept.clear()
        if synchronize and self.momenta == "average":
            batches = step.store.batches
            copied = [b.layout.copied for b in batches]
            step.exchange.average_([b.momentum for b in batches], copied, "momentum")
        elif synchronize and self.momenta == "reset":
            for b in step.store.batches:
                b.momentum.zero_()

    def _move(
        self, step: Step, flight: Flight, indices: list[int], D: Tensor, own: Tensor, residual: Tensor | None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        if self.momenta.startswith("turn "):
            share, shapes = float(self.momenta.removeprefix("turn ")), [flight.like[i] for i in indices]
            for i, d, d_i in zip(indices, shaped(D, shapes), shaped(own, shapes), strict=True):
                matrix = step.table.first_matrix.get(flight.parts[i].index)
                if matrix is not None:  # one for each parameter: nothing is fused or cut here
                    m = step.store.momenta[matrix]
                    m.add_((unit(d) - unit(d_i)).view_as(m), alpha=share * float(m.norm()))
        return super()._move(step, flight, indices, D, own, residual)


def unit(x: Tensor) -> Tensor:
    """Return a tensor of norm 1 in its direction; zeros stay zeros."""
    return x / x.norm().clamp_min(1e-30)


def outer_of(
    *,
    two_codecs: bool,
    two_stages: bool,
    feedback: bool,
    momenta: str,
    shrink: float = 0.0,
    turning: bool = False,
    of: type[OuterVariant] = OuterVariant,
) -> str:
    """Return the name of an outer step with these attributes of `OuterVariant`.

    Args:
        two_codecs: the codec is a pair, see `pair_of`.
        two_stages: the mean is rounded and sent back; without, everybody sends to everybody.
        shrink: see `OtherBack`.
        turning: what the codec sends may depend on which outer step it is.
        of: the variant that gets them, whose name says which one it is.
    """
    plain = False, True, OuterVariant.feedback, OuterVariant.momenta, 0.0, False, OuterVariant
    if (two_codecs, two_stages, feedback, momenta, shrink, turning, of) == plain:
        return "outer"
    name = f"{of.__name__}: {two_codecs=}, {two_stages=}, {feedback=}, {momenta=}, {shrink=}, {turning=}"
    if name not in CONSENSUS:
        journey = RoundedMean if two_stages else OneStage
        if two_stages and (two_codecs or shrink):
            journey = type("OtherBack", (OtherBack,), {"shrink": shrink})
        values = {"journey": journey, "feedback": feedback, "momenta": momenta}
        register_consensus(name, type(of.__name__, (of,), values))
    return name


for gate in (Directional, Distance, Qsr, Late, Early):
    register_signal(gate.__name__.lower(), gate)
register_consensus("alone", Alone)
