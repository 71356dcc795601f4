"""Check on a GPU all that a CPU cannot show, then measure a little: one command, under nine minutes.

    python benchmarks/gpu_first_run.py                      # writes to benchmarks/results/gpu_first_run
    python benchmarks/gpu_first_run.py --parts modes        # one part, see below
    python benchmarks/gpu_first_run.py --device cpu         # a rehearsal, without the kernels
    python benchmarks/gpu_first_run.py --device cpu --interpret --quick   # with them, small, interpreted

Parts, in this order; what is checked is in `gpu_checks.py` and `gpu_ranks.py`:

    kernels      every Triton kernel against its definition in plain torch
    ranks        every collective over NCCL; two replicas, on a GPU each or over gloo on one; FSDP2 on two
    modes        every rule, consensus, gate and option for 20 steps, against the same run on the CPU
    streams      what overlaps, with the device far behind the host; compiled models, CUDA graphs, devices
    tests        tests/test_kernels.py on the GPU, where pytest is installed
    benchmarks   benchmarks/kernels.py and benchmarks/step.py, short

Each part has its share of the time and runs in a process of its own: a check that fails, hangs or breaks the
process is written down, and the next one goes on, in a new process if need be. What there was no time for is
listed as left out. The program ends with 1 if something does not hold. It changes no setting of the GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timing  # first: it puts the packages of this checkout on the path
import torch
from gpu_checks import Check, LeftOut, Where, kernels, modes
from gpu_ranks import ranks, streams

from curvadion.report.files import replace_file

SECONDS = 525.0
# What a part may take, in parts of SECONDS; a part that needs less leaves it to those after it.
SHARES = {"kernels": 75, "ranks": 90, "modes": 130, "streams": 70, "tests": 50, "benchmarks": 110}
PARTS: dict[str, Callable[[Where], Iterator[Check]]] = {
    "kernels": kernels,
    "ranks": ranks,
    "modes": modes,
    "streams": streams,
}
LONGEST = 75.0  # seconds for one check; more is a hang
BROKEN = 75  # exit code of a process whose device can no longer be used
OUT = timing.ROOT / "benchmarks" / "results" / "gpu_first_run"
Row = dict[str, Any]  # part, name, holds (None: left out), found, traceback, seconds


# ---- in the process of a part


def run_checks(checks: Iterable[Check], file: Path, *, done: int, deadline: float, where: Where) -> int:
    """Run checks but the first `done`, and append a line to the file before each and after it; return an exit
    code."""
    kinds: set[str] = set()
    with file.open("a") as out:

        def write(**row: Any) -> None:
            print(json.dumps(row), file=out, flush=True)

        for number, check in enumerate(checks):
            kind = check.name.partition(":")[0]
            again, kinds = kind in kinds and where.quick, kinds | {kind}
            if number < done:
                continue
            if time.time() > deadline or again:
                words = "--quick" if again else "the time of its part was used up"
                write(name=check.name, holds=None, found=words)
                continue
            write(started=check.name)
            begin = time.perf_counter()
            row: Row = {"name": check.name, "holds": True, "traceback": None}
            try:
                row["found"] = check.run()
                where.wait()
            except LeftOut as reason:
                row |= {"holds": None, "found": str(reason)}
            except Exception as error:
                words = f"{type(error).__name__}: {error}".splitlines()[0]
                row |= {"holds": False, "found": words, "traceback": traceback.format_exc()}
            write(**row, seconds=round(time.perf_counter() - begin, 3))
            if row["holds"] is False:
                try:
                    where.wait()
                except Exception:  # an illegal access, for instance: nothing works any more in this process
                    return BROKEN
    return 0


def be_part(arguments: argparse.Namespace) -> int:
    """Run one part in this process."""
    device = timing.start(arguments)
    torch.set_num_threads(min(4, torch.get_num_threads()))
    where = Where(device, arguments.interpret, arguments.quick)
    if arguments.interpret:
        sys.path.insert(0, str(timing.ROOT / "tests"))
        from support import interpreter

        interpreter.install()
    checks = PARTS[arguments.part](where)
    limits = {"done": arguments.done, "deadline": arguments.deadline, "where": where}
    code = run_checks(checks, arguments.lines, **limits)
    sys.stdout.flush()
    os._exit(code)  # without waiting for process groups and threads that a failed check left behind


# ---- in the program


def rows_of(file: Path) -> tuple[list[Row], str | None]:
    """Return the results in a part's file, and the name of the check that was begun and did not end."""
    rows: list[Row] = []
    started = None
    for line in file.read_text().splitlines() if file.exists() else []:
        row = json.loads(line)
        started = row.get("started")
        if started is None:
            rows.append(row)
    return rows, started


