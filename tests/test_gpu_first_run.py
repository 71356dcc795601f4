"""The program for the first run on a GPU, rehearsed on a CPU; and that no operation and no option escapes
it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_checks
import gpu_first_run
import pytest
import torch
from gpu_checks import Check, LeftOut, Where, expect

from curvadion.options import GROUP_OPTIONS, OPTIMIZER_OPTIONS
from curvadion_kernels import OPS, Op

CPU = Where(torch.device("cpu"), interpret=False, quick=True)


def test_no_option_and_no_operation_is_forgotten() -> None:
    named = {name for options in gpu_checks.modes_of_the_step() for name in options}
    options = {**GROUP_OPTIONS, **OPTIMIZER_OPTIONS}
    assert options.keys() <= named | set(gpu_checks.FIXED)
    assert named <= options.keys()
    for name in OPS:
        assert list(gpu_checks.cases(name, CPU)), f"{name} has no cases"


def test_a_rehearsal_leaves_a_page_and_a_json(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_first_run.py", "--device=cpu", "--quick", f"--out={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    root = Path(gpu_first_run.__file__).parent.parent
    done = subprocess.run(
        [*command, "--parts=modes,tests,benchmarks"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["holds"] and report["rehearsal"] and report["run"]["torch"] == torch.__version__
    held = [row for row in report["checks"] if row["holds"]]
    assert {row["part"] for row in held} == {"modes"} and len(held) == 2
    assert all("at most" in row["found"] for row in held), "tolerances are stated"
    assert {row["part"] for row in report["checks"]} == {"modes", "tests", "benchmarks"}
    text = (tmp_path / "report.md").read_text()
    assert "a rehearsal on a CPU" in text and "| modes | 2 | 0 |" in text


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton; pip install -e '.[dev]'"
)
def test_the_checks_of_the_kernels_hold_in_the_interpreter_and_can_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = Where(device, interpret=True, quick=True)
    firsts = {check.name.partition(":")[0]: check for check in reversed(list(gpu_checks.kernels(where)))}
    for name in OPS:
        assert "at most" in firsts[name].run()
    monkeypatch.setattr(
        Op, "triton", property(lambda op: lambda *args, **kwargs: op.reference(*args, **{**kwargs, **WRONG}))
    )
    with pytest.raises(AssertionError, match="apart by"):
        firsts["local_step_"].run()


WRONG = {"decay": 0.5}


def raising(error: Exception) -> Callable[[], str]:
    def run() -> str:
        raise error

    return run


def test_a_failure_is_written_down_and_the_next_check_goes_on(tmp_path: Path) -> None:
    checks = [
        Check("fails", raising(ValueError("broken | here\nand there"))),
        Check("is left out", raising(LeftOut("needs a GPU"))),
        Check("holds", lambda: expect(True, "fine")),
        Check("is wrong", lambda: expect(False, "apart by 1.0")),
    ]
    file, later = tmp_path / "lines", time.time() + 60
    where = Where(torch.device("cpu"), False, False)
    assert gpu_first_run.run_checks(checks, file, done=0, deadline=later, where=where) == 0
    rows, started = gpu_first_run.rows_of(file)
    assert started is None and [row["holds"] for row in rows] == [False, None, True, False]
    assert "ValueError" in rows[0]["traceback"] and rows[3]["found"] == "AssertionError: apart by 1.0"
    report: dict[str, Any] = {
        "run": {"torch": "2"},
        "rehearsal": False,
        "holds": False,
        "seconds": {"modes": 1.0},
        "checks": [{"part": "modes", **row} for row in rows],
    }
    text = gpu_first_run.page(report)
    assert "**2 checks do not hold**" in text and "| modes | 1 | 2 | 1 | 1 |" in text
    assert "raise error" in text and "broken / here" in text

    (tmp_path / "late").touch()
    gpu_first_run.run_checks(checks, tmp_path / "late", done=1, deadline=0.0, where=where)
    rows, _ = gpu_first_run.rows_of(tmp_path / "late")
    assert [row["holds"] for row in rows] == [None] * 3, "no time: left out, and said so"


def test_a_device_that_is_lost_ends_the_process_and_a_new_one_goes_on(tmp_path: Path) -> None:
    lost = SimpleNamespace(wait=raising(RuntimeError("illegal memory access")), quick=False)
    checks = [Check("breaks it", lambda: "fine"), Check("after", lambda: "fine")]
    later, file = time.time() + 60, tmp_path / "lines"
    code = gpu_first_run.run_checks(checks, file, done=0, deadline=later, where=lost)  # type: ignore[arg-type]
    assert code == gpu_first_run.BROKEN
    [row], _ = gpu_first_run.rows_of(file)
    assert row["holds"] is False and "illegal memory access" in row["found"]
    gpu_first_run.run_checks(checks, file, done=1, deadline=later, where=CPU)
    assert [row["name"] for row in gpu_first_run.rows_of(file)[0]] == ["breaks it", "after"]


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_a_part_goes_on_after_a_check_that_hangs_or_dies(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own stands in for the part: it begins a check and then hangs or dies."""
    body = {"hangs": "time.sleep(60)", "dies": "os._exit(9)"}[how]
    program = tmp_path / "part.py"
    program.write_text(f"""
import json, os, sys, time
lines, done = [a.partition("=")[2] for a in sys.argv if a.startswith(("--lines", "--done"))]
with open(lines, "a") as out:
    if done == "0":
        print(json.dumps({{"started": "bad"}}), file=out, flush=True)
        {body}
    print(json.dumps({{"name": "good", "holds": True, "found": "fine"}}), file=out, flush=True)
""")
    monkeypatch.setattr(gpu_first_run, "__file__", str(program))
    arguments = SimpleNamespace(device="cpu", interpret=False, quick=True, longest=4.0)
    rows = gpu_first_run.run_part("modes", arguments, time.time() + 30, tmp_path)  # type: ignore[arg-type]
    assert [(row["name"], row["holds"]) for row in rows] == [("bad", False), ("good", True)]
    assert {"hangs": "did not end", "dies": "exit code 9"}[how] in rows[0]["found"]
