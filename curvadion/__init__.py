"""CurvaDion: Dion updates on FSDP2/DTensor shards, with a gate on what crosses slow links."""

import importlib
from typing import TYPE_CHECKING, Any

from curvadion.version import __version__

if TYPE_CHECKING:
    from curvadion.explain import assert_routing
    from curvadion.gate.trouble import NonFiniteError
    from curvadion.optimizer import CurvaDion
    from curvadion.options import (
        LOW_COMMUNICATION,
        LOW_COMMUNICATION_KEPT,
        LOWER_COMMUNICATION,
        LOWEST_COMMUNICATION,
    )
    from curvadion.param_groups import param_groups_for
    from curvadion.sharding.agreement import ReplicaMismatchError
    from curvadion.sharding.elastic import ElasticGroup
    from curvadion.sharding.lost import LostRankError
    from curvadion.sharding.membership import LeftBehindError

__all__ = [
    "LOWER_COMMUNICATION",
    "LOWEST_COMMUNICATION",
    "LOW_COMMUNICATION",
    "LOW_COMMUNICATION_KEPT",
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

# Where each name is from: imported when it is asked for, so that the command answers without torch.
_HOMES = {
    "LOWER_COMMUNICATION": "options",
    "LOWEST_COMMUNICATION": "options",
    "LOW_COMMUNICATION": "options",
    "LOW_COMMUNICATION_KEPT": "options",
    "CurvaDion": "optimizer",
    "ElasticGroup": "sharding.elastic",
    "LeftBehindError": "sharding.membership",
    "LostRankError": "sharding.lost",
    "NonFiniteError": "gate.trouble",
    "ReplicaMismatchError": "sharding.agreement",
    "assert_routing": "explain",
    "param_groups_for": "param_groups",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'curvadion' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"curvadion.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
