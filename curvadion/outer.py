"""The outer step of consensus="outer": what replicas send each other is how far they have come since they were last equal."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvadion.collectives import Collectives, Residuals
from curvadion.layout import Axes
from curvadion.payload import Codec
from curvadion.state import copy_into
from curvadion_kernels.reference import compute_dtype


class Outer:
    """Keeps the reference X_0 of a replica's parameters and what rounding has kept back.

    Args:
        lr, momentum: outer learning rate and Nesterov momentum; 1 and 0 are plain averaging.
        bits: per parameter on the wire, 32 for none rounded.
    """

    def __init__(self, *, lr: float, momentum: float, bits: int):
        self.lr, self.momentum, self.bits = lr, momentum, bits
        self._reference: dict[int, Tensor] = {}
        self._residuals = Residuals()

    def remember(self, X: Sequence[Tensor], *, equal: bool) -> None:
        """X_0 <- X_i where replicas are equal, and of parameters that have no X_0 yet."""
        for i, x in enumerate(X):
            if i not in self._reference:
                self._reference[i] = x.clone()
            elif equal:
                self._reference[i].copy_(x)

    def forget(self, keep: Sequence[int] = ()) -> None:
        """Start anew, but for X_0 of the parameters at the given old positions, which become 0, 1, ... ; -1 for one that is new."""
        self._reference = {i: self._reference[j] for i, j in enumerate(keep) if j in self._reference}
        self._residuals.clear()

    def step_(self, X: Sequence[Tensor], U: Sequence[Tensor], copied: Sequence[Axes], collectives: Collectives) -> None:
        """Make the parameters of all replicas equal, in place.

            D = C(E_i[C(X_0 - X_i)]),   U <- mu U + D,   X = X_0 - lr (D + mu U)

        Args:
            X, U: local shards of parameters and of outer momentum; U is empty if mu = 0.
            copied: for each parameter, the axes over which it is the same.

        Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv:2311.08105.
        """
        X0 = [self._reference[i] for i in range(len(X))]
        D = [x0.to(compute_dtype(x.dtype)) - x for x0, x in zip(X0, X, strict=True)]
        if self.bits == 32:
            _, D = collectives.mean_over_replicas(D, [()] * len(D), copied, "pseudo_gradients")
        else:
            D = collectives.rounded_mean_over_replicas(D, copied, "pseudo_gradients", Codec(self.bits), self._residuals)
        if U:
            torch._foreach_mul_(list(U), self.momentum)
            torch._foreach_add_(list(U), D)
            D = list(torch._foreach_add(D, list(U), alpha=self.momentum))
        copy_into(X, [x0.to(d.dtype).sub(d, alpha=self.lr) for x0, d in zip(X0, D, strict=True)])

    def settle_(self, X: Sequence[Tensor], copied: Sequence[Axes], collectives: Collectives) -> bool:
        """Take from the parameters what rounding has kept back, so that their mean lacks nothing; return whether there was anything."""
        if not self._residuals.pairs:
            return False
        wide = [x.to(compute_dtype(x.dtype), copy=True) for x in X]
        collectives.settle_residuals_(wide, copied, self._residuals)
        copy_into(X, wide)
        return True
