"""Replicas that come and go: forked jobs of one or more ranks each, a store beside them, and a parent that
never hangs.

    with Jobs() as jobs:
        jobs.start("a", train, ranks=2)
        jobs.kill("a")
        results = jobs.results("b", "c")

`train(address, name, *args)` is run on each rank of a job; with several ranks they are joined by a gloo
process group of their own, as under a torchrun of their own.
"""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # here, not in every rank
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed import TCPStore

from curvadion.sharding.group import TorchGroup
from curvadion.sharding.membership import Board
from support.ranks import serve_store

DEADLINE = 90.0  # seconds for all of it


class Jobs:
    """Jobs by name; all are ended at the end."""

    def __init__(self, deadline: float = DEADLINE) -> None:
        self._server, port = serve_store()
        self.store = TCPStore("localhost", port, is_master=False, wait_for_workers=False)
        self.address = f"localhost:{port}"
        self._jobs: dict[str, list[tuple[ForkProcess, Connection]]] = {}
        self._ended: list[ForkProcess] = []
        self._folder = tempfile.TemporaryDirectory()
        self._until = time.monotonic() + deadline
        self._started = 0

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._jobs):
            self.kill(name)
        self._server.kill()
        for process in [*self._ended, self._server]:
            process.join()
        self._folder.cleanup()

    def start(self, name: str, fn: Callable[..., Any], *args: Any, ranks: int = 1) -> None:
        """Start a job, in the place of an earlier one of this name."""
        assert name not in self._jobs
        context = torch.multiprocessing.get_context("fork")
        self._started += 1
        file = Path(self._folder.name) / f"store{self._started}"
        job = []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            given = (rank, ranks, file, sender, fn, (self.address, name, *args))
            process = context.Process(target=_main, args=given)
            process.start()
            sender.close()
            job.append((process, receiver))
        self._jobs[name] = job

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Send all ranks of a job a signal; after SIGKILL another one may have its name."""
        for process, _ in self._jobs[name]:
            if process.exitcode is None:
                os.kill(process.pid or 0, how)
        if how == signal.SIGKILL:
            self._ended += [process for process, _ in self._jobs.pop(name)]

    def died(self, name: str) -> bool:
        """Wait until a rank of a job has died or returned; end its others, as torchrun does, if it died."""
        processes = [process for process, _ in self._jobs[name]]
        ready = wait([process.sentinel for process in processes], timeout=max(0.0, self._left()))
        assert ready, f"{name} neither died nor returned"
        dead = [process for process in processes if process.sentinel in ready]
        for process in dead:
            process.join()
        if all(process.exitcode == 0 for process in dead):
            return False
        time.sleep(0.1)
        if not any(process.exitcode == -signal.SIGKILL for process, _ in self._jobs[name]):
            self.results(name)  # which raises what they raised
        self.kill(name)
        return True

    def wait_for(self, key: str, least: int) -> None:
        """Wait until jobs have counted so far in the store."""
        while self.store.add(key, 0) < least:
            assert self._left() > 0, f"{key} is {self.store.add(key, 0)}"
            for name, job in self._jobs.items():
                for process, receiver in job:
                    if process.exitcode not in (None, 0) and receiver.poll():
                        raise AssertionError(f"{name} failed:\n{pickle.loads(receiver.recv_bytes())[1]}")
            time.sleep(0.01)

    def results(self, *names: str) -> list[Any]:
        """Return what the ranks of these jobs returned, job by job; of one rank, not in a list."""
        found = []
        for name in names:
            values = [self._result(name, *rank) for rank in self._jobs[name]]
            found.append(values if len(values) > 1 else values[0])
        return found

    def _result(self, name: str, process: ForkProcess, receiver: Connection) -> Any:
        assert receiver.poll(max(0.0, self._left())), f"{name} did not finish in time"
        try:
            succeeded, value = pickle.loads(receiver.recv_bytes())
        except EOFError:
            process.join(5)
            raise AssertionError(f"{name} died, exit code {process.exitcode}") from None
        assert succeeded, f"{name} failed:\n{value}"
        return value

    def _left(self) -> float:
        return self._until - time.monotonic()


def _main(
    rank: int, ranks: int, file: Path, sender: Connection, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        if ranks > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{file}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=60),
            )
        message = True, fn(*args)
        if ranks > 1:
            dist.barrier()
    except BaseException:
        message = False, traceback.format_exc()
    sender.send_bytes(pickle.dumps(message))
    sender.close()
    os._exit(0 if message[0] else 1)  # threads and sockets need no farewell


# What a rank does where others notice: registers of the store, and collectives between replicas.
OPERATIONS = [
    *((Board, name) for name in ("read", "write", "swap", "add", "append", "wipe")),
    *((TorchGroup, name) for name in ("all_reduce", "all_to_all", "all_gather", "broadcast", "meet")),
]


def on_operations(happened: Callable[[str, int, bool], None]) -> None:
    """Call happened(name, how many so far, False) before each operation of this process's main thread, and
    with True after it."""
    count = 0

    def watch(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            nonlocal count
            if threading.current_thread() is not threading.main_thread():
                return original(*args, **options)
            count += 1
            mine = count
            happened(name, mine, False)
            result = original(*args, **options)
            happened(name, mine, True)
            return result

        setattr(owner, name, staticmethod(watched) if name == "meet" else watched)

    for owner, name in OPERATIONS:
        watch(owner, name)


def end() -> None:
    """End this process as an outage of its machine does."""
    os.kill(os.getpid(), signal.SIGKILL)
