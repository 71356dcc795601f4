"""What a consensus is: how replicas that took steps of their own become one again."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from curvadion.allowed import Option
from curvadion.rules.base import Step
from curvadion.state.batch import Batch
from curvadion.state.store import Store


class Consensus:
    """One object for each optimizer.

    Args:
        options: the optimizer's, by name.

    Attributes:
        options: options of the optimizer that it declares; refused with another consensus.
        own_options: those of the constructor that would mean nothing under another consensus; refused there.
        group_options: options of a group that mean something under this consensus whatever the local rule,
            see `Rule.own_options`.
        leaves_apart: replicas differ even right after a synchronized step.
        uses_Q: its synchronized steps are Dion's, of every matrix, whatever the local rule.
        averages: a mean of the parameters over the replicas is what they have in common.
        keeps_parameters: those that replicas were equal in last are kept, `common(...)["X_0"]`.
        keeps_momentum: there is an outer momentum U of every parameter, `store.outer_momenta`.
        keeps_own_gradients: AdamW takes each replica's own gradients on synchronized steps too, so that
            moments differ.
        can_lose_replicas: what a synchronized step sends can be sent again among fewer replicas, as long as
            nothing has been moved by it.
        under_way: the parameters have left something that replicas are to come back to.
    """

    options: ClassVar[Mapping[str, Option]] = {}
    own_options: ClassVar[tuple[str, ...]] = ()
    group_options: ClassVar[tuple[str, ...]] = ()
    leaves_apart = False
    uses_Q = False
    averages = True
    keeps_parameters = False
    keeps_momentum = False
    keeps_own_gradients = False
    can_lose_replicas = False
    under_way = False

    def __init__(self, options: Mapping[str, Any]):
        """Take what it needs of the options."""

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raise ValueError where options contradict this consensus."""

    def allocate(self, X: Sequence[Tensor]) -> None:
        """Make room for these shards of the parameters."""

    def remember(self, X: Sequence[Tensor]) -> None:
        """Look at the parameters before a step moves them."""

    def step(self, step: Step, *, synchronize: bool) -> None:
        """Move the parameters; every rank of every replica calls it with the same `synchronize`."""
        raise NotImplementedError

    def stand_still(self, step: Step) -> None:
        """Let the traffic of the others pass in a step that this replica does not take."""

    def land(self, step: Step) -> None:
        """Wait for what is under way; what was kept back stays where it is."""

    def settle(self, step: Step) -> None:
        """Wait for what is under way and give back what was kept, so that a mean of the parameters lacks
        nothing."""

    def forget(self) -> None:
        """Start anew: replicas are equal."""

    def common(self, store: Store) -> Mapping[str, Sequence[Tensor]]:
        """Return what is the same in all replicas between any two steps, by what it is: one tensor of each
        parameter."""
        return {}

    def bytes_sent(self, step: Step, index: int, batch: Batch | None, *, apart: bool) -> float | None:
        """Return the bytes that a replica hands to collectives between replicas for one parameter, or for one
        matrix of it, in a synchronization, without padding; None if it does not say.

        Args:
            index: of the parameter.
            batch: of the matrix.
            apart: there were local steps before.
        """
        return None

    def drift(self) -> Tensor | None:
        """Return sums of squares of this replica's own way minus the common one, and of that; None if
        unknown."""
        return None
