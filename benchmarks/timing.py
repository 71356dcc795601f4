"""What the benchmarks share: models, buffers rotated past the cache, timing, launch counts, result rows.

A time is measured twice per repetition, because a kernel and the host that launches it are two things:

- `device_ms`: from the first to the last instruction on the GPU. The call is enqueued behind a kernel that
  only waits, so that the host is ahead and gaps between launches are hidden, unless the call itself waits for
  the device.
- `host_us`: how long the call keeps the host when the GPU is idle; `wall_ms`: from there until the GPU has
  finished.

On a CPU all three are one, and only the first is given. Variants take turns, each call on the next of several
copies of the buffers.
"""

import argparse
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The packages of this checkout, also where they are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
from curvadion.projection.nominal import SIZES, Decoder

ROOT = Path(__file__).resolve().parent.parent
CPU_CACHE = 64 << 20
CYCLES_PER_US = 2000  # of torch.cuda._sleep; a clock that is slower waits longer, which is as good
LONGEST_WAIT_US = 50_000

# ---- models


MODELS = {
    "small": Decoder(dim=64, layers=2, heads=4, ffn=192, vocabulary=256),
    "12m": Decoder(dim=256, layers=12, heads=8, ffn=688, vocabulary=4096),
    "160m": SIZES["160m"],
    "1b3": SIZES["1b3"],
}
TINY = ((768,), (2048,), (64, 64), (4096,), (16, 128), (1,))  # repeated: norms, biases, adapters


# ---- buffers


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache that data must not be found in."""
    if device.type != "cuda":
        return CPU_CACHE
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20


def copies_needed(bytes_touched: int, device: torch.device) -> int:
    """Return how many copies of the buffers take turns, so that none is in the cache when its turn comes."""
    cache = cache_bytes(device)
    if bytes_touched >= 8 * cache:
        return 1
    return min(64, max(2, math.ceil(2 * cache / max(1, bytes_touched)) + 1))


def random_tensors(
    shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return normally distributed tensors in one allocation, each beginning at a multiple of 64 elements."""
    starts = [0]
    for shape in shapes:
        starts.append(starts[-1] + (math.prod(shape) + 63) // 64 * 64)
    flat = torch.randn(starts[-1], device=device, dtype=dtype)
    return [
        flat[start : start + math.prod(shape)].view(shape)
        for start, shape in zip(starts, shapes, strict=False)
    ]


# ---- timing


@dataclass
class Variant:
    """One way to do an operation.

    Attributes:
        operation: what is done; variants of one operation share `bytes`.
        run: does it on one of `states`, which are copies of the same buffers.
        bytes: what the operation must move at least; the denominator of every variant.
        moved: what this way of doing it moves at least; None: not counted.
        flops: floating-point operations of the definition.
        notes: further fields of the result's row.
    """

    operation: str
    name: str
    run: Callable[[Any], Any]
    states: Sequence[Any]
    bytes: int
    moved: int | None = None
    flops: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Timing:
    """The samples of one variant."""

    device_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    peak_memory: int | None = None


def spread(samples: Sequence[float]) -> dict[str, float] | None:
    """Return the median and the 10th and 90th percentile."""
    if not samples:
        return None
    ordered = sorted(samples)

    def at(fraction: float) -> float:
        place = fraction * (len(ordered) - 1)
        low, part = int(place), place - int(place)
        return ordered[low] + part * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    return {"median": at(0.5), "p10": at(0.1), "p90": at(0.9)}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    variants: Sequence[Variant], device: torch.device, *, seconds: float, least: int = 3, most: int = 50
) -> list[Timing]:
    """Time variants in turns for about `seconds`. First every variant runs once on each of its copies."""
    timings = [Timing() for _ in variants]
    for variant, timing in zip(variants, timings, strict=True):
        variant.run(variant.states[0])
        synchronize(device)
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        for state in variant.states:
            variant.run(state)
        synchronize(device)
        if device.type == "cuda":
            timing.peak_memory = max(0, torch.cuda.max_memory_allocated(device) - before)
    begin, rounds, turn = time.perf_counter(), 0, 0
    while rounds < least or (rounds < most and time.perf_counter() - begin < seconds):
        for variant, timing in zip(variants, timings, strict=True):
            run, state = variant.run, variant.states[turn % len(variant.states)]
            turn += 1
            start = time.perf_counter()
            run(state)
            returned = time.perf_counter()
            if device.type != "cuda":
                timing.device_ms.append(1e3 * (returned - start))
                continue
            torch.cuda.synchronize(device)
            timing.wall_ms.append(1e3 * (time.perf_counter() - start))
            timing.host_us.append(1e6 * (returned - start))

            state = variant.states[turn % len(variant.states)]
            turn += 1
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            wait = min(LONGEST_WAIT_US, 1.5 * timing.host_us[-1] + 50)
            torch.cuda._sleep(int(CYCLES_PER_US * wait))
            first.record()
            run(state)
            last.record()
            torch.cuda.synchronize(device)
            timing.device_ms.append(first.elapsed_time(last))
        rounds += 1
    return timings


def copy_variant(device: torch.device) -> Variant:
    """Return the ceiling: a device-to-device copy, to be measured in the same rounds as everything else."""
    size = 1 << 30 if device.type == "cuda" else 64 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    return Variant(
        "copy",
        "copy_",
        lambda pair: pair[0].copy_(pair[1]),
        [(target, source)],
        bytes=2 * size,
        moved=2 * size,
    )


