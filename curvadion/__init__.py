"""CurvaDion: Dion updates on FSDP2/DTensor shards, with a gate on what crosses slow links."""

from curvadion.explain import assert_routing
from curvadion.gate.trouble import NonFiniteError
from curvadion.optimizer import CurvaDion
from curvadion.options import LOW_COMMUNICATION
from curvadion.param_groups import param_groups_for
from curvadion.sharding.agreement import ReplicaMismatchError
from curvadion.sharding.elastic import ElasticGroup
from curvadion.sharding.lost import LostRankError
from curvadion.sharding.membership import LeftBehindError
from curvadion.version import __version__

__all__ = [
    "LOW_COMMUNICATION",
    "CurvaDion",
    "ElasticGroup",
    "LeftBehindError",
    "LostRankError",
    "NonFiniteError",
    "ReplicaMismatchError",
    "__version__",
    "assert_routing",
    "param_groups_for",
]
