"""The training script from end to end: 2 replicas x 2 shards in forked ranks, one process through torchrun, a
tiny model, and what a run leaves behind."""

import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.ranks import RankFailed, run_program, run_ranks

import curvadion
from curvadion import CurvaDion
from curvadion.sharding.survey import timeout_of

ROOT = Path(__file__).parent.parent

SCRIPTS = ROOT / "scripts"
STEPS, CHECKPOINT_EVERY = 16, 8
# With this lr and tau a model so small takes both branches of the gate within a few steps.
SMALL = (
    f"--dim 32 --layers 2 --heads 2 --seq 32 --batch 4 --steps {STEPS} --warmup-steps 2 --eval-bytes 1024 "
    "--lr 0.05 --tau 0.25"
).split()

pytest.importorskip(
    "rich", reason="the training script shows its results with rich: install the [report] extra"
)
pytest.importorskip(
    "matplotlib", reason="the training script draws with matplotlib: install the [report] extra"
)


def train(out: Path, *options: object) -> None:
    """Train one process through torchrun, on this tree."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    arguments = ["--text", SCRIPTS, "--out", out, *options]
    command = [*torchrun, str(SCRIPTS / "train.py"), *SMALL, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def train_forked(out: Path, *options: object, processes: int = 4) -> None:
    """The same without torchrun and without importing torch again."""
    arguments = [*SMALL, "--text", SCRIPTS, "--out", out, *options]
    run_program(SCRIPTS / "train.py", *arguments, processes=processes)


def lines(folder: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [
        json.loads(line, parse_constant=refuse) for line in (folder / "steps.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("run")
    options = (
        "--checkpoint",
        folder / "checkpoints",
        "--checkpoint-every",
        CHECKPOINT_EVERY,
        "--eval-every",
        8,
        "--layers-every",
        4,
    )
    with open(folder / "output", "a+", buffering=1) as output:
        with redirect_stdout(output):
            train_forked(folder, *options)
        output.seek(0)
        return folder, output.read()


def test_a_run_learns_and_says_so(finished):
    folder, output = finished
    summary = json.loads((folder / "summary.json").read_text())
    steps, losses = zip(*summary["held_out"], strict=True)
    assert steps == (0, 8, 16)
    assert losses[0] == pytest.approx(math.log(256), abs=0.1)
    assert losses[2] < losses[1] < losses[0] - 0.5
    assert (summary["replicas"], summary["shards"]) == (2, 2)
    for expected in ("held-out loss after", "synchronized steps", "dense bf16 gradients", "RMMC"):
        assert expected in output
    # Of 4 ranks one speaks, in whole lines.
    shown = [line for line in output.splitlines() if "step " in line and "loss" in line]
    starts = [f"step {k:>2}/{STEPS}  loss " for k in range(1, STEPS + 1)]
    starts += [f"step {k:>2}/{STEPS}  held-out loss " for k in steps]
    assert sorted(line[: line.index("loss") + 5] for line in shown) == sorted(starts)
    assert (folder / "report" / "loss_against_tokens.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report" / "index.html").exists()


def test_every_step_has_a_json_line(finished):
    records = lines(finished[0])
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[0]["curvadion/rmmc_max"] is None, "the first step has no previous norm"
    synchronized = {record["curvadion/synchronized"] for record in records}
    assert synchronized == {0.0, 1.0}, "both branches of the gate, or the checks below are idle"
    for record in records:
        assert record["loss"] > 0 and record["lr"] > 0 and record["tokens"] == 4 * 4 * 32
        rmmc = record["curvadion/rmmc_max"]
        if record["step"] > 2:
            assert (rmmc > 0.25) == bool(record["curvadion/synchronized"])
        if rmmc is not None:
            assert record["rmmc_matrix"].startswith("layers.")


def test_every_fourth_line_has_the_rmmc_of_every_matrix(finished):
    read = {record["step"]: record["rmmc"] for record in lines(finished[0]) if "rmmc" in record}
    assert list(read) == [4, 8, 12, 16]
    assert len(read[4]) == 2 * 7, "2 blocks of 7 matrices"
    assert all(value > 0 for rmmc in read.values() for value in rmmc.values())


def test_synchronized_steps_tell_how_far_replicas_were_apart(finished):
    for record in lines(finished[0]):
        assert ("drift" in record) == bool(record["curvadion/synchronized"])
        assert 0 < record.get("drift", 1.0) < 10, (
            "two replicas on different text: about as far apart as they have come together"
        )


def test_bytes_are_those_of_a_whole_replica(finished):
    parameters = json.loads((finished[0] / "summary.json").read_text())["parameters"]
    for record in lines(finished[0]):
        assert record["curvadion/dense_bf16_bytes"] == record["curvadion/dense_bf16_wire"] == 2 * parameters
        if not record["curvadion/synchronized"]:
            assert record["curvadion/bytes/replicate"] == 2 * 8, "8 bytes from each of the 2 shards"


def test_an_interrupted_run_ends_with_one_line_and_gives_the_cursor_back(tmp_path):
    """In a terminal, where rich hides the cursor; torchrun would wait 30 seconds for a rank that hangs."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--steps", "2000", "--text", str(SCRIPTS), "--out", str(tmp_path)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(OMP_NUM_THREADS="1", TERM="xterm")
        os.execv(sys.executable, [*torchrun, str(SCRIPTS / "train.py"), *SMALL, *options])
    said, interrupted = b"", False
    while True:
        try:
            said += os.read(terminal, 65536)
        except OSError:  # the end, on Linux
            break
        if not interrupted and re.search(rb"[1-9]\d*/2000", said):  # fast steps are not all shown
            os.write(terminal, b"\x03")
            interrupted = True
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 and interrupted
    shown = said.decode()
    assert shown.count("interrupted; ") == 1 and "forcefully" not in shown
    assert "rank0]: Traceback" not in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_resume_starts_where_there_is_no_checkpoint_yet(tmp_path):
    """One command line for the first launch and for all later ones; saving while training goes on."""
    options = ["--steps", 4, "--eval-every", 0, "--checkpoint", tmp_path / "none", "--resume"]
    options += ["--save-async", "--checkpoint-every", 2, "--tau", "inf", "--warmup-steps", 0]
    train_forked(tmp_path, *options, processes=2)
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4]
    assert [record["curvadion/synchronized"] for record in lines(tmp_path)] == [1, 0, 0, 0]
    assert (tmp_path / "none" / "step-4" / ".metadata").exists()
    saved = {"step": 0, "optimizer": {"state": {"norm.weight": {"step": torch.zeros(())}}}}
    dcp.load(saved, checkpoint_id=tmp_path / "none" / "step-2")
    assert saved["step"] == saved["optimizer"]["state"]["norm.weight"]["step"] == 2


