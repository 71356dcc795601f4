"""Which replicas there are, where they come and go: agreed upon at one store, which none of them hosts.

The store is a `TCPStore`, and the only judge. What must be the same for all is a register there that changes
by compare-and-set alone, so that of two who disagree the first one wins and the other learns of it:

    roll              every life of every replica, NAME.NUMBER, appended when it starts
    beat/LIFE         a counter that goes on as long as the life does; "left" after it
    knock/LIFE        the number of steps of a life that waits to be let in; nothing after that
    view/N            who is in view N, written once
    state/N           the last ballot of view N that all ranks of all its members took part in; or that it is
                      closed
    count/N/B, row/N/B/SHARD/RANK     how many took part in ballot B so far, and what they said
    tokens/N/B/RANK   what each rank of a member has counted by then, one number after the other
    come/N/...        ranks that are about to build a group of view N
    here/N/LIFE       how many ranks of a member of the view before have nothing to wait for but view N
    finished          a life that has seen the end of the run

A ballot ends in one of two ways, the same for every rank: all were there and well, or the view is closed.
Whoever finds that its part has failed, or that a member has stopped beating, closes it. A view that is closed
stays so, and no next one is made before that by anybody that is not in it; so a replica that was stopped for
a while and goes on afterwards cannot go on in a view that others have left.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its stubs

LEFT = "left"
# States of a view: nothing before its first ballot, BALLOT|KNOCKING after each, and at the end one of these.
NEVER_AGREED, CLOSED = "closed before its first ballot", "closed"


class LeftBehindError(RuntimeError):
    """The other replicas have gone on without this one, which has to be started again."""


@dataclass(frozen=True)
class View:
    """Who takes part for a while.

    Attributes:
        number: of this view; they are counted from 1.
        members: lives, in the order of their ranks; the first hands over what the fresh ones lack.
        fresh: those that have no state of this run yet.
    """

    number: int
    members: tuple[str, ...]
    fresh: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{','.join(self.members)}|{','.join(self.fresh)}"

    @staticmethod
    def of(number: int, text: str) -> "View":
        """Return the view that this is the text of."""
        members, fresh = (tuple(filter(None, part.split(","))) for part in text.split("|"))
        return View(number, members, fresh)


def is_closed(state: str) -> bool:
    """Return whether nobody goes on in a view of this state."""
    return state in (NEVER_AGREED, CLOSED)


class Board:
    """The store, as registers of text.

    Args:
        address: HOST:PORT.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, address: str, timeout: float):
        host, _, port = address.rpartition(":")
        if not (host and port.isdigit()):
            raise ValueError(
                f"the address of the store must be HOST:PORT; got {address!r}; start one with `curvadion "
                "rendezvous`, which says its own"
            )
        self.store = TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )

    def read(self, key: str) -> str:
        """Return what is there, nothing if nothing is."""
        return str(self.store.get(key).decode()) if self.store.check([key]) else ""

    def read_all(self, keys: Sequence[str]) -> list[str]:
        """Return what is there; all of it must be."""
        return [value.decode() for value in self.store.multi_get(list(keys))]

    def write(self, key: str, value: str) -> None:
        """Write a register that nobody else writes."""
        self.store.set(key, value)

    def swap(self, key: str, before: str, after: str) -> str:
        """Write if what is there is as it was before; return what is there then."""
        return str(self.store.compare_set(key, before, after).decode())

    def add(self, key: str, amount: int = 1) -> int:
        """Add to a number, and return it."""
        return int(self.store.add(key, amount))

    def append(self, key: str, value: str) -> None:
        """Write behind what is there."""
        self.store.append(key, value)  # type: ignore[attr-defined]

    def wipe(self, keys: Iterable[str]) -> None:
        """Remove registers that nobody reads any more: who read one that is not there would wait for it."""
        for key in keys:
            self.store.delete_key(key)


