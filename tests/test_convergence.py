"""The study's instrument: its controls, its leak test, what it asks of the training script, and that it goes
on where it stopped."""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("rich", reason="the benchmark shows its progress with rich: install the [report] extra")

import convergence  # noqa: E402
from convergence import (  # noqa: E402
    BEST,
    HALF_NORMUON,
    KEPT,
    KEPT_NORMUON,
    MUON,
    NEVER,
    OURS,
    TABLES,
    TENTH_PERCENT,
    Run,
    execute,
    runs_in_processes,
    train_flags,
    trials,
    validate,
    with_controls,
)
from simulation import options_of  # noqa: E402

from curvadion import (  # noqa: E402
    LOW_COMMUNICATION,
    LOW_COMMUNICATION_KEPT,
    LOWER_COMMUNICATION,
    LOWEST_COMMUNICATION,
)
from curvadion.report.studies import STUDY_KEYS, aggregate  # noqa: E402

SHAPE = {"replicas": 2, "batch": 2, "seq": 16, "steps": 7, "dim": 16, "layers": 1, "heads": 1}


def run_of(setting: convergence.Setting, **changes: object) -> Run:
    return Run(setting, 0, **{**SHAPE, "text": str(ROOT / "scripts"), "backend": "simulation", **changes})


def line_of(setting: convergence.Setting, loss: float, seed: int = 0) -> dict:
    run = replace(run_of(setting), seed=seed)
    values = {
        "setting": setting.name,
        "baseline": setting.baseline,
        "seed": seed,
        "replicas": 2,
        "loss": loss,
        "valid": None,
    }
    return {**values, "identity": run.identity}


@pytest.mark.parametrize(("never", "valid"), [(1.7, True), (1.51, False), (1.4, False)])
def test_a_run_without_synchronization_that_is_as_good_proves_a_leak(never: float, valid: bool) -> None:
    lines = [line_of(MUON, 1.5), line_of(OURS, 1.55), line_of(NEVER, never)]
    validate(lines)
    assert [line["valid"] for line in lines] == [valid] * 3


def test_a_leak_is_judged_against_the_noise_of_seeds() -> None:
    lines = [line_of(MUON, loss, seed) for seed, loss in enumerate((1.5, 1.6, 1.4))]
    lines += [line_of(NEVER, loss + 0.1, seed) for seed, loss in enumerate((1.5, 1.6, 1.4))]
    validate(lines)
    assert not any(line["valid"] for line in lines), (
        "0.1 nats is less than three standard deviations of the baseline"
    )


def test_without_its_controls_nothing_is_said_to_be_valid() -> None:
    lines = [line_of(OURS, 1.5)]
    validate(lines)
    assert lines[0]["valid"] is None


def test_controls_come_along_once() -> None:
    gated = replace(OURS, name="gated", gate="rmmc")
    names = [setting.name for setting in with_controls([MUON, gated, OURS, OURS])]
    assert names == [
        "Muon every step",
        "AdamW every step",
        "no synchronization",
        "gated",
        "gated: fixed interval",
    ]
    assert with_controls([gated])[-1] == replace(OURS, name="gated: fixed interval"), (
        "as many synchronizations, at a fixed interval"
    )


@pytest.mark.parametrize("table", sorted(TABLES))
def test_settings_are_told_apart(table: str) -> None:
    names = [setting.name for setting in with_controls(TABLES[table])]
    assert len(set(names)) == len(names)


def test_what_the_optimizer_lacks_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"got shrink, fragments|got fragments, shrink"):
        train_flags(replace(OURS, shrink=0.5, fragments=2))
    assert train_flags(KEPT)[-1] == "--nesterov" and train_flags(OURS)[-1] == "--no-nesterov"
    assert runs_in_processes(OURS) and not runs_in_processes(MUON)
    flags = train_flags(OURS)
    assert (
        flags[flags.index("--max-local-steps") + 1] == "7" and flags[flags.index("--outer-bits") + 1] == "1"
    )