def test_what_cannot_be_saved_while_training_goes_on_is_refused_at_the_start(tmp_path):
    options = ["--checkpoint", tmp_path, "--save-async", "--consensus", "average"]
    with pytest.raises(RankFailed, match="--save-async needs --consensus outer"):
        train_forked(tmp_path, *options, processes=2)


def test_resume_goes_on_as_if_uninterrupted(finished, tmp_path):
    """Bitwise, and although it evaluates on other steps: a look at the consensus model changes nothing
    either."""
    folder, _ = finished
    checkpoint = tmp_path / "checkpoints"
    checkpoint.mkdir()
    good = folder / "checkpoints" / f"step-{CHECKPOINT_EVERY}"
    (checkpoint / f"step-{CHECKPOINT_EVERY}").symlink_to(good)
    spoils = ["cut", "missing", "not finished", "empty", "no bytes"]
    for step, spoil in enumerate(spoils, CHECKPOINT_EVERY + 2):  # newer, passed over
        newer = checkpoint / f"step-{step}"
        shutil.copytree(good, newer)
        data = next(newer.glob("*.distcp"))
        if spoil in ("cut", "empty"):
            data.write_bytes(data.read_bytes()[: 1000 if spoil == "cut" else 0])
        elif spoil == "no bytes":
            (newer / ".metadata").write_bytes(b"")
        else:
            (data if spoil == "missing" else newer / ".metadata").unlink()
    (checkpoint / "step-15.old").symlink_to(good)
    before = lines(folder)[: CHECKPOINT_EVERY + 2]  # the run went on a little before it was killed
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before) + '{"step": 1')
    train_forked(tmp_path, "--checkpoint", checkpoint, "--resume", "--eval-every", 3)
    assert [record["step"] for record in lines(tmp_path)] == list(range(1, STEPS + 1))
    resumed, uninterrupted = lines(tmp_path)[CHECKPOINT_EVERY:], lines(folder)[CHECKPOINT_EVERY:]
    for key in ("step", "loss", "lr", "rmmc_matrix", "curvadion/rmmc_max", "curvadion/synchronized"):
        assert [record[key] for record in resumed] == [record[key] for record in uninterrupted], key


