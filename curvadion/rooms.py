"""What an optimizer builds for its parameters, once, and again when a group is added."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvadion.algebra.newton_schulz import iteration_of
from curvadion.options import Options, group_options
from curvadion.rules import RULES, Step
from curvadion.sharding.crew import Crew
from curvadion.sharding.exchange import Exchange
from curvadion.sharding.group import Group
from curvadion.sharding.layout import check_replicas, local_tensor
from curvadion.sharding.ledger import Ledger
from curvadion.sharding.owners import Owners
from curvadion.state.intake import Intake
from curvadion.state.numbers import Numbers
from curvadion.state.store import Store
from curvadion.state.table import Table
from curvadion.version import __version__
from curvadion_kernels import Ops, choose
from curvadion_kernels.reference import Fixed

logger = logging.getLogger("curvadion.optimizer")

NEWEST_TESTED = (2, 15)  # of torch; scripts/test_versions.sh


@functools.cache
def untested(version: str) -> str:
    """Return a sentence if this version of torch is newer than all that were tested, else nothing."""
    if tuple(map(int, version.split(".")[:2])) <= NEWEST_TESTED:
        return ""
    newest = ".".join(map(str, NEWEST_TESTED))
    message = f"torch {version} is newer than {newest}, the newest that CurvaDion was tested with"
    logger.warning("%s; scripts/test_versions.sh tests others", message)
    return message


@dataclass(frozen=True)
class Rooms:
    """The rooms that know the parameters.

    Attributes:
        options: the optimizer's.
        table: which parameters there are, and how they are laid out.
        store: their state.
        exchange: who talks to other ranks.
        owners, common_owners: have work done on whole matrices, see `Step`.
        ops, numbers: the kernels, and hyper-parameters as they want them.
        intake: reads parameters and gradients.
    """

    options: Options
    table: Table
    store: Store
    exchange: Exchange
    owners: Owners
    common_owners: Owners | None
    ops: Ops
    numbers: Numbers
    intake: Intake

    @staticmethod
    def of(
        groups: Sequence[Mapping[str, Any]],
        options: Options,
        peers: Group | None,
        *,
        uses_Q: bool,
        outer_momentum: bool,
        before: Mapping[Tensor, Mapping[str, Any]],
        earlier: "Rooms | None",
    ) -> "Rooms":
        """Lay out all parameters and allocate state.

        Args:
            peers: this rank and its peers in the other replicas.
            uses_Q: whether there is a Q of every matrix, also where the local rule uses none.
            outer_momentum: whether there is a U of every parameter.
            before: state so far, whose values go on.
            earlier: the rooms so far, whose ledger goes on.

        Raises:
            ValueError: layouts or options break a rule.
        """
        untested(torch.__version__)  # once
        table = Table.of(groups)
        ops = choose("reference" if table.dry else options.kernels, table.device)
        logger.info("kernels: %s (%s)", ops.kernels, ops.why)
        check_replicas(peers.ranks if peers is not None else [], table.shards, table.layouts)
        ledger = earlier.exchange.ledger if earlier is not None else Ledger()
        exchange = Exchange(table.shards, peers, table.device, ledger)
        most = options.schedule.max_local_steps
        if not table.matrices and table.params and exchange.replicas > 1 and most is None:
            raise ValueError(
                "with several replicas and no matrix, whose RMMC opens the gate, max_local_steps must be "
                "set; got None; try 0, which synchronizes every step"
            )
        store = Store(
            table,
            groups,
            [RULES[group["local_update"]].state_of(group) for group in groups],
            [uses_Q or RULES[group["local_update"]].uses_Q for group in groups],
            momentum_dtype=options.momentum_dtype,
            outer_momentum=outer_momentum,
            before=before,
            own_Q=earlier.store.own_Q if earlier is not None else (),
        )
        intake = Intake(table, store.kinds, exchange, groups)
        owners, common_owners = Owners(exchange, options.owners, options.owner_dtype), None
        gbit, several = options.replica_gbit, peers is not None and peers.size > 1 and not peers.elastic
        if gbit is not None and several and options.owners != "never":
            crew, bandwidth = Crew(table.shards, peers), gbit * 1e9 / 8
            common_owners = Owners(exchange, options.owners, None, crew, "common_factors", bandwidth)
        ops_and_numbers = ops, Numbers(table.device)
        return Rooms(options, table, store, exchange, owners, common_owners, *ops_and_numbers, intake)

    def X(self) -> list[Tensor]:
        """Return this rank's shards of all parameters; call it under `torch.no_grad()`."""
        return [local_tensor(p) for p in self.table.params]

    def step(self, groups: Sequence[Mapping[str, Any]], schedule: Any, X: Any = None, G: Any = None) -> Step:
        """Return a step of these shards and gradients; without them, one for what is done between steps."""
        X = Fixed(self.X()) if X is None else X
        G = Fixed([None] * len(X)) if G is None else G
        room = (self.table, self.store, schedule, self.exchange, self.owners, self.common_owners)
        return Step(X, G, groups, *room, self.ops, self.numbers, self.options.payload_dtype)

    def describe(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """Return a text of all that must be equal on all ranks, what it found and what rounding depends on
        included: versions, kernels, dtypes, the precision of products."""
        coarse = torch.backends.cuda.matmul.fp32_precision in ("tf32", "bf16")
        options = {**self.options.given, "kernels": self.ops.kernels, "coarse products": coarse}
        options |= {"CurvaDion": __version__, "torch": str(torch.__version__)}
        known = group_options()
        own = [sorted((k, v) for k, v in group.items() if k in known) for group in groups]
        plain = [[(k, float(v) if k == "lr" else v) for k, v in group] for group in own]
        iterates = ["newton_schulz" in RULES[group["local_update"]].own_options for group in groups]
        found = [iteration_of(groups[b.group], b.momentum) for b in self.store.kinds if iterates[b.group]]
        spacing = self.common_owners.crew.spacing if self.common_owners is not None else []
        return repr((options, plain, found, self.table.describe(), self.exchange.replicas, spacing))

    @property
    def dense_bytes(self) -> int:
        """Bytes of this rank's share of a bfloat16 all-reduce of all gradients."""
        return 2 * self.table.owned_elements if self.exchange.replicas > 1 else 0
