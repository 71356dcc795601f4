"""Emulated links: the wire's arithmetic on made-up frames and times, the cost model, a real pair of sites."""

import importlib
import json
import math
import os
import signal
import struct
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch.distributed as dist
from support.ranks import run_ranks

ROOT = Path(__file__).parent.parent
netlab = importlib.import_module("netlab")
slow_link = importlib.import_module("slow_link")
Message = slow_link.Message

HEADERS = 20 + 32  # IP, and TCP with timestamps
PACKET = 1500


def frame(
    target: int, payload: int, *, gso: int = 0, version: int = 4, network: bytes = b"\x0a\x4d\x00"
) -> bytes:
    """A TCP segment as the kernel hands it to a TUN device."""
    ip = bytes([version << 4 | 5]) + bytes(8) + bytes([netlab.TCP]) + bytes(6) + network + bytes([target + 1])
    tcp = bytes(12) + bytes([8 << 4]) + bytes(19)
    return struct.pack("=BBHHHH", 0, 1 if gso else 0, 0, gso, 0, 0) + ip + tcp + bytes(payload)


def arrivals(wire) -> list[tuple[float, int]]:
    """Let all that is on the way arrive; return (time, site), one by one."""
    found = []
    while (now := wire.next_arrival()) is not None:
        assert wire.take(now - 1e-9) == [], "a frame arrived early"
        found += [(now, site) for site, _ in wire.take(now)]
    return found


def test_uplinks_are_shared_by_what_a_site_sends_and_by_nothing_else():
    wire = netlab.Wire(3, mbit=12, delay_ms=5)  # 12 Mbit/s is 1500 bytes in 1 ms
    full = PACKET - HEADERS
    wire.put(1.0, 0, frame(1, full))
    wire.put(1.0, 0, frame(2, full))
    wire.put(1.0005, 1, frame(0, full))
    wire.put(1.5, 0, frame(1, full))  # the uplink has been idle: what it did not use is lost
    expected = [(1.006, 1), (1.0065, 0), (1.007, 2), (1.506, 1)]
    found = arrivals(wire)
    assert [site for _, site in found] == [site for _, site in expected]
    assert [when for when, _ in found] == pytest.approx([when for when, _ in expected])


def test_without_a_rate_there_is_only_the_delay():
    wire = netlab.Wire(2, delay_ms=40)
    for _ in range(3):
        wire.put(2.0, 0, frame(1, 10**5, gso=1448))
    assert [when for when, _ in arrivals(wire)] == pytest.approx([2.04] * 3)


def test_a_large_segment_counts_as_the_packets_it_will_be():
    wire = netlab.Wire(2, mbit=8)  # a byte in 1 us
    wire.put(0.0, 0, frame(1, 10000, gso=1448))  # 6 full ones and 1312 bytes
    before = wire.counts()
    assert before.bytes == [[0, 0], [0, 0]], "counted before it arrived"
    assert arrivals(wire) == [(pytest.approx((10000 + 7 * HEADERS) * 1e-6), 1)]
    wire.put(1.0, 1, frame(0, 0))  # an acknowledgement
    arrivals(wire)
    counts = wire.counts() - before
    assert counts.packets == [[0, 7], [1, 0]]
    assert counts.payload == [[0, 10000], [0, 0]]
    assert counts.bytes == [[0, 10000 + 7 * HEADERS], [HEADERS, 0]]


def test_what_waits_too_long_is_dropped_and_not_counted():
    wire = netlab.Wire(2, mbit=12, buffer_ms=10.5)
    for _ in range(20):
        wire.put(0.0, 0, frame(1, PACKET - HEADERS))
    assert len(arrivals(wire)) == 11  # they wait 0, 1, ..., 10 ms
    assert wire.counts().dropped == 9
    assert wire.counts().packets == [[0, 11], [0, 0]]


def test_loss_and_jitter():
    wire = netlab.Wire(2, delay_ms=10, jitter_ms=4, loss=0.25, seed=3)
    for i in range(2000):
        wire.put(i * 1e-3, 0, frame(1, i % 7))
    expected = [i % 7 for i in range(2000)]
    found = wire.take(math.inf)
    assert wire.counts().dropped + len(found) == 2000
    assert wire.counts().dropped / 2000 == pytest.approx(0.25, abs=0.03)  # three standard deviations
    sizes = iter(expected)
    assert all(any(len(data) == len(frame(1, size)) for size in sizes) for _, data in found), (
        "order was not kept"
    )