def test_one_process_with_the_adamw_control_and_a_comparison(finished, tmp_path, capsys):
    train(tmp_path / "adamw", "--optimizer", "adamw")
    records = lines(tmp_path / "adamw")
    assert all(record["curvadion/synchronized"] for record in records)
    assert records[-1]["loss"] < records[0]["loss"]

    from curvadion.report.page import write_report

    write_report([finished[0], tmp_path / "adamw"], tmp_path / "both")
    output = capsys.readouterr().out
    assert "AdamW, every step" in output and "CurvaDion" in output
    assert "AdamW, every step" in (tmp_path / "both" / "index.html").read_text()


def with_timeout(seconds: float) -> list[str]:
    """What the groups of a job that was started by the script wait for, on one rank."""
    sys.path.insert(0, str(SCRIPTS))
    import train as script

    dist.destroy_process_group()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {**alone, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    device, mesh = script.start(1, seconds)
    opt = CurvaDion([torch.nn.Parameter(torch.ones(4, 4))], replicate_mesh=mesh["replicate"])
    groups = [dist.group.WORLD, mesh.get_group("replicate")]
    assert opt.replicas == 1
    return [str(timeout_of(group, device)) for group in groups]


def test_the_job_has_the_timeout_that_it_was_given():
    assert run_ranks(1, with_timeout, 77.0) == [["0:01:17"] * 2]


def options_of(monkeypatch, *flags):
    import train as script

    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    return script.parse_args().options


@pytest.mark.parametrize("name", ["LOW_COMMUNICATION", "LOW_COMMUNICATION_KEPT", "LOWER_COMMUNICATION"])
def test_a_preset_is_what_no_flag_changes(monkeypatch, name):
    """And of what is changed, only that, and what has no use then, is missing."""
    preset = dict(getattr(curvadion, name))
    assert options_of(monkeypatch, "--preset", name) == preset
    changed = options_of(monkeypatch, "--preset", name, "--momentum", "0.6", "--outer-residual-kept", "0")
    assert changed == preset | {"momentum": 0.6, "outer_residual_kept": 0.0}
    gated = options_of(monkeypatch, "--preset", name, "--tau", "0.3", "--no-nesterov")
    assert gated == preset | {"tau": 0.3, "max_local_steps": None, "gate_every": 1, "nesterov": False}
    paper = options_of(monkeypatch, "--preset", name, "--consensus", "average", "--local-update", "gradient")
    assert paper["consensus"] == "average" and not [key for key in paper if "outer" in key or "nest" in key]
    flags = ("--optimizer", "dion", "--momentum", "0.95", "--max-local-steps", "7", "--outer-bits", "1")
    control = options_of(monkeypatch, "--preset", name, *flags)
    assert control["max_local_steps"] == 0 and control["momentum"] == 0.95, "it never takes a local step"
    assert not [key for key in control if "outer" in key or key == "consensus"]


def test_text_is_split_and_drawn_reproducibly(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from text import HELD_OUT_EVERY, ByteText

    for i in range(2 * HELD_OUT_EVERY):
        (tmp_path / f"{i:02}.txt").write_text(f"<{i:02}>" * 50)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    text = ByteText(tmp_path)
    held_out, training = (bytes(part.tolist()).decode() for part in (text.held_out, text.train))
    assert {held_out[i : i + 4] for i in (0, len(held_out) - 4)} == {"<09>", "<29>"}
    assert "<09>" not in training and "<29>" not in training and training.count("<00>") == 50

    draw = {"batch": 3, "seq": 8, "seed": 1, "step": 5}
    inputs, targets = text.batch(**draw, rank=0)
    torch.testing.assert_close(inputs[:, 1:], targets[:, :-1])
    torch.testing.assert_close(inputs, ByteText(tmp_path).batch(**draw, rank=0)[0])
    assert not torch.equal(inputs, text.batch(**draw, rank=1)[0]), "ranks read different text"
    with pytest.raises(ValueError, match=r"shorter --seq"):
        text.batch(batch=1, seq=10**6, seed=0, rank=0, step=1)
