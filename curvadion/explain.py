"""What an optimizer does with each parameter, as a table to read and to test."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any, Protocol

from curvadion.consensus import Consensus
from curvadion.rooms import Rooms
from curvadion.rules import RULES
from curvadion.rules.base import local_lr, scale
from curvadion.state.batch import Batch

NOT_SO = "-"


@dataclass(frozen=True)
class Row:
    """What becomes of one parameter, or of one of the matrices that it is.

    Attributes:
        name: of the parameter, without wrapper prefixes.
        block: where in the parameter the matrix stands, as "[2]"; empty where the parameter is one.
        shape: of the whole parameter or matrix.
        placement: the `name` of its group, as `param_groups_for` gives it; "group 0" where there is none.
        algorithm: its group's, "dion" for all matrices.
        rule: what it does on a local step, `local_update`; of AdamW and Lion the algorithm.
        lr: what multiplies the update on a local step, with `local_lr_scale` and `update_scale`.
        synchronized_lr: the same on a synchronized step.
        rank: of Dion's factors, or how many slices Dion2 takes; None where updates are of full rank.
        owner: the global rank that orthonormalizes it, once a Muon step was taken; None if all do together.
        bytes: of the buffers that the ranks of a replica, all of them together, hand to collectives between
            replicas in a synchronization after local steps, without padding; 0 with one replica, None if the
            consensus does not say.
    """

    name: str
    block: str
    shape: tuple[int, ...]
    placement: str
    algorithm: str
    rule: str
    lr: float
    synchronized_lr: float
    rank: int | None
    owner: int | None
    bytes: float | None


class Explanation(list[Row]):
    """The rows of all parameters that are trained. As a string a table, in which those that differ by numbers
    in their names only share a line, with the sum of their bytes."""

    def __str__(self) -> str:
        alike: dict[Row, list[Row]] = {}
        for row in self:
            name, block = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name), re.sub(r"\d+", "*", row.block)
            alike.setdefault(replace(row, name=name, block=block, owner=None, bytes=None), []).append(row)
        heads = [*(field.name for field in fields(Row) if field.name != "block"), "number"]
        lines = [heads, *(_cells(shared, rows) for shared, rows in alike.items())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def _cells(shared: Row, rows: Sequence[Row]) -> list[str]:
    sent = [row.bytes for row in rows if row.bytes is not None]
    owners = sorted({row.owner for row in rows if row.owner is not None})
    cells = dict(zip((field.name for field in fields(Row)), astuple(shared), strict=True))
    cells |= {
        "name": shared.name + cells.pop("block"),
        "shape": " x ".join(map(str, shared.shape)) or "scalar",
        "lr": f"{shared.lr:.4g}",
        "synchronized_lr": f"{shared.synchronized_lr:.4g}",
        "owner": ", ".join(map(str, owners)) or None,
        "bytes": f"{math.ceil(sum(sent)):,}" if sent else None,
    }
    return [NOT_SO if cell is None else str(cell) for cell in cells.values()] + [str(len(rows))]


def explain(
    groups: Sequence[Mapping[str, Any]],
    rooms: Rooms,
    consensus: Consensus,
    owners: Mapping[str, int],
    *,
    apart: bool,
) -> Explanation:
    """Return what becomes of each parameter, see `Row`.

    Args:
        owners: by name.
        apart: replicas may take steps of their own, so that there is more to make equal.
    """
    table, store, rows = rooms.table, rooms.store, Explanation()
    step = rooms.step(groups, None)
    for i, (name, layout, index) in enumerate(zip(table.names, table.layouts, table.group_of, strict=True)):
        group = groups[index]
        place = group.get("name") or f"group {index}"

        def sent(i: int, batch: Batch | None) -> float | None:
            several = rooms.exchange.replicas > 1
            return consensus.bytes_sent(step, i, batch, apart=apart) if several else 0.0

        if i not in table.blocks:
            algorithm, lr = group["algorithm"], float(group["lr"])
            nothing = None, None, sent(i, None)
            rows.append(Row(name, "", layout.shape, place, algorithm, algorithm, lr, lr, *nothing))
            continue
        first = table.first_matrix[i]
        for k, label in enumerate(table.blocks[i].labels, first):
            batch, rule = store.kinds[store.batch_of[k]], group["local_update"]
            shape = batch.layout.shape
            factor = scale(group, shape)
            lr = local_lr(group) * (factor if "update_scale" in RULES[rule].own_options else 1.0)
            synchronized_lr = float(group["lr"]) * factor if consensus.uses_Q else lr
            rank = batch.rank if batch.Q is not None or RULES[rule].uses_rank else None
            owner = owners.get(table.matrices[k].name)
            rest = group["algorithm"], rule, lr, synchronized_lr, rank, owner, sent(i, batch)
            rows.append(Row(name, label, shape, place, *rest))
    return rows


class Explained(Protocol):
    """An optimizer that explains itself."""

    def explain(self) -> Explanation: ...


def assert_routing(optimizer: Explained, routing: Mapping[str, str]) -> None:
    """Check where parameters went, in a test of one's own model.

        assert_routing(opt, {r"\\.(wq|wk|wv|wo)\\.": "muon", r"lm_head|embed": "adamw", r"norm": "adamw"})

    Args:
        routing: from a pattern, searched for in the names with `re.search`, to what all parameters that it
            finds must have: a rule, an algorithm or the name of a group. The first pattern that finds a
            parameter counts.

    Raises:
        AssertionError: a parameter has something else, or none does what a pattern says; all of them.
    """
    rows, faults, used = optimizer.explain(), [], set()
    for row in rows:
        pattern = next((p for p in routing if re.search(p, row.name)), None)
        if pattern is None:
            continue
        used.add(pattern)
        if routing[pattern] not in (row.rule, row.algorithm, row.placement):
            got = f"rule {row.rule!r} of algorithm {row.algorithm!r} in {row.placement!r}"
            faults.append(
                f"{row.name}{row.block} {row.shape}: {pattern!r} wants {routing[pattern]!r}; got {got}"
            )
    faults += [
        f"{p!r} finds no parameter that no earlier pattern has found" for p in routing if p not in used
    ]
    if faults:
        raise AssertionError("\n".join(["parameters must be routed as said; got", *faults, "", str(rows)]))
