"""The hot operations of CurvaDion, each under one name and one signature in one table.

`OPS` maps a name to its implementations. `reference` (plain torch) is the definition; a fused implementation of the same
signature goes beside it in the same `Op`, and tests and benchmarks iterate over the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from curvadion_kernels import reference

__all__ = ["OPS", "Op", "ops", "reference"]


@dataclass(frozen=True)
class Op:
    """One operation: its definition in plain torch, and what runs instead where it can."""

    reference: Callable[..., object]


OPS: dict[str, Op] = {
    "momentum_norm_": Op(reference.momentum_norm_),
    "count_nonfinite": Op(reference.count_nonfinite),
    "gate_key": Op(reference.gate_key),
    "local_step_": Op(reference.local_step_),
    "low_rank_apply_": Op(reference.low_rank_apply_),
    "column_sumsq": Op(reference.column_sumsq),
}

# The operations as the optimizer calls them.
ops = SimpleNamespace(**{name: op.reference for name, op in OPS.items()})
