"""The published range of speed-ups, and the assumptions under which the formulas give it."""

from curvadion.projection.formulas import Projection, payload
from curvadion.projection.nominal import LINKS, SIZES

PUBLISHED_ASSUMPTIONS = """\
The range of 1.02x on fast InfiniBand to 4.36x across datacentres is that of the CurvaDion paper \
(arXiv:2512.13728). The links and times
behind it were not at hand: the assumptions below are OURS, inferred to match it, \
and others would match as well.
  model        160M, 162,220,800 parameters, the size of the authors' public runs
  compute      0.329 s, the step time in their public log of 160M on 8 GPUs, 1,048,576 tokens a step \
(github.com/Bhavkumar21/CurvaDion)
  layout       2 replicas of 8 GPUs that share one link, whose bandwidth and round trip stand in the table
  baseline     bf16 gradients all-reduced on every step, nothing overlapped
  "published"  the same gradients on 1 step in 100 (99 % of the steps are local), \
and the gate's round trip on all
  "average"    what this library sends on 1 step in 100 (consensus="average", local Dion steps, \
rank fraction 1/8): five times as much
  "one bit"    the recommended settings: one bit per parameter, and the gate, on 1 step in 8 \
(consensus="outer")"""
PUBLISHED_RANGE = (1.02, 4.36)
PUBLISHED_LINKS = ("infiniband", "ethernet-100", "ethernet-25", "ethernet-10", "cross-datacentre-2")
PUBLISHED_INTERVAL = 100


def published() -> dict[str, tuple[float, float, float, float]]:
    """Return T_dense and the speed-ups "published", "average" and "one bit" by link, as assumed above."""
    model = SIZES["160m"].model
    dense, one_bit = payload(model, "dense"), payload(model, "outer-1")
    average = payload(model, "average", rank_fraction=1 / 8)
    found = {}
    for name in PUBLISHED_LINKS:
        at = Projection(0.329, 2, 8, LINKS[name].gbit, LINKS[name].rtt_ms / 1e3)
        T_dense = at.dense(dense)
        speedups = [T_dense / at.gated(sent, PUBLISHED_INTERVAL) for sent in (dense, average)]
        found[name] = (T_dense, speedups[0], speedups[1], T_dense / at.gated(one_bit, 8, gate_every=8))
    return found
