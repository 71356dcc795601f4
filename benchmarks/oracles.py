"""Replicas that are told what no slow link could carry: to see where the gap comes from."""

from collections.abc import Iterable

import torch
from simulation import Replicas, Setting
from torch import nn

from curvadion.sharding.ledger import WIRE


class Oracle(Replicas):
    """K replicas, of which some things are exact at every step.

    With `exact`, parts of parameters' names, the gradients of these parameters are averaged before each step,
    so all replicas have the same; the outer step leaves them where they are. With `together`, g, the mean of
    all replicas moves at once, g times as far, and what is each replica's own are its momentum and, until the
    next synchronization, how far it is from the mean:

        u_i     = what replica i's own step takes away from X_i,     u = mean_i u_i
        X_i     <- X_i - g u - (u_i - u),     X_0 <- X_0 - g u,     and X_i <- X_0 where all synchronize

    These are no methods: each step sends an all-reduce in bf16 of what is exact, which `sent` and `wire`
    count. With `together` that is all, since everybody knows X_0.

    Args: as of `Replicas`. The setting's consensus must be exact: "outer" with 32 bits, outer_momentum=0 and
    kept=0, and with `together` outer_lr=1. Raises ValueError otherwise.
    """

    def __init__(self, model: nn.Module, setting: Setting, count: int):
        s = setting
        plain = (
            s.consensus == "outer" and s.bits == 32 and not (s.codec or s.outer_momentum or s.kept or s.delay)
        )
        if not plain or (s.together and s.outer_lr != 1):
            raise ValueError(
                "what is exact in each step needs a consensus that changes nothing else: bits=32, kept=0, "
                f"outer_momentum=0, delay=0, and with together outer_lr=1; got {s}"
            )
        super().__init__(model, setting, count)
        parts = s.exact.split(",") if s.exact else []
        self.exact = {name for name in self.X if any(part in name for part in parts)}

    @torch.no_grad()
    def step(self, factor: float = 1.0, *, last: bool = False) -> bool:
        before = {name: x.clone() for name, x in self.X.items()}
        with torch.enable_grad():
            synchronized = super().step(factor, last=last)
        for name, x in self.X.items():
            if name in self.exact and synchronized:
                x.copy_(before[name] + (x - before[name]) / self.setting.outer_lr)
            elif name not in self.exact and self.setting.together:
                moved = before[name].mean(0) - x.mean(0)  # the same where all have just synchronized
                x.sub_((self.setting.together - 1) * moved)
        for replica, model in zip(self._replicas, self.models, strict=True):
            built = replica.opt._built
            X_0 = replica.opt._consensus.common(built.store)["X_0"]
            of = dict(zip(map(id, built.table.params), X_0, strict=True))
            for name in self.told_of:
                of[id(model.get_parameter(name))].copy_(self.X[name].mean(0))
        return synchronized

    @property
    def told_of(self) -> Iterable[str]:
        """The names of the parameters of which something is exact."""
        return self.X if self.setting.together else self.exact

    @property
    def told(self) -> float:
        """Bytes so far of what was exact, as bf16."""
        return 2.0 * self.steps * sum(self.X[name][0].numel() for name in self.told_of)

    @property
    def sent(self) -> dict[str, float]:
        return ({} if self.setting.together else super().sent) | {"oracle": self.told}

    @property
    def wire(self) -> float:
        synchronizations = 0.0 if self.setting.together else super().wire
        return synchronizations + self.told * WIRE["all_reduce"](self.K)
