"""Ranks that do not come: the job's timeout for every group, errors that say what was waited for, and calls
that begin together or not at all."""

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

try:
    from torch.distributed.constants import default_pg_nccl_timeout
except ImportError:  # a torch without NCCL
    default_pg_nccl_timeout = default_pg_timeout

# What errors of gloo say, which are RuntimeErrors; the second where another collective of the group has timed
# out.
GLOO = ("gloo/", "Application timeout caused pair closure")
ROLL_CALL = 1.0  # seconds in which ranks that failed in the same collective find one another


class LostRankError(RuntimeError):
    """Ranks that a collective needs have ended, were stopped, or called something else; raised on each of the
    others, at once where a connection broke, else after the timeout of `init_process_group`."""


def _backends(group: ProcessGroup) -> Iterator[Any]:
    for device in group._device_types:
        with suppress(RuntimeError):
            yield group._get_backend(torch.device(device))


def timeout_of(group: ProcessGroup) -> timedelta | None:
    """Return how long a collective of this group waits for its ranks, None if it does not say."""
    found = (getattr(getattr(b, "options", None), "_timeout", None) for b in _backends(group))
    return next((timeout for timeout in found if timeout is not None), None)


def follow_job(group: ProcessGroup) -> None:
    """Give a group that has torch's default timeout that of the job, which `init_process_group` got.

    A DeviceMesh makes its groups without asking for it: 10 or 30 minutes, whatever the job says. What
    somebody has set for this group stays.
    """
    job = dist.group.WORLD
    wanted = timeout_of(job) if job is not None else None
    if (
        group is job
        or wanted is None
        or timeout_of(group) not in (default_pg_timeout, default_pg_nccl_timeout)
    ):
        return
    for backend in _backends(group):
        with suppress(AttributeError, RuntimeError):  # a backend that waits for nobody
            backend._set_default_timeout(wanted)


@dataclass
class Place:
    """Where this rank is, for messages.

    Attributes:
        call: of the optimizer.
        steps: taken so far.
    """

    call: str = "construction"
    steps: int = 0

    def __str__(self) -> str:
        return f"{self.call} after {self.steps} steps"


def explained(error: Exception, place: Place, what: str, ranks: Sequence[int]) -> "LostRankError | None":
    """Return the error to raise instead of one that a backend raises when ranks are missing, None for others.

    Args:
        what: the collective, and its purpose.
        ranks: global ones, of its group; empty where these are no processes.
    """
    if not ranks or not (isinstance(error, dist.DistError) or any(word in str(error) for word in GLOO)):
        return None
    return LostRankError(_message(place, what, ranks, error))


def _message(place: Place, what: str, ranks: Sequence[int], error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    missing, words = _roll_call(place, what, ranks)
    who = f"nothing was heard of {_some(missing)}" if missing else "all of them failed in it"
    return (
        f"all ranks must take part in every collective; in {place}, {what} of the global ranks "
        f"{_some(ranks)} did not come to its end; {who}{words}. A rank has ended, was stopped, or called "
        "something else than the others: its own error, or the end of its log, says why. Nothing can be sent "
        "any more: end this process, start all ranks again (as torchrun --max-restarts does) and load the "
        f"last checkpoint. The backend says: {lines[0][:200]}"
    )


def _some(ranks: Iterable[int]) -> str:
    ranks = sorted(ranks)
    return f"{ranks[:16]}{' and others' if len(ranks) > 16 else ''}"


# ---- what ranks say of themselves, in the job's store


def _store() -> Any:
    # torchrun may give workers that it starts again the store of those before them.
    return PrefixStore(f"curvadion/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", _get_default_store())


def _key(rank: int) -> str:
    return f"lost/{rank}"


def _roll_call(place: Place, what: str, ranks: Sequence[int]) -> tuple[list[int], str]:
    """Say in the store where this rank failed; return which others have said nothing within ROLL_CALL, and
    what those said that are elsewhere."""
    me, found = dist.get_rank(), dict[int, str]()
    others = [rank for rank in ranks if rank != me]

    def call() -> None:
        store = _store()
        store.set(_key(me), f"{place}, {what}")
        with suppress(dist.DistError, RuntimeError):
            store.wait([_key(rank) for rank in others], timedelta(seconds=ROLL_CALL))
        for rank in others:
            if store.check([_key(rank)]):
                found[rank] = store.get(_key(rank)).decode()

    thread = threading.Thread(target=_quietly, args=(call,), daemon=True)  # the store may be gone, or stopped
    thread.start()
    thread.join(2 * ROLL_CALL + 1)
    elsewhere = {rank: text for rank, text in sorted(found.items()) if text != f"{place}, {what}"}
    words = "".join(f"; rank {rank} was in {text}" for rank, text in list(elsewhere.items())[:4])
    return [rank for rank in others if rank not in found], words


_WORDS: set[int] = set()  # ranks that have left word; this one, if any


def leave_word(place: Place, error: Exception) -> None:
    """Say in the store what befell this rank, for the errors of those that will miss it."""
    if dist.is_initialized() and not isinstance(error, LostRankError):
        with suppress(Exception):
            _store().set(
                _key(dist.get_rank()), f"{place}, and raised {type(error).__name__}: {str(error)[:200]}"
            )
            _WORDS.add(dist.get_rank())


def take_word_back() -> None:
    """Remove what `leave_word` has left in the store: this rank goes on after it."""
    if _WORDS:
        with suppress(Exception):
            _store().delete_key(_key(_WORDS.pop()))


def _quietly(call: Callable[[], None]) -> None:
    with suppress(Exception):
        call()


# ---- calls that begin together

_MEETINGS: Counter[str] = Counter()


def meet(place: Place, ranks: Sequence[int], what: str) -> None:
    """Wait until all these ranks have come here; in the job's store, so that no collective of one call is
    paired with one of another.

    Raises LostRankError after the timeout of the job, naming who did not come.
    """
    job = dist.group.WORLD if dist.is_initialized() else None
    wanted = timeout_of(job) if job is not None else None
    if len(ranks) < 2 or wanted is None:
        return
    name = hashlib.sha256(repr((sorted(ranks), what)).encode()).hexdigest()[:16]
    _MEETINGS[name] += 1
    key, store, me = f"meet/{name}/{_MEETINGS[name]}", _store(), dist.get_rank()
    store.set(f"{key}/{me}", str(place))
    if store.add(key, 1) == len(ranks):
        return store.set(f"{key}/all", "")
    try:
        store.wait([f"{key}/all"], wanted)
    except (dist.DistError, RuntimeError) as error:
        missing = list(ranks)
        with suppress(Exception):
            missing = [rank for rank in ranks if not store.check([f"{key}/{rank}"])]
        raise LostRankError(
            f"all ranks must come to {what} together; this one is in {place}, and of the global ranks "
            f"{_some(ranks)} these did not come: {_some(missing)}. They have ended, were stopped, or called "
            "something else: call step(), synchronize(), consensus(), add_param_group() and "
            "load_state_dict() equally often and in the same order on every rank, and change requires_grad "
            "on all of them. End this process, start all ranks again and load the last checkpoint"
        ) from error
