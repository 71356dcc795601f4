"""The outer step of consensus="outer": what replicas send each other is how far they have come since they were last equal."""

import itertools
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
        fragments: the number of parts that take turns.
        on_host: keep X_0 in pinned memory of the host, between two outer steps of no use to anybody.
    """

    def __init__(self, *, lr: float, momentum: float, bits: int, fragments: int, on_host: bool):
        self.lr, self.momentum, self.bits, self.fragments, self.on_host = lr, momentum, bits, fragments, on_host
        self._reference: list[Tensor] = []
        self._stale = True
        self._residuals = [Residuals() for _ in range(fragments)]
        self.apart: Tensor | None = None  # of the last step: sums of squares of (X_0 - X_i) - D and of D, on this rank

    @property
    def under_way(self) -> bool:
        """Whether there is an X_0 that the parameters have left."""
        return not self._stale

    def allocate(self, X: Sequence[Tensor]) -> None:
        """Make room for X_0, unless there is some for just these."""
        if [x.shape for x in X] == [x0.shape for x0 in self._reference]:
            return
        device = torch.device("cpu") if self.on_host else None
        self._reference = [torch.empty_like(x, device=device, pin_memory=self.on_host and x.is_cuda) for x in X]
        self.forget()

    def remember(self, X: Sequence[Tensor]) -> None:
        """X_0 <- X_i, at the start and after `forget`."""
        if self._stale:
            for x0, x in zip(self._reference, X, strict=True):
                x0.copy_(x, non_blocking=True)
            self._stale = False

    def forget(self) -> None:
        """Start anew: replicas are equal."""
        self._stale = True
        for residuals in self._residuals:
            residuals.clear()

    def step_(
        self,
        X: Sequence[Tensor],
        U: Sequence[Tensor],
        *,
        turn: int,
        sizes: Sequence[int],
        copied: Sequence[Axes],
        collectives: Collectives,
    ) -> None:
        """Make the parameters of all replicas equal, in place; with fragments, those whose turn it is.

            D = C(E_i[C(X_0 - X_i)]),   U <- mu U + D,   X = X_0 - lr (D + mu U),   X_0 <- X

        Args:
            X, U: local shards of parameters and of outer momentum; U is empty if mu = 0.
            turn: counts the outer steps; says which fragment it is.
            sizes: elements of each whole parameter.
            copied: for each parameter, the axes over which it is the same.

        Source: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", arXiv:2311.08105, and "Streaming
        DiLoCo", arXiv:2501.18512, for fragments.
        """
        turn %= self.fragments
        members = self._members(sizes, turn)
        X = [X[i] for i in members]
        X0 = [self._reference[i].to(x.device, non_blocking=True) for i, x in zip(members, X, strict=True)]
        D = [x0.to(compute_dtype(x.dtype)) - x for x0, x in zip(X0, X, strict=True)]
        own, axes = D, [copied[i] for i in members]
        if self.bits == 32:
            _, D = collectives.mean_over_replicas(D, [()] * len(D), axes, "pseudo_gradients")
        else:
            D = collectives.rounded_mean_over_replicas(D, axes, "pseudo_gradients", Codec(self.bits), self._residuals[turn])
        if members:
            norms = [torch.stack(torch._foreach_norm(tensors)) for tensors in (torch._foreach_sub(own, D), D)]
            self.apart = torch.stack(norms).square().sum(1)
        if U and members:
            outer_momenta = [U[i] for i in members]
            torch._foreach_mul_(outer_momenta, self.momentum)
            torch._foreach_add_(outer_momenta, D)
            D = list(torch._foreach_add(D, outer_momenta, alpha=self.momentum))
        copy_into(X, [x0.to(d.dtype).sub(d, alpha=self.lr) for x0, d in zip(X0, D, strict=True)])
        for i, x in zip(members, X, strict=True):
            self._reference[i].copy_(x, non_blocking=True)

    def settle_(self, X: Sequence[Tensor], *, sizes: Sequence[int], copied: Sequence[Axes], collectives: Collectives) -> None:
        """Take from the parameters what rounding has kept back, so that their mean lacks nothing."""
        for turn, residuals in enumerate(self._residuals):
            if not residuals.in_use:
                continue
            members = self._members(sizes, turn)
            wide = [X[i].to(compute_dtype(X[i].dtype), copy=True) for i in members]
            collectives.settle_residuals_(wide, [copied[i] for i in members], residuals)
            copy_into([X[i] for i in members], wide)

    def _members(self, sizes: Sequence[int], turn: int) -> list[int]:
        """Return the parameters of a fragment: neighbours, about as many elements in each fragment."""
        ends = list(itertools.accumulate(sizes, initial=0))
        middle = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
        return [i for i, at in enumerate(middle) if int(self.fragments * at / max(ends[-1], 1)) == turn]
