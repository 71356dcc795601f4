"""A group of replicas that may leave and come back: one view of it after the other, each with a group of its
own.

What crosses replicas goes one of two ways. Small maxima (the gate's key, what is compared) are rows of a
ballot, see `membership`: every rank of every replica gets the same answer of the same members, however many
leave meanwhile. Sums, and what travels in few bits, go over gloo. There a failure is noted and nothing more:
this rank goes on with the same collectives inside its replica as its peers, among whom it may be the only one
to have met it, until all ask `settled()`, which is a ballot too. Either every rank of every member had all of
it, or the view is closed, the next one is made of those that are left, and all of them do it again.

Who calls what, in which order, and what a replica that leaves there means:

    local step            nothing; noticed at the next ballot
    check, gate           a ballot each. Closed: a view without it, and the same question again
    pseudo-gradients      first leg, second leg, and a ballot, `settled()`. Closed: X_0, X_i and residuals are
                          what they were; a view without it, and again
    X, X_0, U are moved   nothing; whoever leaves here leaves after the step
    next step begins      if that ballot found newcomers: a view with them; X_0, U and the rest from its first
                          member to them; a ballot. Closed: a view without those that are gone, and again
"""

import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import DistError, PrefixStore, ReduceOp  # type: ignore[attr-defined]  # not in its stubs

from curvadion.sharding.group import DONE, TorchGroup, Work, gather, within_replica
from curvadion.sharding.membership import Board, Membership, Pulse, View

ATTEMPTS = 4  # to make a view; the last one without newcomers


class HandOver(Protocol):
    """What a newcomer lacks, as the optimizer knows it."""

    def fingerprint(self) -> int:
        """Return a number that is the same on all replicas that can take over each other's state."""

    def refuse(self) -> None:
        """Raise, because the fingerprints differ."""

    def tensors(self) -> list[Tensor]:
        """Return what is handed over: alike in number, shapes and dtypes on all replicas."""

    def note(self) -> dict[str, Any]:
        """Return what is no tensor, of types that torch.load takes with weights_only=True."""

    def take(self, tensors: Sequence[Tensor], note: dict[str, Any]) -> None:
        """Take over what a peer has sent, all of it."""


class _Noted:
    """A collective under way whose failure its group notes.

    Args:
        group: where.
        work: what is under way.
        target, host: where the result goes, if it comes to another device.
    """

    def __init__(self, group: "ElasticGroup", work: Work, target: Tensor, host: Tensor):
        self._group, self._work, self._target, self._host = group, work, target, host

    def wait(self) -> None:
        """Wait until the result may be used, or there will be none."""
        with self._group.noting():
            self._group.await_(self._work)
            if self._host is not self._target:
                self._target.copy_(self._host)


