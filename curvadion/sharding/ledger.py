"""What was sent: calls and bytes of this rank, by mesh axis and purpose, and how often a byte leaves it."""

from collections.abc import Callable
from dataclasses import dataclass, field

Key = tuple[str, str]  # axis, "replicate" or "shard", and purpose


@dataclass(frozen=True)
class Purpose:
    """What is sent, in a reader's words, and over which axes it has a row before anything was sent."""

    words: str
    axes: tuple[str, ...] = ("replicate", "shard")


# The shard axis of what crosses replicas: its legs inside a replica.
PURPOSES = {
    "check": Purpose("check that ranks agree"),
    "gate": Purpose("gate", ("replicate",)),
    "factors": Purpose("Dion factors of matrices"),
    "gradients": Purpose("gradients for AdamW"),
    "parameters": Purpose("parameters, to average"),
    "pseudo_gradients": Purpose("pseudo-gradients"),
    "moments": Purpose("moments, to average"),
    "right_factor": Purpose("right factors, made common"),
    "momentum": Purpose("momentum, to average"),
    "norms": Purpose("norms and flags"),
    "partial_gradients": Purpose("gradients that tensor parallelism leaves partial", ("shard",)),
    "gram": Purpose("Gram matrices", ("shard",)),
    "matrices": Purpose("whole matrices, to their owners and back", ("shard",)),
    "common_factors": Purpose("Dion factors, to owners in all replicas and back", ()),
    "column_norms": Purpose("column norms", ("shard",)),
    "drift": Purpose("drift, for the gate", ()),
}


def words_of(purpose: str) -> str:
    """Return what a purpose is in a reader's words."""
    return PURPOSES[purpose].words if purpose in PURPOSES else purpose.replace("_", " ")


# How often a byte of the buffer that a rank hands to a collective of k ranks leaves it, on average over the
# ranks, with the algorithms that move the least (ring, pairwise exchange): Thakur et al., "Optimization of
# Collective Communication Operations in MPICH", 2005.
WIRE: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda k: 2 * (k - 1) / k,
    "reduce_scatter": lambda k: (k - 1) / k,
    "all_gather": lambda k: k - 1,
    "all_to_all": lambda k: (k - 1) / k,
    "all_to_all_uneven": lambda k: 1.0,  # what a rank has for itself is not in it
    "broadcast": lambda k: (k - 1) / k,
}


def _nothing_yet() -> dict[Key, int]:
    pairs = [(axis, purpose) for purpose, about in PURPOSES.items() for axis in about.axes]
    return {
        (axis, purpose): 0 for wanted in ("replicate", "shard") for axis, purpose in pairs if axis == wanted
    }


def _nothing_sent() -> dict[Key, float]:
    return dict.fromkeys(_nothing_yet(), 0.0)


@dataclass
class Ledger:
    """Calls and bytes of this rank by (axis, purpose), axis "replicate" or "shard"; the same keys on every
    rank.

    A purpose that PURPOSES does not know, of a rule or a gate added later, "drift" and "common_factors" have
    their row from the first call on.

    Attributes:
        calls: collectives.
        bytes: of the buffers that this rank handed to them.
        wire: bytes that leave this rank for it, see `WIRE`: by which collectives of different kinds compare.
        last_step, last_step_wire: `bytes` and `wire` of the last step.
        dense: bytes of the buffers that a dense bfloat16 all-reduce of all gradients would have had.
    """

    calls: dict[Key, int] = field(default_factory=_nothing_yet)
    bytes: dict[Key, int] = field(default_factory=_nothing_yet)
    wire: dict[Key, float] = field(default_factory=_nothing_sent)
    last_step: dict[Key, int] = field(default_factory=_nothing_yet)
    last_step_wire: dict[Key, float] = field(default_factory=_nothing_sent)
    dense: int = 0
    _before: tuple[dict[Key, int], dict[Key, float]] = field(default_factory=lambda: ({}, {}))

    def record(self, collective: str, ranks: int, axis: str, purpose: str, nbytes: int) -> None:
        """Count one collective of `ranks` ranks, to which this one handed a buffer of so many bytes."""
        key = axis, purpose
        self.calls[key] = self.calls.get(key, 0) + 1
        self.bytes[key] = self.bytes.get(key, 0) + nbytes
        self.wire[key] = self.wire.get(key, 0.0) + nbytes * WIRE[collective](ranks)

    def begin_step(self) -> None:
        """Remember the totals; `end_step` counts from here."""
        self._before = dict(self.bytes), dict(self.wire)

    def end_step(self, dense: int = 0) -> None:
        """Make `last_step` and `last_step_wire` what was sent since `begin_step`, in place of `dense`
        bytes."""
        self.dense += dense
        before, before_wire = self._before
        self.last_step = {key: total - before.get(key, 0) for key, total in self.bytes.items()}
        self.last_step_wire = {key: total - before_wire.get(key, 0.0) for key, total in self.wire.items()}
