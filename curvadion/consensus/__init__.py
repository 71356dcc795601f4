"""How replicas become one again: one file each, and one entry of CONSENSUS; codecs likewise, in CODECS."""

from curvadion.consensus.average import Average, Drifting
from curvadion.consensus.base import Consensus
from curvadion.consensus.codec import CODECS, register_codec
from curvadion.consensus.outer import Outer

# The names of `consensus`.
CONSENSUS: dict[str, type[Consensus]] = {"average": Average, "outer": Outer, "none": Drifting}

__all__ = ["CODECS", "CONSENSUS", "Consensus", "register_codec", "register_consensus"]


def register_consensus(name: str, consensus: type[Consensus]) -> None:
    """Make a consensus known as `consensus=name`, on every rank and before an optimizer is built.

    Raises ValueError if the name is taken.
    """
    if name in CONSENSUS:
        raise ValueError(
            f"a consensus's name must be new; got {name!r}, which there is already; choose another"
        )
    CONSENSUS[name] = consensus