def watch(command: list[str], file: Path, log: Path, *, deadline: float, longest: float) -> int | None:
    """Run a process; return its exit code, None if it was ended because a check took too long or all did."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    size, since = -1, time.time()
    try:
        while process.poll() is None:
            now = file.stat().st_size if file.exists() else 0
            if now != size:
                size, since = now, time.time()
            if time.time() > min(deadline, since + longest):
                return None
            time.sleep(0.05)
        return process.returncode
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started, and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(part: str, arguments: argparse.Namespace, deadline: float, folder: Path) -> list[Row]:
    """Run a part until all its checks are made or its time is up; return their results."""
    file, log = folder / f"{part}.jsonl", folder / f"{part}.log"
    rows: list[Row] = []
    while True:
        command = [sys.executable, str(Path(__file__).resolve()), f"--part={part}", f"--lines={file}"]
        command += [f"--device={arguments.device}", f"--done={len(rows)}", f"--deadline={deadline}"]
        command += [f"--{flag}" for flag in ("interpret", "quick") if getattr(arguments, flag)]
        before = len(rows)
        code = watch(command, file, log, deadline=deadline + 20, longest=arguments.longest)
        rows, started = rows_of(file)
        if code == 0:
            return rows
        if started is not None or len(rows) == before:
            how = "it did not end in its time" if code is None else f"the process died, exit code {code}"
            tail = log.read_text(errors="replace")[-4000:]
            row = {"name": started or f"the part {part}", "holds": False, "found": how, "traceback": tail}
            rows.append(row)
            with file.open("a") as out:
                print(json.dumps(row), file=out)
        if started is None and code != BROKEN:
            return rows
        if time.time() > deadline:
            rows.append(
                {"name": "what comes after", "holds": None, "found": "the time of its part was used up"}
            )
            return rows


def run_command(name: str, command: list[str], seconds: float, log: Path, *, hang: bool = True) -> Row:
    """Run a program that checks for itself; it holds if that ends with 0.

    Args:
        hang: whether it must end in its time, or is left out where it does not.
    """
    begin = time.perf_counter()
    code = watch(command, log, log, deadline=time.time() + seconds, longest=seconds)
    text = log.read_text(errors="replace") if log.exists() else ""
    found = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    if code is None:
        found = f"it did not end in {seconds:.0f} s; its last line: {found}"
    holds = code == 0 if code is not None else (False if hang else None)
    row: Row = {"name": name, "holds": holds, "found": found, "seconds": time.perf_counter() - begin}
    return {**row, "traceback": text[-12_000:] if holds is False else None}


def run_tests(arguments: argparse.Namespace, deadline: float, folder: Path) -> list[Row]:
    """Run the tests of the kernels on the GPU."""
    name = "tests/test_kernels.py"
    if arguments.device != "cuda" or find_spec("pytest") is None:
        words = "pytest is not installed" if arguments.device == "cuda" else "needs a GPU"
        return [{"name": name, "holds": None, "found": words}]
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-n0"] if find_spec("xdist") is not None else []
    file = str(timing.ROOT / "tests" / "test_kernels.py")
    command += ["--whole", f"--rootdir={timing.ROOT}", "-c", str(timing.ROOT / "pyproject.toml"), file]
    seconds = max(5.0, deadline - time.time())
    return [run_command(name, command, seconds, folder / "tests.log", hang=False)]


def run_benchmarks(arguments: argparse.Namespace, deadline: float, folder: Path) -> list[Row]:
    """Measure kernels and steps, for half of the time each."""
    rows = []
    programs = ("kernels", "step")
    for number, program in enumerate(programs):
        name = f"benchmarks/{program}.py"
        left = (deadline - time.time()) / (len(programs) - number)
        if left < 20 or arguments.quick:
            words = "--quick" if arguments.quick else "no time was left"
            rows.append({"name": name, "holds": None, "found": words})
            continue
        command = [sys.executable, str(timing.ROOT / "benchmarks" / f"{program}.py")]
        command += [f"--device={arguments.device}", f"--seconds={0.7 * left:.0f}"]
        command += [f"--out={arguments.out / program}.jsonl", f"--models={MODEL[arguments.device]}"]
        command += [f"--commit={arguments.commit}"] if arguments.commit else []
        rows.append(run_command(name, command, left, folder / f"{program}.log"))
    return rows


MODEL = {"cuda": "160m", "cpu": "small"}


# ---- the page


def page(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    run, rows = report["run"], report["checks"]
    words = {True: "held", False: "**did not hold**", None: "left out"}
    lines = ["# First run on a GPU", "", "All that was checked holds." if report["holds"] else ""]
    if not report["holds"]:
        lines[-1] = f"**{sum(row['holds'] is False for row in rows)} checks do not hold**; see below."
    if report["rehearsal"]:
        lines += ["", "This was a rehearsal on a CPU: it says nothing about a GPU."]
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in run.items() if value not in (None, False)]
    lines += ["", "| part | held | did not hold | left out | seconds |", "|---|---|---|---|---|"]
    for part in dict.fromkeys(row["part"] for row in rows):
        of = [row for row in rows if row["part"] == part]
        counts = [sum(row["holds"] is value for row in of) for value in words]
        lines.append(f"| {part} | {' | '.join(map(str, counts))} | {report['seconds'][part]:.0f} |")
    failed = [row for row in rows if row["holds"] is False]
    lines += ["", "## What does not hold", ""] if failed else []
    for row in failed:
        lines += [f"### {row['part']}: {row['name']}", "", row["found"], ""]
        lines += ["```", (row.get("traceback") or "").rstrip().replace("```", "'''"), "```", ""]
    lines += ["", "## All checks", "", "| part | check | | found | seconds |", "|---|---|---|---|---|"]
    for row in rows:
        found = str(row["found"]).replace("|", "/").replace("\n", " ")[:200]
        name = row["name"].replace("|", "/")
        lines.append(
            f"| {row['part']} | {name} | {words[row['holds']]} | {found} | {row.get('seconds') or 0:.2f} |"
        )
    return "\n".join(lines) + "\n"


def others(device: str) -> Iterator[tuple[str, Any]]:
    """Yield what a reader of the page wants to know of the machine beside `describe_run`."""
    yield "device", device
    if device == "cuda":
        yield "GPUs", torch.cuda.device_count()
        yield "nccl", ".".join(map(str, torch.cuda.nccl.version())) if torch.version.hip is None else None
        yield "float32 products", torch.get_float32_matmul_precision()


def main() -> int:
    """Run the parts one after the other; write the report after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="none: cuda where there is one")
    parser.add_argument("--parts", help=f"comma-separated, of {', '.join(SHARES)}; none: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything")
    parser.add_argument("--longest", type=float, default=LONGEST, help="seconds for one check")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page and the JSON")
    parser.add_argument("--quick", action="store_true", help="small tensors, one check of each kind")
    parser.add_argument("--interpret", action="store_true", help="on a CPU: kernels in Triton's interpreter")
    parser.add_argument("--commit", help="what to note as the commit; none: ask git")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--done", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        return be_part(arguments)
    begin = time.time()
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = timing.start(arguments)
    parts = timing.names(arguments.parts, tuple(SHARES), tuple(SHARES), "--parts")
    run = {**timing.describe_run(arguments, device), **dict(others(arguments.device))}
    report: dict[str, Any] = {"run": run, "rehearsal": arguments.device == "cpu", "seconds": {}, "checks": []}
    arguments.out.mkdir(parents=True, exist_ok=True)
    program = {"tests": run_tests, "benchmarks": run_benchmarks}
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            shares = [SHARES[p] for p in parts[number:]]
            left = begin + arguments.seconds - time.time()
            deadline = time.time() + left * shares[0] / sum(shares)
            since = time.time()
            if part in program:
                rows = program[part](arguments, deadline, Path(folder))
            else:
                rows = run_part(part, arguments, deadline, Path(folder))
            report["checks"] += [{"part": part, **row} for row in rows]
            report["seconds"][part] = time.time() - since
            report["holds"] = all(row["holds"] is not False for row in report["checks"])
            replace_file(arguments.out / "report.json", json.dumps(report, indent=1) + "\n")
            replace_file(arguments.out / "report.md", page(report))
            counts = {v: sum(row["holds"] is v for row in rows) for v in (True, False, None)}
            print(
                f"{part}: {counts[True]} held, {counts[False]} did not, {counts[None]} left out, "
                f"{report['seconds'][part]:.0f} s",
                flush=True,
            )
            for row in rows:
                if row["holds"] is False:
                    print(f"  DOES NOT HOLD: {row['name']}: {row['found']}", flush=True)
    print(f"{arguments.out / 'report.md'} and report.json say what holds and what does not.")
    return 0 if report["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
