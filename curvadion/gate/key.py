"""The gate's key: what one reduced int64 says about this step.

Pure functions on host values. The key is computed on the device by `curvadion_kernels` (op `gate_key`), and
its MAX over the replicas is taken by the exchange; then every rank of every replica decodes the same key and
takes the same branch.
"""

import struct
from dataclasses import dataclass

from curvadion_kernels.reference import (
    CHECK_KEY,
    FAILED_KEY,
    INDEX_BITS,
    INDEX_MASK,
    NONFINITE_BIT,
    OUTSIDE_KEY,
    SYNCHRONIZE_BIT,
)


@dataclass(frozen=True)
class Decision:
    """What the reduced key says; equal on all ranks.

    Attributes:
        synchronize: rho > tau on some replica, or some replica must synchronize.
        nonfinite: some rank saw a NaN or an infinity.
        failed: some rank could not do its part of the step.
        rmmc: the largest defined RMMC over all matrices and replicas (rho), NaN if none is defined.
        argmax: the index of that matrix, -1 if none.
        elsewhere: the key of a replica that takes no step: at `synchronize()`, or about to compare what must
            be common; None if all take one.
    """

    synchronize: bool
    nonfinite: bool
    failed: bool
    rmmc: float
    argmax: int
    elsewhere: int | None = None

    @property
    def trouble(self) -> bool:
        """Whether the step cannot be taken as it is."""
        return self.failed or self.nonfinite


def decode(key: int) -> Decision:
    """Decode the MAX over replicas of the gate keys (layout: `curvadion_kernels.reference`)."""
    if key == FAILED_KEY:
        return Decision(synchronize=False, nonfinite=False, failed=True, rmmc=float("nan"), argmax=-1)
    if key >= CHECK_KEY:
        met = key > OUTSIDE_KEY
        return Decision(False, nonfinite=met, failed=False, rmmc=float("nan"), argmax=-1, elsewhere=key)
    defined = bool(key & INDEX_MASK)
    bits = (key & (SYNCHRONIZE_BIT - 1)) >> INDEX_BITS
    return Decision(
        synchronize=bool(key & SYNCHRONIZE_BIT),
        nonfinite=bool(key & NONFINITE_BIT),
        failed=False,
        rmmc=struct.unpack("<f", struct.pack("<I", bits))[0] if defined else float("nan"),
        argmax=INDEX_MASK - (key & INDEX_MASK) if defined else -1,
    )
