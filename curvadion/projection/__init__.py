"""Bytes, time per step and speed-up over a link, from formulas: nothing here is measured.

It runs without torch, so that settings can be chosen on a laptop. What the optimizer would choose and send is
not written here a second time: `curvadion.costs`, `formats`, `algebra.iteration`, `algebra.sizes`,
`sharding.dealing` and `sharding.ledger`, which the optimizer's own code imports too, are without torch.
"""

from curvadion.projection.arguments import add_arguments
from curvadion.projection.command import run as main

__all__ = ["add_arguments", "main"]
