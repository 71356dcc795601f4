"""What an optimizer tells about itself: host numbers, no collective, no device access."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from curvadion.gate.key import Decision
from curvadion.gate.schedule import Schedule
from curvadion.gate.trouble import Trouble
from curvadion.sharding.ledger import WIRE, Ledger


def collect(
    schedule: Schedule,
    decision: Decision,
    trouble: Trouble,
    ledger: Ledger,
    groups: Sequence[Mapping[str, Any]],
    *,
    dense_bytes: int,
    replicas: int,
) -> dict[str, float]:
    """Return what the last step did and the totals since construction, as floats.

    Keys, all under ``curvadion/``: ``step``, ``synchronized`` (0 or 1), ``sync_rate`` (share of steps),
    ``steps_since_sync``, ``tau`` (the smallest of all groups), ``rmmc_max`` (NaN if undefined),
    ``rmmc_argmax`` (index into `matrix_names`, -1 if none), ``skipped_steps``; ``bytes/<axis>`` and
    ``bytes/<axis>/<purpose>`` of the last step and ``bytes_total/...``, this rank's buffers; ``wire/<axis>``
    and ``wire_total/<axis>``, the bytes that leave this rank for them (`curvadion.sharding.ledger.WIRE`);
    ``dense_bf16_bytes`` and ``..._total``, the buffer of this rank's share of a bfloat16 all-reduce of all
    gradients, ``dense_bf16_wire`` and ``..._total``, what leaves this rank for that.

    Args:
        dense_bytes: of this rank's share of a bfloat16 all-reduce of all gradients.
    """
    ring = WIRE["all_reduce"](replicas)
    values: dict[str, float] = {
        "step": schedule.steps,
        "synchronized": decision.synchronize and not decision.nonfinite,
        "sync_rate": schedule.synchronized_steps / max(schedule.steps, 1),
        "steps_since_sync": schedule.local_steps,
        "tau": min(
            (float(group["tau"]) for group in groups if group["algorithm"] == "dion"), default=math.nan
        ),
        "rmmc_max": decision.rmmc,
        "rmmc_argmax": decision.argmax,
        "skipped_steps": trouble.skipped_steps,
        "dense_bf16_bytes": dense_bytes,
        "dense_bf16_bytes_total": ledger.dense,
        "dense_bf16_wire": dense_bytes * ring,
        "dense_bf16_wire_total": ledger.dense * ring,
    }
    for prefix, sent in (("wire", ledger.last_step_wire), ("wire_total", ledger.wire)):
        for axis in ("replicate", "shard"):
            values[f"{prefix}/{axis}"] = sum(n for (a, _), n in sent.items() if a == axis)
    for prefix, counted in (("bytes", ledger.last_step), ("bytes_total", ledger.bytes)):
        for axis in ("replicate", "shard"):
            values[f"{prefix}/{axis}"] = sum(n for (a, _), n in counted.items() if a == axis)
        values.update({f"{prefix}/{axis}/{purpose}": n for (axis, purpose), n in counted.items()})
    return {f"curvadion/{key}": float(value) for key, value in values.items()}