class ElasticGroup:
    """This rank and its peers in the other replicas, of which some may leave and come back.

        replicas = ElasticGroup("10.0.0.1:29600", name="site-a", expected=3)
        opt = CurvaDion(param_groups_for(model), replicate_mesh=replicas, **LOW_COMMUNICATION)
        step = opt.join()

    Each replica is a job of its own (one torchrun each), whose default process group holds its ranks and no
    others; all replicas have the same number of them and the same shards. The store is a process beside them:
    `curvadion rendezvous`. A mean over the replicas is weighted by `tokens` if some replica counts any.

    Args:
        address: HOST:PORT of the store.
        name: of this replica, the same whenever it is started again, and no other's.
        expected: replicas that are waited for, up to the timeout, before the first step is taken, or before
            steps go on after all have left.
        lease: seconds without a sign of life after which a replica is taken to have left. Rank 0 of each
            replica gives one all the time, in a thread of its own.
        timeout: seconds for which replicas that are alive are waited for: for each other's next
            synchronization, and in each collective.

    Attributes:
        tokens: what this rank has trained on since the last synchronization: add to it. A replica counts for
            what all its ranks have.
        failure: of a collective since `settled()` was called last.
        history: for each view that this replica was in, its number and the names in it.
    """

    elastic = True

    def __init__(
        self, address: str, name: str, *, expected: int = 1, lease: float = 10.0, timeout: float = 600.0
    ):
        if not name or not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"a replica's name must be letters, digits, - and _; got {name!r}")
        if not (expected >= 1 and 0 < lease < timeout):
            raise ValueError(
                "expected must be at least 1, and lease positive and less than timeout; got "
                f"expected={expected}, lease={lease}, timeout={timeout}"
            )
        self.size, self.rank, self.ranks = 1, 0, list[int]()
        self.tokens: float = 0
        self.failure: str | None = None
        self.history: list[tuple[int, tuple[str, ...]]] = []
        self._lease, self._timeout = lease, timeout
        shard, shards = within_replica()
        self._board = Board(address, timeout)
        if (theirs := self._board.swap("shards", "", str(shards))) != str(shards):
            raise ValueError(
                f"all replicas must have as many ranks; got {shards} here and {theirs} elsewhere"
            )
        number = self._board.add(f"lives/{name}") if shard == 0 else 0
        life = f"{name}.{gather(number)[0]}"
        self._pulse = Pulse(lambda: Board(address, timeout), self._board, life, lease)
        if shard == 0:
            self._board.append("roll", f"{life} ")
            self._pulse.start()
        self._members = Membership(
            self._board,
            self._pulse,
            life,
            shard=shard,
            shards=shards,
            expected=expected,
            lease=lease,
            timeout=timeout,
        )
        self._view: View | None = None
        self._group: TorchGroup | None = None
        self._counted: dict[str, float] = {}  # tokens, by life, as of the last question
        self._knocking: list[str] = []

    @property
    def names(self) -> list[str]:
        """The names of the replicas that are in it, by rank."""
        return [] if self._view is None else [life.rpartition(".")[0] for life in self._view.members]

    @property
    def shards(self) -> int:
        """The number of ranks of each replica."""
        return self._members.shards

    @property
    def share(self) -> float:
        """What this replica counts for in a mean: its tokens over their mean, 1 where nobody counts any."""
        counted = [self._counted.get(life, 0) for life in self._here.members]
        return self.size * counted[self.rank] / sum(counted) if any(counted) and self.size > 1 else 1.0

    # ---- who takes part

    def join(self, steps: int, hand_over: HandOver) -> None:
        """Wait until this replica is in a view, and take over the state of its first member.

        Args:
            steps: taken so far; where all start anew, one with most hands over its state.
        """
        if self._view is not None:
            raise RuntimeError("a replica joins once; this one has; start a new process to join anew")
        try:
            _unpacked(_packed(hand_over.note()))  # now, rather than when somebody needs it
            while not self._form(self._members.invitation(steps), hand_over):
                pass
        except BaseException:
            self.leave()
            raise
        self._members.entered()

    def welcome(self, hand_over: HandOver) -> bool:
        """Let in those that the last ballot has found waiting; return whether there were any. All others of
        this group do so too, before their next step."""
        waiting, self._knocking = self._knocking, []
        if waiting:
            self._change(waiting, hand_over)
        return bool(waiting)

    def settled(self) -> bool:
        failure, self.failure = self.failure, None
        knocking = self._members.ballot(self._here, well=failure is None, ask=True)
        if knocking is None:
            self._change()
            return False
        self._knocking = [life for life in knocking.split(",") if life]
        return True

    def leave(self, *, finished: bool = False) -> None:
        """Tell the others that this replica is gone, so that they need not wait for the lease to be over.

        Args:
            finished: the run has come to its end, so that nobody is to join it any more.
        """
        with suppress(RuntimeError):  # the store may have been ended by now
            if finished:
                self._board.write("finished", self._members.life)
        self._pulse.stop()

    @property
    def _here(self) -> View:
        if self._view is None:
            raise RuntimeError(
                "a replica must join the others before it takes steps; call opt.join() once, after the "
                "optimizer is built or a checkpoint was loaded"
            )
        return self._view

    def _change(self, newcomers: Sequence[str] = (), hand_over: HandOver | None = None) -> None:
        """Go on in a view of those that are left, and these newcomers."""
        for attempt in range(ATTEMPTS):
            invited = newcomers if attempt + 1 < ATTEMPTS else ()
            if self._form(self._members.next_view(self._here, invited), hand_over):
                return
        raise RuntimeError(
            f"replicas that are all alive must reach one another; {ATTEMPTS} views could not be made, the "
            f"last one because of {self.failure}; see that ranks of different replicas can connect, and that "
            "GLOO_SOCKET_IFNAME names the right network"
        )

    def _form(self, view: View, hand_over: HandOver | None) -> bool:
        """Build the groups of a view, hand over what the fresh ones lack, and return whether all of its
        members have all of it."""
        self.failure, arrived, made = None, None, list[TorchGroup]()
        members, shard = list(view.members), self._members.shard
        rank = members.index(self._members.life)
        with self.noting():
            made.append(self._meet(view, f"{view.number}/{shard}", rank, len(members)))
            if hand_over is not None and (rank == 0 or self._members.life in view.fresh) and view.fresh:
                place = view.fresh.index(self._members.life) + 1 if rank else 0
                made.append(self._meet(view, f"{view.number}/{shard}/fresh", place, len(view.fresh) + 1))
                arrived = self._hand_over(view, made[1], hand_over)
        failure = self.failure
        agreed = self._members.ballot(view, well=failure is None) is not None
        if agreed:  # the group so far goes instead
            group, self._group = self._group, made.pop(0)
            made += [group] if group is not None else []
            del group
        Thread(target=made.clear, daemon=True).start()  # which waits for what is under way in them
        if not agreed:
            return False
        self._view, self.size, self.rank = view, len(members), rank
        self.history.append((view.number, tuple(self.names)))
        if arrived is not None and hand_over is not None:
            hand_over.take(*arrived)
        return True

    def _meet(self, view: View, where: str, rank: int, size: int) -> TorchGroup:
        self._members.come_together(view, where, size, 3 * self._lease)
        store = PrefixStore(f"group/{where}", self._board.store)
        return TorchGroup.meet(store, rank, size, connect=3 * self._lease, timeout=self._timeout)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note that a collective in the context's body has failed, and go on after it."""
        try:
            yield
        except RuntimeError as error:
            if type(error) is not RuntimeError and not isinstance(error, DistError):
                raise
            # Not the error itself, whose traceback would keep groups that are to end in another thread.
            self.failure = self.failure or f"{type(error).__name__}: {error}"

    # ---- collectives

    def all_reduce(self, tensor: Tensor, op: ReduceOp.RedOpType, *, wait: bool = False) -> Work:
        if op == ReduceOp.MAX:
            tensor.copy_(torch.tensor(self._maximum(tensor.flatten().tolist())).view(tensor.shape))
            return DONE
        return self._start("all_reduce", [tensor], op, wait=wait)

    def all_to_all(
        self,
        received: Tensor,
        sent: Tensor,
        received_sizes: list[int] | None = None,
        sent_sizes: list[int] | None = None,
        *,
        wait: bool = False,
    ) -> Work:
        return self._start("all_to_all", [received, sent], received_sizes, sent_sizes, wait=wait)

    def all_gather(self, whole: Tensor, piece: Tensor, *, wait: bool = False) -> Work:
        return self._start("all_gather", [whole, piece], wait=wait)

    def reduce_scatter(self, piece: Tensor, whole: Tensor, *, wait: bool = False) -> Work:
        return self._start("reduce_scatter", [piece, whole], wait=wait)

    def broadcast(self, tensor: Tensor, *, wait: bool = False) -> Work:
        return self._start("broadcast", [tensor], wait=wait)

    def _maximum(self, values: list[int]) -> list[int]:
        """Return the maxima over the replicas that are there; learn how many tokens each has counted."""
        while self._members.ballot(self._here, json.dumps(values), self.tokens) is None:
            self._change()
        rows, counted = zip(*self._members.rows(self._here), strict=True)
        self._counted = dict(zip(self._here.members, counted, strict=True))
        return [max(column) for column in zip(*map(json.loads, rows), strict=True)]

    def _start(self, collective: str, tensors: list[Tensor], *args: Any, wait: bool) -> Work:
        """Start a collective of gloo; the first tensor receives, the last one is sent."""
        if self.failure is not None:
            return DONE
        host = [tensor.cpu() for tensor in tensors]  # the same where they are there already
        with self.noting():
            assert self._group is not None, "a replica must join the others first"
            work = _Noted(self, getattr(self._group, collective)(*host, *args), tensors[0], host[0])
            if wait:
                work.wait()
            return work
        return DONE

    def await_(self, work: Any, view: View | None = None) -> None:
        """Wait for a collective of gloo, which itself would wait for the timeout where a peer waits for
        another that has gone. Raises RuntimeError as soon as it has failed, or the view is over."""
        view, pause = view or self._here, 0.0002
        while not work.is_completed():
            time.sleep(pause)
            pause = min(1.2 * pause, 0.005)
            if self._members.is_over(view):
                raise RuntimeError("a replica has left in the middle of a collective")
        work.wait()

    def _hand_over(
        self, view: View, group: TorchGroup, hand_over: HandOver
    ) -> tuple[list[Tensor], dict[str, Any]] | None:
        """Send rank 0's state to all others; return it there, in the memory of the host."""
        gives = group.rank == 0
        mine = hand_over.fingerprint()
        seen = torch.tensor([mine, -mine])
        self.await_(group.all_reduce(seen, ReduceOp.MAX), view)
        if seen[0] != -seen[1]:
            if not gives:
                hand_over.refuse()
            return None  # the newcomer leaves, which the ballot finds
        note = torch.tensor(list(_packed(hand_over.note())) if gives else [], dtype=torch.uint8)
        length = torch.tensor([note.numel()])
        self.await_(group.broadcast(length), view)
        note = note if gives else torch.empty(int(length), dtype=torch.uint8)
        self.await_(group.broadcast(note), view)
        tensors = [t.detach().cpu().contiguous() if gives else _like(t) for t in hand_over.tensors()]
        for tensor in tensors:  # as bytes, which gloo sends whatever the dtype
            self.await_(group.broadcast(tensor.view(-1).view(torch.uint8)), view)
        return None if gives else (tensors, _unpacked(bytes(note.tolist())))


def _packed(note: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(note, file)
    return file.getvalue()


def _unpacked(note: bytes) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(io.BytesIO(note), weights_only=True)
    return found


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
