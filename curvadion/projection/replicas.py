"""What a synchronized Dion step takes to make P orthonormal: in each replica, or with owners among all."""

import argparse
import math
from dataclasses import dataclass, replace

from curvadion.algebra.sizes import rank_of
from curvadion.costs import RATES, orthogonalization, seconds_of_P
from curvadion.projection.nominal import Model
from curvadion.projection.work import counts_of, spread_of
from curvadion.sharding.dealing import Spread
from curvadion.sharding.region import Region


@dataclass(frozen=True)
class CommonFactors:
    """The seconds of a rank where each replica works on all P, and where owners among all replicas do so of
    those `shared` that are cheaper there; bytes that a rank then sends to other replicas, on average."""

    repeated: float
    common: float
    shared: int
    sent: float


def common_factors(
    model: Model, replicas: int, shards: int, gbit: float, rank_fraction: float, rank_multiple_of: int = 1
) -> CommonFactors:
    """Return what the optimizer's own choice comes to, by `replica_gbit`, on GPUs."""
    rates = replace(RATES["cuda"], replicas=gbit * 1e9 / 8)
    repeated = common = sent = 0.0
    shared = 0
    for shape, count in counts_of(model).items():
        m, r = max(shape), rank_of(min(shape), rank_fraction, rank_multiple_of)
        split = shards > 1 and shape[0] >= shape[1]
        parts = shards if split else 1
        rows = spread_of(shape, 0.0, shards).regions if split else [Region((0, 0), (m, r))] * shards
        regions = tuple(Region((x.offset[0], 0), (x.shape[0], r)) for x in rows)
        P = Spread((m, r), regions, (0,) if split else (), orthogonalization(m, r))
        everywhere = replace(P, regions=regions * replicas)
        of = parts, 4, len(model.matrices), "cholesky_qr", rates
        alone, together = seconds_of_P(P, *of)
        before = min(alone, together) if shards > 1 else together
        after, _ = seconds_of_P(everywhere, *of, replicas=replicas)
        repeated, common = repeated + count * before, common + count * min(before, after)
        if after <= before:
            shared += count
            sent += count * 4 * math.prod(P.shape) / parts * (1 - 1 / replicas)
    return CommonFactors(repeated, common, shared, sent)


def print_common_factors(model: Model, args: argparse.Namespace) -> None:
    """Print what owners among all replicas would save on a synchronized Dion step."""
    found = common_factors(
        model, args.replicas, args.shards, args.replica_gbit, args.rank_fraction, args.rank_multiple_of
    )
    print(
        f"projected: P of a synchronized Dion step, at {args.replica_gbit:g} Gbit/s to other replicas\n"
        f"  each replica on all of them {1e3 * found.repeated:.1f} ms, owners among all replicas "
        f"{1e3 * found.common:.1f} ms: {found.shared} of {len(model.matrices)} P, "
        f"{found.sent / 1e9:.2f} GB from each GPU to other replicas\n"
    )