def matmul_variant(device: torch.device, precision: str) -> Variant:
    """Return the other ceiling: a large matrix product at the current precision."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    out = torch.empty_like(a)
    notes = {"precision": precision}
    return Variant(
        "matmul",
        precision,
        lambda s: torch.mm(s[0], s[1], out=s[2]),
        [(a, b, out)],
        12 * size**2,
        flops=2 * size**3,
        notes=notes,
    )


def count_launches(run: Callable[[Any], Any], state: Any, device: torch.device) -> int | None:
    """Return how many kernels, copies and fills a call puts on the GPU; None on a CPU.

    The profiler may leave later launches slower, so this comes after all timing.
    """
    if device.type != "cuda":
        return None
    run(state)
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run(state)
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text(errors="replace"))["traceEvents"]
    return sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events)


# ---- results


def add_common_arguments(
    parser: argparse.ArgumentParser, *, models: Sequence[str], seconds: float, out: str
) -> None:
    """Add the arguments that every benchmark has."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="none: cuda where there is one")
    parser.add_argument(
        "--models",
        help=f"comma-separated, of {', '.join(models)}; none: all but small on a GPU, small ones on a CPU",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        help="time for everything; what does not fit is left out, and said so",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / out,
        help="JSON lines are appended to this file",
    )
    parser.add_argument("--commit", help="what to note as the commit; none: ask git")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="on a CPU, run the kernels in Triton's interpreter: tiny, a test of this program",
    )


def start(arguments: argparse.Namespace) -> torch.device:
    """Set up what the arguments say, before any Triton kernel is imported; return the device."""
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch sees; there is none; use --device cpu")
    if arguments.interpret and name == "cuda":
        raise SystemExit("--interpret is for --device cpu: Triton's interpreter works on CPU tensors")
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which would announce itself for each call
    # So that what is measured is written when a time limit ends the program.
    signal.signal(signal.SIGTERM, _leave)
    torch.manual_seed(arguments.seed)
    device = torch.device(name, 0) if name == "cuda" else torch.device(name)
    if name == "cuda":
        torch.cuda.set_device(device)
    return device


def _leave(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the writing short
    sys.exit(143)


def names(text: str | None, default: Sequence[str], allowed: Sequence[str], option: str) -> list[str]:
    """Split a comma-separated argument and check it."""
    chosen = [part.strip() for part in text.split(",") if part.strip()] if text else list(default)
    for name in chosen:
        if name not in allowed:
            raise SystemExit(f"{option} must be of {', '.join(allowed)}; got {name!r}")
    return chosen


def installed(package: str) -> str | None:
    """Return a package's version, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str:
    """Return the commit, with -dirty if files differ from it."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip()
    return "unknown"


def describe_run(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return what a result is measured with: the part that all rows of a run share."""
    run: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": arguments.commit or git_commit(),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]).replace(
            f"{ROOT}{os.sep}", ""
        ),
        "seed": arguments.seed,
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores",
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "interpreted": arguments.interpret,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        run |= {
            "hardware": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cache": cache_bytes(device),
        }
    return run


class Results:
    """The rows of a run: shown as they come, written at the end, also when that comes early."""

    def __init__(self, benchmark: str, file: Path, run: dict[str, Any]):
        self.benchmark, self.file, self.run = benchmark, file, run
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> "Results":
        print(
            ", ".join(
                f"{key} {self.run[key]}"
                for key in ("hardware", "commit", "torch", "triton", "python", "cuda")
            ),
            flush=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            for row in self.rows:
                file.write(json.dumps({**row, "run": self.run}) + "\n")
        print(f"{len(self.rows)} results appended to {self.file}", flush=True)

    def add(
        self, variant: Variant, timing: Timing, *, copy_gbps: float | None, **fields: Any
    ) -> dict[str, Any]:
        """Append a row and print it."""
        device_ms = spread(timing.device_ms)
        assert device_ms is not None
        gbps = variant.bytes / device_ms["median"] / 1e6 if variant.bytes else None
        row = {
            "benchmark": self.benchmark,
            "operation": variant.operation,
            "variant": variant.name,
            **fields,
            **variant.notes,
            "bytes": variant.bytes or None,
            "moved_bytes": variant.moved,
            "flops": variant.flops,
            "device_ms": device_ms,
            "wall_ms": spread(timing.wall_ms),
            "host_us": spread(timing.host_us),
            "GBps": gbps,
            "fraction_of_copy": gbps / copy_gbps if gbps and copy_gbps else None,
            "launches": None,
            "peak_memory": timing.peak_memory,
            "repetitions": len(timing.device_ms),
            "copies": len(variant.states),
        }
        self.rows.append(row)
        what = " ".join(
            str(row[key])
            for key in ("model", "shard", "shape", "rank", "rank_fraction", "precision")
            if row.get(key) is not None
        )
        host = f"{row['host_us']['median']:9.0f} us host" if row["host_us"] else ""
        rate = f"{gbps:8.1f} GB/s" if gbps else ""
        share = f"{row['fraction_of_copy']:6.0%} of copy" if row["fraction_of_copy"] else ""
        median, low, high = (device_ms[key] for key in ("median", "p10", "p90"))
        print(
            f"{variant.operation:18} {variant.name:22} {what:34} "
            f"{median:9.3f} ms ({low:.3f} to {high:.3f}) {rate} {share} {host}",
            flush=True,
        )
        return row
