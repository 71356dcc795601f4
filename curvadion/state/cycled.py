"""The momentum of matrices under schedulers that cycle betas[0]."""

from collections.abc import Iterable
from numbers import Real
from typing import Any


class CycledMomentum:
    """Lets mu follow OneCycleLR and CyclicLR, until somebody writes another.

    They cycle betas[0] of every group if the optimizer's defaults have betas, and leave `base_momentum`
    behind. To AdamW and Lion that is theirs. Matrices have no other use for it: their mu is what was written
    last, by a scheduler into `betas` or by anybody into `momentum`. A dict does not say when something was
    written into it, so both are remembered as objects: a number that is not the one left here was written
    since. If both were since the last step, mu stays as it was written, also if somebody has looked in
    between, as one rank does that saves: the others are to do the same.
    """

    def __init__(self) -> None:
        self._left: dict[int, tuple[Any, Any]] = {}
        self._by_hand = set[int]()  # groups whose mu was written since the last step

    def forget(self) -> None:
        """Take what the groups hold from now on for what a scheduler has written."""
        self._left.clear()
        self._by_hand.clear()

    def follow(self, groups: Iterable[dict[str, Any]], *, in_step: bool = False) -> None:
        """Make mu and betas[0] of each group of matrices that a scheduler cycles the one written last."""
        for number, group in enumerate(groups):
            mu, betas = group.get("momentum"), group.get("betas")
            if group.get("algorithm") != "dion" or not isinstance(mu, Real) or isinstance(mu, bool):
                continue
            if not isinstance(betas, (tuple, list)) or len(betas) != 2:  # and will be refused
                continue
            left, cycled = self._left.get(number, (mu, None))
            if mu is not left:
                self._by_hand.add(number)
            if "base_momentum" in group:
                if number in self._by_hand:
                    betas = (mu, betas[1])
                elif betas is not cycled:
                    mu = betas[0]
            # The sum is another object than any that the user holds, and may write again.
            group["momentum"], group["betas"] = float(mu) + 0.0, betas
            self._left[number] = group["momentum"], betas
        if in_step:
            self._by_hand.clear()