@pytest.mark.parametrize(
    "data", [frame(1, 9, version=6), frame(5, 9), frame(0, 9, network=b"\xe0\x00\x00"), frame(1, 0)[:15]]
)
def test_what_goes_to_no_site_is_ignored(data):
    wire = netlab.Wire(2)
    wire.put(0.0, 0, data)
    assert wire.next_arrival() is None
    assert wire.counts().dropped == 0


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        (1, {}, "sites must be 2, 3 or 4; got 1"),
        (2, {"mbit": 0}, "mbit must be positive, or None"),
        (2, {"delay_ms": -1}, "delay_ms must be 0 or more; got -1"),
        (2, {"loss": 1}, "loss must be at least 0 and below 1"),
        (2, {"buffer_ms": 0}, "buffer_ms must be positive"),
        (2, {"mtu": 70000}, "mtu must be between 576 and 65000"),
    ],
)
def test_impossible_links_are_refused(sites, options, message):
    with pytest.raises(ValueError, match=message):
        netlab.Lab(sites, **options)


def test_what_is_missing_is_named_with_a_way_out(monkeypatch):
    monkeypatch.setattr(netlab.platform, "system", lambda: "Linux")
    monkeypatch.setattr(netlab.os, "geteuid", lambda: 0)
    monkeypatch.setattr(netlab.shutil, "which", lambda name: None)
    assert "install the package iproute2" in netlab.why_not()
    monkeypatch.setattr(netlab.os, "geteuid", lambda: 1000)
    assert "needs root; this is user 1000; try sudo" in netlab.why_not()
    with pytest.raises(RuntimeError, match="needs root"):
        netlab.Lab(2).__enter__()
    monkeypatch.setattr(sys, "argv", ["slow_link.py"])
    with pytest.raises(SystemExit, match="needs root.*--model"):
        slow_link.main()
    monkeypatch.setattr(netlab.platform, "system", lambda: "Darwin")
    assert "Linux alone has; this is Darwin" in netlab.why_not()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sites 5", "--sites must be of 2, 3, 4; got 5"),
        ("--mbit fast", "--mbit must be numbers"),
        ("--mbit 0", "--mbit must be positive"),
        ("--delay-ms none", "--delay-ms must be 0 or more"),
        ("--dim 100", "--dim must be a multiple of 32"),
        ("--rounds 0", "--rounds must be positive"),
        ("--settings adamw", "--settings must be of dense"),
    ],
)
def test_arguments_are_checked_first(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["slow_link.py", "--model", *arguments.split()])
    with pytest.raises(SystemExit, match=message):
        slow_link.main()


def test_a_setting_must_follow_its_schedule(monkeypatch):
    monkeypatch.setitem(slow_link.SETTINGS, "gated", {"tau": 0.3, "max_local_steps": 9})
    with pytest.raises(SystemExit, match="set tau=inf and max_local_steps"):
        slow_link.interval_of("gated")
    monkeypatch.setitem(slow_link.SETTINGS, "gated", {"tau": math.inf, "max_local_steps": 9})
    assert slow_link.interval_of("gated") == 10
    assert slow_link.at_interval(1.0, 11.0, 10) == 2.0


# What gloo takes over links of 20 ms without a rate, in delays,
# as measured with netlab.py: 2.0, 4.2, 8.4 and so on.
@pytest.mark.parametrize(
    ("ranks", "nbytes", "expected"),
    [
        (2, 8, 2),
        (2, 4000, 4),
        (3, 4000, 8),
        (4, 4000, 12),
        (2, 8 << 20, 8),
        (2, 16 << 20, 16),
        (4, 8 << 20, 12),
    ],
)
def test_delays_of_an_all_reduce(ranks, nbytes, expected):
    assert slow_link.delays("all_reduce", ranks, nbytes) == expected


