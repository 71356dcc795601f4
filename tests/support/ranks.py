"""Run a function on several ranks: fork, gloo, and a parent that never hangs.

`run_ranks(world_size, fn, *args)` runs `fn(*args)` in `world_size` forked processes joined by a gloo process
group and returns the list of what they returned, by rank. Arguments travel through the fork, so they need not
be picklable; results do. The first rank that fails ends the others, and its traceback is raised in the
parent; ranks that are still running at the deadline are ended and reported with the line where each of them
stood. `run_program` does the same with a program that makes its own process group, or none.

Fork is about five times faster than forkserver and fifteen times faster than spawn, because torch is imported
once.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import runpy
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DTensor imports it on first use, for over a second: here, not in every rank
import torch.distributed as dist
import torch.multiprocessing

GROUP_TIMEOUT = 60.0  # seconds a collective waits for its peers
DEADLINE = 120.0  # seconds for the whole call; more where the kernels are interpreted


class RankFailed(AssertionError):
    """A rank raised, died or did not finish; the message carries its traceback."""


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, deadline: float | None = None, group: bool = True
) -> list[Any]:
    """Return [fn(*args) on rank 0, on rank 1, ...]; inside, torch.distributed is initialized with gloo, or
    without `group` the environment says what torchrun would."""
    context = torch.multiprocessing.get_context("fork")
    store, port = (None, None) if group else serve_store()
    with tempfile.TemporaryDirectory() as folder:
        receivers: dict[Connection, int] = {}
        processes: list[ForkProcess] = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main, args=(rank, world_size, Path(folder), sender, fn, args, port)
                )
                process.start()
                sender.close()
                receivers[receiver] = rank
                processes.append(process)
            return _collect(receivers, processes, Path(folder), time.monotonic() + (deadline or DEADLINE))
        finally:
            for process in [*processes, *([store] if store else [])]:
                process.kill()
                process.join()


def serve_store() -> tuple[ForkProcess, int]:
    """Start a TCPStore in a process of its own, to be killed; return it and its port.

    Never in the parent of ranks: the store's thread asks for the name of each peer, and a fork meanwhile
    leaves the C library's lock of that held for ever in the child, which then cannot connect to anything.
    """
    context = torch.multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender,), daemon=True)
    process.start()
    return process, receiver.recv()


def _serve(sender: Connection) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    sender.send(store.port)
    signal.pause()


def run_program(program: Path | str, *arguments: object, processes: int = 1) -> None:
    """Run a file, or text, as the main program of so many forked processes."""

    def run() -> None:
        sys.argv = [str(program), *map(str, arguments)]
        if isinstance(program, Path):
            runpy.run_path(str(program), run_name="__main__")
        else:
            exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})

    run_ranks(processes, run, group=False)


def _collect(
    receivers: dict[Connection, int], processes: list[ForkProcess], folder: Path, until: float
) -> list[Any]:
    world_size, results = len(processes), [None] * len(processes)
    pending = dict(receivers)
    while pending:
        ready = wait(list(pending), timeout=max(0.0, until - time.monotonic()))
        if not ready:
            raise RankFailed(_stuck(sorted(pending.values()), processes, folder))
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = pending.pop(receiver)
            try:
                succeeded, value = pickle.loads(receiver.recv_bytes())
            except EOFError:  # no message: killed, or aborted inside a collective
                processes[rank].join(5)
                exit_code = processes[rank].exitcode
                raise RankFailed(f"rank {rank} of {world_size} died, exit code {exit_code}") from None
            if not succeeded:
                raise RankFailed(f"rank {rank} of {world_size} failed:\n{value}")
            results[rank] = value
    return results


def _stuck(ranks: list[int], processes: list[ForkProcess], folder: Path) -> str:
    for rank in ranks:
        os.kill(processes[rank].pid or 0, signal.SIGUSR1)
    time.sleep(0.5)  # faulthandler writes at once; this is for a loaded machine
    stacks = [f"--- rank {rank} stood at\n{(folder / f'stack{rank}').read_text()}" for rank in ranks]
    return f"ranks {ranks} of {len(processes)} did not finish in time\n" + "\n".join(stacks)


def _rank_main(
    rank: int,
    world_size: int,
    folder: Path,
    sender: Connection,
    fn: Callable[..., Any],
    args: Any,
    port: int | None,
) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    # Tests gather whole tensors over meshes of two dimensions; DTensor warns of each as slow.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    with open(folder / f"stack{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        try:
            torch.set_num_threads(1)
            if port is None:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{folder / 'store'}",
                    rank=rank,
                    world_size=world_size,
                    timeout=timedelta(seconds=GROUP_TIMEOUT),
                )
            else:
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
                os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # which waits at that port
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
                os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
            message = (True, fn(*args))
            if dist.is_initialized():
                dist.barrier()  # a rank that leaves early would fail its peers' last collective
        except BaseException:
            message = (False, traceback.format_exc())
        # Plain pickle: torch's own reducer would send shared memory that dies with this process.
        sender.send_bytes(pickle.dumps(message))
        sender.close()
        if message[0] and dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)
