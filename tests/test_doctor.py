"""`curvadion doctor`: what it finds is what the optimizer does, and what one rank finds all ranks learn."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys

import pytest
from support.ranks import run_ranks

from curvadion import LOW_COMMUNICATION, CurvaDion
from curvadion.cli import COMMANDS, main
from curvadion.doctor import machine, trial
from curvadion.projection.nominal import KNOWN_RULES

SMALL = ["--dim", "32", "--ffn", "64", "--layers", "1", "--vocabulary", "64"]


def doctor(*arguments: str) -> tuple[int | None, str]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(["doctor", *SMALL, *arguments])
    return code, said.getvalue()


def on_ranks(world_size: int, *arguments: str) -> list[tuple[int | None, str]]:
    return run_ranks(world_size, doctor, *arguments, group=False)


def test_one_process_is_looked_at_by_itself() -> None:
    code, said = doctor("--set", "warmup_steps=1")
    assert code == 0
    assert "kernels: reference" in said and "local step" in said and "FAULT" not in said


def test_ranks_links_and_steps_are_looked_at_and_rank_0_speaks_for_all() -> None:
    (code, said), *others = on_ranks(4, "--replicas", "2", "--set", "max_local_steps=3")
    assert [code, *others] == [0, (0, ""), (0, ""), (0, "")]
    for part in (
        "2 replicas of 2",
        "between replicas",
        "inside a replica",
        "local step",
        "synchronized step",
    ):
        assert said.count(part) == 1, (part, said)
    # One bit and 16 / 128 of a scale for each parameter, and back, on every fourth step; dense gradients are
    # of 16 bits: on every step a quarter of 1.125 / 16. Padding comes on top.
    share = float(re.search(r"([\d.]+)% of dense", said)[1])
    assert 1.125 / 16 / 4 <= share / 100 < 1.4 * 1.125 / 16 / 4
    assert re.search(r"project --model 160m --replicas 2 --shards 2 .*--interval 4 ", said)


def build_on_one_rank_only() -> CurvaDion:
    import torch
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("this rank has another file")
    return CurvaDion([torch.nn.Parameter(torch.ones(4, 4))])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "momentum=2"], "momentum"),
        (["--set", "momentun=0.9"], "did you mean 'momentum'"),
        (["--set", "momentum"], "NAME=VALUE"),
        (["--replicas", "3"], "must divide the 2 ranks; got 3"),
        (["--build", "test_doctor"], "MODULE:FUNCTION"),
        (["--build", "test_doctor:doctor"], "test_doctor:doctor"),
        (["--build", "test_doctor:build_on_one_rank_only"], "this rank has another file"),
    ],
)
def test_what_would_be_refused_fails_on_all_ranks(arguments: list[str], says: str) -> None:
    (code, said), (other, _) = on_ranks(2, *arguments)
    assert code == other == 1
    assert "FAULT    refused" in said and says in said


def another_version_on_rank_1() -> tuple[int | None, str]:
    import os

    if os.environ["RANK"] == "1":
        found = machine.versions()
        machine.versions = lambda: found | {"torch": "0.1"}
    return doctor()


def test_a_rule_whose_work_is_not_known_is_no_fault() -> None:
    (code, said), _ = on_ranks(2, "--timeout", "47", "--set", "local_update=dion2", "max_local_steps=3")
    assert code == 0 and "FAULT" not in said
    assert "wait 0:00:47 for a rank" in said, "that of the shards, one rank each, is nobody's"
    assert re.search(r"projected: nothing: --local-update must be one of .*; got dion2", said)


def test_versions_that_differ_are_named() -> None:
    (code, said), (other, _) = run_ranks(2, another_version_on_rank_1, group=False)
    assert code == other == 1
    assert "must have the same torch" in said and "0.1" in said


def test_options_are_read_as_python_reads_them() -> None:
    import torch

    read = trial.options_of("none", ["tau=inf", "betas=(0.9, 0.99)", "gate=drift", "gate_every=None"])
    assert read == {"tau": float("inf"), "betas": (0.9, 0.99), "gate": "drift", "gate_every": None}
    assert trial.options_of("none", ["owner_dtype=torch.float32"]) == {"owner_dtype": torch.float32}
    assert trial.options_of("low-communication", ["lr=0.1"]) == {**LOW_COMMUNICATION, "lr": 0.1}
    with pytest.raises(ValueError, match="NAME=VALUE"):
        trial.options_of("none", ["lr"])


def test_no_option_is_run_as_code() -> None:
    assert trial.options_of("none", ["gate=__import__('os').getcwd()"])["gate"].startswith("__import__")


def test_the_command_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    from curvadion import __version__

    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"curvadion {__version__}\n"


HELP = {
    "": ("doctor", "project", "report", "rendezvous"),
    "doctor": ("--preset {low-communication,", "--model {160m,"),
    "project": ("--link {infiniband-per-gpu,", "--hardware {h100,cpu}", *KNOWN_RULES),
    "rendezvous": ("--port",),
    "report": ("--out",),
}


def test_every_command_has_a_page() -> None:
    assert {*HELP} == {"", *COMMANDS}


@pytest.mark.parametrize("command", HELP)
def test_the_command_answers_without_torch(command: str) -> None:
    """An import takes a second or more, and a laptop may have no torch."""
    words = [*command.split(), "--help"]
    code = f"import sys; sys.modules['torch'] = None; from curvadion.cli import main; main({words})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in said for name in HELP[command])


def test_an_unknown_argument_is_answered_with_its_commands_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--folder", "x", "runs/a"])
    said = capsys.readouterr().err
    assert said.startswith("usage: curvadion report ") and "unrecognized arguments: --folder" in said
