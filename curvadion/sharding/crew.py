"""The ranks among which owners of matrices are chosen, and how they lie: those of one replica, or of all."""

import functools
from typing import Any

import torch.distributed as dist

from curvadion.sharding.group import AllToAll, Group, Pairwise, TorchGroup
from curvadion.sharding.layout import Layout, ShardMesh, group_of
from curvadion.sharding.region import Axes, Region


class Crew:
    """The ranks of a replica; or, given this rank's peers, those of all replicas, in each of which ranks lie
    alike.

    What a replica holds every other one holds as well, so that replicas are one more axis, the last, which
    splits nothing.

    Attributes:
        replicas, size: how many there are, and how many ranks they have together.
    """

    def __init__(self, shards: ShardMesh, peers: Group | None = None):
        self._shards, self._peers = shards, peers
        self.replicas = peers.size if peers is not None else 1
        self.size = shards.size * self.replicas

    @functools.cached_property
    def spacing(self) -> list[int]:
        """How far each replica's global ranks are from those of the first one; the same on all ranks."""
        ranks = self._peers.ranks if self._peers is not None else []
        return [rank - ranks[0] for rank in ranks] or [0] * self.replicas

    @functools.cached_property
    def _order(self) -> list[tuple[int, int, int]]:
        """(global rank, replica, place in the replica) of each, in the order of `group`."""
        mine = self.spacing[self._peers.rank] if self._peers is not None else 0
        found = [
            (rank + away - mine, replica, place)
            for replica, away in enumerate(self.spacing)
            for place, rank in enumerate(self._shards.members)
        ]
        return sorted(found) if self._shards.axes else found

    @property
    def members(self) -> list[int]:
        """Their global ranks."""
        return [rank for rank, _, _ in self._order]

    @functools.cached_property
    def index(self) -> int:
        """This rank's place among them."""
        replica = self._peers.rank if self._peers is not None else 0
        return [(k, place) for _, k, place in self._order].index((replica, self._shards.index))

    @functools.cached_property
    def inside(self) -> list[bool]:
        """Which of them are in this rank's replica."""
        mine = self._order[self.index][1]
        return [replica == mine for _, replica, _ in self._order]

    @functools.cached_property
    def coordinates(self) -> list[tuple[int, ...]]:
        """The place along each axis of each of them."""
        places = self._shards.coordinates
        return [(*places[place], replica) for _, replica, place in self._order]

    def regions(self, layout: Layout) -> tuple[Region, ...]:
        """Return the part of a parameter that each of them holds."""
        of_place = self._shards.regions(layout)
        return tuple(of_place[place] for _, _, place in self._order)

    def count(self, axes: Axes) -> int:
        """Return the number of ranks along axes of a replica."""
        return self._shards.count(axes)

    @functools.cached_property
    def group(self) -> AllToAll:
        """They as one group: a group that there is, if there is one, else one that they make now, all of them
        together, if they can without others.

        They can not where torch splits a group off the communicator of the whole world, in which ranks would
        have to take part that are not here. But then there is that communicator, and any two of its ranks may
        send each other messages over it.
        """
        if self._peers is not None and not self._shards.axes:
            return self._peers
        if self._peers is None and len(self._shards.axes) == 1:
            return self._shards.group(0)
        if len(self.members) < dist.get_world_size() and _splits_the_world():
            return Pairwise(self.members, self.index)
        return TorchGroup(group_of(tuple(self.members)))


def _splits_the_world() -> bool:
    world: Any = dist.group.WORLD
    return getattr(world, "bound_device_id", None) is not None