def test_a_line_says_what_the_report_needs() -> None:
    line = execute(run_of(replace(OURS, interval=3)), "cpu")
    assert set(STUDY_KEYS) <= set(line)
    json.loads(json.dumps(line, allow_nan=False))
    assert line["synchronized"] == 3 and [step for step, _ in line["drift"]] == [1, 4, 7]
    padded = -(-line["parameters"] // 256) * 256  # to whole blocks of 128 for each of two replicas
    check, gate, payload = 8 + 48, 8 * 3, padded * 1.125 / 8 * 3
    assert line["wire"] == pytest.approx(check + gate + payload), "two replicas: 2 (K - 1) / K = 1"
    assert math.isfinite(line["loss"]) and line["curve"][0][1] == pytest.approx(math.log(256), abs=0.2)


def test_loss_can_be_of_a_text_that_nothing_was_tuned_on(tmp_path: Path) -> None:
    """The same training, another loss, and another identity; without it, identities are as they were."""
    (tmp_path / "unseen.txt").write_text("what nobody saw " * 400)
    own = execute(run_of(MUON), "cpu")
    unseen = execute(run_of(MUON, held_out=str(tmp_path / "unseen.txt")), "cpu")
    assert "held_out" not in json.loads(own["identity"]) and unseen["held_out"] == "unseen.txt"
    assert unseen["identity"] != own["identity"] and unseen["wire"] == own["wire"]
    assert unseen["loss"] != own["loss"]
    assert len(aggregate([own, unseen])) == 2, "they are not compared"


def test_both_sides_draw_as_many_trials_of_the_same_numbers() -> None:
    ours, theirs = trials(KEPT), trials(BEST)
    assert len(ours) == len(theirs) > 5
    for a, b in zip(ours, theirs, strict=True):
        assert (a.lr, a.adamw_lr, a.momentum) == (b.lr, b.adamw_lr, b.momentum)
        assert b.outer_lr == BEST.outer_lr != a.outer_lr


@pytest.mark.parametrize(
    ("setting", "preset"),
    [
        (OURS, LOW_COMMUNICATION),
        (KEPT_NORMUON, LOW_COMMUNICATION_KEPT),
        (HALF_NORMUON, LOWER_COMMUNICATION),
        (TENTH_PERCENT, LOWEST_COMMUNICATION),
    ],
)
def test_presets_are_the_settings_that_were_measured(setting: convergence.Setting, preset: dict) -> None:
    measured = options_of(setting)
    for name, value in preset.items():
        assert measured[name] == (pytest.approx(value, rel=2e-3) if isinstance(value, float) else value), name


def test_published_runs_are_still_known() -> None:
    lines = convergence.read(ROOT / "benchmarks" / "results" / "convergence.jsonl")
    assert lines
    for line in lines:
        assert convergence.run_of(line).identity == line["identity"]


def study(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the study's command in this process, and its runs in forked ones, which need not import torch
    again; what it printed."""
    monkeypatch.setattr(sys, "argv", [convergence.__file__, *map(str, arguments)])
    get_context = multiprocessing.get_context
    monkeypatch.setattr(convergence.multiprocessing, "get_context", lambda method: get_context("fork"))
    convergence.main()
    return capsys.readouterr().out


def test_a_file_of_runs_can_be_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "done.jsonl"
    lines = [execute(run_of(setting), "cpu") for setting in (replace(OURS, interval=3), MUON)]
    done.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shape = ["--replicas", "2", "--batch", "2", "--steps", "7", "--settings", MUON.name]
    output = study(monkeypatch, capsys, "--check", done, *shape)
    assert output.count("then") == 1 and "(+0.0000)" in output, output


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """As a user starts it, with spawned processes."""
    shape = [word for key, value in SHAPE.items() for word in (f"--{key}", str(value))]
    out = tmp_path / "runs.jsonl"
    command = [
        sys.executable,
        ROOT / "benchmarks" / "convergence.py",
        "--tables",
        "controls",
        "--text",
        ROOT / "scripts",
        "--out",
        out,
    ]
    done = [line_of(MUON, 1.5), line_of(NEVER, 2.0)]
    for line in done:
        line["wire"] = line["dense_wire"] = 1.0
    out.write_text("".join(json.dumps(line) + "\n" for line in done))
    finished = subprocess.run([*map(str, command), *shape], capture_output=True, text=True, timeout=100)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "3 runs, 2 of them" in finished.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["setting"] for line in lines] == [
        "Muon every step",
        "no synchronization",
        "AdamW every step",
    ]
    assert all(line["valid"] for line in lines)