def test_cost_model():
    messages = [
        Message("all_reduce", 8, 8.0),
        Message("all_reduce", 10**6, 10.0**6),
        Message("broadcast", 10**5, 5 * 10.0**4),
    ]
    assert slow_link.link_seconds(messages, 2, None, 0.0) == 0.0
    assert slow_link.link_seconds(messages, 2, 8.0, 0.0) == pytest.approx(1.050008)
    assert slow_link.link_seconds(messages, 2, None, 10.0) == pytest.approx((2 + 4 + 2) * 0.01)
    assert slow_link.link_seconds(messages, 2, 8.0, 10.0) == pytest.approx(1.130008)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the benchmark on a few links and returns its rows and what it printed."""
    pytest.importorskip(
        "rich", reason="the benchmark shows its results with rich: install the [report] extra"
    )
    handler = signal.getsignal(signal.SIGTERM)

    def run(*options: object) -> tuple[list[dict], str]:
        file = tmp_path / "rows.jsonl"
        small = ("--rounds", 1, "--batch", 1, "--seq", 16)
        monkeypatch.setattr(sys, "argv", [slow_link.__file__, *map(str, (*small, "--json", file, *options))])
        slow_link.main()
        return [json.loads(line) for line in file.read_text().splitlines()], capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, handler)


def take_turns(arguments) -> list:
    """One rank: every setting's turn, and then its next."""
    trainings = {name: slow_link.Training(name, arguments, dist.group.WORLD) for name in arguments.settings}
    for name in arguments.settings:
        for _ in range(1 + sum(slow_link.turn_of(name))):
            trainings[name].step()
    parameters = trainings["dense"].parameters
    turns = {
        (name, count): [trainings[name].step() for _ in range(count)]
        for name in trainings
        for count in slow_link.turn_of(name)
    }
    return [parameters, turns]


class Recorded:
    """Ranks that have taken their steps, forked, which saves the seconds that importing torch takes."""

    def __init__(self, sites: int, arguments):
        self.answers = run_ranks(sites, take_turns, arguments)

    def connect(self) -> int:
        return self.answers[0][0]

    def steps(self, name: str, count: int) -> list:
        return [turns[name, count] for _, turns in self.answers]


def test_modelled_links_say_that_they_are(run, monkeypatch):
    monkeypatch.setattr(
        slow_link, "ranks_of", lambda sites, arguments, lab: nullcontext(Recorded(sites, arguments))
    )
    monkeypatch.syspath_prepend(ROOT / "scripts")
    options = (
        "--model",
        "--sites",
        2,
        "--mbit",
        "1,none",
        "--delay-ms",
        1000,
        "--dim",
        32,
        "--layers",
        1,
        "--settings",
        "dense,average",
    )
    rows, output = run(*options)
    assert {row["label"] for row in rows} == {"cost model"}
    assert "cost model" in output
    assert "emulated" not in output
    assert [(row["mbit"], row["setting"]) for row in rows] == [
        (m, s) for m in (1, None) for s in ("dense", "average")
    ]
    dense, gated = rows[2:]
    assert gated["interval"] == 30
    assert gated["wire_bytes_per_step"] is None
    # The gate takes 2 delays, the gradients 4.
    assert 2 < gated["seconds_local"]["median"] < 4
    assert 6 < dense["seconds_per_step"] < 8
    assert dense["ledger_bytes_per_step"] == 2 * dense["parameters"] + 8  # bfloat16, and the gate
    assert rows[0]["seconds_per_step"] - dense["seconds_per_step"] == pytest.approx(
        8e-6 * dense["ledger_bytes_per_step"]
    )


@pytest.mark.skipif(netlab.why_not() is not None, reason=f"no emulated links here: {netlab.why_not()}")
def test_ledger_and_wire_agree(run):
    options = (
        "--sites",
        2,
        "--mbit",
        1000,
        "--delay-ms",
        1,
        "--dim",
        192,
        "--layers",
        4,
        "--settings",
        "dense",
    )
    [row], _ = run(*options)
    assert row["label"] == "emulated"
    assert row["ledger_bytes_per_step"] == pytest.approx(4e6, rel=0.1), "this is to be a payload of 4 MB"
    assert row["wire_bytes_per_step"] == pytest.approx(row["ledger_bytes_per_step"], rel=0.02)
    assert row["wire_bytes_per_step"] < row["packet_bytes_per_step"] < 1.06 * row["wire_bytes_per_step"]
    assert row["seconds_per_step"] > row["ledger_bytes_per_step"] * 8 / 1e9, "faster than the link"
    assert row["packets_dropped"] == 0
    assert netlab.namespaces(os.getpid()) == []


@pytest.mark.skipif(netlab.why_not() is not None, reason=f"no emulated links here: {netlab.why_not()}")
def test_sites_are_gone_after_an_error():
    with pytest.raises(KeyboardInterrupt), netlab.Lab(2) as lab:
        sleeper = lab.start(1, ["sleep", "100"])
        assert len(netlab.namespaces(os.getpid())) == 2
        raise KeyboardInterrupt
    assert sleeper.poll() is not None
    assert netlab.namespaces(os.getpid()) == []
