"""Real processes in which one rank is killed, stopped, late or of another opinion, and what the others see.

`run_faulty` forks ranks as `run_ranks` does, but ends nobody: each rank tells its outcome and when it came,
or is found dead or hung at the deadline. The store lives in a process of its own, as under torchrun.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._dynamo  # DTensor imports it on first use: here, not in every rank
import torch.distributed as dist
import torch.multiprocessing

from support.ranks import serve_store

TIMEOUT = 4.0  # seconds, of the job's process group


@dataclass
class Told:
    """What became of a rank.

    Attributes:
        kind: "ok", the name of an exception, "killed", "aborted", "stopped" or "hung"; "not begun" where the
            fault never came, as on a machine too busy to connect ranks within the timeout.
        message: of the exception.
        seconds: from the fault to the outcome; NaN if there is none.
        value: what the function returned.
    """

    kind: str
    message: str = ""
    seconds: float = float("nan")
    value: Any = None


class Reporter:
    """Passed to the function: says when the fault happens, before it does."""

    def __init__(self, sender: Connection) -> None:
        self._sender = sender

    def fault(self) -> None:
        self._sender.send_bytes(pickle.dumps(("fault", time.monotonic(), None)))

    def send(self, kind: str, message: str, value: Any = None) -> None:
        self._sender.send_bytes(pickle.dumps((kind, time.monotonic(), (message, value))))


def run_faulty(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT,
    deadline: float = 5 * TIMEOUT,
    lives_on: bool = False,
) -> list[Told]:
    """Run fn(reporter, *args) on every rank; a rank that raised goes, or lives on until the deadline."""
    context = torch.multiprocessing.get_context("fork")
    server, port = serve_store()
    ranks, receivers = [], {}
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(rank, world_size, port, sender, timeout, lives_on, fn, args)
        )
        process.start()
        sender.close()
        ranks.append(process)
        receivers[receiver] = rank
    told, fault, until = [Told("hung") for _ in ranks], None, time.monotonic() + deadline
    ended: dict[int, float] = {}
    while receivers and (rest := until - time.monotonic()) > 0:
        for receiver in wait(list(receivers), timeout=rest):
            assert isinstance(receiver, Connection)
            rank = receivers[receiver]
            try:
                kind, when, what = pickle.loads(receiver.recv_bytes())
            except EOFError:
                del receivers[receiver]
                if told[rank].kind == "hung":
                    ranks[rank].join(5)
                    code = ranks[rank].exitcode
                    told[rank] = Told("killed" if code == -signal.SIGKILL else "aborted", f"exit code {code}")
                continue
            if kind == "fault":
                fault = when if fault is None else fault
            else:
                told[rank] = Told(kind, what[0], value=what[1])
                ended[rank] = when
        if all(t.kind != "hung" or _stopped(ranks[r].pid) for r, t in enumerate(told)):
            break
    for rank, process in enumerate(ranks):
        if told[rank].kind == "hung" and _stopped(process.pid):
            told[rank] = Told("stopped")
        if rank in ended and fault is not None:
            told[rank].seconds = ended[rank] - fault
    for process in [*ranks, server]:
        process.kill()
        process.join()
    return told if fault is not None else [Told("not begun", f"{t.kind}: {t.message}") for t in told]


def _stopped(pid: int | None) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    sender: Connection,
    timeout: float,
    lives_on: bool,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    reporter = Reporter(sender)
    if not os.environ.get("SHOW_RANKS"):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
    try:
        store = dist.TCPStore("localhost", port, is_master=False)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        reporter.send("ok", "", fn(reporter, *args))
    except BaseException as error:
        traceback.print_exc()
        reporter.send(type(error).__name__, str(error))
    if lives_on:
        signal.pause()
    else:
        os._exit(0)