class Pulse:
    """The beat of this life, and what is heard of those of others.

    Args:
        open_board: makes a connection of its own, for the thread that beats.
        board: where to listen.
        life: this one.
        lease: seconds without a beat after which a life is over.

    Attributes:
        litter: registers that nobody reads any more.
    """

    def __init__(self, open_board: Callable[[], Board], board: Board, life: str, lease: float):
        self._open, self._board, self._life, self._lease = open_board, board, life, lease
        self._heard: dict[str, tuple[str, float]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.litter: deque[str] = deque()

    def start(self) -> None:
        """Beat from now on."""
        board = self._open()
        board.write(f"beat/{self._life}", "0")
        self._thread = threading.Thread(target=self._run, args=(board,), daemon=True)
        self._thread.start()

    def _run(self, board: Board) -> None:
        beats = 0
        with suppress(RuntimeError):  # the store is gone, which all hear of at their next ballot
            while not self._stop.wait(self._lease / 5):
                beats += 1
                board.write(f"beat/{self._life}", str(beats))
                board.wipe(self.litter.popleft() for _ in range(len(self.litter)))
            board.write(f"beat/{self._life}", LEFT)

    def stop(self) -> None:
        """Say that this life is over."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._lease)

    def silent(self, lives: Iterable[str]) -> set[str]:
        """Return those that are over, as far as is known by now: whoever asks again hears more."""
        now, over = time.monotonic(), set()
        for life in set(lives) - {self._life}:  # which may have been stopped for a while
            beat = self._board.read(f"beat/{life}")
            if self._heard.get(life, ("", 0.0))[0] != beat:
                self._heard[life] = beat, now
            name, _, number = life.rpartition(".")
            started_again = self._board.add(f"lives/{name}", 0) > int(number)
            if beat in ("", LEFT) or started_again or now - self._heard[life][1] > self._lease:
                over.add(life)
        return over


class Membership:
    """This life among the others. All ranks of a replica make the same calls, and get the same answers.

    Args:
        board: the store.
        pulse: of this life.
        life: NAME.NUMBER.
        shard, shards: which rank of the replica this is, and how many there are.
        expected: replicas that are waited for before any starts.
        lease, timeout: seconds; see `ElasticGroup`.
    """

    def __init__(
        self,
        board: Board,
        pulse: Pulse,
        life: str,
        *,
        shard: int,
        shards: int,
        expected: int,
        lease: float,
        timeout: float,
    ):
        self.life, self.shard, self.shards = life, shard, shards
        self._board, self._pulse = board, pulse
        self._expected, self._lease, self._timeout = expected, lease, timeout
        self._number = 0  # of the last view that was tried
        self._looked = 0.0  # when `is_over` did
        self._ballot, self._state = 0, ""  # of that view

    # ---- ballots

    def ballot(
        self,
        view: View,
        row: str | None = None,
        tokens: float = 0,
        *,
        well: bool = True,
        ask: bool = False,
    ) -> str | None:
        """Take part in the next ballot of a view, and wait for its end.

        Args:
            row, tokens: what this rank has to say, and has counted, for `rows`.
            well: whether all went well here; if not, the view is closed.
            ask: whether to ask who knocks.

        Returns: None if the view is closed; else who knocks, as the last one to take part saw it.
        """
        if view.number != self._number:
            self._number, self._ballot, self._state = view.number, 0, ""
        where, mine = f"{view.number}/{self._ballot}", view.members.index(self.life)
        if row is not None:
            self._board.write(f"row/{where}/{self.shard}/{mine}", row)
            self._board.append(f"tokens/{where}/{mine}", f"{float(tokens)!r} ")
        if not well:
            self._close(view)
        elif self._board.add(f"count/{where}") == len(view.members) * self.shards:
            knocking = ",".join(sorted(self.knocking(but=view.members))) if ask else ""
            self._board.swap(f"state/{view.number}", self._state, f"{self._ballot}|{knocking}")
        state = self._outcome(view)
        self._sweep(view)
        self._ballot, self._state = self._ballot + 1, state
        return None if is_closed(state) else state.partition("|")[2]

    def come_together(self, view: View, where: str, size: int, timeout: float) -> None:
        """Wait until so many ranks have come here. Raises RuntimeError as soon as somebody has closed the
        view, or after the timeout."""
        self._board.add(f"come/{where}")
        until = time.monotonic() + timeout
        while self._board.add(f"come/{where}", 0) < size:
            if is_closed(self._board.read(f"state/{view.number}")) or time.monotonic() > until:
                raise RuntimeError("a replica has left, or does not come, while its group is made")
            time.sleep(0.01)

    def is_over(self, view: View) -> bool:
        """Return whether somebody has closed a view, or a member is gone; looks now and then only."""
        now = time.monotonic()
        if now < self._looked + min(0.2, self._lease / 5):
            return False
        self._looked = now
        return is_closed(self._board.read(f"state/{view.number}")) or bool(self._pulse.silent(view.members))

    def rows(self, view: View) -> list[tuple[str, float]]:
        """Return what the peers of this rank said in the ballot before, in the order of the members, and what
        all ranks of each member had counted."""
        where, members = f"{view.number}/{self._ballot - 1}", range(len(view.members))
        said = self._board.read_all([f"row/{where}/{self.shard}/{k}" for k in members])
        counted = self._board.read_all([f"tokens/{where}/{k}" for k in members])
        # As one sum that is rounded once: ranks have come in any order.
        return [(row, math.fsum(map(float, c.split()))) for row, c in zip(said, counted, strict=True)]

    def _outcome(self, view: View) -> str:
        until, listen, pause = time.monotonic() + self._timeout, time.monotonic() + self._lease / 5, 0.001
        while (state := self._board.read(f"state/{view.number}")) == self._state:
            time.sleep(pause)
            pause, now = min(1.5 * pause, 0.05), time.monotonic()
            if now > listen:
                listen = now + self._lease / 5
                if now > until or self._pulse.silent(view.members):
                    self._close(view)
        return state

    def _close(self, view: View) -> None:
        self._swap_closed(view.number, self._state)

    def _swap_closed(self, number: int, state: str) -> bool:
        """Close a view if its state is still this one; return whether it is closed."""
        return is_closed(self._board.swap(f"state/{number}", state, CLOSED if state else NEVER_AGREED))

    def _sweep(self, view: View) -> None:
        """Have removed what all have read: all took part in the ballot before."""
        if self.shard == 0 and view.members[0] == self.life and self._ballot > 1:
            where, rows = f"{view.number}/{self._ballot - 2}", range(len(view.members))
            self._pulse.litter.extend((f"count/{where}", *(f"tokens/{where}/{k}" for k in rows)))
            self._pulse.litter.extend(f"row/{where}/{s}/{k}" for s in range(self.shards) for k in rows)

    # ---- views

    def next_view(self, view: View, newcomers: Sequence[str] = ()) -> View:
        """Return the view after the last that was tried: its members that are here, and these newcomers.

        Waits for members of the last view until all their ranks are here too, or they have been silent for
        the lease, or the timeout is over. Raises LeftBehindError if the others have gone on without this one.
        """
        number = self._number + 1
        here, until = f"here/{number}", time.monotonic() + self._timeout
        self._board.add(f"{here}/{self.life}")
        while not (text := self._board.read(f"view/{number}")):
            present = [life for life in view.members if self._board.add(f"{here}/{life}", 0) == self.shards]
            silent = self._pulse.silent([*view.members, *newcomers])
            if time.monotonic() > until or set(view.members) <= {*present, *silent}:
                new = [life for life in newcomers if life not in silent]
                for life in silent.intersection(newcomers):
                    self._board.write(f"knock/{life}", "")
                present = [life for life in present if life not in silent]
                new = new if present else []  # who has the state that they lack
                text = self._propose(View(number, (*present, *new), tuple(new)))
                break
            time.sleep(min(0.02, self._lease / 20))
        return self._entered(View.of(number, text))

    def invitation(self, steps: int) -> View:
        """Return the first view that this life, which is in none, is to be in; wait for it.

        The members of the last view let it in. If all of them are gone, those who wait make a view of their
        own as soon as they are as many as expected, or have waited for the timeout.

        Args:
            steps: taken so far; of those who wait, one with most hands over its state.

        Raises LeftBehindError if the run has come to its end.
        """
        began, number = time.monotonic(), self._number
        while True:
            if finished := self._board.read("finished"):
                raise LeftBehindError(
                    f"the run of the replicas that meet at this store is over: {finished} has finished it; "
                    "start a store for each run"
                )
            if not self._board.read(f"knock/{self.life}"):
                self._board.write(f"knock/{self.life}", str(steps))
            while text := self._board.read(f"view/{number + 1}"):
                number += 1
                view = View.of(number, text)
                if self.life in view.members and not is_closed(self._board.read(f"state/{number}")):
                    return self._entered(view)
            waiting = self.knocking()
            waiting = {life: n for life, n in waiting.items() if life not in self._pulse.silent(waiting)}
            enough = len(waiting) >= self._expected or time.monotonic() - began > self._timeout
            if enough and self.life in waiting and self._over(number):
                order = sorted(waiting, key=lambda life: (-waiting[life], life))
                self._propose(View(number + 1, tuple(order), tuple(order[1:])))
                continue
            time.sleep(min(0.1, self._lease / 10))

    def entered(self) -> None:
        """Stop knocking: this life is in a view that all its members have agreed to."""
        if self.shard == 0:
            self._board.write(f"knock/{self.life}", "")

    def knocking(self, but: Iterable[str] = ()) -> dict[str, int]:
        """Return those that wait to be let in, and how many steps they have taken."""
        newest: dict[str, str] = {}
        for life in self._board.read("roll").split():
            name, _, number = life.rpartition(".")
            if int(number) > int(newest.get(name, "0.0").rpartition(".")[2]):
                newest[name] = life
        found = {life: self._board.read(f"knock/{life}") for life in newest.values() if life not in but}
        return {life: int(steps) for life, steps in found.items() if steps}

    def _over(self, last: int) -> bool:
        """Return whether no view goes on: close those up to the last one that was agreed to, if all of their
        members that have state are gone."""
        for number in range(last, 0, -1):
            view = View.of(number, self._board.read(f"view/{number}"))
            state = self._board.read(f"state/{number}")
            agreed = state not in ("", NEVER_AGREED)
            holders = set(view.members) - (set() if agreed else {*view.fresh, *self.knocking()})
            if holders - self._pulse.silent(holders):
                return False
            if not is_closed(state) and not self._swap_closed(number, state):
                return False
            if agreed:
                return True
        return True

    def _propose(self, view: View) -> str:
        return self._board.swap(f"view/{view.number}", "", str(view))

    def _entered(self, view: View) -> View:
        if self.life not in view.members:
            raise LeftBehindError(
                f"the other replicas have gone on without this one, {self.life}, which was silent for longer "
                f"than the lease of {self._lease:g} s or came later than the timeout of {self._timeout:g} s; "
                "start it again: it then takes over the state of a peer"
            )
        return view
