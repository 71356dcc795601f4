"""Projections: bytes are the ledger's, times are calculated by hand, and output says it is projected."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import DENSE, MATRICES, Shapes, Toy, grid
from support.ranks import run_ranks

from curvadion import CurvaDion, cli
from curvadion.consensus import CODECS, codec
from curvadion.formats import BLOCK, FORMATS, OUTER_BITS, Format, bits_per_value, name_of
from curvadion.projection import add_arguments, main
from curvadion.projection import points as measured
from curvadion.projection.formulas import (
    GATE_BYTES,
    PAYLOADS,
    Projection,
    Sent,
    break_even,
    payload,
    wire_bytes,
)
from curvadion.projection.nominal import KNOWN_RULES, LINKS, MOVES_Q, SIZES, Decoder, Model
from curvadion.projection.published import PUBLISHED_RANGE, published
from curvadion.rules import RULES

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = {"160m": 162_220_800, "350m": 359_965_696, "720m": 720_827_904, "1b3": 1_336_502_272}
TINY = Model(((4, 6), (8, 2)), scalars=10)  # 50 parameters
BLOCKS: tuple[Shapes, Shapes] = (
    {"a.weight": (16, 32), "b.weight": (8, 16)},
    {"norm.weight": (384,)},
)  # 1024 parameters, 8 blocks of 128
POINT = {
    "label": "emulated",
    "sites": 4,
    "mbit": 100,
    "delay_ms": 10,
    "setting": "dense",
    "interval": None,
    "seconds_per_step": 2.0,
    "compute_seconds": 0.5,
    "ledger_bytes_per_step": 10_000_000,
}


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    main(parser.parse_args(arguments))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_exact(name: str) -> None:
    assert SIZES[name].parameters == PARAMETERS[name]


def test_bytes_by_hand() -> None:
    # Ranks 2 and 1 at a half: P and R are 4x2, 6x2 and 8x1, 2x1; Q is 4x2 and 2x1.
    sent = payload(TINY, "average", rank_fraction=0.5)
    buffers = {
        "parameters": 200,
        "moments": 80,
        "right_factor": 40,
        "factors": 4 * (20 + 10 + 2),
        "gradients": 40,
    }
    assert {purpose: s.bytes for purpose, s in sent.items()} == buffers
    assert wire_bytes(sent, 4) == 1.5 * (200 + 80 + 128 + 40) + 0.75 * 40  # all-reduced, and a broadcast
    halves = payload(TINY, "low-rank", rank_fraction=0.5, element=2, moves_Q=False)
    assert {purpose: s.bytes for purpose, s in halves.items()} == {"factors": 64, "gradients": 20}
    assert payload(TINY, "dense") == {"gradients": Sent(100)}
    assert payload(TINY, "parameters") == {"parameters": Sent(200)}
    outer = [payload(TINY, f"outer-{bits}", block=32)["pseudo_gradients"].bytes for bits in OUTER_BITS]
    assert outer == [200, 100, 50 * 8.5 / 8, 50 * 4.5 / 8, 50 * 2.5 / 8, 50 * 1.5 / 8]


@pytest.mark.parametrize(("replicas", "shards"), [(2, 1), (3, 1), (2, 2)])
def test_bytes_are_the_ledgers(replicas: int, shards: int) -> None:
    """A synchronous Dion step, a local step, and a synchronized step after it, byte for byte, by purpose."""
    settings: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
        ({"local_update": "dion"}, "average", {"moves_Q": True}),
        ({"local_update": "gradient"}, "average", {"moves_Q": False}),
        ({"local_update": "dion", "consensus": "none"}, "low-rank", {"moves_Q": True}),
        (
            {"local_update": "dion", "payload_dtype": torch.bfloat16},
            "average",
            {"moves_Q": True, "element": 2},
        ),
    ]
    every_other: dict[str, Any] = {"tau": math.inf, "max_local_steps": 1, "rank_fraction": 0.4}

    def worker() -> list[list[dict[str, float]]]:
        replicate, mesh = grid(replicas, shards)
        found = []
        for options, _, _ in settings:
            toy = Toy(mesh)
            opt = CurvaDion(toy.groups(), replicate_mesh=replicate, **every_other, **options)
            steps = []
            for step in range(3):
                toy.set_gradients(step, replicate.get_local_rank())
                opt.step()
                wire = opt.ledger.last_step_wire.items()
                steps.append(
                    {
                        purpose: sent
                        for (axis, purpose), sent in wire
                        if axis == "replicate" and purpose != "check" and sent
                    }
                )
            found.append(steps)
        return found

    ranks = run_ranks(replicas * shards, worker)
    model = Model(
        tuple((m, n) for m, n in MATRICES.values()), sum(math.prod(shape) for shape in DENSE.values())
    )
    gate = {"gate": Sent(GATE_BYTES * shards)}
    for i, (options, what, how) in enumerate(settings):
        common: dict[str, Any] = {"rank_fraction": 0.4, "shards": shards, **how}
        dion = payload(model, "low-rank", **common | {"moves_Q": False})
        after = payload(model, what, **common)
        for step, expected in enumerate([gate | dion, gate, gate | after]):
            counted: dict[str, float] = {}
            for rank in ranks[:shards]:  # those of replica 0
                for purpose, sent in rank[i][step].items():
                    counted[purpose] = counted.get(purpose, 0.0) + sent
            assert counted == pytest.approx({p: s.wire(replicas) for p, s in expected.items()}, rel=1e-12), (
                options,
                step,
            )


def test_bytes_of_pseudo_gradients_are_the_ledgers() -> None:
    matrices, dense = BLOCKS

    def worker() -> list[dict[tuple[str, str], float]]:
        replicate, _ = grid(2, 1)
        found = []
        for bits in OUTER_BITS:
            toy = Toy(matrices=matrices, dense=dense)
            options: dict[str, Any] = {"consensus": "outer", "outer_bits": bits}
            opt = CurvaDion(
                toy.groups(), replicate_mesh=replicate, tau=math.inf, max_local_steps=1, **options
            )
            for step in range(3):
                toy.set_gradients(step, replicate.get_local_rank())
                opt.step()
            found.append(opt.ledger.last_step_wire)
        return found

    model = Model(
        tuple((m, n) for m, n in matrices.values()), sum(math.prod(shape) for shape in dense.values())
    )
    for bits, counted in zip(OUTER_BITS, run_ranks(2, worker)[0], strict=True):
        sent = {purpose: wire for (axis, purpose), wire in counted.items() if axis == "replicate" and wire}
        assert sent == {"gate": GATE_BYTES} | {
            p: s.wire(2) for p, s in payload(model, f"outer-{bits}").items()
        }, bits


def test_times_by_hand() -> None:
    at = Projection(compute=2.0, replicas=4, shards=2, gbit=8e-6, rtt=0.5)  # 1000 bytes a second
    dense = {"gradients": Sent(1000)}
    T_x = 1.5 + 3 * 0.5  # 2 (K - 1) / K of the bytes, and K - 1 round trips
    assert at.transfer(dense) == pytest.approx(T_x)
    assert at.gate == pytest.approx(1.5 * 16 / 1000 + 2 * 0.5)  # two ranks, and log2 K round trips
    assert at.dense(dense) == pytest.approx(2 + T_x)
    assert replace(at, overlap=0.5).dense(dense) == pytest.approx(2 + T_x / 2)
    assert replace(at, compute=1.0, overlap=1.0).dense(dense) == pytest.approx(T_x), (
        "no more is hidden than there is compute"
    )
    assert at.gated(
        {"factors": Sent(1000, calls=2), "right_factor": Sent(1000, collective="broadcast")}, 10
    ) == pytest.approx(2 + at.gate + (1.5 + 0.75 + 3 * 1.5) / 10)


@pytest.mark.parametrize("what", PAYLOADS)
def test_slower_links_and_rarer_steps(what: str) -> None:
    model = SIZES["160m"].model
    dense, sent = payload(model, "dense"), payload(model, what)
    at = Projection(0.3, 4, 8, 10.0, 0.02)
    for slower in (replace(at, gbit=5.0), replace(at, rtt=0.04), replace(at, replicas=8)):
        assert slower.dense(dense) > at.dense(dense)
        assert slower.gated(sent, 100) > at.gated(sent, 100)
    assert at.gated(sent, 10) > at.gated(sent, 100) > at.compute + at.gate
    speedups = [
        here.dense(dense) / here.gated(sent, 100) for here in (replace(at, gbit=g) for g in (0.1, 1, 10, 100))
    ]
    assert speedups == sorted(speedups, reverse=True)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("speedup", [1.0, 1.1, 3.0])
@pytest.mark.parametrize(
    ("what", "delay"), [("average", 0), ("outer-4", 0), ("outer-4", 10), ("outer-32", 10)]
)
def test_break_even_is_break_even(what: str, delay: int, speedup: float, overlap: float) -> None:
    model = SIZES["1b3"].model
    dense, sent = payload(model, "dense"), payload(model, what)
    at = Projection(1.0, 2, 8, 10.0, 0.04, overlap)
    gbit = break_even(at, dense, sent, 30, speedup, delay=delay)
    if delay and (speedup, overlap) == (1.0, 0.0):
        assert gbit == math.inf, "where all is hidden, the gate's round trip is that of the gradients"
        return
    assert 0 < gbit < math.inf
    for factor, sign in ((0.9, 1), (1.0, 0), (1.1, -1)):
        here = replace(at, gbit=gbit * factor)
        more = here.dense(dense) / (speedup * here.gated(sent, 30, delay=delay)) - 1
        assert abs(more) < 1e-9 if sign == 0 else more * sign > 0, (factor, more)


def test_a_delay_hides_as_much_as_is_computed_meanwhile() -> None:
    at = Projection(compute=2.0, replicas=4, shards=1, gbit=8e-6, rtt=0.5)  # 1000 bytes a second
    sent = {"pseudo_gradients": Sent(4000, calls=1)}  # 6 s and 1.5 s of latency
    assert at.gated(sent, 8) == pytest.approx(2 + at.gate + 7.5 / 8)
    assert at.gated(sent, 8, delay=3) == pytest.approx(2 + at.gate + 1.5 / 8)
    assert at.gated(sent, 8, delay=4) == pytest.approx(2 + at.gate)


def test_break_even_on_no_link_and_on_every_link() -> None:
    at = Projection(1.0, 8, 1, 10.0, 0.1)
    dense, parameters = {"gradients": Sent(2e9)}, {"parameters": Sent(4e9)}
    assert break_even(at, dense, parameters, 1) == 0, "twice the bytes on every step"
    assert break_even(at, dense, parameters, 100) == math.inf, "7 round trips against 3 and a few"


def test_the_published_range() -> None:
    found = published()
    literal = [f"{speedup:.2f}" for _, speedup, *_ in found.values()]
    assert (literal[0], literal[-1]) == tuple(f"{end:.2f}" for end in PUBLISHED_RANGE) == ("1.02", "4.36")
    assert literal == sorted(literal)
    T_x = 8 * 324_441_600 / 2e9 + 0.04  # 2 replicas, 2 Gbit/s, 40 ms
    assert found["cross-datacentre-2"][0] == pytest.approx(0.329 + T_x)
    assert found["cross-datacentre-2"][1] == pytest.approx((0.329 + T_x) / (0.329 + 0.04 + T_x / 100))
    assert all(average <= speedup for _, speedup, average, _ in found.values()), (
        "averaging sends more than the published count"
    )


def test_published_prints_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    run("--published")
    printed = capsys.readouterr().out
    for part in ("OURS", "inferred", "projected", "1.02x", "4.36x", "T_curvadion = T_compute + T_gate"):
        assert part in printed


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run("--payload", "outer-4", "--rate", "0.02", "--link", "infiniband-per-gpu")
    printed = capsys.readouterr().out
    assert "8 x 400 Gbit/s a replica" in printed
    assert "1 step in 50" in printed
    assert f"{162_220_800 * (4 + 16 / 128) / 8:,.0f}" in printed
    assert all(name in printed for name in LINKS)
    titles = [line for line in printed.splitlines() if "projected" in line]
    assert len(titles) == 6, "the assumptions, four tables and the break-even links"
    assert all(line.startswith("projected") for line in titles), titles


def test_nics_share_or_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(*arguments: str) -> str:
        run("--compute-seconds", "1", "--gbit", "10", "--rtt-ms", "1", *arguments)
        lines = capsys.readouterr().out.splitlines()
        return next(line for line in lines if line.split()[:1] == ["dense"])

    assert (
        seconds("--link", "infiniband-per-gpu")
        == seconds("--nics", "8")
        == seconds("--link", "ethernet-10", "--nics", "8")
    )
    assert seconds("--link", "infiniband") == seconds("--nics", "1") != seconds("--nics", "8")


def test_points_beside_their_projection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the picture takes the extra [report]")
    curvadion = POINT | {
        "setting": "curvadion",
        "interval": 20,
        "ledger_bytes_per_step": 1_000_000,
        "seconds_per_step": 0.8,
    }
    unlimited = curvadion | {"mbit": None, "label": "cost model"}
    file, picture = tmp_path / "points.jsonl", tmp_path / "speedup.png"
    file.write_text("\n".join(json.dumps(p) for p in (POINT, curvadion, unlimited)) + "\n")
    points = measured.read_points(file)
    assert measured.project_point(points[0]) == pytest.approx(0.5 + 0.8 + 3 * 0.02)
    assert measured.project_point(points[1]) == pytest.approx(0.5 + 0.08 + 6 / 20 * 3 * 0.02 + 2 * 0.02)
    assert measured.project_point(points[2]) == pytest.approx(0.5 + 6 / 20 * 3 * 0.02 + 2 * 0.02)
    curves, markers = measured.curves_and_markers(points)
    assert markers == {"emulated: curvadion every 20, 4 sites, 20 ms": [(0.1, 2.0 / 0.8)]}
    assert [f"emulated: {name}" for name in curves] == list(markers)
    run("--measured", str(file), "--picture", str(picture))
    printed = capsys.readouterr().out
    assert "projected s/step" in printed
    assert f"{1.36 / 2 - 1:+.1%}" in printed
    assert "cost model" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "must hold at least one point; got none"),
        ("{", "must be a readable file of JSON lines"),
        ('{"label": "emulated"}', "line 1 .* lacks setting, mbit, sites"),
        ("[]", "line 1 .* lacks label"),
        (json.dumps(POINT | {"seconds_per_step": None}), "no number >= 0 in seconds_per_step"),
        (json.dumps(POINT | {"mbit": 0}), "no number >= 0 in mbit"),
        (json.dumps(POINT | {"sites": 1}), "replicas must be >= 2"),
    ],
)
def test_a_file_that_cannot_be_read(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "points.jsonl"
    file.write_text(line)
    with pytest.raises(SystemExit, match=message):
        run("--measured", str(file))


def test_a_picture_without_a_baseline() -> None:
    with pytest.raises(ValueError, match="must have a dense point"):
        measured.curves_and_markers([POINT | {"setting": "dion"}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--replicas 1", "replicas must be >= 2.*got 1; try 2"),
        ("--shards 0", "--shards must be >= 1; got 0"),
        ("--local-update dion2", "--local-update must be one of gradient, .*; got dion2; try dion"),
        ("--local-update sgd", "--local-update must be one of gradient, .*; got sgd; try muon"),
        ("--payload outer-3", "a payload must be one of average, .*outer-1; got 'outer-3'; try 'outer-4'"),
        ("--payload low_rank", "a payload must be one of .* got 'low_rank'; try 'low-rank'"),
        ("--interval 0.5", r"--interval must be finite and >= 1.*got 0.5"),
        ("--rate 0", r"--rate in \(0, 1\]"),
        ("--rate 2", r"--rate in \(0, 1\].*got 2"),
        ("--rank-fraction 0", r"--rank-fraction must be in \(0, 1\]; got 0"),
        ("--nics 0", "--nics must be >= 1; got 0"),
        ("--gbit 0", "Gbit/s of a replica must be > 0; got 0"),
        ("--gbit nan", "Gbit/s of a replica must be > 0; got nan"),
        ("--rtt-ms -1", "round trip must be finite and >= 0"),
        ("--overlap 1.5", r"overlap must be in \[0, 1\]; got 1.5"),
        ("--tokens 0", "compute seconds must be a finite number > 0; got 0"),
        ("--flops-per-gpu 0", "--flops-per-gpu must be > 0; got 0"),
        ("--layers 0", "--layers, --ffn and --vocabulary must be > 0"),
        ("--measured nowhere.jsonl", "--measured must be a readable file of JSON lines; got nowhere.jsonl"),
    ],
)
def test_errors_name_the_rule(arguments: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(*arguments.split())


def test_an_unknown_payload() -> None:
    with pytest.raises(ValueError, match="a payload must be one of average, .* got 'bytes'; try 'outer-1'"):
        payload(TINY, "bytes")


def test_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["project", "--published"])
    assert "4.36x" in capsys.readouterr().out


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # what is None there cannot be imported
from curvadion.cli import main
for words in {}:
    main(["project", *words])
"""
FLAGS = (
    "",
    "--published",
    f"--measured {ROOT / 'benchmarks' / 'results' / 'slow_link.jsonl'}",
    "--model 1b3 --shards 64 --local-update dion --owners always",
    "--model 350m --shards 8 --local-update dion --owners never --payload average",
    "--model 1b3 --local-update normuon --newton-schulz-dtype float32 --payload outer-8 --block 64",
    "--model 160m --local-update gradient --payload low-rank --replica-gbit 400 --rank-multiple-of 16",
    "--hardware cpu --shards 2 --delay 4 --rate 0.1 --payload outer-16 --link internet",
)


