"""A run under `torchrun --max-restarts` of which one process is killed ends as the undisturbed one.

python tests/restarts.py
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).resolve().parent.parent
STEPS = 24
SMALL = (
    f"--dim 32 --layers 2 --heads 2 --seq 32 --batch 4 --steps {STEPS} --warmup-steps 2 --eval-bytes 1024 "
    "--lr 0.05 --tau 0.25 --checkpoint-every 8"
).split()
KILL_AT, DEADLINE = 11, 400.0  # a step after the first checkpoint; seconds for a run


def start(out: Path, restarts: int) -> subprocess.Popen[bytes]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    torchrun += ["--max-restarts", str(restarts), str(ROOT / "scripts" / "train.py"), *SMALL]
    where = ["--text", str(ROOT / "scripts"), "--out", str(out), "--checkpoint", str(out / "checkpoints")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # torch gives restarted workers the store of the first attempt, with addresses of processes that are gone.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    log = (out / "log.txt").open("wb")
    return subprocess.Popen(
        [*torchrun, *where, "--resume"], env=environment, stdout=log, stderr=log, start_new_session=True
    )


def worker(agent: int, rank: int) -> int:
    """The process of a rank, a child of torchrun's."""
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise LookupError(f"torchrun has no worker of rank {rank}")


def steps(out: Path) -> int:
    try:
        return len((out / "steps.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def run(out: Path, kill: int | None, restarts: int) -> str:
    """Train; kill this rank on the way. Returns what torchrun printed."""
    out.mkdir(parents=True)
    process, until, killed = start(out, restarts), time.monotonic() + DEADLINE, kill is None
    while process.poll() is None and time.monotonic() < until:
        if not killed and steps(out) > KILL_AT:
            os.kill(worker(process.pid, kill or 0), signal.SIGKILL)
            killed = True
        time.sleep(0.05)
    if late := process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its workers
        process.wait(60)
    log = (out / "log.txt").read_text()
    if late or process.returncode or not killed:
        raise AssertionError(f"late: {late}, exit code {process.returncode}, killed: {killed}\n{log[-6000:]}")
    return log


def last(out: Path) -> dict[str, Any]:
    file = out / "last.pt"
    dcp_to_torch_save(out / "checkpoints" / f"step-{STEPS}", file)
    return flat(torch.load(file, weights_only=False))


def flat(tree: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {at: tree}
    return {key: value for name, part in tree.items() for key, value in flat(part, f"{at}/{name}").items()}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names of what is not bitwise equal."""
    found = sorted(a.keys() ^ b.keys())
    for key in a.keys() & b.keys():
        if isinstance(a[key], torch.Tensor):
            same = torch.equal(a[key], b[key])
        else:
            same = repr(a[key]) == repr(b[key])
        found += [] if same else [key]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rank", type=int, default=2, help="whose process is killed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        run(calm, None, 0)
        log = run(killed, options.rank, 2)
        wrong = differing(last(calm), last(killed))
        names = len(last(calm))
    if wrong:
        sys.exit(
            f"{len(wrong)} of {names} entries of the last checkpoint differ: {wrong[:10]}\n{log[-3000:]}"
        )
    print(f"all {names} entries of the last checkpoint are bitwise equal")


if __name__ == "__main__":
    main()