def test_it_runs_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    """Settings are chosen on laptops, that may have none."""
    words = [flags.split() for flags in FLAGS]
    command = [sys.executable, "-c", WITHOUT_TORCH.format(words)]
    without = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not without.returncode, without.stderr
    for some in words:
        cli.main(["project", *some])
    assert without.stdout == capsys.readouterr().out


def test_formats_are_torchs() -> None:
    for name, known in FORMATS.items():
        dtype = getattr(torch, name)
        assert name_of(dtype) == name
        assert known == Format(dtype.itemsize, torch.finfo(dtype).eps)


def test_what_stands_for_tables_with_torch() -> None:
    assert {bits for bits in CODECS if isinstance(bits, int)} == {*OUTER_BITS}
    assert {name for name in KNOWN_RULES if RULES[name].uses_Q} == {*MOVES_Q}


@pytest.mark.parametrize("bits", OUTER_BITS)
def test_half_the_block_is_twice_the_scales(bits: int) -> None:
    own, half = bits_per_value(bits), bits_per_value(bits, BLOCK // 2)
    assert own == codec.bits_per_value(bits)
    assert half - bits == 2 * (own - bits)


def test_a_decoder_of_equal_width_and_ffn() -> None:
    square = Decoder(dim=8, layers=3, heads=2, ffn=8, vocabulary=16)
    assert len(square.model.matrices) == 21
    assert square.parameters == 21 * 64 + 2 * 16 * 8 + 7 * 8
